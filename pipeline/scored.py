"""Scored tables and records on their way into windowed products: read in batches, folded before they are shuffled."""

from __future__ import annotations

import datetime
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import create as windowed_value

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.records import json_rows
from pipeline.rows import Reading, form_of, payload, read_elements
from vae_model.tables import as_levels, cast_cells

_MAX_WAITING = 4096  # elements that are read at once
_MAX_WAITING_ROWS = 65_536
_MAX_PARTIALS = 4096  # windows and keys folded at a time
_TYPES = {
    "anomaly_score": pa.float32(),
    "anomaly_p_value": pa.float32(),
    "is_anomaly": pa.bool_(),
    "model_version": pa.string(),
}


# ---- reading -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Scored rows of one key.

    Args:
        columns: The score columns asked for, without their prefix; no nulls.
        event_times: `(n,)` int64, microseconds since 1970.
        source: The rows as they came: a table, or records.
    """

    columns: pa.Table
    event_times: np.ndarray
    source: Any

    def numbers(self, name: str) -> np.ndarray:
        """`(n,)` a score column."""
        return self.columns.column(name).to_numpy()

    def take(self, rows: np.ndarray) -> Batch:
        """Some rows, by their numbers."""
        source = self.source.take(rows) if isinstance(self.source, pa.Table) else [self.source[row] for row in rows]
        return Batch(self.columns.take(rows), self.event_times[rows], source)

    def texts(self) -> list[str]:
        """Each row as one JSON object."""
        if isinstance(self.source, pa.Table):
            return json_rows(self.source).to_pylist()
        return [payload(record)[0] for record in self.source]


@dataclass(frozen=True)
class ScoreReader:
    """Reads what `ScoreTables` and `ScoreRecords` give, keyed or not.

    Args:
        columns: Score columns to read, without their prefix.
        prefix: Of their names.
        key: Column whose text is the key; without it, the elements' own key, or None.
    """

    columns: Sequence[str]
    prefix: str = ""
    key: str | None = None

    def read(self, elements: Sequence[Any], event_times: Sequence[int]) -> Iterator[tuple[str | None, Batch]]:
        """The elements' rows by key.

        Raises:
            ValueError: An element is no scored record or table.
        """
        kinds: dict[type, list[int]] = {}
        keys = [element[0] if is_keyed(element) else None for element in elements]
        values = [element[1] if is_keyed(element) else element for element in elements]
        for place, value in enumerate(values):
            kinds.setdefault(type(value), []).append(place)
        for kind, places in kinds.items():
            if kind is pa.Table:
                for place in places:
                    table = values[place]
                    times = np.full(table.num_rows, event_times[place], np.int64)
                    batch = Batch(self._table_columns(table), times, table)
                    yield from self._by_key(batch, None, _text(keys[place]), table)
            else:
                records = [values[place] for place in places]
                columns, key = self._record_columns(kind, records)
                batch = Batch(columns, np.array([event_times[place] for place in places], np.int64), records)
                if key is None and any(keys[place] is not None for place in places):
                    key = pa.array([_text(keys[place]) for place in places], pa.string())
                yield from self._by_key(batch, key, None, None)

    def _by_key(
        self, batch: Batch, keys: pa.Array | None, key: str | None, table: pa.Table | None
    ) -> Iterator[tuple[str | None, Batch]]:
        if not batch.columns.num_rows:
            return
        if table is not None and self.key is not None:
            if self.key not in table.column_names:
                raise ValueError(
                    f"{self.key}: named as the key, but the table has only {', '.join(table.column_names)}"
                )
            keys = as_levels(table.column(self.key)).combine_chunks()
        if keys is None:
            yield key, batch
            return
        encoded = keys.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        codes = encoded.indices.fill_null(len(names)).to_numpy()
        order = np.argsort(codes, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            code = codes[rows[0]]
            yield names[code] if code < len(names) else None, batch.take(rows)

    def _table_columns(self, table: pa.Table) -> pa.Table:
        arrays = []
        for name in self.columns:
            own = self.prefix + name
            if own not in table.column_names:
                raise ValueError(f"{own}: expected such a column in every scored table, got none; is the prefix right?")
            arrays.append(cast_cells(table.column(own), _TYPES[name])[0])
        return self._complete(pa.table(arrays, list(self.columns)))

    def _record_columns(self, kind: type, records: list[Any]) -> tuple[pa.Table, pa.Array | None]:
        form = form_of(kind)
        if form is None:
            raise ValueError(f"expected scored records or tables, got elements of type {kind.__name__}")
        wanted = [
            Reading(self.prefix + name, pa.float64() if pa.types.is_floating(_TYPES[name]) else _TYPES[name])
            for name in self.columns
        ]
        if self.key is not None:
            wanted.append(Reading(self.key, pa.string()))
        columns = read_elements(form, records, wanted)
        for fault in columns.faults.values():
            if fault.column != self.key or self.key is None:  # a key that is no text is none
                raise ValueError(f"{fault.column or 'record'}: expected scored records, got {fault.error_type}")
        keys = columns.arrays[-1] if self.key is not None else None
        arrays = [
            array.cast(_TYPES[name], safe=False)
            for name, array in zip(self.columns, columns.arrays, strict=False)  # the key comes last
        ]
        return self._complete(pa.table(arrays, list(self.columns))), keys

    def _complete(self, columns: pa.Table) -> pa.Table:
        for name in columns.column_names:
            missing = columns.column(name).null_count
            if missing:
                raise ValueError(
                    f"{self.prefix}{name}: expected it in every scored record, got {missing:,} of {columns.num_rows:,} "
                    "without; is the prefix right?"
                )
        return columns


def is_keyed(element: Any) -> bool:
    """Whether an element is a key with its value: a plain tuple of two."""
    return type(element) is tuple and len(element) == 2


def _text(key: Any) -> str | None:
    if isinstance(key, bytes):
        return key.decode(errors="backslashreplace")
    return key if key is None else str(key)


# ---- folding -------------------------------------------------------------------------------------


class Reader(Protocol):
    """Turns elements into batches."""

    def read(self, elements: Sequence[Any], event_times: Sequence[int]) -> Iterator[tuple[str | None, Any]]:
        """The elements' rows in batches, each with its key."""
        ...


