"""A round of training by the reward's gradient: rollout → reward and its gradient → updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblightning.learner import Learner
from dblightning.manual_updates import ManualUpdates, set_options
from dblightning.objectives.pathwise import Ends, Paths, Terms
from dblightning.objectives.policy import AdapterPolicy
from dblightning.objectives.reward_gradient import RewardGradient
from dblightning.rollout import Trajectory
from dblightning.scoring import Logged
from dblightning.steering import reward_gradients
from dblightning.storing import Storing


class Round(NamedTuple):
    """What a rollout and its updates give: what to log, and when it was sampled and scored (``perf_counter``)."""

    updates: list[dict[str, Tensor]]
    reward: Tensor  # (m · B,), NaN where there is none
    sampled: float
    scored: float


class Scored(NamedTuple):
    """A micro-batch of all adapters with its rewards' gradients."""

    paths: Paths
    ends: Ends
    gradient: Tensor  # (N, C, h, w), ∂r/∂latents at the ends


class RewardGradients(Storing, ManualUpdates):
    """The part of ``RewardRLModule`` that trains with objectives that need "gradients".

    Nothing is stored: a rollout's images make one update, which averages −``reward_weight`` · r + ``kl.weight`` · Σ KL
    over those of each adapter, ``optimisation.batch_size`` of each at a time, so α = ``kl.weight /
    optimisation.reward_weight`` as everywhere.
    """

    policy: AdapterPolicy

    def gradient_round(self, batch: dict[str, Any]) -> Round:
        """One rollout and the updates that follow it."""
        prompts = list(batch["prompt"])
        self.prompts = dict(zip(batch["prompt_id"].tolist(), prompts, strict=True))
        with (
            self.ranks.together("a rollout or its reward"),
            self._until_all_know() as given_up,
            self._no_ddp_sync(),
        ):
            with self._profile("rollout"), torch.no_grad():
                trajectory, images = self.sampler.rollout(batch, self.device)
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
            sampled = time.perf_counter()
            with self._profile("reward"):
                reward, scored = self._reward_gradients(batch, trajectory, images)
        self._stop_if_unavailable(given_up)
        ended = time.perf_counter()
        for learner in self.learners:
            own = learner.rows(len(prompts))
            learner.latest_images = images[own], prompts, reward[own]
        self._take_note(batch, reward)
        with self._no_ddp_sync(), self._profile("update"):
            logged = Logged()
            self._follow(scored, self._counts(reward, len(prompts)), logged)
            for visit in range(1, self.settings.optimisation.policy_steps):
                with self.ranks.together("a reward's gradient"):
                    again, scored = self._reward_gradients(batch, trajectory, images, visit, reward)
                self._follow(scored, self._counts(again, len(prompts)), logged)
        return Round([logged.summary()], reward, sampled, ended)

    def _reward_gradients(
        self,
        batch: dict[str, Any],
        trajectory: Trajectory,
        images: Tensor,
        visit: int = 0,
        known: Tensor | None = None,
    ) -> tuple[Tensor, list[Scored]]:
        """Rewards (m · B,), and micro-batches of the samples that have a finite one.

        Args:
            batch, trajectory, images: of the rollout.
            visit: updates made of it before.
            known: rewards of the images, where they are known.
        """
        count, several = len(batch["prompt"]), len(self.learners)
        reward = torch.full((len(images),), torch.nan, device=images.device)
        ids, seeds = (batch[name].cpu().repeat(several) for name in ("prompt_id", "seed"))
        places = torch.arange(several).repeat_interleave(count)
        every = Paths(trajectory.latents, ids, seeds, self.seed, visit, places)
        found = []
        for part in self._micro_batches(torch.isfinite(trajectory.log_probs).all(0).cpu(), count):
            # autocast keeps casts of weights, and those made without gradients must not be used again
            torch.clear_autocast_cache()
            paths, at = every.at(part), part.to(images.device)
            ends = self._objective.ends(self.policy, paths, self.trained_steps)
            scores, gradient = self._graded(paths, ends)
            if ends.state is None:
                reward[at] = scores
            else:
                mean = scores.new_zeros(len(part)).index_add(0, ends.path.to(scores.device), scores)
                score = self._scores_of(images[at], paths) if known is None else known[at]
                reward[at] = score.where(torch.isfinite(mean), torch.nan)
            kept = torch.isfinite(reward[at]).cpu()
            chosen = kept[ends.path].nonzero().flatten()
            found.append(Scored(paths, ends.at(chosen), gradient[chosen.to(gradient.device)]))
        return reward, [each for each in found if len(each.gradient)]

    def _micro_batches(self, finite: Tensor, count: int) -> Iterator[Tensor]:
        """Rows of a rollout, int64: ``optimisation.batch_size`` of each adapter, one adapter's after another's."""
        own = [learner.rows(count) for learner in self.learners]
        rows = [finite[each].nonzero().flatten() + each.start for each in own]
        parts = (each.split(self.settings.optimisation.batch_size) for each in rows if len(each))
        for beside in zip_longest(*parts):
            yield torch.cat([part for part in beside if part is not None])

    def _graded(self, paths: Paths, ends: Ends) -> tuple[Tensor, Tensor]:
        """Rewards (N,) of the images at the ends, each its own adapter's, and their gradients (N, C, h, w)."""
        places = paths.adapter[ends.path]
        found: list[tuple[Tensor, Tensor]] = []
        for learner in self.learners:
            own = (places == learner.place).nonzero().flatten()
            if len(own):
                latents = ends.latents[own.to(ends.latents.device)].detach().requires_grad_()
                texts = self._texts(paths.prompt_id[ends.path[own]])
                with torch.enable_grad():
                    found += reward_gradients(self.backbone, [learner.reward], latents, latents, texts)
        scores, gradients = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(gradients)

    def _scores_of(self, images: Tensor, paths: Paths) -> Tensor:
        """Rewards of a rollout's own images (B, 3, H, W), each its own adapter's, (B,)."""
        return self.score_rows(images, list(zip(paths.adapter.tolist(), self._texts(paths.prompt_id), strict=True)))[
            :, 0
        ]

    def _counts(self, reward: Tensor, count: int) -> list[int]:
        """How many images of each adapter have a finite reward, of (m · B,)."""
        return [int(torch.isfinite(reward[learner.rows(count)]).sum()) for learner in self.learners]

    def _take_note(self, batch: dict[str, Any], reward: Tensor) -> None:
        """Log the rewards of all ranks; this rank's share of each adapter's update."""
        everyones = self.ranks.gather((batch["prompt_id"].cpu(), list(batch["prompt"]), reward.cpu()))
        prompt_ids = torch.cat([ids for ids, _, _ in everyones])
        finite = [self._counts(values, len(ids)) for ids, _, values in everyones]
        for learner, counts in zip(self.learners, zip(*finite, strict=True), strict=True):
            self._stop_if_none(learner, sum(counts))
            learner.share = counts[self.ranks.rank] * len(counts) / sum(counts)
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        for learner in self.learners:
            rewards = torch.cat([values[learner.rows(len(ids))] for ids, _, values in everyones])
            self._log_rewards(learner, prompt_ids, rewards)

    def _follow(self, scored: list[Scored], counts: list[int], logged: Logged) -> None:
        """One optimiser step along the gradient of micro-batches of so many images of each adapter in all; log it."""
        optimizer = self._optimizers()[0]
        self.set_learning_rate()
        set_options(optimizer, weight_decay=self.settings.optimisation.weight_decay)
        begun: set[str] = set()
        with self.ranks.together("the policy update"):
            scale, precise = self._loss_scale(), self.settings.kl.precision == "float32"
            for part in scored:
                torch.clear_autocast_cache()
                terms = [
                    self._terms(learner, scale / max(count, 1), learner.name not in begun)
                    for learner, count in zip(self.learners, counts, strict=True)
                ]
                found = self._objective.backward(self.policy, *part, terms, self.trained_steps, precise)
                for learner, metrics in zip(self.learners, found, strict=True):
                    logged.add(learner, metrics)
                    begun |= {learner.name} if metrics else set()
            if without := [learner for learner in self.learners if learner.name not in begun]:
                self._backward_of_nothing([each for learner in without for each in self.adapter_parameters(learner)])
        norms = self._step(optimizer, self.policy_parameters)
        if norms is not None:
            self.average.update()
            for learner, norm in zip(self.learners, norms, strict=True):
                self._objective_of(learner).saw_norm(float(norm))
                logged.add(learner, {"train/grad_norm": norm})

    def _terms(self, learner: Learner, factor: float, first: bool) -> Terms:
        """The terms of an adapter's loss; without a weight the KL is watched in its first micro-batch, not paid for."""
        kl_weight, reward_weight = learner.kl.weight_at(self.rollouts_done), self.settings.optimisation.reward_weight
        return self._objective_of(learner).terms(reward_weight, kl_weight, factor, kl_weight > 0 or first)

    def norm_limit(self, learner: Learner) -> float:
        limit, objective = super().norm_limit(learner), learner.objective
        return min(limit, objective.norm_limit()) if isinstance(objective, RewardGradient) else limit

    @property
    def _objective(self) -> RewardGradient:
        return self._objective_of(self.learners[0])

    def _objective_of(self, learner: Learner) -> RewardGradient:
        assert isinstance(learner.objective, RewardGradient)
        return learner.objective

    def _loss_scale(self) -> float:
        """What a float16 loss scaler multiplies losses by; 1 without one."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=self.device)))
