"""Names of Lightning that are not public stand in one file, and the installed Lightning still has them."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

import dblightning
from dblightning.lightning_internals import attached_trainer, collective_timeout, logged_step

PACKAGE = Path(dblightning.__file__).parent
INTERNALS = PACKAGE / "lightning_internals.py"


def private_names(tree: ast.AST) -> set[str]:
    """Names with one leading underscore that are read or set on an object, `getattr(x, "_name")` too."""
    names = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("attr"):
            names |= {
                each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module gives to functions, classes, fields and attributes of its objects."""
    names = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(each.name)
        elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            names.add(each.attr)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            names.add(each.target.id)
    return names


def live_objects() -> list[object]:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.test_loop]
    connectors = [getattr(trainer, name) for name in vars(trainer) if name.endswith("_connector")]
    modules = [L.LightningModule(), L.LightningDataModule(), L.Callback(), DDPStrategy(), trainer.strategy]
    return [trainer, *loops, *connectors, *modules]


def lightning_names() -> set[str]:
    """Private names of Lightning's objects, without those that every torch module has."""
    return {name for each in live_objects() for name in dir(each) if name[0] == "_"} - set(dir(torch.nn.Module()))


def test_the_installed_lightning_has_every_private_name_that_is_used() -> None:
    used = private_names(ast.parse(INTERNALS.read_text(encoding="utf-8")))
    assert used >= {"_trainer", "_timeout", "_batches_that_stepped", "_logger_connector", "_first_loop_iter"}
    assert used <= lightning_names()
    connector = L.Trainer(accelerator="cpu", logger=False)._logger_connector
    assert callable(connector.on_batch_end) and callable(connector.update_train_step_metrics)


def test_no_other_file_touches_a_private_name_of_lightning() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if path != INTERNALS}
    own = set().union(*map(own_names, trees.values()))
    theirs = lightning_names() - own
    found = {str(path.relative_to(PACKAGE)): private_names(tree) & theirs for path, tree in trees.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_module_has_a_trainer_only_while_one_runs_it() -> None:
    module = L.LightningModule()
    assert attached_trainer(module) is None
    trainer = module.trainer = L.Trainer(accelerator="cpu", logger=False)
    assert attached_trainer(module) is trainer
    assert logged_step(trainer) == 0


@pytest.mark.parametrize("seconds", [90, 1800])
def test_the_timeout_is_the_strategys(seconds: int) -> None:
    assert collective_timeout(DDPStrategy(timeout=timedelta(seconds=seconds))) == timedelta(seconds=seconds)
    assert collective_timeout(SingleDeviceStrategy(torch.device("cpu"))) is None
