"""`--class-weights`: a weight for each class, from the training labels, a file, or a run before."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lbaccel.documents import Malformed, text_of, yaml_in
from lbaccel.errors import InputError, brief
from lbaccel.text import printable

BALANCED = "balanced"
FLAG = "--class-weights"
Weights = tuple[float, ...]


def weights_of(
    asked: str | Weights | None, *, labels: torch.Tensor, classes: Sequence[str], num_classes: int
) -> Weights | None:
    """The weight of each output, in order; None where none are asked for.

    With N training samples, n_c of them in class c, and C classes, `balanced` is

        w_c = N / (C n_c)

    as `sklearn.utils.class_weight.compute_class_weight("balanced")`. Outputs beyond the classes of
    the data have weight 1.

    Args:
        asked: "balanced", a file, or the weights themselves, as a resume has them.
        labels: of the training samples.
        classes: their names, in order of the labels.
        num_classes: outputs of the network, at least as many as classes.

    Raises:
        InputError: a class without training images, or a file that does not say a finite weight
            above 0 for every class.

    >>> weights_of("balanced", labels=torch.tensor([0, 0, 0, 1]), classes=("a", "b"), num_classes=2)
    (0.6666666666666666, 2.0)
    """
    if asked is None:
        return None
    if isinstance(asked, tuple):
        found = asked
    elif asked == BALANCED:
        found = _balanced(labels, classes)
    else:
        found = _in_order(_read(Path(asked)), classes, where=asked)
    extra = num_classes - len(found)
    if extra < 0 or (isinstance(asked, tuple) and extra):
        raise InputError(
            f"{FLAG} has {len(found)} weights for {num_classes} outputs: give one for each class."
        )
    for name, weight in zip(classes, found, strict=False):
        _check(name, weight, where=str(asked) if isinstance(asked, str) else "the run's")
    return (*found, *[1.0] * extra)


def in_words(weights: Weights, classes: Sequence[str]) -> str:
    """The line that a run prints of its weights: the least and the largest, with their classes."""
    pairs = sorted(zip(weights, classes, strict=False))
    (least, rare), (most, common) = pairs[0], pairs[-1]
    return (
        f"class weights: {least:.4g} ({printable(rare)}) to {most:.4g} ({printable(common)}); "
        "train/loss is the weighted mean, val/loss the plain one"
    )


def check_unchanged(weights: Weights | None, before: Any) -> None:
    """Stop where a file of weights says others than when the run began.

    Args:
        weights: of now.
        before: those of the checkpoint's contract; anything else is not compared.

    Raises:
        InputError: they differ.
    """
    if isinstance(before, list) and weights is not None and tuple(before) != weights:
        raise InputError(
            f"{FLAG}: the file says other weights than when the run began, and they decide its "
            "result. Leave it out, and the run keeps its own, or start a new run without --resume."
        )


def _balanced(labels: torch.Tensor, classes: Sequence[str]) -> Weights:
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise InputError(
                f"{FLAG} {BALANCED}: class {name!r} has no training image, so no weight balances "
                "it. Give it images, or a file of weights."
            )
    return tuple(len(labels) / (len(classes) * count) for count in counts)


def _read(path: Path) -> dict[str, Any]:
    """Class to weight, as the file says it."""
    if path.suffix.lower() == ".csv":
        try:
            text = text_of(path).removeprefix("\ufeff")
            rows = [row for row in csv.reader(text.splitlines()) if row]
        except (Malformed, csv.Error) as error:
            raise InputError(f"{FLAG} {path} is no CSV: {error}.") from error
        wrong = [row for row in rows if len(row) != 2]
        if wrong:
            raise InputError(
                f"{FLAG} {path}: the line {','.join(wrong[0])[:80]!r} is not class,weight."
            )
        if rows and rows[0][1].strip().lower() == "weight":
            rows = rows[1:]
        return _once([(row[0].strip(), row[1]) for row in rows], path)
    try:
        content = yaml_in(path)
    except Malformed as error:
        raise InputError(f"{FLAG} {path} is no YAML: {error}.") from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{FLAG} {path} is no mapping. Write a line a class, such as 'daisy: 2.5', or 'daisy,"
            "2.5' in a .csv file."
        )
    return _once([(str(name), weight) for name, weight in content.items()], path)


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{FLAG} {path} names {twice!r} twice. Leave one out.")
    return found


def _in_order(said: Mapping[str, Any], classes: Sequence[str], *, where: str) -> Weights:
    known = set(classes)
    missing, unknown = [c for c in classes if c not in said], [c for c in said if c not in known]
    if missing or unknown:
        wrong = f"has no weight for {missing[0]!r}" if missing else f"names {unknown[0]!r}"
        raise InputError(
            f"{FLAG} {where} {wrong}, and the data's {len(classes)} classes are "
            f"{', '.join(map(repr, classes[:5]))}{', ...' if len(classes) > 5 else ''}. Name each "
            "of them once."
        )
    return tuple(_number(said[name], name, where) for name in classes)


def _number(value: Any, name: str, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{FLAG} {where}: the weight of {name!r}, {brief(value)}, is no number."
        ) from None


def _check(name: str, weight: float, *, where: str) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(
            f"{FLAG} {where}: the weight of {name!r} is {weight:g}, and must be a finite number "
            "above 0. To leave a class out, leave out its images."
        )
