"""JPEG compressibility: the smaller the file, the higher the reward. No weights, no gradient."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dblightning.rewards.base import RewardMetric
from dblightning.rewards.preprocess import map_images

#: JPEG chroma subsampling → Pillow's argument of the same meaning
_SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


class JPEGCompressibility(RewardMetric):
    """r = (offset_kb − kB) / scale_kb, with kB = bytes / 1000 of the JPEG that Pillow writes.

    ``offset_kb=0, scale_kb=1`` is DDPO's reward (Black et al. 2023: the negative size in kB at quality 95). The
    Diffusion Blend paper prints positive rewards, so it shifts and scales; its constants are not published. The
    defaults, 4 (1 − kB/200) − 2, were inferred from the printed means and hold for 512×512 images only.

    Args:
        quality: Pillow's JPEG quality, 1 to 100.
        offset_kb: size whose reward is 0, in kB.
        scale_kb: kB per unit of reward, > 0.
        subsampling: "4:4:4", "4:2:2" or "4:2:0" (Pillow's default).
        num_threads: images encoded at a time; Pillow releases the GIL. None: one per core.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ValueError: an argument outside its range.
    """

    is_differentiable = False
    needs_prompt = False

    def __init__(
        self,
        quality: int = 95,
        offset_kb: float = 100.0,
        scale_kb: float = 50.0,
        subsampling: str = "4:2:0",
        num_threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be between 1 and 100, got {quality}")
        if not scale_kb > 0:
            raise ValueError(f"scale_kb must be > 0, got {scale_kb}; smaller files always score higher here")
        if subsampling not in _SUBSAMPLING:
            raise ValueError(f"subsampling must be one of {list(_SUBSAMPLING)}, got {subsampling!r}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be >= 1 or None, got {num_threads}")
        self.quality = quality
        self.offset_kb = offset_kb
        self.scale_kb = scale_kb
        self.subsampling = subsampling
        self.num_threads = num_threads
        self.value_range = (None, offset_kb / scale_kb)
        # only the default constants are tied to 512×512
        self._warn_about_size = (quality, offset_kb, scale_kb, subsampling) == (95, 100.0, 50.0, "4:2:0")

    def kilobytes(self, images: Tensor) -> Tensor:
        """Size of each image as a JPEG file, in kB (1000 bytes): float32 (B,) on the images' device.

        Args:
            images: float tensor (B, 3, H, W) in [0, 1].
        """
        sizes = map_images(self._encoded_bytes, images, self.num_threads)
        return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000

    def _encoded_bytes(self, array: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(array).save(
            buffer, format="JPEG", quality=self.quality, subsampling=_SUBSAMPLING[self.subsampling]
        )
        return buffer.tell()

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = images.shape[-2:]
        if self._warn_about_size and (height, width) != (512, 512):
            self._warn_about_size = False
            warnings.warn(
                f"JPEGCompressibility's default constants are for 512x512 images, got {height}x{width}: "
                "set offset_kb to the size in kB that should score 0, and scale_kb to the kB per unit of reward",
                stacklevel=3,
            )
        return (self.offset_kb - self.kilobytes(images)) / self.scale_kb
