"""The service as its clients see it: OpenAI's own client, many at once, killed ones, bad ones."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("litserve", reason="needs pip install 'dblightning[serve]'")
pytest.importorskip("prometheus_client", reason="needs pip install 'dblightning[serve]'")

from dblightning.preset import Preset
from dblightning.shared_pipeline import Job, SharedPipeline
from tests.serving.conftest import TOKEN, Service, running

PROMPTS = ("A red circle.", "A blue square.", "A green ring.", "A red circle and a blue square.")
#: 32 preferences: methods, weights, λ, prompts and seeds all mixed
MIXED: list[dict[str, Any]] = [
    {"prompt": PROMPTS[i % 4], "seed": i}
    | (
        {"weights": {"alignment": i / 31, "aesthetic": 1 - i / 31}, "kl_scale": (1.0, 0.5, 1.5)[i % 3]},
        {"weights": {"alignment": 0.25, "aesthetic": 0.25, "compressibility": 0.5}},
        {"method": "rewarded-soup", "weights": {"aesthetic": 0.5, "compressibility": 0.5}},
        {"method": "base"},
        {"method": "db-mpa-ls", "weights": {"alignment": 0.5, "aesthetic": 0.5}},
        {"method": "single", "weights": {"alignment": 1.0}},
        {"weights": [{"alignment": 1.0}, {"aesthetic": 1.0}]},
        {"weights": {"alignment": 1.0}, "num_inference_steps": 12},
    )[i % 8]
    for i in range(32)
]


@pytest.fixture(scope="module")
def shared() -> SharedPipeline:
    return SharedPipeline.load(device="cpu")


def post(service: Service, body: bytes, token: str | None = TOKEN, accept: str = "*/*") -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", "Accept": accept}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{service.url}/v1/images/generations", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask(service: Service, fields: dict[str, Any]) -> np.ndarray:
    status, answer = post(service, json.dumps(fields).encode())
    assert status == 200, answer
    return pixels(base64.b64decode(json.loads(answer)["data"][0]["b64_json"]))


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def alone(shared: SharedPipeline, fields: dict[str, Any]) -> np.ndarray:
    """The image that the pipeline makes of a request, with nothing else in the batch, in levels of 0 … 255."""
    preference = {"num_inference_steps": 20, "guidance_scale": 3.0} | {
        key: value for key, value in fields.items() if key != "prompt"
    }
    if preference.get("method") == "base":
        preference["weights"] = None
    (image,) = shared.make([Job(fields["prompt"], Preset(**preference))])
    return image.permute(1, 2, 0).numpy() * 255


def same(levels: np.ndarray, exact: np.ndarray) -> bool:
    """Whether 8-bit levels are those of an exact image: 1e-4 of the range before, half a level of rounding."""
    return bool(np.abs(levels - exact).max() <= 0.5 + 255e-4)


def test_openais_client_gets_the_image_of_its_preference(service: Service, shared: SharedPipeline) -> None:
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=TOKEN, max_retries=0)
    extra = {"weights": {"alignment": 0.3, "aesthetic": 0.7}, "kl_scale": 1.2, "method": "db-mpa", "seed": 5}
    answer = client.images.generate(
        model="miniature", prompt="A red circle.", n=2, response_format="b64_json", extra_body=extra
    )
    assert answer.data is not None and [each.seed for each in answer.data] == [5, 6]
    for each in answer.data:
        expected = alone(shared, {"prompt": "A red circle.", **extra, "seed": each.seed})
        assert same(pixels(base64.b64decode(each.b64_json)), expected)
    assert client.models.list().data[0].id == "miniature"
    with pytest.raises(openai.BadRequestError, match="sum to 1"):
        client.images.generate(
            model="miniature", prompt="A red circle.", extra_body={"weights": {"alignment": 0.3, "aesthetic": 0.3}}
        )
    with pytest.raises(openai.AuthenticationError, match="token"):
        client.with_options(api_key="wrong-token-wrong-token").images.generate(model="m", prompt="A red circle.")


def test_32_mixed_requests_at_once_are_the_images_made_alone_and_share_batches(
    service: Service, shared: SharedPipeline
) -> None:
    before = service.metrics()
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda fields: ask(service, fields), MIXED))
    after = service.metrics()
    for fields, image in zip(MIXED, together, strict=True):
        assert same(image, alone(shared, fields)), fields
    images = after["dblightning_batch_images_count"] - before["dblightning_batch_images_count"]
    small = after['dblightning_batch_images_bucket{le="2.0"}'] - before['dblightning_batch_images_bucket{le="2.0"}']
    assert images == 32
    assert small < 16  # most images shared their denoiser passes with more than one other


def test_a_png_may_be_requested(service: Service) -> None:
    body = json.dumps({"prompt": "A red circle.", "seed": 1}).encode()
    status, png = post(service, body, accept="image/png")
    assert status == 200 and png.startswith(b"\x89PNG")
    assert (pixels(png) == ask(service, {"prompt": "A red circle.", "seed": 1})).all()


BAD: list[tuple[bytes, int]] = [
    (b'{"prompt": "A red circle.", "weights": {"alignment": 0.5}}', 400),
    (b'{"prompt": "A red circle.", "weights": {"nobody": 1}}', 400),
    (b'{"prompt": "A red circle.", "n": 1000000}', 400),
    (b'{"prompt": "A red circle.", "size": "100000x100000"}', 400),
    (b'{"prompt": "A red circle.", "size": "33x33"}', 400),  # only the model knows that
    (b'{"prompt": "A red circle."', 400),
    (b"", 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": "' + b"a" * 70000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), BAD, ids=[body[:40].decode() for body, _ in BAD])
def test_a_bad_request_is_4xx_and_one_sentence(service: Service, body: bytes, status: int) -> None:
    got, answer = post(service, body)
    message = json.loads(answer)["error"]["message"]
    assert got == status
    assert message and "\n" not in message and "Traceback" not in message


def test_no_token_and_a_wrong_one_are_401(service: Service) -> None:
    body = b'{"prompt": "A red circle."}'
    for token in (None, "", "wrong", TOKEN + "x"):
        status, answer = post(service, body, token)
        assert status == 401 and "token" in json.loads(answer)["error"]["message"]


def test_bad_requests_among_good_ones_take_none_with_them(service: Service) -> None:
    def either(i: int) -> int:
        return post(service, BAD[i % len(BAD)][0] if i % 2 else b'{"prompt": "A red circle.", "seed": 1}')[0]

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(either, range(32)))
    assert statuses[::2] == [200] * 16
    assert all(400 <= each < 500 for each in statuses[1::2])


def test_beyond_the_queues_limit_requests_are_429(service: Service) -> None:
    body = b'{"prompt": "A red circle.", "n": 4, "num_inference_steps": 40}'
    with ThreadPoolExecutor(24) as pool:  # 96 images at once, 64 may wait
        statuses = list(pool.map(lambda _: post(service, body)[0], range(24)))
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 16


def memory_kb(pids: list[int]) -> int:
    """Resident memory of processes."""
    total = 0
    for pid in pids:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        total += int(found[1]) if found else 0
    return total


def killed(service: Service, i: int) -> None:
    """Send a request and close the connection after a while, at times in its middle."""
    port = int(service.url.rpartition(":")[2])
    body = json.dumps({"prompt": PROMPTS[i % 4], "seed": i, "weights": {"alignment": 1.0}}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(whole[: -len(body) // 2] if i % 5 == 0 else whole)
        time.sleep(0.05 * (i % 4))


def settled(service: Service) -> None:
    end = time.monotonic() + 120
    while service.metrics()["dblightning_waiting_images"] > 0:
        assert time.monotonic() < end, "images still wait, though nobody waits for them"
        time.sleep(0.2)


def test_200_killed_clients_leave_no_growth_in_memory_or_queue(service: Service) -> None:
    def kill_many(count: int) -> int:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: killed(service, i), range(count)))
        settled(service)
        return memory_kb(service.children())

    first = kill_many(60)  # allocators and caches have grown to what they need
    second = kill_many(200)
    assert second - first < 20_000, f"{first} kB, {second} kB"
    assert service.metrics()["dblightning_waiting_images"] == 0
    assert ask(service, {"prompt": "A red circle.", "seed": 1}).shape == (32, 32, 3)
    assert service.metrics()["process_open_fds"] < 100


def recovered(service: Service) -> None:
    """Wait for the service to make images."""
    end = time.monotonic() + 180
    while post(service, b'{"prompt": "A red circle.", "num_inference_steps": 1}')[0] != 200:
        assert time.monotonic() < end, "the service makes no images"


def workers(service: Service) -> list[int]:
    """Process ids of a service's workers."""
    return [pid for pid in service.children() if "spawn_main" in command_of(pid)]


