"""A blend of blends: every image of a batch has a method, weights and λ of its own, and all share one denoiser pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dblightning.blending import Blend, BlendPlan, BlendStep, PartialStep


class PerImage(Blend):
    """One blend per image: its rows beside the others', those that an image does not need with a mix of zero.

    Rows with a mix of zero are not computed, so a batch costs the sum of its images' rows.

    >>> from dblightning.blending import Base, DBMPA
    >>> step = PerImage([Base(), DBMPA({"a": 0.25, "b": 0.75})]).start(["a", "b"], batch=2, num_steps=1)(0)
    >>> step.mix.T.tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]]

    Args:
        blends: one per image, in the batch's order. Where one has ``needs_noise``, all have steps with noise.

    Raises (at the start of a run):
        ValueError: another number of blends than images, one that does not fit, or factor averages beside others.
    """

    def __init__(self, blends: Sequence[Blend]) -> None:
        self.blends = list(blends)
        self.needs_noise = any(blend.needs_noise for blend in self.blends)  # type: ignore[misc]  # a class's elsewhere

    def start(
        self, adapters: Sequence[str], batch: int, num_steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> BlendPlan:
        if len(self.blends) != batch:
            raise ValueError(f"got {len(self.blends)} blends for {batch} images; give one each")
        own = [None] * batch if generators is None else [[each] for each in generators]
        plans = [blend.start(adapters, 1, num_steps, each) for blend, each in zip(self.blends, own, strict=True)]

        def plan(step_index: int) -> BlendStep:
            return _beside([each(step_index) for each in plans])

        return plan


def _beside(steps: Sequence[BlendStep]) -> BlendStep:
    """Steps of one image each, side by side; the shorter ones end in rows that are not computed."""
    factors = {step.factors for step in steps}
    if len(factors) > 1:
        raise ValueError("rewarded-soup-factors gates A and B apart, so its images need a batch of their own")
    height = max(len(step.mix) for step in steps)
    gates = torch.zeros(height, len(steps), steps[0].gates.shape[-1])
    mix, now = torch.zeros(2, height, len(steps), dtype=torch.float64)
    for image, step in enumerate(steps):
        gates[: len(step.mix), image] = step.gates[:, 0]
        mix[: len(step.mix), image] = step.mix[:, 0]
        now[: len(step.mix), image] = (step.now if isinstance(step, PartialStep) else step.mix)[:, 0]
    whole = BlendStep(gates, mix, factors.pop())
    return PartialStep.of(whole, now) if any(isinstance(step, PartialStep) for step in steps) else whole
