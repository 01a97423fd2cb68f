"""Scoring in the background: order, overlap, bounded queue, failures that surface."""

from __future__ import annotations

import threading
import traceback

import pytest
import torch
from torch import Tensor

from dblightning.rewards import JPEGCompressibility, RewardWorker

#: seconds after which a test that hangs is a failure
PATIENCE = 20


def batch(value: float) -> Tensor:
    return torch.full((1, 3, 2, 2), value)


def test_results_come_in_the_order_of_submission_and_are_the_rewards_own() -> None:
    reward = JPEGCompressibility(offset_kb=0)
    batches = [torch.rand(2, 3, 16 + i, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with RewardWorker(reward) as worker:
        futures = [worker.submit(images, ["", ""]) for images in batches]
        scores = [future.result(PATIENCE) for future in futures]
    for images, score in zip(batches, scores, strict=True):
        assert torch.equal(score, reward.score(images, ["", ""]))
    assert reward.count == 0  # scoring is not updating the running mean


def test_the_caller_goes_on_while_a_batch_is_scored() -> None:
    sampled = threading.Event()

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        assert sampled.wait(PATIENCE)  # ends only once the caller has done something after submitting
        return images.mean((1, 2, 3))

    with RewardWorker(score) as worker:
        future = worker.submit(batch(0.5), ["a"])
        sampled.set()
        assert future.result(PATIENCE).item() == 0.5


def test_submitting_waits_when_enough_is_pending() -> None:
    release = threading.Event()
    submitted: list[int] = []

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        release.wait(PATIENCE)
        return images.mean((1, 2, 3))

    with RewardWorker(score, max_pending=2) as worker:

        def submit_all() -> None:
            for index in range(4):
                worker.submit(batch(index / 4), ["a"])
                submitted.append(index)

        thread = threading.Thread(target=submit_all)
        thread.start()
        thread.join(0.3)
        assert submitted == [0, 1]
        release.set()
        thread.join(PATIENCE)
        assert submitted == [0, 1, 2, 3]


def fail_on_dark(images: Tensor, prompts: list[str]) -> Tensor:
    if images.max() == 0:
        raise ZeroDivisionError("too dark")
    return images.mean((1, 2, 3))


def test_an_exception_surfaces_with_its_traceback_and_stops_what_follows() -> None:
    with RewardWorker(fail_on_dark, max_pending=3) as worker:
        good, bad = worker.submit(batch(0.5), ["a"]), worker.submit(batch(0.0), ["b"])
        assert good.result(PATIENCE).item() == 0.5
        with pytest.raises(ZeroDivisionError, match="too dark") as caught:
            bad.result(PATIENCE)
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] == "fail_on_dark"  # where it happened, in the other thread
        with pytest.raises(RuntimeError, match="stopped on an earlier batch") as refused:
            worker.submit(batch(0.5), ["c"])
        assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_batches_waiting_behind_a_failure_are_not_scored() -> None:
    started = threading.Event()
    scored: list[str] = []

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scored.extend(prompts)
        started.wait(PATIENCE)
        return fail_on_dark(images, prompts)

    with RewardWorker(score, max_pending=2) as worker:
        worker.submit(batch(0.0), ["dark"])
        waiting = worker.submit(batch(0.5), ["fine"])
        started.set()
        with pytest.raises(RuntimeError, match="not scored"):
            waiting.result(PATIENCE)
    assert scored == ["dark"]


def test_leaving_on_an_exception_cancels_what_has_not_begun() -> None:
    started, release = threading.Event(), threading.Event()
    scored: list[str] = []

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scored.extend(prompts)
        started.set()
        release.wait(PATIENCE)
        return images.mean((1, 2, 3))

    with pytest.raises(KeyboardInterrupt), RewardWorker(score) as worker:
        worker.submit(batch(0.5), ["first"])
        second = worker.submit(batch(0.5), ["second"])
        started.wait(PATIENCE)
        threading.Timer(0.1, release.set).start()
        raise KeyboardInterrupt
    assert scored == ["first"]
    assert second.cancelled()
    worker.close()  # again, harmlessly


def test_scores_carry_no_gradient_and_parts_come_too() -> None:
    def parts(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"mean": images.mean((1, 2, 3))}

    with RewardWorker(parts) as worker:
        scores = worker.submit(batch(0.5).requires_grad_(), ["a"]).result(PATIENCE)
    assert scores["mean"].item() == 0.5
    assert not scores["mean"].requires_grad


def test_a_queue_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pending must be >= 1, got 0"):
        RewardWorker(fail_on_dark, max_pending=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_worker_waits_for_the_images_to_be_written() -> None:
    """A long kernel writes the images just before they are submitted; its own stream must not read them early."""
    big = torch.rand(4096, 4096, device="cuda")
    with RewardWorker(lambda images, prompts: images.mean((1, 2, 3))) as worker:
        for _ in range(10):
            value = big
            for _ in range(20):
                value = value @ big / 4096
            images = (value * 0 + 0.25).view(1, 1, 4096, 4096).expand(1, 3, 4096, 4096).contiguous()
            assert worker.submit(images, ["a"]).result(PATIENCE).item() == pytest.approx(0.25)


def test_autocast_is_what_it_is_at_submission() -> None:
    seen = []

    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return images.flatten(1).mean(1)

    with RewardWorker(score) as worker:
        with torch.autocast("cpu", torch.bfloat16):
            worker.submit(torch.zeros(1, 3, 2, 2), ["a"])
        worker.submit(torch.zeros(1, 3, 2, 2), ["a"]).result()
    assert seen[0] == (True, torch.bfloat16)
    assert not seen[1][0]
