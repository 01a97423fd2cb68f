"""Every method against one, by preference: paired differences, win rates, adapters alone; and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dblightning.evaluation.analysis import Estimates, estimate
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM
from dblightning.evaluation.cells import (
    EMPTY,
    Points,
    adapter_names,
    baselines_by_weights,
    best_blends,
    cell,
    decimals,
    decorate,
    oracle_variants,
    preference_points,
    quantity_decimals,
)
from dblightning.evaluation.fronts import REFERENCE_VARIANT
from dblightning.evaluation.scores import INTERPOLATING, weights_label
from dblightning.evaluation.table_formats import Table

#: columns of the score table that hold a prompt's category, the first one found is used
CATEGORIES = ("category", "tag")


class Comparison(NamedTuple):
    """r(w) of the reference variant less another's, at one preference, with its paired interval."""

    variant: str
    weights: tuple[float, ...]
    value: float
    low: float
    high: float


def reference_variant(estimates: Estimates, points: dict[str, Points]) -> str | None:
    """DB-MPA, or without it the first method that interpolates adapters; None where there is neither."""
    methods = dict(zip(estimates.blends["variant"], estimates.blends["method"], strict=True))
    blending = [variant for variant in points if methods.get(variant) in INTERPOLATING - {"morl"}]
    return REFERENCE_VARIANT if REFERENCE_VARIANT in blending else next(iter(blending), None)


def mixed(points: Points) -> Points:
    """The points that weigh every reward; those of fewer belong to a smaller set of rewards."""
    return {weights: blend for weights, blend in points.items() if min(weights) > 0}


def compare_all(estimates: Estimates, rewards: Sequence[str], quantity: str = "weighted") -> list[Comparison]:
    """The reference variant against every other at every preference that mixes rewards, by a quantity (r(w))."""
    points = preference_points(estimates, rewards)
    reference = reference_variant(estimates, points)
    if reference is None:
        return []
    return [
        Comparison(variant, weights, *estimates.difference(blend, points[variant][weights], quantity))
        for variant in points
        for weights, blend in mixed(points[reference]).items()
        if variant != reference and weights in points[variant]
    ]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def paired_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """r(w) less the reference variant's at the same preference, paired image by image; positive is better than it."""
    reference = reference_variant(estimates, preference_points(estimates, rewards))
    found = compare_all(estimates, rewards)
    return differences_table("paired", f"r(w) less that of {reference}, paired", rewards, found)


def win_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Share of images whose r(w) is above the reference variant's, ties counted half."""
    points = preference_points(estimates, rewards)
    reference = reference_variant(estimates, points)
    cells = {}
    for each in compare_all(estimates, rewards):
        rate = estimates.win_rate(points[each.variant][each.weights], points[str(reference)][each.weights])
        cells[each.variant, each.weights] = cell(rate, 2)
    caption = f"Share of images whose r(w) is above that of {reference} with the same noise, ties counted half"
    return by_weights("win_rates", caption, rewards, cells)


def adapters_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """r(w) of each adapter alone, of a random adapter per image and of the base, by preference."""
    digits = quantity_decimals(estimates, "weighted")
    cells = {
        (variant, weights): cell(estimates.of(blend, "weighted"), digits)
        for weights, part in baselines_by_weights(estimates, rewards).items()
        for variant, blend in part.items()
        if min(weights) > 0
    }
    caption = "r(w) of one adapter alone and of an adapter drawn with probability w for each image"
    return by_weights("adapters_alone", caption, rewards, cells)


def category_column(frame: pd.DataFrame) -> str | None:
    """The column that holds the prompts' categories, or None."""
    return next((name for name in CATEGORIES if name in frame and frame[name].notna().any()), None)


