"""The paper's statements on Gaussian mixtures, where everything is known in closed form (float64, no network).

Where a statement concerns the code that samples, that code runs: the "adapters" of the backbone below are the exact
denoisers of tilted mixtures.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.blending import DBKLA, DBMPA, DBMPALS, Single
from dblightning.gaussian_mixture import (
    GaussianMixture,
    Quadratic,
    approximate_control,
    control,
    jensen_gap,
)
from dblightning.noise import ImageNoise
from dblightning.sampling import Run, denoise_loop
from dblightning.schedule import DDIMSchedule
from dblightning.solvers import DDIMSolver
from tests.toy import ExactBackbone

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
    "clip_sample": False,
}
ALPHA = 0.5  # the paper's α
WEIGHTS = [0.3, 0.7]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture() -> GaussianMixture:
    means = tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]])
    covariances = tensor([[[0.4, 0.1], [0.1, 0.3]], [[0.2, 0.0], [0.0, 0.6]], [[0.5, -0.2], [-0.2, 0.4]]])
    return GaussianMixture.of(tensor([0.5, 0.3, 0.2]), means, covariances)


def gaussian() -> GaussianMixture:
    return GaussianMixture.of(tensor([1.0]), tensor([[0.3, -0.2]]), tensor([[[0.4, 0.1], [0.1, 0.3]]]))


LINEAR = [Quadratic.linear(tensor([0.8, 0.2])), Quadratic.linear(tensor([-0.3, 0.9]))]
QUADRATIC = [
    Quadratic(tensor([[0.3, 0.1], [0.1, -0.4]]), tensor([0.5, 0.2])),
    Quadratic(tensor([[-0.6, 0.0], [0.0, 0.2]]), tensor([-0.3, 0.4])),
]


def points(count: int = 64) -> Tensor:
    return 1.5 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Bank:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.merged_limit = 4
        self.gated_share = 0.0


class MixtureBackbone(ExactBackbone):
    """Exact denoisers: the base's, and one per "adapter". Latents (R, d, h, w) hold h · w points of d dimensions."""

    def __init__(self, base: GaussianMixture, adapters: dict[str, GaussianMixture]) -> None:
        super().__init__(Bank(list(adapters)))
        self.models = [base, *adapters.values()]
        self.alphas = DDIMSchedule(SCHEDULER, 1000).alphas.flip(0)

    scheduler_config = SCHEDULER  # type: ignore[assignment]
    latent_shape = (2, 1, 1)  # type: ignore[assignment]

    def epsilon(self, latents: Tensor, timesteps: Tensor, gates: Tensor | None) -> Tensor:
        if gates is None:
            gates = torch.zeros(len(latents), len(self.models) - 1)
        rows = []
        for row, gate, timestep in zip(latents, gates, timesteps, strict=True):
            assert gate.sum() in (0, 1)  # a blend's rows are models
            model = self.models[int(gate.argmax()) + 1 if gate.any() else 0]
            x = row.flatten(1).T.double()
            rows.append(model.epsilon(x, float(self.alphas[timestep])).T.reshape(row.shape))
        return torch.stack(rows)


def backbone_of(base: GaussianMixture, rewards: list[Quadratic]) -> MixtureBackbone:
    """Base, and one exactly fine-tuned model per reward: p_pre · exp(r_i / α)."""
    tilted = {f"r{index}": base.tilted(reward.scaled(1 / ALPHA)) for index, reward in enumerate(rewards)}
    return MixtureBackbone(base, tilted)


def blended_epsilon(backbone: MixtureBackbone, blend: Any, x: Tensor, step: int) -> tuple[Tensor, float]:
    """What the sampling code predicts at points x (N, d), and ᾱ of the step."""
    schedule = DDIMSchedule(SCHEDULER, 10)
    plan = blend.start(backbone.adapters.names, 1, 10)
    run = Run(backbone, backbone.encode([""]), DDIMSolver(schedule, 1.0), plan, ImageNoise([0]), 1.0)
    latents = x.T.reshape(1, 2, -1, 1)
    return run.predict(latents, step).flatten(2)[0].T, float(schedule.alphas[step])


# ── the closed forms themselves ──────────────────────────────────────────────────────────────────────────────────────


