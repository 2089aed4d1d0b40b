"""Copies of the user's model and batch in float64 on the CPU, so that theirs stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from lbaccel.errors import InputError
from lbaccel.randomness.generators import generator_states, restore_generators
from lbaccel.update.reachable import Kept, reachable

CPU = torch.device("cpu")


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, with the gradient hooks of its parameters, without gradients.

    The modes of modules stay where the model is in training mode; else the copy is put there.

    Raises:
        InputError: the model can't be copied, or runs another object's forward.
    """
    wrapped = [name or "the model" for name, m in model.named_modules() if _is_prepared(m)]
    if wrapped:
        raise InputError(
            f"{wrapped[0]} was prepared by Accelerate, so a copy of it would run the original. "
            "Give verify() the model as it was before accelerator.prepare."
        )
    try:
        # Straight to the CPU: a copy on the user's device might not fit there.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(_double(p), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        memo |= {id(b): _double(b) for b in model.buffers()}
        plain = [place.tensor for place in reachable(model).places.values()]
        memo |= {
            id(t): _double(t)
            for t in plain
            if type(t) is Tensor and t.is_leaf and not t.requires_grad and id(t) not in memo
        }
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: "
            f"{_first_line(error)}), and verify() works on a copy. Give it a model that "
            "copy.deepcopy takes: its tensors parameters and buffers, no layer lazy any more."
        ) from error
    for original, twin_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        _copy_hooks(original, twin_parameter)  # which deepcopy leaves behind
    return twin if model.training else twin.train()


def _is_prepared(module: nn.Module) -> bool:
    return hasattr(module, "_original_forward")


def _double(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(CPU, dtype, copy=True)


def _copy_hooks(parameter: Any, twin: Any) -> None:
    for hook in (parameter._backward_hooks or {}).values():
        twin.register_hook(hook)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        twin.register_post_accumulate_grad_hook(hook)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def float64_batch(batch: Any) -> tuple[Any, int]:
    """The batch with its floating tensors in float64 on the CPU, and its number of samples.

    Raises:
        InputError: no tensor, or tensors of different lengths.
    """
    shapes = [tuple(t.shape) for t in tensors_in(batch) if t.ndim]
    lengths = {shape[0] for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        said = f"shapes {', '.join(map(str, shapes))}" if shapes else "no tensor with rows"
        raise InputError(
            f"batch has {said}: its tensors must have the samples in dimension 0, as many in "
            "each. Give the (images, labels) that your loss function takes, all samples in one."
        )
    return recursively_apply(_double, batch), lengths.pop()


def rows_of(batch: Any, start: int, stop: int) -> Any:
    """A copy of samples `start` to `stop` of every tensor in the batch; the rest as it is.

    A copy, since a loss function may work in place.
    """
    return recursively_apply(lambda t: (t[start:stop] if t.ndim else t).clone(), batch)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside, autograd is on, in float64; after it, generators and `model`'s gradients as before.

    A loss function that reaches for the user's own model, in place of its argument, may write
    gradients and buffers there.
    """
    states, dtype = generator_states(CPU), torch.get_default_dtype()
    gradients = [p.grad for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    try:
        for p in model.parameters():
            p.grad = None
        torch.set_default_dtype(torch.float64)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        restore_generators(states, CPU)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def loss_in_float64(loss_fn: Any) -> Iterator[Callable[[], None]]:
    """Inside, the loss function's own tensors are in float64 on the CPU; after it, as before.

    Yields:
        Puts them back to where they began, for the next update from the start.
    """
    found = reachable(None, loss_fn)
    own = {path: t for path, place in found.places.items() if (t := place.tensor) is not None}
    theirs = [
        (t, t.data, t.grad)
        for t in own.values()
        if type(t) in (Tensor, nn.Parameter) and t.is_leaf and not t.is_inference()
        if t.is_floating_point() and (t.dtype, t.device) != (torch.float64, CPU)
    ]
    for tensor, _, _ in theirs:
        tensor.grad = None
        tensor.data = _double(tensor)
    kept = Kept(found, [path for path, t in own.items() if not t.is_inference()])
    try:
        yield kept.put_back
    finally:
        kept.put_back()
        for tensor, data, gradient in theirs:
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")


def described(error: BaseException) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {_first_line(error)}"
