from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dblightning import cli

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = sorted((ROOT / "callbacks").glob("*.yaml"))


def command_of(file: Path) -> str:
    """The subcommand that a config's first line names: ``# python -m dblightning <command> --config …``."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert "python -m dblightning " in first, f"{file} must start with the command that runs it"
    return first.split("python -m dblightning ")[1].split()[0]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_is_accepted_by_the_command_on_its_first_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command_of(file), "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    assert "model:" in capsys.readouterr().out


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.name)
def test_every_callback_preset_adds_to_a_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(ROOT / "configs/quickstart.yaml")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", run, "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    own = [each["class_path"] for each in yaml.safe_load(Path(run).read_text())["trainer"]["callbacks"]]
    added = [each["class_path"] for each in next(iter(yaml.safe_load(file.read_text())["trainer"].values()))]
    assert [each["class_path"] for each in printed["trainer"]["callbacks"]] == own + added


@pytest.fixture
def run_config(sd15_folder: Path, tmp_path: Path) -> list[str]:
    """The quickstart's config cut down to seconds, on a random-weight SD 1.5."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    config: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "logger": False,
                    "enable_checkpointing": False, "num_sanity_val_steps": 0, "default_root_dir": str(tmp_path)},
        "model": {
            "backbone": {
                "class_path": "dblightning.backbone.DiffusersBackbone",
                "init_args": {"pretrained": str(sd15_folder)},
            },
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
        },
        "data": {
            "class_path": "dblightning.data.PromptFileDataModule",
            "init_args": {"train_file": str(tmp_path / "prompts.txt"), "batch_size": 2, "rollouts_per_epoch": 1},
        },
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file)]


REWARD = ["--model.reward", "dblightning.rewards.JPEGCompressibility"]
TINY = ["--model.policy_steps", "1", "--model.gradient_accumulation", "1", "--model.value_batch_size", "4"]


def export(run_config: list[str], tmp_path: Path, name: str, seed: int) -> Path:
    """Train one rollout and export the adapter through the command line."""
    callbacks = [{"class_path": "dblightning.callbacks.ExportAdapter", "init_args": {"folder": str(tmp_path / name)}}]
    options = ["--model.adapter_name", name, "--model.seed", str(seed), "--trainer.callbacks", json.dumps(callbacks)]
    cli.main(["fit", *run_config, *REWARD, *TINY, *options])
    return tmp_path / name


def test_fit_exports_an_adapter_and_predict_blends_it(run_config: list[str], tmp_path: Path) -> None:
    adapters = {name: str(export(run_config, tmp_path, name, seed)) for name, seed in [("small", 1), ("large", 2)]}
    blends = [{"method": "db-mpa", "weights": {"small": 0.3, "large": 0.7}}, {"method": "base"}]
    out = tmp_path / "images"
    cli.main(
        ["predict", *run_config, "--model.adapters", json.dumps(adapters), "--model.blends", json.dumps(blends)]
        + ["--model.out", str(out)]
    )
    folder = out / "db-mpa_large-0.7_small-0.3"
    pngs = sorted(folder.glob("*.png"))
    assert [file.stem for file in pngs] == ["00000-a-red-circle-0", "00001-a-blue-star-0"]
    assert Image.open(pngs[0]).size == (16, 16)
    record = json.loads(pngs[0].with_suffix(".json").read_text())
    assert record["prompt"] == "a red circle"
    assert record["weights"] == {"small": 0.3, "large": 0.7}
    assert (record["num_inference_steps"], record["seed"], record["run_seed"]) == (2, 0, 0)
    assert record["adapters"]["small"]["reward"] == "JPEGCompressibility"
    assert len(list((out / "base").glob("*.png"))) == 2


def test_test_writes_scores_summary_and_figures(run_config: list[str], tmp_path: Path) -> None:
    import pandas as pd

    adapters = {"size": str(export(run_config, tmp_path, "size", 1))}
    blends = [{"method": "base"}, {"method": "db-kla", "weights": {"size": 1.0}, "kl_scale": 1.5}]
    rewards = {
        "size": {"class_path": "dblightning.rewards.JPEGCompressibility"},
        "size_75": {"class_path": "dblightning.rewards.JPEGCompressibility", "init_args": {"quality": 75}},
    }
    out = tmp_path / "scores"
    cli.main(
        ["test", *run_config, "--model.adapters", json.dumps(adapters), "--model.blends", json.dumps(blends)]
        + ["--model.rewards", json.dumps(rewards), "--model.out", str(out), "--data.eval_seeds", "2"]
    )
    scores = pd.read_parquet(out / "scores.parquet")
    assert len(scores) == 2 * 2 * 2
    assert set(scores["method"]) == {"base", "db-kla"}
    summary = pd.read_csv(out / "summary.csv")
    base = scores[scores["method"] == "base"]
    assert summary.loc[0, "reward/size"] == pytest.approx(base["reward/size"].mean(), abs=1e-4)
    for name in ("gain_by_strength.png", "grid.png"):
        assert Image.open(out / name).size[0] > 100


