"""A vision-language model as a reward: image and rubric to any OpenAI-style chat endpoint, its answer to a score."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dblightning.rewards.base import RewardUnavailable
from dblightning.rewards.preprocess import to_uint8
from dblightning.rewards.remote import RemoteReward, _encode_png
from dblightning.whole_files import replacing

Read = Literal["number", "tokens"]
#: where the caption stands in a rubric
CAPTION = "{prompt}"
#: longest answer read, in bytes: 1,000 tokens with twenty alternatives each
MAX_ANSWER_BYTES = 8_000_000
#: alternatives of a token that OpenAI's protocol gives at most
TOP_LOGPROBS = 20
#: what ``network`` may hold
NETWORK = frozenset(
    {"timeout", "retries", "backoff", "patience", "token_env", "headers", "uds", "ca_file", "trust_env"}
)
#: one budget is counted by several threads
_COUNTING = threading.Lock()
#: of each thread: ``stop``, an event that ends its tries
_THREAD = threading.local()


class ChatJudge(RemoteReward):
    """The score that a vision-language model gives an image, asked over OpenAI's chat protocol.

    Works with vLLM, SGLang, llama.cpp, Ollama and hosted endpoints: ``POST <url>/chat/completions``. Answers are read
    in one of two ways:

    * "tokens": the expected score Σ p(l) s(l) / Σ p(l) over the ``levels``, from the probabilities of the alternatives
      at the first token that is a level (after ``after``, where that is given). Finer than any single answer, and what
      VQAScore and Q-Align do with "Yes" and with "excellent … bad".
    * "number": the number that ``pattern`` finds in the text.

    Scores are mapped from ``scale`` to [0, 1].

    Args:
        url: the endpoint up to and with its version, such as "http://127.0.0.1:8000/v1".
        model: the model's name there.
        rubric: the question; "{prompt}" in it becomes the image's prompt.
        read: "tokens" or "number".
        scale: the lowest and the highest score the rubric allows, mapped to 0 and 1.
        levels: token → score, of "tokens"; None: the whole numbers of ``scale``. Compared without spaces around and
            without regard to case.
        after: text after which the score is looked for, the last time it occurs; None: anywhere.
        pattern: regular expression of "number"; its first group is the number.
        unreadable: score in [0, 1] of an answer that holds no score; None refuses it as an error.
        least_mass: probability that the levels must have together where "tokens" reads them; below, the answer is
            unreadable.
        image_size: longest side in pixels that is sent; None sends images as they are.
        max_tokens, temperature: of the answer.
        system: system message.
        extra_body: further fields of the request, such as {"chat_template_kwargs": {"enable_thinking": False}}.
        cache: folder of answers by image, prompt and question, shared by runs and ranks; None asks again each time.
        concurrency: requests under way at a time.
        max_requests: requests that this object may send, tries included; None: no limit. Then
            :class:`RewardUnavailable`, at which a training run saves itself and stops.
        reward_name: name in logs and score tables.
        network: settings of the connection, as of :class:`RemoteReward`: ``timeout``, ``retries``, ``backoff``,
            ``patience``, ``token_env``, ``headers``, ``uds``, ``ca_file``, ``trust_env``.
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ValueError: an argument outside its range.
    """

    value_range = (0.0, 1.0)
    route = "/chat/completions"

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        read: Read = "number",
        scale: tuple[float, float] = (1.0, 5.0),
        levels: dict[str, float] | None = None,
        after: str | None = None,
        pattern: str = r"(-?\d+(?:\.\d+)?)",
        unreadable: float | None = None,
        least_mass: float = 0.5,
        image_size: int | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        system: str | None = None,
        extra_body: dict[str, Any] | None = None,
        cache: str | Path | None = None,
        concurrency: int = 8,
        max_requests: int | None = None,
        reward_name: str = "judge",
        network: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(set(network or {}) - NETWORK):
            raise ValueError(f"network has no setting {unknown[0]!r}; it takes {', '.join(sorted(NETWORK))}")
        super().__init__(url, micro_batch_size=None, reward_name=reward_name, **(network or {}), **kwargs)
        low, high = scale
        if read not in ("number", "tokens"):
            raise ValueError(f"read must be 'number' or 'tokens', got {read!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"scale must be two numbers, the lower one first, got {scale}")
        if unreadable is not None and not 0 <= unreadable <= 1:
            raise ValueError(f"unreadable must lie in [0, 1] or be None, got {unreadable}")
        if not 0 <= least_mass <= 1:
            raise ValueError(f"least_mass must lie in [0, 1], got {least_mass}")
        for name, value in (("concurrency", concurrency), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, limit in (("image_size", image_size), ("max_requests", max_requests)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {limit}")
        if re.compile(pattern).groups < 1:
            raise ValueError(f"pattern needs a group around the number, got {pattern!r}")
        # the question
        self.model = model
        self.rubric = rubric
        self.needs_prompt = CAPTION in rubric
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.system = system
        self.extra_body = dict(extra_body or {})
        # how an answer is read
        self.scale = (float(low), float(high))
        self.read = read
        self.levels = _levels(levels, self.scale) if levels is not None or read == "tokens" else None
        self.after = after
        self.pattern = pattern
        self.unreadable = unreadable
        self.least_mass = least_mass
        # how it is asked
        self.cache = None if cache is None else str(Path(cache).expanduser())
        self.concurrency = concurrency
        self.max_requests = max_requests
        self._requests = 0

    @property
    def requests(self) -> int:
        """Requests sent so far, tries included; answers of the cache cost none."""
        return self._requests

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """As ``score``.

        Raises:
            RewardUnavailable: no answer after all tries, or the budget is spent. RuntimeError: the request was refused,
                or an answer holds no score.
        """
        arrays = to_uint8(images)
        first: dict[str, int] = {}  # equal images of equal prompts are asked about once
        keys = [self._key(array, prompt) for array, prompt in zip(arrays, prompts, strict=True)]
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        stop = threading.Event()
        pool = ThreadPoolExecutor(
            min(self.concurrency, len(first)), "judge", initializer=setattr, initargs=(_THREAD, "stop", stop)
        )
        try:
            asked = {key: pool.submit(self._answer, key, arrays[index], prompts[index]) for key, index in first.items()}
            done, _ = wait(asked.values(), return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()  # raises what went wrong
            values = {key: each.result() for key, each in asked.items()}
        finally:
            stop.set()  # where one has failed, the others do not go on trying
            pool.shutdown(wait=False, cancel_futures=True)
        return torch.tensor([values[key] for key in keys], dtype=torch.float32, device=images.device)

    def _answer(self, key: str, array: np.ndarray, prompt: str) -> float:
        """The score of one image, in [0, 1]."""
        file = None if self.cache is None else Path(self.cache) / key[:2] / f"{key}.json"
        answer = _cached(file)
        if answer is None:
            answer = self._checked(self._post(json.dumps(self._body(array, prompt)).encode(), MAX_ANSWER_BYTES))
            if file is not None:
                _keep(file, answer)
        value = self._value(answer)
        if value is None:
            if self.unreadable is not None:
                return self.unreadable
            raise RuntimeError(
                f"{self.url}: no score can be read from the answer {str(answer['text'])[:200]!r}; fix rubric, pattern "
                "or levels, or set unreadable to the score that such answers get"
            )
        low, high = self.scale
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def _before_try(self) -> None:
        if _THREAD.stop.is_set():
            raise CancelledError
        with _COUNTING:
            if self.max_requests is not None and self._requests >= self.max_requests:
                raise RewardUnavailable(
                    f"{self.url}: the budget of max_requests={self.max_requests} is spent; raise it to go on"
                )
            self._requests += 1

    # ── the request ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _question(self) -> dict[str, Any]:
        """All that an answer depends on beside image and prompt."""
        names = ("model", "rubric", "read", "image_size", "max_tokens", "temperature", "system", "extra_body")
        return {name: getattr(self, name) for name in names}

    def _key(self, array: np.ndarray, prompt: str) -> str:
        """SHA-256 of image, prompt and question."""
        digest = hashlib.sha256(json.dumps([self._question(), array.shape, prompt], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _body(self, array: np.ndarray, prompt: str) -> dict[str, Any]:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self._png(array)}"}}
        text = {"type": "text", "text": self.rubric.replace(CAPTION, prompt)}
        messages: list[dict[str, Any]] = [{"role": "user", "content": [picture, text]}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.read == "tokens":
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body | self.extra_body

    def _png(self, array: np.ndarray) -> str:
        longest = max(array.shape[:2])
        if self.image_size is None or longest == self.image_size:
            return _encode_png(array)
        height, width = (max(1, round(side * self.image_size / longest)) for side in array.shape[:2])
        return _encode_png(np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)))

    def _checked(self, answer: Any) -> dict[str, Any]:
        """Text and, where they are read, tokens of an answer.

        Raises:
            RuntimeError: an answer of another shape, or one without the probabilities.
        """
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            tokens = None
            if self.read == "tokens":
                tokens = [
                    {"token": each["token"], "top": [[top["token"], top["logprob"]] for top in each["top_logprobs"]]}
                    for each in choice["logprobs"]["content"]
                ]
        except (KeyError, IndexError, TypeError) as error:
            hint = "; read='number' needs no probabilities" if self.read == "tokens" else ""
            raise RuntimeError(
                f"{self.url} must answer as OpenAI's chat endpoint does, but {error!r} is missing in "
                f"{str(answer)[:200]}{hint}"
            ) from error
        return {"text": text} if tokens is None else {"text": text, "tokens": tokens}

    # ── the answer ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _value(self, answer: Mapping[str, Any]) -> float | None:
        """The score of an answer in ``scale``'s units; None where it has none."""
        if self.levels is not None and self.read == "tokens":
            return expected_level(answer.get("tokens") or [], self.levels, self.after, self.least_mass)
        return number_in(str(answer["text"]), self.pattern, self.after)


