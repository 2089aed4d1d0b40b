"""A JPEG decoded smaller has the pixels that are asked for, and shows the same part."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_crops import smooth
from test_decode import KINDS, encoded, files, outcome
from test_photographs import COUNT, PREPROCESSING, epoch_of

from lbaccel.data.crops import Box, ResizedBox, centre_part, cropped
from lbaccel.data.decode import part_of, pixels_of
from lbaccel.data.draft import denominator, side_of, stored, turned
from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.photographs import Photographs
from lbaccel.data.pipelines import EvaluationBatches, evaluation_reader, training_set
from lbaccel.data.pixel_cache import CachePart, PixelCache
from lbaccel.errors import InputError

MEAN, STD = (0.5,) * 3, (0.25,) * 3
HEIGHT, WIDTH = 241, 249  # 1/8 of each has a last pixel that holds one of these
JPEG = [
    "baseline", "coarse", "progressive", "whole colour", "restart markers", "rgb inside", "grey",
    "cmyk", "several in one", "odd size", "one pixel", "bytes behind the end",
]  # fmt: skip
BICUBIC = "bicubic"
DRAFT = {**PREPROCESSING, "decoder": "draft"}


def ramps():
    """Red is the column of a pixel and green its row, so a pixel says where it comes from."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([columns, rows, 0 * rows + 128], 2).astype(np.uint8))


def of_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif, quality=100, subsampling=0)


def fixed(box, size):
    return lambda height, width: ResizedBox(box, (size, size))


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 300), st.integers(1, 300))
def test_a_part_has_never_fewer_pixels_than_asked_for(height, width, rows, columns):
    d = denominator(ResizedBox(Box(5, 7, height, width), (rows, columns)))
    assert d in (1, 2, 4, 8)
    assert d == 1 or (height >= d * rows and width >= d * columns)
    assert d == 8 or height < 2 * d * rows or width < 2 * d * columns  # and no larger than that


