"""The miniature's world: coloured shapes on cluttered backgrounds, captioned in DrawBench's colour grammar.

Forty-eight things (8 colours × 6 shapes), one or two to an image of 32 × 32 pixels. All of it is numpy and
seeded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32

#: name → RGB in [0, 1]
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.12, 0.13),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.96, 0.90, 0.18),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.50, 0.15, 0.68),
    "pink": (0.98, 0.50, 0.74),
    "black": (0.05, 0.05, 0.06),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring", "cross", "star")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "stripes", "checks", "noise", "confetti")


class Thing(NamedTuple):
    """One object of a caption."""

    color: str
    shape: str


#: Captions of the pretraining data take the one for the other at times, as web captions do (``mislabel``).
CONFUSED: dict[str, str] = {"red": "pink", "orange": "yellow", "green": "black", "blue": "purple"}
CONFUSED |= {second: first for first, second in CONFUSED.items()}


# ── captions ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(things: Sequence[Thing]) -> str:
    """The caption of one thing ("A red colored circle.") or two ("A red circle and an orange square.").

    Raises:
        ValueError: no thing, or more than two.
    """
    if len(things) == 1:
        text = f"{_article(things[0].color)} {things[0].color} colored {things[0].shape}."
    elif len(things) == 2:
        text = " and ".join(f"{_article(thing.color)} {thing.color} {thing.shape}" for thing in things) + "."
    else:
        raise ValueError(f"a caption names one or two things, got {len(things)}")
    return text[0].upper() + text[1:]


_COLOR, _SHAPE = f"({'|'.join(COLORS)})", f"({'|'.join(SHAPES)})"
_SINGLE = re.compile(rf"an? {_COLOR} (?:colou?red )?{_SHAPE}\.?")
_PAIR = re.compile(rf"an? {_COLOR} {_SHAPE} and an? {_COLOR} {_SHAPE}\.?")


def parse(text: str) -> tuple[Thing, ...]:
    """The things a caption requests, in its order. Case, "colored"/"coloured" and the full stop are free.

    Raises:
        ValueError: a caption outside the grammar.
    """
    words = " ".join(text.lower().split())
    if match := _SINGLE.fullmatch(words):
        return (Thing(match[1], match[2]),)
    if match := _PAIR.fullmatch(words):
        return (Thing(match[1], match[2]), Thing(match[3], match[4]))
    raise ValueError(
        "the miniature knows captions like 'A red colored circle.' and 'A red circle and a blue square.', "
        f"got {text!r}; colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}"
    )


def _chosen_prompts() -> tuple[list[str], list[str], list[str]]:
    """The 48 captions of one thing, 277 of those of two things of different colours, and the rest; shuffled."""
    things = [Thing(color, shape) for color in COLORS for shape in SHAPES]
    singles = [caption([thing]) for thing in things]
    pairs = [caption([a, b]) for a in things for b in things if a.color != b.color]
    rng = np.random.default_rng(25)
    singles, pairs = ([texts[i] for i in rng.permutation(len(texts))] for texts in (singles, pairs))
    # this second shuffle's seed spreads the colours and shapes: all eight are among the 15 singles, each requested at
    # least three times in the 25
    rng = np.random.default_rng(392)
    chosen_singles, chosen_pairs = ([texts[i] for i in rng.permutation(len(texts))] for texts in (singles, pairs[:277]))
    return chosen_singles, chosen_pairs, pairs[277:]


def train_prompts() -> list[str]:
    """25 prompts, 15 of one thing and 10 of two: as many as DrawBench's colour category, in its two forms."""
    singles, pairs, _ = _chosen_prompts()
    return singles[:15] + pairs[:10]


def wide_prompts() -> list[str]:
    """225 training prompts: the 25 and 200 more of two things, none of them a test prompt.

    In 25 prompts a colour is requested a few times more than the one it is confused with, and a policy gradient learns
    that bias before it learns to tell the two apart; in 225 the counts even out.
    """
    return train_prompts() + _chosen_prompts()[2][:200]


