"""Momentum after a change of the learning rate, against closed forms on a quadratic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm.optim
import torch

from lbaccel.optim.momentum import buffer_with_lr, correct_momentum

CURVATURE, MOMENTUM, START = 1.7, 0.9, 2.0
RATES, CHANGE, END = (0.05, 0.4), 7, 20  # the rate of updates 0..6, and of 7..19


class StepsInMomentum(torch.optim.Optimizer):
    """SGD in Goyal's second form: v = m v + eta g, w = w - v."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("velocity", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad, alpha=group["lr"])
                p.sub_(v)


def closed_form(before, at, lr, count):
    """w after `count` updates of w' = w + m (w - w_before) - eta a w, by its two roots."""
    b = 1 + MOMENTUM - lr * CURVATURE
    root = np.sqrt(complex(b * b - 4 * MOMENTUM))
    z = np.array([(b + root) / 2, (b - root) / 2])
    # c0 z0^n + c1 z1^n with value `before` at n = -1 and `at` at n = 0
    c = np.linalg.solve(np.array([1 / z, [1, 1]]), np.array([before, at], dtype=complex))
    return [float((c @ z**n).real) for n in (count - 1, count)]


def truth(*, corrected):
    before, at = closed_form(START, START, RATES[0], CHANGE)
    step = at - before  # the last step, eta_old in it
    if corrected:
        step *= RATES[1] / RATES[0]
    return closed_form(at - step, at, RATES[1], END - CHANGE)[1]


def trained(make, *, reload_at=None, **correction):
    w = torch.nn.Parameter(torch.tensor([START], dtype=torch.float64))
    optimizer = make([w])
    if correction:
        correct_momentum(optimizer, **correction)
    for update in range(END):
        for group in optimizer.param_groups:
            group["lr"] = RATES[update >= CHANGE]
        if update == reload_at:
            state = optimizer.state_dict()
            optimizer = make([w])
            correct_momentum(optimizer, **correction)
            optimizer.load_state_dict(state)
        w.grad = CURVATURE * w.detach()
        optimizer.step()
    return w.item()


def second_form(params):
    return StepsInMomentum(params, lr=RATES[0], momentum=MOMENTUM)


def first_form(params):
    return torch.optim.SGD(params, lr=RATES[0], momentum=MOMENTUM)


def test_the_two_closed_forms_differ_so_that_a_test_can_tell_them():
    assert abs(truth(corrected=True) - truth(corrected=False)) > 0.1


def test_torch_s_sgd_is_the_corrected_form_and_is_left_as_it_is():
    assert trained(first_form) == pytest.approx(truth(corrected=True), rel=1e-10)
    w = torch.nn.Parameter(torch.zeros(1))
    assert correct_momentum(first_form([w])) is False
    assert trained(first_form, buffer=None) == pytest.approx(truth(corrected=True), rel=1e-10)


def test_the_form_with_the_rate_in_its_momentum_is_wrong_by_itself_and_right_when_corrected():
    assert trained(second_form) == pytest.approx(truth(corrected=False), rel=1e-10)
    found = trained(second_form, buffer="velocity")
    assert found == pytest.approx(truth(corrected=True), rel=1e-10)


@pytest.mark.parametrize("update", [3, CHANGE, CHANGE + 1])
def test_a_resume_corrects_once_wherever_it_falls(update):
    found = trained(second_form, reload_at=update, buffer="velocity")
    assert found == pytest.approx(truth(corrected=True), rel=1e-10)


def test_asking_twice_corrects_once():
    def make(params):
        optimizer = second_form(params)
        assert correct_momentum(optimizer, buffer="velocity")
        return optimizer

    found = trained(make, buffer="velocity")
    assert found == pytest.approx(truth(corrected=True), rel=1e-10)


def run(optimizer, w, rates):
    generator = torch.Generator().manual_seed(0)
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        w.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        optimizer.step()
    return w.detach().clone()


def test_timm_s_rmsproptf_corrected_is_the_form_that_torch_has():
    rates = [0.01] * 3 + [0.05] * 3 + [0.002] * 3
    ends = []
    for form, corrects in ((True, True), (False, False), (True, False)):
        w = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = timm.optim.RMSpropTF([w], lr=0.01, momentum=0.9, lr_in_momentum=form)
        assert not corrects or correct_momentum(optimizer)
        ends.append(run(optimizer, w, rates))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=0)
    assert (ends[2] - ends[1]).abs().max() > 0.01


def test_timm_s_adafactor_moves_by_its_corrected_first_moment_where_the_gradient_is_zero():
    w = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = timm.optim.create_optimizer_v2([w], "adafactor", lr=0.01, betas=(0.9, 0.999))
    assert correct_momentum(optimizer)
    before = run(optimizer, w, [0.01] * 4)
    held = optimizer.state[w]["exp_avg"].clone()
    optimizer.param_groups[0]["lr"] = 0.03
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(before - w.detach(), 0.9 * 3 * held, rtol=1e-10, atol=0)


def test_a_rate_of_zero_scales_nothing_away():
    w = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = timm.optim.RMSpropTF([w], lr=0.01, momentum=0.9)
    correct_momentum(optimizer)
    run(optimizer, w, [0.0, 0.01, 0.02, 0.0, 0.01])
    assert optimizer.state[w]["momentum_buffer"].abs().min() > 0
    assert torch.isfinite(w).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_known_optimizers_are_all_of_timm_s_that_move_at_a_rate_of_zero():
    # Only what already holds the learning rate can move the weights without one.
    moved, known = set(), set()
    for name in timm.optim.list_optimizers():
        w = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        try:
            optimizer = timm.optim.create_optimizer_v2([w], name, lr=0.01)
            run(optimizer, w, [0.01] * 3)
        except (AssertionError, RuntimeError):  # of another package, or second order
            continue
        before = w.detach().clone()
        run(optimizer, w, [0.0])
        if (w.detach() - before).abs().max() > 1e-6:
            moved.add(name)
        if any(buffer_with_lr(optimizer, group) for group in optimizer.param_groups):
            known.add(name)
    # MADGRAD averages towards a dual sum of all its steps: no momentum that could be rescaled.
    assert moved - known == {"madgrad", "madgradw"}
    assert known - moved == set()
    assert {"rmsproptf", "cadafactor"} <= known


def test_a_warmup_of_the_second_form_ends_with_the_momentum_that_it_should_have():
    """v after a warmup: uncorrected it lags by the rates it was built at."""
    rates = [0.1 * (i + 1) for i in range(10)]
    ends = {}
    for corrects in (True, False):
        w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = StepsInMomentum([w], lr=rates[0], momentum=MOMENTUM)
        if corrects:
            correct_momentum(optimizer, buffer="velocity")
        for lr in rates:
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.ones_like(w)
            optimizer.step()
        ends[corrects] = optimizer.state[w]["velocity"].item()
    geometric = (1 - MOMENTUM**10) / (1 - MOMENTUM)
    assert ends[True] == pytest.approx(rates[-1] * geometric, rel=1e-12)
    lagging = math.fsum(lr * MOMENTUM ** (9 - i) for i, lr in enumerate(rates))
    assert ends[False] == pytest.approx(lagging, rel=1e-12)
