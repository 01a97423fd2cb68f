"""The HTTP reward against its reference server, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from dblightning.rewards import RemoteReward, RewardUnavailable, remote
from tests.rewards.tiny import pictures


@contextmanager
def serving(server: Any) -> Iterator[str]:
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
    pytest.importorskip("uvicorn", reason="the reward server's extra is not installed")
    from dblightning.rewards.server import make_server

    images = pictures(5, 20, 31)
    prompts = ["", "a", "bb", "ümlaut", "日本"]
    expected = (images[:, 0] * 255).mean((-2, -1)) + torch.tensor([0.0, 1, 2, 6, 2])
    with serving(make_server(red_and_length, port=0)) as url:
        reward = RemoteReward(url, micro_batch_size=2)
        torch.testing.assert_close(reward.score(images, prompts), expected)
        reward.update(images, prompts)
        torch.testing.assert_close(reward.compute(), expected.mean())
        assert not reward.differentiable


Answer = Callable[[int], tuple[int, bytes]]


def scripted(
    answer: Answer, seen: list[dict[str, Any]], port: int = 0, headers: dict[str, str] | None = None
) -> ThreadingHTTPServer:
    """A server whose n-th answer is given."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append({"headers": dict(self.headers), **json.loads(body)})
            status, content = answer(len(seen))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
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
        assert 0.42 <= time.monotonic() - begin < 10
        release.set()
    assert len(seen) == 2


def test_no_server_is_a_connection_error_that_asks_for_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="is the server running"):
        RemoteReward(f"http://127.0.0.1:{port}", retries=1, backoff=0.01).score(pictures(1), ["a"])


@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"scores": [1, 2]}',
        b'{"scores": [NaN]}',
        b'{"scores": ["1"]}',
        b'{"scores": [true]}',
        b'{"scores": [1e39]}',  # infinite in float32
        b'{"scores": [-1e400]}',
        b'{"scores": [1' + b"0" * 400 + b"]}",
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(content: bytes) -> None:
    with serving(scripted(lambda n: (200, content), [])) as url, pytest.raises(RuntimeError, match="answer"):
        RemoteReward(url).score(pictures(1), ["a"])


