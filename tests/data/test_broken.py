"""Image files that can't be read, found before anything trains on them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import png, write_parquet, write_tree
from PIL import Image

from lbaccel.data import broken as module
from lbaccel.data.broken import Broken, Share, broken_images, fault_of, listed, without
from lbaccel.data.hub import HubImages
from lbaccel.data.images import ImageFiles
from lbaccel.data.sources import Source, open_source
from lbaccel.errors import CannotRead, InputError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
KINDS = {".jpg": {}, ".png": {}, ".webp": {"quality": 90}, ".bmp": {}, ".tif": {}}


def saved(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(NOISE).save(path, **options)
    return path


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("suffix", KINDS)
def test_a_sound_image_has_no_fault(tmp_path, suffix, whole):
    assert fault_of(saved(tmp_path / f"a{suffix}", **KINDS[suffix]), whole=whole) is None


@pytest.mark.parametrize("suffix", KINDS)
def test_decoding_finds_an_image_that_is_cut_off(tmp_path, suffix):
    assert fault_of(cut(saved(tmp_path / f"a{suffix}", **KINDS[suffix]))) is not None


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_jpeg_is_read_to_its_end_at_an_eighth_of_its_size(tmp_path, share, progressive):
    path = cut(saved(tmp_path / "a.jpg", progressive=progressive, quality=95), share)
    assert "truncated" in fault_of(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_look_finds_one_whose_end_is_missing(tmp_path, suffix):
    path = cut(saved(tmp_path / f"a{suffix}", **KINDS[suffix]), 0.9)
    assert fault_of(path, whole=False) is not None


def test_a_look_decodes_no_image_that_has_its_end(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("decoded")

    path = saved(tmp_path / "a.jpg")
    monkeypatch.setattr(module, "decode_image", fail)
    monkeypatch.setattr(Image.Image, "load", fail)
    assert fault_of(path, whole=False) is None
    assert fault_of(path) is not None


def test_bytes_behind_the_end_are_no_fault(tmp_path):
    path = saved(tmp_path / "a.jpg")
    with path.open("ab") as file:
        file.write(b"\0" * 5000)  # as some cameras write
    assert fault_of(path, whole=False) is None and fault_of(path) is None


@pytest.mark.parametrize("whole", [True, False])
def test_the_reasons_are_a_few_words(tmp_path, whole):
    paths = {name: tmp_path / name for name in ("empty.jpg", "text.png", "far.tif", "link.png")}
    paths["empty.jpg"].write_bytes(b"")
    paths["text.png"].write_text("no image")
    Image.new("F", (2, 2), 0.5).save(paths["far.tif"])
    paths["link.png"].symlink_to(tmp_path / "gone.png")
    found = {name: fault_of(path, whole=whole) for name, path in paths.items()}
    assert found["empty.jpg"] == "it is empty"
    assert found["text.png"] == "PIL knows no such format"
    assert found["far.tif"].startswith("far.tif has 32-bit pixels")
    assert found["link.png"] == "it is absent: a link that leads nowhere"


def test_a_file_that_the_system_refuses_is_not_passed_over(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png")
    plain = Path.open

    def refused(self, *given, **named):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CannotRead, match=r"a\.png can't be read: Permission denied"):
        fault_of(path)


def photos(root):
    write_tree(root / "train", count=6)
    write_tree(root / "val", count=3)
    (root / "train" / "rose" / "2.png").write_bytes(b"")
    (root / "val" / "daisy" / "0.png").write_text("text")
    return open_source(f"folder:{root}")


CUT = "it is cut off or damaged"
FOUND = [
    Broken("train", "rose/2.png", "it is empty"),
    Broken("val", "daisy/0.png", "PIL knows no such format"),
]


@pytest.mark.parametrize("whole", [True, False])
def test_the_ranks_together_look_at_each_file_once(tmp_path, monkeypatch, whole):
    source, looked = photos(tmp_path), []
    plain = module.fault_of
    monkeypatch.setattr(
        module, "fault_of", lambda path, whole: looked.append(path) or plain(path, whole=whole)
    )
    assert broken_images(source, whole=whole) == FOUND
    assert len(looked) == len(set(looked)) == 18
    looked.clear()
    shares = [broken_images(source, whole=whole, share=Share(rank, 3, 2)) for rank in range(3)]
    assert sorted(b for found in shares for b in found) == FOUND
    assert len(looked) == len(set(looked)) == 18


def test_a_look_at_a_large_set_takes_files_from_all_over_it(tmp_path, monkeypatch):
    source, looked = photos(tmp_path), []
    monkeypatch.setattr(module, "MOST_FILES", 6)
    monkeypatch.setattr(module, "fault_of", lambda path, whole: looked.append(path))
    broken_images(source, whole=False)
    files = [tmp_path / "train" / n for n in source.train.names]
    files += [tmp_path / "val" / n for n in source.val.names]
    assert looked == files[::3]
    looked.clear()
    broken_images(source, whole=True)
    assert looked == files


def test_a_long_scan_says_how_far_it_is(tmp_path, monkeypatch):
    source, said, now = photos(tmp_path), [], iter(range(0, 1000, 7))
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    broken_images(source, whole=True, say=said.append)
    assert said and said[0] == "scan: 8 of 18 images read"


def test_what_is_left_is_whole_and_counts_anew(tmp_path):
    source = photos(tmp_path)
    left = without(source, FOUND)
    assert (len(left.train), len(left.val)) == (11, 5)
    assert "rose/2.png" not in left.train.names and "daisy/0.png" not in left.val.names
    assert [left.train.load(i).size for i in range(11)] == [(5, 4)] * 11
    assert left.train.labels == (0,) * 6 + (1,) * 5
    assert left.description.endswith(
        "; 2 can't be read and are left out, so 11 training and 5 validation images are used"
    )
    assert broken_images(left, whole=True) == []
    assert without(source, ()) is source


def test_a_class_of_which_nothing_is_left_is_an_error(tmp_path):
    source = photos(tmp_path)
    all_roses = [Broken("train", name, "") for name in source.train.names if "rose" in name]
    with pytest.raises(InputError, match="leaves no training image of class 'rose'"):
        without(source, all_roses)
    with pytest.raises(InputError, match="leaves no validation image"):
        without(source, [Broken("val", name, "") for name in source.val.names])


def test_a_message_names_a_few_and_escapes_their_names(tmp_path):
    source = photos(tmp_path)
    found = [Broken("train", f"{n}\n\x1b[2J.jpg", "why") for n in range(5)]
    root = tmp_path / "train"
    assert listed(found, source) == (
        f"{root}/0\\n\\x1b[2J.jpg (why), {root}/1\\n\\x1b[2J.jpg (why), "
        f"{root}/2\\n\\x1b[2J.jpg (why) and 2 more"
    )
    assert listed(FOUND[1:], source) == f"{tmp_path}/val/daisy/0.png (PIL knows no such format)"


def large(number, share=1.0):
    """The bytes of a picture that is too large to be held in memory, or the first of them."""
    content = png(number, size=(70, 65))
    return content[: int(len(content) * share)]


def in_rows(root):
    """Two files in row groups of three: rows that are no image, and one without any bytes."""
    images = [large(n, 0.8 if n == 4 else 1) for n in range(8)]
    write_parquet(root / "train-0.parquet", images[:5], [0, 1, 0, 1, 0], paths=["same.png"] * 5)
    write_parquet(root / "train-1.parquet", [*images[5:], None], [1, 0, 1, 0])
    write_parquet(root / "validation-0.parquet", [large(9), b"text", large(1)], [0, 0, 1])
    found = [
        Broken("train", "train-0.parquet, row 4: same.png", CUT),
        Broken("train", "train-1.parquet, row 3", "it is empty"),
        Broken("val", "validation-0.parquet, row 1", "PIL knows no such format"),
    ]
    return open_source(f"parquet:{root}"), found


def in_tars(root):
    for split, numbers in (("train", range(6)), ("val", range(3))):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for n in numbers:
                content = large(n, 0.8 if n == 2 else 1)
                info = tarfile.TarInfo(f"{'ab'[n % 2]}/{n}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = open_source(f"timm:{root}")
    found = []
    for split, images in (("train", source.train), ("val", source.val)):
        start = images.samples[images.names.index("a/2.png")][0]
        found.append(Broken(split, f"{split}.tar, byte {start}: a/2.png", CUT))
    return source, found


def in_a_table(root):
    def images(numbers):
        rows = [{"image": {"bytes": large(n), "path": None}} for n in numbers]
        rows[1] = {"image": {"bytes": None, "path": str(root / "absent.png")}}
        read = HubImages(rows, "image", "hf:me/flowers")
        rows = tuple(range(len(rows)))
        return ImageFiles(rows, tuple(n % 2 for n in rows), ("a", "b"), tuple(map(str, rows)), read)

    source = Source(images(range(5)), images(range(4)), "hf:me/flowers", 3, "")
    reason = "its path names no file of at most 256 MiB"
    return source, [Broken(split, "row 1", reason) for split in ("train", "val")]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("make", [in_rows, in_tars, in_a_table])
def test_images_in_no_files_of_their_own_are_looked_at(tmp_path, make, whole):
    source, found = make(tmp_path)
    assert broken_images(source, whole=whole) == found
    shares = [broken_images(source, whole=whole, share=Share(rank, 3, 2)) for rank in range(3)]
    assert [b for some in shares for b in some] == found
    left = without(source, found)
    assert broken_images(left, whole=True) == []
    lost = [len([b for b in found if b.split == split]) for split in ("train", "val")]
    assert len(left.train) == len(source.train) - lost[0]
    assert len(left.val) == len(source.val) - lost[1]
    for images in (left.train, left.val):
        assert all(images.load(row).size == (70, 65) for row in range(len(images)))


def test_a_look_leaves_nothing_in_the_memory_of_the_reader(tmp_path):
    source, _ = in_rows(tmp_path)
    broken_images(source, whole=True)
    assert not source.train.read._cache


def test_of_many_rows_runs_are_taken_that_lie_together(tmp_path, monkeypatch):
    source, _ = in_rows(tmp_path)
    looked = []
    monkeypatch.setattr(module, "MOST_FILES", 6)
    monkeypatch.setattr(module, "_RUN", 2)
    monkeypatch.setattr(module, "_fault_in", lambda _, __, name, whole: looked.append(name))
    broken_images(source, whole=False)
    looked = [name.partition(":")[0] for name in looked]
    assert [name[:5] + name[-1] for name in looked] == [
        *("train0", "train1", "train4", "train0", "train3", "valid0")
    ]


def test_the_names_of_rows_are_shown_with_the_reason(tmp_path):
    source, found = in_rows(tmp_path)
    assert listed(found[1:], source) == (
        "train-1.parquet, row 3 (it is empty), "
        "validation-0.parquet, row 1 (PIL knows no such format)"
    )


def test_images_in_memory_are_not_looked_at():
    assert broken_images(open_source("digits"), whole=True) == []
