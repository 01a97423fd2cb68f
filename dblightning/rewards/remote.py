"""A reward that another process scores: the client of ``server.py``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import os
import random
import re
import ssl
import threading
import time
import warnings
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from dblightning.extras import check_extra
from dblightning.rewards.base import RewardMetric, RewardUnavailable
from dblightning.rewards.preprocess import map_images

#: answers of a server that is starting, busy or restarting; any other error is not helped by asking again
_WORTH_RETRYING = (408, 429, 502, 503, 504)
#: longest pause between two tries
MAX_BACKOFF_S = 30.0
#: longest answer read, in bytes; 64 more per image
MAX_ANSWER_BYTES = 100_000

_log = logging.getLogger(__name__)


class RemoteReward(RewardMetric):
    """The scores that an HTTP server gives for the images, sent as 8-bit PNG; protocol in ``server.py``.

    The request goes to ``url`` and nowhere else: redirects are not followed, and proxies are used on demand only.
    Certificates of https are verified.

    Args:
        url: the server's address, "http://host:port" or "https://host:port".
        timeout: seconds for one request, from the connection to the last byte of the answer.
        retries: further tries at most after a refused or broken connection, a time-out, or status 408, 429, 502, 503
            or 504; None: as many as ``patience`` allows.
        backoff: seconds before the first further try; doubles each time up to 30 s, each pause shortened at random by
            up to a half. A server's Retry-After is waited for.
        micro_batch_size: most images in one request.
        headers: sent with each request. "${NAME}" in a value is read from the environment when it is sent, so that
            a secret need not stand in a configuration file.
        reward_name: name in logs and score tables.
        patience: seconds after which a request that keeps failing is given up. In a run on several processes it has to
            be below the time-out of the ranks (600 s), which wait meanwhile.
        token_env: environment variable whose value is sent as "Authorization: Bearer …".
        uds: path of a Unix socket to connect to; ``url`` then gives the path only ("http://localhost").
        ca_file: PEM file of the certificates to trust instead of the system's.
        trust_env: use the proxies that the environment names (HTTPS_PROXY and the like).
        kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ImportError: the extra ``remote`` is not installed. ValueError: an argument outside its range.
    """

    #: where requests go, below ``url``
    route: ClassVar[str] = "/score"

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int | None = None,
        backoff: float = 0.5,
        micro_batch_size: int | None = 16,
        headers: dict[str, str] | None = None,
        reward_name: str = "RemoteReward",
        patience: float = 480.0,
        token_env: str | None = None,
        uds: str | Path | None = None,
        ca_file: str | Path | None = None,
        trust_env: bool = False,
        **kwargs: Any,
    ) -> None:
        check_extra(type(self).__name__, "httpx2", "remote")
        super().__init__(micro_batch_size, **kwargs)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must start with http:// or https:// and name a host, got {_without_password(url)!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url must not hold a user or password, it appears in logs; use token_env or headers")
        if not timeout > 0 or not patience > 0 or backoff < 0 or (retries is not None and retries < 0):
            raise ValueError(
                "need timeout > 0, retries >= 0 or None, backoff >= 0, patience > 0; "
                f"got {timeout}, {retries}, {backoff}, {patience}"
            )
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.patience = patience
        self.headers = dict(headers or {})
        self.token_env = token_env
        self.uds = None if uds is None else str(Path(uds).expanduser())
        self.ca_file = None if ca_file is None else str(Path(ca_file).expanduser())
        self.trust_env = trust_env
        self.reward_name = reward_name
        secret = token_env is not None or any(name.lower() == "authorization" for name in self.headers)
        if secret and uds is None and parts.scheme == "http" and not _is_loopback(parts.hostname):
            warnings.warn(f"{self.url}: the token and the images travel unencrypted; use https", stacklevel=2)

    @property
    def name(self) -> str:
        return self.reward_name

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """As ``score``.

        Raises:
            RewardUnavailable: no answer after all tries. RuntimeError: the server's function failed (the text names the
            entry in its log), the request was refused, or the answer makes no sense.
        """
        pictures = map_images(_encode_png, images)
        body = json.dumps({"images": pictures, "prompts": prompts}).encode()
        answer = self._post(body, MAX_ANSWER_BYTES + 64 * len(prompts))
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(prompts) or not all(map(_fits_float32, scores)):
            raise RuntimeError(
                f"{self.url}{self.route} must answer {{'scores': [{len(prompts)} finite float32 numbers]}}, got "
                f"{str(answer)[:200]}"
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: bytes, longest: int) -> Any:
        """The JSON answered to ``body``, with all the patience there is."""
        begin = time.monotonic()
        address = self.url + self.route
        tries = 0
        while True:
            tries += 1
            self._before_try()
            left = self.patience - (time.monotonic() - begin)
            seconds = min(self.timeout, left)
            wait_for: float = 0.0
            try:
                status, retry_after, content = _run_within(seconds, self._request(body, seconds, longest))
                if status == 200:
                    return _parse(content, address)
                failure = f"status {status}: {_error_text(content)}"
                if 300 <= status < 400:
                    raise RuntimeError(
                        f"{self.url}{self.route} redirects elsewhere (status {status}); give that url instead"
                    )
                if status not in _WORTH_RETRYING:
                    raise RuntimeError(f"{address} answered {failure}")
                wait_for = retry_after
            except (OSError, _http().TransportError) as error:  # refused, reset, timed out, cut off
                if _is_bad_certificate(error):
                    raise RuntimeError(f"{self.url}: its certificate is not trusted ({error}); see ca_file") from error
                failure = f"{type(error).__name__}: {error}".rstrip(": ")
            # at random: ranks that failed together would come back together
            pause = min(MAX_BACKOFF_S, self.backoff * 2 ** min(tries - 1, 30)) * random.uniform(0.5, 1.0)
            pause = max(pause, min(wait_for, MAX_BACKOFF_S))
            left = self.patience - (time.monotonic() - begin)
            if pause >= left or (self.retries is not None and tries > self.retries):
                raise RewardUnavailable(
                    f"no answer from {address} after {tries} tries of at most {self.timeout:g} s each "
                    f"({failure}), {time.monotonic() - begin:.0f} s in all; is the server running?"
                )
            if tries == 1:
                _log.warning("no answer from %s (%s); asking again for %.0f s", address, failure, left)
            time.sleep(pause)

    def _before_try(self) -> None:
        """Called before each request; a subclass may refuse it."""

    async def _request(self, body: bytes, seconds: float, longest: int) -> tuple[int, float, bytes]:
        """Status, Retry-After in seconds and content of one answer, read to its end within ``seconds``."""
        http = _http()
        verify = True if self.ca_file is None else ssl.create_default_context(cafile=self.ca_file)
        transport = None if self.uds is None else http.AsyncHTTPTransport(uds=self.uds, verify=verify, trust_env=False)
        async with (
            # a time-out of each read would allow one byte a second for ever
            asyncio.timeout(seconds),
            http.AsyncClient(
                transport=transport, verify=verify, trust_env=self.trust_env, follow_redirects=False, timeout=None
            ) as client,
            client.stream("POST", f"{self.url}{self.route}", content=body, headers=self._request_headers()) as response,
        ):
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > longest:
                    raise RuntimeError(
                        f"{self.url}{self.route} answered more than {longest} bytes; is it a reward server?"
                    )
            return response.status_code, _seconds(response.headers.get("Retry-After", "")), bytes(content)

    def _request_headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {_from_environment(self.token_env)}"
        for name, value in self.headers.items():
            headers[name] = re.sub(r"\$\{(\w+)\}", lambda match: _from_environment(match[1]), value)
        return headers


def _http() -> Any:
    """The HTTP library, imported by the first request: it takes longer than a reward without a server would like."""
    import httpx2

    return httpx2


def _run_within(seconds: float, request: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result, from a thread of its own.

    A notebook's thread runs an event loop already, and looking up a host's name cannot be interrupted, only be left
    behind.

    Raises:
        TimeoutError: not done after ``seconds``.
    """
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(request))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="reward request", daemon=True).start()
    return future.result(seconds + 1)  # a moment later than the time-out inside, which closes the connection


def _from_environment(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise RuntimeError(f"the environment variable {name}, which a remote reward sends, is not set")
    return value


def _fits_float32(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max
    except OverflowError:  # an integer beyond every float
        return False


def _encode_png(array: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _parse(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RuntimeError(f"{url} answered no JSON: {content[:200]!r}") from None


def _error_text(content: bytes) -> str:
    try:
        text = str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content.decode(errors="replace")
    return "".join(character if character.isprintable() else " " for character in text[:500])


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _is_bad_certificate(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//…@", url)
