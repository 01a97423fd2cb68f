"""Settings of a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dblightning.serving.requests import Offer


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a service.

    Attributes:
        offer: adapters, presets and limits.
        base, adapters, dtype: what each worker loads; see :meth:`SharedPipeline.load`.
        accelerator: "auto", "cpu", "cuda" or "mps".
        devices: how many of them, or "auto".
        workers_per_device: processes on each, each with a pipeline of its own.
        max_batch_size: images of one batch.
        batch_wait: seconds a batch waits for more requests.
        queue_limit: images that may wait or be in the works; further requests are answered 429.
        timeout: seconds a request may take before it is answered 504.
        read_timeout: seconds its body may take to arrive.
        token: what clients send as "Authorization: Bearer …"; None lets everyone in.
        threads: torch threads of a worker; None is torch's own choice.
        max_rows: rows of a denoiser call.
    """

    offer: Offer
    base: str = "miniature"
    adapters: Mapping[str, str] | None = None
    dtype: str | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    workers_per_device: int = 1
    max_batch_size: int = 8
    batch_wait: float = 0.02
    queue_limit: int = 64
    timeout: float = 60.0
    read_timeout: float = 10.0
    token: str | None = field(default=None, repr=False)
    threads: int | None = None
    max_rows: int | None = None
