"""An HTTP server around any scoring function, for rewards that cannot share our environment or machine.

One file, nothing of dblightning: copy it into the other environment, ``pip install starlette uvicorn pillow``, and run

    python server.py my_module:score --port 8000

where ``score(images, prompts)`` takes a list of RGB PIL images and a list of strings and returns as many numbers.

    GET  /       → {"name": "my_module:score"}
    POST /score  {"images": [base64 PNG, …], "prompts": ["…", …]} → {"scores": [0.1, …]}

with ``Content-Type: application/json`` and, where the server has a token, ``Authorization: Bearer TOKEN``. An error is
JSON too: a status of 400 or more and {"error": "one sentence"}. When the function fails, its traceback stays in the
server's log, under the identifier that the answer names.

Requests are untrusted input: only PNG is decoded, after its header was checked, and every quantity a client chooses is
bounded by ``Limits``. Beyond this machine the server listens with a token only.
"""

# Longer than 400 lines: one file on purpose, copied as it is into the environment of a reward.

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import importlib
import io
import ipaddress
import json
import logging
import math
import os
import secrets
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    needs = (
        "the reward server needs starlette and uvicorn: pip install 'dblightning[reward-server]', or where this file "
        "stands alone, pip install starlette uvicorn pillow"
    )
    if __name__ == "__main__":
        sys.exit(f"error: {needs}")
    raise ImportError(needs) from error

