"""The picture of a run: the same prompts and noise before training and after."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from dblightning.blending import Base, Single
from dblightning.figures import before_after_figure
from dblightning.learner import Learner
from dblightning.loggers import log_image
from dblightning.module import RewardRLModule


class BeforeAfterGrid(L.Callback):
    """At the end of the fit, draw test prompts with the base model and with the adapter, same noise, with rewards.

    Needs a DataModule with ``test_prompts``. Writes ``before_after.png`` and gives the figure to the loggers; not in a
    ``fast_dev_run``. Of a basis each adapter has a picture of its own, ``before_after_<name>.png``.

    Args:
        num_prompts: test prompts to draw.
        path: PNG file; None takes ``before_after.png`` under the run's log directory.
    """

    def __init__(self, num_prompts: int = 8, path: str | None = None) -> None:
        self.num_prompts = num_prompts
        self.path = path

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RewardRLModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        prompts = list(getattr(trainer, "datamodule").test_prompts[: self.num_prompts])  # noqa: B009 (not in its type)
        ids = torch.arange(len(prompts))
        seeds = torch.zeros_like(ids)
        before = pl_module.generate(prompts, ids, seeds, Base())
        for learner in pl_module.learners:
            after = pl_module.generate(prompts, ids, seeds, Single(learner.name))
            path = self._path(trainer, learner)
            if not trainer.is_global_zero:
                continue
            scores: list[Tensor] = [learner.reward.score(images, prompts).cpu() for images in (before, after)]
            figure = before_after_figure(before.cpu(), after.cpu(), prompts, scores[0], scores[1], learner.reward.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
            print(f"before and after, same prompts and noise: {path}")
            log_image(trainer, learner.tag("before_after"), figure, pl_module.rollouts_done)

    def _path(self, trainer: L.Trainer, learner: Learner) -> Path:
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "before_after.png")
        return path.with_stem(f"{path.stem}{learner.suffix.replace('/', '_')}")

    def outputs(self, trainer: L.Trainer, module: L.LightningModule) -> dict[Path, list[Path]]:
        """Files the pictures would replace, for ``RunGuard``."""
        assert isinstance(module, RewardRLModule)
        paths = [self._path(trainer, learner) for learner in module.learners]
        return {path: [path] if path.exists() else [] for path in paths}
