"""DrawBench's colour prompts, word for word, and the thousand unseen ones."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from dblightning.data import DrawBenchDataModule
from dblightning.data.drawbench import COLORS, OBJECTS, held_out_prompts

SINGLE = re.compile(rf"An? ({'|'.join(COLORS)}) colored ({'|'.join(OBJECTS)})\.")
PAIR = re.compile(
    rf"An? ({'|'.join(COLORS)}) ({'|'.join(OBJECTS)}) and an? ({'|'.join(COLORS)}) ({'|'.join(OBJECTS)})\."
)

TWENTY_FIVE = """A red colored car.
A black colored car.
A pink colored car.
A black colored dog.
A red colored dog.
A blue colored dog.
A green colored banana.
A red colored banana.
A black colored banana.
A white colored sandwich.
A black colored sandwich.
An orange colored sandwich.
A pink colored giraffe.
A yellow colored giraffe.
A brown colored giraffe.
A red car and a white sheep.
A blue bird and a brown bear.
A green apple and a black backpack.
A green cup and a blue cell phone.
A yellow book and a red vase.
A white car and a red sheep.
A brown bird and a blue bear.
A black apple and a green backpack.
A blue cup and a green cell phone.
A red book and a yellow vase."""


def test_the_training_prompts_are_the_25_of_the_colour_category() -> None:
    assert DrawBenchDataModule().train_prompts == TWENTY_FIVE.split("\n")


def test_a_thousand_test_prompts_have_the_two_forms_and_none_was_trained_on() -> None:
    prompts = DrawBenchDataModule().test_prompts
    assert len(prompts) == len(set(prompts)) == 1000
    assert not set(prompts) & set(TWENTY_FIVE.split("\n"))
    singles = [prompt for prompt in prompts if SINGLE.fullmatch(prompt)]
    pairs = [match for prompt in prompts if (match := PAIR.fullmatch(prompt))]
    assert len(singles) + len(pairs) == 1000
    # 10 · 30 single prompts exist, 15 are for training; drawing each form half the time nearly uses them up
    assert 200 < len(singles) <= 285
    assert all(match[1] != match[3] and match[2] != match[4] for match in pairs)


def test_no_pair_is_another_one_or_a_training_pair_the_other_way_round() -> None:
    def scene(prompt: str) -> frozenset[str]:
        return frozenset(re.sub(r"\ban? |\.", "", prompt.lower()).split(" and "))

    module = DrawBenchDataModule()
    assert len({scene(prompt) for prompt in module.train_prompts + module.test_prompts}) == 1025


def test_the_validation_prompts_have_the_two_forms_in_the_test_prompts_mix() -> None:
    prompts = DrawBenchDataModule().val_prompts
    singles = [prompt for prompt in prompts if SINGLE.fullmatch(prompt)]
    pairs = [match for prompt in prompts if (match := PAIR.fullmatch(prompt))]
    assert (len(singles), len(pairs), len(prompts)) == (21, 59, 80)
    assert all(match[1] != match[3] and match[2] != match[4] for match in pairs)
    tested = DrawBenchDataModule().test_prompts
    share = sum(bool(SINGLE.fullmatch(prompt)) for prompt in tested) / len(tested)
    assert abs(len(singles) / len(prompts) - share) < 1 / len(prompts)


def test_more_prompts_than_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="only 39425 unseen colour prompts exist, got count=39426"):
        held_out_prompts(count=39_426)


def test_the_article_follows_the_next_word() -> None:
    for prompt in DrawBenchDataModule().test_prompts:
        for article, word in re.findall(r"\b(an?) (\w)", prompt.lower()):
            assert (article == "an") == (word in "aeiou"), prompt


def test_the_test_prompts_never_change() -> None:
    """Pinned: scores of different machines and releases are compared prompt by prompt."""
    lines = "".join(f"{prompt}\n" for prompt in DrawBenchDataModule().test_prompts)
    assert hashlib.sha256(lines.encode()).hexdigest() == (
        "eac4c0a35f0414da05922b44fab0833a9160ea0c1cc03ae32cfd5393146c9dcb"
    )


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A DrawBench file in miniature; one of its prompts is among the thousand, one among the eighty."""
    shared, validated = DrawBenchDataModule().test_prompts[1], DrawBenchDataModule().val_prompts[1]
    path = tmp_path / "drawbench.csv"
    path.write_text(
        f'Prompts,Category\n{shared},Colors\n{validated},Colors\n"A cat, asleep.",Colors\nThree dogs.,Counting\n'
    )
    return path


def test_a_drawbench_file_gives_the_category_asked_for(csv: Path) -> None:
    module = DrawBenchDataModule(csv=csv)
    assert module.train_prompts[2:] == ["A cat, asleep."]
    assert (len(module.test_prompts), len(module.val_prompts)) == (999, 79)
    assert not set(module.train_prompts) & {*module.test_prompts, *module.val_prompts}
    assert DrawBenchDataModule(csv=csv, category="counting").train_prompts == ["Three dogs."]
    assert len(DrawBenchDataModule(csv=csv, category=None).train_prompts) == 4


def test_an_unknown_category_names_those_there_are(csv: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no prompt of category 'Colour'; its categories are \['Colors', 'Counting'\]"
    ):
        DrawBenchDataModule(csv=csv, category="Colour")
    bare = tmp_path / "bare.csv"
    bare.write_text("prompt,kind\nA cat.,animal\n")
    with pytest.raises(ValueError, match=r"no 'Category' column, only \['kind'\]"):
        DrawBenchDataModule(csv=bare)
