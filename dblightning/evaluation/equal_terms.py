"""Methods on equal terms: r(w) at equal KL to the base model, and the best within a cost.

A blend of larger λ has more reward and a larger KL, so methods of one preference are compared where both have the same.
Between the points of a method, which begin at the base, the gain is taken as linear in √KL: near the base the gain
grows as λ and the KL as λ². That is a lower bound where the gain levels off, so a method of one λ is compared fairly
only near its own KL; the adapters alone count with every λ of ``db-kla`` that was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dblightning.evaluation.analysis import GAIN, KL, Estimates
from dblightning.evaluation.baselines import BEST_SINGLE
from dblightning.evaluation.cells import (
    Points,
    adapter_names,
    best_blends,
    cell,
    decimals,
    oracle_variants,
    preference_points,
)
from dblightning.evaluation.comparisons import (
    Comparison,
    Verdict,
    by_weights,
    differences_table,
    listed,
    mixed,
    reference_variant,
    sides,
    verdict,
)
from dblightning.evaluation.objective_value import objective_lines
from dblightning.evaluation.scores import WEIGHT, family, weights_label
from dblightning.evaluation.table_formats import Table

Weights = tuple[float, ...]


def has_kl(estimates: Estimates) -> bool:
    """Whether the evaluation measured the KL to the base."""
    return KL in estimates.quantities


def families(points: Mapping[str, Points]) -> dict[str, dict[Weights, list[str]]]:
    """Variants that differ in λ alone as one: name → weights → labels."""
    found: dict[str, dict[Weights, list[str]]] = {}
    for variant, blends in points.items():
        own = found.setdefault(family(variant), {})
        for weights, blend in mixed(blends).items():
            own.setdefault(weights, []).append(blend)
    return found


def gains_at(kl: np.ndarray, gains: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Gains at a KL between a method's points and the base, linear in √KL.

    >>> gains_at(np.array([[4.0, 1.0]]), np.array([[3.0, 2.0]]), np.array([2.25]))  # halfway from 1 to 2 in √KL
    array([2.5])

    Args:
        kl: of the points, ≥ 0, (samples, points).
        gains: of the points, (samples, points).
        at: ≤ the largest KL of each sample, (samples,).
    """
    order = np.argsort(kl, axis=1)
    start = np.zeros((len(kl), 1))
    x = np.concatenate([start, np.sqrt(np.take_along_axis(kl, order, 1))], axis=1)
    y = np.concatenate([start, np.take_along_axis(gains, order, 1)], axis=1)
    right = np.clip((x < np.sqrt(at)[:, None]).sum(axis=1), 1, x.shape[1] - 1)
    rows = np.arange(len(x))
    x0, x1, y0, y1 = x[rows, right - 1], x[rows, right], y[rows, right - 1], y[rows, right]
    width = x1 - x0
    return y0 + (y1 - y0) * np.divide(np.sqrt(at) - x0, width, out=np.ones_like(width), where=width > 0)


def compare_at_equal_kl(estimates: Estimates, rewards: Sequence[str]) -> list[Comparison]:
    """r(w) of the reference variant less another's where both have the KL that the lesser one reaches, by preference.

    Empty without KL or base. The points of every λ that was run are a method's curve from the base on.
    Those of the adapters alone are of ``single`` and ``db-kla``; the best one has the highest curve there.
    """
    points = preference_points(estimates, rewards)
    reference = reference_variant(estimates, points)
    if reference is None or not has_kl(estimates):
        return []
    found = families(points)
    own = found.pop(family(reference))
    compared = []
    curves = {weights: _curve(estimates, each) for weights, each in own.items()}
    for variant, blends in found.items():
        for weights in own.keys() & blends.keys():
            if variant == BEST_SINGLE and min(weights) > 0:
                others = [_curve(estimates, alone, weights, rewards) for alone in _alone(estimates, rewards, weights)]
            else:
                others = [_curve(estimates, blends[weights])]
            difference = min((_at_equal_kl(estimates, curves[weights], other) for other in others), key=_rank)
            if np.isfinite(difference[0]):
                compared.append(Comparison(variant, weights, *difference))
    order = {variant: rank for rank, variant in enumerate(found)}
    return sorted(compared, key=lambda each: (order[each.variant], each.weights))


