from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from dblightning import cli
from dblightning.command_tree import Refused, parse, parse_value, read_config
from dblightning.flat_settings import GROUPED, dotted, flat, grouped, renamed_arguments
from dblightning.objectives import DPOK, PPO
from dblightning.objectives.named import described, objective_of
from dblightning.objectives.policy import AdapterPolicy
from dblightning.preflight import check_command
from dblightning.replay import Transitions
from dblightning.training_settings import KLSettings, TrainingSettings
from tests.toy_fit import module

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")


def test_every_flat_name_leads_to_a_setting() -> None:
    groups = {name: get_type_hints(kind) for name, kind in get_type_hints(TrainingSettings).items()}
    for new in GROUPED.values():
        group, _, name = new.partition(".")
        assert name in groups.get(group, {}) or new == "objective.init_args.clip_range"
    assert len(set(GROUPED.values())) == len(GROUPED)


def test_flat_names_join_the_groups_that_are_given() -> None:
    found, moved = grouped({"seed": 3, "kl": "eps_mse", "kl_weight": 0.5, "rank": 2, "adapter": {"name": "a"}})
    assert found == {"seed": 3, "kl": {"form": "eps_mse", "weight": 0.5}, "adapter": {"name": "a", "rank": 2}}
    assert moved == {"kl": "kl.form", "kl_weight": "kl.weight", "rank": "adapter.rank"}
    assert grouped({"kl": KLSettings(weight=2.0), "kl_share": 0.5})[0] == {"kl": KLSettings(weight=2.0, share=0.5)}
    objective = {"class_path": "dblightning.objectives.PPO", "init_args": {"clip_range": 0.3}}
    assert grouped({"objective": "ppo", "clip_range": 0.3})[0] == {"objective": objective}
    with pytest.raises(ValueError, match=r"kl_weight and kl.weight are one setting, got 1 and 2; give one"):
        grouped({"kl": {"weight": 2}, "kl_weight": 1})


def test_a_run_by_flat_names_has_the_settings_of_one_by_groups() -> None:
    one = module(kl_target=0.5, objective="ppo")
    other = module(kl=KLSettings(target=0.5), objective=PPO(clip_range=0.5), clip_range=0.5)
    assert one.hparams == other.hparams
    assert one.settings == other.settings
    names = flat(one.hparams)
    assert (names["kl_target"], names["objective"], names["clip_range"], names["rank"]) == (0.5, "ppo", 0.5, 4)
    assert dotted(names) == dotted(one.hparams)
    with pytest.raises(ValueError, match="KLSettings has no setting 'wieght'"):
        module(kl={"wieght": 1.0})


def test_a_command_line_is_rewritten_with_its_files(tmp_path: Path) -> None:
    file = tmp_path / "flat.yaml"
    file.write_text("model: {rank: 8, kl: exact, objective: ppo}\nseed_everything: 1\n")
    given = ["--config", str(file), "--model.kl_weight", "0.5", "--model.kl=eps_mse", "--model.rank=2", "--overwrite"]
    found, moved = renamed_arguments(given, read_config, parse_value)
    assert found[1:] == ["--model.kl.weight=0.5", "--model.kl.form=eps_mse", "--model.adapter.rank=2", "--overwrite"]
    path = "dblightning.objectives.PPO"
    model = {"objective": path, "adapter": {"rank": 8}, "kl": {"form": "exact"}}
    assert yaml.safe_load(found[0].removeprefix("--config=")) == {"model": model, "seed_everything": 1}
    assert moved == {"rank": "adapter.rank", "kl": "kl.form", "kl_weight": "kl.weight"}
    tree = parse("fit", given)
    assert tree["model"]["kl"] == {"form": "eps_mse", "weight": 0.5}
    assert tree["model"]["adapter"] == {"rank": 2}
    same, none = renamed_arguments(["--config", QUICKSTART], read_config, parse_value)
    assert (same, none) == ([f"--config={QUICKSTART}"], {})


