"""The streaming job: reads an endless source, scores it record by record, writes it, loses nothing."""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import orjson
import pyarrow as pa
from apache_beam.io.gcp.pubsub import PubsubMessage, ReadFromPubSub, WriteToPubSub
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.windowed_value import PANE_INFO_UNKNOWN
from apache_beam.utils.windowed_value import create as windowed_value

from pipeline.alerts import AlertOnDeadLetters
from pipeline.letters import NAMESPACE, Letters
from pipeline.options import check, stream_place
from pipeline.records import (
    DEAD_LETTER_SCHEMA,
    MAX_LINE_BYTES,
    ParsedLines,
    json_rows,
    parse_json_lines,
    record_letters,
)
from pipeline.rows import json_text, payload
from pipeline.score_records import ScoreRecords, event_time
from pipeline.sinks import dead_letter_place
from pipeline.window_files import WriteWindowFiles
from vae_model.bundle import Bundle, refuse_clash, score_fields
from vae_model.tables import conform

logger = logging.getLogger(__name__)

WINDOW_SECS = 60.0
_MAX_ROWS = 4096  # of a Beam bundle that become one table


def build_streaming(pipeline: beam.Pipeline, options: Any, job: str = "", count: bool = False) -> None:
    """Adds the job's steps to a pipeline.

    Args:
        pipeline: To add to.
        options: With the attributes that `add_arguments` declares.
        job: A word for the names of files; see `WriteWindowFiles`.
        count: For `local_account`.

    Raises:
        ValueError: A flag is wrong.
    """
    check(options, streaming=True)
    source = _found(SOURCES, "input", options)
    columns = options.columns if options.id_columns is None else options.id_columns
    score = ScoreRecords(
        options.bundle,
        reasons=options.reasons,
        threshold=options.threshold,
        prefix=options.score_prefix,
        columns=columns,
        max_batch_duration_secs=options.max_batch_duration_secs,
        model_refresh_secs=options.model_refresh_secs,
    )
    write_scored = _WriteScored(options, job, table_schema(score.launched.bundle, options), options.score_prefix)
    write_letters = _WriteLetters(options, job)

    records = pipeline | "ReadRecords" >> source
    scored = records | "ScoreRecords" >> score
    refused = scored.scored | "WriteScored" >> write_scored
    letters = (scored.dead_letters, refused) | "AllDeadLetters" >> beam.Flatten()
    letters | "WriteDeadLetters" >> write_letters
    alert = AlertOnDeadLetters(options.max_dead_letter_fraction, options.window_secs or WINDOW_SECS)
    (scored.scored, letters) | "AlertOnDeadLetters" >> alert
    if count:
        records | "CountRecords" >> beam.ParDo(_Count(job, _one_record))
        scored.scored | "CountScored" >> beam.ParDo(_Count(job, _one_scored, options.score_prefix))
        letters | "CountDeadLetters" >> beam.ParDo(_Count(job, _letter_kinds))


def local_runner(options: Any) -> str:
    """The runner of Beam's own that can run the job in this process. `DirectRunner` would take another at times.

    Raises:
        ValueError: None can.
    """
    places = options.input, options.output, options.dead_letters
    schemes = [(stream_place(place) or ("",))[0] for place in places]
    if "pubsub" not in schemes:
        return "FnApiRunner"
    if schemes[0] != "pubsub" or "kafka" in schemes:
        raise ValueError("--runner: no local runner knows pubsub: together with kafka: or replay:")
    return "BundleBasedDirectRunner"


def table_schema(bundle: Bundle, options: Any) -> pa.Schema:
    """The columns of scored records in files and in BigQuery: those of training, the scores, and the event time.

    A column that `--columns` or `--id_columns` names, and training had not, is text.

    Raises:
        ValueError: Two columns would have the same name.
    """
    asked = options.columns if options.id_columns is None else options.id_columns
    trained = {field.name: _plain_type(field.type) for field in bundle.schema.arrow_schema}
    names = list(trained) if asked is None else list(asked)
    added = [
        *score_fields(options.reasons, options.score_prefix),
        pa.field(f"{options.score_prefix}event_time", pa.timestamp("us", "UTC")),
    ]
    refuse_clash(names, options.reasons, options.score_prefix)
    if added[-1].name in names:
        raise ValueError(f"{added[-1].name}: the input has such a column already; choose a --score_prefix")
    return pa.schema([*(pa.field(name, trained.get(name, pa.string())) for name in names), *added])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


