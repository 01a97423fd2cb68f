"""What the package computes, recorded: images of every method, a score table, a training run, rewards.

    python -m tests.golden.record            # writes tests/golden/*.safetensors, *.json, checkpoint; or: make golden

A refactoring must leave all of it as it is: to the bit on the machine that made the files, to 1e-5 elsewhere. They are
made anew only where results are meant to change, and the commit says why.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import save_file
from torch import Tensor

from dblightning import DiffusionBlendPipeline, RewardRLModule
from dblightning.backbone import DiffusersBackbone
from dblightning.checkpointing import RunCheckpoint
from dblightning.data import MiniatureDataModule
from dblightning.evaluation import BlendEvaluationModule, BlendSpec, BlendSweep
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.rewards import JPEGCompressibility, RewardMetric, WeightedReward
from tests.conftest import randomize

HERE = Path(__file__).parent
PROMPTS = ["A red colored circle.", "A blue star and a green cross."]
STEPS = 4
#: name of a recorded image → what the pipeline is called with
CALLS: dict[str, dict[str, Any]] = {
    "base": {"method": "base"},
    "single": {"method": "single", "weights": {"a": 1.0}},
    "db-mpa": {"weights": {"a": 0.3, "b": 0.7}},
    "db-mpa, per image": {"weights": [{"a": 1.0}, {"a": 0.5, "b": 0.5}], "kl_scale": [0.5, 1.5]},
    "db-mpa, by step": {"weights": lambda step, steps: {"a": step / steps, "b": 1 - step / steps}},
    "db-kla": {"method": "db-kla", "weights": {"b": 1.0}, "kl_scale": 1.5},
    "product": {"weights": {"a": 0.4, "b": 0.6}, "kl_scale": 0.7},
    "db-mpa-ls, iid": {"method": "db-mpa-ls", "weights": {"a": 0.3, "b": 0.7}, "ls_schedule": "iid"},
    "db-mpa-ls, systematic": {"method": "db-mpa-ls", "weights": {"a": 0.3, "b": 0.7}, "ls_schedule": "systematic"},
    "rewarded-soup": {"method": "rewarded-soup", "weights": {"a": 0.3, "b": 0.7}},
    "rewarded-soup-factors": {"method": "rewarded-soup-factors", "weights": {"a": 0.3, "b": 0.7}},
    "ddim": {"weights": {"a": 0.3, "b": 0.7}, "eta": 0.0},
}
#: of the miniature alone, whose rewards can follow a gradient
STEERED: dict[str, dict[str, Any]] = {
    "code": {"method": "code", "weights": {"a": 1.0}, "method_options": {"candidates": 2, "block_size": 2}},
    "rgg": {"method": "rgg", "weights": {"a": 0.5, "b": 0.5}},
}


def machine() -> str:
    """What results depend on to the bit: processor, torch and its threads."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{processor}; torch {torch.__version__.split('+')[0]}; {torch.get_num_threads()} thread"


def pipeline(base: str | Path) -> DiffusionBlendPipeline:
    """A base model with two adapters "a" and "b" of random weights."""
    pipe = DiffusionBlendPipeline(DiffusersBackbone(str(base)))
    for seed, name in enumerate(("a", "b")):
        pipe.adapters.add(name, rank=2, seed=seed)
        randomize(pipe.adapters, name, seed, scale=0.3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of_every_method(base: str | Path) -> dict[str, Tensor]:
    """Final latents of every method on one base model; decoded images of one."""
    pipe = pipeline(base)

    def call(**settings: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(7 + index) for index in range(len(PROMPTS))]
        common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"}
        return pipe(PROMPTS, generator=generators, **(common | settings)).images

    found = {name: call(**settings) for name, settings in CALLS.items()}
    if str(base) == "miniature":
        rewards = {"a": ShapeAlignment(), "b": ShapeAesthetic()}
        found |= {name: call(rewards=rewards, **settings) for name, settings in STEERED.items()}
    found["image"] = call(output_type="pt", weights={"a": 0.5, "b": 0.5})
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def score_table() -> dict[str, Tensor]:
    """Rewards of a small evaluation of the miniature with its first release's adapters, by column."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = BlendEvaluationModule(
            DiffusersBackbone("miniature"),
            blends=[BlendSpec("base"), BlendSpec("single", {"alignment": 1.0})],
            sweeps=[
                BlendSweep(
                    ["db-mpa", "db-mpa-ls", "rewarded-soup"],
                    ["alignment", "aesthetic"],
                    [0.2, 0.7],
                    ls_schedules=["iid"],
                )
            ],
            adapters={name: f"miniature:0.1/{name}" for name in ("alignment", "aesthetic")},
            rewards={"alignment": ShapeAlignment(), "aesthetic": ShapeAesthetic()},
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            out=folder,
        )
        data = MiniatureDataModule(limit_test_prompts=4, eval_batch_size=4, prompt_order="file")
        trainer(folder).test(evaluation, datamodule=data, verbose=False)
        import pandas as pd

        frame = pd.read_parquet(Path(folder) / "scores.parquet")
    return {name: torch.from_numpy(frame[name].to_numpy(float)) for name in frame if name.startswith("reward/")}


class Curve(DummyLogger):
    """Keeps what is logged, but for times."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
        self.steps.setdefault(int(step or 0), {}).update(kept)


def trainer(folder: str | Path, **options: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    return L.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
            "log_every_n_steps": 1, "default_root_dir": str(folder),
        } | options
    )  # fmt: skip


