"""BlendSamplingCallback: watch blends of the adapters in training, and of others, while training runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dblightning.adapters import WEIGHTS_NAME
from dblightning.data.base import PromptDataModule
from dblightning.data.stream import EvalLoader
from dblightning.evaluation.analysis import estimate
from dblightning.evaluation.plots import pareto_figure
from dblightning.evaluation.sampler import BlendSampler, adapter_folders, load_adapters
from dblightning.evaluation.scores import preference_rewards, reward_names, weight_names, with_defaults, write_scores
from dblightning.evaluation.specs import BlendSpec, BlendSweep, expand
from dblightning.figures import blend_grid_figure
from dblightning.loggers import log_image, log_table
from dblightning.module import RewardRLModule
from dblightning.rewards.base import RewardMetric


class BlendSamplingCallback(L.Callback):
    """Sample and score blends every so often: which preference would the adapters serve if training stopped now.

    Blends name the adapters in training by their own names, and others by the names in ``adapters`` or ``watch``.
    Training is left as it was to the last bit: the noise comes from generators of its own, other adapters are loaded
    for an evaluation and taken out after it, and nothing is kept on the device in between.

    Scores go to the loggers (``blend/<reward>/<blend>``), with an image grid and the Pareto picture, and as a score
    table per evaluation to ``out``; ``python -m dblightning report`` reads those.

    Args:
        blends, sweeps: what to sample, as in ``BlendEvaluationModule``.
        adapters: name → folder of an exported LoRA; the miniature's shipped ones are there by themselves.
        watch: a folder whose subfolders hold exported LoRAs (``<name>/`` or ``<name>/adapter/``), written perhaps by
            other runs; each evaluation takes what is there by then, dots in names read as underscores (``morl_0.2`` is
            morl_0_2). A blend waits while an adapter of it is missing.
        rewards: name → reward to score with, beside the module's own and its ``eval_rewards``.
        data: prompts, those of its val loader's split; None takes the run's DataModule.
        num_prompts: how many of them, taken as the DataModule's limits take them.
        seeds: images per prompt.
        batch_size: images per rank and batch.
        every_n_rollouts, every_n_epochs: how often; one of them.
        num_inference_steps, eta, guidance_scale, noise: sampling settings; None takes the module's.
        seed: of the noise.
        max_share: largest share of the run's time spent here; an evaluation that would pass it waits for the next turn.
            None is no limit.
        grid_prompts: rows of the image grid.
        out: folder of the score tables; None is ``blend_sampling`` in the logger's folder.
        pictures: write the latest image grid and Pareto picture into ``out`` too, ``images.png`` and ``pareto.png``.

    Raises:
        ValueError: settings out of range, or blends that cannot work; before training starts. A blend that an adapter
            found later by ``watch`` cannot be blended by, such as factors of several ranks, is left out and said so.
    """

    def __init__(
        self,
        blends: list[BlendSpec] | None = None,
        sweeps: list[BlendSweep] | None = None,
        adapters: dict[str, str] | None = None,
        watch: str | None = None,
        rewards: dict[str, RewardMetric] | None = None,
        data: PromptDataModule | None = None,
        num_prompts: int = 16,
        seeds: int = 1,
        batch_size: int = 16,
        every_n_rollouts: int | None = None,
        every_n_epochs: int | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        max_share: float | None = 0.25,
        grid_prompts: int = 4,
        out: str | None = None,
        noise: Literal["flow_sde", "dance_sde", "cps"] | None = None,
        pictures: bool = False,
    ) -> None:
        every = every_n_rollouts if every_n_rollouts is not None else every_n_epochs
        if (every_n_rollouts is None) == (every_n_epochs is None) or every is None or every < 1:
            raise ValueError(
                "set every_n_rollouts or every_n_epochs, one of them and at least 1, "
                f"got {every_n_rollouts} and {every_n_epochs}"
            )
        for name, value in {"num_prompts": num_prompts, "seeds": seeds, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_share is not None and not 0 < max_share < 1:
            raise ValueError(f"max_share must lie between 0 and 1, or be null for no limit, got {max_share}")
        self.blends = expand(blends or [], sweeps or [])
        self.adapters = dict(adapters or {})
        self.watch = None if watch is None else Path(watch)
        self.rewards = nn.ModuleDict(rewards or {})
        self.data = data
        self.num_prompts, self.seeds, self.batch_size = num_prompts, seeds, batch_size
        self.every_n_rollouts, self.every_n_epochs = every_n_rollouts, every_n_epochs
        self.sampling = {
            "num_inference_steps": num_inference_steps, "eta": eta, "guidance_scale": guidance_scale, "noise": noise
        }  # fmt: skip
        self.seed = seed
        self.max_share = max_share
        self.grid_prompts = grid_prompts
        self.out = out
        self.pictures = pictures
        self._spent = self._last = 0.0  # seconds
        self._announced: set[str] = set()

    # ── when ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RewardRLModule)
        sampler = self._sampler(pl_module)
        sampler.check(self.blends)  # wrong settings stop here, not at the first evaluation
        known = {*pl_module.adapter_names, *self._folders(pl_module)}
        missing = sorted({name for spec in self.blends for name in spec.adapters} - known)
        if missing and self.watch is None:
            raise ValueError(
                f"a blend runs adapter {missing[0]!r}, but there are {sorted(known)}; add its folder to adapters, "
                "or set watch to the folder where it will appear"
            )
        ready = [spec for spec in self.blends if known.issuperset(spec.adapters)]
        with self._temporary_adapters(pl_module, ready):
            sampler.check_adapters(ready)
        self._prompts(trainer)
        self._started = time.monotonic()
        self._spent = self._last = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RewardRLModule)
        if self.every_n_rollouts is not None and pl_module.rollouts_done % self.every_n_rollouts == 0:
            self._run(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RewardRLModule)
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._run(trainer, pl_module)

    def _affordable(self) -> bool:
        """Whether another evaluation as long as the last one stays within ``max_share`` of the time."""
        if self.max_share is None or self._last == 0:
            return True
        elapsed = time.monotonic() - self._started
        return self._spent + self._last <= self.max_share * (elapsed + self._last)

    def _run(self, trainer: L.Trainer, module: RewardRLModule) -> None:
        if not trainer.strategy.broadcast(self._affordable()):  # ranks' clocks differ; rank 0's counts
            return
        start = time.monotonic()
        scores, grids = self.evaluate(trainer, module)
        folder = self._folder(trainer)  # the ranks agree on it
        if scores is not None:
            self._write(trainer, module, folder, scores, grids)
        self._last = time.monotonic() - start
        self._spent += self._last

    # ── what ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(
        self, trainer: L.Trainer, module: RewardRLModule
    ) -> tuple[pd.DataFrame | None, dict[tuple[str, int], Tensor]]:
        """Sample and score every blend whose adapters are there, on this rank's share of the prompts.

        Returns:
            The score table of all ranks (None on other ranks than 0, or where nothing could run) and images (3, H, W)
            for the grid by (blend, prompt_id).
        """
        specs = self._ready(module)
        prompts = self._prompts(trainer)
        loader = EvalLoader(prompts, self.batch_size, self.seeds, trainer.global_rank, trainer.world_size)
        shown = set(prompts.prompt_ids[: self.grid_prompts])
        rows: list[dict[str, Any]] = []
        grids: dict[tuple[str, int], Tensor] = {}
        with module.average.applied(), self._temporary_adapters(module, specs), self._on_device(module.device):
            sampler = self._sampler(module)
            specs = self._workable(sampler, specs)
            for batch in loader:
                for order, spec in enumerate(specs):
                    scored = sampler.score(batch, spec)
                    rows += [{"order": order, **row} for row in scored.rows]
                    for row, image in zip(scored.rows, scored.images, strict=True):
                        if row["prompt_id"] in shown and row["seed"] == 0:
                            grids[row["blend"], row["prompt_id"]] = image.float().cpu()
        parts = module.ranks.gather((rows, grids))
        rows = [row for part, _ in parts for row in part]
        if not trainer.is_global_zero or not rows:
            return None, {}
        frame = pd.DataFrame(rows).sort_values(["order", "prompt_id", "seed"], ignore_index=True)
        return frame, {key: image for _, part in parts for key, image in part.items()}

    def _folders(self, module: RewardRLModule) -> dict[str, Path]:
        found: dict[str, str | Path] = {}
        if self.watch is not None and self.watch.is_dir():
            for folder in sorted(self.watch.iterdir()):
                for place in (folder, folder / "adapter"):
                    if (place / WEIGHTS_NAME).is_file():
                        found[folder.name.replace(".", "_")] = place  # adapters' names hold no dots
                        break
        return adapter_folders(module.backbone, {**found, **self.adapters})

    def _ready(self, module: RewardRLModule) -> list[BlendSpec]:
        known = {*module.adapter_names, *self._folders(module)}
        ready = [spec for spec in self.blends if known.issuperset(spec.adapters)]
        for spec in self.blends:
            if spec not in ready and spec.label not in self._announced:
                self._announced.add(spec.label)
                rank_zero_info(f"blend sampling: {spec.label} waits for {sorted(set(spec.adapters) - known)}")
        return ready

    def _workable(self, sampler: BlendSampler, specs: list[BlendSpec]) -> list[BlendSpec]:
        """Those whose loaded adapters go together: one that appeared since the start does not end the training."""
        found = []
        for spec in specs:
            try:
                sampler.check_adapters([spec])
            except ValueError as error:
                if str(error) not in self._announced:
                    self._announced.add(str(error))
                    rank_zero_info(f"blend sampling leaves out {error}")
            else:
                found.append(spec)
        return found

    def _prompts(self, trainer: L.Trainer) -> Any:
        data = self.data if self.data is not None else trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptDataModule):
            raise ValueError("blend sampling needs prompts: set data to a prompt DataModule")
        return data.limited(data.validation_set, self.num_prompts)

    def _sampler(self, module: RewardRLModule) -> BlendSampler:
        # of a basis each reward goes by its adapter's name, which blends weigh
        own: dict[str, Any] = {each.name if each.suffix else each.reward.name: each.reward for each in module.learners}
        own |= dict(module.eval_rewards.items())
        given = {name: value for name, value in self.sampling.items() if value is not None}
        settings: dict[str, Any] = {
            name: given.get(name, getattr(module.settings.sampling, name)) for name in self.sampling
        }
        return BlendSampler(
            backbone=module.backbone,
            rewards=own | dict(self.rewards.items()),
            negative_prompt=module.settings.sampling.negative_prompt,
            seed=self.seed,
            **settings,
        )

    @contextmanager
    def _temporary_adapters(self, module: RewardRLModule, specs: list[BlendSpec]) -> Iterator[None]:
        """The other adapters are in the denoiser inside, and it is as it was afterwards."""
        bank = module.backbone.adapters
        before = bank.names
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                load_adapters(module.backbone, specs, self._folders(module))
                yield
            finally:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Adapter .* was active")  # by PEFT; gates choose here
                    for name in [name for name in bank.names if name not in before]:
                        bank.remove(name)
                bank.drop_merged()
                bank.train_only(module.adapter_names)

    @contextmanager
    def _on_device(self, device: torch.device) -> Iterator[None]:
        self.rewards.to(device)
        try:
            yield
        finally:
            self.rewards.to("cpu")

    # ── where it goes ────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(
        self,
        trainer: L.Trainer,
        module: RewardRLModule,
        folder: Path,
        scores: pd.DataFrame,
        grids: dict[tuple[str, int], Tensor],
    ) -> None:
        step = module.rollouts_done
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        own = module.adapter_names
        trained = own if len(own) > 1 else own[0]
        record = {"adapter_in_training": trained, "rollouts": step, "images": module.images_done}
        write_scores(folder / f"rollout-{step:06d}.parquet", scores, record)
        names = reward_names(scores)
        means = scores.groupby("blend", sort=False)[[f"reward/{name}" for name in names]].mean()
        values = {f"blend/{name}/{label}": row[f"reward/{name}"] for label, row in means.iterrows() for name in names}
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        table = means.set_axis(names, axis=1).rename_axis("blend").reset_index()
        log_table(trainer, "blend/scores", table, step)
        for title, figure in self._figures(scores, grids).items():
            log_image(trainer, f"blend/{title}", figure, step)
            if self.pictures:
                figure.savefig(folder / f"{title}.png", dpi=150)
                print(f"blends after {step} rollouts: {folder / title}.png")

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.out or Path(trainer.log_dir or trainer.default_root_dir) / "blend_sampling")

    def outputs(self, trainer: L.Trainer, module: L.LightningModule) -> dict[Path, list[Path]]:
        """Files the score tables would replace, for ``RunGuard``."""
        folder = self._folder(trainer)
        return {folder: sorted(folder.glob("rollout-*.parquet"))}

    def _figures(self, scores: pd.DataFrame, grids: dict[tuple[str, int], Tensor]) -> dict[str, Any]:
        labels = list(dict.fromkeys(scores["blend"]))
        ids = sorted({prompt_id for _, prompt_id in grids})
        prompts = dict(zip(scores["prompt_id"], scores["prompt"], strict=True))
        figures: dict[str, Any] = {}
        if ids:
            images = torch.stack([torch.stack([grids[label, each] for label in labels]) for each in ids])
            titles = [label.replace("_", "\n") for label in labels]
            figures["images"] = blend_grid_figure(images, titles, [prompts[each] for each in ids])
        measured = reward_names(scores)
        # an adapter whose name is not a measured reward still belongs in the picture
        scores = scores.drop(columns=[f"weight/{name}" for name in weight_names(scores) if name not in measured])
        weighed = preference_rewards(scores)
        axes = weighed if len(weighed) > 1 else measured[:2]
        if len(axes) > 1 and weight_names(scores):
            figures["pareto"] = pareto_figure(estimate(with_defaults(scores), samples=200), axes)
        return figures
