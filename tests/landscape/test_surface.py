"""A surface in closed form, and that of a plain loop; merged BatchNorm; nothing moves."""

from __future__ import annotations

import copy

import pytest
import timm
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from torch import nn
from torch.nn import functional as F
from whole_state import digest

from lbaccel.errors import RunFailed
from lbaccel.landscape.directions import random_direction, tensors_of
from lbaccel.landscape.folding import pairs_of
from lbaccel.landscape.images import Prepared
from lbaccel.landscape.network import MovedNetwork
from lbaccel.landscape.surface import Plane, PointsDone, values_at

CPU = torch.device("cpu")


def held(*batches, in_memory=True):
    return Prepared(lambda: iter(batches), sum(len(y) for _, y in batches), in_memory)


def moments(model, seed=0):
    """Statistics, weights and biases of BatchNorm that no layer has by chance."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_var, 0.5),
                (module.running_mean, -0.5),
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


class Quadratic(nn.Module):
    """The output w A w / 2 for each sample."""

    def __init__(self, matrix, w):
        super().__init__()
        self.matrix, self.w = matrix, nn.Parameter(w)

    def forward(self, x):
        return (0.5 * (self.w.flatten() @ self.matrix @ self.w.flatten())).expand(len(x))


def plain_sum(outputs, labels):
    return outputs.sum(), labels.sum()


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_surface_of_a_quadratic_is_its_polynomial(in_memory):
    torch.manual_seed(1)
    a = torch.randn(6, 6, dtype=torch.float64)
    matrix, w = a @ a.T, torch.randn(2, 3, dtype=torch.float64)
    model = Quadratic(matrix, w)
    tensors = tensors_of(model, "weights")
    x, y = (random_direction(tensors, axis=axis) for axis in (0, 1))
    network = MovedNetwork(model, device=CPU)
    plane = Plane(network.tensors("weights"), x, y)
    places = [(i / 4, j / 3) for j in range(-3, 4) for i in range(-4, 5)]
    data = [(torch.zeros(3, 1), torch.tensor([1, 0, 1])), (torch.zeros(2, 1), torch.tensor([1, 1]))]
    found = list(
        values_at(network, plane, places, held(*data, in_memory=in_memory), measure=plain_sum)
    )
    dx, dy, w0 = (t.flatten() for t in (x["w"], y["w"], w))
    for (loss, share), (s, t) in zip(found, places, strict=True):
        truth = (
            w0 @ matrix @ w0 / 2
            + s * (w0 @ matrix @ dx)
            + t * (w0 @ matrix @ dy)
            + s * t * (dx @ matrix @ dy)
            + s * s * (dx @ matrix @ dx) / 2
            + t * t * (dy @ matrix @ dy) / 2
        )
        assert loss == pytest.approx(float(truth), rel=1e-12)
        assert share == 80.0


def test_cross_entropy_and_accuracy_of_a_linear_model_are_those_of_the_formula():
    torch.manual_seed(2)
    model = nn.Linear(4, 3).double().requires_grad_(False)
    images, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    network = MovedNetwork(model, device=CPU)
    origin = network.tensors("weights")
    x = random_direction(origin, ignore="none")
    batches = held((images[:32], labels[:32]), (images[32:], labels[32:]))
    places = [(s / 2, 0.0) for s in range(-3, 4)]
    found = values_at(network, Plane(origin, x), places, batches)
    for (loss, share), (s, _) in zip(found, places, strict=True):
        logits = images @ (model.weight + s * x["weight"]).T + (1 + s) * model.bias
        truth = (logits.exp().sum(1).log() - logits[torch.arange(50), labels]).mean()
        assert loss == pytest.approx(float(truth), rel=1e-12)
        assert share == 100 * int((logits.argmax(1) == labels).sum()) / 50


def tiny_batches(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    images, labels = torch.randn(20, 3, 8, 8, dtype=dtype), torch.randint(10, (20,))
    return held((images[:8], labels[:8]), (images[8:16], labels[8:16]), (images[16:], labels[16:]))


def slow(model, plane, places, batches):
    """Weights set by `load_state_dict`, a loop over the batches, the network as it is."""
    own, found = copy.deepcopy(model), []
    for s, t in places:
        state = dict(model.state_dict())
        for name, start in plane.origin.items():
            state[name] = start + s * plane.x[name]
            if plane.y is not None:
                state[name] = state[name] + t * plane.y[name]
        own.load_state_dict(state)
        losses, hits, count = 0.0, 0, 0
        with torch.no_grad():
            for images, labels in batches.batches():
                logits = own(images)
                losses += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
                hits += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        found.append((losses / count, 100 * hits / count))
    return found


@pytest.mark.parametrize("name, size", [("lbaccel_tiny", 8), ("cifar_resnet8", 8)])
@pytest.mark.parametrize("direction, ignore", [("weights", "biasbn"), ("states", "none")])
def test_the_surface_is_that_of_a_plain_loop(name, size, direction, ignore):
    torch.manual_seed(0)
    model = moments(timm.create_model(name, num_classes=10)).double()
    batches = tiny_batches(dtype=torch.float64)
    network = MovedNetwork(model, device=CPU, images=next(iter(batches.batches()))[0])
    assert network.num_merged == {"lbaccel_tiny": 0, "cifar_resnet8": 7}[name]
    origin = network.tensors(direction)
    plane = Plane(
        origin,
        *(random_direction(origin, ignore=ignore, axis=axis) for axis in (0, 1)),
    )
    places = [(s, t) for t in (-0.5, 0.0, 0.7) for s in (-0.4, 0.0, 0.3, 1.0)]
    found = list(values_at(network, plane, places, batches))
    for (loss, share), (truth, right) in zip(
        found, slow(model, plane, places, batches), strict=True
    ):
        assert loss == pytest.approx(truth, rel=1e-10)
        assert share == right


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "efficientnet_b0", "vit_tiny"])
@pytest.mark.slow
def test_merged_networks_of_timm_have_the_outputs_of_plain_ones(name):
    torch.manual_seed(0)
    full = {"vit_tiny": "vit_tiny_patch16_224"}.get(name, name)
    options = {"img_size": 64} if name == "vit_tiny" else {}
    model = moments(timm.create_model(full, num_classes=10, **options)).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    network = MovedNetwork(model, device=CPU, images=images)
    assert (network.num_merged > 0) == (name != "vit_tiny")
    origin = network.tensors("states")
    direction = random_direction(origin)
    batches = held((images, torch.tensor([1, 2, 3, 4])))
    places = [(0.0, 0.0), (0.2, 0.0)]
    found = values_at(network, Plane(origin, direction), places, batches)
    truth = slow(model, Plane(origin, direction), places, batches)
    for (loss, _), (right, _) in zip(found, truth, strict=True):
        assert loss == pytest.approx(right, rel=1e-10)


class TwoReaders(nn.Module):
    """A convolution whose output BatchNorm reads, and a shortcut too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)

    def forward(self, x):
        x = self.conv(x)
        return (x + self.norm(x)).mean((2, 3))


