"""The fastest candidate whose predicted peak fits, for one contract on one device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lbaccel.errors import InputError
from lbaccel.planning.candidates import Candidate, Checkpointing, Estimate, MemoryFormat, Segments
from lbaccel.planning.cost.chain import ChainCost
from lbaccel.planning.estimate import Estimator, Untraceable
from lbaccel.planning.lines import Lines
from lbaccel.planning.segments import (
    Link,
    Parts,
    Run,
    best_parts,
    extra_seconds,
    sent_bytes,
)

FASTER = 0.97  # another layout must be this much faster to be taken
# Of micro-batches whose times are within this, a GPU takes the largest: what the model leaves out
# falls with the size. A CPU takes the smallest: what it leaves out is how much the caches hold.
PLATEAU = {"cuda": 1.02, "cpu": 1.03}
LADDER = 1.25
MOST_TRIES = 4  # traces of one search
SLACK = 0.03  # of the budget: near enough
WORTH = 0.98  # recompute for a larger micro-batch must promise this much


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """The settings that the user has decided; None leaves a setting to the search."""

    micro_batch_size: int | None = None
    memory_format: MemoryFormat | None = None
    checkpointing: Checkpointing | None = None  # "none" or "full"
    host_bytes: int = 0  # that activations may take on the host; 0: none is offloaded

    @property
    def chooses_parts(self) -> bool:
        """Whether blocks may be recomputed or offloaded one by one."""
        return self.checkpointing is None or (self.checkpointing == "none" and self.host_bytes > 0)


@dataclass(frozen=True)
class Choice:
    """A candidate, what it costs, and the seconds of an update of this rank."""

    candidate: Candidate
    estimate: Estimate
    seconds: float
    fits: bool


class Search:
    """Looks for the fastest candidate at most `budget` bytes large.

    Args:
        estimator: of the network and the contract.
        budget: bytes of one device.
        pinned: what is not to be chosen.
    """

    def __init__(self, estimator: Estimator, budget: int, pinned: Pinned) -> None:
        self.estimator, self.budget, self.pinned = estimator, budget, pinned
        plan = estimator.plan
        self.unit = plan.group_size
        groups = plan.num_groups(plan.global_batch_size)
        self.most = -(-groups // plan.world_size) * self.unit
        self.lines = Lines(estimator, unit=self.unit, most=self.most)

    def run(self) -> Choice:
        """The fastest plan that fits, or else the smallest there is (`fits` False)."""
        found = self._run()
        if not self.pinned.host_bytes or self.pinned.checkpointing == "none":
            return found
        # An offload has to beat the whole search without it, whatever the traces of either miss.
        without = Search(self.estimator, self.budget, replace(self.pinned, host_bytes=0)).run()
        if not (found.fits or without.fits):
            return min(without, found, key=lambda choice: choice.estimate.peak)
        return min(without, found, key=lambda choice: (not choice.fits, choice.seconds))

    def _run(self) -> Choice:
        layout = self.pinned.memory_format or self._faster_layout()
        if self.pinned.checkpointing == "full":
            found = self._fitting(layout, "full")
        else:
            found = self._fitting(layout, "none")
            if self.pinned.chooses_parts:
                found = self._with_segments(layout, found)
        return self._not_slower(found or self._smallest(layout))

    def _not_slower(self, found: Choice) -> Choice:
        """`found`, or what was traced on the way, fits, and is faster by more than `PLATEAU`."""
        pinned = self.pinned
        traced = [
            self.choice(candidate)
            for candidate in self.estimator.traced()
            if pinned.micro_batch_size in (None, candidate.micro_batch_size)
            and pinned.memory_format in (None, candidate.memory_format)
            and pinned.checkpointing in (None, candidate.checkpointing)
            and (pinned.host_bytes or not candidate.offload)
        ]
        best = min((c for c in traced if c.fits), key=lambda c: c.seconds, default=None)
        if best is None or (
            found.fits and found.seconds <= PLATEAU[self.estimator.device.kind] * best.seconds
        ):
            return found
        return best

    def choice(self, candidate: Candidate) -> Choice:
        """The cost of `candidate`, and whether it fits the budget."""
        estimate = self.estimator.estimate(candidate)
        steps = self.most / min(candidate.micro_batch_size, self.most)  # the last may be short
        seconds = steps * estimate.micro_step_seconds + estimate.commit_seconds
        fits = estimate.peak <= self.budget
        if candidate.offload:
            fits = fits and estimate.host_bytes <= self.pinned.host_bytes
        return Choice(candidate, estimate, seconds, fits)

    def with_every_block(self, candidate: Candidate) -> list[Choice]:
        """`candidate` with the model's own blocks recomputed; none for a model that has none."""
        try:
            return [self.choice(replace(candidate, checkpointing="full"))]
        except Untraceable:
            raise
        except InputError:
            return []

    def alike(self, candidate: Candidate) -> Choice:
        """`candidate`, in smaller micro-batches where it does not fit; itself where none does."""
        asked = self.choice(candidate)
        if asked.fits or self.pinned.micro_batch_size is not None:
            return asked
        return self._fitting(candidate.memory_format, candidate.checkpointing) or asked

    def _faster_layout(self) -> MemoryFormat:
        size = self.lines.sizes[0]
        plain = self.estimator.survey(size)
        if plain.by_layout < (1 - FASTER) * plain.seconds:
            return "contiguous"  # however fast the other is, it can't gain that much
        turned = self.estimator.estimate(Candidate(size, "channels_last")).first_step_seconds
        return "channels_last" if turned < FASTER * plain.seconds else "contiguous"

    def _ladder(self, most: int) -> list[int]:
        """Sizes from `most` down, in whole groups, each as even as its number of steps allows."""
        sizes: list[int] = []
        size = most
        while size > self.unit:
            sizes.append(self._even(size))
            size = min(math.floor(size / LADDER / self.unit) * self.unit, size - self.unit)
        return sorted({*sizes, self.unit}, reverse=True)

    def _even(self, size: int) -> int:
        """The least size with as many micro-steps as `size` has."""
        groups = self.most // self.unit
        return -(-groups // self.lines.steps(size)) * self.unit

    def _fitting(self, layout: MemoryFormat, how: Checkpointing) -> Choice | None:
        """The fastest micro-batch that fits, all else given; None where none does."""
        pinned = self.pinned.micro_batch_size
        if pinned is not None:
            choice = self.choice(Candidate(pinned, layout, how))
            return choice if choice.fits else None
        a, b = self.lines.sizes
        first, second = self.lines.both(layout, how)
        slope = max((second.peak - first.peak) / (b - a) if b > a else 0.0, 1.0)
        guess = self._whole(a + (self.budget - first.peak) / slope)
        if guess >= self.unit:
            choice = self._fastest_below(layout, how, guess)
            if choice.fits and choice.candidate.micro_batch_size < self._even(guess):
                return choice  # not bound by memory
        largest = self._largest(layout, how, guess)
        return None if largest is None else self._fastest_below(layout, how, largest)

    def _fastest_below(self, layout: MemoryFormat, how: Checkpointing, largest: int) -> Choice:
        """The fastest size of the ladder below `largest`, by the line through two traces.

        See `PLATEAU` for sizes that are about as fast.
        """
        ladder = self._ladder(largest)
        best = min(self.lines.seconds(layout, how, size) for size in ladder)
        plateau = PLATEAU[self.estimator.device.kind]
        size = self._of_alike(
            s for s in ladder if self.lines.seconds(layout, how, s) <= plateau * best
        )
        if not self.choice(Candidate(size, layout, how)).fits:
            size = largest
        # The line can miss what large tensors cost, so what was traced decides.
        sizes = {size, *(traced for traced in self.lines.sizes if traced <= size)}
        choices = {s: self.choice(Candidate(s, layout, how)) for s in sizes}
        least = min(choice.seconds for choice in choices.values())
        return choices[
            self._of_alike(s for s, found in choices.items() if found.seconds <= plateau * least)
        ]

    def _of_alike(self, sizes: Iterable[int]) -> int:
        return min(sizes) if self.estimator.device.kind == "cpu" else max(sizes)

    def _largest(self, layout: MemoryFormat, how: Checkpointing, guess: int) -> int | None:
        """The largest micro-batch that fits, or nearly, confirmed by a trace of its own.

        The peak is nearly a line in the size; a secant between a size that fits and one that does
        not finds where it crosses the budget.
        """
        a, b = self.lines.sizes
        first, second = self.lines.both(layout, how)
        known = {a: first.peak, b: second.peak}
        slope = max((second.peak - first.peak) / (b - a) if b > a else 0.0, 1.0)
        size = guess
        for _ in range(MOST_TRIES):
            if size < self.unit:
                break
            known[size] = self.choice(Candidate(size, layout, how)).estimate.peak
            fitting = [s for s, peak in known.items() if peak <= self.budget]
            above = [s for s, peak in known.items() if peak > self.budget]
            low, high = max(fitting, default=0), min(above, default=self.most + self.unit)
            slack = self.budget - known.get(low, 0)
            if high - low <= self.unit or (low and slack < SLACK * self.budget):
                break
            at = low or high
            slope = max((known[size] - known[a]) / (size - a), 1.0) if size != a else slope
            guess = self._whole(at + (self.budget - known[at]) / slope)
            size = min(max(guess, low + self.unit), high - self.unit)
        fitting = [s for s, peak in known.items() if peak <= self.budget]
        return max(fitting, default=None)

    def _whole(self, size: float) -> int:
        """The nearest size below that is whole groups, at most the rank's share."""
        return min(math.floor(size / self.unit) * self.unit, self.most)

    def _with_segments(self, layout: MemoryFormat, found: Choice | None) -> Choice | None:
        """A better choice with recompute or offload, or `found`: accumulating comes before both."""
        if not self.estimator.units:
            return found
        pinned = self.pinned.micro_batch_size
        if found is not None:
            if pinned is not None:
                return found
            floor = self.lines.seconds(layout, "none", self.most)
            if floor > WORTH * found.seconds:
                return found
        sizes = [pinned] if pinned is not None else self._ladder(self.most)
        promised = [(self._promised(layout, size, found), size) for size in sizes]
        for seconds, size in sorted(promised):
            if seconds == math.inf:
                break
            choice = self._recomputed(layout, size, self.budget)
            if choice is not None and (found is None or choice.seconds < WORTH * found.seconds):
                return choice
        return found

    def _promised(self, layout: MemoryFormat, size: int, found: Choice | None) -> float:
        """Seconds of an update with the best parts at `size`, untraced; inf: none is better."""
        plain = self.lines.seconds(layout, "none", size)
        limit = WORTH * found.seconds if found is not None else math.inf
        if plain >= limit:
            return math.inf
        chain, forward = self.lines.chain(layout, size)
        parts = self._best(chain, forward, self._target(layout), self.pinned.host_bytes)
        if parts is None:
            return math.inf
        extra = extra_seconds(forward, parts.recomputed) + self._copies(chain, parts.offloaded)
        seconds = plain + self.lines.steps(size) * extra
        return seconds if seconds < limit else math.inf

    def _best(
        self, chain: ChainCost, forward: Sequence[float], target: int, host: int
    ) -> Parts | None:
        """The best parts of a chain at a target, with so many bytes of the host."""
        link = Link(self.estimator.device.host_bandwidth, host) if host else None
        recomputes = self.pinned.checkpointing is None
        units = self.estimator.units
        return best_parts(chain, units, forward, target, link=link, recomputes=recomputes)

    def _copies(self, chain: ChainCost, offloaded: Sequence[Run]) -> float:
        """Seconds of a micro-step's copies to the host and back."""
        return Link(self.estimator.device.host_bandwidth, 0).seconds(sent_bytes(chain, offloaded))

    def _target(self, layout: MemoryFormat, budget: int | None = None) -> int:
        """The budget less what lies around the trace, such as the runtime's context."""
        around = self.lines.both(layout, "none")[0]
        return (self.budget if budget is None else budget) - (around.peak - around.traced)

    def _recomputed(self, layout: MemoryFormat, size: int, budget: int) -> Choice | None:
        """The best parts at `size`, confirmed by a trace.

        The chain's own figures leave out what lies around the trace (allocator, context), so the
        target moves by what the traces of its plans miss the budget by; likewise on the host.
        """
        host = self.pinned.host_bytes
        chain, forward = self.lines.chain(layout, size)
        target, best = self._target(layout, budget), None
        for _ in range(MOST_TRIES):
            parts = self._best(chain, forward, target, host)
            if parts is None:
                break
            choice = self.choice(self._candidate(size, layout, parts))
            if choice.estimate.host_bytes > self.pinned.host_bytes:
                share = self.pinned.host_bytes / choice.estimate.host_bytes
                host = int(share * sent_bytes(chain, parts.offloaded))
                continue
            room = budget - choice.estimate.peak
            if room >= 0 and (best is None or choice.seconds < best.seconds):
                best = choice
            if best is not None and (room < 0 or room < SLACK * budget):
                break
            target += room
        return best

    def _candidate(self, size: int, layout: MemoryFormat, parts: Parts) -> Candidate:
        recomputed = self._names(parts.recomputed)
        return Candidate(size, layout, recomputed or "none", self._names(parts.offloaded))

    def _names(self, runs: list[Run]) -> Segments:
        units = self.estimator.units
        return tuple(tuple(u.name for u in units[a : b + 1]) for a, b in runs)

    def sizes(self) -> list[int]:
        """The micro-batches of a sweep, the rank's whole share first."""
        return self._ladder(self.most)[::3]

    def _smallest(self, layout: MemoryFormat) -> Choice:
        """The plan of the least peak: one group at a time, and as much recompute as helps."""
        size = self.pinned.micro_batch_size or self.unit
        how = self.pinned.checkpointing
        if not self.pinned.chooses_parts:
            assert how is not None
            return self.choice(Candidate(size, layout, how))
        plain = Candidate(size, layout)
        found = [self.choice(plain), *(self.with_every_block(plain) if how is None else [])]
        best = min(found, key=lambda choice: choice.estimate.peak)
        if not self.estimator.units:
            return best
        chain, forward = self.lines.chain(layout, size)
        low, high, parts = 0, best.estimate.peak, None
        while high - low > 0.01 * high:
            middle = (low + high) // 2
            fitting = self._best(chain, forward, middle, self.pinned.host_bytes)
            low, high = (middle, high) if fitting is None else (low, middle)
            parts = fitting or parts
        if parts is not None:
            found.append(self.choice(self._candidate(size, layout, parts)))
        return min(found, key=lambda choice: choice.estimate.peak)
