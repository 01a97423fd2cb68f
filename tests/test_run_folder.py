"""One run per folder: locks that the dead do not hold, and refusals that leave everything as it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from dblightning import cli
from dblightning.callbacks import BeforeAfterGrid, ExportAdapter
from dblightning.checkpointing import RunCheckpoint, latest_intact
from dblightning.run_folder import FolderInUseError, FolderLock, RunGuard
from tests.toy_fit import fit, module
from tests.toy_rewards import LinearReward

# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_place_is_locked_once_and_free_again_after_its_release(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on {socket.gethostname()}.*another folder"):
        second.acquire()
    FolderLock(tmp_path / "other").acquire()  # another place in the same folder
    second.release()  # takes nothing away from the first
    with pytest.raises(FolderInUseError):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert not list(tmp_path.glob(".run.lock*"))


def _lock_and_die(place: Path) -> None:
    FolderLock(place).acquire()
    os._exit(9)


def test_a_process_that_died_does_not_block_the_place(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_lock_and_die, args=(tmp_path / "run",))
    child.start()
    child.join()
    assert (tmp_path / ".run.lock").exists()
    FolderLock(tmp_path / "run").acquire()


def test_another_process_under_a_dead_ones_id_does_not_block_the_place(tmp_path: Path) -> None:
    FolderLock(tmp_path / "run").acquire()
    owner = json.loads((tmp_path / ".run.lock").read_text())
    (tmp_path / ".run.lock").write_text(json.dumps(owner | {"started": "1"}))
    FolderLock(tmp_path / "run").acquire()


def test_another_machines_lock_holds_while_its_owner_gives_signs_of_life(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"

    def elsewhere() -> None:
        path.write_text(json.dumps({"host": "elsewhere", "processes": "", "pid": 1, "started": "1", "since": "noon"}))

    elsewhere()
    FolderLock(tmp_path / "run", silence_s=0.2).acquire()  # silent, so dead
    elsewhere()
    ended = threading.Event()

    def alive() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=alive)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="process 1 on elsewhere, since noon"):
            FolderLock(tmp_path / "run", silence_s=5.0).acquire()
    finally:
        ended.set()
        thread.join()


def test_of_many_that_find_a_dead_owner_one_gets_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "started": "no"}))
    got: list[FolderLock] = []
    start = threading.Barrier(8)

    def take() -> None:
        lock = FolderLock(tmp_path / "run", silence_s=0.1)
        start.wait()
        try:
            lock.acquire()
        except FolderInUseError:
            return
        got.append(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


# ── a fit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def saver(tmp_path: Path) -> dict[str, Any]:
    return {"callbacks": [RunCheckpoint(str(tmp_path / "saved"), every_n_rollouts=1)]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_run_in_the_same_folder_is_refused_with_what_differs_and_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, module(), **saver(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the same settings; --ckpt_path auto resumes it, --overwrite replaces it"):
        fit(tmp_path, module(), **saver(tmp_path))
    with pytest.raises(ValueError, match="reward was 'LinearReward' and is 'Other', optimisation.learning_rate was"):
        fit(tmp_path, module(type("Other", (LinearReward,), {})(), learning_rate=0.04), **saver(tmp_path))
    assert contents(tmp_path) == before
    resumed = module()
    fit(tmp_path, resumed, str(latest_intact(tmp_path / "saved")), max_epochs=2, **saver(tmp_path))
    assert resumed.rollouts_done == 6


def test_overwriting_removes_the_earlier_runs_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, module(), max_epochs=3, **saver(tmp_path))
    guarded = [RunGuard(overwrite=True), *saver(tmp_path)["callbacks"]]
    fit(tmp_path, module(), callbacks=guarded)
    names = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert names == ["rollout-000002.ckpt", "rollout-000003.ckpt"]


def test_a_fit_while_another_one_writes_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    other = FolderLock(tmp_path / "saved")
    other.acquire()
    with pytest.raises(FolderInUseError, match="writes to .*saved"):
        fit(tmp_path, module(), **saver(tmp_path))
    other.release()
    fit(tmp_path, module(), **saver(tmp_path))
    assert not list(tmp_path.glob(".*.lock"))


def test_the_locks_are_released_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="every reward"):
        fit(tmp_path, module(LinearReward(float("nan"))), **saver(tmp_path))
    assert not list(tmp_path.glob(".*.lock"))


def test_files_that_a_killed_process_had_begun_are_removed(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for name in ("rollout-000001.ckpt.123.part", "rollout-000001.rank1.0abc.shard.124.part", "mine.part"):
        (tmp_path / "saved" / name).write_text("cut")
    fit(tmp_path, module(), **saver(tmp_path))
    assert [file.name for file in (tmp_path / "saved").glob("*.part")] == ["mine.part"]


def test_a_trainer_that_goes_on_fitting_may_replace_its_own_files(tmp_path: Path) -> None:
    run = module()
    given = fit(tmp_path, run, **saver(tmp_path))
    given.fit_loop.max_epochs = 2
    given.fit(run, datamodule=given.datamodule)  # type: ignore[attr-defined]
    assert run.rollouts_done == 6


def test_adapter_picture_and_table_of_an_earlier_run_stay(backbone: Any, tmp_path: Path) -> None:
    """Each is refused for itself; the adapter tells its settings."""
    from dblightning.module import RewardRLModule
    from dblightning.rewards import JPEGCompressibility
    from tests.toy_fit import data, trainer

    run = RewardRLModule(backbone, JPEGCompressibility(offset_kb=0.5, scale_kb=0.1), num_inference_steps=2, rank=2)
    folder = tmp_path / "adapter"
    run.export_adapter(str(folder))
    (tmp_path / "picture.png").write_text("a picture")
    table = CSVLogger(str(tmp_path), "log", version="")
    table.log_metrics({"a": 1.0}, 0)
    table.save()
    run.hparams["sampling"]["num_inference_steps"] = 3
    for callbacks, logger, message in (
        ([ExportAdapter(str(folder))], False, "pytorch_lora_weights.*num_inference_steps was 2 and is 3"),
        ([BeforeAfterGrid(path=str(tmp_path / "picture.png"))], False, "picture.png would be replaced.*unknown"),
        ([], CSVLogger(str(tmp_path), "log", version=""), "metrics.csv would be replaced"),
    ):
        prompts = data(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callbacks=callbacks, logger=logger).fit(run, datamodule=prompts)
        assert contents(tmp_path) == before


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    log = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "log", "version": ""},
    }
    config: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": log, "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1, "enable_model_summary": False},
        "model": {"backbone": {"class_path": "tests.toy.GaussianBackbone"},
                  "reward": {"class_path": "tests.toy_rewards.LinearReward"}, "num_inference_steps": 2,
                  "guidance_scale": 1.0, "policy_steps": 1, "value_batch_size": 4},
        "data": {"class_path": "dblightning.data.PromptFileDataModule",
                 "init_args": {"train_file": str(tmp_path / "prompts.txt"), "batch_size": 2, "rollouts_per_epoch": 2}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(tmp_path / "run.yaml")]


def test_the_command_line_refuses_resumes_and_overwrites(command: list[str], tmp_path: Path) -> None:
    cli.main(command)
    log = tmp_path / "log"
    before = contents(log)
    assert "config.yaml" in before
    for repeated in (command, [*command, "--model.learning_rate", "0.5"]):
        with pytest.raises(ValueError, match="--overwrite replaces it"):
            cli.main(repeated)
        assert contents(log) == before
    cli.main([*command, "--ckpt_path", "auto", "--trainer.max_epochs", "2"])
    newest = log / "checkpoints" / "rollout-000004.ckpt"
    assert torch.load(newest, weights_only=True)["dblightning"]["rollouts_done"] == 4
    table = pd.read_csv(log / "metrics.csv")  # a resumed run adds to its curves
    assert table["step"][table["train/reward"].notna()].tolist() == [0, 1, 2, 3]
    cli.main([*command, "--overwrite", "--model.learning_rate", "0.5"])
    assert [file.name for file in (log / "checkpoints").iterdir()] == ["rollout-000002.ckpt"]
    saved = yaml.safe_load((log / "config.yaml").read_text())
    assert (saved["model"]["optimisation"]["learning_rate"], saved["overwrite"]) == (0.5, False)
