"""Whether a checkpoint is of this run: what may not differ from it, and which settings do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dblightning.flat_settings import dotted


def check_same_run(saved: dict[str, Any], own: dict[str, Any], adapter_only: bool = False) -> None:
    """Refuse a checkpoint whose adapter or replay buffer would mean something else in this run.

    Args:
        saved, own: the checkpoint's facts and this run's, by name; "base" is a fingerprint of the base model.
        adapter_only: the checkpoint is to be scored, not trained on: how its rollouts were sampled does not matter.

    Raises:
        ValueError: naming what differs.
    """
    if saved["reward"] != own["reward"]:
        raise ValueError(
            f"the checkpoint was trained on reward {saved['reward']!r}, this run has {own['reward']!r}; "
            "resume with the same reward, or start a new run from its exported adapter (init_adapter)"
        )
    names = [name for name in own if name != "base" and not (adapter_only and name in SAMPLING)]
    different = [name for name in names if not _same(saved.get(name), own[name])]
    # 1e-3: half-precision copies of a base model differ by 1e-5 in their fingerprints, another model by far more
    if not _same(saved["base"], own["base"], tolerance=1e-3):
        different.append("base")
    if different:
        what = "; ".join(f"{name} was {saved.get(name)!r} and is {own[name]!r}" for name in different if name != "base")
        base = "the base model differs" if "base" in different else ""
        raise ValueError(
            f"the checkpoint is of another run: {'; '.join(filter(None, (base, what)))}. Resume with its settings, or "
            "start a new run from its exported adapter (init_adapter)"
        )


#: facts that say how rollouts are sampled; the others describe the adapter and its base
SAMPLING = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt", "scheduler", "noise")


def changed_settings(
    saved: Mapping[str, Any], own: Mapping[str, Any], exclude: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Hyperparameters with another value than in the checkpoint: dotted name → (then, now).

    Args:
        saved, own: hyperparameters of this or an earlier version.
        exclude: dotted names that are not compared.
    """
    then, now = dotted(saved), dotted(own)
    names = [name for name in now if name in then and name not in exclude and not name.startswith("_")]
    return {name: (then[name], now[name]) for name in names if not _same(then[name], now[name])}


def _same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Equal, a tuple and a list of the same values too; floats to a relative ``tolerance``."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * abs(other)
    return bool(one == other)
