"""Files out: tables of one schema to Parquet, CSV or JSON Lines."""

from __future__ import annotations

import glob
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.csv as pa_csv
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.records import DEAD_LETTER_SCHEMA, json_rows, text_cells
from pipeline.sources import format_of, split_suffix
from vae_model.files import write_file
from vae_model.overlap import TableWriter

_SHARD = re.compile(r"-\d{5,}-of-\d{5,}(\.\w+)+$")


@dataclass
class WriteTables(beam.PTransform):
    """Writes tables of one schema; gives the names of the files.

    "out/x.csv" becomes `out/x-00000-of-00001.csv`; a place without a known suffix is a directory,
    "out" becomes `out/scored-00000-of-00001.parquet`. No table at all still gives one file with
    the schema. Files appear under their names when all are written; earlier ones are
    replaced where their number is the same, and left beside them where it is not.

    CSV and JSON hold times as ISO 8601, durations as numbers in their unit and binary as base64;
    what is nested is JSON text in a CSV cell.

    Args:
        path: Where to, on any filesystem that Beam knows.
        schema: The schema of every table.
        file_format: "parquet", "csv" or "jsonl"; by default by the suffix of the path.
        name: The files' name in a directory.

    Raises:
        ValueError: The suffix of the path is of another format.
    """

    path: str
    schema: pa.Schema
    file_format: str | None = None
    name: str = "scored"

    def expand(self, tables: beam.PCollection[pa.Table]) -> beam.PCollection[str]:
        file_format = format_of(self.path, self.file_format)
        prefix, suffix = destination(self.path, file_format, self.name)
        if file_format == "parquet":
            return tables | "WriteParquet" >> beam.io.Write(_ParquetSink(prefix, suffix, self.schema))
        encode = _csv_text if file_format == "csv" else table_lines
        header = _csv_text(self.schema.empty_table(), header=True) if file_format == "csv" else b""
        return (
            tables
            | "Format" >> beam.Map(encode).with_output_types(bytes)
            | "WriteText" >> beam.io.Write(_TextSink(prefix, suffix, header))
        )


def destination(path: str, file_format: str, name: str = "scored") -> tuple[str, str]:
    """What the written files' names begin with and end in.

    Raises:
        ValueError: The suffix of the path is of another format.
    """
    suffix = split_suffix(path)[1]
    if suffix and format_of(path) != file_format:
        raise ValueError(f"{path}: expected a name that ends in .{file_format}, got {suffix}")
    return _prefix(path, name), suffix or f".{file_format}"


def _prefix(path: str, name: str) -> str:
    stem, suffix = split_suffix(path)
    return stem if suffix else f"{path.rstrip('/')}/{name}"


def written_files(path: str, name: str = "scored") -> dict[str, float]:
    """Files that earlier writes left at a place, in any format, and when each was written (0: not known)."""
    pattern = f"{_prefix(path, name)}-*-of-*{split_suffix(path)[1]}"
    found = FileSystems.match([pattern])[0].metadata_list
    return {item.path: item.last_updated_in_seconds for item in found if _SHARD.search(item.path)}


def dead_letter_place(options: Any) -> str:
    """Where dead letters go: by default a folder beside the scored files, which readers skip for its underscore."""
    if options.dead_letters:
        return str(options.dead_letters)
    stem, suffix = split_suffix(options.output)
    folder = stem[: stem.rfind("/") + 1] if suffix else f"{options.output.rstrip('/')}/"
    return f"{folder or './'}_dead_letters"


