"""Training on the flow path in a Gaussian world: the optimum of eq. (4) in closed form, and what a run records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dblightning.flow_solver import FlowSolver
from dblightning.module import RewardRLModule
from dblightning.objectives import AWM, DPOK, GRPO, NFT, FlowDPPO, GRPOGuard, RewardGradient
from tests import toy_fit
from tests.toy import FlowBackbone
from tests.toy_optimum import converged, module
from tests.toy_rewards import LinearReward


def optimal_shift(solver: FlowSolver, std: float, slope: float, alpha: float) -> float:
    """Shift of the mean x₀ at the optimum of eq. (4): slope/α Σ c_t² s_t² over the steps with noise.

    c_t is the product of the later steps' dμ/dx, from the definitions of each step and dv/dx of the exact network.
    """
    sigmas = [*solver.schedule.sigmas.tolist(), 0.0]
    total, later = 0.0, 1.0
    for step in reversed(range(len(sigmas) - 1)):
        s, n = sigmas[step], sigmas[step + 1]
        v = (1 - (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)) / s
        original, epsilon = 1 - s * v, 1 + (1 - s) * v
        if n == 0:
            noise, slope_of_step = 0.0, original
        elif solver.noise == "cps":
            noise = n * math.sin(solver.eta * math.pi / 2)
            slope_of_step = (1 - n) * original + n * math.cos(solver.eta * math.pi / 2) * epsilon
        else:
            g = solver.eta * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
            noise = g * math.sqrt(s - n)
            slope_of_step = 1 + (n - s) * (v + g**2 / (2 * s) * epsilon)
        total += later**2 * noise**2
        later *= slope_of_step
    return slope / alpha * total


@pytest.mark.parametrize(("noise", "eta"), [("flow_sde", 0.7), pytest.param("cps", 0.8, marks=pytest.mark.slow)])
def test_the_policy_gradient_reaches_the_optimum_on_the_flow_path(tmp_path: Path, noise: str, eta: float) -> None:
    settings = {"kl_weight": 1.0, "clip_range": 0.5, "advantage": "prompt", "policy_batch_size": 3 * 256, "eta": eta}
    run = module(FlowBackbone(), slope=0.5, sampling={"noise": noise}, **settings)
    solver: Any = run.solver
    assert isinstance(solver, FlowSolver)
    assert (run.trained_steps, len(solver.timesteps)) == (3, 4)  # never the step to σ = 0
    expected = optimal_shift(solver, 0.7, 0.5, 1.0)
    moved = converged(tmp_path, run, rollouts=90, average=50)
    # 5 %: the gradient's noise left after averaging 50 iterates
    assert float(moved) == pytest.approx(expected, rel=0.05)
    assert expected > 0.02


class Slope(LinearReward):
    """A reward with a gradient."""

    differentiable = True


def fitted(
    folder: Path, rollouts: int, objective: Any, ckpt_path: str | None = None, **settings: Any
) -> RewardRLModule:
    plain = {name: value for name, value in toy_fit.SETTINGS.items() if name not in ("clip_range", "policy_steps")}
    plain |= {"advantage": {"baseline": "group"}, "buffer_size": None, "eta": 0.8, "sampling": {"noise": "cps"}}
    plain |= {"optimisation": {"policy_steps": 1}, "objective": objective, **settings}
    run = RewardRLModule(FlowBackbone(2), Slope(), **plain)
    fit = toy_fit.trainer(folder, max_epochs=rollouts)
    prompts = toy_fit.data(folder, samples_per_prompt=2, rollouts_per_epoch=1)
    fit.fit(run, datamodule=prompts, ckpt_path=ckpt_path, weights_only=True)
    fit.save_checkpoint(folder / f"{rollouts}.ckpt")
    return run


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (DPOK(0.5), {}),
        (GRPO(0.5), {"window": {"size": 2, "position": "random"}}),
        (GRPOGuard(), {}),
        (FlowDPPO(), {}),
        (NFT(decay_rate=0.2), {}),
        (AWM(), {}),
        (RewardGradient(), {}),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, dict) else "",
)
def test_every_objective_trains_on_a_flow_and_resumes_bit_for_bit(
    tmp_path: Path, objective: Any, settings: dict[str, Any]
) -> None:
    whole = fitted(tmp_path, 3, objective, **settings)
    fitted(tmp_path, 2, objective, **settings)
    resumed = fitted(tmp_path, 3, objective, str(tmp_path / "2.ckpt"), **settings)
    state = whole.state_dict()
    shift = state["adapter.shift"]
    assert shift.isfinite().all() and shift.any()
    last = int(whole.solver.timesteps[-1]) - 1
    assert shift[last] == 0  # the step to σ = 0 is not trained
    for key, tensor in state.items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_a_checkpoint_says_which_noise_its_log_probs_are_of() -> None:
    from dblightning.same_run import check_same_run

    flow, other = (
        module(FlowBackbone(), sampling={"noise": noise, "eta": 0.5}).facts() for noise in ("flow_sde", "cps")
    )
    with pytest.raises(ValueError, match="noise was 'flow_sde' and is 'cps'"):
        check_same_run(flow, other)
    check_same_run(flow, other, adapter_only=True)
    before = {name: value for name, value in module().facts().items() if name != "noise"}  # of an earlier version
    check_same_run(before, module().facts())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"noise": "cps", "eta": 1.2}, "sampling.eta must be > 0 and <= 1, got 1.2"),
        ({"noise": "flow_sde", "eta": 2.5}, "sampling.eta must be > 0 and <= 2, got 2.5"),
    ],
)
def test_an_eta_that_the_noise_does_not_have_is_refused(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(FlowBackbone(), sampling=sampling)


def test_noise_of_a_flow_is_refused_on_a_diffusion_model() -> None:
    with pytest.raises(ValueError, match="noise 'cps' is of flow matching"):
        module(sampling={"noise": "cps"})
