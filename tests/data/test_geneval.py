"""GenEval against its published digest, its counts and its rules, read back from the prompts themselves."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from dblightning.data import GenEvalDataModule, geneval
from dblightning.data.geneval import CLASSES, COLORS, Sample
from dblightning.rewards.geneval_rules import known_samples

TRAIN, HELD_OUT, VALIDATION = geneval.train_samples(), geneval.held_out_samples(), geneval.validation_samples()


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_the_553_prompts_have_the_published_digest() -> None:
    assert digest(GenEvalDataModule().train_prompts) == (
        "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
    )


def test_the_benchmark_has_553_samples_of_six_tasks() -> None:
    counts = Counter(sample["tag"] for sample in TRAIN)
    assert sum(counts.values()) == 553
    assert counts["single_object"] == len(CLASSES) == 80
    # a task loses its repeats and no more; the published file's counts per task
    assert {tag: n for tag, n in counts.items() if tag != "single_object"} == {
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }


def test_700_prompts_are_held_out_140_per_task_and_none_is_a_training_scene() -> None:
    prompts = [sample["prompt"] for sample in HELD_OUT]
    assert len(prompts) == len(set(prompts)) == 700
    assert set(Counter(sample["tag"] for sample in HELD_OUT).values()) == {140}
    assert not set(prompts) & {sample["prompt"] for sample in TRAIN}
    # naming the two objects the other way round does not make a scene new
    swapped = {re.sub(r"^a photo of (.*) and (.*)$", r"a photo of \2 and \1", sample["prompt"]) for sample in TRAIN}
    assert not set(prompts) & swapped


def test_the_validation_prompts_are_20_per_task_and_unseen_whatever_the_order_of_their_things() -> None:
    def scene(sample: Sample) -> tuple[str, frozenset[str]]:
        return sample["tag"], frozenset(str(sorted(thing.items(), key=str)) for thing in sample["include"])

    assert set(Counter(sample["tag"] for sample in VALIDATION).values()) == {20}
    assert len({scene(sample) for sample in VALIDATION}) == 100
    assert not {scene(sample) for sample in VALIDATION} & {scene(sample) for sample in TRAIN + HELD_OUT}
    known = known_samples()  # what the GenEval reward looks prompts up in
    assert [known[sample["prompt"]] for sample in VALIDATION] == VALIDATION


def test_more_prompts_than_exist_are_refused_and_all_that_exist_are_found() -> None:
    assert len(geneval.held_out_samples(per_task=160)) == 800
    with pytest.raises(ValueError, match="only 160 unseen counting prompts exist, got per_task=161"):
        geneval.held_out_samples(per_task=161)


def test_any_first_prompts_of_the_held_out_are_balanced_over_tasks() -> None:
    assert set(Counter(sample["tag"] for sample in HELD_OUT[:50]).values()) == {10}


def test_the_held_out_prompts_never_change() -> None:
    """Pinned: scores of different machines and releases are compared prompt by prompt."""
    assert digest([sample["prompt"] for sample in HELD_OUT]) == (
        "d4acd97981ef52d7b7848036af05dc211d5bdb041ff9b5d3ace3901503b68950"
    )


def _thing(words: str) -> dict[str, object]:
    """The thing that words like "an orange couch" name; only an "orange" alone is a fruit."""
    words = re.sub(r"^an? ", "", words)
    first, _, rest = words.partition(" ")
    if first in COLORS and rest in CLASSES:
        return {"class": rest, "count": 1, "color": first}
    assert words in CLASSES
    return {"class": words, "count": 1}


def _read(sample: Sample) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(include, exclude) as a reader of the prompt alone would write them."""
    words = sample["prompt"].removeprefix("a photo of ")
    if match := re.fullmatch(r"(two|three|four) (\D+)", words):
        count = {"two": 2, "three": 3, "four": 4}[match[1]]
        name = next(n for n in CLASSES if match[2] in (f"{n}s", f"{n}es") and (match[2] == f"{n}es") == (n[-1] == "s"))
        return [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
    if match := re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", words):
        return [_thing(match[3]), {**_thing(match[1]), "position": [match[2], 0]}], []
    return [_thing(part) for part in words.split(" and ")], []


@pytest.mark.parametrize("samples", [TRAIN, HELD_OUT, VALIDATION], ids=["train", "held out", "validation"])
def test_the_metadata_says_what_the_prompt_says(samples: list[Sample]) -> None:
    for sample in samples:
        assert (sample["include"], sample.get("exclude", [])) == _read(sample), sample["prompt"]


@pytest.mark.parametrize("samples", [TRAIN, HELD_OUT, VALIDATION], ids=["train", "held out", "validation"])
def test_nobody_is_painted_and_pairs_differ_in_class_and_colour(samples: list[Sample]) -> None:
    for sample in samples:
        things = sample["include"]
        assert all(thing["class"] != "person" for thing in things if "color" in thing)
        if len(things) == 2:
            assert things[0]["class"] != things[1]["class"]
            assert "color" not in things[0] or things[0]["color"] != things[1]["color"]


def test_batches_carry_the_metadata() -> None:
    module = GenEvalDataModule(eval_batch_size=5)
    batch = next(iter(module.test_dataloader()))
    assert batch["tag"] == ["two_object", "counting", "colors", "position", "color_attr"]
    assert [len(things) for things in batch["include"]] == [2, 1, 1, 2, 2]
    assert [len(things) for things in batch["exclude"]] == [0, 1, 0, 0, 0]
