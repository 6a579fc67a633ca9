import argparse
import datetime
import io
import json
import os
import re
import signal
import threading
import time
from collections import Counter

import apache_beam as beam
import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.gcp import bigquery_tools
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp
from waiting import until

from pipeline import streaming, window_files
from pipeline.command import main
from pipeline.options import add_arguments, check
from pipeline.records import DEAD_LETTER_SCHEMA, record_letters
from pipeline.run import run
from pipeline.streaming import (
    _ToTables,
    _WriteLetters,
    as_message,
    build_streaming,
    labels,
    letter_messages,
    table_schema,
)
from pipeline.to_bigquery import WriteTablesToBigQuery, _Refuse, bigquery_fields, bigquery_rows
from pipeline.window_files import WriteWindowFiles
from vae_model.bundle import REASON_TYPE

PROJECT = "projects/project-a"
SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def stream_flags(bundle="bundle", output="out", **more) -> list[str]:
    flags = {"input": f"pubsub:{PROJECT}/subscriptions/in", "output": output, "bundle": bundle} | more
    return [f"--{name}={value}" for name, value in flags.items()]


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"input": "in/*.parquet"}, "--input: expected a stream, such as pubsub:..., got in/"),
        ({"output": f"pubsub:{PROJECT}/topics/out"}, "missing --dead_letters"),
        ({"dead_letters": "out"}, "--dead_letters and --output: expected two places"),
        ({"output_format": "csv"}, "--output_format: is for batch jobs"),
        ({"window_secs": 0}, "--window_secs: expected a number > 0, got 0"),
        ({"max_batch_duration_secs": "nan"}, "--max_batch_duration_secs: expected a number > 0, got nan"),
        ({"allowed_lateness_secs": -1}, "--allowed_lateness_secs: expected a number >= 0, got -1"),
        ({"num_shards": 0}, "--num_shards: expected a number >= 1, got 0"),
        (
            {"output": "kafka:h:1/a", "dead_letters": "kafka:h:1/b", "num_shards": 2},
            "--num_shards: is for files",
        ),
        (
            {"output": "kafka:h:1/a", "dead_letters": "bigquery:a.b.c", "allowed_lateness_secs": 2},
            "--allowed_lateness_secs: is for files",
        ),
        ({"input": "replay:x.parquet", "id_attribute": "id"}, "--id_attribute: expected only with --input pubsub:"),
    ],
)
def test_contradictory_flags_of_a_streaming_job_are_refused(more, error):
    with pytest.raises(ValueError, match=error):
        check(options(*stream_flags(**more)), streaming=True)


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        ({}, "--input"),
        ({"input": "in", "output": "kafka:h:1/a"}, "--output"),
        ({"input": "in", "window_secs": 5}, "--window_secs"),
    ],
)
def test_what_is_for_streams_asks_for_the_flag_streaming(more, flag):
    with pytest.raises(ValueError, match=f"{flag}: .*add --streaming"):
        check(options(*stream_flags(**more)))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"input": "pubsub:flights"}, "--input: expected pubsub:projects/PROJECT/subscriptions/NAME"),
        ({"output": "pubsub:flights", "dead_letters": "d"}, "--output: expected pubsub:projects/PROJECT/topics/NAME"),
        ({"output": "bigquery:flights", "dead_letters": "d"}, "--output: expected bigquery:PROJECT.DATASET.TABLE"),
        ({"output": "bigquery:p.d.t", "dead_letters": "d"}, "--output: Expected a table reference"),
        ({"output": "out/*.csv"}, r"--output: out/\*.csv: expected a directory or"),
        ({"output": "out/scored.parquet"}, "--output: out/scored.parquet: expected a directory or"),
        ({"dead_letters": "dead/x.jsonl"}, "--dead_letters: dead/x.jsonl: expected a directory or"),
        ({"columns": "length,event_time"}, "event_time: the input has such a column already"),
        ({"columns": "is_anomaly"}, "is_anomaly: "),
        (
            {"output": "bigquery:project-a.b.c", "dead_letters": "d", "columns": "a-b"},
            "a-b: expected a name of letters",
        ),
    ],
)
def test_places_that_there_are_not_are_refused_before_anything_runs(more, error, first_uri):
    with pytest.raises(ValueError, match=error):
        build_streaming(beam.Pipeline(), options(*stream_flags(first_uri, **more)))


def test_the_command_line_says_in_one_line_what_is_wrong(capsys):
    assert main(["--streaming", *stream_flags(output="bigquery:a.b.c")]) == 1
    assert "beam-vae: error: missing --dead_letters" in capsys.readouterr().err
    assert main(stream_flags()) == 1
    assert "add --streaming" in capsys.readouterr().err


def test_what_local_runners_cannot_do_is_refused(first_uri, tmp_path):
    with pytest.raises(ValueError, match="--id_attribute: Beam's local runners cannot"):
        run(["--streaming", *stream_flags(first_uri, tmp_path, id_attribute="id")])
    with pytest.raises(ValueError, match="--runner: expected BundleBasedDirectRunner"):
        run(["--streaming", "--runner=FnApiRunner", *stream_flags(first_uri, tmp_path)])
    with pytest.raises(ValueError, match="--runner: no local runner knows pubsub: together"):
        run(
            [
                "--streaming",
                *stream_flags(first_uri, tmp_path, input="kafka:localhost:9092/in", dead_letters="pubsub:x"),
            ]
        )


