"""What tests run in a fresh interpreter under a real limit on memory (see `forks.run_fresh`)."""

from __future__ import annotations

import logging
import resource
import tempfile
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import yaml
from accelerate import Accelerator
from runs_of_recipe import rows
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, train
from lbaccel.update.memory.budget import memory_limit


def two_updates(cases):
    """Losses, sizes, notes and weights for each (micro-batch or None: as found, budget in MiB)."""
    found = []
    for micro, budget in cases:
        found.append(_two_updates(micro or found[-1][1][0], budget))
    return found


def _two_updates(micro, budget_mib):
    notes = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())
    logging.getLogger("lbaccel").addHandler(handler)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(4, (64,)))
    plan = BatchPlan(global_batch_size=64, micro_batch_size=micro, norm_batch_size=4)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net, optimizer, loader = large_batch.prepare(net, optimizer, UpdateLoader(data, plan))

    def loss_fn(model, micro_batch):
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

    net(torch.randn(4, 3, 32, 32))  # libraries take what they need once
    limit = memory_limit(budget_mib * 2**20, torch.device("cpu")) if budget_mib else None
    if limit is not None:
        limit.__enter__()
    results = []
    while len(results) < 2:
        results += [large_batch.update(update, loss_fn) for update in loader]
    if limit is not None:
        limit.__exit__(None, None, None)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    state = {k: v.clone() for k, v in net.state_dict().items()}
    return [r.loss for r in results], [r.micro_batch_size for r in results], notes, state


# small weights and large activations: libraries keep buffers of the weights' size for each shape
FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "96", "--global-batch-size", "256"),
    *("--max-updates", "2", "--log-with", "run_folder"),
]


def recipes(runs):
    """Exit code, config.yaml and metrics of each run of the recipe with these flags."""
    found = []
    for flags in runs:
        with tempfile.TemporaryDirectory() as place:
            code = train.main([*FLAGS, "--output", f"{place}/runs", *flags])
            folders = list(Path(place, "runs").glob("*"))
            config = yaml.safe_load((folders[0] / "config.yaml").read_text()) if folders else {}
            found.append((code, config, rows(folders[0]) if folders else []))
    return found


def compiled_kernels(cases):
    """Losses, sizes and weights of timm's smallest ByobNet: oneDNN compiles 60 kernels a shape."""
    found = []
    for micro, budget_mib in cases:
        torch.manual_seed(0)
        net = timm.create_model("test_byobnet", num_classes=4, in_chans=1)
        data = TensorDataset(torch.randn(128, 1, 64, 64), torch.randint(4, (128,)))
        size = micro or found[-1][1][0]
        plan = BatchPlan(global_batch_size=128, micro_batch_size=size, norm_batch_size=8)
        large_batch = LargeBatch(Accelerator(cpu=True), plan)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = large_batch.prepare(net, optimizer, UpdateLoader(data, plan))

        def loss_fn(model, micro_batch):
            return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

        device = torch.device("cpu")
        with memory_limit(budget_mib * 2**20, device) if budget_mib else nullcontext():
            results = [large_batch.update(update, loss_fn) for update in loader]
        sizes = [result.micro_batch_size for result in results]
        found.append(([result.loss for result in results], sizes, dict(net.state_dict())))
    return found
