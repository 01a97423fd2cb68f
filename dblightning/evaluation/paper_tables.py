"""Tables shaped like the paper's, with intervals in the cells.

Cells read "0.42 ± 0.03": the mean and half the width of its interval. In a row, the best weighted reward that needed no
retraining is bold, single adapters included, and so is every other whose paired difference to it has an interval that
holds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from dblightning.evaluation.analysis import Estimates, oracle_shares
from dblightning.evaluation.baselines import BEST_SINGLE
from dblightning.evaluation.cells import (
    EMPTY,
    adapter_names,
    best_blends,
    cell,
    decimals,
    decorate,
    estimate_cell,
    oracle_variants,
    preference_points,
    quantity_decimals,
    readable_labels,
)
from dblightning.evaluation.comparisons import adapters_table, paired_table, win_table
from dblightning.evaluation.equal_terms import cost_best_table, equal_kl_table, kl_values_table
from dblightning.evaluation.fronts import hypervolume_orders, hypervolumes, reference_points
from dblightning.evaluation.objective_value import objective_table, paired_objective_table
from dblightning.evaluation.scores import WEIGHT, weights_label, weights_of
from dblightning.evaluation.table_formats import SECONDS, Table, to_csv, to_html, to_latex, to_markdown

__all__ = [
    "Table",
    "all_tables",
    "best_blends",
    "cell",
    "cost_table",
    "decimals",
    "diversity_table",
    "equal_weights_table",
    "gain_table",
    "held_out_table",
    "hypervolume_table",
    "kl_points",
    "kl_table",
    "preference_points",
    "reward_table",
    "share_table",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "weighted_table",
]


def _weights_table(
    estimates: Estimates,
    rewards: Sequence[str],
    name: str,
    caption: str,
    quantities: dict[str, str],
    sign: bool = False,
    base: bool = False,
) -> Table:
    """Rows of weights, columns of variants × quantities (heading → quantity); best weighted reward bold."""
    points, oracles = preference_points(estimates, rewards), oracle_variants(estimates)
    rows = sorted({weights for each in points.values() for weights in each})
    bases = estimates.blends.loc[estimates.blends["method"] == "base", "blend"].tolist()
    columns, cells = [], []
    if base and bases:
        for heading, quantity in quantities.items():
            if quantity.startswith("reward/"):
                columns.append(("Base", heading))
                cells.append([estimate_cell(estimates, bases[0], quantity)] * len(rows))
    for variant, blends in points.items():
        for heading, quantity in quantities.items():
            columns.append((variant, heading))
            cells.append(
                [estimate_cell(estimates, blends[row], quantity, sign) if row in blends else EMPTY for row in rows]
            )
    bold = set()
    weighted = next((quantity for quantity in quantities.values() if quantity.startswith("weighted")), "weighted")
    for index, row in enumerate(rows):
        best = best_blends(estimates, [blends[row] for blends in points.values() if row in blends], weighted)
        for column, (variant, heading) in enumerate(columns):
            # an oracle's ends are single adapters, and still its column was retrained for the preference
            if (
                variant in points.keys() - oracles
                and quantities[heading] == weighted
                and points[variant].get(row) in best
            ):
                bold.add((index, column))
    frame = pd.DataFrame(dict(enumerate(cells)), index=range(len(rows)), dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(columns) if columns else pd.MultiIndex.from_arrays([[], []])
    labels = [f"w = {weights_label(row)}" for row in rows]
    caption += _single_note(estimates, points)
    return Table(name, caption, decorate(frame, labels, " / ".join(rewards)), bold)


def _single_note(estimates: Estimates, points: dict[str, dict[tuple[float, ...], str]]) -> str:
    """Which adapter the column of the best single adapter is, as the end of a caption."""
    names: dict[str, list[str]] = {}
    for weights, name in adapter_names(estimates, points.get(BEST_SINGLE, {})).items():
        names.setdefault(name, []).append(weights_label(weights))
    each = [f"{name} at w = {', '.join(weights)}" for name, weights in names.items()]
    return f". The best single adapter: {'; '.join(each)}" if each else ""


def reward_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Rewards and weighted reward by preference and method, with the seconds per image (the paper's Tables 1, 4, 7)."""
    table = _weights_table(
        estimates, rewards, "rewards", f"Rewards by preference and method; w weighs {rewards[0]}",
        {name: f"reward/{name}" for name in rewards} | {"r(w)": "weighted"}, base=True,
    )  # fmt: skip
    seconds, shown = [], set()
    points, rows = preference_points(estimates, rewards), estimates.rows
    for variant in table.cells.columns.get_level_values(0):
        own = rows["variant"] == variant
        part = rows.loc[own if own.any() else rows["blend"].isin(points[variant].values()), "seconds"]
        first = variant not in shown and part.notna().any()
        seconds.append(f"{part.median():.3g}" if first else "")
        shown.add(variant)
    table.cells.loc[SECONDS] = seconds
    return table


