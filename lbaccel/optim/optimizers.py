"""timm's optimizers by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from lbaccel.errors import InputError, brief
from lbaccel.optim.groups import lr_factors, split_groups

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
    check_known(name)
    kind: Any = get_optimizer_info(name.lower()).opt_class  # a path where it is another package's
    if isinstance(kind, str) or not kind.__module__.startswith("torch."):
        return False
    fused = "fused" in inspect.signature(kind).parameters
    return fused and precision != "fp16" and device_type in FUSED_ON.get(kind.__name__.lower(), ())


def check_known(name: str) -> None:
    """Stop at a name that timm.optim does not have.

    Raises:
        InputError: such a name, with the nearest ones.
    """
    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f"Nearest: {', '.join(near)}." if near else "Use sgd or adamw, say."
        raise InputError(f"optimizer={brief(name)} is none of timm.optim. {hint}")


def _is(name: str, kind: str) -> bool:
    found: Any = get_optimizer_info(name.lower()).opt_class  # a path where it is another package's
    return not isinstance(found, str) and found.__name__ == kind


def notes(name: str, *, decay_all: bool, clip_grad_norm: float | None) -> list[str]:
    """A line for each thing that timm's LARS and LAMB do besides the settings given.

    >>> notes("lars", decay_all=False, clip_grad_norm=None)
    []
    """
    check_known(name)
    lines: list[str] = []
    if _is(name, "Lamb") and clip_grad_norm is None:
        lines.append(
            f"{name} clips the gradient's norm at 1.0, timm's default. --clip-grad-norm X takes "
            "its place."
        )
    if decay_all and (_is(name, "Lars") or _is(name, "Lamb")):
        lines.append(
            f"warning: --decay-all with {name} gives biases and norms a trust ratio too, which the "
            "papers leave out; one that starts at 0 takes its first step without one."
        )
    return lines


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    decay_all: bool = False,
    layer_decay: float | None = None,
    head_lr_scale: float | None = None,
    lr_groups: str = "none",
    betas: tuple[float, ...] | None = None,
    eps: float | None = None,
    clip_grad_norm: float | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of timm.optim over the parameters of `model`.

    Groups with a learning rate of their own have its factor as `lr_scale`, not yet applied (see
    `lbaccel.optim.groups`). `clip_grad_norm` is the caller's own clipping: LAMB then leaves out
    the one it has inside.

    Raises:
        InputError: an unknown name, one that can't be had here, a second-order one, a setting it
            does not have, or LARS and LAMB without weight decay.
    """
    check_known(name)
    name = name.lower()
    _check_trust_ratio(name, weight_decay)
    options = _moments(name, betas, eps)
    if layer_decay is not None and lr_groups != "none":
        raise InputError(
            f"--layer-decay {layer_decay:g} and --lr-groups {lr_groups} both say the learning "
            "rate of each block. Leave one out."
        )
    factors = lr_factors(model, head_lr_scale=head_lr_scale, lr_groups=lr_groups)
    if factors:
        options["param_group_fn"] = lambda network: split_groups(
            _timm_groups(network, weight_decay, decay_all, layer_decay), factors
        )
    elif layer_decay is not None:
        options["layer_decay"] = layer_decay
    if _is(name, "Lamb") and clip_grad_norm is not None:
        options["max_grad_norm"] = None
    if fused:
        options["fused"] = True
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name,
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


def _timm_groups(
    model: Any, weight_decay: float, decay_all: bool, layer_decay: float | None
) -> list[dict[str, Any]]:
    """The groups that `create_optimizer_v2` makes by itself."""
    options: dict[str, Any] = {
        "weight_decay": weight_decay,
        "weight_decay_exclude_1d": not decay_all,
        "no_weight_decay_list": model.no_weight_decay()
        if hasattr(model, "no_weight_decay")
        else (),
    }
    if layer_decay is None:
        return param_groups_weight_decay(model, **options)
    return param_groups_layer_decay(model, layer_decay=layer_decay, **options)


def _moments(name: str, betas: tuple[float, ...] | None, eps: float | None) -> dict[str, Any]:
    """`betas` and `eps` where the optimizer has them; timm would drop them in silence."""
    info = get_optimizer_info(name)
    if betas is not None and (not info.has_betas or len(betas) != info.num_betas):
        has = f"{info.num_betas} of them" if info.has_betas else "none"
        shown = " ".join(f"{beta:g}" for beta in betas)
        raise InputError(f"--betas {shown}: {name} has {has}. Leave it out, or give as many.")
    if eps is not None and not info.has_eps:
        raise InputError(f"--eps {eps:g}: {name} has none. Leave it out.")
    given = {"betas": betas, "eps": eps}
    return {key: value for key, value in given.items() if value is not None}


def _check_trust_ratio(name: str, weight_decay: float) -> None:
    plain = {"Lars": "momentum", "Lamb": "adam"}
    for kind, other in plain.items():
        if _is(name, kind) and weight_decay == 0:
            raise InputError(
                f"--optimizer {name} with --weight-decay 0: timm gives a trust ratio only to what "
                f"has weight decay, so this would be --optimizer {other}. Use that, or a decay too "
                "small to matter, --weight-decay 1e-12."
            )
