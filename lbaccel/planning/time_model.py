"""Seconds of a kernel, a micro-step and an update on a device: a roofline with launch costs.

Williams, Waterman and Patterson 2009: a kernel takes max(operations / rate, bytes / bandwidth).
On a CPU its launch (Python, autograd, dispatch) comes on top; a GPU works while the host launches,
so that many small kernels take the time of their launches. Rates are a calibration's or a
datasheet's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lbaccel.planning.devices import FLOP_SHARE, Device
from lbaccel.planning.trace import Kernel

MMAP_THRESHOLD = 32 * 2**20  # glibc takes larger blocks from the system each time (mallopt(3))
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
        return f"{kind}{'_backward' if name.endswith('backward') else ''}/{dtype}/{layout}"
    if kernel.flops:
        return f"matmul/{dtype}"
    if any(norm in name for norm in _NORMS):
        return f"norm{'_backward' if name.endswith('backward') else ''}/{dtype}/{layout}"
    return f"elementwise/{dtype}"


def kernel_seconds(kernel: Kernel, device: Device) -> float:
    """Seconds of one call's work, without its launch."""
    if kernel.num_bytes == 0:
        return 0.0
    found = device.rates.get(kernel_class(kernel))
    moved = kernel.num_bytes / device.reached_bandwidth
    if found is None:
        half = kernel.dtype in HALF
        is_conv = kernel.name.startswith("aten.convolution")
        rate = device.flops["half" if half else "tf32" if is_conv else "fp32"] * FLOP_SHARE
        work = kernel.flops / rate
        if is_conv and not kernel.channels_last and device.kind == "cuda":
            moved *= 1.5  # cuDNN turns plain tensors and back (timm's RTX 3090 results: 1.3 to 1.5)
        return max(work, moved)
    work = (kernel.flops or kernel.num_bytes) / found
    if device.kind != "cpu":
        return max(work, moved) if kernel.flops else work
    half = "half" if kernel.dtype in HALF else "fp32"
    cached = device.rates.get(f"elementwise/{half}", device.reached_bandwidth)
    if kernel.flops:
        # Rates are those of large images; weights are turned for each call, whatever its samples.
        turns = 6 if kernel.name.endswith("backward") else 2
        work = max(work, kernel.num_bytes / cached) + turns * kernel.weight_bytes / cached
    if kernel.new_bytes > MMAP_THRESHOLD:
        # What a sum of two large tensors takes beyond its traffic is the new one's page faults.
        work += kernel.new_bytes * max(0.0, 3 / device.reached_bandwidth - 3 / cached)
    return work


def seconds(kernels: Iterable[Kernel], device: Device) -> float:
    """Seconds of these calls, one after the other."""
    work, count = 0.0, 0
    for kernel in kernels:
        work += kernel_seconds(kernel, device)
        count += kernel.num_bytes > 0
    launches = count * device.launch_seconds
    return max(work + count * GPU_START, launches) if device.kind == "cuda" else work + launches
