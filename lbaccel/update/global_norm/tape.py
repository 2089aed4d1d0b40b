"""The torch functions that a loss function calls, as a tape, cut into levels at BatchNorm's layers.

A value of the tape has a level: the number of BatchNorm layers on the longest way to it from the
data. A layer of level l normalises by statistics over all samples, so that its input, of level
l - 1, must be known for all of them first. Layers of one level don't depend on each other and share
a pass. The frontier of level l holds the values that are made below it and read at l or above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_unflatten


@dataclass(frozen=True)
class Value:
    """A tensor of the tape, by number; a write in place makes another one."""

    index: int


@dataclass(frozen=True)
class Meta:
    """A tensor, as far as it is known before it is computed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> Meta:
        """Of a tensor that is there."""
        return cls(x.shape, x.dtype, x.device)

    @property
    def num_bytes(self) -> int:
        """Of the values, densely."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Mode:
    """The state around a call that decides its result: autograd's and autocast's."""

    grad: bool
    autocast: bool
    dtype: torch.dtype
    device: str

    @classmethod
    def now(cls, device: str) -> Mode:
        """As it stands."""
        enabled = torch.is_autocast_enabled(device)
        return cls(torch.is_grad_enabled(), enabled, torch.get_autocast_dtype(device), device)


@dataclass(eq=False)
class TapedCall:
    """One call of a torch function."""

    function: Callable[..., Any]
    leaves: tuple[Any, ...]  # of (args, kwargs); tensors of the tape are `Value`
    spec: TreeSpec
    result: tuple[Any, ...]  # leaves of what it returns
    result_spec: TreeSpec
    writes: tuple[tuple[int, int], ...]  # (place in leaves, value) of those written in place
    mode: Mode
    layer: nn.Module | None = None  # a BatchNorm layer whose statistics are those of all samples
    draw: int = -1  # number of the first keyed mask that it draws
    num_draws: int = 0
    seed: int = -1  # its key, where it draws from torch's own generators
    cost: float = 0.0  # of its forward
    level: int = -1  # -1: it reads nothing but what is constant

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The values that it reads."""
        return tuple(leaf.index for leaf in self.leaves if isinstance(leaf, Value))

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """A value for each tensor that it returns, in order."""
        return tuple(leaf.index for leaf in self.result if isinstance(leaf, Value))

    @cached_property
    def made(self) -> tuple[int, ...]:
        """The values that did not exist before it."""
        read = set(self.inputs)
        return tuple(v for v in dict.fromkeys((*self.outputs, *(v for _, v in self.writes)))
                     if v not in read)  # fmt: skip

    def with_leaves(self, leaves: tuple[Any, ...]) -> TapedCall:
        """The same call with other constants."""
        return replace(self, leaves=leaves)

    def arguments(self, values: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """(args, kwargs, leaves), with `values[v]` for value v."""
        leaves = [values[x.index] if isinstance(x, Value) else x for x in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs, leaves


@dataclass(eq=False)
class Fact:
    """A call whose result is no tensor: a shape, a flag."""

    function: Callable[..., Any]
    result: Any


@dataclass(eq=False)
class Tape:
    """One forward, from the tensors of a micro-batch to what its loss function returned."""

    inputs: int  # values 0 .. inputs - 1 are the micro-batch's own
    metas: list[Meta] = field(default_factory=list)  # of each value
    events: list[TapedCall | Fact] = field(default_factory=list)
    result: tuple[tuple[Any, ...], TreeSpec] | None = None  # leaves, tensors as `Value`

    @cached_property
    def calls(self) -> list[TapedCall]:
        """Those that the result or a layer's statistics need, in order, with their levels."""
        calls = [event for event in self.events if isinstance(event, TapedCall)]
        needed, kept = set(self.outputs), []
        for call in reversed(calls):
            if call.layer is not None or not needed.isdisjoint(call.made):
                kept.append(call)
                needed.update(call.inputs)
        readers: dict[int, int] = {}  # value: the lowest level that reads it
        for call in kept:
            if call.level < 0:  # as late as it can be, so that nothing is kept of it
                call.level = min((readers.get(v, 0) for v in call.made), default=0)
            for value in call.inputs:
                readers[value] = min(readers.get(value, call.level), call.level)
        return kept[::-1]

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """The values of the result."""
        assert self.result is not None
        return tuple(leaf.index for leaf in self.result[0] if isinstance(leaf, Value))

    @cached_property
    def depth(self) -> int:
        """The highest level."""
        return max((call.level for call in self.calls), default=0)

    @cached_property
    def levels(self) -> list[list[TapedCall]]:
        """The calls of each level, in order."""
        found: list[list[TapedCall]] = [[] for _ in range(self.depth + 1)]
        for call in self.calls:
            found[call.level].append(call)
        return found

    @cached_property
    def _life(self) -> tuple[dict[int, int], dict[int, int]]:
        """The level that makes a value (-1: it is given), and the last one that reads it."""
        born = dict.fromkeys(range(self.inputs), -1)
        died: dict[int, int] = {}
        for call in self.calls:
            born.update(dict.fromkeys(call.made, call.level))
            for value in call.inputs:
                died[value] = max(died.get(value, 0), call.level)
        died.update(dict.fromkeys(self.outputs, self.depth))
        return born, died

    @cached_property
    def frontiers(self) -> list[tuple[int, ...]]:
        """Of each level, the values that are made below it and read at it or above."""
        born, died = self._life
        return [
            tuple(v for v, made in born.items() if made < level <= died.get(v, -1))
            for level in range(self.depth + 1)
        ]

    @cached_property
    def frontier_bytes(self) -> list[int]:
        """Of each level's frontier."""
        return [sum(self.metas[v].num_bytes for v in frontier) for frontier in self.frontiers]

    @cached_property
    def gradient_bytes(self) -> list[int]:
        """Of the gradients of each level's frontier."""
        return [
            sum(self.metas[v].num_bytes for v in frontier if self.needs_grad[v])
            for frontier in self.frontiers
        ]

    @cached_property
    def lives(self) -> Counter[tuple[int, int]]:
        """Bytes of the values of frontiers by (level that makes them, last that reads them)."""
        born, died = self._life
        found: Counter[tuple[int, int]] = Counter()
        for value in {v for frontier in self.frontiers for v in frontier}:
            found[born[value], died[value]] += self.metas[value].num_bytes
        return found

    @cached_property
    def held_below(self) -> list[frozenset[int]]:
        """By level, the values of all frontiers below it."""
        found = [frozenset[int]()]
        for frontier in self.frontiers:
            found.append(found[-1] | frozenset(frontier))
        return found

    def value_of(self, leaf: Any, values: Any) -> Any:
        """A leaf of the result, computed."""
        return values[leaf.index] if isinstance(leaf, Value) else leaf

    @cached_property
    def frees(self) -> dict[int, tuple[int, ...]]:
        """By number of a call (`id`): the values that nothing reads after it, at no level."""
        last: dict[tuple[int, int], int] = {}
        _, died = self._life
        for call in self.calls:
            for value in (*call.inputs, *call.made):
                if died.get(value, -1) <= call.level:
                    last[call.level, value] = id(call)
        found: dict[int, list[int]] = {}
        kept = set(self.outputs)
        for (_, value), call_id in last.items():
            if value not in kept:
                found.setdefault(call_id, []).append(value)
        return {key: tuple(values) for key, values in found.items()}

    def must_copy(self, call: TapedCall, value: int) -> bool:
        """Whether a write of `call` may not touch `value`: it is kept, or read again above."""
        born, died = self._life
        return born[value] < call.level or died.get(value, 0) > call.level

    @cached_property
    def needs_grad(self) -> list[bool]:
        """Of each value, whether a trainable tensor may have moved it."""
        found = [False] * len(self.metas)
        for call in self.calls:
            if not call.mode.grad or call.function in DETACHING:
                continue
            trained = call.layer is not None or any(
                isinstance(x, torch.Tensor) and x.requires_grad for x in call.leaves
            )
            if trained or any(found[v] for v in call.inputs):
                for value in call.made:
                    found[value] = self.metas[value].dtype.is_floating_point
        return found

    def layers_at(self, level: int) -> list[TapedCall]:
        """The BatchNorm layers whose input is known at `level`: those of the next one."""
        if level >= self.depth:
            return []
        return [call for call in self.levels[level + 1] if call.layer is not None]


DETACHING = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
