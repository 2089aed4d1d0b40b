import json
import os
import pickle
import random
import subprocess
import sys
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import CLASSES, colour, png, write_image, write_parquet, write_tree
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, cifar

from lbaccel.data import row_images
from lbaccel.data.images import decode_image, read_image
from lbaccel.data.parquet_columns import find_columns
from lbaccel.data.sources import ImageArray, ImageFiles, open_source
from lbaccel.data.split import name_hash, split_by_hash
from lbaccel.errors import InputError, RunFailed


def two_halves(root, *, size=(5, 4), num_train=8, num_val=4, **options):
    for split, first, count in (("train", 0, num_train), ("validation", 100, num_val)):
        numbers = range(first, first + count)
        write_parquet(
            root / f"{split}-00000-of-00001.parquet",
            [png(n, size) for n in numbers],
            [n % 2 for n in numbers],
            **options,
        )


# -- the split --------------------------------------------------------------------------------


def held_out(names, labels, classes=CLASSES, val_fraction=0.25, seed=0):
    train, val = split_by_hash(names, labels, classes=classes, val_fraction=val_fraction, seed=seed)
    assert sorted(train + val) == list(range(len(names)))
    assert train == sorted(train) and val == sorted(val)
    return {names[position] for position in val}


def flower_names(count=40):
    return [f"{name}/{n}.jpg" for name in CLASSES for n in range(count)]


def flower_labels(count=40):
    return [label for label in range(2) for _ in range(count)]


def test_the_split_holds_out_the_rounded_share_of_each_class():
    labels = [0] * 10 + [1] * 33
    names = [str(n) for n in range(43)]
    for fraction in (0.1, 0.25, 0.5, 0.9):
        _, val = split_by_hash(names, labels, classes=CLASSES, val_fraction=fraction, seed=3)
        counts = Counter(labels[p] for p in val)
        assert counts == {0: round(fraction * 10), 1: round(fraction * 33)}


def test_the_split_does_not_depend_on_the_order_of_listing():
    pairs = list(zip(flower_names(), flower_labels(), strict=True))
    expected = held_out(*zip(*pairs, strict=True))
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        assert held_out(*zip(*pairs, strict=True)) == expected


def test_the_split_of_a_class_does_not_depend_on_the_other_classes():
    names, labels = flower_names(), flower_labels()
    expected = held_out(names, labels)
    more = [f"aster/{n}.jpg" for n in range(17)] + names
    shifted = [0] * 17 + [label + 1 for label in labels]
    with_third = held_out(more, shifted, classes=("aster", *CLASSES))
    assert {name for name in with_third if not name.startswith("aster")} == expected


def test_one_more_file_moves_at_most_one_other():
    names, labels = flower_names(), flower_labels()
    before = held_out(names, labels)
    for number in range(40, 60):
        new = f"rose/{number}.jpg"
        after = held_out([*names, new], [*labels, 1]) - {new}
        assert len(before ^ after) <= 1


def test_another_seed_is_another_split_and_the_same_seed_the_same():
    names, labels = flower_names(), flower_labels()
    assert held_out(names, labels, seed=1) == held_out(names, labels, seed=1)
    assert held_out(names, labels, seed=1) != held_out(names, labels, seed=2)


def test_the_hash_is_the_same_in_another_process_and_takes_names_that_are_no_utf8():
    name = "rösen/\udcff.jpg"
    code = (
        "import sys; from lbaccel.data.split import name_hash; "
        "print(name_hash(5, 'r\\xf6sen/\\udcff.jpg').hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path.cwd())}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert out.stdout.strip() == name_hash(5, name).hex()


@pytest.mark.parametrize(("size", "fraction"), [(2, 0.2), (3, 0.9), (1, 0.5)])
def test_a_class_too_small_for_the_share_is_an_error_that_says_which_share_works(size, fraction):
    labels = [0] * 20 + [1] * size
    names = [str(n) for n in range(len(labels))]
    with pytest.raises(InputError, match=f"'rose' has {size} image") as caught:
        split_by_hash(names, labels, classes=CLASSES, val_fraction=fraction, seed=0)
    if size > 1:
        words = str(caught.value).split()
        low, high = float(words[-4]), float(words[-1].rstrip("."))
        for share in (low + 0.01, high - 0.01):
            split_by_hash(names, labels, classes=CLASSES, val_fraction=share, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20, float("nan")])
