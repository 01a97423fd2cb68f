"""Show the latest rollout's images in the run's loggers."""

from __future__ import annotations

from typing import Any

import lightning as L
from torchvision.utils import make_grid

from dblightning.loggers import log_image
from dblightning.module import RewardRLModule


class SampleGrid(L.Callback):
    """Log a grid of the rollout's images, best reward first, with prompts and rewards as text.

    Args:
        every_n_rollouts: how often.
        max_images: how many of the rollout's images.
    """

    def __init__(self, every_n_rollouts: int = 10, max_images: int = 16) -> None:
        if every_n_rollouts < 1 or max_images < 1:
            raise ValueError(
                f"every_n_rollouts and max_images must be at least 1, got {every_n_rollouts} and {max_images}"
            )
        self.every_n_rollouts = every_n_rollouts
        self.max_images = max_images

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RewardRLModule)
        step = pl_module.rollouts_done
        if not trainer.is_global_zero or (step != 1 and step % self.every_n_rollouts):
            return
        for learner in pl_module.learners:
            assert learner.latest_images is not None
            images, prompts, reward = learner.latest_images
            best = reward.nan_to_num(float("-inf")).argsort(descending=True)[: self.max_images]
            grid = make_grid(images[best].float().cpu(), nrow=4, padding=1)
            lines = [f"{reward[index].item():+.2f}  {prompts[index]}" for index in best.tolist()]
            log_image(trainer, learner.tag("samples"), grid, step, "\n".join(lines))
