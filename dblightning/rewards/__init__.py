"""Rewards of (image, prompt) pairs, each a torchmetrics metric with a per-image ``score``."""

from dblightning.rewards.aesthetic import AestheticScore
from dblightning.rewards.base import RewardMetric, RewardUnavailable, check_images
from dblightning.rewards.clipscore import CLIPScore
from dblightning.rewards.geneval import GenEvalAccuracy
from dblightning.rewards.hps import HPSv2
from dblightning.rewards.imagereward import ImageReward
from dblightning.rewards.jpeg import JPEGCompressibility
from dblightning.rewards.pickscore import PickScore
from dblightning.rewards.registry import REWARDS, build_reward
from dblightning.rewards.remote import RemoteReward
from dblightning.rewards.vila import VILA
from dblightning.rewards.weighted import WeightedReward
from dblightning.rewards.worker import RewardWorker

__all__ = [
    "REWARDS",
    "VILA",
    "AestheticScore",
    "CLIPScore",
    "GenEvalAccuracy",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "PickScore",
    "RemoteReward",
    "RewardMetric",
    "RewardUnavailable",
    "RewardWorker",
    "WeightedReward",
    "build_reward",
    "check_images",
]
