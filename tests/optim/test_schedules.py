import copy
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, StepLR

from lbaccel.batch.duration import Duration
from lbaccel.errors import InputError
from lbaccel.optim.scaling import scale_lr
from lbaccel.optim.scheduler import lr_scheduler
from lbaccel.optim.schedules import (
    constant,
    constant_warmup,
    cosine,
    gradual_warmup,
    make_schedule,
    multi_step,
    stairs_warmup,
    step_decay,
    warmup_start,
)

N = 1437  # samples of an epoch: odd, so that no batch size divides it
BATCH_SIZES = [32, 256, 359, 1000, 1437]  # two updates of 359 are half an epoch, rounded down


def sgd(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=rates[0])


def trace(optimizer, scheduler, num_updates, group=0):
    """Learning rate of each update, and the one left after the last."""
    rates = [optimizer.param_groups[group]["lr"]]
    for _ in range(num_updates):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[group]["lr"])
    return rates


def recipe(global_batch_size, *, base_lr=0.1, **changes):
    peak = scale_lr(base_lr, base_batch_size=256, global_batch_size=global_batch_size)
    given = {
        "total": Duration(epochs=12),
        "warmup_duration": Duration(epochs=5),
        "base_lr": base_lr,
        "peak_lr": peak,
        "global_batch_size": global_batch_size,
        "num_samples": N,
    }
    return peak, make_schedule(**(given | changes))


def goyal_cosine(samples, base_lr, peak, warmup=5 * N, total=12 * N):
    if samples < warmup:
        low = min(base_lr, peak)
        return low + (peak - low) * samples / warmup
    share = min(1.0, (samples - warmup) / (total - warmup))
    return peak / 2 * (1 + math.cos(math.pi * share))


# Duration


def test_a_duration_converts_by_its_unit():
    sizes = {"global_batch_size": 256, "num_samples": N}
    assert Duration(updates=7).to_samples(**sizes) == 7 * 256
    assert Duration(samples=99).to_samples(**sizes) == 99
    assert Duration(epochs=5).to_samples(**sizes) == 5 * N


@given(tenths=st.integers(0, 10_000), num_samples=st.integers(1, 10**7))
@settings(deadline=None)
def test_a_decimal_number_of_epochs_is_rounded_once(tenths, num_samples):
    samples = Duration(epochs=tenths / 10).to_samples(global_batch_size=8, num_samples=num_samples)
    assert samples == float(Fraction(tenths, 10) * num_samples)


@pytest.mark.parametrize("given_units", [{}, {"updates": 1, "epochs": 1}])
def test_a_duration_with_none_or_two_units_is_refused(given_units):
    with pytest.raises(InputError, match="exactly one of updates, samples and epochs"):
        Duration(**given_units)


@pytest.mark.parametrize("unit", ["updates", "samples", "epochs"])
@pytest.mark.parametrize("bad", [-1, math.inf, math.nan])
def test_a_negative_or_infinite_duration_is_refused(unit, bad):
    with pytest.raises(InputError, match=f"{unit}=.*Use {unit} >= 0"):
        Duration(**{unit: bad})


# One equation each, against torch


