from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dblightning.data import PromptFileDataModule
from dblightning.flat_settings import flat
from dblightning.module import RewardRLModule
from dblightning.objectives.advantages import explained_variance
from dblightning.objectives.kl import adapted_kl_weight
from dblightning.rewards import JPEGCompressibility
from dblightning.rewards.base import RewardMetric
from dblightning.solvers import DDIMSolver
from tests.toy import GaussianBackbone
from tests.toy_rewards import LinearReward


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(**(defaults | options))


@pytest.fixture
def prompts(tmp_path: Path) -> Any:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["a red circle", "a blue star", "a green ring", "a pink cross"]))

    def build(**settings: Any) -> PromptFileDataModule:
        return PromptFileDataModule(str(file), **({"batch_size": 4, "rollouts_per_epoch": 2} | settings))

    return build


# ── DPOK finds the known optimum of eq. (4) ─────────────────────────────────────────────────────────────────────────


def reachable_variance(backbone: GaussianBackbone, solver: DDIMSolver) -> float:
    """Σ c_t² σ_t² over the steps, c_t the gain dx₀/dμ of step t's mean: see :func:`optimal_shift`."""
    alphas, after = solver.schedule.alphas.tolist(), solver.schedule.alphas_next.tolist()
    total, gain_of_later_steps = 0.0, 1.0
    for a, b in zip(reversed(alphas), reversed(after), strict=True):
        variance = (1 - b) / (1 - a) * (1 - a / b)
        total += gain_of_later_steps**2 * variance
        d_epsilon = (1 - a) ** 0.5 / (a * backbone.std**2 + 1 - a)
        coefficient = (1 - b - variance) ** 0.5 - (b * (1 - a) / a) ** 0.5
        gain_of_later_steps *= (b / a) ** 0.5 + coefficient * d_epsilon
    return total


def optimal_shift(backbone: GaussianBackbone, solver: DDIMSolver, slope: float, alpha: float) -> float:
    """Shift of each dimension's mean x₀ at the optimum of eq. (4), written from the definitions.

    The policy may add d_t to the mean of step t. x₀ moves by Σ c_t d_t, c_t the product of the later steps' gains
    dμ/dx, and the KL of step t is d_t² / (2σ_t²). So d_t = slope · c_t σ_t² / α and the shift is slope/α Σ c_t² σ_t².
    """
    return slope / alpha * reachable_variance(backbone, solver)


