"""The pathwise gradient of eq. (4) against autograd of chains written here, in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dblightning.checkpointing import Preempted
from dblightning.data import PromptFileDataModule
from dblightning.module import RewardRLModule
from dblightning.noise import ImageNoise
from dblightning.objectives import RewardGradient
from dblightning.objectives.pathwise import Ends, Paths, clipped
from dblightning.objectives.policy import AdapterPolicy
from dblightning.preflight import Refused, check_command
from dblightning.rewards import JPEGCompressibility, RewardMetric, WeightedReward
from dblightning.solvers import DDIMSolver, make_solver
from dblightning.training_settings import SamplingSettings
from tests import distributed_fit, launching, test_flow_training, toy_fit, toy_optimum
from tests.toy import SCHEDULER, GaussianBackbone
from tests.toy_rewards import LinearReward

STEPS, DIMS, COUNT = 5, 3, 4
ALPHA, WEIGHT = 0.3, 2.0


class Bent(GaussianBackbone):
    """An adapter whose effect depends on x_t, so that the KL has a gradient by way of the states too."""

    def epsilon(self, latents: Tensor, timesteps: Tensor, gates: Tensor | None) -> Tensor:
        shifted, base = super().epsilon(latents, timesteps, gates), super().epsilon(latents, timesteps, None)
        return base.tanh() + (shifted - base) * latents.sin()


def reward(latents: Tensor) -> Tensor:
    """Neither linear nor quadratic."""
    return (latents.flatten(1) * torch.arange(1.0, DIMS + 1).to(latents)).tanh().sum(1)


def toy(prediction: str = "epsilon") -> tuple[Bent, DDIMSolver, AdapterPolicy]:
    backbone = Bent(DIMS).double()
    backbone.adapters.add("a", 1, None, None, None)
    generator = torch.Generator().manual_seed(3)
    backbone.shifts["a"].data = 0.5 * torch.randn(100, generator=generator, dtype=torch.float64)
    solver = make_solver({**SCHEDULER, "prediction_type": prediction}, STEPS, 1.0)
    sampling = SamplingSettings(num_inference_steps=STEPS, guidance_scale=1.0)
    return backbone, solver, AdapterPolicy(backbone, solver, "a", sampling, lambda ids: ["x"] * len(ids))


def mean_of(solver: DDIMSolver, output: Tensor, latents: Tensor, step: int, prediction: str) -> tuple[Tensor, float]:
    """DDIM eq. (12) and (16) at η = 1, written from the definitions."""
    a, b = float(solver.schedule.alphas[step]), float(solver.schedule.alphas_next[step])
    std = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    if prediction == "epsilon":
        noise, original = output, (latents - (1 - a) ** 0.5 * output) / a**0.5
    else:
        original = a**0.5 * latents - (1 - a) ** 0.5 * output
        noise = a**0.5 * output + (1 - a) ** 0.5 * latents
    return b**0.5 * original + (1 - b - std**2) ** 0.5 * noise, std


def chain(
    backbone: Bent,
    solver: DDIMSolver,
    shift: Tensor,
    noises: Tensor,
    prediction: str = "epsilon",
    first: Tensor | None = None,
    trained: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """Σ over images of −WEIGHT · r + ALPHA · Σ KL, and the trajectories; gradients from each image's first step on."""
    first = torch.zeros(noises.shape[1], dtype=torch.long) if first is None else first
    latents, states = noises[0], [noises[0]]
    total = torch.zeros((), dtype=torch.float64)
    for step, timestep in enumerate(solver.timesteps.tolist()):
        on = (first <= step).view(-1, 1, 1, 1)
        latents = torch.where(on, latents, latents.detach())
        # a step before the first has no gradient of its own either
        own = torch.where(on & torch.tensor(step < trained), shift[timestep], shift[timestep].detach())
        base = backbone.base_epsilon(latents, backbone.alphas[timestep]).tanh()
        mean, std = mean_of(solver, base + own * latents.sin(), latents, step, prediction)
        reference, _ = mean_of(solver, base, latents, step, prediction)
        kl = ((mean - reference).square() / (2 * std**2)).flatten(1).sum(1)
        total = total + ALPHA * (kl * (on.flatten() & (step < trained))).sum()
        latents = mean + std * noises[step + 1]
        # an image whose gradient begins at the next step is cut there
        states.append(latents.detach())
        latents = torch.where((first == step + 1).view(-1, 1, 1, 1), latents.detach(), latents)
    return total - WEIGHT * reward(latents).sum(), torch.stack(states)


