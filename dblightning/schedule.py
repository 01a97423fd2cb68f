"""The timesteps of a run and ᾱ along them, from any diffusers scheduler's noise schedule.

The steps themselves are pure functions: :mod:`ddim` and :mod:`gaussian_step`, whose names are here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dblightning.ddim import (
    PREDICTION_TYPES,
    Prediction,
    ddim_gaussian,
    ddim_std,
    ddim_step,
    mean_sensitivity,
    predict_original,
    to_epsilon,
    to_prediction,
)
from dblightning.gaussian_step import GaussianStep, gaussian_kl, gaussian_log_prob

__all__ = [
    "PREDICTION_TYPES",
    "DDIMSchedule",
    "GaussianStep",
    "Prediction",
    "check_num_inference_steps",
    "ddim_gaussian",
    "ddim_scheduler",
    "ddim_std",
    "ddim_step",
    "gaussian_kl",
    "gaussian_log_prob",
    "mean_sensitivity",
    "predict_original",
    "to_epsilon",
    "to_prediction",
]


def check_num_inference_steps(num_inference_steps: int | None, num_train_timesteps: int) -> int:
    """The number of denoising steps, where a schedule can have it.

    Raises:
        ValueError: not a whole number from 1 to the training timesteps.
    """
    steps = num_inference_steps
    if isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= num_train_timesteps:
        return steps
    raise ValueError(
        f"num_inference_steps must be a whole number from 1 to the model's {num_train_timesteps} training "
        f"timesteps, got {num_inference_steps!r}"
    )


def ddim_scheduler(scheduler_config: Mapping[str, Any]) -> Any:
    """diffusers' DDIMScheduler with the noise schedule of any scheduler's configuration.

    It differs from ``DDIMScheduler.from_config`` where the configuration is silent: x̂₀ is not clipped, and the last
    step leads to the first training timestep's ᾱ (PNDM's default), not to 1, so that it has noise to train on.

    Raises:
        ValueError: a configuration without β's (flow matching, EDM), or with another prediction than ε, v or x₀.
    """
    from diffusers import DDIMScheduler

    config = dict(scheduler_config)
    name = config.get("_class_name", "this scheduler")
    flow = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    if flow or not any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "trained_betas")):
        raise ValueError(
            f"{name} has no noise schedule of β's (it is made for flow matching or EDM), and DDIM needs one; use a "
            "base model whose scheduler_config.json names beta_start, beta_end and beta_schedule"
        )
    if name in ("DDIMScheduler", "DDIMParallelScheduler"):  # every value is this scheduler's, also a changed default
        config.pop("_use_default_values", None)
    # what the scheduler itself did where its file said nothing, which from_config would forget
    own = {key: bool(config.get(key, False)) for key in ("clip_sample", "thresholding", "set_alpha_to_one")}
    unsaid = {key for key in config.get("_use_default_values", ()) if key in own}
    config["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in unsaid]
    scheduler = DDIMScheduler.from_config(config | own)
    if scheduler.config["prediction_type"] not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {PREDICTION_TYPES}, got {scheduler.config['prediction_type']!r} in the "
            "scheduler's configuration"
        )
    return scheduler


class DDIMSchedule:
    """The timesteps of one run and ᾱ along them, from a diffusers scheduler's configuration.

    Args:
        scheduler_config: the ``config`` of any diffusers scheduler with β's (Stable Diffusion's, say). Only the noise
            schedule, spacing and prediction type are read; see :func:`ddim_scheduler`.
        num_inference_steps: number T of denoising steps.

    Attributes:
        timesteps: int64 (T,), decreasing.
        alphas, alphas_next: ᾱ at each step's start and end, float64 (T,).

    Raises:
        ValueError: a configuration that clips or thresholds x̂₀ (the step would not be affine in the prediction), one
            without β's, ε-prediction at zero terminal SNR, or a number of steps that the schedule does not have.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], num_inference_steps: int | None) -> None:
        scheduler = ddim_scheduler(scheduler_config)
        if scheduler.config["clip_sample"] or scheduler.config["thresholding"]:
            raise ValueError(
                "the scheduler clips or thresholds its x0 prediction, so a step is not a Gaussian with an affine mean; "
                "set clip_sample and thresholding to false in scheduler_config.json"
            )
        num_train_timesteps: int = scheduler.config["num_train_timesteps"]
        num_inference_steps = check_num_inference_steps(num_inference_steps, num_train_timesteps)
        scheduler.set_timesteps(num_inference_steps)
        self.prediction_type: str = scheduler.config["prediction_type"]
        self.timesteps: Tensor = scheduler.timesteps.to(torch.int64)
        if int(self.timesteps.max()) >= num_train_timesteps:
            raise ValueError(
                f"{num_inference_steps} steps with steps_offset {scheduler.config['steps_offset']} begin at timestep "
                f"{int(self.timesteps.max())}, and the last of training is {num_train_timesteps - 1}; take fewer steps"
            )
        next_timesteps = self.timesteps - num_train_timesteps // num_inference_steps
        cumulative = scheduler.alphas_cumprod.double()
        self.alphas = cumulative[self.timesteps]
        if self.prediction_type == "epsilon" and bool((self.alphas == 0).any()):
            raise ValueError(
                "at zero terminal SNR the first step begins at pure noise (ᾱ = 0), of which an epsilon prediction says "
                "nothing; use a v- or sample-predicting model, or set rescale_betas_zero_snr to false in "
                "scheduler_config.json"
            )
        final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64)
        self.alphas_next = torch.where(next_timesteps >= 0, cumulative[next_timesteps.clamp_min(0)], final)

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, step_index: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and ᾱ' of a step (int) or of each row's step (Tensor (B,)), shaped (·, 1, 1, 1), on ``like``'s device."""
        index = torch.as_tensor(step_index).reshape(-1).cpu()
        shape = (-1, *[1] * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return (
            self.alphas[index].to(like.device, dtype, non_blocking=True).view(shape),
            self.alphas_next[index].to(like.device, dtype, non_blocking=True).view(shape),
        )

    def step(self, model_output: Tensor, latents: Tensor, step_index: int | Tensor, eta: float) -> GaussianStep:
        """The Gaussian step of ``model_output`` at ``step_index`` (one for all rows, or one per row)."""
        alpha, alpha_next = self.at(step_index, latents)
        prediction = to_prediction(model_output.to(alpha.dtype), latents, alpha, self.prediction_type)
        return ddim_gaussian(prediction, alpha, alpha_next, eta)

    def stds(self, eta: float) -> Tensor:
        """σ_t of every step, float64 (T,)."""
        return ddim_std(self.alphas, self.alphas_next, eta)
