"""Base class for prompt DataModules: endless training batches, finite evaluation, shards, a resumable cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer

from dblightning.data.stream import (
    Cursor,
    EvalLoader,
    PromptSampler,
    PromptSet,
    TrainLoader,
    check_positive,
    sample_order,
)

Split = Literal["train", "val", "test"]
Order = Literal["sample", "file"]
#: what a module samples its prompts by: a prompt set → one value per prompt
Strata = Callable[[PromptSet], Sequence[Hashable]]


def rank_and_world_size(trainer: Trainer | None = None) -> tuple[int, int]:
    """(rank, world size) of torch.distributed where it runs, else of the trainer, else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if trainer is not None:
        return trainer.global_rank, trainer.world_size
    return 0, 1


class PromptDataModule(LightningDataModule):
    """Prompts for rollouts and for evaluation.

    Every batch is {"prompt_id": int64 (B,), "seed": int64 (B,), "prompt": B strings, and B values per metadata column}.
    ``prompt_id`` is the prompt's index in its whole list and ``seed`` counts its images, so the pair names an image. A
    limit leaves the ids as they are: it takes a random sample of the list, with the list's mix of strata (such as
    prompts of one and of two things), and a larger limit holds the smaller one's prompts.

    Three lists: prompts to train on, to validate on during training, and to test on once at the end.

    Training draws an endless stream that goes through all prompts, shuffled anew each time round; ranks take disjoint
    parts of it and no (prompt, seed) pair comes twice. Evaluation visits every (prompt, seed) pair of its prompts once,
    shared out over the ranks without padding: ranks may get different numbers of batches, so an evaluation step must
    not hold a collective operation. The loaders are plain iterables that Lightning does not reshard; no Trainer option
    is needed.

    The training stream's position is in ``state_dict`` and hence in every checkpoint. It counts prompts drawn by all
    ranks in batches that were worked off, so a run resumes exactly where it stopped, also in the middle of an epoch,
    and may resume with another batch size or number of ranks.

    Args:
        train: prompts to learn on.
        test: prompts to evaluate on.
        val: prompts to validate on, none of them a test prompt; None takes the training prompts.
        strata: what a sample of test or validation prompts is stratified by; None is nothing.
        batch_size: images per rank and rollout, a multiple of ``samples_per_prompt``.
        samples_per_prompt: images of one prompt side by side in a training batch.
        rollouts_per_epoch: training batches per Lightning epoch.
        eval_batch_size: images per rank and evaluation batch.
        eval_seeds: images per prompt in an evaluation.
        eval_split: which prompts the test and predict loaders give: "test", "val" or "train".
        val_split: which prompts the val loader gives: "val", "test" or "train"; None is "val", or "train" where
            ``eval_split`` is.
        limit_test_prompts: keep a random sample of so many test prompts; None keeps all.
        limit_val_prompts: keep a random sample of so many validation prompts; None takes ``limit_test_prompts``.
        prompt_order: "sample" limits by a random sample; "file" keeps the first prompts of the list instead, which are
            not a sample where the list is sorted in any way.
        limit_seed: of that random sample, separate from ``seed``, so that training runs of several seeds are evaluated
            on the same prompts.
        seed: of the shuffling of the training prompts.

    Raises:
        ValueError: a number out of its range, or an unknown split.
    """

    def __init__(
        self,
        train: PromptSet,
        test: PromptSet,
        *,
        val: PromptSet | None = None,
        strata: Strata | None = None,
        batch_size: int = 6,
        samples_per_prompt: int = 1,
        rollouts_per_epoch: int = 10,
        eval_batch_size: int = 16,
        eval_seeds: int = 1,
        eval_split: Split = "test",
        val_split: Split | None = None,
        limit_test_prompts: int | None = None,
        limit_val_prompts: int | None = None,
        prompt_order: Order = "sample",
        limit_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "rollouts_per_epoch": rollouts_per_epoch,
            "eval_batch_size": eval_batch_size,
            "eval_seeds": eval_seeds,
        }.items():
            check_positive(name, value)
        for name, limit in {"limit_test_prompts": limit_test_prompts, "limit_val_prompts": limit_val_prompts}.items():
            if limit is not None:
                check_positive(name, limit)
        for name, choice, choices in (
            ("eval_split", eval_split, get_args(Split)),
            ("val_split", "val" if val_split is None else val_split, get_args(Split)),
            ("prompt_order", prompt_order, get_args(Order)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")
        if isinstance(limit_seed, bool) or not isinstance(limit_seed, int) or limit_seed < 0:
            raise ValueError(f"limit_seed must be an integer >= 0, got {limit_seed!r}")
        # built here for its checks alone: a wrong batch_size should not wait for the first epoch
        PromptSampler(len(train), batch_size, samples_per_prompt, seed)
        self.train_set = train
        self.prompt_order = prompt_order
        self.limit_seed = limit_seed
        self._strata = strata
        self.test_set = self.limited(test, limit_test_prompts)
        val_limit = limit_test_prompts if limit_val_prompts is None else limit_val_prompts
        self.val_set = self.limited(train if val is None else val, val_limit)
        # validation on the test or the training prompts has the validation's limit
        self._validated = {"val": self.val_set, "test": self.limited(test, val_limit), "train": train}
        self.batch_size = batch_size
        self.samples_per_prompt = samples_per_prompt
        self.rollouts_per_epoch = rollouts_per_epoch
        self.eval_batch_size = eval_batch_size
        self.eval_seeds = eval_seeds
        self.eval_split: Split = eval_split
        self.val_split: Split = val_split or ("train" if eval_split == "train" else "val")
        self.seed = seed
        # a small evaluation on many ranks may leave some without a prompt
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._cursor = Cursor()
        self._train_loader: TrainLoader | None = None
        self._resumed_from: dict[str, Any] | None = None

    @property
    def train_prompts(self) -> list[str]:
        """The training prompts; ``prompt_id`` of a training batch is an index into them."""
        return self.train_set.prompts

    @property
    def test_prompts(self) -> list[str]:
        """The test prompts, after ``limit_test_prompts``."""
        return self.test_set.prompts

    @property
    def val_prompts(self) -> list[str]:
        """The validation prompts, after ``limit_val_prompts``."""
        return self.val_set.prompts

    @property
    def validation_set(self) -> PromptSet:
        """The prompts of the val loader, as ``val_split`` says."""
        return self._validated[self.val_split]

    @property
    def evaluation_set(self) -> PromptSet:
        """The prompts of the test and predict loaders, as ``eval_split`` says."""
        return {"test": self.test_set, "val": self.val_set, "train": self.train_set}[self.eval_split]

    def limited(self, prompts: PromptSet, limit: int | None) -> PromptSet:
        """At most ``limit`` prompts with the ids they have: a stratified sample in random order, or the first ones."""
        if limit is None or limit >= len(prompts):
            return prompts
        if self.prompt_order == "file":
            return prompts.subset(range(limit))
        strata = [None] * len(prompts) if self._strata is None else self._strata(prompts)
        # not sorted: a larger limit continues where the smaller ends, so an evaluation makes only what is new
        return prompts.subset(sample_order(strata, self.limit_seed)[:limit])

    def train_dataloader(self) -> TrainLoader:
        """``rollouts_per_epoch`` batches of the endless stream; each pass continues where the last one stopped.

        With ``Trainer(overfit_batches=N)`` every pass has the prompts of the first N batches, with new noise.

        Raises:
            ValueError: a checkpoint was loaded whose stream differs from this module's.
        """
        self._check_resumed()
        rank, world_size = rank_and_world_size(self.trainer)
        sampler = PromptSampler(
            len(self.train_set), self.batch_size, self.samples_per_prompt, self.seed, rank, world_size
        )
        if overfitted := self._overfit_batches():
            sampler = replace(sampler, repeat_after=overfitted * sampler.prompts_per_step)
        self._train_loader = TrainLoader(
            self.train_set, sampler, self.rollouts_per_epoch, self._cursor, self._batches_in_flight
        )
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """This rank's share of the validation prompts, ``eval_seeds`` images each."""
        return self._loader(self.validation_set)

    def test_dataloader(self) -> EvalLoader:
        """This rank's share of the test prompts, ``eval_seeds`` images each."""
        return self._loader(self.evaluation_set)

    def predict_dataloader(self) -> EvalLoader:
        """The same pass as ``test_dataloader``."""
        return self._loader(self.evaluation_set)

    def _loader(self, prompts: PromptSet) -> EvalLoader:
        return EvalLoader(prompts, self.eval_batch_size, self.eval_seeds, *rank_and_world_size(self.trainer))

    def state_dict(self) -> dict[str, Any]:
        """The training stream's position and what it is a position in."""
        loader = self._train_loader
        position = self._cursor.position if loader is None else loader.state_dict()["position"]
        return {"position": position, **self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved position. A position in another stream is refused, but not before training starts."""
        self._cursor.resume(state_dict["position"])
        self._resumed_from = {key: value for key, value in state_dict.items() if key != "position"}

    def _stream(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(self.train_prompts).encode()).hexdigest()
        return {"seed": self.seed, "samples_per_prompt": self.samples_per_prompt, "train_prompts_sha256": digest}

    def _check_resumed(self) -> None:
        if self._resumed_from is None:
            return
        stream = self._stream()
        changed = [key for key in stream if self._resumed_from.get(key) != stream[key]]
        if changed:
            was, now = ({key: source.get(key) for key in changed} for source in (self._resumed_from, stream))
            raise ValueError(
                f"the checkpoint's stream of training prompts differs: it has {was}, this run {now}; "
                "resume with the same prompts, seed and samples_per_prompt, or start a new run from its weights"
            )

    def _overfit_batches(self) -> int:
        """The trainer's ``overfit_batches`` as a number of batches; 0 is off."""
        wanted = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        if isinstance(wanted, float):
            return max(1, int(wanted * self.rollouts_per_epoch)) if wanted else 0
        return min(wanted, self.rollouts_per_epoch)

    def _batches_in_flight(self) -> int:
        """Batches the trainer has taken and not worked off: 1 inside a training step, else 0."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed  # type: ignore[attr-defined]
