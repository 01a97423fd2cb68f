"""A first check of a command line, before anything heavy is imported: what is wrong is said within a second.

Knows the settings from their classes' source (``signatures``) and their ranges from ``settings``. It refuses only what
is certainly wrong; everything else is left to the parser, which has the last word.
"""

# Longer than 400 lines: reading a command line and checking it go by the same tree of settings.

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dblightning.flat_settings import OBJECTIVES, renamed_config, renamed_option
from dblightning.settings import Number, count, problems, rules_of
from dblightning.signatures import NotFound, Parameter, alias, class_path, exports, signature
from dblightning.training_rules import (
    DEFAULTS,
    GROUP_OBJECTIVES,
    conflicts,
    gradient_problems,
    group_problem,
    group_size_problem,
)
from dblightning.weights import check_kl_scale, check_weights

#: the classes behind ``model``, by command
MODELS = {
    "fit": "dblightning.module.RewardRLModule",
    "validate": "dblightning.module.RewardRLModule",
    "test": "dblightning.evaluation.module.BlendEvaluationModule",
    "predict": "dblightning.evaluation.module.BlendEvaluationModule",
}
#: the commands whose model is trained, and whose settings had flat names once
TRAINING = ("fit", "validate")
BLEND = "dblightning.evaluation.specs.BlendSpec"
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
TRAINER_RULES = {
    "max_epochs": Number(least=-1, whole=True, words=(None,), remedy="-1 trains until it is stopped"),
    "max_steps": Number(least=-1, whole=True, remedy="-1 is no limit"),
    "num_nodes": count(),
    "check_val_every_n_epoch": count(words=(None,)),
    "log_every_n_steps": count(0, words=(None,)),
    "num_sanity_val_steps": Number(least=-1, whole=True, words=(None,)),
}
#: settings beside ``model``, ``data`` and ``trainer``
TOP = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "overwrite")
#: modules whose classes may be named without their module, as the parser allows
SHORT_NAMES = (
    "dblightning.rewards",
    "dblightning.miniature.rewards",
    "dblightning.data",
    "dblightning.callbacks",
    "dblightning.objectives",
)
#: settings that name something on disk, if it looks like a path
PATHS = ("train_file", "test_file", "val_file", "init", "pretrained")


class Refused(ValueError):
    """A command line that cannot run; the message is one sentence."""


class Unclear(Exception):
    """The command line has something only the real parser understands."""


def check_command(command: str, arguments: Sequence[str]) -> None:
    """Refuse a command line that is certainly wrong.

    Args:
        command: a key of ``MODELS``.
        arguments: what follows it.

    Raises:
        Refused: with one sentence: value, rule and remedy.
    """
    try:
        tree = parse(command, arguments)
    except Unclear:
        return
    complete = "--print_config" not in " ".join(arguments)
    check_class("model", MODELS[command], tree.get("model") or {}, complete)
    check_class("trainer", TRAINER, tree.get("trainer") or {}, complete)
    data = tree.get("data")
    if data is None and complete:
        raise Refused(
            f"{command} needs prompts: set data.class_path, for example --data dblightning.data.MiniatureDataModule"
        )
    if data is not None:
        check_object("data", data, complete, modules=("dblightning.data",))
    if command in TRAINING:
        _check_together(tree.get("model") or {}, data)
    _check_checkpoint(tree.get("ckpt_path"))


def _check_together(model: Mapping[str, Any], data: Any) -> None:
    """Refuse training settings that do not go together, and groups of one image."""
    groups = {name: each for name, each in model.items() if isinstance(each, dict)}
    found = list(conflicts(groups))
    objective = groups.get("objective") or {}
    path = str(objective.get("class_path", ""))
    if path.removeprefix("dblightning.objectives.") == "RewardGradient":
        found += gradient_problems(groups, {**(objective.get("init_args") or {}), **objective})
    if path.removeprefix("dblightning.objectives.") in GROUP_OBJECTIVES:
        baseline = (groups.get("advantage") or {}).get("baseline", DEFAULTS["advantage"]["baseline"])
        found += group_problem(path.rpartition(".")[2], baseline)
    if isinstance(data, dict) and str(data.get("class_path", "")).startswith("dblightning."):
        given = {"samples_per_prompt": 1} | (data.get("init_args") or {}) | data  # an option stands beside init_args
        found += group_size_problem(groups, given["samples_per_prompt"])
    for problem in found:
        raise Refused(problem)


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
                raise Refused(f"unknown option --{name}{_hint(top, TOP)}; {command} --help lists the settings")
            name, given = renamed_option(name, parse_value(value)) if training else (name, parse_value(value))
            _set(tree, name.split("."), given)
    unknown = [str(key) for key in tree if key not in TOP]
    if unknown:
        raise Refused(f"unknown setting {unknown[0]!r} at the top of the config{_hint(unknown[0], TOP)}")
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
        raise Refused(f"config file {file} must hold settings such as 'model: …', got {_shown(content)}")
    unknown = [str(key) for key in content if key not in TOP]
    if unknown:
        raise Refused(f"config file {file} has an unknown setting {unknown[0]!r}{_hint(unknown[0], TOP)}")
    return content


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

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
    """What a text on the command line is in YAML; itself where it is none."""
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


