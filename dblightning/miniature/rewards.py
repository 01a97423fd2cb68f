"""The miniature's rewards: does the image show what its caption requests, does it look calm and lit, is it small.

They measure the world of ``dblightning.miniature.world`` and nothing else: 32 × 32 images, eight colours, six shapes.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dblightning.miniature import world
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.jpeg import JPEGCompressibility

#: width of a colour's neighbourhood in RGB distance; colours of the world are at least 0.36 apart
COLOR_WIDTH = 0.13
#: RGB distance at which a pixel is as much "none of the colours" as the nearest one
COLOR_REACH = 0.26
#: share of the image at which one colour's area has earned 63 %
AREA_SCALE = 0.06
#: softness of the choice between shapes, in units of intersection over union
SHAPE_TEMPERATURE = 0.04
#: kB of the base model's samples as JPEG of quality 95, mean and standard deviation over the 300 test prompts (guidance
#: 3, 20 steps, eta 1); about 0.6 kB of each is the header
JPEG_MEAN_KB, JPEG_STD_KB = 1.141, 0.090
TEMPLATE_RADII = tuple(np.arange(5.0, 12.0, 0.75).tolist())


@cache
def _templates() -> Tensor:
    """Every shape at every radius, float64 (6 · R, 1, 25, 25), shape-major."""
    bank = [world.coverage(shape, (12.5, 12.5), radius, 25) for shape in world.SHAPES for radius in TEMPLATE_RADII]
    return torch.from_numpy(np.stack(bank)).unsqueeze(1)


def color_masks(images: Tensor) -> Tensor:
    """Share of each of the world's colours in each pixel, soft and smooth in the image.

    A softmax of −d²/2σ² over the eight colours and "none of them", which stands at distance ``COLOR_REACH``.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 8, H, W), in the order of ``world.COLORS``; each in [0, 1], their sum at most 1.
    """
    palette = torch.tensor(list(world.COLORS.values()), dtype=images.dtype, device=images.device)
    squares = (images.unsqueeze(1) - palette.view(1, -1, 3, 1, 1)).square().sum(2)
    none = torch.full_like(squares[:, :1], COLOR_REACH**2)
    return torch.cat([squares, none], 1).div(-2 * COLOR_WIDTH**2).softmax(1)[:, :-1]


def shape_overlaps(masks: Tensor) -> Tensor:
    """Best soft intersection over union of each mask with each shape, over places and sizes.

    IoU(m, T) = Σ mT / (Σ m + Σ T − Σ mT), T slid over the image.

    Args:
        masks: (N, H, W) in [0, 1].

    Returns:
        (N, 6) in [0, 1], in the order of ``world.SHAPES``.
    """
    bank = _templates().to(masks)
    both = F.conv2d(masks.unsqueeze(1), bank, padding=12 - 4)  # a template's centre stays 4 pixels inside the image
    union = masks.sum((1, 2)).view(-1, 1, 1, 1) + bank.sum((1, 2, 3)).view(1, -1, 1, 1) - both
    return (both / union).flatten(2).amax(2).unflatten(1, (len(world.SHAPES), -1)).amax(2)


class ShapeAlignment(RewardMetric):
    """Whether the things a caption requests are there, in their colours and shapes; in [−2, 2], mean over the things.

    For each requested thing let a be the share of the image in its colour, u_s the best overlap (IoU) of that colour's
    mask with shape s, and p = softmax(u / 0.04) at the requested shape. The thing earns

    * smooth (the default): (1 − exp(−a / 0.06)) · (0.75 + 0.25 p). Something in the right colour earns most of it,
      so a policy gradient finds its way; bigger blobs earn more, so watch the strict metric beside it.
    * strict: u · p at the requested shape. For reports: it cannot be raised by a bigger blob.

    Args:
        strict: the strict variant.

    Raises (when scoring):
        ValueError: a prompt outside the world's grammar, or images that are not 32 × 32.
    """

    is_differentiable = True
    value_range = (-2.0, 2.0)

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    @property
    def name(self) -> str:
        return "alignment_strict" if self.strict else "alignment"

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        _check_size(images)
        colors = list(world.COLORS)
        wanted = [
            (row, colors.index(thing.color), world.SHAPES.index(thing.shape), 1 / len(things))
            for row, things in enumerate(map(world.parse, prompts))
            for thing in things
        ]
        rows, color, shape, share = (torch.tensor(column, device=images.device) for column in zip(*wanted, strict=True))
        images = images if images.dtype == torch.float64 else images.float()
        masks = color_masks(images)[rows, color]
        overlaps = shape_overlaps(masks)
        posterior = overlaps.div(SHAPE_TEMPERATURE).softmax(1).gather(1, shape[:, None]).squeeze(1)
        if self.strict:
            earned = overlaps.gather(1, shape[:, None]).squeeze(1) * posterior
        else:
            earned = (1 - torch.exp(-masks.mean((1, 2)) / AREA_SCALE)) * (0.75 + 0.25 * posterior)
        total = torch.zeros(len(prompts), dtype=images.dtype, device=images.device)
        return 4 * total.index_add(0, rows, earned * share.to(images)) - 2


class _PictureReward(RewardMetric):
    """Base class for rewards in [−2, 2] that are blind to the caption; a subclass writes :meth:`_of_pictures`."""

    is_differentiable = True
    value_range = (-2.0, 2.0)
    needs_prompt = False

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        _check_size(images)
        return self._of_pictures(images if images.dtype == torch.float64 else images.float())

    @abstractmethod
    def _of_pictures(self, images: Tensor) -> Tensor:
        """Rewards (B,) of pictures (B, 3, H, W), float32 or float64."""


class ShapeAesthetic(_PictureReward):
    """A calm, warm and softly lit picture; in [−2, 2], blind to the caption.

    4 (0.5 exp(−TV / 0.08) + 0.38 light + 0.12 warmth) − 2, where TV is the mean absolute difference of neighbouring
    pixels, light = sigmoid(15 (mean brightness of the middle − of the rim)), warmth = sigmoid(6 (mean(R) − mean(B))).
    Calm backgrounds cost alignment nothing; small things, blue and black ones and edges do: a mild conflict.
    """

    @property
    def name(self) -> str:
        return "aesthetic"

    def _of_pictures(self, images: Tensor) -> Tensor:
        variation = images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))
        calm = torch.exp(-variation / 2 / 0.08)
        axis = torch.linspace(-1, 1, images.shape[-1], dtype=images.dtype, device=images.device)
        middle = torch.exp(-(axis[:, None].square() + axis[None, :].square()) / 0.5)
        brightness = images.mean(1)
        inside = (brightness * middle).sum((1, 2)) / middle.sum()
        outside = (brightness * (1 - middle)).sum((1, 2)) / (1 - middle).sum()
        light = torch.sigmoid(15 * (inside - outside))
        warmth = torch.sigmoid(6 * (images[:, 0] - images[:, 2]).mean((1, 2)))
        return 4 * (0.5 * calm + 0.38 * light + 0.12 * warmth) - 2


class Vividness(_PictureReward):
    """Strong colours all over the picture; in [−2, 2], blind to the caption.

    4 (1 − exp(−C / 0.4)) − 2, where C is the mean over pixels of max(R, G, B) − min(R, G, B). Grey backgrounds cost it,
    so it pulls against aesthetic's calm, and against compressibility.
    """

    @property
    def name(self) -> str:
        return "vividness"

    def _of_pictures(self, images: Tensor) -> Tensor:
        chroma = (images.amax(1) - images.amin(1)).mean((1, 2))
        return 4 * (1 - torch.exp(-chroma / 0.4)) - 2


class MiniatureCompressibility(JPEGCompressibility):
    """JPEG compressibility under the name the shipped adapter has."""

    @property
    def name(self) -> str:
        return "compressibility"


def compressibility() -> JPEGCompressibility:
    """Size of the image as a JPEG of quality 95, smaller is better: (1.141 − kB) / 0.090.

    The constants are mean and standard deviation over 300 samples of the base model (test prompts, guidance 3, 20
    steps, eta 1), so the base scores 0 ± 1 there.
    """
    return MiniatureCompressibility(quality=95, offset_kb=JPEG_MEAN_KB, scale_kb=JPEG_STD_KB, num_threads=1)


def _check_size(images: Tensor) -> None:
    size = world.IMAGE_SIZE
    if images.shape[-2:] != (size, size):
        raise ValueError(
            f"the miniature's rewards measure {size} × {size} images, got {images.shape[-2]} × {images.shape[-1]}; "
            "use another reward for other models"
        )
