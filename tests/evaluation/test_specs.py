from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dblightning.blending import DBMPA, Single
from dblightning.evaluation.specs import BlendSpec, BlendSweep, blend_key, expand


def test_a_sweep_is_every_method_at_every_weight_and_one_number_is_the_first_names_weight() -> None:
    sweep = BlendSweep(["db-mpa", "rewarded-soup"], ["alignment", "aesthetic"], [0.2, 0.5])
    points = [(spec.method, spec.weights) for spec in sweep.specs()]
    assert points == [
        ("db-mpa", {"alignment": 0.2, "aesthetic": 0.8}),
        ("db-mpa", {"alignment": 0.5, "aesthetic": 0.5}),
        ("rewarded-soup", {"alignment": 0.2, "aesthetic": 0.8}),
        ("rewarded-soup", {"alignment": 0.5, "aesthetic": 0.5}),
    ]


def test_only_db_mpa_ls_is_repeated_for_each_schedule() -> None:
    sweep = BlendSweep(["db-mpa", "db-mpa-ls"], ["a", "b"], [0.5], ls_schedules=["iid", "systematic"])
    assert [(spec.method, spec.columns()["ls_schedule"]) for spec in sweep.specs()] == [
        ("db-mpa", "iid"),
        ("db-mpa-ls", "iid"),
        ("db-mpa-ls", "systematic"),
    ]


def test_an_oracle_names_one_adapter_per_preference() -> None:
    specs = BlendSweep(["morl"], ["a", "b"], [0.2, 0.5], adapter="morl_{w}").specs()
    assert [spec.adapter for spec in specs] == ["morl_0_2", "morl_0_5"]
    blend = specs[0].blend()
    assert isinstance(blend, Single)
    assert specs[0].adapters == ["morl_0_2"]
    assert specs[0].label == "morl_a-0.2_b-0.8"


def test_an_oracle_for_another_kl_weight_runs_its_adapter_unscaled() -> None:
    (spec,) = BlendSweep(["morl"], ["a"], [1.0], kl_scales=[0.5], adapter="a_{kl_scale}").specs()
    assert spec.adapter == "a_0_5"
    assert isinstance(spec.blend(), Single)
    assert spec.label == "morl_a-1_lambda-0.5"


def test_db_kla_may_run_an_adapter_of_another_name() -> None:
    spec = BlendSpec("db-kla", {"a": 1.0}, kl_scale=1.5, adapter="a_late")
    assert spec.adapters == ["a_late"]
    gates, mix, _ = spec.blend().start(["a_late"], 1, 1)(0)
    assert mix[:, 0].tolist() == [-0.5, 1.5]
    assert gates.flatten().tolist() == [0.0, 1.0]


def test_adapters_of_weight_zero_are_not_run() -> None:
    spec = BlendSpec("db-mpa", {"a": 1.0, "b": 0.0})
    assert isinstance(spec.blend(), DBMPA)
    assert spec.adapters == ["a"]
    gates, mix, _ = spec.blend().start(spec.adapters, 1, 1)(0)  # b need not be loaded
    assert gates[mix != 0].tolist() == [[1.0]]
    assert mix[mix != 0].tolist() == [1.0]


def test_a_point_named_twice_runs_once() -> None:
    sweep = BlendSweep(["db-mpa"], ["a", "b"], [0.5])
    found = expand([BlendSpec("base"), BlendSpec("db-mpa", {"b": 0.5, "a": 0.5})], [sweep])
    assert [spec.label for spec in found] == ["base", "db-mpa_a-0.5_b-0.5"]


