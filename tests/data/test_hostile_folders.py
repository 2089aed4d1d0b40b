"""Folders as they come: each oddity is treated rightly, or is one clear message."""

from __future__ import annotations

import io
import os
import pickle
import warnings

import numpy as np
import pytest
import yaml
from pictures import colour, write_image, write_tree
from PIL import ExifTags, Image
from runs_of_recipe import BASE, run

from lbaccel import train
from lbaccel.data.broken import broken_images, fault_of
from lbaccel.data.folders import _different
from lbaccel.data.identity import identity_of
from lbaccel.data.images import decode_image
from lbaccel.data.sources import open_source
from lbaccel.data.split import split_by_hash
from lbaccel.errors import InputError

FLAGS = [
    *("--data", "folder:photos", "--global-batch-size", "8", "--norm-batch-size", "8"),
    *("--workers", "0", "--max-updates", "1"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *flags, data="folder:photos"):
    """The one line that the command ends with."""
    assert train.main([*BASE, *FLAGS, "--data", data, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and "Traceback" not in said
    return said


# -- the classes ------------------------------------------------------------------------------


def test_one_image_a_class_is_told_that_two_are_needed(tmp_path, capsys):
    write_tree(tmp_path / "photos", count=1)
    said = refused(capsys)
    assert "class 'daisy' has 1 image: val_fraction=0.2 holds out 0" in said
    assert "Add images of it, or leave the class out." in said


def test_one_image_a_class_trains_beside_a_validation_set(tmp_path):
    write_tree(tmp_path / "photos" / "train", count=1)
    write_tree(tmp_path / "photos" / "val", count=1)
    run(*FLAGS, "--global-batch-size", "2", "--norm-batch-size", "2")


def test_ten_thousand_classes_are_compared_without_comparing_each_with_each():
    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    here = tuple(Counted(f"class {n}") for n in range(10_000))
    there = tuple(Counted(f"class {n}") for n in range(5, 10_005))
    said = _different(Counted("root"), "val", here, there)
    assert "train/ has 10000 classes and val/ has 10000" in said
    assert "'class 0', 'class 1', 'class 2', 'class 3', 'class 4' only in train/" in said
    assert Counted.compared < 20 * 10_000


def test_a_folder_of_ten_thousand_classes_is_listed_once(tmp_path, monkeypatch):
    """A call of the system for each folder and file, and no more."""
    counts = []
    for classes in (100, 200):
        root = tmp_path / str(classes)
        for n in range(classes):
            write_tree(root / "train", classes=(f"c{n:05}",), count=2)
        calls = [0]
        plain = os.scandir

        def counted(path=".", calls=calls, plain=plain):
            calls[0] += 1
            return plain(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", counted)
            source = open_source(f"folder:{root}", val_fraction=0.5)
        assert len(source.train.classes) == classes and len(source.val) == classes
        counts.append(calls[0])
    assert counts[1] - counts[0] <= 100 + 5


def test_many_classes_are_split_in_one_pass_and_named_in_short(tmp_path):
    classes = [f"class {n}" for n in range(10_000)]
    labels = [n // 2 for n in range(20_000)]
    train_rows, val_rows = split_by_hash(
        [str(n) for n in range(20_000)], labels, classes=classes, val_fraction=0.5, seed=0
    )
    assert len(train_rows) == len(val_rows) == 10_000
    for name in classes[:40]:
        (tmp_path / "photos" / name).mkdir(parents=True)
    write_image(tmp_path / "photos" / "z" / "1.png")
    with pytest.raises(InputError, match=r"'class 1', .* and 35 more has no images") as caught:
        open_source("folder:photos")
    assert len(str(caught.value)) < 500


# -- names ------------------------------------------------------------------------------------

EVIL = "rot\n\x1b[2Jerror: 'a' \"b\" <b>|`x`"


def test_names_in_other_scripts_are_names(tmp_path):
    classes = ("Gänseblümchen", "バラ", "ورد")
    write_tree(tmp_path / "photos", classes=classes, count=8)
    folder = run(*FLAGS, "--val-fraction", "0.5")
    found = (folder / "checkpoints" / "last" / "classes.json").read_text(encoding="utf-8")
    assert all(name in yaml.safe_load(found) for name in classes)


def test_names_give_the_terminal_no_orders(tmp_path, capsys):
    for split, count in (("train", 4), ("val", 2)):
        write_tree(tmp_path / "photos" / split, classes=(EVIL, "daisy"), count=count)
    folder = run(*FLAGS)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["data_identity"]["images_of"][EVIL] == 6  # as it is, where a machine reads it
    (tmp_path / "photos" / "train" / EVIL / "0.png").write_bytes(b"")
    said = refused(capsys)
    assert (
        "\x1b" not in said and "train/rot\\n\\x1b[2Jerror: 'a'" in said and "(it is empty)" in said
    )
    (tmp_path / "photos" / "val" / EVIL).rename(tmp_path / "photos" / "val" / "other\n")
    said = refused(capsys)
    assert "\x1b" not in said and "'other\\n' only in val/" in said


def test_a_set_in_a_folder_of_such_a_name_is_read_and_said_on_one_line(tmp_path, capsys):
    write_tree(tmp_path / "a\n\x1b[2Jb", count=5)
    run(*FLAGS, "--data", "folder:a\n\x1b[2Jb")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "data: folder:a\\n\\x1b[2Jb: 8 training" in out


def test_an_image_with_such_a_name_is_one_line_where_it_is_named(tmp_path):
    path = tmp_path / "1\nerror: x.png"
    path.write_text("no image")
    from lbaccel.data.images import read_image

    with pytest.raises(InputError) as caught:
        read_image(path.name, root=str(tmp_path))
    assert "1\\nerror: x.png can't be read as an image" in str(caught.value).split("\n")[0]


def test_names_that_are_no_utf_8_train(tmp_path):
    write_tree(tmp_path / "photos", count=5)
    raw = os.fsencode(tmp_path / "photos" / "rose") + b"/caf\xe9.png"
    try:
        with open(raw, "wb") as file:  # noqa: PTH123  pathlib takes no bytes
            Image.new("RGB", (5, 4), colour(9)).save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes no such name")
    source = open_source("folder:photos")
    assert identity_of(source)["num_train"] + identity_of(source)["num_val"] == 11
    run(*FLAGS)


# -- images -----------------------------------------------------------------------------------


def saved(image, kind, **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer


def noise(size=(16, 16), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0], mode=None)


def test_cmyk_is_rgb():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("TIFF", "JPEG"):
        found = np.asarray(decode_image(saved(cyan, kind), "x"))[4, 4].astype(int)
        assert found[0] < 20 and found[1] > 235 and found[2] > 235


def test_16_bits_keep_their_grey():
    steps = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(decode_image(saved(Image.fromarray(steps), kind), "x"))
        assert np.array_equal(found[..., 1], steps // 256)


def test_a_palette_gives_its_colours():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for kind in ("PNG", "GIF", "BMP"):
        assert decode_image(saved(image, kind), "x").getpixel((2, 2)) == (10, 20, 30)


def test_an_animation_is_its_first_picture():
    pictures = [Image.new("RGB", (8, 8), c) for c in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        buffer = saved(pictures[0], kind, save_all=True, append_images=pictures[1:], lossless=True)
        assert decode_image(buffer, "x").getpixel((4, 4))[:2] == pytest.approx((250, 0), abs=8)


def test_an_image_of_50_megapixels_is_an_image(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (10_000, 5_000), 7).save(path, compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL warns from 89 megapixels on
        assert fault_of(path, whole=False) is None
        assert decode_image(path, "x").size == (10_000, 5_000)


def test_an_oddity_of_each_kind_trains_or_is_named(tmp_path, capsys):
    """All of them in one folder: what can be trained on is, and the others are one message."""
    write_tree(tmp_path / "photos" / "train", count=8)
    write_tree(tmp_path / "photos" / "val", count=4)
    rose = tmp_path / "photos" / "train" / "rose"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise().convert("CMYK").save(rose / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(rose / "16bit.png")
    noise().quantize(8).save(rose / "palette.png")
    noise().save(rose / "animated.webp", save_all=True, append_images=[noise((16, 16))])
    noise((20, 10)).save(rose / "turned.jpg", exif=exif)
    (rose / "link.png").symlink_to(tmp_path / "elsewhere.png")
    write_image(tmp_path / "elsewhere.png", 5)
    run(*FLAGS, "--global-batch-size", "16", "--max-updates", "2")
    capsys.readouterr()
    noise((64, 64)).save(rose / "cut.jpg")
    (rose / "cut.jpg").write_bytes((rose / "cut.jpg").read_bytes()[:-400])
    (rose / "empty.png").write_bytes(b"")
    (rose / "nowhere.png").symlink_to(tmp_path / "gone.png")
    said = refused(capsys)
    assert "3 of the 33 images" in said and "--skip-corrupt" in said
    for part in ("rose/cut.jpg (", "rose/empty.png (it is empty)", "rose/nowhere.png (it is abs"):
        assert part in said
    run(*FLAGS, "--skip-corrupt", "--global-batch-size", "16", "--max-updates", "2")


def test_files_of_a_kind_that_is_not_read_are_counted(tmp_path):
    write_tree(tmp_path / "photos", count=5)
    for name in ("a.gif", "b.GIF", "c.heic", "notes.txt"):
        (tmp_path / "photos" / "rose" / name).write_bytes(b"GIF89a")
    source = open_source("folder:photos")
    assert len(source.train) + len(source.val) == 10
    assert source.description.endswith(
        "; 2 .gif and 1 .heic files are not read: save them as PNG or JPEG"
    )


def test_links_out_of_the_folder_are_followed_to_files_and_folders(tmp_path):
    write_tree(tmp_path / "store", classes=("one", "two"), count=4)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "daisy").symlink_to(tmp_path / "store" / "one")
    write_image(photos / "rose" / "1.png", 3)
    for n in range(3):
        (photos / "rose" / f"link{n}.png").symlink_to(tmp_path / "store" / "two" / f"{n}.png")
    source = open_source("folder:photos", val_fraction=0.25)
    assert (len(source.train), len(source.val)) == (6, 2)
    assert broken_images(source, whole=True) == []
    copy = pickle.loads(pickle.dumps(source.train))
    assert all(copy.load(i).size == (5, 4) for i in range(6))
