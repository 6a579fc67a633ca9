"""Runs of ScoreRecords whose inputs and outputs are kept, for the tests of records."""

import io
import json
import typing
import uuid
from collections import Counter, UserDict
from collections.abc import Mapping

import apache_beam as beam
import fastavro
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.ml.anomaly.base import AnomalyResult
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import TimestampedValue

from pipeline.letters import NAMESPACE

AVRO = {
    "type": "record",
    "name": "Item",
    "fields": [
        {"name": "length", "type": "double"},
        {"name": "weight", "type": "double"},
        {"name": "count", "type": "long"},
        {"name": "color", "type": "string"},
        {"name": "size", "type": "string"},
        {"name": "price", "type": ["null", "double"]},
        {"name": "is_large", "type": "boolean"},
        {"name": "seen_at", "type": {"type": "long", "logicalType": "local-timestamp-micros"}},
        {"name": "site", "type": "string"},
        {"name": "unit", "type": "double"},
        {"name": "id", "type": "string"},
    ],
}


class ITEM(typing.NamedTuple):
    length: float
    weight: float
    count: int
    color: str
    size: str
    price: float | None
    is_large: bool
    seen_at: str
    site: str
    unit: float
    id: str


beam.coders.registry.register_coder(ITEM, beam.coders.RowCoder)


# ---- pipelines whose outputs are kept in this process --------------------------------------------

KEPT: dict[str, list] = {}


class Keep(beam.DoFn):
    """Elements with their timestamps, windows and panes."""

    def __init__(self, key):
        self._key = key

    def process(self, element, item=beam.DoFn.WindowedValueParam):
        KEPT[self._key].append(item.with_value(element))
        return ()


class Outcome(typing.NamedTuple):
    given: list  # as they entered ScoreRecords
    scored: list
    letters: list
    counters: dict[str, int]
    distributions: dict[str, typing.Any]

    @property
    def batch_sizes(self):
        return self.distributions.get("inference_request_batch_size")

    def values(self):
        return [item.value for item in self.scored]

    def reasons(self):
        return [letter for item in self.letters for letter in item.value.to_pylist()]


def run(source, transform, runner="FnApiRunner", prepare=None, **options) -> Outcome:
    """Runs a source (elements, or a transform of a pipeline) into ScoreRecords."""
    keys = {name: uuid.uuid4().hex for name in ("given", "scored", "letters")}
    KEPT.update({key: [] for key in keys.values()})
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions([], **options))
    if isinstance(source, list):
        source = beam.Create(source, reshuffle=False)
    records = pipeline | source
    if prepare is not None:
        records = records | "Prepare" >> prepare
    results = records | transform
    for name, output in {"given": records, "scored": results.scored, "letters": results.dead_letters}.items():
        output | name >> beam.ParDo(Keep(keys[name]))
    result = pipeline.run()
    result.wait_until_finish()
    counters: Counter = Counter()
    metrics = result.metrics().query()
    for counter in metrics["counters"]:
        if counter.key.metric.namespace == NAMESPACE:
            counters[counter.key.metric.name] += counter.committed
    distributions = {
        item.key.metric.name: item.committed
        for item in metrics["distributions"]
        if item.key.metric.namespace == NAMESPACE
    }
    return Outcome(*(KEPT.pop(keys[name]) for name in ("given", "scored", "letters")), counters, distributions)


def ident(value):
    """The id of a record in any form."""
    if isinstance(value, AnomalyResult):
        value = value.example
    if isinstance(value, PubsubMessage):
        value = value.data
    if isinstance(value, bytes | str):
        value = json.loads(value)
    return value["id"] if isinstance(value, Mapping) else value.id


def score_of(value):
    if isinstance(value, AnomalyResult):
        return value.predictions[0].score
    if isinstance(value, PubsubMessage):
        value = value.data
    if isinstance(value, bytes | str):
        value = json.loads(value)
    return value["anomaly_score"] if isinstance(value, Mapping) else value.anomaly_score


def as_json(record) -> bytes:
    return json.dumps(record, default=lambda value: value.isoformat()).encode()


def as_avro(record) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, AVRO, record)
    return stream.getvalue()


def as_item(record):
    return ITEM(**{**record, "seen_at": record["seen_at"].isoformat()})


FORMS = {
    "dict": dict,
    "json": as_json,
    "text": lambda record: as_json(record).decode(),
    "row": lambda record: beam.Row(**record),
    "named": as_item,
    "message": lambda record: PubsubMessage(as_json(record), {"id": record["id"]}),
    "mapping": UserDict,
}


# ---- timestamps, windows, panes ------------------------------------------------------------------


class AtItsTime(beam.DoFn):
    def process(self, element):
        record, seconds = element
        yield TimestampedValue(record, seconds)


def same_places(outcome):
    """Every element left as it came in: timestamp, windows, pane."""

    def by_id(items):
        return sorted(
            (str(ident(item.value)), item.timestamp.micros, sorted(map(str, item.windows)), str(item.pane_info))
            for item in items
        )

    assert by_id(outcome.scored) == by_id(outcome.given)
