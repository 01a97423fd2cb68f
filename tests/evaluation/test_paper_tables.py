from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.analysis import Estimates, estimate, summary
from dblightning.evaluation.paper_tables import (
    Table,
    all_tables,
    best_blends,
    cell,
    decimals,
    equal_weights_table,
    gain_table,
    hypervolume_table,
    kl_points,
    kl_table,
    reward_table,
    share_table,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
    weighted_table,
)
from dblightning.evaluation.report import write_report
from dblightning.evaluation.scores import preference_sets, write_scores
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

NAMES = ["alignment", "aesthetic"]


@pytest.fixture(scope="module")
def estimates() -> Estimates:
    return estimate(evaluation())


def mean(estimates: Estimates, label: str, column: str) -> float:
    """The number that the summary has for a blend."""
    table = summary(estimates).set_index("blend")
    return float(table.loc[label, column])


def leading(text: str) -> float:
    """The mean in a cell."""
    return float(text.split(" ± ")[0])


def test_the_reward_table_has_rows_of_w_columns_of_methods_and_the_summarys_numbers(estimates: Estimates) -> None:
    cells = reward_table(estimates, NAMES).cells
    assert cells.index.tolist() == ["w = 0", "w = 0.2", "w = 0.5", "w = 0.8", "w = 1", "seconds / image"]
    assert list(dict.fromkeys(variant for variant, _ in cells.columns)) == [
        "Base", "best single adapter", "random adapter per image", "DB-MPA", "DB-MPA-LS", "Rewarded Soup (factors)",
        "CoDe", "RGG", "MORL (oracle)", "DB-MPA-LS (systematic)",
    ]  # fmt: skip
    for heading, column in {**{name: f"reward/{name}" for name in NAMES}, "r(w)": "weighted"}.items():
        shown = leading(cells.loc["w = 0.2", ("DB-MPA", heading)])
        # cells have two decimals here: intervals are wider than 0.1
        assert shown == pytest.approx(mean(estimates, "db-mpa_0.2", column), abs=0.005)
    # w weighs the first reward: at w = 1 the methods are the single alignment adapter
    assert leading(cells.loc["w = 1", ("DB-MPA", "alignment")]) == pytest.approx(
        mean(estimates, "single_alignment-1", "reward/alignment"), abs=0.005
    )
    assert cells.loc["w = 0", ("CoDe", "r(w)")] == "–"
    assert cells.loc["seconds / image", ("DB-MPA", "alignment")] == "5"  # blends 3, 4, 5 take 4, 5, 6 seconds


def test_gain_and_weighted_tables_hold_the_summarys_gains_and_weighted_rewards(estimates: Estimates) -> None:
    gains = gain_table(estimates, NAMES).cells
    for heading, column in {"Δalignment": "gain/alignment", "Δr(w)": "weighted_gain"}.items():
        text = gains.loc["w = 0.8", ("RGG", heading)]
        assert text.startswith("+") and leading(text) == pytest.approx(mean(estimates, "rgg_0.8", column), abs=0.005)
    weighted = weighted_table(estimates, NAMES).cells
    shown = leading(weighted.loc["w = 0.5", ("CoDe", "r(w)")])
    assert shown == pytest.approx(mean(estimates, "code_0.5", "weighted"), abs=0.005)


def test_cells_show_half_the_intervals_width_with_one_digit_of_it() -> None:
    assert cell([0.4213, 0.391, 0.451]) == "0.42 ± 0.03"
    assert cell([0.4213, 0.391, 0.451], sign=True) == "+0.42 ± 0.03"
    assert cell([-0.001, -0.02, 0.02]) == "0.00 ± 0.02"
    assert cell([0.5, np.nan, np.nan]) == "0.50"
    assert cell([np.nan, np.nan, np.nan]) == "–"
    assert [decimals([half]) for half in (0.3, 0.03, 0.003, np.nan)] == [2, 2, 3, 2]


