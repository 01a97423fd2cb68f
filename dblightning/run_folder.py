"""One run per folder: a lock while it lasts, and nothing of an earlier run replaced without a word."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from dblightning.adapters import read_metadata
from dblightning.checkpointing import latest_intact, read_intact
from dblightning.flat_settings import flat
from dblightning.loggers import drop_table
from dblightning.run_state import RunState
from dblightning.same_run import changed_settings

#: seconds between two signs of life of a lock's owner
HEARTBEAT_S = 15.0
#: seconds without one after which the owner, on another machine, counts as dead
SILENCE_S = 60.0


class FolderInUseError(ValueError):
    """Another run writes to the same place."""


class FolderLock:
    """A file that says who writes to a place; the process that made it removes it at the end.

    A dead process does not block the place: on the same machine its id is looked up, with its start time because ids
    are used again; on another one its lock is watched for ``SILENCE_S``, because a living owner touches it every
    ``HEARTBEAT_S``. No clock is compared, so this holds on a shared file system too.

    Args:
        place: the file or folder to guard; the lock is ``.<name>.lock`` beside it.
        silence_s: seconds to watch another machine's lock.
    """

    def __init__(self, place: Path, silence_s: float = SILENCE_S) -> None:
        self.place = place
        self.path = place.parent / f".{place.name}.lock"
        self.silence_s = silence_s
        self._ended = threading.Event()
        self._own: dict[str, Any] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderInUseError: naming the process that holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = {**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        while not self._create(own):
            self._remove(self.check_free())
        self._own = own
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()

    def check_free(self) -> dict[str, Any] | None:
        """Refuse a lock that a living process holds; returns a dead one's contents.

        Raises:
            FolderInUseError: naming the process that holds it.
        """
        seen = self._read()
        if seen is not None and self._alive(seen):
            raise FolderInUseError(
                f"another run (process {seen.get('pid')} on {seen.get('host')}, since {seen.get('since')}) writes to "
                f"{self.place}; stop it, or choose another folder"
            )
        return seen

    def release(self) -> None:
        """Give the lock back; harmless when repeated, or when another process has taken it meanwhile."""
        self._ended.set()
        if self._own is not None and self._read() == self._own:
            self.path.unlink(missing_ok=True)
        self._own = None

    def _create(self, own: dict[str, Any]) -> bool:
        """Make the file with its whole contents at once, unless there is one: a hard link, which never replaces."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        aside.write_text(json.dumps(own), encoding="utf-8")
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(own))
            except FileExistsError:
                return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _alive(self, owner: dict[str, Any]) -> bool:
        here = _this_process()
        if owner.get("host") == here["host"] and owner.get("processes") == here["processes"]:
            return _start_time(owner.get("pid")) == owner.get("started")
        first, end = self._touched(), time.monotonic() + self.silence_s
        while time.monotonic() < end and first is not None:
            time.sleep(min(1.0, self.silence_s / 10))
            if self._touched() != first:
                return self._touched() is not None
        return False

    def _touched(self) -> int | None:
        try:
            with self.path.open("rb") as file:  # opening makes a network file system ask its server
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Remove a dead process's lock, and not one that has taken its place meanwhile."""
        aside = self.path.with_name(f"{self.path.name}.stale.{os.getpid()}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if stale is not None and json.loads(aside.read_text(encoding="utf-8")) != stale:
            os.rename(aside, self.path)
            return
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if self._read() == self._own:
                    os.utime(self.path)
            except OSError:  # a file system that is away for a while
                continue


def _this_process() -> dict[str, Any]:
    try:
        processes = os.readlink("/proc/self/ns/pid")  # a container's process ids say nothing outside it
    except OSError:
        processes = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "processes": processes, "pid": pid, "started": _start_time(pid)}


def _start_time(pid: Any) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None where there is no such process."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc, as on macOS: alive, but of unknown age
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return None
    return "unknown"


