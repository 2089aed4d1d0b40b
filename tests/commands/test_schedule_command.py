import json
import math
import re
import struct

import pytest

from lbaccel.batch.rules import batch_schedule
from lbaccel.cli import main
from lbaccel.errors import InputError
from lbaccel.recipe.schedule_table import schedule_table

BSI = {
    "batch-schedule": "bsi",
    "global-batch-size": 128,
    "base-lr": 0.1,
    "factor": 5,
    "epochs": 200,
    "num-samples": 50_000,
}
TIME = {key: BSI[key] for key in ("global-batch-size", "base-lr", "epochs", "num-samples")}


def call(flags, *switches):
    """Exit code of the command; a flag that is None is left out."""
    words = []
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return main(["schedule", *words, *switches])


@pytest.fixture
def found(capsys):
    def run(flags):
        assert call(flags, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_bsi_is_printed_as_text(capsys):
    assert call(BSI) == 0
    lines = capsys.readouterr().out.splitlines()
    # 28613 / 78200 = 0.3659
    assert lines[0].startswith("bsi: 28613 updates in 200 epochs of 50000 samples")
    assert lines[0].endswith(", 0.366 of the steady run's 78200")
    assert [line.split() for line in lines[1:]] == [
        ["epochs", "global", "batch", "lr", "updates"],
        ["1-59", "128", "0.1", str(59 * 391)],
        ["60-119", "640", "0.1", str(60 * 79)],
        ["120-159", "3200", "0.1", str(40 * 16)],
        ["160-200", "16000", "0.1", str(41 * 4)],
    ]


def test_json_has_the_phases_and_the_total(found):
    report = found(BSI | {"max-batch-size": 50_000})
    keys = ("epoch", "global_batch_size", "lr", "num_updates")
    assert [tuple(phase[key] for key in keys) for phase in report["segments"]] == [
        (1, 128, 0.1, 23_069),
        (60, 640, 0.1, 4_740),
        (120, 3200, 0.1, 640),
        (160, 16000, 0.1, 164),
    ]
    assert (report["num_updates"], report["num_updates_steady"]) == (28_613, 78_200)
    assert report["update_ratio"] == 28_613 / 78_200


def test_a_decayed_rate_is_the_number_on_paper(found):
    report = found(BSI | {"batch-schedule": "lrd"})
    assert [phase["lr"] for phase in report["segments"]] == [0.1, 0.02, 0.004, 0.0008]


def test_the_other_flags_of_the_rules_arrive(found):
    report = found(
        TIME
        | {
            "batch-schedule": "fast",
            "epochs": 12,
            "milestones": (4, 10),
            "factor": (2, 5),
            "growth": 4,
            "lr-growth": 2,
            "first-epoch": 3,
            "max-batch-size": 2048,
        }
    )
    # 128, x4 at 3 and at 4 (there / 2 too); 2048 is reached
    assert [(s["epoch"], s["global_batch_size"], s["lr"]) for s in report["segments"]] == [
        (1, 128, 0.1),
        (3, 512, 0.2),
        (4, 2048, 0.2),
        (10, 2048, 0.04),
    ]


def test_a_mixed_schedule_of_three_milestones_and_factors(found):
    report = found(
        BSI | {"batch-schedule": "mixed", "milestones": (60, 120, 160), "factor": (4, 4, 50)}
    )
    assert [(s["global_batch_size"], s["lr"]) for s in report["segments"]] == [
        (128, 0.1),
        (128, 0.025),
        (512, 0.025),
        (25600, 0.025),
    ]
    assert report["num_updates"] == 50_531


def test_past_the_maximum_the_note_says_what_is_lost_and_lr_takes_it(found, capsys):
    flags = BSI | {"global-batch-size": 8192, "factor": 2, "base-lr": 0.65}
    assert call(flags) == 0
    # 8192 x 8 / 50000 = 1.31072
    assert "a factor of 1.31072 is lost from epoch 160 on (--past-max lr" in capsys.readouterr().out
    report = found(flags | {"past-max": "lr"})
    assert report["segments"][-1]["lr"] == pytest.approx(0.65 / (8192 * 8 / 50_000), rel=1e-15)
    assert report["notes"] == []
    assert found(BSI)["notes"] == []


def test_the_start_rate_is_scaled_where_a_rule_and_its_reference_are_given(found):
    flags = BSI | {"global-batch-size": 512, "factor": 2, "base-batch-size": 256}
    linear = found(flags | {"lr-scaling": "linear"})
    assert [phase["lr"] for phase in linear["segments"]] == [0.2] * 4
    assert "0.1 at 256" in linear["notes"][0]
    root = found(flags | {"lr-scaling": "sqrt"})
    assert root["segments"][0]["lr"] == pytest.approx(0.1 * math.sqrt(2), rel=1e-15)


def test_warmup_cosine_and_growth_multiply(found):
    """Against the equations, with k = 4 and each rate at the samples seen before its update."""
    n, epochs, warm = 1000, 20, 4
    report = found(
        {
            "batch-schedule": "mixed",
            "global-batch-size": 128,
            "base-lr": 0.1,
            "base-batch-size": 32,
            "lr-scaling": "linear",
            "warmup": "gradual",
            "warmup-epochs": warm,
            "schedule": "cosine",
            "milestones": (3, 8, 12),
            "factor": (4, 2, 2),
            "epochs": epochs,
            "num-samples": n,
        }
    )

    def expected(epoch, offset, factor):
        s = (epoch - 1) * n + offset
        if s < warm * n:
            return 0.4 * factor * (0.25 + 0.75 * s / (warm * n))
        share = (s - warm * n) / ((epochs - warm) * n)
        return 0.4 * factor * (1 + math.cos(math.pi * share)) / 2

    # the last update of an epoch of ceil(1000 / B) starts at (ceil(1000 / B) - 1) B
    for row, (first, last, offset, factor) in zip(
        report["segments"],
        [(1, 2, 896, 1), (3, 7, 896, 1 / 4), (8, 11, 768, 1 / 4), (12, 20, 512, 1 / 4)],
        strict=True,
    ):
        assert row["epoch"] == first
        assert row["lr"] == pytest.approx(expected(first, 0, factor), rel=1e-12)
        assert row["last_lr"] == pytest.approx(expected(last, offset, factor), rel=1e-12)


def test_where_updates_wrap_a_phase_s_rate_is_that_of_its_first_update(found):
    flags = {
        "batch-schedule": "bsi",
        "global-batch-size": 4,
        "base-lr": 1.0,
        "schedule": "cosine",
        "milestones": 2,
        "factor": 2,
        "epochs": 2,
        "num-samples": 10,
        "last-update": "wrap",
    }
    # 0-4-8-12 | 12-20, of 20 samples
    first, second = found(flags)["segments"]
    assert (first["num_updates"], second["num_updates"]) == (3, 1)
    assert first["last_lr"] == pytest.approx((1 + math.cos(math.pi * 8 / 20)) / 2, rel=1e-12)
    for key in ("lr", "last_lr"):
        assert second[key] == pytest.approx((1 + math.cos(math.pi * 12 / 20)) / 2, rel=1e-12)


def test_a_dropped_remainder_is_no_part_of_the_cosine(found):
    flags = TIME | {
        "batch-schedule": "steady",
        "global-batch-size": 4,
        "epochs": 2,
        "num-samples": 10,
        "last-update": "drop",
        "schedule": "cosine",
    }
    (row,) = found(flags)["segments"]
    # updates at 0, 4, 8, 12 of 16 samples
    assert row["num_updates"] == 4
    assert row["last_lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 12 / 16)) / 2, rel=1e-12)


def test_a_run_is_given_in_samples_too(found):
    in_epochs, in_samples = found(BSI), found(BSI | {"epochs": None, "samples": 10_000_000})
    assert in_epochs == in_samples


def test_a_part_of_an_epoch_ends_in_it(capsys):
    assert call(BSI | {"epochs": 160.5, "milestones": (60, 120, 160)}) == 0
    # 25000 samples of 16000
    assert capsys.readouterr().out.splitlines()[-1].split() == ["160-161", "16000", "0.1", "6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch-schedule": "bsii"}, "--batch-schedule='bsii' is not one of"),
        ({"batch-schedule": "steady"}, "rule='steady' does not read factors="),
        ({"samples": 1000}, "--epochs 200 and --samples 1000: a run has one length"),
        ({"epochs": None}, "the run has no length. Use --epochs 200"),
        ({"epochs": "nan"}, "--epochs='nan' is not a number above 0"),
        ({"epochs": None, "samples": 0}, "--samples='0' is not a whole number from 1"),
        ({"world-size": 129}, "global_batch_size=128 from epoch 1 on is smaller than world_size="),
        ({"world-size": 0}, "--world-size='0' is not a whole number from 1"),
        ({"last-update": "drop"}, "Use last_update='keep' or 'wrap'"),
        ({"last-update": "cut"}, "--last-update='cut' is not one of"),
        ({"past-max": "rate"}, "--past-max='rate' is not one of"),
        ({"lr-scaling": "linear"}, "--lr-scaling linear has no reference.* --base-batch-size 256"),
        ({"lr-scaling": "cubic"}, "--lr-scaling='cubic' is not one of"),
        ({"base-batch-size": 256}, "--base-batch-size 256 is not read.* Add --lr-scaling linear"),
        ({"base-lr": 0}, "--base-lr='0' is not a finite number above 0"),
        ({"warmup": "gradual"}, "--warmup gradual has no length. Add --warmup-epochs"),
        ({"warmup-epochs": 5}, "--warmup-epochs 5.0 is not read without a warmup"),
        ({"warmup-start": "zero"}, "--warmup-start zero is not read without a warmup"),
        ({"warmup": "gradual", "warmup-epochs": 5}, "starts at its own peak, 0.1.*start zero"),
        ({"warmup": "stairs", "warmup-epochs": 201}, "is longer than the run"),
        (
            {"warmup": "gradual", "warmup-epochs": 5, "warmup-start": "low"},
            "--warmup-start='low' is not 'reference', 'zero' or a learning rate",
        ),
        ({"schedule": "multistep"}, "--schedule='multistep' is not one of constant, cosine"),
        ({"milestones": (60, 220)}, "epoch 220 is after the last one of a run of 200 epochs"),
        ({"plot": "schedule.bmp"}, "--plot schedule.bmp: draw to one of .png, .svg, .pdf"),
    ],
)
def test_bad_input_ends_with_code_2_and_what_to_type(changes, message, capsys):
    assert call(BSI | changes) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.match(f"error: .*{message}", err)


