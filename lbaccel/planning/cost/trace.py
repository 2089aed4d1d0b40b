"""The allocations of an update, in executed order, recorded on tensors without memory.

A `Recorder` sees every kernel call of forward, backward and step (torch's dispatch order) and every
storage that is made or dropped. Run on fake tensors it costs neither memory nor a device; the
sizes are those of the real run, since a storage's size follows from shapes and dtypes alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lbaccel.planning.cost.known_calls import running_mode
from lbaccel.planning.cost.later import Later, known

Role = Literal["weights", "gradients", "optimizer", "activations", "teacher"]

HOST_COPY = "lbaccel.host_copy"  # the kernel of a copy between device and host

Workspace = Callable[[str, tuple[Any, ...], dict[str, Any], Any], "int | Later"]
"""(kernel, args, kwargs, result) -> bytes it allocates inside and frees before it returns."""


@dataclass(frozen=True)
class Kernel:
    """One call: what it costs, not what it computes.

    `flops` counts a multiply-add as two; `num_bytes` is what its tensors hold together, 0 for a
    view; `workspace` is allocated inside and freed again.
    """

    name: str  # such as "aten.convolution"
    flops: int
    num_bytes: int
    workspace: int | Later
    dtype: torch.dtype | None
    channels_last: bool
    depthwise: bool = False  # a convolution with as many groups as channels, or nearly
    pointwise: bool = False  # a convolution of 1 x 1
    weight_bytes: int = 0  # of a convolution
    num_samples: int = 0  # likewise
    new_bytes: int = 0  # of the largest storage that it made


class Allocate(NamedTuple):  # made faster than a frozen dataclass is
    """Storage `id` appears."""

    id: int
    num_bytes: int


class Free(NamedTuple):
    """Storage `id` goes."""

    id: int


@dataclass(frozen=True)
class Mark:
    """A point of the update that has a name, such as the start of a block's backward."""

    name: str
    num_bytes: int = 0  # of the storage that it is about, if any
    storage: int = -1  # its number


Event = Kernel | Allocate | Free | Mark


@dataclass
class Trace:
    """Events in executed order, and what the storages are."""

    events: list[Event] = field(default_factory=list)
    roles: dict[int, Role] = field(default_factory=dict)  # of those that are no activations
    random_state: int = 0  # bytes of torch's, where a recompute keeps it in the traced memory
    # Where autograd saved a storage, if that was asked for: number of events before, and which.
    saved: list[tuple[int, int]] = field(default_factory=list)
    host_bytes: int = 0  # that offloaded activations pin, outside of the traced memory

    def peak(self) -> int:
        """Most bytes live at one time, workspaces included."""
        return max(self.live_before()[1], default=0)

    def live_before(self) -> tuple[list[int], list[int]]:
        """For each event: bytes live when it comes, and the most while it happens."""
        sizes: dict[int, int] = {}
        settled: list[int] = []
        most: list[int] = []
        now = 0
        for event in self.events:
            settled.append(now)
            if isinstance(event, Allocate):
                sizes[event.id] = event.num_bytes
                now += event.num_bytes
            elif isinstance(event, Free):
                now -= sizes.pop(event.id)
            inside = known(event.workspace) if isinstance(event, Kernel) else 0
            most.append(max(settled[-1], now + inside))
        return settled, most

    def breakdown(self) -> dict[str, int]:
        """Bytes by role at the peak, and the workspace there; they add up to `peak()`."""
        most = self.live_before()[1]
        at = max(range(len(most)), key=most.__getitem__, default=-1)
        sizes: dict[int, int] = {}
        for event in self.events[: at + 1]:
            if isinstance(event, Allocate):
                sizes[event.id] = event.num_bytes
            elif isinstance(event, Free):
                sizes.pop(event.id)
        found: Counter[str] = Counter(weights=0, gradients=0, optimizer=0, activations=0)
        for key, num_bytes in sizes.items():
            found[self.roles.get(key, "activations")] += num_bytes
        last = self.events[at] if at >= 0 else None
        return {**found, "workspace": known(last.workspace) if isinstance(last, Kernel) else 0}

    def kernels(self) -> Iterable[Kernel]:
        """The calls that do something, in order."""
        return (event for event in self.events if isinstance(event, Kernel))


