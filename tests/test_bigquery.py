"""BigQuery in and out: Beam's real connectors, with the API and Cloud Storage on this machine."""

import datetime
import decimal
import json
import logging
import re

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from bigquery_service import bigquery_service
from dataflow_service import BUCKET, google_cloud_here
from google.cloud import dataflow_v1beta3 as api

from pipeline import command, launcher
from pipeline.from_bigquery import ReadTablesFromBigQuery, bigquery_schema
from pipeline.records import DEAD_LETTER_SCHEMA
from pipeline.run import run
from pipeline.to_bigquery import LoadTablesToBigQuery, bigquery_fields

PLACE = "bigquery:my-project.flights."
LOCAL = [f"--temp_location=gs://{BUCKET}/tmp", "--runner=FnApiRunner"]
UTC = datetime.UTC


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """Google's services, found through the environment: `Dataflow`, and the flags that lead to it."""
    with google_cloud_here(tmp_path_factory.mktemp("cloud")) as found:
        yield found


@pytest.fixture
def service(cloud):
    """An empty BigQuery with the data set `flights`."""

    def blob(uri):
        bucket, _, name = uri.removeprefix("gs://").partition("/")
        return cloud[0].files.bucket(bucket).blob(name)

    with bigquery_service(
        lambda uri: blob(uri).download_as_bytes(), lambda uri, b: blob(uri).upload_from_string(b)
    ) as found:
        yield found


@pytest.fixture
def source(make_table, tmp_path):
    """A Parquet file of every kind of column; the fourth of its 300 rows has no finite length."""
    table = make_table(300, 3)
    length = table["length"].to_numpy().copy()
    length[3] = np.inf
    path = tmp_path / "in.parquet"
    pq.write_table(table.set_column(0, "length", pa.array(length)), path)
    return path


def flags(bundle_uri, **places):
    return [*(f"--{name}={value}" for name, value in places.items()), f"--bundle={bundle_uri}", *LOCAL]


def test_rows_score_in_bigquery_as_they_do_in_parquet(service, source, bundle, bundle_uri, cloud, tmp_path):
    out = {"output": f"{PLACE}scored", "dead_letters": f"{PLACE}dead"}
    summary = run(flags(bundle_uri, input=source, reasons=2, **out))
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (300, 299, 1)
    assert (summary.output, summary.dead_letters) == (f"{PLACE}scored", f"{PLACE}dead")
    [load] = [job["configuration"] for job in service.jobs.values() if job_table(job) == "scored"]
    assert load["load"]["schema"]["fields"] == service.tables["scored"]["fields"]
    dispositions = ("sourceFormat", "createDisposition", "writeDisposition")
    assert [load["load"][name] for name in dispositions] == [
        "NEWLINE_DELIMITED_JSON",
        "CREATE_IF_NEEDED",
        "WRITE_EMPTY",
    ]
    assert all(uri.startswith(f"gs://{BUCKET}/tmp/bq_load/") for uri in load["load"]["sourceUris"])
    [letter] = service.tables["dead"]["rows"]
    assert (letter["column"], letter["error_type"], json.loads(letter["payload"])["length"]) == (
        "length",
        "not_finite",
        "inf",
    )

    # What was loaded comes back as it was, and scores as it did.
    again = flags(bundle_uri, input=f"{PLACE}scored", output=tmp_path / "again", score_prefix="again_")
    summary = run(again)
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (299, 299, 0)
    found = pq.read_table(tmp_path / "again").sort_by("id")
    table = pq.read_table(source).filter(np.isfinite(pq.read_table(source)["length"].to_numpy()))
    alone = bundle.score(table, reasons=2).sort_by("id")
    tolerance = 1e-4 * (1 + bundle.terms(table.sort_by("id")).abs().to_numpy().sum(axis=1))
    for name in ("anomaly_score", "again_anomaly_score"):
        assert (np.abs(found[name].to_numpy() - alone["anomaly_score"].to_numpy()) <= tolerance).all()
    for name in ("id", "count", "color", "size", "price", "is_large", "seen_at", "is_anomaly", "model_version"):
        assert found[name].to_pylist() == alone[name].to_pylist(), name
    assert [item[0]["feature"] for item in found["anomaly_reasons"].to_pylist()] == [
        item[0]["feature"] for item in alone["anomaly_reasons"].to_pylist()
    ]
    assert not [blob.name for blob in cloud[0].files.list_blobs(BUCKET) if "table-dump" in blob.name]