def gain_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Gains over the base by preference and method, paired image by image (Tables 2 and 3)."""
    quantities = {f"Δ{name}": f"gain/{name}" for name in rewards} | {"Δr(w)": "weighted_gain"}
    caption = f"Gain over the base by preference and method; w weighs {rewards[0]}"
    return _weights_table(estimates, rewards, "gains", caption, quantities, sign=True)


def weighted_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """The weighted reward alone, by preference and method (Table 5)."""
    caption = f"Weighted reward r(w) by preference and method; w weighs {rewards[0]}"
    return _weights_table(estimates, rewards, "weighted", caption, {"r(w)": "weighted"})


def share_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Share of the retrained oracle's gain in weighted reward, by preference and method."""
    shares = oracle_shares(estimates).set_index("blend")
    points = preference_points(estimates, rewards)
    oracles = oracle_variants(estimates)
    points = {variant: blends for variant, blends in points.items() if variant not in oracles}
    known = [row for each in points.values() for row, blend in each.items() if np.isfinite(shares.loc[blend].iloc[0])]
    rows = sorted(set(known))
    digits = decimals((shares["share_of_oracle_hi"] - shares["share_of_oracle_lo"]).to_numpy() / 2)
    cells = {
        variant: [cell(shares.loc[blends[row]].to_numpy(), digits) if row in blends else EMPTY for row in rows]
        for variant, blends in points.items()
    }
    frame = pd.DataFrame(cells, index=range(len(rows)), dtype=object)
    caption = f"Share of the retrained oracle's gain in r(w): 1 is the oracle, 0 the base; w weighs {rewards[0]}"
    labels = [f"w = {weights_label(row)}" for row in rows]
    return Table("oracle_share", caption, decorate(frame, labels, " / ".join(rewards)))


# ── other tables ─────────────────────────────────────────────────────────────────────────────────────────────────────