@pytest.mark.parametrize(
    ("alpha", "dims", "objective", "advantage"),
    [
        pytest.param(1.0, 1, "dpok", "prompt", marks=pytest.mark.slow),
        (0.4, 1, "dpok", "prompt"),
        pytest.param(0.4, 3, "ppo", "both", marks=pytest.mark.slow),
    ],
)
def test_dpok_converges_to_the_known_optimum(
    tmp_path: Path, prompts: Any, alpha: float, dims: int, objective: str, advantage: str
) -> None:
    slope = 0.5
    backbone = GaussianBackbone(dims)
    module = RewardRLModule(
        backbone,
        LinearReward(slope),
        num_inference_steps=4,
        guidance_scale=1.0,
        objective=objective,
        clip_range=0.5,
        kl="exact",
        kl_weight=alpha,
        advantage=advantage,
        learning_rate=0.02,
        policy_steps=1,
        policy_batch_size=4 * 256,
        gradient_accumulation=1,
        clip_grad_norm=100.0,
        value_steps=1,
        value_learning_rate=1e-3,
        buffer_size=None,
        statistics_window=4096,
    )
    shifts: list[Tensor] = []

    class Average(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shifts.append(backbone.shifts[module.adapter_name].detach().clone())

    rollouts = 150
    data = prompts(batch_size=256, rollouts_per_epoch=rollouts)
    trainer(tmp_path, callbacks=[Average()]).fit(module, datamodule=data)

    # the average of the last iterates takes out the noise of the last gradient
    backbone.shifts[module.adapter_name].data = torch.stack(shifts[-75:]).mean(0)
    count = 2000
    ids = torch.arange(count)
    from dblightning.blending import Base

    texts = ["a red circle"] * count
    moved = module.generate(texts, ids, ids) - module.generate(texts, ids, ids, Base())
    # base and adapter share their noise and the shift is the same for all noise, so no Monte-Carlo error is left
    assert moved.std(0).max() < 1e-4
    expected = optimal_shift(backbone, module.solver, slope, alpha)
    # 5 %: what is left of the policy gradient's noise after averaging
    assert moved.mean(0).flatten().tolist() == pytest.approx([expected] * dims, rel=0.05)


def test_the_kl_weight_finds_the_value_at_which_the_kl_is_the_target(tmp_path: Path, prompts: Any) -> None:
    """At the optimum for α the path KL is Σ d_t²/(2σ_t²) = slope²/(2α²) Σ c_t² σ_t², so the target names one α."""
    slope, target = 0.5, 0.1
    backbone = GaussianBackbone()
    module = RewardRLModule(
        backbone, LinearReward(slope), num_inference_steps=4, guidance_scale=1.0, clip_range=0.5, kl_weight=0.8,
        kl_target=target, advantage="prompt", learning_rate=0.02, policy_steps=1, policy_batch_size=4 * 128,
        gradient_accumulation=1, clip_grad_norm=100.0, buffer_size=None, statistics_window=4096,
    )  # fmt: skip
    expected = slope * (reachable_variance(backbone, module.solver) / (2 * target)) ** 0.5
    assert abs(expected / 0.8 - 1) > 0.3  # the first value is not the answer
    seen: list[tuple[float, float]] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append((float(metrics["train/kl"]), float(metrics["train/kl_weight"])))

    trainer(tmp_path, callbacks=[Record()]).fit(module, datamodule=prompts(batch_size=128, rollouts_per_epoch=150))
    assert seen[0][1] == pytest.approx(0.8)
    kl, weight = torch.tensor(seen[-60:]).mean(0).tolist()
    # 10 %: the controller follows a KL that the policy gradient's noise moves
    assert kl == pytest.approx(target, rel=0.1)
    assert weight == pytest.approx(expected, rel=0.1)


def test_the_kl_weight_moves_by_two_percent_at_most_and_to_the_right_side() -> None:
    assert adapted_kl_weight(1.0, kl=2.0, target=2.0) == 1.0
    assert adapted_kl_weight(1.0, kl=2.2, target=2.0) == pytest.approx(1.01)
    assert adapted_kl_weight(1.0, kl=50.0, target=2.0) == pytest.approx(1.02)
    assert adapted_kl_weight(1.0, kl=0.0, target=2.0) == pytest.approx(0.98)


# ── on a real architecture ──────────────────────────────────────────────────────────────────────────────────────────


class Redness(RewardMetric):
    """Mean of red less green and blue; counts its calls so that tests can spoil one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        return (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


FAST: dict[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "clip_range": 1e-2,
    "learning_rate": 1e-2,
    "policy_steps": 2,
    "policy_batch_size": 4,
    "gradient_accumulation": 2,
    "value_batch_size": 8,
    "value_steps": 2,
    "buffer_size": 32,
}


def build(backbone: Any, reward: RewardMetric | None = None, **settings: Any) -> RewardRLModule:
    return RewardRLModule(backbone, reward or Redness(), **(FAST | settings))


def rolled_out(module: RewardRLModule, tmp_path: Path, data: Any, **options: Any) -> RewardRLModule:
    """A module with one rollout in its buffer and no update made."""
    module.update_policy = dict  # type: ignore[method-assign, assignment]
    module.update_value = dict  # type: ignore[method-assign, assignment]
    module.log_dict = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    module.log = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyError, match="train/kl"):  # the metrics an update would have given
        trainer(tmp_path, limit_train_batches=1, **options).fit(module, datamodule=data)
    assert module.replay is not None
    return module


def every_transition(module: RewardRLModule) -> Any:
    assert module.replay is not None
    count = module.replay.size * module.replay.num_steps
    slots, steps = next(module.replay.batches(count, lambda lane, visit: lane))
    return module.replay.transitions(slots, steps, "cpu")


def give_effect(module: RewardRLModule, scale: float = 0.2) -> None:
    from tests.conftest import randomize

    randomize(module.backbone.adapters, module.adapter_name, 5, scale)


@pytest.mark.parametrize("rollout_execution", ["auto", "gated"])
def test_the_on_policy_ratio_of_every_stored_transition_is_one(
    backbone: Any, tmp_path: Path, prompts: Any, rollout_execution: str
) -> None:
    module = build(backbone, rollout_execution=rollout_execution)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions = every_transition(module)
    assert len(transitions.reward) == 4 * 4
    output = module.policy.current(transitions)
    from dblightning.schedule import gaussian_log_prob

    step = module.solver.gaussian(output, transitions.latents, transitions.step_index)
    ratio = (gaussian_log_prob(step, transitions.next_latents) - transitions.log_prob).exp()
    assert (ratio - 1).abs().max() < 1e-5
    _, metrics = module.policy_loss(transitions)
    assert metrics["train/on_policy_ratio_error"] < 1e-5


class TensorFloat32(TorchFunctionMode):
    """Products of float32 tensors as TF32 makes them: both factors rounded to 10 binary digits after the point."""

    PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.PRODUCTS:
            args = [self.rounded(each) for each in args]
        return func(*args, **kwargs or {})

    @staticmethod
    def rounded(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        bits = value.detach().contiguous().view(torch.int32)
        near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)  # to nearest, ties to even
        return value + (near - value.detach())  # the derivative of no rounding


def test_tf32_as_simulated_rounds_to_ten_digits() -> None:
    with TensorFloat32():
        assert torch.tensor([[1 + 2**-10]]) @ torch.ones(1, 1) == 1 + 2**-10
        assert torch.tensor([[1 + 2**-12]]) @ torch.ones(1, 1) == 1


@pytest.mark.parametrize("rollout_execution", ["auto", "merged"])
def test_a_rollout_and_its_update_multiply_alike_under_tf32(
    backbone: Any, tmp_path: Path, prompts: Any, rollout_execution: str
) -> None:
    """In batches of the rollout's size: other kernels sum in another order, which flips some of TF32's roundings."""
    module = build(backbone, rollout_execution=rollout_execution)
    give_effect(module, 0.5)
    with TensorFloat32(), torch.no_grad():
        rolled_out(module, tmp_path, prompts())
        transitions = every_transition(module)
        parts = (transitions.at(rows) for rows in torch.arange(len(transitions.reward)).split(4))
        errors = [float(module.policy_loss(part, False)[1]["train/on_policy_ratio_error"]) for part in parts]
        assert module.sampler.execution(module.device) == {"auto": "gated"}.get(rollout_execution, rollout_execution)
    error = max(errors)
    if rollout_execution == "auto":
        assert error < 1e-5
    else:
        assert error > 3e-5  # a third of the paper's clip range: what merging costs in this small network
    assert module.sampler.execution(module.device) == "merged"


@pytest.mark.parametrize(("matmul", "convolutions"), [("high", False), ("medium", False), ("highest", True)])
def test_rollouts_on_a_gpu_are_merged_at_full_precision_alone(matmul: str, convolutions: bool) -> None:
    from dblightning.precision import computes_in_float32

    device, layer = torch.device("cuda"), torch.nn.Linear(2, 2)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        assert computes_in_float32(layer, device)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
        assert not computes_in_float32(layer, device)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_reference_is_the_base_model_without_any_adapter(
    backbone: Any, sd15_folder: Path, tmp_path: Path, prompts: Any
) -> None:
    from diffusers import UNet2DConditionModel

    module = build(backbone)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions = every_transition(module)
    output, reference = module.policy.current(transitions), module.policy.reference(transitions)
    plain = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    conditioning = backbone.encode([module.prompts[each] for each in transitions.prompt_id.tolist()])
    timesteps = module.solver.timesteps[transitions.step_index]
    with torch.no_grad():
        conditional, unconditional = (
            plain(transitions.latents, timesteps, embeds).sample
            for embeds in (conditioning.prompt_embeds, conditioning.negative_prompt_embeds)
        )
    torch.testing.assert_close(reference, unconditional + 2 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert (output - reference).abs().max() > 1e-2


@pytest.mark.parametrize("kl", ["exact", "eps_mse"])
def test_the_kl_penalty_is_the_formula(backbone: Any, tmp_path: Path, prompts: Any, kl: str) -> None:
    """The penalty against float64 formulas written from ᾱ alone; the reward is weighted away."""
    module = build(backbone, kl=kl, kl_weight=1.0, reward_weight=1e-12)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions = every_transition(module)
    loss, metrics = module.policy_loss(transitions)
    output, reference = (
        each(transitions).detach().double() for each in (module.policy.current, module.policy.reference)
    )
    difference = (output - reference).square().flatten(1).mean(1)
    alphas = module.backbone.pipeline.scheduler.alphas_cumprod.double()
    weights = []
    for step_index in transitions.step_index.tolist():
        timestep = int(module.solver.timesteps[step_index])
        before, after = alphas[timestep], alphas[max(timestep - 250, 0)]
        variance = (1 - after) / (1 - before) * (1 - before / after)
        coefficient = (1 - after - variance).sqrt() - (after * (1 - before) / before).sqrt()
        weights.append(coefficient**2 / (2 * variance))
    exact = difference * torch.stack(weights)
    expected = exact if kl == "exact" else difference
    # 1e-4: float32 against float64
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    dims = transitions.latents[0].numel()
    assert metrics["train/kl"].item() == pytest.approx(exact.mean().item() * dims * 4, rel=1e-4)


def mixed_float16() -> Any:
    """Lightning's 16-mixed on the CPU, where its own name means bfloat16."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def in_float32(module: RewardRLModule, folder: Path) -> RewardRLModule:
    """The same module with the same weights, widened; the adapter's too."""
    from dblightning.backbone import DiffusersBackbone

    saved = flat(module.hparams)
    settings = {key: saved[key] for key in (*FAST, "kl_weight", "reward_weight")}
    wide = build(DiffusersBackbone(str(folder)), **settings)
    weights = {key: each.float() for key, each in module.backbone.unet.state_dict().items()}  # type: ignore[union-attr]
    wide.backbone.unet.load_state_dict(weights)  # type: ignore[union-attr]
    encode = module.backbone.encode
    wide.backbone.encode = lambda *texts: encode(*texts).to(torch.float32)  # type: ignore[method-assign]
    wide.prompts = module.prompts
    return wide


@pytest.mark.parametrize("guidance_scale", [2.0, 7.5])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_the_kl_and_its_gradient_in_half_precision_are_those_of_float32(
    sd15_folder: Path, tmp_path: Path, prompts: Any, precision: str, guidance_scale: float
) -> None:
    """Against a float32 model with the half-precision weights' values; the reward is weighted away."""
    from dblightning.backbone import DiffusersBackbone

    dtype = "float32" if precision == "autocast" else precision
    module = build(
        DiffusersBackbone(str(sd15_folder), dtype=dtype),  # type: ignore[arg-type]
        kl_weight=1.0, reward_weight=1e-12, guidance_scale=guidance_scale,
    )  # fmt: skip
    give_effect(module, 0.02)
    rolled_out(module, tmp_path, prompts(), **({"plugins": [mixed_float16()]} if precision == "float16" else {}))
    wide = in_float32(module, sd15_folder)
    transitions = every_transition(module)

    def kl(of: RewardRLModule, enabled: bool = False) -> tuple[float, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss, metrics = of.policy_loss(transitions)
        # 2^10: float16's gradients vanish otherwise
        gradients = torch.autograd.grad(loss * 1024, of.backbone.adapters.parameters(of.adapter_name))
        return float(metrics["train/kl"].detach()), torch.cat([each.flatten() for each in gradients])

    (expected, straight), (value, gradient) = kl(wide), kl(module, precision == "autocast")
    assert expected > 0
    # 1e-3: the same arithmetic in another order; a prediction's own derivative may be as coarse as half precision is
    assert value == pytest.approx(expected, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(gradient.double(), straight.double(), dim=0) > 0.99
    assert gradient.norm() == pytest.approx(straight.norm().item(), rel=0.05)
    module.kl.settings = replace(module.kl.settings, precision="model")
    assert abs(kl(module, precision == "autocast")[0] / expected - 1) > 1e-3  # so that the test tests something


def test_float32_arithmetic_leaves_weights_and_switches_as_they_were(sd15_folder: Path) -> None:
    from dblightning.backbone import DiffusersBackbone
    from dblightning.precision import computes_in_float32, float32_arithmetic

    unet = DiffusersBackbone(str(sd15_folder), dtype="bfloat16").unet
    device, inputs = torch.device("cpu"), (torch.zeros(1, 4, 8, 8), torch.tensor([500]), torch.zeros(1, 77, 16))
    torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), float32_arithmetic(device):
            assert unet(*inputs).sample.dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {each.dtype for each in unet.parameters()} == {torch.bfloat16}
    assert not computes_in_float32(unet, device)
    assert computes_in_float32(unet.float(), device)
    with torch.autocast("cpu", torch.bfloat16):
        assert not computes_in_float32(unet, device)


def test_the_kl_of_a_share_of_the_transitions_is_an_unbiased_estimate(
    backbone: Any, tmp_path: Path, prompts: Any
) -> None:
    module = build(backbone, kl_share=0.25, kl_weight=1.0, reward_weight=1e-12)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions = every_transition(module)
    whole = module.policy_loss(transitions)[0].item()
    parts = [module.policy_loss(transitions, True, torch.arange(start, 16, 4))[0].item() for start in range(4)]
    assert len({round(part, 9) for part in parts}) == 4
    assert sum(parts) / 4 == pytest.approx(whole, rel=1e-5)  # a sum in another order
    # over many micro-batches of 6 each transition is taken as often: 1.5 a time, never none or all
    taken = [module.kl_rows(6, visit) for visit in range(400)]
    assert {len(each) for each in taken if each is not None} == {1, 2}
    times = torch.bincount(torch.cat([each for each in taken if each is not None]), minlength=6)
    assert times.sum() == 600
    assert times.min() > 70  # 100 ± 9
    assert [len(module.kl_rows(1, visit)) for visit in range(8)] == [1, 0, 0, 0] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "base_rows"), [({"kl_weight": 0.0}, 4), ({"kl_warmup": 1}, 4), ({}, 16), ({"kl_share": 0.5}, 8)]
)
def test_without_a_kl_weight_the_base_model_runs_on_the_first_micro_batch_alone(
    backbone: Any, tmp_path: Path, prompts: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any],
    base_rows: int,
) -> None:  # fmt: skip
    module = build(backbone, policy_steps=2, policy_batch_size=4, gradient_accumulation=2, **settings)
    rows: list[int] = []
    reference = module.policy.reference
    monkeypatch.setattr(module.policy, "reference", lambda each: rows.append(len(each.latents)) or reference(each))
    run = trainer(tmp_path, limit_train_batches=1, max_epochs=1)
    run.fit(module, datamodule=prompts())
    assert sum(rows) == base_rows
    assert run.callback_metrics["train/kl"] >= 0


