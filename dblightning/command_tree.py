"""A command line as one tree of settings, read before anything heavy is imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dblightning.flat_settings import OBJECTIVES, renamed_config, renamed_option
from dblightning.signatures import signature

#: the commands whose model is trained, and whose settings had flat names once
TRAINING = ("fit", "validate")
#: settings beside ``model``, ``data`` and ``trainer``
TOP = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "overwrite")


class Refused(ValueError):
    """A command line that cannot run; the message is one sentence."""


class Unclear(Exception):
    """The command line has something only the real parser understands."""


def parse(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of a command line as one tree: config files in order, then the options.

    Raises:
        Refused: a file that is not there or not YAML, or an option that no setting has.
        Unclear: a form that is left to the parser.
    """
    tree: dict[str, Any] = {}
    training = command in TRAINING
    for name, value in _options(arguments):
        if name in ("config", "c"):
            content = read_config(value)
            _merge(tree, _renamed(value, content) if training else content)
        elif name == "print_config" or name.startswith("print_config"):
            continue
        elif name == "help" or name.endswith((".help", "+")):
            raise Unclear(name)
        else:
            top = name.split(".")[0]
            if top not in TOP:
                raise Refused(f"unknown option --{name}{hint(top, TOP)}; {command} --help lists the settings")
            name, given = renamed_option(name, parse_value(value)) if training else (name, parse_value(value))
            _set(tree, name.split("."), given)
    unknown = [str(key) for key in tree if key not in TOP]
    if unknown:
        raise Refused(f"unknown setting {unknown[0]!r} at the top of the config{hint(unknown[0], TOP)}")
    model = tree.get("model")
    if training and isinstance(model, dict) and isinstance(model.get("objective"), dict):
        model["objective"].setdefault("class_path", OBJECTIVES["dpok"])
    return tree


def _renamed(file: str, content: dict[str, Any]) -> dict[str, Any]:
    try:
        return renamed_config(content)[0]
    except ValueError as error:
        raise Refused(f"config file {file}: {error}") from error


def _options(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if word in ("-h", "-c"):
            word = {"-h": "--help", "-c": "--config"}[word]
        if not word.startswith("--") or word == "--":
            raise Refused(f"unexpected argument {word!r}: settings are given as --name value or in --config FILE")
        name, equals, value = word[2:].partition("=")
        if name.startswith("print_config") or name in ("help", "overwrite"):
            yield name, value or "true"
        elif equals:
            yield name, value
        elif not pending or (pending[0].startswith("--") and not re.match(r"--?\d", pending[0])):
            raise Refused(f"option --{name} needs a value")
        else:
            yield name, pending.pop(0)


def read_config(file: str) -> dict[str, Any]:
    """The settings of one YAML file.

    Raises:
        Refused: naming the file and what is wrong with it.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise Refused(f"config file {file} {what}; the configs that come with the project are in configs/")
    try:
        content = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"config file {file} cannot be read: {error}") from error
    except ValueError as error:
        raise Refused(f"config file {file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise Refused(f"config file {file} must hold settings such as 'model: …', got {shown(content)}")
    unknown = [str(key) for key in content if key not in TOP]
    if unknown:
        raise Refused(f"config file {file} has an unknown setting {unknown[0]!r}{hint(unknown[0], TOP)}")
    return content


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """YAML's own, which takes the last of two entries of one name without a word."""
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(f"{key.value!r} is set twice, again in line {key.start_mark.line + 1}")
                seen.add(key.value) if isinstance(key.value, str) else None
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-3 for a text
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
        list("-+0123456789."),
    )
    Loader.yaml_implicit_resolvers = {
        # integers first: the pattern above takes them too
        key: sorted(each, key=lambda pair: pair[0].endswith("float"))
        for key, each in Loader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'unreadable'}{place}") from error


def parse_value(text: str) -> Any:
    """Value of a text on the command line in YAML; the text itself where it has none."""
    try:
        return _yaml(text)
    except ValueError:
        return text


def _merge(tree: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            other = "class_path" in value and old.get("class_path") not in (None, value["class_path"])
            if other:
                old.pop("init_args", None)
            _merge(old, value)
        else:
            tree[key.removesuffix("+") if isinstance(key, str) else key] = value


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.get(key)
        if isinstance(below, list) and below:  # the parser's rule: what follows belongs to the last one
            if not isinstance(below[-1], dict):
                below[-1] = {"class_path": below[-1]}
            tree = below[-1]
            continue
        if isinstance(below, str) and key != "init_args":
            below = {"class_path": below}
        if not isinstance(below, dict):
            below = {}
        tree[key] = below
        tree = below
    last = keys[-1]
    if isinstance(tree.get(last), dict) and isinstance(value, dict):
        _merge(tree[last], value)
    elif isinstance(tree.get(last), dict) and isinstance(value, str) and "class_path" in tree[last]:
        tree[last]["init_args"] = _arguments_of(value, tree[last].get("init_args") or {})
        _merge(tree[last], {"class_path": value})
    else:
        tree[last] = value


def _arguments_of(path: str, settings: Any) -> Any:
    """Of another class's settings those that this one has too, which the parser keeps."""
    try:
        known = signature(path)
    except LookupError:
        return settings
    if known.open or not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if name in known.parameters}


def hint(word: str, known: Iterable[str]) -> str:
    """A question after the known word that is nearest, for the end of a message; "" where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: Any) -> str:
    """A value as messages show it, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
