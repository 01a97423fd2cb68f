from __future__ import annotations

from pathlib import Path

import pytest

from dblightning.whole_files import replacing


def test_the_file_is_there_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old" and aside.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path, aside = tmp_path / "a.txt", tmp_path / "a.part"
    path.write_text("old")
    with pytest.raises(error), replacing(path, aside) as given:
        assert given == aside
        aside.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_unfinished_file_matches_no_pattern_of_finished_ones(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json") as aside:
        aside.write_text("{}")
        assert list(tmp_path.glob("*.json")) == []
