"""Training seconds until a gain in held-out aesthetic reward, ours against TRL, each at its own best settings.

    python benchmarks/time_to_gain.py --peer-environment FOLDER --json benchmarks/results/time_to_gain.json
    python benchmarks/time_to_gain.py --tiny --only ours
    python benchmarks/time_to_gain.py --only "ours, quickstart" "before, quickstart" --before CHECKOUT --rounds 16

"before" is this package as it was: CHECKOUT is a clone of the repository at an earlier commit.

The gain is paired: the adapter's images less the base model's, on the same held-out prompts, the same noise and by the
same scorer, which is this package's sampler for every contestant. Rounds are interleaved, and every contestant's
adapter is scored after each of its rounds, or every few (``--score-every``); neither the scoring nor the waiting
counts. A contestant stops at the largest gain requested, or after ``--max-cpu-seconds``. A run is small evidence: give
several seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.peers import environment
from benchmarks.peers.contestant import Contestant
from benchmarks.peers.worker import Settings
from benchmarks.publish import opening, parsed, publish
from dblightning.adapters import WEIGHTS_NAME
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Base, Single
from dblightning.miniature import world
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.noise import ImageNoise
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver

#: TRL with rollouts of ours' size; what its defaults say otherwise
TRL = dict(
    images=64, sample_batch=64, samples_per_prompt=8, micro_batch=16, optimizer_steps=4, learning_rate=3e-4,
    weight_decay=1e-4, clip_range=1e-4, per_prompt=False,
)  # fmt: skip
#: name → program and settings
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {"config": "configs/miniature/aesthetic.yaml"}),
    "ours, quickstart": ("ours", {"config": "configs/quickstart.yaml"}),
    "before, quickstart": ("ours", {"config": "configs/quickstart.yaml"}),
    "TRL, defaults": ("trl_ddpo", TRL),
    "TRL, lr 3e-3": ("trl_ddpo", {**TRL, "learning_rate": 3e-3}),
    "TRL, tuned": ("trl_ddpo", {**TRL, "learning_rate": 3e-3, "clip_range": 5e-3, "per_prompt": True}),
    "TRL, tuned, 8 of 20 steps": (
        "trl_ddpo",
        {**TRL, "learning_rate": 3e-3, "clip_range": 5e-3, "per_prompt": True, "train_fraction": 0.4},
    ),
}


class Scorer:
    """Held-out aesthetic reward of exported adapters, paired with the base model's.

    Args:
        count: held-out prompts, one image each.
        steps, guidance_scale: of the sampler (DDIM, eta 1).
    """

    def __init__(self, count: int, steps: int = 20, guidance_scale: float = 3.0) -> None:
        self.backbone = DiffusersBackbone("miniature")
        self.prompts = world.test_prompts()[:count]
        self.solver = make_solver(self.backbone.scheduler_config, steps, 1.0)
        self.guidance_scale = guidance_scale
        self.base = self._score(Base())
        self._loaded = False

    @torch.no_grad()
    def _score(self, blend: Any) -> Tensor:
        scores = []
        for start in range(0, len(self.prompts), 32):
            part = self.prompts[start : start + 32]
            noise = ImageNoise.of(0, range(start, start + len(part)), [0] * len(part), stream="evaluation")
            conditioning = self.backbone.encode(part)
            latents = denoise_loop(
                self.backbone, conditioning, self.solver, blend, noise, guidance_scale=self.guidance_scale
            )
            scores.append(ShapeAesthetic().score(self.backbone.decode(latents), part))
        return torch.cat(scores)

    def gain(self, folder: Path) -> tuple[float, float]:
        """Mean gain over the base of the adapter in ``folder``, and the half width of its 95 % interval."""
        bank = self.backbone.adapters
        if not self._loaded:
            bank.load("tried", folder, self.backbone.pipeline)
            self._loaded = True
        else:
            bank.load_state_dict("tried", _tensors(folder))
        gains = self._score(Single("tried")) - self.base
        return float(gains.mean()), float(1.96 * gains.std() / len(gains) ** 0.5)


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key.removeprefix("unet."): value for key, value in load_file(folder / WEIGHTS_NAME).items()}


def seconds_to(target: float, points: list[dict[str, float]], clock: str) -> float | None:
    """``clock`` at the first point whose gain is at least ``target``; None where there is none."""
    return next((point[clock] for point in points if point["gain"] >= target), None)


def finished(gain: float, cpu_seconds: float, rounds: int, options: argparse.Namespace) -> bool:
    """Whether a contestant stops: after its rounds where they are given, else at the gain or the seconds."""
    if options.rounds is not None:
        return rounds >= options.rounds
    return gain >= max(options.gains) or cpu_seconds >= options.max_cpu_seconds


def race(contestants: dict[str, Contestant], scorer: Scorer, options: argparse.Namespace) -> dict[str, list[dict]]:
    """Train all in turns; each one's learning curve: cumulative seconds, images and transitions against gain."""
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    totals = {name: dict.fromkeys(("cpu_s", "wall_s", "images", "transitions"), 0.0) for name in contestants}
    open_ = list(contestants)
    with tempfile.TemporaryDirectory() as folder:
        while open_:
            for name in list(open_):
                total = totals[name]
                for _ in range(options.score_every):
                    done = contestants[name].round()
                    total["cpu_s"] += done["cpu_seconds"]
                    total["wall_s"] += done["seconds"]
                    total["images"] += done["counts"]["images"]
                    total["transitions"] += done["counts"]["transitions"]
                gain, interval = scorer.gain(contestants[name].export(Path(folder) / "adapter"))
                curves[name].append({**total, "reward": done["reward"], "gain": gain, "gain_ci": interval})
                print(f"{name}: {json.dumps(curves[name][-1])}", file=sys.stderr, flush=True)
                if finished(gain, total["cpu_s"], len(curves[name]) * options.score_every, options):
                    open_.remove(name)
    return curves


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Race once per seed; returns the record that is written."""
    described = machine.describe()
    scorer = Scorer(options.prompts)
    runs = []
    for seed in options.seeds:
        with ExitStack() as stack:
            running = {}
            for name in options.only:
                program, chosen = CONTESTANTS[name]
                settings = dataclasses.replace(Settings(**chosen), seed=seed)
                root = options.before if name.startswith("before") else environment.ROOT
                running[name] = stack.enter_context(Contestant(program, settings, options.peer_environment, root))
            curves = race(running, scorer, options)
            versions = {name: contestant.versions for name, contestant in running.items()}
        for name, curve in curves.items():
            reached = {
                f"{target:g}": {clock: seconds_to(target, curve, clock) for clock in ("cpu_s", "wall_s", "images")}
                for target in options.gains
            }
            runs.append({"contestant": name, "seed": seed, "reached": reached, "curve": curve})
    return {
        "machine": described,
        "versions": versions,
        "settings": {name: CONTESTANTS[name][1] for name in options.only},
        "prompts": options.prompts,
        "gains": options.gains,
        "max_cpu_seconds": options.max_cpu_seconds,
        "before": commit(options.before),
        "runs": runs,
    }


def commit(checkout: Path | None) -> str | None:
    """The commit of a checkout."""
    if checkout is None:
        return None
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    gains = [f"{gain:g}" for gain in record["gains"]]
    heads = (f"CPU s to +{gain} (images)" for gain in gains)
    before = f' "before" is commit {record["before"]}.' if record["before"] else ""
    conditions = f"{record['prompts']} held-out prompts; one thread each.{before}"
    lines = opening(conditions, record, "contestant", "seed", *heads, "last gain", "CPU s")
    for run in record["runs"]:
        cells = []
        for gain in gains:
            reached = run["reached"][gain]
            never = reached["cpu_s"] is None
            cells.append("not reached" if never else f"{reached['cpu_s']:.0f} ({reached['images']:.0f})")
        last = run["curve"][-1]
        lines.append(
            f"| {run['contestant']} | {run['seed']} | {' | '.join(cells)} | "
            f"{last['gain']:+.2f} ± {last['gain_ci']:.2f} | {last['cpu_s']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=["ours", "TRL, tuned"])
    parser.add_argument("--peer-environment", type=Path, help="folder of TRL's environment; built there if missing")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, help="of each contestant, whatever it gains and takes")
    parser.add_argument("--before", type=Path, help='checkout of an earlier commit, for the contestant "before"')
    parser.add_argument("--score-every", type=int, default=1, help="rounds between two scorings")
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts to score on")
    parser.add_argument("--max-cpu-seconds", type=float, default=600.0, help="of training, after which one gives up")
    options = parsed(parser, arguments, tiny="one round and few prompts")
    if options.tiny:
        options.max_cpu_seconds, options.prompts, options.rounds = 0.0, 4, None
    if any(CONTESTANTS[name][0] == "trl_ddpo" for name in options.only):
        environment.prepare(parser, options.peer_environment)
    if options.before is None and any(name.startswith("before") for name in options.only):
        parser.error('"before" runs from a checkout of an earlier commit: add --before CHECKOUT')
    torch.set_num_threads(1)
    record = measure(options)
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
