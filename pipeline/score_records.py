"""Scoring records one by one as they come, in batches of one table each: batch and streaming pipelines alike."""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.ml.anomaly.base import AnomalyResult
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.typehints import typehints
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import (
    PANE_INFO_UNKNOWN,
    PaneInfo,
    WindowedValue,
)
from apache_beam.utils.windowed_value import (
    create as windowed_value,
)

from pipeline.avro import AvroReader, AvroWriter
from pipeline.keyed_models import KeyedModelError, KeyedModels
from pipeline.letters import Letters
from pipeline.metrics import ScoringMetrics
from pipeline.models import Launched, Model, ModelSource, launch
from pipeline.records import record_letters
from pipeline.rows import (
    INPUT_FORMATS,
    OUTPUTS,
    Batch,
    Fault,
    Form,
    Reading,
    Reason,
    Writer,
    form_of,
    payload,
    read_batch,
    read_column,
    readings,
    shown,
)
from pipeline.scored import is_keyed
from pipeline.transforms import refresh_secs, refuse_threshold
from vae_model.bundle import Bundle, score_fields
from vae_model.reasons import REASON_TYPE

_NUM_SHARDS = 8  # batches that can fill at the same time, with max_batch_duration_secs


class ScoredRecords(NamedTuple):
    """Every input record is in one of the two."""

    scored: beam.PCollection[Any]
    dead_letters: beam.PCollection[pa.Table]


