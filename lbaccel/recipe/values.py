"""One setting of the recipe, and what turns its text, or YAML, to a value (no torch)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbaccel.network_arguments import as_words

_NEAR = 0.8  # share of two short names that is alike, where one is a slip of the other


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


def word_or_numbers(text: Any) -> str | tuple[float, ...]:
    """A word or path from text, floats from a list, as a run's config.yaml has them."""
    return numbers(text) if isinstance(text, (list, tuple)) else str(text)


def flag_of(name: str) -> str:
    """The flag of an option.

    >>> flag_of("base_lr")
    '--base-lr'
    """
    return "--" + name.replace("_", "-")


def spec_of(data: str | os.PathLike[str]) -> str:
    """The value of `--data` for a path of a folder; one that is such a value stays.

    >>> spec_of("photos"), spec_of("parquet:photos")
    ('folder:photos', 'parquet:photos')
    """
    text = os.fspath(data)
    return text if ":" in text and not Path(text).exists() else f"folder:{text}"


def nearest_word(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?' for a value that is one of a few words, or nothing where none is near.

    >>> nearest_word("cosin", ["cosine", "step"])
    ' Did you mean cosine?'
    """
    found = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def nearest_name(name: str, names: Iterable[str]) -> str:
    """' Did you mean ...?' for a flag, a key or a command, or nothing where none is near.

    A name may be one of another tool, of which a wrong guess is worse than none: only its first
    letters, or what is one or two slips of the pen away, is taken for one of ours.

    >>> nearest_name("--gobal-batch-size", ["--global-batch-size", "--val-batch-size"])
    ' Did you mean --global-batch-size?'
    >>> nearest_name("--train-batch-size", ["--min-batch-size", "--val-batch-size"])
    ''
    """
    plain = {other.lstrip("-").replace("_", "-"): other for other in names}
    name = name.lstrip("-").replace("_", "-")
    begun = [other for other in plain if len(name) > 1 and other.startswith(name)]
    near = difflib.get_close_matches(name, plain, n=3)
    found = begun if len(begun) == 1 else [other for other in near if _is_slip(name, other)]
    return f" Did you mean {plain[found[0]]}?" if found else ""


def _is_slip(name: str, other: str) -> bool:
    """Whether one may be the other with letters out of place, or one in five to seven wrong."""
    if sorted(name) == sorted(other):
        return True
    likeness = difflib.SequenceMatcher(None, name, other).ratio()
    near = likeness >= (_NEAR if len(name) < 9 else _NEAR + 0.07)
    return near and abs(len(name) - len(other)) <= max(1, len(name) // 5)


def shown(value: Any) -> str:
    """A value as it is typed.

    >>> shown((30.0, 0.5)), shown(0.1), shown(True)
    ('30 0.5', '0.1', 'true')
    """
    if isinstance(value, (tuple, list)):
        return " ".join(shown(item) for item in value)
    if isinstance(value, Mapping):
        return " ".join(as_words(value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ReadWith:
    """An option is read where another one has a certain value.

    Attributes:
        other: its name.
        holds: whether its value is one with which the option is read.
        use: the advice to somebody who gave the option with another value.
    """

    other: str
    holds: Callable[[Any], bool]
    use: str


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these."""
    return lambda value: value in values


def none_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is none of these."""
    return lambda value: value not in values


def holds(word: str) -> Callable[[Any], bool]:
    """Whether a word is among those of a value."""
    return lambda value: word in value


def is_set(value: Any) -> bool:
    """Whether there is a value at all."""
    return value is not None


SCHEDULED = ReadWith("batch_schedule", is_set, "Add --batch-schedule, such as bsi")


def has_momentum(optimizer: str) -> bool:
    """Whether timm gives an optimizer of this name a momentum; an unknown one is not judged."""
    from timm.optim import get_optimizer_info

    try:
        return get_optimizer_info(optimizer.lower()).has_momentum
    except ValueError:
        return True


@dataclass(frozen=True)
class Option:
    """All that is known of one setting: its flag is `--name` with dashes, its YAML key `name`.

    Attributes:
        parse: text or YAML to a value.
        default: of `Settings`.
        help: of `--help`.
        choices: the only values.
        shown: the default in words, where it depends on other settings.
        contract: it decides the result, so a resume can't change it.
        plan: it says how an update fits this machine.
        length: no part of the contract, and yet of the experiment: it decides how long a run
            trains, or after which updates it is judged.
        over_time: it says how batch and rate change in training, or who measures that; it has no
            part in the loss at given weights.
        of_run: it belongs to the run; else to one start of it, and a resume takes no saved value.
        private: of a machine or an account; an export leaves it out.
        reads_with: what makes it read; one of several is enough.
        neutral: values that ask for nothing, so that they may be given where nothing reads them.
        repeatable: its flag may be typed several times, for a word each.
        says_where: `parse` takes any value as it is and, by `where`, the name for its own errors.
        common: one of the fifteen that most people need, which --help shows; --help all has all.
        before: its value in a run that does not name it, since the option is younger than the run;
            the default where it is not given.
    """

    parse: Callable[..., Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    shown: str = ""
    contract: bool = True
    plan: bool = False
    length: bool = False
    over_time: bool = False
    of_run: bool = True
    private: bool = False
    reads_with: tuple[ReadWith, ...] = ()
    neutral: tuple[Any, ...] = ()
    repeatable: bool = False
    says_where: bool = False
    common: bool = False
    before: Any = None
    name: str = ""
    group: str = ""

    @property
    def may_be_none(self) -> bool:
        """Whether "none" is a value."""
        return self.default is None

    @property
    def flag(self) -> str:
        """As it is typed."""
        return flag_of(self.name)


def option(default: Any, parse: Callable[..., Any], help: str, **known: Any) -> Any:
    """A field of a group: its row; name and group follow from where it stands."""
    return field(default=default, metadata={"row": Option(parse, default, help, **known)})
