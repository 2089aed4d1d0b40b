"""Colour jitter on floats has the whole numbers of Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as of_pillow

from lbaccel.data.colour import BRIGHTNESS, CONTRAST, ORDERS, SATURATION, grey, jitter_
from lbaccel.data.images import as_pixels

ADJUST = {
    BRIGHTNESS: of_pillow.adjust_brightness,
    CONTRAST: of_pillow.adjust_contrast,
    SATURATION: of_pillow.adjust_saturation,
}


def image(seed, height=31, width=40):
    generator = np.random.default_rng(seed)
    low, high = sorted(generator.integers(0, 257, 2).tolist())
    pixels = generator.integers(low, max(high, low + 1), (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_luma_is_pillows():
    colours = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3).to(torch.uint8)
    picture = Image.fromarray(colours.numpy()[None])
    found = grey(colours.T[:, None].float())
    assert np.array_equal(found.numpy(), np.asarray(picture.convert("L")))


def test_each_order_comes_once():
    assert len(set(ORDERS)) == 6
    assert all(sorted(order) == [0, 1, 2] for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_jitter_has_pillows_numbers(order):
    for seed in range(40):
        before = image(seed)
        factors = np.random.default_rng(1000 + seed).uniform(0.0, 2.0, 3).tolist()
        expected = before
        for what in order:
            expected = ADJUST[what](expected, factors[what])
        found = jitter_(as_pixels(before).float(), factors, order)
        apart = (found - as_pixels(expected)).abs()
        assert apart.max() <= 1  # where a product lies at a whole number
        assert (apart > 0).float().mean() < 1e-3


def test_factors_of_1_change_nothing():
    before = as_pixels(image(3)).float()
    assert torch.equal(jitter_(before.clone(), (1.0, 1.0, 1.0), ORDERS[0]), before)


def test_the_mean_of_contrast_is_rounded_as_pillow_rounds_it():
    """A mean of exactly 1/2 goes up, which Python's own round would not do."""
    half = torch.tensor([[0.0, 1.0]]).expand(3, 1, 2)
    assert (jitter_(half.clone(), (1.0, 0.0, 1.0), (CONTRAST,)) == 1).all()