ScoreFunction = Callable[[list[Image.Image], list[str]], Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: environment variable that holds the token unless ``--token-env`` names another
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
#: shortest token accepted; ``python -c "import secrets; print(secrets.token_urlsafe(32))"`` makes one of 43
MIN_TOKEN_LENGTH = 16
#: brackets, commas, colons and quotes in one request: each costs up to 64 bytes once it is a Python object
MAX_JSON_MARKS = 1_000_000
#: seconds for which the rest of a refused request is read, so that its client gets to read the answer
LINGER_S = 5.0

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_log = logging.getLogger("reward_server")


@dataclass(frozen=True)
class Limits:
    """Limits of what one client, and all of them, may cost. Peak memory of the defaults is below 1 GB beside the model.

    Attributes:
        max_megabytes: longest request body, in MB; all requests together may hold twice that.
        max_images: images in one request.
        max_image_pixels: width · height of one image.
        max_request_pixels: pixels of all images of a request; one pixel takes 4 bytes.
        max_prompt_characters: longest prompt.
        max_waiting: requests that wait for the function or run in it; further ones are answered 503.
        max_connections: open connections; above it, the one that has been sending its request for longest is closed.
        read_timeout_s: seconds from a connection's or a request's first byte to the request's last.
        score_timeout_s: seconds a request may wait for its scores before it is answered 504.
    """

    max_megabytes: float = 100.0
    max_images: int = 256
    max_image_pixels: int = 4096 * 4096
    max_request_pixels: int = 64 * 1024 * 1024
    max_prompt_characters: int = 10_000
    max_waiting: int = 16
    max_connections: int = 512
    read_timeout_s: float = 60.0
    score_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")


class RewardServer:
    """A server bound to its address, as ``make_server`` returns it.

    ``serve_forever`` runs it until ``shutdown`` is called from another thread; then ``server_close`` frees the address.
    """

    def __init__(self, server: uvicorn.Server, listener: socket.socket, pool: ThreadPoolExecutor, address: str) -> None:
        self._server = server
        self._listener = listener
        self._pool = pool
        self._stopped = threading.Event()
        self._socket_file = listener.getsockname() if listener.family == getattr(socket, "AF_UNIX", None) else None
        self.server_address = listener.getsockname()
        self.address = address

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Answer requests until ``shutdown``. ``poll_interval`` is ignored; it is there as in ``http.server``."""
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """Stop ``serve_forever`` after the requests that are being scored, but within about five seconds."""
        self._server.should_exit = True
        self._stopped.wait(10)

    def server_close(self) -> None:
        """Free the address, the scoring threads and the Unix socket; requests that wait are dropped."""
        self._listener.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._socket_file is not None:
            Path(self._socket_file).unlink(missing_ok=True)


def make_server(
    score: ScoreFunction,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "reward",
    max_megabytes: float | None = None,
    *,
    token: str | None = None,
    allow_no_token: bool = False,
    uds: str | Path | None = None,
    certfile: str | Path | None = None,
    keyfile: str | Path | None = None,
    allowed_hosts: Sequence[str] = (),
    limits: Limits | None = None,
) -> RewardServer:
    """A server to be run with ``serve_forever``; port 0 takes a free one, see ``server_address``.

    Args:
        score: called from one thread, one request at a time.
        host, port: where to listen.
        name: answered to GET /.
        max_megabytes: longest request; overrides the one of ``limits``.
        token: what clients must send; required where ``host`` is not this machine alone.
        allow_no_token: listen beyond this machine without one.
        uds: path of a Unix socket to listen on instead, readable and writable by this user only.
        certfile, keyfile: PEM files; with them the server speaks HTTPS only.
        allowed_hosts: names by which clients may address the server, beside IP addresses, ``host``, "localhost" and
            this machine's own name. Others are refused: a web page could have pointed its name at this machine.
        limits: bounds of requests.

    Raises:
        ValueError: no token where one is needed, one that is too short, or a key without its certificate.
        OSError: the address is taken, or a file is missing.
    """
    limits = limits or Limits()
    if max_megabytes is not None:
        limits = replace(limits, max_megabytes=max_megabytes)
    _check_token(token, needed=uds is None and not _is_loopback(host) and not allow_no_token, host=host)
    if (keyfile is None) != (certfile is None):
        raise ValueError("certfile and keyfile go together, got one of them")
    names = None if uds else {host, "localhost", socket.gethostname(), *allowed_hosts}
    pool = ThreadPoolExecutor(1, thread_name_prefix="score")
    scoring = _Scoring(score, name, limits, pool)
    app = Starlette(
        routes=[Route("/", scoring.describe), Route("/score", scoring.score, methods=["POST"])],
        middleware=[Middleware(_Guard, token=token, hosts=None if names is None else frozenset(map(_plain, names)))],
        exception_handlers={HTTPException: _explain},
    )
    app.router.redirect_slashes = False
    config = uvicorn.Config(
        app,
        http=_connection_class(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16_384,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
    )
    config.load()  # here, so that a bad certificate is an error of this call
    listener = _unix_listener(Path(uds)) if uds else _tcp_listener(host, port)
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if certfile is None else "https"
    address = f"unix:{uds}" if uds else f"{scheme}://{shown}:{listener.getsockname()[1]}"
    return RewardServer(uvicorn.Server(config), listener, pool, address)


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_request(body: bytes | bytearray, limits: Limits | None = None) -> tuple[list[Image.Image], list[str]]:
    """Images (RGB) and prompts of a request.

    Raises:
        ValueError: not the JSON described above, another number of prompts than images, an image that is not an 8-bit
            PNG, or more than ``limits`` allow.
    """
    return _read_content(_parse(body), limits or Limits())


def _read_content(content: Any, limits: Limits) -> tuple[list[Image.Image], list[str]]:
    if not isinstance(content, dict) or not {"images", "prompts"} <= set(content):
        raise ValueError('expected JSON {"images": […], "prompts": […]}')
    encoded, prompts = content["images"], content["prompts"]
    if not isinstance(encoded, list) or not isinstance(prompts, list) or len(encoded) != len(prompts):
        raise ValueError("images and prompts must be lists of the same length")
    if len(encoded) > limits.max_images:
        raise ValueError(f"at most {limits.max_images} images per request, got {len(encoded)}; send several requests")
    texts = [_prompt(index, prompt, limits.max_prompt_characters) for index, prompt in enumerate(prompts)]
    total = 0
    for index, text in enumerate(encoded):
        width, height = _png_size(index, text)
        if width * height > limits.max_image_pixels:
            raise ValueError(
                f"images[{index}] has {width} × {height} pixels; at most {limits.max_image_pixels} are taken"
            )
        total += width * height
    if total > limits.max_request_pixels:
        raise ValueError(
            f"the images have {total} pixels together; at most {limits.max_request_pixels} are taken in one request"
        )
    images = []
    for index, text in enumerate(encoded):
        images.append(_decode(index, text))
        encoded[index] = None  # its memory is needed
    return images, texts


def _parse(body: bytes | bytearray) -> Any:
    marks = sum(body.count(mark) for mark in b'[{,:"')
    if marks > MAX_JSON_MARKS:
        raise ValueError(f"expected JSON of at most {MAX_JSON_MARKS} brackets, commas, colons and quotes, got {marks}")
    try:
        # a byte beyond ASCII would make each character of the whole text 4 bytes wide if it was decoded here
        return json.loads(body.decode("ascii", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'expected JSON {{"images": […], "prompts": […]}}: {error}') from error


def _prompt(index: int, prompt: Any, longest: int) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"prompts must be strings, got {type(prompt).__name__} at index {index}")
    if len(prompt) > longest:
        raise ValueError(f"prompts[{index}] has {len(prompt)} characters; at most {longest} are taken")
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"prompts[{index}] is not valid UTF-8") from None


def _png_size(index: int, text: Any) -> tuple[int, int]:
    """Width and height from the header of a base64 PNG, without decoding the image."""
    try:
        head = base64.b64decode(text[:44], validate=True) if isinstance(text, str) else b""
    except ValueError:
        head = b""
    if len(head) < 33 or head[:8] != _PNG_SIGNATURE or head[8:16] != b"\0\0\0\rIHDR":
        raise ValueError(f"images[{index}] is not a base64 PNG")
    width, height, depth = struct.unpack(">IIB", head[16:25])
    if width == 0 or height == 0:
        raise ValueError(f"images[{index}] is not a base64 PNG: it has {width} × {height} pixels")
    if depth > 8:
        raise ValueError(f"images[{index}] has {depth} bits per channel; send 8")
    return width, height


def _decode(index: int, text: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        # a second header would replace the one that was checked
        if image.size != struct.unpack(">II", data[16:24]):
            raise ValueError("it has two headers")
        return image.convert("RGB")
    except Exception as error:  # whatever a decoder raises on bytes made to confuse it
        raise ValueError(f"images[{index}] is not a base64 PNG: {error}") from error


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Refusal(JSONResponse):
    """An error, in answer to a request that may still be arriving.

    Its rest is read and dropped for a while: were the connection closed at once, the client's system could discard the
    answer.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__({"error": sentence}, status, {"Connection": "close", **(headers or {})})

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Guard:
    """Refuses requests for a name that is not ours, or without the token, before their body is read."""

    def __init__(self, app: Any, token: str | None, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.token = None if token is None else token.encode()
        self.hosts = hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = Request(scope).headers
        app = self.app
        if self.hosts is not None and not _is_ours(headers.get("host", ""), self.hosts):
            app = _Refusal(421, "this server does not answer to the Host given; start it with --allowed-host NAME")
        elif self.token is not None and not _holds(headers.get("authorization", ""), self.token):
            app = _Refusal(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)


@dataclass
class _Body:
    data: bytearray = field(default_factory=bytearray)  # emptied once parsed
    size: int = 0  # bytes received


class _Scoring:
    """The two routes, and the queue before the scoring function."""

    def __init__(self, function: ScoreFunction, name: str, limits: Limits, pool: ThreadPoolExecutor) -> None:
        self.function = function
        self.name = name
        self.limits = limits
        self.pool = pool  # one thread: a model is rarely safe to call from several
        self.waiting = 0
        self.buffered = 0  # bytes of bodies held
        self.last_seconds = 0.0

    async def describe(self, request: Request) -> Response:
        return JSONResponse({"name": self.name})

    async def score(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return _Refusal(415, f"send Content-Type: application/json, got {kind[:100]!r}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            return _Refusal(415, "send the JSON uncompressed, without Content-Encoding")
        body = _Body()
        try:
            refusal = await self._read(request, body)
            return refusal or await self._run(request, body.data)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            self.buffered -= body.size

    async def _read(self, request: Request, body: _Body) -> Response | None:
        most = int(self.limits.max_megabytes * 1_000_000)
        too_long = _Refusal(413, f"a request may have at most {self.limits.max_megabytes:g} MB; send fewer images")
        if int(request.headers.get("content-length", 0)) > most:
            return too_long
        if self.waiting >= self.limits.max_waiting:
            return self._busy()
        async for chunk in request.stream():
            if body.size + len(chunk) > most:
                return too_long
            if self.buffered + len(chunk) > 2 * most:
                return self._busy()
            self.buffered += len(chunk)
            body.size += len(chunk)
            body.data += chunk
        return None

    def _busy(self) -> Response:
        seconds = min(60, max(1, math.ceil(self.waiting * self.last_seconds)))
        return _Refusal(503, "too many requests are waiting; try again later", {"Retry-After": str(seconds)})

    async def _run(self, request: Request, body: bytearray) -> Response:
        """Wait for the function's turn and its scores; given up when the client is gone or the time is over."""
        if self.waiting >= self.limits.max_waiting:
            headers = {"Retry-After": str(max(1, math.ceil(self.last_seconds)))}
            return JSONResponse({"error": "too many requests are waiting; try again later"}, 503, headers)
        job = self.pool.submit(self._answer, body)
        self.waiting += 1
        scored = asyncio.ensure_future(asyncio.wrap_future(job))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waiting_for: set[asyncio.Future[Any]] = {scored, gone}
            await asyncio.wait(waiting_for, timeout=self.limits.score_timeout_s, return_when="FIRST_COMPLETED")
            if scored.done():
                return scored.result()
            sentence = f"no scores within {self.limits.score_timeout_s:g} s"
            return JSONResponse({"error": sentence}, 504)
        finally:
            self.waiting -= 1
            job.cancel()
            gone.cancel()

    def _answer(self, body: bytearray) -> Response:
        """Parse, decode and score, in the pool's thread."""
        begin = time.monotonic()
        try:
            content = _parse(body)
            body.clear()  # its memory is needed
            images, prompts = _read_content(content, self.limits)
        except ValueError as error:
            return JSONResponse({"error": str(error)[:500]}, 400)
        try:
            scores = [float(value) for value in self.function(images, prompts)]
        except (Exception, SystemExit):
            identifier = secrets.token_hex(4)
            _log.exception("request %s: the scoring function failed", identifier)
            return JSONResponse({"error": f"the scoring function failed; see {identifier} in the server's log"}, 500)
        finally:
            self.last_seconds = time.monotonic() - begin
        if len(scores) != len(images):
            return JSONResponse({"error": f"the function returned {len(scores)} scores for {len(images)} images"}, 500)
        for index, value in enumerate(scores):
            if not math.isfinite(value):
                return JSONResponse({"error": f"the function returned {value} for images[{index}]"}, 500)
        return JSONResponse({"scores": scores})


def _explain(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405) as JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return _Refusal(status, "GET / or POST /score", headers)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _connection_class(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 connection, cut off when a request does not arrive whole in time.

    uvicorn itself waits for ever for a request that was begun.
    """
    arriving: dict[Connection, None] = {}  # in the order in which they began

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start()
            if len(self.connections) > limits.max_connections:
                next(iter(arriving)).cut(503, "too many connections; try again later")

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # an idle connection is uvicorn's to close; only a request that has begun is timed
            self._look() if self.conn.trailing_data[0] else self._stop()

        def eof_received(self) -> None:
            if self._timer is not None and (self.cycle is not None or self.conn.trailing_data[0]):
                self.cut(400, "the request ended before it was complete")

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.cut(400, "this is not an HTTP/1.1 request")

        def cut(self, status: int, sentence: str) -> None:
            """Close the connection, with a last word where no answer has begun."""
            self._stop()
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = json.dumps({"error": sentence}).encode()
                self.transport.write(
                    b"HTTP/1.1 %d \r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
                    b"Connection: close\r\n\r\n%s" % (status, len(body), body)
                )
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _look(self) -> None:
            """Time what is arriving, and nothing else."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                self._start()
            else:
                self._stop()

        def _start(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                arriving[self] = None
                seconds = limits.read_timeout_s
                self._timer = self.loop.call_later(seconds, self.cut, 408, f"the request took more than {seconds:g} s")

        def _stop(self) -> None:
            arriving.pop(self, None)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection


def _tcp_listener(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=512)


def _unix_listener(path: Path) -> socket.socket:
    """A socket that this user alone may connect to; one left behind by a dead server is replaced.

    Raises:
        OSError: something else is at ``path``, or a server answers there.
    """
    listener = socket.socket(socket.AF_UNIX)
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError(f"{path} exists and is not a socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(f"another server listens on {path}")
        path.unlink()
    listener.bind(str(path))
    path.chmod(0o600)  # nobody can connect before listen
    listener.listen(512)
    return listener


# ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_token(token: str | None, needed: bool, host: str) -> None:
    if token is None:
        if needed:
            raise ValueError(
                f"listening on {host} needs a token: pass --token-file FILE or set {TOKEN_VARIABLE}, or turn it off "
                "with --no-token"
            )
    elif len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        # its length, not itself: errors are logged
        raise ValueError(
            f"the token must be at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, got "
            f'{len(token)} characters; make one with python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )


def _holds(header: str, token: bytes) -> bool:
    scheme, _, given = header.partition(" ")
    return hmac.compare_digest(given.strip().encode(), token) and scheme.lower() == "bearer"


def _is_ours(header: str, names: Iterable[str]) -> bool:
    """Whether a Host header names this server; an IP address always does, since no other site can own it."""
    name = _plain(header.rpartition("]")[0][1:] if header.startswith("[") else header.partition(":")[0])
    return name in names or _is_address(name)


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: list[str] | None = None) -> None:
    """The command ``python -m dblightning.rewards.server``."""
    defaults = Limits()
    parser = argparse.ArgumentParser(description="Serve a scoring function over HTTP.")
    parser.add_argument("function", help="module:function; the function takes PIL images and prompts")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds", type=Path, help="Unix socket to listen on instead, for this user only")
    parser.add_argument("--token-file", type=Path, help="file that holds the token clients must send")
    parser.add_argument("--token-env", default=TOKEN_VARIABLE, help="or the environment variable (%(default)s)")
    parser.add_argument("--no-token", action="store_true", help="let anyone who reaches the address use the server")
    parser.add_argument("--certfile", type=Path, help="certificate (PEM) for HTTPS")
    parser.add_argument("--keyfile", type=Path, help="its key (PEM)")
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name of this server; may be repeated"
    )
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="limit (%(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    module, _, function = arguments.function.partition(":")
    if not function:
        parser.error(f"expected module:function, got {arguments.function!r}")
    sys.path.insert(0, os.getcwd())
    try:
        token = None if arguments.no_token else _read_token(arguments.token_file, arguments.token_env)
        score = getattr(importlib.import_module(module), function)
        server = make_server(
            score,
            arguments.host,
            arguments.port,
            arguments.function,
            token=token,
            allow_no_token=arguments.no_token,
            uds=arguments.uds,
            certfile=arguments.certfile,
            keyfile=arguments.keyfile,
            allowed_hosts=arguments.allowed_host,
            limits=Limits(**{name: getattr(arguments, name) for name in vars(defaults)}),
        )
    except (ValueError, OSError, AttributeError) as error:
        parser.exit(1, f"server.py: {error}\n")
    if arguments.uds is None and not _is_loopback(arguments.host) and arguments.certfile is None:
        _log.warning("images and token travel unencrypted; pass --certfile and --keyfile, or use a tunnel")
    print(f"serving {arguments.function} on {server.address}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _read_token(file: Path | None, variable: str) -> str | None:
    """The token from a file, else from an environment variable, else None.

    Not from the command line, which every user of the machine can read.
    """
    return file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(variable) or None


if __name__ == "__main__":
    main()