@dataclass
class ScoreRecords(beam.PTransform):
    """Scores dicts, rows, JSON, Avro and Pub/Sub messages: `.scored` records, and `.dead_letters` of the others.

    Each record keeps its timestamp, window and pane. Errors cost only their own record. A pair `(key, record)` comes
    out as `(key, scored)`.

    Args:
        bundle: Directory or URI that `fit` wrote, or a pointer that `beam-vae promote` wrote.
        reasons: Strangest columns to explain per record.
        threshold: Score, in nats, that replaces the bundle's; see `ScoreTables`.
        prefix: Of the score columns' names.
        columns: Input columns to keep; None keeps all, an empty list the scores alone.
        input_format: What bytes, text and messages hold: "json" (also by default) or "avro".
        avro_schema: Of the Avro records: a dict, or JSON text; see `AvroReader`.
        output: "record", in the input's own form; "json", as bytes; "avro", as bytes, or a message, of
            `scored_avro_schema`; or "anomaly_result", Beam's own class.
        max_batch_size: Records scored at once.
        max_batch_duration_secs: How long a record may wait for others of later Beam bundles; None: not at all.
        model_refresh_secs: How often a pointer is read again; see `ScoreTables`.
        models_by_key: In place of `bundle`: the URI of each key's bundle or pointer, or one URI with `{key}` in it,
            where keys may be new; see `KeyedModels`.
        default_model: Of keys that have none; without it, their records are dead letters.
        key: Column that holds the key; by default, records come as pairs `(key, record)`.
        max_model_bytes: Of weights and calibrations by key to keep in memory per process.
    """

    bundle: str | None = None
    reasons: int = 0
    threshold: float | None = None
    prefix: str = ""
    columns: Sequence[str] | None = None
    input_format: str | None = None
    avro_schema: Any = None
    output: str = "record"
    max_batch_size: int = 4096
    max_batch_duration_secs: float | None = None
    model_refresh_secs: float | None = None
    models_by_key: Mapping[str, str] | str | None = None
    default_model: str | None = None
    key: str | None = None
    max_model_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        super().__init__()
        if (self.bundle is None) == (self.models_by_key is None):
            raise ValueError("bundle: expected the URI of one, or else models_by_key")
        if self.models_by_key is not None:
            if self.threshold is not None:
                raise ValueError("threshold: expected None with models_by_key, for scores compare within one model")
            self._keyed_models(0)
        elif self.default_model is not None or self.key is not None:
            raise ValueError("default_model, key: expected with models_by_key, and only then")
        if self.input_format not in INPUT_FORMATS:
            raise ValueError(f'input_format: expected "json" or "avro", got {self.input_format!r}')
        if (self.input_format == "avro") != (self.avro_schema is not None):
            raise ValueError('avro_schema: expected with input_format="avro", and only then')
        if self.output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if self.output == "avro" and self.input_format != "avro":
            raise ValueError('output: "avro" needs input_format="avro"')
        if self.reasons < 0:
            raise ValueError(f"reasons: expected a number >= 0, got {self.reasons}")
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected a number >= 1, got {self.max_batch_size}")
        if self.max_batch_duration_secs is not None and not self.max_batch_duration_secs > 0:
            raise ValueError(f"max_batch_duration_secs: expected seconds > 0, got {self.max_batch_duration_secs}")
        clash = {field.name for field in score_fields(self.reasons, self.prefix)} & set(self.columns or ())
        if clash:
            raise ValueError(f"{sorted(clash)[0]}: named in columns, but it is a score column; choose a prefix")

    def with_exception_handling(self) -> ScoreRecords:
        """The same: errors are always caught, record by record."""
        return self

    @property
    def _launched_name(self) -> str | None:
        return self.default_model if self.bundle is None else self.bundle

    @cached_property
    def launched(self) -> Launched:
        """The bundle (or the default model) as it is when the pipeline is built, read once, and where it is."""
        if self._launched_name is None:
            raise ValueError("default_model: expected its URI, got none: no model is read before its key comes")
        return launch(self._launched_name)

    @cached_property
    def scored_avro_schema(self) -> Any:
        """What output="avro" holds, behind the single-object header: a schema, or one by id, as in `avro_schema`.

        Raises:
            ValueError: See `AvroWriter`.
        """
        reader = AvroReader(self.avro_schema)
        schemas = self._avro_writer(reader).schemas
        return dict(zip(reader.ids, schemas, strict=True)) if reader.ids else schemas[0]

    def _avro_writer(self, reader: AvroReader) -> AvroWriter:
        return AvroWriter(reader, score_fields(self.reasons, self.prefix), self.columns)

    def _keyed_models(self, refresh_secs: float) -> KeyedModels:
        assert self.models_by_key is not None
        return KeyedModels(
            self.models_by_key, default=self.default_model, max_bytes=self.max_model_bytes, refresh_secs=refresh_secs
        )

    def expand(self, records: beam.PCollection[Any]) -> ScoredRecords:
        refresh = refresh_secs(self.model_refresh_secs, records)
        launched = self.launched if self._launched_name else None  # a default model that cannot be used is told now
        source: ModelSource | KeyedModels
        if launched and self.models_by_key is None:
            source = launched.source(refresh)
            refuse_threshold(self.threshold, source)
        else:
            source = self._keyed_models(refresh)
        avro = AvroReader(self.avro_schema) if self.input_format == "avro" else None
        avro_writer = self._avro_writer(avro) if avro is not None and self.output == "avro" else None
        scorer = _RecordScorer(
            source,
            self.key,
            {"reasons": self.reasons, "threshold": self.threshold, "prefix": self.prefix},
            Writer(self.output, None if self.columns is None else tuple(self.columns), self.prefix, avro_writer),
            avro,
        )
        if self.max_batch_duration_secs is None:
            batches, do_fn = records, _ScoreInBundle(scorer, self.max_batch_size)
        else:
            batches = records | "Shard" >> beam.ParDo(_Shard(self.max_batch_size)).with_output_types(
                tuple[int, tuple[Any, int, Any]]
            )
            do_fn = _ScoreAcrossBundles(scorer, self.max_batch_size, self.max_batch_duration_secs)
        output_type = self._output_type(records.element_type)
        score = beam.ParDo(do_fn).with_output_types(output_type)
        outputs = batches | "Score" >> score.with_outputs("dead_letters", main="scored")
        outputs.dead_letters.element_type = pa.Table
        # What a step sends as its Beam bundle ends, Beam 2.77 does not pass on to a step that takes batches, such as
        # `WriteToParquet` of rows: so there is another one between.
        scored = outputs.scored | "PassOn" >> beam.ParDo(_PassOn()).with_output_types(output_type)
        return ScoredRecords(scored, outputs.dead_letters)

    def _output_type(self, element_type: Any) -> Any:
        parts: Sequence[Any] = getattr(element_type, "tuple_types", ())
        if isinstance(element_type, typehints.TupleConstraint) and len(parts) == 2:
            return typehints.Tuple[parts[0], self._output_type(parts[1])]
        if self.output == "json":
            return bytes
        if self.output == "anomaly_result":
            return AnomalyResult
        if element_type in (bytes, str, PubsubMessage):
            if self.input_format == "avro" and element_type is bytes and self.output == "record":
                return dict[str, Any]
            return element_type
        row = RowTypeConstraint.from_user_type(element_type)
        if isinstance(element_type, RowTypeConstraint):
            row = element_type
        if row is not None:
            return self._row_type(row)
        return Any

    def _row_type(self, row: RowTypeConstraint) -> Any:
        """Of scored rows.

        Raises:
            ValueError: Such rows cannot be scored, or lack a column that is to be kept.
        """
        fields = dict(row._fields)
        for name in self.launched.bundle.schema.names if self._launched_name else ():
            if name not in fields:
                raise ValueError(
                    f"{self.launched.name}: the rows do not fit the model: {name}: expected such a column, got none"
                )
        added = _score_types(self.reasons, self.prefix)
        for argument, names in {"columns": self.columns or (), "key": (self.key,) if self.key else ()}.items():
            for name in names:
                if name not in fields:
                    raise ValueError(f"{name}: named in {argument}, but the rows have only {', '.join(fields)}")
        if self.columns is not None:
            fields = {name: fields[name] for name in self.columns}
        for name in added:
            if name in fields:
                raise ValueError(f"{name}: the rows have such a column already; choose a prefix for the scores")
        return RowTypeConstraint.from_fields([*fields.items(), *added.items()])


