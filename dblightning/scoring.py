"""Scores of rollouts and of the validation's images, over all ranks, and what happens when a reward is unavailable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dblightning.blending import Blend, Single
from dblightning.checkpointing import save_last_good_state
from dblightning.learner import Learner
from dblightning.lightning_internals import logged_step
from dblightning.loggers import log_by_prompt
from dblightning.rewards.base import RewardUnavailable
from dblightning.rewards.worker import RewardWorker
from dblightning.rollout_sampler import RolloutSampler, Row, without_nan
from dblightning.run_state import RunState
from dblightning.settings import check

#: metrics of which the largest value is logged, not the mean
WORST = ("train/on_policy_ratio_error",)


class Logged:
    """Values to log about an update, collected until it is over."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, learner: Learner, values: Mapping[str, Tensor]) -> None:
        """Those of a micro-batch or an optimiser step: name → scalar."""
        for name, value in values.items():
            self._values.setdefault(learner.tag(name), []).append(value.detach())

    def once(self, learner: Learner, values: Mapping[str, Tensor]) -> None:
        """The same, of the update's first step alone."""
        self.add(learner, {name: value for name, value in values.items() if learner.tag(name) not in self._values})

    def summary(self) -> dict[str, Tensor]:
        """Each value's mean, or the largest of one of ``WORST``."""
        return {
            tag: torch.stack(values).max() if tag.startswith(WORST) else torch.stack(values).mean()
            for tag, values in self._values.items()
        }


