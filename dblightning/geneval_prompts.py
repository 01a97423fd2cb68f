"""GenEval's vocabulary and the prompts drawn from it by its published rules: 553 train, 100 validation, 700 test.

Rules: Ghosh et al. 2023, "GenEval: An object-focused framework for evaluating text-to-image alignment". Six tasks over
COCO's 80 classes; the order of the random draws is part of the definition, because it decides which prompts come out.
The prompt sets and the reward both read them here, so this module imports nothing else of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

# fmt: off
#: COCO's 80 classes in COCO's order; mouse, remote and keyboard are spelled out, so that a painter knows what is meant.
CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
POSITIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

#: The benchmark's six tasks.
TAGS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

#: SHA-256 of the 553 prompts, one per line with a final newline
TRAIN_SHA256 = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"

#: One sample: {"tag": task, "include": [things an image must show], "exclude": [things it must not], "prompt": text}.
#: A thing is {"class", "count"} and, where the prompt requests it, "color" or "position": [relation, index in include].
Sample = dict[str, Any]


def with_article(words: str) -> str:
    """The words with their article, "an apple", "a red apple"; chosen by first letter, as the benchmark does."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _single_object(name: str) -> Sample:
    include = [{"class": name, "count": 1}]
    return {"tag": "single_object", "include": include, "prompt": f"a photo of {with_article(name)}"}


def _two_object(rng: np.random.Generator) -> Sample:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    prompt = f"a photo of {with_article(a)} and {with_article(b)}"
    return {"tag": "two_object", "include": include, "prompt": prompt}


def _counting(rng: np.random.Generator) -> Sample:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    plural = name + ("es" if name.endswith("s") else "s")
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural}",
    }


def _colors(rng: np.random.Generator) -> Sample:
    name = CLASSES[1 + rng.choice(len(CLASSES) - 1)]  # 1 +: a person gets no colour
    color = COLORS[rng.choice(len(COLORS))]
    include = [{"class": name, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {with_article(f'{color} {name}')}"}


def _position(rng: np.random.Generator) -> Sample:
    a, b = (CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False))
    relation = POSITIONS[rng.choice(len(POSITIONS))]
    # the landmark comes first, so that "position" can point back at index 0
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    prompt = f"a photo of {with_article(a)} {relation} {with_article(b)}"
    return {"tag": "position", "include": include, "prompt": prompt}


def _color_attr(rng: np.random.Generator) -> Sample:
    a, b = (CLASSES[1 + i] for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
    color_a, color_b = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    include = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
    prompt = f"a photo of {with_article(f'{color_a} {a}')} and {with_article(f'{color_b} {b}')}"
    return {"tag": "color_attr", "include": include, "prompt": prompt}


#: The tasks that are drawn, in the order of their draws; single_object comes before them and takes every class once.
TASKS: tuple[Callable[[np.random.Generator], Sample], ...] = (_two_object, _counting, _colors, _position, _color_attr)


def train_samples(seed: int = 43, per_task: int = 100) -> list[Sample]:
    """The benchmark's prompts: every class once, then ``per_task`` draws of each task, repeated samples left out.

    The defaults are the benchmark's and give its 553 samples: 80 + 5 · 100 less 27 repeats.
    """
    rng = np.random.default_rng(seed)
    samples = [_single_object(CLASSES[i]) for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    samples += [task(rng) for task in TASKS for _ in range(per_task)]
    # the whole sample decides, not the prompt alone; a dict keeps the place of the first
    return list({json.dumps(sample): sample for sample in samples}.values())


def _scene(sample: Sample) -> tuple[str, ...]:
    """The scene a sample requests, whatever order its objects are named in."""
    return sample["tag"], *sorted(json.dumps(thing, sort_keys=True) for thing in sample["include"])


def held_out_samples(seed: int = 44, per_task: int = 140) -> list[Sample]:
    """Held-out prompts by the same rules: ``per_task`` of each drawn task, 5 · 140 = 700, none among the 553.

    A scene of the 553 with its objects named the other way round counts as seen. There is no single_object prompt:
    the 553 hold all 80. The tasks take turns, so that the first N prompts are a balanced selection for every N.

    Raises:
        ValueError: more per task than there are.
    """
    # counting has the fewest: 80 classes · 3 numbers, 80 of them among the 553
    if per_task > 160:
        raise ValueError(f"only 160 unseen counting prompts exist, got per_task={per_task}")
    return _unseen_samples(train_samples(), seed, per_task)


def validation_samples() -> list[Sample]:
    """100 prompts by the same rules, 20 of each drawn task, no scene of which is among the 553 or the 700.

    Twenty is as many as the 700 leave of counting.
    """
    return _unseen_samples(train_samples() + held_out_samples(), seed=45, per_task=20)


def _unseen_samples(known: list[Sample], seed: int, per_task: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    seen = {_scene(sample) for sample in known}
    by_task: list[list[Sample]] = []
    for task in TASKS:
        fresh: list[Sample] = []
        while len(fresh) < per_task:
            sample = task(rng)
            if _scene(sample) not in seen:
                seen.add(_scene(sample))
                fresh.append(sample)
        by_task.append(fresh)
    return [sample for turn in zip(*by_task, strict=True) for sample in turn]
