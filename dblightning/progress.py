"""Progress where output is not a terminal, and libraries' advertisements left out of it."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any, Protocol

import lightning as L
from tqdm import tqdm

from dblightning.run_state import RunState

#: beginnings of messages that say nothing about a run
ADVERTISEMENTS = (
    "💡 Tip",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "`Trainer.fit` stopped:",
    "You are using a CUDA device",
    "Running in `fast_dev_run` mode",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "LOCAL_RANK:",
)
#: messages of warnings about what this package does on purpose
WARNINGS = (
    ".*does not have many workers",
    ".*Experiment logs directory .* exists and is not empty",
    ".*Checkpoint directory .* exists and is not empty",
    ".*The number of training batches .* is smaller than the logging interval",
    ".*LightningCLI's args parameter",
    ".*Found .* module.* in eval mode",
    ".*`torch_dtype` is deprecated",
    ".*isinstance.treespec, LeafSpec.+ is deprecated",
    ".*trainer is in `fast_dev_run`",
)


def quiet_libraries() -> None:
    """Leave advertisements, notices and known warnings of libraries out of the output; errors and our own stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not on_a_terminal():
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if _no_advertisement not in logger.filters:
            logger.addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().strip().startswith(ADVERTISEMENTS)


def on_a_terminal() -> bool:
    """Whether a bar that redraws itself can be seen: a terminal, or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """For people: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class RolloutProgress(L.Callback):
    """One line per rollout where standard output is not a terminal; there, Lightning's bar moves once per rollout.

    Every ``RewardRLModule`` brings one. ``Trainer(enable_progress_bar=False)`` turns both off.
    """

    def __init__(self) -> None:
        self._active = False
        self._first, self._start = 0, 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar = trainer.progress_bar_callback
        self._active = bar is not None and not on_a_terminal()
        if bar is not None and self._active:
            bar.disable()
        self._active &= trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RunState)
        self._first, self._start = pl_module.rollouts_done, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not self._active:
            return
        assert isinstance(pl_module, RunState)
        done, total = pl_module.rollouts_done, pl_module.total_rollouts
        values = trainer.callback_metrics
        parts = [f"rollout {done}/{total}" if total is not None else f"rollout {done}"]
        shown = [
            (f"{name}{learner.suffix}", learner.tag(key), text)
            for learner in pl_module.learners
            for name, key, text in (("reward", "train/reward", "+.4g"), ("KL", "train/kl", ".3g"))
        ]
        for name, key, text in [*shown, ("images/s", "time/images_per_s", ".3g")]:
            if key in values:
                parts.append(f"{name} {float(values[key]):{text}}")
        if total is not None and done > self._first:
            left = (time.monotonic() - self._start) / (done - self._first) * max(0, total - done)
            parts.append(f"ETA {duration(left)}")
        print("  ".join(parts), flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._active or trainer.sanity_checking:
            return
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values:
            print(
                "  ".join(["validation", *(f"{name} {float(value):+.4g}" for name, value in values.items())]),
                flush=True,
            )


class Progress(Protocol):
    """A counter of images: tqdm's bar, or lines."""

    def update(self, n: int, made: bool = True) -> Any:
        """Count ``n`` more images; ``made`` is false for those found on disk."""

    def close(self) -> None:
        """End the display."""


class Lines:
    """A line every so many units: how many are done, per second, and how long the rest takes.

    Args:
        total: units in all; None: unknown.
        unit: their name.
        every: units between two lines; None: a twentieth of all, at least 1.
    """

    def __init__(self, total: int | None, unit: str = "image", every: int | None = None) -> None:
        self.total, self.unit = total, unit
        self.every = every or max(1, (total or 2000) // 20)
        self.done = self.made = 0
        self._next = self.every
        self._start = time.monotonic()

    def update(self, n: int, made: bool = True) -> None:
        """Count ``n`` more; those not ``made`` were there already and say nothing about the speed."""
        self.done += n
        self.made += n if made else 0
        if self.done < self._next and self.done != self.total:
            return
        self._next = self.done - self.done % self.every + self.every
        seconds = time.monotonic() - self._start
        parts = [f"{self.done}/{self.total} {self.unit}s" if self.total else f"{self.done} {self.unit}s"]
        if self.made and seconds > 0:
            parts.append(f"{self.made / seconds:.3g} {self.unit}s/s")
            if self.total:
                parts.append(f"ETA {duration((self.total - self.done) * seconds / self.made)}")
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        """Nothing is left open."""


class Bar(tqdm):
    """tqdm's bar, with the arguments of :class:`Lines`."""

    def update(self, n: float | None = 1, made: bool = True) -> bool | None:
        return super().update(n)


def image_progress(total: int | None, shown: bool = True) -> Progress:
    """A bar on a terminal, lines elsewhere, nothing where it is not ``shown``."""
    if shown and not on_a_terminal():
        return Lines(total)
    # smoothing 0: the mean speed, because methods differ in theirs
    return Bar(total=total, unit="image", smoothing=0, disable=not shown, dynamic_ncols=True)
