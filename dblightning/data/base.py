"""What every prompt DataModule does: endless training batches, finite evaluation, shards, a resumable cursor."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer

from dblightning.data.stream import Cursor, EvalLoader, PromptSampler, PromptSet, TrainLoader, check_positive


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
    ``prompt_id`` is the prompt's index in its list and ``seed`` counts its images, so the pair names an image.

    Training draws an endless stream that walks through all prompts, shuffled anew each time round; ranks take disjoint
    parts of it and no (prompt, seed) pair comes twice. Evaluation visits every (prompt, seed) pair of its prompts once,
    shared out over the ranks without padding: ranks may get different numbers of batches, so an evaluation step must
    not hold a collective operation. The loaders are plain iterables that Lightning does not reshard; no Trainer option
    is needed.

    The training stream's position is in ``state_dict`` and hence in every checkpoint. It counts prompts drawn by all
    ranks in batches that were worked off, so a run goes on exactly where it stopped, also from the middle of an epoch,
    and may go on with another batch size or number of ranks.

    Args:
        train: prompts to learn on.
        test: prompts to evaluate on.
        batch_size: images per rank and rollout, a multiple of ``samples_per_prompt``.
        samples_per_prompt: images of one prompt side by side in a training batch.
        rollouts_per_epoch: training batches per Lightning epoch.
        eval_batch_size: images per rank and evaluation batch.
        eval_seeds: images per prompt in an evaluation.
        eval_split: which prompts the val, test and predict loaders give: "test" or "train".
        limit_test_prompts: keep the first so many test prompts; None keeps all.
        seed: of the shuffling.

    Raises:
        ValueError: a number out of its range, or an unknown split.
    """

    def __init__(
        self,
        train: PromptSet,
        test: PromptSet,
        *,
        batch_size: int = 6,
        samples_per_prompt: int = 1,
        rollouts_per_epoch: int = 10,
        eval_batch_size: int = 16,
        eval_seeds: int = 1,
        eval_split: Literal["test", "train"] = "test",
        limit_test_prompts: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "rollouts_per_epoch": rollouts_per_epoch,
            "eval_batch_size": eval_batch_size,
            "eval_seeds": eval_seeds,
        }.items():
            check_positive(name, value)
        if limit_test_prompts is not None:
            check_positive("limit_test_prompts", limit_test_prompts)
            test = test.select(range(min(limit_test_prompts, len(test))))
        if eval_split not in ("test", "train"):
            raise ValueError(f"eval_split must be 'test' or 'train', got {eval_split!r}")
        # built here for its checks alone: a wrong batch_size should not wait for the first epoch
        PromptSampler(len(train), batch_size, samples_per_prompt, seed)
        self.train_set = train
        self.test_set = test
        self.batch_size = batch_size
        self.samples_per_prompt = samples_per_prompt
        self.rollouts_per_epoch = rollouts_per_epoch
        self.eval_batch_size = eval_batch_size
        self.eval_seeds = eval_seeds
        self.eval_split = eval_split
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
        """The evaluation prompts, after ``limit_test_prompts``."""
        return self.test_set.prompts

    def train_dataloader(self) -> TrainLoader:
        """``rollouts_per_epoch`` batches of the endless stream; each pass goes on where the last one stopped.

        Raises:
            ValueError: a checkpoint was loaded whose stream is another than this module's.
        """
        self._check_resumed()
        rank, world_size = rank_and_world_size(self.trainer)
        sampler = PromptSampler(
            len(self.train_set), self.batch_size, self.samples_per_prompt, self.seed, rank, world_size
        )
        self._train_loader = TrainLoader(
            self.train_set, sampler, self.rollouts_per_epoch, self._cursor, self._batches_in_flight
        )
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """This rank's share of the evaluation prompts, ``eval_seeds`` images each."""
        prompts = self.test_set if self.eval_split == "test" else self.train_set
        return EvalLoader(prompts, self.eval_batch_size, self.eval_seeds, *rank_and_world_size(self.trainer))

    def test_dataloader(self) -> EvalLoader:
        """The same pass as ``val_dataloader``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvalLoader:
        """The same pass as ``val_dataloader``."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The training stream's position and what it is a position in."""
        loader = self._train_loader
        position = self._cursor.position if loader is None else loader.state_dict()["position"]
        return {"position": position, **self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position. A position in another stream is refused, but not before training starts."""
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
                f"the checkpoint's stream of training prompts is another one: it has {was}, this run {now}; "
                "resume with the same prompts, seed and samples_per_prompt, or start a new run from its weights"
            )

    def _batches_in_flight(self) -> int:
        """Batches the trainer has taken and not worked off: 1 inside a training step, else 0."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed  # type: ignore[attr-defined]