def equal_weights_table(estimates: Estimates, sets: Sequence[Sequence[str]]) -> Table:
    """Gains with equal weights for each set of rewards, and their mean (Table 6)."""
    columns: list[tuple[str, str]] = []
    cells: dict[str, dict[tuple[str, str], str]] = {}
    best: set[tuple[str, tuple[str, str]]] = set()
    for rewards in sets:
        equal = np.full(len(rewards), 1 / len(rewards))
        found = {
            variant: blend
            for variant, blends in preference_points(estimates, rewards).items()
            for weights, blend in blends.items()
            # weights of a third are written with few digits: 0.33, 0.33, 0.34
            if np.allclose(weights, equal, atol=0.011)
        }
        oracles = oracle_variants(estimates)
        group = f"{len(rewards)} rewards: {', '.join(rewards)}"
        headings = {f"Δ{name}": f"gain/{name}" for name in rewards} | {"mean": "weighted_gain"}
        columns += [(group, heading) for heading in headings] if found else []
        winners = best_blends(estimates, list(found.values()), "weighted_gain")
        for variant, blend in found.items():
            row = cells.setdefault(variant, {})
            row |= {
                (group, heading): estimate_cell(estimates, blend, quantity, True)
                for heading, quantity in headings.items()
            }
            best |= {(variant, (group, "mean"))} if blend in winners and variant not in oracles else set()
    frame = pd.DataFrame([[row.get(key, EMPTY) for key in columns] for row in cells.values()], dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(columns) if columns else pd.MultiIndex.from_arrays([[], []])
    variants = list(cells)
    bold = {(variants.index(variant), columns.index(key)) for variant, key in best}
    return Table("equal_weights", "Gain over the base with equal weights", decorate(frame, variants, "method"), bold)


def kl_points(estimates: Estimates) -> dict[tuple[str, str], dict[float, str]]:
    """Blends in which one adapter's strength was varied: (reward, "DB-KLA" or "MORL (oracle)") → λ → blend label, by λ.

    The base completes DB-KLA at λ = 0 and the single adapter at λ = 1. MORL's λ is that of the retraining, with KL
    weight α/λ. Only rewards with a DB-KLA blend are in it.
    """
    blends = estimates.blends
    bases = blends.loc[blends["method"] == "base", "blend"].tolist()
    found: dict[tuple[str, str], dict[float, str]] = {}
    for name in estimates.rewards:
        if WEIGHT + name not in blends:
            continue
        alone = np.isclose(weights_of(blends, [name])[:, 0], 1)
        kla = blends[alone & (blends["method"] == "db-kla")]
        for adapter, part in kla.groupby(kla["adapter"].fillna(""), sort=False):
            curve = dict(zip(part["kl_scale"], part["blend"], strict=True))
            single = blends[alone & (blends["method"] == "single") & (blends["adapter"].fillna("") == adapter)]
            for scale, ends in ((0.0, bases), (1.0, single["blend"].tolist())):
                if ends:
                    curve.setdefault(scale, ends[0])
            found[name, "DB-KLA" + (f" ({adapter})" if adapter else "")] = dict(sorted(curve.items()))
        retrained = blends[alone & (blends["method"] == "morl")]
        if len(kla) and len(retrained):
            curve = dict(zip(retrained["kl_scale"], retrained["blend"], strict=True))
            found[name, "MORL (oracle)"] = dict(sorted(curve.items()))
    return found


def kl_table(estimates: Estimates) -> Table:
    """DB-KLA against models retrained with KL weight α/λ: reward by λ, and the paired difference (Fig. 6b)."""
    points = kl_points(estimates)
    rows = sorted({(name, scale) for (name, _), curve in points.items() for scale in curve})
    curves = list(dict.fromkeys(curve for _, curve in points))
    records = []
    for name, scale in rows:
        digits = quantity_decimals(estimates, f"reward/{name}")
        here = {curve: points.get((name, curve), {}).get(scale) for curve in curves}
        row = {
            curve: EMPTY if blend is None else cell(estimates.of(blend, f"reward/{name}"), digits)
            for curve, blend in here.items()
        }
        blend, oracle = here.get("DB-KLA"), here.get("MORL (oracle)")
        if blend is not None and oracle is not None:
            row["difference"] = cell(estimates.difference(blend, oracle, f"reward/{name}"), digits, sign=True)
        records.append(row)
    frame = pd.DataFrame(records, index=range(len(rows)), dtype=object)
    caption = "Reward of one adapter at strength λ, and of models retrained with KL weight α/λ"
    labels = [f"{name}, λ = {scale:g}" for name, scale in rows]
    return Table("kl", caption, decorate(frame, labels, "reward, strength"))


def hypervolume_table(estimates: Estimates, rewards: Sequence[str], reference: Sequence[float] | None = None) -> Table:
    """Hypervolume of each variant's front and its paired difference to DB-MPA."""
    volumes = hypervolumes(estimates, rewards, reference)
    digits = decimals(((volumes["hi"] - volumes["lo"]) / 2).to_numpy())
    at = _point(volumes.attrs["reference"])
    kind = volumes.attrs["reference_is"]
    frame = pd.DataFrame(
        {
            "points": volumes["points"].astype(str),
            "hypervolume": [cell(row, digits) for row in volumes[["hypervolume", "lo", "hi"]].to_numpy()],
            "difference to DB-MPA": [
                cell(row, digits, sign=True)
                for row in volumes[["difference", "difference_lo", "difference_hi"]].to_numpy()
            ],
        },
        dtype=object,
    )
    caption = f"Hypervolume above the reference point ({at}{'' if kind == 'given' else f': {kind}'})"
    caption += "" if kind == "given" else _order_note(estimates, rewards)
    return Table("hypervolume", caption, decorate(frame, volumes["variant"].tolist(), "method"))


def _point(reference: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in reference.items())


def _order_note(estimates: Estimates, rewards: Sequence[str]) -> str:
    """A sentence on how the order of the variants changes with the reference point, as the end of a caption."""
    orders, points = hypervolume_orders(estimates, rewards), reference_points(estimates, rewards)
    (_, first), (other, second) = orders.items()
    if len(first) < 2:
        return ""
    at = f"({_point(dict(zip(rewards, points[other].tolist(), strict=True)))}: {other})"
    if first == second:
        return f". The order is the same above {at}"
    moves = [f"{name} {first.index(name) + 1} → {second.index(name) + 1}" for name in first
             if first.index(name) != second.index(name)]  # fmt: skip
    return f". The order depends on the point: above {at} the ranks change: {', '.join(moves)}"


def cost_table(estimates: Estimates) -> Table:
    """Seconds and denoiser rows per image, by method: the lowest and highest over its blends."""

    def span(part: pd.Series) -> str:
        if part.isna().all():
            return EMPTY
        low, high = f"{part.min():.3g}", f"{part.max():.3g}"
        return low if low == high else f"{low} to {high}"

    groups = estimates.blends.groupby("variant", sort=False)
    columns = {heading: groups[name].agg(span) for name, heading in
               {"seconds": "seconds / image", "denoiser_rows": "denoiser rows / image"}.items()}  # fmt: skip
    frame = pd.DataFrame(columns, dtype=object)
    return Table("cost", "Cost per image", decorate(frame, frame.index.tolist(), "method"))


def blend_rows_table(estimates: Estimates, name: str, caption: str, quantities: dict[str, str], sign: bool) -> Table:
    """One row per blend, one column per quantity (heading → quantity)."""
    labels = readable_labels(estimates)
    cells = {heading: [estimate_cell(estimates, blend, quantity, sign) for blend in labels] for heading, quantity in
             quantities.items()}  # fmt: skip
    return Table(name, caption, decorate(pd.DataFrame(cells, dtype=object), list(labels.values()), "blend"))


def diversity_table(estimates: Estimates) -> Table:
    """Diversity of one prompt's seeds, by blend."""
    caption = "Diversity: root mean square difference between the thumbnails of one prompt's seeds, 0 to 1"
    return blend_rows_table(estimates, "diversity", caption, {"diversity": "diversity"}, sign=False)


def held_out_table(estimates: Estimates) -> Table:
    """Gain over the base in the rewards that no blend weighs, by blend."""
    quantities = {f"Δ{name}": f"gain/{name}" for name in estimates.held_out}
    caption = "Gain over the base in held-out rewards: a loss here beside a gain there is reward hacking"
    return blend_rows_table(estimates, "held_out", caption, quantities, sign=True)


def all_tables(
    estimates: Estimates, sets: Sequence[Sequence[str]], reference: Sequence[float] | None = None
) -> list[Table]:
    """Every table that has something to show; names end in the rewards where there are several sets of them.

    Args:
        estimates: of the evaluation.
        sets: sets of rewards that are weighed together, see ``table.preference_sets``.
        reference: of the hypervolume, for a single set; None takes the default.
    """
    has_base = (estimates.blends["method"] == "base").any()
    found: list[Table] = []
    by_set: list[Callable[[Estimates, Sequence[str]], Table]] = [reward_table, weighted_table]
    by_set += [gain_table, share_table] if has_base else []
    for rewards in sets:
        parts = [make(estimates, rewards) for make in by_set]
        parts += [paired_table(estimates, rewards), win_table(estimates, rewards), adapters_table(estimates, rewards)]
        parts += [objective_table(estimates, rewards), paired_objective_table(estimates, rewards)]
        parts += [equal_kl_table(estimates, rewards), kl_values_table(estimates, rewards)]
        parts += [cost_best_table(estimates, rewards)]
        parts.append(hypervolume_table(estimates, rewards, reference if len(sets) == 1 else None))
        for part in parts if len(sets) > 1 else []:
            part.name += "_" + "_".join(rewards)
        found += parts
    found += [equal_weights_table(estimates, sets)] if has_base else []
    found += [kl_table(estimates), cost_table(estimates), diversity_table(estimates)]
    found += [held_out_table(estimates)] if has_base and estimates.held_out else []
    return [table for table in found if (table.cells != EMPTY).to_numpy().any()]
