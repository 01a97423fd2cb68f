from __future__ import annotations

import numpy as np
import pytest

from dblightning.miniature import world
from dblightning.miniature.world import Thing

EVERY_THING = [Thing(color, shape) for color in world.COLORS for shape in world.SHAPES]


def test_a_caption_parses_back_to_what_was_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = [(thing,) for thing in EVERY_THING] + [world.sample_things(rng) for _ in range(300)]
    assert {len(things) for things in drawn} == {1, 2}
    for things in drawn:
        assert world.parse(world.caption(things)) == things


def test_captions_read_like_drawbench() -> None:
    assert world.caption([Thing("red", "circle")]) == "A red colored circle."
    assert world.caption([Thing("orange", "ring")]) == "An orange colored ring."
    assert world.caption([Thing("red", "circle"), Thing("orange", "square")]) == "A red circle and an orange square."


@pytest.mark.parametrize(
    "text", ["", "A red car.", "A teal colored circle.", "A red circle and a blue square and a star."]
)
def test_a_caption_outside_the_grammar_is_refused_with_the_caption_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match="the miniature knows captions like") as error:
        world.parse(text)
    assert repr(text) in str(error.value)
    assert "triangle" in str(error.value)  # says what would be understood


def test_an_image_shows_the_asked_colour_where_the_shape_is() -> None:
    rng = np.random.default_rng(1)
    for thing in EVERY_THING:
        image = world.render([thing], rng, "plain")
        assert image.shape == (3, 32, 32) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1
        tint = np.array(world.COLORS[thing.color])[:, None, None]
        # tints move each channel by at most 0.04, so the solid part is within 0.07 (0.04 √3) of its colour
        assert (np.linalg.norm(image - tint, axis=0) < 0.07).sum() > 25
        others = [color for color in world.COLORS if color != thing.color]
        for other in others:
            far = np.linalg.norm(image - np.array(world.COLORS[other])[:, None, None], axis=0)
            assert (far < 0.07).sum() == 0


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_covers_the_area_of_its_outline(shape: str) -> None:
    # areas at outer radius 10, by hand: π 9², 16², triangle of base and height 2 (scaled) cut at y = 0.8, annulus, plus
    area = {
        "circle": np.pi * 81,
        "square": 256.0,
        "triangle": 0.5 * 20 * 18,
        "ring": np.pi * (9.6**2 - 4.8**2),
        "cross": 2 * 6 * 19 - 36,
        "star": 5 * 10.8 * 4.6 * np.sin(np.pi / 5),
    }[shape]
    covered = world.coverage(shape, (16, 16), 10).sum()
    # soft edges: the ramp rounds corners and is not symmetric at them; 3 % is under a quarter pixel of outline
    assert covered == pytest.approx(area, rel=0.03)


def test_the_same_seed_draws_the_same_examples_and_another_seed_others() -> None:
    first, again, other = (list(world.examples(6, seed)) for seed in (3, 3, 4))
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(first, again, strict=True))
    assert any(a[1] != b[1] for a, b in zip(first, other, strict=True))


def test_every_thing_is_drawn_and_a_pair_has_two_colours() -> None:
    rng = np.random.default_rng(5)
    drawn = [world.sample_things(rng) for _ in range(2000)]
    assert {thing for things in drawn for thing in things} == set(EVERY_THING)
    assert all(things[0].color != things[1].color for things in drawn if len(things) == 2)


def test_careless_captions_confuse_colours_and_add_things_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    drawn = [world.sample_things(rng) for _ in range(4000)]
    said = [world.mislabel(things, rng) for things in drawn]
    pairs = [(true, stated) for true, stated in zip(drawn, said, strict=True) if len(true) == 2]
    wrong = [a.color != b.color for true, stated in pairs for a, b in zip(true, stated, strict=True)]
    added = [len(stated) == 2 for true, stated in zip(drawn, said, strict=True) if len(true) == 1]
    # about 4000 and 2000 draws: five standard errors are 0.04 and 0.055
    assert abs(np.mean(wrong) - 0.45) < 0.04
    assert abs(np.mean(added) - 0.6) < 0.055
    for true, stated in pairs:
        for a, b in zip(true, stated, strict=True):
            assert b.color in (a.color, world.CONFUSED[a.color]) and a.shape == b.shape
    for things in said:
        assert world.parse(world.caption(things)) == things


def test_prompts_are_unique_and_disjoint_and_as_many_as_promised() -> None:
    train, test = world.train_prompts(), world.test_prompts()
    assert len(train) == len(set(train)) == 25
    assert len(test) == len(set(test)) >= 300
    assert not set(train) & set(test)
    assert sum(len(world.parse(prompt)) == 1 for prompt in train) == 15
    assert all(world.caption(world.parse(prompt)) == prompt for prompt in train + test)
    # the first 55 keep the training set's 3 : 2
    assert sum(len(world.parse(prompt)) == 1 for prompt in test[:55]) == 33
    assert world.train_prompts() == train and world.test_prompts() == test


@pytest.mark.parametrize("kind", world.BACKGROUNDS)
def test_every_background_is_a_picture_in_range(kind: str) -> None:
    image = world.background(kind, np.random.default_rng(0))
    assert image.shape == (32, 32, 3)
    assert image.min() >= 0 and image.max() <= 1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown background 'fog'"):
        world.background("fog", np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        world.coverage("blob", (16, 16), 8)
    with pytest.raises(ValueError, match="one or two things"):
        world.caption([])


def test_the_wide_prompts_hold_the_short_ones_and_no_test_prompt_and_ask_evenly_for_every_color() -> None:
    wide = world.wide_prompts()
    assert len(wide) == len(set(wide)) == 225
    assert wide[:25] == world.train_prompts()
    assert not set(wide) & set(world.test_prompts())
    counts = [sum(thing.color == color for text in wide for thing in world.parse(text)) for color in world.COLORS]
    assert max(counts) < 1.4 * min(counts)