def test_arguments_out_of_range_are_refused() -> None:
    for options in (
        {"url": "localhost:8000"},
        {"url": "http://"},
        {"url": "ftp://localhost"},
        {"timeout": 0},
        {"retries": -1},
        {"backoff": -1},
        {"patience": 0},
        {"patience": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            RemoteReward(**{"url": "http://localhost", **options})
    with pytest.raises(ValueError, match="user or password") as caught:
        RemoteReward("http://me:secret@localhost")
    assert "secret" not in str(caught.value)


@contextmanager
def raw(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads one request's head per connection and then does as it likes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(65536)
                behave(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
def test_a_byte_at_a_time_does_not_outlast_the_time_out(head: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for byte in b"HTTP/1.1 200 OK and so on":
            time.sleep(0.1)
            connection.sendall(bytes([byte]))

    with raw(drip) as url:
        begin = time.monotonic()
        with pytest.raises(RewardUnavailable, match=r"at most 0\.5 s each.*TimeoutError"):
            RemoteReward(url, timeout=0.5, retries=0).score(pictures(1), ["a"])
        assert time.monotonic() - begin < 1.5


def test_an_endless_answer_is_cut_off() -> None:
    sent = []

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
        while len(sent) < 10_000:
            connection.sendall(b"x" * 100_000)
            sent.append(1)

    with raw(pour) as url, pytest.raises(RuntimeError, match="answered more than 100064 bytes"):
        RemoteReward(url, retries=0).score(pictures(1), ["a"])
    assert len(sent) < 200  # what the system's buffers hold


def test_a_redirect_is_not_followed_and_the_token_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_TOKEN", "a-secret")
    elsewhere: list[dict[str, Any]] = []
    with serving(scripted(lambda n: (200, GOOD), elsewhere)) as other:

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(307)
                self.send_header("Location", f"{other}/score")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        with serving(server) as url, pytest.raises(RuntimeError, match=r"redirects elsewhere \(status 307\)"):
            RemoteReward(url, token_env="OUR_TOKEN").score(pictures(1), ["a"])
    assert not elsewhere


def test_a_proxy_of_the_environment_is_used_on_demand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[dict[str, Any]] = []
    proxied: list[dict[str, Any]] = []
    with (
        serving(scripted(lambda n: (200, GOOD), proxied)) as proxy,
        serving(scripted(lambda n: (200, GOOD), direct)) as url,
    ):
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, proxy)
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        RemoteReward(url).score(pictures(1), ["a"])
        assert (len(direct), len(proxied)) == (1, 0)
        RemoteReward(url, trust_env=True).score(pictures(1), ["a"])
        assert (len(direct), len(proxied)) == (1, 1)


def test_secrets_come_from_the_environment_and_show_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, Any]] = []
    with serving(scripted(lambda n: (200, GOOD) if n == 1 else (503, b""), seen)) as url:
        reward = RemoteReward(url, token_env="OUR_TOKEN", headers={"X-Key": "k=${OUR_KEY}"}, retries=1, backoff=0)
        with pytest.raises(RuntimeError, match="environment variable OUR_TOKEN, .* is not set"):
            reward.score(pictures(1), ["a"])
        assert not seen
        monkeypatch.setenv("OUR_TOKEN", "a-secret")
        monkeypatch.setenv("OUR_KEY", "a-secret-too")
        reward.score(pictures(1), ["a"])
        assert seen[0]["headers"]["Authorization"] == "Bearer a-secret"
        assert seen[0]["headers"]["X-Key"] == "k=a-secret-too"
        with pytest.raises(RewardUnavailable) as caught:
            reward.score(pictures(1), ["a"])
    shown = repr(reward) + repr(vars(reward)) + repr(caught.value) + caplog.text + repr(pickle.dumps(reward))
    assert "a-secret" not in shown
    with pytest.warns(UserWarning, match="unencrypted; use https"):
        RemoteReward("http://scores.example", token_env="OUR_TOKEN")


def test_a_server_that_comes_back_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: list[dict[str, Any]] = []

    def restart() -> None:
        time.sleep(1.0)
        server = scripted(lambda n: (200, GOOD), seen, port)
        server.handle_request()
        server.server_close()

    thread = threading.Thread(target=restart)
    thread.start()
    reward = RemoteReward(f"http://127.0.0.1:{port}", backoff=0.05)
    assert reward.score(pictures(1), ["a"]).tolist() == [0.5]
    thread.join()
    assert len(seen) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, not at each try
    assert "asking again for 480 s" in caplog.text


def test_patience_ends_with_a_reward_that_is_unavailable() -> None:
    """Pauses double up to 30 s: with the default of 480 s a server has eight minutes to come back."""
    pauses: list[float] = []
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patch.setattr(remote.time, "monotonic", lambda: clock[0])
        patch.setattr(remote.time, "sleep", lambda s: (pauses.append(s), clock.__setitem__(0, clock[0] + s)))
        with pytest.raises(
            RewardUnavailable, match=r"no answer .*\(Connect.* s in all; is the server running"
        ) as caught:
            RemoteReward(f"http://127.0.0.1:{free.getsockname()[1]}").score(pictures(1), ["a"])
    assert isinstance(caught.value, ConnectionError)
    assert 440 < clock[0] <= 480
    assert all(0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(pauses[:6]))
    assert all(15 <= pause <= 30 for pause in pauses[7:])
    assert len(set(pauses)) == len(pauses)  # jitter


def test_the_time_a_server_asks_for_is_waited() -> None:
    seen: list[dict[str, Any]] = []
    server = scripted(lambda n: (503, b"busy") if n == 1 else (200, GOOD), seen, headers={"Retry-After": "1"})
    with serving(server) as url:
        begin = time.monotonic()
        RemoteReward(url, backoff=0).score(pictures(1), ["a"])
        assert time.monotonic() - begin >= 1


def test_a_reward_scores_where_an_event_loop_runs_as_in_a_notebook() -> None:
    async def cell(url: str) -> list[float]:
        return RemoteReward(url).score(pictures(1), ["a"]).tolist()

    with serving(scripted(lambda n: (200, GOOD), [])) as url:
        assert asyncio.run(cell(url)) == [0.5]
