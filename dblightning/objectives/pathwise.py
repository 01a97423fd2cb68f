"""Sampled trajectories from end to start: the adjoint of each step, and its share of the adapters' gradients.

The loss of an image is (−w · r + α · Σ KL) · f. The *adjoint* a_t is its gradient at x_t: a_0 = −w f ∂r/∂x₀, and each
step is run anew from its stored x_t to give a_t, and the gradient of the adapter that sampled it, from a_{t−1}. The
rows of several adapters run together, each under gates of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.gaussian_step import gaussian_kl
from dblightning.objectives.base import Metrics
from dblightning.objectives.policy import AdapterPolicy
from dblightning.replay import ABSENT, Transitions


class Paths(NamedTuple):
    """Sampled trajectories of B images, to go back along."""

    latents: Tensor  # (T + 1, B, C, h, w) float32, from noise to image
    prompt_id: Tensor  # (B,) int64, on the CPU
    seed: Tensor  # (B,) int64, on the CPU: of the image's noise
    run_seed: int = 0
    visit: int = 0  # updates that were made of this rollout before
    adapter: Tensor = ABSENT  # (B,) int64, on the CPU: place of the adapter that sampled each; absent: the only one

    def at(self, rows: Tensor) -> Paths:
        """Some of them: ``rows`` is int64 (n,), on the CPU."""
        latents, adapter = self.latents[:, rows.to(self.latents.device)], self.adapter
        adapter = adapter if adapter is ABSENT else adapter[rows]
        return self._replace(latents=latents, prompt_id=self.prompt_id[rows], seed=self.seed[rows], adapter=adapter)

    def places(self) -> Tensor:
        """The place of each one's adapter, int64 (B,)."""
        return torch.zeros_like(self.prompt_id) if self.adapter is ABSENT else self.adapter

    def steps(self, latents: Tensor, step_index: Tensor, path: Tensor) -> Transitions:
        """Steps to run, of which only what is given is known.

        Args:
            latents: where they begin, (n, C, h, w).
            step_index: int64 (n,), on the CPU.
            path: the trajectory of each, int64 (n,), on the CPU.
        """
        none, known = latents.new_zeros(len(latents)), self.prompt_id[path]
        adapter = self.adapter if self.adapter is ABSENT else self.adapter[path]
        return Transitions(latents, latents, step_index, none, none, none, none, known, none, adapter=adapter)


class Ends(NamedTuple):
    """Latents of which the reward is taken, N ≥ B of them, and where they come from; without gradients."""

    latents: Tensor  # (N, C, h, w)
    path: Tensor  # (N,) int64, on the CPU: the trajectory of each
    first: Tensor  # (N,) int64, on the CPU: the first step that the gradient reaches
    state: Tensor | None = None  # (N, C, h, w), x_t whose x̂₀ they are, t = first; None: they are the last latents

    def at(self, rows: Tensor) -> Ends:
        """Some of them: ``rows`` is int64 (n,), on the CPU."""
        at = rows.to(self.latents.device)
        state = None if self.state is None else self.state[at]
        return Ends(self.latents[at], self.path[rows], self.first[rows], state)


class Terms(NamedTuple):
    """What an adapter's loss is made of: (−``reward_weight`` · r + ``kl_weight`` · Σ KL) · ``factor``, summed."""

    reward_weight: float
    kl_weight: float  # 0: the KL is measured, if at all, without a gradient
    factor: float  # one over the number of images, times a loss scale
    with_kl: bool = True  # whether the base model is run
    clip_reward_gradient: float | None = None
    clip_adjoint: float | None = None


class RowTerms(NamedTuple):
    """The terms of N ends, a number for each."""

    factor: Tensor  # (N,)
    reward: Tensor  # (N,), what −r counts
    kl: Tensor  # (N,), what the KL counts
    reward_limit: Tensor | None  # (N,), of the norm of ∂r; None: none has one
    adjoint_limit: Tensor | None  # (N,)
    watched: Tensor  # bool (N,), on the CPU: whose KL is computed
    paid: bool  # whether any of them pays for it

    @classmethod
    def of(cls, terms: Sequence[Terms], places: Tensor, like: Tensor) -> RowTerms:
        """Those of rows whose adapters are at ``places``, int64 (N,); numbers of ``like``'s device and dtype."""

        def numbers(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=like.dtype)[places].to(like.device)

        def limits(values: Sequence[float | None]) -> Tensor | None:
            given = [float("inf") if value is None else value for value in values]
            return None if all(value is None for value in values) else numbers(given)

        return cls(
            numbers([each.factor for each in terms]),
            numbers([each.reward_weight * each.factor for each in terms]),
            numbers([each.kl_weight * each.factor for each in terms]),
            limits([each.clip_reward_gradient for each in terms]),
            limits([None if each.clip_adjoint is None else each.clip_adjoint * each.factor for each in terms]),
            torch.tensor([each.with_kl for each in terms])[places],
            any(each.with_kl and each.kl_weight > 0 for each in terms),
        )


