"""Same trajectory: 20 updates in float64 under other plans stay within what rounding alone does."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing

UPDATES = 20


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 4),
    ).double()


def losses(*, micro_batch_size=4, checkpointing=False, perturbed=None):
    model = make_model()
    if perturbed is not None:  # one rounding error in each weight
        generator = torch.Generator().manual_seed(perturbed)
        for parameter in model.parameters():
            sign = torch.randint(2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.data *= 1 + sign.double() * torch.finfo(torch.float64).eps
    if checkpointing:
        apply_activation_checkpointing(model, blocks=["0", "1"])
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(46, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = TensorDataset(images, torch.randint(4, (46,), generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = BatchPlan(global_batch_size=19, micro_batch_size=micro_batch_size, norm_batch_size=4)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    found = []
    while len(found) < UPDATES:
        found += [large_batch.update(update, cross_entropy).loss for update in loader]
    return torch.tensor(found[:UPDATES], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch_size": 8}, {"micro_batch_size": 20, "checkpointing": True}],
    ids=["other micro-batches", "one micro-batch, checkpointed"],
)
def test_another_plan_moves_the_losses_no_more_than_a_rounding_error_does(options):
    truth = losses()
    controls = torch.stack([(losses(perturbed=seed) - truth).abs() for seed in range(4)])
    bound = 10 * controls.amax(0).cummax(0).values + 16 * torch.finfo(torch.float64).eps * truth
    difference = (losses(**options) - truth).abs()
    assert (difference <= bound).all(), (difference / bound).max()
    assert truth[-1] < truth[0] / 2  # the runs learn: it is a trajectory
    assert (losses(micro_batch_size=4) == truth).all()  # same kernels: to the bit
