"""The state of a training run: what a checkpoint holds, which run it belongs to, and how a run resumes from it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import Form, fingerprint
from dblightning.average import AdapterAverage
from dblightning.backbone import Backbone
from dblightning.checkpointing import StopSignal, check_ours, read_shard, save_last_good_state
from dblightning.distributed import Ranks
from dblightning.flat_settings import GROUPED, flat
from dblightning.learner import by_adapter, of_adapter
from dblightning.learners import Learners
from dblightning.lightning_internals import attached_trainer
from dblightning.miniature import EMBEDDED
from dblightning.objectives.named import described
from dblightning.random_state import random_state, restore_random_state
from dblightning.rewards.base import RewardUnavailable
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


#: what a checkpoint keeps per adapter
PER_ADAPTER = ("statistics", "kl_weight", "objective")
#: consecutive optimiser steps that a float16 loss scaler may skip: from 65,536 halved so often, the scale is 1.5e-5
MOST_SKIPPED = 32


class NonFiniteError(ArithmeticError):
    """Gradients, weights or an optimiser's state are NaN or infinite."""


class RunState(Learners):
    """The part of ``RewardRLModule`` that saves and restores: LoRA, value function, replay, statistics, random state.

    The base model is never saved. Lightning adds optimisers, loops and the prompt stream's position.
    """

    backbone: Backbone
    settings: TrainingSettings
    solver: GaussianSolver
    window: Window
    average: AdapterAverage
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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors: ``adapter.*``, ``value_function.*``, ``old.*`` of the old policy, ``ema.*`` of averages.

        Those of several adapters are ``adapter.<name>.*``, ``value_function.<name>.*`` and ``old.<name>.*``.
        """
        found = {f"ema.{key}": tensor for key, tensor in self.average.state_dict().items()}
        for learner in self.learners:
            name = "" if len(self.learners) == 1 else f"{learner.name}."
            parts = {
                "adapter": self.backbone.adapters.state_dict(learner.name),
                "value_function": learner.value_function.state_dict(),
                "old": learner.old.state_dict(),
            }
            found |= {f"{part}.{name}{key}": each for part, tensors in parts.items() for key, each in tensors.items()}
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: tensors of another adapter or value function.
        """
        answer: Any = None
        for learner in self.learners:
            name = "" if len(self.learners) == 1 else f"{learner.name}."
            self.backbone.adapters.load_state_dict(learner.name, _below(state_dict, f"adapter.{name}"))
            answer = learner.value_function.load_state_dict(_below(state_dict, f"value_function.{name}"), strict=strict)
            learner.old.load_state_dict(_below(state_dict, f"old.{name}"))
        self.average.load_state_dict(_below(state_dict, "ema."))
        return answer

    def facts(self) -> dict[str, Any]:
        """The facts that must be the same for a checkpoint's adapter and replay buffer to keep their meaning."""
        denoiser = getattr(self.backbone.adapters, "denoiser", None)
        scheduler = {key: value for key, value in dict(self.backbone.scheduler_config).items() if key[0] != "_"}
        settings = flat(self.hparams)
        return {
            "reward": by_adapter(self.learners, lambda learner: learner.reward.name),
            "adapter_name": self.adapter_name if len(self.learners) == 1 else self.adapter_names,
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
            "replay": by_adapter(
                self.learners, lambda each: None if each.replay is None else each.replay.state_dict(kept)
            ),
            "capacity": by_adapter(self.learners, lambda each: None if each.replay is None else each.replay.capacity),
            "random": random_state(self.device),
        }
        checkpoint["dblightning"] = {
            "facts": self.facts(),
            "prompts": dict(self.prompts),
            "statistics": by_adapter(self.learners, lambda learner: learner.statistics.state_dict()),
            "rollouts_done": self.rollouts_done,
            "images_done": self.images_done,
            "kl_weight": by_adapter(self.learners, lambda learner: learner.kl.weight),
            "objective": by_adapter(self.learners, lambda learner: learner.objective.state_dict()),
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
        self.rollouts_done, self.images_done = state["rollouts_done"], state["images_done"]
        for learner in self.learners:
            saved = {name: of_adapter(self.learners, learner, state.get(name, {})) for name in PER_ADAPTER}
            learner.statistics.load_state_dict(saved["statistics"])
            if (f"adapters.{learner.name}.kl_weight" if learner.suffix else "kl.weight") not in changed:
                learner.kl.weight = saved["kl_weight"]
            learner.objective.load_state_dict(saved["objective"])
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
            steps, size = self.window.stored, self.settings.replay.buffer_size
            for learner in self.learners:
                replay, held = (of_adapter(self.learners, learner, own[name]) for name in ("replay", "capacity"))
                if replay is not None:
                    capacity = held if size is None else size // steps
                    buffer = learner.allocate(capacity, steps, self.backbone.latent_shape, self.device)
                    buffer.load_state_dict(replay)
        del self._resumed

    def export_adapter(self, folder: str, format: Form = "diffusers", adapter: str | None = None, **facts: Any) -> str:
        """Write an adapter as LoRA safetensors, the run's facts as metadata; returns the file's path.

        Where the run keeps an average of the adapter (``optimisation.ema``), that is what is written.

        ``format`` is "diffusers", "kohya" (ComfyUI, A1111) or "peft"; ``adapter`` is one of the run's, None its first.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
            ValueError: no such adapter in training.
        """
        learner = self.learner(adapter)
        check_finite(self.backbone.adapters.state_dict(learner.name), f"the adapter in {folder}")
        settings = {name: value for name, value in self.hparams.items() if name != "adapters"}
        own = flat({**settings, "objective": described(learner.objective), **dict(learner.settings.groups())})
        hparams = {key: value for key, value in own.items() if value is not None}
        made = {"reward": learner.reward.name, "images": self.images_done, "hyperparameters": hparams}
        if getattr(self.backbone, "pretrained", None) in EMBEDDED:
            made["base"] = self.backbone.pretrained  # its folder's name says nothing
        pipeline: Any = self.backbone.pipeline
        with self.average.applied():
            return str(self.backbone.adapters.export(learner.name, folder, pipeline, {**made, **facts}, format))

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

    def gradients_are_finite(self, norm: Tensor, parameters: list[Tensor], name: str, whose: str = "") -> bool:
        """Whether an optimiser step may be taken; False where a float16 loss scaler skips it and lowers its scale.

        Args:
            norm: of the gradients, before clipping.
            parameters: with their clipped gradients.
            name: "policy" or "value".
            whose: of which adapter the norm is, for the message.

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
        raise NonFiniteError(f"the {name} gradient's norm{whose} is {norm.item()}{again}")

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that the optimisers change."""
        for learner in self.learners:
            for index, parameter in enumerate(self.backbone.adapters.parameters(learner.name)):
                yield f"adapter {learner.name}, parameter {index}", parameter
        for learner in self.learners:
            yield from learner.value_function.named_parameters(f"value_function{learner.suffix}")

    def _snapshot(self) -> dict[str, Any]:
        """A copy of what a rollout and its update change, on the device; the replay buffer takes back its own."""
        return {
            "weights": [parameter.detach().clone() for _, parameter in self._trained()],
            "average": self.average.snapshot(),
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.trainer.optimizers],
            "random": random_state(self.device),
            "learners": [learner.snapshot() for learner in self.learners],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for (_, parameter), saved in zip(self._trained(), state["weights"], strict=True):
                parameter.copy_(saved)
        self.average.restore(state["average"])
        for optimizer, saved in zip(self.trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            optimizer.zero_grad()
        for learner, own in zip(self.learners, state["learners"], strict=True):
            learner.restore(own)
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


def _below(tensors: Any, prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}


def _plain(value: Any) -> Any:
    """Lists for any other sequence: what a checkpoint stores, and what a YAML file gives."""
    return list(value) if isinstance(value, list | tuple | set) else value
