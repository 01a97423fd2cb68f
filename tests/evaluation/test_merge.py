"""Score tables of several files: what may differ, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dblightning.evaluation.merge import read_all
from dblightning.evaluation.scores import write_scores
from tests.evaluation.synthetic import blend, preference, score_table

RECORD: dict[str, Any] = {"base": "miniature", "eta": 1.0, "rewards": {"a": {"class": "A", "quality": 3}}}


def write(path: Path, settings: dict[str, Any], record: dict[str, Any] = RECORD, first: str | None = None) -> Path:
    frame = score_table([(blend("base"), {"a": 0.0, "b": 0.0}), (settings, {"a": 1.0, "b": 2.0})], 2)
    if first is not None:
        frame.loc[frame["prompt_id"] == 0, "prompt"] = first
    write_scores(path, frame, record)
    return path


SOUP = blend("rewarded-soup", preference(0.5, ("a", "b")), "half")


def test_an_edited_prompt_is_named(tmp_path: Path) -> None:
    paths = [write(tmp_path / "1", SOUP, first="a red dot"), write(tmp_path / "2", SOUP, first="a blue dot")]
    with pytest.raises(ValueError, match="prompt 0 is 'a red dot' in one and 'a blue dot' in the other"):
        read_all(paths)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (blend("rewarded-soup", preference(0.500001, ("a", "b")), "half"), "has weight/a 0.5 in one and 0.500001"),
        (blend("db-mpa", preference(0.5, ("a", "b")), "half"), "has method 'rewarded-soup' in one and 'db-mpa'"),
        (SOUP | {"adapter": "new"}, "has adapter None in one and 'new'"),
        (blend("rewarded-soup", preference(0.5, ("a", "c")), "half"), "has weight/b 0.5 in one and 0.0"),
    ],
)
def test_one_label_for_two_blends_is_refused_though_their_scores_agree(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"blend 'half' {message}"):
        read_all([write(tmp_path / "1", SOUP), write(tmp_path / "2", other)])


def test_what_made_the_scores_is_compared_where_both_files_say_it(tmp_path: Path) -> None:
    """Files of earlier versions say less; torchmetrics' own settings are not part of a score."""
    internal = {"rewards": {"a": {"class": "A", "quality": 3, "compute_on_cpu": True}}}
    later = RECORD | internal | {"made_with": {"dtype": "float32", "scheduler": {"beta_end": 0.02}}}
    paths = [write(tmp_path / "1", SOUP), write(tmp_path / "2", SOUP, later)]
    frame, _ = read_all(paths)
    assert len(frame) == 4
    third = write(tmp_path / "3", SOUP, later | {"made_with": {"dtype": "float32", "scheduler": {"beta_end": 0.01}}})
    with pytest.raises(ValueError, match="made_with.scheduler.beta_end is 0.02 in one and 0.01 in the other"):
        read_all([paths[1], third])
    reward = write(tmp_path / "4", SOUP, RECORD | {"rewards": {"a": {"class": "A", "quality": 4}}})
    with pytest.raises(ValueError, match="rewards.a.quality is 3 in one and 4 in the other"):
        read_all([paths[0], reward])
