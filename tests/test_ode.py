"""The deterministic steps against diffusers' DPM-Solver++ and against the exact solution of a Gaussian world."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.ddim import to_prediction
from dblightning.ode import Level, MultistepODE
from dblightning.solvers import make_solver

BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip


def output(latents: Tensor, timestep: int) -> Tensor:
    """What stands for a denoiser: smooth, and not linear."""
    return torch.tanh(latents * (1 + timestep / 500)) - 0.3 * latents.roll(1, 0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_the_steps_are_those_of_diffusers_dpm_solver(steps: int, prediction_type: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type=prediction_type,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    alphas = [*theirs.alphas_cumprod[theirs.timesteps].double().tolist(), float(theirs.alphas_cumprod[0])]
    levels = [Level(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas]
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mine = expected = start
    ode = MultistepODE()
    for index, timestep in enumerate(theirs.timesteps.tolist()):
        alpha = torch.tensor(alphas[index])
        original = to_prediction(output(mine, timestep), mine, alpha, prediction_type).original
        mine = ode.step(original, mine, levels[index], levels[index + 1], last=index + 1 == steps)
        expected = theirs.step(output(expected, timestep), timestep, expected, return_dict=False)[0]
    # 1e-5: float32, and diffusers' interpolated sigmas
    assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_step_alone_is_ddim_without_noise() -> None:
    solver = make_solver(BETAS | {"set_alpha_to_one": False}, 10, 0.0)
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    for step, (start, end) in enumerate(zip(solver.levels()[:-1].tolist(), solver.levels()[1:].tolist(), strict=True)):
        predicted = output(latents, 7)
        original = solver.original(predicted, latents, step)
        moved = MultistepODE().step(original, latents, Level(*start), Level(*end))
        torch.testing.assert_close(moved, solver.gaussian(predicted, latents, step).mean, rtol=1e-9, atol=1e-9)


def gaussian_error(steps: int, flow: bool = False) -> float:
    """Error of x₀ in the world x₀ ~ N(m, s²), whose ODE keeps (x − αm)/√(α²s² + σ²) as it is."""
    mean, std = 0.5, 0.7
    if flow:
        noise = [0.95 - 0.9 * step / steps for step in range(steps + 1)]
        levels = [Level(1 - each, each) for each in noise]
    else:
        ratios = [-1.5 + 4 * step / steps for step in range(steps + 1)]
        levels = [Level(*((1 + math.exp(sign * each)) ** -0.5 for sign in (-2, 2))) for each in ratios]
    latents = torch.tensor([1.7], dtype=torch.float64)

    def place(x: Tensor, level: Level) -> float:
        return float((x - level.signal * mean) / math.hypot(level.signal * std, level.noise))

    ode, before = MultistepODE(), place(latents, levels[0])
    for start, end in pairwise(levels):
        variance = (start.signal * std) ** 2 + start.noise**2
        original = mean + start.signal * std**2 * (latents - start.signal * mean) / variance
        latents = ode.step(original, latents, start, end, last=end is levels[-1])
    return abs(place(latents, levels[-1]) - before)


@pytest.mark.parametrize("flow", [False, True])
def test_the_order_is_two(flow: bool) -> None:
    errors = [gaussian_error(steps, flow) for steps in (40, 80, 160)]
    orders = [math.log2(one / other) for one, other in pairwise(errors)]
    # 0.25: the order is that of the limit
    assert all(abs(order - 2) < 0.25 for order in orders), orders


def test_noise_levels_at_their_ends() -> None:
    assert Level(0.0, 1.0).log_ratio == -math.inf
    assert Level(1.0, 0.0).log_ratio == math.inf
    original, latents = torch.tensor([0.3]), torch.tensor([2.0])
    ode = MultistepODE()
    moved = ode.step(original, latents, Level(0.0, 1.0), Level(0.6, 0.8))  # from pure noise, nothing divided by α
    assert moved.item() == pytest.approx(0.8 * 2 + 0.6 * 0.3)
    # the previous step's λ is −∞, so r is, and x̂₀ is not extrapolated
    assert ode.step(original, latents, Level(0.6, 0.8), Level(0.8, 0.6)).item() == pytest.approx(1.5 + 0.35 * 0.3)
    assert ode.step(original, latents, Level(0.8, 0.6), Level(1.0, 0.0)).item() == pytest.approx(0.3)
