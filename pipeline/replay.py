"""A table played as a stream, for trying out what is made for streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.io.restriction_trackers import OffsetRange
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from pipeline.letters import NAMESPACE
from pipeline.offsets import FOREVER, RESTRICTION, WATERMARK, Offsets, advance
from pipeline.sources import format_of, launch_schema, match_files, tables_from
from pipeline.uris import parse_uri, positive, seconds
from vae_model.tables import cast_cells, is_text

_BLOCK_ROWS = 1000
_TICK_SECS = 0.05  # rows that are due within it leave together
_BUNDLE_SECS = 5.0  # and then the runner hears of the watermark
_Element = tuple[float, int]  # seconds of the epoch at launch, event time of the first row in microseconds


@dataclass
class ReplayTable(beam.PTransform):
    """The rows of a table as dicts, in their order and at a chosen pace, each at its event time.

    The collection is unbounded, as that of a message queue, but it ends with the table. The watermark is
    `max_delay_secs` behind the latest event time so far. A row of which the time is missing has that of the row
    before it. Rows that were due while the pipeline was busy follow at once.

    It needs a runner that has splittable DoFns; Beam's BundleBasedDirectRunner has none.

    Args:
        path: A file, glob or directory of Parquet, CSV or JSON Lines, as `ReadTables` finds them. In CSV all values
            are text.
        rate: Rows per second; None for as fast as they can be read.
        time_column: Event times: timestamps, dates or ISO 8601 text, without a zone in UTC. By default, the time at
            which a row leaves.
        speedup: Paces rows by their event times instead of `rate`: at 60, an hour takes a minute.
        max_delay_secs: How much earlier than the latest time a row may be and still be on time.
        file_format: See `ReadTables`.

    Raises:
        ValueError: An argument is wrong, the table has no such column of times or, when the pipeline runs, something
            in it cannot be read.
        FileNotFoundError: Nothing matches.
    """

    path: str
    rate: float | None = 1000.0
    time_column: str | None = None
    speedup: float | None = None
    max_delay_secs: float = 0.0
    file_format: str | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "speedup"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number above 0 or None, got {value}")
        if self.speedup is not None and self.time_column is None:
            raise ValueError("time_column: expected one with speedup, got none")

    def expand(self, pbegin: beam.pvalue.PBegin) -> beam.PCollection[dict[str, Any]]:
        file_format = format_of(self.path, self.file_format)
        schema = launch_schema(self.path, file_format)
        if self.time_column is not None:
            _check_times(self.path, schema, self.time_column)
        replay = _Replay(self, file_format, schema)
        return (
            pbegin
            | "Table" >> beam.Create([self.path], reshuffle=False)
            | "Launch" >> beam.Map(replay.launch)
            | "Replay" >> beam.ParDo(replay).with_output_types(dict[str, Any])
        )


def _check_times(path: str, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise ValueError(f"time_column: expected a column of {path}, got {column}; it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or is_text(kind)):
        raise ValueError(f"time_column: expected timestamps, dates or ISO 8601 text, got {kind} in {column}")


class _Replay(beam.DoFn, Offsets):
    """`_Element` in, rows out; offsets are row numbers."""

    def __init__(self, table: ReplayTable, file_format: str, schema: pa.Schema) -> None:
        self._table = table
        self._file_format = file_format
        self._schema = schema
        self._rows: _Rows | None = None
        self._num_records = Metrics.counter(NAMESPACE, "num_records")

    def launch(self, path: str) -> _Element:
        """When the pace begins, on both clocks."""
        rows = self._open(0, max_rows=1)
        return _now(), int(rows.times[0]) if self._table.speedup is not None and rows.more() else 0

    def _open(self, first_row: int, max_rows: int = 4096) -> _Rows:
        paths = match_files(self._table.path, self._file_format)
        tables = tables_from(paths, self._file_format, self._schema, first_row, max_rows)
        return _Rows(tables, self._table.time_column, first_row)

    def initial_restriction(self, element: _Element) -> OffsetRange:
        return OffsetRange(0, FOREVER)

    @beam.DoFn.unbounded_per_element()
    def process(
        self, element: _Element, tracker: Any = RESTRICTION, watermark: Any = WATERMARK
    ) -> Iterator[TimestampedValue]:
        first_row = tracker.current_restriction().start
        # Where the last call of this step left off, unless another worker went on there.
        rows = self._rows if self._rows and self._rows.position == first_row else self._open(first_row)
        self._rows = None
        deadline = _now() + _BUNDLE_SECS
        while rows.more():
            count, wait = self._due(rows, element)
            if count:
                if not tracker.try_claim(rows.position + count - 1):
                    return
                block, times = rows.take(count)
                for row, micros in zip(block, times, strict=True):
                    yield TimestampedValue(row, Timestamp(micros=micros))
                self._num_records.inc(count)
                advance(watermark, Timestamp(micros=max(times)) - Duration(self._table.max_delay_secs))
            if _now() >= deadline:
                self._rows = rows
                tracker.defer_remainder(Duration(wait))
                return
            if not count:
                _sleep(min(max(wait, _TICK_SECS), 1.0))
        tracker.try_claim(FOREVER)

    def _due(self, rows: _Rows, element: _Element) -> tuple[int, float]:
        """How many of the rows at hand are due; if none, in how many seconds one is."""
        launched, first_time = element
        elapsed = _now() - launched
        if self._table.speedup is not None:
            # Rows stay in their order, so that one waits for those before it.
            in_order = np.maximum.accumulate(rows.times)
            count = int(np.searchsorted(in_order, first_time + 1e6 * elapsed * self._table.speedup, side="right"))
            wait = (in_order[0] - first_time) / 1e6 / self._table.speedup - elapsed
        elif self._table.rate is not None:
            count = int(elapsed * self._table.rate) + 1 - rows.position
            wait = rows.position / self._table.rate - elapsed
        else:
            count, wait = _BLOCK_ROWS, 0.0
        count = min(max(count, 0), _BLOCK_ROWS, len(rows.times))
        return count, 0.0 if count else float(wait)


class _Rows:
    """The rows of tables, block by block.

    Args:
        tables: Of the rows, in order.
        time_column: Of their event times.
        position: Number of the first row.
    """

    def __init__(self, tables: Iterator[pa.Table], time_column: str | None, position: int) -> None:
        self.position = position
        self.times = np.empty(0, np.int64)  # of the rows at hand, in microseconds
        self._tables = tables
        self._time_column = time_column
        self._block: list[dict[str, Any]] = []
        self._last_time: int | None = None

    def more(self) -> bool:
        """Whether there is a row; it is at hand then."""
        while not len(self.times):
            table = next(self._tables, None)
            if table is None:
                return False
            self._block = table.to_pylist()
            self.times = self._times_of(table)
        return True

    def _times_of(self, table: pa.Table) -> np.ndarray:
        if self._time_column is None:
            return np.zeros(table.num_rows, np.int64)  # it is not known before they leave
        column = table[self._time_column]
        if is_text(column.type):
            column, bad = cast_cells(column, pa.timestamp("us"))
            if len(bad):
                raise ValueError(f"{self._time_column}: expected ISO 8601 times, got other text in {len(bad)} rows")
        micros = column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False).cast(pa.int64())
        if micros.null_count:
            micros = pc.fill_null_forward(micros.combine_chunks())
            if self._last_time is not None:
                micros = pc.fill_null(micros, self._last_time)
            micros = pc.fill_null(pc.fill_null_backward(micros), int(1e6 * _now()))
        times = micros.to_numpy()
        self._last_time = int(times[-1]) if len(times) else self._last_time
        return times

    def take(self, count: int) -> tuple[list[dict[str, Any]], list[int]]:
        """The next rows and their times, which are then no longer at hand."""
        rows = self._block[:count]
        times = [int(1e6 * _now())] * count if self._time_column is None else self.times[:count].tolist()
        self._block, self.times = self._block[count:], self.times[count:]
        self.position += count
        return rows, times


def _now() -> float:
    return time.time()


def _sleep(secs: float) -> None:
    time.sleep(secs)


def read_from(uri: str, **arguments: Any) -> ReplayTable:
    """The replay that `replay:PATH?name=value&...` names.

    Names are the arguments of `ReplayTable`; `rate=none` is as fast as can be.

    Args:
        uri: Of the table.
        arguments: More of them, which a parameter of the URI overrides.

    Raises:
        ValueError: A part of the URI is wrong.
    """
    parameters: dict[str, Callable[[str], Any]] = {
        "rate": lambda text: None if text == "none" else positive(text),
        "time_column": str,
        "speedup": positive,
        "max_delay_secs": seconds,
        "file_format": str,
    }
    path, values, settings = parse_uri(uri, "replay", parameters)
    if settings:
        raise ValueError(f"replay:{path}: {next(iter(settings))}: expected one of {', '.join(sorted(parameters))}")
    return ReplayTable(path, **{**arguments, **values})