@given(st.data(), st.integers(1, 9000), st.integers(1, 300))
def test_a_side_is_moved_by_less_than_a_pixel_and_not_stretched(data, whole, asked):
    start = data.draw(st.integers(0, whole - 1))
    length = data.draw(st.integers(1, whole - start))
    for d in (2, 4, 8):
        first, num_pixels, scale = side_of(start, length, asked, d, whole=whole)
        assert scale == pytest.approx(asked * d / length, rel=1e-15)
        assert int(num_pixels * scale) >= asked
        assert first >= 0 and first + num_pixels <= -(-whole // d)
        moved, at_the_end = d * first - start, first + num_pixels == -(-whole // d)
        assert -d < moved <= d / 2
        assert at_the_end or abs(moved) <= d / 2
        assert moved == 0 or length < whole


def test_the_rounding_of_a_scale_loses_no_pixel():
    assert 49 * (1 / 49) < 1  # in float64
    for length in range(1, 200):
        for asked in range(1, length + 1):
            _, num_pixels, scale = side_of(0, 2 * length, asked, 2, whole=2 * length)
            assert int(num_pixels * scale) == asked


@given(st.data(), st.integers(1, 8))
def test_a_box_as_it_is_stored_holds_the_pixels_of_the_upright_one(data, orientation):
    image = torch.arange(35).view(1, 5, 7)
    upright = turned(image, orientation)
    height, width = upright.shape[1:]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    box = stored(Box(top, left, h, w), orientation, height, width)
    found = turned(cropped(image, box), orientation)
    assert torch.equal(found, cropped(upright, Box(top, left, h, w)))


def test_the_shorter_side_decides():
    for box in (Box(0, 0, 80, 39), Box(0, 0, 39, 80)):
        assert denominator(ResizedBox(box, (10, 10))) == 2
    assert denominator(ResizedBox(Box(0, 0, 80, 40), (21, 10))) == 2
    assert denominator(ResizedBox(Box(0, 0, 80, 40), (10, 21))) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_shows_the_same_part_under_each_decoder(tmp_path, orientation):
    """It is moved by less than a pixel of the smaller decoding, d, and by nothing on average.

    1.5 pixels of the whole picture are left for JPEG and the resizes, which round colours.
    """
    images = files(tmp_path, of_orientation(ramps(), orientation))
    how = "bicubic" if orientation % 2 else "bilinear"
    options = {"flip": 0.0, "color_jitter": 0.0, "scale": (0.03, 1.0), "interpolation": how}
    plain, draft = (
        Photographs(images, MEAN, STD, 16, 3, draft=draft, **options) for draft in (False, True)
    )
    sides, row, moved = (
        pixels_of(images, 0).shape[1:],
        np.zeros(1, np.int64),
        {1: [], 2: [], 4: [], 8: []},
    )
    for epoch in range(40):
        ((*draws,),) = draft.draws(row, row + epoch)
        d = denominator(ResizedBox(draft.box(draws, *sides), (16, 16)))
        expected, found = (p.load(row, row + epoch)[0][0] for p in (plain, draft))
        assert d > 1 or torch.equal(found, expected)
        apart = (found.double() - expected.double())[:2].numpy()
        for of_channel in (*apart.mean(1), *apart.mean(2)):  # one of both is the ramp's own line
            slope, at_the_middle = np.polyfit(np.arange(-7.5, 8), of_channel, 1)
            for edge in (-8, 8):
                assert abs(at_the_middle + slope * edge) <= d + 1.5
            moved[d].append(at_the_middle)
    assert moved[2] and moved[4]
    assert len(moved[8]) > 9 and abs(np.mean(moved[8])) < 1.5


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_part_at_the_last_edge_is_where_it_is(tmp_path, orientation):
    """The last pixel of 1/8 holds one pixel of the picture, and is the first of a turned side."""
    images = files(tmp_path, of_orientation(ramps(), orientation))
    height, width = pixels_of(images, 0).shape[1:]
    for box in (Box(0, 0, 128, 128), Box(height - 128, width - 128, 128, 128)):
        plain, _ = part_of(images, 0, fixed(box, 16))
        found, _ = part_of(images, 0, fixed(box, 16), draft=BICUBIC)
        assert found.shape == (3, 16, 16)
        means = plain.double().reshape(3, 16, 8, 16, 8).mean((2, 4))
        assert (found - means).abs().max() <= 8 + 2
    upright, _ = part_of(
        images, 0, lambda *_: ResizedBox(Box(0, 0, 128, 64), (16, 8)), draft=BICUBIC
    )
    assert upright.shape == (3, 16, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_jpeg_or_not_large_enough_has_the_pixels_of_fast(tmp_path, kind):
    images = files(tmp_path, KINDS[kind])
    height, width = pixels_of(images, 0).shape[1:]
    part = ResizedBox(Box(0, 0, height, width), (height // 2 + 1, 1))
    assert torch.equal(part_of(images, 0, lambda *_: part, draft=BICUBIC)[0], pixels_of(images, 0))
    found, _ = part_of(images, 0, fixed(Box(0, 0, height, width), 4), draft=BICUBIC)
    is_jpeg = kind in JPEG or kind.startswith("orientation")
    if not is_jpeg or kind == "one pixel":
        assert torch.equal(found, pixels_of(images, 0))
    else:
        assert found.shape[1] < height


LARGE = {
    "baseline": {},
    "progressive": {"progressive": True},
    "half the colour": {"subsampling": 2},
    "whole colour": {"subsampling": 0},
    "restart markers": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", [*LARGE, "grey", "cmyk", "several in one"])
def test_each_kind_of_jpeg_is_nearly_the_mean_of_its_pixels(tmp_path, kind):
    image = smooth(160, 240, 3)
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    data = encoded(image.convert(mode), quality=95, **LARGE.get(kind, {}))
    if kind == "several in one":
        data = encoded(image, "MPO", save_all=True, append_images=[smooth(160, 240, 9)])
    images = files(tmp_path, data)
    whole = Box(0, 0, 160, 240)
    for d in (2, 4, 8):
        found, _ = part_of(
            images, 0, lambda *_, d=d: ResizedBox(whole, (160 // d, 240 // d)), draft=BICUBIC
        )
        assert found.shape == (3, 160 // d, 240 // d) and found.dtype == torch.uint8
        pixels = pixels_of(images, 0).double()
        means = pixels.reshape(3, 160 // d, d, 240 // d, d).mean((2, 4))
        assert (found - means).abs().mean() < 1.5
        assert (found - means).mean().abs() < 0.5


@pytest.mark.parametrize("cut", [1, 30, 200, 900])
def test_a_file_that_is_cut_off_is_the_error_of_before(tmp_path, cut):
    images = files(tmp_path, KINDS["baseline"][:-cut])
    wanted = fixed(Box(0, 0, 50, 70), 4)
    expected = outcome(lambda: images.load(0))
    assert outcome(lambda: part_of(images, 0, wanted, draft=BICUBIC)[0]) == expected
    assert "can't be read as an image" in expected


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Photographs much larger than their crops, and one PNG."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"{number}.{'png' if number == 5 else 'jpg'}" for number in range(COUNT)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, name in enumerate(names):
        turn = {"exif": exif} if number == 7 else {}
        smooth(300 + number, 400 - number, number).save(folder / name, **turn)
    read = partial(read_image, root=str(folder))
    return ImageFiles(names, tuple(n % 2 for n in range(COUNT)), ("a", "b"), names, read)


def test_neither_workers_nor_ranks_nor_the_micro_batch_change_a_pixel(large):
    draft = training_set(large, preprocessing=DRAFT, seed=5)
    assert draft == Photographs(
        large, PREPROCESSING["mean"], PREPROCESSING["std"], 32, 5, draft=True
    )
    expected, _ = epoch_of(draft, micro=COUNT)
    assert torch.equal(epoch_of(draft, micro=5, workers=2)[0], expected)
    assert torch.equal(epoch_of(draft, micro=2, world_size=3)[0], expected)
    plain, _ = epoch_of(training_set(large, preprocessing=PREPROCESSING, seed=5), micro=COUNT)
    apart = (plain - expected).abs()
    assert 0 < apart.mean() < 0.05  # of a standard deviation
    assert int((apart.flatten(1).amax(1) == 0).sum()) < COUNT / 2


def test_evaluation_and_one_file_alone_see_the_same_pixels(large):
    ((found, _),) = EvaluationBatches(large, preprocessing=DRAFT)(0, COUNT)
    ((plain, _),) = EvaluationBatches(large, preprocessing=PREPROCESSING)(0, COUNT)
    apart = (found - plain).abs().flatten(1)
    assert apart[5].max() == 0  # the PNG
    assert apart.mean(1).max() < 0.05 and (apart.amax(1) > 0).sum() == COUNT - 1
    read = evaluation_reader(DRAFT, exif_orientation=True)
    root = large.read.keywords["root"]
    alone = torch.stack([read(f"{root}/{name}") for name in large.names])
    assert torch.equal(alone, found)


def test_evaluation_asks_for_the_resize_of_the_shorter_side():
    part = centre_part(2000, 3000, 224, crop_pct=0.875)
    assert part == ResizedBox(Box(0, 0, 2000, 3000), (256, 384))
    assert denominator(part) == 4
    strip = centre_part(10_000, 100, 20, crop_pct=1.0)
    assert strip == ResizedBox(Box(4000, 0, 2000, 100), (400, 20))
    assert denominator(strip) == 4


def test_images_are_not_kept_beside_it(large):
    cache = CachePart(PixelCache(COUNT, 2**20))
    for makes in (
        partial(training_set, large, seed=5),
        partial(EvaluationBatches, large),
    ):
        with pytest.raises(InputError, match="another size for each crop, so there is no one"):
            makes(preprocessing=DRAFT, cache=cache)
        makes(preprocessing=PREPROCESSING, cache=cache)
        makes(preprocessing=DRAFT)
