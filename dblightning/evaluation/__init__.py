"""Checkpoint-based evaluation and generation: every method on the same prompts and the same noise."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblightning.evaluation.module import BlendEvaluationModule as BlendEvaluationModule
    from dblightning.evaluation.specs import BlendSpec as BlendSpec
    from dblightning.evaluation.specs import BlendSweep as BlendSweep

__all__ = ["BlendEvaluationModule", "BlendSpec", "BlendSweep"]

_HOMES = {"BlendEvaluationModule": "module", "BlendSpec": "specs", "BlendSweep": "specs"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the report needs a table, and no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"dblightning.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dblightning.evaluation' has no attribute {name!r}")