@pytest.mark.parametrize("final", [0.0, 0.05])
def test_cosine_equals_torchs_cosine_annealing(final):
    optimizer = sgd(0.8)
    rates = trace(optimizer, CosineAnnealingLR(optimizer, T_max=40, eta_min=0.8 * final), 40)
    for update, lr in enumerate(rates):
        ours = cosine(32 * update, total_samples=32 * 40, final=final)
        assert 0.8 * ours == pytest.approx(lr, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@given(total=st.integers(0, 10**9), past=st.integers(0, 10**9))
@settings(deadline=None)
def test_cosine_is_exactly_final_at_the_end_and_after(final, total, past):
    assert cosine(total + past, total_samples=total, final=final) == final


def test_gradual_warmup_equals_torchs_linear_lr():
    optimizer = sgd(0.4)
    rates = trace(optimizer, LinearLR(optimizer, start_factor=0.25, total_iters=10), 12)
    for update, lr in enumerate(rates):
        ours = gradual_warmup(64 * update, warmup_samples=640, start=0.25)
        assert 0.4 * ours == pytest.approx(lr, rel=1e-12)


def test_step_decay_equals_torchs_step_lr_at_every_epoch():
    optimizer = sgd(0.1)
    rates = trace(optimizer, StepLR(optimizer, step_size=50, gamma=0.1), 200)
    for epoch, lr in enumerate(rates):
        ours = step_decay(epoch * N, every=50 * float(N), gamma=0.1)
        assert 0.1 * ours == pytest.approx(lr, rel=1e-12)


def test_multi_step_equals_torchs_multi_step_lr_at_every_epoch():
    optimizer = sgd(0.1)
    rates = trace(optimizer, MultiStepLR(optimizer, milestones=[30, 60, 80], gamma=0.1), 90)
    milestones = [30.0 * N, 60.0 * N, 80.0 * N]
    for epoch, lr in enumerate(rates):
        ours = multi_step(epoch * N, milestones=milestones, gamma=0.1)
        assert 0.1 * ours == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("milestone", [N, 5 * N, 30 * float(N)])
def test_a_step_comes_at_its_sample_and_not_one_before(milestone):
    assert multi_step(milestone - 1, milestones=[milestone], gamma=0.1) == 1.0
    assert multi_step(milestone, milestones=[milestone], gamma=0.1) == 0.1
    assert step_decay(milestone - 1, every=milestone, gamma=0.1) == 1.0
    assert step_decay(milestone, every=milestone, gamma=0.1) == 0.1
    assert constant_warmup(milestone - 1, warmup_samples=milestone, start=0.5) == 0.5
    assert constant_warmup(milestone, warmup_samples=milestone, start=0.5) == 1.0


def test_stairs_warmup_gives_epoch_e_of_ten_the_share_e_plus_one_tenths():
    for epoch in range(10):
        for offset in (0, 1, N - 1):
            seen = epoch * N + offset
            ours = stairs_warmup(seen, warmup_samples=10 * float(N), epoch_samples=N)
            assert ours == (epoch + 1) / 10
    assert stairs_warmup(10 * N, warmup_samples=10 * N, epoch_samples=N) == 1.0


def test_a_last_part_of_an_epoch_of_stairs_counts_as_an_epoch():
    values = [stairs_warmup(s, warmup_samples=25, epoch_samples=10) for s in (0, 10, 20, 24, 25)]
    assert values == [1 / 3, 2 / 3, 1.0, 1.0, 1.0]


def test_a_warmup_of_zero_samples_is_over_at_once():
    assert gradual_warmup(0, warmup_samples=0, start=0.1) == 1.0
    assert constant_warmup(0, warmup_samples=0, start=0.1) == 1.0
    assert stairs_warmup(0, warmup_samples=0, epoch_samples=N) == 1.0


@given(
    warmup=st.integers(0, 10**6),
    rest=st.integers(0, 10**6),
    start=st.floats(0, 1),
    seen=st.lists(st.integers(0, 3 * 10**6), min_size=2),
)
@settings(deadline=None)
def test_warmup_never_falls_and_cosine_never_rises_and_both_stay_within_zero_and_one(
    warmup, rest, start, seen
):
    seen = sorted(seen)
    rise = [gradual_warmup(s, warmup_samples=warmup, start=start) for s in seen]
    stairs = [stairs_warmup(s, warmup_samples=warmup, epoch_samples=N) for s in seen]
    fall = [cosine(s, total_samples=rest, final=start) for s in seen]
    assert all(a <= b + 1e-15 for values in (rise, stairs) for a, b in pairwise(values))
    assert all(a + 1e-15 >= b for a, b in pairwise(fall))
    assert all(-1e-15 <= v <= 1 + 1e-15 for values in (rise, stairs, fall) for v in values)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: constant(s),
        lambda s: cosine(s, total_samples=10),
        lambda s: step_decay(s, every=10, gamma=0.1),
        lambda s: multi_step(s, milestones=[10], gamma=0.1),
        lambda s: gradual_warmup(s, warmup_samples=10, start=0.1),
        lambda s: constant_warmup(s, warmup_samples=10, start=0.1),
        lambda s: stairs_warmup(s, warmup_samples=10, epoch_samples=5),
        lambda s: recipe(256)[1](s),
    ],
)
def test_negative_samples_are_refused_by_every_function(call):
    with pytest.raises(InputError, match="samples_seen=-1"):
        call(-1)


