import base64
import dataclasses
import datetime
import enum
import io
import json
import math
import random
import time
import uuid
from collections import Counter, UserDict
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import apache_beam as beam
import fastavro
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.utils.timestamp import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_runs import (
    AVRO,
    FORMS,
    ITEM,
    AtItsTime,
    as_avro,
    as_item,
    as_json,
    ident,
    run,
    same_places,
    score_of,
)

from pipeline.records import DEAD_LETTER_SCHEMA
from pipeline.rows import Reading, json_text, payload, read_column, read_json, read_records, readings
from pipeline.score_records import ScoreRecords
from pipeline.transforms import ScoreTables
from vae_model.pointer import Entry, Pointer

SCORES = ["anomaly_score", "anomaly_p_value", "is_anomaly", "model_version"]


@pytest.fixture(scope="module")
def table(make_table):
    table = make_table(2000, 7)
    return table.set_column(table.schema.get_field_index("id"), "id", pa.array([f"r{i}" for i in range(2000)]))


@pytest.fixture(scope="module")
def records(table):
    return table.to_pylist()


@pytest.fixture(scope="module")
def expected(table, bundle):
    """Score and tolerance (design, section 4) by id."""
    terms = bundle.terms(table).abs().to_numpy().sum(axis=1)
    scores = bundle.score(table)["anomaly_score"].to_numpy()
    return {
        name: (score, 1e-4 * (1 + term))
        for name, score, term in zip(table["id"].to_pylist(), scores, terms, strict=True)
    }


# ---- the same scores, whatever the form ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_batch_duration_secs": 0.05}], ids=["in bundle", "across bundles"])
def test_every_form_scores_as_python_does_and_keeps_its_form(options, records, expected, bundle_uri):
    elements = [make(record) for i, make in enumerate(FORMS.values()) for record in records[i::50]]
    outcome = run(elements, ScoreRecords(bundle_uri, **options))
    assert not outcome.letters
    assert sorted(map(ident, outcome.values())) == sorted(map(ident, elements))
    for value in outcome.values():
        score, tolerance = expected[ident(value)]
        assert abs(score_of(value) - score) <= tolerance
    made = {"named": beam.Row, "mapping": dict}
    wanted = Counter(made.get(name, type(make(records[0]))) for name, make in FORMS.items() for _ in range(40))
    assert Counter(map(type, outcome.values())) == wanted


def test_what_a_record_held_is_still_there(records, bundle, bundle_uri):
    record = {**records[0], "note": [1, {"deep": None}], 5: "a key that is no text"}
    (value,) = run([record], ScoreRecords(bundle_uri)).values()
    assert list(value) == [*record, *SCORES]
    assert {key: value[key] for key in record} == record
    assert value["model_version"] == bundle.model_version
    text = as_json({**records[1], "big": 2**80, "pi": 3.14159265358979311})[:-1] + b' , "x": 1.10}\n '
    (scored,) = run([text], ScoreRecords(bundle_uri)).values()
    assert scored.startswith(text.rstrip()[:-1])  # digit for digit
    assert list(json.loads(scored)) == [*json.loads(text), *SCORES]


def test_a_message_keeps_its_attributes_and_ordering_key(records, bundle_uri):
    message = PubsubMessage(as_json(records[0]), {"origin": "a"}, message_id="7", ordering_key="k")
    (value,) = run([message], ScoreRecords(bundle_uri)).values()
    assert (value.attributes, value.ordering_key) == ({"origin": "a"}, "k")
    bad = PubsubMessage(b"{", {"origin": "b"})
    (letter,) = run([bad], ScoreRecords(bundle_uri)).reasons()
    assert dict(letter["attributes"]) == {"origin": "b"}
    assert (letter["payload"], letter["payload_format"]) == ("{", "json")


@dataclasses.dataclass(slots=True)
class Slim:
    """Of what `bundle` reads, the rest is missing."""

    length: float | str
    weight: float
    count: int = dataclasses.field(init=False)


def test_dataclasses_with_slots_are_records(records, bundle, bundle_uri):
    elements = [Slim(1.5, 2.0), Slim("long", 2.0), records[0]]  # of no known type, so that columns may be missing
    outcome = run(elements, ScoreRecords(bundle_uri, reasons=1))
    (value,) = (value for value in outcome.values() if not isinstance(value, dict))
    schema = bundle.schema
    cells = {name: [{"length": 1.5, "weight": 2.0}.get(name)] for name in schema.names}
    table = pa.table({name: pa.array(cell, schema.arrow_type(name)) for name, cell in cells.items()})
    assert (value.length, value.count) == (1.5, None)
    assert value.anomaly_score == pytest.approx(bundle.score(table)["anomaly_score"][0].as_py(), rel=1e-3)
    (letter,) = outcome.reasons()
    assert json.loads(letter["payload"]) == {"length": "long", "weight": 2.0, "count": None}


