"""Blends: who predicts at each step. Every method is two small tensors, gates and a mix.

    gates  (K, B, m)   K forward rows for each of the B images, each with a gate over the m adapters
    mix    (K, B)      prediction_b = Σ_k mix[k, b] · ε(x_b, t, c_b ; gates[k, b])

Mixing predictions equals mixing drifts: every solver's drift is affine in the prediction with coefficients that depend
on t alone. Weights and λ are per image, so one batch can serve many users' preferences.
"""

from __future__ import annotations

import importlib
import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from dblightning.draws import DRAWS
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

    >>> weights_tensor([{"a": 1.0}, {"a": 0.25, "b": 0.75}], ["a", "b"], batch=2).tolist()
    [[1.0, 0.0], [0.25, 0.75]]

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


Method = TypeVar("Method")


def construct(
    kind: type[Method], given: Mapping[str, Any], options: Mapping[str, Any], subject: str | None = None
) -> Method:
    """A method's object, made of the arguments that its constructor names.

    Args:
        kind: the class.
        given: argument → value of what any method may be given, such as weights; None where nothing is.
        options: the class's further arguments.
        subject: what messages call it; None is the class's name.

    Raises:
        ValueError: an argument that the class lacks, or one that it needs.
    """
    subject = subject or kind.__name__
    parameters = inspect.signature(kind).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = [name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    for name in options:
        if name not in named and not open_ended:
            own = [each for each in named if each not in given]
            raise ValueError(f"{subject} has no option {name!r}; it has {own or 'none'}")
    present = {name: value for name, value in given.items() if value is not None}
    for name, value in present.items():
        if name not in named and not open_ended:
            raise ValueError(f"{subject} has no {name}, got {value!r}; leave it out, or use a method that has it")
    arguments = present | dict(options)
    missing = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise ValueError(f"{subject} needs {missing[0]}, got {sorted(arguments)}; give it too")
    return kind(**arguments)


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

        By default the constructor gets what it names of ``weights``, ``kl_scale`` and ``normalize``, and the options;
        override this where it names something else.

        Raises:
            ValueError: weights, a λ other than 1 or an option that the class lacks, or one that it needs.
        """
        named = inspect.signature(cls).parameters
        given: dict[str, Any] = {
            "weights": weights or None,
            "kl_scale": kl_scale if "kl_scale" in named or not _is_one(kl_scale) else None,
            "normalize": normalize if "normalize" in named else normalize or None,
        }
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
    """

    def __init__(self, weights: BatchWeights | WeightSchedule, normalize: bool = False) -> None:
        self.weights = weights
        self.normalize = normalize

    @classmethod
    def from_preference(
        cls,
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> Self:
        if weights is None:
            raise ValueError(f"{_subject(cls)} needs weights, for example weights={{'aesthetic': 1.0}}")
        return super().from_preference(weights, kl_scale, normalize, **options)

    def table(self, adapters: Sequence[str], batch: int, num_steps: int) -> Tensor:
        """Weights of every step, (T, B, m); all checked before the first step runs."""
        if not callable(self.weights):
            return weights_tensor(self.weights, adapters, batch, self.normalize).expand(num_steps, -1, -1)
        steps = (self.weights(step_index, num_steps) for step_index in range(num_steps))
        return torch.stack([weights_tensor(step, adapters, batch, self.normalize) for step in steps])


class DBMPA(_Weighted):
    """DB-MPA, ε = Σᵢ wᵢ εᵢ at each step (Algorithm 1, eq. 9).

    With DB-KLA's λ on top (eqs. 9 and 10 together): ε = (1−λ) ε_pre + λ Σᵢ wᵢ εᵢ. Three rows, the base model's first:

    >>> step = DBMPA({"a": 0.25, "b": 0.75}, kl_scale=2.0).start(["a", "b"], batch=1, num_steps=50)(0)
    >>> step.gates.squeeze(1).tolist(), step.mix.squeeze(1).tolist()
    ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [-1.0, 0.5, 1.5])

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

    @classmethod
    def from_preference(
        cls,
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> Self:
        """The blend of the one adapter that has weight 1."""
        given = {"adapter": _only_adapter(cls, weights), "kl_scale": None if _is_one(kl_scale) else kl_scale}
        return construct(cls, given, options, _subject(cls))


class Single(DBMPA):
    """One adapter alone: an endpoint of a blend, or a MORL oracle trained on the weighted reward itself (B.1).

    Args:
        adapter: its name; or one per image.
    """

    def __init__(self, adapter: str | Sequence[str]) -> None:
        super().__init__(_one_hot(adapter))

    @classmethod
    def from_preference(
        cls,
        weights: BatchWeights | WeightSchedule | None = None,
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> Self:
        """The blend of the one adapter that has weight 1."""
        given = {"adapter": _only_adapter(cls, weights), "kl_scale": None if _is_one(kl_scale) else kl_scale}
        return construct(cls, given, options, _subject(cls))


def _one_hot(adapter: str | Sequence[str]) -> BatchWeights:
    return {adapter: 1.0} if isinstance(adapter, str) else [{each: 1.0} for each in adapter]


class DBMPALS(_Weighted):
    """DB-MPA-LS (Algorithm 3, Prop. 2): one adapter per step and image, drawn with probability w. The base's cost.

    Args:
        weights, normalize: preference weights; per image, or (not for ``systematic``) as a function of the step.
        schedule: "iid", the paper's independent draw at each step; "rotation", in which every adapter's share is met
            along the whole path, and "golden", nearly so; or "systematic", which gives each adapter its share of all
            steps in random order. Each step's marginal is exactly w in all; see :mod:`dblightning.draws`.
        kl_scale: must be 1: with λ ≠ 1 the base's coefficient 1 − λ may be negative and is then no probability.
    """

    needs_noise = True

    def __init__(
        self,
        weights: BatchWeights | WeightSchedule,
        schedule: str = "iid",
        kl_scale: float | Sequence[float] = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__(weights, normalize)
        if schedule not in DRAWS:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, DRAWS))}, got {schedule!r}")
        if not _is_one(kl_scale):
            raise ValueError(
                f"DB-MPA-LS draws adapters with probability w, and with kl_scale {kl_scale} the coefficients can be "
                "negative, which no probability is; use DB-MPA for kl_scale other than 1"
            )
        if schedule == "systematic" and callable(weights):
            raise ValueError(
                "systematic draws share out one set of weights over all steps; use rotation for a schedule"
            )
        self.schedule = schedule

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        table = self.table(adapters, batch, num_steps)
        if generators is not None and len(generators) != batch:
            raise ValueError(f"got {len(generators)} generators for a batch of {batch} images")
        draw = DRAWS[self.schedule]
        columns = [draw(table[:, b], None if generators is None else generators[b]) for b in range(batch)]
        gates = torch.nn.functional.one_hot(torch.stack(columns, dim=1), len(adapters)).float()  # (T, B, m)
        ones = _ones(batch)
        return lambda step_index: BlendStep(gates[step_index][None], ones)


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
    ls_schedule: str = "iid",
    options: Mapping[str, Any] | None = None,
) -> Blend:
    """The blend that an object, a method's name or a class's dotted path means.

    Args:
        blend: an object, which is returned as it is; a name of ``METHODS``; a class, or its dotted path, such as
            "my_package.MyBlend". A path's module is imported: take paths from people you trust.
        weights: adapter → weight; one mapping, one per image, or a function of the step.
        kl_scale: λ.
        normalize: divide weights by their sum.
        ls_schedule: "iid" or "systematic", read by ``db-mpa-ls`` alone.
        options: further arguments of the class.

    Raises:
        ValueError: an unknown method, or what it lacks or needs; see :meth:`Blend.from_preference`.
    """
    if isinstance(blend, Blend):
        given: dict[str, Any] = {"weights": weights, "normalize": normalize or None, "options": options or None}
        given["kl_scale"] = None if _is_one(kl_scale) else kl_scale
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value!r} beside a {type(blend).__name__}, which has its own; leave it out")
        return blend
    kind = blend if isinstance(blend, type) else load_method(blend, METHODS, Blend)
    further = check_options(options, ("weights", "kl_scale", "normalize"))
    drawn = {"schedule": ls_schedule} if issubclass(kind, DBMPALS) else {}
    return kind.from_preference(weights, kl_scale, normalize, **drawn | further)


def load_method(method: str, known: Mapping[str, type[Method]], *kinds: type) -> Any:
    """The class of a method's name or dotted path.

    Args:
        method: a name of ``known``, or module and class such as "my_package.MyBlend".
        known: name → class.
        kinds: what a class found by its path must derive from.

    Raises:
        ValueError: neither a name nor a path of such a class.
    """
    if method in known:
        return known[method]
    bases = " or ".join(kind.__name__ for kind in kinds)
    module, _, name = str(method).rpartition(".")
    if not module or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"method must be one of {sorted(known)} or the dotted path of a {bases} class, got {method!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {method!r} cannot be imported: {error}; name its module and class") from error
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ValueError(f"method {method!r} must be a {bases} class, got {found!r}")
    return found


def check_options(options: Mapping[str, Any] | None, apart: Sequence[str]) -> dict[str, Any]:
    """A method's further arguments, none of which has a place of its own.

    Raises:
        ValueError: one of ``apart`` among them.
    """
    for name, value in (options or {}).items():
        if name in apart:
            raise ValueError(f"{name} is not an option, got {value!r} among the options; give it beside them")
    return dict(options or {})


def make_blend(
    method: str,
    weights: BatchWeights | WeightSchedule | None = None,
    kl_scale: float | Sequence[float] = 1.0,
    normalize: bool = False,
    ls_schedule: str = "iid",
) -> Blend:
    """:func:`resolve_blend` of a method's name; ``single`` and ``db-kla`` take the adapter that has weight 1.

    Raises:
        ValueError: an unknown method, weights that are missing or (for ``base``) given, or a λ the method lacks.
    """
    return resolve_blend(method, weights, kl_scale, normalize, ls_schedule)


def _subject(kind: type[Blend]) -> str:
    """What messages call a class: by its method's name, where it has one."""
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


def _is_one(kl_scale: float | Sequence[float]) -> bool:
    return all(each == 1 for each in ([kl_scale] if _is_scalar(kl_scale) else kl_scale))  # type: ignore[union-attr]
