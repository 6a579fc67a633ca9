import json
from collections import Counter
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.typehints import typehints
from apache_beam.typehints.row_type import RowTypeConstraint
from record_runs import FORMS, ITEM, as_item, as_json, ident, run, score_of

from pipeline.score_records import ScoreRecords
from vae_model.pointer import Entry, Pointer

DURATIONS = pytest.mark.parametrize(
    "options", [{}, {"max_batch_duration_secs": 0.05}], ids=["in bundle", "across bundles"]
)


@pytest.fixture(scope="module")
def table(make_table):
    return make_table(600, 11)


@pytest.fixture(scope="module")
def records(table):
    return [{**record, "id": i} for i, record in enumerate(table.to_pylist())]


@pytest.fixture(scope="module")
def expected(table, first, second):
    """Each record's score and model version, by the first and the second model."""
    found = {}
    for name, model in {"a": first, "b": second}.items():
        scores = model.score(table)["anomaly_score"].to_pylist()
        found[name] = [(score, model.model_version) for score in scores]
    return found


@pytest.fixture(scope="module")
def tenants(first, second, first_uri, second_uri, tmp_path_factory) -> Path:
    """`a` and `b` have models of their own, behind pointers; `broken` has a pointer to nothing."""
    folder = tmp_path_factory.mktemp("tenants")
    for name, model, uri in [("a", first, first_uri), ("b", second, second_uri), ("broken", first, "nowhere")]:
        Pointer(str(folder / name / "current.json"), Entry(uri, model.model_version, "x")).write()
    return folder


def by_name(outcome):
    """Records that came out, scored or not: their id, and their score and version or why they have none."""
    found = []
    for value in outcome.values():
        record = value[1] if type(value) is tuple else value
        record = json.loads(record) if isinstance(record, bytes) else record
        found.append((record["id"], (record["anomaly_score"], record["model_version"])))
    for letter in outcome.reasons():
        found.append((json.loads(letter["payload"])["id"], letter["error_type"]))
    assert len(dict(found)) == len(found)
    return dict(found)


def same(found, wanted) -> bool:
    return found[1] == wanted[1] and abs(found[0] - wanted[0]) <= 1e-3 * (1 + abs(wanted[0]))


# ---- pairs ---------------------------------------------------------------------------------------


@DURATIONS
def test_pairs_are_scored_by_their_record_and_keep_their_key(options, records, first_uri, expected):
    keys = ["text", b"\xff\x00", 7, None, ("a", 1), 2.5]
    elements = [(keys[i % 6], make(records[i])) for i in range(120) for make in [list(FORMS.values())[i % len(FORMS)]]]
    outcome = run([*elements, as_json(records[120])], ScoreRecords(first_uri, **options))
    assert not outcome.letters
    alone = [value for value in outcome.values() if type(value) is bytes]
    assert list(map(ident, alone)) == [120]
    pairs = [value for value in outcome.values() if type(value) is tuple]
    assert Counter(keys[ident(record) % 6] == key for key, record in pairs) == {True: 120}
    for _, record in pairs:
        assert score_of(record) == pytest.approx(expected["a"][ident(record)][0], rel=1e-3, abs=1e-3)


def test_what_is_in_a_pair_may_leave_in_any_form(records, first_uri):
    message = (b"k", PubsubMessage(as_json(records[0]), {"a": "b"}))
    ((key, value),) = run([message], ScoreRecords(first_uri)).values()
    assert (key, type(value), value.attributes) == (b"k", PubsubMessage, {"a": "b"})
    ((key, value),) = run([message], ScoreRecords(first_uri, output="json", columns=["id"])).values()
    assert (key, next(iter(json.loads(value)))) == (b"k", "id")
    ((_, value),) = run([message], ScoreRecords(first_uri, output="anomaly_result")).values()
    assert value.example.id == 0


