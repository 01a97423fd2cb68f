"""Tiny pipelines of the true classes with random weights, saved by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def _clip_text(tokenizer: Any, width: int, projection: int | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae(channels: tuple[int, int] = (8, 16), groups: int = 4, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=16,
        **settings,
    )


def _flow_vae() -> Any:
    convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    return _vae((4, 4), 1, **convolutions, shift_factor=0.0609, scaling_factor=1.5035)


def _seeded_tokenizer(seed: int) -> Any:
    """The miniature's tokenizer; seeds what is built next."""
    from dblightning.miniature.pretrain import build_tokenizer

    torch.manual_seed(seed)
    return build_tokenizer()


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def save_sd15(folder: Path) -> Path:
    """SD 1.5's classes and block types at reduced width, random weights, saved by diffusers: 16×16 images."""
    from diffusers import UNet2DConditionModel

    from dblightning.miniature.pretrain import build_pipeline

    tokenizer = _seeded_tokenizer(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return _saved(build_pipeline(_vae(), _clip_text(tokenizer, 16, None), unet, tokenizer), folder)


def save_sdxl(folder: Path) -> Path:
    """SDXL's classes at reduced width: two text encoders, added time ids, transformer depth 1 and 2."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    from dblightning.miniature.pretrain import build_scheduler

    tokenizer = _seeded_tokenizer(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip_text(tokenizer, 16, None),
        text_encoder_2=_clip_text(tokenizer, 24, 24),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def _t5(tokenizer: Any, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, **sizes)).eval()


def save_sd3(folder: Path, dual: bool = False) -> Path:
    """SD3's classes at reduced width: 16×16 images. ``dual``: SD3.5's second attention, and saved without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = _seeded_tokenizer(2)
    newer: dict[str, Any] = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if dual else {}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        **newer,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(),
        text_encoder=_clip_text(tokenizer, 16, 16),
        tokenizer=tokenizer,
        text_encoder_2=_clip_text(tokenizer, 24, 24),
        tokenizer_2=tokenizer,
        text_encoder_3=None if dual else _t5(tokenizer, 48),
        tokenizer_3=None if dual else tokenizer,
    )
    return _saved(pipeline, folder)


def save_flux(folder: Path) -> Path:
    """FLUX.1-dev's classes at reduced width: embedded guidance, a shift made for 16 to 256 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = _seeded_tokenizer(3)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
        ),
        vae=_flow_vae(),
        text_encoder=_clip_text(tokenizer, 16, None),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer, 32),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    return _saved(pipeline, folder)
