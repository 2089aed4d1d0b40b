"""Running out of memory inside an update: recognised, agreed upon, and done again, to the bit."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forks import run_forked, run_fresh, values
from hypothesis import given
from hypothesis import strategies as st
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, InputError, LargeBatch, RunFailed, UpdateLoader
from lbaccel.update import transaction
from lbaccel.update.memory import oom
from lbaccel.update.memory.budget import memory_limit, parse_memory
from lbaccel.update.memory.micro_batch import PATIENCE, MicroBatchSize, largest_that_fits
from lbaccel.update.memory.oom import is_out_of_memory
from lbaccel.update.memory.reserve import Reservation, state_like

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"

# -- what counts ----------------------------------------------------------------------------------

MEMORY = [
    torch.OutOfMemoryError(OUT),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError(OUT),
    RuntimeError("HIP out of memory. Tried to allocate 512.00 MiB (GPU 0; 15.98 GiB total)"),
    RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB, max allowed: 9.07 GiB)."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("cuda runtime error (2) : out of memory at /tmp/THCStorage.cu:58"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("std::bad_alloc"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 25165824 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 274877906944 bytes."
    ),
]
NOT_MEMORY = [
    ValueError("out of memory"),
    KeyError(OUT),
    InputError("--memory 8 is no size"),
    RunFailed("memory ran out inside the optimizer's step"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("NCCL error: unhandled system error, out of memory on a remote peer"),
    RuntimeError("my loss ran out of memory cells"),
    RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. out of shared memory"),
    RuntimeError("a note that std::bad_alloc is no error here"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_each_librarys_way_to_say_it_counts(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", NOT_MEMORY, ids=repr)
def test_nothing_else_counts(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    [
        "could not create a primitive",
        "could not create a memory object",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
        "Unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
        "non-contiguous input.",
        "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph. "
        "CUDNN_STATUS_NOT_SUPPORTED",
    ],
)
def test_a_text_with_several_reasons_counts_where_memory_is_short(text):
    assert is_out_of_memory(RuntimeError(text), memory_is_short=lambda: True)
    assert not is_out_of_memory(RuntimeError(text), memory_is_short=lambda: False)
    assert not is_out_of_memory(RuntimeError(text))  # there is room here and now


# -- a run in which memory runs out ---------------------------------------------------------------

COUNT, BATCH = 46, 24


class Net(nn.Module):
    """BatchNorm, dropout and unkeyed noise: all that a second attempt could count twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)).relu())
        return self.last(x * (1 + 0.1 * torch.rand(1)))


