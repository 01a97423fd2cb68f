"""A stop signal in ``test`` and ``predict``: the exit code of an interrupted run, and nothing made twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
from torch import Tensor

from dblightning.backbone import DiffusersBackbone
from dblightning.checkpointing import PREEMPTED, Preempted
from dblightning.data import PromptFileDataModule
from dblightning.evaluation import BlendEvaluationModule, BlendSpec
from dblightning.rewards import JPEGCompressibility
from tests.toy_fit import data, module, trainer


class Interrupting(JPEGCompressibility):
    """Sends this process a signal while it scores its nth batch; 0 never does."""

    def __init__(self, after: int = 0, name: str = "SIGTERM") -> None:
        super().__init__(scale_kb=0.01, offset_kb=1.0)
        self._after, self._name, self._calls = after, name, 0  # private: no setting of the reward

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self._calls += 1
        if self._calls == self._after:
            os.kill(os.getpid(), signal.Signals[self._name])
        return super()._score(images, prompts)


def evaluation(folder: Path, out: Path, reward: JPEGCompressibility) -> BlendEvaluationModule:
    return BlendEvaluationModule(
        DiffusersBackbone(str(folder)), blends=[BlendSpec("base")],
        rewards={"size": reward}, num_inference_steps=1, guidance_scale=1.0, out=str(out),
    )  # fmt: skip


def run(command: str, evaluated: BlendEvaluationModule, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green heart\n")
    given = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    options: dict[str, Any] = {"verbose": False} if command == "test" else {"return_predictions": False}
    getattr(given, command)(evaluated, datamodule=PromptFileDataModule(str(prompts), eval_batch_size=1), **options)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stopped_test_exits_as_interrupted_and_resumes_to_the_same_table(
    sd15_folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.Signals[name])
    with pytest.raises(Preempted, match=f"stopped by {name}: the rows so far are in .*resumes") as stop:
        run("test", evaluation(sd15_folder, tmp_path / "out", Interrupting(2, name)), tmp_path)
    assert stop.value.code == PREEMPTED == 75
    assert f"stopped by {name}" in capsys.readouterr().err
    assert signal.getsignal(signal.Signals[name]) == before
    # the batch in which the signal came is kept
    assert sum(file.read_text().count("\n") for file in (tmp_path / "out" / "rows").glob("*.jsonl")) == 2
    assert not (tmp_path / "out" / "scores.parquet").exists()
    resumed = Interrupting()
    run("test", evaluation(sd15_folder, tmp_path / "out", resumed), tmp_path)
    assert resumed._calls == 1
    run("test", evaluation(sd15_folder, tmp_path / "whole", Interrupting()), tmp_path)
    found, expected = (pd.read_parquet(tmp_path / out / "scores.parquet") for out in ("out", "whole"))
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True)


def test_a_stopped_predict_exits_as_interrupted(
    sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = evaluation(sd15_folder, tmp_path / "out", Interrupting())
    generate = evaluated.sampler.generate

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments)

    monkeypatch.setattr(evaluated.sampler, "generate", interrupted)
    with pytest.raises(Preempted):
        run("predict", evaluated, tmp_path)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def test_a_stopped_validation_of_a_checkpoint_exits_as_interrupted(tmp_path: Path) -> None:
    class Stopped(L.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        trainer(tmp_path, limit_val_batches=1.0, callbacks=[Stopped()]).validate(module(), datamodule=data(tmp_path))
