"""The kinds of the values that an export takes out of a run's files: a file may be edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lbaccel.data.decode import DECODERS
from lbaccel.errors import InputError
from lbaccel.network_arguments import network_arguments

LARGEST = 4096  # pixels a side, and channels: two such images are run through the network
Kind = tuple[str, Callable[[Any], bool]]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < math.inf and abs(value) <= 1.7e308


def _are_arguments(value: Any) -> bool:
    try:
        return isinstance(value, Mapping) and bool(network_arguments(value))
    except InputError:
        return False


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_number(value[0])
        and isinstance(value[1], str)
    )


WHOLE: Kind = ("a whole number of at least 0", _is_whole)
NUMBER: Kind = ("a finite number", _is_number)
TEXT: Kind = ("text", lambda value: isinstance(value, str))
SWITCH: Kind = ("true or false", lambda value: isinstance(value, bool))
LIST: Kind = ("a list", lambda value: isinstance(value, list))
NAMES: Kind = ("a list of text", lambda v: isinstance(v, list) and all(map(TEXT[1], v)))
MAPPING: Kind = ("a mapping", lambda value: isinstance(value, Mapping))
EXTENSIONS: Kind = (
    "a list of pairs, a number and text",
    lambda value: isinstance(value, list) and all(map(_is_pair, value)),
)
SIZE: Kind = (
    f"a whole number from 1 to {LARGEST}",
    lambda value: _is_whole(value) and 1 <= value <= LARGEST,
)
ABOVE_0: Kind = ("a number above 0", lambda value: _is_number(value) and value > 0)
SETTINGS: dict[str, Kind] = {
    "plan/lr": NUMBER,
    "plan/num_updates": WHOLE,
    "plan/equation": TEXT,
    "plan/segments": LIST,
    "extensions": EXTENSIONS,
}
SUMMED: dict[str, Kind] = {
    "status": TEXT,
    "num_updates": WHOLE,
    "samples_seen": WHOLE,
    "samples_per_second": NUMBER,
    "peak_gib": NUMBER,
    "own_gib": NUMBER,
    "seconds": NUMBER,
}
MACHINE: dict[str, Kind] = {
    "devices": LIST,
    "versions": MAPPING,
    "command": TEXT,
    "git_commit": TEXT,
}
RESUMED: dict[str, Kind] = {"update": WHOLE, "plan": TEXT}
_IMAGES: dict[str, Kind] = {
    "model": TEXT,
    "num_classes": WHOLE,
    "num_channels": SIZE,
    "img_size": SIZE,
    "stem": TEXT,
    "interpolation": TEXT,
    "crop_pct": ABOVE_0,
    "mean": LIST,
    "std": LIST,
}


ARGUMENTS = "model_kwargs"  # of the network, where it has any
_YOUNGER: dict[str, Kind] = {  # runs of before have none
    "exif_orientation": SWITCH,
    "decoder": (" or ".join(DECODERS), lambda value: value in DECODERS),
    ARGUMENTS: ("plain arguments of a network", _are_arguments),
}


def check_kinds(path: Path, found: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Stop at a value of another kind; what is absent or None is left out of the card.

    Raises:
        InputError: it, with the file, its name and the kind that lbaccel writes.
    """
    for name, (words, is_one) in kinds.items():
        value = found.get(name)
        if value is not None and not is_one(value):
            raise InputError(
                f"{path} gives {name}={_short(value)}, and lbaccel writes {words} there: the file "
                "was edited. Mend it, or take another run or checkpoint."
            )


def check_preprocessing(path: Path, pre: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Stop at a `preprocessing.json` whose values are not of their kind, or do not fit together.

    Raises:
        InputError: a value that is missing or of another kind, statistics of another number than
            the channels, or more outputs than any of the weights has.
    """
    absent = [name for name in _IMAGES if pre.get(name) is None]
    if absent:
        raise InputError(
            f"{path} has no {', '.join(absent)}: it was written by another "
            "version. Load the weights with timm.create_model(..., checkpoint_path=...)."
        )
    check_kinds(path, pre, _IMAGES | _YOUNGER)
    for name, kind in (("mean", NUMBER), ("std", ABOVE_0)):
        values: Sequence[Any] = pre[name]
        if len(values) != pre["num_channels"] or not all(map(kind[1], values)):
            raise InputError(
                f"{path} gives {name}={_short(values)}, which is not {kind[0]} for each of the "
                f"{pre['num_channels']} channels: the file was edited. Take another checkpoint."
            )
    widest = max((max(value.shape, default=0) for value in weights.values()), default=0)
    if not 1 <= pre["num_classes"] <= max(1, widest):
        raise InputError(
            f"{path} gives num_classes={pre['num_classes']}, and the weights have at most {widest} "
            "outputs: the file was edited. Take another checkpoint."
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
