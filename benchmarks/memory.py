"""Peak memory of a policy update of Stable Diffusion 1.5's or SDXL's shape, with and without gradient checkpointing.

    python benchmarks/memory.py --json benchmarks/results/memory.json
    python benchmarks/memory.py --resolution 256 --dtype float32 --micro-batch 2
    python benchmarks/memory.py --model sdxl --resolution 1024 --checkpointed-only --micro-batch 1

The UNet has Stable Diffusion 1.5's (SDXL base's) configuration and random weights, as weights do not matter for memory.
Every variant runs ``RewardRLModule.policy_loss`` and its backward pass once in a fresh process, on the CPU. The peak is
its resident memory above what the libraries took before the model was built; the frozen weights count. "Saved for
backward" are the bytes of activations that the loss's graph holds when the forward pass is over. The sizes of what is
trained and kept are those of the paper's settings: rank 4, 512 × 512, 50 steps, a buffer of 1000 single steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.publish import header, opening, publish
from dblightning.backbone import DiffusersBackbone
from dblightning.miniature import pretrain
from dblightning.miniature.rewards import ShapeAesthetic
from dblightning.module import RewardRLModule
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.training_settings import AdvantageSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SD15 = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
)  # fmt: skip
#: the same blocks, narrow: for a check that runs in a second
TINY = dict(
    sample_size=16, cross_attention_dim=768, attention_head_dim=2, block_out_channels=(32, 32, 64, 64),
    layers_per_block=1, norm_num_groups=8,
)  # fmt: skip


NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
#: SDXL base
SDXL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def random_unet(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A UNet of diffusers with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device="cpu")
    for weight in unet.parameters():  # uniform: the usual initialisation of 860 million weights takes minutes
        bound = (1 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 1.0
        nn.init.uniform_(weight, -bound, bound) if weight.ndim > 1 else nn.init.constant_(weight, bound)
    return unet


def text_encoder(tokenizer: Any, width: int, projected: bool) -> Any:
    """One layer of CLIP's text transformer, of the true width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def sd_backbone(resolution: int, dtype: torch.dtype, tiny: bool = False, model: str = "sd15") -> DiffusersBackbone:
    """A Stable Diffusion with random weights; VAE and text encoders are small, the update does not run them."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline

    unet = random_unet({"sd15": TINY if tiny else SD15, "sdxl": SDXL}[model], dtype)
    tokenizer = pretrain.build_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    common = dict(
        vae=vae.to(dtype), text_encoder=text_encoder(tokenizer, 768, False).to(dtype), tokenizer=tokenizer, unet=unet,
        scheduler=pretrain.build_scheduler(),
    )  # fmt: skip
    if model == "sdxl":
        second = text_encoder(tokenizer, 1280, True).to(dtype)
        pipeline = StableDiffusionXLPipeline(
            **common, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return DiffusersBackbone.from_pipeline(pipeline, resolution)


def update_module(backbone: DiffusersBackbone, checkpointing: bool) -> RewardRLModule:
    """The module at the paper's settings; advantages by prompt, so that the value function's pass is left out."""
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    module = RewardRLModule(backbone, ShapeAesthetic(), advantage=AdvantageSettings(baseline="prompt"))
    module.prompts = {0: "a red circle"}
    module.train()  # as Lightning leaves it during a fit
    return module


def random_transitions(module: RewardRLModule, count: int) -> Transitions:
    """``count`` transitions of noise."""
    device = module.backbone.device
    latents = torch.randn(2, count, *module.backbone.latent_shape).to(device)
    ones, zeros = torch.ones(count, device=device), torch.zeros(count, dtype=torch.long)
    return Transitions(latents[0], latents[1], torch.arange(count), ones, ones, 0 * ones, ones, zeros, zeros.to(device))


def saved_bytes(module: RewardRLModule, transitions: Transitions) -> int:
    """Bytes of activations that the loss's graph holds after the forward pass; weights are not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = module.policy_loss(transitions)
    del loss
    return sum(kept.values())


def reset_peak() -> None:
    """Begin to measure the peak of resident memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(kind: str) -> float:
    """Resident memory of this process, MB: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"this system does not report {kind}: the benchmark needs Linux")


def one_update(options: argparse.Namespace, checkpointing: bool) -> dict[str, Any]:
    """Forward and backward of one micro-batch, measured."""
    libraries = resident("VmRSS")
    backbone = sd_backbone(options.resolution, DTYPES[options.dtype], options.tiny, options.model)
    module = update_module(backbone, checkpointing)
    transitions = random_transitions(module, options.micro_batch)
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    loss, _ = module.policy_loss(transitions)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    gradients = [weight.grad for weight in backbone.adapters.parameters(module.adapter_name)]
    if not all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients):
        raise RuntimeError("the update left the adapter without finite gradients: the measurement means nothing")
    return {
        "libraries_mb": libraries,
        "model_mb": before - libraries,
        "peak_mb": peak - libraries,
        "update_mb": peak - before,
        "saved_for_backward_mb": saved_bytes(module, transitions) / 1e6,
        "seconds": seconds,
    }


