"""The measurements of ``gpu.py``: each function is one part, which runs in a process of its own.

A part calls ``keep`` with all its rows after each of them, so that what was measured survives a crash or a time limit.
An out-of-memory or another error of one row is a row with an "error", and the part goes on.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from benchmarks import inference, memory
from benchmarks.gpu_models import MODELS, backbone_of, conditioning_of, pipeline_of, size_of
from benchmarks.inference import Brightness, PeakMemory
from benchmarks.kl_precision import weaken
from dblightning.data import MiniatureDataModule
from dblightning.module import RewardRLModule
from dblightning.noise import ImageNoise
from dblightning.replay import Transitions
from dblightning.sampling import denoise_loop
from dblightning.solvers import solver_of

Row = dict[str, Any]


@dataclass
class Job:
    """What a part is told.

    ``seconds``: begin no further repetition after so long. ``settings``: the part's own, see ``gpu.PARTS``.
    """

    model: str
    device: str
    tiny: bool
    seconds: float
    settings: dict[str, Any]
    keep: Callable[[list[Row]], None]

    def __post_init__(self) -> None:
        self.start, self.rows = time.monotonic(), list[Row]()

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() - self.start > self.seconds

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.keep(self.rows)

    def attempt(self, labels: Row, work: Callable[[], Row]) -> Row:
        """The labels with what ``work`` measured, or with its error; added to the rows."""
        try:
            found = work()
        except (torch.OutOfMemoryError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            found = {"error": error_line(error)}
        free()
        self.add({**labels, **found})
        return self.rows[-1]


def error_line(error: BaseException) -> str:
    """An exception in one line of at most 160 letters."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(device: str, work: Callable[[], Any]) -> float:
    """Wall seconds of ``work``, the device's included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def allocated_mb(device: str) -> float:
    """What the device's tensors take now; resident memory on a CPU."""
    return torch.cuda.memory_allocated(device) / 1e6 if device.startswith("cuda") else memory.resident("VmRSS")


# ── inference ────────────────────────────────────────────────────────────────────────────────────────────────────────


