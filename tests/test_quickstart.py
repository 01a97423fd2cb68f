from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dblightning import cli, quickstart
from dblightning.preflight import check_command

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("own", "clones"), [("fit.yaml", "quickstart.yaml"), ("blend.yaml", "eval/quickstart.yaml")])
def test_the_repositorys_configs_are_the_packages(own: str, clones: str) -> None:
    assert (ROOT / "configs" / clones).read_text("utf-8") == (quickstart.HERE / own).read_text("utf-8")


@pytest.mark.parametrize("check", [False, True])
def test_both_commands_pass_the_preflight(check: bool) -> None:
    for command, *arguments in quickstart.commands(check):
        check_command(command, arguments)


def test_a_run_that_fails_ends_the_quickstart_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "commands", lambda check: [["fti"], ["predict", "--help"]])
    with pytest.raises(SystemExit) as stop:
        cli.main(["quickstart"])
    assert stop.value.code == 1


def test_the_wheel_has_what_the_quickstart_needs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = (
        "from setuptools import build_meta; import sys; "
        "print(build_meta.build_wheel(sys.argv[1], {'--build-option': ['--quiet']}))"
    )
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "dblightning"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    data = [path for folder in ("miniature", "quickstart") for path in (ROOT / "dblightning" / folder).rglob("*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in data if path.suffix in (".safetensors", ".json", ".yaml")}
    assert any("flow" in each for each in wanted) and any("adapters" in each for each in wanted)
    assert wanted <= set(files)
