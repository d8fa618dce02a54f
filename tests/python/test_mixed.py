"""Weight bits layer by layer: the estimate, the knapsack, and plans from a mean, a size or a target."""

import itertools
from dataclasses import replace

import pytest
import torch
from flexq.plan import LayerConfig, Plan
from flexq.planning import widths
from flexq.planning.costs import WidthCosts, measure_width_costs
from flexq.planning.mixed import Mixed, bytes_beside, chosen_layers, summary, with_head
from flexq.planning.sensitivity import Divergence, quantized_layers
from flexq.planning.widths import WidthSensitivity, frontier, in_time, solve, uniform_price
from flexq.quantize.calibrate import calibrate_model
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibrate import model_of, windows

WIDTHS = (4, 5, 6, 8)


@pytest.fixture(scope="module")
def reference():
    reference = model_of("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(20)
    return reference


@pytest.fixture(scope="module")
def mixed(reference):
    return Mixed.of(reference, windows(), Plan.uniform(scheme="channel"))


def layer(name: str, size: int, kl: dict[int, float]) -> WidthSensitivity:
    return WidthSensitivity(name, size, {b: size * b // 8 for b in kl}, kl, dict.fromkeys(kl, 0.0))


def best_of_all(ranking, budget: float) -> float:
    """By trying every combination."""
    least = torch.inf
    for bits in itertools.product(WIDTHS, repeat=len(ranking)):
        price = sum(b * x.parameters for b, x in zip(bits, ranking, strict=True))
        if price <= budget:
            least = min(least, sum(x.kl[b] for b, x in zip(bits, ranking, strict=True)))
    return least


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 100)), min_size=1, max_size=5), st.floats(4, 8))
def test_the_frontier_is_the_best_there_is_at_its_prices(layers, bits):
    ranking = [layer(str(i), size, {b: kl * 4.0**-b for b in WIDTHS}) for i, (size, kl) in enumerate(layers)]
    groups = [[x.name] for x in ranking]
    points = list(frontier(ranking, groups))
    assert [p.price for p in points] == sorted(p.price for p in points)
    for point in points:
        assert point.kl == pytest.approx(best_of_all(ranking, point.price + 1e-9))
    found = solve(ranking, groups, bits * sum(x.parameters for x in ranking))
    assert found.price <= bits * sum(x.parameters for x in ranking) * (1 + 1e-6)


def test_widths_that_gain_nothing_are_left_out():
    """A hull: where 5 bits are hardly better than 4, none gets 5; where 8 are worse than 6, none gets 8."""
    ranking = [layer("a", 10, {4: 1.0, 5: 0.99, 6: 0.1, 8: 0.2})]
    assert [p.bits["a"] for p in frontier(ranking, [["a"]])] == [4, 6]


def test_one_width_everywhere_where_others_are_hardly_better():
    def chosen(first: float, bits: float) -> set[int]:
        kl = {"first": first, "second": 1.0, "third": 1.0}
        ranking = [layer(name, 8, {b: scale * 4.0**-b for b in WIDTHS}) for name, scale in kl.items()]
        mixed = Mixed(Plan(), {}, ranking, [[name] for name in kl])
        asked = mixed.at_bits(bits)
        assert mixed.at_bytes(bits * 3).bits == asked.bits  # 24 weights
        assert asked.price <= 24 * bits
        assert asked.kl == pytest.approx(sum(x.kl[asked.bits[x.name]] for x in ranking))
        return set(asked.bits.values())

    assert chosen(1.0, 6.0) == {6} and chosen(1.0, 8.0) == {8}
    assert chosen(1e-9, 6.0) == {4, 6, 8}  # the first's weights hardly matter
    assert chosen(1.0, 5.5) == {5, 6}
    assert chosen(7.0, 6.0) == {6}  # 8 bits in the first and 5 in the others would have 6% less
    assert chosen(20.0, 6.0) == {5, 8}


def test_groups_have_one_width():
    ranking = [layer("q", 10, {b: 4.0**-b for b in WIDTHS}), layer("k", 1, {b: 9 * 4.0**-b for b in WIDTHS})]
    for point in frontier(ranking, [["q", "k"]]):
        assert point.bits["q"] == point.bits["k"]
    with pytest.raises(ValueError, match="the budget must be 44 or more, what the cheapest widths take; got 30"):
        solve(ranking, [["q", "k"]], 30)


