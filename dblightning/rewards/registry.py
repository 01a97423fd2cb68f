"""Rewards by short name, for command lines and configs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from dblightning.class_paths import import_class, is_path

if TYPE_CHECKING:
    from dblightning.rewards.base import RewardMetric

#: name → class; a module is imported when one of its rewards is built
REWARDS = {
    "image_reward": "dblightning.rewards.imagereward.ImageReward",
    "pickscore": "dblightning.rewards.pickscore.PickScore",
    "vila": "dblightning.rewards.vila.VILA",
    "jpeg": "dblightning.rewards.jpeg.JPEGCompressibility",
    "hpsv2": "dblightning.rewards.hps.HPSv2",
    "aesthetic": "dblightning.rewards.aesthetic.AestheticScore",
    "clip_score": "dblightning.rewards.clipscore.CLIPScore",
    "geneval": "dblightning.rewards.geneval.GenEvalAccuracy",
    "text_rendering": "dblightning.rewards.text_rendering.TextRendering",
    "judge": "dblightning.rewards.judge.ChatJudge",
    "remote": "dblightning.rewards.remote.RemoteReward",
}


def reward_class(name: str) -> type[RewardMetric]:
    """The class of a reward.

    Args:
        name: a key of ``REWARDS``, or the dotted path of a ``RewardMetric`` subclass.

    Raises:
        ValueError: neither.
    """
    from dblightning.rewards.base import RewardMetric

    path = REWARDS.get(name, name)
    if not is_path(path):
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}, or the dotted path of a class")
    found: type[RewardMetric] = import_class(path, "reward", RewardMetric)
    return found


def build_reward(name: str, **options: Any) -> RewardMetric:
    """A reward by name; ``options`` are its constructor's arguments.

    Raises:
        ValueError: unknown name, or an argument the reward does not take.
    """
    from dblightning.rewards.base import METRIC_ARGUMENTS

    found = reward_class(name)
    # before the weights are read; the rest a constructor says itself
    parameters = inspect.signature(found).parameters
    own = [key for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
    known = set(own) if len(own) == len(parameters) else {*own, *METRIC_ARGUMENTS}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} cannot be built with {', '.join(unknown)}; its arguments are {', '.join(own)}")
    try:
        return found(**options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error
