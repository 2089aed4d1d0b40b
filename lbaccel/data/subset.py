"""A part of a set of images, in proportion to its classes: the same for every seed and machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b

from lbaccel.data.images import ImageArray, ImageFiles, taken
from lbaccel.data.opening import Opening, Sets
from lbaccel.errors import InputError

WORDS = {"max_train_samples": "training", "max_val_samples": "validation"}


def limited(sets: Sets, wanted: Opening) -> Sets:
    """The sets with no more images than were wanted; a test set stays whole.

    What is held out for validation was held out of the whole set before: none of it is trained on.

    Raises:
        InputError: see `drawn`.
    """
    train, of_train = _limited(sets.train, wanted.max_train_samples, "max_train_samples")
    val, of_val = _limited(sets.val, wanted.max_val_samples, "max_val_samples")
    return sets._replace(train=train, val=val, how=sets.how + noted(of_train, of_val))


def noted(*parts: str) -> str:
    """Words on what was drawn, behind those on a source; "" where nothing was."""
    told = " and ".join(part for part in parts if part)
    return f"; of {told} images a part was drawn, the same for every seed" if told else ""


def drawn(
    names: Sequence[str | bytes],
    labels: Sequence[int],
    most: int | None,
    *,
    name: str,
) -> tuple[list[int], str]:
    """Positions of `most` samples in ascending order, and in words how many there were.

    Of N samples, n_c of class c, the part has most n_c / N of each class, rounded to whole ones by
    the largest remainders, and at least one; in a class they are those with the smallest hash of
    the name. So neither a seed nor the order of listing plays a part, nor another class.

    Args:
        names: of the samples, or their bytes.
        labels: the class of each.
        most: samples to draw; None draws all.
        name: of the setting, for errors.

    Raises:
        InputError: there are fewer samples, or more classes.

    >>> drawn("abcdefgh", [0] * 6 + [1] * 2, 4, name="max_train_samples")
    ([2, 3, 4, 7], '8 training')
    """
    if most is None or most == len(labels):
        return list(range(len(labels))), ""
    _check(len(labels), len(set(labels)), most, name)
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    keys = [_hash(one) for one in names]
    chosen: list[int] = []
    for label, share in shares({c: len(p) for c, p in members.items()}, most).items():
        chosen += sorted(members[label], key=lambda position: (keys[position], position))[:share]
    return sorted(chosen), f"{len(labels):,} {WORDS[name]}"


def part(
    labels: Sequence[int],
    most: int | None,
    *,
    names: Callable[[], Sequence[str | bytes]],
    name: str,
) -> tuple[list[int], str]:
    """`drawn`, which makes the names only where some samples are left out."""
    whole = most is None or most == len(labels)
    return drawn(() if whole else names(), labels, most, name=name)


def shares(counts: dict[int, int], most: int) -> dict[int, int]:
    """How many of each class, by the largest remainders; none is left out.

    >>> shares({0: 900, 1: 99, 2: 1}, 10)
    {0: 8, 1: 1, 2: 1}
    """
    total = sum(counts.values())
    found = {c: most * n // total for c, n in counts.items()}
    rest = sorted(counts, key=lambda c: (-(most * counts[c] % total), c))
    for c in rest[: most - sum(found.values())]:
        found[c] += 1
    for c in (c for c in sorted(found) if not found[c]):
        largest = max(found, key=lambda other: (found[other], -other))
        found[largest], found[c] = found[largest] - 1, 1
    return found


def _check(there: int, classes: int, most: int, name: str) -> None:
    if most > there:
        raise InputError(
            f"{name}={most}: there are {there:,} {WORDS[name]} images. Give at most so many, or "
            "leave it out to take them all."
        )
    if most < classes:
        raise InputError(
            f"{name}={most} is below the {classes} classes: each needs an image. Give at least "
            f"{classes}."
        )


def _limited(
    images: ImageArray | ImageFiles, most: int | None, name: str
) -> tuple[ImageArray | ImageFiles, str]:
    def names() -> Sequence[str | bytes]:
        if isinstance(images, ImageArray):
            return [one.numpy().tobytes() for one in images.images]
        return _apart(images.names)

    labels = images.labels.tolist() if isinstance(images, ImageArray) else images.labels
    rows, told = part(labels, most, names=names, name=name)
    return (taken(images, rows) if told else images), told


def _apart(names: Sequence[str]) -> list[str]:
    """Names that are not one sample's alone, numbered."""
    often, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}\0{seen[name]}" if often[name] > 1 else name)
    return found


def _hash(name: str | bytes) -> bytes:
    given = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return blake2b(given, digest_size=16, person=b"lbaccel subset").digest()
