"""A blend step as denoiser calls: which rows run together, on gates or on merged weights, and how they are mixed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dblightning.adapters import Gating
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


def arrange(
    blend: BlendStep,
    device: torch.device,
    execution: Execution = "auto",
    max_rows: int | None = None,
    merged_limit: int = 4,
) -> Calls:
    """Split a blend step into denoiser calls: only rows whose mix is not zero are computed.

    Args:
        blend: gates and mix, on the CPU.
        device: where the latents are.
        execution: "gated" runs all rows in one batch; "merged" runs the rows of each gate vector on merged weights;
            "auto" takes merged where all rows share one gate vector (and, on the CPU, where each vector has at least
            16 rows and all merged copies fit), else gated. Gradients to the adapters need "gated".
        max_rows: rows per denoiser call, before guidance doubles them; None is no limit. A run that is out of memory
            halves it and tries again.
        merged_limit: merged copies that may be kept.
    """
    needed = (blend.mix != 0).any(1)
    gates, mix = blend.gates[needed], blend.mix[needed]
    batch = mix.shape[1]
    row_of, image_of = (mix != 0).nonzero(as_tuple=True)
    vectors = gates[row_of, image_of]  # (R, m)
    unique, which, counts = _distinct(vectors)
    if execution == "auto":
        large = device.type == "cpu" and int(counts.min()) >= MERGED_GROUP
        fits = int((unique != 0).any(1).sum()) <= merged_limit
        execution = "merged" if len(unique) == 1 or (large and fits) else "gated"
    if execution == "merged":
        vectors_used: list[tuple[float, ...] | None] = [tuple(vector.tolist()) for vector in unique]
        groups = [(which == each).nonzero().flatten() for each in range(len(unique))]
    else:
        vectors_used, groups = [None], [torch.arange(len(row_of))]
    calls = []
    for group, vector in zip(groups, vectors_used, strict=True):
        for part in group.split(max_rows or len(group)):
            images = image_of[part]
            in_order = len(part) == batch and bool((images == torch.arange(batch)).all())
            gated = vector is None and bool(vectors[part].any())
            calls.append(
                Call(
                    (row_of[part] * batch + images).to(device),
                    None if in_order else images.to(device),
                    Gating(vectors[part].to(device) if gated else None, blend.factors, vector),
                )
            )
    plain = mix.shape[0] == 1 and bool((mix == 1).all())
    return Calls(calls, None if plain else mix.to(device))


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
    if calls.mix is None and len(outputs) == 1:
        return outputs[0][None]
    output = torch.cat(outputs)
    # scattered to (K, B) and summed over K, not index_add: atomics would make a GPU's sum depend on its order
    height = 1 if calls.mix is None else len(calls.mix)
    rows = torch.zeros(height * images, *output.shape[1:], dtype=output.dtype, device=output.device)
    return rows.index_copy(0, torch.cat([call.rows for call in calls.calls]), output).unflatten(0, (height, images))
