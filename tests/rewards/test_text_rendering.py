"""Text in images: the score by hand, and the reader on rendered text where the extra is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dblightning.rewards.text_rendering import TextRendering, quoted, reader, text_score


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        ("hello world", "Hello World", 1.0),
        ("HELLO\nWORLD", "Hello World", 1.0),
        ("see: Hello World!", "Hello World", 1.0),  # whatever else is written
        ("Hallo World", "Hello World", 0.9),  # one of ten letters
        ("Hello Wrld", "Hello World", 0.9),
        ("", "Hello", 0.0),
        ("completely different", "Hello", 0.0),  # the distance is at most the target's length
    ],
)
def test_the_score_is_one_less_the_normalised_edit_distance(text: str, target: str, score: float) -> None:
    assert text_score(text, target) == pytest.approx(score)


def test_the_target_is_the_first_text_in_double_quotes() -> None:
    assert quoted('a sign "open late" beside "closed"') == "open late"
    assert quoted("ein Schild mit “offen”") == "offen"
    for prompt in ("a sign", 'a sign ""', 'a sign " "', 'a "sign'):
        with pytest.raises(ValueError, match="quotes its text"):
            quoted(prompt)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    reader.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'dblightning\[ocr\]'"):
        TextRendering()
    reader.cache_clear()


def rendered(text: str, ink: str = "black", paper: str = "white") -> Tensor:
    """A picture 512 × 256 with a text, (3, H, W) in [0, 1]."""
    image = Image.new("RGB", (512, 256), paper)
    ImageDraw.Draw(image).text((30, 90), text, fill=ink, font=ImageFont.load_default(48))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_rendered_text_scores_one_and_other_text_low() -> None:
    pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
    reward = TextRendering(threads=1)
    images = torch.stack(
        [
            rendered("Hello World"),
            rendered("Hello World", ink="yellow", paper="darkblue"),
            rendered("Good Night"),
            rendered("Hello Wor"),
            torch.ones(3, 256, 512),
        ]
    )
    scores = reward.score(images, ['A banner that says "Hello World"'] * 5)
    assert scores[0] == scores[1] == 1
    assert scores[2] < 0.35 and scores[4] == 0
    assert scores[3] == pytest.approx(0.8, abs=0.11)  # two of ten letters are missing, one may be misread
    assert reward.read(images[:1]) == ["Hello World"]
    with pytest.raises(ValueError, match="quotes its text"):
        reward.score(images[:1], ["a banner"])
    reward.update(images, ['"Hello World"'] * 5)
    torch.testing.assert_close(reward.compute(), scores.mean())
