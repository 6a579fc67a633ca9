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
_BLOCK_CELLS = 1 << 23  # 64 MiB of float64
_PAGE_BYTES = 1 << 20  # of Parquet, as most write it


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
        self._counts: list[int] = []  # rows that each reason holds for, also where it is not their first

    @classmethod
    def concatenate(cls, parts: Sequence[Rejects]) -> Rejects:
        """Of the parts of a table, in order: one reason per column and kind of error."""
        whole = cls(0)
        known: dict[tuple[str, str], int] = {}
        codes = []
        for part in parts:
            places = [0]
            for reason, count in zip(part.reasons, part._counts, strict=True):
                places.append(known.setdefault((reason.column, reason.error_type), len(whole.reasons) + 1))
                if places[-1] > len(whole.reasons):
                    whole.reasons.append(reason)
                    whole._counts.append(0)
                whole._counts[places[-1] - 1] += count
            codes.append(np.array(places, np.int32)[part.codes])
        whole.codes = np.concatenate(codes)
        return whole

    def add(self, rows: np.ndarray, column: str, error_type: str, error: str) -> None:
        """Rejects rows (their numbers, or a mask)."""
        self.reasons.append(Reason(column, error_type, f"{column}: {error}"))
        fresh = np.zeros(len(self.codes), bool)
        fresh[rows] = True
        self._counts.append(int(fresh.sum()))
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
        reasons = pa.Table.from_pylist([reason._asdict() for reason in self.reasons], schema=_REASON_SCHEMA)
        return reasons.take(self.codes[rows] - 1).add_column(0, "row", pa.array(rows))

    def summary(self, max_examples: int = 3) -> str:
        """Every reason with its number of rows, then a few row numbers."""
        lines = [
            f"{reason.error} ({count:,} rows)"
            for reason, count in zip(self.reasons, self._counts, strict=True)
            if count
        ]
        examples = ", ".join(map(str, np.flatnonzero(self.codes)[:max_examples]))
        return f"{len(self):,} of {len(self.codes):,} rows do not fit: {'; '.join(lines)}. First rows: {examples}"


_REASON_SCHEMA = pa.schema([(name, pa.string()) for name in Reason._fields])


def example(column: pa.ChunkedArray, rows: np.ndarray) -> str:
    """The first bad cell, short enough for a message."""
    cell = column[int(rows[0])]
    try:
        return repr(cell.as_py())[:60]
    except (ValueError, OverflowError):  # a time beyond Python's
        return str(cell.value)
    except LookupError:  # a zone that nobody knows
        return f"a {cell.type}"


# ---- casting, cell by cell where need be -------------------------------------------------------


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text, in any of Arrow's layouts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def knows_zone(kind: pa.DataType) -> bool:
    """Whether a time's zone, if it has one, is one that can be read."""
    if not (pa.types.is_timestamp(kind) and kind.tz):
        return True
    try:
        pc.local_timestamp(pa.scalar(0, kind))
    except pa.ArrowInvalid:
        return False
    return True


def decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries as their values, all strings as `string`, float16 as float32: what the casts below know."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    return column


