"""The sheet: every value against its equation, and its file as the recipe reads it."""

from __future__ import annotations

import json
import math

import pytest
import timm.optim
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import rate_of

import lbaccel
from lbaccel import cli, train
from lbaccel.batch.stream import UpdateStream
from lbaccel.commands.transfer import lines
from lbaccel.errors import InputError
from lbaccel.hyperparameters.items import half_life
from lbaccel.hyperparameters.optimizers import decay_of, is_adam
from lbaccel.hyperparameters.transfer import transfer
from lbaccel.recipe.settings import read_settings

GOYAL = {512: 0.2, 1024: 0.4, 2048: 0.8, 4096: 1.6, 8192: 3.2, 16384: 6.4}
batches = st.integers(1, 100_000)


def new(sheet, item):
    return sheet.row(item).new


@pytest.mark.parametrize(("batch", "lr"), GOYAL.items())
def test_goyal_s_recipe_at_each_of_his_batches(batch, lr):
    sheet = lbaccel.transfer(
        base_batch_size=256, global_batch_size=batch, epochs=90, num_samples=1_281_167
    )
    assert sheet.lr == new(sheet, "learning rate") == pytest.approx(lr)
    kept = {"warmup, epochs": 5.0, "momentum": 0.9, "weight decay": 1e-4}
    for item, value in kept.items():
        assert sheet.row(item).old == new(sheet, item) == value
    assert new(sheet, "updates of the run") == math.ceil(90 * 1_281_167 / batch)


@given(base=batches, batch=batches, rule=st.sampled_from(["linear", "sqrt", "none", "power"]))
@settings(deadline=None)
def test_decoupled_decay_keeps_what_is_shrunk_a_sample_and_coupled_is_kept(base, batch, rule):
    """w shrinks by (1 - lr wd) an update: over the same samples by exp(-lr wd samples / B)."""
    sizes = {"base_batch_size": base, "global_batch_size": batch, "lr_scaling": rule}
    options = {**sizes, "lr_exponent": 0.7 if rule == "power" else None, "weight_decay": 0.05}
    sheet = transfer(**options, optimizer="adamw", base_lr=0.001)
    shrinks = sheet.lr * new(sheet, "weight decay") / batch
    assert shrinks == pytest.approx(0.001 * 0.05 / base, rel=1e-12)
    assert new(transfer(**options, optimizer="sgd"), "weight decay") == 0.05
    forced = transfer(**options, optimizer="sgd", base_lr=0.1, decay="decoupled")
    shrinks = forced.lr * new(forced, "weight decay") / batch
    assert shrinks == pytest.approx(0.1 * 0.05 / base, rel=1e-12)
    if rule == "linear":
        assert new(sheet, "weight decay") == pytest.approx(0.05, rel=1e-12)


@given(base=batches, batch=batches, decay=st.floats(0.5, 0.99999))
@settings(deadline=None)
def test_an_average_keeps_its_half_life_in_samples(base, batch, decay):
    sheet = transfer(base_batch_size=base, global_batch_size=batch, ema_decay=decay)
    # after the same samples the same share of the old average is left
    samples = 7 * base * batch
    left = [d ** (samples / b) for d, b in ((decay, base), (new(sheet, "EMA decay"), batch))]
    assert left[1] == pytest.approx(left[0], rel=1e-6, abs=1e-300)


def test_an_average_with_fewer_than_three_half_lives_in_the_run_is_warned_of():
    decay = 0.999
    samples = half_life(decay) * 256  # one half-life
    assert decay ** (samples / 256) == pytest.approx(0.5)
    run = {"base_batch_size": 256, "global_batch_size": 512, "num_samples": round(samples)}
    for epochs, warns in ((2.9, True), (3.1, False)):
        sheet = transfer(**run, epochs=epochs, ema_decay=decay)
        assert any("half-lives" in w for w in sheet.warnings) is warns
    (text,) = transfer(**run, epochs=2.0, ema_decay=decay).warnings
    assert text.startswith("EMA: 2 half-lives")
    fits = float(text.split("of at most ")[1].split()[0])
    assert not transfer(**run, epochs=2.0, ema_decay=fits - 1e-5).warnings
    assert transfer(**run, epochs=2.0, ema_decay=fits + 1e-5).warnings


