"""The policy of an update: the denoiser under the gates of the adapter in training, of none, or of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dblightning.backbone import Backbone
from dblightning.precision import computes_in_float32, float32_arithmetic
from dblightning.replay import Transitions
from dblightning.schedule import GaussianStep
from dblightning.solvers import GaussianSolver
from dblightning.training_settings import SamplingSettings


@dataclass(eq=False)
class AdapterPolicy:
    """One denoiser, whose adapters' gates make it the current policy, the reference or an old policy.

    With several adapters in training each transition runs the one that sampled it, and transitions that are expected
    together run in one pass, each row under gates of its own.

    Args:
        backbone: the denoiser and its adapters.
        solver: of the rollouts.
        adapter: name of the adapter in training; or of several, in the order that ``Transitions.adapter`` counts.
        sampling: guidance and negative prompt of the rollouts.
        texts: gives the prompts of prompt ids, int64 (B,).
        old_adapter: name of the frozen adapter behind :meth:`old`, if there is one; or of several, as ``adapter``.
    """

    backbone: Backbone
    solver: GaussianSolver
    adapter: str | Sequence[str]
    sampling: SamplingSettings
    texts: Callable[[Tensor], list[str]]
    old_adapter: str | Sequence[str] | None = None
    _passes: list[Pass] = field(default_factory=list, init=False, repr=False)

    def expect(self, parts: Sequence[Transitions]) -> None:
        """Announce transitions that will be asked about one by one: the first question runs them all, in one pass."""
        self._passes.append(Pass(list(parts)))

    def current(self, transitions: Transitions) -> Tensor:
        """The output with the adapter, with gradients; computed once for the same transitions."""
        return self._output(transitions, "current", lambda each: self.output(each, self.adapter))

    def step(self, transitions: Transitions) -> GaussianStep:
        """The step that :meth:`current` makes."""
        known = self._pass_of(transitions)
        if id(transitions) not in known.steps:
            output = self.current(transitions)
            known.steps[id(transitions)] = self.solver.gaussian(output, transitions.latents, transitions.step_index)
        return known.steps[id(transitions)]

    def forget(self) -> None:
        """Let go of the outputs that are kept; at the end of a loss, before the weights move."""
        self._passes.clear()

    @torch.no_grad()
    def reference(self, transitions: Transitions, float32: bool = False) -> Tensor:
        """The base model's output: the same network with its gates at zero."""
        return self._output(transitions, f"reference {float32}", lambda each: self.output(each, None, float32))

    @torch.no_grad()
    def watched(self, transitions: Transitions) -> Tensor:
        """The output with the adapter in float32, without gradients."""
        return self._output(transitions, "watched", lambda each: self.output(each, self.adapter, float32=True))

    @torch.no_grad()
    def old(self, transitions: Transitions) -> Tensor:
        """The output with the frozen earlier adapter.

        Raises:
            ValueError: there is none.
        """
        old = self.old_adapter
        if old is None or any(name not in self.backbone.adapters.names for name in _listed(old)):
            raise ValueError(
                f"there is no adapter of an old policy, got old_adapter={old!r}; "
                f"adapters are {self.backbone.adapters.names}"
            )
        return self._output(transitions, "old", lambda each: self.output(each, old))

    def in_float32(self, device: torch.device) -> bool:
        """Whether outputs are computed in full float32 anyway."""
        return computes_in_float32(self.backbone, device)

    def output(self, transitions: Transitions, adapter: str | Sequence[str] | None, float32: bool = False) -> Tensor:
        """The model's output with one adapter, with each transition's own of several, or with None.

        ``float32``: in float32 whatever the weights' precision.
        """
        device = transitions.latents.device
        conditioning = self.backbone.encode(self.texts(transitions.prompt_id), self.sampling.negative_prompt)
        timesteps = self.solver.timesteps[transitions.step_index].to(device, non_blocking=True)
        guidance_scale, gates = self.sampling.guidance_scale, self._gates(adapter, transitions)
        if not float32:
            return self.backbone.denoise(transitions.latents, timesteps, conditioning, guidance_scale, gates=gates)
        conditioning = conditioning.to(torch.float32)
        with float32_arithmetic(device):
            return self.backbone.denoise(transitions.latents, timesteps, conditioning, guidance_scale, gates=gates)

    def _gates(self, adapter: str | Sequence[str] | None, transitions: Transitions) -> Tensor | None:
        """One-hot (B, m); None where every gate is zero."""
        if adapter is None:
            return None
        names, own, device = self.backbone.adapters.names, _listed(adapter), transitions.latents.device
        gates = torch.zeros(len(transitions.latents), len(names), device=device)
        if len(own) == 1:
            gates[:, names.index(own[0])] = 1
            return gates
        columns = torch.tensor([names.index(name) for name in own])[transitions.adapter]
        return gates.scatter_(1, columns.to(device, non_blocking=True)[:, None], 1.0)

    def _output(self, transitions: Transitions, kind: str, run: Callable[[Transitions], Tensor]) -> Tensor:
        """What ``run`` gives for these transitions: run once, with those expected beside them."""
        known = self._pass_of(transitions)
        if kind not in known.outputs:
            joined = run(Transitions.joined(known.parts))
            sizes = [len(part.latents) for part in known.parts]
            known.outputs[kind] = [joined] if len(sizes) == 1 else list(joined.split(sizes))
        return known.outputs[kind][known.place(transitions)]

    def _pass_of(self, transitions: Transitions) -> Pass:
        for known in self._passes:
            if known.place(transitions) >= 0:
                return known
        # of transitions that nobody announced the latest alone are kept
        self._passes = [*(known for known in self._passes if known.expected), Pass([transitions], expected=False)]
        return self._passes[-1]


class Pass:
    """Transitions that run together, and what the denoiser gave for them so far."""

    def __init__(self, parts: list[Transitions], expected: bool = True) -> None:
        self.parts = parts
        self.expected = expected
        self.outputs: dict[str, list[Tensor]] = {}  # of each kind, one per part
        self.steps: dict[int, GaussianStep] = {}  # by the id of a part, which is kept here

    def place(self, transitions: Transitions) -> int:
        """Which part these transitions are, by identity; -1: none."""
        return next((place for place, part in enumerate(self.parts) if part is transitions), -1)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