# ---- places ----------------------------------------------------------------------------------------
#
# A source gives elements that `ScoreRecords` takes. A place for messages takes `Message`s, whose data and key are of
# its `max_bytes` at most; one for tables takes tables of one schema, and gives the dead letters of those that it
# refused. To add one, add its line.


class Message(NamedTuple):
    """What goes to a place for messages."""

    data: bytes  # JSON
    attributes: dict[str, str]
    key: bytes | None = None


def _need_gcp() -> None:
    """Raises `ImportError` where Google's clients are not installed: Beam says so only in the running job."""
    try:
        import google.cloud.pubsub  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pubsub: and bigquery: need the extra gcp: pip install 'beam-vae[gcp]' ({error})") from None


def _read_pubsub(name: str, options: Any) -> beam.PTransform:
    kind = re.fullmatch(r"projects/[^/]+/(subscription|topic)s/[^/]+", name)
    if kind is None:
        raise ValueError(f"expected pubsub:projects/PROJECT/subscriptions/NAME or .../topics/NAME, got pubsub:{name}")
    _need_gcp()
    return ReadFromPubSub(
        **{kind[1]: name},
        id_label=options.id_attribute,
        with_attributes=True,
        timestamp_attribute=options.timestamp_attribute,
    )


def _write_pubsub(name: str) -> _WriteMessagesToPubSub:
    if not re.fullmatch(r"projects/[^/]+/topics/[^/]+", name):
        raise ValueError(f"expected pubsub:projects/PROJECT/topics/NAME, got pubsub:{name}")
    _need_gcp()
    return _WriteMessagesToPubSub(name)


@dataclass
class _WriteMessagesToPubSub(beam.PTransform):
    topic: str
    max_bytes: int = 9_500_000  # Pub/Sub takes ten million, framing and attributes included

    def expand(self, messages: beam.PCollection[Message]) -> Any:
        write = WriteToPubSub(self.topic, with_attributes=True, publish_with_ordering_key=True)
        return messages | "ToPubSub" >> beam.Map(_pubsub_message).with_output_types(PubsubMessage) | "Publish" >> write


_MAX_KEY_BYTES = 1024  # Pub/Sub's limit


def _pubsub_message(message: Message) -> PubsubMessage:
    key = message.key or b""
    try:
        ordering_key = key.decode() if len(key) <= _MAX_KEY_BYTES else ""
    except UnicodeDecodeError:
        ordering_key = ""
    return PubsubMessage(message.data, message.attributes, ordering_key=ordering_key)


def _write_bigquery(name: str, schema: pa.Schema) -> beam.PTransform:
    _need_gcp()
    from pipeline.to_bigquery import WriteTablesToBigQuery

    return WriteTablesToBigQuery(name, schema)


def _read_kafka(name: str, _: Any) -> beam.PTransform:
    from pipeline.kafka import read_from

    return read_from(f"kafka:{name}")


def _write_kafka(name: str) -> _WriteMessagesToKafka:
    from pipeline.kafka import write_to

    write = write_to(f"kafka:{name}")
    limit = str(write.producer_config.get("message.max.bytes", 1_000_000))  # librdkafka's default
    if not limit.isdigit() or int(limit) <= _KAFKA_FRAME_BYTES:
        raise ValueError(f"message.max.bytes: expected a number over {_KAFKA_FRAME_BYTES}, got {limit}")
    return _WriteMessagesToKafka(write, int(limit) - _KAFKA_FRAME_BYTES)


_KAFKA_FRAME_BYTES = 512  # more than a batch of one record has around it


@dataclass
class _WriteMessagesToKafka(beam.PTransform):
    write: beam.PTransform
    max_bytes: int

    def expand(self, messages: beam.PCollection[Message]) -> Any:
        from pipeline.kafka import Record

        return messages | "ToKafka" >> beam.Map(_kafka_record).with_output_types(Record) | "Publish" >> self.write


