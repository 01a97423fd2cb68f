"""GenEval's rules: from objects found in an image to what is wrong with it. Pure functions.

The rules and constants are those of the published evaluator (github.com/djghosh13/geneval,
``evaluation/evaluate_images.py``), read in its source; the code is our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblightning.geneval_prompts import (
    CLASSES,
    COLORS,
    POSITIONS,
    TAGS,
    held_out_samples,
    train_samples,
    validation_samples,
)
from dblightning.rewards.detection import Detection

#: Detections at or below these confidences are ignored; counting requires more.
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
#: Most objects kept per class. (Overlapping ones all stay: the evaluator's limit of 1.0 on the overlap keeps any.)
MAX_OBJECTS = 16
#: Centres that differ by less than this share of the two objects' sizes, added, count as level.
POSITION_THRESHOLD = 0.1
#: The remaining offset has to exceed this share of the distance between the centres for a relation to hold.
POSITION_SHARE = 0.5
#: Grey level of the background around a masked object when its colour is read: #999, 153 of 255.
BACKGROUND = 0.6
#: What CLIP compares an object with; the three texts' features are averaged per colour.
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

#: One prompt's metadata, see ``dblightning.geneval_prompts.Sample``.
Sample = Mapping[str, Any]
#: objects of one class → the colour of each
ColorsOf = Callable[[list[Detection], str], list[str]]


def group_objects(found: Sequence[Detection], threshold: float, most: int = MAX_OBJECTS) -> dict[str, list[Detection]]:
    """Detections above ``threshold`` by class, the most confident first, at most ``most`` of a class."""
    groups: dict[str, list[Detection]] = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold:
            groups.setdefault(each.label, []).append(each)
    return {label: group[:most] for label, group in groups.items()}


def relations(box: Sequence[float], landmark: Sequence[float], threshold: float = POSITION_THRESHOLD) -> set[str]:
    """Relations of a box to a landmark: a subset of "left of", "right of", "above", "below".

    Along each axis the offset of the centres is shortened by ``threshold`` · (sum of both sizes), to 0 at least. A
    relation holds where what is left exceeds half the distance between the centres (before shortening).

    Args:
        box, landmark: left, top, right, bottom in pixels; y grows downwards.
        threshold: share of the sizes that counts as level.
    """
    offset, rest = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((box[low] + box[high] - landmark[low] - landmark[high]) / 2)
        slack = threshold * (abs(box[high] - box[low]) + abs(landmark[high] - landmark[low]))
        rest.append(math.copysign(max(abs(offset[-1]) - slack, 0.0), offset[-1]))
    if max(map(abs, rest)) < 1e-3:  # pixels; also where the centres coincide
        return set()
    dx, dy = (each / math.hypot(*offset) for each in rest)
    holds = {
        "left of": dx < -POSITION_SHARE,
        "right of": dx > POSITION_SHARE,
        "above": dy < -POSITION_SHARE,
        "below": dy > POSITION_SHARE,
    }
    return {name for name, true in holds.items() if true}


def faults(
    groups: Mapping[str, list[Detection]],
    sample: Sample,
    colors_of: ColorsOf,
    position_threshold: float = POSITION_THRESHOLD,
) -> list[str]:
    """Mistakes of an image; empty where it is correct.

    Every "include" clause has to hold and no "exclude" clause may. A clause requires at least "count" objects of a
    class; colour and position are read from its "count" most confident ones, all of which have to comply, and a
    position holds against each object of the clause it points at.

    Args:
        groups: see ``group_objects``.
        sample: the prompt's metadata.
        colors_of: names the colours of objects; called only where a clause names a colour.
        position_threshold: see ``relations``.
    """
    wrong: list[str] = []
    matched: list[list[Detection] | None] = []  # by include clause; None where it failed
    for clause in sample["include"]:
        name, count = clause["class"], clause["count"]
        objects = groups.get(name, [])[:count]
        before = len(wrong)
        if len(objects) < count:
            wrong.append(f"{len(objects)} of {count} {name}")
        else:
            if "color" in clause:
                colors = colors_of(objects, name)
                if colors.count(clause["color"]) < count:
                    wrong.append(f"{name} is {', '.join(colors)}, not {clause['color']}")
            if "position" in clause and len(wrong) == before:
                relation, index = clause["position"]
                landmarks = matched[index]
                if landmarks is None:
                    wrong.append(f"nothing for {name} to be {relation}")
                elif any(
                    relation not in relations(each.box, landmark.box, position_threshold)
                    for each in objects
                    for landmark in landmarks
                ):
                    wrong.append(f"{name} is not {relation} its {landmarks[0].label}")
        matched.append(objects if len(wrong) == before else None)
    for clause in sample.get("exclude") or []:
        seen = len(groups.get(clause["class"], []))
        if seen >= clause["count"]:
            wrong.append(f"{seen} {clause['class']}, fewer than {clause['count']} requested")
    return wrong


def crop(image: Tensor, found: Detection, background: float | None = BACKGROUND) -> Tensor:
    """The object's box out of an image (3, H, W), everything outside its mask painted in the grey ``background``.

    The box is rounded to whole pixels, at least one; without a mask, or with ``background=None``, nothing is painted.
    """
    if found.mask is not None and background is not None:
        image = torch.where(found.mask.to(image.device), image, image.new_tensor(background))
    height, width = image.shape[-2:]
    left, top = min(max(round(found.box[0]), 0), width - 1), min(max(round(found.box[1]), 0), height - 1)
    right, bottom = max(round(found.box[2]), left + 1), max(round(found.box[3]), top + 1)
    return image[:, top:bottom, left:right]


def known_samples(metadata: str | Path | list[dict[str, Any]] | None = None) -> dict[str, Sample]:
    """Metadata by prompt: the benchmark's 553, this package's 800 unseen prompts, and ``metadata`` above them.

    Args:
        metadata: see ``GenEvalAccuracy``.

    Raises:
        FileNotFoundError: no such file. ValueError: a sample that is not in GenEval's format.
    """
    every = train_samples() + validation_samples() + held_out_samples()
    samples: dict[str, Sample] = {each["prompt"]: each for each in every}
    if metadata is None:
        return samples
    source = "metadata" if isinstance(metadata, list) else str(metadata)
    entries: list[Any] = metadata if isinstance(metadata, list) else _read_lines(Path(metadata))
    for number, entry in enumerate(entries, start=1):
        if problem := _problem(entry):
            raise ValueError(f"{source}, sample {number}: {problem}")
        samples[entry["prompt"]] = entry
    return samples


def _read_lines(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"GenEval's metadata: no file {path}; one JSON object per line is expected")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON-lines file: {error}") from error


def _problem(sample: Any) -> str | None:
    """Why a sample is not in GenEval's format; None where it is."""
    if not isinstance(sample, dict) or not {"prompt", "tag", "include"} <= set(sample):
        return f"expected an object with prompt, tag and include, got {sample!r}"
    if sample["tag"] not in TAGS:
        return f"tag must be one of {', '.join(TAGS)}, got {sample['tag']!r}"
    for index, clause in enumerate(sample["include"]):
        relation, target = clause.get("position", (POSITIONS[0], -1))
        if relation not in POSITIONS or not target < index:
            return f"position must be [{' | '.join(POSITIONS)}, index of an earlier clause], got {clause['position']}"
        if clause.get("color", COLORS[0]) not in COLORS:
            return f"color must be one of {', '.join(COLORS)}, got {clause['color']!r}"
    for clause in [*sample["include"], *(sample.get("exclude") or [])]:
        if clause.get("class") not in CLASSES or not clause.get("count", 0) >= 1:
            return f"a clause needs one of COCO's 80 classes and a count of at least 1, got {clause}"
    return None
