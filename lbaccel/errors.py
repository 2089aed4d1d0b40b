"""The two errors that the command line prints without a traceback, and checks that raise them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence


class InputError(ValueError):
    """What the user gave cannot be done (exit code 2): what was given, the rule, what to type."""


class RunFailed(RuntimeError):
    """The run could not go on (exit code 1): where it stood, and what was kept."""


class Diverged(RunFailed):
    """The loss or its gradient is not finite, on all ranks; weights are as before the update."""


class RankFailed(RunFailed):
    """A `RunFailed` that only this rank knows of: it says so itself, whichever rank it is."""


def check_whole(name: str, value: object) -> None:
    """Stop at anything but a whole number of at least 1.

    Raises:
        InputError: the value is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is not a whole number of at least 1. Use {name} >= 1.")


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
    raise InputError(f"{name}={value!r} is not one of {known}.{hint}")


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
        raise InputError(f"{name}={value!r} is not a finite number {rule}. Use {hint}.")
