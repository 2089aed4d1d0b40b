from __future__ import annotations

import copy
import gc
import random
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from forks import run_forked, run_fresh
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from updates import cross_entropy

from lbaccel import BatchPlan, LargeBatch
from lbaccel.data.loader import Update
from lbaccel.planning.cost.known_calls import fake_tensors
from lbaccel.planning.cost.trace import Allocate, Free, Kernel, Mark, Recorder, Trace
from lbaccel.planning.cost.update import Network, trace_update
from lbaccel.planning.cost.workspace import MARGIN, CpuWorkspaces
from lbaccel.randomness.ahead import MASK_AHEAD
from lbaccel.randomness.masks import CALLS_AT_ONCE, SAMPLES_AT_ONCE
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.normalization import has_batch_norm

SCALARS = 64  # bytes of zero-dimensional tensors that the trace of a mask leaves out


def mlp(*between):
    return nn.Sequential(nn.Linear(64, 256), *between, nn.Linear(256, 256), nn.Linear(256, 10))


def vectors(num_samples):
    return torch.randn(num_samples, 64), torch.zeros(num_samples, dtype=torch.long)


def images(num_samples):
    return torch.randn(num_samples, 3, 64, 64), torch.zeros(num_samples, dtype=torch.long)


def tiny_vit(**options):
    return timm.create_model("test_vit", img_size=64, num_classes=10, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def plan_of(model, num_samples, num_micro_steps=2, norm=None):
    return BatchPlan(
        global_batch_size=num_micro_steps * num_samples,
        micro_batch_size=num_samples,
        norm_batch_size=(norm or num_samples) if has_batch_norm(model) else None,
    )


def traced(
    model,
    make_batch,
    num_samples,
    optimizer=sgd,
    precision="fp32",
    num_micro_steps=2,
    device_type="cpu",
    norm=None,
):
    network = Network(model=model, make_batch=make_batch, optimizer=optimizer(model), clips=True)
    plan = plan_of(model, num_samples, num_micro_steps, norm)
    return trace_update(
        network, plan, precision=precision, device_type=device_type, workspace=CpuWorkspaces()
    )


def allocated_at_peak(model, make_batch, num_samples, optimizer, norm=None):
    """Peak bytes of a real update through `LargeBatch`, by the CPU allocator's own events."""
    plan = plan_of(model, num_samples, norm=norm)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, clip_grad_norm=1.0)
    model, *_ = large_batch.prepare(model, optimizer(model), [])
    micro_batches = ((m, make_batch(m.num_samples)) for m in plan.partition())
    update = Update(index=0, num_samples=plan.global_batch_size, micro_batches=micro_batches)
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return before + most_allocated_by(lambda: large_batch.update(update, cross_entropy))