# Where warmup starts


def test_warmup_starts_at_the_smaller_of_reference_and_peak():
    assert warmup_start(0.1, 3.2) == 0.1 / 3.2
    assert warmup_start(0.1, 0.0125) == 1.0
    assert warmup_start(0.1, 3.2, start="zero") == 0.0
    assert warmup_start(0.1, 3.2, start=0.8) == 0.8 / 3.2


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("refrence", "Use start='reference'"),
        (0.5, "start=0.5 .*start <= 0.4"),
        (-0.1, "Use start >= 0"),
    ],
)
def test_a_start_that_is_no_rate_up_to_the_peak_is_refused(start, message):
    with pytest.raises(InputError, match=message):
        warmup_start(0.1, 0.4, start=start)


# The composed schedule (traps 11 to 13)


@pytest.mark.parametrize("batch", BATCH_SIZES)
def test_the_trace_of_learning_rates_follows_the_closed_form_for_every_batch_size(batch):
    peak, schedule = recipe(batch)
    optimizer = sgd(peak)
    num_updates = math.ceil(12 * N / batch)
    rates = trace(
        optimizer, lr_scheduler(optimizer, schedule, samples_per_update=batch), num_updates
    )
    for update, lr in enumerate(rates):
        expected = goyal_cosine(update * batch, 0.1, peak)
        assert lr == pytest.approx(expected, rel=1e-12, abs=1e-15 * peak)