class RunGuard(L.Callback):
    """Refuse a fit that would replace another run's files, or write where another run is writing.

    Every ``RewardRLModule`` brings one. It asks the trainer's callbacks for their ``outputs(trainer, module)``: place
    written to → files there now. A fit that resumes from a checkpoint may replace them, one with ``overwrite`` too.

    Args:
        overwrite: replace the files of an earlier run; its checkpoints are removed when training starts.

    Raises:
        FolderInUseError: another process writes to one of the places.
        ValueError: files of an earlier run are there; settings that differ are named.
    """

    def __init__(self, overwrite: bool = False) -> None:
        self.overwrite = overwrite
        self._locks: list[FolderLock] = []
        self._own: set[Path] = set()  # places that fits of this trainer have written to
        self._replaced: list[Path] = []

    def check(self, trainer: L.Trainer, module: RunState, resumes: bool) -> dict[Path, list[Path]]:
        """Refuse a fit that may not start; what it writes: place → files there now. Nothing is written or locked.

        The command line calls it before the fit, which begins with files of Lightning's loggers.

        Raises:
            FolderInUseError, ValueError: as of the class.
        """
        outputs = _outputs(trainer, module)
        for place in outputs:
            if not any(lock.place == place for lock in self._locks):
                FolderLock(place).check_free()
        there = [file for place, files in outputs.items() if place not in self._own for file in files]
        if there and not self.overwrite and not resumes:
            raise ValueError(_refusal(module, there))
        return outputs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not in setup, where the trainer does not know yet whether it resumes
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, RunState)
        with pl_module.ranks.together("claiming the run's folders"):
            # on every rank: finding a log folder is an exchange
            outputs = self.check(trainer, pl_module, bool(trainer.ckpt_path))
        with pl_module.ranks.together("locking the run's folders"):
            if trainer.is_global_zero:
                self._claim(trainer, outputs)

    def _claim(self, trainer: L.Trainer, outputs: dict[Path, list[Path]]) -> None:
        for place in outputs:
            lock = FolderLock(place)
            lock.acquire()
            self._locks.append(lock)
            _remove_leftovers(place)
        if self.overwrite and not trainer.ckpt_path:
            # checkpoints when training starts: until then the earlier run can still be resumed
            earlier = [file for place, files in outputs.items() if place not in self._own for file in files]
            self._replaced = [file for file in earlier if file.suffix == ".ckpt"]
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    drop_table(logger)
        self._own |= set(outputs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for file in self._replaced:  # or --ckpt_path auto would find the earlier run's
            file.unlink(missing_ok=True)
            for shard in file.parent.glob(f"{file.stem}.rank*.shard"):
                shard.unlink(missing_ok=True)
        self._replaced = []

    def _release(self) -> None:
        while self._locks:
            self._locks.pop().release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()


def _outputs(trainer: L.Trainer, module: RunState) -> dict[Path, list[Path]]:
    """Outputs of the fit: place → files that are there already."""
    outputs: dict[Path, list[Path]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callable(of := getattr(callback, "outputs", None)):
            outputs |= of(trainer, module)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            file = Path(logger.log_dir) / "metrics.csv"
            outputs[file] = [file] if file.exists() else []
    return {Path(os.path.abspath(place)): files for place, files in outputs.items()}


def _remove_leftovers(place: Path) -> None:
    """Files that a killed process had begun to write; whoever holds the lock knows that nobody writes them now."""
    for file in place.glob("*.part") if place.is_dir() else ():
        if file.name.split(".")[-2].isdigit():
            file.unlink(missing_ok=True)


def _refusal(module: RunState, files: list[Path]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    changed = _changed(module, files)
    what = "the same settings"
    if changed is None:
        what = "settings unknown here"
    elif changed:
        what = "other settings: " + ", ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in changed)
    resume = "--ckpt_path auto resumes it, " if any(file.suffix == ".ckpt" for file in files) and not changed else ""
    return (
        f"{files[0]}{more} would be replaced, of an earlier run with {what}; {resume}--overwrite replaces it, or "
        "choose another folder"
    )


def _changed(module: RunState, files: Iterable[Path]) -> list[tuple[str, tuple[Any, Any]]] | None:
    """Settings in which an earlier run differs from this one, from its checkpoint or adapter; None: it has neither."""
    own = flat(module.hparams)  # as adapter files hold them
    saved: dict[str, Any] | None = None
    reward = None
    for file in files:
        try:
            if file.suffix == ".ckpt" and (found := latest_intact(file.parent)) is not None:
                state = read_intact(found)
                saved, reward = (
                    state.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {}),
                    state["dblightning"]["facts"]["reward"],
                )
            elif file.suffix == ".safetensors":
                facts = read_metadata(file)
                saved = {name: None for name in own} | dict(facts.get("hyperparameters", {}))  # null is left out there
                reward = facts.get("reward")
        except (OSError, ValueError, KeyError):
            continue
        if saved is not None:
            break
    if saved is None:
        return None
    changed = list(changed_settings(saved, own).items())
    if reward not in (None, module.reward.name):
        changed.insert(0, ("reward", (reward, module.reward.name)))
    return changed
