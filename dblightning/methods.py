"""Common ground of blends and steering: preferences as tensors, and classes found by a method's name or dotted path."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dblightning.class_paths import import_class, is_path, names
from dblightning.weights import BatchWeights, check_kl_scale, check_weights


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
    values = [float(kl_scale)] * batch if is_scalar(kl_scale) else [float(each) for each in kl_scale]  # type: ignore[arg-type, union-attr]
    if len(values) != batch:
        raise ValueError(f"got kl_scale for {len(values)} images, but the batch has {batch}; give one per image")
    for value in values:
        check_kl_scale(value)
    return torch.tensor(values, dtype=torch.float64)


def strengths_of(strengths: Mapping[str, float] | None, adapters: Sequence[str]) -> Tensor | None:
    """The strength of each adapter, float64 (m,), 1 where none is given; None where there are none at all.

    Raises:
        ValueError: a negative or infinite strength, or an adapter that is not there.
    """
    if not strengths:
        return None
    for name, value in strengths.items():
        if name not in adapters:
            raise ValueError(f"strengths names the adapter {name!r}, but the adapters are {list(adapters)}")
        if not (isinstance(value, numbers.Real) and 0 <= value < float("inf")):
            raise ValueError(f"the strength of {name!r} must be a finite number >= 0, got {value!r}")
    return torch.tensor([float(strengths.get(name, 1.0)) for name in adapters], dtype=torch.float64)


def is_scalar(value: object) -> bool:
    """Whether one value stands for all images."""
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


def is_one(kl_scale: float | Sequence[float]) -> bool:
    """Whether λ is 1 for every image, which every method has."""
    return all(each == 1 for each in ([kl_scale] if is_scalar(kl_scale) else kl_scale))  # type: ignore[union-attr]


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
    if not is_path(method):
        raise ValueError(
            f"method must be one of {sorted(known)} or the dotted path of a {names(*kinds)} class, got {method!r}"
        )
    return import_class(method, "method", *kinds)


def check_options(options: Mapping[str, Any] | None, apart: Sequence[str]) -> dict[str, Any]:
    """A method's further arguments, none of which has a place of its own.

    Raises:
        ValueError: one of ``apart`` among them.
    """
    for name, value in (options or {}).items():
        if name in apart:
            raise ValueError(f"{name} is not an option, got {value!r} among the options; give it beside them")
    return dict(options or {})
