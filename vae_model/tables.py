"""Arrow tables as they come: cells cast one by one where a column does not fit, and tables read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vae_model import files

BLOCK_ROWS = 65_536


class RecordError(ValueError):
    """Records do not fit the schema: bad data, never a bug."""


class Reason(NamedTuple):
    """Why rows were rejected."""

    column: str
    error_type: str
    error: str


class Rejects:
    """Rows that cannot be used, each with the first reason found."""

    def __init__(self, num_rows: int) -> None:
        self.codes = np.zeros(num_rows, np.int32)  # 0: usable, else 1 + position in `reasons`
        self.reasons: list[Reason] = []

    def add(self, rows: np.ndarray, column: str, error_type: str, error: str) -> None:
        """Rejects rows (their numbers, or a mask)."""
        self.reasons.append(Reason(column, error_type, f"{column}: {error}"))
        fresh = np.zeros(len(self.codes), bool)
        fresh[rows] = True
        self.codes[fresh & (self.codes == 0)] = len(self.reasons)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.codes))

    @property
    def keep(self) -> np.ndarray:
        """`(n,)` true for the rows that can be used."""
        return self.codes == 0

    def table(self) -> pa.Table:
        """Columns `row`, `column`, `error_type`, `error`: one line per rejected row, ascending."""
        rows = np.flatnonzero(self.codes)
        reasons = pa.table(
            list(zip(*self.reasons, strict=True)) if self.reasons else [[], [], []], schema=_REASON_SCHEMA
        )
        return reasons.take(self.codes[rows] - 1).add_column(0, "row", pa.array(rows))

    def summary(self, max_examples: int = 3) -> str:
        """Every reason with its number of rows, then a few row numbers."""
        counts = np.bincount(self.codes, minlength=len(self.reasons) + 1)[1:]
        lines = [
            f"{reason.error} ({count:,} rows)" for reason, count in zip(self.reasons, counts, strict=True) if count
        ]
        examples = ", ".join(map(str, np.flatnonzero(self.codes)[:max_examples]))
        return f"{len(self):,} of {len(self.codes):,} rows do not fit: {'; '.join(lines)}. First rows: {examples}"


_REASON_SCHEMA = pa.schema([(name, pa.string()) for name in Reason._fields])


def example(column: pa.ChunkedArray, rows: np.ndarray) -> str:
    """The first bad cell, short enough for a message."""
    return repr(column[int(rows[0])].as_py())[:60]


# ---- casting, cell by cell where need be -------------------------------------------------------


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text, in any of Arrow's layouts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries as their values, all strings as `string`: what the casts below know."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def cast_cells(column: pa.ChunkedArray, wanted: pa.DataType) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Casts a column; a cell that has no such value becomes null and its row number is returned.

    Text is read as the number, time or truth value that it spells.

    Returns:
        The column, and the rows whose cell held something else, ascending.
    """
    none = np.empty(0, np.int64)
    if column.type == wanted:
        return column, none
    column = decode(column)
    # Integers beyond 2^53 lose digits as floats: meant.
    safe = not (pa.types.is_integer(column.type) and pa.types.is_floating(wanted))
    if pa.types.is_decimal(column.type) and pa.types.is_floating(wanted):
        safe = False
    try:
        return column.cast(wanted, safe=safe), none
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    before = column.is_valid().to_numpy(zero_copy_only=False) if column.num_chunks else np.empty(0, bool)
    after = _coerce(column, wanted)
    valid = after.is_valid().to_numpy(zero_copy_only=False) if after.num_chunks else np.empty(0, bool)
    return after, np.flatnonzero(before & ~valid)


def _coerce(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """Casts what can be cast; the rest becomes null."""
    nothing = pa.chunked_array([pa.nulls(len(column), wanted)])
    values: pd.Series
    try:
        if pa.types.is_floating(wanted) and is_text(column.type):
            values = pd.to_numeric(column.to_pandas(), errors="coerce")
            return pa.chunked_array([pa.array(values.to_numpy(np.float64), from_pandas=True).cast(wanted)])
        if pa.types.is_integer(wanted) or pa.types.is_decimal(wanted):
            if is_text(column.type):
                column = pa.chunked_array(
                    [pc.if_else(pc.match_substring_regex(column, r"^\s*[+-]?\d+(\.0*)?\s*$"), column, None)]
                )
                column = pc.utf8_trim_whitespace(pc.replace_substring_regex(column, r"\.0*\s*$", ""))
            elif pa.types.is_floating(column.type):
                column = pc.if_else(pc.equal(column, pc.floor(column)), column, None)
            return _cast_in_range(column, wanted)
        if pa.types.is_temporal(wanted) and is_text(column.type):
            values = pd.to_datetime(column.to_pandas(), errors="coerce", format="ISO8601", utc=True)
            times = pa.chunked_array([pa.array(values, from_pandas=True, type=pa.timestamp("us", "UTC"))])
            if pa.types.is_timestamp(wanted) and wanted.tz:
                return times.cast(wanted)
            return times.cast(pa.timestamp("us")).cast(wanted, safe=False)
        if pa.types.is_boolean(wanted) and is_text(column.type):
            lower = pc.utf8_lower(column)
            known = pc.is_in(lower, value_set=pa.array(["true", "false", "1", "0"]))
            return pc.if_else(known, lower, None).cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, TypeError):
        return nothing
    return nothing


