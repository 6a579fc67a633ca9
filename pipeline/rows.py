"""Records as they come (dicts, rows, JSON, Avro, Pub/Sub messages) to Arrow columns, and scores back onto them."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import itertools
import json
import math
import numbers
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from operator import itemgetter
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.ml.anomaly.base import AnomalyPrediction, AnomalyResult
from apache_beam.utils.timestamp import Timestamp

from pipeline.avro import AvroReader, AvroWriter
from pipeline.records import MAX_LINE_BYTES, json_rows, parse_object
from vae_model.reasons import REASON_TYPE
from vae_model.schema import ConstantFeature, Feature, NumericFeature, TableSchema, TimestampFeature
from vae_model.tables import cast_cells, is_text

INPUT_FORMATS = (None, "json", "avro")
OUTPUTS = ("record", "json", "avro", "anomaly_result")
MAX_LEVELS = 200  # of a JSON text; whoever reads it after us recurses


class Fault(NamedTuple):
    """Why a record cannot be scored."""

    column: str | None
    error_type: str
    error: str


# A column that makes a row strange: no `beam.Row`, which Beam's Parquet sink does not take within a list, and no type
# `str | None`, which its schemas do not know.
_REASON_TYPES: dict[pa.DataType, Any] = {pa.float32(): np.float32, pa.string(): Optional[str]}  # noqa: UP045
Reason: Any = NamedTuple("Reason", [(field.name, _REASON_TYPES[field.type]) for field in REASON_TYPE.value_type])  # type: ignore[misc]


# ---- what is read ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the cells of one feature are read.

    Args:
        name: Of the feature.
        kind: Type of the column that they become.
        units: Per second, where the training table held durations.
    """

    name: str
    kind: pa.DataType
    units: int | None = None

    @property
    def wanted(self) -> str:
        """In words."""
        if pa.types.is_floating(self.kind):
            return "a number"
        return "a time" if pa.types.is_timestamp(self.kind) or pa.types.is_time(self.kind) else str(self.kind)


def readings(schema: TableSchema) -> list[Reading]:
    """How each feature is read: numbers as float64, times in microseconds, levels as the training table had them."""
    return [_reading(feature, schema.arrow_type(feature.name)) for feature in schema.features]


def _reading(feature: Feature, trained: pa.DataType) -> Reading:
    if pa.types.is_dictionary(trained):
        trained = trained.value_type
    if isinstance(feature, NumericFeature) or (isinstance(feature, ConstantFeature) and feature.number is not None):
        units = _PER_SECOND[trained.unit] if pa.types.is_duration(trained) else None
        return Reading(feature.name, pa.float64(), units)
    if isinstance(feature, TimestampFeature):
        if pa.types.is_time(trained):
            return Reading(feature.name, pa.time64("us"))
        zoned = pa.types.is_timestamp(trained) and trained.tz
        return Reading(feature.name, pa.timestamp("us", "UTC" if zoned else None))
    plain = pa.types.is_primitive(trained) or pa.types.is_decimal(trained)
    return Reading(feature.name, trained if plain and not pa.types.is_float16(trained) else pa.string())


_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


# ---- cells -------------------------------------------------------------------------------------


def read_column(values: Sequence[Any], reading: Reading) -> tuple[pa.Array, dict[int, str]]:
    """Python values as a column, and what is wrong with those that mean no such value; these are null.

    None, NaN and NaT are missing. What becomes of a value does not depend on its neighbours.
    """
    kind = reading.kind
    try:
        # Arrow cuts 1.5 to an integer, and takes numbers for times.
        if kind in _EXACT or set(map(type, values)) <= _own_types(kind):
            return pa.array(values, kind), {}
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    if not is_text(kind) and set(map(type, values)) <= {str, _NONE}:
        try:
            column, misfits = cast_cells(pa.chunked_array([pa.array(values, pa.string())]), kind)
            wrong = {row: f"expected {reading.wanted}, got {shown(values[row])}" for row in misfits.tolist()}
            return column.combine_chunks(), wrong
        except UnicodeEncodeError:  # half a surrogate pair is no text
            pass
    plain = [_plain(value, reading) for value in values]
    allowed = _allowed(kind)
    column = pa.nulls(len(values), kind)
    bad = [row for row, (own, _) in enumerate(plain) if own not in allowed and own is not _NONE]
    for own in {own for own, _ in plain} & allowed:
        part = [value if other is own else None for other, value in plain]
        cells, misfits = cast_cells(pa.chunked_array([pa.array(part, _ARROW[own])]), kind)
        column = pc.coalesce(column, cells.combine_chunks())
        bad += misfits.tolist()
    return column, {row: f"expected {reading.wanted}, got {shown(values[row])}" for row in bad}


