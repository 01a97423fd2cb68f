"""The policy of an update: the denoiser under the gates of the adapter in training, of none, or of an earlier one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dblightning.backbone import Backbone
from dblightning.precision import computes_in_float32, float32_arithmetic
from dblightning.replay import Transitions
from dblightning.schedule import GaussianStep
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import SamplingSettings


class AdapterPolicy:
    """One denoiser, whose adapters' gates make it the current policy, the reference or an old policy.

    Args:
        backbone: the denoiser and its adapters.
        solver: of the rollouts.
        adapter: name of the adapter in training.
        sampling: guidance and negative prompt of the rollouts.
        texts: gives the prompts of prompt ids, int64 (B,).
        old_adapter: name of the frozen adapter behind :meth:`old`, if there is one.
    """

    def __init__(
        self,
        backbone: Backbone,
        solver: GaussianSolver,
        adapter: str,
        sampling: SamplingSettings,
        texts: Callable[[Tensor], list[str]],
        old_adapter: str | None = None,
    ) -> None:
        self.backbone = backbone
        self.solver = solver
        self.adapter = adapter
        self.sampling = sampling
        self.texts = texts
        self.old_adapter = old_adapter
        self._latest: tuple[Transitions, Tensor, GaussianStep] | None = None

    def current(self, transitions: Transitions) -> Tensor:
        """The output with the adapter, with gradients; computed once for the same transitions."""
        return self._run(transitions)[1]

    def step(self, transitions: Transitions) -> GaussianStep:
        """The step that :meth:`current` makes."""
        return self._run(transitions)[2]

    def _run(self, transitions: Transitions) -> tuple[Transitions, Tensor, GaussianStep]:
        if self._latest is None or self._latest[0] is not transitions:
            output = self.output(transitions, self.adapter)
            step = self.solver.gaussian(output, transitions.latents, transitions.step_index)
            self._latest = transitions, output, step
        return self._latest

    def forget(self) -> None:
        """Let go of the output that :meth:`current` keeps; at the end of a loss, before the weights move."""
        self._latest = None

    @torch.no_grad()
    def reference(self, transitions: Transitions, float32: bool = False) -> Tensor:
        """The base model's output: the same network with its gates at zero."""
        return self.output(transitions, None, float32)

    @torch.no_grad()
    def old(self, transitions: Transitions) -> Tensor:
        """The output with the frozen earlier adapter.

        Raises:
            ValueError: there is none.
        """
        if self.old_adapter not in self.backbone.adapters.names:
            raise ValueError(
                f"there is no adapter of an old policy, got old_adapter={self.old_adapter!r}; "
                f"adapters are {self.backbone.adapters.names}"
            )
        return self.output(transitions, self.old_adapter)

    def in_float32(self, device: torch.device) -> bool:
        """Whether outputs are computed in full float32 anyway."""
        return computes_in_float32(self.backbone, device)

    def output(self, transitions: Transitions, adapter: str | None, float32: bool = False) -> Tensor:
        """The model's output with one adapter, or None; ``float32``: in float32 whatever the weights' precision."""
        device = transitions.latents.device
        conditioning = self.backbone.encode(self.texts(transitions.prompt_id), self.sampling.negative_prompt)
        timesteps = self.solver.timesteps[transitions.step_index].to(device, non_blocking=True)
        guidance_scale, gates = self.sampling.guidance_scale, self._gates(adapter, transitions)
        if not float32:
            return self.backbone.denoise(transitions.latents, timesteps, conditioning, guidance_scale, gates=gates)
        conditioning = conditioning.to(torch.float32)
        with float32_arithmetic(device):
            return self.backbone.denoise(transitions.latents, timesteps, conditioning, guidance_scale, gates=gates)

    def _gates(self, adapter: str | None, transitions: Transitions) -> Tensor | None:
        """One-hot (B, m); None where every gate is zero."""
        if adapter is None:
            return None
        names = self.backbone.adapters.names
        gates = torch.zeros(len(transitions.latents), len(names), device=transitions.latents.device)
        gates[:, names.index(adapter)] = 1
        return gates
