"""Estimates of networks, kept from plan to plan in files of the user's folder of caches.

An estimate depends on the network, the settings, the device and the code that is traced. The code
counts as known where each module's class and its methods are torch's, timm's, torchvision's or
lbaccel's own, of which versions and files are compared; estimates of any other network are not
kept. A function that is replaced while the process runs is seen in classes of modules and in
torch.nn.functional, and nowhere else. One file holds those of one network on one device
(`lbaccel.launch.estimates_folder`).
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import timm.layers.config
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules

from lbaccel.batch.plan import BatchPlan
from lbaccel.launch import estimates_folder, variables
from lbaccel.planning.candidates import Candidate, Estimate, Survey
from lbaccel.planning.cost.chain import ChainCost, Unit, UnitCost
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.kept import KeptResults, name_of
from lbaccel.planning.cost.kept_kernels import this_processor
from lbaccel.planning.cost.processor import kernel_state
from lbaccel.planning.cost.update import Network, classification_loss

PACKAGES = ("lbaccel", "timm", "torch", "torchvision")  # whose code is known by its files
VARIABLES = ("TIMM_", "ATEN_", "ONEDNN_", "DNNL_", "MKL_")  # and none that each launch sets
MOST = 150  # estimates of one network, some 10 KiB each, or 200 for a thousand units
MOST_FILES = 100
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device)
_BUILT_IN = ("builtins", "typing", "abc", "enum", "collections")
_NAME = re.compile(r"[0-9a-f]{32}\.json")  # of a file of ours
_OF_CANDIDATE = ("global_batch_size", "micro_batch_size", "world_size")  # not the contract's own


class NotKnown(Exception):
    """Code or a value of which no text says all."""


class KeptEstimates(KeptResults[Estimate | Survey]):
    """Estimates by what was asked of one network on one device."""

    def __init__(self, path: Path | None, owner: str) -> None:
        super().__init__(path, owner, most=MOST)

    def _to_json(self, result: Estimate | Survey) -> Any:
        return {"kind": type(result).__name__, **asdict(result)}

    def _from_json(self, value: Any) -> Estimate | Survey:
        known: dict[str, Any] = dict(value)
        if known.pop("kind") == Survey.__name__:
            known["units"] = [Unit(**unit) for unit in known["units"]]
            _check_numbers(known["seconds"], known["by_layout"])
            return Survey(**known)
        chain: dict[str, Any] | None = known["chain"]
        if chain is not None:
            units = tuple(UnitCost(**unit) for unit in chain["units"])
            known["chain"] = ChainCost(**{**chain, "units": units})
            _check_numbers(*(n for unit in units for n in vars(unit).values()))
            _check_numbers(*(n for key, n in chain.items() if key != "units"))
        known["forward_seconds"] = tuple(known["forward_seconds"])
        _check_numbers(*known["forward_seconds"], *known["accumulating"].values())
        parts = ("chain", "forward_seconds", "breakdown", "accumulating")
        _check_numbers(*(n for key, n in known.items() if key not in parts))
        if sum(known["breakdown"].values()) != known["peak"]:
            raise ValueError(known["breakdown"])
        return Estimate(**known)


def _check_numbers(*values: Any) -> None:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(values)


def asked_for(plan: BatchPlan, precision: str, what: tuple[Candidate, int] | int) -> Any:
    """The question that an estimate or a survey of a network answers."""
    contract = [
        (field.name, getattr(plan, field.name))
        for field in fields(plan)
        if field.name not in _OF_CANDIDATE
    ]
    return contract, precision, what


def kept_estimates(
    network: Network, states: Sequence[Tensor], device: Device
) -> KeptEstimates | None:
    """Those of a network, whose optimizer has such states; None where none can be kept."""
    folder = estimates_folder()
    if folder is None:
        return None
    try:
        owner = "\n".join(map(repr, _owner(network, states, device)))
    except Exception:  # `NotKnown`, or an attribute that can't be looked at
        return None
    name = name_of(owner)
    path = folder / f"{name}.json"
    _make_room(folder, path)
    return KeptEstimates(path, owner=name)


def _owner(network: Network, states: Sequence[Tensor], device: Device) -> Iterator[Any]:
    """All that an estimate depends on beside what is asked.

    Raises:
        NotKnown: it depends on more than can be said.
    """
    if network.loss_fn is not classification_loss or network.embed is not None:
        raise NotKnown
    if not _is_known(network.make_batch) or _hooks_of_all_modules() or not _is_unpatched():
        raise NotKnown
    yield sys.version, torch.__version__, *map(_files, PACKAGES)
    yield device, this_processor() if device.kind == "cpu" else None
    yield _flags()
    with torch.device("meta"):
        yield [_of_value(network.make_batch(size)) for size in (1, 2)]
    yield network.clips, network.memory_format
    for model in (network.model, network.teacher):
        if model is not None:
            yield list(_of_model(model))
    if network.optimizer is not None:
        groups = network.optimizer.param_groups
        yield _of_class(type(network.optimizer))
        yield [_of_value({**group, "params": len(group["params"])}) for group in groups]
        yield [_of_value(state) for state in states]


def _flags() -> tuple[Any, ...]:
    """The state of this process on which a trace may depend."""
    return (
        torch.get_default_dtype(),
        kernel_state(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        getattr(torch.utils.checkpoint, "_enable_checkpoint_early_stop", None),
        [(name, v) for name, v in sorted(vars(timm.layers.config).items()) if type(v) in _PLAIN],
        sorted(variables(*VARIABLES).items()),
    )


def _of_model(model: nn.Module) -> Iterator[Any]:
    places: dict[int, int] = {}  # modules and parameters may be shared
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in places:
            yield name, places[id(module)]
            continue
        places[id(module)] = len(places)
        tensors = [
            (key, places.setdefault(id(t), len(places)), t.requires_grad, _of_value(t))
            for held in (module._parameters, module._buffers)
            for key, t in held.items()
            if t is not None
        ]
        yield name, _of_class(type(module)), tensors, _of_attributes(module)


def _of_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules", "training"):
            continue
        if "hook" in key:
            if value and "state_dict" not in key:
                raise NotKnown
            continue
        found.append((key, _of_value(value)))
    return found


def _of_value(value: Any) -> Any:
    """The value as something of which `repr` says all."""
    if type(value) in (Tensor, nn.Parameter):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if type(value) in (tuple, list):
        return type(value).__name__, [_of_value(item) for item in value]
    if type(value) in (set, frozenset):
        return type(value).__name__, sorted(repr(_of_value(item)) for item in value)
    if isinstance(value, dict):
        return "dict", [(_of_value(key), _of_value(item)) for key, item in value.items()]
    if isinstance(value, Enum) and _is_known(type(value)):
        return type(value).__qualname__, value.name
    if type(value) not in _PLAIN:
        raise NotKnown
    return value


def _of_class(kind: type) -> str:
    """A class by name, whose code and that of its bases is known.

    Raises:
        NotKnown: a class, or a method of it, is of another package.
    """
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _BUILT_IN:
            continue
        methods = (m for m in vars(base).values() if isinstance(m, FunctionType))
        if not _is_known(base) or not all(map(_is_known, methods)):
            raise NotKnown
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_known(code: Any) -> bool:
    """Whether a class or a function comes from one of `PACKAGES`."""
    return str(getattr(code, "__module__", "")).partition(".")[0] in PACKAGES


def _is_unpatched() -> bool:
    """Whether the functions of torch.nn.functional are torch's own."""
    return all(_is_known(f) for f in vars(F).values() if isinstance(f, FunctionType))


def _hooks_of_all_modules() -> bool:
    """Whether somebody listens to every module of this process."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return any(getattr(modules, f"_global_{kind}_hooks", None) for kind in kinds)


@lru_cache
def _files(package: str) -> Any:
    """Version and files of a package: where they lie, their sizes and times."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    if package == "torch":  # thousands of files, and nobody edits them
        return spec.origin, torch.__version__
    folder = Path(spec.origin).parent
    found = []
    for path in sorted(folder.rglob("*.py")):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return name_of(found)


def _make_room(folder: Path, path: Path) -> None:
    """Drop the files that were written longest ago, where there are too many to add `path`."""
    with contextlib.suppress(OSError):
        if path.exists():
            return
        ours = [file for file in folder.iterdir() if _NAME.fullmatch(file.name)]
        files = sorted(ours, key=lambda file: file.stat().st_mtime)
        for path in files[: max(0, len(files) - MOST_FILES + 1)]:
            path.unlink(missing_ok=True)
