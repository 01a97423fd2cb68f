"""Checkpoint files: written whole or not at all, checked by a digest, found again.

A checkpoint file is what ``torch.save`` writes, followed by a digest of it; ``torch.load`` reads it as it is. With
several processes each writes its replay buffer and random state to a shard beside the file, which names them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dblightning.distributed import Ranks
from dblightning.whole_files import replacing

MARK = b"dblightning sha256 "
FOOTER = len(MARK) + hashlib.sha256().digest_size


class DamagedCheckpointError(ValueError):
    """A file that is cut short, altered or without one of its shards."""


def serialized(state: Any) -> bytes:
    """``state`` as ``torch.save`` writes it, and its digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    return body + MARK + hashlib.sha256(body).digest()


def write_atomically(data: bytes, path: str | Path) -> None:
    """Put ``data`` at ``path`` so that at any moment the old file or the new one is there, never a part.

    Raises:
        OSError: it could not be written, on a full disk for instance; what was at ``path`` before is untouched.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, aside), open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise OSError(
            error.errno,
            f"cannot save {path} ({len(data) / 1e6:.0f} MB): {reason}. Earlier checkpoints are untouched; "
            "make room, then resume with --ckpt_path auto",
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # and the rename itself
    finally:
        os.close(folder)


def read_intact(path: str | Path) -> Any:
    """Content of a file of :func:`write_atomically` or :func:`serialized`, on the CPU; a plain ``torch.save`` file too.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: the file is cut short or altered.
    """
    data = Path(path).read_bytes()
    body, footer = data[:-FOOTER], data[-FOOTER:]
    if not footer.startswith(MARK):
        body = data  # of another program, or cut short: then it has no table of contents and cannot be loaded
    elif hashlib.sha256(body).digest() != footer[len(MARK) :]:
        raise DamagedCheckpointError(f"{path} is damaged: its contents do not match its SHA-256 digest")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is not an intact checkpoint ({type(error).__name__}: {error})") from error


def check_ours(checkpoint: Any, name: str = "the checkpoint") -> None:
    """Refuse what no training run of this package saved.

    Raises:
        ValueError: naming the file and what to do.
    """
    if not isinstance(checkpoint, dict) or not {"dblightning", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"{name} was not saved by a training run of this package; give one of a run's checkpoints/*.ckpt, or start "
            "from an exported adapter (model.init_adapter)"
        )


def latest_intact(folder: str | Path, exclude: str | Path | None = None) -> Path | None:
    """The latest intact checkpoint of a folder, shards included; None where there is none.

    Args:
        folder: where to look for ``*.ckpt``.
        exclude: a file to leave out.
    """
    files = [file for file in Path(folder).glob("*.ckpt") if exclude is None or file != Path(exclude)]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            _check_shards(file, read_intact(file))
        except (OSError, DamagedCheckpointError) as error:
            warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
        else:
            return file
    return None


def _check_shards(file: Path, checkpoint: dict[str, Any]) -> None:
    """Every shard is there in full size; its digest is checked by the process that loads it."""
    for entry in checkpoint.get("dblightning", {}).get("ranks", ()):
        shard = file.parent / entry["shard"] if "shard" in entry else None
        if shard is not None and (not shard.exists() or shard.stat().st_size != entry["bytes"]):
            raise DamagedCheckpointError(f"{file} lacks its shard {shard.name}, or a part of it")


def write_shards(ranks: Ranks, path: str | Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Write this rank's state beside a checkpoint that is about to be written; returns the entries of all ranks.

    The name holds the digest's first digits, so the shards of a file at the same path are never written over.
    """
    with ranks.together("writing a checkpoint's shard"):
        data = serialized(state)
        name = f"{Path(path).stem}.rank{ranks.rank}.{data[-32:].hex()[:8]}.shard"
        write_atomically(data, Path(path).with_name(name))
    return ranks.gather({"shard": name, "bytes": len(data)})


def read_shard(folder: str | Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A rank's state from its entry in the checkpoint: itself, or what its shard in ``folder`` holds."""
    if "shard" not in entry:
        return entry
    try:
        state: dict[str, Any] = read_intact(Path(folder) / entry["shard"])
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"the checkpoint's shard {entry['shard']} is not in {folder}: copy the shards along with the checkpoint, "
            "and on several nodes save to a folder that all of them see"
        ) from error
    return state


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's file access through :func:`write_atomically` and :func:`read_intact`; remote addresses as before."""

    def __init__(self) -> None:
        self.held_back: list[Exception] | None = None

    @contextmanager
    def holding_errors_back(self) -> Iterator[list[Exception]]:
        """Errors of saving are collected: rank 0 alone writes, and must not leave the ranks' common save early."""
        self.held_back = []
        try:
            yield self.held_back
        finally:
            self.held_back = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            write_atomically(serialized(checkpoint), path)
        except Exception as error:
            if self.held_back is None:
                raise
            self.held_back.append(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint; its folder is noted in it, for the shards.

        Raises:
            DamagedCheckpointError: naming the latest intact checkpoint in the same folder.
            ValueError: a checkpoint of another program.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        try:
            checkpoint: dict[str, Any] = read_intact(path)
            check_ours(checkpoint, str(path))
            _check_shards(Path(path), checkpoint)
        except DamagedCheckpointError as error:
            other = latest_intact(Path(path).parent, exclude=path)
            advice = f"the latest intact one is {other}: --ckpt_path {other}" if other else "no other is in its folder"
            raise DamagedCheckpointError(f"{error}; {advice}") from error
        checkpoint["dblightning"]["folder"] = str(Path(path).parent)
        return checkpoint
