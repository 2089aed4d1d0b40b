from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from updates import cross_entropy, one_update, visiting_order

from lbaccel import BatchPlan, LargeBatch, RunFailed, UpdateLoader
from lbaccel.errors import Diverged, InputError
from lbaccel.optim.scheduler import lr_scheduler
from lbaccel.update.accumulation import accumulate
from lbaccel.update.normalization import convert_batch_norm


def make_data(count=22, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=generator)


def make_network(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def prepare(
    model, data, *, plan, optimizer=None, scheduler=None, ema=None, accelerator=None, **options
):
    large_batch = LargeBatch(accelerator or Accelerator(cpu=True), plan)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = UpdateLoader(TensorDataset(*data), plan, **options)
    prepared = large_batch.prepare(model, optimizer, loader, scheduler, ema=ema)
    return large_batch, *prepared


@pytest.mark.parametrize("last_update", ["wrap", "keep", "drop"])
def test_three_epochs_equal_training_on_whole_batches(last_update):
    """Tails of 2 and 6 samples: each update's gradient is the mean over its own samples."""
    from lbaccel.batch.stream import UpdateStream
    from lbaccel.data.order import samples_at

    x, y = make_data(22)
    plan = BatchPlan(global_batch_size=8, micro_batch_size=3)
    model, truth = make_network(), make_network()
    large_batch, _, _, loader = prepare(model, (x, y), plan=plan, last_update=last_update)
    stream = UpdateStream(8, 22, last_update)
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.1, momentum=0.9)
    total = 0
    for _ in range(3):
        for update in loader:
            start, size = stream.span(total)
            rows, _ = samples_at(start, size, num_samples=22, seed=0)
            rows = torch.tensor(rows)
            loss = F.cross_entropy(truth(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in truth.parameters()])
            optimizer.step()
            result = large_batch.update(update, cross_entropy)
            total += 1
            assert result.loss == pytest.approx(loss.item(), rel=1e-12)
            assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
            assert result.samples_seen == stream.samples_seen(total)
    assert total == stream.num_updates(3)
    for a, b in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro", [1, 3, 4, 22])
def test_class_weights_and_ignored_targets_equal_the_full_batch(micro):
    x, y = make_data(22)
    y[::3] = -100
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    truth = make_network()
    loss = F.cross_entropy(truth(x), y, weight=weight, ignore_index=-100)
    loss.backward()

    def loss_fn(model, micro_batch):
        x, y = micro_batch
        total = F.cross_entropy(model(x), y, weight=weight, ignore_index=-100, reduction="sum")
        mass = torch.where(y >= 0, weight[y.clamp(min=0)], 0.0).sum()
        return total / mass.clamp(min=1e-30), mass

    result, found, _ = one_update(make_network(), x, y, micro_batch_size=micro, loss_fn=loss_fn)
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("micro", [3, 11, 22])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_comes_after_the_sum(micro, max_norm):
    x, y = make_data(22)
    truth = make_network()
    F.cross_entropy(truth(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), max_norm)
    result, found, _ = one_update(
        make_network(), x, y, micro_batch_size=micro, clip_grad_norm=max_norm
    )
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-15)
    clipped = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert clipped == pytest.approx(min(max_norm, norm.item()), rel=1e-3)


def test_a_parameter_outside_the_graph_keeps_no_gradient_and_no_decay():
    class WithSpare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = make_network(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    model = WithSpare()
    before = copy.deepcopy(model.spare.state_dict())
    x, y = make_data(8)
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    large_batch, model, _, loader = prepare(model, (x, y), plan=plan, optimizer=optimizer)
    for update in loader:
        large_batch.update(update, cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in model.spare.state_dict().items())


def test_a_second_prepare_is_refused_with_what_to_do_and_the_first_model_goes_on():
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    model, other, before = make_network(), make_network(1), make_network()
    large_batch, _, _, loader = prepare(model, make_data(8), plan=plan)
    for given in (other, model):
        optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
        with pytest.raises(InputError, match=r"one model\. Build another .*LargeBatch\(accel"):
            large_batch.prepare(given, optimizer, loader)
    (update,) = loader
    large_batch.update(update, cross_entropy)
    assert_same(other.state_dict(), make_network(1).state_dict())
    assert not torch.equal(model[0].weight, before[0].weight)


def test_a_prepare_that_was_refused_can_be_called_again():
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    model = make_network(norm=True)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="norm_batch_size"):
        large_batch.prepare(model, optimizer, [])
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    large_batch.prepare(model, optimizer, [])