def test_a_share_outside_0_to_1_is_an_error_for_every_source(fraction):
    with pytest.raises(InputError, match="not between 0 and 1"):
        open_source("cifar10", val_fraction=fraction)


# -- the spec ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("digit", "digits"),
        ("CIFAR10", "cifar10"),
        ("cifar-100", "cifar100"),
        ("folders:x", "folder:PATH"),
        ("parqet:x", "parquet:PATH"),
        ("folder:", "folder:PATH"),
        ("folder", "folder:PATH"),
    ],
)
def test_an_unknown_spec_is_an_error_with_the_five_forms_and_the_nearest(spec, meant):
    with pytest.raises(InputError) as caught:
        open_source(spec)
    text = str(caught.value)
    assert repr(spec) in text and f"Did you mean {meant}?" in text
    assert "digits, cifar10, cifar100, folder:PATH, parquet:PATH" in text


def test_a_bare_path_of_a_folder_is_told_how_to_write_it(tmp_path):
    with pytest.raises(InputError, match=f"Did you mean folder:{tmp_path}, or parquet:"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"synthetic\[:CLASSESxSIZE\]\.$"):
        open_source("imagenet22k")


# -- digits -----------------------------------------------------------------------------------


def test_digits_are_all_there_as_bytes_and_split_class_by_class():
    source = open_source("digits")
    images, targets = load_digits(return_X_y=True)
    assert isinstance(source.train, ImageArray) and isinstance(source.val, ImageArray)
    expected = {}
    for label, count in Counter(targets.tolist()).items():
        expected[label] = round(0.2 * count)
    assert Counter(source.val.labels.tolist()) == expected
    assert len(source.train) + len(source.val) == len(images)
    both = torch.cat([source.train.images, source.val.images])
    assert both.dtype == torch.uint8 and both.shape == (len(images), 1, 8, 8)
    scaled = np.round(images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both.reshape(-1, 64).numpy())) == sorted(map(bytes, scaled))
    assert source.train.classes == tuple("0123456789") and source.num_channels == 1
    assert source.description == (
        f"digits: {len(source.train)} training and {len(source.val)} validation images of 8x8x1, "
        "10 classes, split by hash of the index"
    )
    assert not torch.equal(open_source("digits", seed=1).val.labels, source.val.labels)


# -- CIFAR ------------------------------------------------------------------------------------


@pytest.fixture
def no_checksums(monkeypatch):
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())


def forbid_network(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)


def cifar_bytes(count, start):
    return (np.arange(count * 3072).reshape(count, 3072) + start).astype(np.uint8)


