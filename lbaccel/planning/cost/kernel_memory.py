"""The memory that a kernel of this processor takes inside, learned from it on a few samples.

oneDNN and ATen choose a convolution's algorithm by instruction set, number of threads, shape and
layout, and each algorithm has buffers of its own: a Winograd gradient of 512 x 512 weights takes
36 MiB a thread, a plain copy none. No table of rules follows that, and torch gives no query for it.
But the allocations of one algorithm come in one order, and each is affine in the samples n:

    bytes_i(n) = bytes_i(p) + (n - p) (bytes_i(p + 1) - bytes_i(p))

so two calls, on p and p + 1 samples, give the list for any n > p (docs/results/planner_memory.md
has how exactly). With several threads a third call, on more samples, looks for the partial sums
that oneDNN adds there. No call is larger than the kernel that is planned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lbaccel.planning.cost.kernel_calls import (
    Form,
    Unmeasured,
    backend,
    kernel_allocations,
    resized,
)
from lbaccel.planning.cost.time_model import MANY

FEW = 2  # samples of the smaller call; ATen has kernels of its own for a single one
PIXELS = 256  # of an image in a 1 x 1 convolution on so many: with more, no buffer was seen to grow
ROWS = 1024  # of a matrix in a call: a guess at oneDNN's largest block
A_THREAD = 4  # samples a thread of the third call
ASSUMED = 4  # times a kernel's tensors, and its weight again for each thread

_aten = torch.ops.aten
_CONVOLUTIONS = {
    "aten.convolution": _aten.convolution.default,
    "aten.convolution_backward": _aten.convolution_backward.default,
}
_PRODUCTS = {
    "aten.mm": _aten.mm.default,
    "aten.addmm": _aten.addmm.default,
    "aten.bmm": _aten.bmm.default,
    "aten.baddbmm": _aten.baddbmm.default,
}
_ATTENTION = {
    f"aten.{packet.__name__}": packet.default
    for packet in (
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
}


def is_chosen_by_processor(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the kernel's workspace is to be learned here, not read off ATen's source.

    Matrix products in bf16 are oneDNN's where the processor has instructions for them; elsewhere,
    and in float32, dense ones take nothing of torch's allocator.

    Raises:
        Unmeasured: ATen does not say which implementation it takes.
    """
    if name in _CONVOLUTIONS:
        return not is_matrix_product(name, args)
    if name in _ATTENTION:
        return True
    return name in _PRODUCTS and args[0].dtype == torch.bfloat16 and _has_bf16_products()