def test_leaving_the_kl_out_changes_neither_the_loss_nor_its_gradient_at_weight_zero(
    backbone: Any, tmp_path: Path, prompts: Any
) -> None:
    module = build(backbone, kl_weight=0.0)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions, parameters = every_transition(module), backbone.adapters.parameters(module.adapter_name)
    losses = [module.policy_loss(transitions, with_kl)[0] for with_kl in (True, False)]
    assert losses[0].item() == losses[1].item()
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_loss_gradient_on_policy_is_minus_advantage_times_score(
    backbone: Any, tmp_path: Path, prompts: Any
) -> None:
    module = build(backbone, kl_weight=0.0, advantage="prompt", reward_weight=3.0)
    give_effect(module)
    rolled_out(module, tmp_path, prompts())
    transitions = every_transition(module)
    parameters = backbone.adapters.parameters(module.adapter_name)
    loss, _ = module.policy_loss(transitions)
    got = torch.autograd.grad(loss, parameters)
    output = module.policy.current(transitions)
    step = module.solver.gaussian(output, transitions.latents, transitions.step_index)
    density = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean))
    log_prob = density.log_prob(transitions.next_latents).flatten(1).mean(1)
    advantage = transitions.reward - transitions.baseline
    expected = torch.autograd.grad(-(3.0 * advantage * log_prob).mean(), parameters)
    scale = max(each.abs().max() for each in expected)
    assert scale > 0
    for one, other in zip(got, expected, strict=True):
        # 1e-3 of the largest: the ratio differs from 1 by 1e-6, the sums run in another order
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(scale))


