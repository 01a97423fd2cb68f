from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import flow_inference, kl_precision, memory, objectives, profile_round, time_to_gain, training
from benchmarks.peers import environment, trl_ddpo
from benchmarks.peers.naive import NaiveTrainer, ddim_gaussian, log_density
from benchmarks.peers.worker import Meter, Settings
from dblightning import miniature

#: folder of TRL's environment, where one was built
PEER_ENVIRONMENT = os.environ.get("DBLIGHTNING_PEER_ENVIRONMENT")


def bright(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that needs no metric."""
    assert len(images) == len(prompts) == 1  # the naive loop scores image by image
    return images.mean((1, 2, 3))


# ── the work, counted ────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="multiple of sample_batch"):
        Settings(images=16, sample_batch=12)
    with pytest.raises(ValueError, match="320 transitions do not divide into 2 optimiser steps of micro-batches of 7"):
        Settings(images=16, micro_batch=7)


def test_the_accumulation_uses_every_transition_once() -> None:
    settings = Settings(images=16, steps=20, micro_batch=8, optimizer_steps=2, train_fraction=0.5)
    assert settings.transitions == 16 * 10
    assert settings.optimizer_steps * settings.accumulation * settings.micro_batch == settings.transitions


def test_a_phase_inside_another_is_taken_out_of_it() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.start()
    with meter.phase("sampling"):
        now += 2
        with meter.phase("decoding"):
            now += 3
        now += 4
    now += 5
    assert meter.stop()["phases"] == {"sampling": 6, "decoding": 3, "rewards": 0, "update": 0, "other": 5}


def test_only_optimiser_steps_with_gradients_count() -> None:
    meter = Meter()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.step()
    weight.grad = torch.ones(1)
    optimizer.step()
    assert meter.counts["optimizer_steps"] == 1


def test_work_that_differs_is_named() -> None:
    round_ = {"seconds": 6.0, "cpu_seconds": 4.0, "counts": dict.fromkeys(training.WORK, 8)}
    less = {"seconds": 2.0, "cpu_seconds": 2.0, "counts": {**round_["counts"], "denoiser_rows_without_grad": 4}}  # type: ignore[dict-item]
    found = training.comparison("a", "b", {"a": [round_], "b": [less]})
    assert not found["identical_work"]
    assert found["differs_in"] == {"denoiser_rows_without_grad": 0.5}
    assert (found["speedup_cpu"]["median"], found["speedup_wall"]["median"]) == (2, 3)
    doubled = training.comparison("a", "b", {"a": [round_], "b": [less]}, processes=2)
    assert (doubled["speedup_cpu"]["median"], doubled["speedup_wall"]["median"]) == (2, 6)  # twice the images


# ── the naive loop is right, so that it is a fair baseline ───────────────────────────────────────────────────────────


def test_the_naive_step_is_diffusers_ddim_step() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(str(miniature.path()), subfolder="scheduler")
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    noise_pred, latents, noise = torch.randn(3, 20, 4, 8, 8, generator=generator)
    mean, std = ddim_gaussian(scheduler, noise_pred, scheduler.timesteps, latents)
    for row, timestep in enumerate(scheduler.timesteps):
        part = slice(row, row + 1)
        step = scheduler.step(noise_pred[part], timestep, latents[part], eta=1.0, variance_noise=noise[part])
        # float32 rounding: x̂₀ is divided by √ᾱ, which is 0.07 at the first step
        torch.testing.assert_close(mean[part] + std[part] * noise[part], step.prev_sample, rtol=1e-5, atol=1e-4)


def test_the_naive_log_density_is_a_mean_over_dimensions() -> None:
    value = log_density(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 1, 1), torch.ones(1, 4, 8, 8))
    # log N(1; 0, 1)
    torch.testing.assert_close(value, torch.tensor([-0.5 - 0.9189385]))


def test_the_naive_round_does_the_work_its_settings_say() -> None:
    settings = Settings(images=4, sample_batch=2, samples_per_prompt=2, steps=3, micro_batch=2, optimizer_steps=2)
    meter = Meter()
    trainer = NaiveTrainer(settings, bright, ["a red circle", "a blue square"], str(miniature.path()), meter)
    before = [weight.detach().clone() for weight in trainer.parameters]
    meter.start()
    trainer.round()
    counts = meter.stop()["counts"]
    rows = 4 * 3 * 2  # images, steps, and both halves of guidance
    assert counts["images"] == 4
    assert counts["transitions"] == 4 * 3
    assert counts["denoiser_rows_with_grad"] == rows
    assert counts["denoiser_rows_without_grad"] == rows + rows  # sampling, and the reference
    assert counts["optimizer_steps"] == 2
    # nothing was updated before the first micro-batch: the same weights must give the same density, up to rounding
    assert trainer.first_ratio_error < 1e-5
    assert any((weight != old).any() for weight, old in zip(trainer.parameters, before, strict=True))


# ── the benchmarks run ───────────────────────────────────────────────────────────────────────────────────────────────

#: of training.TINY: 4 images, 2 steps, two rows each
TINY_COUNTS = {"images": 4, "denoiser_rows_with_grad": 16, "transitions": 8, "optimizer_steps": 1}


@pytest.mark.slow
def test_tiny_training_benchmark_counts_equal_work(tmp_path: Path) -> None:
    training.main(["--tiny", "--only", "ours", "naive", "--json", str(tmp_path / "training.json")])
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    for name in ("ours", "naive"):
        counts = record["contestants"][name]["counts"]
        assert {key: counts[key] for key in TINY_COUNTS} == TINY_COUNTS
        assert counts["denoiser_rows_without_grad"] == 16 + 16  # sampling, and the reference
    (found,) = record["comparisons"]
    assert found["identical_work"]
    assert record["machine"]["processor"]
    assert "naive" in (tmp_path / "training.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_do_each_their_share(tmp_path: Path) -> None:
    record = training.main(["--tiny", "--only", "ours", "--processes", "1", "2"])
    for row in record["contestants"].values():
        assert {key: row["counts"][key] for key in TINY_COUNTS} == TINY_COUNTS  # of the first rank
    assert [row["images"] for row in record["contestants"].values()] == [4, 8]


@pytest.mark.slow
@pytest.mark.skipif(PEER_ENVIRONMENT is None, reason="DBLIGHTNING_PEER_ENVIRONMENT names no environment with TRL")
def test_trl_does_the_same_work_as_ours_without_the_reference() -> None:
    record = training.main(
        ["--tiny", "--only", "ours, reference skipped", "TRL", "--peer-environment", str(PEER_ENVIRONMENT)]
    )
    (found,) = record["comparisons"]
    assert found["identical_work"], found["differs_in"]
    assert record["contestants"]["TRL"]["counts"]["denoiser_rows_without_grad"] == 16


def test_the_copy_for_trl_holds_the_same_pipeline_under_other_keys(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    copy = trl_ddpo.readable_copy(miniature.path(), tmp_path)
    name = Path("text_encoder") / "model.safetensors"
    before, after = load_file(miniature.path() / name), load_file(copy / name)
    assert {f"text_model.{key.removeprefix('text_model.')}" for key in before} == set(after)
    assert set(before) != set(after)  # transformers 5 writes no prefix; if that changes, this step has no purpose
    vocab = json.loads((copy / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(570))


def test_a_model_that_fell_back_to_random_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    layer = torch.nn.Linear(2, 2)
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    trl_ddpo.check_loaded(layer, tmp_path / "model.safetensors")
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(RuntimeError, match="weight .* was not loaded"):
        trl_ddpo.check_loaded(layer, tmp_path / "model.safetensors")


def test_trl_without_an_environment_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.main(["--tiny", "--only", "TRL"])
    assert "--peer-environment" in capsys.readouterr().err


def test_every_contestant_runs_on_one_thread_and_offline() -> None:
    assert environment.variables()["OMP_NUM_THREADS"] == "1"
    assert environment.variables()["HF_HUB_OFFLINE"] == "1"


def test_a_missing_environment_is_not_ready(tmp_path: Path) -> None:
    assert not environment.is_ready(tmp_path)


# ── time to a gain ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seconds_to_a_gain_are_those_of_the_first_point_there() -> None:
    points = [{"cpu_s": 1.0, "gain": 0.1}, {"cpu_s": 2.0, "gain": 0.5}, {"cpu_s": 3.0, "gain": 0.4}]
    assert time_to_gain.seconds_to(0.3, points, "cpu_s") == 2.0
    assert time_to_gain.seconds_to(0.6, points, "cpu_s") is None


def test_a_contestant_stops_after_its_rounds_or_at_its_gain() -> None:
    options = argparse.Namespace(rounds=None, gains=[0.3, 0.5], max_cpu_seconds=60.0)
    assert not time_to_gain.finished(0.4, 59.0, 100, options)
    assert time_to_gain.finished(0.5, 1.0, 1, options)
    assert time_to_gain.finished(0.1, 60.0, 1, options)
    options.rounds = 4
    assert [time_to_gain.finished(0.6, 90.0, rounds, options) for rounds in (2, 4)] == [False, True]


def test_before_needs_a_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        time_to_gain.main(["--only", "before, quickstart"])
    assert "add --before CHECKOUT" in capsys.readouterr().err


def test_operations_and_the_unet_alone_are_profiled() -> None:
    record = profile_round.main(["--tiny"])
    (found,) = record["updates"].values()
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["update"] > 0 < found["unet"]
    assert "| 2 | " in profile_round.markdown(record)


def test_an_adapter_without_effect_gains_nothing(tmp_path: Path) -> None:
    from dblightning.backbone import DiffusersBackbone

    backbone = DiffusersBackbone("miniature")
    backbone.adapters.add("fresh", rank=4, seed=0)  # B = 0
    backbone.adapters.export("fresh", tmp_path, backbone.pipeline)
    scorer = time_to_gain.Scorer(count=2, steps=2)
    assert scorer.gain(tmp_path) == (0.0, 0.0)
    assert scorer.gain(tmp_path) == (0.0, 0.0)  # the second time it is copied into place


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def checkpointed() -> tuple[dict[bool, int], dict[bool, int]]:
    """With and without checkpointing: bytes saved for backward, forward calls of one block in forward and backward."""
    saved, calls = {}, {}
    for active in (False, True):
        backbone = memory.sd_backbone(128, torch.float32, tiny=True)
        module = memory.update_module(backbone, active)
        transitions = memory.random_transitions(module, 1)
        saved[active] = memory.saved_bytes(module, transitions)
        count = 0

        def hook(*_: Any) -> None:
            nonlocal count
            count += torch.is_grad_enabled()  # not the reference's forward

        # in the last block: what comes before the first adapter has no gradients and is never run again
        backbone.unet.up_blocks[-1].resnets[0].register_forward_pre_hook(hook)
        loss, _ = module.policy_loss(transitions)
        loss.backward()
        calls[active] = count
    return saved, calls


def test_checkpointing_runs_a_block_again_in_the_backward_pass(checkpointed: Any) -> None:
    _, calls = checkpointed
    assert calls == {False: 1, True: 2}


def test_checkpointing_keeps_less_than_half_the_activations(checkpointed: Any) -> None:
    saved, _ = checkpointed
    # a block keeps one input instead of some ten tensors of that size; half leaves room for the parts outside blocks
    assert saved[True] < 0.5 * saved[False]


def test_the_bytes_saved_do_not_count_weights() -> None:
    module = torch.nn.Linear(10, 10)
    module.policy_loss = lambda inputs: (module(inputs).square().sum(), {})  # type: ignore[assignment]
    # the input (for W's gradient) and the output (for the square's): 4 · 3 · 10 bytes each
    assert memory.saved_bytes(module, torch.randn(3, 10)) == 240  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", list(objectives.VARIANTS))
def test_every_objective_of_the_comparison_takes_its_settings(variant: str) -> None:
    module = objectives.build(objectives.VARIANTS[variant], seed=0)
    assert type(module.objective).__name__ == objectives.VARIANTS[variant]["objective"][0]


def test_tiny_comparison_of_objectives_goes_on_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, variant = tmp_path / "objectives.json", "ReFL, one update"
    arguments = ["--tiny", "--only", variant, "--json", str(target)]
    record = objectives.main(arguments)
    (run,) = record["runs"]
    assert run["variant"] == variant and run["curve"][-1]["images"] == 24
    assert run["curve"][-1]["kl"] > 0
    assert f"| {variant} | 0 | " in target.with_suffix(".md").read_text()
    monkeypatch.setattr(objectives, "train", lambda *_: pytest.fail("it trained again"))
    assert objectives.main(arguments)["runs"] == record["runs"]
    with pytest.raises(SystemExit, match="name another file"):
        objectives.main(["--seconds", "9", "--json", str(target)])


@pytest.mark.slow
def test_tiny_memory_benchmark_writes_its_record(tmp_path: Path) -> None:
    # in fresh processes, as it is meant: a process that ran other tests holds freed memory, and its peak does not move
    target = tmp_path / "memory.json"
    memory.main(["--tiny", "--resolution", "128", "--dtype", "float32", "--micro-batch", "1", "--json", str(target)])
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["ratio"]["saved_for_backward_mb"] < 0.5
    sizes = record["paper_sizes_mb"]
    assert sizes["LoRA's optimiser"] == pytest.approx(2 * sizes["LoRA"], rel=0.01)  # two moments, and step counters
    # 20 trajectories of 51 latents (4, 16, 16) and 50 log-probs in float32; 0.1 % for some numbers per trajectory
    assert sizes["replay buffer"] == pytest.approx(20 * 4 * (51 * 1024 + 50) / 1e6, rel=1e-3)


def test_memory_that_does_not_grow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"peak_mb": 9.0, "update_mb": 0.0, "saved_for_backward_mb": 1.0, "seconds": 1.0}
    monkeypatch.setattr(memory, "in_fresh_process", lambda options, variant: held)
    with pytest.raises(RuntimeError, match="measure in a fresh process"):
        memory.main(["--tiny"])


def test_memory_variants_are_those_that_a_fresh_process_understands() -> None:
    options = argparse.Namespace(model="sd15", resolution=128, dtype="float32", micro_batch=1, tiny=True)
    assert set(memory.run_variant(options, "sizes")) >= {"LoRA", "value function", "replay buffer"}


# ── the KL's precision ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_kl_in_bfloat16_is_within_five_percent_and_its_table_says_so(tmp_path: Path) -> None:
    target = tmp_path / "kl.json"
    arguments = ["--dimensions", "64", "--guidance", "7.5", "--precisions", "bfloat16", "--steps", "4"]
    kl_precision.main([*arguments, "--strengths", "0.01", "--json", str(target)])
    (row,) = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert row["float32_kl"] == pytest.approx(row["kl"], rel=0.05)
    assert row["float32_cosine"] > 0.99
    assert row["model_kl"] > 2 * row["kl"]
    assert (row["model_rows"], row["float32_rows"]) == (2, 3)
    assert "| 64 | 7.5 | bfloat16 |" in target.with_suffix(".md").read_text(encoding="utf-8")


def test_the_flow_miniatures_calls_are_timed_against_the_plain_pipeline() -> None:
    options = argparse.Namespace(batch=1, steps=2, guidance_scale=3.0, repeats=1)
    rows = flow_inference.measure(options)
    assert [row["call"] for row in rows] == [flow_inference.PLAIN, *flow_inference.CALLS]
    assert rows[0]["ratio"] == 1.0 and all(row["seconds_per_image"] > 0 for row in rows)
    assert flow_inference.to_markdown(rows).count("\n") == 1 + len(rows)
