"""What a run does when an update fails, and how long it lasts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from dblightning.callbacks import BeforeAfterGrid, BlendSamplingCallback, ExportAdapter, SampleGrid
from dblightning.checkpointing import RunCheckpoint, latest_intact, read_intact
from dblightning.data import PromptFileDataModule
from dblightning.evaluation import BlendSpec
from dblightning.module import RewardRLModule
from dblightning.rewards import JPEGCompressibility, RewardUnavailable
from dblightning.run_state import MOST_SKIPPED, NonFiniteError, random_state, restore_random_state
from tests.launching import assert_equal
from tests.toy_fit import data, fit, module, trainer
from tests.toy_rewards import LinearReward

NAN, INFINITY = float("nan"), float("inf")


class Poison(L.Callback):
    """Spoils one rollout's update: a gradient before an optimiser step, or the adapter after the last one."""

    def __init__(
        self, run: RewardRLModule, rollout: int, step: int, what: str = "gradient", value: float = NAN
    ) -> None:
        self.steps = 0
        original = run._step

        def poisoned(optimizer: Any, parameters: Any) -> Any:
            here = run.rollouts_done == rollout and self.steps == step
            self.steps = self.steps + 1 if run.rollouts_done == rollout else 0
            parameters = list(parameters)
            if here and what == "gradient":
                parameters[0].grad.view(-1)[0] = value
            result = original(optimizer, parameters)
            if here and what == "weights":
                with torch.no_grad():
                    parameters[0].view(-1)[0] = value
            return result

        run._step = poisoned  # type: ignore[method-assign]


def state(run: RewardRLModule, given: L.Trainer) -> dict[str, Any]:
    assert run.replay is not None
    return {
        "weights": run.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in given.optimizers],
        "replay": run.replay.state_dict(),
        "statistics": run.statistics.state_dict(),
        "kl_weight": run.kl_weight,
        "rollouts": [run.rollouts_done, run.images_done],
    }


@pytest.mark.parametrize(
    ("step", "what", "value"),
    # a rollout has one step of the value function and two of the policy
    [(0, "gradient", NAN), (1, "gradient", INFINITY), (2, "gradient", NAN), (1, "weights", NAN), (2, "weights", NAN)],
)
def test_an_update_that_turns_to_nan_stops_the_run_saved_as_it_was_before_the_rollout(
    tmp_path: Path, step: int, what: str, value: float
) -> None:
    """Resumed, it ends as the run that was never poisoned, bit for bit; the buffer of 8 trajectories had evicted 4."""
    expected = module(kl_target=0.5)
    whole = state(expected, fit(tmp_path / "whole", expected))
    poisoned = module(kl_target=0.5)
    callbacks = [Poison(poisoned, 2, step, what, value), RunCheckpoint(str(tmp_path / "saved"), every_n_rollouts=100)]
    with pytest.raises(NonFiniteError, match="rollout 3: .*saved in .*before_non_finite_update.ckpt") as stop:
        fit(tmp_path / "run", poisoned, callbacks=callbacks)
    assert "learning_rate" in str(stop.value)
    found = latest_intact(tmp_path / "saved")
    assert found is not None
    assert found.name == "before_non_finite_update.ckpt"
    assert all(torch.isfinite(tensor).all() for tensor in read_intact(found)["state_dict"].values())
    resumed = module(kl_target=0.5)
    assert_equal(state(resumed, fit(tmp_path / "run", resumed, str(found))), whole)


