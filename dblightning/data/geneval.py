"""GenEval's prompts as a data module; the prompts themselves are in :mod:`dblightning.geneval_prompts`."""

from __future__ import annotations

from typing import Any

from dblightning.data.base import PromptDataModule
from dblightning.data.stream import PromptSet
from dblightning.geneval_prompts import (
    CLASSES,
    COLORS,
    NUMBERS,
    POSITIONS,
    TRAIN_SHA256,
    Sample,
    held_out_samples,
    train_samples,
    validation_samples,
)

__all__ = [
    "CLASSES",
    "COLORS",
    "NUMBERS",
    "POSITIONS",
    "TRAIN_SHA256",
    "GenEvalDataModule",
    "Sample",
    "held_out_samples",
    "prompt_set",
    "train_samples",
    "validation_samples",
]


def prompt_set(samples: list[Sample]) -> PromptSet:
    """Samples as prompts with the metadata columns "tag", "include" and "exclude" (an empty list where nothing is)."""
    return PromptSet(
        [sample["prompt"] for sample in samples],
        {
            "tag": [sample["tag"] for sample in samples],
            "include": [sample["include"] for sample in samples],
            "exclude": [sample.get("exclude", []) for sample in samples],
        },
    )


class GenEvalDataModule(PromptDataModule):
    """GenEval: trains on its 553 prompts, validates on 100 and tests on 700 unseen ones of its drawn tasks.

    Batches carry "tag", "include" and "exclude". A limit keeps the tasks balanced.

    Args:
        settings: see ``PromptDataModule``.
    """

    def __init__(self, **settings: Any) -> None:
        train, val, test = map(prompt_set, (train_samples(), validation_samples(), held_out_samples()))
        super().__init__(train=train, test=test, val=val, strata=lambda prompts: prompts.metadata["tag"], **settings)
