"""Sparsities come out as asked, masks only grow, training goes on through them, and bad requests change nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from escort import prune


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3, groups=2), nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1)
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: conv.weight.detach().clone() for name, conv in prune.convolutions(model).items()}


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_pruning_again_reaches_the_higher_sparsity_and_revives_nothing(first, second, across_layers, permanent):
    model = network()
    recipe = prune.global_magnitude if across_layers else prune.uniform
    recipe(model, first)
    before = weights(model)
    if permanent:
        prune.make_permanent(model)
    recipe(model, second)
    after = weights(model)
    assert all(not after[name][before[name] == 0].any() for name in after)
    shares = prune.sparsity(model)
    for name in ["overall"] if across_layers else shares:
        size = sum(w.numel() for w in after.values()) if name == "overall" else after[name].numel()
        slack = 0.5 if name != "overall" or across_layers else 3.0  # each of three layers rounds and keeps a weight
        assert abs(shares[name] - min(max(first, second), 1 - 1 / size)) <= (slack + 1e-6) / size


def test_the_smallest_magnitudes_go():
    model = network()
    before = weights(model)
    prune.uniform(model, 0.7)
    for name, weight in weights(model).items():
        kept = weight != 0
        assert before[name][kept].abs().min() >= before[name][~kept].abs().max()
        assert torch.equal(weight[kept], before[name][kept])


def test_two_of_four_neighbours_stay():
    model = network()
    before = weights(model)
    prune.semi_structured(model)
    for name, weight in weights(model).items():
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
        for first in range(0, weight.shape[1], 4):
            of_tap, were = kept[:, first : first + 4], before[name][:, first : first + 4].abs()
            assert (of_tap.sum(1) == min(2, of_tap.shape[1])).all()
            gone = were.masked_fill(of_tap, 0.0).amax(1)
            assert (were.masked_fill(~of_tap, torch.inf).amin(1) >= gone).all()
    assert prune.sparsity(model)["4"] == 0.5 and prune.sparsity(model)["0"] == pytest.approx(1 / 3)


def test_two_of_four_revives_nothing():
    model = network()
    prune.uniform(model, 0.8)
    before = weights(model)
    prune.semi_structured(model)
    assert all(not weight[before[name] == 0].any() for name, weight in weights(model).items())
    assert prune.sparsity(model)["overall"] > 0.8
    prune.semi_structured(model, kept=1, of=2, skip="0")
    assert prune.sparsity(model)["overall"] > 0.8


def test_global_magnitude_compares_across_layers():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(100.0)
    prune.global_magnitude(model, 0.5)
    shares = prune.sparsity(model)
    assert shares["overall"] == pytest.approx(0.5, abs=1e-3)
    assert shares["0"] < 0.1 < shares["2"]


def test_layerwise_prunes_what_it_names():
    model = network()
    prune.layerwise(model, {"2": 0.75, "4": 0.5})
    shares = prune.sparsity(model)
    assert (shares["0"], shares["2"], shares["4"]) == (0.0, 0.75, 0.5)


@pytest.mark.parametrize("skip", ["0", ["0"], lambda name, conv: conv.in_channels == 3])
@pytest.mark.parametrize("recipe", [prune.uniform, prune.global_magnitude])
def test_skipped_layers_stay_dense(recipe, skip):
    model = network()
    recipe(model, 0.9, skip=skip)
    shares = prune.sparsity(model)
    assert shares["0"] == 0.0 < shares["overall"]
    assert not hasattr(model[0], "weight_mask")


def test_a_tiny_layer_keeps_a_weight():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    prune.uniform(model, 0.99)
    assert prune.sparsity(model) == {"0": 0.0, "overall": 0.0}


def test_pruned_weights_stay_zero_through_training_by_an_optimizer_made_before():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = prune.GradualSchedule(final=0.9, begin=2, end=8, every=2)
    zeros = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights(model).items()}
    for step in range(10):
        target = schedule.apply(model, step, skip="0")
        assert target == schedule.sparsity(step)
        before = weights(model)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        model(torch.randn(2, 3, 8, 8))
        for name, weight in weights(model).items():
            assert not weight[zeros[name]].any()
            zeros[name] = weight == 0
            assert not torch.equal(weight, before[name])  # the optimizer still moves what is left
    assert prune.sparsity(model)["2"] == pytest.approx(0.9)


def test_sparsity_sees_an_optimizer_step_before_the_next_forward():
    model = network()
    prune.uniform(model, 0.5)
    with torch.no_grad():
        model[0].weight_orig.fill_(1.0)  # masked weights moved as well: the mask must still count
    assert prune.sparsity(model)["0"] == 0.5


def test_make_permanent_keeps_the_function_and_drops_the_masks():
    model = network().eval()
    keys = set(model.state_dict())
    prune.uniform(model, 0.8)
    x = torch.randn(2, 3, 8, 8)
    expected, shares = model(x), prune.sparsity(model)
    prune.make_permanent(model)
    prune.make_permanent(model)  # nothing left to do
    assert set(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert prune.sparsity(model) == shares
    copy.deepcopy(model)  # masked modules of torch cannot be copied; permanent ones can


def test_make_permanent_drops_masks_of_any_tensor_and_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4))
    for layer, name in ((model[0], "bias"), (model[1], "weight"), (model[1], "bias")):
        torch_prune.random_unstructured(layer, name, 0.5)
    zeros = [int((tensor == 0).sum()) for tensor in (model[0].bias, model[1].weight, model[1].bias)]
    prune.make_permanent(model)
    assert not any("mask" in name or "orig" in name for name in model.state_dict())
    assert (
        [int((tensor == 0).sum()) for tensor in (model[0].bias, model[1].weight, model[1].bias)] == zeros == [2, 8, 2]
    )


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 9), st.floats(0, 0.5), st.floats(0.5, 0.99))
def test_the_schedule_rises_from_initial_to_final(begin, length, every, initial, final):
    schedule = prune.GradualSchedule(final, begin, begin + length, every, initial)
    levels = [schedule.sparsity(step) for step in range(begin + length + 5)]
    assert levels == sorted(levels)
    assert levels[-1] == levels[begin + length] == final
    assert levels[begin] == pytest.approx(initial)
    assert not any(levels[:begin])


def test_the_schedule_is_cubic_and_holds_between_prunings():
    schedule = prune.GradualSchedule(final=0.8, begin=10, end=50, every=20)
    assert schedule.sparsity(30) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert schedule.sparsity(49) == schedule.sparsity(30)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda m: prune.uniform(m, 1.0), r"\[0, 1\)"),
        (lambda m: prune.uniform(m, -0.1), r"\[0, 1\)"),
        (lambda m: prune.uniform(m, 90), r"for 90 % write 0.9"),
        (lambda m: prune.semi_structured(m, kept=4), r"got kept=4; write kept=2, of=4 for 2:4"),
        (lambda m: prune.global_magnitude(m, float("nan")), r"\[0, 1\)"),
        (lambda m: prune.layerwise(m, {"0": 0.5, "2": 1.5}), r"layer '2': sparsity"),
        (
            lambda m: prune.layerwise(m, {"0": 0.5, "conv9": 0.5}),
            r"'conv9' does not exist; the convolutions are 0, 2, 4",
        ),
        (lambda m: prune.layerwise(m, {"3": 0.5}), r"'3' is a BatchNorm2d, not a convolution"),
        (lambda m: prune.layerwise(m, {}), r"no layer named"),
        (lambda m: prune.uniform(m, 0.5, skip="stem"), r"'stem' does not exist"),
        (lambda m: prune.uniform(m, 0.5, skip=["0", "2", "4"]), r"none of the 3 convolutions"),
        (lambda m: prune.uniform(m[1], 0.5), r"ReLU has no nn.Conv2d"),
        (lambda m: prune.sparsity(nn.Linear(2, 2)), r"Linear has no nn.Conv2d"),
        (lambda m: prune.GradualSchedule(final=1.0, begin=0, end=5), r"final: sparsity"),
        (lambda m: prune.GradualSchedule(final=0.5, begin=0, end=5, initial=0.6), r"must not exceed"),
        (lambda m: prune.GradualSchedule(final=0.5, begin=5, end=5), r"begin < end"),
        (lambda m: prune.GradualSchedule(final=0.5, begin=0, end=5, every=0), r"every"),
    ],
)
def test_bad_requests_raise_and_change_nothing(request_, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        request_(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("recipe", [prune.uniform, prune.global_magnitude])
def test_what_is_of_the_wrong_type_is_named(recipe):
    with pytest.raises(TypeError, match="an nn.Module, got function; pass what it returns"):
        recipe(network, 0.5)
    with pytest.raises(TypeError, match="an nn.Module, got OrderedDict; pass the model"):
        recipe(network().state_dict(), 0.5)
    for sparsity in ("0.9", [0.9], torch.tensor(0.9)):
        with pytest.raises(TypeError, match="sparsity is a number, the share of zeros, got .*0.9.*; write 0.9"):
            recipe(network(), sparsity)


@pytest.mark.parametrize("skip", [None, 0, [0], nn.Conv2d(1, 1, 1), ["0", None]])
def test_what_skip_is_not(skip):
    with pytest.raises(TypeError, match=r"skip is names of layers, or a function of \(name, conv\), got"):
        prune.uniform(network(), 0.5, skip=skip)


def test_counts_are_whole_numbers():
    for counts in ({"kept": 2.0}, {"kept": True}, {"kept": "2"}, {"of": None}):
        with pytest.raises(TypeError, match=f"{next(iter(counts))} is a whole number, got"):
            prune.semi_structured(network(), **counts)
    for steps in ({"begin": "0"}, {"end": 1.5}, {"every": None}):
        with pytest.raises(TypeError, match=f"{next(iter(steps))} is a whole number, got"):
            prune.GradualSchedule(0.9, **{"begin": 0, "end": 10, **steps})


@pytest.mark.parametrize(
    "recipe",
    [
        lambda m: prune.uniform(m, 0.5),
        lambda m: prune.layerwise(m, {"0": 0.5, "2": 0.5}),
        lambda m: prune.global_magnitude(m, 0.5),
        prune.semi_structured,
        lambda m: prune.GradualSchedule(0.5, 0, 1).apply(m, 1),
        prune.sparsity,
    ],
)
def test_weights_without_a_magnitude_are_refused_by_name(recipe):
    for number in (torch.nan, torch.inf):
        model = network()
        model[2].weight.data[0, 0] = number
        with pytest.raises(ValueError, match="layer '2': its weight holds NaN or infinity"):
            recipe(model)
        assert not hasattr(model[0], "weight_mask")
    for absent in (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.LazyConv2d(4, 1)), network().to("meta")):
        with pytest.raises(ValueError, match="its weight has no numbers yet; run the model once, or load"):
            recipe(absent)


def test_a_layer_of_the_name_of_the_total_is_refused():
    model = nn.Sequential()
    model.add_module("overall", nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="layer 'overall': the share of all layers together has that name; rename"):
        prune.sparsity(model)


def test_sparsities_of_layers_are_by_name():
    with pytest.raises(TypeError, match=r"takes {name: sparsity}, got 0.9; uniform takes one for all layers"):
        prune.layerwise(network(), 0.9)


def test_a_parametrized_weight_is_refused_by_name():
    model = network()
    parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match="layer '2': its weight is computed by a parametrization"):
        prune.uniform(model, 0.5)
    assert not hasattr(model[0], "weight_mask")
