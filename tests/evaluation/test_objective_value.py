"""E[r(w)] − α·KL of every method, on a table whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.analysis import OBJECTIVE, estimate
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM
from dblightning.evaluation.cells import preference_points
from dblightning.evaluation.equal_terms import whole_verdict
from dblightning.evaluation.objective_value import objective_lines, objective_table, paired_objective_table
from dblightning.evaluation.paper_tables import all_tables
from dblightning.evaluation.report import report_main
from dblightning.evaluation.training_seeds import across_training_seeds, to_markdown
from tests.evaluation.synthetic import blend, preference, score_table

NAMES = ["a", "b"]
W = (0.5, 0.5)
ALPHA = 0.05

#: blend → (method, gain in both rewards, KL); at w = ½ r(w) is the mean of the rewards
POINTS = {
    "base": ("base", 0.0, 0.0),
    "single a": ("single", 0.5, 4.0),
    "single b": ("single", 0.3, 9.0),
    "mpa": ("db-mpa", 0.8, 4.0),
    "soup": ("rewarded-soup", 0.9, 9.0),
    "morl": ("morl", 1.0, 12.0),
}
VALUES = {label: gain - ALPHA * kl for label, (_, gain, kl) in POINTS.items()}


def table(shift: float = 0.0, without: tuple[str, ...] = (), prompts: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(prompts, 1))
    rows = []
    for label, (method, gain, _) in POINTS.items():
        if label in without:
            continue
        own = label.removeprefix("single ")[0]
        weights = {own: 1.0} if method == "single" else None if method == "base" else preference(0.5, NAMES)
        values = {name: effect + (gain and gain + shift) + 0.01 * rng.normal(size=(prompts, 2)) for name in NAMES}
        rows.append((blend(method, weights, label), values))
    frame = score_table(rows, prompts, 2, names=NAMES)
    return frame.assign(kl=[POINTS[label][2] for label in frame["blend"]])


def test_the_objective_is_the_gain_less_alpha_times_the_kl() -> None:
    frame = table()
    estimates = estimate(frame, alpha=ALPHA)
    for label, expected in VALUES.items():
        if label in ("mpa", "soup", "morl"):
            own = frame[frame["blend"] == label].set_index(["prompt_id", "seed"]).sort_index()
            base = frame[frame["blend"] == "base"].set_index(["prompt_id", "seed"]).sort_index()
            gain = (own[["reward/a", "reward/b"]] - base[["reward/a", "reward/b"]]).mean(axis=1)
            assert estimates.of(label, OBJECTIVE)[0] == pytest.approx((gain - ALPHA * own["kl"]).mean(), abs=1e-9)
            assert estimates.of(label, OBJECTIVE)[0] == pytest.approx(expected, abs=0.01)
    points = preference_points(estimates, NAMES)
    best = estimates.of(points[BEST_SINGLE][W], OBJECTIVE)[0]
    drawn = estimates.of(points[RANDOM][W], OBJECTIVE)[0]
    assert best == pytest.approx(VALUES["single a"], abs=0.01)
    assert drawn == pytest.approx((VALUES["single a"] + VALUES["single b"]) / 2, abs=0.01)


def test_alpha_turns_an_order_over_that_rewards_alone_have() -> None:
    estimates = estimate(table(), alpha=ALPHA)
    assert estimates.difference("soup", "mpa", "weighted")[1] > 0
    assert estimates.difference("soup", "mpa", OBJECTIVE)[2] < 0


def test_tables_and_verdict_speak_of_it_where_alpha_was_given() -> None:
    estimates = estimate(table(), alpha=ALPHA)
    own = objective_table(estimates, NAMES).cells.loc["w = 0.5", "DB-MPA"]
    assert float(own.split()[0]) == pytest.approx(0.60, abs=0.01)
    less = paired_objective_table(estimates, NAMES).cells.loc["w = 0.5", "best single adapter"]
    assert float(less.split()[0]) == pytest.approx(-0.30, abs=0.01)
    lines = dict(objective_lines(estimates, NAMES))
    assert "the best single adapter" in lines["By E[r(w)] − α·KL DB-MPA beats"]
    assert "Rewarded Soup" in lines["By E[r(w)] − α·KL DB-MPA beats"]
    assert "By E[r(w)] − α·KL DB-MPA loses to" not in lines
    assert [line for line in whole_verdict(estimates, NAMES).lines if "α·KL" in line[0]]
    without = estimate(table())
    assert objective_lines(without, NAMES) == []
    assert not [each.name for each in all_tables(without, [NAMES]) if "objective" in each.name]


def test_a_retrained_policy_that_another_has_more_than_is_called_no_oracle() -> None:
    lines = dict(objective_lines(estimate(table(), alpha=ALPHA), NAMES))
    assert lines["MORL (oracle) is no oracle"] == "at w = 0.5: DB-MPA: a 0.5, b 0.5 has 0.20 more."
    assert "MORL (oracle) is no oracle" not in dict(objective_lines(estimate(table(), alpha=0.0), NAMES))


def test_a_policy_retrained_for_another_preference_shows_that_one_is_no_oracle() -> None:
    """Of r(½) the one for w = 0.2 has 1.5 − 0.05 · 4, the one for ½ has 1 − 0.05 · 12, whatever DB-MPA has."""
    rng = np.random.default_rng(1)
    points = {"base": ("base", None, 0.0, 0.0), "mpa": ("db-mpa", 0.5, 0.3, 4.0)}
    points |= {"half": ("morl", 0.5, 1.0, 12.0), "fifth": ("morl", 0.2, 1.5, 4.0)}
    effect = rng.normal(size=(30, 1))
    rows = [
        (
            blend(
                method, None if w is None else preference(w, NAMES), label, adapter=label if method == "morl" else None
            ),
            {name: effect + gain + 0.01 * rng.normal(size=(30, 2)) for name in NAMES},
        )
        for label, (method, w, gain, _) in points.items()
    ]
    frame = score_table(rows, 30, 2, names=NAMES)
    frame["kl"] = [points[label][3] for label in frame["blend"]]
    lines = dict(objective_lines(estimate(frame, alpha=ALPHA), NAMES))
    assert lines["MORL (oracle) is no oracle"] == "at w = 0.5: MORL (oracle): a 0.2, b 0.8 has 0.90 more."


@pytest.mark.parametrize(
    ("frame", "alpha", "says"),
    [
        (table(), -1.0, "alpha must be >= 0 and finite"),
        (table(), float("nan"), "alpha must be >= 0 and finite"),
        (table().drop(columns="kl"), ALPHA, "did not measure: set --model.kl true"),
        (table(without=("base",)), ALPHA, r"add {method: base}"),
    ],
)
def test_what_alpha_needs_is_said(frame: pd.DataFrame, alpha: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        estimate(frame, alpha=alpha)


def test_the_report_takes_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table().to_parquet(tmp_path / "scores.parquet")
    report_main([str(tmp_path / "scores.parquet"), "--alpha", str(ALPHA), "--samples", "200"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "By E[r(w)] − α·KL DB-MPA beats" in page and (tmp_path / "tables" / "objective.md").is_file()
    with pytest.raises(SystemExit):
        report_main([str(tmp_path / "scores.parquet"), "--alpha", "-1"])
    assert "alpha must be" in capsys.readouterr().err


def test_seeds_compare_it_too() -> None:
    found = across_training_seeds([table(), table(0.2)], alpha=ALPHA)
    rows = found.set_index(["blend", "quantity"])
    assert rows.loc[("mpa", OBJECTIVE), "mean"] == pytest.approx(VALUES["mpa"] + 0.1, abs=0.01)
    less = rows.loc[("soup", "objective_minus_db_mpa"), "mean"]
    assert less == pytest.approx(VALUES["soup"] - VALUES["mpa"], abs=0.01)
    single = "best single adapter, w = 0.5 (a, b)"
    less = rows.loc[(single, "objective_minus_db_mpa"), "mean"]
    assert less == pytest.approx(VALUES["single a"] - VALUES["mpa"], abs=0.01)
    assert "E[r(w)] − α·KL" in to_markdown(found)
    assert "α·KL" not in to_markdown(across_training_seeds([table(), table(0.2)]))
