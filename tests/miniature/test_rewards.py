from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dblightning.miniature import world
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment, Vividness, color_masks, compressibility
from dblightning.miniature.world import Thing
from dblightning.rewards.base import RewardMetric

REWARDS = [ShapeAlignment(), ShapeAlignment(strict=True), ShapeAesthetic(), Vividness()]


def _rendered(count: int, seed: int = 0) -> tuple[Tensor, list[tuple[Thing, ...]]]:
    rng = np.random.default_rng(seed)
    things = [world.sample_things(rng) for _ in range(count)]
    return torch.from_numpy(np.stack([world.render(each, rng) for each in things])), things


def _captions(things: list[tuple[Thing, ...]], color_shift: int = 0, shape_shift: int = 0) -> list[str]:
    """Captions of the things with colours or shapes moved on cyclically, so that every one of them is wrong."""
    colors, shapes = list(world.COLORS), world.SHAPES
    return [
        world.caption(
            [
                Thing(
                    colors[(colors.index(thing.color) + color_shift) % len(colors)],
                    shapes[(shapes.index(thing.shape) + shape_shift) % len(shapes)],
                )
                for thing in each
            ]
        )
        for each in things
    ]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_what_was_asked_scores_above_a_wrong_shape_above_a_wrong_colour(strict: bool, shift: int) -> None:
    reward = ShapeAlignment(strict)
    images, things = _rendered(120)
    right = reward.score(images, _captions(things))
    wrong_shape = reward.score(images, _captions(things, shape_shift=shift))
    wrong_color = reward.score(images, _captions([each[:1] for each in things], color_shift=shift))
    # a wrong colour of a single thing may be the other thing's of a pair: leave those out
    absent = torch.tensor([len(each) == 1 for each in things])
    assert right.mean() > wrong_shape.mean() + 0.4
    assert (right > wrong_shape).float().mean() > 0.95
    assert wrong_shape[absent].mean() > wrong_color[absent].mean()


def test_one_of_two_asked_things_earns_half() -> None:
    image = torch.from_numpy(world.render([Thing("red", "square")], np.random.default_rng(0), "plain")).unsqueeze(0)
    alone = ShapeAlignment().score(image, ["A red colored square."])
    beside = ShapeAlignment().score(image, ["A red square and a blue circle."])
    # scores run from -2: (alone + 2) / 2 - 2; the plain background still holds a trace (1e-3) of blue
    torch.testing.assert_close(beside, (alone + 2) / 2 - 2, atol=0.02, rtol=0)


