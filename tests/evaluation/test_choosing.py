"""Each method at its best: chosen on one table's prompts, reported on another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dblightning.evaluation.choosing import SINGLE, Choice, choose, choose_main
from dblightning.evaluation.scores import write_scores
from tests.evaluation.synthetic import blend, preference, score_table

HALF = preference(0.5, ("a", "b"))
MIXES = (0.2, 0.5, 0.8)


def table(
    of_mix: dict[float, tuple[float, float]], first: int, seed: int, scale: float = 1.0, images: int = 2
) -> pd.DataFrame:
    """DB-MPA at three mixing weights, two adapters alone at two λ, the soup at one weight, the oracle of w = ½.

    Prompts share their effects over methods; each image has noise of its own.
    """
    rng = np.random.default_rng(seed)
    effect = {name: rng.normal(size=(30, 1)) for name in ("a", "b")}

    def rewards(a: float, b: float) -> dict[str, np.ndarray]:
        means = {"a": a, "b": b}
        return {name: means[name] + effect[name] + 0.1 * rng.normal(size=(30, images)) for name in means}

    blends = [
        (blend("base"), rewards(0.0, 0.0)),
        (blend("single", {"a": 1.0}), rewards(1.0, -0.5)),
        (blend("single", {"b": 1.0}), rewards(-0.5, 0.9)),
        (blend("db-kla", {"a": 1.0}, kl_scale=0.5), rewards(0.9 * scale, -0.1)),
        *((blend("db-mpa", preference(w, ("a", "b"))), rewards(*of_mix[w])) for w in MIXES),
        (blend("rewarded-soup", HALF), rewards(0.3, 0.3)),
        (blend("morl", HALF, adapter="oracle"), rewards(0.8, 0.8)),
        (blend("morl", preference(0.8, ("a", "b")), adapter="other"), rewards(2.0, 2.0)),
    ]
    frame = score_table(blends, 30, images, ("a", "b"))
    frame["kl"] = frame["blend"].map({"base": 0.0, "db-mpa_a-0.8_b-0.2": 90.0}).fillna(30.0)
    return frame.assign(prompt_id=frame["prompt_id"] + first, prompt=[f"{first}: {each}" for each in frame["prompt"]])


#: on validation prompts the blend at v = 0.8 is best for w = ½; on test prompts the one at 0.2 happens to be
VALIDATION = table({0.2: (0.1, 0.5), 0.5: (0.2, 0.6), 0.8: (0.7, 0.5)}, 0, seed=0)
TEST = table({0.2: (0.9, 0.9), 0.5: (0.2, 0.6), 0.8: (0.7, 0.5)}, 100, seed=1)


def found(alpha: float = 0.0, test: pd.DataFrame = TEST) -> dict[str, Choice]:
    (choices,) = choose(VALIDATION, test, [HALF], alpha)
    return {each.method: each for each in choices}


def mean_by_hand(frame: pd.DataFrame, label: str) -> float:
    rows = frame[frame["blend"] == label]
    return float((0.5 * rows["reward/a"] + 0.5 * rows["reward/b"]).groupby(rows["prompt_id"]).mean().mean())


def test_the_choice_is_validations_and_the_value_is_tests() -> None:
    choice = found()["DB-MPA"]
    assert (choice.blend, choice.tried) == ("db-mpa_a-0.8_b-0.2", 3)
    assert choice.on_validation == pytest.approx(mean_by_hand(VALIDATION, choice.blend))
    assert choice.value[0] == choice.weighted[0] == pytest.approx(mean_by_hand(TEST, choice.blend))
    assert choice.value[0] < mean_by_hand(TEST, "db-mpa_a-0.2_b-0.8") - 0.2  # hindsight is not used


def test_the_adapters_alone_are_one_method_at_any_strength() -> None:
    alone = found()[SINGLE]
    assert (alone.blend, alone.tried) == ("db-kla_a-1_0.5", 3)
    assert alone.less[0] == pytest.approx(
        mean_by_hand(TEST, "db-kla_a-1_0.5") - mean_by_hand(TEST, "db-mpa_a-0.8_b-0.2")
    )
    assert alone.less[1] < -0.2 < alone.less[2] < 0  # 0.4 less 0.6, paired: the prompts' effects cancel


def test_the_oracle_of_the_shares_is_the_retrained_policy_that_is_best_whatever_it_was_retrained_for() -> None:
    choices = found()
    oracle = choices["MORL (oracle)"]
    assert (oracle.blend, oracle.tried) == ("morl_a-0.8_b-0.2_other", 2)
    base = mean_by_hand(TEST, "base")
    gains = [mean_by_hand(TEST, label) - base for label in ("db-mpa_a-0.8_b-0.2", oracle.blend)]
    assert choices["DB-MPA"].share[0] == pytest.approx(gains[0] / gains[1])
    assert oracle.share == pytest.approx((1.0, 1.0, 1.0))


def test_with_alpha_the_kl_takes_part_in_the_choice() -> None:
    choice = found(alpha=0.01)["DB-MPA"]  # 0.6 − 0.9 at v = 0.8, 0.4 − 0.3 at v = ½
    assert choice.blend == "db-mpa_a-0.5_b-0.5" and choice.kl == pytest.approx(30)
    assert choice.value[0] == pytest.approx(choice.weighted[0] - 0.3)


def test_the_reference_comes_first() -> None:
    assert [each.method for each in choose(VALIDATION, TEST, [HALF])[0]] == [
        "DB-MPA", SINGLE, "Rewarded Soup (exact)", "MORL (oracle)",
    ]  # fmt: skip


def test_a_method_is_one_whatever_its_strengths() -> None:
    """DB-MPA at λ = 2 alone is the reference still, and blends of λ's compete as those of weights do."""
    frames = []
    for frame in (VALIDATION, TEST):
        strong = frame[frame["blend"].str.startswith("db-mpa")].assign(kl_scale=2.0)
        frames.append(pd.concat([frame[~frame["blend"].str.startswith("db-mpa")], strong]))
    first = choose(*frames, [HALF])[0][0]
    assert (first.method, first.blend, first.tried) == ("DB-MPA", "db-mpa_a-0.8_b-0.2", 3)


