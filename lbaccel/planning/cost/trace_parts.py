"""A trace read as its parts: the kernels of its steps, and the allocator's requests."""

from __future__ import annotations

from dataclasses import dataclass

from lbaccel.planning.cost.cuda_limit import Request
from lbaccel.planning.cost.later import known
from lbaccel.planning.cost.trace import Allocate, Free, Kernel, Mark, Trace


@dataclass
class StepKernels:
    """The kernels of a trace: of its first and last micro-step, and of its commit."""

    first: list[Kernel]
    micro: list[Kernel]
    commit: list[Kernel]
    forward: list[list[Kernel]]  # of each unit, in the last micro-step


def step_kernels(trace: Trace, num_units: int) -> StepKernels:
    """The kernels of a trace whose chain has `num_units` units with marks."""
    found = StepKernels([], [], [], [])
    previews: list[list[Kernel]] = []  # the first pass of an update in two
    into, unit = found.commit, None
    for event in trace.events:
        if isinstance(event, Mark):
            word, _, number = event.name.partition(" ")
            if word == "micro-step":
                found.micro = into = []
                found.first = found.first or into
                found.forward = [[] for _ in range(num_units)]
            elif word == "preview":
                into = []
                previews.append(into)
            elif word == "loss":  # of the whole batch, once an update
                found.commit = into = []
            elif word == "commit":
                found.commit = into = found.commit if previews else []
            elif word == "forward":
                unit = int(number)
            elif word == "end":
                unit = None
        elif isinstance(event, Kernel):
            into.append(event)
            if unit is not None and into is found.micro:
                found.forward[unit].append(event)
    if previews:
        found.first, found.micro = previews[0] + found.first, previews[-1] + found.micro
    return found


def requests(trace: Trace) -> tuple[list[Request], list[Request]]:
    """The trace as the allocator sees it: what is there before an update, and the update.

    The former stays: that it goes when the trace does is no part of an update.
    """
    held: list[Request] = []
    update: list[Request] = []
    into, stays = held, set[int]()
    for event in trace.events:
        if isinstance(event, Mark) and event.name.startswith(("micro-step", "preview")):
            into, stays = update, stays or {name for name, _ in held}
        elif isinstance(event, Allocate):
            into.append((event.id, event.num_bytes))
        elif isinstance(event, Free) and event.id not in stays:
            into.append((event.id, -1))
        elif isinstance(event, Kernel) and event.workspace:
            into += [(-1, known(event.workspace)), (-1, -1)]  # it comes and goes
    return held, update
