"""Files in: Parquet, CSV and JSON Lines as tables of one schema; what cannot be read as dead letters."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.letters import NAMESPACE, Letters
from pipeline.records import (
    MAX_LINE_BYTES,
    SOURCE_KEY,
    dead_letters,
    file_letter,
    json_lines,
    line_letters,
    parse_json_lines,
)
from vae_model.overlap import ahead
from vae_model.tables import conform, is_text, rechunk, rows_at_a_time

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 4 << 20
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
_CODECS = {CompressionTypes.GZIP: "gzip", CompressionTypes.BZIP2: "bz2", CompressionTypes.ZSTD: "zstd"}
_NUM_ATTEMPTS = 3
_NUM_THREADS = 16
# What bad content raises; memory that runs out and a store's own errors are for the runner to try again.
_BAD_CONTENT = (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, zlib.error)
_T = TypeVar("_T")


class ReadResult(NamedTuple):
    """What a read gives."""

    tables: beam.PCollection[pa.Table]
    dead_letters: beam.PCollection[pa.Table]


@dataclass
class ReadTables(beam.PTransform):
    """Files in; `.tables` of exactly one schema and `.dead_letters` (`DEAD_LETTER_SCHEMA`) out.

    Every record of every file is a row of a table or counted by a dead letter. Columns beyond the
    schema are dropped. In JSON Lines an absent key is null, but a record with none of the required
    columns is a dead letter. Bytes of a CSV file that are not UTF-8 are read as the text `\\xNN`.
    What cannot be read is tried again before it becomes a dead letter.

    Args:
        pattern: A file, glob or directory, on any filesystem that Beam knows. Of a directory, the
            files of the format, at any depth; as in Spark, names beginning with `_` or `.` are no
            data, and neither are temporary files that a failed Beam job left.
        schema: The columns to read and their types.
        file_format: "parquet", "csv" or "jsonl"; by default by the suffix of the pattern.
        required: Columns that a file has to have.
        max_rows: The most rows in a table; fewer of one with more than 500 columns.

    Raises:
        ValueError: The format cannot be told, at construction of the pipeline.
        FileNotFoundError: Nothing matches, when the pipeline runs.
    """

    pattern: str
    schema: pa.Schema
    file_format: str | None = None
    required: Sequence[str] = ()
    max_rows: int = 16_384

    def __post_init__(self) -> None:
        unknown = sorted(set(self.required) - set(self.schema.names))
        if unknown:
            raise ValueError(f"required: expected columns of the schema, got {', '.join(unknown)}")

    def expand(self, pbegin: beam.pvalue.PBegin) -> ReadResult:
        file_format = format_of(self.pattern, self.file_format)
        max_rows = min(self.max_rows, rows_at_a_time(len(self.schema)))
        parts = (
            pbegin
            | "Pattern" >> beam.Create([self.pattern])
            | "MatchFiles" >> beam.FlatMap(match_files, file_format)
            | "SpreadFiles" >> beam.Reshuffle()
        )
        unreadable = None
        if file_format == "parquet":
            parts, unreadable = parts | "ListRowGroups" >> beam.ParDo(_ListRowGroups(max_rows)).with_outputs(
                "dead_letters", main="row_groups"
            )
            parts = parts | "SpreadRowGroups" >> beam.Reshuffle()
        else:
            parts = parts | "WholeFiles" >> beam.Map(lambda path: (path, None))
        read = _Read(file_format, self.schema, tuple(self.required), max_rows)
        tables, letters = parts | "Read" >> beam.ParDo(read).with_outputs("dead_letters", main="tables")
        if unreadable is not None:
            letters = (unreadable, letters) | "DeadLetters" >> beam.Flatten()
        return ReadResult(tables, letters)


def launch_schema(pattern: str, file_format: str | None = None) -> pa.Schema:
    """The columns to read, each of them nullable.

    Of Parquet the columns of all files, by their footers, in the order of the first file; types are
    promoted as far as Arrow does, and a column whose types do not promote is text. A file that
    cannot be read is left out. Of text files the columns of the first: in CSV all are text, in JSON
    Lines they are inferred from its first block.

    Raises:
        FileNotFoundError: Nothing matches.
        ValueError: The first file (of Parquet: every file) is empty, or is no such file.
    """
    file_format = format_of(pattern, file_format)
    paths = match_files(pattern, file_format)
    try:
        if file_format == "parquet":
            return _unify(_parquet_schemas(paths))
        schema = _csv_schema(paths[0]) if file_format == "csv" else _json_schema(paths[0])
    except (pa.ArrowException, OSError, _UnreadableError) as error:
        raise ValueError(f"{paths[0]}: expected a {file_format} file, got one that cannot be read ({error})") from error
    if schema is None:
        raise ValueError(f"{paths[0]}: expected a {file_format} file with columns, got an empty one")
    # As text, zip codes and long ids stay as they are; and a column without a value in the first block may have any.
    return pa.schema(
        [
            pa.field(field.name, pa.string()) if file_format == "csv" or pa.types.is_null(field.type) else field
            for field in schema
        ]
    )


def _parquet_schemas(paths: Sequence[str]) -> list[pa.Schema]:
    """Of the files whose footers can be read; raises the error of the first file if none can."""

    def read(path: str) -> pa.Schema | _UnreadableError:
        try:
            return _footer(path).schema
        except _UnreadableError as error:
            return error

    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        found = list(threads.map(read, paths))
    schemas = [schema for schema in found if isinstance(schema, pa.Schema)]
    if not schemas:
        raise found[0]
    return schemas


def _unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    types: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, []).append(_without_view(field.type))
    fields = []
    for name, found in types.items():
        try:
            kind = reduce(_wider, dict.fromkeys(found))
        except (pa.ArrowException, ValueError):
            kind = pa.string()
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _without_view(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_without_view(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_view(field.type)) for field in kind])
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """A type that holds the values of two different ones; Arrow's error if there is none."""
    if pa.types.is_null(a) or pa.types.is_null(b):
        return b if pa.types.is_null(a) else a
    a, b = (_without_view(kind.value_type) if pa.types.is_dictionary(kind) else kind for kind in (a, b))
    if is_text(a) and is_text(b):
        return pa.string()
    schemas = [pa.schema([("", kind)]) for kind in (a, b)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def format_of(pattern: str, file_format: str | None = None) -> str:
    """`file_format`, or the format that the suffix tells; without a suffix (a directory), Parquet.

    Raises:
        ValueError: There is no such format, or the suffix is of none.
    """
    known = sorted(set(_FORMATS.values()))
    if file_format is None:
        file_format = _format_by_suffix(pattern)
        if file_format is None and not os.path.splitext(pattern)[1]:
            file_format = "parquet"
    if file_format not in known:
        raise ValueError(f"{pattern}: expected file_format to be one of {', '.join(known)}, got {file_format}")
    return file_format


def split_suffix(path: str) -> tuple[str, str]:
    """The path without the suffix of a known format, and that suffix, with its compression; or the path and ""."""
    stem, suffix = os.path.splitext(path)
    packed = ""
    if CompressionTypes.detect_compression_type(path) in _CODECS:
        packed = suffix
        stem, suffix = os.path.splitext(stem)
    return (stem, suffix + packed) if suffix.lower() in _FORMATS else (path, "")


def _format_by_suffix(path: str) -> str | None:
    suffix = split_suffix(path)[1].lower()
    return _FORMATS["." + suffix.split(".")[1]] if suffix else None


def match_files(pattern: str, file_format: str) -> list[str]:
    """The files to read, sorted.

    Raises:
        FileNotFoundError: There are none.
    """
    wild = re.search(r"[*?\[]", pattern)
    if wild:
        folder = pattern[: pattern.rfind("/", 0, wild.start()) + 1]
        paths = _match(pattern)
    else:
        folder = pattern.rstrip("/") + "/"
        paths = [path for path in _match(folder + "**") if _format_by_suffix(path) == file_format]
    paths = [path for path in paths if not re.search(r"(^|/)([._]|beam-temp-)", path[len(folder) :])]
    paths = [path for path in paths if not path.endswith("/")]  # objects of no bytes that stand for folders in stores
    if not (wild or paths or os.path.isdir(pattern)):
        paths = _match(pattern)
    if not paths:
        raise FileNotFoundError(f"{pattern}: no {file_format} file matches")
    return sorted(paths)


def _match(pattern: str) -> list[str]:
    return [metadata.path for metadata in FileSystems.match([pattern])[0].metadata_list]


# ---- the reading steps -------------------------------------------------------------------------


class _Part(NamedTuple):
    """Records read together, and what is wrong with them."""

    table: pa.Table  # as read
    block: bytes | None = None  # the JSON lines of the rows
    wrong_cells: Sequence[tuple[np.ndarray, str, str]] = ()  # rows, column, error
    bad_lines: Sequence[str] = ()
    errors: Sequence[str] = ()
    num_undeclared: int = 0  # columns of the file that the schema lacks, told once per file


class _UnreadableError(Exception):
    """Every attempt to read a file, or a part of it, met bad content."""


def _try_again(path: str, read: Callable[[], Iterator[_T]]) -> Iterator[_T]:
    """What `read` gives; where it fails, it is called again, and has to skip what it has given before.

    Raises:
        _UnreadableError: The last attempt failed too.
    """
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            yield from read()
            return
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except _BAD_CONTENT as error:
            _LOG.warning("%s: reading failed, attempt %d of %d: %s", path, attempt, _NUM_ATTEMPTS, error)
            if attempt == _NUM_ATTEMPTS:
                raise _UnreadableError(str(error)) from error
        _pause(0.1 * attempt)


class _NewParts:
    """The parts of a file, each time from the start, without what earlier calls have given.

    Rows come in the same parts each time and malformed lines in the same order, but Arrow reads
    CSV ahead, so that it is chance with which part a malformed line comes.
    """

    def __init__(self, read: Callable[[], Iterator[_Part]]) -> None:
        self._read = read
        self._num_rows = 0
        self._num_bad_lines = 0
        self._num_undeclared = 0

    def __call__(self) -> Iterator[_Part]:
        num_rows = num_bad_lines = 0
        for part in self._read():
            num_rows += part.table.num_rows
            num_known = max(self._num_bad_lines - num_bad_lines, 0)
            num_bad_lines += len(part.bad_lines)
            rows = part if num_rows > self._num_rows else _Part(part.table.slice(0, 0))
            part = rows._replace(
                bad_lines=part.bad_lines[num_known:],
                errors=part.errors[num_known:],
                num_undeclared=max(part.num_undeclared - self._num_undeclared, 0),
            )
            self._num_rows = max(self._num_rows, num_rows)
            self._num_bad_lines = max(self._num_bad_lines, num_bad_lines)
            self._num_undeclared += part.num_undeclared
            yield part


def _pause(seconds: float) -> None:
    time.sleep(seconds)


class _ListRowGroups(beam.DoFn):
    """A Parquet file's path in; `(path, run)` out, a run being pairs of a row group and its number of rows.

    The row groups of a run follow one another and hold at most `max_rows` rows together; a larger
    one is alone.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._letters = Letters()

    def process(self, path: str) -> Iterator[Any]:
        try:
            sizes = _footer(path).num_rows
        except _UnreadableError as error:
            yield self._letters.send(file_letter(path, "read", error, None))
            return
        run: list[tuple[int, int]] = []
        room = self._max_rows
        for row_group, num_rows in enumerate(sizes):
            if run and num_rows > room:
                yield path, run
                run, room = [], self._max_rows
            if num_rows:
                run.append((row_group, num_rows))
                room -= num_rows
        if run:
            yield path, run


class _Read(beam.DoFn):
    """`(path, run)` in, tables out; of text files, which are read whole, the run is None."""

    def __init__(self, file_format: str, schema: pa.Schema, required: tuple[str, ...], max_rows: int) -> None:
        self._file_format = file_format
        self._schema = schema
        self._required = required
        self._max_rows = max_rows
        self._letters = Letters()
        self._num_records = Metrics.counter(NAMESPACE, "num_records")
        self._num_undeclared_columns = Metrics.counter(NAMESPACE, "num_undeclared_columns")

    def process(self, element: tuple[str, list[tuple[int, int]] | None]) -> Iterator[Any]:
        path, run = element
        row_groups = [row_group for row_group, _ in run or ()]
        read = partial(_READERS[self._file_format], path, row_groups, self._schema, self._max_rows)
        parts = ahead(_try_again(path, _NewParts(read)))
        num_read = 0
        error: Exception | None = None
        while True:
            try:
                part = next(parts, None)
            except _UnreadableError as caught:
                error = caught
                break
            if part is None:
                break
            num_read += part.table.num_rows
            self._num_records.inc(part.table.num_rows + len(part.bad_lines))
            self._num_undeclared_columns.inc(part.num_undeclared)
            yield from self._conform(part, path)
        if error and run and len(run) > 1:  # of which nothing has been sent, since it is one part
            for row_group in run:
                yield from self.process((path, [row_group]))
            return
        if run is None:
            num_missing = None
        else:
            num_missing = sum(num_rows for _, num_rows in run) - num_read
            error = error or (ValueError("the row group holds fewer rows than it says") if num_missing else None)
        if error:
            self._num_records.inc(num_missing or 0)
            yield self._letters.send(file_letter(path, "read", error, num_missing))

    def _conform(self, part: _Part, path: str) -> Iterator[Any]:
        table, rejects = conform(part.table, self._schema, self._required)
        for rows, column, error in part.wrong_cells:
            rejects.add(rows, column, "wrong_type", error)
        lines = None
        if part.block is not None:
            strangers = self._without_features(table)
            if len(rejects) or len(strangers):
                lines = [line.decode().rstrip("\r") for line in json_lines(part.block)]
                strangers = [row for row in strangers if json.loads(lines[row]).keys().isdisjoint(self._required)]
                if strangers:
                    rejects.add(
                        np.array(strangers), self._required[0], "missing_column", "the record has none required"
                    )
        if len(rejects):
            yield self._letters.send(dead_letters(part.table, rejects, source=path, stage="read", payload=lines))
            table = table.filter(rejects.keep)
        if part.bad_lines:
            letters = line_letters(
                part.bad_lines, part.errors, payload_format=self._file_format, source=path, stage="read"
            )
            yield self._letters.send(letters)
        # Tells later steps where rows come from, for their dead letters.
        yield from rechunk([table.replace_schema_metadata({SOURCE_KEY: path})], self._max_rows)

    def _without_features(self, table: pa.Table) -> list[int]:
        """Rows without a value in any required column."""
        if not self._required or any(table[name].null_count == 0 for name in self._required):
            return []
        empty = np.logical_and.reduce([table[name].is_null().to_numpy() for name in self._required])
        return np.flatnonzero(empty).tolist()


def tables_from(
    paths: Sequence[str], file_format: str, schema: pa.Schema, first_row: int = 0, max_rows: int = 16_384
) -> Iterator[pa.Table]:
    """The tables of files, one after another from a row on, for those who have no place for dead letters.

    Row groups before that row are not read; a text file is, from its start.

    Raises:
        ValueError: Something cannot be read, or does not fit the schema.
    """
    num_skipped = 0
    for path in paths:
        try:
            sizes = _footer(path).num_rows if file_format == "parquet" else [first_row + 1]
            for row_group, num_rows in enumerate(sizes):
                if num_skipped + num_rows <= first_row:
                    num_skipped += num_rows
                    continue
                for part in _READERS[file_format](path, [row_group], schema, max_rows):
                    table, rejects = conform(part.table, schema)
                    wrong = [*part.errors, *(error for _, _, error in part.wrong_cells)]
                    wrong += [f"{reason.column}: {reason.error}" for reason in rejects.reasons]
                    if wrong:
                        raise ValueError(wrong[0])
                    skip = min(first_row - num_skipped, table.num_rows)
                    num_skipped += skip
                    yield from rechunk([table.slice(skip)], max_rows)
        except (_UnreadableError, *_BAD_CONTENT) as error:
            raise ValueError(f"{path}: expected a {file_format} file without faults, got one with: {error}") from error


# ---- the formats: each a generator of the parts of one file, the same rows at each call ---------


def _parquet_parts(path: str, row_groups: Sequence[int], schema: pa.Schema, max_rows: int) -> Iterator[_Part]:
    """The parts of one row group; several row groups, of at most `max_rows` rows together, are one part."""
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        num_undeclared = len(set(names) - set(schema.names)) if 0 in row_groups else 0
        columns = [name for name in schema.names if name in names]
        batches = file.iter_batches(max_rows, row_groups=row_groups, columns=columns, use_threads=False)
        if len(row_groups) > 1:
            batches = [pa.Table.from_batches(batches).combine_chunks()]
        for batch in batches:
            yield _Part(pa.table(batch), num_undeclared=num_undeclared)
            num_undeclared = 0


class _Footer(NamedTuple):
    schema: pa.Schema
    num_rows: list[int]  # of each row group


def _footer(path: str) -> _Footer:
    """What a Parquet file tells of itself; `_UnreadableError` if it cannot be read."""

    def read() -> Iterator[_Footer]:
        with _open_parquet(path) as file:
            num_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            yield _Footer(file.schema_arrow, num_rows)

    return next(_try_again(path, read))


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    # Buffered, not pre-buffered: a row group is read page by page and need not fit into memory.
    with (
        FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as stream,
        pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file,
    ):
        yield file


def _csv_parts(path: str, _: Sequence[int], schema: pa.Schema, max_rows: int) -> Iterator[_Part]:
    header = _csv_schema(path)
    if header is None:
        return
    names = header.names
    num_undeclared = len(set(names) - set(schema.names))
    # All of a repeated column, so that it is noticed.
    declared = [name for name in names if name in schema.names] if len(set(names)) == len(names) else []
    bad_rows: list[pa_csv.InvalidRow] = []
    with _Utf8(path) as text:
        reader = _open_csv(text, bad_rows, dict.fromkeys(names, pa.string()), declared)
        table: pa.Table | None = reader.schema.empty_table()
        failure: Exception | None = None
        while table is not None:
            # Arrow tells of malformed rows as it meets them, also of those before a failure.
            try:
                batch = next(reader, None)
                table = None if batch is None else pa.Table.from_batches([batch])
            except _BAD_CONTENT as error:
                table, failure = None, error
            found = bad_rows[:]
            del bad_rows[: len(found)]  # Arrow, reading ahead, may have added more
            yield _Part(
                reader.schema.empty_table() if table is None else table,
                bad_lines=[row.text for row in found],
                errors=[f"expected {row.expected_columns} fields, got {row.actual_columns}" for row in found],
                num_undeclared=num_undeclared,
            )
            num_undeclared = 0
    if failure:
        raise failure


def _csv_schema(path: str) -> pa.Schema | None:
    """As Arrow infers it from the first block; None if the file is empty."""
    with _Utf8(path) as text:
        try:
            return _open_csv(text, []).schema
        except pa.ArrowInvalid:
            if text.is_blank:
                return None
            raise


def _open_csv(
    text: _Utf8,
    bad_rows: list[pa_csv.InvalidRow],
    column_types: dict[str, pa.DataType] | None = None,
    include_columns: Sequence[str] = (),
) -> pa_csv.CSVStreamingReader:
    def set_aside(row: pa_csv.InvalidRow) -> str:
        bad_rows.append(row)
        return "skip"

    return pa_csv.open_csv(
        text,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=set_aside),
        convert_options=pa_csv.ConvertOptions(
            column_types=column_types, include_columns=include_columns, null_values=[""], strings_can_be_null=True
        ),
    )


def _json_parts(path: str, _: Sequence[int], schema: pa.Schema, max_rows: int) -> Iterator[_Part]:
    first = True
    for block in _line_blocks(path):
        parsed = parse_json_lines(block, schema)
        num_undeclared = 0
        if first and parsed.block:
            num_undeclared = len(json.loads(json_lines(parsed.block)[0]).keys() - set(schema.names))
            first = False
        yield _Part(*parsed, num_undeclared=num_undeclared)


def _line_blocks(path: str) -> Iterator[bytes]:
    """The file in blocks of whole lines, a few MiB each unless a line is longer."""
    with closing(_open_stream(path)) as stream:
        pieces = [_read_block(stream).removeprefix(codecs.BOM_UTF8)]
        while pieces[-1]:
            whole, newline, rest = pieces[-1].rpartition(b"\n")
            if newline:
                yield b"".join([*pieces[:-1], whole, newline])
                pieces = [rest]
            elif sum(map(len, pieces)) > MAX_LINE_BYTES:  # of a line that is no record, the beginning is enough
                pieces = [b"".join(pieces)[: MAX_LINE_BYTES + 1]]
            pieces.append(_read_block(stream))
        if any(pieces):
            yield b"".join(pieces)


def _read_block(stream: pa.NativeFile) -> bytes:
    """As many bytes each time, also of a store that gives what it has: blocks are the same at each attempt."""
    block: bytes = stream.read(_BLOCK_BYTES)
    while piece := stream.read(_BLOCK_BYTES - len(block)) if len(block) < _BLOCK_BYTES else b"":
        block += piece
    return block


def _json_schema(path: str) -> pa.Schema | None:
    """As Arrow infers it from the records of the first block."""
    for block in _line_blocks(path):
        records = parse_json_lines(block, pa.schema([])).block
        if records:
            return pa_json.read_json(
                pa.BufferReader(records), read_options=pa_json.ReadOptions(block_size=len(records) + 1)
            ).schema
    return None


def _open_stream(path: str) -> pa.NativeFile:
    """The bytes of a file, decompressed."""
    compression = CompressionTypes.detect_compression_type(path)
    stream = pa.PythonFile(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED), mode="r")
    # Not by Beam, which takes a truncated gzip file for a short one.
    return pa.CompressedInputStream(stream, _CODECS[compression]) if compression in _CODECS else stream


class _Utf8(io.RawIOBase):
    """A text file as valid UTF-8 that ends with a newline: one bad byte would end Arrow's reading of CSV."""

    def __init__(self, path: str) -> None:
        self._stream = _open_stream(path)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="backslashreplace")
        self._rest = memoryview(b"")
        self._ended = False
        self.is_blank = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_filled = 0
        while num_filled < len(buffer) and (self._rest or self._read_chunk(len(buffer))):
            size = min(len(buffer) - num_filled, len(self._rest))
            buffer[num_filled : num_filled + size] = self._rest[:size]
            self._rest = self._rest[size:]
            num_filled += size
        return num_filled

    def _read_chunk(self, size: int) -> bool:
        """Whether there was anything more."""
        if self._ended:
            return False
        chunk = self._stream.read(size)
        self._ended = not chunk
        text = self._decoder.decode(chunk, final=self._ended) + ("\n" if self._ended else "")
        # Arrow looks for the header in the first line, blank or not.
        text = text.lstrip("\r\n") if self.is_blank else text
        self.is_blank = not text
        self._rest = memoryview(text.encode())
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


_READERS = {"parquet": _parquet_parts, "csv": _csv_parts, "jsonl": _json_parts}
