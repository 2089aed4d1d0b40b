"""Workspaces that the processor decides, beside those of the real allocator on any processor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from lbaccel import cli
from lbaccel.planning.cost import kernel_calls, kernel_memory, workspace
from lbaccel.planning.cost.kernel_calls import Unmeasured, allocations
from lbaccel.planning.cost.kernel_memory import (
    ROWS,
    is_chosen_by_processor,
    is_matrix_product,
    measured_workspace,
)
from lbaccel.planning.cost.known_calls import fake_tensors
from lbaccel.planning.cost.processor import LIMITS
from lbaccel.planning.cost.workspace import MARGIN, CpuWorkspaces

aten = torch.ops.aten
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def convolution(
    samples, channels, outputs, kernel, side, *, groups=1, stride=1, layout="contiguous", **how
):
    """Arguments of a convolution and of its backward pass."""
    dtype, layout = how.get("dtype", torch.float32), LAYOUTS[layout]
    x = torch.zeros(samples, channels, side, side, dtype=dtype).to(memory_format=layout)
    weight = torch.zeros(outputs, channels // groups, kernel, kernel, dtype=dtype)
    weight = weight.to(memory_format=layout)
    bias = torch.zeros(outputs, dtype=dtype) if how.get("bias") else None
    padding = how.get("padding", kernel // 2)
    rest = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    forward = (x, weight, bias, *rest)
    out = aten.convolution(*forward)
    wanted = [channels != 3, True, bias is not None]
    sizes = None if bias is None else [outputs]
    backward = (torch.zeros_like(out), x, weight, sizes, *rest, wanted)
    return {"aten.convolution": forward, "aten.convolution_backward": backward}


def real_workspace(call):
    """By torch's profiler: most bytes live inside, beyond what the call returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    del result
    return max(itertools.accumulate(changes), default=0) - sum(changes)


def predicted_and_real(calls):
    for name, args in calls.items():
        op = getattr(aten, name.removeprefix("aten."))
        yield (
            CpuWorkspaces()(name, args, {}, op(*args)),
            real_workspace(lambda op=op, a=args: op(*a)),
        )


def random_convolutions(seed, number):
    rng = random.Random(seed)
    while number:
        kernel = rng.choice([1, 1, 3, 3, 5, 7])
        channels = rng.choice([3, 8, 12, 16, 24, 40, 64, 96, 128])
        groups = rng.choice([1, 1, 2, 4, channels])
        outputs = channels if groups == channels else rng.choice([8, 16, 24, 40, 64, 128])
        stride = rng.choice([1, 1, 2])
        # Those of less than a vector of channels: see `_writes_past_its_buffers`.
        if channels % groups or outputs % groups or (channels < 16 and kernel == 1 < stride):
            continue
        number -= 1
        yield {
            "samples": rng.choice([1, 2, 3, 4, 7, 8, 15, 16, 17, 18, 24, 33]),
            "channels": channels,
            "outputs": outputs,
            "kernel": kernel,
            "side": rng.choice([1, 2, 4, 7, 8, 14, 20]),
            "groups": groups,
            "stride": stride,
            "layout": rng.choice(list(LAYOUTS)),
            "bias": rng.random() < 0.3,
            "dtype": rng.choice([torch.float32, torch.float32, torch.bfloat16]),
        }


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_workspace_of_random_convolutions_is_that_of_the_real_allocator(num_threads):
    torch.set_num_threads(num_threads)
    exact = total = 0
    try:
        for how in random_convolutions(num_threads, 60):
            calls = convolution(**how)
            tensors = sum(t.nbytes for t in calls["aten.convolution_backward"][:3])
            for predicted, real in predicted_and_real(calls):
                assert predicted >= real - 0.01 * (real + tensors) - MARGIN, how
                assert predicted <= real + 0.06 * (real + tensors) + MARGIN, how
                exact += predicted == real
                total += 1
    finally:
        torch.set_num_threads(1)
    assert exact >= 0.75 * total, f"{exact} of {total} to the byte"


