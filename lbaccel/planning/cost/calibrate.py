"""Rates of the device at hand, by class of kernel: what the time model divides work by.

A probe is a call of an aten operation in a shape of timm's backbones at 224 px. Its work is counted
by the tracer on fake tensors, so that rates and plans count alike; its time is the least of several
rounds over all probes, so that a neighbour's load and warm caches favour no class.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError, check_number
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.known_calls import fake_tensors
from lbaccel.planning.cost.time_model import MANY, kernel_class
from lbaccel.planning.cost.trace import Kernel, Recorder

aten = torch.ops.aten

# Channels in and out, kernel, stride, groups, and side of the input.
_CONVOLUTIONS = (
    (64, 64, 3, 1, 1, 56),  # ResNet: stages, then the stem
    (256, 256, 3, 1, 1, 14),
    (512, 512, 3, 1, 1, 7),
    (3, 64, 7, 2, 1, 224),
    (1024, 256, 1, 1, 1, 14),
    (64, 256, 1, 1, 1, 56),
    (144, 24, 1, 1, 1, 56),  # MobileNetV2
    (144, 144, 3, 1, 144, 56),
    (384, 384, 3, 1, 384, 14),
    (80, 80, 7, 1, 80, 56),  # ConvNeXt
)
_MAPS = ((64, 112), (256, 14))  # channels and side
_WIDTHS, _TOKENS, _HEAD = (384, 768), 197, 64  # ViT-S and ViT-B
_MAX_ROUNDS, _LAUNCHES = 20, 100
_LARGE = 2**24  # elements: 64 MiB of float32

Call = Callable[[], object]
Make = Callable[..., Tensor]  # sizes -> a tensor of one device, dtype and layout


@dataclass(frozen=True)
class _Probe:
    name: str  # class of kernel, "bandwidth" or "launch"
    work: int  # operations or bytes of a call
    build: Callable[[], Call]  # allocates what the call reads


def calibrate(device: torch.device, *, seconds: float = 10.0) -> Device:
    """Measure each class of kernel on `device`, with the threads and flags of this process.

    A class's rate is the work of its probes over their time, less the time of their launches, as
    `kernel_seconds` adds them. They run on 64 samples (fewer where little memory is free), on a
    CPU on 8, or on one for each second where there are fewer seconds.

    Args:
        device: the CPU or a CUDA device.
        seconds: how long it may take, about; each class is measured at least once.

    Raises:
        InputError: `seconds` is not above 0, or torch finds no such device.
    """
    check_number("seconds", seconds)
    is_cuda = device.type == "cuda"
    if not is_cuda and device.type != "cpu":
        raise InputError(f"device={str(device)!r} can't be calibrated. Use device='cpu' or 'cuda'.")
    if is_cuda and not torch.cuda.is_available():
        raise InputError(f"device={str(device)!r} is not there: torch finds no CUDA. Use 'cpu'.")
    deadline = time.perf_counter() + seconds
    probes = _probes(device, _num_samples(device, seconds))
    times = _measure(probes, device, deadline)
    launch = min(taken for probe, taken in times.items() if probe.name == "launch") / _LAUNCHES
    totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    best: dict[str, float] = defaultdict(float)
    for probe, taken in times.items():
        net = max(taken - launch, taken / 2)
        work, before = totals[probe.name]
        totals[probe.name] = work + probe.work, before + net
        best[probe.name] = max(best[probe.name], probe.work / net)
    rates = {name: work / taken for name, (work, taken) in totals.items() if name != "launch"}
    return Device(
        name=torch.cuda.get_device_name(device) if is_cuda else "cpu",
        kind=device.type,
        memory=torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        flops=_flops(best),
        bandwidth=rates.pop("bandwidth"),
        launch_seconds=_overhead(device),
        source="calibrated",
        rates=rates,
    )


def _flops(best: Mapping[str, float]) -> dict[str, float]:
    """The fastest products of fp32 matrices, of those with cuDNN's TF32 ones, and of half ones."""

    def fastest(dtype: str, *kinds: str) -> float:
        return max(
            (r for n, r in best.items() if n.split("/")[0] in kinds and dtype in n), default=0.0
        )

    fp32 = fastest("fp32", "matmul")
    tf32 = fastest("fp32", "matmul", "conv", "pointwise")
    return {
        "fp32": fp32,
        "tf32": tf32,
        "half": fastest("half", "matmul", "conv", "pointwise") or fp32,
    }


