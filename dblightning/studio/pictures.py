"""The studio's pictures that are clicked on: a triangle of weights and a Pareto map; and images large enough to see."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dblightning.studio.blends import Mark

#: side that small images are enlarged to, by whole factors so that pixels stay pixels
SHOWN_SIDE = 256
#: triangle's width and height, and its corners (top, lower right, lower left), in pixels
WIDTH, HEIGHT = 360, 320
CORNERS = ((180.0, 44.0), (326.0, 276.0), (34.0, 276.0))
ACCENT, BLUE, GREY = "#f97316", "#2563eb", "#6b7280"


def shown(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as people see it: 8 bits, small ones enlarged without smoothing."""
    levels = (image.nan_to_num(0.0).clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    factor = max(1, SHOWN_SIDE // max(levels.shape[:2]))
    return Image.fromarray(np.repeat(np.repeat(levels, factor, 0), factor, 1))


# ── a strip ──────────────────────────────────────────────────────────────────────────────────────────────────────────

#: side and margin of a strip's frames, and the height of the line under them, in pixels
FRAME, GAP, LINE = 160, 8, 30


def filmstrip(images: Sequence[Tensor], labels: Sequence[str]) -> Image.Image:
    """Images in a row, in two where there are many, each with its label below."""
    columns = _columns(len(images))
    rows = math.ceil(len(images) / columns)
    strip = Image.new("RGB", (columns * (FRAME + GAP) + GAP, rows * (FRAME + GAP + LINE)), "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(18)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = GAP + i % columns * (FRAME + GAP), GAP + i // columns * (FRAME + GAP + LINE)
        strip.paste(shown(image).resize((FRAME, FRAME), Image.Resampling.BILINEAR), (left, top))
        fitting = font if draw.textlength(label, font) <= FRAME else ImageFont.load_default(12)
        draw.text((left + FRAME / 2, top + FRAME + 4), label, fill="black", font=fitting, anchor="mt")
    return strip


def frame_at(x: float, y: float, count: int) -> int:
    """Index of the frame at a strip's pixel, of ``count``."""
    columns = _columns(count)
    column = min(max(int((x - GAP / 2) // (FRAME + GAP)), 0), columns - 1)
    return min(max(int(y // (FRAME + GAP + LINE)), 0) * columns + column, count - 1)


def _columns(count: int) -> int:
    return count if count <= 5 else math.ceil(count / 2)


# ── three weights ────────────────────────────────────────────────────────────────────────────────────────────────────


def triangle(names: Sequence[str], weights: Mapping[str, float]) -> Image.Image:
    """A triangle with a reward at each corner and a dot at the weights.

    Args:
        names: three.
        weights: name → weight, sum 1.
    """
    scale = 3  # drawn large and reduced: smooth edges
    picture = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), "white")
    draw = ImageDraw.Draw(picture)
    corners = [(x * scale, y * scale) for x, y in CORNERS]
    draw.polygon(corners, fill="#f3f4f6", outline=GREY, width=2 * scale)
    centre = tuple(sum(each) / 3 for each in zip(*corners, strict=True))
    for a, b in ((0, 1), (1, 2), (2, 0)):
        middle = tuple((p + q) / 2 for p, q in zip(corners[a], corners[b], strict=True))
        draw.line([centre, middle], fill="#d1d5db", width=scale)
    x, y = (value * scale for value in place_of([weights.get(name, 0.0) for name in names]))
    radius = 8 * scale
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ACCENT, outline="white", width=2 * scale)
    font = ImageFont.load_default(15 * scale)
    for name, (x, y), anchor, lift in zip(names, corners, ("mb", "rt", "lt"), (-8, 10, 10), strict=True):
        draw.text((x, y + lift * scale), f"{name} {weights.get(name, 0.0):.2f}", fill="black", font=font, anchor=anchor)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def place_of(weights: Sequence[float]) -> tuple[float, float]:
    """Pixel of three weights in the triangle."""
    x = sum(weight * corner[0] for weight, corner in zip(weights, CORNERS, strict=True))
    y = sum(weight * corner[1] for weight, corner in zip(weights, CORNERS, strict=True))
    return x, y


def weights_at(x: float, y: float) -> tuple[float, float, float]:
    """Three weights of a pixel, two decimals, sum 1; outside the triangle a negative one is 0.

    >>> weights_at(*CORNERS[1]), weights_at(180, 0)
    ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    """
    (ax, ay), (bx, by), (cx, cy) = CORNERS
    area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy)
    a = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area
    b = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area
    inside = [max(0.0, each) for each in (a, b, 1 - a - b)]
    total = sum(inside)
    first, second = (round(each / total, 2) for each in inside[:2])
    return first, second, round(max(0.0, 1 - first - second), 2)


# ── the map ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Map:
    """A picture of scores, and where its points are.

    Attributes:
        picture: the map.
        points: pixel of each mark, in the marks' order.
        rewards: of x and y; none where there are no scores.
        start, unit: pixel of the scores (0, 0), and pixels per unit of x and y.
    """

    picture: Image.Image
    points: list[tuple[float, float]] = field(default_factory=list)
    rewards: tuple[str, ...] = ()
    start: tuple[float, float] = (0.0, 0.0)
    unit: tuple[float, float] = (0.0, 0.0)

    def nearest(self, x: float, y: float) -> int | None:
        """Index of the mark nearest to a pixel; None where there is none."""
        if not self.points:
            return None
        return min(range(len(self.points)), key=lambda i: math.dist(self.points[i], (x, y)))

    def showing(self, scores: Mapping[str, float]) -> Image.Image:
        """The map with a star at some scores; at the edge where they lie beyond it."""
        if not self.rewards or any(name not in scores for name in self.rewards):
            return self.picture
        x, y = (start + unit * scores[name] for start, unit, name in
                zip(self.start, self.unit, self.rewards, strict=True))  # fmt: skip
        x, y = min(max(x, 12.0), self.picture.width - 12.0), min(max(y, 12.0), self.picture.height - 12.0)
        picture = self.picture.copy()
        _star(ImageDraw.Draw(picture), x, y)
        return picture


def _star(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float = 10.0) -> None:
    turns = [(radius if i % 2 == 0 else radius * 0.45, math.pi * i / 5) for i in range(10)]
    corners = [(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in turns]
    draw.polygon(corners, fill=ACCENT, outline="white")


def pareto_map(marks: Sequence[Mark], rewards: Sequence[str], base: Mapping[str, float], labels: Sequence[str]) -> Map:
    """Two rewards against each other over the places of a survey, with the base model.

    Args:
        marks: of the survey.
        rewards: two rewards, for x and y.
        base: reward → score.
        labels: of the marks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = rewards
    usable = bool(marks) and all(x in each and y in each for each in (base, *(mark.scores for mark in marks)))
    figure = Figure(figsize=(4.2, 3.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    points = [(mark.scores[x], mark.scores[y]) for mark in marks] if usable else []
    if usable:
        axes.margins(0.14)
        across, up = [point[0] for point in points], [point[1] for point in points]
        line = "-" if len(marks[0].weights) == 2 else "none"
        axes.plot(across, up, linestyle=line, color="#9ca3af", zorder=1)
        axes.scatter(across, up, s=70, color=BLUE, zorder=2, label="over w")
        axes.scatter(base[x], base[y], s=70, marker="s", color=GREY, zorder=2, label="base")
        axes.scatter([], [], s=110, marker="*", color=ACCENT, label="shown")
        for point, label in zip(points, labels, strict=True):
            left = point[0] <= (min(across) + max(across)) / 2
            axes.annotate(
                label, point, xytext=(6 if left else -6, 7), textcoords="offset points", fontsize=8, color="#374151",
                ha="left" if left else "right",
            ).set_in_layout(False)  # fmt: skip
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no scores for these prompts", ha="center", transform=axes.transAxes, color=GREY)
    file = io.BytesIO()
    canvas.print_png(file)
    picture = Image.open(file).convert("RGB")
    origin, one = axes.transData.transform((0.0, 0.0)), axes.transData.transform((1.0, 1.0))
    start = (float(origin[0]), picture.height - float(origin[1]))
    unit = (float(one[0] - origin[0]), -float(one[1] - origin[1]))
    places = [(start[0] + unit[0] * point[0], start[1] + unit[1] * point[1]) for point in points]
    return Map(picture, places, (x, y) if usable else (), start, unit)