def measured_workspace(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that the kernel takes inside and frees again, beyond its results.

    Args:
        name: of the kernel, such as "aten.convolution".
        args: of the call; tensors may be fake.

    Raises:
        Unmeasured: the kernel can't be called here: no such kernel, no memory, or a profiler that
            runs already.
    """
    if name in _CONVOLUTIONS:
        return _of_convolution(name, args)
    return _of_attention(name, args) if name in _ATTENTION else _of_product(name, args)


def _inside(taken: Sequence[int]) -> int:
    """Most bytes live at a time, beyond those that are left at the end: the results."""
    return max(accumulate(taken), default=0) - sum(taken)


def assumed_workspace(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Bytes that stand for a workspace which nobody knows.

    More than nearly all that were measured, but no bound: the backward pass of a depthwise 7 x 7
    convolution of 768 channels on 7 x 7 pixels takes more at 1 to 16 samples.
    """
    results = out if isinstance(out, (tuple, list)) else (out,)
    known = sum(_bytes(t) for t in (*args, *results) if isinstance(t, Tensor))
    weight = _bytes(_parts(name, args)[1]) if name in _CONVOLUTIONS else 0
    return ASSUMED * (known + torch.get_num_threads() * weight)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def is_matrix_product(name: str, args: tuple[Any, ...]) -> bool:
    """Whether ATen itself runs this convolution, of one group, as a product of im2col's columns."""
    x, *how = _parts(name, args)
    wants_bias = name.endswith("_backward") and args[10][2]  # whose sum has buffers of its own
    if x.ndim != 4 or how[-1] != 1 or wants_bias:
        return False
    if not _are_in_one_layout(args[0], x, how[0]):  # else ATen copies some of them
        return False
    return backend(resized(x, {0: min(x.shape[0], MANY)}), how).name == "Slow2d"


def _of_convolution(name: str, args: tuple[Any, ...]) -> int:
    op = _CONVOLUTIONS[name]
    x, *how = _parts(name, args)
    if name.endswith("_backward") and _writes_past_its_buffers(x, how):
        raise Unmeasured("oneDNN's gradient of strided 1 x 1 weights writes past its buffers")
    num_samples, with_samples = x.shape[0], 2 if name.endswith("_backward") else 1

    def call(samples: int, height: int | None = None) -> Sequence[int]:
        sizes = {0: samples} if height is None else {0: samples, 2: height}
        few = [resized(t, sizes) for t in args[:with_samples]]
        return kernel_allocations(op, (*few, *args[with_samples:]))

    first = FEW
    if num_samples >= MANY and _changes_at_many(x, how):
        first = MANY
        few_rows = -(-PIXELS // math.prod(x.shape[3:]))
        if _is_pointwise(how) and few_rows + 1 < x.shape[2]:
            here, there = call(first, few_rows), call(first, few_rows + 1)
            distance = num_samples * x.shape[2] - first * few_rows
            if _go_on(here, there):
                return _inside(_extrapolated(here, there, distance, first))
    if num_samples <= first + 1:
        return _inside(call(num_samples))
    here, there = call(first), call(first + 1)
    found = _inside_at(num_samples, here, there, first)
    third = min(num_samples, A_THREAD * torch.get_num_threads())
    if torch.get_num_threads() > 1 and third > first + 1:
        missed = _inside(call(third)) - _inside_at(third, here, there, first)
        found += max(0, missed) * num_samples // third
    return found


def _inside_at(samples: int, here: Sequence[int], there: Sequence[int], first: int) -> int:
    """Workspace on `samples`, from the allocations on `first` and on one more."""
    if _go_on(here, there):
        return _inside(_extrapolated(here, there, samples - first, 1))
    # Another algorithm: as if each buffer grew with the samples.
    return samples * max(-(-_inside(here) // first), -(-_inside(there) // (first + 1)))


def _parts(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Input, weight, stride, padding, dilation, transposed, output_padding, groups."""
    backward = name.endswith("_backward")
    return (*args[1:3], *args[4:10]) if backward else (*args[:2], *args[3:9])


def _writes_past_its_buffers(x: Tensor, how: Sequence[Any]) -> bool:
    """Whether a call may end the process.

    oneDNN 3.13.3 (torch 2.15, AVX2) corrupts the heap in the weights' gradient of a channels-last
    1 x 1 convolution with a stride and fewer than 8 input channels (a vector), such as in the stems
    of mobileone and repvgg. A vector of AVX-512 has 16. May go when oneDNN's gradient is mended.
    """
    weight, stride, *_ = how
    is_turned = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    one, few = weight.shape[2:].numel() == 1, weight.shape[1] < 16
    return x.ndim == 4 and is_turned and one and few and how[-1] == 1 and any(n > 1 for n in stride)


def _changes_at_many(x: Tensor, how: Sequence[Any]) -> bool:
    return backend(resized(x, {0: FEW}), how) != backend(resized(x, {0: MANY}), how)


def _is_pointwise(how: Sequence[Any]) -> bool:
    weight, stride, padding, dilation, *_ = how
    plain = all(n == 1 for n in (*weight.shape[2:], *stride, *dilation))
    return weight.ndim == 4 and plain and not any(padding)


def _are_in_one_layout(*tensors: Tensor) -> bool:
    layouts = torch.contiguous_format, torch.channels_last
    return any(all(t.is_contiguous(memory_format=layout) for t in tensors) for layout in layouts)


def _of_attention(name: str, args: tuple[Any, ...]) -> int:
    def call(samples: int) -> Sequence[int]:
        few = [resized(a, {0: samples}) if isinstance(a, Tensor) else a for a in args]
        return kernel_allocations(_ATTENTION[name], tuple(few))

    num_samples = args[0].shape[0]
    if num_samples <= FEW + 1:
        return _inside(call(num_samples))
    here, there = call(FEW), call(FEW + 1)
    if not _go_on(here, there):  # with AVX512_BF16 each sample has buffers that come and go
        first, second, third = _inside(here), _inside(there), _inside(call(FEW + 2))
        if third - second == second - first:
            return first + (num_samples - FEW) * (second - first)
    return _inside_at(num_samples, here, there, FEW)


def _of_product(name: str, args: tuple[Any, ...]) -> int:
    def cut(t: Tensor) -> Form:
        return resized(t, {i: ROWS for i, n in enumerate(t.shape) if n > ROWS})

    few = [cut(t) if isinstance(t, Tensor) else t for t in args]
    return _inside(kernel_allocations(_PRODUCTS[name], tuple(few)))


@lru_cache(maxsize=1)
def _has_bf16_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _go_on(here: Sequence[int], there: Sequence[int]) -> bool:
    """Whether both calls ran one algorithm."""
    return [n > 0 for n in here] == [n > 0 for n in there]


def _extrapolated(
    here: Sequence[int], there: Sequence[int], distance: int, step: int
) -> Sequence[int]:
    """The allocations `distance` from the first call, where the second is `step` from it.

    A buffer that shrinks, such as one that two threads share when the samples are even, stays as
    large as it was.
    """
    return [
        a + (b - a) * distance // step if abs(b) > abs(a) else a
        for a, b in zip(here, there, strict=True)
    ]