def write_cifar10(root):
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    batches = [*(name for name, _ in CIFAR10.train_list), "test_batch"]
    for start, name in enumerate(batches):
        entry = {"data": cifar_bytes(2, start), "labels": [start, 9 - start]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = {"label_names": [f"class {n}" for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_cifar10_is_read_from_its_own_files_and_its_test_set_is_the_validation(
    tmp_path, no_checksums, monkeypatch
):
    forbid_network(monkeypatch, AssertionError("the files are there"))
    write_cifar10(tmp_path)
    source = open_source("cifar10", data_dir=tmp_path)
    assert isinstance(source.train, ImageArray) and isinstance(source.val, ImageArray)
    expected = np.concatenate([cifar_bytes(2, start) for start in range(5)])
    assert np.array_equal(source.train.images.flatten(1).numpy(), expected)
    assert source.train.images.is_contiguous() and source.train.images.shape == (10, 3, 32, 32)
    assert source.train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert source.val.labels.tolist() == [5, 4]
    assert source.train.classes == source.val.classes == tuple(f"class {n}" for n in range(10))
    assert source.num_channels == 3 and "of 32x32x3, 10 classes" in source.description


def test_cifar100_has_the_fine_labels(tmp_path, no_checksums):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        entry = {"data": cifar_bytes(3, 0), "fine_labels": [0, 50, 99], "coarse_labels": [1, 1, 1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = {"fine_label_names": [str(n) for n in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    source = open_source("cifar100", data_dir=tmp_path)
    assert source.train.labels.tolist() == [0, 50, 99]
    assert len(source.val.classes) == 100


def test_cifar_is_downloaded_where_it_is_absent(tmp_path, no_checksums, monkeypatch):
    def download(url, root, **options):
        write_cifar10(Path(root))

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    folder = tmp_path / "not" / "there" / "yet"
    assert len(open_source("cifar10", data_dir=folder).train) == 10


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), RuntimeError("File not found or corrupted")],
)
def test_a_failed_download_says_what_to_do_offline(tmp_path, monkeypatch, error):
    forbid_network(monkeypatch, error)
    with pytest.raises(RunFailed) as caught:
        open_source("cifar10", data_dir=tmp_path)
    text = str(caught.value)
    assert "cifar-10-python.tar.gz" in text and str(tmp_path) in text and "parquet:PATH" in text
    assert str(error) in text


# -- folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("val_name", ["val", "validation"])
def test_a_folder_with_two_halves_is_read_as_it_stands(tmp_path, val_name):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / val_name, count=2)
    source = open_source(f"folder:{tmp_path}", seed=5)
    assert isinstance(source.train, ImageFiles) and isinstance(source.val, ImageFiles)
    assert source.train.classes == source.val.classes == CLASSES
    assert source.train.labels == (0,) * 5 + (1,) * 5 and source.val.labels == (0, 0, 1, 1)
    assert source.train.names[7] == "rose/2.png"
    image = source.train.load(7)
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == colour(12)
    assert source.description == (
        f"folder:{tmp_path}: 10 training and 4 validation images, 2 classes, "
        f"validation from {val_name}/"
    )


def test_val_comes_before_test(tmp_path):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val", count=2)
    write_tree(tmp_path / "test", count=3)
    assert len(open_source(f"folder:{tmp_path}").val) == 4


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_with_one_tree_is_split_by_the_hash_of_its_file_names(tmp_path, below):
    write_tree(tmp_path / below, count=10)
    write_image(tmp_path / below / "rose" / "deep" / "er.png")
    source = open_source(f"folder:{tmp_path}", val_fraction=0.3, seed=2)
    names = [f"{name}/{n}.png" for name in CLASSES for n in range(10)] + ["rose/deep/er.png"]
    labels = [0] * 10 + [1] * 11
    assert set(source.val.names) == held_out(names, labels, val_fraction=0.3, seed=2)
    assert set(source.train.names) == set(names) - set(source.val.names)
    assert all(CLASSES[y] == n.split("/")[0] for n, y in zip(*_named(source.val), strict=True))
    assert "split by hash of the file name" in source.description


def _named(files):
    return files.names, files.labels


def test_a_relative_path_and_a_home_are_understood(tmp_path, monkeypatch):
    write_tree(tmp_path / "flowers")
    monkeypatch.chdir(tmp_path)
    source = open_source("folder:flowers")
    assert source.name == "folder:flowers"
    monkeypatch.chdir("/")
    assert source.train.load(0).mode == "RGB"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("folder:~/flowers").train) == 8


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    write_tree(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "rose" / "._0.png").write_bytes(b"left by an archive")
    (tmp_path / "rose" / "notes.txt").write_text("red")
    write_image(tmp_path / "rose" / ".thumbs" / "0.png")
    write_image(tmp_path / "rose" / "UPPER.PNG")
    source = open_source(f"folder:{tmp_path}")
    assert len(source.train) + len(source.val) == 11
    assert source.train.classes == CLASSES
    for half in (source.train, source.val):
        labels = [CLASSES.index(name.partition("/")[0]) for name in half.names]
        assert list(half.labels) == labels and len(half) == len(labels)


def test_unicode_names_are_read_and_reported(tmp_path):
    write_tree(tmp_path, classes=("Gänseblümchen", "バラ"), count=4)
    source = open_source(f"folder:{tmp_path}", val_fraction=0.5)
    assert source.val.classes == ("Gänseblümchen", "バラ")
    assert [source.val.load(i).size for i in range(len(source.val))] == [(5, 4)] * 4


def test_an_image_of_one_pixel_is_an_image(tmp_path):
    write_tree(tmp_path)
    write_image(tmp_path / "rose" / "dot.png", 99, (1, 1))
    source = open_source(f"folder:{tmp_path}")
    sizes = [half.load(i).size for half in (source.train, source.val) for i in range(len(half))]
    assert sizes.count((1, 1)) == 1


def palette_with_transparency():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = b"\x00\x80"
    return image


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("LA", (3, 2), (77, 0)), (77, 77, 77)),
        (Image.new("RGBA", (3, 2), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("I;16", (3, 2), 40000), (40000 // 256,) * 3),
        (palette_with_transparency(), (10, 20, 30)),
    ],
    ids=["grey", "bits", "grey-alpha", "rgba", "16-bit-grey", "palette"],
)
def test_images_of_every_mode_become_rgb(tmp_path, image, pixel):
    (tmp_path / "x").mkdir()
    image.save(tmp_path / "x" / "0.png")
    write_image(tmp_path / "x" / "1.png", 1)
    source = open_source(f"folder:{tmp_path}", val_fraction=0.5)
    half = source.train if "x/0.png" in source.train.names else source.val
    loaded = half.load(0)
    assert loaded.mode == "RGB" and loaded.getpixel((2, 1)) == pixel


def test_pixels_of_unknown_range_are_an_error(tmp_path):
    Image.new("F", (2, 2), 0.5).save(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0\.tif has 32-bit pixels"):
        decode_image(tmp_path / "0.tif", str(tmp_path / "0.tif"))


@pytest.mark.parametrize("damage", ["no image", "cut off", "empty", "gone"])
def test_a_corrupt_image_is_an_error_with_its_path(tmp_path, damage):
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val")
    path = tmp_path / "train" / "rose" / "3.png"
    if damage == "cut off":
        Image.effect_noise((60, 60), 50).save(path)
        path.write_bytes(path.read_bytes()[:800])
    source = open_source(f"folder:{tmp_path}")
    if damage == "gone":
        path.unlink()
    elif damage != "cut off":
        path.write_bytes(b"GIF89a?" if damage == "no image" else b"")
    with pytest.raises(InputError) as caught:
        source.train.load(source.train.names.index("rose/3.png"))
    assert str(path) in str(caught.value) and "Replace it" in str(caught.value)


def test_a_decompression_bomb_stays_refused_and_is_named(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"0\.png can't be read as an image: .*decompression bomb"):
        decode_image(tmp_path / "0.png", "0.png")


def empty_class(root):
    write_tree(root)
    (root / "tulip").mkdir()


def empty_val_class(root):
    write_tree(root / "train", classes=(*CLASSES, "tulip"))
    write_tree(root / "val")
    (root / "val" / "tulip").mkdir()


def other_val_classes(root):
    write_tree(root / "train")
    write_tree(root / "val", classes=("daisy", "tulip"))


def no_images(root):
    (root / "rose").mkdir(parents=True)
    (root / "rose" / "rose.txt").write_text("is a rose")


def no_classes(root):
    write_image(root / "0.png")


def only_val(root):
    write_tree(root / "val")


def misnamed_val(root):
    write_tree(root / "train")
    write_tree(root / "valid")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["absent"]),
        (lambda root: root.write_text("x"), ["a file"]),
        (empty_class, ["'tulip' has no images", "remove the folder"]),
        (empty_val_class, ["'tulip' has no images", "val"]),
        (other_val_classes, ["'rose' only in train/", "'tulip' only in val/"]),
        (no_images, ["no images", ".jpg"]),
        (no_classes, ["no sub-folders"]),
        (only_val, ["val/ but no train/"]),
        (misnamed_val, ["what are valid/?", "Rename one to val"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_folder_that_is_not_as_it_must_be_is_an_error(tmp_path, make, words):
    root = tmp_path / "set"
    make(root)
    with pytest.raises(InputError) as caught:
        open_source(f"folder:{root}")
    assert str(root) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_class_may_be_called_train(tmp_path):
    write_tree(tmp_path, classes=("plane", "train"))
    assert open_source(f"folder:{tmp_path}").train.classes == ("plane", "train")


# -- parquet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("image", ["img", "image", "picture"])
def test_small_images_of_one_size_are_decoded_into_memory(tmp_path, below, image):
    two_halves(tmp_path / below, image=image)
    source = open_source(f"parquet:{tmp_path}")
    assert isinstance(source.train, ImageArray) and isinstance(source.val, ImageArray)
    assert source.train.images.shape == (8, 3, 4, 5) and source.train.images.dtype == torch.uint8
    expected = torch.tensor([colour(n) for n in range(8)], dtype=torch.uint8)
    assert torch.equal(source.train.images, expected[:, :, None, None].expand(8, 3, 4, 5))
    assert source.val.images[:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    assert source.train.labels.tolist() == [0, 1] * 4 and source.train.labels.dtype == torch.int64
    assert source.train.classes == CLASSES
    assert source.description == (
        f"parquet:{tmp_path}: 8 training and 4 validation images of 4x5x3, 2 classes, "
        "validation from validation-*.parquet"
    )


@pytest.mark.parametrize("size", [(65, 4), (4, 65)])
def test_large_images_stay_in_the_files(tmp_path, size):
    two_halves(tmp_path, size=size)
    source = open_source(f"parquet:{tmp_path}")
    assert isinstance(source.train, ImageFiles) and isinstance(source.val, ImageFiles)
    assert [source.train.load(i).getpixel((0, 0)) for i in (7, 0, 4, 2)] == [
        colour(n) for n in (7, 0, 4, 2)
    ]
    assert source.train.load(0).size == size and source.train.load(0).mode == "RGB"
    assert source.train.labels == (0, 1) * 4 and source.val.labels == (0, 1) * 2
    assert source.num_channels == 3 and "validation images, 2 classes" in source.description


def test_images_of_two_sizes_stay_in_the_files_whichever_half_they_are_in(tmp_path):
    for odd in ("train", "validation"):
        root = tmp_path / odd
        two_halves(root)
        write_parquet(
            root / f"{odd}-00000-of-00001.parquet", [png(0), png(1, (6, 4)), png(2)], [0, 1, 0]
        )
        source = open_source(f"parquet:{root}")
        assert isinstance(source.train, ImageFiles) and isinstance(source.val, ImageFiles)


def test_a_set_too_large_for_memory_stays_in_the_files(tmp_path, monkeypatch):
    two_halves(tmp_path)
    monkeypatch.setattr(row_images, "MAX_ARRAY_BYTES", 8 * 3 * 4 * 5 - 1)
    assert isinstance(open_source(f"parquet:{tmp_path}").train, ImageFiles)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    two_halves(tmp_path, num_train=8)
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    numbers = range(50, 57)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png(n) for n in numbers], [1] * 7)
    expected = [*range(8), *numbers]
    source = open_source(f"parquet:{tmp_path}")
    assert source.train.images[:, 0, 0, 0].tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_images, "MAX_SIDE", 2)
        files = open_source(f"parquet:{tmp_path}").train
    assert [files.load(i).getpixel((0, 0))[0] for i in range(15)] == expected
    assert files.labels == (0, 1) * 4 + (1,) * 7


@pytest.mark.parametrize("max_side", [64, 2])
def test_parquet_without_validation_is_split_by_hash(tmp_path, monkeypatch, max_side):
    monkeypatch.setattr(row_images, "MAX_SIDE", max_side)
    labels = [n % 2 for n in range(20)]
    images, paths = [png(n) for n in range(20)], [f"{n}.jpg" for n in range(20)]

    def reds(half):
        if isinstance(half, ImageArray):
            return half.images[:, 0, 0, 0].tolist()
        return [half.load(i).getpixel((0, 0))[0] for i in range(len(half))]

    for name, given in (("unnamed", None), ("named", paths), ("twice", ["same.jpg"] * 20)):
        root = tmp_path / name
        write_parquet(root / "train-0.parquet", images, labels, paths=given)
        source = open_source(f"parquet:{root}", val_fraction=0.3, seed=4)
        keys = paths if name == "named" else [str(n) for n in range(20)]
        expected = {keys.index(k) for k in held_out(keys, labels, val_fraction=0.3, seed=4)}
        assert reds(source.val) == sorted(expected)
        assert sorted(reds(source.train) + reds(source.val)) == list(range(20))
        assert [int(y) for y in source.val.labels] == [n % 2 for n in sorted(expected)]
        assert ("file name" if name == "named" else "row number") in source.description


def test_validation_comes_before_test_in_parquet(tmp_path):
    two_halves(tmp_path)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [png(1)], [1])
    assert len(open_source(f"parquet:{tmp_path}").val) == 1


def test_without_the_hubs_metadata_types_and_numbers_decide(tmp_path):
    labels = [3, 7, 3, 7, 20, 20]
    for split in ("train", "validation"):
        path = tmp_path / f"{split}-0.parquet"
        write_parquet(path, [png(n) for n in range(6)], labels, names=None)
    source = open_source(f"parquet:{tmp_path}")
    assert source.train.classes == ("3", "7", "20")
    assert source.val.labels.tolist() == [0, 1, 0, 1, 2, 2]
    write_parquet(tmp_path / "validation-0.parquet", [png(0)], [4], names=None)
    with pytest.raises(InputError, match="has label 4"):
        open_source(f"parquet:{tmp_path}")


def schema_of(columns, features=None):
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({name: image if t == "image" else t for name, t in columns.items()})
    if features is None:
        return schema
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def class_label(*names):
    return {"_type": "ClassLabel", "names": list(names)}


def test_the_fine_label_is_preferred_and_features_are_preferred_to_types():
    number = pa.int64()
    path = Path("train-0.parquet")
    columns = {"img": "image", "fine_label": number, "coarse_label": number}
    features = {"fine_label": class_label("a", "b"), "coarse_label": class_label("c")}
    assert find_columns(schema_of(columns, features), path) == ("img", "fine_label", ("a", "b"))
    assert find_columns(schema_of(columns), path) == ("img", "fine_label", None)
    columns = {"mask": "image", "image": "image", "width": number, "kind": number}
    features = {"kind": class_label("a"), "mask": {"_type": "Image"}, "image": {"_type": "Image"}}
    assert find_columns(schema_of(columns, features), path) == ("image", "kind", ("a",))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": "image", "text": pa.string()}, ["label column", "has 0", "text (string)"]),
        ({"image": "image", "a": pa.int8(), "b": pa.int8()}, ["label column", "has 2", "'label'"]),
        ({"label": pa.int64(), "image": pa.string()}, ["image column", "has 0"]),
    ],
)
def test_a_missing_or_doubtful_column_is_an_error_with_the_columns(columns, words):
    with pytest.raises(InputError) as caught:
        find_columns(schema_of(columns), Path("train-0.parquet"))
    for word in ("train-0.parquet", *words):
        assert word in str(caught.value)


