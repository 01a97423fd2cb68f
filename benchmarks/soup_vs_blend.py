"""When does the exact soup do what DB-MPA does? Both on the miniature, against adapter scale and number of adapters.

    python benchmarks/soup_vs_blend.py --out docs/soup_vs_blend

To first order in ΔW the prediction of Σ wᵢ ΔWᵢ is Σ wᵢ times the predictions' differences, so the two agree for small
adapters. Every shipped adapter's ΔW is multiplied by a scale (0.25 … 4) and two things are measured at equal weights:

* along DB-MPA's own trajectories, ‖ε_soup − ε_DB-MPA‖ / ‖ε_DB-MPA − ε_base‖, mean over steps and images;
* the weighted reward of the images each method makes from the same noise, with paired 95 % intervals against DB-MPA.

Against training length or rank instead, give the adapters of each point, and they are taken as they are:

    python benchmarks/soup_vs_blend.py --out docs/results/soup_vs_training --images 200 --seeds 2 --series \
        20=alignment=runs/a/adapter-epoch4,aesthetic=runs/b/adapter-epoch1 80=alignment=runs/a/adapter,...
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.publish import header, publish
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA, DBMPALS, Base, RewardedSoup, RewardedSoupFactors
from dblightning.miniature import adapters as shipped_adapters
from dblightning.miniature import rewards as miniature_rewards
from dblightning.miniature import world
from dblightning.noise import ImageNoise
from dblightning.sampling import Run, StepRecord, denoise_loop
from dblightning.solvers import make_solver

REWARDS = {
    "alignment": miniature_rewards.ShapeAlignment,
    "aesthetic": miniature_rewards.ShapeAesthetic,
    "compressibility": miniature_rewards.compressibility,
}
METHODS: dict[str, Any] = {
    "DB-MPA": DBMPA,
    "DB-MPA-LS": lambda weights: DBMPALS(weights, "systematic"),
    "exact soup": RewardedSoup,
    "factor soup": RewardedSoupFactors,
}


def load(options: argparse.Namespace, given: dict[str, str]) -> tuple[DiffusersBackbone, list[str]]:
    """The miniature with its shipped adapters or those given, or another base with random ones (to try the script)."""
    backbone = DiffusersBackbone(options.base)
    if not options.random:
        folders = given or {name: folder for name, folder in shipped_adapters("0.1").items() if name in REWARDS}
        for name in sorted(folders, key=list(REWARDS).index):
            backbone.adapters.load(name, folders[name], backbone.pipeline)
        return backbone, backbone.adapters.names
    for seed, name in enumerate(REWARDS):
        backbone.adapters.add(name, rank=4, seed=seed)
        for layer in backbone.adapters.layers():
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.01)
    backbone.adapters.train_only(None)
    return backbone, backbone.adapters.names


@torch.no_grad()
def rescale(backbone: DiffusersBackbone, factor: float) -> None:
    """Multiply every adapter's ΔW."""
    for layer in backbone.adapters.layers():
        for side in layer.lora_B.values():
            side.weight.mul_(factor)


@torch.no_grad()
def relative_difference(backbone: DiffusersBackbone, options: argparse.Namespace, weights: dict[str, float]) -> float:
    """Mean over steps and images of ‖ε_soup − ε_DB-MPA‖ / ‖ε_DB-MPA − ε_base‖ along DB-MPA's trajectories."""
    prompts = world.test_prompts()[: options.walks]
    conditioning = backbone.encode(prompts)
    solver = make_solver(backbone.scheduler_config, options.steps, options.eta)
    noise = ImageNoise(list(range(len(prompts))))
    names = backbone.adapters.names

    def run(blend: Any) -> Run:
        plan = blend.start(names, len(prompts), options.steps)
        return Run(backbone, conditioning, solver, plan, noise, options.guidance_scale)

    soup, base = run(RewardedSoup(weights)), run(Base())
    ratios: list[Tensor] = []

    def compare(step: StepRecord) -> None:
        apart = (soup.predict(step.latents, step.step_index) - step.output).flatten(1).norm(dim=1)
        moved = (step.output - base.predict(step.latents, step.step_index)).flatten(1).norm(dim=1)
        ratios.append(apart / moved)

    denoise_loop(
        backbone, conditioning, solver, DBMPA(weights), noise, guidance_scale=options.guidance_scale, on_step=compare
    )
    return float(torch.stack(ratios).mean())


@torch.no_grad()
def scores(backbone: DiffusersBackbone, options: argparse.Namespace, blend: Any, weights: dict[str, float]) -> Tensor:
    """Weighted reward of each prompt, mean over its images: (prompts,)."""
    prompts = world.test_prompts()[: options.images]
    solver = make_solver(backbone.scheduler_config, options.steps, options.eta)
    total = []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        of_seeds = []
        for seed in range(options.seeds):
            noise = ImageNoise([seed * len(prompts) + start + index for index in range(len(part))])
            latents = denoise_loop(
                backbone, backbone.encode(part), solver, blend, noise, guidance_scale=options.guidance_scale
            )
            images = backbone.decode(latents)
            parts = [weight * REWARDS[name]().score(images, part) for name, weight in weights.items()]
            of_seeds.append(torch.stack(parts).sum(0))
        total.append(torch.stack(of_seeds).mean(0))
    return torch.cat(total)


