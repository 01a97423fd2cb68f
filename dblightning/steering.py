"""CoDe and RGG: what modifies a step. Rewards steer the trajectory at inference; no fine-tuned model is needed.

Both work on top of any blend (the paper runs them on the base model) and score x̂₀, Tweedie's estimate of the image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dblightning.backbone import Backbone
from dblightning.blending import METHODS, Blend
from dblightning.methods import check_options, load_method, weights_tensor
from dblightning.sampling import Run, State, Steering
from dblightning.settings import Number, check_settings, count
from dblightning.solvers import GaussianSolver
from dblightning.weights import BatchWeights

#: of the numeric settings below
RULES = {
    "candidates": count(remedy="the paper's is 20"),
    "block_size": count(remedy="the paper's is 5"),
    "score_batch_size": count(words=(None,), remedy="null takes the backbone's decode_batch_size"),
    "kl_weight": Number(above=0, remedy="it is α: the smaller, the stronger the guidance"),
    "gamma": Number(least=0, words=(None,), remedy="the paper's is 0.024; null is no ramp"),
}


class Reward(Protocol):
    """The interface of a reward that steers; every ``RewardMetric`` has it."""

    @property
    def differentiable(self) -> bool:
        """Whether scores have a gradient with respect to images."""

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        """One score per image, (B,), of images (B, 3, H, W) in [0, 1]; higher is better."""


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
        (gradient,) = torch.autograd.grad(score.sum(), x, retain_graph=index < len(rewards))
        yield score.detach(), gradient


class _RewardSteering(Steering):
    """Base class for CoDe and RGG: rewards and preference weights.

    Args:
        rewards: name → reward.
        weights: name → weight of each reward, ≥ 0, sum 1; or a list of such, one per image. None weights a single
            reward with 1.
        normalize: divide weights by their sum.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], weights: BatchWeights | None = None, normalize: bool = False
    ) -> None:
        if not rewards:
            raise ValueError(f"{type(self).__name__} needs at least one reward, for example {{'jpeg': JPEG...()}}")
        if weights is None and len(rewards) > 1:
            raise ValueError(f"{type(self).__name__} has the rewards {list(rewards)}; give each a weight")
        self.rewards = dict(rewards)
        self.weights: BatchWeights = weights if weights is not None else dict.fromkeys(rewards, 1.0)
        self.normalize = normalize

    def start(self, run: Run) -> None:
        name = type(self).__name__
        if not isinstance(run.solver, GaussianSolver):
            raise ValueError(f"{name} needs DDIM steps, whose distribution is known; got {type(run.solver).__name__}")
        if run.solver.eta == 0:
            raise ValueError(f"{name} needs steps with noise, got eta 0; set eta to 1")
        if run.prompts is None or len(run.prompts) != run.batch:
            got = "none" if run.prompts is None else len(run.prompts)
            raise ValueError(f"{name} scores images against {run.batch} prompts, got {got}")
        table = weights_tensor(self.weights, list(self.rewards), run.batch, self.normalize, kind="rewards")
        self._table = table.float()  # (B, rewards)
        self._used = [(i, name) for i, name in enumerate(self.rewards) if bool(self._table[:, i].any())]

    @abstractmethod
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]: ...


class CoDe(_RewardSteering):
    """CoDe (Singh et al. 2025): of N candidates keep the one whose x̂₀ scores best, again and again; no gradients.

    Two forms:

    * ``"block"``, CoDe itself: every ``block_size`` steps each image is copied N times, all copies continue with noise
      of their own, and at the block's end a look-ahead prediction scores them; the last block scores the images.
    * ``"lookahead"``, what the Diffusion Blend paper ran: candidates live for one step, every ``block_size`` steps.

    The look-ahead's prediction is the survivor's next prediction, and a block's copies share their first one, so
    neither is computed twice: 1 + (T − 1) N rows per image for ``block`` with T steps, T + (N − 1) ⌈T / B⌉ for
    ``lookahead`` (one block less where a block starts at the last step).

    Args:
        rewards, weights, normalize: what to raise; any reward, differentiable or not.
        candidates: N (paper: 20).
        block_size: B, steps from one choice to the next (paper: 5).
        form: "block" or "lookahead".
        score_batch_size: candidates decoded and scored at once; None takes the backbone's ``decode_batch_size``.

    The run's ``max_rows`` limits the rows of a denoiser call.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None = None,
        candidates: int = 20,
        block_size: int = 5,
        form: str = "block",
        normalize: bool = False,
        score_batch_size: int | None = None,
    ) -> None:
        super().__init__(rewards, weights, normalize)
        if form not in ("block", "lookahead"):
            raise ValueError(f"form must be 'block' or 'lookahead', got {form!r}")
        check_settings(
            {"candidates": candidates, "block_size": block_size, "score_batch_size": score_batch_size}, RULES
        )
        self.candidates = candidates
        self.block_size = block_size
        self.form = form
        self.score_batch_size = score_batch_size

    @torch.no_grad()
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        output = state.output if state.output is not None else run.predict(state.latents, step_index)
        copies = len(state.latents) // run.batch
        last = step_index == run.num_steps - 1
        latents, taken = state.latents, output
        if step_index % self.block_size == 0 and not (last and self.form == "lookahead"):
            copies = self.candidates
            # copies of one image share the prediction; their noise parts them
            latents, taken = latents.repeat_interleave(copies, 0), output.repeat_interleave(copies, 0)
        following = State(run.solver.step(taken, latents, step_index, run.noise, copies))
        ends = self.form == "lookahead" or (step_index + 1) % self.block_size == 0 or last
        if copies > 1 and ends:
            following = self._best(run, step_index, following.latents)
        return output, following

    def _best(self, run: Run, step_index: int, latents: Tensor) -> State:
        """Each image's best candidate, with the prediction that looked ahead from it."""
        ahead = None
        originals = latents
        if step_index + 1 < run.num_steps:
            ahead = run.predict(latents, step_index + 1)
            originals = run.solver.original(ahead, latents, step_index + 1)  # type: ignore[attr-defined]
        scores = self._score(run, originals).nan_to_num(nan=-torch.inf).view(run.batch, -1)
        chosen = scores.argmax(1) + torch.arange(run.batch, device=scores.device) * scores.shape[1]
        return State(latents[chosen], None if ahead is None else ahead[chosen])

    def _score(self, run: Run, originals: Tensor) -> Tensor:
        """Weighted reward of B · N latents, (B · N,)."""
        assert run.prompts is not None
        copies = len(originals) // run.batch
        prompts = [prompt for prompt in run.prompts for _ in range(copies)]
        weights = self._table.repeat_interleave(copies, 0).to(originals.device)
        size: int = self.score_batch_size or getattr(run.backbone, "decode_batch_size", None) or 16
        scores = []
        for start in range(0, len(originals), size):
            part = slice(start, start + size)
            images = run.backbone.decode(originals[part])
            parts = [self.rewards[name].score(images, prompts[part]) * weights[part, i] for i, name in self._used]
            scores.append(torch.stack(parts).sum(0))
        return torch.cat(scores)


