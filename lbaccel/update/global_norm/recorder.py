"""Record the torch functions of a forward, by running the user's own code once for real.

The first micro-batch of its shape runs so, with its graph, in which backward passes of the user's
own are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from lbaccel.randomness.generators import generator_states
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.ghost_layers import over_all_samples
from lbaccel.update.global_norm.handles import memory_of
from lbaccel.update.global_norm.recording import Recording, refused
from lbaccel.update.global_norm.tape import Fact, Meta, Mode, TapedCall, Value

FLOPS_A_BYTE = 20  # that take the time of a byte read or written


class TapeRecorder(Recording):
    """Records a forward that runs for real.

    Args:
        inputs: the tensors of the micro-batch; copies of them are the `stand_ins`, since what the
            user's code writes into is not the loader's memory.
        device: where the network runs.
        randomness: whose masks are drawn.
    """

    def __init__(
        self, inputs: Sequence[Tensor], *, device: torch.device, randomness: KeyedRandomness
    ) -> None:
        metas = [Meta.of(x) for x in inputs]
        copies = [x.clone() for x in inputs]
        super().__init__(copies, metas, device=device, randomness=randomness)
        self._outside = _Outside(self)
        self.inside, self.flops = False, 0

    def __enter__(self) -> TapeRecorder:
        self._outside.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._outside.__exit__(*error)

    def holds(self, x: Tensor) -> bool:
        """Whether a value lies where `x` does."""
        return self.handles.lie_at(memory_of(x))

    def run(self, func: Any, leaves: list[Any], spec: Any, found: tuple[Any, ...]) -> Any:
        """See `Recording`."""
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        args, kwargs = tree_unflatten(leaves, spec)
        if not tensors:
            return self._made(func, args, kwargs, spec, found)
        mode = Mode.now(self.device.type)
        versions = [_version(leaves[i]) for i in tensors]
        out, drawn = self._drawn(func, args, kwargs)
        places = [i for i, v in zip(tensors, versions, strict=True) if _version(leaves[i]) != v]
        for i in places:
            if not isinstance(found[i], Value):
                raise refused(func, "it writes into a tensor that is not the micro-batch's own")
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
            self.handles.overwritten(leaves[i])
            writes.append((i, self.new(leaves[i], call.level)))
        call.writes = tuple(writes)
        call.result = tuple(self._made_by(x, call.level) for x in result)
        self.tape.events.append(call)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any, spec: Any, found: tuple[Any, ...]) -> Any:
        """A call without tensors: of a constant, of a draw, or of a switch of torch's."""
        mode = Mode.now(self.device.type)
        out, drawn = self._drawn(func, args, kwargs)
        result, result_spec = tree_flatten(out)
        if any(isinstance(x, Tensor) for x in result):
            call = TapedCall(func, found, spec, (), result_spec, (), mode, None, **drawn)
            call.result = tuple(self._made_by(x, call.level) for x in result)
            self.tape.events.append(call)
        return out

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, int]]:
        """Its result, and what it drew, which `KeyedRandomness.again` repeats."""
        randomness, draw = self.randomness, self.randomness.num_calls
        states = generator_states(self.device)
        self.inside, self.flops = True, 0
        try:
            out = func(*args, **kwargs)
            num_draws = randomness.num_calls - draw
            if num_draws:
                return out, {"draw": draw, "num_draws": num_draws}
            seed = len(self.tape.events)
            if func not in _SEEDING and _differ(states, generator_states(self.device)):
                with randomness.again(-1, seed):
                    return func(*args, **kwargs), {"seed": seed}
            return out, {}
        finally:
            self.inside = False

    def _made_by(self, x: Any, level: int) -> Any:
        """A leaf of a result, encoded; an argument that is handed on keeps its value."""
        if isinstance(x, Tensor) and x not in self.handles:
            self.new(x, level)
        return self.handles.encoded(x)

    def _level(self, found: tuple[Any, ...], layer: Any) -> int:
        level = max((self.levels[x.index] for x in found if isinstance(x, Value)), default=-1)
        return level if layer is None else max(level, 0) + 1

    def _cost(self, leaves: list[Any], result: list[Any]) -> float:
        tensors = [x for x in (*leaves, *result) if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors) + self.flops / FLOPS_A_BYTE


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
            raise refused(
                func, "runs in code that torch does not show (an autograd.Function, a script)"
            )
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            recorder.flops += count(*args, **kwargs, out_val=out)
        return out


_SEEDING = {torch.manual_seed, torch.seed}


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _differ(before: Any, after: Any) -> bool:
    """Whether torch's generators moved."""
    return any(
        a is not None and not torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)
    )
