"""Write each adapter in training as a diffusers LoRA folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import lightning as L

from dblightning.adapters import FORMS, Form
from dblightning.module import RewardRLModule


class ExportAdapter(L.Callback):
    """Export the LoRA at the end of the fit, and every ``every_n_epochs`` epochs.

    Plain diffusers reads the folder: ``pipe.load_lora_weights(folder)``. Its metadata holds the command that made it.
    See docs/adapters.md for what loads which format; ``python -m dblightning convert`` writes the others later.

    Args:
        folder: where it goes; None takes ``adapter/<name>`` under the run's log directory. The adapters of a basis go
            to ``<folder>/<name>``, one folder each.
        every_n_epochs: also export in between, to ``<folder>-epoch<N>``; 0 only at the end.
        format: "diffusers" (``pytorch_lora_weights.safetensors``), "kohya" (``<name>.safetensors``, for ComfyUI and
            A1111) or "peft" (``adapter_model.safetensors`` and ``adapter_config.json``).

    A ``fast_dev_run`` exports nothing.

    Raises:
        ValueError: another format.
    """

    def __init__(self, folder: str | None = None, every_n_epochs: int = 0, format: Form = "diffusers") -> None:
        if format not in FORMS:
            raise ValueError(f"format must be one of {FORMS}, got {format!r}")
        self.format = format
        self.folder = folder
        self.every_n_epochs = every_n_epochs

    def _folders(self, trainer: L.Trainer, module: RewardRLModule) -> dict[str, str]:
        """Where each adapter goes."""
        logs = Path(trainer.log_dir or trainer.default_root_dir) / "adapter"
        alone = len(module.adapter_names) == 1 and self.folder is not None
        return {name: str(Path(self.folder or logs) / ("" if alone else name)) for name in module.adapter_names}

    def _export(self, trainer: L.Trainer, module: RewardRLModule, suffix: str = "") -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        facts = {"rollouts": module.rollouts_done, "command": "python -m dblightning " + shlex.join(sys.argv[1:])}
        for name, folder in self._folders(trainer, module).items():
            path = module.export_adapter(folder + suffix, self.format, name, **facts)
            if not suffix:
                print(f"LoRA exported to {path}")

    def outputs(self, trainer: L.Trainer, module: L.LightningModule) -> dict[Path, list[Path]]:
        """Files the export would replace, for ``RunGuard``."""
        assert isinstance(module, RewardRLModule)
        found = {}
        for folder in map(Path, self._folders(trainer, module).values()):
            between = sorted(folder.parent.glob(f"{folder.name}-epoch*")) if self.every_n_epochs else []
            found[folder] = [file for place in (folder, *between) for file in sorted(place.glob("*.safetensors"))]
        return found

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RewardRLModule)
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self._export(trainer, pl_module, f"-epoch{epoch}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RewardRLModule)
        self._export(trainer, pl_module)
