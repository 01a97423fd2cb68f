"""The same evaluation on adapters of several training seeds: what holds whatever the seed.

python -m dblightning seeds runs/a/scores.parquet runs/b/scores.parquet runs/c/scores.parquet
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dblightning.arguments import CommandParser
from dblightning.evaluation.analysis import OBJECTIVE, Estimates, estimate, oracle_shares, summary
from dblightning.evaluation.cells import baseline_points
from dblightning.evaluation.scores import preference_sets, preferences, read_scores, weights_label

#: quantity → heading
QUANTITIES = {
    "weighted_gain": "gain in r(w)",
    "minus_db_mpa": "less DB-MPA's",
    "share_of_oracle": "share of MORL's",
    # where an α was given
    OBJECTIVE: "E[r(w)] − α·KL over the base's",
    "objective_minus_db_mpa": "that less DB-MPA's",
}
#: quantity → that of which it is the difference to DB-MPA's
_LESS = {"minus_db_mpa": "weighted_gain", "objective_minus_db_mpa": OBJECTIVE}


def of_one_seed(frame: pd.DataFrame, alpha: float | None = None) -> pd.DataFrame:
    """Each blend's quantities (of :data:`QUANTITIES`) in one evaluation, by blend; NaN where there is none.

    The baselines of each preference, the best single adapter and a random adapter per image, are rows too.

    Args:
        frame: one row per image.
        alpha: see :func:`analysis.estimate`.
    """
    estimates = estimate(frame, alpha=alpha)
    table = summary(estimates)
    requested = dict(zip(table["blend"], preferences(table), strict=True))
    of_db_mpa = {requested[blend]: blend for blend in table.loc[table["method"] == "db-mpa", "blend"]}
    names = [name for name in QUANTITIES if alpha is not None or OBJECTIVE not in name]
    for name in set(_LESS) & set(names):
        values = dict(zip(table["blend"], table[_LESS[name]], strict=True))
        table[name] = [
            value - values.get(of_db_mpa.get(requested[blend], ""), np.nan) for blend, value in values.items()
        ]
    return pd.concat([table.set_index("blend")[names], _baselines(frame, estimates, names)])


def _baselines(frame: pd.DataFrame, estimates: Estimates, names: Sequence[str]) -> pd.DataFrame:
    """The quantities ``names`` of the baselines, by name and preference."""
    shares = oracle_shares(estimates).set_index("blend")["share_of_oracle"]
    blends = estimates.blends
    of_db_mpa = {
        requested: blend
        for requested, blend, method in zip(preferences(blends), blends["blend"], blends["method"], strict=True)
        if method == "db-mpa"
    }
    requested = dict(zip(estimates.rows["blend"], preferences(estimates.rows), strict=True))
    rows: dict[str, dict[str, float]] = {}
    for rewards in preference_sets(frame):
        for variant, points in baseline_points(estimates, rewards).items():
            for weights, blend in points.items():
                if min(weights) > 0:
                    other = of_db_mpa.get(requested[blend])
                    found = {"share_of_oracle": float(shares[blend])}
                    for name in set(names) - set(found) - set(_LESS):
                        found[name] = estimates.of(blend, name)[0]
                    for name in set(names) & set(_LESS):
                        less = (np.nan,) if other is None else estimates.difference(blend, other, _LESS[name])
                        found[name] = less[0]
                    rows[f"{variant}, w = {weights_label(weights)} ({', '.join(rewards)})"] = found
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(names), dtype=float)


def across_training_seeds(
    frames: Sequence[pd.DataFrame], level: float = 0.95, alpha: float | None = None
) -> pd.DataFrame:
    """Mean over training seeds with Student's interval: the seeds are the sample, however many images each has.

    Args:
        frames: one score table per training seed.
        level: of the intervals.
        alpha: α of eq. (4), reward per nat, adds E[r(w)] − α·KL; see :func:`analysis.estimate`.

    Returns:
        One row per blend that at least two tables have and quantity that at least two have a value of: ``blend``,
        ``quantity``, ``mean``, ``half_width``, ``seeds`` (their number), ``values`` (each seed's, in the order of the
        tables, NaN where a table lacks it). ``attrs["one_seed"]`` names the blends that one table alone has.

    Raises:
        ValueError: fewer than two tables, or no blend in common.
    """
    if len(frames) < 2:
        raise ValueError(f"several training seeds need at least two score tables, got {len(frames)}")
    each = [of_one_seed(frame, alpha) for frame in frames]
    rows, labels = [], dict.fromkeys(label for table in each for label in table.index)
    for blend in labels:
        for quantity in each[0]:
            values = [float(table[quantity].get(blend, np.nan)) for table in each]
            known = [value for value in values if np.isfinite(value)]
            if len(known) < 2:
                continue
            spread = float(np.std(known, ddof=1)) / len(known) ** 0.5
            width = float(stats.t.ppf((1 + level) / 2, len(known) - 1)) * spread
            rows.append((blend, quantity, float(np.mean(known)), width, len(known), values))
    if not rows:
        raise ValueError("the score tables have no blend in common: evaluate the same blends for each training seed")
    found = pd.DataFrame(rows, columns=["blend", "quantity", "mean", "half_width", "seeds", "values"])
    gained = [
        label for label in labels if any(np.isfinite(table["weighted_gain"].get(label, np.nan)) for table in each)
    ]
    found.attrs["one_seed"] = [label for label in gained if label not in set(found["blend"])]
    return found


def to_markdown(table: pd.DataFrame) -> str:
    """One line per blend, each quantity as mean ± half width, number of seeds (each seed's value)."""

    def cell(row: pd.Series) -> str:
        values = ", ".join("–" if np.isnan(value) else f"{value:.3f}" for value in row["values"])
        text = f"{row['mean'] + 0.0:.3f} ± {row['half_width']:.3f}, {row['seeds']} seeds ({values})"
        return text.replace("-", "−")

    shown = [name for name in QUANTITIES if OBJECTIVE not in name or name in set(table["quantity"])]
    lines = ["| blend | " + " | ".join(QUANTITIES[name] for name in shown) + " |", "|" + "---|" * (1 + len(shown))]
    for blend, rows in table.groupby("blend", sort=False):
        cells = {row["quantity"]: cell(row) for _, row in rows.iterrows()}
        lines.append(f"| {blend} | " + " | ".join(cells.get(quantity, "") for quantity in shown) + " |")
    alone = table.attrs.get("one_seed", [])
    lines += ["", f"Evaluated for one training seed only, so left out: {', '.join(alone)}."] if alone else []
    return "\n".join(lines)


def seeds_main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m dblightning seeds``; None takes the process's arguments."""
    parser = CommandParser(prog="dblightning seeds", description="Compare blends over training seeds.")
    parser.add_argument("scores", nargs="+", type=Path, help="scores.parquet, one per training seed")
    parser.add_argument("--level", type=float, default=0.95, help="level of the intervals (default 0.95)")
    parser.add_argument("--alpha", type=float, help="α of eq. (4), reward per nat: show E[r(w)] − α·KL too")
    options = parser.parse_args(arguments)
    if not 0 < options.level < 1:
        parser.error("--level must be between 0 and 1")
    try:
        table = across_training_seeds([read_scores(file)[0] for file in options.scores], options.level, options.alpha)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(to_markdown(table))