@pytest.mark.parametrize("options", [["--model.rank", "8"], ["--model.adapter.rank", "8"], ["--model.adapter.rank=8"]])
def test_both_names_of_an_option_are_accepted(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check_command("fit", ["--config", QUICKSTART, *options])
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", QUICKSTART, *options, "--model.objective", "ppo", "--print_config"])
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["adapter"]["rank"] == 8
    assert printed["model"]["objective"]["class_path"] == "dblightning.objectives.PPO"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.adapter.rank", "0"], "model.adapter.rank must be a whole number"),
        (["--model.kl_weight", "-1"], "model.kl.weight must be >= 0"),
        (["--model.kl.weight", "-1"], "model.kl.weight must be >= 0"),
        (["--model.kl.wieght", "1"], "did you mean 'weight'"),
        (["--model.sampling.eta", "0"], "model.sampling.eta must be > 0"),
        (["--model.objective.clip_range", "0"], "clip_range must be > 0"),
        (["--model.objective", "dblightning.objectives.PPOO"], "did you mean 'PPO'"),
        (["--model.advantage", "valeu"], "model.advantage.baseline must be 'value'"),
    ],
)
def test_a_wrong_setting_of_a_group_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(Refused) as refusal:
        check_command("fit", ["--config", QUICKSTART, *options])
    assert message in str(refusal.value)


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_objective_comes_back_from_its_description() -> None:
    for objective in (DPOK(0.2), PPO(0.3)):
        found = objective_of(described(objective))
        assert (type(found), found) == (type(objective), objective)
    assert described(objective_of("dpok"))["class_path"] == "dblightning.objectives.DPOK"
    for wrong in ("dpo", "dblightning.objectives.Nothing", "dblightning.settings.Number"):
        with pytest.raises(ValueError, match="objective"):
            objective_of(wrong)


def test_the_policy_is_the_denoiser_under_other_gates() -> None:
    run = module()
    backbone: Any = run.backbone
    backbone.adapters.add("before", 1, None, (), None)
    with torch.no_grad():
        backbone.shifts[run.adapter_name].fill_(0.5)
        backbone.shifts["before"].fill_(0.2)
    run.prompts = {0: "a red circle"}
    zeros, ids = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    latents = torch.randn(3, 2, 1, 1)
    batch = Transitions(latents, latents, torch.tensor([0, 1, 3]), zeros, zeros, zeros, zeros, ids, ids)
    policy = AdapterPolicy(
        backbone, run.solver, run.adapter_name, run.settings.sampling, lambda ids: ["a"] * len(ids), "before"
    )
    torch.testing.assert_close(policy.current(batch) - policy.reference(batch), torch.full_like(latents, 0.5))
    torch.testing.assert_close(policy.old(batch) - policy.reference(batch), torch.full_like(latents, 0.2))
    assert policy.current(batch) is policy.current(batch), "one forward for the same transitions"
    assert policy.current(batch).requires_grad and not policy.old(batch).requires_grad
    policy.old_adapter = None
    with pytest.raises(ValueError, match="no adapter of an old policy"):
        policy.old(batch)


def test_an_objective_of_samples_trains_on_the_last_step(tmp_path: Path) -> None:
    from tests.toy_fit import fit

    class Samples(PPO):
        needs = "samples"
        seen: set[int]

        def loss(self, policy: Any, transitions: Any) -> Any:
            self.seen = {*getattr(self, "seen", ()), *transitions.step_index.tolist()}
            return super().loss(policy, transitions)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": sorted(getattr(self, "seen", ()))}

    run = module(objective=Samples(0.5))
    fit(tmp_path, run).save_checkpoint(tmp_path / "run.ckpt")
    assert run.objective.seen == {3}  # type: ignore[attr-defined]
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["dblightning"]["objective"] == {"seen": [3]}
