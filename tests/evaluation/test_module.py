"""The ``test`` command: rows that survive a kill, and that do not depend on the number of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dblightning.backbone import DiffusersBackbone
from dblightning.data import PromptFileDataModule
from dblightning.evaluation import BlendEvaluationModule, BlendSpec, BlendSweep
from dblightning.evaluation.module import ImageKey
from dblightning.evaluation.scores import read_scores
from dblightning.rewards import JPEGCompressibility
from tests.conftest import randomize

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a blue star", "a green heart", "a pink moon", "a black ring"]


@pytest.fixture
def adapters(sd15_folder: Path, tmp_path: Path) -> dict[str, str]:
    backbone = DiffusersBackbone(str(sd15_folder))
    for seed, name in enumerate(["size", "other"]):
        backbone.adapters.add(name, seed=seed)
        randomize(backbone.adapters, name, seed)
        backbone.adapters.export(name, tmp_path / name, backbone.pipeline)
    return {name: str(tmp_path / name) for name in ("size", "other")}


@pytest.fixture
def config(sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    jpeg = "dblightning.rewards.JPEGCompressibility"
    settings: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                    "enable_model_summary": False, "default_root_dir": str(tmp_path)},
        "model": {
            "backbone": {"class_path": "dblightning.backbone.DiffusersBackbone",
                         "init_args": {"pretrained": str(sd15_folder)}},
            "num_inference_steps": 2, "guidance_scale": 1.0, "adapters": adapters, "out": str(tmp_path / "out"),
            "rewards": {"size": {"class_path": jpeg, "init_args": {"scale_kb": 0.01, "offset_kb": 1.0}},
                        "other": {"class_path": jpeg, "init_args": {"quality": 60, "scale_kb": 0.01}}},
            "blends": [{"method": "base"}],
            "sweeps": [{"methods": ["db-mpa", "db-mpa-ls", "rewarded-soup"], "names": ["size", "other"],
                        "weights": [0.2, 0.7]}],
        },
        "data": {"class_path": "dblightning.data.PromptFileDataModule",
                 "init_args": {"train_file": str(tmp_path / "prompts.txt"), "eval_batch_size": 3, "eval_seeds": 3}},
    }  # fmt: skip
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(config: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dblightning", "test", "--config", str(config), *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output.decode()
    return output.decode()


def module(folder: Path, tmp_path: Path, adapters: dict[str, str], **settings: Any) -> BlendEvaluationModule:
    rewards: Any = {
        "size": JPEGCompressibility(scale_kb=0.01, offset_kb=1.0),
        "other": JPEGCompressibility(quality=60, scale_kb=0.01),
    }
    sweep = BlendSweep(["db-mpa"], ["size", "other"], [0.2, 0.7])
    defaults: dict[str, Any] = {
        "blends": [BlendSpec("base")], "sweeps": [sweep], "out": str(tmp_path / "out"), "adapters": adapters,
        "num_inference_steps": 2, "guidance_scale": 1.0,
    }  # fmt: skip
    return BlendEvaluationModule(DiffusersBackbone(str(folder)), rewards=rewards, **(defaults | settings))


TRAINER = ("limit_test_batches", "fast_dev_run", "callbacks")


def run(
    evaluation: BlendEvaluationModule,
    tmp_path: Path,
    prompts: list[str] = PROMPTS,
    read: bool = True,
    **options: Any,
) -> pd.DataFrame:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    settings = {"eval_batch_size": 4, "eval_seeds": 2} | {k: v for k, v in options.items() if k not in TRAINER}
    ours = {name: value for name, value in options.items() if name in TRAINER}
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, **ours)
    trainer.test(evaluation, datamodule=PromptFileDataModule(str(tmp_path / "prompts.txt"), **settings), verbose=False)
    return pd.read_parquet(evaluation.out / "scores.parquet") if read else pd.DataFrame()


def lines(out: Path) -> int:
    return sum(file.read_text().count("\n") for file in (out / "rows").glob("*.jsonl"))


@pytest.mark.slow  # three processes; test_an_interrupted_evaluation… stops one in this process
def test_a_killed_evaluation_goes_on_to_the_table_of_an_unbroken_one(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = start(config, "--model.out", str(whole))
    process = start(config, "--model.out", str(broken))
    deadline = time.monotonic() + 200
    while lines(broken) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = lines(broken)
    assert not (broken / "scores.parquet").exists()
    finish(unbroken)
    (file,) = (broken / "rows").glob("*.jsonl")
    with file.open("a") as torn:  # as if it had died in the middle of a line
        torn.write('{"blend": "base", "prompt_id": 4, "se')
    finish(start(config, "--model.out", str(broken)))
    expected, found = (pd.read_parquet(out / "scores.parquet") for out in (whole, broken))
    assert len(expected) == 7 * len(PROMPTS) * 3
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True)
    assert lines(broken) == len(expected)  # nothing was made twice
    assert 10 <= killed_at < len(expected)


@pytest.mark.slow
def test_two_processes_make_the_rows_of_one(config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(config, "--model.out", str(one))
    shared = start(config, "--model.out", str(two), "--trainer.devices", "2", "--trainer.strategy", "ddp")
    finish(alone)
    finish(shared)
    assert {file.name[:5] for file in (two / "rows").glob("*.jsonl")} == {"00000", "00001"}
    expected, found = (pd.read_parquet(out / "scores.parquet") for out in (one, two))
    rewards = [name for name in expected if name.startswith("reward/")]
    drop = ["seconds", "thumbnail", *rewards]
    pd.testing.assert_frame_equal(found.drop(columns=drop), expected.drop(columns=drop), check_exact=True)
    # other batches, so other rounding before the JPEG's 8 bits: a pixel of 768 may turn over, a byte or two of 600
    assert (found[rewards] - expected[rewards]).abs().to_numpy().max() <= 0.6


def test_more_blends_and_seeds_make_only_what_is_new(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    run(module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path, eval_seeds=1)
    first = lines(tmp_path / "out")
    sweep = BlendSweep(["rewarded-soup"], ["size", "other"], [0.5])
    scores = run(module(sd15_folder, tmp_path, adapters, sweeps=[sweep]), tmp_path, eval_seeds=1)
    assert (first, lines(tmp_path / "out")) == (5, 10)
    assert scores["blend"].unique().tolist() == ["base", "rewarded-soup_other-0.5_size-0.5"]
    fewer = run(module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path, eval_seeds=1)
    assert fewer["blend"].unique().tolist() == ["base"]  # what is there already and was not requested stays out


def test_rows_of_another_adapter_or_setting_are_not_mixed_in(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    run(module(sd15_folder, tmp_path, adapters), tmp_path)
    with pytest.raises(ValueError, match="another adapter 'size'"):
        run(module(sd15_folder, tmp_path, adapters | {"size": adapters["other"]}), tmp_path)
    with pytest.raises(ValueError, match="run_seed was 0 and is 1"):
        run(module(sd15_folder, tmp_path, adapters, seed=1), tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_edited_prompt_file_is_refused_with_the_prompt_and_nothing_is_sampled_or_written(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path)
    before = contents(tmp_path / "out")
    edited = module(sd15_folder, tmp_path, adapters, sweeps=[])
    monkeypatch.setattr(edited.sampler, "score", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="prompt 3 was 'a pink moon' and is 'a pink sun'; set another --model.out"):
        run(edited, tmp_path, prompts=[*PROMPTS[:3], "a pink sun", *PROMPTS[4:]])
    with pytest.raises(ValueError, match=r"prompt 1 was 'a blue star' and is 'a green heart' \(and 2 more\)"):
        run(edited, tmp_path, prompts=[PROMPTS[0], *PROMPTS[2:]])  # one left out: the others move up
    assert contents(tmp_path / "out") == before
    more = run(module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path, prompts=[*PROMPTS, "a new one"])
    assert more["prompt"].nunique() == 6
    assert lines(tmp_path / "out") == 12 + 2  # the batch of 4 that the new prompt came into was made whole


def test_an_oracle_with_another_adapter_is_refused_or_labelled_apart(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    """The label of an oracle does not name its adapter; its rows must not be another adapter's all the same."""
    oracles = [BlendSpec("morl", {"size": 0.5, "other": 0.5}, adapter=name) for name in ("size", "other")]
    run(module(sd15_folder, tmp_path, adapters, blends=oracles[:1], sweeps=[]), tmp_path)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="blend 'morl_other-0.5_size-0.5': its adapter was 'size' and is 'other'"):
        run(module(sd15_folder, tmp_path, adapters, blends=oracles[1:], sweeps=[]), tmp_path)
    assert contents(tmp_path / "out") == before
    both = run(module(sd15_folder, tmp_path, adapters, blends=oracles, sweeps=[]), tmp_path)
    assert both.groupby("blend")["adapter"].unique().map(list).to_dict() == {
        "morl_other-0.5_size-0.5_size": ["size"], "morl_other-0.5_size-0.5_other": ["other"]
    }  # fmt: skip
    first, second = (part["thumbnail"].tolist() for _, part in both.groupby("order"))
    assert first != second
    singles = [BlendSpec("single", {name: 1.0}) for name in ("size", "other")]
    alone = run(module(sd15_folder, tmp_path, adapters, blends=singles, sweeps=[], out=str(tmp_path / "b")), tmp_path)
    assert [first, second] == [part["thumbnail"].tolist() for _, part in alone.groupby("order")]


