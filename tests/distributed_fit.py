"""Fits in the Gaussian world of ``toy.py``, as a process of its own so that tests can start several and kill them.

    python tests/distributed_fit.py OUT '[{"name": "a", …}, …]'

runs one fit after the other in folder OUT; under torchrun on as many processes as that starts. Each process writes what
it ended with to OUT/<name>/rank<r>.pt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import save_file
from torch import Tensor

from dblightning.checkpointing import Preempted, RunCheckpoint, latest_intact
from dblightning.data import PromptFileDataModule
from dblightning.distributed import DDP
from dblightning.module import RewardRLModule
from dblightning.rewards import RewardUnavailable
from tests.toy import FlowBackbone, GaussianBackbone
from tests.toy_rewards import LinearReward

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 4, "guidance_scale": 1.0, "clip_range": 0.5, "learning_rate": 0.05, "policy_steps": 2,
    "policy_batch_size": 4, "gradient_accumulation": 2, "clip_grad_norm": 1.0, "value_steps": 2, "value_batch_size": 8,
    "value_width": 8, "kl_target": 0.5, "advantage": "both",
}  # fmt: skip


def rank() -> int:
    """This process's number, as torchrun tells it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class TroubledReward(LinearReward):
    """Fails in one call on one rank, in a way of choice: "raise", "unavailable", "nan" or "kill"."""

    def __init__(self, how: str = "", rank: int = 1, call: int = 2, seconds: float = 0.0) -> None:
        super().__init__()
        self.how, self.rank, self.call, self.seconds, self.calls = how, rank, call, seconds, 0

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        if self.how and self.rank == rank() and self.calls == self.call:
            if self.how == "raise":
                raise RuntimeError("no scorer today")
            if self.how == "unavailable":
                raise RewardUnavailable("no answer from the scorer.")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._score(images, prompts) * float("nan")
        return super()._score(images, prompts)


class Curves(DummyLogger):
    """Buffers what is logged, as TensorBoard's does, and writes it when told to save."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.lines = file, list[str]()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        # wall-clock times differ from run to run
        kept = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        self.lines.append(json.dumps([step, kept]))

    def save(self) -> None:
        with self.file.open("a") as file:
            file.writelines(line + "\n" for line in self.lines)
        self.lines = []

    def finalize(self, status: str) -> None:
        self.save()


class Recorder(L.Callback):
    """The adapter after every optimiser step, and the place to send oneself a signal.

    ``signals``: "name" of one, to "rank", in the rollout "after" so many or in this process's optimiser step "at_step".
    """

    def __init__(self, module: RewardRLModule, signals: dict[str, Any]) -> None:
        self.adapters: list[Tensor] = []
        self.signals = signals
        step = module._step

        def recorded(*arguments: Any) -> Tensor:
            self._signal(at_step=len(self.adapters))
            norm = step(*arguments)
            weights = [module.backbone.adapters.parameters(name)[0].detach() for name in module.adapter_names]
            self.adapters.append(torch.cat(weights))
            return norm

        module._step = recorded  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, RewardRLModule)
        self._signal(after=pl_module.rollouts_done)

    def _signal(self, **when: int) -> None:
        if self.signals and self.signals["rank"] == rank() and when.items() <= self.signals.items():
            os.kill(os.getpid(), signal.Signals[self.signals["name"]])


class SignalAfter(L.Callback):
    """Sends this process a signal at the start of the rollout after so many."""

    def __init__(self, rollouts: int, name: str = "SIGTERM") -> None:
        self.rollouts, self.name = rollouts, name

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, RewardRLModule)
        if pl_module.rollouts_done == self.rollouts:
            os.kill(os.getpid(), signal.Signals[self.name])


def run(
    out: Path,
    name: str,
    batch_size: int = 4,
    epochs: int = 1,
    rollouts_per_epoch: int = 3,
    settings: dict[str, Any] | None = None,
    trouble: dict[str, Any] | None = None,
    signals: dict[str, Any] | None = None,
    validate: int = 0,
    every_n_rollouts: int = 2,
    resume: bool = False,
    num_nodes: int = 1,
    label: str = "",
    basis: dict[str, dict[str, Any]] | None = None,
    flow: bool = False,
) -> dict[str, Any]:
    """One fit; what it ended with.

    ``basis``: name → settings of several adapters, with a slope each, to train together; None trains one. ``flow``: on
    the flow path.
    """
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a red circle\na blue star\na green ring\na pink cross\na white dot\n")
    torch.manual_seed(rank())
    reward = TroubledReward(**(trouble or {}))
    adapters = {
        key: {"reward": LinearReward(own["slope"]), **{name: value for name, value in own.items() if name != "slope"}}
        for key, own in (basis or {}).items()
    }
    given = SETTINGS | (settings or {})
    if isinstance(given.get("objective"), dict):  # it has settings of its own
        del given["clip_range"]
    backbone = FlowBackbone(2) if flow else GaussianBackbone(2)
    module = RewardRLModule(backbone, None if basis else reward, adapters=adapters or None, **given)
    recorder = Recorder(module, signals or {})
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size() // num_nodes, num_nodes=num_nodes, max_epochs=epochs,
        strategy=DDP(timeout_s=120) if world_size() > 1 else "auto", default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
        logger=Curves(folder / "curves.jsonl") if rank() == 0 else DummyLogger(), log_every_n_steps=1,
        num_sanity_val_steps=0, limit_val_batches=1.0 if validate else 0,
        callbacks=[recorder, RunCheckpoint(str(folder / "checkpoints"), every_n_rollouts)],
    )  # fmt: skip
    data = PromptFileDataModule(
        str(prompts), batch_size=batch_size, rollouts_per_epoch=rollouts_per_epoch, eval_batch_size=1,
        limit_test_prompts=validate or None,
    )  # fmt: skip
    found = latest_intact(folder / "checkpoints") if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=str(found) if found else None)
    held = [learner.replay for learner in module.learners if learner.replay is not None]
    if rank() == 0:
        save_file(module.backbone.adapters.state_dict(module.adapter_name), folder / "adapter.safetensors")
    return {
        "trained": module.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "replay": [each.state_dict() for each in held] if basis else held[0].state_dict() if held else None,
        "counts": [module.rollouts_done, module.images_done, trainer.current_epoch, trainer.global_step],
        "kl_weight": module.kl_weight if basis is None else [learner.kl.weight for learner in module.learners],
        "steps": torch.stack(recorder.adapters),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if key[:5] != "time/"},
    }


def main(out: str, runs: str) -> None:
    """Every run of a JSON list; a run that fails on all ranks does not keep the next from its turn."""
    torch.set_num_threads(1)
    for options in json.loads(runs):
        try:
            ended = run(Path(out), **options)
        except (Exception, Preempted) as error:
            ended = {"error": f"{type(error).__name__}: {error}"}
        torch.save(ended, Path(out) / options["name"] / f"{options.get('label', '')}rank{rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