def category_table(frame: pd.DataFrame, rewards: Sequence[str], samples: int, level: float) -> Table:
    """r(w) by category of the prompts, preference and method."""
    column, cells = category_column(frame), {}
    bold: set[tuple[str, tuple[str, tuple[float, ...]]]] = set()
    for category, part in frame.groupby(column, sort=False) if column is not None else ():
        estimates = estimate(part, samples, level=level)
        points, digits = preference_points(estimates, rewards), quantity_decimals(estimates, "weighted")
        row = f"{category} ({part['prompt_id'].nunique()} prompts)"
        for weights in sorted({weights for each in points.values() for weights in mixed(each)}):
            here = {variant: blends[weights] for variant, blends in points.items() if weights in blends}
            best = best_blends(estimates, list(here.values()), "weighted")
            for variant, blend in here.items():
                cells[variant, (row, weights)] = cell(estimates.of(blend, "weighted"), digits)
                if blend in best and variant not in oracle_variants(estimates):
                    bold.add((variant, (row, weights)))
    rows = list(dict.fromkeys(key for _, key in cells))
    columns = list(dict.fromkeys(variant for variant, _ in cells))
    table = pd.DataFrame([[cells.get((variant, row), EMPTY) for variant in columns] for row in rows], dtype=object)
    labels = [f"{category}, w = {weights_label(weights)}" for category, weights in rows]
    caption = f"r(w) by category of the prompts; w weighs {rewards[0]}"
    marks = {(rows.index(row), columns.index(variant)) for variant, row in bold}
    return Table("categories", caption, decorate(table.set_axis(columns, axis=1), labels, "category"), marks)


def differences_table(name: str, caption: str, rewards: Sequence[str], found: Sequence[Comparison]) -> Table:
    """Comparisons turned round, the others less the reference, as a table of preferences by variants."""
    found = [each for each in found if np.isfinite(each.value)]
    digits = decimals([(each.high - each.low) / 2 for each in found])
    cells = {
        (each.variant, each.weights): cell((-each.value, -each.high, -each.low), digits, sign=True) for each in found
    }
    return by_weights(name, caption, rewards, cells)


def by_weights(
    name: str, caption: str, rewards: Sequence[str], cells: dict[tuple[str, tuple[float, ...]], str]
) -> Table:
    """A table of preferences by variants from its cells, (variant, weights) → text."""
    rows = sorted({weights for _, weights in cells})
    columns = list(dict.fromkeys(variant for variant, _ in cells))
    frame = pd.DataFrame([[cells.get((variant, row), EMPTY) for variant in columns] for row in rows], dtype=object)
    labels = [f"w = {weights_label(row)}" for row in rows]
    caption += f"; w weighs {rewards[0]}"
    return Table(name, caption, decorate(frame.set_axis(columns, axis=1), labels, " / ".join(rewards)))


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Verdict(NamedTuple):
    """The comparisons in words: (what, about which) pairs, the lost ones first."""

    title: str
    lines: list[tuple[str, str]]


def verdict(estimates: Estimates, rewards: Sequence[str]) -> Verdict:
    """The variants that the reference beats and loses to, and at which preference, from the paired intervals.

    Lost comparisons come first, and among them the baselines: a blend that one adapter alone beats is of no use.
    """
    points = preference_points(estimates, rewards)
    reference, oracles = reference_variant(estimates, points), oracle_variants(estimates)
    title = " and ".join(rewards) if len(rewards) == 2 else ", ".join(rewards)
    found = [each for each in compare_all(estimates, rewards) if np.isfinite(each.low)]
    if reference is None or not mixed(points[reference]):
        return Verdict(title, [("No comparison", "no blend of these rewards was evaluated.")])
    fair = [each for each in found if each.variant not in oracles]
    lost, won = [each for each in fair if each.high < 0], [each for each in fair if each.low > 0]
    open_ = [each for each in fair if each.low <= 0 <= each.high]
    singles = adapter_names(estimates, points.get(BEST_SINGLE, {}))
    total = len(mixed(points[reference]))
    lines = [
        (f"{reference} loses to", listed(lost, total, singles)),
        (f"{reference} beats", listed(won, total, singles)),
        ("Not distinguishable from", listed(open_, total, {})),
        ("Best without retraining", _best(estimates, points, oracles)),
        (f"{reference} against a model retrained for the preference", _against_oracle(found, oracles, total)),
    ]
    lines = [(what, text) for what, text in lines if text]
    if not lost:
        lines.insert(0, (f"{reference} loses to", "none of the methods that need no retraining."))
    if BEST_SINGLE not in points:
        text = "the adapters were not evaluated alone, so it is not known whether blending beats the better of them; "
        lines.insert(0, ("Missing", text + "add a {method: single} blend for each."))
    return Verdict(title, lines)


