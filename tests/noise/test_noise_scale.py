"""The hooks' noise scale against gradients that torch.autograd.grad gives, one unit at a time."""

from __future__ import annotations

import copy
import math

import forks
import pytest
import torch
from accelerate import Accelerator
from reference import ghost_batches
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from updates import cross_entropy, visiting_order

from lbaccel import BatchPlan, InputError, LargeBatch, NoiseScale, UpdateLoader
from lbaccel.data.loader import Update
from lbaccel.noise.arithmetic import estimate
from lbaccel.noise.unit_norms import UnitNorms

COUNT, NORM = 23, 3  # eight ghost batches: seven of 3 and one of 2
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def make_data(count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


class Shared(nn.Module):
    """BatchNorm, non-reentrant checkpointing, and one Linear that is used twice."""

    def __init__(self, *, recompute, reentrant=False):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.twice, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.recompute, self.reentrant = recompute, reentrant

    def block(self, x):
        return x + self.twice(torch.tanh(self.norm(x)))

    def tail(self, x):
        return torch.tanh(self.twice(x))

    def forward(self, x):
        x = self.first(x)
        for part in (self.block, self.tail):
            x = checkpoint(part, x, use_reentrant=self.reentrant) if self.recompute else part(x)
        return self.last(x)


def make_model(**options):
    torch.manual_seed(0)
    return Shared(**{"recompute": False, **options}).double()


def weighted(model, micro_batch):
    x, y = micro_batch
    weight = CLASS_WEIGHTS[y].sum()
    return F.cross_entropy(model(x), y, CLASS_WEIGHTS, reduction="sum") / weight, weight


def update_with(
    model, data, *, micro, noise, loss_fn=cross_entropy, clip=None, optimizer=None, times=1,
    accelerator=None, norm=NORM,
):  # fmt: skip
    """`times` updates over all samples in the loader's order; the engine and the last result."""
    accelerator = accelerator or Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=len(data[0]),
        micro_batch_size=micro,
        world_size=accelerator.num_processes,
        norm_batch_size=norm,
    )
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=clip, noise_scale=noise)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loader = UpdateLoader(TensorDataset(*data), plan, rank=accelerator.process_index)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    for _ in range(times):
        (update,) = loader
        result = large_batch.update(update, loss_fn)
    return large_batch, result


def flat_gradient(model, x, y, groups, weights=None):
    """Of the weighted mean loss over ghost batches, each normalised by itself; plain torch."""
    loss = 0.0
    for rows in groups:
        loss = loss + F.cross_entropy(model(x[rows]), y[rows], weights, reduction="sum")
    rows = torch.cat([torch.as_tensor(g) for g in groups])
    loss = loss / (len(rows) if weights is None else weights[y[rows]].sum())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def units_of(model, data, micro, *, weights=None, norm=NORM, order=None):
    """(n_i, g_i) of each micro-batch: whole ghost batches, micro // norm of them."""
    order = visiting_order(len(data[0])) if order is None else order
    x, y = (part[order] for part in data)
    groups = ghost_batches(len(x), norm)
    per = micro // norm
    parts = [groups[i : i + per] for i in range(0, len(groups), per)]
    gradients = [flat_gradient(model, x, y, part, weights) for part in parts]
    if weights is None:
        sizes = [float(sum(len(g) for g in part)) for part in parts]
    else:
        mass = [float(sum(weights[y[g]].sum() for g in part)) for part in parts]
        sizes = [len(x) * m / sum(mass) for m in mass]
    return sizes, gradients


def truth_of(units, preconditioner=1.0):
    """`estimate` of explicit gradients, and |g|."""
    sizes, gradients = units
    total = sum(sizes)
    update = sum(n * g for n, g in zip(sizes, gradients, strict=True)) / total
    sum_sq = sum(n * float((preconditioner * g * g).sum()) for n, g in zip(*units, strict=True))
    update_sq = float((preconditioner * update * update).sum())
    found = estimate(sum_sq, update_sq, num_samples=total, num_units=len(sizes))
    return found, float(update.norm())


