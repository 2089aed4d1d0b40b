"""The chain of a network: modules that run one after the other, each on the last one's output.

Only a run of such modules can be recomputed as one: nothing else may read what lies between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lbaccel.planning.cost.trace import Allocate, Mark, Recorder, Trace


@dataclass(frozen=True)
class Unit:
    """A module of the chain, by name."""

    name: str
    links: bool  # the next unit runs on this one's output, and nothing else reads it
    starts: bool  # a segment may begin here: the module leaves its input as it is


@dataclass(frozen=True)
class UnitCost:
    """The bytes that a unit takes, from its trace without recompute.

    With `before` bytes live at its start: `saved` more are live at its end, `gap` more at the next
    unit's start; `forward` and `backward` are the most beyond `before` while either runs.

    Of what autograd saves in it, `sent` bytes can go to the host, and `sent_input` more where its
    input may go too and the unit before has not sent it; `hidden` of `saved` are then gone from the
    device, its output left out. They are 0 where the trace was not told to look.
    """

    saved: int
    gap: int
    output: int
    forward: int
    backward: int
    sent: int = 0
    sent_input: int = 0
    hidden: int = 0

    @property
    def stuck(self) -> int:
        """Bytes of `saved` that stay on the device when the unit is offloaded, output left out."""
        return max(0, self.saved - self.hidden - self.output)


@dataclass(frozen=True)
class ChainCost:
    """Bytes of a traced update around the chain: those of each unit, and of what is no unit."""

    units: tuple[UnitCost, ...]
    before: int  # live where the first unit starts
    head: int  # most beyond what is live at the chain's end, until its backward begins
    elsewhere: int  # peak of all that recompute can't change: clipping, step, what runs before
    state: int = 0  # the random state, which a run keeps, and once more while it is recomputed


@dataclass(eq=False)
class _Call:
    """One call of a module. Holds its tensors, so that no two of them share an address."""

    name: str
    input: Tensor | None = None  # where it takes one tensor and nothing else
    output: Tensor | None = None  # where it gives one tensor and nothing else
    children: list[_Call] = field(default_factory=list)
    spoils: bool = False  # writes into its input
    start: int = 0  # kernels run when it was called
    end: int = 0  # kernels run when it returned


class ChainFinder:
    """Finds the chain of a model while one forward of it runs under `recorder`."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._recorder = recorder
        self._stack: list[_Call] = []
        self._roots: list[_Call] = []
        self._num_calls: Counter[str] = Counter()
        self._reads: dict[int, list[int]] = {}  # address: numbers of the kernels that read it
        self._versions: dict[int, int] = {}
        recorder.on_kernel = self._note_reads
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            module.register_forward_hook(self._after)

    def units(self) -> list[Unit]:
        """The finest chain in order of execution, of modules that run once a forward."""
        found = list(self._expand(self._roots[0]))
        links = [self._is_linked(found, i) for i in range(len(found))]
        starts = [not call.spoils for call in found]
        for i in reversed(range(len(found) - 1)):
            # A module that hands its input on begins no run whose next module writes into it.
            handed_on = _address(found[i].input) == _address(found[i].output)
            starts[i] = starts[i] and not (handed_on and links[i] and not starts[i + 1])
        return [
            Unit(call.name, links=link, starts=start)
            for call, link, start in zip(found, links, starts, strict=True)
        ]

    def _expand(self, call: _Call) -> Iterator[_Call]:
        """A call's chained children in its place; between those of the model may lie gaps."""
        children = call.children
        whole = (
            bool(children)
            and all(self._can_be_unit(child) for child in children)
            and children[0].input is call.input
            and children[-1].output is call.output
            and all(self._is_linked(children, i) for i in range(len(children) - 1))
            and self._read_by(children, 0, _address(call.input), call.start)
        )
        if whole or call.name == "":
            for child in children:
                if self._can_be_unit(child):
                    yield from self._expand(child)
        else:
            yield call

    def _can_be_unit(self, call: _Call) -> bool:
        single = call.input is not None and call.output is not None
        return single and self._num_calls[call.name] == 1

    def _is_linked(self, chain: Sequence[_Call], i: int) -> bool:
        if i + 1 == len(chain) or chain[i + 1].input is not chain[i].output:
            return False
        return self._read_by(chain, i + 1, _address(chain[i].output), chain[i].end)

    def _read_by(self, chain: Sequence[_Call], reader: int, address: int, since: int) -> bool:
        """From kernel `since` on, `chain[reader]` alone reads it, or whom it hands it on to."""
        readers = [chain[reader]]
        while reader + 1 < len(chain) and _address(chain[reader].output) == address:
            reader += 1  # a module that works in place hands the same storage on
            readers.append(chain[reader])
        return all(
            any(call.start <= read < call.end for call in readers)
            for read in self._reads.get(address, ())
            if read >= since
        )

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        call = _Call(name, start=self._recorder.num_kernels)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            call.input = args[0]
            self._versions[id(call)] = args[0]._version
        (self._stack[-1].children if self._stack else self._roots).append(call)
        self._stack.append(call)
        self._num_calls[name] += 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._stack.pop()
        call.end = self._recorder.num_kernels
        if call.input is not None:
            call.spoils = call.input._version != self._versions.pop(id(call))
        if isinstance(output, Tensor):
            call.output = output

    def _note_reads(self, tensors: Sequence[Tensor]) -> None:
        if self._stack:  # of the forward, and of nothing outside the model
            for tensor in tensors:
                self._reads.setdefault(_address(tensor), []).append(self._recorder.num_kernels)


