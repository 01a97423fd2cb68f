"""Checkpoint files: checked, saved in time, kept few, found again.

A checkpoint file is what ``torch.save`` writes, followed by a digest of it; ``torch.load`` reads it as it is. With
several processes each writes its replay buffer and random state to a shard beside the file, which names them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from dblightning.distributed import Ranks
from dblightning.lightning_internals import finish_logging_of_batch

#: exit code of a run that a signal stopped after it had saved itself: EX_TEMPFAIL of sysexits.h, "try again later"
PREEMPTED = 75
MARK = b"dblightning sha256 "
FOOTER = len(MARK) + hashlib.sha256().digest_size


class DamagedCheckpointError(ValueError):
    """A file that is cut short, altered or without one of its shards."""


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


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def serialized(state: Any) -> bytes:
    """``state`` as ``torch.save`` writes it, and its digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    return body + MARK + hashlib.sha256(body).digest()


def write_atomically(data: bytes, path: str | Path) -> None:
    """Put ``data`` at ``path`` so that at any moment the old file or the new one is there, never a part.

    Raises:
        OSError: it could not be written, on a full disk for instance; what was at ``path`` before is untouched.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise OSError(
            error.errno,
            f"cannot save {path} ({len(data) / 1e6:.0f} MB): {reason}. Earlier checkpoints are untouched; "
            "make room, then resume with --ckpt_path auto",
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # and the rename itself
    finally:
        os.close(folder)


def read_intact(path: str | Path) -> Any:
    """What :func:`write_atomically` and :func:`serialized` wrote, on the CPU; a plain ``torch.save`` file too.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: the file is cut short or altered.
    """
    data = Path(path).read_bytes()
    body, footer = data[:-FOOTER], data[-FOOTER:]
    if not footer.startswith(MARK):
        body = data  # of another program, or cut short: then it has no table of contents and cannot be loaded
    elif hashlib.sha256(body).digest() != footer[len(MARK) :]:
        raise DamagedCheckpointError(f"{path} is damaged: its contents do not match its SHA-256 digest")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is not an intact checkpoint ({type(error).__name__}: {error})") from error


def check_ours(checkpoint: Any, name: str = "the checkpoint") -> None:
    """Refuse what no training run of this package saved.

    Raises:
        ValueError: naming the file and what to do.
    """
    if not isinstance(checkpoint, dict) or not {"dblightning", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"{name} was not saved by a training run of this package; give one of a run's checkpoints/*.ckpt, or start "
            "from an exported adapter (model.init_adapter)"
        )


def latest_intact(folder: str | Path, exclude: str | Path | None = None) -> Path | None:
    """The latest intact checkpoint of a folder, shards included; None where there is none.

    Args:
        folder: where to look for ``*.ckpt``.
        exclude: a file to leave out.
    """
    files = [file for file in Path(folder).glob("*.ckpt") if exclude is None or file != Path(exclude)]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            _check_shards(file, read_intact(file))
        except (OSError, DamagedCheckpointError) as error:
            warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
        else:
            return file
    return None


def _check_shards(file: Path, checkpoint: dict[str, Any]) -> None:
    """Every shard is there in full size; its digest is checked by the process that loads it."""
    for entry in checkpoint.get("dblightning", {}).get("ranks", ()):
        shard = file.parent / entry["shard"] if "shard" in entry else None
        if shard is not None and (not shard.exists() or shard.stat().st_size != entry["bytes"]):
            raise DamagedCheckpointError(f"{file} lacks its shard {shard.name}, or a part of it")


def write_shards(ranks: Ranks, path: str | Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Write this rank's state beside a checkpoint that is about to be written; returns the entries of all ranks.

    The name holds the digest's first digits, so the shards of a file at the same path are never written over.
    """
    with ranks.together("writing a checkpoint's shard"):
        data = serialized(state)
        name = f"{Path(path).stem}.rank{ranks.rank}.{data[-32:].hex()[:8]}.shard"
        write_atomically(data, Path(path).with_name(name))
    return ranks.gather({"shard": name, "bytes": len(data)})


def read_shard(folder: str | Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A rank's state from its entry in the checkpoint: itself, or what its shard in ``folder`` holds."""
    if "shard" not in entry:
        return entry
    try:
        state: dict[str, Any] = read_intact(Path(folder) / entry["shard"])
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"the checkpoint's shard {entry['shard']} is not in {folder}: copy the shards along with the checkpoint, "
            "and on several nodes save to a folder that all of them see"
        ) from error
    return state


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's file access through :func:`write_atomically` and :func:`read_intact`; remote addresses as before."""

    def __init__(self) -> None:
        self.held_back: list[Exception] | None = None

    @contextmanager
    def holding_errors_back(self) -> Iterator[list[Exception]]:
        """Errors of saving are collected: rank 0 alone writes, and must not leave the ranks' common save early."""
        self.held_back = []
        try:
            yield self.held_back
        finally:
            self.held_back = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            write_atomically(serialized(checkpoint), path)
        except Exception as error:
            if self.held_back is None:
                raise
            self.held_back.append(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint; its folder is noted in it, for the shards.

        Raises:
            DamagedCheckpointError: naming the latest intact checkpoint in the same folder.
            ValueError: a checkpoint of another program.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        try:
            checkpoint: dict[str, Any] = read_intact(path)
            check_ours(checkpoint, str(path))
            _check_shards(Path(path), checkpoint)
        except DamagedCheckpointError as error:
            other = latest_intact(Path(path).parent, exclude=path)
            advice = f"the latest intact one is {other}: --ckpt_path {other}" if other else "no other is in its folder"
            raise DamagedCheckpointError(f"{error}; {advice}") from error
        checkpoint["dblightning"]["folder"] = str(Path(path).parent)
        return checkpoint


# ── when to save ─────────────────────────────────────────────────────────────────────────────────────────────────────


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
