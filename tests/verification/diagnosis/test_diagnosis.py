"""Each defect that makes plans differ is named by its layer and its cause; its twin is not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from verifying import (
    Counting,
    TorchNoise,
    assert_equivalent,
    cells,
    check,
    found,
    mean_loss,
    net,
    samples,
)

from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import accumulation
from lbaccel.update.normalization import GhostNorm
from lbaccel.verification.diagnosis import causes
from lbaccel.verification.diagnosis.probe import OUTSIDE

# -- the causes -----------------------------------------------------------------------------------


def test_batch_norm_over_the_micro_batch_is_named_with_what_mends_it():
    certificate = check(net(nn.LayerNorm(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)))
    assert found(certificate)[causes.BATCH_NORM] == "2"
    (finding,) = [f for f in certificate.findings if f.cause == causes.BATCH_NORM]
    assert "first of 2" in finding.evidence and "--norm-batch-size" in finding.advice
    verdicts = {(c.partition, c.verdict) for c in cells(certificate, checkpointing=False)}
    assert ("11", "pass") in verdicts and ("4 + 4 + 3", "fail") in verdicts
    (single,) = cells(certificate, partition="11 x 1", checkpointing=False)
    assert single.verdict == "fail" and "more than 1 value per channel" in single.reason


def test_double_update_under_recompute_is_told_by_the_buffers_alone():
    certificate = check(net(block=[nn.BatchNorm1d(6)]))
    assert found(certificate)[causes.DOUBLE_UPDATE] == "0.2"
    (cell,) = cells(certificate, partition="11", checkpointing=True)
    assert cell.verdict == "fail" and cell.gradient_error < 1e-12 < cell.buffer_error
    (finding,) = [f for f in certificate.findings if f.cause == causes.DOUBLE_UPDATE]
    assert "num_batches_tracked is 2 where it would be 1" in finding.evidence


class Following(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x


def test_a_buffer_of_the_users_that_moves_once_per_micro_batch_is_named():
    certificate = check(net(Counting()))
    assert found(certificate) == {causes.BUFFER: "1"}
    assert "1.count is 2 where it would be 1" in certificate.findings[0].evidence
    assert found(check(net(Following()))) == {causes.BUFFER: "1"}


def test_a_buffer_of_the_users_inside_a_recomputed_block_is_named_for_both():
    certificate = check(net(before=[Counting()]))
    assert found(certificate) == {causes.BUFFER: "0.0", causes.DOUBLE_UPDATE: "0.0"}
    assert all(c.gradient_error < 1e-12 for c in certificate.cells)


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x * torch.rand(len(x), 1, generator=self.generator)


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x * np.random.rand()


class PythonNoise(nn.Module):
    def forward(self, x):
        return x * random.random()


class FusedAttention(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        self.p = p

    def forward(self, x):
        q = x.view(len(x), 1, 2, 3)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.p).flatten(1)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (TorchNoise(), "torch's rand"),
        (OwnGenerator(), "torch's rand"),
        (NumpyNoise(), "numpy's random"),
        (PythonNoise(), "Python's random"),
        (FusedAttention(), "dropout inside scaled_dot_product_attention"),
        (nn.RReLU(), "torch's rrelu"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_no_key_reaches_is_named_and_no_plan_passes_for_it(layer, what):
    certificate = check(net(nn.Sequential(nn.Dropout(0.2), layer)))
    assert found(certificate) == {causes.UNKEYED: "1.1"}
    (finding,) = certificate.findings
    assert what in finding.evidence and "same distribution, not the same draw" in finding.evidence


def test_fused_attention_without_dropout_is_no_draw():
    assert_equivalent(check(net(FusedAttention(0.0))))


def test_draws_of_the_loss_function_are_named_too():
    def noisy(model, micro_batch):
        x, y = micro_batch
        return F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)

    assert found(check(net(), noisy)) == {causes.UNKEYED: OUTSIDE}

    def noisy_loss(model, micro_batch):
        x, y = micro_batch
        return (F.cross_entropy(model(x), y, reduction="none") * torch.rand(len(x))).mean()

    assert found(check(net(), noisy_loss)) == {causes.UNKEYED: OUTSIDE}


def contrastive(model, micro_batch):
    x, _ = micro_batch
    z = F.normalize(model(x), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(x)))


def test_a_loss_that_couples_samples_is_told_from_a_sum():
    assert found(check(net(), contrastive)) == {causes.COUPLED_LOSS: OUTSIDE}
    certificate = check(net(), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"))
    assert found(certificate) == {causes.SUM: OUTSIDE}
    x, y = samples()
    each = F.cross_entropy(net().double()(x.double()), y, reduction="none")
    mean_of_sums = (6 * each[:6].sum() + 5 * each[6:].sum()) / 11
    assert f"{each.sum() / mean_of_sums:.4g} times" in certificate.findings[0].evidence


def test_a_loss_that_couples_samples_does_so_with_ghost_batches_as_well():
    certificate = check(net(nn.BatchNorm1d(6)), contrastive, norm_batch_size=4)
    assert found(certificate) == {causes.COUPLED_LOSS: OUTSIDE}


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class CentresInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(x)
        return self.b(x - x.mean(0))


def test_the_first_module_that_couples_samples_is_named():
    assert found(check(net(nn.Tanh(), Centred(), nn.Tanh()))) == {causes.COUPLED_MODULE: "2"}
    # between its two layers, which are innocent
    assert found(check(net(CentresInside()))) == {causes.COUPLED_MODULE: "1"}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(x)), self.aux(self.body(x))


def test_a_gradient_from_outside_the_returned_loss_is_named_with_its_ratio():
    def own_backward(model, micro_batch):
        x, y = micro_batch
        out, aux = model(x)
        F.cross_entropy(aux, y).backward(retain_graph=True)
        return F.cross_entropy(out, y)

    def together(model, micro_batch):
        x, y = micro_batch
        return sum(F.cross_entropy(out, y) for out in model(x))

    even = samples(12)
    certificate = check(TwoHeads(), own_backward, even)
    (finding,) = certificate.findings
    assert finding.cause == causes.OUTSIDE_GRAPH and not certificate.equivalent
    assert finding.layer in ("aux.weight", "aux.bias", "body.weight", "body.bias")
    # the same gradient in each half would be twice that of the whole
    assert "the loss function wrote it" in finding.evidence
    same = torch.ones(12, 3), torch.zeros(12, dtype=torch.int64)
    (finding,) = check(TwoHeads(), own_backward, same).findings
    assert finding.layer == "aux.weight"
    assert "2 times that of the whole batch = the number of micro-batches" in finding.evidence
    assert_equivalent(check(TwoHeads(), together, even), num_not_run=5)


def clamped(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def clamp_own(parameter):
    parameter.grad.clamp_(-1e-3, 1e-3)


def normalise_inputs(module, grad_input, grad_output):
    return tuple(g if g is None else g / g.norm() for g in grad_input)


def test_clipping_before_the_sum_is_named_wherever_the_hook_hangs():
    hook_of = {
        "0.0.weight": lambda m: m[0][0].weight.register_hook(clamped),
        "0.0.bias": lambda m: m[0][0].bias.register_post_accumulate_grad_hook(clamp_own),
        "1": lambda m: m[1].register_full_backward_hook(normalise_inputs),
    }
    for layer, hang in hook_of.items():
        model = net()
        hang(model)
        assert found(check(model)) == {causes.CLIPPING: layer}


def test_clipping_inside_the_loss_function_is_named():
    def clipping(model, micro_batch):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return mean_loss(model, micro_batch)

    assert found(check(net(), clipping)) == {causes.CLIPPING: OUTSIDE}


def test_a_hook_that_only_looks_is_no_defect():
    model, norms = net(), []
    model[0][0].weight.register_hook(lambda g: norms.append(float(g.norm())))
    assert_equivalent(check(model))
    assert norms  # the copy has the hook as well


def mixup(model, micro_batch):
    x, y = micro_batch
    out = model(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y.flip(0))


def drawn_mixup(model, micro_batch):
    x, y = micro_batch
    order, share = torch.randperm(len(x)), np.random.beta(1, 1)
    out = model(share * x + (1 - share) * x[order])
    return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])


def test_mixup_across_a_cut_is_told_by_the_networks_input():
    assert found(check(net(), mixup)) == {causes.MIXUP: OUTSIDE}
    assert found(check(net(), drawn_mixup)) == {
        causes.MIXUP: OUTSIDE,
        causes.UNKEYED: OUTSIDE,
    }
    x, y = samples()
    assert_equivalent(check(net(), batch=(0.7 * x + 0.3 * x.flip(0), y)))


class Rounded(nn.Module):
    def forward(self, x):
        return x.float().double()


class RoundedOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(x.float(), self.layer.weight.float()).float()


def test_a_layer_in_float32_is_named_and_passes_at_its_own_digits():
    torch.manual_seed(0)
    model = nn.Sequential(net(), nn.Linear(4, 6), RoundedOut())
    loss_fn = lambda m, b: F.cross_entropy(m(b[0]).double(), b[1])  # noqa: E731
    certificate = check(model, loss_fn)
    assert found(certificate) == {causes.FLOAT32: "2"}
    assert certificate.largest_relative_error < 1e-5
    loose = check(model, loss_fn, tolerance=1e-5)
    assert loose.equivalent and loose.tolerance == 1e-5


def test_a_loss_that_fails_on_one_sample_fails_that_plan_alone():
    def loss_fn(model, micro_batch):
        assert len(micro_batch[0]) > 1, "one sample is not enough"
        return mean_loss(model, micro_batch)

    certificate = check(net(), loss_fn)
    assert found(certificate) == {causes.FAILS: OUTSIDE}
    failing = cells(certificate, verdict="fail")
    assert {c.partition for c in failing} == {"11 x 1"}
    assert all("one sample is not enough" in c.reason for c in failing)


def test_a_recompute_that_differs_from_its_forward_is_named():
    class Parity(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return torch.sin(x * (1.0 + self.calls))

    named = found(check(net(before=[Parity()])))
    assert named[causes.RECOMPUTE].startswith("0.")


# -- lbaccel's own defects, put back ---------------------------------------------------------------


def test_without_the_reduction_two_ranks_fail(monkeypatch):
    monkeypatch.setattr(accumulation, "reduce_gradients", lambda *args, **kwargs: None)
    certificate = check(net())
    assert {c.verdict for c in cells(certificate, ranks=2)} == {"fail"}
    assert {c.verdict for c in cells(certificate, ranks=1)} == {"pass"}


def test_without_the_flag_of_a_recompute_its_cells_fail(monkeypatch):
    monkeypatch.setattr(GhostNorm, "backward", KeyedRandomness.backward)  # another flag
    certificate = check(net(block=[nn.BatchNorm1d(6)]), norm_batch_size=4)
    assert {c.verdict for c in cells(certificate, checkpointing=False)} == {"pass"}
    recomputed = cells(certificate, checkpointing=True)
    # where a layer sees several ghost batches, it notices itself that it ran twice
    assert {c.partition for c in recomputed if c.verdict == "fail"} == {
        "4 + 4 + 3",
        "(4 + 4) | (3)",
    }
    assert all(c.verdict != "pass" and not (c.gradient_error or 0) > 1e-12 for c in recomputed)


def test_without_keys_masks_fail(monkeypatch):
    plain = KeyedRandomness.__init__

    def unkeyed(self, seed, device, layouts=None):
        plain(self, seed, device, layouts)
        self._keyed = []

    monkeypatch.setattr(KeyedRandomness, "__init__", unkeyed)
    assert found(check(net(nn.Dropout(0.3)))) == {causes.UNKEYED: "1"}


def test_with_shares_of_micro_batches_in_place_of_samples_a_ragged_cut_fails(monkeypatch):
    plain = accumulation.accumulate

    def equal_shares(model, pairs, loss_fn, *, num_samples, **kwargs):
        pairs = list(pairs)
        share = num_samples / len(pairs)
        wrong = lambda m, b: (loss_fn(m, b), share)  # noqa: E731
        return plain(model, pairs, wrong, num_samples=num_samples, **kwargs)

    monkeypatch.setattr(accumulation, "accumulate", equal_shares)
    certificate = check(net())
    verdicts = {c.partition: c.verdict for c in cells(certificate, ranks=1)}
    assert verdicts == {"11": "pass", "6 + 5": "fail", "4 + 4 + 3": "fail", "11 x 1": "pass"}


def test_random_states_that_an_update_leaves_moved_fail_every_plan(monkeypatch):
    monkeypatch.setattr("lbaccel.randomness.masks.restore_generators", lambda *states: None)
    certificate = check(net())
    assert {c.verdict for c in certificate.cells} == {"fail"}
    assert not any(c.random_state_kept for c in certificate.cells)
    assert all(c.gradient_error < 1e-12 for c in certificate.cells)
    assert "moved" in str(certificate) and list(found(certificate)) == [causes.UNKNOWN]
