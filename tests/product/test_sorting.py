"""Copies by class: names that a disk takes, nothing overwritten, nothing outside the folder."""

from __future__ import annotations

import os

import pytest

from lbaccel import InputError, Prediction
from lbaccel.product.sorting import Sorter, folder_names


def of(path, name, *, unsure=None, error=""):
    return Prediction(str(path), (name,), (0.9,), error=error, unsure=unsure)


@pytest.fixture
def images(tmp_path):
    """Two files of one name and different content."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_text(folder)
    return tmp_path / "a/1.png", tmp_path / "b/1.png"


def test_names_of_classes_become_folder_names_that_lie_in_the_folder():
    names = [
        "..",
        "/etc",
        "a/b",
        "a\\b",
        "a\nb",
        "\x1b[2J",
        "",
        "con",
        "x" * 500,
        "é",
        "हिन्दी",
        ".",
    ]
    found = folder_names(names)
    assert len(set(found.values())) == len(names)
    for safe in found.values():
        assert safe == os.path.basename(safe) != ""  # noqa: PTH119
        assert safe not in (".", "..")
        assert safe.isprintable()
        assert len(safe.encode()) < 200
    assert (found["é"], found["हिन्दी"]) == ("é", "हिन्दी")
    assert found["con"] != "con"


def test_files_of_one_name_are_both_kept_and_a_second_call_adds_none(tmp_path, images):
    first, second = images
    for _ in range(2):
        sorter = Sorter(tmp_path / "out", ["cat"], unsure=False)
        assert sorter.take(of(first, "cat")) == tmp_path / "out/cat/1.png"
        assert sorter.take(of(second, "cat")) == tmp_path / "out/cat/1-2.png"
    assert sorted(path.name for path in (tmp_path / "out/cat").iterdir()) == ["1-2.png", "1.png"]
    assert (tmp_path / "out/cat/1.png").read_text() == "a"
    assert (tmp_path / "out/cat/1-2.png").read_text() == "b"
    assert first.exists()
    assert second.exists()


def test_unsure_ones_have_a_folder_that_no_class_shares(tmp_path, images):
    sorter = Sorter(tmp_path / "out", ["unsure", "cat"], unsure=True)
    assert sorter.take(of(images[0], "cat", unsure=True)) == tmp_path / "out/unsure/1.png"
    assert sorter.take(of(images[0], "unsure", unsure=False)) == tmp_path / "out/unsure-2/1.png"
    assert sorter.take(of(images[0], "cat", error="broken")) is None


def test_nothing_is_written_through_a_link(tmp_path, images):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cat").symlink_to(tmp_path / "elsewhere")
    sorter = Sorter(tmp_path / "out", ["cat", "dog"], unsure=False)
    with pytest.raises(InputError, match="is no plain folder"):
        sorter.take(of(images[0], "cat"))
    (tmp_path / "out/dog").mkdir()
    (tmp_path / "out/dog/1.png").symlink_to(tmp_path / "elsewhere/1.png")
    assert sorter.take(of(images[0], "dog")) == tmp_path / "out/dog/1-2.png"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_copy_that_broke_off_leaves_no_part(tmp_path, images, monkeypatch):
    import shutil

    def full(source, target):
        target.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        Sorter(tmp_path / "out", ["cat"], unsure=False).take(of(images[0], "cat"))
    assert list((tmp_path / "out/cat").iterdir()) == []