def check(average, truth, rel=1e-9):
    assert average.scale_s == pytest.approx(truth.scale_s, rel=rel)
    assert average.grad_norm_sq == pytest.approx(truth.grad_norm_sq, rel=rel)


def noise_scale(**options):
    return NoiseScale(half_life_samples=1000, **options)


@pytest.mark.parametrize("micro", [3, 6, 9])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_hooks_see_what_autograd_gives_one_micro_batch_at_a_time(micro, recompute):
    data, noise = make_data(), noise_scale()
    truth, norm = truth_of(units_of(make_model(), data, micro))
    model = make_model(recompute=recompute)
    _, result = update_with(model, data, micro=micro, noise=noise)
    check(noise.average, truth)
    assert result.grad_norm == pytest.approx(norm, rel=1e-12)
    assert noise.reason == "" and noise.average.num_updates == 1


def test_weights_of_the_loss_function_are_scaled_to_the_number_of_samples():
    data, noise = make_data(), noise_scale()
    truth, norm = truth_of(units_of(make_model(), data, 6, weights=CLASS_WEIGHTS))
    _, result = update_with(make_model(), data, micro=6, noise=noise, loss_fn=weighted)
    assert result.grad_norm == pytest.approx(norm, rel=1e-12)
    check(noise.average, truth)


def test_a_micro_batch_whose_weights_are_all_zero_is_no_unit():
    (x, y), noise = make_data(12), noise_scale()
    order = visiting_order(12)
    y[order[3:6]] = -100  # the second micro-batch

    def loss_fn(model, micro_batch):
        x, y = micro_batch
        weight = (y >= 0).sum()
        total = F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum")
        return total / weight.clamp(min=1), weight

    units = units_of(make_model(), (x, y.clamp(min=0)), 3)
    kept = [0, 2, 3]
    sizes, gradients = [12 / 3] * 3, [units[1][i] for i in kept]
    truth, _ = truth_of((sizes, gradients))
    update_with(make_model(), (x, y), micro=3, noise=noise, loss_fn=loss_fn)
    check(noise.average, truth)


def test_neither_clipping_nor_a_loss_scale_enters():
    data, found = make_data(), []
    for clip, scale in ((None, None), (1e-3, None), (None, 1024.0), (1e-3, 65536.0)):
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        noise = noise_scale()
        update_with(make_model(), data, micro=6, noise=noise, clip=clip, accelerator=accelerator)
        found.append((noise.average.scale_s, noise.average.grad_norm_sq))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-10)


def test_an_update_that_an_fp16_overflow_skips_counts_nothing():
    accelerator, noise = Accelerator(cpu=True), noise_scale()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflows(model, micro_batch):
        return cross_entropy(model, micro_batch) * math.inf

    _, result = update_with(
        make_model(), make_data(), micro=6, noise=noise, loss_fn=overflows, accelerator=accelerator
    )
    assert not result.applied and noise.average.num_updates == 0 and noise.metrics() == {}


