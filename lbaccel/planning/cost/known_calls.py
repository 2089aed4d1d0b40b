"""Calls of kernels on fake tensors, worked out once for each set of sizes.

torch works a call on fake tensors out in Python: even its own cache of results takes 0.1 ms a call,
and a kernel that it decomposes takes 5 ms. An update calls the same kernels on the same sizes again
and again: in blocks that repeat, in ghost batches, in micro-steps, in every trace of a plan. Here
torch works a call out once, and its results are described: new storage of such sizes, a view of an
argument, or an argument itself. A later call on the same sizes gets results by that description.

The results of a call on fake tensors depend on nothing else, since no values are there; where a
kernel needs values, torch raises, and an error is not kept. What is not surely so is left to torch:
kernels that change the sizes of an argument, tensors of which torch knows the value, and those that
are no plain tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

_META, _CPU = torch.device("meta"), torch.device("cpu")
_VALUES = frozenset(
    (*(int, float, bool, str, type(None)),
     *(torch.dtype, torch.device, torch.layout, torch.memory_format))
)  # fmt: skip


class _Unsure(Exception):
    """torch has to work the call out."""


@dataclass(frozen=True)
class _Result:
    """One result of a call: new storage, a view of an argument, or (without sizes) an argument."""

    argument: int | None  # place among the tensors of the call; None: the storage is new
    sizes: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None

    def build(self, mode: KnownCallsMode, tensors: Sequence[FakeTensor]) -> FakeTensor:
        """The result of a call on `tensors`."""
        if self.argument is None:
            assert self.sizes is not None
            return mode.fake(_empty(self.sizes, self.strides, self.dtype))
        argument = tensors[self.argument]
        if self.sizes is None:
            return argument
        view = _empty((), (), self.dtype)
        with torch._C._DisableTorchDispatch():
            view.set_(argument.untyped_storage(), self.offset, self.sizes, self.strides)
        return mode.fake(view)


@dataclass(frozen=True, eq=False)
class _Results:
    """All results of a call: one, or a sequence; None stands for itself. Compared by identity."""

    sequence: type | None  # tuple or list; None: one result
    parts: tuple[_Result | None, ...]


class _Function:
    """A function of torch; as a part of a key it is hashed faster than torch's own object."""

    __slots__ = ("at_offset", "func", "sure")

    def __init__(self, func: Any) -> None:
        self.func = func
        self.sure = _sizes_decide(func)  # whether sizes decide what it gives
        self.at_offset = False  # whether it gave a view: offsets count for it

    def __str__(self) -> str:
        return str(self.func)


class KnownCall:
    """A call of which `key` holds all that its results and its costs depend on."""

    __slots__ = ("_found", "_known", "key", "mode", "tensors")

    def __init__(
        self, known: KnownCalls, mode: KnownCallsMode, key: tuple[Any, ...], tensors: list[Any]
    ) -> None:
        self._known, self.mode, self.key, self.tensors = known, mode, key, tensors
        self._found = known.results.get(key)

    def results(self) -> Any:
        """New results; `NotImplemented` where no such call was known when this one came."""
        found = self._found
        if found is None:
            return NotImplemented
        built = [
            None if part is None else part.build(self.mode, self.tensors) for part in found.parts
        ]
        return built[0] if found.sequence is None else found.sequence(built)

    def cost(self, variant: Any, count: Callable[[], Any]) -> Any:
        """The cost of such a call and `variant`; `count` gives it where it is not known."""
        found = self._found or self._known.results.get(self.key)
        if found is None:
            return count()
        costs, key = self._known.costs, (found, variant)
        cost = costs.get(key)
        if cost is None:
            cost = costs[key] = count()
        return cost


