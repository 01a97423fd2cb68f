"""RGG, and every steering by name: what modifies a step at inference; no fine-tuned model is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dblightning.backbone import Backbone
from dblightning.blending import METHODS, Blend
from dblightning.methods import check_options, load_method
from dblightning.sampling import Run, State, Steering
from dblightning.search import RULES, BestOfN, CoDe, Reward, RewardSteering
from dblightning.settings import check_settings
from dblightning.weights import BatchWeights

__all__ = [
    "RGG",
    "STEERING",
    "BestOfN",
    "CoDe",
    "Reward",
    "make_steering",
    "method_class",
    "resolve_steering",
    "reward_gradients",
    "steers",
]


def reward_gradients(
    backbone: Backbone, rewards: Sequence[Reward], latents: Tensor, x: Tensor, prompts: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (B,) of decoded latents and their gradient at ``x``, for each reward.

    Args:
        backbone: it decodes.
        rewards: differentiable ones.
        latents: (B, C, h, w), a function of ``x``.
        x: (B, …), requires gradients.
        prompts: B texts.
    """
    images = backbone.decode(latents)
    for index, reward in enumerate(rewards, start=1):
        score = reward.score(images, prompts)
        if not score.requires_grad:
            raise ValueError(
                f"the reward {_name(reward)} says that it is differentiable, and its scores have no gradient"
            )
        (gradient,) = torch.autograd.grad(score.sum(), x, retain_graph=index < len(rewards))
        yield score.detach(), gradient


def _name(reward: Reward) -> str:
    return str(getattr(reward, "name", type(reward).__name__))