@pytest.mark.parametrize("advantage", ["value", "prompt", "both"])
@pytest.mark.parametrize("objective", ["dpok", "ppo"])
def test_a_fit_moves_the_adapter_and_nothing_of_the_base(
    backbone: Any, tmp_path: Path, prompts: Any, advantage: str, objective: str
) -> None:
    before = {name: each.clone() for name, each in backbone.named_parameters() if ".lora_" not in name}
    module = build(backbone, advantage=advantage, objective=objective, normalize_advantage=True)
    start = backbone.adapters.state_dict(module.adapter_name)
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=prompts())
    moved = backbone.adapters.state_dict(module.adapter_name)
    assert not all(torch.equal(start[key], moved[key]) for key in start)
    assert all(torch.isfinite(each).all() for each in moved.values())
    after = {name: each for name, each in backbone.named_parameters() if ".lora_" not in name}
    assert {name.replace(".base_layer", "") for name in after} == set(before)
    for name, each in after.items():
        assert torch.equal(each, before[name.replace(".base_layer", "")])
    logged = set(fit.logged_metrics)
    expected = {"reward", "reward_std", "kl", "ratio", "clip_fraction", "on_policy_ratio_error", "grad_norm"}
    assert {f"train/{name}" for name in expected} <= logged
    assert ("train/value_loss" in logged) == (advantage != "prompt")
    assert "time/images_per_s" in logged


