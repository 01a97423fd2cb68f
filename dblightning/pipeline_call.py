"""One call of the pipeline: its settings while it runs, and the tensors that diffusers' callbacks see and change."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dblightning.backbone import Conditioning
from dblightning.prompt_cache import version


@dataclass
class CallSettings:
    """The settings of a running call, which a callback may read and (guidance, interrupt) change."""

    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    denoising_end: float | None = None
    num_timesteps: int = 0
    interrupt: bool = False
    embedded_guidance: bool = False  # the denoiser takes the scale as an input; there is no second pass
    has_negatives: bool = True  # whether guidance could be turned on

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs a second, unconditional pass."""
        return self.guidance_scale > 1 and not self.embedded_guidance


class RunningCalls:
    """The running calls of a pipeline, one per thread, and the last one that ended.

    A callback runs in its call's thread, so it reads and changes its own call. A thread without a call (a user
    interface that stops the work) changes all that run.
    """

    def __init__(self) -> None:
        self._running: dict[int, CallSettings] = {}
        self._last = CallSettings()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has no running calls
        return RunningCalls, ()

    def start(self, call: CallSettings) -> CallSettings | None:
        """Make ``call`` this thread's; returns the one around it, if a callback calls the pipeline again."""
        before = self._running.get(threading.get_ident())
        self._running[threading.get_ident()] = call
        return before

    def end(self, before: CallSettings | None) -> None:
        """This thread's call has ended; ``before`` resumes."""
        self._last = self._running.pop(threading.get_ident())
        if before is not None:
            self._running[threading.get_ident()] = before

    def get(self) -> CallSettings:
        """This thread's call; else one that runs; else the last one."""
        own = self._running.get(threading.get_ident())
        return own or next(iter(list(self._running.values())), self._last)

    def set(self, name: str, value: Any) -> None:
        """Change a setting of this thread's call; of all running ones, or the last, in a thread without one."""
        own = self._running.get(threading.get_ident())
        for call in [own] if own is not None else list(self._running.values()) or [self._last]:
            setattr(call, name, value)


class CallbackTensors:
    """A call's conditioning in the form in which diffusers' callbacks know it.

    With guidance on, ``prompt_embeds``, ``add_text_embeds`` and ``add_time_ids`` hold the unconditional rows and then
    the conditional ones, (2B, …), as in diffusers' loop; with guidance off the conditional rows alone.
    """

    def __init__(self, conditioning: Conditioning, guided: bool) -> None:
        self.conditioning = conditioning
        both = conditioning.guided() if guided else conditioning
        held = {
            "prompt_embeds": both.prompt_embeds,
            "negative_prompt_embeds": conditioning.negative_prompt_embeds,
        }
        if both.added is None:
            held["pooled_prompt_embeds"] = both.pooled
        else:
            held["add_text_embeds"] = both.pooled
            held |= {f"add_{name}": part for name, part in both.added.items()}
        self.held = held
        self._seen = {name: _mark(tensor) for name, tensor in held.items()}

    def taken(self, returned: Mapping[str, Any]) -> Conditioning | None:
        """The conditioning after a callback, or None if it changed nothing (by returning a tensor or in place).

        A tensor may come back with 2B rows, with B (the conditional ones), or with one row for all images. Diffusers'
        own cut-off callbacks return the last row alone: then each image keeps its own.

        Raises:
            ValueError: another number of rows.
        """
        places = {
            "prompt_embeds": ("negative_prompt_embeds", "prompt_embeds"),
            "add_text_embeds": ("negative_pooled", "pooled"),
            "pooled_prompt_embeds": ("negative_pooled", "pooled"),
        }
        changes: dict[str, Any] = {}
        added: dict[str, dict[str, Tensor]] = {}
        for name, given in self.held.items():
            value = returned.get(name, given)
            if value is given and _unchanged(value, self._seen[name]):
                continue
            if name in places or name == "negative_prompt_embeds":
                changes |= self._rows(name, value, given, *places.get(name, ("", "negative_prompt_embeds")))
            else:
                for place, rows in self._rows(name, value, given, "negative_added", "added").items():
                    added.setdefault(place, {})[name.removeprefix("add_")] = rows
            self.held[name], self._seen[name] = value, _mark(value)
        for place, parts in added.items():
            changes[place] = {**(getattr(self.conditioning, place) or self.conditioning.added or {}), **parts}
        if not changes:
            return None
        self.conditioning = self.conditioning._replace(**changes)
        return self.conditioning

    def _rows(self, name: str, value: Tensor, given: Tensor, negative: str, positive: str) -> dict[str, Tensor]:
        batch = len(self.conditioning.prompt_embeds)
        if negative and len(value) == 2 * batch:
            return {negative: value[:batch], positive: value[batch:]}
        if len(value) == batch:
            return {positive: value}
        if len(value) != 1:
            raise ValueError(
                f"a callback returned {name} with {len(value)} rows; for {batch} images it has {2 * batch} rows with "
                f"guidance (unconditional first), {batch} without, or 1 for all"
            )
        if torch.equal(value, given[-1:]):
            return {}
        return {positive: value.expand(batch, *value.shape[1:])}


def _mark(tensor: Tensor) -> int | Tensor:
    """A mark that a change in place shows by; in inference mode torch does not count changes, so a copy."""
    return tensor.clone() if tensor.is_inference() else version(tensor)


def _unchanged(tensor: Tensor, mark: int | Tensor) -> bool:
    return torch.equal(tensor, mark) if isinstance(mark, Tensor) else version(tensor) == mark