def job_table(job):
    return job["configuration"].get("load", {}).get("destinationTable", {}).get("tableId")


# ---- values, both ways -----------------------------------------------------------------------------

MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 678)
MANY_DIGITS = decimal.Decimal("12345678901234567890123456789.123456789")
WIDE = pa.table(
    {
        "integer": pa.array([2**63 - 1, None, -(2**53) - 1]),
        "small": pa.array([1, None, 3], pa.int8()),
        "unsigned": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "real": pa.array([0.1, None, 1e300]),
        "single": pa.array([0.1, None, -1.5], pa.float32()),
        "flag": [True, None, False],
        "text": ['ä\n"quoted" \u2028', None, ""],
        "level": pa.array(["a", None, "a"]).dictionary_encode(),
        "blob": [b"\xff\x00", None, b""],
        "time": pa.array(
            [MOMENT.replace(tzinfo=UTC), None, datetime.datetime(1, 1, 1, tzinfo=UTC)], pa.timestamp("us", "UTC")
        ),
        "nanos": pa.array([1_767_323_045_000_678_999, None, -1], pa.timestamp("ns")),
        "clock": pa.array([MOMENT, None, datetime.datetime(9999, 12, 31)], pa.timestamp("us")),
        "day": [datetime.date(2026, 1, 2), None, datetime.date(1, 1, 1)],
        "hour": pa.array([datetime.time(3, 4, 5, 678), None, datetime.time(0)], pa.time64("ns")),
        "price": pa.array([MANY_DIGITS, None, decimal.Decimal("-0.000000001")], pa.decimal128(38, 9)),
        "wait": pa.array([datetime.timedelta(seconds=5), None, datetime.timedelta(0)], pa.duration("s")),
        "pairs": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "parts": pa.array(
            [[{"n": MANY_DIGITS, "at": MOMENT}], [], None],
            pa.list_(pa.struct([("n", pa.decimal128(38, 9)), ("at", pa.timestamp("us"))])),
        ),
    }
)


def beam_run(step):
    """Runs a pipeline of one step, which gets the pipeline."""
    with beam.Pipeline(options=PipelineOptions(LOCAL)) as pipeline:
        step(pipeline)


_READ: list[pa.Table] = []


def keep(table):
    _READ.append(table)


def read_from(place):
    """Its rows as tables, and the letters of those that are none."""
    read = ReadTablesFromBigQuery(place, bigquery_schema(place, None))

    def step(pipeline):
        result = pipeline | read
        (result.tables, result.dead_letters) | beam.Flatten() | beam.Map(keep)

    _READ.clear()
    beam_run(step)
    letters = [table for table in _READ if table.schema.equals(DEAD_LETTER_SCHEMA)]
    tables = [table.replace_schema_metadata(None) for table in _READ if not table.schema.equals(DEAD_LETTER_SCHEMA)]
    return pa.concat_tables(tables), [letter for table in letters for letter in table.to_pylist()]


def test_every_type_comes_back_as_it_went(service):
    load = LoadTablesToBigQuery("my-project.flights.wide", WIDE.schema)
    load.refuse("my-project")
    beam_run(lambda pipeline: pipeline | beam.Create([WIDE], reshuffle=False) | load)
    found, letters = read_from("my-project.flights.wide")
    assert bigquery_fields(found.schema) == load.fields
    assert letters == []
    rows = WIDE.to_pylist()
    for row, moment in zip(rows, (MOMENT, None, datetime.datetime(1970, 1, 1)), strict=True):
        row["nanos"] = moment  # which has microseconds there
        row["single"] = None if row["single"] is None else float(np.format_float_positional(np.float32(row["single"])))
        row["wait"] = None if row["wait"] is None else row["wait"] // datetime.timedelta(seconds=1)
        row["pairs"] = [{"key": key, "value": value} for key, value in row["pairs"] or ()]
        row["parts"] = row["parts"] or []
    assert found.to_pylist() == rows


