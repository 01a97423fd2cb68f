"""Number of images that fit into a device's memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Meter(Protocol):
    """A device's memory, in bytes."""

    def available(self) -> int:
        """Bytes that could be allocated now."""

    def peak(self, work: Callable[[], None]) -> int:
        """The most that ``work`` has allocated at once."""


class CudaMeter:
    """Memory of a CUDA device, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self) -> int:
        """Free bytes of the device, after torch has returned its unused cache."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, work: Callable[[], None]) -> int:
        """Bytes that ``work`` has allocated at most, above what was allocated before it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def largest_batch(trial: Callable[[int], None], most: int, meter: Meter, share: float = 0.8) -> int:
    """The most images, up to ``most``, whose work takes at most ``share`` of the memory available.

    Two small trials give the memory of one image and what each further one adds, from which it is a straight line.

    Args:
        trial: does the work for a number of images.
        most: not more than these, at least 1.
        meter: of the device's memory.
        share: of the available memory, in (0, 1]; the rest is for fragmentation and for what grows later.

    Raises:
        ValueError: ``share`` out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of memory must be in (0, 1], got {share}")
    few = min(4, most)
    if few == 1:
        return 1
    trial(1)  # the first call also loads kernels and plans convolutions
    budget = share * meter.available()
    one, several = meter.peak(lambda: trial(1)), meter.peak(lambda: trial(few))
    each = (several - one) / (few - 1)
    if each <= 0:
        return most
    return max(1, min(most, 1 + int((budget - one) / each)))