def most_allocated_by(call):
    """Most bytes live at one time beyond those that were there before the call."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    del result
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes), default=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, mask: x + x,
        lambda x, mask: x.to(torch.bfloat16) * x,
        lambda x, mask: x * mask,
        lambda x, mask: x * mask.long(),
    ],
    ids=["of one dtype", "of two floating dtypes", "by a mask", "by integers"],
)
def test_the_workspace_of_elementwise_kernels_is_that_of_the_real_allocator(call):
    x, mask = torch.randn(100, 100), torch.randn(100, 100) > 0
    call(x, mask)  # whatever is allocated once
    with Recorder(CpuWorkspaces()) as recorder:
        recorder.watch(x)
        recorder.watch(mask)
        call(x, mask)
    assert recorder.trace.peak() - x.nbytes - mask.nbytes == most_allocated_by(
        lambda: call(x, mask)
    )


@pytest.mark.parametrize(
    ("make", "make_batch", "num_samples", "optimizer", "measures"),
    [
        (lambda: mlp(nn.GELU(), nn.ReLU()), vectors, 128, sgd, False),
        (lambda: mlp(nn.GELU(), nn.ReLU()), vectors, 128, adamw, False),
        (lambda: mlp(nn.Dropout(0.5)), vectors, 128, sgd, False),
        (tiny_vit, images, 16, adamw, True),
        (lambda: tiny_vit(drop_path_rate=0.3, attn_drop_rate=0.1), images, 16, sgd, True),
        (lambda: tiny_vit(proj_drop_rate=0.2), images, 16, sgd, True),
        (lambda: timm.create_model("resnet18", num_classes=10), images, 8, sgd, True),
        (lambda: timm.create_model("resnet18", num_classes=10), images, 24, adamw, True),
        (lambda: timm.create_model("mobilenetv4_conv_small"), images, 20, sgd, True),
        (lambda: timm.create_model("edgenext_xx_small"), images, 8, sgd, True),
        (lambda: timm.create_model("convnext_atto"), images, 8, adamw, True),
    ],
    ids=[
        "mlp",
        "mlp with AdamW",
        "mlp with dropout",
        "vit",
        "vit with drop path",
        "vit with dropout",
        "resnet18",
        "resnet18 from 16 samples on",
        "mobilenetv4",
        "edgenext",
        "convnext",
    ],
)
def test_the_traced_peak_is_that_of_the_real_allocator(
    make, make_batch, num_samples, optimizer, measures
):
    model = make()
    expected = traced(model, make_batch, num_samples, optimizer).peak()
    real = allocated_at_peak(model, make_batch, num_samples, optimizer)
    assert abs(real - expected) <= SCALARS + MARGIN * measures


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small"])
def test_of_several_ghost_batches_too_and_no_kernel_joins_them(name):
    trace = traced(timm.create_model(name), images, 24, norm=8)
    whole = traced(timm.create_model(name), images, 24, norm=24)
    real = allocated_at_peak(timm.create_model(name), images, 24, sgd, norm=8)
    assert abs(real - trace.peak()) <= SCALARS
    calls = Counter(kernel.name for kernel in trace.kernels())
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in timm.create_model(name).modules())
    assert calls["aten.native_batch_norm"] == calls["aten.native_batch_norm_backward"] == 6 * layers
    at_commit = sum(kernel.name == "aten.cat" for kernel in whole.kernels())
    assert calls["aten.cat"] == at_commit
    assert not any(kernel.num_bytes for kernel in trace.kernels() if "empty" in kernel.name)


@pytest.mark.parametrize(("precision", "joins"), [("bf16", False), ("fp32", True)])
def test_a_trace_for_cuda_joins_ghost_batches_where_cudnn_takes_them(precision, joins):
    model = timm.create_model("resnet18")
    trace = traced(model, images, 24, precision=precision, device_type="cuda", norm=8)
    whole = traced(model, images, 24, precision=precision, device_type="cuda", norm=24)
    count, at_commit = (
        sum(kernel.name == "aten.cat" for kernel in each.kernels()) for each in (trace, whole)
    )
    assert (count > at_commit) == joins


@pytest.mark.parametrize(
    ("make", "make_batch", "precision"),
    [
        (lambda: mlp(nn.BatchNorm1d(256), nn.Dropout(0.5)), vectors, "fp32"),
        (lambda: mlp(nn.BatchNorm1d(256), nn.Dropout(0.5)), vectors, "fp16"),
        (tiny_vit, images, "bf16"),
        (lambda: timm.create_model("resnet18", num_classes=10), images, "fp32"),
    ],
    ids=["mlp", "mlp in fp16", "vit in bf16", "resnet18"],
)
def test_the_breakdown_adds_up_to_the_peak_and_its_roles_are_formulas(make, make_batch, precision):
    model = make()
    parameters = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    for optimizer, copies in ((sgd, 1), (adamw, 2)):
        trace = traced(model, make_batch, 8, optimizer, precision)
        found = trace.breakdown()
        assert sum(found.values()) == trace.peak()
        assert found["weights"] == parameters + buffers
        assert found["gradients"] == parameters
        assert found["optimizer"] == copies * parameters
        assert found["activations"] > 0 and found["workspace"] >= 0


def test_tied_weights_are_counted_once_and_frozen_ones_have_no_gradient():
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    found = traced(tied, vectors, 8).breakdown()
    assert found["weights"] == found["gradients"] == found["optimizer"] == (64 * 64 + 2 * 64) * 4
    frozen = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    frozen[0].requires_grad_(False)
    found = traced(frozen, vectors, 8).breakdown()
    assert found["weights"] == (64 * 64 + 64 + 32 * 64 + 32) * 4
    assert found["gradients"] == found["optimizer"] == (32 * 64 + 32) * 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_the_optimizers_state_alone_outlive_the_micro_steps(precision):
    model = mlp(nn.ReLU(), nn.Dropout(0.5))
    trace = traced(model, vectors, 8, adamw, precision)
    live = {}
    for event in trace.events:
        if isinstance(event, Allocate):
            live[event.id] = event.num_bytes
        elif isinstance(event, Free):
            del live[event.id]
        elif event == Mark("commit"):
            break
    left = Counter()
    for key, num_bytes in live.items():
        left[trace.roles.get(key, "activations")] += num_bytes
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert left == {"weights": weights, "gradients": weights, "optimizer": 2 * weights}


class Everything(nn.Module):
    """BatchNorm, dropout, a tied weight, a frozen one and a shared buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5)
        self.b, self.fc = nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.b(self.a(x)))))


