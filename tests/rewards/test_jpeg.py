"""JPEG compressibility is what Pillow writes, in kilobytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from dblightning.rewards import JPEGCompressibility
from dblightning.rewards.preprocess import to_uint8
from tests.rewards.tiny import pictures


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("quality", [95, 75])
def test_the_size_is_that_of_pillows_file_to_the_byte(tmp_path: Path, quality: int, subsampling: str) -> None:
    images = pictures(3, 128, 96)
    reward = JPEGCompressibility(quality=quality, offset_kb=0, scale_kb=1, subsampling=subsampling)
    sizes = []
    for index, array in enumerate(to_uint8(images)):
        Image.fromarray(array).save(tmp_path / f"{index}.jpg", quality=quality, subsampling=subsampling)
        sizes.append((tmp_path / f"{index}.jpg").stat().st_size)
    assert (reward.score(images, [""] * 3) * -1000).round().long().tolist() == sizes


def test_the_default_is_pillows_file_at_quality_95(tmp_path: Path) -> None:
    image = pictures(1, 512, 512)
    Image.fromarray(to_uint8(image)[0]).save(tmp_path / "image.jpg", quality=95)
    kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
    reward = JPEGCompressibility()
    assert reward.score(image, [""]).item() == pytest.approx((100 - kilobytes) / 50, abs=1e-6)
    # 4 (1 − kB/200) − 2, the way the other rewards are scaled
    assert reward.score(image, [""]).item() == pytest.approx(4 * (1 - kilobytes / 200) - 2, abs=1e-6)


def test_encoding_in_threads_gives_the_serial_sizes_in_order() -> None:
    images = pictures(6, 64, 64)
    serial = JPEGCompressibility(offset_kb=0, num_threads=1).score(images, [""] * 6)
    assert torch.equal(JPEGCompressibility(offset_kb=0, num_threads=4).score(images, [""] * 6), serial)
    assert len(set(serial.tolist())) > 1


def test_a_flat_image_scores_above_noise() -> None:
    images = torch.stack([torch.full((3, 512, 512), 0.5), torch.rand(3, 512, 512)])
    flat, noise = JPEGCompressibility().score(images, ["", ""])
    assert flat > 1.8 > -3 > noise


def test_half_precision_images_of_8_bits_keep_their_size() -> None:
    images = pictures(2, 64, 64)
    reward = JPEGCompressibility(offset_kb=0)
    # 11 bits of mantissa hold 8-bit levels exactly after rounding
    assert torch.equal(reward.score(images.half(), ["", ""]), reward.score(images, ["", ""]))


def test_another_size_than_the_constants_were_made_for_is_said_once() -> None:
    reward = JPEGCompressibility()
    with pytest.warns(UserWarning, match="512x512 images, got 64x64"):
        reward.score(pictures(1, 64, 64), [""])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.score(pictures(1, 64, 64), [""])
        JPEGCompressibility(offset_kb=5.0).score(pictures(1, 64, 64), [""])  # constants of one's own


def test_it_has_no_gradient_and_says_so() -> None:
    reward = JPEGCompressibility(offset_kb=0)
    assert not reward.differentiable
    assert not reward.score(pictures(1).requires_grad_(), [""]).requires_grad


@pytest.mark.parametrize(
    "options", [{"quality": 0}, {"quality": 101}, {"scale_kb": 0.0}, {"subsampling": "4:1:1"}, {"num_threads": 0}]
)
def test_arguments_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        JPEGCompressibility(**options)