class Scoring(RunState):
    """The part of ``RewardRLModule`` that scores and logs: the rewards' worker, rollouts' metrics, validation."""

    sampler: RolloutSampler
    eval_rewards: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self._evaluated: dict[str, list[Tensor]] = {}
        self._failure: Exception | None = None
        self._worker: RewardWorker | None = None

    def generate(self, prompts: list[str], prompt_ids: Tensor, seeds: Tensor, blend: Blend | None = None) -> Tensor:
        """Images (B, 3, H, W) of prompts with this run's sampling settings, every step stochastic.

        ``blend`` None is the adapter in training, which is its average where the run keeps one.

        The image of (prompt_id, seed) has the same noise whatever the blend, and never a training rollout's.
        """
        with self.average.applied():
            return self.sampler.generate(prompts, prompt_ids, seeds, blend, self.device)

    def score_rows(self, images: Tensor, rows: Sequence[Row]) -> Tensor:
        """Rewards of a rollout's images (B, 3, H, W), each by its own adapter's: (B, 1 + parts).

        The first column is the reward; those of its parts follow, where a reward has any, NaN where one has fewer.
        """
        most = max(len(learner.reward.part_names) for learner in self.learners)
        scores: list[Tensor] = []
        for learner in self.learners:
            own = [index for index, (place, _) in enumerate(rows) if place == learner.place]
            if own:
                whole = len(own) == len(rows)
                given = images if whole else images[own]
                total, parts = learner.reward.score_with_parts(given, [rows[each][1] for each in own])
                columns = [total, *parts.values()]
                columns += [torch.full_like(total, torch.nan)] * (1 + most - len(columns))
                scores.append(torch.stack(columns, dim=1))
        return torch.cat(scores).detach()

    # ── a reward that is unavailable, or scores in the background ────────────────────────────────────────────────────

    @contextmanager
    def _until_all_know(self) -> Iterator[list[str]]:
        """Keeps the error of a reward that is unavailable, to be raised once no rank waits for this one."""
        given_up: list[str] = []
        try:
            yield given_up
        except Exception as error:
            if (found := RewardUnavailable.behind(error)) is None:
                raise
            given_up.append(str(found))

    def _stop_if_unavailable(self, given_up: list[str]) -> None:
        """Raise on every rank what a reward said that is unavailable on one. A collective call."""
        if texts := [text for each in self.ranks.gather(given_up) for text in each]:
            raise RewardUnavailable(texts[0])

    @contextmanager
    def _reward_worker(self) -> Iterator[RewardWorker | None]:
        """The run's one worker where ``overlap_reward`` asks for it; an error ends it."""
        if self.settings.sampling.overlap_reward and self._worker is None:
            self._worker = RewardWorker(self.score_rows)
        try:
            yield self._worker
        except BaseException:
            self._close_worker(cancel=True)
            raise

    def _close_worker(self, cancel: bool = False) -> None:
        if self._worker is not None:
            self._worker.close(cancel)
            self._worker = None

    def on_fit_end(self) -> None:
        self._close_worker()

    def _profile(self, name: str) -> AbstractContextManager[None]:
        profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's connector
        context: AbstractContextManager[None] = profiler.profile(name)
        return context

    # ── what is logged about a rollout ───────────────────────────────────────────────────────────────────────────────

    def _over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Each metric's mean over the stored steps of all ranks, or its largest value if it is one of ``WORST``."""
        values = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
        named = dict(zip(metrics, values, strict=True))
        found: dict[str, float] = {}
        for learner in self.learners:
            own = {name: value for name, value in named.items() if name.endswith(learner.suffix)}
            found |= self.ranks.mean(own, learner.share, [learner.tag(name) for name in WORST])
        return found

    def _log_rewards(self, learner: Learner, prompt_ids: Tensor, rewards: Tensor, parts: Tensor | None = None) -> None:
        finite = torch.isfinite(rewards)
        scores, size, tag = rewards[finite], len(rewards), learner.tag
        self.log(tag("train/dropped_samples"), float(size - len(scores)), reduce_fx="sum", batch_size=size)
        self.log(tag("reward"), scores.mean(), prog_bar=True, logger=False, batch_size=size)
        values = {tag("train/reward"): scores.mean(), tag("train/reward_std"): scores.std(correction=0)}
        for name, part in zip(learner.reward.part_names, [] if parts is None else parts.T, strict=False):
            values[tag(f"train/reward/{name}")] = part[finite].mean()
        self.log_dict(values, batch_size=size)
        by_prompt = {
            self.prompts[prompt_id]: scores[prompt_ids[finite] == prompt_id].mean().item()
            for prompt_id in prompt_ids[finite].unique().tolist()
        }
        # to the loggers themselves: Lightning would log a prompt's value again in every later rollout of the epoch
        log_by_prompt(self.trainer, by_prompt, logged_step(self.trainer), learner.suffix)

    def _log_update(self, metrics: dict[str, float], size: int, times: tuple[float, float, float, float]) -> None:
        """Log a rollout's metrics and its times: when it began, was sampled, scored and trained on.

        ``size`` is the number of this rank's images.
        """
        start, sampled, scored, done = times
        count = size * self.ranks.size
        metrics |= {
            "time/sampling_s": sampled - start,
            "time/reward_s": scored - sampled,
            "time/update_s": done - scored,
            "time/images_per_s": count / (done - start),
            "time/device_s_per_image": (done - start) * self.ranks.size / count,
            "train/images": float(self.images_done),
        }
        if self.device.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.log_dict(metrics, batch_size=size)
        for learner in self.learners:
            kl = metrics[learner.tag("train/kl")]
            self.log(learner.tag("kl"), kl, prog_bar=True, logger=False, batch_size=size)

    # ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._stop.listen()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        # Ranks may get different numbers of batches, so they exchange scores and errors once, at the end
        if self._failure is not None:
            return
        try:
            for learner, images, finite in self._evaluation_images(batch):
                for name, reward in [("reward", learner.reward), *self.eval_rewards.items()]:
                    scores = reward.score(images, batch["prompt"])  # type: ignore[operator]
                    scores = scores.where(finite.to(scores.device), torch.nan)
                    tag = learner.tag(f"{stage}/{name}")
                    self._evaluated.setdefault(tag, []).append(scores.detach().double().cpu())
        except Exception as error:
            self._failure = error
        self._stop.check("no value is written; run the same command again")

    def _evaluation_images(self, batch: dict[str, Any]) -> Iterator[tuple[Learner, Tensor, Tensor]]:
        """Each adapter's images of a batch, and which are finite; those that have not learned yet share theirs."""
        shared: tuple[Tensor, Tensor] | None = None
        for learner in self.learners:
            new = self.rollouts_done == 0 and learner.settings.adapter.init is None
            made = shared if new else None
            if made is None:
                blend = Single(learner.name)
                made = without_nan(self.generate(batch["prompt"], batch["prompt_id"], batch["seed"], blend))
                shared = made if new else shared
            yield learner, *made

    def on_validation_epoch_end(self) -> None:
        self._stop.release()
        try:
            self._log_evaluation()
        except RewardUnavailable as error:
            if not self.trainer.training and not self.trainer.validating:
                raise
            saved = save_last_good_state(self.trainer, self, "before_unavailable_reward.ckpt")
            raise RewardUnavailable(
                f"validation after rollout {self.rollouts_done}: {error} The run is {saved}"
            ) from error

    def on_test_epoch_end(self) -> None:
        self._log_evaluation()

    def _check_evaluation_shares(self) -> None:
        """A rank without a batch would skip the evaluation, and the exchange at its end, while others wait for it."""
        trainer: Any = self.trainer
        if self.ranks.size == 1 or trainer.datamodule is None or trainer.limit_val_batches == 0:
            return
        batches = self.ranks.gather(len(trainer.datamodule.val_dataloader()))
        check(
            min(batches) > 0 or max(batches) == 0,
            f"the validation has fewer images than there are processes: their numbers of batches are {batches}; raise "
            "limit_val_prompts or eval_seeds, or leave it out with --trainer.limit_val_batches 0",
        )

    def _log_evaluation(self) -> None:
        """Mean of each reward over all images of all ranks, but those that are NaN or infinite, which are counted."""
        failure, evaluated = self._failure, self._evaluated
        self._failure, self._evaluated = None, {}
        with self.ranks.together("the evaluation"), self._until_all_know() as given_up:
            if failure is not None:
                raise failure
        self._stop_if_unavailable(given_up)
        own = {name: torch.cat(parts) for name, parts in evaluated.items()}
        finite = {name: scores[torch.isfinite(scores)] for name, scores in own.items()}
        gathered = self.ranks.gather(
            {name: (float(kept.sum()), len(kept), len(own[name]) - len(kept)) for name, kept in finite.items()}
        )
        for name in dict.fromkeys(name for each in gathered for name in each):
            total, count, dropped = map(sum, zip(*(each[name] for each in gathered if name in each), strict=True))
            self.log(name, total / count if count else float("nan"), prog_bar=name.split("/")[1] == "reward")
            if dropped:
                whose = next((each.suffix for each in self.learners if name.endswith(each.suffix)), "")
                self.log(f"{name.removesuffix(whose)}_dropped{whose}", float(dropped))
