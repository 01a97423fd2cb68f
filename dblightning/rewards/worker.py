"""Score images in the background while the next batch is being sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class RewardWorker:
    """One thread, and on a GPU one stream, that scores batches in the order they were submitted.

        with RewardWorker(reward) as worker:
            scores = [worker.submit(sample(batch), batch["prompt"]) for batch in batches]
        rewards = torch.cat([future.result() for future in scores])

    PyTorch and Pillow release Python's lock while they compute, so sampling continues meanwhile. An exception in the
    reward comes out of ``future.result()`` with its own traceback, and out of the next ``submit``; batches still
    waiting are not scored, so training stops at the first failure. Scores carry no gradient; autocast is what it is
    where ``submit`` is called. The images must not be changed in place before their result is there.

    Args:
        reward: a ``RewardMetric``, or any function of images (B, 3, H, W) and prompts, such as ``reward.score_parts``.
        max_pending: batches that may wait or run; ``submit`` blocks when there are more, which bounds the memory held.

    Raises:
        ValueError: max_pending < 1.
    """

    def __init__(self, reward: Callable[..., Any], max_pending: int = 2) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be >= 1, got {max_pending}")
        # a RewardMetric called directly would be torchmetrics' forward, which updates its running mean
        self._score: Callable[..., Any] = getattr(reward, "score", reward)
        self._room = threading.BoundedSemaphore(max_pending)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._failure: BaseException | None = None

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Future:
        """Queue a batch; ``result()`` of what is returned waits for its scores.

        Raises:
            RuntimeError: the worker is closed, or failed on an earlier batch (whose exception is the cause).
        """
        self._room.acquire()
        try:
            if self._failure is not None:
                raise RuntimeError("the reward worker stopped on an earlier batch, see above") from self._failure
            ready = None
            if images.is_cuda:
                # the worker's stream may not read the images before this one has written them
                ready = torch.cuda.current_stream(images.device).record_event()
            kind = images.device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)  # a thread begins without it
            future = self._pool.submit(self._run, images, list(prompts), ready, autocast)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self, cancel: bool = False) -> None:
        """Wait for the batches submitted so far, or ``cancel`` those that have not begun. Closing twice is harmless."""
        self._pool.shutdown(wait=True, cancel_futures=cancel)

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    @torch.no_grad()
    def _run(
        self, images: Tensor, prompts: list[str], ready: torch.cuda.Event | None, autocast: tuple[bool, torch.dtype]
    ) -> Any:
        if self._failure is not None:
            raise RuntimeError("not scored: the reward worker stopped on an earlier batch") from self._failure
        enabled, dtype = autocast
        try:
            if ready is None:
                with torch.autocast(images.device.type, dtype, enabled):
                    return self._score(images, prompts)
            if images.device not in self._streams:
                self._streams[images.device] = torch.cuda.Stream(images.device)
            stream = self._streams[images.device]
            with torch.cuda.stream(stream), torch.autocast(images.device.type, dtype, enabled):
                stream.wait_event(ready)
                images.record_stream(stream)
                scores = self._score(images, prompts)
            # whoever reads the result reads finished numbers, on whichever stream
            stream.synchronize()
            return scores
        except BaseException as error:
            self._failure = error
            raise
