"""ImageReward (Xu et al. 2023), read from its published checkpoint and run on transformers' BLIP towers.

The image-reward package needs transformers below 4.56 and cannot be installed beside a current diffusers; this module
gives its scores without it. ``make parity`` compares the two.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dblightning.rewards import _convert
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.linear_head import LinearHead, head_widths
from dblightning.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    check_preprocessing,
    is_exact,
    normalize,
    short_side_crop,
)

#: the head's output on the authors' validation set
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072
#: tokens kept of a prompt, start and end included
MAX_TOKENS = 35


class ImageReward(RewardMetric):
    """r = (head(BLIP(image, prompt)) − 0.1672) / 1.0333, trained on people's rankings; mostly within −2.5 … 2.

    Args:
        weights: ``ImageReward.pt``, its folder, or a hub id; None: ``THUDM/ImageReward``.
        tokenizer: ``vocab.txt`` of bert-base-uncased, its folder, or a hub id; None: looked for beside the weights,
            then ``google-bert/bert-base-uncased`` from the hub.
        standardize: subtract 0.1672 and divide by 1.0333, as the package does; False gives the head's own output,
            which DAS and the paper's CoDe and RGG baselines use.
        preprocessing: "auto": Pillow as published unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: weights or vocabulary are not there. ValueError: they are another model's, or damaged.
    """

    is_differentiable = True

    def __init__(
        self,
        weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
        standardize: bool = True,
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch_size, **kwargs)
        check_preprocessing(preprocessing)
        path = _convert.find_file(weights, ("ImageReward.pt",), "THUDM/ImageReward", "ImageReward")
        model = load_image_reward(path)
        self.register_frozen("model", model)
        self.tokenizer = load_tokenizer(tokenizer, path.parent)
        rows = model.text.embeddings.word_embeddings.num_embeddings
        if len(self.tokenizer) != rows:
            raise ValueError(
                f"the tokenizer knows {len(self.tokenizer)} tokens, ImageReward's text tower {rows}; "
                "use the vocab.txt of bert-base-uncased"
            )
        self.standardize = standardize
        self.preprocessing = preprocessing

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        model: ImageRewardModel = self.frozen("model")
        weight = model.vision.embeddings.class_embedding
        exact = is_exact(self.preprocessing, images)
        images = images.to(weight.device, torch.promote_types(images.dtype, torch.float32))
        pixels = normalize(short_side_crop(images, model.image_size, exact), CLIP_MEAN, CLIP_STD)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(weight.device)
        raw = model(pixels.to(weight.dtype), tokens.input_ids, tokens.attention_mask)
        return (raw - SCORE_MEAN) / SCORE_STD if self.standardize else raw


class ImageRewardModel(nn.Module):
    """A vision transformer, a text transformer that attends to it, and a linear head.

    Args:
        vision, text: keyword arguments of ``BlipVisionConfig`` and ``BlipTextConfig``.
        head: the head's layers, see ``LinearHead``.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], head: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.image_size = vision["image_size"]
        # 1e-6: timm's LayerNorm, not transformers' default of 1e-5; wrong by 0.1 in the score otherwise
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        # is_decoder gives the layers their cross-attention; the pass below is bidirectional all the same
        self.text = BlipTextModel(
            BlipTextConfig(**text, is_decoder=True, layer_norm_eps=1e-12, hidden_act="gelu"), add_pooling_layer=False
        )
        self.head = LinearHead(head)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's output (B,) of normalised pixels (B, 3, S, S) and token ids (B, L); at least float32."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state[:, 0]
        return self.head(read)


def load_image_reward(path: Path) -> ImageRewardModel:
    """The network in ``ImageReward.pt``, sizes read from the tensors' shapes.

    Raises:
        ValueError: the file is damaged or holds another model; entries that are missing or unexpected are named.
    """
    source = str(path)
    state = _convert.rename_keys(_convert.read_state_dict(path), _convert.IMAGE_REWARD_KEYS, source)
    embeddings = "vision.embeddings."
    words, positions = "text.embeddings.word_embeddings.weight", "text.embeddings.position_embeddings.weight"
    layer = "text.encoder.layer.0."
    needed = [embeddings + "position_embedding", embeddings + "patch_embedding.weight", words, positions]
    needed += ["vision.encoder.layers.0.mlp.fc1.weight", layer + "intermediate.dense.weight"]
    needed += [layer + "crossattention.self.key.weight", "head.layers.0.weight"]
    _convert.require_keys(state, needed, source)
    _, tokens, width = state[embeddings + "position_embedding"].shape
    patch = state[embeddings + "patch_embedding.weight"].shape[-1]
    vocabulary, text_width = state[words].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count_layers(state, "vision.encoder.layers."),
        "num_attention_heads": max(1, width // 64),  # 64 channels a head in both towers
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "encoder_hidden_size": state[layer + "crossattention.self.key.weight"].shape[1],
        "intermediate_size": state[layer + "intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count_layers(state, "text.encoder.layer."),
        "num_attention_heads": max(1, text_width // 64),
        "max_position_embeddings": state[positions].shape[0],
        # token ids play no role in a single pass, but must lie inside a small test vocabulary
        "bos_token_id": 0,
        "sep_token_id": 0,
    }
    head = head_widths(state, "head.layers.")
    model = _convert.build_and_load(lambda: ImageRewardModel(vision, text, head), state, source)
    assert isinstance(model, ImageRewardModel)
    return model


def load_tokenizer(vocabulary: str | Path | None, beside: Path) -> Any:
    """bert-base-uncased's tokenizer with BLIP's two extra tokens.

    Args:
        vocabulary: see ``ImageReward``.
        beside: folder of the weights, searched for ``vocab.txt`` when ``vocabulary`` is None.

    Raises:
        FileNotFoundError: no vocabulary found, and the hub does not give it.
    """
    from transformers import BertTokenizer

    if vocabulary is None and (beside / "vocab.txt").is_file():
        vocabulary = beside
    # read here: offline, transformers' from_pretrained returns a tokenizer of five words without complaint
    path = _convert.find_file(
        vocabulary,
        ["vocab.txt"],
        "google-bert/bert-base-uncased",
        "ImageReward's tokenizer (tokenizer=, or vocab.txt beside ImageReward.pt)",
    )
    words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    # so that a prompt with these words in it is split as in training
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return tokenizer


def _count_layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
