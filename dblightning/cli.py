"""The command line.

    python -m dblightning quickstart                                     train, blend and score the embedded miniature
    python -m dblightning fit      --config configs/quickstart.yaml      train an adapter; --ckpt_path auto resumes
    python -m dblightning validate --config … --ckpt_path …              score a trained checkpoint
    python -m dblightning test     --config configs/eval/….yaml          compare blends: table, Pareto picture, grid
    python -m dblightning predict  --config configs/eval/predict.yaml    write images of blends

and ``report`` (tables, figures and one HTML page from score tables), ``seeds`` (one evaluation over several training
seeds), ``calibrate`` (an adapter's strength at an α), ``choose`` (each method at its best for a preference), ``search``
(a preference for a goal), ``score``, ``export`` (a soup as one LoRA), ``push`` (adapters to the hub), ``convert``,
``pretrain-miniature``, ``pretrain-flow-miniature``, ``convert-vila``.
"""

from __future__ import annotations

import atexit
import difflib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dblightning.arguments import (
    convert_parser,
    convert_vila_parser,
    export_parser,
    pretrain_flow_parser,
    pretrain_parser,
    push_parser,
    quickstart_parser,
    serve_parser,
    studio_parser,
)
from dblightning.command_tree import Refused, parse_value, read_config
from dblightning.flat_settings import OBJECTIVES, log_new_names, renamed_arguments
from dblightning.preflight import check_command

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

TRAINING = ("fit", "validate")
EVALUATION = ("test", "predict")
#: further commands: name → (module, function); each takes its own arguments
OTHERS = {
    "pretrain-miniature": ("dblightning.miniature.pretrain", "main"),
    "pretrain-flow-miniature": ("dblightning.miniature.pretrain_flow", "main"),
    "quickstart": ("dblightning.quickstart", "quickstart_main"),
    "report": ("dblightning.evaluation.report", "report_main"),
    "seeds": ("dblightning.evaluation.training_seeds", "seeds_main"),
    "calibrate": ("dblightning.evaluation.calibration", "calibrate_main"),
    "choose": ("dblightning.evaluation.choosing", "choose_main"),
    "score": ("dblightning.rewards.score", "score_main"),
    "studio": ("dblightning.studio.command", "studio_main"),
    "serve": ("dblightning.serving.command", "serve_main"),
    "convert": ("dblightning.adapters.convert", "convert_main"),
    "convert-vila": ("dblightning.rewards.vila_convert", "convert_vila_main"),
    "export": ("dblightning.sharing.export", "export_main"),
    "push": ("dblightning.sharing.push", "push_main"),
    "search": ("dblightning.preference_search.command", "search_main"),
}

#: commands whose modules are heavy to import → their parser in ``arguments``
LIGHT_PARSERS = {
    "convert": convert_parser,
    "convert-vila": convert_vila_parser,
    "export": export_parser,
    "push": push_parser,
    "quickstart": quickstart_parser,
    "pretrain-miniature": pretrain_parser,
    "serve": serve_parser,
    "studio": studio_parser,
    "pretrain-flow-miniature": pretrain_flow_parser,
}

