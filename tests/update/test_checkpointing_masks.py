"""Dropout under wrapped blocks: the recompute repeats its masks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lbaccel.update.checkpointing import apply_activation_checkpointing


def test_recompute_repeats_the_masks_of_dropout():
    torch.manual_seed(0)
    block = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())})
    plain = nn.Sequential(block["inner"], nn.Linear(8, 1)).double()
    wrapped = copy.deepcopy(plain)

    class Whole(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    plain[0], wrapped[0] = Whole(plain[0]), Whole(wrapped[0])
    apply_activation_checkpointing(wrapped, blocks=["0"])
    x = torch.randn(16, 8, dtype=torch.float64)
    ends = []
    for model in (plain, wrapped):
        torch.manual_seed(1)
        model(x).square().sum().backward()
        ends.append([p.grad for p in model.parameters()] + [torch.get_rng_state()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)
