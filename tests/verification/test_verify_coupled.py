"""`verify(embed=...)`: losses on the rows of the whole batch, and what makes them differ."""

from __future__ import annotations

import pytest
import torch
from coupled_cases import LOSSES, Network, functions, make_data
from torch import nn
from torch.nn import functional as F

from lbaccel import InputError, verify
from lbaccel.update import coupled
from lbaccel.verification.diagnosis import causes

COUNT = 11


def check(model, loss_fn, embed, **options):
    return verify(model, loss_fn, make_data(COUNT), embed=embed, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_certified_over_partitions_ranks_and_recompute(name):
    torch.manual_seed(0)
    model = Network(dropout=0.3)
    loss_fn, embed = functions(name)
    certificate = check(model, loss_fn, embed, blocks=["image.1", "text.1"])
    assert certificate.equivalent, str(certificate)
    assert {cell.verdict for cell in certificate.cells} == {"pass"}
    assert {cell.ranks for cell in certificate.cells} == {1, 2}
    assert "whose rows the loss compares" in certificate.reference


def test_ghost_batches_and_noise_in_the_loss_are_certified():
    def loss_fn(model, rows):
        a, b, *_ = rows
        noise = F.dropout(a, 0.5) + 0.1 * torch.randn_like(a)
        return F.mse_loss(noise @ b.T, torch.eye(len(a), dtype=a.dtype))

    _, embed = functions("clip")
    model = Network(norm=True, dropout=0.2)
    certificate = check(model, loss_fn, embed, norm_batch_size=3, blocks=["image.1"])
    assert certificate.equivalent, str(certificate)


def test_a_loss_that_was_not_given_embed_is_told_of_it():
    loss_fn, embed = functions("clip")

    def plain(model, micro_batch):
        return loss_fn(model, embed(model, micro_batch))

    certificate = verify(Network(), plain, make_data(COUNT))
    (finding,) = certificate.findings
    assert finding.cause == causes.COUPLED_LOSS
    assert "update(update, loss_fn, embed=embed)" in finding.advice


def test_an_embed_that_itself_couples_samples_is_found():
    class Whitened(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Network()

        def forward(self, images, texts):
            a, b = self.net(images, texts)
            return a - a.mean(0), b

    loss_fn, embed = functions("supcon")
    certificate = check(Whitened(), loss_fn, embed)
    assert not certificate.equivalent
    assert causes.COUPLED_MODULE in {f.cause for f in certificate.findings}


def test_batch_norm_over_the_micro_batch_is_found_in_embed():
    loss_fn, embed = functions("supcon")
    certificate = check(Network(norm=True), loss_fn, embed)
    assert causes.BATCH_NORM in {f.cause for f in certificate.findings}


def test_a_temperature_that_counts_on_every_rank_is_not_certified(monkeypatch):
    plain = coupled._loss
    monkeypatch.setattr(coupled, "_loss", lambda *a, counts, **k: plain(*a, counts=True, **k))
    loss_fn, embed = functions("siglip")
    certificate = check(Network(), loss_fn, embed)
    failed = {cell.ranks for cell in certificate.cells if cell.verdict == "fail"}
    assert failed == {2}


def test_an_embed_that_is_no_function_is_refused():
    with pytest.raises(InputError, match=r"embed=3 is no function"):
        check(Network(), functions("clip")[0], 3)
