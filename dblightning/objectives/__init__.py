"""Objectives of training, and what they are made of: advantages, the KL term, the policy."""

from dblightning.objectives.base import Metrics, Objective, Policy
from dblightning.objectives.best_of_n import BestOfN
from dblightning.objectives.forward_process import AWM, NFT
from dblightning.objectives.policy_gradient import DPOK, GRPO, PPO, PolicyGradient
from dblightning.objectives.reward_gradient import RewardGradient
from dblightning.objectives.stored_mean import FlowDPPO, GRPOGuard

__all__ = [
    "AWM",
    "DPOK",
    "GRPO",
    "NFT",
    "PPO",
    "BestOfN",
    "FlowDPPO",
    "GRPOGuard",
    "Metrics",
    "Objective",
    "Policy",
    "PolicyGradient",
    "RewardGradient",
]
