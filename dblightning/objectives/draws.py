"""Draws of the forward process: final samples noised anew, reproducibly and whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dblightning.noise import ImageNoise, image_seed
from dblightning.replay import Transitions
from dblightning.solvers import GaussianSolver

#: prompt id of the empty prompt
NO_PROMPT = -1


@dataclass(frozen=True)
class Draws:
    """Noise levels and noises of one rollout's samples.

    A sample's levels are a random order of the trained steps, gone through from draw to draw and pass to pass. Both
    depend on the sample's place among all ranks', its draw and the pass alone.
    """

    seed: int  # of the run
    rollout: int
    per_sample: int  # draws per sample and pass
    steps: int  # levels: steps 0 … this − 1
    text_dropout: float = 0.0  # share of draws without their prompt

    def __call__(
        self, solver: GaussianSolver, samples: Transitions, places: Sequence[int], draws: Sequence[int], visit: int
    ) -> Transitions:
        """The samples, noised.

        Args:
            solver: whose steps' noise levels are drawn.
            samples: the last step of each, (B, …).
            places: of each among all ranks' samples of the rollout.
            draws: number of each draw, 0 … ``per_sample`` − 1.
            visit: number of the pass.

        Returns:
            ``samples`` with x_t for ``latents``, t for ``step_index`` and x₀, the sample, for ``next_latents``.
        """
        numbers = [visit * self.per_sample + draw for draw in draws]
        level = torch.tensor([self._level(*pair) for pair in zip(places, numbers, strict=True)])
        x0 = samples.next_latents
        seeds = [
            image_seed(self.seed, self.rollout, place, f"draw {n}") for place, n in zip(places, numbers, strict=True)
        ]
        noise = ImageNoise(seeds, x0.device)(x0.shape[1:])
        prompt_id = samples.prompt_id
        if self.text_dropout > 0:
            dropped = [torch.rand((), generator=torch.Generator().manual_seed(seed ^ 1)) for seed in seeds]
            prompt_id = torch.where(torch.stack(dropped) < self.text_dropout, NO_PROMPT, prompt_id)
        latents = solver.noised(x0, noise, level).to(x0)
        return samples._replace(latents=latents, step_index=level, prompt_id=prompt_id)

    def _level(self, place: int, number: int) -> int:
        cycle, position = divmod(number, self.steps)
        generator = torch.Generator().manual_seed(image_seed(self.seed, self.rollout, place, f"levels {cycle}"))
        return int(torch.randperm(self.steps, generator=generator)[position])