def test_an_attempt_that_ran_out_of_memory_counts_nothing():
    data, noise, calls = make_data(), noise_scale(), []

    def loss_fn(model, micro_batch):
        calls.append(len(micro_batch[0]))
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return cross_entropy(model, micro_batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lbaccel.update.engine.announce", lambda *_, **__: None)
        _, result = update_with(make_model(), data, micro=12, noise=noise, loss_fn=loss_fn)
    assert result.num_retries == 1 and result.micro_batch_size == 6
    truth, _ = truth_of(units_of(make_model(), data, 6))
    check(noise.average, truth)
    assert noise.average.num_updates == 1


def test_an_update_of_one_micro_batch_gives_no_estimate_and_says_why():
    noise = noise_scale()
    update_with(make_model(), make_data(), micro=24, noise=noise)
    assert noise.metrics() == {}
    assert "one micro-batch of 23 samples" in noise.reason
    assert "Use micro_batch_size <= 11" in noise.reason


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_the_preconditioned_form_is_that_of_adams_moments_before_the_update(clip):
    from lbaccel.data.order import epoch_order

    data, noise = make_data(), noise_scale(preconditioned=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-3)
    taken = {"clip": clip, "optimizer": optimizer, "micro": 6}
    large_batch, _ = update_with(model, data, noise=noise, **taken)
    assert noise.preconditioned.num_updates == 0  # no moments yet
    weights = copy.deepcopy(model.state_dict())
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    assert optimizer.state[model.last.weight]["step"] == 1
    preconditioner = 1 / ((moments / (1 - 0.95)).sqrt() + 1e-3)

    rows = torch.as_tensor(epoch_order(0, 1, COUNT).copy())
    plan = large_batch.plan
    parts = [(m, tuple(d[rows][m.start : m.start + m.num_samples] for d in data))
             for m in plan.partition()]  # fmt: skip
    large_batch.update(Update(1, COUNT, parts), cross_entropy)
    same = make_model()
    same.load_state_dict(weights)
    truth, _ = truth_of(units_of(same, data, 6, order=rows), preconditioner)
    check(noise.preconditioned, truth)
    metrics = noise.metrics()
    assert metrics["noise/preconditioned_batch_size"] == noise.preconditioned.ratio
    assert 1.99 < noise.average.num_updates <= 2


def test_the_preconditioned_form_of_equal_moments_is_the_plain_one():
    data, noise = make_data(), noise_scale(preconditioned=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=0.5)
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.full_like(p, 0.25 * (1 - 0.999**3)),
        }  # fmt: skip
    update_with(model, data, micro=6, noise=noise, optimizer=optimizer)
    check(noise.preconditioned, noise.average)  # P = 1 / (0.5 + 0.5)


def test_the_preconditioned_form_needs_second_moments():
    for optimizer in (torch.optim.SGD, torch.optim.Adagrad):
        model = make_model()
        with pytest.raises(InputError, match=f"{optimizer.__name__}.*second moments"):
            update_with(
                model, make_data(), micro=6, noise=noise_scale(preconditioned=True),
                optimizer=optimizer(model.parameters(), lr=0.1),
            )  # fmt: skip
    model = make_model()  # betas and eps, and no exp_avg_sq
    with pytest.raises(InputError, match=r"Adamax.*exp_avg_sq"):
        update_with(
            model, make_data(), micro=6, noise=noise_scale(preconditioned=True), times=2,
            optimizer=torch.optim.Adamax(model.parameters(), lr=0.1),
        )  # fmt: skip


def test_a_gradient_in_two_parts_is_refused():
    """Re-entrant checkpointing runs a backward a segment: a weight of two segments gets two."""
    with pytest.raises(InputError, match="use_reentrant=False"):
        update_with(
            make_model(recompute=True, reentrant=True), make_data(), micro=6, noise=noise_scale()
        )


def test_measuring_changes_no_bit_and_leaves_no_hook():
    ends = []
    for noise in (None, noise_scale()):
        model = make_model(recompute=True)
        update_with(model, make_data(), micro=6, noise=noise, times=3, clip=0.5)
        ends.append(model)
    for a, b in zip(*(m.state_dict().values() for m in ends), strict=True):
        assert torch.equal(a, b)
    assert all(not p._backward_hooks for p in ends[1].parameters())


def test_the_first_gradient_still_becomes_grad_without_a_copy():
    parameter = nn.Parameter(torch.randn(50, 50))
    addresses = []
    with UnitNorms([parameter]).collect():
        parameter.register_hook(lambda g: addresses.append(g.data_ptr()))
        (torch.randn(3, 50) @ parameter).sum().backward()
    assert parameter.grad.data_ptr() == addresses[0]


