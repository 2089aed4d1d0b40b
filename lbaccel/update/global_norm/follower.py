"""Record the torch functions of a forward along the tape of another one of the same shapes.

The user's code runs again on stand-ins of the right shapes, and each call must be the known one. So
the tape holds this micro-batch's own numbers (the factor of a mixup), and no tensor is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.global_norm.handles import stand_in
from lbaccel.update.global_norm.recording import READS, Recording
from lbaccel.update.global_norm.replay import as_recorded, drawing
from lbaccel.update.global_norm.tape import Fact, Meta, Mode, Tape, TapedCall, Value


class Mismatch(Exception):
    """This forward makes other calls than the tape that it follows."""


class TapeFollower(Recording):
    """Records a forward that makes the calls of a known tape.

    Args:
        inputs: the tensors of the micro-batch; tensors without memory are the `stand_ins`.
        known: the tape of another micro-batch of these shapes.
        device: where the network runs.
        randomness: whose masks are drawn.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        known: Tape,
        *,
        device: torch.device,
        randomness: KeyedRandomness,
    ) -> None:
        stand_ins = [stand_in(Meta.of(x)) for x in inputs]
        super().__init__(stand_ins, known.metas, device=device, randomness=randomness)
        self.known = known
        self._given, self._evaluated = inputs, -1
        self._computed: dict[int, Tensor] = {}

    def finish(self, out: Any) -> Tape:
        """See `Recording`; the known tape itself where this one is the same.

        Raises:
            Mismatch: the forward ended before its tape did.
        """
        tape, known = super().finish(out), self.known
        if len(tape.events) != len(known.events):
            raise Mismatch
        assert tape.result is not None and known.result is not None
        same = tape.result[1] == known.result[1] and all(
            a is b or isinstance(b, Fact) for a, b in zip(tape.events, known.events, strict=True)
        )
        return known if same and _same(tape.result[0], known.result[0]) else tape

    def run(self, func: Any, leaves: list[Any], spec: Any, found: tuple[Any, ...]) -> Any:
        """See `Recording`."""
        events, place = self.known.events, len(self.tape.events)
        event = events[place] if place < len(events) else None
        args, kwargs = tree_unflatten(leaves, spec)
        if event is None or event.function is not func:
            if any(isinstance(x, Value) for x in found):
                raise Mismatch
            return self._unrecorded(func(*args, **kwargs))
        if isinstance(event, Fact):
            if not any(isinstance(x, Value) for x in found):
                return self._unrecorded(func(*args, **kwargs))
            out = self._read(func, found, spec) if func in READS else event.result
            self.tape.events.append(Fact(func, out))
            return out
        mode = Mode.now(self.device.type)
        if spec != event.spec or mode != event.mode or not _alike(found, event.leaves):
            raise Mismatch
        self.randomness.skip(event.num_draws)
        call = event if _same(found, event.leaves) else event.with_leaves(found)
        self.tape.events.append(call)
        written = {value: leaves[i] for i, value in event.writes}
        for value, x in written.items():
            self.handles.overwritten(x)
            self.add(value, event.level)
            self.handles.name(x, value)
        given = {x.index: leaves[i] for i, x in enumerate(event.leaves) if isinstance(x, Value)}
        return tree_unflatten(
            [self._given_back(x, event.level, {**given, **written}) for x in event.result],
            event.result_spec,
        )

    def _unrecorded(self, out: Any) -> Any:
        if any(isinstance(x, Tensor) for x in tree_leaves(out)):
            raise Mismatch
        return out

    def _given_back(self, x: Any, level: int, arguments: dict[int, Tensor]) -> Any:
        if not isinstance(x, Value):
            return x
        if x.index in arguments:
            return arguments[x.index]
        tensor = stand_in(self.tape.metas[x.index])
        self.add(x.index, level)
        self.handles.name(tensor, x.index)
        return tensor

    def _read(self, func: Any, found: tuple[Any, ...], spec: Any) -> Any:
        """A number of what is known before any BatchNorm layer: compute that much."""
        if self._evaluated < 0:
            self._computed, self._evaluated = {i: x.clone() for i, x in enumerate(self._given)}, 0
        for event in self.tape.events[self._evaluated :]:
            if isinstance(event, TapedCall) and event.level <= 0:
                args, kwargs, leaves = event.arguments(self._computed)
                with as_recorded(event.mode, False), drawing(event, self.randomness):
                    out = event.function(*args, **kwargs)
                made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                self._computed.update(zip(event.outputs, made, strict=True))
                self._computed.update((value, leaves[i]) for i, value in event.writes)
        self._evaluated = len(self.tape.events)
        known = [self._computed[x.index] if isinstance(x, Value) else x for x in found]
        args, kwargs = tree_unflatten(known, spec)
        return func(*args, **kwargs)


def _alike(found: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether a call with these arguments gives the same shapes."""
    return all(map(_is_like, found, known))


def _is_like(x: Any, y: Any) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return True
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return Meta.of(x) == Meta.of(y)
    return _is_same(x, y)


def _same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    return len(found) == len(known) and all(map(_is_same, found, known))


def _is_same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or isinstance(x, Tensor):
        return False
    try:
        return bool(x == y)
    except (ValueError, RuntimeError):  # arrays
        return False
