"""The images in the rows of parquet files, read a row group or a small batch at a time."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lbaccel.data.images import decode_image
from lbaccel.data.parquet_bounds import batches
from lbaccel.errors import InputError
from lbaccel.text import one_line

MAX_SIDE = 64  # pixels: larger images stay in the files
MAX_ARRAY_BYTES = 4 * 2**30  # a larger set stays in the files
CACHE_BYTES = 256 * 2**20  # of encoded images, for each process
ROW_RULE = "(rows are counted from 0)"


@contextmanager
def opened(path: Path | str) -> Iterator[pq.ParquetFile]:
    """The parquet file at this path.

    Raises:
        InputError: it is absent or broken.
    """
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} can't be read as a parquet file: {error}. Fetch it again."
        ) from error


@dataclass(frozen=True, eq=False)
class RowImages:
    """The image in a row of several parquet files; row groups are read when they are needed.

    Args:
        files: paths of the files, whose rows are numbered through.
        column: the image column.
        groups: for each row group its first row, its file, its number there, and its first row
            there.
        num_rows: in all files.
        exif_orientation: as of `decode_image`.
    """

    files: tuple[str, ...]
    column: str
    groups: tuple[tuple[int, int, int, int], ...]
    num_rows: int
    exif_orientation: bool = True
    _cache: OrderedDict[int, pa.ChunkedArray] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # each process reads for itself

    def __call__(self, row: int) -> Image.Image:
        """The image in this row, as RGB."""
        return self.decode(row, self._bytes(row))

    def where(self, row: int) -> str:
        """File and row, for messages."""
        file, in_file = self._place(row)
        return f"{one_line(str(file))}, row {in_file} {ROW_RULE}"

    def name_of(self, row: int) -> str:
        """File without its folder, and row; the files of a set are in one folder."""
        file, in_file = self._place(row)
        return f"{file.name}, row {in_file}"

    def data_of(self, row: int) -> bytes:
        """The encoded image of this row; nothing where it has none."""
        return self._bytes(row) or b""

    def decode(self, row: int, data: bytes | None) -> Image.Image:
        """These bytes of this row as an image.

        Raises:
            InputError: there are none, or they are no image.
        """
        if data is None:
            raise InputError(f"{self.where(row)} has no bytes: the file must hold the images.")
        where = partial(self.where, row)  # a name a row would take a fifth of the time
        return decode_image(io.BytesIO(data), where, exif_orientation=self.exif_orientation)

    def encoded(self) -> Iterator[tuple[int, bytes | None]]:
        """Rows and their bytes, in order."""
        row = 0
        for path in self.files:
            with opened(path) as file:
                every = range(file.num_row_groups)
                for batch in batches(file, path, column=f"{self.column}.bytes", groups=every):
                    for data in _encoded(batch.column(0)).to_pylist():
                        yield row, data
                        row += 1

    def _place(self, row: int) -> tuple[Path, int]:
        first, file, _, first_in_file = self.groups[self._group_of(row)]
        return Path(self.files[file]), row - first + first_in_file

    def _bytes(self, row: int) -> bytes | None:
        group = self._group_of(row)
        return self._read(group)[row - self.groups[group][0]].as_py()

    def _group_of(self, row: int) -> int:
        return bisect_right(self.groups, row, key=lambda group: group[0]) - 1

    def _read(self, group: int) -> pa.ChunkedArray:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        _, number, in_file, _ = self.groups[group]
        with opened(self.files[number]) as file:
            name = self.files[number]
            found = list(batches(file, name, column=f"{self.column}.bytes", groups=[in_file]))
        self._cache[group] = _encoded(pa.Table.from_batches(found).column(0))
        while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return self._cache[group]


def _encoded(column: Any) -> Any:
    return pc.struct_field(column, "bytes")  # type: ignore[attr-defined]  # made at import


def decode_rows(images: RowImages, rows: NDArray[np.int64]) -> Tensor | None:
    """These rows (ascending) as bytes [n, 3, H, W]; None if they are large, many or of two sizes.

    Raises:
        InputError: an image is broken; the text names its file and row.
    """
    pixels: NDArray[np.uint8] | None = None
    wanted = np.full(images.num_rows, -1)
    wanted[rows] = np.arange(len(rows))
    for (row, data), place in zip(images.encoded(), wanted.tolist(), strict=True):
        if place < 0:
            continue
        image = images.decode(row, data)
        shape = (3, image.height, image.width)
        if pixels is None:
            if max(shape) > MAX_SIDE or len(rows) * np.prod(shape) > MAX_ARRAY_BYTES:
                return None
            pixels = np.empty((len(rows), *shape), dtype=np.uint8)
        if shape != pixels.shape[1:]:
            return None
        pixels[place] = np.asarray(image).transpose(2, 0, 1)
    return None if pixels is None else torch.from_numpy(pixels)
