"""Methods at equal KL and within a cost, on tables whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation import plots
from dblightning.evaluation.analysis import estimate, summary
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM
from dblightning.evaluation.cells import preference_points
from dblightning.evaluation.equal_terms import (
    best_by_cost,
    compare_at_equal_kl,
    cost_best_table,
    costs,
    equal_kl_table,
    gains_at,
    kl_values_table,
    whole_verdict,
)
from dblightning.evaluation.paper_tables import all_tables
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

NAMES = ["a", "b"]
W = (0.5, 0.5)

#: blend → (method, λ, gain in both rewards, KL, rows); at w = ½ r(w) is the mean of the rewards
POINTS = {
    "base": ("base", 1.0, 0.0, 0.0, 10),
    "single a": ("single", 1.0, 0.5, 4.0, 10),
    "single b": ("single", 1.0, 0.3, 9.0, 10),
    "mpa": ("db-mpa", 1.0, 0.8, 4.0, 20),
    "mpa 2": ("db-mpa", 2.0, 1.2, 16.0, 30),
    "soup": ("rewarded-soup", 1.0, 0.9, 9.0, 10),
    "code": ("code", 1.0, 1.5, np.nan, 200),
}


def table(noise: float = 0.01, prompts: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(prompts, 1))
    rows = []
    for label, (method, scale, gain, _, _) in POINTS.items():
        own = label.removeprefix("single ")[0]
        weights = {own: 1.0} if method in ("single", "db-kla") else None if method == "base" else preference(0.5, NAMES)
        values = {name: effect + gain + noise * rng.normal(size=(prompts, 2)) for name in NAMES}
        rows.append((blend(method, weights, label, kl_scale=scale), values))
    frame = score_table(rows, prompts, 2, names=NAMES)
    frame["kl"] = [POINTS[label][3] * (1 + 0.1 * ((prompt % 3) - 1)) for label, prompt in
                   zip(frame["blend"], frame["prompt_id"], strict=True)]  # fmt: skip
    return frame.assign(denoiser_rows=[float(POINTS[label][4]) for label in frame["blend"]])


def test_the_kl_of_a_blend_is_the_mean_over_prompts_with_an_interval() -> None:
    estimates = estimate(table())
    value, low, high = estimates.of("mpa", "kl")
    assert value == pytest.approx(4.0) and low < 4 < high < 4.4
    drawn = preference_points(estimates, NAMES)[RANDOM][W]
    assert estimates.of(drawn, "kl")[0] == pytest.approx((4 + 9) / 2)  # in expectation over the draw
    assert np.isnan(estimates.of("code", "kl")[0])
    assert summary(estimates).set_index("blend").loc["mpa", "kl"] == pytest.approx(4.0)


def test_a_table_without_kl_has_no_such_quantity() -> None:
    estimates = estimate(evaluation())
    assert "kl" not in estimates.quantities and compare_at_equal_kl(estimates, ["alignment", "aesthetic"]) == []
    assert plots.kl_figure(estimates, ["alignment", "aesthetic"]) is None
    assert not any(table.name.startswith(("equal_kl", "path_kl")) for table in
                   all_tables(estimates, [["alignment", "aesthetic"]]))  # fmt: skip


def test_gains_between_points_are_linear_in_the_root_of_the_kl() -> None:
    kl, gains = np.array([[4.0, 16.0]]), np.array([[0.8, 1.2]])
    found = [gains_at(kl, gains, np.array([at]))[0] for at in (0.0, 1.0, 4.0, 9.0, 16.0)]
    assert found == pytest.approx([0.0, 0.4, 0.8, 1.0, 1.2])
    assert gains_at(np.zeros((1, 1)), np.ones((1, 1)), np.zeros(1))[0] == 1.0  # all of the KL there is


def test_methods_are_compared_at_the_kl_that_both_reach() -> None:
    found = {each.variant: each for each in compare_at_equal_kl(estimate(table()), NAMES)}
    # DB-MPA's curve: (0, 0), (4, .8), (16, 1.2)
    assert found["Rewarded Soup (exact)"].value == pytest.approx(1.0 - 0.9, abs=0.02)  # at 9, halfway in the root
    assert found[BEST_SINGLE].value == pytest.approx(0.8 - 0.5, abs=0.02)
    assert found[RANDOM].value == pytest.approx(0.8 + 0.4 * (np.sqrt(6.5) - 2) / 2 - 0.4, abs=0.02)
    assert "CoDe" not in found  # its KL is not known
    for each in found.values():
        assert each.low < each.value < each.high < each.value + 0.05


def test_the_adapters_alone_count_with_every_strength_that_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the base and λ = 1 a straight line in √KL would say too little of an adapter whose gain levels off."""
    points = {label: values for label, values in POINTS.items() if label != "mpa 2"}  # DB-MPA: (4, .8)
    weaker = {"b at half": ("db-kla", 0.5, 0.75, 4.0, 20)}
    monkeypatch.setattr("tests.evaluation.test_equal_terms.POINTS", points)
    line = {each.variant: each for each in compare_at_equal_kl(estimate(table()), NAMES)}[BEST_SINGLE]
    assert line.value == pytest.approx(0.8 - 0.5, abs=0.02)  # adapter a; b's line has 0.2 there
    monkeypatch.setattr("tests.evaluation.test_equal_terms.POINTS", points | weaker)
    curve = {each.variant: each for each in compare_at_equal_kl(estimate(table()), NAMES)}[BEST_SINGLE]
    assert curve.value == pytest.approx(0.8 - 0.75, abs=0.02)  # b at half strength


