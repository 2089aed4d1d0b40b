"""Directions in the space of a network's weights: random ones, normalised, and between two models.

Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913), section 4: a
Gaussian direction d is scaled filter by filter, d_ij <- d_ij |w_ij| / |d_ij|, so that a step has
the same meaning in networks whose weights differ in scale. That compares networks with BatchNorm
fairly, whose filters can be scaled without any effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.randomness.keys import keyed_hash

WEIGHTS, STATES = "weights", "states"
DIRECTIONS = (WEIGHTS, STATES)
NORMS = ("filter", "layer", "weight")
BIAS_AND_NORM, NOTHING = "biasbn", "none"
IGNORED = (BIAS_AND_NORM, NOTHING)
_SMALLEST = 1e-30
_KIND = 0x1A2D  # of this draw, so that no other of the same seed shares its generator


def tensors_of(model: nn.Module, direction: str) -> dict[str, Tensor]:
    """The tensors that a direction moves, by name: the model's own, each once.

    Args:
        model: any network.
        direction: "weights" means all parameters; "states" means all parameters, and the buffers
            that a checkpoint holds and that hold numbers with a point: BatchNorm's running means
            and variances, and not its counter of batches.
    """
    found: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.is_floating_point()
    }
    if direction == STATES:
        kept = model.state_dict(keep_vars=True)
        found |= {
            name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()
        }
    return found


def random_direction(
    tensors: Mapping[str, Tensor],
    *,
    norm: str = "filter",
    ignore: str = BIAS_AND_NORM,
    seed: int = 0,
    axis: int = 0,
) -> dict[str, Tensor]:
    """A Gaussian direction, normalised by the weights, as Li et al. draw it.

    For a tensor w of more than one dimension, with i its first index and d of independent N(0, 1):

        filter:  d_i <- d_i |w_i| / |d_i|        layer:  d <- d |w| / |d|        weight:  d <- d w

    A tensor of one dimension (a bias, BatchNorm's weight, bias, running mean and variance) has no
    filters. Under `ignore` "biasbn" its direction is zero; under "none" it is the tensor itself, as
    in the authors' code.

    Args:
        tensors: of `tensors_of`; they are only read.
        norm: filter, layer or weight.
        ignore: biasbn or none.
        seed: of the draw, on the CPU: it is the same on every device.
        axis: 0 for x and 1 for y; each has draws of its own, and x has the same with and without y.

    Returns:
        A direction for each tensor, of its shape and type, on its device.

    >>> w = {"conv.weight": torch.full((2, 3), 2.0), "conv.bias": torch.ones(2)}
    >>> d = random_direction(w)
    >>> d["conv.weight"].norm(dim=1), d["conv.bias"]
    (tensor([3.4641, 3.4641]), tensor([0., 0.]))
    """
    generator = torch.Generator().manual_seed(int(keyed_hash(seed, _KIND, axis)) % 2**63)
    found = {}
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        own = tensor.detach().to("cpu", torch.float64)
        if own.dim() <= 1:
            drawn = torch.zeros_like(own) if ignore == BIAS_AND_NORM else own
        else:
            drawn = _normalised(drawn, own, norm)
        found[name] = drawn.to(tensor.device, tensor.dtype)
    return found


def _normalised(d: Tensor, w: Tensor, norm: str) -> Tensor:
    if norm == "weight":
        return d * w
    rows = (lambda t: t.flatten(1).norm(dim=1)) if norm == "filter" else (lambda t: t.norm())
    ratio: Any = rows(w) / rows(d).clamp_min(_SMALLEST)
    return d * ratio.reshape([-1] + [1] * (d.dim() - 1)) if norm == "filter" else d * ratio


def length(direction: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of a direction, over all of its tensors."""
    return float(sum(float(d.double().square().sum()) for d in direction.values()) ** 0.5)


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The cosine of the angle between two directions; 0 where one of them has no length."""
    dot = sum(float((a[name].double() * b[name].double()).sum()) for name in a)
    both = length(a) * length(b)
    return dot / both if both else 0.0
