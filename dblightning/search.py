"""Steering that keeps the best of several candidates: CoDe and best of N. Any reward will do, no gradients are needed.

It works on top of any blend (the paper runs CoDe on the base model); CoDe scores x̂₀, Tweedie's estimate of the image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dblightning.methods import weights_tensor
from dblightning.noise import ImageNoise, image_seed
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
    "reference_steps": count(words=(None,), remedy="the paper's is 50; null scales nothing"),
    "gamma": Number(least=0, words=(None,), remedy="the paper's is 0.024; null is no ramp"),
}


class Reward(Protocol):
    """The interface of a reward that steers; every ``RewardMetric`` has it."""

    @property
    def differentiable(self) -> bool:
        """Whether scores have a gradient with respect to images."""

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        """One score per image, (B,), of images (B, 3, H, W) in [0, 1]; higher is better."""


class RewardSteering(Steering):
    """Base class for CoDe and RGG: rewards and preference weights.

    Args:
        rewards: name → reward.
        weights: name → weight of each reward, ≥ 0, sum 1; or a list of such, one per image. None weights a single
            reward with 1.
        normalize: divide weights by their sum.
    """

    #: whether it looks ahead from, or moves, a step's Gaussian
    needs_noise: ClassVar[bool] = True

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
        if self.needs_noise and not isinstance(run.solver, GaussianSolver):
            raise ValueError(f"{name} needs DDIM steps, whose distribution is known; got {type(run.solver).__name__}")
        if self.needs_noise and run.solver.eta == 0:  # type: ignore[attr-defined]
            raise ValueError(f"{name} needs steps with noise, got eta 0; set eta to 1")
        if run.prompts is None or len(run.prompts) != run.batch:
            got = "none" if run.prompts is None else len(run.prompts)
            raise ValueError(f"{name} scores images against {run.batch} prompts, got {got}")
        table = weights_tensor(self.weights, list(self.rewards), run.batch, self.normalize, kind="rewards")
        self._table = table.float()  # (B, rewards)
        self._used = [(i, name) for i, name in enumerate(self.rewards) if bool(self._table[:, i].any())]

    @abstractmethod
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]: ...


class _Search(RewardSteering):
    """Base class for steering that keeps the best of several candidates.

    Args:
        rewards, weights, normalize: what to raise.
        candidates: N ≥ 1 of each image.
        score_batch_size: candidates decoded and scored at once; None takes the backbone's ``decode_batch_size``.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None,
        normalize: bool,
        candidates: int,
        score_batch_size: int | None,
    ) -> None:
        super().__init__(rewards, weights, normalize)
        check_settings({"candidates": candidates, "score_batch_size": score_batch_size}, RULES)
        self.candidates = candidates
        self.score_batch_size = score_batch_size

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