def snapshot(large_batch, model, optimizer, scheduler, ema):
    return copy.deepcopy(
        [
            model.state_dict(),
            optimizer.optimizer.state_dict(),
            scheduler.state_dict()["last_epoch"],
            ema.module.state_dict(),
            large_batch.state_dict(),
        ]
    )


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def make_run(accelerator=None, norm=True):
    model = make_network(norm=norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler(optimizer, lambda s: 1 / (1 + s), samples_per_update=16)
    ema = ModelEmaV3(model, decay=0.5)
    plan = BatchPlan(global_batch_size=16, micro_batch_size=4, norm_batch_size=4)
    large_batch, model, optimizer, loader, scheduler = prepare(
        model,
        make_data(16),
        plan=plan,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        accelerator=accelerator,
    )
    return large_batch, model, optimizer, loader, scheduler, ema


def poisoned(value, at):
    """A loss function whose gradient is `value` in micro-batch `at`."""
    calls = [0]

    def loss_fn(model, micro_batch):
        calls[0] += 1
        loss = cross_entropy(model, micro_batch)
        return loss * value if calls[0] == at else loss

    return loss_fn


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_overflow_in_any_micro_batch_skips_the_update_and_moves_nothing(at):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    large_batch, model, optimizer, loader, scheduler, ema = make_run(accelerator)
    before = snapshot(large_batch, model, optimizer, scheduler, ema)
    (update,) = loader
    result = large_batch.update(update, poisoned(float("inf"), at))
    assert not result.applied and result.num_updates == 0
    assert_same(snapshot(large_batch, model, optimizer, scheduler, ema), before)
    assert accelerator.scaler.get_scale() == 512.0
    (update,) = loader
    assert large_batch.update(update, cross_entropy).applied


def test_loss_scaling_by_a_power_of_two_changes_no_bit_and_is_undone_once():
    ends = []
    for scale in (None, 1024.0):
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        large_batch, model, _, loader, *_ = make_run(accelerator)
        (update,) = loader
        large_batch.update(update, cross_entropy)
        ends.append(copy.deepcopy(model.state_dict()))
    assert_same(*ends)


def test_the_loss_scale_is_undone_before_the_norm_is_taken_and_clipped():
    ends = []
    for scale in (None, 1024.0):
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = make_data(8)
        result, found, _ = one_update(
            make_network(), x, y, micro_batch_size=4, clip_grad_norm=0.1, accelerator=accelerator
        )
        ends.append((result.grad_norm, found))
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1])


class Huge(torch.autograd.Function):
    """The identity; its gradient is so large that its norm, and no element, exceeds float32."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, 1e25)


@pytest.mark.parametrize("case", ["loss of nan", "loss of inf", "norm of inf"])
def test_a_scaler_does_not_hide_what_it_does_not_look_at(case):
    """The gradient's elements are finite, so the scaler would step, and without the clipping."""

    def loss_fn(model, micro_batch):
        loss = cross_entropy(model, micro_batch)
        if case == "norm of inf":
            return Huge.apply(loss)
        return loss + float(case.split()[-1])  # its gradient is that of the loss

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model = make_network(norm=True).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = BatchPlan(global_batch_size=16, micro_batch_size=4, norm_batch_size=4)
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=0.01)
    x, y = make_data(16)
    loader = UpdateLoader(TensorDataset(x.float(), y), plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    before = copy.deepcopy(model.state_dict())
    (update,) = loader
    with pytest.raises(Diverged, match="Nothing of this update was written"):
        large_batch.update(update, loss_fn)
    assert_same(model.state_dict(), before)
    assert accelerator.scaler.state_dict()["_growth_tracker"] == 0
    (update,) = loader
    assert large_batch.update(update, cross_entropy).applied
    moved = [p - before[name] for name, p in model.named_parameters()]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_update_and_samples_and_writes_nothing(value):
    large_batch, model, optimizer, loader, scheduler, ema = make_run()
    (update,) = loader
    large_batch.update(update, cross_entropy)
    before = snapshot(large_batch, model, optimizer, scheduler, ema)
    (update,) = loader
    with pytest.raises(RunFailed, match="at update 2 after 16 samples"):
        large_batch.update(update, poisoned(value, 3))
    assert_same(snapshot(large_batch, model, optimizer, scheduler, ema), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_exception_in_any_micro_batch_leaves_no_trace_in_the_next_update(at):
    ends = []
    for fails in (True, False):
        large_batch, model, *_, loader, _, _ = make_run()
        if fails:
            (update,) = loader

            def raises(model, micro_batch, calls=[0]):  # noqa: B006
                calls[0] += 1
                if calls[0] == at:
                    raise OverflowError("stop")
                return cross_entropy(model, micro_batch)

            with pytest.raises(OverflowError, match="stop"):
                large_batch.update(update, raises)
            loader.load_state_dict({"next_update": 0})
        (update,) = loader
        large_batch.update(update, cross_entropy)
        ends.append(copy.deepcopy(model.state_dict()))
    assert_same(*ends)


def test_scheduler_and_ema_move_once_an_update():
    large_batch, model, _, loader, scheduler, ema = make_run()
    start = copy.deepcopy(ema.module.state_dict())["0.weight"]
    rates = []
    for _ in range(3):
        for update in loader:
            rates.append(scheduler.get_last_lr()[0])
            large_batch.update(update, cross_entropy)
        average = ema.module.state_dict()["0.weight"]
        torch.testing.assert_close(average, start + 0.5 * (model[0].weight - start))
        start = average.clone()
    assert rates == pytest.approx([0.1 / (1 + 16 * u) for u in range(3)], rel=1e-15)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda loss: loss.expand(2), r"shape \(2,\)"),
        (lambda loss: loss.item(), "float"),
        (lambda loss: loss.detach(), "without a gradient"),
        (lambda loss: {"loss": loss}, "dict"),
    ],
)
def test_a_loss_function_that_returns_no_scalar_loss_is_told(output, words):
    x, y = make_data(8)
    with pytest.raises(InputError, match=words):
        one_update(
            make_network(),
            x,
            y,
            micro_batch_size=4,
            loss_fn=lambda m, b: output(cross_entropy(m, b)),
        )