class Fold(ABC):
    """What becomes of the batches of one window and key.

    Args:
        reader: Gives the batches.
    """

    type: Any = Any  # of accumulators

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @abstractmethod
    def create(self) -> Any:
        """An empty accumulator."""

    @abstractmethod
    def add(self, accumulator: Any, batch: Any) -> Any:
        """The accumulator with a batch; it may be changed in place."""

    def merge(self, accumulator: Any, other: Any) -> Any:
        """Both; the first may be changed in place."""
        return accumulator + other

    def is_empty(self, accumulator: Any) -> bool:
        """Whether it need not be sent on."""
        return False


class FoldInBundle(beam.DoFn):
    """Folds the elements of a Beam bundle; `(key, accumulator)` leave as it ends, one per window and key.

    Keys leave as JSON text, which has a deterministic coder and tells none from the text "None".

    Args:
        fold: What to do.
    """

    def __init__(self, fold: Fold) -> None:
        self._fold = fold

    def start_bundle(self) -> None:
        self._waiting: dict[Any, tuple[list[Any], list[int]]] = {}
        self._num_waiting = self._num_rows = 0
        self._partials: dict[Any, list[Any]] = {}

    def process(
        self, element: Any, timestamp: Any = beam.DoFn.TimestampParam, window: Any = beam.DoFn.WindowParam
    ) -> Iterator[Any]:
        elements, times = self._waiting.setdefault(window, ([], []))
        elements.append(element)
        times.append(timestamp.micros)
        self._num_waiting += 1
        value = element[1] if is_keyed(element) else element
        self._num_rows += value.num_rows if isinstance(value, pa.Table) else 1
        if self._num_waiting >= _MAX_WAITING or self._num_rows >= _MAX_WAITING_ROWS:
            self._read()
            if len(self._partials) >= _MAX_PARTIALS:
                yield from self._send()

    def finish_bundle(self) -> Iterator[Any]:
        self._read()
        yield from self._send()

    def _read(self) -> None:
        for window, (elements, times) in self._waiting.items():
            earliest = min(times)
            for key, batch in self._fold.reader.read(elements, times):
                partial = self._partials.setdefault((window, key), [self._fold.create(), earliest])
                partial[0] = self._fold.add(partial[0], batch)
                partial[1] = min(partial[1], earliest)
        self._waiting, self._num_waiting, self._num_rows = {}, 0, 0

    def _send(self) -> Iterator[Any]:
        partials, self._partials = self._partials, {}
        for (window, key), (accumulator, earliest) in partials.items():
            if not self._fold.is_empty(accumulator):
                yield windowed_value((json.dumps(key), accumulator), earliest, (window,))


