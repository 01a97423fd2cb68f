"""Rewards of (image, prompt) pairs, each a torchmetrics metric with a per-image ``score``."""

from dblightning.rewards.base import RewardMetric, check_images
from dblightning.rewards.jpeg import JPEGCompressibility
from dblightning.rewards.weighted import WeightedReward

__all__ = ["JPEGCompressibility", "RewardMetric", "WeightedReward", "check_images"]
