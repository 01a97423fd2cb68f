"""Module names in kohya's LoRA keys, where every dot is an underscore.

Two spellings are in use: diffusers' (``down_blocks_0_attentions_1_…``; SD 1.5 by sd-scripts, our files) and that of the
original Stable Diffusion code, which counts blocks (``input_blocks_5_1_…``; SDXL by sd-scripts). A1111 and ComfyUI read
both.
"""

from __future__ import annotations

import re

#: name parts that hold an underscore, the longest first
_WORDS = (
    "transformer_blocks", "time_embedding", "text_projection", "add_embedding", "conv_shortcut", "time_emb_proj",
    "class_embedding", "down_blocks", "final_layer_norm", "token_embedding", "position_embedding", "encoder_hid_proj",
    "text_model", "mid_block", "up_blocks", "self_attn", "layer_norm1", "layer_norm2", "linear_1", "linear_2",
    "proj_out", "proj_in", "out_proj", "conv_out", "conv_in", "q_proj", "k_proj", "v_proj", "to_out", "to_q", "to_k",
    "to_v", "cond_proj", "time_proj", "add_k_proj", "add_v_proj", "add_q_proj", "to_add_out",
    "single_transformer_blocks",
    "proj_mlp", "ff_context", "norm1_context", "norm_out", "context_embedder", "x_embedder", "time_text_embed",
    "timestep_embedder", "text_embedder", "guidance_embedder", "pos_embed",
)  # fmt: skip
_TOKEN = re.compile("(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r"|[^_]+)(?=_|$)")
#: the original code's names outside the numbered blocks
_ORIGINAL = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2", "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2", "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.attentions.0", "middle_block_2": "mid_block.resnets.1",
}  # fmt: skip
_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip


def kohya_name(module: str) -> str:
    """A module's name in a key: ``mid_block_attentions_0_proj_in``."""
    return module.replace(".", "_")


def module_name(name: str, layers_per_block: int = 2) -> str:
    """The module of diffusers' denoiser or of a text encoder that a key's name means.

    Args:
        name: without the prefix ``lora_unet_`` or ``lora_te_``.
        layers_per_block: of the denoiser; Stable Diffusion's and SDXL's is 2.

    Raises:
        ValueError: a block that the original code does not have.
    """
    for original, module in _ORIGINAL.items():
        if name == original or name.startswith(original + "_"):
            return _inside(module, name[len(original) + 1 :])
    blocks = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d+)_?(.*)", name)
    if blocks is None:
        return ".".join(_TOKEN.findall(name))
    side, number, part, rest = blocks[1], int(blocks[2]), int(blocks[3]), blocks[4]
    height = layers_per_block + 1
    if rest == "op":
        return f"down_blocks.{number // height - 1}.downsamplers.0.conv"
    block, layer = divmod(number - 1 if side == "input" else number, height)
    where = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if rest == "conv":
        return f"{where}.upsamplers.0.conv"
    if part > 1:
        raise ValueError(f"a LoRA key names block {name!r}, which a Stable Diffusion denoiser does not have")
    return _inside(f"{where}.{'attentions' if part else 'resnets'}.{layer}", rest)


def _inside(module: str, rest: str) -> str:
    if not rest:
        return module
    return f"{module}.{_RESNET.get(rest) or '.'.join(_TOKEN.findall(rest))}"
