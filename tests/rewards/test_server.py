"""The reward server against requests made to exhaust, confuse or misuse it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dblightning.rewards import RemoteReward
from tests.rewards.tiny import pictures

pytest.importorskip("uvicorn", reason="the reward server's extra is not installed: pip install starlette uvicorn")

import dblightning.rewards.server as server_module
from dblightning.rewards.server import Limits, RewardServer, make_server, read_request

TOKEN = "0123456789abcdef-secret"


@contextmanager
def serving(server: RewardServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def red(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def png(width: int, height: int, *before: bytes) -> bytes:
    """A PNG of one grey level, written by hand: Pillow would need its pixels in memory."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" * (width + 1)) for _ in range(height)) + rows.flush()
    first = b"".join(before) or header(width, height, color=0)
    return b"\x89PNG\r\n\x1a\n" + first + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def content(*images: bytes, prompts: list[Any] | None = None) -> bytes:
    encoded = [base64.b64encode(image).decode() for image in images]
    return json.dumps({"images": encoded, "prompts": prompts or ["a"] * len(images)}).encode()


def small(level: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def request(body: bytes, *headers: str, path: str = "/score", kind: str = "application/json") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def connect(url: str) -> socket.socket:
    if url.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX)
        client.connect(url.removeprefix("unix:"))
    else:
        client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    client.settimeout(20)
    return client


def read_answer(client: socket.socket) -> tuple[int, Any]:
    """Status and content of the answer to what was sent; (0, None) where the connection was closed without one."""
    received = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            part = b""
        received += part
        head, blank, body = received.partition(b"\r\n\r\n")
        length = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not part or (blank and length and len(body) >= length[0]):
            break
    if not received:
        return 0, None
    text = body.decode()
    return int(head.split()[1]), json.loads(text) if text.startswith("{") else text


def ask(url: str, data: bytes) -> tuple[int, Any]:
    with connect(url) as client:
        client.sendall(data)
        return read_answer(client)


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────────


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="EPS")
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no json", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"images":' * 50_000, "expected JSON"),
        (b'{"images": [' + b"[]," * 600_000 + b'[]], "prompts": []}', "at most 1000000 brackets"),
        (b'{"images": [], "prompts": [], "x": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"images": []}', "expected JSON"),
        (b"[]", "expected JSON"),
        (b'{"images": {}, "prompts": {}}', "lists of the same length"),
        (b'{"images": ["QUJD"], "prompts": []}', "same length"),
        (b'{"images": ["QUJD"], "prompts": ["a"]}', r"images\[0\] is not a base64 PNG"),
        (b'{"images": ["***"], "prompts": ["a"]}', r"images\[0\] is not a base64 PNG"),
        (b'{"images": [{"a": 1}], "prompts": ["a"]}', r"images\[0\] is not a base64 PNG"),
        (b'{"images": ["\\ud800"], "prompts": ["a"]}', r"images\[0\] is not a base64 PNG"),
        (b'{"images": [], "prompts": [], "x": 1', "expected JSON"),
        (b'{"images": ["QUJD"], "prompts": [3]}', "must be strings, got int at index 0"),
        (content(small(), prompts=["a\ud800"]), r"prompts\[0\] is not valid UTF-8"),
        (content(small(), prompts=["a" * 10_001]), r"prompts\[0\] has 10001 characters"),
        (content(*[small()] * 257), "at most 256 images"),
        (content(eps()), r"images\[0\] is not a base64 PNG"),
        (content(jpeg()), r"images\[0\] is not a base64 PNG"),
        (content(small()[:-30]), r"images\[0\] is not a base64 PNG"),
        (content(small()[:33]), r"images\[0\] is not a base64 PNG"),
        (content(b"\x89PNG\r\n\x1a\n" + header(4, 4, depth=16)), r"images\[0\] has 16 bits per channel; send 8"),
        (content(b"\x89PNG\r\n\x1a\n" + header(0, 4)), r"0 × 4 pixels"),
        (content(b"\x89PNG\r\n\x1a\n" + header(2**31 - 1, 2**31 - 1)), r"2147483647 × 2147483647 pixels"),
        (content(png(12_000, 15_000)), r"images\[0\] has 12000 × 15000 pixels; at most 16777216"),
        (content(*[b"\x89PNG\r\n\x1a\n" + header(4096, 4096)] * 5), "83886080 pixels together"),
    ],
)
def test_a_request_that_makes_no_sense_or_asks_too_much_is_refused_in_one_sentence(body: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_request(body)
    assert "\n" not in str(caught.value)


def test_a_second_header_does_not_get_past_the_check_of_the_first() -> None:
    """Pillow takes the size from the last header before the pixels."""
    bomb = png(6000, 6000, header(8, 8, color=0), header(6000, 6000, color=0))
    with Image.open(io.BytesIO(bomb)) as image:
        assert image.size == (6000, 6000)
    with pytest.raises(ValueError, match="two headers"):
        read_request(content(bomb))


def test_images_arrive_as_rgb_and_prompts_in_unicode_however_they_were_written() -> None:
    for mode, color in (("L", 7), ("P", 0), ("RGBA", (7, 7, 7, 0)), ("1", 0)):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2), color).save(buffer, format="PNG")
        (image,), _ = read_request(content(buffer.getvalue()))
        assert image.mode == "RGB" and image.size == (3, 2)
    words = ["ümlaut", "日本", "🎨", ""]
    for raw in (True, False):
        encoded = [base64.b64encode(small()).decode()] * 4
        body = json.dumps({"images": encoded, "prompts": words}, ensure_ascii=raw).encode()
        assert read_request(body)[1] == words