class _Merge(beam.CombineFn):
    def __init__(self, fold: Fold) -> None:
        self._fold = fold

    def create_accumulator(self) -> Any:
        return self._fold.create()

    def add_input(self, accumulator: Any, partial: Any) -> Any:
        return self._fold.merge(accumulator, partial)

    def merge_accumulators(self, accumulators: Any) -> Any:
        merged = self._fold.create()
        for accumulator in accumulators:
            merged = self._fold.merge(merged, accumulator)
        return merged

    def extract_output(self, accumulator: Any) -> Any:
        return accumulator

    def get_accumulator_coder(self) -> Any:
        return beam.coders.registry.get_coder(self._fold.type)


class FoldPerWindow(beam.PTransform):
    """`(key as JSON, accumulator)` per window and key: folded in each Beam bundle first, so that little is shuffled."""

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self._fold = fold

    def expand(self, elements: beam.PCollection[Any]) -> beam.PCollection[Any]:
        kind = tuple[str, self._fold.type]  # type: ignore[name-defined]
        return (
            elements
            | "FoldInBundle" >> beam.ParDo(FoldInBundle(self._fold)).with_output_types(kind)
            | "Merge" >> beam.CombinePerKey(_Merge(self._fold)).with_output_types(kind)
        )


# ---- what comes out ------------------------------------------------------------------------------


def rfc3339(micros: int) -> str | None:
    """Microseconds since 1970 as text in UTC; None beyond the years 1 to 9999, as Beam's own least and greatest."""
    try:
        time = _EPOCH + datetime.timedelta(microseconds=micros)
    except OverflowError:
        return None
    return time.isoformat().replace("+00:00", "Z")


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def bounds(window: Any) -> dict[str, str | None]:
    """Start and end of a window as text; None of the global one."""
    ends = {name: getattr(window, name, None) for name in ("start", "end")}
    return {f"window_{name}": None if end is None else rfc3339(end.micros) for name, end in ends.items()}


def refuse_endless(name: str, elements: beam.PCollection[Any]) -> None:
    """Raises `ValueError` where the elements' window never ends."""
    if not elements.is_bounded and isinstance(elements.windowing.windowfn, GlobalWindows):
        raise ValueError(f"{name}: expected windows that end, got an unbounded input in the global window; window it")


def table_schema(**columns: Any) -> dict[str, Any]:
    """A BigQuery schema, for `WriteToBigQuery`, from names and types; a list holds the fields of repeated records."""
    fields = []
    for name, kind in columns.items():
        if isinstance(kind, dict):
            fields.append({"name": name, "type": "RECORD", "mode": "REPEATED", **table_schema(**kind)})
        else:
            fields.append({"name": name, "type": kind, "mode": "NULLABLE"})
    return {"fields": fields}
