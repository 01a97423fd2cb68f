"""What the core install brings, and what is said where an extra is missing."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from dblightning.extras import check_extra, importing
from tests.test_architecture import imported, trees

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: modules that are imported by a feature of an extra alone
OF_EXTRAS = {
    "evaluation.report_page": "report",
    "evaluation.report_parts": "report",
    "rewards.server": "reward-server",
    "serving.service": "serve",
    "serving.worker": "serve",
    "studio.page": "studio",
}
#: imported, not declared: what each of them is brought by, whatever is chosen
BROUGHT = {
    "huggingface_hub": "diffusers",
    "safetensors": "diffusers",
    "tokenizers": "transformers",
    "tqdm": "lightning",
    "PyYAML": "lightning",
}
#: the same of extras
BROUGHT_BY_EXTRAS = {"serve": {"fastapi"}}
#: imported where an environment of one's own has them
FOREIGN = {"pytorch_lightning", "IPython"}
#: what tests skip for and no target installs: a gigabyte, models of their own, a service's client
BY_HAND = {"tensorflow", "rapidocr", "wandb"}
#: distributions whose module has another name
NAMES = {"PIL": "pillow", "yaml": "PyYAML", "open_clip": "open_clip_torch", "tensorflow": "tensorflow-cpu"}


def distribution(requirement: str) -> str:
    """A requirement's name, as distributions are compared: lower case, "-"."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def core() -> set[str]:
    return {distribution(each) for each in PROJECT["dependencies"]}


def of_extra(extra: str) -> set[str]:
    found = set()
    for each in PROJECT["optional-dependencies"][extra]:
        nested = re.fullmatch(r"dblightning\[(.+)\]", each)
        found |= set().union(*map(of_extra, nested[1].split(","))) if nested else {distribution(each)}
    return found


def third_party(name: str) -> set[tuple[str, bool]]:
    """Distributions that a module imports, each with whether inside a function."""
    tops = {(dotted.split(".")[0], inside) for dotted, inside in imported(trees()[name])}
    return {
        (distribution(NAMES.get(top, top)), inside)
        for top, inside in tops
        if top not in sys.stdlib_module_names and top not in {"dblightning", *FOREIGN}
    }


def test_the_core_has_at_most_15_direct_dependencies() -> None:
    assert len(PROJECT["dependencies"]) <= 15


def test_what_is_imported_undeclared_is_brought_by_a_dependency_of_the_core() -> None:
    for name, by in BROUGHT.items():
        assert distribution(by) in core() and distribution(name) not in core()
        brought = [each for each in metadata.requires(by) or [] if "extra ==" not in each]
        assert distribution(name) in map(distribution, brought), name


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    """At a module's top only of the core, unless the module is an extra's."""
    always = core() | set(map(distribution, BROUGHT))
    extras = {name: of_extra(name) | BROUGHT_BY_EXTRAS.get(name, set()) for name in PROJECT["optional-dependencies"]}
    optional = set().union(*extras.values())
    for name in trees():
        own = extras[OF_EXTRAS[name]] if name in OF_EXTRAS else set()
        for each, inside in third_party(name):
            assert each in always | own | (optional if inside else set()), f"{name} imports {each}"


def test_nothing_of_the_core_goes_unused() -> None:
    used = {each for name in trees() for each, _ in third_party(name)}
    # TensorBoardLogger, lightning's default, imports it
    assert core() - used == {"tensorboard"}


def test_every_module_of_the_core_is_imported_without_an_extra() -> None:
    always = core() | set(map(distribution, BROUGHT))
    names = {top for name in trees() for dotted, _ in imported(trees()[name]) for top in [dotted.split(".")[0]]}
    extras = {
        top
        for top in names - set(sys.stdlib_module_names) - {"dblightning", *FOREIGN}
        if distribution(NAMES.get(top, top)) not in always
    }
    assert {"plotly", "open_clip", "httpx2", "gradio", "litserve", "optuna"} <= extras
    extras -= {"httpx2"}  # huggingface_hub 2 imports it itself
    modules = [name for name in trees() if name not in OF_EXTRAS and name not in ("__main__", "dblightning")]
    code = (
        f"import sys, importlib\nsys.modules |= dict.fromkeys({sorted(extras)})\n"
        f"for name in {modules}: importlib.import_module('dblightning.' + name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("reward", "arguments", "module", "extra"),
    [
        ("PickScore", {"weights": "nowhere"}, "open_clip", "clip"),
        ("HPSv2", {"weights": "nowhere"}, "open_clip", "clip"),
        ("AestheticScore", {"weights": "nowhere"}, "open_clip", "clip"),
        ("CLIPScore", {}, "open_clip", "clip"),
        ("GenEvalAccuracy", {"detector": "nowhere"}, "open_clip", "clip"),
        ("RemoteReward", {"url": "http://localhost:1"}, "httpx2", "remote"),
        ("ChatJudge", {"url": "http://localhost:1/v1", "model": "any", "rubric": "any"}, "httpx2", "remote"),
    ],
)
def test_a_reward_names_its_extra_before_it_reads_a_file(
    reward: str, arguments: dict[str, str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dblightning import rewards

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'dblightning\[{extra}\]'"):
        getattr(rewards, reward)(**arguments)


def test_what_a_test_skips_for_is_installed_by_make_test_or_make_test_extras() -> None:
    """Else nobody runs it: `make test` has the extra dev, `make test-extras` its own for the files it names."""
    everyday, extras = core() | of_extra("dev"), of_extra("test-extras")
    (named,) = re.findall(r"^test-extras:.*\n\t.* -m pytest (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    skipping = 0
    for file in (ROOT / "tests").rglob("test_*.py"):
        for module in re.findall(r'importorskip\(\s*"(\w+)', file.read_text("utf-8")):
            name = distribution(NAMES.get(module, module))
            if name in everyday or module in BY_HAND:
                continue
            skipping += 1
            assert name in extras, f"{file.name} skips without {name}, which nothing installs"
            assert any(file.is_relative_to(ROOT / each) for each in named.split()), f"{file} is not in make test-extras"
    assert skipping


def test_a_search_names_its_extra_before_it_reads_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from dblightning.preference_search.command import search_main

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"needs optuna.*pip install 'dblightning\[search\]'"):
        search_main(["--config", "nowhere.yaml"])


def test_the_reward_server_says_in_one_sentence_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install 'dblightning\[reward-server\]'"):
        runpy.run_path(str(ROOT / "dblightning" / "rewards" / "server.py"), run_name="__main__")


def test_an_installed_library_is_no_complaint() -> None:
    check_extra("this", "torch", "none")


def test_a_library_that_is_missing_and_one_that_is_broken_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_here.py").write_text("from os import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    command = r"pip install 'dblightning\[serve\]'"
    for name, reason in {
        "nowhere_here.inner": "needs nowhere_here, which is not installed",
        "broken_here": r"cannot import what it needs \(cannot import name 'nothing_of_this_name' from 'os'.*\)",
    }.items():
        expected = pytest.raises(ImportError, match=f"^this {reason}: {command}, or do without$")
        with expected as raised, importing("this", "serve", ", or do without"):
            importlib.import_module(name)
        assert isinstance(raised.value.__cause__, ImportError)
