"""Flow steps against formulas written here in another form, in float64, and the paper's statements on the flow path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dblightning.flow import (
    dynamic_mu,
    dynamically_shifted,
    flow_score,
    shifted,
    velocity_prediction,
    velocity_sensitivity,
)
from dblightning.flow_solver import FlowSchedule, FlowSolver
from dblightning.gaussian_mixture import Noised, Quadratic, approximate_control, control, jensen_gap
from dblightning.gaussian_step import gaussian_kl, gaussian_log_prob
from dblightning.noise import ImageNoise
from dblightning.solvers import DDIMSolver, GaussianSolver, make_solver
from tests.test_schedule import SD15
from tests.test_theory import ALPHA, LINEAR, QUADRATIC, WEIGHTS, gaussian, mixture, points

SD3: dict[str, Any] = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
FLUX: dict[str, Any] = dict(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).config)
STEPS = 10
NOISES = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    """Latents and velocities, float64."""
    latents, velocity = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return latents, velocity


def flow_grpo(x: Tensor, v: Tensor, sigma: float, following: float, eta: float, second: float) -> tuple[Tensor, float]:
    """Mean and std of Flow-GRPO's step as its paper's appendix and code have it, collected by x and v."""
    step = following - sigma
    diffusion = math.sqrt(sigma / (1 - (second if sigma == 1 else sigma))) * eta
    mean = x * (1 + diffusion**2 / (2 * sigma) * step) + v * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * step
    return mean, diffusion * math.sqrt(-step)


def dance_grpo(x: Tensor, v: Tensor, sigma: float, following: float, eta: float) -> tuple[Tensor, float]:
    """The ODE's step plus ½ η² · score · d."""
    original = x - sigma * v
    score = -(x - (1 - sigma) * original) / sigma**2
    return x + (following - sigma) * (v - 0.5 * eta**2 * score), eta * math.sqrt(sigma - following)


def preserving(x: Tensor, v: Tensor, sigma: float, following: float, eta: float) -> tuple[Tensor, float]:
    std = following * math.sin(eta * math.pi / 2)
    original, epsilon = x - sigma * v, x + (1 - sigma) * v
    return (1 - following) * original + math.sqrt(following**2 - std**2) * epsilon, std


@pytest.mark.parametrize("noise", NOISES)
def test_each_step_has_the_mean_and_std_of_its_published_formula(noise: Any) -> None:
    solver = make_solver(SD3, STEPS, NOISES[noise], noise=noise)
    sigmas = [*solver.schedule.sigmas.tolist(), 0.0]
    x, v = batch()
    for index in range(STEPS - 1):
        sigma, following = sigmas[index], sigmas[index + 1]
        if noise == "flow_sde":
            mean, std = flow_grpo(x, v, sigma, following, 0.7, sigmas[1])
        else:
            mean, std = (dance_grpo if noise == "dance_sde" else preserving)(x, v, sigma, following, NOISES[noise])
        step = solver.gaussian(v, x, index)
        # 1e-12: float64 with a few operations on values near 1, and σ ≥ 0.009 in denominators
        torch.testing.assert_close(step.mean, mean, rtol=0, atol=1e-12)
        assert abs(float(step.std) - std) < 1e-12
        assert abs(float(solver.stds()[index]) - std) < 1e-12
    last = solver.gaussian(v, x, STEPS - 1)
    torch.testing.assert_close(last.mean, x - sigmas[-2] * v, rtol=0, atol=1e-12)  # the ODE's: x̂₀
    assert float(last.std) == 0 == float(solver.stds()[-1])
    assert solver.trainable == STEPS - 1


def test_steps_of_rows_are_those_of_each_alone() -> None:
    solver = make_solver(SD3, STEPS, 0.7, noise="flow_sde")
    x, v = batch()
    rows = torch.tensor([0, 8, 3])
    together = solver.gaussian(v, x, rows)
    for row, index in enumerate(rows.tolist()):
        alone = solver.gaussian(v[row : row + 1], x[row : row + 1], index)
        assert torch.equal(together.mean[row], alone.mean[0])
        assert torch.equal(together.std[row].flatten(), alone.std.flatten())


@pytest.mark.parametrize("noise", [None, *NOISES])
@pytest.mark.parametrize("mu", [None, 0.7])
def test_without_eta_the_steps_are_diffusers_euler(noise: Any, mu: float | None) -> None:
    config = SD3 if mu is None else FLUX
    scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in config.items() if k[0] != "_"})
    scheduler.set_timesteps(STEPS, mu=mu)
    solver = make_solver(config, STEPS, 0.0, noise=noise, mu=mu)
    assert torch.equal(solver.timesteps, scheduler.timesteps)
    latents = theirs = batch(1)[0].float()
    for index, timestep in enumerate(scheduler.timesteps):
        latents = solver.step(torch.tanh(latents), latents, index, ImageNoise([0]))
        theirs = scheduler.step(torch.tanh(theirs), timestep, theirs).prev_sample
    torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-5)  # ten steps of float32 rounding


