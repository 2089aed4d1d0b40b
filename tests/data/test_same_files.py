"""Images that stand in both training and validation set are found, and nothing else is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbaccel.data import same_files as module
from lbaccel.data.same_files import groups_of_same_bytes, shared_files
from lbaccel.data.sources import open_source


@pytest.fixture
def photos(tmp_path):
    """Noise, 4 training and 3 validation images in two classes, all files of one size."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (160, 160, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.bmp")
    return tmp_path


def found_in(photos):
    return shared_files(open_source(f"folder:{photos}"))


def test_other_images_of_one_size_are_not_the_same(photos):
    assert len({p.stat().st_size for p in photos.rglob("*.bmp")}) == 1
    assert found_in(photos) == []


def test_copies_and_links_are_found_under_any_name_and_class_once_each(photos):
    shutil.copy(photos / "train/cat/2.bmp", photos / "val/dog/2.bmp")
    shutil.copy(photos / "train/cat/2.bmp", photos / "train/cat/3.bmp")
    (photos / "val/cat/other.bmp").symlink_to(photos / "train/dog/0.bmp")
    assert sorted(found_in(photos)) == [
        ("cat/other.bmp", "dog/0.bmp"),
        ("dog/2.bmp", "cat/2.bmp"),
    ]


def test_files_that_part_after_their_first_bytes_are_others(photos):
    """The first 64 KiB agree; one byte of the rest does not."""
    content = bytearray((photos / "train/cat/0.bmp").read_bytes())
    assert len(content) > 2**16
    content[-1] ^= 1
    (photos / "val/cat/0.bmp").write_bytes(content)
    assert found_in(photos) == []
    content[-1] ^= 1
    (photos / "val/cat/0.bmp").write_bytes(content)
    assert found_in(photos) == [("cat/0.bmp", "cat/0.bmp")]


def test_a_share_that_is_held_out_may_hold_copies_too(photos):
    shutil.rmtree(photos / "val")
    for path in sorted((photos / "train").rglob("*.bmp")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    source = open_source(f"folder:{photos / 'train'}", val_fraction=0.5)
    expected = {
        Path(name).name.removeprefix("copy-") + Path(name).parts[0] for name in source.train.names
    } & {Path(name).name.removeprefix("copy-") + Path(name).parts[0] for name in source.val.names}
    assert len(expected) > 0
    assert {Path(val).name.removeprefix("copy-") + Path(val).parts[0] for val, _ in
            shared_files(source)} == expected  # fmt: skip


def test_a_file_that_is_gone_is_left_to_the_reader(photos):
    source = open_source(f"folder:{photos}")
    (photos / "val/cat/0.bmp").unlink()
    assert shared_files(source) == []


def test_large_folders_and_images_in_memory_are_not_looked_at(photos, monkeypatch):
    digits = open_source("digits")
    assert shared_files(replace(digits, val=digits.train)) == []
    shutil.copy(photos / "train/cat/2.bmp", photos / "val/dog/2.bmp")
    assert len(found_in(photos)) == 1
    monkeypatch.setattr(module, "MOST_FILES", 13)
    assert found_in(photos) == []


def test_equal_files_are_grouped_in_the_order_given(photos):
    a, b = photos / "train/cat/0.bmp", photos / "train/cat/1.bmp"
    copies = [photos / f"{name}.bmp" for name in ("a1", "a2", "b1")]
    for copy, of in zip(copies, (a, a, b), strict=True):
        shutil.copy(of, copy)
    empty = [photos / "empty1", photos / "empty2"]
    for path in empty:
        path.touch()
    given = [copies[0], a, *empty, b, copies[2], copies[1], photos / "absent"]
    assert groups_of_same_bytes(given) == [[copies[0], a, copies[1]], [b, copies[2]], empty]


def test_a_path_in_both_sets_is_one_image_that_is_shared(photos):
    source = open_source(f"folder:{photos}")
    both = source.train.only([0, 3])
    assert sorted(shared_files(replace(source, val=both))) == [
        ("cat/0.bmp", "cat/0.bmp"),
        ("cat/3.bmp", "cat/3.bmp"),
    ]
