"""Images that are made up: the same everywhere, and with classes that can be learnt."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lbaccel.data import synthetic
from lbaccel.data.identity import identity_of
from lbaccel.data.sources import ImageArray, ImageFiles, open_source
from lbaccel.errors import InputError


def test_small_images_lie_in_memory():
    source = open_source("synthetic")
    assert isinstance(source.train, ImageArray) and isinstance(source.val, ImageArray)
    assert source.train.images.shape == (1000, 3, 32, 32) and len(source.val) == 200
    assert source.train.images.dtype == torch.uint8 and source.train.images.is_contiguous()
    assert source.train.labels.bincount().tolist() == [100] * 10
    assert source.val.labels.bincount().tolist() == [20] * 10
    assert len(source.train.classes) == 10 and not source.held_out
    assert identity_of(source) == identity_of(open_source("synthetic:10x32", seed=3))


def test_large_images_are_drawn_when_they_are_asked_for():
    source = open_source("synthetic:3x224")
    assert isinstance(source.train, ImageFiles) and len(source.train) == 300
    image = pickle.loads(pickle.dumps(source.train)).load(7)
    assert image.size == (224, 224) and image.mode == "RGB"
    assert image.tobytes() == source.train.load(7).tobytes() != source.train.load(8).tobytes()
    assert source.train.load(0).tobytes() != source.val.load(0).tobytes()
    assert identity_of(source, of_bytes=True)["num_train"] == 300


def test_a_set_that_is_too_large_for_memory_is_drawn_to_the_same_images(monkeypatch):
    before = open_source("synthetic:4x16").train
    monkeypatch.setattr(synthetic, "MOST_BYTES", 1000)
    after = open_source("synthetic:4x16").train
    assert isinstance(after, ImageFiles)
    for row in (0, 5, 399):
        assert np.array_equal(np.asarray(after.load(row)), before.images[row].permute(1, 2, 0))
    assert list(after.labels) == before.labels.tolist()


def test_the_images_are_the_same_on_every_machine():
    """Philox's raw stream is fixed by its authors' test vectors, so these sums can't change."""
    pixels = synthetic.pixels_of(5, classes=10, side=32)
    stream = np.random.Philox(key=5).random_raw(384).astype("<u8").tobytes()
    noise = np.frombuffer(stream, np.uint8).reshape(32, 32, 3)
    raw = np.random.Philox(key=2**63 + 5).random_raw(6).astype("<u8").tobytes()
    squares = np.frombuffer(raw, np.uint8).reshape(4, 4, 3).repeat(8, 0).repeat(8, 1)
    expected = (96 * squares.astype(int) + 160 * noise.astype(int)) // 256
    assert np.array_equal(pixels, expected)


def test_the_classes_can_be_told_apart_but_not_by_one_pixel():
    source = open_source("synthetic:5x8")
    images, labels = source.train.images.flatten(1).float(), source.train.labels
    means = torch.stack([images[labels == k].mean(0) for k in range(5)])
    val = source.val.images.flatten(1).float()
    found = torch.cdist(val, means).argmin(1)
    assert (found == source.val.labels).float().mean() > 0.95
    one = (val[:, :1, None] - means[:, 0]).abs().squeeze(1).argmin(1)
    assert (one == source.val.labels).float().mean() < 0.6


@pytest.mark.parametrize(
    "size", ["1x32", "10x7", "10x1025", "10001x32", "ax3", "10", "10x", "-3x32", "1e9x3", "10x3x3"]
)
def test_numbers_out_of_the_bounds_are_refused(size):
    with pytest.raises(InputError, match=rf"synthetic:{size} is not CLASSESxSIZE of 2 to 10,000"):
        open_source(f"synthetic:{size}")