def test_weights_that_add_up_to_nothing_are_refused():
    x, y = make_data(8)
    with pytest.raises(InputError, match="add up to 0"):
        one_update(
            make_network(),
            x,
            y,
            micro_batch_size=4,
            loss_fn=lambda m, b: (cross_entropy(m, b), 0.0),
        )


def test_weights_for_some_micro_batches_only_are_refused():
    x, y = make_data(8)

    def loss_fn(model, micro_batch, calls=[0]):  # noqa: B006
        calls[0] += 1
        loss = cross_entropy(model, micro_batch)
        return (loss, 1.0) if calls[0] == 1 else loss

    with pytest.raises(InputError, match="always or never"):
        one_update(make_network(), x, y, micro_batch_size=4, loss_fn=loss_fn)


def test_update_before_prepare_and_contradicting_accelerators_are_refused():
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    with pytest.raises(InputError, match="before prepare"):
        LargeBatch(Accelerator(cpu=True), plan).update(None, cross_entropy)
    with pytest.raises(InputError, match=r"world_size=accelerator\.num_processes"):
        LargeBatch(
            Accelerator(cpu=True),
            BatchPlan(global_batch_size=8, micro_batch_size=4, world_size=2),
        )
    with pytest.raises(InputError, match="the plan derives the number of micro-batches"):
        LargeBatch(Accelerator(cpu=True, gradient_accumulation_steps=4), plan)


def test_accumulation_never_reads_a_tensor_on_the_host():
    """On the meta device there is nothing to read: item() and bool() raise."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model.to("meta")
    norm = convert_batch_norm(model, 2)
    plan = BatchPlan(global_batch_size=7, micro_batch_size=4, norm_batch_size=2)
    norm.begin()
    batches = [
        (m, (torch.empty(m.num_samples, 3, 8, 8, device="meta"), torch.zeros(m.num_samples).long()))
        for m in plan.partition()
    ]
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.empty((), device="meta").item()

    def loss_fn(model, micro_batch):
        logits = model(micro_batch[0])
        return logits.square().mean(), (logits > 0).sum()

    for loss in (loss_fn, lambda m, b: loss_fn(m, b)[0]):
        sums = accumulate(model, batches, loss, num_samples=7, scopes=[norm])
        assert sums.loss.device.type == "meta"


class CountCasts(TorchDispatchMode):
    """Casts of a tensor of one shape from float32 to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].shape == self.shape
            and out.dtype == torch.bfloat16
            and args[0].dtype == torch.float32
        ):
            self.count += 1
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_casts_the_weights_once_an_update(checkpointing):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1)
    shape = model.blocks[0].mlp.fc1.weight.shape
    x, y = torch.randn(12, 3, 32, 32), torch.randint(3, (12,))
    with CountCasts(shape) as casts:
        one_update(
            model,
            x,
            y,
            micro_batch_size=2,
            checkpointing=checkpointing,
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        )
    assert casts.count == 1


def test_the_loss_runs_outside_autocast_as_in_a_plain_accelerate_loop():
    seen = []

    def loss_fn(model, micro_batch):
        x, y = micro_batch
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(model(x), y)

    x, y = make_data(8)
    one_update(
        make_network().float(),
        x.float(),
        y,
        micro_batch_size=4,
        loss_fn=loss_fn,
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
    )
    assert seen == [False, False]


def test_counters_survive_a_round_trip_through_accelerate(tmp_path):
    large_batch, _model, _, loader, _, _ = make_run()
    for update in loader:
        large_batch.update(update, cross_entropy)
    large_batch.accelerator.save_state(tmp_path)
    other, model, _, other_loader, scheduler, _ = make_run(large_batch.accelerator)
    del model, scheduler
    other.load_state_dict(large_batch.state_dict())
    other_loader.load_state_dict(loader.state_dict())
    assert (other.num_updates, other.samples_seen, other_loader.epoch) == (1, 16, 1)


def test_the_reference_order_is_not_the_identity():
    assert list(visiting_order(22)) != list(range(22))
