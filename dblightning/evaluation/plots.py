"""Figures of an evaluation, drawn with matplotlib from its estimates; intervals are drawn in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dblightning.evaluation.analysis import KL, Estimates
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM, single_blends
from dblightning.evaluation.cells import preference_points
from dblightning.evaluation.comparisons import mixed, reference_variant
from dblightning.evaluation.equal_terms import families, has_kl
from dblightning.evaluation.fronts import pareto
from dblightning.evaluation.paper_tables import kl_points
from dblightning.evaluation.scores import front, weights_label, weights_of, within
from dblightning.figure_text import figure_text

#: Okabe and Ito's colours, distinct with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#8856A7", "#A0305A")
MARKERS = "osD^vP*Xhd"
#: the baselines are grey, and their lines dashed
BASELINES = {BEST_SINGLE: ("#333333", "p"), RANDOM: ("#999999", "8")}


def variant_styles(estimates: Estimates) -> dict[str, tuple[str, str]]:
    """Colour and marker of every variant, the same in every figure of an evaluation; the base is a black star."""
    styles: dict[str, tuple[str, str]] = dict(BASELINES)
    number = 0
    methods = dict(zip(estimates.blends["variant"], estimates.blends["method"], strict=True))
    for variant, method in methods.items():
        if method == "base":
            styles[variant] = ("#000000", "*")
        else:
            # the two lists differ in length, so a pair repeats late
            styles[variant] = (COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
            number += 1
    return styles


def plane_points(estimates: Estimates, rewards: Sequence[str], x: str, y: str, gains: bool = False) -> pd.DataFrame:
    """The blends that weigh nothing but ``rewards``, as points of the plane of ``x`` and ``y``, in order of weight.

    Columns: ``blend``, ``variant``, ``label`` (weights and λ), ``x``, ``x_lo``, ``x_hi``, ``y``, …, and ``dominated``:
    whether another blend, oracles excluded, is at least as good in every one of ``rewards`` and better in one. Means
    are compared, so a point may be dominated by less than the intervals. With ``gains``, the plane is that of the gains
    over the base, whose intervals are paired and much shorter.
    """
    blends = estimates.blends[within(estimates.blends, rewards)].reset_index(drop=True)
    weights = weights_of(blends, rewards)
    values = np.array([[estimates.of(blend, f"reward/{name}")[0] for name in rewards] for blend in blends["blend"]])
    oracle = (blends["method"] == "morl").to_numpy()
    dominated = []
    for row in range(len(blends)):
        rivals = ~oracle
        rivals[row] = True
        dominated.append(not pareto(values[rivals])[int(rivals[:row].sum())])
    points = blends[["blend", "variant", "method"]].assign(dominated=dominated)
    points["label"] = [
        _point_label(row, each.tolist()) for (_, row), each in zip(blends.iterrows(), weights, strict=True)
    ]
    kind = "gain" if gains else "reward"
    for axis, name in (("x", x), ("y", y)):
        found = np.array([estimates.of(blend, f"{kind}/{name}") for blend in blends["blend"]])
        points[[axis, f"{axis}_lo", f"{axis}_hi"]] = found
    order = np.lexsort(weights.T[::-1])
    return points.iloc[order].reset_index(drop=True)


def _point_label(row: pd.Series, weights: Sequence[float]) -> str:
    if not any(weights):
        return str(row["variant"])
    strength = f", λ = {row['kl_scale']:g}" if row["kl_scale"] != 1 or row["method"] == "db-kla" else ""
    return f"w = {weights_label(weights)}{strength}"


def line_of(estimates: Estimates, rewards: Sequence[str], variant: str, points: pd.DataFrame) -> pd.DataFrame:
    """A variant's points in order of weight, with the single adapters that are its ends (``table.front``)."""
    blends = list(front(estimates.blends, variant, rewards).values())
    return points.set_index("blend").loc[blends].reset_index()


def _bars(points: pd.DataFrame, axis: str) -> np.ndarray | None:
    half = np.abs(np.stack([points[axis] - points[f"{axis}_lo"], points[f"{axis}_hi"] - points[axis]]))
    return None if np.isnan(half).all() else half


def chord(estimates: Estimates, rewards: Sequence[str], points: pd.DataFrame) -> pd.DataFrame:
    """The two single adapters, between which a random adapter per image lies; empty where they were not evaluated."""
    singles = single_blends(estimates.blends)
    ends = [singles[name] for name in rewards if name in singles]
    found = points[points["blend"].isin(ends)]
    return found if len(rewards) == len(found) == 2 else found.head(0)