def _address(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.untyped_storage()._cdata


def mark_units(model: nn.Module, recorder: Recorder, units: Sequence[Unit]) -> None:
    """Make `recorder` note where each unit's forward starts and ends, and its backward starts."""

    def before(index: int, module: nn.Module, args: Any) -> None:
        recorder.mark(f"forward {index}", args[0])

    def after(index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        recorder.mark(f"end {index}", output)
        if output.requires_grad:
            output.register_hook(lambda grad: recorder.mark(f"backward {index}"))

    for index, unit in enumerate(units):
        module = model.get_submodule(unit.name)
        module.register_forward_pre_hook(partial(before, index))
        module.register_forward_hook(partial(after, index))


def chain_cost(trace: Trace, num_units: int) -> ChainCost:
    """Read the units' bytes off a trace with their marks, in its last micro-step."""
    events = trace.events
    place: dict[str, int] = {}  # the last micro-step's marks overwrite the first's
    about: dict[str, Mark] = {}
    for at, event in enumerate(events):
        if isinstance(event, Mark):
            place[event.name] = at
            about[event.name] = event
    settled, most = trace.live_before()
    starts = [place[f"forward {i}"] for i in range(num_units)]
    ends = [place[f"end {i}"] for i in range(num_units)]
    # Where no gradient reaches a unit's output, its backward is over when the next one's is.
    over = place["commit"]
    backward = [over] * (num_units + 1)
    for i in range(num_units):
        backward[i] = place.get(f"backward {i}", over)
    units: list[UnitCost] = []
    sent = _sent(trace, list(zip(starts, ends, strict=True)), about)
    for i in range(num_units):
        before = settled[starts[i]]
        until = backward[i - 1] if i else over
        next_start = starts[i + 1] if i + 1 < num_units else ends[i]
        units.append(
            UnitCost(
                saved=settled[ends[i]] - before,
                gap=settled[next_start] - settled[ends[i]],
                output=about[f"end {i}"].num_bytes,
                forward=max(most[starts[i] : next_start + 1], default=before) - before,
                backward=max(most[backward[i] : until + 1], default=before) - before,
                **sent[i],
            )
        )
    last_end, first_backward = ends[-1], backward[num_units - 1]
    head = max(most[last_end : first_backward + 1]) - settled[last_end]
    last_step = max(at for name, at in place.items() if name.startswith("micro-step"))
    outside = [*most[: place["micro-step 0"]], *most[last_step : starts[0] + 1], *most[over:]]
    elsewhere = max(outside, default=0)
    return ChainCost(tuple(units), settled[starts[0]], head, elsewhere, trace.random_state)


def _sent(
    trace: Trace, spans: Sequence[tuple[int, int]], about: dict[str, Mark]
) -> list[dict[str, int]]:
    """`sent`, `sent_input` and `hidden` of each unit, whose forward is a span of events."""
    born = {e.id: (at, e.num_bytes) for at, e in enumerate(trace.events) if isinstance(e, Allocate)}
    found: list[dict[str, int]] = []
    before: set[int] = set()
    for i, (start, end) in enumerate(spans):
        saved = {number for at, number in trace.saved if start < at <= end}
        given, output = about[f"forward {i}"].storage, about[f"end {i}"].storage
        own = saved - {given}
        new = {number for number in own - {output} if start < born[number][0] < end}
        found.append(
            {
                "sent": sum(born[number][1] for number in own),
                "sent_input": born[given][1] if given in saved - before else 0,
                "hidden": sum(born[number][1] for number in new),
            }
        )
        before = saved
    return found


__all__ = ["ChainCost", "ChainFinder", "Unit", "UnitCost", "chain_cost", "mark_units"]
