"""A first check of a command line, before anything heavy is imported: what is wrong is said within a second.

Knows the settings from their classes' source (``signatures``) and their ranges from ``settings``. It refuses only what
is certainly wrong; everything else is left to the parser, which has the last word.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dblightning.annotations import LISTS, MAPPINGS, WORDS, described, fits, kinds_of, name_of, words_of
from dblightning.command_tree import TRAINING, Refused, Unclear, hint, parse, shown
from dblightning.settings import Number, check_reward_or_adapters, count, problems, rules_of
from dblightning.signatures import NotFound, Parameter, alias, class_path, exports, signature
from dblightning.training_rules import (
    conflicts,
    group_size_problem,
    objective_problems,
    parts_problem,
)
from dblightning.weights import check_kl_scale, check_weights

#: the classes behind ``model``, by command
MODELS = {
    "fit": "dblightning.module.RewardRLModule",
    "validate": "dblightning.module.RewardRLModule",
    "test": "dblightning.evaluation.module.BlendEvaluationModule",
    "predict": "dblightning.evaluation.module.BlendEvaluationModule",
}
BLEND = "dblightning.evaluation.specs.BlendSpec"
BASIS = "dblightning.training_settings.BasisAdapter"
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
TRAINER_RULES = {
    "max_epochs": Number(least=-1, whole=True, words=(None,), remedy="-1 trains until it is stopped"),
    "max_steps": Number(least=-1, whole=True, remedy="-1 is no limit"),
    "num_nodes": count(),
    "check_val_every_n_epoch": count(words=(None,)),
    "log_every_n_steps": count(0, words=(None,)),
    "num_sanity_val_steps": Number(least=-1, whole=True, words=(None,)),
}
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
    if command in TRAINING:
        _check_rewards(tree.get("model"), complete)
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
    named = model.get("objective") or {}
    objective: dict[str, Any] = {"class_path": named} if isinstance(named, str) else groups.get("objective") or {}
    name = str(objective.get("class_path", "")).removeprefix("dblightning.objectives.")
    # an option stands beside init_args
    found += objective_problems(name, groups, {**(objective.get("init_args") or {}), **objective})
    reward = groups.get("reward") or {}
    path = str(reward.get("class_path", ""))
    kind = path.rpartition(".")[2]
    ours = path.startswith("dblightning.")
    if ours and kind != "WeightedReward" and (groups.get("advantage") or {}).get("per_reward") is True:
        found += parts_problem(kind, 0)
    if isinstance(data, dict) and str(data.get("class_path", "")).startswith("dblightning."):
        given = {"samples_per_prompt": 1} | (data.get("init_args") or {}) | data  # an option stands beside init_args
        found += group_size_problem(groups, given["samples_per_prompt"])
    for problem in found:
        raise Refused(problem)


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
        raise Refused(f"{place} must name a class (class_path and init_args), got {shown(value)}")
    path = value.get("class_path")
    if path is None:
        return  # settings of the default class
    if not isinstance(path, str):
        raise Refused(f"{place}.class_path must be a dotted path, got {shown(path)}")
    if "." not in path:
        known = {name: each for module in modules for name, each in exports(module).items()}
        if path not in known:
            near = hint(path, known)
            if near or path[:1].islower():  # no class of Python's has such a name, and the parser finds classes alone
                raise Refused(f"{place} names the class {path!r}, which is not known{near}")
            return
        path = known[path]
    rest = {key: each for key, each in value.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise Refused(f"{place}.init_args must be settings by name, got {shown(arguments)}")
    check_class(place, path, arguments | rest, complete)


def check_class(place: str, path: str, settings: Any, complete: bool) -> None:
    """Refuse settings that a class does not take, of a wrong type or out of their range; one sentence each."""
    if not isinstance(settings, dict):
        raise Refused(f"{place} must hold settings by name, got {shown(settings)}")
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
                f"{hint(str(name), known.parameters)}"
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
    wanted = kinds_of(parameter.annotation, parameter.module)
    if not any(fits(each.node, value) for each in wanted):
        raise Refused(f"{place} must be {described(parameter.annotation, parameter.module)}, got {shown(value)}")
    words = [word for each in wanted for word in words_of(each.node)]
    if isinstance(value, str) and words and value not in words and not re.match(r"[A-Z]|.*\.", value):
        raise Refused(f"{place} must be {described(parameter.annotation, parameter.module)}, got {shown(value)}")
    texts = {"str", "Path", "PathLike", "_PATH", "Any"}
    if not (isinstance(value, str) and any(name_of(each.node) in texts for each in wanted)):
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
    group = "adapters" if path == BASIS else place.rpartition(".")[2]
    own = rules_of(group, settings) if path.startswith("dblightning.") else {}
    rules = TRAINER_RULES if path == TRAINER else own
    for problem in problems(settings, rules):
        raise Refused(f"{place}.{problem}")


def _check_rewards(model: Any, complete: bool) -> None:
    """Refuse a training run without a reward, or with one beside a basis."""
    settings = model if isinstance(model, dict) else {}
    if not isinstance(settings.get("adapters"), dict | None) or not isinstance(settings.get("adapter"), dict | None):
        return  # of a wrong type, which is said later
    try:
        check_reward_or_adapters(settings, complete)
    except ValueError as error:
        raise Refused(str(error)) from error


def _check_checkpoint(path: Any) -> None:
    if not isinstance(path, str) or path in ("auto", "last", "best", "hpc", "registry") or "://" in path:
        return
    if not Path(path).expanduser().exists():
        raise Refused(f"--ckpt_path {path} does not exist; name a checkpoint, or auto for the run's latest")


def _descend(place: str, kind: ast.expr, value: Any, module: str, complete: bool) -> None:
    """Check what is inside: classes by path, lists and mappings of them, dataclasses."""
    if isinstance(kind, ast.Subscript):
        name = name_of(kind.value)
        parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        if name in LISTS and isinstance(value, list):
            for index, each in enumerate(value):
                _element(f"{place}[{index}]", parts[0], each, module, complete)
        elif name in MAPPINGS and isinstance(value, dict) and len(parts) == 2:
            for key, each in value.items():
                _element(f"{place}.{key}", parts[1], each, module, complete)
        return
    if isinstance(kind, ast.Name) and kind.id not in WORDS and isinstance(value, dict | str):
        path = class_path(module, kind.id)
        if isinstance(value, dict) and "class_path" not in value:
            if path is not None and path.startswith("dblightning."):
                check_class(place, path, value, complete)
        elif isinstance(value, dict) or "." in value or re.fullmatch(r"[A-Z]\w+", value):
            check_object(place, value, complete)


def _element(place: str, annotation: ast.expr, value: Any, module: str, complete: bool) -> None:
    check_value(place, Parameter(place, annotation, None, "", module), value, complete)


def _near(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        return hint(name, exports(module))
    except LookupError:
        return ""
