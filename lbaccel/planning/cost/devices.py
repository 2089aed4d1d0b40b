"""Devices that a plan can be made for: what a datasheet says, or what `lbaccel calibrate` measured.

A rate is a number of operations or bytes a second; a multiply-add counts as two operations.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lbaccel.documents import json_in
from lbaccel.errors import InputError
from lbaccel.launch import calibration_file
from lbaccel.runs.folder import atomic_write_text

GIB = 2**30
# Bytes outside torch's allocator: 0.3 to 0.5 GiB, as kernels are loaded lazily (pytorch #86509).
CUDA_CONTEXT = int(0.45 * GIB)
# The share of a datasheet's numbers that real kernels reach (an RTX 3090 in timm's published
# results); calibration replaces it.
FLOP_SHARE, BANDWIDTH_SHARE = 0.6, 0.8


@dataclass(frozen=True)
class Device:
    """Rates and sizes of one device.

    `flops` has "fp32", "tf32" and "half"; `rates` is what a calibration found, by class of kernel
    (see `kernel_class`), in operations or bytes a second, and goes before `flops`.
    """

    name: str
    kind: str  # "cuda" or "cpu"
    memory: int | None  # bytes; None: the host's
    flops: Mapping[str, float]
    bandwidth: float  # bytes a second of its own memory
    launch_seconds: float  # of a kernel on the host: Python, autograd, dispatch
    host_bandwidth: float = 25e9  # bytes a second to and from the host, see `PCIE`
    link_bandwidth: float = 25e9  # bytes a second to the other devices
    source: str = "datasheet"
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Bytes that the runtime takes outside torch's allocator."""
        return CUDA_CONTEXT if self.kind == "cuda" else 0

    @property
    def library_workspace(self) -> int:
        """Bytes that cuBLAS holds: two handles of 8.125 MiB, of 32 MiB on Hopper."""
        if self.kind != "cuda":
            return 0
        hopper = any(card in self.name for card in ("H100", "H200"))
        return 2 * (32 * 2**20 if hopper else 8320 * 2**10)

    @property
    def reached_bandwidth(self) -> float:
        """Bytes a second that kernels reach: measured, or a share of the datasheet's."""
        return self.bandwidth * (1.0 if self.source == "calibrated" else BANDWIDTH_SHARE)


# Bytes a second of pinned copies in one direction, by generation and lanes of PCI Express: 0.8 of
# what the lanes carry (8, 16 and 32 GT/s a lane, 128 of 130 bits: the base specifications 3.0, 4.0
# and 5.0 of PCI-SIG), as headers and flow control take their part. A machine may give a card fewer
# lanes.
PCIE = {(3, 16): 12.5e9, (4, 8): 12.5e9, (4, 16): 25e9, (5, 16): 50e9}


def _card(
    name: str,
    gib: float,
    fp32: float,
    tf32: float,
    half: float,
    bandwidth: float,
    pcie: tuple[int, int] = (4, 16),
) -> tuple[str, Device]:
    flops = {"fp32": fp32 * 1e12, "tf32": tf32 * 1e12, "half": half * 1e12}
    memory, rate = int(gib * GIB), bandwidth * 1e9
    return name, Device(name, "cuda", memory, flops, rate, 10e-6, host_bandwidth=PCIE[pcie])


# GiB that a process can have, TFLOP/s without sparsity (half: bf16 or fp16 with fp32 sums), GB/s.
# The driver and error-correcting codes take their part first: a T4 of 16 GB has 14.56 GiB. The
# sizes are the smallest "total capacity" that public out-of-memory messages name for the card
# (docs/results/published_batches.md lists them); where none does, 97.5 % of its name (1080 Ti,
# 4060, 4070, 4070 Ti SUPER, 4080, A6000). Rates are those of the makers' datasheets, and so are
# generation and lanes of PCI Express, where they are not 4 and 16.
CARDS: dict[str, Device] = dict(
    (
        _card("GTX 1080 Ti", 10.7, 11.3, 11.3, 11.3, 484, pcie=(3, 16)),
        _card("RTX 2080 Ti", 10.76, 13.4, 13.4, 53.8, 616, pcie=(3, 16)),
        _card("RTX 3060", 11.75, 12.7, 12.7, 25.5, 360),
        _card("RTX 3070", 7.76, 20.3, 20.3, 40.6, 448),
        _card("RTX 3080", 9.78, 29.8, 29.8, 59.5, 760),
        _card("RTX 3090", 23.68, 35.6, 35.6, 71.2, 936),
        _card("RTX 4060", 7.8, 15.1, 15.1, 30.2, 272, pcie=(4, 8)),
        _card("RTX 4070", 11.7, 29.1, 29.1, 58.3, 504),
        _card("RTX 4070 Ti SUPER", 15.6, 44.1, 44.1, 88.2, 672),
        _card("RTX 4080", 15.6, 48.7, 48.7, 97.5, 717),
        _card("RTX 4090", 23.61, 82.6, 82.6, 165.2, 1008),
        _card("RTX 5090", 31.36, 104.8, 104.8, 209.5, 1792, pcie=(5, 16)),
        _card("RTX A4000", 15.61, 19.2, 38.3, 76.7, 448),
        _card("RTX A6000", 46.8, 38.7, 77.4, 154.8, 768),
        _card("T4", 14.56, 8.1, 8.1, 65.0, 320, pcie=(3, 16)),
        _card("V100", 15.78, 15.7, 15.7, 125.0, 900, pcie=(3, 16)),
        _card("A10", 22, 31.2, 62.5, 125.0, 600),
        _card("A100-40GB", 39.39, 19.5, 156.0, 312.0, 1555),
        _card("A100-80GB", 79.14, 19.5, 156.0, 312.0, 2039),
        _card("L4", 22, 30.3, 60.0, 121.0, 300),
        _card("L40S", 44.4, 91.6, 183.0, 362.0, 864),
        _card("H100", 79.1, 67.0, 494.0, 989.0, 3350, pcie=(5, 16)),
        _card("H200", 139, 67.0, 494.0, 989.0, 4800, pcie=(5, 16)),
    )
)

