"""Activation checkpointing for any timm backbone: recompute blocks in the backward pass.

Recompute changes no statistic and no mask: `GhostNorm` knows a recompute by a flag that the
update's own backward sets, and torch restores the random state (`preserve_rng_state`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lbaccel.errors import InputError

_LISTS = (nn.ModuleList, nn.ModuleDict)
_STARTS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Checkpointing:
    """The recomputed parts: by the model's own hook, or the wrapped blocks by name."""

    by_model: bool
    blocks: tuple[str, ...]

    def __str__(self) -> str:
        if self.by_model:
            return "activation checkpointing: the model's own blocks (set_grad_checkpointing)"
        shown = ", ".join(self.blocks[:4]) + (", ..." if len(self.blocks) > 4 else "")
        return f"activation checkpointing: {len(self.blocks)} blocks wrapped ({shown})"


def apply_activation_checkpointing(
    model: nn.Module, blocks: Sequence[str] | None = None
) -> Checkpointing:
    """Recompute the activations of blocks of `model` in the backward pass, in place.

    Takes the model's own hook (`set_grad_checkpointing`, timm) where it has one; where it refuses,
    as 18 of timm's 98 families do, its repeated blocks are wrapped: members of module lists and
    sequences, and runs of layers of a long flat sequence. Only classes change, so parameter names
    and `state_dict` stay. Peak activations fall to the block inputs plus one block's inside
    (Chen et al. 2016, section 4), for about one more forward pass. Call it before
    `LargeBatch.prepare`.

    Args:
        model: the network, unwrapped.
        blocks: names of the modules to wrap, as `named_modules()` has them, in place of the choice.

    Raises:
        InputError: an unknown name, or nothing to wrap.
    """
    if blocks is None and _own_hook(model):
        return Checkpointing(True, ())
    modules = dict(model.named_modules())
    if blocks is None:
        chosen = dict(_find_blocks(model, _classifier(model)))
    else:
        unknown = [name for name in blocks if not name or name not in modules]
        if unknown:
            children = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"blocks={unknown} are no modules of {type(model).__name__}. Its top-level "
                f"modules are: {children}."
            )
        chosen = {name: modules[name] for name in blocks}
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no blocks that lbaccel finds to recompute. Name them: "
            "apply_activation_checkpointing(model, blocks=['layer1.0', ...])."
        )
    for module in chosen.values():
        if not type(module).__name__.startswith("Checkpointed"):
            module.__class__ = _checkpointed(type(module), _is_flat(module))
    return Checkpointing(False, tuple(chosen))


def apply_segments(model: nn.Module, segments: Sequence[Sequence[str]]) -> Checkpointing:
    """Recompute runs of modules of `model`, each run as one, in place.

    A segment keeps its first module's input and is recomputed whole in the backward pass (Chen et
    al. 2016, algorithm 1, with segments of any length). Its modules must run one after the other,
    each on the output of the last and with nothing else reading what lies between, as the planner
    finds them; a module that runs on anything else is an error when it does.

    Hooks of a module inside a segment see a stand-in of its output's shape; those of a segment's
    last module see the output.

    Args:
        model: the network, unwrapped.
        segments: names of modules in order of execution, as `named_modules()` has them.

    Raises:
        InputError: an unknown name, an empty segment, or a module in two of them, also of those
            applied before.
    """
    modules = dict(model.named_modules())
    names = [name for segment in segments for name in segment]
    wrong = [name for name in names if not name or name not in modules]
    if wrong or len(set(names)) < len(names) or not all(segments):
        raise InputError(
            f"segments={[list(s) for s in segments]}: "
            + (f"{wrong} are no modules." if wrong else "each names modules, each of them once.")
        )
    taken = [name for name in names if isinstance(vars(modules[name]).get("forward"), partial)]
    if taken:
        raise InputError(
            f"segments: {taken} are in segments of this model already, or offloaded. Give all "
            "segments at once, and offload after them."
        )
    for segment in segments:
        run = _Segment(tuple(segment), [modules[name] for name in segment])
        for position, name in enumerate(segment):
            modules[name].forward = partial(run.forward, position)  # type: ignore[method-assign]
    return Checkpointing(False, tuple(" .. ".join(dict.fromkeys((s[0], s[-1]))) for s in segments))