def test_cps_at_full_noise_is_diffusers_stochastic_sampling() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    solver = make_solver(scheduler, 4)
    assert isinstance(solver, FlowSolver)
    assert (solver.eta, solver.noise) == (1.0, "cps")
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(5)
    noise = ImageNoise([5])
    latents = theirs = batch(1)[0].float()
    for index, timestep in enumerate(scheduler.timesteps):
        output = torch.tanh(latents)
        latents = solver.step(output, latents, index, noise)
        theirs = scheduler.step(torch.tanh(theirs), timestep, theirs, generator=generator).prev_sample
    torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_cps_keeps_the_marginals_std_exactly(eta: float) -> None:
    """Data at one point, a perfect network, v = x/σ: each step's outcome has the std σ' again. Flow-SDE's has more."""
    solver = make_solver(SD3, STEPS, eta, noise="cps")
    excess = make_solver(SD3, STEPS, 0.7, noise="flow_sde")
    for index in range(STEPS - 1):
        sigma, following = float(solver.schedule.sigmas[index]), float(solver.schedule.sigmas_next[index])
        x = torch.full((1, 1, 1, 1), sigma, dtype=torch.float64)  # one standard deviation
        step = solver.gaussian(x / sigma, x, index)
        assert abs(math.hypot(float(step.mean), float(step.std)) - following) < 1e-15
        more = excess.gaussian(x / sigma, x, index)
        assert math.hypot(float(more.mean), float(more.std)) > 1.01 * following


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ([1 - index / STEPS for index in range(STEPS)], [4, 6, 2, 2, 2, 2, 3, 7, 24]),
        (None, [4, 6, 3, 2, 3, 4, 7, 23, 2587]),  # SD3's own, whose last σ is 0.009
    ],
)
def test_the_noise_that_flow_sde_leaves_above_the_marginals(grid: Any, expected: list[int]) -> None:
    """In percent of σ', after steps 0 … 8 of ten at η 0.7 and shift 3: what docs/models.md says."""
    solver = make_solver(SD3, STEPS, 0.7, noise="flow_sde", sigmas=grid)
    left = []
    for index in range(STEPS - 1):
        x = solver.schedule.sigmas[index].view(1, 1, 1, 1)
        step = solver.gaussian(x / x, x, index)  # a point of data: v = x / σ
        left.append(math.hypot(float(step.mean), float(step.std)) / float(solver.schedule.sigmas_next[index]) - 1)
    # half a percent for figures that are whole numbers
    assert all(abs(100 * got - published) <= 0.51 for got, published in zip(left, expected, strict=True)), left


@pytest.mark.parametrize("noise", NOISES)
def test_the_exact_kl_is_the_closed_form_and_torchs(noise: Any) -> None:
    solver = make_solver(SD3, STEPS, NOISES[noise], noise=noise)
    x, v = batch()
    other = v + 0.1 * torch.randn_like(v)
    for index in range(STEPS - 1):
        step, reference = solver.gaussian(v, x, index), solver.gaussian(other, x, index)
        normal, base = (torch.distributions.Normal(each.mean, each.std) for each in (step, reference))
        expected = torch.distributions.kl_divergence(normal, base).flatten(1).sum(1)
        kl = gaussian_kl(step, reference)
        torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)
        sigma, following, coefficients = solver.at(index, x)
        by_velocity = velocity_sensitivity(sigma, following, coefficients).square() / 2 * (v - other).square()
        torch.testing.assert_close(by_velocity.flatten(1).sum(1), expected, rtol=1e-9, atol=0)
        log_prob = gaussian_log_prob(step, other)
        torch.testing.assert_close(log_prob, normal.log_prob(other).flatten(1).mean(1), rtol=1e-9, atol=0)
    if noise == "flow_sde":  # |d| (1 + η²/2)² (1−σ) / (2 η² σ) · ‖Δv‖², for σ < 1
        sigma, following = float(solver.schedule.sigmas[4]), float(solver.schedule.sigmas_next[4])
        factor = (sigma - following) * (1 + 0.245) ** 2 * (1 - sigma) / (2 * 0.49 * sigma)
        kl = gaussian_kl(solver.gaussian(v, x, 4), solver.gaussian(other, x, 4))
        torch.testing.assert_close(kl, factor * (v - other).square().flatten(1).sum(1), rtol=1e-9, atol=0)