def test_a_letter_of_a_pair_tells_its_key(records, first_uri):
    bad = {**records[0], "length": "tall"}
    elements = [
        ("k", bad),
        (7, bad),
        (b"k", as_json(bad)),
        (b"\xff", bad),
        (("a", 1), PubsubMessage(as_json(bad), {"a": "b"})),
        ("k", None),
        ("k", records[0], 1),
        ("k", ("j", records[0])),
    ]
    outcome = run(elements, ScoreRecords(first_uri))
    assert not outcome.scored
    letters = outcome.reasons()
    assert [dict(letter["attributes"] or ()) for letter in letters] == [
        {"key": "k"},
        {"key": "7"},
        {"key": "k"},
        {"key": "/w=="},
        {"a": "b", "key": '["a", 1]'},
        {"key": "k"},
        {},
        {"key": "k"},
    ]
    assert [letter["error_type"] for letter in letters] == ["wrong_type"] * 5 + ["not_a_record"] * 3
    assert all(json.loads(letter["payload"])["length"] == "tall" for letter in letters[:5])
    assert letters[6]["payload"].startswith('["k", {')


def test_pairs_of_a_known_type_become_pairs_of_a_known_type(records, first_uri):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    items = pipeline | "Items" >> beam.Create([("k", as_item({**records[0], "id": "0"}))]).with_output_types(
        tuple[str, ITEM]
    )
    scored = (items | "Score items" >> ScoreRecords(first_uri, columns=["id"])).scored.element_type
    key, row = scored.tuple_types
    assert key is str
    assert isinstance(row, RowTypeConstraint)
    assert [name for name, _ in row._fields][:2] == ["id", "anomaly_score"]
    texts = pipeline | "Texts" >> beam.Create([(b"k", b"{}")]).with_output_types(tuple[bytes, bytes])
    assert (texts | ScoreRecords(first_uri)).scored.element_type == typehints.Tuple[bytes, bytes]


# ---- models by key -------------------------------------------------------------------------------

PLACES = ["a", "b", "new", "broken", "../a", "", None, 7, True, "b"]  # of record i, by the last digit of i
WITHOUT_DEFAULT = {
    "new": "unknown_model",
    "broken": "model_unavailable",
    "../a": "invalid_key",
    "": "invalid_key",
    None: "invalid_key",
    7: "unknown_model",
    True: "unknown_model",
}


def check(found, expected, num_records, default=None):
    for i in range(num_records):
        key = PLACES[i % 10]
        if key in ("a", "b"):
            assert same(found[i], expected[key][i])
        elif default and WITHOUT_DEFAULT[key] == "unknown_model":
            assert same(found[i], expected[default][i])
        else:
            assert found[i] == WITHOUT_DEFAULT[key]
    assert len(found) == num_records


@DURATIONS
def test_each_pair_is_scored_by_the_model_of_its_key(options, records, tenants, expected):
    elements = [(PLACES[i % 10], as_json(record) if i % 3 else record) for i, record in enumerate(records[:300])]
    outcome = run(elements, ScoreRecords(models_by_key=f"{tenants}/{{key}}/current.json", **options))
    check(by_name(outcome), expected, 300)
    letters = {letter["error_type"]: letter for letter in outcome.reasons()}
    assert letters["unknown_model"]["error"].startswith("key: no model for ")
    assert letters["unknown_model"]["model_version"] is None
    assert "its model cannot be used" in letters["model_unavailable"]["error"]


@pytest.mark.parametrize("make", [dict, as_json, lambda record: (b"k", as_json(record))], ids=["dict", "json", "pair"])
def test_each_record_is_scored_by_the_model_of_its_column(make, records, tenants, expected):
    elements = [make({**record, "site": PLACES[i % 10]}) for i, record in enumerate(records[:300])]
    models = {key: f"{tenants}/{key}/current.json" for key in ("a", "b", "broken")} | {"../a": f"{tenants}/../a/b"}
    score = ScoreRecords(models_by_key=f"{tenants}/{{key}}/current.json", default_model=models["b"], key="site")
    outcome = run(elements, score)
    check(by_name(outcome), expected, 300, default="b")
    assert {letter["column"] for letter in outcome.reasons()} == {"site"}
    gone = run([make({"id": 0, "length": 1.0}), make({**records[1], "site": ["a"]})], score)
    assert sorted(by_name(gone).items()) == [(0, "invalid_key"), (1, "wrong_type")]


def test_keys_may_be_bytes_and_numbers(records, first_uri, second_uri, expected):
    models = {17: first_uri, b"b": second_uri}
    keys = [b"17", 17, "17", np.int64(17), b"b", "b"]
    elements = [(key, records[i]) for i, key in enumerate(keys)]
    outcome = run([*elements, (b"\xff", records[6])], ScoreRecords(models_by_key=models))
    found = by_name(outcome)
    assert found.pop(6) == "invalid_key"
    assert all(same(found[i], expected["a" if i < 4 else "b"][i]) for i in range(6))


