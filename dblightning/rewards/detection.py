"""Objects in images: what a detector returns, and detectors of transformers with COCO's classes.

GenEval (Ghosh et al. 2023) counts, places and colours objects found by Mask2Former; see ``rewards/geneval_rules.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dblightning.geneval_prompts import CLASSES

#: Mask2Former with a Swin-S backbone on COCO instances, 50 epochs: the network of the published evaluation, as its
#: authors trained it. The published evaluation reads mmdetection's own training of it, whose scores differ a little.
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"

#: how detectors spell a class → how GenEval's prompts do; the last six are the spellings of Pascal VOC
SPELLINGS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


class Detection(NamedTuple):
    """One object found in an image."""

    label: str  #: GenEval's name of its class
    score: float  #: confidence, 0 … 1
    box: tuple[float, float, float, float]  #: left, top, right, bottom in pixels of the image; right and bottom outside
    mask: Tensor | None = None  #: bool (H, W), the object's pixels; None where the detector finds boxes only


class Detector(Protocol):
    """The interface of a detector for ``GenEvalAccuracy``. An ``nn.Module`` follows the reward to its device."""

    def detect(self, images: Tensor, min_score: float) -> list[list[Detection]]:
        """Objects of each image (B, 3, H, W) in [0, 1] with a score of at least ``min_score``, in any order."""
        ...


class TransformersDetector(nn.Module):
    """A detector of transformers: Mask2Former (with masks), or any object detection model (DETR, …; boxes only).

    Args:
        weights: folder with ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, or a hub id.
        short_side, long_side: pixels that Mask2Former's input is resized to, as in mmdetection's test configuration.
            The size in the checkpoint's own preprocessor file is not used. Other detectors keep theirs.

    Raises:
        FileNotFoundError: no such model on disk or hub. ValueError: its weights are incomplete, or its labels do not
            hold COCO's 80 classes. ImportError: a package that transformers needs for it is missing.
    """

    def __init__(self, weights: str | Path = MASK2FORMER, short_side: int = 800, long_side: int = 1333) -> None:
        super().__init__()
        if not 0 < short_side <= long_side:
            raise ValueError(f"short_side must lie in 1 … long_side, got {short_side} and {long_side}")
        self.processor, self.network = _load(weights)
        self.segments = self.network.config.model_type == "mask2former"
        self.size = {"shortest_edge": short_side, "longest_edge": long_side} if self.segments else None
        self.labels = _label_names(self.network.config.id2label, str(weights))

    @torch.no_grad()
    def detect(self, images: Tensor, min_score: float) -> list[list[Detection]]:
        """Objects of each image (B, 3, H, W) in [0, 1], see ``Detector``; labels outside COCO's 80 are left out."""
        parameter = next(self.network.parameters())
        levels = images.mul(255).round().clamp(0, 255).to(parameter.device, torch.uint8)
        options = {"size": self.size} if self.size else {}
        inputs = self.processor(images=list(levels), return_tensors="pt", **options).to(parameter.device)
        pixels, pixel_mask = inputs["pixel_values"].to(parameter.dtype), inputs.get("pixel_mask")
        outputs = self.network(pixels, **({} if pixel_mask is None else {"pixel_mask": pixel_mask}))
        height, width = images.shape[-2:]
        if not self.segments:
            return [
                list(self._named(found["scores"], found["labels"], found["boxes"]))
                for found in self.processor.post_process_object_detection(
                    outputs, threshold=min_score, target_sizes=[(height, width)] * len(images)
                )
            ]
        found_by_image = []
        for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            found = instances(classes.float(), masks.float(), pixels.shape[-2:], (height, width), min_score)
            found_by_image.append(list(self._named(*found)))
        return found_by_image

    def _named(self, scores: Tensor, labels: Tensor, boxes: Tensor, masks: Tensor | None = None) -> Iterator[Detection]:
        for index, (score, label, box) in enumerate(zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True)):
            if label in self.labels:
                yield Detection(self.labels[label], score, tuple(box), None if masks is None else masks[index])


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    input_size: Sequence[int],
    image_size: Sequence[int],
    min_score: float,
    most: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask2Former's objects in one image, by mmdetection's rules.

    A query's score for a class is its probability (softmax with "no object") times the mean probability of its mask's
    pixels. Masks are enlarged as logits, to the input and then to the image, and cut at probability one half; a box
    encloses a mask's pixels. transformers' own post-processing cuts at 384 × 384 and enlarges the result, so its boxes
    are coarser.

    Args:
        class_logits: (Q, C + 1), "no object" last.
        mask_logits: (Q, h, w).
        input_size: height and width that the network saw.
        image_size: height and width H, W of the image.
        min_score: objects below are left out.
        most: pairs of query and class taken, best first.

    Returns:
        scores (N,), class indices (N,), boxes (N, 4) and bool masks (N, H, W).
    """
    probability = class_logits.softmax(-1)[:, :-1]
    count = probability.shape[1]
    best, flat = probability.flatten().topk(min(most, probability.numel()))
    flat = flat[best >= min_score]  # the mask's factor is at most 1, so the rest is out already
    query, label = flat // count, flat % count
    masks = mask_logits[query][None]
    for size in (tuple(input_size), tuple(image_size)):
        # the batch is one image; with no object left there is nothing to enlarge
        masks = functional.interpolate(masks, size, mode="bilinear", align_corners=False) if len(flat) else masks
    masks = masks[0]
    inside = masks > 0
    area = inside.flatten(1).sum(1)
    certainty = (masks.sigmoid() * inside).flatten(1).sum(1) / area.clamp_min(1)
    scores = probability[query, label] * certainty
    kept = (scores >= min_score) & (area > 0)
    return scores[kept], label[kept], mask_boxes(inside[kept]), inside[kept]


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes (N, 4) around masks (N, H, W), none empty: left, top, right + 1, bottom + 1, as float."""

    def ends(occupied: Tensor) -> tuple[Tensor, Tensor]:
        length = occupied.shape[1]
        first = occupied.to(torch.uint8).argmax(1)
        return first, length - occupied.flip(1).to(torch.uint8).argmax(1)

    if not len(masks):
        return torch.zeros(0, 4, device=masks.device)
    (left, right), (top, bottom) = ends(masks.any(1)), ends(masks.any(2))
    return torch.stack([left, top, right, bottom], 1).float()


