"""Goals of a search: what makes one candidate better than another, from the mean rewards of its images."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Goal(ABC):
    """Base class for goals.

    ``start`` tells it the rewards and what the base model's images get; ``settle`` shows it all candidates once they
    are known. In between Optuna sees ``values``, one number per direction.
    """

    #: of ``values``; "maximize" or "minimize" each, as Optuna says it
    directions: Sequence[str] = ("maximize",)

    def start(self, rewards: Mapping[str, Any], base: np.ndarray) -> None:
        """Fix the order of the rewards.

        Args:
            rewards: name → reward.
            base: the base model's rewards on the search prompts, (images, rewards).

        Raises:
            ValueError: a reward that is not there.
        """
        self.names = list(rewards)
        self.base = base.mean(0)
        unknown = [name for name in self.wanted() if name not in self.names]
        if unknown:
            raise ValueError(f"the goal names the reward {unknown[0]!r}, but the rewards are {self.names}")

    @abstractmethod
    def wanted(self) -> list[str]:
        """The rewards it reads."""

    @abstractmethod
    def merit(self, means: np.ndarray) -> np.ndarray:
        """What the answer has most of: (…, rewards) → (…). Known after ``settle``."""

    def needed(self) -> dict[str, float]:
        """Reward → gain over the base that an answer must have."""
        return {}

    def values(self, means: np.ndarray) -> list[float]:
        """What Optuna is told of a candidate's mean rewards (rewards,)."""
        return [float(self.merit(means))]

    def constraints(self, gains: np.ndarray, errors: np.ndarray) -> list[float]:
        """Numbers that are at most 0 for an allowed candidate.

        Args:
            gains: mean gains over the base, (rewards,).
            errors: their standard errors over prompts, (rewards,).
        """
        return []

    def settle(self, means: np.ndarray) -> None:  # noqa: B027  # most goals have nothing to settle
        """Look at the mean rewards of all allowed candidates, (candidates, rewards), before they are compared."""

    @abstractmethod
    def __str__(self) -> str: ...


class Maximise(Goal):
    """The most of one reward, with gains of others over the base kept up.

    Args:
        reward: to maximise.
        at_least: reward → gain over the base model that is needed; 0.2 is "at least base + 0.2", −0.1 allows a loss.
        surety: standard errors by which a gain has to exceed its bound in the search; 1 makes a false pass unlikely, 0
            takes means as they are.
    """

    def __init__(self, reward: str, at_least: dict[str, float] | None = None, surety: float = 1.0) -> None:
        if surety < 0:
            raise ValueError(f"surety must be at least 0, got {surety}")
        self.reward = reward
        self.at_least = dict(at_least or {})
        self.surety = surety

    def wanted(self) -> list[str]:
        return [self.reward, *self.at_least]

    def needed(self) -> dict[str, float]:
        return self.at_least

    def merit(self, means: np.ndarray) -> np.ndarray:
        return means[..., self.names.index(self.reward)]

    def constraints(self, gains: np.ndarray, errors: np.ndarray) -> list[float]:
        index = [self.names.index(name) for name in self.at_least]
        needed = np.array(list(self.at_least.values()))
        return (needed - gains[index] + self.surety * errors[index]).tolist() if index else []

    def __str__(self) -> str:
        needs = [f"{name} at least base {gain:+g}" for name, gain in self.at_least.items()]
        return f"maximise {self.reward}" + (f" with {' and '.join(needs)}" if needs else "")


class Knee(Goal):
    """The knee of the front: where giving up a little of one reward no longer buys much of another.

    The front is that of the candidates found; each reward is scaled to 0 … 1 between its lowest and highest value on
    it, and the knee is the point of the largest sum, the farthest from the plane through the front's ends.

    Args:
        rewards: two or more.
    """

    def __init__(self, rewards: list[str]) -> None:
        if len(set(rewards)) < 2:
            raise ValueError(f"a front needs two rewards or more, got {rewards}")
        self.rewards = list(rewards)
        self.directions = ["maximize"] * len(self.rewards)
        self._low = np.zeros(len(rewards))
        self._span = np.ones(len(rewards))

    def wanted(self) -> list[str]:
        return self.rewards

    def values(self, means: np.ndarray) -> list[float]:
        return self._own(means).tolist()

    def settle(self, means: np.ndarray) -> None:
        own = self._own(means)
        front = own[non_dominated(own)]
        self._low, self._span = front.min(0), np.ptp(front, axis=0)
        self._span = np.where(self._span > 0, self._span, 1.0)  # a front of one point

    def merit(self, means: np.ndarray) -> np.ndarray:
        return ((self._own(means) - self._low) / self._span).sum(-1)

    def _own(self, means: np.ndarray) -> np.ndarray:
        return means[..., [self.names.index(name) for name in self.rewards]]

    def __str__(self) -> str:
        return f"knee of the front of {', '.join(self.rewards)}"


class Liked(Goal):
    """Mean rewards closest to those of some images that somebody likes.

    The distance is Euclidean over the rewards, each in units of the base images' standard deviation.

    Args:
        images: a JSONL file with {"file": …, "prompt": …} per line, files relative to it.
        rewards: which to compare; None takes all.
    """

    def __init__(self, images: str, rewards: list[str] | None = None) -> None:
        self.images = images
        self.rewards = rewards

    def start(self, rewards: Mapping[str, Any], base: np.ndarray) -> None:
        self._all = list(rewards)
        super().start(rewards, base)
        pairs = self._read()
        self.target = np.array([np.mean([self._score(rewards[name], *pair) for pair in pairs]) for name in self.names])
        deviation = base.std(0)
        self.scale = np.where(deviation > 0, deviation, 1.0)
        self.index = [self.names.index(name) for name in self.wanted()]

    def wanted(self) -> list[str]:
        return list(self.rewards or self._all)

    def merit(self, means: np.ndarray) -> np.ndarray:
        distance = ((means - self.target) / self.scale)[..., self.index]
        return -np.sqrt((distance**2).sum(-1))

    def _read(self) -> list[tuple[Path, str]]:
        file = Path(self.images).expanduser()
        if not file.is_file():
            raise ValueError(f"no file {file}: liked images are a JSONL file of {{'file': …, 'prompt': …}}")
        pairs = []
        for number, line in enumerate(filter(str.strip, file.read_text(encoding="utf-8").splitlines()), 1):
            try:
                entry = json.loads(line)
                pairs.append((file.parent / entry["file"], str(entry["prompt"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected {{'file': …, 'prompt': …}}, got {line[:80]}"
                ) from error
        if not pairs:
            raise ValueError(f"{file} names no image")
        return pairs

    @staticmethod
    def _score(reward: Any, file: Path, prompt: str) -> float:
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        with Image.open(file) as picture:
            return float(reward.score(to_tensor(picture.convert("RGB"))[None], [prompt])[0])

    def __str__(self) -> str:
        return f"rewards closest to those of the images in {self.images}"


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other point beats in everything: bool (n,) of (n, m), higher is better.

    Of equal points all are kept.
    """
    better = (points[:, None] >= points[None]).all(-1) & (points[:, None] > points[None]).any(-1)
    return np.asarray(~better.any(0))
