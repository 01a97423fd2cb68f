"""BlendEvaluationModule: ``predict`` writes images of blends, ``test`` scores them and writes the report."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import lightning as L
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor

from dblightning import __version__
from dblightning.backbone import Backbone
from dblightning.checkpointing import StopSignal
from dblightning.data.stream import EvalLoader
from dblightning.distributed import Ranks
from dblightning.evaluation.record import differences
from dblightning.evaluation.report import write_report
from dblightning.evaluation.sampler import BlendSampler, load_adapters, made_with
from dblightning.evaluation.scores import write_scores
from dblightning.evaluation.specs import BlendSpec, BlendSweep, expand
from dblightning.evaluation.store import REMEDY, Evaluation, Key, RowStore, key_of, keys_of
from dblightning.figures import blend_grid_figure
from dblightning.loggers import log_image, log_table
from dblightning.progress import image_progress
from dblightning.rewards.base import RewardMetric
from dblightning.settings import RULES, Number, check_settings, count


class ImageKey(NamedTuple):
    """One image of an evaluation, whatever the blend."""

    prompt_id: int
    prompt: str
    seed: int


class BlendEvaluationModule(L.LightningModule):
    """Generate with a base model and exported adapters, and score what comes out.

    Every blend gets the same noise for the same prompt and seed (common random numbers), so methods are compared image
    by image. ``test`` keeps every row as soon as it is made, in ``<out>/rows``: the same command, run again after it
    was stopped or killed, resumes; with more blends, prompts or seeds it makes only what is new. Rows of other
    settings, adapters, prompts or blends are refused by name, before anything is sampled or written.

    Args:
        backbone: the base model.
        blends: methods and weights to run, one by one.
        sweeps: methods × weights × λ to run after them.
        adapters: name → folder of an exported LoRA. The miniature's shipped ones are added when the backbone is the
            miniature, under their own names, unless a name is given here.
        rewards: name → reward, for ``test``, code, rgg and best-of-n. Those a preference names are its axes; the others
            show what a method does to rewards that nobody requested.
        num_inference_steps, eta, guidance_scale, negative_prompt: sampling settings.
        seed: of the noise.
        out: folder for what is written.
        grid_prompts: how many prompts' first image is kept, for the report's image grid; those that come first.
        noise: of a flow-matching model's steps where eta > 0: "flow_sde", "dance_sde" or "cps"; null is "cps".
        kl: measure each image's path KL to the base model beside its rewards: one denoiser row more per image and step.

    Raises:
        ValueError, FileNotFoundError: settings out of range, adapters or blends that do not fit, before anything is
            sampled.
    """

    #: numeric arguments and what they may be
    RULES: ClassVar[dict[str, Number]] = RULES | {
        "eta": Number(least=0, most=1, remedy="0 is deterministic DDIM (a flow's ODE), 1 is DDPM"),
        "grid_prompts": count(0),
    }

    def __init__(
        self,
        backbone: Backbone,
        blends: list[BlendSpec] | None = None,
        sweeps: list[BlendSweep] | None = None,
        adapters: dict[str, str] | None = None,
        rewards: dict[str, RewardMetric] | None = None,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        seed: int = 0,
        out: str = "runs/blend",
        grid_prompts: int = 4,
        noise: Literal["flow_sde", "dance_sde", "cps"] | None = None,
        kl: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "rewards"])
        check_settings(self.hparams, self.RULES)
        self.blends = expand(blends or [], sweeps or [])
        self.backbone = backbone
        self.rewards = nn.ModuleDict(rewards or {})
        self.out = Path(out)
        self.grid_prompts = grid_prompts
        self.adapter_facts = load_adapters(backbone, self.blends, adapters or {})
        self.sampler = BlendSampler(
            backbone,
            dict(self.rewards.items()),  # type: ignore[arg-type]
            num_inference_steps,
            eta,
            guidance_scale,
            negative_prompt,
            seed,
            noise,
            kl,
        )
        self.sampler.check(self.blends)  # wrong weights stop here, not after an hour of sampling
        self.sampler.check_adapters(self.blends)
        self.store = RowStore(self.out / "rows")
        self._stop = StopSignal()
        self.done: set[Key] = set()
        self.visited: list[ImageKey] = []  # of this evaluation, on this rank
        self._made_with: dict[str, Any] = {}

    # ── predict ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_predict_start(self) -> None:
        """Refuse to write over images that were made otherwise."""
        self._made_with = made_with(self.backbone, self.sampler.rewards)
        for spec in self.blends:
            for file in sorted((self.out / spec.label).glob("*.json"))[:1]:
                try:
                    before = json.loads(file.read_bytes())
                    found = list(differences(_essentials(before), _essentials(self._recorded(spec))))
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(f"{file} is not a record of an image ({error}); {REMEDY}") from error
                if found:
                    name, was, now = found[0]
                    raise ValueError(
                        f"{file.parent} holds images of another run: {name} was {was} and is {now}; {REMEDY}"
                    )
        self._stop.listen()

    def _recorded(self, spec: BlendSpec) -> dict[str, Any]:
        """The origin of a blend's images, as JSON has it."""
        blend = asdict(spec)
        del blend["exact_label"]
        return json.loads(json.dumps({**blend, **self.record()}))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write every image of the batch, for every blend, with a JSON record of what made it."""
        for spec in self.blends:
            images = self.sampler.generate(batch, spec).cpu()
            if self._dry_run:
                continue
            folder = self.out / spec.label
            folder.mkdir(parents=True, exist_ok=True)
            made = self._recorded(spec)
            for index, prompt in enumerate(batch["prompt"]):
                prompt_id, seed = int(batch["prompt_id"][index]), int(batch["seed"][index])
                slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
                name = f"{prompt_id:05d}-{slug}-{seed}"
                to_pil_image(images[index]).save(folder / f"{name}.png")
                record = {"prompt": prompt, "prompt_id": prompt_id, "seed": seed, **made}
                (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            self._stop.check(f"images so far are in {self.out}; the same command makes all of them")

    def on_predict_end(self) -> None:
        self._stop.release()
        if self.trainer.is_global_zero:
            print("fast_dev_run: nothing is written" if self._dry_run else f"images and their records: {self.out}")

    def settings(self) -> dict[str, Any]:
        """The settings an image and its scores depend on, beside prompt, seed and blend."""
        names = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt")
        return {
            "base": getattr(self.backbone, "pretrained", type(self.backbone).__name__),
            **{name: self.hparams[name] for name in names},
            **({} if self.hparams["noise"] is None else {"noise": self.hparams["noise"]}),
            "run_seed": self.hparams["seed"],
            "rewards": {name: _description(reward) for name, reward in self.rewards.items()},
            "made_with": self._made_with,
        }

    def record(self) -> dict[str, Any]:
        """The origin of the images: settings, adapters, versions, command."""
        packages = ("torch", "diffusers", "peft", "transformers")
        return {
            **self.settings(),
            "adapters": self.adapter_facts,
            "versions": {"dblightning": __version__} | {name: importlib.metadata.version(name) for name in packages},
            "command": "python -m dblightning " + shlex.join(sys.argv[1:]),
        }

    # ── test ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_test_start(self) -> None:
        if not self.rewards:
            raise ValueError("test needs rewards to score with; set --model.rewards")
        trainer = self.trainer
        loader = trainer.test_dataloaders
        prompts = loader.prompts if isinstance(loader, EvalLoader) else None
        self._made_with = made_with(self.backbone, self.sampler.rewards)
        evaluation = Evaluation(
            self.settings(),
            {name: facts["sha256"] for name, facts in self.adapter_facts.items()},
            self.blends,
            {} if prompts is None else dict(zip(prompts.prompt_ids, prompts.prompts, strict=True)),
            ["kl"] if self.sampler.kl else [],
        )
        self._shown = set(range(self.grid_prompts) if prompts is None else prompts.prompt_ids[: self.grid_prompts])
        self.done = set() if self._dry_run else self._open(evaluation)
        self.visited = []
        self._batches = 0
        images = self._expected_images()
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()  # it counts batches; below, images of every blend are counted
        self._total = None if images is None else images * len(self.blends)
        self._bar = image_progress(self._total, trainer.is_global_zero)
        self._stop.listen()

    def _open(self, evaluation: Evaluation) -> set[Key]:
        """Every rank checks before rank 0 writes, and the others write after it: a refusal leaves nothing behind."""
        trainer = self.trainer
        self.store.check(evaluation)
        trainer.strategy.barrier("rows checked")
        done = self.store.open(evaluation) if trainer.is_global_zero else set()
        trainer.strategy.barrier("rows opened")
        return done if trainer.is_global_zero else self.store.open(evaluation, trainer.global_rank)

    @property
    def _dry_run(self) -> bool:
        """Whether this is the trainer's ``fast_dev_run``, which tries everything and writes nothing."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def _expected_batches(self) -> float:
        """Batches this rank is to visit, ``limit_test_batches`` of them at most; infinite where nobody knows."""
        return sum(self.trainer.num_test_batches)

    def _expected_images(self) -> int | None:
        """Images this rank is to make with each blend; None where the loader does not say."""
        loader = self.trainer.test_dataloaders
        if not isinstance(loader, EvalLoader):
            return None
        return min(len(loader.keys), int(self._expected_batches()) * loader.batch_size)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score every image of the batch, for every blend that has not been scored on it."""
        for spec in self.blends:
            keys = keys_of(batch, spec)
            new = not self.done.issuperset(keys)
            if new:
                # the whole batch, also where a part is there: so a resumed run computes what an unbroken one does
                scored = self.sampler.score(batch, spec)
                if not self._dry_run:
                    self._keep_images(scored.images, batch, spec)
                    self.store.append(scored.rows)
                    self.done.update(keys)
            self._bar.update(len(keys), new)
            self._stop.check(f"the rows so far are in {self.store.folder}, and the same command resumes from them")
        self.visited += [ImageKey(key.prompt_id, key.prompt, key.seed) for key in keys]
        self._batches += 1

    def _keep_images(self, images: Tensor, batch: dict[str, Any], spec: BlendSpec) -> None:
        for index, key in enumerate(keys_of(batch, spec)):
            if key.prompt_id in self._shown and key.seed == 0:
                folder = self.out / "images" / spec.label
                folder.mkdir(parents=True, exist_ok=True)
                to_pil_image(images[index].cpu()).save(folder / f"{key.prompt_id}-{key.seed}.png")

    def on_test_end(self) -> None:
        """Write the score table, and the report and tables made from it; nothing where batches were left out."""
        self._stop.release()
        self._bar.close()
        self.store.close()
        total = None if self._expected_images() is None else len(self.trainer.test_dataloaders.keys)  # type: ignore[union-attr]
        stopped = math.isfinite(self._expected_batches()) and self._batches < self._expected_batches()
        parts = Ranks().gather((self.visited, stopped, total))
        if not self.trainer.is_global_zero:
            return
        images = {image for visited, _, _ in parts for image in visited}
        if self._dry_run:
            print(f"fast_dev_run: {len(images)} images scored with each of {len(self.blends)} blends, nothing written")
            return
        if any(interrupted for _, interrupted, _ in parts):
            print(f"interrupted: no table is written; the same command resumes from the rows in {self.store.folder}")
            return
        available = None if total is None else sum(each for _, _, each in parts)
        if available is not None and len(images) < available:
            print(f"limit_test_batches: {len(images)} of {available} images with each blend")
        scores = self.table(images)
        path = self.out / "scores.parquet"
        counted = {"images": {"scored": len(images), "available": available}}
        write_scores(path, scores, self.record() | counted | self._kl_record())
        written = write_report(path, self.out, self.out / "images", show=True)
        self._save_grid(scores)
        self._log_report()
        page = "report.html"
        if written[0].name == page:
            print(f"scores, tables and {page}: {self.out}")
        else:
            print(f"scores, tables and figures: {self.out}")
            print(f"for one page of them: pip install 'dblightning[report]' && python -m dblightning report {path}")

    def _log_report(self) -> None:
        """The report's pictures and tables, to the trainer's loggers where it has any."""
        for picture in ("grid.png", "pareto.png", "pareto_gains.png"):
            if self.trainer.loggers and (file := self.out / picture).is_file():
                log_image(self.trainer, f"test/{file.stem}", to_tensor(Image.open(file).convert("RGB")), 0)
        for file in sorted((self.out / "tables").glob("*.csv")) if self.trainer.loggers else ():
            log_table(self.trainer, f"test/{file.stem}", pd.read_csv(file, dtype=str).fillna(""), 0)

    def _kl_record(self) -> dict[str, Any]:
        """What the column of the KL is, and which blends have none."""
        if not self.sampler.kl:
            return {}
        none = {spec.label: reason for spec in self.blends if (reason := self.sampler.no_kl(spec)) is not None}
        return {"kl": {"what": "path KL to the base model along each image's own steps, nats", "none": none}}

    def _save_grid(self, scores: pd.DataFrame) -> None:
        """``grid.png``: the kept images, one row per prompt and one column per blend."""
        prompts = dict(zip(scores["prompt_id"], scores["prompt"], strict=True))
        files = {
            (spec.label, each): self.out / "images" / spec.label / f"{each}-0.png"
            for spec in self.blends
            for each in sorted(self._shown & set(prompts))
        }
        shown = [each for each in prompts if all((spec.label, each) in files for spec in self.blends)]
        if not shown or not all(file.exists() for file in files.values()):
            return
        rows = [torch.stack([to_tensor(Image.open(files[spec.label, each])) for spec in self.blends]) for each in shown]
        titles = [spec.label.replace("_", "\n") for spec in self.blends]
        figure = blend_grid_figure(torch.stack(rows), titles, [prompts[each] for each in shown])
        figure.savefig(self.out / "grid.png", dpi=150)

    def table(self, images: Collection[ImageKey]) -> pd.DataFrame:
        """The score table of this evaluation's blends on its images, one row per image and blend.

        Raises:
            RuntimeError: rows are missing; a part of a table is never given for the whole.
        """
        order = {spec.key: (index, spec.label) for index, spec in enumerate(self.blends)}
        rows = []
        for row in self.store.read():
            key = key_of(row)
            if key.blend in order and ImageKey(key.prompt_id, key.prompt, key.seed) in images:
                index, label = order[key.blend]
                rows.append(row | {"order": index, "blend": label})
        if len(rows) != len(images) * len(self.blends):
            raise RuntimeError(
                f"{self.store.folder} holds {len(rows)} of the {len(images) * len(self.blends)} rows of this "
                "evaluation; run the same command again, it makes what is missing"
            )
        columns: Sequence[str] = list(dict.fromkeys(name for row in rows for name in row))
        first = ["order", *(name for name in columns if name != "order")]
        return pd.DataFrame(rows, columns=first).sort_values(["order", "prompt_id", "seed"], ignore_index=True)


def _essentials(record: dict[str, Any]) -> dict[str, Any]:
    """The parts of an image's record that make it the image it is."""
    adapters = {name: facts["sha256"] for name, facts in record.get("adapters", {}).items()}
    other = ("adapters", "versions", "command", "prompt", "prompt_id", "seed", "rewards")
    return {name: value for name, value in record.items() if name not in other} | {"adapters": adapters}


def _description(reward: Any) -> dict[str, Any]:
    """A reward's class and plain settings."""
    plain = {name: value for name, value in vars(reward).items() if isinstance(value, str | int | float | bool)}
    settings = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    return {"class": type(reward).__name__, "name": reward.name, **settings}
