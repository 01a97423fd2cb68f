"""The training loop as the paper's code writes it, on plain diffusers and PEFT: the baseline to beat.

What it does as that code does: a second whole UNet as the reference, PEFT's own LoRA forward while sampling and
training, texts encoded anew for every batch, rewards image by image, a buffer of single steps grown by ``torch.cat``,
micro-batches of two transitions with accumulation, and a reference forward for every micro-batch. The objective is
that code's too: a hard clamp of the ratio, and the squared difference of the predictions as the KL term. The value
function is left out, and only the latest rollout is kept, so that contestants do the same work.

    python -m benchmarks.peers.naive SETTINGS     (driven by benchmarks/training.py)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.worker import Meter, Settings, serve


def ddim_gaussian(scheduler: Any, noise_pred: Tensor, timesteps: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and standard deviation (B, 1, 1, 1) of a DDIM step with eta 1.

    Args:
        scheduler: a ``DDIMScheduler`` with its timesteps set, predicting epsilon.
        noise_pred: ε after guidance, (B, C, h, w).
        timesteps: int64 (B,).
        latents: x_t, (B, C, h, w).
    """
    earlier = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = scheduler.alphas_cumprod[timesteps]
    final = scheduler.final_alpha_cumprod
    alpha_next = torch.where(earlier >= 0, scheduler.alphas_cumprod[earlier.clamp(min=0)], final)
    alpha, alpha_next = alpha.view(-1, 1, 1, 1), alpha_next.view(-1, 1, 1, 1)
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    original = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    mean = alpha_next.sqrt() * original + (1 - alpha_next - variance).sqrt() * noise_pred
    return mean, variance.sqrt()


def log_density(mean: Tensor, std: Tensor, value: Tensor) -> Tensor:
    """Log density of ``value`` under Normal(mean, std), averaged over C, h, w: (B,)."""
    return torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value).mean(dim=(1, 2, 3))


