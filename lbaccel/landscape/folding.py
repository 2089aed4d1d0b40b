"""BatchNorm merged into the convolution before it, in a copy of a network in evaluation mode.

In evaluation mode BatchNorm is a fixed affine function of each channel, so that

    gamma (W * x + b - mu) / sqrt(var + eps) + beta  =  (s W) * x + (b - mu) s + beta,
    s = gamma / sqrt(var + eps)

and one pass over the activations is saved for each pair. The pairs are seen, not read out of the
code: in one forward pass, BatchNorm's input is the very tensor that a convolution returned. Whoever
uses them compares the outputs with those of the network as it was (see `network.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """The names of a convolution and of the BatchNorm that alone reads its output."""

    conv: str
    norm: str


def pairs_of(model: nn.Module, images: Tensor) -> list[Pair]:
    """Each convolution and BatchNorm that a forward pass of these images shows to follow it.

    Args:
        model: in evaluation mode.
        images: [n, C, H, W].
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Any]] = {}  # the tensor is kept, so that no other has its id
    read: dict[str, list[str | None]] = {}

    def after(conv: nn.Module, _: Any, output: Any) -> None:
        made[id(output)] = (names[conv], output)

    def before(norm: nn.Module, given: tuple[Any, ...]) -> None:
        read.setdefault(names[norm], []).append(made.get(id(given[0]), (None, None))[0])

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after))
        elif _is_plain(module):
            hooks.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = [(producers[0], norm) for norm, producers in read.items() if len(producers) == 1]
    all_read = [conv for producers in read.values() for conv in producers]
    return [Pair(conv, norm) for conv, norm in once if conv and all_read.count(conv) == 1]


def _is_plain(module: nn.Module) -> bool:
    """Whether its evaluation is the affine function above, and nothing or an activation after."""
    plain = type(module) in (nn.BatchNorm2d, BatchNormAct2d)
    return plain and getattr(module, "running_mean", None) is not None


def take_out(model: nn.Module, pair: Pair) -> None:
    """Put the activation alone in the place of BatchNorm, and give the convolution a bias."""
    norm, conv = model.get_submodule(pair.norm), model.get_submodule(pair.conv)
    rest: nn.Module = nn.Identity()
    if isinstance(norm, BatchNormAct2d):
        found: Any = norm
        rest = nn.Sequential(found.drop, found.act)
    parent, _, name = pair.norm.rpartition(".")
    setattr(model.get_submodule(parent), name, rest)
    if conv.bias is None:
        weight: Any = conv.weight
        conv.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)


@torch.no_grad()
def merge(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> None:
    """Write the merged weight and bias into the convolution.

    Args:
        conv: without a norm behind it.
        weight, bias: of the convolution before it was merged; no bias is zero.
        norm: whose statistics, weight, bias and eps are read.
    """
    assert norm.running_var is not None and norm.running_mean is not None
    assert conv.bias is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    torch.mul(weight, scale.to(weight.dtype).view(-1, 1, 1, 1), out=conv.weight)
    conv.bias.copy_(shift)
