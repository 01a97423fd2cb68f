"""BlendEvaluationModule: ``predict`` writes images of blends, ``test`` scores them and draws the Pareto picture."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from dblightning import __version__
from dblightning.backbone import Backbone
from dblightning.blending import Base, Blend, make_blend
from dblightning.evaluation.scores import summarize
from dblightning.figures import blend_grid_figure, pareto_figure
from dblightning.rewards.base import RewardMetric
from dblightning.sampling import DDIMSolver, ImageNoise, Steering, denoise_loop
from dblightning.schedule import DDIMSchedule
from dblightning.steering import STEERING, make_steering


@dataclass
class BlendSpec:
    """One method with its preference.

    Args:
        method: base, single, db-mpa, db-kla, db-mpa-ls, rewarded-soup, rewarded-soup-factors, code or rgg.
        weights: adapter → weight, each ≥ 0, sum 1; none for base. For code and rgg: reward → weight.
        kl_scale: λ of DB-KLA; 1 is plain.
        ls_schedule: "iid" or "systematic", for db-mpa-ls.
        options: further arguments of ``steering.CoDe`` or ``steering.RGG``, for code and rgg.
    """

    method: str = "db-mpa"
    weights: dict[str, float] = field(default_factory=dict)
    kl_scale: float = 1.0
    ls_schedule: str = "iid"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steers(self) -> bool:
        """Whether the method bends the base model's steps, and its weights name rewards."""
        return self.method in STEERING

    def blend(self) -> Blend:
        """The blend it names; raises ValueError where method, weights and kl_scale do not fit."""
        if self.steers:
            return Base()
        return make_blend(self.method, self.weights or None, self.kl_scale, ls_schedule=self.ls_schedule)

    @property
    def label(self) -> str:
        """A short name, usable as a folder's: db-mpa_aesthetic-0.3_alignment-0.7."""
        parts = [self.method, *(f"{name}-{weight:g}" for name, weight in sorted(self.weights.items()) if weight)]
        parts += [f"lambda-{self.kl_scale:g}"] if self.kl_scale != 1 else []
        parts += [self.ls_schedule] if self.ls_schedule != "iid" else []
        parts += [f"{name}-{value}" for name, value in sorted(self.options.items())]
        return "_".join(parts)


