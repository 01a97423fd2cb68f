"""The search: a fixed grid, then Optuna, on common noise; finalists once more; a check on prompts not searched on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dblightning.backbone import Backbone
from dblightning.data.base import PromptDataModule
from dblightning.data.stream import EvalLoader, PromptSet
from dblightning.evaluation.sampler import BlendSampler, adapter_folders, load_adapters, made_with
from dblightning.evaluation.specs import BlendSpec
from dblightning.extras import importing
from dblightning.preference_search.answer import Answer
from dblightning.preference_search.goals import Goal
from dblightning.preference_search.measure import Comparison, beside, compared, gains_of
from dblightning.preference_search.space import Candidate, Grid, Space
from dblightning.preset import Preset
from dblightning.progress import image_progress
from dblightning.rewards.base import RewardMetric
from dblightning.settings import RULES, Number, check_settings, count
from dblightning.whole_files import replacing

BASE = Candidate(method="base")


@dataclass
class Found:
    """A candidate and its rewards: (images, rewards), every prompt's seeds side by side."""

    candidate: Candidate
    rewards: np.ndarray
    allowed: bool = True


class PreferenceSearch:
    """A search for the preference that meets a goal.

    Every candidate gets the same prompts and noise as the base. What is scored is kept in ``<out>/scores``, Optuna's
    trials in ``<out>/study.journal``: the same command, run again after it was stopped, resumes; with more ``trials``
    it goes on.

    Args:
        backbone: the base model.
        data: its evaluation prompts are shared out between search and check.
        rewards: name → reward.
        goal: what is wanted.
        adapters: name → folder of an exported LoRA; the miniature's own are known.
        weigh: names of the adapters to weigh; None takes those of ``adapters``, or all that are known.
        methods: db-mpa, db-mpa-ls, rewarded-soup, rewarded-soup-factors.
        knots: of w(t), at most: 1 is constant weights, 2 a straight line from the first step to the last, 3 a bend in
            the middle.
        kl_scale: range of λ; [1, 1] leaves it at 1.
        grid: the fixed grid.
        trials: candidates that Optuna chooses after the grid.
        finalists: so many of the best candidates, and of the best of the grid, are sampled again with fresh noise on
            the search prompts; the answer has the best merit over both. 0 trusts the search.
        search_prompts: prompts to search on, a sample of the data's; all others are for the check.
        check_prompts: at most so many; None takes all others.
        seeds: images per prompt, in search and check.
        num_inference_steps, eta, guidance_scale: sampling settings.
        seed: of noise and search.
        out: folder for what is written.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit, before anything is sampled.
    """

    RULES: ClassVar[dict[str, Number]] = RULES | {
        "eta": Number(least=0, most=1, remedy="0 is deterministic DDIM (a flow's ODE), 1 is DDPM"),
        "trials": count(0),
        "finalists": count(0),
        "search_prompts": count(2),
        "check_prompts": count(2, words=(None,)),
        "seeds": count(),
    }

    def __init__(
        self,
        backbone: Backbone,
        data: PromptDataModule,
        rewards: dict[str, RewardMetric],
        goal: Goal,
        adapters: dict[str, str] | None = None,
        weigh: list[str] | None = None,
        methods: list[str] | None = None,
        knots: int = 2,
        kl_scale: tuple[float, float] = (1.0, 1.0),
        grid: Grid | None = None,
        trials: int = 60,
        finalists: int = 4,
        search_prompts: int = 48,
        check_prompts: int | None = None,
        seeds: int = 1,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        guidance_scale: float = 7.5,
        seed: int = 0,
        out: str = "runs/search",
    ) -> None:
        self.settings = {
            "num_inference_steps": num_inference_steps, "eta": eta, "guidance_scale": guidance_scale, "seed": seed,
            "seeds": seeds, "search_prompts": search_prompts, "check_prompts": check_prompts,
        }  # fmt: skip
        check_settings({**self.settings, "trials": trials, "finalists": finalists}, self.RULES)
        if not rewards:
            raise ValueError("a search needs rewards; set model.rewards")
        self.backbone, self.rewards, self.goal = backbone, rewards, goal
        if torch.cuda.is_available():
            for each in (backbone, *rewards.values()):
                each.to("cuda")
        known = adapter_folders(backbone, adapters or {})
        names = weigh or list(adapters or known)
        self.folders = {name: known[name] for name in names if name in known}
        if len(self.folders) < len(names):
            raise ValueError(f"weigh names {sorted(set(names) - set(known))}, but the adapters are {sorted(known)}")
        self.space = Space(names, methods or ["db-mpa"], knots, (float(kl_scale[0]), float(kl_scale[1])))
        self.grid = grid or Grid()
        low, high = self.space.kl_scale
        if not all(low <= each <= high for each in self.grid.kl_scales):
            raise ValueError(f"the grid's kl_scales {self.grid.kl_scales} must lie in kl_scale, {low} to {high}")
        self.trials, self.finalists = trials, finalists
        self.search_set, self.check_set = split(data, search_prompts, check_prompts)
        self.seeds, self.batch_size = seeds, data.eval_batch_size
        self.out = Path(out)
        self.sampler = BlendSampler(backbone, rewards, num_inference_steps, eta, guidance_scale, None, seed)
        self.adapter_facts = load_adapters(backbone, [BlendSpec(weights=dict.fromkeys(names, 1.0))], self.folders)
        even = dict.fromkeys(names, 1 / len(names))
        self.sampler.check_adapters([BlendSpec(method, even) for method in self.space.methods])
        self.made_with = made_with(backbone, rewards)

    # ── scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def score(self, candidate: Candidate, prompts: PromptSet, fresh: bool = False) -> np.ndarray:
        """Rewards of a candidate's images, (images, rewards), from disk where they are known.

        Args:
            candidate: what to sample.
            prompts: each with ``seeds`` images.
            fresh: other noise than the search's.
        """
        sampler = replace(self.sampler, seed=self.sampler.seed + 1) if fresh else self.sampler
        file = self.out / "scores" / f"{self._key(candidate, prompts, sampler.seed)}.npy"
        if file.is_file():
            return np.load(file)
        rows = []
        for batch in EvalLoader(prompts, self.batch_size, self.seeds):
            images = sampler.generate(batch, candidate)
            scores = [reward.score(images, batch["prompt"]).cpu() for reward in self.rewards.values()]
            ids, seeds = batch["prompt_id"].tolist(), batch["seed"].tolist()
            rows += list(zip(ids, seeds, torch.stack(scores, 1).double().tolist(), strict=True))
        values = np.array([scores for _, _, scores in sorted(rows)])
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as aside, aside.open("wb") as stream:
            np.save(stream, values)
        return values

    def _record(self) -> dict[str, Any]:
        """What scores depend on beside candidate, prompts and noise."""
        names = ("num_inference_steps", "eta", "guidance_scale", "seeds")
        digests = {name: facts["sha256"] for name, facts in self.adapter_facts.items()}
        return {"made_with": self.made_with, "adapters": digests, **{name: self.settings[name] for name in names}}

    def _key(self, candidate: Candidate, prompts: PromptSet, seed: int) -> str:
        parts = [candidate.described(), seed, prompts.prompts, prompts.prompt_ids, self._record()]
        return _digest(parts)[:32]

    # ── searching ────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Answer:
        """Search, and write ``preset.yaml``, ``answer.json`` and ``candidates.csv`` into ``out``.

        Raises:
            ImportError: the extra is not installed.
            ValueError: an ``out`` of another search, or no candidate that meets the goal's constraints.
        """
        optuna = _optuna()
        base = self.score(BASE, self.search_set)
        self.goal.start(self.rewards, base)
        study = self._study(optuna)
        self._optimise(study, base)
        done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
        found = [self._found(self.space.suggest(optuna.trial.FixedTrial(each.params)), base) for each in done]
        answer, grid = self._choose(found, base)
        result = self._check(answer, grid, len({self._key(each.candidate, self.search_set, 0) for each in found}))
        self._write(result, found, base)
        return result

    def _study(self, optuna: Any) -> Any:
        """The study of ``out``, new or resumed."""
        self.out.mkdir(parents=True, exist_ok=True)
        own = {
            "goal": str(self.goal), "directions": list(self.goal.directions), "names": self.space.names,
            "methods": self.space.methods, "knots": self.space.knots, "kl_scale": list(self.space.kl_scale),
            "grid": vars(self.grid), "settings": self.settings, "prompts": _digest(self.search_set.prompts),
            "models, rewards or adapters": _digest(self._record()),
        }  # fmt: skip
        own = json.loads(json.dumps(own))
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(self.out / "study.journal"))
        )
        existing = optuna.study.get_all_study_names(storage)
        before = optuna.load_study(study_name="search", storage=storage).user_attrs if existing else own
        differing = [name for name in own if before.get(name) != own[name]]
        if differing:
            raise ValueError(
                f"{self.out} holds a search with another {differing[0]}; name another out, or remove the folder"
            )
        # a sampler with a state would repeat itself after a resume: its seed goes on with the trials that are there
        count = len(optuna.load_study(study_name="search", storage=storage).trials) if existing else 0
        sampler = optuna.samplers.GPSampler(seed=self.sampler.seed + count, n_startup_trials=8)
        study = optuna.create_study(
            study_name="search", storage=storage, sampler=sampler, directions=self.goal.directions, load_if_exists=True
        )
        for name, value in () if existing else own.items():
            study.set_user_attr(name, value)
        # what a killed run had begun is begun again
        state = optuna.trial.TrialState
        pending = [each.system_attrs.get("fixed_params") for each in study.get_trials(states=(state.WAITING,))]
        known = [each.params for each in study.get_trials(states=(state.COMPLETE,))] + pending
        for point in self.space.points(self.grid):
            if (params := self.space.params(point)) not in known:
                study.enqueue_trial(params)
        return study

    def _optimise(self, study: Any, base: np.ndarray) -> None:
        points = list(self.space.points(self.grid))
        done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        total = len(points) + self.trials
        images = len(self.search_set) * self.seeds
        bar = image_progress(total * images, True)
        bar.update(min(done, total) * images, False)
        while done < total:
            trial = study.ask()
            found = self._found(self.space.suggest(trial), base)
            for index, value in enumerate(self.goal.constraints(*gains_of(found.rewards, base, self.seeds))):
                trial.set_constraint(str(index), value)
            trial.set_user_attr("means", found.rewards.mean(0).tolist())
            study.tell(trial, self.goal.values(found.rewards.mean(0)))
            done += 1
            bar.update(images, True)
        bar.close()

    @cached_property
    def _grid_points(self) -> set[str]:
        """The grid's candidates, described."""
        return {json.dumps(each.described()) for each in self.space.points(self.grid)}

    def _found(self, candidate: Candidate, base: np.ndarray) -> Found:
        rewards = self.score(candidate, self.search_set)
        constraints = self.goal.constraints(*gains_of(rewards, base, self.seeds))
        candidate.grid = json.dumps(candidate.described()) in self._grid_points
        return Found(candidate, rewards, all(each <= 0 for each in constraints))

    def _choose(self, found: Sequence[Found], base: np.ndarray) -> tuple[Found, Found | None]:
        """The best of all and of the grid, after a second look at the finalists with fresh noise."""
        allowed = [each for each in found if each.allowed]
        if not allowed:
            raise ValueError(
                f"none of {len(found)} candidates reaches the goal ({self.goal}) on the search prompts; ask for less"
            )
        self.goal.settle(np.array([each.rewards.mean(0) for each in allowed]))

        def best(group: Sequence[Found], number: int) -> list[Found]:
            distinct = {json.dumps(each.candidate.described()): each for each in group}
            return sorted(distinct.values(), key=lambda each: -float(self.goal.merit(each.rewards.mean(0))))[:number]

        on_grid = [each for each in allowed if each.candidate.grid]
        if not self.finalists:
            return best(allowed, 1)[0], next(iter(best(on_grid, 1)), None)
        fresh_base = self.score(BASE, self.search_set, fresh=True)
        both_bases = beside(base, fresh_base, self.seeds)

        def again(group: Sequence[Found]) -> list[Found]:
            pooled = []
            for each in best(group, self.finalists):
                fresh = self.score(each.candidate, self.search_set, fresh=True)
                both = beside(each.rewards, fresh, self.seeds)
                limits = self.goal.constraints(*gains_of(both, both_bases, 2 * self.seeds))
                pooled.append(Found(each.candidate, both, all(limit <= 0 for limit in limits)))
            kept = [each for each in pooled if each.allowed] or pooled
            return best(kept, 1)

        return again(allowed)[0], next(iter(again(on_grid)), None)

    # ── the answer ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self, answer: Found, grid: Found | None, evaluated: int) -> Answer:
        base = self.score(BASE, self.check_set)
        own = self.score(answer.candidate, self.check_set)
        other = None if grid is None else self.score(grid.candidate, self.check_set)
        same = grid is not None and grid.candidate.described() == answer.candidate.described()
        merit = None if other is None or same else compared(own, other, self.seeds, self.goal.merit)

        def gains(rewards: np.ndarray | None) -> dict[str, Comparison]:
            if rewards is None:
                return {}
            columns = [(rewards[:, [i]], base[:, [i]]) for i in range(base.shape[1])]
            found = [compared(one, two, self.seeds, lambda means: means[..., 0]) for one, two in columns]
            return dict(zip(self.rewards, found, strict=True))

        best = None if grid is None else grid.candidate
        return Answer(
            self._preset(answer.candidate), answer.candidate, best, gains(own), gains(other), merit, evaluated,
            self.goal.needed(),
        )  # fmt: skip

    def _preset(self, candidate: Candidate) -> Preset:
        knots = [{name: each.get(name, 0.0) for name in candidate.adapters} for each in candidate.knots]
        from_base = adapter_folders(self.backbone, {})  # the miniature's
        shipped = all(from_base.get(name) == path for name, path in self.folders.items())
        return Preset(
            weights=knots[0] if len(knots) == 1 else knots,
            kl_scale=candidate.kl_scale,
            method=candidate.method,
            num_inference_steps=self.sampler.num_inference_steps,
            guidance_scale=self.sampler.guidance_scale,
            eta=self.sampler.eta,
            base=str(getattr(self.backbone, "pretrained", "")),
            adapters=None if shipped else {name: str(path) for name, path in self.folders.items()},
            note=f"found by a search: {self.goal}",
        )

    def _write(self, answer: Answer, found: Sequence[Found], base: np.ndarray) -> None:
        answer.preset.write(self.out / "preset.yaml")
        names = list(self.rewards)
        content = {
            "goal": str(self.goal),
            "answer": answer.candidate.described(),
            "grid_best": None if answer.grid is None else answer.grid.described(),
            "verdict": answer.verdict(),
            "check": {
                "prompts": len(self.check_set), "seeds": self.seeds,
                "gains": {name: vars(each) for name, each in answer.gains.items()},
                "grid_gains": {name: vars(each) for name, each in answer.grid_gains.items()},
                "merit_over_grid": None if answer.merit is None else vars(answer.merit),
            },
            "search": {"prompts": len(self.search_set), "seeds": self.seeds, "evaluated": answer.evaluated},
            "settings": self.settings,
            **self._record(),
        }  # fmt: skip
        (self.out / "answer.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        lines = [",".join(["candidate", "method", "knots", "kl_scale", "grid", "allowed", *names])]
        for each in found:
            means = (f"{value:.5f}" for value in each.rewards.mean(0))
            label = f'"{each.candidate}"'
            facts = (each.candidate.method, len(each.candidate.knots), f"{each.candidate.kl_scale:.4f}")
            lines.append(",".join(map(str, (label, *facts, each.candidate.grid, each.allowed, *means))))
        (self.out / "candidates.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def split(data: PromptDataModule, search: int, check: int | None) -> tuple[PromptSet, PromptSet]:
    """The data's evaluation prompts in two: a sample to search on, and others to check on.

    Raises:
        ValueError: fewer than two prompts are left for the check.
    """
    every = data.evaluation_set
    searched = data.limited(every, search)
    known = set(searched.prompts)  # a text that stands there twice counts as searched on
    rest = [index for index, prompt in enumerate(every.prompts) if prompt not in known]
    if len(rest) < 2:
        raise ValueError(f"{len(every)} prompts leave {len(rest)} for the check; lower search_prompts, or bring more")
    return searched, data.limited(every.subset(rest), check)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _optuna() -> Any:
    with importing("a preference search", "search"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # GPSampler is one
    return optuna
