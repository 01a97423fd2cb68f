"""The argument parser of the commands that are no Lightning runs."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with errors of one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)
