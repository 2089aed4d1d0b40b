"""What kernels allocate inside and free before they return, which no tensor in Python shows.

The rules for CPUs are ATen's and oneDNN's (3.x, AVX-512): a convolution copies plain tensors into
blocked layouts and back, a kernel of mixed dtypes casts first. They were read off the allocator's
own events on one half of the model families and checked on the other: see
docs/results/planner_memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 16  # channels of oneDNN's blocked layouts (nChw16c) with AVX-512
_ARITHMETIC = ("add", "sub", "mul", "div")  # a mask or an index among the operands is cast too
# oneDNN's own buffers for one call: transposed rows, partial sums of a weight's gradient.
SCRATCHPAD_BF16 = 384 * 2**10


def cpu_workspace(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of `Workspace` for torch's CPU kernels."""
    rule = _CPU_RULES.get(name.removeprefix("aten."))
    if rule is not None:
        return rule(args, out)
    if isinstance(out, Tensor) and out.ndim > 0:
        return _casts(name.removeprefix("aten."), args, out)
    return 0


def _casts(name: str, args: tuple[Any, ...], out: Tensor) -> int:
    """TensorIterator copies operands that are not of the common dtype (scalars are free)."""
    operands = [t for t in args if isinstance(t, Tensor) and t.ndim > 0]
    if name.rstrip("_") not in _ARITHMETIC:
        operands = [t for t in operands if t.is_floating_point()]
    if len(operands) < 2 or not out.is_floating_point():
        return 0
    floats = [t.dtype for t in operands if t.is_floating_point()] or [out.dtype]
    common = max(floats, key=lambda dtype: dtype.itemsize)
    cast = [t.numel() * common.itemsize for t in operands if t.dtype != common]
    result = out.numel() * common.itemsize if out.dtype != common else 0
    return sum(cast) + result


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _padded(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def _blocked(x: Tensor) -> int:
    """Bytes of an activation [N, C, H, W] whose channels are padded to whole blocks."""
    channels = x.shape[1]
    return x.nbytes // channels * (_padded(channels) if channels >= BLOCK else channels)


def _blocked_weight(weight: Tensor, groups: int) -> int:
    """Bytes of a weight [O, I / g, kh, kw] whose groups are padded to whole blocks one by one."""
    per_group = weight.shape[0] // groups
    scale = _padded(per_group) * _padded(weight.shape[1]) / (per_group * weight.shape[1])
    return int(weight.nbytes * scale)


def _uses_onednn(x: Tensor, weight: Tensor, stride: Any, groups: int) -> bool:
    """Plain 1x1 convolutions in float32 are matrix products on the tensors as they are.

    In one thread and below 16 samples, that is (ATen's ConvParams::use_mkldnn).
    """
    if x.dtype != torch.float32 or x.shape[0] >= 16 or torch.get_num_threads() > 1:
        return True
    is_pointwise = math.prod(weight.shape[2:]) == 1 and all(s == 1 for s in stride)
    return not (is_pointwise and groups == 1)


def _pixels_weight(x: Tensor, weight: Tensor) -> int:
    """Images of one pixel, 16 or more, are a matrix product on a copy of the weight."""
    return weight.nbytes if x.shape[0] >= BLOCK and x.shape[2:].numel() == 1 else 0


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    x, weight, _, stride = args[:4]
    if x.ndim != 4:
        return 0
    if not _uses_onednn(x, weight, stride, args[8]):
        return _pixels_weight(x, weight)
    if _is_nhwc(x) or _is_nhwc(out):
        return weight.nbytes
    result = _blocked(out)
    inside = _blocked(x) + weight.nbytes + result
    return max(inside, result + out.nbytes) - out.nbytes


def _convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    grad, x, weight, _, stride = args[:5]
    groups = args[9]
    if x.ndim != 4:
        return 0
    if not _uses_onednn(x, weight, stride, groups):
        return _pixels_weight(x, weight)
    grad_x, grad_weight = out[0], out[1]
    made = sum(t.nbytes for t in (grad_x, grad_weight) if t is not None)
    kept = grad_x.nbytes if grad_x is not None else 0
    low = x.dtype != torch.float32
    depthwise = groups == x.shape[1] and groups > 1
    # Weights are summed in float32, and given back in the dtype of the input.
    sums = weight.nbytes * (2 if low else 1)
    scratch = SCRATCHPAD_BF16 if low else 0
    # An image of one pixel lies in both layouts, and the channels-last one is taken.
    one_pixel = math.prod(grad.shape[2:]) == 1 and math.prod(x.shape[2:]) > 1
    if _is_nhwc(x) or _is_nhwc(grad) or one_pixel:
        if groups > 1:
            large = not depthwise or math.prod(weight.shape[2:]) > 9
            blocked = _blocked_weight(weight, groups) if large else weight.nbytes
            if low and depthwise and large:
                return 3 * blocked + 2 * (x.nbytes + grad.nbytes) + scratch
            return blocked * (2 if low else 1) + weight.nbytes + scratch
        return kept + 3 * weight.nbytes - made + scratch
    data = _blocked(grad) + weight.nbytes + _blocked(x)
    back = _blocked(x) * (2 if low and depthwise else 1) + x.nbytes
    if math.prod(weight.shape[2:]) == 1 and groups == 1:
        back = 3 * _blocked(x)  # strided: through one more copy
    elif not depthwise:
        back += _blocked(grad)
    weights = kept + _blocked(x) + _blocked(grad) + sums + (weight.nbytes if low else 0)
    steps = (data, back) if grad_x is not None else ()
    return max(*steps, weights, kept + 2 * weight.nbytes) - made + scratch


def _copy_of_strided(args: tuple[Any, ...], out: Any) -> int:
    return args[0].nbytes if not args[0].is_contiguous() else 0


def _copies_of_strided(args: tuple[Any, ...], out: Any) -> int:
    return sum(t.nbytes for t in args[:2] if not t.is_contiguous())


def _roll(args: tuple[Any, ...], out: Tensor) -> int:
    return out.nbytes if len(args[1]) > 1 else 0


def _sum_in_float(args: tuple[Any, ...], out: Tensor) -> int:
    return args[0].numel() * 4 if args[0].dtype in (torch.bfloat16, torch.float16) else 0


def _cat(args: tuple[Any, ...], out: Tensor) -> int:
    return sum(t.numel() * out.element_size() for t in args[0] if t.dtype != out.dtype)


_CPU_RULES: dict[str, Callable[[Any, Any], int]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm_backward": lambda args, out: args[1].nbytes,
    "native_layer_norm": _copy_of_strided,
    "native_layer_norm_backward": _copies_of_strided,
    "roll": _roll,
    "mean": _sum_in_float,
    "cat": _cat,
}


def cuda_workspace(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of `Workspace` for CUDA's kernels: an estimate that no device has confirmed yet.

    cuDNN's convolutions on tensor cores turn plain half-precision tensors into channels-last ones
    and back; a kernel of mixed dtypes casts in registers and takes nothing.
    """
    if not name.startswith("aten.convolution"):
        return 0
    backward = name.endswith("_backward")
    tensors = [t for t in (args[:3] if backward else (*args[:2], out)) if isinstance(t, Tensor)]
    if tensors[0].dtype == torch.float32 or any(_is_nhwc(t) for t in tensors):
        return 0
    return sum(t.nbytes for t in tensors)
