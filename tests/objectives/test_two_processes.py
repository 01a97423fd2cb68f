"""Passes through a rollout, KL to go, noised samples and a flow's steps: two processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launching
from tests.distributed_fit import run

LATEST: dict[str, Any] = {"buffer_size": None, "advantage": "prompt"}
#: 4 trajectories of 4 steps per process in batches of 4: a pass of two optimiser steps of two micro-batches
SETTINGS: dict[str, dict[str, Any]] = {
    "passes": LATEST | {"objective": "ppo", "optimisation": {"epochs": 2}, "kl": {"weight": 0.3, "to_go": True}},
    "noised": LATEST
    | {
        "objective": {"class_path": "dblightning.objectives.AWM", "init_args": {"decay_rate": 0.2}},
        "optimisation": {"epochs": 1},
        "learning_rate": 0.01,
    },
    "flow": LATEST
    | {"objective": "ppo", "sampling": {"noise": "cps", "eta": 0.8}, "window": {"size": 2, "position": "random"}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two ranks ended with, by run."""
    out = tmp_path_factory.mktemp("two")
    runs = [{"name": name, "settings": settings, "flow": name == "flow"} for name, settings in SETTINGS.items()]
    codes = launching.finish(out, runs, processes=2)
    assert codes == [0, 0], "\n".join((out / f"log{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    return {name: [launching.ended(out, name, rank) for rank in (0, 1)] for name in SETTINGS}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_train_what_one_with_twice_the_batch_trains(
    two: dict[str, Any], tmp_path: Path, name: str
) -> None:
    twice = SETTINGS[name] | {"policy_batch_size": 8}
    one = run(tmp_path, name, batch_size=8, settings=twice, flow=name == "flow")
    first, second = two[name]
    launching.assert_equal(first["trained"], second["trained"])
    assert len(first["steps"]) == len(one["steps"]) == 3 * 2 * (2 if name == "passes" else 1)
    assert one["steps"][-1].norm() > 0.01
    # 1e-5: float32; the two sum the same gradients in another order
    assert ((first["steps"] - one["steps"]).norm(dim=1) <= 1e-5 * one["steps"].norm(dim=1)).all()
    for key, tensor in one["trained"].items():
        torch.testing.assert_close(first["trained"][key], tensor, rtol=1e-5, atol=1e-5)
