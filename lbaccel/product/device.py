"""The device that one process works on where no launcher chose one."""

from __future__ import annotations

import torch


def one_device() -> torch.device:
    """The accelerator of this machine, or the CPU; Apple's, which lbaccel refuses, is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None or device.type == "mps" else device
