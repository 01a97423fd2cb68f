from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from torch import Tensor

from dblightning import DiffusionBlendPipeline
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Base
from dblightning.evaluation.sampler import BlendSampler
from dblightning.noise import ImageNoise
from dblightning.sampling import denoise_loop
from dblightning.solvers import DDIMSolver, DiffusersSolver, GaussianSolver, make_solver
from tests.test_schedule import SD15, ZERO_SNR

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 6


def predict(latents: Tensor, timestep: Tensor) -> Tensor:
    """A denoiser."""
    return torch.tanh(latents) + timestep / 1000


def ours(scheduler: Any, eta: float | None, steps: int = STEPS) -> Tensor:
    solver = make_solver(scheduler, steps, eta)
    noise = ImageNoise([3])
    latents = solver.initial(noise((4, 8, 8)))
    for step_index, timestep in enumerate(solver.timesteps):
        output = predict(solver.scale(latents, step_index), timestep)
        latents = solver.step(output, latents, step_index, noise)
    return latents


def diffusers_pipeline(scheduler: Any, **extra: Any) -> Tensor:
    """The denoising loop of diffusers' pipelines."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, generator=generator, **extra).prev_sample
    return latents


@pytest.mark.parametrize("kind", [DDIMScheduler, DDIMParallelScheduler, TCDScheduler])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_scheduler_that_takes_eta_gets_it(kind: Any, eta: float) -> None:
    options = BETAS | ({"clip_sample": False} if kind is not TCDScheduler else {})
    expected = diffusers_pipeline(kind(**options), eta=eta)
    # 1e-5: six steps of float32 rounding; DDIM's is our own step
    torch.testing.assert_close(ours(kind(**options), eta), expected, rtol=1e-5, atol=1e-5)
    if eta == 0:
        torch.testing.assert_close(ours(kind(**options), None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler, LCMScheduler]
)
def test_eta_is_refused_by_a_scheduler_that_has_none(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__} has no eta, got 0.7"):
        make_solver(kind(**BETAS), STEPS, 0.7)
    for eta in (None, 0.0):  # 0 is what diffusers' pipelines pass by default
        assert isinstance(make_solver(kind(**BETAS), STEPS, eta), DiffusersSolver)


def test_a_subclass_with_a_step_of_its_own_keeps_it() -> None:
    class Doubled(DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            (latents,) = super().step(*args, **kwargs | {"return_dict": False})[:1]
            return (2 * latents,)

    plain = ours(DDIMScheduler(**SD15), 0.0, steps=1)
    torch.testing.assert_close(ours(Doubled(**SD15), 0.0, steps=1), 2 * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, PNDMScheduler, DDIMScheduler])
def test_a_configuration_and_the_pipelines_scheduler_give_the_same_steps(kind: Any) -> None:
    """What training and evaluation read, and the scheduler that ``from_pretrained`` makes of it."""
    from dblightning.schedule import ddim_scheduler

    config = kind(**BETAS | ({"clip_sample": False} if kind is DDIMScheduler else {})).config
    assert torch.equal(ours(config, 1.0), ours(ddim_scheduler(config), 1.0))


def test_evaluation_and_pipeline_make_one_image_of_an_euler_base(sd15_folder: Path, tmp_path: Path) -> None:
    """Whose configuration does not say where the last step leads; plain diffusers stepped by hand is the reference."""
    folder = shutil.copytree(sd15_folder, tmp_path / "euler")
    EulerDiscreteScheduler(**BETAS).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    pipe = DiffusionBlendPipeline.from_pretrained(folder, {})
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 3, "eta": 0.0, "guidance_scale": 2.0}
    drawn = pipe("a red circle", method="base", latents=noise, output_type="latent", **options).images
    backbone = DiffusersBackbone(str(folder))
    sampler = BlendSampler(backbone, {}, negative_prompt=None, seed=0, **options)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="linspace")
    scheduler.set_timesteps(3)
    with torch.no_grad():
        conditioning = backbone.encode(["a red circle"])
        evaluated = denoise_loop(
            backbone, conditioning, sampler.solver, Base(), ImageNoise([0]), guidance_scale=2.0, latents=noise
        )
        latents = noise
        for timestep in scheduler.timesteps:
            output = backbone.denoise(latents, timestep.expand(1), conditioning, 2.0)
            latents = scheduler.step(output, timestep, latents).prev_sample
    assert torch.equal(evaluated, drawn)
    torch.testing.assert_close(evaluated, latents, rtol=0, atol=1e-5)


def test_a_setting_changed_on_the_scheduler_is_sampled_with() -> None:
    scheduler = DDIMScheduler(**SD15)
    scheduler.register_to_config(timestep_spacing="trailing")
    assert make_solver(scheduler, 4).timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan, math.inf, "1"])
def test_an_eta_out_of_range_is_refused(eta: Any) -> None:
    for scheduler in (SD15, DDIMScheduler(**SD15), TCDScheduler(**BETAS)):
        with pytest.raises(ValueError, match=rf"eta must lie between 0 .* got {eta!r}"):
            make_solver(scheduler, STEPS, eta)


@pytest.mark.parametrize("scheduler", [SD15, DDIMScheduler(**SD15), EulerDiscreteScheduler(**BETAS)])
@pytest.mark.parametrize("steps", [0, -3, 2.0, 1001])
def test_a_number_of_steps_out_of_range_is_refused_by_every_solver(scheduler: Any, steps: Any) -> None:
    with pytest.raises(ValueError, match=rf"from 1 to the model's 1000 training timesteps, got {steps!r}"):
        make_solver(scheduler, steps)


# ── a step as a Gaussian ─────────────────────────────────────────────────────────────────────────────────────────────


def test_ddim_is_a_gaussian_solver_and_others_are_not() -> None:
    assert isinstance(make_solver(SD15, STEPS, 1.0), GaussianSolver)
    assert not isinstance(make_solver(EulerDiscreteScheduler(**BETAS), STEPS), GaussianSolver)


def test_noised_latents_are_those_of_diffusers_add_noise() -> None:
    solver = make_solver(SD15, STEPS)
    original, noise = torch.randn(2, 3, 4, 8, 8)
    steps = torch.tensor([5, 0, 2])
    expected = DDIMScheduler(**SD15).add_noise(original, noise, solver.timesteps[steps])
    torch.testing.assert_close(solver.noised(original, noise, steps), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_with_a_constant_noise_has_the_derivative_of_eq_12(prediction_type: str) -> None:
    """x̂₀ = (x − √(1−ᾱ) ε) / √ᾱ with ε held: ∂x̂₀/∂x = 1/√ᾱ, whatever the model predicts."""
    solver = make_solver(SD15 | {"prediction_type": prediction_type}, STEPS)
    latents, output = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    for step_index in (0, STEPS - 1):
        x = latents.clone().requires_grad_()
        original = solver.original(output, x, step_index, detach=True)
        torch.testing.assert_close(original, solver.original(output, latents, step_index))
        (gradient,) = torch.autograd.grad(original.sum(), x)
        torch.testing.assert_close(gradient, torch.full_like(x, float(solver.schedule.alphas[step_index]) ** -0.5))


@pytest.mark.parametrize("detach", [False, True])
def test_the_estimate_at_zero_terminal_snr_is_minus_v_and_its_gradient_is_finite(detach: bool) -> None:
    solver = make_solver(ZERO_SNR | {"prediction_type": "v_prediction"}, STEPS)
    latents, output = torch.randn(2, 2, 4, 8, 8)
    x = latents.clone().requires_grad_()
    original = solver.original(output, x, 0, detach)
    assert torch.equal(original, -output)
    (gradient,) = torch.autograd.grad(original.sum(), x)
    assert not gradient.any()  # pure noise says nothing of the image


def test_training_can_take_the_steps_of_a_zero_terminal_snr_model() -> None:
    """Every step has noise, so a density, and its log-probability is finite."""
    from dblightning.schedule import gaussian_log_prob

    solver = make_solver(ZERO_SNR | {"prediction_type": "v_prediction"}, STEPS, 1.0)
    assert isinstance(solver, DDIMSolver)
    assert (solver.stds() > 0).all()
    latents, output, noise = torch.randn(3, 2, 4, 8, 8)
    for step_index in range(STEPS):
        step = solver.gaussian(output, latents, step_index)
        assert gaussian_log_prob(step, step.sample(noise)).isfinite().all()
