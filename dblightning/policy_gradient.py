"""The maths of the policy update by its former path; it is in ``dblightning.objectives``."""

from dblightning.objectives.advantages import PromptStatistics, explained_variance
from dblightning.objectives.policy_gradient import clip_fraction, dpok_objective, ppo_objective

OBJECTIVES = {"dpok": dpok_objective, "ppo": ppo_objective}

__all__ = [
    "OBJECTIVES",
    "PromptStatistics",
    "clip_fraction",
    "dpok_objective",
    "explained_variance",
    "ppo_objective",
]