def _plane(axis: Any, estimates: Estimates, rewards: Sequence[str], x: str, y: str, gains: bool) -> None:
    points, styles = plane_points(estimates, rewards, x, y, gains), variant_styles(estimates)
    between = chord(estimates, rewards, points)
    if len(between):
        axis.plot(between["x"], between["y"], "--", color=styles[RANDOM][0], linewidth=1, zorder=1.5, label=RANDOM)
    for variant, own in points.groupby("variant", sort=False):
        colour, marker = styles[str(variant)]
        if len(rewards) == 2:  # with more rewards the weights have no order to follow
            line = line_of(estimates, rewards, str(variant), points)
            if len(line) > 1 and (own["method"] != "single").all():
                axis.plot(line["x"], line["y"], "-", color=colour, linewidth=1.2, alpha=0.7, zorder=2)
        axis.errorbar(own["x"], own["y"], xerr=_bars(own, "x"), yerr=_bars(own, "y"), fmt="none", ecolor=colour,
                      elinewidth=0.7, alpha=0.4, zorder=1)  # fmt: skip
        size = 110 if own["method"].iloc[0] == "base" else 28
        label = figure_text(variant)
        axis.scatter([], [], s=28, marker=marker, color=colour, label=label)  # the legend's, never hollow
        for flag in (False, True):
            part = own[own["dominated"] == flag]
            axis.scatter(part["x"], part["y"], s=size, marker=marker, edgecolors=colour, zorder=3,
                         facecolors="white" if flag else colour, alpha=0.6 if flag else 1.0)  # fmt: skip
    axis.set_xlabel(figure_text(f"gain in {x}" if gains else x))
    axis.set_ylabel(figure_text(f"gain in {y}" if gains else y))
    axis.grid(alpha=0.25)


#: where a label may stand around its point, in points
_PLACES = ((4, 3), (4, -9), (-4, 3), (-4, -9), (8, -3), (-8, -3), (0, 8), (0, -14))


def _write_weights(axis: Any, estimates: Estimates, rewards: Sequence[str], points: pd.DataFrame) -> None:
    """Write w beside the points, where there is room; the reference variant and the single adapters come first."""
    reference = reference_variant(estimates, preference_points(estimates, rewards))
    styles, scale = variant_styles(estimates), axis.figure.dpi / 72
    rank = [0 if row.variant == reference else 1 if row.method == "single" else 2 for row in points.itertuples()]
    marks = [tuple(axis.transData.transform((row.x, row.y)) / scale) for row in points.itertuples()]
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in marks]
    for index in np.argsort(rank, kind="stable"):
        point, (x, y) = points.iloc[index], marks[index]
        text = str(point["label"]).removeprefix("w = ")
        if point["method"] == "base" or not np.isfinite([x, y]).all():
            continue
        width = 3.7 * len(text)
        for dx, dy in _PLACES:
            left = x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0)
            box = (left, y + dy, left + width, y + dy + 6)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                side = "left" if dx > 0 else "right" if dx < 0 else "center"
                colour = styles[point["variant"]][0]
                at = {"xy": (point["x"], point["y"]), "xytext": (dx, dy), "textcoords": "offset points"}
                note = axis.annotate(
                    figure_text(text), **at, fontsize=6.5, ha=side, va="bottom", color=colour, zorder=4
                )
                note.set_in_layout(False)
                taken.append(box)
                break


