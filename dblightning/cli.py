"""The command line.

    python -m dblightning fit      --config configs/quickstart.yaml      train an adapter
    python -m dblightning validate --config … --ckpt_path …              score a trained checkpoint
    python -m dblightning test     --config configs/eval/….yaml          compare blends: table, Pareto picture, grid
    python -m dblightning predict  --config configs/eval/predict.yaml    write images of blends

and ``pretrain-miniature``, ``score``, ``convert-vila``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

TRAINING = ("fit", "validate")
EVALUATION = ("test", "predict")
#: further commands: name → (module, function); each takes its own arguments
OTHERS = {
    "pretrain-miniature": ("dblightning.miniature.pretrain", "main"),
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

    from dblightning.evaluation import BlendEvaluationModule
    from dblightning.module import RewardRLModule

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # `main` is given the process's own
    torch.set_float32_matmul_precision("high")

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to resume from or to score")

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
    options = {"ckpt_path": cli.config["ckpt_path"]} if training else {}
    run = getattr(cli.trainer, command)
    run(cli.model, datamodule=cli.datamodule, **options)