def cast_cells(column: pa.ChunkedArray, wanted: pa.DataType) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Casts a column; a cell that has no such value becomes null and its row number is returned.

    Text is read as the number, time or truth value that it spells; NA, null and their like, which say
    that there is none, are null. What becomes of a cell does not
    depend on its neighbours.

    Returns:
        The column, and the rows whose cell held something else, ascending.
    """
    if column.type == wanted:
        return column, np.empty(0, np.int64)
    if pa.types.is_dictionary(wanted):
        values, bad = cast_cells(column, wanted.value_type)
        return values.dictionary_encode().cast(wanted), bad
    column = decode(column)
    if pa.types.is_floating(column.type) and not pa.types.is_floating(wanted):
        column = pc.if_else(pc.is_nan(column), None, column)
    if is_text(column.type) and not is_text(wanted):
        column = pc.if_else(pc.match_substring_regex(column, _MISSING_TEXT), None, column)
        after = _read_text(column, wanted)
    elif pa.types.is_floating(column.type) and pa.types.is_integer(wanted):
        after = _cast_each(pc.if_else(pc.equal(column, pc.floor(column)), column, None), wanted)
    else:
        after = _cast_each(column, wanted)
    return after, np.flatnonzero(_valid(column) & ~_valid(after))


def _valid(column: pa.ChunkedArray) -> np.ndarray:
    return column.is_valid().to_numpy().astype(bool)


def _cast_each(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """Casts the cells that can be cast; the others become null."""
    return pa.chunked_array([_cast_parts(chunk, wanted) for chunk in column.chunks], wanted)


def _cast_parts(cells: pa.Array, wanted: pa.DataType) -> pa.Array:
    # Arrow says that some cell cannot be cast, not which: search in ever smaller parts.
    if cells.null_count < len(cells):
        try:
            return _cast(cells, wanted)
        except pa.ArrowNotImplementedError:
            pass
        except pa.ArrowInvalid:
            if len(cells) > 1:
                size = -(-len(cells) // 16)
                parts = [cells.slice(start, size) for start in range(0, len(cells), size)]
                return pa.concat_arrays([_cast_parts(part, wanted) for part in parts])
    return pa.nulls(len(cells), wanted)


def _cast(cells: pa.Array, wanted: pa.DataType) -> pa.Array:
    kind = cells.type
    if pa.types.is_decimal(wanted) and pa.types.is_boolean(kind):
        cells = cells.cast(pa.int8())
    if pa.types.is_decimal(wanted) and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        cells = cells.cast(pa.decimal256(20, 0))  # the least that holds every integer
    if pa.types.is_duration(wanted) and pa.types.is_integer(kind):
        cells = cells.cast(pa.int64())
    # Digits beyond a float's, and fractions of a time's unit, are dropped; values out of range never are.
    coarser = pa.types.is_temporal(kind) and pa.types.is_temporal(wanted) and _fineness(kind) > _fineness(wanted)
    return cells.cast(wanted, safe=not (coarser or pa.types.is_floating(wanted)))


def _fineness(kind: pa.DataType) -> int:
    return ("s", "ms", "us", "ns").index(kind.unit) if hasattr(kind, "unit") else -1  # dates have none


_MISSING_TEXT = r"(?i)^\s*(na|n/a|#n/a|null|none)?\s*$"  # as R, pandas, SQL and spreadsheets write it
_NUMBER_TEXT = r"(?i)^[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)$"
_WHOLE_TEXT = r"^[+-]?\d+(\.0*)?$"


def _read_text(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """What text spells; null where it spells no such value."""
    text = pc.utf8_trim_whitespace(column)
    if pa.types.is_floating(wanted) or pa.types.is_decimal(wanted):
        return _cast_each(_matching(text, _NUMBER_TEXT), wanted)
    if pa.types.is_integer(wanted) or pa.types.is_duration(wanted):
        digits = pc.replace_substring_regex(_matching(text, _WHOLE_TEXT), r"^\+|\.0*$", "")
        if pa.types.is_duration(wanted):
            digits = _cast_each(digits, pa.int64())
        return _cast_each(digits, wanted)
    if pa.types.is_boolean(wanted):
        return _cast_each(_matching(text, "(?i)^(true|false|1|0)$"), wanted)
    if pa.types.is_time(wanted):
        on_a_day = pc.binary_join_element_wise("1970-01-01T", _matching(text, "^[0-9:.]+$"), "")
        return _cast_each(_read_times(on_a_day), wanted)
    if pa.types.is_temporal(wanted):
        times = _read_times(text)
        zoned = pa.types.is_timestamp(wanted) and wanted.tz
        return _cast_each(times.cast(pa.timestamp("us", "UTC")) if zoned else times, wanted)
    return _cast_each(column, wanted)


def _matching(text: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.if_else(pc.match_substring_regex(text, pattern), text, None)


def _read_times(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """ISO 8601 text as timestamps[us]; with an offset, as UTC."""
    try:
        return text.cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        pass
    # pandas knows offsets and short forms, but only the years 1678 to 2261. It reads a time without an offset as
    # if it had that of the one before, so these are read apart.
    zoned = pc.match_substring_regex(text, _OFFSET_TEXT)
    times = pc.coalesce(_read_iso(pc.if_else(zoned, text, None)), _read_iso(pc.if_else(zoned, None, text)))
    rest = pc.if_else(times.is_valid(), None, _matching(text, r"^\d{4}-\d\d-\d\d"))
    return pc.coalesce(times, _cast_each(rest, pa.timestamp("us")))


_OFFSET_TEXT = r"[Tt ].*([Zz]|[+-]\d\d(:?\d\d)?)$"


def _read_iso(text: pa.ChunkedArray) -> pa.ChunkedArray:
    read = pd.to_datetime(text.to_pandas(), errors="coerce", format="ISO8601", utc=True)
    times = pa.array(read, pa.timestamp("ns", "UTC"), from_pandas=True)
    return pa.chunked_array([times.cast(pa.timestamp("us"), safe=False)])


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
    names = frame.columns.map(str)
    repeated = names[names.duplicated()]
    if len(repeated):
        raise RecordError(f"{repeated[0]}: expected each column once, got it twice")
    columns = {}
    for i, name in enumerate(names):
        series = frame.iloc[:, i]
        try:
            columns[name] = pa.array(series, from_pandas=True)
        except (pa.ArrowException, OverflowError):  # mixed, too large, or unknown to Arrow
            text = series.astype(object).map(str, na_action="ignore")
            columns[name] = pa.array(text, pa.string(), from_pandas=True)
    return pa.table(columns)


def without_views(table: pa.Table) -> pa.Table:
    """The table with `string_view` and `binary_view` columns as `string` and `binary`: Arrow cannot filter views."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    for place, column in enumerate(table.schema):
        if column.type in plain:
            cast = table.column(place).cast(plain[column.type])
            table = table.set_column(place, column.with_type(plain[column.type]), cast)
    return table


