"""Plans from budgets and targets."""

import copy
from dataclasses import replace

import pytest
import torch
from flexq.plan import Plan
from flexq.planning import choose as planning
from flexq.planning import sensitivity
from flexq.planning.costs import LayerCost, measure_costs
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from test_calibrate import model_of, windows


def costs_of(model, saving: dict[str, float]) -> dict[str, LayerCost]:
    """A8 takes as long as the layer is large; A6 less by the share given for names that end so."""
    return {
        name: LayerCost(
            (1 - next((s for end, s in saving.items() if name.endswith(end)), 0)) * layer.in_features,
            layer.in_features,
            "a device",
        )
        for name, layer in sensitivity.quantized_layers(model).items()
    }


def test_budget(ranking):
    total = sum(r.parameters for r in ranking)
    assert planning.within_budget(ranking, 0.0) == []
    for budget in (0.1, 0.3, 1.0):
        chosen = planning.within_budget(ranking, budget)
        assert sum(r.parameters for r in ranking if r.name in chosen) <= budget * total
    assert set(planning.within_budget(ranking, 1.0)) == {r.name for r in ranking if r.kl > 0}
    with pytest.raises(ValueError, match=r"budget must be a share from 0 to 1, got 1\.5"):
        planning.within_budget(ranking, 1.5)


def test_target(models, ranking):
    reference, model = models
    divergence = sensitivity.Divergence(reference, windows())
    at_6 = shared_copy(model)
    every = list(sensitivity.quantized_layers(at_6).values())
    with sensitivity.act_bits(every, 6):
        worst = sum(divergence(at_6)) / 3
    best = sum(divergence(model)) / 3
    target = (worst + best) / 2
    at_8, reached = planning.for_target(model, divergence.mean, ranking, target)
    assert reached <= target and 0 < len(at_8) < len(ranking)
    assert planning.for_target(model, divergence.mean, ranking, 2 * worst)[0] == []
    with pytest.raises(ValueError, match="cannot be met: with A8 in every layer the model has"):
        planning.for_target(model, divergence.mean, ranking, best / 10)


def test_plan_is_applied(models, ranking):
    model = quantize_model(model_of("llama"))
    at_8 = [r.name for r in ranking[:3]]
    plan = planning.plan_of(model, at_8, {"budget": 0.1})
    planning.apply(model, plan)
    bits = {name: layer.config.act_bits for name, layer in sensitivity.quantized_layers(model).items()}
    assert {name for name, b in bits.items() if b == 8} == set(at_8) and set(bits.values()) == {6, 8}
    assert model.flexq_plan.produced_by["budget"] == 0.1


def test_budget_of_time(models, ranking):
    costs = costs_of(models[1], {})
    for budget in (0.1, 0.4):
        chosen = planning.within_budget(ranking, budget, costs)
        assert 0 < sum(costs[name].at_8 for name in chosen) <= budget * sum(cost.at_8 for cost in costs.values())


def test_better_layers_for_a_target(models):
    reference, _ = models
    model, divergence = quantize_model(shared_copy(reference)), sensitivity.Divergence(reference, windows())
    best = divergence.mean(model)
    worst = sensitivity.estimate(model, reference, windows(), of="quantization")
    floats = {layer.name: reference.get_submodule(layer.name) for layer in worst}
    before = sensitivity.quantized_layers(model)
    with pytest.raises(ValueError, match="cannot be met: at best the model has"):
        planning.replace_for_target(model, floats, divergence.mean, worst, -1)
    assert sensitivity.quantized_layers(model) == before  # left as it was
    left, reached = planning.replace_for_target(model, floats, divergence.mean, worst, best / 2)
    assert reached <= best / 2 and 0 < len(left) < len(worst)
    assert divergence.mean(model) == pytest.approx(reached)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in left)
    plan = planning.plan_of(model, [], {})
    assert [name for name, config in plan.layers.items() if config is None] == sorted(left, key=list(plan.layers).index)


def test_a6_only_where_it_saves_time(models):
    reference, _ = models
    model = quantize_model(shared_copy(reference))
    choice = planning.choose(model, reference, windows(), budget=0.0, costs=costs_of(model, {"up_proj": 0.1}))
    at_6 = [n for n, layer in sensitivity.quantized_layers(model).items() if layer.config.act_bits == 6]
    assert len(at_6) == 2 and all(name.endswith("up_proj") for name in at_6)
    assert "saves no time on a device in 12 of 14 layers" in choice.notes[0]
    choice = planning.choose(model, reference, windows(), budget=0.0, costs=costs_of(model, {"up_proj": 0.01}))
    assert len(choice.at_8) == 14 and "in any layer" in choice.notes[0]
    anywhere = planning.choose(model, reference, windows(), budget=0.0, costs=costs_of(model, {}), a6_anywhere=True)
    assert anywhere.at_8 == [] and anywhere.notes == []


def test_a_target_changes_schemes_and_then_leaves_layers_unquantized(models):
    reference = copy.deepcopy(models[0])
    with (
        torch.no_grad()
    ):  # the last inputs of down_proj are larger than the others, which one scale for all does not bear
        for layer in reference.model.layers:
            layer.mlp.up_proj.weight[128:].mul_(50)
            layer.mlp.down_proj.weight[:, 128:].div_(50)
    divergence = sensitivity.Divergence(reference, windows())

    def quantized(scheme):
        return quantize_model(shared_copy(reference), Plan.uniform(scheme=scheme))

    def chosen(target, in_group):
        model = quantized("channel")
        choice = planning.choose(model, reference, windows(), target_kl=target, in_group=in_group)
        assert divergence.mean(model) == pytest.approx(choice.reached) and choice.reached <= target
        assert model.flexq_plan.produced_by["target_kl"] == target
        return model, choice

    channel, group = divergence.mean(quantized("channel")), divergence.mean(quantized("group"))
    assert group < channel / 2
    model, choice = chosen((channel + group) / 2, lambda: quantized("group"))
    schemes = {n: layer.config.scheme for n, layer in sensitivity.quantized_layers(model).items()}
    assert {n for n, s in schemes.items() if s == "group"} == set(choice.regrouped)
    assert 0 < len(choice.regrouped) <= 14 and choice.unquantized == []
    assert {n: c.scheme for n, c in model.flexq_plan.layers.items()} == schemes
    _, choice = chosen((channel + group) / 2, None)
    assert choice.regrouped == [] and choice.unquantized
    _, choice = chosen(group / 3, lambda: quantized("group"))
    assert len(choice.regrouped) == 14 and choice.unquantized


def test_choose_says_what_it_takes(models):
    reference, model = models
    with pytest.raises(ValueError, match="one of budget, target_kl and target_ppl"):
        planning.choose(model, reference, windows(), budget=0.1, target_kl=0.1)
    with pytest.raises(ValueError, match="takes the layers' costs"):
        planning.choose(model, reference, windows(), budget=0.1, budget_of="time")
    with pytest.raises(ValueError, match='budget_of must be "parameters" or "time"'):
        planning.choose(model, reference, windows(), budget=0.1, budget_of="money")


def test_costs_are_measured_once_a_shape(models):
    costs = measure_costs(models[1], tokens=2)
    assert set(costs) == set(sensitivity.quantized_layers(models[1]))
    assert all(cost.at_6 > 0 and cost.at_8 > 0 and cost.device == "CPU" for cost in costs.values())
    assert costs["model.layers.0.self_attn.k_proj"] == costs["model.layers.1.self_attn.v_proj"]
    assert not replace(costs["model.layers.0.self_attn.k_proj"], at_6=98.0, at_8=100.0).a6_saves
