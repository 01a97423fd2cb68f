"""What needs a GPU, in one command and at most 25 minutes: ``make gpu``.

    python benchmarks/gpu.py               # benchmarks/results/gpu_<name of the GPU>.json, and a page beside it
    python benchmarks/gpu.py --plan        # the parts and their computed minutes
    python benchmarks/gpu.py --dry-run     # tiny models of the same classes on the CPU: checks that it runs

SD 1.5, SDXL and SD3.5-Medium at full width with random weights: seconds per image by method and batch, training images
per second, peak memory, the KL that half precision reads, torch.compile, and two GPUs where there are two. Each part
runs in a process of its own with a time limit; its crash is a line of the page. Parts that are done stay in the JSON
and are not run again; run the command again for those that are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import inference, machine
from benchmarks.gpu_models import MODELS
from benchmarks.gpu_parts import KINDS, Job
from benchmarks.publish import header, opening, publish

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 24 * 60.0
#: assumed for the plan alone, about an A100's: TFLOP/s of half precision and of float32 without TF32, and seconds until
#: a part's model is made
ASSUMED_HALF, ASSUMED_FLOAT32, ASSUMED_START_S = 100.0, 15.0, 25.0
#: work of a method over the base's: denoiser rows, a backward pass counted as two forwards
COST = {
    "base": 1, "DB-MPA, one-hot w": 1, "DB-MPA, m=2": 2, "DB-MPA, m=2, merged": 2, "DB-MPA, m=3": 3, "DB-MPA, m=4": 4,
    "DB-MPA-LS, m=2": 1, "DB-MPA-LS, m=2, gated": 1, "DB-KLA": 2, "exact soup": 1, "exact soup, gated": 1,
    "factor soup": 1, "CoDe, block": 4, "CoDe, look-ahead": 4, "RGG": 1.5, "RGG, through UNet": 4,
}  # fmt: skip
FEW = ["base", "DB-MPA, m=2", "DB-MPA, m=3", "DB-MPA-LS, m=2, gated", "DB-KLA", "exact soup", "CoDe, block", "RGG"]
KL = {"none": dict(weight=0.0), "float32, a quarter": dict(weight=0.1, share=0.25)}


@dataclass(frozen=True)
class Part:
    """One process: what it measures (a key of ``gpu_parts.KINDS``), on which model, and how."""

    kind: str
    model: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model}"

    def planned_s(self) -> float:
        """Seconds it should take: computed from TFLOP per row and the assumed speeds above, not measured."""
        given, row = self.settings, 2 * MODELS[self.model].tflop  # both passes of guidance
        half, exact = 0.0, 0.0
        if self.kind == "inference":
            passes = 1 + given["repeats"]
            half = row * given["steps"] * passes * sum(given["batches"]) * sum(COST[name] for name in given["methods"])
        elif self.kind == "compile":
            runs = 2 * (1 + given["repeats"])
            half = row * given["steps"] * runs * given["batch"] * sum(COST[name] for name in given["methods"])
            return ASSUMED_START_S + 60 + half / ASSUMED_HALF  # a minute of compiling
        elif self.kind in ("training", "ranks"):
            transitions = given["rounds"] * given["images"] * given["steps"]
            # sampling, forward and backward, and the forward that checkpointing repeats
            half = len(given["kl"]) * row * transitions * (1 + 3 + given["checkpointing"])
            exact = sum(2 * row * transitions * kl.get("share", 1.0) for kl in given["kl"].values() if kl["weight"])
        elif self.kind == "memory":
            half, exact = 7 * row * sum(given["micro_batches"]), 2 * 2 * row * sum(given["micro_batches"])
        elif self.kind == "kl":
            exact = 2 * len(given["strengths"]) * given["transitions"] * row * 4
        return ASSUMED_START_S + half / ASSUMED_HALF + exact / ASSUMED_FLOAT32


def plan(dry: bool = False) -> list[Part]:
    """The parts, those first without which the page says least."""
    strengths = [0.0, 1e-2, 0.1, 1.0]
    sizes = {"sd15": (8, 4, False), "sdxl": (4, 2, True), "sd35m": (2, 2, True)}
    steps = {"sd15": 10, "sdxl": 4, "sd35m": 4}
    batches = {"sd15": [1, 8], "sdxl": [1, 4], "sd35m": [1, 2]}
    micro = {"sd15": [1, 2, 4, 8, 16], "sdxl": [1, 2, 4], "sd35m": [1, 2, 4]}
    parts = []
    for model in MODELS:
        images, micro_batch, checkpointing = sizes[model]
        train = dict(
            images=images, micro_batch=micro_batch, checkpointing=checkpointing, steps=10 if model == "sd15" else 6
        )
        train |= dict(rounds=2, kl=KL)
        methods = list(COST) if model == "sd15" else FEW
        speed = dict(steps=steps[model], repeats=1, batches=batches[model], methods=methods)
        parts += [
            Part("inference", model, speed),
            Part("training", model, train),
            Part("memory", model, dict(steps=10, micro_batches=micro[model])),
            Part("kl", model, dict(steps=10, strengths=strengths, transitions=4 if model == "sd15" else 2)),
        ]
    parts.append(Part("ranks", "sd15", next(part.settings for part in parts if part.kind == "training")))
    for model in MODELS:
        settings = dict(steps=steps[model], repeats=1, batch=batches[model][1], methods=["base", "DB-MPA, m=2"])
        parts.append(Part("compile", model, settings))
    return [Part(part.kind, part.model, shrunk(part.settings)) for part in parts] if dry else parts


def inference_methods() -> list[str]:
    """The names of the methods that ``inference.py`` measures."""
    return list(inference.methods(argparse.Namespace(candidates=4, block_size=5)))


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """The same part with the least of everything."""
    least = dict(
        steps=2, repeats=1, batches=[1], batch=1, images=2, micro_batch=2, micro_batches=[1], strengths=[0.0, 1.0],
        transitions=2,
    )  # fmt: skip
    return {key: least.get(key, value) for key, value in settings.items()}


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_part(part: Part, file: Path, dry: bool) -> None:
    """Measure one part in this process; its rows are in ``file`` after each measurement."""

    def keep(rows: list[dict[str, Any]]) -> None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            unfinished = file.with_suffix(".new")
            unfinished.write_text(json.dumps(rows), encoding="utf-8")
            unfinished.replace(file)

    torch.set_num_threads(1 if dry else min(8, os.cpu_count() or 1))
    KINDS[part.kind](Job(part.model, "cpu" if dry else "cuda", dry, part.planned_s(), part.settings, keep))


def in_process(part: Part, file: Path, dry: bool, limit_s: float) -> str:
    """Run a part in a process group of its own; "done", or why it was not."""
    errors = file.with_suffix(".log")
    # the dry run forks, which spares it the imports; not with a GPU, nor where Lightning starts a second process
    if dry and part.kind != "ranks":
        forked = multiprocessing.get_context("fork").Process(target=_child, args=(part, file, errors))
        forked.start()
        process: Any = forked
        forked.join(limit_s)
        code = forked.exitcode
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part.name, "--file", str(file)]
        with errors.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, *(["--dry-run"] if dry else [])], stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left, and itself where its time is up
    process.join() if hasattr(process, "join") else process.wait()
    if code == 0:
        return "done"
    if code is None:
        return f"stopped after its limit of {limit_s:.0f} s"
    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() if errors.exists() else []
    return f"failed with exit code {code}: {said[-1][:160] if said else 'nothing was said'}"


def _child(part: Part, file: Path, errors: Path) -> None:
    os.setsid()
    with errors.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_part(part, file, True)


def measure(
    options: argparse.Namespace, record: dict[str, Any], save: Callable[[], None], runner: Any = in_process
) -> None:
    """Run the parts that are not done, until the budget is used up; the record is saved after each."""
    start = time.monotonic()
    for part in plan(options.dry_run):
        known = record["parts"].get(part.name, {})
        if known.get("status") == "done" and known.get("settings") == part.settings:
            continue
        left = options.budget - (time.monotonic() - start)
        if part.kind == "ranks" and not options.dry_run and torch.cuda.device_count() < 2:
            status, rows, seconds = "skipped: one GPU", [], 0.0
        elif left < (0 if options.dry_run else 1.5 * ASSUMED_START_S):
            status, rows, seconds = "not begun: no time was left; run the command again", known.get("rows", []), 0.0
        else:
            file = options.json.with_name(f".{options.json.stem}.part.json")
            file.unlink(missing_ok=True)
            began = time.monotonic()
            status = runner(part, file, options.dry_run, min(left, 60 + 2 * part.planned_s()))
            seconds = time.monotonic() - began
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            for each in (file, file.with_suffix(".log"), file.with_suffix(".new")):
                each.unlink(missing_ok=True)
        record["parts"][part.name] = {
            "status": status, "seconds": seconds, "planned_s": part.planned_s(), "settings": part.settings,
            "rows": rows, "torch": torch.__version__, "date": machine.describe()["date"],
        }  # fmt: skip
        print(f"{part.name}: {status} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        save()


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def markdown(record: dict[str, Any]) -> str:
    """The record as a page: a table per part, its errors as lines of it."""
    dry = record["dry_run"]
    lines = [
        f"# {record['device']}",
        "",
        "**A dry run with tiny models on a CPU: no number here means anything.**" if dry else
        "Full width, random weights, bfloat16 unless a column says otherwise.",
        "Text encoders are left out: embeddings are random, of the right shapes.",
        *opening("Seconds are wall seconds after a synchronisation.", record,
                 "part", "status", "s", "planned s (computed from assumed speeds, not measured)"),
    ]  # fmt: skip
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {part['planned_s']:.0f} |")
    for name, part in record["parts"].items():
        if part["rows"]:
            kind, _, model = name.partition(" ")
            lines += ["", f"## {MODELS[model].title}: {kind}", "", *table(kind, part["rows"])]
    return "\n".join(lines)


def table(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table, its columns all their keys; sampling gets a column of ratios to the base."""
    rows = [dict(row) for row in rows]
    if kind in ("inference", "compile"):
        for row in rows:
            base = next((each for each in rows if each.get("method") == "base" and each["batch"] == row["batch"]
                         and each.get("compile", "none") == "none"), {})  # fmt: skip
            if "seconds_per_image" in base and "seconds_per_image" in row:
                row["times_base"] = row["seconds_per_image"] / base["seconds_per_image"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = header(*(key.replace("_", " ") for key in keys))
    return lines + [f"| {' | '.join(cell(row.get(key, '')) for key in keys)} |" for row in rows]


def cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(cell(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds; no part runs on after them")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--plan", action="store_true", help="print the parts and their computed minutes, and stop")
    parser.add_argument("--again", action="store_true", help="measure what is done already, too")
    parser.add_argument("--json", type=Path, help="file to write; default: benchmarks/results/gpu_<name>.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = plan(options.dry_run)
    if options.plan:
        for part in parts:
            print(f"{part.name}: {part.planned_s() / 60:.1f} min")
        print(f"computed, not measured: {sum(part.planned_s() for part in parts) / 60:.1f} min")
        return None
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no CUDA device here, and make gpu measures what needs one; run it on a machine with a GPU"
        )
    if options.part:
        run_part(next(part for part in parts if part.name == options.part), options.file, options.dry_run)
        return None
    device = "dry run" if options.dry_run else torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    options.json = options.json or ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device, "dry_run": options.dry_run, "parts": {}}
    if options.json.exists() and not options.again:
        record = json.loads(options.json.read_text(encoding="utf-8"))
        if record["device"] != device:
            raise SystemExit(f"{options.json} is of {record['device']!r}, and this is {device!r}; name another --json")
    record["machine"] = machine.describe()

    def save() -> None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    measure(options, record, save)
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
