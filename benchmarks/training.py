"""Training speed against the code people would otherwise use: TRL's DDPOTrainer, and the paper's loop written plainly.

    python benchmarks/training.py --peer-environment FOLDER --json benchmarks/results/training.json
    python benchmarks/training.py --only ours --processes 1 2          (scaling; two ranks over gloo)
    python benchmarks/training.py --tiny --only ours naive             (a check that it runs)

FOLDER gets TRL's environment when there is none yet (a few gigabytes). All contestants train the miniature's aesthetic
adapter on one CPU thread each: the same images, denoiser rows, trained transitions and optimiser steps, which are
counted and compared. Their rounds are interleaved, and a ratio is the median over repeats of two contestants' CPU
seconds in the same repeat; wall seconds are given too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.peers import environment
from benchmarks.peers.contestant import Contestant
from benchmarks.peers.worker import PHASES, Settings
from benchmarks.publish import header, opening, parsed, publish

#: name → program, and its departures from the common settings
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {}),
    "ours, KL off": ("ours", {"kl_weight": 0.0}),
    "ours, KL off, micro-batch 32": ("ours", {"kl_weight": 0.0, "micro_batch": 32}),
    "ours, KL off, micro-batch 32, compiled": ("ours", {"kl_weight": 0.0, "micro_batch": 32, "compile": "whole"}),
    "ours, micro-batch 32": ("ours", {"micro_batch": 32}),
    "ours, micro-batch 2": ("ours", {"micro_batch": 2}),
    "TRL": ("trl_ddpo", {}),
    "TRL, one step of micro-batch 16": ("trl_ddpo", {"micro_batch": 16, "optimizer_steps": 1}),
    "ours, KL off, one step of micro-batch 16": (
        "ours",
        {"kl_weight": 0.0, "micro_batch": 16, "optimizer_steps": 1},
    ),
    "naive": ("naive", {"micro_batch": 2}),
}
#: whose seconds are divided by whose
COMPARISONS = [
    ("TRL", "ours, KL off"),
    ("TRL", "ours, KL off, micro-batch 32"),
    ("TRL", "ours, KL off, micro-batch 32, compiled"),
    ("TRL", "ours"),
    ("TRL", "ours, micro-batch 32"),
    ("TRL, one step of micro-batch 16", "ours, KL off, one step of micro-batch 16"),
    ("naive", "ours, micro-batch 2"),
    ("naive", "ours"),
]
#: what must be equal for two contestants to have done the same work; how often a text is encoded is part of the how
WORK = ("images", "denoiser_rows_without_grad", "denoiser_rows_with_grad", "transitions", "optimizer_steps")
TINY = dict(images=4, sample_batch=2, samples_per_prompt=2, steps=2, micro_batch=2, optimizer_steps=1)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interleaved(contestants: dict[str, Contestant], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """``repeats`` rounds of each, in turns, after one unmeasured round each."""
    for contestant in contestants.values():
        contestant.round()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            rounds[name].append(contestant.round())
    return rounds


def summary(rounds: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """The reported figures of one contestant."""
    images = settings.images * settings.processes
    return {
        "settings": dataclasses.asdict(settings),
        "images": images,
        "counts": rounds[0]["counts"],  # of the first process
        # of the first process: its images, its CPU seconds
        "images_per_cpu_second": spread([settings.images / each["cpu_seconds"] for each in rounds]),
        "images_per_wall_second": spread([images / each["seconds"] for each in rounds]),
        "seconds_per_optimizer_step": spread([each["phases"]["update"] / settings.optimizer_steps for each in rounds]),
        "phases": {phase: statistics.median(each["phases"][phase] for each in rounds) for phase in (*PHASES, "other")},
        "rounds": rounds,
    }


def comparison(peer: str, ours: str, rounds: dict[str, list[dict[str, Any]]], processes: float = 1.0) -> dict[str, Any]:
    """Speed of ``ours`` as a multiple of ``peer``'s, and whether both did the same work, per process.

    Args:
        peer, ours: names.
        rounds: records of both, interleaved.
        processes: how many times as many processes, and so images, ``ours`` has. They count on the wall alone: CPU
            seconds are the first process's.
    """
    pairs = list(zip(rounds[peer], rounds[ours], strict=True))
    different = {
        count: other["counts"].get(count, 0) / one["counts"][count] if one["counts"].get(count) else float("inf")
        for one, other in pairs
        for count in WORK
        if one["counts"].get(count, 0) != other["counts"].get(count, 0)
    }
    return {
        "peer": peer,
        "ours": ours,
        "identical_work": not different,
        "differs_in": different,
        "speedup_cpu": spread([one["cpu_seconds"] / other["cpu_seconds"] for one, other in pairs]),
        "speedup_wall": spread([processes * one["seconds"] / other["seconds"] for one, other in pairs]),
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, Settings]]:
    """(name, program, settings) of everything to run."""
    common = Settings(**(TINY if options.tiny else {key: getattr(options, key) for key in TINY}))
    for name in options.only:
        program, departures = CONTESTANTS[name]
        settings = dataclasses.replace(common, **departures)
        if program != "ours":
            yield name, program, settings
            continue
        for processes in options.processes:
            title = name if options.processes == [1] else f"{name}, {processes} process{'es' * (processes > 1)}"
            yield title, program, dataclasses.replace(settings, processes=processes)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns the record that is written."""
    described = machine.describe()
    every = list(jobs(options))
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Contestant(program, settings, options.peer_environment))
            for name, program, settings in every
        }
        rounds = interleaved(running, 1 if options.tiny else options.repeats)
        versions = {name: contestant.versions for name, contestant in running.items()}
    comparisons = [comparison(peer, ours, rounds) for peer, ours in COMPARISONS if {peer, ours} <= set(rounds)]
    if options.processes != [1]:  # everything against the first
        (first, _, alone), *others = every
        comparisons = [
            comparison(first, name, rounds, settings.processes / alone.processes) for name, _, settings in others
        ]
    return {
        "machine": described,
        "versions": versions,
        "contestants": {name: summary(rounds[name], settings) for name, _, settings in every},
        "comparisons": comparisons,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as two tables."""
    first = next(iter(record["contestants"].values()))["settings"]
    conditions = (
        f"Per round and process: {first['images']} images, {first['steps']} DDIM steps, guidance "
        f"{first['guidance_scale']:g}, {first['optimizer_steps']} optimiser steps, micro-batch {first['micro_batch']} "
        f"where not stated; one thread per process."
    )
    columns = ("contestant", "images per CPU s", "images per wall s", "s per optimiser step", *PHASES, "other",
               "denoiser rows without / with gradients", "texts encoded")  # fmt: skip
    lines = opening(conditions, record, *columns)
    for name, row in record["contestants"].items():
        phases = " | ".join(f"{row['phases'][phase]:.2f}" for phase in (*PHASES, "other"))
        counts = row["counts"]
        rows = f"{counts['denoiser_rows_without_grad']} / {counts['denoiser_rows_with_grad']}"
        lines.append(
            f"| {name} | {_spread(row['images_per_cpu_second'])} | {_spread(row['images_per_wall_second'])} | "
            f"{row['seconds_per_optimizer_step']['median']:.2f} | {phases} | "
            f"{rows} | {counts['texts_encoded']} |"
        )
    if record["comparisons"]:
        lines += ["", *header("peer", "against", "× by CPU seconds", "× by wall seconds", "same work")]
    for row in record["comparisons"]:
        differs = (f"{count.replace('_', ' ')} × {ratio:.3g}" for count, ratio in row["differs_in"].items())
        same = "yes" if row["identical_work"] else "no: " + ", ".join(differs)
        lines.append(
            f"| {row['peer']} | {row['ours']} | {_spread(row['speedup_cpu'])} | {_spread(row['speedup_wall'])} | "
            f"{same} |"
        )
    return "\n".join(lines)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--peer-environment", type=Path, help="folder of TRL's environment; built there if missing")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="data-parallel processes of ours")
    parser.add_argument("--repeats", type=int, default=5)
    for field in dataclasses.fields(Settings):
        if field.name in TINY:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = parsed(parser, arguments, tiny="one repeat of very little work")
    if "TRL" in options.only:
        environment.prepare(parser, options.peer_environment)
    record = measure(options)
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
