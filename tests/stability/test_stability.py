"""The stable rate: SGD's limits, and the largest curvature, against plain torch and formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import cross_entropy, visiting_order
from whole_state import whole_state

from lbaccel import (
    BatchPlan,
    InputError,
    LargeBatch,
    RunFailed,
    UpdateLoader,
    apply_activation_checkpointing,
    largest_curvature,
    stable_rate,
)
from lbaccel.stability.curvature import largest_eigenvalue, sgd_momentum
from lbaccel.stability.limit import rate_advice, rate_sentence, stability_limit

FORMS = [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True), (0.99, True)]


@pytest.mark.parametrize("momentum, nesterov", FORMS)
def test_torchs_sgd_converges_just_below_the_limit_and_diverges_just_above(momentum, nesterov):
    curvature = 2.5

    def distance_after(lr, num_updates=20_000):
        w = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=nesterov)
        for _ in range(num_updates):
            w.grad = curvature * w.detach()
            optimizer.step()
            if not 1e-6 < abs(w.item()) < 1e6:
                break
        return abs(w.item())

    limit = stable_rate(curvature, momentum=momentum, nesterov=nesterov)
    assert distance_after(limit * 0.995) < 1e-3
    assert distance_after(limit * 1.005) > 1e3


@pytest.mark.parametrize("momentum, nesterov", FORMS)
def test_at_the_limit_the_recursion_has_a_root_of_modulus_one(momentum, nesterov):
    """The matrix of torch's own step on (w, v), written out, in place of the polynomial."""
    a = stability_limit(momentum=momentum, nesterov=nesterov)

    def radius(a):
        v = np.array([1.0, momentum])  # row of the new v, of (w, v), with L = 1 and eta = a
        w = np.array([1.0, 0.0]) - a * (np.array([1.0, 0.0]) + momentum * v if nesterov else v)
        return max(abs(np.linalg.eigvals(np.stack([w, v]))))

    assert radius(a) == pytest.approx(1.0, abs=1e-7)
    assert radius(0.999 * a) < 1 < radius(1.001 * a)


def test_timms_sgd_is_nesterovs_and_its_momentum_is_not():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    found = {
        name: sgd_momentum(create_optimizer_v2(parameters, opt=name, lr=0.1, momentum=0.9))
        for name in ("sgd", "momentum", "adamw", "lars", "sgdw")
    }
    assert found["sgd"] == (0.9, True) and found["momentum"] == (0.9, False)
    assert found["adamw"] is found["lars"] is found["sgdw"] is None
    assert sgd_momentum(torch.optim.SGD(parameters, lr=1.0, momentum=0.9, dampening=0.5)) is None


def test_the_sentence_has_the_numbers_and_claims_no_more():
    text = rate_sentence(3.2, 2.02, momentum=0.9, nesterov=False, num_samples=256)
    assert text.startswith(f"lr 3.2 is {3.2 * 2.02 / 3.8:.2g} times the stable rate (1.88")
    assert "256 samples" in text
    assert "Nesterov" in rate_sentence(0.1, 2.0, momentum=0.9, nesterov=True)
    assert "30 times" in rate_sentence(30.0, 2.0)
    assert "no limit" in rate_sentence(3.2, -0.5)
    assert "edge of stability" in rate_advice(3.2, 2.02, momentum=0.9, nesterov=False)
    assert "allows" in rate_advice(1.0, 2.02, momentum=0.9, nesterov=False)
    assert stable_rate(0.0) == math.inf
    with pytest.raises(InputError, match="momentum"):
        stability_limit(momentum=1.0)


def spectrum(*eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("eigenvalues", [
    [3.0, 2.9, 1.0, 0.1, 0.0],
    [2.0, 1.5, -50.0, -3.0, 0.0],  # the largest in absolute value is negative
    [-0.5, -1.0, -7.0],
    [4.0] * 4,
])  # fmt: skip
def test_the_largest_eigenvalue_is_found_whatever_lies_below_zero(eigenvalues):
    matrix = spectrum(*eigenvalues)
    start = torch.randn(len(eigenvalues), dtype=torch.float64)
    found = largest_eigenvalue(lambda v: matrix @ v, start, tolerance=1e-9)
    assert found.value == pytest.approx(max(eigenvalues), abs=1e-6)
    # Lanczos ends after as many products as there are eigenvalues; rounding may ask for one more.
    assert found.num_products <= len(eigenvalues) + 1


def test_a_wide_spectrum_in_float32_is_found_in_few_products_and_the_residual_is_one():
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.rand(20_000, generator=generator) - 0.5, torch.tensor([9.0, -30.0])])
    found = largest_eigenvalue(
        lambda v: values * v, torch.randn(len(values), generator=generator), tolerance=1e-3
    )
    assert found.value == pytest.approx(9.0, rel=1e-3) and found.num_products < 40
    rough = largest_eigenvalue(
        lambda v: values * v, torch.randn(len(values), generator=generator), max_products=5
    )
    assert min(abs(values - rough.value)) <= rough.residual * (1 + 1e-4)


