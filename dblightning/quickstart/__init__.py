"""The quickstart: train, blend and score the embedded miniature. Its two configs are in this folder.

``configs/quickstart.yaml`` and ``configs/eval/quickstart.yaml`` of the repository are links to them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dblightning.arguments import quickstart_parser

HERE = Path(__file__).parent
#: what ``--check`` makes of the two runs: one rollout of two prompts, eight prompts validated and compared
SMALL_FIT = {
    "trainer.max_epochs": 1,
    "data.init_args.batch_size": 12,
    "data.init_args.rollouts_per_epoch": 1,
    "data.init_args.limit_val_prompts": 8,
    "model.optimisation.batch_size": 12,
}
SMALL_BLEND = {"data.init_args.limit_test_prompts": 8}


def commands(check: bool = False) -> list[list[str]]:
    """Arguments of the two commands, the fit and the comparison of blends.

    Args:
        check: whether to make both small.
    """
    fit = SMALL_FIT if check else {}
    blend = SMALL_BLEND if check else {}
    return [
        ["fit", "--config", str(HERE / "fit.yaml"), "--overwrite", *_options(fit)],
        ["test", "--config", str(HERE / "blend.yaml"), *_options(blend)],
    ]


def _options(settings: dict[str, int]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def quickstart_main(argv: Sequence[str] | None = None) -> None:
    """The command ``quickstart``; ends with the exit code of the run that fails, if one does."""
    arguments = quickstart_parser().parse_args(argv)
    for command in commands(arguments.check):
        # a process each: a fit and an evaluation set up torch, seeds and signals for themselves
        done = subprocess.run([sys.executable, "-m", "dblightning", *command])
        if done.returncode:
            sys.exit(done.returncode)
    print("See runs/quickstart/before_after.png and runs/quickstart/blend/pareto.png; the curves:", end=" ")
    print("tensorboard --logdir runs")