def _cast_in_range(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(wanted)
    except pa.ArrowInvalid:
        number = pa.decimal256(76, 0) if pa.types.is_integer(wanted) else pa.float64()
        wide = column.cast(number, safe=False)
    if pa.types.is_integer(wanted):
        bits = wanted.bit_width - (0 if pa.types.is_unsigned_integer(wanted) else 1)
        low = 0 if pa.types.is_unsigned_integer(wanted) else -(2**bits)
        inside = pc.and_(
            pc.greater_equal(wide, pa.scalar(low, pa.decimal256(76, 0))),
            pc.less_equal(wide, pa.scalar(2**bits - 1, pa.decimal256(76, 0))),
        )
        return pc.if_else(inside, wide, None).cast(wanted)
    return pa.chunked_array([pa.nulls(len(column), wanted)])


def conform(table: pa.Table, schema: pa.Schema, required: Sequence[str] = ()) -> tuple[pa.Table, Rejects]:
    """The table with exactly the columns and types of `schema`.

    Columns beyond the schema are dropped and absent ones are null, but a row that lacks a
    `required` column, or has a cell of another type, is rejected (and null in the result).
    """
    rejects = Rejects(table.num_rows)
    columns = []
    for wanted in schema:
        present = table.schema.get_all_field_indices(wanted.name)
        if len(present) == 1:
            column, bad = cast_cells(table.column(present[0]), wanted.type)
            if len(bad):
                cell = example(table.column(present[0]), bad)
                rejects.add(bad, wanted.name, "wrong_type", f"expected {wanted.type}, got {cell}")
        else:
            column = pa.chunked_array([pa.nulls(table.num_rows, wanted.type)])
            if len(present) > 1:
                rejects.add(np.arange(table.num_rows), wanted.name, "duplicate_column", "the table has it twice")
            elif wanted.name in required:
                rejects.add(np.arange(table.num_rows), wanted.name, "missing_column", "the table has no such column")
        columns.append(column)
    return pa.table(columns, schema=schema), rejects


def from_frame(frame: pd.DataFrame) -> pa.Table:
    """A DataFrame as a table, its index left out; a column of mixed objects becomes text."""
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise RecordError(f"{repeated[0]}: expected each column once, got it twice")
    columns = {}
    for name in frame.columns:
        series = frame[name]
        try:
            columns[str(name)] = pa.array(series, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[str(name)] = pa.array(
                series.where(series.isna(), series.astype(str)), pa.string(), from_pandas=True
            )
    return pa.table(columns)


# ---- reading in blocks -------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Consecutive rows that are read together: rows `start` to `start + num_rows` of the whole."""

    start: int
    num_rows: int
    source: int = 0  # which file
    row_group: int = 0


class Tables(Protocol):
    """Any number of rows under one schema, read block by block."""

    schema: pa.Schema
    num_rows: int
    blocks: list[Block]

    def read(self, block: Block, columns: Sequence[str] | None = None) -> pa.Table: ...


@dataclass
class MemoryTables:
    """A table in memory."""

    table: pa.Table

    def __post_init__(self) -> None:
        _refuse_repeated(self.table.schema, "the table")
        self.schema = self.table.schema
        self.num_rows = self.table.num_rows
        self.blocks = [
            Block(start, min(BLOCK_ROWS, self.num_rows - start)) for start in range(0, self.num_rows, BLOCK_ROWS)
        ]

    def read(self, block: Block, columns: Sequence[str] | None = None) -> pa.Table:
        table = self.table if columns is None else self.table.select(list(columns))
        return table.slice(block.start, block.num_rows)


class ParquetTables:
    """Parquet files, local or remote, one block per row group; the files' types may differ where they promote."""

    def __init__(self, patterns: str | list[str]) -> None:
        self._files = files.match(patterns, suffix=".parquet")
        self.blocks: list[Block] = []
        schemas: list[pa.Schema] = []
        start = 0
        for source, (system, path) in enumerate(self._files):
            try:
                with system.open_input_file(path) as handle:
                    metadata = pq.read_metadata(handle)
                    schema = metadata.schema.to_arrow_schema()
            except pa.ArrowInvalid as error:
                raise RecordError(f"{path}: expected a Parquet file, got one that cannot be read ({error})") from error
            _refuse_repeated(schema, path)
            schemas.append(schema.remove_metadata())
            for row_group in range(metadata.num_row_groups):
                rows = metadata.row_group(row_group).num_rows
                self.blocks.append(Block(start, rows, source, row_group))
                start += rows
        self.num_rows = start
        self.schema = self._unify(schemas)

    def _unify(self, schemas: list[pa.Schema]) -> pa.Schema:
        unified = schemas[0]
        for schema, (_, path) in zip(schemas[1:], self._files[1:], strict=True):
            for name in unified.names:
                if name not in schema.names:
                    raise RecordError(f"{name}: {path} has no such column, {self._files[0][1]} has")
                try:
                    pa.unify_schemas(
                        [pa.schema([unified.field(name)]), pa.schema([schema.field(name)])],
                        promote_options="permissive",
                    )
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    got, wanted = schema.field(name).type, unified.field(name).type
                    raise RecordError(
                        f"{name}: expected {wanted} as in {self._files[0][1]}, got {got} in {path}"
                    ) from error
            unified = pa.unify_schemas(
                [unified, schema.empty_table().select(unified.names).schema], promote_options="permissive"
            )
        return unified

    def read(self, block: Block, columns: Sequence[str] | None = None) -> pa.Table:
        system, path = self._files[block.source]
        names = self.schema.names if columns is None else list(columns)
        with system.open_input_file(path) as handle, pq.ParquetFile(handle) as file:
            table = file.read_row_group(block.row_group, columns=names)
        table, rejects = conform(table, pa.schema([self.schema.field(name) for name in names]))
        if len(rejects):
            raise RecordError(f"{path}: {rejects.summary()}")
        return table


def _refuse_repeated(schema: pa.Schema, where: str) -> None:
    for name in schema.names:
        if len(schema.get_all_field_indices(name)) > 1:
            raise RecordError(f"{name}: expected each column once, {where} has it twice")


def open_tables(data: str | list[str] | pa.Table | pd.DataFrame) -> Tables:
    """Parquet by path, glob, directory or URI, or a table or DataFrame in memory."""
    if isinstance(data, pa.Table):
        return MemoryTables(data)
    if isinstance(data, pd.DataFrame):
        return MemoryTables(from_frame(data))
    return ParquetTables(data)


def rechunk(tables: Iterator[pa.Table] | Sequence[pa.Table], max_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most `max_rows`."""
    for table in tables:
        for start in range(0, table.num_rows, max_rows):
            yield table.slice(start, max_rows)


# ---- what a model reads in a column ------------------------------------------------------------


def as_numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64.

    Returns:
        Values `(n,)`, NaN where missing, and the rows whose cell is no number.
    """
    if pa.types.is_duration(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_temporal(column.type):
        return np.full(len(column), np.nan), np.flatnonzero(column.is_valid())
    numbers, bad = cast_cells(column, pa.float64())
    return numbers.to_numpy(), bad


def as_levels(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as the text of its levels; null and NaN are null, whole floats read as integers."""
    column = decode(column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column.cast(pa.float64()))
    if pa.types.is_nested(column.type):
        return pa.chunked_array([pa.array([str(cell) for cell in column.to_pylist()], pa.string())])
    return column.cast(pa.string(), safe=False)


def as_times(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of timestamps, dates or times of day as microseconds since 1970 (or midnight).

    A timestamp with a zone is read as that zone's wall clock.

    Returns:
        Microseconds `(n,)` int64, whether each is present `(n,)`, and the rows that are no time.
    """
    none = np.empty(0, np.int64)
    column = decode(column)
    if is_text(column.type):
        column, none = cast_cells(column, pa.timestamp("us"))
    elif pa.types.is_time(column.type):
        column = column.cast(pa.time64("us"), safe=False).cast(pa.int64())
    elif pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("us"))
    elif pa.types.is_timestamp(column.type):
        if column.type.tz:
            column = pc.local_timestamp(column)
        column = column.cast(pa.timestamp("us"), safe=False)
    elif not pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool), np.flatnonzero(column.is_valid())
    present = column.is_valid().to_numpy()
    return pc.fill_null(column.cast(pa.int64()), 0).to_numpy(), present, none