def test_avro_scores_with_and_without_a_header(records, expected, bundle_uri):
    canonical = fastavro.schema.to_parsing_canonical_form(AVRO)
    header = b"\xc3\x01" + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    elements = [as_avro(record) for record in records[:50]] + [header + as_avro(record) for record in records[50:90]]
    elements += [PubsubMessage(as_avro(record), {"a": "b"}) for record in records[90:99]]
    broken = [as_avro(records[99])[:-4], b"", as_avro(records[99]) + b"x", b"\xff" * 40, b"text"]
    outcome = run(elements + broken, ScoreRecords(bundle_uri, input_format="avro", avro_schema=json.dumps(AVRO)))
    assert sorted(map(ident, outcome.values())) == sorted(record["id"] for record in records[:99])
    for value in outcome.values():
        score, tolerance = expected[ident(value)]
        assert abs(score_of(value) - score) <= tolerance
    letters = outcome.reasons()
    assert {letter["error_type"] for letter in letters} == {"malformed_record"}
    assert {letter["payload_format"] for letter in letters} == {"base64"}
    assert sorted(base64.b64decode(letter["payload"]) for letter in letters) == sorted(broken)


def test_avro_records_may_name_their_schema_by_confluents_id(table, records, bundle, bundle_uri):
    older = {**AVRO, "fields": [field for field in AVRO["fields"] if field["name"] != "price"]}

    def wire(record, schema_id, schema):
        stream = io.BytesIO()
        stream.write(b"\0" + schema_id.to_bytes(4, "big"))
        fastavro.schemaless_writer(stream, schema, record)
        return stream.getvalue()

    elements = [wire(record, *((9, older) if i % 2 else (7, AVRO))) for i, record in enumerate(records[:20])]
    wrong = [wire(records[20], 8, AVRO), as_avro(records[21]), b"", b"\0\0"]
    score = ScoreRecords(bundle_uri, input_format="avro", avro_schema={7: AVRO, 9: json.dumps(older)})
    outcome = run(elements + wrong, score)
    found = {value["id"]: value["anomaly_score"] for value in outcome.values()}
    wanted = [
        {name: value for name, value in record.items() if name != "price" or i % 2 == 0}
        for i, record in enumerate(records[:20])
    ]
    alone = bundle.score(pa.Table.from_pylist(wanted, table.schema))["anomaly_score"].to_pylist()
    assert found == pytest.approx({f"r{i}": score for i, score in enumerate(alone)}, rel=1e-3, abs=1e-3)
    errors = Counter(letter["error"] for letter in outcome.reasons())
    assert errors == {
        "expected the Avro schema id 7 or 9, got 8": 1,
        "expected a zero and a schema id of four bytes before the Avro record, got other bytes": 3,
    }


@pytest.mark.parametrize("columns", [None, ["id", "price"], []], ids=["all", "some", "none"])
def test_avro_may_leave_as_avro(columns, records, expected, bundle_uri):
    canonical = fastavro.schema.to_parsing_canonical_form(AVRO)
    header = b"\xc3\x01" + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    elements = [as_avro(records[0]), header + as_avro(records[1]), PubsubMessage(as_avro(records[2]), {"a": "b"})]
    elements += [("k", as_avro(records[3])), records[4]]
    score = ScoreRecords(bundle_uri, input_format="avro", avro_schema=AVRO, output="avro", reasons=2, columns=columns)
    outcome = run(elements, score)
    (letter,) = outcome.reasons()
    assert letter["error"] == 'expected an Avro record, as output="avro" needs it, got a dict'
    schema = score.scored_avro_schema
    mark = fastavro.schema.fingerprint(fastavro.schema.to_parsing_canonical_form(schema), "CRC-64-AVRO")
    kinds = []
    for value in outcome.values():
        kinds.append(type(value))
        value = value[1] if type(value) is tuple else value
        value = value.data if isinstance(value, PubsubMessage) else value
        assert value[:10] == b"\xc3\x01" + bytes.fromhex(mark)
        stream = io.BytesIO(value[10:])
        back = fastavro.schemaless_reader(stream, schema, None)
        assert not stream.read()
        (record,) = [record for record in records[:4] if abs(back["anomaly_score"] - expected[record["id"]][0]) < 1e-2]
        kept = list(record) if columns is None else columns
        assert list(back) == [*kept, *SCORES[:3], "anomaly_reasons", SCORES[3]]
        assert {name: back[name] for name in kept} == {name: record[name] for name in kept}
        assert len(back["anomaly_reasons"]) == 2
        assert back["anomaly_reasons"][0]["nats"] > 0
    assert kinds == [bytes, bytes, PubsubMessage, tuple]
    if columns is None:  # readers of the old schema still read it
        assert fastavro.schemaless_reader(io.BytesIO(value[10:]), schema, AVRO) == record


def test_avro_schemas_that_cannot_hold_the_scores_are_refused(bundle_uri):
    score = {"bundle": bundle_uri, "input_format": "avro", "output": "avro"}
    taken = {**AVRO, "fields": [*AVRO["fields"], {"name": "is_anomaly", "type": "boolean"}]}
    for options, message in [
        ({"avro_schema": taken}, "is_anomaly: the Avro schema has such a column already; choose a prefix"),
        ({"avro_schema": AVRO, "prefix": "x-"}, "prefix: expected letters, digits and _ for Avro"),
        ({"avro_schema": AVRO, "columns": ["nonsense"]}, "nonsense: named in columns, but the Avro schema has only"),
        ({"avro_schema": '["null", "long"]'}, "avro_schema: expected that of a record, got "),
    ]:
        records = beam.Pipeline(runner="FnApiRunner") | beam.Create([b""])
        with pytest.raises(ValueError, match=message):
            records | ScoreRecords(**score, **options)
    both = ScoreRecords(**{**score, "avro_schema": {1: AVRO, 2: taken}, "prefix": "x_"}).scored_avro_schema
    assert [len(both[key]["fields"]) for key in (1, 2)] == [15, 16]


