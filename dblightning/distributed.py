"""Exchanges between the processes of a run: small values, errors, gradients. One process needs none of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

#: how long a process waits for others to answer the roll call, once it knows that one of them is gone
ROLL_CALL_S = 10.0


class RankError(RuntimeError):
    """Another process of the run failed or is gone; the message names it."""


class DDP(DDPStrategy):
    """Lightning's DDP with the time after which a silent process ends the run as a setting.

    Args:
        timeout_s: seconds one process waits for the others. It must exceed what the ranks' rollouts and rewards may
            differ by. A process that dies is noticed at once where its machine lives on; this bounds all other cases.
        options: as of ``DDPStrategy``.
    """

    def __init__(self, timeout_s: float = 600.0, **options: Any) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0 seconds, got {timeout_s}")
        super().__init__(timeout=timedelta(seconds=timeout_s), **options)


class Ranks:
    """The processes of this run; with one process every exchange is with itself.

    Small values travel over gloo, whatever carries the gradients: it works on host memory and notices a dead peer by
    its closed connection, where NCCL waits for its time-out.
    """

    def __init__(self) -> None:
        self.timeout: timedelta | None = None  # None: torch's own
        self._world: Any = None
        self._group: Any = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return dist.get_rank() if self.size > 1 else 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. A collective call: every rank makes it.

        Raises:
            RankError: a rank is gone or silent for longer than the time-out.
        """
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._naming_the_lost():
            dist.all_gather_object(gathered, value, group=self._host_group())
        return gathered

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Work that every rank does for itself: if it fails on one, all stop with that rank's error.

        Without this the others would wait in their next exchange for a rank that never comes.

        Args:
            what: the work, for the message.

        Raises:
            RankError: the work failed on another rank. On the failing rank its own error is raised.
        """
        failure: Exception | None = None
        try:
            yield
        except RankError:
            raise  # the others know
        except Exception as error:
            failure = error
        texts = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise RankError(f"{what} failed on another process, so all stop. " + "; ".join(failed))

    def mean(self, values: dict[str, float], weight: float, largest: Sequence[str] = ()) -> dict[str, float]:
        """Each value's weighted mean over the ranks that have it. A collective call.

        Args:
            values: of this rank.
            weight: what this rank's values count.
            largest: names of which the largest value is taken instead.
        """
        pairs: dict[str, list[tuple[float, float]]] = {}
        for share, each in self.gather((weight, values)):
            for name, value in each.items():
                pairs.setdefault(name, []).append((share, value))
        means = {name: sum(w * v for w, v in found) / sum(w for w, _ in found) for name, found in pairs.items()}
        return means | {name: max(value for _, value in pairs[name]) for name in largest if name in pairs}

    def average_gradients(self, parameters: Sequence[Tensor], weight: float = 1.0) -> None:
        """Replace each gradient by the ranks' mean, in one exchange.

        Args:
            parameters: the same on every rank; one without a gradient counts as zero.
            weight: what this rank's gradient counts; over the ranks the weights average 1.
        """
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if weight != 1:
            flat *= weight
        with self._naming_the_lost():
            dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _host_group(self) -> Any:
        if self._world is not dist.group.WORLD:
            self._world = dist.group.WORLD
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        return self._group

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # a closed connection, or the time-out
            lost = self._lost()
            if not lost:
                raise
            names = ", ".join(map(str, lost))
            raise RankError(
                f"rank {names} of {self.size} was killed, crashed or hangs, so rank {self.rank} stops too. Resume from "
                "the last checkpoint with --ckpt_path auto; if the rank was only slow, raise the strategy's timeout_s"
            ) from error

    def _lost(self) -> list[int]:
        """Ranks that do not answer a roll call held over the rendezvous store."""
        store = dist.distributed_c10d._get_default_store()
        keys = [f"dblightning/roll_call/{rank}" for rank in range(self.size)]
        try:
            store.set(keys[self.rank], "here")
            try:
                store.wait(keys, timedelta(seconds=ROLL_CALL_S))
            except RuntimeError:  # time-out: somebody is missing
                return [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            return [0]  # the store itself is gone, and without torchrun rank 0 holds it
        return []
