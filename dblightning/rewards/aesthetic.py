"""LAION's aesthetic predictor v2 (Schuhmann 2022): how pretty is the image, whatever the prompt?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dblightning.extras import check_extra
from dblightning.rewards import _convert
from dblightning.rewards.clip import HUGGINGFACE_FILES, OPEN_CLIP_FILES, CLIPReward, load_clip, open_clip_tokenizer
from dblightning.rewards.linear_head import LinearHead, head_widths
from dblightning.rewards.preprocess import Preprocessing

HEAD_FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")


class AestheticScore(CLIPReward):
    """A linear map of OpenAI CLIP ViT-L/14's unit-length image features, trained on ratings from 1 to 10.

    Args:
        weights: the head, ``sac+logos+ava1-l14-linearMSE.pth``, its folder, or a hub id; None: the copy in
            ``trl-lib/ddpo-aesthetic-predictor``.
        clip_weights: the network before it: a transformers folder or hub id (None: ``openai/clip-vit-large-patch14``),
            or an open_clip file of ViT-L-14-quickgelu.
        architecture: open_clip's name or configuration of that network, for a file without one beside it.
        preprocessing: "auto": Pillow as published unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: weights are not there. ValueError: they are another model's, or damaged.
    """

    needs_prompt = False

    def __init__(
        self,
        weights: str | Path | None = None,
        clip_weights: str | Path | None = None,
        architecture: str | dict[str, Any] = "ViT-L-14-quickgelu",
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        **kwargs: Any,
    ) -> None:
        check_extra("AestheticScore", "open_clip", "clip")
        # the head first: a file of 4 MB tells that something is wrong before one of 1.7 GB is read
        head = load_head(_convert.find_file(weights, HEAD_FILES, "trl-lib/ddpo-aesthetic-predictor", "AestheticScore"))
        names = HUGGINGFACE_FILES + OPEN_CLIP_FILES
        model: Any = load_clip(clip_weights, architecture, "AestheticScore", names, "openai/clip-vit-large-patch14")
        model.transformer = model.token_embedding = nn.Identity()  # the text tower's 0.5 GB are not used
        super().__init__(
            model,
            open_clip_tokenizer(),
            preprocessing=preprocessing,
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
        features = model.visual.output_dim
        if features != head.layers[0].in_features:
            raise ValueError(
                f"the aesthetic head takes {head.layers[0].in_features} features, the CLIP network gives {features}; "
                "the published head belongs to OpenAI's ViT-L/14"
            )
        self.register_frozen("head", head)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.frozen("head")(self.image_features(images))


def load_head(path: Path) -> LinearHead:
    """The aesthetic head from its published file.

    Raises:
        ValueError: the file is damaged or holds another model.
    """
    state = _convert.read_state_dict(path)
    _convert.require_keys(state, ["layers.0.weight", "layers.0.bias"], str(path))
    head = _convert.build_and_load(lambda: LinearHead(head_widths(state, "layers.")), state, str(path))
    assert isinstance(head, LinearHead)
    return head
