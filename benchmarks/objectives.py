"""Every objective on the miniature's alignment at the same CPU seconds: gains, and the KL they were paid with.

    python benchmarks/objectives.py --seconds 180 --json benchmarks/results/objectives.json
    python benchmarks/objectives.py --base miniature-flow --only "ReFL, eight updates" Flow-DPPO
    python benchmarks/objectives.py --tiny

All train the same adapter (rank 16, feed-forward layers too) on the same reward (0.4 smooth and 0.6 strict alignment)
and prompts, each with settings of its own; the clock counts rollouts, rewards and updates, and stands still while
validation prompts are scored at its marks. Gains are paired with the base model's images of the same noise. A finished
variant is not run again: the JSON file is the state to go on from.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import pandas as pd
import torch

from benchmarks import machine
from benchmarks.publish import opening, parsed, publish
from dblightning.backbone import DiffusersBackbone
from dblightning.class_paths import import_class
from dblightning.data import MiniatureDataModule
from dblightning.evaluation.sampler import BlendSampler
from dblightning.evaluation.specs import BlendSpec
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.module import RewardRLModule
from dblightning.objectives import Objective
from dblightning.rewards import WeightedReward


class Base(NamedTuple):
    """An embedded pipeline: which layers are adapted, and how it is sampled."""

    target_modules: tuple[str, ...]
    sampling: dict[str, Any]


BASES = {
    "miniature": Base(
        ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        {"num_inference_steps": 20, "eta": 1.0, "guidance_scale": 3.0},
    ),
    "miniature-flow": Base(
        (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
            "attn.add_v_proj", "ff.net.0.proj", "ff.net.2",
        ),
        {"num_inference_steps": 10, "noise": "cps", "eta": 1.0, "guidance_scale": 3.0},
    ),
}  # fmt: skip
#: gains whose CPU seconds and images are reported
TARGETS = (0.25, 0.5, 0.75)
MEASURED = ("alignment", "alignment_strict", "aesthetic")


def policy_gradient(objective: str, arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A score-function objective: 96 images a round in groups of eight, the first ten of twenty steps."""
    settings: dict[str, Any] = {
        "objective": (objective, arguments),
        "optimisation": {
            "learning_rate": 2e-3,
            "policy_steps": 8,
            "batch_size": 96,
            "accumulation": 1,
            "skip_last_steps": 10,
        },
        "kl": {"weight": 0.02},
        "advantage": {"baseline": "prompt", "normalize": True},
        "data": {"batch_size": 96, "samples_per_prompt": 8},
    }
    return merged(settings, changes)


