"""The miniature's prompts: as many as DrawBench's to train on, others to test."""

from __future__ import annotations

from dblightning.data import MiniatureDataModule
from dblightning.miniature import world


def test_training_and_test_prompts_are_apart_and_the_miniature_can_draw_them() -> None:
    module = MiniatureDataModule()
    assert len(module.train_prompts) == 25
    assert len(module.test_prompts) == len(set(module.test_prompts)) >= 200
    assert not set(module.train_prompts) & set(module.test_prompts)
    assert all(len(world.parse(prompt)) in (1, 2) for prompt in module.train_prompts + module.test_prompts)
