import json

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from apache_beam.io.gcp.bigquery_tools import parse_table_schema_from_json
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms import trigger
from apache_beam.transforms.window import FixedWindows, Sessions, TimestampedValue
from kept import fits, run

from pipeline.scored import Batch
from pipeline.summaries import SUMMARY_SCHEMA, ScoreSummary, SummarizeScores, _SummaryCoder

NUM_ROWS = 1200


@pytest.fixture(scope="module")
def frame():
    """Scored records with a time each: two windows of 60 s, three carriers and none, two models."""
    rng = np.random.default_rng(0)
    score = rng.gumbel(5, 3, size=NUM_ROWS).round(1).astype(np.float32)  # with ties
    return pd.DataFrame(
        {
            "carrier": np.array(["AA", "BB", "CC", None], object)[rng.integers(0, 4, NUM_ROWS)],
            "anomaly_score": score,
            "anomaly_p_value": rng.uniform(size=NUM_ROWS).astype(np.float32),
            "is_anomaly": score > 10,
            "model_version": np.where(rng.uniform(size=NUM_ROWS) < 0.9, "first", "second"),
            "time": rng.integers(0, 120, NUM_ROWS),
        }
    )


def records_of(frame):
    return [
        TimestampedValue(record, time)
        for record, time in zip(frame.drop(columns="time").to_dict("records"), frame["time"].tolist(), strict=True)
    ]


def as_json(record):
    return json.dumps({**record, "anomaly_score": float(record["anomaly_score"])})


FORMS = {
    "dict": lambda record: record,
    "row": lambda record: beam.Row(**record),
    "bytes": lambda record: as_json(record).encode(),
    "text": as_json,
    "message": lambda record: PubsubMessage(as_json(record).encode(), {"a": "b"}),
}


def tables_of(frame):
    """Tables of at most 50 rows: the rows of one have one timestamp."""
    for time, rows in frame.groupby("time"):
        table = pa.Table.from_pandas(rows.drop(columns="time"), preserve_index=False)
        yield TimestampedValue(table, int(time))


