"""Workspaces of kernels: they are freed before the call returns, and no Python tensor shows them.

On a CPU, ATen's own kernels follow rules that stand in its source (a kernel of mixed dtypes casts
first, a strided operand is copied); where the processor decides, the kernel is measured. See
docs/results/planner_memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lbaccel.planning.cost.kernel_calls import Unmeasured
from lbaccel.planning.cost.kernel_memory import (
    ASSUMED,
    assumed_workspace,
    is_chosen_by_processor,
    measured_workspace,
)
from lbaccel.planning.cost.later import Later, known
from lbaccel.planning.cost.processor import instruction_set

_ARITHMETIC = ("add", "sub", "mul", "div")  # a mask or an index among the operands is cast too
# For what neither the trace nor a few samples show: scalars (1 KiB at most was seen), and partial
# sums that oneDNN gives some small kernels on more samples than were measured (28 KiB).
MARGIN = 2**16  # bytes a thread


@dataclass(frozen=True, kw_only=True)
class Workspaces:
    """Where a plan's workspaces come from."""

    instruction_set: str
    num_threads: int
    source: str
    margin_gib: float  # in the predicted peak, for what was not measured

    def __str__(self) -> str:
        threads = f"{self.num_threads} thread" + "s" * (self.num_threads > 1)
        margin = f"margin {self.margin_gib * 2**10:.3g} MiB"
        return f"workspaces for {self.instruction_set}, {threads}: {self.source}; {margin}"


class CpuWorkspaces:
    """Bytes of `Workspace` for torch's CPU kernels, and how many calls it could not measure."""

    def __init__(self) -> None:
        self.num_assumed = 0  # in all traces

    @property
    def margin(self) -> int:
        """Bytes that a peak takes for what neither trace nor measurement shows."""
        return MARGIN * torch.get_num_threads()

    def summary(self) -> Workspaces:
        """The workspaces as a plan reports them."""
        source = (
            "kernels that the processor chooses measured on a few samples, others by ATen's rules"
        )
        if self.num_assumed:
            source += f", those that can't be measured at {ASSUMED} times their tensors"
            source += " and their weight again for each thread"
        threads = torch.get_num_threads()
        return Workspaces(
            instruction_set=instruction_set(),
            num_threads=threads,
            source=source,
            margin_gib=self.margin / 2**30,
        )

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """Bytes that the call takes inside and frees before it returns."""
        return known(self.later(name, args, kwargs, out))

    def later(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> int | Later:
        """The same, where what has to be measured is measured when it counts."""
        try:
            if is_chosen_by_processor(name, args):
                otherwise = assumed_workspace(name, args, out)
                return Later(partial(self._measured, name, _without_memory(args), otherwise))
        except Unmeasured:
            self.num_assumed += 1
            return assumed_workspace(name, args, out)
        rule = _CPU_RULES.get(name.removeprefix("aten."))
        if rule is not None:
            return rule(args, out)
        if isinstance(out, Tensor) and out.ndim > 0:
            return _casts(name.removeprefix("aten."), args, out)
        return 0

    def _measured(self, name: str, args: tuple[Any, ...], otherwise: int) -> int:
        try:
            return measured_workspace(name, args)
        except Unmeasured:
            self.num_assumed += 1
            return otherwise


def _without_memory(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, with tensors of the same sizes that keep no storage of a trace."""

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    with torch._C._DisableTorchDispatch():
        return tuple(like(value) for value in args)


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


def _columns(x: Tensor, weight: Tensor, stride: Any, padding: Any, grad: Tensor) -> int:
    """im2col's matrix [N, C kh kw, H' W'] of a convolution; a plain 1 x 1 one needs none."""
    one = math.prod(weight.shape[2:]) == 1 and all(n == 1 for n in stride) and not any(padding)
    return 0 if one else grad.shape[0] * grad.shape[2:].numel() * weight[0].numel() * x.itemsize


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    x, weight, _, stride, padding = args[:5]
    return _columns(x, weight, stride, padding, out)


def _convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    grad, x, weight, _, stride, padding = args[:6]
    return _columns(x, weight, stride, padding, grad)


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