def paper_sizes(options: argparse.Namespace) -> dict[str, float]:
    """MB of what is trained and kept at the paper's settings; the optimisers are stepped once to have their state."""
    backbone = sd_backbone(128 if options.tiny else 512, DTYPES[options.dtype], options.tiny)
    module = RewardRLModule(backbone, ShapeAesthetic())
    optimizers = module.configure_optimizers()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()
    steps = module.settings.sampling.num_inference_steps
    replay = ReplayBuffer((module.settings.replay.buffer_size or 0) // steps, steps, backbone.latent_shape)
    lora, value = backbone.adapters.parameters(module.adapter_name), list(module.value_function.parameters())
    adapted = sum(4 * layer.get_base_layer().weight.numel() for layer in backbone.adapters.layers())
    return {
        "frozen UNet": megabytes(weight for weight in backbone.unet.parameters() if not weight.requires_grad),
        "LoRA": megabytes(lora),
        "LoRA's gradients": megabytes(lora),
        "LoRA's optimiser": megabytes(states(optimizers[0])),
        "value function": megabytes(value),
        "value function's gradients": megabytes(value),
        "value function's optimiser": megabytes(states(optimizers[1])),
        "replay buffer": megabytes(each for each in vars(replay).values() if isinstance(each, Tensor)),
        "merged copy of the adapted matrices (float32 only)": adapted / 1e6,
    }


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """An optimiser's tensors."""
    return [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]


def megabytes(tensors: Any) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def run_variant(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """One measurement: "plain" and "checkpointed" are one update each, "sizes" are those of the paper's settings."""
    return paper_sizes(options) if variant == "sizes" else one_update(options, variant == "checkpointed")


def in_fresh_process(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """:func:`run_variant` alone in a process."""
    flags = ["--resolution", str(options.resolution), "--dtype", options.dtype]
    flags += [
        "--model",
        options.model,
        "--micro-batch",
        str(options.micro_batch),
        *(["--tiny"] if options.tiny else []),
    ]
    # memory goes back to the system as soon as it is freed, so that the peak is that of what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, __file__, "--variant", variant, *flags]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns the record that is written."""
    described = machine.describe()
    settings = {key: getattr(options, key) for key in ("model", "resolution", "dtype", "micro_batch", "tiny")}
    common = {"machine": described, "torch": torch.__version__, "settings": settings}
    if options.checkpointed_only:
        return {**common, "checkpointed": in_fresh_process(options, "checkpointed")}
    plain, checkpointed = (in_fresh_process(options, variant) for variant in ("plain", "checkpointed"))
    keys = ("peak_mb", "update_mb", "saved_for_backward_mb", "seconds")
    if plain["update_mb"] <= 0:
        raise RuntimeError(
            "the update took no new memory: its process already held what it needed, so the peak means nothing; "
            "measure in a fresh process, as the command does"
        )
    return {
        **common,
        "plain": plain,
        "checkpointed": checkpointed,
        "ratio": {key: checkpointed[key] / plain[key] for key in keys},
        "paper_sizes_mb": in_fresh_process(options, "sizes"),
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as two tables."""
    settings = record["settings"]
    unet = f"{'A narrow' if settings['tiny'] else 'The true'} {NAMES[settings['model']]} UNet"
    conditions = (
        f"{unet}, {settings['resolution']}², {settings['dtype']} weights, micro-batch {settings['micro_batch']} "
        f"({2 * settings['micro_batch']} rows), CPU, torch {record['torch']}."
    )
    columns = ("policy update", "peak MB", "of it the update", "saved for backward, MB", "wall s")
    lines = opening(conditions, record, *columns)
    for name in [name for name in ("plain", "checkpointed") if name in record]:
        row = record[name]
        lines.append(
            f"| {name} | {row['peak_mb']:.0f} | {row['update_mb']:.0f} | {row['saved_for_backward_mb']:.0f} | "
            f"{row['seconds']:.0f} |"
        )
    if "ratio" not in record:
        return "\n".join(lines)
    ratio = record["ratio"]
    lines.append(
        f"| ratio | {ratio['peak_mb']:.2f} | {ratio['update_mb']:.2f} | {ratio['saved_for_backward_mb']:.2f} | "
        f"{ratio['seconds']:.2f} |"
    )
    lines += ["", *header("kept during a run at the paper's settings", "MB")]
    lines += [f"| {name} | {size:.1f} |" for name, size in record["paper_sizes_mb"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="sd15")
    parser.add_argument("--checkpointed-only", action="store_true", help="one update, with gradient checkpointing")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--micro-batch", type=int, default=2, help="transitions; each is two rows, for guidance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a narrow UNet, to check that it runs")
    parser.add_argument("--json", type=Path, help="file to write; the Markdown tables go beside it")
    parser.add_argument("--variant", choices=["plain", "checkpointed", "sizes"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.variant is not None:
        print(json.dumps(run_variant(options, options.variant)))
        return None
    record = measure(options)
    publish(record, markdown(record), options.json)
    return record


if __name__ == "__main__":
    main()
