"""Which runs of a chain to recompute: the least time at a peak that fits, by dynamic programming.

A plan is a list of disjoint runs [i, j] of linked units. A run keeps its input and its output in
forward, and is recomputed once, whole, when the backward pass comes to it. With P_i the bytes kept
before unit i, and s, o, g, f, b the `UnitCost` of a unit, the peak in executed order is the largest
of

    P_i + f_i, P_i + b_i                                     unit i is not recomputed
    P_i + s_i + ... + s_(k-1) + max(f_k + o_j + 2r, b_k + r) for k in a run [i, j]
    P_end + head, elsewhere

where P grows by s_i + g_i over a unit and by o_j + g_j + r over a run, and r is the random state
that a run keeps (0 on a GPU: it lies on the host). Each bound is P_i plus a constant of the choice,
so of two plans for the units before i, the one that keeps no less and costs no less can be dropped:
the front of (bytes kept, seconds) at each unit holds the optimum. It is
Beaumont et al. 2019 (arXiv 1911.13214) for runs that are recomputed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lbaccel.planning.cost.chain import ChainCost, Unit

MOST_PLANS = 256  # of a front; more are thinned, which can only cost time and never the budget

Run = tuple[int, int]  # first and last unit


@dataclass(frozen=True)
class _Front:
    """The plans for the units before one that no other beats, in order of bytes kept."""

    kept: NDArray[np.int64]
    seconds: NDArray[np.float64]
    starts: NDArray[np.int64]  # where the last choice of each began
    runs: NDArray[np.bool_]  # and whether it was a run
    before: NDArray[np.int64]  # which plan of the front there it goes on from


def predicted_peak(chain: ChainCost, runs: Sequence[Run]) -> int:
    """Peak bytes of the update with `runs` recomputed, by the equations above."""
    kept, peak, at = chain.before, chain.elsewhere, 0
    by_start = dict(runs)
    while at < len(chain.units):
        last = by_start.get(at)
        need, keeps = next(cost[1:] for cost in _costs(chain, at) if cost[0] == last)
        peak, kept = max(peak, kept + need), kept + keeps
        at = at + 1 if last is None else last + 1
    return max(peak, kept + chain.head)


def extra_seconds(forward_seconds: Sequence[float], runs: Sequence[Run]) -> float:
    """Seconds that recompute adds to a micro-step."""
    return sum(sum(forward_seconds[first : last + 1]) for first, last in runs)


def best_runs(
    chain: ChainCost, units: Sequence[Unit], forward_seconds: Sequence[float], budget: int
) -> list[Run] | None:
    """The runs of least recompute whose predicted peak is at most `budget`; None: none fits.

    Args:
        chain: bytes of the units.
        units: which links and starts are allowed.
        forward_seconds: of each unit.
        budget: bytes.
    """
    n = len(units)
    if chain.elsewhere > budget:
        return None
    start = _Front(
        np.array([chain.before]), np.zeros(1), np.zeros(1, int), np.zeros(1, bool), np.zeros(1, int)
    )
    arriving: list[list[_Front]] = [[] for _ in range(n + 1)]
    fronts: list[_Front] = []
    for at in range(n):
        front = start if at == 0 else _thinned(_best(arriving[at]))
        fronts.append(front)
        for last, need, keeps, seconds in _choices(chain, units, forward_seconds, at):
            fitting = int(np.searchsorted(front.kept, budget - need, side="right"))
            if fitting:
                arriving[at + 1 if last is None else last + 1].append(
                    _Front(
                        front.kept[:fitting] + keeps,
                        front.seconds[:fitting] + seconds,
                        np.full(fitting, at),
                        np.full(fitting, last is not None),
                        np.arange(fitting),
                    )
                )
    end = start if n == 0 else _best(arriving[n])
    fitting = int(np.searchsorted(end.kept, budget - chain.head, side="right"))
    return _runs([*fronts, end], fitting - 1) if fitting else None


def _runs(fronts: Sequence[_Front], plan: int) -> list[Run]:
    """The runs of a plan of the last front, read backwards; on a front more bytes cost less."""
    found: list[Run] = []
    at = len(fronts) - 1
    while at > 0:
        front = fronts[at]
        start = int(front.starts[plan])
        if front.runs[plan]:
            found.append((start, at - 1))
        at, plan = start, int(front.before[plan])
    return found[::-1]


def _choices(
    chain: ChainCost, units: Sequence[Unit], forward_seconds: Sequence[float], at: int
) -> Iterator[tuple[int | None, int, int, float]]:
    """`_costs` of what is allowed with unit `at`, and the seconds of its recompute."""
    seconds = 0.0
    for last, need, keeps in _costs(chain, at):
        if last is not None:
            if not units[at].starts or (last > at and not units[last - 1].links):
                return
            seconds += forward_seconds[last]
        yield last, need, keeps, seconds


def _costs(chain: ChainCost, at: int) -> Iterator[tuple[int | None, int, int]]:
    """(last unit, need, keeps) of unit `at` without recompute (None), then of each run from it.

    `need` is the most beyond what is kept before, while the unit or its run is computed.
    """
    unit = chain.units[at]
    yield None, max(unit.forward, unit.backward), unit.saved + unit.gap
    inside = forward = backward = 0
    for last in range(at, len(chain.units)):
        unit = chain.units[last]
        forward = max(forward, inside + unit.forward)
        backward = max(backward, inside + unit.backward)
        inside += unit.saved
        need = max(2 * chain.state + forward + unit.output, chain.state + backward)
        yield last, need, chain.state + unit.output + unit.gap


def _best(parts: Sequence[_Front]) -> _Front:
    """The plans of `parts` that no other beats in both, in order of bytes kept."""
    if not parts:
        none = np.zeros(0, int)
        return _Front(none, np.zeros(0), none, np.zeros(0, bool), none)
    whole = _Front(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in _Front.__annotations__
        )
    )
    order = np.lexsort((whole.seconds, whole.kept))
    seconds = whole.seconds[order]
    faster = np.ones(len(order), bool)
    faster[1:] = seconds[1:] < np.minimum.accumulate(seconds)[:-1]
    return _taken(whole, order[faster])


def _thinned(front: _Front) -> _Front:
    """At most `MOST_PLANS`, evenly; each is a real plan, so its figures stay exact."""
    length = len(front.kept)
    if length <= MOST_PLANS:
        return front
    return _taken(front, np.linspace(0, length - 1, MOST_PLANS).round().astype(int))


def _taken(front: _Front, which: NDArray[np.int64]) -> _Front:
    return _Front(*(getattr(front, name)[which] for name in _Front.__annotations__))
