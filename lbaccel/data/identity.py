"""Which images a run is trained on, wherever they lie: their number, classes, names and sizes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lbaccel.data.hub import HubImages
from lbaccel.data.images import ImageArray, ImageFiles, folder_of
from lbaccel.data.row_images import RowImages
from lbaccel.data.sources import Source
from lbaccel.data.timm_readers import TarImages
from lbaccel.errors import InputError, reading

MOST_CLASSES = 1000  # whose names and numbers are kept to say what changed
MOST_SIZES = 4096  # files whose size is looked up; a call each, which a network's disk makes slow
MOST_READ = 256  # rows of a table whose size can only be read with the image


def identity_of(source: Source, *, of_bytes: bool = False) -> dict[str, Any]:
    """The identity of training and validation images: equal for a copy at another path.

    The fingerprint is a hash of the names in order with their labels, and of the sizes of at most
    `MOST_SIZES` files, evenly spread; of images in memory it is a hash of their pixels. The images
    of each class are counted, where there are no more than `MOST_CLASSES`.

    Args:
        source: the images.
        of_bytes: add a hash of the content of all image files, which reads them all.

    >>> from lbaccel.data.sources import open_source
    >>> found = identity_of(open_source("digits"))
    >>> found["num_train"], found["num_val"], found["num_classes"]
    (1438, 359, 10)
    """
    digest = hashlib.sha256()
    for images in (source.train, source.val):
        for part in _parts(images):
            digest.update(part)
    found: dict[str, Any] = {
        "num_train": len(source.train),
        "num_val": len(source.val),
        "num_classes": len(source.train.classes),
        "fingerprint": digest.hexdigest()[:32],
    }
    if len(source.train.classes) <= MOST_CLASSES:
        found["images_of"] = _images_of(source)
    if of_bytes:
        found["bytes"] = _digest_of_bytes(source)
    return found


def check_identity(source: Source, before: Mapping[str, Any] | None, *, data: str) -> None:
    """Stop where the images are not those that the run began with; None knows of none.

    Raises:
        InputError: what differs.
    """
    differing = differences(source, before)
    if differing is not None:
        raise InputError(
            f"--data {data} holds other images than the run began with: {differing}. A resume goes "
            "on with the same ones, at any path. Restore them, or start a new run from the weights "
            "with --checkpoint."
        )


def differences(source: Source, before: Mapping[str, Any] | None) -> str | None:
    """The images against those of an identity, in words; None where they are the same.

    Args:
        source: the images.
        before: of `identity_of`; None knows of none.
    """
    if before is None:
        return None
    now = identity_of(source, of_bytes="bytes" in before)
    if all(now.get(key) == value for key, value in before.items()):  # an older run has fewer
        return None
    told = [
        f"{now[key]} {name} in place of {before.get(key)}"
        for key, name in (
            ("num_train", "training images"),
            ("num_val", "validation images"),
            ("num_classes", "classes"),
        )
        if now[key] != before.get(key)
    ]
    told += _classes_told(now.get("images_of"), before.get("images_of"))
    if not told and now["fingerprint"] == before.get("fingerprint"):
        told = ["other bytes in files of the same names and sizes"]
    return ", ".join(told) or "other names, labels or sizes of files"


def _images_of(source: Source) -> dict[str, int]:
    classes = source.train.classes
    counted: Counter[int] = Counter()
    for images in (source.train, source.val):
        labels = images.labels
        counted.update(labels.tolist() if isinstance(labels, torch.Tensor) else labels)
    return {name: counted[label] for label, name in enumerate(classes)}


def _classes_told(now: Any, before: Any) -> list[str]:
    """The changes in the classes, at most five of them."""
    if not isinstance(now, Mapping) or not isinstance(before, Mapping) or now == before:
        return []
    told = [f"class {name!r} is gone" for name in before if name not in now]
    told += [f"class {name!r} is new" for name in now if name not in before]
    told += [
        f"{now[name]} images of {name!r} in place of {count}"
        for name, count in before.items()
        if name in now and now[name] != count
    ]
    return [*told[:5], *([f"{len(told) - 5} more"] if len(told) > 5 else [])]


def _digest_of_bytes(source: Source) -> str:
    digest = hashlib.sha256()
    for images in (source.train, source.val):
        if isinstance(images, ImageArray):
            for part in _parts(images):
                digest.update(part)
            continue
        if isinstance(images.read, HubImages):
            for row in images.samples:
                digest.update(images.read.data_of(row) + b"\0end\0")
        for path in _paths(images):
            with reading(path), path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
            digest.update(b"\0end\0")
    return digest.hexdigest()[:32]


def _paths(images: ImageFiles) -> Iterator[Path]:
    """The files that hold these images; those that are drawn, or lie in a cache, have none."""
    read: Any = images.read
    if isinstance(read, RowImages):
        yield from map(Path, read.files)
    elif isinstance(read, TarImages):
        yield Path(read.path)
    elif (root := folder_of(images)) is not None:
        yield from (root / name for name in images.samples)


def _parts(images: ImageArray | ImageFiles) -> Iterator[bytes | memoryview]:
    yield repr(images.classes).encode()
    if isinstance(images, ImageArray):
        for tensor in (images.images, images.labels):
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data  # no copy
        return
    for name, label in zip(images.names, images.labels, strict=True):
        yield f"{name}\0{label}\n".encode("utf-8", "surrogateescape")  # a name may be no UTF-8
    yield repr(list(_sizes(images))).encode()


def _sizes(images: ImageFiles) -> Iterator[int]:
    read: Any = images.read
    if isinstance(read, HubImages):
        some = images.samples[:: max(1, len(images) // MOST_READ)]
        yield from (len(read.data_of(row)) for row in some)
    every = 1 if folder_of(images) is None else max(1, len(images) // MOST_SIZES)
    for path in islice(_paths(images), 0, None, every):
        yield path.stat().st_size if path.exists() else -1  # a reader says so, when it comes
