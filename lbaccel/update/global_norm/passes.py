"""The update over BatchNorm of the whole batch: forward passes and backward passes by level.

A forward pass runs one level of all micro-batches and ends with the statistics of the next level's
layers over all samples of all ranks. A backward pass runs a level again with autograd, from the
values that were kept, and ends with the two sums that those layers' gradients need. It computes
what one forward and one backward of the whole batch would, in the memory of a micro-batch's level
and of `HostStore`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.accumulation import LossFn
from lbaccel.update.global_norm.ending import Ending, Passes
from lbaccel.update.global_norm.exchange import Exchange
from lbaccel.update.global_norm.follower import Mismatch, TapeFollower
from lbaccel.update.global_norm.recorder import TapeRecorder
from lbaccel.update.global_norm.recording import Recording, shown_draws
from lbaccel.update.global_norm.replay import Values, run
from lbaccel.update.global_norm.schedule import Schedule, best_schedule, chain_of
from lbaccel.update.global_norm.statistics import Statistics
from lbaccel.update.global_norm.store import HostStore, gradient_of
from lbaccel.update.global_norm.tape import Tape, TapedCall
from lbaccel.update.loss_sums import Sums
from lbaccel.update.normalization import GhostNorm
from lbaccel.update.weightless import Weightless


@dataclass(eq=False)
class _Part:
    """A micro-batch of this rank."""

    micro_batch: MicroBatch
    tape: Tape


class GlobalNorm:
    """Accumulates an update whose BatchNorm layers see all of it.

    Args:
        norm: the layers, converted with "global".
        randomness: of the masks.
        device: where the network runs.
        exchange: with the other ranks.
        host_bytes: gives the most that may be kept on the host; None: as much as all levels take.
    """

    def __init__(
        self,
        norm: GhostNorm,
        randomness: KeyedRandomness,
        *,
        device: torch.device,
        exchange: Exchange,
        host_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._norm, self._randomness, self._device = norm, randomness, device
        self._exchange, self.host_bytes = exchange, host_bytes
        self._known: dict[Any, Tape] = {}  # by shapes of a micro-batch
        self.passes: Passes | None = None  # of the last update
        self._scheduled: tuple[Any, Schedule] | None = None  # of these tapes
        self._trained: tuple[bool, ...] = ()
        self.store = HostStore()

    def accumulate(
        self,
        model: Any,
        micro_batches: Iterable[tuple[MicroBatch, Any]],
        loss_fn: LossFn,
        *,
        num_samples: int,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> Sums:
        """As `lbaccel.update.accumulation.accumulate`, with BatchNorm over all samples.

        Raises:
            InputError: a forward that the passes can't repeat.
        """
        self.store = HostStore()
        self._trained = tuple(p.requires_grad for p in model.parameters())
        with self._exchange.of_an_attempt() as exchange, Weightless(model) as weightless:
            attempt = _Attempt(self, exchange)
            parts = attempt.record(model, micro_batches, loss_fn)
            attempt.forward(parts)
            sums = attempt.backward(parts, num_samples, backward, weightless)
        self.passes = Passes.of(parts[0].tape, attempt.schedule, self.store.peak)
        return sums

    def schedule_of(self, tapes: list[Tape]) -> Schedule:
        """Which levels' values are kept; the same tapes have the same one."""
        key = sorted(Counter(map(id, tapes)).items())
        if self._scheduled is None or self._scheduled[0] != key:
            self._scheduled = key, best_schedule(chain_of(tapes), self.host_bytes())
        return self._scheduled[1]

    def tape_of(
        self, model: Any, micro_batch: MicroBatch, data: Any, loss_fn: LossFn
    ) -> tuple[Tape, list[Tensor]]:
        """The tape of a micro-batch, and the tensors that it starts from."""
        leaves, spec = tree_flatten(data)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in places]
        key = self._trained, *((x.shape, x.dtype, x.device) for x in tensors)
        known = self._known.get(key)
        for tape in (known, None) if known is not None else (None,):
            inside = {"device": self._device, "randomness": self._randomness}
            recorder: Recording = (
                TapeRecorder(tensors, **inside)
                if tape is None
                else TapeFollower(tensors, tape, **inside)
            )
            own = list(leaves)
            for i, x in zip(places, recorder.stand_ins, strict=True):
                own[i] = x
            try:
                with ExitStack() as around:
                    around.enter_context(self._norm.forward(micro_batch))
                    around.enter_context(self._randomness.forward(micro_batch))
                    around.enter_context(shown_draws())
                    around.enter_context(torch.compiler.set_stance("force_eager"))
                    with recorder:
                        out = loss_fn(model, tree_unflatten(own, spec))
                    found = recorder.finish(out)
            except Mismatch:
                continue
            _check_layers(found)
            if tape is None:
                self._known[key] = found
            return found, tensors
        raise AssertionError("a forward for real follows no tape")