@pytest.mark.parametrize("samples", [4, 15, 16, 17, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_path_that_ATen_changes_at_16_samples_is_followed(samples, layout):
    calls = convolution(samples, 96, 160, 1, 24, layout=layout)
    tensors = sum(t.nbytes for t in calls["aten.convolution_backward"][:3])
    for predicted, real in predicted_and_real(calls):
        assert real - MARGIN <= predicted <= real + 0.06 * (real + tensors) + MARGIN


def test_each_number_of_threads_has_workspaces_of_its_own(monkeypatch):
    """oneDNN's Winograd gradients and partial sums have buffers for each thread."""
    measured, calls = [], convolution(8, 256, 256, 3, 2)
    plain = kernel_calls.allocations

    def noted(call):
        measured.append(torch.get_num_threads())
        return plain(call)

    monkeypatch.setattr(kernel_calls, "allocations", noted)
    kernel_calls._known_allocations.cache_clear()
    for num_threads in (1, 3, 1):
        torch.set_num_threads(num_threads)
        try:
            pairs = list(predicted_and_real(calls))
        finally:
            torch.set_num_threads(1)
        assert all(abs(predicted - real) <= MARGIN for predicted, real in pairs)
    assert measured == 4 * [1] + 6 * [3]  # a third call with threads


def test_no_call_is_larger_than_the_kernel_that_is_asked_for(monkeypatch):
    seen = []
    plain = kernel_memory.kernel_allocations

    def noted(op, args):
        seen.append(args[0].sizes)
        return plain(op, args)

    monkeypatch.setattr(kernel_memory, "kernel_allocations", noted)
    for samples, kernel in ((1, 3), (2, 3), (3, 3), (4, 3), (200, 3), (16, 1), (17, 1), (200, 1)):
        seen.clear()
        for name, args in convolution(samples, 48, 48, kernel, 30).items():
            measured_workspace(name, args)
        if samples >= 16 and kernel == 1:
            assert {n for n, *_ in seen} == {16} and max(rows for *_, rows, _ in seen) == 10
        else:
            few = {1: {1}, 2: {2}, 3: {3}}.get(samples, {2, 3})
            assert {n for n, *_ in seen} == few


def test_what_was_measured_once_is_not_measured_again(monkeypatch):
    calls = convolution(9, 24, 24, 3, 10)
    found = [measured_workspace(name, args) for name, args in calls.items()]
    monkeypatch.setattr(kernel_calls, "allocations", lambda call: pytest.fail("called again"))
    assert [measured_workspace(name, args) for name, args in calls.items()] == found
    other = convolution(500, 24, 24, 3, 10)  # affine in the samples: the same two calls
    assert all(measured_workspace(name, args) >= 0 for name, args in other.items())


def test_fake_tensors_of_any_size_cost_no_memory_and_leave_no_trace():
    state, enabled = torch.get_rng_state(), torch.is_grad_enabled()
    with fake_tensors(), torch.autocast("cpu", dtype=torch.bfloat16):
        calls = convolution(50_000, 64, 64, 3, 56)
        found = [measured_workspace(name, args) for name, args in calls.items()]
        assert torch.is_autocast_enabled("cpu") and isinstance(torch.zeros(1), FakeTensor)
    assert all(0 <= workspace < 2**40 for workspace in found)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == enabled
    assert allocations(lambda: torch.zeros(16)) == [64]


def test_one_more_sample_that_changes_the_algorithm_errs_upward(monkeypatch):
    lists = {2: (100, -100), 3: (150, 30, -30, -150)}

    def taken(op, args):
        return lists[args[0].sizes[0]]

    monkeypatch.setattr(kernel_memory, "kernel_allocations", taken)
    monkeypatch.setattr(kernel_memory, "_changes_at_many", lambda *a: False)
    args = convolution(30, 8, 8, 3, 8)["aten.convolution"]
    assert measured_workspace("aten.convolution", args) == 10 * 180
    lists[3] = (60, -60)  # it shrinks: a line would end below zero
    assert measured_workspace("aten.convolution", args) == 100
    lists[3] = (150, -150)
    assert measured_workspace("aten.convolution", args) == 100 + 28 * 50


def test_with_threads_a_third_call_finds_what_more_samples_add(monkeypatch):
    def taken(op, args):
        n = args[0].sizes[0]
        return (10 * n, -10 * n) if n < 5 else (10 * n, 64, -64, -10 * n)

    monkeypatch.setattr(kernel_memory, "kernel_allocations", taken)
    monkeypatch.setattr(kernel_memory, "_changes_at_many", lambda *a: False)
    args = convolution(32, 8, 8, 3, 8)["aten.convolution"]
    assert measured_workspace("aten.convolution", args) == 320
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert measured_workspace("aten.convolution", args) == 320 + 64 * 32 // 8


def test_convolutions_that_are_products_of_columns_follow_atens_rule():
    """1 x 1 float32 convolutions of fewer than 16 samples in one thread, on any processor."""
    few, many = convolution(8, 64, 32, 1, 7), convolution(16, 64, 32, 1, 7)
    for name in few:
        assert is_matrix_product(name, few[name]) and not is_matrix_product(name, many[name])
        assert is_chosen_by_processor(name, many[name])
        assert not is_chosen_by_processor(name, few[name])
    columns = 1 * 9 * 16 * 12 * 12 * 4  # one sample of 3 x 3: ATen's too
    calls = convolution(1, 16, 24, 3, 12)
    for name, args in calls.items():
        assert is_matrix_product(name, args)
        assert (
            CpuWorkspaces()(name, args, {}, None if "back" in name else torch.zeros(1, 24, 12, 12))
            == columns
        )


# -- matrix products ------------------------------------------------------------------------------


def test_bf16_products_are_measured_on_blocks_where_onednn_runs_them(monkeypatch):
    seen = []

    def taken(op, args):
        seen.append([a.sizes for a in args])
        return (80, 500, -500)

    monkeypatch.setattr(kernel_memory, "kernel_allocations", taken)
    monkeypatch.setattr(kernel_memory, "_has_bf16_products", lambda: True)
    with fake_tensors():
        x, weight = torch.empty(50_000, 384, dtype=torch.bfloat16), torch.empty(384, 1536)
        assert not is_chosen_by_processor("aten.mm", (x.float(), weight))
        assert is_chosen_by_processor("aten.mm", (x, weight.bfloat16()))
        assert measured_workspace("aten.mm", (x, weight.bfloat16())) == 500
        assert measured_workspace("aten.mm", (x.t(), x)) == 500
    assert seen == [[(ROWS, 384), (384, ROWS)], [(384, ROWS), (ROWS, 384)]]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [197, 1024])
def test_attentions_workspace_is_that_of_the_real_allocator(tokens, dtype, num_threads):
    q, k, v = torch.zeros(3, 5, 3, tokens, 64, dtype=dtype)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    torch.set_num_threads(num_threads)
    try:
        out, logsumexp = getattr(aten, name)(q, k, v)
        backward = (torch.zeros_like(out), q, k, v, out, logsumexp, 0.0, False)
        for suffix, args in (("", (q, k, v)), ("_backward", backward)):
            op = getattr(aten, name + suffix)
            real = real_workspace(lambda op=op, args=args: op(*args))
            predicted = CpuWorkspaces()(f"aten.{name}{suffix}", args, {}, op(*args))
            assert real > 0 and abs(predicted - real) <= MARGIN
    finally:
        torch.set_num_threads(1)


LAYOUTS_OF_THREE = list(itertools.product(LAYOUTS, repeat=3))


@pytest.mark.parametrize("samples", [1, 8, 20])
@pytest.mark.parametrize("kernel", [1, 3])
def test_operands_in_several_layouts_are_copied_and_counted(kernel, samples):
    (x, weight, *rest), backward = convolution(samples, 64, 128, kernel, 14).values()
    for image, filters, gradient in LAYOUTS_OF_THREE:
        x = x.contiguous(memory_format=LAYOUTS[image])
        weight = weight.contiguous(memory_format=LAYOUTS[filters])
        grad = backward[0].contiguous(memory_format=LAYOUTS[gradient])
        calls = {
            "aten.convolution": (x, weight, *rest),
            "aten.convolution_backward": (grad, x, weight, *backward[3:]),
        }
        for predicted, real in predicted_and_real(calls):
            assert real - MARGIN <= predicted <= 1.06 * real + MARGIN


# -- what can't be measured -----------------------------------------------------------------------


def test_under_a_profiler_of_the_users_a_workspace_is_assumed_and_the_plan_says_so(capsys):
    flags = "plan --model resnet10t --img-size 32 --global-batch-size 64 --memory 4GiB --device cpu"
    flags = [*flags.split(), "--micro-batch-size", "32", "--num-classes", "10"]
    assert cli.main(flags) == 0
    measured = capsys.readouterr().out
    kernel_calls._known_allocations.cache_clear()
    with profile(activities=[ProfilerActivity.CPU]):
        assert cli.main(flags) == 0
    assumed = capsys.readouterr().out
    assert "that can't be measured" in assumed and "can't be measured" not in measured
    assert peak(assumed) > peak(measured), "an unknown workspace errs upward"


def peak(text):
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("peak "))