def test_weights_that_are_not_finite_are_never_saved_or_exported(backbone: Any, tmp_path: Path) -> None:
    run = RewardRLModule(backbone, JPEGCompressibility(), num_inference_steps=2)
    with torch.no_grad():
        backbone.adapters.parameters(run.adapter_name)[3].view(-1)[1] = NAN
    with pytest.raises(NonFiniteError, match="adapter in .*NaN or infinity"):
        run.export_adapter(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()
    checkpoint = {"state_dict": run.state_dict(), "optimizer_states": []}
    with pytest.raises(NonFiniteError, match="a checkpoint would hold NaN or infinity"):
        run.on_save_checkpoint(checkpoint)
    finite = {"state_dict": {}, "optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([INFINITY])}}}]}
    with pytest.raises(NonFiniteError, match="exp_avg"):
        run.on_save_checkpoint(finite)
    with pytest.raises(NonFiniteError, match="take an earlier one"):
        run.on_load_checkpoint({"state_dict": checkpoint["state_dict"], "dblightning": {}})


class Scaler:
    """A float16 loss scaler as far as the run looks at it."""

    def get_scale(self) -> float:
        return 0.5


def test_steps_that_a_loss_scaler_skips_are_no_error_until_there_are_many_in_a_row(tmp_path: Path) -> None:
    run = module()
    given = trainer(tmp_path)
    run.trainer = given
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([NAN, 1.0])
    with pytest.raises(NonFiniteError, match="the policy gradient's norm is nan"):
        run.gradients_are_finite(torch.tensor(NAN), [parameter], "policy")
    given.precision_plugin.scaler = Scaler()  # type: ignore[attr-defined]
    run._skipped["policy"] = 0
    for _ in range(MOST_SKIPPED):
        assert not run.gradients_are_finite(torch.tensor(NAN), [parameter], "policy")
    assert not run.gradients_are_finite(torch.tensor(NAN), [parameter], "value")  # counts for itself
    with pytest.raises(NonFiniteError, match="in 33 steps in a row, at a loss scale of 0.5"):
        run.gradients_are_finite(torch.tensor(NAN), [parameter], "policy")
    assert run.gradients_are_finite(torch.tensor(1.0), [parameter], "policy")
    assert not run.gradients_are_finite(torch.tensor(NAN), [parameter], "policy")  # the count began anew
    parameter.grad = torch.tensor([3e38, 3e38])  # finite, as the scaler sees it, with a norm of infinity
    with pytest.raises(NonFiniteError, match="norm is inf"):
        run.gradients_are_finite(torch.tensor(INFINITY), [parameter], "policy")


# ── fast_dev_run, max_steps, overfit_batches ─────────────────────────────────────────────────────────────────────────


def test_a_fast_dev_run_writes_nothing(backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run = RewardRLModule(
        backbone, JPEGCompressibility(), num_inference_steps=2, guidance_scale=1.0, policy_steps=1,
        gradient_accumulation=1, value_steps=1, value_batch_size=4,
    )  # fmt: skip
    callbacks = [
        SampleGrid(1), ExportAdapter("adapter", every_n_epochs=1), BeforeAfterGrid(1, "picture.png"),
        BlendSamplingCallback([BlendSpec("base")], every_n_rollouts=1, num_prompts=1), RunCheckpoint(None, 1),
    ]  # fmt: skip
    given = L.Trainer(
        accelerator="cpu", fast_dev_run=2, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        logger=CSVLogger("logs"),
    )  # fmt: skip
    given.fit(run, datamodule=PromptFileDataModule(str(prompts), batch_size=2))
    assert run.rollouts_done == 2  # rollouts, not optimiser steps, of which each has two
    assert list(work.rglob("*")) == []


def test_an_error_in_a_fast_dev_run_writes_nothing_either(tmp_path: Path) -> None:
    run = module(LinearReward(NAN))
    given = trainer(tmp_path / "out", fast_dev_run=1, callbacks=[RunCheckpoint(str(tmp_path / "out" / "saved"))])
    with pytest.raises(RuntimeError, match="not saved, as in every fast_dev_run"):
        given.fit(run, datamodule=data(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limits", "rollouts"), [({"max_steps": 5, "max_epochs": -1}, 5), ({"max_steps": 7, "max_epochs": 2}, 6)]
)
def test_max_steps_counts_rollouts_and_the_linear_rate_ends_there(
    tmp_path: Path, limits: dict[str, int], rollouts: int
) -> None:
    run = module(learning_rate_schedule="linear", learning_rate=0.1)
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    given = fit(tmp_path, run, callbacks=[Rates()], **limits)
    assert run.rollouts_done == rollouts
    assert rates == pytest.approx([0.1 * (1 - done / rollouts) for done in range(rollouts)])
    assert given.max_steps == limits["max_steps"]  # as it was given, for the next fit


def test_a_resumed_run_counts_its_earlier_rollouts_towards_max_steps(tmp_path: Path) -> None:
    saver = {"callbacks": [RunCheckpoint(str(tmp_path / "saved"))], "max_epochs": -1}
    first = module()
    fit(tmp_path, first, max_steps=2, **saver)
    again, more = module(), module()
    fit(tmp_path, again, str(latest_intact(tmp_path / "saved")), max_steps=2, **saver)
    assert again.rollouts_done == 2
    fit(tmp_path, more, str(latest_intact(tmp_path / "saved")), max_steps=5, **saver)
    assert more.rollouts_done == 5


# ── what is restored and logged ──────────────────────────────────────────────────────────────────────────────────────


class DrawingReward(LinearReward):
    """A reward that draws from every global generator."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return super()._score(images, prompts) + float(noise)


def test_a_resumed_run_draws_on_from_the_generators_of_numpy_and_python(tmp_path: Path) -> None:
    def seed(number: int) -> None:
        torch.manual_seed(number), np.random.seed(number), random.seed(number)  # noqa: NPY002

    seed(1)
    whole = module(DrawingReward())
    expected = state(whole, fit(tmp_path, whole, max_epochs=2))
    saver = {"callbacks": [RunCheckpoint(str(tmp_path / "saved"))]}
    seed(1)
    fit(tmp_path, module(DrawingReward()), **saver)
    seed(2)
    resumed = module(DrawingReward())
    given = fit(tmp_path, resumed, str(latest_intact(tmp_path / "saved")), max_epochs=2, **saver)
    assert_equal(state(resumed, given), expected)


def test_a_random_state_of_an_earlier_version_is_still_restored() -> None:
    before = random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    restore_random_state({"cpu": before["cpu"]}, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)


def test_the_learning_rate_monitor_logs_the_rate_of_its_own_rollout(tmp_path: Path) -> None:
    import csv

    run = module(learning_rate_schedule="linear", learning_rate=0.1)
    logger = CSVLogger(str(tmp_path), name="log", version="")
    fit(tmp_path, run, callbacks=[LearningRateMonitor("step")], logger=logger, max_epochs=2)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = next(key for key in rows[0] if key.startswith("lr-AdamW") and not key.endswith("-1"))
    logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
    assert logged == pytest.approx({step: 0.1 * (1 - step / 6) for step in range(6)})


def test_one_worker_scores_for_the_whole_run_and_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dblightning.rewards import worker as workers

    made: list[Any] = []
    init = workers.RewardWorker.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(workers.RewardWorker, "__init__", counted)
    run = module(overlap_reward=True, rollout_batch_size=2)
    fit(tmp_path, run, max_epochs=2)
    assert len(made) == 1
    assert run._worker is None
    with pytest.raises(RuntimeError, match="shutdown"):
        made[0]._pool.submit(print)
    failing = module(LinearReward(NAN), overlap_reward=True, rollout_batch_size=2)
    with pytest.raises(RuntimeError, match="every reward"):
        fit(tmp_path / "failing", failing)


def test_validation_before_the_first_rollout_is_in_the_curves_at_step_0(tmp_path: Path) -> None:
    """The untrained adapter is the base model, so its value is known from another module."""
    import csv

    def curve(**settings: Any) -> dict[int, float]:
        run = module(**settings)
        logger = CSVLogger(str(tmp_path), name=f"log{settings}", version="")
        fit(tmp_path, run, logger=logger, limit_val_batches=1.0, max_epochs=2)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            return {int(row["step"]): float(row["val/reward"]) for row in csv.DictReader(file) if row["val/reward"]}

    base, logged = module(), curve()
    validated = trainer(tmp_path, limit_val_batches=1.0).validate(base, datamodule=data(tmp_path), verbose=False)
    assert sorted(logged) == [0, 2, 5]
    assert logged[0] == pytest.approx(validated[0]["val/reward"], rel=1e-6)
    assert logged[5] > logged[0]
    without = curve(validate_first=False)
    assert without == {step: value for step, value in logged.items() if step}


class GivesUp(LinearReward):
    """Unavailable from a call on."""

    def __init__(self, call: float = float("inf")) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        if self.calls >= self.call:
            raise RewardUnavailable("no answer from http://scores.example/score; is the server running?")
        return super()._score(images, prompts)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_reward_that_gives_up_stops_the_run_saved_as_it_was_before_the_rollout(tmp_path: Path, overlap: bool) -> None:
    """Resumed with the reward back, it ends as the run whose reward was always there, bit for bit."""
    settings = {"kl_target": 0.5, "overlap_reward": overlap, "rollout_batch_size": 1}
    expected = module(GivesUp(), **settings)
    whole = state(expected, fit(tmp_path / "whole", expected))
    run = module(GivesUp(2 * (4 if overlap else 1) + 1), **settings)  # in the third of three rollouts
    callbacks = [RunCheckpoint(str(tmp_path / "saved"), every_n_rollouts=100)]
    with pytest.raises(RewardUnavailable, match=r"rollout 3: no answer .*saved in .*before_unavailable_reward.ckpt"):
        fit(tmp_path / "run", run, callbacks=callbacks)
    found = latest_intact(tmp_path / "saved")
    assert found is not None
    assert found.name == "before_unavailable_reward.ckpt"
    resumed = module(GivesUp(), **settings)
    assert_equal(state(resumed, fit(tmp_path / "run", resumed, str(found))), whole)


def test_a_reward_that_gives_up_in_a_validation_stops_the_run_saved_as_it_is(tmp_path: Path) -> None:
    validating = {"limit_val_batches": 1.0, "val_check_interval": 1}
    expected = module()
    whole = state(expected, fit(tmp_path / "whole", expected, **validating))
    run = module()
    run.eval_rewards["other"] = GivesUp(3)  # one call per validation, the first before training
    callbacks = [RunCheckpoint(str(tmp_path / "saved"), every_n_rollouts=100)]
    with pytest.raises(RewardUnavailable, match=r"validation after rollout 2: no answer .*saved in .*reward.ckpt"):
        fit(tmp_path / "run", run, callbacks=callbacks, **validating)
    found = latest_intact(tmp_path / "saved")
    assert found is not None
    assert read_intact(found)["dblightning"]["rollouts_done"] == 2
    resumed = module()
    assert_equal(state(resumed, fit(tmp_path / "run", resumed, str(found), **validating)), whole)


def test_only_the_reward_that_gave_up_is_taken_for_it() -> None:
    error = RuntimeError("the reward worker stopped")
    assert RewardUnavailable.behind(error) is None
    error.__cause__ = ValueError("…")
    error.__cause__.__cause__ = found = RewardUnavailable("no answer")
    assert RewardUnavailable.behind(error) is found