def sides(found: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """What the reference loses to, beats, and is not distinguishable from, the lost ones first; without empty ones."""
    known = [each for each in found if np.isfinite(each.low)]
    kinds = {
        "loses to": [each for each in known if each.high < 0],
        "beats": [each for each in known if each.low > 0],
        "is not distinguishable from": [each for each in known if each.low <= 0 <= each.high],
    }
    return {kind: part for kind, part in kinds.items() if part}


def listed(found: Sequence[Comparison], total: int, adapters: dict[tuple[float, ...], str]) -> str:
    """Comparisons as "CoDe at w = 0.5, 0.8 (by 0.15, 0.15); …", the baselines first, then by size."""
    groups: dict[str, list[Comparison]] = {}
    for each in found:
        groups.setdefault(each.variant, []).append(each)
    baselines = (BEST_SINGLE, RANDOM)
    order = sorted(groups, key=lambda name: (name not in baselines, -max(abs(each.value) for each in groups[name])))
    texts = []
    for name in order:
        part = groups[name]
        names = list(dict.fromkeys(adapters[each.weights] for each in part if each.weights in adapters))
        called = f"the {name}" if name == BEST_SINGLE else f"a {name}" if name == RANDOM else name
        called += f" ({', '.join(names)})" if name == BEST_SINGLE and names else ""
        texts.append(f"{called} {_where(part, total)} ({_sizes(part)})")
    return "; ".join(texts) + "." if texts else ""


def _where(part: Sequence[Comparison], total: int) -> str:
    if len(part) == total > 1:
        return "at every w"
    return "at w = " + ", ".join(weights_label(each.weights) for each in part)


def _sizes(part: Sequence[Comparison]) -> str:
    digits = decimals([(each.high - each.low) / 2 for each in part])
    values = [each.value for each in part]
    shown = [min(values), max(values)] if len(part) > 4 else values
    texts = [f"{round(value, digits) + 0.0:+.{digits}f}" for value in shown]
    return (" to " if len(part) > 4 else ", ").join(texts).replace("-", "−")


def _best(estimates: Estimates, points: dict[str, Points], oracles: set[str]) -> str:
    texts = []
    for weights in sorted({weights for each in points.values() for weights in mixed(each)}):
        here = {blends[weights]: name for name, blends in points.items() if weights in blends and name not in oracles}
        best = best_blends(estimates, list(here), "weighted")
        if best:
            names = [name for blend, name in here.items() if blend in best]
            texts.append(f"at w = {weights_label(weights)} {', '.join(names)}")
    if len(texts) > 6:
        return ""  # a simplex of preferences; the table has it
    return "; ".join(texts) + "." if texts else ""


def _against_oracle(found: Sequence[Comparison], oracles: set[str], total: int) -> str:
    known = [each for each in found if each.variant in oracles]
    kinds = {
        "behind": [each for each in known if each.high < 0],
        "ahead": [each for each in known if each.low > 0],
        "not distinguishable": [each for each in known if each.low <= 0 <= each.high],
    }
    texts = [f"{kind} {_where(part, total)} ({_sizes(part)})" for kind, part in kinds.items() if part]
    return "; ".join(texts) + "." if texts else ""