@dataclass(eq=False)
class WayBack:
    """From N ends back along their trajectories; gradients are added to the adapters'.

    Args:
        policy: the denoiser.
        paths: B trajectories.
        ends: N, of these trajectories.
        gradient: ∂r/∂latents at the ends, each of its own adapter's reward, (N, C, h, w).
        terms: of each adapter's loss, by its place.
        trained_steps: steps from this one on pass gradients back and train nothing.
        chance: how likely a step, by its index, is among those with a gradient.
        precise_kl: compute the KL in float32 arithmetic, also where the model's is coarser.
    """

    policy: AdapterPolicy
    paths: Paths
    ends: Ends
    gradient: Tensor
    terms: Sequence[Terms]
    trained_steps: int
    chance: Callable[[int], float]
    precise_kl: bool = True

    def __post_init__(self) -> None:
        self.places = self.paths.places()[self.ends.path]
        self.row = RowTerms.of(self.terms, self.places, self.gradient)
        self.adjoint = -_each(self.row.reward, self.gradient) * clipped(self.gradient, self.row.reward_limit)
        self.kl = torch.zeros(len(self.gradient), device=self.gradient.device)  # nats, of the steps so far

    def go(self) -> list[Metrics]:
        """Go back; what to log about each adapter, by its place: nothing of one without a row."""
        if self.ends.state is not None:
            self._jump(self.ends.state)
        else:
            for step_index in reversed(range(int(self.ends.first.min()), len(self.paths.latents) - 1)):
                self._step(step_index)
        return [self._logged(place) for place in range(len(self.terms))]

    def _step(self, step: int) -> None:
        """One step of the chain: the adjoints behind it become those before it."""
        policy, ends = self.policy, self.ends
        rows = (ends.first <= step).nonzero().flatten()
        at = rows.to(self.adjoint.device)
        trained = step < self.trained_steps
        with torch.enable_grad():
            latents = self.paths.latents[step, ends.path[rows].to(self.adjoint.device)].clone()
            latents.requires_grad_(step > int(ends.first.min()))
            taken = self.paths.steps(latents, torch.full_like(rows, step), ends.path[rows])
            output = policy.output(taken, policy.adapter)
            made = policy.solver.gaussian(output, latents, taken.step_index)
            loss = (self.adjoint[at] * made.mean).sum()
            if trained:
                loss = loss + self._penalty(taken, output, rows, self.chance(step))
        if trained:
            loss.backward()
        before = latents.grad if trained else torch.autograd.grad(loss, latents)[0]
        if before is not None:
            limit = self.row.adjoint_limit
            self.adjoint[at] = clipped(before, None if limit is None else limit[at])

    def _jump(self, state: Tensor) -> None:
        """From x̂₀ to the one step that made it."""
        policy, ends = self.policy, self.ends
        with torch.enable_grad():
            taken = self.paths.steps(state, ends.first, ends.path)
            output = policy.output(taken, policy.adapter)
            loss = (self.adjoint * policy.solver.original(output, state, ends.first)).sum()
            rows = torch.arange(len(ends.path))
            loss = loss + self._penalty(taken, output, rows, self.chance(self.trained_steps - 1))
        loss.backward()

    def _penalty(self, taken: Transitions, output: Tensor, rows: Tensor, chance: float) -> Tensor | float:
        """What steps of the ends ``rows`` pay for their KL, a scalar; it is added up too, divided by their chance."""
        seen = self.row.watched[rows].nonzero().flatten()
        if not len(seen):
            return 0.0
        if len(seen) < len(rows):
            taken, output, rows = taken.at(seen), output[seen.to(output.device)], rows[seen]
        at, kl = rows.to(self.kl.device), self._kl(taken, output)
        self.kl[at] += kl.detach() / chance
        return (self.row.kl[at] * kl).sum() if self.row.paid else 0.0

    def _kl(self, taken: Transitions, output: Tensor) -> Tensor:
        """Exact KL of steps to the base model's, (n,), nats; with its gradients if it is paid for.

        It has two: by way of the adapter, and by way of x_t, on which both predictions depend.
        """
        policy, paid = self.policy, self.row.paid
        with torch.set_grad_enabled(paid):
            with torch.set_grad_enabled(paid and taken.latents.requires_grad):
                reference = policy.output(taken, None)
            output = output if paid else output.detach()
            if self.precise_kl and not policy.in_float32(output.device):
                # the float32 values with the gradients of the forwards at hand, as in :class:`kl.KLTerm`
                with torch.no_grad():
                    exact = policy.output(taken, policy.adapter, float32=True)
                    exact_reference = policy.output(taken, None, float32=True)
                output = exact + (output - output.detach())
                reference = exact_reference + (reference - reference.detach())
            pair = (policy.solver.gaussian(each, taken.latents, taken.step_index) for each in (output, reference))
            return gaussian_kl(*pair)

    def _logged(self, place: int) -> Metrics:
        own = (self.places == place).nonzero().flatten().to(self.kl.device)
        if not len(own):
            return {}
        norms = self.gradient[own].flatten(1).norm(dim=1)
        found = {
            "train/reward_gradient_norm": norms.mean(),
            "train/reward_gradient_norm_max": norms.max(),
            "train/adjoint_norm": (self.adjoint[own].flatten(1).norm(dim=1) / self.row.factor[own]).mean(),
        }
        return found | ({"train/kl": self.kl[own].mean()} if self.terms[place].with_kl else {})


def clipped(vectors: Tensor, limit: Tensor | float | None) -> Tensor:
    """Each row of (N, …) shortened to a norm of at most ``limit``, one or (N,) of them; None clips none.

    >>> clipped(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if limit is None:
        return vectors
    return vectors * _each((limit / vectors.flatten(1).norm(dim=1)).clamp_max(1), vectors)


def _each(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (N,) as factors of (N, …)."""
    return numbers.view(-1, *[1] * (like.ndim - 1))