def _num_samples(device: torch.device, seconds: float) -> int:
    if device.type == "cpu":
        return min(max(int(2 * seconds), 1), 16)  # from 16 on, oneDNN runs every convolution
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(free // 2**28, 8), 64)  # the probes hold 0.2 GiB a sample


def _measure(probes: list[_Probe], device: torch.device, deadline: float) -> dict[_Probe, float]:
    """Least seconds of a call of each probe; time that runs out costs a class its later probes."""
    least: dict[_Probe, float] = {}
    calls: dict[_Probe, Call | None] = {}
    started: set[str] = set()

    def late(probe: _Probe) -> bool:
        return probe.name in started and time.perf_counter() > deadline

    for _ in range(_MAX_ROUNDS):
        marks: list[tuple[_Probe, Any, Any]] = []
        for probe in probes:
            if late(probe):
                continue
            if probe not in calls:
                calls[probe] = _warm(probe)
            call = calls[probe]
            if call is not None and not late(probe):
                started.add(probe.name)
                start = _now(device)
                call()
                marks.append((probe, start, _now(device)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for probe, start, end in marks:
            taken = start.elapsed_time(end) / 1e3 if device.type == "cuda" else end - start
            least[probe] = min(taken, least.get(probe, taken))
    return least


def host_seconds() -> float:
    """A clock for work on the CPU: of one thread the process's own, which no neighbour moves."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _warm(probe: _Probe) -> Call | None:
    """The call, made once; None where the device has no such kernel in half precision."""
    try:
        call = probe.build()
        call()
    except RuntimeError:
        if "/half" in probe.name:
            return None
        raise
    return call


def _now(device: torch.device) -> Any:
    if device.type == "cpu":
        return host_seconds()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _probes(device: torch.device, num_samples: int) -> list[_Probe]:
    """Each class's first probe, then the second ones, and so on; launches where no call waits."""
    half = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = torch.float16
    found: dict[str, list[_Probe]] = defaultdict(list)
    for build in _builds(num_samples):
        for dtype in (torch.float32, half):
            for layout in (torch.contiguous_format, torch.channels_last):
                kernel = _kernel(build, dtype, layout)
                name = kernel_class(kernel)
                if layout is torch.contiguous_format or name.endswith("channels_last"):
                    here = partial(build, partial(_tensor, device, dtype, layout))
                    found[name].append(_Probe(name, kernel.flops or kernel.num_bytes, here))
    make = partial(_tensor, device, torch.float32, torch.contiguous_format)
    add = partial(_call, make, aten.add, (_LARGE,), (_LARGE,))
    ordered = [_Probe("launch", _LAUNCHES, partial(_launches, make))]
    ordered.append(_Probe("bandwidth", 3 * 4 * _LARGE, add))
    for number in range(max(map(len, found.values()))):
        ordered += [same[number] for same in found.values() if number < len(same)]
    return ordered


def _overhead(device: torch.device) -> float:
    """Seconds that a kernel of a real update costs the host: Python, autograd, dispatch."""
    blocks = [(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(16)]
    model = nn.Sequential(*[layer for block in blocks for layer in block]).to(device)
    x = torch.randn(2, 8, device=device)

    def run() -> float:
        before = host_seconds()
        model(x).sum().backward()
        return host_seconds() - before

    with Recorder() as recorder:
        run()
    count = sum(kernel.num_bytes > 0 for kernel in recorder.trace.kernels())
    return min(run() for _ in range(20)) / count


def _kernel(
    build: Callable[[Make], Call], dtype: torch.dtype, layout: torch.memory_format
) -> Kernel:
    """The kernel that the tracer records of a call."""
    with fake_tensors():
        make = partial(_tensor, torch.device("cpu"), dtype, layout)
        call = build(make)
        with Recorder() as recorder:
            call()
    return max(recorder.trace.kernels(), key=lambda k: k.flops or k.num_bytes)


def _tensor(
    device: torch.device, dtype: torch.dtype, layout: torch.memory_format, *sizes: int
) -> Tensor:
    layout = layout if len(sizes) == 4 else torch.contiguous_format
    return torch.empty(sizes, device=device, dtype=dtype, memory_format=layout).uniform_(-1, 1)


def _builds(n: int) -> Iterator[Callable[[Make], Call]]:
    """Functions that turn a `Make` into a call on `n` samples."""

    def call(op: Any, *arguments: Any) -> Callable[[Make], Call]:
        return lambda make: _call(make, op, *arguments)

    few = [(min(n, MANY // 2), shape) for shape in _CONVOLUTIONS if shape[2] == 1]
    for b, (inputs, outputs, kernel, stride, groups, side) in [(n, c) for c in _CONVOLUTIONS] + few:
        out = (side - 1) // stride + 1
        x, weight = (b, inputs, side, side), (outputs, inputs // groups, kernel, kernel)
        how = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
        mask = [inputs != 3, True, False]  # images have no gradient
        yield call(aten.convolution, x, weight, None, *how)
        yield call(aten.convolution_backward, (b, outputs, out, out), x, weight, None, *how, mask)
    for channels, side in _MAPS:
        x = (n, channels, side, side)
        yield from (partial(_batch_norm, x, False), partial(_batch_norm, x, True))
        yield from (call(aten.relu_, x), call(aten.add, x, x))
        yield call(aten.threshold_backward, x, x, 0)
    for width in _WIDTHS:
        x, wide = (n * _TOKENS, width), (n * _TOKENS, 4 * width)
        head = (n, width // _HEAD, _TOKENS, _HEAD)
        yield from (partial(_layer_norm, x, False), partial(_layer_norm, x, True))
        yield from (call(aten.mm, x, (width, 4 * width)), call(aten.mm, wide, (4 * width, width)))
        yield call(aten.scaled_dot_product_attention, head, head, head)
        yield from (call(aten.gelu, wide), call(aten.gelu_backward, wide, wide))


def _call(make: Make, op: Any, *arguments: Any) -> Call:
    """`op` on `arguments`, in which a tuple is the sizes of a tensor."""
    ready = [make(*a) if isinstance(a, tuple) else a for a in arguments]
    return lambda: op(*ready)


def _launches(make: Make) -> Call:
    one = make(1)
    return lambda: [aten.add(one, one) for _ in range(_LAUNCHES)]


def _batch_norm(sizes: tuple[int, ...], backward: bool, make: Make) -> Call:
    """As `torch.nn.functional.batch_norm` does it: cuDNN's kernel where it has one."""
    x, grad, cudnn = make(*sizes), make(*sizes), torch.backends.cudnn.enabled
    weight, bias, mean, var = (torch.ones(sizes[1], device=x.device) for _ in range(4))

    def forward() -> Any:
        return aten._batch_norm_impl_index(x, weight, bias, mean, var, True, 0.1, 1e-5, cudnn)

    if not backward:
        return forward
    _, *saved, reserve, kernel = forward()
    known, mask = (weight, mean, var, *saved), [True] * 3
    run = aten._batch_norm_impl_index_backward
    return lambda: run(kernel, x, grad, *known, True, 1e-5, mask, reserve)


def _layer_norm(sizes: tuple[int, int], backward: bool, make: Make) -> Call:
    x, grad, shape = make(*sizes), make(*sizes), [sizes[1]]
    weight, bias = make(*shape), make(*shape)
    if not backward:
        return lambda: aten.native_layer_norm(x, shape, weight, bias, 1e-6)
    _, *saved = aten.native_layer_norm(x, shape, weight, bias, 1e-6)
    run = aten.native_layer_norm_backward
    return lambda: run(grad, x, shape, *saved, weight, bias, [True] * 3)
