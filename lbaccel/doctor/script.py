"""A training script as its syntax tree: which calls it makes, with what, and where. Never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, reading


@dataclass(frozen=True)
class Call:
    """One call: its dotted name as written, its arguments, its line."""

    name: str
    node: ast.Call

    @property
    def line(self) -> int:
        """Where it starts."""
        return self.node.lineno

    @property
    def last(self) -> str:
        """The name after the last dot."""
        return self.name.split(".")[-1]

    @property
    def receiver(self) -> str:
        """The name before the last dot."""
        return ".".join(self.name.split(".")[:-1])

    def keyword(self, name: str) -> Any:
        """A keyword's literal value; `...` where it is an expression, None where it is left out."""
        for keyword in self.node.keywords:
            if keyword.arg == name:
                return literal(keyword.value)
        return None

    @property
    def argument_names(self) -> list[str]:
        """Plain variables among the positional arguments."""
        return [argument.id for argument in self.node.args if isinstance(argument, ast.Name)]


@dataclass(frozen=True)
class Script:
    """A script's tree and the questions that checks ask of it."""

    path: str
    tree: ast.Module

    @cached_property
    def calls(self) -> list[Call]:
        """Every call, in order of lines."""
        found = [
            Call(dotted(node.func), node)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call)
        ]
        return sorted(found, key=lambda call: call.line)

    def calls_of(self, *names: str) -> list[Call]:
        """Calls whose last name is one of these."""
        return [call for call in self.calls if call.last in names]

    @cached_property
    def made_by(self) -> dict[str, Call]:
        """Variable -> the call that it was first bound to."""
        found: dict[str, Call] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, Call(dotted(node.value.func), node.value))
        return found

    def on_accelerator(self, *methods: str) -> list[Call]:
        """Calls of these methods on an Accelerator."""
        named = {name for name, call in self.made_by.items() if call.last == "Accelerator"}
        named |= {"accelerator", "self.accelerator"}
        return [call for call in self.calls_of(*methods) if call.receiver in named]

    @property
    def uses_lbaccel(self) -> bool:
        """Whether its updates are lbaccel's."""
        return bool(self.calls_of("LargeBatch"))

    @property
    def accumulation_steps(self) -> Any:
        """The argument of Accelerator: a number, `...` for an expression, None without one."""
        for call in self.calls_of("Accelerator", "GradientAccumulationPlugin"):
            name = "num_steps" if call.last != "Accelerator" else "gradient_accumulation_steps"
            if call.keyword(name) is not None:
                return call.keyword(name)
        return None

    @property
    def accumulates(self) -> bool:
        """Whether an update has, or may have, several micro-batches."""
        return self.accumulation_steps not in (None, 1) or bool(self.on_accelerator("accumulate"))

    @property
    def model_name(self) -> str | None:
        """The timm model, where its name is written out."""
        for call in self.calls_of("create_model"):
            if call.node.args and isinstance(literal(call.node.args[0]), str):
                return literal(call.node.args[0])
        return None

    def assigned(self, name: str) -> Iterator[tuple[int, Any]]:
        """(line, value) of each assignment to a dotted name or a key such as os.environ[KEY]."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if dotted(target) == name:
                        yield node.lineno, literal(node.value)


def read_script(path: Path) -> Script:
    """Parse a script.

    Raises:
        InputError: no file, or no Python.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file. Give the training script, such as train.py.")
    with reading(path):
        try:
            return Script(str(path), ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{path} is no Python that can be read: {error}.") from error


def dotted(node: ast.AST) -> str:
    """A name as written: a.b.c, or os.environ[KEY]; "" for anything else.

    >>> dotted(ast.parse("a.b(1)").body[0].value.func)
    'a.b'
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return f"{dotted(node.value)}[{node.slice.value}]"
    return ""


def literal(node: ast.AST) -> Any:
    """The value of a literal; `...` for an expression."""
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except ValueError:
        return ...
