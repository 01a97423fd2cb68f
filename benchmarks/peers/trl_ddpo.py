"""TRL's ``DDPOTrainer`` as a contestant; runs in its own environment (see environment.py).

    python -m benchmarks.peers.trl_ddpo SETTINGS     (driven by benchmarks/training.py)

TRL has no KL term and no reference model. It always trains whole samples, so ``micro_batch`` counts samples of which
one step each is in a forward pass; the rows per pass are the same as in the other contestants.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.worker import Meter, Settings, serve


def readable_copy(folder: Path, into: Path) -> Path:
    """A copy of the pipeline that transformers 4 reads whole.

    It wants vocab.json and merges.txt beside tokenizer.json, and the text encoder's keys under "text_model.", which
    transformers 5 leaves out; without them it would start from random weights and only warn.
    """
    copy = into / "pipeline"
    shutil.copytree(folder, copy)
    tokenizer = json.loads((copy / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    weights = copy / "text_encoder" / "model.safetensors"
    prefixed = {f"text_model.{key.removeprefix('text_model.')}": each for key, each in load_file(weights).items()}
    save_file(prefixed, weights, metadata={"format": "pt"})
    return copy


def check_loaded(module: torch.nn.Module, weights: Path) -> None:
    """Refuse a module that does not hold what the file holds: a library that fell back to random weights.

    Raises:
        RuntimeError: the first tensor that is missing or differs.
    """
    state = module.state_dict()
    for key, expected in load_file(weights).items():
        if key not in state or not torch.equal(state[key].float(), expected.float()):
            raise RuntimeError(f"{key} of {weights} was not loaded: the contestants would not train the same model")


def start(settings: Settings, meter: Meter) -> tuple[Callable[[], dict[str, Any]], Callable[[Path], None]]:
    together = settings.optimizer_steps * settings.micro_batch
    if settings.images % together:
        raise ValueError(
            f"TRL trains whole samples: images ({settings.images}) must be a multiple of optimizer_steps × micro_batch "
            f"({together})"
        )
    from accelerate import PartialState

    PartialState(cpu=True)  # before anything else asks for a device
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    from dblightning import miniature
    from dblightning.miniature import rewards, world

    folder = Path(tempfile.mkdtemp())
    copy = readable_copy(miniature.path(), folder)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(copy), pretrained_model_revision="main", use_lora=True)
    check_loaded(pipeline.text_encoder, copy / "text_encoder" / "model.safetensors")
    check_loaded(pipeline.unet, copy / "unet" / "diffusion_pytorch_model.safetensors")
    check_loaded(pipeline.vae, copy / "vae" / "diffusion_pytorch_model.safetensors")
    prompts = random.Random(settings.seed).sample(world.train_prompts(), len(world.train_prompts()))
    draws = itertools.chain.from_iterable(
        itertools.repeat(prompt, settings.samples_per_prompt) for prompt in itertools.cycle(prompts)
    )
    reward = rewards.ShapeAesthetic()
    seen: list[float] = []

    def score(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> tuple[torch.Tensor, dict]:
        scores = reward.score(images, list(prompts))
        seen.append(float(scores.mean()))
        return scores, {}

    config = DDPOConfig(
        seed=settings.seed,
        mixed_precision="no",
        allow_tf32=False,
        sample_num_steps=settings.steps,
        sample_guidance_scale=settings.guidance_scale,
        sample_eta=1.0,
        sample_batch_size=settings.sample_batch,
        sample_num_batches_per_epoch=settings.images // settings.sample_batch,
        train_batch_size=settings.micro_batch,
        train_gradient_accumulation_steps=settings.images // (settings.optimizer_steps * settings.micro_batch),
        train_timestep_fraction=settings.train_fraction,
        train_learning_rate=settings.learning_rate,
        train_adam_weight_decay=settings.weight_decay,
        train_clip_range=settings.clip_range,
        train_max_grad_norm=settings.max_grad_norm,
        per_prompt_stat_tracking=settings.per_prompt,
        save_freq=10**9,
        project_kwargs={"project_dir": str(folder)},
    )
    trainer = DDPOTrainer(config, score, lambda: (next(draws), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    meter.watch(pipeline.unet, pipeline.vae, pipeline.text_encoder, settings.guidance_scale > 1)
    meter.wrap(trainer, "_generate_samples", "sampling")
    meter.wrap(trainer, "compute_rewards", "rewards")
    meter.wrap(trainer, "_train_batched_samples", "update")
    state = {"epoch": 0, "step": 0}

    def one_round() -> dict[str, float]:
        seen.clear()
        state["step"] = trainer.step(state["epoch"], state["step"])
        state["epoch"] += 1
        return {"reward": sum(seen) / len(seen)}

    def export(to: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        # TRL's own save_checkpoint writes the older lora.up and lora.down keys; the tensors are the same
        pipeline.sd_pipeline.save_lora_weights(to, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))

    return one_round, export


if __name__ == "__main__":
    serve(start)
