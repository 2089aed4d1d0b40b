"""One setting of the recipe, and what turns its text, or YAML, to a value (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def switch(text: Any) -> bool:
    """True or False, from text or YAML."""
    if isinstance(text, bool):
        return text
    if str(text).lower() in ("true", "yes", "on", "1"):
        return True
    if str(text).lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false")


def numbers(text: Any) -> tuple[float, ...]:
    """Floats, from '0.5 0.5', '0.5,0.5', a list or one number."""
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(float(p) for p in (parts if isinstance(parts, (list, tuple)) else [parts]))


def words(text: Any) -> tuple[str, ...]:
    """Words, from 'a b', 'a,b' or a list."""
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(str(p) for p in parts)


def whole(text: Any) -> int:
    """A whole number; 2.5 and true are none."""
    if isinstance(text, bool) or (isinstance(text, float) and not text.is_integer()):
        raise ValueError("a whole number")
    return int(text)


def group_samples(text: Any) -> int | str:
    """A whole number or 'frozen'."""
    return "frozen" if text == "frozen" else whole(text)


def samples_or_auto(text: Any) -> int | str:
    """A whole number or 'auto'."""
    return "auto" if text == "auto" else whole(text)


def start_rate(text: Any) -> float | str:
    """'reference', 'zero' or a learning rate."""
    return text if text in ("reference", "zero") else float(text)


@dataclass(frozen=True)
class Option:
    """One setting: its flag is `--name` with dashes, its YAML key `name`."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    shown: str = ""  # the default in words, where it depends on other settings
    contract: bool = True  # decides the result; the others may differ in a resume
    may_be_none: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "may_be_none", self.default is None)
