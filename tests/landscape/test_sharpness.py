"""The three measures of sharpness, each against a closed form."""

from __future__ import annotations

import json

import pytest
import timm
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from judging import photos_and_run
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from whole_state import digest

from lbaccel import sharpness
from lbaccel.cli import main
from lbaccel.errors import InputError, RunFailed
from lbaccel.landscape.box import box_sharpness
from lbaccel.landscape.directions import random_direction
from lbaccel.landscape.images import Prepared
from lbaccel.landscape.mean_loss import MeanLoss
from lbaccel.landscape.network import MovedNetwork
from lbaccel.landscape.sharpness import filter_sharpness, sharpness_of

CPU = torch.device("cpu")


def held(*batches):
    return Prepared(lambda: iter(batches), sum(len(y) for _, y in batches), in_memory=True)


def plain_sum(outputs, labels):
    return outputs.sum(), labels.sum()


class Quadratic(nn.Module):
    """The output (w - c) A (w - c) / 2 + 1 for each sample."""

    def __init__(self, matrix, w, c):
        super().__init__()
        self.matrix, self.c, self.w = matrix, c, nn.Parameter(w)

    def forward(self, x):
        z = self.w.flatten() - self.c
        return (0.5 * (z @ self.matrix @ z) + 1.0).expand(len(x))


DATA = held((torch.zeros(3, 1), torch.ones(3)), (torch.zeros(2, 1), torch.ones(2)))


def quadratic(eigenvalues=(7.0, 3.0, 1.0, -2.0, 0.5, 0.1), at_centre=False):
    torch.manual_seed(3)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    w = torch.randn(2, n // 2, dtype=torch.float64)
    c = w.flatten().clone() if at_centre else torch.randn(n, dtype=torch.float64)
    return Quadratic(q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T, w, c)


def test_the_eigenvalues_of_a_quadratic_loss_are_its_matrixs():
    model = quadratic()
    found = sharpness_of(model, DATA, device=CPU, measure=plain_sum, top=4)
    assert found.eigenvalues.values == pytest.approx([7.0, 3.0, 1.0, 0.5], rel=1e-9)
    assert max(found.eigenvalues.residuals) < 1e-8
    z = model.w.detach().flatten() - model.c
    assert found.loss == pytest.approx(float(0.5 * z @ model.matrix @ z + 1), rel=1e-12)


def test_the_product_is_that_of_the_whole_hessian_of_a_network():
    torch.manual_seed(0)
    model = timm.create_model("lbaccel_tiny", num_classes=3).double().eval()
    images, labels = torch.randn(9, 3, 8, 8, dtype=torch.float64), torch.randint(3, (9,))
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    v = torch.randn_like(flat)
    gradient, truth = torch.autograd.functional.vhp(loss, flat, v)[0], None
    truth = torch.autograd.functional.vhp(loss, flat, v)[1]
    mean_loss = MeanLoss(
        model, held((images[:5], labels[:5]), (images[5:], labels[5:])), device=CPU
    )
    assert torch.allclose(mean_loss.product(v), truth, rtol=1e-9, atol=1e-12)
    value, slope = mean_loss.value_and_gradient()
    assert value == pytest.approx(float(gradient), rel=1e-12)
    assert torch.allclose(
        slope, torch.autograd.functional.jacobian(loss, flat), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("at_centre", [False, True])
def test_keskars_measure_of_a_separable_quadratic_is_the_far_corner_of_the_box(at_centre):
    torch.manual_seed(1)
    curvature = torch.rand(8, dtype=torch.float64) + 0.5
    x = torch.randn(8, dtype=torch.float64) * 3
    c = x.clone() if at_centre else x + torch.randn(8, dtype=torch.float64)

    def loss(w):
        return float((curvature * (w - c) ** 2).sum() / 2), curvature * (w - c)

    found = box_sharpness(loss, x, epsilon=0.01)
    reach = 0.01 * (x.abs() + 1)
    truth = (curvature * ((x - c).abs() + reach) ** 2).sum() / 2
    assert found.max_loss == pytest.approx(float(truth), rel=1e-9)
    centre = float((curvature * (x - c) ** 2).sum() / 2)
    assert found.loss == centre
    assert found.sharpness == pytest.approx(100 * (float(truth) - centre) / (1 + centre), rel=1e-9)


def test_keskars_measure_of_coupled_weights_is_a_corner_of_the_box():
    """A convex loss is largest in a corner; L-BFGS-B ends in one, the largest or not."""
    model = quadratic((7.0, 3.0, 1.0, 2.0, 0.5, 0.1))
    mean_loss = MeanLoss(model, DATA, device=CPU, measure=plain_sum)
    x, calls = mean_loss.weights(), []

    def at(w):
        calls.append(((w - x).abs() / (x.abs() + 1)).max().item())
        mean_loss.put(w)
        return mean_loss.value_and_gradient()

    found = box_sharpness(at, x, epsilon=0.1)
    assert max(calls) <= 0.1 * (1 + 1e-12)
    assert found.num_gradients == len(calls)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    z = x - model.c + signs * 0.1 * (x.abs() + 1)
    corners = 0.5 * (z @ model.matrix * z).sum(1) + 1
    assert float((corners - found.max_loss).abs().min()) < 1e-9
    assert found.max_loss >= float(corners.quantile(0.9))


def test_a_wall_in_the_box_is_gone_around():
    def loss(w):
        value = float("nan") if float(w[0]) > 0.05 else float(w.sum())
        return value, torch.ones_like(w)

    found = box_sharpness(loss, torch.zeros(2, dtype=torch.float64), epsilon=0.1)
    assert 0.05 <= found.max_loss <= 0.15 + 1e-9
    with pytest.raises(RunFailed, match="not finite"):
        box_sharpness(loss, torch.ones(2, dtype=torch.float64))


def test_the_filter_normalised_measure_of_a_quadratic_is_its_second_order_term():
    model = quadratic()
    network = MovedNetwork(model, device=CPU)
    loss, _, found = filter_sharpness(
        network, DATA, measure=plain_sum, radius=0.3, directions=5, seed=2
    )
    assert loss is not None
    for number, increase in enumerate(found.increases):
        d = random_direction({"w": model.w}, seed=2, axis=number)["w"].flatten()
        assert increase == pytest.approx(float(0.3**2 * (d @ model.matrix @ d) / 2), rel=1e-9)
    values = torch.tensor(found.increases, dtype=torch.float64)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.deviation == pytest.approx(float(values.std()))


def test_rescaling_filters_before_batchnorm_leaves_the_filter_normalised_measure_alone():
    """W -> 4 W with mu -> 4 mu, var + eps -> 16 (var + eps) is the same function (Dinh et al.)."""
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.randint(10, (12,))
    model = timm.create_model("lbaccel_tiny", num_classes=10).double()
    scaled = timm.create_model("lbaccel_tiny", num_classes=10).double().eval()
    model.train()(images)  # statistics of its own data
    scaled.load_state_dict(model.eval().state_dict())
    first, second = (m.blocks[0][0] for m in (model, scaled))
    with torch.no_grad():
        for m in (model, scaled):  # a network in which BatchNorm follows the convolution
            m.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), first).double())
        scaled.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), second).double()
        )
        scaled.blocks[0][0].weight.copy_(4 * model.blocks[0][0].weight)
        second.running_mean.mul_(4)
        second.running_var.copy_(16 * (first.running_var + first.eps) - first.eps)
    batches = held((images, labels))
    found = [
        sharpness_of(m, batches, device=CPU, directions=3, top=1, radius=0.2)
        for m in (model, scaled)
    ]
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-9)
    assert found[1].filters.increases == pytest.approx(found[0].filters.increases, rel=1e-9)
    assert found[1].box.sharpness != pytest.approx(found[0].box.sharpness, rel=1e-3)


