"""Names in one buffer are the strings of a tuple, to their readers, workers and pickles."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.names import _AT_ONCE, Names

STRANGE = (
    "",
    "a",
    "ä/é.png",
    "日本\n.jpg",
    "\0",
    "\udce4.png",
    os.fsdecode(b"\xff\xfe.jpg"),
    "\ud800",
)
ANY = st.text(st.characters(exclude_categories=()))  # lone surrogates too


def test_strings_come_back_as_they_were():
    names = Names(STRANGE)
    assert len(names) == len(STRANGE) and bool(names) and not Names([])
    assert [names[i] for i in range(len(names))] == list(names) == list(STRANGE)
    assert [names[i - len(names)] for i in range(len(names))] == list(STRANGE)
    assert names[np.int64(2)] == STRANGE[2]
    assert list(reversed(names)) == list(reversed(STRANGE))
    assert names.index("日本\n.jpg") == 3 and "a" in names and "b" not in names
    assert repr(names) == "Names of 8: '', 'a', 'ä/é.png', ..."
    assert repr(Names(["x"])) == "Names of 1: 'x'"


@given(st.lists(ANY, max_size=30), st.data())
def test_all_that_a_tuple_does(strings, data):
    names, truth = Names(iter(strings)), tuple(strings)
    assert names == truth and truth == names and names == Names(truth)
    assert list(names) == strings
    part = data.draw(st.slices(len(strings)))
    assert isinstance(names[part], Names) and names[part] == truth[part]
    rows = data.draw(st.lists(st.integers(-len(strings), len(strings) - 1))) if strings else []
    for given_rows in (rows, np.array(rows, np.int64)):
        assert names.take(given_rows) == tuple(truth[row] for row in rows)
    other = data.draw(st.lists(ANY, max_size=3))
    assert (names == tuple(other)) == (strings == other) == (names == Names(other))
    assert (names != tuple(other)) == (strings != other)


def test_equal_to_nothing_else():
    assert Names(["a"]) != ["a"] and Names(["a"]) != "a" and Names(["ab"]) != Names(["a", "b"])
    assert Names(["a", "b"]) != ("a",)


@pytest.mark.parametrize("count", [_AT_ONCE - 1, _AT_ONCE, 2 * _AT_ONCE + 1])
def test_many_are_read_and_made_in_parts(count):
    strings = [f"{i % 7 * 'ü'}{i}" for i in range(count)]
    names = Names(strings)
    assert list(names) == strings and names == tuple(strings)
    rows = np.random.default_rng(0).permutation(count)
    assert list(names.take(rows)) == [strings[row] for row in rows]


@pytest.mark.parametrize("index", [3, -4])
def test_a_place_that_is_not_there(index):
    with pytest.raises(IndexError):
        Names("abc")[index]
    with pytest.raises(IndexError):
        Names("abc").take([0, index])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_equal_and_a_pickle_of_a_part_holds_the_part_alone(copied):
    names = Names(STRANGE * 500)
    assert copied(names) == names
    part = names[100:104]
    assert copied(part) == STRANGE[4:]
    assert len(pickle.dumps(part)) < 1000 < len(pickle.dumps(names))


def test_a_name_takes_its_bytes_and_eight_more():
    strings = [f"n{i:029d}" for i in range(20_000)]
    names = Names(strings)
    assert len(pickle.dumps(names)) < 20_000 * (30 + 8) + 1000


# -- sets of image files --------------------------------------------------------------------------


def files_of(count=50):
    names = tuple(f"{i}.png" for i in range(count))
    return ImageFiles(names, [0] * count, ("a",), names, partial(read_image, root="absent"))


def test_a_set_keeps_its_names_so_and_one_buffer_for_names_and_samples():
    images = files_of()
    assert isinstance(images.names, Names) and images.names == tuple(f"{i}.png" for i in range(50))
    assert images.samples is images.names
    part = images.only([7, 3])
    assert part.samples is part.names and part.names == ("7.png", "3.png")
    again = pickle.loads(pickle.dumps(part))
    assert again.samples is again.names and again.names == part.names
    rows = ImageFiles((4, 2), (0, 0), ("a",), ("x", "y"))
    assert rows.only([1]).samples == (2,) and rows.only([1]).names == ("y",)
    assert rows.samples == (4, 2)


def test_a_part_makes_no_python_strings():
    images = files_of(20_000)
    rows = list(range(0, 20_000, 2))
    tracemalloc.start()
    images.names.take(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 20  # the places; strings would take 50 and more each


def read_in_a_worker(images, queue):
    queue.put([images.samples[row] for row in (3, 0)])


@pytest.mark.parametrize(
    "method",
    ["fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"],
)
def test_a_worker_reads_the_names(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=read_in_a_worker, args=(files_of(), queue))
    worker.start()
    assert queue.get(timeout=60) == ["3.png", "0.png"]
    worker.join(60)
    assert worker.exitcode == 0
