"""A network of timm's with arguments of its own: tried without memory before it is built."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

from lbaccel.errors import InputError, brief
from lbaccel.host_memory import host_memory
from lbaccel.network_arguments import ZERO_INIT_LAST
from lbaccel.text import printable

MOST_VALUES = 2**40  # of a network: four terabytes in float32
_UNKNOWN = re.compile(
    r"(?:(\w+)\.)?__init__\(\) got (?:an )?unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'"
)
_MOST_TOLD = 40
_OWN = {"self", "device", "dtype", "num_classes", "in_chans", "img_size"}
_OWN |= {"drop_rate", "drop_path_rate"}


def try_arguments(name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """The network with arguments of its own, on the meta device: it takes no memory.

    Args:
        name: of timm's.
        arguments: of the network, from the user or a file.
        options: all other arguments of timm.create_model.

    Raises:
        InputError: the network does not take one of them, or can't be built with it.

    >>> import lbaccel.networks
    >>> num_values(try_arguments("cifar_resnet8", {"stem": 8}, {"num_classes": 10}))
    74377
    >>> try_arguments("cifar_resnet8", {"stme": 8}, {"num_classes": 10})
    Traceback (most recent call last):
    lbaccel.errors.InputError: --model-kwargs stme=8: cifar_resnet8 takes no such argument. Did you
    mean stem? It takes global_pool, num_blocks, projects, stem, widths, zero_init_last.
    """
    try:
        model = _on_meta(name, {**options, **arguments})
        _check_kinds(name, type(model), arguments)
    except InputError:
        raise
    except Exception as error:  # of timm's models, by arguments that they were not made for
        raise InputError(_refused(name, arguments, error)) from error
    described = num_values(model)
    if described > MOST_VALUES:
        raise InputError(
            f"--model-kwargs: {name} with {brief(dict(arguments))} has {described:,} values, and "
            f"{MOST_VALUES:,} are the most. Use smaller ones."
        )
    return model


def check_room(name: str, arguments: Mapping[str, Any], described: nn.Module) -> None:
    """Stop before a network is built on the CPU whose weights alone need more than what is free.

    A name has a size that is known; arguments have any.

    Args:
        name: of timm's.
        arguments: of the network.
        described: by `try_arguments`.

    Raises:
        InputError: with the values, the bytes in float32, and the bytes that are free.
    """
    if torch.empty(0).device.type != "cpu":  # torch's default device
        return
    try:
        free, _ = host_memory()
    except InputError:  # the system does not say
        return
    values = num_values(described)
    if 4 * values > free:
        raise InputError(
            f"--model-kwargs: {name} with {brief(dict(arguments))} has {values:,} values, which "
            f"need {4 * values / 2**30:,.1f} GiB in float32, and {free / 2**30:,.1f} GiB of this "
            "machine's memory are free. Use smaller ones."
        )


def num_values(model: nn.Module) -> int:
    """Elements of its parameters and buffers."""
    return sum(v.numel() for v in model.state_dict().values())


def _on_meta(name: str, options: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return timm.create_model(name, **options)


def _check_kinds(name: str, kind: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Text in place of a truth value is true to Python, `no` too."""
    declared = inspect.signature(kind.__init__).parameters
    for key, value in arguments.items():
        default = declared[key].default if key in declared else None
        if isinstance(default, bool) and not isinstance(value, bool) and value not in (0, 1):
            raise InputError(
                f"--model-kwargs {key}={brief(value)}: {name} takes True or False there. "
                f"Type {key}=True or {key}=False."
            )


def _refused(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    unknown = _UNKNOWN.search(str(error))
    if unknown is not None and unknown[2] in arguments:
        module = sys.modules[model_entrypoint(name.split(".")[0]).__module__]
        kind = getattr(module, unknown[1] or "", None)
        return _not_taken(name, unknown[2], arguments, kind)
    reason = printable(" ".join(f"{type(error).__name__}: {error}".split())[:200]).rstrip(".")
    return f"--model-kwargs: {name} can't be built with {brief(dict(arguments))}: {reason}."


def _not_taken(name: str, key: str, arguments: Mapping[str, Any], kind: Any) -> str:
    if key == ZERO_INIT_LAST:
        return (
            f"--zero-init-last: {name} has no such argument ({ZERO_INIT_LAST}); the residual "
            "networks of timm that do are ResNets and their like. Leave it out."
        )
    own: list[str] = []
    if inspect.isclass(kind):
        parameters = inspect.signature(kind.__init__).parameters.values()
        named = (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        own = sorted(n for n in named if n not in _OWN)
    near = difflib.get_close_matches(key, own, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    told = ", ".join(own[:_MOST_TOLD]) + (f" and {len(own) - _MOST_TOLD} more") * (
        len(own) > _MOST_TOLD
    )
    takes = f" It takes {told}." if own else ""
    return (
        f"--model-kwargs {key}={brief(arguments[key])}: {name} takes no such argument.{hint}{takes}"
    )