@pytest.mark.parametrize(
    ("test", "preferences", "alpha", "message"),
    [
        (VALIDATION, [HALF], 0.0, "30 prompts are in both tables"),
        (TEST, [{"a": 0.5, "b": 0.4}], 0.0, "whose sum is 1"),
        (TEST, [{"a": 0.5, "c": 0.5}], 0.0, "reward 'c' is not in the validation table"),
        (TEST, [HALF], -1.0, "alpha must be >= 0"),
        (TEST.drop(columns="kl"), [HALF], 0.1, "which the test table lacks"),
        (TEST[TEST["blend"] == "base"], [HALF], 0.0, "no method has a blend of a and b in both tables"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    test: pd.DataFrame, preferences: list[dict[str, float]], alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(VALIDATION, test, preferences, alpha)


def test_the_command_prints_a_table_for_each_preference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "val.parquet", tmp_path / "test.parquet"]
    for file, frame in zip(files, (VALIDATION, TEST), strict=True):
        write_scores(file, frame, {})
    choose_main([*map(str, files), "--preference", "a=0.5", "b=0.5", "--alpha", "0.001"])
    printed = capsys.readouterr().out
    assert printed.startswith("a 0.5, b 0.5: each method's best by E[r(w)] − 0.001·KL on validation prompts")
    (line,) = [line for line in printed.splitlines() if line.startswith("| DB-MPA ")]
    assert "a 0.8, b 0.2" in line and "| 90 " in line
    choose_main([*map(str, files)])
    assert capsys.readouterr().out.count("each method's best by r(w)") == 3  # the weights that the test table mixes


def test_tables_of_other_adapters_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, frame in (("val", VALIDATION), ("test", TEST)):
        write_scores(tmp_path / f"{name}.parquet", frame, {"adapters": {"a": {"sha256": name}}})
    with pytest.raises(SystemExit):
        choose_main([str(tmp_path / "val.parquet"), str(tmp_path / "test.parquet")])
    assert "adapter 'a' is not the same" in capsys.readouterr().err
