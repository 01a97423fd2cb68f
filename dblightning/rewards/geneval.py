"""GenEval (Ghosh et al. 2023): does the image show the objects, counts, colours and places that its prompt requests?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dblightning.extras import check_extra
from dblightning.geneval_prompts import COLORS, TAGS
from dblightning.rewards.clip import HUGGINGFACE_FILES, OPEN_CLIP_FILES, CLIPReward, load_clip, open_clip_tokenizer
from dblightning.rewards.detection import MASK2FORMER, Detection, Detector, TransformersDetector
from dblightning.rewards.geneval_rules import (
    BACKGROUND,
    COLOR_TEMPLATES,
    COUNTING_THRESHOLD,
    MAX_OBJECTS,
    POSITION_THRESHOLD,
    THRESHOLD,
    Sample,
    crop,
    faults,
    group_objects,
    known_samples,
)
from dblightning.rewards.preprocess import quantise


class GenEvalAccuracy(CLIPReward):
    """1 where an image is correct by GenEval's rules, else 0; no gradient.

    A prompt's metadata is looked up by its text: the benchmark's 553 prompts and this package's 800 unseen ones are
    known, others come with ``metadata``. ``compute`` is the share of correct images; ``accuracy_by_tag`` gives each
    task's, and their mean, which is the number GenEval's tables call overall.

    The published evaluator runs Mask2Former in mmdetection and CLIP in half precision. Here Mask2Former comes from
    transformers, with the weights of its authors and mmdetection's preprocessing and post-processing, and both
    networks run in float32. Expect single verdicts to differ; no comparison on the released weights has been made.

    Args:
        detector: folder or hub id of a Mask2Former or object detection model of transformers with COCO's classes, see
            ``TransformersDetector``; or an object with ``detect``, see ``Detector``.
        clip_weights: folder, file or hub id of CLIP ViT-L/14, which names colours; None:
            ``openai/clip-vit-large-patch14``.
        architecture: open_clip's name or configuration of the network, where the weights come without one.
        metadata: more prompts, as a JSON-lines file in GenEval's format or as a list of such samples. A prompt that is
            known already takes this metadata instead.
        threshold, counting_threshold: least confidence of a detection; the second for the task "counting".
        max_objects: most objects kept per class.
        position_threshold: share of the objects' sizes within which centres count as level.
        background: grey level, 0 … 1, around a masked object when its colour is read; None leaves the image.
        micro_batch_size: most images detected at once.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        FileNotFoundError: weights or metadata are not there. ValueError: they are another model's, or damaged.
    """

    is_differentiable = False
    value_range = (0.0, 1.0)

    correct_by_tag: Tensor
    images_by_tag: Tensor

    def __init__(
        self,
        detector: str | Path | Detector = MASK2FORMER,
        clip_weights: str | Path | None = None,
        architecture: str | dict[str, Any] = "ViT-L-14-quickgelu",
        metadata: str | Path | list[dict[str, Any]] | None = None,
        threshold: float = THRESHOLD,
        counting_threshold: float = COUNTING_THRESHOLD,
        max_objects: int = MAX_OBJECTS,
        position_threshold: float = POSITION_THRESHOLD,
        background: float | None = BACKGROUND,
        micro_batch_size: int | None = 8,
        **kwargs: Any,
    ) -> None:
        for name, value in {"threshold": threshold, "counting_threshold": counting_threshold}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if max_objects < 5:
            raise ValueError(f"max_objects must be >= 5, or a count of four cannot fail, got {max_objects}")
        check_extra("GenEval's colours", "open_clip", "clip")  # before the detector is read
        samples = known_samples(metadata)
        found: Any = TransformersDetector(detector) if isinstance(detector, str | Path) else detector
        super().__init__(
            load_clip(
                clip_weights,
                architecture,
                "GenEval's colours",
                HUGGINGFACE_FILES + OPEN_CLIP_FILES,
                "openai/clip-vit-large-patch14",
            ),
            open_clip_tokenizer(),
            preprocessing="exact",
            micro_batch_size=micro_batch_size,
            **kwargs,
        )
        self.samples = samples
        self._plain_detector = None if isinstance(found, nn.Module) else found
        if isinstance(found, nn.Module):
            self.register_frozen("detector", found)
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_objects = max_objects
        self.position_threshold = position_threshold
        self.background = background
        self.add_state("correct_by_tag", default=torch.zeros(len(TAGS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images_by_tag", default=torch.zeros(len(TAGS), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def detector(self) -> Detector:
        """The detector of objects."""
        return self.frozen("detector") if self._plain_detector is None else self._plain_detector

    def sample(self, prompt: str) -> Sample:
        """A prompt's metadata.

        Raises:
            ValueError: unknown prompt.
        """
        if prompt not in self.samples:
            raise ValueError(
                f"no GenEval metadata for the prompt {prompt!r}; score prompts of GenEvalDataModule, or pass "
                "metadata=, a JSON-lines file with tag, include, exclude and prompt"
            )
        return self.samples[prompt]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1.0 for each correct image (B, 3, H, W), else 0.0: (B,). See ``RewardMetric.score``.

        Raises:
            ValueError: also for a prompt without metadata, before anything is detected.
        """
        if not isinstance(prompts, str):
            for prompt in prompts:
                self.sample(prompt)
        return super().score(images, prompts)

    @torch.no_grad()
    def explain(self, images: Tensor, prompts: Sequence[str]) -> list[list[str]]:
        """Mistakes of each image; an empty list where it is correct."""
        images = quantise(images)
        found = self.detector.detect(images, min(self.threshold, self.counting_threshold))
        return [
            self._faults(image, objects, self.sample(prompt))
            for image, objects, prompt in zip(images, found, prompts, strict=True)
        ]

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([float(not wrong) for wrong in self.explain(images, prompts)])

    def _faults(self, image: Tensor, found: list[Detection], sample: Sample) -> list[str]:
        threshold = self.counting_threshold if sample["tag"] == "counting" else self.threshold
        groups = group_objects(found, threshold, self.max_objects)
        return faults(groups, sample, lambda objects, name: self.colors(image, objects, name), self.position_threshold)

    def colors(self, image: Tensor, objects: list[Detection], name: str) -> list[str]:
        """The colour of each object of class ``name`` in an image (3, H, W): the nearest of GenEval's ten by CLIP."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
        features = self.text_features(texts).unflatten(0, (len(COLORS), len(COLOR_TEMPLATES))).mean(1)
        features = functional.normalize(features, dim=-1)
        # one at a time: crops differ in size, and no prompt of the benchmark requests more than one of a colour
        crops = [self.image_features(crop(image, each, self.background)[None]) for each in objects]
        return [COLORS[index] for index in (torch.cat(crops) @ features.T).argmax(1).tolist()]

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add a batch to the share of correct images, over all and by task."""
        scores = self._accumulate(images, prompts)
        tags = torch.tensor([TAGS.index(self.sample(prompt)["tag"]) for prompt in prompts], device=scores.device)
        self.correct_by_tag.index_add_(0, tags, scores)
        self.images_by_tag += tags.bincount(minlength=len(TAGS))

    def accuracy_by_tag(self) -> dict[str, float]:
        """Share of correct images by task, for the tasks seen, and "overall", the mean of these shares.

        Like ``compute``, a collective call: every rank has to make it.
        """
        with self.sync_context():
            counts = zip(TAGS, self.correct_by_tag.tolist(), self.images_by_tag.tolist(), strict=True)
            shares = {tag: correct / images for tag, correct, images in counts if images}
        return shares | {"overall": sum(shares.values()) / len(shares) if shares else math.nan}