def test_nothing_of_the_model_moves():
    model = timm.create_model("lbaccel_tiny", num_classes=10).train()
    batches = held((torch.randn(6, 3, 8, 8), torch.randint(10, (6,))))

    def state():
        return digest(
            {
                "state": model.state_dict(),
                "modes": [m.training for m in model.modules()],
                "gradients": [(p.grad, p.requires_grad, id(p)) for p in model.parameters()],
                "random": torch.get_rng_state(),
            }
        )

    before = state()
    sharpness_of(model, batches, device=CPU, directions=2, top=2)
    assert state() == before


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_prints_all_three_and_leaves_the_run_as_it_was(capsys):
    _, folder = photos_and_run()
    before = files_of(folder)
    capsys.readouterr()  # of the run
    flags = ["--samples", "20", "--top", "2", "--directions", "3"]
    assert main(["sharpness", str(folder), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["hessian"]["values"]) == len(found["hessian"]["residuals"]) == 2
    assert found["data"]["num_samples"] == 20 and found["data"]["split"] == "train"
    assert found["box"]["sharpness"] > 0 and len(found["filters"]["increases"]) == 3
    assert main(["sharpness", str(folder), *flags]) == 0
    out = capsys.readouterr().out
    assert f"{found['hessian']['values'][0]:.5g}" in out  # the same again
    assert f"Keskar's sharpness: {found['box']['sharpness']:.4g}" in out
    assert "mean and standard deviation of 3 random directions" in out
    assert files_of(folder) == before
    same = sharpness(folder, samples=20, top=2, directions=3)
    assert same.eigenvalues.values == tuple(found["hessian"]["values"])


def test_what_can_not_be_done_is_a_sentence(capsys, monkeypatch):
    _, folder = photos_and_run()
    assert main(["sharpness", "absent"]) == 2
    assert "absent does not exist" in capsys.readouterr().err
    assert main(["sharpness", str(folder), "--data", "test"]) == 2
    assert "--data='test' is not one of train, val" in capsys.readouterr().err
    with pytest.raises(InputError, match="top=0"):
        sharpness(folder, top=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        sharpness(folder)
