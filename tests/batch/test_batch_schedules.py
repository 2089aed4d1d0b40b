import json
import math
from dataclasses import asdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbaccel.batch.phases import Phase, check_phases, phase_updates
from lbaccel.batch.rules import RULES, batch_schedule
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError

CIFAR = {"epochs": 200, "num_samples": 50_000}
SIZES = {"global_batch_size": 128, **CIFAR}

# The whole table of the thesis on large and increasing batch sizes: rule, settings, learning rate;
# epoch, batch size and rate of each phase; updates over 200 epochs.
FAST = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 50000]
TABLE = {
    "LRD 128, factor 5": (
        "lrd",
        {"global_batch_size": 128},
        0.1,
        [(1, 128, 0.1), (60, 128, 0.02), (120, 128, 0.004), (160, 128, 0.0008)],
        78_200,
    ),
    "BSI 128, factor 5": (
        "bsi",
        {"global_batch_size": 128},
        0.1,
        [(1, 128, 0.1), (60, 640, 0.1), (120, 3200, 0.1), (160, 16000, 0.1)],
        28_613,
    ),
    "256 BSI2": (
        "bsi",
        {"global_batch_size": 256, "factors": 2},
        0.09,
        [(1, 256, 0.09), (60, 512, 0.09), (120, 1024, 0.09), (160, 2048, 0.09)],
        20_429,
    ),
    "512 BSI2": (
        "bsi",
        {"global_batch_size": 512, "factors": 2},
        0.125,
        [(1, 512, 0.125), (60, 1024, 0.125), (120, 2048, 0.125), (160, 4096, 0.125)],
        10_255,
    ),
    "1024 BSI2": (
        "bsi",
        {"global_batch_size": 1024, "factors": 2},
        0.155,
        [(1, 1024, 0.155), (60, 2048, 0.155), (120, 4096, 0.155), (160, 8192, 0.155)],
        5_198,
    ),
    "2048 LRD2": (
        "lrd",
        {"global_batch_size": 2048, "factors": 2},
        0.25,
        [(1, 2048, 0.25), (60, 2048, 0.125), (120, 2048, 0.0625), (160, 2048, 0.03125)],
        5_000,
    ),
    "2048 BSI2": (
        "bsi",
        {"global_batch_size": 2048, "factors": (2,)},
        0.25,
        [(1, 2048, 0.25), (60, 4096, 0.25), (120, 8192, 0.25), (160, 16384, 0.25)],
        2_699,
    ),
    "2048 BSI 2,2,4 by its factors": (
        "bsi",
        {"global_batch_size": 2048, "factors": (2, 2, 4)},
        0.25,
        [(1, 2048, 0.25), (60, 4096, 0.25), (120, 8192, 0.25), (160, 32768, 0.25)],
        2_617,
    ),
    "2048 BSI 2,2,4 by the doubled end": (
        "bsi-doubled-end",
        {"global_batch_size": 2048, "factors": 2},
        0.25,
        [(1, 2048, 0.25), (60, 4096, 0.25), (120, 8192, 0.25), (160, 32768, 0.25)],
        2_617,
    ),
    "4096 BSI2": (
        "bsi",
        {"global_batch_size": 4096, "factors": 2},
        0.5,
        [(1, 4096, 0.5), (60, 8192, 0.5), (120, 16384, 0.5), (160, 32768, 0.5)],
        1_429,
    ),
    "8192 BSI2, max 50000": (
        "bsi",
        {"global_batch_size": 8192, "factors": 2, "max_batch_size": 50_000},
        0.65,
        [(1, 8192, 0.65), (60, 16384, 0.65), (120, 32768, 0.65), (160, 50000, 0.65)],
        774,
    ),
    "mixed 4/4/50": (
        "mixed",
        {"global_batch_size": 128},
        0.1,
        [(1, 128, 0.1), (60, 128, 0.025), (120, 512, 0.025), (160, 25600, 0.025)],
        50_531,
    ),
    "50000 LRD2": (
        "lrd",
        {"global_batch_size": 50_000, "factors": 2},
        3.0,
        [(1, 50000, 3.0), (60, 50000, 1.5), (120, 50000, 0.75), (160, 50000, 0.375)],
        200,
    ),
    "fast BSI to 8192": (
        "fast",
        {"global_batch_size": 128, "max_batch_size": 8192},
        0.05,
        [(1, 128, 0.05)]
        + [(6 + i, size, 0.05 * 1.3 ** (i + 1)) for i, size in enumerate(FAST[:6])]
        + [(m, 8192, 0.05 * 1.3**6 / 2**k) for k, m in enumerate((60, 120, 160), 1)],
        3_666,
    ),
    "fast BSI to 50000": (
        "fast",
        {"global_batch_size": 128, "max_batch_size": 50_000},
        0.05,
        [(1, 128, 0.05)]
        + [(6 + i, size, 0.05 * 1.3 ** (i + 1)) for i, size in enumerate(FAST)]
        + [(m, 50000, 0.05 * 1.3**9 / 2**k) for k, m in enumerate((60, 120, 160), 1)],
        2_536,
    ),
    "instant to 8192": (
        "instant",
        {"global_batch_size": 128, "max_batch_size": 8192},
        0.05,
        [(1, 128, 0.05), (6, 8192, 0.05 * 1.3**6)],
        3_320,
    ),
    "8192 LRD2": (
        "lrd",
        {"global_batch_size": 8192, "factors": 2},
        0.65,
        [(1, 8192, 0.65), (60, 8192, 0.325), (120, 8192, 0.1625), (160, 8192, 0.08125)],
        1_400,
    ),
    "steady": ("steady", {"global_batch_size": 128}, 0.1, [(1, 128, 0.1)], 78_200),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_thesis_s_table_is_reproduced_exactly(name):
    rule, settings, lr, expected, num_updates = TABLE[name]
    phases = batch_schedule(rule, **settings, **CIFAR)
    assert [(s.epoch, s.global_batch_size) for s in phases] == [row[:2] for row in expected]
    found = [s.lr(lr) for s in phases]
    if rule in ("fast", "instant"):  # the expected rates are products of floats
        assert found == pytest.approx([row[2] for row in expected], rel=1e-14)
    else:
        assert found == [row[2] for row in expected]
    assert sum(phase_updates(phases, **CIFAR)) == num_updates


def test_instant_has_the_learning_rate_that_the_study_prints():
    *_, last = batch_schedule("instant", **SIZES, max_batch_size=8192)
    assert f"{last.lr(0.05):.4f}" == "0.2413"


def test_loss_dropout_s_phases_made_by_hand_have_the_study_s_updates():
    arm = [(1, 128, 0.05), (60, 128, 0.025), (120, 16384, 0.035), (160, 32768, 0.035)]
    phases = [
        Phase(epoch=epoch, global_batch_size=size, lr_factor=lr / 0.05) for epoch, size, lr in arm
    ]
    counts = phase_updates(phases, **CIFAR)
    assert sum(counts) == 46_771
    # epochs 3 to 119: all but the first update of each can be skipped
    assert 117 * (math.ceil(50_000 / 128) - 1) == 45_630
    assert [s.lr(0.05) for s in phases] == [0.05, 0.025, 0.035, 0.035]


@pytest.mark.parametrize("lr", [0.1, 0.3, 0.7, 0.0001])
def test_a_learning_rate_is_divided_as_on_paper(lr):
    phases = batch_schedule("lrd", **SIZES, factors=3)
    exact = Fraction(str(lr))
    assert [s.lr(lr) for s in phases] == [float(exact / 3**i) for i in range(4)]


def test_phases_can_be_written_as_json():
    phases = batch_schedule("fast", **SIZES)
    assert [Phase(**s) for s in json.loads(json.dumps([asdict(s) for s in phases]))] == list(phases)


# past the maximum


def test_the_part_of_a_factor_past_the_maximum_is_lost_by_default():
    phases = batch_schedule("bsi", **SIZES, max_batch_size=1000)
    assert [(s.epoch, s.global_batch_size, s.lr_factor) for s in phases] == [
        (1, 128, 1.0),
        (60, 640, 1.0),
        (120, 1000, 1.0),
    ]


def test_the_part_of_a_factor_past_the_maximum_divides_the_learning_rate_where_asked():
    phases = batch_schedule("bsi", **SIZES, max_batch_size=1000, past_max="lr")
    # at 120: 640 x 5 = 3200 = 1000 x 3.2; at 160 all of the 5
    assert [(s.epoch, s.global_batch_size, s.lr(0.1)) for s in phases] == [
        (1, 128, 0.1),
        (60, 640, 0.1),
        (120, 1000, 0.03125),
        (160, 1000, 0.00625),
    ]


@given(
    start=st.integers(1, 300),
    factors=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    room=st.integers(0, 5000),
)
def test_noise_falls_by_the_product_of_all_factors_whatever_the_maximum(start, factors, room):
    """Smith et al.: batch size over learning rate grows by each factor, wherever it goes."""
    phases = batch_schedule(
        "bsi",
        global_batch_size=start,
        epochs=20,
        num_samples=10_000,
        milestones=range(2, 2 + len(factors)),
        factors=factors,
        max_batch_size=start + room,
        past_max="lr",
    )
    assert [s.epoch for s in phases] == list(range(1, 2 + len(factors)))
    for i, s in enumerate(phases):
        assert s.global_batch_size <= start + room
        grown = s.global_batch_size / start / s.lr_factor
        assert grown == pytest.approx(math.prod(factors[:i]), rel=1e-12)


# fast and instant


def test_fast_ends_with_the_run_and_meets_a_milestone_in_the_same_epoch():
    phases = batch_schedule(
        "fast",
        global_batch_size=400,
        epochs=4,
        num_samples=5000,
        milestones=[3],
        factors=4,
        first_epoch=2,
        growth=1.5,
        lr_growth=1.2,
    )
    assert [(s.epoch, s.global_batch_size, s.lr_factor) for s in phases] == [
        (1, 400, 1.0),
        (2, 600, 1.2),
        (3, 900, 1.2 * 1.2 / 4),
        (4, 1350, 0.432),  # 1.2 x 1.2 / 4 x 1.2
    ]


@pytest.mark.parametrize("rule", ["fast", "instant"])
def test_fast_and_instant_arrive_at_the_same_batch_and_learning_rate(rule):
    settings = {"milestones": ()} if rule == "fast" else {}
    phases = batch_schedule(rule, **SIZES, max_batch_size=20_000, **settings)
    # 128 x 2^8 is the first power past 20000
    assert phases[-1].global_batch_size == 20_000
    assert phases[-1].lr_factor == pytest.approx(1.3**8, rel=1e-14)


# updates


def simulated(phases, epochs, num_samples, last_update):
    """Updates of each phase, one sample position after the other."""
    end = max(1, round(Fraction(str(epochs)) * num_samples))
    counts, position = [0] * len(phases), 0
    while position < end:
        epoch, offset = divmod(position, num_samples)
        number = max(i for i, s in enumerate(phases) if s.epoch <= epoch + 1)
        size = phases[number].global_batch_size
        if last_update == "keep":
            size = min(size, num_samples - offset)
        position += size
        counts[number] += 1
    return counts


@st.composite
def runs(draw):
    num_samples = draw(st.integers(1, 60))
    epochs = draw(st.one_of(st.integers(1, 12), st.integers(1, 120).map(lambda tenth: tenth / 10)))
    last = math.ceil(epochs)
    changes = draw(st.sets(st.integers(2, last), max_size=4)) if last > 1 else set()
    phases = [
        Phase(epoch=epoch, global_batch_size=draw(st.integers(1, num_samples)), lr_factor=1.0)
        for epoch in sorted({1, *changes})
    ]
    return phases, epochs, num_samples


@given(runs(), st.sampled_from(["keep", "wrap"]))
def test_updates_are_those_of_a_simulation(run, last_update):
    phases, epochs, num_samples = run
    found = phase_updates(phases, epochs=epochs, num_samples=num_samples, last_update=last_update)
    assert found == simulated(phases, epochs, num_samples, last_update)


@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from(["keep", "wrap", "drop"]))
def test_one_phase_has_the_updates_of_the_stream(size, epochs, last_update):
    stream = UpdateStream(size, 60, last_update)
    steady = batch_schedule("steady", global_batch_size=size, epochs=epochs, num_samples=60)
    (found,) = phase_updates(steady, epochs=epochs, num_samples=60, last_update=last_update)
    assert found == stream.num_updates(epochs)


