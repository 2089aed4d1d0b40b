"""torchvision's decoder gives Pillow's pixels, and leaves to Pillow what it does not know."""

from __future__ import annotations

import io
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import lbaccel.data.decode as module
from lbaccel.data.decode import pixels_of
from lbaccel.data.images import ImageFiles, as_pixels, read_image
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError


def picture(height=50, width=70, seed=0):
    """Blocks of colour: a JPEG of noise would differ by its rounding alone."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3))
    return Image.fromarray(np.kron(blocks, np.ones((5, 5, 1))).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif)


def sixteen_bits():
    values = np.arange(50 * 70, dtype=np.uint16).reshape(50, 70) * 18
    return encoded(Image.fromarray(values), "PNG")


KINDS = {
    "baseline": encoded(picture()),
    "coarse": encoded(picture(), quality=20),
    "progressive": encoded(picture(), progressive=True),
    "whole colour": encoded(picture(), subsampling=0),
    "restart markers": encoded(picture(), restart_marker_rows=1),
    "rgb inside": encoded(picture(), keep_rgb=True),
    "grey": encoded(picture().convert("L")),
    "cmyk": encoded(picture().convert("CMYK")),
    "several in one": encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "odd size": encoded(picture().crop((0, 0, 33, 17))),
    "one pixel": encoded(picture().crop((0, 0, 1, 1))),
    "bytes behind the end": encoded(picture()) + b"more of them",
    "png": encoded(picture(), "PNG"),
    "png of grey": encoded(picture().convert("L"), "PNG"),
    "png of 16 bits": sixteen_bits(),
    "palette": encoded(picture().convert("P"), "PNG"),
    "alpha": encoded(picture().convert("RGBA"), "PNG"),
    "grey and alpha": encoded(picture().convert("LA"), "PNG"),
    "transparent palette": encoded(picture().convert("P"), "PNG", transparency=3),
    "webp": encoded(picture(), "WEBP", lossless=True),
    "bmp": encoded(picture(), "BMP"),
    **{f"orientation {number}": turned(number) for number in range(10)},
}


def files(tmp_path, data, **options):
    (tmp_path / "0.jpg").write_bytes(data)
    read = partial(read_image, root=str(tmp_path), **options)
    return ImageFiles(("0.jpg",), (0,), ("a",), ("0.jpg",), read)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upright", [True, False])
def test_every_kind_has_the_pixels_that_pillow_gives(tmp_path, kind, upright):
    images = files(tmp_path, KINDS[kind], exif_orientation=upright)
    found, expected = pixels_of(images, 0), np.asarray(images.load(0))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "several in one"])
def test_jpeg_is_decoded_by_torchvision(tmp_path, kind, monkeypatch):
    images = files(tmp_path, KINDS[kind])
    expected = pixels_of(images, 0)
    monkeypatch.setattr(ImageFiles, "load", lambda *a: pytest.fail("Pillow decoded it"))
    assert torch.equal(pixels_of(images, 0), expected)


def outcome(read):
    try:
        return np.asarray(read())
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("cut", [1, 2, 30, 200, 900])
def test_a_file_that_is_cut_off_is_the_error_of_before(tmp_path, cut):
    images = files(tmp_path, KINDS["baseline"][:-cut])
    expected = outcome(lambda: images.load(0))
    assert "can't be read as an image" in expected
    assert outcome(lambda: pixels_of(images, 0)) == expected


def test_a_damaged_file_has_the_pixels_or_the_error_that_it_had(tmp_path, capfd):
    data, failed = KINDS["baseline"], 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        damaged = bytearray(data)
        for place in generator.integers(2, len(data), 3):
            damaged[place] = generator.integers(256)
        images = files(tmp_path, bytes(damaged))
        expected = outcome(lambda images=images: images.load(0))
        found = outcome(lambda images=images: pixels_of(images, 0).permute(1, 2, 0).numpy())
        assert np.array_equal(found, expected)
        failed += isinstance(expected, str)
    assert 0 < failed < 60


def test_an_absent_and_an_empty_file_are_the_errors_of_before(tmp_path):
    images = files(tmp_path, b"")
    assert outcome(lambda: pixels_of(images, 0)) == outcome(lambda: images.load(0))
    (tmp_path / "0.jpg").unlink()
    assert outcome(lambda: pixels_of(images, 0)) == outcome(lambda: images.load(0))
    assert "No such file" in outcome(lambda: pixels_of(images, 0))


def test_a_size_that_pillow_refuses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    images = files(tmp_path, KINDS["baseline"])
    found = outcome(lambda: pixels_of(images, 0))
    assert found == outcome(lambda: images.load(0))
    assert "decompression bomb" in found


def test_without_libjpeg_in_torchvision_pillow_decodes(tmp_path, monkeypatch):
    images = files(tmp_path, KINDS["baseline"])
    expected = pixels_of(images, 0)

    def absent(*args, **options):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    for decode in (absent, None):
        monkeypatch.setattr(module, "decode_jpeg", decode)
        assert torch.equal(pixels_of(images, 0), expected)


def test_the_images_of_a_tar_file_are_decoded_alike(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for label in "ab":
            for number in range(5):
                data = turned(6 if number else 1)
                info = tarfile.TarInfo(f"{label}/{number}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    images = open_source(f"timm:{tmp_path}").train
    expected = [as_pixels(images.load(index)) for index in range(len(images))]
    monkeypatch.setattr(ImageFiles, "load", lambda *a: pytest.fail("Pillow decoded it"))
    for index, pixels in enumerate(expected):
        assert torch.equal(pixels_of(images, index), pixels)


def test_images_that_are_drawn_have_their_own_pixels():
    images = open_source("synthetic:2x96").train
    assert torch.equal(pixels_of(images, 5), as_pixels(images.load(5)))
