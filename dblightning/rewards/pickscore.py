"""PickScore (Kirstain et al. 2023): which image would a person pick for this prompt?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dblightning.rewards.clip import HUGGINGFACE_FILES, OPEN_CLIP_FILES, CLIPReward, huggingface_tokenizer, load_clip
from dblightning.rewards.preprocess import Preprocessing

#: PickScore_v1 is one; its tokenizer and image processor are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
ARCHITECTURE = "ViT-H-14"


class PickScore(CLIPReward):
    """r = exp(logit_scale) · cos(image, prompt) + shift, with CLIP features fine-tuned on people's choices.

    The published number (``shift=0``) is near 20. The Diffusion Blend code shifts it by −19 so that it is of the
    size of the other rewards; that is the default.

    Args:
        weights: folder of ``yuvalkirstain/PickScore_v1`` (``config.json`` and ``model.safetensors``), one weight file,
            or a hub id; None: that hub id.
        tokenizer: folder with CLIP tokenizer files, or hub id; None: built without a network from open_clip's copy.
        shift: added to the published score.
        scale: multiply the cosine with exp(logit_scale), about 100, as published; False leaves the bare cosine.
        preprocessing: "auto": Pillow as published unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: the weights are not there. ValueError: they are another model's, or damaged.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
        shift: float = -19.0,
        scale: bool = True,
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        **kwargs: Any,
    ) -> None:
        names = HUGGINGFACE_FILES + OPEN_CLIP_FILES
        model: Any = load_clip(weights, ARCHITECTURE, "PickScore", names, "yuvalkirstain/PickScore_v1")
        super().__init__(
            model,
            huggingface_tokenizer(tokenizer, model.context_length, model.vocab_size),
            crop_rounding="floor",
            preprocessing=preprocessing,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
        self.shift = shift
        self.scale = scale
        bound = float(self.logit_scale) if scale else 1.0
        self.value_range = (self.shift - bound, self.shift + bound)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.cosine(images, prompts)
        return (self.logit_scale.to(cosine) * cosine if self.scale else cosine) + self.shift
