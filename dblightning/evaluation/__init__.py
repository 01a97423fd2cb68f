"""Checkpoint-based evaluation and generation: every method on the same prompts and the same noise."""

from dblightning.evaluation.module import BlendEvaluationModule
from dblightning.evaluation.specs import BlendSpec, BlendSweep

__all__ = ["BlendEvaluationModule", "BlendSpec", "BlendSweep"]
