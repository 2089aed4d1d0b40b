"""The lines of `metrics.jsonl`, numbered and with a checksum, and each checked again (no torch)."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbaccel.documents import OutOfBounds, json_of
from lbaccel.errors import reading
from lbaccel.runs.folder import strict_json

CHECK = "check"
_CHECKED = re.compile(rb'^(.*), "check": "(\d{1,18})-([0-9a-f]{8})"\}$', re.DOTALL)
_MOST_UPDATE = 2**53
_MOST_SAID = 20  # sentences on one file
_NUMBERS = ("samples_seen", "epoch", "perf/seconds")


@dataclass(frozen=True)
class Line:
    """One line of the file: its place, its bytes, and its content or the fault of it."""

    place: int  # in the file, from 1
    raw: bytes
    row: dict[str, Any] | None
    number: int | None  # as it was written, from 1; None in lines of before 0.2
    fault: str = ""
    torn: bool = False  # the last one, which a killed process did not write to its end

    @property
    def where(self) -> str:
        """The line in words, with its update where that is known."""
        return f"line {self.place}" + (f" (update {self.row['update']})" if self.row else "")


def numbered(row: Mapping[str, Any], number: int) -> str:
    """A row as the text of line `number`, with a checksum over the rest of the line.

    >>> numbered({"update": 3, "train/loss": 2.5}, 1)
    '{"update": 3, "train/loss": 2.5, "check": "1-ba6b7c78"}'
    """
    text = strict_json(row)
    return f'{text[:-1]}, "{CHECK}": "{number}-{zlib.crc32(text.encode()):08x}"}}'


def read_lines(path: Path) -> list[Line]:
    """All lines of the file; a fault of a line is no error here.

    Raises:
        CannotRead: the system refuses to read the file.
    """
    with reading(path):
        parts = path.read_bytes().split(b"\n")
    last = len(parts)
    return [
        _line(place, raw, ended=place < last)
        for place, raw in enumerate(parts, start=1)
        if raw or place < last  # nothing follows the last newline
    ]


def _line(place: int, raw: bytes, *, ended: bool) -> Line:
    try:
        row = json_of(raw.decode("utf-8"), f"line {place}")
    except (ValueError, OutOfBounds) as error:
        return Line(place, raw, None, None, f"not valid JSON ({error})", torn=not ended)
    fault = _fault(row)
    if fault:
        return Line(place, raw, None, None, fault)
    match = _CHECKED.match(raw.rstrip(b"\r"))
    if match is None:
        said = "its checksum is damaged" if CHECK in row else ""
        return Line(place, raw, row, None, said)
    whole = zlib.crc32(match[1] + b"}") == int(match[3], 16)
    return Line(place, raw, row, int(match[2]), "" if whole else "its checksum does not fit")


def _fault(row: Any) -> str:
    """Why a row can't be used, or nothing."""
    update = row.get("update") if isinstance(row, dict) else None
    if isinstance(update, bool) or not isinstance(update, int):
        return "no integer 'update'"
    if not 0 <= update < _MOST_UPDATE:
        return "its 'update' is no count of updates"
    for name, value in row.items():
        if isinstance(value, int) and abs(value) >= _MOST_UPDATE**2:
            return f"its {name!r} is out of range"
        if name in _NUMBERS and not _counts(value):
            return f"its {name!r} is no number from 0 on"
    return ""


def _counts(value: Any) -> bool:
    if value is None:
        return True
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def content(line: Line) -> dict[str, Any]:
    """The row of a line that can be read, without its checksum."""
    return {name: value for name, value in (line.row or {}).items() if name != CHECK}


def next_number(lines: list[Line]) -> int:
    """The number of the line that is written next."""
    return max([len(lines), *(line.number or 0 for line in lines)], default=0) + 1


def faults(lines: list[Line]) -> list[str]:
    """Sentences on lines that are damaged, missing, there twice or out of order; at most a few.

    A torn last line is none of them: every killed process may leave one.
    """
    found = [*_damaged(lines), *_misplaced(lines), *_doubled(lines)]
    more = len(found) - _MOST_SAID
    return [*found[:_MOST_SAID], *([f"and {more} more faults"] if more > 0 else [])]


def _damaged(lines: list[Line]) -> Iterator[str]:
    begun = False
    for line in lines:
        if line.fault and not line.torn:
            yield f"{line.where}: {line.fault}"
        elif begun and line.number is None and not line.torn:
            yield f"{line.where} was not written by lbaccel, or its checksum was taken away"
        begun = begun or line.number is not None


def _misplaced(lines: list[Line]) -> Iterator[str]:
    """Gaps and doubles in the numbers that the lines were written with."""
    expected: int | None = None  # the number of the next line
    before = "the first line"
    for line in lines:
        if line.number is None or line.fault:
            expected = None if expected is None else expected + 1
        else:
            missing = line.number - (line.place if expected is None else expected)
            if missing > 0:
                many = "a line is" if missing == 1 else f"{missing} lines are"
                yield f"{many} missing between {before} and {line.where}"
            elif missing < 0:
                yield f"{line.where} is there twice or out of order: it follows {before}"
            expected = line.number + 1
        before = line.where


def _doubled(lines: list[Line]) -> Iterator[str]:
    """Updates logged twice in lines without numbers: by a loop that was resumed, or by damage."""
    seen: dict[tuple[int, frozenset[str]], Line] = {}
    for line in lines:
        if line.row is None or line.number is not None:
            continue
        key = (line.row["update"], frozenset(line.row))
        if key in seen:
            yield f"{line.where} is there twice, first in line {seen[key].place}: the later counts"
        seen[key] = line
