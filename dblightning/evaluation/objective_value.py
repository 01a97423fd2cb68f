"""Methods by what eq. (4) maximises: E[r(w)] − α·KL, over the base's.

Lemma 1's blend approximates the optimum of that for adapters of one α, so this is what it is to be judged by. A policy
retrained for the preference is an oracle only where none here has more of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dblightning.evaluation.analysis import OBJECTIVE, Estimates
from dblightning.evaluation.baselines import BEST_SINGLE
from dblightning.evaluation.cells import (
    Points,
    adapter_names,
    cell,
    oracle_variants,
    preference_points,
    quantity_decimals,
    readable_labels,
)
from dblightning.evaluation.comparisons import (
    by_weights,
    compare_all,
    differences_table,
    listed,
    mixed,
    reference_variant,
    sides,
)
from dblightning.evaluation.scores import weights_label, within
from dblightning.evaluation.table_formats import Table


def has_objective(estimates: Estimates) -> bool:
    """Whether an α was given."""
    return OBJECTIVE in estimates.quantities


def objective_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """E[r(w)] − α·KL over the base's, by preference and method."""
    points = preference_points(estimates, rewards) if has_objective(estimates) else {}
    cells, digits = {}, quantity_decimals(estimates, OBJECTIVE) if points else 2
    for variant, blends in points.items():
        for weights, blend in mixed(blends).items():
            cells[variant, weights] = cell(estimates.of(blend, OBJECTIVE), digits, sign=True)
    return by_weights("objective", "E[r(w)] − α·KL over the base's", rewards, cells)


def paired_objective_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """E[r(w)] − α·KL less the reference variant's, paired image by image; positive is better than it."""
    found = compare_all(estimates, rewards, OBJECTIVE) if has_objective(estimates) else []
    reference = reference_variant(estimates, preference_points(estimates, rewards))
    caption = f"E[r(w)] − α·KL less that of {reference}, paired"
    return differences_table("objective_paired", caption, rewards, found)


def objective_lines(estimates: Estimates, rewards: Sequence[str]) -> list[tuple[str, str]]:
    """The comparison in words, the lost ones first, and where a retrained policy is no oracle; empty without α."""
    if not has_objective(estimates):
        return []
    points, oracles = preference_points(estimates, rewards), oracle_variants(estimates)
    reference = reference_variant(estimates, points)
    singles = adapter_names(estimates, points.get(BEST_SINGLE, {}))
    total = len(mixed(points[reference])) if reference is not None else 0
    found = sides(compare_all(estimates, rewards, OBJECTIVE))
    lines = [(f"By E[r(w)] − α·KL {reference} {kind}", listed(part, total, singles)) for kind, part in found.items()]
    return lines + [
        (f"{variant} is no oracle", text)
        for variant in sorted(oracles)
        for text in [_no_oracle(estimates, points, rewards, variant)]
        if text
    ]


def _no_oracle(estimates: Estimates, points: dict[str, Points], rewards: Sequence[str], oracle: str) -> str:
    """Where another policy has a larger value than a retrained one, by more than the interval; empty where none has.

    Every evaluated policy is held against it under its preference, those of other weights and λ's too: one that was
    retrained for another preference may show that this one is not at its end.
    """
    texts = []
    names, alpha = readable_labels(estimates), estimates.alpha or 0.0
    rivals = estimates.blends.loc[within(estimates.blends, rewards), "blend"]
    for weights, blend in mixed(points.get(oracle, {})).items():
        preference = dict(zip(rewards, weights, strict=True))
        own = estimates.under(blend, preference, alpha)
        above = {}
        for other in rivals:
            more, low, _ = estimates.with_interval(estimates.under(other, preference, alpha) - own)
            if low > 0:
                above[other] = more
        if above:
            best = max(above, key=lambda each: above[each])
            texts.append(f"at w = {weights_label(weights)}: {names[best]} has {above[best]:.2f} more")
    return "; ".join(texts) + "." if texts else ""