def test_adam_goes_by_malladi_s_rule_as_a_whole():
    sizes = {"base_batch_size": 256, "global_batch_size": 1024}
    sheet = transfer(**sizes, optimizer="adamw", base_lr=0.001, beta1=0.9, beta2=0.99, eps=1e-8)
    k = 4
    assert sheet.lr == pytest.approx(0.001 * math.sqrt(k))
    assert 1 - new(sheet, "beta1") == pytest.approx(k * 0.1)
    assert 1 - new(sheet, "beta2") == pytest.approx(k * 0.01)
    assert new(sheet, "eps") == pytest.approx(1e-8 / math.sqrt(k))
    assert not sheet.warnings
    linear = transfer(**sizes, optimizer="adamw", lr_scaling="linear")
    assert [new(linear, i) for i in ("beta1", "beta2", "eps")] == [0.9, 0.999, 1e-8]


def test_a_beta_that_would_leave_zero_to_one_is_kept_with_a_warning_that_names_the_limit():
    sizes = {"base_batch_size": 256, "optimizer": "adam"}
    sheet = transfer(**sizes, global_batch_size=8192)
    assert (new(sheet, "beta1"), new(sheet, "beta2")) == (0.9, pytest.approx(0.968))
    (warning,) = [w for w in sheet.warnings if w.startswith("beta1:")]
    limit = float(warning.split("below a batch of ")[1].split(";")[0])
    assert limit == pytest.approx(256 / 0.1)
    assert not transfer(**sizes, global_batch_size=math.ceil(limit) - 1).warnings
    assert transfer(**sizes, global_batch_size=math.ceil(limit)).warnings


def test_betas_beyond_adam_s_convergence_condition_are_warned_of():
    found = transfer(base_batch_size=256, global_batch_size=256 * 400, optimizer="adam")
    assert new(found, "beta2") == pytest.approx(0.6)
    assert any("not below sqrt(beta2)" in w for w in found.warnings)  # 0.81 > 0.77


@pytest.mark.parametrize(
    ("name", "eps"), [("adam", 1e-8), ("adamw", 1e-8), ("adamwlegacy", 1e-8), ("cadamw", 1e-8)]
)
def test_adam_s_values_where_none_are_given_are_those_of_the_optimizer_that_is_built(name, eps):
    built = timm.optim.create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], name, lr=0.1)
    sheet = transfer(base_batch_size=256, global_batch_size=512, optimizer=name)
    old = sheet.row("beta1").old, sheet.row("beta2").old
    assert is_adam(name)
    assert (old, sheet.row("eps").old) == (built.defaults["betas"], built.defaults["eps"])
    assert sheet.row("eps").old == eps


def test_other_optimizers_keep_betas_that_were_given_and_have_none_otherwise():
    sizes = {"base_batch_size": 256, "global_batch_size": 512, "optimizer": "lamb"}
    assert "betas" not in transfer(**sizes).settings
    sheet = transfer(**sizes, beta1=0.9, beta2=0.99, eps=1e-6)
    assert sheet.settings["betas"] == [0.9, 0.99]
    assert sheet.row("beta1").sure == "no derivation for lamb"
    with pytest.raises(InputError, match="lamb needs both"):
        transfer(**sizes, beta1=0.9)