class Fault(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


class Faults:
    """A loss function that raises in the micro-steps told, in forward or backward."""

    def __init__(self, *at, phase="forward", error=None, rank=None):
        self.at, self.phase, self.rank = set(at), phase, rank
        self.error = error or (lambda: torch.OutOfMemoryError(OUT))
        self.calls, self.sizes, self.held = 0, [], []

    def __call__(self, model, micro_batch):
        x, y = micro_batch
        if not torch.is_grad_enabled():  # the samples on which masks are learned
            return F.cross_entropy(model(x), y)
        number, self.calls = self.calls, self.calls + 1
        hit = number in self.at and self.rank in (None, int(torch.distributed.is_initialized())
            and torch.distributed.get_rank())  # fmt: skip
        out = model(x)
        self.held.append(weakref.ref(out))
        self.sizes.append(len(x))
        random.random(), np.random.rand()
        if hit and self.phase == "forward":
            raise self.error()
        loss = F.cross_entropy(out, y)
        return Fault.apply(loss, self.error()) if hit else loss


class Run:
    """A small training run whose every bit of state can be compared."""

    def __init__(self, micro=12, *, rank=0, world_size=1, workers=0, norm=3):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(COUNT, 6), torch.randint(3, (COUNT,)))
        self.bare = Net()
        self.ema = ModelEmaV3(self.bare, decay=0.5)
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.01)
        self.rank, self.world_size, self.data, self.norm = rank, world_size, data, norm
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        self.build(micro, workers=workers)

    def build(self, micro, *, workers=0, state=None):
        plan = BatchPlan(
            global_batch_size=BATCH,
            micro_batch_size=micro,
            world_size=self.world_size,
            norm_batch_size=self.norm,
        )
        self.large_batch = LargeBatch(Accelerator(cpu=True), plan, clip_grad_norm=1.0, seed=5)
        loader = UpdateLoader(self.data, plan, rank=self.rank, num_workers=workers)
        optimizer = getattr(self, "prepared", self.optimizer)
        _, self.prepared, self.loader, _ = self.large_batch.prepare(
            self.bare, optimizer, loader, self.scheduler, ema=self.ema
        )
        if state is not None:
            self.large_batch.load_state_dict(state)
            self.loader.load_state_dict({"next_update": state["num_updates"]})

    def switch(self, micro):
        """Go on with another micro-batch from here: the reference, without any failure."""
        self.build(micro, state=self.large_batch.state_dict())

    def updates(self, count, loss_fn):
        results = []
        while len(results) < count:
            for update in self.loader:
                results.append(self.large_batch.update(update, loss_fn))
                if len(results) == count:
                    break
        return results

    def state(self):
        return {
            **{f"model.{k}": v.clone() for k, v in self.bare.state_dict().items()},
            **{f"ema.{k}": v.clone() for k, v in self.ema.module.state_dict().items()},
            **{
                f"optimizer.{i}.{k}": v.clone()
                for i, s in self.optimizer.state_dict()["state"].items()
                for k, v in s.items()
            },
            "lr": torch.tensor(self.scheduler.get_last_lr()),
            "counters": torch.tensor(list(self.large_batch.state_dict().values())),
            "loader": torch.tensor(self.loader.next_update),
            "torch": torch.get_rng_state(),
            "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),
            "python": torch.tensor(random.getstate()[1]),
            "train": torch.tensor(self.bare.training),
            "grads": torch.tensor([p.grad is None for p in self.bare.parameters()]),
        }


def assert_equal(found, truth):
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        assert torch.equal(found[key], value), key


def seeded():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def reference(*, switch_before, sizes=(12, 6), updates=3, **options):
    """Losses and state of the run that switches to the smaller micro-batch at that update."""
    run, plain = Run(sizes[0], **options), Faults()
    seeded()
    losses = [r.loss for r in run.updates(switch_before, plain)]
    run.switch(sizes[1])
    seeded()
    losses += [r.loss for r in run.updates(updates - switch_before, plain)]
    return losses, run.state()