def test_nothing_is_read_on_the_host_while_gradients_add_up():
    """On the meta device there is nothing to read: item() and bool() raise."""
    for weight in (3.0, torch.ones((), device="meta"), 0.0):
        for optimizer in (None, torch.optim.AdamW):
            parameter = nn.Parameter(torch.randn(4, 4, device="meta"))
            adam = optimizer and optimizer([parameter])
            units = UnitNorms([parameter], optimizer=adam)
            with units.collect():
                for _ in range(3):
                    (torch.empty(3, 4, device="meta") @ parameter).sum().backward()
                    units.add(weight)


def test_a_resumed_engine_goes_on_exactly_and_one_that_measures_anew_starts_anew():
    data = make_data()
    ends = []
    for stop in (False, True):
        noise = noise_scale(training_set_size=COUNT)
        model = make_model()
        large_batch, _ = update_with(model, data, micro=6, noise=noise)
        if stop:
            state = copy.deepcopy(large_batch.state_dict())
            noise = noise_scale(training_set_size=COUNT)
            large_batch.noise_scale = noise
            large_batch.load_state_dict(state)
        x, y = (d.flip(0) for d in data)
        parts = [(m, (x[m.start : m.start + m.num_samples], y[m.start : m.start + m.num_samples]))
                 for m in large_batch.plan.partition()]  # fmt: skip
        large_batch.update(Update(1, COUNT, parts), cross_entropy)
        ends.append(noise.state_dict())
    assert ends[0] == ends[1] and noise.average.num_updates > 1
    large_batch.load_state_dict({"num_updates": 1, "samples_seen": COUNT})  # it was off before


def test_the_whole_training_set_in_one_update_has_no_noise_left():
    """B = N: the update's gradient is G itself, and |G|^2 = |g|^2."""
    noise = noise_scale(training_set_size=COUNT)
    _, result = update_with(make_model(), make_data(), micro=6, noise=noise)
    assert noise.average.grad_norm_sq == pytest.approx(result.grad_norm**2, rel=1e-12)


def on_rank(rank, times):
    noise = noise_scale()
    large_batch, _ = update_with(make_model(), make_data(), micro=6, noise=noise, times=times)
    assert large_batch.accelerator.num_processes == torch.distributed.get_world_size() == 2
    plan = large_batch.plan
    fillers = [m.is_filler for r in range(2) for m in plan.partition(r)]
    sizes = [m.num_samples for r in range(2) for m in plan.partition(r) if not m.is_filler]
    return noise.state_dict(), sum(fillers), sizes


def test_two_ranks_give_the_estimate_of_one_process_for_the_same_units():
    outcomes = forks.values(forks.run_forked(on_rank, 1, world_size=2))
    states, fillers, sizes = zip(*outcomes, strict=True)
    assert states[0] == states[1] and fillers[0] == 0 and len(sizes[0]) == 4
    noise = noise_scale()
    update_with(make_model(), make_data(), micro=6, noise=noise)
    for key, value in noise.state_dict()["average"].items():
        assert states[0]["average"][key] == pytest.approx(value, rel=1e-12)


def with_filler(rank):
    noise = noise_scale()
    data = tuple(d[:15] for d in make_data())  # five ghost batches: three and two
    large_batch, _ = update_with(make_model(), data, micro=3, noise=noise)
    fillers = [m.is_filler for r in range(2) for m in large_batch.plan.partition(r)]
    return noise.state_dict()["average"], sum(fillers)


def test_a_filler_counts_nothing():
    (state, fillers), _ = forks.values(forks.run_forked(with_filler, world_size=2))
    assert fillers == 1
    truth, _ = truth_of(units_of(make_model(), tuple(d[:15] for d in make_data()), 3))
    assert (state["x"], state["y"]) == pytest.approx(truth, rel=1e-9)


def under_fsdp2(rank):
    model = make_model()
    fully_shard(model)
    try:
        update_with(model, make_data(), micro=6, noise=noise_scale())
    except InputError as error:
        return str(error)
    return "nothing"


def test_fsdp2_is_refused():
    for said in forks.values(forks.run_forked(under_fsdp2, world_size=2)):
        assert "no rank sees a micro-batch's whole" in said and "--noise-scale none" in said