def test_no_memory_for_a_call_is_no_failure_of_the_plan(monkeypatch):
    def fails(call):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
        )

    monkeypatch.setattr(kernel_calls, "allocations", fails)
    kernel_calls._known_allocations.cache_clear()
    args = convolution(5, 16, 16, 3, 9)["aten.convolution"]
    with pytest.raises(Unmeasured, match="can't allocate memory"):
        measured_workspace("aten.convolution", args)
    workspaces = CpuWorkspaces()
    out = aten.convolution(*args)
    tensors = sum(t.nbytes for t in (args[0], args[1], out))
    assumed = workspace.ASSUMED * (tensors + args[1].nbytes)
    assert workspaces("aten.convolution", args, {}, out) == assumed
    assert workspaces.num_assumed == 1


def test_a_call_that_may_not_fit_in_memory_is_not_made(monkeypatch):
    monkeypatch.setattr(kernel_calls, "default_budget", lambda device: 1000)
    monkeypatch.setattr(kernel_calls, "allocations", lambda call: pytest.fail("called"))
    kernel_calls._known_allocations.cache_clear()
    args = convolution(5, 16, 16, 3, 9)["aten.convolution"]
    with pytest.raises(Unmeasured, match="0 MiB are free"):
        measured_workspace("aten.convolution", args)


