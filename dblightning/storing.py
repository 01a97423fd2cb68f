"""What a rollout leaves behind: trajectories in the replay buffers, statistics of all ranks' rewards, prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dblightning.checkpointing import save_last_good_state
from dblightning.learner import Learner
from dblightning.objectives.kl_to_go import kl_to_go, step_kls
from dblightning.objectives.policy import AdapterPolicy
from dblightning.rollout import Trajectory
from dblightning.scoring import Scoring


class Storing(Scoring):
    """The part of ``RewardRLModule`` that stores rollouts, each adapter's samples with its own learner."""

    policy: AdapterPolicy

    def _store(self, trajectory: Trajectory, batch: dict[str, Any], scores: Tensor) -> None:
        """Put the samples to train on into the buffers; statistics and logs are of all ranks' samples.

        Args:
            trajectory: m · B, those of one adapter after those of another.
            batch: B prompts.
            scores: (m · B, 1 + parts), see :meth:`score_rows`.
        """
        prompt_ids, count = batch["prompt_id"].cpu(), len(batch["prompt"])
        everyones = self.ranks.gather((prompt_ids, list(batch["prompt"]), scores.cpu()))
        all_ids, sizes = torch.cat([ids for ids, _, _ in everyones]), [len(ids) for ids, _, _ in everyones]
        all_scores = [
            torch.cat([values[learner.rows(len(ids))] for ids, _, values in everyones]) for learner in self.learners
        ]
        for learner, each in zip(self.learners, all_scores, strict=True):
            self._stop_if_none(learner, int(torch.isfinite(each[:, 0]).sum()))
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        if self.settings.kl.to_go:
            trajectory = self._with_kl_to_go(trajectory, prompt_ids, torch.isfinite(scores[:, 0]))
        for learner, each in zip(self.learners, all_scores, strict=True):
            kept, own = torch.isfinite(each[:, 0]), learner.rows(count)
            learner.statistics.update(all_ids[kept], each[kept, 0])
            judged = learner.judged(all_ids, each[:, 1:], kept)
            kept &= learner.chosen(all_ids, each[:, 0], judged)
            mine = kept.split(sizes)[self.ranks.rank]
            advantage = None if judged is None else judged.advantage.split(sizes)[self.ranks.rank]
            learner.store(trajectory.of(own), prompt_ids, scores[own, 0], mine, self.window.stored, advantage)
        self._share_out(all_ids)
        for learner, each in zip(self.learners, all_scores, strict=True):
            self._log_rewards(learner, all_ids, each[:, 0], each[:, 1:])

    def _with_kl_to_go(self, trajectory: Trajectory, prompt_ids: Tensor, finite: Tensor) -> Trajectory:
        """Trajectories with their steps' KL to go, less its mean over all ranks' finite samples of the adapter."""
        count, several = len(prompt_ids), len(self.learners)
        with self.ranks.together("the KL to go"):
            places = torch.arange(several).repeat_interleave(count)
            kls = step_kls(
                self.policy,
                trajectory,
                prompt_ids.repeat(several),
                places,
                self.window.trained,
                self.settings.optimisation.batch_size,
                self.settings.kl.precision,
            )
        to_go = kl_to_go(kls)
        for learner in self.learners:
            own = to_go[:, learner.rows(count)]
            kept = own[:, finite[learner.rows(count)]].double().cpu()
            sums = self.ranks.gather((kept.sum(1), kept.shape[1]))
            mean = torch.stack([total for total, _ in sums]).sum(0) / sum(number for _, number in sums)
            own -= mean.to(own)[:, None]
        means = trajectory.means if "mean" in self.objective.stores else None
        return trajectory._replace(kl_to_go=to_go, means=means)

    def _share_out(self, prompt_ids: Tensor) -> None:
        """What each rank's gradients count by what it holds; and prompts that nobody holds any more are dropped."""
        held = self.ranks.gather([learner.held() for learner in self.learners])
        needed = set(prompt_ids.tolist())
        for place, learner in enumerate(self.learners):
            sizes = [each[place][0] for each in held]
            learner.most_held = max(sizes)
            learner.share = sizes[self.ranks.rank] * len(sizes) / sum(sizes)
            needed.update(prompt_id for each in held for prompt_id in each[place][1])
        self.prompts = {prompt_id: self.prompts[prompt_id] for prompt_id in self.prompts if prompt_id in needed}

    def _stop_if_none(self, learner: Learner, kept: int) -> None:
        """Every rank stops, with a checkpoint saved, when no rank has a finite reward."""
        if kept > 0:
            return
        saved = save_last_good_state(self.trainer, self, "before_nan_rewards.ckpt")
        raise RuntimeError(
            f"every reward of rollout {self.rollouts_done + 1} is NaN or infinite ({learner.reward.name}); "
            f"the state before it is {saved}. Check the images and the reward on them"
        )

    def _texts(self, prompt_ids: Tensor) -> list[str]:
        return ["" if prompt_id < 0 else self.prompts[prompt_id] for prompt_id in prompt_ids.tolist()]