# ── checking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_object(place: str, value: Any, complete: bool, modules: Sequence[str] = SHORT_NAMES) -> None:
    """Refuse a class path that names nothing, or arguments that its class does not take.

    Args:
        place: the setting's name, for the message.
        value: a class path, or {"class_path": …, "init_args": {…}}.
        complete: whether required arguments must be there.
        modules: where to look for a class named without its module.
    """
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        raise Refused(f"{place} must name a class (class_path and init_args), got {_shown(value)}")
    path = value.get("class_path")
    if path is None:
        return  # settings of the default class
    if not isinstance(path, str):
        raise Refused(f"{place}.class_path must be a dotted path, got {_shown(path)}")
    if "." not in path:
        known = {name: each for module in modules for name, each in exports(module).items()}
        if path not in known:
            hint = _hint(path, known)
            if hint or path[:1].islower():  # no class of Python's has such a name, and the parser finds classes alone
                raise Refused(f"{place} names the class {path!r}, which is not known{hint}")
            return
        path = known[path]
    rest = {key: each for key, each in value.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise Refused(f"{place}.init_args must be settings by name, got {_shown(arguments)}")
    check_class(place, path, arguments | rest, complete)


def check_class(place: str, path: str, settings: Any, complete: bool) -> None:
    """Refuse settings that a class does not take, of a wrong type or out of their range; one sentence each."""
    if not isinstance(settings, dict):
        raise Refused(f"{place} must hold settings by name, got {_shown(settings)}")
    try:
        known = signature(path)
    except NotFound as error:
        raise Refused(f"{place} names the class {path}, but {error}{_near(path)}") from error
    except LookupError:
        return
    further = _metric_arguments() if known.open and known.path.startswith("dblightning.") else None
    for name, value in settings.items():
        parameter = known.parameters.get(str(name))
        if parameter is None:
            if known.open and (not further or name in further):
                continue
            raise Refused(
                f"{path.rpartition('.')[2]} has no setting {str(name)!r} ({place}.{name})"
                f"{_hint(str(name), known.parameters)}"
            )
        check_value(f"{place}.{name}", parameter, value, complete)
    missing = [name for name, each in known.parameters.items() if each.default is None and name not in settings]
    if complete and missing and not known.open:
        raise Refused(f"{place}.{missing[0]} is not set, and {path.rpartition('.')[2]} needs it")
    check_ranges(place, known.path, settings)
    if known.path == BLEND:
        _check_preference(place, settings)


def _metric_arguments() -> set[str]:
    """Keyword arguments of every reward beside its own: torchmetrics'."""
    found = alias("dblightning.rewards.base", "METRIC_ARGUMENTS")
    constants = (each for each in ast.walk(found[0]) if isinstance(each, ast.Constant)) if found else ()
    return {each.value for each in constants if isinstance(each.value, str)}


def check_value(place: str, parameter: Parameter, value: Any, complete: bool) -> None:
    """Refuse a value that its setting's annotation certainly does not allow."""
    if parameter.annotation is None:
        return
    wanted = _kinds(parameter.annotation, parameter.module)
    if not any(_fits(each.node, value) for each in wanted):
        raise Refused(f"{place} must be {_described(parameter.annotation, parameter.module)}, got {_shown(value)}")
    words = [word for each in wanted for word in _words_of(each.node)]
    if isinstance(value, str) and words and value not in words and not re.match(r"[A-Z]|.*\.", value):
        raise Refused(f"{place} must be {_described(parameter.annotation, parameter.module)}, got {_shown(value)}")
    texts = {"str", "Path", "PathLike", "_PATH", "Any"}
    if not (isinstance(value, str) and any(_name(each.node) in texts for each in wanted)):
        for each in wanted:
            _descend(place, each.node, value, each.module, complete)
    if parameter.name in PATHS and _missing(value, (".", "/", "~")):
        raise Refused(f"{place}: there is no {value}; give an existing path")
    if parameter.name == "adapters" and isinstance(value, dict):
        for name, folder in value.items():
            if _missing(folder, ("/", "~")):
                raise Refused(f"{place}.{name}: there is no {folder}; train and export the adapter first")


def _missing(value: Any, starts: tuple[str, ...]) -> bool:
    """Whether a value is a path by its first character, and nothing is there."""
    return isinstance(value, str) and value.startswith(starts) and not Path(value).expanduser().exists()


def _check_preference(place: str, settings: Mapping[str, Any]) -> None:
    """Refuse a blend's weights and strength that no method takes."""
    weights = settings.get("weights") or {}
    try:
        if weights:
            check_weights(weights, list(weights))
        check_kl_scale(settings.get("kl_scale", 1.0))
    except (TypeError, ValueError) as error:
        raise Refused(f"{place}: {error}") from error


def check_ranges(place: str, path: str, settings: Mapping[str, Any]) -> None:
    """Refuse numbers out of the range that their setting has; see ``dblightning.settings``."""
    own = rules_of(place.rpartition(".")[2]) if path.startswith("dblightning.") else {}
    rules = TRAINER_RULES if path == TRAINER else own
    for problem in problems(settings, rules):
        raise Refused(f"{place}.{problem}")


def _check_checkpoint(path: Any) -> None:
    if not isinstance(path, str) or path in ("auto", "last", "best", "hpc", "registry") or "://" in path:
        return
    if not Path(path).expanduser().exists():
        raise Refused(f"--ckpt_path {path} does not exist; name a checkpoint, or auto for the run's latest")


#: annotation text of one kind → what to call it
_WORDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
_MAPPINGS, _LISTS = ("dict", "Mapping"), ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Set", "set")


class Kind(NamedTuple):
    """One member of an annotation's union, and the module whose names it uses."""

    node: ast.expr
    module: str


def _kinds(annotation: ast.expr, module: str) -> list[Kind]:
    """The members of a union, aliases resolved."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return _kinds(ast.parse(annotation.value, mode="eval").body, module)
        except SyntaxError:
            return [Kind(annotation, module)]
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _kinds(annotation.left, module) + _kinds(annotation.right, module)
    if isinstance(annotation, ast.Subscript):
        name = _name(annotation.value)
        if name == "Optional":
            return [*_kinds(annotation.slice, module), Kind(ast.Constant(None), module)]
        if name == "Union":
            members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return [each for member in members for each in _kinds(member, module)]
    if isinstance(annotation, ast.Name) and annotation.id not in _WORDS:
        target = alias(module, annotation.id)
        if target is not None:
            return _kinds(*target)
    return [Kind(annotation, module)]


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _fits(kind: ast.expr, value: Any) -> bool:
    """Whether a value may be of a kind; True in doubt."""
    if isinstance(kind, ast.Constant):
        return value is kind.value or kind.value is not None
    if isinstance(kind, ast.Subscript):
        name = _name(kind.value)
        if name == "Literal":
            return value in _literals(kind)
        if name in _LISTS:
            return isinstance(value, list | tuple) or (isinstance(value, dict) and name not in ("list", "List"))
        if name in _MAPPINGS:
            return isinstance(value, dict)
        return True
    word = _name(kind)
    if word == "int":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if word == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if word == "bool":
        return isinstance(value, bool)
    if word == "str":
        return not isinstance(value, dict | list) and value is not None
    if word in _LISTS:
        return isinstance(value, list)
    if word in _MAPPINGS:
        return isinstance(value, dict)
    if word in ("Any", "object"):
        return True
    # a class: by path or as a mapping
    return value is not None and not isinstance(value, bool | int | float)


def _descend(place: str, kind: ast.expr, value: Any, module: str, complete: bool) -> None:
    """Check what is inside: classes by path, lists and mappings of them, dataclasses."""
    if isinstance(kind, ast.Subscript):
        name = _name(kind.value)
        parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        if name in _LISTS and isinstance(value, list):
            for index, each in enumerate(value):
                _element(f"{place}[{index}]", parts[0], each, module, complete)
        elif name in _MAPPINGS and isinstance(value, dict) and len(parts) == 2:
            for key, each in value.items():
                _element(f"{place}.{key}", parts[1], each, module, complete)
        return
    if isinstance(kind, ast.Name) and kind.id not in _WORDS and isinstance(value, dict | str):
        path = class_path(module, kind.id)
        if isinstance(value, dict) and "class_path" not in value:
            if path is not None and path.startswith("dblightning."):
                check_class(place, path, value, complete)
        elif isinstance(value, dict) or "." in value or re.fullmatch(r"[A-Z]\w+", value):
            check_object(place, value, complete)


def _element(place: str, annotation: ast.expr, value: Any, module: str, complete: bool) -> None:
    check_value(place, Parameter(place, annotation, None, "", module), value, complete)


def _literals(kind: ast.Subscript) -> list[Any]:
    parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    return [each.value for each in parts if isinstance(each, ast.Constant)]


def _words_of(kind: ast.expr) -> list[Any]:
    """The literals of a kind that is a choice."""
    return _literals(kind) if isinstance(kind, ast.Subscript) and _name(kind.value) == "Literal" else []


def _described(annotation: ast.expr, module: str) -> str:
    words: list[str] = []
    for kind, _ in _kinds(annotation, module):
        if isinstance(kind, ast.Subscript) and _name(kind.value) == "Literal":
            words += [repr(each) for each in _literals(kind)]
        elif isinstance(kind, ast.Subscript) or _name(kind) in (*_LISTS, *_MAPPINGS):
            name = _name(kind.value if isinstance(kind, ast.Subscript) else kind)
            words.append("settings by name" if name in _MAPPINGS else "a list")
        else:
            words.append(_WORDS.get(ast.unparse(kind), f"a {_name(kind)} by its class_path"))
    return " or ".join(dict.fromkeys(words))


def _near(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        return _hint(name, exports(module))
    except LookupError:
        return ""


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