def test_a_prompts_reward_is_logged_in_the_rollouts_that_have_it_alone(tmp_path: Path, prompts: Any) -> None:
    class Kept(DummyLogger):
        points: ClassVar[dict[int, set[str]]] = {}

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            assert step is not None
            self.points.setdefault(step, set()).update(name for name in metrics if name.startswith("prompt/"))

    module = RewardRLModule(GaussianBackbone(), LinearReward(), num_inference_steps=4, guidance_scale=1.0)
    trainer(tmp_path, logger=Kept(), log_every_n_steps=1).fit(module, datamodule=prompts(batch_size=2))
    assert [len(Kept.points[step]) for step in (0, 1)] == [2, 2]
    assert not Kept.points[0] & Kept.points[1]  # four prompts in two rollouts


def test_the_value_function_takes_real_steps_and_learns(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    module = build(backbone, value_steps=40, value_learning_rate=1e-2, learning_rate=0.0)
    start = {name: each.clone() for name, each in module.value_function.state_dict().items()}
    trainer(tmp_path, max_epochs=4).fit(module, datamodule=prompts())
    changed = [not torch.equal(each, start[name]) for name, each in module.value_function.state_dict().items()]
    assert any(changed)
    transitions = every_transition(module)
    assert explained_variance(module.value(transitions), transitions.reward) > 0.5


def test_steps_left_out_of_training_are_never_trained_on(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    module = build(backbone, skip_last_steps=3)
    seen: list[int] = []
    loss = module._losses

    def spy(parts: Any, *arguments: Any) -> Any:
        seen.extend(step for _, transitions in parts for step in transitions.step_index.tolist())
        return loss(parts, *arguments)

    module._losses = spy  # type: ignore[method-assign, assignment]
    trainer(tmp_path).fit(module, datamodule=prompts())
    assert set(seen) == {0}


def test_gradient_checkpointing_gives_the_same_gradients(sd15_folder: Path, tmp_path: Path, prompts: Any) -> None:
    from dblightning.backbone import DiffusersBackbone

    gradients = []
    for checkpointing in (False, True):
        module = build(DiffusersBackbone(str(sd15_folder), gradient_checkpointing=checkpointing))
        give_effect(module)
        rolled_out(module, tmp_path, prompts())
        loss, _ = module.policy_loss(every_transition(module))
        loss.backward()  # the recomputation happens here, after the gates were reset
        gradients.append([each.grad for each in module.backbone.adapters.parameters(module.adapter_name)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_autocast_trains_on_current_weights(sd15_folder: Path, tmp_path: Path, prompts: Any) -> None:
    """Autocast caches casts of weights; a stale one would leave the adapter without gradients, or a step behind."""
    from dblightning.backbone import DiffusersBackbone

    moved: dict[str, set[str]] = {}
    ratios: dict[str, list[float]] = {}
    for precision in ("32-true", "bf16-mixed"):
        module = build(DiffusersBackbone(str(sd15_folder)), policy_steps=3, gradient_accumulation=1, clip_range=10.0)
        give_effect(module)
        start = module.backbone.adapters.state_dict(module.adapter_name)
        seen = ratios[precision] = []
        loss = module._losses

        def spy(*arguments: Any, loss: Any = loss, seen: list[float] = seen) -> Any:
            result = loss(*arguments)
            seen.append(float((result[1][0]["train/ratio"].detach() - 1).abs()))
            return result

        module._losses = spy  # type: ignore[method-assign, assignment]
        trainer(tmp_path, precision=precision, limit_train_batches=1).fit(module, datamodule=prompts())
        after = module.backbone.adapters.state_dict(module.adapter_name)
        assert all(each.dtype == torch.float32 for each in after.values())
        moved[precision] = {key for key in start if not torch.equal(start[key], after[key])}
    # the mid block attends over a single position here, so its query and key have no gradient; all else must move
    idle = {key for key in start if "mid_block" in key and ("attn1.to_q" in key or "attn1.to_k" in key)}
    assert moved["bf16-mixed"] - idle == moved["32-true"] - idle == set(start) - idle
    # later steps see the moved weights: the ratio leaves 1 by more than the on-policy rounding
    assert ratios["bf16-mixed"][2] > 2 * ratios["bf16-mixed"][0]


def test_a_nan_reward_drops_its_sample_alone(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    class OneNaN(Redness):
        def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return super()._score(images, prompts).index_fill(0, torch.tensor([1]), float("nan"))

    module = build(backbone, OneNaN())
    fit = trainer(tmp_path, limit_train_batches=1)
    fit.fit(module, datamodule=prompts())
    assert module.replay is not None
    assert module.replay.size == 3
    assert fit.logged_metrics["train/dropped_samples"] == 1
    assert torch.isfinite(fit.logged_metrics["train/reward"])
    assert all(torch.isfinite(each).all() for each in backbone.adapters.state_dict(module.adapter_name).values())


@pytest.mark.parametrize("overlap_reward", [False, True])
@pytest.mark.parametrize("where", ["image", "latents"])
def test_a_nan_image_drops_its_sample_alone(
    backbone: Any, tmp_path: Path, prompts: Any, where: str, overlap_reward: bool
) -> None:
    decode, denoise = backbone.decode, backbone.denoise

    def spoil(batch: Tensor) -> Tensor:
        return batch.index_fill(0, torch.tensor([1]), float("nan")) if not torch.is_grad_enabled() else batch

    if where == "image":
        backbone.decode = lambda latents: spoil(decode(latents))
    else:  # with guidance each row is its own
        backbone.denoise = lambda latents, *rest, **options: spoil(denoise(latents, *rest, **options))
    module = build(backbone, overlap_reward=overlap_reward, kl_weight=0.0, rollout_batch_size=4)
    watch = module.kl.watch

    def unspoilt(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone, "denoise", denoise)
            return watch(*arguments)

    fit = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1.0)
    module.kl.watch = unspoilt  # type: ignore[method-assign]
    fit.fit(module, datamodule=prompts(limit_test_prompts=2, eval_batch_size=2))
    assert module.replay is not None
    assert module.replay.size == 3
    assert torch.isfinite(module.replay.latents).all()
    assert torch.isfinite(module.replay.log_probs).all()
    assert fit.logged_metrics["train/dropped_samples"] == 1
    assert fit.logged_metrics["val/reward_dropped"] == 1
    assert torch.isfinite(fit.logged_metrics["train/reward"])
    assert torch.isfinite(fit.logged_metrics["val/reward"])
    assert all(torch.isfinite(each).all() for each in backbone.adapters.state_dict(module.adapter_name).values())


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        ("float16", "32-true", "a float16 backbone needs a scaled loss"),
        ("float16", "bf16-mixed", "a float16 backbone needs a scaled loss"),
        ("float32", "bf16-true", "precision bf16-true would round the adapter"),
        ("float32", "16-true", "precision 16-true would round the adapter"),
    ],
)
def test_precisions_in_which_the_adapter_cannot_learn_are_refused(
    sd15_folder: Path, tmp_path: Path, prompts: Any, dtype: Any, precision: str, message: str
) -> None:
    from dblightning.backbone import DiffusersBackbone

    module = build(DiffusersBackbone(str(sd15_folder), dtype=dtype))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, precision=precision).fit(module, datamodule=prompts())


def test_a_rank_without_samples_takes_part_in_a_scaled_update(tmp_path: Path, prompts: Any) -> None:
    """Such a rank has no loss, and the gradient scaler refuses a step without one; here both ranks are one."""
    module = RewardRLModule(GaussianBackbone(), LinearReward(), num_inference_steps=4, guidance_scale=1.0)
    policy, value = module.backbone.shifts[module.adapter_name].clone(), module.value_function.head.weight.clone()  # type: ignore[union-attr, index]
    module._batches = lambda *_: iter(())  # type: ignore[method-assign]
    module._over_ranks = lambda metrics: {"train/kl": 0.0}  # type: ignore[method-assign]
    precision = mixed_float16()
    trainer(tmp_path, plugins=[precision], limit_train_batches=1).fit(module, datamodule=prompts())
    assert torch.equal(module.backbone.shifts[module.adapter_name], policy)  # type: ignore[union-attr, index]
    # AdamW's own decay of the value function: 5 steps of lr · 0.01
    torch.testing.assert_close(module.value_function.head.weight, value * (1 - 1e-6) ** 5)
    assert precision.scaler.get_scale() == 2.0**16


def test_all_nan_rewards_stop_the_run_after_saving_a_checkpoint(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    class AllNaN(Redness):
        def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return super()._score(images, prompts) * (float("nan") if self.calls > 1 else 1.0)

    module = build(backbone, AllNaN())
    with pytest.raises(RuntimeError, match="every reward of rollout 2 is NaN"):
        trainer(tmp_path).fit(module, datamodule=prompts())
    saved = list(tmp_path.rglob("*.ckpt"))
    assert len(saved) == 1
    assert torch.load(saved[0], weights_only=True)["dblightning"]["rollouts_done"] == 1


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(
    sd15_folder: Path, tmp_path: Path, prompts: Any
) -> None:
    from dblightning.backbone import DiffusersBackbone

    def run(rollouts: int, ckpt_path: str | None = None) -> tuple[RewardRLModule, L.Trainer]:
        module = build(DiffusersBackbone(str(sd15_folder)), advantage="both")
        fit = trainer(tmp_path, max_epochs=rollouts)
        fit.fit(module, datamodule=prompts(rollouts_per_epoch=1, batch_size=3), ckpt_path=ckpt_path)
        return module, fit

    whole, _ = run(5)
    _, stopped = run(3)
    stopped.save_checkpoint(tmp_path / "middle.ckpt")
    resumed, _ = run(5, str(tmp_path / "middle.ckpt"))
    assert (resumed.rollouts_done, resumed.images_done) == (5, 15)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert whole.replay is not None
    assert resumed.replay is not None
    for key, tensor in whole.replay.state_dict().items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(resumed.replay.state_dict()[key])), key


def test_a_checkpoint_holds_nothing_of_the_base_model(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    module = build(backbone)
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=prompts())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    adapter = set(backbone.adapters.state_dict(module.adapter_name))
    value = set(module.value_function.state_dict())
    expected = {f"adapter.{key}" for key in adapter} | {f"value_function.{key}" for key in value}
    assert set(checkpoint["state_dict"]) == expected


def test_a_checkpoint_of_another_run_is_refused_and_other_changes_are_named(
    backbone: Any, sd15_folder: Path, tmp_path: Path, prompts: Any
) -> None:
    from dblightning.backbone import DiffusersBackbone

    fit = trainer(tmp_path, limit_train_batches=1)
    fit.fit(build(backbone), datamodule=prompts())
    fit.save_checkpoint(tmp_path / "run.ckpt")

    def resume(reward: RewardMetric | None = None, **settings: Any) -> None:
        module = build(DiffusersBackbone(str(sd15_folder)), reward, **settings)
        trainer(tmp_path).fit(module, datamodule=prompts(), ckpt_path=str(tmp_path / "run.ckpt"))

    with pytest.raises(ValueError, match="trained on reward 'Redness'"):
        resume(JPEGCompressibility(), adapter_name="Redness")
    with pytest.raises(ValueError, match="rank was 4 and is 2"):
        resume(rank=2)
    with pytest.raises(ValueError, match="eta was 1.0 and is 0.5"):
        resume(eta=0.5)
    with pytest.warns(UserWarning, match="learning_rate was 0.01 and is 0.02"):
        resume(learning_rate=0.02)


@pytest.fixture
def toy_run(tmp_path: Path, prompts: Any) -> Any:
    """Fits in the Gaussian world: (module, trainer) after so many rollouts of 12 images, resumed or not."""

    def run(rollouts: int, ckpt_path: Path | None = None, **settings: Any) -> tuple[RewardRLModule, L.Trainer]:
        defaults: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "clip_range": 0.5}
        module = RewardRLModule(GaussianBackbone(), LinearReward(), **(defaults | settings))
        fit = trainer(tmp_path, max_epochs=rollouts)
        path = str(ckpt_path) if ckpt_path else None
        fit.fit(module, datamodule=prompts(rollouts_per_epoch=1, batch_size=12), ckpt_path=path)
        return module, fit

    return run


