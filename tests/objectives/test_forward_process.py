from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.module import RewardRLModule
from dblightning.objectives import AWM, DPOK, NFT
from dblightning.objectives.draws import Draws
from dblightning.objectives.forward_process import nft_loss, optimality, original_gain
from dblightning.objectives.old_policy import OldPolicy
from tests.toy import GaussianBackbone, ShiftBank
from tests.toy_fit import SETTINGS, data, trainer
from tests.toy_optimum import converged, gains, module
from tests.toy_rewards import LinearReward

GROUP = {"baseline": "group"}


def quick(**settings: Any) -> RewardRLModule:
    """A small run."""
    plain = {name: value for name, value in SETTINGS.items() if name != "clip_range"}
    plain |= {"advantage": GROUP, "buffer_size": None}
    return RewardRLModule(GaussianBackbone(2), LinearReward(), **(plain | settings))


# ── the formula ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_sources_loss_in_float64(prediction: str, beta: float) -> None:
    """Written as the source does: outputs are mixed first, then x̂₀ is taken, per sample and in plain loops."""
    generator = torch.Generator().manual_seed(3)
    x0, noise, own, old = torch.randn(4, 6, 4, 2, 2, generator=generator, dtype=torch.float64).unbind()
    advantage = torch.tensor([-7.0, -1.0, 0.0, 0.5, 3.0, 9.0], dtype=torch.float64)
    t = 0.3
    x_t = (1 - t) * x0 + t * noise if prediction == "velocity" else 0.7**0.5 * x0 + 0.3**0.5 * noise

    def original(output: Tensor) -> Tensor:
        return x_t - t * output if prediction == "velocity" else (x_t - 0.3**0.5 * output) / 0.7**0.5

    expected = []
    for i in range(6):
        r = min(max(min(max(float(advantage[i]), -5.0), 5.0) / 10 + 0.5, 0.0), 1.0)
        terms = []
        for output in (beta * own[i] + (1 - beta) * old[i], (1 + beta) * old[i] - beta * own[i]):
            whole = own.clone()
            whole[i] = output
            error = original(whole)[i] - x0[i]
            terms.append(error.square().mean() / max(1e-5, error.abs().mean()))
        expected.append((r * terms[0] + (1 - r) * terms[1]) / beta)
    found = nft_loss(original(own), original(old), x0, optimality(advantage, 5.0), beta)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    flipped = nft_loss(original(own), original(old), x0, optimality(-advantage, 5.0), beta)
    assert not torch.allclose(found, flipped)


def test_the_weights_carry_no_gradient() -> None:
    current = torch.tensor([[3.0]], requires_grad=True)
    zero = torch.zeros(1, 1)
    nft_loss(current, zero, zero, torch.ones(1), 1.0).sum().backward()
    assert current.grad is not None
    assert current.grad.item() == pytest.approx(2.0)  # 2 · 3 / |3|; with a gradient through W it would be 1


@pytest.mark.parametrize("objective", [NFT(adaptive=False), AWM(0.5)])
def test_at_the_old_policy_the_gradient_is_the_advantage_times_the_matching_gradient(objective: Any) -> None:
    """Of A · ‖output − target‖²: samples of positive advantage are denoised better, others worse."""
    run = quick(objective=objective, policy_batch_size=6)
    solver, generator = run.solver, torch.Generator().manual_seed(1)
    run.prompts = {0: "a"}
    x0, noise = torch.randn(2, 6, 2, 1, 1, generator=generator).unbind()
    at, none = torch.tensor([0, 1, 2, 3, 0, 1]), torch.zeros(6)
    from dblightning.replay import Transitions

    latents = solver.noised(x0, noise, at).float()
    rows = Transitions(latents, x0, at, none, none, none, none, none.long(), none.long())
    rows = rows._replace(advantage=torch.tensor([1.5, -2.0, 0.5, 3.0, -1.0, 0.0]))
    (shift,) = run.backbone.adapters.parameters(run.adapter_name)
    loss, _ = objective.loss(run.policy, rows)
    (found,) = torch.autograd.grad(loss, shift)
    run.policy.forget()
    output = run.policy.current(rows)
    if isinstance(objective, NFT):
        matching = (solver.original(output, latents, at) - x0).square().flatten(1).mean(1)
    else:
        matching = (output - noise).square().flatten(1).mean(1)
    (expected,) = torch.autograd.grad((rows.advantage * matching).mean(), shift)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32


