"""The recording of a forward: a torch function mode that knows the values of its micro-batch.

`TapeRecorder` records a forward that runs for real, `TapeFollower` one that follows a tape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten

from lbaccel.errors import InputError
from lbaccel.randomness.draws import REPLACED
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.global_norm.handles import Handles
from lbaccel.update.global_norm.replay import name_of
from lbaccel.update.global_norm.tape import Meta, Tape, Value

_TENSOR_READS = (
    *("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
    *("__array__", "__contains__", "equal", "allclose", "is_nonzero"),
)
READS = {getattr(Tensor, name) for name in _TENSOR_READS}
READS |= {torch.equal, torch.allclose, torch.is_nonzero}
_HOOKS = ("register_hook", "retain_grad", "backward", "requires_grad_", "set_")
HOOKS = {getattr(Tensor, name) for name in _HOOKS}


@contextmanager
def shown_draws() -> Iterator[None]:
    """Inside, a function that draws keyed masks is a torch function: one call of a tape."""
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in REPLACED]
    try:
        for owner, name, function in plain:
            setattr(owner, name, _shown(function))
        yield
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(function, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call


class Recording(TorchFunctionMode, ABC):
    """Records on `tape` what runs inside it.

    Args:
        stand_ins: what takes the place of each tensor of the micro-batch.
        metas: of those tensors, or of all values of a tape that is followed.
        device: where the network runs.
        randomness: whose masks are drawn.
    """

    def __init__(
        self,
        stand_ins: list[Tensor],
        metas: list[Meta],
        *,
        device: torch.device,
        randomness: KeyedRandomness,
    ) -> None:
        super().__init__()
        self.device, self.randomness = device, randomness
        self.levels = [0] * len(stand_ins)  # of each value
        self.tape = Tape(len(stand_ins), metas)
        self.handles = Handles()
        self.stand_ins = stand_ins
        for value, x in enumerate(stand_ins):
            self.handles.name(x, value)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        found = tuple(self.handles.encoded(x) for x in leaves)
        read = [x.index for x in found if isinstance(x, Value)]
        if read:
            self._check(func, leaves, read)
        return self.run(func, leaves, spec, found)

    @abstractmethod
    def run(self, func: Any, leaves: list[Any], spec: Any, found: tuple[Any, ...]) -> Any:
        """The result of a call, which is now on the tape; its arguments are flat, and encoded."""

    def finish(self, out: Any) -> Tape:
        """The tape of the forward, whose loss function returned `out`."""
        leaves, spec = tree_flatten(out)
        for x in leaves:
            check_graph(x)
        self.tape.result = tuple(self.handles.encoded(x) for x in leaves), spec
        return self.tape

    def new(self, x: Tensor, level: int) -> int:
        """The number of a value that lies at `x` and that no tape has yet."""
        value = len(self.tape.metas)
        self.tape.metas.append(Meta.of(x))
        self.add(value, level)
        self.handles.name(x, value)
        return value

    def add(self, value: int, level: int) -> None:
        """A value is known, and its level."""
        self.levels.extend([level] * (value + 1 - len(self.levels)))
        self.levels[value] = level

    def _check(self, func: Any, leaves: list[Any], read: list[int]) -> None:
        if func in HOOKS:
            raise refused(func, "the passes can't repeat it")
        if func in READS and any(self.levels[v] > 0 for v in read):
            raise refused(
                func,
                "reads a number of what comes after BatchNorm, which is not known at that time",
            )
        if any(self.handles.is_stale(x) for x in leaves):
            raise refused(
                func, "reads a tensor whose memory was written in place through another view of it"
            )


def check_graph(x: Any) -> None:
    """Stop at a Function of the user's own: its backward is on no tape.

    Raises:
        InputError: its name.
    """
    todo = [x.grad_fn] if isinstance(x, Tensor) else []
    met: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise refused(type(node), "is a backward of an autograd.Function, which no pass knows")
        todo += [before for before, _ in node.next_functions]


def refused(func: Any, why: str) -> InputError:
    """The error that names what the passes can't repeat."""
    return InputError(
        f"norm_batch_size='global' can't repeat this forward: {name_of(func)} {why}. Leave it out "
        "of the loss function, or take a number in the place of 'global'."
    )
