"""The state of a training run: what a checkpoint holds, whose checkpoint it is, and how a run goes on from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dblightning.adapters import fingerprint
from dblightning.backbone import Backbone
from dblightning.checkpointing import read_shard
from dblightning.distributed import Ranks
from dblightning.policy_gradient import PromptStatistics
from dblightning.replay import ReplayBuffer
from dblightning.rewards.base import RewardMetric
from dblightning.settings import check
from dblightning.solvers import DDIMSolver
from dblightning.value import ValueFunction

#: settings a resumed run may not change: they give the adapter its shape or the stored log-probs their meaning
FIXED = (
    "rank",
    "lora_alpha",
    "target_modules",
    "num_inference_steps",
    "eta",
    "guidance_scale",
    "negative_prompt",
    "value_width",
)


class RunState(L.LightningModule):
    """The part of ``RewardRLModule`` that saves and restores: LoRA, value function, replay, statistics, random state.

    The base model is never saved. Lightning adds optimisers, loops and the prompt stream's position.
    """

    backbone: Backbone
    reward: RewardMetric
    adapter_name: str
    value_function: ValueFunction
    solver: DDIMSolver
    statistics: PromptStatistics
    replay: ReplayBuffer | None
    prompts: dict[int, str]
    ranks: Ranks
    share_rank_states: Callable[[dict[str, Any]], list[dict[str, Any]]]
    rollouts_done: int
    images_done: int
    kl_weight: float

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors: ``adapter.*`` and ``value_function.*``."""
        adapter = self.backbone.adapters.state_dict(self.adapter_name)
        value = self.value_function.state_dict()
        return {f"adapter.{key}": tensor for key, tensor in adapter.items()} | {
            f"value_function.{key}": tensor for key, tensor in value.items()
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: tensors of another adapter or value function.
        """
        parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "value_function": {}}
        for key, tensor in state_dict.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = tensor
        self.backbone.adapters.load_state_dict(self.adapter_name, parts["adapter"])
        return self.value_function.load_state_dict(parts["value_function"], strict=strict)

    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint's adapter and replay buffer to keep their meaning."""
        unet = getattr(self.backbone.adapters, "unet", None)
        scheduler = {key: value for key, value in dict(self.backbone.scheduler_config).items() if key[0] != "_"}
        return {
            "reward": self.reward.name,
            "adapter_name": self.adapter_name,
            "base": fingerprint(unet) if unet is not None else None,
            "latent_shape": list(self.backbone.latent_shape),
            "scheduler": scheduler,
            **{name: _plain(self.hparams[name]) for name in FIXED},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {
            # without a buffer_size the next rollout clears it: nothing of it would be read
            "replay": None if self.replay is None else self.replay.state_dict(self.hparams["buffer_size"] is not None),
            "capacity": self.replay.capacity if self.replay is not None else None,
            "random": random_state(self.device),
        }
        checkpoint["dblightning"] = {
            "facts": self.facts(),
            "prompts": dict(self.prompts),
            "statistics": self.statistics.state_dict(),
            "rollouts_done": self.rollouts_done,
            "images_done": self.images_done,
            "kl_weight": self.kl_weight,
            "ranks": self.share_rank_states(own),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["dblightning"]
        fitting = self._trainer is None or self._trainer.state.fn == "fit"
        check_same_run(state["facts"], self.facts(), adapter_only=not fitting)
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        changed = changed_settings(saved, dict(self.hparams), besides=FIXED)
        if fitting and changed:
            what = ", ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in changed.items())
            warnings.warn(f"resuming with other settings than the checkpoint's: {what}", stacklevel=2)
        self.prompts = dict(state["prompts"])
        self.statistics.load_state_dict(state["statistics"])
        self.rollouts_done, self.images_done = state["rollouts_done"], state["images_done"]
        if "kl_weight" not in changed:
            self.kl_weight = state["kl_weight"]
        self._resumed = state

    def on_fit_start(self) -> None:
        state = getattr(self, "_resumed", None)
        rollouts = self.ranks.gather(self.rollouts_done)
        check(len(set(rollouts)) == 1, f"the ranks resumed from different checkpoints, after {rollouts} rollouts")
        if state is None:
            return
        check(
            len(state["ranks"]) == self.trainer.world_size,
            f"the checkpoint was saved by {len(state['ranks'])} processes and this run has {self.trainer.world_size}: "
            "a replay buffer belongs to its process, so resume with as many",
        )
        with self.ranks.together("loading a checkpoint's shard"):
            own = read_shard(state.get("folder", "."), state["ranks"][self.ranks.rank])
            restore_random_state(own["random"], self.device)
            if own["replay"] is not None:
                steps, size = len(self.solver.timesteps), self.hparams["buffer_size"]
                capacity = own["capacity"] if size is None else size // steps
                self.replay = ReplayBuffer(capacity, steps, self.backbone.latent_shape, self.device)
                self.replay.load_state_dict(own["replay"])
        del self._resumed

    def export_adapter(self, folder: str, **facts: Any) -> str:
        """Write the adapter as diffusers LoRA safetensors, the run's facts as metadata; returns the file's path."""
        hparams = {key: value for key, value in self.hparams.items() if value is not None}
        made = {"reward": self.reward.name, "images": self.images_done, "hyperparameters": hparams}
        if getattr(self.backbone, "pretrained", None) == "miniature":
            made["base"] = "miniature"  # its folder's name says nothing
        pipeline: Any = self.backbone.pipeline
        return str(self.backbone.adapters.export(self.adapter_name, folder, pipeline, {**made, **facts}))


def check_same_run(saved: dict[str, Any], own: dict[str, Any], adapter_only: bool = False) -> None:
    """Refuse a checkpoint whose adapter or replay buffer would mean something else in this run.

    Args:
        saved, own: the checkpoint's facts and this run's, by name; "base" is a fingerprint of the base model.
        adapter_only: the checkpoint is to be scored, not trained on: how its rollouts were sampled does not matter.

    Raises:
        ValueError: naming what differs.
    """
    if saved["reward"] != own["reward"]:
        raise ValueError(
            f"the checkpoint was trained on reward {saved['reward']!r}, this run has {own['reward']!r}; "
            "resume with the same reward, or start a new run from its exported adapter (init_adapter)"
        )
    names = [name for name in own if name != "base" and not (adapter_only and name in SAMPLING)]
    different = [name for name in names if not _same(saved.get(name), own[name])]
    # 1e-3: half-precision copies of a base model differ by 1e-5 in their fingerprints, another model by far more
    if not _same(saved["base"], own["base"], tolerance=1e-3):
        different.append("base")
    if different:
        what = "; ".join(f"{name} was {saved.get(name)!r} and is {own[name]!r}" for name in different if name != "base")
        base = "the base model is another one" if "base" in different else ""
        raise ValueError(
            f"the checkpoint is of another run: {'; '.join(filter(None, (base, what)))}. Resume with its settings, or "
            "start a new run from its exported adapter (init_adapter)"
        )


#: facts that say how rollouts are sampled; the others describe the adapter and its base
SAMPLING = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt", "scheduler")


def changed_settings(saved: dict[str, Any], own: dict[str, Any], besides: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Hyperparameters with another value than in the checkpoint: name → (then, now)."""
    names = [name for name in own if name in saved and name not in besides and not name.startswith("_")]
    return {name: (saved[name], own[name]) for name in names if not _same(saved[name], own[name])}


def _same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Equal, a tuple and a list of the same values too; floats to a relative ``tolerance``."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * abs(other)
    return bool(one == other)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's global generators, which this package does not draw from but a reward may."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Go on from a :func:`random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _plain(value: Any) -> Any:
    """Lists for any other sequence: what a checkpoint stores, and what a YAML file gives."""
    return list(value) if isinstance(value, list | tuple | set) else value
