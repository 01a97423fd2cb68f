"""The DataModules under Lightning's own loops: shards, epochs, resuming."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dblightning.data import (
    DrawBenchDataModule,
    GenEvalDataModule,
    MiniatureDataModule,
    PromptDataModule,
    PromptFileDataModule,
)
from dblightning.data.stream import PromptSet

Keys = list[tuple[int, int]]


def keys_of(batch: dict[str, Any]) -> Keys:
    return list(zip(batch["prompt_id"].tolist(), batch["seed"].tolist(), strict=True))


class Recorder(LightningModule):
    """Learns nothing and remembers the (prompt, seed) pairs of every batch, also in files, for other processes."""

    def __init__(self, folder: Path | None = None, save_in_step: tuple[int, Path] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.save_in_step = folder, save_in_step
        self.seen: dict[str, list[Keys]] = {"train": [], "val": [], "test": [], "predict": []}

    def _record(self, stage: str, batch: dict[str, Any]) -> None:
        self.seen[stage].append(keys_of(batch))
        if self.folder:
            (self.folder / f"{stage}{self.global_rank}.json").write_text(json.dumps(self.seen[stage]))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self._record("train", batch)
        if self.save_in_step and self.save_in_step[0] == self.trainer.global_step:
            self.trainer.save_checkpoint(self.save_in_step[1])
        return 0 * self.weight

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._record("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._record("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._record("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, "devices": 1, **options})


def data(prompts: int = 7, **settings: Any) -> PromptDataModule:
    names = PromptSet([f"prompt {i}" for i in range(prompts)], {"tag": list(range(prompts))})
    return PromptDataModule(
        names, names, **{"batch_size": 4, "samples_per_prompt": 2, "rollouts_per_epoch": 3, **settings}
    )


def test_epochs_are_finite_and_together_one_unbroken_stream(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, max_epochs=4, limit_val_batches=0).fit(recorder, datamodule=data())
    assert len(recorder.seen["train"]) == 12
    keys = [key for batch in recorder.seen["train"] for key in batch]
    # 24 prompt draws, two seeds each: three rounds of 7 prompts, and 3 prompts of the fourth
    assert len(set(keys)) == 48
    assert {(i, seed) for i in range(7) for seed in range(6)} <= set(keys)


@pytest.mark.parametrize(("overfit", "batches"), [(2, 2), (0.67, 2)])
def test_overfit_batches_trains_on_the_same_prompts_in_every_epoch(
    tmp_path: Path, overfit: float, batches: int
) -> None:
    recorder = Recorder()
    trainer(tmp_path, max_epochs=3, overfit_batches=overfit).fit(recorder, datamodule=data(eval_batch_size=2))
    prompts = [[prompt for prompt, _ in batch] for batch in recorder.seen["train"]]
    assert len(prompts) == 3 * batches
    assert prompts == prompts[:batches] * 3
    keys = [key for batch in recorder.seen["train"] for key in batch]
    assert len(set(keys)) == len(keys)  # with new noise


@pytest.mark.parametrize("stop_after", [3, 4, 5])
def test_a_resumed_run_sees_the_batches_it_had_not_seen(tmp_path: Path, stop_after: int) -> None:
    """Checkpoints at an epoch's end, and one and two batches into the next."""
    whole = Recorder()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_epochs": 3, "limit_val_batches": 1, "callbacks": [saver], "enable_checkpointing": True}
    trainer(tmp_path, **options).fit(whole, datamodule=data())
    assert len(whole.seen["train"]) == 9

    resumed = Recorder()
    trainer(tmp_path, max_epochs=3, limit_val_batches=1).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / f"step={stop_after}.ckpt", weights_only=True
    )
    assert resumed.seen["train"] == whole.seen["train"][stop_after:]


def test_a_checkpoint_written_inside_a_step_repeats_that_steps_batch(tmp_path: Path) -> None:
    whole = Recorder(save_in_step=(4, tmp_path / "inside.ckpt"))
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(whole, datamodule=data())
    resumed = Recorder()
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "inside.ckpt", weights_only=True
    )
    assert resumed.seen["train"] == whole.seen["train"][4:]


def fit_on_two_ranks(folder: Path) -> None:
    """Lightning's own DDP with its default sampler settings; 7 prompts · 3 seeds do not divide by 2."""
    options = {"max_epochs": 2, "strategy": "ddp_fork", "devices": 2, "num_sanity_val_steps": 0}
    trainer(folder, **options).fit(Recorder(folder), datamodule=data(eval_seeds=3, eval_batch_size=4))


