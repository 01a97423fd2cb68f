"""The service on LitServe: the server process checks and queues requests, workers make batches of images.

    client → server process: token, size, sense → waits for a slot → LitServe's queue → worker: one batch, many
    preferences → PNG → client

Requests wait in the server process, where those whose client has gone are dropped. LitServe's own queue never holds
more than two batches per worker.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import multiprocessing
import signal
import time
import uuid
from collections.abc import Sequence
from typing import Any

from dblightning.extras import importing
from dblightning.serving.metrics import Metrics
from dblightning.serving.requests import ImageRequest, Refusal, read_request
from dblightning.serving.settings import ServiceSettings
from dblightning.shared_pipeline import Job

with importing("serve", "serve"):
    import litserve
    import prometheus_client  # noqa: F401  (of Metrics)
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from litserve.specs.base import LitSpec
    from litserve.utils import LitAPIStatus, ResponseBufferItem

from dblightning.serving.worker import Answer, Worker

PATH = "/v1/images/generations"
#: batches per worker that LitServe's queue may hold: one that runs, one that is ready
BATCHES_AHEAD = 2
#: status that nobody reads: the client has closed the connection (nginx's number for it)
CLIENT_GONE = 499


class _Spec(LitSpec):
    """The server process's side: endpoints, queue, time-outs, token, metrics."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__()
        self.api_path = PATH
        self.settings = settings

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which needs nothing but the path."""
        return {"api_path": self.api_path, "_endpoints": [], "_server": None, "_max_batch_size": self._max_batch_size}

    def pre_setup(self, lit_api: Any) -> None:
        self.add_endpoint(PATH, self.generate, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.scrape, ["GET"])

    def open(self, workers: int) -> None:
        """Make the queue for a number of workers."""
        self.metrics = Metrics()
        self.slots = asyncio.Semaphore(workers * BATCHES_AHEAD * self.settings.max_batch_size)
        self.waiting = 0

    # ── endpoints ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: Request) -> Response:
        """``POST /v1/images/generations``."""
        begin = time.monotonic()
        try:
            self._authorise(request)
            body = await self._body(request)
            wanted = read_request(body, self.settings.offer, request.headers.get("accept", ""))
            answer = _response(wanted, await self._images(request, wanted.jobs))
        except Refusal as refusal:
            answer = _refused(refusal)
        self.metrics.request(answer.status_code, time.monotonic() - begin)
        return answer

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``: the base, its adapters and the presets."""
        try:
            self._authorise(request)
        except Refusal as refusal:
            return _refused(refusal)
        offer = self.settings.offer
        model = {"id": self.settings.base, "object": "model", "created": 0, "owned_by": "dblightning"}
        further = {"adapters": list(offer.adapters), "presets": list(offer.presets)}
        return JSONResponse({"object": "list", "data": [model | further]})

    async def scrape(self) -> Response:
        """``GET /metrics``, in Prometheus' text format."""
        return Response(self.metrics.text(self.waiting), media_type="text/plain; version=0.0.4")

    # ── a request's way ──────────────────────────────────────────────────────────────────────────────────────────────

    def _authorise(self, request: Request) -> None:
        token = self.settings.token
        if token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise Refusal(401, "this service needs its token; send it as Authorization: Bearer TOKEN")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than its limit allows."""
        limit = self.settings.offer.limits.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.read_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise Refusal(413, f"the request is longer than {limit} bytes")
        except TimeoutError as error:
            raise Refusal(408, f"the request took more than {self.settings.read_timeout:g} s to arrive") from error
        except Exception as error:
            if type(error).__name__ != "ClientDisconnect":
                raise
            raise Refusal(CLIENT_GONE, "the client has closed the connection") from error
        return bytes(body)

    async def _images(self, request: Request, jobs: Sequence[Job]) -> list[Answer]:
        """The jobs' answers, within the time-out and while the client is there."""
        settings = self.settings
        if self.waiting + len(jobs) > settings.queue_limit:
            raise Refusal(
                429, f"{self.waiting} images are waiting, the limit is {settings.queue_limit}; try again later"
            )
        tickets = [_Ticket(self, job) for job in jobs]
        answers = asyncio.gather(*(ticket.task for ticket in tickets))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waiting_for: set[asyncio.Future[Any]] = {answers, gone}
            await asyncio.wait(waiting_for, timeout=settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if gone.done():
                raise Refusal(CLIENT_GONE, "the client has closed the connection")
            raise Refusal(504, f"no image within {settings.timeout:g} s; try again later")
        finally:
            gone.cancel()
            for ticket in tickets:
                ticket.leave()
            answers.cancel()


class _Ticket:
    """One job's way through the queue.

    A job that waits for a slot can be taken back. One that a worker may have begun keeps its slot until the worker
    answers, whether or not anyone still wants the answer, so clients that come and go cannot overfill LitServe's queue.
    """

    def __init__(self, spec: _Spec, job: Job) -> None:
        self.spec = spec
        self.job = job
        self.submitted = False
        spec.waiting += 1
        self._work = asyncio.ensure_future(self._run())
        self._work.add_done_callback(self._ended)
        self.task = asyncio.shield(self._work)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if not self.submitted:
            self._work.cancel()

    def _ended(self, work: asyncio.Future[Answer]) -> None:
        self.spec.waiting -= 1
        if not work.cancelled():
            work.exception()  # looked at: asyncio complains about errors that nobody saw

    async def _run(self) -> Answer:
        spec = self.spec
        async with spec.slots:
            self.submitted = True
            uid = uuid.uuid4().hex
            item = ResponseBufferItem(event=asyncio.Event())
            spec.response_buffer[uid] = item
            try:
                spec.request_queue.put((spec.response_queue_id, uid, time.monotonic(), self.job))
                # a worker that died never answers
                async with asyncio.timeout(2 * spec.settings.timeout):
                    await item.event.wait()
            finally:
                del spec.response_buffer[uid]
        answer, status = item.response
        if status != LitAPIStatus.OK:
            raise Refusal(504, "the request waited too long; try again later")
        spec.metrics.image(answer.batch)
        if answer.sentence:
            raise Refusal(answer.status, answer.sentence)
        return Answer(*answer)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(wanted: ImageRequest, answers: Sequence[Answer]) -> Response:
    if wanted.as_png:
        headers = {"X-Seed": str(wanted.jobs[0].preset.seed)}
        return Response(answers[0].png, media_type="image/png", headers=headers)
    data = [
        {"b64_json": base64.b64encode(answer.png).decode(), "seed": job.preset.seed}
        for job, answer in zip(wanted.jobs, answers, strict=True)
    ]
    return JSONResponse({"created": int(time.time()), "output_format": "png", "data": data})


def _refused(refusal: Refusal) -> Response:
    """A refusal in OpenAI's form."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(refusal.status)
    error = {"message": refusal.sentence, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, refusal.status, headers)


def serve(settings: ServiceSettings, host: str = "127.0.0.1", port: int = 8000, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: of the service.
        host: "127.0.0.1", "0.0.0.0" or "::" (LitServe's choice).
        port: 1024 … 65535.
        log_level: of LitServe and uvicorn.

    Raises:
        RuntimeError: no worker could load the model.
    """
    spec = _Spec(settings)
    server = litserve.LitServer(
        Worker(settings, spec),
        accelerator=settings.accelerator,
        devices=settings.devices,
        workers_per_device=settings.workers_per_device,
        timeout=settings.timeout,
        model_metadata={"base": settings.base, "adapters": list(settings.offer.adapters)},
        disable_openapi_url=True,
        restart_workers=True,
    )
    spec.open(len(server.devices) * settings.workers_per_device)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        print(f"loading {settings.base} on {', '.join(map(str, server.devices))}", flush=True)
        # one server process: the queue's limit and the metrics are of the whole service
        server.run(
            host, port, num_api_servers=1, log_level=log_level, generate_client_file=False, access_log=False,
            timeout_keep_alive=30,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in getattr(server, "inference_workers", []):
            if worker.is_alive():
                worker.terminate()


def _interrupt(number: int, frame: Any) -> None:
    """End by LitServe's own way out; in the server process, which inherits this, quietly."""
    if multiprocessing.parent_process() is None:
        raise KeyboardInterrupt
    raise SystemExit
