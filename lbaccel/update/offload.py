"""Activations of named blocks, kept in the host's memory between forward and backward.

torch's hooks on saved tensors see what autograd keeps. A large one goes to pinned host memory in
forward and comes back when the backward pass first needs it. A copy is of a whole storage, as
bytes: all tensors that share it share the copy, and each comes back with its own strides and
offset, so results stay to the bit.

What stays on the device: parameters, buffers, their views and autocast's casts of them, which are
there anyway; tensors below `LEAST_BYTES`; and the input of a run of blocks, which what comes before
the run may hold as well. (Of what is recomputed, the input is all that is kept, and goes.)
`pinned_host.py` says how it goes there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lbaccel.errors import InputError
from lbaccel.update.checkpointing import inside_recompute, starts_segment
from lbaccel.update.compiled import is_compiled
from lbaccel.update.pinned_host import PinnedHost, Store

_NOWHERE = -1  # the address of what has no single storage, such as a sparse tensor
COMPILED = (
    "the model is compiled, and torch.compile decides itself what a backward pass keeps, so "
    "nothing can be offloaded. Leave out model.compile(), or the offload."
)


class _Kept:
    """A storage in a store, with its way back: one copy for all that were packed from it."""

    def __init__(self, store: Store, flat: Tensor) -> None:
        # While this reference lives, no new storage takes the address that is the key of this one.
        self._storage = StorageWeakRef(flat.untyped_storage())
        self._kept, self._store, self.dtype = store.put(flat), store, flat.dtype
        self.waiting = 0  # packed and not yet unpacked
        self._back: Tensor | None = None

    def back(self) -> Tensor:
        """On the device again; kept there until the last that waits for it has it."""
        self.waiting -= 1
        flat = self._store.get(self._kept, self.dtype) if self._back is None else self._back
        self._back = flat if self.waiting > 0 else None
        return flat

    def __del__(self) -> None:
        if hasattr(self, "_store"):  # else the store had no room
            self._store.release(self._kept)


@dataclass(frozen=True)
class _Away:
    """A tensor whose storage is in a store."""

    kept: _Kept
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.kept.back().as_strided(self.sizes, self.strides, self.offset)


@dataclass(frozen=True)
class _Here:
    """A tensor that stayed. torch counts no versions behind hooks, so this does."""

    values: Tensor
    version: int

    def tensor(self) -> Tensor:
        now = self.values._version
        if now != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor {list(self.values.shape)} of an offloaded block is "
                f"at version {now}; expected version {self.version} instead."
            )
        return self.values


class _Offload:
    """The forward of the modules of one call of `apply_activation_offload`."""

    def __init__(self, store: Store, model: nn.Module | None = None) -> None:
        self._store = store
        self._model = None if model is None else ref(model)  # a copy is not the compiled one
        self._kept: WeakValueDictionary[Any, _Kept] = WeakValueDictionary()

    def __reduce__(self) -> Any:
        return type(self), (self._store,)

    def forward(
        self, plain: Any, module: nn.Module, begins: bool, /, *args: Any, **kwargs: Any
    ) -> Any:
        """`module` on its arguments; `plain` is the forward that it had of its own, if any."""
        model = None if self._model is None else self._model()
        # An error in what is traced makes torch run it uncompiled, where it is raised again.
        if torch.compiler.is_compiling() or (model is not None and is_compiled(model)):
            raise InputError(COMPILED)
        run = plain or partial(type(module).forward, module)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        stays = {_address(t) for t in (*module.parameters(), *module.buffers())} | {_NOWHERE}
        if begins:
            given = tree_leaves((args, kwargs))
            stays |= {_address(t) for t in given if isinstance(t, Tensor)}
        with saved_tensors_hooks(partial(self._pack, stays), _unpack):
            return run(*args, **kwargs)

    @torch.no_grad()
    def _pack(self, stays: set[int], tensor: Tensor) -> _Away | _Here:
        address = _address(tensor)
        if address in stays or _is_weight(tensor) or not self._store.takes(tensor):
            return _Here(tensor.detach(), tensor._version)
        key = address, tensor._version, tensor.dtype
        kept = self._kept.get(key)
        if kept is None:
            whole = (tensor.untyped_storage().nbytes() // tensor.element_size(),)
            kept = _Kept(self._store, tensor.detach().as_strided(whole, (1,), 0))
            self._kept[key] = kept
        kept.waiting += 1
        return _Away(kept, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


@torch.no_grad()
def _unpack(packed: _Away | _Here) -> Tensor:
    return packed.tensor()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else _NOWHERE


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, a view of one, or a cast of one, which autocast's cache holds."""
    base = tensor._base if tensor._base is not None else tensor
    node = base.grad_fn
    if node is None:
        return base.requires_grad
    (before, _), *others = node.next_functions or ((None, 0),)
    cast = node.name() == "ToCopyBackward0" and not others
    return cast and before is not None and before.name() == "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class Offloading:
    """The runs of blocks whose activations lie on the host."""

    runs: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        spans = [" .. ".join(dict.fromkeys((run[0], run[-1]))) for run in self.runs]
        shown = ", ".join(spans[:4]) + (", ..." if len(spans) > 4 else "")
        count = sum(map(len, self.runs))
        return f"activation offload: the activations of {count} modules lie on the host ({shown})"


