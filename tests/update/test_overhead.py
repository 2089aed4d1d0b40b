"""Kernels that an update adds to a plain loop, a micro-batch: counts, so that no clock is read."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from launches import Launches
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, NoiseScale, UpdateLoader

MICRO, BLOCKS = 4, 10


class Block(nn.Module):
    def __init__(self, norm, mask):
        super().__init__()
        self.linear, self.norm, self.mask = nn.Linear(8, 8), norm(), mask()

    def forward(self, x):
        return x + self.mask(self.norm(self.linear(x)))


def network(norm, mask):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(norm, mask) for _ in range(BLOCKS)))


def data_of(count):
    torch.manual_seed(1)
    return torch.randn(count, 8), torch.randint(8, (count,))


def loss_fn(model, data):
    x, y = data
    return F.cross_entropy(model(x), y)


def of_lbaccel(count, norm, mask, **options):
    """Kernels of one update, the second: the first learns where the masks hold the samples."""
    model = network(norm, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = BatchPlan(global_batch_size=count, micro_batch_size=MICRO, norm_batch_size=MICRO)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, **options)
    batches = list(zip(*(part.split(MICRO) for part in data_of(count)), strict=True))
    loader = UpdateLoader(TensorDataset(*data_of(count)), plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    launches = Launches()
    for _ in range(2):
        (update,) = loader
        update.recut = None  # the same tensors as the plain loop's: loading is not counted
        update.micro_batches = zip(plan.partition(0), batches, strict=True)
        launches.count = 0
        with launches:
            large_batch.update(update, loss_fn)
    return launches.count


def of_a_plain_loop(count, norm, mask):
    model = network(norm, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(zip(*(part.split(MICRO) for part in data_of(count)), strict=True))
    with Launches() as launches:
        total = torch.zeros(())
        for data in batches:
            loss = loss_fn(model, data)
            (loss * (MICRO / count)).backward()
            total += loss.detach() * (MICRO / count)
        optimizer.step()
        optimizer.zero_grad()
    return launches.count


def a_micro_batch(count_of, *args, **options):
    few, more = (count_of(n * MICRO, *args, **options) for n in (4, 12))
    return (more - few) / 8, few - 4 * (more - few) / 8


@pytest.mark.parametrize(
    ("norm", "mask"),
    [
        (nn.Identity, nn.Identity),
        (lambda: nn.BatchNorm1d(8), nn.Identity),
        (nn.Identity, lambda: DropPath(0.2)),
        (nn.Identity, lambda: nn.Dropout(0.2)),
        (lambda: nn.BatchNorm1d(8), lambda: DropPath(0.2)),
    ],
    ids=["plain", "BatchNorm", "drop-path", "dropout", "both"],
)
def test_a_micro_batch_launches_no_more_kernels_than_in_a_plain_loop(norm, mask):
    each, fixed = a_micro_batch(of_lbaccel, norm, mask)
    plain, plain_fixed = a_micro_batch(of_a_plain_loop, norm, mask)
    assert plain > 2 * BLOCKS
    assert each <= plain
    # An update: keys, the norm of the gradient, statistics; and each call's mask of all samples.
    assert fixed - plain_fixed <= 80 + 12 * BLOCKS


def test_the_noise_scale_launches_a_few_kernels_a_micro_batch():
    noise = {"noise_scale": NoiseScale(half_life_samples=100)}
    each, _ = a_micro_batch(of_lbaccel, nn.Identity, nn.Identity, **noise)
    without, _ = a_micro_batch(of_lbaccel, nn.Identity, nn.Identity)
    assert each - without <= 5  # of 20 parameters