def test_blending_velocities_scores_and_estimates_is_one_thing_for_weights_of_sum_one() -> None:
    x, _ = batch()
    outputs = torch.randn(3, *x.shape, dtype=torch.float64)
    sigma = torch.tensor(0.37, dtype=torch.float64)
    for weights in ([0.2, 0.5, 0.3], [-0.5, 1.5, 0.0]):  # the second is DB-KLA's λ = 1.5
        w = torch.tensor(weights, dtype=torch.float64).view(3, 1, 1, 1, 1)
        blended = (w * outputs).sum(0)
        prediction = velocity_prediction(blended, x, sigma)
        parts = [velocity_prediction(each, x, sigma) for each in outputs]
        for name in ("original", "epsilon"):
            mixed = sum(float(a) * getattr(part, name) for a, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(getattr(prediction, name), mixed, rtol=0, atol=1e-12)
        scores = (w * torch.stack([flow_score(each, x, sigma) for each in outputs])).sum(0)
        torch.testing.assert_close(flow_score(blended, x, sigma), scores, rtol=0, atol=1e-12)
    w = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64).view(3, 1, 1, 1, 1)  # sum 1.4: as the docstring says
    scores = (w * torch.stack([flow_score(each, x, sigma) for each in outputs])).sum(0)
    expected = -(1.4 * x + (1 - sigma) * (w * outputs).sum(0)) / sigma
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    assert (scores - flow_score((w * outputs).sum(0), x, sigma)).abs().max() > 0.1


