"""`verify` compares every tensor that a forward moves, over two updates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from verifying import assert_equivalent, check, found, net

from lbaccel.verification.diagnosis import causes


class Moves(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        start = torch.linspace(-1, 1, 6)
        self.centers = nn.Parameter(start, requires_grad=False) if frozen else start

    def forward(self, x):
        with torch.no_grad():
            self.centers.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x * 1.0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_parameter_or_plain_tensor_that_a_forward_moves_is_named(frozen):
    model = net(Moves(frozen))
    certificate = check(model)
    assert found(certificate) == {causes.STATE: "1"}
    assert "1.centers" in certificate.findings[0].evidence
    assert_equivalent(check(model, averages=["1.centers"]))
    assert torch.equal(model[1].centers, torch.linspace(-1, 1, 6))


class Momentum:
    """A teacher that begins as the student: its first move shows nothing."""

    def __init__(self, model):
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def __call__(self, model, micro_batch):
        x, y = micro_batch
        out = model(x)
        with torch.no_grad():
            target = self.teacher(x)
            for slow, fast in zip(self.teacher.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return F.cross_entropy(out, y) + F.mse_loss(out, target)


def test_a_momentum_encoder_shows_from_the_second_update():
    model = net()
    loss_fn = Momentum(model)
    certificate = check(model, loss_fn)
    assert list(found(certificate)) == [causes.STATE]
    (finding,) = certificate.findings
    assert finding.layer.startswith("loss_fn.teacher") and "second update" in finding.evidence
    assert "the loss function writes it" in finding.evidence
    assert_equivalent(check(model, loss_fn, averages=["loss_fn.teacher"]))
    for slow, fast in zip(loss_fn.teacher.parameters(), model.parameters(), strict=True):
        assert torch.equal(slow, fast) and slow.dtype == torch.float32