_WriteMessages = _WriteMessagesToPubSub | _WriteMessagesToKafka


def _kafka_record(message: Message) -> tuple[bytes | None, bytes]:
    return message.key, message.data


def _read_replay(name: str, _: Any) -> beam.PTransform:
    from pipeline.replay import read_from

    return read_from(f"replay:{name}")


SOURCES: dict[str, Callable[[str, Any], beam.PTransform]] = {
    "pubsub": _read_pubsub,
    "kafka": _read_kafka,
    "replay": _read_replay,
}
PAIRS = ("kafka",)  # sources whose elements are pairs of a key and a record
MESSAGES: dict[str, Callable[[str], _WriteMessages]] = {"pubsub": _write_pubsub, "kafka": _write_kafka}
TABLES: dict[str, Callable[[str, pa.Schema], beam.PTransform]] = {"bigquery": _write_bigquery}


def _found(sources: dict[str, Callable[[str, Any], beam.PTransform]], flag: str, options: Any) -> beam.PTransform:
    scheme, name = stream_place(getattr(options, flag)) or ("", "")
    if scheme not in sources:
        known = ", ".join(f"{item}:" for item in sorted(sources))
        raise ValueError(f"--{flag}: expected one of {known}, got {getattr(options, flag)}")
    try:
        return sources[scheme](name, options)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None


def _place(
    uri: str, flag: str, schema: pa.Schema, options: Any, name: str, job: str
) -> tuple[int | None, beam.PTransform]:
    """The most bytes of a message there, or None where the place takes tables; and the step that writes there."""
    scheme, rest = stream_place(uri) or ("", "")
    try:
        if scheme in MESSAGES:
            step = MESSAGES[scheme](rest)
            return step.max_bytes, step
        if scheme in TABLES:
            return None, TABLES[scheme](rest, schema)
        if not scheme:
            return None, WriteWindowFiles(
                uri,
                schema,
                window_secs=options.window_secs or WINDOW_SECS,
                allowed_lateness_secs=options.allowed_lateness_secs,
                name=name,
                job=job,
                num_shards=options.num_shards or 1,
            )
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None
    known = ", ".join(f"{item}:" for item in sorted({**MESSAGES, **TABLES}))
    raise ValueError(f"--{flag}: expected a folder, or one of {known}; got {uri}")


class _WriteScored(beam.PTransform):
    """Scored elements of any form in; dead letters of those that the place cannot hold out."""

    def __init__(self, options: Any, job: str, schema: pa.Schema, prefix: str) -> None:
        super().__init__()
        self._schema, self._prefix = schema, prefix
        # A file holds one window; BigQuery's table holds all.
        self._windows = None if stream_place(options.output) else FixedWindows(options.window_secs or WINDOW_SECS)
        self._max_bytes, self._write = _place(options.output, "output", schema, options, "scored", job)

    def expand(self, scored: beam.PCollection[Any]) -> beam.PCollection[pa.Table]:
        if self._max_bytes is not None:
            shape = beam.ParDo(_ToMessages(self._prefix, self._max_bytes)).with_outputs("dead_letters", main="shaped")
            shaped = scored | "ToMessages" >> shape
        else:
            shape = beam.ParDo(_ToTables(self._schema, self._prefix)).with_outputs("dead_letters", main="shaped")
            if self._windows:
                scored = scored | "Window" >> beam.WindowInto(self._windows)
            shaped = scored | "ToTables" >> shape
            shaped.shaped.element_type = pa.Table
        shaped.dead_letters.element_type = pa.Table
        refused = [_global(shaped.dead_letters, "Unfit")]
        written = shaped.shaped | "Write" >> self._write
        if isinstance(written, beam.PCollection) and written.element_type is pa.Table:
            refused.append(_global(written, "Refused"))
        return refused | "AllRefused" >> beam.Flatten()


def _global(letters: beam.PCollection[pa.Table], label: str) -> beam.PCollection[pa.Table]:
    return letters | f"{label}Anywhere" >> beam.WindowInto(beam.window.GlobalWindows())


