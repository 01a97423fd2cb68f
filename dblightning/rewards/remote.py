"""A reward that another process scores: the client of ``server.py``."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dblightning.rewards.base import RewardMetric
from dblightning.rewards.preprocess import map_images

#: answers of a server that is starting, busy or restarting; any other error is not helped by asking again
_WORTH_RETRYING = (429, 502, 503, 504)


class RemoteReward(RewardMetric):
    """The scores that an HTTP server gives for the images, sent as 8-bit PNG; protocol in ``server.py``.

    Args:
        url: the server's address, "http://host:port".
        timeout: seconds to wait for one answer.
        retries: further tries after a refused or broken connection, a time-out, or status 429, 502, 503 or 504.
        backoff: seconds before the first further try; doubles each time.
        micro_batch_size: most images in one request.
        headers: sent with each request, for example {"Authorization": "Bearer …"}.
        reward_name: name in logs and score tables.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        micro_batch_size: int | None = 16,
        headers: dict[str, str] | None = None,
        reward_name: str = "RemoteReward",
    ) -> None:
        super().__init__(micro_batch_size)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {url!r}")
        if not timeout > 0 or retries < 0 or backoff < 0:
            raise ValueError(f"need timeout > 0, retries >= 0, backoff >= 0; got {timeout}, {retries}, {backoff}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.headers = dict(headers or {})
        self.reward_name = reward_name

    @property
    def name(self) -> str:
        return self.reward_name

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """As ``score``.

        Raises:
            ConnectionError: no answer after all tries. RuntimeError: the server's function failed (its traceback is in
            the text), or its answer makes no sense.
        """
        pictures = map_images(_encode_png, images)
        answer = self._post({"images": pictures, "prompts": prompts})
        scores = answer.get("scores") if isinstance(answer, dict) else None
        numbers = isinstance(scores, list) and all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in scores
        )
        if not numbers or len(scores or []) != len(prompts):
            raise RuntimeError(
                f"{self.url}/score must answer {{'scores': [{len(prompts)} finite numbers]}}, got {str(answer)[:200]}"
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/score",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json", **self.headers},
        )
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    body = response.read()
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_error_text(error.read())}"
                if error.code not in _WORTH_RETRYING:
                    raise RuntimeError(f"{self.url}/score answered {failure}") from None
                continue
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                failure = f"{type(error).__name__}: {error}"
                continue
            try:
                return json.loads(body)
            except ValueError:
                raise RuntimeError(f"{self.url}/score answered no JSON: {body[:200]!r}") from None
        raise ConnectionError(
            f"no answer from {self.url}/score after {self.retries + 1} tries of at most {self.timeout:g} s each "
            f"({failure}); is the server running?"
        )


def _encode_png(array: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _error_text(body: bytes) -> str:
    try:
        content = json.loads(body)
        return f"{content['error']}\n{content.get('traceback', '')}".strip()
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
