"""`verify(compile=True)`: plans through torch.compile against the whole batch in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbaccel import verify
from lbaccel.verification import updates

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, as it compiles


@pytest.fixture(autouse=True)
def a_quick_backend(monkeypatch):
    """Dynamo and autograd's graphs, without the minutes that inductor takes."""
    monkeypatch.setattr(
        updates, "compile_in_place", lambda model, _: model.compile(backend="aot_eager")
    )
    yield
    torch._dynamo.reset()


def loss_fn(model, micro_batch):
    x, y = micro_batch
    return F.mse_loss(model(x), y)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))


BATCH = torch.randn(8, 3), torch.randn(8, 1)


def test_a_compiled_network_is_certified_and_ranks_are_not_run():
    certificate = verify(network(), loss_fn, BATCH, norm_batch_size=2, compile=True)
    assert certificate.equivalent and certificate.compiled
    ran = [cell for cell in certificate.cells if cell.verdict != "not run"]
    assert ran and all(cell.ranks == 1 for cell in ran)
    assert "through torch.compile" in str(certificate)
    assert "in which torch.compile can't run" in str(certificate)


class Doubtful(nn.Module):
    """Another value once it is compiled."""

    def forward(self, x):
        return x * 1.5 if torch.compiler.is_compiling() else x


def test_a_difference_that_compiling_makes_is_laid_at_its_door():
    model = nn.Sequential(nn.Linear(3, 4), Doubtful(), nn.Linear(4, 1))
    assert verify(model, loss_fn, BATCH).equivalent
    certificate = verify(model, loss_fn, BATCH, compile=True)
    assert not certificate.equivalent
    (finding,) = certificate.findings
    assert finding.cause == "torch.compile"
    assert "Leave --compile out" in finding.advice


def test_a_difference_of_the_network_itself_is_found_all_the_same():
    certificate = verify(network(), loss_fn, BATCH, compile=True)
    assert [finding.cause for finding in certificate.findings][:1] == [
        "BatchNorm over the micro-batch"
    ]


def test_an_activation_budget_below_one_is_named():
    model = nn.Sequential(nn.Linear(3, 4), Doubtful(), nn.Linear(4, 1))
    # by torch's own patch: what monkeypatch gives back to a config module, torch takes for deleted
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        (finding,) = verify(model, loss_fn, BATCH, compile=True).findings
    assert "activation_memory_budget is 0.5" in finding.advice
