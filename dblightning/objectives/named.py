"""Objectives by name: from a class path and settings, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dblightning.objectives as home
from dblightning.class_paths import import_class, is_path
from dblightning.flat_settings import OBJECTIVES
from dblightning.objectives.base import Objective
from dblightning.settings import check


def objective_of(value: Any) -> Objective:
    """An objective, from one, its class path, or {"class_path": …, "init_args": {…}}; "dpok" and "ppo" are short.

    Raises:
        ValueError: what it names is not an objective.
    """
    if isinstance(value, Objective):
        return value
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {"class_path": value}
    path = given.get("class_path", OBJECTIVES["dpok"])
    found = OBJECTIVES.get(path, path)
    check(is_path(found), f'objective must be a class path such as {OBJECTIVES["ppo"]}, "dpok" or "ppo", got {path!r}')
    objective: Objective = import_class(found, "objective", Objective)(**given.get("init_args", {}))
    return objective


def described(objective: Objective) -> dict[str, Any]:
    """Class path and plain settings of an objective, for hyperparameters."""
    kind = type(objective)
    module = home.__name__ if getattr(home, kind.__name__, None) is kind else kind.__module__
    plain = (int, float, str, bool, type(None))
    settings = {name: value for name, value in vars(objective).items() if name[0] != "_" and isinstance(value, plain)}
    return {"class_path": f"{module}.{kind.__name__}", "init_args": settings}
