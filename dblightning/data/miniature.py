"""The miniature's captions: 25 to train on, the rest of its fixed selection held out."""

from __future__ import annotations

from typing import Any

from dblightning.data.base import PromptDataModule
from dblightning.data.stream import PromptSet
from dblightning.miniature import world


class MiniatureDataModule(PromptDataModule):
    """Prompts of the embedded miniature: coloured shapes in DrawBench's grammar.

    Args:
        settings: see ``PromptDataModule``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(train=PromptSet(world.train_prompts()), test=PromptSet(world.test_prompts()), **settings)