@pytest.mark.parametrize(
    ("before", "after", "held"), [(48, 4 * 18, 18), (4 * 24, 48, 12), (None, 96, 12), (96, None, 12)]
)
def test_a_resumed_run_takes_the_buffer_size_it_is_given(
    toy_run: Any, tmp_path: Path, before: int | None, after: int | None, held: int
) -> None:
    _, fit = toy_run(2, buffer_size=before)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match=f"buffer_size was {before} and is {after}"):
        module, _ = toy_run(3, tmp_path / "run.ckpt", buffer_size=after)
    assert module.replay.capacity == (12 if after is None else after // 4)
    assert module.replay.size == held
    ages = module.replay.rollouts - module.replay.born[: module.replay.size]
    assert (ages == 0).sum() == 12  # the whole latest rollout


def test_a_resumed_run_takes_the_learning_rates_and_the_weight_decay_it_is_given(toy_run: Any, tmp_path: Path) -> None:
    _, fit = toy_run(1, value_learning_rate=1e-3, weight_decay=0.0)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    given = {"value_learning_rate": 0.0, "weight_decay": 0.5, "learning_rate": 0.1}
    with pytest.warns(UserWarning, match=r"value_learning_rate was 0.001 and is 0.0"):
        module, fit = toy_run(2, tmp_path / "run.ckpt", **given)
    before = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    policy, value = fit.optimizers
    assert (policy.param_groups[0]["lr"], policy.param_groups[0]["weight_decay"]) == (0.1, 0.5)
    assert value.param_groups[0]["lr"] == 0.0
    for key, tensor in module.value_function.state_dict().items():
        assert torch.equal(tensor, before[f"value_function.{key}"]), key


def test_a_checkpoint_holds_no_replay_that_nothing_will_read(toy_run: Any, tmp_path: Path) -> None:
    def replay(**settings: Any) -> dict[str, Any]:
        toy_run(1, **settings)[1].save_checkpoint(tmp_path / "run.ckpt")
        return torch.load(tmp_path / "run.ckpt", weights_only=True)["dblightning"]["ranks"][0]["replay"]

    assert replay(buffer_size=None)["latents"].numel() == 0
    assert replay(buffer_size=1000)["latents"].shape == (12, 5, 1, 1, 1)


def test_a_resumed_run_without_replay_is_bit_identical_to_one_that_never_stopped(toy_run: Any, tmp_path: Path) -> None:
    whole, _ = toy_run(4, buffer_size=None, learning_rate=0.05)
    _, fit = toy_run(2, buffer_size=None, learning_rate=0.05)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    resumed, _ = toy_run(4, tmp_path / "run.ckpt", buffer_size=None, learning_rate=0.05)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    for key, tensor in whole.replay.state_dict().items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(resumed.replay.state_dict()[key])), key


