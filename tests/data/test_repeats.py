"""Repeated augmentation: whole sets of copies, each its own draw, under any plan; timm's epoch."""

from __future__ import annotations

import random
from collections import Counter

import forks
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from timm.data.distributed_sampler import RepeatAugSampler
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, KeyedImages, LargeBatch, UpdateLoader
from lbaccel.data.augment import GroupMix
from lbaccel.data.order import epoch_order, repeated_at, samples_at
from lbaccel.data.sources import ImageArray

MODES = ("wrap", "keep", "drop")


class Noisy:
    """A sample is its index and a draw of torch's generator."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item()], dtype=torch.float64)


def loader_of(count, batch, repeats, *, micro=None, world=1, rank=0, norm=None, **options):
    plan = BatchPlan(
        global_batch_size=batch,
        micro_batch_size=micro or batch,
        world_size=world,
        norm_batch_size=norm,
    )
    return UpdateLoader(Noisy(count), plan, rank=rank, repeats=repeats, **options)


def read(loader, epochs):
    """Per update: the rank's samples in order, fillers left out."""
    return [
        torch.cat([data for micro, data in update if not micro.is_filler] or [torch.zeros(0, 2)])
        for _ in range(epochs)
        for update in loader
    ]


@pytest.mark.parametrize("last_update", MODES)
@pytest.mark.parametrize(("count", "batch", "repeats"), [(21, 6, 3), (48, 8, 2), (50, 12, 4)])
def test_an_update_holds_whole_sets_of_copies_and_no_draw_comes_twice(
    count, batch, repeats, last_update
):
    updates = read(loader_of(count, batch, repeats, last_update=last_update, seed=5), epochs=4)
    for samples in updates:
        copies = Counter(samples[:, 0].tolist()).values()
        if len(samples) == batch:
            assert all(number % repeats == 0 for number in copies)  # twice where epochs meet
        else:  # the short end of an epoch
            assert len(copies) == -(-len(samples) // repeats) and max(copies) <= repeats
    draws = torch.cat(updates)
    assert len(draws[:, 1].unique()) == len(draws)


@pytest.mark.parametrize("last_update", MODES)
@pytest.mark.parametrize(("count", "batch", "repeats"), [(21, 6, 3), (50, 12, 4)])
def test_an_epoch_has_its_samples_and_shows_that_many_times_fewer_images_chosen_anew(
    count, batch, repeats, last_update
):
    stream = loader_of(count, batch, repeats, last_update=last_update).stream
    shown = []
    for epoch in range(4):
        first, end = stream.first_update(epoch), stream.first_update(epoch + 1)
        images, total = Counter(), 0
        for update in range(first, end):
            span = stream.span(update)
            indices, draws = repeated_at(
                span, 0, span[1], num_samples=count, seed=0, repeats=repeats
            )
            total += span[1]
            images.update((int(d) // repeats, int(i)) for i, d in zip(indices, draws, strict=True))
        assert max(images.values()) <= repeats  # no image of an epoch comes again in it
        own = {image for e, image in images if e == epoch}
        order = epoch_order(0, epoch, count)
        assert own <= set(order[: -(-count // repeats)].tolist())
        shown.append(frozenset(own))
        assert abs(total - stream.samples_per_epoch) < batch
        assert abs(len(images) - total / repeats) < 1
    assert len(set(shown)) == 4


def test_an_epoch_is_that_of_timms_sampler():
    """As many samples and images as `RepeatAugSampler` on 8 GPUs, each image as often."""
    count, repeats, world = 512, 4, 8
    samplers = [
        RepeatAugSampler(range(count), num_replicas=world, rank=rank, num_repeats=repeats)
        for rank in range(world)
    ]
    theirs = Counter(index for sampler in samplers for index in sampler)
    indices = torch.cat(read(loader_of(count, 64, repeats), epochs=1))[:, 0].int().tolist()
    ours = Counter(indices)
    assert sum(ours.values()) == sum(theirs.values()) == count
    assert sorted(ours.values()) == sorted(theirs.values()) == [repeats] * (count // repeats)
    # timm deals copies of an image out to different GPUs: none sees one twice in a forward
    per_gpu = 8
    for sampler in samplers:
        assert len(set(list(sampler)[:per_gpu])) == per_gpu
    assert len(set(indices[:per_gpu])) == per_gpu  # a ghost batch of a GPU's samples here


def test_no_plan_changes_images_or_draws():
    count, batch, repeats, draw = 45, 24, 3, random.Random(0)
    truth = read(loader_of(count, batch, repeats, seed=3), epochs=3)
    for _ in range(12):
        world, norm = draw.choice([1, 2, 3]), draw.choice([None, 2, 4])
        micro = draw.randint(1, 4) * (norm or 1)
        loaders = [
            loader_of(
                count, batch, repeats, micro=micro, world=world, rank=r, norm=norm, seed=3,
                num_workers=0,
            )
            for r in range(world)
        ]  # fmt: skip
        ranks = [read(loader, epochs=3) for loader in loaders]
        for parts, whole in zip(zip(*ranks, strict=True), truth, strict=True):
            assert torch.equal(torch.cat(parts), whole)
    late = loader_of(count, batch, repeats, seed=3)
    late.load_state_dict({"next_update": 2})
    assert torch.equal(read(late, epochs=1)[0], truth[2])
    with_workers = loader_of(count, batch, repeats, seed=3, num_workers=1, micro=6)
    assert torch.equal(read(with_workers, epochs=1)[0], truth[0])


def test_one_repeat_is_the_plain_order():
    for start, size in ((0, 8), (16, 8), (24, 5)):
        plain = samples_at(start + 2, 3, num_samples=21, seed=1)
        found = repeated_at((start, size), 2, 3, num_samples=21, seed=1, repeats=1)
        assert all((a == b).all() for a, b in zip(plain, found, strict=True))


def images_of(count=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return ImageArray(pixels, labels, tuple("abcd"))


def test_copies_of_an_image_in_memory_are_augmented_and_mixed_differently():
    images = KeyedImages(images_of(), (0.5,) * 3, (0.5,) * 3, pad=2, flip=0.5)
    plan = BatchPlan(global_batch_size=20, micro_batch_size=20, mix_pairs=True)
    for mix in (None, GroupMix(4, mixup=0.4)):
        loader = UpdateLoader(images, plan, repeats=5, transform=mix)
        ((_, (pixels, _)),) = list(loader.peek())
        copies = pixels.view(5, 4, -1)  # copy, image
        for image in range(4):
            assert len(torch.unique(copies[:, image], dim=0)) >= 4  # 50 crops: two may be alike


# -- the update ------------------------------------------------------------------------------------

COUNT, BATCH, REPEATS = 40, 24, 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loss_fn(model, micro_batch):
    images, labels = micro_batch
    return F.cross_entropy(model(images.double()), labels)


def data_set():
    return KeyedImages(images_of(COUNT), (0.5,) * 3, (0.5,) * 3, seed=1, pad=2, flip=0.5)


def naive(num_updates):
    """The rule in plain loops: updates in the stream, images in order, copies after each other."""
    model = network()
    for update in range(num_updates):
        start, samples = update * BATCH, []
        for copy in range(REPEATS):
            for image in range(BATCH // REPEATS):
                position = start + REPEATS * image
                epoch = position // COUNT
                place = (position - epoch * COUNT) // REPEATS
                samples.append((int(epoch_order(1, epoch, COUNT)[place]), epoch * REPEATS + copy))
        indices, draws = (np.array(column) for column in zip(*samples, strict=True))
        model.zero_grad()
        loss_fn(model, data_set().fetch(indices, draws)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def through_large_batch(rank, micro):
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=BATCH, micro_batch_size=micro, world_size=accelerator.num_processes
    )
    model = network()
    bare, optimizer = model, torch.optim.SGD(model.parameters(), lr=0.1)
    loader = UpdateLoader(data_set(), plan, rank=rank, seed=1, repeats=REPEATS)
    large_batch = LargeBatch(accelerator, plan)
    _, _, loader = large_batch.prepare(model, optimizer, loader)
    while large_batch.num_updates < 4:
        for update in loader:
            if large_batch.num_updates < 4:
                large_batch.update(update, loss_fn)
    return torch.cat([p.detach().flatten() for p in bare.parameters()]).numpy()


@pytest.mark.parametrize("micro", [24, 7, 2])
def test_four_updates_are_those_of_plain_loops(micro):
    np.testing.assert_allclose(through_large_batch(0, micro), naive(4).numpy(), rtol=1e-12)


def test_four_updates_on_two_ranks_are_those_of_plain_loops():
    found = forks.values(forks.run_forked(through_large_batch, 5, world_size=2))
    for weights in found:
        np.testing.assert_allclose(weights, naive(4).numpy(), rtol=1e-12)


# -- sizes -----------------------------------------------------------------------------------------


def test_a_batch_that_would_cut_copies_apart_is_refused_with_the_sizes_that_would_not():
    with pytest.raises(InputError, match=r"20 is no multiple of 3. Use a global batch of 18 or 21"):
        loader_of(60, 20, 3)
    with pytest.raises(InputError, match=r"2 is no multiple of 3. Use a global batch of 3, or"):
        loader_of(60, 2, 3)
    with pytest.raises(InputError, match="repeats=0 is not a whole number of at least 1"):
        loader_of(60, 20, 0)
    with pytest.raises(InputError, match="an update of 40 samples"):
        loader_of(120, 12, 3, growth=((1, 40),))
    loader = loader_of(24, 12, 3)
    read(loader, epochs=1)
    with pytest.raises(InputError, match="an update of 16 samples"):
        loader.grow(16)


def test_a_batch_that_grows_keeps_whole_sets_of_copies():
    loader = loader_of(50, 6, 3, last_update="wrap", growth=((1, 12), (2, 24)))
    updates = read(loader, epochs=4)
    assert {len(samples) for samples in updates} == {6, 12, 24}
    for samples in updates:
        assert set(Counter(samples[:, 0].tolist()).values()) <= {3, 6}  # 6: of two epochs
    draws = torch.cat(updates)[:, 1]
    assert len(draws.unique()) == len(draws)