# One core of an AMD EPYC with AVX-512, as `lbaccel calibrate` found it; your own replaces it.
CPU = Device(
    "cpu",
    "cpu",
    None,
    {"fp32": 100e9, "tf32": 100e9, "half": 300e9},
    9e9,
    6.4e-06,
    source="built in",
    rates={
        "conv/fp32/contiguous": 1.4e11,
        "conv/fp32/channels_last": 2e11,
        "conv/half/contiguous": 4e11,
        "conv/half/channels_last": 4.7e11,
        "conv_backward/fp32/contiguous": 2.1e11,
        "conv_backward/fp32/channels_last": 2.3e11,
        "conv_backward/half/contiguous": 3.7e11,
        "conv_backward/half/channels_last": 4.2e11,
        "pointwise/fp32/contiguous": 5.8e10,
        "pointwise/fp32/channels_last": 9.9e10,
        "pointwise/half/contiguous": 1.3e11,
        "pointwise/half/channels_last": 4e11,
        "pointwise_backward/fp32/contiguous": 1e11,
        "pointwise_backward/fp32/channels_last": 1.4e11,
        "pointwise_backward/half/contiguous": 1.9e11,
        "pointwise_backward/half/channels_last": 3.7e11,
        "depthwise/fp32/contiguous": 1.7e10,
        "depthwise/fp32/channels_last": 3.5e10,
        "depthwise/half/contiguous": 4.9e10,
        "depthwise/half/channels_last": 1e11,
        "depthwise_backward/fp32/contiguous": 7.3e09,
        "depthwise_backward/fp32/channels_last": 2e10,
        "depthwise_backward/half/contiguous": 1e10,
        "depthwise_backward/half/channels_last": 1.7e10,
        "norm/fp32/contiguous": 3.7e09,
        "norm/fp32/channels_last": 4.3e09,
        "norm/half/contiguous": 1.3e10,
        "norm/half/channels_last": 1.4e10,
        "norm_backward/fp32/contiguous": 8e09,
        "norm_backward/fp32/channels_last": 6e09,
        "norm_backward/half/contiguous": 7.2e09,
        "norm_backward/half/channels_last": 1.3e10,
        "elementwise/fp32": 1.5e10,
        "elementwise/half": 1.9e10,
        "matmul/fp32": 1.1e11,
        "matmul/half": 3.4e11,
    },
)


def find_device(name: str, calibration: Path | None = None) -> Device:
    """The device of that name: "cpu", a card of the table, or one that was calibrated.

    Raises:
        InputError: an unknown name; the text has the nearest ones.
    """
    calibrated = {} if calibration is None else read_calibration(calibration)
    cards = {_key(card): device for card, device in CARDS.items()}
    asked = set(_key(name).split())
    for names in (calibrated, {**cards, "cpu": CPU}):
        if _key(name) in names:
            return names[_key(name)]
        # "NVIDIA H100 80GB HBM3" is an H100, and "H100" is what was calibrated under that name.
        alike = [known for known in names if asked and _are_alike(asked, set(known.split()))]
        if alike:
            return names[max(alike, key=lambda known: len(asked & set(known.split())))]
    near = difflib.get_close_matches(_key(name), list(cards), n=3, cutoff=0.4)
    known = [cards[card].name for card in near] or sorted(CARDS)
    raise InputError(
        f"device={name!r} is not known. {'Nearest' if near else 'Known'}: {', '.join(known)}, cpu. "
        "On the device itself `lbaccel calibrate` measures it."
    )


def device_at_hand(device: torch.device | None = None) -> Device:
    """The rates of this machine's GPU (or of `device`), else of its CPU.

    Raises:
        InputError: a card that is neither calibrated nor in the table.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return find_device(name, calibration_file())


def _are_alike(asked: set[str], known: set[str]) -> bool:
    return known <= asked or (asked <= known and any(c.isdigit() for w in asked for c in w))


def _key(name: str) -> str:
    words = name.lower().replace("nvidia", " ").replace("geforce", " ").replace("tesla", " ")
    return " ".join(words.replace("-", " ").replace("_", " ").split())


def read_calibration(path: Path) -> dict[str, Device]:
    """The devices of a file that `write_calibration` wrote; none where there is no file.

    Raises:
        InputError: a file that is something else.
    """
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json_in(path)
        return {_key(name): Device(**fields) for name, fields in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"calibration={path} can't be read: {error}. Remove it and run lbaccel calibrate."
        ) from error


def write_calibration(path: Path, device: Device) -> None:
    """Add `device` to the file, in place of one of its name."""
    kept = {d.name: d for d in read_calibration(path).values()} | {device.name: device}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: _fields(d) for name, d in kept.items()}, indent=1)
    atomic_write_text(path, text + "\n")


def _fields(device: Device) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(device).items()}