def _alone(estimates: Estimates, rewards: Sequence[str], weights: Weights) -> list[list[str]]:
    """The blends that are one adapter alone, at every λ that was run, of each adapter that the preference mixes."""
    blends = estimates.blends
    alone = blends[blends["method"].isin(("single", "db-kla")) & blends["adapter"].isna()]
    found = [
        alone.loc[alone[WEIGHT + name].eq(1), "blend"].tolist()
        for name, weight in zip(rewards, weights, strict=True)
        if weight > 0 and WEIGHT + name in alone
    ]
    return [each for each in found if each]


def _curve(
    estimates: Estimates, blends: Sequence[str], weights: Weights | None = None, rewards: Sequence[str] = ()
) -> np.ndarray:
    """KL and gain in r(w) of some blends, the estimate and then the draws: (1 + samples, blends, 2).

    ``weights`` of ``rewards`` are w; None takes each blend's own.
    """
    names = ["weighted_gain"] if weights is None else [GAIN + name for name in rewards]
    columns = [estimates.quantities.index(name) for name in (KL, *names)]
    rows = [estimates.row(blend) for blend in blends]
    rows = [row for row in rows if np.isfinite(estimates.values[row, columns]).all()]
    at = np.ix_(rows, columns)
    both = np.concatenate([estimates.values[at][None], estimates.draws[:, at[0], at[1]]])
    return np.stack([both[..., 0], both[..., 1:] @ np.array(weights or (1.0,))], axis=-1)


def _rank(difference: tuple[float, float, float]) -> float:
    """Lowest first; what has no value last."""
    return difference[0] if np.isfinite(difference[0]) else np.inf


