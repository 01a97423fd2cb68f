"""Blends: who predicts at each step. Every method is two small tensors, gates and a mix.

    gates  (K, B, m)   K forward rows for each of the B images, each with a gate over the m adapters
    mix    (K, B)      prediction_b = Σ_k mix[k, b] · ε(x_b, t, c_b ; gates[k, b])

Mixing predictions equals mixing drifts: every solver's drift is affine in the prediction with coefficients that depend
on t alone. Weights and λ are per image, so one batch can serve many users' preferences.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dblightning import few_rows
from dblightning.blend_step import BlendPlan as BlendPlan
from dblightning.blend_step import BlendStep as BlendStep
from dblightning.blend_step import PartialStep as PartialStep
from dblightning.draws import DEFAULT_DRAWS, DRAWS
from dblightning.methods import (
    check_options,
    construct,
    is_one,
    kl_scales,
    load_method,
    strengths_of,
    weights_tensor,
)
from dblightning.weights import BatchWeights, WeightSchedule
from dblightning.weights import check_weights as check_weights  # where it was at first


class Blend(ABC):
    """A way to combine the base model and its adapters; ``start`` fixes it for one run of the denoising loop.

    A blend of your own is a subclass in any module: give an object of it to the pipeline, or its dotted path wherever a
    method's name is taken (see docs/methods.md).
    """

    #: whether the pipeline takes η = 1 where none is requested: the method relies on steps with noise
    needs_noise: ClassVar[bool] = False

    @classmethod
    def from_preference(
        cls,
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> Self:
        """The blend of a preference, as the pipeline, an evaluation and a sweep state it.

        By default the constructor gets what it names of ``weights``, ``kl_scale`` and ``normalize``, and the options.
        Where it names ``adapter`` in place of ``weights``, that is the one adapter of weight 1. Override this where it
        names something else.

        Raises:
            ValueError: weights, a λ other than 1 or an option that the class lacks, or one that it needs.
        """
        named = inspect.signature(cls).parameters
        given: dict[str, Any] = {"kl_scale": kl_scale if "kl_scale" in named or not is_one(kl_scale) else None}
        if "adapter" in named and "weights" not in named and "adapter" not in options:
            given["adapter"] = _only_adapter(cls, weights)
        else:
            given["weights"] = weights or None
            given["normalize"] = normalize if "normalize" in named else normalize or None
        return construct(cls, given, options, _subject(cls))

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
    """Base class for methods with preference weights.

    Args:
        weights: adapter → weight, each ≥ 0, sum 1; one mapping for all images, a list with one per image, or a
            function (step_index, num_steps) → either.
        normalize: divide weights by their sum.
        strengths: adapter → sᵢ ≥ 0, see :class:`DBMPA`; those left out have 1.
    """

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        normalize: bool = False,
        strengths: Mapping[str, float] | None = None,
    ) -> None:
        self.weights = weights
        self.normalize = normalize
        self.strengths = strengths

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        return self._plan(self.table(adapters, batch, num_steps), adapters, generators)

    @abstractmethod
    def _plan(self, table: Tensor, adapters: Sequence[str], generators: Sequence[torch.Generator] | None) -> BlendPlan:
        """The blend of ``start``, from :meth:`table`, (T, B, m)."""

    def table(self, adapters: Sequence[str], batch: int, num_steps: int) -> Tensor:
        """Weights of every step, (T, B, m); all checked before the first step runs."""
        if not callable(self.weights):
            return weights_tensor(self.weights, adapters, batch, self.normalize).expand(num_steps, -1, -1)
        steps = (self.weights(step_index, num_steps) for step_index in range(num_steps))
        return torch.stack([weights_tensor(step, adapters, batch, self.normalize) for step in steps])


class DBMPA(_Weighted):
    """DB-MPA, ε = Σᵢ wᵢ εᵢ at each step (Algorithm 1, eq. 9).

    Lemma 1 speaks of adapters of one α. One that was trained at αᵢ takes part in a blend at α with the strength αᵢ/α of
    DB-KLA (eq. 10): ε = ε_pre + λ Σᵢ wᵢ sᵢ (εᵢ − ε_pre), sᵢ its ``strengths``. The same is how an adapter that has
    overshot its own α, or not reached it, is set right: its strength is then the λ at which E[r] − α·KL is largest.

    With DB-KLA's λ on top (eqs. 9 and 10 together): ε = (1−λ) ε_pre + λ Σᵢ wᵢ εᵢ. Three rows, the base model's first:

    >>> step = DBMPA({"a": 0.25, "b": 0.75}, kl_scale=2.0).start(["a", "b"], batch=1, num_steps=50)(0)
    >>> step.gates.squeeze(1).tolist(), step.mix.squeeze(1).tolist()
    ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [-1.0, 0.5, 1.5])

    Args:
        weights: adapter → weight, each ≥ 0, sum 1; one mapping for all images, a list with one per image, or a
            function (step_index, num_steps) → either.
        normalize: divide weights by their sum.
        kl_scale: λ ≥ 0, one for all images or one each; 1 is plain DB-MPA, 0 the base model, above 1 extrapolates.
        strengths: adapter → sᵢ ≥ 0; those left out have 1.
        full_share: in [0, 1], of the steps: the first ones, which compute every row. Later ones compute one row in
            turn and take the others' differences to it from the last full step, see :mod:`dblightning.few_rows`.
    """

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        strengths: Mapping[str, float] | None = None,
        full_share: float = 1.0,
    ) -> None:
        super().__init__(weights, normalize, strengths)
        few_rows.check(full_share)
        self.kl_scale = kl_scale
        self.full_share = full_share

    def _plan(self, table: Tensor, adapters: Sequence[str], generators: Sequence[torch.Generator] | None) -> BlendPlan:
        num_steps, batch, m = table.shape
        scale = kl_scales(self.kl_scale, batch)
        # row 0 is the base model, row 1 + i adapter i
        gates = torch.cat([torch.zeros(1, m), torch.eye(m)]).unsqueeze(1).expand(-1, batch, -1)

        own = strengths_of(self.strengths, adapters)
        shares = table if own is None else table * own
        base = 1 - (scale.expand(num_steps, -1) if own is None else scale * shares.sum(2))
        mixes = torch.cat([base[:, None], (scale[:, None] * shares).mT], dim=1)  # (T, 1 + m, B)
        if self.full_share == 1:
            return lambda step_index: BlendStep(gates, mixes[step_index])
        now = few_rows.in_turn(mixes, ["", *adapters], few_rows.full_steps(num_steps, self.full_share))
        return lambda step_index: PartialStep.of(BlendStep(gates, mixes[step_index]), now[step_index])


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

    With DB-KLA's λ on top, which the paper leaves out. For λ ≤ 1 the base is one more draw, of probability 1 − λ, so
    each step's expected prediction is exactly (1−λ) ε_pre + λ Σᵢ wᵢ εᵢ. For λ > 1 that is no mixture, and the adapter
    that is drawn runs with its ΔW scaled by λ: the same to first order in ΔW.

    Args:
        weights, normalize: preference weights; per image, or (not for ``systematic``) as a function of the step.
        schedule: "rotation", in which every adapter's share is met along the whole path, and "golden", nearly so;
            "iid", the paper's independent draw at each step; or "systematic", which gives each adapter its share of
            all steps in random order. Each step's marginal is exactly w in all; see :mod:`dblightning.draws`.
        kl_scale: λ ≥ 0, one for all images or one each; 1 is plain, 0 the base model.
        strengths: adapter → sᵢ ≥ 0 as of :class:`DBMPA`. Where λ Σᵢ wᵢ sᵢ is at most 1, adapter i is drawn with
            probability λ wᵢ sᵢ and the base with the rest; else with wᵢ, and runs with its ΔW scaled by λ sᵢ.
    """

    needs_noise = True

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        schedule: str = DEFAULT_DRAWS,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        strengths: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weights, normalize, strengths)
        if schedule not in DRAWS:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, DRAWS))}, got {schedule!r}")
        if schedule == "systematic" and callable(weights):
            raise ValueError(
                "systematic draws share out one set of weights over all steps; use rotation for a schedule"
            )
        self.schedule = schedule
        self.kl_scale = kl_scale

    def _plan(self, table: Tensor, adapters: Sequence[str], generators: Sequence[torch.Generator] | None) -> BlendPlan:
        batch = table.shape[1]
        if generators is not None and len(generators) != batch:
            raise ValueError(f"got {len(generators)} generators for a batch of {batch} images")
        own = strengths_of(self.strengths, adapters)
        scales = kl_scales(self.kl_scale, batch)[:, None] * (torch.ones(len(adapters)) if own is None else own)
        columns = [
            self._gates(table[:, b], scales[b], None if generators is None else generators[b]) for b in range(batch)
        ]
        gates = torch.stack(columns, dim=1)  # (T, B, m)
        ones = _ones(batch)
        return lambda step_index: BlendStep(gates[step_index][None], ones)

    def _gates(self, weights: Tensor, scales: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gates of one image at every step, (T, m), from its weights (T, m) and the adapters' λ sᵢ, (m,)."""
        draw = DRAWS[self.schedule]
        shares = scales * weights
        base = 1 - shares.sum(1, keepdim=True)
        if bool((scales == 1).all()) or bool((base < -1e-9).any()):
            return scales.float() * torch.nn.functional.one_hot(draw(weights, generator), weights.shape[1]).float()
        drawn = draw(torch.cat([base.clamp_min(0), shares], dim=1), generator)
        return torch.nn.functional.one_hot(drawn, 1 + weights.shape[1]).float()[:, 1:]  # the base's gates are zero


class RewardedSoup(_Weighted):
    """Rewarded Soup with the exact weight average, ΔW = Σᵢ wᵢ BᵢAᵢ: one row at the base's cost.

    To first order in ΔW it equals DB-MPA.

    Args:
        weights, normalize: as of :class:`DBMPA`.
        strengths: adapter → sᵢ ≥ 0, which its weight is multiplied by; those left out have 1.
    """

    factors = False

    def _plan(self, table: Tensor, adapters: Sequence[str], generators: Sequence[torch.Generator] | None) -> BlendPlan:
        own = strengths_of(self.strengths, adapters)
        table = (table if own is None else table * own).float()
        ones = _ones(table.shape[1])
        return lambda step_index: BlendStep(table[step_index][None], ones, self.factors)


class RewardedSoupFactors(RewardedSoup):
    """Rewarded Soup as the paper's code computes it: A and B averaged apart, ΔW = (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ).

    The adapters' own terms get w² instead of w, so mid weights fall back toward the base model. The adapters must have
    one rank.
    """

    factors = True


#: method name → class, for the command line and the pipeline; a name added here works wherever a method is named
METHODS: dict[str, type[Blend]] = {
    "base": Base,
    "single": Single,
    "db-mpa": DBMPA,
    "db-kla": DBKLA,
    "db-mpa-ls": DBMPALS,
    "rewarded-soup": RewardedSoup,
    "rewarded-soup-factors": RewardedSoupFactors,
}


def resolve_blend(
    blend: Blend | type[Blend] | str,
    weights: BatchWeights | WeightSchedule | None = None,
    kl_scale: float | Sequence[float] = 1.0,
    normalize: bool = False,
    ls_schedule: str = DEFAULT_DRAWS,
    options: Mapping[str, Any] | None = None,
) -> Blend:
    """The blend that an object, a method's name or a class's dotted path means.

    Args:
        blend: an object, which is returned as it is; a name of ``METHODS``; a class, or its dotted path, such as
            "my_package.MyBlend". A path's module is imported: take paths from people you trust.
        weights: adapter → weight; one mapping, one per image, or a function of the step.
        kl_scale: λ.
        normalize: divide weights by their sum.
        ls_schedule: "rotation", "golden", "iid" or "systematic", read by ``db-mpa-ls`` alone.
        options: further arguments of the class.

    Raises:
        ValueError: an unknown method, or what it lacks or needs; see :meth:`Blend.from_preference`.
    """
    if isinstance(blend, Blend):
        given: dict[str, Any] = {"weights": weights, "normalize": normalize or None, "options": options or None}
        given["kl_scale"] = None if is_one(kl_scale) else kl_scale
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value!r} beside a {type(blend).__name__}, which has its own; leave it out")
        return blend
    kind = blend if isinstance(blend, type) else load_method(blend, METHODS, Blend)
    further = check_options(options, ("weights", "kl_scale", "normalize"))
    drawn = {"schedule": ls_schedule} if issubclass(kind, DBMPALS) else {}
    return kind.from_preference(weights, kl_scale, normalize, **drawn | further)


