"""The adapter's moving average: its formula, and where it stands in for the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dblightning.average import AdapterAverage
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import Single
from dblightning.checkpointing import RunCheckpoint
from dblightning.module import RewardRLModule
from tests import toy_fit
from tests.conftest import randomize
from tests.toy import ShiftBank

DECAY = 0.75


def weights(run: RewardRLModule) -> Tensor:
    return run.backbone.adapters.parameters(run.adapter_name)[0].detach().clone()


def test_the_average_is_the_sum_of_decayed_weights() -> None:
    bank = ShiftBank()
    for name in ("a", "b", "c"):
        bank.add(name, 1, None, (), 0)
    average = AdapterAverage(bank, ["a", "b"], DECAY)
    steps = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).double()
    for step in steps:
        with torch.no_grad():
            for name in bank.names:
                bank.shifts[name].copy_(step)
        average.update(["a"])
    powers = DECAY ** torch.arange(4, -1, -1, dtype=torch.float64)
    expected = ((1 - DECAY) * powers[:, None] * steps).sum(0)  # from a start of zeros
    assert torch.allclose(average.means["a"][0].double(), expected, atol=1e-6)  # float32
    assert not average.means["b"][0].any()
    with average.applied():
        assert torch.allclose(bank.shifts["a"].double(), expected, atol=1e-6)
        assert not bank.shifts["b"].any()
        assert torch.equal(bank.shifts["c"].double(), steps[-1].float().double())
    assert torch.equal(bank.shifts["a"], steps[-1].float())
    other = AdapterAverage(bank, ["a", "b"], DECAY)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.means["a"][0], average.means["a"][0])
    other.load_state_dict({})  # of before there was one
    assert torch.equal(other.means["a"][0], steps[-1].float())
    assert torch.equal(bank.shifts["a"], steps[-1].float())


def test_an_error_inside_leaves_the_adapter_as_it_is() -> None:
    bank = ShiftBank()
    bank.add("a", 1, None, (), 0)
    average = AdapterAverage(bank, ["a"], DECAY)
    with torch.no_grad():
        bank.shifts["a"].fill_(1.0)
    with pytest.raises(RuntimeError, match="no"), average.applied():
        assert not bank.shifts["a"].any()
        raise RuntimeError("no")
    assert bool((bank.shifts["a"] == 1).all())


def test_without_a_decay_there_is_none(tmp_path: Path) -> None:
    run = toy_fit.module()
    toy_fit.fit(tmp_path, run)
    assert not [name for name in run.state_dict() if name.startswith("ema.")]
    assert run.average.state_dict() == {}


def test_every_optimiser_step_is_taken_in_and_validation_sees_the_average(tmp_path: Path) -> None:
    run = toy_fit.module(optimisation={"ema": DECAY})
    seen: list[Tensor] = []
    step_of = run._step

    def recorded(optimizer: Any, *arguments: Any) -> Tensor | None:
        norm = step_of(optimizer, *arguments)
        if optimizer.param_groups[0]["params"][0] is run.policy_parameters[0]:
            seen.append(weights(run))
        return norm

    run._step = recorded  # type: ignore[method-assign]
    toy_fit.fit(tmp_path, run)
    assert len(seen) == 3 * 2  # three rollouts of two policy steps
    expected = torch.zeros(100)
    for step in seen:
        expected = DECAY * expected + (1 - DECAY) * step
    final = weights(run)
    assert torch.allclose(run.average.means[run.adapter_name][0], expected, atol=1e-6)
    assert (expected - final).norm() > 0.1 * final.norm()

    ids = torch.arange(3)
    averaged = run.generate(["a"] * 3, ids, ids)
    assert torch.equal(weights(run), final)
    with torch.no_grad():
        run.backbone.adapters.parameters(run.adapter_name)[0].copy_(expected)
    run.average.begin()
    # 1e-5: float32
    torch.testing.assert_close(run.generate(["a"] * 3, ids, ids), averaged, rtol=1e-5, atol=1e-5)


def test_the_export_is_the_average(sd15_folder: Path, tmp_path: Path) -> None:
    from dblightning.rewards import JPEGCompressibility

    backbone = DiffusersBackbone(str(sd15_folder))
    run = RewardRLModule(backbone, JPEGCompressibility(), optimisation={"ema": DECAY}, adapter={"rank": 2})
    before = backbone.adapters.state_dict(run.adapter_name)
    randomize(backbone.adapters, run.adapter_name, 0)
    now = backbone.adapters.state_dict(run.adapter_name)
    run.average.update()
    written = load_file(run.export_adapter(str(tmp_path)))
    ups = [name for name in written if name.endswith("lora_B.weight")]
    assert len(ups) == len(before) // 2
    for name in ups:
        own = name.removeprefix("unet.")
        # 1e-6: float32
        torch.testing.assert_close(written[name], (1 - DECAY) * now[own], rtol=1e-5, atol=1e-6)
    assert torch.equal(backbone.adapters.state_dict(run.adapter_name)[own], now[own])


def test_merged_weights_follow_the_average(sd15_folder: Path) -> None:
    """What is merged for one is not used for the other."""
    from dblightning.rewards import JPEGCompressibility

    backbone = DiffusersBackbone(str(sd15_folder))
    run = RewardRLModule(
        backbone, JPEGCompressibility(), optimisation={"ema": DECAY}, sampling={"num_inference_steps": 2}
    )
    randomize(backbone.adapters, run.adapter_name, 0, scale=0.5)
    one = torch.arange(1)
    plain = run.sampler.generate(["a"], one, one, Single(run.adapter_name), run.device)
    averaged = run.generate(["a"], one, one)
    again = run.sampler.generate(["a"], one, one, Single(run.adapter_name), run.device)
    assert torch.equal(plain, again)
    assert (plain - averaged).abs().max() > 1e-3


def test_a_checkpoint_without_one_begins_it_from_its_adapter(tmp_path: Path) -> None:
    saver = RunCheckpoint(str(tmp_path / "checkpoints"), 3)
    before = toy_fit.module()
    toy_fit.fit(tmp_path, before, callbacks=[saver])
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")
    run = toy_fit.module(optimisation={"ema": DECAY})
    run.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    assert torch.equal(run.average.means[run.adapter_name][0], weights(before))
    toy_fit.fit(tmp_path, run, str(saved), max_epochs=2)
    assert not torch.equal(run.average.means[run.adapter_name][0], weights(run))
    # and the other way round: one that has it, resumed without
    other = toy_fit.module()
    other.load_state_dict(run.state_dict())
    assert torch.equal(weights(other), weights(run))


@pytest.mark.parametrize("ema", [0.0, 1.0, 1.5, True])
def test_a_decay_out_of_range_is_refused(ema: Any) -> None:
    with pytest.raises(ValueError, match=r"optimisation.ema must be > 0 and <= 0.99999 or null, got"):
        toy_fit.module(optimisation={"ema": ema})


def test_an_update_that_fails_is_none_for_the_average_too(tmp_path: Path) -> None:
    run = toy_fit.module(optimisation={"ema": DECAY})
    toy_fit.fit(tmp_path, run)
    kept = run._snapshot()
    expected = run.average.means[run.adapter_name][0].clone()
    with torch.no_grad():
        run.backbone.adapters.parameters(run.adapter_name)[0].add_(1.0)
    run.average.update()
    run._restore(kept)
    assert torch.equal(run.average.means[run.adapter_name][0], expected)
