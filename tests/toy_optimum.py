"""Fits in the Gaussian world of ``toy.py`` whose end is known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dblightning.blending import Base
from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from dblightning.solvers import DDIMSolver
from tests.toy import GaussianBackbone
from tests.toy_fit import trainer
from tests.toy_rewards import LinearReward

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 4, "guidance_scale": 1.0, "kl": "exact", "learning_rate": 0.02, "policy_steps": 1,
    "policy_batch_size": 4 * 256, "gradient_accumulation": 1, "clip_grad_norm": 100.0, "buffer_size": None,
    "statistics_window": 4096,
}  # fmt: skip


def gains(backbone: GaussianBackbone, solver: DDIMSolver) -> tuple[list[float], list[float]]:
    """c_t and σ_t² of every step in sampling order: c_t is the gain dx₀/dμ_t of the steps after t."""
    alphas, after = solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist()
    later, variances, gain = [], [], 1.0
    for a, b in zip(reversed(alphas), reversed(after), strict=True):
        variance = (1 - b) / (1 - a) * (1 - a / b)
        later.append(gain)
        variances.append(variance)
        d_epsilon = (1 - a) ** 0.5 / (a * backbone.std**2 + 1 - a)
        coefficient = (1 - b - variance) ** 0.5 - (b * (1 - a) / a) ** 0.5
        gain *= (b / a) ** 0.5 + coefficient * d_epsilon
    return later[::-1], variances[::-1]


def optimal_shift(backbone: GaussianBackbone, solver: DDIMSolver, slope: float, alpha: float) -> float:
    """Shift of each dimension's mean x₀ at the optimum of eq. (4), written from the definitions.

    The policy may add d_t to the mean of step t. x₀ moves by Σ c_t d_t, c_t the product of the later steps' gains
    dμ/dx, and the KL of step t is d_t² / (2σ_t²). So d_t = slope · c_t σ_t² / α and the shift is slope/α Σ c_t² σ_t².
    """
    return slope / alpha * sum(c**2 * v for c, v in zip(*gains(backbone, solver), strict=True))


def module(backbone: Any = None, slope: float = 0.5, reward: Any = None, **settings: Any) -> RewardRLModule:
    """A module whose adapter is one shift per step, with settings that let it converge."""
    return RewardRLModule(backbone or GaussianBackbone(), reward or LinearReward(slope), **(SETTINGS | settings))


def converged(folder: Path, run: RewardRLModule, rollouts: int = 150, average: int = 75, **data: Any) -> Tensor:
    """Shift of the mean x₀ per dimension after training, (dims,), from the average of the last iterates.

    Averaging takes out the noise of the last gradients. Base and adapter share their noise and the shift is the same
    for all noise, so no Monte-Carlo error is left.
    """
    shifts: list[Tensor] = []
    backbone: Any = run.backbone

    class Average(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shifts.append(backbone.shifts[run.adapter_name].detach().clone())

    file = folder / "prompts.txt"
    file.write_text("a red circle\na blue star\na green ring\na pink cross\n")
    prompts = PromptFileDataModule(str(file), **({"batch_size": 256, "rollouts_per_epoch": rollouts} | data))
    trainer(folder, callbacks=[Average()]).fit(run, datamodule=prompts)
    backbone.shifts[run.adapter_name].data = torch.stack(shifts[-average:]).mean(0)
    ids = torch.arange(2000)
    texts = ["a red circle"] * len(ids)
    moved = run.generate(texts, ids, ids) - run.generate(texts, ids, ids, Base())
    assert moved.std(0).max() < 1e-4
    return moved.mean(0).flatten()
