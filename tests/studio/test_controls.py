"""What the page's controls say, without the page and without the extra."""

from __future__ import annotations

from typing import Any

import pytest

from dblightning.preset import Preset, even_preset
from dblightning.studio.controls import Entry, Settings, methods, place_label, remembered

PLAIN = Settings("A red circle.", 0, "db-mpa", 1.0, 20, 3.0, ["a", "b"], 0.25, False, (0.5, 0.5, 0.5))


def test_settings_that_cannot_be_are_one_sentence() -> None:
    names = ["a", "b", "c"]

    def settings(**changes: Any) -> Settings:
        plain = Settings("A red circle.", 0, "db-mpa", 1.0, 20, 3.0, ["a", "b"], 0.25, False, (0.5, 0.5, 0.5))
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


def test_what_the_controls_leave_open_is_the_presets() -> None:
    knots = [{"a": 1.0}, {"b": 1.0}]
    like = Preset(weights=knots, eta=0.5, base="somewhere", method="db-mpa-ls", method_options={"schedule": "iid"})
    kept = PLAIN._replace(scheduled=True, method="db-mpa-ls").preset(["a", "b"], like)
    assert kept == like.replaced(guidance_scale=3.0, seed=0)
    moved = PLAIN.preset(["a", "b"], like)
    assert moved.weights == {"a": 0.25, "b": 0.75}
    assert (moved.eta, moved.base, moved.method_options) == (0.5, "somewhere", None)


def test_a_method_without_a_strength_gets_one() -> None:
    assert PLAIN._replace(method="rewarded-soup", kl_scale=2.0).preset(["a", "b"], even_preset()).kl_scale == 1.0
    assert PLAIN._replace(kl_scale=2.0).preset(["a", "b"], even_preset()).kl_scale == 2.0
    assert methods(Preset(method="db-kla"), True)[-1][1] == "db-kla"
    assert (len(methods(even_preset(), True)), len(methods(even_preset(), False))) == (4, 3)
