"""VILA-R's network in torch, its weights from praxis' parameters, and the file they are kept in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dblightning.rewards import _convert

#: attention logits of the encoder and the text tower pass through 50·tanh(x/50)
LOGIT_CAP = 50.0
#: ids of <s>, "good", "image" in VILA's sentence-piece vocabulary
PROMPT_IDS = (1, 391, 11)
#: praxis' LayerNorm
NORM_EPS = 1e-6


class VilaModel(nn.Module):
    """CoCa's image side with VILA-R's residual adapter; the text side is one constant vector.

    Args:
        width: D, 768 published. heads: 12. layers: 12. hidden: of the feed-forward layers, 3072. pooler_hidden: 3072.
        patch_size: 16. image_size: 224.
    """

    def __init__(
        self, width: int, heads: int, layers: int, hidden: int, pooler_hidden: int, patch_size: int, image_size: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.image_size = image_size
        patches = (image_size // patch_size) ** 2
        self.patch_projection = nn.Linear(3 * patch_size**2, width)
        self.positions = nn.Parameter(torch.zeros(patches, width))
        self.layers = nn.ModuleList(Layer(width, heads, hidden, functional.gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.generative_pooler = Pooler(width, heads, pooler_hidden, queries=patches)
        self.contrastive_pooler = Pooler(width, heads, pooler_hidden, queries=1)
        self.residual = nn.Linear(width, width)
        self.good_image = nn.Parameter(torch.zeros(width))

    def forward(self, images: Tensor) -> Tensor:
        """v (B,) of images (B, 3, S, S) in [0, 1]. The gradient flows; the published class stops it at the adapter."""
        size = self.patch_size
        patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, columns, p, q)
        tokens = self.patch_projection(patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        pooled = self.contrastive_pooler(self.generative_pooler(self.norm(tokens)))[:, 0]
        features = pooled + self.residual(pooled)
        wide = torch.promote_types(features.dtype, torch.float32)
        return functional.normalize(features.to(wide), dim=-1) @ self.good_image.to(wide)


class Layer(nn.Module):
    """Pre-norm transformer layer with capped attention logits."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.post = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, tokens: Tensor, causal: bool = False) -> Tensor:
        """(B, N, D) → (B, N, D); ``causal``: each token sees itself and those before it."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(tokens)).chunk(3, dim=-1)
        )
        logits = LOGIT_CAP * torch.tanh(query @ key.mT / math.sqrt(query.shape[-1]) / LOGIT_CAP)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
        tokens = tokens + self.post((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return tokens + self.contract(self.activation(self.expand(self.feed_forward_norm(tokens))))


class Pooler(nn.Module):
    """Attention of learned queries over the tokens; the query scale of praxis is folded into ``queries``."""

    def __init__(self, width: int, heads: int, hidden: int, queries: int) -> None:
        super().__init__()
        #: projected and scaled queries, (heads, queries, hidden / heads): they do not depend on the image
        self.queries = nn.Parameter(torch.zeros(heads, queries, hidden // heads))
        self.key = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.post = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, queries, D)."""
        heads = self.queries.shape[0]
        key, value = (project(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (self.key, self.value))
        query = self.queries.to(key.dtype).expand(len(tokens), -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return self.norm(self.post(pooled.transpose(1, 2).flatten(2)))


# ── praxis' parameters → ours ────────────────────────────────────────────────────────────────────────────────────────


def from_praxis(params: dict[str, np.ndarray]) -> VilaModel:
    """The network from VILA-R's parameters under praxis' names, the fixed prompt's text embedding computed once.

    Args:
        params: "encoder.entry_stack.pos_emb.emb_var", "contrastive_img_pooler.pool_attn.key.w", … → array.

    Raises:
        ValueError: parameters are missing, or of shapes that do not fit together.
    """
    tensors = {name: torch.from_numpy(np.asarray(array, dtype=np.float64)) for name, array in params.items()}
    stack = "encoder.transformers_stack."
    _convert.require_keys(tensors, praxis_names(tensors), "VILA's parameters")
    width, heads, _ = tensors[f"{stack}x_layers_0.self_attention.query.w"].shape
    patch_size = math.isqrt(tensors["encoder.entry_stack.patch_projection.linear.w"].shape[0] // 3)
    side = math.isqrt(tensors["encoder.entry_stack.pos_emb.emb_var"].shape[0])
    state = {
        "patch_projection.weight": tensors["encoder.entry_stack.patch_projection.linear.w"].T,
        "patch_projection.bias": tensors["encoder.entry_stack.patch_projection.bias.b"],
        "positions": tensors["encoder.entry_stack.pos_emb.emb_var"],
        **_norm(tensors, "encoder.exit_stack.ln", "norm"),
        **_pooler(tensors, "generative_img_pooler", "generative_pooler"),
        **_pooler(tensors, "contrastive_img_pooler", "contrastive_pooler"),
        "residual.weight": tensors["residual_ffn.linear.w"].T,
        "residual.bias": tensors["residual_ffn.bias.b"],
        "good_image": _text_embedding(tensors),
    }
    layers = _layer_count(tensors, stack)
    for index in range(layers):
        state.update(_layer(tensors, f"{stack}x_layers_{index}", f"layers.{index}"))
    sizes = {
        "width": width,
        "heads": heads,
        "layers": layers,
        "hidden": tensors[f"{stack}x_layers_0.ff_layer.ffn_layer1.linear.w"].shape[1],
        "pooler_hidden": math.prod(tensors["generative_img_pooler.pool_attn.key.w"].shape[1:]),
        "patch_size": patch_size,
        "image_size": side * patch_size,
    }
    model = _convert.build_and_load(lambda: VilaModel(**sizes), state, "VILA's parameters")
    assert isinstance(model, VilaModel)
    return model


def praxis_names(params: dict[str, Any], layers: int | None = None, text_layers: int | None = None) -> list[str]:
    """Names of every parameter that VILA-R's score depends on; layers are counted in ``params`` unless given."""
    attention = [f"{part}.{leaf}" for part in ("query", "key", "value", "post") for leaf in "wb"]
    linears = [f"ff_layer.ffn_layer{i}.{leaf}" for i in (1, 2) for leaf in ("linear.w", "bias.b")]
    norms = [f"{norm}.{leaf}" for norm in ("layer_norm", "ff_layer.layer_norm") for leaf in ("scale", "bias")]
    layer = [f"self_attention.{name}" for name in attention] + linears + norms
    pooler = [f"pool_attn.{name}" for name in [*attention, "per_dim_scale.per_dim_scale"]]
    pooler += ["pool_attn_ln.scale", "pool_attn_ln.bias", "pooling_attn_query"]
    entry = "encoder.entry_stack."
    names = [entry + "patch_projection.linear.w", entry + "patch_projection.bias.b", entry + "pos_emb.emb_var"]
    names += ["encoder.exit_stack.ln.scale", "encoder.exit_stack.ln.bias", "residual_ffn.linear.w"]
    names += ["residual_ffn.bias.b", "token_emb.emb_var", "cls_emb", "unimodal_ln.scale", "unimodal_ln.bias"]
    names += [f"{side}_img_pooler.{name}" for side in ("generative", "contrastive") for name in pooler]
    for stack, count in (("encoder.transformers_stack.", layers), ("unimodal_transformer.", text_layers)):
        count = _layer_count(params, stack) if count is None else count
        names += [f"{stack}x_layers_{index}.{name}" for index in range(max(1, count)) for name in layer]
    return names


def load_vila(path: Path) -> VilaModel:
    """The network from a file that ``save_vila`` wrote.

    Raises:
        ValueError: damaged, or not written by ``convert-vila``.
    """
    state = _convert.read_state_dict(path)
    needed = ["positions", "patch_projection.weight", "generative_pooler.queries", "layers.0.expand.weight"]
    _convert.require_keys(state, needed, str(path))
    heads, _, head_width = state["generative_pooler.queries"].shape
    patch_size = math.isqrt(state["patch_projection.weight"].shape[1] // 3)
    sizes = {
        "width": state["positions"].shape[1],
        "heads": heads,
        "layers": _layer_count(state, "layers."),
        "hidden": state["layers.0.expand.weight"].shape[0],
        "pooler_hidden": heads * head_width,
        "patch_size": patch_size,
        "image_size": math.isqrt(state["positions"].shape[0]) * patch_size,
    }
    model = _convert.build_and_load(lambda: VilaModel(**sizes), state, str(path))
    assert isinstance(model, VilaModel)
    return model


def save_vila(model: VilaModel, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the network as ``.safetensors``; ``metadata`` says where it came from."""
    from safetensors.torch import save_file

    state = {key: value.float().contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"format": "dblightning-vila-1", **(metadata or {})})


def _layer_count(names: dict[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _norm(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    # praxis stores the deviation of the scale from 1
    return {f"{target}.weight": 1 + tensors[f"{source}.scale"], f"{target}.bias": tensors[f"{source}.bias"]}


def _project(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """A projection to heads, [D, heads, dim], as a Linear's weight."""
    weight, bias = tensors[f"{source}.w"], tensors[f"{source}.b"]
    return {f"{target}.weight": weight.flatten(1).T, f"{target}.bias": bias.flatten()}


def _post(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The projection from heads, stored as [D, heads, dim] too, as a Linear's weight."""
    return {f"{target}.weight": tensors[f"{source}.w"].flatten(1), f"{target}.bias": tensors[f"{source}.b"]}


def _layer(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    attention = f"{source}.self_attention"
    parts = [_project(tensors, f"{attention}.{part}", "qkv") for part in ("query", "key", "value")]
    state = {f"{target}.qkv.{leaf}": torch.cat([part[f"qkv.{leaf}"] for part in parts]) for leaf in ("weight", "bias")}
    state.update(_post(tensors, f"{attention}.post", f"{target}.post"))
    state.update(_norm(tensors, f"{source}.layer_norm", f"{target}.attention_norm"))
    state.update(_norm(tensors, f"{source}.ff_layer.layer_norm", f"{target}.feed_forward_norm"))
    for number, name in ((1, "expand"), (2, "contract")):
        linear = f"{source}.ff_layer.ffn_layer{number}"
        state[f"{target}.{name}.weight"] = tensors[f"{linear}.linear.w"].T
        state[f"{target}.{name}.bias"] = tensors[f"{linear}.bias.b"]
    return state


def _pooler(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    attention = f"{source}.pool_attn"
    queries = torch.einsum("nd,dhk->hnk", tensors[f"{source}.pooling_attn_query"], tensors[f"{attention}.query.w"])
    queries = queries + tensors[f"{attention}.query.b"][:, None]
    # praxis' per-dimension scale: softplus, normalised so that a zero gives 1/sqrt(dim)
    scale = functional.softplus(tensors[f"{attention}.per_dim_scale.per_dim_scale"]) / math.log(2)
    return {
        f"{target}.queries": queries * scale / math.sqrt(queries.shape[-1]),
        **_project(tensors, f"{attention}.key", f"{target}.key"),
        **_project(tensors, f"{attention}.value", f"{target}.value"),
        **_post(tensors, f"{attention}.post", f"{target}.post"),
        **_norm(tensors, f"{source}.pool_attn_ln", f"{target}.norm"),
    }


def _text_embedding(tensors: dict[str, Tensor]) -> Tensor:
    """Unit-length text features of "good image", (D,): causal layers over its tokens and the class token after them."""
    table = tensors["token_emb.emb_var"]
    width = table.shape[1]
    # sinusoids of wavelengths from 2π to 2π·10⁴, sines before cosines
    rates = torch.exp(-torch.arange(width // 2, dtype=table.dtype) * math.log(1e4) / max(1, width // 2 - 1))
    angles = torch.arange(len(PROMPT_IDS), dtype=table.dtype)[:, None] * rates
    words = table[list(PROMPT_IDS)] * math.sqrt(width) + torch.cat([angles.sin(), angles.cos()], dim=1)
    tokens = torch.cat([words, tensors["cls_emb"].reshape(1, width) * math.sqrt(width)])[None]
    stack = "unimodal_transformer."
    heads = tensors[f"{stack}x_layers_0.self_attention.query.w"].shape[1]
    for index in range(_layer_count(tensors, stack)):
        state = _layer(tensors, f"{stack}x_layers_{index}", "layer")
        layer = Layer(width, heads, len(state["layer.expand.bias"]), functional.relu).double()
        layer.load_state_dict({key.removeprefix("layer."): value for key, value in state.items()})
        with torch.no_grad():
            tokens = layer(tokens, causal=True)
    norm = _norm(tensors, "unimodal_ln", "norm")
    last = functional.layer_norm(tokens[0, -1], (width,), norm["norm.weight"], norm["norm.bias"], NORM_EPS)
    return functional.normalize(last, dim=-1)