@pytest.mark.parametrize("settings", [{"kl": "exact", "advantage": "both"}, {"kl": "eps_mse", "kl_share": 0.5}])
def test_an_update_reads_nothing_back_from_the_device(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """On the meta device, whose tensors have no values: reading one raises."""
    from contextlib import nullcontext

    from dblightning.backbone import Conditioning
    from dblightning.replay import ReplayBuffer

    # which that device does not have
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    module = RewardRLModule(
        GaussianBackbone(), LinearReward(), num_inference_steps=4, guidance_scale=1.0, **settings
    ).to("meta")
    module.backbone.encode = lambda texts, negative: Conditioning(*[torch.zeros(len(texts), 1, device="meta")] * 4)  # type: ignore[method-assign]
    buffer, module.prompts = ReplayBuffer(2, 4, (1, 1, 1), "meta"), {0: "a red circle"}
    transitions = buffer.transitions(torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2]), module.device)
    assert (transitions.latents.device.type, transitions.prompt_id.device.type) == ("meta", "cpu")
    module.policy_loss(transitions, True, module.kl_rows(3, 0))[0].backward()
    module.value(transitions).sum().backward()
    with pytest.raises(RuntimeError, match=r"meta"):
        transitions.log_prob.tolist()


def test_sdxl_trains_a_step_and_exports_a_lora_that_plain_diffusers_loads(
    sdxl_folder: Path, tmp_path: Path, prompts: Any
) -> None:
    from diffusers import StableDiffusionXLPipeline

    from dblightning.backbone import DiffusersBackbone

    module = build(DiffusersBackbone(str(sdxl_folder)))
    trainer(tmp_path, limit_train_batches=1).fit(module, datamodule=prompts())
    module.export_adapter(str(tmp_path / "lora"))
    plain = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = plain("a red circle", latents=noise, **settings).images
    plain.load_lora_weights(tmp_path / "lora")
    after = plain("a red circle", latents=noise, **settings).images
    assert (after - before).abs().max() > 0


