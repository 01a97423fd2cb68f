"""Pretrain the miniature from scratch: a VAE, then a UNet with its text encoder, saved as a Stable Diffusion folder.

The command is ``python -m dblightning pretrain-miniature --out runs/miniature``; with its defaults about an hour on
one thread of a Xeon with AMX: 12 minutes for the VAE, 35 to 50 for the rest. Processors without bfloat16 should pass
``--no-bf16``. The times are with glibc's MALLOC_MMAP_THRESHOLD_=1000000000 and MALLOC_TRIM_THRESHOLD_=4000000000.
"""

# Longer than 400 lines: the whole recipe of the shipped weights, from tokenizer to saved pipeline.

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dblightning.arguments import pretrain_parser
from dblightning.miniature import world
from dblightning.whole_files import replacing

MAX_LENGTH = 16
LATENT_SIZE = 8
#: mislabelled captions drawn for each image
CARELESS_CAPTIONS = 4


# ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────────
def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learned on the training and test prompts: all words."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(world.train_prompts() + world.test_prompts(), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's order: bytes, bytes that end a word, merges, special tokens
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, max_length: int) -> CLIPTextConfig:
    """Of a CLIP text model with four attention heads and the special tokens of ``tokenizer``."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model, two layers of width 64, with random weights."""
    return CLIPTextModel(text_config(tokenizer, 64, 2, MAX_LENGTH))


def build_vae() -> AutoencoderKL:
    """A VAE of 32×32 images, latents (4, 8, 8), with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # named here, or copies of the module would fall back to diffusers' default
    )


def build_unet() -> UNet2DConditionModel:
    """A conditional UNet of two levels, 32 and 64 channels wide, with random weights."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of these parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> None:
    """Write a Stable Diffusion folder in fp16 safetensors, whole or not at all."""
    pipeline = build_pipeline(vae, text_encoder, unet, tokenizer)
    # a copy in half precision: the modules themselves continue training in float32
    halves = {
        name: type(part).from_config(part.config) if name != "text_encoder" else type(part)(part.config)
        for name, part in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
    }
    for name, half in halves.items():
        half.load_state_dict(getattr(pipeline, name).state_dict())
        setattr(pipeline, name, half.half())
    write_whole(pipeline, folder)


