"""Images per second of each reward, a batch at a time against one image at a time.

    python benchmarks/rewards.py [--batch-size 16] [--size 64] [--device cpu] [--threads 2] [--json OUT]

The models are the small ones of the tests, built by their true classes with random weights: what is measured is the
overhead of a call and of preprocessing, which batching saves. ``--rewards name --set name.weights=PATH`` measures
published weights instead. JPEG is measured at 512×512, threads against a serial loop.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.publish import opening, parsed, publish
from dblightning.rewards import JPEGCompressibility, RewardMetric, build_reward
from dblightning.rewards.score import read_options
from tests.rewards import tiny

PROMPTS = [f"a photo of {number} cats" for number in range(64)]


def small_rewards(folder: Path) -> dict[str, dict]:
    """Constructor arguments of each reward with a small model, written to ``folder`` in the published formats."""
    from dblightning.rewards.vila_model import from_praxis, save_vila

    load = lambda name: dict(np.load(tiny.HERE / name))  # noqa: E731
    save_vila(from_praxis(tiny.vila_parameters(load("vila_tiny.npz"))), folder / "vila.safetensors")
    clip = tiny.save_huggingface_clip(folder / "clip")
    quick_gelu = tiny.save_huggingface_clip(folder / "quick_gelu", "quick_gelu")
    return {
        "image_reward": {"weights": tiny.save_image_reward(folder / "image_reward", load("image_reward_tiny.npz"))},
        "pickscore": {"weights": clip},
        "hpsv2": {"weights": tiny.save_hps(folder / "hps"), "architecture": tiny.OPEN_CLIP_CONFIG},
        "aesthetic": {"weights": tiny.save_aesthetic_head(folder / "head"), "clip_weights": quick_gelu},
        "clip_score": {"weights": clip},
        "vila": {"weights": folder / "vila.safetensors"},
    }


def best_times(runs: list[Callable[[], object]], device: str, rounds: int) -> list[float]:
    """Seconds of each run's fastest round, the one that other processes disturbed least; the runs take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):  # the first warms up
        for run, list_ in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            list_.append(time.perf_counter() - begin)
    return [min(list_[1:]) for list_ in times]


def measure(reward: RewardMetric, batch: int, size: int, device: str, rounds: int) -> dict[str, float]:
    """Images per second with all images at once and with one at a time; every prompt is new to each run."""
    images = tiny.pictures(batch, size, size).to(device)
    reward.to(device)
    prompts = (PROMPTS * batch)[:batch]

    def fresh() -> None:
        reward._weights_changed()  # forget encoded texts

    def together() -> None:
        fresh()
        reward.score(images, prompts)

    def singly() -> None:
        fresh()
        for index in range(batch):
            reward.score(images[index : index + 1], prompts[index : index + 1])

    one, all_ = (batch / seconds for seconds in best_times([singly, together], device, rounds))
    return {"one_by_one": one, "batched": all_, "speedup": all_ / one}


def measure_jpeg(batch: int, rounds: int) -> dict[str, float]:
    images = tiny.pictures(batch, 512, 512)
    rewards = [JPEGCompressibility(num_threads=1), JPEGCompressibility()]
    runs = [lambda reward=reward: reward.score(images, [""] * batch) for reward in rewards]
    one, all_ = (batch / seconds for seconds in best_times(runs, "cpu", rounds))
    return {"one_by_one": one, "batched": all_, "speedup": all_ / one}


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings = record["settings"]
    conditions = (
        f"{record['where']}, {settings['threads']} threads, float32, batch {settings['batch_size']}, images of "
        f"{settings['size']}×{settings['size']} (JPEG: 512×512)."
    )
    lines = opening(conditions, record, "reward", "images per s, one by one", "batched", "×")
    for name, rates in record["results"].items():
        lines.append(f"| {name} | {rates['one_by_one']:.1f} | {rates['batched']:.1f} | {rates['speedup']:.1f} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", default="image_reward,pickscore,hpsv2,aesthetic,clip_score,vila")
    parser.add_argument("--set", dest="options", action="append", default=[], metavar="REWARD.ARGUMENT=VALUE")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parsed(parser)
    described = machine.describe()
    torch.set_num_threads(arguments.threads)
    names = arguments.rewards.split(",")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        options = small_rewards(Path(folder))
        for name, given in read_options(arguments.options, names).items():
            reward = build_reward(name, **(given or options[name]))
            results[name] = measure(reward, arguments.batch_size, arguments.size, arguments.device, arguments.rounds)
    results["jpeg"] = measure_jpeg(arguments.batch_size, arguments.rounds)
    record = {
        "machine": described,
        "where": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": results,
    }
    publish(record, markdown(record), arguments.json)


if __name__ == "__main__":
    main()