_EXACT = {pa.float64(), pa.string(), pa.bool_()}
_NONE = type(None)


def _own_types(kind: pa.DataType) -> set[type]:
    if pa.types.is_integer(kind):
        return {int, _NONE}
    return {datetime.datetime, pd.Timestamp, _NONE} if pa.types.is_timestamp(kind) else set()


class _Aware(datetime.datetime):
    """Stands for times of known zone."""


_ARROW: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    datetime.datetime: pa.timestamp("us"),
    _Aware: pa.timestamp("us", "UTC"),
    datetime.date: pa.date32(),
    datetime.time: pa.time64("us"),
}


def _allowed(kind: pa.DataType) -> set[type]:
    if is_text(kind):
        return set(_ARROW)
    if pa.types.is_time(kind):
        return {str, datetime.time}
    if pa.types.is_temporal(kind):
        return {str, datetime.datetime, _Aware, datetime.date}
    return {str, bool, int, float}


_FINER = ("ns", "ps", "fs", "as")  # than microseconds
_MISSING: tuple[type, Any] = (_NONE, None)
_WRONG: tuple[type, Any] = (object, None)


def _plain(value: Any, reading: Reading) -> tuple[type, Any]:
    """One of the types above, and a value of it that means the same; or `_MISSING`, or `_WRONG`."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or value is pd.NA or value is pd.NaT:
        return _MISSING
    if isinstance(value, np.datetime64 | np.timedelta64):
        if np.isnat(value):
            return _MISSING
        whole = value.astype("datetime64[us]" if isinstance(value, np.datetime64) else "timedelta64[us]")
        if np.datetime_data(value.dtype)[0] not in _FINER and whole.astype(value.dtype) != value:
            return _WRONG  # beyond 64 bits, NumPy begins again
        if isinstance(value, np.datetime64) and not isinstance(whole.item(), datetime.datetime):
            return _WRONG  # beyond the years 1 to 9999
        value = whole
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, int):
        return (int, int(value)) if -(2**63) <= value < 2**63 else _digits(value)
    if isinstance(value, float):
        return (float, float(value)) if value == value else _MISSING
    if isinstance(value, Decimal):
        if value.is_nan():
            return _MISSING
        short = value.is_finite() and abs(value.adjusted()) < 400
        return str, format(value, "f") if short else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return str, bytes(value).decode()
        except UnicodeDecodeError:
            return _WRONG
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair is no text
            return _WRONG
        return str, str.__str__(value)
    if isinstance(value, Timestamp):  # of Beam
        return _Aware, value.to_utc_datetime(has_tz=True)
    if isinstance(value, datetime.datetime):
        return _Aware if value.utcoffset() is not None else datetime.datetime, value
    if isinstance(value, datetime.date):
        return datetime.date, value
    if isinstance(value, datetime.time):
        return (datetime.time, value) if value.tzinfo is None else _WRONG
    if isinstance(value, datetime.timedelta):
        return (float, value / datetime.timedelta(seconds=1) * reading.units) if reading.units else _WRONG
    if isinstance(value, numbers.Rational):
        try:
            return float, float(value)
        except OverflowError:
            return _WRONG
    return (str, str(value)) if isinstance(value, uuid.UUID) else _WRONG


def _digits(value: int) -> tuple[type, Any]:
    try:
        return str, str(int(value))
    except ValueError:  # more than Python writes
        return _WRONG


def shown(value: Any) -> str:
    """A value short enough for a message."""
    try:
        return ascii(value[:60] if isinstance(value, str | bytes | list | tuple) else value)[:60]
    except Exception:  # whatever somebody's own __repr__ raises
        return f"a {type(value).__name__}"


# ---- records -----------------------------------------------------------------------------------


class Columns(NamedTuple):
    """The features of n records."""

    arrays: list[pa.Array]
    faults: dict[int, Fault]  # by record; its cells mean nothing


def read_records(records: Sequence[dict[Any, Any]], wanted: Sequence[Reading]) -> Columns:
    """The features of dicts, column by column; an absent key is a missing value."""
    names = [reading.name for reading in wanted]
    try:
        # One list: a tuple for each record would live until the garbage collector has seen it.
        cells = list(itertools.chain.from_iterable(map(_getter(names), records)))
    except KeyError:
        cells = [record.get(name) for record in records for name in names]
    return _columns(cells, wanted, lambda row: records[row])


def read_json(texts: Sequence[bytes], wanted: Sequence[Reading], taken: Sequence[str] = ()) -> Columns:
    """The features of JSON objects; an absent key is a missing value.

    Args:
        texts: One object each.
        wanted: What is read of them.
        taken: Names that they must not have, for scores are to be added under these.
    """
    names = [reading.name for reading in wanted]
    get = _getter(names)
    loads = orjson.loads if max(map(len, texts), default=0) <= MAX_LINE_BYTES else _loads
    cells: list[Any] = []
    faults: dict[int, Fault] = {}
    for row, text in enumerate(texts):
        try:
            record = loads(text)
            if len(text) > 2 * MAX_LEVELS and _is_deep(text):
                raise RecursionError
            cells += get(record)
        except (KeyError, TypeError, ValueError, RecursionError):
            record, fault = _parse_message(text)
            cells += map(record.get, names)
            if fault:
                faults[row] = fault
        # Now, for no record is kept: so many at once keep the garbage collector busy.
        if not record.keys().isdisjoint(taken):
            faults[row] = name_clash(record, taken)
    columns = _columns(cells, wanted, lambda row: _parse_message(texts[row])[0], texts)
    return Columns(columns.arrays, {**columns.faults, **faults})


def _getter(names: list[str]) -> Callable[[dict[Any, Any]], Sequence[Any]]:
    if len(names) == 1:
        return lambda record: (record[names[0]],)
    return itemgetter(*names)


def _columns(
    cells: list[Any],
    wanted: Sequence[Reading],
    record_at: Callable[[int], dict[Any, Any]],
    texts: Sequence[bytes] | None = None,
) -> Columns:
    """Cells, record after record, as columns."""
    arrays: list[pa.Array] = []
    faults: dict[int, Fault] = {}
    for place, reading in enumerate(wanted):
        values = cells[place :: len(wanted)]
        if texts is not None and reading.kind != pa.float64() and float in set(map(type, values)):
            # orjson makes floats of integers beyond 64 bits; here their digits count.
            values = [
                parse_object(text)[reading.name] if type(value) is float and abs(value) >= 2**63 else value
                for value, text in zip(values, texts, strict=True)
            ]
        array, wrong = read_column(values, reading)
        arrays.append(array)
        for row, error in wrong.items():
            faults.setdefault(row, Fault(reading.name, "wrong_type", f"{reading.name}: {error}"))
    names = [reading.name for reading in wanted]
    for row in _empty_rows(arrays):
        if record_at(row).keys().isdisjoint(names):
            error = f"{names[0]}: the record has no column that the model reads"
            faults.setdefault(row, Fault(names[0], "missing_column", error))
    return Columns(arrays, faults)


def _loads(text: bytes) -> Any:
    if len(text) > MAX_LINE_BYTES:
        raise ValueError("too long")  # as `parse_object` says in more words
    return orjson.loads(text)


def _parse_message(text: bytes) -> tuple[dict[str, Any], Fault | None]:
    try:
        record = _loads(text)
    except (ValueError, RecursionError):  # it may be what Python takes: NaN, infinity, numbers out of range
        record = None
    try:
        if type(record) is not dict:
            record = parse_object(text)
        if _is_deep(text):
            raise ValueError(f"one of more than {MAX_LEVELS} levels")
        return record, None
    except (ValueError, RecursionError) as error:
        return {}, Fault(None, "malformed_record", f"expected a JSON object, got {error}")


def _is_deep(text: bytes) -> bool:
    """Whether a JSON text has more than `MAX_LEVELS`, which other parsers, Python's own too, may refuse."""
    if text.rfind(b"{") <= 0 and ord("[") not in text:  # as most are, and faster to find out than numbers
        return False
    if text.count(b"{") + text.count(b"[") <= MAX_LEVELS:
        return False
    brackets = _TEXT.sub(b"", text).translate(None, _NO_BRACKETS)
    opens = np.isin(np.frombuffer(brackets, np.uint8), np.frombuffer(b"{[", np.uint8))
    return bool(np.cumsum(np.where(opens, 1, -1)).max(initial=0) > MAX_LEVELS)


