"""Randomness inside the network, keyed: a mask is a function of the sample, not of the micro-batch.

Within an update, the draw of element e of sample position p in the forward's c-th random call is

    bits(h, e),   h = hash(seed, update, p, c)

a stateless hash in integer arithmetic on the device, so a mask is the same in every partition of
the update, on every rank, and in a recompute. The functions that draw masks (`F.dropout` and
its kin, DropPath, PatchDropout, StochasticDepth) are replaced while a micro-batch runs, and at no
other time: the model, its modules and its `state_dict` stay as they are.

A recompute must draw the c of its forward. Each call takes a token from torch's CPU generator,
which activation checkpointing puts back for a recompute: a token seen before names its c.

A draw by other means (dropout inside fused attention, a user's own `torch.rand`) can't be keyed by
sample. Its generators are seeded by (seed, update, first sample of the micro-batch): another
partition draws other masks of the same distribution, the same partition draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError, check_seed
from lbaccel.randomness.generators import generator_states, restore_generators, seed_generators
from lbaccel.randomness.keys import GOLDEN, MULTIPLIERS, SHIFTS, keyed_hash

# One number for each kind of key, so that no two share a hash.
OUTSIDE, MICRO_BATCH, MASKS = range(1, 4)
CALLS_AT_ONCE = (
    64  # keys of so many calls are hashed together: a dozen kernels in place of hundreds
)
# SELU's fixed point: -scale x alpha (Klambauer et al. 2017, section 1)
SELU_FLOOR = -1.7580993408473766
ALL_SAMPLES = -1  # in place of a position, where one draw serves all samples


class KeyedRandomness:
    """Random draws of the running update, as functions of (seed, update, sample position).

    Args:
        seed: of every draw; with another one, the same update has other masks.
        device: where the network runs.

    Raises:
        InputError: a seed that is no whole number from 0 to 2^64 - 1.

    >>> import torch
    >>> from lbaccel.batch.plan import MicroBatch
    >>> randomness, drop = KeyedRandomness(0, torch.device("cpu")), torch.nn.Dropout(0.5)
    >>> def run(*micro_batches):
    ...     rows = []
    ...     for m in micro_batches:
    ...         with randomness.forward(m):
    ...             rows.append(drop(torch.ones(m.num_samples, 3)))
    ...     return torch.cat(rows)
    >>> with randomness.update(0):
    ...     torch.equal(run(MicroBatch(0, (8,))), run(MicroBatch(0, (3,)), MicroBatch(3, (5,))))
    True
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = check_seed("seed", seed), device
        self._update = 0
        self._micro_batch: MicroBatch | None = None
        self._recomputing = False
        self._calls: dict[int, int] = {}  # token of a call to its number
        self._rows: dict[int, Tensor] = {}  # int64 [CALLS_AT_ONCE, n] of a block of calls
        # Made once, and closed to torch.compile: it compiles anew for each function and number.
        self.keys: Any = torch.compiler.disable(self._next_keys)
        self._keyed = [(o, name, make(self, getattr(o, name))) for o, name, make in _REPLACED]

    @contextmanager
    def update(self, index: int) -> Iterator[None]:
        """Inside, every generator is a function of (seed, update); after it, as it was before."""
        states = generator_states(self.device)
        self._update = index
        seed_generators(int(keyed_hash(self.seed, OUTSIDE, index)), self.device)
        try:
            yield
        finally:
            restore_generators(states, self.device)

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, calls for masks draw by sample, in forward and recompute."""
        self._micro_batch = micro_batch
        self._calls, self._rows = {}, {}
        seed = keyed_hash(self.seed, MICRO_BATCH, self._update, micro_batch.start)
        seed_generators(int(seed), self.device)
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in self._keyed]
        try:
            for owner, name, keyed in self._keyed:
                setattr(owner, name, keyed)
            yield
        finally:
            for owner, name, original in plain:
                setattr(owner, name, original)
            self._micro_batch, self._recomputing = None, False
            self._rows = {}

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, a call is a recompute's and must be one of the forward's."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def _next_keys(self, x: Tensor, *, batch: bool = False) -> Tensor | None:
        """Int64 keys [x.shape[0]] or [1] of the next call's rows; None: `x` has no rows of samples.

        Rows are samples, or several of each sample one after the other (windows of attention).
        With one row for several samples, or with `batch`, the draw is common to the update.
        """
        assert self._micro_batch is not None
        samples, rows = self._micro_batch.num_samples, x.shape[0] if x.ndim else 0
        common = batch or (rows == 1 and samples > 1)
        if not common and (rows == 0 or rows % samples):
            return None
        call = self.call_number()
        if common:
            h = torch.full((1,), _signed(self._base()), dtype=torch.int64, device=x.device)
            return _chain(_chain(h, ALL_SAMPLES), call)
        block, row = divmod(call, CALLS_AT_ONCE)
        if block not in self._rows:
            start = self._micro_batch.start
            positions = torch.arange(start, start + samples, device=x.device)
            calls = torch.arange(CALLS_AT_ONCE, device=x.device) + block * CALLS_AT_ONCE
            h = _chain(torch.full_like(positions, _signed(self._base())), positions)
            self._rows[block] = _chain(h[None].repeat(CALLS_AT_ONCE, 1), calls[:, None])
        keys = self._rows[block][row]
        if rows == samples:
            return keys
        parts = torch.arange(rows // samples, device=x.device)
        return _chain(keys[:, None].repeat(1, len(parts)), parts[None]).reshape(-1)

    def _base(self) -> int:
        return int(keyed_hash(self.seed, MASKS, self._update))

    def call_number(self) -> int:
        """Number of this call among the micro-batch's, the same in forward and recompute."""
        token = int(torch.randint(2**62, (), device="cpu"))
        if token not in self._calls:
            if self._recomputing:
                raise InputError(
                    "a recompute in the backward pass calls for a mask that its forward did not "
                    "draw, so its gradient would be wrong: the random state was not put back. Use "
                    "activation checkpointing with preserve_rng_state=True, such as "
                    "apply_activation_checkpointing(model)."
                )
            self._calls[token] = len(self._calls)
        return self._calls[token]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _chain(h: Tensor, part: Tensor | int) -> Tensor:
    """One step of `keyed_hash` on int64 tensors, which wrap as uint64 do; in place in `h`."""
    h.add_(part).add_(1).mul_(_signed(GOLDEN))
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        logical = (h >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # >> keeps the sign
        h.bitwise_xor_(logical)
        if multiplier != 1:
            h.mul_(_signed(multiplier))
    return h


def element_bits(keys: Tensor, count: int) -> Tensor:
    """Random int32 [len(keys), count]: a hash of each key and element in 32-bit arithmetic.

    The element is multiplied and folded (Knuth's golden ratio), then mixed with the key's two
    halves in two rounds of xor, multiply and shift. Uniform over the whole range of int32, best in
    its upper bits.
    """
    low, high = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    element = torch.arange(count, dtype=torch.int32, device=keys.device).mul_(-1640531527)
    element = element ^ (element >> 15).bitwise_and_(0x1FFFF)
    h = (element ^ low).mul_(0x7FEB352D)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(high)
    return h.mul_(-2073254261)


def keep_mask(keys: Tensor, keep: float, shape: tuple[int, ...]) -> Tensor:
    """Bool [len(keys), *shape], True with probability `keep` (to 2^-32)."""
    threshold = round(keep * 2**32) - 2**31
    bits = element_bits(keys, math.prod(shape)).view(len(keys), *shape)
    return bits < threshold if threshold < 2**31 else torch.ones_like(bits, dtype=torch.bool)


def _dropped(x: Tensor, mask: Tensor, keep: float, inplace: bool = False) -> Tensor:
    """x * mask / keep; autograd saves the mask, a byte an element."""
    scale = 1.0 / keep if keep > 0 else 0.0
    return x.mul_(mask).mul_(scale) if inplace else (x * mask).mul_(scale)


Make = Callable[[KeyedRandomness, Any], Any]


def _dropout(num_channel_dims: int | None) -> Make:
    """F.dropout (each element), or F.dropout1d to 3d (whole channels of so many dimensions)."""

    def make(randomness: KeyedRandomness, plain: Any) -> Any:
        def dropout(
            input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
        ) -> Tensor:
            unbatched = num_channel_dims is not None and input.ndim != num_channel_dims + 2
            if not training or not 0.0 < p <= 1.0 or unbatched:
                return plain(input, p, training, inplace)
            keys = randomness.keys(input)
            if keys is None:
                return plain(input, p, training, inplace)
            shape = tuple(input.shape[1:])
            if num_channel_dims is not None:
                shape = (shape[0], *[1] * num_channel_dims)
            return _dropped(input, keep_mask(keys, 1 - p, shape), 1 - p, inplace)

        return dropout

    return make


def _alpha_dropout(whole_channels: bool, default_training: bool) -> Make:
    """F.alpha_dropout (Klambauer et al. 2017, section 3) and F.feature_alpha_dropout."""

    def make(randomness: KeyedRandomness, plain: Any) -> Any:
        def alpha_dropout(
            input: Tensor,
            p: float = 0.5,
            training: bool = default_training,
            inplace: bool = False,
        ) -> Tensor:
            keys = randomness.keys(input) if training and 0.0 < p < 1.0 else None
            if keys is None:
                return plain(input, p, training, inplace)
            shape = tuple(input.shape[1:])
            if whole_channels:
                shape = (shape[0], *[1] * (len(shape) - 1))
            mask = keep_mask(keys, 1 - p, shape)
            a = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
            out = (input * mask + SELU_FLOOR * ~mask).mul_(a).sub_(a * SELU_FLOOR * p)
            return input.copy_(out) if inplace else out

        return alpha_dropout

    return make


def _drop_path(randomness: KeyedRandomness, plain: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        active = self.training and self.drop_prob
        keys = randomness.keys(x) if active else None
        if keys is None:
            return plain(self, x)
        keep = 1 - self.drop_prob
        mask = keep_mask(keys, keep, (1,) * (x.ndim - 1))
        return _dropped(x, mask, keep if self.scale_by_keep else 1.0)

    return forward


def _stochastic_depth(randomness: KeyedRandomness, plain: Any) -> Any:
    def forward(self: Any, input: Tensor) -> Tensor:
        active = self.training and self.p
        keys = randomness.keys(input, batch=self.mode == "batch") if active else None
        if keys is None:
            return plain(self, input)
        return _dropped(input, keep_mask(keys, 1 - self.p, (1,) * (input.ndim - 1)), 1 - self.p)

    return forward


def _patch_dropout(with_indices: bool) -> Make:
    """Liu et al. 2022 (arXiv 2208.07220): the L (1 - p) tokens of the smallest draws stay."""

    def make(randomness: KeyedRandomness, plain: Any) -> Any:
        def forward(self: Any, x: Tensor) -> Any:
            keys = randomness.keys(x) if self.training and self.prob else None
            if keys is None:
                return plain(self, x)
            prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            length = tokens.shape[1]
            num_keep = max(1, int(length * (1.0 - self.prob)))
            chosen = element_bits(keys, length).argsort(dim=-1, stable=True)[:, :num_keep]
            if self.ordered:
                chosen = chosen.sort(dim=-1)[0]
            kept = tokens.gather(1, chosen[..., None].expand(-1, -1, *tokens.shape[2:]))
            kept = torch.cat((prefix, kept), dim=1)
            return (kept, chosen) if with_indices else kept

        return forward

    return make


# owner, attribute, what makes its keyed twin out of (randomness, the plain one)
_REPLACED: list[tuple[Any, str, Make]] = [
    (F, "dropout", _dropout(None)),
    (F, "dropout1d", _dropout(1)),
    (F, "dropout2d", _dropout(2)),
    (F, "dropout3d", _dropout(3)),
    (F, "alpha_dropout", _alpha_dropout(False, False)),
    (F, "feature_alpha_dropout", _alpha_dropout(True, False)),
    (DropPath, "forward", _drop_path),
    (StochasticDepth, "forward", _stochastic_depth),
    (PatchDropout, "forward", _patch_dropout(False)),
    (PatchDropoutWithIndices, "forward", _patch_dropout(True)),
]
