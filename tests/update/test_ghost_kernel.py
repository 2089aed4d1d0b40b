"""Ghost batches that torch's kernel writes to their place are those of split, norm and join."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lbaccel.batch.plan import MicroBatch
from lbaccel.planning.cost.kernel_calls import allocations
from lbaccel.update import ghost_kernel
from lbaccel.update.ghost_kernel import normalise_runs
from lbaccel.update.normalization import convert_batch_norm

SIZES = (3, 3, 2)
SHAPES = [(8, 4), (8, 4, 5), (8, 4, 3, 5), (8, 4, 1, 1), (8, 1, 3, 5), (8, 4, 2, 3, 2)]
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_layout(x, turned):
    return x.contiguous(memory_format=LAYOUTS[x.ndim]) if turned else x


CASES = [
    (shape, turned)
    for shape in SHAPES
    for turned in (False, True)
    if not turned or len(shape) in LAYOUTS
]


def by_formula(x, sizes, weight, bias, eps):
    """y and, by autograd of elementary functions, its gradients of any order."""
    shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
    dims = [d for d in range(x.ndim) if d != 1]
    outs = []
    for part in x.split(sizes):
        mean = part.mean(dims, keepdim=True)
        var = (part - mean).square().mean(dims, keepdim=True)
        y = (part - mean) / (var + eps).sqrt()
        y = y if weight is None else y * weight.view(shape)
        outs.append(y if bias is None else y + bias.view(shape))
    return torch.cat(outs)


def layer_of(channels, *, affine=True, dtype=torch.float64):
    if not affine:
        return None, None
    weight = torch.linspace(0.5, 2, channels, dtype=dtype).requires_grad_()
    return weight, torch.linspace(-1, 1, channels, dtype=dtype).requires_grad_()


def moments_of(channels, *, tracked=True, dtype=torch.float64):
    if not tracked:
        return [(None, None, 0.0)] * len(SIZES)
    mean, var = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return [(mean, var, m) for m in (0.1, 0.5, 0.3)]


def samples(shape, turned=False, *, dtype=torch.float64, requires_grad=True):
    torch.manual_seed(0)
    x = in_layout(torch.randn(shape, dtype=torch.float64) * 3 + 1, turned).to(dtype)
    return x.detach().requires_grad_(requires_grad)


def joined(x, sizes, moments, *, weight, bias, eps, device_type=None):
    """The ordinary route."""
    outs = [
        F.batch_norm(part, mean, var, weight, bias, True, momentum, eps)
        for part, (mean, var, momentum) in zip(x.split(sizes), moments, strict=True)
    ]
    return torch.cat(outs)


def in_place(y):
    return y.grad_fn.name().startswith("_Runs")


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize(("shape", "turned"), CASES)
def test_outputs_gradients_and_layouts_are_those_of_split_and_join(shape, turned, tracked, affine):
    x = samples(shape, turned)
    weight, bias = layer_of(shape[1], affine=affine)
    inputs = [t for t in (x, weight, bias) if t is not None]
    found = []
    upstream = in_layout(torch.randn(shape, dtype=torch.float64), turned)
    for normalise in (normalise_runs, joined):
        moments = moments_of(shape[1], tracked=tracked)
        y = normalise(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
        assert in_place(y) == (normalise is normalise_runs and (affine or tracked))
        found.append((y, moments, torch.autograd.grad(y, inputs, upstream)))
    (y, moments, gradients), (expected, expected_moments, expected_gradients) = found
    close(y, expected)
    close(y, by_formula(x, SIZES, weight, bias, 1e-5))
    assert y.stride() == expected.stride()
    assert gradients[0].stride() == expected_gradients[0].stride()
    for a, b in zip(gradients, expected_gradients, strict=True):
        close(a, b)
    if tracked:
        close(moments[0][:2], expected_moments[0][:2])


@pytest.mark.parametrize("statistics", ["per_ghost", "per_update"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("filler", [False, True])
def test_a_layer_takes_the_statistics_of_the_ordinary_route(
    statistics, momentum, filler, monkeypatch
):
    found = []
    for route in (True, False):
        if not route:
            monkeypatch.setattr(ghost_kernel, "_goes_in_place", lambda *_: False)
        layer = nn.BatchNorm2d(4, momentum=momentum).double()
        norm = convert_batch_norm(layer, 3, statistics=statistics)
        norm.begin()
        x = samples((16, 4, 3, 5))
        for start in (0, 8):
            last = filler and start > 0
            with norm.forward(MicroBatch(start, SIZES, is_filler=last)):
                y = layer(x[start : start + 8])
                assert in_place(y) == route
                with norm.backward():
                    y.sigmoid().sum().backward()
        norm.commit()
        found.append([*layer.state_dict().values(), x.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_half_precision_with_float32_weights_is_to_the_bit_that_of_split_and_join(dtype, turned):
    x = samples((8, 4, 3, 5), turned, dtype=dtype)
    weight, bias = layer_of(4, dtype=torch.float32)
    found = []
    with torch.autocast("cpu", dtype=dtype):
        for normalise in (normalise_runs, joined):
            moments = moments_of(4, dtype=torch.float32)
            y = normalise(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
            assert in_place(y) == (normalise is normalise_runs)
            gradients = torch.autograd.grad(y.sigmoid().sum(), (x, weight, bias))
            found.append([y, gradients[0], *moments[0][:2], *gradients[1:]])
    for a, b in zip(*(each[:4] for each in found), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for a, b in zip(*(each[4:] for each in found), strict=True):  # sums in another order
        close(a, b, 1e-5)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_needs_no_gradient_gets_none(needs):
    x = samples((8, 4, 3, 5), requires_grad=needs[0])
    weight, bias = layer_of(4)
    weight.requires_grad_(needs[1])
    bias.requires_grad_(False)
    results = []
    for normalise in (normalise_runs, joined):
        for t in (x, weight):
            t.grad = None
        y = normalise(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sigmoid().sum().backward()
        results.append((y.detach(), x.grad, weight.grad, bias.grad))
    assert [t is None for t in results[0]] == [False, *(not n for n in needs), True]
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_a_graph_takes_the_same_kernels(mode, monkeypatch):
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    moments, expected = moments_of(4), moments_of(4)
    with mode():
        y = normalise_runs(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
        close(y, joined(x, SIZES, expected, weight=weight, bias=bias, eps=1e-5))
    close(moments[0][:2], expected[0][:2])
    assert not y.requires_grad


def test_gradients_of_gradients_are_those_of_the_formula():
    x, (weight, bias) = samples((8, 2, 3)), layer_of(2)

    def run(x, weight, bias):
        y = normalise_runs(x, SIZES, moments_of(2), weight=weight, bias=bias, eps=1e-3)
        assert in_place(y)
        return y

    assert torch.autograd.gradgradcheck(run, (x, weight, bias))
    found = []
    for function in (run, lambda *a: by_formula(a[0], SIZES, *a[1:], 1e-3)):
        loss = function(x, weight, bias).sigmoid().square().sum()
        first = torch.autograd.grad(loss, (x, weight, bias), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(penalty, (x, weight, bias))])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-10)


def test_batched_gradients_are_those_of_each():
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
    upstream = torch.randn(3, *y.shape, dtype=y.dtype)
    inputs = (x, weight, bias)
    batched = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, u, retain_graph=True) for u in upstream]
    for a, b in zip(batched, zip(*each, strict=True), strict=True):
        close(a, torch.stack(b))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_transforms_of_functions_take_the_ordinary_route():
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    direction = torch.randn_like(x)
    options = {"weight": weight, "bias": bias, "eps": 1e-5}

    def loss(normalise):
        moments = moments_of(4, tracked=False)
        return lambda x: normalise(x, SIZES, moments, **options).sigmoid().sum()

    def formula(x, sizes, moments, **o):
        return by_formula(x, sizes, o["weight"], o["bias"], o["eps"])

    for run in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.jvp(f, (x,), (direction,))[1],
        lambda f: torch.func.vmap(f)(torch.stack((x, 2 * x, x + 1))),
        lambda f: torch.func.hessian(lambda s: f(x.detach() * s))(torch.ones((), dtype=x.dtype)),
    ):
        close(run(loss(normalise_runs)), run(loss(formula)), 1e-10)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), direction)
        tangents = [
            forward_ad.unpack_dual(loss(f)(dual)).tangent for f in (normalise_runs, formula)
        ]
    close(*tangents, 1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_is_one_graph_and_gives_the_same(backend):
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    found = []
    for compiles in (True, False):
        moments = moments_of(4)

        def run(x, weight, bias, moments=moments):
            return normalise_runs(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)

        call = torch.compile(run, backend=backend, fullgraph=True) if compiles else run
        y = call(x, weight, bias)
        found.append((y, *torch.autograd.grad(y.sigmoid().sum(), (x, weight, bias)), *moments[0]))
    torch.compiler.reset()
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_hooks_on_saved_tensors_see_three_whatever_the_number_of_ghost_batches():
    (weight, bias), counts = layer_of(4), []
    for sizes in ((4, 4), (2, 2, 2, 2)):
        x, packed = samples((8, 4, 3, 5)), []

        def pack(t, packed=packed):
            packed.append(t)
            return t.clone()

        moments = (moments_of(4) * 2)[: len(sizes)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = normalise_runs(x, sizes, moments, weight=weight, bias=bias, eps=1e-5)
        y.sigmoid().sum().backward()
        expected = torch.autograd.grad(by_formula(x, sizes, weight, bias, 1e-5).sigmoid().sum(), x)[
            0
        ]
        close(x.grad, expected)
        counts.append(len(packed))
    assert counts == [3, 3]


def test_anomaly_mode_finds_its_backward():
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="_Runs"):
        y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
        y.register_hook(lambda g: g * torch.nan)
        with pytest.raises(RuntimeError, match=r"_RunsBackward.* returned nan"):
            y.sum().backward()


def test_what_is_written_in_place_after_it_keeps_the_gradient():
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
    expected = torch.autograd.grad(by_formula(x, SIZES, weight, bias, 1e-5).relu().sum(), x)[0]
    close(torch.autograd.grad(F.relu_(y).sum(), x)[0], expected)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_kernels_and_no_join():
    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    with _Names() as mode:
        y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
        y.sum().backward()
    assert mode.names.count("aten.native_batch_norm.out") == 3
    assert mode.names.count("aten.native_batch_norm_backward.default") == 3
    assert not any("cat" in name.split(".")[1] for name in mode.names)


def test_a_subclass_of_tensors_takes_the_ordinary_route():
    class Wrapped(torch.Tensor):
        pass

    x, (weight, bias) = samples((8, 4, 3, 5)), layer_of(4)
    y = normalise_runs(
        x.as_subclass(Wrapped), SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5
    )
    assert isinstance(y, Wrapped) and not in_place(y)


@pytest.mark.parametrize("kind", ["a turned one", "every other row", "an expanded one"])
def test_another_layout_takes_the_ordinary_route_and_is_right(kind):
    x = {
        "a turned one": samples((3, 5, 4, 8)).permute(3, 2, 0, 1),
        "every other row": samples((16, 4, 3, 5))[::2],
        "an expanded one": samples((8, 4, 1, 5)).expand(8, 4, 3, 5),
    }[kind]
    weight, bias = layer_of(4)
    moments, expected = moments_of(4), moments_of(4)
    y = normalise_runs(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
    close(y, by_formula(x, SIZES, weight, bias, 1e-5))
    assert y.stride() == joined(x, SIZES, expected, weight=weight, bias=bias, eps=1e-5).stride()
    close(moments[0][:2], expected[0][:2])


def test_weights_in_half_precision_take_the_ordinary_route():
    x = samples((8, 4, 3, 5), dtype=torch.bfloat16)
    weight, bias = layer_of(4, dtype=torch.bfloat16)
    moments = moments_of(4, dtype=torch.bfloat16)
    y = normalise_runs(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
    assert not in_place(y)


def test_another_device_takes_the_ordinary_route():
    x = samples((8, 4, 3, 5)).detach().to("meta").requires_grad_()
    weight, bias = (t.detach().to("meta") for t in layer_of(4))
    moments = [(m.to("meta"), v.to("meta"), f) for m, v, f in moments_of(4)]
    y = normalise_runs(x, SIZES, moments, weight=weight, bias=bias, eps=1e-5)
    assert not in_place(y) and y.shape == x.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((8, 4, 3, 5), torch.bfloat16, True),
        ((8, 4, 3, 5), torch.float16, False),
        ((8, 4, 3, 5), torch.float32, False),
        ((8, 4), torch.float32, True),
    ],
)
def test_where_cudnn_would_be_taken_the_ordinary_route_stays(shape, dtype, expected):
    x = samples(shape, dtype=dtype)
    weight, bias = layer_of(4, dtype=torch.float32)
    moments = moments_of(4, dtype=torch.float32)
    options = {"weight": weight, "bias": bias, "eps": 1e-5}
    assert in_place(normalise_runs(x, SIZES, moments, device_type="cuda", **options)) == expected
    assert in_place(normalise_runs(x, SIZES, moments, **options))  # it is the CPU's


@pytest.mark.parametrize("chosen", ["Native", "Cudnn", "Miopen", None])
def test_on_cuda_torch_itself_is_asked_which_kernel_it_takes(chosen, monkeypatch):
    asked = []
    known = {"_BatchNormBackend": SimpleNamespace(Native="Native")}
    if chosen is not None:
        known["_select_batch_norm_backend"] = lambda *a: asked.append(a) or chosen
    monkeypatch.setattr(ghost_kernel, "_C", SimpleNamespace(**known))
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, ndim=4)
    weight, bias = layer_of(4)
    assert ghost_kernel._is_torchs_own(x, weight, bias, 1e-5) == (chosen == "Native")
    assert len(asked) == (chosen is not None)


@pytest.mark.parametrize("turned", [False, True])
def test_a_forward_holds_one_output_and_a_backward_one_run_more(turned):
    x = samples((32, 8, 16, 16), turned, dtype=torch.float32)
    weight, bias = layer_of(8, dtype=torch.float32)
    sizes, moments = (4,) * 8, [moments_of(8, dtype=torch.float32)[0]] * 8
    results = []

    def most(call):
        total = peak = 0
        for change in allocations(call):
            total += change
            peak = max(peak, total)
        return peak / x.nbytes

    def forward():
        results.append(normalise_runs(x, sizes, moments, weight=weight, bias=bias, eps=1e-5))

    assert 1 <= most(forward) < 1.05
    upstream = torch.randn_like(x)
    run = 1 / len(sizes)
    # ATen's kernel of a CPU may hold a copy of its run beside the result.
    assert most(lambda: results[0].backward(upstream)) < 1 + 2 * run + 0.05


def test_a_leaf_keeps_its_hooks_under_hooks_of_saved_tensors():
    """torch 2.6 and 2.7 forget those of a leaf that a `Function` saves; so no leaf is saved."""
    packed, heard = [], []
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = layer_of(4)
    for leaf in (x, weight, bias):
        leaf.register_hook(lambda g: heard.append(g.shape))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
    assert packed and not any(t.is_leaf and t.requires_grad for t in packed)
    y.square().sum().backward()
    assert sorted(heard) == [(4,), (4,), (8, 4)]


def test_a_weight_that_is_written_before_backward_is_an_error_as_in_plain_torch():
    x, (weight, bias) = torch.randn(8, 4, dtype=torch.float64), layer_of(4)
    y = normalise_runs(x, SIZES, moments_of(4), weight=weight, bias=bias, eps=1e-5)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
