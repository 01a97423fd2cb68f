"""A round of training by the reward's gradient: rollout → reward and its gradient → one update."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblightning.learner import Learner
from dblightning.manual_updates import ManualUpdates, set_options
from dblightning.objectives.policy import AdapterPolicy
from dblightning.objectives.reward_gradient import Ends, Paths, RewardGradient, Terms
from dblightning.rollout import Trajectory
from dblightning.scoring import Logged
from dblightning.steering import reward_gradients
from dblightning.storing import Storing


class Round(NamedTuple):
    """What a rollout and its updates give: what to log, and when it was sampled and scored (``perf_counter``)."""

    updates: list[dict[str, Tensor]]
    reward: Tensor  # (B,), NaN where there is none
    sampled: float
    scored: float


class Scored(NamedTuple):
    """A micro-batch with its rewards' gradients."""

    paths: Paths
    ends: Ends
    gradient: Tensor  # (N, C, h, w), ∂r/∂latents at the ends


class RewardGradients(Storing, ManualUpdates):
    """The part of ``RewardRLModule`` that trains with objectives that need "gradients".

    Nothing is stored: a rollout's images make one update, which averages −``reward_weight`` · r + ``kl.weight`` · Σ KL
    over them, ``optimisation.batch_size`` at a time, so α = ``kl.weight / optimisation.reward_weight`` as everywhere.
    """

    policy: AdapterPolicy

    def gradient_round(self, batch: dict[str, Any]) -> Round:
        """One rollout and the update that follows it."""
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
        self.learners[0].latest_images = images, prompts, reward
        self._take_note(batch, reward)
        with self._no_ddp_sync(), self._profile("update"):
            logged = Logged()
            self._follow(scored, int(torch.isfinite(reward).sum()), logged)
            for visit in range(1, self.settings.optimisation.policy_steps):
                with self.ranks.together("a reward's gradient"):
                    scored = self._reward_gradients(batch, trajectory, images, visit, reward)[1]
                self._follow(scored, sum(len(part.gradient) for part in scored), logged)
        return Round([logged.summary()], reward, sampled, ended)

    def _reward_gradients(
        self,
        batch: dict[str, Any],
        trajectory: Trajectory,
        images: Tensor,
        visit: int = 0,
        known: Tensor | None = None,
    ) -> tuple[Tensor, list[Scored]]:
        """Rewards (B,), and micro-batches of the samples that have a finite one.

        Args:
            batch, trajectory, images: of the rollout.
            visit: updates made of it before.
            known: rewards of the images, where they are known.
        """
        objective = self._objective
        reward = torch.full((len(images),), torch.nan, device=images.device)
        every = Paths(trajectory.latents, batch["prompt_id"].cpu(), batch["seed"].cpu(), self.seed, visit)
        rows = torch.isfinite(trajectory.log_probs).all(0).cpu().nonzero().flatten()
        found = []
        for part in rows.split(self.settings.optimisation.batch_size):
            # autocast keeps casts of weights, and those made without gradients must not be used again
            torch.clear_autocast_cache()
            paths = every.at(part)
            ends = objective.ends(self.policy, paths, self.trained_steps)
            latents = ends.latents.detach().requires_grad_()
            texts = [self.prompts[each] for each in paths.prompt_id[ends.path].tolist()]
            with torch.enable_grad():
                ((scores, gradient),) = reward_gradients(self.backbone, [self.reward], latents, latents, texts)
            at = part.to(images.device)
            if ends.state is None:
                reward[at] = scores
            else:
                own = [self.prompts[each] for each in paths.prompt_id.tolist()]
                mean = scores.new_zeros(len(part)).index_add(0, ends.path.to(scores.device), scores)
                score = self.reward.score(images[at], own).detach() if known is None else known[at]
                reward[at] = score.where(torch.isfinite(mean), torch.nan)
            kept = torch.isfinite(reward[at]).cpu()
            chosen = kept[ends.path].nonzero().flatten()
            found.append(Scored(paths, ends.at(chosen), gradient[chosen.to(gradient.device)]))
        return reward, [each for each in found if len(each.gradient)]

    def _take_note(self, batch: dict[str, Any], reward: Tensor) -> None:
        """Log the rewards of all ranks; this rank's share of the update."""
        everyones = self.ranks.gather((batch["prompt_id"].cpu(), list(batch["prompt"]), reward.cpu()))
        prompt_ids = torch.cat([ids for ids, _, _ in everyones])
        rewards = torch.cat([values for _, _, values in everyones])
        finite = [int(torch.isfinite(values).sum()) for _, _, values in everyones]
        self._stop_if_none(self.learners[0], sum(finite))
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        self.learners[0].share = finite[self.ranks.rank] * len(finite) / sum(finite)
        self._log_rewards(self.learners[0], prompt_ids, rewards)

    def _follow(self, scored: list[Scored], count: int, logged: Logged) -> None:
        """One optimiser step along the gradient of micro-batches of ``count`` images in all; and log it."""
        (learner,) = self.learners
        settings, optimizer, objective = self.settings.optimisation, self._optimizers()[0], self._objective
        set_options(optimizer, lr=self.learning_rate, weight_decay=settings.weight_decay)
        kl_weight = self.kl.weight_at(self.rollouts_done)
        terms = Terms(settings.reward_weight, kl_weight, 1.0, self.trained_steps, True, self._precise_kl)
        with self.ranks.together("the policy update"):
            terms = terms._replace(factor=self._loss_scale() / max(count, 1))
            for index, part in enumerate(scored):
                torch.clear_autocast_cache()
                # without a weight the KL is watched, not paid for
                part_terms = terms._replace(with_kl=kl_weight > 0 or index == 0)
                metrics = objective.backward(self.policy, part.paths, part.ends, part.gradient, part_terms)
                logged.add(learner, metrics)
            if not scored:
                self._backward_of_nothing(self.policy_parameters)
        norms = self._step(optimizer, self.policy_parameters)
        if norms is not None:
            self.average.update()
            objective.saw_norm(float(norms[0]))
            logged.add(learner, {"train/grad_norm": norms[0]})

    def norm_limit(self, learner: Learner) -> float:
        limit, objective = super().norm_limit(learner), learner.objective
        return min(limit, objective.norm_limit()) if isinstance(objective, RewardGradient) else limit

    @property
    def _objective(self) -> RewardGradient:
        assert isinstance(self.objective, RewardGradient)
        return self.objective

    @property
    def _precise_kl(self) -> bool:
        return self.settings.kl.precision == "float32"

    def _loss_scale(self) -> float:
        """What a float16 loss scaler multiplies losses by; 1 without one."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=self.device)))