def test_the_tilted_density_is_the_base_times_the_exponential() -> None:
    """p · exp(r) integrated on a grid: another way to Z, mean and density."""
    base, reward = mixture(), QUADRATIC[0]
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    cell = (axis[1] - axis[0]) ** 2
    weight = (base.log_prob(grid) + reward(grid)).exp() * cell
    # 1e-8: a smooth integrand on a fine grid converges beyond all powers; tails beyond 9 are below 1e-20
    assert abs(weight.sum().log() - base.log_expected_exp(reward)) < 1e-8
    tilted = base.tilted(reward)
    torch.testing.assert_close((weight[:, None] * grid).sum(0) / weight.sum(), tilted.mean(), rtol=0, atol=1e-8)
    torch.testing.assert_close(weight / weight.sum() / cell, tilted.log_prob(grid).exp(), rtol=0, atol=1e-8)
    density = base.log_prob(grid).exp() * cell
    assert abs((density * reward(grid)).sum() - base.expected(reward)) < 1e-8


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    x = points().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture().log_prob(x).sum(), x)
    torch.testing.assert_close(mixture().score(x.detach()), gradient, rtol=0, atol=1e-12)


def test_the_posterior_is_bayes_rule() -> None:
    base, x0, xt, alpha = mixture(), points(), points(64).flip(0), 0.37
    likelihood = GaussianMixture.of(
        tensor([1.0]), (math.sqrt(alpha) * x0)[:, None], (1 - alpha) * torch.eye(2).double()
    )
    expected = base.log_prob(x0) + likelihood.log_prob(xt) - base.noised(alpha).log_prob(xt)
    torch.testing.assert_close(base.posterior(xt, alpha).log_prob(x0), expected, rtol=0, atol=1e-10)


def test_a_reward_without_a_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="grows faster than the density falls"):
        mixture().tilted(Quadratic(10 * torch.eye(2).double(), tensor([0.0, 0.0])))