def test_a_width_that_takes_longer_and_errs_more_is_left_out():
    """Times need not grow with the width: 5 bits are slower than 6 here, 4 as fast as those."""
    ranking = [layer("a", 10, {b: 4.0**-b for b in WIDTHS})]
    costs = WidthCosts({"a": {4: 7.0, 5: 9.0, 6: 7.0, 8: 11.0}}, "a device", 1)
    assert [(p.bits["a"], p.price) for p in frontier(ranking, [["a"]], in_time(costs))] == [(6, 7.0), (8, 11.0)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 100)), min_size=1, max_size=5), st.floats(4, 8))
def test_the_price_of_fractional_bits_is_between_that_of_widths(layers, bits):
    ranking = [layer(str(i), size, {b: kl * 4.0**-b for b in WIDTHS}) for i, (size, kl) in enumerate(layers)]
    assert uniform_price(ranking, bits) == pytest.approx(bits * sum(x.parameters for x in ranking))
    costs = WidthCosts({x.name: {4: 1.0, 5: 2.0, 6: 4.0, 8: 5.0} for x in ranking}, "a device", 1)
    assert uniform_price(ranking, 5.5, in_time(costs)) == pytest.approx(3.0 * len(ranking))


def test_estimate_is_near_what_is_measured(reference, mixed):
    """The KL of uniform widths, summed over layers, and the order of a few layers at 4 bits."""
    divergence = Divergence(reference, windows())
    for bits in WIDTHS:
        plan = Plan.uniform(scheme="channel", weight_bits=bits)
        measured = divergence.mean(quantize_model(shared_copy(reference), plan))
        estimated = sum(x.kl[bits] for x in mixed.ranking)
        assert 0.4 < estimated / measured < 2.5, (bits, estimated, measured)
    single = []
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        plan = Plan(LayerConfig(scheme="channel", weight_bits=8), {name: LayerConfig(scheme="channel", weight_bits=4)})
        single.append(divergence.mean(quantize_model(shared_copy(reference), plan)))
    by_name = {x.name: x.kl[4] for x in mixed.ranking}
    order = by_name["model.layers.0.mlp.down_proj"] > by_name["model.layers.1.self_attn.q_proj"]
    assert order == (single[0] > single[1])


def test_estimate_of_calibrated_weights(reference, mixed):
    """Scaled, layer by layer, to what a calibrated model's errors are at 6 bits; activations' part stays."""

    def calibrate(plan):
        return calibrate_model(shared_copy(reference), windows(), plan)

    found = Mixed.of(reference, windows(), Plan.uniform(scheme="channel"), calibrate=calibrate)
    exact = widths.estimate(reference, {6: calibrate(Plan.uniform(scheme="channel"))}, windows())
    for nearest, scaled, at_6 in zip(mixed.ranking, found.ranking, exact, strict=True):
        if at_6.kl[6] > 0.4 * nearest.kl[6]:
            assert scaled.kl[6] == pytest.approx(min(at_6.kl[6], nearest.kl[6]), rel=0.05)
        else:  # of what calibration takes away, no more than three quarters are relied on
            assert at_6.kl[6] * 0.99 < scaled.kl[6] < 0.5 * nearest.kl[6]
        assert all(scaled.kl[bits] <= nearest.kl[bits] * 1.001 for bits in WIDTHS)
        assert scaled.kl[4] > scaled.kl[5] > scaled.kl[6] > scaled.kl[8]
        assert scaled.bytes == nearest.bytes


def test_merged_layers_are_found(mixed):
    assert [group for group in mixed.groups if len(group) > 1] == [
        group
        for i in (0, 1)
        for group in (
            [f"model.layers.{i}.self_attn.{part}_proj" for part in "qkv"],
            [f"model.layers.{i}.mlp.{part}_proj" for part in ("gate", "up")],
        )
    ]


def test_a_mean_number_of_bits(reference, mixed):
    chosen = mixed.at_bits(5.0)
    plan = mixed.plan_at(chosen, asked_bits=5.0)
    assert plan.produced_by["mean_weight_bits"] <= 5.0 and plan.produced_by["asked_bits"] == 5.0
    model = quantize_model(shared_copy(reference), plan)
    total = sum(x.num_weights for x in quantized_layers(model).values())
    bits = sum(x.num_weights * x.config.weight_bits for x in quantized_layers(model).values()) / total
    assert 4.6 < bits <= 5.0 and bits == pytest.approx(plan.produced_by["mean_weight_bits"], abs=1e-3)
    assert f"{bits:.2f} bits in the mean" in summary(mixed, model.flexq_plan)
    assert chosen.kl < sum(x.kl[5] for x in mixed.ranking)  # better than 5 bits everywhere


