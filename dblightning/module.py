"""RewardRLModule: fine-tune an adapter on a reward by a KL-regularised policy gradient (DPOK)."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dblightning.average import AdapterAverage
from dblightning.backbone import Backbone
from dblightning.basis import make_learners
from dblightning.distributed import Ranks
from dblightning.flat_settings import reads_flat_settings
from dblightning.learner import Learner, Part, next_parts, side_by_side
from dblightning.lightning_internals import collective_timeout, validate_now
from dblightning.loggers import keep_tables
from dblightning.manual_updates import parameters_of, set_options
from dblightning.objectives.advantages import explained_variance, value_target
from dblightning.objectives.base import Objective
from dblightning.objectives.kl import Watched
from dblightning.objectives.kl import adapted_kl_weight as adapted_kl_weight  # its former path
from dblightning.objectives.named import described, objective_of
from dblightning.objectives.policy import AdapterPolicy
from dblightning.progress import RolloutProgress
from dblightning.replay import Transitions
from dblightning.reward_gradients import RewardGradients, Round
from dblightning.rewards.base import RewardMetric
from dblightning.rollout import Trajectory
from dblightning.rollout_sampler import RolloutSampler, Take
from dblightning.run_folder import RunGuard
from dblightning.scoring import Logged
from dblightning.settings import check_reward_or_adapters, check_settings
from dblightning.solvers import solver_of
from dblightning.training_settings import (
    AdapterSettings,
    AdvantageSettings,
    BasisAdapter,
    KLSettings,
    OptimisationSettings,
    ReplaySettings,
    SamplingSettings,
    TrainingSettings,
    WindowSettings,
)
from dblightning.window import Window

#: the KL of no transition
NO_ROWS = torch.empty(0, dtype=torch.long)


class RewardRLModule(RewardGradients):
    """DPOK on a LoRA adapter of a frozen diffusion model: rollout → score → replay → value updates → policy updates.

    Each training batch holds the prompts of one rollout (per rank). Maximises eq. (4) of the paper,
    E[r − α Σ_t KL(p_θ(·|x_t) ‖ p_pre(·|x_t))], with α = ``kl.weight / optimisation.reward_weight`` when ``kl.form`` is
    "exact". Log-probs and the KL in the loss are both averaged over the latents' dimensions, so α keeps its meaning.

    The settings' flat names of version 0.1 (``rank``, ``kl_weight``, …) are keyword arguments too.

    A basis is trained in one run: with ``adapters``, each rollout makes the batch's images with every adapter, and each
    forward of an update has rows of all of them. Each learns what it would learn alone.

    Args:
        backbone: the frozen denoiser.
        reward: what to maximise; None with ``adapters``.
        eval_rewards: name → further rewards measured in validation, to see reward hacking.
        objective: of the policy's updates, by class path; "dpok" (hard clamp of the ratio), "ppo" (minimum of clipped
            and unclipped) and "reward_gradient" are short for ``dblightning.objectives.DPOK``, ``PPO`` and
            ``RewardGradient``.
        adapter: the LoRA in training.
        sampling: of rollouts and validation.
        optimisation: updates of the policy.
        kl: the KL term.
        advantage: its baseline, and the value function.
        replay: the buffer of trajectories.
        window: of stochastic steps.
        seed: of the run: adapter initialisation, every image's noise, replay order.
        validate_first: validate before the first rollout too, so that curves of ``val/…`` start at step 0.
        adapters: name → reward and own settings of several adapters to train together, instead of ``reward``.

    Raises:
        ValueError: settings out of range, each named.
    """

    @reads_flat_settings(rank_zero_info)
    def __init__(
        self,
        backbone: Backbone,
        reward: RewardMetric | None = None,
        eval_rewards: dict[str, RewardMetric] | None = None,
        objective: Objective | Literal["dpok", "ppo", "reward_gradient"] = "dpok",
        adapter: AdapterSettings = AdapterSettings(),
        sampling: SamplingSettings = SamplingSettings(),
        optimisation: OptimisationSettings = OptimisationSettings(),
        kl: KLSettings = KLSettings(),
        advantage: AdvantageSettings = AdvantageSettings(),
        replay: ReplaySettings = ReplaySettings(),
        window: WindowSettings = WindowSettings(),
        seed: int = 0,
        validate_first: bool = True,
        adapters: dict[str, BasisAdapter] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = TrainingSettings.of(adapter, sampling, optimisation, kl, advantage, replay, window)
        self.settings.check()
        check_settings({"seed": seed})
        check_reward_or_adapters({"reward": reward, "adapter": asdict(self.settings.adapter), "adapters": adapters})
        self.seed, self.validate_first = seed, validate_first
        self.backbone = backbone
        self.eval_rewards = nn.ModuleDict(eval_rewards or {})
        common = objective_of(objective)
        learners = make_learners(backbone, reward, adapters, self.settings, common, seed, self._vectors)
        self._learners.extend(learners)
        # a file to start from decides rank, lora_alpha and target_modules
        own, given = learners[0].settings.adapter, self.settings.adapter
        self.settings = replace(self.settings, adapter=replace(own, name=given.name, init=given.init))
        self._save_settings(common, adapters is not None)
        self._build()

    def _save_settings(self, objective: Objective, several: bool) -> None:
        run = {"seed": self.seed, "validate_first": self.validate_first}
        basis = {"adapters": {each.name: each.own_settings() for each in self.learners}} if several else {}
        groups = dict(self.settings.groups())
        self.save_hyperparameters({**run, "objective": described(objective), **groups, **basis})

    def _build(self) -> None:
        """Solver, sampler and policy by the settings; and the state of a run that is new."""
        sampling, backbone, names = self.settings.sampling, self.backbone, self.adapter_names
        steps = sampling.num_inference_steps
        self.solver = solver_of(backbone, steps, sampling.eta, sampling.noise)
        means = "mean" in self.objective.stores or self.settings.kl.to_go
        old = [each.old.name for each in self.learners if each.old.name]
        evaluation = None
        if sampling.eval_steps is not None:
            evaluation = solver_of(backbone, sampling.eval_steps, sampling.eta, sampling.noise)
        run = (backbone, self.solver, names, sampling, self.seed, rank_zero_info)
        needs, draws = self.objective.needs, self.objective.noise_draws
        self.sampler = RolloutSampler(*run, means, old or None, evaluation, needs == "samples" and draws > 0)
        self.policy = AdapterPolicy(backbone, self.solver, names, sampling, self._texts, old or None)
        skipped = max(self.settings.optimisation.skip_last_steps, steps - self.solver.trainable)
        self.window = Window(self.settings.window, steps, skipped, self.seed, needs, draws)
        self.average = AdapterAverage(backbone.adapters, names, self.settings.optimisation.ema)
        self.prompts: dict[int, str] = {}  # prompt_id → text, for the transitions in the replay buffers
        self.ranks = Ranks()
        self.share_rank_states = self.ranks.gather
        self.rollouts_done = 0
        self.images_done = 0  # by each adapter

    # ── the algorithm ────────────────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and the updates that follow it."""
        start = time.perf_counter()
        self._check_groups(batch["prompt_id"])
        with self.last_good_state():
            by_gradient = self.objective.needs == "gradients"
            updates, reward, sampled, scored = (self.gradient_round if by_gradient else self._policy_round)(batch)
        metrics = self._over_ranks({name: value for update in updates for name, value in update.items()})
        done = time.perf_counter()
        for learner in self.learners:
            metrics[learner.tag("train/kl_weight")] = learner.kl.weight
            learner.kl.adapt(metrics[learner.tag("train/kl")], self.rollouts_done)
        self.rollouts_done += 1
        for learner in self.learners:
            learner.old.follow(learner.objective.old_decay(self.rollouts_done))
        self.images_done += len(batch["prompt"]) * self.ranks.size
        self.set_learning_rate()
        self.stop_at_the_last_rollout()
        self._log_update(metrics, len(reward), (start, sampled, scored, done))

    def _policy_round(self, batch: dict[str, Any]) -> Round:
        """One rollout and the updates that follow it, by score function."""
        trajectory, images, scores, sampled = self._scored_rollout(batch)
        reward, scored = scores[:, 0], time.perf_counter()
        for learner in self.learners:
            own = learner.rows(len(batch["prompt"]))
            learner.latest_images = (images[own], list(batch["prompt"]), reward[own])
        self._store(trajectory, batch, scores)
        with self._no_ddp_sync(), self._profile("update"):
            updates = [*([self.update_value()] if self.uses_value else []), self.update_policy()]
        return Round(updates, reward, sampled, scored)

    def _scored_rollout(self, batch: dict[str, Any]) -> tuple[Trajectory, Tensor, Tensor, float]:
        """Trajectories, images, their scores (m · B, 1 + parts), and when sampling ended (``time.perf_counter``)."""
        with (
            self.ranks.together("a rollout or its reward"),
            self._until_all_know() as given_up,
            self._reward_worker() as worker,
        ):
            parts: list[Future] = []
            with self._profile("rollout"), self._no_ddp_sync(), torch.no_grad():
                trajectory, images = self.roll_out(
                    batch, None if worker is None else lambda *part: parts.append(worker.submit(*part))
                )
                if self.device.type == "cuda":
                    # decoding is still in progress there; of this stream alone, as a worker scores on its own
                    torch.cuda.current_stream(self.device).synchronize()
            sampled = time.perf_counter()
            with self._profile("reward"):
                waited = [part.result() for part in parts]
                scores = torch.cat(waited) if parts else self.score_rows(images, self.sampler.rows(batch))
                finite = torch.isfinite(trajectory.log_probs).all(0).to(scores.device)
                scores = scores.where(finite[:, None], torch.nan)
        self._stop_if_unavailable(given_up)
        return trajectory, images, scores, sampled

    def roll_out(self, batch: dict[str, Any], take: Take | None = None) -> tuple[Trajectory, Tensor]:
        """Sample the batch's B prompts with each of the m adapters as it is: trajectories and images (m · B, …)."""
        return self.sampler.rollout(batch, self.device, take, self.window.solver(self.solver, self.rollouts_done))

    def update_value(self) -> dict[str, Tensor]:
        """Fit the value functions to the rewards in the buffers: ``value_steps`` steps on the squared error."""
        settings, optimizer = self.settings.advantage, self._optimizers()[1]
        set_options(optimizer, lr=settings.value_learning_rate)
        batches = [(each, self._batches(each, settings.value_batch_size, "value")) for each in self.learners]
        logged = Logged()
        for _ in range(settings.value_steps):
            with self.ranks.together("the value update"):
                losses = [self._value_loss(each, part, logged) for each, part in next_parts(batches)]
                if losses:
                    self.manual_backward(sum(losses[1:], losses[0]))
                else:
                    self._backward_of_nothing(parameters_of(optimizer))
            self._step(optimizer, parameters_of(optimizer))
        return logged.summary()

    def _value_loss(self, learner: Learner, transitions: Transitions, logged: Logged) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            predicted = learner.value(transitions)
            target = value_target(transitions, self.settings.advantage.baseline)
            loss = nn.functional.mse_loss(predicted, target)
        logged.add(learner, {"train/value_loss": loss})
        logged.once(learner, {"train/explained_variance": explained_variance(predicted.detach(), target)})
        return loss

    def update_policy(self) -> dict[str, Tensor]:
        """Optimiser steps on the objective plus the KL penalty: ``policy_steps``, or ``epochs`` through the rollout."""
        settings, optimizer = self.settings.optimisation, self._optimizers()[0]
        set_options(optimizer, weight_decay=settings.weight_decay)
        self.set_learning_rate()
        logged = Logged()
        for policy_step, turn in enumerate(self._policy_turns()):
            index, parameters = -1, [each for learner, _ in turn for each in self.adapter_parameters(learner)]
            with self.ranks.together("the policy update"):
                for index, parts in enumerate(side_by_side(turn)):
                    self._accumulate(parts, policy_step, index, logged)
                if index < 0:
                    self._backward_of_nothing(parameters)
            norms = self._step(optimizer, parameters)
            if norms is not None:
                self.average.update([learner.name for learner, _ in turn])
                for learner, _ in turn:
                    logged.add(learner, {"train/grad_norm": norms[learner.place]})
        return logged.summary()

    def _accumulate(self, parts: list[Part], policy_step: int, index: int, logged: Logged) -> None:
        """Add the gradient of one micro-batch, a part of it from each adapter, and log it."""
        settings = self.settings.optimisation
        # autocast keeps casts of weights for the whole step: those made without gradients, or before an optimiser step,
        # must not be used again
        torch.clear_autocast_cache()
        visit = policy_step * settings.accumulation + index
        rows: list[Tensor | None] = []
        for learner, transitions in parts:
            # without a weight the KL is watched, not paid for
            measured = policy_step == index == 0 or learner.kl.weight_at(self.rollouts_done) > 0
            chosen = learner.kl.rows(len(transitions.reward), visit, self.rollouts_done, self.ranks.rank)
            rows.append(chosen if measured else NO_ROWS)
        losses, metrics = self._losses(parts, rows)
        # in a pass's last step, which may be smaller, a transition counts what it counts in the others
        whole = settings.accumulation * settings.batch_size
        counted = [loss / (whole / len(each.reward)) for loss, (_, each) in zip(losses, parts, strict=True)]
        self.manual_backward(sum(counted[1:], counted[0]))
        for (learner, _), own in zip(parts, metrics, strict=True):
            if policy_step > 0:  # the policy is no longer the one that sampled
                own.pop("train/on_policy_ratio_error", None)
            logged.add(learner, own)

    def policy_loss(
        self, transitions: Transitions, with_kl: bool = True, kl_rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some transitions of the (first) adapter, and what to log about them.

        ``reward_weight`` · the objective's loss + ``kl.weight`` · KL, averaged over the transitions.

        Args:
            transitions: (B, …).
            with_kl: False leaves the KL term out and does not run the base model.
            kl_rows: the transitions of which the KL is computed, int64 (n,) on the CPU: ``kl.share`` of them on average
                over the calls. None: all.
        """
        losses, metrics = self._losses([(self.learners[0], transitions)], [kl_rows if with_kl else NO_ROWS])
        return losses[0], metrics[0]

    def _losses(self, parts: list[Part], kl_rows: list[Tensor | None]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The adapters' losses, each the mean over its own transitions, and what to log about each.

        Whatever the denoiser computes is computed for all adapters' transitions in one pass.
        """
        policy, losses, metrics = self.policy, [], []
        watched = self._watch(parts, kl_rows)
        parts = [
            (learner, each._replace(advantage=learner.advantages(each, self.rollouts_done))) for learner, each in parts
        ]
        policy.expect([transitions for _, transitions in parts])
        for (learner, transitions), seen in zip(parts, watched, strict=True):
            loss, own = learner.objective.loss(policy, transitions)
            loss = self.settings.optimisation.reward_weight * loss
            if seen is not None:
                penalty, exact_kl = learner.kl.loss(policy, transitions, seen, self.rollouts_done)
                loss = loss + penalty
                # the sum over a path's trained steps (of its window), in nats: what eq. (4) multiplies by α
                own["train/kl"] = exact_kl * self.trained_steps
            own |= {"train/policy_loss": loss, "train/advantage_std": transitions.advantage.std(correction=0)}
            losses.append(loss)
            metrics.append(own)
        policy.forget()
        return losses, metrics

    def _watch(self, parts: list[Part], kl_rows: list[Tensor | None]) -> list[Watched | None]:
        """What the KL terms compare, before the forward with gradients: its activations wait for the backward pass."""
        wanted = [
            (learner, transitions if rows is None else transitions.at(rows), rows)
            for (learner, transitions), rows in zip(parts, kl_rows, strict=True)
        ]
        watching = [rows is None or len(rows) > 0 for rows in kl_rows]
        self.policy.expect([chosen for (_, chosen, _), watched in zip(wanted, watching, strict=True) if watched])
        return [
            learner.kl.watch(self.policy, chosen, rows) if watched else None
            for (learner, chosen, rows), watched in zip(wanted, watching, strict=True)
        ]

    # ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def uses_value(self) -> bool:
        """Whether the advantage has a value function."""
        return self.learners[0].uses_value

    def kl_rows(self, count: int, visit: int) -> Tensor | None:
        """Which of a micro-batch's ``count`` transitions the KL is computed of, int64 (n,); None: all."""
        return self.kl.rows(count, visit, self.rollouts_done, self.ranks.rank)

    def value(self, transitions: Transitions) -> Tensor:
        """The (first) value function's prediction, (B,)."""
        return self.learners[0].value(transitions)

    def advantages(self, transitions: Transitions) -> Tensor:
        """Advantage of each transition of the (first) adapter, (B,)."""
        return self.learners[0].advantages(transitions, self.rollouts_done)

    def _vectors(self, prompt_ids: Tensor) -> Tensor:
        return self.backbone.encode(self._texts(prompt_ids), self.settings.sampling.negative_prompt).pooled

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def configure_callbacks(self) -> list[L.Callback]:
        """What every training run has, where the trainer was given none of it."""
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        keep_tables(self.trainer)
        own = (RunGuard, RolloutProgress)
        return [kind() for kind in own if not any(isinstance(each, kind) for each in given)]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.set_learning_rate()
        if self.validate_first and self.rollouts_done == 0:
            validate_now(self.trainer)

    def setup(self, stage: str) -> None:
        self.ranks.timeout = collective_timeout(self.trainer.strategy)
        if stage == "fit":
            self._check_precision()
        self._check_evaluation_shares()
        self._broadcast_nothing_frozen()
