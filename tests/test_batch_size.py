from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dblightning.batch_size import CudaMeter, largest_batch
from tests.test_module import build


class Pretended:
    """A device with ``free`` bytes where n images take ``fixed + each · n``."""

    def __init__(self, free: int, fixed: int, each: int) -> None:
        self.free, self.fixed, self.each = free, fixed, each
        self.running: int | None = None

    def trial(self, count: int) -> None:
        self.running = self.fixed + self.each * count

    def available(self) -> int:
        return self.free

    def peak(self, work: Callable[[], None]) -> int:
        work()
        assert self.running is not None
        return self.running


@pytest.mark.parametrize(
    ("free", "most", "expected"),
    [
        (10_000, 100, 70),  # 1000 + 100 n ≤ 8000
        (10_000, 64, 64),  # no more than are wanted
        (1_000, 100, 1),  # not even one fits: try it, sampling itself says so
        (10_000, 1, 1),
    ],
)
def test_the_largest_batch_is_where_the_line_meets_the_budget(free: int, most: int, expected: int) -> None:
    device = Pretended(free, 1_000, 100)
    assert largest_batch(device.trial, most, device) == expected


def test_a_share_out_of_range_is_refused() -> None:
    device = Pretended(1, 1, 1)
    with pytest.raises(ValueError, match="share of memory"):
        largest_batch(device.trial, 2, device, share=1.5)


def test_on_a_cpu_auto_takes_the_whole_batch(backbone: Any) -> None:
    assert build(backbone, rollout_batch_size="auto").sampler.images_at_once(["a"] * 7, torch.device("cpu")) == 7


def test_the_trial_runs_what_a_rollout_runs_at_once(backbone: Any) -> None:
    module = build(backbone, rollout_batch_size="auto")
    module.sampler._try(["a", "b", "c"], torch.device("cpu"))
    assert backbone.rows_run == 3


@pytest.mark.parametrize("size", [0, -1, "most"])
def test_a_rollout_batch_size_that_is_none_is_refused(backbone: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="rollout_batch_size must be"):
        build(backbone, rollout_batch_size=size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_memory_is_counted_by_its_allocator() -> None:
    meter = CudaMeter(torch.device("cuda"))
    before = meter.available()
    assert meter.peak(lambda: torch.empty(2**22, device="cuda").sum()) >= 2**24
    assert 0 < meter.available() <= before
