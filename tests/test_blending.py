from __future__ import annotations

import math

import pytest
import torch

from dblightning.blending import (
    DBKLA,
    DBMPA,
    DBMPALS,
    METHODS,
    Base,
    BatchWeights,
    Blend,
    RewardedSoup,
    RewardedSoupFactors,
    Single,
    check_weights,
    kl_scales,
    make_blend,
    resolve_blend,
    weights_tensor,
)
from dblightning.draws import DRAWS
from dblightning.evaluation.specs import BlendSpec

NAMES = ["a", "b", "c"]


def coefficients(blend, batch=1, steps=4, step=0, generators=None):
    """Σ_k mix[k, b] · gates[k, b]: each adapter's total coefficient, (B, m), and the base's own, (B,)."""
    gates, mix, _ = blend.start(NAMES, batch, steps, generators)(step)
    base = (mix * (gates == 0).all(-1)).sum(0)
    return (mix.unsqueeze(-1) * gates).sum(0), base


def ls_draws(schedule, weights, steps, count=1, seed=0):
    """The adapter of each step and image, (count, T), over ``count`` images with their own generators."""
    generators = [torch.Generator().manual_seed(seed + each) for each in range(count)]
    plan = DBMPALS(weights, schedule).start(NAMES, count, steps, generators)
    return torch.stack([plan(step).gates[0].argmax(-1) for step in range(steps)], dim=1)


# ── gates and mix ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("blend", "adapters", "base"),
    [
        (Base(), [0, 0, 0], 1),
        (Single("b"), [0, 1, 0], 0),
        (DBMPA({"a": 0.25, "c": 0.75}), [0.25, 0, 0.75], 0),
        (DBKLA("a", 0.4), [0.4, 0, 0], 0.6),
        (DBKLA("a", 1.5), [1.5, 0, 0], -0.5),
        (DBKLA("a", 0), [0, 0, 0], 1),
        (DBMPA({"a": 0.25, "b": 0.75}, kl_scale=2.0), [0.5, 1.5, 0], -1),
        (RewardedSoup({"a": 0.25, "b": 0.75}), [0.25, 0.75, 0], 0),
    ],
)
def test_a_blend_gives_each_model_its_coefficient_of_the_paper(blend, adapters, base) -> None:
    got, got_base = coefficients(blend)
    assert got[0].tolist() == pytest.approx(adapters, abs=1e-7)  # soup gates are float32
    assert got_base.tolist() == [pytest.approx(base, abs=1e-12)]


def test_db_mpa_rows_are_models_and_never_mixtures_of_weights() -> None:
    gates, mix, _ = DBMPA({"a": 0.5, "b": 0.5}).start(NAMES, 1, 4)(0)
    used = gates[mix[:, 0] != 0, 0]
    assert sorted(used.tolist()) == [[0, 1, 0], [1, 0, 0]]


def test_soups_are_one_row_at_the_cost_of_the_base() -> None:
    for soup in (RewardedSoup, RewardedSoupFactors):
        gates, mix, factors = soup({"a": 0.5, "b": 0.5}).start(NAMES, 3, 4)(0)
        assert mix.tolist() == [[1, 1, 1]]
        assert gates.shape == (1, 3, 3)
        assert factors == (soup is RewardedSoupFactors)


def test_every_image_may_have_its_own_weights_and_lambda() -> None:
    blend = DBMPA([{"a": 1.0}, {"b": 0.5, "c": 0.5}], kl_scale=[1.0, 0.5])
    adapters, base = coefficients(blend, batch=2)
    assert adapters.tolist() == [[1, 0, 0], [0, 0.25, 0.25]]
    assert base.tolist() == [0, 0.5]


