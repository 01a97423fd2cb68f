"""The command ``python -m dblightning studio``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dblightning.arguments import named_paths, studio_parser
from dblightning.miniature import EMBEDDED
from dblightning.serving.command import model_of

if TYPE_CHECKING:
    from dblightning.studio.page import Studio


def studio_main(argv: Sequence[str] | None = None) -> None:
    """Open the page and serve it until interrupted."""
    options = studio_parser().parse_args(argv)
    from dblightning.studio.page import launch  # the extra, before a model is loaded

    auth = password(options)
    studio = make_studio(options)
    launch(studio, options.host, options.port, auth=auth, inbrowser=not options.no_browser and _has_display())


def password(options: argparse.Namespace) -> tuple[str, str] | None:
    """Name and password of the page: beyond this machine there is one, unless it is turned off.

    Raises:
        ValueError: none given where one is needed.
    """
    token = os.environ.get(options.token_env, "")
    if options.no_token or (not token and options.host in ("127.0.0.1", "localhost")):
        return None
    if not token:
        raise ValueError(
            f"listening on {options.host} needs a password: set {options.token_env}; --no-token turns it off"
        )
    return ("studio", token)


def make_studio(options: argparse.Namespace) -> Studio:
    """The page's functions on a loaded pipeline.

    Raises:
        FileNotFoundError, ValueError: what the command line names is missing or wrong.
    """
    base, adapters, presets = model_of(options)
    missing = [path for path in options.scores if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"--scores: no file {missing[0]}")
    rewards = live_rewards(options, base)
    from dblightning.shared_pipeline import SharedPipeline
    from dblightning.studio.blends import Blends
    from dblightning.studio.page import Studio

    shared = SharedPipeline.load(base, adapters, options.device, options.dtype, options.max_rows)
    if not shared.adapters:
        raise ValueError(f"{base} has no adapters to blend; name some with --adapter NAME=PATH")
    like = next(iter(presets.values())).replaced(base=base, adapters=adapters)
    return Studio(Blends(shared, rewards), like, options.scores)


def live_rewards(options: argparse.Namespace, base: str) -> dict[str, Any]:
    """The rewards by name: those named, or the miniature's own."""
    named = named_paths(options.rewards, "--reward")
    if named is None and base in EMBEDDED:
        from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment, compressibility

        return {each.name: each for each in (ShapeAesthetic(), ShapeAlignment(), compressibility())}
    from dblightning.rewards.registry import build_reward

    rewards = {name: build_reward(path) for name, path in (named or {}).items()}
    for reward in rewards.values():
        reward.to(options.device or "cpu")
    return rewards


def _has_display() -> bool:
    return os.name == "nt" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
