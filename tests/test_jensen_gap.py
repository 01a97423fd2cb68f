"""The closed form of benchmarks/jensen_gap.py against what is known otherwise; its estimators on known laws."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import jensen_gap as study


@pytest.mark.parametrize(("deviation", "strength"), [(1.0, 2.0), (0.25, 8.0)])
def test_what_the_blend_loses_is_its_kl_to_the_optimum(deviation: float, strength: float) -> None:
    """Girsanov, on a chain whose exact models agree with the closed form: J* − J(blend) = KL(blend ‖ optimum)."""
    found = study.compared(deviation, strength, cost=0.5, weight=0.5, right=0.2)
    # the chain's exact models miss log E exp(r) and E r of the closed form by its 100 steps' error
    assert found["chain_error"] < 0.03
    assert abs(found["lost"] - found["kl_to_optimum"]) < found["chain_error"]
    assert found["lost"] > 0
    assert sum(found["lost_by_alpha_bar"]) == pytest.approx(1.0)


def test_linear_rewards_on_a_gaussian_lose_nothing() -> None:
    rewards = study.quadratic(0, 1.0), study.quadratic(0, -0.4)
    part = study.coordinate(study.SMOOTH, 6.0, rewards, 0.3)
    assert part["loss"].sum() < 1e-12
    assert part["DB-MPA"] == pytest.approx(part["optimum"], abs=1e-12)
    judged = 0.3 * 1.0 - 0.7 * 0.4
    assert part["optimum"] == pytest.approx(judged**2 / 2, abs=1e-3)  # log E exp; of 100 steps
    assert max(part["terms"]) < 1e-12


def test_separated_modes_and_a_strong_reward_turn_the_order_of_blend_and_single_adapter() -> None:
    weak, strong = (study.compared(0.125, strength, 0.5, 0.5, 0.2) for strength in (1.0, 16.0))
    assert weak["less_better_single"] > 0 > strong["less_better_single"]
    assert strong["ends"]["DB-MPA"]["right"] < strong["ends"]["optimum"]["right"] - 0.1
    assert strong["lost_in_the_decision"] > 0.9 * strong["kl_to_optimum"]


def test_gap_of_a_gaussian_is_its_variance_over_two_alpha_and_of_two_values_the_cumulant() -> None:
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # 5 standard errors of a mean of exp(z/2), whose deviation is .6, and of z's
    assert abs(study.gap_of(draws, 2.0) - 1 / (2 * 2.0)) < 0.03
    coin = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(8)
    assert study.gap_of(coin, 0.5) == pytest.approx(0.5 * math.log((1 + math.exp(2)) / 2) - 0.5)


def test_two_groups_are_all_the_variance_of_two_values_and_two_pi_ths_of_a_gaussians() -> None:
    coin = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    assert study.two_groups(coin).item() == pytest.approx(1.0)
    draws = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(study.two_groups(draws).item() - 2 / math.pi) < 0.01