def test_rows_that_beam_reads_from_parquet_are_scored(table, expected, bundle_uri, tmp_path):
    plain = table.set_column(4, "size", table["size"].cast(pa.string()))  # Beam knows no dictionaries nor times
    plain = plain.set_column(7, "seen_at", table["seen_at"].cast(pa.string()))
    pq.write_table(plain, tmp_path / "rows.parquet", row_group_size=300)
    rows = beam.io.ReadFromParquet(str(tmp_path / "*.parquet"), as_rows=True)
    outcome = run(rows, ScoreRecords(bundle_uri, columns=["id"]))
    assert len(outcome.scored) == table.num_rows
    assert not outcome.letters
    for value in outcome.values():
        assert abs(value.anomaly_score - expected[value.id][0]) <= expected[value.id][1]


def test_rows_reach_a_step_that_takes_batches(table, bundle, bundle_uri, tmp_path):
    """Beam's own sink for Parquet is one; of what a step sends as its Beam bundle ends, it would get nothing."""
    plain = table.slice(0, 100).select(["length", "weight", "count", "color", "is_large", "site", "unit", "id"])
    for name in ("size", "price", "seen_at"):
        plain = plain.append_column(name, pa.nulls(100, pa.string()))
    pq.write_table(plain, tmp_path / "rows.parquet")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        rows = pipeline | beam.io.ReadFromParquet(str(tmp_path / "rows.parquet"), as_rows=True)
        scored, _ = rows | ScoreRecords(bundle_uri, reasons=2)
        scored | beam.io.WriteToParquet(str(tmp_path / "out"))
    written = pa.concat_tables(map(pq.read_table, tmp_path.glob("out*")))
    assert sorted(written["id"].to_pylist()) == sorted(plain["id"].to_pylist())
    alone = bundle.score(plain, reasons=2)
    assert written.column_names[-5:] == alone.column_names[-5:]
    found = written.sort_by("id")["anomaly_reasons"].to_pylist()
    for got, want in zip(found, alone.sort_by("id")["anomaly_reasons"].to_pylist(), strict=True):
        assert [[reason["feature"], reason["value"], reason["low"]] for reason in got] == [
            [reason["feature"], reason["value"], reason["low"]] for reason in want
        ]
        assert [reason["nats"] for reason in got] == pytest.approx([reason["nats"] for reason in want], rel=1e-3)


def test_rows_of_a_known_type_become_rows_of_a_known_type(records, bundle_uri):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    rows = pipeline | beam.Create([as_item(records[0])]).with_output_types(ITEM)
    scored, _ = rows | ScoreRecords(bundle_uri, reasons=2, columns=["id"])
    assert isinstance(scored.element_type, RowTypeConstraint)
    assert [name for name, _ in scored.element_type._fields] == ["id", *SCORES[:3], "anomaly_reasons", SCORES[3]]
    encoded = beam.coders.registry.get_coder(scored.element_type)
    outcome = run([as_item(record) for record in records[:3]], ScoreRecords(bundle_uri, reasons=2, columns=["id"]))
    for value in outcome.values():
        back = encoded.decode(encoded.encode(value))
        assert back.id == value.id
        assert back.anomaly_reasons[0].feature == value.anomaly_reasons[0].feature


def test_reasons_are_those_of_python(table, records, bundle, bundle_uri):
    elements = records[:40] + [as_json(record) for record in records[40:80]]
    outcome = run(elements, ScoreRecords(bundle_uri, reasons=2))
    alone = bundle.score(table.slice(0, 80), reasons=2).to_pylist()
    wanted = {row["id"]: row["anomaly_reasons"] for row in alone}
    for value in outcome.values():
        record = json.loads(value) if isinstance(value, bytes) else value
        for got, want in zip(record["anomaly_reasons"], wanted[record["id"]], strict=True):
            assert got["feature"] == want["feature"]
            if got["feature"] != "seen_at":  # JSON keeps the text as it came
                assert got["value"] == want["value"]
            assert got["nats"] == pytest.approx(want["nats"], rel=1e-3, abs=1e-3)


def test_ids_and_scores_alone(records, bundle_uri):
    elements = [records[0], as_json(records[1]), beam.Row(**records[2])]
    for value in run(elements, ScoreRecords(bundle_uri, columns=["id"], prefix="x_")).values():
        record = json.loads(value) if isinstance(value, bytes) else value if isinstance(value, dict) else vars(value)
        assert list(record) == ["id", *(f"x_{name}" for name in SCORES)]
    for value in run(elements, ScoreRecords(bundle_uri, columns=[], output="json")).values():
        assert list(json.loads(value)) == SCORES


