"""Images per second of the service: 32 requests with 32 preferences, one after the other and all at once.

    python benchmarks/serving.py --json benchmarks/results/serving.json

A service of the miniature is started for each batch size, on one worker with one torch thread. Every request differs
in weights, λ, prompt and seed; the images are compared with those of the requests made one after the other. The
workers' CPU seconds are counted too: on a busy machine they say more than the clock. Needs the extra ``serve``.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from benchmarks.machine import describe, sentence
from benchmarks.publish import parsed, publish

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("A red circle.", "A blue square.", "A green ring.", "A red circle and a blue square.")


def requests(count: int) -> list[dict[str, Any]]:
    """Requests with a preference each: two adapters, λ 0.5, 1 or 1.5, 20 steps, guidance 3."""
    return [
        {
            "prompt": PROMPTS[i % 4],
            "seed": i,
            "weights": {"alignment": (i + 1) / (count + 1), "aesthetic": 1 - (i + 1) / (count + 1)},
            "kl_scale": (1.0, 0.5, 1.5)[i % 3],
        }
        for i in range(count)
    ]


@contextmanager
def service(batch: int) -> Iterator[tuple[str, int]]:
    """Address and process id of a service with batches of up to ``batch`` images."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dblightning", "serve", "--port", str(port), "--threads", "1", "--no-token"]
    command += ["--max-batch-size", str(batch), "--batch-wait", "0.05", "--accelerator", "cpu"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        while not _healthy(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                raise RuntimeError("the service did not start")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def cpu_seconds(parent: int) -> float:
    """CPU seconds of a service's processes."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    total = 0.0
    for pid in [*done.stdout.split(), str(parent)]:
        stat = Path(f"/proc/{pid}/stat")
        if stat.is_file():
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def ask(url: str, fields: dict[str, Any]) -> np.ndarray:
    """The image of a request, levels 0 … 255."""
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        png = base64.b64decode(json.loads(answer.read())["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def measure(batch: int, count: int, repeats: int) -> dict[str, Any]:
    """Wall and CPU seconds of all requests, one by one and at once, medians over repeats that take turns."""
    wanted = requests(count)
    rounds: dict[str, list[tuple[float, float]]] = {"one by one": [], "at once": []}
    largest = 0
    with service(batch) as (url, pid):
        for fields in wanted[:2]:
            ask(url, fields)
        for _ in range(repeats):
            made = {}
            for name, width in (("one by one", 1), ("at once", count)):
                wall, cpu = time.perf_counter(), cpu_seconds(pid)
                with ThreadPoolExecutor(width) as pool:
                    made[name] = list(pool.map(lambda fields: ask(url, fields), wanted))
                rounds[name].append((time.perf_counter() - wall, cpu_seconds(pid) - cpu))
            differences = [abs(a - b).max() for a, b in zip(*made.values(), strict=True)]
            largest = max(largest, int(max(differences)))
    case: dict[str, Any] = {"max_batch_size": batch, "requests": count, "largest_difference_levels": largest}
    for name, each in rounds.items():
        case[name] = {
            "images_per_second": count / statistics.median(wall for wall, _ in each),
            "images_per_cpu_second": count / statistics.median(cpu for _, cpu in each),
        }
    return case


def to_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per batch size."""
    lines = [
        "| images of a batch at most | one by one, images/s (per CPU s) | 32 at once, images/s (per CPU s) | × wall | "
        "× CPU | largest difference, of 255 |",
        "|" + "---|" * 6,
    ]
    for case in cases:
        one, many = case["one by one"], case["at once"]
        wall = many["images_per_second"] / one["images_per_second"]
        cpu = many["images_per_cpu_second"] / one["images_per_cpu_second"]
        cells = [f"{each['images_per_second']:.1f} ({each['images_per_cpu_second']:.1f})" for each in (one, many)]
        lines.append(
            f"| {case['max_batch_size']} | {cells[0]} | {cells[1]} | {wall:.2f} | {cpu:.2f} | "
            f"{case['largest_difference_levels']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every batch size."""
    parser = argparse.ArgumentParser(description="Throughput of the service.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parsed(parser)
    machine = describe()
    cases = [measure(batch, options.requests, options.repeats) for batch in options.batches]
    publish({"machine": machine, "cases": cases}, f"{to_markdown(cases)}\n\n{sentence(machine)}", options.json)


if __name__ == "__main__":
    main()
