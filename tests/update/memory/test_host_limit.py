"""A CPU's budget: the memory that counts, when it is checked, and what an attempt gives back."""

from __future__ import annotations

import gc
import mmap
import resource
import sys
import weakref

import pytest
import torch
from forks import run_forked, run_fresh
from runs_out import RunsOut

from lbaccel.batch.plan import MicroBatch
from lbaccel.update.memory import host_limit
from lbaccel.update.memory.host_limit import ENOUGH, ROOM, HostLimit, Watch
from lbaccel.update.memory.oom import is_out_of_memory, let_go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="enforced on Linux alone")
MIB = 2**20


def value(outcomes):
    (outcome,) = outcomes
    assert not outcome.error and outcome.exit_code == 0, outcome
    return outcome.value


def _left_after(rank, *, touched):
    with host_limit.host_limit(64 * MIB) as limit:
        before = limit.left()
        held = mmap.mmap(-1, 48 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if touched:
            for _ in range(48):  # not at once: the text itself is memory that may not be given back
                held.write(b"x" * MIB)
        return before - limit.left(), resource.getrlimit(resource.RLIMIT_DATA)[0]


def _reserved(rank):
    return _left_after(rank, touched=False)


def _written(rank):
    return _left_after(rank, touched=True)


def test_pages_in_use_count_and_reserved_addresses_do_not():
    reserved, allowed_reserved = value(run_forked(_reserved))
    written, allowed_written = value(run_forked(_written))
    assert abs(reserved) < 4 * MIB and abs(written - 48 * MIB) < 4 * MIB
    # the system's limit makes room for the addresses, and none for the pages
    assert abs(allowed_reserved - allowed_written - 48 * MIB) < 16 * MIB


def _over(rank):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    micro_batch = MicroBatch(0, (4,))
    seen = []
    with host_limit.host_limit(32 * MIB):
        watch = Watch()
        watch.look_at(torch.zeros(4))
        try:
            with watch.forward(micro_batch):
                held = [torch.ones(4 * MIB)]
                seen.append(len(held))
                held += [torch.ones(8 * MIB)]
                seen.append(len(held))
        except torch.OutOfMemoryError as error:
            seen += [is_out_of_memory(error), str(error)]
        far = None
        try:
            far = torch.empty(ROOM + 64 * MIB, dtype=torch.uint8)
        except RuntimeError as error:
            seen.append(is_out_of_memory(error))
        assert far is None
    return seen, before == resource.getrlimit(resource.RLIMIT_DATA)


def test_the_operator_that_ends_above_the_budget_raises_and_the_system_refuses_far_above_it():
    (first, ran_out, text, refused), restored = value(run_forked(_over))
    assert first == 1 and ran_out and "the budget is 32 MiB" in text
    assert refused and restored


class Counted(HostLimit):
    """A limit that counts its checks and never refuses."""

    def __init__(self):
        self.num_bytes, self.calls = 2**40, 0
        self.went_well = host_limit.Counter()

    def left(self):
        return 1

    def check(self):
        self.calls += 1


def test_a_shape_is_checked_until_it_went_well_and_a_new_one_again(monkeypatch):
    limit, watch = Counted(), Watch()
    monkeypatch.setattr(host_limit, "_active", limit)
    calls = []
    for size in [4] * (ENOUGH + 1) + [6, 4]:
        data = watch.look_at((torch.ones(size, 3), "a label"))
        weight, limit.calls = torch.ones(3, requires_grad=True), 0
        with watch.forward(MicroBatch(0, (size,))):
            forward = (data[0] * weight).sum()
            inside = limit.calls
            forward.backward()
        calls.append((inside > 0, limit.calls > inside))
    assert calls == [(True, True)] * ENOUGH + [(False, False), (True, True), (False, False)]


def test_without_a_limit_nothing_is_watched():
    watch, data = Watch(), torch.ones(3)
    assert watch.look_at(data) is data
    with watch.forward(MicroBatch(0, (1,))):
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class Activation:
    """Stands for a tensor that a node keeps for its backward."""


class Keeps(torch.autograd.Function):
    """The identity, whose node keeps an activation."""

    @staticmethod
    def forward(ctx, x, activation):
        ctx.activation = activation
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_backward_pass_that_failed_keeps_no_activation_of_what_it_had_still_to_do():
    weight, activation = torch.ones(8, requires_grad=True), Activation()
    alive = weakref.ref(activation)
    other = Keeps.apply(weight, activation)
    failed = RunsOut.apply(weight)  # made last, so its backward comes first
    loss = other.sum() + failed.sum()
    error = None
    try:
        loss.backward()
    except torch.OutOfMemoryError as caught:
        error = caught
    del activation
    del other, failed, loss
    gc.collect()
    assert error is not None and alive() is not None, "the queue holds nothing: the test is blind"
    let_go(error, torch.device("cpu"))
    assert alive() is None


def test_a_network_whose_kernels_are_compiled_as_it_goes_recovers_to_the_bit():
    """With the system's limit alone, oneDNN ended this with a segmentation fault or at size 8."""
    cases = [(128, 24), (None, 0)]
    (limited, plain) = run_fresh("limited", "compiled_kernels", cases)
    losses, sizes, state = limited
    assert 8 <= sizes[0] < 128
    assert losses == plain[0]
    assert all(torch.equal(state[key], plain[2][key]) for key in state)
