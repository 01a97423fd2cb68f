"""Preference weights and strengths: what they may be. Imports no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence

Weights = Mapping[str, float]
#: one preference for all images, or one per image
BatchWeights = Weights | Sequence[Weights]
#: weights that change along the trajectory: (step_index, num_steps) → weights
WeightSchedule = Callable[[int, int], BatchWeights]


def check_weights(
    weights: Weights, names: Sequence[str], normalize: bool = False, kind: str = "loaded adapters"
) -> dict[str, float]:
    """Weights as floats, each ≥ 0, sum 1, naming only what there is.

    >>> check_weights({"a": 3, "b": 1}, ["a", "b", "c"], normalize=True)
    {'a': 0.75, 'b': 0.25}
    >>> check_weights({"a": 0.5}, ["a", "b"])
    Traceback (most recent call last):
    ValueError: blend weights must be >= 0 and sum to 1, got {'a': 0.5} (sum 0.5); divide by their sum or pass ...

    Args:
        weights: name → weight.
        names: the names there are.
        normalize: divide the weights by their sum.
        kind: what the names are, for the message.

    Raises:
        TypeError: something else than a mapping of names to numbers.
        ValueError: weights that are empty, negative, not finite, do not sum to 1 (tolerance 1e-6), or name an unknown
            adapter.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(value, numbers.Real) for value in weights.values()):
        raise TypeError(f"weights must map names to numbers, such as {{'aesthetic': 1.0}}, got {weights!r}")
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"weights name {unknown[0]!r}, but the {kind} are {list(names)}")
    values = {name: float(value) for name, value in weights.items()}
    if not values:
        raise ValueError(f"weights are empty; give a weight to at least one of {list(names)}")
    if any(not math.isfinite(value) or value < 0 for value in values.values()):
        raise ValueError(f"blend weights must be finite and >= 0, got {values}")
    total = sum(values.values())
    if normalize and total > 0:
        return {name: value / total for name, value in values.items()}
    # isclose, not ==: 0.7 + 0.2 + 0.1 is 0.9999999999999999
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(
            f"blend weights must be >= 0 and sum to 1, got {values} (sum {total:g}); divide by their sum or pass "
            "normalize=True"
        )
    return values


def check_kl_scale(value: float) -> None:
    """Refuse a λ that is negative or not finite.

    Raises:
        ValueError: naming it.
    """
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"kl_scale (λ) must be finite and >= 0, got {value}; 0 is the base model, 1 the adapters")
