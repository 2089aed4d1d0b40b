"""Folders whose links lead back and parquet files that decode to much more than they store."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lbaccel.data import parquet_bounds
from lbaccel.data.folders import MOST_VISITS
from lbaccel.data.images import ImageFiles
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError


def photographs(root, count=6):
    for name in ("daisy", "rose"):
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (5, 4), (n, 0, 0)).save(root / name / f"{n}.png")


@pytest.mark.parametrize("target", ["", "daisy"], ids=["root", "class"])
def test_a_link_that_leads_back_is_refused_and_named(target, tmp_path):
    photographs(tmp_path)
    (tmp_path / "daisy" / "again").symlink_to(tmp_path / target, target_is_directory=True)
    with pytest.raises(InputError, match=r"again.*leads back to .*Remove this link"):
        open_source(f"folder:{tmp_path}", val_fraction=0.25)


def test_links_that_multiply_are_refused(tmp_path):
    photographs(tmp_path / "set")
    for level in range(12):  # 4096 ways to the last folder
        here = tmp_path / f"level{level}"
        here.mkdir()
        for name in ("a", "b"):
            (here / name).symlink_to(tmp_path / f"level{level + 1}", target_is_directory=True)
    (tmp_path / "level12").mkdir()
    link = tmp_path / "set" / "daisy" / "more"
    link.symlink_to(tmp_path / "level0", target_is_directory=True)
    with pytest.raises(InputError, match=f"through more than {MOST_VISITS} links"):
        open_source(f"folder:{tmp_path / 'set'}", val_fraction=0.25)


def test_a_link_to_a_folder_elsewhere_is_followed_as_ever(tmp_path):
    photographs(tmp_path / "set")
    photographs(tmp_path / "other")
    link = tmp_path / "set" / "daisy" / "more"
    link.symlink_to(tmp_path / "other" / "daisy", target_is_directory=True)
    found = open_source(f"folder:{tmp_path / 'set'}", val_fraction=0.25)
    assert len(found.train) + len(found.val) == 18


def png(size=(70, 70)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png")
    return file.getvalue()


def parquet(path, images, *, paths=None, labels=None, **options):
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    paths = paths or [None] * len(images)
    rows = [{"bytes": data, "path": name} for data, name in zip(images, paths, strict=True)]
    labels = labels or [n % 2 for n in range(len(images))]
    table = pa.table({"image": pa.array(rows, struct), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, compression="zstd", **options)


def read_first(folder):
    files = open_source(f"parquet:{folder}", val_fraction=0.25).train
    assert isinstance(files, ImageFiles)
    files.load(0)


def test_a_dictionary_that_gives_each_row_a_long_image_is_refused(tmp_path):
    long = png() + bytes(2**20)  # trailing zeros: an image still
    parquet(tmp_path / "train-0.parquet", [long] * 200)
    stored = (tmp_path / "train-0.parquet").stat().st_size
    assert stored < 20_000
    with pytest.raises(InputError, match=r"row group 0, column image.bytes decodes to at least"):
        read_first(tmp_path)


def test_long_names_are_refused(tmp_path):
    parquet(tmp_path / "train-0.parquet", [png()] * 200, paths=["x" * 2**20] * 200)
    with pytest.raises(InputError, match=r"column image.path decodes to at least"):
        open_source(f"parquet:{tmp_path}", val_fraction=0.25)


def test_a_page_that_unpacks_to_much_is_refused_by_its_own_figures(tmp_path):
    images = [png() + bytes(2**21) + bytes([n]) for n in range(80)]
    parquet(tmp_path / "train-0.parquet", images, use_dictionary=False)
    with pytest.raises(InputError, match=r"column image.bytes decodes to 1[\d,]+ bytes"):
        read_first(tmp_path)


def test_more_rows_than_images_can_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_bounds, "LEAST_ROWS", 100)
    parquet(tmp_path / "train-0.parquet", [png()] * 5000)
    with pytest.raises(InputError, match=r"declares 5,000 rows in [\d,]+ bytes; at most"):
        open_source(f"parquet:{tmp_path}", val_fraction=0.25)
