"""Objectives of training, and what they are made of: advantages, the KL term, the policy."""

from dblightning.objectives.base import Metrics, Objective, Policy
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
    "FlowDPPO",
    "GRPOGuard",
    "Metrics",
    "Objective",
    "Policy",
    "PolicyGradient",
    "RewardGradient",
]
