"""Runs the fits of ``distributed_fit.py`` in processes of their own, and compares what they ended with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dblightning.checkpointing import latest_intact
from tests import distributed_fit


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def finish(out: Path, runs: Sequence[dict[str, Any]], processes: int = 1) -> list[int]:
    """Do the runs, each process by a fork of this one, which has paid for the imports; the exit codes by rank.

    No launcher watches over them: torchrun would end the survivors of a killed process itself.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    children = []
    for rank in range(processes):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        child = multiprocessing.get_context("fork").Process(target=_child, args=(out, runs, own, f"log{rank}.txt"))
        child.start()
        children.append(child)
    for child in children:
        child.join(timeout=300)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert None not in codes, f"a process hangs: {codes}"
    return codes  # type: ignore[return-value]


def _child(out: Path, runs: Sequence[dict[str, Any]], own: dict[str, str], log: str) -> None:
    os.environ.update(own)
    with (out / log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    distributed_fit.main(str(out), json.dumps(list(runs)))


def ended(out: Path, name: str, rank: int = 0, label: str = "") -> dict[str, Any]:
    """What a rank of a run ended with."""
    state: dict[str, Any] = torch.load(out / name / f"{label}rank{rank}.pt", weights_only=True)
    return state


def whole_and_killed(out: Path, settings: dict[str, Any], processes: int, step: int) -> list[tuple[Any, Any]]:
    """A run killed after an optimiser step and resumed, and one that never stopped, have the same end and curves.

    Returns:
        What each rank ended with, of the killed run and of the whole one.
    """
    whole, killed = out / "whole", out / "killed"
    whole.mkdir()
    killed.mkdir()
    kill = {"name": "SIGKILL", "rank": processes - 1, "at_step": step}
    assert finish(whole, [{"name": "run", **settings}], processes) == [0] * processes
    codes = finish(killed, [{"name": "run", **settings, "signals": kill}], processes)
    assert codes[-1] == -signal.SIGKILL
    assert latest_intact(killed / "run" / "checkpoints") is not None
    again = finish(killed, [{"name": "run", **settings, "resume": True}], processes)
    assert again == [0] * processes
    ends = [(ended(killed, "run", rank), ended(whole, "run", rank)) for rank in range(processes)]
    for one, other in ends:
        assert_same_end(one, other)
    assert curves(killed, "run") == curves(whole, "run")
    return ends


def curves(out: Path, name: str) -> dict[int, dict[str, float]]:
    """The logged metrics by step; where a resumed run logged a step again, its last values."""
    lines = [json.loads(line) for line in (out / name / "curves.jsonl").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for step, metrics in lines:
        found[step] = found.get(step, {}) | metrics
    return found


def assert_same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two runs ended in the same state, bit for bit; only ``steps`` may cover a part of the run."""
    assert "error" not in one, one
    assert "error" not in other, other
    assert_equal({**one, "steps": one["steps"][-1]}, {**other, "steps": other["steps"][-1]})


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