def snapshot(model, optimizer):
    """All that a trace could leave behind, comparable by ==."""
    storages = {n: t.data_ptr() for n, t in model.state_dict().items()}
    tensors = {n: (t.tolist(), t._version) for n, t in model.state_dict().items()}
    modules = [
        (n, type(m), m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    ]
    gradients = [(p.grad, p.requires_grad, id(p)) for p in model.parameters()]
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state()]
    generators = torch.get_rng_state().tolist(), numpy_state, random.getstate()
    defaults = (
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_num_threads(),
    )
    replaced = F.dropout, F.dropout2d, timm.layers.drop.drop_path
    state = copy.deepcopy(optimizer.state_dict()), id(optimizer.param_groups[0]["params"][0])
    return storages, tensors, modules, gradients, generators, defaults, replaced, state


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("training", [True, False])
def test_a_trace_changes_nothing_outside(precision, training):
    model = Everything().train(training)
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    traced(model, vectors, 8, lambda _: optimizer, precision)
    assert snapshot(model, optimizer) == before


def test_a_trace_that_fails_changes_nothing_outside():
    class Fails(Everything):
        def forward(self, x):
            raise RuntimeError(f"no forward after {super().forward(x).shape}")

    model = Fails()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"no forward after torch.Size\(\[8, 10\]\)"):
        traced(model, vectors, 8, lambda _: optimizer)
    assert snapshot(model, optimizer) == before


def test_a_trace_in_another_default_dtype_takes_it_and_leaves_it():
    in_float = traced(mlp(), vectors, 8).breakdown()
    torch.set_default_dtype(torch.float64)
    try:
        in_double = traced(mlp(), vectors, 8).breakdown()
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for role in ("weights", "gradients", "optimizer"):
        assert in_double[role] == 2 * in_float[role]


def test_a_model_on_the_meta_device_traces_as_one_with_memory():
    with torch.device("meta"):
        without = tiny_vit()
    make_batch = images
    assert traced(without, make_batch, 4).events == traced(tiny_vit(), make_batch, 4).events
    assert all(p.is_meta for p in without.parameters())


def test_the_same_update_traces_the_same_whatever_the_random_state():
    model = mlp(nn.Dropout(0.5))
    first = traced(model, vectors, 8)
    torch.manual_seed(123)
    assert traced(model, vectors, 8).events == first.events


def live_at_the_loss(model, make_batch, num_samples, precision="fp32", **options):
    """Bytes live when the cross-entropy is taken: all that forward saved is there.

    Without the random state, which lies on the host.
    """
    options |= {"precision": precision, "num_micro_steps": 1}
    trace = traced(model, make_batch, num_samples, **options)
    names = [event.name if isinstance(event, Kernel) else None for event in trace.events]
    live = trace.live_before()[0][names.index("aten.nll_loss_forward")]
    on_cpu = options.get("device_type", "cpu") == "cpu"
    return live - on_cpu * torch.get_rng_state().nbytes


@pytest.mark.parametrize("num_samples", [32, 200])
def test_dropout_is_traced_with_its_keyed_masks(num_samples):
    """Scaled masks made ahead for 256 samples, or where that is too much, a byte an element."""
    width = 256
    ahead = 2 * num_samples * width <= MASK_AHEAD
    assert ahead == (num_samples == 32)
    plain = live_at_the_loss(mlp(nn.ReLU()), vectors, num_samples)
    dropped = live_at_the_loss(mlp(nn.ReLU(), nn.Dropout(0.5)), vectors, num_samples)
    keys = 3 * CALLS_AT_ONCE * SAMPLES_AT_ONCE * 4  # int32: two halves, and a first draw
    elements = 4 * width  # their numbers, folded once for an update
    masks = 4 * SAMPLES_AT_ONCE * width if ahead else num_samples * width + elements
    # ReLU's output is kept in any case; dropout's is what the next layer keeps.
    assert dropped - plain == 4 * num_samples * width + masks + keys