def number_in(text: str, pattern: str, after: str | None = None) -> float | None:
    r"""The number that a pattern finds in a text.

    >>> number_in("Alignment is 4. Final Score: 3.5", r"(\d+(?:\.\d+)?)", after="Final Score:")
    3.5

    Args:
        text: the answer.
        pattern: regular expression whose first group is the number.
        after: look only behind the last place where this occurs.
    """
    if after is not None:
        _, found, text = text.rpartition(after)
        if not found:
            return None
    match = re.search(pattern, text)
    try:
        value = float(match[1]) if match else math.nan
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def expected_level(
    tokens: list[dict[str, Any]], levels: Mapping[str, float], after: str | None = None, least_mass: float = 0.0
) -> float | None:
    """Σ p(l) s(l) / Σ p(l) at the first token that is a level.

    Args:
        tokens: the answer's, each {"token": text, "top": [[alternative, log probability], …]}.
        levels: token (:func:`_token`) → score.
        after: look only behind the last place where this occurs in the answer.
        least_mass: None is returned where the levels have less probability than this together.
    """
    start = 0
    if after is not None:
        text = "".join(each["token"] for each in tokens)
        place = text.rfind(after)
        if place < 0:
            return None
        end, length = place + len(after), 0
        for each in tokens:
            if length >= end:
                break
            length += len(each["token"])
            start += 1
    for each in tokens[start:]:
        if _token(each["token"]) not in levels:
            continue
        mass: dict[str, float] = {}
        for name, logprob in each["top"]:  # " 4" and "4" are two tokens and one level
            if _token(name) in levels:
                mass[_token(name)] = mass.get(_token(name), 0.0) + math.exp(min(float(logprob), 0.0))
        total = sum(mass.values())
        if total <= 0 or total < least_mass:
            return None
        return sum(share * levels[name] for name, share in mass.items()) / total
    return None


def _levels(given: Mapping[str, float] | None, scale: tuple[float, float]) -> dict[str, float]:
    """Token → score; the whole numbers of ``scale`` where none are given."""
    if given is None:
        given = {str(level): float(level) for level in range(math.ceil(scale[0]), math.floor(scale[1]) + 1)}
    levels = {_token(name): float(score) for name, score in given.items()}
    if len(levels) < max(2, len(given)):
        raise ValueError(f"levels need two different tokens at least, got {given}")
    return levels


def _token(text: str) -> str:
    return text.strip().strip("Ġ▁").casefold()


def _cached(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        answer = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and "text" in answer else None


def _keep(file: Path, answer: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        aside.write_text(json.dumps(answer), encoding="utf-8")
