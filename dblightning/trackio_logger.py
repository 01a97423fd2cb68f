"""Trackio as a Lightning logger: Lightning ships none."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dblightning.extras import importing


class TrackioLogger(Logger):
    """Curves, pictures and tables in Trackio (Hugging Face), kept on this machine or in a Space (extra ``trackio``).

        trainer:
          logger: {class_path: dblightning.trackio_logger.TrackioLogger, init_args: {project: my-project}}

    Then ``trackio show --project my-project``. Local runs lie where ``TRACKIO_DIR`` says.

    Args:
        project: the project's name.
        name: the run's; None lets Trackio make one up.
        resume: "never", "allow" or "must" continue a run of that name.
        options: further arguments of ``trackio.init``, such as {"space_id": "user/dashboard"}.

    Raises:
        ImportError: at the first entry, where the extra is not installed.
    """

    def __init__(
        self, project: str, name: str | None = None, resume: str = "never", options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.project = project
        self._name = name
        self.resume = resume
        self.options = dict(options or {})
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self._run.name if self._run is not None else self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, begun when it is first needed, with the settings known by then."""
        if self._run is None:
            options = {"embed": False, **self.options}
            self._run = _trackio().init(
                project=self.project, name=self._name, resume=self.resume, config=self._config, **options
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings of the run; those that come after its first entry are left out."""
        self._config |= _flat(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None, caption: Sequence[str] = ()) -> None:
        """Pictures under ``key``, each with its caption where there are captions."""
        self._begin()
        captions: list[str | None] = [*caption, *[None] * (len(images) - len(caption))]
        pictures = [_trackio().Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
        for index, picture in enumerate(pictures):
            self.experiment.log({key if len(pictures) == 1 else f"{key}/{index}": picture}, step=step)

    @rank_zero_only
    def log_table(self, key: str, dataframe: pd.DataFrame, step: int | None = None) -> None:
        """A table under ``key``."""
        self._begin()
        self.experiment.log({key: _trackio().Table(dataframe=dataframe)}, step=step)

    def _begin(self) -> None:
        """Start the run: Trackio's pictures and tables belong to one."""
        _ = self.experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _trackio() -> Any:
    with importing("TrackioLogger", "trackio"):
        import trackio
    return trackio


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as JSON has values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value)):
            found[f"{prefix}{name}"] = value
        else:
            found[f"{prefix}{name}"] = str(value)
    return found
