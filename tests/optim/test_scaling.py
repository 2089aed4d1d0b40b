import math
from pathlib import Path

import numpy as np
import pytest
import timm.optim
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import rate_of
from scipy.optimize import minimize_scalar

from lbaccel import cli
from lbaccel.errors import InputError
from lbaccel.optim.scaling import (
    CHOICES,
    HELP,
    PER_SAMPLES,
    RULES,
    TABLE,
    choose_rule,
    explain_lr,
    find_rule,
    legw,
    linear_scaling,
    no_scaling,
    per_samples_scaling,
    power_scaling,
    reference_batch,
    rule_named,
    scale_lr,
    sqrt_scaling,
)
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import read_settings

# Published numbers: Goyal et al. 2017, table of kn against eta; then lr against B of
# "large_batch_training" (2021), part 1, and of "On the large-batch training of CIFAR-10" (EPFL)
GOYAL = {256: 0.1, 512: 0.2, 1024: 0.4, 2048: 0.8, 4096: 1.6, 8192: 3.2, 16384: 6.4}
LARGE_BATCH_TRAINING = {32: 0.0125, 64: 0.025, 128: 0.05, 256: 0.1, 512: 0.2, 1024: 0.4, 2048: 0.8}
EPFL = {32: 0.025, 64: 0.05, 128: 0.1, 256: 0.2, 512: 0.4, 1024: 0.8, 2048: 1.6, 4096: 3.2}

# learning rates tuned one by one: the thesis on large and increasing batch sizes
THESIS = {
    128: 0.05,
    256: 0.09,
    512: 0.125,
    1024: 0.155,
    2048: 0.25,
    4096: 0.5,
    8192: 0.65,
    16384: 1.25,
    32768: 2.75,
    50000: 3.0,
}
POWERS = {"linear": 1.0, "sqrt": 0.5, "power": 0.7, "legw": 0.5, "none": 0.0}
ASKED = {rule: {"rule": rule, **({"exponent": 0.7} if rule == "power" else {})} for rule in RULES}

rates = st.floats(1e-6, 100.0)
batches = st.integers(1, 100_000)


@pytest.mark.parametrize(
    ("base_lr", "base_batch_size", "table"),
    [(0.1, 256, GOYAL), (0.1, 256, LARGE_BATCH_TRAINING), (0.025, 32, EPFL)],
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
    sizes = {"base_batch_size": base, "global_batch_size": batch}
    functions = {
        "linear": linear_scaling,
        "sqrt": sqrt_scaling,
        "power": lambda *a, **s: power_scaling(*a, **s, exponent=0.7),
        "legw": lambda *a, **s: legw(*a, **s, warmup_epochs=1.0)[0],
        "none": no_scaling,
    }
    for rule in RULES:
        assert scale_lr(lr, **sizes, **ASKED[rule]) == functions[rule](lr, **sizes)
        expected = lr * (batch / base) ** POWERS[rule]
        assert scale_lr(lr, **sizes, **ASKED[rule]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("rule", RULES)
@given(lr=rates, batch=batches)
@settings(deadline=None)
def test_the_reference_batch_keeps_the_reference_learning_rate_exactly(rule, lr, batch):
    assert scale_lr(lr, base_batch_size=batch, global_batch_size=batch, **ASKED[rule]) == lr


@pytest.mark.parametrize("rule", RULES)
@given(lr=rates, first=batches, second=batches, third=batches)
@settings(deadline=None)
def test_scaling_twice_equals_scaling_once_to_the_last_batch(rule, lr, first, second, third):
    halfway = scale_lr(lr, base_batch_size=first, global_batch_size=second, **ASKED[rule])
    twice = scale_lr(halfway, base_batch_size=second, global_batch_size=third, **ASKED[rule])
    once = scale_lr(lr, base_batch_size=first, global_batch_size=third, **ASKED[rule])
    assert twice == pytest.approx(once, rel=1e-13)


def test_sqrt_rule_keeps_the_covariance_of_an_sgd_update():
    # covariance of lr * mean of B gradients is proportional to lr^2 / B
    lr = scale_lr(0.01, base_batch_size=32, global_batch_size=500, rule="sqrt")
    assert lr**2 / 500 == pytest.approx(0.01**2 / 32, rel=1e-14)


def test_an_unknown_rule_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"rule='linera' is not one of .*Use rule='linear'\."):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="linera")
    with pytest.raises(InputError, match=r"'linear', 'sqrt', .*'per-4096'\. Use one of these"):
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
        scale_lr(values.pop("base_lr"), **values, **ASKED[rule])


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


# -- power, LEGW, per N samples -------------------------------------------------------------------


@given(lr=rates, base=batches, batch=batches)
@settings(deadline=None)
def test_the_power_rule_holds_linear_square_root_and_none(lr, base, batch):
    sizes = {"base_batch_size": base, "global_batch_size": batch}
    for exponent, rule in ((1.0, "linear"), (0.5, "sqrt"), (0.0, "none")):
        found = power_scaling(lr, **sizes, exponent=exponent)
        assert found == pytest.approx(scale_lr(lr, **sizes, rule=rule), rel=1e-14)


