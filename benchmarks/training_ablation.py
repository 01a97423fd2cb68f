"""Does the value function help, and does replay? The same training with each on and off, scored on held-out prompts.

    python benchmarks/training_ablation.py --seeds 1 2 --rollouts 30 --out benchmarks/results/training_ablation.json

Every run trains the miniature's aesthetic adapter on the same prompts, noise and number of images, then scores it on
held-out prompts with the base model's noise. Gains are paired with the base model, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from benchmarks import machine
from benchmarks.publish import opening, parsed, publish

ROOT = Path(__file__).parent.parent
REPLAY = str(3 * 48 * 20)  # single steps: three rollouts of 48 images at 20 steps
#: not the first steps alone: value functions and replay see every step
ALL_BUT_TWO = [
    "--model.window.size", "null", "--model.window.tail_steps", "null", "--model.optimisation.skip_last_steps", "2",
    "--model.optimisation.policy_steps", "8",
]  # fmt: skip
#: name → options over configs/quickstart.yaml
VARIANTS = {
    "prompt mean": ["--model.advantage.baseline", "prompt", "--model.replay.buffer_size", "null"],
    "value function": ["--model.advantage.baseline", "value", "--model.replay.buffer_size", "null"],
    "both": ["--model.advantage.baseline", "both", "--model.replay.buffer_size", "null"],
    "prompt mean + replay": ["--model.advantage.baseline", "prompt", "--model.replay.buffer_size", REPLAY],
    "value function + replay": ["--model.advantage.baseline", "value", "--model.replay.buffer_size", REPLAY],
}


def run(command: str, *options: str) -> float:
    """Run a dblightning command on one thread; returns its seconds."""
    start = time.perf_counter()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    arguments = [sys.executable, "-m", "dblightning", command, *options]
    subprocess.run(
        arguments, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def train_and_score(name: str, options: list[str], seed: int, rollouts: int, prompts: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        export = {"class_path": "dblightning.callbacks.ExportAdapter", "init_args": {"folder": f"{folder}/adapter"}}
        seconds = run(
            "fit", "--config", "configs/quickstart.yaml", *ALL_BUT_TWO, *options, "--model.seed", str(seed),
            "--trainer.max_epochs", "1", "--data.rollouts_per_epoch", str(rollouts), "--trainer.logger", "false",
            "--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0",
            "--trainer.callbacks", json.dumps([export]), "--trainer.default_root_dir", folder,
        )  # fmt: skip
        blends = [{"method": "base"}, {"method": "single", "weights": {"aesthetic": 1.0}}]
        run(
            "test", "--config", "configs/eval/quickstart.yaml", "--model.blends", json.dumps(blends),
            "--model.adapters", json.dumps({"aesthetic": f"{folder}/adapter"}), "--model.out", f"{folder}/scores",
            "--data.limit_test_prompts", str(prompts),
            "--data.prompt_order", "file",  # the prompts of the published results
        )  # fmt: skip
        row = pd.read_csv(f"{folder}/scores/summary.csv").iloc[1]
    facts: dict[str, object] = {"variant": name, "seed": seed, "train_seconds": round(seconds, 1)}
    for reward in ("aesthetic", "alignment"):
        gain = f"gain/{reward}"
        facts[f"{reward}_gain"] = float(row[gain])
        facts[f"{reward}_gain_ci"] = (float(row[f"{gain}_hi"]) - float(row[f"{gain}_lo"])) / 2
    return facts


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings = record["settings"]
    conditions = f"{settings['rollouts']} rollouts, {settings['prompts']} held-out prompts."
    lines = opening(conditions, record, "variant", "seed", "aesthetic gain", "alignment gain", "training, s")
    for each in record["runs"]:
        gains = (f"{each[f'{name}_gain']:+.2f} ± {each[f'{name}_gain_ci']:.2f}" for name in ("aesthetic", "alignment"))
        lines.append(f"| {each['variant']} | {each['seed']} | {' | '.join(gains)} | {each['train_seconds']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rollouts", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts to score on")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parsed(parser)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    record: dict[str, Any] = {"machine": machine.describe(), "settings": settings, "runs": []}
    for seed in options.seeds:
        for name in options.variants:
            record["runs"].append(train_and_score(name, VARIANTS[name], seed, options.rollouts, options.prompts))
            publish(record, markdown(record), options.json)  # after each: a run takes minutes
    means = pd.DataFrame(record["runs"]).groupby("variant", sort=False).mean(numeric_only=True).drop(columns="seed")
    print(means.round(3).to_string())


if __name__ == "__main__":
    main()
