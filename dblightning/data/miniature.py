"""The miniature's captions: 25 (or 225) to train on, 128 to validate and 300 to test."""

from __future__ import annotations

from typing import Any, Literal

from dblightning.data.base import PromptDataModule
from dblightning.data.drawbench import number_of_things
from dblightning.data.stream import PromptSet
from dblightning.miniature import world


class MiniatureDataModule(PromptDataModule):
    """Prompts of the embedded miniature: coloured shapes in DrawBench's grammar.

    A limit keeps the share of prompts of one thing and of two. All validation prompts are of two things.

    Args:
        train_on: "short", 25 prompts as in DrawBench's colour category, or "wide", these and 200 more.
        settings: see ``PromptDataModule``.
    """

    def __init__(self, train_on: Literal["short", "wide"] = "short", **settings: Any) -> None:
        prompts = world.train_prompts() if train_on == "short" else world.wide_prompts()
        super().__init__(
            train=PromptSet(prompts),
            test=PromptSet(world.test_prompts()),
            val=PromptSet(world.validation_prompts()),
            strata=number_of_things,
            **settings,
        )
