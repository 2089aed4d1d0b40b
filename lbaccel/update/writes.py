"""Tensors that a forward moves and a later forward reads: they would follow the micro-batches.

`WriteWatch` looks once, at the first micro-batch of the first update. Where nothing but that
micro-batch's own work was written, it costs one pass over the weights. A tensor that was written
is tried: the micro-batch runs again twice, and once more with the tensor changed a little. A cache
is not written again; a note of this micro-batch (an attention map, an auxiliary loss) comes out the
same whatever was there before; what comes out changed is carried from forward to forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.update.averages import RunningAverages
from lbaccel.update.reachable import LOSS, Kept, Place, Reachable, is_below, reachable

SHRINK = 63 / 64  # exact in every dtype, and a value stays in its range
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Mark:
    """By what a write is seen: another tensor, another memory, autograd's counter, the bits."""

    tensor: Tensor
    memory: int
    version: int
    bits: int

    def differs(self, other: _Mark) -> bool:
        return self.tensor is not other.tensor or (self.memory, self.version, self.bits) != (
            other.memory,
            other.version,
            other.bits,
        )


@torch.no_grad()
def marks(places: dict[str, Place]) -> dict[str, _Mark]:
    """The state of each tensor, in one pass and one synchronisation a device."""
    tensors = {path: t for path, place in places.items() if (t := place.tensor) is not None}
    plain = {
        path: t
        for path, t in tensors.items()
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta
    }
    bits: dict[str, int] = {}
    for device in {t.device for t in plain.values()}:
        here = {path: t for path, t in plain.items() if t.device == device}
        bits |= zip(here, torch.stack([_sum(t) for t in here.values()]).tolist(), strict=True)
    return {
        path: _Mark(
            t,
            t.data_ptr() if path in plain else 0,
            -1 if t.is_inference() else t._version,
            bits.get(path, 0),
        )
        for path, t in tensors.items()
    }


def _sum(tensor: Tensor) -> Tensor:
    t = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if t.dtype == torch.bool or not t.is_floating_point():
        return t.detach().sum(dtype=torch.int64)
    return t.detach().view(_BITS[t.element_size()]).sum(dtype=torch.int64)


def written(before: dict[str, _Mark], after: dict[str, _Mark]) -> list[str]:
    """Paths of tensors that are there both times, and were written in between."""
    return [path for path, mark in after.items() if path in before and mark.differs(before[path])]


def carried(
    found: Reachable, before: dict[str, _Mark], run: Callable[[], Any], *, skip: Any = None
) -> list[str]:
    """Of the tensors written since `before`, those that a forward writes from their last value.

    Args:
        found: the tensors of model and loss function.
        before: `marks` of before a forward.
        run: the same forward again; returns the loss.
        skip: (path) -> whether a tensor is not looked at.
    """
    wrote = [path for path in written(before, marks(found.places)) if not (skip and skip(path))]
    tried = [path for path in wrote if (found.places[path].tensor is not None)]
    if not tried:
        return []
    trial = _Trial(found, tried, run)
    first, first_loss, rewritten = trial.run()
    if not rewritten:
        return []
    second, second_loss, _ = trial.run()
    changed, changed_loss, _ = trial.run(shrunk=True)
    read = _apart(changed_loss, first_loss) > 10 * _apart(second_loss, first_loss)
    return [
        path
        for path in rewritten
        if (read or found.places[path].kind != "plain" or not is_below(path, LOSS))
        and (
            _apart(changed[path], first[path]) > 10 * _apart(second[path], first[path])
            if first[path].is_floating_point()
            else first[path].numel() > 1 and _apart(first[path], trial.values[path]) > 0
        )
    ]


