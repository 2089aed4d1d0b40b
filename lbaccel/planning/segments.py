"""Which runs of a chain to recompute or offload: the least time that fits, by dynamic programming.

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

With a `Link` to the host, a run of linked units may be offloaded instead: its input and output stay
on the device, and the rest of what it saves goes to the host and comes back. With u the `stuck`
bytes of a unit, and U_k the sum of u and of the gaps above 0 over the units of the run before k,
its peak and what P grows by are

    P_i + U_k + (o_(k-1) if k > i) + max(f_k, b_k)      for k in the run [i, j]
    min(U_j + u_j + o_j, growth without offload) + g_j

and for the `sent` bytes of its units, and `sent_input` of all but the first, it takes the seconds
of two copies (they share the stream of the kernels, so nothing hides them) and as many bytes of the
host. Where the host has not room for all, its bytes are a third figure of a front's plans.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lbaccel.planning.cost.chain import ChainCost, Unit

MOST_PLANS = 256  # of a front; more are thinned, which can only cost time and never the budget

Run = tuple[int, int]  # first and last unit


PLAIN, RECOMPUTED, OFFLOADED = range(3)  # what becomes of a run


@dataclass(frozen=True)
class Link:
    """The way to the host's memory, for a plan that may offload."""

    bandwidth: float  # bytes a second, in either direction
    host_bytes: int  # that activations may take there

    def seconds(self, num_bytes: int) -> float:
        """Of a copy there and one back."""
        return 2 * num_bytes / self.bandwidth


@dataclass(frozen=True)
class Parts:
    """The runs of a chain that do not keep their activations on the device."""

    recomputed: list[Run]
    offloaded: list[Run]


@dataclass(frozen=True)
class _Front:
    """The plans for the units before one that no other beats, in order of bytes kept."""

    kept: NDArray[np.int64]
    seconds: NDArray[np.float64]
    starts: NDArray[np.int64]  # where the last choice of each began
    kinds: NDArray[np.int64]  # and what became of its run
    before: NDArray[np.int64]  # which plan of the front there it goes on from
    host: NDArray[np.int64]  # bytes there; 0 where there is room for all


@dataclass(frozen=True)
class _Choice:
    """A fate of the units from one to `last`, and its bytes and seconds."""

    kind: int
    last: int
    need: int  # most beyond what is kept before, while they are computed
    keeps: int
    seconds: float = 0.0
    host: int = 0


def predicted_peak(chain: ChainCost, runs: Sequence[Run], offloaded: Sequence[Run] = ()) -> int:
    """Peak bytes with `runs` recomputed and others `offloaded`, by the equations above."""
    kept, peak, at = chain.before, chain.elsewhere, 0
    kinds = {**dict.fromkeys(runs, RECOMPUTED), **dict.fromkeys(offloaded, OFFLOADED)}
    by_start = {run[0]: (run[1], kind) for run, kind in kinds.items()}
    while at < len(chain.units):
        last, kind = by_start.get(at, (at, PLAIN))
        costs = _offloads(chain, at) if kind == OFFLOADED else _costs(chain, at)
        found = next(c for c in costs if (c.last, c.kind) == (last, kind))
        peak, kept = max(peak, kept + found.need), kept + found.keeps
        at = last + 1
    return max(peak, kept + chain.head)


def sent_bytes(chain: ChainCost, offloaded: Sequence[Run]) -> int:
    """Bytes that `offloaded` runs send to the host in a micro-step."""
    units = chain.units
    return sum(
        units[i].sent + (units[i].sent_input if i > first else 0)
        for first, last in offloaded
        for i in range(first, last + 1)
    )


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
    found = best_parts(chain, units, forward_seconds, budget)
    return None if found is None else found.recomputed


def best_parts(
    chain: ChainCost,
    units: Sequence[Unit],
    forward_seconds: Sequence[float],
    budget: int,
    *,
    link: Link | None = None,
    recomputes: bool = True,
) -> Parts | None:
    """The runs to recompute and to offload in the least time at a peak of `budget`; None: none.

    Args:
        chain: bytes of the units.
        units: which links and starts are allowed.
        forward_seconds: of each unit.
        budget: bytes of the device.
        link: to the host; without, nothing is offloaded.
        recomputes: whether runs may be recomputed.
    """
    n = len(units)
    if chain.elsewhere > budget:
        return None
    nothing = np.zeros(1, int)
    start = _Front(np.array([chain.before]), np.zeros(1), nothing, nothing, nothing, nothing)
    arriving: list[list[_Front]] = [[] for _ in range(n + 1)]
    fronts: list[_Front] = []
    room = None if link is None or _has_room(chain, link) else link.host_bytes
    for at in range(n):
        front = start if at == 0 else _thinned(_best(arriving[at]))
        fronts.append(front)
        for choice in _choices(chain, units, forward_seconds, at, link, recomputes):
            kept = front.kept[: int(np.searchsorted(front.kept, budget - choice.need, "right"))]
            fitting = np.arange(len(kept))
            host = 0 if room is None else choice.host
            if host and room is not None:
                fitting = fitting[front.host[fitting] + host <= room]
            if len(fitting):
                arriving[choice.last + 1].append(
                    _Front(
                        front.kept[fitting] + choice.keeps,
                        front.seconds[fitting] + choice.seconds,
                        np.full(len(fitting), at),
                        np.full(len(fitting), choice.kind),
                        fitting,
                        front.host[fitting] + host,
                    )
                )
    end = start if n == 0 else _best(arriving[n])
    fitting = int(np.searchsorted(end.kept, budget - chain.head, side="right"))
    return _parts([*fronts, end], int(np.argmin(end.seconds[:fitting]))) if fitting else None