def test_any_form_can_leave_as_json(records, expected, bundle_uri):
    elements = [make(record) for make, record in zip(FORMS.values(), records, strict=False)]
    values = run(elements, ScoreRecords(bundle_uri, output="json")).values()
    assert {type(value) for value in values} == {bytes}
    assert sorted(map(ident, values)) == sorted(map(ident, elements))
    for value in values:
        assert abs(score_of(value) - expected[ident(value)][0]) <= expected[ident(value)][1]


def test_beams_own_result_class(records, bundle, expected, bundle_uri):
    elements = [records[0], as_json(records[1]), PubsubMessage(as_json(records[2]), {})]
    values = run(elements, ScoreRecords(bundle_uri, output="anomaly_result", threshold=-1e9, reasons=1)).values()
    assert len(values) == 3
    for value in values:
        (prediction,) = value.predictions
        assert prediction.score == pytest.approx(expected[value.example.id][0], rel=1e-4, abs=1e-3)
        assert (prediction.label, prediction.threshold, prediction.model_id) == (1, -1e9, bundle.model_version)
        assert json.loads(prediction.info)[0]["feature"] in bundle.schema.names


# ---- records that cannot be scored ---------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


def malformed(record, bundle):
    """Elements that cannot be scored; where they can hold an id, they do."""
    text = as_json(record)
    named = {
        "infinite": {**record, "length": math.inf},
        "minus infinite": {**record, "weight": -math.inf},
        "text for a number": {**record, "length": "tall"},
        "list for a number": {**record, "length": [1.0]},
        "dict for a level": {**record, "color": {"name": "red"}},
        "list for a level": {**record, "color": ["red"]},
        "number for a time": {**record, "seen_at": 5},
        "text for a time": {**record, "seen_at": "soon"},
        "text for a truth": {**record, "is_large": "perhaps"},
        "time for a number": {**record, "weight": datetime.datetime(2025, 1, 1)},
        "bytes": {**record, "color": b"\xff"},
        "huge": {**record, "length": 10**400},
        "object": {**record, "length": object()},
        "no column of ours": {"id": record["id"]},
        "a score already": {**record, "anomaly_score": 1.0},
        "row with infinite": beam.Row(**{**record, "length": math.inf}),
        "json text for a number": as_json({**record, "length": "tall"}),
        "json a score already": as_json({**record, "is_anomaly": False}),
        "json number for a time": as_json({**record, "seen_at": 5}),
        "json list": as_json({**record, "length": [1]}),
        "json huge": text.replace(b'"length"', b'"length": 1e999, "old"'),
        "message": PubsubMessage(as_json({**record, "price": "dear"}), {"id": record["id"]}),
    }
    nameless = {
        "none": None,
        "int": 5,
        "list": [record],
        "empty": b"",
        "blank": "  ",
        "cut": text[:-5],
        "two objects": text + text,
        "array": b"[" + text + b"]",
        "number": b"5",
        "null": b"null",
        "latin": b'{"length": "\xe9"}',
        "no data": PubsubMessage(b"", {"a": "b"}),
        "deep": b'{"length": ' + b"[" * 100_000,
    }
    return named, nameless


def test_each_malformed_record_costs_only_itself(records, bundle, bundle_uri):
    elements, good, bad, num_nameless = [], [], [], 0
    for i, record in enumerate(records[:1900]):
        if i % 10:
            good.append(record["id"])
            elements.append(list(FORMS.values())[i % len(FORMS)](record))
            continue
        named, nameless = malformed(record, bundle)
        kinds = [*named.values(), *nameless.values()]
        element = kinds[i // 10 % len(kinds)]
        if any(element is other for other in named.values()):
            bad.append(record["id"])
        else:
            num_nameless += 1
        elements.append(element)
    random.Random(0).shuffle(elements)
    outcome = run(elements, ScoreRecords(bundle_uri, max_batch_size=700).with_exception_handling())
    assert sorted(map(ident, outcome.values())) == sorted(good)
    letters = outcome.reasons()
    assert len(letters) == len(bad) + num_nameless == outcome.counters["num_dead_letters"]
    assert outcome.counters["num_inferences"] >= len(good)
    ids = Counter()
    for letter in letters:
        try:
            ids[json.loads(letter["payload"])["id"]] += 1
        except (ValueError, TypeError, KeyError, RecursionError):  # it has none that can be read
            continue
    assert Counter(bad) == ids
    for letter in letters:
        assert letter["stage"] == "score"
        assert letter["model_version"] == bundle.model_version
        assert letter["num_records"] == 1
        assert "expected" in letter["error"] or "no column" in letter["error"] or "already" in letter["error"]


def test_each_kind_of_malformed_record_says_what_is_wrong(records, bundle, bundle_uri):
    named, nameless = malformed(records[0], bundle)
    outcome = run([*named.values(), *nameless.values()], ScoreRecords(bundle_uri))
    assert not outcome.scored
    assert all(item.value.schema == DEAD_LETTER_SCHEMA for item in outcome.letters)
    found = {(letter["column"], letter["error_type"]) for letter in outcome.reasons()}
    assert found == {
        ("length", "not_finite"),
        ("weight", "not_finite"),
        ("length", "wrong_type"),
        ("weight", "wrong_type"),
        ("color", "wrong_type"),
        ("price", "wrong_type"),
        ("seen_at", "wrong_type"),
        ("is_large", "wrong_type"),
        ("length", "missing_column"),
        ("anomaly_score", "name_clash"),
        ("is_anomaly", "name_clash"),
        (None, "malformed_record"),
        (None, "not_a_record"),
    }
    errors = {letter["error"] for letter in outcome.reasons()}
    assert "length: expected a number, got 'tall'" in errors
    assert "seen_at: expected a time, got 5" in errors
    assert "expected a record (dict, row, JSON or message), got None" in errors


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_records_in_are_scored_or_dead_letters(data, bundle, bundle_uri):
    cells = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.decimals(),
        st.datetimes(timezones=st.none() | st.timezones()),
        st.dates(),
        st.times(),
        st.timedeltas(),
        st.uuids(),
        st.fractions(),
        st.complex_numbers(),
        st.lists(st.integers()),
        st.dictionaries(st.text(), st.floats()),
        st.sampled_from([Color.RED, np.float32(1), np.int8(1), np.bool_(True), np.datetime64("2020"), pd.NA, pd.NaT]),
    )
    one = st.dictionaries(st.sampled_from([*bundle.schema.names, "other"]) | st.text(), cells, max_size=12)
    elements = data.draw(st.lists(one, min_size=1, max_size=60))
    for i, element in enumerate(elements):
        element["id"] = i
    outcome = run(elements, ScoreRecords(bundle_uri))
    ids = [value["id"] for value in outcome.values()]
    ids += [json.loads(letter["payload"])["id"] for letter in outcome.reasons()]
    assert sorted(ids) == list(range(len(elements)))
    assert all(math.isfinite(value["anomaly_score"]) for value in outcome.values())


