"""A folder with train/, val/ and test/: which images train, choose the checkpoint, and judge."""

from __future__ import annotations

import pytest
from pictures import CLASSES, png, write_image, write_parquet, write_tree

from lbaccel.data.sources import ImageArray, open_source
from lbaccel.errors import InputError


def folder_with(root, **counts):
    """`counts` images of each class below each of these names."""
    for split, count in counts.items():
        write_tree(root / split, count=count)
    return f"folder:{root}"


def test_test_beside_train_and_val_is_the_test_set(tmp_path):
    source = open_source(folder_with(tmp_path, train=5, val=2, test=3))
    assert (len(source.train), len(source.val), len(source.test)) == (10, 4, 6)
    assert source.test.classes == source.train.classes and source.test.labels == (0, 0, 0, 1, 1, 1)
    assert source.test.load(0).size == (5, 4)
    assert source.description == (
        f"folder:{tmp_path}: 10 training, 4 validation and 6 test images, 2 classes, "
        "validation from val/"
    )
    assert not source.held_out


def test_test_without_val_chooses_no_checkpoint(tmp_path):
    spec = folder_with(tmp_path, train=10, test=3)
    source = open_source(spec, val_fraction=0.2)
    assert (len(source.train), len(source.val), len(source.test)) == (16, 4, 6)
    assert source.held_out and "16 training, 4 validation and 6 test images" in source.description
    # the same share of train/ as without a test set
    alone = open_source(f"folder:{tmp_path / 'train'}", val_fraction=0.2)
    assert (source.train.names, source.val.names) == (alone.train.names, alone.val.names)
    roots = {images.read.keywords["root"] for images in (source.train, source.val)}
    assert roots == {str(tmp_path / "train")}


@pytest.mark.parametrize("others", [{"val": 4}, {"test": 3}, {"val": 4, "test": 3}, {"odd": 2}])
def test_unused_holds_out_of_train_whatever_else_there_is(tmp_path, others):
    source = open_source(folder_with(tmp_path, train=10, **others), test_split="unused")
    assert (len(source.train), len(source.val), source.test) == (16, 4, None)
    assert source.held_out
    alone = open_source(f"folder:{tmp_path / 'train'}")
    assert (source.train.names, source.val.names) == (alone.train.names, alone.val.names)


def test_test_is_the_validation_set_where_that_is_asked_for(tmp_path):
    source = open_source(folder_with(tmp_path, train=10, test=3), test_split="val")
    assert (len(source.train), len(source.val), source.test) == (20, 6, None)
    assert source.description.endswith("validation from test/") and not source.held_out
    with pytest.raises(InputError, match="test_split='vla' is not one of 'test', 'val'"):
        open_source("digits", test_split="vla")


def test_a_test_set_may_lack_a_class(tmp_path):
    spec = folder_with(tmp_path, train=5, val=2)
    write_tree(tmp_path / "test", classes=("rose",), count=3)
    test = open_source(spec).test
    assert test.labels == (1, 1, 1) and test.classes == CLASSES


@pytest.mark.parametrize("splits", [{"train": 5, "val": 2}, {"train": 5}])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: write_image(root / "1.png"), "needs images in a sub-folder for each class"),
        (lambda root: write_tree(root, classes=("all",)), "training has no class 'all'"),
        (lambda root: (root / "rose").mkdir(parents=True), "needs images in a sub-folder"),
    ],
)
def test_images_that_can_not_be_judged_by_stop_no_training(tmp_path, splits, make, says):
    spec = folder_with(tmp_path, **splits)
    make(tmp_path / "test")
    source = open_source(spec)
    assert source.test is None and len(source.train) + len(source.val) == 2 * sum(splits.values())
    assert "test/ is not used" in source.description and says in source.description


# -- parquet ----------------------------------------------------------------------------------


def parquet_with(root, *, size=(5, 4), **labels):
    for number, (split, of_split) in enumerate(labels.items()):
        images = [png(10 * number + n, size) for n in range(len(of_split))]
        write_parquet(root / f"{split}-00000-of-00001.parquet", images, of_split)
    return f"parquet:{root}"


@pytest.mark.parametrize("size", [(5, 4), (70, 70)])
def test_the_three_sets_of_parquet_files(tmp_path, size):
    spec = parquet_with(tmp_path, size=size, train=[0, 1] * 4, validation=[0, 1], test=[1, 1, 0])
    source = open_source(spec)
    assert (len(source.train), len(source.val), len(source.test)) == (8, 2, 3)
    assert [int(label) for label in source.test.labels] == [1, 1, 0]
    assert type(source.test) is type(source.train)
    assert isinstance(source.train, ImageArray) == (size == (5, 4))
    assert "8 training, 2 validation and 3 test images" in source.description


def test_parquet_without_validation_leaves_the_test_set_alone(tmp_path):
    spec = parquet_with(tmp_path, train=[0, 1] * 10, test=[1, 0])
    source = open_source(spec, val_fraction=0.2)
    assert (len(source.train), len(source.val), len(source.test)) == (16, 4, 2)
    source = open_source(spec, test_split="val")
    assert (len(source.train), len(source.val), source.test) == (20, 2, None)
    spec = parquet_with(tmp_path, train=[0, 1] * 10, test=[1, 0], validation=[0, 1, 1])
    source = open_source(spec, test_split="unused")
    assert (len(source.train), len(source.val), source.test) == (16, 4, None)


def test_a_test_set_of_the_hub_without_labels_is_left_out(tmp_path):
    spec = parquet_with(tmp_path, train=[0, 1] * 4, validation=[0, 1], test=[-1, -1])
    source = open_source(spec)
    assert source.test is None and "test-*.parquet is not used" in source.description
    assert "label -1" in source.description
