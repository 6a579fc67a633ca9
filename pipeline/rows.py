"""Records as they come (dicts, rows, JSON, Avro, Pub/Sub messages) to Arrow tables, and scores back onto them."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import json
import math
import numbers
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.ml.anomaly.base import AnomalyPrediction, AnomalyResult
from apache_beam.utils.timestamp import Timestamp

from pipeline.records import json_rows, parse_object, parse_objects
from vae_model.schema import ConstantFeature, Feature, NumericFeature, TableSchema, TimestampFeature
from vae_model.tables import cast_cells, is_text

INPUT_FORMATS = (None, "json", "avro")
OUTPUTS = ("record", "json", "anomaly_result")
_AT_ONCE = 32  # records that are read one by one where Arrow refuses one of them


class Fault(NamedTuple):
    """Why a record cannot be scored."""

    column: str | None
    error_type: str
    error: str


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
        value = value.astype("datetime64[us]" if isinstance(value, np.datetime64) else "timedelta64[us]")
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
    values: Sequence[Sequence[Any]]
    try:
        values = list(zip(*map(itemgetter(*names), records), strict=True)) if len(names) > 1 else []
    except KeyError:
        values = []
    if not values:
        values = [[record.get(name) for record in records] for name in names]
    arrays: list[pa.Array] = []
    faults: dict[int, Fault] = {}
    for reading, cells in zip(wanted, values, strict=True):
        array, wrong = read_column(cells, reading)
        arrays.append(array)
        for row, error in wrong.items():
            faults.setdefault(row, Fault(reading.name, "wrong_type", f"{reading.name}: {error}"))
    for row in _empty_rows(arrays):
        if records[row].keys().isdisjoint(names):
            faults.setdefault(row, _stranger(names))
    return Columns(arrays, faults)


def read_json(texts: Sequence[bytes], wanted: Sequence[Reading]) -> Columns:
    """The features of JSON objects, as many at once as Arrow takes; an absent key is a missing value."""
    names = [reading.name for reading in wanted]
    native = pa.schema([(reading.name, _json_kind(reading.kind)) for reading in wanted])
    parts: list[list[pa.Array]] = []
    faults: dict[int, Fault] = {}

    def read(start: int, stop: int) -> None:
        table = _parse_all(texts[start:stop], native)
        if table is not None:
            arrays = []
            for reading, column in zip(wanted, table.columns, strict=True):
                cast, bad = cast_cells(column, reading.kind)
                for row in bad.tolist():
                    error = f"{reading.name}: expected {reading.wanted}, got {shown(column[row].as_py())}"
                    faults.setdefault(start + row, Fault(reading.name, "wrong_type", error))
                arrays.append(cast.combine_chunks())
            for row in _empty_rows(arrays):
                if json.loads(texts[start + row]).keys().isdisjoint(names):
                    faults.setdefault(start + row, _stranger(names))
            parts.append(arrays)
        elif stop - start > _AT_ONCE:
            size = max(-(-(stop - start) // 8), _AT_ONCE)
            for first in range(start, stop, size):
                read(first, min(first + size, stop))
        else:
            records = []
            for row in range(start, stop):
                record, fault = parse_message(texts[row])
                records.append(record)
                if fault:
                    faults[row] = fault
            columns = read_records(records, wanted)
            parts.append(columns.arrays)
            for row, fault in columns.faults.items():
                faults.setdefault(start + row, fault)

    read(0, len(texts))
    arrays = [pa.concat_arrays(column) for column in zip(*parts, strict=True)]
    return Columns(arrays, faults)


def _parse_all(texts: Sequence[bytes], native: pa.Schema) -> pa.Table | None:
    """All at once, where each text is plainly one object on one line."""
    block = b"\n".join(texts)
    if block.count(b"\n") != len(texts) - 1 or len(block) > len(texts) * _LONG_TEXT:
        return None
    if not (all(map(_BEGINS, texts)) and all(map(_ENDS, texts))):
        return None
    table = parse_objects(block, native)
    return table if table is not None and table.num_rows == len(texts) else None


_LONG_TEXT = 1 << 20  # bytes on average, from which on texts are read one by one
_BEGINS, _ENDS = methodcaller("startswith", b"{"), methodcaller("endswith", b"}")


def parse_message(text: bytes) -> tuple[dict[str, Any], Fault | None]:
    """The object that a JSON text holds, or {} and why it holds none."""
    try:
        return parse_object(text), None
    except (ValueError, RecursionError) as error:
        return {}, Fault(None, "malformed_record", f"expected a JSON object, got {error}")


def _json_kind(kind: pa.DataType) -> pa.DataType:
    """What Arrow's JSON reader is to read: times and decimals are text there."""
    return pa.string() if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else kind


