"""Bases by the rewards' own gradients, and bases on a flow: each adapter learns what it learns in a run of its own."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dblightning.backbone import DiffusersBackbone
from dblightning.data import MiniatureDataModule
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK, GRPO, FlowDPPO, RewardGradient
from dblightning.rewards import JPEGCompressibility, WeightedReward
from dblightning.training_settings import BasisAdapter
from tests import launching
from tests.distributed_fit import run
from tests.objectives.test_reward_gradient import Bent, Redness, Spoilt
from tests.test_basis import Curve, distance, predictions
from tests.toy import FlowBackbone, GaussianBackbone
from tests.toy_fit import SETTINGS, data, trainer
from tests.toy_rewards import LinearReward

#: a rollout's four images of an adapter in two micro-batches
PLAIN: dict[str, Any] = {
    **{name: value for name, value in SETTINGS.items() if name not in ("clip_range", "advantage", "policy_steps")},
    "policy_batch_size": 3, "kl_weight": 0.4, "buffer_size": None, "seed": 5,
}  # fmt: skip
#: reward of each adapter and its own settings
ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "up": (lambda: LinearReward(1.0), {"kl_target": 0.5}),
    "down": (lambda: LinearReward(-0.6), {"learning_rate": 0.02, "kl_weight": 0.0, "clip_reward_gradient": 0.4}),
    "far": (lambda: Spoilt(3.0), {"clip_grad_norm": 0.4, "clip_adjoint": 0.5, "clip_to_median": 1.0}),
}
CLIPS = ("clip_reward_gradient", "clip_adjoint", "clip_to_median")


def together(backbone: Any, objective: RewardGradient, **settings: Any) -> RewardRLModule:
    adapters = {name: BasisAdapter(reward(), **own) for name, (reward, own) in ADAPTERS.items()}
    return RewardRLModule(backbone, adapters=adapters, objective=objective, **(PLAIN | settings))


def alone(backbone: Any, name: str, objective: RewardGradient, **settings: Any) -> RewardRLModule:
    reward, own = ADAPTERS[name]
    for clip in CLIPS:
        setattr(objective, clip, own.get(clip, getattr(objective, clip)))
    rest = {setting: value for setting, value in own.items() if setting not in CLIPS}
    return RewardRLModule(backbone, reward(), adapter_name=name, objective=objective, **{**PLAIN, **settings, **rest})


def fitted(folder: Path, module: RewardRLModule) -> dict[int, dict[str, float]]:
    curve = Curve()
    trainer(folder, logger=curve, limit_val_batches=1.0, max_epochs=2).fit(module, datamodule=data(folder))
    return curve.steps


@pytest.mark.parametrize(
    ("backbone", "variant", "settings"),
    [
        (Bent, "refl", {"policy_steps": 3}),
        (Bent, "draft", {"policy_steps": 1}),
        (Bent, "alignprop", {"policy_steps": 1, "skip_last_steps": 1}),
        (GaussianBackbone, "draft_lv", {"policy_steps": 1}),
        (FlowBackbone, "refl", {"policy_steps": 2, "eta": 0.8}),
        (FlowBackbone, "draft", {"policy_steps": 1, "eta": 0.8}),
    ],
)
def test_three_adapters_learn_what_each_learns_alone(
    tmp_path: Path, backbone: Any, variant: Any, settings: dict[str, Any]
) -> None:
    """Each with a KL weight, clips and a learning rate of its own; one without a KL term, one with rewards of NaN."""
    settings = {**settings, "optimisation": {"ema": 0.5}}
    module = together(backbone(2), RewardGradient(variant), **settings)
    curves = fitted(tmp_path, module)
    for name in ADAPTERS:
        single = alone(backbone(2), name, RewardGradient(variant), **settings)
        curve = fitted(tmp_path / name, single)
        found, its = (each.backbone.adapters.state_dict(name)["shift"] for each in (module, single))
        assert float(its.abs().max()) > 0.01
        # float32: sums over rows of one batch and of three
        torch.testing.assert_close(found, its, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module.average.means[name], single.average.means[name], rtol=1e-6, atol=1e-6)
        assert module.learner(name).kl.weight == pytest.approx(single.kl.weight, rel=1e-6)
        for step, metrics in curve.items():
            for key in (key for key in metrics if key.startswith(("train/", "val/")) and key != "train/images"):
                assert curves[step][f"{key}/{name}"] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), (step, key)


def test_a_flipped_gate_would_show(tmp_path: Path) -> None:
    """The comparison above is one that fails where rows run under another adapter's gates."""
    module = together(Bent(2), RewardGradient("refl"), policy_steps=1)
    gates = module.policy._gates
    module.policy._gates = lambda adapter, steps: gates(  # type: ignore[method-assign]
        adapter, steps._replace(adapter=steps.adapter.flip(0))
    )
    fitted(tmp_path, module)
    single = alone(Bent(2), "down", RewardGradient("refl"), policy_steps=1)
    fitted(tmp_path / "down", single)
    found, its = (each.backbone.adapters.state_dict("down")["shift"] for each in (module, single))
    assert float((found - its).abs().max()) > 0.01