def test_the_schedule_equals_timms_cosine_with_warmup_prefix():
    batch, warmup_updates, updates = 512, 20, 100
    peak, schedule = recipe(
        batch,
        total=Duration(updates=updates),
        warmup_duration=Duration(updates=warmup_updates),
        final_lr=0.001,
    )
    theirs = CosineLRScheduler(
        sgd(peak),
        t_initial=updates - warmup_updates,
        lr_min=0.001,
        warmup_t=warmup_updates,
        warmup_lr_init=0.1,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for update in range(updates + 1):
        theirs.step_update(update)
        lr = theirs.optimizer.param_groups[0]["lr"]
        assert peak * schedule(update * batch) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("batch", BATCH_SIZES)
@pytest.mark.parametrize("policy", ["wrap", "keep", "drop"])
@pytest.mark.parametrize("epochs", [1, 7, 0.5])
def test_the_learning_rate_is_final_lr_after_the_last_update_and_not_before(batch, policy, epochs):
    epoch = {
        "wrap": None,
        "keep": [batch] * (N // batch) + [N % batch] * (N % batch > 0),
        "drop": [batch] * (N // batch),
    }[policy]
    per_epoch = N if epoch is None else sum(epoch)
    run = math.floor(epochs * per_epoch)
    if epoch is None:
        sizes = [batch] * math.ceil(run / batch)
    else:
        sizes = []
        while sum(sizes) < run:
            sizes.append(epoch[len(sizes) % len(epoch)])
    peak, schedule = recipe(
        batch,
        total=Duration(epochs=epochs),
        warmup_duration=Duration(epochs=0),
        num_samples=per_epoch,
        final_lr=0.001,
    )
    optimizer = sgd(peak)
    scheduler = lr_scheduler(
        optimizer, schedule, samples_per_update=lambda u: (sizes[u:] or [batch])[0]
    )
    rates = trace(optimizer, scheduler, len(sizes))
    assert rates[-1] == pytest.approx(0.001, rel=1e-15)
    assert all(lr > 0.001 * (1 + 1e-9) for lr in rates[:-1])


@pytest.mark.parametrize("batch", [16, 256, 300, 1024])
def test_training_starts_at_the_reference_rate_or_below(batch):
    peak, schedule = recipe(batch)
    assert peak * schedule(0) == pytest.approx(min(0.1, peak), rel=1e-15)


@pytest.mark.parametrize(
    ("warmup", "start", "peak_epoch"),
    # the last of five stairs is the peak, and spans the fifth epoch
    [("gradual", "zero", 5), ("constant", "zero", 5), ("stairs", "reference", 4)],
)
@pytest.mark.parametrize("batch", BATCH_SIZES)
def test_warmup_is_the_same_number_of_samples_for_every_batch_size(
    warmup, start, peak_epoch, batch
):
    _, schedule = recipe(batch, warmup=warmup, decay="constant", start=start)
    assert next(s for s in range(12 * N) if schedule(s) == 1.0) == peak_epoch * N
    first_update_at_peak = next(u for u in range(12 * N) if schedule(u * batch) == 1.0)
    assert first_update_at_peak == math.ceil(peak_epoch * N / batch)


@pytest.mark.parametrize("batch", BATCH_SIZES)
def test_steps_are_counted_from_the_end_of_the_warmup(batch):
    _, schedule = recipe(
        batch,
        total=Duration(epochs=200),
        warmup="stairs",
        warmup_duration=Duration(epochs=10),
        decay="step",
        milestones=(50,),
    )
    for epoch in range(200):
        expected = (epoch + 1) / 10 if epoch < 10 else 0.1 ** ((epoch - 10) // 50)
        assert schedule(epoch * N) == schedule(epoch * N + N - 1) == pytest.approx(expected)


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("num_samples", [N, 50_000, 1_281_167])
def test_tenths_of_an_epoch_of_warmup_and_of_period_add_up_to_whole_epochs(tenths, num_samples):
    _, schedule = recipe(
        256,
        num_samples=num_samples,
        warmup_duration=Duration(epochs=tenths / 10),
        decay="step",
        milestones=(0.1,),
        gamma=0.5,
    )
    for epoch in range(1, 13):
        periods = 10 * epoch - tenths
        assert schedule(epoch * num_samples) == 0.5**periods
        assert schedule(epoch * num_samples - 1) == 0.5 ** (periods - 1)


def test_goyals_milestones_are_epochs_of_the_whole_run():
    peak, schedule = recipe(
        8192, total=Duration(epochs=90), decay="multistep", milestones=(30, 60, 80)
    )
    for epoch in range(5, 90):
        expected = 0.1 ** sum(epoch >= m for m in (30, 60, 80))
        assert schedule(epoch * N) == schedule(epoch * N + N - 1) == pytest.approx(expected)
    assert peak * schedule(2.5 * N) == pytest.approx((0.1 + peak) / 2, rel=1e-12)


def test_a_warmup_may_end_at_the_first_milestone_and_at_the_end_of_the_run():
    _, schedule = recipe(256, decay="multistep", milestones=(5,))
    assert schedule(5 * N) == 0.1
    _, schedule = recipe(512, warmup_duration=Duration(epochs=12))
    assert schedule(12 * N - 1) == pytest.approx(1.0, rel=1e-4)
    assert schedule(12 * N) == 0.0


def test_without_warmup_the_run_starts_at_the_peak():
    _, schedule = recipe(1024, warmup="none", warmup_duration=None)
    assert [schedule(s) for s in (0, 6 * N, 12 * N)] == pytest.approx([1.0, 0.5, 0.0])


def test_a_warmup_longer_than_the_run_is_refused_in_all_three_units():
    with pytest.raises(InputError) as caught:
        make_schedule(
            total=Duration(epochs=2),
            warmup_duration=Duration(epochs=5),
            base_lr=0.1,
            peak_lr=0.4,
            global_batch_size=1000,
            num_samples=50_000,
        )
    text = str(caught.value)
    assert "250 updates (250000 samples, 5 epochs)" in text
    assert "100 updates (100000 samples, 2 epochs)" in text
    assert "Use a warmup of at most 2 epochs, or a run of at least 5 epochs." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "cosin"}, "Use decay='cosine'"),
        ({"warmup": "gradul"}, "Use warmup='gradual'"),
        ({"warmup_duration": None}, "has no warmup_duration"),
        ({"decay": "multistep", "milestones": (4, 8)}, "at most 4 epochs, or later milestones"),
        ({"decay": "multistep"}, r"milestones=\(\)\. Use milestones in epochs"),
        ({"decay": "step", "milestones": (3, 6)}, r"milestones=\(3, 6\)\. Use one"),
        ({"milestones": (6,)}, "does not read them"),
        ({"decay": "constant", "final_lr": 0.01}, "Use decay='cosine'"),
        ({"final_lr": 0.2}, "final_lr=0.2 .*final_lr <= 0.1"),
        ({"warmup": "stairs", "start": "zero"}, "does not read start='zero'"),
        ({"decay": "step", "milestones": (0,)}, "Use milestone > 0"),
        ({"gamma": 0}, "Use gamma > 0"),
    ],
)
def test_a_setting_that_can_not_be_kept_is_an_error_that_says_what_to_type(changes, message):
    with pytest.raises(InputError, match=message):
        recipe(256, **changes)


