"""What the studio shows, without the page: images beside the base's, their scores, a survey over w."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dblightning.preset import Preset
from dblightning.shared_pipeline import Job, SharedPipeline

#: most prompts at once, and their longest
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 8, 500
#: base images kept, so that a slider's move makes the blend's alone
KEPT = 256


class Scorer(Protocol):
    """The interface of a reward; every ``RewardMetric`` has it."""

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        """One score per image, (B,), of images (B, 3, H, W) in [0, 1]; higher is better."""


@dataclass(frozen=True)
class Look:
    """A blend beside the base model, from the same noise.

    Attributes:
        images, base: one per prompt, (3, H, W) in [0, 1].
        scores, base_scores: reward → one score per prompt; rewards that cannot score these prompts are left out.
        notes: why rewards are left out.
    """

    images: list[Tensor]
    base: list[Tensor]
    scores: dict[str, list[float]]
    base_scores: dict[str, list[float]]
    notes: list[str]

    def means(self, base: bool = False) -> dict[str, float]:
        """Reward → mean over the prompts, of the blend or of the base."""
        scores = self.base_scores if base else self.scores
        return {name: sum(each) / len(each) for name, each in scores.items()}


@dataclass(frozen=True)
class Mark:
    """One point of a survey over w.

    Attributes:
        weights: adapter → weight.
        image: of the first prompt.
        scores: reward → mean over the prompts.
    """

    weights: dict[str, float]
    image: Tensor
    scores: dict[str, float]


def read_prompts(text: str) -> list[str]:
    """The prompts of a text, one a line.

    Raises:
        ValueError: none, too many, or one that is too long.
    """
    prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("The prompt is empty: describe a picture, for example “A red circle.”")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"There are {len(prompts)} prompts: at most {MAX_PROMPTS}, one a line.")
    longest = max(map(len, prompts))
    if longest > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"A prompt has {longest} characters: at most {MAX_PROMPT_CHARACTERS}.")
    return prompts


def places(names: Sequence[str], count: int = 5) -> list[dict[str, float]]:
    """Weights that a survey visits: an even strip for two adapters; corners, edges and centre for three; else corners.

    >>> [place["a"] for place in places(["a", "b"])]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> len(places(["a", "b", "c"])), len(places(["a", "b", "c", "d"]))
    (7, 5)
    """
    if len(names) == 2:
        return [{names[0]: i / (count - 1), names[1]: 1 - i / (count - 1)} for i in range(count)]
    corners = [{name: 1.0} for name in names]
    centre = [] if len(names) == 1 else [{name: 1 / len(names) for name in names}]
    edges = [{names[i]: 0.5, names[(i + 1) % 3]: 0.5} for i in range(3)] if len(names) == 3 else []
    return corners + edges + centre


class Blends:
    """Images and scores of one shared pipeline, for any number of visitors.

    Args:
        shared: the pipeline.
        rewards: name → reward.
    """

    def __init__(self, shared: SharedPipeline, rewards: Mapping[str, Scorer]) -> None:
        self.shared = shared
        self.rewards = dict(rewards)
        self._base: OrderedDict[Job, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, prompts: Sequence[str], preset: Preset) -> Look:
        """The blend's images and the base's, prompt i from the noise of seed + i.

        Raises:
            TypeError, ValueError: a preset that cannot be made, in one sentence.
        """
        jobs = _jobs(prompts, preset)
        plain = preset.replaced(weights=None, kl_scale=1.0, method="base", method_options=None)
        base_jobs = _jobs(prompts, plain)
        with self._lock:
            known = {job: self._base[job] for job in base_jobs if job in self._base}
        missing = [job for job in base_jobs if job not in known]
        made = self.shared.make([*jobs, *missing])
        new = dict(zip(missing, made[len(jobs) :], strict=True))
        self._keep(new)
        images, base = made[: len(jobs)], [(known | new)[job] for job in base_jobs]
        scores, notes = self._scores([*images, *base], [*prompts, *prompts])
        count = len(prompts)
        return Look(
            images,
            base,
            {name: each[:count] for name, each in scores.items()},
            {name: each[count:] for name, each in scores.items()},
            notes,
        )

    def survey(self, prompts: Sequence[str], preset: Preset, names: Sequence[str]) -> list[Mark]:
        """The same preset at every place of :func:`places`, from the same noise.

        Raises:
            TypeError, ValueError: as of :meth:`look`.
        """
        visited = places(names)
        jobs = [job for place in visited for job in _jobs(prompts, preset.replaced(weights=place))]
        images = self.shared.make(jobs)
        scores, _ = self._scores(images, list(prompts) * len(visited))
        count = len(prompts)
        return [
            Mark(
                place,
                images[i * count],
                {name: sum(each[i * count : (i + 1) * count]) / count for name, each in scores.items()},
            )
            for i, place in enumerate(visited)
        ]

    def _keep(self, new: Mapping[Job, Tensor]) -> None:
        with self._lock:
            self._base.update(new)
            while len(self._base) > KEPT:
                self._base.popitem(last=False)

    def _scores(self, images: Sequence[Tensor], prompts: Sequence[str]) -> tuple[dict[str, list[float]], list[str]]:
        """Reward → scores of all images, and a sentence per reward that cannot score them."""
        found: dict[str, list[float]] = {}
        notes: list[str] = []
        batch = torch.stack(list(images))
        for name, reward in self.rewards.items():
            try:
                with torch.no_grad():
                    found[name] = reward.score(batch, list(prompts)).tolist()
            except (ValueError, TypeError) as error:
                notes.append(f"{name} has no score here: {error}")
        return found, notes


def _jobs(prompts: Sequence[str], preset: Preset) -> list[Job]:
    seed = preset.seed or 0
    return [Job(prompt, preset.replaced(seed=seed + i)) for i, prompt in enumerate(prompts)]
