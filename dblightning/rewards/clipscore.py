"""CLIPScore (Hessel et al. 2021) with any network that open_clip knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dblightning.rewards.clip import CLIPReward, load_clip, open_clip_library, open_clip_tokenizer
from dblightning.rewards.preprocess import Preprocessing


class CLIPScore(CLIPReward):
    """r = scale · max(cos(image, prompt), 0).

    Args:
        weights: a file or folder in open_clip's or transformers' format, a hub id, or one of open_clip's tags for
            ``architecture`` ("openai", "laion2b_s34b_b79k", …), which open_clip downloads.
        architecture: open_clip's name or configuration of the network.
        scale: 2.5 in the paper (its w); others print 100 · cos.
        clamp: negative cosines count 0, as in the paper. Their gradient is 0 too: turn it off to steer by this score.
        prefix: put before each prompt; the paper uses "A photo depicts " for captions.
        preprocessing: "auto": Pillow as published unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: neither a file nor a tag gives the weights. ValueError: they are another model's or damaged,
            or ``scale`` is not above 0.
    """

    def __init__(
        self,
        weights: str | Path = "openai",
        architecture: str | dict[str, Any] = "ViT-B-32-quickgelu",
        scale: float = 2.5,
        clamp: bool = True,
        prefix: str = "",
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 64,
        **kwargs: Any,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        super().__init__(
            load_tagged(weights, architecture)
            if _is_tag(weights, architecture)
            else load_clip(weights, architecture, "CLIPScore"),
            open_clip_tokenizer(architecture),
            preprocessing=preprocessing,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
        self.scale = scale
        self.clamp = clamp
        self.prefix = prefix
        self.value_range = (0.0 if clamp else -scale, scale)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.cosine(images, [self.prefix + prompt for prompt in prompts])
        return self.scale * (cosine.clamp_min(0) if self.clamp else cosine)


def _is_tag(weights: str | Path, architecture: str | dict[str, Any]) -> bool:
    if isinstance(architecture, dict) or Path(weights).expanduser().exists():
        return False
    return str(weights) in open_clip_library("CLIPScore").list_pretrained_tags_by_model(architecture)


def load_tagged(tag: str | Path, architecture: str | dict[str, Any]) -> Any:
    """open_clip's own network and weights by tag, from its cache or the hub.

    Raises:
        FileNotFoundError: neither gives them.
    """
    open_clip = open_clip_library("CLIPScore")
    try:
        return open_clip.create_model(str(architecture), pretrained=str(tag))
    except Exception as error:
        raise FileNotFoundError(
            f"CLIPScore: could not get {architecture} with weights {tag!r} from open_clip's cache or the hub. Without "
            "a network, download the file elsewhere and pass weights=/path/to/open_clip_model.safetensors"
        ) from error