# ---- timestamps and windows ----------------------------------------------------------------------


def test_letters_have_the_timestamp_and_window_of_their_record(records, bundle_uri):
    elements = [({**records[i], "id": i, **({"length": "?"} if i % 3 else {})}, 20 * i) for i in range(30)]
    prepare = beam.ParDo(AtItsTime()) | beam.WindowInto(FixedWindows(60))
    outcome = run(elements, ScoreRecords(bundle_uri), prepare=prepare)
    found = {}
    for item in outcome.letters:
        for letter in item.value.to_pylist():
            found[json.loads(letter["payload"])["id"]] = item.timestamp, item.windows, letter["event_time"]
    assert found.keys() == {i for i in range(30) if i % 3}
    for item in outcome.given:
        if (i := item.value["id"]) in found:
            assert found[i] == (item.timestamp, item.windows, datetime.datetime.fromtimestamp(20 * i, datetime.UTC))


# ---- batches across Beam bundles -----------------------------------------------------------------


def trickle(records, num_records, **changes):
    """A stream of Beam bundles of one element, on a clock that shows the time of day, as the timers need it."""
    stream = TestStream().advance_watermark_to(0).advance_processing_time(int(time.time()))
    for i in range(num_records):
        stream = stream.add_elements([TimestampedValue({**records[i], "id": i, **changes}, 1 + (0 if changes else i))])
    return stream


def batch_sizes(outcome):
    """Of malformed records with one timestamp: their letters leave in one table per batch."""
    return sorted((item.value.num_rows for item in outcome.letters), reverse=True)


def test_short_beam_bundles_are_scored_together(records, bundle_uri):
    score = ScoreRecords(bundle_uri, max_batch_size=16, max_batch_duration_secs=3600)
    stream = trickle(records, 40, length="?").advance_watermark_to_infinity()
    outcome = run(stream, score, runner="BundleBasedDirectRunner", streaming=True)
    sizes = batch_sizes(outcome)
    assert sum(sizes) == 40
    assert max(sizes) <= 16
    assert len(sizes) <= 4  # of 40 Beam bundles


def test_a_batch_waits_no_longer_than_its_duration(records, bundle_uri):
    score = ScoreRecords(bundle_uri, max_batch_duration_secs=30, columns=["id"])
    stream = trickle(records, 20).advance_processing_time(600)
    stream = stream.add_elements([TimestampedValue({**records[0], "id": "last"}, 50)])
    outcome = run(stream.advance_watermark_to_infinity(), score, runner="BundleBasedDirectRunner", streaming=True)
    assert [value["id"] for value in outcome.values()][-1] == "last"
    assert sorted(value["id"] for value in outcome.values()[:-1]) == list(range(20))
    same_places(outcome)


def test_without_a_duration_nothing_waits(records, bundle_uri):
    stream = trickle(records, 10, length="?").advance_watermark_to_infinity()
    outcome = run(stream, ScoreRecords(bundle_uri), runner="BundleBasedDirectRunner", streaming=True)
    assert batch_sizes(outcome) == [1] * 10


def test_batches_across_beam_bundles_are_bounded_and_counted(records, bundle_uri):
    score = ScoreRecords(bundle_uri, max_batch_size=16, max_batch_duration_secs=3600)
    outcome = run([dict(record) for record in records[:100]], score)
    assert sorted(map(ident, outcome.values())) == sorted(record["id"] for record in records[:100])
    assert (outcome.batch_sizes.sum, outcome.batch_sizes.max) == (100, 16)
    assert outcome.counters["num_inferences"] == 100
    assert outcome.batch_sizes.count <= 100 // 16 + 8  # and the rest of each shard


# ---- retries -------------------------------------------------------------------------------------

