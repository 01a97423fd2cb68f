"""One loaded pipeline that several threads, and one batch of many preferences, use safely."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblightning.blending import METHODS, Blend, resolve_blend
from dblightning.class_paths import is_path
from dblightning.per_image import PerImage
from dblightning.pipeline import DiffusionBlendPipeline
from dblightning.preset import Preset


@dataclass(frozen=True)
class Job:
    """One image to make.

    Attributes:
        prompt: the text.
        preset: preference and settings; its base and adapters are not read, its seed is needed.
        height, width: in pixels; None is the model's own.
        negative_prompt: what guidance leads away from.
    """

    prompt: str
    preset: Preset
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""


class _Call(NamedTuple):
    """Settings that images of one pipeline call share."""

    steps: int
    guidance_scale: float | None
    eta: float | None
    height: int | None
    width: int | None
    needs_noise: bool
    factors: bool


def blend_of(preset: Preset, adapters: Sequence[str]) -> Blend:
    """The blend of a preset, checked against the adapters there are.

    Raises:
        TypeError, ValueError: an unknown method or adapter, weights that the method lacks or needs; in one sentence.
    """
    if not is_path(preset.method) and preset.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {preset.method!r}")
    blend = resolve_blend(
        preset.method, preset.weight_schedule(), preset.kl_scale, options=preset.method_options or None
    )
    blend.start(adapters, 1, preset.num_inference_steps)
    return blend


class SharedPipeline:
    """A pipeline that makes lists of images, each with its own preference; threads take turns.

    An image depends on its job alone: neither on the batch it is in nor on who else uses the pipeline.

    Args:
        pipe: the loaded pipeline; nobody else may load or delete adapters while it is shared.
        max_rows: rows of a denoiser call before guidance doubles them; None is no limit.
    """

    def __init__(self, pipe: DiffusionBlendPipeline, max_rows: int | None = None) -> None:
        self.pipe = pipe
        self.max_rows = max_rows
        self._lock = threading.RLock()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        base: str | Path = "miniature",
        adapters: Mapping[str, str | Path] | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        max_rows: int | None = None,
    ) -> SharedPipeline:
        """Load base and adapters.

        Args:
            base, adapters: as of ``DiffusionBlendPipeline.from_pretrained``.
            device: None takes a GPU where there is one.
            dtype: the base's precision, "float32", "float16" or "bfloat16"; None is float32 on the CPU, else float16.

        Raises:
            FileNotFoundError, ValueError: see there; also an unknown dtype.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = dtype or ("float32" if device.type == "cpu" else "float16")
        if name not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {name!r}")
        pipe = DiffusionBlendPipeline.from_pretrained(base, adapters=adapters, dtype=getattr(torch, name))
        return cls(pipe.to(device), max_rows)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in gate order."""
        return list(self.pipe.adapters.names)

    @contextmanager
    def alone(self) -> Iterator[DiffusionBlendPipeline]:
        """The pipeline for one thread, between other threads' images: to load or export an adapter."""
        with self._lock:
            yield self.pipe

    def check(self, job: Job) -> None:
        """Refuse a job that cannot be made, before any work.

        Raises:
            TypeError, ValueError: in one sentence.
        """
        if not job.prompt.strip():
            raise ValueError("the prompt is empty; describe the picture, for example 'A red circle.'")
        if job.preset.seed is None:
            raise ValueError("a job needs a seed")
        blend_of(job.preset, self.adapters)

    def make(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Images of jobs, float32 (3, H, W) in [0, 1] on the CPU, in the jobs' order.

        Jobs of equal steps, guidance, η and size share one pipeline call, so one denoiser pass a step, whatever their
        methods, weights and λ.

        Raises:
            TypeError, ValueError: a job that cannot be made, before the first image.
        """
        for job in jobs:
            self.check(job)
        made: dict[int, Tensor] = {}
        for call, members in self.groups(jobs).items():
            images = self._call(call, [jobs[i] for i in members])
            made |= dict(zip(members, images, strict=True))
        return [made[i] for i in range(len(jobs))]

    def groups(self, jobs: Sequence[Job]) -> dict[_Call, list[int]]:
        """Indices of the jobs that share a pipeline call, by the call's settings."""
        found: dict[_Call, list[int]] = {}
        for index, job in enumerate(jobs):
            found.setdefault(self._settings(job), []).append(index)
        return found

    def _settings(self, job: Job) -> _Call:
        preset = job.preset
        blend = blend_of(preset, self.adapters)
        steps = preset.num_inference_steps
        factors = blend.start(self.adapters, 1, steps)(0).factors
        return _Call(steps, preset.guidance_scale, preset.eta, job.height, job.width, blend.needs_noise, factors)

    def _call(self, call: _Call, jobs: Sequence[Job]) -> list[Tensor]:
        seeds = [job.preset.seed for job in jobs]
        arguments: dict[str, Any] = {
            "blend": PerImage([blend_of(job.preset, self.adapters) for job in jobs]),
            "num_inference_steps": call.steps,
            "guidance_scale": call.guidance_scale,
            "eta": call.eta,
            "height": call.height,
            "width": call.width,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds if seed is not None],
            "max_rows": self.max_rows,
        }
        if any(job.negative_prompt for job in jobs):
            arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
        with self._lock:
            made = self.pipe([job.prompt for job in jobs], output_type="pt", return_dict=False, **arguments)
        images: Tensor = made[0]
        return list(images.float().cpu())
