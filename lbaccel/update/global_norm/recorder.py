"""Record the torch functions of a forward, by running the user's own code once a micro-batch.

The first micro-batch of its shape runs for real, with its graph, in which backward passes of the
user's own are found. Any other one follows its tape: the user's code
runs again on stand-ins of the right shapes, and each call must be the known one. So the tape holds
this micro-batch's own numbers (the factor of a mixup), and no tensor is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from lbaccel.errors import InputError
from lbaccel.randomness.draws import REPLACED
from lbaccel.randomness.generators import generator_states
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.ghost_layers import over_all_samples
from lbaccel.update.global_norm.handles import Handles, memory_of, stand_in
from lbaccel.update.global_norm.replay import as_recorded, drawing, name_of
from lbaccel.update.global_norm.tape import Fact, Meta, Mode, Tape, TapedCall, Value

FLOPS_A_BYTE = 20  # that take the time of a byte read or written

_TENSOR_READS = (
    *("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
    *("__array__", "__contains__", "equal", "allclose", "is_nonzero"),
)
READS = {getattr(Tensor, name) for name in _TENSOR_READS}
READS |= {torch.equal, torch.allclose, torch.is_nonzero}
_HOOKS = ("register_hook", "retain_grad", "backward", "requires_grad_", "set_")
HOOKS = {getattr(Tensor, name) for name in _HOOKS}


class Mismatch(Exception):
    """This forward makes other calls than the tape that it follows."""


@contextmanager
def shown_draws() -> Iterator[None]:
    """Inside, a function that draws keyed masks is a torch function: one call of a tape."""
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in REPLACED]
    try:
        for owner, name, function in plain:
            setattr(owner, name, _shown(function))
        yield
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(function, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return call


class TapeRecorder(TorchFunctionMode):
    """Records on a `Tape` what runs inside it.

    Args:
        inputs: the tensors of the micro-batch; `stand_ins` take their place in the user's data.
        device: where the network runs.
        randomness: whose masks are drawn.
        known: the tape of another micro-batch of these shapes, to be followed; None runs for real.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        *,
        device: torch.device,
        randomness: KeyedRandomness,
        known: Tape | None = None,
    ) -> None:
        super().__init__()
        metas = [Meta.of(x) for x in inputs]
        self.known, self._randomness, self._device = known, randomness, device
        self._levels = [0] * len(metas)  # of each value
        self.tape = Tape(len(metas), metas if known is None else known.metas)
        self._handles = Handles()
        self._given, self._evaluated = inputs, -1
        self._computed: dict[int, Tensor] = {}
        # What the user's code writes into, in a forward for real, is not the loader's memory.
        self.stand_ins = [x.clone() if known is None else stand_in(Meta.of(x)) for x in inputs]
        for value, x in enumerate(self.stand_ins):
            self._handles.name(x, value)
        self._outside = _Outside(self)
        self.inside, self.flops = False, 0

    def __enter__(self) -> TapeRecorder:
        if self.known is None:
            self._outside.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.known is None:
            self._outside.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        found = tuple(self._handles.encoded(x) for x in leaves)
        read = [x.index for x in found if isinstance(x, Value)]
        if read:
            self._check(func, leaves, read)
        run = self._run if self.known is None else self._follow
        return run(func, leaves, spec, found, tensors)

    def finish(self, out: Any) -> Tape:
        """The tape of the forward, whose loss function returned `out`."""
        leaves, spec = tree_flatten(out)
        for x in leaves:
            _check_graph(x)
        self.tape.result = tuple(self._handles.encoded(x) for x in leaves), spec
        known = self.known
        if known is not None:
            if len(self.tape.events) != len(known.events):
                raise Mismatch
            assert known.result is not None
            same = spec == known.result[1] and all(
                a is b or isinstance(b, Fact)
                for a, b in zip(self.tape.events, known.events, strict=True)
            )
            if same and _same(self.tape.result[0], known.result[0]):
                return known
        return self.tape

    def holds(self, x: Tensor) -> bool:
        """Whether a value lies where `x` does."""
        return self._handles.lie_at(memory_of(x))

    # ---- for real

    def _run(
        self, func: Any, leaves: list[Any], spec: Any, found: tuple[Any, ...], tensors: list[int]
    ) -> Any:
        args, kwargs = tree_unflatten(leaves, spec)
        if not tensors:
            return self._made(func, args, kwargs, spec, found)
        mode = Mode.now(self._device.type)
        versions = [_version(leaves[i]) for i in tensors]
        out, drawn = self._drawn(func, args, kwargs)
        places = [i for i, v in zip(tensors, versions, strict=True) if _version(leaves[i]) != v]
        for i in places:
            if not isinstance(found[i], Value):
                raise _refused(func, "it writes into a tensor that is not the micro-batch's own")
        result, result_spec = tree_flatten(out)
        if not places and not any(isinstance(x, Tensor) for x in result):
            if any(isinstance(x, Value) for x in found):
                self.tape.events.append(Fact(func, out))
            return out
        layer: Any = args[1] if func is over_all_samples else None
        call = TapedCall(
            func, found, spec, (), result_spec, (), mode, layer, **drawn,
            cost=self._cost(leaves, result), level=self._level(found, layer),
        )  # fmt: skip
        writes = []
        for i in places:
            self._handles.overwritten(leaves[i])
            writes.append((i, self._new(leaves[i], call.level)))
        call.writes = tuple(writes)
        call.result = tuple(self._made_by(x, call.level) for x in result)
        self.tape.events.append(call)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any, spec: Any, found: tuple[Any, ...]) -> Any:
        """A call without tensors: of a constant, of a draw, or of a switch of torch's."""
        mode = Mode.now(self._device.type)
        out, drawn = self._drawn(func, args, kwargs)
        result, result_spec = tree_flatten(out)
        if any(isinstance(x, Tensor) for x in result):
            call = TapedCall(func, found, spec, (), result_spec, (), mode, None, **drawn)
            call.result = tuple(self._made_by(x, call.level) for x in result)
            self.tape.events.append(call)
        return out

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, int]]:
        """Its result, and what it drew, which `KeyedRandomness.again` repeats."""
        randomness, draw = self._randomness, self._randomness.num_calls
        states = generator_states(self._device)
        self.inside, self.flops = True, 0
        try:
            out = func(*args, **kwargs)
            num_draws = randomness.num_calls - draw
            if num_draws:
                return out, {"draw": draw, "num_draws": num_draws}
            seed = len(self.tape.events)
            if func not in _SEEDING and _differ(states, generator_states(self._device)):
                with randomness.again(-1, seed):
                    return func(*args, **kwargs), {"seed": seed}
            return out, {}
        finally:
            self.inside = False

    def _made_by(self, x: Any, level: int) -> Any:
        """A leaf of a result, encoded; an argument that is handed on keeps its value."""
        if isinstance(x, Tensor) and x not in self._handles:
            self._new(x, level)
        return self._handles.encoded(x)

    def _level(self, found: tuple[Any, ...], layer: Any) -> int:
        level = max((self._levels[x.index] for x in found if isinstance(x, Value)), default=-1)
        return level if layer is None else max(level, 0) + 1

    def _cost(self, leaves: list[Any], result: list[Any]) -> float:
        tensors = [x for x in (*leaves, *result) if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors) + self.flops / FLOPS_A_BYTE

    # ---- along a known tape

    def _follow(
        self, func: Any, leaves: list[Any], spec: Any, found: tuple[Any, ...], tensors: list[int]
    ) -> Any:
        assert self.known is not None
        events, place = self.known.events, len(self.tape.events)
        event = events[place] if place < len(events) else None
        args, kwargs = tree_unflatten(leaves, spec)
        if event is None or event.function is not func:
            if any(isinstance(x, Value) for x in found):
                raise Mismatch
            return self._unrecorded(func(*args, **kwargs))
        if isinstance(event, Fact):
            if not any(isinstance(x, Value) for x in found):
                return self._unrecorded(func(*args, **kwargs))
            out = self._read(func, found, spec) if func in READS else event.result
            self.tape.events.append(Fact(func, out))
            return out
        mode = Mode.now(self._device.type)
        if spec != event.spec or mode != event.mode or not _alike(found, event.leaves):
            raise Mismatch
        self._randomness.skip(event.num_draws)
        call = event if _same(found, event.leaves) else event.with_leaves(found)
        self.tape.events.append(call)
        written = {value: leaves[i] for i, value in event.writes}
        for value, x in written.items():
            self._handles.overwritten(x)
            self._add(value, event.level)
            self._handles.name(x, value)
        given = {x.index: leaves[i] for i, x in enumerate(event.leaves) if isinstance(x, Value)}
        return tree_unflatten(
            [self._given_back(x, event.level, {**given, **written}) for x in event.result],
            event.result_spec,
        )

    def _unrecorded(self, out: Any) -> Any:
        if any(isinstance(x, Tensor) for x in tree_leaves(out)):
            raise Mismatch
        return out

    def _given_back(self, x: Any, level: int, arguments: dict[int, Tensor]) -> Any:
        if not isinstance(x, Value):
            return x
        if x.index in arguments:
            return arguments[x.index]
        tensor = stand_in(self.tape.metas[x.index])
        self._add(x.index, level)
        self._handles.name(tensor, x.index)
        return tensor

    def _read(self, func: Any, found: tuple[Any, ...], spec: Any) -> Any:
        """A number of what is known before any BatchNorm layer: compute that much."""
        if self._evaluated < 0:
            self._computed, self._evaluated = {i: x.clone() for i, x in enumerate(self._given)}, 0
        for event in self.tape.events[self._evaluated :]:
            if isinstance(event, TapedCall) and event.level <= 0:
                args, kwargs, leaves = event.arguments(self._computed)
                with as_recorded(event.mode, False), drawing(event, self._randomness):
                    out = event.function(*args, **kwargs)
                made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                self._computed.update(zip(event.outputs, made, strict=True))
                self._computed.update((value, leaves[i]) for i, value in event.writes)
        self._evaluated = len(self.tape.events)
        known = [self._computed[x.index] if isinstance(x, Value) else x for x in found]
        args, kwargs = tree_unflatten(known, spec)
        return func(*args, **kwargs)

    # ---- values

    def _new(self, x: Tensor, level: int) -> int:
        value = len(self.tape.metas)
        self.tape.metas.append(Meta.of(x))
        self._add(value, level)
        self._handles.name(x, value)
        return value

    def _add(self, value: int, level: int) -> None:
        self._levels.extend([level] * (value + 1 - len(self._levels)))
        self._levels[value] = level

    def _check(self, func: Any, leaves: list[Any], read: list[int]) -> None:
        if func in HOOKS:
            raise _refused(func, "the passes can't repeat it")
        if func in READS and any(self._levels[v] > 0 for v in read):
            raise _refused(
                func,
                "reads a number of what comes after BatchNorm, which is not known at that time",
            )
        if any(self._handles.is_stale(x) for x in leaves):
            raise _refused(
                func, "reads a tensor whose memory was written in place through another view of it"
            )


