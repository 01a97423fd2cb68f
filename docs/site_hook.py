"""What the pages of docs/ need to be a site: `make docs`.

The pages are written to be read in the repository. So here the README becomes the home page, a link to a file outside
of docs/ gets a copy of that file in the site, lists are indented as Python-Markdown wants them, and the API reference
gets one page for each group of public names.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dblightning.signatures import exports

ROOT = Path(__file__).parents[1]
#: page of the API reference → its title, modules whose public classes it lists, and further names
REFERENCE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "pipeline": ("Pipeline and presets", (), ("dblightning.DiffusionBlendPipeline", "dblightning.preset.Preset")),
    "training": (
        "Training",
        (),
        (
            "dblightning.RewardRLModule",
            "dblightning.training_settings",
            "dblightning.checkpointing.RunCheckpoint",
            "dblightning.run_folder.RunGuard",
        ),
    ),
    "objectives": ("Objectives", ("dblightning.objectives",), ()),
    "blending": ("Blends and steering", ("dblightning.blending",), ("dblightning.steering", "dblightning.methods")),
    "rewards": ("Rewards", ("dblightning.rewards", "dblightning.miniature.rewards"), ()),
    "data": ("Prompts", ("dblightning.data",), ()),
    "callbacks": ("Callbacks", ("dblightning.callbacks",), ()),
    "evaluation": ("Evaluation", ("dblightning.evaluation",), ()),
    "adapters": (
        "Adapters and backbones",
        (),
        ("dblightning.adapters.AdapterBank", "dblightning.backbone.DiffusersBackbone"),
    ),
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^\s*(```|~~~)")
ITEM = re.compile(r"^(-|\d+\.) ")


def reference(title: str, modules: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Text of one page of the API reference."""
    classes: dict[str, str] = {}
    for module in modules:
        classes = exports(module) | classes  # a class that several modules re-export is the first one's
    return f"# {title}\n\n" + "\n\n".join(f"::: {path}" for path in (*names, *classes.values())) + "\n"


def outside(text: str, folder: str) -> set[str]:
    """Files of the repository, outside of docs/, to which a page in ``folder`` links; paths from the root."""
    found = set()
    for _, target, _ in LINK.findall(text):
        parts = urlsplit(target)
        path = posixpath.normpath(posixpath.join(folder, parts.path))
        if not parts.scheme and parts.path and not path.startswith("docs/") and (ROOT / path).is_file():
            found.add(path)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference's pages, and the files outside of docs/ that pages link to."""
    for name, group in REFERENCE.items():
        files.append(File.generated(config, f"api/{name}.md", content=reference(*group)))
    linked = outside((ROOT / "README.md").read_text(encoding="utf-8"), "")
    for file in files.documentation_pages():
        if file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(ROOT / "docs"):
            text = Path(file.abs_src_path).read_text(encoding="utf-8")
            linked |= outside(text, posixpath.join("docs", posixpath.dirname(file.src_uri)))
    for path in sorted(linked - {"README.md"}):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page as Python-Markdown and the site's folders want it."""
    uri = page.file.src_uri
    if uri == "index.md":
        markdown, folder = (ROOT / "README.md").read_text(encoding="utf-8"), ""
    elif (ROOT / "docs" / uri).is_file():
        folder = posixpath.join("docs", posixpath.dirname(uri))
    else:
        folder = posixpath.dirname(uri)

    def place(match: re.Match[str]) -> str:
        parts = urlsplit(match[2])
        if parts.scheme or not parts.path:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, parts.path)).removeprefix("docs/")
        here = posixpath.relpath(path, posixpath.dirname(uri) or ".")
        return match[1] + here + match[2][len(parts.path) :] + match[3]

    return indented(LINK.sub(place, markdown))


def indented(markdown: str) -> str:
    r"""Lists as Python-Markdown reads them, where GitHub is content with less.

    Continuation lines get two more spaces (it wants four), an item after one of several paragraphs an
    empty line before it.

    >>> print(indented("- one\n  goes on\n\n  another paragraph\n- two\n- three\nafter"))
    - one
        goes on
    <BLANKLINE>
        another paragraph
    <BLANKLINE>
    - two
    - three
    after
    """
    lines: list[str] = []
    fence = item = gap = False
    for line in markdown.split("\n"):
        if not line.startswith(" ") and FENCE.match(line):
            fence, item = not fence, False
        elif not fence and ITEM.match(line):
            if item and gap and lines[-1]:
                lines.append("")
            item, gap = True, False
        elif item and line.startswith("  "):
            line = f"  {line}"
        elif line:
            item = False
        gap = gap or not line
        lines.append(line)
    return "\n".join(lines)