@pytest.mark.parametrize("output", ["gs://bucket/out", f"pubsub:{PROJECT}/topics/out"])
def test_a_classic_template_writes_no_files_of_a_stream(output, first_uri):
    """The word in their names would be the same for each of its launches."""
    flags = stream_flags(first_uri, output, dead_letters="gs://bucket/dead", template_location="gs://bucket/t")
    with pytest.raises(ValueError, match="--template_location: expected no files from a stream"):
        run(["--streaming", *flags])


# ---- files by window -----------------------------------------------------------------------------


def numbered(*ids: int) -> pa.Table:
    return pa.table({"id": ids, "name": [f"n{i}" for i in ids]}, schema=SCHEMA)


def write(source, folder, runner="DirectRunner", **more) -> dict[str, list[int]]:
    """Runs a source into `WriteWindowFiles`; what is in each file."""
    with beam.Pipeline(runner=runner, options=PipelineOptions([], streaming=runner == "DirectRunner")) as pipeline:
        pipeline | source | WriteWindowFiles(str(folder), SCHEMA, **{"window_secs": 60} | more)
    files = folder.parent if folder.suffix else folder
    return {path.name: sorted(_rows(path)["id"].to_pylist()) for path in files.iterdir()}


def ids_in(found: dict[str, list[int]]) -> list[int]:
    return sorted(i for ids in found.values() for i in ids)


def _rows(path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return pa.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])


def test_each_window_has_its_file_and_late_rows_have_their_own(tmp_path):
    source = (
        TestStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(numbered(1, 2), 10), TimestampedValue(numbered(3), 59)])
        .add_elements([TimestampedValue(numbered(4), 60)])
        .advance_watermark_to(61)
        .add_elements([TimestampedValue(numbered(5), 30)])  # late
        .add_elements([TimestampedValue(numbered(6), 31)])  # with it
        .advance_processing_time(100)
        .add_elements([TimestampedValue(numbered(7), 32)])  # later still
        .advance_processing_time(100)
        .advance_watermark_to_infinity()
    )
    first, second = "scored-19700101T000000Z-19700101T000100Z", "scored-19700101T000100Z-19700101T000200Z"
    assert write(source, tmp_path / "out") == {
        f"{first}-shard-00000-pane-00000.parquet": [1, 2, 3],
        f"{first}-shard-00000-pane-00001-late.parquet": [5, 6],
        f"{first}-shard-00000-pane-00002-late.parquet": [7],
        f"{second}-shard-00000-pane-00000.parquet": [4],
    }


def test_rows_without_a_time_are_written_too(tmp_path):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        tables = pipeline | beam.Create([numbered(1)]) | beam.Map(lambda table: TimestampedValue(table, MIN_TIMESTAMP))
        tables | WriteWindowFiles(str(tmp_path), SCHEMA)
    [path] = tmp_path.iterdir()
    assert _rows(path)["id"].to_pylist() == [1]


def test_rows_are_dropped_as_too_late_only_where_that_is_asked_for(tmp_path):
    day = 86_400

    def source():
        return (
            TestStream()
            .advance_watermark_to(0)
            .add_elements([TimestampedValue(numbered(1), 1)])
            .advance_watermark_to(400 * day)
            .add_elements([TimestampedValue(numbered(2), 2)])
            .advance_processing_time(100)
            .advance_watermark_to_infinity()
        )

    assert ids_in(write(source(), tmp_path / "all")) == [1, 2]
    assert ids_in(write(source(), tmp_path / "some", allowed_lateness_secs=10)) == [1]


def test_devices_without_a_clock_are_not_too_late(tmp_path):
    """Their times are of 1970, or of the calendar's first year; the watermark is today's."""
    first_year, now = -62_135_596_800, 1_795_000_000
    source = TestStream().advance_watermark_to(first_year).add_elements([TimestampedValue(numbered(1), now)])
    source = source.advance_watermark_to(now + 3600)
    source = source.add_elements([TimestampedValue(numbered(2), 0), TimestampedValue(numbered(3), first_year)])
    source = source.advance_processing_time(100).advance_watermark_to_infinity()
    assert ids_in(write(source, tmp_path / "out")) == [1, 2, 3]


def test_a_window_of_very_many_tables_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(window_files, "_MAX_TABLES", 3)
    source = TestStream().advance_watermark_to(0)
    for i in range(7):
        source = source.add_elements([TimestampedValue(numbered(i), i)])
    found = write(source.advance_watermark_to_infinity(), tmp_path / "out")
    assert ids_in(found) == list(range(7))
    timings = Counter("early" if "-early" in name else "on time" for name in found)
    assert timings == {"early": 2, "on time": 1}
    assert max(map(len, found.values())) == 3


@pytest.mark.parametrize("suffix", ["", "*.jsonl"])
def test_a_retry_writes_the_same_files_again_and_another_job_its_own(suffix, tmp_path):
    rows = [TimestampedValue(numbered(i), 50 * i) for i in range(4)]

    def source():
        return beam.Create(rows, reshuffle=False)

    place = tmp_path / "out" / suffix if suffix else tmp_path / "out"
    found = write(source(), place, "FnApiRunner", job="a")
    assert sorted(found.values()) == [[0, 1], [2], [3]]
    assert write(source(), place, "FnApiRunner", job="a") == found
    again = write(source(), place, "FnApiRunner", job="b")
    assert len(again) == 6
    assert {name: ids for name, ids in again.items() if "-a-" in name} == found