def test_an_update_of_several_adapters_is_one_pass(tmp_path: Path) -> None:
    adapters = {"up": BasisAdapter(LinearReward(1.0)), "down": BasisAdapter(LinearReward(-0.6), kl_weight=0.0)}
    settings = {**PLAIN, "policy_steps": 1, "policy_batch_size": 2}
    module = RewardRLModule(GaussianBackbone(2), adapters=adapters, objective=RewardGradient("refl"), **settings)
    calls: list[int] = []
    output = module.policy.output
    module.policy.output = lambda steps, *rest, **options: (  # type: ignore[method-assign]
        calls.append(len(steps.latents)) or output(steps, *rest, **options)  # type: ignore[func-returns-value]
    )
    trainer(tmp_path).fit(module, datamodule=data(tmp_path, rollouts_per_epoch=1))
    # two micro-batches' x̂₀ of both adapters; each again with gradients, and the base model's: in the second without the
    # rows of the adapter that pays for no KL
    assert calls == [4, 4, 4, 4, 4, 2]


# ── the miniatures ───────────────────────────────────────────────────────────────────────────────────────────────────

MINIATURE: dict[str, Any] = {
    "num_inference_steps": 4, "guidance_scale": 3.0, "learning_rate": 1e-3, "policy_batch_size": 8,
    "gradient_accumulation": 1, "clip_grad_norm": 1.0, "buffer_size": None, "kl_weight": 0.05, "seed": 3,
}  # fmt: skip


def on_a_miniature(folder: Path, pretrained: str, rollouts: int, settings: dict[str, Any], **rewards: Any) -> Any:
    given = {**MINIATURE, **settings}
    module = RewardRLModule(DiffusersBackbone(pretrained), **given, **rewards)
    prompts = MiniatureDataModule(batch_size=8, samples_per_prompt=4, rollouts_per_epoch=rollouts)
    trainer(folder, max_epochs=1).fit(module, datamodule=prompts)
    return module


BY_GRADIENT: dict[str, Any] = {"objective": {"class_path": "dblightning.objectives.RewardGradient"}, "policy_steps": 1}
REFL = {**BY_GRADIENT, "policy_steps": 3}
REFL["objective"] = {**REFL["objective"], "init_args": {"variant": "refl", "steps": 3, "clip_reward_gradient": 1.0}}
ON_A_FLOW: dict[str, Any] = {"eta": 0.9, "sampling": {"noise": "cps"}}
#: gradients so short that AdamW's ε outweighs them: a step then is in proportion to its gradient, rounding included,
#: where a sign would magnify it (a run alone is 1e-4 from itself after three steps if sampled three images at a time)
GROUPS: dict[str, Any] = {
    "advantage": {"baseline": "group", "normalize": True}, "policy_steps": 3, "learning_rate": 0.05,
    "clip_grad_norm": 1e-8,
}  # fmt: skip
REWARDS = {"alignment": ShapeAlignment, "aesthetic": ShapeAesthetic}


@pytest.mark.parametrize(
    ("pretrained", "rollouts", "settings"),
    [
        pytest.param("miniature", 1, REFL, id="refl"),
        pytest.param("miniature", 3, BY_GRADIENT, id="draft", marks=pytest.mark.slow),
        pytest.param("miniature-flow", 1, {**REFL, **ON_A_FLOW}, id="refl on a flow"),
        pytest.param(
            "miniature-flow",
            1,
            {**GROUPS, **ON_A_FLOW, "objective": FlowDPPO(1e-3)},
            id="Flow-DPPO",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "miniature-flow", 1, {**GROUPS, **ON_A_FLOW, "objective": GRPO(5e-3)}, id="GRPO", marks=pytest.mark.slow
        ),
    ],
)
def test_two_adapters_of_a_miniature_learn_what_each_learns_alone(
    tmp_path: Path, pretrained: str, rollouts: int, settings: dict[str, Any]
) -> None:
    """To 1e-5 after three updates: float32 kernels round a batch of both otherwise than a batch of one.

    Of the adapter and of what the model predicts with it, as in ``test_basis``.
    """
    several = {name: BasisAdapter(reward()) for name, reward in REWARDS.items()}
    both = on_a_miniature(tmp_path, pretrained, rollouts, settings, adapters=several)
    for name, reward in REWARDS.items():
        single = on_a_miniature(tmp_path, pretrained, rollouts, settings, reward=reward(), adapter_name=name)
        own, its = (module.backbone.adapters.state_dict(name) for module in (both, single))
        assert distance(own, its) <= 1e-5
        assert distance(*({"": predictions(module, name)} for module in (both, single))) <= 1e-5
    one, other = (both.backbone.adapters.state_dict(name) for name in REWARDS)
    assert distance(one, other) > 1e-3


# ── a run that is stopped ────────────────────────────────────────────────────────────────────────────────────────────