def _score_types(reasons: int, prefix: str) -> dict[str, Any]:
    types = {pa.float32(): np.float32, pa.bool_(): bool, pa.string(): str, REASON_TYPE: Sequence[Reason]}
    return {field.name: types[field.type] for field in score_fields(reasons, prefix)}


# ---- a batch of elements ---------------------------------------------------------------------------


class _FaultOf(Fault):
    """A fault of a record that one of several models was to score."""

    model_version: str

    @classmethod
    def model(cls, bundle: Bundle, fault: Fault) -> _FaultOf:
        own = cls(*fault)
        own.model_version = bundle.model_version
        return own


class _RecordScorer:
    """Scores elements of any kind: what the DoFns below share.

    Args:
        source: Of the model, or of those by key.
        key: Column that holds the key; None where elements are pairs.
        options: Of `Bundle.split`.
        writer: Puts scores onto records.
        avro: Reads Avro, or None where bytes are JSON.
    """

    def __init__(
        self,
        source: ModelSource | KeyedModels,
        key: str | None,
        options: dict[str, Any],
        writer: Writer,
        avro: AvroReader | None,
    ) -> None:
        self._source, self._key = source, key
        self._options, self._writer, self._avro = options, writer, avro
        self._letters, self._metrics = Letters(), ScoringMetrics()
        self._model: Model | None = None
        self._forms: dict[type, Form | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}  # functions of a type are found again

    def setup(self) -> None:
        """Loads the model, unless this process has it; models by key are loaded when their keys come."""
        start = time.perf_counter()
        if isinstance(self._source, ModelSource):
            self._model = self._source.open()
        # Metrics belong to a Beam bundle; there is none yet.
        self._loaded: float | None = time.perf_counter() - start

    def score(self, batch: list[WindowedValue]) -> Iterator[Any]:
        """Each element's outcome with the element's own timestamp, windows and pane."""
        if not batch:
            return
        bundle = None
        if self._model is not None:
            bundle = self._model.current()  # from here to the end of the batch
            if self._loaded is not None:
                self._metrics.loaded(bundle, self._loaded)
                self._loaded = None
        faults: dict[int, Fault] = {}
        for row, outcome in enumerate(self._outcomes(bundle, [item.value for item in batch])):
            if isinstance(outcome, Fault):
                faults[row] = outcome
            else:
                yield batch[row].with_value(outcome)
        if faults:
            yield from self._dead_letters(batch, faults, bundle.model_version if bundle else None)

    def _outcomes(self, bundle: Bundle | None, elements: list[Any]) -> list[Any]:
        """What each element becomes, or its `Fault`."""
        kinds = list(map(type, elements))
        if tuple in kinds:
            pairs = list(map(is_keyed, elements))
            keys = [element[0] if pair else None for element, pair in zip(elements, pairs, strict=True)]
            records = [element[1] if pair else element for element, pair in zip(elements, pairs, strict=True)]
            outcomes = self._by_kind(bundle, list(map(type, records)), records, keys)
            return [
                (key, outcome) if pair and not isinstance(outcome, Fault) else outcome
                for pair, key, outcome in zip(pairs, keys, outcomes, strict=True)
            ]
        return self._by_kind(bundle, kinds, elements, None)

    def _by_kind(
        self, bundle: Bundle | None, kinds: list[type], records: list[Any], keys: list[Any] | None
    ) -> list[Any]:
        def outcomes_of(kind: type, rows: Sequence[int]) -> list[Any]:
            if kind not in self._forms:
                self._forms[kind] = form_of(kind, self._avro is not None)
            form, own = self._forms[kind], records if len(rows) == len(records) else [records[row] for row in rows]
            if form is None:
                error = "expected a record (dict, row, JSON or message), got "
                return [Fault(None, "not_a_record", error + shown(record)) for record in own]
            batch, faults = read_batch(form, own, self._avro)
            if bundle is not None:
                return self._scored(bundle, batch, faults)
            return self._scored_by_key(batch, faults, keys and [keys[row] for row in rows])

        return _each(kinds, outcomes_of)

    def _scored_by_key(self, batch: Batch, faults: dict[int, Fault], keys: list[Any] | None) -> list[Any]:
        """Outcomes of records with models of their keys, of which one at a time is in use."""
        assert isinstance(self._source, KeyedModels)
        reading = Reading(self._key or "key", pa.string())
        if self._key is None:
            names, wrong = read_column(keys or [None] * len(batch.elements), reading)
            faults = {row: Fault(None, "invalid_key", f"key: {error}") for row, error in wrong.items()} | faults
        else:
            columns = batch.read([reading])
            (names,) = columns.arrays
            faults = {
                row: fault for row, fault in columns.faults.items() if fault.error_type != "missing_column"
            } | faults
        outcomes: list[Any] = [faults.get(row) for row in range(len(batch.elements))]
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(names.to_pylist()):
            if outcomes[row] is None:
                rows_of.setdefault(name, []).append(row)
        for group, bundle in self._source.assign(rows_of):
            rows = [row for name in group for row in rows_of[name]]
            if isinstance(bundle, KeyedModelError):
                found: list[Any] = [Fault(self._key, bundle.error_type, str(bundle))] * len(rows)
            else:
                found = self._scored(bundle, batch.take(rows), {})
                found = [_FaultOf.model(bundle, one) if type(one) is Fault else one for one in found]
            for row, outcome in zip(rows, found, strict=True):
                outcomes[row] = outcome
        return outcomes

    def _scored(self, bundle: Bundle, batch: Batch, faults: dict[int, Fault]) -> list[Any]:
        """Outcomes of records with one model."""
        features, prefix = readings(bundle.schema), self._options["prefix"]
        added = [field.name for field in score_fields(self._options["reasons"], prefix)]
        columns = batch.read(features, added)
        faults = {**columns.faults, **faults}
        table = pa.Table.from_arrays(columns.arrays, [reading.name for reading in features])
        rows: Sequence[int] = range(len(batch.elements))
        if faults:
            rows = [row for row in rows if row not in faults]
            table = table.take(pa.array(rows, pa.int64()))
        outcomes: list[Any] = []
        if rows:
            start = time.perf_counter()
            scored, rejects = bundle.split(table, **self._options)
            self._metrics.batch(table, scored, prefix, time.perf_counter() - start)
            if len(rejects):
                for row, *why in zip(*rejects.table().to_pydict().values(), strict=True):
                    faults[rows[row]] = Fault(*why)
                rows = [row for row, keep in zip(rows, rejects.keep.tolist(), strict=True) if keep]
            scores = scored.select(added)
            threshold = self._options["threshold"]
            limit = float(np.float32(bundle.threshold.value if threshold is None else threshold))
            outcomes = self._writer.write(batch.take(rows) if faults else batch, scores, limit)
        if not faults:
            return outcomes
        whole: list[Any] = [None] * len(batch.elements)
        for row, fault in faults.items():
            whole[row] = fault
        for row, outcome in zip(rows, outcomes, strict=True):
            whole[row] = outcome
        return whole

    def _dead_letters(self, batch: list[WindowedValue], faults: dict[int, Fault], version: str | None) -> Iterator[Any]:
        elements = [batch[row].value for row in faults]
        letters = record_letters(
            [payload(element[1] if is_keyed(element) else element, self._avro is not None) for element in elements],
            list(faults.values()),
            attributes=list(map(_attributes, elements)),
            event_times=[event_time(batch[row].timestamp_micros) for row in faults],
            stage="score",
            model_version=[getattr(fault, "model_version", version) for fault in faults.values()],
        )
        self._letters.count(letters)
        places: dict[Any, list[int]] = {}
        for place, row in enumerate(faults):
            item = batch[row]
            places.setdefault((item.timestamp_micros, tuple(item.windows), item.pane_info), []).append(place)
        rows = list(faults)
        for together in places.values():
            own = letters if len(places) == 1 else letters.take(pa.array(together))
            yield beam.pvalue.TaggedOutput("dead_letters", batch[rows[together[0]]].with_value(own))


