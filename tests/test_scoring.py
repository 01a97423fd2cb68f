from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.backbone import DiffusersBackbone
from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from dblightning.rewards.base import RewardMetric
from dblightning.scoring import RewardQueue
from tests.test_module import build, trainer


class Brightness(RewardMetric):
    """Mean of the image; does what ``before`` says first."""

    name = "brightness"

    def __init__(self, before: Any = None) -> None:
        super().__init__()
        self.before = before

    def _score(self, images: Tensor, prompts: Any) -> Tensor:
        if self.before is not None:
            self.before(images)
        return images.flatten(1).mean(1)


PARTS = [(torch.full((2, 3, 4, 4), 0.25), ["a", "b"]), (torch.full((1, 3, 4, 4), 0.5), ["c"])]


@pytest.mark.parametrize("overlap", [False, True])
def test_rewards_come_in_the_order_of_the_parts(overlap: bool) -> None:
    with RewardQueue(Brightness(), overlap) as queue:
        for images, prompts in PARTS:
            queue.put(images, prompts)
        torch.testing.assert_close(queue.rewards(), torch.tensor([0.25, 0.25, 0.5]))


def test_a_part_is_scored_while_the_next_is_made() -> None:
    """The first part's score waits until the second part is there: without overlap it would wait for ever."""
    second = threading.Event()

    def wait(images: Tensor) -> None:
        if len(images) == 2 and not second.wait(timeout=60):
            raise TimeoutError("the second part did not come while the first was scored")

    with RewardQueue(Brightness(wait), overlap=True) as queue:
        queue.put(*PARTS[0])
        second.set()
        queue.put(*PARTS[1])
        assert len(queue.rewards()) == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_what_the_reward_raises_reaches_the_rollout(overlap: bool) -> None:
    def fail(images: Tensor) -> None:
        raise RuntimeError("no weights")

    with RewardQueue(Brightness(fail), overlap) as queue, pytest.raises(RuntimeError, match="no weights"):
        queue.put(*PARTS[0])
        queue.rewards()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward")]


def test_autocast_and_no_gradients_hold_in_the_background() -> None:
    seen = []

    def look(images: Tensor) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))

    with torch.autocast("cpu", torch.bfloat16), RewardQueue(Brightness(look), overlap=True) as queue:
        queue.put(*PARTS[0])
        queue.rewards()
    assert seen == [(True, torch.bfloat16, False)]


def test_a_fit_with_overlap_trains_the_same_adapter(sd15_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star")

    def trained(**settings: Any) -> list[Tensor]:
        module: RewardRLModule = build(DiffusersBackbone(str(sd15_folder)), rollout_batch_size=2, **settings)
        trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(
            module, datamodule=PromptFileDataModule(str(tmp_path / "prompts.txt"), batch_size=4, rollouts_per_epoch=2)
        )
        return [each.detach().clone() for each in module.backbone.adapters.parameters(module.adapter_name)]

    for one, other in zip(trained(), trained(overlap_reward=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
