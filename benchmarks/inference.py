"""Cost of each inference-time method: seconds per image, denoiser rows, memory, and the ratio to the base model.

    python benchmarks/inference.py --model miniature --batch 1
    python benchmarks/inference.py --model sd15 --resolution 128 --steps 3 --repeats 3
    python benchmarks/inference.py --model sd15 --resolution 512 --steps 50 --device cuda --dtype bf16 --compile blocks

``sd15`` is Stable Diffusion 1.5's architecture with random weights (weights do not matter for time); a folder or hub id
works too. "base" is the plain UNet without PEFT layers. Every repeat runs all methods once, and a ratio is the median
over repeats of a method's time divided by the base's time in the same repeat. On the CPU times are the process's own
CPU seconds, which other load disturbs less than the clock; on a GPU they are wall seconds after a synchronisation.
Text encoding and the final decoding are left out; CoDe's and RGG's own decoding and scoring count.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.publish import opening, parsed, publish
from dblightning.backbone import Conditioning, DiffusersBackbone
from dblightning.blending import DBKLA, DBMPA, DBMPALS, Base, RewardedSoup, RewardedSoupFactors
from dblightning.noise import ImageNoise
from dblightning.rewards.base import RewardMetric
from dblightning.sampling import denoise_loop
from dblightning.solvers import make_solver
from dblightning.steering import RGG, CoDe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ["r1", "r2", "r3", "r4"]


class Brightness(RewardMetric):
    """A reward that costs nothing, so that steering's own cost is seen."""

    is_differentiable = True

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.flatten(1).mean(1)


def pipeline(model: str, dtype: torch.dtype) -> Any:
    """A Stable Diffusion pipeline, random weights where ``model`` names an architecture."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    from dblightning.backbone import load_pipeline
    from dblightning.miniature import pretrain

    if model not in ("miniature", "sd15"):
        return load_pipeline(model, dtype)
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    if model == "miniature":
        unet, vae = pretrain.build_unet(), pretrain.build_vae()
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=pretrain.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=pretrain.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return made.to(dtype)


def backbones(options: argparse.Namespace) -> tuple[DiffusersBackbone, DiffusersBackbone]:
    """The plain model, and the one with adapters; they share the base's weights."""
    plain, adapted = pair_of(pipeline(options.model, DTYPES[options.dtype]).to(options.device), options.resolution)
    for backbone in (plain, adapted):
        backbone.compile_denoiser(options.compile)
    return plain, adapted


def pair_of(made: Any, resolution: int | None) -> tuple[DiffusersBackbone, DiffusersBackbone]:
    """A pipeline's backbone without adapters, and one with four of random weights; they share the base's weights."""
    other = copy.copy(made)
    name = "unet" if hasattr(made, "unet") else "transformer"
    denoiser = getattr(made, name)
    setattr(other, name, copy.deepcopy(denoiser, {id(weight): weight for weight in denoiser.parameters()}))
    plain = DiffusersBackbone.from_pipeline(other, resolution)
    adapted = DiffusersBackbone.from_pipeline(made, resolution)
    for seed, name in enumerate(NAMES):
        adapted.adapters.add(name, rank=4, seed=seed)
        for layer in adapted.adapters.layers():
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.02)
    adapted.adapters.train_only(None)
    return plain, adapted


