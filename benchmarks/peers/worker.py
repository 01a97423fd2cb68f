"""Shared by the contestants of the training benchmark: its settings, its clocks, its counts, and how it is driven.

A contestant is a process that stays alive, trained and warm, and does one round (a rollout and its policy updates)
whenever its standard input says so; so rounds of several contestants can be interleaved. Needs torch alone: it also
runs in the peers' own environments.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

#: where the seconds of a round go; what is in none of them is "other"
PHASES = ("sampling", "decoding", "rewards", "update")


@dataclass(frozen=True)
class Settings:
    """The work of one round, and how the policy is trained.

    Args:
        images: sampled per round and process, a multiple of ``sample_batch`` and of ``samples_per_prompt``.
        sample_batch: images sampled at once.
        samples_per_prompt: images of one prompt side by side.
        steps, guidance_scale: of the sampler (DDIM, eta 1).
        micro_batch: transitions per forward and backward pass.
        optimizer_steps: per round; ``images`` must be a multiple of them.
        learning_rate, weight_decay, clip_range, max_grad_norm, kl_weight: of the policy update.
        seed: of prompts, noise and adapter.
        processes: data-parallel processes.
        train_fraction: share of every image's steps that is trained.
        config: a run configuration of this package that replaces all of the above but seed and processes (contestant
            "ours").
        compile: what of the denoiser is compiled (contestant "ours").
        per_prompt: advantages by the prompt's own mean and deviation, else by the batch's.

    Raises:
        ValueError: numbers that do not divide as stated.
    """

    images: int = 16
    sample_batch: int = 16
    samples_per_prompt: int = 4
    steps: int = 20
    guidance_scale: float = 3.0
    micro_batch: int = 8
    optimizer_steps: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    clip_range: float = 5e-3
    max_grad_norm: float = 1.0
    kl_weight: float = 0.05
    seed: int = 0
    processes: int = 1
    train_fraction: float = 1.0
    config: str | None = None
    compile: str = "none"
    per_prompt: bool = True

    def __post_init__(self) -> None:
        for name in ("sample_batch", "samples_per_prompt", "optimizer_steps"):
            if self.images % getattr(self, name):
                raise ValueError(f"images ({self.images}) must be a multiple of {name} ({getattr(self, name)})")
        if self.transitions % (self.optimizer_steps * self.micro_batch):
            raise ValueError(
                f"{self.transitions} transitions do not divide into {self.optimizer_steps} optimiser steps of "
                f"micro-batches of {self.micro_batch}; change images, optimizer_steps or micro_batch"
            )

    @property
    def transitions(self) -> int:
        """Transitions trained per round and process: ``train_fraction`` of every image's steps, once each."""
        return self.images * int(self.steps * self.train_fraction)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.transitions // (self.optimizer_steps * self.micro_batch)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Meter:
    """Clocks and counts of one contestant; a phase inside another one is taken out of the outer one.

    Args:
        clock: what phases are measured by. CPU seconds of the process are disturbed less by a busy machine; where
            processes wait for each other, take ``time.perf_counter``.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.clock = clock
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.counts: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        # an optimiser whose parameters have no gradients does not train: count what moves weights
        if any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"]):
            self.counts["optimizer_steps"] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self.clock()
        if self._open:
            self.phases[self._open[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Charge every call of ``owner.method`` to a phase."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def watch(self, unet: torch.nn.Module, vae: Any, text_encoder: torch.nn.Module, guided: bool) -> None:
        """Count denoiser rows (with and without gradients), transitions, decoded images and encoded texts."""

        @torch.compiler.disable  # a compiled denoiser must not trace, and freeze, the counting
        def rows(module: Any, args: Any, kwargs: Any) -> None:
            count = len(args[0] if args else kwargs["sample"])
            if torch.is_grad_enabled():
                self.counts["denoiser_rows_with_grad"] += count
                self.counts["transitions"] += count // 2 if guided else count
            else:
                self.counts["denoiser_rows_without_grad"] += count

        def texts(module: Any, args: Any, kwargs: Any) -> None:
            self.counts["texts_encoded"] += len(args[0] if args else kwargs["input_ids"])

        unet.register_forward_pre_hook(rows, with_kwargs=True)
        text_encoder.register_forward_pre_hook(texts, with_kwargs=True)
        decode = vae.decode

        def counted(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts["images"] += len(latents)
            with self.phase("decoding"):
                return decode(latents, *args, **kwargs)

        vae.decode = counted

    def start(self) -> None:
        """Begin a round."""
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.counts.clear()
        self.began = time.perf_counter(), time.process_time(), self.clock()

    def stop(self, **facts: Any) -> dict[str, Any]:
        """The round's record: seconds on the wall and of the CPU, phases, counts, and ``facts``."""
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        phases = {**self.phases, "other": self.clock() - self.began[2] - sum(self.phases.values())}
        return {"seconds": seconds, "cpu_seconds": cpu, "phases": phases, "counts": dict(self.counts), **facts}


class Line:
    """The commands from standard input and the answers to standard output, one JSON object per line.

    Everything else that is printed goes to standard error, so that no library can garble an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any]:
        """The next command; the end of input is {"do": "quit"}."""
        text = sys.stdin.readline()
        return json.loads(text) if text else {"do": "quit"}

    def answer(self, record: dict[str, Any]) -> None:
        self._answers.write(json.dumps(record) + "\n")
        self._answers.flush()


def serve(start: Callable[[Settings, Meter], tuple[Callable[[], dict[str, Any]], Callable[[Path], None]]]) -> None:
    """Run a contestant made of plain functions.

    Args:
        start: settings and meter → (one round, returning facts to report; export of the adapter to a folder).
    """
    line = Line()
    torch.set_num_threads(1)
    meter = Meter()
    one_round, export = start(Settings(**json.loads(sys.argv[1])), meter)
    line.answer({"ready": versions()})
    while (command := line.next())["do"] != "quit":
        if command["do"] == "export":
            export(Path(command["folder"]))
            line.answer({"exported": command["folder"]})
        else:
            meter.start()
            line.answer(meter.stop(**one_round()))


def versions() -> dict[str, str]:
    """Versions of what the contestants are made of, where installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "peft", "transformers", "lightning", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
