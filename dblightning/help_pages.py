"""The pages of ``python -m dblightning <command> --help``, from the classes' source: torch is not imported."""

from __future__ import annotations

import ast
import shutil
import textwrap

from dblightning.preflight import MODELS, TRAINER
from dblightning.signatures import Parameter, Signature, exports, group, signature

#: topic → what its page lists
TOPICS = ("model", "backbone", "rewards", "objectives", "data", "callbacks", "trainer")
BACKBONE = "dblightning.backbone.DiffusersBackbone"
#: modules whose classes each topic lists
LISTED = {
    "rewards": ("dblightning.rewards", "dblightning.miniature.rewards"),
    "data": ("dblightning.data",),
    "callbacks": ("dblightning.callbacks",),
    "objectives": ("dblightning.objectives",),
}
#: further classes of a topic
FURTHER = {"callbacks": ("dblightning.checkpointing.RunCheckpoint",), "rewards": (), "data": (), "objectives": ()}
#: base classes and helpers, which no config names
UNLISTED = {"RewardMetric", "RewardWorker", "PromptDataModule", "Objective", "PolicyGradient", "Policy", "Metrics"}

INTRODUCTION = {
    "fit": (
        "Train a LoRA adapter on a reward.",
        "python -m dblightning fit --config configs/quickstart.yaml --model.adapter.rank 8",
    ),
    "validate": (
        "Score a trained checkpoint.",
        "python -m dblightning validate --config configs/quickstart.yaml --ckpt_path auto",
    ),
    "test": (
        "Compare blends on the same prompts and noise: score table, tables, figures, one HTML page.",
        "python -m dblightning test --config configs/eval/quickstart.yaml",
    ),
    "predict": (
        "Write images of blends.",
        "python -m dblightning predict --config configs/eval/predict.yaml --model.out runs/images",
    ),
}


def command_help(command: str) -> str:
    """The help page of fit, validate, test or predict."""
    what, example = INTRODUCTION[command]
    lines = [
        f"usage: python -m dblightning {command} --config FILE [--config FILE …] [--SETTING VALUE …]",
        "",
        what,
        "",
        f"    {example}",
        "",
        "Settings come from YAML files, later ones over earlier ones, and from options over both. A class is named by",
        "its path, its arguments follow: --model.reward dblightning.rewards.PickScore --model.reward.scale 10",
        "",
        "general:",
        *_entry("--config FILE", "a YAML file of settings; whole runs are in configs/, additions in callbacks/"),
        *_entry("--print_config", "print all settings with their values and stop"),
        *_entry("--seed_everything N", "seed of Python, numpy and torch [0]"),
    ]
    if command in ("fit", "validate"):
        lines += _entry("--ckpt_path FILE", "checkpoint to resume from or to score; auto: the run's latest intact one")
    if command == "fit":
        lines += _entry("--overwrite", "replace what another run left in the same folders")
    lines += [
        *_entry("--debug", "show the whole trace of an error"),
        *_entry("--help TOPIC|CLASS", f"more on one of {', '.join(TOPICS)}, or on a class such as SampleGrid"),
        *_entry("--help all", "every setting as the parser lists them (slow)"),
        "",
        *_settings("model", signature(MODELS[command])),
        "",
        "data: prompts, by class (--data CLASS --data.SETTING VALUE)",
        *_listing("data"),
        "",
        "trainer: Lightning's (--trainer.SETTING VALUE); most used are max_epochs, accelerator, devices, num_nodes,",
        "  precision, logger, callbacks, default_root_dir; --help trainer lists all",
        "callbacks: (--trainer.callbacks CLASS)",
        *_listing("callbacks"),
        "rewards: (--model.reward CLASS)",
        *_listing("rewards"),
        "objectives: (--model.objective CLASS)",
        *_listing("objectives"),
    ]
    return "\n".join(lines)


def topic_help(topic: str) -> str | None:
    """The page of a topic or of one class; None for neither."""
    if topic == "model":
        return "\n\n".join("\n".join(_settings("model", signature(MODELS[each]))) for each in ("fit", "test"))
    if topic == "backbone":
        return "\n".join(_settings("model.backbone", signature(BACKBONE)))
    if topic == "trainer":
        return "\n".join(_settings("trainer", signature(TRAINER)))
    if topic in LISTED:
        pages = [_settings(_place(topic), signature(path)) for path in _classes(topic).values()]
        return "\n\n".join("\n".join(page) for page in pages)
    for each in LISTED:
        if topic in _classes(each):
            return "\n".join(_settings(_place(each), signature(_classes(each)[topic])))
    try:
        return "\n".join(_settings("", signature(topic)))
    except LookupError:
        return None


def _place(topic: str) -> str:
    return {
        "rewards": "model.reward",
        "objectives": "model.objective",
        "callbacks": "trainer.callbacks",
        "data": "data",
    }[topic]


def _classes(topic: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for module in LISTED[topic]:
        for name, path in exports(module).items():
            if name not in UNLISTED:
                found.setdefault(name, path)
    return found | {path.rpartition(".")[2]: path for path in FURTHER[topic]}


def _listing(topic: str) -> list[str]:
    """One line per class."""
    lines: list[str] = []
    for path in _classes(topic).values():
        try:
            lines += _entry(path, signature(path).doc)
        except LookupError:
            lines += _entry(path, "")
    return lines


def _settings(place: str, found: Signature) -> list[str]:
    """A class's settings, one entry each."""
    lines = textwrap.wrap(f"{place or found.path}: {found.path.rpartition('.')[2]}. {found.doc}", _width())
    for each in found.parameters.values():
        name, members = (f"--{place}.{each.name}" if place else each.name), group(each)
        if members is None:
            lines += _entry(name, _described(each))
        for member in members.parameters.values() if members is not None else ():
            lines += _entry(f"{name}.{member.name}", _described(member))
    return lines


def _described(parameter: Parameter) -> str:
    default = "required" if parameter.default is None else parameter.default.strip("'\"") or "empty"
    default = "null" if default == "None" else default
    kind = "" if parameter.annotation is None else ast.unparse(parameter.annotation).replace("'", "")
    return f"{parameter.doc} ({kind}) [{default}]".strip() if kind else f"{parameter.doc} [{default}]".strip()


def _entry(name: str, text: str) -> list[str]:
    indent = " " * 30
    wrapped = textwrap.wrap(text, _width() - len(indent)) or [""]
    if len(name) > len(indent) - 4:
        return [f"  {name}", *(indent + line for line in wrapped if line)]
    return [f"  {name:<{len(indent) - 2}}{wrapped[0]}", *(indent + line for line in wrapped[1:])]


def _width() -> int:
    return min(max(shutil.get_terminal_size((110, 24)).columns, 70), 130)
