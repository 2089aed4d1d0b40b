from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbaccel.planning import segments
from lbaccel.planning.cost.chain import ChainCost, Unit, UnitCost
from lbaccel.planning.segments import (
    Link,
    best_parts,
    best_runs,
    extra_seconds,
    predicted_peak,
    sent_bytes,
)


def simulated_peak(chain, runs):
    """Live bytes at every moment of the update in executed order, one after the other.

    Written from the docstring of `lbaccel.planning.segments`; shares no code with it.
    """
    length = len(chain.units)
    recomputed = {i: run for run in runs for i in range(run[0], run[1] + 1)}
    moments, stack, live = [chain.elsewhere], [], chain.before
    for i, unit in enumerate(chain.units):  # forward
        first, last = recomputed.get(i, (i, i))
        if i == first:
            stack.append((i, live))  # P_i
        if i not in recomputed:
            moments.append(live + unit.forward)
            live += unit.saved + unit.gap
        elif i == last:  # the run's inside is gone again, its output stays
            live += unit.output + unit.gap
    moments.append(live + chain.head)
    assert sum(recomputed.get(i, (i, i))[1] - i + 1 for i, _ in stack) == length
    for i, kept in reversed(stack):  # backward
        if i not in recomputed:
            moments.append(kept + chain.units[i].backward)
            continue
        members = [chain.units[k] for k in range(i, recomputed[i][1] + 1)]
        inside = [kept]
        for unit in members:  # recompute, the gradient of the run's output being there
            moments.append(inside[-1] + unit.forward + members[-1].output)
            inside.append(inside[-1] + unit.saved)
        for unit in reversed(members):
            inside.pop()
            moments.append(inside[-1] + unit.backward)
    return max(moments)


def all_segmentations(units, at=0):
    """Every list of disjoint runs that begin where one may and cross linked units only."""
    if at == len(units):
        yield []
        return
    for rest in all_segmentations(units, at + 1):
        yield rest
    for last in range(at, len(units)):
        if units[at].starts and all(unit.links for unit in units[at:last]):
            for rest in all_segmentations(units, last + 1):
                yield [(at, last), *rest]


def seconds_of(seconds, runs):
    return sum(seconds[k] for first, last in runs for k in range(first, last + 1))


SMALL = st.integers(0, 6)  # ties
COSTS = st.builds(
    UnitCost,
    saved=SMALL | st.integers(0, 100),
    gap=st.just(0) | SMALL | st.integers(-3, -1),
    output=SMALL | st.integers(0, 40),
    forward=SMALL | st.integers(0, 150),
    backward=SMALL | st.integers(0, 150),
)


@st.composite
def chains(draw, longest=8):
    length = draw(st.integers(1, longest))
    # Mostly linked: where few are, there is nothing to choose.
    often = st.sampled_from([True, True, True, False])
    units = [Unit(str(i), links=draw(often), starts=draw(often)) for i in range(length)]
    chain = ChainCost(
        tuple(draw(COSTS) for _ in units), draw(SMALL), draw(SMALL), draw(st.integers(0, 60))
    )
    # Whole seconds, so that sums are exact in any order.
    return chain, units, [float(draw(st.integers(0, 5))) for _ in units]


@settings(deadline=None, max_examples=100)
@given(chains(longest=7))
def test_the_predicted_peak_is_the_simulated_one_for_every_segmentation(case):
    chain, units, _ = case
    for runs in all_segmentations(units):
        assert predicted_peak(chain, runs) == simulated_peak(chain, runs), runs


@settings(deadline=None, max_examples=300)
@given(chains(), st.data())
def test_the_best_runs_are_those_of_brute_force_over_all_segmentations(case, data):
    chain, units, seconds = case
    allowed = list(all_segmentations(units))
    peaks = [simulated_peak(chain, runs) for runs in allowed]
    # At, just below and just above what some segmentation takes.
    budget = data.draw(st.sampled_from(sorted(set(peaks)))) + data.draw(st.integers(-1, 1))
    fitting = [runs for runs, peak in zip(allowed, peaks, strict=True) if peak <= budget]
    found = best_runs(chain, units, seconds, budget)
    if not fitting:
        assert found is None
        return
    assert found in fitting
    least = min(seconds_of(seconds, runs) for runs in fitting)
    assert seconds_of(seconds, found) == least == extra_seconds(seconds, found)


@settings(deadline=None, max_examples=150)
@given(chains(), st.data())
def test_a_budget_is_met_to_the_byte(case, data):
    chain, units, seconds = case
    allowed = list(all_segmentations(units))
    peaks = {tuple(runs): simulated_peak(chain, runs) for runs in allowed}
    found = best_runs(chain, units, seconds, data.draw(st.sampled_from(sorted(peaks.values()))))
    assert found is not None
    exact = peaks[tuple(found)]
    again = best_runs(chain, units, seconds, exact)
    assert again is not None and peaks[tuple(again)] <= exact
    assert seconds_of(seconds, again) == seconds_of(seconds, found)
    alike = [r for r in allowed if seconds_of(seconds, r) == seconds_of(seconds, found)]
    if len(alike) == 1:  # no tie that another choice could win
        assert again == found
    below = best_runs(chain, units, seconds, exact - 1)
    assert below != found
    if below is not None:
        assert peaks[tuple(below)] < exact
        assert seconds_of(seconds, below) >= seconds_of(seconds, found)


