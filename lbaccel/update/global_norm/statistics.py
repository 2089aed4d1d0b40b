"""The statistics of a BatchNorm layer over all samples of an update, and what follows from them.

With x of the layer over all n values of a channel, x' = (x - mean) / sqrt(var + eps) and
y = gamma x' + beta, the gradient of a loss l by x is (Ioffe and Szegedy 2015, section 3)

    dl/dx = gamma / sqrt(var + eps) (dl/dy - sum(dl/dy) / n - x' sum(dl/dy x') / n)

Its first term is the gradient of a layer with fixed statistics. The sums are the gradients of beta
and gamma of such a layer, over all samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError
from lbaccel.update.ghost_layers import merge_moments


class Statistics:
    """Of one layer in one update; its tensors are float64 [C] on the device.

    Args:
        layer: BatchNorm, converted.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.count = 0.0  # values a channel
        self._dtype = torch.float32  # of the layer's input
        self.mean: Tensor | None = None
        self.m2: Tensor | None = None  # sum of the squares about the mean
        self._fixed: tuple[Tensor, ...] | None = None
        self.weight: Tensor | None = None  # leaves in the place of gamma and beta
        self.bias: Tensor | None = None
        self.sums: Tensor | None = None  # `rank_sums`, over all ranks

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take the values of a micro-batch in (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        dims = [d for d in range(x.ndim) if d != 1]
        self._dtype = x.dtype
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        var, mean = torch.var_mean(wide, dims, correction=0)
        n = x.numel() // x.shape[1]
        self.merge(n, mean.double(), var.double() * n)

    def add_none(self, x: Tensor) -> None:
        """Values that don't count: those of a filler."""
        self._dtype = x.dtype
        self.merge(0, *x.new_zeros(2, x.shape[1], dtype=torch.float64))

    def merge(self, n: float, mean: Tensor, m2: Tensor) -> None:
        """Take the moments of other values in."""
        if self.mean is None or self.m2 is None or not self.count:
            self.count, self.mean, self.m2 = n, mean.clone(), m2.clone()
        elif n:
            merge_moments(self.mean, self.m2, self.count, mean, m2, n)
            self.count += n

    def moments(self) -> Tensor:
        """Float64 [2 C + 1]: mean, sum of squares and number of this rank's values."""
        assert self.mean is not None and self.m2 is not None
        return torch.cat([self.mean, self.m2, self.mean.new_tensor([self.count])])

    def take(self, rows: Tensor) -> None:
        """The `moments` of all ranks in the place of this one's."""
        self.mean = self.m2 = None
        for row, count in zip(rows, rows[:, -1].tolist(), strict=True):
            self.merge(count, *row[:-1].chunk(2))

    def note(self) -> None:
        """Leave this rank's moments where `GhostNorm.commit` merges them into the buffers."""
        slot = self.layer._ghost_slot
        if slot.mean is not None and self.mean is not None:
            slot.mean.copy_(self.mean)
            slot.var.copy_(self.m2)
            slot.values.fill_(self.count)

    def fix(self) -> None:
        """The moments are those of all samples: from here on the layer normalises by them.

        Raises:
            InputError: there is one value a channel in all.
        """
        assert self.mean is not None and self.m2 is not None
        if self.count < 2:
            raise InputError(
                f"BatchNorm layer {self.layer._ghost_slot.name!r} has one value a channel in the "
                "whole update: no variance can be taken. Use a global batch of at least 2 samples, "
                "larger images, or norm_batch_size='frozen'."
            )
        layer, var = self.layer, self.m2 / self.count
        own = torch.float32 if self._dtype != torch.float64 else torch.float64
        scale = (var + layer.eps).rsqrt()
        self._fixed = (self.mean.to(own), var.to(own), scale)
        gamma, beta = layer.weight, layer.bias
        like = {"dtype": own, "device": self.mean.device}
        self.weight = torch.ones_like(self.mean, **like)
        self.bias = torch.zeros_like(self.mean, **like)
        if gamma is not None:
            self.weight.copy_(gamma.detach())
        if beta is not None:
            self.bias.copy_(beta.detach())

    def listen(self) -> None:
        """Gradients of gamma and beta are added up from here on."""
        assert self.weight is not None and self.bias is not None
        self.weight.requires_grad_()
        self.bias.requires_grad_()

    def normalise(self, x: Tensor) -> Tensor:
        """The layer's output by the statistics of all samples."""
        assert self._fixed is not None
        mean, var, _ = self._fixed
        return nn.functional.batch_norm(
            x, mean, var, self.weight, self.bias, False, 0.0, self.layer.eps
        )

    def rank_sums(self) -> Tensor:
        """Float64 [2 C]: this rank's sums of dl/dy and of dl/dy x'; zero where none came."""
        assert self.weight is not None and self.bias is not None and self.mean is not None
        zero = torch.zeros_like(self.mean)
        return torch.cat(
            [zero if g is None else g.double() for g in (self.bias.grad, self.weight.grad)]
        )

    def give_back(self) -> None:
        """Add the gradients of gamma and beta to those of the layer's own."""
        for own, leaf in ((self.layer.weight, self.weight), (self.layer.bias, self.bias)):
            if own is not None and own.requires_grad and leaf is not None and leaf.grad is not None:
                grad = leaf.grad.to(own.dtype)
                own.grad = grad.clone() if own.grad is None else own.grad.add_(grad)

    def correction(self, x: Tensor) -> Tensor:
        """The part of dl/dx that the layer with fixed statistics leaves out, in the shape of `x`.

        Args:
            x: the layer's input; `sums` is over all ranks by now.
        """
        assert self._fixed is not None and self.mean is not None and self.weight is not None
        assert self.sums is not None
        _, _, scale = self._fixed
        shape = (1, -1, *[1] * (x.ndim - 2))
        of_bias, of_weight = self.sums.chunk(2)
        factor = -self.weight.detach().double() * scale / self.count
        # factor (sum(dl/dy) + (x - mean) scale sum(dl/dy x')) = a + b x
        b = factor * scale * of_weight
        a = factor * of_bias - b * self.mean
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.addcmul(a.to(wide).view(shape), b.to(wide).view(shape), x.to(wide)).to(x.dtype)
