"""The same evaluation on adapters of several training seeds: what holds whatever the seed.

python -m dblightning seeds runs/a/scores.parquet runs/b/scores.parquet runs/c/scores.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dblightning.evaluation.analysis import summary
from dblightning.evaluation.table import preferences, read_scores

#: quantity → heading
QUANTITIES = {
    "weighted_gain": "gain in r(w)",
    "minus_db_mpa": "less DB-MPA's",
    "share_of_oracle": "share of MORL's",
}


def of_one_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Each blend's quantities (columns of :data:`QUANTITIES`) in one evaluation, by blend; NaN where there is none.

    Args:
        frame: one row per image.
    """
    table = summary(frame)
    asked, gains = preferences(table), table["weighted_gain"]
    of_db_mpa = {
        each: gain for each, gain, method in zip(asked, gains, table["method"], strict=True) if method == "db-mpa"
    }
    table["minus_db_mpa"] = [gain - of_db_mpa.get(each, np.nan) for each, gain in zip(asked, gains, strict=True)]
    return table.set_index("blend")[list(QUANTITIES)]


def across_training_seeds(frames: Sequence[pd.DataFrame], level: float = 0.95) -> pd.DataFrame:
    """Mean over training seeds with Student's interval: the seeds are the sample, however many images each has.

    Args:
        frames: one score table per training seed.
        level: of the intervals.

    Returns:
        One row per blend that at least two tables have and quantity that at least two have a value of: ``blend``,
        ``quantity``, ``mean``, ``half_width``, ``seeds`` (their number), ``values`` (each seed's, in the order of the
        tables, NaN where a table lacks it).

    Raises:
        ValueError: fewer than two tables, or no blend in common.
    """
    if len(frames) < 2:
        raise ValueError(f"several training seeds need at least two score tables, got {len(frames)}")
    each = [of_one_seed(frame) for frame in frames]
    rows = []
    for blend in dict.fromkeys(label for table in each for label in table.index):
        for quantity in QUANTITIES:
            values = [float(table[quantity].get(blend, np.nan)) for table in each]
            known = [value for value in values if np.isfinite(value)]
            if len(known) < 2:
                continue
            spread = float(np.std(known, ddof=1)) / len(known) ** 0.5
            width = float(stats.t.ppf((1 + level) / 2, len(known) - 1)) * spread
            rows.append((blend, quantity, float(np.mean(known)), width, len(known), values))
    if not rows:
        raise ValueError("the score tables have no blend in common: evaluate the same blends for each training seed")
    return pd.DataFrame(rows, columns=["blend", "quantity", "mean", "half_width", "seeds", "values"])


def to_markdown(table: pd.DataFrame) -> str:
    """One line per blend, each quantity as mean ± half width (each seed's value)."""

    def cell(row: pd.Series) -> str:
        values = ", ".join("–" if np.isnan(value) else f"{value:.3f}" for value in row["values"])
        return f"{row['mean']:.3f} ± {row['half_width']:.3f} ({values})".replace("-", "−")

    lines = ["| blend | " + " | ".join(QUANTITIES.values()) + " |", "|" + "---|" * (1 + len(QUANTITIES))]
    for blend, rows in table.groupby("blend", sort=False):
        cells = {row["quantity"]: cell(row) for _, row in rows.iterrows()}
        lines.append(f"| {blend} | " + " | ".join(cells.get(quantity, "") for quantity in QUANTITIES) + " |")
    return "\n".join(lines)


def seeds_main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m dblightning seeds``; None takes the process's arguments."""
    parser = argparse.ArgumentParser(prog="dblightning seeds", description="Compare blends over training seeds.")
    parser.add_argument("scores", nargs="+", type=Path, help="scores.parquet, one per training seed")
    parser.add_argument("--level", type=float, default=0.95, help="level of the intervals (default 0.95)")
    options = parser.parse_args(arguments)
    if not 0 < options.level < 1:
        parser.error("--level must be between 0 and 1")
    try:
        table = across_training_seeds([read_scores(file)[0] for file in options.scores], options.level)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(to_markdown(table))