def test_rates_tuned_one_by_one_lie_between_the_square_root_and_linear_at_the_stated_power():
    k, lr = np.array(list(THESIS)) / 128, np.array(list(THESIS.values()))
    x, y = np.log(k), np.log(lr)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    left = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    half = 2.306 * error  # Student's t, 8 degrees of freedom, 95 %
    assert round(slope, 2) == 0.69  # what docs/methods.md and the docstring say
    assert [round(slope - half, 2), round(slope + half, 2)] == [0.62, 0.76]
    assert slope - half > 0.5
    assert slope + half < 1
    methods = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    for text in (power_scaling.__doc__, methods):
        assert text is not None
        assert "0.69" in text


def test_the_power_rule_needs_its_exponent_and_no_other_rule_reads_one():
    sizes = {"base_batch_size": 256, "global_batch_size": 512}
    with pytest.raises(InputError, match=r"'power' needs its exponent. Use exponent=0\.7"):
        scale_lr(0.1, **sizes, rule="power")
    with pytest.raises(InputError, match=r"'linear' does not read exponent=0.7"):
        scale_lr(0.1, **sizes, rule="linear", exponent=0.7)
    with pytest.raises(InputError, match=r"exponent=-1 .*Use exponent >= 0"):
        scale_lr(0.1, **sizes, rule="power", exponent=-1)


@given(lr=rates, base=batches, batch=batches, warmup=st.floats(0.0, 100.0))
@settings(deadline=None)
def test_legw_keeps_the_updates_of_the_warmup_and_the_covariance_of_an_update(
    lr, base, batch, warmup
):
    new, epochs = legw(lr, base_batch_size=base, global_batch_size=batch, warmup_epochs=warmup)
    assert epochs / batch == pytest.approx(warmup / base, rel=1e-13)  # updates: epochs x N / B
    assert new**2 / batch == pytest.approx(lr**2 / base, rel=1e-13)


@pytest.mark.parametrize("rule", [*PER_SAMPLES, "per-640"])
@given(lr=rates, batch=batches)
@settings(deadline=None)
def test_a_rate_per_n_samples_is_linear_in_the_batch(rule, lr, batch):
    samples = int(rule.removeprefix("per-"))
    assert reference_batch(rule, 256) == samples
    sizes = {"base_batch_size": samples, "global_batch_size": batch}
    found = scale_lr(lr, **sizes, rule=rule)
    assert found == per_samples_scaling(lr, global_batch_size=batch, samples=samples)
    assert found == pytest.approx(lr * batch / samples, rel=1e-14)


def test_a_rate_per_n_samples_refuses_another_reference_batch_and_a_wrong_spelling():
    with pytest.raises(InputError, match=r"per 512 samples, and base_batch_size=256\. Use base_b"):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="per-512")
    for bad in ("per-0", "per-x", "per-"):
        with pytest.raises(InputError, match="is not one of"):
            scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule=bad)


@pytest.mark.parametrize(("updates", "samples"), [(1_000, 32), (1_000, 512), (50, 2048)])
def test_the_step_sizes_that_the_docs_derive_minimise_the_bound(updates, samples):
    """E f - f* <= D^2 / (eta M) + eta s^2, by search; docs/methods.md, the square root."""
    distance, sigma = 1.3, 0.7

    def best(bound):
        return math.exp(minimize_scalar(lambda x: bound(math.exp(x)), bounds=(-12, 12)).x)

    mean = best(lambda eta: distance**2 / (eta * updates) + eta * sigma**2 / samples)
    # of the sum: K f has gradients K times as large, the same distance, noise K sigma^2
    total = best(lambda eta: (distance**2 / (eta * updates) + eta * samples * sigma**2) / samples)
    assert mean == pytest.approx(distance * math.sqrt(samples / updates) / sigma, rel=1e-4)
    assert total == pytest.approx(distance / math.sqrt(updates * samples * sigma**2), rel=1e-4)
    assert mean == pytest.approx(samples * total, rel=1e-4)


# -- the table of rules ---------------------------------------------------------------------------

ROWS = {rule.name: rule for rule in (*TABLE, rule_named("per-512"))}