def test_a_model_scores_all_its_records_of_a_batch_at_once(records, tenants, expected):
    elements = [(("a", "b", f"new{i}", f"newer{i}")[i % 4], records[i]) for i in range(80)]
    default = f"{tenants}/a/current.json"
    score = ScoreRecords(models_by_key=f"{tenants}/{{key}}/current.json", default_model=default, max_model_bytes=1)
    outcome = run(elements, score)
    assert (outcome.batch_sizes.count, outcome.batch_sizes.sum) == (3, 80)
    assert [record["id"] for _, record in outcome.values()] == list(range(80))
    found = by_name(outcome)
    assert all(same(found[i], expected["b" if i % 4 == 1 else "a"][i]) for i in range(80))


def test_letters_name_the_model_that_could_not_score(records, tenants, second):
    bad = {**records[0], "length": "tall"}
    outcome = run([("b", bad), ("new", bad)], ScoreRecords(models_by_key=f"{tenants}/{{key}}/current.json"))
    versions = {letter["error_type"]: letter["model_version"] for letter in outcome.reasons()}
    assert versions == {"wrong_type": second.model_version, "unknown_model": None}


def test_keyed_records_of_a_stream_keep_their_windows(records, tenants):
    stream = TestStream().advance_watermark_to(0)
    for start in range(0, 60, 6):
        chunk = [TimestampedValue((PLACES[i % 10], records[i]), i) for i in range(start, start + 6)]
        stream = stream.add_elements(chunk)
    outcome = run(
        stream.advance_watermark_to_infinity(),
        ScoreRecords(models_by_key=f"{tenants}/{{key}}/current.json", max_batch_duration_secs=3600),
        runner="BundleBasedDirectRunner",
        prepare=beam.WindowInto(FixedWindows(10)),
        streaming=True,
    )
    given, scored = (
        {item.value[1]["id"]: (item.timestamp, *item.windows) for item in items}
        for items in (outcome.given, outcome.scored)
    )
    lettered = {
        json.loads(letter["payload"])["id"]: (item.timestamp, *item.windows)
        for item in outcome.letters
        for letter in item.value.to_pylist()
    }
    assert scored | lettered == given
    assert scored.keys() == {i for i in range(60) if PLACES[i % 10] in ("a", "b")}


# ---- at launch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "bundle: expected the URI of one, or else models_by_key"),
        ({"bundle": "x", "models_by_key": {}}, "bundle: expected the URI of one"),
        ({"bundle": "x", "key": "site"}, "default_model, key: expected with models_by_key"),
        ({"bundle": "x", "default_model": "y"}, "default_model, key: expected with models_by_key"),
        ({"models_by_key": {"a": "x"}, "threshold": 1.0}, "threshold: expected None with models_by_key"),
        ({"models_by_key": "gs://models"}, r"models_by_key: expected a URI with \{key\} in it"),
        ({"models_by_key": {7: "x", "7": "y"}}, "models_by_key: expected keys that differ as text"),
        ({"models_by_key": {None: "x"}}, "models_by_key: expected keys of text or whole numbers, got NoneType"),
        ({"models_by_key": {"": "x"}}, "models_by_key: expected keys of at least one character"),
        ({"models_by_key": {}, "max_model_bytes": 0}, "max_bytes: expected a number > 0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScoreRecords(**options)


def test_the_default_model_is_checked_when_the_pipeline_is_built(first_uri, tmp_path):
    rows = beam.Pipeline(runner="FnApiRunner") | beam.Create([beam.Row(length=1.0)])
    with pytest.raises(ValueError, match="no bundle there"):
        rows | "No default" >> ScoreRecords(models_by_key={}, default_model=str(tmp_path))
    with pytest.raises(ValueError, match="count: expected such a column, got none"):
        rows | "Default" >> ScoreRecords(models_by_key={}, default_model=first_uri)
    skipped = (rows | ScoreRecords(models_by_key={}, key="length")).scored.element_type
    assert [name for name, _ in skipped._fields][:2] == ["length", "anomaly_score"]
