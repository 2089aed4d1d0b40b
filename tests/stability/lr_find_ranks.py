"""Run by torchrun, or alone: a range test and the curvature over the ranks.

Each rank writes a JSON line to the file named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import cross_entropy
from whole_state import whole_state

from lbaccel import BatchPlan, LargeBatch, RunFailed, UpdateLoader, largest_curvature, lr_find


def main(out: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
    ).double()
    data = TensorDataset(torch.randn(70, 5, dtype=torch.float64), torch.randint(3, (70,)))
    plan = BatchPlan(
        global_batch_size=23, micro_batch_size=6, world_size=world_size, norm_batch_size=3
    )
    large_batch = LargeBatch(accelerator, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    bare = model
    model, optimizer, loader = large_batch.prepare(
        model, optimizer, UpdateLoader(data, plan, rank=rank)
    )
    if world_size > 1:
        assert isinstance(model, nn.parallel.DistributedDataParallel), type(model)
        assert dist.get_world_size() == world_size
    before = whole_state(large_batch, bare, optimizer, loader)
    found = lr_find(large_batch, loader, cross_entropy, min_lr=1e-3, max_lr=1e6, num_updates=25)
    curvature = largest_curvature(
        large_batch, loader, cross_entropy, tolerance=1e-10, max_products=80
    )
    seen: list[float] = []

    def one_rank_fails(model, micro_batch):
        x, y = micro_batch
        seen.extend(x[:, 0].tolist())
        if rank == world_size - 1 and len(seen) > 40:
            raise ZeroDivisionError("as it happens")
        return F.cross_entropy(model(x), y)

    raised = []
    for trial in (
        lambda: lr_find(large_batch, loader, one_rank_fails, min_lr=1e-3, max_lr=1.0),
        lambda: largest_curvature(large_batch, loader, one_rank_fails),
    ):
        try:
            trial()
        except (RunFailed, ZeroDivisionError) as error:
            raised.append(type(error).__name__)
    line = {
        "rank": rank,
        "range": found.to_dict(),
        "lambda_max": curvature.lambda_max,
        "num_samples": curvature.num_samples,
        "raised": raised,
        "seen": seen[:8],
        "as_it_was": whole_state(large_batch, bare, optimizer, loader) == before,
    }
    with Path(out).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