def casts_of(trace, weight):
    """Kernels that cast a float32 tensor of the size of `weight` to 16 bits, by position."""
    return [
        at
        for at, event in enumerate(trace.events)
        if isinstance(event, Kernel)
        and event.name == "aten._to_copy"
        and event.dtype == torch.float32
        and event.num_bytes == weight.numel() * (4 + 2)
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_each_weight_is_cast_once_an_update_and_its_cast_lives_over_the_micro_steps(precision):
    model = mlp(nn.ReLU())
    trace = traced(model, vectors, 8, precision=precision)
    places = {e.name: at for at, e in enumerate(trace.events) if isinstance(e, Mark)}
    for layer in (model[0], model[2], model[3]):
        (cast,) = casts_of(trace, layer.weight)
        assert places["micro-step 0"] < cast < places["micro-step 1"]
        allocated = trace.events[cast - 1]
        assert isinstance(allocated, Allocate)
        assert allocated.num_bytes == layer.weight.numel() * 2
        freed = trace.events.index(Free(allocated.id))
        backward = max(
            at
            for at, event in enumerate(trace.events)
            if isinstance(event, Kernel) and event.name == "aten.mm" and at < places["commit"]
        )
        assert freed > backward > places["micro-step 1"]


def test_autocast_halves_what_each_layer_saves_and_keeps_the_cast_weights():
    num_samples, width, depth = 128, 64, 6
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    in_float, in_half = (
        live_at_the_loss(model, vectors, num_samples, precision) for precision in ("fp32", "bf16")
    )
    # Of float32, each layer's output. Of bfloat16, the cast images and all outputs but the last,
    # and the logits in float32 again.
    float_bytes, half_bytes = depth * 4, 2 + (depth - 1) * 2 + 4
    casts = 2 * sum(p.numel() for p in model.parameters())
    assert in_half - in_float == num_samples * width * (half_bytes - float_bytes) + casts


def test_autocast_on_cuda_normalises_in_float32_where_the_cpus_keeps_bfloat16():
    num_samples, width = 128, 64
    model = nn.Sequential(nn.Linear(64, width), nn.LayerNorm(width), nn.Linear(width, 10))
    on_cpu, on_cuda = (
        live_at_the_loss(model, vectors, num_samples, "bf16", device_type=kind)
        for kind in ("cpu", "cuda")
    )
    # The norm's input, mean and deviation are kept in 4 bytes in place of 2; its output is cast
    # for the next layer.
    assert on_cuda - on_cpu == num_samples * (width + 2) * 2
    plain = [
        live_at_the_loss(mlp(nn.ReLU()), vectors, num_samples, "bf16", device_type=kind)
        for kind in ("cpu", "cuda")
    ]
    assert plain[0] == plain[1]  # products are bfloat16 on both


def test_recompute_keeps_cudas_autocast_rules():
    model = timm.create_model("convnext_atto", num_classes=10)
    network = Network(model=model, make_batch=images)
    for kind in ("cpu", "cuda"):
        options = {"precision": "bf16", "device_type": kind}
        plain, recomputed = (
            trace_update(network, plan_of(model, 4), change=change, **options).peak()
            for change in (None, lambda model, _: apply_activation_checkpointing(model))
        )
        assert recomputed < plain  # and torch's check of what is recomputed did not stop it


def test_only_two_micro_steps_run_whatever_their_number():
    model = mlp()
    two, ten = (traced(model, vectors, 8, num_micro_steps=n) for n in (2, 10))
    one = traced(model, vectors, 8, num_micro_steps=1)
    marks = [[e.name for e in t.events if isinstance(e, Mark)] for t in (one, two, ten)]
    assert marks[1] == marks[2] == ["micro-step 0", "micro-step 1", "commit"]
    assert marks[0] == ["micro-step 0", "commit"]
    assert two.peak() == ten.peak() > one.peak()  # gradients are there in the second


def test_flops_of_a_matrix_product_count_a_multiply_add_as_two():
    num_samples, out = 8, 10
    model = nn.Linear(64, out)
    trace = traced(model, vectors, num_samples, num_micro_steps=1)
    # Forward, and backward for the weight: the input needs no gradient.
    assert sum(k.flops for k in trace.kernels()) == 2 * (2 * num_samples * 64 * out)


def a_trace(*events, **roles):
    return Trace(list(events), {int(key[1:]): role for key, role in roles.items()})


def kernel(workspace):
    return Kernel("aten.x", 0, 0, workspace, None, False)


def test_the_peak_of_a_trace_by_hand_counts_live_storages_and_the_workspace_of_a_call():
    trace = a_trace(
        Allocate(0, 100), Allocate(1, 30), kernel(5), Free(1), kernel(50), Free(0), n0="weights"
    )
    settled, most = trace.live_before()
    assert settled == [0, 100, 130, 130, 100, 100]
    assert most == [100, 130, 135, 130, 150, 100]
    assert trace.peak() == 150
    parts = {"weights": 100, "gradients": 0, "optimizer": 0, "activations": 0, "workspace": 50}
    assert trace.breakdown() == parts
    assert list(trace.kernels()) == [kernel(5), kernel(50)]


def test_an_empty_trace_has_a_peak_of_zero():
    assert Trace().peak() == 0 and set(Trace().breakdown().values()) == {0}


def test_random_events_give_the_peak_and_breakdown_of_a_plain_count():
    rng = random.Random(0)
    for _ in range(50):
        events, live, history = [], {}, [0]
        for i in range(60):
            kind = rng.randrange(3)
            if kind == 0:
                live[i] = rng.randrange(1, 100)
                events.append(Allocate(i, live[i]))
                history.append(sum(live.values()))
            elif kind == 1 and live:
                key = rng.choice(list(live))
                del live[key]
                events.append(Free(key))
            else:
                workspace = rng.randrange(100)
                events.append(kernel(workspace))
                history.append(sum(live.values()) + workspace)
        trace = Trace(events)
        assert trace.peak() == max(history) == sum(trace.breakdown().values())


def test_a_recorder_counts_a_storage_once_and_sees_it_go():
    with Recorder() as recorder:
        x = torch.empty(16, 4)
        view = x.t()[1:]
        y = x + 1
        del x
        assert not any(isinstance(event, Free) for event in recorder.trace.events)
        del view
        y.add_(1)
    sizes = [e.num_bytes for e in recorder.trace.events if isinstance(e, Allocate)]
    assert sizes == [16 * 4 * 4, 16 * 4 * 4]
    freed = [e.id for e in recorder.trace.events if isinstance(e, Free)]
    assert freed == [0]
    names = [k.name for k in recorder.trace.kernels()]
    assert names == ["aten.empty", "aten.add", "aten.add_"]  # views are no calls


def test_a_kernels_workspace_is_asked_for_with_its_arguments_and_result():
    asked = []

    def workspace(name, args, kwargs, out):
        asked.append((name, len(args), out.shape))
        return 1000

    with Recorder(workspace) as recorder:
        x = torch.ones(4)
        y = x + 2
    assert asked == [("aten.ones", 1, x.shape), ("aten.add", 2, y.shape)]
    assert recorder.trace.peak() == 4 * 4 + 4 * 4 + 1000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_with_a_plain_tensor_attribute_is_traced(device):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(64, 10), torch.ones(10)

        def forward(self, x):
            return self.fc(x) * self.scale

    with torch.device(device):
        model = Scaled()
    assert traced(model, vectors, 8).breakdown()["gradients"] == (64 * 10 + 10) * 4


def test_an_optimizer_that_has_stepped_is_traced_with_the_state_that_it_has():
    model = mlp()
    optimizer = adamw(model)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert traced(model, vectors, 8, lambda _: optimizer).breakdown()["optimizer"] == 2 * weights


def test_a_trace_runs_under_any_default_device_and_leaves_it():
    with torch.device("meta"):
        trace = traced(mlp(), vectors, 8)
        assert torch.get_default_device() == torch.device("meta")
    assert trace.peak() == traced(mlp(), vectors, 8).peak()


def backward_in_a_child_after_a_trace():
    with fake_tensors():
        torch.ones(3)
    backward = torch.ones((), requires_grad=True).backward
    backward()  # the first one after the trace
    return run_forked(lambda rank: backward())[0].error


def test_a_process_can_fork_after_a_trace_and_a_backward_pass():
    assert run_fresh("test_trace", "backward_in_a_child_after_a_trace") == ""