def test_shards_share_a_window(tmp_path):
    source = beam.Create([TimestampedValue(numbered(i), i) for i in range(8)], reshuffle=False)
    found = write(source, tmp_path / "out", "FnApiRunner", num_shards=4)
    assert ids_in(found) == list(range(8))
    assert len(found) == 4
    assert all(len(ids) == 2 for ids in found.values())


def test_a_write_that_fails_leaves_nothing(tmp_path):
    wrong = pa.table({"id": ["x"], "name": ["y"]})
    with pytest.raises(Exception, match="schema"):
        write(beam.Create([TimestampedValue(wrong, 1)], reshuffle=False), tmp_path / "out", "FnApiRunner")
    assert list((tmp_path / "out").iterdir()) == []


# ---- what goes into tables and messages ----------------------------------------------------------


def test_tables_have_the_columns_of_training_or_those_asked_for(first):
    schema = table_schema(first, options("--reasons=1"))
    scores = ["anomaly_score", "anomaly_p_value", "is_anomaly", "anomaly_reasons", "model_version", "event_time"]
    assert schema.names == ["length", "count", "color", *scores]
    schema = table_schema(first, options("--id_columns=gate,count", "--score_prefix=x_"))
    added = ["anomaly_score", "anomaly_p_value", "is_anomaly", "model_version", "event_time"]
    assert schema.names == ["gate", "count", *(f"x_{name}" for name in added)]
    assert schema.field("gate").type == pa.string()


SCORES = b'"anomaly_score":1.5,"anomaly_p_value":0.5,"is_anomaly":false,"model_version":"abc"}'


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (PubsubMessage(b"{}", {"a": "b"}, ordering_key="k"), (b"{}", {"a": "b"}, b"k")),
        ((b"\xff", b"{}"), (b"{}", {}, b"\xff")),
        ((None, {"a": 1}), (b'{"a": 1}', {}, None)),
        (("key", "{}"), (b"{}", {}, b"key")),
        ({"a": float("nan")}, (b'{"a": null}', {}, None)),
    ],
)
def test_every_form_of_element_has_one_as_a_message(element, expected):
    assert tuple(as_message(element)) == expected


def test_what_does_not_fit_the_tables_becomes_a_dead_letter_and_the_rest_is_written(first_uri, tmp_path):
    """Scored, for the model does not read `gate`; but a file's column has one type."""
    flags = options(*stream_flags(first_uri, tmp_path / "out", columns="id,count"))
    schema = table_schema(__import__("vae_model").load_bundle(first_uri), flags)
    from pipeline.streaming import _WriteScored

    scored = [
        PubsubMessage(b'{"id":"a","count":1,' + SCORES, {"k": "v"}),
        PubsubMessage(b'{"id":"b",\n"count":2,' + SCORES, {}),
        PubsubMessage(b'{"id":"c","count":2.5,' + SCORES, {"k": "w"}),
        PubsubMessage(b'{"id":{"d":1},"count":3,' + SCORES, {}),
    ]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        elements = [TimestampedValue(message, 1_000_000_000 + i) for i, message in enumerate(scored)]
        refused = pipeline | beam.Create(elements, reshuffle=False) | _WriteScored(flags, "", schema, "")
        rows = refused | beam.FlatMap(lambda letters: letters.to_pylist())
        found = rows | beam.Map(lambda row: (row["column"], row["error_type"], row["stage"], row["model_version"]))
        assert_that(found, equal_to([("count", "wrong_type", "write", "abc"), ("id", "wrong_type", "write", "abc")]))
        whole = rows | "Whole" >> beam.Map(lambda row: (row["payload"], row["attributes"], row["event_time"].second))
        expected = [(scored[2].data.decode(), [("k", "w")], 42), (scored[3].data.decode(), None, 43)]
        assert_that(whole, equal_to(expected), label="Whole payloads")
    written = pq.read_table(tmp_path / "out")
    assert written.schema.remove_metadata() == schema
    assert written.select(["id", "count", "anomaly_score"]).to_pylist() == [
        {"id": "a", "count": 1, "anomaly_score": 1.5},
        {"id": "b", "count": 2, "anomaly_score": 1.5},
    ]
    assert [time.timestamp() for time in written["event_time"].to_pylist()] == [1_000_000_000, 1_000_000_001]


def shaped_tables(elements: list, schema: pa.Schema) -> tuple[list[dict], list[dict]]:
    """The rows and the letters of scored elements in one Beam bundle."""
    step = _ToTables(schema, "")
    step.start_bundle()
    times = [Timestamp(1_000_000_000 + i) for i in range(len(elements))]
    found = [item for pair in zip(elements, times, strict=True) for item in step.process(*pair, window=GlobalWindow())]
    found += step.finish_bundle()
    dead = [item.value for item in found if isinstance(item, beam.pvalue.TaggedOutput)]
    tables = [item.value for item in found if not isinstance(item, beam.pvalue.TaggedOutput)]
    rows = [row for table in tables for row in table.to_pylist()]
    return rows, [letter for item in dead for letter in getattr(item, "value", item).to_pylist()]


