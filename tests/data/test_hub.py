"""Data sets of the Hugging Face hub, with a stand-in for the package `datasets`.

The stand-in has the part of its interface that lbaccel calls: names and behaviour of version 5.2.
"""

from __future__ import annotations

import builtins
import io
import pickle
import sys
from types import SimpleNamespace

import pytest
from pictures import colour, png
from PIL import Image as PILImage

from lbaccel.data.identity import identity_of
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError, RunFailed


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Value:
    def __init__(self, dtype="int64"):
        self.dtype = dtype


class Table:
    """A data set of a column store: rows by number, columns by name."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, slice):
            return {name: values[key] for name, values in self.columns.items()}
        for feature in self.features.values():
            assert not (isinstance(feature, Image) and feature.decode), "decoded by the package"
        return {name: values[key] for name, values in self.columns.items()}

    def select_columns(self, names):
        some = ({k: part[k] for k in names} for part in (self.columns, self.features))
        return Table(*some)

    def cast_column(self, name, feature):
        return Table(self.columns, {**self.features, name: feature})


def table(numbers, *, labels=None, names=("daisy", "rose"), image="image", label="label", **more):
    labels = [n % 2 for n in numbers] if labels is None else labels
    images = [{"bytes": png(n), "path": None} for n in numbers]
    columns = {image: images, label: labels} | {name: [0] * len(images) for name in more}
    features = {image: Image(), label: ClassLabel(list(names)) if names else Value(), **more}
    return Table(columns, features)


@pytest.fixture
def hub(monkeypatch):
    """What the stand-in holds, by name, and what it was asked for."""
    held, asked = {}, []

    def load_dataset(path, split=None):
        asked.append((path, split))
        if isinstance(held[path], Exception):
            raise held[path]
        return held[path] if split is None else held[path][split]

    def load_from_disk(path):
        asked.append((path, "from disk"))
        return held[path]

    module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk, Image=Image)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return SimpleNamespace(held=held, asked=asked)


def reds(images):
    return [images.load(i).getpixel((0, 0))[0] for i in range(len(images))]


def test_the_splits_are_the_sets(hub):
    hub.held["me/flowers"] = {
        "train": table(range(8)),
        "validation": table(range(20, 24)),
        "test": table(range(40, 42)),
    }
    source = open_source("hf:me/flowers")
    assert hub.asked == [("me/flowers", None)]
    assert reds(source.train) == list(range(8)) and source.train.labels == (0, 1) * 4
    assert reds(source.val) == [20, 21, 22, 23] and reds(source.test) == [40, 41]
    assert source.train.load(3).getpixel((0, 0)) == colour(3)
    assert source.train.classes == ("daisy", "rose")
    assert "8 training, 4 validation and 2 test images" in source.description
    assert reds(pickle.loads(pickle.dumps(source.train))) == list(range(8))


@pytest.mark.parametrize("test_split", ["test", "val"])
def test_without_validation_the_test_split_is_left_alone(hub, test_split):
    hub.held["me/flowers"] = {"train": table(range(20)), "test": table([30, 31])}
    source = open_source("hf:me/flowers", test_split=test_split)
    assert len(source.val) == (4 if test_split == "test" else 2)
    assert (source.test is None) == (test_split == "val")


def test_one_split_is_divided(hub):
    hub.held["me/flowers"] = {"extra": table(range(20))}
    source = open_source("hf:me/flowers:extra", val_fraction=0.2)
    assert hub.asked == [("me/flowers", "extra")]
    assert (len(source.train), len(source.val)) == (16, 4) and source.held_out
    assert sorted(reds(source.train) + reds(source.val)) == list(range(20))
    with pytest.raises(InputError, match=r"no split 'train': it has 'extra'\."):
        open_source("hf:me/flowers")


def test_labels_without_names_are_classes_too(hub):
    for values, classes in (([3, 20, 3, 20], ("3", "20")), (["b", "a", "b", "a"], ("a", "b"))):
        train = table(range(4), labels=values, names=None)
        val = table([9], labels=values[:1], names=None)
        hub.held["x"] = {"train": train, "validation": val}
        source = open_source("hf:x")
        assert source.train.classes == classes
        assert [source.train.classes[y] for y in source.train.labels] == [str(v) for v in values]
        assert source.val.labels == source.train.labels[:1]


def test_of_several_columns_the_usual_names_count(hub):
    more = {"coarse_label": ClassLabel(["x"]), "mask": Image()}
    hub.held["x"] = {"train": table(range(8), image="img", label="fine_label", **more)}
    assert len(open_source("hf:x").train) == 6
    hub.held["x"] = {"train": table(range(8), image="a", label="label", mask=Image())}
    with pytest.raises(InputError, match=r"needs one column of images; it has 2 among: a \(Image"):
        open_source("hf:x")
    hub.held["x"] = {"train": table(range(8), label="kind", names=None)}
    with pytest.raises(InputError, match="needs one label column"):
        open_source("hf:x")


def test_an_image_is_turned_upright(hub):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", (6, 3)).save(buffer := io.BytesIO(), "PNG", exif=exif)
    held = table(range(10))
    held.columns["image"] = [{"bytes": buffer.getvalue(), "path": None}] * 10
    hub.held["x"] = {"train": held}
    assert open_source("hf:x").train.load(0).size == (3, 6)
    assert open_source("hf:x", exif_orientation=False).train.load(0).size == (6, 3)


def test_an_image_may_lie_in_a_file(hub, tmp_path):
    (tmp_path / "a.png").write_bytes(png(77))
    held = table(range(10))
    held.columns["image"][3] = {"bytes": None, "path": str(tmp_path / "a.png")}
    held.columns["image"][4] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    held.columns["image"][5] = None
    held.columns["image"][6] = {"bytes": b"no image", "path": None}
    held.columns["image"][7] = {"bytes": None, "path": "/dev/zero"}
    hub.held["x"] = {"train": held, "validation": table(range(4))}
    train = open_source("hf:x").train
    assert train.load(3).getpixel((0, 0))[0] == 77
    no_file = "its path names no file of at most 256 MiB"
    for row, says in (
        (4, no_file),
        (7, no_file),
        (5, "has no image"),
        (6, "can't be read as an image"),
    ):
        with pytest.raises(InputError, match=rf"hf:x, train, row {row} .*{says}"):
            train.load(row)


def test_the_images_have_an_identity(hub):
    def found(numbers, of_bytes=False):
        hub.held["x"] = {"train": table(numbers), "validation": table(range(4))}
        return identity_of(open_source("hf:x"), of_bytes=of_bytes)

    assert found(range(8)) == found(range(8))
    assert found(range(8)) != found(range(9))
    assert found(range(8), of_bytes=True) != found(range(100, 108), of_bytes=True)
    large = table(range(8))
    large.columns["image"][2] = {"bytes": png(2, (50, 50)), "path": None}
    hub.held["x"] = {"train": large, "validation": table(range(4))}
    assert identity_of(open_source("hf:x")) != found(range(8))


def test_a_missing_label_is_named_but_in_the_test_split(hub):
    whole, holed = table(range(4)), table(range(4), labels=[0, 1, -1, 1])
    hub.held["x"] = {"train": whole, "validation": holed}
    with pytest.raises(InputError, match=r"hf:x, val, row 2 \(counted from 0\) has no label"):
        open_source("hf:x")
    hub.held["x"] = {"train": whole, "validation": whole, "test": holed}
    source = open_source("hf:x")
    assert source.test is None and "test images are not used" in source.description


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConnectionError("Couldn't reach it\nwith hf_abcdefghijkl"), RunFailed, "use parquet:PATH"),
        (FileNotFoundError("Dataset 'x' doesn't exist"), InputError, "as it stands on the hub"),
        (ValueError("Unknown split \x1b[2J"), InputError, r"Unknown split \\x1b\[2J"),
    ],
)
def test_an_error_of_the_hub_is_one_sentence_without_tokens(hub, error, kind, says):
    hub.held["x"] = error
    with pytest.raises(kind, match=says) as caught:
        open_source("hf:x")
    assert "\n" not in str(caught.value) and "abcdefghijkl" not in str(caught.value)


def test_a_folder_is_read_without_the_hub(hub, tmp_path):
    hub.held[str(tmp_path)] = {"train": table(range(20))}
    open_source(f"hf:{tmp_path}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    open_source(f"hf:{tmp_path}")
    assert hub.asked == [(str(tmp_path), None), (str(tmp_path), "from disk")]


def test_without_the_package_the_line_to_type_is_said(monkeypatch):
    plain = builtins.__import__

    def absent(name, *given, **named):
        if name == "datasets":
            raise ImportError(name)
        return plain(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install 'lbaccel\[hf\]'"):
        open_source("hf:me/flowers")
    with pytest.raises(InputError, match="names no data set"):
        open_source("hf:")