FAILURES = Counter()


class Flaky(UserDict):
    """A record that fails its Beam bundle, up to twice."""

    def keys(self):
        if FAILURES[self.data["id"]] < 2 and random.random() < 0.7:
            FAILURES[self.data["id"]] += 1
            raise RuntimeError("unlucky")
        return super().keys()


def test_a_retried_beam_bundle_leaves_each_record_once(records, bundle_uri):
    FAILURES.clear()
    stream = TestStream().advance_watermark_to(0)
    for start in range(0, 200, 20):
        chunk = [TimestampedValue({**records[i], "id": i}, i) for i in range(start, start + 20)]
        chunk[7] = TimestampedValue(Flaky(chunk[7].value), start + 7)
        stream = stream.add_elements(chunk)
    stream = stream.advance_watermark_to_infinity()
    score = ScoreRecords(bundle_uri, max_batch_size=8)
    outcome = run(stream, score, runner="BundleBasedDirectRunner", streaming=True)
    assert sum(FAILURES.values()) > 0
    assert sorted(value["id"] for value in outcome.values()) == list(range(200))


# ---- cells ---------------------------------------------------------------------------------------

NUMBER = Reading("x", pa.float64())
SPAN = Reading("x", pa.float64(), 1000)
LEVEL = Reading("x", pa.string())
TRUTH = Reading("x", pa.bool_())
WHOLE = Reading("x", pa.int64())
TIME = Reading("x", pa.timestamp("us"))
ZONED = Reading("x", pa.timestamp("us", "UTC"))
CLOCK = Reading("x", pa.time64("us"))
NOON = datetime.datetime(2025, 1, 2, 12)
WRONG = object()
CELLS = [
    (NUMBER, 1, 1.0),
    (NUMBER, True, 1.0),
    (NUMBER, 2**53 + 1, float(2**53 + 1)),
    (NUMBER, 2**64, 2.0**64),
    (NUMBER, 10**400, math.inf),  # and so refused, as not finite
    (NUMBER, Decimal("1.5"), 1.5),
    (NUMBER, Decimal("NaN"), None),
    (NUMBER, Decimal("-Infinity"), -math.inf),
    (NUMBER, Fraction(1, 4), 0.25),
    (NUMBER, "1e3", 1000.0),
    (NUMBER, " NA ", None),
    (NUMBER, "1,5", WRONG),
    (NUMBER, b"7", 7.0),
    (NUMBER, np.float32(0.5), 0.5),
    (NUMBER, np.int8(3), 3.0),
    (NUMBER, np.bool_(True), 1.0),
    (NUMBER, np.float64("nan"), math.nan),
    (NUMBER, pd.NA, None),
    (NUMBER, NOON, WRONG),
    (NUMBER, np.datetime64("20000-01-01"), WRONG),
    (NUMBER, datetime.timedelta(seconds=1), WRONG),
    (NUMBER, 1j, WRONG),
    (NUMBER, np.array([1.0]), WRONG),
    (SPAN, datetime.timedelta(seconds=1.5), 1500.0),
    (SPAN, np.timedelta64(2, "s"), 2000.0),
    (SPAN, np.timedelta64(2**62, "s"), WRONG),
    (SPAN, np.timedelta64(2_000_000_001, "ns"), 2000.0),
    (SPAN, 250, 250.0),
    (LEVEL, "red", "red"),
    (LEVEL, Color.RED, "red"),
    (LEVEL, "", ""),
    (LEVEL, b"red", "red"),
    (LEVEL, b"\xff", WRONG),
    (LEVEL, "\ud800", WRONG),
    (LEVEL, 5, "5"),
    (LEVEL, 5.0, "5"),
    (LEVEL, math.nan, None),
    (LEVEL, True, "true"),
    (LEVEL, Decimal("5.0"), "5.0"),
    (LEVEL, uuid.UUID(int=1), str(uuid.UUID(int=1))),
    (LEVEL, ["red"], WRONG),
    (TRUTH, np.bool_(False), False),
    (TRUTH, "true", True),
    (TRUTH, 0, False),
    (TRUTH, "maybe", WRONG),
    (WHOLE, 5.0, 5),
    (WHOLE, 5.5, WRONG),
    (WHOLE, "5", 5),
    (WHOLE, 2**64, WRONG),
    (TIME, NOON, NOON),
    (TIME, NOON.date(), datetime.datetime(2025, 1, 2)),
    (TIME, pd.Timestamp(NOON), NOON),
    (TIME, pd.NaT, None),
    (TIME, np.datetime64("2025-01-02T12:00"), NOON),
    (TIME, np.datetime64("NaT"), None),
    (TIME, Timestamp.from_rfc3339("2025-01-02T12:00:00Z"), NOON),
    (TIME, NOON.replace(tzinfo=ZoneInfo("Europe/Paris")), NOON - datetime.timedelta(hours=1)),
    (TIME, "2025-01-02T12:00:00", NOON),
    (TIME, "2025-01-02T12:00:00+01:00", NOON - datetime.timedelta(hours=1)),
    (TIME, np.datetime64(2**62, "D"), WRONG),
    (TIME, np.datetime64("20000-01-01"), WRONG),
    (TIME, np.datetime64("2025-01-02T12:00:00.000000999"), NOON),
    (TIME, 5, WRONG),
    (TIME, 1.5, WRONG),
    (TIME, datetime.time(12), WRONG),
    (ZONED, NOON, NOON.replace(tzinfo=datetime.UTC)),
    (
        ZONED,
        NOON.replace(tzinfo=ZoneInfo("Asia/Tokyo")),
        (NOON - datetime.timedelta(hours=9)).replace(tzinfo=datetime.UTC),
    ),
    (CLOCK, datetime.time(12, 30), datetime.time(12, 30)),
    (CLOCK, "12:30:00", datetime.time(12, 30)),
    (CLOCK, NOON, WRONG),
]


