"""A small HTTP server around any scoring function, for rewards that cannot share our environment or machine.

Needs the standard library and Pillow, nothing of dblightning: copy this one file into the other environment and run

    python server.py my_module:score --port 8000

where ``score(images, prompts)`` takes a list of PIL images and a list of strings and returns as many numbers.

    GET  /       → {"name": "my_module:score"}
    POST /score  {"images": [base64 PNG, …], "prompts": ["…", …]} → {"scores": [0.1, …]}

Errors are JSON too: 400 {"error": …} for a request that makes no sense, 500 {"error": …, "traceback": …} when the
function fails. The server trusts whoever can reach it and listens on this machine only unless told otherwise.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import importlib
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

ScoreFunction = Callable[[list[Image.Image], list[str]], Any]


def make_server(
    score: ScoreFunction, host: str = "127.0.0.1", port: int = 8000, name: str = "reward", max_megabytes: int = 256
) -> ThreadingHTTPServer:
    """A server to be run with ``serve_forever``; port 0 takes a free one, see ``server_address``.

    Args:
        max_megabytes: longest request read.
    """
    # a model is rarely safe to call from several threads; clients queue here
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(200, {"name": name})
            else:
                self._answer(404, {"error": f"no {self.path} here; GET / or POST /score"})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > max_megabytes * 1_000_000:
                self.close_connection = True  # what follows is not read
                self._answer(413, {"error": f"a request needs a length of at most {max_megabytes} MB, got {length!r}"})
                return
            body = self.rfile.read(int(length))
            if self.path != "/score":
                self._answer(404, {"error": f"no {self.path} here; GET / or POST /score"})
                return
            try:
                images, prompts = read_request(body)
            except ValueError as error:
                self._answer(400, {"error": str(error)})
                return
            try:
                with lock:
                    scores = [float(value) for value in score(images, prompts)]
                if len(scores) != len(images):
                    raise ValueError(f"the function returned {len(scores)} scores for {len(images)} images")
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                self._answer(500, {"error": text, "traceback": traceback.format_exc()})
                return
            self._answer(200, {"scores": scores})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def read_request(body: bytes) -> tuple[list[Image.Image], list[str]]:
    """Images and prompts of a request.

    Raises:
        ValueError: not the JSON described above, images that do not decode, or other counts.
    """
    try:
        content = json.loads(body)
        encoded, prompts = content["images"], content["prompts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'expected JSON {{"images": […], "prompts": […]}}: {error!r}') from error
    if not isinstance(encoded, list) or not isinstance(prompts, list) or len(encoded) != len(prompts):
        raise ValueError("images and prompts must be lists of the same length")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be strings")
    images = []
    for index, text in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
            images.append(image.convert("RGB"))
        except (binascii.Error, TypeError, ValueError, OSError) as error:
            raise ValueError(f"images[{index}] is no base64 PNG: {error}") from error
    return images, prompts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a scoring function over HTTP.")
    parser.add_argument("function", help="module:function; the function takes PIL images and prompts")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(argv)
    module, _, function = arguments.function.partition(":")
    if not function:
        parser.error(f"expected module:function, got {arguments.function!r}")
    sys.path.insert(0, os.getcwd())
    score = getattr(importlib.import_module(module), function)
    server = make_server(score, arguments.host, arguments.port, arguments.function)
    print(f"serving {arguments.function} on http://{arguments.host}:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
