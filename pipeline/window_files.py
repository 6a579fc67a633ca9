"""Files out of an endless stream: each window of time has its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.transforms import trigger
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Duration, Timestamp
from apache_beam.utils.windowed_value import PaneInfoTiming

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.sinks import table_lines
from pipeline.sources import split_suffix
from vae_model.overlap import table_writer
from vae_model.tables import rechunk

# Of allowed lateness, where no limit is asked for: older than any calendar date, and a time that runners can hold.
ALWAYS_SECS = 10_000 * 366 * 86_400
FORMATS = ("parquet", "jsonl")
_MAX_TABLES = 1000  # in a file: a runner may hold them all
_MAX_ROWS = 16_384  # in a row group
_MAX_LATE_WAIT_SECS = 60.0
_TEMPORARY = ".beam-temp-"
_LEFTOVER_SECS = 86_400.0  # a temporary file is there for as long as one file takes to write


@dataclass
class WriteWindowFiles(beam.PTransform):
    """Writes tables of one schema, a file per window, shard and pane; gives the names of the files.

    A file holds the rows of one window of event time, such as
    `out/scored-20261122T190000Z-20261122T190100Z-shard-00000-pane-00000.parquet`. It is written when the watermark
    has passed the window's end; in parts, `-early`, where a window has very many tables; and again, `-late`, with
    what came later. Names depend on nothing else, so that a retry writes the same file again. Files are written
    beside their place, under a name that readers skip for its dot, and moved there whole.

    Rows go by their table's timestamp: a table of rows of several windows is written to one.

    Args:
        path: A directory, or one and a pattern, such as `out/*.jsonl`; on any filesystem that Beam knows.
        schema: The schema of every table.
        window_secs: Length of a window.
        allowed_lateness_secs: After a window's end, by the watermark. What comes still later is dropped by
            Beam. None: nothing is that has a time, be it of the year 1.
        name: The files' name.
        job: A word that goes into the names. Two jobs that write the same windows to one directory, such as one
            that is started again after it was stopped, need different words, or the second replaces files of the first.
        num_shards: Files that can be written at the same time.

    Raises:
        ValueError: The path is of a format that is not written by window.
    """

    path: str
    schema: pa.Schema
    window_secs: float = 60.0
    allowed_lateness_secs: float | None = None
    name: str = "scored"
    job: str = ""
    num_shards: int = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.folder, self.file_format = window_place(self.path)

    def expand(self, tables: beam.PCollection[pa.Table]) -> beam.PCollection[str]:
        lateness = ALWAYS_SECS if self.allowed_lateness_secs is None else self.allowed_lateness_secs
        fire = trigger.AfterWatermark(
            early=trigger.AfterCount(_MAX_TABLES),
            # Not at once: many late records, one file.
            late=trigger.AfterProcessingTime(max(1, int(min(self.window_secs, _MAX_LATE_WAIT_SECS)))),
        )
        windows = beam.WindowInto(
            FixedWindows(self.window_secs),
            trigger=fire,
            accumulation_mode=trigger.AccumulationMode.DISCARDING,
            allowed_lateness=Duration.of(lateness),
        )
        write = _WriteFile(self.folder, self.file_format, self.schema, self.name, self.job)
        return (
            tables
            | "Window" >> windows
            | "Shard" >> beam.ParDo(_Shard(self.num_shards)).with_output_types(tuple[int, pa.Table])
            | "GroupByWindow" >> beam.GroupByKey()
            | "WriteFile" >> beam.ParDo(write).with_output_types(str)
        )


def window_place(path: str) -> tuple[str, str]:
    """The directory and the format that a path asks for.

    Raises:
        ValueError: There is none such.
    """
    stem, suffix = split_suffix(path)
    if not suffix:
        return path.rstrip("/") or "/", "parquet"
    folder, _, pattern = stem.rpartition("/")
    if suffix[1:] not in FORMATS or pattern != "*":
        expected = ", ".join(f"FOLDER/*.{name}" for name in FORMATS)
        raise ValueError(f"{path}: expected a directory or {expected}: a stream is written by window")
    return folder or ("/" if stem.startswith("/") else "."), suffix[1:]


def remove_leftovers(path: str) -> None:
    """Deletes temporary files that killed workers left at a place: those of more than a day ago.

    A younger one may be another job's, which writes there now. A store that does not tell times (0) keeps all.
    """
    place = FileSystems.join(window_place(path)[0], f"{_TEMPORARY}*")
    found = FileSystems.match([place])[0].metadata_list
    before = time.time() - _LEFTOVER_SECS
    FileSystems.delete([item.path for item in found if 0 < item.last_updated_in_seconds < before])


class _Shard(beam.DoFn):
    """Keys tables in turn."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards

    def setup(self) -> None:
        self._turns = count()

    def process(self, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        yield next(self._turns) % self._num_shards, table


class _WriteFile(beam.DoFn):
    """The tables of a window, shard and pane in; the name of their file out."""

    def __init__(self, folder: str, file_format: str, schema: pa.Schema, name: str, job: str) -> None:
        self._folder, self._file_format, self._schema = folder, file_format, schema
        self._name, self._job = name, job

    def process(
        self,
        group: tuple[int, Iterable[pa.Table]],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[str]:
        shard, tables = group
        parts = [self._name, _stamp(window.start), _stamp(window.end), self._job]
        parts += [f"shard-{shard:05d}", f"pane-{pane.index:05d}", _TIMINGS.get(pane.timing, "")]
        name = f"{'-'.join(filter(None, parts))}.{self._file_format}"
        path = FileSystems.join(self._folder, name)
        # Not the name alone: a worker that was given up may still be writing.
        temporary = FileSystems.join(self._folder, f"{_TEMPORARY}{name}-{uuid.uuid4().hex}")
        if not FileSystems.exists(self._folder):
            with suppress(OSError):  # another worker may have been faster
                FileSystems.mkdirs(self._folder)
        try:
            self._write(temporary, rechunk(iter(tables), _MAX_ROWS))
            FileSystems.rename([temporary], [path])
        except BaseException:
            if FileSystems.exists(temporary):
                FileSystems.delete([temporary])
            raise
        yield path

    def _write(self, path: str, tables: Iterator[pa.Table]) -> None:
        with FileSystems.create(path, "application/octet-stream") as stream:
            if self._file_format == "jsonl":
                for table in tables:
                    stream.write(table_lines(table))
                return
            with table_writer(stream, self._schema) as writer:
                for group in _row_groups(tables):
                    writer.write(group)


_TIMINGS = {PaneInfoTiming.EARLY: "early", PaneInfoTiming.LATE: "late"}


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer, larger tables."""
    held: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        if num_rows + table.num_rows > _MAX_ROWS and held:
            yield pa.concat_tables(held)
            held, num_rows = [], 0
        held.append(table)
        num_rows += table.num_rows
    if held:
        yield pa.concat_tables(held)


def _stamp(time: Timestamp) -> str:
    """A time in UTC as a part of a file's name, such as 20261122T190000Z; fractions only where there are any."""
    try:
        whole = time.to_utc_datetime()
    except OverflowError:  # of records without a time, Beam says the least that it knows
        return f"{time.micros}us"
    fraction = f".{whole.microsecond:06d}" if whole.microsecond else ""
    return f"{whole:%Y%m%dT%H%M%S}{fraction}Z"
