"""Attempts that fail, run out of memory or are refused, and runs that go on."""

from __future__ import annotations

import copy

import forks
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, NoiseScale, RunFailed, UpdateLoader, verify
from lbaccel.randomness.layouts import NotLearned
from lbaccel.update.memory import oom


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def samples(count=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.randint(10, (count,), generator=generator))


def prepared(*, micro=4, world=1, rank=0, accelerator=None, model=None, **options):
    model = model or small()
    plan = BatchPlan(
        global_batch_size=12, micro_batch_size=micro, world_size=world, norm_batch_size="global"
    )
    large_batch = LargeBatch(accelerator or Accelerator(cpu=True), plan, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = UpdateLoader(samples(), plan, rank=rank)
    _, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    return large_batch, model, loader


def trained(count=3, **options):
    large_batch, model, loader = prepared(**options)
    while large_batch.num_updates < count:
        for update in loader:
            large_batch.update(update, cross_entropy)
    return {name: x.clone() for name, x in model.state_dict().items()}, large_batch


def far(state, expected):
    return max(float((state[name] - x).abs().max()) for name, x in expected.items())


def test_memory_that_runs_out_in_any_pass_ends_in_a_smaller_micro_batch(monkeypatch):
    """In forward, in a statistic, in backward; the update is that of a run with enough."""
    from lbaccel.update.global_norm import passes, statistics

    expected, _ = trained(2)
    for owner, name, at in (
        (passes._Attempt, "_run", 2),
        (passes._Attempt, "_run", 9),
        (statistics.Statistics, "add", 4),
        (passes._Attempt, "_pull", 1),
    ):
        calls = []
        plain = getattr(owner, name)

        def failing(*args, plain=plain, calls=calls, at=at, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, failing)
            state, large_batch = trained(2)
        assert len(calls) > at and large_batch.plan.micro_batch_size == 2
        assert far(state, expected) < 1e-12


def test_a_loss_that_fails_leaves_weights_statistics_and_masks_as_they_were():
    expected, _ = trained(1)
    large_batch, model, loader = prepared()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fails(model, data):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("as it happens")
        return cross_entropy(model, data)

    (update,) = loader
    with pytest.raises(ZeroDivisionError):
        large_batch.update(update, fails)
    assert far(model.state_dict(), before) == 0
    large_batch.load_state_dict({"num_updates": 0, "samples_seen": 0})
    loader.load_state_dict({"next_update": 0, "growth": [], "order": loader.order})
    (update,) = loader
    large_batch.update(update, cross_entropy)
    assert far(model.state_dict(), expected) == 0


def fails_on_one_rank(rank, world, kind, at):
    """(what was raised, whether the weights stayed, whether the next update worked)."""
    from lbaccel.update.global_norm import passes

    accelerator = Accelerator(cpu=True)
    large_batch, model, loader = prepared(micro=2, world=world, rank=rank, accelerator=accelerator)
    before = copy.deepcopy(model.state_dict())
    plain, calls = passes._Attempt._run, []

    def failing(*args, **kwargs):
        calls.append(1)
        if rank == world - 1 and len(calls) == at:
            raise kind("CUDA out of memory" if kind is torch.OutOfMemoryError else "as it happens")
        return plain(*args, **kwargs)

    passes._Attempt._run = failing
    (update,) = loader
    try:
        result = large_batch.update(update, cross_entropy)
        raised = f"{result.num_retries} retries"
    except (ZeroDivisionError, RunFailed) as error:
        raised = f"{type(error).__name__}: {error}"
    stayed = far(model.state_dict(), before) == 0
    (update,) = loader
    return raised, stayed, large_batch.update(update, cross_entropy).applied


@pytest.mark.parametrize("at", [1, 4, 8])  # recording, in a forward pass, in a backward pass
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_fails_in_any_pass_ends_the_attempt_of_all(world, at):
    found = forks.values(
        forks.run_forked(fails_on_one_rank, world, ZeroDivisionError, at, world_size=world)
    )
    assert found[-1] == ("ZeroDivisionError: as it happens", True, True)
    for said, stayed, applied in found[:-1]:
        assert f"rank {world - 1}: ZeroDivisionError: as it happens" in said
        assert stayed and applied


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_rank_that_runs_out_of_memory_takes_all_to_smaller_micro_batches(at):
    found = forks.values(
        forks.run_forked(fails_on_one_rank, 2, torch.OutOfMemoryError, at, world_size=2)
    )
    assert found == [("1 retries", False, True)] * 2


@pytest.mark.parametrize("at", [1, 4, 8])
def test_masks_that_one_rank_must_learn_anew_send_all_ranks_back_to_the_start(at):
    found = forks.values(forks.run_forked(fails_on_one_rank, 2, NotLearned, at, world_size=2))
    assert found == [("0 retries", False, True)] * 2


def test_a_run_goes_on_from_a_checkpoint_in_the_middle(tmp_path):
    expected, _ = trained(4)
    accelerator = Accelerator(cpu=True)
    large_batch, model, loader = prepared(accelerator=accelerator)
    for _ in range(2):
        (update,) = loader
        large_batch.update(update, cross_entropy)
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    large_batch, model, loader = prepared(accelerator=accelerator, micro=3)
    accelerator.load_state(str(tmp_path))
    for _ in range(2):
        (update,) = loader
        large_batch.update(update, cross_entropy)
    assert far(model.state_dict(), expected) < 1e-12


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 10)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(self.norm(self.norm(x)))


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def reads(out):
    return out if float(out.sum()) == 0 else out * 1.0


