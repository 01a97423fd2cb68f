"""What the page's controls say, without the page and without the extra."""

from __future__ import annotations

from typing import Any

import pytest

from dblightning.preset import even_preset
from dblightning.studio.controls import Entry, Settings, place_label, remembered

PLAIN = Settings("A red circle.", 0, "db-mpa", 1.0, 20, 3.0, ["a", "b"], 0.25, (0.5, 0.5, 0.5))


def test_settings_that_cannot_be_are_one_sentence() -> None:
    names = ["a", "b", "c"]

    def settings(**changes: Any) -> Settings:
        plain = Settings("A red circle.", 0, "db-mpa", 1.0, 20, 3.0, ["a", "b"], 0.25, (0.5, 0.5, 0.5))
        return plain._replace(**changes)

    assert settings().weights(names) == {"a": 0.25, "b": 0.75}
    assert settings(chosen=["c"]).weights(names) == {"c": 1.0}
    assert settings(chosen=names, sliders=(1.0, 0.5, 0.5)).weights(names) == {"a": 0.5, "b": 0.25, "c": 0.25}
    for changes, sentence in (
        ({"chosen": []}, "No reward is chosen"),
        ({"chosen": names, "sliders": (0.0, 0.0, 0.0)}, "All sliders are at zero"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=sentence):
            settings(**changes).preset(names, even_preset())


def test_a_drag_is_one_entry_of_the_history_and_the_same_again_none() -> None:
    history: list[Entry] = []
    for when, w in ((0.0, 0.1), (0.5, 0.2), (1.0, 0.3), (9.0, 0.3), (9.5, 0.4), (20.0, 0.5)):
        history = remembered(history, Entry(None, "", PLAIN._replace(axis=w), when))
    assert [entry.settings.axis for entry in history] == [0.3, 0.4, 0.5]
    for i in range(50):
        history = remembered(history, Entry(None, "", PLAIN._replace(axis=i / 50), 100.0 * i))
    assert len(history) == 24


def test_a_places_label_is_short() -> None:
    assert place_label({"a": 0.25, "b": 0.75}, 2) == "w 0.25"
    assert place_label({"a": 1.0, "b": 0.0}, 2) == "w 1"
    assert place_label({"a": 1.0}, 3) == "a"
    assert place_label({"a": 0.5, "c": 0.5}, 3) == "a + c"
    assert place_label({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 3) == "all"