class _WriteLetters(beam.PTransform):
    """Tables of dead letters in, to their place."""

    def __init__(self, options: Any, job: str) -> None:
        super().__init__()
        place = dead_letter_place(options)
        self._max_bytes, self._write = _place(place, "dead_letters", DEAD_LETTER_SCHEMA, options, "dead_letters", job)
        self._is_files = stream_place(place) is None
        self._keyed = (stream_place(options.input) or ("",))[0] in PAIRS

    def expand(self, letters: beam.PCollection[pa.Table]) -> Any:
        if self._max_bytes is not None:
            letters = letters | "ToMessages" >> beam.FlatMap(letter_messages, self._max_bytes, self._keyed)
        elif not self._is_files:
            letters = letters | "Shorten" >> beam.Map(_shortened).with_output_types(pa.Table)
        written = letters | "Write" >> self._write
        if isinstance(written, beam.PCollection) and written.element_type is pa.Table:
            written | "NoneRefused" >> beam.Map(_refuse_to_lose)
        return written


def _refuse_to_lose(letters: pa.Table) -> None:
    """Fails the Beam bundle, which the runner tries again: there is no further place for a dead letter.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"--dead_letters: BigQuery refused {letters.num_rows} dead letters, which are not lost but tried again; "
        f"expected a table with the columns {', '.join(DEAD_LETTER_SCHEMA.names)}"
    )


# ---- scored records as messages and as tables ------------------------------------------------------

_MAX_ATTRIBUTES = 100  # of Pub/Sub
_LABELS = ("model_version", "is_anomaly")


def as_message(element: Any) -> Message:
    """A scored element of any form: a message, JSON bytes or text, a dict; or a pair of a key and one of these."""
    key = None
    if type(element) is tuple:
        key, element = element
        if key is not None and not isinstance(key, bytes):
            key = str(key).encode()
    if isinstance(element, PubsubMessage):
        if key is None and element.ordering_key:
            key = element.ordering_key.encode()
        return Message(element.data, element.attributes or {}, key)
    text = element if isinstance(element, bytes | str) else json_text(element)
    return Message(text.encode() if isinstance(text, str) else text, {}, key)


def labels(data: bytes, prefix: str) -> dict[str, str]:
    """What a message says of its scores without being parsed, for the filters of subscriptions."""
    record = _parsed(data)
    return {name: _label(record[name]) for name in (prefix + label for label in _LABELS) if name in record}


def _parsed(data: bytes) -> dict[str, Any]:
    """A scored record; {} where neither parser reads it with its scores: one goes deeper, one knows NaN."""
    for loads in (json.loads, orjson.loads):
        with suppress(ValueError, RecursionError):
            record = loads(data)
            return record if type(record) is dict else {}
    return {}


def _label(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


class _ToMessages(beam.DoFn):
    """Scored elements as messages with attributes that say which model scored them, and whether they are anomalies."""

    def __init__(self, prefix: str, max_bytes: int) -> None:
        self._prefix, self._max_bytes, self._letters = prefix, max_bytes, Letters()

    def process(self, element: Any, timestamp: Any = beam.DoFn.TimestampParam) -> Iterator[Any]:
        message = as_message(element)
        added = labels(message.data, self._prefix)
        attributes = {**message.attributes, **added}
        if len(attributes) > _MAX_ATTRIBUTES:
            attributes = message.attributes
        if len(message.data) + len(message.key or b"") > self._max_bytes:
            yield self._letters.send(_too_large(message, self._max_bytes, timestamp.micros, self._prefix))
        else:
            yield Message(message.data, attributes, message.key)


_undeclared: set[str] = set()  # of this process
_MAX_UNDECLARED = 1000  # names that are remembered and counted: records may make up theirs


class _ToTables(beam.DoFn):
    """Scored elements in, the tables of their windows out, as the Beam bundle ends."""

    def __init__(self, schema: pa.Schema, prefix: str) -> None:
        self._schema, self._prefix = schema, prefix
        self._letters = Letters()
        self._num_undeclared_columns = Metrics.counter(NAMESPACE, "num_undeclared_columns")

    def start_bundle(self) -> None:
        self._waiting: dict[Any, list[_Waiting]] = {}

    def process(
        self, element: Any, timestamp: Any = beam.DoFn.TimestampParam, window: Any = beam.DoFn.WindowParam
    ) -> Iterator[Any]:
        message = as_message(element)
        if len(message.data) > MAX_LINE_BYTES:
            yield self._letters.send(_too_large(message, MAX_LINE_BYTES, timestamp.micros, self._prefix))
            return
        waiting = self._waiting.setdefault(window, [])
        value = element[1] if type(element) is tuple else element
        waiting.append(_Waiting(message, timestamp.micros, value if type(value) is dict else {}))
        if len(waiting) >= _MAX_ROWS:
            yield from self._tables(window, self._waiting.pop(window))

    def finish_bundle(self) -> Iterator[Any]:
        while self._waiting:
            yield from self._tables(*self._waiting.popitem())

    def _tables(self, window: Any, waiting: list[_Waiting]) -> Iterator[Any]:
        times = [item.micros for item in waiting]
        own = self._schema.remove(len(self._schema) - 1)
        lines = [_one_line(item.message.data) for item in waiting]
        records = [item.record for item in waiting]
        given = {
            field.name: cells
            for field in own
            if _json_differs(field.type)
            and (cells := _given([record.get(field.name) for record in records], field.type))
        }
        for row in set().union(*given.values()):
            left = {name: cell for name, cell in records[row].items() if row not in given.get(name, ())}
            lines[row] = json_text(left).encode()
        self._tell_undeclared(_parsed(lines[0]))
        parsed = parse_json_lines(b"\n".join(lines), own)
        if parsed.bad_lines:  # it was scored, but this parser does not go as deep
            bad_rows = _bad_rows(lines, parsed)
            faults = [(None, "malformed_record", error) for error in parsed.errors]
            yield self._dead([waiting[row] for row in bad_rows], faults, window)
            if rest := [item for row, item in enumerate(waiting) if row not in bad_rows]:
                yield from self._tables(window, rest)
            return
        table, rejects = conform(parsed.table, own)
        for name, cells in given.items():
            place = own.get_field_index(name)
            table = table.set_column(place, own.field(place), _with_cells(table[name], cells))
        for rows, column, error in parsed.wrong_cells:
            rejects.add(rows, column, "wrong_type", error)
        event_times = pa.array([event_time(micros) for micros in times], pa.int64())
        table = table.append_column(self._schema.field(-1), event_times.cast(self._schema.field(-1).type))
        if len(rejects):
            bad = rejects.table().to_pylist()
            faults = [(fault["column"], fault["error_type"], fault["error"]) for fault in bad]
            yield self._dead([waiting[fault["row"]] for fault in bad], faults, window)
            times = [micros for micros, keep in zip(times, rejects.keep.tolist(), strict=True) if keep]
            table = table.filter(rejects.keep)
        if times:
            yield _in_window(table, min(times), window)

    def _dead(self, refused: list[_Waiting], faults: list[tuple[Any, str, str]], window: Any) -> Any:
        messages, times, _ = zip(*refused, strict=True)
        letters = _refused(messages, faults, times, self._prefix)
        self._letters.count(letters)
        return beam.pvalue.TaggedOutput("dead_letters", _in_window(letters, min(times), window))

    def _tell_undeclared(self, record: dict[str, Any]) -> None:
        """Columns that are left out, each once per process: of one record per table, for most are alike."""
        if len(_undeclared) < _MAX_UNDECLARED and (new := record.keys() - set(self._schema.names) - _undeclared):
            if not _undeclared:
                logger.warning(
                    "columns that neither training nor --columns names are left out: %d (told once)", len(new)
                )
            new = set(sorted(new)[: _MAX_UNDECLARED - len(_undeclared)])
            _undeclared.update(new)
            self._num_undeclared_columns.inc(len(new))


class _Waiting(NamedTuple):
    """A scored element for a table."""

    message: Message
    micros: int
    record: dict[str, Any]  # {} of one that came as JSON


def _json_differs(kind: pa.DataType) -> bool:
    """Whether a Python value may become something else in such a column on its way through JSON."""
    return any(is_such(kind) for is_such in (pa.types.is_duration, pa.types.is_nested, *_BINARY))


_BINARY = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)


def _given(cells: Sequence[Any], kind: pa.DataType) -> dict[int, pa.Scalar]:
    """By row, the cells that Arrow takes as they are: no text and no numbers, which are read as those of JSON."""
    found = {}
    for row, cell in enumerate(cells):
        if cell is None or isinstance(cell, str | bool | int | float):
            continue
        with suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            # A duration by way of its own unit, for else Arrow cuts off what the column's cannot hold.
            found[row] = pa.scalar(cell).cast(kind) if pa.types.is_duration(kind) else pa.scalar(cell, kind)
    return found


def _with_cells(column: pa.ChunkedArray, cells: dict[int, pa.Scalar]) -> pa.Array:
    """The column with other cells in some rows."""
    rows = np.arange(len(column))
    rows[list(cells)] = len(column) + np.arange(len(cells))
    values = pa.array([cell.as_py() for cell in cells.values()], column.type)
    return pa.concat_arrays([*column.chunks, values]).take(pa.array(rows))


def _in_window(table: pa.Table, micros: int, window: Any) -> Any:
    return windowed_value(table, micros, (window,), PANE_INFO_UNKNOWN)


def _one_line(text: bytes) -> bytes:
    return text.translate(_LINE_BREAKS)  # of JSON: in its strings they are escaped


_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


def _bad_rows(lines: list[bytes], parsed: ParsedLines) -> dict[int, None]:
    """The rows of the lines that were not parsed; the others are in the block, in their order."""
    good = parsed.block.split(b"\n")[::-1] if parsed.block else []
    bad: dict[int, None] = {}
    for row, line in enumerate(lines):
        if good and line == good[-1]:
            good.pop()
        else:
            bad[row] = None
    return bad


def _refused(
    messages: Sequence[Message], faults: list[tuple[Any, str, str]], times: Sequence[int], prefix: str
) -> pa.Table:
    """Letters of scored records; each payload is the record with its scores."""
    return record_letters(
        [payload(message.data) for message in messages],
        faults,
        attributes=[_attributes(message) for message in messages],
        event_times=[event_time(micros) for micros in times],
        stage="write",
        model_version=[labels(message.data, prefix).get(f"{prefix}model_version") for message in messages],
    )


def _attributes(message: Message) -> dict[str, str] | None:
    """The attributes, with the key as `ScoreRecords` writes that of a pair."""
    key = {} if message.key is None else {"key": payload(message.key)[0]}
    return {**key, **message.attributes} or None


def _too_large(message: Message, limit: int, micros: int, prefix: str) -> pa.Table:
    size = len(message.data) + len(message.key or b"")
    error = f"expected at most {limit:,} bytes with its scores and key, got {size:,}"
    return _refused([message], [(None, "too_large", error)], [micros], prefix)


# ---- dead letters as messages ----------------------------------------------------------------------

_MAX_PAYLOAD = 1_000_000  # characters of a payload that goes on in a message or in BigQuery


def letter_messages(letters: pa.Table, max_bytes: int, keyed: bool = False) -> Iterator[Message]:
    """Each letter as JSON; the record's own attributes, and what is wrong with it.

    Args:
        letters: Of `DEAD_LETTER_SCHEMA`.
        max_bytes: Of the JSON and the key.
        keyed: Whether the attribute `key` is the record's key, and so the letter's.
    """
    letters = _shortened(letters)
    kinds = zip(*(letters[name].to_pylist() for name in ("attributes", "stage", "error_type")), strict=True)
    for row, (line, (own, stage, error_type)) in enumerate(zip(json_rows(letters).to_pylist(), kinds, strict=True)):
        own = dict(own or ())
        attributes = {**own, "dead_letter_stage": stage, "dead_letter_error_type": error_type}
        if len(attributes) > _MAX_ATTRIBUTES:
            attributes = own
        key = own["key"].encode() if keyed and "key" in own else None
        if len(key or b"") > max_bytes // 2:
            key = None
        data = line.encode()
        room = max_bytes - len(key or b"")
        if len(data) > room:
            data = _fitted(letters.slice(row, 1), room)
        yield Message(data, attributes, key)


def _fitted(letter: pa.Table, max_bytes: int) -> bytes:
    """One letter as JSON of so many bytes: its payload, attributes and the like cut, all to one length."""
    (fields,) = letter.to_pylist()
    fields["payload_format"] = "cut"
    size = max_bytes
    while True:
        size //= 2
        cut = {name: value[:size] if isinstance(value, str) else value for name, value in fields.items()}
        cut["attributes"] = [(name[:size], value[:size]) for name, value in fields["attributes"] or ()]
        data = str(json_rows(pa.Table.from_pylist([cut], DEAD_LETTER_SCHEMA))[0].as_py()).encode()
        if len(data) <= max_bytes or not size:
            return data


def _shortened(letters: pa.Table) -> pa.Table:
    """The letters with payloads that fit a message; of one that does not, `payload_format` says "cut"."""
    lengths = pa.compute.utf8_length(letters["payload"])
    long = pa.compute.fill_null(pa.compute.greater(lengths, _MAX_PAYLOAD), False)
    if not pa.compute.any(long).as_py():
        return letters
    cut = pa.compute.utf8_slice_codeunits(letters["payload"], 0, _MAX_PAYLOAD)
    formats = pa.compute.if_else(long, "cut", letters["payload_format"])
    place = letters.schema.get_field_index
    letters = letters.set_column(place("payload"), letters.schema.field("payload"), cut)
    return letters.set_column(place("payload_format"), letters.schema.field("payload_format"), formats)


# ---- the account of a job that runs in this process ------------------------------------------------

_accounts: dict[str, Counter[str]] = {}
_accounting = threading.Lock()


class _Count(beam.DoFn):
    """Counts elements in this process: the local runner for streams loses most of Beam's counters."""

    def __init__(self, job: str, kinds: Callable[..., dict[str, int]], *args: Any) -> None:
        self._job, self._kinds, self._args = job, kinds, args

    def process(self, element: Any) -> None:
        with _accounting:
            if self._job in _accounts:
                _accounts[self._job].update(self._kinds(element, *self._args))


