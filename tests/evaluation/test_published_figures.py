"""Figures that docs/measurements.md states of adapters of one α, from the rows in docs/results."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.analysis import estimate
from dblightning.evaluation.calibration import calibrate
from dblightning.evaluation.equal_terms import compare_at_equal_kl
from tests.evaluation.page_tables import ALPHA, ROOT, published

PAGE = ROOT / "docs" / "measurements.md"


class Seeds(NamedTuple):
    """Three training seeds of a pair of adapters; the second reward is the aesthetic one."""

    tables: tuple[str, str, str]
    first: str = "alignment"
    alpha: float = ALPHA


#: by heading of the page
SEEDS = {
    "Adapters of the same KL weight": Seeds(("one_alpha", "one_alpha_1", "one_alpha_2")),
    "Alignment trained on": Seeds(("mixing", "mixing_1", "mixing_2")),
    "Rewards that agree": Seeds(
        ("table5_one_alpha", "table5_one_alpha_1", "table5_one_alpha_2"), "compressibility", 0.005
    ),
}
NAMES = {
    "the better single adapter": "single",
    "a random adapter per image": "random",
    "the exact soup": "rewarded-soup",
    "DB-MPA-LS, rotation": "db-mpa-ls",
}


def test_both_adapters_are_the_optima_of_one_alpha() -> None:
    frame = published("calibration")
    section = PAGE.read_text(encoding="utf-8").split("# Adapters of the same KL weight\n", 1)[1].split("\n### ")[0]
    stated = re.findall(r"λ\* = ([\d.]+) \(([\d.]+) to ([\d.]+)\)", section)
    found = [
        calibrate(frame, "alignment", ALPHA, {"alignment": 0.4, "alignment_strict": 0.6}),
        calibrate(frame, "aesthetic", ALPHA),
    ]
    assert all(each.calibrated for each in found)
    assert stated == [tuple(f"{value:.2f}" for value in (each.strength, each.low, each.high)) for each in found]


def gains(frame: pd.DataFrame, blend: str, first: str, w: float) -> tuple[pd.Series, pd.Series]:
    """Gain in r(w) over the base and path KL of each image, by prompt; w weighs the reward ``first``."""

    def of(name: str) -> pd.Series:
        own = frame[frame["blend"] == name].set_index("prompt_id").sort_index()
        return w * own[f"reward/{first}"] + (1 - w) * own["reward/aesthetic"]

    kl = frame[frame["blend"] == blend].set_index("prompt_id").sort_index()["kl"]
    return of(blend) - of("base"), kl


def difference(frame: pd.DataFrame, other: str, first: str, w: float, alpha: float) -> pd.Series:
    """DB-MPA's gain in r(w) less α times its KL, less another's, by prompt."""

    def value(blend: str) -> pd.Series:
        gain, kl = gains(frame, blend, first, w)
        return gain - alpha * kl

    suffix = "_".join(sorted([f"aesthetic-{1 - w:.1g}", f"{first}-{w:g}"]))
    alone = {each: value(f"single_{each}-1") for each in (first, "aesthetic")}
    if other == "single":
        by_reward = {each: gains(frame, f"single_{each}-1", first, w)[0].mean() for each in alone}
        its = alone[max(by_reward, key=lambda each: by_reward[each])]
    elif other == "random":
        its = w * alone[first] + (1 - w) * alone["aesthetic"]
    else:
        its = value(f"{other}_{suffix}" + ("_rotation" if other == "db-mpa-ls" else ""))
    return value(f"db-mpa_{suffix}") - its


def stated(section: str, heading: str) -> dict[tuple[str, float], list[str]]:
    """(other, w) → each seed's cell, of a table of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"# {section}\n", 1)[1]
    lines = text[text.index(f"| DB-MPA's {heading} less that of |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (NAMES[name], w): cell.split(" / ")
        for name, *values in cells
        for cell, w in zip(values, (0.2, 0.5, 0.8), strict=True)
    }


@pytest.mark.parametrize("section", SEEDS)
@pytest.mark.parametrize("heading", ["E[r(w)] − α·KL", "r(w)"])
def test_the_tables_of_one_alpha_are_what_the_rows_say(section: str, heading: str) -> None:
    """Recomputed without the package's estimates: means, and percentiles of a bootstrap of its own."""
    tables, first, alpha = SEEDS[section]
    alpha = alpha if "α" in heading else 0.0
    cells, frames = stated(section, heading), [published(name) for name in tables]
    assert len(cells) == len(NAMES) * 3
    for (other, w), values in cells.items():
        for frame, cell in zip(frames, values, strict=True):
            less = difference(frame, other, first, w, alpha)
            value = re.match(r"([+−][\d.]+)", cell)
            assert value is not None and f"{less.mean():+.2f}".replace("-", "−") == value[1], (other, w)
            draws = np.random.default_rng(0).multinomial(len(less), np.full(len(less), 1 / len(less)), 4000) / len(less)
            low, high = np.percentile(draws @ less.to_numpy(), [2.5, 97.5])
            if min(abs(low), abs(high)) > 0.002:  # nearer to 0 another bootstrap may say otherwise
                assert ("n.s." in cell) == (low < 0 < high), (other, w, low, high)


@pytest.mark.parametrize("section", SEEDS)
def test_the_table_at_equal_kl_is_what_the_rows_say(section: str) -> None:
    cells, (tables, first, _) = stated(section, "r(w) at equal KL"), SEEDS[section]
    for place, name in enumerate(tables):
        estimates = estimate(published(name), samples=1000)
        for each in compare_at_equal_kl(estimates, [first, "aesthetic"]):
            own = {"best single adapter": "single", "random adapter per image": "random"}.get(each.variant, "")
            other = own or {"Rewarded Soup (exact)": "rewarded-soup", "DB-MPA-LS (rotation)": "db-mpa-ls"}.get(
                each.variant
            )
            if (other, each.weights[0]) in cells:
                value = cells[str(other), each.weights[0]][place].split()[0]
                assert value == f"{each.value:+.2f}".replace("-", "−"), (name, each)
