"""SD 1.5, SDXL and SD3.5-Medium at full width with random weights, for ``gpu.py``; and tiny ones of the same classes.

The configurations are the published ones. Weights are made on the device in their own precision; nothing is downloaded
and nothing is allocated in float32 first. Text encoders are left out: the embeddings are random, of the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from dblightning.backbone import Conditioning, DiffusersBackbone
from dblightning.miniature import pretrain

#: stabilityai/stable-diffusion-3.5-medium, transformer/config.json
SD35M: dict[str, Any] = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
TINY_SD15: dict[str, Any] = dict(
    sample_size=8, block_out_channels=(8, 8, 8, 8), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
    norm_num_groups=4,
)  # fmt: skip
TINY_SDXL: dict[str, Any] = dict(
    memory.SDXL, sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1, cross_attention_dim=40,
    transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 4, 4), addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8, norm_num_groups=4,
)  # fmt: skip
TINY_SD35M: dict[str, Any] = dict(
    SD35M, sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
    caption_projection_dim=16, pooled_projection_dim=40, pos_embed_max_size=8, dual_attention_layers=(0,),
)  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
)  # fmt: skip
TINY_VAE = dict(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)


@dataclass(frozen=True)
class Size:
    """What differs between full width and tiny."""

    denoiser: dict[str, Any]
    resolution: int  # pixels
    tokens: int  # of the text embedding
    width: int  # of the text embedding
    pooled: int  # width of the pooled embedding


@dataclass(frozen=True)
class Model:
    """A published architecture."""

    title: str
    pipeline: str  # diffusers' class
    full: Size
    tiny: Size
    vae: dict[str, Any]
    #: of one denoiser row at full width, TFLOP; counted by torch's FlopCounterMode, a product and a sum as two
    tflop: float
    parameters: int  # of the denoiser
    guidance_scale: float
    eta: float = 1.0


MODELS = {
    "sd15": Model(
        "SD 1.5", "StableDiffusionPipeline", Size(memory.SD15, 512, 77, 768, 768), Size(TINY_SD15, 64, 7, 16, 16),
        dict(latent_channels=4, scaling_factor=0.18215), 0.803, 859_520_964, 7.5,
    ),
    "sdxl": Model(
        "SDXL", "StableDiffusionXLPipeline", Size(memory.SDXL, 1024, 77, 2048, 1280), Size(TINY_SDXL, 64, 7, 40, 24),
        dict(latent_channels=4, scaling_factor=0.13025, force_upcast=True), 6.761, 2_567_463_684, 5.0,
    ),
    "sd35m": Model(
        # 77 tokens of CLIP and 256 of T5
        "SD3.5-Medium", "StableDiffusion3Pipeline", Size(SD35M, 1024, 77 + 256, 4096, 2048),
        Size(TINY_SD35M, 64, 9, 48, 40),
        dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
             use_post_quant_conv=False),
        11.250, 2_243_171_520, 4.5, eta=0.8,
    ),
}  # fmt: skip


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """Modules made inside have their weights in this precision on this device from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def denoiser_of(name: str, tiny: bool = False) -> Any:
    """The denoiser with random weights, in the default precision on the default device."""
    import diffusers

    model = MODELS[name]
    flow = model.pipeline == "StableDiffusion3Pipeline"
    kind = diffusers.SD3Transformer2DModel if flow else diffusers.UNet2DConditionModel
    return kind(**(model.tiny if tiny else model.full).denoiser)


def pipeline_of(name: str, dtype: torch.dtype, device: torch.device | str, tiny: bool = False) -> Any:
    """A diffusers pipeline without text encoders, with random weights."""
    import diffusers

    model = MODELS[name]
    torch.manual_seed(0)
    with made_in(dtype, device):
        denoiser = denoiser_of(name, tiny)
    # as training has it: SDXL's VAE overflows in half precision
    with made_in(torch.float32 if model.vae.get("force_upcast") else dtype, device):
        vae = diffusers.AutoencoderKL(**{**VAE, **model.vae, **(TINY_VAE if tiny else {})})
    none: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer"))
    if name != "sd15":
        none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    kind = getattr(diffusers, model.pipeline)
    if name == "sd35m":
        none |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return kind(transformer=denoiser, vae=vae, scheduler=scheduler, **none)
    parts = dict(unet=denoiser, vae=vae, scheduler=pretrain.build_scheduler(), **none)
    if name == "sdxl":
        return kind(**parts, add_watermarker=False)
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


class WithoutText(DiffusersBackbone):
    """A backbone without text encoders: random embeddings, whatever the prompts."""

    name: str
    tiny: bool

    @property
    def pooled_dim(self) -> int:
        return size_of(self.name, self.tiny).pooled

    def encode(self, prompts: Sequence[str], *_: Any, **__: Any) -> Conditioning:
        return conditioning_of(self, self.name, len(prompts), self.tiny)


def backbone_of(name: str, dtype: torch.dtype, device: torch.device | str, tiny: bool = False) -> WithoutText:
    """The backbone of :func:`pipeline_of`."""
    pipeline = pipeline_of(name, dtype, device, tiny)
    backbone = WithoutText.from_pipeline(pipeline, size_of(name, tiny).resolution)
    assert isinstance(backbone, WithoutText)
    backbone.name, backbone.tiny = name, tiny
    return backbone


def size_of(name: str, tiny: bool) -> Size:
    return MODELS[name].tiny if tiny else MODELS[name].full


def conditioning_of(backbone: DiffusersBackbone, name: str, rows: int, tiny: bool) -> Conditioning:
    """Random embeddings of the model's shapes, the same for every row."""
    size, generator = size_of(name, tiny), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(2, 1, *shape, generator=generator).to(backbone.device, backbone.denoiser.dtype)
        return values.expand(2, rows, *shape)

    embeds, pooled = random(size.tokens, size.width), random(size.pooled)
    return backbone.sized(Conditioning(embeds[0], pooled[0], embeds[1], pooled[1]))
