"""A short fit with callbacks, logged to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from dblightning.rewards import JPEGCompressibility


def fit(
    backbone: Any, tmp_path: Path, callbacks: list[L.Callback], rollouts: int = 4, policy_steps: int = 1
) -> RewardRLModule:
    """Train on two prompts for ``rollouts`` rollouts in two epochs, on a CPU."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    module = RewardRLModule(
        backbone,
        JPEGCompressibility(),
        num_inference_steps=2,
        guidance_scale=1.0,
        policy_steps=policy_steps,
        gradient_accumulation=1,
        value_batch_size=4,
        learning_rate=1e-2,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=TensorBoardLogger(str(tmp_path), name="log", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    data = PromptFileDataModule(str(tmp_path / "prompts.txt"), batch_size=2, rollouts_per_epoch=rollouts // 2)
    torch.manual_seed(11)  # here, because loading a model draws from the global generator
    trainer.fit(module, datamodule=data)
    return module