def _at_equal_kl(estimates: Estimates, first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Gain of one :func:`_curve` less another's at the KL that both reach, with the ends of the paired interval."""
    curves = (first, second)
    if 0 in (first.shape[1], second.shape[1]):
        return np.nan, np.nan, np.nan
    at = np.minimum(*(curve[:, :, 0].max(axis=1) for curve in curves))
    one, two = (gains_at(curve[:, :, 0], curve[:, :, 1], at) for curve in curves)
    return estimates.with_interval(one - two)


def equal_kl_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """r(w) less the reference variant's at equal KL, paired image by image; positive is better than it."""
    found = compare_at_equal_kl(estimates, rewards)
    reference = reference_variant(estimates, preference_points(estimates, rewards))
    caption = f"r(w) less that of {reference} at the KL to the base that both reach, paired"
    return differences_table("equal_kl", caption, rewards, found)


def kl_values_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """Path KL to the base by preference and method."""
    points = preference_points(estimates, rewards) if has_kl(estimates) else {}
    found = {
        (variant, weights): estimates.of(blend, KL)
        for variant, blends in points.items()
        for weights, blend in blends.items()
    }
    found = {key: value for key, value in found.items() if np.isfinite(value[0])}
    digits = decimals([(high - low) / 2 for _, low, high in found.values()])
    cells = {key: cell(value, digits) for key, value in found.items()}
    return by_weights("path_kl", "Path KL to the base model, nats", rewards, cells)


# ── at equal cost ────────────────────────────────────────────────────────────────────────────────────────────────────


def costs(estimates: Estimates) -> tuple[str, dict[str, float]]:
    """Cost of an image by blend, and its unit: denoiser rows where they were counted, else seconds.

    RGG's gradients through decoder and reward are no rows: it costs the base's rows times its seconds over the base's.
    """
    rows = estimates.rows
    unit = "denoiser_rows" if rows["denoiser_rows"].notna().any() else "seconds"
    cost = dict(zip(rows["blend"], rows[unit].astype(float), strict=True))
    base = rows[rows["method"] == "base"]
    if unit == "denoiser_rows" and len(base) and base["seconds"].iloc[0] > 0:
        per_second = float(base["denoiser_rows"].iloc[0] / base["seconds"].iloc[0])
        for blend, seconds in rows.loc[rows["method"] == "rgg", ["blend", "seconds"]].itertuples(index=False):
            cost[blend] = float(np.fmax(cost[blend], per_second * seconds))
    return unit, cost


def best_by_cost(estimates: Estimates, rewards: Sequence[str]) -> dict[Weights, list[tuple[float, list[str]]]]:
    """By preference: each cost from which on other methods than before are best, and which; oracles take no part.

    The methods are those of the highest r(w) among all that cost no more, and those that are not distinguishable from
    it.
    """
    points, oracles = preference_points(estimates, rewards), oracle_variants(estimates)
    _, cost = costs(estimates)
    found: dict[Weights, list[tuple[float, list[str]]]] = {}
    for weights in sorted({weights for blends in points.values() for weights in mixed(blends)}):
        here = {
            blends[weights]: variant
            for variant, blends in points.items()
            if weights in blends and variant not in oracles and np.isfinite(cost[blends[weights]])
        }
        levels: list[tuple[float, list[str]]] = []
        # a method's rows differ by parts of a percent between batches
        for budget in sorted({float(f"{cost[blend]:.3g}") for blend in here}):
            within = [blend for blend in here if float(f"{cost[blend]:.3g}") <= budget]
            best = best_blends(estimates, within, "weighted")
            order = sorted(best, key=lambda blend: -estimates.of(blend, "weighted")[0])
            names = [here[blend] for blend in order]
            if names and (not levels or set(levels[-1][1]) != set(names)):
                levels.append((budget, names))
        if levels:
            found[weights] = levels
    return found


def cost_best_table(estimates: Estimates, rewards: Sequence[str]) -> Table:
    """The best methods within a cost, by preference."""
    unit = costs(estimates)[0].replace("_", " ")
    rows = [
        (f"w = {weights_label(weights)}", f"{budget:g}", ", ".join(names))
        for weights, levels in best_by_cost(estimates, rewards).items()
        for budget, names in levels
    ]
    frame = pd.DataFrame([row[1:] for row in rows], columns=[f"{unit} / image, at most", "best r(w)"], dtype=object)
    frame = frame.set_axis(pd.Index([row[0] for row in rows], name=" / ".join(rewards)), axis=0)
    caption = f"The best without retraining among all that cost no more; w weighs {rewards[0]}"
    return Table("best_by_cost", caption, frame)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole_verdict(estimates: Estimates, rewards: Sequence[str]) -> Verdict:
    """The verdict on these rewards, then who wins at equal KL and within a cost."""
    title, lines = verdict(estimates, rewards)
    lines = lines + objective_lines(estimates, rewards) + _kl_lines(estimates, rewards)
    return Verdict(title, lines + _cost_lines(estimates, rewards))


def _kl_lines(estimates: Estimates, rewards: Sequence[str]) -> list[tuple[str, str]]:
    points, oracles = preference_points(estimates, rewards), oracle_variants(estimates)
    reference = reference_variant(estimates, points)
    fair = [each for each in compare_at_equal_kl(estimates, rewards) if each.variant not in oracles]
    singles = adapter_names(estimates, points.get(BEST_SINGLE, {}))
    total = len(mixed(points[reference])) if reference is not None else 0
    return [(f"At equal KL {reference} {kind}", listed(part, total, singles)) for kind, part in sides(fair).items()]


def _cost_lines(estimates: Estimates, rewards: Sequence[str]) -> list[tuple[str, str]]:
    text = cost_sentence(estimates, rewards)
    return [("Best within a cost, without retraining", text)] if text else []


def cost_sentence(estimates: Estimates, rewards: Sequence[str]) -> str:
    """The best methods within a cost, in words; empty for more than six preferences, which the table has."""
    found, unit = best_by_cost(estimates, rewards), costs(estimates)[0].replace("_", " ")
    if len(found) > 6 or all(len(levels) < 2 for levels in found.values()):
        return ""
    texts = [
        f"at w = {weights_label(weights)} "
        + ", then ".join(f"{_one_of(names)} from {budget:g}" for budget, names in levels)
        for weights, levels in found.items()
    ]
    return f"{'; '.join(texts)} {unit} per image."


def _one_of(names: Sequence[str], most: int = 3) -> str:
    """Methods that are not distinguishable, the best first: all of a few, else the first and a number."""
    if len(names) <= most:
        return " or ".join(names)
    return f"{names[0]} (or {len(names) - 1} others, not distinguishable)"
