from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dblightning.blending import Base
from dblightning.module import RewardRLModule
from dblightning.objectives import BestOfN
from dblightning.objectives.best_of_n import best_of_groups
from dblightning.objectives.draws import NO_PROMPT
from dblightning.solvers import DDIMSolver
from tests.toy import GaussianBackbone
from tests.toy_fit import data, fit, trainer
from tests.toy_rewards import LinearReward

SETTINGS: dict[str, Any] = {
    "sampling": {"num_inference_steps": 4, "guidance_scale": 1.0},
    "advantage": {"baseline": "prompt"},
    "replay": {"buffer_size": None},
    "kl": {"weight": 0.0},
}


def module(objective: BestOfN | None = None, reward: Any = None, dims: int = 1, **settings: Any) -> RewardRLModule:
    return RewardRLModule(
        GaussianBackbone(dims), reward or LinearReward(), objective=objective or BestOfN(), **(SETTINGS | settings)
    )


def test_the_best_of_each_prompt_are_kept_and_never_one_that_is_not_finite() -> None:
    prompt_ids = torch.tensor([4, 4, 4, 9, 9, 2])
    rewards = torch.tensor([1.0, 3.0, 2.0, float("inf"), -5.0, float("nan")])
    assert best_of_groups(prompt_ids, rewards, 1).tolist() == [False, True, False, False, True, False]
    assert best_of_groups(prompt_ids, rewards, 2).tolist() == [False, True, True, False, True, False]


