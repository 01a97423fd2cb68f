from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.analysis import Estimates, estimate
from dblightning.evaluation.baselines import BEST_SINGLE, RANDOM
from dblightning.evaluation.cells import baseline_points, preference_points, readable_labels
from dblightning.evaluation.comparisons import category_table, paired_table, verdict, win_table
from dblightning.evaluation.paper_tables import adapters_table, gain_table, weighted_table
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

NAMES = ["a", "b"]


def adapters(blends: dict[str, tuple[float, float]], noise: float = 0.01, prompts: int = 30) -> pd.DataFrame:
    """Base (0, 0), adapters (1, −0.2) and (−0.2, 1), other methods at w = 0.2 as given; prompt effects all share."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(prompts, 1))
    points = {"base": (0.0, 0.0), "single a": (1.0, -0.2), "single b": (-0.2, 1.0)} | blends
    rows = []
    for name, point in points.items():
        method, _, own = name.partition(" ")
        weights = {own: 1.0} if own else preference(0.2, ("a", "b")) if method != "base" else None
        values = [effect + value + noise * rng.normal(size=(prompts, 2)) for value in point]
        extra = {"adapter": "oracle"} if method == "morl" else {}
        rows.append((blend(method, weights, name, **extra), dict(zip(NAMES, values, strict=True))))
    return score_table(rows, prompts, 2, names=NAMES)


def per_image(frame: pd.DataFrame, label: str, weights: tuple[float, float]) -> np.ndarray:
    """r(w) of every image of a blend, in the order of prompts and seeds; the definition, from the rows."""
    rows = frame[frame["blend"] == label].sort_values(["prompt_id", "seed"])
    return np.asarray(weights[0] * rows["reward/a"] + weights[1] * rows["reward/b"])


# ── baselines ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_best_single_adapter_and_a_random_one_have_the_weighted_rewards_of_the_singles_own_images() -> None:
    frame = adapters({"db-mpa": (0.0, 0.5)})
    estimates = estimate(frame)
    points = baseline_points(estimates, NAMES)
    alone = {name: per_image(frame, f"single {name}", (0.2, 0.8)) for name in NAMES}
    best, drawn = points[BEST_SINGLE][0.2, 0.8], points[RANDOM][0.2, 0.8]
    assert estimates.of(best, "weighted")[0] == pytest.approx(alone["b"].mean())
    # an adapter drawn with probability w for each image: the expectation over the draw
    assert estimates.of(drawn, "weighted")[0] == pytest.approx((0.2 * alone["a"] + 0.8 * alone["b"]).mean())
    mpa = per_image(frame, "db-mpa", (0.2, 0.8))
    value, low, high = estimates.difference("db-mpa", best, "weighted")
    assert value == pytest.approx((mpa - alone["b"]).mean())
    # the paired interval is that of the prompts' differences: 1.96 standard errors, to the 10 % of 30 prompts
    differences = (mpa - alone["b"]).reshape(30, 2).mean(axis=1)
    assert (high - low) / 2 == pytest.approx(1.96 * differences.std(ddof=1) / np.sqrt(30), rel=0.1)
    # the ends are the adapters themselves
    assert points[BEST_SINGLE][1.0, 0.0] == points[RANDOM][1.0, 0.0] == "single a"


def test_the_random_adapters_rewards_lie_on_the_chord_between_the_single_adapters() -> None:
    estimates = estimate(adapters({"db-mpa": (0.0, 0.5)}))
    drawn = baseline_points(estimates, NAMES)[RANDOM][0.2, 0.8]
    for name in NAMES:
        ends = [estimates.of(f"single {each}", f"reward/{name}")[0] for each in NAMES]
        assert estimates.of(drawn, f"reward/{name}")[0] == pytest.approx(0.2 * ends[0] + 0.8 * ends[1])


def test_a_missing_adapter_leaves_out_both_baselines() -> None:
    frame = adapters({"db-mpa": (0.0, 0.5)})
    estimates = estimate(frame[frame["blend"] != "single b"])
    assert baseline_points(estimates, NAMES) == {}
    assert verdict(estimates, NAMES).lines[0][0] == "Missing"


def test_an_adapter_of_another_name_is_no_baseline_and_a_one_hot_blend_is_one() -> None:
    frame = adapters({"db-mpa": (0.0, 0.5)})
    frame.loc[frame["blend"] == "single a", "adapter"] = "a_of_another_run"
    assert baseline_points(estimate(frame), NAMES) == {}
    frame.loc[frame["blend"] == "single a", ["adapter", "method"]] = [None, "db-mpa"]
    assert baseline_points(estimate(frame), NAMES)[RANDOM][1.0, 0.0] == "single a"


def test_bold_goes_to_the_best_single_adapter_where_it_beats_every_blend() -> None:
    # at w = 0.2 the adapter of b has 0.2 · −0.2 + 0.8 · 1 = 0.76; DB-MPA 0.6, as in the paper's table in miniature
    estimates = estimate(adapters({"db-mpa": (0.2, 0.7), "rewarded-soup": (0.1, 0.6), "morl": (1.0, 1.0)}))
    for table in (weighted_table(estimates, NAMES), gain_table(estimates, NAMES)):
        row = table.cells.index.tolist().index("w = 0.2")
        assert [table.cells.columns[column][0] for at, column in table.bold if at == row] == [BEST_SINGLE]
        assert "b at w = 0.2" in table.caption


def test_the_oracle_is_never_bold_not_even_at_its_single_ends() -> None:
    estimates = estimate(adapters({"db-mpa": (0.2, 0.7), "morl": (1.0, 1.0)}))
    table = weighted_table(estimates, NAMES)
    bold = {(table.cells.index[row], table.cells.columns[column][0]) for row, column in table.bold}
    assert ("w = 1", "DB-MPA") in bold  # which is the single adapter there, as MORL is
    assert not [variant for _, variant in bold if "MORL" in variant]


# ── comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_paired_table_shows_each_methods_weighted_reward_less_db_mpas() -> None:
    frame = adapters({"db-mpa": (0.2, 0.7), "code": (0.4, 0.9)})
    cells = paired_table(estimate(frame), NAMES).cells
    expected = (per_image(frame, "code", (0.2, 0.8)) - per_image(frame, "db-mpa", (0.2, 0.8))).mean()
    assert cells.index.tolist() == ["w = 0.2"]
    assert float(cells.loc["w = 0.2", "CoDe"].split(" ± ")[0]) == pytest.approx(expected, abs=0.005)


def test_win_rates_count_images_and_half_of_the_ties() -> None:
    half = preference(0.5, ("a", "b"))
    ours = np.array([[0.0, 1.0], [2.0, 3.0]])
    other = np.array([[1.0, 1.0], [2.0, 4.0]])  # wins, ties, ties, wins
    values = {"base": ours * 0, "db-mpa": ours, "code": other}
    rows = [(blend(name, half if name != "base" else None, name), {"a": v, "b": v}) for name, v in values.items()]
    estimates = estimate(score_table(rows, 2, 2, names=NAMES))
    assert estimates.win_rate("code", "db-mpa")[0] == pytest.approx(0.75)
    assert estimates.win_rate("db-mpa", "code")[0] == pytest.approx(0.25)
    assert win_table(estimates, NAMES).cells.loc["w = 0.5", "CoDe"].startswith("0.75")


def test_the_win_rate_of_a_random_adapter_is_its_expectation_over_the_draw() -> None:
    frame = adapters({"db-mpa": (0.2, 0.7)}, noise=1.0)
    estimates = estimate(frame)
    ours = per_image(frame, "db-mpa", (0.2, 0.8))
    wins = {name: (per_image(frame, f"single {name}", (0.2, 0.8)) > ours).mean() for name in NAMES}
    drawn = preference_points(estimates, NAMES)[RANDOM][0.2, 0.8]
    assert estimates.win_rate(drawn, "db-mpa")[0] == pytest.approx(0.2 * wins["a"] + 0.8 * wins["b"])


def test_the_adapters_table_has_each_adapter_under_each_preference() -> None:
    frame = adapters({"db-mpa": (0.2, 0.7)})
    cells = adapters_table(estimate(frame), NAMES).cells
    for name in NAMES:
        shown = float(cells.loc["w = 0.2", f"{name} adapter alone"].split(" ± ")[0])
        assert shown == pytest.approx(per_image(frame, f"single {name}", (0.2, 0.8)).mean(), abs=0.005)


def test_categories_have_rows_of_their_own_from_their_prompts_alone() -> None:
    frame = adapters({"db-mpa": (0.2, 0.7), "code": (0.4, 0.9)})
    frame["tag"] = np.where(frame["prompt_id"] < 10, "colors", "counting")
    table = category_table(frame, NAMES, samples=200, level=0.95)
    assert table.cells.index.tolist() == ["colors (10 prompts), w = 0.2", "counting (20 prompts), w = 0.2"]
    part = frame[frame["tag"] == "colors"]
    shown = float(table.cells.loc["colors (10 prompts), w = 0.2", "CoDe"].split(" ± ")[0])
    assert shown == pytest.approx(per_image(part, "code", (0.2, 0.8)).mean(), abs=0.005)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_verdict_names_what_db_mpa_loses_to_first_and_the_single_adapter_before_the_others() -> None:
    # r(w): DB-MPA 0.6, the adapter of b 0.76, CoDe 0.94, the soup 0.46, LS as DB-MPA, the oracle 1.04
    points = {"db-mpa": (0.2, 0.7), "code": (0.5, 1.05), "rewarded-soup": (0.1, 0.55), "db-mpa-ls": (0.2, 0.7)}
    blends = points | {"morl": (1.0, 1.05)}
    lines = dict(verdict(estimate(adapters(blends, noise=0.02)), NAMES).lines)
    assert next(iter(lines)) == "DB-MPA loses to"
    lost = lines["DB-MPA loses to"]
    assert lost.startswith("the best single adapter (b) at w = 0.2 (−0.1")
    assert "CoDe at w = 0.2 (−0.3" in lost and "MORL" not in lost
    assert "Rewarded Soup (exact) at w = 0.2 (+0.14" in lines["DB-MPA beats"]
    assert lines["Not distinguishable from"].startswith("DB-MPA-LS at w = 0.2")
    assert lines["Best without retraining"] == "at w = 0.2 CoDe."
    assert lines["DB-MPA against a model retrained for the preference"].startswith("behind at w = 0.2 (−0.4")


def test_a_verdict_without_a_lost_comparison_says_so_and_one_without_blends_too() -> None:
    lines = verdict(estimate(adapters({"db-mpa": (0.9, 0.9)})), NAMES).lines
    assert lines[0] == ("DB-MPA loses to", "none of the methods that need no retraining.")
    assert verdict(estimate(adapters({})), NAMES).lines[0][0] == "No comparison"


def test_labels_for_readers_name_the_method_and_its_weights_and_stay_apart() -> None:
    frame = evaluation(prompts=3)
    estimates: Estimates = estimate(frame)
    labels = readable_labels(estimates)
    assert labels["db-mpa_0.2"] == "DB-MPA: alignment 0.2, aesthetic 0.8"
    assert labels["single_alignment-1"] == "alignment adapter" and labels["base"] == "Base"
    assert len(set(labels.values())) == len(labels) == frame["blend"].nunique()
