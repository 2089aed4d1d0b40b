"""Results kept from process to process in a file of the user's folder of caches.

The file may be deleted at any time, and one that is damaged, or that nobody may write to, is as
good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

from lbaccel.documents import json_in
from lbaccel.errors import InputError
from lbaccel.runs.folder import atomic_write_text

FORM = 2  # of the file

V = TypeVar("V")


class KeptResults(ABC, Generic[V]):
    """Results by what was asked. A subclass says how a result is written.

    Args:
        path: of the file; None: nothing is kept.
        owner: the text that says all that results depend on beside what was asked; those of
            another owner are not taken.
        most: results; the oldest are dropped where there are more.
    """

    def __init__(self, path: Path | None, owner: str, *, most: int) -> None:
        self._path, self._owner, self._most = path, owner, most
        self._results = self._read()
        self._is_saved = True

    def get(self, asked: Any) -> V | None:
        """The result of `asked`, whose `repr` says all that it depends on; None: unknown."""
        found = self._results.get(name_of(asked))
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            return None if found is None else self._from_json(found)
        return None

    def put(self, asked: Any, result: V) -> None:
        """Keep a result; `save` writes it."""
        if self._path is not None:
            self._results[name_of(asked)] = self._to_json(result)
            self._is_saved = False

    def save(self) -> None:
        """Write what is new, beside what other processes have written; a failure is no error."""
        if self._is_saved or self._path is None:
            return
        self._is_saved = True
        results = self._read() | self._results
        results = dict(list(results.items())[-self._most :])
        document = {"form": FORM, "owner": self._owner, "results": results}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._path, json.dumps(document, separators=(",", ":")))

    @abstractmethod
    def _to_json(self, result: V) -> Any:
        """The result as JSON has it."""

    @abstractmethod
    def _from_json(self, value: Any) -> V:
        """The result again; raises ValueError, LookupError or TypeError for what is none."""

    def _read(self) -> dict[str, Any]:
        """The file's results; none where it is damaged, or another owner's."""
        if self._path is None:
            return {}
        with contextlib.suppress(OSError, InputError, ValueError, LookupError, TypeError):
            document = json_in(self._path)
            if (document["form"], document["owner"]) == (FORM, self._owner):
                return dict(document["results"])
        return {}


def name_of(asked: Any) -> str:
    """A short name of whatever has a `repr`."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:32]
