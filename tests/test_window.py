"""Rollouts whose steps are stochastic inside a window alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dblightning.blending import Base, Single
from dblightning.gaussian_step import gaussian_log_prob
from dblightning.module import RewardRLModule
from dblightning.noise import ImageNoise
from dblightning.replay import ReplayBuffer
from dblightning.rollout import Trajectory, rollout
from dblightning.solvers import DDIMSolver, make_solver
from dblightning.training_settings import WindowSettings
from dblightning.window import Window, WindowedSolver
from tests import launching
from tests.distributed_fit import run
from tests.toy import SCHEDULER, GaussianBackbone
from tests.toy_fit import data, module, trainer
from tests.toy_rewards import LinearReward

STEPS = 10


def solver(steps: int = STEPS, **settings: Any) -> DDIMSolver:
    return make_solver(SCHEDULER | settings, steps, 1.0)


def sampled(window: WindowedSolver | None, blend: Any = None) -> tuple[Trajectory, GaussianBackbone]:
    backbone = GaussianBackbone(3)
    backbone.adapters.add("a", 1, None, (), 0)
    with torch.no_grad():
        backbone.shifts["a"].copy_(torch.linspace(-0.5, 0.5, 100))
    conditioning = backbone.encode(["one", "two"])
    of = window.solver if window is not None else solver()
    noise = ImageNoise([1, 2])
    return rollout(backbone, conditioning, of, blend or Single("a"), noise, 1.0, "gated", window), backbone


# ── which steps ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("start", "size", "tail", "expected"),
    [
        (0, 4, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (0, 4, 3, [0, 1, 2, 3, 4, 6, 8]),
        (2, 3, 1, [0, 1, 2, 3, 4, 5]),
        (6, 4, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (3, 4, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_the_steps_after_the_window_are_spread_over_what_is_left(
    start: int, size: int, tail: int | None, expected: list[int]
) -> None:
    walk = WindowedSolver(solver(), start, size, tail)
    assert walk.indices == expected
    assert walk.timesteps.tolist() == solver().timesteps[torch.tensor(expected)].tolist()


def test_positions() -> None:
    def starts(rollouts: int, **settings: Any) -> list[int]:
        window = Window(WindowSettings(size=4, **settings), STEPS, 2, seed=7)
        assert (window.stored, window.trained) == (4, 4)
        return [window.start(rollout) for rollout in range(rollouts)]

    assert starts(3, first=1) == [1, 1, 1]
    assert starts(12, position="sliding", every=2) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert starts(5, position="sliding", first=1, last=2, every=1) == [1, 2, 1, 2, 1]
    drawn = Counter(starts(500, position="random"))
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    # 100 ± 9 each
    assert max(abs(count - 100) for count in drawn.values()) < 35
    assert starts(20, position="random") == starts(20, position="random")
    assert set(starts(50, position="random", first=2, last=3)) == {2, 3}


def test_without_a_window_nothing_changes() -> None:
    window = Window(WindowSettings(), STEPS, 3, seed=0)
    assert (window.stored, window.trained, window.start(5), window.solver(solver(), 5)) == (10, 7, 0, None)
    walk, _ = sampled(None)
    assert walk.latents.shape == (11, 2, 3, 1, 1)
    assert walk.start == 0
    assert torch.equal(walk.image, walk.latents[-1])


# ── what a rollout is ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("start", "size", "tail"), [(0, 4, 3), (2, 3, 2), (6, 4, None), (0, 1, 4)])
def test_a_rollout_is_stochastic_inside_and_follows_the_ode_outside(start: int, size: int, tail: int | None) -> None:
    window = WindowedSolver(solver(), start, size, tail)
    walk, backbone = sampled(window)
    steps, stop = solver(), start + size
    alphas = [*steps.schedule.alphas.tolist(), steps.schedule.alphas_next[-1].item()]
    noise = ImageNoise([1, 2])
    latents = noise((3, 1, 1)).double()

    def predicted(at: int, x: Tensor) -> tuple[Tensor, Tensor]:
        shift = backbone.shifts["a"][steps.timesteps[at]]
        epsilon = backbone.base_epsilon(x, torch.tensor(alphas[at], dtype=torch.float64)) + shift
        return (x - (1 - alphas[at]) ** 0.5 * epsilon) / alphas[at] ** 0.5, epsilon

    def log_ratio(at: int) -> float:
        return 0.5 * float(torch.tensor(alphas[at] / (1 - alphas[at]), dtype=torch.float64).log())

    taken, before = [*range(stop), *window.indices[stop:], STEPS], None
    for at, to in pairwise(taken):
        original, epsilon = predicted(at, latents)
        if start <= at < stop:
            std = steps.stds()[at].item()
            assert torch.allclose(walk.latents[at - start].double(), latents, atol=1e-5)
            latents = alphas[to] ** 0.5 * original + (1 - alphas[to] - std**2) ** 0.5 * epsilon
            latents, before = latents + std * noise((3, 1, 1)).double(), None
            continue
        data_ = original
        if before is not None and to != STEPS:
            ratio = (log_ratio(at) - log_ratio(before[1])) / (log_ratio(to) - log_ratio(at))
            data_ = (1 + 1 / (2 * ratio)) * original - before[0] / (2 * ratio)
        before = original, at
        kept = ((1 - alphas[to]) / (1 - alphas[at])) ** 0.5
        latents = kept * latents + (alphas[to] ** 0.5 - alphas[at] ** 0.5 * kept) * data_
    assert walk.image.shape == (2, 3, 1, 1)
    # 1e-4: float32 against float64
    assert torch.allclose(walk.image.detach().double(), latents, atol=1e-4)
    assert (walk.start, len(walk.latents), len(walk.log_probs)) == (start, size + 1, size)


def test_the_stored_steps_are_the_density_of_the_window() -> None:
    window = WindowedSolver(solver(), 2, 3, 2)
    walk, backbone = sampled(window)
    for offset in range(3):
        at = torch.full((2,), 2 + offset)
        predicted = backbone.denoise(
            walk.latents[offset], solver().timesteps[at], backbone.encode(["", ""]), gates=torch.ones(2, 1)
        )
        step = solver().gaussian(predicted, walk.latents[offset], at)
        torch.testing.assert_close(gaussian_log_prob(step, walk.latents[offset + 1]), walk.log_probs[offset])


def test_a_solver_with_a_window_starts_every_run_anew() -> None:
    window = WindowedSolver(solver(), 2, 3, 3)
    first, second = sampled(window)[0], sampled(window)[0]
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.latents, second.latents)


def test_a_step_without_noise_outside_the_window_does_no_harm() -> None:
    whole = solver(set_alpha_to_one=True)
    assert whole.stds()[-1] == 0
    assert sampled(WindowedSolver(whole, 0, 9, 1))[0].image.isfinite().all()
    with pytest.raises(ValueError, match="step 9 adds no noise"):
        sampled(WindowedSolver(whole, 1, 9))


def test_parts_of_a_rollout_make_one() -> None:
    walk = sampled(WindowedSolver(solver(), 2, 3, 2))[0]
    parts = [walk.of(torch.tensor([row])) for row in (0, 1)]
    joined = Trajectory.joined(parts)
    assert joined.start == 2
    for one, other in zip(joined[:2], walk[:2], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(joined.image, walk.image)
    assert torch.equal(walk.of(torch.tensor([False, True])).image, walk.image[1:])


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_transitions_know_their_step_in_the_schedule() -> None:
    buffer = ReplayBuffer(4, 3, (3, 1, 1))
    walk = sampled(WindowedSolver(solver(), 2, 3, 2))[0]
    for start in (2, 5):
        buffer.add(walk._replace(start=start), torch.arange(2), *(torch.zeros(2) for _ in range(3)))
    got = buffer.transitions(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 2]), "cpu")
    assert got.step_index.tolist() == [2, 4, 6, 7]
    assert torch.equal(got.latents[2], walk.latents[1, 0])
    state = buffer.state_dict()
    other = ReplayBuffer(4, 3, (3, 1, 1))
    other.load_state_dict(state)
    assert torch.equal(other.starts, buffer.starts)
    del state["starts"]  # of before there were windows
    old = ReplayBuffer(4, 3, (3, 1, 1))
    old.load_state_dict(state)
    assert old.starts.tolist() == [0] * 4
    buffer.take_back()
    assert buffer.starts[:2].tolist() == [2, 2]


def windowed_optimum(backbone: GaussianBackbone, window: WindowedSolver, slope: float, alpha: float) -> float:
    """Shift of the mean x₀ at the optimum of eq. (4) over the window's steps: slope/α Σ c_t² σ_t².

    c_t = dx₀/dμ_t goes through the window's later steps and the deterministic ones, all linear in x here.
    """
    steps = window.solver
    assert isinstance(steps, DDIMSolver)
    a = [*steps.schedule.alphas.tolist(), steps.schedule.alphas_next[-1].item()]
    stds, stop, last = steps.stds().tolist(), window.start + window.size, len(a) - 1

    def slopes(at: int) -> tuple[float, float]:
        """dx̂₀/dx and dε/dx of the exact denoiser."""
        epsilon = (1 - a[at]) ** 0.5 / (a[at] * backbone.std**2 + 1 - a[at])
        return (1 - (1 - a[at]) ** 0.5 * epsilon) / a[at] ** 0.5, epsilon

    def half_log_snr(at: int) -> float:
        return 0.5 * float(torch.tensor(a[at] / (1 - a[at]), dtype=torch.float64).log())

    def tail_gain() -> float:
        x, before = 1.0, None
        for at, to in zip(window.indices[stop:], [*window.indices[stop + 1 :], last], strict=True):
            original = estimate = slopes(at)[0] * x
            if before is not None and to != last:
                ratio = (half_log_snr(at) - half_log_snr(before[1])) / (half_log_snr(to) - half_log_snr(at))
                estimate = original + (original - before[0]) / (2 * ratio)
            before = original, at
            kept = ((1 - a[to]) / (1 - a[at])) ** 0.5
            x = kept * x + (a[to] ** 0.5 - a[at] ** 0.5 * kept) * estimate
        return x

    total, gain = 0.0, tail_gain()
    for at in reversed(range(window.start, stop)):
        total += gain**2 * stds[at] ** 2
        data, epsilon = slopes(at)
        gain *= a[at + 1] ** 0.5 * data + (1 - a[at + 1] - stds[at] ** 2) ** 0.5 * epsilon
    return slope / alpha * total


@pytest.mark.parametrize(("alpha", "start"), [pytest.param(1.0, 0, marks=pytest.mark.slow), (0.4, 1)])
def test_the_policy_gradient_reaches_the_optimum_of_the_windowed_process(
    tmp_path: Path, alpha: float, start: int
) -> None:
    slope, rollouts, batch = 0.5, 150, 256
    backbone = GaussianBackbone(1)
    settings: dict[str, Any] = dict(
        num_inference_steps=8, guidance_scale=1.0, clip_range=0.5, kl_weight=alpha, advantage="prompt",
        learning_rate=0.02, policy_steps=1, policy_batch_size=3 * batch, clip_grad_norm=100.0, buffer_size=None,
        gradient_accumulation=1, statistics_window=4096, window={"size": 3, "first": start, "tail_steps": 3},
    )  # fmt: skip
    trained = RewardRLModule(backbone, LinearReward(slope), **settings)
    shifts: list[Tensor] = []
    kl: list[float] = []

    class Average(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            shifts.append(backbone.shifts[trained.adapter_name].detach().clone())
            kl.append(float(trainer.callback_metrics["train/kl"]))

    trainer(tmp_path, callbacks=[Average()]).fit(
        trained, datamodule=data(tmp_path, batch_size=batch, rollouts_per_epoch=rollouts)
    )
    backbone.shifts[trained.adapter_name].data = torch.stack(shifts[-75:]).mean(0)
    window = trained.window.solver(trained.solver, 0)
    assert window is not None
    assert len(window.indices) == start + 3 + 3
    untrained = torch.ones(100, dtype=torch.bool)
    untrained[window.timesteps[start : start + 3]] = False
    assert not backbone.shifts[trained.adapter_name][untrained].any()
    sampled_ = [
        rollout(
            backbone, backbone.encode(["a"] * 64), trained.solver, blend, ImageNoise(range(64)), 1.0, "gated", window
        ).image
        for blend in (Single(trained.adapter_name), Base())
    ]
    moved = sampled_[0] - sampled_[1]
    expected = windowed_optimum(backbone, window, slope, alpha)
    # base and adapter share their noise and the shift is the same for all noise
    assert moved.std() < 1e-4
    # 5 %: what is left of the policy gradient's noise after averaging
    assert moved.mean().item() == pytest.approx(expected, rel=0.05)
    # Σ d_t²/(2σ_t²) = slope²/(2α²) Σ c_t² σ_t²; 15 %: of iterates that still move
    assert torch.tensor(kl[-75:]).mean().item() == pytest.approx(slope * expected / (2 * alpha), rel=0.15)


# ── a run with a window and an average ───────────────────────────────────────────────────────────────────────────────

SETTINGS: dict[str, Any] = {
    "buffer_size": 24, "optimisation": {"ema": 0.8},
    "window": {"size": 2, "position": "random", "tail_steps": 1},
}  # fmt: skip
RUN: dict[str, Any] = {"epochs": 2, "rollouts_per_epoch": 3, "validate": 3, "settings": SETTINGS}


def test_a_run_with_a_window_and_an_average_resumes_to_the_last_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "run", **RUN)
    for folder, position in (("random", "random"), ("sliding", "sliding")):
        settings = SETTINGS | {"window": SETTINGS["window"] | {"position": position, "every": 2}}
        expected = whole if position == "random" else run(tmp_path / "s", "run", **(RUN | {"settings": settings}))
        run(tmp_path / folder, "run", **(RUN | {"epochs": 1, "settings": settings}))
        resumed = run(tmp_path / folder, "run", **(RUN | {"settings": settings}), resume=True)
        launching.assert_same_end(resumed, expected)
        assert len(expected["replay"]["starts"].unique()) > 1
    assert any(name.startswith("ema.") for name in whole["trained"])


def test_two_ranks_train_with_a_window_and_an_average_what_one_process_does(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    assert launching.finish(tmp_path / "two", [{"name": "run", **RUN}], processes=2) == [0, 0]
    first, second = (launching.ended(tmp_path / "two", "run", rank) for rank in (0, 1))
    twice = {"policy_batch_size": 8, "value_batch_size": 16, "buffer_size": 48}
    alone = run(tmp_path / "one", "run", **(RUN | {"settings": SETTINGS | twice, "batch_size": 8}))
    launching.assert_equal(first["trained"], second["trained"])
    assert torch.equal(first["replay"]["starts"], second["replay"]["starts"])
    for key, tensor in alone["trained"].items():
        # 1e-6: float32; the two sum the same gradients in another order
        torch.testing.assert_close(first["trained"][key], tensor, rtol=1e-5, atol=1e-6)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (
            {"size": 0},
            r"window.size 0 leaves no stochastic step, .*; set it to 1 or more",
        ),
        ({"size": -1}, r"window.size must be a whole number >= 0 or null, got -1"),
        ({"size": 5}, r"window.size must be at most the 4 trainable of 4 steps, got 5"),
        ({"size": 2, "first": 3}, r"may begin at step 0 to 2 of 4 \(0 skipped at the end\), got window.first 3"),
        ({"size": 2, "first": 2, "last": 1}, r"may begin at step 0 to 2"),
        ({"size": 2, "last": 3}, r"window.last 3"),
        ({"tail_steps": 2}, r"window.tail_steps needs a window.size, got null"),
        ({"size": 2, "every": 0}, r"window.every must be a whole number >= 1"),
        ({"size": 2, "tail_steps": 0}, r"window.tail_steps must be a whole number >= 1 or null"),
        ({"sise": 2}, r"WindowSettings has no setting 'sise'"),
        ({"size": 2, "position": "here"}, r"window.position must be fixed, random or sliding, got 'here'"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(window: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(window=window)


def test_steps_that_are_skipped_bound_the_window() -> None:
    assert list(WindowSettings(size=2).starts(4, 1)) == [0, 1]
    with pytest.raises(ValueError, match=r"at most the 1 trainable of 4 steps, got 2"):
        module(window={"size": 2}, skip_last_steps=3)


def test_an_objective_that_trains_on_samples_has_no_window() -> None:
    with pytest.raises(ValueError, match="its own steps alone; leave window.size out, or set it to 0.*got 2"):
        Window(WindowSettings(size=2), STEPS, 0, 0, "samples")