def make_blend(
    method: str,
    weights: BatchWeights | WeightSchedule | None = None,
    kl_scale: float | Sequence[float] = 1.0,
    normalize: bool = False,
    ls_schedule: str = DEFAULT_DRAWS,
) -> Blend:
    """:func:`resolve_blend` of a method's name; ``single`` and ``db-kla`` take the adapter that has weight 1.

    Raises:
        ValueError: an unknown method, weights that are missing or (for ``base``) given, or a λ the method lacks.
    """
    return resolve_blend(method, weights, kl_scale, normalize, ls_schedule)


def _subject(kind: type[Blend]) -> str:
    """A class's name in messages: its method's, where it has one."""
    return next((f"method {name!r}" for name, each in METHODS.items() if each is kind), kind.__name__)


def _only_adapter(kind: type[Blend], weights: BatchWeights | WeightSchedule | None) -> str | list[str]:
    if weights is None:
        raise ValueError(f"{_subject(kind)} needs weights, for example weights={{'aesthetic': 1.0}}")
    if isinstance(weights, Mapping):
        chosen = [name for name, value in weights.items() if value != 0]
        if len(chosen) == 1 and weights[chosen[0]] == 1:
            return chosen[0]
    elif not callable(weights):
        return [str(_only_adapter(kind, each)) for each in weights]
    raise ValueError(f"{_subject(kind)} takes one adapter of weight 1, got {weights}; use db-mpa for several")