class _Segment:
    """Modules whose first one runs them all under `checkpoint`; the last one returns the result.

    Between them goes a stand-in of the true output's shape, all NaN: whatever reads its values,
    against the rule, ends in a loss that is not finite and never in a wrong one.
    """

    def __init__(self, names: tuple[str, ...], modules: list[nn.Module]) -> None:
        self.names, self.modules = names, modules
        self._shapes: list[tuple[Any, ...]] = []
        self._result: Any = None  # from the first module's call to the last one's
        self._handed_on: Any = None

    def forward(self, position: int, *args: Any, **kwargs: Any) -> Any:
        module = self.modules[position]
        if not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        if len(args) != 1 or kwargs:
            raise InputError(
                f"{self.names[position]!r} runs on {len(args)} arguments and {sorted(kwargs)}: a "
                "segment is made of modules that take one tensor. Leave it out of the segments."
            )
        (x,) = args
        if position == 0:
            self._result = checkpoint(self._run, x, use_reentrant=False)
        elif x is not self._handed_on:
            raise InputError(
                f"{self.names[position]!r} did not run on the output of "
                f"{self.names[position - 1]!r}, so the segment {list(self.names)} is no chain of "
                "this model. Give the segments that lbaccel plan finds."
            )
        out = self._result
        if position + 1 < len(self.modules):
            nothing = torch.full((), math.nan, dtype=out.dtype, device=out.device)
            out = nothing.expand(self._shapes[position])
        else:
            self._result = None
        self._handed_on = out if position + 1 < len(self.modules) else None
        return out

    def _run(self, x: Any) -> Any:
        shapes: list[tuple[int, ...]] = []
        for module in self.modules:
            x = type(module).forward(module, x)
            shapes.append(tuple(x.shape))
        self._shapes = shapes
        return x


def starts_segment(module: nn.Module) -> bool:
    """Whether `module` runs a whole segment, whose input is all that autograd keeps of it."""
    segment = _segment_of(module)
    return segment is not None and segment.modules[0] is module


def inside_recompute(model: nn.Module) -> set[str]:
    """Names of the modules of which autograd keeps nothing, as they run inside a recompute.

    A wrapped block is one of them: `checkpoint` keeps its input itself.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        wrapped = type(module).__name__.startswith("Checkpointed")
        recomputed = _segment_of(module) is not None
        if wrapped or (recomputed and not starts_segment(module)):
            found.add(name)
        if wrapped or recomputed or getattr(module, "grad_checkpointing", False) is True:
            prefix = f"{name}." if name else ""
            found |= {prefix + inner for inner, _ in module.named_modules() if inner}
    return found


def _segment_of(module: nn.Module) -> _Segment | None:
    forward = vars(module).get("forward")
    run = getattr(forward.func, "__self__", None) if isinstance(forward, partial) else None
    return run if isinstance(run, _Segment) else None


def _own_hook(model: nn.Module) -> bool:
    hook: Any = getattr(model, "set_grad_checkpointing", None)
    if hook is None:
        return False
    try:
        hook(True)
    except AssertionError:  # how timm says that a family has no support
        return False
    return True


def _classifier(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_classifier", None)
    found = getter() if getter is not None else None
    return found if isinstance(found, nn.Module) else None


def _find_blocks(
    module: nn.Module, classifier: nn.Module | None, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        has_children = next(child.children(), None) is not None
        holds_classifier = classifier is not None and any(m is classifier for m in child.modules())
        if holds_classifier or not has_children or isinstance(child, _BatchNorm):
            continue
        if next(child.parameters(), None) is None:
            continue
        runs_in_turn = isinstance(child, nn.Sequential)
        if isinstance(child, _LISTS) or (runs_in_turn and not _holds_layers_only(child)):
            yield from _find_blocks(child, classifier, f"{path}.")
        else:
            yield path, child


def _holds_layers_only(module: nn.Module) -> bool:
    return all(next(layer.children(), None) is None for layer in module.children())


def _is_flat(module: nn.Module) -> bool:
    """A plain sequence of single layers, such as VGG's `features`."""
    return type(module) is nn.Sequential and _holds_layers_only(module)


@cache
def _checkpointed(base: type[nn.Module], flat: bool) -> type[nn.Module]:
    plain: Any = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(self, *args, **kwargs)
        if not flat:
            return checkpoint(_call_fresh, plain, self, args, kwargs, use_reentrant=False)
        (x,) = args
        for run in _runs(list(self)):
            x = checkpoint(_call_in_turn, run, x, use_reentrant=False)
        return x

    return type(f"Checkpointed{base.__name__}", (base,), {"forward": forward})


def _call_fresh(plain: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call with new lists: HRNet's stages write into the list they get, and recompute needs it."""
    return plain(module, *_fresh(args), **_fresh(kwargs))


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fresh(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    return value


def _runs(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """About sqrt(k) runs of the k convolutions of a sequence; each begins with one of them.

    A run must not begin with an activation that works in place: it would spoil the saved input.
    """
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, _STARTS)]
    size = max(1, math.isqrt(len(starts)))
    cuts = [0, *starts[size::size], len(layers)]
    return [layers[a:b] for a, b in pairwise(cuts)]


def _call_in_turn(layers: list[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x