def test_values_beyond_arrow_and_types_only_bigquery_has(service):
    fields = [
        {"name": "big", "type": "BIGNUMERIC"},
        {"name": "place", "type": "GEOGRAPHY"},
        {"name": "raw", "type": "JSON", "mode": "REQUIRED"},
    ]
    too_big = decimal.Decimal("5" + "0" * 38)
    exact = decimal.Decimal("1." + "1" * 38)
    rows = [{"big": big, "place": "POINT(1 2)", "raw": "{}"} for big in (exact, too_big)]
    service.create("odd", fields, rows)
    found, letters = read_from("my-project.flights.odd")
    assert found.to_pylist() == [rows[0]]
    [letter] = letters
    assert (letter["column"], letter["error_type"], letter["source"]) == ("big", "wrong_type", f"{PLACE}odd")
    assert decimal.Decimal(json.loads(letter["payload"])["big"]) == too_big


def test_the_result_of_a_query_is_scored(service, source, first, first_uri, tmp_path):
    table = pq.read_table(source).slice(10, 40)
    keep = ["length", "count", "color", "id"]
    service.create("source", bigquery_fields(table.schema), [row | {"seen_at": None} for row in table.to_pylist()])
    query = "SELECT length, count, color, id\nFROM flights.source"
    service.queries[query] = ("source", keep)
    given = flags(first_uri, input=f"bigquery:{query}", output=tmp_path / "out", project="my-project")
    summary = run(given)
    assert (summary.num_records, summary.num_scored) == (40, 40)
    scored = pq.read_table(tmp_path / "out").sort_by("id")
    np.testing.assert_allclose(scored["anomaly_score"], first.score(table).sort_by("id")["anomaly_score"], rtol=1e-4)
    assert service.datasets == {"flights"}  # Beam's own is gone


def test_an_output_without_rows_is_an_empty_table_and_replaces_one_with_rows(service, source, first_uri):
    rows = [dict.fromkeys(DEAD_LETTER_SCHEMA.names) | {"attributes": []}]
    service.create("dead", bigquery_fields(DEAD_LETTER_SCHEMA), rows)
    table = pq.read_table(source).slice(10, 40)
    pq.write_table(table, source)
    given = flags(first_uri, input=source, output=f"{PLACE}scored", dead_letters=f"{PLACE}dead", id_columns="id")
    with pytest.raises(FileExistsError, match=r"flights\.dead: has rows already; choose another table or --overwrite"):
        run(given)
    run([*given, "--overwrite"])
    assert len(service.tables["scored"]["rows"]) == 40
    assert service.tables["dead"]["rows"] == []
    assert [field["name"] for field in service.tables["dead"]["fields"]] == DEAD_LETTER_SCHEMA.names


def test_a_load_that_bigquery_refuses_fails_the_pipeline(service):
    service.fault = "Error while reading data, error message: too many errors"
    load = LoadTablesToBigQuery("my-project.flights.scored", WIDE.schema)
    with pytest.raises(RuntimeError, match=r"BigQuery job .* failed(.|\n)*too many errors"):
        beam_run(lambda pipeline: pipeline | beam.Create([WIDE], reshuffle=False) | load)
    assert "scored" not in service.tables


# ---- refused before anything runs ------------------------------------------------------------------