def test_one_image_may_use_another_adapter_alone() -> None:
    adapters, _ = coefficients(make_blend("single", [{"a": 1}, {"c": 1}]), batch=2)
    assert adapters.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_weights_may_follow_the_step() -> None:
    blend = DBMPA(lambda step, steps: {"a": step / (steps - 1), "b": 1 - step / (steps - 1)})
    assert [coefficients(blend, steps=5, step=step)[0][0, 0].item() for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_schedule_is_checked_whole_before_the_first_step() -> None:
    blend = DBMPA(lambda step, steps: {"a": 1.0 if step < 3 else 1.1})
    with pytest.raises(ValueError, match=r"sum to 1, got \{'a': 1.1\}"):
        blend.start(NAMES, 1, 4)


def test_normalize_divides_by_the_sum() -> None:
    adapters, _ = coefficients(DBMPA({"a": 3, "b": 1}, normalize=True))
    assert adapters[0].tolist() == [0.75, 0.25, 0]


# ── DB-MPA-LS ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schedule", ["iid", "systematic"])
def test_each_steps_marginal_is_exactly_the_weights(schedule: str) -> None:
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    count, steps = 4000, 7
    draws = ls_draws(schedule, weights, steps, count)
    for index, name in enumerate(NAMES):
        share = (draws == index).double().mean(0)
        # 4.5 standard errors: one false alarm in about 7000 runs over the 21 shares
        bound = 4.5 * math.sqrt(weights[name] * (1 - weights[name]) / count)
        assert (share - weights[name]).abs().max() < bound


@pytest.mark.parametrize("weights", [{"a": 0.2, "b": 0.5, "c": 0.3}, {"a": 0.07, "b": 0.93}, {"a": 1 / 3, "c": 2 / 3}])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_systematic_gives_each_adapter_its_share_of_steps_to_within_one(weights, steps: int) -> None:
    draws = ls_draws("systematic", weights, steps, count=50)
    for index, name in enumerate(NAMES):
        taken = (draws == index).sum(1)
        assert (taken - weights.get(name, 0) * steps).abs().max() < 1


def test_systematic_order_is_random() -> None:
    draws = ls_draws("systematic", {"a": 0.5, "b": 0.5}, 10, count=200).double()
    # neighbours of a random order of five a's and five b's agree with probability 4/9; sorted blocks would agree 8/9
    agree = (draws[:, 1:] == draws[:, :-1]).double().mean()
    assert abs(agree - 4 / 9) < 0.05  # 4.3 standard errors: 0.166 per sequence of nine pairs, over 200 sequences


def test_iid_steps_are_independent() -> None:
    draws = ls_draws("iid", {"a": 0.5, "b": 0.5}, 20, count=500).double() - 0.5
    correlation = (draws[:, 1:] * draws[:, :-1]).mean() / 0.25
    assert abs(correlation) < 4.5 / math.sqrt(500 * 19)


def test_an_adapter_of_weight_zero_is_never_drawn() -> None:
    for weights, absent in (({"a": 0.0, "b": 1.0}, [0, 2]), ({"a": 0.5, "b": 0.0, "c": 0.5}, [1])):
        for schedule in ("iid", "systematic"):
            draws = ls_draws(schedule, weights, 50, count=40)
            assert not any((draws == index).any() for index in absent)


def test_a_draw_depends_on_its_images_generator_alone() -> None:
    alone = ls_draws("iid", {"a": 0.5, "b": 0.5}, 20, count=1, seed=3)
    together = ls_draws("iid", {"a": 0.5, "b": 0.5}, 20, count=4, seed=2)
    assert torch.equal(together[1], alone[0])


def test_ls_follows_a_schedule_of_weights() -> None:
    blend = DBMPALS(lambda step, steps: {"a": 1.0} if step < 2 else {"b": 1.0})
    plan = blend.start(NAMES, 1, 4, [torch.Generator().manual_seed(0)])
    assert [plan(step).gates[0, 0].argmax().item() for step in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("schedule", list(DRAWS))
@pytest.mark.parametrize("scale", [0.25, 0.8, 1.0, 1.6])
def test_the_expected_coefficients_of_ls_are_those_of_db_mpa_with_lambda(schedule: str, scale: float) -> None:
    """λ wᵢ of each adapter at every step; for λ ≤ 1 a step is one whole adapter or the base, with probability 1 − λ."""
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    count, steps = 4000, 6
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    plan = DBMPALS(weights, schedule, kl_scale=scale).start(NAMES, count, steps, generators)
    largest = max(scale, 1.0)
    for step in range(steps):
        gates, mix, _ = plan(step)
        assert gates.shape == (1, count, 3) and (mix == 1).all()
        assert set(gates.unique().tolist()) <= {0.0, torch.tensor(largest).item()}
        assert ((gates != 0).sum(-1) <= 1).all()
        expected = scale * torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        # 4.5 standard errors of a draw of size λ or 1: one false alarm in about 7000 runs over each case's 18 shares
        share = expected / largest
        bound = largest * 4.5 * (share * (1 - share) / count).sqrt()
        assert ((gates[0].double().mean(0) - expected).abs() < bound).all()


@pytest.mark.parametrize("schedule", list(DRAWS))
@pytest.mark.parametrize("strengths", [{"a": 0.5, "c": 0.2}, {"a": 2.0, "b": 0.4}, {"b": 3.0}])
def test_the_expected_coefficients_of_ls_are_those_of_db_mpa_with_strengths(
    schedule: str, strengths: dict[str, float]
) -> None:
    weights, own = {"a": 0.2, "b": 0.5, "c": 0.3}, [strengths.get(name, 1.0) for name in NAMES]
    (mixed,) = DBMPA(weights, strengths=strengths).start(NAMES, 1, 1)(0).mix.T
    assert mixed.sum().item() == pytest.approx(1.0)
    count, steps = 4000, 4
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    plan = DBMPALS(weights, schedule, strengths=strengths).start(NAMES, count, steps, generators)
    exact = mixed[0] >= 0  # the base is one of the draws
    for step in range(steps):
        gates = plan(step).gates[0].double()
        assert ((gates != 0).sum(-1) <= 1).all()
        for index, size in enumerate([1.0] * 3 if exact else own):
            assert set(gates[:, index].unique().tolist()) <= {0.0, torch.tensor(size).item()}
            share = float(mixed[1 + index]) / size
            bound = 4.5 * size * (share * (1 - share) / count) ** 0.5
            assert abs(gates[:, index].mean().item() - float(mixed[1 + index])) < bound


def test_strengths_multiply_a_soups_weights_and_change_no_one_elses() -> None:
    weights = {"a": 0.2, "b": 0.8}
    assert RewardedSoup(weights, strengths={"b": 0.5}).start(NAMES, 1, 1)(0).gates.flatten().tolist() == (
        pytest.approx([0.2, 0.4, 0.0])
    )
    step, plain = (DBMPA(weights, 0.7, strengths=each).start(NAMES, 1, 1)(0) for each in ({"a": 1.0}, None))
    torch.testing.assert_close(step.mix, plain.mix, rtol=0, atol=1e-15)
    for strengths, message in (({"x": 1.0}, "names the adapter 'x'"), ({"a": -1.0}, "finite number >= 0, got -1.0")):
        with pytest.raises(ValueError, match=message):
            DBMPA(weights, strengths=strengths).start(NAMES, 1, 1)


def test_lambda_of_ls_is_each_images_own_and_1_is_the_plain_draw() -> None:
    def gates(scale: float | list[float], count: int = 3) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        plan = DBMPALS({"a": 0.4, "b": 0.6}, "rotation", kl_scale=scale).start(NAMES, count, 20, generators)
        return torch.stack([plan(step).gates[0] for step in range(20)])

    plain, mixed = gates(1.0), gates([1.0, 0.0, 1.5])
    assert torch.equal(mixed[:, 0], plain[:, 0])
    assert not mixed[:, 1].any()  # the base model
    assert torch.equal(mixed[:, 2], 1.5 * plain[:, 2])
    assert plain.sum(-1).eq(1).all()
    # in rotation the base has its share of the path, to the steps of a cut into three
    for scale in (0.3, 0.7):
        base = (gates(scale, 50) == 0).all(-1).sum(0)
        assert (base - 20 * (1 - scale)).abs().max() <= 1 + math.log2(3)


def test_lambda_of_ls_follows_a_schedule_of_weights() -> None:
    blend = DBMPALS(lambda step, steps: {"a": 1.0} if step < 2 else {"b": 1.0}, "rotation", kl_scale=0.5)
    plan = blend.start(NAMES, 40, 4, [torch.Generator().manual_seed(seed) for seed in range(40)])
    for step in range(4):
        drawn = plan(step).gates[0]
        assert not drawn[:, 1 if step < 2 else 0].any() and not drawn[:, 2].any()
        assert 5 < drawn.sum() < 35  # half of forty, but for chance


@pytest.mark.parametrize("scale", [-0.5, float("nan"), [1.0, 2.0, 3.0]])
def test_ls_refuses_a_lambda_that_is_none(scale) -> None:
    with pytest.raises(ValueError, match="kl_scale"):
        make_blend("db-mpa-ls", {"a": 1.0}, kl_scale=scale).start(NAMES, 2, 4)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": -0.1, "b": 1.1}, r">= 0, got \{'a': -0.1, 'b': 1.1\}"),
        ({"a": 0.5, "b": 0.4}, r"sum to 1, got .* \(sum 0.9\); divide by their sum or pass normalize=True"),
        ({"a": 0.5, "b": 0.5 + 2e-6}, "sum to 1"),
        ({"a": math.nan, "b": 1.0}, "finite and >= 0"),
        ({"a": math.inf}, "finite and >= 0"),
        ({"a": 0.5, "vila": 0.5}, r"weights name 'vila', but the loaded adapters are \['a', 'b', 'c'\]"),
        ({}, "weights are empty"),
    ],
)
def test_bad_weights_are_refused_with_the_value(weights, says: str) -> None:
    for blend in (DBMPA(weights), DBMPALS(weights), RewardedSoup(weights), RewardedSoupFactors(weights)):
        with pytest.raises(ValueError, match=says):
            blend.start(NAMES, 1, 4)


