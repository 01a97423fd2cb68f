"""Whether an image shows the text that its prompt quotes, read by OCR (extra ``ocr``)."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from dblightning.extras import importing
from dblightning.rewards.base import RewardMetric
from dblightning.rewards.preprocess import to_uint8

#: the text between straight or typographic double quotes
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class TextRendering(RewardMetric):
    """1 − (edit distance of the image's text to the quoted text) / (its length), in [0, 1]; Flow-GRPO's OCR reward.

    The prompt's first text in double quotes is the target: 'A shop sign that says "open late"'. Both texts lose their
    white space and their case. An image whose text contains the target whole scores 1, whatever else is written there;
    the distance is at most the target's length, so no text scores 0.

    The reader is RapidOCR (PaddleOCR's models by onnxruntime, shipped with the package: no download), where Flow-GRPO
    uses PaddleOCR itself. It reads Latin and Chinese. Letters of less than about ten pixels are not found.

    Args:
        threads: of onnxruntime; None: its own choice, all cores.
        least_confidence: lines that the reader is less sure of, in [0, 1], are left out (Flow-GRPO: 0).
        micro_batch_size, kwargs: as of :class:`RewardMetric`.

    Raises:
        ImportError: the extra is not installed.
        ValueError: an argument out of range; when scoring, a prompt that quotes nothing.
    """

    value_range = (0.0, 1.0)

    def __init__(
        self,
        threads: int | None = None,
        least_confidence: float = 0.0,
        micro_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch_size, **kwargs)
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, or None, got {threads}")
        if not 0 <= least_confidence <= 1:
            raise ValueError(f"least_confidence must lie in [0, 1], got {least_confidence}")
        self.threads = threads
        self.least_confidence = least_confidence
        reader(threads)  # what is missing is said now

    @property
    def name(self) -> str:
        return "text_rendering"

    def read(self, images: Tensor) -> list[str]:
        """The text in each image, lines from top to bottom joined by blanks.

        Args:
            images: float (B, 3, H, W) in [0, 1].
        """
        engine = reader(self.threads)
        found = []
        for array in to_uint8(images):
            result = engine(np.ascontiguousarray(array[..., ::-1]))  # BGR, as OpenCV has it
            lines = zip(result.txts or (), result.scores or (), strict=True)
            found.append(" ".join(text for text, confidence in lines if confidence >= self.least_confidence))
        return found

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        targets = [quoted(prompt) for prompt in prompts]
        scores = [text_score(text, target) for text, target in zip(self.read(images), targets, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def quoted(prompt: str) -> str:
    """The first text in double quotes.

    >>> quoted('New York Skyline with "Hello World" written with fireworks')
    'Hello World'

    Raises:
        ValueError: there is none.
    """
    match = _QUOTED.search(prompt)
    text = (match[1] or match[2] or "") if match else ""
    if not text.strip():
        raise ValueError(f'a prompt for text rendering quotes its text, as in: a sign "open late"; got {prompt!r}')
    return text


def text_score(text: str, target: str) -> float:
    """1 − min(distance, length) / length of two texts without white space and case.

    >>> text_score("HELLO  world!", "Hello World"), text_score("Help", "Hello"), text_score("", "Hello")
    (1.0, 0.6, 0.0)
    """
    text, target = ("".join(each.split()).casefold() for each in (text, target))
    if target in text:
        return 1.0
    if not text:
        return 0.0
    distance = min(float(edit_distance([text], [target])), len(target))
    return 1 - distance / len(target)


@cache
def reader(threads: int | None = None) -> Any:
    """The OCR engine; loading takes seconds, so all rewards of a process share it.

    Raises:
        ImportError: the extra is not installed.
    """
    with importing("text rendering", "ocr"):
        from rapidocr import RapidOCR
    params: dict[str, Any] = {"Global.log_level": "error"}
    if threads is not None:
        params |= {
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    return RapidOCR(params=params)
