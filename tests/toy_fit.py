"""Fits in the Gaussian world of ``toy.py`` inside the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from tests.toy import GaussianBackbone
from tests.toy_rewards import LinearReward

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 4, "guidance_scale": 1.0, "clip_range": 0.5, "learning_rate": 0.05, "policy_steps": 2,
    "policy_batch_size": 4, "gradient_accumulation": 1, "clip_grad_norm": 1.0, "value_steps": 1, "value_batch_size": 8,
    "value_width": 8, "advantage": "both", "buffer_size": 32,
}  # fmt: skip


def module(reward: Any = None, **settings: Any) -> RewardRLModule:
    """A module whose adapter is one shift per step."""
    return RewardRLModule(GaussianBackbone(2), reward or LinearReward(), **(SETTINGS | settings))


def trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
        "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    saves = any(isinstance(each, Checkpoint) for each in options.get("callbacks", []))
    return L.Trainer(**(defaults | {"enable_checkpointing": saves} | options))


def data(folder: Path, prompts: int = 5, **settings: Any) -> PromptFileDataModule:
    """Prompts "prompt 0" … in rollouts of four images, three rollouts an epoch."""
    file = folder / f"prompts{prompts}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(f"prompt {number}" for number in range(prompts)) + "\n")
    return PromptFileDataModule(str(file), **({"batch_size": 4, "rollouts_per_epoch": 3} | settings))


def fit(folder: Path, run: RewardRLModule, ckpt_path: str | None = None, **options: Any) -> L.Trainer:
    """Train; data in ``folder``."""
    given = trainer(folder, **options)
    given.fit(run, datamodule=data(folder), ckpt_path=ckpt_path, weights_only=True)
    return given
