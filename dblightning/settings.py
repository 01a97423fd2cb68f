"""Finite, sane settings: one rule per setting, checked at the door of whatever takes it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Number:
    """The numbers a setting may be; never NaN, infinite, or true and false.

    >>> rule = Number(above=0, words=("auto",))
    >>> [rule.allows(value) for value in (0.5, "auto", 0, True, float("inf"))]
    [True, True, False, False, False]

    Args:
        above: it must be greater; None is no bound.
        least, most: smallest and largest value allowed.
        whole: integers only.
        words: values allowed beside numbers, such as None or "auto".
        remedy: what to do about a value that is refused; it ends the message.
    """

    above: float | None = None
    least: float | None = None
    most: float | None = None
    whole: bool = False
    words: tuple[Any, ...] = ()
    remedy: str = ""

    def allows(self, value: Any) -> bool:
        """Whether the value keeps the rule."""
        if isinstance(value, str | None) and value in self.words:
            return True
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value
        return (
            (self.whole or math.isfinite(number))  # isfinite overflows on large integers
            and (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
        )

    def __str__(self) -> str:
        limits = (("> ", self.above), (">= ", self.least), ("<= ", self.most))
        bounds = [f"{sign}{limit:g}" for sign, limit in limits if limit is not None]
        kind = "a whole number" if self.whole else "" if self.above is not None or self.least is not None else "finite"
        end = [] if self.whole or self.most is not None or kind else ["finite"]
        text = " ".join(filter(None, [kind, " and ".join([*bounds, *end])]))
        words = ["null" if word is None else f'"{word}"' for word in self.words]
        return " or ".join([text, *words])


def count(least: int = 1, **options: Any) -> Number:
    """The rule of a whole number, ``least`` or more."""
    return Number(least=least, whole=True, **options)


#: numeric settings of every class and command of this package that keep their rule wherever they appear; those with a
#: dot only in that group of training settings
RULES: dict[str, Number] = {
    # the adapter
    "rank": count(remedy="the paper's is 4"),
    "lora_alpha": Number(above=0, most=1e6, words=(None,), remedy="null takes the rank, a scale of 1"),
    # the images
    "seed": Number(whole=True, least=-(2**63), most=2**63 - 1),
    "num_inference_steps": count(most=1000, remedy="the paper's is 50"),
    "guidance_scale": Number(least=0, most=100, remedy="1 turns guidance off, the paper's is 7.5"),
    "eval_steps": count(most=1000, words=(None,), remedy="null takes the rollouts'"),
    "eval_guidance_scale": Number(least=0, most=100, words=(None,), remedy="null takes the rollouts'"),
    # training
    "sampling.eta": Number(above=0, most=1, remedy="a step without noise has no density to train on; the paper's is 1"),
    "beta": Number(above=0, remedy="NFT's is 1, or 0.1 for a stronger reward"),
    "noise_draws": count(),
    "keep": count(remedy="1 keeps the best image of each prompt"),
    "text_dropout": Number(least=0, most=0.999),
    "advantage_clip": Number(above=0, remedy="NFT's is 5"),
    "decay_start": count(0),
    "decay_rate": Number(least=0, most=1, remedy="0 lets the old policy be the current one"),
    "decay_max": Number(least=0, most=1),
    "max_divergence": Number(above=0, remedy="the source's is 1e-5"),
    "clip_range": Number(above=0, remedy="the paper's is 1e-4"),
    "objective.steps": count(words=(None,), remedy="null takes the whole chain"),
    "objective.draws": count(),
    "clip_reward_gradient": Number(above=0, words=(None,), remedy="null clips none"),
    "clip_adjoint": Number(above=0, words=(None,), remedy="null clips none"),
    "clip_to_median": Number(least=1, words=(None,), remedy="null clips none"),
    "kl.weight": Number(least=0, most=1e6, remedy="the paper's is 0.1"),
    "reward_weight": Number(above=0, most=1e6),
    "kl.target": Number(above=0, words=(None,), remedy="it counts nats; null keeps the weight"),
    "kl.warmup": count(0),
    "kl.share": Number(above=0, most=1, remedy="1 computes the KL of every transition"),
    "adapters.learning_rate": Number(least=0, most=1, words=(None,), remedy="null takes the run's"),
    "adapters.clip_grad_norm": Number(above=0, words=(None,), remedy="null takes the run's"),
    "adapters.kl_weight": Number(least=0, most=1e6, words=(None,), remedy="null takes the run's"),
    "adapters.kl_target": Number(above=0, words=(None,), remedy="it counts nats; null takes the run's"),
    "learning_rate": Number(least=0, most=1, remedy="the paper's is 1e-5"),
    "weight_decay": Number(least=0, most=1, remedy="the paper's is 0"),
    "policy_steps": count(),
    "optimisation.epochs": count(words=(None,), remedy="null takes policy_steps random batches instead"),
    "optimisation.batch_size": count(),
    "optimisation.accumulation": count(),
    "clip_grad_norm": Number(above=0, remedy="a large number such as 1e6 leaves gradients as they are"),
    "skip_last_steps": count(0),
    "ema": Number(above=0, most=0.99999, words=(None,), remedy="it is the decay per step; null keeps no average"),
    "window.size": count(0, words=(None,), remedy="null makes every step stochastic, 0 none"),
    "window.first": count(0),
    "window.last": count(0, words=(None,), remedy="null is the latest there is room for"),
    "window.every": count(remedy="it counts rollouts"),
    "window.tail_steps": count(words=(None,), remedy="null takes each step left in the schedule"),
    "value_learning_rate": Number(least=0, most=1, remedy="the paper's is 1e-4"),
    "value_steps": count(remedy="advantage.baseline: prompt trains without a value function"),
    "value_batch_size": count(),
    "value_width": count(most=2**20),
    "rollout_batch_size": count(words=(None, "auto"), remedy="null takes the whole batch"),
    "buffer_size": count(words=(None,), remedy="it counts single steps; null keeps the latest rollout only"),
    "statistics_window": count(),
    "advantage.clip": Number(above=0, words=(None,), remedy="GRPO's is 5; null leaves advantages as they are"),
}


def rules_of(group: str, settings: Mapping[str, Any] | None = None) -> dict[str, Number]:
    """The rules of a group of settings, by the settings' names in it; some depend on another of its ``settings``."""
    own = {name.removeprefix(f"{group}."): rule for name, rule in RULES.items() if name.startswith(f"{group}.")}
    if group == "sampling" and (settings or {}).get("noise") in ("flow_sde", "dance_sde"):
        own["eta"] = replace(own["eta"], most=2, remedy="published runs have 0.3 to 1.2")
    return RULES | own