#: what a wrong setting, file or machine raises; other errors are the program's
USERS_ERRORS = (ValueError, TypeError, OSError, ImportError, LookupError, MemoryError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: its name and arguments. None takes the process's own, and errors of the user's making are then one
            sentence on stderr and exit code 1 (2 for the command line itself); ``--debug`` shows the whole trace.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [each for each in arguments if each != "--debug"]
    try:
        _run(arguments, debug)
    except BrokenPipeError:
        if argv is not None or debug:
            raise
        # the reader has gone, as in `… | head`; Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # what breaks in the middle of a run is not a refusal: its trace is wanted
        users = isinstance(error, USERS_ERRORS) or type(error).__name__ == "MisconfigurationException"
        if argv is not None or debug or getattr(error, "during_run", False) or not users:
            raise
        sys.exit(f"error: {one_sentence(error)}")


def _run(arguments: list[str], debug: bool) -> None:
    command = arguments[0] if arguments else "--help"
    if command in OTHERS:
        if command in LIGHT_PARSERS:
            LIGHT_PARSERS[command]().parse_args(arguments[1:])  # help and wrong options end here
        module, function = OTHERS[command]
        run: Callable[[list[str]], None] = getattr(importlib.import_module(module), function)
        run(arguments[1:])
    elif command in TRAINING + EVALUATION:
        if any(each in ("-h", "--help") for each in arguments) and arguments[-1] != "all":
            _help(command, arguments[1:])
            return
        given = [arguments[0], *map(_file_of_pipe, arguments[1:])]
        try:
            check_command(command, given[1:])
        except Refused as refusal:
            if debug:
                raise
            _refuse(str(refusal))
        _lightning(command, given[1:], debug)
    else:
        print(__doc__)
        if command not in ("-h", "--help", "help"):
            known = (*TRAINING, *EVALUATION, *OTHERS)
            close = difflib.get_close_matches(command, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            sys.exit(f"error: unknown command {command!r}; one of {', '.join(known)}{hint}")


def _file_of_pipe(argument: str) -> str:
    """A copy, for this process, of a pipe such as ``--config <(sed … FILE)``, which can be read only once."""
    option, equals, value = argument.partition("=")
    path = value if equals else option
    if not path.startswith("/") or not Path(path).is_fifo():
        return argument
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as copy:
        copy.write(Path(path).read_text(encoding="utf-8"))
    atexit.register(Path(copy.name).unlink, missing_ok=True)
    return f"{option}={copy.name}" if equals else copy.name


def _help(command: str, arguments: list[str]) -> None:
    from dblightning.help_pages import TOPICS, command_help, topic_help

    topics = [each for each in arguments if not each.startswith("-")]
    page = topic_help(topics[-1]) if topics and arguments[-1] == topics[-1] else command_help(command)
    if page is None:
        _refuse(f"no help on {topics[-1]!r}; topics are {', '.join(TOPICS)}, all, or the name of a class")
    print(page)


def _refuse(message: str) -> NoReturn:
    """Say what is wrong with the command line and exit with 2, as command lines do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_sentence(error: BaseException | str) -> str:
    """An error's message without what parsers and loaders print around it."""
    text = str(error) or type(error).__name__
    text = re.split(r"\n\s*\n|Given value", text)[0]
    words = " ".join(text.split())
    return words if len(words) <= 600 else f"{words[:597]}…"


def _lightning(command: str, arguments: list[str], debug: bool = False) -> None:
    import torch
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities import rank_zero_info

    from dblightning.checkpointing import RunCheckpoint
    from dblightning.evaluation import BlendEvaluationModule
    from dblightning.module import RewardRLModule
    from dblightning.progress import quiet_libraries
    from dblightning.run_folder import RunGuard

    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    training = command in TRAINING
    if training:
        arguments, moved = renamed_arguments(arguments, read_config, parse_value)
        log_new_names(moved, rank_zero_info)

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if debug:
                raise ValueError(message) from ex
            _refuse(one_sentence(message))

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                help="checkpoint to resume from or to score; 'auto' takes the run's latest intact one, if there is any",
            )
            if training:
                parser.set_defaults({"model.objective": {"class_path": OBJECTIVES["dpok"]}})
            if command == "fit":
                parser.add_argument(
                    "--overwrite", action="store_true", help="replace the files of an earlier run in the same folders"
                )

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """The trainer; a training run saves itself unless ``enable_checkpointing`` is false."""
            config = self.config_init["trainer"]
            given = config["callbacks"] or []
            callbacks = list(given) if isinstance(given, list | tuple) else [given]
            if training:
                wanted = config["enable_checkpointing"] is not False
                if wanted and not any(isinstance(each, RunCheckpoint) for each in callbacks):
                    callbacks.append(RunCheckpoint())
                if not any(isinstance(each, RunGuard) for each in callbacks):
                    # first, so that a fit that it refuses has written nothing
                    callbacks.insert(0, RunGuard(bool(self.config_init.get("overwrite"))))
                kwargs["callbacks"] = callbacks
            if "overwrite" in self.config:
                self.config["overwrite"] = False  # the saved config.yaml replaces nothing when it is run again
            return super().instantiate_trainer(**kwargs)

    class SaveConfig(SaveConfigCallback):
        """Saves config.yaml once the fit is allowed to start, not before."""

        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            """Not yet."""

        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            super().setup(trainer, pl_module, "fit")

    cli = CLI(
        RewardRLModule if training else BlendEvaluationModule,
        LightningDataModule,
        subclass_mode_data=True,
        # an evaluation's settings are in the record it writes beside its results; a validation would replace the fit's
        save_config_callback=SaveConfig if command == "fit" else None,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_class=Parser,
        seed_everything_default=0,
        run=False,
        args=arguments,
    )
    options: dict[str, Any] = {}
    if training:
        checkpoint = _checkpoint(cli.config["ckpt_path"], cli.trainer)
        options = {"ckpt_path": checkpoint, "weights_only": True}
        guards = [each for each in cli.trainer.callbacks if isinstance(each, RunGuard)]  # type: ignore[attr-defined]
        if command == "fit" and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
            guards[0].check(cli.trainer, cli.model, checkpoint is not None)
    run = getattr(cli.trainer, command)
    try:
        run(cli.model, datamodule=cli.datamodule, **options)
    except Exception as error:
        error.during_run = _started(cli.trainer)  # type: ignore[attr-defined]
        raise


def _started(trainer: Trainer) -> bool:
    """Whether a batch was begun: what is refused after that has cost time."""
    loops = (trainer.fit_loop.epoch_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    return any(loop.batch_progress.total.ready for loop in loops)


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