def expected_of(frame, by):
    """What pandas and numpy say of the same rows."""
    summaries = {}
    for key, rows in frame.assign(window=frame["time"] // 60 * 60).groupby(["window", *by], dropna=False):
        score = rows["anomaly_score"].to_numpy().astype(float)
        key = (key[0], None if len(key) == 1 or pd.isna(key[1]) else key[1])
        summaries[key] = {
            "num_records": len(rows),
            "num_anomalies": rows["is_anomaly"].sum(),
            "anomaly_rate": rows["is_anomaly"].mean(),
            "mean_score": score.mean(),
            "min_score": score.min(),
            "max_score": score.max(),
            "quantiles": np.quantile(score, [0.1, 0.5, 0.99], method="inverted_cdf").tolist(),
            "models": rows["model_version"].value_counts().sort_index().to_dict(),
        }
    return summaries


def check(values, expected):
    got = {}
    for value in values:
        assert fits(value, SUMMARY_SCHEMA)
        assert json.loads(json.dumps(value)) == value
        second = (pd.Timestamp(value["window_start"]) - pd.Timestamp(0, tz="UTC")).total_seconds()
        assert pd.Timestamp(value["window_end"]) - pd.Timestamp(value["window_start"]) == pd.Timedelta("60s")
        assert (second, value["key"]) not in got
        got[second, value["key"]] = {
            **{name: value[name] for name in next(iter(expected.values()))},
            "quantiles": [item["score"] for item in value["quantiles"]],
            "models": {item["model_version"]: item["num_records"] for item in value["models"]},
        }
    assert set(got) == set(expected)
    for key, summary in expected.items():
        assert got[key].pop("mean_score") == pytest.approx(summary["mean_score"], rel=1e-9)
        assert got[key] == {name: item for name, item in summary.items() if name != "mean_score"}


SUMMARIZE = {"quantiles": (0.1, 0.5, 0.99)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_record_is_summed_up_as_pandas_does(form, frame):
    records = [TimestampedValue(FORMS[form](item.value), item.timestamp) for item in records_of(frame)]
    outcome = run(records, beam.WindowInto(FixedWindows(60)), SummarizeScores(key="carrier", **SUMMARIZE))
    check(outcome.values, expected_of(frame, ["carrier"]))


@pytest.mark.parametrize("key", [None, "carrier"])
def test_tables_are_summed_up_as_pandas_does(key, frame):
    outcome = run(list(tables_of(frame)), beam.WindowInto(FixedWindows(60)), SummarizeScores(key=key, **SUMMARIZE))
    check(outcome.values, expected_of(frame, [key] if key else []))


@pytest.mark.parametrize("as_table", [False, True])
def test_keyed_elements_are_summed_up_by_their_key(as_table, frame):
    frame = frame.assign(carrier=frame["time"] % 7)  # so that a table has one
    elements = list(tables_of(frame)) if as_table else records_of(frame)
    keyed = [TimestampedValue((int(item.timestamp) % 7, item.value), item.timestamp) for item in elements]
    outcome = run(keyed, beam.WindowInto(FixedWindows(60)), SummarizeScores(**SUMMARIZE))
    check(outcome.values, expected_of(frame.assign(carrier=frame["carrier"].astype(str)), ["carrier"]))


def test_a_prefix_is_read(frame):
    names = {name: f"x_{name}" for name in ("anomaly_score", "anomaly_p_value", "is_anomaly", "model_version")}
    renamed = frame.rename(columns=names)
    summarize = SummarizeScores(prefix="x_", **SUMMARIZE)
    outcome = run(records_of(renamed), beam.WindowInto(FixedWindows(60)), summarize)
    check(outcome.values, expected_of(frame, []))


def test_sessions_merge(frame):
    rows = frame[(frame["time"] < 20) | (frame["time"] >= 90)]
    values = run(records_of(rows), beam.WindowInto(Sessions(10)), SummarizeScores()).values
    counts = {value["window_start"]: value["num_records"] for value in values}
    assert counts == {
        "1970-01-01T00:00:00Z": (rows["time"] < 20).sum(),
        "1970-01-01T00:01:30Z": (rows["time"] >= 90).sum(),
    }


def test_triggers_and_lateness_are_the_inputs(frame):
    records = [item.value for item in records_of(frame)]

    def at(time, first, stop):
        return [TimestampedValue(record, time) for record in records[first:stop]]

    stream = (
        TestStream()
        .advance_watermark_to(0)
        .add_elements(at(5, 0, 10))
        .advance_processing_time(30)
        .add_elements(at(6, 10, 30))
        .advance_watermark_to(70)
        .add_elements(at(7, 30, 35))
        .advance_watermark_to(1000)
        .add_elements(at(8, 35, 40))  # beyond what is allowed
        .advance_watermark_to_infinity()
    )
    window = beam.WindowInto(
        FixedWindows(60),
        trigger=trigger.AfterWatermark(early=trigger.AfterProcessingTime(10), late=trigger.AfterCount(1)),
        accumulation_mode=trigger.AccumulationMode.ACCUMULATING,
        allowed_lateness=600,
    )
    values = run(stream, window, SummarizeScores()).values
    assert [(value["pane"], value["num_records"]) for value in values] == [("EARLY", 10), ("ON_TIME", 30), ("LATE", 35)]


# ---- parts ---------------------------------------------------------------------------------------


def summary_of(scores, parts):
    summary = ScoreSummary()
    for part in np.array_split(scores, parts):
        columns = pa.table(
            {
                "anomaly_score": part,
                "is_anomaly": part > 3,
                "model_version": np.full(len(part), "one"),
            }
        )
        other = ScoreSummary()
        other.add(Batch(columns, np.zeros(len(part), np.int64), columns))
        summary.merge(_SummaryCoder().decode(_SummaryCoder().encode(other)))
    return summary


def test_bundle_boundaries_change_no_more_than_the_sketchs_bound():
    scores = np.random.default_rng(1).normal(size=60_000).astype(np.float32)
    ranks = np.linspace(0.001, 0.999, 999)
    for parts in (1, 8, 100):
        summary = summary_of(scores, parts)
        got = summary.scores.quantiles.quantile(ranks)
        error = np.abs(np.searchsorted(np.sort(scores), got, side="right") / len(scores) - ranks).max()
        assert error <= (1 + np.log2(parts) + 1) / 4096
        assert summary.num_anomalies == (scores > 3).sum()
        assert summary.scores.mean == pytest.approx(scores.astype(float).mean(), abs=1e-12)
        assert summary.models == {"one": 60_000}
        assert len(_SummaryCoder().encode(summary)) < 12 * 2048 * (2 + np.log2(parts)) + 1000
    assert summary_of(scores[:2000], 1).state()[0] == pytest.approx(summary_of(scores[:2000], 7).state()[0], rel=1e-9)


def test_a_coded_summary_is_the_same(frame):
    summary = summary_of(frame["anomaly_score"].to_numpy(), 3)
    again = _SummaryCoder().decode(_SummaryCoder().encode(summary))
    assert again.state() == summary.state()
    assert beam.coders.registry.get_coder(ScoreSummary).encode(again) == _SummaryCoder().encode(summary)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "key", "message"),
    [
        ({"a": 1}, None, "anomaly_score: expected scored records, got missing_column"),
        (pa.table({"a": [1]}), None, "anomaly_score: expected such a column in every scored table, got none"),
        (b"no JSON", None, "record: expected scored records, got malformed_record"),
        (7, None, "expected scored records or tables, got elements of type int"),
        (
            {"anomaly_score": None, "is_anomaly": True, "model_version": "a"},
            None,
            "anomaly_score: expected it in every",
        ),
        (
            pa.table({"anomaly_score": [1.0], "is_anomaly": [True], "model_version": ["a"]}),
            "color",
            "color: named as the key, but the table has only anomaly_score",
        ),
    ],
)
def test_what_is_not_scored_is_refused(element, key, message):
    with pytest.raises(Exception, match=message):
        run([element], SummarizeScores(key=key))


def test_ranks_are_checked():
    with pytest.raises(ValueError, match=r"quantiles: expected ranks in \[0, 1\], got 50"):
        SummarizeScores(quantiles=[50])


def test_the_schema_is_one_of_bigquery():
    schema = parse_table_schema_from_json(json.dumps(SUMMARY_SCHEMA))
    assert [field.name for field in schema.fields][:4] == ["window_start", "window_end", "pane", "key"]
    assert {field.name for field in schema.fields if field.mode == "REPEATED"} == {"quantiles", "models"}
