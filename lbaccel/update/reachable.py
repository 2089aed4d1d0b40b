"""The tensors that a model and a loss function hold, each by a path and where it lies.

The walk follows modules, their plain attributes and hooks, objects of the user's own classes,
lists, dicts and deques, and of functions the closure, the defaults, the attributes and the globals
that they name. It is bounded in depth and number, and enters no library but `torch.nn`'s modules.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError
from lbaccel.update.embeddings import Coupled

LOSS = "loss_fn"  # how the paths of the loss function's tensors begin
MOST_DEEP = 10
MOST_HOLDERS = 50_000
Kind = Literal["parameter", "buffer", "plain"]

_CLOSED = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL", "scipy", "sklearn"} | {
    "accelerate", "deepspeed", "lbaccel", "matplotlib", "tqdm", "transformers", "wandb",
}  # fmt: skip
_OF_MODULES = {*vars(nn.Module())} | {"_modules", "_ghost_slot"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor lies: an entry of a container, or a cell of a closure."""

    path: str
    holder: Any
    key: Any
    kind: Kind

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that lies there now."""
        try:
            value = self.holder.cell_contents if _is_cell(self.holder) else self.holder[self.key]
        except (KeyError, IndexError, ValueError):
            return None
        return value if isinstance(value, Tensor) else None

    @property
    def writable(self) -> bool:
        """Whether another tensor can be put there."""
        return not isinstance(self.holder, tuple)

    def put(self, tensor: Tensor) -> None:
        """Put another tensor there."""
        if _is_cell(self.holder):
            self.holder.cell_contents = tensor
        else:
            self.holder[self.key] = tensor


@dataclass(frozen=True)
class Reachable:
    """All that a walk came by."""

    places: dict[str, Place]
    holders: list[Any]  # containers whose entries may be replaced

    def named(self, names: Sequence[str], *, option: str) -> dict[str, Place]:
        """The places at and below the names given.

        Raises:
            InputError: a name that holds no tensor; it shows the nearest that do.
        """
        found: dict[str, Place] = {}
        for name in names:
            below = {path: place for path, place in self.places.items() if is_below(path, name)}
            if not below:
                last = name.replace("]", "").replace("'", "").replace("[", ".").split(".")[-1]
                near = [path for path in self.places if last and last in path][:3]
                some = near or [*self.places][:3]
                raise InputError(
                    f"{option}={name!r} holds no tensor. A name is the path of a tensor, or of "
                    f"what holds it, in the model, or from {LOSS!r} on in the loss function, such "
                    f"as {', '.join(map(repr, some)) or 'none'}. It must be there before the first "
                    "update."
                )
            found |= below
        return found


def is_below(path: str, name: str) -> bool:
    """Whether `path` is `name`, or lies inside of it.

    >>> is_below("head.mean", "head"), is_below("header.mean", "head"), is_below("a['b']", "a")
    (True, False, True)
    """
    return path == name or (path.startswith(name) and path[len(name)] in ".[")


def reachable(model: nn.Module | None, loss_fn: Any = None) -> Reachable:
    """Walk from the model, then from the loss function; a tensor has the first path that meets it.

    Args:
        model: without wrappers; its parameters and buffers have the names of `state_dict`.
        loss_fn: any callable; its paths begin with "loss_fn", and those of `embed` with "embed".

    >>> import torch
    >>> model = torch.nn.Linear(2, 3)
    >>> model.centers = torch.zeros(3)
    >>> list(reachable(model, torch.nn.functional.mse_loss).places)
    ['weight', 'bias', 'centers']
    """
    walk = _Walk()
    if model is not None:
        walk.run("", model)
    functions = loss_fn.functions if isinstance(loss_fn, Coupled) else {LOSS: loss_fn}
    for name, function in functions.items():
        if function is not None:
            walk.run(name, function)
    return Reachable(walk.places, walk.holders)


class _Walk:
    """Breadth first, so that a tensor's path is a short one."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.holders: list[Any] = []
        self._seen: dict[int, Any] = {}  # id to the object itself, whose id must stay its own
        self._queue: deque[tuple[str, Any, int]] = deque()

    def run(self, path: str, root: Any) -> None:
        self._queue.append((path, root, 0))
        while self._queue and len(self.holders) < MOST_HOLDERS:
            at, value, depth = self._queue.popleft()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._visit(at, value, depth)

    def _visit(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._module(path, value, depth)
        elif isinstance(value, (dict, list, tuple, deque)):
            keys = value.items() if isinstance(value, dict) else enumerate(value)
            self._entries(value, [(k, v, f"{path}[{k!r}]") for k, v in keys], depth)
        elif isinstance(value, functools.partial):
            self._parts(path, depth, func=value.func, args=value.args, keywords=value.keywords)
        elif isinstance(value, MethodType):
            for part in (value.__self__, value.__func__):
                self._queue.append((path, part, depth + 1))
        elif isinstance(value, FunctionType):
            self._function(path, value, depth)
        elif _is_open(type(value)) or isinstance(value, SimpleNamespace):
            self._object(path, value, depth)

    def _module(self, path: str, module: Any, depth: int) -> None:
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            self._entries(held, [(k, v, _join(path, k)) for k, v in held.items()], depth, kind)
        for name, child in module._modules.items():
            if child is not None:
                self._queue.append((_join(path, name), child, 0))
        own = [(k, v, _join(path, k)) for k, v in vars(module).items() if k not in _OF_MODULES]
        self._entries(vars(module), own, depth)
        for hooks in _HOOKS:
            for hook in vars(module).get(hooks, {}).values():
                self._queue.append((_join(path, "<hook>"), hook, depth + 1))

    def _object(self, path: str, value: Any, depth: int) -> None:
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            self._entries(held, [(k, v, _join(path, k)) for k, v in held.items()], depth)

    def _function(self, path: str, function: FunctionType, depth: int) -> None:
        if (function.__module__ or "").partition(".")[0] in _CLOSED:
            return
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                entry = (None, cell.cell_contents, _join(path, name))
            except ValueError:  # not filled yet
                continue
            self._entries(cell, [entry], depth)
        self._parts(path, depth, defaults=function.__defaults__, kwdefaults=function.__kwdefaults__)
        self._entries(
            vars(function), [(k, v, _join(path, k)) for k, v in vars(function).items()], depth
        )
        held = function.__globals__
        named = [n for n in dict.fromkeys(_names(function.__code__)) if n in held]
        self._entries(held, [(n, held[n], _join(path, n)) for n in named], depth, keep=False)
        self.holders.append(_Some(held, named))

    def _parts(self, path: str, depth: int, **parts: Any) -> None:
        for name, part in parts.items():
            if part:
                self._queue.append((f"{path}.{name}", part, depth + 1))

    def _entries(
        self, holder: Any, entries: Any, depth: int, kind: Any = "plain", *, keep: bool = True
    ) -> None:
        if keep:
            self.holders.append(holder)
        for key, value, path in entries:
            if isinstance(value, Tensor):
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self.places.setdefault(path, Place(path, holder, key, kind))
            elif depth < MOST_DEEP and not isinstance(value, (str, bytes, int, float, type)):
                self._queue.append((path, value, depth + 1))


@dataclass(frozen=True)
class _Some:
    """Those entries of a module's globals that a function names."""

    holder: dict[str, Any]
    keys: list[str]


class Kept:
    """The contents of containers and tensors as they are now, to be put back.

    Args:
        found: the containers; their entries are kept by reference.
        paths: of the tensors whose values are kept as well, in copies.
    """

    def __init__(self, found: Reachable, paths: Sequence[str]) -> None:
        self._entries = [(holder, _entries_of(holder)) for holder in found.holders]
        tensors = [found.places[path].tensor for path in paths]
        self._values = [(t, t.detach().clone()) for t in tensors if t is not None]

    @torch.no_grad()
    def put_back(self) -> None:
        """Containers and tensors as they were; only those that differ are written."""
        for holder, entries in self._entries:
            _restore(holder, entries)
        for tensor, value in self._values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def _entries_of(holder: Any) -> Any:
    if _is_cell(holder):
        return holder.cell_contents
    if isinstance(holder, _Some):
        return {k: holder.holder[k] for k in holder.keys if k in holder.holder}
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _restore(holder: Any, entries: Any) -> None:
    if _is_cell(holder):
        if holder.cell_contents is not entries:
            holder.cell_contents = entries
    elif isinstance(holder, _Some):
        for key, value in entries.items():
            if holder.holder.get(key) is not value:
                holder.holder[key] = value
    elif isinstance(holder, dict):
        for key in [k for k in holder if k not in entries]:
            del holder[key]
        for key, value in entries.items():
            if key not in holder or holder[key] is not value:
                holder[key] = value
    elif not isinstance(holder, tuple) and any(isinstance(i, Tensor) for i in (*holder, *entries)):
        holder.clear()  # a list without tensors is a log, which stays
        holder.extend(entries)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_open(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _CLOSED


def _is_cell(holder: Any) -> bool:
    return isinstance(holder, CellType)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