class _Trial:
    """Forwards from the same state, which leave it as it was."""

    def __init__(self, found: Reachable, paths: list[str], run: Callable[[], Any]) -> None:
        self._places = {path: found.places[path] for path in paths}
        self._kept, self._run = Kept(found, paths), run
        self.values = self._now()

    def run(self, *, shrunk: bool = False) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        """The values that a forward leaves, its loss, and what it wrote."""
        try:
            if shrunk:
                self._shrink()
            before = marks(self._places)
            out = self._run()
            loss = out[0] if isinstance(out, tuple) else out
            after = marks(self._places)
            return self._now(), loss.detach().double(), written(before, after)
        finally:
            self._kept.put_back()

    def _now(self) -> dict[str, Tensor]:
        values = {path: place.tensor for path, place in self._places.items()}
        return {path: t.detach().clone() for path, t in values.items() if t is not None}

    @torch.no_grad()
    def _shrink(self) -> None:
        for place in self._places.values():
            tensor = place.tensor
            if tensor is None or not tensor.is_floating_point():
                continue
            if place.kind == "parameter":
                tensor.mul_(SHRINK)
            elif place.writable:  # another tensor: this one may be the micro-batch's own
                place.put(tensor.detach() * SHRINK)


def _apart(a: Tensor, b: Tensor) -> float:
    """The distance of two tensors; infinite where they have no common shape."""
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | ((a != a) & (b != b))
    return float((a.double() - b.double()).masked_fill(same, 0.0).norm())


class WriteWatch:
    """Looks at the first micro-batch for tensors that would follow the micro-batches.

    Args:
        averages: declared, which an update moves itself.
        allowed: names of tensors that the user lets follow the micro-batches.
    """

    def __init__(self, averages: RunningAverages, *, allowed: Sequence[str] = ()) -> None:
        if isinstance(allowed, str):
            raise InputError(
                f"allow_writes={allowed!r}: give a list of names, allow_writes=[{allowed!r}]."
            )
        self._averages, self._allowed = averages, tuple(allowed)
        self._scopes: tuple[Any, ...] = ()
        self.done = False

    def of(self, norm: Any, randomness: Any) -> WriteWatch:
        """Itself, with the scopes of a forward."""
        self._scopes = (norm, randomness)
        return self

    def micro_batches(self, pairs: Any, model: nn.Module, loss_fn: Any) -> Iterator[Any]:
        """Hand the micro-batches on, and look at what the first of them left.

        Raises:
            InputError: a tensor is carried from forward to forward.
        """
        for micro_batch, data in pairs:
            if self.done or micro_batch.is_filler:
                yield micro_batch, data
                continue
            found = reachable(model, loss_fn)
            found.named(self._allowed, option="allow_writes")
            before = marks(found.places)
            yield micro_batch, data
            self._look(found, before, micro_batch, lambda data=data: loss_fn(model, data))
            self.done = True

    def _look(
        self, found: Reachable, before: Any, micro_batch: MicroBatch, run: Callable[[], Any]
    ) -> None:
        def forward() -> Any:
            norm, randomness = self._scopes
            with ExitStack() as around:
                around.enter_context(norm.forward(micro_batch))
                around.enter_context(norm.backward())  # no statistic is taken
                around.enter_context(randomness.forward(micro_batch))
                return run()

        paths = carried(found, before, forward, skip=self._skips)
        if paths:
            raise carries(paths, found)

    def _skips(self, path: str) -> bool:
        return self._averages.holds(path) or any(is_below(path, name) for name in self._allowed)


def carries(paths: Sequence[str], found: Reachable) -> InputError:
    """A state that a forward writes and the next one reads."""
    place = found.places[paths[0]]
    shape = "" if place.tensor is None else f" of shape {tuple(place.tensor.shape)}"
    kind = {"parameter": "parameter", "buffer": "buffer", "plain": "tensor"}[place.kind]
    more = f" (and {len(paths) - 1} more: {', '.join(paths[1:4])})" if len(paths) > 1 else ""
    return InputError(
        f"a forward moves the {kind} {paths[0]!r}{shape}{more} from its last value, so it would "
        "move once a micro-batch and on each rank by its own samples: another plan would give "
        "another result. Nothing of this update was written to the weights. Where it is a running "
        f"average of samples, declare it: LargeBatch(..., averages={[paths[0]]!r}) moves it once "
        "an update, as by the whole batch. Else move it after large_batch.update(...); or let it "
        f"follow the micro-batches: LargeBatch(..., allow_writes={[paths[0]]!r})."
    )
