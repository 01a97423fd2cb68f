"""Preprocessing against the libraries that published scores were computed with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as torchvision

from dblightning.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    from_uint8,
    long_side_pad,
    map_threads,
    normalize,
    quantise,
    short_side_crop,
    tf1_resize_crop,
    to_uint8,
)
from tests.rewards.image_reward_cases import SIZES
from tests.rewards.tiny import pictures

#: with odd margins on either side, where roundings differ
SHAPES = [*SIZES, (299, 225), (64, 31)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_crop_is_torchvisions_transform_of_a_pillow_image(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    transform = Compose(
        [Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    )
    expected = torch.stack([transform(Image.fromarray(array)) for array in to_uint8(images)])
    ours = normalize(short_side_crop(images, 224, exact=True), CLIP_MEAN, CLIP_STD)
    # one 8-bit level is 0.015 here: anything but the same bytes fails
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_crop_with_floored_margins_is_transformers_clip_processor(shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    images = pictures(2, *shape)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    expected = processor([Image.fromarray(array) for array in to_uint8(images)], return_tensors="pt").pixel_values
    ours = normalize(short_side_crop(images, 224, exact=True, crop_rounding="floor"), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_differentiable_crop_stays_near_pillows(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape).requires_grad_()
    ours = short_side_crop(images, 224, exact=False)
    difference = (ours - short_side_crop(images, 224, exact=True)).abs() * 255
    # Pillow rounds to 8 bits after each of its two passes: half a level, times 1.25 (the sum of the bicubic weights'
    # sizes) in the second pass, plus another half; its weights are fixed-point numbers besides
    assert difference.max() <= 1.125 + 0.05
    (gradient,) = torch.autograd.grad(ours.sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(512, 512), (300, 200), (200, 333), (224, 224), (40, 31)])
def test_padding_is_torchvisions_resize_and_pad_of_a_tensor(shape: tuple[int, int], antialias: bool) -> None:
    images = pictures(2, *shape)
    scale = 224 / max(shape)
    size = [round(side * scale) for side in shape]
    resized = images
    if tuple(size) != shape:
        resized = torchvision.resize(images, size, InterpolationMode.BICUBIC, antialias=antialias)
    below, beside = 224 - size[0], 224 - size[1]
    expected = torchvision.pad(resized, [beside // 2, below // 2, beside - beside // 2, below - below // 2])
    ours = long_side_pad(images, 224, antialias)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_very_long_image_keeps_at_least_one_row() -> None:
    assert long_side_pad(torch.rand(1, 3, 1, 1000), 224).shape == (1, 3, 224, 224)


def test_tensorflow_1s_resize_of_a_ramp_is_the_ramp_at_scaled_corners() -> None:
    # pixel i of the result lies at i · 40/272 of the source, not at (i + 1/2) · 40/272 − 1/2
    ramp = torch.arange(40.0).expand(1, 3, 30, 40) / 64
    resized = tf1_resize_crop(ramp, 272, 224)
    position = (torch.arange(224) + 24) * 40 / 272
    expected = position.clamp_max(39) / 64  # the last source pixel repeats
    torch.testing.assert_close(resized, expected.expand(1, 3, 224, 224), rtol=0, atol=1e-6)


def test_tensorflow_1s_resize_is_tensorflows() -> None:
    tf = pytest.importorskip("tensorflow")
    images = pictures(2, 97, 301)
    expected = tf.compat.v1.image.resize_bilinear(to_uint8(images), [272, 272]).numpy()[:, 24:248, 24:248] / 255
    ours = tf1_resize_crop(images, 272, 224).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)  # positions are float32 in both


def test_rounding_to_8_bits_is_pillows_and_clips() -> None:
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 1.002 - 0.001
    images[0, 0, 0, :3] = torch.tensor([0.5 / 255, 1.5 / 255, 2.5 / 255])  # halves go to even
    expected = np.clip(np.rint(images.numpy() * np.float32(255)), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(images), expected.transpose(0, 2, 3, 1))
    assert torch.equal(quantise(images), torch.from_numpy(expected).float() / 255)
    assert torch.equal(from_uint8(to_uint8(images)), quantise(images))


def test_threads_keep_the_order() -> None:
    assert map_threads(lambda item: item * item, list(range(50)), num_threads=4) == [item * item for item in range(50)]
