"""Training settings that do not go together, one sentence each. Imports no torch: a command line is checked by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: settings that a rule looks at, by group, and their defaults; a test holds them against the classes'
DEFAULTS: dict[str, dict[str, Any]] = {
    "optimisation": {"epochs": None},
    "replay": {"buffer_size": 1000},
    "advantage": {"baseline": "value", "drop_flat_groups": False},
}
#: objectives that compare the images of a prompt with each other
GROUP_OBJECTIVES = ("GRPO",)


def conflicts(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each pair of settings that do not go together.

    Args:
        groups: settings by group and name; those left out have their defaults.
    """
    given = {group: {**known, **(groups.get(group) or {})} for group, known in DEFAULTS.items()}
    epochs, size = given["optimisation"]["epochs"], given["replay"]["buffer_size"]
    if epochs is not None and size is not None:
        yield (
            f"optimisation.epochs {epochs} passes through the latest rollout, and replay.buffer_size {size} keeps "
            "earlier ones too; set replay.buffer_size to null, or epochs to null and count policy_steps"
        )
    baseline = given["advantage"]["baseline"]
    if given["advantage"]["drop_flat_groups"] and baseline != "group":
        yield f"advantage.drop_flat_groups leaves out groups, and advantage.baseline is {baseline!r}; set it to group"


def group_problem(objective: str, baseline: str) -> Iterator[str]:
    """A sentence where an objective that compares a prompt's images does not get their advantage."""
    if baseline != "group":
        yield (
            f"{objective} compares the images of a prompt with each other, and advantage.baseline is {baseline!r}; set "
            "advantage.baseline to group"
        )


def group_size_problem(groups: Mapping[str, Mapping[str, Any]], samples_per_prompt: Any) -> Iterator[str]:
    """A sentence where a group would be one image.

    Args:
        groups: settings by group and name.
        samples_per_prompt: of the prompts' data.
    """
    baseline = (groups.get("advantage") or {}).get("baseline", DEFAULTS["advantage"]["baseline"])
    if baseline == "group" and samples_per_prompt == 1:
        yield (
            "advantage.baseline group compares the images of a prompt with each other, and data.samples_per_prompt is "
            "1, a group of one; set it to 2 or more"
        )
