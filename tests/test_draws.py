from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dblightning.draws import DRAWS, draw_golden, draw_rotation, rotation

#: offsets at the middles of tenths: the mean over them of ⌊x + u⌋ is exact where x is a multiple of a tenth
OFFSETS = (torch.arange(10, dtype=torch.float64) + 0.5) / 10


def weights_of(shares: list[float], m: int) -> list[float]:
    """Weights whose list, halved again and again, has these shares of the left half, in the order of the cuts."""

    def split(first: int, last: int, mass: float) -> list[float]:
        if last - first == 1:
            return [mass]
        middle = (first + last) // 2
        share = shares[middle - 1]
        return split(first, middle, mass * share) + split(middle, last, mass * (1 - share))

    return split(0, m, 1.0)


def frequencies(weights: Tensor) -> Tensor:
    """How often each adapter is drawn at each step over all offsets, (T, m)."""
    m = weights.shape[1]
    counts = torch.zeros_like(weights)
    for offsets in itertools.product(OFFSETS, repeat=m - 1):
        counts += torch.nn.functional.one_hot(rotation(weights, torch.stack(offsets)), m)
    return counts / 10 ** (m - 1)


@pytest.mark.parametrize("num_steps", [5, 20, 50])
@pytest.mark.parametrize("share", range(11))
def test_every_step_of_a_rotation_of_two_has_exactly_the_marginal_w(share: int, num_steps: int) -> None:
    weights = torch.tensor([[share / 10, 1 - share / 10]], dtype=torch.float64).expand(num_steps, -1)
    torch.testing.assert_close(frequencies(weights), weights.contiguous(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "shares", [[0.3, 0.5], [0.1, 0.9], [1.0, 0.2], [0.5, 0.5, 0.5], [0.2, 0.7, 0.4], [0.6, 0.0, 0.3]]
)
def test_every_step_of_a_nested_rotation_has_exactly_the_marginal_w(shares: list[float]) -> None:
    m = len(shares) + 1
    weights = torch.tensor([weights_of(shares, m)], dtype=torch.float64).expand(12, -1)
    torch.testing.assert_close(frequencies(weights), weights.contiguous(), rtol=0, atol=1e-12)


def test_marginals_are_exact_where_the_weights_change_over_the_steps() -> None:
    first = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.0, 1.0, 0.7, 0.2], dtype=torch.float64)
    weights = torch.stack([first, 1 - first], dim=1)
    torch.testing.assert_close(frequencies(weights), weights, rtol=0, atol=1e-12)


def test_golden_draws_have_the_marginal_w() -> None:
    weights = torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64).expand(8, -1)
    count = 20_000
    drawn = torch.stack([draw_golden(weights, torch.Generator().manual_seed(seed)) for seed in range(count)])
    found = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    assert (found - weights).abs().max() < 4.5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_every_adapters_count_is_near_its_share_along_the_whole_path(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    for _ in range(40):
        one = torch.rand(m, generator=generator, dtype=torch.float64).square()
        weights = (one / one.sum()).expand(100, -1)
        drawn = torch.nn.functional.one_hot(draw_rotation(weights, generator), m).double()
        strays = (drawn.cumsum(0) - weights.cumsum(0)).abs().max()
        assert strays <= 1 + math.log2(m) + 1e-9


@pytest.mark.parametrize("name", list(DRAWS))
def test_an_adapter_of_weight_zero_is_never_drawn_and_one_of_weight_one_always(name: str) -> None:
    for seed in range(50):
        weights = torch.tensor([[0.0, 0.4, 0.0, 0.6]], dtype=torch.float64).expand(30, -1)
        assert set(DRAWS[name](weights, torch.Generator().manual_seed(seed)).tolist()) <= {1, 3}
        alone = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(9, -1)
        assert set(DRAWS[name](alone, torch.Generator().manual_seed(seed)).tolist()) == {1}


def test_a_rotation_of_halves_alternates() -> None:
    weights = torch.full((6, 2), 0.5, dtype=torch.float64)
    assert rotation(weights, torch.tensor([0.2], dtype=torch.float64)).tolist() == [1, 0, 1, 0, 1, 0]
    assert rotation(weights, torch.tensor([0.7], dtype=torch.float64)).tolist() == [0, 1, 0, 1, 0, 1]
