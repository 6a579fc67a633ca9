"""The model behind Beam's RunInference."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.avro import AvroReader
from pipeline.letters import NAMESPACE, Letters
from pipeline.models import REFRESH_SECS, FollowedModel, Model, ModelSource, launch
from pipeline.rows import Fault, Form, form_of, read_elements, readings, shown
from pipeline.transforms import refuse_threshold
from vae_model import files
from vae_model.bundle import MANIFEST, Bundle, read_manifest, score_fields
from vae_model.pointer import Entry, Pointer, is_pointer, read_pointer
from vae_model.promotion import readings as kinds_read
from vae_model.tables import RecordError

_PER_RUN = ("reasons", "threshold")  # what inference_args may hold
_BEAM_ARGUMENTS = {*inspect.signature(ModelHandler.__init__).parameters, "env_vars"} - {"self", "kwargs"}
_FAULT_FIELDS = [pa.field(name, pa.string()) for name in Fault._fields]


class VAEModelHandler(ModelHandler[Any, PredictionResult, "ServedModel"]):
    """Scores records and tables in RunInference; all that it offers works: keys, swaps, batching, metrics.

    Elements may be what `ScoreRecords` reads (dicts, rows, NamedTuples, JSON, Avro, Pub/Sub messages), whose
    inference is a dict of the score columns; or a `pa.Table` or `RecordBatch`, whose inference is a `pa.Table` of
    them, one line per row, as `table_schema` says. A record that cannot be scored does not fail its batch: its
    inference is a dict of `column`, `error_type` and `error` (for a row of a table, these columns are set and the
    scores null). `model_id` is the model's version.

    Building one reads the bundle, unless `model_version` is given, and loads no TensorFlow.

    Args:
        bundle: Directory or URI that `fit` wrote, or a pointer that `beam-vae promote` wrote.
        reasons: Strangest columns to explain per record; `inference_args` may say otherwise.
        threshold: Score, in nats, that replaces the bundle's; so may they. None where a pointer is followed.
        errors: "return" them in the inference, or "raise" `RecordError`, which fails the batch and is what
            RunInference's `with_exception_handling` sets aside.
        avro_schema: Of Avro records: a dict, or JSON text. Without it, bytes, text and messages are JSON.
        model_version: Of the bundle, which is not read then until a worker loads it.
        model_refresh_secs: How often a pointer is read again, 0 for never.
        beam_arguments: Of Beam's `ModelHandler`: `min_batch_size`, `max_batch_size`, `max_batch_duration_secs`,
            `large_model`, `model_copies`, `env_vars`, ...

    Raises:
        BundleError: There is no such bundle.
        ValueError: An argument is not as above.
        TypeError: Beam has no such argument.
    """

    def __init__(
        self,
        bundle: str,
        *,
        reasons: int = 0,
        threshold: float | None = None,
        errors: Literal["return", "raise"] = "return",
        avro_schema: Any = None,
        model_version: str | None = None,
        model_refresh_secs: float = 0,
        **beam_arguments: Any,
    ) -> None:
        if unknown := beam_arguments.keys() - _BEAM_ARGUMENTS:  # Beam would take it and say nothing
            raise TypeError(f"{min(unknown)}: no such argument of VAEModelHandler, nor of Beam's ModelHandler")
        super().__init__(**beam_arguments)
        self._options = {"reasons": reasons, "threshold": threshold}
        if errors not in ("return", "raise"):
            raise ValueError(f'errors: expected "return" or "raise", got {errors!r}')
        self._errors = errors
        self._avro = None if avro_schema is None else AvroReader(avro_schema)
        self._columns: tuple[tuple[str, str], ...] = ()
        if model_version is None:
            launched = launch(bundle)
            self._source = launched.source(model_refresh_secs)
            self._columns = tuple(kinds_read(launched.bundle.schema).items())
        elif is_pointer(bundle):
            raise ValueError(f"model_version: expected with a bundle's URI, not with a pointer's, {bundle}")
        else:
            self._source = ModelSource(files.absolute(bundle), model_version)
        self.validate_inference_args(self._options)
        self._wanted: str | None = None
        self._served: ServedModel | None = None
        self._letters = Letters()
        self._num_anomalies = Metrics.counter(NAMESPACE, "num_anomalies")

    @property
    def model_version(self) -> str:
        """The version at launch."""
        return self._source.model_version

    @staticmethod
    def table_schema(reasons: int = 0) -> pa.Schema:
        """Of a table's inference."""
        return pa.schema(score_fields(reasons) + _FAULT_FIELDS)

    # ---- what RunInference calls ---------------------------------------------------------------

    def load_model(self) -> ServedModel:
        """The model: of launch, or the one that an update asked for; where it is not sound, the one before."""
        if self._wanted is None:
            model = self._source.open()
        else:
            before = None if self._served is None else self._served.bundle
            model = _UpdatedModel(self._source, self._wanted, self._columns, before)
        self._served = ServedModel(model, self._avro)
        return self._served

    def run_inference(
        self, batch: Sequence[Any], model: ServedModel, inference_args: dict[str, Any] | None = None
    ) -> list[PredictionResult]:
        if isinstance(model, ServedModel):  # not a proxy of another process's
            self._served = model  # what an update that proves bad falls back on, also if another DoFn loaded it
        elements = [batch] if isinstance(batch, pa.Table | pa.RecordBatch) else list(batch)
        scored = model.score(elements, **{**self._options, **(inference_args or {})})
        if scored.faults and self._errors == "raise":
            raise RecordError(
                f"{len(scored.faults):,} records of a batch cannot be scored; the first: {scored.faults[0].error}"
            )
        if scored.faults:
            lines = [{**fault._asdict(), "num_records": 1} for fault in scored.faults]
            self._letters.count(pa.Table.from_pylist(lines, pa.schema([*_FAULT_FIELDS, ("num_records", pa.int64())])))
        self._num_anomalies.inc(scored.num_anomalies)
        return [
            self._result(element, outcome, scored) for element, outcome in zip(elements, scored.outcomes, strict=True)
        ]

    def _result(self, element: Any, outcome: Any, scored: Scored) -> Any:
        inference = outcome._asdict() if type(outcome) is Fault else outcome
        return PredictionResult(element, inference, scored.model_version)

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Of the elements in Python, without what they refer to: cheap, where Beam's default pickles them."""
        if isinstance(batch, pa.Table | pa.RecordBatch):
            return int(batch.nbytes)
        return sum(element.__sizeof__() for element in batch)

    def get_metrics_namespace(self) -> str:
        return NAMESPACE

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Raises `ValueError` for any but `reasons` and `threshold`, and for wrong values of these."""
        args = inference_args or {}
        if unknown := args.keys() - set(_PER_RUN):
            raise ValueError(f"inference_args: expected any of {', '.join(_PER_RUN)}, got {min(unknown)}")
        if args.get("reasons", 0) < 0:
            raise ValueError(f"reasons: expected a number >= 0, got {args['reasons']}")
        refuse_threshold(args.get("threshold"), self._source)

    def update_model_path(self, model_path: str | None = None) -> None:
        """Has the next `load_model` load another bundle: its URI, its manifest's, or that of a pointer to it."""
        if not model_path:  # so Beam says that nothing is new
            return
        uri = files.absolute(model_path.removesuffix(f"/{MANIFEST}"))
        self._wanted = None if uri in (self._source.bundle, self._source.pointer) else uri

    # ---- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_served": None}  # a worker loads its own

    def __deepcopy__(self, memo: dict[int, Any]) -> VAEModelHandler:
        """For keys that get a model of their own: theirs comes from the one that they had together."""
        twin = copy.copy(self)
        twin._served = self._served
        return twin

    def __repr__(self) -> str:
        """The same in every process: Beam puts it into the pipeline."""
        source = self._source
        return f"{type(self).__name__}({source.pointer or source.bundle!r}, model_version={source.model_version!r})"