class Quadratic(nn.Module):
    """The loss w A w / 2, whatever the sample."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
        self.w = nn.Parameter(torch.ones(len(matrix), dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.w @ self.matrix @ self.w + 0.0 * x.mean()


def prepare(model, data, *, micro=6, norm=None, optimizer=None, count=None):
    plan = BatchPlan(
        global_batch_size=count or len(data[0]), micro_batch_size=micro, norm_batch_size=norm
    )
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loader = UpdateLoader(TensorDataset(*data), plan)
    return (large_batch, *large_batch.prepare(model, optimizer, loader))


@pytest.mark.parametrize("eigenvalues", [[7.0, 3.0, 1.0, -2.0], [2.0, 0.5, -40.0]])
def test_lambda_max_of_a_quadratic_loss_is_its_matrixs(eigenvalues):
    model = Quadratic(spectrum(*eigenvalues))
    data = (torch.ones(8, 1, dtype=torch.float64),)
    large_batch, _, _, loader = prepare(model, data, micro=3)
    found = largest_curvature(
        large_batch, loader, lambda model, batch: model(batch[0]), tolerance=1e-10
    )
    assert found.lambda_max == pytest.approx(max(eigenvalues), abs=1e-6)
    assert found.num_samples == 8


def test_groups_with_other_rates_give_the_limit_of_the_largest_rate():
    """SGD with rates eta d is stable up to 2 / lambda_max(D^(1/2) H D^(1/2)): run it."""
    matrix = spectrum(5.0, 2.0, 0.5, 0.1, seed=3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.b = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x):
            w = torch.cat([self.a, self.b])
            return 0.5 * w @ matrix @ w + 0.0 * x.mean()

    model = Two()
    optimizer = torch.optim.SGD([{"params": [model.a], "lr": 0.1}, {"params": [model.b]}], lr=0.02)
    large_batch, _, _, loader = prepare(
        model, (torch.ones(4, 1, dtype=torch.float64),), optimizer=optimizer
    )
    found = largest_curvature(
        large_batch, loader, lambda model, batch: model(batch[0]), tolerance=1e-10
    )
    lr = stable_rate(found.lambda_max)

    def distance_after(lr):
        w, rates = torch.ones(4, dtype=torch.float64), torch.tensor([lr, lr, lr / 5, lr / 5])
        for _ in range(5_000):
            w = w - rates * (matrix @ w)
        return w.norm().item()

    assert distance_after(0.995 * lr) < 1 and distance_after(1.005 * lr) > 1e3


def make_network(dropout=0.0):
    torch.manual_seed(0)
    block = nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(4, 6), block, nn.Linear(6, 3)).double()


def make_data(count=23):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def top_of_the_full_hessian(model, data, groups, weights=None):
    """All of the Hessian by torch.autograd.functional, one plain BatchNorm a ghost batch."""
    x, y = data
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss(flat):
        pieces = flat.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        total, weight = 0.0, 0.0
        for group in groups:
            scratch = {n: b.clone() for n, b in buffers.items()}
            out = functional_call(model, {**values, **scratch}, (x[group],))
            each = F.cross_entropy(out, y[group], reduction="none")
            share = torch.ones(len(group)) if weights is None else weights[y[group]]
            total, weight = total + (share * each).sum(), weight + share.sum()
        return total / weight

    hessian = torch.autograd.functional.hessian(loss, flat)
    return torch.linalg.eigvalsh(hessian)[-1].item()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("micro", [3, 6, 24])
def test_a_network_with_ghost_batches_agrees_with_its_whole_hessian(micro, checkpointed):
    data = make_data()
    order = visiting_order(23)
    groups = np.array_split(order, 8)  # ghost batches of at most 3
    truth = top_of_the_full_hessian(make_network(), data, groups)
    model = make_network()
    if checkpointed:
        apply_activation_checkpointing(model, blocks=["1"])
    large_batch, _, _, loader = prepare(model, data, micro=micro, norm=3)
    found = largest_curvature(large_batch, loader, cross_entropy, tolerance=1e-10, max_products=80)
    assert found.lambda_max == pytest.approx(truth, rel=1e-9)
    assert found.num_samples == 23


def test_only_as_many_samples_as_asked_in_whole_ghost_batches():
    data, order = make_data(), visiting_order(23)
    groups = np.array_split(order, 8)[:3]
    truth = top_of_the_full_hessian(make_network(), data, groups)
    large_batch, _, _, loader = prepare(make_network(), data, micro=3, norm=3)
    found = largest_curvature(
        large_batch, loader, cross_entropy, num_samples=9, tolerance=1e-10, max_products=80
    )
    assert (found.num_samples, found.lambda_max) == (9, pytest.approx(truth, rel=1e-9))


def test_a_loss_with_weights_of_its_own_is_weighed_by_them():
    data, weights = make_data(), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)

    def weighed(model, micro_batch):
        x, y = micro_batch
        return F.cross_entropy(model(x), y, weights), weights[y].sum()

    groups = np.array_split(visiting_order(23), 8)
    truth = top_of_the_full_hessian(make_network(), data, groups, weights)
    large_batch, _, _, loader = prepare(make_network(), data, micro=6, norm=3)
    found = largest_curvature(large_batch, loader, weighed, tolerance=1e-10, max_products=80)
    assert found.lambda_max == pytest.approx(truth, rel=1e-9)


def test_masks_are_those_of_the_update_in_every_partition():
    found = []
    for micro in (3, 24):
        large_batch, _, _, loader = prepare(make_network(0.5), make_data(), micro=micro, norm=3)
        found.append(
            largest_curvature(
                large_batch, loader, cross_entropy, tolerance=1e-10, max_products=80
            ).lambda_max
        )
    without = top_of_the_full_hessian(
        make_network(), make_data(), np.array_split(visiting_order(23), 8)
    )
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] != pytest.approx(without, rel=1e-3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):  # [n, tokens, 4]
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


def test_fused_attention_which_has_no_second_derivative_is_left_out():
    x, y = torch.randn(6, 5, 4), torch.randint(3, (6,))
    model = Attention()
    gradient = torch.autograd.grad(
        cross_entropy(model, (x, y)), model.qkv.weight, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.square().sum().backward()
    large_batch, _, _, loader = prepare(model, (x, y))
    found = largest_curvature(large_batch, loader, cross_entropy)
    assert found.lambda_max > 0


def state_and_parts(norm=3, dropout=0.5):
    model = make_network(dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    large_batch, _, optimizer, loader = prepare(
        model, make_data(), micro=6, norm=norm, optimizer=optimizer, count=12
    )
    for update in loader:
        large_batch.update(update, cross_entropy)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return large_batch, model, optimizer, loader


@pytest.mark.parametrize("norm", [3, "frozen"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_everything_is_as_it_was(norm, error):
    large_batch, model, optimizer, loader = state_and_parts(norm)
    before = whole_state(large_batch, model, optimizer, loader)
    calls = [0]

    def loss_fn(model, micro_batch):
        calls[0] += 1
        if error is not None and calls[0] == 4:
            raise error("as it happens")
        return cross_entropy(model, micro_batch)

    if error is None:
        assert largest_curvature(large_batch, loader, loss_fn).lambda_max > 0
    else:
        with pytest.raises(error):
            largest_curvature(large_batch, loader, loss_fn)
    assert whole_state(large_batch, model, optimizer, loader) == before


def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_figure_stays():
    found = []
    for most in (12, 3):
        large_batch, _, _, loader = prepare(make_network(), make_data(24), micro=12, norm=3)
        sizes = []

        def loss_fn(model, micro_batch, most=most, sizes=sizes):
            sizes.append(len(micro_batch[0]))
            if sizes[-1] > most:
                raise MemoryError
            return cross_entropy(model, micro_batch)

        found.append(
            largest_curvature(large_batch, loader, loss_fn, tolerance=1e-10, max_products=80)
        )
        assert sizes[-1] == most
        assert large_batch.plan.micro_batch_size == loader.plan.micro_batch_size == 12
    assert found[0].lambda_max == pytest.approx(found[1].lambda_max, rel=1e-9)

    def nothing_fits(model, micro_batch):
        raise MemoryError

    with pytest.raises(RunFailed, match="second derivative of 3 samples"):
        largest_curvature(large_batch, loader, nothing_fits)


def test_a_curvature_that_is_not_finite_is_no_figure():
    model = make_network()
    with torch.no_grad():
        model[2].weight.fill_(math.inf)
    large_batch, _, _, loader = prepare(model, make_data(), norm=3)
    with pytest.raises(RunFailed, match="not finite"):
        largest_curvature(large_batch, loader, cross_entropy)
