"""CPU seconds of the studio's answers on the miniature: one image after a slider was moved, and a survey over w.

    python benchmarks/studio.py --repeats 10

Twenty steps, guidance 3, two adapters, three rewards; the base's image is made before. Needs the extra ``studio``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import describe
from benchmarks.publish import opening, parsed, publish
from dblightning.arguments import studio_parser
from dblightning.preset import Preset
from dblightning.shared_pipeline import SharedPipeline
from dblightning.studio.blends import Blends
from dblightning.studio.command import live_rewards

NAMES = ["alignment", "aesthetic"]


def seconds_of(answer: Callable[[float], object], repeats: int) -> list[float]:
    """CPU seconds of each of ``repeats`` answers, each at its own w."""
    found = []
    for index in range(repeats):
        begin = time.process_time()
        answer((index + 1) / (repeats + 1))
        found.append(time.process_time() - begin)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    options = parsed(parser, arguments)
    torch.set_num_threads(1)
    blends = Blends(SharedPipeline.load(device="cpu"), live_rewards(studio_parser().parse_args([]), "miniature"))
    preset = Preset(weights=dict.fromkeys(NAMES, 0.5), num_inference_steps=20, guidance_scale=3.0, seed=4)
    prompts = ["A red circle."]
    blends.look(prompts, preset)
    answers: dict[str, Callable[[float], object]] = {
        "an image": lambda w: blends.look(prompts, preset.replaced(weights=dict(zip(NAMES, (w, 1 - w), strict=True)))),
        "a survey": lambda w: blends.survey(prompts, preset, NAMES),
    }
    times = {name: seconds_of(answer, options.repeats) for name, answer in answers.items()}
    record = {"machine": describe(), "repeats": options.repeats, "cpu_seconds": times}
    lines = opening(
        "Studio on the miniature, CPU seconds of one core,", record, "answer", "median", "lowest", "highest"
    )
    lines += [f"| {n} | {statistics.median(t):.2f} | {min(t):.2f} | {max(t):.2f} |" for n, t in times.items()]
    publish(record, "\n".join(lines), options.json)


if __name__ == "__main__":
    main()
