"""timm's optimizers by name."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from lbaccel.errors import InputError


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    decay_all: bool = False,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of timm.optim over the parameters of `model`.

    Raises:
        InputError: an unknown name, one that can't be had here, or a second-order one.
    """
    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        raise InputError(f"optimizer={name!r} is none of timm.optim. Nearest: {', '.join(near)}.")
    options: dict[str, Any] = {} if layer_decay is None else {"layer_decay": layer_decay}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name.lower(),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            filter_bias_and_bn=not decay_all,
            **options,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"--optimizer {name} can't be had here: {error}.") from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(
            f"--optimizer {name} needs the gradient of the gradient, which an update in "
            "micro-batches does not keep. Use a first-order one, such as adamw."
        )
    return optimizer
