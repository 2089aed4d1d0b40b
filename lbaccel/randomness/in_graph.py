"""Keyed draws inside the graph of torch.compile: one operator, which the compiler does not open.

A draw belongs to the c-th call of its forward. The compiler may drop a call whose result nothing
reads, merge equal calls, change their order, and run a call again in the backward pass; each of
these would give a call the bits of another one. What prevents it:

- Each call says that it writes `order`, a tensor that goes into the graph. So all calls stay, one
  after the other, as the program has them. In truth no call writes it: a compiler that runs a call
  again may hand it the tensor as it is after the forward.
- `order` holds the number of this run of the graph. With the place of the call in the graph, which
  is written into it, that names the call: one that runs again has its c.

Which c a new name gets, the source says when the graph runs, never when it is traced. So one graph
serves layers of equal code, and a module that is called twice.
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Masked(NamedTuple):
    """Of the tensor that is masked, all that a draw needs."""

    shape: tuple[int, ...]
    device: torch.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


class GraphCall(NamedTuple):
    """The name of a call: the run of its graph, and its place in it."""

    run: int
    place: int


class GraphSource(Protocol):
    """Gives the draws of compiled graphs, see `KeyedRandomness`."""

    run: int  # of the next graph
    order: Tensor  # int64 [2], on the CPU: numbers of this source and of that run
    in_graph: bool  # a graph may hold the calls now: each of them has keys
    drawn: Any


_sources: WeakValueDictionary[int, GraphSource] = WeakValueDictionary()
_numbers, _runs = count(), count()
_places = [count()]  # of graphs that are traced in one micro-batch: all places of a graph differ


def register(source: GraphSource) -> None:
    """Make `source` known to the operator, and give it its `run` and `order`."""
    torch.compiler.assume_constant_result(_new_place)  # here, as it imports the compiler
    number = next(_numbers)
    _sources[number] = source
    _next_run(source, number)


def _next_run(source: GraphSource, number: int) -> None:
    source.run = next(_runs)
    source.order = torch.tensor([number, source.run], device="cpu")


def tracing(source: GraphSource) -> bool:
    """Whether a graph is being traced that may hold the calls for masks."""
    return source.in_graph and torch.compiler.is_dynamo_compiling()


def begin_places() -> None:
    """Count from 0 again: so the graphs of equal networks are equal, and a cache has them."""
    _places[0] = count()


def _new_place() -> int:
    return next(_places[0])


def drawn_in_graph(
    source: GraphSource,
    x: Tensor,
    covered: int,
    *,
    keep: float | None,
    each: tuple[int, ...] = (),
) -> Tensor:
    """`source.drawn` for `x`, as a call of the graph that is being traced."""
    drawn: Any = torch.ops.lbaccel.drawn
    return drawn(source.order, _new_place(), x.shape, covered, each, keep, x.device)


def _drawn(
    order: Tensor,
    place: int,
    shape: list[int],
    covered: int,
    each: list[int],
    keep: float | None,
    device: torch.device,
) -> Tensor:
    number, run = order.tolist()
    source = _sources[number]
    if run == source.run:
        # This graph may keep its `order` for its backward pass, so the next one gets another.
        _next_run(source, number)
    x = Masked(tuple(shape), device)
    return source.drawn(GraphCall(run, place), x, covered, keep=keep, each=tuple(each))


def _fake(
    order: Any, place: Any, shape: Any, covered: int, each: Any, keep: Any, device: Any
) -> Tensor:
    rest = each or [1] * (len(shape) - covered)
    dtype = torch.int32 if keep is None else torch.bool
    return torch.empty([*shape[:covered], *rest], dtype=dtype, device=device)


# Where the kernels of a graph are recorded once and replayed, the calls stay outside.
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe")
         if hasattr(torch.Tag, name)]  # fmt: skip
_library = torch.library.Library("lbaccel", "FRAGMENT")
_library.define(
    "drawn(Tensor(a!) order, int place, SymInt[] shape, int covered, SymInt[] each, float? keep, "
    "Device device) -> Tensor",
    tags=_TAGS,
)
_library.impl("drawn", _drawn, "CompositeExplicitAutograd")
torch.library.register_fake("lbaccel::drawn", _fake, lib=_library)
