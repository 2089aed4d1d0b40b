"""Seconds of a kernel, a micro-step and an update on a device: a roofline with launch costs.

Williams, Waterman and Patterson 2009: a kernel takes max(operations / rate, bytes / bandwidth).
On a CPU its launch (Python, autograd, dispatch) comes on top; a GPU works while the host launches,
so that many small kernels take the time of their launches. Rates are a calibration's or a
datasheet's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lbaccel.planning.cost.devices import FLOP_SHARE, Device
from lbaccel.planning.cost.trace import HOST_COPY, Kernel

MMAP_THRESHOLD = 32 * 2**20  # glibc takes larger blocks from the system each time (mallopt(3))
MANY = 16  # samples from which ATen gives a pointwise convolution to oneDNN in one thread
GPU_START = 2e-6  # of a kernel that the GPU has in its queue
HALF = (torch.bfloat16, torch.float16)
_NORMS = ("batch_norm", "layer_norm", "group_norm")


def kernel_class(kernel: Kernel) -> str:
    """The class whose rate a kernel has, such as "conv/fp32/channels_last".

    >>> kernel_class(Kernel("aten.mm", 2, 4, 0, torch.float32, False))
    'matmul/fp32'
    """
    dtype = "half" if kernel.dtype in HALF else "fp32"
    name = kernel.name.removeprefix("aten.")
    layout = "channels_last" if kernel.channels_last else "contiguous"
    if name.startswith("convolution"):
        kind = "depthwise" if kernel.depthwise else "pointwise" if kernel.pointwise else "conv"
        if kind == "pointwise" and dtype == "fp32" and kernel.num_samples < MANY:
            kind = "pointwise_few"
        return f"{kind}{'_backward' if name.endswith('backward') else ''}/{dtype}/{layout}"
    if kernel.flops:
        return f"matmul/{dtype}"
    if any(norm in name for norm in _NORMS):
        return f"norm{'_backward' if name.endswith('backward') else ''}/{dtype}/{layout}"
    return f"elementwise/{dtype}"


def kernel_seconds(kernel: Kernel, device: Device) -> float:
    """Seconds of one call's work, without its launch."""
    if kernel.num_bytes == 0:
        # Storage that kernels then write in place, but for the images, which are there already.
        return 0.0 if kernel.name == "aten.empty" else _page_faults(kernel, device)
    if kernel.name == HOST_COPY:  # on the stream of the kernels: nothing runs beside it
        return kernel.num_bytes / device.host_bandwidth
    name = kernel_class(kernel)
    found = device.rates.get(name) or device.rates.get(name.replace("_few", ""))
    moved = kernel.num_bytes / device.reached_bandwidth
    if found is None:
        half = kernel.dtype in HALF
        is_conv = kernel.name.startswith("aten.convolution")
        rate = device.flops["half" if half else "tf32" if is_conv else "fp32"] * FLOP_SHARE
        turns = 0.0
        tensor_cores = half or device.flops["tf32"] > device.flops["fp32"]
        if is_conv and tensor_cores and not (kernel.channels_last or kernel.depthwise):
            # Tensor cores take channels-last alone: cuDNN turns what it reads and writes.
            turns = 2 * (kernel.num_bytes - kernel.weight_bytes) / device.reached_bandwidth
        return max(kernel.flops / rate, moved) + turns
    work = (kernel.flops or kernel.num_bytes) / found
    if device.kind != "cpu":
        return max(work, moved) if kernel.flops else work
    if kernel.flops:
        cached = _cached_bandwidth(kernel, device)
        # Rates are those of large images; weights are turned for each call, whatever its samples.
        turns = 6 if kernel.name.endswith("backward") else 2
        work = max(work, kernel.num_bytes / cached) + turns * kernel.weight_bytes / cached
    return work + _page_faults(kernel, device)


def _page_faults(kernel: Kernel, device: Device) -> float:
    """A sum of two large tensors takes more than its traffic: the page faults of the new one."""
    if device.kind != "cpu" or kernel.new_bytes <= MMAP_THRESHOLD:
        return 0.0
    cached = _cached_bandwidth(kernel, device)
    return kernel.new_bytes * max(0.0, 3 / device.reached_bandwidth - 3 / cached)


def _cached_bandwidth(kernel: Kernel, device: Device) -> float:
    half = "half" if kernel.dtype in HALF else "fp32"
    return device.rates.get(f"elementwise/{half}", device.reached_bandwidth)


def seconds(kernels: Iterable[Kernel], device: Device) -> float:
    """Seconds of these calls, one after the other."""
    work, count = 0.0, 0
    for kernel in kernels:
        work += kernel_seconds(kernel, device)
        count += kernel.num_bytes > 0
    launches = count * device.launch_seconds
    return max(work + count * GPU_START, launches) if device.kind == "cuda" else work + launches
