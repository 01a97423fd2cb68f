from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dblightning.evaluation.scores import write_scores
from dblightning.evaluation.training_seeds import across_training_seeds, seeds_main, to_markdown
from tests.evaluation.synthetic import blend, preference, score_table


def evaluation_of(gain: float, behind: float, oracle: float | None) -> pd.DataFrame:
    """DB-MPA gains ``gain`` on both rewards, the soup ``behind`` less, MORL ``oracle`` (None: there is none)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 1)), rng.normal(size=(20, 1))
    weights = preference(0.5, ("a", "b"))
    blends = [
        (blend("base"), {"a": a, "b": b}),
        (blend("db-mpa", weights), {"a": a + gain, "b": b + gain}),
        (blend("rewarded-soup", weights), {"a": a + gain - behind, "b": b + gain - behind}),
    ]
    if oracle is not None:
        blends.append((blend("morl", weights, adapter="oracle"), {"a": a + oracle, "b": b + oracle}))
    return score_table(blends, 20, 1, ("a", "b"))


def values_of(table: pd.DataFrame, method: str, quantity: str) -> pd.Series:
    rows = table[table["blend"].str.startswith(method) & (table["quantity"] == quantity)]
    assert len(rows) == 1 or method == "rewarded-soup"
    return rows.iloc[0]


def test_each_seed_counts_once_and_the_interval_is_students() -> None:
    frames = [evaluation_of(0.4, 0.1, 0.8), evaluation_of(0.5, 0.0, 0.5), evaluation_of(0.9, 0.2, None)]
    table = across_training_seeds(frames)
    gain = values_of(table, "db-mpa", "weighted_gain")
    assert gain["values"] == pytest.approx([0.4, 0.5, 0.9])
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem([0.4, 0.5, 0.9]))
    assert (gain["mean"] - gain["half_width"], gain["mean"] + gain["half_width"]) == pytest.approx((low, high))
    assert values_of(table, "rewarded-soup", "minus_db_mpa")["values"] == pytest.approx([-0.1, 0.0, -0.2])
    share = values_of(table, "db-mpa", "share_of_oracle")
    assert share["seeds"] == 2 and share["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(share["values"][2])


def test_the_command_prints_every_seeds_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for file, gain in zip(files, (0.25, 0.75), strict=True):
        write_scores(file, evaluation_of(gain, 0.125, 1.0), {})
    seeds_main([str(file) for file in files])
    printed = capsys.readouterr().out
    assert ", 2 seeds (0.250, 0.750)" in printed
    assert "−0.125 ± 0.000" in printed


def test_each_cell_says_how_many_seeds_it_has_and_blends_of_one_seed_are_named() -> None:
    frames = [evaluation_of(0.4, 0.1, 0.8), evaluation_of(0.5, 0.0, 0.5), evaluation_of(0.9, 0.2, None)]
    text = to_markdown(across_training_seeds(frames))
    (line,) = [line for line in text.splitlines() if line.startswith("| db-mpa")]
    gain, _, share = line.split("|")[2:5]
    assert ", 3 seeds (0.400, 0.500, 0.900)" in gain and ", 2 seeds (0.500, 1.000, –)" in share
    text = to_markdown(across_training_seeds(frames[1:]))
    assert "one training seed only, so left out: morl_a-0.5_b-0.5_oracle." in text


def test_the_baselines_are_compared_over_training_seeds_too() -> None:
    """Adapters at (1 + s, 0) and (0, 1): at w = 0.5 the better one has (1 + s) / 2, DB-MPA 0.4 on both."""
    frames = []
    for more in (0.0, 0.2):
        blends = [
            (blend("base"), (0.0, 0.0)),
            (blend("single", {"a": 1.0}), (1.0 + more, 0.0)),
            (blend("single", {"b": 1.0}), (0.0, 1.0)),
            (blend("db-mpa", preference(0.5, ("a", "b"))), (0.4, 0.4)),
        ]
        frames.append(score_table([(each, {"a": a, "b": b}) for each, (a, b) in blends], 4, names=("a", "b")))
    table = across_training_seeds(frames).set_index(["blend", "quantity"])["values"]
    best, drawn = "best single adapter, w = 0.5 (a, b)", "random adapter per image, w = 0.5 (a, b)"
    assert table[best, "minus_db_mpa"] == pytest.approx([0.1, 0.2])
    assert table[drawn, "minus_db_mpa"] == pytest.approx([0.1, 0.15])


def test_one_table_or_tables_without_a_common_blend_are_refused(tmp_path: Path) -> None:
    one = evaluation_of(0.4, 0.1, None)
    with pytest.raises(ValueError, match="at least two"):
        across_training_seeds([one])
    other = one.assign(blend=one["blend"] + " of another")
    with pytest.raises(ValueError, match="no blend in common"):
        across_training_seeds([one, other])
    with pytest.raises(SystemExit):
        seeds_main([str(tmp_path / "missing.parquet")])
