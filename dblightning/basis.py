"""The learners of a run: of its one adapter, or of the adapters of a basis that are trained together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dblightning.backbone import Backbone
from dblightning.learner import Learner, Texts
from dblightning.miniature import adapter_folder
from dblightning.objectives.base import Objective
from dblightning.objectives.old_policy import OldPolicy
from dblightning.objectives.value import ValueFunction
from dblightning.rewards.base import RewardMetric
from dblightning.settings import check
from dblightning.training_settings import OF_OBJECTIVE, AdapterSettings, BasisAdapter, TrainingSettings, group_of


def make_learners(
    backbone: Backbone,
    reward: RewardMetric | None,
    adapters: Mapping[str, Any] | None,
    settings: TrainingSettings,
    objective: Objective,
    seed: int,
    texts: Texts,
) -> list[Learner]:
    """Add a run's adapters to the backbone, and make the learner of each.

    Every adapter starts as it would alone: from the same seed.

    Args:
        backbone: the denoiser; the adapters are the only ones that gradients reach afterwards.
        reward: of an only adapter.
        adapters: of a basis: name → :class:`BasisAdapter`, or its settings by name.
        settings: the run's.
        objective: of the first adapter; each other one gets a copy, and each with settings of its own.
        seed: of the run.
        texts: vectors of prompts, for the value functions.

    Raises:
        ValueError: settings of an adapter out of range, adapters that differ in rank, an objective for one alone, or a
            reward that it cannot train on.
    """
    if adapters is None:
        assert reward is not None
        given = {settings.adapter.name or reward.name: (reward, settings, objective)}
    else:
        basis = {name: group_of(BasisAdapter, own) for name, own in adapters.items()}
        given = {
            name: (own.reward, settings.of_adapter(name, own), objective.of_adapter(name, own.given(*OF_OBJECTIVE)))
            for name, own in basis.items()
        }
        kind = type(objective)
        check(
            kind.several or len(given) == 1,
            f"objective {kind.__name__} trains one adapter, got {', '.join(given)}; train each in a run of its own",
        )
    for name, (its, own, theirs) in given.items():
        theirs.check(own)
        _check_reward(theirs, its, "" if adapters is None else f"adapters.{name}.reward: ")
    learners = []
    for place, (name, (its, own, theirs)) in enumerate(given.items()):
        whole = _with_adapter(backbone, name, own, seed)
        learner = Learner(
            name,
            its,
            theirs if place == 0 else copy.deepcopy(theirs),
            whole,
            _value_function(backbone, own, seed),
            seed,
            texts,
            _old_policy(backbone, name, whole, objective.keeps_old),
            place,
            alone=adapters is None,
        )
        learners.append(learner)
    _check_alike(learners)
    backbone.adapters.train_only(list(given))
    # one copy of merged weights for each, or rollouts would merge anew at every step
    backbone.adapters.merged_limit = max(backbone.adapters.merged_limit, len(learners))
    return learners


def _check_reward(objective: Objective, reward: RewardMetric, whose: str) -> None:
    try:
        objective.check_reward(reward)
    except ValueError as error:
        raise ValueError(f"{whose}{error}") from error


def _with_adapter(backbone: Backbone, name: str, settings: TrainingSettings, seed: int) -> TrainingSettings:
    """Add one adapter; the settings it has then, which a file to start from decides."""
    bank, adapter = backbone.adapters, settings.adapter
    if adapter.init is None:
        adapter = adapter.with_targets(bank.target_modules)  # as checkpoints compare them
        bank.add(name, adapter.rank, adapter.lora_alpha, adapter.target_modules, seed)
        return replace(settings, adapter=adapter)
    bank.load(name, adapter_folder(adapter.init), getattr(backbone, "pipeline", None))
    return replace(settings, adapter=replace(adapter, **bank.settings(name)))


def _old_policy(backbone: Backbone, name: str, settings: TrainingSettings, wanted: bool) -> OldPolicy:
    own = settings.adapter
    lora = {"rank": own.rank, "lora_alpha": own.lora_alpha, "target_modules": own.target_modules}
    return OldPolicy(backbone.adapters, name, lora, wanted)


def _value_function(backbone: Backbone, settings: TrainingSettings, seed: int) -> ValueFunction:
    steps, width = settings.sampling.num_inference_steps, settings.advantage.value_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ValueFunction(backbone.latent_shape, backbone.pooled_dim, steps, width)


def _check_alike(learners: list[Learner]) -> None:
    """Refuse adapters of a basis that differ in rank, alpha or target modules."""
    first = learners[0]
    for other in learners[1:]:
        shapes = (_shape(first.settings.adapter), _shape(other.settings.adapter))
        for setting, here in shapes[0].items():
            there = shapes[1][setting]
            check(
                here == there,
                f"the adapters of a basis must have one {setting}, got {here!r} of {first.name!r} and {there!r} of "
                f"{other.name!r}; train them in runs of their own",
            )


def _shape(adapter: AdapterSettings) -> dict[str, Any]:
    """What gives a LoRA its tensors and scale."""
    alpha = adapter.rank if adapter.lora_alpha is None else adapter.lora_alpha
    targets = sorted(adapter.target_modules or ())
    return {"rank": adapter.rank, "lora_alpha": float(alpha), "target_modules": targets}
