"""The miniature's blends, shared by the studio's tests."""

from __future__ import annotations

import pytest

from dblightning.arguments import studio_parser
from dblightning.shared_pipeline import SharedPipeline
from dblightning.studio.blends import Blends
from dblightning.studio.command import live_rewards


@pytest.fixture(scope="package")
def blends() -> Blends:
    """The miniature with its adapters and rewards."""
    return Blends(SharedPipeline.load(device="cpu"), live_rewards(studio_parser().parse_args([]), "miniature"))