def forward_process(objective: str, arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An objective on noised final samples: 96 images a round, ten steps of sampling."""
    settings: dict[str, Any] = {
        "objective": (objective, arguments),
        "sampling": {"num_inference_steps": 10},
        "optimisation": {"learning_rate": 1e-3, "policy_steps": 4, "batch_size": 96, "accumulation": 1},
        "kl": {"weight": 0.0},
        "advantage": {"baseline": "group"},
        "data": {"batch_size": 96, "samples_per_prompt": 8},
    }
    return merged(settings, changes)


def reward_gradient(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The reward's own gradient: 24 images a round, each of another prompt."""
    settings: dict[str, Any] = {
        "objective": ("RewardGradient", {"clip_reward_gradient": 1.0, **arguments}),
        "optimisation": {"learning_rate": 1e-3, "policy_steps": 1, "batch_size": 24},
        "kl": {"weight": 0.01},
        "data": {"batch_size": 24, "samples_per_prompt": 1},
    }
    return merged(settings, changes)


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Groups of settings with changes inside them."""
    return {**settings, **{group: {**settings.get(group, {}), **values} for group, values in changes.items()}}


GROUPS = {"advantage": {"baseline": "group", "clip": 5.0}}
#: two passes of four updates each, as many as the others make
TWICE = {"optimisation": {"epochs": 2, "batch_size": 240}}
REFL = {"variant": "refl", "steps": 17}
#: name → settings
VARIANTS: dict[str, dict[str, Any]] = {
    "DPOK": policy_gradient("DPOK", {"clip_range": 5e-3}),
    "DPOK, a quarter of the rate": policy_gradient("DPOK", {"clip_range": 5e-3}, optimisation={"learning_rate": 5e-4}),
    "PPO": policy_gradient("PPO", {"clip_range": 5e-3}),
    "GRPO": policy_gradient("GRPO", {"clip_range": 5e-3}, **GROUPS, **TWICE),
    "GRPO, a quarter of the rate": policy_gradient(
        "GRPO", {"clip_range": 5e-3}, **GROUPS, optimisation={"epochs": 2, "batch_size": 240, "learning_rate": 5e-4}
    ),
    "GRPO-Guard": policy_gradient("GRPOGuard", {"clip_range": 2e-6}, **GROUPS, **TWICE),
    "Flow-DPPO": policy_gradient(
        "FlowDPPO", {"max_divergence": 1e-4}, **GROUPS, optimisation={"epochs": 2, "policy_steps": 4}
    ),
    "NFT": forward_process("NFT", {"noise_draws": 4}),
    "AWM": forward_process("AWM", {"noise_draws": 4}),
    "best of 16": forward_process(
        "BestOfN",
        {"keep": 1, "noise_draws": 4, "text_dropout": 0.1},
        sampling={"guidance_scale": 1.0, "eval_steps": 20, "eval_guidance_scale": 3.0},
        optimisation={"learning_rate": 2e-3, "policy_steps": 16, "batch_size": 48},
        advantage={"baseline": "prompt"},
        replay={"buffer_size": 1200},
        data={"batch_size": 384, "samples_per_prompt": 16},
    ),
    "DRaFT, whole chain": reward_gradient({"variant": "draft"}),
    "DRaFT-4": reward_gradient({"variant": "draft", "steps": 4}),
    "ReFL, one update": reward_gradient(REFL),
    "ReFL, eight updates": reward_gradient(REFL, optimisation={"policy_steps": 8}),
    "ReFL, eight updates, no KL": reward_gradient(REFL, optimisation={"policy_steps": 8}, kl={"weight": 0.0}),
}


class Marks(L.Callback):
    """Counts the CPU seconds of training; scores validation prompts at each mark, and stops at the last.

    Args:
        every, until: seconds between two marks, and in all.
        prompts: how many validation prompts.
        sampling: of their images.
    """

    def __init__(self, every: float, until: float, prompts: int, sampling: dict[str, Any]) -> None:
        self.every, self.until, self.prompts, self.sampling = every, until, prompts, sampling
        self.seconds, self.images, self._since = 0.0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self._base: pd.DataFrame | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._base = self._scores(module, BlendSpec("base"))
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.process_time() - self._since
        self.images += len(batch["prompt"])
        if self.seconds >= self.every * (len(self.curve) + 1) or self.seconds >= self.until:
            self.curve.append(self._mark(module))
            print(json.dumps(self.curve[-1]), file=sys.stderr, flush=True)
        trainer.should_stop = self.seconds >= self.until
        self._since = time.process_time()

    def _mark(self, module: Any) -> dict[str, float]:
        assert self._base is not None
        scores = self._scores(module, BlendSpec("single", {"alignment": 1.0}))
        facts = {"cpu_s": round(self.seconds, 1), "images": self.images, "kl": float(scores["kl"].mean())}
        for name in MEASURED:
            gains = scores[f"reward/{name}"] - self._base[f"reward/{name}"]
            facts |= {name: float(gains.mean()), f"{name}_ci": float(1.96 * gains.std() / len(gains) ** 0.5)}
        return facts

    def _scores(self, module: Any, spec: BlendSpec) -> pd.DataFrame:
        rewards = dict(zip(MEASURED, (ShapeAlignment(), ShapeAlignment(strict=True), ShapeAesthetic()), strict=True))
        own = self.sampling
        steps, eta, guidance = own["num_inference_steps"], own["eta"], own["guidance_scale"]
        sampler = BlendSampler(
            module.backbone, rewards, steps, eta, guidance, None, seed=0, kl=True, noise=own.get("noise")
        )
        data = MiniatureDataModule(eval_batch_size=32, limit_val_prompts=self.prompts)
        data.setup("validate")
        return pd.DataFrame([row for batch in data.val_dataloader() for row in sampler.score(batch, spec).rows])


def halved(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for the flow miniature's ten steps instead of twenty: the first five, or ReFL at the last seven."""
    name, arguments = settings["objective"]
    if arguments.get("variant") == "refl":
        arguments = {**arguments, "steps": 7}
    found = {**settings, "objective": (name, arguments)}
    own = settings.get("sampling", {})
    found["sampling"] = {**own, **{key: 10 for key in ("num_inference_steps", "eval_steps") if key in own}}
    if "skip_last_steps" in settings["optimisation"]:
        found["optimisation"] = {**settings["optimisation"], "skip_last_steps": 5}
    return found


def build(settings: dict[str, Any], seed: int, base: str = "miniature") -> RewardRLModule:
    """The module of a variant."""
    settings = halved(settings) if base == "miniature-flow" else settings
    name, arguments = settings["objective"]
    rewards = {"alignment": ShapeAlignment(), "alignment_strict": ShapeAlignment(strict=True)}
    settings = {"replay": {"buffer_size": None}, **settings}
    groups = ("optimisation", "kl", "advantage", "replay")
    return RewardRLModule(
        DiffusersBackbone(base),
        WeightedReward(rewards, {"alignment": 0.4, "alignment_strict": 0.6}),
        objective=import_class(f"dblightning.objectives.{name}", "objective", Objective)(**arguments),
        adapter={"name": "alignment", "rank": 16, "target_modules": list(BASES[base].target_modules)},
        sampling={**BASES[base].sampling, **settings.get("sampling", {})},
        seed=seed,
        **{group: settings[group] for group in groups if group in settings},
    )


def train(settings: dict[str, Any], seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """The learning curve of a variant."""
    L.seed_everything(seed, verbose=False)
    module = build(settings, seed, options.base)
    data = MiniatureDataModule(train_on="wide", rollouts_per_epoch=10**6, **settings["data"])
    marks = Marks(options.every, options.seconds, options.prompts, BASES[options.base].sampling)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[marks],
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return marks.curve


def reached(curve: list[dict[str, float]], target: float) -> str:
    """CPU seconds and images at the first mark with this gain."""
    found = next((mark for mark in curve if mark["alignment"] >= target), None)
    return "—" if found is None else f"{found['cpu_s']:.0f} ({found['images']:.0f})"


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings = record["settings"]
    heads = (f"CPU s (images) to +{target:g}" for target in TARGETS)
    conditions = (
        f"{settings.get('base', 'miniature')}, {settings['seconds']:g} CPU seconds of training each, "
        f"{settings['prompts']} validation prompts, scored every "
        f"{settings['every']:g} seconds; gains over the base at the end, ± half a 95 % interval, and the path KL in "
        "nats. One thread."
    )
    columns = ("objective", "seed", "alignment", "strict", "aesthetic", "KL", "images")
    lines = opening(conditions, record, *columns, *heads)
    for run in record["runs"]:
        last = run["curve"][-1]
        gains = (f"{last[name]:+.2f} ± {last[f'{name}_ci']:.2f}" for name in MEASURED)
        times = (reached(run["curve"], target) for target in TARGETS)
        cells = [run["variant"], run["seed"], *gains, f"{last['kl']:.0f}", f"{last['images']:.0f}", *times]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def state(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The record so far, of the same settings; else a new one."""
    if options.json is not None and options.json.is_file():
        record: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))
        if record["settings"] == settings:
            return record
        raise SystemExit(f"{options.json} was made with {record['settings']}, not {settings}; name another file")
    return {"machine": machine.describe(), "settings": settings, "runs": []}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--base", choices=list(BASES), default="miniature")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="CPU seconds of training")
    parser.add_argument("--every", type=float, default=45.0, help="CPU seconds between two scorings")
    parser.add_argument("--prompts", type=int, default=64, help="validation prompts to score on")
    options = parsed(parser, arguments, tiny="one round and few prompts")
    if options.tiny:
        options.seconds, options.every, options.prompts = 0.0, 1.0, 4
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("seconds", "every", "prompts")}
    record = state(options, settings | ({"base": options.base} if options.base != "miniature" else {}))
    done = {(run["variant"], run["seed"]) for run in record["runs"]}
    left = [(name, seed) for seed in options.seeds for name in options.only if (name, seed) not in done]
    for name, seed in left:
        print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
        curve = train(VARIANTS[name], seed, options)
        record["runs"].append({"variant": name, "seed": seed, "curve": curve})
        publish(record, markdown(record), options.json)  # after each: a run takes minutes
    return record


if __name__ == "__main__":
    main()