def test_another_base_model_or_precision_under_the_same_name_is_refused(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    run(module(sd15_folder, tmp_path, adapters), tmp_path)
    changed = module(sd15_folder, tmp_path, adapters)
    with torch.no_grad():
        next(iter(changed.backbone.vae.parameters())).add_(0.01)  # type: ignore[operator]
    with pytest.raises(ValueError, match="made_with.base_weights was"):
        run(changed, tmp_path)
    scheduled = module(sd15_folder, tmp_path, adapters)
    scheduled.backbone.pipeline.scheduler.register_to_config(beta_end=0.02)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match=r"made_with.scheduler.beta_end was .* and is 0.02"):
        run(scheduled, tmp_path)


def test_a_larger_limit_makes_only_what_is_new(sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]) -> None:
    made = []
    for limit in (2, 4):
        scores = run(
            module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path, limit_test_prompts=limit, eval_batch_size=2
        )
        made.append((len(scores), lines(tmp_path / "out")))
        assert all(PROMPTS[row.prompt_id] == row.prompt for row in scores.itertuples())
    assert made == [(4, 4), (8, 8)]


class StopAfter(L.Callback):
    """What Lightning does in the loop after a SIGTERM."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_test_batch_end(self, *arguments: Any, batch_idx: int = 0, **_: Any) -> None:
        self.batches -= 1
        if not self.batches:
            raise SIGTERMException


def test_an_interrupted_evaluation_writes_no_table_and_resumes_to_the_whole_one(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    whole = run(module(sd15_folder, tmp_path, adapters, out=str(tmp_path / "whole")), tmp_path)
    broken = module(sd15_folder, tmp_path, adapters)
    with contextlib.suppress(SystemExit):
        run(broken, tmp_path, callbacks=[StopAfter(1)], read=False)
    out = tmp_path / "out"
    assert 0 < lines(out) < len(whole)
    assert {file.name for file in out.iterdir()} == {"rows", "images"}
    with pytest.raises(RuntimeError, match="holds 12 of the 30 rows"):
        broken.table({ImageKey(i, prompt, seed) for i, prompt in enumerate(PROMPTS) for seed in range(2)})
    resumed = run(module(sd15_folder, tmp_path, adapters), tmp_path)
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True)


def test_fast_dev_run_writes_nothing(sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]) -> None:
    run(module(sd15_folder, tmp_path, adapters), tmp_path, fast_dev_run=True, read=False)
    evaluation = module(sd15_folder, tmp_path, adapters)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, fast_dev_run=True)
    trainer.predict(evaluation, PromptFileDataModule(str(tmp_path / "prompts.txt")), return_predictions=False)
    assert not (tmp_path / "out").exists()


def test_a_limit_on_batches_is_reported_and_recorded(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run(module(sd15_folder, tmp_path, adapters, sweeps=[]), tmp_path, limit_test_batches=1)
    assert len(scores) == 4
    assert "limit_test_batches: 4 of 10 images with each blend" in capsys.readouterr().out
    _, record = read_scores(tmp_path / "out" / "scores.parquet")
    assert record["images"] == {"scored": 4, "available": 10}


def test_images_of_another_run_are_not_written_over(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def predict(evaluation: BlendEvaluationModule) -> None:
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        trainer.predict(evaluation, PromptFileDataModule(str(tmp_path / "prompts.txt")), return_predictions=False)

    spec = BlendSpec("single", {"size": 1.0})
    predict(module(sd15_folder, tmp_path, adapters, blends=[spec], sweeps=[]))
    before = contents(tmp_path / "out")
    assert len(before) == 10
    predict(module(sd15_folder, tmp_path, adapters, blends=[spec], sweeps=[]))
    for settings, message in (
        ({"guidance_scale": 2.0}, "guidance_scale was 1.0 and is 2.0"),
        ({"adapters": adapters | {"size": adapters["other"]}}, "adapters.size was"),
    ):
        with pytest.raises(ValueError, match=f"holds images of another run: {message}"):
            predict(module(sd15_folder, tmp_path, **{"adapters": adapters, "blends": [spec], "sweeps": []} | settings))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1.*, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be .*, got nan"),
        ({"guidance_scale": -1.0}, "guidance_scale must be .*, got -1.0"),
        ({"eta": 1.5}, "eta must be .*, got 1.5"),
        ({"eta": float("nan")}, "eta must be .*, got nan"),
        ({"grid_prompts": -1}, "grid_prompts must be a whole number >= 0, got -1"),
        ({"blends": [BlendSpec("morl", {"size": 1.0}, float("nan"), adapter="size")]}, "kl_scale must be .*, got nan"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module(sd15_folder, tmp_path, adapters, **settings)
    assert not (tmp_path / "out").exists()


def test_factors_of_several_ranks_are_refused_at_construction(sd15_folder: Path, tmp_path: Path) -> None:
    """Not once the blends before them are sampled."""
    backbone = DiffusersBackbone(str(sd15_folder))
    for name, rank in (("size", 4), ("other", 2)):
        backbone.adapters.add(name, rank=rank)
    evaluation = BlendEvaluationModule(backbone, [BlendSpec("rewarded-soup", {"size": 0.5, "other": 0.5})])
    assert evaluation.blends
    with pytest.raises(ValueError, match=r"^rewarded-soup-factors_other-0.5_size-0.5: .* \[2, 4\]"):
        BlendEvaluationModule(backbone, [BlendSpec("rewarded-soup-factors", {"other": 0.5, "size": 0.5})])


def test_the_table_says_what_each_image_was_and_what_it_cost(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    code = BlendSpec("code", {"size": 1.0}, options={"candidates": 3, "block_size": 1, "form": "block"})
    scores = run(module(sd15_folder, tmp_path, adapters, blends=[BlendSpec("base"), code]), tmp_path)
    rows = scores.groupby("blend")["denoiser_rows"].unique().map(list).to_dict()
    assert rows["base"] == [2]  # one row per step
    assert rows["db-mpa_other-0.8_size-0.2"] == [4]  # one per step and adapter
    # one for the first step; the look at its three candidates is also the second step's prediction
    assert rows["code_size-1_block_size-1_candidates-3_form-block"] == [1 + 3]
    assert scores["prompt"].tolist()[:4] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert (scores["seconds"] > 0).all()
    assert scores.loc[scores["method"] == "db-mpa", "weight/size"].unique().tolist() == [0.2, 0.7]
    out = tmp_path / "out"
    for name in ("report.html", "pareto.png", "grid.png", "summary.csv"):
        assert (out / name).stat().st_size > 100, name
    assert (out / "images" / "base" / "0-0.png").exists()


def test_a_blend_without_its_adapter_stops_before_sampling(sd15_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs adapter 'size'"):
        module(sd15_folder, tmp_path, {})


def test_the_same_seeds_give_every_method_the_same_noise(
    sd15_folder: Path, tmp_path: Path, adapters: dict[str, str]
) -> None:
    """DB-KLA at λ = 0 is the base model, image by image."""
    kla = BlendSpec("db-kla", {"size": 1.0}, kl_scale=0.0)
    scores = run(module(sd15_folder, tmp_path, adapters, blends=[BlendSpec("base"), kla], sweeps=[]), tmp_path)
    base, scaled = (part["thumbnail"].tolist() for _, part in scores.groupby("method"))
    assert base == scaled
    assert len(set(base)) == len(base)
