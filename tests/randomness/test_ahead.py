"""Masks made ahead are those of the documented hash, whatever is made ahead of what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from launches import Launches
from timm.layers.drop import DropPath
from torch import nn

from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness import ahead
from lbaccel.randomness.keys import keyed_hash
from lbaccel.randomness.masks import MASKS, KeyedRandomness

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def slow_mask(positions, call, elements, keep, *, seed, update):
    """Bool [samples, elements]: the hash of `KeyedRandomness` in numpy, an element at a time."""
    keys = keyed_hash(seed, MASKS, update, np.asarray(positions), call)
    low, high = keys.astype(np.uint32)[:, None], (keys >> np.uint64(32)).astype(np.uint32)[:, None]
    with np.errstate(over="ignore"):
        e = np.arange(elements, dtype=np.uint32) * np.uint32(2**32 - 1640531527)
        e = e ^ (e >> np.uint32(15))
        h = (e ^ low) * np.uint32(0x7FEB352D)
        h = h ^ (h >> np.uint32(15)) ^ high
        h = h * np.uint32(2**32 - 2073254261)
    return h.view(np.int32) < round(keep * 2**32) - 2**31


KINDS = {  # layer, shape of a sample, elements with draws of their own
    "a value a sample": (DropPath(0.3), (5, 4), 1),
    "its rate leaves the scale": (DropPath(0.3, scale_by_keep=False), (5,), 1),
    "small": (nn.Dropout(0.3), (5, 4), 20),
    "in place": (nn.Dropout(0.3, inplace=True), (5, 4), 20),
    "channels": (nn.Dropout2d(0.3), (6, 3, 3), 6),
    "made ahead for some samples": (nn.Dropout(0.3), (3000,), 3000),
    "too large": (nn.Dropout(0.3), (30000,), 30000),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_that_of_the_hash_to_the_bit(kind, dtype):
    layer, shape, elements = KINDS[kind]
    scale = 1.0 if "leaves the scale" in kind else 1 / (1 - 0.3)
    x = torch.randn(300, *shape, dtype=torch.float64).to(dtype)
    randomness = KeyedRandomness(5, CPU)
    for update in (0, 3):
        truth = []
        for call in range(3):
            mask = slow_mask(range(300), call, elements, 1 - 0.3, seed=5, update=update)
            whole = (300, *shape[: 1 if "channels" in kind else len(shape)])
            mask = torch.from_numpy(mask).view(*(whole if elements > 1 else (300,)))
            mask = mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim))
            truth.append((x * mask).mul_(scale))
        with randomness.update(update):
            for start, samples in ((0, 4), (4, 4), (8, 1), (9, 8), (250, 9), (259, 41), (2, 5)):
                with randomness.forward(MicroBatch(start, (samples,))):
                    rows = slice(start, start + samples)
                    found = [layer(x[rows].clone()) for _ in range(3)]
                for out, expected in zip(found, truth, strict=True):
                    assert out.dtype == dtype and torch.equal(out, expected[rows])
    assert mask.any() and not mask.all()


def test_calls_of_several_rates_and_shapes_take_no_mask_of_each_other():
    layers = [nn.Dropout(0.3), nn.Dropout(0.6), DropPath(0.3), nn.Dropout(0.3)]
    randomness, outs = KeyedRandomness(0, CPU), []
    with randomness.update(0):
        for step in range(2):  # the rate of the first changes: another mask is made
            layers[0].p = (0.3, 0.9)[step]
            with randomness.forward(MicroBatch(8 * step, (8,))):
                outs.append([layer(torch.ones(8, *shape)) for layer, shape in
                             zip(layers, ((20,), (20,), (20,), (4, 5)), strict=True)])  # fmt: skip
    for step, found in enumerate(outs):
        positions = range(8 * step, 8 * step + 8)
        for call, (out, layer) in enumerate(zip(found, layers, strict=True)):
            rate = layer.drop_prob if call == 2 else ((0.3, 0.9)[step] if call == 0 else layer.p)
            elements = 1 if call == 2 else 20
            mask = slow_mask(positions, call, elements, 1 - rate, seed=0, update=0)
            assert ((out != 0).view(8, 20).numpy() == np.broadcast_to(mask, (8, 20))).all()


@pytest.mark.parametrize(
    ("layer", "shape", "most"),
    [(DropPath(0.3), (50, 9), 1), (nn.Dropout(0.3), (50, 9), 1), (nn.Dropout(0.3), (40_000,), 10)],
)
def test_a_call_launches_few_kernels(layer, shape, most):
    """One multiplies; eight make a large mask, and the scale is then a multiplication more."""
    x, randomness, counts = torch.ones(4, *shape), KeyedRandomness(0, CPU), []
    with randomness.update(0):
        for start in range(0, 20, 4):
            with randomness.forward(MicroBatch(start, (4,))), Launches() as launches:
                layer(x)
            counts.append(launches.count)
    assert max(counts[1:]) <= most < counts[0]


def test_what_was_made_ahead_ends_with_its_update():
    randomness = KeyedRandomness(0, CPU)
    with randomness.update(0), randomness.forward(MicroBatch(0, (4,))):
        nn.Dropout(0.3)(torch.ones(4, 9000))
        assert randomness._ahead and randomness._elements._table is not None
        (block,) = randomness._ahead.values()
        kept = [made.mask for made in block._made.values()]
        assert sum(mask.numel() for mask in kept) <= ahead.MASK_AHEAD
    assert not randomness._ahead and randomness._elements._table is None
