"""FSDP2 (torch's fully_shard) on two gloo ranks: the update of one process."""

from __future__ import annotations

import copy

import forks
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from reference import relative_error
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, LargeBatch, RunFailed
from lbaccel.data.loader import Update

SIZES, MICRO, NORM = (39, 20, 31), 6, 6  # 4, 2 and 3 micro-steps, one of them a filler
CLIP = 0.05


def make_model(dtype):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3)).to(dtype)


def freeze(model, frozen):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


def make_optimizer(model, name):
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=0.01, eps=1e-3)
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def make_samples(number, dtype):
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(SIZES[number], 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (SIZES[number],), generator=generator)


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def loss_fn(model, micro_batch):
    x, y = micro_batch
    weight = CLASS_WEIGHTS.to(x.dtype)
    return F.cross_entropy(model(x), y, weight=weight), weight[y].sum()


def updates(rank, world_size, dtype):
    for number, count in enumerate(SIZES):
        plan = BatchPlan(
            global_batch_size=count,
            micro_batch_size=MICRO,
            world_size=world_size,
            norm_batch_size=NORM,
        )
        x, y = make_samples(number, dtype)
        parts = [(m, slice(m.start, m.start + m.num_samples)) for m in plan.partition(rank)]
        yield Update(number, count, [(m, (x[p], y[p])) for m, p in parts])


def prepared(optimizer_name, dtype, *, weights=None, frozen=()):
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=SIZES[0],
        micro_batch_size=MICRO,
        world_size=accelerator.num_processes,
        norm_batch_size=NORM,
    )
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=CLIP)
    model = make_model(dtype)
    if weights is not None:  # before it is sharded, as a resume does
        model.load_state_dict(weights)
    freeze(model, frozen)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = make_optimizer(model, optimizer_name)
    given = updates(accelerator.process_index, accelerator.num_processes, dtype)
    model, optimizer, loader = large_batch.prepare(model, optimizer, given)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert accelerator.num_processes == torch.distributed.get_world_size()
    return large_batch, model, loader


def full_state(model):
    state = model.state_dict()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def sharded_run(rank, dtype, frozen):
    history = {}
    for name in ("sgd", "adamw"):
        large_batch, model, loader = prepared(name, dtype, frozen=frozen)
        history[name] = []
        for update in loader:
            result = large_batch.update(update, loss_fn)
            state = {k: v.clone() for k, v in full_state(model).items()}
            history[name].append((result.loss, result.grad_norm, state))
        assert large_batch.samples_seen == sum(SIZES)
    return history


def reference(name, frozen=()):
    """One process in float64, plain torch, one ghost batch after the other."""
    model = make_model(torch.float64)
    freeze(model, frozen)
    optimizer = make_optimizer(model, name)
    weights, history = CLASS_WEIGHTS.double(), []
    for number, count in enumerate(SIZES):
        x, y = make_samples(number, torch.float64)
        optimizer.zero_grad()
        total = 0.0
        for rows in torch.arange(count).tensor_split(-(-count // NORM)):
            loss = F.cross_entropy(model(x[rows]), y[rows], weights, reduction="sum")
            loss = loss / weights[y].sum()
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > 1.1 * CLIP
        optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        history.append((total, float(norm), state))
    return history


FROZEN = {
    "none": (),
    "the first blocks": ("0.", "1."),
    "all but the classifier": ("0.", "1.", "2."),
    "weights": ("0.weight", "1.0.weight", "1.1.weight", "2.0.weight", "2.1.weight"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_two_sharded_ranks_give_the_update_of_one_process(dtype, tolerance, frozen):
    """Weights of its own, clipping by the norm of the whole gradient, fillers, short last ones."""
    runs = forks.values(forks.run_forked(sharded_run, dtype, frozen, world_size=2))
    for name in ("sgd", "adamw"):
        truth = reference(name, frozen)
        for run in runs:
            for (loss, norm, state), (true_loss, true_norm, true_state) in zip(
                run[name], truth, strict=True
            ):
                assert loss == pytest.approx(true_loss, rel=tolerance)
                assert norm == pytest.approx(true_norm, rel=tolerance)
                weights = [k for k in true_state if "running" not in k and "num_" not in k]
                parts = [weights, *([k] for k in true_state if k not in weights)]
                for keys in parts:  # all weights as one vector, each buffer by itself
                    off = relative_error(
                        {k: state[k] for k in keys}, {k: true_state[k] for k in keys}
                    )
                    assert off <= tolerance, (name, keys, off)


def moved_run(rank, name):
    """Two updates sharded, then the third by a plain copy, and by another sharded model."""
    large_batch, model, loader = prepared(name, torch.float64)
    *first, third = loader
    for update in first:
        large_batch.update(update, loss_fn)
    weights = {k: v.clone() for k, v in full_state(model).items()}
    saved = copy.deepcopy(large_batch.optimizer_state().state_dict())
    plain = make_model(torch.float64)
    plain.load_state_dict(weights)
    optimizer = make_optimizer(plain, name)
    optimizer.load_state_dict(saved)

    again, twin, _ = prepared(name, torch.float64, weights=weights)
    again.optimizer_state().load_state_dict(saved)
    result = again.update(third, loss_fn)
    state = {k: v.clone() for k, v in full_state(twin).items()}
    return result.loss, result.grad_norm, state, optimizer.state_dict()["state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_sharded_optimizers_state_is_that_of_one_process_and_goes_on_as_such(name):
    runs = forks.values(forks.run_forked(moved_run, name, world_size=2))
    true_loss, true_norm, true_state = reference(name)[2]
    for loss, norm, state, saved in runs:
        assert loss == pytest.approx(true_loss, rel=1e-12)
        assert norm == pytest.approx(true_norm, rel=1e-12)
        assert relative_error(state, true_state) < 1e-12
        assert sorted(saved) == list(range(len(list(make_model(torch.float64).parameters()))))
        if name == "adamw":
            assert {float(entry["step"]) for entry in saved.values()} == {2.0}


def nan_run(rank):
    large_batch, model, loader = prepared("sgd", torch.float32)
    before = {k: v.clone() for k, v in full_state(model).items()}
    update = next(loader)
    with pytest.raises(RunFailed, match="Nothing of this update was written"):
        large_batch.update(update, lambda m, b: loss_fn(m, b)[0] * float("nan"))
    assert all(torch.equal(v, before[k]) for k, v in full_state(model).items())
    again = large_batch.update(update, loss_fn)
    return again.applied, again.loss


def lost_run(rank):
    large_batch, _, loader = prepared("sgd", torch.float32)

    def failing(model, micro_batch):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss_fn(model, micro_batch)

    large_batch.update(next(loader), failing)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_a_sharded_model_as_it_was():
    (applied, loss), other = forks.values(forks.run_forked(nan_run, world_size=2))
    assert applied and other == (applied, loss)
    assert loss == pytest.approx(reference("sgd")[0][0], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_rank_without_memory_says_what_to_type_and_all_ranks_end():
    waiting, failed = forks.run_forked(lost_run, world_size=2)
    assert failed.exit_code == 1
    assert "memory ran out on rank 1" in failed.error and "--micro-batch-size" in failed.error
    assert waiting.exit_code == 1 and "lost another rank" in waiting.error


def test_a_plugin_that_accelerate_ignores_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # Accelerate sets it, for good
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(InputError, match=r"Accelerate ignores it .* runs NO.*zero2\.yaml"):
        LargeBatch(accelerator, BatchPlan(global_batch_size=4, micro_batch_size=2))
