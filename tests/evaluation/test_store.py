from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dblightning.evaluation.specs import BlendSpec, expand
from dblightning.evaluation.store import Evaluation, Key, RowStore, key_of

SETTINGS: dict[str, Any] = {"guidance_scale": 3.0, "rewards": {"a": {"class": "A"}}, "made_with": {"dtype": "float32"}}
EVALUATION = Evaluation(SETTINGS)


def row(blend: str, prompt_id: int, seed: int = 0, value: float = 0.1) -> dict[str, Any]:
    return {
        **BlendSpec("base").columns(), "blend": blend, "prompt_id": prompt_id, "prompt": f"prompt {prompt_id}",
        "seed": seed, "reward/a": value, "thumbnail": bytes(range(192)),
    }  # fmt: skip


def key(prompt_id: int) -> Key:
    return Key(BlendSpec("base").key, prompt_id, f"prompt {prompt_id}", 0)


def filled(folder: Path, count: int = 3) -> RowStore:
    store = RowStore(folder)
    store.open(EVALUATION)
    for each in range(count):
        store.append([row("base", each)])
    return store


def test_rows_come_back_as_they_were_to_the_last_bit(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.open(EVALUATION)
    rows = [row("base", 0, value=0.1 + 0.2), row("base", 1, value=float("nan")), row("base", 2, value=-1e-300)]
    store.append(rows)
    found = {each["prompt_id"]: each for each in RowStore(tmp_path).read()}
    assert found[0] == rows[0] and found[2] == rows[2]
    assert math.isnan(found[1]["reward/a"])


def test_a_row_of_an_earlier_version_is_read_under_todays_names(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    store.append([row("base", 0) | {"unet_rows": 20.0}])
    (found,) = RowStore(tmp_path).read()
    assert found["denoiser_rows"] == 20.0 and "unet_rows" not in found


def test_a_line_cut_short_is_left_out_and_the_rest_kept(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    again = RowStore(tmp_path)
    assert again.open(EVALUATION) == {key(0), key(1)}
    again.append([row("base", 2)])  # into a file of its own, not behind the torn line
    assert {key_of(each) for each in again.read()} == {key(each) for each in range(3)}


def test_rows_of_all_processes_are_read_and_an_image_counts_once(tmp_path: Path) -> None:
    filled(tmp_path).close()
    other = RowStore(tmp_path)
    other.open(EVALUATION, rank=1)
    other.append([row("base", 2), row("base", 3)])
    assert len(other.read()) == 4


def test_rows_of_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with pytest.raises(ValueError, match=r"guidance_scale was 3.0 and is 5.0; set another --model.out"):
        RowStore(tmp_path).open(Evaluation(SETTINGS | {"guidance_scale": 5.0}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


MORL = BlendSpec("morl", {"a": 0.5, "b": 0.5}, adapter="first")


def morl_rows(folder: Path, spec: BlendSpec = MORL) -> None:
    store = RowStore(folder)
    store.open(Evaluation(SETTINGS, {"first": "0" * 64}, [spec], {0: "a red dot"}))
    store.append([spec.columns() | {"prompt_id": 0, "prompt": "a red dot", "seed": 0, "reward/a": 0.1}])
    store.close()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            Evaluation(SETTINGS, {"first": "0" * 64}, [MORL], {0: "a blue dot", 1: "another"}),
            "rows of other prompts: prompt 0 was 'a red dot' and is 'a blue dot'; set another --model.out",
        ),
        (
            Evaluation(SETTINGS, {"first": "1" * 64}, [MORL], {0: "a red dot"}),
            "another adapter 'first': the SHA-256 of its weights was 000000000000… and is 111111111111…",
        ),
        (
            Evaluation(SETTINGS, {"second": "1" * 64}, [BlendSpec("morl", {"a": 0.5, "b": 0.5}, adapter="second")]),
            "another blend 'morl_a-0.5_b-0.5': its adapter was 'first' and is 'second'",
        ),
        (
            Evaluation(
                SETTINGS, {"first": "0" * 64}, [BlendSpec("morl", {"a": 0.5000001, "b": 0.4999999}, adapter="first")]
            ),
            r"its weights was \{'a': 0.5, 'b': 0.5\} and is \{'a': 0.5000001, 'b': 0.4999999\}",
        ),
        (Evaluation(SETTINGS | {"made_with": {"dtype": "float16"}}), "made_with.dtype was float32 and is float16"),
        (Evaluation(SETTINGS | {"rewards": {"b": {"class": "A"}}}), "rewards was a and is b"),
        (Evaluation(SETTINGS | {"rewards": {"a": {"class": "B"}}}), "rewards.a.class was A and is B"),
    ],
)
def test_rows_of_something_else_are_refused_by_name_and_nothing_is_written(
    tmp_path: Path, evaluation: Evaluation, message: str
) -> None:
    morl_rows(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        RowStore(tmp_path).open(evaluation)
    assert contents(tmp_path) == before


def test_rows_are_found_by_exact_weights_whatever_their_label(tmp_path: Path) -> None:
    weights = [{"a": w, "b": 1 - w} for w in (0.3333331, 0.3333329)]
    alone = BlendSpec("db-mpa", weights[0])
    morl_rows(tmp_path, alone)
    together = expand([BlendSpec("db-mpa", each) for each in weights])
    assert alone.label not in {spec.label for spec in together}
    done = RowStore(tmp_path).check(Evaluation(SETTINGS, {}, together, {0: "a red dot"}))
    assert [Key(spec.key, 0, "a red dot", 0) in done for spec in together] == [True, False]


def test_a_folder_of_an_earlier_version_resumes_and_notes_what_it_lacked(tmp_path: Path) -> None:
    morl_rows(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"guidance_scale": 3.0, "rewards": {"a": {"class": "A"}}}))
    evaluation = Evaluation(SETTINGS, {"first": "0" * 64}, [MORL], {0: "a red dot"})
    assert RowStore(tmp_path).open(evaluation) == {Key(MORL.key, 0, "a red dot", 0)}
    with pytest.raises(ValueError, match="made_with.dtype was float32 and is float16"):
        RowStore(tmp_path).check(Evaluation(SETTINGS | {"made_with": {"dtype": "float16"}}))


BROKEN = {
    "settings.json": [b"", b'{"guidance_scale": 3', b"[]", b"\xff\xfe"],
    "adapters.json": [b"", b"nothing", b"3"],
    "00000-000.jsonl": [b"\n", b'{"blend": "base"}\n', b"[1]\n", b"\xff\n", b"{\x00}\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, found in BROKEN.items() for each in found])
def test_a_broken_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    morl_rows(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as refused:
        RowStore(tmp_path).check(Evaluation(SETTINGS, {"first": "0" * 64}, [MORL]))
    assert "\n" not in str(refused.value)
    assert "delete" in str(refused.value)


@pytest.mark.parametrize("name", ["settings.json", "adapters.json"])
def test_rows_that_lost_what_they_were_made_with_are_refused(tmp_path: Path, name: str) -> None:
    morl_rows(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds rows but no {name}"):
        RowStore(tmp_path).check(Evaluation(SETTINGS, {"first": "0" * 64}, [MORL]))


def test_a_file_beside_the_rows_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    morl_rows(tmp_path)
    before = (tmp_path / "adapters.json").read_bytes()

    def fail(*paths: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        RowStore(tmp_path).open(Evaluation(SETTINGS, {"second": "2" * 64}, [MORL]))
    assert (tmp_path / "adapters.json").read_bytes() == before
