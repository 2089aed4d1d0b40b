"""The split into training and validation: by a hash of each sample's name, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from lbaccel.errors import InputError, check_seed

SPLIT = "split by hash"  # how a share is held out, in words


def check_val_fraction(val_fraction: float) -> None:
    """Let a share between 0 and 1 pass.

    Raises:
        InputError: it is not one.
    """
    if not 0 < val_fraction < 1:
        raise InputError(
            f"val_fraction={val_fraction} is not between 0 and 1: it is the share of each class "
            "that is held out for validation. Use a value such as val_fraction=0.2."
        )


def name_hash(seed: int, name: str) -> bytes:
    """16 bytes that depend on the seed and the name alone, on every machine.

    >>> name_hash(0, "roses/1.jpg").hex()[:8], name_hash(1, "roses/1.jpg").hex()[:8]
    ('2b698f64', '063d6431')
    """
    # surrogateescape: file names that are no UTF-8 have a hash as well
    return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def split_by_hash(
    names: Sequence[str],
    labels: Sequence[int],
    *,
    classes: Sequence[str],
    val_fraction: float,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation samples, each in ascending order.

    Of a class of n samples the round(val_fraction * n) with the smallest hash of (seed, name) are
    held out. So neither the order of listing nor another class plays a part, and one more file
    moves at most one other to the other side.

    Args:
        names: one per sample, such as the path below the root, with `/` between its parts.
        labels: the class of each sample, an index into `classes`.
        classes: names of the classes, for the error; one without a sample is passed over.
        val_fraction: the share of each class that is held out, between 0 and 1.
        seed: another seed is another split.

    Raises:
        InputError: `val_fraction` is out of range or leaves one side of a class empty, or a seed is
            no whole number from 0 to 2^64 - 1.

    >>> train, val = split_by_hash("abcdefgh", [0] * 8, classes=["x"], val_fraction=0.25, seed=0)
    >>> train, val
    ([1, 2, 3, 5, 6, 7], [0, 4])
    """
    check_val_fraction(val_fraction)
    seed = check_seed("seed", seed)
    members: list[list[int]] = [[] for _ in classes]
    for position, label in enumerate(labels):
        members[label].append(position)
    val: list[int] = []
    for positions, class_name in zip(members, classes, strict=True):
        size = len(positions)
        num_val = round(val_fraction * size)
        if size and not 0 < num_val < size:
            raise InputError(_too_small(class_name, size, num_val, val_fraction))
        named = {position: names[position] for position in positions}
        positions.sort(key=lambda position: (name_hash(seed, named[position]), named[position]))
        val += positions[:num_val]
    held_out = set(val)
    return [p for p in range(len(labels)) if p not in held_out], sorted(val)


def _too_small(class_name: str, size: int, num_val: int, val_fraction: float) -> str:
    if size == 1:
        action = "Add images of it, or leave the class out."
    else:  # strictly between half a sample and all but half a sample
        low, high = 0.5 / size, 1 - 0.5 / size
        action = (
            f"Add images of it, leave the class out, or use a val_fraction above {low:.3g} and "
            f"below {high:.3g}."
        )
    return (
        f"class {class_name!r} has {size} image{'s' * (size > 1)}: val_fraction={val_fraction} "
        f"holds out {num_val}, and training and validation need at least one each. {action}"
    )