# ── Proposition 1, Lemma 1 ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reward", [*LINEAR, *QUADRATIC])
@pytest.mark.parametrize("alpha", [0.99, 0.5, 0.05])
def test_u_of_proposition_1_is_the_difference_of_exact_scores(reward: Quadratic, alpha: float) -> None:
    scaled, x = reward.scaled(1 / ALPHA), points()
    difference = mixture().tilted(scaled).noised(alpha).score(x) - mixture().noised(alpha).score(x)
    torch.testing.assert_close(control(mixture(), scaled, x, alpha), difference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_blends_are_exact_for_linear_rewards_on_a_gaussian(step: int, scale: float) -> None:
    backbone = backbone_of(gaussian(), LINEAR)
    blend = DBMPA({"r0": WEIGHTS[0], "r1": WEIGHTS[1]}, kl_scale=scale)
    got, alpha = blended_epsilon(backbone, blend, points(), step)
    target = gaussian().tilted(Quadratic.weighted(LINEAR, WEIGHTS).scaled(scale / ALPHA))  # α(λ) = α / λ
    torch.testing.assert_close(got, target.epsilon(points(), alpha), rtol=0, atol=1e-8)
    alone, _ = blended_epsilon(backbone, DBKLA("r1", scale), points(), step)
    target = gaussian().tilted(LINEAR[1].scaled(scale / ALPHA))
    torch.testing.assert_close(alone, target.epsilon(points(), alpha), rtol=0, atol=1e-8)


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("alphas", [(0.2, 0.8), (0.4, 0.1)])
def test_adapters_of_different_alphas_blend_exactly_by_their_strengths(step: int, alphas: tuple[float, float]) -> None:
    """With sᵢ = αᵢ/α: exact for linear rewards on a Gaussian, where plain weights miss the target."""
    tilted = {f"r{i}": gaussian().tilted(LINEAR[i].scaled(1 / alphas[i])) for i in range(2)}
    backbone, weights = MixtureBackbone(gaussian(), tilted), {"r0": WEIGHTS[0], "r1": WEIGHTS[1]}
    strengths = {f"r{i}": alphas[i] / ALPHA for i in range(2)}
    got, alpha = blended_epsilon(backbone, DBMPA(weights, strengths=strengths), points(), step)
    target = gaussian().tilted(Quadratic.weighted(LINEAR, WEIGHTS).scaled(1 / ALPHA)).epsilon(points(), alpha)
    torch.testing.assert_close(got, target, rtol=0, atol=1e-8)
    plain, _ = blended_epsilon(backbone, DBMPA(weights), points(), step)
    assert (plain - target).abs().max() > 1e-2


@pytest.mark.parametrize("rewards", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
@pytest.mark.parametrize("step", [0, 5, 8])
def test_db_mpa_errs_by_the_difference_of_jensen_gaps(rewards: list[Quadratic], step: int) -> None:
    """Eq. (9): ε is −√(1−ᾱ) times the score, so drifts' errors and scores' differ by that factor and β alone."""
    base, x = mixture(), points()
    blend = DBMPA({"r0": WEIGHTS[0], "r1": WEIGHTS[1]})
    got, alpha = blended_epsilon(backbone_of(base, rewards), blend, x, step)
    scaled = [reward.scaled(1 / ALPHA) for reward in rewards]
    whole = Quadratic.weighted(scaled, WEIGHTS)
    error = (got - base.tilted(whole).epsilon(x, alpha)) / -math.sqrt(1 - alpha)
    parts = sum(w * jensen_gap(base, reward, x, alpha) for w, reward in zip(WEIGHTS, scaled, strict=True))
    gaps = parts - jensen_gap(base, whole, x, alpha)
    torch.testing.assert_close(error, gaps, rtol=0, atol=1e-6)
    assert gaps.abs().max() > 1e-3  # or nothing was tested


@pytest.mark.parametrize("scale", [0.5, 1.7])
@pytest.mark.parametrize("step", [0, 5, 8])
def test_db_kla_errs_by_the_difference_of_jensen_gaps(scale: float, step: int) -> None:
    """Eq. (10)."""
    base, x, reward = mixture(), points(), QUADRATIC[1].scaled(1 / ALPHA)
    got, alpha = blended_epsilon(backbone_of(base, QUADRATIC), DBKLA("r1", scale), x, step)
    error = (got - base.tilted(reward.scaled(scale)).epsilon(x, alpha)) / -math.sqrt(1 - alpha)
    gaps = scale * jensen_gap(base, reward, x, alpha) - jensen_gap(base, reward.scaled(scale), x, alpha)
    torch.testing.assert_close(error, gaps, rtol=0, atol=1e-6)
    assert gaps.abs().max() > 1e-3


def test_the_approximate_control_is_linear_in_the_reward() -> None:
    x = points()
    parts = sum(w * approximate_control(mixture(), r, x, 0.5) for w, r in zip(WEIGHTS, QUADRATIC, strict=True))
    whole = approximate_control(mixture(), Quadratic.weighted(QUADRATIC, WEIGHTS), x, 0.5)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SIDE, STEPS = 160, 200


def sampled(backbone: MixtureBackbone, blend: Any, start: GaussianMixture) -> tuple[Tensor, float]:
    """Points (N, 2) of the denoising loop from the exact law at the first step, and the last ᾱ."""
    schedule = DDIMSchedule(SCHEDULER, STEPS)
    first = start.noised(float(schedule.alphas[0])).sample(SIDE**2, torch.Generator().manual_seed(1))
    latents = first.T.reshape(1, 2, SIDE, SIDE)
    with torch.no_grad():
        final = denoise_loop(
            backbone,
            backbone.encode([""]),
            DDIMSolver(schedule, 1.0),
            blend,
            ImageNoise([2]),
            guidance_scale=1.0,
            latents=latents,
        )
    return final.flatten(2)[0].T, float(schedule.alphas_next[-1])


@pytest.mark.parametrize("case", ["mixture, its exact tilted model", "gaussian, DB-MPA of two linear rewards"])
def test_sampling_reproduces_the_tilted_mean_and_covariance(case: str) -> None:
    if case.startswith("mixture"):
        base, rewards, blend = mixture(), [QUADRATIC[0]], Single("r0")
        target = base.tilted(QUADRATIC[0].scaled(1 / ALPHA))
    else:
        base, rewards, blend = gaussian(), LINEAR, DBMPA({"r0": WEIGHTS[0], "r1": WEIGHTS[1]})
        target = base.tilted(Quadratic.weighted(LINEAR, WEIGHTS).scaled(1 / ALPHA))
    x, alpha = sampled(backbone_of(base, rewards), blend, target)
    law = target.noised(alpha)  # the trajectory ends at ᾱ just below 1
    mean, covariance = x.mean(0), x.T.cov()
    variances = law.covariance().diagonal()
    count = len(x)
    # 4.5 standard errors, plus 1 % of the spread for 200 steps instead of infinitely many
    assert ((mean - law.mean()).abs() < 4.5 * (variances / count).sqrt() + 0.01 * variances.sqrt()).all()
    outer = ((x - mean)[:, :, None] * (x - mean)[:, None, :]).std(0)
    sizes = (variances[:, None] * variances[None, :]).sqrt()
    assert ((covariance - law.covariance()).abs() < 4.5 * outer / math.sqrt(count) + 0.02 * sizes).all()
    # and the test can tell: the base model's mean is far outside
    assert ((base.mean() - law.mean()).abs() > 10 * (variances / count).sqrt()).any()


# ── Proposition 2 ────────────────────────────────────────────────────────────────────────────────────────────────────

DRAWS = 3000


def affine_chain(num_steps: int, models: list[GaussianMixture]) -> tuple[Tensor, Tensor, Tensor]:
    """x' = a x + b + s z of each step and model (one dimension): a, b (T, m) and s (T,)."""
    schedule = DDIMSchedule(SCHEDULER, num_steps)
    probes = tensor([[0.0], [1.0]])
    slopes, offsets, stds = [], [], []
    for step in range(num_steps):
        alpha = float(schedule.alphas[step])
        ends = torch.stack([model.epsilon(probes, alpha) for model in models])  # (m, 2, 1)
        for_zero, for_one = (
            schedule.step(ends[:, i, :, None, None], probes[i].expand(len(models), 1, 1, 1), step, 1.0) for i in (0, 1)
        )
        slopes.append((for_one.mean - for_zero.mean).flatten())
        offsets.append(for_zero.mean.flatten())
        stds.append(for_zero.std.flatten()[0])
    return torch.stack(slopes), torch.stack(offsets), torch.stack(stds)


def final_law(slopes: Tensor, offsets: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the last x from x_T ~ N(0, 1), for coefficients (T, …)."""
    mean, variance = torch.zeros_like(slopes[0]), torch.ones_like(slopes[0])
    for slope, offset, std in zip(slopes, offsets, stds, strict=True):
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, variance


def ls_distance(schedule: str, num_steps: int) -> float:
    """Total variation between the marginals of DB-MPA and DB-MPA-LS for two Gaussian models.

    Given its draws, a trajectory of LS is Gaussian with a law known exactly; the draws are the sampling code's own.
    """
    one = tensor([1.0])
    models = [
        GaussianMixture.of(one, tensor([[1.5]]), tensor([[[0.16]]])),
        GaussianMixture.of(one, tensor([[-1.0]]), tensor([[[0.49]]])),
    ]
    slopes, offsets, stds = affine_chain(num_steps, models)
    weights = tensor([0.4, 0.6])
    mean, variance = final_law(slopes @ weights, offsets @ weights, stds)
    generators = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
    plan = DBMPALS({"r0": 0.4, "r1": 0.6}, schedule).start(["r0", "r1"], DRAWS, num_steps, generators)
    gates = torch.stack([plan(step).gates[0] for step in range(num_steps)]).double()  # (T, draws, 2)
    means, variances = final_law((gates * slopes[:, None]).sum(-1), (gates * offsets[:, None]).sum(-1), stds)
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64)

    def density(mu: Tensor, var: Tensor) -> Tensor:
        return (-0.5 * (grid - mu[..., None]) ** 2 / var[..., None]).exp() / (2 * math.pi * var[..., None]).sqrt()

    return float((density(means, variances).mean(0) - density(mean, variance)).abs().sum() / 2 * (grid[1] - grid[0]))


def test_ls_approaches_db_mpa_as_steps_double_and_systematic_draws_are_no_worse() -> None:
    steps = [20, 40, 80, 160]
    iid = [ls_distance("iid", each) for each in steps]
    systematic = [ls_distance("systematic", each) for each in steps]
    # halving is the theory (weak order one); 0.75 leaves room for 3000 draws and for the coarsest step
    for distances in (iid, systematic):
        assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(distances)), distances
    assert all(ours <= paper for ours, paper in zip(systematic, iid, strict=True)), (systematic, iid)


@pytest.mark.parametrize("schedule", ["rotation", "golden"])
def test_ordered_draws_stray_a_quarter_as_far_from_db_mpa_as_the_papers(schedule: str) -> None:
    """At most .045, .02, .01 of total variation at 20, 40, 80 steps, where independent draws have .15, .08, .04."""
    distances = [ls_distance(schedule, each) for each in (20, 40, 80)]
    assert all(found <= most for found, most in zip(distances, (0.045, 0.02, 0.01), strict=True)), distances