FIELDS = [
    {"name": name, "type": kind} for name, kind in (("length", "FLOAT"), ("count", "INTEGER"), ("color", "STRING"))
]
REFUSED = {
    "no such table": ({"input": f"{PLACE}none"}, "--input: bigquery:my-project.flights.none: Not found: Table"),
    "no such data set": (
        {"output": "bigquery:my-project.none.t"},
        "--output: bigquery:my-project.none.t: Not found: Data",
    ),
    "a view": ({"input": f"{PLACE}view"}, "expected a table, got a VIEW; read it by a query"),
    "a column that is absent": ({"input": f"{PLACE}short"}, "color: expected one such column, got none"),
    "a column of another type": ({"input": f"{PLACE}nested"}, "count: expected int64, got struct<n: int64>"),
    "a type that is not read": ({"input": f"{PLACE}range"}, "--input: when: expected one of STRING, .*, got RANGE"),
    "a wrong query": ({"input": "bigquery:select x from y"}, "--input: bigquery:select x from y: Syntax error"),
    "no table": (
        {"output": "bigquery:scored"},
        "--output: expected bigquery:PROJECT.DATASET.TABLE, got bigquery:scored",
    ),
    "rows already": ({"output": f"{PLACE}full"}, "flights.full: has rows already; choose another table or --overwrite"),
    "another column": (
        {"output": f"{PLACE}other"},
        "count: expected NULLABLE INTEGER, got NULLABLE STRING; see --over",
    ),
    "too few columns": ({"output": f"{PLACE}short"}, "color: the table has no such column; see --overwrite"),
    "a column that has to be": ({"output": f"{PLACE}strict"}, "extra: the table requires it; see --overwrite"),
    "no place for files": ({"temp_location": "/tmp"}, "--temp_location: with bigquery:, expected gs://BUCKET/FOLDER"),
    "no such bucket": ({"temp_location": "gs://none/tmp"}, "--temp_location: cannot write to gs://none/tmp"),
    "no place for letters": ({"dead_letters": ""}, "missing --dead_letters: with --output bigquery:"),
    "one table for two": ({"dead_letters": f"{PLACE}source"}, "expected tables of their own, got the same twice"),
    "a format": ({"output_format": "csv"}, "--output_format: is for files, but --output is bigquery:"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_work_is_refused_before_anything_runs(service, first_uri, change, message, capsys):
    whole = [*FIELDS, *score_fields_of(first_uri)]
    service.create("source", FIELDS)
    service.create("view", FIELDS, kind="VIEW")
    service.create("short", FIELDS[:2] if "input" in change else [*FIELDS[:2], *whole[3:]])
    service.create(
        "nested",
        [FIELDS[0], {"name": "count", "type": "RECORD", "fields": [{"name": "n", "type": "INTEGER"}]}, FIELDS[2]],
    )
    service.create("range", [*FIELDS, {"name": "when", "type": "RANGE", "rangeElementType": {"type": "DATE"}}])
    service.create("full", FIELDS, [{"length": 1.0, "count": 1, "color": "red"}])
    service.create("other", [FIELDS[0], {"name": "count", "type": "STRING"}, *whole[2:]])
    service.create("strict", [*whole, {"name": "extra", "type": "STRING", "mode": "REQUIRED"}])
    places = {
        "input": f"{PLACE}source",
        "output": f"{PLACE}new",
        "dead_letters": f"{PLACE}dead",
        "temp_location": f"gs://{BUCKET}/tmp",
    }
    given = [f"--{name}={value}" for name, value in (places | change).items() if value]
    assert command.main([*given, f"--bundle={first_uri}", "--project=my-project", "--runner=FnApiRunner"]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert service.jobs == {}


def test_a_query_needs_a_project_and_bigquery_an_identity(service, first_uri, tmp_path, monkeypatch):
    given = flags(first_uri, input="bigquery:SELECT 1", output=tmp_path / "out")
    with pytest.raises(ValueError, match="--input: missing --project: a query needs one"):
        run(given)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(ValueError, match="expected Google's application default credentials, found none; see docs"):
        run(flags(first_uri, input=f"{PLACE}source", output=tmp_path / "out"))


# ---- on Dataflow -----------------------------------------------------------------------------------


@pytest.fixture
def quiet():
    """The launcher tells what Dataflow says; the tests after this need not hear it."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def test_a_job_from_bigquery_to_bigquery_is_accepted_by_dataflow(cloud, service, first, quiet, monkeypatch):
    dataflow, to_dataflow = cloud
    monkeypatch.setattr(dataflow, "work", lambda job: None)  # its workers would look for the real BigQuery
    first.save(f"gs://{BUCKET}/models/first")
    service.create("source", FIELDS)
    places = {"input": f"{PLACE}source", "output": f"{PLACE}scored", "dead_letters": f"gs://{BUCKET}/dead"}
    given = [f"--{name}={value}" for name, value in places.items()]
    given += [f"--bundle=gs://{BUCKET}/models/first", "--sdk_container_image=example.invalid/beam-vae:1"]
    assert launcher.main([*given, "--runner=DataflowRunner", *to_dataflow]) == 0
    [job] = dataflow.jobs.values()
    assert job.type_ == api.JobType.JOB_TYPE_BATCH


def score_fields_of(uri):
    from vae_model.bundle import score_fields

    return bigquery_fields(pa.schema(score_fields(0, "")))
