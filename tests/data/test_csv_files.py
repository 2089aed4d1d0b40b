"""Images that a table lists: path, label and split."""

from __future__ import annotations

import pickle

import pytest
from pictures import colour, write_image

from lbaccel.data import csv_files
from lbaccel.data.identity import identity_of
from lbaccel.data.sources import open_source
from lbaccel.errors import InputError


def table(root, text, *, pictures=12):
    root.mkdir(exist_ok=True)
    for n in range(pictures):
        write_image(root / f"{n}.png", n)
    path = root / "photos.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return f"csv:{path}"


def lines(*rows, head="path,label,split"):
    return "\n".join([head, *rows]) + "\n"


def test_a_table_with_splits_is_read_as_it_stands(tmp_path):
    rows = ["3.png,rose,train", "1.png,daisy,train", "5.png,rose,validation", "7.png,daisy,test"]
    source = open_source(table(tmp_path, lines(*rows)))
    assert source.train.classes == ("daisy", "rose")
    assert source.train.names == ("3.png", "1.png") and source.train.labels == (1, 0)
    assert source.train.load(1).getpixel((0, 0)) == colour(1)
    assert (source.val.names, source.val.labels) == (("5.png",), (1,))
    assert (source.test.names, source.test.labels) == (("7.png",), (0,))
    assert "2 training, 1 validation and 1 test images, 2 classes" in source.description
    assert source.description.endswith("validation from its split val")
    copy = pickle.loads(pickle.dumps(source.train))
    assert copy.load(0).tobytes() == source.train.load(0).tobytes()


def test_other_columns_quotes_spaces_and_a_mark_at_the_front_are_no_matter(tmp_path):
    text = '\ufeffwho, Label ,PATH\nme,rose,0.png\n\nyou, daisy ,1.png\nme,"a, ""b""",2.png\n'
    text += 'me,rose,3.png\nme,daisy,4.png\nme,"a, ""b""",5.png\n'
    source = open_source(table(tmp_path, text), val_fraction=0.5)
    assert source.train.classes == ('a, "b"', "daisy", "rose")
    assert len(source.train) == len(source.val) == 3
    assert "split by hash of the path" in source.description and source.held_out


def test_the_order_of_the_lines_is_no_part_of_the_split(tmp_path):
    rows = [f"{n}.png,{'rose' if n % 2 else 'daisy'}" for n in range(12)]
    spec = table(tmp_path / "a", lines(*rows, head="path,label"))
    other = table(tmp_path / "b", lines(*reversed(rows), head="path,label"))
    assert set(open_source(spec).val.names) == set(open_source(other).val.names)


def test_paths_are_relative_to_the_table_or_absolute(tmp_path, monkeypatch):
    write_image(tmp_path / "far" / "1.png", 99)
    rows = ["0.png,rose,train", f"{tmp_path}/far/1.png,daisy,train", "../far/1.png,rose,val"]
    table(tmp_path / "set", lines(*rows))
    monkeypatch.chdir(tmp_path / "set")
    source = open_source("csv:photos.csv")
    monkeypatch.chdir("/")
    assert [source.train.load(i).getpixel((0, 0))[0] for i in range(2)] == [0, 99]
    assert source.val.load(0).getpixel((0, 0))[0] == 99


def test_a_test_split_without_val_is_left_alone(tmp_path):
    rows = [f"{n}.png,{'rose' if n % 2 else 'daisy'},{'test' if n > 7 else 'train'}" for n in
            range(12)]  # fmt: skip
    spec = table(tmp_path, lines(*rows))
    source = open_source(spec, val_fraction=0.25)
    assert (len(source.train), len(source.val), len(source.test)) == (6, 2, 4)
    source = open_source(spec, test_split="val")
    assert (len(source.train), len(source.val), source.test) == (8, 4, None)
    source = open_source(spec, test_split="unused", val_fraction=0.25)
    assert (len(source.train), len(source.val), source.test) == (6, 2, None)


def test_the_images_of_a_table_have_an_identity(tmp_path):
    rows = ["0.png,rose,train", "1.png,daisy,train", "2.png,rose,val"]
    first, second = (open_source(table(tmp_path / name, lines(*rows))) for name in "ab")
    assert identity_of(first, of_bytes=True) == identity_of(second, of_bytes=True)
    write_image(tmp_path / "b" / "1.png", 1, (50, 40))
    assert identity_of(second) != identity_of(first)


ROWS = ("0.png,rose,train", "1.png,daisy,train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs one column 'path' in its first line; it has none"),
        ("file,label\n0.png,rose\n", "needs one column 'path' in its first line; it has 'file'"),
        ("path,path,label\n", "needs one column 'path'"),
        ("path,kind\n0.png,rose\n", "needs one column 'label'"),
        (lines(*ROWS, "2.png,rose"), "line 4 has no split"),
        (lines(*ROWS, "2.png,,val"), "line 4 has no label"),
        (lines(*ROWS, "2.png,rose,dev\x1b"), r"line 4 has the split 'dev\\x1b'. Use train, val"),
        (lines("0.png,rose,val"), "lists no training image"),
        (lines(*ROWS, "2.png,tulip,val"), "validation has class 'tulip', of which training has no"),
        (b"path,label\n\xff\xfe,rose\n", "is no UTF-8"),
        (lines('0.png,"ro' + "s" * 140_000 + '",train'), "field larger than field limit"),
    ],
)
def test_a_table_that_is_not_as_it_must_be_is_an_error(tmp_path, text, says):
    with pytest.raises(InputError, match=says) as caught:
        open_source(table(tmp_path, text))
    assert str(tmp_path / "photos.csv") in str(caught.value)


def test_a_table_is_read_within_bounds(tmp_path, monkeypatch):
    spec = table(tmp_path, lines(*ROWS, "2.png,rose,val"))
    monkeypatch.setattr(csv_files, "MOST_ROWS", 2)
    with pytest.raises(InputError, match="more than 2 rows"):
        open_source(spec)
    monkeypatch.setattr(csv_files, "MOST_BYTES", 20)
    with pytest.raises(InputError, match="more than 20 bytes"):
        open_source(spec)
    with pytest.raises(InputError, match="is absent"):
        open_source(f"csv:{tmp_path / 'no.csv'}")
    with pytest.raises(InputError, match="is a folder"):
        open_source(f"csv:{tmp_path}")


def test_test_images_of_other_classes_stop_no_training(tmp_path):
    source = open_source(table(tmp_path, lines(*ROWS, "2.png,rose,val", "3.png,?,test")))
    assert source.test is None and "test images are not used" in source.description