def generator_of(pair: Any, job: Job, batch: int, steps: int) -> Callable[..., Any]:
    """A function that makes a batch of latents with a method of ``inference.methods``."""
    settings = argparse.Namespace(candidates=4, block_size=max(1, steps // 2))
    chosen, model = inference.methods(settings), MODELS[job.model]
    conditioning = conditioning_of(pair[1], job.model, batch, job.tiny)
    solver = solver_of(pair[1], steps, model.eta)

    @torch.no_grad()
    def generate(method: str) -> Any:
        return denoise_loop(
            pair[0] if method == "base" else pair[1], conditioning, solver,
            noise=ImageNoise(list(range(batch)), job.device), guidance_scale=model.guidance_scale,
            prompts=[""] * batch, **chosen[method],
        )  # fmt: skip

    return generate


def speed(job: Job) -> None:
    """Seconds per image by method and batch, and of decoding; the first pass over the methods warms up.

    Latents alone: neither text encoding nor the last decoding count; CoDe's and RGG's own decoding does.
    """
    pair = inference.pair_of(
        pipeline_of(job.model, torch.bfloat16, job.device, job.tiny), size_of(job.model, job.tiny).resolution
    )
    steps = job.settings["steps"]
    share = job.seconds / len(job.settings["batches"])
    for place, batch in enumerate(job.settings["batches"]):
        generate, seconds = generator_of(pair, job, batch, steps), dict[str, list[float]]()
        known: dict[str, Row] = {}
        for repeat in range(job.settings["repeats"] + 1):
            if repeat > 1 and time.monotonic() - job.start > (place + 1) * share:
                break
            for method in job.settings["methods"]:
                if "error" in known.get(method, {}):
                    continue
                if method not in known:
                    labels = {"what": "sampling", "batch": batch, "steps": steps, "method": method}
                    known[method] = job.attempt(labels, partial(first_pass, job, generate, method))
                    continue
                seconds.setdefault(method, []).append(timed(job.device, partial(generate, method)))
                known[method] |= {
                    "seconds_per_image": statistics.median(seconds[method]) / batch,
                    "repeats": len(seconds[method]),
                }
                job.keep(job.rows)
        decoding = torch.randn(batch, *pair[0].latent_shape, device=job.device)
        job.attempt({"what": "decoding", "batch": batch}, partial(decode, job, pair[0], decoding))


def first_pass(job: Job, generate: Callable[[str], Any], method: str) -> Row:
    """The pass that warms up: its peak, and its seconds where no other pass follows (``repeats`` 0)."""
    with PeakMemory(job.device) as peak:
        start = time.perf_counter()
        latents = generate(method)
        synchronize(job.device)
        seconds = time.perf_counter() - start
    finite = bool(latents.isfinite().all())
    return {"seconds_per_image": seconds / len(latents), "repeats": 0, "peak_mb": peak.peak, "finite": finite}


@torch.no_grad()
def decode(job: Job, backbone: Any, latents: Any) -> Row:
    with PeakMemory(job.device) as peak:
        backbone.decode(latents)
        seconds = timed(job.device, lambda: backbone.decode(latents))
    return {"seconds_per_image": seconds / len(latents), "repeats": 1, "peak_mb": peak.peak}


def compiled(job: Job) -> None:
    """``compile: blocks`` against none: the first call's seconds, and seconds per image after it."""
    batch, steps = job.settings["batch"], job.settings["steps"]
    resolution = size_of(job.model, job.tiny).resolution
    for what in ("none", "blocks"):
        pair = inference.pair_of(pipeline_of(job.model, torch.bfloat16, job.device, job.tiny), resolution)
        # Inductor needs a compiler and minutes; the dry run checks all but its code generation
        options = {"backend": "eager"} if job.tiny else {}
        for backbone in pair:
            backbone.compile_denoiser(what, **options)
        generate = generator_of(pair, job, batch, steps)
        for method in job.settings["methods"]:
            labels = {"compile": what, "batch": batch, "steps": steps, "method": method}
            job.attempt(labels, partial(first_and_later, job, partial(generate, method), batch))
        del pair, generate
        free()


def first_and_later(job: Job, work: Callable[[], Any], batch: int) -> Row:
    first = timed(job.device, work)
    later = [timed(job.device, work) for _ in range(job.settings["repeats"])]
    return {"first_call_s": first, "seconds_per_image": statistics.median(later) / batch}


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def module_of(job: Job, dtype: torch.dtype, **changed: Any) -> RewardRLModule:
    """A policy-gradient module on random weights; every stored transition is trained on once per rollout."""
    model, given = MODELS[job.model], job.settings
    backbone = backbone_of(job.model, dtype, job.device, job.tiny)
    micro_batch = given.get("micro_batch", 1)
    groups: dict[str, Any] = dict(
        sampling=dict(num_inference_steps=given["steps"], guidance_scale=model.guidance_scale, eta=model.eta),
        optimisation=dict(epochs=1, batch_size=micro_batch, accumulation=8, learning_rate=1e-4),
        kl=dict(weight=0.1), advantage=dict(baseline="prompt"), replay=dict(buffer_size=None),
    )  # fmt: skip
    module = RewardRLModule(backbone, Brightness(), **{**groups, **changed}, validate_first=False)
    module.prompts = {0: "a red circle"}
    return module


class Stopwatch(L.Callback):
    """Seconds of each round, and the interconnect's speed before the first where there are several processes."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.gigabytes_per_second = job, list[float](), 0.0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if dist.is_initialized():
            self.gigabytes_per_second = all_reduce_speed(self.job, str(module.device))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        synchronize(str(module.device))
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        synchronize(str(module.device))
        self.seconds.append(time.perf_counter() - self.start)


def all_reduce_speed(job: Job, device: str) -> float:
    """GB of float32 summed over all processes per second: the buffer's bytes over the seconds of one all-reduce."""
    buffer = torch.ones((1 << 16) if job.tiny else (1 << 26), device=device)
    dist.all_reduce(buffer)
    return buffer.nbytes / 1e9 / min(timed(device, lambda: dist.all_reduce(buffer)) for _ in range(5))


def fit(job: Job, kl: dict[str, Any], devices: int = 1) -> Row:
    """Rounds of ``RewardRLModule`` under Lightning: images per second of the best round after the first."""
    given, watch = job.settings, Stopwatch(job)
    module = module_of(job, torch.bfloat16, kl=kl)
    if given["checkpointing"]:
        module.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
    before = trained_weights(module)
    data = MiniatureDataModule(
        batch_size=given["images"], samples_per_prompt=2, rollouts_per_epoch=given["rounds"] * devices
    )
    trainer = L.Trainer(
        accelerator="cuda" if job.device.startswith("cuda") else "cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0,
        limit_train_batches=given["rounds"], callbacks=[watch], default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    with PeakMemory(job.device) as peak:
        trainer.fit(module, datamodule=data)
    moved = float((trained_weights(module).to(before.device) - before).abs().max())
    rounds = watch.seconds[1:] or watch.seconds
    row = {
        "images_per_second": trainer.world_size * given["images"] / min(rounds),
        "rounds": watch.seconds, "images": trainer.world_size * given["images"], "steps": given["steps"],
        "peak_mb": peak.peak, "largest_change": moved,
    }  # fmt: skip
    if devices > 1:
        row |= {"all_reduce_gb_per_s": watch.gigabytes_per_second, "backend": dist.get_backend()}
    return row


def trained_weights(module: RewardRLModule) -> torch.Tensor:
    parameters = module.backbone.adapters.parameters(module.adapter_name)
    return torch.cat([each.detach().flatten().clone() for each in parameters])


def training(job: Job) -> None:
    """Images per second of rounds of training, without the KL, with it, and with it on a quarter of the transitions."""
    for name, kl in job.settings["kl"].items():
        labels = {
            "kl": name,
            "micro_batch": job.settings["micro_batch"],
            "checkpointing": job.settings["checkpointing"],
        }
        job.attempt(labels, partial(fit, job, kl))


def ranks(job: Job) -> None:
    """The first row of :func:`training` on two devices: NCCL on GPUs, gloo in the dry run."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if job.device == "cuda":
        job.device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    name, kl = next(iter(job.settings["kl"].items()))
    if rank > 0:
        fit(job, kl, devices=2)
    else:
        job.attempt({"kl": name, "processes": 2}, partial(fit, job, kl, 2))


def update_memory(job: Job) -> None:
    """Peak memory of one policy update by micro-batch, plain and checkpointed, until the device is full."""
    module = module_of(job, torch.bfloat16)
    module.train()
    model_mb = allocated_mb(job.device)
    for checkpointing in (False, True):
        if checkpointing:
            module.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
        for micro_batch in job.settings["micro_batches"]:
            labels = {"checkpointing": checkpointing, "micro_batch": micro_batch, "model_mb": model_mb}
            row = job.attempt(labels, partial(one_update, job, module, micro_batch))
            if "error" in row or job.time_is_up:
                break


def one_update(job: Job, module: RewardRLModule, micro_batch: int) -> Row:
    transitions, before = memory.random_transitions(module, micro_batch), allocated_mb(job.device)
    with PeakMemory(job.device) as peak:
        seconds = timed(job.device, lambda: module.policy_loss(transitions)[0].backward())
    gradients = [weight.grad for weight in module.backbone.adapters.parameters(module.adapter_name)]
    finite = all(each is not None and bool(each.isfinite().all()) for each in gradients)
    module.zero_grad()
    return {"peak_mb": peak.peak, "update_mb": peak.peak - before, "seconds": seconds, "finite": finite}


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def kl_floor(job: Job) -> None:
    """The path KL that half precision reads, against float32 arithmetic on the same weights; see ``kl_precision.py``.

    For adapters weakened by each of ``strengths``: where the two readings part, rounding is what is read.
    """
    for dtype in (torch.bfloat16, torch.float16):
        module = module_of(job, dtype, optimisation=dict(epochs=1, batch_size=1, reward_weight=1e-30))
        generator = torch.Generator().manual_seed(0)
        full = [each.detach().clone() for each in module.backbone.adapters.parameters(module.adapter_name)]
        for each in full[1::2]:  # A, B, A, B, …; B is zero in a new adapter
            each.copy_(0.02 * torch.randn(each.shape, generator=generator))
        drawn = memory.random_transitions(module, job.settings["transitions"])
        # over the whole schedule, but for a flow's last step, which has no density
        last = module.solver.trainable - 1
        transitions = drawn._replace(step_index=torch.linspace(0, last, len(drawn.reward)).long())
        for strength in job.settings["strengths"]:
            weaken(module, full, strength)
            labels = {"dtype": str(dtype).removeprefix("torch."), "strength": strength}
            job.attempt(labels, partial(both_readings, module, transitions))
        del module
        free()


@torch.no_grad()
def both_readings(module: RewardRLModule, transitions: Transitions) -> Row:
    row = {}
    for precision in ("model", "float32"):
        module.kl.settings = replace(module.kl.settings, precision=precision)
        _, metrics = module.policy_loss(transitions)
        row[f"{precision}_kl"] = float(metrics["train/kl"])
    return row


KINDS: dict[str, Callable[[Job], None]] = {
    "inference": speed, "training": training, "memory": update_memory, "kl": kl_floor, "compile": compiled,
    "ranks": ranks,
}  # fmt: skip