def test_smooth_alignment_is_its_formula_on_a_flat_image_of_the_asked_colour() -> None:
    image = torch.tensor(world.COLORS["red"]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    mask = color_masks(image)[0, 0, 0, 0].item()
    area = 1 - np.exp(-mask / 0.06)
    assert 4 * area * 0.75 - 2 <= ShapeAlignment().score(image, ["A red colored star."]).item() <= 4 * area - 2
    # the largest square template covers 18.2² of 1024 pixels: its IoU caps the strict reward
    assert ShapeAlignment(strict=True).score(image, ["A red colored square."]).item() < 4 * 18.2**2 / 1024 - 2


def test_colour_masks_share_each_pixel() -> None:
    palette = torch.tensor(list(world.COLORS.values())).T.reshape(1, 3, 8, 1)
    masks = color_masks(palette)[0, :, :, 0]
    assert (masks.diagonal() > 0.8).all()
    assert (masks.sum(0) <= 1 + 1e-6).all()  # float32 rounding of a softmax


@pytest.mark.parametrize("reward", [*REWARDS, compressibility()], ids=lambda reward: reward.name)
def test_a_batch_scores_as_its_images_one_by_one(reward: RewardMetric) -> None:
    images, things = _rendered(7, seed=2)
    prompts = _captions(things)
    together = reward.score(images, prompts)
    single = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    # float32 convolutions of another batch size sum in another order
    torch.testing.assert_close(together, single, atol=2e-5, rtol=0)
    assert together.dtype == torch.float32 and together.shape == (7,)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
def test_scores_stay_in_their_range(reward: RewardMetric) -> None:
    images, things = _rendered(20, seed=3)
    images = torch.cat([images, torch.rand(4, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])
    scores = reward.score(images, _captions(things) + ["A black colored circle."] * 6)
    low, high = reward.value_range
    assert low is not None and high is not None
    assert low <= scores.min() and scores.max() <= high


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
def test_gradients_agree_with_finite_differences(reward: RewardMetric) -> None:
    images, things = _rendered(3, seed=4)
    prompts = _captions(things)
    generator = torch.Generator().manual_seed(0)
    # noise takes flat backgrounds off the kink of |difference| at 0
    images = (0.8 * images.double() + 0.1 + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0.01, 0.99)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward._score(images, prompts).sum(), images)
    assert reward.differentiable
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()
    step = 1e-8
    for seed in range(4):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead = reward._score(images + step * direction, prompts).sum()
            behind = reward._score(images - step * direction, prompts).sum()
        slope = (ahead - behind) / (2 * step)
        # float64 sums of order 1 round by 1e-16 / 1e-8 = 1e-8 per image; a wider step would cross kinks of |difference|
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_painting_everything_red_gains_little_aesthetic_over_grey_and_less_than_a_lit_beige() -> None:
    reward = ShapeAesthetic()
    axis = torch.linspace(-1, 1, 32)
    glow = (1 - 0.3 * (axis[:, None] ** 2 + axis[None] ** 2)).view(1, 1, 32, 32)

    def paint(*rgb: float) -> Tensor:
        return reward.score(torch.tensor(rgb).view(1, 3, 1, 1) * torch.ones(1, 1, 32, 32), [""])

    # 0.12 · 4 times the rise of the warmth sigmoid, at most half: 0.24 of a range of 4
    assert 0 < paint(*world.COLORS["red"]) - paint(0.6, 0.6, 0.6) < 0.24
    assert reward.score(torch.tensor([0.95, 0.8, 0.65]).view(1, 3, 1, 1) * glow, [""]) > paint(*world.COLORS["red"])
    assert reward.score(torch.rand(1, 3, 32, 32), [""]) < paint(0.6, 0.6, 0.6)


def test_compressibility_counts_standard_deviations_below_the_base_models_mean() -> None:
    reward = compressibility()
    images, _ = _rendered(5, seed=6)
    sizes = reward.kilobytes(images)
    torch.testing.assert_close(reward.score(images, [""] * 5), (reward.offset_kb - sizes) / reward.scale_kb)
    assert not reward.differentiable


def test_rewards_have_the_names_of_the_shipped_adapters() -> None:
    names = [reward.name for reward in [*REWARDS, compressibility()]]
    assert names == ["alignment", "alignment_strict", "aesthetic", "vividness", "compressibility"]


def test_images_of_another_size_and_foreign_captions_are_refused() -> None:
    for reward in REWARDS:
        with pytest.raises(ValueError, match="32 × 32"):
            reward.score(torch.rand(1, 3, 64, 64), ["A red colored circle."])
    with pytest.raises(ValueError, match="A photo of a cat"):
        ShapeAlignment().score(torch.rand(1, 3, 32, 32), ["A photo of a cat"])


def test_vividness_is_lowest_for_grey_and_highest_for_pure_colour() -> None:
    grey, half, pure = torch.full((1, 3, 32, 32), 0.6), torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    half[:, 0, :16], pure[:, 0] = 1.0, 1.0
    scores = torch.cat([Vividness().score(image, [""]) for image in (grey, half, pure)])
    expected = [-2.0, 4 * (1 - np.exp(-0.5 / 0.4)) - 2, 4 * (1 - np.exp(-1 / 0.4)) - 2]
    torch.testing.assert_close(scores, torch.tensor(expected), check_dtype=False)
