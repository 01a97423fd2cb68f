from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dblightning.backbone import DiffusersBackbone
from dblightning.callbacks import BlendSamplingCallback
from dblightning.evaluation import BlendSpec, BlendSweep
from dblightning.evaluation.sampler import BlendSampler, load_adapters
from dblightning.evaluation.specs import expand
from dblightning.module import RewardRLModule
from dblightning.rewards import JPEGCompressibility
from tests.callbacks import fitting
from tests.conftest import randomize
from tests.own_methods import MODULE

TRAINED = "JPEGCompressibility"


@pytest.fixture
def other(sd15_folder: Path, tmp_path: Path) -> str:
    """The folder of another adapter, exported by another run."""
    backbone = DiffusersBackbone(str(sd15_folder))
    backbone.adapters.add("other", seed=5)
    randomize(backbone.adapters, "other", 5)
    backbone.adapters.export("other", tmp_path / "loras" / "other", backbone.pipeline)
    return str(tmp_path / "loras" / "other")


def narrower(folder: Path, tmp_path: Path) -> str:
    """The folder of an adapter of rank 2; that in training has 4."""
    backbone = DiffusersBackbone(str(folder))
    backbone.adapters.add("narrow", rank=2, seed=6)
    backbone.adapters.export("narrow", tmp_path / "narrow", backbone.pipeline)
    return str(tmp_path / "narrow")


def fit(
    folder: Path, tmp_path: Path, callbacks: list[L.Callback], rollouts: int = 4, options: dict[str, Any] | None = None
) -> RewardRLModule:
    backbone = DiffusersBackbone(str(folder), **(options or {}))
    return fitting.fit(backbone, tmp_path, callbacks, rollouts, policy_steps=2)


def state(module: RewardRLModule) -> dict[str, Any]:
    """Everything training resumes from: weights, value function, optimisers, replay, random state."""
    assert module.replay is not None
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in module.trainer.optimizers],
        "replay": module.replay.state_dict(),
        "torch": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_training_is_the_same_to_the_last_bit_with_and_without_it(
    sd15_folder: Path, tmp_path: Path, other: str
) -> None:
    sweep = BlendSweep(["db-mpa", "db-mpa-ls", "rewarded-soup"], [TRAINED, "other"], [0.5])
    code = BlendSpec("code", {TRAINED: 1.0}, options={"candidates": 2, "block_size": 1})
    callback = BlendSamplingCallback(
        blends=[BlendSpec("base"), code], sweeps=[sweep], adapters={"other": other}, every_n_rollouts=1, num_prompts=2,
        max_share=None,
    )  # fmt: skip
    watched = state(fit(sd15_folder, tmp_path, [callback]))
    alone = state(fit(sd15_folder, tmp_path, []))
    assert len(list((tmp_path / "log" / "blend_sampling").glob("*.parquet"))) == 4
    for part in alone:
        assert same(watched[part], alone[part]), part


def test_it_scores_the_adapter_as_it_is_by_then(sd15_folder: Path, tmp_path: Path, other: str) -> None:
    """Before and after the last rollouts the trained adapter's images differ, the other's and the base's do not."""
    blends = [BlendSpec("base"), BlendSpec("single", {TRAINED: 1.0}), BlendSpec("single", {"other": 1.0})]
    callback = BlendSamplingCallback(
        blends=blends, adapters={"other": other}, every_n_epochs=1, num_prompts=2, seeds=2, max_share=None
    )
    fit(sd15_folder, tmp_path, [callback])
    tables = [pd.read_parquet(tmp_path / "log" / "blend_sampling" / f"rollout-{count:06d}.parquet") for count in (2, 4)]
    first, last = (table.set_index(["blend", "prompt_id", "seed"])["thumbnail"] for table in tables)
    changed = {blend: any(first[blend] != last[blend]) for blend in ("base", f"single_{TRAINED}-1", "single_other-1")}
    assert changed == {"base": False, f"single_{TRAINED}-1": True, "single_other-1": False}
    assert len(tables[0]) == 3 * 2 * 2