def _each(labels: Sequence[Any], outcomes_of: Callable[[Any, Sequence[int]], list[Any]]) -> list[Any]:
    """The outcomes of rows that are treated together where they have one label, in the rows' order."""
    if len(set(labels)) == 1:
        return outcomes_of(labels[0], range(len(labels)))
    places: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        places.setdefault(label, []).append(row)
    outcomes: list[Any] = [None] * len(labels)
    for label, rows in places.items():
        for row, outcome in zip(rows, outcomes_of(label, rows), strict=True):
            outcomes[row] = outcome
    return outcomes


def _attributes(element: Any) -> dict[str, str] | None:
    """Of a message, and the key of a pair."""
    key = {}
    if is_keyed(element):
        name, element = element
        key = {} if name is None else {"key": payload(name)[0]}
    own = element.attributes if isinstance(element, PubsubMessage) else None
    return {**(own or {}), **key} if own or key else None


_FIRST_YEAR, _LAST_YEAR = -62_135_596_800_000_000, 253_402_300_799_999_999  # 1 and 9999, in microseconds


def event_time(micros: int) -> int | None:
    """The same time, in microseconds since 1970, or None where the calendar ends before it."""
    return micros if _FIRST_YEAR <= micros <= _LAST_YEAR else None  # Beam's own least and greatest say nothing


