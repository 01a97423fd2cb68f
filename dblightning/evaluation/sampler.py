"""Generate and score: what the evaluation of checkpoints and the callback during training share."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dblightning import miniature
from dblightning.adapters import file_digest
from dblightning.backbone import Backbone
from dblightning.blending import Base
from dblightning.evaluation.path_kl import check_noise, path_kl
from dblightning.evaluation.record import INTERNAL
from dblightning.evaluation.specs import BlendSpec
from dblightning.flow import FlowNoise
from dblightning.noise import ImageNoise
from dblightning.rewards.base import RewardMetric
from dblightning.sampling import OnStep, StepRecord, denoise_loop
from dblightning.solvers import solver_of
from dblightning.steering import resolve_steering

#: side of the thumbnails in the score table, from which diversity is computed
THUMBNAIL = 8


class Scored(NamedTuple):
    """A batch's images and their rows of the score table."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    rows: list[dict[str, Any]]


@dataclass
class BlendSampler:
    """Images of blends, and their scores.

    Every blend gets the same noise for the same prompt and seed (common random numbers), so methods are compared image
    by image.

    Args:
        backbone: the base model with its adapters.
        rewards: name → reward; also what code, rgg and best-of-n steer by.
        num_inference_steps, eta, guidance_scale, negative_prompt: sampling settings.
        seed: of the noise.
        noise: of a flow's steps, see ``solvers.make_solver``.
        kl: measure the path KL of every image's policy to the base model. It runs the base once more at every step,
            one denoiser row per image and step (none for ``base`` and ``rgg``), which ``seconds`` and
            ``denoiser_rows`` do not count; the images stay the same to the bit.
    """

    backbone: Backbone
    rewards: Mapping[str, RewardMetric]
    num_inference_steps: int
    eta: float
    guidance_scale: float
    negative_prompt: str | None
    seed: int
    noise: FlowNoise | None = None
    kl: bool = False

    def __post_init__(self) -> None:
        self.solver = solver_of(self.backbone, self.num_inference_steps, self.eta, self.noise)

    def check(self, specs: Sequence[BlendSpec]) -> None:
        """Refuse what would fail later; draws nothing from torch's global generator. Adapters need not be loaded yet.

        Raises:
            ValueError: wrong weights, a reward that is not there, settings a method refuses; steps without noise where
                the KL is to be measured.
        """
        if self.kl:
            check_noise(self.solver)
        for spec in specs:
            spec.blend().start(spec.adapters, 1, self.num_inference_steps, [torch.Generator()])
            self._steering(spec)

    def check_adapters(self, specs: Sequence[BlendSpec]) -> None:
        """Refuse blends that their adapters, which are loaded by now, cannot be blended by; nothing is sampled.

        Raises:
            ValueError: factors that are to be averaged are of several ranks, or of a DoRA.
        """
        bank = self.backbone.adapters
        for spec in specs:
            step = spec.blend().start(spec.adapters, 1, self.num_inference_steps, [torch.Generator()])(0)
            if not step.factors:
                continue
            try:
                with bank.only(spec.adapters):
                    for layer in bank.layers():
                        layer.check_factors()
            except ValueError as error:
                raise ValueError(f"{spec.label}: {error}") from error

    def _steering(self, spec: BlendSpec) -> Any:
        if not spec.steers:
            return None
        unknown = [name for name in spec.weights if name not in self.rewards]
        if unknown:
            raise ValueError(
                f"method {spec.method!r} needs rewards to steer by: {unknown[0]!r} is not among {list(self.rewards)}"
            )
        # a reward that is only measured need not be one that a method can follow
        used = {name: reward for name, reward in self.rewards.items() if spec.weights.get(name, not spec.weights)}
        weights = {name: weight for name, weight in spec.weights.items() if weight}
        return resolve_steering(spec.method, used, weights or None, spec.kl_scale, options=spec.options)

    @torch.no_grad()
    def generate(self, batch: Mapping[str, Any], spec: BlendSpec, on_step: OnStep | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a prompt batch; ``on_step`` sees every step."""
        ids, seeds = batch["prompt_id"].tolist(), batch["seed"].tolist()
        noise = ImageNoise.of(self.seed, ids, seeds, self.backbone.device, stream="evaluation")
        with self.backbone.adapters.only(spec.adapters):
            latents = denoise_loop(
                self.backbone,
                self.backbone.encode(batch["prompt"], self.negative_prompt),
                self.solver,
                spec.blend(),
                noise,
                guidance_scale=self.guidance_scale,
                on_step=on_step,
                steering=self._steering(spec),
                prompts=batch["prompt"],
            )
        return self.backbone.decode(latents)

    @torch.no_grad()
    def score(self, batch: Mapping[str, Any], spec: BlendSpec) -> Scored:
        """Generate a prompt batch and score it with every reward."""
        device = self.backbone.device
        self.backbone.rows_run = 0
        steps: list[StepRecord] = []
        start = _now(device)
        images = self.generate(batch, spec, steps.append if self.kl and self.no_kl(spec) is None else None)
        seconds = (_now(device) - start) / len(images)
        denoiser_rows = self.backbone.rows_run / len(images)
        scores = {name: reward.score(images, batch["prompt"]).tolist() for name, reward in self.rewards.items()}
        thumbnails = thumbnail(images)
        measured = {"kl": self._path_kl(batch, spec, steps)} if self.kl else {}
        rows = []
        for index, prompt in enumerate(batch["prompt"]):
            row = spec.columns() | {
                "prompt_id": int(batch["prompt_id"][index]),
                "prompt": prompt,
                "seed": int(batch["seed"][index]),
                "seconds": seconds,
                "denoiser_rows": denoiser_rows,
                "thumbnail": thumbnails[index].numpy().tobytes(),
                **_category(batch, index),
                **{name: values[index] for name, values in measured.items()},
            }
            rows.append(row | {f"reward/{name}": values[index] for name, values in scores.items()})
        return Scored(images, rows)

    def no_kl(self, spec: BlendSpec) -> str | None:
        """Why a method's images have no path KL; None where they have one."""
        steering = self._steering(spec)
        return None if steering is None else type(steering).no_kl

    def _path_kl(self, batch: Mapping[str, Any], spec: BlendSpec, steps: Sequence[StepRecord]) -> list[float]:
        """Path KL of each image in nats, from the steps that made it; NaN where there is none."""
        if self.no_kl(spec) is not None:
            return [math.nan] * len(batch["prompt"])
        conditioning = self.backbone.encode(batch["prompt"], self.negative_prompt)

        def base(step: StepRecord) -> Tensor:
            if isinstance(spec.blend(), Base):
                return step.output
            scaled = self.solver.scale(step.latents, step.step_index)
            timesteps = step.timestep.to(scaled.device).expand(len(scaled))
            return self.backbone.denoise(scaled, timesteps, conditioning, self.guidance_scale)

        return path_kl(self.solver, steps, base).tolist()


def _category(batch: Mapping[str, Any], index: int) -> dict[str, str]:
    """The prompt's category, from the metadata column of that name or GenEval's ``tag``; empty where it has none."""
    column = batch.get("category", batch.get("tag"))
    value = None if column is None else column[index]
    return {} if value is None else {"category": str(value)}


def thumbnail(images: Tensor) -> Tensor:
    """Images averaged over an 8 × 8 grid, uint8 (B, 8, 8, 3)."""
    small = F.adaptive_avg_pool2d(images.float(), THUMBNAIL)
    return (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def adapter_folders(backbone: Backbone, adapters: Mapping[str, str | Path]) -> dict[str, Path]:
    """Name → folder; for a miniature its shipped adapters too, under the names that are not given."""
    folders = miniature.adapter_paths(adapters)
    embedded = miniature.EMBEDDED.get(getattr(backbone, "pretrained", ""))
    return folders if embedded is None else embedded.adapters() | folders


def load_adapters(
    backbone: Backbone, specs: Sequence[BlendSpec], adapters: Mapping[str, str | Path]
) -> dict[str, dict[str, Any]]:
    """Load the adapters some blends run, as far as they are not loaded yet.

    Returns:
        Name → path, SHA-256 of the file, and the facts it holds about its making.

    Raises:
        ValueError: an adapter without a folder, or one made for another base model.
        FileNotFoundError: no LoRA in a folder.
    """
    folders = adapter_folders(backbone, adapters)
    wanted = dict.fromkeys(name for spec in specs for name in spec.adapters)
    loaded = {}
    for name in wanted:
        if name in backbone.adapters.names:
            continue
        if name not in folders:
            raise ValueError(
                f"a blend runs adapter {name!r}, but the adapters are {sorted(folders)}; "
                f"add the folder of its LoRA under that name to adapters"
            )
        facts = backbone.adapters.load(name, folders[name], getattr(backbone, "pipeline", None))
        loaded[name] = {"path": str(folders[name]), **facts, "sha256": adapter_digest(folders[name])}
    return loaded


def made_with(backbone: Backbone, rewards: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that images and scores depend on beyond an evaluation's arguments: base model and rewards, JSON-able."""
    config = {
        name: value for name, value in backbone.scheduler_config.items() if name == "_class_name" or name[0] != "_"
    }
    return {
        "dtype": str(next(iter(_frozen(backbone).values())).dtype).removeprefix("torch."),
        "resolution": getattr(backbone, "resolution", None),
        "scheduler": {name: plain(value) for name, value in config.items()},
        "base_weights": _digest(_frozen(backbone).values()),
        "rewards": {name: describe(reward) for name, reward in rewards.items()},
    }


def describe(reward: Any) -> dict[str, Any]:
    """A reward's class, settings and weights, those of the rewards it is made of as well."""
    settings = {name: _short(plain(value)) for name, value in vars(reward).items() if not name.startswith("_")}
    parts = {
        name: describe(part)
        for name, part in reward.named_modules()
        if isinstance(part, RewardMetric) and part is not reward
    }
    return {
        "class": f"{type(reward).__module__}.{type(reward).__qualname__}",
        **{name: value for name, value in settings.items() if value is not None and name not in INTERNAL},
        **({"parts": parts} if parts else {}),
        **({"parameters": _digest(tensors)} if (tensors := list(reward.parameters())) else {}),
    }


def plain(value: Any) -> Any:
    """Numbers, strings and nests of them as JSON has them; None for anything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None


def _short(value: Any, length: int = 1000) -> Any:
    """The value, or its SHA-256 where it is longer than that as JSON, as the metadata of 1,353 prompts is."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= length else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _frozen(backbone: Backbone) -> dict[str, Tensor]:
    """The base model's parameters, by name."""
    adapters = {id(each) for name in backbone.adapters.names for each in backbone.adapters.parameters(name)}
    named = backbone.named_parameters()
    return {name: each for name, each in named if id(each) not in adapters and ".lora_" not in name}


def _digest(tensors: Iterable[Tensor], samples: int = 16) -> str:
    """SHA-256 of sixteen evenly spaced values of every tensor, in whatever order and under whatever names they come.

    A fraction of a second for gigabytes; training, or another checkpoint, changes every value of most tensors.
    """
    parts = []
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().flatten()
        chosen = torch.linspace(0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64).long()
        parts.append((tuple(tensor.shape), flat[chosen.to(flat.device)].double()))
    if not parts:
        return ""
    values = torch.cat([each for _, each in parts]).cpu()  # one transfer
    pieces = values.split([len(each) for _, each in parts])
    ordered = sorted(f"{shape}{piece.tolist()}" for (shape, _), piece in zip(parts, pieces, strict=True))
    return hashlib.sha256("".join(ordered).encode()).hexdigest()


def adapter_digest(folder: str | Path) -> str:
    """SHA-256 of an exported adapter's file: which weights a row was made with."""
    return file_digest(folder)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