def test_what_comes_as_python_values_is_in_tables_what_it_was():
    """As a table is replayed: JSON has no durations, bytes or maps."""
    structs = pa.list_(pa.struct([("at", pa.timestamp("us")), ("raw", pa.binary())]))
    typed = pa.table(
        {
            "wait": pa.array([372, None, 5], pa.duration("s")),
            "raw": [b"\xff\x00", b"aGk=", None],
            "pairs": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            "parts": pa.array([[{"at": datetime.datetime(2026, 1, 2), "raw": b"\xfe"}], [], None], structs),
            "id": ["a", "b", "c"],
        }
    )
    scores = {"anomaly_score": 1.5, "model_version": "abc"}
    added = [("anomaly_score", pa.float64()), ("model_version", pa.string()), ("event_time", pa.timestamp("us", "UTC"))]
    schema = pa.schema([*typed.schema, *added])
    records = [{**row, **scores} for row in typed.to_pylist()]
    rows, dead = shaped_tables([records[0], (b"key", records[1]), records[2]], schema)
    assert dead == []
    assert [{name: row[name] for name in records[0]} for row in rows] == records
    wrong = [
        {**records[0], "wait": datetime.timedelta(seconds=1.5)},
        {**records[0], "wait": 7},
        {**records[0], "pairs": [("a", "far")]},
        json.dumps({**scores, "wait": 8}),
    ]
    rows, dead = shaped_tables(wrong, schema)
    assert [row["wait"].total_seconds() for row in rows] == [7, 8]
    assert [(letter["column"], letter["error_type"]) for letter in dead] == [
        ("wait", "wrong_type"),
        ("pairs", "wrong_type"),
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_a_record_nested_deeper_than_python_reads_costs_only_itself(first, place):
    """It may be scored: orjson goes deeper. The last record makes Arrow refuse the block."""
    texts = [b'{"count":%d,' % i + SCORES for i in range(2)]
    texts.insert(place, b'{"count":7,"more":' + b"[" * 5_000 + b"]" * 5_000 + b"," + SCORES)
    texts.append(b'{"count":{"no":"number"},' + SCORES)
    rows, dead = shaped_tables(texts, table_schema(first, options("--columns=count")))
    assert [row["count"] for row in rows] == [0, 1]
    times = [row["event_time"].timestamp() - 1_000_000_000 for row in rows]
    assert times == [second for second in range(3) if second != place]
    assert [letter["error_type"] for letter in dead] == ["malformed_record", "wrong_type"]
    assert dead[0]["payload"].encode() == texts[place]
    assert {letter["stage"] for letter in dead} == {"write"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [("[" * 990 + "]" * 990, ("abc", "false")), ("NaN", ("abc", "false")), ("[" * 5_000 + "]" * 5_000, (None, None))],
)
def test_labels_stop_at_no_record(more, expected):
    found = labels(f'{{"more":{more},'.encode() + SCORES, "")
    assert (found.get("model_version"), found.get("is_anomaly")) == expected


def test_columns_that_records_make_up_are_told_once_and_not_remembered_for_ever(first, monkeypatch, caplog):
    monkeypatch.setattr(streaming, "_undeclared", set())
    schema = table_schema(first, options("--columns=count"))
    for i in range(30):
        names = b",".join(b'"made-%d-%d":0' % (i, j) for j in range(100))
        rows, dead = shaped_tables([b'{"count":1,' + names + b"," + SCORES], schema)
        assert (len(rows), dead) == (1, [])
    assert len(streaming._undeclared) == 1000
    assert len([record for record in caplog.records if "left out" in record.getMessage()]) == 1


def letters(payload: str, **attributes: str) -> pa.Table:
    fault = (None, "malformed_record", "no JSON")
    return record_letters(
        [(payload, "json")], [fault], attributes=[attributes], event_times=[0], stage="score", model_version="abc"
    )


def test_a_dead_letter_as_a_message_says_in_its_attributes_what_is_wrong():
    (message,) = letter_messages(letters("{bad", id="7"), 10_000)
    assert message.attributes == {
        "id": "7",
        "dead_letter_stage": "score",
        "dead_letter_error_type": "malformed_record",
    }
    record = json.loads(message.data)
    assert list(record) == DEAD_LETTER_SCHEMA.names
    assert (record["payload"], record["attributes"]) == ("{bad", {"id": "7"})
    assert datetime.datetime.fromisoformat(record["event_time"]).timestamp() == 0


def test_messages_stay_within_the_limits_of_pubsub():
    """Beam's own check raises, and a message that raises is tried for ever."""
    many = {f"a{i}": "x" for i in range(99)}
    (message,) = letter_messages(letters('"\\' * 3_000_000, **many), 9_500_000)
    PubsubMessage(message.data, message.attributes)._to_proto_str(for_publish=True)
    assert json.loads(message.data)["payload_format"] == "cut"
    assert message.attributes == many


def test_scored_messages_that_are_too_large_or_have_all_attributes_are_not_lost(first_uri, tmp_path):
    from pipeline.streaming import _ToMessages

    many = {f"a{i}": "x" for i in range(99)}
    large = PubsubMessage(b'{"text":"' + b"x" * 9_900_000 + b'",' + SCORES, {"id": "large"})
    full = PubsubMessage(b'{"id":1,' + SCORES, many)
    fine = PubsubMessage(b'{"id":2,' + SCORES, {"id": "2"}, ordering_key="k")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        shape = beam.ParDo(_ToMessages("", 9_500_000)).with_outputs("dead_letters", main="shaped")
        shaped = pipeline | beam.Create([large, full, fine], reshuffle=False) | shape
        assert_that(
            shaped.shaped | beam.Map(tuple),
            equal_to(
                [
                    (full.data, many, None),
                    (fine.data, {"id": "2", "model_version": "abc", "is_anomaly": "false"}, b"k"),
                ]
            ),
        )
        kinds = shaped.dead_letters | beam.Map(lambda table: (table["error_type"][0].as_py(), table.num_rows))
        assert_that(kinds, equal_to([("too_large", 1)]), label="Letters")


# ---- BigQuery, by Beam's own conversions ---------------------------------------------------------

UTC = datetime.UTC
WIDE = pa.table(
    {
        "integer": pa.array([1, None], pa.int32()),
        "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
        "real": pa.array([0.5, float("nan")]),
        "flag": [True, None],
        "text": ["ä\n", None],
        "level": pa.array(["a", None]).dictionary_encode(),
        "blob": [b"\xff", None],
        "time": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 678, UTC), None], pa.timestamp("us", "UTC")),
        "clock": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5), None], pa.timestamp("us")),
        "day": [datetime.date(2026, 1, 2), None],
        "price": pa.array([None, None], pa.decimal128(10, 2)),
        "wait": pa.array([5, None], pa.duration("s")),
        "pairs": pa.array([[("a", "b")], None], pa.map_(pa.string(), pa.string())),
        "anomaly_reasons": pa.array([[dict.fromkeys(f.name for f in REASON_TYPE.value_type)], []], REASON_TYPE),
    }
)


