"""The objectives on a velocity-predicting model: their optima in the Gaussian world of ``test_flow_training``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dblightning.flow_solver import FlowSolver
from dblightning.objectives import AWM, GRPO, NFT, PPO, FlowDPPO, GRPOGuard
from dblightning.objectives.forward_process import original_gain
from dblightning.objectives.stored_mean import output_gain
from tests.test_flow_training import FlowBackbone, optimal_shift
from tests.toy_optimum import converged, module

SLOPE = 0.5
NOISES = [("flow_sde", 0.7), ("cps", 0.8)]
#: noise, η and weight or α of runs of eight seconds each
FLOWS = [("flow_sde", 0.7, 1.0), ("cps", 0.8, 0.4)]


class Step(NamedTuple):
    """A step from σ to σ' of the exact model, written from the definitions of Flow-SDE and CPS."""

    sigma: float
    later: float  # dx₀/dμ, the product of the later steps' dμ/dx
    std: float  # s
    gain: float  # dμ/dv
    slope: float  # dμ/dx along the exact velocity
    kept: float  # d x̂₀/dx


def steps_of(solver: FlowSolver, std: float) -> list[Step]:
    """All steps in sampling order; x̂₀ = x − σ v and ε̂ = x + (1−σ) v."""
    sigmas, found, later = [*solver.schedule.sigmas.tolist(), 0.0], list[Step](), 1.0
    for index in reversed(range(len(sigmas) - 1)):
        s, n = sigmas[index], sigmas[index + 1]
        kept = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
        velocity = (1 - kept) / s
        if n == 0:
            noise, of_x, of_v = 0.0, 1.0, -s
        elif solver.noise == "cps":
            noise, across = n * math.sin(solver.eta * math.pi / 2), n * math.cos(solver.eta * math.pi / 2)
            of_x, of_v = 1 - n + across, across * (1 - s) - (1 - n) * s
        else:
            g = solver.eta * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
            noise = g * math.sqrt(s - n)
            of_x, of_v = 1 + (n - s) * g**2 / (2 * s), (n - s) * (1 + g**2 * (1 - s) / (2 * s))
        found.append(Step(s, later, noise, of_v, of_x + of_v * velocity, kept))
        later *= found[-1].slope
    return found[::-1]


def guards_shifts(steps: list[Step], alpha: float) -> list[float]:
    """δ_t of the velocity at GRPO-Guard's fixed point, slope c_t s_t³ / (α |g_t| g_t); see ``test_stored_mean``."""
    return [SLOPE * step.later * step.std**3 / (alpha * abs(step.gain) * step.gain) for step in steps]


def forward_shifts(steps: list[Step], weight: float, adaptive: bool = False, awm: bool = False) -> list[float]:
    """δ_t at NFT's or AWM's fixed point; see ``test_forward_process``, with u = −σ δ and k = σ.

    The exact velocity keeps the mean on the path, so without a shift e = x₀ − x̂₀ has mean 0; its mean moves with the
    shift, so with weights W the equations are iterated.
    """
    variance = 1.0
    for step in steps:
        variance = step.slope**2 * variance + step.std**2
    deltas = [0.0] * len(steps)
    for _ in range(200):
        shift = sum(step.later * step.gain * delta for step, delta in zip(steps, deltas, strict=True))
        for index, step in enumerate(steps):
            missed = 1 - (1 - step.sigma) * step.kept
            signal = variance * missed
            if adaptive:
                m = missed * shift + step.sigma * deltas[index]
                s = math.hypot(variance**0.5 * missed, step.kept * step.sigma)
                signal *= 2 * math.exp(-((m / s) ** 2) / 2) / (2 * math.pi) ** 0.5 / s
            signal /= step.sigma**2 if awm else 1
            wanted = -2 * SLOPE * signal * step.sigma * step.std**2 / (weight * step.gain**2)
            deltas[index] += 0.2 * (wanted - deltas[index])  # damped, or the iteration swings
    return deltas


def fixed_point(folder: Path, run: Any, deltas: list[float]) -> tuple[float, float]:
    """Shift of x₀ found and expected: Σ c_t g_t δ_t.

    At high σ a velocity's shift moves x₀ little and grows large, so training starts at four fifths of each.
    """
    steps = steps_of(run.solver, 0.7)
    expected = sum(step.later * step.gain * delta for step, delta in zip(steps, deltas, strict=True))
    shift = run.backbone.shifts[run.adapter_name]
    shift.data[run.solver.timesteps.long() - 1] = 0.8 * torch.tensor(deltas)
    old = f"{run.adapter_name}-old"
    if old in run.backbone.adapters.names:  # which samples the first rollout
        run.backbone.shifts[old].data.copy_(shift.data)
    return float(converged(folder, run, samples_per_prompt=64)), expected


