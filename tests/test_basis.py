"""A basis of adapters trained in one run: each learns what it would learn in a run of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from dblightning.adapters import read_metadata
from dblightning.blending import Single
from dblightning.callbacks import BeforeAfterGrid, BlendSamplingCallback, ExportAdapter, SampleGrid
from dblightning.checkpointing import latest_intact
from dblightning.data import MiniatureDataModule
from dblightning.evaluation.specs import BlendSpec, BlendSweep
from dblightning.module import RewardRLModule
from dblightning.objectives import DPOK
from dblightning.rewards.base import RewardMetric
from dblightning.training_settings import BasisAdapter
from tests import launching
from tests.distributed_fit import run
from tests.toy import GaussianBackbone
from tests.toy_fit import SETTINGS, data, trainer
from tests.toy_rewards import LinearReward

#: everything that belongs to one adapter is at work: replay, value function, KL rows and target, an average
EVERYTHING = SETTINGS | {"kl_target": 0.5, "kl_share": 0.5, "gradient_accumulation": 2, "clip_grad_norm": 0.05}
#: slope of each adapter's reward and its own settings, by their names in ``adapters`` and in a run of its own
ADAPTERS: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "up": (1.0, {}, {}),
    "down": (-0.6, {"learning_rate": 0.02, "kl_weight": 0.4}, {"learning_rate": 0.02, "kl_weight": 0.4}),
    "far": (3.0, {"clip_grad_norm": 1.0, "kl_target": 2.0}, {"clip_grad_norm": 1.0, "kl_target": 2.0}),
}


class Curve(DummyLogger):
    """The metrics of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.steps.setdefault(int(step or 0), {}).update(metrics)


def basis(backbone: Any, names: list[str], **settings: Any) -> RewardRLModule:
    adapters = {name: BasisAdapter(LinearReward(ADAPTERS[name][0]), **ADAPTERS[name][1]) for name in names}
    return RewardRLModule(backbone, adapters=adapters, **(EVERYTHING | settings))


def alone(backbone: Any, name: str, **settings: Any) -> RewardRLModule:
    slope, _, own = ADAPTERS[name]
    return RewardRLModule(backbone, LinearReward(slope), adapter_name=name, **(EVERYTHING | settings | own))


def fitted(folder: Path, module: RewardRLModule, **options: Any) -> dict[int, dict[str, float]]:
    curve = Curve()
    trainer(folder, logger=curve, limit_val_batches=1.0, **options).fit(module, datamodule=data(folder))
    return curve.steps


def assert_learned_alike(together: RewardRLModule, alone: RewardRLModule, name: str, tolerance: float) -> None:
    learner, own = together.learner(name), alone.learners[0]
    there = alone.backbone.adapters.state_dict(name)
    for key, weight in together.backbone.adapters.state_dict(name).items():
        assert float((weight - there[key]).abs().max()) <= tolerance * max(1.0, float(there[key].abs().max())), key
    for one, other in zip(learner.value_function.parameters(), own.value_function.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert learner.statistics.state_dict()["rewards"].keys() == own.statistics.state_dict()["rewards"].keys()
    assert learner.kl.weight == pytest.approx(own.kl.weight, rel=tolerance)
    assert learner.replay is not None
    assert own.replay is not None
    torch.testing.assert_close(learner.replay.latents, own.replay.latents, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{}, {"advantage": "prompt", "buffer_size": None, "kl": "eps_mse"}])