def test_scores_and_pictures_go_to_tensorboard(sd15_folder: Path, tmp_path: Path, other: str) -> None:
    rewards: Any = {"size_75": JPEGCompressibility(quality=75)}
    callback = BlendSamplingCallback(
        sweeps=[BlendSweep(["db-mpa"], [TRAINED, "other"], [0.3, 0.7])], adapters={"other": other}, rewards=rewards,
        every_n_rollouts=2, num_prompts=2, max_share=None,
    )  # fmt: skip
    fit(sd15_folder, tmp_path, [callback])
    seen = EventAccumulator(str(tmp_path / "log"), size_guidance={"images": 0})
    seen.Reload()
    table = pd.read_parquet(tmp_path / "log" / "blend_sampling" / "rollout-000004.parquet")
    label = f"db-mpa_{TRAINED}-0.3_other-0.7"
    logged = seen.Scalars(f"blend/size_75/{label}")
    assert [event.step for event in logged] == [2, 4]
    expected = table.loc[table["blend"] == label, "reward/size_75"].mean()
    assert np.isclose(logged[-1].value, expected, rtol=1e-6)
    assert {"blend/images", "blend/pareto"} <= set(seen.Tags()["images"])


def test_an_adapter_that_appears_while_training_runs_is_picked_up(
    sd15_folder: Path, tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that cannot be blended as requested is left out, and the run goes on."""
    narrow = narrower(sd15_folder, tmp_path)
    hidden, watched = tmp_path / "hidden", tmp_path / "watched"
    watched.mkdir()
    Path(other).rename(hidden)

    class Arrive(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                hidden.rename(watched / "other_0.5")
                Path(narrow).rename(watched / "narrow")

    factors = BlendSpec("rewarded-soup-factors", {"other_0_5": 0.5, "narrow": 0.5})
    blends = [BlendSpec("base"), BlendSpec("single", {"other_0_5": 1.0}), factors]
    callback = BlendSamplingCallback(
        blends=blends, watch=str(watched), every_n_rollouts=1, num_prompts=1, max_share=None
    )
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(sd15_folder, tmp_path, [callback, Arrive()])
    assert caplog.text.count(f"leaves out {factors.label}: averaging LoRA factors needs adapters of one rank") == 1
    tables = [pd.read_parquet(file) for file in sorted((tmp_path / "log" / "blend_sampling").glob("*.parquet"))]
    assert [sorted(set(table["blend"])) for table in tables] == [["base"]] * 2 + [["base", "single_other_0_5-1"]] * 2


def test_an_evaluation_that_would_take_more_than_its_share_waits(
    sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock under the test's hand: rollouts take 10 s, evaluations 10 s, the share is a quarter."""
    clock = [0.0]
    monkeypatch.setattr("dblightning.callbacks.blend_sampling.time.monotonic", lambda: clock[0])
    callback = BlendSamplingCallback(blends=[BlendSpec("base")], every_n_rollouts=1, num_prompts=1, max_share=0.25)
    evaluate: Callable[..., Any] = callback.evaluate
    at: list[int] = []

    def timed(trainer: L.Trainer, module: RewardRLModule) -> Any:
        at.append(module.rollouts_done)
        clock[0] += 10
        return evaluate(trainer, module)

    class Rollouts(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            clock[0] += 10

    monkeypatch.setattr(callback, "evaluate", timed)
    fit(sd15_folder, tmp_path, [Rollouts(), callback], rollouts=12)
    # the first turn has nothing to judge by; then (k + 1) · 10 <= (10 n + 10 k + 10) / 4, so n >= 3 k + 3
    assert at == [1, 6, 9, 12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "every_n_rollouts or every_n_epochs"),
        ({"every_n_rollouts": 1, "every_n_epochs": 1}, "one of them"),
        ({"every_n_rollouts": 0}, "at least 1"),
        ({"every_n_rollouts": 1, "max_share": 1.5}, "max_share must lie between 0 and 1"),
        ({"every_n_rollouts": 1, "num_prompts": 0}, "num_prompts must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendSamplingCallback(blends=[BlendSpec("base")], **settings)


def test_an_adapter_that_is_nowhere_stops_the_run_before_training(sd15_folder: Path, tmp_path: Path) -> None:
    callback = BlendSamplingCallback(blends=[BlendSpec("single", {"nowhere": 1.0})], every_n_rollouts=1)
    with pytest.raises(ValueError, match="runs adapter 'nowhere'"):
        fit(sd15_folder, tmp_path, [callback])


def test_methods_of_ones_own_are_sampled_by_their_dotted_path(
    sd15_folder: Path, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blend and a steering from outside the package, next to the built-in methods that they equal."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "methods_of_my_own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    share, plain = "methods_of_my_own.Share", "methods_of_my_own.Still"
    blends = [
        BlendSpec("db-kla", {"other": 1.0}, kl_scale=8.0),
        BlendSpec(share, {"other": 1.0}, options={"share": 8.0}),
        BlendSpec("base"),
        BlendSpec(plain),
    ]
    callback = BlendSamplingCallback(
        blends, adapters={"other": other}, every_n_rollouts=2, max_share=None, out=str(tmp_path / "out")
    )
    fit(sd15_folder, tmp_path, [callback], rollouts=2)
    scores = pd.read_parquet(tmp_path / "out" / "rollout-000002.parquet")
    assert set(scores["blend"]) == {"db-kla_other-1_lambda-8", f"{share}_other-1_share-8.0", "base", plain}
    by = {method: group[f"reward/{TRAINED}"].to_numpy() for method, group in scores.groupby("method")}
    # the same rows of the denoiser, so the same images to the bit
    assert (by[share] == by["db-kla"]).all()
    assert (by[plain] == by["base"]).all()
    assert (by[share] != by["base"]).any()  # so that the test tests something


def test_factors_of_several_ranks_stop_the_run_before_training(sd15_folder: Path, tmp_path: Path) -> None:
    spec = BlendSpec("rewarded-soup-factors", {TRAINED: 0.5, "narrow": 0.5})
    adapters = {"narrow": narrower(sd15_folder, tmp_path)}
    callback = BlendSamplingCallback([spec], adapters=adapters, every_n_rollouts=1, max_share=None)
    rollouts: list[int] = []

    class Rollouts(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rollouts.append(1)

    with pytest.raises(ValueError, match=r"rewarded-soup-factors_.*ranks \[4, 2\]"):
        fit(sd15_folder, tmp_path, [Rollouts(), callback])
    assert not rollouts


def test_the_shipped_blends_beside_the_quickstart_fit_its_adapter() -> None:
    """Of the files that the first line of callbacks/blend_sampling_miniature.yaml names."""
    root = Path(__file__).parents[2]
    run = yaml.safe_load((root / "configs" / "quickstart.yaml").read_text("utf-8"))["model"]
    added = yaml.safe_load((root / "callbacks" / "blend_sampling_miniature.yaml").read_text("utf-8"))
    given = added["trainer"]["callbacks+"][0]["init_args"]
    specs = expand([BlendSpec(**each) for each in given["blends"]], [BlendSweep(**each) for each in given["sweeps"]])
    backbone = DiffusersBackbone("miniature")
    backbone.adapters.add("aesthetic", rank=run["adapter"]["rank"])
    load_adapters(backbone, specs, {})
    sampler = BlendSampler(backbone, {}, 20, 1.0, 3.0, None, 0)
    sampler.check_adapters(specs)
    with pytest.raises(ValueError, match=r"got ranks \[16, 4\]"):  # as it was shipped once
        sampler.check_adapters([BlendSpec("rewarded-soup-factors", {"alignment": 0.5, "aesthetic": 0.5})])
