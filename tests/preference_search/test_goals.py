"""Goals, the space and the comparisons, by hand; no model runs here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dblightning.preference_search import Answer, Candidate, Grid, Knee, Liked, Maximise
from dblightning.preference_search.answer import summary
from dblightning.preference_search.goals import non_dominated
from dblightning.preference_search.measure import Comparison, beside, compared, gains_of
from dblightning.preference_search.space import Space
from dblightning.preset import Preset

REWARDS: dict[str, Any] = {"aesthetic": None, "alignment": None}


class Brightness:
    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3)) + len(prompts[0])


def test_a_constraint_is_a_gain_over_the_base_less_its_standard_errors() -> None:
    goal = Maximise("aesthetic", {"alignment": 0.2}, surety=2.0)
    goal.start(REWARDS, np.zeros((4, 2)))
    assert goal.constraints(np.array([0.0, 0.5]), np.array([9.0, 0.1])) == [pytest.approx(0.2 - 0.5 + 0.2)]
    assert goal.values(np.array([0.7, 0.1])) == [0.7]
    assert str(goal) == "maximise aesthetic with alignment at least base +0.2"
    with pytest.raises(ValueError, match="names the reward 'beauty', but the rewards are"):
        Maximise("beauty").start(REWARDS, np.zeros((4, 2)))


def test_the_knee_is_the_fronts_farthest_point_from_the_line_through_its_ends() -> None:
    points = np.array([[0.0, 10.0], [6.0, 9.0], [8.0, 5.0], [10.0, 0.0], [5.0, 5.0]])
    goal = Knee(["alignment", "aesthetic"])
    goal.start(REWARDS, np.zeros((4, 2)))
    goal.settle(points)
    assert int(goal.merit(points).argmax()) == 1  # (0.6, 0.9) of the scaled front
    assert goal.values(points[1]) == [9.0, 6.0]  # in the goal's own order
    assert goal.directions == ["maximize", "maximize"]
    assert non_dominated(points).tolist() == [True, True, True, True, False]
    assert non_dominated(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])).tolist() == [True, True, False]


def test_liked_images_set_a_target_in_units_of_the_bases_spread(tmp_path: Path) -> None:
    for index, level in enumerate((51, 102)):  # 0.2 and 0.4
        Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / f"{index}.png")
    lines = [json.dumps({"file": f"{index}.png", "prompt": "ab"}) for index in range(2)]
    (tmp_path / "liked.jsonl").write_text("\n".join(lines))
    goal = Liked(str(tmp_path / "liked.jsonl"))
    goal.start({"brightness": Brightness()}, np.array([[1.0], [3.0]]))  # deviation 1
    assert goal.target == pytest.approx([2.3])
    assert goal.merit(np.array([[2.3], [2.8]])) == pytest.approx([0.0, -0.5], abs=1e-6)
    (tmp_path / "liked.jsonl").write_text('{"file": "0.png"}')
    with pytest.raises(ValueError, match="line 1: expected"):
        goal.start({"brightness": Brightness()}, np.array([[1.0], [3.0]]))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_weights_and_shares_are_each_others_inverse(count: int) -> None:
    space = Space([f"a{index}" for index in range(count)], ["db-mpa"], 1, (1.0, 1.0))
    for parts in itertools.product(range(6), repeat=count):
        if sum(parts) == 5:
            weights = space.weights(space.shares([part / 5 for part in parts]))
            assert list(weights.values()) == pytest.approx([part / 5 for part in parts], abs=1e-4)
            assert sum(weights.values()) == pytest.approx(1, abs=1e-9)


def test_uniform_shares_give_weights_uniform_on_the_simplex() -> None:
    space = Space(["a", "b", "c"], ["db-mpa"], 1, (1.0, 1.0))
    rng = np.random.default_rng(0)
    drawn = np.array([list(space.weights(rng.random(2).tolist()).values()) for _ in range(4000)])
    # each marginal of Dirichlet(1, 1, 1): mean 1/3, variance 1/18; 4,000 draws know the mean to 0.004
    assert drawn.mean(0) == pytest.approx([1 / 3] * 3, abs=0.015)
    assert drawn.var(0) == pytest.approx([1 / 18] * 3, rel=0.08)


def test_the_grid_has_every_weight_once_and_a_lambda_where_there_is_one() -> None:
    space = Space(["a", "b"], ["db-mpa", "rewarded-soup"], 2, (0.5, 1.5))
    points = list(space.points(Grid(4, [0.5, 1.0])))
    assert len(points) == 5 * 2 + 5
    assert [point.knots[0]["a"] for point in points[:5]] == [0, 0.25, 0.5, 0.75, 1]
    assert {point.kl_scale for point in points if point.method == "rewarded-soup"} == {1.0}
    assert not list(space.points(Grid(0)))
    params = space.params(points[1])
    assert params == {"method": "db-mpa", "kl_scale": 0.5, "share_0_a": 0.25, "share_1_a": 0.25}
    optuna = pytest.importorskip("optuna", reason="the extra search is not installed")
    for point in points:
        assert space.suggest(optuna.trial.FixedTrial(space.params(point))).described() == point.described()
    assert len(space.suggest(optuna.trial.FixedTrial(params | {"share_1_a": 0.5})).knots) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["code"]}, "methods must be some of"),
        ({"knots": 0}, "knots must be at least 1"),
        ({"kl_scale": (2.0, 1.0)}, "kl_scale must be a range"),
        ({"names": []}, "needs adapters to weigh"),
    ],
)
def test_a_space_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"names": ["a", "b"], "methods": ["db-mpa"], "knots": 1, "kl_scale": (1.0, 1.0)}
    with pytest.raises(ValueError, match=message):
        Space(**{**given, **changes})


def test_a_candidates_weights_change_along_the_trajectory() -> None:
    candidate = Candidate(method="db-mpa", knots=[{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0}])
    assert candidate.adapters == ["a", "b"]
    plan = candidate.blend().start(["a", "b"], batch=1, num_steps=5)
    mixes = [plan(step).mix[1:, 0].tolist() for step in range(5)]
    assert mixes == [[1 - step / 4, step / 4] for step in range(5)]
    assert str(candidate) == "db-mpa: a 1.00 → b 1.00"
    assert Candidate(method="base").adapters == []


def test_gains_and_differences_are_paired_over_prompts() -> None:
    rng = np.random.default_rng(1)
    base = np.repeat(rng.normal(0, 10, (50, 1)), 2, axis=0) + rng.normal(0, 0.1, (100, 1))  # prompts differ by far
    other = base + 0.5 + np.repeat(rng.normal(0, 1, (50, 1)), 2, axis=0)
    gains, errors = gains_of(other, base, seeds=2)
    per_prompt = (other - base).reshape(50, 2).mean(1)
    assert gains[0] == pytest.approx(per_prompt.mean()) and errors[0] == pytest.approx(per_prompt.std(ddof=1) / 50**0.5)
    found = compared(other, base, 2, lambda means: means[..., 0])
    assert found.value == pytest.approx(gains[0])
    # the normal interval of the mean, which the bootstrap of 50 prompts meets to a tenth of its width
    assert found.low == pytest.approx(gains[0] - 2.01 * errors[0], abs=0.2 * errors[0])
    assert found.high == pytest.approx(gains[0] + 2.01 * errors[0], abs=0.2 * errors[0])
    both = beside(np.arange(6.0).reshape(6, 1), 10 + np.arange(6.0).reshape(6, 1), seeds=2)
    assert both[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15]


def test_a_verdict_says_where_the_goal_is_missed_on_the_check() -> None:
    point = Candidate(method="db-mpa", knots=[{"alignment": 1.0}])
    gains = {"aesthetic": Comparison(0.4, 0.3, 0.5), "alignment": Comparison(0.1, -0.1, 0.3)}
    merit = Comparison(0.15, 0.12, 0.18)
    given: dict[str, Any] = {"preset": Preset(), "candidate": point, "grid": point, "evaluated": 3, "gains": gains}
    other = {"aesthetic": Comparison(0.25, 0.2, 0.3), "alignment": Comparison(0.3, 0.1, 0.5)}
    kept = Answer(**given, grid_gains=other, merit=merit, needed={"alignment": 0.05})
    assert kept.verdict() == "it beats the fixed grid's best: merit +0.150 [+0.120, +0.180] on prompts not searched on"
    lost = Answer(**given, grid_gains=other, merit=merit, needed={"alignment": 0.2})
    assert lost.missed() == ["alignment gains +0.100 [-0.100, +0.300] there, and +0.2 is needed"]
    missed = f"the goal is missed on prompts not searched on ({lost.missed()[0]})"
    assert lost.verdict() == f"{missed}, where the fixed grid's best meets it; beside that, {kept.verdict()}"
    both = Answer(**given, grid_gains=gains, merit=merit, needed={"alignment": 0.2})
    assert both.verdict() == f"{missed}; beside that, {kept.verdict()}"


def test_a_verdict_claims_no_more_than_its_interval() -> None:
    point = Candidate(method="db-mpa", knots=[{"alignment": 1.0}])
    gains = {"aesthetic": Comparison(0.4, 0.3, 0.5)}

    def answer(merit: Comparison | None, grid: Candidate | None = point) -> Answer:
        return Answer(Preset(), point, grid, gains, gains if grid else {}, merit, 3)

    assert answer(Comparison(0.1, -0.1, 0.3)).verdict().startswith("it does not beat the fixed grid's best measurably:")
    assert answer(Comparison(-0.1, -0.3, -0.01)).verdict().startswith("it is worse than the fixed grid's best")
    assert answer(None).verdict() == "nothing beats the fixed grid's best, which is the answer"
    assert answer(None, None).verdict() == "no fixed grid was evaluated to compare with"
    assert summary(answer(None, None), ["aesthetic"]).splitlines() == [
        "answer: db-mpa: alignment 1.00   (3 candidates evaluated)",
        "  gain in aesthetic, on prompts not searched on: +0.400 [+0.300, +0.500]",
        "verdict: no fixed grid was evaluated to compare with",
    ]
    assert "  gain in aesthetic: +0.400 [+0.300, +0.500]" in summary(answer(None), ["aesthetic"])
