"""The recipe's learning rate, weight decay and warmup where nobody gives them (no torch)."""

from __future__ import annotations

from lbaccel.optim.scaling import is_sgd


def default_base_lr(optimizer: str, *, pretrained: bool, frozen_norm: bool = False) -> float:
    """0.1 for SGD (Goyal et al. 2017, at 256) and 0.001 for the others; less for finetuning.

    Finetuning was measured on three networks and two data sets
    (`docs/results/finetuning_defaults.md`).

    Args:
        optimizer: its name.
        pretrained: the weights are: 0.01 for SGD, 1e-4 for the others.
        frozen_norm: BatchNorm keeps the statistics of the weights, while all layers are trained:
            0.003 for SGD, 3e-4 for the others.

    >>> default_base_lr("sgd", pretrained=True), default_base_lr("adamw", pretrained=False)
    (0.01, 0.001)
    """
    sgd = is_sgd(optimizer)
    if not pretrained:
        return 0.1 if sgd else 1e-3
    if frozen_norm:
        return 0.003 if sgd else 3e-4
    return 0.01 if sgd else 1e-4


def default_weight_decay(optimizer: str) -> float:
    """1e-4 for SGD, 0.05 for the others."""
    return 1e-4 if is_sgd(optimizer) else 0.05


def default_warmup(epochs: float | None) -> float:
    """Epochs of warmup in the recipe: 5, or a quarter of a run below 20.

    >>> default_warmup(None), default_warmup(8)
    (5.0, 2.0)
    """
    return 5.0 if epochs is None else min(5.0, epochs / 4)