class _Attempt:
    """One attempt at an update."""

    def __init__(self, owner: GlobalNorm, exchange: Exchange) -> None:
        self.owner, self.exchange, self.store = owner, exchange, owner.store
        self.device, self.randomness = owner._device, owner._randomness
        self.statistics: dict[int, Statistics] = {}  # by id of the layer
        self.schedule = Schedule((0,), (), 0)
        self._let_go_at: dict[tuple[int, int], frozenset[int]] = {}  # by tape and level

    def record(
        self, model: Any, micro_batches: Iterable[tuple[MicroBatch, Any]], loss_fn: LossFn
    ) -> list[_Part]:
        """Record each micro-batch, and run its first level."""
        parts: list[_Part] = []
        for micro_batch, data in micro_batches:
            if micro_batch.is_filler and parts:
                continue
            tape, inputs = self.owner.tape_of(model, micro_batch, data, loss_fn)
            parts.append(_Part(micro_batch, tape))
            values = dict(enumerate(inputs))
            self._keep(len(parts) - 1, tape, 0, values)
            self._forward(len(parts) - 1, parts[-1], 0, values)
        return parts

    def forward(self, parts: list[_Part]) -> None:
        """The levels below the last one, whose forward the backward pass runs."""
        depth = self.exchange.agree_on([part.tape.depth for part in parts])
        self.schedule = self.owner.schedule_of([part.tape for part in parts])
        for level in range(depth):
            for index, part in enumerate(parts):
                if level > 0:
                    self._forward(index, part, level, self._frontier(index, part, level))
                self._let_go(index, part.tape, level + 1)
            self._fix(parts[0].tape, level)

    def _frontier(self, index: int, part: _Part, level: int) -> Values:
        """The values that a level starts from; those not there are computed from a kept one."""
        tape = part.tape
        start = level
        if any((index, v) not in self.store for v in tape.frontiers[level]):
            start, _ = self.schedule.start_of(level)
        values = {v: self.store.get((index, v), self.device) for v in tape.frontiers[start]}
        for below in range(start, level):
            self._run(index, part, below, values, grad=False)
        return {v: values[v] for v in tape.frontiers[level]}

    def _run(self, index: int, part: _Part, level: int, values: Values, *, grad: bool) -> None:
        with self.randomness.replay(part.micro_batch):
            run(
                part.tape,
                level,
                values,
                norm=self._normalise,
                randomness=self.randomness,
                grad=grad,
            )

    def _normalise(self, call: TapedCall, x: Tensor) -> Tensor:
        return self.statistics[id(call.layer)].normalise(x)

    def _forward(self, index: int, part: _Part, level: int, values: Values) -> None:
        """Run a level, keep what the next ones read, and take the statistics of their layers."""
        self._run(index, part, level, values, grad=False)
        self._keep(index, part.tape, level + 1, values)
        for call in part.tape.layers_at(level):
            one = self.statistics.setdefault(id(call.layer), Statistics(call.layer))
            if part.micro_batch.is_filler:
                one.add_none(values[call.inputs[0]])
            else:
                one.add(values[call.inputs[0]])

    def _keep(self, index: int, tape: Tape, level: int, values: Values) -> None:
        """Keep what is not kept yet of the frontier of `level`."""
        for value in tape.frontiers[level] if level <= tape.depth else ():
            if (index, value) not in self.store:
                self.store.put((index, value), values[value])

    def _fix(self, tape: Tape, level: int) -> None:
        """The statistics of the layers above `level`, over all ranks."""
        found = [self.statistics[id(call.layer)] for call in tape.layers_at(level)]
        for one in found:
            one.note()
        self.exchange.merge(found)
        for one in found:
            one.fix()

    def _let_go(self, index: int, tape: Tape, level: int) -> None:
        """Keep the frontier of `level`, and those below that the backward passes start from."""
        key = id(tape), level
        if key not in self._let_go_at:
            kept = set(tape.frontiers[level])
            for below in self.schedule.kept:
                if below < level:
                    kept.update(tape.frontiers[below])
            self._let_go_at[key] = tape.held_below[level] - kept
        self.store.drop((index, v) for v in self._let_go_at[key])

    # ---- backward

    def backward(
        self,
        parts: list[_Part],
        num_samples: int,
        backward: Callable[[Tensor], object],
        weightless: Weightless,
    ) -> Sums:
        """The levels from the last to the first, each for all micro-batches."""
        ending = Ending(num_samples, backward, weightless)
        tape = parts[0].tape
        for level in range(tape.depth, -1, -1):
            self._refill(parts, level)
            own = [self.statistics[id(c.layer)] for c in tape.levels[level] if c.layer is not None]
            for one in own:
                one.listen()
            for index, part in enumerate(parts):
                if level == tape.depth or not part.micro_batch.is_filler:
                    self._backward(index, part, level, ending)
            self.exchange.add_sums(own)
            for one in own:
                one.give_back()
        return ending.sums()

    def _refill(self, parts: list[_Part], level: int) -> None:
        """Run forward what the schedule stores of a gap, before the backward of its last level."""
        start, stored = self.schedule.start_of(level)
        if not stored:
            return
        for index, part in enumerate(parts):
            if all((index, v) in self.store for v in part.tape.frontiers[level]):
                continue
            values = self._frontier(index, part, start)
            for below in range(start, level):
                self._run(index, part, below, values, grad=False)
                self._keep(index, part.tape, below + 1, values)

    def _backward(self, index: int, part: _Part, level: int, ending: Ending) -> None:
        tape, values = part.tape, self._frontier(index, part, level)
        leaves = {v: x.detach().requires_grad_() for v, x in values.items() if tape.needs_grad[v]}
        values |= leaves
        self._run(index, part, level, values, grad=True)
        if level == tape.depth:
            ending.run(tape, part.micro_batch, values)
        else:
            self._pull(index, tape, level, values)
        below = tape.held_below[level]
        self.store.drop((index, v) for v in tape.frontiers[level] if v not in below)
        for value, leaf in leaves.items():
            if leaf.grad is None:
                continue
            key = gradient_of((index, value))
            waiting = self.store.get(key, self.device) if key in self.store else None
            self.store.put(key, leaf.grad if waiting is None else leaf.grad + waiting)

    def _pull(self, index: int, tape: Tape, level: int, values: Values) -> None:
        """Backward of what this level made, from the gradients of the levels above."""
        layers = [(call.inputs[0], call.layer) for call in tape.layers_at(level)]
        given = set(tape.frontiers[level])
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for value in tape.frontiers[level + 1]:
            x, key = values[value], gradient_of((index, value))
            if value in given or not x.requires_grad:
                continue
            found = self.store.get(key, self.device) if key in self.store else None
            self.store.drop([key])
            for layer in (layer for read, layer in layers if read == value):
                more = self.statistics[id(layer)].correction(x.detach())
                found = more if found is None else found + more
            if found is not None:
                roots.append(x)
                gradients.append(found)
        if roots:
            torch.autograd.backward(roots, gradients)


def _check_layers(tape: Tape) -> None:
    seen: set[int] = set()
    for call in tape.calls:
        if call.layer is None:
            continue
        if id(call.layer) in seen:
            name = call.layer._ghost_slot.name  # type: ignore[union-attr]
            raise InputError(
                f"BatchNorm layer {name!r} runs twice in one forward, and norm_batch_size='global' "
                "takes one statistic of a layer in an update. TapedCall the network once a "
                "micro-batch, or use a number in the place of 'global'."
            )
        seen.add(id(call.layer))