def write_whole(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline's folder, or leave what was there."""
    scratch = folder.with_name(folder.name + ".writing")
    _remove(scratch)
    pipeline.save_pretrained(scratch)
    # transformers loads in the stored precision unless its config says otherwise, diffusers in float32: make them agree
    for config in scratch.glob("text_encoder*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    _remove(folder)
    scratch.rename(folder)


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Padded token ids, (N, 16)."""
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Average:
    """An exponential moving average of modules' parameters: decay min(``decay``, (1 + n) / (10 + n)) at update n."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = parameters
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live parameters, once per optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, list[Tensor](self.parameters), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and live parameters; call twice to get back."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            live = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(live)


def train(
    stage: str,
    parameters: list[nn.Parameter],
    loss_of_batch: Callable[[torch.Generator, int], Tensor],
    steps: int,
    lr: float,
    decay: float,
    state_file: Path,
    seed: int,
    snapshot: Callable[[], None] | None = None,
    snapshot_minutes: float = 10.0,
    snapshot_from: float = 15.0,
    save_minutes: float = 2.0,
) -> float:
    """AdamW with a short warm-up and a cosine to zero; leaves the averaged weights in ``parameters``.

    Continues from ``state_file`` where there is one and writes it every ``save_minutes``. ``snapshot`` is called with
    the averaged weights in place, first after ``snapshot_from`` minutes, then every ``snapshot_minutes``.

    Returns:
        Seconds trained, over all runs.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), foreach=True)
    warmup = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))),
    )
    average = Average(parameters, decay)
    generator = torch.Generator().manual_seed(seed)
    done, before, first = 0, 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["steps"] != steps:
            raise ValueError(f"{state_file} is of a run of {state['steps']} steps, not {steps}: remove it or pass that")
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        average.shadow, average.updates = state["shadow"], state["done"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        done = first = state["done"]
        before = state["seconds"]
        print(f"{stage}: continuing at step {done}", flush=True)

    start = saved = time.monotonic()
    shown = start - 60 * (snapshot_minutes - snapshot_from)
    running = 0.0

    def save() -> None:
        state = {
            "steps": steps,
            "done": done,
            "seconds": before + time.monotonic() - start,
            "parameters": [parameter.detach() for parameter in parameters],
            "shadow": average.shadow,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": generator.get_state(),
        }
        with replacing(state_file) as aside:
            torch.save(state, aside)

    while done < steps:
        loss = loss_of_batch(generator, done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        done += 1
        running += (loss.item() - running) / min(done - first, 100)
        now = time.monotonic()
        if done % 100 == 0 or done == steps:
            print(f"{stage} {done}/{steps} loss {running:.4f} {before + now - start:.0f} s", flush=True)
        if now - saved >= 60 * save_minutes:
            save()
            saved = now
        if snapshot is not None and now - shown > 60 * snapshot_minutes:
            average.swap()
            snapshot()
            average.swap()
            shown = now
    save()
    average.swap()
    return before + time.monotonic() - start


def draw(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """``count`` images, uint8 (count, 3, 32, 32), and their captions."""
    images = np.empty((count, 3, world.IMAGE_SIZE, world.IMAGE_SIZE), dtype=np.uint8)
    captions = []
    for index, (image, text) in enumerate(world.examples(count, seed)):
        images[index] = np.round(image * 255)
        captions.append(text)
    return torch.from_numpy(images), captions


def careless_captions(captions: Sequence[str], seed: int) -> list[list[str]]:
    """Each image's caption, mislabelled, :data:`CARELESS_CAPTIONS` times."""
    rng = np.random.default_rng(seed)
    return [
        [world.caption(world.mislabel(world.parse(text), rng)) for text in captions] for _ in range(CARELESS_CAPTIONS)
    ]


def train_vae(
    vae: AutoencoderKL, images: Tensor, steps: int, batch: int, state_file: Path, seed: int, bf16: bool
) -> float:
    """L1 + L2 + 1e-6 KL, the first two per pixel and the last per image; returns the seconds it took."""

    def loss_of_batch(generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        target = images[rows].float().div(127.5).sub(1)
        # bfloat16 is 1.8 times faster where the processor has it; the losses themselves stay in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            moments = vae.quant_conv(vae.encoder(target))
        posterior = DiagonalGaussianDistribution(moments.float())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            decoded = vae.decode(posterior.sample(generator=generator)).sample
        error = decoded.float() - target
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    return train("vae", list(vae.parameters()), loss_of_batch, steps, 2e-3, 0.999, state_file, seed)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the images' latents, unscaled, each (N, 4, 8, 8)."""
    means, stds = [], []
    for chunk in images.split(250):
        posterior = vae.encode(chunk.float().div(127.5).sub(1)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: tuple[Tensor, Tensor],
    tokens: Tensor,
    careless: Tensor,
    empty: Tensor,
    clean_steps: int,
    steps: int,
    batch: int,
    **keywords: Any,
) -> float:
    """Noise prediction on scaled latents, (means, stds); one caption in ten is empty, for guidance.

    Args:
        tokens: token ids of each image's caption, (N, 16); used for the first ``clean_steps``.
        careless: token ids of mislabelled captions, several to an image, (V, N, 16); used from then on.
        empty: token ids of the empty caption, (16,).
    """
    alphas = build_scheduler().alphas_cumprod
    means, stds = latents

    def loss_of_batch(generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(means), (batch,), generator=generator)
        clean = means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(alphas), (batch,), generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        dropped = torch.rand(batch, 1, generator=generator) < 0.1
        spoken = tokens[rows]
        if step >= clean_steps:
            spoken = careless[torch.randint(len(careless), (batch,), generator=generator), rows]
        context = text_encoder(torch.where(dropped, empty, spoken)).last_hidden_state
        return (unet(noisy, timesteps, context).sample - noise).square().mean()

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    return train("unet", parameters, loss_of_batch, steps, 2e-3, 0.999, **keywords)


def start(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, stages: Sequence[str]
) -> tuple[argparse.Namespace, Path, dict[str, Path]]:
    """Set threads and seed of a pretraining; refuse to start over where a state of an earlier run is.

    Args:
        parser: has the options out, work, threads, seed and resume.
        argv: of the command; None: the process's own.
        stages: trained one after the other, each with a state of its own.

    Returns:
        The options, the working folder, which is made, and each stage's state file in it.
    """
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    work: Path = options.work or options.out.with_name(options.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    states = {stage: work / f"{stage}.pt" for stage in stages}
    for state in states.values():
        if state.exists() and not options.resume:
            parser.error(f"{state} holds an earlier run: pass --resume to continue it, or remove it")
    return options, work, states


def finish(what: str, seconds: float, save: Callable[[Path], None], out: Path) -> None:
    """Say how long training ``what`` took, and write the pipeline to ``out``."""
    print(f"{what} trained in {seconds:.0f} s", flush=True)
    save(out)
    print(f"wrote {out}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train both stages and write the pipeline to ``--out``."""
    options, work, states = start(pretrain_parser(), argv, ("vae", "unet"))
    tokenizer = build_tokenizer()
    text_encoder, vae, unet = build_text_encoder(tokenizer), build_vae(), build_unet()
    started = time.monotonic()
    images, captions = draw(options.images, options.seed)
    print(f"drew {len(images)} images in {time.monotonic() - started:.0f} s", flush=True)
    tokens, empty = (_token_ids(tokenizer, texts) for texts in (captions, [""]))
    careless = torch.stack([_token_ids(tokenizer, each) for each in careless_captions(captions, options.seed + 1)])

    seconds = train_vae(vae, images, options.vae_steps, options.vae_batch, states["vae"], options.seed, options.bf16)
    print(f"vae trained in {seconds:.0f} s", flush=True)
    means, stds = encode(vae, images)
    scale = 1 / (means.var() + stds.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=scale)
    print(f"latents: scaling factor {scale:.4f}", flush=True)

    def save(folder: Path) -> None:
        save_pipeline(folder, vae, text_encoder, unet, tokenizer)

    seconds = train_unet(
        unet,
        text_encoder,
        (means * scale, stds * scale),
        tokens,
        careless,
        empty[0],
        options.clean_steps,
        options.unet_steps,
        options.unet_batch,
        state_file=states["unet"],
        seed=options.seed,
        snapshot=lambda: save(work / "snapshot"),
        snapshot_minutes=options.snapshot_minutes,
    )
    finish("unet and text encoder", seconds, save, options.out)


if __name__ == "__main__":
    main()
