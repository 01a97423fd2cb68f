from __future__ import annotations

import builtins
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dblightning import checkpoint_files
from dblightning.checkpointing import (
    CheckedCheckpointIO,
    DamagedCheckpointError,
    RunCheckpoint,
    latest_intact,
    read_intact,
    read_shard,
    remove_all_but,
    serialized,
    write_atomically,
    write_shards,
)
from dblightning.distributed import Ranks
from dblightning.run_state import changed_settings, check_same_run

STATE = {"weights": torch.arange(1000.0), "rollouts": 3, "names": ["a", "b"]}


def saved(path: Path, state: Any = None, age: int = 0) -> Path:
    """A checkpoint written ``age`` seconds ago."""
    write_atomically(serialized(STATE if state is None else state), path)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_is_read_back_by_us_and_by_plain_torch(tmp_path: Path) -> None:
    file = saved(tmp_path / "run.ckpt")
    for state in (read_intact(file), torch.load(file, weights_only=True)):
        assert torch.equal(state["weights"], STATE["weights"])
        assert (state["rollouts"], state["names"]) == (3, ["a", "b"])
    data = file.read_bytes()
    assert data.endswith(hashlib.sha256(data[: -checkpoint_files.FOOTER]).digest())


def test_a_plain_torch_file_is_read_too(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.ckpt")
    assert read_intact(tmp_path / "plain.ckpt")["rollouts"] == 3


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_cut_file_is_recognised(tmp_path: Path, kept: float) -> None:
    file = saved(tmp_path / "run.ckpt")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DamagedCheckpointError, match="run.ckpt is not an intact checkpoint"):
        read_intact(file)


def test_a_single_flipped_bit_is_recognised(tmp_path: Path) -> None:
    file = saved(tmp_path / "run.ckpt")
    data = bytearray(file.read_bytes())
    data[data.index(STATE["weights"].numpy().tobytes()) + 100] ^= 1  # type: ignore[attr-defined]
    file.write_bytes(data)
    assert torch.load(file, weights_only=True)["rollouts"] == 3  # torch does not see it
    with pytest.raises(DamagedCheckpointError, match="SHA-256"):
        read_intact(file)


def test_a_pickled_object_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "code.ckpt"
    write_atomically(serialized({"path": Path("x")}), file)
    with pytest.raises(DamagedCheckpointError, match="weights_only|Unsupported"):
        read_intact(file)


