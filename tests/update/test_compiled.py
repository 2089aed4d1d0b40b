"""Compiled networks under an update: the same results, compiled once a size of micro-batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, as it compiles


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + F.dropout(self.norm(self.conv(x)).relu(), 0.2, self.training)


def network():
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
    return nn.Sequential(
        stem, nn.BatchNorm2d(4), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    ).double()


class Images:
    def __init__(self, count):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
        self.labels = torch.arange(count) % 5

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def loss_fn(model, micro_batch):
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)


def trained(model, *, statistics="per_ghost", num_updates=3, recompute=False, compiled=None):
    """State of `model` after updates of 22 samples in micro-batches of 8, and its `LargeBatch`.

    `compiled` is applied to the model before `prepare`.
    """
    if recompute:
        apply_activation_checkpointing(model, ["2", "3"])
    prepared = model if compiled is None else compiled(model)
    plan = BatchPlan(global_batch_size=22, micro_batch_size=8, norm_batch_size=4)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, bn_statistics=statistics)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = UpdateLoader(Images(22), plan)
    prepared, optimizer, loader = large_batch.prepare(prepared, optimizer, loader)
    counts = []
    for _ in range(num_updates):
        for update in loader:
            large_batch.update(update, loss_fn)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {name: value.clone() for name, value in model.state_dict().items()}, counts


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def around(model):
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize(
    ("compiled", "statistics", "recompute"),
    [(in_place, "per_ghost", True), (around, "per_ghost", False), (in_place, "per_update", False)],
)
def test_a_compiled_network_is_updated_as_the_plain_one(compiled, statistics, recompute):
    how = {"statistics": statistics, "recompute": recompute}
    plain, _ = trained(network(), **how)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found, counts = trained(network(), **how, compiled=compiled)
    assert counts[0] == counts[-1] > 0  # compiled in the first update, and never again
    assert list(found) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_a_model_compiled_after_prepare_is_told_of():
    plan = BatchPlan(global_batch_size=8, micro_batch_size=8, norm_batch_size=4)

    def update(compiles):
        large_batch, model = LargeBatch(Accelerator(cpu=True), plan), network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = UpdateLoader(Images(8), plan)
        model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
        kept = compiles(model)
        for update in loader:
            large_batch.update(update, loss_fn)
        return kept

    with pytest.warns(UserWarning, match=r"Call model\.compile\(\)"):
        update(around)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile")
        update(in_place)
        update(lambda model: around(copy.deepcopy(model)))  # a network of its own
