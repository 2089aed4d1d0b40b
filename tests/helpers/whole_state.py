"""Everything that a trial must leave as it was, as one dictionary of hashes."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def digest(value: Any) -> str:
    """A hash of tensors, arrays and plain values, however nested; None is a value too."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        text = f"{raw.dtype}{tuple(raw.shape)}".encode() + raw.view(-1).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        text = value.tobytes()
    elif isinstance(value, dict):
        text = repr([(str(k), digest(v)) for k, v in value.items()]).encode()
    elif isinstance(value, (list, tuple)):
        text = repr([digest(v) for v in value]).encode()
    else:
        text = repr(value).encode()
    return hashlib.sha256(text).hexdigest()


def whole_state(
    large_batch: Any, model: torch.nn.Module, optimizer: Any, loader: Any, *more: Any
) -> dict[str, str]:
    """Hashes of all parts; `more` are objects with a `state_dict`."""
    plain = getattr(optimizer, "optimizer", optimizer)
    parts = {
        "weights and buffers": model.state_dict(),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "identity": [id(p) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "optimizer": plain.state_dict(),
        "groups": [
            {k: v for k, v in group.items() if k != "params"} for group in plain.param_groups
        ],
        "counters": large_batch.state_dict(),
        "plan": str(large_batch.plan),
        "loader": [loader.state_dict(), str(loader.plan), loader.epoch],
        "random": [
            torch.get_rng_state(),
            np.random.get_state()[1],
            np.random.get_state()[2:],
            random.getstate(),
        ],
        "more": [thing.state_dict() for thing in more],
    }
    return {name: digest(part) for name, part in parts.items()}
