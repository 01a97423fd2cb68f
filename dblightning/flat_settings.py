"""Flat names of training settings, from before they had groups: still read from YAML, options, arguments and files.

Imports no torch: the first check of a command line knows these names too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: flat name → where it is now
GROUPED = {
    "adapter_name": "adapter.name",
    "rank": "adapter.rank",
    "lora_alpha": "adapter.lora_alpha",
    "target_modules": "adapter.target_modules",
    "init_adapter": "adapter.init",
    "num_inference_steps": "sampling.num_inference_steps",
    "eta": "sampling.eta",
    "guidance_scale": "sampling.guidance_scale",
    "negative_prompt": "sampling.negative_prompt",
    "rollout_batch_size": "sampling.rollout_batch_size",
    "overlap_reward": "sampling.overlap_reward",
    "rollout_execution": "sampling.execution",
    "clip_range": "objective.init_args.clip_range",
    "kl": "kl.form",
    "kl_precision": "kl.precision",
    "kl_share": "kl.share",
    "kl_weight": "kl.weight",
    "kl_target": "kl.target",
    "kl_warmup": "kl.warmup",
    "reward_weight": "optimisation.reward_weight",
    "advantage": "advantage.baseline",
    "normalize_advantage": "advantage.normalize",
    "learning_rate": "optimisation.learning_rate",
    "learning_rate_schedule": "optimisation.schedule",
    "weight_decay": "optimisation.weight_decay",
    "policy_steps": "optimisation.policy_steps",
    "policy_batch_size": "optimisation.batch_size",
    "gradient_accumulation": "optimisation.accumulation",
    "clip_grad_norm": "optimisation.clip_grad_norm",
    "skip_last_steps": "optimisation.skip_last_steps",
    "value_learning_rate": "advantage.value_learning_rate",
    "value_steps": "advantage.value_steps",
    "value_batch_size": "advantage.value_batch_size",
    "value_width": "advantage.value_width",
    "statistics_window": "advantage.statistics_window",
    "buffer_size": "replay.buffer_size",
}
FLAT = {new: old for old, new in GROUPED.items()}
#: short names of objectives
OBJECTIVES = {
    "dpok": "dblightning.objectives.DPOK",
    "ppo": "dblightning.objectives.PPO",
    "reward_gradient": "dblightning.objectives.RewardGradient",
}


def is_flat(name: str, value: Any) -> bool:
    """Whether a setting has a flat name; ``kl`` and ``advantage`` are groups now, and were a word."""
    return name in GROUPED and (name not in ("kl", "advantage") or isinstance(value, str))


def grouped(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings with every flat name put into its group, and which were: flat name → new.

    Args:
        settings: by name; groups may be mappings or dataclasses, the objective a class path, mapping or object.

    Raises:
        ValueError: a setting given by both its names.
    """
    flat = {name: value for name, value in settings.items() if is_flat(str(name).removesuffix("+"), value)}
    found = {name: value for name, value in settings.items() if name not in flat}
    if isinstance(found.get("objective"), str):
        found["objective"] = OBJECTIVES.get(found["objective"], found["objective"])
    for name, value in flat.items():
        plus = "+" if name.endswith("+") else ""
        _put(found, f"{GROUPED[name.removesuffix('+')]}{plus}", value, name)
    return found, {name: GROUPED[name.removesuffix("+")] for name in flat}


def _put(settings: dict[str, Any], path: str, value: Any, name: str) -> None:
    group, *between, leaf = path.split(".")
    below = settings.get(group)
    if dataclasses.is_dataclass(below) and not isinstance(below, type):
        settings[group] = dataclasses.replace(below, **{leaf: value})
        return
    if below is not None and not isinstance(below, str | Mapping):
        raise ValueError(f"{name} is a setting of {group}, which is given as {type(below).__name__}; set it there")
    target: dict[str, Any] = {"class_path": below} if isinstance(below, str) else dict(below or {})
    settings[group] = target
    for key in between:
        target[key] = dict(target.get(key) or {})
        target = target[key]
    if leaf in target:
        raise ValueError(f"{name} and {path} are one setting, got {value!r} and {target[leaf]!r}; give one")
    target[leaf] = value


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of today or of an earlier version as one level: ``kl.weight`` → value."""
    found = dict(grouped(settings)[0])
    if isinstance(found.get("objective"), str):
        found["objective"] = {"class_path": found["objective"]}
    return dict(_leaves(found, ""))


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their flat names, as adapter files hold them; those that never had one stay dotted."""
    found = {FLAT.get(name, name): value for name, value in dotted(settings).items()}
    path = found.pop("objective.class_path", None)
    if path is not None:
        found["objective"] = next((short for short, known in OBJECTIVES.items() if known == path), path)
    return found


# ── where they are read ──────────────────────────────────────────────────────────────────────────────────────────────


def renamed_option(name: str, value: Any) -> tuple[str, Any]:
    """A command line option, "model.rank", by its name of today, and its value.

    Args:
        name: without dashes.
        value: as parsed.
    """
    top, _, setting = name.partition(".")
    plain = setting.removesuffix("+")
    if top != "model":
        return name, value
    if plain == "objective" and isinstance(value, str):
        return name, OBJECTIVES.get(value, value)
    if is_flat(plain, value):
        return f"model.{GROUPED[plain]}{setting[len(plain) :]}", value
    return name, value


def renamed_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a config file by the names of today, and which flat names it had."""
    if not isinstance(content.get("model"), Mapping):
        return dict(content), {}
    model, moved = grouped(content["model"])
    return {**content, "model": model}, moved


def renamed_arguments(
    arguments: Sequence[str], read: Callable[[str], Any], parse: Callable[[str], Any]
) -> tuple[list[str], dict[str, str]]:
    """A command line by the names of today, and which flat names it had; a config file with such becomes its content.

    Args:
        arguments: what follows the command.
        read: the settings in a config file.
        parse: the value that a text is in YAML.
    """
    pending, found = list(arguments), list[str]()
    moved: dict[str, str] = {}
    while pending:
        word = pending.pop(0)
        option, equals, value = word.partition("=")
        if not word.startswith(("--model.", "--config")) or not (equals or pending):
            found.append(word)
            continue
        value = value if equals else pending.pop(0)
        if option == "--config":
            content = read(value)
            renamed, flat_names = renamed_config(content)
            value = _yaml(renamed) if renamed != content else value
            moved |= flat_names
        else:
            given = parse(value)
            name, new = renamed_option(option.removeprefix("--"), given)
            moved |= {option.removeprefix("--model."): name.removeprefix("model.")} if f"--{name}" != option else {}
            option, value = f"--{name}", value if new == given or new is given else str(new)
        found += [f"{option}={value}"]
    return found, moved


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False)


_named = False  # whether the new names were logged in this process


def log_new_names(moved: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Log the new names of flat settings, once in a process."""
    global _named
    if moved and not _named:
        _named = True
        say("settings have groups now: " + ", ".join(f"{old} is {new}" for old, new in moved.items()))


def reads_flat_settings(say: Callable[[str], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a constructor: keyword arguments by their flat names are put into their groups."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def read(self: Any, *args: Any, **settings: Any) -> None:
            found, moved = grouped(settings)
            log_new_names(moved, say)
            init(self, *args, **found)

        return read

    return decorate
