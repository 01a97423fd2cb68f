from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK
from dblightning.objectives.kl_to_go import kl_to_go
from dblightning.solvers import make_solver
from tests.toy import SCHEDULER, GaussianBackbone
from tests.toy_fit import data, trainer
from tests.toy_fit import module as quick
from tests.toy_optimum import module
from tests.toy_rewards import AnyTensorReward

GAINS = (0.25, -0.3, 0.2, 0.15)  # of the policy, per step


class GainBackbone(GaussianBackbone):
    """The adapter adds a learned multiple of x_t to ε, so a step's KL depends on where the steps before it led."""

    def denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Any, guidance_scale: float = 1.0, gates: Any = None
    ) -> Tensor:
        base = super().denoise(latents, timesteps, conditioning, guidance_scale)
        return base + latents * (super().denoise(latents, timesteps, conditioning, guidance_scale, gates) - base)


class Near(AnyTensorReward):
    """−(x − place)², summed over dimensions."""

    def __init__(self, place: float = 1.0) -> None:
        super().__init__()
        self.place = place

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -(images - self.place).square().flatten(1).sum(1)


def exact_objective(
    gains: Tensor, backbone: GaussianBackbone, solver: Any, alpha: float, later: float = 1.0, place: float = 1.0
) -> Tensor:
    """J = E[−(x₀ − place)²] − α Σ_t KL_t of gains g_t by the moments of x_t, float64, differentiable.

    Every step is linear in x_t with Gaussian noise: the mean m and variance v of x_t are followed, E[x_t²] = m² + v.

    Args:
        later: share of the gradient that goes through where x_t lies, in the KL terms; 0 is DPOK's.
    """
    m, v, total = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), torch.zeros(())
    for g, a, b in zip(gains, solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist(), strict=True):
        variance = (1 - b) / (1 - a) * (1 - a / b)
        slope = (1 - a) ** 0.5 / (a * backbone.std**2 + 1 - a)
        c = (1 - b - variance) ** 0.5 - (b * (1 - a) / a) ** 0.5
        second = m**2 + v
        seen = later * second + (1 - later) * second.detach()
        total = total + (c * g) ** 2 * seen / (2 * variance)
        step = (b / a) ** 0.5 + c * (slope + g)
        m, v = step * m - c * slope * a**0.5 * backbone.mean, step**2 * v + variance
    return -((m - place) ** 2 + v) - alpha * total


def exact_gradient(
    gains: Tensor, backbone: GaussianBackbone, solver: Any, alpha: float, later: float = 1.0, place: float = 1.0
) -> Tensor:
    """dJ/dg_t, float64 (T,); see :func:`exact_objective`."""
    gains = gains.detach().requires_grad_()
    (found,) = torch.autograd.grad(exact_objective(gains, backbone, solver, alpha, later, place), gains)
    return found


def fixed_point(backbone: GaussianBackbone, solver: Any, alpha: float, later: float, place: float) -> Tensor:
    """Gains at which the gradient vanishes, float64 (T,), by Newton's method from none."""
    gains = torch.zeros(len(solver.timesteps), dtype=torch.float64)
    for _ in range(100):
        gradient = exact_gradient(gains, backbone, solver, alpha, later, place)
        if gradient.abs().max() < 1e-12:
            return gains
        nudges = 1e-6 * torch.eye(len(gains), dtype=torch.float64)
        columns = [
            (exact_gradient(gains + each, backbone, solver, alpha, later, place) - gradient) / 1e-6 for each in nudges
        ]
        step = torch.linalg.solve(torch.stack(columns, 1), gradient)
        gains = gains - step * min(1.0, 0.1 / float(step.abs().max()))
    raise AssertionError("no fixed point found")


def sampled_gradient(folder: Path, alpha: float, to_go: bool, images: int = 10_000) -> tuple[Tensor, RewardRLModule]:
    """−T times the gradient of the first update's loss, one number per step, (T,)."""
    backbone = GainBackbone()
    run = module(
        backbone, reward=Near(), objective=DPOK(1e3), advantage={"baseline": "group"}, learning_rate=0.0,
        kl={"form": "exact", "weight": alpha, "to_go": to_go}, optimisation={"epochs": 1},
        policy_batch_size=4 * images,
    )  # fmt: skip
    shift = backbone.shifts[run.adapter_name]
    shift.data[run.solver.timesteps] = torch.tensor(GAINS)
    found: list[Tensor] = []
    shift.register_hook(lambda gradient: found.append(gradient.clone()))
    prompts = data(folder, prompts=1, batch_size=images, samples_per_prompt=images, rollouts_per_epoch=1)
    trainer(folder, max_epochs=1).fit(run, datamodule=prompts)
    (gradient,) = found
    return -4 * gradient[run.solver.timesteps].double(), run


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_with_it_the_gradient_is_that_of_eq_4(tmp_path: Path, alpha: float) -> None:
    found, run = sampled_gradient(tmp_path, alpha, to_go=True)
    expected, without = (
        exact_gradient(torch.tensor(GAINS).double(), run.backbone, run.solver, alpha, later) for later in (1.0, 0.0)
    )  # type: ignore
    # four standard errors of 10,000 images, which are 0.15 to 0.2 and in proportion to α
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.8 * alpha)
    assert (expected - without).abs().max() > 2 * alpha


