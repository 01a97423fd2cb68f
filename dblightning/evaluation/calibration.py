"""The strength at which an adapter is the optimum it was trained for: λ* = argmax E[r] − α·KL over DB-KLA's λ.

    python -m dblightning calibrate runs/calibration/scores.parquet --adapter aesthetic --alpha 0.003 \
        --write runs/miniature/aesthetic_refl/adapter

An adapter that maximises eq. (4) at α has λ* = 1; one that has overshot it or was trained at another αᵢ has
λ* ≈ αᵢ/α. ``--write`` keeps λ* in the adapter's metadata, from where ``pipe(..., calibrate=True)`` takes it as its
strength in a blend (:class:`dblightning.blending.DBMPA`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dblightning.arguments import CommandParser, numbers_by_name
from dblightning.evaluation.analysis import KL, Estimates, estimate
from dblightning.evaluation.intervals import interval
from dblightning.evaluation.scores import REWARD, WEIGHT, read_scores


class Calibration(NamedTuple):
    """An adapter's λ* at an α."""

    adapter: str
    alpha: float  # reward per nat of path KL
    strength: float  # λ*
    low: float  # ends of its 95 % interval over prompts
    high: float
    largest: float  # of the λ's that were tried: at it, λ* may be larger still

    @property
    def calibrated(self) -> bool:
        """Whether 1 lies in the interval."""
        return self.low <= 1 <= self.high

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        end = " (the largest that was tried: go on to larger ones)" if self.strength >= self.largest else ""
        verdict = "calibrated" if self.calibrated else "to be run at this strength"
        return (
            f"{self.adapter} at α = {self.alpha:g}: λ* = {self.strength:.2f} ({self.low:.2f} to {self.high:.2f}), "
            f"{verdict}{end}"
        )


def peak(scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where the parabola through the best point and its neighbours is largest; at an end, the end.

    Args:
        scales: rising, (L,), L ≥ 3.
        values: (..., L).

    Returns:
        (...)

    >>> peak(np.array([0.0, 1.0, 2.0]), np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 3.0]])).tolist()
    [1.0, 1.5, 2.0]
    """
    best = values.argmax(-1)
    middle = np.clip(best, 1, len(scales) - 2)
    x = np.stack([scales[middle + step] for step in (-1, 0, 1)], axis=-1)
    y = np.take_along_axis(values, np.stack([middle + step for step in (-1, 0, 1)], axis=-1), axis=-1)
    left, right = (y[..., 1] - y[..., 0]) / (x[..., 1] - x[..., 0]), (y[..., 2] - y[..., 1]) / (x[..., 2] - x[..., 1])
    bend = (right - left) / (x[..., 2] - x[..., 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = (x[..., 0] + x[..., 1]) / 2 - left / (2 * bend)
    inner = (best > 0) & (best < len(scales) - 1) & (bend < 0)
    return np.where(inner, np.clip(vertex, x[..., 0], x[..., 2]), scales[best])


def calibrate(
    frame: pd.DataFrame, adapter: str, alpha: float, reward: Mapping[str, float] | None = None
) -> Calibration:
    """An adapter's λ* from the scores of ``base`` and of ``db-kla`` at several λ (``single`` is λ = 1).

    Args:
        frame: one row per image, with the path KL (``--model.kl true``).
        adapter: its name.
        alpha: α of eq. (4), > 0, in units of the reward per nat.
        reward: measured reward → share of the reward it was trained on; None: the one of the adapter's name.

    Raises:
        ValueError: no KL, a reward that was not measured, or fewer than three λ's, the base's 0 included.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be > 0 and finite, got {alpha}")
    estimates = estimate(frame)
    if KL not in estimates.quantities:
        raise ValueError("the scores have no path KL; evaluate with --model.kl true")
    shares = {adapter: 1.0} if reward is None else dict(reward)
    for name in shares:
        if name not in estimates.rewards:
            raise ValueError(f"reward {name!r} was not measured; the table has {estimates.rewards}")
    points = _points(estimates, adapter)
    if len(points) < 3:
        raise ValueError(
            f"λ* of {adapter!r} needs the base and db-kla at two λ's or more, and the scores have λ = {list(points)}"
        )
    rows, scales = [points[scale] for scale in sorted(points)], np.array(sorted(points))
    columns = [estimates.quantities.index(REWARD + name) for name in shares] + [estimates.quantities.index(KL)]
    sizes = np.array([*shares.values(), -alpha])
    value = estimates.values[rows][:, columns] @ sizes
    draws = estimates.draws[:, rows][:, :, columns] @ sizes
    low, high = interval(peak(scales, draws), estimates.units)
    return Calibration(adapter, alpha, float(peak(scales, value)), float(low), float(high), float(scales[-1]))


def _points(estimates: Estimates, adapter: str) -> dict[float, int]:
    """λ → row."""
    found: dict[float, int] = {}
    for row, settings in enumerate(estimates.blends.to_dict("records")):
        alone = float(settings.get(WEIGHT + adapter) or 0.0) == 1.0 or settings.get("adapter") == adapter
        if settings["method"] == "base":
            found[0.0] = row
        elif settings["method"] in ("single", "db-kla") and alone:
            found[float(settings["kl_scale"])] = row
    return found


def write_strength(folder: str | Path, found: Calibration) -> Path:
    """Keep λ* in the metadata of an adapter's file; returns the file."""
    from dblightning.adapters import annotate

    kept: dict[str, Any] = {"alpha": found.alpha, "strength": found.strength, "low": found.low, "high": found.high}
    return annotate(folder, calibration=kept)


def calibrate_main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m dblightning calibrate``; None takes the process's arguments."""
    parser = CommandParser(prog="dblightning calibrate", description="Find an adapter's strength λ* at an α.")
    parser.add_argument("scores", type=Path, help="scores.parquet of base and db-kla at several λ, with the path KL")
    parser.add_argument("--adapter", required=True, help="its name in the scores")
    parser.add_argument("--alpha", type=float, required=True, help="α of eq. (4), reward per nat of path KL")
    parser.add_argument("--reward", nargs="+", default=[], metavar="NAME=SHARE", help="what it was trained on")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep λ* in the metadata of the LoRA in FOLDER")
    options = parser.parse_args(arguments)
    try:
        reward = numbers_by_name(options.reward) or None
        found = calibrate(read_scores(options.scores)[0], options.adapter, options.alpha, reward)
        print(found.sentence)
        if options.write is not None:
            print(f"wrote it to {write_strength(options.write, found)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
