"""The pathwise gradient of eq. (4): a differentiable reward followed back through decoder and denoising steps.

A step is x_{t−1} = μ_θ(x_t, t) + σ_t z with z fixed, so an image is a differentiable function of the adapter, and

    ∇_θ [r(x₀) − α Σ_t KL_t],   KL_t = ‖μ_θ(x_t) − μ_pre(x_t)‖² / (2σ_t²)

is computed along sampled trajectories from their end to their start. The *adjoint* a_t is the loss's gradient at x_t:
a_0 = −∂r/∂x₀, and each step is run anew from its stored x_t to give a_t, and its share of ∇_θ, from a_{t−1}.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dblightning.gaussian_step import gaussian_kl
from dblightning.noise import image_seed
from dblightning.objectives.base import Metrics, Objective, Policy
from dblightning.objectives.policy import AdapterPolicy
from dblightning.replay import Transitions
from dblightning.settings import check, check_settings, rules_of
from dblightning.steering import Reward
from dblightning.training_rules import gradient_problems
from dblightning.training_settings import TrainingSettings

Variant = Literal["draft", "draft_lv", "alignprop", "refl"]

#: updates whose gradient norms the median of ``clip_to_median`` is taken over, and fewest of them
NORMS_KEPT, FEWEST_NORMS = 32, 5


class Paths(NamedTuple):
    """Sampled trajectories of B images, to go back along."""

    latents: Tensor  # (T + 1, B, C, h, w) float32, from noise to image
    prompt_id: Tensor  # (B,) int64, on the CPU
    seed: Tensor  # (B,) int64, on the CPU: of the image's noise
    run_seed: int = 0
    visit: int = 0  # updates that were made of this rollout before

    def at(self, rows: Tensor) -> Paths:
        """Some of them: ``rows`` is int64 (n,), on the CPU."""
        latents = self.latents[:, rows.to(self.latents.device)]
        return self._replace(latents=latents, prompt_id=self.prompt_id[rows], seed=self.seed[rows])


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
    """What the loss is made of: (−``reward_weight`` · r + ``kl_weight`` · Σ KL) · ``factor``, summed over images."""

    reward_weight: float
    kl_weight: float  # 0: the KL is measured, if at all, without a gradient
    factor: float  # one over the number of images, times a loss scale
    trained_steps: int  # steps from this one on pass gradients back and train nothing
    with_kl: bool = True  # whether the base model is run
    precise_kl: bool = True  # in float32 arithmetic, also where the model's is coarser


@dataclass
class RewardGradient(Objective):
    """The pathwise gradient of eq. (4), of a differentiable reward, on a rollout's own images.

    Variants differ in the steps that a gradient reaches:

    * "draft": the last ``steps`` of the chain, all of them by default (DRaFT and DRaFT-K, Clark et al. 2024, "Directly
      fine-tuning diffusion models on differentiable rewards").
    * "draft_lv": the last step alone, averaged over ``draws`` fresh noises on the finished image (DRaFT-LV, same).
    * "alignprop": the last K, drawn for each image from 1 … ``steps`` (AlignProp, Prabhudesai et al. 2023).
    * "refl": one of the last ``steps`` drawn for each image, whose x̂₀ is scored: no chain (ReFL, Xu et al. 2023,
      "ImageReward", section 3.3). Only here may a rollout make several updates (``optimisation.policy_steps``), each
      of another step of every trajectory, which is that of the policy that sampled.

    The whole chain is an unbiased gradient of eq. (4). The others leave out what earlier steps could do about the
    reward, and the KL of steps without a gradient; α keeps its meaning for each step that has one.

    Args:
        variant: see above.
        steps: how many steps; null is the whole chain, and for "refl" its last quarter.
        draws: noises per image of "draft_lv".
        clip_reward_gradient: largest norm of ∂r/∂x₀ of an image; longer ones are shortened. null clips none.
        clip_adjoint: largest norm of an image's adjoint between two steps, likewise, in units of the loss.
        clip_to_median: largest gradient norm of an update, in medians of the latest 32 updates' norms. null clips
            none beside ``optimisation.clip_grad_norm``.

    Raises:
        ValueError: settings out of range.
    """

    variant: Variant = "draft"
    steps: int | None = None
    draws: int = 2
    clip_reward_gradient: float | None = None
    clip_adjoint: float | None = None
    clip_to_median: float | None = None

    needs = "gradients"
    several = False

    def __post_init__(self) -> None:
        check_settings(vars(self), rules_of("objective"))
        variants = ("draft", "draft_lv", "alignprop", "refl")
        check(self.variant in variants, f"variant must be one of {', '.join(variants)}, got {self.variant!r}")
        self._norms: list[float] = []  # of the latest updates

    def check_reward(self, reward: Reward) -> None:
        stuck = _without_gradient(reward)
        check(
            not stuck,
            f"RewardGradient follows the reward's gradient, and {' and '.join(stuck)} has none; train on it with DPOK "
            "or PPO, or take a differentiable reward",
        )

    def check(self, settings: TrainingSettings) -> None:
        for problem in gradient_problems(dict(settings.groups()), vars(self)):
            raise ValueError(problem)

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """Not used: the training module calls :meth:`ends` and :meth:`backward`."""
        raise NotImplementedError("RewardGradient trains on whole trajectories with ends and backward")

    # ── where rewards are taken ──────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def ends(self, policy: AdapterPolicy, paths: Paths, trained_steps: int) -> Ends:
        """The latents whose reward is differentiated.

        Args:
            policy: the denoiser.
            paths: B trajectories.
            trained_steps: steps 0 … this − 1 are trained.
        """
        last, rows = paths.latents[-1], torch.arange(len(paths.prompt_id))
        span = self.span(trained_steps)
        if self.variant == "draft":
            return Ends(last, rows, torch.full_like(rows, trained_steps - span))
        if self.variant == "alignprop":
            return Ends(last, rows, trained_steps - 1 - self._draw(paths, span))
        if self.variant == "refl":
            step_index = trained_steps - 1 - self._draw(paths, span)
            state = paths.latents[step_index.to(last.device), rows.to(last.device)]
        else:
            rows = rows.repeat_interleave(self.draws)
            step_index = torch.full_like(rows, trained_steps - 1)
            noise = torch.cat(
                [torch.randn(self.draws, *last.shape[1:], generator=each) for each in self._generators(paths)]
            )
            clean = last.repeat_interleave(self.draws, 0)
            state = policy.solver.noised(clean, noise.to(last), step_index)
        output = policy.output(_steps(state, step_index, paths.prompt_id[rows]), policy.adapter)
        return Ends(policy.solver.original(output, state, step_index), rows, step_index, state)

    def span(self, trained_steps: int) -> int:
        """How many steps a gradient can reach."""
        if self.variant == "draft_lv":
            return 1
        whole = max(1, trained_steps // 4) if self.variant == "refl" else trained_steps
        return whole if self.steps is None else min(self.steps, trained_steps)

    def _chance(self, step_index: int, trained_steps: int) -> float:
        """How likely a step is among those with a gradient, for those that can be."""
        span = self.span(trained_steps)
        if self.variant == "alignprop":
            return (span - (trained_steps - step_index) + 1) / span
        return 1 / span if self.variant == "refl" else 1.0

    def _generators(self, paths: Paths) -> list[torch.Generator]:
        """One per image, whatever the batch."""
        stream = f"reward gradient {paths.visit}" if paths.visit else "reward gradient"
        keys = zip(paths.prompt_id.tolist(), paths.seed.tolist(), strict=True)
        return [torch.Generator().manual_seed(image_seed(paths.run_seed, *key, stream)) for key in keys]

    def _draw(self, paths: Paths, count: int) -> Tensor:
        """A number in 0 … count − 1 for each image, int64 (B,)."""
        return torch.cat([torch.randint(count, (1,), generator=each) for each in self._generators(paths)])

    # ── the way back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def backward(self, policy: AdapterPolicy, paths: Paths, ends: Ends, gradient: Tensor, terms: Terms) -> Metrics:
        """Add the loss's gradient to the adapter's, one step after the other; what to log about it.

        Args:
            policy: the denoiser.
            paths: B trajectories.
            ends: N, of these trajectories.
            gradient: ∂r/∂latents at the ends, (N, C, h, w).
            terms: of the loss.
        """
        draws = self.draws if self.variant == "draft_lv" else 1
        terms = terms._replace(factor=terms.factor / draws)
        norms = gradient.flatten(1).norm(dim=1)
        adjoint = -terms.reward_weight * terms.factor * clipped(gradient, self.clip_reward_gradient)
        kl = torch.zeros(len(gradient), device=gradient.device)
        if ends.state is not None:
            self._jump_back(policy, paths, ends, adjoint, terms, kl)
        else:
            for step_index in reversed(range(int(ends.first.min()), len(paths.latents) - 1)):
                self._step_back(policy, paths, ends, adjoint, terms, kl, step_index)
        logged = {
            "train/reward_gradient_norm": norms.mean(),
            "train/reward_gradient_norm_max": norms.max(),
            "train/adjoint_norm": adjoint.flatten(1).norm(dim=1).mean() / terms.factor,
        }
        return logged | ({"train/kl": kl.mean()} if terms.with_kl else {})

    def _step_back(
        self, policy: AdapterPolicy, paths: Paths, ends: Ends, adjoint: Tensor, terms: Terms, kl: Tensor, step: int
    ) -> None:
        """One step of the chain: the adjoints behind it become those before it, in place."""
        rows = (ends.first <= step).nonzero().flatten()
        at = rows.to(adjoint.device)
        trained = step < terms.trained_steps
        with torch.enable_grad():
            latents = paths.latents[step, ends.path[rows].to(adjoint.device)].clone()
            latents.requires_grad_(step > int(ends.first.min()))
            taken = _steps(latents, torch.full_like(rows, step), paths.prompt_id[ends.path[rows]])
            output = policy.output(taken, policy.adapter)
            made = policy.solver.gaussian(output, latents, taken.step_index)
            loss = (adjoint[at] * made.mean).sum()
            if trained and terms.with_kl:
                penalty = self._kl(policy, taken, output, terms)
                kl[at] += penalty.detach() / self._chance(step, terms.trained_steps)
                if terms.kl_weight > 0:
                    loss = loss + terms.kl_weight * terms.factor * penalty.sum()
        if trained:
            loss.backward()
        before = latents.grad if trained else torch.autograd.grad(loss, latents)[0]
        if before is not None:
            limit = None if self.clip_adjoint is None else self.clip_adjoint * terms.factor
            adjoint[at] = clipped(before, limit)

    def _jump_back(
        self, policy: AdapterPolicy, paths: Paths, ends: Ends, adjoint: Tensor, terms: Terms, kl: Tensor
    ) -> None:
        """From x̂₀ to the one step that made it."""
        assert ends.state is not None
        with torch.enable_grad():
            taken = _steps(ends.state, ends.first, paths.prompt_id[ends.path])
            output = policy.output(taken, policy.adapter)
            loss = (adjoint * policy.solver.original(output, ends.state, ends.first)).sum()
            if terms.with_kl:
                penalty = self._kl(policy, taken, output, terms)
                kl += penalty.detach() / self._chance(terms.trained_steps - 1, terms.trained_steps)
                if terms.kl_weight > 0:
                    loss = loss + terms.kl_weight * terms.factor * penalty.sum()
        loss.backward()

    def _kl(self, policy: AdapterPolicy, taken: Transitions, output: Tensor, terms: Terms) -> Tensor:
        """Exact KL of steps to the base model's, (n,), nats; with its gradients if it is paid for.

        It has two: by way of the adapter, and by way of x_t, on which both predictions depend.
        """
        paid = terms.kl_weight > 0
        with torch.set_grad_enabled(paid):
            with torch.set_grad_enabled(paid and taken.latents.requires_grad):
                reference = policy.output(taken, None)
            output = output if paid else output.detach()
            if terms.precise_kl and not policy.in_float32(output.device):
                # the float32 values with the gradients of the forwards at hand, as in :class:`kl.KLTerm`
                with torch.no_grad():
                    exact = policy.output(taken, policy.adapter, float32=True)
                    exact_reference = policy.output(taken, None, float32=True)
                output = exact + (output - output.detach())
                reference = exact_reference + (reference - reference.detach())
            pair = (policy.solver.gaussian(each, taken.latents, taken.step_index) for each in (output, reference))
            return gaussian_kl(*pair)

    # ── outlying updates ─────────────────────────────────────────────────────────────────────────────────────────────

    def norm_limit(self) -> float:
        """Largest gradient norm of the coming update by ``clip_to_median``; infinite while too few are known."""
        if self.clip_to_median is None or len(self._norms) < FEWEST_NORMS:
            return float("inf")
        return self.clip_to_median * statistics.median(self._norms)

    def saw_norm(self, norm: float) -> None:
        """Take note of an update's gradient norm, before clipping."""
        if self.clip_to_median is not None:
            self._norms = [*self._norms, norm][-NORMS_KEPT:]

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms = list(state.get("norms", []))


def clipped(vectors: Tensor, limit: float | None) -> Tensor:
    """Each row of (N, …) shortened to a norm of at most ``limit``; None clips none.

    >>> clipped(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if limit is None:
        return vectors
    norms = vectors.flatten(1).norm(dim=1).clamp_min(limit)
    return vectors * (limit / norms).view(-1, *[1] * (vectors.ndim - 1))


def _steps(latents: Tensor, step_index: Tensor, prompt_id: Tensor) -> Transitions:
    """Steps to run, of which only these are known."""
    none = latents.new_zeros(len(latents))
    return Transitions(latents, latents, step_index, none, none, none, none, prompt_id, none)


def _without_gradient(reward: Reward) -> list[str]:
    """Names of the rewards that have no gradient, of a reward or of a weighted sum's parts."""
    parts: dict[str, Any] = dict(getattr(reward, "rewards", {}) or {})
    if reward.differentiable:
        return []
    inner = [name for name, part in parts.items() if not part.differentiable]
    return [repr(name) for name in inner] or [getattr(reward, "name", type(reward).__name__)]
