"""Base class of rewards: checks, micro-batches, averages, frozen networks."""

from __future__ import annotations

import copy
import datetime
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MetricCollection

from dblightning.rewards import (
    REWARDS,
    JPEGCompressibility,
    RemoteReward,
    RewardMetric,
    WeightedReward,
    build_reward,
)
from dblightning.rewards.registry import reward_class


class Brightness(RewardMetric):
    """A reward with a closed form and a frozen network: the mean of the red channel, times the network's weight."""

    is_differentiable = True

    def __init__(self, weight: float = 1.0, micro_batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(micro_batch_size, **kwargs)
        network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5))
        nn.init.constant_(network[0].weight, weight)
        self.register_frozen("network", network)
        self.batches: list[int] = []

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.batches.append(len(prompts))
        red = images[:, 0].mean((-2, -1))[:, None]
        return self.frozen("network")(red.to(self.frozen("network")[0].weight.dtype)).squeeze(-1)


class Blue(RewardMetric):
    """The mean of the blue channel."""

    is_differentiable = True

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 2].mean((-2, -1))


GOOD = torch.full((2, 3, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "words"),
    [
        (GOOD.mul(255).byte(), ["a", "b"], TypeError, "float tensor.*uint8.*divide"),
        (GOOD.numpy(), ["a", "b"], TypeError, "float tensor.*ndarray"),
        (GOOD[0], ["a", "b"], ValueError, r"shape \(B, 3, H, W\), got \(3, 4, 4\)"),
        (GOOD[:, :1], ["a", "b"], ValueError, r"shape \(B, 3, H, W\), got \(2, 1, 4, 4\)"),
        (GOOD.permute(0, 2, 3, 1), ["a", "b"], ValueError, r"got \(2, 4, 4, 3\)"),
        (GOOD[:0], [], ValueError, "empty batch"),
        (GOOD[..., :0], ["a", "b"], ValueError, "at least one pixel"),
        (torch.full_like(GOOD, float("nan")), ["a", "b"], ValueError, "NaN"),
        (torch.cat([GOOD[:1], GOOD[1:] / 0]), ["a", "b"], ValueError, "NaN or infinite"),
        (GOOD * 2.2, ["a", "b"], ValueError, r"\[0, 1\], got \[1.1, 1.1\]"),
        (GOOD - 1, ["a", "b"], ValueError, r"got \[-0.5, -0.5\]; map"),
        (GOOD, ["a"], ValueError, "2 images and 1 prompts"),
        (GOOD, "ab", ValueError, "2 images and one string"),
        (GOOD, ["a", None], TypeError, "NoneType at index 1"),
    ],
)
def test_bad_input_is_refused_with_what_was_wrong(
    images: Tensor, prompts: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Brightness().score(images, prompts)


def test_a_decoders_rounding_beyond_the_range_is_accepted() -> None:
    assert Brightness().score(GOOD * 2 + 5e-4, ["a", "b"]).shape == (2,)


def test_mean_and_standard_error_over_batches_are_numpys() -> None:
    reward = Brightness()
    images = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reward.update(images[:4], ["a"] * 4)
    reward.update(images[4:], ["a"] * 7)
    values = images[:, 0].mean((-2, -1)).double().numpy()
    assert reward.compute().item() == pytest.approx(values.mean(), rel=1e-6)  # float32 result
    assert reward.standard_error().item() == pytest.approx(values.std(ddof=1) / np.sqrt(11), rel=1e-5)
    reward.reset()
    reward.update(images[:4], ["a"] * 4)
    assert reward.compute().item() == pytest.approx(values[:4].mean(), rel=1e-6)


def test_micro_batches_change_nothing_but_the_size_of_a_pass() -> None:
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = Brightness(), Brightness(micro_batch_size=3)
    assert torch.equal(whole.score(images, ["a"] * 7), parts.score(images, ["a"] * 7))
    assert whole.batches == [7]
    assert parts.batches == [3, 3, 1]
    with pytest.raises(ValueError, match="micro_batch_size must be >= 1"):
        Brightness(micro_batch_size=0)


def test_micro_batches_carry_the_same_gradient() -> None:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for reward in (Brightness(), Brightness(micro_batch_size=2)):
        leaf = images.clone().requires_grad_()
        reward.score(leaf, ["a"] * 5).sum().backward()
        gradients.append(leaf.grad)
    assert sorted(reward.batches) == [1, 1, 2, 2, 2, 2]  # recomputed in backward, so that activations need not be kept
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


class Hungry(Brightness):
    """Runs out of memory above two images."""

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._score(images, prompts)


def test_running_out_of_memory_halves_the_micro_batch_and_goes_on() -> None:
    images = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reward = Hungry()
    with pytest.warns(UserWarning) as said:
        scores = reward.score(images, ["a"] * 9)
    assert [str(warning.message) for warning in said] == [
        "Hungry ran out of memory on 9 images: micro_batch_size is now 4",
        "Hungry ran out of memory on 4 images: micro_batch_size is now 2",
    ]
    assert torch.equal(scores, Brightness().score(images, ["a"] * 9))
    assert reward.batches == [2, 2, 2, 2, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the size found is remembered
        reward.score(images, ["a"] * 9)


def test_one_image_that_does_not_fit_is_an_error() -> None:
    class Starved(Brightness):
        def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        Starved().score(GOOD, ["a", "b"])


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.reward = Brightness(0.3)


def test_a_frozen_network_is_no_part_of_the_module_around_it() -> None:
    around = Around().train()
    assert set(around.state_dict()) == {"own.weight", "own.bias"}
    assert [name for name, _ in around.named_parameters()] == ["own.weight", "own.bias"]
    network = around.reward.frozen("network")
    assert not network.training and not network[1].training
    assert not network[0].weight.requires_grad


def test_a_trainers_precision_leaves_the_rewards_alone_and_its_own_call_changes_it() -> None:
    around = Around()
    around.to(torch.bfloat16)
    around.half()
    assert around.own.weight.dtype == torch.float16
    assert around.reward.frozen("network")[0].weight.dtype == torch.float32
    around.reward.update(GOOD, ["a", "b"])
    assert around.reward.total.dtype == torch.float64
    for dtype, change in ((torch.float64, "double"), (torch.bfloat16, "bfloat16"), (torch.float32, "float")):
        assert getattr(around.reward, change)() is around.reward
        assert around.reward.frozen("network")[0].weight.dtype == dtype
    around.reward.to("cpu", torch.float16)
    assert around.reward.frozen("network")[0].weight.dtype == torch.float16
    assert around.reward.total.dtype == torch.float64


def test_the_names_of_earlier_versions_register_and_read_a_network() -> None:
    reward = Brightness()
    reward.hold("other", torch.nn.Linear(1, 1))
    assert reward.held("other") is reward.frozen("other") and not reward.frozen("other").weight.requires_grad


def test_a_frozen_network_follows_to_a_device() -> None:
    around = Around().to("meta")
    assert around.reward.frozen("network")[0].weight.device.type == "meta"
    assert around.reward.total.device.type == "meta"


def test_copies_and_pickles_score_alike() -> None:
    reward = Brightness(0.3)
    reward.update(GOOD, ["a", "b"])
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert torch.equal(other.score(GOOD, ["a", "b"]), reward.score(GOOD, ["a", "b"]))
        assert other.compute() == reward.compute()


def test_a_metric_collection_keeps_rewards_apart() -> None:
    collection = MetricCollection({"one": Brightness(1.0), "two": Brightness(2.0)})
    for _ in range(2):
        collection.update(GOOD, ["a", "b"])
    assert collection.compute() == {"one": 0.5, "two": 1.0}
    assert collection(GOOD, ["a", "b"])["two"] == 1.0  # forward: this batch's mean


def test_a_trainer_logs_the_mean_to_tensorboard_and_leaves_the_network_out_of_checkpoints(tmp_path: Path) -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 1)
            self.reward = Brightness()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.own(batch[:, 0, 0, :2]).sum()

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.reward.update(batch, ["a"] * len(batch))
            self.log("reward", self.reward)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    trainer = lightning.Trainer(
        max_epochs=1, logger=logger, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload().Scalars("reward")
    # batches of 2, 2, 1: the mean over images, not over batches
    assert events[-1].value == pytest.approx(images[:, 0].mean().item(), rel=1e-6)
    keys = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert set(keys) == {"own.weight", "own.bias"}


RANK_1 = """
import datetime, os, sys, torch
sys.path.insert(0, os.getcwd())
from dblightning.rewards.base import RewardMetric
torch.set_num_threads(1)
class Red(RewardMetric):
    def _score(self, images, prompts):
        return images[:, 0].mean((-2, -1))
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=1, world_size=2,
    timeout=datetime.timedelta(seconds=100))
images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))[5:]
reward = Red()
reward.update(images, ["a"] * 2)
print(reward.standard_error().item(), reward.compute().item())
"""


@pytest.mark.slow  # tests/test_distributed.py trains and validates on two ranks every day
def test_two_ranks_report_the_mean_and_standard_error_of_all_images(tmp_path: Path) -> None:
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    meeting = tmp_path / "rendezvous"
    other = subprocess.Popen([sys.executable, "-c", RANK_1, str(meeting)], stdout=subprocess.PIPE, text=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=0, world_size=2, timeout=datetime.timedelta(seconds=100)
    )
    try:
        reward = Brightness()
        reward.update(images[:5], ["a"] * 5)
        before = reward.total.item()
        ours = [reward.standard_error().item(), reward.compute().item()]
        assert reward.total.item() == before  # the local sums are put back
        theirs = [float(number) for number in other.communicate(timeout=120)[0].split()]
    finally:
        torch.distributed.destroy_process_group()
        other.kill()
    values = images[:, 0].mean((-2, -1)).double().numpy()
    assert ours == theirs
    assert ours == pytest.approx([values.std(ddof=1) / np.sqrt(7), values.mean()], rel=1e-5)


def test_keyword_arguments_of_torchmetrics_are_taken_and_others_are_refused() -> None:
    for reward in (
        JPEGCompressibility(sync_on_compute=False, dist_sync_on_step=True, compute_on_cpu=True, process_group=None),
        WeightedReward({"a": Brightness()}, {"a": 1.0}, sync_on_compute=False, compute_with_cache=False),
        RemoteReward("http://localhost", sync_on_compute=False, distributed_available_fn=lambda: False),
    ):
        assert not reward.sync_on_compute
    with pytest.raises(TypeError, match="JPEGCompressibility takes no argument 'speed'"):
        JPEGCompressibility(speed=1)
    with pytest.raises(ValueError, match="sync_on_compute"):
        JPEGCompressibility(sync_on_compute="no")
    with pytest.raises(ValueError, match=r"jpeg cannot be built with speed; its arguments are quality, offset_kb"):
        build_reward("jpeg", speed=1)
    assert not build_reward("jpeg", sync_on_compute=False).sync_on_compute


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_passes_torchmetrics_arguments_on(name: str) -> None:
    parameters = inspect.signature(reward_class(name)).parameters.values()
    assert [each.name for each in parameters if each.kind is each.VAR_KEYWORD] == ["kwargs"]


@pytest.mark.parametrize("on_step", [False, True])
def test_a_metric_called_on_images_returns_their_mean_with_its_gradient(on_step: bool) -> None:
    reward = Brightness(2.0, 3, dist_sync_on_step=on_step)  # micro-batches of 3
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        leaf = images.clone().requires_grad_()
        value = reward(leaf, ["a"] * 5)
        torch.testing.assert_close(value, 2 * images[:, 0].mean())
        value.backward()
        expected = torch.zeros_like(images)
        expected[:, 0] = 2 / (5 * 16)
        torch.testing.assert_close(leaf.grad, expected)
    assert not any(state.requires_grad for state in reward.metric_state.values())  # no graph is kept between batches
    torch.testing.assert_close(reward.compute(), 2 * images[:, 0].mean())
    with torch.no_grad():
        assert not reward(leaf, ["a"] * 5).requires_grad
    reward.update(leaf, ["a"] * 5)
    assert not reward.compute().requires_grad


def test_a_reward_without_a_gradient_returns_none_when_called() -> None:
    leaf = torch.rand(2, 3, 16, 16).requires_grad_()
    assert not JPEGCompressibility(offset_kb=0)(leaf, ["a", "b"]).requires_grad


def test_a_metric_collection_does_not_take_rewards_that_begin_alike_for_one() -> None:
    """Its compute groups merge metrics of equal state after the first batch, and update the first of them only."""
    collection = MetricCollection({"red": Brightness(), "blue": Blue()})
    collection.update(GOOD, ["a", "b"])  # grey: both 0.5
    collection.update(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4), ["a", "b"])
    assert collection.compute() == {"red": 0.75, "blue": 0.25}


def test_gradients_flow_through_a_metric_collection() -> None:
    leaf = GOOD.clone().requires_grad_()
    values = MetricCollection({"red": Brightness(), "blue": Blue()})(leaf, ["a", "b"])
    (values["red"] - values["blue"]).backward()
    assert torch.equal(leaf.grad.sum((0, 2, 3)), torch.tensor([1.0, 0, -1]))


def test_plot_draws_the_mean_or_the_values_given() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reward = Brightness()
    reward.update(GOOD, ["a", "b"])
    _, axes = reward.plot()
    assert axes.lines[0].get_ydata().tolist() == [0.5]
    _, own = pyplot.subplots()
    assert reward.plot([reward(GOOD, ["a", "b"]), reward(GOOD * 2, ["a", "b"])], own)[1] is own
    assert own.lines[0].get_ydata().tolist() == [0.5, 1.0]
    pyplot.close("all")
