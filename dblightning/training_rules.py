"""Training settings that do not go together, one sentence each. Imports no torch: a command line is checked by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: settings that a rule looks at, by group, and their defaults; a test holds them against the classes'
DEFAULTS: dict[str, dict[str, Any]] = {
    "sampling": {"num_inference_steps": 50, "overlap_reward": False},
    "optimisation": {"policy_steps": 5, "epochs": None, "skip_last_steps": 0},
    "kl": {"form": "exact", "share": 1.0, "weight": 0.1, "to_go": False},
    "replay": {"buffer_size": 1000},
    "window": {"size": None, "position": "fixed", "first": 0, "last": None, "tail_steps": None},
    "advantage": {"baseline": "value", "drop_flat_groups": False, "per_reward": False},
}
#: objectives that compare the images of a prompt with each other
GROUP_OBJECTIVES = ("GRPO", "GRPOGuard")
#: objectives on steps of trajectories; none named is DPOK
TRAJECTORY_OBJECTIVES = ("", "DPOK", "PPO", "GRPO", "GRPOGuard", "FlowDPPO")
#: objectives on noised final samples
FORWARD_OBJECTIVES = ("NFT", "AWM", "BestOfN")
#: those of them whose samples are of an old policy
OLD_POLICY_OBJECTIVES = ("NFT", "AWM")
#: what is said of a window without a stochastic step where the objective trains on such steps
NO_STEP = "window.size 0 leaves no stochastic step, and the objective trains on them; set it to 1 or more"


def conflicts(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each pair of settings that do not go together.

    Args:
        groups: settings by group and name; those left out have their defaults.
    """
    given = _with_defaults(groups)
    epochs, size = given["optimisation"]["epochs"], given["replay"]["buffer_size"]
    if epochs is not None and size is not None:
        yield (
            f"optimisation.epochs {epochs} passes through the latest rollout, and replay.buffer_size {size} keeps "
            "earlier ones too; set replay.buffer_size to null, or epochs to null and count policy_steps"
        )
    baseline = given["advantage"]["baseline"]
    if given["advantage"]["drop_flat_groups"] and baseline != "group":
        yield f"advantage.drop_flat_groups leaves out groups, and advantage.baseline is {baseline!r}; set it to group"
    if given["advantage"]["per_reward"] and baseline != "group":
        yield f"advantage.per_reward compares within groups, and advantage.baseline is {baseline!r}; set it to group"
    kl = given["kl"]
    if kl["to_go"] and kl["form"] != "exact":
        yield f"kl.to_go is of the exact KL, got kl.form {kl['form']!r}; set kl.form to exact"
    if kl["to_go"] and kl["weight"] == 0:
        yield "kl.to_go needs a kl.weight > 0, got 0; set kl.to_go to false"
    steps, skipped = given["sampling"]["num_inference_steps"], given["optimisation"]["skip_last_steps"]
    yield from window_problems(given["window"], steps, skipped)


def window_problems(window: Mapping[str, Any], steps: int, skipped: int) -> Iterator[str]:
    """A sentence for a window that a schedule of ``steps`` has no room for, whose last ``skipped`` are not trained."""
    size, first, last = window["size"], window["first"], window["last"]
    if window["position"] not in ("fixed", "random", "sliding"):
        yield f"window.position must be fixed, random or sliding, got {window['position']!r}"
    if size is None:
        yield from (
            f"window.{name} needs a window.size, got null" for name in ("first", "last", "tail_steps") if window[name]
        )
        return
    room = steps - skipped - size
    if room < 0:
        yield f"window.size must be at most the {steps - skipped} trainable of {steps} steps, got {size}"
    elif not first <= (room if last is None else last) <= room:
        yield (
            f"a window of {size} steps may begin at step 0 to {room} of {steps} ({skipped} skipped at the end), got "
            f"window.first {first} and window.last {last}"
        )


def _with_defaults(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group: {**known, **(groups.get(group) or {})} for group, known in DEFAULTS.items()}