def apply_activation_offload(
    model: nn.Module, blocks: Sequence[str | Sequence[str]], *, store: Store | None = None
) -> Offloading:
    """Keep the activations of blocks of `model` in pinned host memory until backward, in place.

    With s the bytes that the blocks save and R the bytes a second of the link to the host, a
    micro-step takes 2 s / R longer, and up to 2 s of the host are pinned (torch pins powers of
    two). Gradients, statistics and masks stay to the bit, and so do parameter names and
    `state_dict`. On a CPU the memory of the host is that of the device: nothing is moved.

    A recomputed segment is offloaded by the name of its first module: its input is all that it
    keeps. Call this after `apply_segments` and before `LargeBatch.prepare`, on a model that is not
    compiled.

    Args:
        model: the network, unwrapped.
        blocks: names of modules, as `named_modules()` has them, or runs of such names in order of
            execution. The input of a run stays on the device; what its modules hand on goes.
        store: where activations go; default: pinned memory, of CUDA devices alone.

    Raises:
        InputError: an unknown name, one that is there twice or lies in another, a block that runs
            inside a recompute, or a compiled model.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> str(apply_activation_offload(model, [["0", "1"]]))
    'activation offload: the activations of 2 modules lie on the host (0 .. 1)'
    """
    runs = tuple((block,) if isinstance(block, str) else tuple(block) for block in blocks)
    modules = dict(model.named_modules())
    names = [name for run in runs for name in run]
    _check(model, modules, names, runs)
    hand_to(PinnedHost() if store is None else store, model, runs)
    return Offloading(runs)


def hand_to(store: Store, model: nn.Module, runs: Sequence[Sequence[str]]) -> None:
    """Let `store` see what the modules of `runs` save, without any check; for the planner."""
    modules, offload = dict(model.named_modules()), _Offload(store, model)
    for run in runs:
        for name in run:
            module = modules[name]
            plain, begins = vars(module).get("forward"), name == run[0]
            module.forward = partial(  # type: ignore[method-assign]
                offload.forward, plain, module, begins and not starts_segment(module)
            )


def _check(
    model: nn.Module, modules: dict[str, nn.Module], names: list[str], runs: Sequence[Any]
) -> None:
    given = f"blocks={[list(run) for run in runs]}: "
    unknown = [name for name in names if not name or name not in modules]
    if unknown:
        children = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"{given}{unknown} are no modules of {type(model).__name__}. Its top-level modules "
            f"are: {children}."
        )
    nested = [n for n in names if any(n.startswith(f"{other}.") for other in names)]
    if len(set(names)) < len(names) or nested or not all(runs):
        raise InputError(
            given + (f"{nested} lie in others of them. " if nested else "")
            + "Each run names modules, each of them once, and none inside another."
        )  # fmt: skip
    if is_compiled(model):
        raise InputError(COMPILED)
    taken = [n for n in names if _is_offloaded(modules[n])]
    if taken:
        raise InputError(f"{given}{taken} are offloaded already.")
    hidden = sorted(set(names) & inside_recompute(model))
    if hidden:
        raise InputError(
            f"{given}{hidden} run inside what is recomputed, so nothing of them is kept until "
            "backward. Name the first module of a segment (apply_segments), or leave recompute out."
        )


def _is_offloaded(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    own = getattr(forward.func, "__self__", None) if isinstance(forward, partial) else None
    return isinstance(own, _Offload)
