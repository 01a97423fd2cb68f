"""Weight files: finding them, reading them, and renaming their keys to those of the modules that run them.

A key map is a list of (pattern, replacement) pairs; a key takes the first pattern that matches all of it. Loading is
strict: a key that no pattern matches, that is missing or that has another shape is an error that names it. A wrong
file never scores silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KeyMap = Sequence[tuple[str, str]]

#: ``ImageReward.pt`` → transformers' BLIP towers and the linear head
IMAGE_REWARD_KEYS: KeyMap = [
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(.+)", r"vision.encoder.layers.\1.mlp.\2.\3"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
    (r"blip\.(?:vision_proj|text_proj)\..+", ""),  # contrastive heads, unused by the reward
    (r"blip\.text_encoder\.embeddings\.position_ids", ""),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"mlp\.layers\.(\d)\.(.+)", r"head.layers.\1.\2"),
]

#: transformers' ``CLIPModel`` → ``open_clip.CLIP``; the fused attention weights are joined by ``open_clip_state``
HUGGINGFACE_CLIP_KEYS: KeyMap = [
    (r"(?:text|vision)_model\.embeddings\.position_ids", ""),
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(.+)", r"ln_final.\1"),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.(.+)", r"visual.ln_pre.\1"),
    (r"vision_model\.post_layernorm\.(.+)", r"visual.ln_post.\1"),
    (r"visual_projection\.weight", "visual.proj"),
    (r"logit_scale", "logit_scale"),
    (r"text_model\.encoder\.layers\.(.+)", r"transformer.resblocks.\1"),
    (r"vision_model\.encoder\.layers\.(.+)", r"visual.transformer.resblocks.\1"),
]
_HUGGINGFACE_CLIP_LAYER_KEYS: KeyMap = [
    (r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"\1.attn.in_proj_\3/\2"),
    (r"(.+)\.self_attn\.out_proj\.(.+)", r"\1.attn.out_proj.\2"),
    (r"(.+)\.layer_norm([12])\.(.+)", r"\1.ln_\2.\3"),
    (r"(.+)\.mlp\.fc1\.(.+)", r"\1.mlp.c_fc.\2"),
    (r"(.+)\.mlp\.fc2\.(.+)", r"\1.mlp.c_proj.\2"),
]


def find_file(weights: str | Path | None, names: Sequence[str], default_repo: str | None, purpose: str) -> Path:
    """The weight file to read.

    Args:
        weights: a file, a folder that holds one of ``names``, a hub id ("owner/name"), or None for ``default_repo``.
        names: acceptable file names, best first.
        default_repo: hub id to fetch from; None where nothing is published on the hub.
        purpose: what the file is for, for the error text.

    Raises:
        FileNotFoundError: neither the disk nor the hub gives it; the text names the file and where it goes.
    """
    wanted = " or ".join(names)
    if weights is not None:
        path = Path(weights).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            for name in names:
                if (path / name).is_file():
                    return path / name
            raise FileNotFoundError(f"{purpose}: the folder {path} holds no {wanted}; put the file there")
    repo = str(weights) if weights is not None else default_repo
    if repo is None:
        raise FileNotFoundError(f"{purpose}: pass weights=, the path of {wanted}; docs/rewards.md says where to get it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{purpose}: {repo} is not a file, folder or hub id; pass the path of {wanted}")
    return _download(repo, names, purpose)


def _download(repo: str, names: Sequence[str], purpose: str) -> Path:
    from huggingface_hub import hf_hub_download

    failure: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except Exception as error:  # the hub client raises many kinds: offline, no such repository, no such file, …
            failure = error
    raise FileNotFoundError(
        f"{purpose}: could not get {' or '.join(names)} from the hub ({repo}). Without a network, download it "
        f"elsewhere and pass its path, such as weights=/path/to/{names[0]} (the file or its folder)"
    ) from failure


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` or ``torch.save`` file; runs no code from it.

    A dict inside the entry "state_dict" or "model" is taken out; a prefix "module." on every key is cut off.

    Raises:
        ValueError: the file is corrupted, truncated, or holds something else than named tensors.
    """
    size = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} ({size} bytes) cannot be read as a weight file; it is corrupted, truncated or of another kind. "
            f"Download it again and compare its size. Cause: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no dictionary of named tensors; expected a model's state dict")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def rename_keys(state: dict[str, Tensor], key_map: KeyMap, source: str) -> dict[str, Tensor]:
    """``state`` under new keys; a key whose replacement is empty is dropped.

    Raises:
        ValueError: keys that no pattern matches, all listed.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, replacement in key_map:
            if match := re.fullmatch(pattern, key):
                if replacement:
                    renamed[match.expand(replacement)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} unexpected entries, is it another model? {_some(unknown)}")
    return renamed


def open_clip_state(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A CLIP state dict in ``open_clip.CLIP``'s names, from those or from transformers' ``CLIPModel``'s."""
    if "visual_projection.weight" not in state:
        return state
    state = rename_keys(state, HUGGINGFACE_CLIP_KEYS, source)
    layers = {key: value for key, value in state.items() if "resblocks." in key}
    state = {key: value for key, value in state.items() if key not in layers}
    for key in ("text_projection", "visual.proj"):
        if key in state:
            state[key] = state[key].T.contiguous()  # a Linear's weight there, a plain matrix here
    layers = rename_keys(layers, _HUGGINGFACE_CLIP_LAYER_KEYS, source)
    for key, value in layers.items():
        if not key.endswith(("/q", "/k", "/v")):
            state[key] = value
        elif key.endswith("/q"):
            stem = key.removesuffix("/q")
            parts = [layers.get(f"{stem}/{part}") for part in "qkv"]
            if all(part is not None for part in parts):  # a lone one is left out and reported as missing
                state[stem] = torch.cat([part for part in parts if part is not None])
    return state


def require_keys(state: dict[str, Tensor], keys: Iterable[str], source: str) -> None:
    """Refuse a state dict without the entries a model's sizes are read from.

    Raises:
        ValueError: missing entries, all listed.
    """
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{source} lacks {_some(missing)}; it is incomplete, or weights of another model")


def build_and_load(build: Callable[[], nn.Module], state: dict[str, Tensor], source: str) -> nn.Module:
    """Build a module without initialising it and fill it from ``state``, in float32, frozen and in eval mode.

    Args:
        build: makes the module; called under the meta device, so that a billion weights are not drawn at random first.

    Raises:
        ValueError: missing or unexpected entries, or entries of another shape.
    """
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} entries {what}: {_some(keys)}"
        for what, keys in (("are missing", missing), ("are unexpected", unexpected), ("have another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    # contiguous: a transposed view would take another kernel than the same weights read from a file
    module.load_state_dict(
        {key: (value.float() if value.is_floating_point() else value).contiguous() for key, value in state.items()},
        assign=True,
    )
    _fill_buffers(module)
    return module.eval().requires_grad_(False)


def _fill_buffers(module: nn.Module) -> None:
    """Compute the buffers that state dicts leave out, still on the meta device."""
    for path, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, leaf = path.rpartition(".")
        if leaf == "position_ids":
            value = torch.arange(buffer.shape[-1]).expand(buffer.shape)
        elif leaf == "attn_mask":
            value = torch.full(buffer.shape, float("-inf")).triu_(1)
        else:
            raise RuntimeError(f"do not know how to compute the buffer {path} of {type(module).__name__}")
        setattr(module.get_submodule(owner), leaf, value)


def _some(items: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown}, and {len(items) - most} more"
