"""Errors of rounding in the exact KL and its gradient: dimension × guidance × precision, against float32.

    python benchmarks/kl_precision.py --json benchmarks/results/kl_precision.json

A shipped adapter of the miniature, weakened until its path KL is about 1e-5, 0.1 and 10 nats (256 dimensions, guidance
3), is compared with its base by ``RewardRLModule.policy_loss`` on every step of one trajectory: with predictions in the
model's own precision (``kl_precision: model``) and in float32 arithmetic (``float32``). The truth is a float32 model
with the same weights' values and prompts. "autocast" is a float32 model under bfloat16 autocast (``bf16-mixed``).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.publish import opening, parsed, publish
from dblightning import miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Single
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.module import RewardRLModule
from dblightning.noise import ImageNoise
from dblightning.replay import Transitions
from dblightning.rollout import rollout

PRECISIONS = ("bfloat16", "float16", "autocast")
#: share of the adapter's strength
STRENGTHS = (1e-4, 0.0116, 0.117)
PROMPT = "a red circle"


def module_of(dtype: str, dimensions: int, steps: int) -> RewardRLModule:
    """The module with the shipped adapter at full strength; the loss is the KL alone."""
    # 4 channels, and 4 × 4 pixels to a latent
    backbone = DiffusersBackbone("miniature", dtype=dtype, resolution=4 * round((dimensions / 4) ** 0.5))  # type: ignore[arg-type]
    if math.prod(backbone.latent_shape) != dimensions:
        raise ValueError(f"dimensions must be 4 times a square, such as 64, 256 or 1024, got {dimensions}")
    module = RewardRLModule(
        backbone, ShapeAesthetic(), adapter={"init": str(miniature.adapters("0.1")["aesthetic"])},
        sampling={"num_inference_steps": steps}, optimisation={"reward_weight": 1e-30}, kl={"weight": 1.0},
        advantage={"baseline": "prompt"}, replay={"buffer_size": None},
    )  # fmt: skip
    module.prompts = {0: PROMPT}
    return module


def widened(module: RewardRLModule, dimensions: int, steps: int) -> RewardRLModule:
    """A float32 module with the same weights' values and the same prompt embeddings."""
    wide = module_of("float32", dimensions, steps)
    backbone: Any = wide.backbone
    backbone.unet.load_state_dict({key: each.float() for key, each in module.backbone.unet.state_dict().items()})  # type: ignore[union-attr, operator]
    encode = module.backbone.encode
    backbone.encode = lambda *texts: encode(*texts).to(torch.float32)
    return wide


def trajectory_of(module: RewardRLModule, guidance: float) -> Transitions:
    """Every step of one trajectory of the adapter."""
    conditioning = module.backbone.encode([PROMPT], None)
    trajectory = rollout(
        module.backbone, conditioning, module.solver, Single(module.adapter_name), ImageNoise([0]), guidance, "gated"
    )
    count = len(trajectory.latents) - 1
    ones, zeros = torch.ones(count), torch.zeros(count, dtype=torch.long)
    return Transitions(
        latents=trajectory.latents[:-1, 0], next_latents=trajectory.latents[1:, 0], step_index=torch.arange(count),
        log_prob=trajectory.log_probs[:, 0], reward=ones, baseline=ones, scale=ones, prompt_id=zeros, age=zeros,
    )  # fmt: skip