def test_malformed_http_is_answered_with_4xx_and_a_sentence() -> None:
    good = content(small())
    cases = {
        b"nonsense\r\n\r\n": 400,
        b"GET / HTTP/1.1\r\n\r\n": 400,  # no Host
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n": 421,
        b"GET /elsewhere HTTP/1.1\r\nHost: localhost\r\n\r\n": 404,
        b"GET /score HTTP/1.1\r\nHost: localhost\r\n\r\n": 405,
        b"OPTIONS /score HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n\r\n": 405,
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n": 400,
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n": 400,
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n": 400,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000: 400,
        request(good, kind="text/plain"): 415,
        request(good, kind="application/x-www-form-urlencoded"): 415,
        request(good, "Content-Encoding: gzip"): 415,
        request(good, path="/score/"): 404,
        request(b"", "X: 1").replace(b"Content-Length: 0", b"Content-Length: 99999999999"): 413,
        request(b"[" * 3000): 400,
        request(content(eps())): 400,
    }
    with serving(make_server(red, port=0, max_megabytes=1)) as url:
        for data, status in cases.items():
            got, text = ask(url, data)
            assert got == status, (data[:200], got, text)
            assert "Traceback" not in text["error"] and "\n" not in text["error"]
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [b" " * 60_000] * 20)
        head = b"POST /score HTTP/1.1\r\nHost: [::1]:80\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        assert ask(url, head + b"\r\n\r\n" + chunked + b"0\r\n\r\n")[0] == 413  # counted while it is read
        assert ask(url, request(good, kind="application/json; charset=utf-8")) == (200, {"scores": [7.0]})
        with pytest.raises(RuntimeError, match="status 413: a request may have at most 1 MB; send fewer images"):
            RemoteReward(url).score(torch.rand(16, 3, 200, 200), ["a"] * 16)
        with connect(url) as client:  # two requests on one connection
            for level in (3, 4):
                client.sendall(request(content(small(level))))
                assert read_answer(client) == (200, {"scores": [float(level)]})
        with connect(url) as client:
            client.sendall(request(good)[:-5])
            client.shutdown(socket.SHUT_WR)
            assert read_answer(client)[0] == 400


