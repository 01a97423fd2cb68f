"""The search where every candidate's reward is known by formula, and once on the miniature through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dblightning import miniature
from dblightning.cli import main
from dblightning.data import MiniatureDataModule
from dblightning.data.stream import PromptSet
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.preference_search import Candidate, Grid, Knee, Maximise, PreferenceSearch
from dblightning.preference_search.search import split
from dblightning.preset import Preset

optuna = pytest.importorskip("optuna", reason="the extra search is not installed")


class Formula(PreferenceSearch):
    """Two rewards as known functions of w(t) and λ plus a prompt's own noise, the same for all: nothing is sampled.

    With u the first knot's weight of ``alignment`` and v the last one's: alignment is u + v − 0.4 (λ − 1.2)², aesthetic
    2 − u − v − (u − 0.9)² − 0.4 (λ − 1.2)². The best aesthetic with alignment at least 0.8 is at u = 0.4 and v = 0.4 …
    off every grid.
    """

    asked: list[Candidate]

    def score(self, candidate: Candidate, prompts: PromptSet, fresh: bool = False) -> np.ndarray:
        self.asked = [*getattr(self, "asked", []), candidate]
        noise = np.random.default_rng(len(prompts)).normal(0, 0.05, (len(prompts), 2))
        if candidate.method == "base":
            return noise
        u, v = candidate.knots[0]["alignment"], candidate.knots[-1]["alignment"]
        penalty = 0.4 * (candidate.kl_scale - 1.2) ** 2
        return noise + [2 - u - v - (u - 0.9) ** 2 - penalty, u + v - penalty]


@pytest.fixture(scope="module")
def backbone() -> Any:
    from dblightning.backbone import DiffusersBackbone

    return DiffusersBackbone("miniature")


def formula(backbone: Any, out: Path, goal: Any = None, kind: Any = Formula, **changes: Any) -> Any:
    given = {
        "weigh": ["alignment", "aesthetic"], "kl_scale": (0.5, 1.5), "grid": Grid(4, [1.0]), "trials": 40,
        "search_prompts": 12, "check_prompts": 20, "num_inference_steps": 4, "guidance_scale": 1.0, "out": str(out),
    }  # fmt: skip
    rewards = {"aesthetic": ShapeAesthetic(), "alignment": ShapeAlignment()}
    goal = goal or Maximise("aesthetic", {"alignment": 0.8})
    return kind(backbone, MiniatureDataModule(eval_batch_size=12), rewards, goal, **{**given, **changes})


def test_it_finds_a_schedule_that_no_grid_has_and_keeps_the_constraint(backbone: Any, tmp_path: Path) -> None:
    search = formula(backbone, tmp_path)
    answer = search.run()
    # the grid's best: u = v = 0.5 and λ = 1, aesthetic 2 − 1 − 0.16 − 0.016 = 0.824
    assert answer.grid.knots == [{"alignment": 0.5, "aesthetic": 0.5}]
    # the optimum has u = 0.8, v = 0: 2 − 0.8 − 0.01 = 1.19; half of the way there is a find
    assert answer.gains["aesthetic"].value > 1.0
    assert answer.gains["alignment"].low >= 0.8 - 0.01
    assert len(answer.candidate.knots) == 2 and answer.merit.low > 0
    assert answer.verdict().startswith("it beats the fixed grid's best")
    preset = Preset.read(tmp_path / "preset.yaml")
    assert preset == answer.preset and list(preset.weights) == answer.candidate.knots  # type: ignore[arg-type]
    assert preset.adapters is None and preset.base == "miniature"
    written = json.loads((tmp_path / "answer.json").read_text())
    assert written["check"]["gains"]["aesthetic"]["value"] == answer.gains["aesthetic"].value
    assert len((tmp_path / "candidates.csv").read_text().splitlines()) == 1 + 5 + 40


def test_a_killed_search_resumes_and_more_trials_go_on(backbone: Any, tmp_path: Path) -> None:
    class Killed(Formula):
        left = 9

        def score(self, candidate: Candidate, prompts: PromptSet, fresh: bool = False) -> np.ndarray:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().score(candidate, prompts, fresh)

    with pytest.raises(KeyboardInterrupt):
        formula(backbone, tmp_path, kind=Killed, trials=10).run()
    done = optuna.load_study(study_name="search", storage=storage(tmp_path)).trials
    assert sum(trial.state.is_finished() for trial in done) == 8  # the ninth call was the base's first
    answer = formula(backbone, tmp_path, trials=10).run()
    finished = [
        trial.params for trial in optuna.load_study(study_name="search", storage=storage(tmp_path)).trials
        if trial.state.is_finished()
    ]  # fmt: skip
    assert len(finished) == 15 and answer.grid is not None
    formula(backbone, tmp_path, trials=14).run()
    finished = [
        trial.params for trial in optuna.load_study(study_name="search", storage=storage(tmp_path)).trials
        if trial.state.is_finished()
    ]  # fmt: skip
    assert len(finished) == 19 == len({json.dumps(each, sort_keys=True) for each in finished})
    with pytest.raises(ValueError, match="holds a search with another goal"):
        formula(backbone, tmp_path, goal=Maximise("alignment")).run()


def storage(folder: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.storages.JournalStorage(backend)


def test_an_answer_of_the_grid_is_said_to_be_one_and_an_unreachable_goal_is_an_error(
    backbone: Any, tmp_path: Path
) -> None:
    answer = formula(backbone, tmp_path / "a", trials=0, finalists=0).run()
    assert answer.merit is None and answer.verdict() == "nothing beats the fixed grid's best, which is the answer"
    with pytest.raises(ValueError, match="none of 7 candidates reaches the goal"):
        formula(backbone, tmp_path / "b", goal=Maximise("aesthetic", {"alignment": 9.0}), trials=2).run()


def test_a_knee_is_searched_by_several_objectives(backbone: Any, tmp_path: Path) -> None:
    answer = formula(backbone, tmp_path, goal=Knee(["aesthetic", "alignment"]), trials=20).run()
    study = optuna.load_study(study_name="search", storage=storage(tmp_path))
    assert len(study.directions) == 2 and answer.evaluated <= 25
    assert answer.candidate.method == "db-mpa"


def test_the_check_has_none_of_the_prompts_searched_on() -> None:
    data = MiniatureDataModule()
    searched, checked = split(data, 48, 100)
    assert len(searched) == 48 and len(checked) == 100
    assert not set(searched.prompts) & set(checked.prompts)
    assert set(searched.prompts) | set(checked.prompts) <= set(data.test_prompts)
    with pytest.raises(ValueError, match="leave 0 for the check"):
        split(data, 10_000, None)


def test_wrong_settings_are_refused_before_anything_is_sampled(backbone: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"weigh": ["beauty"]}, "weigh names"),
        ({"grid": Grid(4, [3.0])}, "must lie in kl_scale"),
        ({"trials": -1}, "trials"),
        ({"search_prompts": 1}, "search_prompts"),
        ({"weigh": ["alignment", "compressibility"], "methods": ["rewarded-soup-factors"]}, "ranks \\[16, 4\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            formula(backbone, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


def test_the_command_searches_the_miniature_and_its_preset_makes_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs/miniature/search.yaml"
    options = {
        "goal.init_args.at_least": "{}", "trials": 2, "grid.steps": 1, "grid.kl_scales": "[1.0]", "search_prompts": 4,
        "check_prompts": 4, "num_inference_steps": 2, "finalists": 1, "out": tmp_path,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--model.{name}", str(value))]
    main(["search", "--config", str(config), *words])
    printed = capsys.readouterr().out
    assert "verdict: " in printed and str(tmp_path / "preset.yaml") in printed
    scores = len(list((tmp_path / "scores").glob("*.npy")))
    preset = Preset.read(tmp_path / "preset.yaml")
    images = preset.pipeline()("A red colored circle.", **preset.call(), output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and preset.num_inference_steps == 2
    main(["search", "--config", str(config), *words])  # all is known: nothing new is sampled
    assert len(list((tmp_path / "scores").glob("*.npy"))) == scores
    assert capsys.readouterr().out.splitlines()[-8:] == printed.splitlines()[-8:]


def test_scores_are_those_of_an_evaluation_with_common_noise(backbone: Any, tmp_path: Path) -> None:
    search = formula(backbone, tmp_path, kind=PreferenceSearch, search_prompts=3, check_prompts=2, seeds=2)
    one = search.score(Candidate(method="db-mpa", knots=[{"alignment": 1.0, "aesthetic": 0.0}]), search.search_set)
    assert one.shape == (6, 2)
    from dblightning.data.stream import EvalLoader
    from dblightning.evaluation.specs import BlendSpec

    rows = [
        row
        for batch in EvalLoader(search.search_set, 12, 2)
        for row in search.sampler.score(batch, BlendSpec("single", {"alignment": 1.0})).rows
    ]
    rows.sort(key=lambda row: (row["prompt_id"], row["seed"]))
    expected = np.array([[row["reward/aesthetic"], row["reward/alignment"]] for row in rows])
    # 1e-4: one adapter of weight 1 by another method's arithmetic
    np.testing.assert_allclose(one, expected, atol=1e-4)
    fresh = search.score(Candidate(method="base"), search.search_set, fresh=True)
    assert np.abs(fresh - search.score(Candidate(method="base"), search.search_set)).max() > 0.05
    assert torch.is_grad_enabled() and set(miniature.adapters()) >= {"alignment", "aesthetic"}
