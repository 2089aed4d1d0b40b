"""Which frontiers stay on the host: the passes of least work in the memory that is given.

The frontier F_l of a level l holds the values that it starts from, of all micro-batches. Those of
level 0 (the data) and of the last level are always there when they are needed. For the others, a
schedule keeps some from the forward passes on. Between two kept ones, a < b, the backward passes
either

    store      run a .. b - 2 forward once more and store what lies between,
    recompute  run from a for each level anew and store nothing.

A value lives from the level that makes it to the last one that reads it, so keeping b after a takes
the bytes of F_b without F_a, whatever was kept before. With P those kept so far and G_l the
gradients that wait at level l, a choice (a, b) needs at most

    P + max over a < l <= b of |F_l without F_a|                  in forward
    P + |F_(a+1) + .. + F_(b-1) without F_a| + max G              in backward, stored
    P + max G                                                     in backward, recomputed

with max G over a .. b; the last level takes P + G_L. To each comes the share of one micro-batch,
whose old and new values lie there together for a moment. The front of (bytes kept, work) at each
level holds the optimum, as for `best_runs` of the planner.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from lbaccel.errors import InputError
from lbaccel.update.global_norm.tape import Tape

MOST_PLANS = 64  # of a front; more are thinned, which costs time and never the budget


@dataclass(frozen=True)
class Schedule:
    """The kept levels, ascending and with the first and the last, and how the rest comes back."""

    kept: tuple[int, ...]
    stored: tuple[bool, ...]  # of each gap between two kept levels
    host_bytes: int  # at most, on this rank
    work: float = 0.0  # of the forward that runs again, over that of one forward

    def start_of(self, level: int) -> tuple[int, bool]:
        """The kept level from which `level` comes back, and whether its gap is stored."""
        at = bisect_right(self.kept, level) - 1
        return self.kept[at], at < len(self.stored) and self.stored[at]


@dataclass(frozen=True)
class Chain:
    """Bytes and work of the levels of an update on one rank.

    Args:
        lives: bytes of the values by (level that makes them, last level that reads them); the data
            are made at -1.
        gradients: bytes of the gradients that wait at each level.
        work: of each level's forward.
        one: bytes of the largest micro-batch's share, which may lie there twice for a moment.
    """

    lives: Mapping[tuple[int, int], int]
    gradients: tuple[int, ...]
    work: tuple[float, ...]
    one: int = 0
    _born: np.ndarray = field(init=False, repr=False, compare=False)
    _died: np.ndarray = field(init=False, repr=False, compare=False)
    _size: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [(born, died, size) for (born, died), size in self.lives.items() if died > born]
        table = np.array(rows, np.int64).reshape(-1, 3)
        for name, column in zip(("_born", "_died", "_size"), table.T, strict=True):
            object.__setattr__(self, name, column)

    @property
    def depth(self) -> int:
        """The last level."""
        return len(self.work) - 1

    def scaled(self, samples: float, micro_batch: float) -> Chain:
        """With so many times the samples, in micro-batches of so many times the one."""
        return Chain(
            {life: round(samples * size) for life, size in self.lives.items()},
            tuple(round(samples * size) for size in self.gradients),
            tuple(samples * work for work in self.work),
            round(micro_batch * self.one),
        )

    def bytes_of(self, first: int, last: int, *, without: int | None = None) -> int:
        """|F_first + .. + F_last|, without F_without."""
        read = np.maximum(first, self._born + 1) <= np.minimum(last, self._died)
        if without is not None:
            read &= ~((self._born < without) & (without <= self._died))
        return int(self._size[read].sum())


def chain_of(tapes: Sequence[Tape]) -> Chain:
    """Of the micro-batches of a rank, which have the same number of levels."""
    lives: Counter[tuple[int, int]] = Counter()
    depth = tapes[0].depth
    gradients, work, one = [0] * (depth + 1), [0.0] * (depth + 1), 0
    counts = Counter(map(id, tapes))
    for tape in {id(tape): tape for tape in tapes}.values():
        count, most = counts[id(tape)], 0
        for life, size in tape.lives.items():
            lives[life] += count * size
        for level in range(depth + 1):
            waiting = tape.gradient_bytes[level]
            gradients[level] += count * waiting
            most = max(most, tape.frontier_bytes[level] + waiting)
            work[level] += count * sum(call.cost for call in tape.levels[level])
        one = max(one, most)
    return Chain(lives, tuple(gradients), tuple(work), one)


def best_schedule(chain: Chain, host_bytes: int | None) -> Schedule:
    """The schedule of least work whose bytes are at most `host_bytes`; None: no limit.

    Raises:
        InputError: not even the schedule of fewest bytes fits.
    """
    if host_bytes is None:
        kept = tuple(range(chain.depth + 1))
        return _counted(chain, kept, (True,) * chain.depth)
    found = _search(chain, host_bytes)
    if found is not None:
        return found
    low, high = host_bytes, best_schedule(chain, None).host_bytes
    while high - low > high // 200 + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _search(chain, middle) is None else (low, middle)
    raise InputError(
        f"BatchNorm over the whole batch keeps at least {high / 2**30:.3g} GiB of a rank's samples "
        f"on the host between its passes, and {host_bytes / 2**30:.3g} GiB are given. Give more, "
        "use more ranks or a smaller global batch, or a number for norm_batch_size."
    )


def bytes_needed(chain: Chain, kept: Sequence[int], stored: Sequence[bool]) -> int:
    """Most bytes on the host, by the equations above."""
    held = peak = chain.bytes_of(0, 0)
    for (a, b), how in zip(pairwise(kept), stored, strict=True):
        choice = next(c for c in _choices(chain, a) if (c.end, c.stored) == (b, how))
        peak, held = max(peak, held + choice.need), held + choice.keeps
    return max(peak, held + chain.gradients[-1]) + chain.one


def _counted(chain: Chain, kept: tuple[int, ...], stored: tuple[bool, ...]) -> Schedule:
    return Schedule(kept, stored, bytes_needed(chain, kept, stored))


@dataclass(frozen=True)
class _Gap:
    """A kept level that follows another one, and how the gap between them comes back."""

    end: int  # the next kept level
    stored: bool
    keeps: int  # bytes
    need: int  # most bytes beyond those kept
    work: float


@dataclass(frozen=True)
class _Plan:
    """The levels kept so far, from the first on."""

    held: int
    work: float
    kept: tuple[int, ...]
    stored: tuple[bool, ...]

    def then(self, choice: _Gap) -> _Plan:
        return _Plan(
            self.held + choice.keeps,
            self.work + choice.work,
            (*self.kept, choice.end),
            (*self.stored, choice.stored),
        )


def _search(chain: Chain, host_bytes: int) -> Schedule | None:
    budget = host_bytes - chain.one
    fronts: list[list[_Plan]] = [[] for _ in range(chain.depth + 1)]
    fronts[0] = [_Plan(chain.bytes_of(0, 0), 0.0, (0,), ())]
    for a in range(chain.depth):
        front = _front(fronts[a])
        for choice in _choices(chain, a):
            fronts[choice.end] += [p.then(choice) for p in front if p.held + choice.need <= budget]
    last = chain.gradients[-1]
    ends = [plan for plan in fronts[-1] if plan.held + last <= budget]
    if not ends:
        return None
    best = min(ends, key=lambda plan: (plan.work, plan.held))
    found = _counted(chain, best.kept, best.stored)
    return replace(found, work=best.work / (sum(chain.work) or 1.0))


def _choices(chain: Chain, a: int) -> Iterator[_Gap]:
    forward, linear, quadratic = 0, 0.0, 0.0
    gradients = chain.gradients[a]
    for b in range(a + 1, chain.depth + 1):
        keeps = chain.bytes_of(b, b, without=a)
        forward, gradients = max(forward, keeps), max(gradients, chain.gradients[b])
        if b == a + 1:
            yield _Gap(b, True, keeps, max(forward, gradients), 0.0)
            continue
        linear += chain.work[b - 2]
        quadratic += sum(chain.work[a : b - 1])
        between = chain.bytes_of(a + 1, b - 1, without=a)
        yield _Gap(b, True, keeps, max(forward, between + gradients), linear)
        yield _Gap(b, False, keeps, max(forward, gradients), quadratic)


def _front(plans: list[_Plan]) -> list[_Plan]:
    """Those that no other beats in both, in order of bytes held; at most `MOST_PLANS`."""
    best: list[_Plan] = []
    for plan in sorted(plans, key=lambda p: (p.held, p.work)):
        if not best or plan.work < best[-1].work:
            best.append(plan)
    if len(best) > MOST_PLANS:
        step = (len(best) - 1) / (MOST_PLANS - 1)
        best = [best[round(i * step)] for i in range(MOST_PLANS)]
    return best