def bold_example() -> Estimates:
    """At w = 0.5: soup 1.0 ± nothing to DB-MPA 1.0 + noise, CoDe clearly worse, the oracle clearly better."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(40, 1))
    half = preference(0.5, ("a", "b"))
    gains = {"base": 0.0, "db-mpa": 1.0, "rewarded-soup": 1.01, "code": 0.5, "morl": 2.0}
    blends = []
    for method, gain in gains.items():
        values = effect + gain + 0.2 * rng.normal(size=(40, 1))
        settings = blend(method, half if method != "base" else None, method)
        blends.append((settings, {"a": values, "b": values}))
    return estimate(score_table(blends, 40, names=("a", "b")))


def test_bold_is_the_best_weighted_reward_without_the_oracle_and_what_is_indistinguishable_from_it() -> None:
    estimates = bold_example()
    assert best_blends(estimates, ["db-mpa", "rewarded-soup", "code", "morl"], "weighted") == {
        "db-mpa",
        "rewarded-soup",
    }
    table = weighted_table(estimates, ["a", "b"])
    variants = [variant for variant, _ in table.cells.columns]
    assert variants == ["DB-MPA", "Rewarded Soup (exact)", "CoDe", "MORL (oracle)"]
    assert table.bold == {(0, 0), (0, 1)}
    # unpaired intervals all overlap: prompts differ far more than methods
    assert estimates.of("code", "weighted")[2] > estimates.of("db-mpa", "weighted")[1]
    assert best_blends(estimates, ["code"], "weighted") == {"code"}
    assert best_blends(estimates, ["base"], "weighted") == set()


def test_the_share_table_leaves_out_the_oracle_and_preferences_without_one(estimates: Estimates) -> None:
    cells = share_table(estimates, NAMES).cells
    assert "MORL (oracle)" not in cells
    assert cells.index.tolist() == ["w = 0.2", "w = 0.5", "w = 0.8"]
    shown = leading(cells.loc["w = 0.5", "DB-MPA"])
    assert shown == pytest.approx(mean(estimates, "db-mpa_0.5", "share_of_oracle"), abs=0.005)


def test_the_strength_table_runs_from_the_base_over_the_adapter_and_shows_the_difference_to_the_retrained_model(
    estimates: Estimates,
) -> None:
    assert kl_points(estimates)["alignment", "DB-KLA"] == {
        0.0: "base", 0.5: "db-kla_alignment-1_0.5", 1.0: "single_alignment-1", 2.0: "db-kla_alignment-1_2.0",
    }  # fmt: skip
    cells = kl_table(estimates).cells
    assert cells.index.tolist() == [f"alignment, λ = {scale}" for scale in ("0", "0.5", "1", "2")]
    difference = mean(estimates, "db-kla_alignment-1_2.0", "reward/alignment") - mean(
        estimates, "morl_alignment-1_strong_2.0", "reward/alignment"
    )
    assert leading(cells.loc["alignment, λ = 2", "difference"]) == pytest.approx(difference, abs=0.005)
    assert cells.loc["alignment, λ = 0.5", "difference"] == "–"


def test_the_equal_weights_table_has_a_group_of_columns_for_each_number_of_rewards_and_their_mean_gain() -> None:
    rng = np.random.default_rng(0)
    effect = {name: rng.normal(size=(20, 1)) for name in "abc"}

    def rewards(*gains: float) -> dict[str, np.ndarray]:
        return {name: effect[name] + gain for name, gain in zip("abc", gains, strict=True)}

    third = {"a": 0.34, "b": 0.33, "c": 0.33}
    frame = score_table(
        [
            (blend("base"), rewards(0, 0, 0)),
            (blend("db-mpa", preference(0.5, ("a", "b"))), rewards(0.4, 0.6, 0)),
            (blend("db-mpa", third), rewards(0.1, 0.2, 0.6)),
            (blend("db-mpa", {"a": 0.6, "b": 0.2, "c": 0.2}), rewards(5, 5, 5)),
        ],
        20,
        names=("a", "b", "c"),
    )
    cells = equal_weights_table(estimate(frame), preference_sets(frame)).cells
    assert {group: heading for group, heading in cells.columns if heading == "mean"}.keys() == {
        "2 rewards: a, b", "3 rewards: a, b, c",
    }  # fmt: skip
    row = cells.loc["DB-MPA"]
    assert leading(row["2 rewards: a, b", "mean"]) == pytest.approx(0.5)
    assert leading(row["3 rewards: a, b, c", "Δc"]) == pytest.approx(0.6)
    assert leading(row["3 rewards: a, b, c", "mean"]) == pytest.approx(0.34 * 0.1 + 0.33 * 0.8, abs=0.005)


def test_the_hypervolume_table_states_its_reference_point(estimates: Estimates) -> None:
    table = hypervolume_table(estimates, NAMES, [-1.0, -2.5])
    assert "alignment -1.000, aesthetic -2.500" in table.caption
    assert "order" not in table.caption
    default = hypervolume_table(estimates, NAMES).caption
    assert ": the base)" in default and "a tenth of the range below the lowest means" in default
    assert table.cells.loc["DB-MPA", "difference to DB-MPA"] == "+0.00 ± 0.00"


@pytest.mark.parametrize("write", [to_markdown, to_latex, to_html, to_csv])
def test_every_writer_carries_every_mean_and_half_width_of_every_table(write, estimates: Estimates) -> None:  # type: ignore[no-untyped-def]
    tables = all_tables(estimates, preference_sets(evaluation()))
    assert {table.name for table in tables} == {
        "rewards", "weighted", "gains", "oracle_share", "hypervolume", "equal_weights", "kl", "cost", "diversity",
        "held_out", "paired", "win_rates", "adapters_alone", "best_by_cost",
    }  # fmt: skip
    for table in tables:
        numbers = re.findall(r"\d+\.\d+", " ".join(table.cells.astype(str).to_numpy().ravel()))
        written = re.findall(r"\d+\.\d+", write(table))
        assert len(numbers) > 5 or table.name in ("cost", "best_by_cost")
        assert not set(numbers) - set(written)


def odd_table() -> Table:
    cells = pd.DataFrame(
        {"a_b & c%": ["0.42 ± 0.03", "-1.50"], "<x>|y": ["–", "50% #1"]}, index=["{r_1}", "w = $2~^\\"]
    )
    return Table("odd", "Δr_1 & λ", cells.rename_axis("<i>"), {(0, 0)})


def test_latex_escapes_special_characters_and_sets_numbers_in_math_bold_where_best() -> None:
    text = to_latex(odd_table())
    assert r"\caption{$\Delta$r\_1 \& $\lambda$}" in text
    assert r"a\_b \& c\%" in text and r"\textless{}x\textgreater{}" in text and r"50\% \#1" in text
    assert r"\{r\_1\} & $\mathbf{0.42 \pm 0.03}$ & --" in text
    assert r"w = \$2\textasciitilde{}\textasciicircum{}\textbackslash{} & $-1.50$" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


def test_csv_text_that_a_spreadsheet_would_run_has_an_apostrophe_before_it() -> None:
    bad = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"]
    frame = pd.DataFrame({"=head": bad, "x": ["+0.42 ± 0.03", "-1.50", "-1e-05", "", "–", "a=b"]}, index=["=row"] * 6)
    rows = list(csv.reader(io.StringIO(to_csv(Table("t", "c", frame.rename_axis("=corner"))))))
    assert rows[0] == ["'=corner", "'=head", "x"]
    assert [row[:2] for row in rows[1:]] == [["'=row", f"'{each}".replace("\r", " ")] for each in bad]
    assert [row[2] for row in rows[1:]] == frame["x"].tolist()  # numbers stay numbers


def test_the_summary_file_is_safe_to_open_too(tmp_path: Path) -> None:
    frame = score_table([(blend("base", label="=HYPERLINK(1)"), {"a": -0.5})], 3)
    write_scores(tmp_path / "scores.parquet", frame, {})
    write_report(tmp_path / "scores.parquet", tmp_path, samples=20)
    (row,) = csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text(encoding="utf-8")))
    assert row["blend"] == "'=HYPERLINK(1)" and float(row["reward/a"]) == -0.5


def test_wide_tables_are_written_as_pages_that_need_no_scrolling(estimates: Estimates) -> None:
    for table in all_tables(estimates, preference_sets(evaluation())):
        head = to_html(table).split("</thead>")[0]
        # about 90 pixels a column in 1,200, the first one or two are names
        assert head.count("<th ") <= 9, table.name


def test_latex_groups_columns_of_two_levels_with_rules_below_their_names(estimates: Estimates) -> None:
    text = to_latex(gain_table(estimates, NAMES))
    assert r"\multicolumn{3}{c}{DB-MPA}" in text and r"\cmidrule(lr){2-4}" in text
    rows = [line for line in text.splitlines() if line.startswith("w = ")]
    assert {line.count("&") for line in rows} == {text.split("tabular}{l")[1].split("}")[0].count("c")}


def test_markdown_escapes_pipes_and_marks_bold_and_html_escapes_everything() -> None:
    text = to_markdown(odd_table())
    assert "**0.42 ± 0.03**" in text and r"\<x>\|y" in text
    assert len({line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    page = to_html(odd_table())
    assert "<td><b>0.42 ± 0.03</b></td>" in page and "&lt;x&gt;|y" in page and "<x>" not in page and "<i>" not in page


def test_an_evaluation_of_adapters_alone_has_tables_without_blends() -> None:
    blends = [
        (blend("base"), 0.0, 0.0),
        (blend("single", {"a": 1.0}), 1.0, 0.2),
        (blend("single", {"b": 1.0}), 0.1, 1.0),
    ]
    frame = score_table([(settings, {"a": a, "b": b}) for settings, a, b in blends], 4, names=("a", "b"))
    tables = {table.name: table for table in all_tables(estimate(frame), preference_sets(frame))}
    assert leading(tables["rewards"].cells.loc["w = 1", ("single adapter", "b")]) == pytest.approx(0.2)
    assert "oracle_share" not in tables and "kl" not in tables


def test_an_evaluation_without_base_and_with_one_reward_still_has_its_cost() -> None:
    frame = score_table([(blend("single", {"a": 1.0}), {"a": 1.0})], 4)
    assert [table.name for table in all_tables(estimate(frame), preference_sets(frame))] == ["cost"]
