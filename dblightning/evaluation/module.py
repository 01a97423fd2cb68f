"""BlendEvaluationModule: ``predict`` writes images of blends, ``test`` scores them and writes the report."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm import tqdm

from dblightning import __version__
from dblightning.backbone import Backbone
from dblightning.distributed import Ranks
from dblightning.evaluation.report import print_summary, write_report
from dblightning.evaluation.sampler import BlendSampler, load_adapters
from dblightning.evaluation.specs import BlendSpec, BlendSweep, expand
from dblightning.evaluation.store import Key, RowStore, keys_of
from dblightning.evaluation.table import write_scores
from dblightning.figures import blend_grid_figure
from dblightning.rewards.base import RewardMetric


class BlendEvaluationModule(L.LightningModule):
    """Generate with a base model and exported adapters, and score what comes out.

    Every blend gets the same noise for the same prompt and seed (common random numbers), so methods are compared image
    by image. ``test`` keeps every row as soon as it is made, in ``<out>/rows``: the same command, run again after it
    was stopped or killed, goes on where it was; with more blends, prompts or seeds it makes only what is new.

    Args:
        backbone: the base model.
        blends: methods and weights to run, one by one.
        sweeps: methods × weights × λ to run after them.
        adapters: name → folder of an exported LoRA. The miniature's shipped ones are added when the backbone is the
            miniature, under their own names, unless a name is given here.
        rewards: name → reward, for ``test``, and for code and rgg. Those a preference names are its axes; the others
            show what a method does to rewards nobody asked for.
        num_inference_steps, eta, guidance_scale, negative_prompt: sampling settings.
        seed: of the noise.
        out: folder for what is written.
        grid_prompts: prompts whose first image is kept, for the report's image grid.

    Raises:
        ValueError, FileNotFoundError: adapters or blends that do not fit, before anything is sampled.
    """

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "rewards"])
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
        )
        self.sampler.check(self.blends)  # wrong weights stop here, not after an hour of sampling
        self.store = RowStore(self.out / "rows")
        self.done: set[Key] = set()
        self.visited: list[tuple[int, int]] = []  # (prompt_id, seed) of this evaluation, on this rank

    # ── predict ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write every image of the batch, for every blend, with a JSON record of what made it."""
        for spec in self.blends:
            folder = self.out / spec.label
            folder.mkdir(parents=True, exist_ok=True)
            images = self.sampler.generate(batch, spec).cpu()
            for index, prompt in enumerate(batch["prompt"]):
                prompt_id, seed = int(batch["prompt_id"][index]), int(batch["seed"][index])
                slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
                name = f"{prompt_id:05d}-{slug}-{seed}"
                to_pil_image(images[index]).save(folder / f"{name}.png")
                record = {"prompt": prompt, "prompt_id": prompt_id, "seed": seed, **asdict(spec), **self.record()}
                (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def on_predict_end(self) -> None:
        if self.trainer.is_global_zero:
            print(f"images and their records: {self.out}")

    def settings(self) -> dict[str, Any]:
        """What an image and its scores depend on, apart from prompt, seed and blend."""
        names = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt")
        return {
            "base": getattr(self.backbone, "pretrained", type(self.backbone).__name__),
            **{name: self.hparams[name] for name in names},
            "run_seed": self.hparams["seed"],
            "rewards": {name: _description(reward) for name, reward in self.rewards.items()},
        }

    def record(self) -> dict[str, Any]:
        """What made the images: settings, adapters, versions, command."""
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
        digests = {name: facts["sha256"] for name, facts in self.adapter_facts.items()}
        if trainer.is_global_zero:  # the others read what rank 0 wrote
            self.done = self.store.open(self.settings())
            self._keep_adapters(digests)
        trainer.strategy.barrier("evaluation settings")
        if not trainer.is_global_zero:
            self.done = self.store.open(self.settings(), trainer.global_rank)
        self.visited = []
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()  # it counts batches; below, images of every blend are counted
        keys = getattr(trainer.test_dataloaders, "keys", None)  # of this rank
        self._bar = tqdm(
            total=None if keys is None else len(keys) * len(self.blends),
            unit="image",
            smoothing=0,  # the mean speed, because methods differ in theirs
            disable=not trainer.is_global_zero,
            dynamic_ncols=True,
        )

    def _keep_adapters(self, digests: dict[str, str]) -> None:
        """Rows made with other weights under an adapter's name would be mixed with new ones: refuse."""
        path = self.store.folder / "adapters.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
        if changed:
            raise ValueError(
                f"{self.store.folder} holds rows of another adapter {changed[0]!r} (its file has changed); "
                "set another --model.out, or delete the folder"
            )
        path.write_text(json.dumps(before | digests, indent=2) + "\n", encoding="utf-8")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score every image of the batch, for every blend that has not been scored on it."""
        self.visited += [(prompt_id, seed) for _, prompt_id, seed in keys_of(batch, "")]
        for spec in self.blends:
            keys = keys_of(batch, spec.label)
            if not self.done.issuperset(keys):
                # the whole batch, also where a part is there: so a resumed run computes what an unbroken one does
                scored = self.sampler.score(batch, spec)
                self._keep_images(scored.images, batch, spec)
                self.store.append(scored.rows)
                self.done.update(keys)
            self._bar.update(len(keys))

    def _keep_images(self, images: Tensor, batch: dict[str, Any], spec: BlendSpec) -> None:
        for index, (_, prompt_id, seed) in enumerate(keys_of(batch, spec.label)):
            if prompt_id < self.grid_prompts and seed == 0:
                folder = self.out / "images" / spec.label
                folder.mkdir(parents=True, exist_ok=True)
                to_pil_image(images[index].cpu()).save(folder / f"{prompt_id}-{seed}.png")

    def on_test_end(self) -> None:
        """Write the score table, and the report and tables made from it."""
        self._bar.close()
        self.store.close()
        visited = Ranks().gather(self.visited)
        if not self.trainer.is_global_zero:
            return
        scores = self.table({pair for pairs in visited for pair in pairs})
        path = self.out / "scores.parquet"
        write_scores(path, scores, self.record())
        write_report(path, self.out, self.out / "images")
        self._save_grid(scores)
        print_summary(scores)
        print(f"scores, tables and report.html: {self.out}")

    def _save_grid(self, scores: pd.DataFrame) -> None:
        """``grid.png``: the kept images, one row per prompt and one column per blend."""
        prompts = dict(zip(scores["prompt_id"], scores["prompt"], strict=True))
        files = {
            (spec.label, each): self.out / "images" / spec.label / f"{each}-0.png"
            for spec in self.blends
            for each in sorted(prompts)[: self.grid_prompts]
        }
        shown = [each for each in prompts if all((spec.label, each) in files for spec in self.blends)]
        if not shown or not all(file.exists() for file in files.values()):
            return
        rows = [torch.stack([to_tensor(Image.open(files[spec.label, each])) for spec in self.blends]) for each in shown]
        titles = [spec.label.replace("_", "\n") for spec in self.blends]
        figure = blend_grid_figure(torch.stack(rows), titles, [prompts[each] for each in shown])
        figure.savefig(self.out / "grid.png", dpi=150)

    def table(self, images: set[tuple[int, int]]) -> pd.DataFrame:
        """The score table of this evaluation's blends on (prompt_id, seed) pairs, one row per image."""
        order = {spec.label: index for index, spec in enumerate(self.blends)}
        rows = [
            row | {"order": order[row["blend"]]}
            for row in self.store.read()
            if row["blend"] in order and (row["prompt_id"], row["seed"]) in images
        ]
        columns: Sequence[str] = list(dict.fromkeys(name for row in rows for name in row))
        first = ["order", *(name for name in columns if name != "order")]
        return pd.DataFrame(rows, columns=first).sort_values(["order", "prompt_id", "seed"], ignore_index=True)


def _description(reward: Any) -> dict[str, Any]:
    """A reward's class and plain settings."""
    plain = {name: value for name, value in vars(reward).items() if isinstance(value, str | int | float | bool)}
    settings = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    return {"class": type(reward).__name__, "name": reward.name, **settings}