def gradient_problems(groups: Mapping[str, Mapping[str, Any]], objective: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each setting that does not go with ``RewardGradient``.

    Args:
        groups: settings by group and name.
        objective: its own settings by name.
    """
    given, name = _with_defaults(groups), "RewardGradient"
    optimisation, kl, sampling = given["optimisation"], given["kl"], given["sampling"]
    updates, epochs, skipped = (optimisation[each] for each in ("policy_steps", "epochs", "skip_last_steps"))
    if updates != 1 and objective.get("variant") != "refl":
        yield (
            f"{name} makes one update per rollout, got optimisation.policy_steps {updates}; set it to 1 and make more "
            "and smaller rollouts, or take the variant refl, which draws other steps for each update"
        )
    if epochs is not None:
        yield f"{name} makes one update per rollout, got optimisation.epochs {epochs}; set it to null"
    if kl["form"] != "exact":
        yield f"{name} takes the exact KL, got kl.form {kl['form']!r}; set it to exact"
    if kl["to_go"]:
        yield f"{name} differentiates the KL of every step as it is; set kl.to_go to false"
    if kl["share"] != 1:
        yield f"{name} takes the KL of every step that it trains, got kl.share {kl['share']}; set it to 1"
    if sampling["overlap_reward"]:
        yield f"{name} scores with gradients after the rollout; set sampling.overlap_reward to false"
    if given["window"]["size"] is not None:
        yield f"{name} goes back along every step; leave window.size out, got {given['window']['size']}"
    trained, steps = sampling["num_inference_steps"] - skipped, objective.get("steps")
    if steps is not None and steps > trained:
        yield f"objective.steps must be at most the {trained} steps that are trained, got {steps}"
    if objective.get("variant") == "draft_lv" and (steps not in (None, 1) or skipped > 0):
        yield (
            f"draft_lv trains the last step alone, got objective.steps {steps} and skip_last_steps {skipped}; set them "
            "to null and 0"
        )


def objective_problems(
    objective: str, groups: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]
) -> Iterator[str]:
    """A sentence for each setting that does not go with an objective of this package.

    Args:
        objective: name of its class.
        groups: settings by group and name.
        own: the objective's own settings by name.
    """
    if objective == "RewardGradient":
        yield from gradient_problems(groups, own)
    if objective in FORWARD_OBJECTIVES:
        yield from forward_problems(objective, groups, objective in OLD_POLICY_OBJECTIVES)
    if objective in TRAJECTORY_OBJECTIVES and _with_defaults(groups)["window"]["size"] == 0:
        yield NO_STEP
    if objective in GROUP_OBJECTIVES:
        yield from group_problem(objective, groups)


def group_problem(objective: str, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence where an objective that compares a prompt's images does not get their advantage."""
    baseline = _with_defaults(groups)["advantage"]["baseline"]
    if baseline != "group":
        yield (
            f"{objective} compares the images of a prompt with each other, and advantage.baseline is {baseline!r}; set "
            "advantage.baseline to group"
        )


def forward_problems(objective: str, groups: Mapping[str, Mapping[str, Any]], keeps_old: bool) -> Iterator[str]:
    """A sentence for each setting that does not go with an objective on noised final samples.

    Args:
        objective: its name.
        groups: settings by group and name.
        keeps_old: whether the samples are of an old policy.
    """
    given = _with_defaults(groups)
    baseline, size = given["advantage"]["baseline"], given["replay"]["buffer_size"]
    if baseline not in ("prompt", "group"):
        yield (
            f"{objective} has no value function, which would see noised samples, and advantage.baseline is "
            f"{baseline!r}; set it to group or prompt"
        )
    if given["kl"]["to_go"]:
        yield f"{objective} trains on noised samples, which have no later steps; set kl.to_go to false"
    if size is not None and keeps_old:
        yield (
            f"{objective} trains on the latest rollout, of its old policy, and replay.buffer_size {size} keeps earlier "
            "ones too; set replay.buffer_size to null"
        )


def parts_problem(reward: str, parts: int) -> Iterator[str]:
    """A sentence where ``advantage.per_reward`` has no parts to normalise."""
    if parts == 0:
        yield (
            f"advantage.per_reward normalises the parts of a WeightedReward, and {reward} has none; set "
            "advantage.per_reward to false, or take a WeightedReward"
        )


def group_size_problem(groups: Mapping[str, Mapping[str, Any]], samples_per_prompt: Any) -> Iterator[str]:
    """A sentence where a group would be one image.

    Args:
        groups: settings by group and name.
        samples_per_prompt: of the prompts' data.
    """
    if _with_defaults(groups)["advantage"]["baseline"] == "group" and samples_per_prompt == 1:
        yield (
            "advantage.baseline group compares the images of a prompt with each other, and data.samples_per_prompt is "
            "1, a group of one; set it to 2 or more"
        )