class HalfFull:
    """A file on a disk that takes half of what is written to it."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfFull:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "run.ckpt")
    before = file.read_bytes()
    opened = builtins.open
    monkeypatch.setattr(checkpoint_files, "open", lambda *a: HalfFull(opened(*a)), raising=False)
    with pytest.raises(OSError, match="the disk is full. Earlier checkpoints are untouched") as raised:
        write_atomically(serialized({"other": torch.zeros(9)}), file)
    assert raised.value.errno == errno.ENOSPC
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]  # the half is gone


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path / "run.ckpt")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(serialized({"other": 1}), file)
    assert read_intact(file)["rollouts"] == 3
    assert latest_intact(tmp_path) == file


# ── which one ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_latest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    assert latest_intact(tmp_path) is None
    old = saved(tmp_path / "rollout-000002.ckpt", age=20)
    middle = saved(tmp_path / "rollout-000004.ckpt", age=10)
    newest = saved(tmp_path / "rollout-000001.ckpt")
    assert latest_intact(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="skipping a checkpoint: .*rollout-000001"):
        assert latest_intact(tmp_path) == middle
    assert latest_intact(tmp_path, exclude=newest) == middle
    middle.unlink()
    assert latest_intact(tmp_path, exclude=newest) == old


def test_loading_a_damaged_checkpoint_offers_the_latest_intact_one(tmp_path: Path) -> None:
    good = saved(tmp_path / "rollout-000002.ckpt", age=10)
    bad = saved(tmp_path / "rollout-000004.ckpt")
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(DamagedCheckpointError, match=f"rollout-000004.*--ckpt_path {good}"):
        CheckedCheckpointIO().load_checkpoint(bad)
    good.unlink()
    with pytest.raises(DamagedCheckpointError, match="no other is in its folder"):
        CheckedCheckpointIO().load_checkpoint(bad)


def test_a_checkpoint_without_one_of_its_shards_is_damaged(tmp_path: Path) -> None:
    entries = write_shards(Ranks(), tmp_path / "rollout-000002.ckpt", {"replay": torch.ones(3)})
    assert torch.equal(read_shard(tmp_path, entries[0])["replay"], torch.ones(3))
    saved(tmp_path / "rollout-000002.ckpt", {"dblightning": {"ranks": entries}})
    assert latest_intact(tmp_path) is not None
    shard = tmp_path / entries[0]["shard"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="lacks its shard"):
        assert latest_intact(tmp_path) is None
    shard.unlink()
    with pytest.raises(DamagedCheckpointError, match="all of them see"):
        read_shard(tmp_path, entries[0])


def test_the_last_n_stay_and_their_shards(tmp_path: Path) -> None:
    for number in range(4):
        saved(tmp_path / f"rollout-{number:06d}.ckpt", age=10 - number)
        write_shards(Ranks(), tmp_path / f"rollout-{number:06d}.ckpt", {"number": number})
    other = saved(tmp_path / "before_nan_rewards.ckpt")
    remove_all_but(tmp_path, 2)
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"rollout-000002", "rollout-000003", other.stem}
    assert len(list(tmp_path.glob("*.shard"))) == 2


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"keep": 0}, {"every_n_rollouts": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            RunCheckpoint(**wrong)  # type: ignore[arg-type]


# ── whose it is ──────────────────────────────────────────────────────────────────────────────────────────────────────

FACTS = {"reward": "size", "rank": 4, "eta": 1.0, "target_modules": ["to_q"], "base": [0.5, 0.25], "latent_shape": [4]}


def test_a_checkpoint_of_the_same_run_is_taken() -> None:
    half_precision = FACTS | {"base": [0.500005, 0.25], "target_modules": ("to_q",)}
    check_same_run(FACTS, half_precision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "other"}, "trained on reward 'size'.*'other'"),
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"eta": 0.9995}, "eta was 1.0 and is 0.9995"),
        ({"target_modules": ["to_q", "to_k"]}, "target_modules was"),
        ({"base": [0.5, 0.26]}, "the base model differs"),
    ],
)
def test_a_checkpoint_that_means_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_same_run(FACTS, FACTS | change)


def test_scoring_a_checkpoint_may_sample_in_another_way() -> None:
    check_same_run(FACTS, FACTS | {"eta": 0.5}, adapter_only=True)
    with pytest.raises(ValueError, match="rank"):
        check_same_run(FACTS, FACTS | {"rank": 8}, adapter_only=True)


def test_changed_settings_are_named_with_both_values() -> None:
    then = {"learning_rate": 1e-5, "seed": 0, "rank": 4, "_class_path": "a"}
    now = {"learning_rate": 3e-5, "seed": 0, "rank": 8, "_class_path": "b", "new": 1}
    assert changed_settings(then, now, exclude=["adapter.rank"]) == {"optimisation.learning_rate": (1e-5, 3e-5)}


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_training_state_of_sd15_at_the_papers_settings_is_below_one_gigabyte() -> None:
    """LoRA and value function with gradients and AdamW moments, and the buffer, counted from shapes alone."""
    from diffusers import UNet2DConditionModel

    from dblightning.adapters import ATTENTION
    from dblightning.replay import ReplayBuffer
    from dblightning.value import ValueFunction

    with torch.device("meta"):
        unet = UNet2DConditionModel(  # SD 1.5's published configuration
            sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=768, attention_head_dim=8,
        )  # fmt: skip
        value = ValueFunction((4, 64, 64), 768, 50, 256)
        buffer = ReplayBuffer(1000 // 50, 50, (4, 64, 64), "meta")
    assert sum(each.numel() for each in unet.parameters()) == 859_520_964  # the published number of SD 1.5's weights
    adapted = [module for name, module in unet.named_modules() if name.endswith(tuple(ATTENTION))]
    assert len(adapted) == 16 * 2 * 4  # 16 transformer blocks, self and cross attention, q k v out
    lora = sum(4 * (module.in_features + module.out_features) for module in adapted)
    assert lora == 797_184
    trained = lora + sum(each.numel() for each in value.parameters())
    latents = buffer.latents.numel() + buffer.log_probs.numel() + buffer.facts.numel()
    megabytes = (4 * 4 * trained + 4 * latents) / 1e6  # weight, gradient, two moments; float32
    assert megabytes < 1000
    assert megabytes == pytest.approx(153, abs=1)  # what docs/cluster.md states
    # a checkpoint holds no gradients
    assert (3 * 4 * trained + 4 * latents) / 1e6 == pytest.approx(132, abs=1)


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 3}, [1, 2], {"weights": torch.zeros(2)}])
def test_a_checkpoint_of_another_program_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "foreign.ckpt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"foreign\.ckpt was not saved by a training run .*init_adapter"):
        CheckedCheckpointIO().load_checkpoint(file)