def interval(values: Tensor) -> float:
    """Half width of the 95 % interval of the mean."""
    return float(1.96 * values.std() / len(values) ** 0.5)


def study(options: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(options).items()}, "points": []}
    series = {label: pairs.split(",") for label, pairs in (each.split("=", 1) for each in options.series)}
    for label, pairs in (series or {"": options.adapters}).items():
        backbone, names = load(options, dict(pair.split("=", 1) for pair in pairs))
        # the base model's images depend neither on the adapters nor on their scale
        counts = range(2, len(names) + 1)
        bases = {m: scores(backbone, options, Base(), dict.fromkeys(names[:m], 1 / m)) for m in counts}
        for scale in [1.0] if options.series else options.scales:
            rescale(backbone, scale)
            for m in counts:
                point = {"series": label, "scale": scale, "m": m, **measured(backbone, options, names[:m], bases[m])}
                record["points"].append(point)
                print(json.dumps(point), flush=True)
            rescale(backbone, 1 / scale)
    return record


def measured(
    backbone: DiffusersBackbone, options: argparse.Namespace, names: list[str], base: Tensor
) -> dict[str, Any]:
    """Both measurements of some adapters at equal weights."""
    weights = dict.fromkeys(names, 1 / len(names))
    made = {name: scores(backbone, options, method(weights), weights) for name, method in METHODS.items()}
    rewards = {"base": {"mean": float(base.mean()), "ci": interval(base)}}
    for name, got in made.items():
        gain, apart = got - base, got - made["DB-MPA"]
        rewards[name] = {
            "mean": float(got.mean()),
            "ci": interval(got),
            "gain": float(gain.mean()),
            "gain_ci": interval(gain),
            "minus_db_mpa": float(apart.mean()),
            "minus_db_mpa_ci": interval(apart),
        }
    return {"relative_difference": relative_difference(backbone, options, weights), "rewards": rewards}


def markdown(record: dict[str, Any]) -> str:
    """The points as a table."""
    others = [name for name in METHODS if name != "DB-MPA"]
    columns = (f"{name} − DB-MPA" for name in others)
    lines = header("series", "scale", "m", "relative difference", "DB-MPA's gain", *columns)
    for point in record["points"]:
        blend = point["rewards"]["DB-MPA"]
        cells = [point["rewards"][name] for name in others]
        apart = " | ".join(f"{each['minus_db_mpa']:+.3f} ± {each['minus_db_mpa_ci']:.3f}" for each in cells)
        lines.append(
            f"| {point['series']} | {point['scale']:g} | {point['m']} | {point['relative_difference']:.3f} | "
            f"{blend['gain']:+.2f} ± {blend['gain_ci']:.2f} | {apart} |"
        )
    return "\n".join(lines)


def figure(record: dict[str, Any]) -> Any:
    """Left: how far soup and blend part; right: what that means in reward (m = 2)."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    points = record["points"]
    for m in sorted({point["m"] for point in points}):
        chosen = [point for point in points if point["m"] == m]
        scales = [point["scale"] for point in chosen]
        left.plot(scales, [point["relative_difference"] for point in chosen], "o-", label=f"m = {m}")
    first = points[0]
    line = [first["relative_difference"] * scale / first["scale"] for scale in scales]
    left.plot(scales, line, ":", color="0.5", label="first order: ∝ scale")
    left.set(xscale="log", yscale="log", xlabel="adapter scale", ylabel="‖ε soup − ε DB-MPA‖ / ‖ε DB-MPA − ε base‖")
    left.legend(frameon=False)
    chosen = [point for point in points if point["m"] == 2]
    for name in ["base", *METHODS]:
        style = "--" if name == "base" else "o-"
        values = [point["rewards"][name] for point in chosen]
        (line,) = right.plot(scales, [each["mean"] for each in values], style, label=name, markersize=4)
        right.fill_between(
            scales,
            [each["mean"] - each["ci"] for each in values],
            [each["mean"] + each["ci"] for each in values],
            alpha=0.1,
            color=line.get_color(),
        )
    right.set(xscale="log", xlabel="adapter scale", ylabel="weighted reward, m = 2, equal weights")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="miniature")
    parser.add_argument("--random", action="store_true", help="random adapters instead of the shipped ones")
    parser.add_argument("--adapters", nargs="*", default=[], help="name=folder, instead of the shipped ones")
    parser.add_argument("--series", nargs="*", default=[], help="label=name=folder,name=folder: one point each")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--images", type=int, default=64, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=1, help="images per prompt")
    parser.add_argument("--walks", type=int, default=16, help="trajectories along which predictions are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/soup_vs_blend"), help="writes .json, .md and .png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    record = study(options)
    publish(record, markdown(record), options.out.with_suffix(".json"))
    if not options.series:
        figure(record).savefig(options.out.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