def test_the_table_and_the_verdict_say_who_wins_at_equal_kl() -> None:
    estimates = estimate(table())
    cells = equal_kl_table(estimates, NAMES).cells
    assert cells.loc["w = 0.5", "Rewarded Soup (exact)"].startswith("-0.1")
    assert kl_values_table(estimates, NAMES).cells.loc["w = 0.5", "DB-MPA"].startswith("4.0")
    lines = dict(whole_verdict(estimates, NAMES).lines)
    beaten = lines["At equal KL DB-MPA beats"]
    assert "Rewarded Soup (exact)" in beaten and "best single adapter (a)" in beaten
    assert "At equal KL DB-MPA loses to" not in lines
    # the soup has the higher reward: without equal terms it wins
    assert "Rewarded Soup" in lines["DB-MPA loses to"]


def test_the_best_within_a_cost_is_the_best_of_all_that_cost_no_more() -> None:
    estimates = estimate(table())
    assert best_by_cost(estimates, NAMES)[W] == [
        (10.0, ["Rewarded Soup (exact)"]), (30.0, ["DB-MPA λ=2"]), (200.0, ["CoDe"]),
    ]  # fmt: skip
    lines = dict(whole_verdict(estimates, NAMES).lines)
    assert lines["Best within a cost, without retraining"] == (
        "at w = 0.5 Rewarded Soup (exact) from 10, then DB-MPA λ=2 from 30, then CoDe from 200 denoiser rows per image."
    )
    assert cost_best_table(estimates, NAMES).cells["best r(w)"].tolist() == [
        "Rewarded Soup (exact)", "DB-MPA λ=2", "CoDe",
    ]  # fmt: skip


def test_gradients_cost_time_that_rows_do_not_show() -> None:
    frame = table()
    steered = frame["blend"] == "code"
    frame.loc[steered, ["method", "denoiser_rows", "seconds"]] = ["rgg", 10.0, 4.7]
    frame.loc[~steered, "seconds"] = 1.0
    unit, cost = costs(estimate(frame))
    assert unit == "denoiser_rows" and cost["code"] == pytest.approx(47.0) and cost["mpa"] == 20.0
    assert best_by_cost(estimate(frame), NAMES)[W][-1] == (47.0, ["RGG"])


def test_an_oracle_is_not_the_best_within_a_cost() -> None:
    found = best_by_cost(estimate(evaluation()), ["alignment", "aesthetic"])
    assert found and all("MORL (oracle)" not in names for levels in found.values() for _, names in levels)


def test_the_figure_draws_a_line_per_method_from_the_base() -> None:
    figure = plots.kl_figure(estimate(table()), NAMES)
    assert figure is not None
    (axis,) = figure.axes
    lines = {tuple(np.round(line.get_xdata(), 3)): line for line in axis.get_lines()}
    assert (0.0, 4.0, 16.0) in lines  # DB-MPA with both λ
    assert axis.get_xlabel() == "path KL to the base, nats"
