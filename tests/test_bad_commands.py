"""Wrong command lines end with one sentence, before anything is loaded or written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dblightning import cli

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "fit": "configs/quickstart.yaml",
    "test": "configs/eval/quickstart.yaml",
    "predict": "configs/eval/predict.yaml",
}

#: wrong for every command that runs Lightning; FILE stands for a file whose content follows
ANYWHERE: list[list[str]] = [
    ["--config", "nowhere.yaml"],
    ["--config", "."],
    ["--config", "FILE", "model: [unclosed"],
    ["--config", "FILE", "just a text"],
    ["--config", "FILE", "- a\n- list"],
    ["--config", "FILE", "modle: {rank: 4}"],
    ["--config", "FILE", "model: {backbone: {class_path: 3}}"],
    ["--config", "FILE", "model: 7"],
    ["--config", "FILE", "data: 7"],
    ["--config", "FILE", "trainer: nothing"],
    ["--config", "FILE", "\x00\x01"],
    ["--config"],
    ["--model.seed"],
    ["--model.seed", "one"],
    ["--model.seed", "1.5"],
    ["--model.seed", "null"],
    ["--model.sead", "1"],
    ["--modle.seed", "1"],
    ["--seed", "1"],
    ["stray"],
    ["-x", "1"],
    ["--", "model"],
    ["--model.num_inference_steps", "0"],
    ["--model.num_inference_steps", "-3"],
    ["--model.num_inference_steps", "2.5"],
    ["--model.num_inference_steps", "many"],
    ["--model.num_inference_steps", "1001"],
    ["--model.num_inference_steps", "[]"],
    ["--model.guidance_scale", ".nan"],
    ["--model.guidance_scale", ".inf"],
    ["--model.guidance_scale", "-1"],
    ["--model.guidance_scale", "high"],
    ["--model.guidance_scale", "true"],
    ["--model.eta", "often"],
    ["--model.eta", "null"],
    ["--model.negative_prompt", "[a, b]"],
    ["--model.backbone", "dblightning.backbone.Nothing"],
    ["--model.backbone", "dblightning.nothing.Backbone"],
    ["--model.backbone", "nothing.Backbone"],
    ["--model.backbone.init_args.dtype", "float8"],
    ["--model.backbone.init_args.pretrained", "./nowhere"],
    ["--model.backbone.init_args.pretrained", "/nowhere/at/all"],
    ["--model.backbone.init_args.resolution", "wide"],
    ["--model.backbone.init_args.gradient_checkpointing", "sometimes"],
    ["--model.backbone.init_args.compile", "everything"],
    ["--model.backbone.init_args.sizes", "3"],
    ["--data", "dblightning.data.Nothing"],
    ["--data", "MiniatureDataModul"],
    ["--data.batchsize", "3"],
    ["--data.eval_batch_size", "some"],
    ["--data.eval_seeds", "[1]"],
    ["--trainer.max_epochs", "-7"],
    ["--trainer.max_epochs", "ten"],
    ["--trainer.max_epoch", "3"],
    ["--trainer.precision", "8-mixed"],
    ["--trainer.num_nodes", "0"],
    ["--trainer.callbacks", "dblightning.callbacks.SampleGrd"],
    ["--trainer.callbacks", "3"],
    ["--trainer.logger.class_path", "lightning.pytorch.loggers.Nothing"],
    ["--ckpt_path", "nowhere.ckpt"],
    ["--seed_everything"],
]

AESTHETIC = "dblightning.miniature.rewards.ShapeAesthetic"
FIT: list[list[str]] = [
    ["--model.rank", "0"],
    ["--model.rank", "four"],
    ["--model.lora_alpha", "0"],
    ["--model.learning_rate", "1e30"],
    ["--model.learning_rate", "-1"],
    ["--model.clip_grad_norm", "-1"],
    ["--model.clip_grad_norm", "0"],
    ["--model.clip_range", "0"],
    ["--model.value_steps", "-1"],
    ["--model.kl_weight", "-0.1"],
    ["--model.reward", "ImageRewrad"],
    ["--model.reward", "dblightning.rewards.PickScor"],
    ["--model.reward.init_args.nothing", "1"],
    ["--model.eval_rewards", "[1, 2]"],
    ["--model.eval_rewards.extra", "3"],
    ["--model.objective", "dpo2"],
    ["--model.target_modules", "3"],
    ["--model.init_adapter", "/nowhere/adapter"],
    ["--model.policy_steps", "0"],
    ["--model.skip_last_steps", "-1"],
    ["--model.window.size", "0"],
    ["--model.window.tail_steps", "1.5"],
    ["--model.window.position", "middle"],
    ["--model.window.every", "0"],
    ["--model.window.size", "21"],
    ["--model.window.size", "null"],
    ["--model.window.first", "15"],
    ["--model.num_inference_steps", "5"],
    ["--model.window.length", "3"],
    ["--model.optimisation.ema", "1"],
    ["--model.blends", "[]"],
    ["--model.reward", "null"],
    ["--model.adapters", f"{{a: {{reward: {AESTHETIC}}}}}"],
    ["--model.reward", "null", "--model.adapters", "{}"],
    ["--model.reward", "null", "--model.adapters", "[a, b]"],
    ["--model.reward", "null", "--model.adapters", "{a: {learning_rate: 0.1}}"],
    ["--model.reward", "null", "--model.adapters", f"{{a: {{reward: {AESTHETIC}, rank: 8}}}}"],
    ["--model.reward", "null", "--model.adapters", f"{{a: {{reward: {AESTHETIC}, kl_weight: -1}}}}"],
    ["--model.reward", "null", "--model.adapters", f"{{a.b: {{reward: {AESTHETIC}}}}}"],
    ["--model.reward", "null", "--model.adapter.name", "b", "--model.adapters", f"{{a: {{reward: {AESTHETIC}}}}}"],
    ["--model.reward", "null", "--config", "FILE", f"model: {{adapters: {{a: {{reward: {AESTHETIC}}}, a: {{}}}}}}"],
    ["--model.optimisation.epochs", "0"],
    ["--model.optimisation.epochs", "2", "--model.replay.buffer_size", "1000"],
    ["--model.objective", "dblightning.objectives.GRPO"],
    ["--model.objective.class_path", "GRPO"],
    ["--model.advantage.baseline", "group", "--data.samples_per_prompt", "1"],
    ["--model.advantage.drop_flat_groups", "true"],
    ["--model.advantage.clip", "-5"],
    ["--model.objective", "dblightning.objectives.GRPOGuard"],
    ["--model.advantage.per_reward", "true", "--model.advantage.baseline", "group"],
    ["--model.kl.to_go", "true", "--model.kl.form", "eps_mse"],
    ["--model.kl.to_go", "true", "--model.kl.weight", "0"],
    ["--model.objective", "dblightning.objectives.NFT", "--model.advantage.baseline", "value"],
    ["--model.objective", "dblightning.objectives.NFT", "--model.replay.buffer_size", "1000"],
    ["--model.objective", "NFT", "--model.objective.init_args.beta", "0"],
    ["--model.objective", "FlowDPPO", "--model.objective.init_args.max_divergence", "-1"],
]
BLENDS: list[list[str]] = [
    ["--model.blends", "3"],
    ["--model.blends", "[{methd: base}]"],
    ["--model.blends", "[{method: [base]}]"],
    ["--model.blends", "[{method: db-mpa, weights: [1]}]"],
    ["--model.blends", "[{method: db-mpa, weights: {alignment: much}}]"],
    ["--model.blends", "[{method: db-mpa, weights: {alignment: 0.5}}]"],
    ["--model.blends", "[{method: db-mpa, weights: {alignment: -1, aesthetic: 2}}]"],
    ["--model.blends", "[{method: db-mpa, weights: {alignment: .nan}}]"],
    ["--model.blends", "[{method: db-kla, weights: {alignment: 1.0}, kl_scale: -1}]"],
    ["--model.blends", "[{method: db-kla, weights: {alignment: 1.0}, kl_scale: .inf}]"],
    ["--model.blends", "[{method: db-kla, weights: {alignment: 1.0}, strength: 2}]"],
    ["--model.sweeps", "[{methods: db-mpa}]"],
    ["--model.sweeps", "[{methods: [db-mpa], names: [a, b]}]"],
    ["--model.sweeps", "7"],
    ["--model.adapters", "[runs]"],
    ["--model.adapters.mine", "/nowhere/adapter"],
    ["--model.rewards", "[1]"],
    ["--model.rewards.x", "dblightning.rewards.Nothing"],
    ["--model.out", "[runs]"],
    ["--model.rank", "4"],
]


def argument_id(arguments: list[str]) -> str:
    return " ".join(arguments)[:70].replace("\x00", "0").replace("\n", " ")


CASES = [
    pytest.param(command, wrong, id=f"{command} {argument_id(wrong)}")
    for command, own in (("fit", FIT), ("test", BLENDS), ("predict", BLENDS))
    for wrong in (*ANYWHERE, *own)
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command line as a process would, from an empty folder; returns (exit code, what was printed)."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded for a wrong command line")

    monkeypatch.setattr(cli, "_lightning", refuse)
    monkeypatch.chdir(tmp_path)

    def run_(*arguments: str) -> tuple[Any, str]:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["dblightning", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"
        printed = capsys.readouterr()
        code = stop.value.code
        return code, printed.out + printed.err + (f"{code}\n" if isinstance(code, str) else "")

    return run_


def check(code: Any, printed: str) -> None:
    assert code not in (0, None)
    assert "Traceback" not in printed
    assert printed.startswith("error: ")
    assert len(printed.strip().splitlines()) <= 3, printed
    assert len(printed) < 700


@pytest.mark.parametrize(("command", "wrong"), CASES)
def test_a_wrong_run_is_refused_in_a_sentence(command: str, wrong: list[str], run: Any, tmp_path: Path) -> None:
    arguments = list(wrong)
    if "FILE" in arguments:
        content = arguments.pop()
        (tmp_path / "run.yaml").write_text(content)
        arguments[-1] = str(tmp_path / "run.yaml")
    # adapters that the quickstart makes are not there in a fresh clone
    code, printed = run(command, "--config", str(ROOT / CONFIGS[command]), *arguments)
    check(code, printed)


#: wrong for ``score``; IMAGES, PROMPTS and OUT stand for ones that are right
SCORE_PARTS = {"--images": "IMAGES", "--prompts": "PROMPTS", "--rewards": "jpeg", "--out": "OUT"}
SCORE_WRONG: dict[str, list[str]] = {
    "--images": ["nowhere", "PROMPTS", "EMPTY", "", "BROKEN"],
    "--prompts": ["nowhere.txt", "EMPTY", "SHORT", "LATIN", "JSONL", "IMAGES"],
    "--rewards": [
        "",
        ",",
        "jpeg,jpeg",
        "jepg",
        "nowhere.Reward",
        "json.loads",
        "dblightning.rewards.Nothing",
        "jpeg.x",
    ],
    "--out": ["scores.txt", "nowhere/scores.csv", "PROMPTS", "", "scores"],
    "--batch-size": ["0", "-1", "many", "1.5", ""],
    "--device": ["abacus"],
    "--set": ["jpeg", "jpeg.quality", "=1", "pickscore.weights=x", "jpeg.nothing=1", "jpeg.quality=0", "jpeg.=1"],
    "--nothing": ["1"],
    "--overwrite": ["yes"],
}
SCORE: list[list[str]] = [
    *([each for key in SCORE_PARTS if key != left_out for each in (key, SCORE_PARTS[key])] for left_out in SCORE_PARTS),
    *(
        [each for key, own in (SCORE_PARTS | {option: value}).items() for each in (key, own)]
        for option, values in SCORE_WRONG.items()
        for value in values
    ),
    *(
        [each for pair in SCORE_PARTS.items() for each in pair] + [key]
        for key in (*SCORE_PARTS, "--batch-size", "--set")
    ),
    ["stray"],
    ["--images"],
    *([f"{key}=", "--images", "IMAGES"] for key in SCORE_PARTS),
    [],
]
REPORT: list[list[str]] = [
    [],
    ["nowhere.parquet"],
    ["nowhere.parquet", "--out", "out"],
    ["PROMPTS"],
    ["PROMPTS", "--out", "out"],
    ["EMPTY"],
    ["IMAGES"],
    ["BROKEN/0.png"],
    ["FOREIGN", "--out", "out"],
    ["--out"],
    ["--out", "out"],
    ["--nothing", "1"],
    ["stray1", "stray2"],
    *([GOOD, *wrong] for GOOD in ("FOREIGN", "nowhere.parquet") for wrong in (
        ["--samples", "0"], ["--samples", "-1"], ["--samples", "many"], ["--samples", "1.5"], ["--samples"],
        ["--level", "0"], ["--level", "1"], ["--level", "1.5"], ["--level", "-0.5"], ["--level", "high"], ["--level"],
        ["--level", "nan"], ["--images", "nowhere"], ["--images", "PROMPTS"], ["--images"], ["--reference"],
        ["--reference", "x"], ["--reference", "1"], ["--nothing"], ["--seed", "x"], ["--out"], ["--out", "PROMPTS"],
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Right and wrong files by the names used above."""
    import pandas as pd
    from PIL import Image

    folder = tmp_path_factory.mktemp("files")
    for name in ("images", "empty", "broken"):
        (folder / name).mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{index}.png")
    (folder / "broken" / "0.png").write_bytes(b"no picture")
    (folder / "prompts.txt").write_text("a\nb\n")
    (folder / "short.txt").write_text("a\n")
    (folder / "latin.txt").write_bytes("é\nb\n".encode("latin-1"))
    (folder / "prompts.jsonl").write_text("[1]\n{\n")
    pd.DataFrame({"a": [1.0]}).to_parquet(folder / "foreign.parquet")
    names = {
        "IMAGES": "images", "EMPTY": "empty", "BROKEN": "broken", "PROMPTS": "prompts.txt", "SHORT": "short.txt",
        "LATIN": "latin.txt", "JSONL": "prompts.jsonl", "FOREIGN": "foreign.parquet", "OUT": "scores.csv",
        "BROKEN/0.png": "broken/0.png",
    }  # fmt: skip
    return {key: str(folder / name) for key, name in names.items()}


