"""Parts of the report's page: plots to hover over, the grid of images, and the record as lines."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from dblightning.evaluation.analysis import Estimates
from dblightning.evaluation.baselines import RANDOM
from dblightning.evaluation.cells import cell, preference_points, readable_labels
from dblightning.evaluation.paper_tables import kl_points
from dblightning.evaluation.plots import chord, line_of, plane_points, variant_styles
from dblightning.evaluation.scores import weights_label

#: plotly's names of matplotlib's markers
SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
           "*": "star", "X": "x", "h": "hexagon", "d": "diamond-tall", "p": "pentagon", "8": "octagon"}  # fmt: skip
#: bytes of all images before base64: with plotly's 4.8 MB the page stays below 8 MB
IMAGE_BYTES = 1_700_000
IMAGE_SIDE = 128


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pareto_plots(estimates: Estimates, rewards: Sequence[str], gains: bool = False) -> list[str]:
    """One plot per pair of rewards as HTML without plotly's code, which the page holds once."""
    figures = [_pareto_plot(estimates, rewards, x, y, gains) for x, y in combinations(rewards, 2)]
    config = {"displaylogo": False, "responsive": True}
    return [figure.to_html(full_html=False, include_plotlyjs=False, config=config) for figure in figures]


def _pareto_plot(estimates: Estimates, rewards: Sequence[str], x: str, y: str, gains: bool) -> go.Figure:
    points, styles = plane_points(estimates, rewards, x, y, gains), variant_styles(estimates)
    figure = go.Figure()
    between = chord(estimates, rewards, points)
    if len(between):
        figure.add_scatter(x=between["x"], y=between["y"], name=RANDOM, mode="lines", hoverinfo="skip",
                           line={"color": styles[RANDOM][0], "width": 1, "dash": "dash"})  # fmt: skip
    for variant, own in points.groupby("variant", sort=False):
        colour, marker = styles[str(variant)]
        line = line_of(estimates, rewards, str(variant), points) if len(rewards) == 2 else own
        joined = len(rewards) == 2 and len(line) > 1 and (own["method"] != "single").all()
        shown = line if joined else own
        symbol = SYMBOLS[marker]
        figure.add_scatter(
            x=shown["x"], y=shown["y"], name=_plain(str(variant)),
            mode="lines+markers+text" if joined else "markers+text", textposition="top right",
            text=[_weight_text(row, len(rewards)) for _, row in shown.iterrows()],
            textfont={"size": 10, "color": colour},
            line={"color": colour, "width": 1.5},
            marker={"color": colour, "size": 14 if marker == "*" and colour == "#000000" else 9,
                    "symbol": [f"{symbol}-open" if flag else symbol for flag in shown["dominated"]]},
            error_x=_errors(shown, "x", colour), error_y=_errors(shown, "y", colour),
            hovertext=[_hover(estimates, row) for _, row in shown.iterrows()], hoverinfo="text",
        )  # fmt: skip
    prefix = "gain in " if gains else ""
    figure.update_layout(
        template="plotly_white", height=560, margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": -0.15},
        xaxis_title=_plain(prefix + x), yaxis_title=_plain(prefix + y),
    )  # fmt: skip
    return figure


def _weight_text(point: pd.Series, rewards: int) -> str:
    """w beside a point of two rewards; of more, the weights are shown on hovering."""
    return _plain(str(point["label"]).removeprefix("w = ")) if rewards == 2 and point["method"] != "base" else ""


def _errors(points: pd.DataFrame, axis: str, colour: str) -> dict[str, Any]:
    above, below = points[f"{axis}_hi"] - points[axis], points[axis] - points[f"{axis}_lo"]
    return {"type": "data", "array": above, "arrayminus": below, "color": colour, "thickness": 0.6, "width": 0}


def _hover(estimates: Estimates, point: pd.Series) -> str:
    blend = str(point["blend"])
    lines = [f"<b>{_plain(str(point['variant']))}</b>, {_plain(str(point['label']))}"]
    for name in estimates.rewards:
        value, gain = cell(estimates.of(blend, f"reward/{name}"), 3), cell(estimates.of(blend, f"gain/{name}"), 3, True)
        lines.append(f"{_plain(name)}: {value} (gain {gain})")
    lines.append(f"r(w): {cell(estimates.of(blend, 'weighted'), 3)}")
    lines.append(f"gain in r(w): {cell(estimates.of(blend, 'weighted_gain'), 3, True)}")
    lines.append(f"{estimates.blends['seconds'].iloc[estimates.row(blend)]:.3g} s / image")
    lines.append("dominated" if point["dominated"] else "not dominated")
    return "<br>".join(lines)


