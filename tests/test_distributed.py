"""Several processes against one, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dblightning.checkpointing import read_intact
from dblightning.distributed import DDP, Ranks
from tests import launching
from tests.distributed_fit import run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "cluster.md"
LATEST = {"buffer_size": None}
RUNS: list[dict[str, Any]] = [
    {"name": "plain", "settings": LATEST, "validate": 3},
    {"name": "replay", "settings": {"buffer_size": 32}},  # two rollouts of 4 trajectories of 4 steps
    {"name": "raises", "trouble": {"how": "raise"}},
    {"name": "unavailable", "trouble": {"how": "unavailable"}},
    {"name": "one without rewards", "trouble": {"how": "nan", "call": 1}},
    {"name": "fewer prompts than ranks", "validate": 1},
    {"name": "killed", "trouble": {"how": "kill"}},
]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two ranks ended with, by run; the runs follow one another in the same two processes, and the last one's
    second rank is killed."""
    out = tmp_path_factory.mktemp("two")
    codes = launching.finish(out, RUNS, processes=2)
    assert codes == [0, -9], "\n".join((out / f"log{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    killed = {"killed": [launching.ended(out, "killed", 0)]}
    return killed | {run["name"]: [launching.ended(out, run["name"], rank) for rank in (0, 1)] for run in RUNS[:-1]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process with the batches of two ended with."""
    out = tmp_path_factory.mktemp("one")
    twice = {"policy_batch_size": 8, "value_batch_size": 16}
    return {
        "plain": run(out, "plain", batch_size=8, validate=3, settings=twice | LATEST),
        "replay": run(out, "replay", batch_size=8, settings=twice | {"buffer_size": 64}),
    }


@pytest.mark.parametrize("name", ["plain", "replay"])
def test_two_ranks_train_the_adapter_that_one_process_with_twice_the_batch_trains(
    fits: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    steps, expected = fits[name][0]["steps"], alone[name]["steps"]
    assert len(steps) == 3 * (2 + 2)  # three rollouts of two value and two policy steps
    assert expected[-1].norm() > 0.1
    # 1e-6: float32; the two sum the same gradients in another order
    assert ((steps - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all()
    for key, tensor in alone[name]["trained"].items():
        torch.testing.assert_close(fits[name][0]["trained"][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "replay", "one without rewards"])
def test_the_adapter_is_the_same_to_the_bit_on_all_ranks_after_every_step(fits: dict[str, Any], name: str) -> None:
    first, second = fits[name]
    assert torch.equal(first["steps"], second["steps"])
    launching.assert_equal(first["trained"], second["trained"])
    launching.assert_equal(first["optimizers"], second["optimizers"])
    assert len(first["steps"].unique(dim=0)) > 4


def test_ranks_roll_out_prompts_and_noise_of_their_own(fits: dict[str, Any]) -> None:
    start = torch.cat([each["replay"]["latents"][:, 0] for each in fits["plain"]]).flatten(1)
    assert len(torch.unique(start, dim=0)) == len(start) == 8


def test_logged_values_are_of_all_ranks(fits: dict[str, Any], alone: dict[str, Any]) -> None:
    for name in ("train/reward", "train/reward_std", "train/value_loss", "train/kl", "train/kl_weight", "val/reward"):
        for rank in (0, 1):
            # 1e-5: means of float32 values in another order
            assert fits["plain"][rank]["metrics"][name] == pytest.approx(alone["plain"]["metrics"][name], rel=1e-5)


def test_a_reward_that_raises_on_one_rank_stops_all_and_is_named(fits: dict[str, Any]) -> None:
    other, failed = (each["error"] for each in fits["raises"])
    assert failed == "RuntimeError: no scorer today"
    assert other.startswith("RankError")
    assert "rank 1: RuntimeError: no scorer today" in other


def test_a_reward_unavailable_to_one_rank_stops_all_with_the_state_before_the_rollout_saved(
    fits: dict[str, Any],
) -> None:
    for each in fits["unavailable"]:
        assert each["error"].startswith("RewardUnavailable: rollout 2: no answer from the scorer. The state before")
        saved = Path(re.findall(r"saved in (\S+)", each["error"])[0])
        assert read_intact(saved)["dblightning"]["rollouts_done"] == 1


def test_a_rank_whose_first_rewards_are_all_nan_goes_on_with_the_others(fits: dict[str, Any]) -> None:
    for each in fits["one without rewards"]:
        assert each["counts"][:2] == [3, 24]


def test_fewer_prompts_than_ranks_are_refused_on_every_rank(fits: dict[str, Any]) -> None:
    for each in fits["fewer prompts than ranks"]:
        assert "fewer images than there are processes" in each["error"]


def test_a_killed_rank_is_named_and_the_others_stop(fits: dict[str, Any]) -> None:
    assert "rank 1 of 2 was killed, crashed or hangs" in fits["killed"][0]["error"]


def test_one_process_exchanges_with_itself() -> None:
    ranks = Ranks()
    assert (ranks.size, ranks.rank, ranks.gather("it")) == (1, 0, ["it"])
    parameter = torch.zeros(2, requires_grad=True)
    ranks.average_gradients([parameter])
    assert parameter.grad is None
    with pytest.raises(KeyError, match="mine"), ranks.together("work"):
        raise KeyError("mine")


def test_the_timeout_is_a_setting_in_seconds() -> None:
    assert DDP(timeout_s=90)._timeout == timedelta(seconds=90)
    with pytest.raises(ValueError, match="timeout_s must be > 0"):
        DDP(timeout_s=0)


@pytest.mark.slow
def test_the_documented_two_node_command_trains_one_adapter_on_both(tmp_path: Path) -> None:
    """Two torchrun agents on this machine, each with a loopback address of its own, by the line of docs/cluster.md."""
    line = next(
        line.strip() for line in DOCS.read_text().splitlines() if line.strip().startswith("torchrun --nnodes 2")
    )
    words = line.split(" -m dblightning fit ")[0].replace("NODE0:29400", f"127.0.0.1:{launching.free_port()}").split()
    words[words.index("--nproc-per-node") + 1] = "1"
    script = [str(ROOT / "tests" / "distributed_fit.py"), str(tmp_path), json.dumps([{"name": "run", "num_nodes": 2}])]
    here = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words[1:], "--local-addr", address, *script],
            cwd=ROOT, env={**os.environ, **here},
        )
        for address in ("127.0.0.1", "127.0.0.2")
    ]  # fmt: skip
    assert [node.wait(timeout=500) for node in nodes] == [0, 0]
    first, second = (launching.ended(tmp_path, "run", rank) for rank in (0, 1))
    assert first["counts"] == [3, 24, 1, 12]
    assert torch.equal(first["steps"], second["steps"])
    assert not torch.equal(first["replay"]["latents"], second["replay"]["latents"])
