"""An image file as it is decoded: upright, wherever it comes from."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from pictures import write_parquet
from PIL import ExifTags, Image

from lbaccel.data.images import decode_image
from lbaccel.data.row_images import RowImages
from lbaccel.data.sources import ImageArray, ImageFiles, open_source

# columns and rows of the stored picture from those of the upright one (EXIF 2.3, section 4.6.4)
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}
UPRIGHT = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3) * 10


def photograph(orientation, kind="PNG", pixels=UPRIGHT):
    """Bytes of a photograph that is stored as a camera held this way stores it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    stored = np.ascontiguousarray(STORED[orientation](pixels))
    Image.fromarray(stored).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_is_turned_upright_as_its_entry_says(orientation):
    data = photograph(orientation)
    found = np.asarray(decode_image(io.BytesIO(data), "x"))
    assert np.array_equal(found, UPRIGHT)
    found = np.asarray(decode_image(io.BytesIO(data), "x", exif_orientation=False))
    assert np.array_equal(found, STORED[orientation](UPRIGHT))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_every_format_that_cameras_write_is_turned(kind):
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:8] = 255  # the upper half is white
    found = np.asarray(decode_image(io.BytesIO(photograph(6, kind, pixels)), "x"))
    assert found.shape == (16, 8, 3) and found[:6].mean() > 240 and found[10:].mean() < 15


def test_a_16_bit_picture_is_turned_before_its_values_are_divided():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 512]], np.uint16)).save(buffer, "PNG", exif=exif)
    found = np.asarray(decode_image(buffer, "x"))
    assert found[..., 0].tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"]
)
def test_an_entry_that_is_damaged_says_nothing(damage):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "PNG", exif=b"Exif\0\0" + damage)
    assert np.array_equal(np.asarray(decode_image(buffer, "x")), UPRIGHT)


def write_folder(root):
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for name in "ab":
                (folder / f"{name}.png").write_bytes(photograph(6))


@pytest.mark.parametrize("upright", [True, False])
def test_all_sets_of_a_folder_are_turned_or_none(tmp_path, upright):
    write_folder(tmp_path)
    source = open_source(f"folder:{tmp_path}", exif_orientation=upright)
    truth = UPRIGHT if upright else STORED[6](UPRIGHT)
    for images in (source.train, source.val, source.test):
        assert isinstance(images, ImageFiles)
        copy = pickle.loads(pickle.dumps(images))
        assert np.array_equal(np.asarray(copy.load(1)), truth)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
def test_all_rows_of_parquet_files_are_turned_or_none(tmp_path, upright, in_memory):
    from lbaccel.data import row_images

    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", [photograph(6)] * 4, [0, 1, 0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_images, "MAX_SIDE", 64 if in_memory else 2)
        source = open_source(f"parquet:{tmp_path}", exif_orientation=upright)
    truth = UPRIGHT if upright else STORED[6](UPRIGHT)
    for images in (source.train, source.val, source.test):
        if in_memory:
            assert isinstance(images, ImageArray)
            assert np.array_equal(images.images[1].permute(1, 2, 0).numpy(), truth)
        else:
            assert isinstance(images, ImageFiles) and isinstance(images.read, RowImages)
            copy = pickle.loads(pickle.dumps(images))
            assert np.array_equal(np.asarray(copy.load(1)), truth)
