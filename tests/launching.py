"""Starts ``distributed_fit.py`` in processes of its own, and compares what they ended with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def command(out: Path, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The command line that does ``runs`` in folder ``out``."""
    return [sys.executable, str(ROOT / "tests" / "distributed_fit.py"), str(out), json.dumps(list(runs))]


def environment(**more: str) -> dict[str, str]:
    """This process's, with the package importable and one thread per process."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start(out: Path, runs: Sequence[dict[str, Any]], processes: int = 1) -> list[subprocess.Popen[str]]:
    """The processes, running, by rank. No launcher watches over them: torchrun would end survivors itself."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    started = []
    for rank in range(processes):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        log = (out / f"log{rank}.txt").open("w")
        started.append(
            subprocess.Popen(
                command(out, runs), cwd=ROOT, env=environment(**own), text=True, stdout=log, stderr=subprocess.STDOUT
            )
        )
    return started


def finish(out: Path, runs: Sequence[dict[str, Any]], processes: int = 1) -> list[int]:
    """Do the runs; the exit codes by rank."""
    return [process.wait(timeout=300) for process in start(out, runs, processes)]


def ended(out: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a rank of a run ended with."""
    state: dict[str, Any] = torch.load(out / name / f"rank{rank}.pt", weights_only=True)
    return state


def curves(out: Path, name: str) -> dict[int, dict[str, float]]:
    """The logged metrics by step; where a resumed run logged a step again, its last values."""
    lines = [json.loads(line) for line in (out / name / "curves.jsonl").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for step, metrics in lines:
        found[step] = found.get(step, {}) | metrics
    return found


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where