def _empty_rows(arrays: list[pa.Array]) -> list[int]:
    """The records without any value."""
    empty = None
    for array in arrays:
        if not array.null_count:
            return []
        null = array.is_null().to_numpy(zero_copy_only=False)
        empty = null if empty is None else empty & null
    return [] if empty is None else np.flatnonzero(empty).tolist()


def _stranger(names: list[str]) -> Fault:
    return Fault(names[0], "missing_column", f"{names[0]}: the record has no column that the model reads")


# ---- forms of elements -------------------------------------------------------------------------


class Form:
    """Elements of one Python type: how they become records, what they become with scores.

    Args:
        to_record: An element's dict, raising where it has none; or
        to_text: its JSON as bytes.
        finish: What a record with scores becomes; for texts, their scored JSON.
        is_row: Whether that is a `beam.Row`.
    """

    def __init__(
        self,
        *,
        to_record: Callable[[Any], dict[Any, Any]] | None = None,
        to_text: Callable[[Any], bytes] | None = None,
        finish: Callable[[Any, Any], Any],
        is_row: bool = False,
    ) -> None:
        self.to_record, self.to_text, self.finish, self.is_row = to_record, to_text, finish, is_row


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # refused later, as no UTF-8


def _data(message: PubsubMessage) -> bytes:
    return message.data or b""


def _with_data(message: PubsubMessage, data: bytes) -> PubsubMessage:
    return PubsubMessage(data, message.attributes, ordering_key=message.ordering_key or "")


def _row(_: Any, record: dict[str, Any]) -> beam.Row:
    return beam.Row(**record)


def form_of(kind: type, avro: AvroReader | None) -> Form | None:
    """How elements of a type are read and written, or None where they are no records."""
    if kind is dict:
        return Form(to_record=lambda element: element, finish=lambda _, record: record)
    if issubclass(kind, beam.Row):
        return Form(to_record=vars, finish=_row, is_row=True)
    if issubclass(kind, tuple) and hasattr(kind, "_asdict"):
        return Form(to_record=lambda element: element._asdict(), finish=_row, is_row=True)
    if dataclasses.is_dataclass(kind):
        return Form(to_record=vars, finish=_row, is_row=True)
    if issubclass(kind, Mapping):
        return Form(to_record=dict, finish=lambda _, record: record)
    if issubclass(kind, PubsubMessage):
        if avro:
            return Form(
                to_record=lambda element: avro.read(_data(element)),
                finish=lambda element, record: _with_data(element, json_text(record).encode()),
            )
        return Form(to_text=_data, finish=_with_data)
    if issubclass(kind, bytes | bytearray):
        if avro:
            return Form(to_record=lambda element: avro.read(bytes(element)), finish=lambda _, record: record)
        return Form(to_text=bytes, finish=lambda _, text: text)
    if issubclass(kind, str) and not avro:
        return Form(to_text=_encoded, finish=lambda _, text: text.decode())
    return None


def read_elements(form: Form, elements: Sequence[Any], wanted: Sequence[Reading]) -> tuple[list[Any], Columns]:
    """The elements' dicts or texts, and their features; an element that has none has an empty one, and a fault."""
    records, faults = _records(form, elements)
    columns = (read_json if form.to_text else read_records)(records, wanted)
    return records, Columns(columns.arrays, {**columns.faults, **faults})


def _records(form: Form, elements: Sequence[Any]) -> tuple[list[Any], dict[int, Fault]]:
    read = form.to_text or form.to_record
    assert read is not None
    try:
        return list(map(read, elements)), {}
    except ValueError:
        pass
    records: list[Any] = []
    faults: dict[int, Fault] = {}
    for row, element in enumerate(elements):
        try:
            records.append(read(element))
        except ValueError as error:
            records.append({})
            faults[row] = Fault(None, "malformed_record", str(error))
    return records, faults


class AvroReader:
    """Binary Avro records of one schema, each with or without the single-object header."""

    def __init__(self, schema: Any) -> None:
        import fastavro

        self.source = json.loads(schema) if isinstance(schema, str) else schema
        self._schema = fastavro.parse_schema(self.source)
        canonical = fastavro.schema.to_parsing_canonical_form(self._schema)
        self._header = b"\xc3\x01" + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))

    def __reduce__(self) -> tuple[Any, ...]:
        return AvroReader, (self.source,)

    def read(self, content: bytes) -> dict[str, Any]:
        """One record.

        Raises:
            ValueError: The bytes hold no such record, or more than one.
        """
        import fastavro

        stream = io.BytesIO(content)
        if content.startswith(self._header):
            stream.seek(len(self._header))
        try:
            record = fastavro.schemaless_reader(stream, self._schema, None)
        except Exception as error:  # it raises whatever the bytes lead to
            raise ValueError(f"expected an Avro record of the schema, got {len(content)} other bytes") from error
        if not isinstance(record, dict) or stream.read(1):
            raise ValueError(
                f"expected one Avro record of the schema, got {len(content)} bytes that hold something else"
            )
        return record