@pytest.mark.parametrize("last_update", ["keep", "wrap", "drop"])
def test_half_an_epoch_has_half_its_updates(last_update):
    steady = batch_schedule("steady", global_batch_size=10, epochs=0.5, num_samples=99)
    # 49.5 samples (45 where 9 are left out), rounded: the update that starts at 40 is the last
    assert phase_updates(steady, epochs=0.5, num_samples=99, last_update=last_update) == [5]


def test_an_update_that_runs_over_the_boundary_has_the_size_of_where_it_starts():
    phases = [
        Phase(epoch=1, global_batch_size=4, lr_factor=1.0),
        Phase(epoch=2, global_batch_size=8, lr_factor=1.0),
    ]
    # 0-4-8-12 | 12-20: the third update takes 2 samples of the second epoch
    assert phase_updates(phases, epochs=2, num_samples=10, last_update="wrap") == [3, 1]
    assert phase_updates(phases, epochs=2, num_samples=10, last_update="keep") == [3, 2]


def test_dropping_an_epoch_s_remainder_is_for_one_batch_size():
    lrd = batch_schedule("lrd", **SIZES)
    assert phase_updates(lrd, **CIFAR, last_update="drop") == [390 * n for n in (59, 60, 40, 41)]
    bsi = batch_schedule("bsi", **SIZES)
    with pytest.raises(InputError, match=r"batch sizes 128, 640, 3200, 16000.*'keep' or 'wrap'"):
        phase_updates(bsi, **CIFAR, last_update="drop")


