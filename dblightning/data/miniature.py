"""The miniature's captions: 25 to train on, the rest of its fixed selection held out."""

from __future__ import annotations

from typing import Any, Literal

from dblightning.data.base import PromptDataModule
from dblightning.data.stream import PromptSet
from dblightning.miniature import world


class MiniatureDataModule(PromptDataModule):
    """Prompts of the embedded miniature: coloured shapes in DrawBench's grammar.

    Args:
        train_on: "short", 25 prompts as in DrawBench's colour category, or "wide", these and 200 more.
        settings: see ``PromptDataModule``.
    """

    def __init__(self, train_on: Literal["short", "wide"] = "short", **settings: Any) -> None:
        prompts = world.train_prompts() if train_on == "short" else world.wide_prompts()
        super().__init__(train=PromptSet(prompts), test=PromptSet(world.test_prompts()), **settings)