@pytest.mark.parametrize(("reading", "cell", "want"), CELLS)
def test_a_cell_of_any_python_type_is_read_or_refused(reading, cell, want):
    neighbours = [None, *(other for kind, other, _ in CELLS if kind is reading)]
    for cells in ([cell], [*neighbours, cell]):
        column, wrong = read_column(cells, reading)
        got = column[-1].as_py()
        if want is WRONG:
            assert got is None
            assert f"expected {reading.wanted}, got" in wrong[len(cells) - 1]
        else:
            assert len(cells) - 1 not in wrong
            missing = want is None or want != want
            assert (got is None or got != got) if missing else got == want


def test_json_and_dicts_of_the_same_record_are_read_alike(records, bundle):
    wanted = readings(bundle.schema)
    odd = [{"color": 2**64}, {"color": -(2**70)}, {"color": 1e300}, {"length": 2**64}]
    odd += [{"length": "5"}, {"color": 5}, {"is_large": 1}, {"count": 2.0}, {"price": "NA"}, {"color": None}]
    all_records = [{**records[i], **odd[i % len(odd)]} if i % 7 == 0 else records[i] for i in range(500)]
    texts = [as_json(record) for record in all_records]
    as_dicts, as_texts = read_records(all_records, wanted), read_json(texts, wanted)
    assert not as_dicts.faults
    assert not as_texts.faults
    for one, other in zip(as_dicts.arrays, as_texts.arrays, strict=True):
        assert one.equals(other)


def test_json_is_read_as_pythons_own_parser_reads_it(bundle):
    cells = [
        "NaN",
        "-Infinity",
        "1e999",
        "-0",
        "-0.0",
        "18446744073709551616",
        "1" * 400,
        '"\\ud800"',
        '"\\ud83d\\ude00"',
    ]
    cells += [
        '"\\u0000"',
        "01",
        "1.",
        "+1",
        "[" * 50 + "]" * 50,
        "[" * 3000 + "]" * 3000,
        "[" * 10**5,
        "true",
        '"\x01"',
        "{}",
    ]
    texts = [f'{{"{name}": {cell}, "count": 1}}' for name in ("color", "length", "other") for cell in cells]
    texts += [
        '{"color": "a", "color": "b"}',
        '{"\\u0063olor": "a"}',
        '\ufeff{"color": "a"}',
        ' {"color":"a"}\r\n',
        "[1]",
        '"color"',
        "5",
        "",
        "{}",
    ]
    texts += [
        '{"color": "a"}{"color": "b"}',
        '{"color": "a"}\0',
        "{'color': 'a'}",
        '{"color": "a",}',
        "null",
        '{"color": "\u2028"}',
    ]
    wanted = readings(bundle.schema)
    for batch in ([text.encode() for text in texts], *([text.encode()] for text in texts)):
        columns = read_json(batch, wanted)
        for row, text in enumerate(batch):
            try:
                record = json.loads(text.decode())
                json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
                assert isinstance(record, dict)
            except (ValueError, RecursionError, AssertionError):
                record = None
            if record is None:
                assert columns.faults[row].error_type == "malformed_record"
                continue
            own = read_records([record], wanted)
            assert columns.faults.get(row) == own.faults.get(0)
            for array, alone in zip(columns.arrays, own.arrays, strict=True):
                assert str(array[row]).replace("nan", "None") == str(alone[0]).replace(
                    "nan", "None"
                )  # both are missing


def nested(levels, cell="1"):
    """A JSON object of so many levels."""
    return '{"color": "[[\\\\\\"[", "extra": ' + "[" * (levels - 1) + cell + "]" * (levels - 1) + ', "count": 1}'


@pytest.mark.parametrize("cell", ["1", "NaN", '"\\\\"', "{}, " * 300 + '"]"'])
def test_json_that_python_cannot_read_again_is_set_aside(cell, bundle):
    wanted = readings(bundle.schema)
    own = cell.count("{") > 0  # a level more
    texts = [nested(levels - own, cell).encode() for levels in (200, 201, 990, 1020)]
    texts.append(b'{"color": ' + b"[" * 990 + b"]" * 990 + b', "color": "red"}')  # the last one counts
    for batch in (texts, *([text] for text in texts)):
        faults = read_json(batch, wanted).faults
        for row, text in enumerate(batch):
            if text == texts[0]:
                assert row not in faults
                json.loads(json_text(json.loads(text)))
            else:
                assert faults[row].error_type == "malformed_record"
    assert "more than 200 levels" in read_json(texts, wanted).faults[1].error


