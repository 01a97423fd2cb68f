"""Nothing that the package computes has moved since the golden files were recorded; see ``record.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.golden import record

HERE = Path(__file__).parent
#: results agree to the bit where the files were made; elsewhere kernels sum in another order
EXACT = (HERE / "machine.txt").read_text().strip() == record.machine()


def assert_same(name: str, found: dict[str, Tensor]) -> None:
    golden = load_file(HERE / f"{name}.safetensors")
    assert sorted(found) == sorted(golden)
    for key, wanted in golden.items():
        tolerance = 0.0 if EXACT else 1e-5 * max(1.0, float(wanted.abs().max()))
        distance = float((found[key].double() - wanted.double()).abs().max())
        assert distance <= tolerance, f"{name}, {key}: off by {distance:.2g}"


@pytest.fixture(scope="module")
def bases(sd15_folder: Path, sdxl_folder: Path) -> dict[str, str | Path]:
    return {"sd15": sd15_folder, "sdxl": sdxl_folder, "miniature": "miniature"}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "miniature"])
def test_every_method_makes_the_latents_it_made(name: str, bases: dict[str, str | Path]) -> None:
    assert_same(name, record.latents_of_every_method(bases[name]))


@pytest.mark.parametrize(
    ("name", "make"),
    [("scores", record.score_table), ("rewards", record.rewards_of_pictures)],
    ids=["scores", "rewards"],
)
def test_scores_are_what_they_were(name: str, make: Callable[[], dict[str, Tensor]]) -> None:
    assert_same(name, make())


def test_training_draws_the_curve_it_drew(tmp_path: Path) -> None:
    adapter, curve = record.training(tmp_path)
    golden = {int(step): each for step, each in json.loads((HERE / "curve.json").read_text()).items()}
    # elsewhere: before the first update only, since Adam's first steps are signs of gradients
    steps = list(golden) if EXACT else list(golden)[:1]
    names = ["train/reward", "train/reward_std"] if not EXACT else None
    for step in steps:
        wanted = {name: value for name, value in golden[step].items() if names is None or name in names}
        found = {name: curve.steps[step][name] for name in wanted}
        assert found == (wanted if EXACT else pytest.approx(wanted, abs=1e-4))
    if EXACT:
        assert_same("adapter", adapter)


def test_the_checkpoint_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    adapter, _ = record.training(tmp_path, HERE / "rollout-000002.ckpt")
    if EXACT:
        assert_same("adapter", adapter)
    assert all(bool(each.isfinite().all()) for each in adapter.values())


def test_a_checkpoint_of_version_0_1_0_resumes(tmp_path: Path) -> None:
    adapter, curve = record.training(tmp_path, HERE / "from_0.1.0" / "rollout-000002.ckpt")
    assert sorted(curve.steps) == [2, 3], "it resumes after the two rollouts it holds"
    wanted: dict[str, Any] = load_file(HERE / "adapter.safetensors")
    assert sorted(adapter) == sorted(wanted)
