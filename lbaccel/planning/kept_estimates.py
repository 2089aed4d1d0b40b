"""Estimates of networks, kept from plan to plan in files of the user's folder of caches.

An estimate depends on the network, the settings, the device and the code that is traced. The code
counts as known where each module's class is torch's, timm's, torchvision's or lbaccel's own, of
which versions and files are compared; estimates of any other network are not kept. One file holds
those of one network on one device (`lbaccel.launch.estimates_folder`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.launch import estimates_folder, variables
from lbaccel.planning.candidates import Candidate, Estimate, Survey
from lbaccel.planning.cost.chain import ChainCost, Unit, UnitCost
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.kept import KeptResults, name_of
from lbaccel.planning.cost.kept_kernels import this_processor
from lbaccel.planning.cost.update import Network, classification_loss

PACKAGES = ("lbaccel", "timm", "torch", "torchvision")  # whose code is known by its files
VARIABLES = ("TIMM_", "TORCH", "PYTORCH_", "ATEN_", "ONEDNN_", "DNNL_", "MKL_")
MOST = 400  # estimates of one network, some 10 KiB each
MOST_FILES = 100
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
            return Survey(**known)
        chain: dict[str, Any] | None = known["chain"]
        if chain is not None:
            chain = {**chain, "units": tuple(UnitCost(**unit) for unit in chain["units"])}
            known["chain"] = ChainCost(**chain)
        known["forward_seconds"] = tuple(known["forward_seconds"])
        return Estimate(**known)


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
    except NotKnown:
        return None
    path = folder / f"{name_of(owner)}.json"
    _make_room(folder, path)
    return KeptEstimates(path, owner=name_of(owner))


def _owner(network: Network, states: Sequence[Tensor], device: Device) -> Iterator[Any]:
    """All that an estimate depends on beside what is asked.

    Raises:
        NotKnown: it depends on more than can be said.
    """
    if network.loss_fn is not classification_loss or network.embed is not None:
        raise NotKnown
    if _package(network.make_batch) is None:
        raise NotKnown
    yield sys.version, torch.__version__, *map(_files, PACKAGES)
    yield device, *((this_processor(), torch.get_num_threads()) if device.kind == "cpu" else ())
    yield _flags()
    with torch.device("meta"):
        yield [_of_value(network.make_batch(size)) for size in (1, 2)]
    yield network.clips, network.memory_format
    for model in (network.model, network.teacher):
        if model is not None:
            yield list(_of_model(model))
    if network.optimizer is not None:
        yield type(network.optimizer).__qualname__, _package(type(network.optimizer))
        yield [_of_value({**group, "params": len(group["params"])}) for group in _groups(network)]
        yield [_of_value(state) for state in states]


def _groups(network: Network) -> list[dict[str, Any]]:
    assert network.optimizer is not None
    if _package(type(network.optimizer)) is None:
        raise NotKnown
    return network.optimizer.param_groups


def _flags() -> tuple[Any, ...]:
    """The state of this process on which a trace may depend."""
    return (
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        sorted(
            variables("TIMM_", "TORCH", "PYTORCH_", "ATEN_", "ONEDNN_", "DNNL_", "MKL_").items()
        ),
    )


def _of_model(model: nn.Module) -> Iterator[Any]:
    places: dict[int, int] = {}  # modules and parameters may be shared
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in places:
            yield name, places[id(module)]
            continue
        places[id(module)] = len(places)
        if _package(type(module)) is None:
            raise NotKnown
        tensors = [
            (key, places.setdefault(id(t), len(places)), t.requires_grad, _of_value(t))
            for held in (module._parameters, module._buffers)
            for key, t in held.items()
            if t is not None
        ]
        yield name, type(module).__qualname__, tensors, _of_attributes(module)


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
    if isinstance(value, Enum) and _package(type(value)) is not None:
        return type(value).__qualname__, value.name
    plain = (bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device)
    if type(value) not in plain:
        raise NotKnown
    return value


def _package(code: Any) -> str | None:
    """The package that a class or a function comes from, if it is one of `PACKAGES`."""
    package = str(getattr(code, "__module__", "")).partition(".")[0]
    return package if package in PACKAGES else None


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
        files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - MOST_FILES + 1)]:
            path.unlink(missing_ok=True)