def remove_leftovers(path: str, name: str = "scored") -> None:
    """Deletes the temporary files at a place, which killed or failed writes left."""
    start = _temporary(_prefix(path, name))
    if "://" not in start:
        for folder in glob.glob(f"{glob.escape(start)}*"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    found = FileSystems.match([f"{start}*/*"])[0].metadata_list
    FileSystems.delete([item.path for item in found])


def refuse_unwritable(flag: str, path: str) -> None:
    """Writes a small file where files will go, and deletes it: a job should not find out at its end.

    A folder that is not there is not made, for workers may be another user: it must be possible to make it.

    Raises:
        ValueError: It cannot be written there; names the flag.
    """
    stem, suffix = split_suffix(path)
    folder = (stem.rpartition("/")[0] or ".") if suffix else path.rstrip("/")
    if "://" not in folder:
        folder = os.path.abspath(folder)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
    probe = f"{folder}/.beam-vae-{uuid.uuid4().hex}"
    try:
        with FileSystems.create(probe) as stream:
            stream.write(b"x")  # S3 refuses the upload that Beam makes of an empty file
        FileSystems.delete([probe])
    except Exception as error:  # each filesystem has its own
        raise ValueError(f"--{flag}: cannot write to {folder}: {error}") from error


def _temporary(prefix: str) -> str:
    folder, name = FileSystems.split(prefix)
    return str(FileSystems.join(folder, f".beam-temp-{name}-"))


class _Sink(FileBasedSink):
    """Writes files beside their place, in a folder that readers of it skip for its dot, and moves them there."""

    def initialize_write(self) -> str:
        folder = f"{_temporary(self.file_path_prefix.get())}{uuid.uuid4().hex}"
        FileSystems.mkdirs(folder)
        return folder


class _ParquetSink(_Sink):
    """As Beam's own, but written behind, and with dictionaries only for the columns that they make smaller."""

    def __init__(self, prefix: str, suffix: str, schema: pa.Schema) -> None:
        super().__init__(
            prefix,
            coder=None,
            file_name_suffix=suffix,
            mime_type="application/x-parquet",
            compression_type=CompressionTypes.UNCOMPRESSED,  # columns are compressed, not the file
        )
        self._schema = schema

    def open(self, temp_path: str) -> tuple[Any, TableWriter]:
        stream = super().open(temp_path)
        return stream, TableWriter(stream, self._schema)

    def write_record(self, opened: tuple[Any, TableWriter], table: pa.Table) -> None:
        opened[1].write(table)

    def close(self, opened: tuple[Any, TableWriter]) -> None:
        stream, writer = opened
        writer.close()
        stream.close()


class _TextSink(_Sink):
    """Writes bytes one after the other, each file with a header."""

    def __init__(self, prefix: str, suffix: str, header: bytes) -> None:
        super().__init__(prefix, coder=None, file_name_suffix=suffix, mime_type="text/plain")
        self._header = header

    def open(self, temp_path: str) -> _TextFile:
        file = _TextFile(temp_path, super().open)
        file.write(self._header)
        return file

    def write_record(self, file: _TextFile, text: bytes) -> None:
        file.write(text)


class _TextFile:
    """A file that is opened when there is something to write: Beam cannot close an empty one on s3://."""

    def __init__(self, path: str, create: Callable[[str], Any]) -> None:
        self._path, self._create = path, create
        self._stream: Any = None

    def write(self, text: bytes) -> None:
        if text:
            self._stream = self._stream or self._create(self._path)
            self._stream.write(text)

    def close(self) -> None:
        is_plain = CompressionTypes.detect_compression_type(self._path) == CompressionTypes.UNCOMPRESSED
        if self._stream is None and is_plain and self._path.startswith("s3://"):
            write_file(self._path, b"")
        else:
            (self._stream or self._create(self._path)).close()


@dataclass
class WriteDeadLetters(beam.PTransform):
    """Writes tables of `DEAD_LETTER_SCHEMA` as `WriteTables` does, in a directory as `dead_letters-*`."""

    path: str
    file_format: str | None = None

    def expand(self, dead_letters: beam.PCollection[pa.Table]) -> beam.PCollection[str]:
        write = WriteTables(self.path, DEAD_LETTER_SCHEMA, self.file_format, name="dead_letters")
        return dead_letters | "WriteTables" >> write


def table_lines(table: pa.Table) -> bytes:
    """The rows as JSON Lines."""
    lines = json_rows(table).to_pylist()
    return "".join(f"{line}\n" for line in lines).encode()


def _csv_text(table: pa.Table, header: bool = False) -> bytes:
    columns = [
        column if _is_csv_cell(column.type) else pa.chunked_array([text_cells(column)], pa.string())
        for column in table.columns
    ]
    stream = io.BytesIO()
    pa_csv.write_csv(pa.table(columns, names=table.schema.names), stream, pa_csv.WriteOptions(include_header=header))
    return stream.getvalue()


def _is_csv_cell(kind: pa.DataType) -> bool:
    """Whether Arrow writes it as wanted itself."""
    return (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind)
    )