@pytest.mark.parametrize("weights", [{"a": "much"}, {"a": None}, "a", 0.5])
def test_weights_that_are_no_mapping_to_numbers_are_refused(weights) -> None:
    with pytest.raises(TypeError, match="weights must map names to numbers"):
        check_weights(weights, NAMES)


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 0.5, "b": 0.5 + 5e-7}])
def test_a_sum_off_by_rounding_is_accepted(weights) -> None:
    assert check_weights(weights, NAMES) == weights


def test_normalize_does_not_hide_zero_or_negative_sums() -> None:
    for weights in ({"a": 0.0}, {"a": -1.0}, {"a": -1.0, "b": 2.0}):
        with pytest.raises(ValueError, match=r">= 0"):
            check_weights(weights, NAMES, normalize=True)


def test_lists_of_another_length_than_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="weights for 2 images, but the batch has 3"):
        weights_tensor([{"a": 1.0}] * 2, NAMES, 3)
    with pytest.raises(ValueError, match="kl_scale for 2 images, but the batch has 3"):
        kl_scales([1.0, 1.0], 3)
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        DBMPALS({"a": 1.0}).start(NAMES, 2, 4, [torch.Generator()])


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf, [1.0, -2.0]])
def test_a_negative_or_infinite_lambda_is_refused(scale) -> None:
    batch = len(scale) if isinstance(scale, list) else 1
    for blend in (DBKLA("a", scale), DBMPA({"a": 1.0}, scale)):
        with pytest.raises(ValueError, match=r"kl_scale \(λ\) must be finite and >= 0"):
            blend.start(NAMES, batch, 4)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    import numpy as np

    assert kl_scales(np.float32(0.5), 2).tolist() == [0.5, 0.5]
    assert kl_scales(torch.tensor(0.5), 2).tolist() == [0.5, 0.5]
    assert kl_scales(torch.tensor([0.5, 1.0]), 2).tolist() == [0.5, 1.0]
    assert check_weights({"a": np.float32(1.0)}, NAMES) == {"a": 1.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(method="dbmpa", weights={"a": 1.0}), "method must be one of .* got 'dbmpa'"),
        (dict(method="db-mpa"), "method 'db-mpa' needs weights"),
        (dict(method="base", weights={"a": 1.0}), "method 'base' has no weights"),
        (dict(method="single", weights={"a": 0.5, "b": 0.5}), "takes one adapter of weight 1"),
        (dict(method="db-kla", weights={"a": 0.9}), "takes one adapter of weight 1"),
        (dict(method="rewarded-soup", weights={"a": 1.0}, kl_scale=0.5), "has no kl_scale, got 0.5"),
        (dict(method="single", weights={"a": 1.0}, kl_scale=0.5), "has no kl_scale, got 0.5"),
        (dict(method="base", kl_scale=0.5), "has no kl_scale, got 0.5"),
        (dict(method="db-mpa-ls", weights={"a": 1.0}, ls_schedule="random"), "'rotation', got 'random'"),
    ],
)
def test_settings_a_method_lacks_are_refused_by_name(arguments, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_blend(**arguments)


def test_every_method_name_makes_its_class() -> None:
    for name, kind in METHODS.items():
        assert type(make_blend(name, None if name == "base" else {"a": 1.0})) is kind


def test_a_method_added_to_the_table_makes_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Softened(DBMPA):
        def __init__(self, weights: BatchWeights, kl_scale: float, steepness: float = 1.0) -> None:
            super().__init__(weights, kl_scale)
            self.steepness = steepness

    monkeypatch.setitem(METHODS, "softened", Softened)
    assert type(make_blend("softened", {"a": 1.0})) is Softened
    made = resolve_blend("softened", {"a": 1.0}, kl_scale=2.0, options={"steepness": 3.0})
    assert isinstance(made, Softened)
    assert (made.kl_scale, made.steepness) == (2.0, 3.0)
    spec = BlendSpec("softened", {"a": 1.0}, kl_scale=0.5)
    assert spec.blend().start(["a"], 1, 1)(0).mix[:, 0].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="method 'softened' has no normalize"):
        resolve_blend("softened", {"a": 1.0}, normalize=True)


def test_a_class_may_say_how_a_preference_makes_it() -> None:
    class Pair(Blend):
        def __init__(self, first: str, second: str) -> None:
            self.names = first, second

        @classmethod
        def from_preference(cls, weights=None, kl_scale=1.0, normalize=False, **options):
            return cls(*weights)

        def start(self, adapters, batch, num_steps, generators=None):
            raise NotImplementedError

    assert resolve_blend(Pair, {"a": 0.5, "b": 0.5}).names == ("a", "b")


def test_a_blend_resolves_to_itself_and_takes_no_second_preference() -> None:
    blend = DBMPA({"a": 1.0})
    assert resolve_blend(blend) is blend
    for more in (dict(weights={"b": 1.0}), dict(kl_scale=0.5), dict(normalize=True), dict(options={"x": 1})):
        with pytest.raises(ValueError, match="beside a DBMPA, which has its own"):
            resolve_blend(blend, **more)


def test_systematic_refuses_weights_that_follow_the_step() -> None:
    with pytest.raises(ValueError, match="use rotation"):
        DBMPALS(lambda step, steps: {"a": 1.0}, schedule="systematic")
