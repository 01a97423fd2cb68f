"""From decoded images to a reward model's pixels: resize, crop, pad, normalise.

Every published score was computed on 8-bit images resized by Pillow, so that is what ``exact=True`` does, byte for
byte. ``exact=False`` stays on the device and carries a gradient; it differs from Pillow by a few 8-bit levels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: how a constructor argument ``preprocessing`` chooses: exact unless a gradient is required, always, or never
Preprocessing = Literal["auto", "exact", "tensor"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_exact(preprocessing: Preprocessing, images: Tensor) -> bool:
    """Whether these images go through Pillow."""
    if preprocessing == "auto":
        return not (torch.is_grad_enabled() and images.requires_grad)
    return preprocessing == "exact"


def check_preprocessing(preprocessing: str) -> None:
    """Refuse a ``preprocessing`` that there is not.

    Raises:
        ValueError: naming it and the three there are.
    """
    if preprocessing not in ("auto", "exact", "tensor"):
        raise ValueError(f"preprocessing must be 'auto', 'exact' or 'tensor', got {preprocessing!r}")


def map_threads(
    function: Callable[[Item], Result], items: Sequence[Item] | np.ndarray, num_threads: int | None = None
) -> list[Result]:
    """``[function(item) for item in items]``, several at a time; for work that releases the GIL, as Pillow does.

    Args:
        num_threads: None means one per core.
    """
    threads = min(num_threads or os.cpu_count() or 1, len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def map_images(
    function: Callable[[np.ndarray], Result], images: Tensor, num_threads: int | None = None
) -> list[Result]:
    """``function`` of each image as 8-bit pixels (H, W, 3), as Pillow takes them; several at a time.

    Args:
        images: float (B, 3, H, W) in [0, 1], on any device.
    """
    images = images.detach()
    if images.device.type != "cpu":
        images = _levels(images).to("cpu", torch.uint8)  # a quarter of the bytes to copy
    planes = images.numpy() if images.dtype in (torch.uint8, torch.float32) else images.float().numpy()
    return map_threads(lambda plane: function(_interleave(plane)), planes, num_threads)


def to_uint8(images: Tensor) -> np.ndarray:
    """8-bit images (B, H, W, 3), as Pillow takes them, from float images (B, 3, H, W) in [0, 1]."""
    return np.stack(map_images(lambda array: array, images))


def one_by_one(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``function(images)``, on the CPU one image at a time: a batch of large images would not fit its caches."""
    if images.device.type != "cpu":
        return function(images)
    return torch.cat([function(image) for image in images.split(1)])


def quantise(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded to 8 bits, as a file would hold them: same shape, float32 at least, no gradient."""
    return _levels(images.detach().to(torch.promote_types(images.dtype, torch.float32))).div_(255)


def from_uint8(arrays: Iterable[np.ndarray]) -> Tensor:
    """Float images (B, 3, H, W) in [0, 1] from 8-bit images (H, W, 3) of one size."""
    return torch.from_numpy(np.stack(list(arrays))).permute(0, 3, 1, 2).float() / 255


def short_side_crop(
    images: Tensor, size: int, exact: bool, crop_rounding: Literal["round", "floor"] = "round"
) -> Tensor:
    """Resize the short side to ``size`` (bicubic, antialiased), then cut the central square out of the long side.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        size: side of the result in pixels.
        exact: by Pillow on 8-bit copies (no gradient), or in torch.
        crop_rounding: where an odd margin goes: "round" as torchvision (halves to even), "floor" as transformers.

    Returns:
        Float (B, 3, size, size) in [0, 1].
    """
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    long = size * long // short  # truncated, as torchvision and transformers do
    new_height, new_width = (size, long) if height <= width else (long, size)
    top, left = (_margin(side - size, crop_rounding) for side in (new_height, new_width))

    def resize_and_crop(array: np.ndarray) -> np.ndarray:
        image = Image.fromarray(array)
        if image.size != (new_width, new_height):
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return np.asarray(image)[top : top + size, left : left + size]

    if exact:
        return from_uint8(map_images(resize_and_crop, images)).to(images.device)
    resized = one_by_one(lambda image: _resize_tensor(image, (new_height, new_width)), images)
    return resized[..., top : top + size, left : left + size]


def long_side_pad(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize the long side to ``size`` (bicubic, in torch), then pad the short side with black to a square.

    HPSv2 resizes tensors, not Pillow images, so there is one path only.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        size: side of the result in pixels.
        antialias: filter before shrinking.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    # at least a pixel: round(0.4) would leave nothing of a very long image
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    if (new_height, new_width) != (height, width):
        images = functional.interpolate(
            images, (new_height, new_width), mode="bicubic", align_corners=False, antialias=antialias
        )
    below, beside = size - new_height, size - new_width
    return functional.pad(images, (beside // 2, beside - beside // 2, below // 2, below - below // 2))


def tf1_resize_crop(images: Tensor, pre_crop_size: int, size: int) -> Tensor:
    """Resize to a square without keeping the aspect ratio, then cut out the centre, as VILA's published code does.

    The resize is TensorFlow 1's bilinear: no antialiasing, corners rather than pixel centres aligned at the origin.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        pre_crop_size: side after the resize, ≥ size.
        size: side of the result in pixels.
    """
    for axis in (-2, -1):
        images = _tf1_lerp(images, pre_crop_size, axis)
    start = (pre_crop_size - size) // 2
    return images[..., start : start + size, start : start + size]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images − mean) / std by channel, in the images' dtype."""
    shape = (-1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _levels(images: Tensor) -> Tensor:
    return images.mul(255).round_().clamp_(0, 255)


def _interleave(plane: np.ndarray) -> np.ndarray:
    """(3, H, W), float in [0, 1] or 8-bit, as 8-bit (H, W, 3). In numpy: torch would start threads within threads."""
    if plane.dtype != np.uint8:
        plane = plane * np.float32(255)
        np.clip(np.rint(plane, out=plane), 0, 255, out=plane)
    pixels = np.empty((*plane.shape[1:], 3), dtype=np.uint8)
    for channel in range(3):
        pixels[..., channel] = plane[channel]
    return pixels


def _margin(excess: int, rounding: str) -> int:
    return round(excess / 2) if rounding == "round" else excess // 2


def _resize_tensor(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize, one axis after the other and clipped after each, since Pillow's 8 bits clip there."""
    for shape in ((images.shape[-2], size[1]), size):
        if images.shape[-2:] != shape:
            resized = functional.interpolate(images, shape, mode="bicubic", align_corners=False, antialias=True)
            images = resized.clamp(0, 1)
    return images


def _tf1_lerp(images: Tensor, size: int, axis: int) -> Tensor:
    length = images.shape[axis]
    # float32 like TensorFlow's kernel: in float64 a position such as 3·(17/3) could floor to another pixel
    position = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
    low = position.floor().long().clamp_max(length - 1)
    high = (low + 1).clamp_max(length - 1)
    weight = (position - low).to(images.dtype)
    if axis == -2:
        weight = weight[:, None]
    return torch.lerp(images.index_select(axis, low), images.index_select(axis, high), weight)
