from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from dblightning.settings import RULES, Number, check_settings, count, problems, rules_of


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None])
@pytest.mark.parametrize("rule", [Number(), Number(above=0), Number(least=0, most=1), count()])
def test_only_finite_numbers_are_numbers(rule: Number, value: Any) -> None:
    assert not rule.allows(value)


def test_bounds_are_kept_and_words_are_allowed_beside_numbers() -> None:
    assert [Number(above=0, most=1).allows(value) for value in (0, 1e-9, 1, 1.1)] == [False, True, True, False]
    assert [Number(least=0).allows(value) for value in (-1e-9, 0, 3)] == [False, True, True]
    assert [count().allows(value) for value in (0, 1, 2.0, 2**70)] == [False, True, False, True]
    assert [count(words=(None, "auto")).allows(value) for value in (None, "auto", "all", 0)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_message_is_one_sentence_of_value_rule_and_remedy() -> None:
    with pytest.raises(ValueError) as refusal:
        check_settings({"unknown": -1, "learning_rate": 1e30})
    assert str(refusal.value) == "learning_rate must be >= 0 and <= 1, got 1e+30; the paper's is 1e-5"
    assert str(Number()) == "finite"
    assert str(Number(above=0)) == "> 0 and finite"
    assert str(count(words=(None, "auto"))) == 'a whole number >= 1 or null or "auto"'
    assert len(list(problems({"rank": 0, "value_width": 0, "clip_range": 1.0}))) == 2


def test_every_numeric_setting_of_the_training_module_has_a_rule() -> None:
    from dblightning.objectives import RewardGradient
    from dblightning.training_settings import BasisAdapter, TrainingSettings

    numeric = [
        (group, name)
        for group, kind in get_type_hints(TrainingSettings).items()
        for name, hint in get_type_hints(kind).items()
        if {int, float} & {hint, *get_args(hint)}
    ]
    assert len(numeric) > 20
    assert not [f"{group}.{name}" for group, name in numeric if name not in rules_of(group)]
    listed = [name.partition(".") for name in RULES if "." in name]
    numeric += [("objective", name) for name in get_type_hints(RewardGradient)]
    numeric += [("adapters", name) for name in get_type_hints(BasisAdapter)]
    assert all((group, name) in numeric for group, _, name in listed), "no rule is of a setting that is gone"


def test_the_rules_are_known_without_torch() -> None:
    code = "import sys, dblightning.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "rank" in RULES
