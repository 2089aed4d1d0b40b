"""Which runs of a chain to recompute: the least time at a peak that fits, by dynamic programming.

A plan is a list of disjoint runs [i, j] of linked units. A run keeps its input and its output in
forward, and is recomputed once, whole, when the backward pass comes to it. With P_i the bytes kept
before unit i, and s, o, g, f, b the `UnitCost` of a unit, the peak in executed order is the largest
of

    P_i + f_i, P_i + b_i                                     unit i is not recomputed
    P_i + s_i + ... + s_(k-1) + max(f_k + o_j, b_k)          for k in a run [i, j]
    P_end + head, elsewhere

where P grows by s_i + g_i over a unit and by o_j + g_j over a run. Each bound is P_i plus a
constant of the choice, so of two plans for the units before i, the one that keeps no less and costs
no less can be dropped: the front of (bytes kept, seconds) at each unit holds the optimum. It is
Beaumont et al. 2019 (arXiv 1911.13214) for runs that are recomputed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbaccel.planning.chain import ChainCost, Unit

MOST_LABELS = 256  # of a front; more are thinned, which can only cost time and never the budget

Run = tuple[int, int]  # first and last unit


@dataclass(frozen=True)
class _Label:
    kept: int
    seconds: float
    run: Run | None  # the choice that ended here
    before: _Label | None


def predicted_peak(chain: ChainCost, runs: Sequence[Run]) -> int:
    """Peak bytes of the update with `runs` recomputed, by the equations above."""
    kept, peak, at = chain.before, chain.elsewhere, 0
    by_start = dict(runs)
    while at < len(chain.units):
        last = by_start.get(at)
        peak = max(peak, kept + _need(chain, at, last))
        kept += _keeps(chain, at, last)
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
    fronts: list[list[_Label]] = [[] for _ in range(n + 1)]
    fronts[0] = [_Label(chain.before, 0.0, None, None)]
    for at in range(n):
        front = fronts[at] = _thinned(_front(fronts[at]))
        for last, need, keeps, seconds in _choices(chain, units, forward_seconds, at):
            run = None if last is None else (at, last)
            target = fronts[at + 1 if last is None else last + 1]
            for label in front:  # in order of bytes kept
                if label.kept + need > budget:
                    break
                target.append(_Label(label.kept + keeps, label.seconds + seconds, run, label))
    done = [label for label in fronts[n] if label.kept + chain.head <= budget]
    if not done:
        return None
    label: _Label | None = min(done, key=lambda found: (found.seconds, found.kept))
    runs = []
    while label is not None:
        if label.run is not None:
            runs.append(label.run)
        label = label.before
    return runs[::-1]


def _choices(
    chain: ChainCost, units: Sequence[Unit], forward_seconds: Sequence[float], at: int
) -> list[tuple[int | None, int, int, float]]:
    """(last unit of the run or None, need, keeps, seconds) of what can be done with unit `at`."""
    found: list[tuple[int | None, int, int, float]] = [
        (None, _need(chain, at, None), _keeps(chain, at, None), 0.0)
    ]
    if not units[at].starts:
        return found
    seconds = 0.0
    for last in range(at, len(units)):
        seconds += forward_seconds[last]
        found.append((last, _need(chain, at, last), _keeps(chain, at, last), seconds))
        if not units[last].links:
            break
    return found


def _need(chain: ChainCost, first: int, last: int | None) -> int:
    """Most bytes beyond what is kept before unit `first`, while it or its run is computed."""
    if last is None:
        return max(chain.units[first].forward, chain.units[first].backward)
    result, inside, most = chain.units[last].output, 0, 0
    for unit in chain.units[first : last + 1]:
        most = max(most, inside + max(unit.forward + result, unit.backward))
        inside += unit.saved
    return most


def _keeps(chain: ChainCost, first: int, last: int | None) -> int:
    if last is None:
        return chain.units[first].saved + chain.units[first].gap
    return chain.units[last].output + chain.units[last].gap


def _front(labels: list[_Label]) -> list[_Label]:
    """The labels that no other beats in both, in order of bytes kept."""
    front: list[_Label] = []
    for label in sorted(labels, key=lambda found: (found.kept, found.seconds)):
        if not front or label.seconds < front[-1].seconds:
            front.append(label)
    return front


def _thinned(front: list[_Label]) -> list[_Label]:
    """At most `MOST_LABELS`, evenly; each is a real plan, so its figures stay exact."""
    if len(front) <= MOST_LABELS:
        return front
    step = (len(front) - 1) / (MOST_LABELS - 1)
    return [front[round(i * step)] for i in range(MOST_LABELS)]
