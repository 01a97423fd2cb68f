"""Pretrain the flow miniature: an SD3 transformer on the UNet miniature's latents, saved as an SD3 folder.

The command is ``python -m dblightning pretrain-flow-miniature --out runs/flow_miniature``. The VAE is the UNet
miniature's, and the first text encoder starts from its trained one; everything else starts from random weights. Saves
its state every two minutes; ``--resume`` continues.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from dblightning import miniature
from dblightning.arguments import pretrain_flow_parser
from dblightning.miniature.pretrain import (
    LATENT_SIZE,
    careless_captions,
    draw,
    encode,
    finish,
    start,
    text_config,
    train,
    write_whole,
)

#: text tokens of each CLIP and of T5; the world's longest caption has ten
MAX_LENGTH = 10
WIDTH, LAYERS, HEADS = 64, 4, 4
#: widths of the two CLIP text encoders, whose outputs stand beside each other
CLIP_WIDTHS = (64, 32)
#: T5's tokens in the plain pipeline unless its ``max_sequence_length`` is passed, and how often training counts so many
PLAIN_LENGTH, PLAIN_SHARE = 256, 0.2
#: mean of the logits of the training times, standard deviation 1: shapes and colours are decided above the middle
TIME_LOGIT = 0.3


# ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────────
def load_tokenizer(max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """The UNet miniature's tokenizer; every caption of the world has at most 10 tokens."""
    return CLIPTokenizer.from_pretrained(miniature.path() / "tokenizer", model_max_length=max_length)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text model with random weights; SD3 takes the output of its last layer but one, and the pooled one."""
    return CLIPTextModelWithProjection(text_config(tokenizer, width, layers, MAX_LENGTH))


def start_from_trained(encoder: CLIPTextModelWithProjection) -> None:
    """Copy the UNet miniature's embeddings and two layers below ``encoder``'s own third one."""
    trained = CLIPTextModel.from_pretrained(miniature.path() / "text_encoder").state_dict()
    own = encoder.state_dict()
    for name, value in trained.items():
        target = next(each for each in own if each.endswith(name.removeprefix("text_model.")))
        if "final_layer_norm" not in name:
            own[target] = value[: len(own[target])] if "position_embedding" in name else value
    encoder.load_state_dict(own)


def build_t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """A T5 encoder of one layer whose output is zero: what SD3 sees without T5, in a folder that loads without words.

    Plain ``from_pretrained`` refuses a folder without T5. The weight of the last norm is zero.
    """
    config = T5Config(
        vocab_size=len(tokenizer), d_model=sum(CLIP_WIDTHS), d_kv=4, d_ff=4, num_layers=1, num_heads=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    return encoder


def build_transformer() -> SD3Transformer2DModel:
    """An SD3 transformer of 2×2 patches of (4, 8, 8) latents; modulations and output start at zero, as in DiT."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=sum(CLIP_WIDTHS),
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=LATENT_SIZE // 2,
    )
    modulations = [
        norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)
    ]
    with torch.no_grad():
        for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching without a shift, which is for large images."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a Stable Diffusion 3 folder in half-precision safetensors, whole or not at all."""
    # copies in half precision: the modules themselves continue training in float32
    halves = {
        # without where it was loaded from
        "vae": type(vae).from_config({key: each for key, each in vae.config.items() if not key.startswith("_")}),
        "transformer": type(transformer).from_config(transformer.config),
        "text_encoder": type(encoders[0])(encoders[0].config),
        "text_encoder_2": type(encoders[1])(encoders[1].config),
    }
    for part, half in zip((vae, transformer, *encoders), halves.values(), strict=True):
        half.load_state_dict(part.state_dict())
    pipeline = StableDiffusion3Pipeline(
        **{name: half.half() for name, half in halves.items()},
        text_encoder_3=build_t5(tokenizer).half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer,
        scheduler=build_scheduler(),
    )
    write_whole(pipeline, folder)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Counted(TorchFunctionMode):
    """Adds ``bias`` to the logits of every attention inside."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "attn_mask": self.bias}
        return func(*args, **(kwargs or {}))


@contextmanager
def last_token_counted(tokens: int, times: int) -> Iterator[None]:
    """The last of ``tokens`` counts as ``times`` equal ones in every attention: log(times) more as a key."""
    bias = torch.zeros(1, 1, 1, tokens)
    bias[..., -1] = math.log(times)
    with _Counted(bias):
        yield


def encode_text(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, 10) to SD3's embeddings, with one zero token for all of T5's: (B, 11, 96) and pooled (B, 96)."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return F.pad(tokens, (0, 0, 0, 1)), torch.cat([output[0] for output in outputs], -1)


def velocity_loss(
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    clean: Tensor,
    ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Flow matching's loss, mean of (v − (ε − x₀))², at times of SD3's logit-normal distribution.

    Args:
        clean: scaled latents (B, 4, 8, 8).
        ids: token ids of their captions, (B, 10).
    """
    noise = torch.randn(clean.shape, generator=generator)
    sigmas = (TIME_LOGIT + torch.randn(len(clean), generator=generator)).sigmoid()
    noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))
    embeds, pooled = encode_text(encoders, ids)
    plain = torch.rand((), generator=generator) < PLAIN_SHARE
    tokens = (LATENT_SIZE // 2) ** 2 + embeds.shape[1]
    with last_token_counted(tokens, PLAIN_LENGTH if plain else MAX_LENGTH):
        velocity = transformer(noisy, embeds, pooled, sigmas * 1000).sample
    return (velocity - (noise - clean)).square().mean()


def train_transformer(
    transformer: SD3Transformer2DModel,
    encoders: Sequence[CLIPTextModelWithProjection],
    latents: tuple[Tensor, Tensor],
    captions: tuple[Tensor, Tensor],
    vocabulary: Tensor,
    clean_steps: int,
    steps: int,
    batch: int,
    lr: float,
    **keywords: Any,
) -> float:
    """Flow matching on scaled latents, (means, stds); one caption in ten is empty, for guidance.

    Args:
        captions: rows of ``vocabulary``, the true captions of the images (N,), used for the first ``clean_steps``, and
            careless ones (V, N), used from then on.
        vocabulary: token ids of the distinct captions, (M, 10); the last one is empty.
    """
    means, stds = latents
    true, careless = captions

    def loss_of_batch(generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(means), (batch,), generator=generator)
        clean = means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        spoken = true[rows]
        if step >= clean_steps:
            spoken = careless[torch.randint(len(careless), (batch,), generator=generator), rows]
        ids = vocabulary[torch.where(dropped, len(vocabulary) - 1, spoken)]
        return velocity_loss(transformer, encoders, clean, ids, generator)

    parameters = [*transformer.parameters(), *(each for encoder in encoders for each in encoder.parameters())]
    return train("transformer", parameters, loss_of_batch, steps, lr, 0.999, **keywords)


def draw_data(vae: AutoencoderKL, count: int, seed: int, cache: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Means and stds of ``count`` images' latents, scaled, (N, 4, 8, 8), and their captions; kept in ``cache``."""
    if cache.exists():
        means, stds, captions = torch.load(cache, weights_only=True)
        if len(captions) != count:
            raise ValueError(f"{cache} holds {len(captions)} images, not {count}: remove it or pass that")
    else:
        images, captions = draw(count, seed)
        means, stds = encode(vae, images)
        torch.save((means, stds, captions), cache)
    scale = vae.config.scaling_factor
    return means * scale, stds * scale, captions


def number_captions(tokenizer: CLIPTokenizer, captions: list[str], seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """True and careless captions as rows of a vocabulary of token ids, whose last one is empty."""
    careless = careless_captions(captions, seed)
    texts = sorted({*captions, *(text for each in careless for text in each)})
    numbers = {text: number for number, text in enumerate(texts)}

    def rows(lists: list[list[str]]) -> Tensor:
        return torch.tensor([[numbers[text] for text in each] for each in lists])

    ids = tokenizer([*texts, ""], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    return (rows([captions])[0], rows(careless)), ids


def main(argv: Sequence[str] | None = None) -> None:
    """Train and write the pipeline to ``--out``."""
    options, work, states = start(pretrain_flow_parser(), argv, ("transformer",))
    tokenizer = load_tokenizer()
    vae = AutoencoderKL.from_pretrained(miniature.path() / "vae").requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)  # the plain pipeline adds one
    encoders = [build_text_encoder(tokenizer, width, layers) for width, layers in zip(CLIP_WIDTHS, (3, 2), strict=True)]
    start_from_trained(encoders[0])
    transformer = build_transformer()
    started = time.monotonic()
    means, stds, captions = draw_data(vae, options.images, options.seed, work / "latents.pt")
    print(f"drew and encoded {len(captions)} images in {time.monotonic() - started:.0f} s", flush=True)
    numbers, vocabulary = number_captions(tokenizer, captions, options.seed + 1)

    def save(folder: Path) -> None:
        save_pipeline(folder, vae, encoders, transformer, tokenizer)

    snapshot: Callable[[], None] = lambda: save(work / "snapshot")  # noqa: E731
    seconds = train_transformer(
        transformer,
        encoders,
        (means, stds),
        numbers,
        vocabulary,
        options.clean_steps,
        options.steps,
        options.batch,
        options.lr,
        state_file=states["transformer"],
        seed=options.seed,
        snapshot=snapshot,
        snapshot_minutes=options.snapshot_minutes,
        snapshot_from=options.snapshot_minutes,
    )
    finish("transformer and text encoders", seconds, save, options.out)


if __name__ == "__main__":
    main()