_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


def name_clash(record: Mapping[Any, Any], taken: Sequence[str]) -> Fault:
    """Of a record that has a column where a score is to be."""
    name = next(name for name in taken if name in record)
    return Fault(name, "name_clash", f"{name}: the record has such a column already; choose a prefix for the scores")


def _empty_rows(arrays: list[pa.Array]) -> list[int]:
    """The records without any value."""
    empty = None
    for array in arrays:
        if not array.null_count:
            return []
        null = array.is_null().to_numpy(zero_copy_only=False)
        empty = null if empty is None else empty & null
    return [] if empty is None else np.flatnonzero(empty).tolist()


# ---- forms of elements -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Form:
    """Elements of one Python type: what they hold, and what they become with scores.

    Args:
        kind: What `content` gives: a "record" (a dict), or the bytes of a "json" or "avro" record.
        content: Of an element.
        finish: An element, and its scored record (or bytes of JSON or Avro), to what comes out.
        is_row: Whether that is a `beam.Row`.
    """

    kind: str
    content: Callable[[Any], Any]
    finish: Callable[[Any, Any], Any]
    is_row: bool = False


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # refused later, as no UTF-8


def _data(message: PubsubMessage) -> bytes:
    return message.data or b""


def _with_data(message: PubsubMessage, data: bytes) -> PubsubMessage:
    return PubsubMessage(data, message.attributes, ordering_key=message.ordering_key or "")


