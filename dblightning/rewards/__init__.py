"""Rewards of (image, prompt) pairs, each a torchmetrics metric with a per-image ``score``."""

from dblightning.rewards.aesthetic import AestheticScore
from dblightning.rewards.base import RewardMetric, check_images
from dblightning.rewards.clipscore import CLIPScore
from dblightning.rewards.hps import HPSv2
from dblightning.rewards.imagereward import ImageReward
from dblightning.rewards.jpeg import JPEGCompressibility
from dblightning.rewards.pickscore import PickScore
from dblightning.rewards.weighted import WeightedReward

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "PickScore",
    "RewardMetric",
    "WeightedReward",
    "check_images",
]
