"""RewardRLModule: fine-tune an adapter on a reward by a KL-regularised policy gradient (DPOK)."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dblightning.average import AdapterAverage
from dblightning.backbone import Backbone
from dblightning.distributed import Ranks
from dblightning.flat_settings import reads_flat_settings
from dblightning.lightning_internals import collective_timeout, validate_now
from dblightning.loggers import keep_tables
from dblightning.manual_updates import set_options
from dblightning.objectives.advantages import PromptStatistics, advantages, explained_variance, value_target
from dblightning.objectives.base import Objective
from dblightning.objectives.kl import KLTerm
from dblightning.objectives.kl import adapted_kl_weight as adapted_kl_weight  # its former path
from dblightning.objectives.named import described, objective_of
from dblightning.objectives.old_policy import OldPolicy
from dblightning.objectives.policy import AdapterPolicy
from dblightning.objectives.value import ValueFunction
from dblightning.progress import RolloutProgress
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.reward_gradients import RewardGradients, Round
from dblightning.rewards.base import RewardMetric
from dblightning.rollout import Trajectory
from dblightning.rollout_sampler import RolloutSampler, Take
from dblightning.run_folder import RunGuard
from dblightning.scoring import WORST
from dblightning.settings import check_settings
from dblightning.solvers import solver_of
from dblightning.training_settings import (
    AdapterSettings,
    AdvantageSettings,
    KLSettings,
    OptimisationSettings,
    ReplaySettings,
    SamplingSettings,
    TrainingSettings,
    WindowSettings,
)
from dblightning.window import Window


class RewardRLModule(RewardGradients):
    """DPOK on a LoRA adapter of a frozen diffusion model: rollout → score → replay → value updates → policy updates.

    Each training batch holds the prompts of one rollout (per rank). Maximises eq. (4) of the paper,
    E[r − α Σ_t KL(p_θ(·|x_t) ‖ p_pre(·|x_t))], with α = ``kl.weight / optimisation.reward_weight`` when ``kl.form`` is
    "exact". Log-probs and the KL in the loss are both averaged over the latents' dimensions, so α keeps its meaning.

    The settings' flat names of version 0.1 (``rank``, ``kl_weight``, …) are keyword arguments too.

    Args:
        backbone: the frozen denoiser.
        reward: what to maximise.
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

    Raises:
        ValueError: settings out of range, each named.
    """

    @reads_flat_settings(rank_zero_info)
    def __init__(
        self,
        backbone: Backbone,
        reward: RewardMetric,
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
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = TrainingSettings.of(adapter, sampling, optimisation, kl, advantage, replay, window)
        self.settings.check()
        check_settings({"seed": seed})
        self.seed, self.validate_first = seed, validate_first
        self.objective = objective_of(objective)
        self.objective.check(self.settings)
        self.objective.check_reward(reward)
        self.backbone = backbone
        self.reward = reward
        self.eval_rewards = nn.ModuleDict(eval_rewards or {})
        self.adapter_name: str = self.settings.adapter.name or reward.name
        self._add_adapter()
        self._save_settings()
        self._build()

    def _add_adapter(self) -> None:
        bank, adapter = self.backbone.adapters, self.settings.adapter
        if adapter.init is None:
            adapter = adapter.with_targets(bank.target_modules)  # as checkpoints compare them
            bank.add(self.adapter_name, adapter.rank, adapter.lora_alpha, adapter.target_modules, self.seed)
        else:
            bank.load(self.adapter_name, adapter.init, getattr(self.backbone, "pipeline", None))
            adapter = replace(adapter, **bank.settings(self.adapter_name))  # of the file
        self.settings = replace(self.settings, adapter=adapter)
        bank.train_only(self.adapter_name)

    def _save_settings(self) -> None:
        run = {"seed": self.seed, "validate_first": self.validate_first}
        self.save_hyperparameters({**run, "objective": described(self.objective), **dict(self.settings.groups())})

    def _build(self) -> None:
        """Solver, sampler, policy and value function by the settings; and the state of a run that is new."""
        sampling, backbone = self.settings.sampling, self.backbone
        steps = sampling.num_inference_steps
        self.solver = solver_of(backbone, steps, sampling.eta, sampling.noise)
        means, own = "mean" in self.objective.stores, self.settings.adapter
        lora = {"rank": own.rank, "lora_alpha": own.lora_alpha, "target_modules": own.target_modules}
        self.old = OldPolicy(backbone.adapters, self.adapter_name, lora, self.objective.keeps_old)
        evaluation = solver_of(backbone, sampling.eval_steps or steps, sampling.eta, sampling.noise)
        run = (backbone, self.solver, self.adapter_name, sampling, self.seed, rank_zero_info)
        self.sampler = RolloutSampler(*run, means, self.old.name, evaluation)
        self.policy = AdapterPolicy(backbone, self.solver, self.adapter_name, sampling, self._texts, self.old.name)
        skipped = max(self.settings.optimisation.skip_last_steps, steps - self.solver.trainable)
        self.window = Window(self.settings.window, steps, skipped, self.seed, self.objective.needs)
        self.kl = KLTerm(self.settings.kl, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.value_function = ValueFunction(
                backbone.latent_shape, backbone.pooled_dim, steps, self.settings.advantage.value_width
            )
        self.average = AdapterAverage(backbone.adapters, [self.adapter_name], self.settings.optimisation.ema)
        self.statistics = PromptStatistics.of(self.settings.advantage)
        self.replay: ReplayBuffer | None = None
        self.prompts: dict[int, str] = {}  # prompt_id → text, for the transitions in the replay buffer
        self.ranks = Ranks()
        self.share_rank_states = self.ranks.gather
        self._share = 1.0  # of this rank's gradient: its stored steps by the ranks' mean
        self.rollouts_done = self.images_done = 0
        self.latest_images: tuple[Tensor, list[str], Tensor] | None = None  # of the last rollout, for callbacks

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
        metrics["train/kl_weight"] = self.kl_weight
        self.kl.adapt(metrics["train/kl"], self.rollouts_done)
        self.rollouts_done += 1
        self.old.follow(self.objective.old_decay(self.rollouts_done))
        self.images_done += len(reward) * self.ranks.size
        self.set_learning_rate()
        self.stop_at_the_last_rollout()
        self._log_update(metrics, len(reward), (start, sampled, scored, done))

    def _policy_round(self, batch: dict[str, Any]) -> Round:
        """One rollout and the updates that follow it, by score function."""
        trajectory, images, reward, sampled = self._scored_rollout(batch)
        scored = time.perf_counter()
        self.latest_images = (images, list(batch["prompt"]), reward)
        self._store(trajectory, batch, reward)
        with self._no_ddp_sync(), self._profile("update"):
            updates = [*([self.update_value()] if self.uses_value else []), self.update_policy()]
        return Round(updates, reward, sampled, scored)

    def _scored_rollout(self, batch: dict[str, Any]) -> tuple[Trajectory, Tensor, Tensor, float]:
        """Trajectory, images, rewards (B,), and when sampling ended (``time.perf_counter``)."""
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
                reward = torch.cat(waited) if parts else self.reward.score(images, batch["prompt"]).detach()
                reward = reward.where(torch.isfinite(trajectory.log_probs).all(0).to(reward.device), torch.nan)
        self._stop_if_unavailable(given_up)
        return trajectory, images, reward, sampled

    def roll_out(self, batch: dict[str, Any], take: Take | None = None) -> tuple[Trajectory, Tensor]:
        """Sample the batch's images with the adapter as it is: trajectory and images (B, 3, H, W)."""
        return self.sampler.rollout(batch, self.device, take, self.window.solver(self.solver, self.rollouts_done))

    def _store(self, trajectory: Trajectory, batch: dict[str, Any], reward: Tensor) -> None:
        """Put the samples with a finite reward into the buffer; statistics and logs are of all ranks' samples."""
        own = (batch["prompt_id"].cpu(), list(batch["prompt"]), reward.cpu())
        everyones = self.ranks.gather(own)
        prompt_ids = torch.cat([ids for ids, _, _ in everyones])
        rewards = torch.cat([values for _, _, values in everyones])
        self._stop_if_none(int(torch.isfinite(rewards).sum()))
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        kept = torch.isfinite(rewards)
        self.statistics.update(prompt_ids[kept], rewards[kept])
        kept &= self.objective.kept(prompt_ids, rewards)
        if self.settings.advantage.drop_flat_groups:
            kept &= self.statistics.varied(prompt_ids)
        finite = kept.split([len(ids) for ids, _, _ in everyones])[self.ranks.rank].to(reward.device)
        rows = finite.cpu().nonzero().flatten()
        baseline, scale = self.statistics(own[0][rows]) if len(rows) else (reward[:0], reward[:0])
        buffer = self._buffer(len(reward))
        if self.settings.replay.buffer_size is None:
            buffer.clear()
        scores = reward[finite]
        buffer.add(trajectory.of(finite), own[0][rows], scores, baseline.to(scores), scale.to(scores), rows)
        held = self.ranks.gather((buffer.size, buffer.prompt_ids[: buffer.size].unique().tolist()))
        self._share = buffer.size * len(held) / sum(size for size, _ in held)
        self._most_held = max(size for size, _ in held)
        needed = {*prompt_ids.tolist(), *(prompt_id for _, stored in held for prompt_id in stored)}
        self.prompts = {prompt_id: self.prompts[prompt_id] for prompt_id in self.prompts if prompt_id in needed}
        self._log_rewards(prompt_ids, rewards)

    def update_value(self) -> dict[str, Tensor]:
        """Fit the value function to the rewards in the buffer: ``value_steps`` optimiser steps on the squared error."""
        settings, optimizer = self.settings.advantage, self._optimizers()[1]
        set_options(optimizer, lr=settings.value_learning_rate)
        batches = self._batches(settings.value_batch_size, "value")
        losses, explained = [], []
        for _ in range(settings.value_steps):
            with self.ranks.together("the value update"):
                for transitions in islice(batches, 1):
                    with torch.autocast(self.device.type, enabled=False):
                        predicted = self.value(transitions)
                        target = value_target(transitions, settings.baseline)
                        loss = nn.functional.mse_loss(predicted, target)
                    self.manual_backward(loss)
                    losses.append(loss.detach())
                    explained.append(explained_variance(predicted.detach(), target))
                if not losses:
                    self._backward_of_nothing(self.value_function.parameters())
            self._step(optimizer, self.value_function.parameters(), self._share)
        if not losses:
            return {}
        return {"train/value_loss": torch.stack(losses).mean(), "train/explained_variance": explained[0]}

    def update_policy(self) -> dict[str, Tensor]:
        """Optimiser steps on the objective plus the KL penalty: ``policy_steps``, or ``epochs`` through the rollout."""
        settings, optimizer = self.settings.optimisation, self._optimizers()[0]
        set_options(optimizer, lr=self.learning_rate, weight_decay=settings.weight_decay)
        logged: dict[str, list[Tensor]] = {}
        for policy_step, batches in enumerate(self._policy_batches()):
            with self.ranks.together("the policy update"):
                index = -1
                for index, transitions in enumerate(batches):
                    for name, value in self._accumulate(transitions, policy_step, index).items():
                        logged.setdefault(name, []).append(value.detach())
                if index < 0:
                    self._backward_of_nothing(self.policy_parameters)
            norm = self._step(optimizer, self.policy_parameters, 1.0 if settings.epochs else self._share)
            if norm is not None:
                self.average.update()
                logged.setdefault("train/grad_norm", []).append(norm)
        worst = {name: torch.stack(logged.pop(name)).max() for name in WORST if name in logged}
        return {name: torch.stack(values).mean() for name, values in logged.items()} | worst

    def _accumulate(self, transitions: Transitions, policy_step: int, index: int) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch; what to log about it."""
        accumulated = self.settings.optimisation.accumulation
        # autocast keeps casts of weights for the whole step: those made without gradients, or before an optimiser step,
        # must not be used again
        torch.clear_autocast_cache()
        # without a weight the KL is watched, not paid for
        measured = policy_step == index == 0 or self.kl.weight_at(self.rollouts_done) > 0
        rows = self.kl_rows(len(transitions.reward), policy_step * accumulated + index)
        loss, metrics = self.policy_loss(transitions, measured, rows)
        # in a pass's last step, which may be smaller, a transition counts what it counts in the others
        whole = accumulated * self.settings.optimisation.batch_size
        self.manual_backward(loss / (whole / len(transitions.reward)))
        if policy_step > 0:  # the policy is no longer the one that sampled
            metrics.pop("train/on_policy_ratio_error", None)
        return metrics

    def policy_loss(
        self, transitions: Transitions, with_kl: bool = True, kl_rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some transitions, and what to log about them.

        ``reward_weight`` · the objective's loss + ``kl.weight`` · KL, averaged over the transitions.

        Args:
            transitions: (B, …).
            with_kl: False leaves the KL term out and does not run the base model.
            kl_rows: the transitions of which the KL is computed, int64 (n,) on the CPU: ``kl.share`` of them on average
                over the calls. None: all.
        """
        policy = self.policy
        with_kl = with_kl and (kl_rows is None or len(kl_rows) > 0)
        watched = self.kl.watch(policy, transitions, kl_rows) if with_kl else None
        transitions = transitions._replace(advantage=self.advantages(transitions))
        loss, metrics = self.objective.loss(policy, transitions)
        loss = self.settings.optimisation.reward_weight * loss
        if watched is not None:
            penalty, exact_kl = self.kl.loss(policy, transitions, watched, self.rollouts_done)
            loss = loss + penalty
            # the sum over a path's trained steps, in nats: what eq. (4) multiplies by α; with a window, over its steps
            metrics["train/kl"] = exact_kl * self.trained_steps
        policy.forget()
        own = {"train/policy_loss": loss, "train/advantage_std": transitions.advantage.std(correction=0)}
        return loss, metrics | own

    # ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def uses_value(self) -> bool:
        """Whether the advantage has a value function."""
        return self.settings.advantage.baseline in ("value", "both")

    def kl_rows(self, count: int, visit: int) -> Tensor | None:
        """Which of a micro-batch's ``count`` transitions the KL is computed of, int64 (n,); None: all."""
        return self.kl.rows(count, visit, self.rollouts_done, self.ranks.rank)

    def value(self, transitions: Transitions) -> Tensor:
        """The value function's prediction, (B,)."""
        negative_prompt = self.settings.sampling.negative_prompt
        text = self.backbone.encode(self._texts(transitions.prompt_id), negative_prompt).pooled
        step_index = transitions.step_index.to(self.device, non_blocking=True)
        return self.value_function(transitions.latents, text.float(), step_index)

    @torch.no_grad()
    def advantages(self, transitions: Transitions) -> Tensor:
        """Advantage of each transition, (B,)."""
        settings = self.settings.advantage
        with torch.autocast(self.device.type, enabled=False):
            value = self.value(transitions) if self.uses_value else None
        return advantages(transitions, settings.baseline, value, settings.normalize, settings.clip)

    def _texts(self, prompt_ids: Tensor) -> list[str]:
        return ["" if prompt_id < 0 else self.prompts[prompt_id] for prompt_id in prompt_ids.tolist()]

    def _buffer(self, batch_size: int) -> ReplayBuffer:
        """The replay buffer, allocated at the first rollout."""
        steps, size = self.window.stored, self.settings.replay.buffer_size
        capacity = batch_size if size is None else size // steps
        if capacity < batch_size:
            raise ValueError(
                f"a rollout has {batch_size} trajectories of {steps} steps, more than buffer_size {size} holds; "
                f"set buffer_size to at least {batch_size * steps}, or null to keep the latest rollout only"
            )
        if self.replay is None or (size is None and self.replay.capacity != capacity):
            means = "mean" in self.objective.stores
            self.replay = ReplayBuffer(capacity, steps, self.backbone.latent_shape, self.device, means)
        return self.replay

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
