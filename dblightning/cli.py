"""The command line.

    python -m dblightning fit      --config configs/quickstart.yaml      train an adapter; --ckpt_path auto resumes
    python -m dblightning validate --config … --ckpt_path …              score a trained checkpoint
    python -m dblightning test     --config configs/eval/….yaml          compare blends: table, Pareto picture, grid
    python -m dblightning predict  --config configs/eval/predict.yaml    write images of blends

and ``report`` (tables, figures and one HTML page from score tables), ``seeds`` (one evaluation over several training
seeds), ``score``, ``pretrain-miniature``, ``convert-vila``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

TRAINING = ("fit", "validate")
EVALUATION = ("test", "predict")
#: further commands: name → (module, function); each takes its own arguments
OTHERS = {
    "pretrain-miniature": ("dblightning.miniature.pretrain", "main"),
    "report": ("dblightning.evaluation.report", "report_main"),
    "seeds": ("dblightning.evaluation.training_seeds", "seeds_main"),
    "score": ("dblightning.rewards.score", "score_main"),
    "convert-vila": ("dblightning.rewards.vila_convert", "convert_vila_main"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ``argv`` None takes the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in OTHERS:
        module, function = OTHERS[command]
        run: Callable[[list[str]], None] = getattr(importlib.import_module(module), function)
        run(arguments[1:])
    elif command in TRAINING + EVALUATION:
        _lightning(command, arguments[1:])
    else:
        print(__doc__)
        if command not in ("-h", "--help", "help"):
            sys.exit(f"error: unknown command {command!r}; one of {', '.join((*TRAINING, *EVALUATION, *OTHERS))}")


def _lightning(command: str, arguments: list[str]) -> None:
    import warnings

    import torch
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from dblightning.checkpointing import RunCheckpoint
    from dblightning.evaluation import BlendEvaluationModule
    from dblightning.module import RewardRLModule

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # `main` is given the process's own
    torch.set_float32_matmul_precision("high")

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                help="checkpoint to resume from or to score; 'auto' takes the run's newest whole one, if there is any",
            )

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """The trainer; a training run saves itself unless ``enable_checkpointing`` is false."""
            config = self.config_init["trainer"]
            given = config["callbacks"] or []
            callbacks = list(given) if isinstance(given, list | tuple) else [given]
            wanted = training and config["enable_checkpointing"] is not False
            if wanted and not any(isinstance(each, RunCheckpoint) for each in callbacks):
                kwargs["callbacks"] = [*callbacks, RunCheckpoint()]
            return super().instantiate_trainer(**kwargs)

    training = command in TRAINING
    cli = CLI(
        RewardRLModule if training else BlendEvaluationModule,
        LightningDataModule,
        subclass_mode_data=True,
        # an evaluation's settings are in the record it writes beside its results
        save_config_callback=SaveConfigCallback if training else None,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        run=False,
        args=arguments,
    )
    options: dict[str, Any] = {}
    if training:
        options = {"ckpt_path": _checkpoint(cli.config["ckpt_path"], cli.trainer), "weights_only": True}
    run = getattr(cli.trainer, command)
    run(cli.model, datamodule=cli.datamodule, **options)


def _checkpoint(path: str | None, trainer: Trainer) -> str | None:
    """The checkpoint that ``--ckpt_path`` means, None for a start from nothing."""
    if path not in ("auto", "last"):
        return path
    from lightning.pytorch.utilities import rank_zero_info

    from dblightning.checkpointing import RunCheckpoint

    savers = [each for each in trainer.callbacks if isinstance(each, RunCheckpoint)]  # type: ignore[attr-defined]
    if not savers:
        sys.exit(f"error: --ckpt_path {path} looks in RunCheckpoint's folder; name a file, or let checkpoints be saved")
    found = savers[0].find(trainer)
    where = savers[0].path(trainer)
    rank_zero_info(f"resuming from {found}" if found else f"no checkpoint in {where}: starting from the beginning")
    return str(found) if found else None
