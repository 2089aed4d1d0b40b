"""The parser of every command: an error is one sentence, in place of a dump of the usage."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

from lbaccel.errors import InputError, brief
from lbaccel.recipe.other_names import other_name
from lbaccel.recipe.values import nearest_name, nearest_word

# No flag looks so: -inf, -1e3 and -3GiB are values, which a rule then refuses by their flag.
_NEGATIVE = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)
_OPEN = {None: 1, "+": sys.maxsize, "*": sys.maxsize}  # nargs: words that follow a flag
ALL = "all"  # `--help all`


class CommandParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, whose errors are `InputError`s of one line.

    The parsers that `add_subparsers` makes are of this class too.

    Args:
        beside: flags of the same command that another parser reads; the nearest is looked for
            among them too.
        lists: who lists all flags, where that is not this parser's own --help alone.

    Attributes:
        rare: names of arguments that --help leaves out and --help all has.
        below: a text under the help, made where that is shown.

    >>> parser = CommandParser(prog="lbaccel plan")
    >>> _ = parser.add_argument("--model", required=True)
    >>> parser.parse_args(["--modle", "resnet50"])
    Traceback (most recent call last):
    lbaccel.errors.InputError: unknown flag --modle. Did you mean --model? lbaccel plan --help lists
    all of its flags.
    """

    def __init__(
        self, *args: Any, beside: Iterable[str] = (), lists: str = "", **options: Any
    ) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._negative_number_matcher = _NEGATIVE
        self._beside, self._lists = tuple(beside), lists
        self._typed: list[str] = []
        self.rare: set[str] = set()
        self.below: Callable[[], str] = str

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, for flags in the spellings of other tools too.

        `--a_b` is --a-b, `--no-x` is --x=false where x is a switch, `a=b` is --a=b where no
        argument takes it, and a name of `other_names` with the meaning of one of ours is ours. The
        words are kept, so that an error can look at them.
        """
        typed = list(sys.argv[1:] if args is None else args)
        end = typed.index("--") if "--" in typed else len(typed)
        words = typed[:end]
        if self.rare and _asks_for_all(words):
            self._print_message(self.format_help(), sys.stdout)
            self.exit()
        self._typed = [*self._as_declared(self._with_pairs(words)), *typed[end:]]
        return super().parse_known_args(self._typed, namespace)

    def print_help(self, file: Any = None) -> None:
        """The help without what is rare, and who has it all."""
        with self._without_rare():
            text = super().format_help()
        if self.rare:
            more = f"{self.prog} --help {ALL} lists {len(self.rare)} more settings, by group."
            text += f"\n{more}\n"
        self._print_message(text + self.below(), file or sys.stdout)

    def format_help(self) -> str:
        """The whole help."""
        return super().format_help() + self.below()

    @contextmanager
    def _without_rare(self) -> Iterator[None]:
        kept = {action: action.help for action in self._actions if action.dest in self.rare}
        try:
            for action in kept:
                action.help = argparse.SUPPRESS
            yield
        finally:
            for action, text in kept.items():
                action.help = text

    def _with_pairs(self, words: Sequence[str]) -> Iterator[str]:
        """`epochs=3` as --epochs=3, where it is neither a flag's value nor a positional one's."""
        free = [action.nargs for action in self._actions if not action.option_strings]
        if any(nargs is not None for nargs in free):
            yield from words
            return
        positional, values = len(free), 0
        for word in words:
            key, equals, _ = word.partition("=")
            if word.startswith("-") and not _NEGATIVE.match(word):
                flag, has_value, _ = self._declared(word).partition("=")
                action = self._option_string_actions.get(flag)
                values = 0 if has_value or action is None else _values_of(action)
            elif values:
                values -= 1
            elif positional:
                positional -= 1
            elif equals and self._has(f"--{key}"):
                word = f"--{word}"
            yield word

    def _has(self, flag: str) -> bool:
        known, declared = self._known(), flag.replace("_", "-") in self._option_string_actions
        means_else = other_name(f"{flag}=", known=known) is not None
        return not means_else and (declared or other_name(flag, known=known) is not None)

    def _as_declared(self, words: Iterable[str]) -> Iterator[str]:
        """Hugging Face has --bf16, --bf16 True and --bf16 False, of which the last is refused."""
        after_switch = False
        for word, following in pairwise([*words, ""]):
            if after_switch and word.lower() == "true":
                after_switch = False
                continue
            is_flag = word.startswith("-")
            other = other_name(word, known=self._option_string_actions) if is_flag else None
            after_switch = other is not None and bool(other.value)
            yield word if after_switch and following.lower() == "false" else self._declared(word)

    def _declared(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        declared = self._option_string_actions
        if not flag.startswith("-") or flag in declared:
            return word
        dashed = flag.replace("_", "-")
        if dashed in declared:
            return dashed + equals + value
        if dashed.startswith("--no-") and not equals:
            on = f"--{dashed.removeprefix('--no-')}"
            if on in declared and declared[on].nargs == "?" and declared[on].const is True:
                return f"{on}=false"
        other = other_name(flag, known=declared)
        if other is None or not other.ours:
            return word
        if not other.value:
            return other.ours + equals + value
        return f"{other.ours}={other.value}" if value.lower() in ("", "true") else word

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The values of the arguments.

        Raises:
            InputError: an unknown, a missing or an unfit one.
        """
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest, found)
        return found

    def refuse(self, rest: Sequence[str], found: argparse.Namespace | None = None) -> NoReturn:
        """Stop at words that no argument takes, in the name of the subcommand that was chosen.

        Raises:
            InputError: always; the nearest flag is in its text.
        """
        for action in self._actions:
            chosen = getattr(found, action.dest, None)
            if isinstance(action, argparse._SubParsersAction) and chosen in action.choices:
                action.choices[chosen].refuse(rest, found)
        flag = next((word for word in rest if word.startswith("-")), None)
        if flag is not None:
            raise InputError(self._unknown(flag))
        key, equals, value = rest[0].partition("=")
        near = self._meant(key + equals, value) if equals else ""
        raise InputError(
            f"{self.prog} does not read {brief(rest[0])}.{near} {self.prog} --help says what it "
            "reads."
        )

    def error(self, message: str) -> NoReturn:
        """Stop with argparse's message as a sentence.

        Raises:
            InputError: always.
        """
        raise InputError(self._sentence(message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        start = f"{_name(action)}=" if action.option_strings else f"{self.prog}: "
        near = nearest_word(str(value), choices)
        raise InputError(f"{start}{brief(value)} is not one of {', '.join(choices)}.{near}")

    def _sentence(self, message: str) -> str:
        needed = message.partition("the following arguments are required: ")[2]
        if needed:
            return self._missing(needed.split(", "))
        found = re.match(r"argument (?P<name>.+?): (?P<what>.*)", message, re.DOTALL)
        if found is None:
            return f"{message.rstrip('.')}. {self.prog} --help lists all arguments."
        name, what = found["name"].split("/")[-1], found["what"].rstrip(".")
        if what.startswith("expected "):
            return self._without_value(name)
        ignored = what.partition("ignored explicit argument ")[2]
        if ignored:
            return f"{name} takes no value, and is given {ignored[:80]}. Type {name} alone."
        return f"{name}={what}."

    def _unknown(self, word: str) -> str:
        flag, _, value = word.partition("=")
        near = self._meant(flag, value or self._after(word))
        whole = f" {ALL}" if self.rare else ""
        lists = self._lists or f"{self.prog} --help{whole} lists all of its flags."
        return f"unknown flag {_plain(flag)}.{near} {lists}"

    def _meant(self, name: str, value: str) -> str:
        """A sentence on a name that is not ours, with a space before it, or ""."""
        other = other_name(name, known=self._known())
        if other is None:
            return nearest_name(name.removesuffix("="), self._known())
        return f" {other.said(_plain(value) if value else value)}"

    def _after(self, word: str) -> str:
        """The value that follows a flag which no argument has."""
        following = self._typed[self._typed.index(word) + 1 :] if word in self._typed else []
        return following[0] if following and not following[0].startswith("-") else ""

    def _missing(self, names: Sequence[str]) -> str:
        """A required flag that is there with a slip of the pen is named as what was typed."""
        typed = self._typed[: self._typed.index("--")] if "--" in self._typed else self._typed
        for word in typed:
            flag = word.partition("=")[0]
            is_flag = flag.startswith("--") and " " not in word
            if is_flag and flag not in self._flags() and not self._subcommands():
                return self._unknown(flag)
        if self._subcommands():
            return f"{self.prog} needs one of {', '.join(self._subcommands())}. Type one of them."
        needed = " and ".join(self._with_value(name) for name in names)
        return f"{self.prog} needs {needed}. {self.prog} --help describes all arguments."

    def _without_value(self, name: str) -> str:
        """The word that follows may be meant as a value, and begin with a dash."""
        positions = [i for i, word in enumerate(self._typed[:-1]) if word == name]
        following = self._typed[positions[-1] + 1] if positions else ""
        dash = ""
        if following.startswith("-") and following.partition("=")[0] not in self._flags():
            dash = f" A value that begins with a dash is typed as {name}={_plain(following)}."
        return f"{name} has no value. Type {self._with_value(name)}.{dash}"

    def _with_value(self, name: str) -> str:
        """An argument as it is typed, such as '--world-size W'."""
        for action in self._actions:
            if _name(action) == name.split("/")[-1]:
                if not action.option_strings:
                    return str(action.metavar or action.dest)
                values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
                return f"{_name(action)} {action.metavar or values or action.dest.upper()}"
        return name

    def _known(self) -> list[str]:
        return [*self._flags(), *self._beside]

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def _subcommands(self) -> list[str]:
        kind = argparse._SubParsersAction
        return [name for a in self._actions if isinstance(a, kind) for name in a.choices]


def _values_of(action: argparse.Action) -> int:
    if action.dest == "config":  # --config FILE epochs=3: a word of that kind is no file
        return 1
    return action.nargs if isinstance(action.nargs, int) else _OPEN.get(action.nargs, 0)


def _asks_for_all(words: Sequence[str]) -> bool:
    asked = [after for word, after in pairwise([*words, ""]) if word in ("-h", "--help")]
    return "--help-all" in words or ALL in asked


def _name(action: argparse.Action) -> str:
    """The last flag of an argument, which is its long one, or the name of a word."""
    return (
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    )


def _plain(word: str) -> str:
    """A word as it was typed, where it is short and fits a line."""
    return word if re.fullmatch(r"[!-~]{1,60}", word) else brief(word)
