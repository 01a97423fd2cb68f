"""Distance of DB-MPA-LS from DB-MPA by the order of its draws: final latents and rewards on the miniature.

    python benchmarks/ls_draws.py --json benchmarks/results/ls_draws.json
    python benchmarks/ls_draws.py --strengths 0.5 1.5 2 --images 100 --json benchmarks/results/ls_strengths.json

Same prompts and the same noise for all. The distance is that of an image's final latents to DB-MPA's, averaged over
images and divided by the exact Rewarded Soup's, another method at the cost of one denoiser row a step.

With strengths λ, LS draws the base too (λ < 1) or scales its gates (λ > 1); its distance is to DB-KLA's (one adapter)
or DB-MPA's of that λ, divided by theirs to the base model's.
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
from benchmarks.publish import header, publish
from dblightning import miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA, DBMPALS, Base, Blend, RewardedSoup
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
    names: tuple[str, ...],
    values: tuple[float, ...],
    steps: int,
    options: argparse.Namespace,
    strength: float | None = None,
) -> dict[str, Any]:
    """Distances over the soup's, and mean weighted rewards less DB-MPA's with their 95 % half width, by method.

    With a ``strength`` λ they are over the base model's instead.
    """
    backbone = DiffusersBackbone("miniature")
    for name in names:
        backbone.adapters.load(name, miniature.adapters("0.1")[name], backbone.pipeline)
    prompts = MiniatureDataModule(limit_test_prompts=options.images).test_prompts
    rewards = {"alignment": ShapeAlignment(), "aesthetic": ShapeAesthetic()}
    found: dict[str, dict[str, float]] = {}
    reference: Tensor | None = None
    scores: dict[str, Tensor] = {}
    weights = dict(zip(names, values, strict=True))
    compared = methods(weights) if strength is None else with_strength(weights, strength)
    for method, blend in compared.items():
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
    yardstick = "exact soup" if strength is None else "base"
    unit, kind = found[yardstick]["distance"], "over_the_soups" if strength is None else "over_the_bases"
    for each in found.values():
        each[kind] = each.pop("distance") / unit
    case = {"adapters": names, "weights": values, "steps": steps, "images": len(prompts), "methods": found}
    return case if strength is None else case | {"strength": strength}


#: (adapters, weights) of the strengths
STRENGTH_CASES = [(("aesthetic",), (1.0,)), (("alignment",), (1.0,)), (TWO, (0.5, 0.5))]


def with_strength(weights: dict[str, float], strength: float) -> dict[str, Blend]:
    """DB-MPA with λ, which is DB-KLA where it has one adapter, the base, and LS with that λ."""
    ordered = {f"LS, {name}": DBMPALS(weights, name, kl_scale=strength) for name in ("iid", "rotation")}
    return {"DB-MPA": DBMPA(weights, kl_scale=strength), "base": Base(), **ordered}


def strengths_to_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per adapters and λ."""
    lines = header("adapters", "λ", "LS, iid", "LS, rotation")
    for case in cases:
        cells = [
            f"{each['over_the_bases']:.2f} ({each['reward_less_db_mpa']:+.3f} ± {each['half_width']:.3f})"
            for each in (case["methods"][name] for name in ("LS, iid", "LS, rotation"))
        ]
        lines.append(f"| {', '.join(case['adapters'])} | {case['strength']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    parser.add_argument("--strengths", type=float, nargs="+", help="λ of LS, against DB-KLA's and DB-MPA's, T = 20")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    if options.strengths:
        cases = [measure(*case, 20, options, each) for case in STRENGTH_CASES for each in options.strengths]
        table = strengths_to_markdown(cases)
    else:
        cases = [measure(*case, options) for case in CASES]
        table = to_markdown(cases)
    publish({"machine": machine, "cases": cases}, f"{table}\n\n{sentence(machine)}", options.json)


if __name__ == "__main__":
    main()