def _plain(text: str) -> str:
    """Text that plotly shows as it is: its labels read a few HTML tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Cell(NamedTuple):
    """One image of the grid."""

    source: str  # data URI, empty where there is no image
    text: str  # what it shows, for those who do not see it


class Grid(NamedTuple):
    """Images of some preferences: for every prompt, methods by weights, all from the same noise."""

    title: str
    columns: list[str]
    prompts: list[tuple[str, list[tuple[str, list[Cell]]]]]  # prompt → rows of (method, one cell per column)


def image_grids(
    frame: pd.DataFrame, estimates: Estimates, sets: Sequence[Sequence[str]], folders: Sequence[Path], prompts: int = 4
) -> list[Grid]:
    """Grids for every set of rewards and for DB-KLA, as many prompts as the page has room for; empty without images.

    Args:
        frame: one row per image.
        estimates: of it.
        sets: sets of rewards that are weighed together.
        folders: where to look for ``<blend label>/<prompt_id>-<seed>.png``.
        prompts: at most so many in each grid.
    """
    bases = estimates.blends.loc[estimates.blends["method"] == "base", "blend"].tolist()[:1]
    layouts = [_preference_layout(estimates, rewards, bases) for rewards in sets]
    layouts += [_strength_layout(estimates)]
    layouts = [layout for layout in layouts if layout[2]]
    labels = readable_labels(estimates)
    images = frame.sort_values(["prompt_id", "seed"]).drop_duplicates("prompt_id")
    grids: list[Grid] = []
    room = IMAGE_BYTES
    for title, columns, rows in layouts:
        share = room // (len(layouts) - len(grids))
        found: list[tuple[str, list[tuple[str, list[Cell]]]]] = []
        for prompt_id, prompt, seed in images[["prompt_id", "prompt", "seed"]].itertuples(index=False):
            if len(found) == prompts:
                break
            cells = [
                (name, [_cell(folders, blend, prompt_id, seed, labels) for blend in blends]) for name, blends in rows
            ]
            size = sum(len(each.source) * 3 // 4 for _, row in cells for each in row)
            if size > share:
                break
            if size:
                found.append((f"{prompt} (seed {seed})", cells))
                share, room = share - size, room - size
        grids.append(Grid(title, columns, found))
    return [grid for grid in grids if grid.prompts]


Layout = tuple[str, list[str], list[tuple[str, list[str | None]]]]


def _preference_layout(estimates: Estimates, rewards: Sequence[str], bases: list[str]) -> Layout:
    points = _pictured(estimates, preference_points(estimates, rewards))
    weights = sorted({each for blends in points.values() for each in blends})
    # a simplex of weights has too many columns; the evenest preferences say most
    weights = sorted(sorted(weights, key=max)[:11]) if len(rewards) > 2 else weights
    rows: list[tuple[str, list[str | None]]] = [
        (variant, [*bases, *(blends.get(each) for each in weights)]) for variant, blends in points.items()
    ]
    columns = ["Base"] * len(bases) + [f"w = {weights_label(each)}" for each in weights]
    return f"{' / '.join(rewards)}, w weighs {rewards[0]}", columns, rows


def _pictured(
    estimates: Estimates, points: dict[str, dict[tuple[float, ...], str]]
) -> dict[str, dict[tuple[float, ...], str]]:
    """The points with images: the best single adapter's are that adapter's, a random adapter has none of its own."""
    found = {}
    for variant, blends in points.items():
        parts = {weights: estimates.parts.get(blend, {blend: 1.0}) for weights, blend in blends.items()}
        if variant != RANDOM:
            found[variant] = {weights: next(iter(part)) for weights, part in parts.items()}
    return found


def _strength_layout(estimates: Estimates) -> Layout:
    points = kl_points(estimates)
    scales = sorted({scale for blends in points.values() for scale in blends})
    rows: list[tuple[str, list[str | None]]] = [
        (f"{curve}, {name}", [blends.get(scale) for scale in scales]) for (name, curve), blends in points.items()
    ]
    return "Strength λ of one adapter", [f"λ = {scale:g}" for scale in scales], rows


def _cell(folders: Sequence[Path], blend: str | None, prompt_id: int, seed: int, labels: Mapping[str, str]) -> Cell:
    if blend is None:
        return Cell("", "not evaluated")
    for folder in folders:
        path = folder / blend / f"{prompt_id}-{seed}.png"
        # a label is text from a score file: "/home/me/x" or "../.." must not put another file into the page
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            try:
                return Cell(image_uri(path), labels[blend])
            except (OSError, Image.DecompressionBombError):  # not an image, cut short, or far too large
                return Cell("", "unreadable")
    return Cell("", "no image")


def image_uri(path: Path, side: int = IMAGE_SIDE) -> str:
    """A picture as a data URI: small ones as they are, larger ones as JPEG of at most ``side`` pixels."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
        image = opened.convert("RGB")
    kind, options = ("PNG", {"optimize": True}) if max(image.size) <= 64 else ("JPEG", {"quality": 82})
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), f"image/{kind.lower()}")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a ``data:`` address of the media type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ── record ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def record_lines(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested record as (name, value) pairs: {"eta": 1, "versions": {"torch": "2"}} gives eta and versions.torch."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from record_lines(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(part) for part in value)
    else:
        yield name, str(value)