def test_beam_takes_the_schema_and_the_rows_for_bigquery():
    fields = bigquery_fields(WIDE.schema)
    types = {field["name"]: field["type"] for field in fields}
    assert types == {
        "integer": "INTEGER",
        "unsigned": "NUMERIC",
        "real": "FLOAT",
        "flag": "BOOLEAN",
        "text": "STRING",
        "level": "STRING",
        "blob": "BYTES",
        "time": "TIMESTAMP",
        "clock": "DATETIME",
        "day": "DATE",
        "price": "NUMERIC",
        "wait": "INTEGER",
        "pairs": "RECORD",
        "anomaly_reasons": "RECORD",
    }
    parsed = bigquery_tools.parse_table_schema_from_json(json.dumps({"fields": fields}))
    assert {field.name: field.mode for field in parsed.fields}["pairs"] == "REPEATED"
    rows = bigquery_rows(WIDE)
    coder = bigquery_tools.RowAsDictJsonCoder()
    for row in rows:
        assert coder.decode(coder.encode(row)) == row  # it refuses NaN, which BigQuery's API has not
    # Beam's Avro schema of the table, for what JSON and Avro write alike.
    avro = bigquery_tools.get_avro_schema_from_table_schema({"fields": fields})
    alike = [
        f for f in avro["fields"] if types[f["name"]] in ("INTEGER", "FLOAT", "BOOLEAN", "STRING", "RECORD", "DATETIME")
    ]
    stream = io.BytesIO()
    plain = [{f["name"]: row[f["name"]] for f in alike} for row in rows]
    fastavro.writer(stream, fastavro.parse_schema({**avro, "fields": alike}), plain)
    stream.seek(0)
    assert list(fastavro.reader(stream)) == plain
    assert rows[0]["pairs"] == [{"key": "a", "value": "b"}]
    assert (rows[1]["pairs"], rows[1]["real"]) == ([], None)
    assert rows[0]["unsigned"] == str(2**64 - 1)  # as text, since a float does not hold it
    assert datetime.datetime.fromisoformat(rows[0]["time"]) == WIDE["time"][0].as_py()


def test_letters_of_rows_that_bigquery_refuses_say_when_and_by_which_model():
    micros = 1_767_323_045_000_678
    scored = pa.table(
        {
            "id": [1],
            "x_model_version": ["abc"],
            "x_event_time": pa.array([micros], pa.int64()).cast(pa.timestamp("us", "UTC")),
        }
    )
    rows = bigquery_rows(scored)
    [letter] = _Refuse("x_event_time", "x_model_version").process(("t", rows[0], [{"reason": "invalid"}]))
    [found] = letter.to_pylist()
    assert (found["event_time"], found["model_version"]) == (scored["x_event_time"][0].as_py(), "abc")
    assert (found["stage"], found["error_type"], json.loads(found["payload"])) == (
        "write",
        "refused_by_bigquery",
        rows[0],
    )
    assert WriteTablesToBigQuery("project-a.d.t", scored.schema)._last("event_time") == "x_event_time"


class _RefuseAll(beam.PTransform):
    """In place of BigQuery, which is not here."""

    def expand(self, tables):
        return tables | beam.Map(lambda table: table).with_output_types(pa.Table)


def test_dead_letters_that_bigquery_refuses_are_not_lost_in_silence():
    write = _WriteLetters(
        options(*stream_flags(output="bigquery:project-a.d.t", dead_letters="bigquery:project-a.d.u")), ""
    )
    write._write = _RefuseAll()
    pipeline = beam.Pipeline("FnApiRunner")
    tables = pipeline | beam.Create([letters("secret")], reshuffle=False)
    tables.element_type = pa.Table
    tables | write
    with pytest.raises(RuntimeError, match="BigQuery refused 1 dead letters"):
        pipeline.run()


def test_bigquery_lacks_lists_of_lists_and_strange_names():
    for name, kind, error in (
        ("a b", pa.int64(), "a b: expected a name"),
        ("a", pa.list_(pa.list_(pa.int64())), "a: expected no list of lists"),
        ("a", pa.month_day_nano_interval(), "a: expected a type that BigQuery has"),
    ):
        with pytest.raises(ValueError, match=error):
            bigquery_fields(pa.schema([(name, kind)]))


