"""The pathwise gradient of eq. (4): a differentiable reward followed back through decoder and denoising steps.

A step is x_{t−1} = μ_θ(x_t, t) + σ_t z with z fixed, so an image is a differentiable function of the adapter, and

    ∇_θ [r(x₀) − α Σ_t KL_t],   KL_t = ‖μ_θ(x_t) − μ_pre(x_t)‖² / (2σ_t²)

is computed along sampled trajectories from their end to their start, by ``pathwise.WayBack``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dblightning.noise import image_seed
from dblightning.objectives.base import Metrics, Objective, Policy
from dblightning.objectives.pathwise import Ends, Paths, Terms, WayBack
from dblightning.objectives.policy import AdapterPolicy
from dblightning.replay import Transitions
from dblightning.settings import check, check_settings, rules_of
from dblightning.steering import Reward
from dblightning.training_rules import gradient_problems
from dblightning.training_settings import TrainingSettings

Variant = Literal["draft", "draft_lv", "alignprop", "refl"]

#: updates whose gradient norms the median of ``clip_to_median`` is taken over, and fewest of them
NORMS_KEPT, FEWEST_NORMS = 32, 5


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
    per_adapter: ClassVar[tuple[str, ...]] = ("clip_reward_gradient", "clip_adjoint", "clip_to_median")

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
            "or PPO (a basis has one objective: in a run of its own), or take a differentiable reward",
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
        output = policy.output(paths.steps(state, step_index, rows), policy.adapter)
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

    def terms(self, reward_weight: float, kl_weight: float, factor: float, with_kl: bool = True) -> Terms:
        """The terms of the loss of the adapter that this is the objective of, with its clips."""
        factor /= self.draws if self.variant == "draft_lv" else 1
        return Terms(reward_weight, kl_weight, factor, with_kl, self.clip_reward_gradient, self.clip_adjoint)

    def backward(
        self,
        policy: AdapterPolicy,
        paths: Paths,
        ends: Ends,
        gradient: Tensor,
        terms: Sequence[Terms],
        trained_steps: int,
        precise_kl: bool = True,
    ) -> list[Metrics]:
        """Add the loss's gradient to the adapters', all of them in one pass; what to log about each.

        Args:
            policy: the denoiser.
            paths: B trajectories.
            ends: N, of these trajectories.
            gradient: ∂r/∂latents at the ends, each of its own adapter's reward, (N, C, h, w).
            terms: :meth:`terms` of each adapter's objective, by its place.
            trained_steps: steps from this one on pass gradients back and train nothing.
            precise_kl: compute the KL in float32 arithmetic, also where the model's is coarser.
        """

        def chance(step_index: int) -> float:
            return self._chance(step_index, trained_steps)

        return WayBack(policy, paths, ends, gradient, terms, trained_steps, chance, precise_kl).go()

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


def _without_gradient(reward: Reward) -> list[str]:
    """Names of the rewards that have no gradient, of a reward or of a weighted sum's parts."""
    parts: dict[str, Any] = dict(getattr(reward, "rewards", {}) or {})
    if reward.differentiable:
        return []
    inner = [name for name, part in parts.items() if not part.differentiable]
    return [repr(name) for name in inner] or [getattr(reward, "name", type(reward).__name__)]
