"""When a run is saved: every few rollouts, at its end, and on a stop signal. The files are :mod:`checkpoint_files`'."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from dblightning.checkpoint_files import (
    CheckedCheckpointIO,
    DamagedCheckpointError,
    check_ours,
    latest_intact,
    read_intact,
    read_shard,
    serialized,
    write_atomically,
    write_shards,
)
from dblightning.distributed import Ranks
from dblightning.lightning_internals import finish_logging_of_batch

__all__ = [
    "PREEMPTED",
    "CheckedCheckpointIO",
    "DamagedCheckpointError",
    "Preempted",
    "RunCheckpoint",
    "StopSignal",
    "check_ours",
    "latest_intact",
    "read_intact",
    "read_shard",
    "remove_all_but",
    "save_last_good_state",
    "serialized",
    "write_atomically",
    "write_shards",
]

#: exit code of a run that a signal stopped after it had saved itself: EX_TEMPFAIL of sysexits.h, "try again later"
PREEMPTED = 75


class Preempted(SystemExit):
    """A signal stopped the run and it is saved; ends the process with exit code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignal:
    """Notes SIGTERM and SIGUSR1, so that the work in progress can be finished and saved first.

    SLURM sends them before a time limit or a pre-emption. Lightning's own handling ends a process with exit code 0.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal received; empty while there is none
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Note signals from now on. Outside the main thread, where Python sets no handlers, there is nothing to note.

        Call it once Lightning's own handlers are set (``on_train_start``, ``on_test_start``), to replace them.
        """
        self.name = ""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                before = signal.signal(number, self._note)
                self._before.setdefault(number, before)

    def release(self) -> None:
        """Put back the handlers that were there before; harmless when repeated."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check(self, state: str) -> None:
        """End the process with exit code 75 if a signal was received.

        Args:
            state: what is saved and how to resume, for the message.

        Raises:
            Preempted: a signal was received.
        """
        if self.name:
            message = f"stopped by {self.name}: {state}"
            self.release()
            print(message, file=sys.stderr, flush=True)
            raise Preempted(message)

    def _note(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name


class RunCheckpoint(Checkpoint):
    """Save the run every few rollouts, at its end and on a stop signal; ``fit`` adds one by default.

    SIGTERM and SIGUSR1 (SLURM's warning before a time limit or pre-emption), on any rank, let the current rollout end,
    save, and end every process with exit code 75. In an epoch's last rollout the validation is still done.

    Args:
        folder: where checkpoints go; None takes ``checkpoints`` under the run's log directory.
        every_n_rollouts: rollouts between two saves; what a SIGKILL costs at most.
        keep: how many of the latest checkpoints stay.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, folder: str | None = None, every_n_rollouts: int = 10, keep: int = 2) -> None:
        if every_n_rollouts < 1 or keep < 1:
            raise ValueError(f"every_n_rollouts and keep must be at least 1, got {every_n_rollouts} and {keep}")
        self.folder = folder
        self.every_n_rollouts = every_n_rollouts
        self.keep = keep
        self.stop_signal = StopSignal()
        self._agreed = ""  # the signal that any process received, as all know since the last rollout
        self._saved = -1
        self._due = False

    def path(self, trainer: L.Trainer) -> Path:
        """The folder of this run's checkpoints."""
        return Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")

    def find(self, trainer: L.Trainer) -> Path | None:
        """The latest intact checkpoint of earlier runs, None where there is none.

        Raises:
            ValueError: the folder is named anew by each run, so earlier runs cannot be found.
            DamagedCheckpointError: there are checkpoints and none is intact.
        """
        folder = self.path(trainer)
        if self.folder is None and folder.parent.name.startswith("version_"):
            raise ValueError(
                f"each run logs to a new folder (now {folder.parent}), so the last run's checkpoint cannot be "
                "determined; give RunCheckpoint a folder, or the logger a fixed version, or name a file in --ckpt_path"
            )
        found = latest_intact(folder)
        if found is None and any(folder.glob("*.ckpt")):
            raise DamagedCheckpointError(f"every checkpoint in {folder} is damaged; remove them to start over")
        return found

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agreed, self._due = "", False
        self._saved = _rollouts(pl_module)
        self.stop_signal.listen()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop_signal.release()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        _flush(trainer)  # a killed run resumes after its last checkpoint, and its curves must reach that far

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        rollouts = _rollouts(pl_module)
        self._agreed = next(filter(None, _ranks(pl_module).gather(self.stop_signal.name)), "")
        self._due = bool(self._agreed) or rollouts - self._saved >= self.every_n_rollouts
        # An epoch's last rollout is saved after the epoch's validation, which a resumed run would leave out otherwise
        if self._due and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            if self._agreed:  # the exception below ends the batch before Lightning logs it
                finish_logging_of_batch(trainer)
            self._save_and_stop(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due:
            self._save_and_stop(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _rollouts(pl_module) != self._saved:
            self.save(trainer, pl_module)
        self.stop_signal.release()

    def _save_and_stop(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._due = False
        saved = self.save(trainer, module)
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs
        if self._agreed and not (last and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
            message = f"stopped by {self._agreed} after rollout {_rollouts(module)}; saved in {saved}"
            rank_zero_info(message)
            raise Preempted(message)

    def outputs(self, trainer: L.Trainer, module: L.LightningModule) -> dict[Path, list[Path]]:
        """Files a run's checkpoints would replace, for ``RunGuard``."""
        folder = self.path(trainer)
        return {folder: sorted(folder.glob("*.ckpt"))}

    def save(self, trainer: L.Trainer, module: L.LightningModule, name: str | None = None) -> Path:
        """Save now; older checkpoints than the last ``keep`` are removed. A collective call.

        Args:
            trainer, module: the run; one of ``fast_dev_run`` is not saved.
            name: of the file; None names it after the rollouts done.

        Raises:
            OSError, RankError: a rank could not write; every rank stops, and earlier checkpoints are untouched.
            NonFiniteError: the weights or the optimisers' state are NaN or infinite; nothing is written.
        """
        ranks, rollouts = _ranks(module), _rollouts(module)
        path = self.path(trainer) / (name or f"rollout-{rollouts:06d}.ckpt")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's debugging flags
            return path
        _flush(trainer)
        file_access = trainer.strategy.checkpoint_io
        if isinstance(file_access, CheckedCheckpointIO):
            with _shards(module, path), file_access.holding_errors_back() as errors:
                trainer.save_checkpoint(path, weights_only=False)  # the optimisers too
            with ranks.together("saving the checkpoint"):
                if errors:
                    raise errors[0]
        else:  # the user's own plugin
            trainer.save_checkpoint(path, weights_only=False)  # the optimisers too
        if name is None:
            self._saved = rollouts
            if trainer.is_global_zero:
                remove_all_but(self.path(trainer), self.keep)
        return path


def save_last_good_state(trainer: L.Trainer, module: L.LightningModule, name: str) -> str:
    """Save a run that is about to stop on an error, where ``--ckpt_path auto`` looks. A collective call.

    Returns:
        The file, as the end of a sentence: "saved in …", or that ``fast_dev_run`` saves nothing.
    """
    savers = [each for each in trainer.callbacks if isinstance(each, RunCheckpoint)]  # type: ignore[attr-defined]
    saver = savers[0] if savers else RunCheckpoint()
    saver.setup(trainer, module, "fit")
    path = saver.save(trainer, module, name)
    return "not saved, as in every fast_dev_run" if trainer.fast_dev_run else f"saved in {path}"  # type: ignore[attr-defined]


@contextmanager
def _shards(module: Any, path: Path) -> Iterator[None]:
    """While this lasts, a checkpoint of ``module`` names shards beside ``path``; one process needs none."""
    before = module.share_rank_states
    if _ranks(module).size > 1:
        module.share_rank_states = partial(write_shards, _ranks(module), path)
    try:
        yield
    finally:
        module.share_rank_states = before


def remove_all_but(folder: Path, keep: int) -> None:
    """Remove the run's checkpoints but the ``keep`` written last, their shards with them."""
    files = sorted(folder.glob("rollout-*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in files[:-keep]:
        file.unlink(missing_ok=True)
        for shard in folder.glob(f"{file.stem}.rank*.shard"):
            shard.unlink(missing_ok=True)


def _flush(trainer: L.Trainer) -> None:
    for logger in trainer.loggers:
        logger.save()


def _ranks(module: Any) -> Ranks:
    ranks: Ranks = module.ranks
    return ranks


def _rollouts(module: Any) -> int:
    return int(module.rollouts_done)
