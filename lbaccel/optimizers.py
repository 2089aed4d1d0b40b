"""timm's optimizers by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from lbaccel.errors import InputError

FUSED_ON = {
    "adagrad": ("cpu",),
    "adam": ("cpu", "cuda"),
    "adamw": ("cpu", "cuda"),
    "sgd": ("cpu", "cuda"),
}


def has_fused_step(name: str, *, device_type: str, precision: str) -> bool:
    """Whether torch steps this optimizer in one kernel, which reads and writes each tensor once.

    In fp16 the step is not fused: a fused one leaves an overflowed update out inside its kernel,
    so that Accelerate counts it as done.

    Raises:
        InputError: an unknown name.

    >>> has_fused_step("adamw", device_type="cuda", precision="bf16")
    True
    >>> has_fused_step("lamb", device_type="cuda", precision="bf16")
    False
    """
    _check_known(name)
    kind: Any = get_optimizer_info(name.lower()).opt_class  # a path where it is another package's
    if isinstance(kind, str) or not kind.__module__.startswith("torch."):
        return False
    fused = "fused" in inspect.signature(kind).parameters
    return fused and precision != "fp16" and device_type in FUSED_ON.get(kind.__name__.lower(), ())


def _check_known(name: str) -> None:
    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        raise InputError(f"optimizer={name!r} is none of timm.optim. Nearest: {', '.join(near)}.")


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    decay_all: bool = False,
    layer_decay: float | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of timm.optim over the parameters of `model`.

    Raises:
        InputError: an unknown name, one that can't be had here, or a second-order one.
    """
    _check_known(name)
    options: dict[str, Any] = {} if layer_decay is None else {"layer_decay": layer_decay}
    if fused:
        options["fused"] = True
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
