"""A part of a set: its classes in proportion, the same for every seed, nothing held out in it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pictures import png, write_parquet, write_tree

from lbaccel.data import row_images
from lbaccel.data.identity import identity_of
from lbaccel.data.images import ImageArray
from lbaccel.data.sources import open_source
from lbaccel.data.subset import drawn, shares
from lbaccel.errors import InputError
from lbaccel.recipe import images as images_of_recipe
from lbaccel.recipe.images import open_data
from lbaccel.recipe.options_data import DataOptions
from lbaccel.recipe.settings import read_settings

COUNTS = st.dictionaries(st.integers(0, 20), st.integers(1, 200), min_size=1, max_size=8)


@given(COUNTS, st.data())
def test_each_class_has_its_share_to_one_image_and_none_is_left_out(counts, data):
    total = sum(counts.values())
    most = data.draw(st.integers(len(counts), total))
    found = shares(counts, most)
    assert sum(found.values()) == most and found.keys() == counts.keys()
    added = sum(most * n < total for n in counts.values())  # classes whose share is below one image
    for label, n in counts.items():
        assert 1 <= found[label] <= n
        assert found[label] > most * n / total - 1 - added
        assert found[label] < most * n / total + 1 or found[label] == 1


def test_a_draw_depends_on_names_alone():
    names = [f"{n}.png" for n in range(200)]
    labels = [n % 4 for n in range(200)]
    rows, told = drawn(names, labels, 20, name="max_train_samples")
    assert Counter(labels[row] for row in rows) == dict.fromkeys(range(4), 5)
    assert rows == sorted(set(rows)) and told == "200 training"
    assert rows != list(range(20))
    backwards, _ = drawn(names[::-1], labels[::-1], 20, name="max_train_samples")
    assert {names[::-1][row] for row in backwards} == {names[row] for row in rows}
    more, _ = drawn(names, labels, 40, name="max_train_samples")
    assert set(rows) < set(more)


def open_kind(kind, root, **options):
    """240 images of two classes, a third of them in validation where it has a set of its own."""
    if kind in ("digits", "synthetic:4x8"):
        return open_source(kind, **options)
    if kind == "folder":
        write_tree(root, count=30)
    elif kind == "csv":
        write_tree(root, count=30)
        paths = sorted(path.relative_to(root) for path in root.glob("*/*.png"))
        lines = [f"{path},{path.parent}" for path in paths]
        (root / "t.csv").write_text("\n".join(["path,label", *lines]))
        return open_source(f"csv:{root / 't.csv'}", **options)
    else:
        rows = range(60)
        write_parquet(root / "train-0.parquet", [png(n) for n in rows], [n % 2 for n in rows])
    return open_source(f"{kind}:{root}", **options)


def content(images):
    if isinstance(images, ImageArray):
        return Counter(one.numpy().tobytes() for one in images.images)
    return Counter(images.names)


@pytest.mark.parametrize("kind", ["digits", "synthetic:4x8", "folder", "csv", "parquet", "rows"])
def test_every_source_gives_a_part_of_each_side_after_the_split(kind, tmp_path, monkeypatch):
    if kind == "rows":
        monkeypatch.setattr(row_images, "MAX_SIDE", 2)
        kind = "parquet"
    whole = open_kind(kind, tmp_path)
    part = open_kind(kind, tmp_path, max_train_samples=25, max_val_samples=11)
    assert (len(part.train), len(part.val)) == (25, 11)
    classes = len(whole.train.classes)
    for images, of in ((part.train, whole.train), (part.val, whole.val)):
        assert content(images) <= content(of), "held out before: none changes sides"
        counted = Counter(int(label) for label in images.labels)
        assert len(counted) == classes
        assert type(images) is type(of)
    assert "the same for every seed" in part.description
    assert f"{len(whole.train):,} training" in part.description
    assert part.held_out == whole.held_out
    again = open_kind(kind, tmp_path, max_train_samples=25, max_val_samples=11)
    assert identity_of(again) == identity_of(part) != identity_of(whole)


def test_images_in_memory_and_in_files_of_the_same_rows_are_the_same(tmp_path, monkeypatch):
    options = {"max_train_samples": 12, "max_val_samples": 4}
    memory = open_kind("parquet", tmp_path, **options)
    monkeypatch.setattr(row_images, "MAX_SIDE", 2)
    files = open_kind("parquet", tmp_path, **options)
    for one, other in ((memory.train, files.train), (memory.val, files.val)):
        loaded = [torch.from_numpy(np.array(other.load(i))) for i in range(len(other))]
        assert torch.equal(one.images, torch.stack(loaded).permute(0, 3, 1, 2))


def test_rows_that_are_not_drawn_are_not_decoded(tmp_path, monkeypatch):
    decoded = []
    plain = row_images.RowImages.decode
    monkeypatch.setattr(
        row_images.RowImages,
        "decode",
        lambda self, row, data: decoded.append(row) or plain(self, row, data),
    )
    open_kind("parquet", tmp_path, max_train_samples=10, max_val_samples=4)
    assert len(decoded) == 14


def test_training_leaves_the_test_set_of_parquet_files_undecoded(tmp_path, monkeypatch):
    for split, first, count in (("train", 0, 20), ("test", 100, 6)):
        rows = range(first, first + count)
        write_parquet(
            tmp_path / f"{split}-0.parquet", [png(n) for n in rows], [n % 2 for n in rows]
        )
    data = DataOptions(data=f"parquet:{tmp_path}")
    judged = open_data(data, seed=0)
    trained = open_data(data, seed=0, decodes_test=False)
    assert isinstance(judged.test, ImageArray) and not isinstance(trained.test, ImageArray)
    assert trained.description == judged.description
    assert identity_of(trained) == identity_of(judged)
    seen = []
    monkeypatch.setattr(
        images_of_recipe,
        "open_data",
        lambda *a, **given: seen.append(given) or open_data(*a, **given),
    )
    settings, _ = read_settings(["--data", data.data])
    images_of_recipe.sound_images(settings, Accelerator(cpu=True), say=lambda _: None, fresh=True)
    assert seen[0]["decodes_test"] is False


def test_the_images_are_the_same_for_every_seed():
    """Digits are split by the seed: of what both seeds train on, both take the same."""
    wholes = [open_source("digits", seed=seed) for seed in (0, 1)]
    parts = [open_source("digits", seed=seed, max_train_samples=200) for seed in (0, 1)]
    both = content(wholes[0].train) & content(wholes[1].train)
    shared = [content(part.train) & both for part in parts]
    assert sum((shared[0] & shared[1]).values()) > 0.95 * min(map(Counter.total, shared))
    fixed = [open_source("synthetic:4x8", seed=s, max_train_samples=50) for s in (0, 1)]
    assert identity_of(fixed[0]) == identity_of(fixed[1])


def test_as_many_as_there_are_is_the_whole_set():
    whole = open_source("digits")
    same = open_source("digits", max_train_samples=1438, max_val_samples=359)
    assert identity_of(same) == identity_of(whole) and same.description == whole.description


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_train_samples": 1439}, "there are 1,438 training images"),
        ({"max_val_samples": 360}, "there are 359 validation images"),
        ({"max_train_samples": 9}, "below the 10 classes"),
        ({"max_val_samples": 0}, "max_val_samples=0"),
        ({"max_train_samples": 2.5}, "max_train_samples=2.5"),
    ],
)
def test_a_number_that_can_not_be_had_is_one_sentence(options, words):
    with pytest.raises(InputError, match=words):
        open_source("digits", **options)
