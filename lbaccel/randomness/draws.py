"""The functions that draw masks, and their keyed twins: bits of a key and an element as a mask.

A twin asks for the keys of its tensor (`KeyedRandomness.keys`) and turns them to bits; where there
are none it draws as torch and timm do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from timm.layers import drop, patch_dropout
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from lbaccel.randomness.in_graph import GraphSource, Masked, drawn_in_graph, tracing

# SELU's fixed point: -scale x alpha (Klambauer et al. 2017, section 1)
SELU_FLOOR = -1.7580993408473766
COMMON, ALL_KEPT = -1, -2  # in place of the dimension of the samples


class Keys(NamedTuple):
    """The keys of a call, one a sample or one for all of them: row `row` of a block of calls."""

    low: Tensor  # int32 [calls, n], the lower half of each key
    high: Tensor  # int32 [calls, n], its upper half
    first: Tensor  # int32 [calls, n], `element_bits` of element 0
    row: int
    dim: int  # of the samples, or COMMON or ALL_KEPT
    runs: int  # of samples that the dimension holds
    mask: Tensor | None = None  # made ahead, times the scale where the call gave one
    elements: Tensor | None = None  # int32 [count], `folded_elements` made before

    def bits(self, count: int) -> Tensor:
        """`element_bits` [n, count] of this call."""
        return element_bits(self.low[self.row], self.high[self.row], count, self.elements)


class KeySource(GraphSource, Protocol):
    """Gives the keys of the next call, see `KeyedRandomness`."""

    keys: Callable[..., Keys | None]


def halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper 32 bits of int64 keys, as int32."""
    return keys.to(torch.int32), (keys >> 32).to(torch.int32)


def folded_elements(count: int, device: torch.device) -> Tensor:
    """Int32 [count]: the numbers of elements, multiplied and folded (Knuth's golden ratio)."""
    element = torch.arange(count, dtype=torch.int32, device=device).mul_(-1640531527)
    return element ^ (element >> 15).bitwise_and_(0x1FFFF)


def element_bits(low: Tensor, high: Tensor, count: int, elements: Tensor | None = None) -> Tensor:
    """Random int32 [len(low), count]: a hash of each key and element in 32-bit arithmetic.

    The element is folded (`folded_elements`, or `elements` where they were made before), then mixed
    with the key's two halves in two rounds of xor, multiply and shift. Uniform over the whole range
    of int32, best in its upper bits.
    """
    if elements is None:
        elements = folded_elements(count, low.device)
    return _mixed(elements ^ low[:, None], high[:, None])


def first_bits(low: Tensor, high: Tensor) -> Tensor:
    """`element_bits` of element 0, in the shape of the keys: the draw of a whole sample."""
    return _mixed(low.clone(), high)  # element 0 is folded to 0


def _mixed(h: Tensor, high: Tensor) -> Tensor:
    h.mul_(0x7FEB352D)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(high)
    return h.mul_(-2073254261)


def keep_mask(bits: Tensor, keep: float) -> Tensor:
    """Bool of the shape of `bits`, True with probability `keep` (to 2^-32)."""
    threshold = round(keep * 2**32) - 2**31
    return bits < threshold if threshold < 2**31 else torch.ones_like(bits, dtype=torch.bool)


def bits_of(
    source: KeySource, x: Tensor, covered: int, *, each: tuple[int, ...] = ()
) -> Tensor | None:
    """Random int32 that differ along the first `covered` dimensions of `x`, and are 1 in the rest.

    The bits of a sample are those of its own elements in order, wherever its dimension stands: in
    [B, L], [L, B] and [L x B] it draws the same.

    Args:
        source: of the keys.
        x: what the mask is for.
        covered: leading dimensions with draws of their own; dropped paths cover the first.
        each: dimensions of draws for each of these, in place of the rest of `x`.

    Returns:
        [*x.shape[:covered], *each or 1, ...]; None where the call has no keys.
    """
    if tracing(source):
        return drawn_in_graph(source, x, covered, keep=None, each=each)
    found = source.keys(x, covered)
    return None if found is None else bits_for(found, x, covered, each)


