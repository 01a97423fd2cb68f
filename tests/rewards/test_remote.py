"""The HTTP reward against its reference server, and against servers that misbehave."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dblightning.rewards.server as server_module
from dblightning.rewards import RemoteReward
from dblightning.rewards.server import make_server
from tests.rewards.tiny import pictures


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def red_and_length(images: list, prompts: list[str]) -> list[float]:
    return [float(np.asarray(i)[..., 0].mean()) + len(p) for i, p in zip(images, prompts, strict=True)]


def test_the_server_sees_the_8_bit_images_and_the_prompts_in_order() -> None:
    images = pictures(5, 20, 31)
    prompts = ["", "a", "bb", "ümlaut", "日本"]
    expected = (images[:, 0] * 255).mean((-2, -1)) + torch.tensor([0.0, 1, 2, 6, 2])
    with serving(make_server(red_and_length, port=0)) as url:
        reward = RemoteReward(url, micro_batch_size=2)
        torch.testing.assert_close(reward.score(images, prompts), expected)
        reward.update(images, prompts)
        torch.testing.assert_close(reward.compute(), expected.mean())
        assert not reward.differentiable


def test_an_exception_in_the_servers_function_arrives_with_its_traceback() -> None:
    def broken(images: list, prompts: list[str]) -> list[float]:
        raise KeyError("no such model")

    with serving(make_server(broken, port=0)) as url, pytest.raises(RuntimeError) as caught:
        RemoteReward(url).score(pictures(1), ["a"])
    assert "status 500: KeyError: 'no such model'" in str(caught.value)
    assert "in broken" in str(caught.value)


def test_a_server_that_returns_another_number_of_scores_is_an_error() -> None:
    server = make_server(lambda images, prompts: [1.0], port=0)
    with serving(server) as url, pytest.raises(RuntimeError, match="returned 1 scores for 2 images"):
        RemoteReward(url).score(pictures(2), ["a", "b"])


Answer = Callable[[int], tuple[int, bytes]]


def scripted(answer: Answer, seen: list[dict[str, Any]]) -> ThreadingHTTPServer:
    """A server whose n-th answer is given."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append({"headers": dict(self.headers), **json.loads(body)})
            status, content = answer(len(seen))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


GOOD = json.dumps({"scores": [0.5]}).encode()


def test_a_busy_server_is_asked_again_and_a_wrong_request_is_not() -> None:
    seen: list[dict[str, Any]] = []
    with serving(scripted(lambda n: (503, b"busy") if n < 3 else (200, GOOD), seen)) as url:
        reward = RemoteReward(url, backoff=0.01, headers={"X-Token": "secret"}, reward_name="ours")
        assert reward.score(pictures(1), ["a"]).tolist() == [0.5]
        assert reward.name == "ours"
    assert len(seen) == 3
    assert seen[-1]["headers"]["X-Token"] == "secret"
    seen.clear()
    refusing = scripted(lambda n: (400, b'{"error": "no such prompt"}'), seen)
    with serving(refusing) as url, pytest.raises(RuntimeError, match="answered status 400: no such prompt"):
        RemoteReward(url, backoff=0.01).score(pictures(1), ["a"])
    assert len(seen) == 1


def test_a_server_that_hangs_is_given_up_after_the_time_out_and_the_tries() -> None:
    release = threading.Event()

    def hang(count: int) -> tuple[int, bytes]:
        release.wait(20)
        return 200, GOOD

    seen: list[dict[str, Any]] = []
    with serving(scripted(hang, seen)) as url:
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match=r"after 2 tries of at most 0\.2 s each \(TimeoutError"):
            RemoteReward(url, timeout=0.2, retries=1, backoff=0.05).score(pictures(1), ["a"])
        assert 0.45 <= time.monotonic() - begin < 10
        release.set()
    assert len(seen) == 2


def test_no_server_is_a_connection_error_that_asks_for_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="is the server running"):
        RemoteReward(f"http://127.0.0.1:{port}", retries=1, backoff=0.01).score(pictures(1), ["a"])


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b'{"scores": [1, 2]}', b'{"scores": [NaN]}', b'{"scores": ["1"]}', b"{}"]
)
def test_an_answer_that_makes_no_sense_is_an_error(content: bytes) -> None:
    with serving(scripted(lambda n: (200, content), [])) as url, pytest.raises(RuntimeError, match="answer"):
        RemoteReward(url).score(pictures(1), ["a"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no json", "expected JSON"),
        (b'{"images": []}', "expected JSON"),
        (b'{"images": ["QUJD"], "prompts": []}', "same length"),
        (b'{"images": ["QUJD"], "prompts": ["a"]}', r"images\[0\] is no base64 PNG"),
        (b'{"images": ["***"], "prompts": ["a"]}', r"images\[0\] is no base64 PNG"),
        (b'{"images": [], "prompts": [], "x": 1', "expected JSON"),
        (b'{"images": ["QUJD"], "prompts": [3]}', "must be strings"),
    ],
)
def test_the_server_names_what_is_wrong_with_a_request(body: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        server_module.read_request(body)


def test_arguments_out_of_range_are_refused() -> None:
    for options in ({"url": "localhost:8000"}, {"timeout": 0}, {"retries": -1}, {"backoff": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RemoteReward(**{"url": "http://localhost", **options})


def test_the_server_file_runs_alone_in_an_environment_without_us(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(Path(server_module.__file__).read_text())
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [i.width for i in images]\n")
    process = subprocess.Popen(
        [sys.executable, "server.py", "mine:score", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert RemoteReward(url).score(pictures(2, 10, 17), ["a", "b"]).tolist() == [17.0, 17.0]
    finally:
        process.terminate()
        process.wait(10)
    source = (tmp_path / "server.py").read_text()
    assert "import torch" not in source and "dblightning." not in source.split('"""', 2)[2]
