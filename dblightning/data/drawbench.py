"""DrawBench's colour prompts (Saharia et al. 2022), and unseen ones of their forms: 80 to validate, 1000 to test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dblightning.data.base import PromptDataModule
from dblightning.data.prompt_file import read_prompts
from dblightning.data.stream import PromptSet

#: what a prompt requests: one or two (colour, object)
Scene = list[tuple[str, str]]

#: object → colours, in DrawBench's order: "A red colored car."
SINGLES: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("car", ("red", "black", "pink")),
    ("dog", ("black", "red", "blue")),
    ("banana", ("green", "red", "black")),
    ("sandwich", ("white", "black", "orange")),
    ("giraffe", ("pink", "yellow", "brown")),
)
#: (colour, object), (colour, object): "A red car and a white sheep."
PAIRS: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = (
    (("red", "car"), ("white", "sheep")),
    (("blue", "bird"), ("brown", "bear")),
    (("green", "apple"), ("black", "backpack")),
    (("green", "cup"), ("blue", "cell phone")),
    (("yellow", "book"), ("red", "vase")),
    (("white", "car"), ("red", "sheep")),
    (("brown", "bird"), ("blue", "bear")),
    (("black", "apple"), ("green", "backpack")),
    (("blue", "cup"), ("green", "cell phone")),
    (("red", "book"), ("yellow", "vase")),
)

COLORS: tuple[str, ...] = ("red", "white", "black", "purple", "pink", "yellow", "green", "blue", "orange", "brown")
# fmt: off
OBJECTS: tuple[str, ...] = (
    "car", "dog", "apple", "banana", "cup", "sandwich", "giraffe", "backpack", "sheep", "bird", "bear",
    "cell phone", "book", "vase", "hat", "clock", "chair", "table", "cat", "shoe", "laptop", "bottle", "pen",
    "notebook", "pillow", "blanket", "mug", "camera", "tree", "bench",
)
# fmt: on


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def single(color: str, thing: str) -> str:
    """The prompt of one coloured thing, such as "An orange colored sandwich."."""
    return _with_article(f"{color} colored {thing}.").capitalize()


def pair(first: tuple[str, str], second: tuple[str, str]) -> str:
    """The prompt of two (colour, object) tuples, such as "A red car and a white sheep."."""
    return f"{_with_article(' '.join(first))} and {_with_article(' '.join(second))}.".capitalize()


def train_prompts() -> list[str]:
    """The 25 prompts of DrawBench's colour category: 15 of one object, then 10 of two."""
    return [single(color, thing) for thing, colors in SINGLES for color in colors] + [pair(*two) for two in PAIRS]


def held_out_prompts(count: int = 1000, seed: int = 25) -> list[str]:
    """Unseen prompts of the two forms, each with probability 1/2, from ten colours and thirty objects.

    The two objects of a pair differ, and so do their colours. No prompt comes twice or is one of the 25, and none is
    another one with its two objects named the other way round.

    Args:
        count: how many, at most 39 425: 285 of one object, 39 140 of two.
        seed: of the draws.

    Raises:
        ValueError: more than there are.
    """
    if count > 39_425:
        raise ValueError(f"only 39425 unseen colour prompts exist, got count={count}")
    return [_prompt(scene) for scene in _unseen_scenes(count, seed)]


def validation_prompts() -> list[str]:
    """80 prompts that are neither among the 25 nor among the 1000: 21 of one object, 59 of two, shuffled.

    The 1000 leave 21 prompts of one object; with 59 of two, these have the 1000's mix. No scene is one of the 1025 with
    its objects named the other way round.
    """
    test = _unseen_scenes(1000, 25)
    known = {frozenset(scene) for scene in [*test, *_train_scenes()]}
    every = [[(color, thing)] for color in COLORS for thing in OBJECTS]
    singles = [scene for scene in every if frozenset(scene) not in known]
    drawn = _unseen_scenes(2000, 25)[1000:]  # what the same draws give next
    pairs = [scene for scene in drawn if len(scene) == 2][: 80 - len(singles)]
    scenes = singles + pairs
    return [_prompt(scenes[i]) for i in np.random.default_rng(80).permutation(len(scenes))]


def _prompt(scene: Scene) -> str:
    return single(*scene[0]) if len(scene) == 1 else pair(scene[0], scene[1])


def _train_scenes() -> list[Scene]:
    return [[(color, thing)] for thing, colors in SINGLES for color in colors] + [list(two) for two in PAIRS]


def _unseen_scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    seen = {frozenset(scene) for scene in _train_scenes()}
    scenes: list[Scene] = []
    while len(scenes) < count:
        things = 1 + int(rng.integers(2))
        colors = [COLORS[i] for i in rng.choice(len(COLORS), size=things, replace=False)]
        objects = [OBJECTS[i] for i in rng.choice(len(OBJECTS), size=things, replace=False)]
        scene = list(zip(colors, objects, strict=True))
        if frozenset(scene) not in seen:
            seen.add(frozenset(scene))
            scenes.append(scene)
    return scenes


class DrawBenchDataModule(PromptDataModule):
    """Short-DrawBench: trains on the 25 colour prompts, validates on 80 and tests on 1000 unseen ones of their forms.

    A limit keeps the share of prompts of one object and of two.

    Args:
        csv: a DrawBench file of your own, with columns "Prompts" (or "prompt") and "Category"; its prompts of
            ``category`` are then the training prompts, and the validation and test prompts are those of the 80 and the
            1000 that are not among them, the latter numbered anew.
        category: the file's category to train on, in any case; None takes every prompt of the file.
        settings: see ``PromptDataModule``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without these columns, without this category, or without a prompt.
    """

    def __init__(self, csv: str | Path | None = None, category: str | None = "Colors", **settings: Any) -> None:
        train = PromptSet(train_prompts()) if csv is None else read_category(csv, category)
        test, val = (
            unseen.select(unseen.without(train.prompts))
            for unseen in (PromptSet(held_out_prompts()), PromptSet(validation_prompts()))
        )
        super().__init__(train=train, test=test, val=val, strata=number_of_things, **settings)


def number_of_things(prompts: PromptSet) -> list[int]:
    """One or two: how many things each prompt of the colour grammar names."""
    return [1 + (" and " in prompt) for prompt in prompts.prompts]


def read_category(csv: str | Path, category: str | None) -> PromptSet:
    """The prompts of one category of a DrawBench CSV, the category kept as metadata.

    Raises:
        FileNotFoundError, ValueError: see ``DrawBenchDataModule``.
    """
    table = read_prompts(csv, prompt_column=("Prompts", "prompt"))
    if category is None:
        return table
    column = next((name for name in table.metadata if name.lower() == "category"), None)
    if column is None:
        raise ValueError(
            f"{csv} has no 'Category' column, only {sorted(table.metadata)}; pass category=None to take all"
        )
    values = table.metadata[column]
    chosen = [i for i, value in enumerate(values) if str(value).strip().lower() == category.strip().lower()]
    if not chosen:
        raise ValueError(
            f"{csv} has no prompt of category {category!r}; its categories are {sorted(set(map(str, values)))}"
        )
    return table.select(chosen)
