from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK, FlowDPPO, GRPOGuard
from dblightning.objectives.stored_mean import divergence_mask, guarded_ratio, output_gain, step_divergence
from dblightning.schedule import GaussianStep, gaussian_log_prob
from tests.toy import GaussianBackbone
from tests.toy_fit import SETTINGS, data, trainer
from tests.toy_optimum import converged, gains, module, optimal_shift
from tests.toy_rewards import LinearReward

GROUP = {"baseline": "group"}


def quick(**settings: Any) -> RewardRLModule:
    """A small run; each objective has its own clip."""
    plain = {name: value for name, value in SETTINGS.items() if name != "clip_range"}
    return RewardRLModule(GaussianBackbone(2), LinearReward(), **(plain | settings))


def drawn(seed: int = 0) -> tuple[GaussianStep, Tensor, Tensor, Tensor]:
    """Current step, old mean, z and what was sampled, float64."""
    generator = torch.Generator().manual_seed(seed)
    mean, old, z = torch.randn(3, 5, 4, 2, 2, generator=generator, dtype=torch.float64).unbind()
    std = torch.rand(5, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.1
    return GaussianStep(mean, std), old, z, old + std * z


def test_the_guarded_ratio_is_the_sources_formula() -> None:
    """exp((log p_θ − log p_old + b) σ) with torch's own Gaussian densities."""
    step, old, _, after = drawn()
    normal = torch.distributions.Normal
    log_ratio = normal(step.mean, step.std).log_prob(after) - normal(old, step.std).log_prob(after)
    bias = (step.mean - old).square().mean((1, 2, 3)) / (2 * step.std.flatten().square())
    expected = ((log_ratio.mean((1, 2, 3)) + bias) * step.std.flatten()).exp()
    torch.testing.assert_close(guarded_ratio(step, old, after), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(guarded_ratio(step, old, old - (after - old)), expected)


def test_the_divergence_is_torchs_kl_per_dimension() -> None:
    step, old, _, _ = drawn(1)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(step.mean, step.std), normal(old, step.std))
    torch.testing.assert_close(step_divergence(step, old), kl.mean((1, 2, 3)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "divergence", "kept"),
    [
        (1, 1.2, 2, 0),
        (1, 0.8, 2, 1),
        (-1, 0.8, 2, 0),
        (-1, 1.2, 2, 1),
        (1, 1.2, 0.9, 1),
        (-1, 0.8, 0.9, 1),
        (1, 1.2, 1, 0),
    ],
)
def test_a_step_is_masked_where_it_is_far_and_goes_further(
    advantage: float, ratio: float, divergence: float, kept: float
) -> None:
    given = [torch.tensor([float(value)]) for value in (advantage, ratio, divergence)]
    assert divergence_mask(*given, 1.0).item() == kept


def test_the_output_gain_is_the_derivative_of_the_steps_mean() -> None:
    run = quick()
    steps = torch.arange(4)
    a, b = run.solver.schedule.alphas, run.solver.schedule.alphas_next
    variance = (1 - b) / (1 - a) * (1 - a / b)
    expected = ((1 - b - variance).sqrt() - (b * (1 - a) / a).sqrt()).abs()
    found = output_gain(run.solver, steps, torch.zeros(4, 2, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_flow_dppo_finds_the_optimum_of_eq_4(tmp_path: Path, alpha: float) -> None:
    backbone = GaussianBackbone()
    run = module(backbone, objective=FlowDPPO(0.05), kl_weight=alpha, advantage=GROUP, policy_steps=1)
    found = converged(tmp_path, run, samples_per_prompt=64)
    # 5 %: the noise left after averaging, and 1/64 that a group's mean takes of each of its own rewards
    assert found.item() == pytest.approx(optimal_shift(backbone, run.solver, 0.5, alpha), rel=0.05)


def guards_shift(backbone: GaussianBackbone, solver: Any, slope: float, alpha: float) -> float:
    """Shift of x₀ where GRPO-Guard's gradient and the KL's cancel.

    A shift d_t of step t's mean has the loss gradient −E[A z] / g_t + α d_t / σ_t², g_t the step's gain of an output,
    and E[A z] = slope · c_t σ_t. So d_t = slope c_t σ_t³ / (α g_t): eq. (4)'s with the weight σ_t / g_t.
    """
    total = 0.0
    alphas, after = solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist()
    for c, v, a, b in zip(*gains(backbone, solver), alphas, after, strict=True):
        total += c**2 * v**1.5 / abs((1 - b - v) ** 0.5 - (b * (1 - a) / a) ** 0.5)
    return slope / alpha * total


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_grpo_guard_finds_its_fixed_point(tmp_path: Path, alpha: float) -> None:
    backbone = GaussianBackbone()
    run = module(backbone, objective=GRPOGuard(0.5), kl_weight=alpha, advantage=GROUP)
    expected = guards_shift(backbone, run.solver, 0.5, alpha)
    assert abs(expected / optimal_shift(backbone, run.solver, 0.5, alpha) - 1) > 0.1  # not eq. (4)'s
    found = converged(tmp_path, run, samples_per_prompt=64)
    assert found.item() == pytest.approx(expected, rel=0.05)  # as above


def rolled_out(folder: Path, objective: Any) -> tuple[Any, Any]:
    """A run, and its first rollout's transitions before any update."""
    run = quick(objective=objective, advantage=GROUP, buffer_size=None, clip_grad_norm=1e6)
    kept: list[Any] = []
    losses = run._losses
    run._losses = lambda parts, *rest: (kept.append(parts[0][1]), losses(parts, *rest))[1]  # type: ignore
    trainer(folder, max_epochs=1).fit(run, datamodule=data(folder, samples_per_prompt=2, rollouts_per_epoch=1))
    run.backbone.shifts[run.adapter_name].data.zero_()  # as it sampled
    return run, kept[0]


@pytest.mark.parametrize("objective", [GRPOGuard(0.5), FlowDPPO(0.5)])
def test_on_policy_the_ratio_is_one_and_the_gradient_minus_advantage_times_score(
    tmp_path: Path, objective: Any
) -> None:
    run, transitions = rolled_out(tmp_path, objective)
    transitions = transitions._replace(advantage=torch.tensor([1.5, -2.0, 0.5, 3.0]))
    (shift,) = run.backbone.adapters.parameters(run.adapter_name)
    loss, metrics = objective.loss(run.policy, transitions)
    assert metrics["train/ratio"].item() == pytest.approx(1, abs=1e-6)
    (found,) = torch.autograd.grad(loss, shift)
    run.policy.forget()
    step = run.policy.step(transitions)
    log_prob = gaussian_log_prob(step, transitions.next_latents)
    weight = torch.ones(4)
    if isinstance(objective, GRPOGuard):
        weight = step.std.flatten() / output_gain(run.solver, transitions.step_index, transitions.latents)
    (expected,) = torch.autograd.grad(-(weight * transitions.advantage * log_prob).mean(), shift)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # float32


def test_means_are_stored_where_the_objective_asks_alone(tmp_path: Path) -> None:
    _, transitions = rolled_out(tmp_path, GRPOGuard(0.5))
    assert transitions.mean.shape == transitions.latents.shape
    run, transitions = rolled_out(tmp_path, DPOK(0.5))
    assert transitions.mean.numel() == 0
    assert not hasattr(run.replay, "means")
    assert "means" not in run.replay.state_dict()


def saved(folder: Path, objective: Any, rollouts: int, ckpt_path: str | None = None) -> Any:
    run = quick(objective=objective, advantage=GROUP)
    fit = trainer(folder, max_epochs=rollouts)
    prompts = data(folder, samples_per_prompt=2, rollouts_per_epoch=1)
    fit.fit(run, datamodule=prompts, ckpt_path=ckpt_path, weights_only=True)
    fit.save_checkpoint(folder / f"{rollouts}.ckpt")
    return run


def test_a_resumed_run_has_its_stored_means_and_one_without_them_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, FlowDPPO(0.05), 4)
    saved(tmp_path, FlowDPPO(0.05), 2)
    resumed = saved(tmp_path, FlowDPPO(0.05), 4, str(tmp_path / "2.ckpt"))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert torch.equal(whole.replay.means, resumed.replay.means)
    saved(tmp_path, DPOK(0.5), 2)
    with pytest.raises(ValueError, match="holds no means of its steps"):
        saved(tmp_path, FlowDPPO(0.05), 4, str(tmp_path / "2.ckpt"))