class RGG(_RewardSteering):
    """Reward-gradient guidance, paper eqs. (12)-(14): the mean of a step moves by λ σ_t² / α · ∇_{x_t} r(x̂₀(x_t)).

    Args:
        rewards, weights, normalize: what to raise; every reward must be differentiable.
        normalization: of each reward's gradient before they are mixed: "global", eq. (14)'s norm over a whole image's
            latents; "pixel", as the paper's code does, unit norm over the channels of each latent pixel (√(h·w) times
            longer, and α has no effect, for the code divides by α before it normalises); "none", eq. (13).
        kl_weight: α > 0, the smaller the stronger.
        gamma: γ ≥ 0 of the ramp λ_i = min((1 + γ)^i − 1, 1) at step i (0 … T − 1); None is λ = 1 throughout. The paper
            prints (1 + γ)^(t−1) and its code computes the former, with γ = 0.024.
        through_denoiser: back-propagate through the denoiser as well (as DAS does; much memory); otherwise ε is a
            constant, as in the paper's code.

    The run's ``max_rows`` limits the images whose gradients are computed at once.

    Raises:
        ValueError: a reward without a gradient, named; or an argument out of range.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None = None,
        normalization: str = "global",
        kl_weight: float = 0.1,
        gamma: float | None = 0.024,
        through_denoiser: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(rewards, weights, normalize)
        stuck = [name for name, reward in self.rewards.items() if not reward.differentiable]
        if stuck:
            kind = getattr(self.rewards[stuck[0]], "name", type(self.rewards[stuck[0]]).__name__)
            raise ValueError(f"RGG follows gradients, and the reward {stuck[0]!r} ({kind}) has none; use CoDe for it")
        if normalization not in ("global", "pixel", "none"):
            raise ValueError(f"normalization must be 'global', 'pixel' or 'none', got {normalization!r}")
        check_settings({"kl_weight": kl_weight, "gamma": gamma}, RULES)
        if not isinstance(through_denoiser, bool):
            raise ValueError(f"through_denoiser must be true or false, got {through_denoiser!r}")
        self.normalization = normalization
        self.kl_weight = kl_weight
        self.gamma = gamma
        self.through_denoiser = through_denoiser

    def ramp(self, step_index: int) -> float:
        """λ_i."""
        # in logarithms first: (1 + γ)^i overflows
        if self.gamma is None or step_index * math.log1p(self.gamma) >= math.log(2):
            return 1.0
        return float((1 + self.gamma) ** step_index - 1)

    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        solver: Any = run.solver
        latents = state.latents
        scale = self.ramp(step_index)
        if scale == 0:
            with torch.no_grad():
                output = run.predict(latents, step_index)
            return output, State(solver.step(output, latents, step_index, run.noise))
        output, gradient = self._gradient(run, step_index, latents)
        with torch.no_grad():
            alpha = 1.0 if self.normalization == "pixel" else self.kl_weight
            variance = solver.gaussian(output, latents, step_index).std.square()
            following = solver.step(output, latents, step_index, run.noise)
            return output, State(following + scale * variance / alpha * gradient)

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
STEERING: dict[str, type[Steering]] = {"code": CoDe, "rgg": RGG}


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
    if not rewards and issubclass(kind, _RewardSteering):
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
