"""Tiny networks for the tests of `verify`, and how they are asked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lbaccel import verify

COUNT = 11


def net(*layers, block=(), before=()):
    """A recomputed block ("0"), layers from "1" on, a head: 3 features to 4 classes."""
    torch.manual_seed(0)
    first = nn.Sequential(*before, nn.Linear(3, 6), nn.Tanh(), *block)
    return nn.Sequential(first, *layers, nn.Linear(6, 4))


def samples(count=COUNT):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 3, generator=generator),
        torch.randint(4, (count,), generator=generator),
    )


def mean_loss(model, micro_batch):
    x, y = micro_batch
    return F.cross_entropy(model(x), y)


def check(model, loss_fn=mean_loss, batch=None, **options):
    return verify(model, loss_fn, samples() if batch is None else batch, **options)


def assert_equivalent(certificate, num_not_run=0):
    assert certificate.equivalent and certificate.findings == (), str(certificate)
    assert sum(c.verdict == "not run" for c in certificate.cells) == num_not_run, str(certificate)
    assert certificate.largest_relative_error < 1e-12


def found(certificate):
    """{cause: layer} of a certificate that must not be equivalent."""
    assert not certificate.equivalent, str(certificate)
    return {finding.cause: finding.layer for finding in certificate.findings}


def cells(certificate, **which):
    return [c for c in certificate.cells if all(getattr(c, k) == v for k, v in which.items())]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return x


class TorchNoise(nn.Module):
    def forward(self, x):
        return x * torch.rand(len(x), 1)
