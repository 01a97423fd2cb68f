"""Run under torchrun by test_distributed.py: two rollouts on every rank, then each rank writes its trained tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

from dblightning.backbone import DiffusersBackbone
from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from dblightning.rewards import JPEGCompressibility


def main(model: str, prompts: str, out: str) -> None:
    torch.set_num_threads(1)
    module = RewardRLModule(
        DiffusersBackbone(model), JPEGCompressibility(offset_kb=1.0, scale_kb=0.1), num_inference_steps=3,
        guidance_scale=1.0, advantage="both", learning_rate=1e-2, policy_steps=2, policy_batch_size=4,
        gradient_accumulation=2, value_batch_size=4, value_steps=2, buffer_size=12,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptFileDataModule(prompts, batch_size=2, rollouts_per_epoch=2))
    assert module.replay is not None
    state = {"trained": module.state_dict(), "replay": module.replay.state_dict(), "images": module.images_done}
    torch.save(state, Path(out) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