def test_batchnorm_is_not_merged_where_something_else_reads_the_convolution():
    torch.manual_seed(0)
    model = moments(TwoReaders())
    images = torch.randn(4, 3, 8, 8)
    assert len(pairs_of(model, images)) == 1
    network = MovedNetwork(model, device=CPU, images=images)
    assert network.num_merged == 0
    batches = held((images, torch.tensor([1, 2, 3, 4])))
    origin = network.tensors("weights")
    places = [(0.0, 0.0)]
    (found,) = values_at(network, Plane(origin, origin), places, batches)
    (truth,) = slow(model, Plane(origin, origin), places, batches)
    assert found[0] == pytest.approx(truth[0], rel=1e-6)


class Shared(nn.Module):
    """One convolution before two BatchNorms: it has no single merged weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x)))).mean((2, 3))


def test_batchnorm_is_not_merged_where_rounding_changes_the_outputs():
    """A mean far beyond the deviation: merged, the difference of both is lost in float32."""
    torch.manual_seed(0)
    model = moments(timm.create_model("cifar_resnet8", num_classes=10))
    images = torch.randn(4, 3, 8, 8)
    assert MovedNetwork(model, device=CPU, images=images).num_merged == 7
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.running_mean.fill_(300.0)
        norm.running_var.fill_(1e-4)
        norm.bias.copy_(300.0 * norm.weight / (norm.running_var + norm.eps).sqrt())
    assert MovedNetwork(model, device=CPU, images=images).num_merged == 0


def test_a_convolution_that_is_used_twice_is_no_pair():
    assert pairs_of(moments(Shared()), torch.randn(2, 3, 8, 8)) == []


def test_parameters_beside_merged_convolutions_move_too():
    """A parameter of a block itself, not of a layer in it, is shared with the merged network."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 10, 1, bias=False), nn.BatchNorm2d(10)
            self.scale = nn.Parameter(torch.ones(1, 10))

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3)) * self.scale

    torch.manual_seed(0)
    model = moments(Scaled()).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    batches = held((images, torch.tensor([1, 2, 3, 4])))
    network = MovedNetwork(model, device=CPU, images=images)
    assert network.num_merged == 1
    origin = network.tensors("weights")
    plane, places = Plane(origin, random_direction(origin)), [(0.5, 0.0)]
    (found,) = values_at(network, plane, places, batches)
    assert found[0] == pytest.approx(slow(model, plane, places, batches)[0][0], rel=1e-10)


