"""The CLIP model behind PickScore, HPSv2.1, the aesthetic score and CLIPScore, run by open_clip.

Reads open_clip's own files and transformers' ``CLIPModel`` folders; the two hold the same network under other names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dblightning.extras import check_extra
from dblightning.rewards import _convert
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    check_preprocessing,
    is_exact,
    long_side_pad,
    normalize,
    one_by_one,
    quantise,
    short_side_crop,
)

#: texts → token ids (B, L)
Tokenizer = Callable[[list[str]], Tensor]

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HUGGINGFACE_FILES = ("model.safetensors", "pytorch_model.bin")


class CLIPReward(RewardMetric):
    """Base of the rewards that compare CLIP features: a subclass writes ``_score`` with the two ``*_features``.

    Args:
        model: the network, see ``load_clip``.
        tokenizer: texts → token ids.
        resize: "crop" (short side to the model's size, centre crop) or "pad" (long side to it, black borders).
        crop_rounding: see ``preprocess.short_side_crop``.
        antialias: for "pad" only.
        preprocessing: "auto": exactly as published unless a gradient is required; "exact"; "tensor".
        micro_batch_size: most images scored at once.
        text_cache: text features kept, by prompt; 0: none.
        kwargs: as of ``torchmetrics.Metric``.
    """

    is_differentiable = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        resize: Literal["crop", "pad"] = "crop",
        crop_rounding: Literal["round", "floor"] = "round",
        antialias: bool = True,
        preprocessing: Preprocessing = "auto",
        micro_batch_size: int | None = 32,
        text_cache: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch_size, **kwargs)
        check_preprocessing(preprocessing)
        self.register_frozen("clip", model)
        self.tokenizer = tokenizer
        self.resize = resize
        self.crop_rounding = crop_rounding
        self.antialias = antialias
        self.preprocessing = preprocessing
        self.text_cache = text_cache
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.mean, self.std = image_statistics(model)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images the network sees."""
        size = self.frozen("clip").visual.image_size
        return int(size[0] if isinstance(size, Sequence) else size)

    @property
    def logit_scale(self) -> Tensor:
        """exp of the network's learned temperature, about 100: scalar."""
        return self.frozen("clip").logit_scale.exp()

    def pixels(self, images: Tensor) -> Tensor:
        """The network's view of images (B, 3, H, W) in [0, 1]: (B, 3, S, S), normalised."""
        weight = next(self.frozen("clip").parameters())
        exact = is_exact(self.preprocessing, images)
        # half precision keeps 11 bits at most: resize and normalise above it
        images = images.to(weight.device, torch.promote_types(images.dtype, torch.float32))
        size = self.image_size
        if self.resize == "pad":
            pixels = one_by_one(
                lambda image: long_side_pad(quantise(image) if exact else image, size, self.antialias), images
            )
        else:
            pixels = short_side_crop(images, size, exact, self.crop_rounding)
        return normalize(pixels, self.mean, self.std).to(weight.dtype)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit-length features (B, D) of images (B, 3, H, W) in [0, 1]; float32 unless the network runs in float64."""
        return _unit(self.frozen("clip").encode_image(self.pixels(images)))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit-length features (B, D) of texts. Each different text is encoded once, and kept for the next batch."""
        device = next(self.frozen("clip").parameters()).device
        # features of an autocast region are of its precision: neither taken from the cache nor put into it
        cache = self._texts if not torch.is_autocast_enabled(device.type) else OrderedDict()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        features = {prompt: cache[prompt] for prompt in prompts if prompt in cache}
        if new:
            encoded = _unit(self.frozen("clip").encode_text(self.tokenizer(new).to(device)))
            features.update(zip(new, encoded, strict=True))
        for prompt, feature in features.items():
            cache[prompt] = feature
            cache.move_to_end(prompt)
        while len(cache) > self.text_cache:
            cache.popitem(last=False)
        return torch.stack([features[prompt] for prompt in prompts])

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of each image's features with its prompt's: (B,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def _weights_changed(self) -> None:
        self._texts.clear()


def open_clip_library(purpose: str = "a reward by CLIP") -> Any:
    """The package open_clip, which imports timm: only where a network is built.

    Raises:
        ImportError: the extra is not installed.
    """
    check_extra(purpose, "open_clip", "clip")
    import open_clip

    return open_clip


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def load_clip(
    weights: str | Path | None,
    architecture: str | dict[str, Any],
    purpose: str,
    names: Sequence[str] = OPEN_CLIP_FILES + HUGGINGFACE_FILES,
    default_repo: str | None = None,
) -> nn.Module:
    """An open_clip network, frozen, in float32.

    Args:
        weights: a file, a folder (open_clip's or transformers'), a hub id, or None for ``default_repo``. A
            ``config.json`` or ``open_clip_config.json`` beside the file takes precedence over ``architecture``.
        architecture: open_clip's name of the network ("ViT-H-14"), or its configuration as a dict.
        purpose: the reward's name, for error texts.

    Raises:
        ImportError: the extra ``clip`` is not installed. FileNotFoundError: no such file. ValueError: it does not hold
            this network's weights.
    """
    open_clip = open_clip_library(purpose)
    path = _convert.find_file(weights, names, default_repo, purpose)
    state = _convert.open_clip_state(_convert.read_state_dict(path), str(path))
    config = _config_beside(path, weights) or _named_config(architecture)
    # written by old versions of both libraries; computed here
    state = {key: value for key, value in state.items() if key not in ("attn_mask", "visual.attn_mask")}
    if _is_plain(config):
        fields = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        quick_gelu = bool(config.get("quick_gelu", False))
        return _convert.build_and_load(lambda: open_clip.CLIP(**fields, quick_gelu=quick_gelu), state, str(path))
    return _load_other(architecture, path)


def open_clip_tokenizer(architecture: str | dict[str, Any] | None = None) -> Tokenizer:
    """open_clip's tokenizer for a network (its text is cleaned by ftfy and lower-cased); needs no file or network."""
    open_clip = open_clip_library()
    if isinstance(architecture, str):
        return open_clip.get_tokenizer(architecture)
    return open_clip.SimpleTokenizer(context_length=77)


def huggingface_tokenizer(
    source: str | Path | None = None, context_length: int = 77, vocabulary_size: int = 49408
) -> Tokenizer:
    """transformers' CLIP tokenizer. It cleans no text: curly quotes and HTML entities differ from open_clip's ids.

    Args:
        source: a folder with tokenizer files or a hub id; None: built from the vocabulary that open_clip ships.
        context_length: tokens kept, start and end included.
        vocabulary_size: of the network; transformers returns an empty tokenizer where it finds no files.

    Raises:
        ValueError: ``source`` gives no tokenizer of that size.
    """
    from transformers import CLIPTokenizer

    if source is not None:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    else:
        ours = open_clip_library().SimpleTokenizer()
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {names.get(token, token): index for token, index in ours.encoder.items()}
        merges = sorted(ours.bpe_ranks, key=lambda pair: ours.bpe_ranks[pair])
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    if len(tokenizer) != vocabulary_size:
        raise ValueError(
            f"the tokenizer from {source or 'open_clip'} knows {len(tokenizer)} tokens, the network {vocabulary_size}; "
            "pass a folder with CLIP's vocab.json and merges.txt, or tokenizer=None"
        )

    def tokenize(texts: list[str]) -> Tensor:
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
        ).input_ids
        return ids

    return tokenize


def image_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations that a network was trained with; CLIP's where it does not say."""
    visual: Any = getattr(model, "visual", None)
    config = getattr(visual, "preprocess_cfg", None) or {}
    mean = getattr(visual, "image_mean", None) or config.get("mean") or CLIP_MEAN
    std = getattr(visual, "image_std", None) or config.get("std") or CLIP_STD
    return tuple(mean), tuple(std)


def _config_beside(path: Path, weights: str | Path | None) -> dict[str, Any] | None:
    """The configuration published with a weight file, in open_clip's form; None where there is none."""
    if path.name not in OPEN_CLIP_FILES + HUGGINGFACE_FILES:
        return None
    name = "open_clip_config.json" if path.name in OPEN_CLIP_FILES else "config.json"
    config_path = path.parent / name
    if weights is not None and not Path(weights).expanduser().exists():
        config_path = _convert.find_file(weights, [name], None, f"configuration of {weights}")
    if not config_path.is_file():
        return None
    config = _convert.read_json(config_path)
    return config.get("model_cfg") if path.name in OPEN_CLIP_FILES else huggingface_config(config, str(config_path))


def huggingface_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """open_clip's configuration of a network from transformers' ``config.json``.

    Raises:
        ValueError: not a CLIP model, or one that open_clip's ``CLIP`` cannot run.
    """
    if config.get("model_type") != "clip":
        raise ValueError(f"{source} describes a {config.get('model_type')!r} model, expected 'clip'")
    from transformers import CLIPConfig

    full = CLIPConfig.from_dict(config)
    vision: Any = full.vision_config
    text: Any = full.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise ValueError(f"{source}: activations {sorted(activations)}; both towers must use gelu, or quick_gelu")
    return {
        "embed_dim": full.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "norm_kwargs": {"eps": text.layer_norm_eps},
        },
    }


def _named_config(architecture: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(architecture, dict):
        return architecture
    config = open_clip_library().get_model_config(architecture)
    if config is None:
        raise ValueError(f"open_clip knows no model {architecture!r}; open_clip.list_models() lists them")
    return config


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether ``open_clip.CLIP`` with its own two transformers runs this; not a timm, ResNet or transformers tower."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    other = config.get("custom_text") or config.get("multimodal_cfg") or "timm_model_name" in vision
    return not other and "hf_model_name" not in text and isinstance(vision["layers"], int)


def _load_other(architecture: str | dict[str, Any], path: Path) -> nn.Module:
    if not isinstance(architecture, str):
        raise ValueError("a network that is not a plain CLIP has to be given by its open_clip name")
    open_clip = open_clip_library()
    model = open_clip.create_model(architecture, pretrained=None)
    try:
        open_clip.load_checkpoint(model, str(path))
    except Exception as error:
        raise ValueError(f"{path} does not hold weights of open_clip's {architecture}: {error}") from error
    return model