def faulty(faults, *, updates=3, micro=12, **options):
    run = Run(micro, **options)
    seeded()
    results = run.updates(updates, faults)
    return results, run.state()


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])  # two micro-batches an update: in updates 0 and 1
def test_an_update_that_ran_out_of_memory_is_that_of_a_run_with_smaller_micro_batches(at, phase):
    faults = Faults(at, phase=phase)
    results, state = faulty(faults)
    losses, truth = reference(switch_before=at // 2)
    assert [r.loss for r in results] == losses
    assert_equal(state, truth)
    assert [r.num_retries for r in results] == [int(i == at // 2) for i in range(3)]
    assert [r.micro_batch_size for r in results] == [12 if i < at // 2 else 6 for i in range(3)]


def test_memory_may_run_out_again_and_again():
    # micro-steps 0 at 12; 1, 2 at 6, the second fails; then 3 samples each
    results, state = faulty(Faults(0, 2))
    losses, truth = reference(switch_before=0, sizes=(12, 3))
    assert [r.loss for r in results] == losses and results[0].num_retries == 2
    assert_equal(state, truth)


def test_workers_load_the_samples_of_the_smaller_plan():
    results, state = faulty(Faults(3), workers=1)
    losses, truth = reference(switch_before=1)
    assert [r.loss for r in results] == losses
    assert_equal(state, truth)


def test_the_loader_loads_ahead_in_the_size_that_memory_allows():
    run, faults = Run(), Faults(1)
    sizes = []
    for update in run.loader:
        run.large_batch.update(update, faults)
        sizes.append((run.large_batch.plan.micro_batch_size, run.loader.plan.micro_batch_size))
    assert sizes[0] == (6, 6) and all(asked == loaded for asked, loaded in sizes)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_failed_attempt_holds_no_activation_when_its_memory_is_given_back(phase, monkeypatch):
    faults, alive = Faults(1, phase=phase), []

    class Collector:
        @staticmethod
        def collect():
            gc.collect()
            alive.append(sum(ref() is not None for ref in faults.held))

    monkeypatch.setattr(oom, "gc", Collector)
    faulty(faults, updates=1)
    assert faults.sizes == [12, 12, 6, 6, 6, 6] and alive == [0]


def test_what_is_no_lack_of_memory_passes_untouched_and_nothing_is_retried():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    run, faults = Run(), Faults(1, error=lambda: error)
    before = run.state()
    with pytest.raises(RuntimeError) as raised:
        run.updates(1, faults)
    assert raised.value is error and faults.calls == 2
    after = run.state()
    after["loader"] = before["loader"]  # the loader gave the update out
    assert_equal(after, before)


def test_one_ghost_batch_that_does_not_fit_says_what_to_try(caplog):
    run, faults = Run(), Faults(*range(9))
    before = run.state()
    with pytest.raises(RunFailed, match="one ghost batch of 3 samples") as raised:
        run.updates(1, faults)
    for word in ("--activation-checkpointing full", "norm_batch_size than 3", "frozen", "bf16"):
        assert word in str(raised.value)
    after = run.state() | {"loader": before["loader"]}
    assert_equal(after, before)
    assert faults.sizes == [12, 6, 3]
    assert next(r.message for r in caplog.records) == (
        "out of memory in update 1 at micro-batch 12: done again with 6. The global batch stays 24."
    )


def test_an_update_that_cannot_be_cut_anew_is_an_error_that_says_so():
    run = Run()
    (update, *_) = run.loader
    update.recut = None
    with pytest.raises(RunFailed, match=r"UpdateLoader.*micro_batch_size=6"):
        run.large_batch.update(update, Faults(0))


def test_memory_that_runs_out_in_the_optimizers_step_is_never_retried(monkeypatch):
    run = Run()
    calls = []

    def step(*_, **__):
        calls.append(1)
        raise torch.OutOfMemoryError(OUT)

    monkeypatch.setattr(run.prepared, "step", step)
    with pytest.raises(RunFailed, match=r"inside the optimizer's step.*last checkpoint.*6"):
        run.updates(1, Faults())
    assert len(calls) == 1
    monkeypatch.undo()
    with pytest.raises(RunFailed, match="Load a checkpoint"):
        run.updates(1, Faults())
    run.large_batch.load_state_dict({"num_updates": 0, "samples_seen": 0})
    assert run.updates(1, Faults())[0].applied


# -- several ranks --------------------------------------------------------------------------------


def on_rank(rank, world_size, at, phase, faulty_rank):
    """Losses, state and sizes of two updates in which one rank runs out of memory."""
    faults = Faults(*at, phase=phase, rank=faulty_rank)
    results, state = faulty(faults, updates=2, micro=6, rank=rank, world_size=world_size)
    return [r.loss for r in results], state, faults.sizes


def reference_on_rank(rank, world_size, switch_before):
    return reference(
        switch_before=switch_before, sizes=(6, 3), updates=2, rank=rank, world_size=world_size
    )


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_ranks_shrink_together_wherever_one_of_them_runs_out(phase, faulty_rank):
    for at, update in (((0,), 0), ((3,), 1)):
        args = (2, at, phase, faulty_rank)
        truth = values(run_forked(reference_on_rank, 2, update, world_size=2, timeout=60))
        found = values(run_forked(on_rank, *args, world_size=2, timeout=60))
        for (losses, state, sizes), (true_losses, true_state) in zip(found, truth, strict=True):
            assert losses == true_losses and sizes[-4:] == [3] * 4
            assert_equal(state, true_state)


def one_runs_out_the_other_breaks(rank):
    def loss_fn(model, micro_batch):
        raise torch.OutOfMemoryError(OUT) if rank else KeyError("broken")

    run = Run(6, rank=rank, world_size=2)
    try:
        run.updates(1, loss_fn)
    except Exception as error:
        return type(error).__name__, run.large_batch.num_updates


def test_a_rank_that_breaks_for_another_reason_ends_the_update_for_all():
    found = values(run_forked(one_runs_out_the_other_breaks, world_size=2, timeout=60))
    assert found == [("KeyError", 0), ("OutOfMemoryError", 0)]


# -- growing again, thrashing ---------------------------------------------------------------------


def test_the_micro_batch_grows_again_and_trying_costs_less_and_less(monkeypatch, caplog):
    monkeypatch.setattr("lbaccel.update.memory.micro_batch.PATIENCE", 3)
    run = Run()
    sizes = [r.micro_batch_size for r in run.updates(9, Faults(0))]
    assert sizes == [6, 6, 6, 12, 12, 12, 12, 12, 12]
    assert run.large_batch.plan == run.loader.plan
    assert run.large_batch.plan.global_batch_size == BATCH
    assert "micro-batch 12 again" in caplog.text

    class TooLarge(Faults):
        def __call__(self, model, micro_batch):
            if len(micro_batch[0]) > 6:
                raise torch.OutOfMemoryError(OUT)
            return super().__call__(model, micro_batch)

    run = Run()
    retried = [i for i, r in enumerate(run.updates(30, TooLarge())) if r.num_retries]
    assert retried == [0, 3, 3 + 6, 3 + 6 + 12]


@given(st.lists(st.booleans(), max_size=200), st.sampled_from([1, 2, 32]), st.integers(1, 40))
def test_any_history_of_lacks_keeps_whole_groups_and_the_global_batch(events, unit, groups):
    size = MicroBatchSize(asked=groups * unit, unit=unit)
    for out_of_memory in events:
        if out_of_memory:
            size.shrink()
        else:
            size.after_update()
        assert size.current % unit == 0 and unit <= size.current <= size.asked
        plan = BatchPlan(
            global_batch_size=40 * unit, micro_batch_size=size.current,
            norm_batch_size=unit if unit > 1 else None,
        )  # fmt: skip
        assert sum(m.num_samples for m in plan.partition()) == 40 * unit


def test_a_size_above_the_ranks_share_shrinks_from_what_really_ran():
    size = MicroBatchSize(asked=64 * 8, unit=8)
    assert size.shrink(used=40) == 16  # five groups ran: two are less than half
    assert PATIENCE > 1


def test_a_thrashing_allocator_makes_the_micro_batch_smaller_before_it_fails(monkeypatch, caplog):
    before_and_after = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3), (3, 3), (3, 3)]
    retries = iter([count for pair in before_and_after for count in pair])
    monkeypatch.setattr(transaction, "allocator_retries", lambda device: next(retries))
    results = Run().updates(7, Faults())
    assert [r.micro_batch_size for r in results] == [12] * 5 + [6] * 2
    assert "emptied its cache in 2 updates in a row" in caplog.text
    assert not any(r.num_retries for r in results)


# -- the search -----------------------------------------------------------------------------------


class Limited(Faults):
    """As on a device that holds activations of so many samples; counts trials with backward."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __call__(self, model, micro_batch):
        if len(micro_batch[0]) > self.limit:
            raise torch.OutOfMemoryError(OUT)
        return super().__call__(model, micro_batch)


@pytest.mark.parametrize("limit", [3, 7, 12, 23, 24, 100])
def test_the_search_finds_the_largest_size_and_leaves_everything_as_it_was(limit):
    run, loss_fn = Run(6), Limited(limit)
    run.updates(1, Faults())
    before, reserved = run.state(), run.large_batch._transaction.sharding._reservation
    assert run.large_batch.find_micro_batch_size(run.loader, loss_fn) == min(24, limit // 3 * 3)
    assert_equal(run.state(), before)
    assert run.large_batch._transaction.sharding._reservation is reserved
    (result,) = run.updates(1, loss_fn)
    assert (result.micro_batch_size, result.num_retries) == (min(24, limit // 3 * 3), 0)


def test_a_trial_runs_the_backward_pass_of_two_micro_batches():
    class InBackward(Faults):
        def __call__(self, model, micro_batch):
            self.at = {self.calls} if len(micro_batch[0]) > 9 else set()
            return super().__call__(model, micro_batch)

    run, loss_fn = Run(6), InBackward(phase="backward")
    assert run.large_batch.find_micro_batch_size(run.loader, loss_fn) == 9
    fitting = [size for size in loss_fn.sizes if size <= 9]
    assert fitting == [3, 3, 6, 6, 9, 9]


def test_a_search_before_the_first_update_changes_no_later_bit():
    searched, plain = Run(6), Run(9)
    seeded()
    assert searched.large_batch.find_micro_batch_size(searched.loader, Limited(11)) == 9
    losses = [r.loss for r in searched.updates(3, Limited(11))]
    seeded()
    assert losses == [r.loss for r in plain.updates(3, Faults())]
    assert_equal(searched.state(), plain.state())


def test_a_search_where_nothing_fits_says_what_to_try():
    run = Run(6)
    with pytest.raises(RunFailed, match="one ghost batch of 3"):
        run.large_batch.find_micro_batch_size(run.loader, Limited(2))


def search_on_rank(rank):
    run = Run(6, rank=rank, world_size=2)
    found = run.large_batch.find_micro_batch_size(run.loader, Limited(100 if rank else 7))
    return found, [r.micro_batch_size for r in run.updates(2, Faults())]


def test_ranks_take_what_fits_on_all_of_them():
    assert values(run_forked(search_on_rank, world_size=2)) == [(6, [6, 6])] * 2


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 300))
def test_doubling_and_bisection_find_the_largest(limit, unit, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    truth = min(limit, most) // unit * unit
    assert largest_that_fits(fits, unit=unit, most=most) == (truth or None)
    assert len(tried) == len(set(tried)) <= 2 * max(1, most // unit).bit_length() + 1


# -- the optimizer's state ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    ],
)
def test_the_reservation_is_as_large_as_the_state_that_the_step_makes(make):
    net = Net()
    optimizer = make(net.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    held = sorted(state.shape for _, state in state_like(optimizer))
    assert not optimizer.state and all(p.grad is None for p in net.parameters())
    net(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    made = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert held == sorted(v.shape for v in made if v.ndim)  # Adam's `step` is no tensor of weights
    assert Reservation(optimizer).num_bytes == 0  # there is state now


def test_room_for_the_state_is_held_until_the_step():
    run, seen = Run(), []

    def loss_fn(model, micro_batch):
        if torch.is_grad_enabled():  # not the samples on which masks are learned
            seen.append(run.large_batch._transaction.sharding._reservation.num_bytes)
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

    run.updates(2, loss_fn)
    weights = sum(p.nbytes for p in run.bare.parameters())
    assert seen == [2 * weights] * 2 + [0] * 2


# -- budgets and real failures --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["8", "GiB", "-1GiB", "8 bananas", "0GiB", "nan GiB", ""])
def test_a_budget_needs_a_number_and_a_unit(text):
    with pytest.raises(InputError, match="such as 8GiB"):
        parse_memory(text)


def test_budgets_on_cuda_cap_the_caching_allocator(monkeypatch):
    seen = []

    class Properties:
        total_memory = 16 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *args: seen.append(args)
    )
    device = torch.device("cuda", 0)
    with memory_limit(4 * 2**30, device) as line:
        assert "at most 4.00 GiB" in line and "16.00" in line
    assert seen == [(0.25, device), (1.0, device)]
    with pytest.raises(InputError, match=r"at most 16\.00GiB"), memory_limit(2**35, device):
        pass


def test_a_real_allocation_failure_is_survived_and_gives_the_same_bits():
    limited, plain = run_fresh("limited", "two_updates", [(64, 40), (None, 0)])
    losses, sizes, notes, state = limited
    assert sizes[0] < 64 and any("out of memory in update 1" in note for note in notes), notes
    assert losses[0] == plain[0][0]
    if sizes[1] == sizes[0]:
        assert losses == plain[0]
        assert_equal(state, plain[3])
