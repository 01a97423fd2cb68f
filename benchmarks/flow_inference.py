"""CPU seconds per image of the flow miniature's blends, against diffusers' plain Stable Diffusion 3 pipeline.

    python benchmarks/flow_inference.py --batch 8 --json benchmarks/results/flow_inference.json

Whole calls, prompt to image. Every repeat runs all of them once, one after the other; a ratio is the median over
repeats of a call's time divided by the plain pipeline's in the same repeat. Times are the process's own CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import describe, sentence
from benchmarks.publish import header, parsed, publish
from dblightning import miniature
from dblightning.miniature import world
from dblightning.pipeline import DiffusionBlendPipeline

PLAIN = "plain diffusers, base"
W = {"alignment": 0.5, "aesthetic": 0.5}
#: name → arguments of a blend
CALLS: dict[str, dict[str, Any]] = {
    "base": {"method": "base"},
    "single": {"weights": {"alignment": 1.0}},
    "DB-MPA(2)": {"method": "db-mpa", "weights": W},
    "exact soup": {"method": "rewarded-soup", "weights": W},
    "DB-MPA-LS, CPS": {"method": "db-mpa-ls", "weights": W, "eta": 1.0},
}


def calls(batch: int, steps: int, guidance_scale: float) -> dict[str, Callable[[], Any]]:
    """Name → one call of a pipeline on ``batch`` prompts."""
    from diffusers import StableDiffusion3Pipeline

    plain = StableDiffusion3Pipeline.from_pretrained(miniature.flow_path())
    ours = DiffusionBlendPipeline.from_pretrained("miniature-flow")
    for pipeline in (plain, ours):
        pipeline.set_progress_bar_config(disable=True)
    prompts = world.test_prompts()[:batch]

    def call(pipeline: Any, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            generator = [torch.Generator().manual_seed(seed) for seed in range(batch)]
            settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
            return pipeline(prompts, generator=generator, **settings, **options).images

        return run

    length = miniature.EMBEDDED["miniature-flow"].text_tokens
    return {PLAIN: call(plain, max_sequence_length=length)} | {
        name: call(ours, **options) for name, options in CALLS.items()
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per image of each call, and its ratio to the plain pipeline's, over the repeats."""
    found = calls(options.batch, options.steps, options.guidance_scale)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(options.repeats + 1):
        for name, run in found.items():
            start = time.process_time()
            run()
            if repeat:  # the first warms up
                seconds[name].append((time.process_time() - start) / options.batch)
    return [
        {
            "call": name,
            "seconds_per_image": statistics.median(each),
            "ratio": statistics.median(a / b for a, b in zip(each, seconds[PLAIN], strict=True)),
            "least": min(a / b for a, b in zip(each, seconds[PLAIN], strict=True)),
            "most": max(a / b for a, b in zip(each, seconds[PLAIN], strict=True)),
        }
        for name, each in seconds.items()
    ]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    lines = header("call", "CPU ms / image", "× plain, median", "least", "most")
    lines += [
        f"| {row['call']} | {1000 * row['seconds_per_image']:.1f} | {row['ratio']:.2f} | {row['least']:.2f} "
        f"| {row['most']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every call."""
    parser = argparse.ArgumentParser(description="Cost of blends on the flow miniature.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=15)
    options = parsed(parser)
    torch.set_num_threads(1)
    machine = describe()
    rows = measure(options)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    heading = f"Batch {options.batch}, {options.steps} steps, guidance {options.guidance_scale:g}, one thread."
    publish(
        {"machine": machine, "settings": settings, "calls": rows},
        f"{heading}\n\n{to_markdown(rows)}\n\n{sentence(machine)}",
        options.json,
    )


if __name__ == "__main__":
    main()