class Scored(NamedTuple):
    """What became of a batch.

    Args:
        outcomes: Of each element: a dict of scores, a `Fault`, or a table.
        faults: Of all records, rows of tables included.
        num_anomalies: Of all records.
        model_version: That scored them.
        threshold: In force, in nats.
    """

    outcomes: list[Any]
    faults: list[Fault]
    num_anomalies: int
    model_version: str
    threshold: float


class ServedModel:
    """What RunInference holds and shares, also among processes, which call its methods then."""

    def __init__(self, model: Model, avro: AvroReader | None) -> None:
        self._model, self._avro = model, avro
        self._forms: dict[type, Form | None] = {}

    @property
    def bundle(self) -> Bundle:
        """That scores the next batch."""
        return self._model.bundle

    def score(self, elements: list[Any], reasons: int, threshold: float | None) -> Scored:
        """Scores elements of any kinds with one version."""
        bundle = self._model.current()
        batch = _Batch(bundle, {"reasons": reasons, "threshold": threshold}, self._avro)
        outcomes: list[Any] = [None] * len(elements)
        for kind in dict.fromkeys(map(type, elements)):
            places = [place for place, element in enumerate(elements) if type(element) is kind]
            group = [elements[place] for place in places]
            if issubclass(kind, pa.Table | pa.RecordBatch):
                found = [batch.score_table(table) for table in group]
            else:
                found = batch.score_records(self._form(kind), group)
            for place, outcome in zip(places, found, strict=True):
                outcomes[place] = outcome
        limit = float(np.float32(bundle.threshold.value if threshold is None else threshold))
        return Scored(outcomes, batch.faults, batch.num_anomalies, bundle.model_version, limit)

    def _form(self, kind: type) -> Form | None:
        if kind not in self._forms:
            self._forms[kind] = form_of(kind, self._avro is not None)
        return self._forms[kind]