def run_of(objective: Any, alpha: float, noise: str, eta: float, **settings: Any) -> Any:
    given: dict[str, Any] = {"kl_weight": alpha, "advantage": {"baseline": "group"}, "policy_batch_size": 3 * 256}
    return module(FlowBackbone(), SLOPE, objective=objective, eta=eta, sampling={"noise": noise}, **given | settings)


@pytest.mark.parametrize(("noise", "eta"), NOISES)
def test_the_gains_of_a_step_are_those_of_the_definitions(noise: str, eta: float) -> None:
    solver = run_of(PPO(0.5), 1.0, noise, eta).solver
    steps, at = steps_of(solver, 0.7), torch.arange(3)
    like = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    assert output_gain(solver, at, like).tolist() == pytest.approx([abs(step.gain) for step in steps[:3]], rel=1e-9)
    assert original_gain(solver, at, like).tolist() == pytest.approx([step.sigma for step in steps[:3]], rel=1e-9)
    if noise == "flow_sde":
        flow = [abs(one - other) * (1 + eta**2 / 2) for one, other in zip(*_ends(solver), strict=True)]
        assert output_gain(solver, at, like).tolist()[1:] == pytest.approx(flow[1:3], rel=1e-9)  # σ < 1


def _ends(solver: Any) -> tuple[list[float], list[float]]:
    return solver.schedule.sigmas.tolist(), solver.schedule.sigmas_next.tolist()


@pytest.mark.parametrize(
    ("objective", "noise", "eta", "alpha"),
    [
        (PPO(0.5), "flow_sde", 0.7, 1.0),
        pytest.param(PPO(0.5), "cps", 0.8, 0.4, marks=pytest.mark.slow),
        pytest.param(GRPO(0.5), "flow_sde", 0.7, 1.0, marks=pytest.mark.slow),
        pytest.param(GRPO(0.5), "cps", 0.8, 0.4, marks=pytest.mark.slow),
        pytest.param(FlowDPPO(0.05), "flow_sde", 0.7, 1.0, marks=pytest.mark.slow),
        pytest.param(FlowDPPO(0.05), "cps", 0.8, 0.4, marks=pytest.mark.slow),
    ],
)
def test_policy_gradients_find_the_optimum_of_eq_4(
    tmp_path: Path, objective: Any, noise: str, eta: float, alpha: float
) -> None:
    run = run_of(objective, alpha, noise, eta)
    found = converged(tmp_path, run, samples_per_prompt=64)
    # 5 %: the noise left after averaging, and 1/64 that a group's mean takes of each of its own rewards
    assert found.item() == pytest.approx(optimal_shift(run.solver, 0.7, SLOPE, alpha), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "eta", "alpha"), FLOWS)
def test_grpo_guard_finds_its_fixed_point(tmp_path: Path, noise: str, eta: float, alpha: float) -> None:
    run = run_of(GRPOGuard(0.5), alpha, noise, eta)
    found, expected = fixed_point(tmp_path, run, guards_shifts(steps_of(run.solver, 0.7), alpha))
    assert found == pytest.approx(expected, rel=0.05)  # as above


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(("noise", "eta", "weight"), FLOWS)
def test_nft_finds_its_fixed_point(tmp_path: Path, noise: str, eta: float, weight: float, adaptive: bool) -> None:
    objective = NFT(noise_draws=3, adaptive=adaptive, decay_rate=0.0)
    run = run_of(objective, weight, noise, eta, learning_rate=0.05)
    found, expected = fixed_point(tmp_path, run, forward_shifts(steps_of(run.solver, 0.7), weight, adaptive))
    assert expected > 0.02
    assert found == pytest.approx(expected, rel=0.05)  # as above


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "eta", "weight"), FLOWS)
def test_awm_finds_its_fixed_point(tmp_path: Path, noise: str, eta: float, weight: float) -> None:
    run = run_of(AWM(0.5, noise_draws=3), weight, noise, eta, learning_rate=0.05)
    found, expected = fixed_point(tmp_path, run, forward_shifts(steps_of(run.solver, 0.7), weight, awm=True))
    assert expected > 0.02
    assert found == pytest.approx(expected, rel=0.05)  # as above