def _one_record(_: Any) -> dict[str, int]:
    return {"records": 1}


def _one_scored(element: Any, prefix: str) -> dict[str, int]:
    found = labels(as_message(element).data, prefix)
    version, anomaly = (found.get(prefix + name) for name in _LABELS)
    return {"scored": 1, "anomalies": int(anomaly == "true"), f"version {version}": 1}


def _letter_kinds(letters: pa.Table) -> dict[str, int]:
    counted = Counter(f"letter {kind}" for kind in letters["error_type"].to_pylist())
    refused = sum(stage == "write" for stage in letters["stage"].to_pylist())
    return {**counted, "letters": letters.num_rows, "refused": refused}


@contextmanager
def local_account(job: str) -> Iterator[Counter[str]]:
    """Counts what a job does in this process while the block runs."""
    with _accounting:
        _accounts[job] = Counter()
    try:
        yield _accounts[job]
    finally:
        with _accounting:
            del _accounts[job]


@contextmanager
def drained_by_signals(options: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM drain a local job from Pub/Sub: nothing more is read, windows close, all is written.

    A second signal ends it at once.
    """
    if (stream_place(options.input) or ("",))[0] != "pubsub":
        yield
        return
    from apache_beam.runners.direct.transform_evaluator import TransformResult, _PubSubReadEvaluator

    read = _PubSubReadEvaluator.finish_bundle

    def end(evaluator: Any) -> TransformResult:
        """The last part of a source, as that of a bounded one: there is no public way to say so."""
        return TransformResult(evaluator, [], [], None, {None: None})  # no watermark held either

    def drain(*_: Any) -> None:
        if _PubSubReadEvaluator.finish_bundle is end:
            raise KeyboardInterrupt
        _PubSubReadEvaluator.finish_bundle = end

    old = {number: signal.signal(number, drain) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _PubSubReadEvaluator.finish_bundle = read
        for number, handler in old.items():
            signal.signal(number, handler)


def launch_word() -> str:
    """A word for this launch's files, such as 20261122T190000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