def kl_and_gradient(module: RewardRLModule, transitions: Transitions, autocast: bool) -> tuple[float, Tensor]:
    """The path KL as it is logged, nats, and the gradient of the loss."""
    parameters = module.backbone.adapters.parameters(module.adapter_name)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss, metrics = module.policy_loss(transitions)
    for exponent in range(16, -16, -4):  # the loss scale that a gradient scaler would find
        scaled = torch.autograd.grad(loss * 2.0**exponent, parameters, retain_graph=True)
        gradient = torch.cat([each.flatten() for each in scaled]).double() / 2.0**exponent
        if bool(gradient.isfinite().all()):
            break
    return float(metrics["train/kl"].detach()), gradient


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per dimension, precision, guidance and strength."""
    rows = []
    for dimensions in options.dimensions:
        for precision in options.precisions:
            autocast = precision == "autocast"
            module = module_of("float32" if autocast else precision, dimensions, options.steps)
            wide = widened(module, dimensions, options.steps)
            full = [each.detach().clone() for each in module.backbone.adapters.parameters(module.adapter_name)]
            for guidance in options.guidance:
                for each in (module, wide):
                    each.policy.sampling = replace(each.policy.sampling, guidance_scale=guidance)
                transitions = None
                for strength in options.strengths:
                    for each in (module, wide):
                        weaken(each, full, strength)
                    transitions = transitions or trajectory_of(wide, guidance)
                    true, straight = kl_and_gradient(wide, transitions, False)
                    row = {"dimensions": dimensions, "precision": precision, "guidance": guidance, "kl": true}
                    for kl_precision in ("model", "float32"):
                        module.kl.settings = replace(module.kl.settings, precision=kl_precision)
                        module.backbone.rows_run = 0
                        value, gradient = kl_and_gradient(module, transitions, autocast)
                        cosine = torch.nn.functional.cosine_similarity(gradient, straight, dim=0)
                        row |= {f"{kl_precision}_kl": value, f"{kl_precision}_cosine": float(cosine)}
                        row[f"{kl_precision}_rows"] = module.backbone.rows_run / len(transitions.reward)
                    rows.append(row)
    return rows


@torch.no_grad()
def weaken(module: RewardRLModule, full: list[Tensor], strength: float) -> None:
    """Set the adapter to a share of its strength: B times it."""
    parameters = module.backbone.adapters.parameters(module.adapter_name)
    for index, (parameter, original) in enumerate(zip(parameters, full, strict=True)):
        parameter.copy_(original * (strength if index % 2 else 1.0))  # A, B, A, B, …


def markdown(record: dict[str, Any]) -> str:
    """The record as a table: a cell has one value per strength."""
    settings = record["settings"]
    conditions = (
        f"Path KL in nats over {settings['steps']} steps, and cosine of its gradient with float32's; a cell has one "
        f"value for each of {len(settings['strengths'])} strengths of the adapter. torch {record['torch']}, CPU."
    )
    columns = ("KL", "`model` reads", "`float32` reads", "cosine `model`", "cosine `float32`")
    lines = opening(conditions, record, "dimensions", "guidance", "precision", *columns)
    keys = ("kl", "model_kl", "float32_kl", "model_cosine", "float32_cosine")
    for dimensions in settings["dimensions"]:
        for guidance in settings["guidance"]:
            for precision in settings["precisions"]:
                here = (dimensions, guidance, precision)
                rows = [r for r in record["rows"] if (r["dimensions"], r["guidance"], r["precision"]) == here]
                cells = [" / ".join(number(row[key], key) for row in rows) for key in keys]
                lines.append(f"| {dimensions} | {guidance:g} | {precision} | {' | '.join(cells)} |")
    worst = max(abs(row["float32_kl"] / row["kl"] - 1) for row in record["rows"])
    least = min(row["float32_cosine"] for row in record["rows"])
    first = record["rows"][0]
    lines += [
        "",
        f"With `float32` the largest error of the KL is {worst:.1e} of it, the smallest cosine {least:.4f}. Denoiser "
        f"rows per transition: {first['model_rows']:g} with `model`, {first['float32_rows']:g} with `float32`, of "
        "which one with gradients, in the model's precision.",
    ]
    return "\n".join(lines)


def number(value: float, key: str) -> str:
    if key.endswith("cosine"):
        return f"{value:.2f}" if value < 0.995 else f"{value:.4f}"
    return f"{value:.1e}" if value < 5e-4 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 256, 1024], help="of the latents")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="of the adapter")
    parser.add_argument("--steps", type=int, default=10)
    options = parsed(parser, arguments)
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    described = machine.describe()
    record = {"machine": described, "torch": torch.__version__, "settings": settings, "rows": measure(options)}
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