@settings(deadline=None, max_examples=150)
@given(chains(), st.integers(2, 4), st.data())
def test_thinned_fronts_cost_time_and_never_the_budget(case, most_plans, data):
    chain, units, seconds = case
    peaks = {tuple(r): simulated_peak(chain, r) for r in all_segmentations(units)}
    budget = data.draw(st.sampled_from(sorted(set(peaks.values())))) + data.draw(st.integers(-1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MOST_PLANS", most_plans)
        found = best_runs(chain, units, seconds, budget)
    fitting = [runs for runs, peak in peaks.items() if peak <= budget]
    assert (found is None) == (not fitting)  # the plan that keeps least is never thinned out
    if found is not None:
        assert tuple(found) in fitting
        assert seconds_of(seconds, found) >= min(seconds_of(seconds, runs) for runs in fitting)


def random_long_chain(length, seed):
    rng = random.Random(seed)
    costs = []
    for _ in range(length):
        saved = rng.randrange(1, 10**6)
        costs.append(
            UnitCost(saved, 0, rng.randrange(1, saved + 1), 2 * saved, saved + rng.randrange(10**5))
        )
    units = [Unit(str(i), links=True, starts=True) for i in range(length)]
    return ChainCost(tuple(costs), 10**6, 0, 0), units, [rng.random() for _ in units]


@pytest.mark.parametrize("seed", range(3))
def test_thinning_of_a_long_chain_keeps_a_real_plan(seed, monkeypatch):
    chain, units, seconds = random_long_chain(40, seed)
    plain, best = predicted_peak(chain, []), chain.before
    budget = best + (plain - best) * 2 // 3
    whole = best_runs(chain, units, seconds, budget)
    monkeypatch.setattr(segments, "MOST_PLANS", 8)
    thinned = best_runs(chain, units, seconds, budget)
    assert whole is not None and thinned is not None
    assert simulated_peak(chain, thinned) <= budget and simulated_peak(chain, whole) <= budget
    assert extra_seconds(seconds, thinned) >= extra_seconds(seconds, whole) > 0


def test_a_front_is_thinned_to_the_number_asked_for_with_both_ends(monkeypatch):
    kept = np.arange(101)
    front = segments._Front(kept, 100.0 - kept, kept, kept > 50, kept, 0 * kept)
    for most in (2, 3, 64, 100, 101, 102):
        monkeypatch.setattr(segments, "MOST_PLANS", most)
        thinned = segments._thinned(front)
        assert len(thinned.kept) == min(most, 101) == len(set(thinned.kept.tolist()))
        assert thinned.kept[0] == 0 and thinned.kept[-1] == 100
        assert (thinned.seconds == 100.0 - thinned.kept).all()


def test_a_chain_that_fits_as_it_is_recomputes_nothing():
    chain, units, seconds = random_long_chain(20, 0)
    assert best_runs(chain, units, seconds, predicted_peak(chain, [])) == []


def test_what_recompute_cannot_change_refuses_a_budget_below_it():
    unit = UnitCost(saved=1, gap=0, output=1, forward=1, backward=1)
    chain = ChainCost((unit,), before=10, head=0, elsewhere=50)
    units = [Unit("a", links=False, starts=True)]
    assert best_runs(chain, units, [1.0], 50) == []
    assert best_runs(chain, units, [1.0], 49) is None


def test_equal_units_are_recomputed_in_as_few_as_the_budget_asks_for():
    # With k units recomputed in r runs, before + r o + (n - k) s is kept; o is small beside s, so a
    # budget of before + k o + (n - k) s takes k units, whatever the runs.
    n, s, o, before = 10, 100, 10, 1000
    chain = ChainCost((UnitCost(s, 0, o, s, s),) * n, before, 0, 0)
    units = [Unit(str(i), links=True, starts=True) for i in range(n)]
    assert predicted_peak(chain, []) == before + n * s
    for k in range(1, n):
        budget = before + k * o + (n - k) * s
        assert predicted_peak(chain, [(i, i) for i in range(k)]) == budget
        found = best_runs(chain, units, [1.0] * n, budget)
        assert found is not None and extra_seconds([1.0] * n, found) == k
        assert simulated_peak(chain, found) <= budget


OFFLOADED = st.builds(
    UnitCost,
    saved=SMALL | st.integers(0, 100),
    gap=st.just(0) | SMALL | st.integers(-3, -1),
    output=SMALL | st.integers(0, 40),
    forward=SMALL | st.integers(0, 150),
    backward=SMALL | st.integers(0, 150),
    sent=SMALL | st.integers(0, 90),
    sent_input=SMALL | st.integers(0, 40),
    hidden=SMALL | st.integers(0, 90),
)


@st.composite
def chains_with_a_link(draw, longest=5):
    length = draw(st.integers(1, longest))
    often = st.sampled_from([True, True, True, False])
    units = [Unit(str(i), links=draw(often), starts=draw(often)) for i in range(length)]
    costs = tuple(draw(OFFLOADED) for _ in units)
    chain = ChainCost(costs, draw(SMALL), draw(SMALL), draw(st.integers(0, 60)))
    # 2 / 4 seconds a byte: sums are exact in any order
    link = Link(4.0, draw(st.just(10**9) | st.integers(0, 120)))
    return chain, units, [float(draw(st.integers(0, 40))) for _ in units], link


def all_plans(units, recomputes=True, at=0):
    """Every list of disjoint runs, each of them recomputed or offloaded."""
    if at == len(units):
        yield []
        return
    for last in range(at - 1, len(units)):
        if last >= at and not all(unit.links for unit in units[at:last]):
            return
        kinds = [""] if last < at else ["recomputed"] * (units[at].starts and recomputes)
        for rest in all_plans(units, recomputes, max(at, last) + 1):
            for kind in kinds + ["offloaded"] * (last >= at):
                yield [(at, last, kind), *rest] if kind else rest


def simulated_with_offload(chain, plan):
    """(peak, bytes sent) of every moment in turn; shares no code with the dynamic programme."""
    units = chain.units
    of = {i: run for run in plan for i in range(run[0], run[1] + 1)}
    moments, live, sent, starts = [chain.elsewhere], chain.before, 0, {}
    for i, unit in enumerate(units):
        first, last, kind = of.get(i, (i, i, ""))
        if i == first:
            start = starts[i] = live
            stuck = saved = 0
        if kind == "":
            moments += [live + unit.forward, live + unit.backward]
            live += unit.saved + unit.gap
        elif kind == "offloaded":
            on_the_device = start + stuck + (units[i - 1].output if i > first else 0)
            moments += [on_the_device + unit.forward, on_the_device + unit.backward]
            stays = unit.saved - unit.hidden - unit.output
            stuck, saved = stuck + max(0, stays), saved + unit.saved
            sent += unit.sent if i == first else unit.sent + unit.sent_input
            if i == last:
                live = start + min(stuck + unit.output, saved) + unit.gap
            stuck, saved = stuck + max(0, unit.gap), saved + unit.gap
        elif i == last:
            inside = start
            for k in range(first, last + 1):
                moments += [inside + units[k].forward + unit.output, inside + units[k].backward]
                inside += units[k].saved
            live = start + unit.output + unit.gap
    return max(*moments, live + chain.head), sent


def split(plan):
    return [[r[:2] for r in plan if r[2] == kind] for kind in ("recomputed", "offloaded")]


@settings(deadline=None, max_examples=100)
@given(chains_with_a_link(longest=4))
def test_the_predicted_peak_and_the_bytes_sent_are_the_simulated_ones_with_offload(case):
    chain, units, _, _ = case
    for plan in all_plans(units):
        recomputed, offloaded = split(plan)
        peak, sent = simulated_with_offload(chain, plan)
        assert predicted_peak(chain, recomputed, offloaded) == peak
        assert sent_bytes(chain, offloaded) == sent


@settings(deadline=None, max_examples=400)
@given(chains_with_a_link(), st.booleans(), st.data())
def test_the_best_parts_are_those_of_brute_force_within_both_memories(case, recomputes, data):
    chain, units, seconds, link = case
    found_by_force = []
    for plan in all_plans(units, recomputes):
        recomputed, offloaded = split(plan)
        if not all(sent_bytes(chain, [run]) for run in offloaded):
            continue  # a run that sends nothing is none
        peak, sent = simulated_with_offload(chain, plan)
        time = seconds_of(seconds, recomputed) + 2 * sent / link.bandwidth
        found_by_force.append((peak, sent, time, recomputed, offloaded))
    budget = data.draw(st.sampled_from(sorted({p[0] for p in found_by_force})))
    budget += data.draw(st.integers(-1, 1))
    fitting = [p for p in found_by_force if p[0] <= budget and p[1] <= link.host_bytes]
    found = best_parts(chain, units, seconds, budget, link=link, recomputes=recomputes)
    if not fitting:
        assert found is None
        return
    (time,) = {p[2] for p in fitting if p[3:] == (found.recomputed, found.offloaded)}
    assert time == min(p[2] for p in fitting)


def test_without_a_link_nothing_is_offloaded():
    unit = UnitCost(saved=10, gap=0, output=1, forward=1, backward=1, sent=9, hidden=9)
    chain = ChainCost((unit, unit), before=0, head=0, elsewhere=0)
    units = [Unit("a", links=True, starts=False), Unit("b", links=False, starts=False)]
    assert best_parts(chain, units, [1.0, 1.0], 3) is None
    found = best_parts(chain, units, [1.0, 1.0], 3, link=Link(1.0, 18))
    assert found is not None and found.offloaded in ([(0, 1)], [(0, 0), (1, 1)])
    assert best_parts(chain, units, [1.0, 1.0], 3, link=Link(1.0, 17)) is None
