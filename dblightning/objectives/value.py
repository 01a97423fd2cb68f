"""The value function V(x_t, prompt, t): the expected final reward from here on, the policy gradient's baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ValueFunction(nn.Module):
    """DPOK's value network: three linear layers, each output multiplied by a learned embedding of the step.

    Args:
        latent_shape: (C, h, w).
        text_dim: size of the prompt's vector.
        num_steps: number of denoising steps T.
        width: hidden size (paper's code: 256).
    """

    def __init__(self, latent_shape: Sequence[int], text_dim: int, num_steps: int, width: int = 256) -> None:
        super().__init__()
        sizes = [math.prod(latent_shape) + text_dim, width, width]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.steps = nn.ModuleList(nn.Embedding(num_steps, width) for _ in sizes)
        self.head = nn.Linear(width, 1)
        for linear in (*self.layers, self.head):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        for embedding in self.steps.parameters():
            nn.init.uniform_(embedding)

    def forward(self, latents: Tensor, text: Tensor, step_index: Tensor) -> Tensor:
        """Value of each state.

        Args:
            latents: x_t, (B, C, h, w).
            text: the prompt's vector, (B, text_dim).
            step_index: 0 … T−1, int64 (B,).

        Returns:
            (B,), in the reward's units.
        """
        hidden = torch.cat([latents.flatten(1), text.to(latents.dtype)], dim=1)
        for linear, embedding in zip(self.layers, self.steps, strict=True):
            hidden = torch.relu(linear(hidden) * embedding(step_index))
        return self.head(hidden).squeeze(1)