def random_noises() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(STEPS + 1, COUNT, DIMS, 1, 1, generator=generator, dtype=torch.float64)


def pathwise(
    objective: RewardGradient, policy: AdapterPolicy, states: Tensor, trained: int = STEPS, kl_weight: float = ALPHA,
    weight: float = WEIGHT, rows: Tensor | None = None,
) -> tuple[Tensor, Ends]:  # fmt: skip
    """The gradient that the objective adds to the adapter's, of the sum over images."""
    paths = Paths(states, torch.arange(COUNT), torch.arange(COUNT)).at(torch.arange(COUNT) if rows is None else rows)
    ends = objective.ends(policy, paths, trained)
    latents = ends.latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(latents).sum(), latents)
    (parameter,) = policy.backbone.adapters.parameters("a")
    parameter.grad = None
    objective.backward(policy, paths, ends, gradient, [objective.terms(weight, kl_weight, 1.0)], trained)
    assert parameter.grad is not None
    return parameter.grad.clone(), ends


def expected(backbone: Bent, solver: DDIMSolver, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradient by autograd, and the trajectories."""
    (parameter,) = backbone.adapters.parameters("a")
    loss, states = chain(backbone, solver, parameter, random_noises(), **options)
    return torch.autograd.grad(loss, parameter)[0], states


# ── the gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_whole_chains_gradient_is_that_of_autograd_and_of_finite_differences(prediction: str) -> None:
    backbone, solver, policy = toy(prediction)
    gradient, states = expected(backbone, solver, prediction=prediction)
    found, _ = pathwise(RewardGradient(), policy, states)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    shift = backbone.shifts["a"].detach()
    for timestep in solver.timesteps.tolist():
        nudge = torch.zeros(100, dtype=torch.float64).index_fill(0, torch.tensor([timestep]), 1e-5)
        ahead, behind = (
            chain(backbone, solver, shift + sign * nudge, random_noises(), prediction)[0] for sign in (1, -1)
        )
        # 1e-7: central differences of 1e-5, whose error is of second order
        assert found[timestep].item() == pytest.approx(((ahead - behind) / 2e-5).item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("what", ["reward", "kl"])
def test_a_flipped_sign_is_another_gradient(what: str) -> None:
    backbone, solver, policy = toy()
    gradient, states = expected(backbone, solver)
    flipped = {"reward": {"weight": -WEIGHT}, "kl": {"kl_weight": 3 * ALPHA}}[what]
    found, _ = pathwise(RewardGradient(), policy, states, **flipped)
    assert (found - gradient).norm() > 0.1 * gradient.norm()


def test_without_a_weight_the_kl_has_no_gradient() -> None:
    backbone, solver, policy = toy()
    (parameter,) = backbone.adapters.parameters("a")
    states = chain(backbone, solver, parameter, random_noises())[1]
    found, _ = pathwise(RewardGradient(), policy, states, kl_weight=0.0)
    latents = random_noises()[0]
    for step, timestep in enumerate(solver.timesteps.tolist()):
        output = backbone.base_epsilon(latents, backbone.alphas[timestep]).tanh() + parameter[timestep] * latents.sin()
        mean, std = mean_of(solver, output, latents, step, "epsilon")
        latents = mean + std * random_noises()[step + 1]
    gradient = torch.autograd.grad(-WEIGHT * reward(latents).sum(), parameter)[0]
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("trained", [STEPS, STEPS - 1])
def test_the_last_steps_gradient_is_the_chains_with_the_earlier_steps_cut_off(steps: int, trained: int) -> None:
    """DRaFT-K; with ``skip_last_steps`` gradients pass through the last steps, which are not trained."""
    backbone, solver, policy = toy()
    first = torch.full((COUNT,), trained - steps)
    gradient, states = expected(backbone, solver, first=first, trained=trained)
    found, _ = pathwise(RewardGradient(steps=steps), policy, states, trained)
    assert int((found != 0).sum()) == steps
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_random_truncation_cuts_each_image_where_its_own_draw_says() -> None:
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    found, ends = pathwise(RewardGradient("alignprop"), policy, states)
    assert len(ends.first.unique()) > 1
    gradient, _ = expected(backbone, solver, first=ends.first)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_draws_are_an_images_own_and_reach_every_step() -> None:
    _, _, policy = toy()
    states = torch.zeros(STEPS + 1, 200, DIMS, 1, 1, dtype=torch.float64)
    paths = Paths(states, torch.arange(200), torch.arange(200) + 5)
    objective = RewardGradient("alignprop", steps=3)
    first = objective.ends(policy, paths, STEPS).first
    assert first.unique().tolist() == [2, 3, 4]
    some = torch.tensor([150, 3])
    assert torch.equal(objective.ends(policy, paths.at(some), STEPS).first, first[some])
    assert not torch.equal(objective.ends(policy, paths._replace(run_seed=1), STEPS).first, first)
    assert not torch.equal(objective.ends(policy, paths._replace(visit=1), STEPS).first, first)


def one_step(backbone: Bent, solver: DDIMSolver, states: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """x̂₀ of ε-predictions and the KL of the steps, both as functions of the adapter."""
    (parameter,) = backbone.adapters.parameters("a")
    originals, kls = [], []
    for state, step in zip(states, steps.tolist(), strict=True):
        timestep, alpha = int(solver.timesteps[step]), float(solver.schedule.alphas[step])
        base = backbone.base_epsilon(state, backbone.alphas[timestep]).tanh()
        output = base + parameter[timestep] * state.sin()
        mean, std = mean_of(solver, output, state, step, "epsilon")
        kls.append(((mean - mean_of(solver, base, state, step, "epsilon")[0]).square() / (2 * std**2)).sum())
        originals.append((state - (1 - alpha) ** 0.5 * output) / alpha**0.5)
    return torch.stack(originals), torch.stack(kls)


def test_refl_is_the_gradient_of_one_steps_original_image() -> None:
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    found, ends = pathwise(RewardGradient("refl", steps=3), policy, states)
    assert len(ends.first.unique()) > 1
    assert int(ends.first.min()) >= STEPS - 3
    originals, kl = one_step(backbone, solver, states[ends.first, torch.arange(COUNT)], ends.first)
    torch.testing.assert_close(ends.latents, originals.detach(), rtol=1e-12, atol=1e-12)
    loss = -WEIGHT * reward(originals).sum() + ALPHA * kl.sum()
    (gradient,) = torch.autograd.grad(loss, list(backbone.adapters.parameters("a")))
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_draft_lv_averages_the_last_step_over_fresh_noise() -> None:
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    found, ends = pathwise(RewardGradient("draft_lv", draws=3), policy, states)
    assert ends.state is not None
    assert ends.path.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert len(ends.state.unique(dim=0)) == 12
    originals, kl = one_step(backbone, solver, ends.state, ends.first)
    loss = (-WEIGHT * reward(originals).sum() + ALPHA * kl.sum()) / 3
    (gradient,) = torch.autograd.grad(loss, list(backbone.adapters.parameters("a")))
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["draft", "alignprop", "refl", "draft_lv"])
def test_micro_batches_add_up(variant: Any) -> None:
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    whole, _ = pathwise(RewardGradient(variant), policy, states)
    parts = [pathwise(RewardGradient(variant), policy, states, rows=rows)[0] for rows in torch.arange(COUNT).split(3)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-10, atol=1e-12)


# ── clipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_vector_is_shortened_and_a_short_one_is_not() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(clipped(vectors, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert clipped(vectors, None) is vectors


def test_clipping_the_reward_gradient_bounds_what_one_image_does() -> None:
    """A reward a thousand times as steep in one image: its gradient is what the limit leaves of it."""
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    paths = Paths(states, torch.arange(COUNT), torch.arange(COUNT))
    (parameter,) = backbone.adapters.parameters("a")
    unit = torch.ones(COUNT, DIMS, 1, 1, dtype=torch.float64) / DIMS**0.5

    def gradient(clip: float | None, steepness: float) -> Tensor:
        objective = RewardGradient(clip_reward_gradient=clip)
        ends = objective.ends(policy, paths, STEPS)
        slopes = unit * torch.tensor([0.5, 0.5, steepness, 0.5]).view(-1, 1, 1, 1)
        parameter.grad = None
        (metrics,) = objective.backward(policy, paths, ends, slopes, [objective.terms(1.0, 0.0, 1.0)], STEPS)
        assert metrics["train/reward_gradient_norm_max"].item() == pytest.approx(max(steepness, 0.5))
        assert parameter.grad is not None
        return parameter.grad.clone()

    torch.testing.assert_close(gradient(1.0, 1000.0), gradient(None, 1.0))
    torch.testing.assert_close(gradient(1.0, 0.7), gradient(None, 0.7))


def test_clipping_the_adjoint_bounds_it_between_steps() -> None:
    """With the limit far below it each step's gradient is that of an adjoint of just this length."""
    backbone, solver, policy = toy()
    _, states = expected(backbone, solver)
    limit = 1e-3
    found, _ = pathwise(RewardGradient(clip_adjoint=limit), policy, states, kl_weight=0.0)
    free, _ = pathwise(RewardGradient(), policy, states, kl_weight=0.0)
    last = int(solver.timesteps[-1])
    assert found[last] == free[last]  # before the first clip
    for step in range(STEPS - 1):
        # |∂L/∂θ_t| ≤ Σ over images of |adjoint| · |∂μ/∂θ_t|, whose last factor is at most c_t ‖sin x_t‖
        a, b = float(solver.schedule.alphas[step]), float(solver.schedule.alphas_next[step])
        variance = (1 - b) / (1 - a) * (1 - a / b)
        coefficient = abs((1 - b - variance) ** 0.5 - (b * (1 - a) / a) ** 0.5)
        bound = limit * coefficient * states[step].sin().flatten(1).norm(dim=1).sum()
        timestep = int(solver.timesteps[step])
        assert 0 < abs(found[timestep]) <= bound < abs(free[timestep])


def test_an_outlying_update_is_clipped_at_some_medians_of_the_latest_norms() -> None:
    objective = RewardGradient(clip_to_median=3.0)
    for norm in (1.0, 2.0, 250.0, 2.0):
        assert objective.norm_limit() == float("inf")
        objective.saw_norm(norm)
    objective.saw_norm(1.5)
    assert objective.norm_limit() == 6.0
    again = RewardGradient(clip_to_median=3.0)
    again.load_state_dict(objective.state_dict())
    assert again.norm_limit() == 6.0
    for _ in range(40):
        again.saw_norm(1.0)
    assert again.norm_limit() == 3.0
    assert len(again.state_dict()["norms"]) == 32


# ── fits ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

GRADIENT: dict[str, Any] = {
    "objective": {"class_path": "dblightning.objectives.RewardGradient", "init_args": {}},
    "policy_steps": 1, "policy_batch_size": 64, "kl": "exact",
}  # fmt: skip


def run_of(backbone: Any = None, reward: Any = None, **settings: Any) -> RewardRLModule:
    given = toy_fit.SETTINGS | GRADIENT | {"kl_weight": 0.4, "buffer_size": None} | settings
    del given["clip_range"]
    return RewardRLModule(backbone or GaussianBackbone(2), reward or LinearReward(0.5), **given)


@pytest.mark.parametrize(("alpha", "dims", "batch"), [(0.4, 3, 24), pytest.param(1.0, 1, 64, marks=pytest.mark.slow)])
def test_the_whole_chain_converges_to_the_known_optimum(tmp_path: Path, alpha: float, dims: int, batch: int) -> None:
    run = run_of(GaussianBackbone(dims), kl_weight=alpha, learning_rate=0.02, policy_batch_size=batch)
    moved = toy_optimum.converged(tmp_path, run, rollouts=100, average=30, batch_size=64)
    expected = toy_optimum.optimal_shift(run.backbone, run.solver, 0.5, alpha)  # type: ignore[arg-type]
    # 1 %: this gradient has no noise here, Adam's steps have not quite died down
    assert moved.tolist() == pytest.approx([expected] * dims, rel=0.01)


FLOWS = [("flow_sde", 0.7, 1.0), pytest.param("cps", 0.8, 1.0, marks=pytest.mark.slow), ("cps", 0.8, 0.5)]


@pytest.mark.parametrize(("noise", "eta", "alpha"), FLOWS)
def test_the_whole_chain_converges_to_the_optimum_on_the_flow_path(
    tmp_path: Path, noise: str, eta: float, alpha: float
) -> None:
    """The last step, to σ = 0, has no noise: the gradient passes through it and it is not trained."""
    run = run_of(
        test_flow_training.FlowBackbone(1), kl_weight=alpha, learning_rate=0.02, eta=eta, sampling={"noise": noise}
    )
    moved = toy_optimum.converged(tmp_path, run, rollouts=120, average=30, batch_size=32)
    expected = test_flow_training.optimal_shift(run.solver, 0.7, 0.5, alpha)  # type: ignore[arg-type]
    # 3 %: at high σ the velocity's shift moves x₀ little, and has not quite arrived
    assert moved.tolist() == pytest.approx([expected], rel=0.03)


def test_the_reward_weight_divides_alpha(tmp_path: Path) -> None:
    run = run_of(GaussianBackbone(1), kl_weight=0.8, reward_weight=2.0, learning_rate=0.02)
    moved = toy_optimum.converged(tmp_path, run, rollouts=100, average=30, batch_size=64)
    expected = toy_optimum.optimal_shift(run.backbone, run.solver, 0.5, 0.4)  # type: ignore[arg-type]
    assert moved.tolist() == pytest.approx([expected], rel=0.01)


def test_the_kl_is_logged_in_nats_and_steered_to_its_target(tmp_path: Path) -> None:
    """At the optimum for α the path KL is slope²/(2α²) Σ c_t² σ_t²: a third of the target is below it."""
    backbone = GaussianBackbone(1)
    run = run_of(backbone, kl_weight=0.4, learning_rate=0.02)
    toy_optimum.converged(tmp_path, run, rollouts=100, average=1, batch_size=64)
    later, variances = toy_optimum.gains(backbone, run.solver)
    expected = 0.5**2 / (2 * 0.4**2) * sum(c**2 * v for c, v in zip(later, variances, strict=True))
    metrics = run.trainer.callback_metrics
    assert float(metrics["train/kl"]) == pytest.approx(expected, rel=0.03)
    assert {"train/grad_norm", "train/reward_gradient_norm", "train/adjoint_norm", "train/reward"} <= set(metrics)
    assert float(metrics["train/reward_gradient_norm"]) == pytest.approx(0.5)
    steered = run_of(GaussianBackbone(1), kl_weight=0.4, kl_target=expected / 4, learning_rate=0.02)
    toy_optimum.converged(tmp_path, steered, rollouts=60, average=1, batch_size=32)
    assert steered.kl_weight > 0.5


@pytest.mark.parametrize("variant", ["draft", "alignprop", "refl", "draft_lv"])
def test_every_variant_raises_the_reward(tmp_path: Path, variant: str) -> None:
    objective = {"class_path": "dblightning.objectives.RewardGradient", "init_args": {"variant": variant}}
    run = run_of(objective=objective, kl_weight=0.01, learning_rate=0.05)
    seen: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/reward"]))

    toy_fit.trainer(tmp_path, max_epochs=5, callbacks=[Record()]).fit(run, datamodule=toy_fit.data(tmp_path))
    assert seen[-1] > seen[0] + 0.1


def test_refl_makes_several_updates_of_one_rollout_each_of_other_steps(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    class Recorded(RewardGradient):
        def ends(self, policy: AdapterPolicy, paths: Paths, trained_steps: int) -> Ends:
            found = super().ends(policy, paths, trained_steps)
            drawn.append(found.first)
            return found

    run = run_of(objective=Recorded("refl", steps=4), policy_steps=5)
    toy_fit.fit(tmp_path, run)  # three rollouts
    assert len(drawn) == 15
    assert len({tuple(each.tolist()) for each in drawn[:5]}) > 1
    (state,) = run.optimizers()[0].state.values()  # type: ignore[index, union-attr]
    assert int(state["step"]) == 15


def test_a_basis_of_one_adapter_is_logged_by_its_name(tmp_path: Path) -> None:
    given = toy_fit.SETTINGS | GRADIENT | {"buffer_size": None}
    del given["clip_range"]
    run = RewardRLModule(GaussianBackbone(2), adapters={"bright": {"reward": LinearReward(0.5)}}, **given)
    trained = toy_fit.fit(tmp_path, run)
    assert {"train/kl/bright", "train/grad_norm/bright", "train/reward/bright"} <= set(trained.callback_metrics)


def test_micro_batches_make_the_update_of_one_batch(tmp_path: Path) -> None:
    ends = []
    for size in (1, 3, 4):
        run = run_of(policy_batch_size=size)
        toy_fit.fit(tmp_path, run)
        ends.append(run.backbone.adapters.parameters(run.adapter_name)[0].detach())
    assert ends[0].norm() > 0.05
    for each in ends[:2]:
        torch.testing.assert_close(each, ends[2], rtol=1e-5, atol=1e-6)  # float32 in another order


class Spoilt(LinearReward):
    """NaN for one prompt."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = super()._score(images, prompts)
        return scores * torch.tensor([float("nan") if prompt == "prompt 0" else 1.0 for prompt in prompts])


@pytest.mark.parametrize("how", ["reward", "image"])
def test_an_image_without_a_finite_reward_is_left_out_of_the_average(tmp_path: Path, how: str) -> None:
    """The update is that of the others alone: the same as in a smaller batch."""
    spoilt = run_of(reward=Spoilt(0.5) if how == "reward" else LinearReward(0.5))
    if how == "image":
        rollout = spoilt.sampler.rollout

        def with_nan(batch: Any, *rest: Any) -> Any:
            trajectory, images = rollout(batch, *rest)
            bad = torch.tensor([prompt == "prompt 0" for prompt in batch["prompt"]])
            return trajectory._replace(log_probs=trajectory.log_probs.masked_fill(bad, torch.nan)), images

        spoilt.sampler.rollout = with_nan  # type: ignore[method-assign]
    whole = run_of()
    rolled = whole.sampler.rollout

    def without(batch: Any, *rest: Any) -> Any:
        kept = [index for index, prompt in enumerate(batch["prompt"]) if prompt != "prompt 0"]
        batch["prompt"] = [batch["prompt"][index] for index in kept]
        batch["prompt_id"], batch["seed"] = batch["prompt_id"][kept], batch["seed"][kept]
        return rolled(batch, *rest)

    whole.sampler.rollout = without  # type: ignore[method-assign]
    for run in (spoilt, whole):
        toy_fit.fit(tmp_path, run)
    one, other = (run.backbone.adapters.parameters(run.adapter_name)[0].detach() for run in (spoilt, whole))
    assert one.norm() > 0.05
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_loss_scaler_changes_nothing(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    ends = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        run = run_of(policy_batch_size=2)
        toy_fit.fit(tmp_path, run, plugins=plugins)
        ends.append(run.backbone.adapters.parameters(run.adapter_name)[0].detach())
    assert ends[0].norm() > 0.05
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


TWO: dict[str, Any] = {
    "settings": GRADIENT | {
        "objective": {
            "class_path": "dblightning.objectives.RewardGradient",
            "init_args": {"variant": "alignprop", "clip_to_median": 1.0, "clip_reward_gradient": 0.9},
        },
        "policy_batch_size": 2, "buffer_size": None,
    },
    "epochs": 2, "rollouts_per_epoch": 4, "validate": 3,
}  # fmt: skip


def test_two_processes_train_the_adapter_of_one_and_leave_out_what_is_nan_on_either(tmp_path: Path) -> None:
    trouble = {"how": "nan", "rank": 1, "call": 3}  # calls 1 and 2 are micro-batches of the first rollout
    runs = [{"name": "plain", **TWO}, {"name": "nan", **TWO, "trouble": trouble}]
    assert launching.finish(tmp_path, runs, processes=2) == [0, 0]
    alone = distributed_fit.run(tmp_path / "alone", "plain", batch_size=8, **TWO)
    for name in ("plain", "nan"):
        first, second = (launching.ended(tmp_path, name, rank) for rank in (0, 1))
        assert torch.equal(first["steps"], second["steps"])
        assert first["counts"][:2] == [8, 64]
    plain = launching.ended(tmp_path, "plain", 0)
    assert len(plain["steps"]) == 8
    # 1e-5: float32 sums in another order
    torch.testing.assert_close(plain["steps"], alone["steps"], rtol=1e-5, atol=1e-6)
    for name in ("train/reward", "train/kl", "train/reward_gradient_norm", "train/grad_norm", "val/reward"):
        assert plain["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5)
    assert not torch.equal(launching.ended(tmp_path, "nan", 0)["steps"], plain["steps"])


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Norms of earlier updates too, which limit later ones."""
    whole = distributed_fit.run(tmp_path / "whole", "run", **TWO)
    with pytest.raises(Preempted):
        signals = {"name": "SIGTERM", "rank": 0, "after": 5}
        distributed_fit.run(tmp_path, "run", **TWO, signals=signals, every_n_rollouts=100)
    launching.assert_same_end(distributed_fit.run(tmp_path, "run", **TWO, resume=True), whole)
    assert launching.curves(tmp_path, "run") == launching.curves(tmp_path / "whole", "run")


class Redness(RewardMetric):
    """Mean of red less green and blue."""

    is_differentiable = True

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


# ── on a real architecture ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_on_a_unet_the_gradient_is_that_of_one_graph_from_noise_to_reward(
    sd15_folder: Path, tmp_path: Path, guidance_scale: float
) -> None:
    """Through guidance, text conditioning and decoder, with the path KL: autograd of the whole chain at once."""
    from dblightning.backbone import DiffusersBackbone

    backbone = DiffusersBackbone(str(sd15_folder))
    run = RewardRLModule(
        backbone, Redness(), num_inference_steps=4, guidance_scale=guidance_scale, policy_steps=1, kl_weight=0.3,
        policy_batch_size=1, objective=RewardGradient(),
    )  # fmt: skip
    parameters = backbone.adapters.parameters(run.adapter_name)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    found: list[Tensor] = []
    run._step = lambda *_: found.extend(each.grad.clone() for each in parameters)  # type: ignore[method-assign, union-attr]
    batch = {"prompt": ["a red circle", "a blue star"], "prompt_id": torch.tensor([0, 1]), "seed": torch.tensor([0, 1])}
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue star\n")
    data = PromptFileDataModule(str(file), batch_size=2, rollouts_per_epoch=1)
    seen: dict[str, Any] = {}
    rollout = run.sampler.rollout

    def kept(given: Any, *rest: Any) -> Any:
        seen.update(given)
        return rollout(given, *rest)

    run.sampler.rollout = kept  # type: ignore[method-assign]
    toy_fit.trainer(tmp_path).fit(run, datamodule=data)
    batch = seen
    noise = ImageNoise.of(run.seed, batch["prompt_id"].tolist(), batch["seed"].tolist(), "cpu", "training")
    conditioning = backbone.encode(batch["prompt"])
    latents, kl = noise(backbone.latent_shape), torch.zeros(2)
    for step, timestep in enumerate(run.solver.timesteps):
        rows = timestep.expand(2)
        made, reference = (
            run.solver.gaussian(backbone.denoise(latents, rows, conditioning, guidance_scale, gates), latents, step)
            for gates in (torch.ones(2, 1), None)
        )
        kl = kl + ((made.mean - reference.mean).square() / (2 * made.std**2)).flatten(1).sum(1)
        latents = made.mean + made.std * noise(backbone.latent_shape)
    loss = (0.3 * kl - Redness().score(backbone.decode(latents), batch["prompt"])).mean()
    gradient, known = (torch.cat([each.flatten() for each in grads]) for grads in (
        found, torch.autograd.grad(loss, parameters)
    ))  # fmt: skip
    assert known.norm() > 1e-3
    # 1e-3: float32, and the rollout runs on merged weights
    assert (gradient - known).norm() <= 1e-3 * known.norm()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_steps": 5}, "one update per rollout, got optimisation.policy_steps 5; set it to 1"),
        ({"kl": "eps_mse"}, "exact KL, got kl.form 'eps_mse'"),
        ({"kl_share": 0.5}, "got kl.share 0.5"),
        ({"overlap_reward": True, "rollout_batch_size": 2}, "set sampling.overlap_reward to false"),
        ({"objective": RewardGradient(steps=5)}, "objective.steps must be at most the 4 steps that are trained, got 5"),
        ({"objective": RewardGradient(steps=4), "skip_last_steps": 1}, "at most the 3 steps that are trained, got 4"),
        ({"objective": RewardGradient("draft_lv", steps=2)}, "draft_lv trains the last step alone, got objective.ste"),
        ({"objective": RewardGradient("draft_lv"), "skip_last_steps": 1}, "and skip_last_steps 1"),
        ({"window": {"size": 2}}, "leave window.size out, got 2"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "drift"}, "variant must be one of draft, draft_lv, alignprop, refl, got 'drift'"),
        ({"steps": 0}, "steps must be a whole number >= 1 or null, got 0"),
        ({"draws": 0}, "draws must be"),
        ({"clip_reward_gradient": 0.0}, "clip_reward_gradient must be > 0 and finite or null"),
        ({"clip_adjoint": -1.0}, "clip_adjoint must be > 0 and finite or null"),
        ({"clip_to_median": 0.5}, "clip_to_median must be >= 1 and finite or null"),
    ],
)
def test_its_own_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardGradient(**settings)


