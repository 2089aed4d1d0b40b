"""Run a level of a tape: its calls, in order, on the values that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lbaccel.errors import InputError
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.global_norm.tape import Mode, Tape, TapedCall

Values = dict[int, Tensor]
Norm = Callable[[TapedCall, Tensor], Tensor]


def run(
    tape: Tape, level: int, values: Values, *, norm: Norm, randomness: KeyedRandomness, grad: bool
) -> None:
    """Run the calls of `level`; `values` loses what nothing reads any more, and gains the rest.

    Args:
        tape: of the micro-batch.
        level: to run.
        values: the frontier of the level.
        norm: the layer of a call on its input, by the statistics of all samples.
        randomness: within the scope of the micro-batch.
        grad: whether autograd listens.

    Raises:
        InputError: a tensor has another shape than it had when the tape was recorded.
    """
    for mode, calls in groupby(tape.levels[level], key=lambda call: call.mode):
        with as_recorded(mode, grad):
            for call in calls:
                _run(tape, call, values, norm, randomness)


def _run(
    tape: Tape, call: TapedCall, values: Values, norm: Norm, randomness: KeyedRandomness
) -> None:
    if call.layer is not None:
        out: Any = norm(call, values[call.inputs[0]])
        leaves: list[Any] = []
    else:
        args, kwargs, leaves = call.arguments(values)
        if any(tape.must_copy(call, call.leaves[place].index) for place, _ in call.writes):
            args, kwargs, leaves = _copied(tape, call, values)
        with drawing(call, randomness):
            out = call.function(*args, **kwargs)
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if len(made) != len(call.outputs):
        raise _changed(call, f"{len(made)} tensors, and {len(call.outputs)} before")
    for value, tensor in zip(call.outputs, made, strict=True):
        if tensor.shape != tape.metas[value].shape:
            raise _changed(call, f"{tuple(tensor.shape)}, and {tuple(tape.metas[value].shape)}")
        values[value] = tensor
    for place, value in call.writes:
        values[value] = leaves[place]
    for value in tape.frees.get(id(call), ()):
        values.pop(value, None)


def _copied(tape: Tape, call: TapedCall, values: Values) -> tuple[Any, Any, list[Any]]:
    """The arguments, with copies of the values that the call writes and that are read again."""
    written = {call.leaves[place].index for place, _ in call.writes}
    copies = {v: values[v].clone() for v in written if tape.must_copy(call, v)}
    return call.arguments({v: copies.get(v, values[v]) for v in call.inputs})


@contextmanager
def drawing(call: TapedCall, randomness: KeyedRandomness) -> Iterator[None]:
    """Around a call: it draws what it drew before."""
    if call.num_draws or call.seed >= 0:
        with randomness.again(call.draw, call.seed):
            yield
    else:
        yield


@contextmanager
def as_recorded(mode: Mode, grad: bool) -> Iterator[None]:
    """Autograd and autocast as they were; without `grad` autograd does not listen."""
    with ExitStack() as around:
        around.enter_context(torch.set_grad_enabled(grad and mode.grad))
        if torch.is_autocast_enabled(mode.device) != mode.autocast or (
            mode.autocast and torch.get_autocast_dtype(mode.device) != mode.dtype
        ):
            around.enter_context(
                torch.autocast(mode.device, dtype=mode.dtype, enabled=mode.autocast)
            )
        yield


def name_of(function: Any) -> str:
    """A torch function as the user knows it."""
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", str(function))


def _changed(call: TapedCall, how: str) -> InputError:
    return InputError(
        f"{name_of(call.function)} gave a tensor of {how} when its micro-batch was recorded: its "
        "shape depends on values of samples, so the passes of norm_batch_size='global' can't "
        "repeat it. Use norm_batch_size=32 or another number, or a loss function of fixed shapes."
    )