class KnownCalls:
    """The results of calls, by sizes, and their costs, which are for the caller to count.

    Any traces may share the results, and those with one `Workspace` the costs.
    """

    def __init__(self) -> None:
        self.results: dict[tuple[Any, ...], _Results] = {}
        self.costs: dict[Any, Any] = {}
        self._functions: dict[int, _Function] = {}  # by address; each holds its function

    def for_another_workspace(self) -> KnownCalls:
        """These without the costs; the results stay shared."""
        other = KnownCalls()
        other.results, other._functions = self.results, self._functions
        return other

    def call(self, mode: KnownCallsMode, func: Any, args: Any, kwargs: Any) -> KnownCall | None:
        """The call of `func` in `mode`, or None where torch has to work it out."""
        function = self._functions.get(id(func))
        if function is None:
            function = self._functions[id(func)] = _Function(func)
        if not function.sure or torch.is_inference_mode_enabled():
            return None
        key: list[Any] = [function, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        try:
            _add(key, tensors, args, mode)
            for name, value in kwargs.items():
                key.append(name)
                _add(key, tensors, (value,), mode)
        except _Unsure:
            return None
        if function.at_offset:
            key += [t.storage_offset() for t in tensors]
        return KnownCall(self, mode, tuple(key), tensors)

    def remember(self, call: KnownCall, out: Any) -> None:
        """Keep what torch gave for a call, where it can be described."""
        sequence = next((kind for kind in (tuple, list) if isinstance(out, kind)), None)
        outs: Sequence[Any] = (out,) if sequence is None else out
        try:
            parts = tuple(None if t is None else _described(t, call) for t in outs)
        except _Unsure:
            return
        known = [part for part in parts if part is not None]
        new = [t for t, p in zip(outs, parts, strict=True) if p is not None and p.argument is None]
        if len({t.untyped_storage()._cdata for t in new}) < len(new):
            return  # two results share a storage
        function = call.key[0]
        if not function.at_offset and any(
            p.sizes is not None and p.argument is not None for p in known
        ):
            function.at_offset = True  # this call's key lacks the offsets
            return
        self.results[call.key] = _Results(sequence, parts)


class KnownCallsMode(FakeTensorMode):
    """torch's mode of fake tensors, in which a call is worked out once.

    Args:
        known: calls of other modes, and from now on those of this one.
        options: of torch's mode.
    """

    def __init__(self, known: KnownCalls, **options: Any) -> None:
        super().__init__(**options)
        self.known = known
        with torch.inference_mode(False):
            plain = FakeTensor(self, _empty((), ()), _CPU)
        self._attributes = {name: of for name, of in vars(plain).items() if name != "fake_mode"}
        self.plain_keys = _dispatch_keys(plain)

    def fake(self, meta: Tensor) -> FakeTensor:
        """`FakeTensor(self, meta, "cpu")` in half of its time: with the attributes of another."""
        fake = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes, fake_mode=self)
        return fake

    def is_plain(self, tensor: FakeTensor) -> bool:
        """Whether it is a dense one of the CPU: not sparse, conjugated, or of inference mode."""
        return _dispatch_keys(tensor) == self.plain_keys

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The results of a call, of one inside of torch's own functions too."""
        call = self.known.call(self, func, args, kwargs or {})
        out = NotImplemented if call is None else call.results()
        if out is NotImplemented:
            if call is not None and _is_one_view(func):
                out = self._view(func, args, kwargs or {})
            else:
                out = super().dispatch(func, types, args, kwargs or {})
            if call is not None:
                self._remember(call, out, args, kwargs or {})
        return out

    def _remember(self, call: KnownCall, out: Any, args: Any, kwargs: Any) -> None:
        """Keep a call, unless it changed the sizes of an argument (an `out` that did not fit)."""
        now = self.known.call(self, call.key[0].func, args, kwargs)
        if now is not None and now.key == call.key:
            self.known.remember(call, out)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view by ATen's own function, which knows sizes alone; torch's way around takes 1 ms."""
        with in_kernel_invocation_manager(self):
            out = func(*args, **kwargs)
        return self.fake(out) if isinstance(out, Tensor) else [self.fake(t) for t in out]


def fake_tensors(
    known: KnownCalls | None = None, *, allow_non_fake_inputs: bool = False
) -> KnownCallsMode:
    """A mode in which tensors hold no memory, and after which this process may still fork.

    `known` are calls of other traces; by default there are none.

    torch's autograd counts the devices at its first backward pass and starts a thread for each, and
    no child forked later may run a backward pass. FakeTensorMode registers a stand-in for a GPU,
    which would be counted. So a backward pass comes first.
    """
    with torch.inference_mode(False):
        torch.ones((), device="cpu", requires_grad=True).backward()
    known = KnownCalls() if known is None else known
    return KnownCallsMode(known, allow_non_fake_inputs=allow_non_fake_inputs)


def running_mode() -> KnownCallsMode | None:
    """The mode that runs, if any; inside of its own dispatch it does not."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode if isinstance(mode, KnownCallsMode) else None