# ---- reading in blocks -------------------------------------------------------------------------


def rows_at_a_time(num_columns: int) -> int:
    """Rows to hold at once: fewer of wide tables, so that memory stays within bounds."""
    return int(np.clip(_BLOCK_CELLS // max(num_columns, 1), 256, BLOCK_ROWS))


@dataclass(frozen=True)
class Block:
    """Consecutive rows that can be read without those before: `num_rows` of the whole, from row `start` on."""

    start: int
    num_rows: int
    source: int = 0  # which file
    row_group: int = 0
    num_bytes: int = 0  # in a Parquet file, before compression


class Tables(Protocol):
    """Any number of rows under one schema, in blocks that can be read in any order."""

    schema: pa.Schema
    num_rows: int
    blocks: list[Block]

    def scan(
        self, columns: Sequence[str] | None = None, blocks: Sequence[Block] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """The rows of some blocks (by default all) a few at a time, each part with the position of its first row."""
        ...


@dataclass
class MemoryTables:
    """A table in memory."""

    table: pa.Table

    def __post_init__(self) -> None:
        _refuse_repeated(self.table.schema, "the table")
        self.table = without_views(self.table)
        self.schema = self.table.schema
        self.num_rows = self.table.num_rows
        size = rows_at_a_time(self.table.num_columns)
        self.blocks = [Block(start, min(size, self.num_rows - start)) for start in range(0, self.num_rows, size)]

    def scan(
        self, columns: Sequence[str] | None = None, blocks: Sequence[Block] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        table = self.table if columns is None else self.table.select(list(columns))
        for block in self.blocks if blocks is None else blocks:
            yield block.start, table.slice(block.start, block.num_rows)


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
            except (pa.ArrowException, OSError) as error:
                raise RecordError(f"{path}: expected a Parquet file, got one that cannot be read ({error})") from error
            _refuse_repeated(schema, path)
            schemas.append(without_views(schema.empty_table()).schema.remove_metadata())
            for row_group in range(metadata.num_row_groups):
                found = metadata.row_group(row_group)
                self.blocks.append(Block(start, found.num_rows, source, row_group, found.total_byte_size))
                start += found.num_rows
        self.num_rows = start
        self.schema = self._unify(schemas)

    def _unify(self, schemas: list[pa.Schema]) -> pa.Schema:
        unified = schemas[0]
        for schema, (_, path) in zip(schemas[1:], self._files[1:], strict=True):
            fields = []
            for field in unified:
                if field.name not in schema.names:
                    raise RecordError(f"{field.name}: {path} has no such column, {self._files[0][1]} has")
                other = schema.field(field.name)
                try:
                    fields.append(_wider(field, other))
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise RecordError(
                        f"{field.name}: expected {field.type} as in {self._files[0][1]}, got {other.type} in {path}"
                    ) from error
            unified = pa.schema(fields)
        return unified

    def scan(
        self, columns: Sequence[str] | None = None, blocks: Sequence[Block] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        names = self.schema.names if columns is None else list(columns)
        schema = pa.schema([self.schema.field(name) for name in names])
        for block in self.blocks if blocks is None else blocks:
            system, path = self._files[block.source]
            start = block.start
            try:
                with system.open_input_file(path) as handle:
                    for part in _row_group_parts(handle, block.row_group, names):
                        table, rejects = conform(part, schema)
                        if len(rejects):
                            raise RecordError(f"{path}: {rejects.summary()}")
                        yield start, table
                        start += table.num_rows
            except (pa.ArrowException, OSError) as error:
                raise RecordError(f"{path}: row group {block.row_group} cannot be read ({error})") from error


def _row_group_parts(handle: pa.NativeFile, row_group: int, names: list[str]) -> Iterator[pa.Table]:
    """A row group a few rows at a time."""
    size = rows_at_a_time(len(names))
    with pq.ParquetFile(handle, pre_buffer=False, buffer_size=_PAGE_BYTES) as file:
        metadata = file.metadata.row_group(row_group)
        if metadata.total_byte_size > _PAGE_BYTES * metadata.num_columns:
            for batch in file.iter_batches(size, row_groups=[row_group], columns=names):
                yield pa.Table.from_batches([batch])
        else:  # page by page, each column would hold a page, and so all of this at once and more
            yield from rechunk([file.read_row_group(row_group, columns=names)], size)


def _wider(a: pa.Field, b: pa.Field) -> pa.Field:
    """A field whose type holds the values of both."""
    if pa.types.is_dictionary(a.type) != pa.types.is_dictionary(b.type):
        a, b = (f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in (a, b))
    if is_text(a.type) and is_text(b.type):
        return a.with_type(pa.string())
    return pa.unify_schemas([pa.schema([a]), pa.schema([b])], promote_options="permissive").field(0)


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
    """A column as float64; durations in their unit; numbers too small for a normal float (2.2e-308) as zero.

    TensorFlow's threads, which encode training rows, read those as zero anyway.

    Returns:
        Values `(n,)`, NaN where missing, and the rows whose cell is no number.
    """
    if pa.types.is_duration(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_temporal(column.type):
        return np.full(len(column), np.nan), np.flatnonzero(_valid(column))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):  # there is no cell that does not fit
        numbers, bad = column.cast(pa.float64(), safe=False), np.empty(0, np.int64)
    else:
        numbers, bad = cast_cells(column, pa.float64())
    values = numbers.to_numpy()
    subnormal = (np.abs(values) < np.finfo(np.float64).tiny) & (values != 0)
    return np.where(subnormal, 0.0, values) if subnormal.any() else values, bad


def as_levels(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as the text of its levels; null and NaN are null, whole floats read as integers."""
    column = decode(column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column.cast(pa.float64()))
    try:
        return column.cast(pa.string(), safe=not pa.types.is_temporal(column.type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # nested, or bytes that are no text
        cells = [None if cell is None else str(cell) for cell in column.to_pylist()]
        return pa.chunked_array([pa.array(cells, pa.string())])


def as_times(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of timestamps, dates or times of day as microseconds since 1970 (or midnight).

    A timestamp with a zone is read as that zone's wall clock.

    Returns:
        Microseconds `(n,)` int64, whether each is present `(n,)`, and the rows that are no time.
    """
    column = decode(column)
    kind = column.type
    zoned = pa.types.is_timestamp(kind) and bool(kind.tz)
    if zoned and knows_zone(kind):
        column = pc.local_timestamp(column)
    if zoned and not knows_zone(kind):
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool), np.flatnonzero(_valid(column))
    if is_text(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind):
        times, bad = cast_cells(column, pa.timestamp("us"))
    elif pa.types.is_time(kind):
        times, bad = cast_cells(column, pa.time64("us"))
    else:
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool), np.flatnonzero(_valid(column))
    return pc.fill_null(times.cast(pa.int64()), 0).to_numpy(), _valid(times), bad
