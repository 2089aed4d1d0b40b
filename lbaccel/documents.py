"""YAML and JSON of unknown origin: read within bounds on bytes, values and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError, reading

MOST_YAML_BYTES = 2**20  # its parser needs about 10 s a MiB
MOST_BYTES = 32 * 2**20  # of JSON and other text
MOST_VALUES = 100_000  # of YAML, aliases written out; 100 characters of text count as one more
MOST_JSON_VALUES = 2_000_000
MOST_DEPTH = 100
_MOST_DIGITS = 1000  # of a number


class OutOfBounds(InputError):
    """A file that is larger, deeper or of more values than any that lbaccel reads."""


class Malformed(ValueError):
    """Text that is no YAML or no JSON: the reason in one line, for the sentence of the caller."""

    def __init__(self, error: Exception) -> None:
        super().__init__(" ".join(str(error).split())[:300] or type(error).__name__)


def text_of(path: Path, *, most: int = MOST_BYTES) -> str:
    """The text of a file of at most `most` bytes.

    Raises:
        CannotRead: the system refuses.
        OutOfBounds: the file is larger.
        Malformed: its bytes are no UTF-8.
    """
    with reading(path), path.open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise _too("large", path, f"more than {most:,} bytes", f"{most:,} bytes")
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(error) from error


def yaml_in(path: Path) -> Any:
    """The value in a YAML file, of plain types only.

    Raises:
        CannotRead: the system refuses.
        OutOfBounds: more than 1 MiB, 100 levels, or 100,000 values once its aliases are written
            out.
        Malformed: it is no YAML.
    """
    return yaml_of(text_of(path, most=MOST_YAML_BYTES), path)


def json_in(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CannotRead: the system refuses.
        OutOfBounds: more than 32 MiB, 100 levels or 2,000,000 values.
        Malformed: it is no JSON.
    """
    return json_of(text_of(path), path)


def yaml_of(text: str, where: Path | str) -> Any:
    """The value that a YAML text holds; `where` names the text in errors.

    Raises:
        OutOfBounds, Malformed: as `yaml_in`.

    >>> yaml_of("epochs: 3", "c.yaml")
    {'epochs': 3}
    >>> yaml_of("a: &a [*a]", "c.yaml")
    Traceback (most recent call last):
    lbaccel.documents.OutOfBounds: c.yaml is too deep: one of its values holds itself; at most 100
    levels are read. Give a smaller file.
    """
    if len(text) > MOST_YAML_BYTES:
        raise _too("large", where, f"{len(text):,} characters", f"{MOST_YAML_BYTES:,} bytes")
    try:
        loader = yaml.SafeLoader(text)  # which reads the text at once
    except yaml.YAMLError as error:
        raise Malformed(error) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, where, sizes={}, above=())
        return loader.construct_document(node)
    except RecursionError:
        raise _too_deep(where, f"more than {MOST_DEPTH} levels") from None
    except OutOfBounds:
        raise
    except yaml.YAMLError as error:
        raise Malformed(error) from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # the constructors of numbers, dates and truth values check little
        raise Malformed(error) from error
    finally:
        loader.dispose()


def json_of(text: str | bytes, where: Path | str) -> Any:
    """The value that a JSON text holds; `where` names the text in errors.

    Raises:
        OutOfBounds, Malformed: as `json_in`.

    >>> json_of("[" * 100_000, "c.json")
    Traceback (most recent call last):
    lbaccel.documents.OutOfBounds: c.json is too deep: more than 100 levels; at most 100 levels are
    read. Give a smaller file.
    """
    if len(text) > MOST_BYTES:
        raise _too("large", where, f"{len(text):,} characters", f"{MOST_BYTES:,} bytes")
    try:
        content = json.loads(text)
    except RecursionError:
        raise _too_deep(where, f"more than {MOST_DEPTH} levels") from None
    except ValueError as error:
        raise Malformed(error) from error
    level, count = [content], 1
    for _ in range(MOST_DEPTH + 1):
        level = [item for value in level for item in _held(value)]
        count += len(level)
        if count > MOST_JSON_VALUES:
            most = f"{MOST_JSON_VALUES:,} values"
            raise _too("large", where, f"more than {most}", most)
        if not level:
            return content
    raise _too_deep(where, f"more than {MOST_DEPTH} levels")


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _measure(
    node: yaml.Node, where: Path | str, *, sizes: dict[int, tuple[int, int]], above: tuple[int, ...]
) -> tuple[int, int]:
    """Values and levels of a node with its aliases written out; each node is measured once."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above:
        raise _too_deep(where, "one of its values holds itself")
    if len(above) > MOST_DEPTH:
        raise _too_deep(where, f"more than {MOST_DEPTH} levels")
    count, levels = 1, 0
    if isinstance(node, yaml.ScalarNode):
        count += len(node.value) // 100
        number = node.tag.rpartition(":")[2] in ("int", "float")
        if number and len(node.value) > _MOST_DIGITS:
            raise _too("large", where, f"a number of {len(node.value):,} digits", "1,000 digits")
    else:
        for inner in _inside(node):
            values, deeper = _measure(inner, where, sizes=sizes, above=(*above, id(node)))
            count, levels = count + values, max(levels, deeper + 1)
    if count > MOST_VALUES:
        most = f"{MOST_VALUES:,} values"
        raise _too("large", where, f"more than {most} once its aliases are written out", most)
    if levels > MOST_DEPTH:
        raise _too_deep(where, f"more than {MOST_DEPTH} levels")
    sizes[id(node)] = count, levels
    return count, levels


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value:
        if isinstance(node, yaml.MappingNode):
            yield from item
        else:
            yield item


def _too_deep(where: Path | str, found: str) -> OutOfBounds:
    return _too("deep", where, found, f"{MOST_DEPTH} levels")


def _too(word: str, where: Path | str, found: str, most: str) -> OutOfBounds:
    return OutOfBounds(
        f"{where} is too {word}: {found}; at most {most} are read. Give a smaller file."
    )
