"""Which adapter runs at each step of DB-MPA-LS: sequences of draws whose every step has exactly the marginal w.

The paper draws each step on its own (Algorithm 3). The marginals are all that Proposition 2 needs, so the draws of one
path may depend on each other, and their order decides how far a path strays from DB-MPA: after t steps an adapter has
had t·w ± O(√t) steps with independent draws, and t·w ± O(1) with the ordered ones below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (√5 − 1) / 2, the fraction worst approximated by ratios: its multiples spread evenly over [0, 1)
GOLDEN = (5**0.5 - 1) / 2


def draw_iid(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent draws (Algorithm 3).

    Args:
        weights: of every step, each ≥ 0 with sum 1, float64 (T, m).
        generator: None takes torch's global one.

    Returns:
        The adapter of each step, int64 (T,).
    """
    return _by_points(weights, torch.rand(len(weights), 1, generator=generator, dtype=torch.float64))


def draw_systematic(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Systematic sampling in random order: each adapter's share of the whole path to one step; arguments as above.

    Only for weights that are the same at every step.
    """
    num_steps = len(weights)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    points = ((torch.arange(num_steps) + offset) / num_steps)[:, None]
    return _by_points(weights, points[torch.randperm(num_steps, generator=generator)])


def draw_golden(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws at the points (u + t·(√5 − 1)/2) mod 1 of the cumulative weights, u ~ U(0, 1); arguments as above."""
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    return _by_points(weights, ((offset + GOLDEN * torch.arange(len(weights), dtype=torch.float64)) % 1)[:, None])


def draw_rotation(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws in rotation, see :func:`rotation`; arguments as above."""
    offsets = torch.rand(weights.shape[1] - 1, generator=generator, dtype=torch.float64)
    return rotation(weights, offsets)


def rotation(weights: Tensor, offsets: Tensor) -> Tensor:
    """A sequence that meets every adapter's share along the whole path: to one step of two, to 1 + log₂ m of m.

    Of two adapters, step t takes the first where an integer lies in (W_t + u, W_{t+1} + u], W the sum of its weights so
    far and u ~ U(0, 1): that has probability w_t, whatever w was before. Of more, the list is halved, the halves rotate
    with their summed weights, and so on inside the half that was taken, with a sum and a u of its own over the steps
    that come to it. So every step's marginal is exactly w.

    Args:
        weights: of every step, each ≥ 0 with sum 1, float64 (T, m).
        offsets: one u in [0, 1) for each place the list is cut at, float64 (m − 1,).

    Returns:
        The adapter of each step, int64 (T,).
    """
    drawn = torch.zeros(len(weights), dtype=torch.int64)
    pending = [(torch.arange(len(weights)), 0, weights.shape[1])]
    while pending:
        steps, first, last = pending.pop()
        if last - first == 1:
            drawn[steps] = first
            continue
        middle = (first + last) // 2
        left = takes_left(weights[steps, first:middle].sum(1), weights[steps, middle:last].sum(1), offsets[middle - 1])
        pending += [(steps[left], first, middle), (steps[~left], middle, last)]
    return drawn


def takes_left(left: Tensor, right: Tensor, offset: Tensor) -> Tensor:
    """Which steps the left of two halves takes in rotation, bool (T,); the halves' weights are at these steps, (T,)."""
    both = left + right
    share = torch.where(both > 0, left / both, 0.0)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), share.cumsum(0)]) + offset
    # 1e-9: a sum of tenths must reach the integer that it is
    turned = (sums + 1e-9).floor().diff() > 0
    return (turned & (share > 0)) | (share >= 1)


def _by_points(weights: Tensor, points: Tensor) -> Tensor:
    """The adapter whose stretch of the cumulative weights each point (T, 1) of [0, 1) falls into."""
    cumulative = weights.cumsum(1)
    drawn = (points * cumulative[:, -1:] >= cumulative).sum(1)
    last = (weights > 0).long().cumsum(1).argmax(1)  # rounding must not pick an adapter of weight 0
    return torch.minimum(drawn, last)


#: name of the sequence that is drawn where none is named: the closest to DB-MPA (docs/methods.md)
DEFAULT_DRAWS = "rotation"
#: name → sequence of draws
DRAWS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "iid": draw_iid,
    "systematic": draw_systematic,
    "golden": draw_golden,
    "rotation": draw_rotation,
}
