"""A saved optimizer state goes on in a model of another memory format as in its own."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lbaccel import BatchPlan, LargeBatch, UpdateLoader

OPTIMIZERS = {
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=fused),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=fused),
}
DATA = [
    (torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(i)).double(), torch.tensor(i % 3))
    for i in range(16)
]


def loss_fn(model, micro_batch):
    return nn.functional.cross_entropy(model(micro_batch[0]), micro_batch[1])


def trained(model, make, *, fused, updates, state=None):
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = make(model.parameters(), fused)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(DATA, plan))
    if state is not None:
        large_batch.optimizer_state().load_state_dict(copy.deepcopy(state))  # it is taken as it is
    for _ in range(updates):
        large_batch.update(next(iter(loader)), loss_fn)
    return model, copy.deepcopy(large_batch.optimizer_state().state_dict())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ],
    ids=["to channels_last", "to contiguous"],
)
def test_a_state_of_another_memory_format_is_added_to_the_same_weights(saved, resumed, name, fused):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(10, 3)
    ).double()
    model, state = trained(model.to(memory_format=saved), OPTIMIZERS[name], fused=fused, updates=2)
    found = {}
    for memory_format in (saved, resumed):
        again = copy.deepcopy(model).to(memory_format=memory_format)
        again, _ = trained(again, OPTIMIZERS[name], fused=fused, updates=2, state=state)
        found[memory_format] = [p.detach().contiguous() for p in again.parameters()]
    for a, b in zip(*found.values(), strict=True):
        assert ((a - b).norm() / a.norm()).item() < 1e-12
