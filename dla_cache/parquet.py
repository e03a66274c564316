"""Tables as the bytes of Parquet files, read and written by the calling thread alone."""

import io

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    """The same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def from_parquet(content: bytes) -> pa.Table:
    """The table in the bytes of a file.

    Without Arrow's threads: now and then one is alive when the interpreter ends, and aborts a
    process that has done its work (apache/arrow#34314, #50482). `pq.read_table` always has them.

    Raises:
        ValueError: if the bytes are no Parquet file.
    """
    try:
        return pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no Parquet file: {error}") from error
