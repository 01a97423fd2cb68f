from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from dblightning.blending import DBMPA, Base
from dblightning.noise import ImageNoise, image_seed
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.jpeg import JPEGCompressibility
from dblightning.sampling import denoise_loop
from dblightning.schedule import DDIMSchedule
from dblightning.solvers import DDIMSolver, DiffusersSolver, make_solver
from dblightning.steering import RGG, BestOfN, CoDe, make_steering
from tests.conftest import randomize
from tests.toy_rewards import Brightness, Redness

STEPS = 6
GUIDANCE = 2.0
PROMPTS = ["a red circle", "a blue star"]
SHAPE = (4, 8, 8)


class PromptTaste(RewardMetric):
    """Bright pictures for one prompt, dark ones for the other: wrong prompt rows would show."""

    is_differentiable = True

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        sign = torch.tensor([1.0 if prompt == PROMPTS[0] else -1.0 for prompt in prompts])
        return sign * images.flatten(1).mean(1)


def solver_of(backbone: Any, eta: float = 1.0) -> DDIMSolver:
    return make_solver(backbone.scheduler_config, STEPS, eta)


def sample(backbone: Any, steering: Any, blend: Any = None, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    noise = options.pop("noise", None) or ImageNoise(list(range(len(prompts))))
    solver = options.pop("solver", None) or solver_of(backbone)
    with torch.no_grad():
        return denoise_loop(
            backbone,
            backbone.encode(prompts),
            solver,
            blend or Base(),
            noise,
            guidance_scale=GUIDANCE,
            steering=steering,
            prompts=prompts,
            **options,
        )


def rows_run(backbone: Any, steering: Any, **options: Any) -> list[int]:
    """Sizes of the denoiser calls."""
    rows: list[int] = []
    denoise = backbone.denoise
    backbone.denoise = lambda latents, *args, **kwargs: rows.append(len(latents)) or denoise(latents, *args, **kwargs)
    try:
        sample(backbone, steering, **options)
    finally:
        del backbone.denoise
    return rows


# ── CoDe against a slow, serial one written here ─────────────────────────────────────────────────────────────────────


@torch.no_grad()
def serial_code(backbone: Any, reward: Any, candidates: int, block: int, form: str) -> Tensor:
    """One image and one candidate at a time, nothing reused."""
    schedule = DDIMSchedule(backbone.scheduler_config, STEPS)
    finals = []
    for image, prompt in enumerate(PROMPTS):
        text = backbone.encode([prompt])
        generator = torch.Generator().manual_seed(image)

        def predict(x: Tensor, i: int, text: Any = text) -> Tensor:
            return backbone.denoise(x, schedule.timesteps[i : i + 1], text, GUIDANCE)

        def step(x: Tensor, i: int, noise: Tensor, predict: Any = predict) -> Tensor:
            gaussian = schedule.step(predict(x, i), x, i, 1.0)
            return gaussian.mean + gaussian.std * noise

        def score(x: Tensor, i: int, predict: Any = predict, prompt: str = prompt) -> float:
            if i < STEPS:
                alpha = schedule.alphas[i].float()
                x = (x - (1 - alpha).sqrt() * predict(x, i)) / alpha.sqrt()
            return float(reward.score(backbone.decode(x), [prompt]))

        x = torch.randn(1, *SHAPE, generator=generator)
        i = 0
        while i < STEPS:
            length = min(block if form == "block" else 1, STEPS - i)
            if form == "lookahead" and (i % block or i == STEPS - 1):
                x = step(x, i, torch.randn(1, *SHAPE, generator=generator))
                i += 1
                continue
            copies = [x] * candidates
            for each in range(length):
                noises = torch.randn(candidates, *SHAPE, generator=generator)
                copies = [step(copy, i + each, noises[n : n + 1]) for n, copy in enumerate(copies)]
            i += length
            x = max(copies, key=lambda copy: score(copy, i))
        finals.append(x)
    return torch.cat(finals)


@pytest.mark.parametrize("form", ["block", "lookahead"])
@pytest.mark.parametrize("block", [2, 4])
def test_code_is_the_serial_search(backbone: Any, form: str, block: int) -> None:
    reward = PromptTaste()
    expected = serial_code(backbone, reward, 3, block, form)
    got = sample(backbone, CoDe({"taste": reward}, candidates=3, block_size=block, form=form))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # batched float32 against rows of one


@pytest.mark.parametrize("form", ["block", "lookahead"])
def test_a_row_limit_changes_code_in_nothing_but_its_batches(backbone: Any, form: str) -> None:
    def steering() -> CoDe:
        return CoDe({"taste": PromptTaste()}, candidates=3, block_size=2, form=form, score_batch_size=2)

    assert max(rows_run(backbone, steering(), max_rows=4)) <= 4
    assert max(rows_run(backbone, steering())) == 6  # and else all candidates of both images are one batch
    torch.testing.assert_close(
        sample(backbone, steering(), max_rows=4), sample(backbone, steering()), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("form", "rows"), [("block", 1 + (STEPS - 1) * 4), ("lookahead", STEPS + 3 * 3)])
def test_code_computes_no_prediction_twice(backbone: Any, form: str, rows: int) -> None:
    steering = CoDe({"bright": Brightness()}, candidates=4, block_size=2, form=form)
    assert sum(rows_run(backbone, steering, prompts=PROMPTS[:1])) == rows


def test_one_candidate_is_the_plain_trajectory(backbone: Any) -> None:
    for form in ("block", "lookahead"):
        steering = CoDe({"bright": Brightness()}, candidates=1, form=form)
        assert torch.equal(sample(backbone, steering), sample(backbone, None))


def test_blocks_are_scaled_to_the_steps(backbone: Any) -> None:
    code = CoDe({"bright": Brightness()}, block_size=5, reference_steps=50)
    assert [code.block(steps) for steps in (50, 100, 20, 10, 5)] == [5, 10, 2, 1, 1]
    assert CoDe({"bright": Brightness()}, block_size=5).block(20) == 5
    reward = {"taste": PromptTaste()}
    scaled = CoDe(reward, candidates=3, block_size=50 // STEPS * 2, reference_steps=50 // STEPS * STEPS)
    plain = CoDe(reward, candidates=3, block_size=2)
    assert torch.equal(sample(backbone, scaled), sample(backbone, plain))
    with pytest.raises(ValueError, match="reference_steps must be a whole number >= 1"):
        CoDe({"bright": Brightness()}, reference_steps=0)


# ── best of N ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_best_of_n_keeps_the_best_of_independent_images(backbone: Any) -> None:
    """Each candidate made alone, from the noise that its image's generator gives it."""
    reward, count = PromptTaste(), 3
    finals = []
    for image, prompt in enumerate(PROMPTS):
        schedule = DDIMSchedule(backbone.scheduler_config, STEPS)
        text = backbone.encode([prompt])
        key = int(torch.randint(2**62, (), generator=ImageNoise([image]).draws[0]))
        seeds = [image, *(image_seed(key, 0, number, "candidate") for number in range(1, count))]
        made = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(1, *SHAPE, generator=generator)
            for i in range(STEPS):
                with torch.no_grad():
                    gaussian = schedule.step(
                        backbone.denoise(x, schedule.timesteps[i : i + 1], text, GUIDANCE), x, i, 1.0
                    )
                x = gaussian.mean + gaussian.std * torch.randn(1, *SHAPE, generator=generator)
            made.append(x)
        with torch.no_grad():
            finals.append(max(made, key=lambda x: float(reward.score(backbone.decode(x), [prompt]))))
    got = sample(backbone, BestOfN({"taste": reward}, candidates=count))
    torch.testing.assert_close(got, torch.cat(finals), rtol=0, atol=1e-4)  # batched float32 against rows of one


def test_best_of_n_costs_n_times_the_rows_and_one_is_the_plain_trajectory(backbone: Any) -> None:
    assert sum(rows_run(backbone, BestOfN({"bright": Brightness()}, candidates=4), prompts=PROMPTS[:1])) == 4 * STEPS
    assert max(rows_run(backbone, BestOfN({"bright": Brightness()}, candidates=4), max_rows=3)) <= 3
    for eta in (0.0, 1.0):  # no step of it needs noise
        plain = sample(backbone, None, solver=solver_of(backbone, eta))
        one = sample(backbone, BestOfN({"bright": Brightness()}, candidates=1), solver=solver_of(backbone, eta))
        assert torch.equal(one, plain)


def test_best_of_n_is_a_method_by_name_on_any_blend(backbone: Any) -> None:
    steering = make_steering("best-of-n", {"bright": Brightness()}, candidates=3)
    assert isinstance(steering, BestOfN)
    backbone.adapters.add("a", seed=0)
    randomize(backbone.adapters, "a", 0)
    reward, prompts, blend = Brightness(), [PROMPTS[0]] * 8, DBMPA({"a": 1.0})
    with torch.no_grad():
        best, plain = (
            reward.score(backbone.decode(sample(backbone, each, blend, prompts)), prompts) for each in (steering, None)
        )
    assert (best >= plain - 1e-4).all() and (best > plain + 1e-4).any()  # the plain image is among the candidates


@pytest.mark.parametrize("form", ["block", "lookahead"])
def test_more_candidates_score_higher_on_average(backbone: Any, form: str) -> None:
    reward, prompts = Brightness(), [PROMPTS[0]] * 24

    def mean(steering: Any) -> tuple[float, float]:
        with torch.no_grad():
            scores = reward.score(backbone.decode(sample(backbone, steering, prompts=prompts)), prompts)
        return float(scores.mean()), float(scores.std() / len(scores) ** 0.5)

    plain, error = mean(None)
    steered, _ = mean(CoDe({"bright": reward}, candidates=8, block_size=2, form=form))
    assert steered > plain + 2 * error


def test_code_serves_rewards_without_a_gradient_and_per_image_weights(backbone: Any) -> None:
    rewards = {"jpeg": JPEGCompressibility(num_threads=1), "red": Redness()}
    both = sample(backbone, CoDe(rewards, [{"jpeg": 1.0}, {"red": 1.0}], candidates=4, block_size=2))
    second = sample(
        backbone, CoDe({"red": Redness()}, candidates=4, block_size=2), prompts=PROMPTS[1:], noise=ImageNoise([1])
    )
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-4)


def test_code_steers_blends_too(backbone: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        backbone.adapters.add(name, seed=seed)
        randomize(backbone.adapters, name, seed)
    blend = DBMPA([{"a": 0.5, "b": 0.5}, {"a": 1.0}], kl_scale=[1.0, 1.5])
    one = CoDe({"bright": Brightness()}, candidates=1)
    assert torch.equal(sample(backbone, one, blend), sample(backbone, None, blend))
    steered = sample(backbone, CoDe({"taste": PromptTaste()}, candidates=3, block_size=2), blend)
    alone = sample(
        backbone,
        CoDe({"taste": PromptTaste()}, candidates=3, block_size=2),
        DBMPA({"a": 1.0}, kl_scale=1.5),
        prompts=PROMPTS[1:],
        noise=ImageNoise([1]),
    )
    torch.testing.assert_close(steered[1:], alone, rtol=0, atol=1e-4)


def test_a_reward_that_is_nan_never_wins(backbone: Any) -> None:
    class Sick(Brightness):
        def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
            scores = super()._score(images, prompts)
            return torch.where(torch.arange(len(scores)) % 3 == 0, torch.nan, scores)

    healthy = sample(backbone, CoDe({"x": Sick()}, candidates=3, block_size=STEPS), prompts=PROMPTS[:1])
    assert healthy.isfinite().all()


# ── RGG ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def hand_rgg(backbone: Any, rewards: list[Any], weights: list[float], form: str, alpha: float, gamma: float) -> Tensor:
    """The paper's eqs. (12)-(14) with ε held constant, in this file's own words."""
    schedule = DDIMSchedule(backbone.scheduler_config, STEPS)
    text = backbone.encode(PROMPTS)
    noise = ImageNoise([0, 1])
    x = noise(SHAPE)
    for i in range(STEPS):
        with torch.no_grad():
            epsilon = backbone.denoise(x, schedule.timesteps[i].expand(2), text, GUIDANCE)
        a, b = schedule.alphas[i].float(), schedule.alphas_next[i].float()
        variance = (1 - b) / (1 - a) * (1 - a / b)
        total = torch.zeros_like(x)
        for reward, weight in zip(rewards, weights, strict=True):
            point = x.clone().requires_grad_()
            original = (point - (1 - a).sqrt() * epsilon) / a.sqrt()
            reward.score(backbone.decode(original), PROMPTS).sum().backward()
            gradient = point.grad
            if form == "global":
                gradient = torch.stack([each / each.norm() for each in gradient])
            elif form == "pixel":
                gradient = torch.nn.functional.normalize(gradient / alpha, dim=1) * alpha
            total += weight * gradient
        x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        mean = b.sqrt() * x0 + (1 - b - variance).sqrt() * epsilon
        ramp = min((1 + gamma) ** i - 1, 1.0)
        x = mean + variance.sqrt() * noise(SHAPE) + ramp * variance / alpha * total
    return x


@pytest.mark.parametrize("form", ["global", "pixel", "none"])
def test_rgg_is_equation_12(backbone: Any, form: str) -> None:
    rewards = {"bright": Brightness(), "red": Redness()}
    weights = {"bright": 0.3, "red": 0.7}
    expected = hand_rgg(backbone, list(rewards.values()), list(weights.values()), form, 0.05, 0.5)
    got = sample(backbone, RGG(rewards, weights, form, kl_weight=0.05, gamma=0.5))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (got - sample(backbone, None)).abs().max() > 1e-2  # it does steer


def test_the_ramp_is_that_of_the_papers_code() -> None:
    ramp = RGG({"bright": Brightness()}).ramp  # γ = 0.024
    # values computed from the published code's formula
    assert [round(ramp(step), 2) for step in (0, 10, 29, 30, 49)] == [0.0, 0.27, 0.99, 1.0, 1.0]
    assert RGG({"bright": Brightness()}, gamma=None).ramp(0) == 1


def test_the_ramp_is_scaled_to_the_steps() -> None:
    """γ becomes (1 + γ)^(50/T) − 1, so the ramp is the same function of the share of the steps."""
    plain, scaled = RGG({"bright": Brightness()}).ramp, RGG({"bright": Brightness()}, reference_steps=50).ramp
    for steps in (10, 20, 50, 100):
        gamma = 1.024 ** (50 / steps) - 1
        for step in range(steps):
            assert scaled(step, steps) == pytest.approx(min((1 + gamma) ** step - 1, 1.0), abs=1e-12)
    assert [scaled(step, 50) for step in range(50)] == [plain(step, 50) for step in range(50)]
    assert scaled(8, 20) == pytest.approx(plain(20)) and plain(8, 20) == plain(8)


def test_rgg_runs_the_scaled_ramp(backbone: Any) -> None:
    gamma, reference = 0.5, 3 * STEPS
    own = (1 + gamma) ** 3 - 1
    one, other = (
        sample(backbone, RGG({"bright": Brightness()}, kl_weight=0.05, gamma=each, reference_steps=steps))
        for each, steps in ((gamma, reference), (own, None))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # one number by two formulas


def test_normalised_gradients_do_not_depend_on_a_rewards_scale(backbone: Any) -> None:
    for form in ("global", "pixel"):
        small, large = (
            sample(backbone, RGG({"bright": Brightness(scale)}, normalization=form, gamma=None, kl_weight=0.05))
            for scale in (1.0, 100.0)
        )
        torch.testing.assert_close(small, large, rtol=0, atol=1e-3)  # float32 gradients, normalised


def test_the_gradient_through_the_denoiser_is_the_derivative(backbone: Any) -> None:
    """Against a central difference of r(x̂₀(x_t)) along the gradient itself."""
    from dblightning.sampling import Run

    reward = Brightness(100.0)
    solver = solver_of(backbone)
    for through in (True, False):
        steering = RGG({"bright": reward}, normalization="none", through_denoiser=through)
        plan = Base().start([], 2, STEPS)
        run = Run(backbone, backbone.encode(PROMPTS), solver, plan, ImageNoise([0, 1]), GUIDANCE, prompts=PROMPTS)
        steering.start(run)
        x = ImageNoise([0, 1])(SHAPE)
        output, gradient = steering._gradient(run, 4, x)

        def value(point: Tensor, through: bool = through, run: Any = run, output: Tensor = output) -> Tensor:
            with torch.no_grad():
                epsilon = run.predict(point, 4) if through else output
                alpha = solver.schedule.alphas[4].float()
                original = (point - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
                return reward.score(backbone.decode(original), PROMPTS)

        for image in range(2):
            direction = torch.zeros_like(x)
            direction[image] = gradient[image] / gradient[image].norm()
            slope = (value(x + 0.02 * direction) - value(x - 0.02 * direction))[image] / 0.04
            # 2 %: float32 and the second-order term of the central difference
            assert abs(slope / gradient[image].norm() - 1) < 0.02
    # the two differ, or `through_denoiser` would do nothing
    assert (
        sample(backbone, RGG({"x": reward}, gamma=None, kl_weight=0.05))
        - sample(backbone, RGG({"x": reward}, gamma=None, kl_weight=0.05, through_denoiser=True))
    ).abs().max() > 1e-3


@pytest.mark.parametrize("through", [True, False])
def test_rgg_a_few_images_at_a_time_changes_nothing(backbone: Any, through: bool) -> None:
    for seed, name in enumerate(("a", "b")):
        backbone.adapters.add(name, seed=seed)
        randomize(backbone.adapters, name, seed)
    blend = DBMPA([{"a": 1.0}, {"a": 0.5, "b": 0.5}])

    def steering() -> RGG:
        return RGG({"taste": PromptTaste()}, gamma=None, kl_weight=0.05, through_denoiser=through)

    whole = sample(backbone, steering(), blend)
    torch.testing.assert_close(sample(backbone, steering(), blend, max_rows=1), whole, rtol=0, atol=1e-4)


def test_rgg_works_inside_inference_mode(backbone: Any) -> None:
    expected = sample(backbone, RGG({"bright": Brightness()}, gamma=None, through_denoiser=True))
    with torch.inference_mode():
        got = sample(backbone, RGG({"bright": Brightness()}, gamma=None, through_denoiser=True))
    assert torch.equal(got, expected)


def test_rgg_raises_its_reward(backbone: Any) -> None:
    reward = Brightness()
    plain, steered = (
        reward.score(backbone.decode(sample(backbone, each)), PROMPTS)
        for each in (None, RGG({"bright": reward}, normalization="pixel", gamma=None))
    )
    assert (steered > plain).all()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rgg_refuses_a_reward_without_a_gradient_by_name() -> None:
    with pytest.raises(ValueError, match=r"the reward 'small' \(JPEGCompressibility\) has none; use CoDe"):
        RGG({"bright": Brightness(), "small": JPEGCompressibility()}, {"bright": 0.5, "small": 0.5})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda r: CoDe({}), "at least one reward"),
        (lambda r: CoDe({"x": r, "y": r}), "give each a weight"),
        (lambda r: CoDe({"x": r}, candidates=0), "candidates must be a whole number >= 1, got 0"),
        (lambda r: CoDe({"x": r}, block_size=0), "block_size must be a whole number >= 1, got 0"),
        (lambda r: CoDe({"x": r}, form="tree"), "got 'tree'"),
        (lambda r: CoDe({"x": r}, score_batch_size=0), "score_batch_size must be a whole number >= 1 or null, got 0"),
        (lambda r: RGG({"x": r}, normalization="l1"), "got 'l1'"),
        (lambda r: RGG({"x": r}, kl_weight=0), "> 0 and finite, got 0"),
        (lambda r: RGG({"x": r}, gamma=-1), ">= 0 and finite or null, got -1"),
        (lambda r: CoDe({"x": r}, candidates=2.5), "whole number >= 1, got 2.5"),
        (lambda r: CoDe({"x": r}, block_size=math.nan), "whole number >= 1, got nan"),
        (lambda r: CoDe({"x": r}, score_batch_size=True), "whole number >= 1 or null, got True"),
        (lambda r: RGG({"x": r}, kl_weight=math.inf), "kl_weight must be > 0 and finite, got inf"),
        (lambda r: RGG({"x": r}, kl_weight=math.nan), "kl_weight must be > 0 and finite, got nan"),
        (lambda r: RGG({"x": r}, gamma=math.inf), "gamma must be >= 0 and finite or null, got inf"),
        (lambda r: RGG({"x": r}, through_denoiser="yes"), "true or false, got 'yes'"),
        (lambda r: make_steering("das", {"x": r}), "got 'das'"),
        (lambda r: make_steering("code", None), "needs rewards"),
        (lambda r: make_steering("code", {"x": r}, particles=3), "particles"),
    ],
)
def test_wrong_settings_are_refused_with_their_value(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(Brightness())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(weights={"x": 0.5}), "sum to 1"),
        (dict(weights={"y": 1.0}), "weights name 'y', but the rewards are"),
        (dict(weights=[{"x": 1.0}]), "weights for 1 images, but the batch has 2"),
        (dict(eta=0.0), "needs steps with noise, got eta 0"),
        (dict(solver="euler"), "needs DDIM steps"),
        (dict(no_prompts=True), "against 2 prompts, got none"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_the_first_denoiser_call(
    backbone: Any, options: dict[str, Any], says: str
) -> None:
    called: list[int] = []
    backbone.unet.register_forward_pre_hook(lambda *args: called.append(1))
    solver: Any = solver_of(backbone, options.get("eta", 1.0))
    if options.get("solver"):
        solver = DiffusersSolver(EulerDiscreteScheduler.from_config(backbone.scheduler_config), STEPS)
    for kind in (CoDe, RGG):
        steering = kind({"x": Brightness()}, options.get("weights"))
        with pytest.raises(ValueError, match=says):
            denoise_loop(
                backbone,
                backbone.encode(PROMPTS),
                solver,
                Base(),
                ImageNoise([0, 1]),
                steering=steering,
                prompts=None if options.get("no_prompts") else PROMPTS,
            )
    assert not called
