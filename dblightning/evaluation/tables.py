"""Tables shaped like the paper's, with intervals in the cells.

Cells read "0.42 ± 0.03": the mean and half the width of its interval. In a row, the best weighted reward that needed no
retraining is bold, and so is every other whose paired difference to it has an interval that holds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from dblightning.evaluation.analysis import Estimates, oracle_shares
from dblightning.evaluation.fronts import hypervolumes
from dblightning.evaluation.table import INTERPOLATING, WEIGHT, fronts, weights_label, weights_of
from dblightning.evaluation.table_formats import Table, to_csv, to_html, to_latex, to_markdown

__all__ = [
    "Table",
    "all_tables",
    "best_blends",
    "cell",
    "cost_table",
    "diversity_table",
    "equal_weights_table",
    "gain_table",
    "held_out_table",
    "hypervolume_table",
    "kl_points",
    "kl_table",
    "reward_table",
    "share_table",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "weighted_table",
]

EMPTY = "–"


# ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def _quantity_decimals(estimates: Estimates, quantity: str) -> int:
    column = estimates.quantities.index(quantity)
    return decimals((estimates.high[:, column] - estimates.low[:, column]) / 2)


def _cell(estimates: Estimates, blend: str, quantity: str, sign: bool = False) -> str:
    return cell(estimates.of(blend, quantity), _quantity_decimals(estimates, quantity), sign)


def _decorate(frame: pd.DataFrame, rows: Sequence[str], name: str) -> pd.DataFrame:
    return frame.set_axis(pd.Index(rows, name=name), axis=0).fillna(EMPTY)


# ── preferences by methods ───────────────────────────────────────────────────────────────────────────────────────────


def preference_points(estimates: Estimates, rewards: Sequence[str]) -> dict[str, dict[tuple[float, ...], str]]:
    """The columns of a table by preference: variant → weights → blend label (see ``table.fronts``), less the base.

    The single adapters have a column of their own only where no method interpolates them.
    """
    blends = estimates.blends
    methods = dict(zip(blends["variant"], blends["method"], strict=True))
    apart = {"base", "single"} if INTERPOLATING & set(methods.values()) else {"base"}
    return {name: points for name, points in fronts(blends, rewards).items() if methods[name] not in apart}


def best_blends(estimates: Estimates, blends: Sequence[str], quantity: str) -> set[str]:
    """The blends that are best in a quantity, or not told from the best: their paired interval holds 0.

    Oracles (MORL) take no part: they were trained for the very preference.

    Args:
        estimates: of the evaluation.
        blends: labels to choose from; those without a value are left out.
        quantity: ``weighted`` for blends of the same weights, or another name.
    """
    methods = dict(zip(estimates.blends["blend"], estimates.blends["method"], strict=True))
    values = {each: estimates.of(each, quantity)[0] for each in blends if methods[each] != "morl"}
    values = {each: value for each, value in values.items() if np.isfinite(value)}
    if not values:
        return set()
    best = max(values, key=lambda each: values[each])
    gaps = {each: estimates.difference(best, each, quantity) for each in values}
    return {best} | {each for each, (_, low, high) in gaps.items() if low <= 0 <= high}


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
    points = preference_points(estimates, rewards)
    rows = sorted({weights for each in points.values() for weights in each})
    bases = estimates.blends.loc[estimates.blends["method"] == "base", "blend"].tolist()
    columns, cells = [], []
    if base and bases:
        for heading, quantity in quantities.items():
            if quantity.startswith("reward/"):
                columns.append(("Base", heading))
                cells.append([_cell(estimates, bases[0], quantity)] * len(rows))
    for variant, blends in points.items():
        for heading, quantity in quantities.items():
            columns.append((variant, heading))
            cells.append([_cell(estimates, blends[row], quantity, sign) if row in blends else EMPTY for row in rows])
    bold = set()
    weighted = next((quantity for quantity in quantities.values() if quantity.startswith("weighted")), "weighted")
    for index, row in enumerate(rows):
        best = best_blends(estimates, [blends[row] for blends in points.values() if row in blends], weighted)
        for column, (variant, heading) in enumerate(columns):
            if variant in points and quantities[heading] == weighted and points[variant].get(row) in best:
                bold.add((index, column))
    frame = pd.DataFrame(dict(enumerate(cells)), index=range(len(rows)), dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(columns) if columns else pd.MultiIndex.from_arrays([[], []])
    labels = [f"w = {weights_label(row)}" for row in rows]
    return Table(name, caption, _decorate(frame, labels, " / ".join(rewards)), bold)


def reward_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Rewards and weighted reward by preference and method, with the seconds per image (the paper's Tables 1, 4, 7)."""
    table = _weights_table(
        estimates, rewards, "rewards", f"Rewards by preference and method; w weighs {rewards[0]}",
        {name: f"reward/{name}" for name in rewards} | {"r(w)": "weighted"}, base=True,
    )  # fmt: skip
    seconds = []
    shown = set()
    for variant, _ in table.cells.columns:
        part = estimates.blends.loc[estimates.blends["variant"] == variant, "seconds"]
        first = variant not in shown and part.notna().any()
        seconds.append(f"{part.median():.3g}" if first else "")
        shown.add(variant)
    table.cells.loc["seconds / image"] = seconds
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
    oracles = set(estimates.blends.loc[estimates.blends["method"] == "morl", "variant"])
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
    return Table("oracle_share", caption, _decorate(frame, labels, " / ".join(rewards)))


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
        group = f"{len(rewards)} rewards: {', '.join(rewards)}"
        headings = {f"Δ{name}": f"gain/{name}" for name in rewards} | {"mean": "weighted_gain"}
        columns += [(group, heading) for heading in headings] if found else []
        winners = best_blends(estimates, list(found.values()), "weighted_gain")
        for variant, blend in found.items():
            row = cells.setdefault(variant, {})
            row |= {(group, heading): _cell(estimates, blend, quantity, True) for heading, quantity in headings.items()}
            best |= {(variant, (group, "mean"))} if blend in winners else set()
    frame = pd.DataFrame([[row.get(key, EMPTY) for key in columns] for row in cells.values()], dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(columns) if columns else pd.MultiIndex.from_arrays([[], []])
    variants = list(cells)
    bold = {(variants.index(variant), columns.index(key)) for variant, key in best}
    return Table("equal_weights", "Gain over the base with equal weights", _decorate(frame, variants, "method"), bold)


def kl_points(estimates: Estimates) -> dict[tuple[str, str], dict[float, str]]:
    """Where one adapter's strength was varied: (reward, "DB-KLA" or "MORL (oracle)") → λ → blend label, by λ.

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
        digits = _quantity_decimals(estimates, f"reward/{name}")
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
    return Table("kl", caption, _decorate(frame, labels, "reward, strength"))


def hypervolume_table(estimates: Estimates, rewards: Sequence[str], reference: Sequence[float] | None = None) -> Table:
    """Hypervolume of each variant's front and its paired difference to DB-MPA."""
    volumes = hypervolumes(estimates, rewards, reference)
    digits = decimals(((volumes["hi"] - volumes["lo"]) / 2).to_numpy())
    at = ", ".join(f"{name} {value:.3f}" for name, value in volumes.attrs["reference"].items())
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
    caption = f"Hypervolume above the reference point ({at})"
    return Table("hypervolume", caption, _decorate(frame, volumes["variant"].tolist(), "method"))


def cost_table(estimates: Estimates) -> Table:
    """Seconds and UNet rows per image, by method: the lowest and highest over its blends."""

    def span(part: pd.Series) -> str:
        if part.isna().all():
            return EMPTY
        low, high = f"{part.min():.3g}", f"{part.max():.3g}"
        return low if low == high else f"{low} to {high}"

    groups = estimates.blends.groupby("variant", sort=False)
    columns = {heading: groups[name].agg(span) for name, heading in
               {"seconds": "seconds / image", "unet_rows": "UNet rows / image"}.items()}  # fmt: skip
    frame = pd.DataFrame(columns, dtype=object)
    return Table("cost", "Cost per image", _decorate(frame, frame.index.tolist(), "method"))


def blend_rows_table(estimates: Estimates, name: str, caption: str, quantities: dict[str, str], sign: bool) -> Table:
    """One row per blend, one column per quantity (heading → quantity)."""
    blends = estimates.blends["blend"].tolist()
    cells = {heading: [_cell(estimates, blend, quantity, sign) for blend in blends] for heading, quantity in
             quantities.items()}  # fmt: skip
    return Table(name, caption, _decorate(pd.DataFrame(cells, dtype=object), blends, "blend"))


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
        parts.append(hypervolume_table(estimates, rewards, reference if len(sets) == 1 else None))
        for part in parts if len(sets) > 1 else []:
            part.name += "_" + "_".join(rewards)
        found += parts
    found += [equal_weights_table(estimates, sets)] if has_base else []
    found += [kl_table(estimates), cost_table(estimates), diversity_table(estimates)]
    found += [held_out_table(estimates)] if has_base and estimates.held_out else []
    return [table for table in found if (table.cells != EMPTY).to_numpy().any()]