def test_a_job_into_bigquery_can_be_built(first_uri):
    flags = options(
        *stream_flags(first_uri, "bigquery:project-a.flights.scored", dead_letters="bigquery:project-a:flights.dead")
    )
    pipeline = beam.Pipeline(options=PipelineOptions([], streaming=True, project="project-a"))
    build_streaming(pipeline, flags)
    labels = {part.unique_name for part in pipeline.to_runner_api().components.transforms.values()}
    assert "WriteScored/Write/Insert" in labels
    assert "WriteDeadLetters/Write/Refused" in labels
    assert WriteTablesToBigQuery("example.com:project-a.d.t", SCHEMA).reference == "example.com:project-a:d.t"


@pytest.mark.parametrize(
    "output", [f"pubsub:{PROJECT}/topics/out", "bigquery:project-a.flights.scored", "gs://bucket/out"]
)
def test_a_job_has_the_same_labels_and_coders_whenever_it_is_built(output, first_uri):
    """Dataflow's --update goes by them."""

    def steps() -> dict[str, tuple]:
        flags = options(*stream_flags(first_uri, output, dead_letters="gs://bucket/dead", max_batch_duration_secs=1))
        pipeline = beam.Pipeline(options=PipelineOptions([], streaming=True, project="project-a"))
        build_streaming(pipeline, flags, job="any")
        parts = pipeline.to_runner_api().components
        coders = {name: parts.coders[data.coder_id].spec.urn for name, data in parts.pcollections.items()}
        return {
            part.unique_name: (part.spec.urn, sorted(coders[place] for place in part.outputs.values()))
            for part in parts.transforms.values()
        }

    assert steps() == steps()
    assert {"ReadRecords", "ScoreRecords", "WriteScored", "AllDeadLetters", "WriteDeadLetters"} <= set(steps())


def test_a_replayed_table_comes_out_in_the_windows_of_its_own_times(first, first_uri, mixed_table, tmp_path, capsys):
    table = mixed_table.slice(0, 200).select(["length", "count", "color", "seen_at"]).sort_by("seen_at")
    pq.write_table(table, tmp_path / "in.parquet")
    day = 86_400
    old, young = (tmp_path / f"out/.beam-temp-scored-{name}" for name in ("old", "young"))
    for path, age in {old: 2 * day, young: 60}.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text("what a killed worker left")
        os.utime(path, (time.time() - age,) * 2)
    flags = stream_flags(
        first_uri,
        tmp_path / "out",
        input=f"replay:{tmp_path}/in.parquet?rate=none&time_column=seen_at",
        window_secs=7 * day,
        columns="seen_at,length",
    )
    assert main(["--streaming", *flags]) == 0
    assert re.search(r"records in\s+200\s", capsys.readouterr().out)
    written = pq.read_table(tmp_path / "out").sort_by("seen_at")
    assert written["length"].to_pylist() == table["length"].to_pylist()
    alone = first.score(table)["anomaly_score"].to_numpy()
    np.testing.assert_allclose(written["anomaly_score"].to_numpy(), alone, rtol=1e-4, atol=1e-3)
    for path in (tmp_path / "out").glob("scored-*"):
        start = datetime.datetime.strptime(path.name[7:22], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        times = pq.read_table(path)["event_time"].to_pylist()
        assert all(start <= when < start + datetime.timedelta(days=7) for when in times)
    assert (old.exists(), young.exists()) == (False, True)  # another job may be writing the young one


def test_a_window_with_too_many_dead_letters_is_told(first_uri, mixed_table, tmp_path, caplog, monkeypatch):
    """Every tenth record of January is malformed, and every third of March."""
    monkeypatch.setattr(streaming, "_undeclared", set())
    table = mixed_table.select(["length", "count", "color", "seen_at", "price"]).sort_by("seen_at").slice(0, 900)
    months = table["seen_at"].to_numpy().astype("datetime64[M]").astype(int) % 12
    length = [
        "tall" if (i % 10 == 0 and month == 0) or (i % 3 == 0 and month == 2) else repr(value)
        for i, (month, value) in enumerate(zip(months, table["length"].to_pylist(), strict=True))
    ]
    bad = np.array([text == "tall" for text in length])
    pq.write_table(table.set_column(0, "length", pa.array(length)), tmp_path / "in.parquet")
    flags = stream_flags(
        first_uri,
        tmp_path / "out",
        input=f"replay:{tmp_path}/in.parquet?rate=none&time_column=seen_at",
        window_secs=86_400,
        max_dead_letter_fraction=0.25,
    )
    summary = run(["--streaming", *flags])
    assert (summary.num_records, summary.num_dead_letters) == (900, bad.sum())
    days = table["seen_at"].to_numpy().astype("datetime64[D]")
    expected = [str(day) for day in np.unique(days) if bad[days == day].mean() > 0.25]
    told = [record.getMessage() for record in caplog.records if record.name == "pipeline.alerts"]
    assert sorted(re.search(r"from (\S+)T00:00:00Z", line)[1] for line in told) == expected
    assert expected
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert left_out == ["columns that neither training nor --columns names are left out: 2 (told once)"]


@pytest.fixture
def kafka_host():
    """Of librdkafka's own brokers, which live in a producer."""
    kafka = pytest.importorskip("confluent_kafka", reason="Kafka's client comes with the extra kafka")
    brokers = kafka.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "none"})
    [broker] = brokers.list_topics().brokers.values()
    yield f"{broker.host}:{broker.port}"
    brokers.flush()