class _Batch:
    """Elements on their way through a bundle."""

    def __init__(self, bundle: Bundle, options: dict[str, Any], avro: AvroReader | None) -> None:
        self._bundle, self._options, self._avro = bundle, options, avro
        self._columns = [field.name for field in score_fields(options["reasons"])]
        self.faults: list[Fault] = []
        self.num_anomalies = 0

    def score_records(self, form: Form | None, elements: list[Any]) -> list[Any]:
        """Each one's dict of scores, or its `Fault`."""
        if form is None:
            error = "expected a record (dict, row, JSON or message) or a table, got "
            wrong = [Fault(None, "not_a_record", error + shown(element)) for element in elements]
            self.faults += wrong
            return wrong
        wanted = readings(self._bundle.schema)
        arrays, faults = read_elements(form, elements, wanted, self._avro)
        table = pa.Table.from_arrays(arrays, [reading.name for reading in wanted])
        scores = self._scores(table, faults)
        lines = zip(*(column.to_pylist() for column in scores.columns), strict=True)
        outcomes: list[Any] = [dict(zip(self._columns, line, strict=True)) for line in lines]
        for row, fault in faults.items():
            outcomes[row] = fault
        return outcomes

    def score_table(self, table: pa.Table | pa.RecordBatch) -> pa.Table:
        """The score columns of its rows, and why some have none."""
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        names = set(self._bundle.schema.names)
        places = [place for place, name in enumerate(table.column_names) if name in names]
        # Arrow forgets how many rows a table without columns has.
        read = table.select(places) if places else pa.table({"": pa.nulls(table.num_rows)})
        faults: dict[int, Fault] = {}
        scores = self._scores(read, faults)
        why = [faults.get(row, (None, None, None)) for row in range(table.num_rows)] if faults else []
        for place, field in enumerate(_FAULT_FIELDS):
            texts = (
                pa.array([fault[place] for fault in why], pa.string()) if why else pa.nulls(len(scores), pa.string())
            )
            scores = scores.append_column(field, texts)
        return scores

    def _scores(self, table: pa.Table, faults: dict[int, Fault]) -> pa.Table:
        """The score columns, a line per row, null where it has a fault; faults that scoring finds are added."""
        num_rows = table.num_rows
        rows = np.delete(np.arange(num_rows), list(faults))
        scored, rejects = self._bundle.split(table.take(rows) if faults else table, **self._options)
        scores = scored.select(self._columns)
        if len(rejects):
            for row, *why in zip(*rejects.table().to_pydict().values(), strict=True):
                faults[int(rows[row])] = Fault(*why)
            rows = rows[rejects.keep]
        self.faults += faults.values()
        self.num_anomalies += pc.sum(scores["is_anomaly"], min_count=0).as_py()
        if len(rows) < num_rows:
            places = np.full(num_rows, -1)
            places[rows] = np.arange(len(rows))
            scores = scores.take(pa.array(places, mask=places < 0))
        return scores


class _UpdatedModel(FollowedModel):
    """The bundle that RunInference was told to take; while it proves bad, the one before, or that of launch."""

    def __init__(
        self, launched: ModelSource, uri: str, columns: tuple[tuple[str, str], ...], before: Bundle | None
    ) -> None:
        if before and not columns:
            columns = tuple(kinds_read(before.schema).items())
        super().__init__(ModelSource(launched.bundle, launched.model_version, uri, REFRESH_SECS, columns))
        self._uri = uri
        if before is None:
            self.load()
        else:
            self._bundle = before
            self.poll()

    def current(self) -> Bundle:
        if self._refused is not None and time.monotonic() >= self._retry_at:
            self.poll()
        return super().current()

    def _read(self) -> Pointer | None:
        """What the pointer names or, of a bundle itself, a pointer to it."""
        try:
            if is_pointer(self._uri):
                return read_pointer(self._uri)
            return Pointer(self._uri, Entry(self._uri, read_manifest(self._uri)["model_version"], ""))
        except Exception as error:  # of Arrow's filesystems, too, which have errors of their own
            self._refuse(Entry(self._uri, "unknown", ""), error, "going on with the one before")
            return None
