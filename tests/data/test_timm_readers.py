"""Images where timm's map-style readers find them, in their order."""

from __future__ import annotations

import io
import pickle
import tarfile

import pytest
from pictures import png, write_image, write_tree
from timm.data.readers import create_reader

from lbaccel.data import timm_readers
from lbaccel.data.identity import identity_of
from lbaccel.data.images import folder_of
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError

NAMES = [f"{label}/{n}.png" for label in ("class10", "class9") for n in (1, 10, 2)]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, names=NAMES, *, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add(tar, name, png(first + number))


def reds(images):
    return [images.load(i).getpixel((0, 0))[0] for i in range(len(images))]


def test_a_tar_file_is_read_as_timm_reads_it(tmp_path):
    write_tar(tmp_path / "train.tar")
    write_tar(tmp_path / "val.tar", NAMES[::-1], first=50)
    source = open_source(f"timm:{tmp_path}")
    for images, file in ((source.train, "train.tar"), (source.val, "val.tar")):
        reader = create_reader("", str(tmp_path / file))
        assert list(images.names) == reader.filenames()
        assert list(images.labels) == reader.targets.tolist()
    number = {name: n for n, name in enumerate(NAMES)}
    assert reds(source.train) == [number[name] for name in source.train.names]
    assert reds(source.val) == [50 + 5 - number[name] for name in source.val.names]
    assert source.train.classes == ("class9", "class10")  # as people count
    assert source.train.names[:3] == ("class9/1.png", "class9/2.png", "class9/10.png")
    assert "validation from its split val" in source.description
    copy = pickle.loads(pickle.dumps(source.train))
    assert reds(copy) == reds(source.train)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.tar", "val.tar"]


def test_one_tar_file_of_tar_files_is_split_by_hash(tmp_path):
    inner = {}
    for label in ("a", "b"):
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
            for n in range(4):
                add(tar, f"{label}/{n}.png", png(10 * ord(label) % 200 + n))
        inner[label] = file.getvalue()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for label, data in inner.items():
            add(tar, f"{label}.tar", data)
    source = open_source(f"timm:{tmp_path / 'all.tar'}", val_fraction=0.25)
    assert (len(source.train), len(source.val), source.held_out) == (6, 2, True)
    reader = create_reader("", str(tmp_path / "all.tar"), cache_tarfiles=False)
    assert source.train.classes == tuple(reader.class_name_to_idx)
    expected = {10 * ord(label) % 200 + n for label in "ab" for n in range(4)}
    assert set(reds(source.train) + reds(source.val)) == expected


def test_a_folder_is_read_as_timm_reads_it(tmp_path):
    for split, first in (("train", 0), ("validation", 50)):
        for number, name in enumerate(NAMES):
            write_image(tmp_path / split / name, first + number)
    write_tree(tmp_path / "test", classes=("class9",), count=2)
    source = open_source(f"timm:{tmp_path}")
    reader = create_reader("", str(tmp_path / "train"))
    assert list(source.train.names) == reader.filenames()
    assert list(source.train.labels) == [label for _, label in reader.samples]
    number = {name: n for n, name in enumerate(NAMES)}
    assert reds(source.train) == [number[name] for name in source.train.names]
    assert source.train.classes == ("class9", "class10")
    assert (len(source.val), source.test.labels) == (6, (0, 0))
    assert folder_of(source.train) == tmp_path / "train"


def test_the_images_of_a_tar_file_have_an_identity(tmp_path):
    for name in "ab":
        write_tar(tmp_path / name / "train.tar")
        write_tar(tmp_path / name / "val.tar")
    first, second = (open_source(f"timm:{tmp_path / name}") for name in "ab")
    assert identity_of(first, of_bytes=True) == identity_of(second, of_bytes=True)
    with tarfile.open(tmp_path / "b" / "val.tar", "a") as tar:
        add(tar, "class9/99.png", png(200))
    assert identity_of(open_source(f"timm:{tmp_path / 'b'}")) != identity_of(first)


@pytest.mark.parametrize("name", ["hfids/food101", "wds/imagenet", "TFDS/cifar10"])
def test_an_iterable_reader_is_refused_with_the_reason(name):
    with pytest.raises(InputError, match="asks for each sample by its number"):
        open_source(f"timm:{name}")


def test_hugging_face_s_map_style_reader_is_the_source_hf(monkeypatch):
    asked = []
    monkeypatch.setattr(timm_readers, "open_hf", lambda name, wanted: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_source("timm:hfds/timm/oxford-iiit-pet")
    assert asked == ["timm/oxford-iiit-pet"]


def broken_tar(root):
    (root / "train.tar").write_bytes(b"no tar file" * 99)


def other_classes(root):
    write_tar(root / "train.tar")
    write_tar(root / "val.tar", ["tulip/1.png"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: root.rmdir(), "can't be read by timm's reader"),
        (lambda root: None, "Found 0 images"),
        (broken_tar, r"train\.tar can't be read by timm's reader"),
        (other_classes, "validation has class 'tulip', of which training has no"),
    ],
)
def test_a_place_that_timm_can_not_read_is_an_error(tmp_path, make, says):
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    with pytest.raises(InputError, match=says):
        open_source(f"timm:{root}")
    with pytest.raises(InputError, match="torchvision's"):
        open_source("timm:torch/cifar10")
    with pytest.raises(InputError, match="names no place"):
        open_source("timm:")


def test_a_tar_file_that_was_cut_since_names_the_place(tmp_path):
    write_tar(tmp_path / "train.tar")
    write_tar(tmp_path / "val.tar")
    source = open_source(f"timm:{tmp_path}")
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"train\.tar, byte \d+ can't be read as an image"):
        source.train.load(1)
    (tmp_path / "train.tar").unlink()
    with pytest.raises(InputError, match="No such file"):
        source.train.load(1)
