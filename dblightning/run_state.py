"""The state of a training run: what a checkpoint holds, which run it belongs to, and how a run resumes from it."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from dblightning.adapters import Form, fingerprint
from dblightning.average import AdapterAverage
from dblightning.backbone import Backbone
from dblightning.checkpointing import StopSignal, check_ours, read_shard, save_last_good_state
from dblightning.distributed import Ranks
from dblightning.flat_settings import GROUPED, flat
from dblightning.lightning_internals import attached_trainer
from dblightning.objectives.advantages import PromptStatistics
from dblightning.objectives.base import Objective
from dblightning.objectives.kl import KLTerm
from dblightning.objectives.old_policy import OldPolicy
from dblightning.objectives.value import ValueFunction
from dblightning.replay import ReplayBuffer
from dblightning.rewards.base import RewardMetric, RewardUnavailable
from dblightning.same_run import changed_settings, check_same_run
from dblightning.settings import check
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import TrainingSettings
from dblightning.window import Window

#: settings a resumed run may not change, by their names in a checkpoint's facts: they give the adapter its shape or the
#: stored log-probs their meaning
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


#: consecutive optimiser steps that a float16 loss scaler may skip: from 65,536 halved so often, the scale is 1.5e-5
MOST_SKIPPED = 32


class NonFiniteError(ArithmeticError):
    """Gradients, weights or an optimiser's state are NaN or infinite."""