def _load(weights: str | Path) -> tuple[Any, Any]:
    """Image processor and network, frozen and in eval mode."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        Mask2FormerForUniversalSegmentation,
    )

    try:
        config = AutoConfig.from_pretrained(weights)
        segments = config.model_type == "mask2former"
        kind = Mask2FormerForUniversalSegmentation if segments else AutoModelForObjectDetection
        processor = AutoImageProcessor.from_pretrained(weights)
        network, report = kind.from_pretrained(weights, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"GenEval's detector: cannot load {weights} ({str(error).partition(chr(10))[0]}). Without a network, "
            f"download config.json, model.safetensors and preprocessor_config.json of {MASK2FORMER} elsewhere and "
            "pass their folder, detector=/path/to/folder"
        ) from error
    except ImportError as error:
        raise ImportError(f"GenEval's detector {weights}: transformers needs a package: {error}") from error
    # transformers draws missing weights at random with no more than a warning; a buffer is computed, so it may lack
    lost = {name for name, _ in network.named_parameters()} & set(report["missing_keys"])
    lost |= {str(key) for key in report["mismatched_keys"]}
    if lost:
        raise ValueError(
            f"{weights} does not hold all weights of its {type(network).__name__}: {sorted(lost)[:4]} "
            f"({len(lost)} in all) are missing or of another shape; download it again"
        )
    return processor, network.eval().requires_grad_(False)


def _label_names(id2label: dict[int, str], source: str) -> dict[int, str]:
    """A detector's label indices → GenEval's class names."""
    names = {int(index): SPELLINGS.get(name, name) for index, name in id2label.items()}
    if missing := [name for name in CLASSES if name not in names.values()]:
        raise ValueError(
            f"{source} detects {len(names)} classes, and {len(missing)} of COCO's 80 are not among them, such as "
            f"{missing[:4]}; GenEval needs a detector trained on COCO with its labels' names in config.json"
        )
    return {index: name for index, name in names.items() if name in CLASSES}