def training(folder: Path, resume: Path | None = None) -> tuple[dict[str, Tensor], Curve]:
    """Four rollouts with value function, replay and a moving KL weight on the miniature: adapter and curve.

    Checkpoints go to ``folder``; with ``resume`` the run resumes from that one.
    """
    module = RewardRLModule(
        DiffusersBackbone("miniature"), ShapeAesthetic(), rank=1, seed=3, num_inference_steps=3, guidance_scale=2.0,
        clip_range=0.1, kl_weight=0.05, kl_target=0.5, advantage="both", learning_rate=3e-3, policy_steps=2,
        policy_batch_size=6, gradient_accumulation=2, clip_grad_norm=1.0, value_steps=2, value_batch_size=8,
        value_width=4, buffer_size=24, skip_last_steps=1,
    )  # fmt: skip
    data = MiniatureDataModule(batch_size=4, samples_per_prompt=2, rollouts_per_epoch=2, limit_test_prompts=2, seed=1)
    curve = Curve()
    saver = RunCheckpoint(folder=str(folder), every_n_rollouts=2, keep=5)
    run = trainer(folder, max_epochs=2, logger=curve, callbacks=[saver], enable_checkpointing=True, limit_val_batches=0)
    L.seed_everything(0)
    run.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return module.backbone.adapters.state_dict(module.adapter_name), curve


def rewards_of_pictures() -> dict[str, Tensor]:
    """Scores of fixed pictures by the rewards that need no published weights."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 32, 32, generator=generator)
    pictures[1] = pictures[1] * 0.2 + torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    prompts = ["A red colored circle.", "A red square and a blue ring.", "A green colored star."]
    found: dict[str, RewardMetric] = {
        "alignment": ShapeAlignment(),
        "strict alignment": ShapeAlignment(strict=True),
        "aesthetic": ShapeAesthetic(),
        "jpeg": JPEGCompressibility(scale_kb=0.5, offset_kb=1.0),
    }
    found["weighted"] = WeightedReward(
        {name: found[name] for name in ("alignment", "aesthetic")}, {"alignment": 0.3, "aesthetic": 0.7}
    )
    return {name: reward.score(pictures.clamp(0, 1), prompts).double() for name, reward in found.items()}


def record(out: Path = HERE) -> None:
    """Write every golden file."""
    from tests.tiny_pipelines import save_sd15, save_sdxl

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases: dict[str, str | Path] = {
            "sd15": save_sd15(folder / "sd15"),
            "sdxl": save_sdxl(folder / "sdxl"),
            "miniature": "miniature",
        }
        parts: dict[str, Callable[[], dict[str, Tensor]]] = {
            "scores": score_table,
            "rewards": rewards_of_pictures,
            **{name: lambda base=base: latents_of_every_method(base) for name, base in bases.items()},  # type: ignore[misc]
        }
        for name, make in parts.items():
            save_file({key: value.contiguous() for key, value in make().items()}, out / f"{name}.safetensors")
        adapter, curve = training(folder / "run")
        save_file(adapter, out / "adapter.safetensors")
        (out / "curve.json").write_text(json.dumps(curve.steps, indent=1, sort_keys=True) + "\n")
        shutil.copy(folder / "run" / "rollout-000002.ckpt", out / "rollout-000002.ckpt")
    (out / "machine.txt").write_text(machine() + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
    print(f"golden files in {sys.argv[1] if len(sys.argv) > 1 else HERE}", np.__version__)