@pytest.mark.slow
def test_without_it_the_gradient_is_dpoks(tmp_path: Path) -> None:
    found, run = sampled_gradient(tmp_path, 1.0, to_go=False)
    without = exact_gradient(torch.tensor(GAINS).double(), run.backbone, run.solver, 1.0, 0.0)  # type: ignore
    assert found.tolist() == pytest.approx(without.tolist(), abs=0.8)


#: std of the data, α, and J of the reward −x² with and without the KL to go, as docs/training.md has them
CONVERGED = [
    (0.7, 1.0, -0.3874, -0.3875), (0.7, 0.3, -0.3393, -0.3403), (0.7, 0.1, -0.2792, -0.2818),
    (1.0, 1.0, -0.5239, -0.5245), (1.0, 0.3, -0.4145, -0.4179), (1.0, 0.1, -0.3064, -0.3133),
    (1.5, 1.0, -0.7994, -0.8021), (1.5, 0.3, -0.5558, -0.5654), (1.5, 0.1, -0.3588, -0.3757),
]  # fmt: skip


@pytest.mark.parametrize(("std", "alpha", "with_it", "without_it"), CONVERGED)
def test_leaving_it_out_costs_the_objective_at_convergence(
    std: float, alpha: float, with_it: float, without_it: float
) -> None:
    backbone, solver = GainBackbone(std=std), make_solver(SCHEDULER, 4, 1.0)
    ends = [fixed_point(backbone, solver, alpha, later, 0.0) for later in (1.0, 0.0)]
    found = [float(exact_objective(gains, backbone, solver, alpha, place=0.0)) for gains in ends]
    assert found[0] > found[1]
    # as printed, to four digits
    assert found == pytest.approx([with_it, without_it], abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to_go", [True, False])
def test_training_leaves_the_others_fixed_point_for_its_own(tmp_path: Path, to_go: bool) -> None:
    backbone, alpha = GainBackbone(std=1.5), 0.3
    run = module(
        backbone, reward=Near(0.0), objective=DPOK(1e3), advantage={"baseline": "group"}, learning_rate=0.005,
        kl={"form": "exact", "weight": alpha, "to_go": to_go}, policy_batch_size=4 * 1024,
    )  # fmt: skip
    other, own = (fixed_point(backbone, run.solver, alpha, later, 0.0) for later in (1.0 - to_go, float(to_go)))
    shift, seen = backbone.shifts[run.adapter_name], list[Tensor]()
    shift.data[run.solver.timesteps] = other.float()

    class Record(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(shift.detach()[run.solver.timesteps].double())

    prompts = data(tmp_path, prompts=1, batch_size=1024, samples_per_prompt=1024, rollouts_per_epoch=200)
    trainer(tmp_path, callbacks=[Record()]).fit(run, datamodule=prompts)
    gains = torch.stack(seen[-100:]).mean(0)
    values = [float(exact_objective(each, backbone, run.solver, alpha, place=0.0)) for each in (gains, own, other)]
    # a tenth of the 0.01 between them: the gradient's noise left after averaging
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert abs(values[2] - values[1]) > 5e-3


def test_the_kl_to_go_is_the_sum_of_what_follows() -> None:
    kls = torch.rand(5, 3, dtype=torch.float64)
    expected = [
        [float(sum(kls[later, image] for later in range(step + 1, 5))) for image in range(3)] for step in range(5)
    ]
    torch.testing.assert_close(kl_to_go(kls), torch.tensor(expected, dtype=torch.float64))


def fitted(folder: Path, rollouts: int, ckpt_path: str | None = None, to_go: bool = True) -> RewardRLModule:
    run = quick(kl={"form": "exact", "weight": 0.3, "to_go": to_go}, advantage="prompt")
    fit = trainer(folder, max_epochs=rollouts)
    fit.fit(run, datamodule=data(folder, rollouts_per_epoch=1), ckpt_path=ckpt_path, weights_only=True)
    fit.save_checkpoint(folder / f"{rollouts}.ckpt")
    return run


def test_a_resumed_run_has_its_kl_to_go_and_one_without_it_is_refused(tmp_path: Path) -> None:
    whole = fitted(tmp_path, 4)
    fitted(tmp_path, 2)
    resumed = fitted(tmp_path, 4, str(tmp_path / "2.ckpt"))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert whole.replay is not None
    assert resumed.replay is not None
    assert torch.equal(whole.replay.kl_to_go, resumed.replay.kl_to_go)
    assert "means" not in whole.replay.tensors
    fitted(tmp_path, 2, to_go=False)
    with pytest.raises(ValueError, match="holds no KL to go"):
        fitted(tmp_path, 4, str(tmp_path / "2.ckpt"))


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"form": "eps_mse", "to_go": True}, "set kl.form to exact"),
        ({"weight": 0.0, "to_go": True}, "needs a kl.weight > 0"),
    ],
)
def test_what_it_cannot_go_with_is_refused(kl: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(kl=kl)