def consume(host: str, topic: str, count: int) -> list:
    """The first messages of a topic."""
    import confluent_kafka as kafka

    consumer = kafka.Consumer({"bootstrap.servers": host, "group.id": "any"})
    partitions = consumer.list_topics(topic).topics[topic].partitions
    consumer.assign([kafka.TopicPartition(topic, partition, 0) for partition in partitions])
    found: list = []
    end = time.monotonic() + 20
    while len(found) < count and time.monotonic() < end:
        found += consumer.consume(100, timeout=0.2)
    consumer.close()
    return found


def test_a_replayed_table_goes_to_kafka(first, first_uri, mixed_table, kafka_host, tmp_path):
    table = mixed_table.slice(0, 20).select(["length", "count", "color", "id"])
    pq.write_table(table, tmp_path / "in.parquet")
    flags = stream_flags(
        first_uri,
        f"kafka:{kafka_host}/scored",
        input=f"replay:{tmp_path}/in.parquet?rate=none",
        dead_letters=tmp_path / "dead",
    )
    summary = run(["--streaming", *flags])
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (20, 20, 0)
    found = [json.loads(message.value()) for message in consume(kafka_host, "scored", 20)]
    scores = {row["id"]: row["anomaly_score"] for row in first.score(table).to_pylist()}
    assert {row["id"]: row["anomaly_score"] for row in found} == pytest.approx(scores, rel=1e-4, abs=1e-3)


def test_from_kafka_to_kafka_keys_stay_and_what_cannot_be_scored_has_its_own_topic(
    first, first_uri, mixed_table, kafka_host
):
    import confluent_kafka as kafka

    table = mixed_table.slice(0, 30).select(["length", "count", "color"])
    producer = kafka.Producer({"bootstrap.servers": kafka_host})
    for i, row in enumerate(table.to_pylist()):
        # Every tenth is malformed, or a tombstone.
        text = json.dumps(row) if i % 10 else "{" if i else None
        producer.produce("in", text, key=f"key-{i}")
    assert producer.flush(20) == 0
    flags = stream_flags(
        first_uri,
        f"kafka:{kafka_host}/scored",
        input=f"kafka:{kafka_host}/in?until=now",
        dead_letters=f"kafka:{kafka_host}/dead",
    )
    summary = run(["--streaming", *flags])
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (30, 27, 3)
    found = {message.key(): json.loads(message.value()) for message in consume(kafka_host, "scored", 27)}
    scores = first.score(table)["anomaly_score"].to_pylist()
    expected = {f"key-{i}".encode(): score for i, score in enumerate(scores) if i % 10}
    assert {key: row["anomaly_score"] for key, row in found.items()} == pytest.approx(expected, rel=1e-4, abs=1e-3)
    dead = consume(kafka_host, "dead", 3)
    letters = [json.loads(message.value()) for message in dead]
    assert {letter["stage"] for letter in letters} == {"score"}
    assert sorted(message.key() for message in dead) == [b"key-0", b"key-10", b"key-20"]


def test_what_is_too_large_for_kafka_with_its_scores_is_a_letter_that_is_not(first, first_uri, mixed_table, kafka_host):
    """The brokers' client refuses more than a million bytes, key and all."""
    import confluent_kafka as kafka

    row = mixed_table.slice(0, 1).select(["length", "count", "color"]).to_pylist()[0]
    producer = kafka.Producer({"bootstrap.servers": kafka_host})
    large = json.dumps({**row, "more": "x" * 999_600})
    for key, text in (("fine", json.dumps(row)), ("scored", large), (None, "\x01" * 600_000)):
        producer.produce("in", text, key=key)
    producer.produce("in", "{", key="k" * 600_000)
    assert producer.flush(20) == 0
    places = {"input": f"kafka:{kafka_host}/in?until=now", "dead_letters": f"kafka:{kafka_host}/dead"}
    summary = run(["--streaming", *stream_flags(first_uri, f"kafka:{kafka_host}/scored", **places)])
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (4, 1, 3)
    [scored] = consume(kafka_host, "scored", 1)
    assert scored.key() == b"fine"
    found = [(message.key(), json.loads(message.value())) for message in consume(kafka_host, "dead", 3)]
    by_key = sorted((key or b"", letter["error_type"], letter["payload_format"]) for key, letter in found)
    assert by_key == [
        (b"", "malformed_record", "cut"),
        (b"", "malformed_record", "json"),  # its key has no room beside itself as an attribute
        (b"scored", "too_large", "cut"),
    ]
    [(_, letter)] = [item for item in found if item[0] == b"scored"]
    assert letter["model_version"] == first.model_version
    assert large.startswith(letter["payload"])
    assert len(letter["payload"]) > 400_000


# ---- the job, on a real Pub/Sub server -----------------------------------------------------------

pubsub = pytest.importorskip("pipeline.pubsub_emulator", reason="Pub/Sub's client comes with the extra gcp")


@pytest.fixture
def emulator(monkeypatch):
    with pubsub.PubSubEmulator() as emulator:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
        for name in ("in", "out", "dead"):
            topic = f"{PROJECT}/topics/{name}"
            emulator.publisher().create_topic(name=topic)
            emulator.subscriber().create_subscription(
                name=f"{PROJECT}/subscriptions/{name}", topic=topic, ack_deadline_seconds=600
            )
        yield emulator


def messages(table: pa.Table, malformed: int) -> list[dict]:
    """One for each row, and malformed ones between them; ids in the attributes."""
    texts = [json.dumps(row, default=str) for row in table.to_pylist()]
    for i in range(malformed):
        texts.insert(3 * i, ('{"length":', "[1]", '{"length":"far","count":1}', "null", "{}")[i % 5])
    return [
        {"data": text.encode(), "attributes": {"id": str(i)}, "ordering_key": "key"} for i, text in enumerate(texts)
    ]


