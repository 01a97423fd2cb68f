"""Rewards of (image, prompt) pairs, each a torchmetrics metric with a per-image ``score``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblightning.rewards.aesthetic import AestheticScore as AestheticScore
    from dblightning.rewards.base import RewardMetric as RewardMetric
    from dblightning.rewards.base import RewardUnavailable as RewardUnavailable
    from dblightning.rewards.base import check_images as check_images
    from dblightning.rewards.clipscore import CLIPScore as CLIPScore
    from dblightning.rewards.geneval import GenEvalAccuracy as GenEvalAccuracy
    from dblightning.rewards.hps import HPSv2 as HPSv2
    from dblightning.rewards.imagereward import ImageReward as ImageReward
    from dblightning.rewards.jpeg import JPEGCompressibility as JPEGCompressibility
    from dblightning.rewards.judge import ChatJudge as ChatJudge
    from dblightning.rewards.pickscore import PickScore as PickScore
    from dblightning.rewards.registry import REWARDS as REWARDS
    from dblightning.rewards.registry import build_reward as build_reward
    from dblightning.rewards.remote import RemoteReward as RemoteReward
    from dblightning.rewards.text_rendering import TextRendering as TextRendering
    from dblightning.rewards.vila import VILA as VILA
    from dblightning.rewards.weighted import WeightedReward as WeightedReward
    from dblightning.rewards.worker import RewardWorker as RewardWorker

#: public name → its module here
_HOMES = {
    "AestheticScore": "aesthetic",
    "RewardMetric": "base",
    "RewardUnavailable": "base",
    "check_images": "base",
    "CLIPScore": "clipscore",
    "ChatJudge": "judge",
    "GenEvalAccuracy": "geneval",
    "HPSv2": "hps",
    "ImageReward": "imagereward",
    "JPEGCompressibility": "jpeg",
    "PickScore": "pickscore",
    "REWARDS": "registry",
    "build_reward": "registry",
    "RemoteReward": "remote",
    "TextRendering": "text_rendering",
    "VILA": "vila",
    "WeightedReward": "weighted",
    "RewardWorker": "worker",
}
__all__ = [
    "REWARDS",
    "VILA",
    "AestheticScore",
    "CLIPScore",
    "ChatJudge",
    "GenEvalAccuracy",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "PickScore",
    "RemoteReward",
    "RewardMetric",
    "RewardUnavailable",
    "RewardWorker",
    "TextRendering",
    "WeightedReward",
    "build_reward",
    "check_images",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command's help needs no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"dblightning.rewards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dblightning.rewards' has no attribute {name!r}")
