"""Reading ahead and writing behind, each in a thread of its own, while the caller's computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_T = TypeVar("_T")
_END: Any = object()


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each made while the one before it is used; an error comes where its item would."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        made = thread.submit(next, items, _END)
        while (item := made.result()) is not _END:
            made = thread.submit(next, items, _END)
            yield item


class TableWriter:
    """Writes tables of one schema to a stream as Parquet: one is written while the next is made.

    What goes wrong in its thread is raised by the next `write`, or by `close`. Until `close` has returned, nothing
    counts as written.
    """

    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._stream, self._schema = stream, schema
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: Future[None] | None = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Hands a table over, once the one before it is written."""
        self._wait()
        self._pending = self._thread.submit(self._write, table)

    def close(self) -> None:
        """Writes what is left and the footer. The stream stays open."""
        try:
            self._wait()
            self._open(self._schema.empty_table()).close()
        finally:
            self._thread.shutdown()

    def abandon(self) -> None:
        """Ends the thread while the stream is still open; what was written is of no use."""
        self._thread.shutdown()
        with suppress(OSError, ValueError):  # of a full disk, say: the error that led here is the one to tell
            self._open(self._schema.empty_table()).close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write(self, table: pa.Table) -> None:
        self._open(table).write_table(table)

    def _open(self, first: pa.Table) -> pq.ParquetWriter:
        if self._writer is None:
            repetitive = _repetitive_columns(first)
            self._writer = pq.ParquetWriter(self._stream, self._schema, compression="zstd", use_dictionary=repetitive)
        return self._writer


@contextmanager
def table_writer(stream: Any, schema: pa.Schema) -> Iterator[TableWriter]:
    """A `TableWriter`, closed at the end of the block, or abandoned where that fails."""
    writer = TableWriter(stream, schema)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _repetitive_columns(table: pa.Table) -> list[str] | bool:
    """The Parquet columns to write by way of a dictionary, judged by some rows; False for none.

    Of a column that hardly repeats a value the dictionary is a second copy: random numbers are written four times
    slower with it, and a quarter larger.
    """
    unique = {
        field.name
        for field in table.schema
        if pa.types.is_primitive(field.type) or pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        if 2 * pc.count_distinct(table[field.name]).as_py() > max(table.num_rows, 1000)
    }
    stream = pa.BufferOutputStream()
    pq.write_table(table.schema.empty_table(), stream)
    columns = pq.read_metadata(pa.BufferReader(stream.getvalue())).schema
    paths = [columns.column(i).path for i in range(len(columns))]  # of nested columns their leaves
    return [path for path in paths if path not in unique] or False
