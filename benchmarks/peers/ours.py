"""This package as a contestant: ``RewardRLModule`` under Lightning's Trainer, with all it does between two batches.

python -m benchmarks.peers.ours SETTINGS     (driven by benchmarks/training.py)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml

from benchmarks.peers.environment import ROOT
from benchmarks.peers.worker import Line, Meter, Settings, versions
from dblightning.backbone import DiffusersBackbone
from dblightning.data import MiniatureDataModule
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK


class Gate(L.Callback):
    """Waits for a command before every batch; answers when the batch is done. With several ranks, the first talks."""

    def __init__(self, line: Line | None, meter: Meter) -> None:
        self.line, self.meter, self.running = line, meter, False

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.line is not None:
            if self.running:
                assert module.latest_images is not None
                self.line.answer(self.meter.stop(reward=float(module.latest_images[2].mean())))
            else:
                self.line.answer({"ready": versions()})
        self.running = True
        while (command := self._command())["do"] != "round":
            if command["do"] == "quit":
                raise SystemExit(0)
            if self.line is not None:
                module.export_adapter(command["folder"])
                self.line.answer({"exported": command["folder"]})
        self.meter.start()

    def _command(self) -> dict[str, Any]:
        commands = [self.line.next() if self.line is not None else None]
        if dist.is_initialized():
            dist.broadcast_object_list(commands, src=0)
        assert commands[0] is not None
        return commands[0]


def build(settings: Settings) -> tuple[RewardRLModule, MiniatureDataModule]:
    """Module and prompts that do the work of ``settings``, or of the run configuration it names."""
    if settings.config is not None:
        run = yaml.safe_load((ROOT / settings.config).read_text(encoding="utf-8"))
        model = {key: value for key, value in run["model"].items() if key not in ("backbone", "reward", "eval_rewards")}
        model["seed"] = settings.seed
        data = run["data"]["init_args"]
    else:
        model = dict(
            seed=settings.seed, objective=DPOK(settings.clip_range),
            sampling=dict(
                num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
                rollout_batch_size=settings.sample_batch,
            ),
            optimisation=dict(
                learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
                policy_steps=settings.optimizer_steps, batch_size=settings.micro_batch,
                accumulation=settings.accumulation, clip_grad_norm=settings.max_grad_norm,
            ),
            kl=dict(weight=settings.kl_weight), advantage=dict(baseline="prompt", normalize=True),
            replay=dict(buffer_size=None),
        )  # fmt: skip
        data = dict(batch_size=settings.images, samples_per_prompt=settings.samples_per_prompt)
    module = RewardRLModule(DiffusersBackbone("miniature"), ShapeAesthetic(), **model)
    return module, MiniatureDataModule(**{**data, "rollouts_per_epoch": 10**6})


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    line = Line() if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    meter = Meter(time.process_time if settings.processes == 1 else time.perf_counter)
    module, data = build(settings)
    backbone: Any = module.backbone
    meter.watch(backbone.unet, backbone.vae, backbone.text_encoder, module.settings.sampling.guidance_scale > 1)
    meter.wrap(module, "roll_out", "sampling")
    meter.wrap(module.reward, "score", "rewards")
    meter.wrap(module, "update_policy", "update")
    meter.wrap(module, "update_value", "update")
    backbone.compile_denoiser(settings.compile)
    trainer = L.Trainer(
        accelerator="cpu", devices=settings.processes, strategy="ddp" if settings.processes > 1 else "auto",
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[Gate(line, meter)],
        default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main()
