"""Entries of a run's loggers beside scalars: pictures and tables to each that takes them, and one reward per prompt."""

from __future__ import annotations

import csv
import inspect
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dblightning.evaluation.table_formats import pipe_table


def log_image(trainer: L.Trainer, name: str, image: Tensor | Figure, step: int, caption: str = "") -> None:
    """Give a picture to every logger that takes pictures.

    TensorBoard gets it as an image or figure, with the caption as text; CSVLogger as a PNG file (and a text file) under
    ``images/`` in its folder; any other logger through its ``log_image(key, images, step)``, as W&B's and Trackio's
    have it. Call it on rank 0.

    Args:
        trainer: whose loggers; in a ``fast_dev_run`` nothing is logged.
        name: for example "samples" or "blend/pareto".
        image: (3, H, W) in [0, 1], or a figure.
        step: rollouts done.
        caption: what the picture shows, one line per image; logged where the logger takes it.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if isinstance(image, Figure):
                logger.experiment.add_figure(name, image, step)
            else:
                logger.experiment.add_image(name, image, step)
            if caption:
                logger.experiment.add_text(name, "  \n".join(caption.splitlines()), step)
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "images" / f"{name.replace('/', '_')}-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            as_pil(image).save(path)
            if caption:
                path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        elif callable(log := getattr(logger, "log_image", None)):
            options: dict[str, Any] = {"caption": [caption]} if caption and _takes(log, "caption") else {}
            log(key=name, images=[as_pil(image)], step=step, **options)


def log_table(trainer: L.Trainer, name: str, table: pd.DataFrame, step: int) -> None:
    """Give a table to every logger that takes tables.

    TensorBoard gets it as text in Markdown; CSVLogger as a CSV file under ``tables/`` in its folder; any other logger
    through its ``log_table(key=, dataframe=, step=)``, as W&B's and Trackio's have it. Call it on rank 0.

    Args:
        trainer: whose loggers; in a ``fast_dev_run`` nothing is logged.
        name: for example "blend/scores".
        table: one row each, its index left out.
        step: rollouts done.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _as_markdown(table), step)
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "tables" / f"{name.replace('/', '_')}-{step:06d}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)
        elif callable(log := getattr(logger, "log_table", None)) and _takes(log, "dataframe"):
            log(key=name, dataframe=table, step=step)


def _as_markdown(table: pd.DataFrame) -> str:
    """A pipe table with numbers to four digits; pandas' own needs tabulate, which no dependency brings."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|")

    return pipe_table([[cell(value) for value in row] for row in table.itertuples(index=False)], list(table))


def log_by_prompt(trainer: L.Trainer, rewards: dict[str, float], step: int, suffix: str = "") -> None:
    """Log each prompt's mean reward as ``prompt/<prompt>``, with a suffix where several adapters have one each.

    CSVLogger's table gets no column per prompt: it writes the whole file anew whenever there is a new one. The values
    are in ``prompts.csv`` beside it, one row each.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            if trainer.is_global_zero:
                _append(Path(logger.log_dir) / f"prompts{suffix.replace('/', '-')}.csv", rewards, step)
        else:
            logger.log_metrics({f"prompt{suffix}/{prompt}": reward for prompt, reward in rewards.items()}, step)


def keep_tables(trainer: L.Trainer) -> None:
    """Start the trainer's CSVLoggers without what they begin with: removing the table of an earlier run.

    A resumed run then adds to it. Call it before Lightning starts them, in ``configure_callbacks``.
    """
    for logger in trainer.loggers if rank_zero_only.rank == 0 else ():  # type: ignore[attr-defined]
        if isinstance(logger, CSVLogger) and (table := Path(logger.log_dir) / "metrics.csv").exists():
            aside = table.with_suffix(".aside")
            os.replace(table, aside)
            try:
                writer = logger.experiment
            finally:
                os.replace(aside, table)
            if not writer.metrics_keys:
                with table.open(encoding="utf-8", newline="") as file:
                    writer.metrics_keys = next(csv.reader(file), [])


def drop_table(logger: CSVLogger) -> None:
    """Remove the tables of an earlier run, which this one replaces."""
    folder = Path(logger.log_dir)
    for table in (folder / "metrics.csv", *folder.glob("prompts*.csv")):
        table.unlink(missing_ok=True)
    logger.experiment.metrics_keys = []


def _append(path: Path, rewards: dict[str, float], step: int) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "prompt", "reward"])
        writer.writerows([step, prompt, reward] for prompt, reward in rewards.items())


def as_pil(image: Tensor | Figure) -> Image.Image:
    """A picture of (3, H, W) in [0, 1], or of a figure."""
    if isinstance(image, Tensor):
        return to_pil_image(image.float().clamp(0, 1).cpu())
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(image)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == name or each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
