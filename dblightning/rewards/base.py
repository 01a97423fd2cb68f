"""Base class for rewards: a torchmetrics metric with a per-image ``score``."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

#: keyword arguments of every ``torchmetrics.Metric``
METRIC_ARGUMENTS = frozenset(
    {
        "compute_on_cpu",
        "compute_with_cache",
        "dist_sync_fn",
        "dist_sync_on_step",
        "distributed_available_fn",
        "process_group",
        "sync_on_compute",
    }
)

_numbers = itertools.count()


class RewardUnavailable(ConnectionError):
    """No answer from a reward that lives elsewhere, after every retry; training saves its state and stops."""

    @classmethod
    def behind(cls, error: BaseException) -> RewardUnavailable | None:
        """The one that an error is or came from, as a ``RewardWorker`` chains it; None where there is none."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, cls):
            cause = cause.__cause__
        return cause


def check_images(images: Tensor) -> None:
    """Refuse anything but a float batch (B, 3, H, W) with B >= 1 and finite values in [0, 1].

    Raises:
        TypeError: not a tensor, or an integer one.
        ValueError: wrong shape, empty batch, NaN or infinite values, values outside [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor (B, 3, H, W) in [0, 1], got {kind}; divide uint8 images by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"images must hold at least one pixel, got an empty batch of shape {tuple(images.shape)}")
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError("images holds NaN or infinite values; look for an overflow in the decoder (fp16 VAE?)")
    # 1e-3: rounding of a decoder's (x + 1) / 2 in half precision
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must lie in [0, 1], got [{low:.4g}, {high:.4g}]; map [-1, 1] with (x + 1) / 2")


def check_prompts(prompts: Sequence[str], count: int, name: str) -> list[str]:
    """``prompts`` as a list, refused unless it holds ``count`` strings.

    Raises:
        TypeError: an element that is not a string.
        ValueError: another number of prompts than images.
    """
    if isinstance(prompts, str) or len(prompts) != count:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{name} needs one prompt per image: got {count} images and {got}")
    prompts = list(prompts)
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {type(prompt).__name__} at index {index}")
    return prompts


class RewardMetric(Metric):
    """A reward of (image, prompt) pairs, higher is better.

    ``score`` returns one value per image and keeps no state; ``update`` and ``compute`` average it over batches and
    ranks. Called as a function, a ``differentiable`` reward returns the batch's mean with its gradient to the images.
    A subclass writes ``_score`` only, and passes its network to
    ``register_frozen``.

    Such networks are frozen and in eval mode, whatever happens to the module around the reward: they follow it to a
    device, but are not part of its parameters, its checkpoints, its ``train()`` or its precision. ``reward.to(dtype)``
    (or ``half``, ``double``, …) called on the reward itself changes theirs.

    Args:
        micro_batch_size: most images scored at once; None: no limit. Halved when the device runs out of memory.
        kwargs: as of ``torchmetrics.Metric``: ``process_group``, ``sync_on_compute``, ``dist_sync_on_step``, ….

    Raises:
        TypeError: a keyword argument that ``torchmetrics.Metric`` does not take.
        ValueError: micro_batch_size < 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    #: smallest and largest value the reward can take, in the units ``score`` returns; None where unbounded
    value_range: tuple[float | None, float | None] = (None, None)
    needs_prompt: bool = True

    total: Tensor
    total_squares: Tensor
    count: Tensor
    identity: Tensor

    def __init__(self, micro_batch_size: int | None = None, **kwargs: Any) -> None:
        if unknown := sorted(set(kwargs) - METRIC_ARGUMENTS):
            raise TypeError(f"{type(self).__name__} takes no argument {', '.join(map(repr, unknown))}")
        super().__init__(**kwargs)
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be >= 1, or None for no limit, got {micro_batch_size}")
        self.micro_batch_size = micro_batch_size
        self._frozen_networks: dict[str, nn.Module] = {}
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_squares", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # MetricCollection takes metrics of equal state after one batch for one metric, and updates the first only
        self.add_state("identity", default=torch.tensor(next(_numbers)), dist_reduce_fx="max")

    @property
    def differentiable(self) -> bool:
        """Whether ``score`` carries a gradient with respect to the images."""
        return bool(self.is_differentiable)

    @property
    def name(self) -> str:
        """The reward's name in logs, score tables and adapter metadata."""
        return type(self).__name__

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image against its prompt.

        Args:
            images: float tensor (B, 3, H, W) in [0, 1], on any device.
            prompts: B strings.

        Returns:
            float32 tensor (B,) on the images' device, one reward per image. It carries a gradient to ``images`` if
            they require one and the reward is ``differentiable``.

        Raises:
            TypeError, ValueError: images of another kind, or another number of prompts than images.
        """
        check_images(images)
        prompts = check_prompts(prompts, images.shape[0], self.name)
        return self._score_in_micro_batches(images, prompts).float().to(images.device)

    @property
    def part_names(self) -> list[str]:
        """Names of the rewards that this one is made of; none of a plain reward."""
        return []

    def score_with_parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """``score``, and each part's scores where a reward is made of several; a part is scored once.

        Returns:
            Scores (B,), and name → scores (B,), empty for a reward without parts.
        """
        return self.score(images, prompts), {}

    @abstractmethod
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``score`` without its checks."""

    def _score_in_micro_batches(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``_score`` on at most ``micro_batch_size`` images at a time; halves that on running out of memory."""
        scores: list[Tensor] = []
        start = 0
        while start < len(prompts):
            size = min(self.micro_batch_size or len(prompts), len(prompts) - start)
            rows, words = images[start : start + size], prompts[start : start + size]
            try:
                if size < len(prompts) and torch.is_grad_enabled() and rows.requires_grad:
                    # recomputed in backward, so that only one micro-batch's activations live at a time
                    scores.append(checkpoint(self._score, rows, words, use_reentrant=False))
                else:
                    scores.append(self._score(rows, words))
                start += size
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # outside the except block: the exception no longer keeps the failed pass's activations alive
            self.micro_batch_size = size // 2
            warnings.warn(
                f"{self.name} ran out of memory on {size} images: micro_batch_size is now {size // 2}", stacklevel=3
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add a batch to the running mean."""
        self._accumulate(images, prompts)

    def _accumulate(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score a batch and add it to the running mean: scores (B,) in float64 on the metric's device, detached."""
        # torchmetrics enables gradients in ``forward`` alone, for the value of the batch
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            scores = self.score(images, prompts).to(self.total)
        self.total = self.total + scores.sum()
        scores = scores.detach()
        self.total_squares += scores.square().sum()
        self.count += scores.numel()
        return scores

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Add a batch to the running mean and return the batch's mean.

        It carries a gradient to the images if they require one, gradients are enabled and the reward is
        ``differentiable``; the running mean never does.
        """
        # torchmetrics enables gradients whether or not the caller did
        return super().forward(images if torch.is_grad_enabled() else images.detach(), prompts)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes of matplotlib with the mean reward.

        Args:
            val: what ``forward`` or ``compute`` returned, or a list of that; None: ``compute()``.
            ax: axes to draw on; None: new ones.
        """
        return self._plot(val, ax)

    def compute(self) -> Tensor:
        """Mean reward over everything seen, on all ranks: float32 scalar, NaN before the first image."""
        return (self.total / self.count).float()

    def standard_error(self) -> Tensor:
        """Standard error of ``compute``'s mean, over all ranks: float32 scalar, NaN below two images.

        Like ``compute``, a collective call: every rank has to make it.
        """
        with self.sync_context():
            mean = self.total / self.count
            # E[x²] − E[x]² in float64: a mean of 20 and a spread of 0.1 still keep ten digits
            variance = (self.total_squares / self.count - mean.square()).clamp_min(0) * self.count / (self.count - 1)
            return (variance / self.count).sqrt().float()

    # ── frozen networks ───────────────────────────────────────────────────────────────────────────────────────────────

    def register_frozen(self, name: str, module: nn.Module) -> None:
        """Freeze a network and keep it under ``name``, to be read with ``frozen``; see the class docstring."""
        self._frozen_networks[name] = module.eval().requires_grad_(False)

    def frozen(self, name: str) -> Any:
        """The network registered under ``name``."""
        return self._frozen_networks[name]

    #: the names of earlier versions
    hold, held = register_frozen, frozen

    def set_dtype(self, dst_type: str | torch.dtype) -> RewardMetric:
        """Run the frozen networks in ``dst_type``; the running mean stays in float64."""
        dtype = getattr(torch, dst_type) if isinstance(dst_type, str) else dst_type
        for module in self.modules():
            if isinstance(module, RewardMetric):
                for network in module._frozen_networks.values():
                    network.to(dtype)
                module._weights_changed()
        return self

    def to(self, *args: Any, **kwargs: Any) -> RewardMetric:
        """Move to a device; given a dtype, also ``set_dtype``."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            super().to(device)
        return self.set_dtype(dtype) if dtype is not None else self

    def half(self) -> RewardMetric:
        return self.set_dtype(torch.float16)

    def bfloat16(self) -> RewardMetric:
        return self.set_dtype(torch.bfloat16)

    def float(self) -> RewardMetric:
        return self.set_dtype(torch.float32)

    def double(self) -> RewardMetric:
        return self.set_dtype(torch.float64)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        # A module around us may change its precision (Trainer(precision="bf16-true")): take its device, not its dtype.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        super()._apply(move, exclude_state)
        for network in self._frozen_networks.values():
            network._apply(move)
        self._weights_changed()
        return self

    def _weights_changed(self) -> None:
        """Called when a frozen network changed device or dtype; a subclass drops what it cached."""
