"""A blend step as denoiser calls: which rows run together, on gates or on merged weights, and how they are mixed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dblightning.adapters import Gating, Segment
from dblightning.backbone import Backbone, Conditioning
from dblightning.blend_step import BlendPlan, BlendStep
from dblightning.kept_outputs import Recalled

Execution = Literal["auto", "gated", "merged"]


class Call(NamedTuple):
    """One call of the denoiser: some rows of the flattened (K, B)."""

    rows: Tensor  # int64 (r,), k · B + b
    images: Tensor | None  # int64 (r,), b; None: every image, in order
    gating: Gating  # of r rows


class Calls(NamedTuple):
    """Execution of a blend step, on the latents' device."""

    calls: list[Call]
    mix: Tensor | None  # (K, B); None: one row per image, unscaled


#: on the CPU, images per gate vector from which merged weights beat one gated batch (measured on the miniature, where
#: the gated layer weighs most; see docs/methods.md)
MERGED_GROUP = 16
#: on the CPU, the share of the adapted layers' multiplications that gates add, from which merged weights beat them at
#: any number of images (measured on both miniatures, where ranks are large for the layers' width)
MERGED_SHARE = 0.5


def arrange(
    blend: BlendStep,
    device: torch.device,
    execution: Execution = "auto",
    max_rows: int | None = None,
    merged_limit: int = 4,
    gated_share: float = 0.0,
) -> Calls:
    """Split a blend step into denoiser calls: only rows whose mix is not zero are computed.

    Args:
        blend: gates and mix, on the CPU.
        device: where the latents are.
        execution: "gated" adds the adapters row by row; "merged" runs the rows of each gate vector on merged weights,
            in one call for as many vectors as merged copies are kept; "auto" takes merged where all rows share one
            gate vector, and on the CPU where all merged copies fit and each vector has at least 16 rows or the gated
            layers' share is at least a half; else gated. Gradients to the adapters need "gated".
        max_rows: rows per denoiser call, before guidance doubles them; None is no limit. A run that is out of memory
            halves it and tries again.
        merged_limit: merged copies that may be kept.
        gated_share: ``AdapterBank.gated_share``, the multiplications that gates add to the adapted layers'.
    """
    needed = (blend.mix != 0).any(1)
    gates, mix = blend.gates[needed], blend.mix[needed]
    batch = mix.shape[1]
    row_of, image_of = (mix != 0).nonzero(as_tuple=True)
    vectors = gates[row_of, image_of]  # (R, m)
    unique, which, counts = _distinct(vectors)
    if execution == "auto":
        large = gated_share >= MERGED_SHARE or int(counts.min()) >= MERGED_GROUP
        fits = int((unique != 0).any(1).sum()) <= merged_limit
        execution = "merged" if len(unique) == 1 or (device.type == "cpu" and large and fits) else "gated"
    merged = execution == "merged"
    groups = _by_vector(unique, which, merged_limit) if merged else [torch.arange(len(row_of))]
    calls = []
    for group in groups:
        for part in group.split(max_rows or len(group)):
            images = image_of[part]
            in_order = len(part) == batch and bool((images == torch.arange(batch)).all())
            calls.append(
                Call(
                    (row_of[part] * batch + images).to(device),
                    None if in_order else images.to(device),
                    _merged(unique, which[part], blend.factors)
                    if merged
                    else _gated(vectors[part], blend.factors, device),
                )
            )
    plain = mix.shape[0] == 1 and bool((mix == 1).all())
    return Calls(calls, None if plain else mix.to(device))


def _by_vector(unique: Tensor, which: Tensor, merged_limit: int) -> list[Tensor]:
    """Rows, those of a gate vector side by side; each list of vectors that are merged at the same time."""
    groups: list[list[Tensor]] = [[]]
    free = max(merged_limit, 1)
    for each, vector in enumerate(unique):
        copies = int(vector.any())  # the base model needs none
        if copies > free:
            groups.append([])
            free = max(merged_limit, 1)
        groups[-1].append((which == each).nonzero().flatten())
        free -= copies
    return [torch.cat(group) for group in groups]