class BlendEvaluationModule(L.LightningModule):
    """Generate with a base model and exported adapters.

    Every blend gets the same noise for the same prompt and seed (common random numbers), so methods are compared image
    by image.

    Args:
        backbone: the base model.
        adapters: name → folder of an exported LoRA. The miniature's shipped ones are added when the backbone is the
            miniature, under their own names, unless a name is given here.
        blends: methods and weights to run.
        rewards: name → reward, for ``test`` (the first two are the Pareto picture's axes), and for code and rgg.
        num_inference_steps, eta, guidance_scale, negative_prompt: sampling settings.
        seed: of the noise.
        out: folder for what is written.
        grid_prompts: prompts shown in ``test``'s image grid.

    Raises:
        ValueError, FileNotFoundError: adapters or blends that do not fit, before anything is sampled.
    """

    def __init__(
        self,
        backbone: Backbone,
        blends: list[BlendSpec],
        adapters: dict[str, str] | None = None,
        rewards: dict[str, RewardMetric] | None = None,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        seed: int = 0,
        out: str = "runs/blend",
        grid_prompts: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "rewards"])
        if not blends:
            raise ValueError("blends is empty: name at least one method, for example {method: base}")
        self.backbone = backbone
        self.blends = blends
        self.rewards = nn.ModuleDict(rewards or {})
        self.out = Path(out)
        self.grid_prompts = grid_prompts
        self.adapter_facts = self._load_adapters(adapters or {})
        self.solver = DDIMSolver(DDIMSchedule(backbone.scheduler_config, num_inference_steps), eta)
        for blend in blends:  # wrong weights stop here, not after an hour of sampling
            blend.blend().start(backbone.adapters.names, 1, num_inference_steps)
            self._steering(blend)
        self.rows: list[dict[str, Any]] = []
        self.shown: dict[tuple[int, int], Tensor] = {}  # (blend, prompt_id) → image, for the grid

    def _load_adapters(self, adapters: dict[str, str]) -> dict[str, Any]:
        folders: dict[str, Path] = {name: Path(folder) for name, folder in adapters.items()}
        wanted = {name for blend in self.blends if not blend.steers for name in blend.weights}
        if getattr(self.backbone, "pretrained", None) == "miniature":
            from dblightning import miniature

            folders = {name: path for name, path in miniature.adapters().items() if name in wanted} | folders
        pipeline = getattr(self.backbone, "pipeline", None)
        return {
            name: {"path": str(folder), **self.backbone.adapters.load(name, folder, pipeline)}
            for name, folder in folders.items()
        }

    def _steering(self, blend: BlendSpec) -> Steering | None:
        if not blend.steers:
            return None
        rewards: dict[str, Any] = dict(self.rewards.items())
        return make_steering(blend.method, rewards, blend.weights or None, **blend.options)

    @torch.no_grad()
    def generate(self, batch: dict[str, Any], blend: BlendSpec) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a prompt batch."""
        hparams = self.hparams
        ids, seeds = batch["prompt_id"].tolist(), batch["seed"].tolist()
        noise = ImageNoise.of(hparams["seed"], ids, seeds, self.device, stream="evaluation")
        latents = denoise_loop(
            self.backbone,
            self.backbone.encode(batch["prompt"], hparams["negative_prompt"]),
            self.solver,
            blend.blend(),
            noise,
            hparams["guidance_scale"],
            steering=self._steering(blend),
            prompts=batch["prompt"],
        )
        return self.backbone.decode(latents)

    # ── predict ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write every image of the batch, for every blend, with a JSON record of what made it."""
        for blend in self.blends:
            folder = self.out / blend.label
            folder.mkdir(parents=True, exist_ok=True)
            images = self.generate(batch, blend).cpu()
            for index, prompt in enumerate(batch["prompt"]):
                prompt_id, seed = int(batch["prompt_id"][index]), int(batch["seed"][index])
                slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
                name = f"{prompt_id:05d}-{slug}-{seed}"
                to_pil_image(images[index]).save(folder / f"{name}.png")
                record = {"prompt": prompt, "prompt_id": prompt_id, "seed": seed, **asdict(blend), **self.record()}
                (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def on_predict_end(self) -> None:
        if self.trainer.is_global_zero:
            print(f"images and their records: {self.out}")

    def record(self) -> dict[str, Any]:
        """What made the images, apart from prompt and blend: models, sampling settings, versions, command."""
        hparams = self.hparams
        names = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt")
        packages = ("torch", "diffusers", "peft", "transformers")
        return {
            "base": getattr(self.backbone, "pretrained", type(self.backbone).__name__),
            "adapters": self.adapter_facts,
            **{name: hparams[name] for name in names},
            "run_seed": hparams["seed"],
            "versions": {"dblightning": __version__} | {name: importlib.metadata.version(name) for name in packages},
            "command": "python -m dblightning " + shlex.join(sys.argv[1:]),
        }

    # ── test ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_test_start(self) -> None:
        if not self.rewards:
            raise ValueError("test needs rewards to score with; set --model.rewards")
        self.rows, self.shown = [], {}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score every image of the batch, for every blend."""
        for index, blend in enumerate(self.blends):
            start = time.perf_counter()
            images = self.generate(batch, blend)
            seconds = (time.perf_counter() - start) / len(images)
            scores = {
                name: reward.score(images, batch["prompt"]).tolist()  # type: ignore[operator]
                for name, reward in self.rewards.items()
            }
            for row, prompt in enumerate(batch["prompt"]):
                prompt_id, seed = int(batch["prompt_id"][row]), int(batch["seed"][row])
                fact = {"method": blend.method, "blend": blend.label, "kl_scale": blend.kl_scale, "order": index}
                fact |= {f"weight/{name}": weight for name, weight in blend.weights.items()}
                fact |= {"prompt_id": prompt_id, "prompt": prompt, "seed": seed, "seconds": seconds}
                self.rows.append(fact | {name: values[row] for name, values in scores.items()})
                if prompt_id < self.grid_prompts and seed == 0:
                    self.shown[index, prompt_id] = images[row].cpu()

    def on_test_end(self) -> None:
        """Write ``scores.parquet``, ``summary.csv``, ``pareto.png`` and ``grid.png``."""
        parts: list[Any] = [(self.rows, self.shown)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.rows, self.shown))
        if not self.trainer.is_global_zero:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        scores = pd.DataFrame([row for rows, _ in parts for row in rows])
        scores = scores.sort_values(["order", "prompt_id", "seed"], ignore_index=True)
        scores.to_parquet(self.out / "scores.parquet")
        names = list(self.rewards)
        summary = summarize(scores, names)
        summary.to_csv(self.out / "summary.csv", index=False, float_format="%.4f")
        (self.out / "record.json").write_text(json.dumps(self.record(), indent=2) + "\n", encoding="utf-8")
        print(summary.to_string(index=False, float_format="{:.3f}".format))
        figures = {"grid": self._grid({key: image for _, shown in parts for key, image in shown.items()}, scores)}
        if len(names) > 1:
            figures["pareto"] = pareto_figure(self._points(summary, names), names[0], names[1])
        for name, figure in figures.items():
            figure.savefig(self.out / f"{name}.png", dpi=150)
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(name, figure)
        print(f"scores, summary and figures: {self.out}")

    def _points(self, summary: pd.DataFrame, names: list[str]) -> pd.DataFrame:
        first = next((name for blend in self.blends for name in blend.weights), None)
        points = summary.copy()
        points["label"] = [
            f"w={blend.weights.get(first, 0):g}" + (f" λ={blend.kl_scale:g}" if blend.kl_scale != 1 else "")
            if first and blend.weights
            else blend.method
            for blend in (self.blends[order] for order in points["order"])
        ]
        return points

    def _grid(self, shown: dict[tuple[int, int], Tensor], scores: pd.DataFrame) -> Any:
        prompt_ids = sorted({prompt_id for _, prompt_id in shown})
        prompts = dict(zip(scores["prompt_id"], scores["prompt"], strict=True))
        images = torch.stack(
            [torch.stack([shown[index, each] for index in range(len(self.blends))]) for each in prompt_ids]
        )
        titles = [blend.label.replace("_", "\n") for blend in self.blends]
        return blend_grid_figure(images, titles, [prompts[prompt_id] for prompt_id in prompt_ids])
