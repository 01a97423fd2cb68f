"""Blends: who predicts at each step. Every method is two small tensors, gates and a mix.

    gates  (K, B, m)   K forward rows for each of the B images, each with a gate over the m adapters
    mix    (K, B)      prediction_b = Σ_k mix[k, b] · ε(x_b, t, c_b ; gates[k, b])

Mixing predictions equals mixing drifts: every solver's drift is affine in the prediction with coefficients that depend
on t alone. Weights and λ are per image, so one batch can serve many users' preferences.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dblightning.weights import BatchWeights, WeightSchedule, check_kl_scale, check_weights


class BlendStep(NamedTuple):
    """Who predicts at one denoising step, on the CPU."""

    gates: Tensor  # (K, B, m) float32
    mix: Tensor  # (K, B) float64, sums to 1 over K
    factors: bool = False  # gate A and B apart (the paper code's Rewarded Soup)


#: what a blend returns for a run: step_index → BlendStep
BlendPlan = Callable[[int], BlendStep]


def weights_tensor(
    weights: BatchWeights,
    names: Sequence[str],
    batch: int,
    normalize: bool = False,
    kind: str = "loaded adapters",
) -> Tensor:
    """Checked weights as a matrix (B, m), float64, in the order of ``names``.

    Raises:
        TypeError, ValueError: see :func:`check_weights`; also a list whose length is not the number of images.
    """
    per_image = [weights] * batch if isinstance(weights, Mapping) else list(weights)
    if len(per_image) != batch:
        raise ValueError(f"got weights for {len(per_image)} images, but the batch has {batch}; give one per image")
    rows = [check_weights(each, names, normalize, kind) for each in per_image]
    return torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)


def kl_scales(kl_scale: float | Sequence[float], batch: int) -> Tensor:
    """λ of each image, float64 (B,), each finite and ≥ 0.

    Raises:
        ValueError: a negative or infinite λ, or a list of another length than the batch.
    """
    values = [float(kl_scale)] * batch if _is_scalar(kl_scale) else [float(each) for each in kl_scale]  # type: ignore[arg-type, union-attr]
    if len(values) != batch:
        raise ValueError(f"got kl_scale for {len(values)} images, but the batch has {batch}; give one per image")
    for value in values:
        check_kl_scale(value)
    return torch.tensor(values, dtype=torch.float64)


def _is_scalar(value: object) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0)


class Blend(ABC):
    """A way to combine the base model and its adapters; ``start`` fixes it for one run of the denoising loop."""

    @abstractmethod
    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        """Check the settings against the loaded adapters and the batch, and return the plan of the run.

        Args:
            adapters: names in gate order.
            batch: number of images B.
            num_steps: number of denoising steps T.
            generators: one per image, for methods that draw; None takes torch's global generator.

        Raises:
            ValueError: settings that do not fit, named in the message.
        """


def _ones(batch: int) -> Tensor:
    return torch.ones(1, batch, dtype=torch.float64)


class Base(Blend):
    """The base model alone."""

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        step = BlendStep(torch.zeros(1, batch, len(adapters)), _ones(batch))
        return lambda step_index: step


class _Weighted(Blend):
    """What the methods with preference weights share.

    Args:
        weights: adapter → weight, each ≥ 0, sum 1; one mapping for all images, a list with one per image, or a
            function (step_index, num_steps) → either.
        normalize: divide weights by their sum.
    """

    def __init__(self, weights: BatchWeights | WeightSchedule, normalize: bool = False) -> None:
        self.weights = weights
        self.normalize = normalize

    def table(self, adapters: Sequence[str], batch: int, num_steps: int) -> Tensor:
        """Weights of every step, (T, B, m); all checked before the first step runs."""
        if not callable(self.weights):
            return weights_tensor(self.weights, adapters, batch, self.normalize).expand(num_steps, -1, -1)
        steps = (self.weights(step_index, num_steps) for step_index in range(num_steps))
        return torch.stack([weights_tensor(step, adapters, batch, self.normalize) for step in steps])


class DBMPA(_Weighted):
    """DB-MPA, ε = Σᵢ wᵢ εᵢ at each step (Algorithm 1, eq. 9), with DB-KLA's λ on top (eqs. 9 and 10 together):
    ε = (1−λ) ε_pre + λ Σᵢ wᵢ εᵢ.

    Args:
        weights: adapter → weight, each ≥ 0, sum 1; one mapping for all images, a list with one per image, or a
            function (step_index, num_steps) → either.
        normalize: divide weights by their sum.
        kl_scale: λ ≥ 0, one for all images or one each; 1 is plain DB-MPA, 0 the base model, above 1 extrapolates.
    """

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(weights, normalize)
        self.kl_scale = kl_scale

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        table = self.table(adapters, batch, num_steps)
        scale = kl_scales(self.kl_scale, batch)
        m = len(adapters)
        # row 0 is the base model, row 1 + i adapter i
        gates = torch.cat([torch.zeros(1, m), torch.eye(m)]).unsqueeze(1).expand(-1, batch, -1)

        def plan(step_index: int) -> BlendStep:
            return BlendStep(gates, torch.cat([(1 - scale)[None], scale * table[step_index].T]))

        return plan


class DBKLA(DBMPA):
    """DB-KLA, ε = (1−λ) ε_pre + λ ε_rl (Algorithm 2, eq. 10): regularisation α/λ without retraining.

    Args:
        adapter: the fine-tuned model's adapter; or one per image.
        kl_scale: λ ≥ 0, one for all images or one each; may exceed 1.
    """

    def __init__(self, adapter: str | Sequence[str], kl_scale: float | Sequence[float] = 1.0) -> None:
        super().__init__(_one_hot(adapter), kl_scale)


class Single(DBMPA):
    """One adapter alone: an endpoint of a blend, or a MORL oracle trained on the weighted reward itself (B.1).

    Args:
        adapter: its name; or one per image.
    """

    def __init__(self, adapter: str | Sequence[str]) -> None:
        super().__init__(_one_hot(adapter))


def _one_hot(adapter: str | Sequence[str]) -> BatchWeights:
    return {adapter: 1.0} if isinstance(adapter, str) else [{each: 1.0} for each in adapter]


class DBMPALS(_Weighted):
    """DB-MPA-LS (Algorithm 3, Prop. 2): one adapter per step and image, drawn with probability w. The base's cost.

    Args:
        weights, normalize: preference weights; per image, or (``iid`` only) as a function of the step.
        schedule: "iid", the paper's independent draw at each step; or "systematic", which gives each adapter its share
            of steps to within one, in random order. Each step's marginal is exactly w in both.
        kl_scale: must be 1: with λ ≠ 1 the base's coefficient 1 − λ may be negative and is then no probability.
    """

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        schedule: str = "iid",
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(weights, normalize)
        if schedule not in ("iid", "systematic"):
            raise ValueError(f"schedule must be 'iid' or 'systematic', got {schedule!r}")
        if not _is_one(kl_scale):
            raise ValueError(
                f"DB-MPA-LS draws adapters with probability w, and with kl_scale {kl_scale} the coefficients can be "
                "negative, which no probability is; use DB-MPA for kl_scale other than 1"
            )
        if schedule == "systematic" and callable(weights):
            raise ValueError("systematic draws share out one set of weights over all steps; use iid for a schedule")
        self.schedule = schedule

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        table = self.table(adapters, batch, num_steps)
        if generators is not None and len(generators) != batch:
            raise ValueError(f"got {len(generators)} generators for a batch of {batch} images")
        columns = [self._draw(table[:, b], generators[b] if generators is not None else None) for b in range(batch)]
        gates = torch.nn.functional.one_hot(torch.stack(columns, dim=1), len(adapters)).float()  # (T, B, m)
        ones = _ones(batch)
        return lambda step_index: BlendStep(gates[step_index][None], ones)

    def _draw(self, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """One image's adapter at each step, int64 (T,), from its weights (T, m)."""
        num_steps = len(weights)
        cumulative = weights.cumsum(1)
        if self.schedule == "iid":
            points = torch.rand(num_steps, 1, generator=generator, dtype=torch.float64)
        else:
            offset = torch.rand(1, generator=generator, dtype=torch.float64)
            points = (((torch.arange(num_steps) + offset) / num_steps)[:, None])[
                torch.randperm(num_steps, generator=generator)
            ]
        drawn = (points * cumulative[:, -1:] >= cumulative).sum(1)
        last = (weights > 0).long().cumsum(1).argmax(1)  # rounding must not pick an adapter of weight 0
        return torch.minimum(drawn, last)


