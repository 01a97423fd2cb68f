"""A contestant seen from outside: a process that is started, runs rounds on command, and returns its adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import ROOT, interpreter, variables
from benchmarks.peers.worker import Settings


class Contestant:
    """One running contestant.

    Args:
        program: "ours", "naive" or "trl_ddpo".
        settings: its work.
        peer_environment: folder of TRL's environment; needed by "trl_ddpo" alone.
        root: checkout that it runs from.

    Raises:
        RuntimeError: it died; the message holds the end of what it printed.
    """

    def __init__(
        self, program: str, settings: Settings, peer_environment: Path | None = None, root: Path = ROOT
    ) -> None:
        python = Path(sys.executable)
        if program == "trl_ddpo":
            if peer_environment is None:
                raise ValueError("TRL needs its own environment: name its folder with --peer-environment")
            python = interpreter(peer_environment)
        self.program = program
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{program}", settings.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=variables(root),
            cwd=root,
            text=True,
        )
        self.versions: dict[str, str] = self._answer()["ready"]

    def round(self) -> dict[str, Any]:
        """One rollout and its updates; :meth:`benchmarks.peers.worker.Meter.stop`'s record."""
        return self._ask({"do": "round"})

    def export(self, folder: Path) -> Path:
        """Write the adapter as it is; returns the folder."""
        self._ask({"do": "export", "folder": str(folder)})
        return folder

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # the end of input is its signal to leave
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._errors.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the contestant {self.program} ended early:\n{self._errors.read()[-3000:]}")
        return json.loads(line)