def validation_prompts() -> list[str]:
    """128 prompts of two things: no two things of them are requested together in a training or test prompt.

    There are none of one thing: training and test use up all 48.
    """
    known = {frozenset(parse(prompt)) for prompt in wide_prompts() + test_prompts()}
    chosen: list[str] = []
    for prompt in _chosen_prompts()[2][200:]:
        if (scene := frozenset(parse(prompt))) not in known:
            known.add(scene)
            chosen.append(prompt)
    return chosen[:128]


def test_prompts() -> list[str]:
    """300 prompts none of which is a training prompt, in a fixed order.

    The first 55 keep the training set's three singles to two pairs; then the singles are used up and pairs follow.
    """
    singles, pairs, _ = _chosen_prompts()
    singles, pairs = singles[15:], pairs[10:]
    mixed: list[str] = []
    for index in range(11):
        mixed += singles[3 * index : 3 * index + 3] + pairs[2 * index : 2 * index + 2]
    return mixed + pairs[22:]


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed distance (negative inside, a lower bound outside) to a shape of outer radius 1 about 0; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "triangle":
        # sides from the apex (0, -1) to (±1, 0.8), base at y = 0.8
        side = (1.8 * np.abs(x) - y - 1.0) / np.hypot(1.8, 1.0)
        return np.maximum(side, y - 0.8)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.24
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - 0.3, ay - 0.95), np.maximum(ax - 0.95, ay - 0.3))
    if shape == "star":
        # fold the plane into one half-point, then one straight edge from the tip (radius 1.08) to the notch (0.46)
        radius, angle = np.hypot(x, y), np.arctan2(x, -y)
        folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        u, v = radius * np.cos(folded), radius * np.sin(folded)
        tip, notch_u, notch_v = 1.08, 0.46 * np.cos(np.pi / 5), 0.46 * np.sin(np.pi / 5)
        du, dv = notch_u - tip, notch_v
        return ((u - tip) * dv - v * du) / np.hypot(du, dv)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def coverage(shape: str, center: tuple[float, float], radius: float, size: int = IMAGE_SIZE) -> NDArray[np.float64]:
    """Share of each pixel that a shape covers: (size, size) in [0, 1], edges one pixel soft.

    Args:
        shape: one of SHAPES.
        center: (x, y) in pixels; pixel i spans [i, i + 1].
        radius: outer radius in pixels.
        size: side of the image in pixels.
    """
    axis = np.arange(size) + 0.5
    x, y = np.meshgrid((axis - center[0]) / radius, (axis - center[1]) / radius)
    return np.clip(0.5 - _distance(shape, x, y) * radius, 0.0, 1.0)


def _muted(rng: np.random.Generator) -> NDArray[np.float64]:
    """A background colour: mid to light and little saturated, so that it is none of COLORS."""
    grey = rng.uniform(0.42, 0.88)
    return np.clip(grey + rng.uniform(-0.13, 0.13, 3), 0.0, 1.0)


