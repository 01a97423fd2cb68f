"""DiffusionBlendPipeline: blends for diffusers users. A thin shell around the backbone and the denoising loop."""

# Longer than 400 lines: a third is ``__call__``'s argument list and its documentation, which are diffusers' pipelines'.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from dblightning.backbone import Conditioning, DiffusersBackbone, Size
from dblightning.blending import Base, BatchWeights, Blend, WeightSchedule, resolve_blend
from dblightning.draws import DEFAULT_DRAWS
from dblightning.flow import FlowNoise
from dblightning.noise import GeneratorNoise
from dblightning.pipeline_call import CallbackTensors, CallSettings, RunningCalls
from dblightning.pipeline_files import FileMethods, assembled
from dblightning.pipeline_inputs import SizeInputs, TextInputs, check_taken, condition, repeated
from dblightning.pipeline_lora import REFUSED
from dblightning.sampling import Change, Execution, OnStep, Steering, StepRecord, denoise_loop
from dblightning.solvers import Solver, make_solver, takes_eta
from dblightning.steering import STEERING, Reward, resolve_steering, steers

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class BlendOutput(BaseOutput):
    """Result of a call; ``output.images``, ``output["images"]`` and ``output[0]`` are the same.

    Attributes:
        images: a list of PIL images; or float32 (N, 3, H, W) in [0, 1] for "pt", (N, H, W, 3) for "np", latents
            (N, C, h, w) for "latent".
        nsfw_content_detected: the safety checker's verdict on each image; None without one.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


class _Stopped(Exception):
    """A callback set ``interrupt``; holds the latents so far."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


def _of_call(name: str, writable: bool = False) -> Any:
    """A property that is a setting of the running call (of the last one, when none runs)."""

    def read(pipe: DiffusionBlendPipeline) -> Any:
        return getattr(pipe._calls.get(), name)

    def write(pipe: DiffusionBlendPipeline, value: Any) -> None:
        pipe._calls.set(name, value)

    return property(read, write if writable else None)


