import math

import pytest
import timm.optim
from hypothesis import given, settings
from hypothesis import strategies as st

from lbaccel.errors import InputError
from lbaccel.scaling import (
    RULES,
    choose_rule,
    explain_lr,
    linear_scaling,
    no_scaling,
    scale_lr,
    sqrt_scaling,
)

# Goyal et al. 2017, table of kn against eta; studies A and D, lr against B (published numbers)
GOYAL = {256: 0.1, 512: 0.2, 1024: 0.4, 2048: 0.8, 4096: 1.6, 8192: 3.2, 16384: 6.4}
STUDY_A = {32: 0.0125, 64: 0.025, 128: 0.05, 256: 0.1, 512: 0.2, 1024: 0.4, 2048: 0.8}
STUDY_D = {32: 0.025, 64: 0.05, 128: 0.1, 256: 0.2, 512: 0.4, 1024: 0.8, 2048: 1.6, 4096: 3.2}

rates = st.floats(1e-6, 100.0)
batches = st.integers(1, 100_000)


@pytest.mark.parametrize(
    ("base_lr", "base_batch_size", "table"),
    [(0.1, 256, GOYAL), (0.1, 256, STUDY_A), (0.025, 32, STUDY_D)],
)
def test_linear_rule_gives_the_learning_rates_of_the_published_tables(
    base_lr, base_batch_size, table
):
    for batch, lr in table.items():
        scaled = scale_lr(
            base_lr, base_batch_size=base_batch_size, global_batch_size=batch, rule="linear"
        )
        assert scaled == pytest.approx(lr, rel=1e-15)


def test_linear_is_the_default_rule():
    sizes = {"base_batch_size": 96, "global_batch_size": 1000}
    assert scale_lr(0.3, **sizes) == linear_scaling(0.3, **sizes)


@given(lr=rates, base=batches, batch=batches)
@settings(deadline=None)
def test_each_rule_is_its_own_function_and_its_equation(lr, base, batch):
    k = batch / base
    sizes = {"base_batch_size": base, "global_batch_size": batch}
    expected = {"linear": lr * k, "sqrt": lr * k**0.5, "none": lr}
    functions = {"linear": linear_scaling, "sqrt": sqrt_scaling, "none": no_scaling}
    for rule in RULES:
        assert scale_lr(lr, **sizes, rule=rule) == functions[rule](lr, **sizes)
        assert scale_lr(lr, **sizes, rule=rule) == pytest.approx(expected[rule], rel=1e-14)


@pytest.mark.parametrize("rule", RULES)
@given(lr=rates, batch=batches)
@settings(deadline=None)
def test_the_reference_batch_keeps_the_reference_learning_rate_exactly(rule, lr, batch):
    assert scale_lr(lr, base_batch_size=batch, global_batch_size=batch, rule=rule) == lr


@pytest.mark.parametrize("rule", RULES)
@given(lr=rates, first=batches, second=batches, third=batches)
@settings(deadline=None)
def test_scaling_twice_equals_scaling_once_to_the_last_batch(rule, lr, first, second, third):
    halfway = scale_lr(lr, base_batch_size=first, global_batch_size=second, rule=rule)
    twice = scale_lr(halfway, base_batch_size=second, global_batch_size=third, rule=rule)
    once = scale_lr(lr, base_batch_size=first, global_batch_size=third, rule=rule)
    assert twice == pytest.approx(once, rel=1e-13)


def test_sqrt_rule_keeps_the_covariance_of_an_sgd_update():
    # covariance of lr * mean of B gradients is proportional to lr^2 / B
    lr = scale_lr(0.01, base_batch_size=32, global_batch_size=500, rule="sqrt")
    assert lr**2 / 500 == pytest.approx(0.01**2 / 32, rel=1e-14)


def test_an_unknown_rule_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"rule='linera' is not one of .*Use rule='linear'\."):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="linera")
    with pytest.raises(InputError, match=r"'linear', 'sqrt', 'none'\. Use one of these"):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="xyz")


def test_rule_auto_points_to_the_function_that_knows_the_optimizer():
    with pytest.raises(InputError, match=r"choose_rule\(optimizer\)\[0\]"):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="auto")


@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan, True, "0.1", None, 10**400])
@pytest.mark.parametrize("name", ["base_lr", "base_batch_size", "global_batch_size"])
@pytest.mark.parametrize("rule", RULES)
def test_a_number_that_is_not_positive_and_finite_is_refused_by_name(name, bad, rule):
    values = {"base_lr": 0.1, "base_batch_size": 256, "global_batch_size": 512, name: bad}
    with pytest.raises(InputError, match=f"{name}=.*Use {name} > 0"):
        scale_lr(values.pop("base_lr"), **values, rule=rule)


def test_rule_auto_is_linear_exactly_for_the_names_that_timm_builds_as_sgd():
    names = timm.optim.list_optimizers()
    assert len(names) > 50
    for name in names:
        built = timm.optim.get_optimizer_info(name).opt_class  # a path for apex and bitsandbytes
        class_name = built if isinstance(built, str) else built.__name__
        assert choose_rule(name)[0] == ("linear" if "SGD" in class_name else "sqrt"), name


@pytest.mark.parametrize("name", ["SGD", "ASGD", "lookahead_sgd", "nesterovw", "bnbsgd8bit"])
def test_rule_auto_is_linear_for_other_spellings_of_sgd(name):
    assert choose_rule(name)[0] == "linear"


@pytest.mark.parametrize(
    "name", ["adam", "AdamW", "lamb", "lars", "nlars", "lion", "adan", "rmsprop", "nadam", "muon"]
)
def test_rule_auto_is_sqrt_for_adaptive_and_layer_wise_optimizers(name):
    rule, reason = choose_rule(name)
    assert rule == "sqrt"
    assert reason.startswith(name)
    assert "Malladi et al. 2022" in reason


def test_an_empty_optimizer_name_is_refused():
    with pytest.raises(InputError, match="names no optimizer"):
        choose_rule(" ")


def test_the_explanation_is_timms_sentence_with_the_reference_batch():
    assert explain_lr(0.1, base_batch_size=256, global_batch_size=512, rule="linear") == (
        "Learning rate (0.2) calculated from base learning rate (0.1 at 256) and global batch size "
        "(512) with linear scaling."
    )
    assert "with no scaling." in explain_lr(
        0.1, base_batch_size=256, global_batch_size=512, rule="none"
    )


def test_the_explanation_prints_no_floating_point_dust():
    text = explain_lr(0.1, base_batch_size=256, global_batch_size=768, rule="linear")
    assert text.startswith("Learning rate (0.3) ")