def pulled(emulator, name: str) -> list:
    subscription, found = f"{PROJECT}/subscriptions/{name}", []
    while emulator.num_unacknowledged(subscription):
        received = emulator.subscriber().pull(subscription=subscription, max_messages=1000).received_messages
        found += [item.message for item in received]
        emulator.subscriber().acknowledge(subscription=subscription, ack_ids=[item.ack_id for item in received])
    return found


def run_until(argv: list[str], act):
    """Runs the job here; when `act`, in a thread, has returned, the job is drained by SIGTERM."""
    ended, errors = threading.Event(), []

    def meanwhile():
        try:
            act()
        except BaseException as error:
            errors.append(error)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=meanwhile)
    try:
        thread.start()
        summary = run(argv)
    finally:
        ended.set()
        thread.join()
    assert not errors, errors
    return summary


def test_from_topic_to_topic_each_message_comes_out_once_though_the_server_restarts(
    emulator, first, first_uri, mixed_table
):
    table = mixed_table.slice(0, 100).select(["length", "count", "color", "id"])
    sent = messages(table, malformed=20)

    def num_out():
        return sum(emulator.num_unacknowledged(f"{PROJECT}/subscriptions/{name}") for name in ("out", "dead"))

    def act():
        emulator.publisher().publish(topic=f"{PROJECT}/topics/in", messages=sent[:60])
        until(lambda: num_out() >= 60)
        emulator.stop()
        emulator.start()
        emulator.publisher().publish(topic=f"{PROJECT}/topics/in", messages=sent[60:])
        until(lambda: num_out() >= 120)

    places = {"output": f"pubsub:{PROJECT}/topics/out", "dead_letters": f"pubsub:{PROJECT}/topics/dead"}
    summary = run_until(["--streaming", *stream_flags(first_uri, **places)], act)
    scored, dead = pulled(emulator, "out"), pulled(emulator, "dead")
    ids = [message.attributes["id"] for message in scored + dead]
    assert sorted(map(int, ids)) == list(range(120))
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (120, 100, 20)
    assert summary.versions == {first.model_version: 100}
    assert {message.attributes["dead_letter_error_type"] for message in dead} == set(summary.reasons)
    by_id = {json.loads(message.data)["id"]: message for message in scored}
    for row in first.score(table).to_pylist():
        record, attributes = json.loads(by_id[row["id"]].data), by_id[row["id"]].attributes
        assert record["anomaly_score"] == pytest.approx(row["anomaly_score"], rel=1e-4, abs=1e-3)
        assert attributes["is_anomaly"] == str(record["is_anomaly"]).lower()
        assert attributes["model_version"] == first.model_version
    assert {message.ordering_key for message in scored} == {"key"}


def test_from_a_topic_to_files_by_window_late_events_have_their_own_window(emulator, first_uri, mixed_table, tmp_path):
    table = mixed_table.slice(0, 60).select(["length", "count", "color", "id"])
    sent = messages(table, malformed=10)
    past = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for message in sent[::7]:
        message["attributes"]["at"] = past.isoformat().replace("+00:00", "Z")
    late = {json.loads(message["data"])["id"] for message in sent[::7] if message["data"].count(b'"id"')}

    def act():
        emulator.publisher().publish(topic=f"{PROJECT}/topics/in", messages=sent)
        # The job is drained with messages on their way in it, which are acknowledged and come from nowhere again.
        until(lambda: not emulator.num_unacknowledged(f"{PROJECT}/subscriptions/in"))

    flags = stream_flags(
        first_uri, tmp_path / "out", window_secs=2, timestamp_attribute="at", columns="id,color", reasons=1
    )
    summary = run_until(["--streaming", *flags], act)
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (70, 60, 10)
    written = pq.read_table(tmp_path / "out")
    assert sorted(written["id"].to_pylist()) == sorted(table["id"].to_pylist())
    assert all(
        reasons[0]["feature"] in {"length", "count", "color"} for reasons in written["anomaly_reasons"].to_pylist()
    )
    found = {
        path: pq.read_table(path) for path in (tmp_path / "out").glob("scored-20260102T030404Z-20260102T030406Z-*")
    }
    assert {row for part in found.values() for row in part["id"].to_pylist()} == late
    assert pq.read_table(tmp_path / "out" / "_dead_letters").num_rows == 10
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]


def test_a_topic_that_is_not_there_is_told_in_one_line(emulator, first_uri, capsys):
    emulator.publisher().publish(topic=f"{PROJECT}/topics/in", messages=[{"data": b"bad"}])
    places = {"output": f"pubsub:{PROJECT}/topics/out", "dead_letters": f"pubsub:{PROJECT}/topics/nowhere"}
    assert main(["--streaming", *stream_flags(first_uri, **places)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"beam-vae: error: 404 Resource not found: {PROJECT}/topics/nowhere"


def test_the_demos_account_adds_up_only_if_it_does():
    from pipeline.demo_stream import Account

    def account(**changes):
        made = {"published": ["a", "b", "b"], "scored": ["b", "a"], "dead": ["b"], "versions": Counter(x=1, y=1)}
        return Account(**made | changes)

    assert account().adds_up
    assert account().num_again == 1
    assert not account(dead=[]).adds_up
    assert not account(scored=["a", "b", "b"]).adds_up
    assert not account(scored=["b", "c"]).adds_up
    assert not account(versions=Counter(x=2)).adds_up
    assert not account(num_contradictions=1).adds_up