class RGG(RewardSteering):
    """Reward-gradient guidance, paper eqs. (12)-(14): the mean of a step moves by λ σ_t² / α · ∇_{x_t} r(x̂₀(x_t)).

    Args:
        rewards, weights, normalize: what to raise; every reward must be differentiable.
        normalization: of each reward's gradient before they are mixed: "global", eq. (14)'s norm over a whole image's
            latents; "pixel", as the paper's code does, unit norm over the channels of each latent pixel (√(h·w) times
            longer, and α has no effect, for the code divides by α before it normalises); "none", eq. (13).
        kl_weight: α > 0, the smaller the stronger.
        gamma: γ ≥ 0 of the ramp λ_i = min((1 + γ)^i − 1, 1) at step i (0 … T − 1); None is λ = 1 throughout. The paper
            prints (1 + γ)^(t−1) and its code computes the former, with γ = 0.024.
        reference_steps: number of denoising steps that γ was chosen for (paper: 50), so that a run of T steps has
            (1 + γ)^(``reference_steps`` / T) − 1 in its place and the same ramp over the whole of it; None leaves γ as
            it is.
        through_denoiser: back-propagate through the denoiser as well (as DAS does; much memory); otherwise ε is a
            constant, as in the paper's code.

    The run's ``max_rows`` limits the images whose gradients are computed at once.

    Raises:
        ValueError: a reward without a gradient, named; or an argument out of range.
    """

    no_kl = None  # its steps are Gaussians of a shifted mean

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None = None,
        normalization: str = "global",
        kl_weight: float = 0.1,
        gamma: float | None = 0.024,
        through_denoiser: bool = False,
        normalize: bool = False,
        reference_steps: int | None = None,
    ) -> None:
        super().__init__(rewards, weights, normalize)
        stuck = [name for name, reward in self.rewards.items() if not reward.differentiable]
        if stuck:
            kind = _name(self.rewards[stuck[0]])
            raise ValueError(f"RGG follows gradients, and the reward {stuck[0]!r} ({kind}) has none; use CoDe for it")
        if normalization not in ("global", "pixel", "none"):
            raise ValueError(f"normalization must be 'global', 'pixel' or 'none', got {normalization!r}")
        check_settings({"kl_weight": kl_weight, "gamma": gamma, "reference_steps": reference_steps}, RULES)
        if not isinstance(through_denoiser, bool):
            raise ValueError(f"through_denoiser must be true or false, got {through_denoiser!r}")
        self.normalization = normalization
        self.kl_weight = kl_weight
        self.gamma = gamma
        self.through_denoiser = through_denoiser
        self.reference_steps = reference_steps

    def ramp(self, step_index: int, num_steps: int | None = None) -> float:
        """λ_i of a run of ``num_steps``, which counts only with ``reference_steps``."""
        if self.gamma is None:
            return 1.0
        pace = 1.0 if self.reference_steps is None or num_steps is None else self.reference_steps / num_steps
        # in logarithms first: (1 + γ)^i overflows
        if step_index * pace * math.log1p(self.gamma) >= math.log(2):
            return 1.0
        return float((1 + self.gamma) ** (step_index * pace) - 1)

    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        solver: Any = run.solver
        latents = state.latents
        scale = self.ramp(step_index, run.num_steps)
        if scale == 0:
            with torch.no_grad():
                output = run.predict(latents, step_index)
            return output, State(solver.step(output, latents, step_index, run.noise))
        output, gradient = self._gradient(run, step_index, latents)
        with torch.no_grad():
            alpha = 1.0 if self.normalization == "pixel" else self.kl_weight
            variance = solver.gaussian(output, latents, step_index).std.square()
            following = solver.step(output, latents, step_index, run.noise)
            shift = scale * variance / alpha * gradient
            return output, State(following + shift, shift=shift)

    def _gradient(self, run: Run, step_index: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and Σ_i w_i g_i for all images, some at a time."""
        assert run.prompts is not None
        outputs, gradients = [], []
        if not self.through_denoiser:
            with torch.no_grad():
                whole = run.predict(latents, step_index)
        size = run.max_rows or len(latents)
        for start in range(0, len(latents), size):
            part = slice(start, min(start + size, len(latents)))
            # inference mode (Lightning's test and predict) would forbid gradients altogether
            with torch.inference_mode(False), torch.enable_grad():
                x = latents[part].detach().clone().requires_grad_()
                if self.through_denoiser:
                    output = run.images(part).predict(x, step_index)
                    original = run.solver.original(output, x, step_index)  # type: ignore[attr-defined]
                else:
                    output = whole[part].detach().clone()
                    original = run.solver.original(output, x, step_index, detach=True)  # type: ignore[attr-defined]
                total = torch.zeros_like(x)
                used = [self.rewards[name] for _, name in self._used]
                found = reward_gradients(run.backbone, used, original, x, run.prompts[part])
                for (index, _), (_, gradient) in zip(self._used, found, strict=True):
                    weight = self._table[part, index].to(x.device).view(-1, 1, 1, 1)
                    total = total + weight * self._normalized(gradient)
            outputs.append(output.detach())
            gradients.append(total.detach())
        return torch.cat(outputs), torch.cat(gradients)

    def _normalized(self, gradient: Tensor) -> Tensor:
        if self.normalization == "none":
            return gradient
        dims = (1, 2, 3) if self.normalization == "global" else 1
        norm = gradient.square().sum(dims, keepdim=True).sqrt()
        return torch.where(norm > 0, gradient / norm, 0)


#: method name → class, for the command line and the pipeline; a name added here works wherever a method is named
STEERING: dict[str, type[Steering]] = {"code": CoDe, "rgg": RGG, "best-of-n": BestOfN}


def method_class(method: str) -> type[Blend] | type[Steering]:
    """The class of any method's name or dotted path, blend or steering.

    Raises:
        ValueError: neither a name nor the path of such a class.
    """
    known: dict[str, Any] = {**METHODS, **STEERING}
    return load_method(method, known, Blend, Steering)


def steers(method: str) -> bool:
    """Whether a method's name or dotted path means a steering, which modifies another blend's steps."""
    return issubclass(method_class(method), Steering)


def resolve_steering(
    steering: Steering | type[Steering] | str,
    rewards: Mapping[str, Reward] | None = None,
    weights: BatchWeights | None = None,
    kl_scale: float | Sequence[float] = 1.0,
    normalize: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Steering:
    """The steering that an object, a method's name or a class's dotted path means; see ``blending.resolve_blend``.

    Args:
        steering: an object, a name of ``STEERING``, a class or its dotted path.
        rewards: name → reward.
        weights: reward → weight; one mapping, or one per image.
        kl_scale: must be 1, for no steering has a λ.
        normalize: divide weights by their sum.
        options: further arguments of the class.

    Raises:
        ValueError: an unknown method or option, no rewards, or settings the class refuses.
    """
    if isinstance(steering, Steering):
        given = {"rewards": rewards, "weights": weights, "method_options": options}
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{name} {value!r} beside a {type(steering).__name__}, which has its own; leave it out"
                )
        return steering
    kind = steering if isinstance(steering, type) else load_method(steering, STEERING, Steering)
    if callable(weights):
        raise ValueError(f"method {steering!r} takes weights per image, not a function of the step")
    if kl_scale != 1:
        raise ValueError(f"method {steering!r} has no kl_scale, got {kl_scale}; use db-kla, or a kl_weight where it is")
    if not rewards and issubclass(kind, RewardSteering):
        raise ValueError(f"method {steering!r} needs rewards={{name: reward}}, whose names the weights use")
    further = check_options(options, ("rewards", "weights", "normalize"))
    return kind.from_preference(rewards, weights, normalize, **further)


def make_steering(
    method: str,
    rewards: Mapping[str, Reward] | None,
    weights: BatchWeights | None = None,
    normalize: bool = False,
    **options: Any,
) -> Steering:
    """:func:`resolve_steering` of a method's name; ``options`` are its class's further arguments.

    Raises:
        ValueError: an unknown method or option, no rewards, or settings the class refuses.
    """
    return resolve_steering(method, rewards, weights, normalize=normalize, options=options)
