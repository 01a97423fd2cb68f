"""Pictures reach every logger that takes them, and the CSV table stays narrow."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dblightning.callbacks import SampleGrid
from dblightning.loggers import log_image, log_table
from tests.toy_fit import data, module, trainer


class Pictures(DummyLogger):
    """Takes pictures as W&B's logger does."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[dict[str, Any]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
        self.taken.append({"key": key, "images": images, "step": step, **options})

    def log_table(self, key: str, dataframe: pd.DataFrame, step: int | None = None) -> None:
        self.taken.append({"key": key, "table": dataframe, "step": step})


class Plain(Pictures):
    """Takes pictures and nothing else, as Trackio's does."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:  # type: ignore[override]
        super().log_image(key, images, step)


@pytest.mark.parametrize("kind", ["tensor", "figure"])
def test_a_picture_goes_to_every_logger_that_takes_pictures(tmp_path: Path, kind: str) -> None:
    pixels = torch.zeros(3, 4, 6)
    pixels[0, 1, 2] = 1
    picture: Any = pixels
    if kind == "figure":
        picture = Figure(figsize=(0.6, 0.4), dpi=100, facecolor="red")
    wandb, trackio = Pictures(), Plain()
    board, table = TensorBoardLogger(str(tmp_path), "board", version=""), CSVLogger(str(tmp_path), "table", version="")
    loggers = [wandb, board, table, trackio, DummyLogger()]
    log_image(trainer(tmp_path, logger=loggers), "blend/grid", picture, 7, "first\nsecond")
    assert [(each["key"], each["step"]) for each in wandb.taken + trackio.taken] == [("blend/grid", 7)] * 2
    assert wandb.taken[0]["caption"] == ["first\nsecond"]
    assert "caption" not in trackio.taken[0]
    board.save()
    seen = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    seen.Reload()
    assert [event.step for event in seen.Images("blend/grid")] == [7]
    file = Image.open(tmp_path / "table" / "images" / "blend_grid-000007.png")
    assert (tmp_path / "table" / "images" / "blend_grid-000007.txt").read_text() == "first\nsecond\n"
    for image in (file, wandb.taken[0]["images"][0], trackio.taken[0]["images"][0]):
        if kind == "tensor":
            assert image.size == (6, 4)
            assert image.getpixel((2, 1)) == (255, 0, 0)
            assert image.getpixel((0, 0)) == (0, 0, 0)
        else:
            assert image.size == (60, 40)
            assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_rollouts_pictures_reach_csv_and_other_loggers(tmp_path: Path) -> None:
    run, pictures = module(), Pictures()
    run.backbone.decode = lambda latents: latents[:, :1].expand(-1, 3, 4, 4).sigmoid()  # type: ignore[method-assign]
    loggers = [CSVLogger(str(tmp_path), "log", version=""), pictures]
    trainer(tmp_path, logger=loggers, callbacks=[SampleGrid(2)]).fit(run, datamodule=data(tmp_path))
    assert [each["step"] for each in pictures.taken] == [1, 2]
    assert sorted(file.name for file in (tmp_path / "log" / "images").glob("*.png")) == [
        "samples-000001.png", "samples-000002.png",
    ]  # fmt: skip


def test_the_csv_tables_width_and_rewrites_do_not_grow_with_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's CSVLogger writes its whole table anew for every new column: with prompts as columns, in each rollout
    a longer and a wider one."""
    from lightning.fabric.loggers import csv_logs

    rewrites: list[int] = []
    original = csv_logs._ExperimentWriter._rewrite_with_new_header

    def counted(self: Any, names: list[str]) -> None:
        rewrites.append(len(names))
        original(self, names)

    monkeypatch.setattr(csv_logs._ExperimentWriter, "_rewrite_with_new_header", counted)
    rollouts, prompts = 30, 120
    logger = CSVLogger(str(tmp_path), "log", version="")
    run = module(advantage="prompt")
    trainer(tmp_path, logger=logger).fit(run, datamodule=data(tmp_path, prompts, rollouts_per_epoch=rollouts))
    with (tmp_path / "log" / "metrics.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert len(header) < 30
    assert len(rewrites) <= 2
    with (tmp_path / "log" / "prompts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == rollouts * 4  # four prompts a rollout
    assert len({row["prompt"] for row in rows}) == prompts
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)


SCORES = pd.DataFrame({"blend": ["base", "db-mpa|0.5"], "alignment": [0.1, 0.25]})


def test_a_table_goes_to_every_logger_that_takes_tables(tmp_path: Path) -> None:
    wandb = Pictures()
    board, table = TensorBoardLogger(str(tmp_path), "board", version=""), CSVLogger(str(tmp_path), "table", version="")
    log_table(trainer(tmp_path, logger=[wandb, board, table, DummyLogger()]), "blend/scores", SCORES, 7)
    assert [(each["key"], each["step"]) for each in wandb.taken] == [("blend/scores", 7)]
    pd.testing.assert_frame_equal(wandb.taken[0]["table"], SCORES)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table" / "tables" / "blend_scores-000007.csv"), SCORES)
    board.save()
    seen = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0})
    seen.Reload()
    (event,) = seen.Tensors("blend/scores/text_summary")
    heading, rule, *rows = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == 7 and rule.startswith("|:--")
    assert [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in (heading, *rows)] == [
        ["blend", "alignment"], ["base", "0.1"], [r"db-mpa\|0.5", "0.25"],
    ]  # fmt: skip