#: outlying norms are clipped at the median of each adapter's own
RUN: dict[str, Any] = {
    "epochs": 2, "rollouts_per_epoch": 3, "validate": 3,
    "settings": {
        "objective": {
            "class_path": "dblightning.objectives.RewardGradient",
            "init_args": {"variant": "refl", "clip_to_median": 1.0},
        },
        "policy_batch_size": 3, "buffer_size": None, "kl_share": 1.0, "policy_steps": 2,
    },
    "basis": {
        "up": {"slope": 1.0, "clip_reward_gradient": 0.9},
        "down": {"slope": -0.5, "learning_rate": 0.02, "kl_target": 1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_basis_resumes_bit_for_bit(tmp_path: Path, processes: int) -> None:
    step = random.SystemRandom().randrange(4, 12)  # after the first checkpoint, of twelve optimiser steps
    assert len(launching.whole_and_killed(tmp_path, RUN, processes, step)) == processes


@pytest.mark.slow
def test_two_processes_train_the_basis_that_one_with_twice_the_batch_trains(tmp_path: Path) -> None:
    assert launching.finish(tmp_path, [{"name": "run", **RUN}], 2) == [0, 0]
    expected = run(tmp_path / "alone", "run", **(RUN | {"batch_size": 8}))["steps"]
    first, second = (launching.ended(tmp_path, "run", rank)["steps"] for rank in (0, 1))
    assert torch.equal(first, second)
    # 1e-5: float32; the two sum the same gradients in another order
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    assert expected[-1].norm() > 0.1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


class Flat(WeightedReward):
    """Two parts, one of them without a gradient."""

    def __init__(self) -> None:
        super().__init__({"lin": LinearReward(), "size": JPEGCompressibility()}, {"lin": 0.5, "size": 0.5})


@pytest.mark.parametrize(
    ("objective", "second", "message"),
    [
        (
            RewardGradient(), {"reward": JPEGCompressibility()},
            "adapters.b.reward: RewardGradient follows the reward's gradient, and JPEGCompressibility has none; train "
            "on it with DPOK or PPO (a basis has one objective: in a run of its own), or take a differentiable reward",
        ),
        (RewardGradient(), {"reward": Flat()}, "the reward's gradient, and 'size' has none"),
        (
            RewardGradient(), {"reward": LinearReward(), "clip_adjoint": 0.0},
            "adapters.b.clip_adjoint must be > 0 and finite or null, got 0.0",
        ),
        (
            RewardGradient(), {"reward": LinearReward(), "clip_to_median": 0.5},
            "adapters.b.clip_to_median must be >= 1 and finite or null, got 0.5",
        ),
        (
            DPOK(), {"reward": LinearReward(), "clip_adjoint": 1.0},
            "adapters.b.clip_adjoint is not a setting of objective DPOK; leave it out",
        ),
    ],
)  # fmt: skip
def test_wrong_bases_are_refused_by_name(objective: Any, second: dict[str, Any], message: str) -> None:
    adapters: Any = {"a": {"reward": LinearReward()}, "b": second}
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardRLModule(GaussianBackbone(2), adapters=adapters, objective=objective, **{**PLAIN, "policy_steps": 1})


def test_own_clips_are_the_adapters_and_the_runs_the_others() -> None:
    module = together(GaussianBackbone(2), RewardGradient("refl", clip_reward_gradient=2.0), policy_steps=2)
    clips = [each.objective.clip_reward_gradient for each in module.learners]  # type: ignore[attr-defined]
    assert clips == [2.0, 0.4, 2.0]
    assert module.hparams["objective"]["init_args"]["clip_reward_gradient"] == 2.0
    assert [own["clip_reward_gradient"] for own in module.hparams["adapters"].values()] == clips


def test_adapters_start_from_folders_of_their_own(tmp_path: Path, backbone: Any) -> None:
    """Alignment from best of n, say, and the others from the base."""
    backbone.adapters.add("earlier", rank=4)
    backbone.adapters.load_state_dict(
        "earlier", {key: torch.full_like(value, 0.01) for key, value in backbone.adapters.state_dict("earlier").items()}
    )
    backbone.adapters.export("earlier", tmp_path / "earlier", backbone.pipeline)
    backbone.adapters.remove("earlier")
    adapters = {"a": BasisAdapter(Redness(), init=str(tmp_path / "earlier")), "b": BasisAdapter(Redness())}
    module = RewardRLModule(backbone, adapters=adapters, objective=RewardGradient(), policy_steps=1)
    weights: list[Tensor] = [next(iter(module.backbone.adapters.state_dict("a").values()))]
    assert torch.allclose(weights[0], torch.full_like(weights[0], 0.01), atol=1e-6)
    assert not all(bool((value == 0.01).all()) for value in module.backbone.adapters.state_dict("b").values())
    assert module.learner("a").settings.adapter.init == str(tmp_path / "earlier")
    assert module.learner("b").settings.adapter.init is None
