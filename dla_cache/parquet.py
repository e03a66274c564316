"""Tables as the bytes of Parquet files, read and written by the calling thread alone."""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    """The same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def from_parquet(content: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a file, or in a map of them.

    Without Arrow's threads: now and then one is alive when the interpreter ends, and aborts a
    process that has done its work (apache/arrow#34314, #50482). `pq.read_table` always has them.

    Args:
        columns: only these; None for all.

    Raises:
        ValueError: if the bytes are no Parquet file, or it lacks a column.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)), pre_buffer=False)
        lacking = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if lacking:
            raise ValueError(f"it has no column `{lacking[0]}`")
        return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no Parquet file: {error}") from error
