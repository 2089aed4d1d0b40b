"""Parquet columns read a few rows at a time: a small file may decode to more than any memory.

A page compresses a thousandfold, and a dictionary gives each row the same long value: 19 kB can
hold a TiB. Images and file names are compressed already, or short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from lbaccel.errors import InputError

ROWS_AT_ONCE = 32
LEAST_ROWS = 1_000_000  # for a file of any size; above, one for each 8 bytes of it
BYTES_A_ROW = 8
LEAST_BYTES = 64 * 2**20  # decoded, for a column of any size
MOST_GAIN = 100  # decoded bytes for each stored one, above `LEAST_BYTES`


def check_rows(file: pq.ParquetFile, path: str, *, file_bytes: int) -> None:
    """Stop at a file of more rows than images of its size can be.

    Raises:
        InputError: more than 1,000,000 rows, and more than one for each 8 bytes.
    """
    rows, most = file.metadata.num_rows, LEAST_ROWS + file_bytes // BYTES_A_ROW
    if not 0 <= rows <= most:
        raise InputError(
            f"{path} declares {rows:,} rows in {file_bytes:,} bytes; at most {most:,} are read "
            "from a file of this size. Fetch it again, or cut it into several files."
        )


def batches(
    file: pq.ParquetFile, path: str, *, column: str, groups: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """The rows of a column, such as "image.bytes", in these row groups, some at a time.

    Raises:
        InputError: the column of a row group decodes to more than 64 MiB and 100 times its stored
            bytes, by its own figures or while it is read.
    """
    for group in groups:
        stored, declared = _sizes(file.metadata.row_group(group), column)
        most = LEAST_BYTES + MOST_GAIN * stored
        where = f"{path}, row group {group}, column {column}"
        if not 0 <= declared <= most:
            raise InputError(_too_much(where, f"{declared:,}", stored, most))
        decoded = 0
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False
        ):
            decoded += batch.nbytes
            if decoded > most:
                raise InputError(_too_much(where, f"at least {decoded:,}", stored, most))
            yield batch


def _sizes(group: pq.RowGroupMetaData, column: str) -> tuple[int, int]:
    """Stored bytes of a column, and those before compression, both as the file declares them."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    mine = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}.")]
    stored = sum(max(0, c.total_compressed_size) for c in mine)
    return stored, sum(c.total_uncompressed_size for c in mine)


def _too_much(where: str, found: str, stored: int, most: int) -> str:
    return (
        f"{where} decodes to {found} bytes from {stored:,} stored ones; at most {most:,} are read "
        "for this size. Images hardly compress a second time: fetch the file again, or write it "
        "without this repetition."
    )
