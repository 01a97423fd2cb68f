"""A run that was stopped and resumed ends as one that never stopped: to the last bit, however it was stopped."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from dblightning.checkpointing import PREEMPTED, Preempted, latest_intact
from tests import launching
from tests.distributed_fit import run

#: two epochs of three rollouts, with replay, a moving KL weight and a validation at each epoch's end
RUN: dict[str, Any] = {"epochs": 2, "rollouts_per_epoch": 3, "validate": 3, "settings": {"buffer_size": 32}}
ROLLOUTS, STEPS = 6, 6 * 4  # four optimiser steps a rollout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The uninterrupted run: its folder, and what it ended with."""
    out = tmp_path_factory.mktemp("whole")
    ended = run(out, "run", **RUN)
    assert ended["counts"] == [ROLLOUTS, 24, 2, STEPS]
    return out, ended


def adapter(out: Path, name: str = "run") -> bytes:
    return (out / name / "adapter.safetensors").read_bytes()


#: in the first rollout, at an epoch's end, in the last but one; the others are slow
SIGNALS: list[Any] = [("SIGTERM", after) for after in (0, 2, ROLLOUTS - 2)] + [("SIGUSR1", 1)]
SIGNALS += [pytest.param("SIGTERM", after, marks=pytest.mark.slow) for after in (1, 3)]


@pytest.mark.parametrize(("name", "after"), SIGNALS)
def test_a_signal_saves_at_the_rollouts_end_and_the_resumed_run_is_identical(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], name: str, after: int
) -> None:
    signals = {"name": name, "rank": 0, "after": after}
    with pytest.raises(Preempted, match=f"stopped by {name} after rollout {after + 1}") as stop:
        run(tmp_path, "run", **RUN, signals=signals, every_n_rollouts=100)
    assert stop.value.code == PREEMPTED == 75
    saved = latest_intact(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == f"rollout-{after + 1:06d}.ckpt"
    launching.assert_same_end(run(tmp_path, "run", **RUN, resume=True), whole[1])
    assert adapter(tmp_path) == adapter(whole[0])
    assert launching.curves(tmp_path, "run") == launching.curves(whole[0], "run")


def test_a_signal_in_the_last_rollout_lets_the_run_end(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    ended = run(tmp_path, "run", **RUN, signals={"name": "SIGTERM", "rank": 0, "after": ROLLOUTS - 1})
    launching.assert_same_end(ended, whole[1])


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    run(tmp_path, "run", **(RUN | {"epochs": 1}))
    launching.assert_same_end(run(tmp_path, "run", **RUN, resume=True), whole[1])
    assert launching.curves(tmp_path, "run") == launching.curves(whole[0], "run")


def test_the_kl_weight_moved_and_curves_reach_the_end(whole: tuple[Path, dict[str, Any]]) -> None:
    """So that the comparisons above compare something."""
    curves = launching.curves(whole[0], "run")
    assert sorted(curves) == [*range(ROLLOUTS)]
    assert len({curves[step]["train/kl_weight"] for step in curves}) == ROLLOUTS
    assert ["val/reward" in curves[step] for step in curves] == [True, False, True, False, False, True]


def killed_and_resumed(out: Path, at_step: int, processes: int, seed: int = 0) -> None:
    """Kill a process with SIGKILL inside an optimiser step, then resume; everything in folder ``out``."""
    signals = {"name": "SIGKILL", "rank": seed % processes, "at_step": at_step}
    codes = launching.finish(out, [{"name": "run", **RUN, "signals": signals}], processes)
    assert codes[seed % processes] == -signal.SIGKILL
    done = at_step // 4
    saved = latest_intact(out / "run" / "checkpoints")
    # saved every second rollout, so a kill costs less than two
    assert (saved.name if saved else "none") == (f"rollout-{done - done % 2:06d}.ckpt" if done >= 2 else "none")
    codes = launching.finish(out, [{"name": "run", **RUN, "resume": True}], processes)
    assert codes == [0] * processes


def test_a_killed_run_resumes_to_the_same_adapter(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    step = random.SystemRandom().randrange(STEPS)
    killed_and_resumed(tmp_path, step, processes=1)
    launching.assert_same_end(launching.ended(tmp_path, "run"), whole[1])
    assert adapter(tmp_path) == adapter(whole[0]), f"killed in step {step}"
    assert launching.curves(tmp_path, "run") == launching.curves(whole[0], "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_of_ten_killed_runs_resume_to_the_same_adapter(tmp_path: Path, processes: int) -> None:
    (tmp_path / "whole").mkdir()
    assert launching.finish(tmp_path / "whole", [{"name": "run", **RUN}], processes) == [0] * processes
    for attempt in range(10):
        out = tmp_path / str(attempt)
        out.mkdir()
        step = random.SystemRandom().randrange(STEPS)
        killed_and_resumed(out, step, processes, seed=attempt)
        assert adapter(out) == adapter(tmp_path / "whole"), f"killed in step {step}"
        for rank in range(processes):
            launching.assert_same_end(
                launching.ended(out, "run", rank), launching.ended(tmp_path / "whole", "run", rank)
            )
        assert launching.curves(out, "run") == launching.curves(tmp_path / "whole", "run")


def test_two_ranks_stop_together_when_one_is_signalled_and_resume_identically(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {"name": "whole", **RUN},
        {"name": "stopped", **RUN, "signals": {"name": "SIGUSR1", "rank": 1, "after": 1}, "label": "first"},
        {"name": "stopped", **RUN, "resume": True},
    ]
    assert launching.finish(tmp_path, runs, processes=2) == [0, 0]
    for rank in (0, 1):
        assert "stopped by SIGUSR1 after rollout 2" in launching.ended(tmp_path, "stopped", rank, "first")["error"]
        launching.assert_same_end(launching.ended(tmp_path, "stopped", rank), launching.ended(tmp_path, "whole", rank))
    assert adapter(tmp_path, "stopped") == adapter(tmp_path, "whole")
    assert launching.curves(tmp_path, "stopped") == launching.curves(tmp_path, "whole")


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    import torch

    from dblightning.checkpointing import read_intact, serialized, write_atomically

    run(tmp_path, "run", **(RUN | {"epochs": 1}))
    file = latest_intact(tmp_path / "run" / "checkpoints")
    assert file is not None
    state = read_intact(file)
    state["dblightning"]["ranks"] *= 2
    write_atomically(serialized(state), file)
    with pytest.raises(ValueError, match="saved by 2 processes and this run has 1"):
        run(tmp_path, "run", **RUN, resume=True)
    assert torch.is_tensor(state["state_dict"]["adapter.shift"])