# The torch scheduler (traps 11 and 15)


def test_groups_keep_their_ratio_at_every_update():
    peak, schedule = recipe(1024)
    ratios = (1.0, 0.6, 0.4)
    optimizer = sgd(*(peak * r for r in ratios))
    scheduler = lr_scheduler(optimizer, schedule, samples_per_update=1024)
    for _ in range(15):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([rates[0] * r for r in ratios], rel=1e-14)
        optimizer.step()
        scheduler.step()


def test_saving_and_loading_twice_continues_the_uninterrupted_trace():
    peak, schedule = recipe(512)
    sizes = [512] * 20 + [3] + [700] * 40  # a short update, then a grown batch

    def build():
        optimizer = sgd(peak, peak / 2)
        scheduler = lr_scheduler(optimizer, schedule, samples_per_update=sizes.__getitem__)
        return optimizer, scheduler

    optimizer, scheduler = build()
    whole = trace(optimizer, scheduler, 30, group=1)
    assert whole == [peak / 2 * schedule(sum(sizes[:u])) for u in range(31)]

    optimizer, scheduler = build()
    parts = trace(optimizer, scheduler, 10, group=1)
    for _ in range(2):
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer, scheduler = build()
        for _ in range(2):  # loading the same state again changes nothing
            optimizer.load_state_dict(copy.deepcopy(saved[0]))
            scheduler.load_state_dict(copy.deepcopy(saved[1]))
        assert (optimizer.state_dict(), scheduler.state_dict()) == saved
        parts += trace(optimizer, scheduler, 10, group=1)[1:]
    assert parts == whole


def test_a_second_scheduler_on_the_same_optimizer_does_not_scale_twice():
    peak, schedule = recipe(1024)
    optimizer = sgd(peak)
    for _ in range(2):
        lr_scheduler(optimizer, schedule, samples_per_update=1024)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("size", [0, -4, lambda u: 0])
def test_an_update_without_samples_is_refused(size):
    optimizer = sgd(0.1)
    with pytest.raises(InputError, match="samples_per_update"):
        trace(optimizer, lr_scheduler(optimizer, constant, samples_per_update=size), 1)
