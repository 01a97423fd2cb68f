"""What a rollout leaves behind: trajectories in the replay buffers, statistics of all ranks' rewards, prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dblightning.checkpointing import save_last_good_state
from dblightning.learner import Learner
from dblightning.rollout import Trajectory
from dblightning.scoring import Scoring


class Storing(Scoring):
    """The part of ``RewardRLModule`` that stores rollouts, each adapter's samples with its own learner."""

    def _store(self, trajectory: Trajectory, batch: dict[str, Any], reward: Tensor) -> None:
        """Put the samples to train on into the buffers; statistics and logs are of all ranks' samples.

        Args:
            trajectory: m · B, those of one adapter after those of another.
            batch: B prompts.
            reward: (m · B,).
        """
        prompt_ids, count = batch["prompt_id"].cpu(), len(batch["prompt"])
        everyones = self.ranks.gather((prompt_ids, list(batch["prompt"]), reward.cpu()))
        all_ids = torch.cat([ids for ids, _, _ in everyones])
        all_rewards = [
            torch.cat([values[learner.rows(len(ids))] for ids, _, values in everyones]) for learner in self.learners
        ]
        for learner, rewards in zip(self.learners, all_rewards, strict=True):
            self._stop_if_none(learner, int(torch.isfinite(rewards).sum()))
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        for learner, rewards in zip(self.learners, all_rewards, strict=True):
            kept = torch.isfinite(rewards)
            learner.statistics.update(all_ids[kept], rewards[kept])
            kept &= learner.chosen(all_ids, rewards)
            mine = kept.split([len(ids) for ids, _, _ in everyones])[self.ranks.rank]
            own = learner.rows(count)
            learner.store(trajectory.of(own), prompt_ids, reward[own], mine, self.window.stored)
        self._share_out(all_ids)
        for learner, rewards in zip(self.learners, all_rewards, strict=True):
            self._log_rewards(learner, all_ids, rewards)

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
