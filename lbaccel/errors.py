"""The two errors that the command line prints without a traceback, and checks that raise them."""

from __future__ import annotations

import difflib
import errno
import math
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# no file of this disk, or no more of it: a sentence says so, and a traceback would not help
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class InputError(ValueError):
    """A request that cannot be met (exit code 2): the value given, the rule, the line to type."""


class CannotRead(InputError):
    """The system refuses to read a file that may be whole: never a reason to pass it over."""


class RunFailed(RuntimeError):
    """The run could not go on (exit code 1): where it stood, and what was kept."""


class Diverged(RunFailed):
    """The loss or its gradient is not finite, on all ranks; weights are as before the update."""


class RankFailed(RunFailed):
    """A `RunFailed` that only this rank knows of: it says so itself, whichever rank it is."""


class _Short(reprlib.Repr):
    """Python's `repr`, cut while it is made: a value may be larger than memory once written."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4
        self.maxstring, self.maxlong = 80, 40

    def repr_int(self, x: int, level: int) -> str:
        """A number; only its bits where its digits would be many."""
        return (
            super().repr_int(x, level)
            if x.bit_length() <= 4000
            else "<a number of " + (f"{x.bit_length():,} bits>")
        )


def brief(value: object) -> str:
    """`repr(value)` for an error text, at most about 200 characters, whatever the value holds.

    >>> brief("linaer"), brief(list(range(100)))
    ("'linaer'", '[0, 1, 2, 3, ...]')
    """
    text = _Short().repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Missing:
    """The default of an argument that must be given, so that its absence is a sentence."""

    def __repr__(self) -> str:
        return "<required>"


MISSING: Any = _Missing()


def kind_of(value: object) -> str:
    """A value of the wrong kind in a sentence: plain values as they are, objects by their class.

    >>> kind_of("cpu"), kind_of([1]), kind_of(list), kind_of(MISSING)
    ("'cpu'", 'a list', 'the class list', 'nothing')
    """
    if value is MISSING:
        return "nothing"
    if value is None or isinstance(value, (bool, int, float, str)):
        return brief(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def check_whole(name: str, value: object) -> None:
    """Stop at anything but a whole number of at least 1.

    Raises:
        InputError: the value is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{name}={brief(value)} is not a whole number of at least 1. Use {name} >= 1."
        )


def whole_number(value: Any) -> int | None:
    """A whole number of Python, numpy or torch as an int; None for all else, True and False too."""
    try:
        return None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        return None


def check_seed(name: str, value: Any) -> int:
    """Stop at anything but a whole number from 0 to 2^64 - 1: a draw is a hash of these 64 bits.

    Raises:
        InputError: a fraction, a truth value, text, or a number out of the bounds.

    >>> check_seed("seed", 0.5)
    Traceback (most recent call last):
    lbaccel.errors.InputError: seed=0.5 is not a whole number from 0 to 2^64 - 1. Use seed=0.
    """
    seed = whole_number(value)
    if seed is None or not 0 <= seed < 2**64:
        raise InputError(
            f"{name}={value!r} is not a whole number from 0 to 2^64 - 1. Use {name}=0."
        )
    return seed


def check_choice(name: str, value: str, *, choices: Sequence[str]) -> None:
    """Stop at a value that is none of `choices`, naming the nearest.

    Raises:
        InputError: `value` is not in `choices`.

    >>> check_choice("rule", "linaer", choices=("linear", "sqrt"))
    Traceback (most recent call last):
    lbaccel.errors.InputError: rule='linaer' is not one of 'linear', 'sqrt'. Use rule='linear'.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    known = ", ".join(repr(c) for c in choices)
    hint = f" Use {name}={near[0]!r}." if near else " Use one of these."
    raise InputError(f"{name}={brief(value)} is not one of {known}.{hint}")


def check_number(name: str, value: float, *, zero: bool = False, at_most: float = math.inf) -> None:
    """Stop at anything but a finite number above 0 (from 0 on, with `zero`) and up to `at_most`.

    Raises:
        InputError: text, a truth value, infinity, nan, or a number out of the bounds.

    >>> check_number("base_lr", -0.1)
    Traceback (most recent call last):
    lbaccel.errors.InputError: base_lr=-0.1 is not a finite number above 0. Use base_lr > 0.
    """
    try:
        good = not isinstance(value, (bool, str)) and math.isfinite(value)
    except (TypeError, OverflowError):
        good = False
    if not good or value < 0 or value > at_most or (value == 0 and not zero):
        rule, hint = ("of at least 0", f"{name} >= 0") if zero else ("above 0", f"{name} > 0")
        if at_most < math.inf:
            rule += f" and at most {at_most:.6g}"
            hint += f", {name} <= {at_most:.6g}"
        raise InputError(f"{name}={brief(value)} is not a finite number {rule}. Use {hint}.")


class ForeignState(InputError):
    """A state to load that is of something else."""


def check_state(whose: str, state: Any, *names: str) -> None:
    """Stop at a state to load that is not one of `whose` own.

    Raises:
        ForeignState: no mapping, or one without these names.

    >>> check_state("loader", {"epoch": 3}, "next_update")
    Traceback (most recent call last):
    lbaccel.errors.ForeignState: loader.load_state_dict() got a dict without 'next_update'. Give
    what loader.state_dict() returned.
    """
    missing = [name for name in names if not isinstance(state, Mapping) or name not in state]
    if missing:
        raise ForeignState(
            f"{whose}.load_state_dict() got {kind_of(state)} without {missing[0]!r}. Give what "
            f"{whose}.state_dict() returned."
        )


def told(error: Exception) -> Exception:
    """Mark an error that every rank has heard of, so that the first rank alone prints it.

    >>> is_told(told(KeyError("k"))), is_told(KeyError("k"))
    (True, False)
    """
    vars(error)["told"] = True
    return error


def is_told(error: BaseException) -> bool:
    """Whether every rank has heard of this error."""
    return bool(vars(error).get("told"))


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """A block that reads `path`: where the system refuses, the path and its reason are the error.

    Raises:
        CannotRead: in place of an OSError of the block; it names the file that the system names.

    >>> with reading("absent.yaml"):
    ...     _ = open("absent.yaml")
    Traceback (most recent call last):
    lbaccel.errors.CannotRead: absent.yaml can't be read: No such file or directory. Give a path
    that can be read.
    """
    try:
        yield
    except OSError as error:
        raise CannotRead(
            f"{error.filename or path} can't be read: {error.strerror or error}. "
            "Give a path that can be read."
        ) from error


def is_of_the_disk(error: OSError) -> bool:
    """Whether the disk is full or refuses: an end that needs no traceback."""
    return error.errno in (*_FULL, *_REFUSED)


def way_out(error: Exception, elsewhere: str) -> str:
    """The sentence that follows an error of writing: space, where that can be the reason.

    Args:
        error: a library's own error, or an OSError.
        elsewhere: where else to write, such as "give another --output".

    >>> way_out(OSError(errno.ENOSPC, "No space left on device"), "give another --output")
    'Free some space, or give another --output.'
    >>> way_out(OSError(errno.EACCES, "Permission denied"), "give another --output")
    'Make the place readable and writable, or give another --output.'
    """
    refused = isinstance(error, OSError) and error.errno in _REFUSED
    first = "Make the place readable and writable" if refused else "Free some space"
    return f"{first}, or {elsewhere}."
