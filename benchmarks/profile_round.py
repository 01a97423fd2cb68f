"""Where the seconds of a training round go: the quickstart's phases and UNet rows, and the operations of an update.

    python benchmarks/profile_round.py --before CHECKOUT --json benchmarks/results/profile_round.json
    python benchmarks/profile_round.py --tiny

CHECKOUT is a clone of the repository at an earlier commit, whose rounds are interleaved with this one's. The update is
measured at several micro-batches against the UNet alone on the same rows, forward and backward without any adapter:
what every trainer of this UNet pays for. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.peers.contestant import Contestant
from benchmarks.peers.environment import ROOT
from benchmarks.peers.worker import PHASES, Settings
from benchmarks.publish import header, opening, parsed, publish
from benchmarks.training import interleaved
from dblightning.backbone import DiffusersBackbone
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.module import RewardRLModule
from dblightning.replay import Transitions

CONFIG = "configs/quickstart.yaml"
#: group → what the names of its operations begin with, first match
GROUPS = {
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::conv"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "normalisation": ("aten::native_group_norm", "aten::native_layer_norm"),
    "elementwise": ("aten::mul", "aten::add", "aten::div", "aten::silu", "aten::gelu", "aten::sub", "aten::sigmoid"),
}


def rounds(checkouts: dict[str, Path], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds and phases of a round, and its counts, by checkout; in turns, after one round to warm up."""
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Contestant("ours", Settings(config=CONFIG, seed=1), root=root))
            for name, root in checkouts.items()
        }
        done = interleaved(running, repeats)
    return {
        name: {
            "cpu_seconds": statistics.median(each["cpu_seconds"] for each in records),
            "phases": {phase: statistics.median(each["phases"][phase] for each in records) for phase in PHASES},
            "counts": records[-1]["counts"],
        }
        for name, records in done.items()
    }


def transitions(module: RewardRLModule, count: int) -> Transitions:
    """Some that are as good as any for timing."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, *module.backbone.latent_shape, generator=generator)
    one, index = torch.ones(count), torch.arange(count)
    return Transitions(latents, 0.98 * latents, index % 10, -one, one, 0 * one, one, index % 4, 0 * index)


def steps(module: RewardRLModule, count: int) -> dict[str, Callable[[], None]]:
    """The update of a micro-batch, and the UNet alone on its rows."""
    batch = transitions(module, count)
    backbone: Any = module.backbone
    conditioning = backbone.encode(["a red circle"] * count)
    timesteps = module.solver.timesteps[batch.step_index]

    def update() -> None:
        loss, _ = module.policy_loss(batch, with_kl=False)
        loss.backward()
        for parameter in module.policy_parameters:
            parameter.grad = None

    def unet() -> None:
        latents = batch.latents.clone().requires_grad_(True)
        backbone.denoise(latents, timesteps, conditioning, module.settings.sampling.guidance_scale).sum().backward()

    return {"update": update, "unet": unet}


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Share of each group of operations in a step's own time on the CPU."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        group = next((name for name, starts in GROUPS.items() if event.key.startswith(starts)), "copies and the rest")
        seconds[group] += event.self_cpu_time_total
    return {name: seconds[name] / seconds.total() for name in [*GROUPS, "copies and the rest"]}


def updates(micro_batches: list[int], repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds per transition of an update and of the UNet alone, and the update's operations, by micro-batch."""
    module = RewardRLModule(
        DiffusersBackbone("miniature"), ShapeAesthetic(), sampling={"num_inference_steps": 20, "guidance_scale": 3.0},
        advantage={"baseline": "prompt", "normalize": True}, replay={"buffer_size": None}, kl={"weight": 0.0},
    )  # fmt: skip
    module.prompts = {index: f"prompt {index}" for index in range(4)}
    found: dict[str, dict[str, Any]] = {}
    for count in micro_batches:
        made, times = steps(module, count), {"update": list[float](), "unet": list[float]()}
        for repeat in range(repeats + 1):
            for name, step in made.items():
                start = time.process_time()
                step()
                times[name] += [time.process_time() - start] * (repeat > 0)
        milliseconds = {name: 1000 * statistics.median(each) / count for name, each in times.items()}
        found[str(count)] = milliseconds | {"shares": shares(made["update"])}
    return found


def rows(counts: dict[str, int], how: str) -> int:
    """The denoiser's rows "with" or "without" gradients; an earlier commit calls them the UNet's."""
    return sum(count for name, count in counts.items() if name.endswith(f"rows_{how}_grad"))


def markdown(record: dict[str, Any]) -> str:
    """The record as two tables."""
    columns = ("CPU s per round", "sampling", "update", "decoding", "UNet rows without / with gradients")
    lines = opening("One thread.", record, f"`{CONFIG}`", *columns)
    for name, each in record["rounds"].items():
        phases, counts = each["phases"], each["counts"]
        lines.append(
            f"| {name} | {each['cpu_seconds']:.2f} | {phases['sampling']:.2f} | {phases['update']:.2f} | "
            f"{phases['decoding']:.2f} | {rows(counts, 'without')} / {rows(counts, 'with')} |"
        )
    groups = [*GROUPS, "copies and the rest"]
    lines += ["", *header("micro-batch", "update, ms per transition", "UNet alone, ms", *groups)]
    for count, each in record["updates"].items():
        cells = " | ".join(f"{100 * each['shares'][group]:.0f} %" for group in groups)
        lines.append(f"| {count} | {each['update']:.2f} | {each['unet']:.2f} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 8, 16, 32, 48])
    options = parsed(parser, arguments, tiny="one small update, no rounds")
    torch.set_num_threads(1)
    described = machine.describe()
    checkouts = {"before": options.before, "now": ROOT} if options.before else {"now": ROOT}
    record = {
        "machine": described,
        "rounds": {} if options.tiny else rounds(checkouts, options.repeats),
        "updates": updates([2] if options.tiny else options.micro_batches, 1 if options.tiny else 4 * options.repeats),
    }
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