def logged(tmp_path: Path, logger: Any) -> None:
    """Everything a run logs, in the order it comes."""
    run = trainer(tmp_path, logger=logger)
    logger.log_hyperparams({"kl": {"weight": 0.1}, "seed": 3})
    logger.log_metrics({"train/reward": 0.5}, step=1)
    log_image(run, "samples", torch.rand(3, 8, 8), 1, "a red circle")
    log_table(run, "blend/scores", SCORES, 2)
    logger.log_metrics({"train/reward": 0.75}, step=3)
    log_image(run, "samples", Figure(figsize=(1, 1)), 3)
    logger.finalize("success")


def test_wandb_takes_curves_pictures_and_tables_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    logged(tmp_path, logger)
    folder = Path(logger.experiment.dir)
    wandb.finish()
    assert len(list((folder / "media" / "images").glob("samples_*.png"))) == 2
    (table,) = (folder / "media" / "table" / "blend").glob("scores_*.table.json")
    assert "db-mpa|0.5" in table.read_text()


def test_trackio_takes_curves_pictures_and_tables(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    code = f"""
from pathlib import Path
from dblightning.trackio_logger import TrackioLogger
from tests.test_loggers import logged
logged(Path({str(tmp_path)!r}), TrackioLogger("shapes", "run"))
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("shapes", "run")
print("curves", [(row["step"], row["train/reward"]) for row in rows if "train/reward" in row])
print("pictures", [row["samples"]["_type"] for row in rows if "samples" in row])
print("tables", [row["blend/scores"]["_value"][1]["blend"] for row in rows if "blend/scores" in row])
"""
    # Trackio reads where its files go when it is imported
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert printed["curves"] == "[(1, 0.5), (3, 0.75)]", done.stdout
    assert printed["pictures"] == "['trackio.image', 'trackio.image']" and printed["tables"] == "['db-mpa|0.5']"


def test_trackio_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dblightning.trackio_logger import TrackioLogger

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match=r"pip install 'dblightning\[trackio\]'"):
        TrackioLogger("shapes").log_metrics({"a": 1.0}, 1)


def test_a_reports_pictures_and_tables_reach_the_loggers(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from dblightning.evaluation.module import BlendEvaluationModule

    Image.new("RGBA", (6, 4), "red").save(tmp_path / "pareto.png")
    (tmp_path / "tables").mkdir()
    SCORES.to_csv(tmp_path / "tables" / "rewards.csv", index=False)
    pictures = Pictures()
    loggers = [pictures, CSVLogger(str(tmp_path), "log", version="")]
    evaluation: Any = SimpleNamespace(out=tmp_path, trainer=trainer(tmp_path, logger=loggers))
    BlendEvaluationModule._log_report(evaluation)
    assert [each["key"] for each in pictures.taken] == ["test/pareto", "test/rewards"]
    assert pictures.taken[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log" / "tables" / "test_rewards-000000.csv"), SCORES)
