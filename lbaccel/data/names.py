"""The names of many images in one buffer, in place of a Python object a name."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

_AT_ONCE = 4096  # names of an iteration that exist as Python strings at a time
_CODEC = ("utf-8", "surrogatepass")  # "surrogateescape" has no inverse for some strings
_SHOWN = 3


class Names(Sequence[str]):
    """Strings as a tuple holds them, in one Arrow array of bytes and 64-bit offsets.

    A string takes its bytes and 8 more; Python's own take 49 more, a pointer and padding. The
    array is one object, so a loader worker that was forked shares its pages: reading a Python
    string writes its reference count, which copies the page. A pickle is the buffers.

    Any string comes back as it was, also one whose surrogates stand for bytes that are no UTF-8
    (PEP 383), as in file names of old disks.

    A slice, and `take`, are `Names` too. Equal are `Names`, or a tuple, of the same strings.

    >>> names = Names(["rose/1.jpg", "rose/2.jpg", "tulip/1.jpg"])
    >>> names[1], len(names), names[-1:] == ("tulip/1.jpg",), names.take([2, 0])
    ('rose/2.jpg', 3, True, Names of 2: 'tulip/1.jpg', 'rose/1.jpg')
    """

    def __init__(self, names: Iterable[str]) -> None:
        data, ends = bytearray(), array("q", [0])
        for name in names:
            data += name.encode(*_CODEC)
            ends.append(len(data))
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
        self._encoded: Any = pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, buffers)

    def take(self, rows: ArrayLike) -> Names:
        """Those at these places, in this order; no Python string is made.

        Raises:
            IndexError: there is no such place.
        """
        places = np.asarray(rows, np.int64)
        if (places < 0).any():  # from the end, as in a tuple
            places = np.where(places < 0, places + len(self), places)
        taken = Names(())
        taken._encoded = self._encoded.take(pa.array(places, pa.int64()))
        return taken

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        return _decoded(self._encoded[operator.index(index)].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            yield from map(_decoded, self._encoded.slice(start, _AT_ONCE).to_pylist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._encoded.equals(other._encoded)
        if isinstance(other, tuple):
            return len(self) == len(other) and all(map(operator.eq, self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # a tuple's would need all strings

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:_SHOWN]))
        return f"Names of {len(self)}: {shown}{', ...' * (len(self) > _SHOWN)}"


def _decoded(name: bytes) -> str:
    return name.decode(*_CODEC)