@pytest.mark.parametrize("rule", ["bsi", "lrd", "steady", "fast", "instant", "mixed"])
def test_every_rule_is_drawn(rule, tmp_path, capsys):
    path = tmp_path / "new" / "schedule.png"
    factor = None if rule in ("steady", "instant") else 2
    assert call(BSI | {"batch-schedule": rule, "factor": factor, "plot": path}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"drawn: {path}"
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert (width, height) == (7 * 120, 5 * 120)


def test_a_picture_that_cannot_be_written_is_bad_input(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(BSI | {"plot": tmp_path / "file" / "a.png"}) == 2
    assert "can't be written" in capsys.readouterr().err


def test_the_curve_that_is_drawn_follows_the_phases():
    run = {"epochs": 200, "num_samples": 50_000}
    phases = batch_schedule("lrd", global_batch_size=128, **run)
    curve = schedule_table(phases, first_lr=0.1, **run).curve
    for epoch, rate in curve:
        # at a change itself both rates are drawn
        expected = {0.1 / 5 ** sum(at >= m for m in (60, 120, 160)) for at in (epoch, epoch - 1e-6)}
        assert any(rate == pytest.approx(one, rel=1e-12) for one in expected)
    assert (curve[0][0], curve[-1][0]) == (1, 201)


def test_a_batch_that_changes_cannot_drop_its_remainder():
    phases = batch_schedule("bsi", global_batch_size=128, epochs=200, num_samples=50_000)
    with pytest.raises(InputError, match="each would leave out other samples"):
        schedule_table(phases, epochs=200, num_samples=50_000, first_lr=0.1, last_update="drop")


def test_an_exponent_without_the_rule_power_is_refused(capsys):
    assert call(BSI | {"lr-exponent": 0.7}) == 2
    assert "--lr-exponent 0.7 is not read without --lr-scaling power" in capsys.readouterr().err


@pytest.mark.parametrize("epochs", [0.5, 2, 3])
def test_a_run_too_short_for_the_default_milestones_says_what_to_type(capsys, epochs):
    assert call(BSI | {"epochs": epochs}) == 2
    assert "Use --milestones" in capsys.readouterr().err
    assert call(BSI | {"epochs": 3, "milestones": 2}) == 0
    assert call(BSI | {"epochs": 4}) == 0


@pytest.mark.parametrize(
    ("rule", "lr", "factor"), [("lrd", 1e-300, 1e9), ("fast", 1.7e308, 2)], ids=["0", "inf"]
)
def test_a_rate_that_is_no_number_any_more_is_refused(capsys, rule, lr, factor):
    flags = BSI | {"batch-schedule": rule, "base-lr": lr, "factor": factor}
    assert call(flags, "--json") == 2
    assert "would have a learning rate of" in capsys.readouterr().err


@pytest.mark.parametrize("length", [{"epochs": 1e300}, {"epochs": None, "samples": 10**15}])
def test_a_run_longer_than_any_is_refused(capsys, length):
    assert call(BSI | length) == 2
    assert "1,000,000" in capsys.readouterr().err
