"""One LoRA of several: the exact Rewarded Soup ΔW = Σᵢ wᵢ sᵢ BᵢAᵢ as two factors, whole or cut by SVD."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dblightning.adapters.fit import same_base
from dblightning.adapters.lora import LoraFactors, LoraFile, left_out
from dblightning.weights import check_weights


@dataclass(frozen=True)
class Soup:
    """A soup as one LoRA, and what was lost on the way.

    Attributes:
        lora: the LoRA; its ``facts`` name the parts, the weights, the rank and the error.
        rank: the largest of a module.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules, Frobenius norms; 0 where nothing was cut.
        worst: the module with the largest error of its own, and that error; ("", 0.0) where nothing was cut.
    """

    lora: LoraFile
    rank: int
    error: float
    worst: tuple[str, float]


def soup_lora(
    parts: Mapping[str, LoraFile],
    weights: Mapping[str, float],
    rank: int | None = None,
    normalize: bool = False,
) -> Soup:
    """The LoRA whose ΔW is the weighted average of several LoRAs', a module that one of them lacks counting as zero.

    Stacked factors say it exactly: A = [A₁; A₂; …], B = [w₁s₁B₁, w₂s₂B₂, …], whose rank is the sum of the ranks. Parts
    of weight 0 are left out.

    Args:
        parts: adapter → LoRA, as :func:`dblightning.adapters.files.read_lora` returns it.
        weights: adapter → weight, each ≥ 0, sum 1.
        rank: largest rank of a module, at least 1; the best approximation of that rank in the Frobenius norm (truncated
            SVD). None keeps all of it.
        normalize: divide the weights by their sum.

    Raises:
        ValueError: weights that do not fit, a rank below 1, LoRAs of different bases or denoisers, modules of different
            shapes, or a DoRA (its ΔW has full rank).
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; leave it out for the exact soup")
    used = {name: value for name, value in check_weights(weights, list(parts), normalize, "adapters").items() if value}
    files = {name: parts[name] for name in used}
    _check(files)
    first = next(iter(files.values()))
    modules: dict[str, LoraFactors] = {}
    lost: dict[str, tuple[float, float]] = {}  # module → squared norms of what was cut and of all
    for module in dict.fromkeys(module for file in files.values() for module in file.modules[first.denoiser]):
        found = {name: each for name, file in files.items() if (each := file.modules[first.denoiser].get(module))}
        stacked = _stacked(module, found, used)
        modules[module], lost[module] = (stacked, (0.0, 1.0)) if rank is None else _cut(stacked, rank)
    if any(each.bias is not None for each in modules.values()):  # PEFT gives all modules one or none
        for each in modules.values():
            each.bias = torch.zeros(len(each.up)) if each.bias is None else each.bias
    errors = {module: math.sqrt(cut / whole) if cut else 0.0 for module, (cut, whole) in lost.items()}
    whole = sum(all_ for _, all_ in lost.values())
    error = math.sqrt(sum(cut for cut, _ in lost.values()) / whole) if whole and rank is not None else 0.0
    worst = max(errors, key=lambda module: errors[module])
    largest = max(each.rank for each in modules.values())
    facts: dict[str, Any] = {
        **{key: first.facts[key] for key in ("base", "base_fingerprint") if key in first.facts},
        "method": "rewarded-soup",
        "weights": used,
        "rank": largest,
        "relative_error": error,
        "parts": {name: _about(file) for name, file in files.items()},
    }
    lora = LoraFile({first.denoiser: modules}, facts, denoiser=first.denoiser)
    return Soup(lora, largest, error, (worst, errors[worst]) if errors[worst] else ("", 0.0))


def _check(files: Mapping[str, LoraFile]) -> None:
    """Refuse LoRAs that have no soup as one LoRA."""
    names = list(files)
    first = files[names[0]]
    for name, file in files.items():
        if file.denoiser not in file.modules:
            raise ValueError(f"adapter {name!r} holds no LoRA of a denoiser; leave it out")
        if left_out(file):
            warnings.warn(f"adapter {name!r} also holds {left_out(file)}, which a blend leaves out", stacklevel=3)
        if file.denoiser != first.denoiser:
            raise ValueError(f"adapters {names[0]!r} and {name!r} are of a {first.denoiser} and of a {file.denoiser}")
        dora = next((module for module, each in file.modules[file.denoiser].items() if each.magnitude is not None), "")
        if dora:
            raise ValueError(
                f"adapter {name!r} is a DoRA ({dora}), whose ΔW has full rank: no LoRA holds its soup; blend it live"
            )
        one, two = first.facts.get("base_fingerprint"), file.facts.get("base_fingerprint")
        if one and two and not same_base(one, two):
            raise ValueError(
                f"adapters {names[0]!r} and {name!r} were trained on different base models, "
                f"{first.facts.get('base')!r} and {file.facts.get('base')!r}; a soup needs one base"
            )


def _stacked(module: str, found: Mapping[str, LoraFactors], weights: Mapping[str, float]) -> LoraFactors:
    """A module's soup, exactly; float32, scale 1."""
    scales = {name: weights[name] * each.alpha / each.rank for name, each in found.items()}
    shapes = {(len(each.up), *each.down.shape[1:]) for each in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"the adapters are of different architectures: {module} has the shapes {sorted(shapes)}")
    down = torch.cat([each.down.float() for each in found.values()])
    up = torch.cat([scales[name] * each.up.float() for name, each in found.items()], dim=1)
    biases = [scales[name] * each.bias.float() for name, each in found.items() if each.bias is not None]
    return LoraFactors(down, up, float(len(down)), torch.stack(biases).sum(0) if biases else None)


def _cut(factors: LoraFactors, rank: int) -> tuple[LoraFactors, tuple[float, float]]:
    """The nearest LoRA of at most ``rank``, and the squared norms of what was cut and of all.

    The SVD is of a small matrix: with up = Q R and downᵀ = P S it is that of R Sᵀ (r × r), in float64.
    """
    up, down = factors.up.flatten(1).double(), factors.down.flatten(1).double()
    q, r = torch.linalg.qr(up)
    p, s = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r @ s.T, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()  # half of each singular value to either side, so that half precision rounds both alike
    new_up = ((q @ left[:, :kept]) * root).float()
    new_down = (root[:, None] * (right[:kept] @ p.T)).float()
    cut, whole = float(values[kept:].square().sum()), float(values.square().sum())
    shaped = LoraFactors(
        new_down.reshape(kept, *factors.down.shape[1:]),
        new_up.reshape(len(new_up), kept, *factors.up.shape[2:]),
        float(kept),
        factors.bias,
    )
    return shaped, (cut, whole)


def _about(file: LoraFile) -> dict[str, Any]:
    """What a part's own metadata say about its making."""
    names = ("adapter", "reward", "kl_weight", "step", "sha256")
    return {name: file.facts[name] for name in names if name in file.facts}


def as_dtype(lora: LoraFile, dtype: torch.dtype) -> LoraFile:
    """The same LoRA in another precision; scales stay exact."""

    def rounded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    modules = {
        component: {
            module: LoraFactors(
                each.down.to(dtype), each.up.to(dtype), each.alpha, rounded(each.bias), rounded(each.magnitude)
            )
            for module, each in found.items()
        }
        for component, found in lora.modules.items()
    }
    return LoraFile(modules, lora.facts, lora.header, lora.path, lora.assumed, lora.foreign, lora.denoiser)