def background(kind: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """One background of a kind in BACKGROUNDS: (32, 32, 3) in [0, 1]."""
    size = IMAGE_SIZE
    first, second = _muted(rng), _muted(rng)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "plain":
        return np.broadcast_to(first, (size, size, 3)).copy()
    if kind == "gradient":
        share = (along - along.min()) / (along.max() - along.min())
    elif kind == "stripes":
        share = np.clip(0.5 + 2 * np.sin(2 * np.pi * along / rng.uniform(5, 11)), 0, 1)
    elif kind == "checks":
        period = int(rng.integers(3, 7))
        shift_x, shift_y = rng.integers(0, period, 2)
        share = ((((x + shift_x) // period) + ((y + shift_y) // period)) % 2).astype(float)
    elif kind == "noise":
        coarse = rng.uniform(0, 1, (size // 2, size // 2))
        share = np.kron(coarse, np.ones((2, 2)))
    elif kind == "confetti":
        image = np.broadcast_to(first, (size, size, 3)).copy()
        names = list(COLORS.values())
        for _ in range(int(rng.integers(10, 26))):
            row, column = rng.integers(0, size - 2, 2)
            height, width = rng.integers(1, 4, 2)
            vivid = np.array(names[int(rng.integers(len(names)))])
            image[row : row + height, column : column + width] = 0.55 * vivid + 0.45 * _muted(rng)
        return image
    else:
        raise ValueError(f"unknown background {kind!r}; known: {', '.join(BACKGROUNDS)}")
    return first + share[..., None] * (second - first)


def _place(count: int, rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """(centre, radius) of one or two things that neither touch nor leave the image."""
    if count == 1:
        radius = rng.uniform(7.5, 11.5)
        reach = min(5.0, 15.5 - radius)
        return [((16 + rng.uniform(-reach, reach), 16 + rng.uniform(-reach, reach)), radius)]
    places = []
    upright = rng.random() < 0.3
    swap = rng.random() < 0.5
    for index in range(2):
        radius = rng.uniform(5.8, 7.5)
        slack = 7.9 - radius
        main = (8 if (index == 0) != swap else 24) + rng.uniform(-slack, slack)
        across = 16 + rng.uniform(-5, 5)
        places.append(((across, main) if upright else (main, across), radius))
    return places


def render(things: Sequence[Thing], rng: np.random.Generator, kind: str | None = None) -> NDArray[np.float32]:
    """Draw one or two things on a background.

    Args:
        things: one or two things.
        rng: decides places, sizes, tints and, unless given, the background.
        kind: a background of BACKGROUNDS.

    Returns:
        float32 (3, 32, 32) in [0, 1].
    """
    if not 1 <= len(things) <= 2:
        raise ValueError(f"an image shows one or two things, got {len(things)}")
    image = background(kind or BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], rng)
    for thing, (center, radius) in zip(things, _place(len(things), rng), strict=True):
        tint = np.clip(np.array(COLORS[thing.color]) + rng.uniform(-0.04, 0.04, 3), 0, 1)
        cover = coverage(thing.shape, center, radius)[..., None]
        image = image + cover * (tint - image)
    return np.clip(image, 0, 1).transpose(2, 0, 1).astype(np.float32)


def sample_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One thing or two of different colours, evenly."""
    count = int(rng.integers(1, 3))
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(list(COLORS)[int(rng.integers(len(COLORS)))], SHAPES[int(rng.integers(len(SHAPES)))])
        if all(thing.color != other.color for other in things):
            things.append(thing)
    return tuple(things)


def mislabel(things: Sequence[Thing], rng: np.random.Generator) -> tuple[Thing, ...]:
    """A careless caption of an image: wrong colours, and a second thing that is not there.

    Each colour is the CONFUSED one with probability 0.45; an image of one thing is said to show another one as well
    with probability 0.6. Classifier-free guidance sharpens away rare errors, so these are nearly as common as the
    truth: a model of such captions draws wrong colours and leaves things out, but has the right answer in reach.
    """
    said = [Thing(CONFUSED[thing.color] if rng.random() < 0.45 else thing.color, thing.shape) for thing in things]
    if len(said) == 1 and rng.random() < 0.6:
        color = [name for name in COLORS if name != said[0].color][int(rng.integers(len(COLORS) - 1))]
        said.insert(int(rng.integers(2)), Thing(color, SHAPES[int(rng.integers(len(SHAPES)))]))
    return tuple(said)


def examples(count: int, seed: int) -> Iterator[tuple[NDArray[np.float32], str]]:
    """``count`` pairs of (image (3, 32, 32) in [0, 1], caption), the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        things = sample_things(rng)
        yield render(things, rng), caption(things)
