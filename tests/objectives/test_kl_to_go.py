from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK
from dblightning.objectives.kl_to_go import kl_to_go
from dblightning.rewards.base import RewardMetric
from tests.toy import GaussianBackbone
from tests.toy_fit import data, trainer
from tests.toy_fit import module as quick
from tests.toy_optimum import module

GAINS = (0.25, -0.3, 0.2, 0.15)  # of the policy, per step


class GainBackbone(GaussianBackbone):
    """The adapter adds a learned multiple of x_t to ε, so a step's KL depends on where the steps before it led."""

    def denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Any, guidance_scale: float = 1.0, gates: Any = None
    ) -> Tensor:
        base = super().denoise(latents, timesteps, conditioning, guidance_scale)
        return base + latents * (super().denoise(latents, timesteps, conditioning, guidance_scale, gates) - base)


class Near(RewardMetric):
    """−(x − 1)², summed over dimensions."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(images, list(prompts))

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -(images - 1).square().flatten(1).sum(1)


def exact_gradient(backbone: GainBackbone, solver: Any, alpha: float, later: float = 1.0) -> Tensor:
    """dJ/dg_t of J = E[r] − α Σ_t KL_t by automatic differentiation of the moments of x_t, float64 (T,).

    Every step is linear in x_t with Gaussian noise: the mean m and variance v of x_t are followed, E[x_t²] = m² + v.

    Args:
        later: share of the gradient that goes through where x_t lies, in the KL terms; 0 is DPOK's.
    """
    gains = torch.tensor(GAINS, dtype=torch.float64, requires_grad=True)
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
    (-((m - 1) ** 2 + v) - alpha * total).backward()
    assert gains.grad is not None
    return gains.grad


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
    expected, without = (exact_gradient(run.backbone, run.solver, alpha, later) for later in (1.0, 0.0))  # type: ignore
    # four standard errors of 10,000 images, which are 0.15 to 0.2 and in proportion to α
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.8 * alpha)
    assert (expected - without).abs().max() > 2 * alpha


def test_without_it_the_gradient_is_dpoks(tmp_path: Path) -> None:
    found, run = sampled_gradient(tmp_path, 1.0, to_go=False)
    without = exact_gradient(run.backbone, run.solver, 1.0, 0.0)  # type: ignore
    assert found.tolist() == pytest.approx(without.tolist(), abs=0.8)


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
