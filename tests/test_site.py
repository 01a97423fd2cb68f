"""The documentation's site, built as `make docs` does; needs the extra docs."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("mkdocstrings") is None:
    pytest.skip("the extra docs is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_has_every_public_name(site: Path) -> None:
    tested = (ROOT / "tests" / "test_package.py").read_text(encoding="utf-8")
    quoted = re.findall(r'"([A-Z][A-Za-z0-9 ]+)"', tested.split("for module, names in")[1].split("}.items")[0])
    names = " ".join(quoted).split()
    assert len(names) > 20
    anchors = {
        each.rpartition(".")[2]
        for page in (site / "api").rglob("index.html")
        for each in re.findall(r'id="(dblightning\.[\w.]+)"', page.read_text(encoding="utf-8"))
    }
    assert {*names, "DiffusionBlendPipeline", "RewardRLModule"} <= anchors


def test_links_of_every_page_lead_to_files_of_the_site(site: Path) -> None:
    for page in site.rglob("index.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"


def test_the_home_page_is_the_readme(site: Path) -> None:
    assert "make quickstart" in (site / "index.html").read_text(encoding="utf-8")


def test_lists_are_made_ready_for_python_markdown() -> None:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site_hook.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    result = doctest.testmod(hook)
    assert result.attempted == 1 and result.failed == 0
