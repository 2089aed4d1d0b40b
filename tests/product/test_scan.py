"""A scan names what is wrong with a folder, and says nothing where all is well."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from photographs import COLORS, make_photographs
from PIL import Image

from lbaccel.data.sources import open_source
from lbaccel.product.scan import scan


@pytest.fixture
def photos(tmp_path):
    return make_photographs(tmp_path / "photos")


def scanned(photos):
    return scan(open_source(f"folder:{photos}"))


def test_a_folder_in_order_has_no_warning(photos):
    found = scanned(photos)
    assert found.counts == dict.fromkeys(sorted(COLORS), 24) and found.num_val == 24
    assert found.short_sides == (48, 48, 48) and found.looked_at == 96
    assert not (found.broken or found.copies or found.shared or found.turned)
    assert found.lines() == [
        "72 training and 24 validation images of 3 classes: 24 a class in training",
        "shorter side of 96 images: 48 to 48 px, median 48",
    ]


def test_files_that_are_no_images_are_named_with_the_reason(photos):
    (photos / "train/red/000.png").write_bytes(b"")
    (photos / "val/red/000.png").write_text("no image")
    found = scanned(photos)
    assert found.broken[0] == ("train", "red/000.png", "it is empty") and len(found.broken) == 2
    assert any(line.startswith("warning: 2 files are no readable image") for line in found.lines())


def test_copies_and_labels_that_contradict_are_told(photos):
    shutil.copy(photos / "train/red/001.png", photos / "train/red/copy.png")
    shutil.copy(photos / "train/red/002.png", photos / "train/blue/002b.png")
    shutil.copy(photos / "train/red/003.png", photos / "val/red/003.png")
    found = scanned(photos)
    assert found.copies == (("blue/002b.png", "red/002.png"), ("red/001.png", "red/copy.png"))
    assert found.contradicting == (("blue/002b.png", "red/002.png"),)
    assert found.shared == (("red/003.png", "red/003.png"),)
    text = "\n".join(found.lines())
    for part in ("1 image is in several classes", "2 training files are", "1 validation image is"):
        assert part in text


def test_turned_images_and_uneven_classes_are_told(photos):
    exif = Image.Exif()
    exif[274] = 6
    for i in range(2):
        pixels = np.full((40, 60, 3), i, np.uint8)
        Image.fromarray(pixels).save(photos / f"train/red/turned{i}.jpg", exif=exif)
    for path in sorted((photos / "train/blue").iterdir())[5:]:
        path.unlink()
    text = "\n".join(scanned(photos).lines())
    assert "2 images are turned by their EXIF orientation" in text
    assert "'red' has 5.2 times the images of 'blue'" in text
    assert "'blue' has fewer than 20 training images" in text


def test_images_in_memory_are_counted_alone():
    found = scan(open_source("digits"))
    assert found.num_train == 1438 and found.looked_at == 0 and len(found.lines()) == 1


def test_names_that_would_move_the_cursor_are_escaped(photos):
    (photos / "train/red/\x1b[2Jbad\n.png").write_bytes(b"")
    text = "\n".join(scanned(photos).lines())
    assert "\x1b" not in text and "bad\\n.png" in text


def test_a_path_that_is_listed_twice_is_scanned(photos):
    lines = ["path,label"]
    lines += [f"{path},{path.parent.name}" for path in sorted((photos / "train").rglob("*.png"))]
    (photos / "list.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    found = scan(open_source(f"csv:{photos / 'list.csv'}", val_fraction=0.3))
    assert found.num_train + found.num_val == 73