OTHER_CASES = [
    pytest.param(command, wrong, id=f"{command} {argument_id(wrong)}")
    for command, each in (("score", SCORE), ("report", REPORT))
    for wrong in each
]


@pytest.mark.parametrize(("command", "wrong"), OTHER_CASES)
def test_a_wrong_command_is_refused_in_a_sentence(
    command: str, wrong: list[str], run: Any, files: dict[str, str]
) -> None:
    check(*run(command, *(files.get(each, each) for each in wrong)))
    assert not Path(files["OUT"]).exists()


def test_there_are_sixty_of_each() -> None:
    counts = {name: len(each) for name, each in (("score", SCORE), ("report", REPORT))}
    counts |= {"fit": len(ANYWHERE + FIT), "test": len(ANYWHERE + BLENDS)}
    assert min(counts.values()) >= 56, counts


@pytest.mark.parametrize("command", list(CONFIGS))
def test_the_run_itself_passes_the_check(command: str) -> None:
    from dblightning.preflight import check_command

    check_command(command, ["--config", str(ROOT / CONFIGS[command])])


def test_a_config_from_a_pipe_is_read_once_and_checked(run: Any, tmp_path: Path) -> None:
    """``--config <(sed … FILE)``"""
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("model: {rank: 0}",))
    writer.start()
    code, printed = run("fit", "--config", str(ROOT / CONFIGS["fit"]), "--config", str(tmp_path / "pipe"))
    writer.join()
    check(code, printed)
    assert "rank" in printed