def problems(settings: Mapping[str, Any], rules: Mapping[str, Number] = RULES) -> Iterator[str]:
    """A sentence for each setting that breaks its rule; names without a rule are let pass.

    >>> list(problems({"rank": 0, "eta": 2.0}, {"rank": count(), "eta": Number(least=0, most=1)}))
    ['rank must be a whole number >= 1, got 0', 'eta must be >= 0 and <= 1, got 2.0']
    """
    for name, value in settings.items():
        rule = rules.get(name)
        if rule is not None and not rule.allows(value):
            yield f"{name} must be {rule}, got {value!r}" + (f"; {rule.remedy}" if rule.remedy else "")


def check_settings(settings: Mapping[str, Any], rules: Mapping[str, Number] = RULES, group: str = "") -> None:
    """Refuse settings that are not finite or make no sense.

    Args:
        settings: name → value; names without a rule are let pass.
        rules: name → rule; a class with settings of its own passes ``RULES | {…}``.
        group: that they are of, for the message.

    Raises:
        ValueError: naming the first such setting, its value, the rule and what to do.
    """
    for problem in problems(settings, rules):
        raise ValueError(f"{group}.{problem}" if group else problem)


def check_reward_or_adapters(model: Mapping[str, Any], complete: bool = True) -> None:
    """Refuse a training run without a reward, or with one beside a basis.

    Args:
        model: its settings: ``reward``, ``adapter`` and ``adapters``, those that are given.
        complete: whether one of the two must be there.

    Raises:
        ValueError: with one sentence.
    """
    adapters, own = model.get("adapters"), model.get("adapter") or {}
    if adapters is None:
        check(
            not complete or model.get("reward") is not None,
            "model.reward is not set, and RewardRLModule needs it; or give model.adapters, a reward for each adapter",
        )
        return
    check(bool(adapters), "model.adapters must name at least one adapter with its reward, got none")
    check(
        model.get("reward") is None,
        f"model.reward beside model.adapters, which have a reward each ({', '.join(adapters)}); leave model.reward out",
    )
    for setting in ("name", "init"):
        check(
            own.get(setting) is None,
            f"model.adapter.{setting} {own.get(setting)!r} is for one adapter, and model.adapters names "
            f"{', '.join(adapters)}; leave it out",
        )
    for name in adapters:
        fine = isinstance(name, str) and name != "" and not set(name) & {".", "/"}
        check(fine, f"model.adapters: an adapter's name must be a text without dots and slashes, got {name!r}")


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