def _gated(vectors: Tensor, factors: bool, device: torch.device) -> Gating:
    return Gating(vectors.to(device) if vectors.any() else None, factors)


def _merged(unique: Tensor, which: Tensor, factors: bool) -> Gating:
    """Merged weights of rows, those of a vector side by side."""
    indices, counts = torch.unique_consecutive(which, return_counts=True)
    segments = [Segment(tuple(unique[each].tolist()), int(rows)) for each, rows in zip(indices, counts, strict=True)]
    if len(segments) == 1:
        return Gating(factors=factors, merged=segments[0].vector)
    return Gating(factors=factors, segments=tuple(segments))


def check_execution(execution: str, max_rows: int | None) -> None:
    """Refuse what :func:`arrange` does not know.

    Raises:
        ValueError: another execution, or a limit below one row.
    """
    if execution not in ("auto", "gated", "merged"):
        raise ValueError(f"execution must be auto, gated or merged, got {execution!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, or None for no limit, got {max_rows}")


def count_vectors(plan: BlendPlan, num_steps: int) -> int:
    """Distinct gate vectors of a whole run, without the base model's, which needs no merged copy."""
    vectors: set[bytes] = set()
    for step_index in range(num_steps):
        gates, mix, _ = plan(step_index)
        distinct, _, _ = _distinct(gates[mix != 0])
        vectors |= {vector.numpy().tobytes() for vector in distinct if vector.any()}
    return len(vectors)


def _distinct(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows of (R, m), the index of each row's, and how often each occurs."""
    if vectors.shape[1] == 0:  # no adapters
        count = len(vectors)
        return vectors[:1], torch.zeros(count, dtype=torch.int64), torch.tensor([count])
    return torch.unique(vectors, dim=0, return_inverse=True, return_counts=True)


def predict(
    backbone: Backbone,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    calls: Calls,
    guidance_scale: float,
    recalled: Recalled | None = None,
) -> Tensor:
    """The blended prediction of B images, Σ_k mix[k, b] · ε(x_b, t, c_b ; gates[k, b]).

    Args:
        latents: (B, C, h, w), as the denoiser wants them.
        timesteps: int64 (B,).
        conditioning: B rows.
        calls: of :func:`arrange`.
        guidance_scale: classifier-free guidance; 1 off. Applied per row, which equals applying it to the mix; where it
            is not affine in the predictions, both passes are mixed and guided once.
        recalled: outputs of earlier steps, which are part of the mix.

    Returns:
        (B, C, h, w), float32.
    """
    guided_last = guidance_scale > 1 and not backbone.affine_guidance
    run = backbone.passes if guided_last else backbone.denoise
    outputs = [
        run(
            latents if call.images is None else latents[call.images],
            timesteps if call.images is None else timesteps[call.images],
            conditioning if call.images is None else conditioning.rows(call.images),
            guidance_scale,
            call.gating,
        )
        for call in calls.calls
    ]
    rows = _in_place(outputs, calls, len(latents))
    if calls.mix is None:
        mixed = rows[0]
    else:
        mixed = (calls.mix.to(rows.dtype).view(*calls.mix.shape, *[1] * (rows.ndim - 2)) * rows).sum(0)
    if recalled is not None:
        mixed = recalled.complete(mixed, rows)
    if guided_last:
        return backbone.guide(mixed[:, 0], mixed[:, 1], guidance_scale, conditioning)
    return mixed


def _in_place(outputs: list[Tensor], calls: Calls, images: int) -> Tensor:
    """Each call's outputs, put in the place of their rows and images: (K, B, …)."""
    if calls.mix is None and len(outputs) == 1 and calls.calls[0].images is None:  # merged rows lie by their vectors
        return outputs[0][None]
    output = torch.cat(outputs)
    # scattered to (K, B) and summed over K, not index_add: atomics would make a GPU's sum depend on its order
    height = 1 if calls.mix is None else len(calls.mix)
    rows = torch.zeros(height * images, *output.shape[1:], dtype=output.dtype, device=output.device)
    return rows.index_copy(0, torch.cat([call.rows for call in calls.calls]), output).unflatten(0, (height, images))