def test_metadata_that_is_no_json_is_passed_over():
    schema = schema_of({"img": "image", "label": pa.int64()})
    for text in ("{", "[]", '{"info": null}', '{"info": {"features": {"label": "x"}}}'):
        strange = schema.with_metadata({"huggingface": text})
        assert find_columns(strange, Path("x")) == ("img", "label", None)


@pytest.mark.parametrize("max_side", [64, 2])
def test_a_broken_image_is_an_error_with_its_file_and_row(tmp_path, monkeypatch, max_side):
    monkeypatch.setattr(row_images, "MAX_SIDE", max_side)
    two_halves(tmp_path)
    path = tmp_path / "train-00001.parquet"
    for broken, words in ((b"no image", "can't be read as an image"), (None, "has no bytes")):
        write_parquet(path, [png(n) for n in range(4)] + [broken], [0, 1, 0, 1, 0])
        with pytest.raises(InputError) as caught:
            source = open_source(f"parquet:{tmp_path}")
            source.train.load(8 + 4)
        assert f"{path}, row 4 (rows are counted from 0) {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0, 1, -1], "row 2 .* has label -1"), ([0, None, 1], "row 1 .* no label")],
)
def test_a_missing_label_is_an_error_with_its_file_and_row(tmp_path, labels, words):
    two_halves(tmp_path)
    path = tmp_path / "validation-00000-of-00001.parquet"
    write_parquet(path, [png(n) for n in range(3)], labels)
    with pytest.raises(InputError, match=f"{path}, {words}"):
        open_source(f"parquet:{tmp_path}")