def fake_like(t: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`torch.empty_like(t, device="cpu")` in the mode that runs, where `t` is no fake tensor."""
    mode = running_mode()
    if mode is None or type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided:
        return torch.empty_like(t, device="cpu", memory_format=memory_format)
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_like(t, device=_META, memory_format=memory_format, requires_grad=False)
    return mode.fake(meta)


def _is_one_view(func: Any) -> bool:
    """Whether it makes views and nothing else: no composite, such as `to`, which may copy."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.is_view and not torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), composite
    )


def _dispatch_keys(tensor: Tensor) -> int:
    """As a number: torch before 2.7 compares the sets themselves by identity."""
    return torch._C._dispatch_keys(tensor).raw_repr()


def _sizes_decide(func: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace == "aten"
        and torch.Tag.inplace_view not in func.tags
    )


def _add(
    key: list[Any], tensors: list[FakeTensor], values: Sequence[Any], mode: KnownCallsMode
) -> None:
    """Append to `key` what results depend on, and to `tensors` those among `values`.

    Raises:
        _Unsure: they may depend on more.
    """
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            for place, other in enumerate(tensors):
                if other is value:  # the same tensor once more: it costs no more bytes
                    key.append((place,))
                    break
            else:
                place = None
            tensors.append(value)
            if place is not None:
                continue
            ours = value.fake_mode is mode and value.constant is None
            if not ours or not mode.is_plain(value):
                raise _Unsure
            key += (value.shape, value.stride(), value.dtype)
        elif kind in _VALUES:
            key += (kind, value)  # 1 and 1.0 are equal, and the results' dtypes are not
        elif kind is tuple or kind is list:
            key += (kind, len(value))
            _add(key, tensors, value, mode)
        else:
            raise _Unsure


def _described(out: Any, call: KnownCall) -> _Result:
    """How to make a result like `out` from the tensors of `call`.

    Raises:
        _Unsure: it is no result that `_Result` describes.
    """
    for place, tensor in enumerate(call.tensors):
        if out is tensor:
            return _Result(place)
    if type(out) is not FakeTensor or out.constant is not None or out.requires_grad:
        raise _Unsure
    if out.fake_mode is not call.mode or not call.mode.is_plain(out):
        raise _Unsure
    sizes, strides, offset = tuple(out.shape), out.stride(), int(out.storage_offset())
    storage = out.untyped_storage()
    for place, tensor in enumerate(call.tensors):
        if tensor.untyped_storage()._cdata == storage._cdata:
            return _Result(place, sizes, strides, offset, out.dtype)
    if offset or storage.nbytes() != _empty(sizes, strides, out.dtype).untyped_storage().nbytes():
        raise _Unsure
    return _Result(None, sizes, strides, 0, out.dtype)


def _empty(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """A meta tensor, past all modes."""
    with torch._C._DisableTorchDispatch():
        return torch.empty_strided(sizes, strides, dtype=dtype, device=_META)


__all__ = ["KnownCall", "KnownCalls", "KnownCallsMode", "fake_like", "fake_tensors", "running_mode"]
