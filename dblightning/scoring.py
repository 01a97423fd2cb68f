"""Score a rollout's images, part by part, while the next part is sampled."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from dblightning.rewards.base import RewardMetric


class RewardQueue:
    """Takes parts of a rollout as they are made; gives the whole rollout's rewards.

    With ``overlap`` one thread scores, on a stream of its own where the images are on a GPU, so that sampling goes on
    meanwhile: worth it for rewards that run on the CPU (JPEG size) or leave the GPU half empty. Scores are those of the
    same parts scored in turn. Use it as a context manager: at the end of the block the thread is gone.

    Args:
        reward: what scores.
        overlap: score in the background; False scores when :meth:`rewards` is called, all parts at once.
    """

    def __init__(self, reward: RewardMetric, overlap: bool) -> None:
        self.reward = reward
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward") if overlap else None
        self._stream: torch.cuda.Stream | None = None
        self._scored: list[Future[Tensor]] = []
        self._waiting: list[tuple[Tensor, list[str]]] = []

    def __enter__(self) -> RewardQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def put(self, images: Tensor, prompts: list[str]) -> None:
        """The next part: images (B, 3, H, W) in [0, 1] and their prompts."""
        if self._pool is None:
            self._waiting.append((images, prompts))
            return
        ready = None
        if images.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(images.device)
            ready = torch.cuda.current_stream(images.device).record_event()
            images.record_stream(self._stream)
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)  # a thread begins without it
        self._scored.append(self._pool.submit(self._score, images, prompts, ready, autocast))

    def _score(
        self, images: Tensor, prompts: list[str], ready: torch.cuda.Event | None, autocast: tuple[bool, torch.dtype]
    ) -> Tensor:
        enabled, dtype = autocast
        with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled), torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(ready)  # type: ignore[arg-type]
            scores = self.reward.score(images, prompts).detach()
            if self._stream is not None:
                self._stream.synchronize()  # this thread waits, sampling does not
        return scores

    def rewards(self) -> Tensor:
        """All parts' rewards in order, (B,). What the reward raised is raised here."""
        if self._pool is not None:
            return torch.cat([future.result() for future in self._scored])
        images, prompts = zip(*self._waiting, strict=True)
        return self.reward.score(torch.cat(images), [text for part in prompts for text in part]).detach()
