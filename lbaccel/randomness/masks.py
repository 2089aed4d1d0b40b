"""Randomness inside the network, keyed: a mask is a function of the sample, not of the micro-batch.

Within an update, the draw of element e of sample position p in the forward's c-th random call is

    bits(h, e),   h = hash(seed, update, p, c)

a stateless hash in integer arithmetic on the device, so a mask is the same in every partition of
the update, on every rank, and in a recompute. Elements are counted within the sample, wherever its
dimension stands. A tensor without samples (a table of relative positions) has one draw for the
whole update: p is then ALL_SAMPLES. Which dimension holds the samples is learned, see
`layouts.learn_layouts`; before that, rows that are a multiple of the samples are taken for theirs.

The functions that draw masks (`F.dropout` and its kin, and those that DropPath, PatchDropout and
StochasticDepth call) are replaced while a micro-batch runs, and at no other time: the model, its
modules and its `state_dict` stay as they are.

A recompute must draw the c of its forward. Each call takes a token from torch's CPU generator,
which activation checkpointing puts back for a recompute: a token seen before names its c. A graph
of torch.compile may make a mask again without that, so its calls have names as well (`in_graph`).

A draw by other means (dropout inside fused attention, a user's own `torch.rand`) can't be keyed by
sample. Its generators are seeded by (seed, update, first sample of the micro-batch): another
partition draws other masks of the same distribution, the same partition draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError, check_seed
from lbaccel.randomness.ahead import Elements, KeysAhead, KeysOf
from lbaccel.randomness.draws import (
    ALL_KEPT,
    COMMON,
    REPLACED,
    Keys,
    bits_for,
    first_bits,
    halves,
    keep_mask,
)
from lbaccel.randomness.generators import generator_states, restore_generators, seed_generators
from lbaccel.randomness.in_graph import GraphCall, Masked, begin_places, register
from lbaccel.randomness.keys import GOLDEN, MULTIPLIERS, SHIFTS, hashed_on, keyed_hash
from lbaccel.randomness.layouts import Layouts, NotLearned, SamplePlace

# One number for each kind of key, so that no two share a hash.
OUTSIDE, MICRO_BATCH, MASKS, WHOLE, ONE_CALL = range(1, 6)
# Keys of so many calls and samples are hashed together: a few dozen kernels in place of thousands.
CALLS_AT_ONCE, SAMPLES_AT_ONCE = 64, 256
ALL_SAMPLES = -1  # in place of a position, where one draw serves all samples


class KeyedRandomness:
    """Random draws of the running update, as functions of (seed, update, sample position).

    Args:
        seed: of every draw; with another one, the same update has other masks.
        device: where the network runs.
        layouts: where the tensors of the calls hold their samples; None goes by their rows.

    Raises:
        InputError: a seed that is no whole number from 0 to 2^64 - 1.

    >>> import torch
    >>> from lbaccel.batch.plan import MicroBatch
    >>> randomness, drop = KeyedRandomness(0, torch.device("cpu")), torch.nn.Dropout(0.5)
    >>> def run(*micro_batches):
    ...     rows = []
    ...     for m in micro_batches:
    ...         with randomness.forward(m):
    ...             rows.append(drop(torch.ones(m.num_samples, 3)))
    ...     return torch.cat(rows)
    >>> with randomness.update(0):
    ...     torch.equal(run(MicroBatch(0, (8,))), run(MicroBatch(0, (3,)), MicroBatch(3, (5,))))
    True
    """

    def __init__(self, seed: int, device: torch.device, layouts: Layouts | None = None) -> None:
        self.seed, self.device, self.layouts = check_seed("seed", seed), device, layouts
        self.must_learn = False  # a call without layouts raises `NotLearned`
        self._update = 0
        self._micro_batch: MicroBatch | None = None
        self._samples = 0  # of it
        self._hashed = -1, keyed_hash()  # of an update, what seeds its micro-batches begin with
        self._recomputing = False
        self._next = -1  # number of the next call, where it runs `again`
        self._whole = False
        self._watch: Callable[[Tensor, int], object] | None = None
        self._calls: dict[int, int] = {}  # token of a call to its number
        self._in_graphs: dict[GraphCall, int] = {}  # numbers of calls in compiled graphs
        self._rows: dict[int, KeysOf] = {}  # of the micro-batch, by block of calls
        self._ahead: dict[Any, KeysAhead] = {}  # by update too, of samples from one on
        self._elements = Elements()
        self._keying = False  # the functions of `REPLACED` are their twins
        self.run, self.order = 0, torch.empty(0)  # as the graphs of torch.compile get them
        register(self)
        self.in_graph = False  # a graph may hold the calls: each of them has keys
        # Made once, and closed to torch.compile: it compiles anew for each function and number.
        self.keys: Any = torch.compiler.disable(self._next_keys)
        self._keyed = [(o, name, make(self, getattr(o, name))) for o, name, make in REPLACED]

    @contextmanager
    def update(self, index: int) -> Iterator[None]:
        """Inside, every generator is a function of (seed, update); after it, as it was before."""
        states = generator_states(self.device)
        self._update = index
        seed_generators(int(keyed_hash(self.seed, OUTSIDE, index)), self.device)
        try:
            with self._replaced():  # once: outside of a micro-batch they have no keys
                yield
        finally:
            self._ahead = {}
            self._elements.forget()
            restore_generators(states, self.device)

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, calls for masks draw by sample, in forward and recompute.

        Raises:
            NotLearned: it called for other masks than `layouts` has, and did not fail otherwise.
        """
        self._micro_batch, self._samples = micro_batch, micro_batch.num_samples
        self._calls, self._rows, self._in_graphs = {}, {}, {}
        learned = self.layouts
        self.in_graph = self.must_learn if learned is None else learned.all_known
        begin_places()
        if self._hashed[0] != self._update:
            self._hashed = self._update, keyed_hash(self.seed, MICRO_BATCH, self._update)
        seed_generators(int(hashed_on(self._hashed[1], micro_batch.start)), self.device)
        try:
            with self._replaced():
                yield
            if self.layouts is not None and len(self._calls) != len(self.layouts.places):
                learned = len(self.layouts.places)
                raise NotLearned(f"{len(self._calls)} in place of {learned}")
        finally:
            self._micro_batch, self._recomputing, self.in_graph = None, False, False
            self._rows = {}

    def preview(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """The draws of `forward`, which come again there."""
        return self.forward(micro_batch)

    @contextmanager
    def whole(self, num_samples: int, *, counts: bool) -> Iterator[None]:
        """Inside, generators are a function of (seed, update), and all samples draw together."""
        seed_generators(int(keyed_hash(self.seed, WHOLE, self._update)), self.device)
        before, self.in_graph = self.in_graph, False
        self._whole = True
        try:
            yield
        finally:
            self._whole, self.in_graph = False, before

    @contextmanager
    def again(self, draw: int, seed: int = -1) -> Iterator[None]:
        """Inside, calls take the numbers from `draw` on; generators follow `seed`, if it is one.

        For calls of a forward that run once more, one by one, within the micro-batch's `replay`.
        """
        before, self._next = self._next, draw
        if seed >= 0:
            assert self._micro_batch is not None
            key = keyed_hash(self.seed, ONE_CALL, self._update, self._micro_batch.start, seed)
            seed_generators(int(key), self.device)
        try:
            yield
        finally:
            self._next = before

    @contextmanager
    def replay(self, micro_batch: MicroBatch) -> Iterator[None]:
        """As `forward`, where a part of its calls runs, each `again`."""
        self._micro_batch, self._samples = micro_batch, micro_batch.num_samples
        self._rows = {}
        try:
            yield
        finally:
            self._micro_batch, self._rows = None, {}

    @property
    def num_calls(self) -> int:
        """Calls for masks in the running forward, so far."""
        return len(self._calls)

    def skip(self, count: int) -> None:
        """Count so many calls for masks that are not drawn now."""
        for _ in range(count):
            self.call_number()

    @contextmanager
    def watching(self, watch: Callable[[Tensor, int], object]) -> Iterator[None]:
        """Inside, masks keep all; `watch` is told each tensor, and how many dimensions differ."""
        self._watch = watch
        try:
            with self._replaced():
                yield
        finally:
            self._watch = None

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        if self._keying:
            yield
            return
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in self._keyed]
        try:
            self._keying = True
            for owner, name, keyed in self._keyed:
                setattr(owner, name, keyed)
            yield
        finally:
            self._keying = False
            for owner, name, original in plain:
                setattr(owner, name, original)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, a call is a recompute's and must be one of the forward's."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def drawn(
        self, of: GraphCall, x: Masked, covered: int, *, keep: float | None, each: tuple[int, ...]
    ) -> Tensor:
        """The mask of a call in a compiled graph, or its bits where `keep` is None.

        Its memory is its own: a compiler writes into it.

        Args:
            of: its place in the run of the graph.
            x: what is masked.
            covered: its leading dimensions with draws of their own.
            keep: probability of True.
            each: as in `draws.bits_of`.

        Returns:
            Bool or int32 [*x.shape[:covered], *each or 1, ...], contiguous.
        """
        found = self._next_keys(x, covered, keep, of=of)
        assert found is not None
        if found.mask is not None:
            return found.mask.clone()
        bits = bits_for(found, x, covered, each)
        if keep is None:
            return bits.clone(memory_format=torch.contiguous_format)
        return keep_mask(bits, keep).contiguous()

    def _next_keys(
        self,
        x: Tensor | Masked,
        covered: int,
        keep: float | None = None,
        scale: float | None = None,
        *,
        of: GraphCall | None = None,
    ) -> Keys | None:
        """Keys of the samples of the next call, or one common to the update; None: no keys.

        Args:
            x: what is masked.
            covered: its leading dimensions with draws of their own.
            keep: of `keep_mask`, where the mask itself is wanted and may be made ahead.
            scale: that the mask is then multiplied by.
            of: the call in a compiled graph.

        Raises:
            NotLearned: the call is not one of those that `layouts` holds.
        """
        if self._watch is not None:
            assert isinstance(x, Tensor)  # no graph holds calls that are watched
            self._watch(x, covered)
            none = torch.zeros(1, 1, dtype=torch.int32, device=x.device)
            return Keys(none, none, none, 0, ALL_KEPT, 1)
        if self._whole or self._micro_batch is None:
            return None
        samples = self._samples
        if self.layouts is not None:
            call = self.call_number() if of is None else self._number_in_graph(of)
            place = self.layouts.place(call, x)
        elif self.must_learn:
            raise NotLearned("none was learned")
        else:
            place = SamplePlace.by_rows(x, samples)
            call = self.call_number() if place.known else 0
        if not place.known:
            return None
        if place.dim is None or place.dim >= covered:
            h = torch.full((1,), _signed(self._base()), dtype=torch.int64, device=x.device)
            low, high = halves(_chain(_chain(h, ALL_SAMPLES), call)[None])
            return Keys(low, high, first_bits(low, high), 0, COMMON, 1)
        runs = place.runs_of(x, samples)
        block, row = divmod(call, CALLS_AT_ONCE)
        keys = self._rows.get(block)
        if keys is None:
            keys = self._rows[block] = self._keys_of(block, self._micro_batch, x.device)
        if keep is not None and place.dim == 0 and runs == 1:
            mask = keys.mask(row, x, covered, keep=keep, scale=scale)
            if mask is not None:
                return Keys(keys.low, keys.high, keys.first, row, 0, 1, mask)
        count = math.prod(x.shape[:covered]) // samples
        elements = self._elements.of(count, x.device)
        return Keys(keys.low, keys.high, keys.first, row, place.dim, runs, None, elements)

    def _keys_of(self, block: int, micro_batch: MicroBatch, device: torch.device) -> KeysOf:
        """The keys of a block of calls for a micro-batch, hashed for the next ones as well."""
        samples, place = micro_batch.num_samples, (self._update, block)
        ahead = self._ahead.get(place)
        found = None if ahead is None else ahead.of(micro_batch.start, samples)
        if found is None:
            count = max(samples, SAMPLES_AT_ONCE)
            positions = torch.arange(micro_batch.start, micro_batch.start + count, device=device)
            calls = torch.arange(CALLS_AT_ONCE, device=device) + block * CALLS_AT_ONCE
            h = _chain(torch.full_like(positions, _signed(self._base())), positions)
            keys = _chain(h[None].repeat(CALLS_AT_ONCE, 1), calls[:, None])
            ahead = self._ahead[place] = KeysAhead(keys, micro_batch.start)
            found = ahead.of(micro_batch.start, samples)
            assert found is not None
        return found

    def _base(self) -> int:
        return int(keyed_hash(self.seed, MASKS, self._update))

    def call_number(self) -> int:
        """Number of this call among the micro-batch's, the same in forward and recompute."""
        if self._next >= 0:
            self._next += 1
            return self._next - 1
        token = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        if token not in self._calls:
            if self._recomputing:
                raise InputError(
                    "a recompute in the backward pass calls for a mask that its forward did not "
                    "draw, so its gradient would be wrong: the random state was not put back. Use "
                    "activation checkpointing with preserve_rng_state=True, such as "
                    "apply_activation_checkpointing(model)."
                )
            self._calls[token] = len(self._calls)
        return self._calls[token]

    def _number_in_graph(self, of: GraphCall) -> int:
        """`call_number`, which a call keeps where the compiler runs it again."""
        if of not in self._in_graphs:
            self._in_graphs[of] = self.call_number()
        return self._in_graphs[of]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _chain(h: Tensor, part: Tensor | int) -> Tensor:
    """One step of `keyed_hash` on int64 tensors, which wrap as uint64 do; in place in `h`."""
    h.add_(part).add_(1).mul_(_signed(GOLDEN))
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        logical = (h >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # >> keeps the sign
        h.bitwise_xor_(logical)
        if multiplier != 1:
            h.mul_(_signed(multiplier))
    return h