def test_legw_is_the_square_root_with_k_times_the_warmup_and_its_limit():
    sizes = {"base_batch_size": 1024, "global_batch_size": 8192, "lr_scaling": "legw"}
    sheet = transfer(**sizes, base_lr=1.0, warmup_epochs=1.25, epochs=90)
    assert (sheet.lr, new(sheet, "warmup, epochs")) == (pytest.approx(math.sqrt(8)), 10.0)
    # written as what it makes, so that the recipe multiplies nothing again
    assert sheet.settings["lr_scaling"] == "sqrt"
    assert sheet.settings["warmup_epochs"] == 10.0
    with pytest.raises(InputError, match="become 40 at 8192 samples, longer than epochs=30"):
        transfer(**sizes, warmup_epochs=5, epochs=30)


def test_cadences_keep_their_samples_and_never_fall_below_one_update():
    sheet = transfer(
        base_batch_size=256,
        global_batch_size=8192,
        eval_every=0.5,
        log_every=96,
        checkpoint_every=20,
    )
    assert new(sheet, "evaluation, epochs") == 0.5
    assert (new(sheet, "log, updates"), new(sheet, "checkpoint, updates")) == (3, 1)


@pytest.mark.parametrize("batch", [300, 999, 1438])
def test_updates_are_those_of_the_recipe(batch):
    sheet = transfer(base_batch_size=100, global_batch_size=batch, epochs=2.5, num_samples=1438)
    row = sheet.row("updates of the run")
    for size, found in ((100, row.old), (batch, row.new)):
        assert found == UpdateStream(size, 1438).num_updates(2.5)


def test_the_noise_scale_is_the_published_one_and_zero_at_the_full_batch():
    sheet = transfer(base_batch_size=32, base_lr=0.025, global_batch_size=2048, num_samples=50_000)
    row = sheet.row("SGD noise scale")
    assert row.old == pytest.approx(0.025 * (50_000 / 32 - 1))
    assert row.new == pytest.approx(1.6 * (50_000 / 2048 - 1))
    assert f"{row.new / 0.1:.6g}" in row.rule  # over 1 - m
    full = transfer(base_batch_size=32, global_batch_size=50_000, num_samples=50_000)
    assert new(full, "SGD noise scale") == 0


