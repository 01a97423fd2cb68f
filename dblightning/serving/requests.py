"""A request to ``POST /v1/images/generations`` as jobs, or as one sentence that says what is wrong with it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dblightning.blending import METHODS
from dblightning.preset import Preset
from dblightning.shared_pipeline import Job, blend_of

#: OpenAI's fields that have no meaning here and do no harm
IGNORED = ("background", "model", "moderation", "output_compression", "quality", "style", "user")
#: fields of a preference; all but ``seed`` may also come from a preset
PREFERENCE = ("weights", "kl_scale", "method", "num_inference_steps", "guidance_scale", "eta", "seed")
KNOWN = ("prompt", "n", "size", "response_format", "output_format", "stream", "negative_prompt", "preset", *PREFERENCE)


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        sentence: for the client.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclass(frozen=True)
class Limits:
    """Limits of what one request may cost.

    Attributes:
        max_images: largest ``n``.
        max_size: longest side, in pixels.
        max_steps: most denoising steps.
        max_kl_scale: largest λ.
        max_prompt_characters: longest prompt.
        max_body_bytes: longest request body.
    """

    max_images: int = 10
    max_size: int = 1024
    max_steps: int = 100
    max_kl_scale: float = 100.0
    max_prompt_characters: int = 4000
    max_body_bytes: int = 65536


@dataclass(frozen=True)
class ImageRequest:
    """A request that can be served.

    Attributes:
        jobs: one per image.
        as_png: whether the answer is the PNG itself.
    """

    jobs: list[Job]
    as_png: bool = False


@dataclass(frozen=True)
class Offer:
    """What a service has.

    Attributes:
        adapters: names, in gate order.
        presets: name → preset; the first is the default of requests that name none.
        limits: of a request.
    """

    adapters: Sequence[str]
    presets: Mapping[str, Preset]
    limits: Limits = Limits()

    @property
    def default(self) -> Preset:
        """The preset of requests that name none."""
        return next(iter(self.presets.values()))


def read_request(body: bytes, offer: Offer, accept: str = "") -> ImageRequest:
    """The images that a body requests.

    Args:
        body: JSON, OpenAI's fields and those of ``PREFERENCE``, ``negative_prompt`` and ``preset``.
        offer: what the service has.
        accept: the Accept header; "image/png" requests the PNG itself.

    Raises:
        Refusal: status 400, or 413 for a body that is too long.
    """
    if len(body) > offer.limits.max_body_bytes:
        raise Refusal(413, f"the request is longer than {offer.limits.max_body_bytes} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON; send a JSON object with at least a prompt") from error
    if not isinstance(content, dict):
        raise Refusal(400, "the body must be a JSON object with at least a prompt")
    given = {name: value for name, value in content.items() if value is not None}
    for name in given:
        if name not in (*KNOWN, *IGNORED):
            raise Refusal(400, f"unknown field {name[:60]!r}; the fields are {', '.join(KNOWN)}")
    try:
        return _image_request(given, offer, accept)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refusal(400, str(error).replace(" or pass normalize=True", "")) from error  # a pipeline's argument


def _image_request(given: dict[str, Any], offer: Offer, accept: str) -> ImageRequest:
    limits = offer.limits
    prompt = _text(given, "prompt", limits)
    if not prompt.strip():
        raise ValueError("prompt is empty; describe the picture")
    count = given.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= limits.max_images:
        raise ValueError(f"n must be a whole number from 1 to {limits.max_images}, got {_shown(count)}")
    if given.get("stream") not in (None, False):
        raise ValueError("stream is not supported; leave it out")
    if given.get("output_format", "png") != "png":
        raise ValueError(f"output_format must be png, got {_shown(given['output_format'])}")
    form = given.get("response_format", "png" if "image/png" in accept else "b64_json")
    if form not in ("b64_json", "png"):
        raise ValueError(f"response_format must be b64_json or png, got {_shown(form)}")
    if form == "png" and count > 1:
        raise ValueError(f"response_format png is for one image, got n {count}; use b64_json")
    height, width = _size(given.get("size", "auto"), limits)
    preset = _preset(given, offer)
    blend_of(preset, offer.adapters)
    first = preset.seed if preset.seed is not None else secrets.randbelow(2**31)
    negative = _text(given, "negative_prompt", limits)
    # an image's seed is its request's plus its place, modulo what a generator takes
    seeds = [(first + i) % 2**63 for i in range(count)]
    jobs = [Job(prompt, preset.replaced(seed=seed), height, width, negative) for seed in seeds]
    return ImageRequest(jobs, form == "png")


def _preset(given: Mapping[str, Any], offer: Offer) -> Preset:
    """The preset that a request names, with the fields that it states itself."""
    name = given.get("preset")
    if name is not None and (not isinstance(name, str) or name not in offer.presets):
        raise ValueError(f"preset must be one of {', '.join(offer.presets)}, got {_shown(name)}")
    preset = offer.default if name is None else offer.presets[name]
    own = {field: given[field] for field in PREFERENCE if field in given}
    method = own.get("method", preset.method)
    if method == "base" and "method" not in own and "weights" in own:
        method = own["method"] = "db-mpa"  # the preset's default, not the client's wish
    # a preset may name a class of the operator's by its path; a client's path would be imported
    if "method" in own and (not isinstance(method, str) or method not in METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {_shown(method)}")
    if "method" in own and method != preset.method:
        own["method_options"] = None
    if method == "base":
        own = {"weights": None, "kl_scale": 1.0} | own
    # the weights may name what the preset leaves out
    made = preset.replaced(adapters=None, **own)
    if made.num_inference_steps > offer.limits.max_steps:
        raise ValueError(f"num_inference_steps must be at most {offer.limits.max_steps}")
    if made.kl_scale > offer.limits.max_kl_scale:
        raise ValueError(f"kl_scale must be at most {offer.limits.max_kl_scale:g}, got {made.kl_scale:g}")
    return made


def _text(given: Mapping[str, Any], name: str, limits: Limits) -> str:
    text = given.get(name, "")
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text, got {_shown(text)}")
    if len(text) > limits.max_prompt_characters:
        raise ValueError(f"{name} must have at most {limits.max_prompt_characters} characters, got {len(text)}")
    return text


def _size(size: Any, limits: Limits) -> tuple[int | None, int | None]:
    """Height and width in pixels; None, the model's own, for "auto"."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", size) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f"size must be auto or WIDTHxHEIGHT such as 512x512, got {_shown(size)}")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > limits.max_size:
        raise ValueError(f"size must be at most {limits.max_size} pixels a side, got {size}")
    return height, width


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
