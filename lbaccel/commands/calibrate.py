"""`lbaccel calibrate`: measure the device at hand, so that plans know its rates."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lbaccel.errors import RunFailed
from lbaccel.launch import calibration_file
from lbaccel.recipe import bounds
from lbaccel.runs.columns import columns
from lbaccel.runs.outputs import writable

if TYPE_CHECKING:  # flags and help need no torch
    from lbaccel.planning.cost.devices import Device

SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lbaccel calibrate`."""
    parser.description = (
        "Measure what this machine's device reaches in each class of kernel, for plans of time. "
        "Other work on the device makes it look slower than it is."
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="what to measure (default: cuda if there, else cpu)",
    )
    parser.add_argument(
        "--seconds",
        type=bounds.positive,
        default=SECONDS,
        help="about how long (default: %(default)g)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON of devices to add it to (default: $LBACCEL_CALIBRATION, or "
        "lbaccel/calibration.json in $XDG_CACHE_HOME or ~/.cache)",
    )
    parser.add_argument("--json", action="store_true", help="print the device as JSON alone")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write and print; 0.

    Raises:
        InputError: a device that is not there, or a file that can't be written.
        RunFailed: the device has no memory left.
    """
    import torch

    from lbaccel.planning.cost.calibrate import calibrate
    from lbaccel.planning.cost.devices import read_calibration, write_calibration

    a = arguments
    name = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path: Path = writable(a.output or calibration_file(), "--output", parents=True)
    read_calibration(path)
    try:
        device = calibrate(torch.device(name), seconds=a.seconds)
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"{name} has no memory left to measure with: {error}") from error
    write_calibration(path, device)
    if a.json:
        print(json.dumps({"file": str(path), **asdict(device)}, indent=1))
    else:
        print(_table(device))
        print(f"written to {path}")
    return 0


def _table(device: Device) -> str:
    """Aligned lines of class and rate, of this device."""
    import torch

    head = device.name if device.kind == "cuda" else f"cpu, threads: {torch.get_num_threads()}"
    rows: list[tuple[str, str]] = []
    for name, rate in {**device.rates, "bandwidth": device.bandwidth}.items():
        in_bytes = name.startswith(("norm", "elementwise", "bandwidth"))
        rows.append((name, f"{rate / 1e9:10,.1f} {'GB/s' if in_bytes else 'GFLOP/s'}"))
    rows.append(("launch", f"{device.launch_seconds * 1e6:10,.1f} us"))
    return "\n".join([head, *columns(rows)])
