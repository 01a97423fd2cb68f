"""Human Preference Score v2.1 (Wu et al. 2023): a held-out preference model, to see hacking of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dblightning.rewards.clip import CLIPReward, load_clip, open_clip_tokenizer
from dblightning.rewards.preprocess import Preprocessing


class HPSv2(CLIPReward):
    """r = cos(image, prompt), about 0.2 to 0.3; comparable between images of one prompt only.

    Images are resized as tensors with the aspect ratio kept, padded with black to a square. The published code ran
    under a torchvision whose tensor resize did not antialias by default; which its printed numbers used is not
    documented, so ``antialias`` is an argument.

    Args:
        weights: ``HPS_v2.1_compressed.pt`` (or v2.0's ``HPS_v2_compressed.pt``), its folder, or a hub id; None:
            ``xswu/HPSv2``.
        architecture: open_clip's name or configuration of the network.
        antialias: filter before shrinking.
        preprocessing: "auto": round to 8 bits as a file would unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: the weights are not there. ValueError: they are another model's, or damaged.
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        weights: str | Path | None = None,
        architecture: str | dict[str, Any] = "ViT-H-14",
        antialias: bool = True,
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        **kwargs: Any,
    ) -> None:
        names = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
        super().__init__(
            load_clip(weights, architecture, "HPSv2", names, "xswu/HPSv2"),
            open_clip_tokenizer(),
            resize="pad",
            antialias=antialias,
            preprocessing=preprocessing,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.cosine(images, prompts)