class DiffusionBlendPipeline(FileMethods):
    """A diffusers text-to-image pipeline whose LoRA adapters are blended while it samples.

        pipe = DiffusionBlendPipeline.from_pretrained(base, adapters={"alignment": path, "aesthetic": path})
        pipe("A red car.", weights={"alignment": 0.3, "aesthetic": 0.7}).images[0]

    Whatever is not defined here is the wrapped pipeline's: ``pipe.vae``, ``pipe.enable_vae_tiling()``,
    ``pipe.set_progress_bar_config(...)``, ``pipe.components``, …; assigning a component assigns it there.

    Args:
        backbone: a wrapped pipeline.
        components: or, instead, the components of a StableDiffusionPipeline or (with ``text_encoder_2`` or
            ``tokenizer_2``) StableDiffusionXLPipeline.
    """

    #: as diffusers' callbacks read and change them; a thread sees its own call's
    guidance_scale = _of_call("guidance_scale")
    guidance_rescale = _of_call("guidance_rescale")
    clip_skip = _of_call("clip_skip")
    cross_attention_kwargs = _of_call("cross_attention_kwargs")
    denoising_end = _of_call("denoising_end")
    num_timesteps = _of_call("num_timesteps")
    interrupt = _of_call("interrupt")
    do_classifier_free_guidance = _of_call("guided")
    _guidance_scale = _of_call("guidance_scale", writable=True)
    _guidance_rescale = _of_call("guidance_rescale", writable=True)
    _interrupt = _of_call("interrupt", writable=True)

    def __init__(self, backbone: DiffusersBackbone | None = None, **components: Any) -> None:
        if backbone is not None and components:
            raise TypeError(f"give a backbone or components, not both; got both a backbone and {sorted(components)}")
        if backbone is None:
            backbone = DiffusersBackbone.from_pipeline(assembled(components))
        if not isinstance(backbone, DiffusersBackbone):
            kind = type(backbone).__name__
            raise TypeError(
                f"backbone must be a DiffusersBackbone, got {kind}; wrap a pipeline with from_pipe(pipeline)"
            )
        super().__init__(backbone)
        self._calls = RunningCalls()

    # ── what it is made of ───────────────────────────────────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Any:
        if name == "backbone" or name.startswith("__"):  # not there yet, in copying and unpickling
            raise AttributeError(name)
        if name in REFUSED:

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise ValueError(f"{name} is not for blends: {REFUSED[name]}")

            return refuse
        return getattr(self.backbone.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "backbone" or name in self.__dict__ or hasattr(type(self), name)
        if own and name != "scheduler":
            object.__setattr__(self, name, value)
        elif "backbone" in self.__dict__ and hasattr(self.backbone.pipeline, name):
            setattr(self.backbone.pipeline, name, value)
        else:
            object.__setattr__(self, name, value)

    @property
    def scheduler(self) -> Any:
        """The solver: a DDIMScheduler takes ``eta``, any other diffusers scheduler steps by its own rule."""
        return self.backbone.pipeline.scheduler

    @property
    def _optional_components(self) -> list[str]:
        return list(self.backbone.pipeline._optional_components)

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return [*self.backbone.pipeline._callback_tensor_inputs, "noise_pred"]

    def to(self, *args: Any, **kwargs: Any) -> DiffusionBlendPipeline:
        """Move to a device or a dtype, as diffusers' pipelines do; the adapters keep their float32 values."""
        bank = None if self.backbone.denoiser is None else self.adapters
        if bank is None:
            self.backbone.pipeline.to(*args, **kwargs)
            return self
        bank.drop_merged()
        kept = {parameter: parameter.data for name in bank.names for parameter in bank.parameters(name)}
        self.backbone.pipeline.to(*args, **kwargs)
        for parameter, data in kept.items():
            parameter.data = data.to(parameter.device)
        bank.refresh()
        return self

    # ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        method: str | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = None,
        eta: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        normalize: bool = False,
        ls_schedule: str = DEFAULT_DRAWS,
        rewards: Mapping[str, Reward] | None = None,
        method_options: Mapping[str, Any] | None = None,
        steering: Steering | None = None,
        blend: Blend | type[Blend] | str | None = None,
        execution: Execution = "auto",
        max_rows: int | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        noise: FlowNoise | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        mu: float | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        calibrate: bool = False,
    ) -> BlendOutput | tuple[Any, ...]:
        """Make images. What is not explained here is as in diffusers.

        Args:
            prompt: one text, or a list; or give ``prompt_embeds``.
            weights: adapter → weight, each ≥ 0, sum 1; a list with one per image; or a function (step_index,
                num_steps) → either. For ``code``, ``rgg``, ``best-of-n`` the names are those of ``rewards``.
            kl_scale: λ ≥ 0 of ``db-mpa``, ``db-mpa-ls`` and ``db-kla``, one for all images or one each; 0 the base, 1
                the adapters, more extrapolates.
            method: base, single, db-mpa, db-kla, db-mpa-ls, rewarded-soup, rewarded-soup-factors, code, rgg or
                best-of-n; or the dotted path of a ``Blend`` or ``Steering`` class. None is db-mpa with ``weights``;
                without, the adapters :meth:`set_adapters` made active, or the base model where no adapters are loaded.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 turns it off; None is diffusers' default, 7.5 (SDXL: 5).
            eta: DDIM's η, 0 deterministic … 1; schedulers that have none refuse it. None is diffusers' default 0, and 1
                for what needs noise: db-mpa-ls, code, rgg, ``steering``.
            negative_prompt: one for all prompts, or one per prompt.
            num_images_per_prompt: images of each prompt, side by side in the output.
            height, width: in pixels; None takes the model's own.
            generator: one for the whole batch, or one per image (then an image does not depend on its batch).
            latents: initial noise (images, C, h, w).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple, as the plain pipeline's.
            callback_on_step_end: called as (pipe, step_index, timestep, tensors). The tensors it returns or changes
                are used from then on; it may set ``pipe._guidance_scale``, and ``pipe._interrupt`` to stop. CoDe's
                candidates are N latents per image.
            callback_on_step_end_tensor_inputs: what the callback is given, of ``pipe._callback_tensor_inputs``.
            normalize: divide weights by their sum.
            ls_schedule: "rotation", "golden", "iid" (the paper's) or "systematic", of ``db-mpa-ls``.
            rewards: name → reward, of ``code`` and ``rgg``.
            method_options: further arguments of the method's class, such as ``{"candidates": 8}`` of CoDe.
            calibrate: run adapters at the strengths kept in their metadata (docs/evaluation.md); ``method_options``
                may name others.
            steering: a CoDe or RGG of your own on top of any blend.
            blend: instead of ``method``: a blend's object, which holds its own settings, or its class.
            execution, max_rows: see :func:`dblightning.sampling.arrange`.
            cross_attention_kwargs: ``scale`` scales all adapters.
            noise: of a flow's steps where η > 0: "flow_sde", "dance_sde" or "cps"; None is "cps".
            joint_attention_kwargs: ``cross_attention_kwargs`` under the name that transformers have for them.
            negative_original_size, negative_target_size: SDXL's sizes of the unconditional pass; both or none.

        Returns:
            :class:`BlendOutput`, or its values as a tuple.

        Raises:
            TypeError, ValueError: settings that do not fit, before the first denoiser call.
        """
        backbone = self.backbone
        pipeline = backbone.pipeline
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            raise ValueError(f"ip_adapter_image is not for blends: {REFUSED['load_ip_adapter']}")
        prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        per_prompt = 1 if num_images_per_prompt is None else num_images_per_prompt
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self._check(prompts, prompt_embeds, output_type, per_prompt, names)
        if guidance_scale is None:
            guidance_scale = backbone.family.guidance_scale
        options = self._calibrated(method_options) if calibrate else method_options
        chosen, steering = self._blend(
            blend, method, weights, kl_scale, normalize, ls_schedule, rewards, options, steering
        )
        noisy = steering is not None or chosen.needs_noise
        if eta is None and noisy and takes_eta(self.scheduler):
            eta = 1.0
        size = self._size(height, width)
        solver = self._solver(num_inference_steps, eta, timesteps, sigmas, denoising_end, noise, mu, size)
        shape = backbone.latent_shape_of(size)
        inputs = TextInputs(
            prompts,
            prompt_2,
            negative_prompt,
            negative_prompt_2,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_3,
            negative_prompt_3,
            max_sequence_length,
        )
        images = inputs.count * per_prompt
        if latents is not None and latents.shape != (images, *shape):
            raise ValueError(f"latents must be {(images, *shape)} for these prompts, got {tuple(latents.shape)}")
        call = CallSettings(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            cross_attention_kwargs=joint_attention_kwargs or cross_attention_kwargs,
            denoising_end=denoising_end,
            num_timesteps=len(solver.timesteps),
            embedded_guidance=backbone.family.guidance == "embedded",
        )
        device = backbone.device
        sizes = SizeInputs(
            original_size,
            crops_coords_top_left,
            target_size,
            negative_original_size,
            negative_crops_coords_top_left,
            negative_target_size,
        )
        inputs.check(backbone)
        sizes.check(backbone)
        draws = GeneratorNoise(generator, images, device, backbone.family.embeds_dtype)
        if not backbone.can_merge:  # hooks move or cast the weights; merged copies would stay as they are
            execution = "gated"
        before = self._calls.start(call)
        try:
            # offloaded models leave the device when a call ends, so those calls take turns
            with backbone.lock if hasattr(backbone.denoiser, "_hf_hook") else nullcontext():
                conditioning = condition(backbone, inputs, sizes, call, per_prompt, size)
                first = draws(shape) if latents is None else latents.to(device)
                with self.progress_bar(total=len(solver.timesteps)) as bar:
                    try:
                        result = denoise_loop(
                            backbone,
                            conditioning,
                            solver,
                            chosen,
                            draws,
                            guidance_scale=guidance_scale,
                            latents=first,
                            execution=execution,
                            max_rows=max_rows,
                            on_step=self._on_step(call, conditioning, callback_on_step_end, names, bar),
                            steering=steering,
                            prompts=repeated(prompts, inputs.count, per_prompt),
                        )
                    except _Stopped as stopped:
                        result = stopped.latents
                made, unsafe = self._output(result, output_type)
        finally:
            self._calls.end(before)
            pipeline.maybe_free_model_hooks()
        if return_dict:
            return BlendOutput(made, unsafe)
        return (made, unsafe) if backbone.family.has_verdicts else (made,)

    def _check(
        self,
        prompts: list[str] | None,
        prompt_embeds: Tensor | None,
        output_type: str,
        per_prompt: int,
        tensors: Sequence[str],
    ) -> None:
        if prompts is None and prompt_embeds is None:
            raise ValueError("give a prompt, a text or a non-empty list of texts, or prompt_embeds; got neither")
        if prompts is not None and (not prompts or not all(isinstance(each, str) for each in prompts)):
            raise ValueError(f"prompt must be a text or a non-empty list of texts, got {prompts!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {per_prompt}")
        known = self._callback_tensor_inputs
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {known}, got {unknown[0]!r}")

    def _calibrated(self, method_options: Mapping[str, Any] | None) -> dict[str, Any]:
        """A method's options with the adapters' own strengths, as ``python -m dblightning calibrate`` wrote them."""
        kept = {name: facts.get("calibration") for name, facts in self._metadata.items()}
        strengths = {name: each["strength"] for name, each in kept.items() if each}
        if not strengths:
            raise ValueError(
                f"calibrate takes strengths from the adapters' metadata, and none of {self.adapters.names} has one; "
                "python -m dblightning calibrate --write puts it there"
            )
        return {"strengths": strengths, **(method_options or {})}

    def _blend(
        self,
        blend: Blend | type[Blend] | str | None,
        method: str | None,
        weights: BatchWeights | WeightSchedule | None,
        kl_scale: float | Sequence[float],
        normalize: bool,
        ls_schedule: str,
        rewards: Mapping[str, Reward] | None,
        method_options: Mapping[str, Any] | None,
        steering: Steering | None,
    ) -> tuple[Blend, Steering | None]:
        """Blend and steering of the call."""
        if blend is not None and method is not None:
            raise ValueError(f"give method or blend, not both; got method {method!r} and blend {blend!r}")
        named = (blend, method, weights, rewards, method_options)
        if all(each is None for each in named) and kl_scale == 1:
            default = self.default_blend()
            if default is not None:
                return default, steering
        name = method or "db-mpa"
        if blend is None and steers(name):
            if steering is not None:
                raise ValueError(f"method {name!r} is a steering itself; give steering= to a blend such as 'base'")
            if callable(weights):
                raise ValueError(f"method {name!r} takes weights per image, not a function of the step")
            return Base(), resolve_steering(name, rewards, weights, kl_scale, normalize, method_options)
        if rewards:
            raise ValueError(f"rewards belong to {sorted(STEERING)}, not to {blend or name!r}")
        return resolve_blend(blend or name, weights, kl_scale, normalize, ls_schedule, method_options), steering

    def _solver(
        self,
        num_inference_steps: int | None,
        eta: float | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        denoising_end: float | None,
        noise: FlowNoise | None,
        mu: float | None,
        size: Size,
    ) -> Solver:
        given = {"denoising_end": denoising_end, "mu": mu}
        # FLUX computes μ of its own accord, and takes none
        check_taken(self.backbone, [name for name, value in given.items() if value is not None])
        self.backbone.family.check_scheduler(self.scheduler.config)
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both")
        custom: dict[str, Any] = {
            name: each for name, each in (("timesteps", timesteps), ("sigmas", sigmas)) if each is not None
        }
        options = self.backbone.schedule_options(None if custom else num_inference_steps, size) | custom
        count = None if custom else num_inference_steps
        solver: Solver = make_solver(
            self.scheduler, count, eta, noise=noise, **options | ({} if mu is None else {"mu": mu})
        )
        if denoising_end is not None and 0 < denoising_end < 1:
            total = self.scheduler.config.num_train_timesteps
            kept = solver.timesteps >= round(total - denoising_end * total)
            solver.timesteps = solver.timesteps[: int(kept.sum())]
        return solver

    def _size(self, height: int | None, width: int | None) -> Size:
        """Height and width of the images in pixels."""
        backbone = self.backbone
        default_height, default_width = backbone.default_size
        size = (default_height if height is None else height, default_width if width is None else width)
        unit = backbone.family.size_unit
        for each in size:
            if each < unit or each % unit:
                raise ValueError(
                    f"height and width must be multiples of {unit}, and are best multiples of {backbone.size_step} "
                    f"for this model, got {each}"
                )
        return size

    def _on_step(
        self,
        call: CallSettings,
        conditioning: Conditioning,
        callback: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None,
        names: Sequence[str],
        bar: Any,
    ) -> OnStep:
        """Tasks after each step: the callback, the progress bar, the stop."""
        tensors = CallbackTensors(conditioning, call.guided)

        def on_step(step: StepRecord) -> Change:
            change = Change()
            if callback is not None:
                known = {**tensors.held, "latents": step.next_latents, "noise_pred": step.output}
                guidance, rescale = call.guidance_scale, call.guidance_rescale
                given = {name: known[name] for name in names}
                returned = callback(self, step.step_index, step.timestep, given) or {}
                if call.guided and not call.has_negatives:
                    raise ValueError(
                        "a callback turned guidance on, but the call has no negative_prompt_embeds; pass them"
                    )
                made = tensors.taken(returned)
                if call.guidance_rescale != rescale:
                    made = tensors.conditioning = tensors.conditioning._replace(guidance_rescale=call.guidance_rescale)
                changed = call.guidance_scale if call.guidance_scale != guidance else None
                change = Change(returned.get("latents"), made, changed)
            bar.update()
            if call.interrupt:
                raise _Stopped(step.next_latents if change.latents is None else change.latents)
            return change

        return on_step

    def _output(self, latents: Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Images as the caller wants them, and the safety checker's verdicts."""
        if output_type == "latent":
            return latents, None
        images = self.backbone.decode(latents)
        images, unsafe = self._screened(images)
        if output_type == "pt":
            return images, unsafe
        processor = self.image_processor
        pixels = processor.pt_to_numpy(images)
        return (pixels if output_type == "np" else processor.numpy_to_pil(pixels)), unsafe

    def _screened(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Images in [0, 1] after the wrapped pipeline's watermark or safety checker, where it has one."""
        pipeline = self.backbone.pipeline
        if getattr(pipeline, "watermark", None) is not None:
            return (pipeline.watermark.apply_watermark(images * 2 - 1) / 2 + 0.5).clamp(0, 1), None
        if getattr(pipeline, "safety_checker", None) is None:
            return images, None
        _, unsafe = pipeline.run_safety_checker(images * 2 - 1, self.backbone.device, self.backbone.denoiser.dtype)
        black = torch.tensor(unsafe, device=images.device).view(-1, 1, 1, 1)
        return torch.where(black, torch.zeros_like(images), images), list(unsafe)
