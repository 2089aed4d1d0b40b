"""Directions as Li et al. draw them, filter by filter, and the axes that they are walked along."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from torch import nn

from lbaccel.errors import InputError
from lbaccel.landscape.axes import Axis, axis_of, check_grid
from lbaccel.landscape.directions import cosine, length, random_direction, tensors_of
from lbaccel.recipe.bounds import Unfit


def network():
    torch.manual_seed(0)
    return timm.create_model("lbaccel_tiny", num_classes=3).requires_grad_(False)


def test_weights_are_the_parameters_and_states_the_running_statistics_too():
    model = network()
    parameters = dict(model.named_parameters())
    assert set(tensors_of(model, "weights")) == set(parameters)
    extra = set(tensors_of(model, "states")) - set(parameters)
    # the counter of batches is a whole number: nothing lies between two of them
    assert extra == {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for kind in ("running_mean", "running_var")
    }


def test_a_buffer_that_no_checkpoint_holds_does_not_move():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    model.register_buffer("kept", torch.ones(2))
    assert set(tensors_of(model, "states")) == {"weight", "bias", "kept"}


def test_each_filter_of_the_direction_has_the_norm_of_the_weights_filter():
    w = tensors_of(network(), "weights")
    d = random_direction(w, seed=3)
    for name, tensor in w.items():
        if tensor.dim() == 1:
            assert d[name].eq(0).all(), name
            continue
        for ours, theirs in zip(d[name], tensor, strict=True):
            assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-6)
    assert length(d) == pytest.approx(
        math.sqrt(sum(float(t.square().sum()) for t in w.values() if t.dim() > 1)), rel=1e-6
    )


def test_layer_and_weight_are_the_other_two_norms():
    w = tensors_of(network(), "weights")
    plain = random_direction({n: torch.ones_like(t) for n, t in w.items()}, norm="weight")
    layer, weight = (random_direction(w, norm=norm) for norm in ("layer", "weight"))
    for name, tensor in w.items():
        if tensor.dim() > 1:
            assert float(layer[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-6)
            assert torch.allclose(weight[name], plain[name] * tensor, rtol=1e-6)
            assert cosine({name: layer[name]}, {name: plain[name]}) == pytest.approx(1.0, abs=1e-6)


def test_ignoring_nothing_moves_tensors_of_one_dimension_along_themselves():
    w = tensors_of(network(), "states")
    d = random_direction(w, ignore="none")
    for name, tensor in w.items():
        if tensor.dim() == 1:
            assert torch.equal(d[name], tensor), name


def test_the_draw_is_gaussian_and_depends_on_seed_and_axis_alone():
    w = {"w": torch.ones(400, 50)}
    d = random_direction(w, norm="weight", seed=5)["w"]
    assert abs(float(d.mean())) < 0.03 and float(d.std()) == pytest.approx(1.0, abs=0.02)
    assert float((d**4).mean()) == pytest.approx(3.0, abs=0.15)
    assert torch.equal(d, random_direction(w, norm="weight", seed=5)["w"])
    others = [
        random_direction(w, norm="weight", seed=s, axis=a)["w"] for s, a in ((6, 0), (5, 1), (6, 1))
    ]
    for other in others:
        assert abs(cosine({"w": d}, {"w": other})) < 0.03
    state = torch.get_rng_state()
    random_direction(w)
    assert torch.equal(state, torch.get_rng_state())


def test_a_filter_of_zeros_stays_where_it_is():
    d = random_direction({"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])})["w"]
    assert d[0].tolist() == [0, 0] and float(d[1].norm()) == pytest.approx(5.0)


def test_rescaling_a_filter_rescales_its_direction():
    """Networks that BatchNorm makes equal have equal landscapes."""
    w = {"w": torch.randn(4, 3)}
    d, scaled = random_direction(w)["w"], random_direction({"w": w["w"] * 10})["w"]
    assert torch.allclose(10 * d, scaled, rtol=1e-6)


def test_an_axis_has_its_ends_and_its_middle_exactly():
    values = axis_of("-1:1:51").values
    assert len(values) == 51 and values[0] == -1 and values[25] == 0 and values[-1] == 1
    steps = [b - a for a, b in pairwise(values)]
    assert max(steps) - min(steps) < 1e-12
    between = axis_of("-0.5:1.5:51").values
    assert {-0.5, 1.5} <= set(between)
    assert str(Axis(-1.0, 1.0, 51)) == "-1:1:51"


@pytest.mark.parametrize("text", [
    *("", "51", "-1:1", "-1:1:51:2", "1:1:5", "1:-1:5", "a:b:c", "nan:1:5", "-inf:1:5"),
    *("-1:1:1", "-1:1:0", "-1:1:-3", "-1:1:5.5", "-1:1:10002", "-1e7:1:5", "-1:1:1e3"),
])  # fmt: skip
def test_an_axis_that_is_none_is_refused(text):
    with pytest.raises(Unfit, match="is not LOW:HIGH:POINTS, such as -1:1:51"):
        axis_of(text)


def test_a_grid_of_too_many_points_is_refused_with_their_number():
    assert check_grid(axis_of("-1:1:51"), axis_of("-1:1:51")) == 2601
    with pytest.raises(InputError, match="1,002,001 points"):
        check_grid(axis_of("-1:1:1001"), axis_of("-1:1:1001"))
