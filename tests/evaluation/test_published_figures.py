"""Figures that docs/measurements.md states of adapters of one α, from the rows in docs/results."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.calibration import calibrate
from dblightning.evaluation.scores import read_scores

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measurements.md"
#: nats of path KL that a unit of reward is worth, both adapters' own
ALPHA = 0.002
NAMES = {
    "the better single adapter": "single",
    "a random adapter per image": "random",
    "the exact soup": "rewarded-soup",
    "DB-MPA-LS, rotation": "db-mpa-ls",
}


def rows(name: str) -> pd.DataFrame:
    file = ROOT / "docs" / "results" / f"miniature_{name}.parquet"
    if not file.is_file():
        pytest.skip("docs/results is not part of this copy")
    return read_scores(file)[0]


def test_both_adapters_are_the_optima_of_one_alpha() -> None:
    frame = rows("calibration")
    stated = re.findall(r"λ\* = ([\d.]+) \(([\d.]+) to ([\d.]+)\)", PAGE.read_text(encoding="utf-8"))
    found = [
        calibrate(frame, "alignment", ALPHA, {"alignment": 0.4, "alignment_strict": 0.6}),
        calibrate(frame, "aesthetic", ALPHA),
    ]
    assert all(each.calibrated for each in found)
    assert stated == [tuple(f"{value:.2f}" for value in (each.strength, each.low, each.high)) for each in found]


def gains(frame: pd.DataFrame, blend: str, w: float) -> tuple[pd.Series, pd.Series]:
    """Gain in r(w) over the base and path KL of each image, by prompt."""

    def of(name: str) -> pd.Series:
        own = frame[frame["blend"] == name].set_index("prompt_id").sort_index()
        return w * own["reward/alignment"] + (1 - w) * own["reward/aesthetic"]

    kl = frame[frame["blend"] == blend].set_index("prompt_id").sort_index()["kl"]
    return of(blend) - of("base"), kl


def test_the_table_of_one_alpha_is_what_the_rows_say() -> None:
    frame = rows("one_alpha")
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("| DB-MPA's E[r(w)] − α·KL less that of |")
    lines = text[start:].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == len(NAMES)
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for cell, w in zip(cells, (0.2, 0.5, 0.8), strict=True):
            suffix = f"aesthetic-{1 - w:.1g}_alignment-{w:g}"
            alone = {each: objective(frame, f"single_{each}-1", w) for each in ("alignment", "aesthetic")}
            other = {
                "single": lambda alone=alone: max(alone.values(), key=np.mean),
                "random": lambda alone=alone, w=w: w * alone["alignment"] + (1 - w) * alone["aesthetic"],
                "rewarded-soup": lambda s=suffix, w=w: objective(frame, f"rewarded-soup_{s}", w),
                "db-mpa-ls": lambda s=suffix, w=w: objective(frame, f"db-mpa-ls_{s}_rotation", w),
            }[NAMES[name]]()
            less = objective(frame, f"db-mpa_{suffix}", w) - other
            value = re.match(r"([+−][\d.]+)", cell)
            assert value is not None and f"{less.mean():+.2f}".replace("-", "−") == value[1], (name, w)
            draws = np.random.default_rng(0).multinomial(len(less), np.full(len(less), 1 / len(less)), 4000) / len(less)
            low, high = np.percentile(draws @ less.to_numpy(), [2.5, 97.5])
            assert ("n.s." in cell) == (low < 0 < high), (name, w, low, high)


def objective(frame: pd.DataFrame, blend: str, w: float) -> pd.Series:
    """E[r(w)] − α·KL of each prompt, over the base's."""
    gain, kl = gains(frame, blend, w)
    return gain - ALPHA * kl