# ---- text --------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """Any Python value as JSON: NaN is null, infinity and what JSON lacks are strings, bytes are base64."""
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
    if depth > 100:
        return "..."
    if isinstance(value, float):
        return value if math.isfinite(value) else None if value != value else str(value)
    if isinstance(value, beam.Row):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _cleaned(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_cleaned(item, depth + 1) for item in value]
    return value


def payload(element: Any) -> tuple[str, str]:
    """An element as text for a letter, and the format of that text: json or base64."""
    if isinstance(element, PubsubMessage):
        element = _data(element)
    if isinstance(element, str):
        return element.encode(errors="backslashreplace").decode(), "json"
    if isinstance(element, bytes | bytearray):
        try:
            return bytes(element).decode(), "json"
        except UnicodeDecodeError:
            return base64.b64encode(element).decode(), "base64"
    if isinstance(element, tuple) and hasattr(element, "_asdict"):
        element = element._asdict()
    elif dataclasses.is_dataclass(element) or isinstance(element, beam.Row):
        element = vars(element)
    return json_text(element), "json"


# ---- scores onto records -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Writer:
    """Puts scores onto records.

    Args:
        output: See `ScoreRecords`.
        columns: See there.
        prefix: See there.
    """

    output: str = "record"
    columns: tuple[str, ...] | None = None
    prefix: str = ""

    def write(self, form: Form, elements: list[Any], records: list[Any], scores: pa.Table, limit: float) -> list[Any]:
        """What each element becomes, or a `Fault`.

        Args:
            form: Of the elements.
            elements: As they came.
            records: Their dicts or JSON texts.
            scores: The score columns, one line per element.
            limit: The threshold in force, in nats.
        """
        if form.to_text and self.output != "anomaly_result":
            texts = self._scored_texts(records, scores)
            if self.output == "json":
                return texts
            return [
                text if type(text) is Fault else form.finish(element, text)
                for element, text in zip(elements, texts, strict=True)
            ]
        if form.to_text:
            records = [parse_object(text) for text in records]
        if self.output == "anomaly_result":
            return self._results(records, scores, limit)
        scored = self._scored_records(records, scores, form.is_row and self.output == "record")
        finish: Callable[[Any, Any], Any] = form.finish
        if self.output == "json":
            finish = lambda _, record: json_text(record).encode()  # noqa: E731
        return [
            record if type(record) is Fault else finish(element, record)
            for element, record in zip(elements, scored, strict=True)
        ]

    def _kept(self, records: list[Any]) -> list[Any]:
        if self.columns is None:
            return records
        return [{name: record.get(name) for name in self.columns} for record in records]

    def _scored_records(self, records: list[Any], scores: pa.Table, as_rows: bool) -> list[Any]:
        names, columns = scores.column_names, [column.to_pylist() for column in scores.columns]
        if as_rows and len(names) > 4:  # a row holds no dicts
            place = names.index(f"{self.prefix}anomaly_reasons")
            columns[place] = [[beam.Row(**reason) for reason in reasons] for reasons in columns[place]]
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
            new if len(new) == len(old) + size else self._clash(old, names)
            for old, new in zip(records, scored, strict=True)
        ]

    def _scored_texts(self, texts: list[bytes], scores: pa.Table) -> list[Any]:
        added = json_rows(scores).to_pylist()
        if self.columns is not None:
            if not self.columns:
                return [more.encode() for more in added]
            kept = self._kept([parse_object(text) for text in texts])
            texts = [json.dumps(record, ensure_ascii=False).encode() for record in kept]
        if not all(map(_ENDS, texts)):
            texts = [text.rstrip() for text in texts]
        # The object has a column that the model reads, and so a comma has something before it.
        tails = [f",{more[1:]}".encode() for more in added]
        scored: list[Any] = [text[:-1] + tail for text, tail in zip(texts, tails, strict=True)]
        block = b"\n".join(texts)
        # Two searches, for they take as long as the splicing.
        possible = scores.column_names if b"anomaly" in block or b"model_version" in block else []
        clash = [name for name in possible if name.encode() in block]
        if clash:
            for row, text in enumerate(texts):
                if any(name.encode() in text for name in clash):
                    found = parse_object(text)
                    if any(name in found for name in clash):
                        scored[row] = self._clash(found, clash)
        return scored

    @staticmethod
    def _clash(record: Mapping[Any, Any], names: Sequence[str]) -> Fault:
        name = next(name for name in names if name in record)
        return Fault(
            name, "name_clash", f"{name}: the record has such a column already; choose a prefix for the scores"
        )

    def _results(self, records: list[Any], scores: pa.Table, limit: float) -> list[Any]:
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