class Recorder(TorchDispatchMode):
    """Records into `trace` while it is entered."""

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.trace = Trace()
        self._workspace = workspace
        self._live: dict[int, tuple[int, Any]] = {}  # address of a storage: its number, its watch
        self._count = 0
        self._counted: dict[int, bool] = {}  # by address of a function, which torch keeps
        self.num_kernels = 0
        self.on_kernel: Callable[[list[Tensor]], object] | None = None  # called with what it reads

    def watch(self, tensor: Tensor, role: Role | None = None) -> int:
        """Record the storage of `tensor`, once, and return its number."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        found = self._live.get(address)
        if found is None:
            number, events = self._count, self.trace.events
            self._count += 1

            def gone(_: Any) -> None:
                del self._live[address]
                events.append(Free(number))

            self._live[address] = number, weakref.ref(storage, gone)
            events.append(Allocate(number, storage.nbytes()))
        else:
            number = found[0]
        if role is not None:
            self.trace.roles[number] = role
        return number

    def mark(self, name: str, of: Tensor | None = None) -> None:
        """Put a named point into the trace, about the storage of a tensor."""
        if of is None:
            self.trace.events.append(Mark(name))
        else:
            number = self.watch(of)
            self.trace.events.append(Mark(name, of.untyped_storage().nbytes(), number))

    def host_copy(self, num_bytes: int) -> None:
        """Record a copy to or from the host."""
        copy = Kernel(HOST_COPY, 0, num_bytes, 0, dtype=None, channels_last=False)
        self.trace.events.append(copy)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing here is compiled, and torch's wrapper against it takes time in each call."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.on_kernel is not None:
            self.on_kernel([t for t in _flat(args) if isinstance(t, Tensor)])
        self.num_kernels += 1
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device  # autograd asks for it more often than for any kernel
        kwargs, mode = kwargs or {}, running_mode()
        call = None if mode is None else mode.known.call(mode, func, args, kwargs)
        out = NotImplemented if call is None else call.results()
        if out is NotImplemented:
            out = func(*args, **kwargs)
        results = (out,) if isinstance(out, Tensor) else _flat(out)
        tensors = [t for t in results if isinstance(t, Tensor)]
        largest = self._watch_results(tensors)
        if self._is_counted(func):

            def count() -> Kernel:
                return replace(self._kernel(func, args, kwargs, out, tensors), new_bytes=largest)

            self.trace.events.append(count() if call is None else call.cost(largest, count))
        return out

    def _watch_results(self, tensors: Sequence[Tensor]) -> int:
        """Watch what a call gave; the bytes of the largest storage that it made."""
        largest, seen = 0, self._count
        for tensor in tensors:
            if self.watch(tensor) >= seen:
                largest = max(largest, tensor.untyped_storage().nbytes())
        return largest

    def _is_counted(self, func: Any) -> bool:
        """Whether a call of it is a kernel: it is no view, and asks for more than a property."""
        found = self._counted.get(id(func))
        if found is None:
            found = self._counted[id(func)] = not func.is_view and func.namespace != "prim"
        return found

    def _kernel(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any, tensors: list[Tensor]
    ) -> Kernel:
        name = str(func._overloadpacket)
        inputs = [t for t in _flat(args) if isinstance(t, Tensor)]
        free = name in _FREE
        main = inputs[0] if inputs else (tensors[0] if tensors else None)
        distinct = {id(t): t for t in (*inputs, *tensors)}
        return Kernel(
            name=name,
            flops=_flops(func._overloadpacket, name, args, kwargs, out),
            num_bytes=0 if free else sum(t.numel() * t.element_size() for t in distinct.values()),
            workspace=self._workspace(name, args, kwargs, out) if self._workspace else 0,
            dtype=main.dtype if main is not None else None,
            channels_last=main is not None
            and main.ndim == 4
            and main.is_contiguous(memory_format=torch.channels_last)
            and not main.is_contiguous(),
            **_shape_of_convolution(name, args),
        )


_DEVICE = torch.ops.prim.device.default

# They touch no memory: a view by another name, or storage that nothing has written yet.
_FREE = frozenset(
    f"aten.{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("_unsafe_view", "lift_fresh"),
    )
)


def _flops(packet: Any, name: str, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    if name == "aten.convolution_backward" and args[9] > 1:
        # torch's formula takes a grouped convolution's backward for a dense one.
        grad, weight, wanted = args[0], args[2], args[10]
        return 2 * grad.numel() * weight.shape[1:].numel() * sum(wanted[:2])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count is not None else 0


def _shape_of_convolution(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    if not name.startswith("aten.convolution"):
        return {}
    backward = name.endswith("_backward")
    weight, groups = args[2 if backward else 1], args[9 if backward else 8]
    return {
        "depthwise": groups > 1,
        "pointwise": groups == 1 and weight.shape[2:].numel() == 1,
        "weight_bytes": weight.numel() * weight.element_size(),
        "num_samples": args[0].shape[0],
    }


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
