"""A request's body as jobs, or one sentence: without a server, and without the extra."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dblightning.preset import Preset, even_preset
from dblightning.serving.requests import ImageRequest, Limits, Offer, Refusal, read_request

OFFER = Offer(
    ["aesthetic", "alignment"],
    {
        "even": even_preset(),
        "warm": Preset(weights={"aesthetic": 1.0}, kl_scale=1.5, num_inference_steps=7, seed=4),
        "plain": Preset(method="base"),
    },
    Limits(max_images=4, max_size=64, max_steps=30, max_prompt_characters=100, max_body_bytes=2000),
)


def read(accept: str = "", **fields: Any) -> ImageRequest:
    return read_request(json.dumps({"prompt": "A red circle."} | fields).encode(), OFFER, accept)


def test_what_a_request_leaves_out_is_the_first_presets() -> None:
    (job,) = read(seed=3).jobs
    assert job.preset == even_preset().replaced(seed=3)
    assert (job.height, job.width, job.negative_prompt) == (None, None, "")


def test_a_request_names_a_preset_and_changes_what_it_states() -> None:
    (job,) = read(preset="warm", kl_scale=2).jobs
    assert job.preset == Preset(weights={"aesthetic": 1.0}, kl_scale=2, num_inference_steps=7, seed=4)
    (job,) = read(preset="plain", weights={"alignment": 1}, seed=1).jobs
    assert job.preset.method == "db-mpa"
    (job,) = read(preset="warm", method="base").jobs
    assert (job.preset.weights, job.preset.kl_scale) == (None, 1.0)


def test_the_images_of_a_request_have_seeds_in_order_and_drawn_ones_differ() -> None:
    assert [job.preset.seed for job in read(n=3, seed=10).jobs] == [10, 11, 12]
    drawn = {read().jobs[0].preset.seed for _ in range(5)}
    assert len(drawn) == 5 and None not in drawn


def test_a_size_is_width_times_height() -> None:
    job = read(size="64x32").jobs[0]
    assert (job.height, job.width) == (32, 64)


def test_openais_fields_without_meaning_here_are_ignored_and_png_may_be_accepted() -> None:
    assert not read(model="dall-e-3", quality="hd", style="vivid", user="me", response_format="b64_json").as_png
    assert read(response_format="png").as_png
    assert read(accept="image/png").as_png


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weights": {"aesthetic": 0.5}}, "sum to 1"),
        ({"weights": {"aesthetic": -1, "alignment": 2}}, ">= 0"),
        ({"weights": {"nobody": 1.0}}, "'nobody'"),
        ({"weights": {"aesthetic": float("nan")}}, "finite"),
        ({"weights": {"aesthetic": "1"}}, "names to numbers"),
        ({"weights": 3}, "weights must"),
        ({"weights": {}}, "empty"),
        ({"method": "magic"}, "method must be one of"),
        ({"method": "os.path.Join"}, "method must be one of"),
        ({"method": "code"}, "method must be one of"),
        ({"method": "base", "weights": {"aesthetic": 1}}, "has no weights"),
        ({"method": "single"}, "one adapter"),
        ({"kl_scale": -1}, "kl_scale"),
        ({"kl_scale": 1e9}, "at most 100"),
        ({"kl_scale": 10**400}, "too large"),
        ({"n": 0}, "n must be"),
        ({"n": 5}, "n must be"),
        ({"n": 10**30}, "n must be"),
        ({"n": True}, "n must be"),
        ({"size": "128x128"}, "at most 64"),
        ({"size": "999999999x1"}, "WIDTHxHEIGHT"),
        ({"size": "0x0"}, "WIDTHxHEIGHT"),
        ({"size": 64}, "WIDTHxHEIGHT"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": ["A red circle."]}, "must be a text"),
        ({"prompt": "a" * 101}, "at most 100 characters"),
        ({"num_inference_steps": 31}, "at most 30"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 1e6}, "guidance_scale"),
        ({"eta": 2}, "eta"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"preset": "cold"}, "preset must be one of"),
        ({"preset": ["warm"]}, "preset must be one of"),
        ({"weight": {"aesthetic": 1}}, "unknown field 'weight'"),
        ({"stream": True}, "stream"),
        ({"output_format": "webp"}, "png"),
        ({"response_format": "url"}, "b64_json or png"),
        ({"response_format": "png", "n": 2}, "one image"),
    ],
)
def test_what_cannot_be_is_400_and_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as refusal:
        read(**fields)
    assert refusal.value.status == 400
    assert "\n" not in refusal.value.sentence and len(refusal.value.sentence) < 400


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe", b"[" * 1900])
def test_what_is_no_json_object_is_400(body: bytes) -> None:
    with pytest.raises(Refusal, match="JSON") as refusal:
        read_request(body, OFFER)
    assert refusal.value.status == 400


def test_a_long_body_is_413() -> None:
    with pytest.raises(Refusal, match="longer than 2000 bytes") as refusal:
        read_request(b" " * 2001, OFFER)
    assert refusal.value.status == 413
