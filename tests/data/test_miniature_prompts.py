"""The miniature's prompts: as many as DrawBench's to train on, others to test."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from dblightning.data import MiniatureDataModule
from dblightning.miniature import world

ROOT = Path(__file__).parents[2]


def test_training_and_test_prompts_are_apart_and_the_miniature_can_draw_them() -> None:
    module = MiniatureDataModule()
    assert len(module.train_prompts) == 25
    assert len(module.test_prompts) == len(set(module.test_prompts)) >= 200
    assert not set(module.train_prompts) & set(module.test_prompts)
    assert all(len(world.parse(prompt)) in (1, 2) for prompt in module.train_prompts + module.test_prompts)


def test_a_validation_pair_is_in_no_other_prompt_in_either_order() -> None:
    module = MiniatureDataModule(train_on="wide")
    scenes = [frozenset(world.parse(prompt)) for prompt in module.val_prompts]
    others = {frozenset(world.parse(prompt)) for prompt in module.train_prompts + module.test_prompts}
    assert len(set(scenes)) == len(scenes) == 128
    assert not set(scenes) & others
    assert {thing for scene in scenes for thing in scene} == {
        world.Thing(color, shape) for color in world.COLORS for shape in world.SHAPES
    }


@pytest.mark.parametrize("name", ["table1", "table5", "table6", "figure6", "figure8", "seeds", "seeds_22"])
def test_the_configs_give_the_prompts_of_the_results_in_the_docs(name: str) -> None:
    """Those are the first 200 of the list, not a sample of it: hence ``prompt_order: file`` in these configs."""
    settings = yaml.safe_load((ROOT / f"configs/miniature/{name}.yaml").read_text())["data"]["init_args"]
    module = MiniatureDataModule(**settings)
    file = ROOT / f"docs/results/miniature_{name}.parquet"
    table = pd.read_parquet(file, columns=["prompt_id", "prompt"]).drop_duplicates().sort_values("prompt_id")
    assert module.test_set.prompt_ids == table["prompt_id"].tolist()
    assert module.test_prompts == table["prompt"].tolist()