def test_labels_of_different_blends_differ_and_keep_six_digits_where_those_suffice() -> None:
    near = [BlendSpec("db-mpa", {"a": w, "b": 1 - w}) for w in (0.3333331, 0.3333329, 0.5)]
    oracles = [BlendSpec("morl", {"a": 0.5, "b": 0.5}, adapter=name) for name in ("old", "new")]
    scales = [BlendSpec("db-kla", {"a": 1.0}, kl_scale=scale) for scale in (1.0000001, 1.0000002)]
    labels = [spec.label for spec in expand([*near, *oracles, *scales])]
    assert labels == [
        "db-mpa_a-0.3333331_b-0.6666669", "db-mpa_a-0.3333329_b-0.6666671", "db-mpa_a-0.5_b-0.5",
        "morl_a-0.5_b-0.5_old", "morl_a-0.5_b-0.5_new",
        "db-kla_a-1_lambda-1.0000001", "db-kla_a-1_lambda-1.0000002",
    ]  # fmt: skip
    assert near[0].label == "db-mpa_a-0.333333_b-0.666667"  # the caller's own is left alone


def test_blends_that_no_label_tells_apart_are_refused() -> None:
    options: list[dict[str, Any]] = [{"candidates": 3}, {"candidates": "3"}]
    with pytest.raises(ValueError, match="two blends share the label 'code_a-1_candidates-3'"):
        expand([BlendSpec("code", {"a": 1.0}, options=each) for each in options])


def test_a_label_is_one_folder() -> None:
    spec = BlendSpec("code", {"a": 1.0}, options={"file": "/etc/passwd", "other": "..\\x"})
    assert Path(spec.label).name == spec.label and "\\" not in spec.label


SAME = BlendSpec("db-mpa", {"a": 0.3, "b": 0.7})


@pytest.mark.parametrize(
    "other",
    [
        BlendSpec("rewarded-soup", {"a": 0.3, "b": 0.7}),
        BlendSpec("db-mpa", {"a": 0.1 + 0.2, "b": 0.7}),  # 0.30000000000000004
        BlendSpec("db-mpa", {"a": 0.3, "c": 0.7}),
        BlendSpec("db-mpa", {"a": 0.3, "b": 0.7}, kl_scale=1.5),
        BlendSpec("db-mpa", {"a": 0.3, "b": 0.7}, adapter="x"),
        BlendSpec("db-mpa", {"a": 0.3, "b": 0.7}, options={"x": 1}),
    ],
)
def test_a_key_holds_everything_an_image_depends_on(other: BlendSpec) -> None:
    assert other.key != SAME.key
    assert SAME.key == BlendSpec("db-mpa", {"b": 0.7, "a": 0.3, "c": 0.0}).key
    assert blend_key(json.loads(json.dumps(SAME.columns()))) == SAME.key  # as rows keep it


def test_db_mpa_ls_draws_in_the_order_of_its_weights_so_its_key_has_it() -> None:
    one, other = (BlendSpec("db-mpa-ls", {name: 0.5 for name in names}) for names in ("ab", "ba"))
    assert one.key != other.key
    assert len(expand([one, other])) == 1  # in one evaluation the first stands for both


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BlendSpec("dbmpa", {"a": 1.0}), "method must be one of"),
        (BlendSpec("morl", {"a": 1.0}), "needs adapter"),
        (BlendSpec("morl", {"a": 0.4}, adapter="x"), "sum to 1"),
        (BlendSpec("db-mpa", {"a": 1.0}, adapter="x"), "leave adapter out"),
        (BlendSpec("db-mpa", {"a": 1.0}, options={"num_samples": 4}), "'db-mpa' has no option 'num_samples'"),
        (BlendSpec("base", {"a": 1.0}), "has no weights"),
    ],
)
def test_what_does_not_fit_is_refused(spec: BlendSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.blend()


def test_a_sweep_with_too_few_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 weights per point"):
        BlendSweep(["db-mpa"], ["a", "b", "c"], [0.5]).specs()
    with pytest.raises(ValueError, match="nothing to compare"):
        expand([], [])
    for empty in ("methods", "names", "weights", "kl_scales", "ls_schedules"):
        lists: dict[str, Any] = {"methods": ["db-mpa"], "names": ["a"], "weights": [1]} | {empty: []}
        with pytest.raises(ValueError, match=rf"at least one entry in {empty}, got \[\]"):
            BlendSweep(**lists).specs()
    with pytest.raises(ValueError, match=r"may hold \{w\} and \{kl_scale\} and no other brackets, got 'morl_\{v\}'"):
        BlendSweep(["morl"], ["a"], [1], adapter="morl_{v}").specs()