def test_predict_steers_with_code(run_config: list[str], tmp_path: Path) -> None:
    rewards = {"size": {"class_path": "dblightning.rewards.JPEGCompressibility"}}
    options = {"candidates": 3, "block_size": 1}
    blends = [{"method": "base"}, {"method": "code", "weights": {"size": 1.0}, "options": options}]
    out = tmp_path / "scores"
    cli.main(
        ["test", *run_config, "--model.blends", json.dumps(blends), "--model.rewards", json.dumps(rewards)]
        + ["--model.out", str(out), "--data.eval_seeds", "2", "--model.num_inference_steps", "4"]
    )
    import pandas as pd

    # the best of three candidates at each step makes smaller files than the base model's own trajectory
    assert pd.read_csv(out / "summary.csv").loc[1, "gain/size"] > 0
    with pytest.raises(ValueError, match="needs rewards"):
        cli.main(["predict", *run_config, "--model.blends", json.dumps(blends), "--model.out", str(out)])
    with pytest.raises(ValueError, match="candidate"):
        wrong = [{"method": "code", "weights": {"size": 1.0}, "options": {"candidate": 3}}]
        cli.main(
            ["predict", *run_config, "--model.blends", json.dumps(wrong), "--model.rewards", json.dumps(rewards)]
            + ["--model.out", str(out)]
        )


def test_an_unknown_option_is_refused_by_name(run_config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--model.kl_wieght", "0.1"], ["--data.batchsize", "3"], ["--model.objective", "dpo"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit", *run_config, *REWARD, *wrong])
        assert stop.value.code != 0
        assert wrong[0].split(".")[-1] in capsys.readouterr().err


def test_an_unknown_reward_is_refused_by_name(run_config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", *run_config, "--model.reward", "ImageRewrad"])
    assert "ImageRewrad" in capsys.readouterr().err


def test_a_missing_model_folder_is_refused_before_training(
    run_config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", *run_config, *REWARD, "--model.backbone.init_args.pretrained", "./nowhere"])
    assert "there is no ./nowhere" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no diffusers pipeline at 'nowhere'"):
        cli.main(["fit", *run_config, *REWARD, "--model.backbone.init_args.pretrained", "nowhere"])


def test_an_empty_prompt_file_is_refused_by_name(run_config: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        cli.main(["fit", *run_config, *REWARD, "--data.train_file", str(empty)])


def test_an_unknown_command_names_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="unknown command 'fti'.*predict"):
        cli.main(["fti"])


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    assert "python -m dblightning fit" in capsys.readouterr().out


def test_wrong_blends_stop_before_anything_is_sampled(
    run_config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = json.dumps({"small": str(export(run_config, tmp_path, "small", 1))})
    for blends, message in [
        ([{"method": "db-mpa", "weights": {"small": 0.5}}], "sum to 1"),
        ([{"method": "db-mpa", "weights": {"smal": 1.0}}], "'smal'"),
        ([{"method": "db-kla", "weights": {"small": 1.0}, "kl_scale": -1.0}], "kl_scale"),
        ([], "nothing to compare"),
    ]:
        # the weights' sum is checked at the door, names once the adapters are known
        with pytest.raises((SystemExit, ValueError)) as stop:
            cli.main(
                ["predict", *run_config, "--model.adapters", adapters, "--model.blends", json.dumps(blends)]
                + ["--model.out", str(tmp_path / "none")]
            )
        assert message in str(stop.value) + capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_is_resumed_from_the_command_line(run_config: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    callback = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder), "save_last": True, "save_top_k": 0},
    }
    options = [*run_config, *REWARD, *TINY, "--trainer.enable_checkpointing", "true"]
    options += ["--trainer.callbacks", json.dumps([callback])]
    cli.main(["fit", *options])
    cli.main(["fit", *options, "--ckpt_path", str(folder / "last.ckpt"), "--trainer.max_epochs", "3"])
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["dblightning"]["rollouts_done"] == 3


def test_a_stopped_run_exits_with_75_and_auto_resumes_it(
    run_config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing about checkpoints is in the config: saving is the default."""
    callback = {"class_path": "tests.distributed_fit.SignalAfter", "init_args": {"rollouts": 1}}
    options = [*run_config, *REWARD, *TINY, "--trainer.enable_checkpointing", "true", "--trainer.max_epochs", "3"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *options, "--trainer.callbacks", json.dumps([callback]), "--ckpt_path", "auto"])
    assert stop.value.code == 75
    folder = tmp_path / "checkpoints"
    assert [file.name for file in folder.iterdir()] == ["rollout-000002.ckpt"]
    cli.main(["fit", *options, "--ckpt_path", "auto"])
    state = torch.load(folder / "rollout-000003.ckpt", weights_only=True)
    assert state["dblightning"]["rollouts_done"] == 3


def test_auto_refuses_a_folder_that_each_run_names_anew(run_config: list[str], tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = ["--trainer.enable_checkpointing", "true", "--trainer.logger", json.dumps(logger), "--ckpt_path", "auto"]
    with pytest.raises(ValueError, match="give RunCheckpoint a folder"):
        cli.main(["fit", *run_config, *REWARD, *options])
    with pytest.raises(SystemExit, match="looks in RunCheckpoint's folder"):
        cli.main(["fit", *run_config, *REWARD, "--ckpt_path", "auto"])


def test_more_devices_than_there_are_is_refused_before_training(run_config: list[str]) -> None:
    with pytest.raises(Exception, match="CUDA|gpu|GPU"):
        cli.main(["fit", *run_config, *REWARD, "--trainer.accelerator", "gpu", "--trainer.devices", "99"])


def test_every_further_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.OTHERS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "usage" in capsys.readouterr().out
