"""BatchNorm over the whole batch: one forward and backward of all samples, by its passes."""

from __future__ import annotations

import copy
from itertools import pairwise

import forks
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import cross_entropy, one_update, visiting_order

from lbaccel import BatchPlan, LargeBatch, UpdateLoader
from lbaccel.batch.plan import MicroBatch
from lbaccel.data.loader import Update

TOLERANCE = 1e-12


def images_of(count, size=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (count,), generator=generator)


def made(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options).double().train()


def truth(model, images, labels, loss_fn=cross_entropy):
    """One forward and one backward in plain torch: its own layers move their own buffers."""
    twin = copy.deepcopy(model)
    loss = loss_fn(twin, (images, labels))
    loss.backward()
    gradients = {n: p.grad for n, p in twin.named_parameters()}
    return float(loss.detach()), gradients, dict(twin.named_buffers())


def apart(found, expected):
    """|found - expected| / |expected| of all tensors as one vector."""
    pairs = [(found[name].double(), x.double()) for name, x in expected.items() if x is not None]
    distance = sum(float((a - b).square().sum()) for a, b in pairs)
    return (distance / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def check(found, expected, tolerance=TOLERANCE):
    result, gradients, buffers = found
    loss, true_gradients, true_buffers = expected
    assert abs(result.loss - loss) <= tolerance * abs(loss)
    assert apart(gradients, true_gradients) <= tolerance
    assert apart(buffers, true_buffers) <= tolerance


def of_all(name, count, micro, *, size=32, checkpointing=False):
    model, (images, labels) = made(name), images_of(count, size)
    order = visiting_order(count)
    expected = truth(model, images[order], labels[order])
    found = one_update(
        model,
        images,
        labels,
        micro_batch_size=micro,
        norm_batch_size="global",
        checkpointing=checkpointing,
    )
    return found, expected


@pytest.mark.parametrize(
    ("name", "micro", "checkpointing"),
    [("resnet18", 12, False), ("resnet18", 7, True), ("seresnet18", 5, False)],
)
def test_an_update_is_that_of_the_full_batch(name, micro, checkpointing):
    check(*of_all(name, 24, micro, checkpointing=checkpointing))


# 1e-12 is out of reach where statistics of 1 x 1 pixels are taken over few samples
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "micro"),
    [("resnet18", 48), ("mobilenetv2_050", 50), ("efficientnet_b0", 64), ("densenet121", 48)],
)
def test_an_update_of_256_samples_is_that_of_the_full_batch(name, micro):
    model, (images, labels) = made(name, drop_rate=0.0), images_of(256)
    order = visiting_order(256)
    expected = truth(model, images[order], labels[order])
    found = one_update(model, images, labels, micro_batch_size=micro, norm_batch_size="global")
    check(found, expected)


class Branches(nn.Module):
    """What a chain is not: two layers on one input, a skip over them, a layer that nobody reads."""

    def __init__(self, affine=True, tracks=True):
        super().__init__()
        norm = {"affine": affine, "track_running_stats": tracks}
        self.stem = nn.Conv2d(3, 6, 3)
        self.left, self.right = nn.BatchNorm2d(6, **norm), nn.BatchNorm2d(6, **norm)
        self.inner, self.unread = nn.BatchNorm2d(6, **norm), nn.BatchNorm2d(6, **norm)
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **norm), nn.Linear(8, 10))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        x = self.stem(x)
        skip = x * self.scale
        a, b = self.left(x), self.right(x)
        self.unread(b)
        a = F.relu(a, inplace=True)
        inner = self.inner(self.mix(a))
        inner += b
        inner += skip
        skip.add_(0.5)  # known from the first pass on, where a later one still reads what it was
        inner = inner.mul_(torch.sigmoid(a.mean((2, 3), keepdim=True)))
        with torch.no_grad():
            shift = inner.mean((1, 2, 3), keepdim=True)
        return self.head((inner - shift + x.detach() + skip).mean((2, 3)))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"tracks": False}])
@pytest.mark.parametrize("micro", [9, 4, 1])
def test_branches_shared_inputs_and_writes_in_place(options, micro):
    torch.manual_seed(0)
    model, (images, labels) = Branches(**options).double(), images_of(9, size=6)
    order = visiting_order(9)
    expected = truth(model, images[order], labels[order])
    found = one_update(model, images, labels, micro_batch_size=micro, norm_batch_size="global")
    if options.get("tracks") is False:
        assert not found[2] and not expected[2]
        none = {"": torch.ones(1)}
        expected, found = (*expected[:2], none), (*found[:2], none)
    check(found, expected)


def masked(norm, micro, name="resnet10t"):
    """Three updates with dropout, dropped paths, weights and sums, by lbaccel's keyed masks."""
    model, (images, labels) = made(name, drop_rate=0.3, drop_path_rate=0.2), images_of(23)
    plan = BatchPlan(global_batch_size=23, micro_batch_size=micro, norm_batch_size=norm)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, bn_statistics="per_update")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = TensorDataset(images, labels)
    model, _, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def loss_fn(model, data):
        images, labels = data
        out = model(images * 0.7 + images.flip(1) * 0.3)
        valid = labels != 3
        hits = ((out.argmax(1) == labels) & valid).sum()
        loss = F.cross_entropy(out, labels, ignore_index=3)
        return loss, valid.sum(), {"hits": hits}

    results = []
    while len(results) < 3:
        results += [large_batch.update(update, loss_fn) for update in loader]
    return model.state_dict(), results


