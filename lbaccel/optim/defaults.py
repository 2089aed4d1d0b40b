"""The recipe's learning rate, weight decay and warmup where nobody gives them (no torch)."""

from __future__ import annotations

from lbaccel.optim.scaling import is_sgd


def default_base_lr(optimizer: str, *, pretrained: bool) -> float:
    """0.1 for SGD (Goyal et al. 2017, at 256) and 0.001 for the others; a tenth for finetuning."""
    if is_sgd(optimizer):
        return 0.01 if pretrained else 0.1
    return 1e-4 if pretrained else 1e-3


def default_weight_decay(optimizer: str) -> float:
    """1e-4 for SGD, 0.05 for the others."""
    return 1e-4 if is_sgd(optimizer) else 0.05


def default_warmup(epochs: float | None) -> float:
    """Epochs of warmup in the recipe: 5, or a quarter of a run below 20.

    >>> default_warmup(None), default_warmup(8)
    (5.0, 2.0)
    """
    return 5.0 if epochs is None else min(5.0, epochs / 4)
