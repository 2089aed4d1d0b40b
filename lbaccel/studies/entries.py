"""The entries of a study's file as plain values; a wrong one is a sentence (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_name


class Fault(InputError):
    """A sentence without the file's name, which `read_study` puts before it."""


def check_entries(found: Mapping[Any, Any], names: Collection[str], where: str) -> None:
    """Stop at an entry that has no meaning there."""
    for key in found:
        if key not in names:
            near = nearest_name(str(key), names)
            fault(f"{where} has an unknown entry {brief(key)}.{near} Entries: {_listed(names)}.")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def a_mapping(value: Any, where: str) -> Mapping[Any, Any]:
    """The mapping."""
    return value if isinstance(value, Mapping) else _wrong(value, where, "a mapping")


def a_list(value: Any, where: str) -> Sequence[Any]:
    """The list."""
    return value if isinstance(value, (list, tuple)) else _wrong(value, where, "a list")


def a_text(value: Any, where: str) -> str:
    """The text."""
    return value if isinstance(value, str) else _wrong(value, where, "text")


def a_number(value: Any, where: str) -> float:
    """The number, one that a float holds."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e300 else _wrong(value, where, "a number")


def a_count(value: Any, where: str, *, least: int = 1) -> int:
    """The whole number, at least `least`."""
    whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**53
    return value if whole else _wrong(value, where, f"a whole number from {least}")


def a_batch(key: Any, where: str) -> int:
    """A batch size that is the key of a mapping: JSON and lbaccel's own YAML have it as text."""
    is_number = isinstance(key, str) and len(key) < 20 and key.isdecimal()
    return a_count(int(key) if is_number else key, where)


def _wrong(value: Any, where: str, kind: str) -> NoReturn:
    fault(f"{where} is {brief(value)}, and has to be {kind}.")


def fault(sentence: str) -> NoReturn:
    """Stop with a sentence."""
    raise Fault(sentence)