def fixed_point(backbone: GaussianBackbone, solver: DDIMSolver, alpha: float, n: int, keep: int) -> float:
    """How far best-of-n with a KL term moves the mean of x₀ in one dimension; derived by hand.

    An adapter that adds s_t to ε moves x₀'s mean by M = Σ c_t q_t s_t, with q_t = ∂μ_t/∂ε and c_t the gain of the later
    steps, and leaves its deviation σ₀ alone. The best images' mean is then μ₀ + M + e σ₀, where e is the mean of the
    ``keep`` largest of n standard normal values, and Δ is how far that is from the data's. The loss asks for
    s_t = −k_t Δ with k_t = √(1−ᾱ) √ᾱ / v_t, the KL term for s_t = 0 with weight α q_t² / (2σ_t²); together
    s_t = −k_t Δ / (1 + α q_t² / (2σ_t²)). So M = G Δ, and with Δ = μ₀ − m + M + e σ₀, M = G (μ₀ − m + e σ₀) / (1 − G).
    """
    mean, variance, gains, terms = 0.0, 1.0, [], []
    for a, b in zip(solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist(), strict=True):
        noise = (1 - b) / (1 - a) * (1 - a / b)
        q = (1 - b - noise) ** 0.5 - (b * (1 - a) / a) ** 0.5
        v = a * backbone.std**2 + 1 - a
        gain = (b / a) ** 0.5 + q * (1 - a) ** 0.5 / v
        mean = gain * mean - q * (1 - a) ** 0.5 * a**0.5 * backbone.mean / v
        variance = gain**2 * variance + noise
        gains.append(gain)
        terms.append(-q * ((1 - a) * a) ** 0.5 / v / (1 + alpha * q**2 / (2 * noise)))
    total, later = 0.0, 1.0
    for gain, term in zip(reversed(gains), reversed(terms), strict=True):
        total += later * term
        later *= gain
    draws = torch.randn(100_000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = draws.sort(dim=1, descending=True).values[:, :keep].mean().item()
    return total * (mean - backbone.mean + best * variance**0.5) / (1 - total)


@pytest.mark.parametrize(("alpha", "keep"), [(1.0, 16), pytest.param(0.3, 4, marks=pytest.mark.slow)])
def test_best_of_n_reaches_its_fixed_point(tmp_path: Path, alpha: float, keep: int) -> None:
    run = module(
        BestOfN(keep=keep, text_dropout=0.0),
        optimisation={
            "learning_rate": 0.05, "policy_steps": 4, "batch_size": 1024, "accumulation": 1, "clip_grad_norm": 100.0,
        },
        kl={"weight": alpha, "form": "exact"},
    )  # fmt: skip
    shifts: list[Tensor] = []

    class Average(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shifts.append(run.backbone.shifts[run.adapter_name].detach().clone())  # type: ignore[operator]

    rollouts = 60
    prompts = data(tmp_path, prompts=4, batch_size=256, rollouts_per_epoch=rollouts)
    trainer(tmp_path, callbacks=[Average()]).fit(run, datamodule=prompts)
    # the average of the last iterates takes out the noise of the last gradient
    run.backbone.shifts[run.adapter_name].data = torch.stack(shifts[-30:]).mean(0)  # type: ignore[operator]
    ids = torch.arange(500)
    texts = ["prompt 0"] * len(ids)
    # base and adapter share their noise and the shift is the same for all noise, so no Monte-Carlo error is left
    moved = run.generate(texts, ids, ids) - run.generate(texts, ids, ids, Base())
    expected = fixed_point(run.backbone, run.solver, alpha, 64, keep)  # type: ignore[arg-type]
    assert moved.mean().item() == pytest.approx(expected, rel=0.05)


def test_the_loss_is_the_denoising_error_of_what_was_kept(tmp_path: Path) -> None:
    run = module(BestOfN(text_dropout=0.0))
    prompts = data(tmp_path, prompts=2, batch_size=8, samples_per_prompt=4, rollouts_per_epoch=1)
    trainer(tmp_path).fit(run, datamodule=prompts)
    assert run.replay is not None
    assert run.replay.size == 2  # the best of each prompt
    best = run.latest_images[2].view(2, 4).amax(1)  # type: ignore[index]
    assert sorted(run.replay.facts[:2, 0].tolist()) == sorted(best.tolist())
    finals = run.replay.latents[: run.replay.size, -1]
    transitions = next(run._batches(run.learners[0], 16, "policy"))
    assert len(transitions.step_index.unique()) == 4  # every noise level
    assert all((finals == row).flatten(1).all(1).any() for row in transitions.next_latents)
    alpha = run.solver.schedule.alphas[transitions.step_index].view(-1, 1, 1, 1)
    noise = (transitions.latents - alpha.sqrt() * transitions.next_latents) / (1 - alpha).sqrt()
    loss, _ = run.objective.loss(run.policy, transitions)
    output = run.policy.output(transitions, run.adapter_name)
    expected = (output.double() - noise).square().flatten(1).mean(1).mean()
    # 1e-4: the noise of a nearly clean image is a difference of two float32 tensors, divided by √(1−ᾱ)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_share_of_the_rows_is_trained_without_its_prompt(tmp_path: Path) -> None:
    run = module(BestOfN(text_dropout=0.25))
    fit(tmp_path, run)
    batches = islice(run._batches(run.learners[0], 16, "policy"), 250)
    dropped = torch.cat([transitions.prompt_id == NO_PROMPT for transitions in batches]).float().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.035)  # five deviations of a share of 4,000
    assert run._texts(torch.tensor([NO_PROMPT, 0])) == ["", run.prompts[0]]


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"replay": {"buffer_size": 32}, "optimisation": {"batch_size": 4, "learning_rate": 0.05}}
    whole = module(BestOfN(keep=2), **settings)
    fit(tmp_path / "whole", whole, max_epochs=2)
    half = module(BestOfN(keep=2), **settings)
    fit(tmp_path / "half", half).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(BestOfN(keep=2), **settings)
    fit(tmp_path / "half", resumed, str(tmp_path / "half.ckpt"), max_epochs=2)
    shifts = [run.backbone.shifts[run.adapter_name] for run in (whole, half, resumed)]  # type: ignore[operator]
    assert torch.equal(shifts[0], shifts[2])
    assert not torch.equal(shifts[0], shifts[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"guidance_scale": 3.0}}, "text_dropout"),
        ({"advantage": {"baseline": "value"}}, "value function"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module(**settings)


def test_a_group_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="keep must be a whole number >= 1, got 0"):
        BestOfN(keep=0)


def test_evaluation_may_take_other_steps_and_another_guidance() -> None:
    sampling = {"num_inference_steps": 4, "guidance_scale": 1.0, "eval_steps": 8, "eval_guidance_scale": 3.0}
    run = module(sampling=sampling)
    asked: list[tuple[int, float]] = []
    denoise = run.backbone.denoise

    def spy(latents: Any, timesteps: Any, conditioning: Any, guidance_scale: float = 1.0, gates: Any = None) -> Tensor:
        asked.append((int(timesteps[0]), guidance_scale))
        return denoise(latents, timesteps, conditioning, guidance_scale, gates)

    run.backbone.denoise = spy  # type: ignore[method-assign]
    run.generate(["a"], torch.tensor([0]), torch.tensor([0]))
    assert len(asked) == 8
    assert {scale for _, scale in asked} == {3.0}