def command_of(pid: int) -> str:
    """Its command line; empty where it has ended since it was listed."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def running_still(pids: list[int]) -> list[int]:
    """Those of some processes that have not ended."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in states.items() if stat.exists() and ") Z" not in stat.read_text()]


def test_two_workers_time_outs_a_killed_worker_and_the_end(tmp_path: Path) -> None:
    """One service, because each start takes its time."""
    arguments = ("--timeout", "0.5", "--batch-wait", "0", "--max-batch-size", "1", "--workers-per-device", "2")
    with running(tmp_path / "log", *arguments) as strict:
        slow = json.dumps({"prompt": "A red circle.", "n": 10, "num_inference_steps": 100}).encode()
        status, answer = post(strict, slow)
        assert status == 504 and "0.5 s" in json.loads(answer)["error"]["message"]
        settled(strict)
        recovered(strict)  # a worker ends what it has begun
        before = workers(strict)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        recovered(strict)
        end = time.monotonic() + 180
        while len(running_still(workers(strict))) < 2 or workers(strict) == before:
            assert time.monotonic() < end, "the dead worker was not replaced"
            time.sleep(0.5)
        processes = strict.children()
    assert strict.process.returncode == 0
    end = time.monotonic() + 60
    while left := running_still(processes):
        assert time.monotonic() < end, f"{left} outlive the service"
        time.sleep(0.2)