@pytest.mark.parametrize("micro", [23, 6, 1])
def test_masks_weights_and_sums_are_those_of_one_ghost_batch_of_all_samples(micro):
    """The ordinary update has it all in memory: 23 samples in one forward."""
    state, results = masked(23, 23)
    found, found_results = masked("global", micro)
    assert max(float((found[n] - x).abs().max()) for n, x in state.items()) < 1e-11
    assert [r.sums for r in found_results] == [r.sums for r in results]
    losses = torch.tensor([[r.loss for r in rows] for rows in (results, found_results)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [None, 0.9, 0.8, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_any_partition_and_any_host_memory_give_the_same_update(seed, share):
    """Random cuts of 13 samples; with less memory some levels run forward again."""
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted({0, 13, *torch.randint(1, 13, (5,), generator=generator).tolist()})
    found, passes = cut_at(cuts)
    if share is not None:
        found, less = cut_at(cuts, host_memory=f"{share * passes.host_bytes / 1024}KiB")
        assert less.host_bytes <= share * passes.host_bytes
        assert less.kept < passes.kept and less.again > 0
        passes = less
    assert 0.4 * passes.host_bytes < passes.peak_bytes <= passes.host_bytes
    check(found, truth(made("resnet10t"), *images_of(13)))


def cut_at(cuts, **options):
    model, (images, labels) = made("resnet10t"), images_of(13)
    plan = BatchPlan(global_batch_size=13, micro_batch_size=13, norm_batch_size="global")
    pairs = [(MicroBatch(a, (b - a,)), (images[a:b], labels[a:b])) for a, b in pairwise(cuts)]
    large_batch = LargeBatch(Accelerator(cpu=True), plan, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    large_batch.prepare(model, optimizer, [])
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    result = large_batch.update(Update(0, 13, pairs), cross_entropy)
    return (result, seen, dict(model.named_buffers())), large_batch.passes


@pytest.mark.slow
def test_at_2048_the_peak_is_that_of_a_micro_batch_of_64_and_what_is_reported():
    """By the bytes that the CPU's allocator hands out."""
    from lbaccel.models import create_backbone

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2048, 3, 32, 32, generator=generator)
    data = TensorDataset(images, torch.zeros(2048, dtype=torch.int64))

    def peak(norm):
        torch.manual_seed(0)
        model = create_backbone("cifar_resnet8", num_classes=10, img_size=32).train()
        plan = BatchPlan(global_batch_size=2048, micro_batch_size=64, norm_batch_size=norm)
        large_batch = LargeBatch(Accelerator(cpu=True), plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        _, _, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
        most = 0
        for _ in range(2):  # the second one has the optimizer's state, and knows the tape
            (update,) = loader
            most = peak_of(lambda update=update: large_batch.update(update, cross_entropy))
        return most, large_batch.passes

    plain, _ = peak(64)
    found, passes = peak("global")
    assert found <= plain + passes.peak_bytes
    assert passes.peak_bytes <= passes.host_bytes <= 1.2 * passes.peak_bytes


def peak_of(run):
    """Most bytes of the CPU's allocator during `run`, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    live = most = 0
    for _, num_bytes in sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    ):
        live += num_bytes
        most = max(most, live)
    return most


def on_ranks(rank, world, micro, count):
    model, (images, labels) = made("resnet10t"), images_of(count)
    accelerator = Accelerator(cpu=True)
    result, gradients, buffers = one_update(
        model,
        images,
        labels,
        micro_batch_size=micro,
        norm_batch_size="global",
        accelerator=accelerator,
    )
    order = visiting_order(count)
    check((result, gradients, buffers), truth(made("resnet10t"), images[order], labels[order]))
    return result.loss


@pytest.mark.parametrize(("world", "micro", "count"), [(2, 5, 17), (3, 4, 10)])
def test_ranks_share_their_statistics(world, micro, count):
    """Uneven shares: the last rank runs fewer micro-batches, and no filler moves a statistic."""
    values = forks.values(forks.run_forked(on_ranks, world, micro, count, world_size=world))
    assert len(set(values)) == 1


def two_samples_on_three_ranks(rank, count):
    """An update of `count` samples: with two of them, one rank has nothing but a filler."""
    accelerator = Accelerator(cpu=True)
    model, (images, labels) = made("resnet10t"), images_of(count, 64)
    plan = BatchPlan(
        global_batch_size=6, micro_batch_size=2, world_size=3, norm_batch_size="global"
    )
    large_batch = LargeBatch(accelerator, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bare = model
    large_batch.prepare(model, optimizer, [])
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in bare.named_parameters()})
    )
    pairs = [
        (m, (images[m.start : m.start + m.num_samples], labels[m.start : m.start + m.num_samples]))
        for m in plan.partition(rank, count)
    ]
    result = large_batch.update(Update(0, count, pairs), weighted)
    found = result, seen, dict(bare.named_buffers())
    expected = truth(made("resnet10t"), images, labels)
    check(found, expected, 1e-10)  # two samples, whose statistics lie far apart
    return all(m.is_filler for m in plan.partition(rank, count))


def weighted(model, data):
    """Weights of samples: a rank with a filler alone says so too."""
    return cross_entropy(model, data), torch.tensor(float(len(data[0])))


def test_a_rank_with_a_filler_alone_takes_part_and_counts_nothing():
    values = forks.values(forks.run_forked(two_samples_on_three_ranks, 2, world_size=3))
    assert values == [False, False, True]
