"""``python -m dblightning push``: a folder for the hub (adapters, preset, pictures, model card), and its upload."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dblightning.adapters.files import WEIGHTS_NAME, file_digest, find_file, read_lora, write_lora
from dblightning.adapters.lora import LoraFile
from dblightning.arguments import paths_by_name, push_parser
from dblightning.miniature import adapter_paths
from dblightning.sharing.card import gains_of, model_card

PRESET_NAME = "preset.yaml"
#: pictures that an evaluation writes beside its score table
REPORT_PICTURES = ("grid.png", "pareto.png")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
#: what a file's metadata may hold and nobody else needs
PRIVATE_FACTS = ("command",)


@dataclass(frozen=True)
class Push:
    """A folder that is ready for the hub.

    Attributes:
        repo: USER/NAME.
        folder: where it lies.
        files: what is sent, relative to the folder; whatever else lies there stays.
    """

    repo: str
    folder: Path
    files: list[str]

    def sizes(self) -> dict[str, int]:
        """File → bytes."""
        return {name: (self.folder / name).stat().st_size for name in self.files}


def prepare(
    repo: str,
    base: str,
    folder: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    soup: str | Path | None = None,
    scores: str | Path | None = None,
    preset: str | Path | None = None,
    pictures: Sequence[str | Path] = (),
    licence: str = "apache-2.0",
    title: str | None = None,
) -> Push:
    """Make the folder. Needs no network.

    Adapters go to ``adapters/<name>/`` in diffusers' form, the soup to the root, where plain diffusers finds it. This
    machine's paths stay out: the preset names adapters by their place in the repository, and their metadata lose the
    command of training and absolute paths.

    Args:
        repo: USER/NAME on the hub.
        base: hub id of the base model, or "miniature".
        folder: made; files of the same names are replaced.
        adapters: name → LoRA file or folder.
        soup: a LoRA that :func:`dblightning.sharing.export_soup` wrote.
        scores: score table of an evaluation; the pictures beside it are taken too where ``pictures`` is empty.
        preset: preset file.
        pictures: image files.
        licence: the hub's short name of a licence, such as "apache-2.0" or "openrail++".
        title: the card's heading.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: nothing to share, a repository or base that is no hub id, a preset whose adapters are not shared, a
            score table without a base.
    """
    for name, value in (("repo", repo), ("base", base)):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not (name == "base" and value == "miniature"):
            raise ValueError(f"{name} must be USER/NAME on the hub{' or miniature' * (name == 'base')}, got {value!r}")
    if not adapters and soup is None:
        raise ValueError("nothing to share; name adapters, or a soup")
    files = {name: _read(path) for name, path in (adapters or {}).items()}
    for name in files:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"an adapter's name becomes a folder's: letters, digits, _ and -, got {name!r}")
    shown = [_picture(path) for path in pictures] or _beside(scores)
    shared = None if preset is None else _preset(preset, base, files)
    gains = None if scores is None else gains_of(scores)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write(file, folder, f"adapters/{name}/{WEIGHTS_NAME}") for name, file in files.items()]
    root = None if soup is None else _read(soup)
    if root is not None:
        written.append(_write(root, folder, WEIGHTS_NAME))
    for index, picture in enumerate(shown):
        target = f"images/{index:02d}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', picture.name)}"
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / target)
        written.append(target)
    if shared is not None:
        shared.write(folder / PRESET_NAME)
        written.append(PRESET_NAME)
    places = [name for name in written if name.startswith("images/")]
    card = model_card(repo, base, licence, files, root, gains, shared, places, title)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return Push(repo, folder, [*written, "README.md"])


def push(prepared: Push, public: bool = False, api: Any = None) -> str:
    """Upload a prepared folder in one commit; its repository is made where there is none.

    Args:
        prepared: the folder.
        public: whether a new repository is public.
        api: a ``huggingface_hub.HfApi``; None makes one, with the token of ``hf auth login`` or HF_TOKEN.

    Returns:
        The commit's address.

    Raises:
        OSError: no network, no token or no permission, as ``huggingface_hub`` says it.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="dblightning")
    api.create_repo(prepared.repo, private=not public, repo_type="model", exist_ok=True)
    commit = api.upload_folder(
        repo_id=prepared.repo,
        folder_path=prepared.folder,
        allow_patterns=prepared.files,
        commit_message="Share adapters with dblightning",
    )
    return str(commit.commit_url)


def _read(path: str | Path) -> LoraFile:
    """A LoRA without what is nobody else's business; ``sha256`` is that of the file that :func:`_write` writes."""
    lora = read_lora(path)
    lora.facts = _without_paths({name: value for name, value in lora.facts.items() if name not in PRIVATE_FACTS})
    lora.facts["sha256_source"] = file_digest(path)
    lora.path = find_file(path)
    return lora


def _without_paths(value: Any) -> Any:
    """Nested settings without those that are an absolute path."""
    if isinstance(value, Mapping):
        return {name: _without_paths(each) for name, each in value.items() if not _is_path(each)}
    return [_without_paths(each) for each in value if not _is_path(each)] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())


def _write(lora: LoraFile, folder: Path, name: str) -> str:
    write_lora(folder / name, lora)
    lora.facts["sha256"] = file_digest(folder / name)  # for the card; a file cannot hold its own
    return name


def _picture(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix.lower() not in PICTURE_ENDINGS:
        raise FileNotFoundError(f"{path} is no picture; give files that end in {', '.join(PICTURE_ENDINGS)}")
    return path


def _beside(scores: str | Path | None) -> list[Path]:
    folder = None if scores is None else Path(scores).parent
    return [] if folder is None else [folder / name for name in REPORT_PICTURES if (folder / name).is_file()]


def _preset(path: str | Path, base: str, files: Mapping[str, LoraFile]) -> Any:
    """The preset as it is shared."""
    from dblightning.preset import Preset

    preset = Preset.read(path)
    knots: Any = [preset.weights or {}] if isinstance(preset.weights, Mapping | None) else preset.weights
    missing = sorted({name for knot in knots for name, weight in knot.items() if weight} - files.keys())
    if missing:
        raise ValueError(f"{path} weighs {missing[0]!r}, which is not among the adapters to share {sorted(files)}")
    return preset.replaced(base=base, adapters={name: f"adapters/{name}" for name in files})


def push_main(argv: Sequence[str]) -> None:
    """The command."""
    options = push_parser().parse_args(argv)
    folder = options.out or Path("runs") / "hub" / options.repo.rpartition("/")[2]
    try:
        files = adapter_paths(paths_by_name(options.adapters))
        prepared = prepare(
            options.repo, options.base, folder, files, options.soup, options.scores,
            options.preset, options.pictures, options.licence, options.title,
        )  # fmt: skip
        for name, size in prepared.sizes().items():
            print(f"{size:>12,}  {name}")
        if options.dry_run:
            print(f"dry run: {prepared.repo} would get these files of {prepared.folder}; nothing was sent")
            return
        print(push(prepared, options.public))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}; the folder is {folder}")
