"""Boxes are timm's at the same draws; bytes are resized as Pillow does it."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from lbaccel.data.crops import TRIES, BoxDraws, centre, crop_box, erased_box, resized
from lbaccel.data.images import as_pixels

SIZES = [(224, 300), (300, 224), (64, 64), (7, 500), (500, 7), (1, 1), (2, 3), (31, 33)]


def smooth(height, width, seed=0):
    """Without edges of a pixel, as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def box_draws(seed):
    u = np.random.default_rng(seed).random(2 * TRIES + 2).tolist()
    return BoxDraws(u[:TRIES], u[TRIES:-2], *u[-2:])


def scripted(monkeypatch, draws, *, first=()):
    """Python's generator as timm asks it: area and ratio of each try, then the place."""
    tries = zip(draws.areas, draws.ratios, strict=True)
    reals = deque(u for pair in tries for u in pair)
    places, before = deque([draws.top, draws.left]), deque(first)

    def uniform(low, high):
        return low + (high - low) * reals.popleft()

    monkeypatch.setattr(random, "random", before.popleft)
    monkeypatch.setattr(random, "uniform", uniform)
    monkeypatch.setattr(random, "randint", lambda a, b: a + int(places.popleft() * (b - a + 1)))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1), (3 / 4, 4 / 3)), ((0.9, 1), (1.5, 2.0))])
def test_a_crop_is_timms_at_the_same_draws(height, width, scale, ratio, monkeypatch):
    image = Image.new("RGB", (width, height))
    taken, in_the_middle = set(), 0
    for seed in range(60):
        draws = box_draws(seed)
        with monkeypatch.context() as patched:
            scripted(patched, draws)
            expected = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        found = crop_box(draws, height, width, scale=scale, ratio=ratio)
        if 0 in expected[2:]:  # of very small images timm takes boxes without a pixel, and fails
            assert min(found.height, found.width) > 0
            continue
        assert tuple(found) == tuple(expected)
        taken.add(found)
        in_the_middle += found[:2] == ((height - found[2]) // 2, (width - found[3]) // 2)
    assert taken
    if (height, width) == (500, 7) and ratio == (1.5, 2.0):
        assert in_the_middle == 60  # none fits


def test_a_crop_lies_inside_at_the_ends_of_all_draws():
    almost = 1 - 2.0**-53
    for u in (0.0, almost):
        draws = BoxDraws([u] * TRIES, [0.5] * TRIES, almost, almost)
        top, left, height, width = crop_box(draws, 40, 50, scale=(0.08, 1), ratio=(0.75, 1.33))
        assert (top + height, left + width) == (40, 50)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (32, 48), (6, 5)])
def test_an_erased_box_is_timms_at_the_same_draws(height, width, monkeypatch):
    for seed in range(60):
        draws = box_draws(seed)
        image = torch.zeros(3, height, width)
        with monkeypatch.context() as patched:
            scripted(patched, draws, first=[0.0])
            patched.setattr(torch.Tensor, "normal_", lambda tensor: tensor.fill_(1))
            RandomErasing(probability=1.0, mode="pixel", device="cpu")(image)
        box = erased_box(draws, height, width)
        expected = torch.zeros(3, height, width)
        if box is not None:
            top, left, h, w = box
            expected[:, top : top + h, left : left + w] = 1
        assert torch.equal(image, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 200), (40, 61), (96, 96), (500, 100)])
def test_bytes_are_resized_as_pillow_does_it(interpolation, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize((96, 96), Image.Resampling[interpolation.upper()]))
    found = resized(as_pixels(image), 96, 96, interpolation=interpolation).permute(1, 2, 0).numpy()
    apart = np.abs(found.astype(int) - expected)
    # noise from 0 to 255 is harder than any photograph; of a tall image a newer Pillow resizes the
    # columns first, and both round between the two passes
    tall = size == (500, 100)
    assert apart.max() <= (10 if tall else 1)
    assert apart.mean() < (0.4 if tall else 0.01)
    assert abs((found.astype(int) - expected).mean()) < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (96, 96), (33, 47), (65, 700)])
def test_evaluation_sees_the_middle_that_timm_cuts(interpolation, crop_pct, size):
    image = smooth(*size)
    transform = create_transform(
        64, interpolation=interpolation, crop_pct=crop_pct, mean=(0,) * 3, std=(1 / 255,) * 3
    )
    expected = transform(image)
    found = centre(as_pixels(image), 64, crop_pct=crop_pct, interpolation=interpolation)
    assert found.shape == (3, 64, 64)
    apart = (found - expected).abs()
    assert apart.max() < 1.01
    assert apart.mean() < 0.15
    assert abs((found - expected).mean()) < 0.01


@pytest.mark.parametrize("size", [(1, 3000), (3000, 2)])
def test_a_strip_is_cut_before_it_is_enlarged(size, monkeypatch):
    """1 x 3000 pixels, enlarged whole to 36 on the short side, would be 36 x 108,000."""
    import lbaccel.data.crops as module

    seen, plain = [], module.resized
    monkeypatch.setattr(
        module, "resized", lambda *args, **options: seen.append(args[1:]) or plain(*args, **options)
    )
    pixels = torch.full((3, *size), 7, dtype=torch.uint8)
    found = centre(pixels, 32, crop_pct=0.875, interpolation="bilinear")
    assert (found == 7).all()
    assert found.shape == (3, 32, 32)
    assert max(seen[0]) <= 20 * 36


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 61), (90, 130), (20, 200)])
def test_the_layout_of_an_image_changes_no_bit_of_its_resize(height, width, interpolation):
    """Channels that lie together, planes, and a part of a larger image."""
    together = as_pixels(smooth(70, 110, 4))
    larger = as_pixels(smooth(90, 130, 5)).clone(memory_format=torch.preserve_format)
    larger[:, 9:79, 12:122] = together
    options = {"interpolation": interpolation}
    expected = resized(together.contiguous(), height, width, **options)
    assert torch.equal(resized(together, height, width, **options), expected)
    assert torch.equal(resized(larger[:, 9:79, 12:122], height, width, **options), expected)
