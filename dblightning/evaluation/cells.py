"""Cells of the tables, and what their rows and columns are: preferences and methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dblightning.evaluation.analysis import Estimates
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM, single_blends
from dblightning.evaluation.scores import INTERPOLATING, WEIGHT, fronts, weight_names, weights_of, within

EMPTY = "–"

#: weights → label of a blend or baseline
Points = dict[tuple[float, ...], str]


def decimals(halves: Sequence[float] | np.ndarray) -> int:
    """Decimals that show one digit of the typical half width, 2 to 5; 2 where there is no interval."""
    known = np.asarray([half for half in halves if np.isfinite(half) and half > 0])
    return int(np.clip(np.ceil(-np.log10(np.median(known))), 2, 5)) if len(known) else 2


def cell(values: Sequence[float] | np.ndarray, digits: int = 2, sign: bool = False) -> str:
    """A mean with half the width of its interval: "0.42 ± 0.03", or the mean alone where there is no interval."""
    value, low, high = values
    if not np.isfinite(value):
        return EMPTY
    value = round(value, digits) + 0.0  # no minus before a zero
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if not np.isfinite(high - low) else f"{text} ± {(high - low) / 2:.{digits}f}"


def quantity_decimals(estimates: Estimates, quantity: str) -> int:
    """Digits after the point for a column of estimates, from its intervals' half widths."""
    column = estimates.quantities.index(quantity)
    return decimals((estimates.high[:, column] - estimates.low[:, column]) / 2)


def estimate_cell(estimates: Estimates, blend: str, quantity: str, sign: bool = False) -> str:
    """A blend's estimate as a cell, "0.52 ± 0.03"; ``sign`` puts a plus before positive values."""
    return cell(estimates.of(blend, quantity), quantity_decimals(estimates, quantity), sign)


def decorate(frame: pd.DataFrame, rows: Sequence[str], name: str) -> pd.DataFrame:
    """The table with its row labels, their heading and :data:`EMPTY` where there is no value."""
    return frame.set_axis(pd.Index(rows, name=name), axis=0).fillna(EMPTY)


# ── preferences by methods ───────────────────────────────────────────────────────────────────────────────────────────


def baselines_by_weights(estimates: Estimates, rewards: Sequence[str]) -> dict[tuple[float, ...], dict[str, str]]:
    """Weights → variant of the baseline → its label, for preferences that mix nothing but ``rewards``."""
    rows = estimates.rows.iloc[estimates.evaluated :]
    rows = rows[within(rows, rewards)]
    found: dict[tuple[float, ...], dict[str, str]] = {}
    for weights, variant, blend in zip(weights_of(rows, rewards), rows["variant"], rows["blend"], strict=True):
        found.setdefault(tuple(map(float, weights)), {})[variant] = blend
    return found


def baseline_points(estimates: Estimates, rewards: Sequence[str]) -> dict[str, Points]:
    """The baselines as columns of a table by preference: the best single adapter, and a random adapter per image.

    The best single adapter of a preference is, among those its blends mix, the one of the highest mean r(w); where one
    weight is 1 both baselines are that adapter. Empty where the adapters were not evaluated alone.
    """
    points: dict[str, Points] = {BEST_SINGLE: {}, RANDOM: {}}
    for weights, part in baselines_by_weights(estimates, rewards).items():
        if RANDOM not in part:  # an adapter is missing: the best of the others is not the best
            continue
        points[RANDOM][weights] = part.pop(RANDOM)
        values = {blend: estimates.of(blend, "weighted")[0] for blend in part.values()}
        known = [blend for blend in values if np.isfinite(values[blend])]
        if known:
            points[BEST_SINGLE][weights] = max(known, key=lambda blend: values[blend])
    if not points[RANDOM]:
        return {}
    for name, blend in single_blends(estimates.blends).items():
        if name in rewards:
            end = tuple(float(each == name) for each in rewards)
            points[BEST_SINGLE][end] = points[RANDOM][end] = blend
    return {name: dict(sorted(each.items())) for name, each in points.items()}


def preference_points(estimates: Estimates, rewards: Sequence[str]) -> dict[str, Points]:
    """The columns of a table by preference: variant → weights → label (see ``table.fronts``), less the base.

    The baselines come first (:func:`baseline_points`). The single adapters have a column of their own only where
    neither a baseline nor a method that interpolates them shows them.
    """
    blends = estimates.blends
    methods = dict(zip(blends["variant"], blends["method"], strict=True))
    found = baseline_points(estimates, rewards)
    apart = {"base", "single"} if found or INTERPOLATING & set(methods.values()) else {"base"}
    return found | {name: points for name, points in fronts(blends, rewards).items() if methods[name] not in apart}


def oracle_variants(estimates: Estimates) -> set[str]:
    """Variants that were trained for the very preference (MORL): never bold, whatever stands in for their ends."""
    return set(estimates.blends.loc[estimates.blends["method"] == "morl", "variant"])


def adapter_names(estimates: Estimates, points: Points) -> dict[tuple[float, ...], str]:
    """Which adapter the best single adapter is, by preference."""
    rows = estimates.rows
    alone = dict(zip(rows["blend"], rows["adapter_alone"], strict=True))
    return {weights: alone[blend] for weights, blend in points.items() if isinstance(alone[blend], str)}


def readable_labels(estimates: Estimates) -> dict[str, str]:
    """Readable label of each blend: its variant, then its weights; the label itself where two would read alike."""
    names = weight_names(estimates.blends)
    found = {}
    for _, row in estimates.blends.iterrows():
        weights = {name: row[WEIGHT + name] for name in names if row[WEIGHT + name] > 0}
        if row["method"] == "single" and pd.isna(row["adapter"]) and row["kl_scale"] == 1:
            found[row["blend"]] = f"{next(iter(weights), '')} adapter".strip()
        else:
            shown = ", ".join(f"{name} {weight:.3g}" if weight != 1 else name for name, weight in weights.items())
            found[row["blend"]] = f"{row['variant']}: {shown}" if shown else str(row["variant"])
    texts = list(found.values())
    return {blend: text if texts.count(text) == 1 else f"{text} ({blend})" for blend, text in found.items()}


def best_blends(estimates: Estimates, blends: Sequence[str], quantity: str) -> set[str]:
    """The blends that are best in a quantity, and those whose paired difference to the best has an interval around 0.

    Oracles (MORL) take no part: they were trained for the very preference.

    Args:
        estimates: of the evaluation.
        blends: labels to choose from; those without a value are left out.
        quantity: ``weighted`` for blends of the same weights, or another name.
    """
    methods = estimates.methods()
    values = {each: estimates.of(each, quantity)[0] for each in blends if methods[each] != "morl"}
    values = {each: value for each, value in values.items() if np.isfinite(value)}
    if not values:
        return set()
    best = max(values, key=lambda each: values[each])
    gaps = {each: estimates.difference(best, each, quantity) for each in values}
    return {best} | {each for each, (_, low, high) in gaps.items() if low <= 0 <= high}