@pytest.mark.parametrize("name", ROWS)
@given(k=st.floats(1e-3, 1e3), p=st.floats(0.0, 2.0))
@settings(deadline=None)
def test_the_formula_of_a_rule_is_its_factor(name, k, p):
    row = ROWS[name]
    if row.measured:  # its formula is no function of k
        assert row.factor(k, p) == 1
        return
    written = row.formula_at(repr(k), p)
    assert not set("kp") & set(written.replace("sqrt", "").replace("exp", ""))
    found = eval(written.replace("^", "**"), {"sqrt": math.sqrt, "log": math.log})
    assert found == pytest.approx(row.factor(k, p), rel=1e-12)
    if row.power is not None:
        assert k ** float(row.power) == pytest.approx(row.factor(k, p), rel=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table_holds_together(name):
    row = ROWS[name]
    assert row.factor(1.0, 0.7) == 1
    exponent = 0.7 if "lr_exponent" in row.reads else None
    said = row.explain(0.1, base_batch_size=256, global_batch_size=512, exponent=exponent)
    assert said.startswith("Learning rate (")
    assert "{" not in said
    assert row.source
    assert row.measured or row.samples or row.sure
    assert set(row.reads) <= set(OPTIONS)
    assert row.name in CHOICES
    assert f"{row.name}: {row.help}" in HELP or not row.help or row.samples
    plain = rule_named(row.plain)
    assert plain.factor(3.0, 0.7) == row.factor(3.0, 0.7)
    assert (plain.warmup_times_k, plain.samples, plain.plain) == (False, None, plain.name)
    sizes = {"base_batch_size": 256, "global_batch_size": 1024}
    assert row.warmup(2.0, **sizes) == (8.0 if row.warmup_times_k else 2.0)


def test_auto_is_a_choice_and_no_rule():
    assert find_rule("auto") is None
    assert ("auto", *RULES, *PER_SAMPLES, "adascale") == CHOICES
    with pytest.raises(InputError, match="rule='auto' is not one of"):
        rule_named("auto")


def test_a_measured_rule_has_no_rate_that_follows_from_the_sizes():
    with pytest.raises(InputError, match="rule='adascale' is not one of"):
        scale_lr(0.1, base_batch_size=256, global_batch_size=512, rule="adascale")


# -- the recipe's words ---------------------------------------------------------------------------


def rate(*flags, batch=8192):
    found, _ = read_settings([str(flag) for flag in flags])
    return rate_of(found, batch=batch)


def test_the_recipe_s_legw_multiplies_the_warmup_and_keeps_what_was_asked_for_a_resume():
    found = rate("--lr-scaling", "legw", "--warmup-epochs", 0.5, "--epochs", 90)
    assert (found.lr, found.warmup_epochs) == (pytest.approx(0.1 * math.sqrt(32)), 16.0)
    assert (found.rule, found.asked_warmup_epochs) == ("legw", 0.5)
    assert "warmup of 0.5 epochs at the base batch, 16 here" in found.sentence


def test_the_recipe_s_legw_refuses_a_warmup_beyond_the_run_and_says_what_fits():
    flags = ("--lr-scaling", "legw", "--epochs", 90, "--warmup-epochs")
    with pytest.raises(InputError, match=r"are 160 at 8192, longer than --epochs 90") as error:
        rate(*flags, 5)
    most = float(str(error.value).split("--warmup-epochs ")[2].split()[0])
    assert rate(*flags, most).warmup_epochs == pytest.approx(90, rel=1e-3)
    with pytest.raises(InputError, match="so it must be given"):
        rate(*flags[:-1])
    with pytest.raises(InputError, match="so it must be given"):
        rate("--lr-scaling", "legw", "--warmup", "none")


def test_the_recipe_s_power_needs_lr_exponent_and_other_rules_refuse_it():
    found = rate("--lr-scaling", "power", "--lr-exponent", 0.75, batch=4096)
    assert found.lr == pytest.approx(0.8)
    assert "with power 0.75 scaling." in found.sentence
    with pytest.raises(InputError, match=r"--lr-scaling power needs its exponent. Use --lr-exp"):
        rate("--lr-scaling", "power")
    with pytest.raises(InputError, match=r"--lr-scaling auto does not read --lr-exponent 0.75"):
        rate("--lr-exponent", 0.75)


def test_the_recipe_s_rate_per_n_samples_is_swin_s():
    flags = ("--optimizer", "adamw", "--base-lr", 5e-4, "--lr-scaling", "per-512")
    found = rate(*flags, batch=1024)  # Swin and DeiT: 5e-4 x batch / 512
    assert found.lr == pytest.approx(1e-3)
    assert (found.base_batch_size, "(0.0005 at 512)" in found.sentence) == (512, True)
    assert rate(*flags, "--base-batch-size", 512, batch=1024).lr == found.lr
    with pytest.raises(InputError, match="per 512 samples, and --base-batch-size 128 says"):
        rate(*flags, "--base-batch-size", 128)
    with pytest.raises(InputError, match="per 512 samples, and --base-batch-size 256 says"):
        rate(*flags, "--base-batch-size", 256)  # given, though it is the default


@pytest.mark.parametrize("command", ["train", "transfer"])
def test_a_base_batch_in_a_file_contradicts_a_rate_per_n_samples_too(command, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("base_batch_size: 256\nlr_scaling: per-512\nglobal_batch_size: 512\n")
    flags = ["--dry-run"] if command == "train" else ["--global-batch-size", "1024"]
    assert cli.main([command, "--config", str(path), *flags]) == 2
    assert "per 512 samples, and --base-batch-size 256 says" in capsys.readouterr().err
    assert rate("--config", path, "--base-batch-size", 512).base_batch_size == 512
