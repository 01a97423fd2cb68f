"""The record of an evaluation, what images and scores were made with, and where two of them contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: settings of rewards that no score depends on, or that are nobody else's business (``headers`` may hold a token)
INTERNAL = frozenset(
    {
        "training", "compute_on_cpu", "dist_sync_on_step", "sync_on_compute", "compute_with_cache",  # torchmetrics
        "micro_batch_size", "timeout", "retries", "backoff", "patience", "headers", "token_env", "ca_file", "trust_env",
        "cache", "concurrency", "max_requests",  # a judge's
    }
)  # fmt: skip


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Contradictions between two descriptions of an evaluation: (dotted name, value before, value now).

    A name that one of them alone has is of another version of this package and contradicts nothing, except a reward's.
    """
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield path, before, now
        return
    if path == "rewards" and set(before) != set(now):
        yield path, ", ".join(before) or "none", ", ".join(now) or "none"
        return
    for name in before:
        if name in now and name not in INTERNAL:
            yield from differences(before[name], now[name], f"{path}.{name}" if path else name)