def test_a_token_is_needed_for_everything_and_compared_whole() -> None:
    good = content(small())
    with serving(make_server(red, port=0, token=TOKEN)) as url:
        assert ask(url, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 401
        for wrong in ("", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer ümlaut", "Bearer"):
            status, answer = ask(url, request(good, f"Authorization: {wrong}").replace("ü".encode(), b"\xfc"))
            assert (status, answer["error"]) == (401, "send the header Authorization: Bearer TOKEN")
        assert ask(url, request(good, f"Authorization: Bearer {TOKEN}")) == (200, {"scores": [7.0]})


def test_beyond_this_machine_a_token_is_required_unless_turned_off(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "a.name"):
        with pytest.raises(ValueError, match="needs a token.*--no-token"):
            make_server(red, host, 0)
    make_server(red, "0.0.0.0", 0, allow_no_token=True).server_close()
    make_server(red, "0.0.0.0", 0, token=TOKEN).server_close()
    for token in ("short", "", "with a space in it", "ümlaut-0123456789"):
        with pytest.raises(ValueError, match=f"at least 16 printable.*got {len(token)} characters"):
            make_server(red, port=0, token=token)
    with pytest.raises(ValueError, match="max_images must be > 0"):
        Limits(max_images=0)
    with pytest.raises(ValueError, match="go together"):
        make_server(red, port=0, certfile=tmp_path / "a.pem")


def test_a_page_that_points_its_name_here_is_refused_and_own_names_are_not() -> None:
    good = content(small())
    with serving(make_server(red, port=0, allowed_hosts=["Scores.Example"])) as url:
        for host in ("localhost:80", "127.0.0.1", "[::1]:8000", "10.1.2.3:80", "scores.example.", socket.gethostname()):
            assert ask(url, request(good).replace(b"localhost", host.encode()))[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
            assert ask(url, request(good).replace(b"localhost", host.encode()))[0] in (400, 421), host


def test_a_unix_socket_is_for_its_user_alone_and_replaces_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "reward.sock"
    for _ in range(2):
        server = make_server(red, uds=path)
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="another server listens"):
            make_server(red, uds=path)
        server._listener.close()  # as a killed process leaves it
    with serving(make_server(red, uds=path)) as url:
        assert ask(url, request(content(small()))) == (200, {"scores": [7.0]})
        reward = RemoteReward("http://localhost", uds=path)
        images = pictures(2, 8, 8)
        assert reward.score(images, ["a", "b"]).tolist() == pytest.approx((images[:, 0] * 255).mean((1, 2)).tolist())
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="is not a socket"):
        make_server(red, uds=path)
    assert path.read_text() == "mine"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    certfile, keyfile = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(keyfile), "-out"]
    command += [str(certfile), "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return certfile, keyfile


def test_https_is_spoken_and_its_certificate_verified(certificate: tuple[Path, Path]) -> None:
    images = pictures(1, 8, 8)
    with serving(make_server(red, "localhost", 0, certfile=certificate[0], keyfile=certificate[1])) as url:
        assert url.startswith("https://localhost:")
        trusting = RemoteReward(url, ca_file=certificate[0])
        assert trusting.score(images, ["a"]).tolist() == pytest.approx((images[:, 0] * 255).mean((1, 2)).tolist())
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="certificate is not trusted"):
            RemoteReward(url).score(images, ["a"])
        with pytest.raises(RuntimeError, match="certificate is not trusted"):  # the name differs
            RemoteReward(url.replace("localhost", "127.0.0.1"), ca_file=certificate[0]).score(images, ["a"])
        assert time.monotonic() - begin < 10  # asking again would not help
    with pytest.raises((ssl.SSLError, OSError)):
        make_server(red, port=0, certfile=certificate[1], keyfile=certificate[1])


# ── the function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failing_function_leaves_its_traceback_in_the_servers_log(caplog: pytest.LogCaptureFixture) -> None:
    def broken(images: list[Image.Image], prompts: list[str]) -> list[float]:
        if prompts[0] == "exit":
            sys.exit("out of a job")
        raise KeyError("/home/me/secret path")

    with serving(make_server(broken, port=0)) as url:
        for prompt in ("a", "exit", "a"):  # the server lives on
            status, answer = ask(url, request(content(small(), prompts=[prompt])))
            assert status == 500 and "secret" not in answer["error"]
            identifier = answer["error"].split("see ")[1].split()[0]
            (record,) = [each for each in caplog.records if identifier in each.getMessage()]
            assert record.exc_info is not None
        assert "secret path" in caplog.text


@pytest.mark.parametrize(
    ("scores", "words"),
    [([1.0], "returned 1 scores for 2 images"), ([1.0, float("nan")], r"returned nan for images\[1\]")],
)
def test_scores_that_make_no_sense_are_an_error(scores: list[float], words: str) -> None:
    server = make_server(lambda images, prompts: scores, port=0)
    with serving(server) as url, pytest.raises(RuntimeError, match=words):
        RemoteReward(url).score(pictures(2), ["a", "b"])


def test_a_full_queue_and_a_function_that_hangs_are_answered_and_dropped_requests_are_not_scored() -> None:
    release, seen = threading.Event(), []

    def slow(images: list[Image.Image], prompts: list[str]) -> list[float]:
        seen.append(prompts[0])
        release.wait(20)
        return [1.0]

    limits = Limits(max_waiting=2, score_timeout_s=2.0)
    with serving(make_server(slow, port=0, limits=limits)) as url:
        first, second = connect(url), connect(url)
        first.sendall(request(content(small(), prompts=["first"])))
        while not seen:
            time.sleep(0.01)
        second.sendall(request(content(small(), prompts=["second"])))
        time.sleep(0.2)
        with connect(url) as third:
            third.sendall(request(content(small(), prompts=["third"])))
            head = third.recv(4096)
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: " in head.lower()
        second.close()  # its request is given up
        assert read_answer(first) == (504, {"error": "no scores within 2 s"})
        release.set()
        assert ask(url, request(content(small(), prompts=["fourth"]))) == (200, {"scores": [1.0]})
        first.close()
    assert seen == ["first", "fourth"]