def test_a_reward_without_a_gradient_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="JPEGCompressibility has none; train on it with DPOK"):
        run_of(reward=JPEGCompressibility())
    mixed = WeightedReward({"lin": LinearReward(), "size": JPEGCompressibility()}, {"lin": 0.5, "size": 0.5})
    with pytest.raises(ValueError, match="'size' has none"):
        run_of(reward=mixed)


def test_the_short_name_and_the_class_path_are_one() -> None:
    assert run_of(objective="reward_gradient").objective == RewardGradient()
    with pytest.raises(ValueError, match="optimisation.policy_steps 2"):
        run_of(objective="reward_gradient", policy_steps=2)


NEEDED = [
    "--model.backbone", "dblightning.backbone.DiffusersBackbone", "--model.backbone.pretrained", "miniature",
    "--model.reward", "dblightning.miniature.rewards.ShapeAlignment",
]  # fmt: skip


def test_the_command_line_refuses_it_before_any_work() -> None:
    options = ["--model.objective", "reward_gradient", *NEEDED, "--data", "dblightning.data.MiniatureDataModule"]
    options += ["--model.sampling.num_inference_steps", "20", "--model.optimisation.skip_last_steps", "10"]
    with pytest.raises(Refused, match=r"policy_steps 5; set it to 1"):
        check_command("fit", options)
    check_command("fit", [*options, "--model.optimisation.policy_steps", "1"])
    with pytest.raises(Refused, match="objective.steps must be at most the 10 steps"):
        check_command("fit", [*options, "--model.optimisation.policy_steps", "1", "--model.objective.steps", "12"])