def _row(_: Any, record: dict[str, Any]) -> beam.Row:
    return beam.Row(**record)


def _itself(value: Any) -> Any:
    return value


def _scored(_: Any, record: Any) -> Any:
    return record


def form_of(kind: type, avro: bool = False) -> Form | None:
    """How elements of a type are read and written, or None where they are no records.

    Args:
        kind: The type.
        avro: Whether bytes and messages hold Avro, not JSON.
    """
    if kind is dict:
        return Form("record", _itself, _scored)
    if issubclass(kind, beam.Row):
        return Form("record", vars, _row, is_row=True)
    if issubclass(kind, tuple) and hasattr(kind, "_asdict"):
        return Form("record", lambda element: element._asdict(), _row, is_row=True)
    if dataclasses.is_dataclass(kind):
        return Form("record", _fields, _row, is_row=True)
    if issubclass(kind, Mapping):
        return Form("record", dict, _scored)
    if issubclass(kind, PubsubMessage):
        if avro:
            return Form("avro", _data, _with_scored)
        return Form("json", _data, _with_data)
    if issubclass(kind, bytes | bytearray):
        return Form("avro" if avro else "json", bytes, _scored)
    if issubclass(kind, str) and not avro:
        return Form("json", _encoded, lambda _, text: text.decode())
    return None


def _fields(element: Any) -> dict[str, Any]:
    """Of a dataclass, which with slots has no `vars`."""
    return {field.name: getattr(element, field.name, None) for field in dataclasses.fields(element)}


def _with_scored(message: PubsubMessage, scored: Any) -> PubsubMessage:
    return _with_data(message, scored if isinstance(scored, bytes) else json_text(scored).encode())


