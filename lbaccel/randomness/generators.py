"""The global random generators of a process: their states, and seeding them all by one number."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

States = tuple[Any, ...]


def generator_states(device: torch.device) -> States:
    """The states of torch's CPU generator, the device's, numpy's and Python's; no host sync."""
    own = _device_generator(device)
    return (
        torch.default_generator.get_state(),
        None if own is None else own.get_state(),
        np.random.get_state(),
        random.getstate(),
    )


def restore_generators(states: States, device: torch.device) -> None:
    """Put the generators back to what `generator_states` returned."""
    torch.default_generator.set_state(states[0])
    own = _device_generator(device)
    if own is not None:
        own.set_state(states[1])
    np.random.set_state(states[2])
    random.setstate(states[3])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed all of them with a number of up to 64 bits."""
    torch.default_generator.manual_seed(seed)
    own = _device_generator(device)
    if own is not None:
        own.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def _device_generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]
