"""The same rows score the same, whichever way they come to the model."""

import json

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.ml.anomaly.base import EnsembleAnomalyDetector
from apache_beam.ml.anomaly.transforms import AnomalyDetection
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference

from pipeline import ScoreRecords, ScoreTables, VAEDetector, VAEModelHandler

FOUND: dict[str, list[tuple]] = {}  # by route: id, score, is_anomaly, model_version or None


def keep(line, route):
    FOUND[route].append(line)


def of_record(record) -> tuple:
    if isinstance(record, bytes):
        record = json.loads(record)
    if isinstance(record, beam.Row):
        record = record._asdict()
    return tuple(record[name] for name in ("id", "anomaly_score", "is_anomaly", "model_version"))


def of_table(table: pa.Table) -> list[tuple]:
    return [of_record(record) for record in table.to_pylist()]


def of_result(result) -> tuple:
    """Of RunInference, on a dict, a row or JSON."""
    example = result.example
    record = json.loads(example) if isinstance(example, bytes) else example
    name = record["id"] if isinstance(record, dict) else record.id
    return name, result.inference["anomaly_score"], result.inference["is_anomaly"], result.model_id


def of_table_result(result) -> list[tuple]:
    lines = zip(result.example["id"].to_pylist(), result.inference.to_pylist(), strict=True)
    return [of_record({"id": name, **line}) for name, line in lines]


def of_prediction(result) -> list[tuple]:
    """Of AnomalyDetection or `ScoreRecords(output="anomaly_result")`: whose model_id is the version."""
    return [(result.example.id, p.score, bool(p.label), p.model_id) for p in result.predictions]


def build(p, uri: str, table: pa.Table) -> dict:
    """Every route through Beam: its PCollection, and how its elements are read."""
    texts = table.set_column(table.column_names.index("seen_at"), "seen_at", table["seen_at"].cast(pa.string()))
    records = texts.to_pylist()
    tables = [table.slice(start, 17) for start in range(0, table.num_rows, 17)]
    dicts = p | "dicts" >> beam.Create(records)
    rows = p | "rows" >> beam.Create([beam.Row(**record) for record in records])
    texts = p | "texts" >> beam.Create([json.dumps(record).encode() for record in records])
    arrow = p | "tables" >> beam.Create(tables)
    handler = VAEModelHandler(uri)
    ensemble = EnsembleAnomalyDetector([VAEDetector(uri), VAEDetector(uri, reasons=2)])
    return {
        "ScoreTables": (arrow | ScoreTables(uri)).scored | beam.FlatMap(of_table),
        "ScoreRecords, dicts": (dicts | "d" >> ScoreRecords(uri, max_batch_size=7)).scored | beam.Map(of_record),
        "ScoreRecords, rows": (rows | "r" >> ScoreRecords(uri, reasons=1)).scored | "1" >> beam.Map(of_record),
        "ScoreRecords, JSON": (texts | "j" >> ScoreRecords(uri)).scored | "2" >> beam.Map(of_record),
        "ScoreRecords, results": (
            (dicts | "a" >> ScoreRecords(uri, output="anomaly_result")).scored | "3" >> beam.FlatMap(of_prediction)
        ),
        "RunInference, dicts": dicts | "rd" >> RunInference(handler) | "4" >> beam.Map(of_result),
        "RunInference, rows": rows | "rr" >> RunInference(handler) | "5" >> beam.Map(of_result),
        "RunInference, JSON": texts | "rj" >> RunInference(handler) | "6" >> beam.Map(of_result),
        "RunInference, one by one": (
            dicts
            | beam.WithKeys(lambda record: record["id"])
            | RunInference(KeyedModelHandler(VAEModelHandler(uri, max_batch_size=1)))
            | beam.Values()
            | "7" >> beam.Map(of_result)
        ),
        "RunInference, tables": (
            arrow | "rt" >> RunInference(handler.with_no_batching()) | "8" >> beam.FlatMap(of_table_result)
        ),
        "AnomalyDetection": rows | AnomalyDetection(VAEDetector(uri)) | "9" >> beam.FlatMap(of_prediction),
        "AnomalyDetection, twice": rows | "e" >> AnomalyDetection(ensemble) | "10" >> beam.FlatMap(of_prediction),
    }


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    """Rows that are normal, strange, incomplete, and of levels that no model has seen."""
    rows = make_table(60, seed=11).to_pylist()
    rows[3] |= {"length": 1e6, "weight": -1e6}
    rows[7] |= {"color": "never seen", "size": None, "price": None}
    rows[9] |= {"length": None, "seen_at": None}
    rows[20] |= {"count": 10**9, "site": "south", "unit": -2.5}
    return pa.Table.from_pylist([{**row, "id": f"id-{i}"} for i, row in enumerate(rows)])


@pytest.fixture(scope="module")
def found(bundle, bundle_uri, table) -> dict[str, list[tuple]]:
    p = beam.Pipeline(runner="FnApiRunner")
    for route, output in build(p, bundle_uri, table).items():
        FOUND[route] = []
        output | f"keep {route}" >> beam.Map(keep, route)
    p.run().wait_until_finish()
    frame = bundle.score(table.to_pandas())
    FOUND["Python, DataFrame"] = [of_record(record) for record in frame.to_dict("records")]
    one_by_one = [bundle.score(table.slice(i, 1)) for i in range(table.num_rows)]
    FOUND["Python, one by one"] = of_table(pa.concat_tables(one_by_one))
    return FOUND


def test_the_same_rows_score_the_same_by_every_route(bundle, table, found):
    alone = of_table(bundle.score(table))
    terms = bundle.terms(table).abs().to_numpy().sum(axis=1)
    tolerance = dict(zip(table["id"].to_pylist(), 1e-4 * (1 + terms), strict=True))
    wanted = {name: score for name, score, _, _ in alone}
    labels = {name: label for name, _, label, _ in alone}
    limit = float(np.float32(bundle.threshold.value))
    assert sum(labels.values()) >= 2
    assert len(found) == 14
    for route, lines in found.items():
        times = 2 if route.endswith("twice") else 1
        assert sorted(name for name, *_ in lines) == sorted([*wanted] * times), route
        for name, score, label, version in lines:
            assert abs(score - wanted[name]) <= tolerance[name], (route, name)
            assert label == (score >= limit), (route, name)
            assert version == bundle.model_version, route
            if abs(wanted[name] - limit) > tolerance[name]:
                assert label == labels[name], (route, name)