class NaiveTrainer:
    """The loop's state: two UNets, the optimiser and the buffer.

    Args:
        settings: the work of a round.
        score: reward of images (B, 3, H, W) in [0, 1] and their prompts, (B,).
        prompts: what the rollouts draw from.
        pretrained: a Stable Diffusion folder.
        meter: clocks and counts; None measures nothing.
    """

    def __init__(
        self,
        settings: Settings,
        score: Callable[[Tensor, list[str]], Tensor],
        prompts: list[str],
        pretrained: str,
        meter: Meter | None = None,
    ) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from peft import LoraConfig

        torch.manual_seed(settings.seed)
        self.settings, self.score = settings, score
        self.pipeline = StableDiffusionPipeline.from_pretrained(pretrained, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.scheduler.set_timesteps(settings.steps)
        self.reference = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet").requires_grad_(False).eval()
        self.unet = self.pipeline.unet.requires_grad_(False).eval()
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        self.parameters = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.prompts = itertools.cycle(random.Random(settings.seed).sample(prompts, len(prompts)))
        self.first_ratio_error = 0.0
        if meter is not None:
            guided = settings.guidance_scale > 1
            meter.watch(self.unet, self.pipeline.vae, self.pipeline.text_encoder, guided)
            self.reference.register_forward_pre_hook(
                lambda module, args: meter.counts.update(denoiser_rows_without_grad=len(args[0]))
            )
            meter.wrap(self, "sample", "sampling")
            meter.wrap(self, "rewards", "rewards")
            meter.wrap(self, "update", "update")

    def round(self) -> dict[str, float]:
        """One rollout and its policy updates; returns the rollout's mean reward."""
        count = self.settings.images // self.settings.samples_per_prompt
        chosen = [next(self.prompts) for _ in range(count)]
        prompts = [prompt for prompt in chosen for _ in range(self.settings.samples_per_prompt)]
        buffer, images = self.sample(prompts)
        rewards = self.rewards(images, prompts)
        buffer["advantage"] = self.advantages(rewards).repeat(self.settings.steps)  # the buffer is step-major
        self.update(buffer)
        return {"reward": float(rewards.mean())}

    @torch.no_grad()
    def predict(self, unet: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor, negative: Tensor) -> Tensor:
        """ε after guidance, (B, C, h, w)."""
        return self._predict(unet, latents, timesteps, embeds, negative)

    def _predict(self, unet: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor, negative: Tensor) -> Tensor:
        output = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), torch.cat([negative, embeds])).sample
        unconditional, conditional = output.chunk(2)
        return unconditional + self.settings.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The rollout's single steps, step-major (steps · images, …), and images (B, 3, H, W) in [0, 1]."""
        parts = [
            self._sample_batch(prompts[start : start + self.settings.sample_batch])
            for start in range(0, len(prompts), self.settings.sample_batch)
        ]
        keys = parts[0][0].keys()
        joined = {key: torch.cat([part[key] for part, _ in parts], dim=1).flatten(0, 1) for key in keys}
        return joined, torch.cat([images for _, images in parts])

    def _sample_batch(self, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        embeds, negative = self.pipeline.encode_prompt(prompts, "cpu", 1, True)
        unet = self.unet
        side = unet.config.sample_size
        latents = torch.randn(len(prompts), unet.config.in_channels, side, side)
        buffer: dict[str, Tensor] = {}
        for timestep in self.scheduler.timesteps:
            timesteps = timestep.repeat(len(prompts))
            noise_pred = self.predict(unet, latents, timesteps, embeds, negative)
            mean, std = ddim_gaussian(self.scheduler, noise_pred, timesteps, latents)
            following = mean + std * torch.randn_like(mean)
            row = {
                "latents": latents,
                "next_latents": following,
                "timesteps": timesteps,
                "log_prob": log_density(mean, std, following),
                "embeds": embeds,
                "negative": negative,
            }
            for key, value in row.items():
                held = [buffer[key]] if key in buffer else []
                buffer[key] = torch.cat([*held, value.cpu().unsqueeze(0)])
            latents = following
        decoded = self.pipeline.vae.decode(latents / self.pipeline.vae.config.scaling_factor).sample
        return buffer, (decoded / 2 + 0.5).clamp(0, 1)

    def rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One image at a time, (B,)."""
        return torch.cat([self.score(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])

    def advantages(self, rewards: Tensor) -> Tensor:
        """The reward less its prompt's mean, over its prompt's deviation, (B,)."""
        groups = rewards.view(-1, self.settings.samples_per_prompt)
        scale = groups.std(1, keepdim=True, correction=0).clamp_min(1e-3)
        return ((groups - groups.mean(1, keepdim=True)) / scale).flatten()

    def update(self, buffer: dict[str, Tensor]) -> None:
        """``optimizer_steps`` steps over all transitions in random order."""
        settings = self.settings
        order = torch.randperm(len(buffer["latents"])).split(settings.micro_batch)
        batches = iter(order)
        for step in range(settings.optimizer_steps):
            for index in range(settings.accumulation):
                rows = next(batches)
                loss, ratio = self.loss({key: value[rows] for key, value in buffer.items()})
                (loss / settings.accumulation).backward()
                if step == index == 0:
                    self.first_ratio_error = float((ratio - 1).abs().max())
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The micro-batch's loss (scalar) and ratios (B,)."""
        inputs = (rows["latents"], rows["timesteps"], rows["embeds"], rows["negative"])
        noise_pred = self._predict(self.unet, *inputs)
        reference = self.predict(self.reference, *inputs)
        mean, std = ddim_gaussian(self.scheduler, noise_pred, rows["timesteps"], rows["latents"])
        ratio = (log_density(mean, std, rows["next_latents"]) - rows["log_prob"]).exp()
        clip = self.settings.clip_range
        surrogate = (rows["advantage"] * ratio.clamp(1 - clip, 1 + clip)).mean()
        penalty = (noise_pred - reference).square().mean()
        return self.settings.kl_weight * penalty - surrogate, ratio.detach()

    def export(self, folder: Path) -> None:
        """Write the adapter as diffusers writes LoRAs."""
        from peft.utils import get_peft_model_state_dict

        self.pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(self.unet))


def start(settings: Settings, meter: Meter) -> tuple[Callable[[], dict[str, Any]], Callable[[Path], None]]:
    from dblightning import miniature
    from dblightning.miniature import rewards, world

    trainer = NaiveTrainer(
        settings, rewards.ShapeAesthetic().score, world.train_prompts(), str(miniature.path()), meter
    )
    return trainer.round, trainer.export


if __name__ == "__main__":
    serve(start)
