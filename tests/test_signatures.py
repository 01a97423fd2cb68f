from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from dblightning.signatures import NotFound, Unknowable, alias, argument_docs, group, signature


@pytest.mark.parametrize(
    "path",
    [
        "dblightning.RewardRLModule",
        "dblightning.evaluation.module.BlendEvaluationModule",
        "dblightning.data.PromptFileDataModule",
        "dblightning.backbone.DiffusersBackbone",
        "dblightning.rewards.PickScore",
        "dblightning.rewards.WeightedReward",
        "dblightning.checkpointing.RunCheckpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.trainer.trainer.Trainer",
    ],
)
def test_a_signature_read_from_source_is_the_one_python_sees(path: str) -> None:
    import importlib

    module, _, name = path.rpartition(".")
    seen = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    wanted = {
        name: each.default is inspect.Parameter.empty
        for name, each in seen.items()
        if name != "self" and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    read = signature(path).parameters
    assert {name: read[name].default is None for name in wanted} == wanted


def test_arguments_of_base_classes_are_known_and_those_a_class_gives_itself_are_not() -> None:
    found = signature("dblightning.data.DrawBenchDataModule")
    assert "eval_batch_size" in found.parameters
    assert "train" not in found.parameters, "the class gives its base these prompts itself"
    assert not found.open


def test_every_setting_of_training_has_a_text() -> None:
    settings = list(signature("dblightning.RewardRLModule").parameters.values())
    groups = [found for each in settings if (found := group(each)) is not None]
    assert len(groups) == 7
    settings += [each for found in groups for each in found.parameters.values()]
    assert [each.name for each in settings if not each.doc] == []


def test_a_wrong_path_says_which_part_is_wrong() -> None:
    for path, part in [
        ("nowhere.Thing", "no module 'nowhere'"),
        ("dblightning.nowhere.Thing", "no module 'dblightning.nowhere'"),
        ("dblightning.rewards.PickScor", "has no 'PickScor'"),
    ]:
        with pytest.raises(NotFound, match=part):
            signature(path)
    with pytest.raises(Unknowable):
        signature("math.pi")


def test_aliases_are_followed_across_modules() -> None:
    found = alias("lightning.pytorch.trainer.trainer", "_PRECISION_INPUT")
    assert found is not None
    assert found[1] == "lightning.fabric.plugins.precision.utils" or "Union" in ast_text(found[0])


def ast_text(node: object) -> str:
    import ast

    return ast.unparse(node)  # type: ignore[arg-type]


def test_the_args_section_is_read_entry_by_entry() -> None:
    text = (
        "Title.\n\nArgs:\n    first: one\n        line more.\n    second, third: both.\n\nRaises:\n    ValueError: no."
    )
    assert argument_docs(text) == {"first": "one line more.", "second": "both.", "third": "both."}
    assert argument_docs("Title.") == {}


def test_help_and_refusals_import_neither_torch_nor_lightning() -> None:
    code = (
        "import sys\n"
        "from dblightning import cli\n"
        "sys.argv = ['dblightning', 'fit', '--help']; cli.main()\n"
        "sys.argv = ['dblightning', 'fit', '--config', 'nowhere.yaml']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 2, stop.code\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model.adapter.rank" in done.stdout and "MiniatureDataModule" in done.stdout
    assert done.stderr.startswith("error: config file nowhere.yaml does not exist")