def test_validation_scores_the_adapter_with_every_reward(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    module = build(backbone, eval_rewards={"size": JPEGCompressibility()})
    fit = trainer(tmp_path, limit_val_batches=1.0)
    metrics = fit.validate(module, datamodule=prompts(), verbose=False)[0]
    images = module.generate(["a red circle"], torch.tensor([0]), torch.tensor([0]))
    assert images.shape == (1, 3, 16, 16)
    assert {"val/reward", "val/size"} == set(metrics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "eta must be > 0"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"kl_weight": -1.0}, "kl.weight"),
        ({"kl_target": 0.0}, "kl.target must be > 0"),
        ({"kl_target": 1.0, "kl_weight": 0.0}, "needs a kl.weight > 0 to start from"),
        ({"policy_steps": 0}, "policy_steps must be a whole number >= 1"),
        ({"skip_last_steps": 4}, "skip_last_steps"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be > 0 and finite, got -1.0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm must be > 0 and finite, got nan"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"learning_rate": 1e30}, r"learning_rate must be >= 0 and <= 1, got 1e\+30"),
        ({"learning_rate": -1e-5}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"value_learning_rate": float("nan")}, "value_learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_alpha": -4.0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be > 0 and <= 1e[+]06 or null, got nan"),
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"value_steps": -1}, "value_steps"),
        ({"value_width": 0}, "value_width"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"eta": float("nan")}, "eta must be > 0"),
        ({"kl_weight": float("nan")}, "kl.weight"),
        ({"reward_weight": 0.0}, "reward_weight"),
        ({"kl_target": float("nan")}, "kl.target"),
        ({"kl_warmup": -1}, "kl.warmup"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"statistics_window": 0}, "statistics_window"),
        ({"rollout_batch_size": 0}, 'rollout_batch_size must be a whole number >= 1 or null or "auto", got 0'),
        ({"buffer_size": 3}, "buffer_size counts single steps"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(backbone: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(backbone, **settings)


def test_a_rollout_larger_than_the_buffer_is_refused(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    with pytest.raises(ValueError, match="set buffer_size to at least 16"):
        trainer(tmp_path).fit(build(backbone, buffer_size=8), datamodule=prompts())


def test_scoring_in_the_background_trains_the_same_adapter(sd15_folder: Path, tmp_path: Path, prompts: Any) -> None:
    from dblightning.backbone import DiffusersBackbone

    def trained(**settings: Any) -> list[Any]:
        module = build(DiffusersBackbone(str(sd15_folder)), rollout_batch_size=2, **settings)
        trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(module, datamodule=prompts())
        return [each.detach().clone() for each in module.backbone.adapters.parameters(module.adapter_name)]

    for one, other in zip(trained(), trained(overlap_reward=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_reward_that_fails_in_the_background_stops_the_fit(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    class Broken(Redness):
        def _score(self, images: Any, prompts: Any) -> Any:
            raise OSError("the reward's file is gone")

    module = build(backbone, Broken(), rollout_batch_size=4, overlap_reward=True)
    with pytest.raises(OSError, match="file is gone"):
        trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, datamodule=prompts())


def test_a_part_is_scored_while_the_next_is_sampled(backbone: Any, tmp_path: Path, prompts: Any) -> None:
    """The first part's score waits until the second is being decoded: without overlap it would wait in vain."""
    import threading

    second, calls, decode = threading.Event(), [], backbone.decode

    class Waiting(Redness):
        def _score(self, images: Any, prompts: Any) -> Any:
            calls.append(len(images))
            assert second.wait(timeout=60), "the second part was not sampled while the first was scored"
            return super()._score(images, prompts)

    def decoded(latents: Any) -> Any:
        decoded.parts += 1  # type: ignore[attr-defined]
        if decoded.parts == 2:  # type: ignore[attr-defined]
            second.set()
        return decode(latents)

    decoded.parts = 0  # type: ignore[attr-defined]
    backbone.decode = decoded
    module = build(backbone, Waiting(), rollout_batch_size=2, overlap_reward=True)
    trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, datamodule=prompts())
    assert calls == [2, 2]