def bits_for(found: Keys, x: Tensor | Masked, covered: int, each: tuple[int, ...] = ()) -> Tensor:
    """`bits_of` the keys of a call; a view of what is kept, where a sample has one draw."""
    dim, runs, samples = found.dim, found.runs, found.low.shape[1]
    lead, rest = x.shape[:covered], each or (1,) * (x.ndim - covered)
    if dim == ALL_KEPT:
        return torch.full((*lead, *rest), -(2**31), dtype=torch.int32, device=x.device)
    if dim == COMMON:
        return found.bits(math.prod((*lead, *each))).view(*lead, *rest)
    if not each and lead == (samples,):  # one draw a sample
        return found.first[found.row].view(*lead, *rest)
    own = (*lead[:dim], runs, lead[dim] // (samples * runs), *lead[dim + 1 :], *each)
    bits = found.bits(math.prod(own)).view(samples, *own)
    if dim > 0 or runs > 1:
        bits = bits.movedim(0, dim + 1)
    return bits.reshape(*lead, *rest)


def _masked(
    source: KeySource, x: Tensor, covered: int, keep: float, *, scale: float, inplace: bool = False
) -> Tensor | None:
    """x * mask * scale, the mask True with probability `keep`; None where there are no keys.

    Autograd saves the mask, a byte an element. Two cases take one pass over `x` and give the same
    bits: a mask made ahead, and one of far fewer elements than `x`, such as that of whole paths. It
    is then multiplied by the scale first, which gives torch's default dtype. A tensor of another
    dtype, such as autocast's, takes its factors one after the other: in its own dtype the scale
    would be rounded.
    """
    in_one = not inplace and x.dtype == torch.get_default_dtype()
    if tracing(source):
        mask = drawn_in_graph(source, x, covered, keep=keep)
    else:
        found = source.keys(x, covered, keep, scale if in_one else None)
        if found is None:
            return None
        mask = found.mask
        if mask is None:
            mask = keep_mask(bits_for(found, x, covered), keep)
        elif in_one:
            return x * mask
    if in_one and covered < x.ndim:
        return x * (mask * scale)
    return x.mul_(mask).mul_(scale) if inplace else (x * mask).mul_(scale)


def _inverse(keep: float) -> float:
    return 1.0 / keep if keep > 0 else 0.0


Make = Callable[[KeySource, Any], Any]


def _dropout(num_channel_dims: int | None) -> Make:
    """F.dropout (each element), or F.dropout1d to 3d (whole channels of so many dimensions)."""

    def make(source: KeySource, plain: Any) -> Any:
        def dropout(
            input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> Tensor:
            covered = _channels(input.ndim, num_channel_dims)
            if not training or not 0.0 < p <= 1.0 or covered is None:
                return plain(input, p, training, inplace)
            scale = _inverse(1 - p)
            out = _masked(source, input, covered, 1 - p, scale=scale, inplace=inplace)
            return plain(input, p, training, inplace) if out is None else out

        return dropout

    return make


def _channels(ndim: int, num_channel_dims: int | None) -> int | None:
    """Leading dimensions whose elements have draws of their own; None where torch refuses.

    A tensor without samples has its channels in dimension 0; dropout2d takes [n, C, L] as such of
    samples, as torch does.
    """
    if num_channel_dims is None:
        return ndim
    if ndim == num_channel_dims + 2 or (num_channel_dims == 2 and ndim == 3):
        return 2
    return 1 if ndim == num_channel_dims + 1 else None


def _alpha_dropout(whole_channels: bool, default_training: bool) -> Make:
    """F.alpha_dropout (Klambauer et al. 2017, section 3) and F.feature_alpha_dropout."""

    def make(source: KeySource, plain: Any) -> Any:
        def alpha_dropout(
            input: Tensor,
            p: float = 0.5,
            training: bool = default_training,
            inplace: bool = False,
        ) -> Tensor:
            covered = min(2, input.ndim) if whole_channels else input.ndim
            bits = bits_of(source, input, covered) if training and 0.0 < p < 1.0 else None
            if bits is None:
                return plain(input, p, training, inplace)
            mask = keep_mask(bits, 1 - p)
            a = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
            out = (input * mask + SELU_FLOOR * ~mask).mul_(a).sub_(a * SELU_FLOOR * p)
            return input.copy_(out) if inplace else out

        return alpha_dropout

    return make


def _drop_path(source: KeySource, plain: Any) -> Any:
    def drop_path(
        x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True
    ) -> Tensor:
        out = None
        if training and drop_prob:
            keep = 1 - drop_prob
            out = _masked(source, x, 1, keep, scale=_inverse(keep) if scale_by_keep else 1.0)
        return plain(x, drop_prob, training, scale_by_keep) if out is None else out

    return drop_path


def _stochastic_depth(source: KeySource, plain: Any) -> Any:
    def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
        out = None
        if training and 0.0 < p <= 1.0 and mode in ("batch", "row"):
            covered = 0 if mode == "batch" else 1
            out = _masked(source, input, covered, 1 - p, scale=_inverse(1 - p))
        return plain(input, p, mode, training) if out is None else out

    return stochastic_depth


def _patch_dropout(source: KeySource, plain: Any) -> Any:
    """Liu et al. 2022 (arXiv 2208.07220): the L (1 - p) tokens of the smallest draws stay."""

    def patch_dropout_forward(
        x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
    ) -> Any:
        length = x.shape[1] - num_prefix_tokens
        bits = bits_of(source, x, 1, each=(length,)) if training and prob else None
        if bits is None:
            return plain(x, prob, num_prefix_tokens, ordered, training)
        prefix, tokens = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
        num_keep = max(1, int(length * (1.0 - prob)))
        chosen = bits.argsort(dim=-1, stable=True)[:, :num_keep]
        if ordered:
            chosen = chosen.sort(dim=-1)[0]
        kept = tokens.gather(1, chosen[..., None].expand(-1, -1, *tokens.shape[2:]))
        return torch.cat((prefix, kept), dim=1), chosen

    return patch_dropout_forward


# Owner, attribute, what makes its keyed twin out of (source of keys, the plain one). Each is a
# function that a layer finds by its name: torch.compile looks whether that is still the one that it
# traced. It does not look whether the method of a class is.
REPLACED: list[tuple[Any, str, Make]] = [
    (F, "dropout", _dropout(None)),
    (F, "dropout1d", _dropout(1)),
    (F, "dropout2d", _dropout(2)),
    (F, "dropout3d", _dropout(3)),
    (F, "alpha_dropout", _alpha_dropout(False, False)),
    (F, "feature_alpha_dropout", _alpha_dropout(True, False)),
    (drop, "drop_path", _drop_path),
    (sys.modules[StochasticDepth.__module__], "stochastic_depth", _stochastic_depth),
    (patch_dropout, "patch_dropout_forward", _patch_dropout),
]