def test_json_may_be_spread_over_lines(records, bundle):
    wanted = readings(bundle.schema)
    texts = [json.dumps(record, default=str, indent=1).encode() for record in records[:50]]
    plain = read_json([as_json(record) for record in records[:50]], wanted)
    spread = read_json(texts, wanted)
    assert not spread.faults
    assert all(a.equals(b) for a, b in zip(plain.arrays, spread.arrays, strict=True))


class Part(NamedTuple):
    x: float
    inner: Any = None


@pytest.mark.parametrize("kind", [beam.Row, Part, dataclasses.make_dataclass("Whole", ["x", "inner"])])
def test_named_tuples_are_objects_in_the_json_of_a_row(kind):
    text, _ = payload(kind(x=1.0, inner=[Part(2.0), Part(3.0, Part(math.nan))]))
    parts = [{"x": 2.0, "inner": None}, {"x": 3.0, "inner": {"x": None, "inner": None}}]
    assert json.loads(text) == {"x": 1.0, "inner": parts}


def test_any_object_can_be_the_payload_of_a_letter():
    loop = {}
    loop["self"] = loop

    class Hostile:
        def __repr__(self):
            raise RuntimeError("no")

    for value in (loop, Hostile(), {"x": Hostile()}, {(1, 2): math.nan}, [float("inf")], {"a": b"\xff", "b": {1}}):
        text, payload_format = payload(value)
        assert payload_format == "json"
        json.loads(text)
    digits = json.loads(json_text({"a": 10**5000, 10**5000: [-(10**5000)], "b": 2**70}))
    assert digits == {"a": hex(10**5000), hex(10**5000): [hex(-(10**5000))], "b": 2**70}
    assert json.loads(json_text({"a": math.inf, "b": math.nan, 3: Decimal("1.5")})) == {
        "a": "inf",
        "b": None,
        "3": "1.5",
    }


# ---- at launch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_format": "xml"}, 'input_format: expected "json" or "avro"'),
        ({"input_format": "avro"}, "avro_schema: expected with"),
        ({"output": "csv"}, "output: expected one of record, json, avro, anomaly_result, got 'csv'"),
        ({"max_batch_size": 0}, "max_batch_size: expected a number >= 1"),
        ({"max_batch_duration_secs": 0}, "max_batch_duration_secs: expected seconds > 0"),
        ({"columns": ["anomaly_score"]}, "anomaly_score: named in columns"),
        ({"reasons": -1}, "reasons: expected a number"),
    ],
)
def test_wrong_arguments_are_refused(options, message, bundle_uri):
    with pytest.raises(ValueError, match=message):
        ScoreRecords(bundle_uri, **options)


def test_rows_that_do_not_fit_are_refused_when_the_pipeline_is_built(records, bundle_uri):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    rows = pipeline | beam.Create([beam.Row(length=1.0, anomaly_score=2.0)])
    with pytest.raises(ValueError, match="weight: expected such a column, got none"):
        rows | ScoreRecords(bundle_uri)
    with pytest.raises(ValueError, match="nonsense: named in columns"):
        (
            pipeline
            | "Items" >> beam.Create([as_item(records[0])]).with_output_types(ITEM)
            | "Score" >> ScoreRecords(bundle_uri, columns=["nonsense"])
        )


@pytest.mark.parametrize("transform", [ScoreRecords, ScoreTables])
def test_a_threshold_in_nats_is_refused_where_models_may_be_swapped(transform, bundle, bundle_uri, tmp_path):
    uri = str(tmp_path / "current.json")
    Pointer(uri, Entry(bundle_uri, bundle.model_version, "x")).write()
    pipeline = beam.Pipeline(runner="FnApiRunner")
    bounded = pipeline | beam.Create([], reshuffle=False)
    unbounded = pipeline | TestStream()
    message = "threshold: expected None with a pointer that is followed"
    with pytest.raises(ValueError, match=message):
        unbounded | "Stream" >> transform(uri, threshold=1.0)
    with pytest.raises(ValueError, match=message):
        bounded | "Asked" >> transform(uri, threshold=1.0, model_refresh_secs=60)
    bounded | "Batch" >> transform(uri, threshold=1.0)
    unbounded | "Fixed version" >> transform(uri, threshold=1.0, model_refresh_secs=0)
    unbounded | "Bundle" >> transform(bundle_uri, threshold=1.0)


def test_metrics_have_the_names_of_run_inference(records, bundle_uri):
    outcome = run([dict(record) for record in records[:100]], ScoreRecords(bundle_uri, threshold=-1e9))
    assert outcome.counters["num_inferences"] == outcome.counters["num_anomalies"] == 100
    assert outcome.batch_sizes.sum == 100


def test_each_score_is_in_a_distribution(records, expected, bundle_uri):
    elements = [dict(record) if i % 2 else as_json(record) for i, record in enumerate(records[:500])]
    found = run(elements, ScoreRecords(bundle_uri, max_batch_size=64)).distributions["anomaly_score_milli_nats"]
    scores = 1e3 * np.array([expected[record["id"]][0] for record in records[:500]], np.float64)
    assert found.count == 500
    assert found.sum == pytest.approx(scores.sum(), abs=500)
    assert (found.min, found.max) == pytest.approx((scores.min(), scores.max()), abs=5)
