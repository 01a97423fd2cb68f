"""DrawBench's colour prompts (Saharia et al. 2022), and a thousand unseen prompts of the same two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dblightning.data.base import PromptDataModule
from dblightning.data.prompt_file import read_prompts
from dblightning.data.stream import PromptSet

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
    """ "An orange colored sandwich." """
    return _with_article(f"{color} colored {thing}.").capitalize()


def pair(first: tuple[str, str], second: tuple[str, str]) -> str:
    """ "A red car and a white sheep." from two (colour, object) tuples."""
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
    rng = np.random.default_rng(seed)
    seen = {frozenset([(color, thing)]) for thing, colors in SINGLES for color in colors}
    seen |= {frozenset(two) for two in PAIRS}
    prompts: list[str] = []
    while len(prompts) < count:
        things = 1 + int(rng.integers(2))
        colors = [COLORS[i] for i in rng.choice(len(COLORS), size=things, replace=False)]
        objects = [OBJECTS[i] for i in rng.choice(len(OBJECTS), size=things, replace=False)]
        scene = list(zip(colors, objects, strict=True))
        if frozenset(scene) in seen:
            continue
        seen.add(frozenset(scene))
        prompts.append(single(*scene[0]) if things == 1 else pair(scene[0], scene[1]))
    return prompts


class DrawBenchDataModule(PromptDataModule):
    """Short-DrawBench: trains on the 25 colour prompts, evaluates on 1000 unseen ones of the same forms.

    Args:
        csv: a DrawBench file of your own, with columns "Prompts" (or "prompt") and "Category"; its prompts of
            ``category`` are then the training prompts, and the test prompts are those of the 1000 not among them.
        category: the file's category to train on, in any case; None takes every prompt of the file.
        settings: see ``PromptDataModule``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without these columns, without this category, or without a prompt.
    """

    def __init__(self, csv: str | Path | None = None, category: str | None = "Colors", **settings: Any) -> None:
        train = PromptSet(train_prompts()) if csv is None else read_category(csv, category)
        known = set(train.prompts)
        super().__init__(train=train, test=PromptSet([p for p in held_out_prompts() if p not in known]), **settings)


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