class RunState(L.LightningModule):
    """The part of ``RewardRLModule`` that saves and restores: LoRA, value function, replay, statistics, random state.

    The base model is never saved. Lightning adds optimisers, loops and the prompt stream's position.
    """

    backbone: Backbone
    reward: RewardMetric
    settings: TrainingSettings
    objective: Objective
    kl: KLTerm
    adapter_name: str
    value_function: ValueFunction
    solver: GaussianSolver
    window: Window
    average: AdapterAverage
    old: OldPolicy
    statistics: PromptStatistics
    replay: ReplayBuffer | None
    prompts: dict[int, str]
    ranks: Ranks
    share_rank_states: Callable[[dict[str, Any]], list[dict[str, Any]]]
    rollouts_done: int
    images_done: int
    _max_rollouts: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._skipped = {"policy": 0, "value": 0}  # optimiser steps in a row
        self._stop = StopSignal()  # of a command that only evaluates; a fit's is in RunCheckpoint

    @property
    def kl_weight(self) -> float:
        """The weight of the KL, which moves where there is a target."""
        return self.kl.weight

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None:
        self.kl.weight = weight

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors: ``adapter.*``, ``value_function.*``, and ``ema.*`` of the adapter's average."""
        adapter = self.backbone.adapters.state_dict(self.adapter_name)
        value = self.value_function.state_dict()
        parts = {
            "adapter": adapter,
            "value_function": value,
            "ema": self.average.state_dict(),
            "old": self.old.state_dict(),
        }
        return {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: tensors of another adapter or value function.
        """
        parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "value_function": {}, "ema": {}, "old": {}}
        for key, tensor in state_dict.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = tensor
        self.backbone.adapters.load_state_dict(self.adapter_name, parts["adapter"])
        self.average.load_state_dict(parts["ema"])
        self.old.load_state_dict(parts["old"])
        return self.value_function.load_state_dict(parts["value_function"], strict=strict)

    def facts(self) -> dict[str, Any]:
        """The facts that must be the same for a checkpoint's adapter and replay buffer to keep their meaning."""
        denoiser = getattr(self.backbone.adapters, "denoiser", None)
        scheduler = {key: value for key, value in dict(self.backbone.scheduler_config).items() if key[0] != "_"}
        settings = flat(self.hparams)
        return {
            "reward": self.reward.name,
            "adapter_name": self.adapter_name,
            "base": fingerprint(denoiser) if denoiser is not None else None,
            "latent_shape": list(self.backbone.latent_shape),
            "scheduler": scheduler,
            "noise": getattr(self.solver, "noise", None),
            **{name: _plain(settings[name]) for name in FIXED},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with self.ranks.together("saving a checkpoint"):
            check_finite(checkpoint["state_dict"], "a checkpoint")
            check_finite(checkpoint.get("optimizer_states", []), "a checkpoint")
        # without a buffer_size the next rollout clears it: nothing of it would be read
        kept = self.settings.replay.buffer_size is not None
        own = {
            "replay": None if self.replay is None else self.replay.state_dict(kept),
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
            "objective": self.objective.state_dict(),
            "ranks": self.share_rank_states(own),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_ours(checkpoint)
        state = checkpoint["dblightning"]
        trainer = attached_trainer(self)
        fitting = trainer is None or trainer.state.fn == "fit"
        check_finite(checkpoint["state_dict"], "the checkpoint", "take an earlier one")
        check_same_run(state["facts"], self.facts(), adapter_only=not fitting)
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        changed = changed_settings(saved, self.hparams, exclude=[GROUPED[name] for name in FIXED])
        if fitting and changed:
            what = ", ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in changed.items())
            warnings.warn(f"resuming with other settings than the checkpoint's: {what}", stacklevel=2)
        self.prompts = dict(state["prompts"])
        self.statistics.load_state_dict(state["statistics"])
        self.rollouts_done, self.images_done = state["rollouts_done"], state["images_done"]
        if "kl.weight" not in changed:
            self.kl_weight = state["kl_weight"]
        self.objective.load_state_dict(state.get("objective", {}))
        self._resumed = state

    def on_fit_start(self) -> None:
        # Lightning would count optimiser steps, of which a rollout has several
        loop = self.trainer.fit_loop.epoch_loop
        self._max_rollouts, loop.max_steps = (None if loop.max_steps == -1 else loop.max_steps), -1
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
                steps, size = self.window.stored, self.settings.replay.buffer_size
                capacity = own["capacity"] if size is None else size // steps
                means = "mean" in self.objective.stores
                self.replay = ReplayBuffer(capacity, steps, self.backbone.latent_shape, self.device, means)
                self.replay.load_state_dict(own["replay"])
        del self._resumed

    def export_adapter(self, folder: str, format: Form = "diffusers", **facts: Any) -> str:
        """Write the adapter as LoRA safetensors, the run's facts as metadata; returns the file's path.

        Where the run keeps an average of the adapter (``optimisation.ema``), that is what is written.

        ``format`` is "diffusers", "kohya" (ComfyUI, A1111) or "peft".

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
        """
        check_finite(self.backbone.adapters.state_dict(self.adapter_name), f"the adapter in {folder}")
        hparams = {key: value for key, value in flat(self.hparams).items() if value is not None}
        made = {"reward": self.reward.name, "images": self.images_done, "hyperparameters": hparams}
        if getattr(self.backbone, "pretrained", None) == "miniature":
            made["base"] = "miniature"  # its folder's name says nothing
        pipeline: Any = self.backbone.pipeline
        with self.average.applied():
            return str(self.backbone.adapters.export(self.adapter_name, folder, pipeline, {**made, **facts}, format))

    # ── how long ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def total_rollouts(self) -> int | None:
        """Rollouts after which the run ends, earlier ones of a resumed run included; None where nothing says so.

        ``--trainer.max_epochs`` and ``max_steps`` set it; a step of ``max_steps`` and of ``fast_dev_run`` is a rollout.
        """
        epochs, batches = self.trainer.max_epochs, self.trainer.num_training_batches
        by_epochs = None if epochs is None or epochs < 0 else int(epochs * batches)
        return min((end for end in (by_epochs, self._max_rollouts) if end is not None), default=None)

    def stop_at_the_last_rollout(self) -> None:
        """Let Lightning end the fit where ``max_steps`` rollouts are done."""
        if self._max_rollouts is not None and self.rollouts_done >= self._max_rollouts:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        self.stop_at_the_last_rollout()

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._max_rollouts is not None:
            self.trainer.fit_loop.epoch_loop.max_steps = self._max_rollouts  # as the trainer was given

    # ── an update that fails ─────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def last_good_state(self) -> Iterator[None]:
        """A rollout and its update, saved as before it where it cannot be finished.

        One that ends in NaN or infinity, or whose reward is unavailable, stops the run. All ranks stop alike: gradients
        are averaged before they are checked, weights are the same, and a reward that is unavailable on one rank is
        raised on all.

        Raises:
            NonFiniteError: saying what was not finite, and where the state before it is.
            RewardUnavailable: saying where the state before is.
        """
        before = self._snapshot()
        try:
            yield
            check_finite(dict(self._trained()), "a run")
        except NonFiniteError as error:
            self._restore(before)
            saved = save_last_good_state(self.trainer, self, "before_non_finite_update.ckpt")
            raise NonFiniteError(
                f"rollout {self.rollouts_done + 1}: {error}; the state before that rollout is {saved}. Resume it with "
                "a smaller learning_rate or clip_grad_norm, or in a wider precision"
            ) from error
        except RewardUnavailable as error:
            self._restore(before)
            saved = save_last_good_state(self.trainer, self, "before_unavailable_reward.ckpt")
            raise RewardUnavailable(
                f"rollout {self.rollouts_done + 1}: {error} The state before that rollout is {saved}"
            ) from error

    def gradients_are_finite(self, norm: Tensor, parameters: list[Tensor], name: str) -> bool:
        """Whether an optimiser step may be taken; False where a float16 loss scaler skips it and lowers its scale.

        Args:
            norm: of the gradients, before clipping.
            parameters: with their clipped gradients.
            name: "policy" or "value".

        Raises:
            NonFiniteError: gradients are NaN or infinite without a scaler, or after ``MOST_SKIPPED`` skipped steps.
        """
        if torch.isfinite(norm):
            self._skipped[name] = 0
            return True
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # a norm may overflow though each gradient is finite; that the scaler does not see
        skips = any(not torch.isfinite(each.grad).all() for each in parameters if each.grad is not None)
        self._skipped[name] += 1
        if scaler is not None and skips and self._skipped[name] <= MOST_SKIPPED:
            return False
        again = f" in {self._skipped[name]} steps in a row, at a loss scale of {scaler.get_scale():g}" if scaler else ""
        raise NonFiniteError(f"the {name} gradient's norm is {norm.item()}{again}")

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that the optimisers change."""
        for index, parameter in enumerate(self.backbone.adapters.parameters(self.adapter_name)):
            yield f"adapter {self.adapter_name}, parameter {index}", parameter
        yield from self.value_function.named_parameters("value_function")

    def _snapshot(self) -> dict[str, Any]:
        """A copy of what a rollout and its update change, on the device; the replay buffer takes back its own."""
        return {
            "weights": [parameter.detach().clone() for _, parameter in self._trained()],
            "average": self.average.snapshot(),
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.trainer.optimizers],
            "statistics": copy.deepcopy(self.statistics),
            "replay": None if self.replay is None else self.replay.rollouts,
            "random": random_state(self.device),
            "kl_weight": self.kl_weight,
            "objective": copy.deepcopy(self.objective.state_dict()),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for (_, parameter), saved in zip(self._trained(), state["weights"], strict=True):
                parameter.copy_(saved)
        self.average.restore(state["average"])
        for optimizer, saved in zip(self.trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            optimizer.zero_grad()
        self.statistics, self.kl_weight = state["statistics"], state["kl_weight"]
        self.objective.load_state_dict(state["objective"])
        if state["replay"] is None:
            self.replay = None
        elif self.replay is not None and self.replay.rollouts > state["replay"]:
            self.replay.take_back()
        restore_random_state(state["random"], self.device)


def check_finite(state: Any, what: str, remedy: str = "") -> None:
    """Refuse NaN and infinity in tensors, through dicts and lists.

    Raises:
        NonFiniteError: naming the first such tensor.
    """
    named = list(_tensors(state))
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, tensor in named:
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    if not all(bool(torch.stack(finite).all()) for finite in by_device.values()):  # one read per device
        first = next(name for name, tensor in named if not torch.isfinite(tensor).all())
        raise NonFiniteError(f"{what} would hold NaN or infinity ({first})" + (f"; {remedy}" if remedy else ""))


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state.detach()
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of torch, NumPy and Python: this package draws from none, but a reward may."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # the generator a reward shares with us
    version, internal, gauss_next = random.getstate()
    return {
        "cpu": torch.get_rng_state(),
        **cuda,
        # as tensors and plain numbers: a checkpoint is read with weights_only=True
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(internal, dtype=torch.long), gauss_next],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Resume from a :func:`random_state`; one of an earlier version holds torch's alone."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "numpy" in state:
        keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    if "python" in state:
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal.tolist()), gauss_next))


def _plain(value: Any) -> Any:
    """Lists for any other sequence: what a checkpoint stores, and what a YAML file gives."""
    return list(value) if isinstance(value, list | tuple | set) else value
