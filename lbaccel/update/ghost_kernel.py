"""Ghost batches of a micro-batch by torch's BatchNorm kernel, without a copy that joins them.

A micro-batch x [n, C, ...] of G ghost batches needs G calls of the kernel, on runs of its rows. The
ordinary route splits x, normalises each run, and joins the results in a new tensor with
`torch.cat`: two more passes over the output, and for a while a second output in memory. Here each
call writes into its run of one output. In the backward pass, no kernel of torch writes a gradient
to a given place. So each run's gradient is copied to its place as soon as it is there: this takes
the time of a join, but the memory of one run more, where a join takes that of all.

The kernel is `torch.native_batch_norm(..., out=...)`, which torch's CPU and CUDA have in all
versions: its functional form allocates what `out` names, and calls it (ATen's Normalization.cpp and
cuda/Normalization.cu). `_batch_norm_with_update.out` would take cuDNN's kernel where torch does.
But cuDNN's form puts a new tensor in the place of one of its outputs, and torch before pull request
174807 ("fix dangling references when kernels return a tuple of references") hands a call of
`torch.ops` that tensor when it is freed already. So the ordinary route stays where torch takes
cuDNN or MIOpen: on CUDA for float32 and float16 of three dimensions or more, not for bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import has_torch_function

Moments = tuple[Tensor | None, Tensor | None, float]
"""Buffers of mean and variance [C] that the kernel moves, or None, and the momentum."""

_C: Any = torch._C
_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_ROWS = (torch.contiguous_format,)
_LAYOUTS = {4: (*_ROWS, torch.channels_last), 5: (*_ROWS, torch.channels_last_3d)}


def normalise_runs(
    x: Tensor,
    sizes: Sequence[int],
    moments: Sequence[Moments],
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    device_type: str | None = None,
) -> Tensor:
    """Batch norm of each run of rows of `x` by its own statistics.

    y = (x - mean_g) / sqrt(var_g + eps) * weight + bias for the rows of run g, with mean and biased
    variance over all but the channels, and r <- (1 - m) r + m s_g for the buffers r of run g, by
    its mean and unbiased variance. Gradients of any order are torch's.

    Args:
        x: [n, C] or [n, C, ...], of a floating dtype.
        sizes: rows of each run; they add up to n.
        moments: of each run.
        weight: [C]; None: 1.
        bias: [C]; None: 0.
        eps: added to the variances.
        device_type: whose kernels are meant where `x` is the CPU's in their place (a planned
            update); default: the device of `x`.

    Returns:
        y, of the sizes, dtype and layout of `x`.

    >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
    >>> y = normalise_runs(x, (2, 2), [(None, None, 0.0)] * 2, weight=None, bias=None, eps=1e-5)
    >>> y.flatten().round(decimals=3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    if len(sizes) > 1 and _goes_in_place(x, weight, bias, moments, eps, device_type):
        return _Runs.apply(x, weight, bias, tuple(sizes), moments, eps)
    parts = (x,) if len(sizes) == 1 else x.split(list(sizes))
    outs = [
        F.batch_norm(part, mean, var, weight, bias, True, momentum, eps)
        for part, (mean, var, momentum) in zip(parts, moments, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Runs(torch.autograd.Function):
    """The runs of `normalise_runs`, each written to its place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sizes: tuple[int, ...],
        moments: Sequence[Moments],
        eps: float,
    ) -> Tensor:
        y = torch.empty_like(x)
        known = _dtypes(weight, bias, *moments[0][:2])
        # The kernel's own mean and 1 / sqrt(var + eps) of each run, which its backward pass reads.
        saved = x.new_empty(2, len(sizes), x.shape[1], dtype=known.pop())
        runs = zip(x.split(sizes), y.split(sizes), *saved, moments, strict=True)
        for part, out, kept_mean, kept_invstd, (mean, var, momentum) in runs:
            torch.native_batch_norm(
                part,
                weight,
                bias,
                mean,
                var,
                True,
                momentum,
                eps,
                out=(out, kept_mean, kept_invstd),
            )
        # A leaf that a `Function` saves under hooks of saved tensors (checkpointing, offload) loses
        # its own hooks in torch 2.6 and 2.7. So an alias is saved, and the leaf held beside it.
        ctx.leaves = [t if _is_leaf(t) else None for t in (x, weight)]
        kept = [t.detach() if t is not None and _is_leaf(t) else t for t in (x, weight)]
        ctx.save_for_backward(*kept, saved)
        ctx.sizes, ctx.eps = sizes, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        # With `create_graph` these calls are differentiated in turn: then results are joined.
        joins = torch.is_grad_enabled()
        if joins:
            pairs = zip(ctx.leaves, (x, weight), strict=True)
            x, weight = (kept if leaf is None else leaf for leaf, kept in pairs)
        of_x = None  # made of `grad`, which may be a batch of gradients
        if wanted[0] and not joins:
            of_x = grad.new_empty_strided(x.shape, x.stride())
        places = [None] * len(ctx.sizes) if of_x is None else of_x.split(ctx.sizes)
        found: list[list[Any]] = []
        for upstream, part, mean, invstd, place in zip(
            grad.split(ctx.sizes), x.split(ctx.sizes), *saved, places, strict=True
        ):
            run = torch.ops.aten.native_batch_norm_backward(
                upstream, part, weight, None, None, mean, invstd, True, ctx.eps, wanted
            )
            found.append(list(run))
            if place is not None:
                place.copy_(run[0])
                found[-1][0] = None  # its memory is for the next run
            del run
        parts, *of_weights = zip(*found, strict=True)
        if joins and wanted[0]:
            of_x = torch.cat(parts)
        sums = [
            reduce(torch.add, each) if wants else None
            for each, wants in zip(of_weights, wanted[1:], strict=True)
        ]
        return (of_x, *sums, None, None, None)


def _goes_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Sequence[Moments],
    eps: float,
    device_type: str | None,
) -> bool:
    """Whether `_Runs` gives what the ordinary route does: the one rule of this module."""
    if torch.compiler.is_compiling():  # the compiler joins kernels itself
        return False
    mean, var, _ = moments[0]
    tensors = [t for t in (x, weight, bias, mean, var) if t is not None]
    if any(type(t) not in _PLAIN for t in tensors) or has_torch_function(tensors):
        return False
    if _C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # vmap, grad and jvp of a `Function` need rules of its own
    # Of any other layout, ATen's kernel for a CPU wants the mean in `out`, and `y` may be turned.
    if not any(x.is_contiguous(memory_format=layout) for layout in _LAYOUTS.get(x.ndim, _ROWS)):
        return False
    kinds = _dtypes(weight, bias, mean, var)
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        return False
    if x.dtype not in kinds and not (x.dtype in _HALF and kinds == {torch.float32}):
        return False
    device = device_type or x.device.type
    return device == "cpu" or (device == "cuda" and _is_torchs_own(x, weight, bias, eps))


def _is_leaf(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and tensor.is_leaf


def _dtypes(*tensors: Tensor | None) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t is not None}


def _is_torchs_own(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    """Whether torch takes its own kernel for `x` on CUDA, and neither cuDNN's nor MIOpen's."""
    if weight is None or bias is None:
        return True
    if x.device.type != "cuda":  # planned for a device that may not be here
        return x.dtype is torch.bfloat16 or x.ndim < 3
    if not hasattr(_C, "_select_batch_norm_backend"):
        return False
    backend = _C._select_batch_norm_backend(x, weight, bias, weight, weight, True, eps)
    return backend == _C._BatchNormBackend.Native