# bad input


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("bsii", {}, "rule='bsii' is not one of .* Use rule='bsi'"),
        ("bsi", {"past_max": "learning-rate"}, "past_max='learning-rate' is not one of"),
        ("bsi", {"global_batch_size": 0}, "global_batch_size=0 is not a whole number"),
        ("bsi", {"global_batch_size": 60_000}, "global_batch_size=60000 is above .* 50000"),
        ("bsi", {"num_samples": 0}, "num_samples=0 is not a whole number"),
        ("bsi", {"epochs": 0}, "epochs=0 is not a finite number above 0"),
        ("bsi", {"epochs": 100}, "epoch 160 is after the last one of a run of 100 epochs"),
        ("bsi", {"epochs": 158.5}, "a run of 158.5 epochs, epoch 159. Use epochs up to 159"),
        ("bsi", {"milestones": (60, 60, 160)}, r"\[60, 60, 160\] do not increase"),
        ("bsi", {"milestones": (60.5,)}, "epoch 60.5 is no whole epoch from 2 on"),
        ("bsi", {"milestones": (1, 60)}, "epoch 1 is no whole epoch from 2 on"),
        ("bsi", {"milestones": ()}, "has no milestones, so nothing would change"),
        ("bsi", {"factors": (2, 4)}, "2 factors for 3 milestones. Use one, or 3"),
        ("bsi", {"factors": 1}, "1 is not above 1"),
        ("lrd", {"factors": (2, 0.5, 2)}, "0.5 is not above 1"),
        ("bsi", {"factors": "two"}, "factors='two' is not a finite number"),
        (
            "bsi",
            {"factors": 1.1},
            r"epoch 60 would have a global batch of 140.8 samples, 1.1 times",
        ),
        ("bsi", {"max_batch_size": 100}, "max_batch_size=100 leaves .*=128 no room"),
        ("bsi", {"max_batch_size": 128}, "max_batch_size=128 leaves .*=128 no room"),
        ("bsi", {"max_batch_size": 60_000}, "max_batch_size=60000 is above .* 50000 samples"),
        ("bsi", {"max_batch_size": 100, "past_max": "lr"}, "max_batch_size=100 leaves"),
        ("bsi-doubled-end", {"factors": (2, 2, 4)}, "Use one .rule='bsi' takes one a milestone"),
        ("mixed", {"milestones": (60, 120)}, "rule='mixed' changes at three milestones and has 2"),
        ("mixed", {"factors": (4, 50)}, "2 factors for 3 milestones"),
        ("steady", {"factors": 5}, "rule='steady' does not read factors=5"),
        ("steady", {"milestones": (60,)}, r"rule='steady' does not read milestones=\(60,\)"),
        ("lrd", {"max_batch_size": 1000}, "rule='lrd' does not read max_batch_size=1000"),
        ("lrd", {"past_max": "lr"}, "rule='lrd' does not read past_max='lr'"),
        ("fast", {"past_max": "lr"}, "rule='fast' does not read past_max='lr'"),
        ("instant", {"factors": 2}, "rule='instant' does not read factors=2"),
        ("bsi", {"growth": 2}, "rule='bsi' does not read growth=2.* rule='fast' or 'instant'"),
        ("fast", {"growth": 1}, "growth=1 does not grow a batch"),
        ("fast", {"growth": 1.001}, "growth=1.001 takes more than 1000 epochs from 128 to 50000"),
        ("instant", {"lr_growth": 1e300}, "epoch 6 would have inf times the first learning rate"),
        ("lrd", {"factors": 1e300}, "epoch 120 would have 0.0 times the first learning rate"),
        ("fast", {"lr_growth": 0}, "lr_growth=0 is not a finite number above 0"),
        ("fast", {"first_epoch": 201}, "first_epoch: epoch 201 is after the last one"),
        ("instant", {"first_epoch": 1}, "first_epoch: epoch 1 is no whole epoch from 2 on"),
    ],
)
def test_a_schedule_that_is_none_says_what_to_type(rule, changes, message):
    with pytest.raises(InputError, match=message):
        batch_schedule(rule, **SIZES | changes)