def views(out):
    part = out[:, :2]
    out.add_(1.0)
    return out + part.sum(1, keepdim=True)


def chooses(out):
    return out[out[:, 0] > 0].sum(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (reads, "__float__ reads a number of what comes after BatchNorm"),
        (Custom.apply, "CustomBackward is a backward of an autograd.Function"),
        (views, "whose memory was written in place through another view"),
        (chooses, "shape depends on values of samples"),
        (lambda out: (out.register_hook(print), out)[1], "register_hook the passes can't repeat"),
    ],
)
def test_a_forward_that_passes_cannot_repeat_is_named(change, words):
    large_batch, model, loader = prepared()
    before = copy.deepcopy(model.state_dict())

    def loss_fn(model, data):
        images, labels = data
        out = change(model(images))
        return out.sum() if out.ndim == 1 else F.cross_entropy(out, labels)

    (update,) = loader
    with pytest.raises(InputError, match=words):
        large_batch.update(update, loss_fn)
    assert far(model.state_dict(), before) == 0


def test_a_layer_that_runs_twice_is_named():
    large_batch, _, loader = prepared(model=Twice().double())
    (update,) = loader
    with pytest.raises(InputError, match=r"'norm' runs twice in one forward.*a number in"):
        large_batch.update(update, cross_entropy)


def test_one_value_a_channel_in_all_is_named():
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10)
    )
    plan = BatchPlan(global_batch_size=1, micro_batch_size=1, norm_batch_size="global")
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = large_batch.prepare(
        model.double(), optimizer, UpdateLoader(samples(1), plan)
    )
    (update,) = loader
    with pytest.raises(InputError, match="'1' has one value a channel in the whole update"):
        large_batch.update(update, cross_entropy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_scale": NoiseScale(half_life_samples=10)}, "with a noise scale"),
        ({"averages": ["1.running_mean"]}, "with averages that a forward moves"),
        ({"host_memory": "much"}, "is no size"),
    ],
)
def test_options_without_a_place_in_the_passes_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        prepared(**options)


def test_a_compiled_model_is_refused():
    model = small()
    model.compile(backend="eager")
    with pytest.raises(InputError, match="with a compiled model"):
        prepared(model=model)


def test_host_memory_without_passes_and_too_little_of_it():
    plan = BatchPlan(global_batch_size=12, micro_batch_size=4, norm_batch_size=4)
    with pytest.raises(InputError, match="nothing is kept on the host"):
        LargeBatch(Accelerator(cpu=True), plan, host_memory="1GiB")
    large_batch, _, loader = prepared(host_memory="1KiB")
    (update,) = loader
    with pytest.raises(InputError, match=r"keeps at least .* GiB .*Give more, use more ranks"):
        large_batch.update(update, cross_entropy)


def test_a_network_without_layers_in_training_mode_is_an_ordinary_update():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 10)).double()
    large_batch, _, loader = prepared(model=model)
    (update,) = loader
    assert large_batch.update(update, cross_entropy).applied and large_batch.passes is None


def test_verify_certifies_what_fails_as_it_is():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(7, 3, 6, 6, generator=generator), torch.arange(7)
    assert not verify(small(), cross_entropy, batch).equivalent
    assert verify(small(), cross_entropy, batch, norm_batch_size="global").equivalent


def test_an_out_of_memory_error_is_recognised():
    assert oom.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