class _Outside(TorchDispatchMode):
    """Finds the work on values that no torch function shows, and counts the rest's operations."""

    def __init__(self, recorder: TapeRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if not recorder.inside and any(
            recorder.holds(x) for x in tree_leaves(args) if isinstance(x, Tensor)
        ):
            raise _refused(
                func, "runs in code that torch does not show (an autograd.Function, a script)"
            )
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            recorder.flops += count(*args, **kwargs, out_val=out)
        return out


_SEEDING = {torch.manual_seed, torch.seed}


def _check_graph(x: Any) -> None:
    """Stop at a Function of the user's own: its backward is on no tape.

    Raises:
        InputError: its name.
    """
    todo = [x.grad_fn] if isinstance(x, Tensor) else []
    met: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise _refused(type(node), "is a backward of an autograd.Function, which no pass knows")
        todo += [before for before, _ in node.next_functions]


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _differ(before: Any, after: Any) -> bool:
    """Whether torch's generators moved."""
    return any(
        a is not None and not torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)
    )


def _alike(found: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether a call with these arguments gives the same shapes."""
    return all(map(_is_like, found, known))


def _is_like(x: Any, y: Any) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return True
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return Meta.of(x) == Meta.of(y)
    return _is_same(x, y)


def _same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    return len(found) == len(known) and all(map(_is_same, found, known))


def _is_same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or isinstance(x, Tensor):
        return False
    try:
        return bool(x == y)
    except (ValueError, RuntimeError):  # arrays
        return False


def _refused(func: Any, why: str) -> InputError:
    return InputError(
        f"norm_batch_size='global' can't repeat this forward: {name_of(func)} {why}. Leave it out "
        "of the loss function, or take a number in the place of 'global'."
    )