@pytest.mark.slow  # tests/test_distributed.py trains and validates on two ranks every day
def test_two_ranks_share_training_and_evaluation_without_duplicates_or_losses(tmp_path: Path) -> None:
    # in an interpreter of its own: forking one that has run threads or CUDA may hang
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    ranks = [json.loads((tmp_path / f"train{rank}.json").read_text()) for rank in range(2)]

    alone = Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(alone, datamodule=data(batch_size=8))
    together = [[tuple(key) for rank in ranks for key in rank[step]] for step in range(6)]
    assert together == alone.seen["train"]

    shares = [json.loads((tmp_path / f"val{rank}.json").read_text()) for rank in range(2)]
    # each epoch: ranks see 11 and 10 of the 21 pairs
    once = [tuple(key) for share in shares for batch in share[: len(share) // 2] for key in batch]
    assert sorted(once) == [(i, seed) for i in range(7) for seed in range(3)]


def test_test_and_predict_see_every_pair_once(tmp_path: Path) -> None:
    recorder, module = Recorder(), data(eval_seeds=2, eval_batch_size=4)
    trainer(tmp_path).test(recorder, datamodule=module, verbose=False)
    trainer(tmp_path).predict(recorder, datamodule=module, return_predictions=False)
    pairs = [(i, seed) for i in range(7) for seed in range(2)]
    assert [key for batch in recorder.seen["test"] for key in batch] == pairs
    assert [key for batch in recorder.seen["predict"] for key in batch] == pairs


def test_another_stream_is_refused_in_training_and_not_in_testing() -> None:
    module, other = data(seed=1), data(seed=2)
    next(iter(module.train_dataloader()))
    state = module.state_dict()
    assert state["position"] == 2
    other.load_state_dict(state)
    other.test_dataloader()
    with pytest.raises(ValueError, match=r"has \{'seed': 1\}, this run \{'seed': 2\}"):
        other.train_dataloader()


def test_a_position_survives_another_batch_size() -> None:
    module, smaller = data(batch_size=8), data(batch_size=2, rollouts_per_epoch=8)
    first = [keys_of(batch) for batch in module.train_dataloader()]
    smaller.load_state_dict(module.state_dict())
    then = [keys_of(batch) for batch in smaller.train_dataloader()]
    keys = [key for batch in first + then for key in batch]
    # 12 + 8 draws of 7 prompts: two rounds and 6 prompts of the third, nothing twice
    assert len(set(keys)) == 40
    assert {(i, seed) for i in range(7) for seed in range(4)} <= set(keys)


SPLITS: dict[type[PromptDataModule], dict[str, Any]] = {
    DrawBenchDataModule: {},
    GenEvalDataModule: {},
    MiniatureDataModule: {"train_on": "wide"},
}


def prompts_of(loader: Any) -> list[str]:
    return [prompt for batch in loader for prompt in batch["prompt"]]


@pytest.mark.parametrize("kind", SPLITS, ids=lambda kind: kind.__name__)
def test_validation_prompts_are_neither_test_nor_training_prompts(kind: type[PromptDataModule]) -> None:
    module = kind(**SPLITS[kind])
    validated, tested = prompts_of(module.val_dataloader()), prompts_of(module.test_dataloader())
    assert len(set(validated)) == len(validated) >= 80
    assert not set(validated) & {*tested, *module.train_prompts}

    # "a and b" for "b and a" is not a new prompt either
    def scene(prompt: str) -> frozenset[str]:
        return frozenset(prompt.lower().removeprefix("a photo of ").rstrip(".").split(" and "))

    assert not {scene(each) for each in validated} & {scene(each) for each in [*tested, *module.train_prompts]}
    assert tested == module.test_prompts and validated == module.val_prompts


def one_thing(prompts: list[str]) -> float:
    return sum(" and " not in prompt for prompt in prompts) / len(prompts)


@pytest.mark.parametrize("kind", [DrawBenchDataModule, MiniatureDataModule], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("limit", [16, 64, 128])
def test_a_limit_keeps_the_share_of_prompts_of_one_thing(kind: type[PromptDataModule], limit: int) -> None:
    """Among the miniature's first 16 that share is 62 %, among all 300 it is 11 %."""
    whole, limited = kind().test_prompts, kind(limit_test_prompts=limit).test_prompts
    assert len(set(limited)) == limit
    assert abs(one_thing(limited) - one_thing(whole)) <= 1 / limit  # a prompt more or less


def test_a_larger_limit_holds_the_smaller_and_ids_stay_those_of_the_whole_list() -> None:
    every = GenEvalDataModule()
    sets = [GenEvalDataModule(limit_test_prompts=limit).test_set.prompt_ids for limit in (10, 50, 51, 699, 1000)]
    for smaller, larger in itertools.pairwise(sets[:4]):
        assert larger[: len(smaller)] == smaller  # so a longer evaluation begins with the batches of a shorter one
    assert sets[-1] == list(range(700))
    limited = GenEvalDataModule(limit_test_prompts=50, eval_batch_size=7, eval_seeds=2)
    batches = list(limited.test_dataloader())
    ids = [int(each) for batch in batches for each in batch["prompt_id"]]
    assert ids == [each for each in sets[1] for _ in range(2)]
    assert prompts_of(batches) == [every.test_prompts[each] for each in ids]
    assert [tag for batch in batches for tag in batch["tag"]] == [every.test_set.metadata["tag"][each] for each in ids]
    assert set(Counter(limited.test_set.metadata["tag"]).values()) == {10}
    assert GenEvalDataModule(limit_test_prompts=50, seed=3).test_set.prompt_ids == sets[1]  # training's seed is its own
    assert GenEvalDataModule(limit_test_prompts=50, limit_seed=3).test_set.prompt_ids != sets[1]


def test_file_order_and_val_split_give_the_prefixes_of_earlier_results() -> None:
    settings: dict[str, Any] = {"limit_test_prompts": 128, "prompt_order": "file", "val_split": "test"}
    module = MiniatureDataModule(**settings)
    first = MiniatureDataModule().test_prompts[:128]
    assert module.test_prompts == prompts_of(module.test_dataloader()) == prompts_of(module.val_dataloader()) == first
    assert module.test_set.prompt_ids == list(range(128))


def test_each_loader_takes_the_split_and_the_limit_it_is_given() -> None:
    module = MiniatureDataModule(limit_test_prompts=3, eval_split="val")
    assert len(module.test_prompts) == len(module.val_prompts) == 3
    assert prompts_of(module.test_dataloader()) == prompts_of(module.predict_dataloader()) == module.val_prompts
    module = MiniatureDataModule(limit_test_prompts=3, limit_val_prompts=5, val_split="test")
    assert len(prompts_of(module.test_dataloader())) == 3
    assert len(prompts_of(module.val_dataloader())) == 5 and len(module.val_prompts) == 5
    assert set(prompts_of(module.val_dataloader())) > set(module.test_prompts)
    module = MiniatureDataModule(eval_split="train", eval_batch_size=25)
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        assert next(iter(loader))["prompt"] == module.train_prompts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_per_epoch": 0}, "rollouts_per_epoch must be an integer >= 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer >= 1, got 0"),
        ({"eval_seeds": -1}, "eval_seeds must be an integer >= 1, got -1"),
        ({"limit_test_prompts": 0}, "limit_test_prompts must be an integer >= 1, got 0"),
        ({"limit_val_prompts": -3}, "limit_val_prompts must be an integer >= 1, got -3"),
        ({"eval_split": "dev"}, "eval_split must be one of 'train', 'val', 'test', got 'dev'"),
        ({"val_split": "dev"}, "val_split must be one of 'train', 'val', 'test', got 'dev'"),
        ({"prompt_order": "random"}, "prompt_order must be one of 'sample', 'file', got 'random'"),
        ({"limit_seed": -1}, "limit_seed must be an integer >= 0, got -1"),
        ({"batch_size": 5}, "multiple of samples_per_prompt"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**settings)


@pytest.mark.parametrize(
    "module",
    [DrawBenchDataModule, GenEvalDataModule, MiniatureDataModule, PromptFileDataModule],
    ids=lambda m: m.__name__,
)
def test_a_config_can_give_every_setting_of_every_module(module: type[PromptDataModule]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptDataModule, "data")
    settings = {
        "batch_size": 8,
        "samples_per_prompt": 4,
        "rollouts_per_epoch": 2,
        "eval_batch_size": 3,
        "eval_seeds": 5,
        "eval_split": "train",
        "val_split": "test",
        "limit_test_prompts": 6,
        "limit_val_prompts": 5,
        "prompt_order": "file",
        "limit_seed": 2,
        "seed": 7,
    }
    own = {"train_file": "prompts.txt"} if module is PromptFileDataModule else {}
    config = {"class_path": f"dblightning.data.{module.__name__}", "init_args": {**own, **settings}}
    parsed = parser.parse_object({"data": config}).data.init_args
    assert {name: parsed[name] for name in settings} == settings


if __name__ == "__main__":
    fit_on_two_ranks(Path(sys.argv[1]))