def test_three_adapters_learn_what_each_learns_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    together = basis(GaussianBackbone(2), list(ADAPTERS), **settings)
    curves = fitted(tmp_path, together)
    for name in ADAPTERS:
        single = alone(GaussianBackbone(2), name, **settings)
        curve = fitted(tmp_path / name, single)
        # float32: sums over rows of one batch and of three
        assert_learned_alike(together, single, name, 1e-6)
        moved = together.backbone.adapters.state_dict(name)["shift"]
        assert float(moved.abs().max()) > 0.01
        for step, metrics in curve.items():
            kept = {key: value for key, value in metrics.items() if key.startswith(("train/", "val/"))}
            kept.pop("train/images", None)
            for key, value in kept.items():
                assert curves[step][f"{key}/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, key)


def test_the_order_of_a_basis_does_not_matter(tmp_path: Path) -> None:
    one, other = basis(GaussianBackbone(2), ["up", "down"]), basis(GaussianBackbone(2), ["down", "up"])
    fitted(tmp_path, one)
    fitted(tmp_path, other)
    for name in ("up", "down"):
        torch.testing.assert_close(
            one.backbone.adapters.state_dict(name), other.backbone.adapters.state_dict(name), rtol=1e-6, atol=1e-6
        )


class Signed(RewardMetric):
    """Mean of one colour, with a sign."""

    def __init__(self, channel: int, sign: float) -> None:
        super().__init__()
        self.channel, self.sign = channel, sign

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.sign * images[:, self.channel].mean((1, 2))


REWARDS: dict[str, tuple[int, float]] = {"red": (0, 1.0), "dark": (1, -1.0)}
MINIATURE: dict[str, Any] = {
    "num_inference_steps": 4, "guidance_scale": 3.0, "clip_range": 0.005, "learning_rate": 1e-3, "policy_steps": 1,
    "policy_batch_size": 8, "gradient_accumulation": 2, "clip_grad_norm": 1.0, "advantage": "prompt", "kl_weight": 0.05,
    "normalize_advantage": True, "buffer_size": None, "skip_last_steps": 1, "ema": 0.5, "seed": 3,
}  # fmt: skip


def on_the_miniature(folder: Path, **rewards: Any) -> RewardRLModule:
    from dblightning.backbone import DiffusersBackbone

    settings = dict(MINIATURE)
    given: dict[str, Any] = {"optimisation": {"ema": settings.pop("ema")}}
    module = RewardRLModule(DiffusersBackbone("miniature"), **settings, **given, **rewards)
    prompts = MiniatureDataModule(batch_size=8, samples_per_prompt=4, rollouts_per_epoch=3)
    trainer(folder, max_epochs=1).fit(module, datamodule=prompts)
    return module


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two adapters, over the norm of the second."""
    apart = sum(float((one[key] - other[key]).double().square().sum()) for key in other)
    return float((apart / sum(float(each.double().square().sum()) for each in other.values())) ** 0.5)


@torch.no_grad()
def predictions(module: RewardRLModule, name: str) -> Tensor:
    """The denoiser's output with one adapter, of four latents at four timesteps."""
    backbone = module.backbone
    latents = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    gates = torch.zeros(4, len(backbone.adapters.names))
    gates[:, backbone.adapters.names.index(name)] = 1
    conditioning = backbone.encode(["a red circle"] * 4)
    return backbone.denoise(latents, torch.tensor([50, 300, 600, 900]), conditioning, 3.0, gates=gates)


def test_two_adapters_of_the_miniature_learn_what_each_learns_alone(tmp_path: Path) -> None:
    """To 1e-5 after three updates: float32 kernels round a batch of both otherwise than a batch of one.

    Of the adapter and of what the model predicts with it, not of each weight: Adam divides a gradient by its own size,
    so where one is all but zero its rounding counts in full.
    """
    together = on_the_miniature(tmp_path, adapters={name: BasisAdapter(Signed(*own)) for name, own in REWARDS.items()})
    for name, own in REWARDS.items():
        single = on_the_miniature(tmp_path, reward=Signed(*own), adapter_name=name)
        bank, its = together.backbone.adapters, single.backbone.adapters.state_dict(name)
        assert distance(bank.state_dict(name), its) <= 1e-5
        averages = zip(together.average.means[name], single.average.means[name], strict=True)
        assert (
            distance(*({str(place): each for place, each in enumerate(part)} for part in zip(*averages, strict=True)))
            <= 1e-5
        )
        outputs = [predictions(module, name) for module in (together, single)]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    red, dark = (together.backbone.adapters.state_dict(name) for name in REWARDS)
    assert max(float((red[key] - dark[key]).abs().max()) for key in red) > 1e-3


def test_a_micro_batch_of_several_adapters_is_one_pass(backbone: Any, tmp_path: Path) -> None:
    module = RewardRLModule(
        backbone, adapters={name: BasisAdapter(Signed(*own)) for name, own in REWARDS.items()},
        num_inference_steps=2, guidance_scale=1.0, policy_steps=1, gradient_accumulation=1, policy_batch_size=3,
        advantage="prompt", buffer_size=None,
    )  # fmt: skip
    calls: list[int] = []
    denoise, update = backbone.denoise, module.update_policy

    def counted() -> dict[str, Tensor]:
        backbone.denoise = lambda latents, *rest, **options: (
            calls.append(len(latents)) or denoise(latents, *rest, **options)  # type: ignore[func-returns-value]
        )
        return update()

    module.update_policy = counted  # type: ignore[method-assign]
    trainer(tmp_path, limit_train_batches=1).fit(module, datamodule=data(tmp_path))
    assert calls == [6, 6]  # the base model's for the KL, then the adapters' with gradients


# ── a run that is stopped ────────────────────────────────────────────────────────────────────────────────────────────

RUN: dict[str, Any] = {
    "epochs": 2, "rollouts_per_epoch": 2, "validate": 3, "settings": {"buffer_size": 32, "kl_share": 0.5},
    "basis": {"up": {"slope": 1.0}, "down": {"slope": -0.5, "learning_rate": 0.02, "kl_target": 1.0}},
}  # fmt: skip
STEPS = 4 * 4  # four optimiser steps a rollout


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_basis_resumes_bit_for_bit(tmp_path: Path, processes: int) -> None:
    step = random.SystemRandom().randrange(8, STEPS)  # after the first checkpoint
    for _, whole in launching.whole_and_killed(tmp_path, RUN, processes, step):
        assert len(whole["replay"]) == 2


def test_two_processes_train_the_basis_that_one_with_twice_the_batch_trains(tmp_path: Path) -> None:
    narrow = RUN | {"settings": {"buffer_size": 32}}
    wide = {"policy_batch_size": 8, "value_batch_size": 16, "buffer_size": 64}
    assert launching.finish(tmp_path, [{"name": "run", **narrow}], 2) == [0, 0]
    expected = run(tmp_path / "alone", "run", **(RUN | {"batch_size": 8, "settings": wide}))["steps"]
    first, second = (launching.ended(tmp_path, "run", rank)["steps"] for rank in (0, 1))
    assert torch.equal(first, second)
    # 1e-6: float32; the two sum the same gradients in another order
    assert ((first - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all()
    assert expected[-1].norm() > 0.1


# ── what goes in and comes out ───────────────────────────────────────────────────────────────────────────────────────


def miniature_basis(tmp_path: Path, **settings: Any) -> RewardRLModule:
    from dblightning.backbone import DiffusersBackbone

    options = {key: value for key, value in MINIATURE.items() if key != "ema"} | {"num_inference_steps": 2}
    adapters = {name: BasisAdapter(Signed(*own)) for name, own in REWARDS.items()}
    rewards = {name: Signed(*own) for name, own in REWARDS.items()}
    return RewardRLModule(
        DiffusersBackbone("miniature"), eval_rewards=rewards, adapters=adapters, **(options | settings)
    )


def test_a_basis_is_exported_pictured_and_blended(tmp_path: Path) -> None:
    """One command from a list of rewards to adapters and their first Pareto picture."""
    module = miniature_basis(tmp_path)
    blends = BlendSamplingCallback(
        blends=[BlendSpec("base"), *(BlendSpec("single", {name: 1.0}) for name in REWARDS)],
        sweeps=[BlendSweep(["db-mpa"], list(REWARDS), weights=[0.5])],
        num_prompts=2, every_n_epochs=1, max_share=None, out=str(tmp_path / "blends"), pictures=True,
    )  # fmt: skip
    callbacks: list[L.Callback] = [
        blends, ExportAdapter(str(tmp_path / "adapters")), SampleGrid(1),
        BeforeAfterGrid(2, str(tmp_path / "before_after.png")),
    ]  # fmt: skip
    prompts = MiniatureDataModule(batch_size=4, samples_per_prompt=2, rollouts_per_epoch=1)
    trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(module, datamodule=prompts)
    for name in REWARDS:
        facts = read_metadata(tmp_path / "adapters" / name)
        assert (facts["adapter"], facts["reward"], facts["images"]) == (name, "Signed", 4)
        assert facts["hyperparameters"]["adapter_name"] == name
        assert (tmp_path / f"before_after_{name}.png").is_file()
    assert (tmp_path / "blends" / "pareto.png").is_file()
    assert (tmp_path / "blends" / "images.png").is_file()
    assert all(parameter.requires_grad for parameter in module.policy_parameters)


def test_before_the_first_update_one_validation_serves_all(tmp_path: Path) -> None:
    module = basis(GaussianBackbone(2), list(ADAPTERS))
    blends: list[Any] = []
    generate = module.generate
    module.generate = lambda *given: blends.append(given[3]) or generate(*given)  # type: ignore[func-returns-value, method-assign]
    fitted(tmp_path, module)
    asked = [blend.weights for blend in blends if isinstance(blend, Single)]
    count = len(data(tmp_path).val_dataloader())
    assert asked == [{"up": 1.0}] * count + [{name: 1.0} for _ in range(count) for name in ADAPTERS]


def test_a_checkpoint_of_one_adapter_is_refused_by_a_basis(tmp_path: Path) -> None:
    from dblightning.checkpointing import RunCheckpoint

    single = alone(GaussianBackbone(2), "up")
    saver = RunCheckpoint(str(tmp_path / "saved"), every_n_rollouts=3)
    trainer(tmp_path, callbacks=[saver]).fit(single, datamodule=data(tmp_path))
    saved = latest_intact(tmp_path / "saved")
    with pytest.raises(ValueError, match="was trained on reward 'LinearReward', this run has"):
        trainer(tmp_path).fit(basis(GaussianBackbone(2), ["up", "down"]), datamodule=data(tmp_path), ckpt_path=saved)


class ForOne(DPOK):
    several = False


def test_wrong_bases_are_refused_by_name() -> None:
    pair = {"a": {"reward": LinearReward()}, "b": {"reward": LinearReward()}}
    for settings, message in (
        ({}, "model.reward is not set"),
        ({"adapters": {}}, "must name at least one adapter"),
        ({"adapters": pair, "reward": LinearReward()}, r"model.reward beside model.adapters.*\(a, b\)"),
        ({"adapters": pair, "adapter_name": "c"}, "model.adapter.name 'c' is for one adapter"),
        ({"adapters": pair, "objective": ForOne()}, "objective ForOne trains one adapter, got a, b"),
        ({"adapters": {"a.b": pair["a"]}}, "without dots and slashes, got 'a.b'"),
        ({"adapters": {"a": {**pair["a"], "rank": 8}}}, "BasisAdapter has no setting 'rank'"),
        ({"adapters": {"a": {**pair["a"], "kl_weight": -1.0}}}, "adapters.a.kl_weight must be >= 0"),
        ({"adapters": {"a": {**pair["a"], "kl_target": 0.0}}}, "adapters.a.kl_target must be > 0"),
        ({"adapters": {"a": {"learning_rate": 0.1}}}, "reward"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            RewardRLModule(GaussianBackbone(2), **(SETTINGS | settings))  # type: ignore[arg-type]


def test_adapters_of_a_basis_have_one_rank(backbone: Any, tmp_path: Path) -> None:
    backbone.adapters.add("wide", rank=8)
    backbone.adapters.export("wide", tmp_path / "wide", backbone.pipeline)
    backbone.adapters.remove("wide")
    with pytest.raises(ValueError, match="one rank, got 4 of 'a' and 8 of 'b'"):
        RewardRLModule(
            backbone,
            adapters={
                "a": BasisAdapter(Signed(0, 1.0)),
                "b": BasisAdapter(Signed(0, 1.0), init=str(tmp_path / "wide")),
            },
        )


def test_two_adapters_of_one_name_in_a_file_are_refused_by_name(tmp_path: Path) -> None:
    from dblightning.command_tree import Refused
    from dblightning.preflight import check_command

    file = tmp_path / "twice.yaml"
    reward = "{class_path: dblightning.miniature.rewards.ShapeAesthetic}"
    file.write_text(f"model:\n  adapters:\n    a: {{reward: {reward}}}\n    a: {{reward: {reward}}}\n")
    with pytest.raises(Refused, match="'a' is set twice, again in line 4"):
        check_command("fit", ["--config", str(file)])


@pytest.mark.parametrize(
    "name", ["miniature/basis", "miniature/basis_policy_gradient", "miniature_flow/basis", "sd15/basis"]
)
def test_the_configs_of_a_basis_pass_the_first_check(name: str) -> None:
    from dblightning.preflight import check_command

    check_command("fit", ["--config", str(Path(__file__).parent.parent / "configs" / f"{name}.yaml")])