def test_a_time(mixed):
    """Where the first block's layers take as long at every width, they get 8 bits and the second's the rest."""
    flat = {name: name.startswith("model.layers.0.") for name in (x.name for x in mixed.ranking)}
    costs = WidthCosts({n: {b: 8.0 if f else float(b) for b in WIDTHS} for n, f in flat.items()}, "a device", 3)
    timed = replace(mixed, costs=costs)
    chosen = timed.at_bits(5.0)
    assert chosen.price <= (8 + 5) * 7 and {chosen.bits[name] for name, f in flat.items() if f} == {8}
    assert chosen.kl < mixed.at_bits(5.0).kl
    plan = timed.plan_at(chosen)
    assert plan.produced_by["microseconds"] == chosen.price and plan.produced_by["budget_of"] == "time"
    assert f"{chosen.price:.0f} us for 3 tokens on a device, where 6 bits everywhere take 98 us" in summary(timed, plan)
    assert timed.at_kl(chosen.kl).price == chosen.price
    for bits in (3, 9):
        with pytest.raises(ValueError, match=f"weight bits must be from 4 to 8 in the mean, got {bits}"):
            timed.at_bits(bits)


def test_times_are_measured_once_a_shape(reference):
    plan = with_head(reference, Plan.uniform(scheme="channel"))
    costs = measure_width_costs(reference, chosen_layers(reference, plan), tokens=2)
    times = costs.microseconds
    assert (costs.device, costs.tokens, len(times)) == ("CPU", 2, 14)
    assert all(set(each) == set(WIDTHS) and min(each.values()) > 0 for each in times.values())
    assert times["model.layers.0.self_attn.k_proj"] is times["model.layers.1.self_attn.v_proj"]


def test_a_number_of_bytes(reference, mixed):
    chosen = mixed.at_bytes(0.75 * sum(x.bytes[8] for x in mixed.ranking))
    model = quantize_model(shared_copy(reference), mixed.plan_at(chosen))
    stored = sum(x.stored_bytes for x in quantized_layers(model).values())
    assert stored == chosen.price <= 0.75 * sum(x.bytes[8] for x in mixed.ranking)
    every = sum(p.numel() * p.element_size() for p in reference.parameters())
    weights = sum(x.num_weights for x in quantized_layers(model).values())
    assert bytes_beside(reference, mixed.plan, mixed.resolved) == every - 4 * weights


def test_a_target(reference, mixed):
    divergence = Divergence(reference, windows())

    def quantize(plan):
        return calibrate_model(shared_copy(reference), windows(), plan)

    uniform = divergence.mean(quantize(Plan.uniform(scheme="channel", weight_bits=5)))
    model, reached = mixed.for_target(uniform, quantize, divergence)
    assert reached <= uniform and model.flexq_plan.produced_by["measured_kl"] == reached
    assert model.flexq_plan.produced_by["mean_weight_bits"] < 5.5
    with pytest.raises(ValueError, match="cannot be met: the nearest model tried has"):
        mixed.for_target(1e-9, quantize, divergence)


def test_the_head_keeps_its_width(reference):
    plan = with_head(reference, Plan.uniform(scheme="channel"))
    assert plan.layers == {"lm_head": LayerConfig(scheme="channel", weight_bits=8)}
    assert with_head(reference, plan, 6) is plan
    mixed = Mixed.of(reference, windows()[:1], plan)
    assert "lm_head" not in {x.name for x in mixed.ranking} and mixed.fixed_bytes == 96 * (128 + 2)
    model = quantize_model(shared_copy(reference), mixed.plan_at(mixed.at_bits(4.5)))
    assert model.lm_head.config.weight_bits == 8


def test_files_round_trip(mixed, tmp_path):
    widths.FILE.save(mixed.ranking, tmp_path / "w.json", model="a")
    assert widths.FILE.load(tmp_path / "w.json") == mixed.ranking
    (tmp_path / "w.json").write_text('{"format": "flexq-sensitivity", "version": 1, "layers": []}')
    with pytest.raises(ValueError, match="is not a file of this version's sensitivity to weight bits"):
        widths.FILE.load(tmp_path / "w.json")