def test_a_rate_per_n_samples_is_moved_from_the_rate_of_the_base_batch():
    sizes = {"base_batch_size": 1024, "global_batch_size": 4096, "optimizer": "adamw"}
    sheet = transfer(**sizes, base_lr=5e-4, lr_scaling="per-512")
    assert (sheet.row("learning rate").old, sheet.lr) == (1e-3, pytest.approx(4e-3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base_batch_size": 0}, "base_batch_size=0 is not a whole number"),
        ({"base_lr": -1.0}, "base_lr=-1.0 is not a finite number above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be in 0..1"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must be in 0..1"),
        ({"decay": "l2"}, "decay='l2' is not one of"),
        ({"lr_scaling": "linaer"}, "rule='linaer' is not one of"),
        ({"lr_scaling": "power"}, "'power' needs its exponent"),
        ({"num_samples": 400}, "a batch of 512 is above num_samples=400"),
        ({"log_every": 0}, "log_every=0 is not a whole number"),
        ({"optimizer": " "}, "names no optimizer"),
    ],
)
def test_bad_input_is_refused_by_name(options, text):
    with pytest.raises(InputError, match=text):
        transfer(**{"base_batch_size": 256, "global_batch_size": 512, **options})


# -- what is known of optimizers by name, measured ------------------------------------------------

# Two steps do not tell: the first does nothing (adopt), is without a normaliser (radam), or
# the update depends on the weights themselves (trust ratios, dual averaging).
NOT_MEASURED = ("adopt", "radam", "lamb", "lar", "madgrad")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_decay_is_decoupled_exactly_where_it_multiplies_the_weights_by_one_minus_lr_decay():
    lr, decay, measured = 0.01, 0.5, 0
    for name in timm.optim.list_optimizers():
        if any(part in name for part in NOT_MEASURED):
            continue
        ends = []
        try:
            for wd in (0.0, decay):
                generator = torch.Generator().manual_seed(1)
                w = torch.nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
                optimizer = timm.optim.create_optimizer_v2([w], name, lr=lr, weight_decay=wd)
                path = [w.detach().clone()]
                for _ in range(2):
                    torch.manual_seed(3)  # of Kron
                    w.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
                    optimizer.step()
                    path.append(w.detach().clone())
                ends.append(path)
        except (AssertionError, RuntimeError):  # of another package, or second order
            continue
        (w0, w1, w2), (_, _, decayed) = ends
        shrunk = (1 - lr * decay) * ((1 - lr * decay) * w0 - (w0 - w1)) - (w1 - w2)
        off = ((shrunk - decayed).norm() / (w2 - decayed).norm()).item()
        assert (decay_of(name) == "decoupled") == (off < 0.02), (name, off)
        measured += 1
    assert measured > 50


# -- the command ----------------------------------------------------------------------------------

SIZES = ("--base-batch-size", 256, "--global-batch-size", 1024)
FLAGS = (*SIZES, "--epochs", 2, "--num-samples", 1438)


def run(*flags, code=0):
    assert cli.main(["transfer", *map(str, flags)]) == code


def test_the_sheet_is_a_diff_within_100_columns(capsys):
    run(*FLAGS, "--ema-decay", 0.999, "--clip-grad-norm", 5, "--log-every", 50, "--weight-decay", 0)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    text = out.splitlines()
    at = text.index("learning rate")
    assert text[at + 1 : at + 3] == ["- 0.1", "+ 0.4"]
    at = text.index("momentum")
    assert text[at + 1] == "  0.9"  # kept
    assert "warning: EMA" in out
    sheet = transfer(
        base_batch_size=256, global_batch_size=1024, epochs=2, num_samples=1438, ema_decay=0.999
    )
    assert all(row.item in lines(sheet) for row in sheet.rows)


def test_json_holds_every_row_and_the_settings(capsys):
    run(*FLAGS, "--optimizer", "adamw", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["k"] == 4
    assert found["lr"] == pytest.approx(0.002)
    rows = {row["item"]: row for row in found["rows"]}
    assert rows["beta1"]["new"] == pytest.approx(0.6)
    assert set(rows["beta1"]) == {"item", "old", "new", "rule", "source", "sure"}
    assert found["settings"]["global_batch_size"] == 1024


@pytest.mark.parametrize(
    "flags",
    [
        ("--ema-decay", 0.99, "--clip-grad-norm", 1, "--eval-every", 1, "--log-every", 4),
        ("--optimizer", "adamw", "--weight-decay", 0.05),
        ("--optimizer", "lamb", "--lr-scaling", "linear", "--beta1", 0.9, "--beta2", 0.99),
        ("--lr-scaling", "power", "--lr-exponent", 0.69),
        ("--lr-scaling", "legw", "--warmup-epochs", 0.25),
        ("--optimizer", "adamw", "--lr-scaling", "per-512", "--base-lr", 5e-4),
        (
            "--lr-scaling",
            "none",
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags[:4])),
)
def test_the_file_is_read_by_the_recipe_which_comes_to_the_sheet_s_values(tmp_path, capsys, flags):
    path = tmp_path / "new.yaml"
    run(*FLAGS, "--warmup-epochs", 0.5, *flags, "--json", "--out", path)
    sheet = json.loads(capsys.readouterr().out)
    settings, _ = read_settings(["--config", str(path)])
    values, origins = settings.values(), settings.origins
    rate = rate_of(settings, batch=settings.batch.global_batch_size)
    rows = {row["item"]: row["new"] for row in sheet["rows"]}
    assert rate.lr == pytest.approx(sheet["lr"], rel=1e-14)
    assert f"Learning rate ({sheet['lr']:.6g}) calculated" in rate.sentence
    assert rate.warmup_epochs == rows["warmup, epochs"]
    assert rate.weight_decay == rows["weight decay"]
    for key, item in (("ema_decay", "EMA decay"), ("clip_grad_norm", "clip norm"), ("eps", "eps")):
        assert values[key] == rows.get(item)
    if "beta1" in rows:
        assert values["betas"] == (rows["beta1"], rows["beta2"])
    assert origins["global_batch_size"] == str(path)


def test_the_recipe_trains_with_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*FLAGS, "--warmup-epochs", 0, "--optimizer", "adamw", "--out", "new.yaml")
    flags = ["--config", "new.yaml", "--model", "test_resnet", "--workers", "0", "--dry-run"]
    assert train.main(flags) == 0
    assert "Learning rate (0.002) calculated from base learning" in capsys.readouterr().out


def test_a_recipe_s_file_is_moved_from_its_own_batch_and_keeps_the_rest(tmp_path, capsys):
    old, path = tmp_path / "old.yaml", tmp_path / "new.yaml"
    recipe = {"model": "resnet18", "data": "cifar10", "global_batch_size": 512, "base_lr": 0.1}
    recipe |= {"lr_scaling": "linear", "ema_decay": 0.999, "epochs": 30, "layer_decay": 0.7}
    old.write_text(yaml.safe_dump(recipe))
    run("--config", old, "--global-batch-size", 4096, "--out", path, "--json")
    sheet = json.loads(capsys.readouterr().out)
    rows = {row["item"]: (row["old"], row["new"]) for row in sheet["rows"]}
    assert rows["learning rate"] == pytest.approx((0.2, 1.6))
    assert rows["EMA decay"] == pytest.approx((0.999, 0.999**8))
    settings, _ = read_settings(["--config", str(path)])
    values = settings.values()
    kept = {key: values[key] for key in ("model", "data", "layer_decay", "epochs")}
    assert kept == {key: recipe[key] for key in kept}
    assert rate_of(settings, batch=4096).lr == pytest.approx(1.6)
    run("--config", old, "--global-batch-size", 4096, "--ema-decay", 0.9999, "--json")
    rows = {row["item"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["EMA decay"]["old"] == 0.9999  # flags win


def test_moving_there_and_back_comes_to_the_recipe_again(tmp_path, capsys):
    there, back = tmp_path / "there.yaml", tmp_path / "back.yaml"
    flags = [
        "--optimizer",
        "adamw",
        "--weight-decay",
        "0.05",
        "--ema-decay",
        "0.999",
        "--epochs",
        "300",
    ]
    run("--base-batch-size", 256, "--global-batch-size", 1024, *flags, "--out", there)
    run("--config", there, "--global-batch-size", 256, "--out", back, "--json")
    settings, _ = read_settings(["--config", str(back)])
    values = settings.values()
    assert values["betas"] == pytest.approx((0.9, 0.999))
    found = [values[key] for key in ("weight_decay", "ema_decay", "eps")]
    assert found == pytest.approx([0.05, 0.999, 1e-8])
    assert rate_of(settings, batch=256).lr == pytest.approx(0.001)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--global-batch-size", 512), "--base-batch-size is missing"),
        ((*FLAGS, "--momentum", 1), "--momentum='1' is not a number of at least 0 and below 1"),
        ((*FLAGS, "--config", "no.yaml"), "no.yaml can't be read"),
        (("--global-batch-size", 512, "--out", "here.yaml", "--base-batch-size", 256), "exists"),
    ],
)
def test_bad_input_ends_with_two_and_says_why(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text("mine: 1\n")
    run(*flags, code=2)
    assert text in capsys.readouterr().err
    assert (tmp_path / "here.yaml").read_text() == "mine: 1\n"


def test_a_base_batch_that_is_not_the_recipe_s_needs_its_own_rate(tmp_path, capsys):
    old = tmp_path / "old.yaml"
    old.write_text("global_batch_size: 512\nbase_lr: 0.1\n")
    flags = ("--config", old, "--base-batch-size", 256, "--global-batch-size", 1024)
    run(*flags, code=2)
    assert "is a recipe for 512" in capsys.readouterr().err
    run(*flags, "--base-lr", 0.3, "--json")
    assert json.loads(capsys.readouterr().out)["lr"] == pytest.approx(1.2)


def moved(tmp_path, capsys, recipe, *flags, batch=512):
    """The sheet of a recipe's file as JSON, and the settings that the file written is read as."""
    old, path = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    run("--config", old, "--global-batch-size", batch, *flags, "--out", path, "--json")
    sheet = json.loads(capsys.readouterr().out)
    return (
        sheet,
        read_settings(["--config", str(old)])[0],
        read_settings(["--config", str(path)])[0],
    )


@pytest.mark.parametrize("more", [{}, {"warmup_epochs": 2}, {"base_batch_size": 256}])
def test_under_a_batch_schedule_the_old_rate_is_the_one_that_the_recipe_trains_at(
    tmp_path, capsys, more
):
    """There the base rate is that of the first batch, and there is no warmup by default."""
    recipe = {"batch_schedule": "bsi", "factor": 2, "global_batch_size": 128, "base_lr": 0.1}
    sheet, old, new = moved(tmp_path, capsys, recipe | {"epochs": 30} | more)
    trained = rate_of(old, batch=128)
    rows = {row["item"]: row for row in sheet["rows"]}
    assert (
        rows["learning rate"]["old"] == trained.lr == (0.05 if "base_batch_size" in more else 0.1)
    )
    assert rows["warmup, epochs"]["old"] == trained.warmup_epochs * (old.rate.warmup != "none")
    found = rate_of(new, batch=512)
    assert found.lr == pytest.approx(4 * trained.lr)
    assert found.warmup_epochs == more.get("warmup_epochs", 0)
    assert "max_batch_size stay as they are" in sheet["warnings"][-1]


def test_a_recipe_by_legw_is_moved_by_legw(tmp_path, capsys):
    """As `lbaccel train --config old.yaml --global-batch-size 1024` would train it."""
    recipe = {"global_batch_size": 512, "lr_scaling": "legw", "warmup_epochs": 2, "epochs": 20}
    _, old, new = moved(tmp_path, capsys, recipe, batch=1024)
    trained, found = (rate_of(s, batch=1024) for s in (old, new))
    assert found.lr == pytest.approx(trained.lr)  # 0.1 sqrt(4)
    assert found.warmup_epochs == trained.warmup_epochs == 8


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("global_batch_size: auto\nmin_batch_size: 64\nmax_batch_size: 512\n", "batch-size auto"),
        ("global_batch_size: 512\nlr_scaling: adascale\n", "--lr-scaling adascale"),
    ],
)
def test_a_recipe_whose_rate_follows_what_is_measured_has_none_to_move(
    tmp_path, capsys, recipe, text
):
    (tmp_path / "old.yaml").write_text(recipe)
    run("--config", tmp_path / "old.yaml", "--global-batch-size", 1024, code=2)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("epochs", [0.5, 3, 30])
def test_without_a_warmup_given_it_is_the_recipe_s_and_fits_in_the_run(tmp_path, capsys, epochs):
    path = tmp_path / "new.yaml"
    run(*SIZES, "--epochs", epochs, "--out", path)
    settings, _ = read_settings(["--config", str(path)])
    assert settings.rate.warmup_epochs == min(5, epochs / 4)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--base-lr", 1e308), "learning rate is inf"),
        (("--lr-scaling", "power", "--lr-exponent", 1000), "learning rate is inf"),
        (("--optimizer", "adamw", "--weight-decay", 1.7e308), "weight decay"),
        (("--epochs", 3, "--warmup-epochs", 5), "longer than the run"),
    ],
)
def test_what_is_out_of_range_is_refused_and_json_stays_json(capsys, flags, text):
    run(*SIZES, *flags, "--json", code=2)
    captured = capsys.readouterr()
    assert text in captured.err and not captured.out