class _Windows(tuple[Any, ...]):
    """Windows of an element that is sent while one in several windows is processed.

    Beam multiplies the windows of what is sent by the number of the processed element's, which is right only for
    a window that the DoFn chose itself.
    """

    def __mul__(self, number: Any) -> _Windows:
        return self


def _with_own_windows(outputs: Iterator[Any]) -> Iterator[Any]:
    for output in outputs:
        value = output.value if isinstance(output, beam.pvalue.TaggedOutput) else output
        value.windows = _Windows(value.windows)
        yield output


# ---- within a Beam bundle --------------------------------------------------------------------------


class _ScoreInBundle(beam.DoFn):
    """Scores the elements of a Beam bundle together; the last ones as it ends."""

    def __init__(self, scorer: _RecordScorer, max_batch_size: int) -> None:
        self._scorer, self._max_batch_size = scorer, max_batch_size
        self._batch: list[WindowedValue] = []

    def setup(self) -> None:
        self._scorer.setup()

    def start_bundle(self) -> None:
        self._batch = []  # an earlier bundle may have failed

    def process(self, element: Any, item: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        batch = self._batch
        batch.append(item)
        if len(batch) < self._max_batch_size:
            return ()
        self._batch = []
        outputs = self._scorer.score(batch)
        return outputs if len(item.windows) == 1 else _with_own_windows(outputs)

    def finish_bundle(self) -> Iterator[Any]:
        batch, self._batch = self._batch, []
        return self._scorer.score(batch)


class _PassOn(beam.DoFn):
    def process(self, element: Any) -> tuple[Any]:
        return (element,)


# ---- across Beam bundles ---------------------------------------------------------------------------


_arrivals = itertools.count()  # of this process, so that short Beam bundles use all shards
_FIRST_SHARD = (uuid.getnode() ^ os.getpid()) % _NUM_SHARDS


class _Shard(beam.DoFn):
    """Keys elements so that batches fill one after another, and several at once where there are many."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size

    def process(self, element: Any, item: Any = beam.DoFn.WindowedValueParam) -> Iterator[Any]:
        shard = (next(_arrivals) // self._max_batch_size + _FIRST_SHARD) % _NUM_SHARDS
        pane = item.pane_info
        yield shard, (element, item.timestamp_micros, None if pane == PANE_INFO_UNKNOWN else _pane_parts(pane))


def _pane_parts(pane: PaneInfo) -> tuple[Any, ...]:
    return pane.is_first, pane.is_last, pane.timing, pane.index, pane.nonspeculative_index


class _ScoreAcrossBundles(beam.DoFn):
    """Keeps elements in state until a batch is full, the oldest has waited long enough, or the window ends."""

    BATCH = BagStateSpec("batch", FastPrimitivesCoder())
    # Number of elements, their least timestamp, when to score them at the latest.
    FILL = ReadModifyWriteStateSpec("fill", FastPrimitivesCoder())
    DUE = TimerSpec("due", TimeDomain.REAL_TIME)
    WINDOW_END = TimerSpec("window_end", TimeDomain.WATERMARK)

    def __init__(self, scorer: _RecordScorer, max_size: int, max_duration_secs: float) -> None:
        self._scorer = scorer
        self._max_size, self._max_duration_secs = max_size, max_duration_secs

    def setup(self) -> None:
        self._scorer.setup()

    def process(
        self,
        element: tuple[int, tuple[Any, int, Any]],
        window: Any = beam.DoFn.WindowParam,
        batch: Any = beam.DoFn.StateParam(BATCH),  # noqa: B008
        fill: Any = beam.DoFn.StateParam(FILL),  # noqa: B008
        due: Any = beam.DoFn.TimerParam(DUE),  # noqa: B008
        window_end: Any = beam.DoFn.TimerParam(WINDOW_END),  # noqa: B008
    ) -> Iterable[Any]:
        _, item = element
        micros = item[1]
        size, least, deadline = fill.read() or (0, micros, None)
        batch.add(item)
        if size + 1 >= self._max_size:
            due.clear()
            return self._flush(window, batch, fill)
        if deadline is None:
            deadline = time.time() + self._max_duration_secs
            window_end.set(window.max_timestamp())
            due.set(Timestamp.of(deadline))
        elif micros < least:
            due.set(Timestamp.of(deadline))  # again: it holds the watermark at the element that sets it
        fill.write((size + 1, min(least, micros), deadline))
        return ()

    @on_timer(DUE)
    def on_due(
        self,
        window: Any = beam.DoFn.WindowParam,
        batch: Any = beam.DoFn.StateParam(BATCH),  # noqa: B008
        fill: Any = beam.DoFn.StateParam(FILL),  # noqa: B008
    ) -> Iterator[Any]:
        return self._flush(window, batch, fill)

    @on_timer(WINDOW_END)
    def on_window_end(
        self,
        window: Any = beam.DoFn.WindowParam,
        batch: Any = beam.DoFn.StateParam(BATCH),  # noqa: B008
        fill: Any = beam.DoFn.StateParam(FILL),  # noqa: B008
        due: Any = beam.DoFn.TimerParam(DUE),  # noqa: B008
    ) -> Iterator[Any]:
        due.clear()
        return self._flush(window, batch, fill)

    def _flush(self, window: Any, batch: Any, fill: Any) -> Iterator[Any]:
        items = [
            windowed_value(element, micros, (window,), PaneInfo(*pane) if pane else PANE_INFO_UNKNOWN)
            for element, micros, pane in batch.read()
        ]
        batch.clear()
        fill.clear()
        return self._scorer.score(items)
