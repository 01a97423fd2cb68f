"""DiffusionBlendPipeline: blends for diffusers users. A thin shell around the backbone and the denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters import AdapterBank
from dblightning.backbone import DiffusersBackbone, load_pipeline
from dblightning.blending import Base, BatchWeights, Blend, WeightSchedule, resolve_blend
from dblightning.noise import GeneratorNoise
from dblightning.sampling import Execution, Steering, denoise_loop
from dblightning.schedule import ddim_scheduler
from dblightning.solvers import Solver, make_solver
from dblightning.steering import STEERING, Reward, resolve_steering, steers

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class BlendOutput:
    """What a call returns.

    Attributes:
        images: a list of PIL images; or float32 (N, 3, H, W) in [0, 1] for "pt", (N, H, W, 3) for "np", latents
            (N, C, h, w) for "latent".
    """

    images: Any


class _Stopped(Exception):
    """A callback set ``interrupt``; holds the latents so far."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class DiffusionBlendPipeline:
    """A diffusers text-to-image pipeline whose LoRA adapters are blended while it samples.

        pipe = DiffusionBlendPipeline.from_pretrained(base, adapters={"alignment": path, "aesthetic": path})
        pipe("A red car.", weights={"alignment": 0.3, "aesthetic": 0.7}).images[0]

    Whatever is not defined here is the wrapped pipeline's: ``pipe.vae``, ``pipe.enable_vae_tiling()``,
    ``pipe.set_progress_bar_config(...)``, ``pipe.components``, …
    """

    def __init__(self, backbone: DiffusersBackbone) -> None:
        self.backbone = backbone
        self._interrupt = False

    # ── making one ───────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        scheduler: Any = None,
        allow_other_base: bool = False,
    ) -> DiffusionBlendPipeline:
        """Load a base model and adapters.

        Args:
            base: pipeline folder, hub id, or "miniature" (whose shipped adapters are loaded unless others are named).
            adapters: name → folder or file of a LoRA in diffusers' format.
            torch_dtype: precision of the base; adapters and latents stay float32.
            variant: weight variant of the base's files, such as "fp16".
            scheduler: a diffusers scheduler; None is DDIM with the base's noise schedule.
            allow_other_base: load adapters that were trained on another base all the same.

        Raises:
            FileNotFoundError: base or adapter not there.
            ValueError: an adapter that does not fit the base, or a scheduler that clips.
        """
        pipeline = load_pipeline(str(base), torch_dtype, variant)
        if scheduler is None:
            scheduler = ddim_scheduler(pipeline.scheduler.config)
        pipeline.scheduler = scheduler
        if adapters is None and str(base) == "miniature":
            from dblightning import miniature

            adapters = miniature.adapters()
        pipe = cls(DiffusersBackbone.from_pipeline(pipeline))
        for name, path in (adapters or {}).items():
            pipe.load_adapter(name, path, allow_other_base)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any) -> DiffusionBlendPipeline:
        """Wrap a diffusers pipeline with the LoRAs it has (``load_lora_weights(path, adapter_name=...)``).

        The components are shared, and the LoRA layers become gated in place: from now on ``pipeline`` itself runs the
        base model, and adapters are chosen by ``weights`` here. The pipeline's scheduler is kept.

        Raises:
            ValueError: a pipeline of another kind, LoRA on layers that are not linear, or a fused LoRA.
        """
        return cls(DiffusersBackbone.from_pipeline(pipeline))

    def load_adapter(self, name: str, path: str | Path, allow_other_base: bool = False) -> dict[str, Any]:
        """Load a LoRA under a name and return its metadata; see :meth:`AdapterBank.load`."""
        return self.adapters.load(name, path, self.backbone.pipeline, allow_other_base)

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None) -> None:
        """diffusers' name for :meth:`load_adapter`."""
        if adapter_name is None:
            raise ValueError("a blend chooses adapters by name: pass adapter_name='...'")
        self.load_adapter(adapter_name, path)

    # ── what it is made of ───────────────────────────────────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Any:
        if name == "backbone":  # not there yet, in copying and unpickling
            raise AttributeError(name)
        return getattr(self.backbone.pipeline, name)

    @property
    def adapters(self) -> AdapterBank:
        """The adapters; ``pipe.adapters.names``, ``pipe.adapters.merged_limit``, ``pipe.adapters.drop_merged()``."""
        return self.backbone.adapters

    @property
    def scheduler(self) -> Any:
        """The solver: a DDIMScheduler takes ``eta``, any other diffusers scheduler steps by its own rule."""
        return self.backbone.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.backbone.pipeline.scheduler = scheduler

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def to(self, *args: Any, **kwargs: Any) -> DiffusionBlendPipeline:
        """Move to a device or a dtype, as diffusers' pipelines do."""
        self.adapters.drop_merged()
        self.backbone.pipeline.to(*args, **kwargs)
        return self

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "sequential offload moves single layers, behind the gated layers' back; use enable_model_cpu_offload()"
        )

    # ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        method: str = "db-mpa",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        normalize: bool = False,
        ls_schedule: str = "iid",
        rewards: Mapping[str, Reward] | None = None,
        method_options: Mapping[str, Any] | None = None,
        steering: Steering | None = None,
        blend: Blend | type[Blend] | str | None = None,
        execution: Execution = "auto",
        max_rows: int | None = None,
    ) -> BlendOutput | tuple[Any]:
        """Make images.

        Args:
            prompt: one text, or a list.
            weights: adapter → weight, each ≥ 0, sum 1; a list with one per image; or a function (step_index,
                num_steps) → either. For ``code`` and ``rgg`` the names are those of ``rewards``.
            kl_scale: λ ≥ 0 of ``db-mpa`` and ``db-kla``, one for all images or one each; 0 the base, 1 the adapters,
                more extrapolates.
            method: base, single, db-mpa, db-kla, db-mpa-ls, rewarded-soup, rewarded-soup-factors, code or rgg; or the
                dotted path of a ``Blend`` or ``Steering`` class.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 turns it off.
            eta: DDIM's η, 0 deterministic … 1; schedulers that have none refuse it. None is 1 with DDIM, and 0 with
                others that have one.
            negative_prompt: one for all prompts, or one per prompt.
            num_images_per_prompt: images of each prompt, side by side in the output.
            height, width: in pixels; None takes the model's own.
            generator: one for the whole batch, or one per image (then an image does not depend on its batch).
            latents: initial noise (images, C, h, w).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple (images,).
            callback_on_step_end: called as (pipe, step_index, timestep, tensors); may return {"latents": …}, and may
                set ``pipe._interrupt`` to stop. CoDe's candidates are N latents per image.
            callback_on_step_end_tensor_inputs: what the callback is given, of "latents", "noise_pred",
                "prompt_embeds" and "negative_prompt_embeds".
            normalize: divide weights by their sum.
            ls_schedule: "iid" or "systematic", of ``db-mpa-ls``.
            rewards: name → reward, of ``code`` and ``rgg``.
            method_options: further arguments of the method's class, such as ``{"candidates": 8}`` of CoDe.
            steering: a CoDe or RGG of your own on top of any blend.
            blend: instead of ``method``: a blend's object, which holds its own settings, or its class.
            execution, max_rows: see :func:`dblightning.sampling.arrange`.

        Returns:
            :class:`BlendOutput`, or (images,).

        Raises:
            TypeError, ValueError: settings that do not fit, before the first denoiser call.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check(prompts, output_type, num_images_per_prompt, callback_on_step_end_tensor_inputs)
        if blend is None and steers(method):
            if steering is not None:
                raise ValueError(f"method {method!r} is a steering itself; give steering= to a blend such as 'base'")
            if callable(weights):
                raise ValueError(f"method {method!r} takes weights per image, not a function of the step")
            steering = resolve_steering(method, rewards, weights, kl_scale, normalize, method_options)
            blend = Base()
        else:
            if rewards:
                raise ValueError(f"rewards belong to {sorted(STEERING)}, not to {blend or method!r}")
            blend = resolve_blend(blend or method, weights, kl_scale, normalize, ls_schedule, method_options)
        solver = self._solver(num_inference_steps, eta)
        backbone = self.backbone
        shape = self._latent_shape(height, width)
        texts = [each for each in prompts for _ in range(num_images_per_prompt)]
        negatives = negative_prompt
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            negatives = [each for each in negative_prompt for _ in range(num_images_per_prompt)]
        if latents is not None and latents.shape != (len(texts), *shape):
            raise ValueError(f"latents must be {(len(texts), *shape)} for these prompts, got {tuple(latents.shape)}")
        device = backbone.device
        if hasattr(backbone.unet, "_hf_hook"):  # offloaded weights travel, merged copies would not
            execution = "gated"
        noise = GeneratorNoise(generator, len(texts), device, next(backbone.unet.parameters()).dtype)
        conditioning = backbone.encode(texts, negatives)
        first = noise(shape) if latents is None else latents.to(device)
        self._interrupt = False
        resolution = backbone.resolution
        backbone.resolution = shape[1] * self.vae_scale_factor  # SDXL is told the size
        try:
            with self.progress_bar(total=len(solver.timesteps)) as bar:

                def on_step(step_index: int, before: Tensor, output: Tensor, following: Tensor) -> Tensor | None:
                    replaced = None
                    if callback_on_step_end is not None:
                        tensors = {
                            "latents": following,
                            "noise_pred": output,
                            "prompt_embeds": conditioning.prompt_embeds,
                            "negative_prompt_embeds": conditioning.negative_prompt_embeds,
                        }
                        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
                        given = {name: tensors[name] for name in wanted}
                        returned = callback_on_step_end(self, step_index, solver.timesteps[step_index], given)
                        replaced = (returned or {}).get("latents")
                    bar.update()
                    if self._interrupt:
                        raise _Stopped(following if replaced is None else replaced)
                    return replaced

                try:
                    result = denoise_loop(
                        backbone,
                        conditioning,
                        solver,
                        blend,
                        noise,
                        guidance_scale,
                        first,
                        execution,
                        max_rows,
                        on_step,
                        steering,
                        texts,
                    )
                except _Stopped as stopped:
                    result = stopped.latents
            images = self._output(result, output_type)
        finally:
            backbone.resolution = resolution
            self.maybe_free_model_hooks()
        return BlendOutput(images) if return_dict else (images,)

    def _check(self, prompts: list[str], output_type: str, per_prompt: int, tensors: Sequence[str]) -> None:
        if not prompts or not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"prompt must be a text or a non-empty list of texts, got {prompts!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {per_prompt}")
        known = ("latents", "noise_pred", "prompt_embeds", "negative_prompt_embeds")
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {known}, got {unknown[0]!r}")

    def _solver(self, num_inference_steps: int, eta: float | None) -> Solver:
        if eta is None and "DDIM" in type(self.scheduler).__name__:
            eta = 1.0
        return make_solver(self.scheduler, num_inference_steps, eta)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of a picture of this size."""
        backbone = self.backbone
        channels, side, _ = backbone.latent_shape
        factor = self.vae_scale_factor
        sizes = [side * factor if each is None else each for each in (height, width)]
        step = factor * 2 ** (len(backbone.unet.config.block_out_channels) - 1)
        for each in sizes:
            if each < step or each % step:
                raise ValueError(f"height and width must be multiples of {step} for this model, got {each}")
        if backbone.is_xl and sizes[0] != sizes[1]:
            raise ValueError(f"SDXL is told one size: height and width must be equal, got {sizes[0]} and {sizes[1]}")
        return channels, sizes[0] // factor, sizes[1] // factor

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = self.backbone.decode(latents)
        if output_type == "pt":
            return images
        processor = self.image_processor
        pixels = processor.pt_to_numpy(images)
        return pixels if output_type == "np" else processor.numpy_to_pil(pixels)