# ── many clients ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def own_process(folder: Path, *arguments: str, token: str | None = None) -> Iterator[tuple[str, int]]:
    """Address and process id of the server, run from a copy of its file beside a scoring function."""
    (folder / "server.py").write_text(Path(server_module.__file__).read_text())
    (folder / "mine.py").write_text(
        "import numpy\n\n\ndef score(images, prompts):\n"
        "    return [float(numpy.asarray(image)[..., 0].mean()) + len(p) for image, p in zip(images, prompts)]\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != server_module.TOKEN_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "server.py", "mine:score", "--port", "0", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | ({} if token is None else {server_module.TOKEN_VARIABLE: token}),
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(process.stderr.read())
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate(timeout=20)


def peak_megabytes(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
def test_attacks_cost_neither_memory_nor_answers_nor_an_honest_clients_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_TOKEN", TOKEN)
    images = pictures(2, 16, 16)
    expected = [mean + 1 for mean in (images[:, 0] * 255).mean((1, 2)).tolist()]
    stop, scores, errors = threading.Event(), [], []

    with own_process(tmp_path, "--read-timeout-s", "2", token=TOKEN) as (url, process_id):

        def honest() -> None:
            reward = RemoteReward(url, timeout=10, token_env="OUR_TOKEN")
            try:
                while not stop.is_set():
                    scores.append(reward.score(images, ["a", "b"]).tolist())
            except Exception as error:
                errors.append(error)

        ours = f"Authorization: Bearer {TOKEN}"
        half = [
            request(content(small()), ours)[:-20],  # the body is cut
            request(content(small()), ours)[:60],  # the head is cut
            request(b" " * 2_000_000, ours)[:900_000],
            request(content(small()))[:-20],  # no token
            b"",
        ]
        client = threading.Thread(target=honest)
        client.start()
        try:
            begin = time.monotonic()
            waiting = [connect(url) for _ in range(300)]
            for index, each in enumerate(waiting):
                each.sendall(half[index % len(half)])
            bomb = png(12_000, 15_000)
            assert len(bomb) < 200_000
            twice = png(6000, 6000, header(8, 8, color=0), header(6000, 6000, color=0))
            attacks = {
                request(content(bomb), ours): 400,
                request(content(*[bomb] * 8), ours): 400,
                request(content(twice), ours): 400,
                request(content(eps()), ours): 400,
                request(b"[" * 5_000_000, ours): 400,
                request(b'{"images": [' + b"[]," * 10_000_000 + b'[]], "prompts": []}', ours): 400,
                request(b'{"images": ["' + b"A" * 60_000_000 + '🎨"], "prompts": ["a"]}'.encode(), ours): 400,
                request(content(small()), f"Authorization: Bearer {TOKEN[:-1]}x"): 401,
                request(b"x" * 2_000_000): 401,
            }
            for data, status in attacks.items():
                assert ask(url, data)[0] == status, data[:100]
            answers = [read_answer(each)[0] for each in waiting]
            assert set(answers) <= {401, 408}, set(answers)
            assert time.monotonic() - begin < 30
        finally:
            stop.set()
            client.join(20)
            for each in waiting:
                each.close()
        assert not errors
        assert len(scores) >= 3
        for each in scores:
            assert each == pytest.approx(expected, abs=1e-4)
        peak = peak_megabytes(process_id)
        assert peak < 600, f"{peak:.0f} MB"


def test_more_connections_than_allowed_close_the_oldest_unfinished_one() -> None:
    with serving(make_server(red, port=0, limits=Limits(max_connections=5))) as url:
        waiting = [connect(url) for _ in range(5)]
        for each in waiting:
            each.sendall(b"POST /score HTTP/1.1\r\n")
        time.sleep(0.2)
        assert ask(url, request(content(small()))) == (200, {"scores": [7.0]})
        assert read_answer(waiting[0])[0] == 503
        for each in waiting:
            each.close()


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_runs_alone_in_an_environment_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("OUR_TOKEN", TOKEN)
    with own_process(tmp_path, "--token-file", "token") as (url, _):
        reward = RemoteReward(url, token_env="OUR_TOKEN")
        assert reward.score(pictures(1, 10, 17) * 0, ["abc"]).tolist() == [3.0]
        assert ask(url, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 401
    source = (tmp_path / "server.py").read_text()
    assert "import torch" not in source and "from dblightning" not in source


def test_the_command_refuses_what_it_cannot_do_in_one_sentence(tmp_path: Path) -> None:
    for arguments, words in {
        ("--host", "0.0.0.0"): "listening on 0.0.0.0 needs a token",
        ("--token-file", "absent"): "absent",
        ("--certfile", "absent", "--keyfile", "absent"): "No such file",
        ("--max-images", "0"): "max_images must be > 0, got 0",
    }.items():
        with pytest.raises(RuntimeError) as caught, own_process(tmp_path, *arguments):
            pass
        assert str(caught.value).startswith("server.py: ") and words in str(caught.value)
        assert str(caught.value).count("\n") == 1