class CoDe(_Search):
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
        reference_steps: number of denoising steps that ``block_size`` was chosen for (paper: 50), so that a run of T
            steps has blocks of ``block_size`` · T / ``reference_steps`` steps, at least one; None leaves it as it is.

    The run's ``max_rows`` limits the rows of a denoiser call.

    Raises:
        ValueError: an argument out of range.
    """

    no_kl = "it chooses among candidates, which is no Gaussian step"

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None = None,
        candidates: int = 20,
        block_size: int = 5,
        form: str = "block",
        normalize: bool = False,
        score_batch_size: int | None = None,
        reference_steps: int | None = None,
    ) -> None:
        super().__init__(rewards, weights, normalize, candidates, score_batch_size)
        if form not in ("block", "lookahead"):
            raise ValueError(f"form must be 'block' or 'lookahead', got {form!r}")
        check_settings({"block_size": block_size, "reference_steps": reference_steps}, RULES)
        self.block_size = block_size
        self.form = form
        self.reference_steps = reference_steps

    def block(self, num_steps: int) -> int:
        """Steps from one choice to the next in a run of ``num_steps``."""
        if self.reference_steps is None:
            return self.block_size
        return max(1, round(self.block_size * num_steps / self.reference_steps))

    @torch.no_grad()
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        output = state.output if state.output is not None else run.predict(state.latents, step_index)
        copies = len(state.latents) // run.batch
        last, block = step_index == run.num_steps - 1, self.block(run.num_steps)
        latents, taken = state.latents, output
        if step_index % block == 0 and not (last and self.form == "lookahead"):
            copies = self.candidates
            # copies of one image share the prediction; their noise parts them
            latents, taken = latents.repeat_interleave(copies, 0), output.repeat_interleave(copies, 0)
        following = State(run.solver.step(taken, latents, step_index, run.noise, copies))
        ends = self.form == "lookahead" or (step_index + 1) % block == 0 or last
        if copies > 1 and ends:
            following = self._best(run, step_index, following.latents)
        return output, following


class BestOfN(_Search):
    """Best of N: N images of each prompt, all the way and on their own; the one that scores best is kept.

    The plain way to spend N times the rows, N · T per image with T steps, and so the one to beat at equal rows: N = m
    for DB-MPA of m adapters. With a continuous reward its law has a KL of log N − (N − 1)/N to the model's own.

    Args:
        rewards, weights, normalize: what to raise; any reward, differentiable or not.
        candidates: N; the first is the image that its noise gives without a search.
        score_batch_size: images decoded and scored at once; None takes the backbone's ``decode_batch_size``.

    Raises:
        ValueError: an argument out of range.
    """

    no_kl = "it chooses among whole images; with a continuous reward its KL to the model's own law is log N − (N − 1)/N"
    needs_noise = False

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: BatchWeights | None = None,
        candidates: int = 4,
        normalize: bool = False,
        score_batch_size: int | None = None,
    ) -> None:
        super().__init__(rewards, weights, normalize, candidates, score_batch_size)

    def start(self, run: Run) -> None:
        super().start(run)
        self._noise = CandidateNoise(run.noise, self.candidates)

    @torch.no_grad()
    def step(self, run: Run, step_index: int, state: State) -> tuple[Tensor, State]:
        latents = state.latents
        if step_index == 0 and self.candidates > 1:  # the given first latents, and the other candidates' own
            others = self._noise.others(latents.shape[1:])
            latents = self._noise.beside(latents, run.solver.initial(others).to(latents))
        output = run.predict(latents, step_index)
        following = State(run.solver.step(output, latents, step_index, self._noise))
        if step_index == run.num_steps - 1:
            following = self._best(run, step_index, following.latents)
        return output, following


class CandidateNoise(ImageNoise):
    """Noise of B · N rows, an image's N side by side: the first has the image's own, each other a generator of its own.

    Args:
        first: the noise of B images; the others' seeds are drawn from its ``draws``.
        count: N.
    """

    def __init__(self, first: ImageNoise, count: int) -> None:
        keys = [int(torch.randint(2**62, (), generator=generator)) for generator in first.draws]
        self.first, self.count = first, count
        self.others = ImageNoise(
            [image_seed(key, 0, number, "candidate") for key in keys for number in range(1, count)], first.device
        )
        self.device, self.draws, self.generators = first.device, first.draws, first.generators
        if isinstance(first.generators, list) and count > 1:
            rest: Any = iter(self.others.generators)  # type: ignore[arg-type]
            self.generators = [each for own in first.generators for each in (own, *islice(rest, count - 1))]

    def beside(self, first: Tensor, others: Tensor) -> Tensor:
        """Rows of the first candidates (B, …) and of the others (B · (N − 1), …) in one, (B · N, …)."""
        return torch.cat([first[:, None], others.to(first).unflatten(0, (len(first), -1))], 1).flatten(0, 1)

    def __call__(self, shape: Sequence[int], copies: int = 1) -> Tensor:
        return self.first(shape) if self.count == 1 else self.beside(self.first(shape), self.others(shape))
