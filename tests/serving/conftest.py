"""A running service."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-tests-only"


@dataclass
class Service:
    """A service's process and address."""

    process: subprocess.Popen[str]
    url: str

    def metrics(self) -> dict[str, float]:
        """Its counters."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def children(self) -> list[int]:
        """Process ids of its processes, without its own."""
        done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(each) for each in done.stdout.split()]


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[Service]:
    """A service that is up, on a free port, and is stopped in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dblightning", "serve", "--port", str(port), "--threads", "1", *arguments]
    environment = {**os.environ, "DBLIGHTNING_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, text=True, env=environment, cwd=log.parent)
    service = Service(process, f"http://127.0.0.1:{port}")
    try:
        _wait(service, log)
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(service: Service, log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if service.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{service.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the service did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The miniature, with a token, batches of up to 16 images, at most 64 images waiting."""
    log = tmp_path_factory.mktemp("service") / "log"
    arguments = ("--max-batch-size", "16", "--batch-wait", "0.1", "--queue-limit", "64", "--max-images", "4")
    with running(log, *arguments, "--max-size", "64", "--timeout", "300") as found:
        yield found
