"""Build TRL's environment, apart from this package's: its last release with ``DDPOTrainer`` wants older libraries.

    python -m benchmarks.peers.environment FOLDER

It gets the same torch as the interpreter that builds it, so that the comparison is one of the code. This package is not
installed there: only its reward is imported, from the checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

#: TRL 0.23.1 is the last release with DDPO; it needs transformers 4
PACKAGES = ["trl==0.23.1", "transformers<5", "diffusers<0.40", "peft<0.19", "torchmetrics>=1.9"]
ROOT = Path(__file__).resolve().parents[2]


def interpreter(folder: Path) -> Path:
    """The environment's Python."""
    return folder / "bin" / "python"


def is_ready(folder: Path) -> bool:
    """Whether TRL's trainer and the reward can be imported there."""
    python = interpreter(folder)
    if not python.is_file():
        return False
    check = "import trl, dblightning.miniature.rewards; assert trl.__version__ == '0.23.1'"
    return subprocess.run([python, "-c", check], env=variables(), capture_output=True).returncode == 0


def build(folder: Path) -> None:
    """Make the environment; a few gigabytes are downloaded.

    Raises:
        RuntimeError: it cannot import what it must.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    subprocess.run([interpreter(folder), "-m", "pip", "install", "--quiet", *same, *PACKAGES], check=True)
    if not is_ready(folder):
        raise RuntimeError(f"the environment in {folder} does not import trl and the reward: delete it and try again")


def prepare(parser: argparse.ArgumentParser, folder: Path | None) -> None:
    """Build the environment where it is not ready; no folder given is the command line's error."""
    if folder is None:
        parser.error("TRL needs its own environment: add --peer-environment FOLDER, or leave TRL out with --only")
    if not is_ready(folder):
        build(folder)


def variables(root: Path = ROOT) -> dict[str, str]:
    """Environment variables of every contestant: one thread, no network, the checkout importable."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.peers.environment FOLDER")
    build(Path(sys.argv[1]))