def methods(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name → what :func:`denoise_loop` is given."""
    two, three = {"r1": 0.3, "r2": 0.7}, {"r1": 0.2, "r2": 0.3, "r3": 0.5}
    four = dict.fromkeys(NAMES, 0.25)
    reward = {"bright": Brightness()}
    settings = dict(candidates=options.candidates, block_size=options.block_size)
    return {
        "base": dict(blend=Base()),
        "DB-MPA, one-hot w": dict(blend=DBMPA({"r1": 1.0, "r2": 0.0})),
        "DB-MPA, m=2": dict(blend=DBMPA(two)),
        "DB-MPA, m=2, merged": dict(blend=DBMPA(two), execution="merged"),
        "DB-MPA, m=3": dict(blend=DBMPA(three)),
        "DB-MPA, m=4": dict(blend=DBMPA(four)),
        "DB-MPA-LS, m=2": dict(blend=DBMPALS(two)),
        "DB-MPA-LS, m=2, gated": dict(blend=DBMPALS(two), execution="gated"),
        "DB-KLA": dict(blend=DBKLA("r1", 1.5)),
        "exact soup": dict(blend=RewardedSoup(two)),
        "exact soup, gated": dict(blend=RewardedSoup(two), execution="gated"),
        "factor soup": dict(blend=RewardedSoupFactors(two)),
        "CoDe, block": dict(blend=Base(), steering=CoDe(reward, form="block", **settings)),
        "CoDe, look-ahead": dict(blend=Base(), steering=CoDe(reward, form="lookahead", **settings)),
        "RGG": dict(blend=Base(), steering=RGG(reward, gamma=None)),
        "RGG, through UNet": dict(blend=Base(), steering=RGG(reward, gamma=None, through_denoiser=True)),
    }


class PeakMemory:
    """Peak memory inside the block, MB: the allocator's on a GPU, resident memory on the CPU (sampled)."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.peak = 0.0

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * 4096 / 1e6)
            if self.done.wait(0.02):
                return

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated() / 1e6
        else:
            self.done.set()
            self.thread.join()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns the record that is written."""
    described = machine.describe()
    plain, adapted = backbones(options)
    cuda = options.device.startswith("cuda")
    chosen = {name: each for name, each in methods(options).items() if any(part in name for part in options.methods)}
    chosen = {"base": dict(blend=Base()), **chosen}
    config = adapted.unet.config
    length = 16 if options.model == "miniature" else 77
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, options.batch, length, config.cross_attention_dim, generator=generator)
    embeds = embeds.to(options.device, DTYPES[options.dtype])
    conditioning = Conditioning(embeds[0], embeds[0][:, 0], embeds[1], embeds[1][:, 0])
    solver = make_solver(adapted.scheduler_config, options.steps, 1.0)
    rows = 0

    def counted(backbone: DiffusersBackbone) -> None:
        denoise = backbone.denoise

        def count(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal rows
            rows += len(latents) * (2 if options.guidance_scale > 1 else 1)
            return denoise(latents, *args, **kwargs)

        backbone.denoise = count  # type: ignore[method-assign]

    counted(plain)
    counted(adapted)

    def run(name: str) -> tuple[float, int, float]:
        nonlocal rows
        rows = 0
        backbone = plain if name == "base" else adapted
        with PeakMemory(options.device) as memory, torch.no_grad():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter() if cuda else time.process_time()
            denoise_loop(
                backbone,
                conditioning,
                solver,
                noise=ImageNoise(list(range(options.batch)), options.device),
                guidance_scale=options.guidance_scale,
                prompts=[""] * options.batch,
                max_rows=options.max_rows,
                **chosen[name],
            )
            if cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() if cuda else time.process_time()) - start
        return seconds, rows, memory.peak

    if not options.no_warm_up:
        for name in chosen:
            run(name)
    results: dict[str, list[tuple[float, int, float]]] = {name: [] for name in chosen}
    for _ in range(options.repeats):
        for name in chosen:
            results[name].append(run(name))
    base_bytes = sum(weight.numel() * weight.element_size() for weight in plain.unet.parameters())
    layers = list(adapted.adapters.layers())
    merged = sum(
        layer.get_base_layer().weight.numel() * layer.get_base_layer().weight.element_size() for layer in layers
    )
    one = sum(weight.numel() * weight.element_size() for weight in adapted.adapters.parameters(NAMES[0]))
    adapted.adapters.drop_merged()
    start = time.process_time()
    with adapted.adapters.merged((0.3, 0.7, 0.0, 0.0)):
        merging = time.process_time() - start
    table = []
    for name, runs in results.items():
        ratios = [mine[0] / base[0] for mine, base in zip(runs, results["base"], strict=True)]
        table.append(
            {
                "method": name,
                "seconds_per_image": statistics.median(each[0] for each in runs) / options.batch,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "denoiser_rows_per_image": runs[0][1] / options.batch,
                "peak_mb": max(each[2] for each in runs),
            }
        )
    return {
        "machine": described,
        "settings": {key: value for key, value in vars(options).items() if key not in ("json", "methods")},
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "unet_parameters": sum(weight.numel() for weight in plain.unet.parameters()),
        "memory": {
            "unet_mb": base_bytes / 1e6,
            "adapter_share": one / base_bytes,  # each adapter's A and B, float32
            "adapter_share_stacked": 2 * one / base_bytes,  # with the copy stacked for mixed rows
            "merged_share": merged / base_bytes,  # each merged copy of the adapted matrices
        },
        "merge_seconds": merging,
        "results": table,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    settings, memory = record["settings"], record["memory"]
    resolution = f"{settings['resolution']}²" if settings["resolution"] else "its own size"
    conditions = (
        f"{settings['model']} at {resolution}, batch {settings['batch']}, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, {settings['dtype']}, {record['device']}, torch {record['torch']}, "
        f"{settings['repeats']} interleaved repeats."
    )
    lines = opening(conditions, record, "method", "s per image", "× base", "denoiser rows per image", "peak MB")
    for row in record["results"]:
        spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
        lines.append(
            f"| {row['method']} | {row['seconds_per_image']:.3f} | {spread} | {row['denoiser_rows_per_image']:g} | "
            f"{row['peak_mb']:.0f} |"
        )
    lines += [
        "",
        f"Memory beside the UNet's {memory['unet_mb']:.0f} MB: {memory['adapter_share']:.2%} per adapter "
        f"({memory['adapter_share_stacked']:.2%} while mixed rows are gated), {memory['merged_share']:.1%} per merged "
        f"copy of the adapted matrices. Merging once: {record['merge_seconds']:.3f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="miniature, sd15 (random weights), a folder or a hub id")
    parser.add_argument("--resolution", type=int, help="image side in pixels; default: the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--candidates", type=int, default=4, help="of CoDe")
    parser.add_argument("--block-size", type=int, default=5, help="of CoDe")
    parser.add_argument("--max-rows", type=int, help="rows per UNet call")
    parser.add_argument("--methods", nargs="+", default=[""], help="only methods whose name contains one of these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--compile", default="none", choices=["none", "blocks", "whole"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--no-warm-up", action="store_true", help="skip the unmeasured first round")
    options = parsed(parser)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    record = measure(options)
    publish(record, markdown(record), options.json)


if __name__ == "__main__":
    main()