def test_the_ends_of_a_line_between_two_models_are_both_models_to_the_bit():
    torch.manual_seed(0)
    models = [moments(timm.create_model("lbaccel_tiny"), seed=i) for i in (1, 2)]
    first, second = (MovedNetwork(m, device=CPU).tensors("states") for m in models)
    plane = Plane(first, second, between=True)
    for x, truth in ((0.0, models[0]), (1.0, models[1])):
        state = truth.state_dict()
        for name, value in plane.at(x, 0.0).items():
            assert torch.equal(value, state[name]), name
    middle = plane.at(0.25, 0.0)
    for name, value in middle.items():
        assert torch.allclose(value, 0.75 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-6)


def test_nothing_of_the_model_moves():
    model = timm.create_model("cifar_resnet8", num_classes=10).train()
    batches = tiny_batches()

    def state():
        return digest(
            {
                "state": model.state_dict(),
                "modes": [m.training for m in model.modules()],
                "gradients": [(p.grad, p.requires_grad, id(p)) for p in model.parameters()],
                "random": torch.get_rng_state(),
                "formats": [p.stride() for p in model.parameters()],
            }
        )

    before = state()
    network = MovedNetwork(model, device=CPU, images=next(iter(batches.batches()))[0])
    origin = network.tensors("states")
    list(values_at(network, Plane(origin, random_direction(origin)), [(0.5, 0.0)], batches))
    assert state() == before
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_network_in_training_mode_has_the_surface_of_its_evaluation():
    model = moments(timm.create_model("lbaccel_tiny"))
    batches, places, found = tiny_batches(), [(0.0, 0.0), (0.4, 0.0)], []
    for mode in (False, True):
        network = MovedNetwork(model.train(mode), device=CPU)
        origin = network.tensors("weights")
        plane = Plane(origin, random_direction(origin))
        found.append(list(values_at(network, plane, places, batches)))
    assert found[0] == found[1]


def test_a_loss_that_is_not_finite_is_none_and_its_accuracy_stays_a_number():
    model = moments(timm.create_model("lbaccel_tiny"))
    network = MovedNetwork(model, device=CPU)
    origin = network.tensors("states")
    falling = {
        name: -t if name.endswith("running_var") else torch.zeros_like(t)
        for name, t in origin.items()
    }
    found = list(
        values_at(network, Plane(origin, falling), [(0.0, 0.0), (3.0, 0.0)], tiny_batches())
    )
    assert found[0][0] is not None
    assert found[1][0] is None and 0 <= found[1][1] <= 100


def test_images_that_are_decoded_anew_are_gone_through_once_for_sixteen_points():
    passes = []
    batches = tiny_batches()

    def again():
        passes.append(1)
        return batches.batches()

    model = moments(timm.create_model("lbaccel_tiny"))
    network = MovedNetwork(model, device=CPU)
    origin = network.tensors("weights")
    plane = Plane(origin, random_direction(origin))
    places = [(i / 20, 0.0) for i in range(20)]
    decoded = Prepared(again, batches.num_images, in_memory=False)
    found = list(values_at(network, plane, places, decoded))
    assert len(passes) == 2
    assert found == list(values_at(network, plane, places, batches))  # to the bit


def test_a_lack_of_memory_is_a_sentence():
    def short(outputs, labels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    model = moments(timm.create_model("lbaccel_tiny"))
    network = MovedNetwork(model, device=CPU)
    origin = network.tensors("weights")
    with pytest.raises(RunFailed, match="the points that are done are kept"):
        list(values_at(network, Plane(origin, origin), [(0.0, 0.0)], tiny_batches(), measure=short))


def test_progress_is_said_seldom_and_not_at_the_end(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = PointsDone(said.append, 50, " on each of 2 ranks")
    for done in range(1, 51):
        now[0] += 2.0
        pace(done)
    assert said[0] == "point 3/50 on each of 2 ranks, 1:34 left"
    assert len(said) == 16
