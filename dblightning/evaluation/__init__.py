"""Checkpoint-based evaluation and generation: every method on the same prompts and the same noise."""

from dblightning.evaluation.module import BlendEvaluationModule, BlendSpec

__all__ = ["BlendEvaluationModule", "BlendSpec"]