def test_every_rule_runs_with_its_defaults():
    for rule in RULES:
        phases = batch_schedule(rule, **SIZES)
        check_phases(phases, **CIFAR)
        assert (phases[0].epoch, phases[0].lr_factor) == (1, 1.0)


def test_the_first_epochs_of_a_milestone_in_the_last_epoch_are_allowed():
    phases = batch_schedule("lrd", **SIZES | {"epochs": 159.5}, milestones=[60.0, 160])
    assert [s.epoch for s in phases] == [1, 60, 160]
    assert phase_updates(phases, epochs=159.5, num_samples=50_000)[-1] == 196  # 25000 / 128


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "do not begin at epoch 1"),
        ([(2, 8, 1.0)], "do not begin at epoch 1"),
        ([(1, 8, 0.5)], "do not begin at epoch 1 with lr_factor 1.0"),
        ([(1, 8, 1.0), (4, 8, 0.5), (3, 8, 0.1)], r"epochs \[4, 3\] do not increase"),
        ([(1, 8, 1.0), (11, 8, 0.5)], "epoch 11 is after the last one of a run of 10 epochs"),
        ([(1, 8, 1.0), (2, 101, 1.0)], "global_batch_size=101 is above the training set's 100"),
        ([(1, 8, 1.0), (2, 8, 0.0)], "lr_factor=0.0 is not a finite number above 0"),
    ],
)
def test_phases_made_by_hand_are_checked(rows, message):
    phases = [Phase(epoch=e, global_batch_size=b, lr_factor=f) for e, b, f in rows]
    with pytest.raises(InputError, match=message):
        phase_updates(phases, epochs=10, num_samples=100)