def test_the_gain_of_x0_is_its_derivative() -> None:
    run = quick()
    a = run.solver.schedule.alphas
    found = original_gain(run.solver, torch.arange(4), torch.zeros(4, 2, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(found, ((1 - a) / a).sqrt(), rtol=1e-12, atol=0)


# ── the fixed point ──────────────────────────────────────────────────────────────────────────────────────────────────


def fixed_shift(
    backbone: GaussianBackbone,
    solver: Any,
    slope: float,
    weight: float,
    adaptive: bool,
    awm: bool = False,
    sampled: float | None = None,
) -> float:
    """Shift of x₀ where NFT's gradient and the KL's cancel, the old policy being the current one.

    The policy adds δ_t to ε at level t, so u = −k_t δ_t with k_t = √((1−ᾱ)/ᾱ). At u = 0 NFT's gradient in u is
    −2 E[A e], e = x₀ − x̂₀, or −2 E[A sign e] with weights W = |e|; A = slope (x₀ − mean) and (x₀, e) is Gaussian, so
    E[A e] = slope · Cov(x₀, e) and E[A sign e] = slope · Cov(x₀, e) · 2 φ(m/s)/s for e ~ N(m, s²). The KL's gradient in
    δ_t is weight · g_t² δ_t / σ_t². The mean of e moves with the shift, so the equations are iterated.

    AWM's gradient at its old policy is that of A · ℓ, ℓ = (ε_θ − ε)² = (x̂₀ − x₀)² / k_t²: NFT's without W, over k_t².
    ``sampled`` is the variance of the samples, where another sampler makes them than the solver.
    """
    alphas, after = solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist()
    data_variance = backbone.std**2
    coefficients, mean, variance = [], 0.0, 1.0
    for (c, v), a, b in zip(zip(*gains(backbone, solver), strict=True), alphas, after, strict=True):
        total = a * data_variance + 1 - a
        slope_of_epsilon = (1 - a) ** 0.5 / total
        gain = (1 - b - v) ** 0.5 - (b * (1 - a) / a) ** 0.5
        step = (b / a) ** 0.5 + gain * slope_of_epsilon
        mean = step * mean - gain * slope_of_epsilon * a**0.5 * backbone.mean
        variance = step**2 * variance + v
        coefficients.append((a, v, c, gain, a * data_variance / total, ((1 - a) / a) ** 0.5))
    variance = variance if sampled is None else sampled
    shift, deltas = 0.0, [0.0] * len(coefficients)
    for _ in range(200):
        for index, (a, v, _, gain, kept, k) in enumerate(coefficients):
            covariance = variance * (1 - kept)
            signal = covariance
            if adaptive:
                m = (1 - kept) * (mean + shift - backbone.mean) + k * deltas[index]
                s = (variance * (1 - kept) ** 2 + kept**2 * (1 - a) / a) ** 0.5
                signal = covariance * 2 * math.exp(-((m / s) ** 2) / 2) / (2 * math.pi) ** 0.5 / s
            signal /= k**2 if awm else 1
            wanted = -2 * slope * signal * k * v / (weight * gain**2)
            deltas[index] += 0.2 * (wanted - deltas[index])  # damped, or the iteration swings
        shift = sum(c * gain * delta for (_, _, c, gain, _, _), delta in zip(coefficients, deltas, strict=True))
    return shift


@pytest.mark.parametrize("adaptive", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weight", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_nft_finds_its_fixed_point(tmp_path: Path, weight: float, adaptive: bool) -> None:
    backbone = GaussianBackbone()
    objective = NFT(adaptive=adaptive, decay_rate=0.0)
    run = module(backbone, objective=objective, kl_weight=weight, advantage=GROUP, learning_rate=0.01)
    expected = fixed_shift(backbone, run.solver, 0.5, weight, adaptive)
    assert expected > 0.05
    found = converged(tmp_path, run, samples_per_prompt=64)
    # 5 %: the noise left after averaging, and 1/64 that a group's mean takes of each of its own rewards
    assert found.item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("weight", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_awm_finds_its_fixed_point(tmp_path: Path, weight: float) -> None:
    backbone = GaussianBackbone()
    run = module(backbone, objective=AWM(0.5), kl_weight=weight, advantage=GROUP, learning_rate=0.01)
    expected = fixed_shift(backbone, run.solver, 0.5, weight, adaptive=False, awm=True)
    assert expected > 0.01
    assert converged(tmp_path, run, samples_per_prompt=64).item() == pytest.approx(expected, rel=0.05)  # as above


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_samples_draws_go_through_all_levels_and_their_noise_is_new(tmp_path: Path) -> None:
    run = quick(objective=NFT(noise_draws=2), optimisation={"epochs": 2})
    seen: list[Any] = []
    losses = run._losses
    run._losses = lambda parts, *rest: (seen.append(parts[0][1]), losses(parts, *rest))[1]  # type: ignore
    trainer(tmp_path, max_epochs=1).fit(run, datamodule=data(tmp_path, samples_per_prompt=2, rollouts_per_epoch=1))
    rows = {
        name: torch.cat([getattr(each, name) for each in seen]) for name in ("latents", "next_latents", "step_index")
    }
    assert len(rows["latents"]) == 4 * 2 * 2  # samples, draws, passes
    assert run.replay is not None
    for sample in run.replay.latents[:4, -1]:
        mine = (rows["next_latents"] == sample).flatten(1).all(1)
        assert sorted(rows["step_index"][mine].tolist()) == [0, 1, 2, 3]
    a = run.solver.schedule.alphas[rows["step_index"]].view(-1, 1, 1, 1)
    noise = (rows["latents"] - a.sqrt() * rows["next_latents"]) / (1 - a).sqrt()
    assert len({round(value, 4) for value in noise.flatten().tolist()}) == noise.numel()
    assert noise.abs().max() < 5


def test_rollouts_may_follow_the_ode_and_final_latents_alone_are_kept(tmp_path: Path) -> None:
    run = quick(objective=NFT(), window={"size": 0, "tail_steps": 2})
    rows: list[int] = []
    denoise = run.backbone._denoise
    run.backbone._denoise = lambda latents, *rest: (rows.append(len(latents)), denoise(latents, *rest))[1]  # type: ignore
    ids = torch.arange(4)
    batch = {"prompt": ["a"] * 4, "prompt_id": ids, "seed": ids}
    trajectory, _ = run.roll_out(batch)
    assert rows == [4, 4]  # two calls of the denoiser, where the schedule has four steps
    assert trajectory.latents.shape[0] == 2 and torch.equal(trajectory.latents[0], trajectory.latents[1])
    rollout = run.window.solver(run.solver, 0)
    assert rollout is not None and not any(rollout.is_stochastic(step) for step in range(2))
    trainer(tmp_path, max_epochs=1).fit(run, datamodule=data(tmp_path, samples_per_prompt=2, rollouts_per_epoch=1))
    assert run.replay is not None and run.replay.latents.shape[1] == 2
    assert run.backbone.shifts[run.adapter_name].abs().max() > 0  # type: ignore


@pytest.mark.slow
def test_nft_finds_its_fixed_point_from_rollouts_without_noise(tmp_path: Path) -> None:
    """The samples' variance is then the ODE's; the rest is as above."""
    backbone = GaussianBackbone()
    options: dict[str, Any] = {"kl_weight": 1.0, "advantage": GROUP, "learning_rate": 0.01}
    run = module(backbone, objective=NFT(adaptive=False, decay_rate=0.0), window={"size": 0}, **options)
    ids = torch.arange(4096)
    batch = {"prompt": ["a red circle"] * len(ids), "prompt_id": ids, "seed": ids}
    samples = run.roll_out(batch)[0].image.double()
    expected = fixed_shift(backbone, run.solver, 0.5, 1.0, adaptive=False, sampled=float(samples.var()))
    assert abs(expected / fixed_shift(backbone, run.solver, 0.5, 1.0, adaptive=False) - 1) > 0.1
    found = converged(tmp_path, run, samples_per_prompt=64)
    assert found.item() == pytest.approx(expected, rel=0.05)  # as above


def test_a_draw_depends_on_its_sample_and_number_alone() -> None:
    run = quick()
    from dblightning.replay import Transitions

    none = torch.zeros(3)
    x0 = torch.randn(3, 2, 1, 1)
    samples = Transitions(x0, x0, none.long(), none, none, none, none, none.long(), none.long())
    draws = Draws(seed=1, rollout=2, per_sample=4, steps=4)
    whole = draws(run.solver, samples, [0, 1, 2], [3, 0, 1], 0)
    part = draws(run.solver, samples.at(torch.tensor([2, 1])), [2, 1], [1, 0], 0)
    assert torch.equal(whole.latents[[2, 1]], part.latents)
    assert not torch.equal(draws(run.solver, samples, [0, 1, 2], [3, 0, 1], 1).latents, whole.latents)


# ── the old policy ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_old_policys_schedules_are_the_sources() -> None:
    first, second = NFT(), NFT(decay_start=75, decay_rate=0.0075, decay_max=0.999)
    assert [first.old_decay(step) for step in (0, 100, 900)] == pytest.approx([0.0, 0.1, 0.5])
    assert [second.old_decay(step) for step in (74, 75, 95, 900)] == pytest.approx([0.0, 0.0, 0.15, 0.999])


def test_the_old_policy_follows_the_trained_one() -> None:
    bank: Any = ShiftBank()
    bank.add("mine", 4, None, (), 0)
    old = OldPolicy(bank, "mine", {"rank": 4, "lora_alpha": None, "target_modules": ()})
    assert old.name is not None
    bank.shifts["mine"].data.fill_(2.0)
    old.follow(0.75)
    assert bank.shifts[old.name].unique().tolist() == pytest.approx([0.5])
    old.follow(0.0)
    assert torch.equal(bank.shifts[old.name], bank.shifts["mine"])
    assert not bank.shifts[old.name].requires_grad
    assert bank.shifts["mine"].requires_grad


def test_rollouts_are_the_old_policys_and_validation_the_trained_ones(tmp_path: Path) -> None:
    run = quick(objective=NFT())
    ids = torch.arange(4)
    batch = {"prompt": ["a"] * 4, "prompt_id": ids, "seed": ids}
    before, _ = run.roll_out(batch)
    plain = run.generate(["a"] * 4, ids, ids)
    run.backbone.shifts[run.adapter_name].data.fill_(0.5)  # type: ignore
    after, _ = run.roll_out(batch)
    assert torch.equal(before.latents, after.latents)
    assert not torch.equal(plain, run.generate(["a"] * 4, ids, ids))


def fitted(folder: Path, rollouts: int, ckpt_path: str | None = None, objective: Any = None) -> RewardRLModule:
    objective = objective or NFT(decay_rate=0.2, noise_draws=3)
    run = quick(objective=objective, optimisation={"epochs": 1})
    fit = trainer(folder, max_epochs=rollouts)
    prompts = data(folder, samples_per_prompt=2, rollouts_per_epoch=1)
    fit.fit(run, datamodule=prompts, ckpt_path=ckpt_path, weights_only=True)
    fit.save_checkpoint(folder / f"{rollouts}.ckpt")
    return run


@pytest.mark.parametrize("objective", [NFT(decay_rate=0.2, noise_draws=3), AWM(decay_rate=0.2)])
def test_a_resumed_run_is_bit_identical_old_policy_included(tmp_path: Path, objective: Any) -> None:
    whole = fitted(tmp_path, 4, objective=objective)
    fitted(tmp_path, 2, objective=objective)
    resumed = fitted(tmp_path, 4, str(tmp_path / "2.ckpt"), objective)
    state = whole.state_dict()
    assert not torch.equal(state["old.shift"], state["adapter.shift"])
    for key, tensor in state.items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_only_where_it_is_needed_is_there_an_old_policy() -> None:
    run = quick(objective=DPOK())
    assert run.backbone.adapters.names == [run.adapter_name]
    assert not [key for key in run.state_dict() if key.startswith("old.")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer_size": 100}, "NFT trains on the latest rollout.*set replay.buffer_size to null"),
        ({"advantage": "value"}, "NFT has no value function.*group or prompt"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(objective=NFT(), **settings)