def test_other_class_names_in_validation_are_an_error_that_names_them(tmp_path):
    two_halves(tmp_path)
    path = tmp_path / "validation-00000-of-00001.parquet"
    write_parquet(path, [png(0)], [0], names=("daisy", "tulip"))
    with pytest.raises(InputError, match="only one has 'rose', 'tulip'"):
        open_source(f"parquet:{tmp_path}")
    write_parquet(path, [png(0)], [0], names=("rose", "daisy"))
    with pytest.raises(InputError, match="in other order"):
        open_source(f"parquet:{tmp_path}")
    write_parquet(path, [png(0)], [0], image="image")
    with pytest.raises(InputError, match="image column is 'image', there 'img'"):
        open_source(f"parquet:{tmp_path}")


def test_a_validation_class_without_training_images_is_an_error(tmp_path):
    two_halves(tmp_path)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [png(0), png(1)], [0, 0])
    with pytest.raises(InputError, match="class 'rose', of which training has no image"):
        open_source(f"parquet:{tmp_path}")


def test_files_that_are_absent_misnamed_empty_or_broken_are_errors(tmp_path):
    def error(root):
        with pytest.raises(InputError) as caught:
            open_source(f"parquet:{root}")
        return str(caught.value)

    assert "is absent" in error(tmp_path / "nowhere")
    assert "no parquet file" in error(tmp_path)
    path = tmp_path / "images.parquet"
    write_parquet(path, [], [])
    assert "found images.parquet" in error(tmp_path)
    assert f"such as parquet:{tmp_path}" in error(path)
    path.rename(tmp_path / "train-0.parquet")
    assert "hold no rows" in error(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and then nothing")
    assert "train-0.parquet can't be read as a parquet file" in error(tmp_path)


class Reds(Dataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.files.load(index).getpixel((0, 0))[0]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_files_go_to_loader_workers_as_a_small_pickle(tmp_path, kind):
    if kind == "folder":
        write_tree(tmp_path / "train")
        write_tree(tmp_path / "val")
        expected = [10 * label + n for label in range(2) for n in range(5)]
    else:
        two_halves(tmp_path, size=(70, 70))
        expected = list(range(8))
    files = open_source(f"{kind}:{tmp_path}").train
    assert isinstance(files, ImageFiles)
    before = len(pickle.dumps(files))
    assert [Reds(files)[i] for i in range(len(files))] == expected
    assert len(pickle.dumps(files)) == before < 2000
    copy = pickle.loads(pickle.dumps(files))
    assert copy.load(3).tobytes() == files.load(3).tobytes()
    loaded = DataLoader(Reds(files), batch_size=4, num_workers=1)
    assert torch.cat(list(loaded)).tolist() == expected


def test_row_groups_are_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    two_halves(tmp_path, size=(70, 70), num_train=12)
    files = open_source(f"parquet:{tmp_path}").train
    assert isinstance(files, ImageFiles) and isinstance(files.read, row_images.RowImages)
    reads = []
    read = pq.ParquetFile.iter_batches

    def spy(self, *sizes, row_groups, **named):
        reads.extend(row_groups)
        return read(self, *sizes, row_groups=row_groups, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    order = [0, 3, 6, 9, 1, 4, 7, 10]  # the four row groups, twice
    for index in order:
        files.load(index)
    assert reads == [0, 1, 2, 3]
    size = files.read._read(0).nbytes
    files.read._cache.clear()
    monkeypatch.setattr(row_images, "CACHE_BYTES", 2 * size + size // 2)
    reads.clear()
    for index in order:
        files.load(index)
        assert len(files.read._cache) <= 2
    assert reads == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("where", [".", "rose", "rose/deeper"])
def test_a_folder_that_can_not_be_read_is_named_and_not_taken_for_an_empty_one(
    where, tmp_path, monkeypatch
):
    """The rights of a folder do not bind root, who may run the tests: the system's answer does."""
    write_tree(tmp_path)
    write_image(tmp_path / "rose" / "deeper" / "9.png")
    closed = (tmp_path / where).resolve()

    def refusing(plain):
        def answer(path="."):
            if os.path.realpath(path) == str(closed):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path)

        return answer

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    with pytest.raises(InputError, match=rf"^{closed} can't be read: Permission denied\. Give a"):
        open_source(f"folder:{tmp_path}")


def test_the_images_of_a_folder_come_in_torchvision_s_order(tmp_path):
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    from lbaccel.data.folders import _scan

    write_tree(tmp_path)
    for name in ("rose/b/1.png", "rose/a/2.PNG", "rose/a.png", "daisy/Z/1.jpg", "daisy/z.webp"):
        write_image(tmp_path / name)
    (tmp_path / "rose" / "notes.txt").write_text("")
    classes = {name: label for label, name in enumerate(CLASSES)}
    expected = make_dataset(str(tmp_path), classes, extensions=IMG_EXTENSIONS)
    found = _scan(tmp_path, read_image, Counter())
    assert [
        (str(tmp_path / n), k) for n, k in zip(found.names, found.labels, strict=True)
    ] == expected
