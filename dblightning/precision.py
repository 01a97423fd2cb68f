"""Float32 arithmetic on weights of any precision, for the few quantities that rounding would drown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)


class _Widened(TorchFunctionMode):
    """Operations of float32 and half-precision tensors together run in float32, one widened copy at a time.

    Torch itself does so for sums and products; here also for linear layers, convolutions and norms, whose weights are
    the half-precision operands, and float32 values stay so where a layer would round them. What touches half-precision
    tensors alone, such as moving a weight, stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].dtype == torch.float32:
            # a norm of transformers rounds its input to its weight's precision
            args = [torch.float32 if isinstance(each, torch.dtype) and each in HALF else each for each in args]
            if kwargs.get("dtype") in HALF:
                kwargs = {**kwargs, "dtype": torch.float32}
        given = [*args, *kwargs.values()]
        dtypes = {each.dtype for each in given if isinstance(each, Tensor)}
        if torch.float32 in dtypes and not dtypes.isdisjoint(HALF):
            args = [_widen(each) for each in args]
            kwargs = {key: _widen(each) for key, each in kwargs.items()}
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Forwards inside compute in float32, whatever precision their weights are stored in.

    The weights keep their values: only the arithmetic changes, without autocast and TF32. Each weight is widened when
    its layer runs and freed after it, so memory grows by one layer's. The inputs must be float32. Compiled modules run
    uncompiled.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_tf32())
        stack.enter_context(_Widened())
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def computes_in_float32(module: nn.Module, device: torch.device) -> bool:
    """Whether a module's forward runs in full float32 here: float32 weights, no autocast, no TF32."""
    if torch.is_autocast_enabled(device.type) or next(module.parameters()).dtype != torch.float32:
        return False
    if device.type == "cpu":
        return _exact_products(device)
    if device.type != "cuda":
        return True
    return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def _exact_products(device: torch.device) -> bool:
    """Whether a float32 product keeps its digits, which some CPUs give up at less than "highest" precision.

    1 + 2⁻¹² is a float32, but neither a TF32 (10 digits after the point) nor a bfloat16 (7).
    """
    ones = torch.full((64, 64), 1 + 2**-12, device=device)
    return torch.equal(ones @ torch.eye(64, device=device), ones)