@pytest.mark.parametrize("epochs", [14.3, 0.5, 1.5, 2.5, 7.1])
@pytest.mark.parametrize("num_samples", [3, 5, 235])
@pytest.mark.parametrize("last_update", ["keep", "wrap"])
def test_a_run_that_ends_on_half_a_sample_has_the_updates_of_the_loader(
    epochs, num_samples, last_update
):
    """14.3 x 235 is 3360.5 samples, and the float product a little more."""
    phases = batch_schedule("steady", global_batch_size=3, epochs=epochs, num_samples=num_samples)
    run = {"epochs": epochs, "num_samples": num_samples, "last_update": last_update}
    found = sum(phase_updates(phases, **run))
    assert found == UpdateStream(3, num_samples, last_update).num_updates(epochs)


def test_listed_sizes_and_rates_are_the_arms_of_loss_dropout():
    phases = batch_schedule(
        "listed", global_batch_size=128, epochs=200, num_samples=50_000,
        batch_sizes=(128, 16384, 32768), lr_factors=(0.5, 0.7, 0.7),
    )  # fmt: skip
    assert [(s.epoch, s.global_batch_size, s.lr(0.05)) for s in phases] == [
        (1, 128, 0.05), (60, 128, 0.025), (120, 16384, 0.035), (160, 32768, 0.035),
    ]  # fmt: skip
    assert sum(phase_updates(phases, epochs=200, num_samples=50_000)) == 46_771


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_sizes": (256, 512)}, "2 batch_sizes for 3 milestones"),
        ({"lr_factors": (1, 1, 0)}, "lr_factors=0 is not a finite number above 0"),
        ({"batch_sizes": (256, 512, 60_000)}, "batch_sizes=60000 is above"),
        ({"batch_sizes": (256, 512, 0.5)}, "is not a whole number"),
        ({"factors": 2}, "does not read factors"),
    ],
)
def test_lists_that_can_not_be_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        batch_schedule("listed", global_batch_size=128, epochs=200, num_samples=50_000, **given)


def test_sizes_alone_or_rates_alone_may_be_listed():
    run = {"global_batch_size": 4, "epochs": 6, "num_samples": 8, "milestones": (2, 4)}
    sizes = batch_schedule("listed", batch_sizes=(8, 2), **run)
    assert [(s.epoch, s.global_batch_size, s.lr_factor) for s in sizes] == [
        (1, 4, 1.0), (2, 8, 1.0), (4, 2, 1.0),
    ]  # fmt: skip
    rates = batch_schedule("listed", lr_factors=(0.1, 1), **run)
    assert [(s.epoch, s.global_batch_size, s.lr_factor) for s in rates] == [
        (1, 4, 1.0), (2, 4, 0.1), (4, 4, 1.0),
    ]  # fmt: skip
