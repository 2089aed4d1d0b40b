"""The parser of every command: an error is one sentence, in place of a dump of the usage."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from lbaccel.errors import InputError, brief
from lbaccel.recipe.values import nearest_word

# No flag looks so: -inf, -1e3 and -3GiB are values, which a rule then refuses by their flag.
_NEGATIVE = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)


class CommandParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, whose errors are `InputError`s of one line.

    The parsers that `add_subparsers` makes are of this class too.

    Args:
        beside: flags of the same command that another parser reads; the nearest is looked for
            among them too.
        lists: who lists all flags, where that is not this parser's own --help alone.
        hints: unknown flag -> the sentence in place of the nearest one, with a space before it.

    >>> parser = CommandParser(prog="lbaccel plan")
    >>> _ = parser.add_argument("--model", required=True)
    >>> parser.parse_args(["--modle", "resnet50"])
    Traceback (most recent call last):
    lbaccel.errors.InputError: unknown flag --modle. Did you mean --model? lbaccel plan --help lists
    all of its flags.
    """

    def __init__(
        self,
        *args: Any,
        beside: Iterable[str] = (),
        lists: str = "",
        hints: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._negative_number_matcher = _NEGATIVE
        self._beside, self._hints = tuple(beside), hints or {}
        self._lists = lists or f"{self.prog} --help lists all of its flags."
        self._typed: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, for flags in the spellings of other tools too.

        `--a_b` is --a-b, and `--no-x` is --x=false where x is a switch. The words are kept, so that
        an error can look at them.
        """
        typed = list(sys.argv[1:] if args is None else args)
        end = typed.index("--") if "--" in typed else len(typed)
        self._typed = [self._as_declared(word) for word in typed[:end]] + typed[end:]
        return super().parse_known_args(self._typed, namespace)

    def _as_declared(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        declared = self._option_string_actions
        if not flag.startswith("--") or flag in declared:
            return word
        dashed = flag.replace("_", "-")
        if dashed in declared:
            return dashed + equals + value
        if dashed.startswith("--no-") and not equals:
            on = f"--{dashed.removeprefix('--no-')}"
            if on in declared and declared[on].nargs == "?" and declared[on].const is True:
                return f"{on}=false"
        return word

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
        raise InputError(
            f"{self.prog} does not read {brief(rest[0])}. {self.prog} --help says what it reads."
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
        flag = word.partition("=")[0]
        near = self._hints.get(flag) or nearest_word(flag, [*self._flags(), *self._beside])
        return f"unknown flag {_plain(flag)}.{near} {self._lists}"

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

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def _subcommands(self) -> list[str]:
        kind = argparse._SubParsersAction
        return [name for a in self._actions if isinstance(a, kind) for name in a.choices]


def _name(action: argparse.Action) -> str:
    """The last flag of an argument, which is its long one, or the name of a word."""
    return (
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    )


def _plain(word: str) -> str:
    """A word as it was typed, where it is short and fits a line."""
    return word if re.fullmatch(r"[!-~]{1,60}", word) else brief(word)
