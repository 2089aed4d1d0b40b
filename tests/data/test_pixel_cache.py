"""Kept pixels are the decoded ones to the bit, in bounded memory that processes share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_crops import smooth
from test_photographs import COUNT, PREPROCESSING, images  # noqa: F401

from lbaccel import BatchPlan, UpdateLoader
from lbaccel.data.decode import pixels_of
from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.pipelines import EvaluationBatches, training_set
from lbaccel.data.pixel_cache import CachePart, Held, PixelCache
from lbaccel.data.shared_bytes import TOKEN, SharedBytes
from lbaccel.errors import InputError

ENOUGH = 2**20


def picture(number, height=5, width=7):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def never():
    raise AssertionError("it is kept, and yet decoded")


def room_for(num_images, num_bytes):
    """The smallest cache with an index of so many images, and so many bytes of them."""
    return TOKEN + -(-(8 + 24 * num_images) // 64) * 64 + num_bytes


def in_a_child(do):
    """Call `do` in a fork and wait for its end; the exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def epochs_of(data, *, workers, count=2, micro=5):
    """Images and labels of these epochs, in the loader's order."""
    plan = BatchPlan(global_batch_size=COUNT, micro_batch_size=micro)
    loader = UpdateLoader(data, plan, seed=5, num_workers=workers)
    updates = [list(update) for _ in range(count) for update in loader]
    loader.close()
    return [torch.cat([batch[i] for u in updates for _, batch in u]) for i in (0, 1)]


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_two_epochs_have_the_same_bits_with_and_without(images, decoder, workers, share):  # noqa: F811
    pre = {**PREPROCESSING, "decoder": decoder}
    whole = sum(pixels_of(images, i).numel() for i in range(COUNT))
    cache = PixelCache(COUNT, room_for(COUNT, int(share * whole) + 64 * COUNT))
    plain = epochs_of(training_set(images, preprocessing=pre, seed=5), workers=0)
    data = training_set(images, preprocessing=pre, seed=5, cache=CachePart(cache))
    found = epochs_of(data, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    held = cache.held()
    assert held.num_images == COUNT if share == 1 else 0 < held.num_images < COUNT
    for index in range(COUNT):  # nothing wrote into what is kept
        kept = cache.pixels(index, lambda i=index: pixels_of(images, i))
        assert torch.equal(kept, pixels_of(images, index))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_the_second_epoch_reads_no_file(images, decoder, workers, tmp_path):  # noqa: F811
    """The files are gone after the first."""
    root = Path(images.read.keywords["root"])
    for name in images.names:
        (tmp_path / name).write_bytes((root / name).read_bytes())
    read = partial(read_image, root=str(tmp_path))
    copies = ImageFiles(images.names, images.labels, images.classes, images.names, read)
    pre, cache = {**PREPROCESSING, "decoder": decoder}, PixelCache(2 * COUNT, ENOUGH)
    data = training_set(copies, preprocessing=pre, seed=5, cache=CachePart(cache))
    evaluation = EvaluationBatches(
        copies, preprocessing=pre, num_workers=workers, cache=CachePart(cache, COUNT)
    )
    first, seen = epochs_of(data, workers=workers, count=1), list(evaluation(0, 5))
    assert cache.held().num_images == 2 * COUNT
    for name in images.names:
        (tmp_path / name).unlink()
    assert torch.equal(first[0], epochs_of(data, workers=workers, count=1)[0])
    again = list(evaluation(0, 4))
    assert torch.equal(torch.cat([x for x, _ in seen]), torch.cat([x for x, _ in again]))


def test_validation_images_are_not_taken_for_training_images():
    cache = PixelCache(5, ENOUGH)
    training, validation = CachePart(cache), CachePart(cache, first=3)
    for index in range(3):
        training.pixels(index, lambda i=index: picture(i))
    for index in range(2):
        found = validation.pixels(index, lambda i=index: picture(10 + i))
        assert torch.equal(found, picture(10 + index))
    assert torch.equal(training.pixels(1, never), picture(1))
    assert torch.equal(validation.pixels(1, never), picture(11))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_turned_has_the_same_bits_out_of_the_cache(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth(50, 70, 3).save(tmp_path / "0.jpg", exif=exif)
    files = ImageFiles(
        ("0.jpg",), (0,), ("a",), ("0.jpg",), partial(read_image, root=str(tmp_path))
    )
    rows, cache = np.zeros(1, dtype=np.int64), PixelCache(1, ENOUGH)
    plain = training_set(files, preprocessing=PREPROCESSING, seed=1)
    kept = training_set(files, preprocessing=PREPROCESSING, seed=1, cache=CachePart(cache))
    for epoch in range(6):
        expected = plain.load(rows, rows + epoch)[0]
        assert torch.equal(kept.load(rows, rows + epoch)[0], expected)
    assert cache.held().num_images == 1


def test_what_is_kept_never_has_more_bytes_than_it_was_given_and_stays():
    size = 3 * 5 * 7  # 105, in 128 bytes
    cache = PixelCache(6, room_for(6, 2 * 128 + 64))
    for _ in range(3):
        for index in range(5):
            assert torch.equal(cache.pixels(index, lambda i=index: picture(i)), picture(index))
        assert cache.held() == Held(2, 2 * size)
    small = picture(9, 2, 3)
    cache.pixels(5, lambda: small)  # 18 bytes have room still
    assert cache.held() == Held(3, 2 * size + 18)
    for index, expected in ((0, picture(0)), (1, picture(1)), (5, small)):
        assert torch.equal(cache.pixels(index, never), expected)
    assert len(cache.memory.bytes) + TOKEN == room_for(6, 2 * 128 + 64)


def test_a_cache_that_holds_no_image_changes_nothing():
    cache = PixelCache(3, room_for(3, 100))
    assert all(torch.equal(cache.pixels(1, lambda: picture(1)), picture(1)) for _ in range(2))
    assert cache.held() == Held(0, 0)
    with pytest.raises(InputError, match=r"num_bytes=191 has no room for the index of 3 images"):
        PixelCache(3, room_for(3, 0) - 1)


def test_an_image_that_cannot_be_read_is_asked_for_again():
    cache = PixelCache(1, ENOUGH)

    def broken():
        raise InputError("0.jpg can't be read")

    for _ in range(2):
        with pytest.raises(InputError, match="can't be read"):
            cache.pixels(0, broken)
    assert torch.equal(cache.pixels(0, lambda: picture(0)), picture(0))


def test_an_image_whose_writer_was_killed_counts_as_absent(monkeypatch):
    """Its process ends after its row is taken, and before its pixels stand there."""
    cache = PixelCache(2, ENOUGH)

    def ended_while_it_writes():
        monkeypatch.setattr(cache, "_view", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        cache.pixels(0, lambda: picture(0))

    assert in_a_child(ended_while_it_writes) == -signal.SIGKILL
    for _ in range(2):
        assert torch.equal(cache.pixels(0, lambda: picture(0)), picture(0))
    assert cache.held() == Held(0, 0)
    assert torch.equal(cache.pixels(1, lambda: picture(1)), picture(1))
    assert torch.equal(cache.pixels(1, never), picture(1))


def test_a_process_that_is_killed_inside_the_lock_blocks_nobody():
    memory = SharedBytes(TOKEN + 8)

    def ended_inside():
        with memory.locked():
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(ended_inside) == -signal.SIGKILL
    with memory.locked():
        assert memory.bytes.sum() == 0


def test_two_processes_never_take_the_same_place():
    """One has read how much is used when the other, which has decoded meanwhile, takes a place."""
    cache = PixelCache(2, ENOUGH)
    (asked, asks), (reading, reads) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(asked, 1)
        with cache.memory.locked():
            used = int(cache._used)
            os.write(reads, b"x")
            time.sleep(0.5)
            cache._used.fill_(used + 128)
        os._exit(0)

    def decode():
        os.write(asks, b"x")
        os.read(reading, 1)
        return picture(1)

    cache.pixels(1, decode)
    os.waitpid(pid, 0)
    for end in (asked, asks, reading, reads):
        os.close(end)
    assert int(cache._used) == 256


def fill(cache, first):
    for i in range(200):
        index = (first + i) % 200
        assert torch.equal(cache.pixels(index, lambda n=index: picture(n)), picture(index))


def look(cache):
    assert torch.equal(cache.pixels(7, never), picture(7))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_each_kind_share_what_is_kept(method):
    cache = PixelCache(200, ENOUGH)
    context = multiprocessing.get_context(method)
    if method == "spawn":
        fill(cache, 0)
        processes = [context.Process(target=look, args=(cache,))]
    else:
        processes = [context.Process(target=fill, args=(cache, 70 * n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    for index in range(200):
        assert torch.equal(cache.pixels(index, never), picture(index))
    assert cache.held() == Held(200, 200 * 105)


def test_another_process_of_the_machine_opens_it_and_knows_it():
    cache = PixelCache(2, ENOUGH)
    address = cache.memory.address

    def other_rank():
        opened = PixelCache.of(SharedBytes.at(address), 2)
        opened.pixels(0, lambda: picture(0))

    assert in_a_child(other_rank) == 0
    assert torch.equal(cache.pixels(0, never), picture(0))
    pid, number, _ = address
    with pytest.raises(InputError, match="holds other memory"):
        SharedBytes.at((pid, number, b"x" * TOKEN))
    with pytest.raises(InputError, match="can't be opened"):
        SharedBytes.at((pid, 10**6, b""))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="of Linux")
def test_no_file_is_left_and_the_shared_folder_is_not_used():
    def ours():
        paths = Path("/proc/self/fd").iterdir()
        links = (str(path.readlink()) for path in paths if path.is_symlink())
        return [link for link in links if "lbaccel" in link]

    before = len(ours())
    cache = PixelCache(1, ENOUGH)
    cache.pixels(0, lambda: picture(0))
    mine = ours()
    assert len(mine) == before + 2  # its own, and that of its mapping
    assert all(link.startswith("/memfd:") for link in mine)  # no file, and none of /dev/shm
    del cache
    assert len(ours()) == before


def test_memory_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="GiB of shared memory are not to be had"):
        SharedBytes(2**62)