class Batch(NamedTuple):
    """Elements of one form, and what they hold.

    Args:
        form: Of all.
        elements: As they came.
        contents: Dicts, or bytes of JSON or Avro.
        records: Dicts; for JSON, which is read column by column, the texts again.
    """

    form: Form
    elements: Sequence[Any]
    contents: Sequence[Any]
    records: Sequence[Any]

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of them."""
        return Batch(self.form, *([column[row] for row in rows] for column in self[1:]))

    def read(self, wanted: Sequence[Reading], taken: Sequence[str] = ()) -> Columns:
        """Their features; see `read_json`."""
        if self.form.kind == "json":
            return read_json(self.contents, wanted, taken)
        return read_records(self.records, wanted)


def read_batch(form: Form, elements: Sequence[Any], avro: AvroReader | None) -> tuple[Batch, dict[int, Fault]]:
    """The elements with their records; one that has none has {}, and a fault."""
    contents, faults = _read_each(form.content, elements)
    records: Sequence[Any] = contents
    if form.kind == "avro":
        assert avro is not None
        records, faults = _read_each(avro.read, contents)
    return Batch(form, elements, contents, records), faults


def read_elements(
    form: Form, elements: Sequence[Any], wanted: Sequence[Reading], avro: AvroReader | None = None
) -> Columns:
    """The features of elements of one form; see `read_batch`."""
    batch, faults = read_batch(form, elements, avro)
    columns = batch.read(wanted)
    return Columns(columns.arrays, {**columns.faults, **faults})


def _read_each(read: Callable[[Any], Any], sources: Sequence[Any]) -> tuple[list[Any], dict[int, Fault]]:
    try:
        return list(map(read, sources)), {}
    except ValueError:
        pass
    found: list[Any] = []
    faults: dict[int, Fault] = {}
    for row, source in enumerate(sources):
        try:
            found.append(read(source))
        except ValueError as error:
            found.append({})
            faults[row] = Fault(None, "malformed_record", str(error))
    return found, faults


# ---- text --------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """Any Python value as JSON: NaN is null, infinity and what JSON lacks are strings, bytes are base64.

    Integers of more digits than Python writes are hexadecimal strings.
    """
    try:
        return json.dumps(value, default=_json_default, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        pass
    try:
        return json.dumps(_cleaned(value, 0), default=_json_default)
    except (ValueError, TypeError, RecursionError):
        return json.dumps(shown(value))


def _json_default(value: Any) -> Any:
    if isinstance(value, Mapping | beam.Row | tuple | list | set | frozenset):
        return _cleaned(value, 0)
    if isinstance(value, np.generic):
        return _cleaned(value.item(), 0) if not isinstance(value, np.datetime64 | np.timedelta64) else str(value)
    if isinstance(value, np.ndarray):
        return _cleaned(value.tolist(), 0)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Enum):
        return _cleaned(value.value, 0)
    return str(value) if isinstance(value, Decimal | uuid.UUID | datetime.timedelta | Timestamp) else shown(value)


def _cleaned(value: Any, depth: int) -> Any:
    if depth > MAX_LEVELS:
        return "..."
    if isinstance(value, float):
        return value if math.isfinite(value) else None if value != value else str(value)
    if isinstance(value, int):
        return value if _digits(value) != _WRONG else hex(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, beam.Row):
        value = vars(value)
    if isinstance(value, Mapping):
        names = (_cleaned(key, depth) if isinstance(key, int) else key for key in value)
        return {str(name): _cleaned(item, depth + 1) for name, item in zip(names, value.values(), strict=True)}
    if isinstance(value, list | tuple | set | frozenset):
        return [_cleaned(item, depth + 1) for item in value]
    return value


def payload(element: Any, avro: bool = False) -> tuple[str, str]:
    """An element as text for a letter, and the format of that text: json or base64.

    Args:
        element: Of any type.
        avro: Whether bytes and messages hold Avro, which may look like text.
    """
    if isinstance(element, PubsubMessage):
        element = _data(element)
    if isinstance(element, str):
        return element.encode(errors="backslashreplace").decode(), "json"
    if isinstance(element, bytes | bytearray):
        try:
            if not avro:
                return bytes(element).decode(), "json"
        except UnicodeDecodeError:
            pass
        return base64.b64encode(element).decode(), "base64"
    # As a row, for `json` takes named tuples for lists, also those within.
    if isinstance(element, tuple) and hasattr(element, "_asdict"):
        element = beam.Row(**element._asdict())
    elif dataclasses.is_dataclass(element) and not isinstance(element, type):
        element = beam.Row(**_fields(element))
    return json_text(element), "json"


# ---- scores onto records -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Writer:
    """Puts scores onto records.

    Args:
        output: See `ScoreRecords`.
        columns: See there.
        prefix: See there.
        avro: Writes Avro, for that output.
    """

    output: str = "record"
    columns: tuple[str, ...] | None = None
    prefix: str = ""
    avro: AvroWriter | None = None

    def write(self, batch: Batch, scores: pa.Table, limit: float) -> list[Any]:
        """What each element becomes, or a `Fault`.

        Args:
            batch: The elements.
            scores: The score columns, one line per element.
            limit: The threshold in force, in nats.
        """
        form, output = batch.form, self.output
        if output == "anomaly_result":
            return self._results(_exact(batch), scores, limit)
        if output == "avro":
            scored = self._scored_avro(batch, scores)
        elif form.kind == "json":
            scored = self._scored_texts(batch, scores)
        else:
            scored = self._scored_records(batch.records, scores, form.is_row and output == "record")
            if output == "json":
                scored = [one if type(one) is Fault else json_text(one).encode() for one in scored]
        if output == "json" or form.finish is _scored:
            return scored
        finish: Callable[[Any, Any], Any] = form.finish
        return [
            one if type(one) is Fault else finish(element, one)
            for element, one in zip(batch.elements, scored, strict=True)
        ]

    def _kept(self, records: Sequence[Any]) -> Sequence[Any]:
        if self.columns is None:
            return records
        return [{name: record.get(name) for name in self.columns} for record in records]

    def _scored_records(self, records: Sequence[Any], scores: pa.Table, as_rows: bool) -> list[Any]:
        names, columns = scores.column_names, [column.to_pylist() for column in scores.columns]
        if as_rows and len(names) > 4:  # a row holds no dicts
            place = names.index(f"{self.prefix}anomaly_reasons")
            columns[place] = [[Reason(**reason) for reason in reasons] for reasons in columns[place]]
        records = self._kept(records)
        if len(names) == 4:  # a dict display is the fastest way
            a, b, c, d = names
            scored = [
                {**record, a: one, b: two, c: three, d: four}
                for record, one, two, three, four in zip(records, *columns, strict=True)
            ]
        else:
            cells = zip(*columns, strict=True)
            scored = [
                {**record, **dict(zip(names, row, strict=True))} for record, row in zip(records, cells, strict=True)
            ]
        size = len(names)
        return [
            new if len(new) == len(old) + size else name_clash(old, names)
            for old, new in zip(records, scored, strict=True)
        ]

    def _scored_texts(self, batch: Batch, scores: pa.Table) -> list[Any]:
        # One kept object has a column that the model reads or was asked for, so a comma has something before it.
        lead = "," if self.columns is None or self.columns else "{"
        tails = pc.binary_replace_slice(json_rows(scores).cast(pa.binary()), 0, 1, lead).to_pylist()
        if self.columns is not None:
            if not self.columns:
                return tails
            kept = self._kept(_exact(batch))
            texts = [json_text(record).encode() for record in kept]
        else:
            texts = [text if text.endswith(b"}") else text.rstrip() for text in batch.contents]
        scored: list[Any] = [text[:-1] + tail for text, tail in zip(texts, tails, strict=True)]
        return scored

    def _scored_avro(self, batch: Batch, scores: pa.Table) -> list[Any]:
        write = self.avro.write  # type: ignore[union-attr]
        if batch.form.kind != "avro":
            error = 'expected an Avro record, as output="avro" needs it, got a '
            return [Fault(None, "not_a_record", error + type(element).__name__) for element in batch.elements]
        return [
            write(content, record, added)
            for content, record, added in zip(batch.contents, batch.records, scores.to_pylist(), strict=True)
        ]

    def _results(self, records: Sequence[Any], scores: pa.Table, limit: float) -> list[Any]:
        score, label, version = (
            scores.column(self.prefix + name).to_pylist() for name in ("anomaly_score", "is_anomaly", "model_version")
        )
        name = f"{self.prefix}anomaly_reasons"
        reasons = scores.column(name).to_pylist() if name in scores.column_names else None
        return [
            AnomalyResult(
                beam.Row(**{str(key): value for key, value in record.items()}),
                [
                    AnomalyPrediction(
                        model_id=version[i],
                        score=score[i],
                        label=int(label[i]),
                        threshold=limit,
                        info=json.dumps(reasons[i]) if reasons else "",
                    )
                ],
            )
            for i, record in enumerate(self._kept(records))
        ]


def _exact(batch: Batch) -> Sequence[dict[Any, Any]]:
    """The records; those of JSON with whole numbers of any size."""
    return [parse_object(text) for text in batch.contents] if batch.form.kind == "json" else batch.records