def _has_room(chain: ChainCost, link: Link) -> bool:
    """Whether the host takes whatever a plan sends, each unit's input included."""
    return sum(unit.sent + unit.sent_input for unit in chain.units) <= link.host_bytes


def _parts(fronts: Sequence[_Front], plan: int) -> Parts:
    """The runs of a plan of the last front, read backwards."""
    found: dict[int, list[Run]] = {PLAIN: [], RECOMPUTED: [], OFFLOADED: []}
    at = len(fronts) - 1
    while at > 0:
        front = fronts[at]
        start = int(front.starts[plan])
        found[int(front.kinds[plan])].append((start, at - 1))
        at, plan = start, int(front.before[plan])
    return Parts(found[RECOMPUTED][::-1], found[OFFLOADED][::-1])


def _choices(
    chain: ChainCost,
    units: Sequence[Unit],
    forward_seconds: Sequence[float],
    at: int,
    link: Link | None,
    recomputes: bool,
) -> Iterator[_Choice]:
    """All that is allowed with unit `at`, and the seconds of its recompute or of its copies."""
    seconds = 0.0
    for choice in _costs(chain, at):
        if choice.kind == PLAIN:
            yield choice
            continue
        last = choice.last
        allowed = recomputes and units[at].starts
        if not allowed or (last > at and not units[last - 1].links):
            break
        seconds += forward_seconds[last]
        yield replace(choice, seconds=seconds)
    if link is None:
        return
    for choice in _offloads(chain, at):
        if choice.last > at and not units[choice.last - 1].links:
            break
        if choice.host:
            yield replace(choice, seconds=link.seconds(choice.host))


def _costs(chain: ChainCost, at: int) -> Iterator[_Choice]:
    """Unit `at` as it is, then each run from it that may be recomputed; without seconds."""
    unit = chain.units[at]
    yield _Choice(PLAIN, at, max(unit.forward, unit.backward), unit.saved + unit.gap)
    inside = forward = backward = 0
    for last in range(at, len(chain.units)):
        unit = chain.units[last]
        forward = max(forward, inside + unit.forward)
        backward = max(backward, inside + unit.backward)
        inside += unit.saved
        need = max(2 * chain.state + forward + unit.output, chain.state + backward)
        yield _Choice(RECOMPUTED, last, need, chain.state + unit.output + unit.gap)


def _offloads(chain: ChainCost, at: int) -> Iterator[_Choice]:
    """Each run from unit `at` that may be offloaded; without seconds."""
    stuck = saved = need = sent = given = 0
    for last in range(at, len(chain.units)):
        unit = chain.units[last]
        need = max(need, stuck + given + max(unit.forward, unit.backward))
        stuck, saved, given = stuck + unit.stuck, saved + unit.saved, unit.output
        sent += unit.sent + (unit.sent_input if last > at else 0)
        keeps = min(stuck + unit.output, saved) + unit.gap
        yield _Choice(OFFLOADED, last, need, keeps, host=sent)
        stuck, saved = stuck + max(0, unit.gap), saved + unit.gap


def _best(parts: Sequence[_Front]) -> _Front:
    """The plans of `parts` that no other beats in all figures, in order of bytes kept."""
    if not parts:
        none = np.zeros(0, int)
        return _Front(none, np.zeros(0), none, none, none, none)
    whole = _Front(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in _Front.__annotations__
        )
    )
    order = np.lexsort((whole.host, whole.seconds, whole.kept))
    if whole.host.any():
        return _taken(whole, order[_unbeaten(whole.seconds[order], whole.host[order])])
    seconds = whole.seconds[order]
    faster = np.ones(len(order), bool)
    faster[1:] = seconds[1:] < np.minimum.accumulate(seconds)[:-1]
    return _taken(whole, order[faster])


def _unbeaten(seconds: NDArray[np.float64], host: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs no earlier one beats or equals in both."""
    found = np.zeros(len(seconds), bool)
    stairs_seconds: list[float] = []  # ascending, and the hosts of the same plans descend
    stairs_host: list[int] = []
    for i, (s, h) in enumerate(zip(seconds.tolist(), host.tolist(), strict=True)):
        at = bisect_right(stairs_seconds, s)
        if at and stairs_host[at - 1] <= h:
            continue
        found[i] = True
        first = at - 1 if at and stairs_seconds[at - 1] == s else at
        end = at
        while end < len(stairs_host) and stairs_host[end] >= h:
            end += 1
        stairs_seconds[first:end], stairs_host[first:end] = [s], [h]
    return found


def _thinned(front: _Front) -> _Front:
    """At most `MOST_PLANS`, evenly; each is a real plan, so its figures stay exact."""
    length = len(front.kept)
    if length <= MOST_PLANS:
        return front
    return _taken(front, np.linspace(0, length - 1, MOST_PLANS).round().astype(int))


def _taken(front: _Front, which: NDArray[np.int64]) -> _Front:
    return _Front(*(getattr(front, name)[which] for name in _Front.__annotations__))
