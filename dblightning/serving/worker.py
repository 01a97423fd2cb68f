"""A worker process: one pipeline, batches of jobs with a preference each."""

from __future__ import annotations

import io
import logging
import queue
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from dblightning.extras import importing
from dblightning.serving.settings import ServiceSettings
from dblightning.shared_pipeline import Job, SharedPipeline

with importing("serve", "serve"):
    import litserve
    from litserve.loops.base import _SENTINEL_VALUE, _StopLoopError
    from litserve.loops.simple_loops import BatchedLoop
    from litserve.utils import LitAPIStatus, LoopResponseType

_log = logging.getLogger("dblightning.serving")


class Answer(NamedTuple):
    """What a worker made of one job."""

    png: bytes  # empty where there is an error
    batch: int  # images that were made together
    status: int = 200
    sentence: str = ""


class PatientLoop(BatchedLoop):
    """LitServe's batched loop, which sleeps until there is a request; the original asks a thousand times a second."""

    def get_batch_requests(
        self, lit_api: Any, request_queue: Any, transport: Any
    ) -> tuple[list[tuple[int, str, Job]], list[tuple[int, str]]]:
        batch: list[tuple[int, str, Job]] = []
        late: list[tuple[int, str]] = []
        end = None
        while len(batch) < lit_api.max_batch_size:
            wait = 1.0 if end is None else end - time.monotonic()
            try:
                item = request_queue.get(timeout=wait) if wait > 0 else request_queue.get_nowait()
            except queue.Empty:
                break
            if item == _SENTINEL_VALUE:
                raise _StopLoopError()
            consumer, uid, since, job = item
            kind = LoopResponseType.REGULAR
            self.put_response(transport, consumer, uid, (), LitAPIStatus.START, kind)
            end = end or time.monotonic() + lit_api.batch_timeout
            if time.monotonic() - since > lit_api.request_timeout:
                late.append((consumer, uid))
            else:
                batch.append((consumer, uid, job))
        return batch, late


class Worker(litserve.LitAPI):
    """A worker: one pipeline, batches of jobs.

    Args:
        settings: what it loads, and how large its batches are.
        spec: the server process's side.
    """

    def __init__(self, settings: ServiceSettings, spec: Any) -> None:
        super().__init__(
            max_batch_size=settings.max_batch_size, batch_timeout=settings.batch_wait, spec=spec, loop=PatientLoop()
        )
        self.settings = settings

    def authorize(self) -> None:
        """Open to LitServe; the endpoints check the token, and answer in OpenAI's form."""

    def setup(self, device: str) -> None:
        import diffusers.utils.logging
        import torch
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        settings = self.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.shared = SharedPipeline.load(
            settings.base, settings.adapters, device, settings.dtype, max_rows=settings.max_rows
        )

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, jobs: Sequence[Job]) -> list[Answer]:
        """An answer per job; one that cannot be made takes no other with it."""
        answers: dict[int, Answer] = {}
        for index, job in enumerate(jobs):
            try:
                self.shared.check(job)
            except (TypeError, ValueError) as error:
                answers[index] = Answer(b"", 1, 400, str(error))
        left = [index for index in range(len(jobs)) if index not in answers]
        for members in self.shared.groups([jobs[index] for index in left]).values():
            indices = [left[member] for member in members]
            answers |= dict(zip(indices, self._made([jobs[index] for index in indices]), strict=True))
        return [answers[index] for index in range(len(jobs))]

    def _made(self, jobs: Sequence[Job]) -> list[Answer]:
        try:
            return [Answer(_png(image), len(jobs)) for image in self.shared.make(jobs)]
        except (TypeError, ValueError) as error:
            return [Answer(b"", len(jobs), 400, str(error))] * len(jobs)
        except Exception:
            identifier = uuid.uuid4().hex[:8]
            _log.exception("batch %s failed", identifier)
            return [Answer(b"", len(jobs), 500, f"the model failed; see {identifier} in the server's log")] * len(jobs)

    def encode_response(self, output: Any) -> Any:
        return output


def _png(image: Any) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG of 8 bits a channel."""
    from PIL import Image

    levels = (image.nan_to_num(0.0).permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", compress_level=1)
    return file.getvalue()