# ── shifts, timesteps ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_shifts_are_diffusers() -> None:
    grid = np.linspace(1, 1 / 6, 6)
    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = dynamic_mu(1024)
    assert mu == pytest.approx(0.63, abs=1e-12)  # 0.5 + 768 · 0.65 / 3840
    flux.set_timesteps(sigmas=grid, mu=mu)
    ours = dynamically_shifted(torch.from_numpy(grid), mu)
    torch.testing.assert_close(flux.sigmas[:-1], ours.float(), rtol=1e-6, atol=0)
    assert torch.equal(FlowSchedule(FLUX, None, grid.tolist(), mu).timesteps, flux.timesteps)
    sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sd3.set_timesteps(sigmas=grid)
    torch.testing.assert_close(sd3.sigmas[:-1], shifted(torch.from_numpy(grid), 3.0).float(), rtol=1e-6, atol=0)
    sd3.set_shift(5.0)
    sd3.set_timesteps(STEPS)
    assert torch.equal(make_solver(sd3, STEPS).timesteps, sd3.timesteps)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FLUX, {}, "use_dynamic_shifting"),
        (SD3 | {"invert_sigmas": True}, {}, "inverted σ's"),
        (SD3, {"sigmas": [0.5] * STEPS}, "sigmas must fall"),
    ],
)
def test_a_schedule_that_cannot_be_had_is_refused(config: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSchedule(config, STEPS, **options)


@pytest.mark.parametrize(
    ("noise", "eta"), [("flow_sde", 2.5), ("dance_sde", -0.1), ("cps", 1.2), (None, 1.2), ("cps", math.nan)]
)
def test_an_eta_out_of_range_is_refused(noise: Any, eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta of (flow_sde|dance_sde|cps) must be >= 0 and <= [12] .* got"):
        make_solver(SD3, STEPS, eta, noise=noise)


def test_the_factory_knows_a_flow_from_a_diffusion() -> None:
    assert isinstance(make_solver(SD3, STEPS, 0.5), FlowSolver)
    assert isinstance(make_solver(SD3, STEPS, 0.5), GaussianSolver)
    assert isinstance(make_solver(FlowMatchEulerDiscreteScheduler(), STEPS), FlowSolver)
    assert isinstance(make_solver(SD15, STEPS, 0.5), DDIMSolver)
    with pytest.raises(ValueError, match="noise 'cps' is of flow matching, and .* is not"):
        make_solver(SD15, STEPS, 0.5, noise="cps")
    with pytest.raises(ValueError, match="noise of a flow must be one of flow_sde, dance_sde, cps, got 'ddim'"):
        make_solver(SD3, STEPS, 0.5, noise="ddim")  # type: ignore[call-overload]


def test_noised_latents_and_estimates_are_those_of_the_path() -> None:
    solver = make_solver(SD3, STEPS)
    original, noise = batch()
    steps = torch.tensor([9, 0, 4])
    sigma = solver.schedule.sigmas[steps].view(-1, 1, 1, 1)
    x = solver.noised(original, noise, steps)
    torch.testing.assert_close(x, (1 - sigma) * original + sigma * noise, rtol=0, atol=1e-12)
    prediction = solver.predicted(noise - original, x, steps)
    torch.testing.assert_close(prediction.original, original, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.epsilon, noise, rtol=0, atol=1e-12)


def test_the_estimate_with_a_constant_noise_has_its_derivative() -> None:
    """x̂₀ = (x − σ ε̂) / (1−σ) with ε̂ held; at σ = 1 pure noise says nothing of the image."""
    solver = make_solver(SD3, STEPS)
    latents, output = batch()
    for index in range(STEPS):
        x = latents.clone().requires_grad_()
        original = solver.original(output, x, index, detach=True)
        torch.testing.assert_close(original, solver.original(output, latents, index))
        (gradient,) = torch.autograd.grad(original.sum(), x)
        clean = 1 - float(solver.schedule.sigmas[index])
        torch.testing.assert_close(gradient, torch.full_like(x, 1 / clean if clean > 0 else 0.0))


# ── the paper's statements on the flow path ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_the_exact_velocity_gives_score_and_estimate(sigma: float) -> None:
    x, at = points(), torch.tensor(sigma, dtype=torch.float64)
    velocity = mixture().velocity(x, sigma)
    score = mixture().noised(Noised.flow(sigma)).score(x)
    torch.testing.assert_close(flow_score(velocity, x, at), score, rtol=0, atol=1e-8)
    epsilon = mixture().epsilon(x, Noised.flow(sigma))
    torch.testing.assert_close(velocity_prediction(velocity, x, at).epsilon, epsilon, rtol=0, atol=1e-8)
    # the law is that of the points (1−σ) x₀ + σ ε
    mean = (1 - sigma) * mixture().mean()
    torch.testing.assert_close(mixture().noised(Noised.flow(sigma)).mean(), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reward", [*LINEAR, *QUADRATIC])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_u_of_proposition_1_is_the_difference_of_exact_scores(reward: Quadratic, sigma: float) -> None:
    scaled, x, path = reward.scaled(1 / ALPHA), points(), Noised.flow(sigma)
    tilted = mixture().tilted(scaled)
    difference = tilted.noised(path).score(x) - mixture().noised(path).score(x)
    torch.testing.assert_close(control(mixture(), scaled, x, path), difference, rtol=0, atol=1e-8)
    # and by velocities: v_rl − v_pre = −σ/(1−σ) u
    by_velocity = tilted.velocity(x, sigma) - mixture().velocity(x, sigma)
    torch.testing.assert_close(by_velocity, -sigma / (1 - sigma) * difference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_velocity_blends_are_exact_for_linear_rewards_on_a_gaussian(sigma: float, scale: float) -> None:
    x, base = points(), gaussian()
    parts = [base.tilted(reward.scaled(1 / ALPHA)).velocity(x, sigma) for reward in LINEAR]
    mixed = sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))
    blended = (1 - scale) * base.velocity(x, sigma) + scale * mixed
    target = base.tilted(Quadratic.weighted(LINEAR, WEIGHTS).scaled(scale / ALPHA))
    torch.testing.assert_close(blended, target.velocity(x, sigma), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rewards", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_a_velocity_blend_errs_by_the_difference_of_jensen_gaps(rewards: list[Quadratic], sigma: float) -> None:
    """Lemma 1 and eq. (9): a velocity is −σ/(1−σ) times the score, up to a part in x alone."""
    x, base, path = points(), mixture(), Noised.flow(sigma)
    scaled = [reward.scaled(1 / ALPHA) for reward in rewards]
    whole = Quadratic.weighted(scaled, WEIGHTS)
    blended = sum(w * base.tilted(reward).velocity(x, sigma) for w, reward in zip(WEIGHTS, scaled, strict=True))
    error = (blended - base.tilted(whole).velocity(x, sigma)) * -(1 - sigma) / sigma
    parts = sum(w * jensen_gap(base, reward, x, path) for w, reward in zip(WEIGHTS, scaled, strict=True))
    gaps = parts - jensen_gap(base, whole, x, path)
    torch.testing.assert_close(error, gaps, rtol=0, atol=1e-8)
    linear = sum(w * approximate_control(base, r, x, path) for w, r in zip(WEIGHTS, scaled, strict=True))
    torch.testing.assert_close(approximate_control(base, whole, x, path), linear, rtol=0, atol=1e-8)
    if sigma != 0.05:  # near the data a posterior is narrow, and the gap small
        assert gaps.abs().max() > 1e-3
