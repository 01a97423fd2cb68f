"""Distance of DB-MPA-LS from DB-MPA by the order of its draws: final latents and rewards on the miniature.

    python benchmarks/ls_draws.py --json benchmarks/results/ls_draws.json

Same prompts and the same noise for all. The distance is that of an image's final latents to DB-MPA's, averaged over
images and divided by the exact Rewarded Soup's, another method at the cost of one denoiser row a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.machine import describe, sentence
from benchmarks.publish import publish
from dblightning import miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA, DBMPALS, Blend, RewardedSoup
from dblightning.data import MiniatureDataModule
from dblightning.draws import DRAWS
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.noise import ImageNoise
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver

TWO, THREE = ("alignment", "aesthetic"), ("alignment", "aesthetic", "compressibility")
#: (adapters, weights, denoising steps)
CASES = [
    (TWO, (0.5, 0.5), 20),
    (TWO, (0.3, 0.7), 20),
    (THREE, (1 / 3, 1 / 3, 1 / 3), 20),
    (TWO, (0.5, 0.5), 50),
    (TWO, (0.3, 0.7), 50),
]


def methods(weights: dict[str, float]) -> dict[str, Blend]:
    """DB-MPA, the exact soup, and LS by each order of its draws."""
    ordered = {f"LS, {name}": DBMPALS(weights, name) for name in DRAWS}
    return {"DB-MPA": DBMPA(weights), "exact soup": RewardedSoup(weights), **ordered}


def final_latents(backbone: DiffusersBackbone, blend: Blend, prompts: list[str], steps: int, batch: int) -> Tensor:
    """Final latents (prompts, C, h, w); noise by the prompt's number, the same for every blend."""
    solver = make_solver(backbone.scheduler_config, steps, 1.0)
    parts = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        ids = list(range(start, start + len(texts)))
        noise = ImageNoise.of(0, ids, [0] * len(ids), backbone.device, stream="evaluation")
        parts.append(denoise_loop(backbone, backbone.encode(texts), solver, blend, noise, guidance_scale=3.0))
    return torch.cat(parts)


def measure(
    names: tuple[str, ...], values: tuple[float, ...], steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Distances over the soup's, and mean weighted rewards less DB-MPA's with their 95 % half width, by method."""
    backbone = DiffusersBackbone("miniature")
    for name in names:
        backbone.adapters.load(name, miniature.adapters()[name], backbone.pipeline)
    prompts = MiniatureDataModule(limit_test_prompts=options.images).test_prompts
    rewards = {"alignment": ShapeAlignment(), "aesthetic": ShapeAesthetic()}
    found: dict[str, dict[str, float]] = {}
    reference: Tensor | None = None
    scores: dict[str, Tensor] = {}
    for method, blend in methods(dict(zip(names, values, strict=True))).items():
        started = time.process_time()
        with torch.no_grad():
            latents = final_latents(backbone, blend, prompts, steps, options.batch)
            images = torch.cat([backbone.decode(part) for part in latents.split(options.batch)])
            scores[method] = sum(
                weight * rewards[name].score(images, prompts)
                for name, weight in zip(names, values, strict=True)
                if name in rewards
            )  # type: ignore[assignment]
        reference = latents if reference is None else reference
        gap = (scores[method] - scores["DB-MPA"]).double()
        found[method] = {
            "distance": float((latents - reference).flatten(1).norm(dim=1).mean()),
            "reward_less_db_mpa": float(gap.mean()),
            "half_width": float(1.96 * gap.std() / len(gap) ** 0.5),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
    soup = found["exact soup"]["distance"]
    for each in found.values():
        each["over_the_soups"] = each.pop("distance") / soup
    return {"adapters": names, "weights": values, "steps": steps, "images": len(prompts), "methods": found}


def to_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per case, one column per order of draws."""
    columns = [name for name in cases[0]["methods"] if name != "DB-MPA"]
    lines = ["| adapters, w | T | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for case in cases:
        cells = [
            f"{each['over_the_soups']:.2f} ({each['reward_less_db_mpa']:+.3f} ± {each['half_width']:.3f})"
            for each in (case["methods"][name] for name in columns)
        ]
        label = f"{len(case['adapters'])}, {' / '.join(f'{value:.2g}' for value in case['weights'])}"
        lines.append(f"| {label} | {case['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description="Order of DB-MPA-LS's draws, measured on the miniature.")
    parser.add_argument("--images", type=int, default=200, help="test prompts, one image each")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--json", type=Path, help="record; the table goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    cases = [measure(*case, options) for case in CASES]
    publish({"machine": machine, "cases": cases}, to_markdown(cases) + f"\n\n{sentence(machine)}", options.json)


if __name__ == "__main__":
    main()