def pareto_figure(estimates: Estimates, rewards: Sequence[str], gains: bool = False) -> Figure:
    """Every blend in the plane of two rewards, one line per variant in order of w; a grid of pairs for more rewards.

    Hollow points are dominated (:func:`plane_points`); bars are intervals; the base is a star. Of two rewards, w stands
    beside the points, and a dashed line is where a random adapter per image lies.

    Args:
        estimates: of the evaluation.
        rewards: two or more measured names; blends that weigh another are left out.
        gains: draw gains over the base, whose paired intervals are shorter, instead of rewards.

    Raises:
        ValueError: fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a Pareto figure needs two or more rewards, got {list(rewards)}")
    pairs = list(combinations(rewards, 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.2 * columns + 2.2, 3.8 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (x, y) in zip(axes, pairs, strict=False):
        _plane(axis, estimates, rewards, x, y, gains)
    for axis in axes[len(pairs) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    title = "hollow: dominated" + ("\nnumbers: w" if len(rewards) == 2 else "")
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    if len(rewards) == 2:
        figure.draw_without_rendering()  # places the axes, so that labels can be kept apart
        _write_weights(axes[0], estimates, rewards, plane_points(estimates, rewards, rewards[0], rewards[1], gains))
    return figure


def cost_figure(estimates: Estimates, rewards: Sequence[str], panels: int = 4) -> Figure | None:
    """Gain in weighted reward against seconds per image, one panel per preference; None where nothing was timed.

    Args:
        estimates: of the evaluation, with a base.
        rewards: measured names.
        panels: preferences shown at most: those that the most variants have, the evenest first.
    """
    points, styles, rows = preference_points(estimates, rewards), variant_styles(estimates), estimates.rows
    seconds = dict(zip(rows["blend"], rows["seconds"], strict=True))
    shown = _preferences({name: mixed(each) for name, each in points.items()}, panels)
    if not shown or not any(
        seconds[each[weights]] > 0 for each in points.values() for weights in shown if weights in each
    ):
        return None
    figure, axes = _gain_panels(shown)
    for axis, weights in zip(axes, shown, strict=True):
        for variant, blends in points.items():
            blend = blends.get(weights)
            if blend is None or not seconds[blend] > 0:
                continue
            value, low, high = estimates.of(blend, "weighted_gain")
            half = None if np.isnan(low) else [[value - low], [high - value]]
            colour, marker = styles[variant]
            axis.errorbar(seconds[blend], value, half, fmt=marker, color=colour, markersize=5, elinewidth=0.8,
                          label=figure_text(variant))  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("seconds / image")
    _shared_legend(figure, axes)
    return figure


def kl_figure(estimates: Estimates, rewards: Sequence[str], panels: int = 4) -> Figure | None:
    """Gain in weighted reward against the path KL to the base, one panel per preference; None without KL.

    A line joins the base and the points of a method, one per λ. The axis is linear in √KL, as the gain is near the
    base.

    Args:
        estimates: of the evaluation, with a base.
        rewards: measured names.
        panels: preferences shown at most: those that the most variants have, the evenest first.
    """
    if not has_kl(estimates):
        return None
    found, styles = families(preference_points(estimates, rewards)), variant_styles(estimates)
    shown = _preferences(found, panels)
    if not shown:
        return None
    figure, axes = _gain_panels(shown)
    largest = 0.0
    for axis, weights in zip(axes, shown, strict=True):
        for variant, blends in found.items():
            values = np.array([[*estimates.of(each, KL), *estimates.of(each, "weighted_gain")]
                               for each in blends.get(weights, [])]).reshape(-1, 6)  # fmt: skip
            values = values[np.isfinite(values[:, [0, 3]]).all(axis=1)]
            if not len(values):
                continue
            values = values[np.argsort(values[:, 0])]
            largest = max(largest, values[-1, 0])
            named = [each for each in styles if each == variant or each.startswith(f"{variant} λ=")]
            colour, marker = styles[named[0]]
            half = np.abs(np.stack([values[:, 3] - values[:, 4], values[:, 5] - values[:, 3]]))
            axis.plot([0, *values[:, 0]], [0, *values[:, 3]], "-", color=colour, linewidth=0.8, alpha=0.6)
            axis.errorbar(values[:, 0], values[:, 3], None if np.isnan(half).all() else half, fmt=marker, color=colour,
                          markersize=5, elinewidth=0.8, label=figure_text(variant))  # fmt: skip
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
        axis.set_xlabel("path KL to the base, nats")
    axes[0].set_xlim(0, 1.05 * largest or None)
    _shared_legend(figure, axes)
    return figure


def _gain_panels(shown: Sequence[tuple[float, ...]]) -> tuple[Figure, Any]:
    """A figure of the gain in r(w) over the base, one panel per preference, and its axes."""
    figure = Figure(figsize=(2.6 * len(shown) + 2.4, 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    for axis, weights in zip(axes, shown, strict=True):
        axis.axhline(0, color="#000000", linewidth=0.8)
        axis.set_title(f"w = {weights_label(weights)}", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("gain in r(w) over the base")
    return figure, axes


def _preferences(points: dict[str, Any], panels: int) -> list[tuple[float, ...]]:
    """The preferences that the most variants have, the evenest first, at most so many; in order of weight."""
    counts = pd.Series([weights for blends in points.values() for weights in blends], dtype=object).value_counts()
    order = sorted(counts.index, key=lambda weights: (-counts[weights], max(weights)))
    return sorted(order[:panels])


def _shared_legend(figure: Figure, axes: Iterable[Any]) -> None:
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(list(found.values()), list(found), loc="outside right upper", fontsize=8)


def weighted_figure(estimates: Estimates, rewards: Sequence[str]) -> Figure:
    """Gain in weighted reward over the base against w, one line per variant; two rewards."""
    if len(rewards) != 2:
        raise ValueError(f"weighted reward against w needs two rewards, got {list(rewards)}; see gain_bars_figure")
    styles = variant_styles(estimates)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for variant, blends in preference_points(estimates, rewards).items():
        colour, marker = styles[variant]
        w = [weights[0] for weights in blends]
        values = np.array([estimates.of(blend, "weighted_gain") for blend in blends.values()])
        line = "--" if variant in BASELINES else "-"
        axis.plot(w, values[:, 0], marker + line, color=colour, markersize=4, linewidth=1.2, label=figure_text(variant))
        axis.fill_between(w, values[:, 1], values[:, 2], color=colour, alpha=0.12, linewidth=0)
    axis.axhline(0, color="#000000", linewidth=0.8)
    axis.set_xlabel(figure_text(f"w, the weight of {rewards[0]} (1 − w: {rewards[1]})"))
    axis.set_ylabel("gain in r(w) over the base")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def gain_bars_figure(estimates: Estimates, rewards: Sequence[str], panels: int = 6) -> Figure:
    """Gain over the base in each reward, by method, one panel per preference (the paper's Fig. 8).

    Args:
        estimates: of the evaluation.
        rewards: measured names.
        panels: preferences shown at most: those that the most variants have, the evenest first.
    """
    points, styles = preference_points(estimates, rewards), variant_styles(estimates)
    shown = _preferences(points, panels)[::-1]
    figure = Figure(figsize=(7.5, 2.1 * max(1, len(shown)) + 0.4), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0]
    width = 0.8 / max(1, len(points))
    for axis, weights in zip(axes, shown, strict=False):
        for number, (variant, blends) in enumerate(points.items()):
            if weights not in blends:
                continue
            values = np.array([estimates.of(blends[weights], f"gain/{name}") for name in rewards])
            half = np.abs(np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]))
            place = np.arange(len(rewards)) + (number - (len(points) - 1) / 2) * width
            axis.bar(place, values[:, 0], width, yerr=None if np.isnan(half).all() else half, color=styles[variant][0],
                     error_kw={"elinewidth": 0.8}, label=figure_text(variant))  # fmt: skip
        axis.axhline(0, color="#000000", linewidth=0.8)
        axis.set_xticks(range(len(rewards)), [figure_text(name) for name in rewards])
        axis.set_title(f"w = {weights_label(weights)}", fontsize=9)
        axis.set_ylabel("gain over base")
    _shared_legend(figure, axes)
    return figure


def strength_figure(estimates: Estimates) -> Figure | None:
    """Gain over the base against λ: DB-KLA, and models retrained with KL weight α/λ (Fig. 6b); None without DB-KLA."""
    points = kl_points(estimates)
    names = list(dict.fromkeys(name for name, _ in points))
    if not names:
        return None
    figure = Figure(figsize=(4.6 * len(names) + 0.6, 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curves = [(curve, blends) for (reward, curve), blends in points.items() if reward == name]
        for (curve, blends), colour, marker in zip(curves, COLOURS, MARKERS, strict=False):
            values = np.array([estimates.of(blend, f"gain/{name}") for blend in blends.values()])
            axis.plot(list(blends), values[:, 0], f"{marker}-", color=colour, markersize=4, label=figure_text(curve))
            axis.fill_between(list(blends), values[:, 1], values[:, 2], color=colour, alpha=0.12, linewidth=0)
        axis.set_xlabel("λ")
        axis.set_ylabel(figure_text(f"gain in {name}"))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path, formats: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write a figure once per format, named ``path`` with the format's ending; figures drawn alike have the same bytes.

    Args:
        figure: to write.
        path: without ending; its folder is made.
        formats: of matplotlib's.

    Returns:
        The files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.parent / f"{path.name}.{each}" for each in formats]
    with matplotlib.rc_context({"svg.hashsalt": "dblightning"}):
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