def test_a_kernel_that_would_end_the_process_is_not_called(monkeypatch):
    """mobileone's and repvgg's stems, channels-last: see `_writes_past_its_buffers`."""
    with fake_tensors():
        calls = convolution(8, 3, 48, 1, 32, stride=2, padding=0, layout="channels_last")
    monkeypatch.setattr(kernel_calls, "allocations", lambda call: pytest.fail("called"))
    with pytest.raises(Unmeasured, match="past its buffers"):
        measured_workspace("aten.convolution_backward", calls["aten.convolution_backward"])


def test_a_change_of_torchs_private_functions_is_no_failure_of_the_plan(monkeypatch):
    def changed(*args):
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr(torch._C, "_select_conv_backend", changed)
    kernel_calls._known_backend.cache_clear()
    args = convolution(5, 16, 16, 3, 9)["aten.convolution"]
    workspaces = CpuWorkspaces()
    assert workspaces("aten.convolution", args, {}, aten.convolution(*args)) > 0
    assert workspaces.num_assumed == 1


def test_a_plan_names_instruction_set_source_and_margin(monkeypatch):
    workspaces = CpuWorkspaces()
    args = convolution(5, 16, 16, 3, 9)["aten.convolution"]
    workspaces("aten.convolution", args, {}, aten.convolution(*args))
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert str(workspaces.summary()) == (
        "workspaces for AVX-512, AMX; ONEDNN_MAX_CPU_ISA=AVX2, 1 thread: kernels that the "
        "processor chooses measured on a few samples, others by ATen's rules; margin 0.0625 MiB"
    )
