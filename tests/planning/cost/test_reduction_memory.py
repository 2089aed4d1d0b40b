"""The buffer that DDP's reduction holds: what the update allocates is what the planner counts."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import CARDS
from lbaccel.planning.cost.update import Network
from lbaccel.planning.estimate import Estimator
from lbaccel.update import accumulation
from lbaccel.update.sharding.replicated import Replicated

MIB = 2**20
WIDE, MANY = (1024, 8192, 16), (1024, 1024, *[1024] * 8, 16)  # one of 32 MiB; nine of 4 MiB
CASES = {"wide": (WIDE, 32 * MIB), "many": (MANY, 25 * MIB), "small": ((64, 64, 16), None)}


def network(widths):
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("widths", "expected"), CASES.values(), ids=CASES)
def test_a_plan_for_ddp_counts_the_reduction_buffer_that_the_update_holds(
    widths, expected, monkeypatch
):
    model = network(widths)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    two = SimpleNamespace(num_processes=2, scaler=None)
    prepared = SimpleNamespace(optimizer=optimizer)
    sharding = Replicated(two, model, prepared, clip_grad_norm=None)  # type: ignore[arg-type]
    sharding.reserve()
    buffer = sharding._buffer
    assert buffer is not None
    gradients = sum(p.nbytes for p in model.parameters())
    assert buffer.nbytes == (gradients if expected is None else expected)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    traced = Network(
        model=model,
        make_batch=lambda n: (torch.zeros(n, widths[0]), torch.zeros(n).long()),
        loss_fn=loss_fn,
        optimizer=optimizer,
    )
    plan = BatchPlan(global_batch_size=8, micro_batch_size=2)
    one = Estimator(traced, plan, CARDS["RTX 3060"], "fp32")
    alone, of_two = (e.estimate(Candidate(2)) for e in (one, one.of_world(2)))
    assert of_two.peak - alone.peak == gradients + buffer.nbytes  # DDP's own buckets, and it
    assert of_two.breakdown["gradients"] - alone.breakdown["gradients"] == gradients + buffer.nbytes

    # Every bucket lies in it: the reduction takes no memory besides.
    loss_fn(model, (torch.ones(2, widths[0]), torch.zeros(2).long())).backward()
    reduced = []
    monkeypatch.setattr(accumulation.dist, "all_reduce", reduced.append)
    accumulation.reduce_gradients(
        sharding.parameters, (True,) * len(sharding.parameters), world_size=2, buffer=buffer
    )
    assert sum(flat.nbytes for flat in reduced) == gradients
    assert all(flat.data_ptr() == buffer.data_ptr() for flat in reduced)
    assert max(flat.nbytes for flat in reduced) <= buffer.nbytes