class RewardedSoup(_Weighted):
    """Rewarded Soup with the exact weight average, ΔW = Σᵢ wᵢ BᵢAᵢ: one row at the base's cost.

    To first order in ΔW it equals DB-MPA.
    """

    factors = False

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        table = self.table(adapters, batch, num_steps).float()
        ones = _ones(batch)
        return lambda step_index: BlendStep(table[step_index][None], ones, self.factors)


class RewardedSoupFactors(RewardedSoup):
    """Rewarded Soup as the paper's code computes it: A and B averaged apart, ΔW = (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ).

    The adapters' own terms get w² instead of w, so mid weights fall back toward the base model. The adapters must have
    one rank.
    """

    factors = True


#: method name → class, for the command line and the pipeline
METHODS: dict[str, type[Blend]] = {
    "base": Base,
    "single": Single,
    "db-mpa": DBMPA,
    "db-kla": DBKLA,
    "db-mpa-ls": DBMPALS,
    "rewarded-soup": RewardedSoup,
    "rewarded-soup-factors": RewardedSoupFactors,
}


def make_blend(
    method: str,
    weights: BatchWeights | WeightSchedule | None = None,
    kl_scale: float | Sequence[float] = 1.0,
    normalize: bool = False,
    ls_schedule: str = "iid",
) -> Blend:
    """The blend of a method's name; ``single`` and ``db-kla`` take the adapter that has weight 1.

    Raises:
        ValueError: an unknown method, weights that are missing or (for ``base``) given, or a λ the method lacks.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if method == "base":
        if weights:
            raise ValueError(f"method 'base' has no weights, got {weights}; use db-mpa for a blend")
        _refuse_scale(method, kl_scale)
        return Base()
    if weights is None:
        raise ValueError(f"method {method!r} needs weights, for example weights={{'aesthetic': 1.0}}")
    if method in ("single", "db-kla"):
        adapter = _only_adapter(method, weights)
        if method == "db-kla":
            return DBKLA(adapter, kl_scale)
        _refuse_scale(method, kl_scale)
        return Single(adapter)
    if method == "db-mpa":
        return DBMPA(weights, kl_scale, normalize)
    if method == "db-mpa-ls":
        return DBMPALS(weights, ls_schedule, kl_scale, normalize)
    _refuse_scale(method, kl_scale)
    return RewardedSoupFactors(weights, normalize) if method.endswith("factors") else RewardedSoup(weights, normalize)


def _only_adapter(method: str, weights: BatchWeights | WeightSchedule) -> str | list[str]:
    if isinstance(weights, Mapping):
        chosen = [name for name, value in weights.items() if value != 0]
        if len(chosen) == 1 and weights[chosen[0]] == 1:
            return chosen[0]
    elif not callable(weights):
        return [str(_only_adapter(method, each)) for each in weights]
    raise ValueError(f"method {method!r} takes one adapter of weight 1, got {weights}; use db-mpa for several")


def _is_one(kl_scale: float | Sequence[float]) -> bool:
    return all(each == 1 for each in ([kl_scale] if _is_scalar(kl_scale) else kl_scale))  # type: ignore[union-attr]


def _refuse_scale(method: str, kl_scale: float | Sequence[float]) -> None:
    if not _is_one(kl_scale):
        raise ValueError(f"method {method!r} has no kl_scale, got {kl_scale}; use db-kla or db-mpa")
