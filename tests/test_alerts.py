import itertools
import json
import logging

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept import fits, run
from scipy.stats import false_discovery_control

from pipeline.alerts import (
    ALERT_SCHEMA,
    DEAD_LETTER_ALERT_SCHEMA,
    DISCOVERY_SCHEMA,
    ONLINE_DISCOVERY_SCHEMA,
    AlertOnAnomalies,
    AlertOnDeadLetters,
    ControlFalseDiscoveries,
    SelectDiscoveries,
)
from pipeline.records import file_letter, line_letters
from pipeline.score_records import ScoreRecords
from vae_model.multiple_testing import Lord, Saffron

REASON = {
    **dict.fromkeys(("feature", "direction", "value", "expected", "low", "high"), "x"),
    **dict.fromkeys(("nats", "excess_nats", "p_value"), 1.5),
}


def record(time, score=9.0, p=0.001, is_anomaly=True, **more):
    scores = {"anomaly_score": score, "anomaly_p_value": p, "is_anomaly": is_anomaly, "model_version": "abc"}
    return TimestampedValue({**more, **scores}, time)


def seconds(text):
    return float(np.datetime64(text.removesuffix("Z"), "us").astype(int)) / 1e6


def stream_of(*steps):
    """A TestStream: a list of elements is one Beam bundle, a number is the watermark."""
    stream = TestStream().advance_watermark_to(0)
    for step in steps:
        stream = stream.add_elements(step) if isinstance(step, list) else stream.advance_watermark_to(step)
    return stream.advance_watermark_to_infinity()


def brief(values):
    return [
        (
            value["key"],
            value["kind"],
            value["num_anomalies"],
            value["max_score"],
            seconds(value["first_event_time"]),
            seconds(value["last_event_time"]),
        )
        for value in values
    ]


# ---- one alert per burst -------------------------------------------------------------------------


def test_a_burst_is_one_alert_and_one_follow_up():
    steps = [
        [record(1, is_anomaly=False), record(10, 9, id="a", anomaly_reasons=[REASON])],
        11,
        [record(12, 20, id="b", anomaly_reasons=[REASON, REASON])],
        [record(15, 12, id="c")],
        70,
        [record(75, 8, id="d")],
    ]
    outcome = run(stream_of(*steps), AlertOnAnomalies(cool_down_secs=60))
    assert brief(outcome.values) == [
        (None, "first", 1, 9, 10, 10),
        (None, "follow_up", 2, 20, 12, 15),
        (None, "first", 1, 8, 75, 75),
    ]
    first, follow_up, _ = outcome.values
    assert [len(value["reasons"]) for value in outcome.values] == [1, 2, 0]
    assert json.loads(follow_up["record"]) == steps[2][0].value
    assert first["reasons"] == [REASON]
    assert all(fits(value, ALERT_SCHEMA) and json.loads(json.dumps(value)) == value for value in outcome.values)
    assert [float(item.timestamp) for item in outcome.items] == [10, 70, 75]


def test_each_key_has_its_own_cool_down():
    steps = [
        [record(10, key="a"), record(11, key="b")],
        [record(12, key="a"), record(13, key="b"), record(14, key="b")],
    ]
    values = run(stream_of(*steps), AlertOnAnomalies(cool_down_secs=60, key="key")).values
    assert sorted(brief(values)) == [
        ("a", "first", 1, 9, 10, 10),
        ("a", "follow_up", 1, 9, 12, 12),
        ("b", "first", 1, 9, 11, 11),
        ("b", "follow_up", 2, 9, 13, 14),
    ]


def test_windows_do_not_cut_a_cool_down():
    steps = [[record(55)], 59, [record(65)]]
    values = run(stream_of(*steps), beam.WindowInto(FixedWindows(60)), AlertOnAnomalies(cool_down_secs=60)).values
    assert [value["kind"] for value in values] == ["first", "follow_up"]


def test_an_anomaly_beyond_an_open_cool_down_is_a_first_one_before_that_ends():
    values = run(stream_of([record(10)], [record(100)], [record(95)], [record(20)]), AlertOnAnomalies(60)).values
    assert brief(values) == [
        (None, "first", 1, 9, 10, 10),
        (None, "first", 1, 9, 100, 100),
        (None, "follow_up", 1, 9, 20, 20),
        (None, "follow_up", 1, 9, 95, 95),
    ]


def test_a_flood_of_late_anomalies_has_two_alerts_per_cool_down_at_most():
    late = [[record(10 + i)] for i in range(25)]
    values = run(stream_of(1000, *late), AlertOnAnomalies(300)).values
    assert sum(value["num_anomalies"] for value in values) == 25
    assert len(values) <= 2 * (1000 / 300 + 1)
    forgetful = run(stream_of(1000, *late[:6]), AlertOnAnomalies(300, allowed_lateness_secs=0)).values
    assert [value["kind"] for value in forgetful] == ["first"] * 6


@pytest.mark.parametrize("as_tables", [False, True])
def test_a_batch_job_has_the_alerts_of_a_stream(as_tables):
    rng = np.random.default_rng(0)
    times = np.unique(rng.integers(1, 3600, 40)).tolist()
    if as_tables:  # with fractions that timers cannot keep
        times = [time + 0.123457 for time in times]
    rows = [record(time, float(time % 97), is_anomaly=bool(rng.uniform() < 0.7)) for time in times]
    elements = rows
    if as_tables:
        elements = [TimestampedValue(pa.Table.from_pylist([row.value]), row.timestamp) for row in rows]
    batch = run(elements, AlertOnAnomalies(300)).values
    if not as_tables:
        steps = itertools.chain.from_iterable(zip([[row] for row in rows], times, strict=True))
        assert sorted(brief(batch)) == sorted(brief(run(stream_of(*steps), AlertOnAnomalies(300)).values))
    anomalies = np.array([time for time, row in zip(times, rows, strict=True) if row.value["is_anomaly"]])
    firsts = [anomalies[0]]
    while (anomalies >= firsts[-1] + 300).any():
        firsts.append(anomalies[anomalies >= firsts[-1] + 300][0])
    assert sorted(item[4] for item in brief(batch) if item[1] == "first") == pytest.approx(firsts, abs=1e-5)
    assert sum(item[2] for item in brief(batch)) == len(anomalies)


STEPS = st.lists(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300)), min_size=1, max_size=4) | st.integers(0, 300),
    max_size=12,
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_every_anomaly_is_in_one_alert_whatever_the_order(steps):
    count = itertools.count()
    marks, stream = 0, []
    for step in steps:
        if isinstance(step, list):
            stream.append([record(time, next(count), key=key) for key, time in step])
        elif step > marks:
            marks = step
            stream.append(step)
    given_items = [item for step in stream if isinstance(step, list) for item in step]
    values = run(stream_of(*stream), AlertOnAnomalies(50, key="key")).values
    for key in "ab":
        own = [value for value in values if value["key"] == key]
        scores = [item.value["anomaly_score"] for item in given_items if item.value["key"] == key]
        assert sum(value["num_anomalies"] for value in own) == len(scores)
        assert max([value["max_score"] for value in own], default=None) == max(scores, default=None)
        # A first one, at least 50 s apart wherever it may be, and a follow-up for each.
        assert len([value for value in own if value["kind"] == "first"]) <= 350 / 50
        assert len(own) <= 2 * 350 / 50


def test_what_leaves_a_global_window_can_be_alerted():
    group = beam.GroupBy(lambda item: 0) | "Ungroup" >> beam.FlatMap(lambda item: item[1])
    values = run([record(5).value, record(6).value], group, AlertOnAnomalies(60)).values
    assert [(value["kind"], value["num_anomalies"], value["first_event_time"]) for value in values] == [
        ("first", 1, None),
        ("follow_up", 1, None),
    ]


def test_a_cool_down_is_checked():
    with pytest.raises(ValueError, match="cool_down_secs: expected seconds > 0, got 0"):
        AlertOnAnomalies(0)
    with pytest.raises(ValueError, match="allowed_lateness_secs: expected seconds >= 0, got -1"):
        AlertOnAnomalies(1, allowed_lateness_secs=-1)


# ---- false discovery rate ------------------------------------------------------------------------


def p_records(p, times, **more):
    return [
        record(time, -np.log10(value), float(np.float32(value)), place=i, **{k: v[i] for k, v in more.items()})
        for i, (value, time) in enumerate(zip(p, times, strict=True))
    ]


@pytest.mark.parametrize("floor", [0.0, 0.002])
def test_discoveries_are_scipys_by_window_and_key(floor):
    rng = np.random.default_rng(1)
    n = 2000
    p = np.where(rng.uniform(size=n) < 0.1, rng.uniform(size=n) * 1e-3, rng.uniform(size=n)).astype(np.float32)
    times, keys = rng.integers(0, 120, n), rng.choice(["a", "b"], n)
    select = SelectDiscoveries(0.1, key="key", min_p_value=floor)
    values = run(p_records(p, times.tolist(), key=keys.tolist()), beam.WindowInto(FixedWindows(60)), select).values
    expected = {}
    for window, key in itertools.product((0, 1), "ab"):
        rows = np.flatnonzero((times // 60 == window) & (keys == key))
        adjusted = false_discovery_control(np.maximum(p[rows].astype(float), floor))
        expected.update(zip(rows[adjusted <= 0.1].tolist(), adjusted[adjusted <= 0.1], strict=True))
    assert len(expected) > 50
    got = {json.loads(value["record"])["place"]: value["adjusted_p_value"] for value in values}
    assert got == pytest.approx(expected)
    for value in values:
        assert fits(value, DISCOVERY_SCHEMA)
        place = json.loads(value["record"])["place"]
        assert seconds(value["event_time"]) == times[place]
        same = (times // 60 == times[place] // 60) & (keys == keys[place])
        assert value["num_tests"] == same.sum()
        assert value["num_discoveries"] == same[list(expected)].sum()


def test_a_window_is_decided_once_when_it_closes():
    steps = [p_records([0.001, 0.4], [1, 2]), 30, p_records([0.002, 0.5], [3, 4]), 60, p_records([1e-6], [5])]
    values = run(stream_of(*steps), beam.WindowInto(FixedWindows(60)), SelectDiscoveries(0.1)).values
    assert [(value["num_tests"], value["p_value"]) for value in values] == [
        (4, pytest.approx(0.001)),
        (4, pytest.approx(0.002)),
    ]


def test_a_window_that_never_closes_is_refused():
    with pytest.raises(ValueError, match="SelectDiscoveries: expected windows that end, got an unbounded input"):
        run(stream_of([record(1)]), SelectDiscoveries(0.1))


@pytest.mark.parametrize(("name", "kind"), [("saffron", Saffron), ("lord", Lord)])
def test_online_discoveries_are_those_of_the_procedure_by_key(name, kind):
    rng = np.random.default_rng(2)
    p = np.where(rng.uniform(size=240) < 0.3, 1e-6, rng.uniform(size=240)).astype(np.float32)
    keys = rng.choice(["a", "b"], 240)
    records = p_records(p, range(240), key=keys.tolist())
    steps = [records[start : start + 60] for start in range(0, 240, 60)]
    outcome = run(stream_of(*steps), ControlFalseDiscoveries(0.1, name, key="key"))
    expected = []
    for key in "ab":
        rows = np.flatnonzero(keys == key)
        expected += rows[kind(0.1).test(p[rows].astype(float))].tolist()
    assert len(expected) > 40
    assert sorted(seconds(value["event_time"]) for value in outcome.values) == sorted(expected)
    assert sorted(float(item.timestamp) for item in outcome.items) == sorted(expected)
    for value in outcome.values:
        assert fits(value, ONLINE_DISCOVERY_SCHEMA)
        time = int(seconds(value["event_time"]))
        assert value["num_tests"] == (keys[: time + 1] == value["key"]).sum()
        assert value["num_discoveries"] == sum(keys[row] == value["key"] and row <= time for row in expected)
        assert (value["record"] is None) == (value["p_value"] > 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectDiscoveries(1.5), r"q: expected a number in \(0, 1\), got 1.5"),
        (lambda: ControlFalseDiscoveries(0), r"alpha: expected a number in \(0, 1\), got 0"),
        (lambda: ControlFalseDiscoveries(0.1, "bonferroni"), "procedure: expected one of lord, saffron"),
        (lambda: SelectDiscoveries(0.1, min_p_value=1), r"min_p_value: expected a number in \[0, 1\), got 1"),
        (lambda: ControlFalseDiscoveries(0.1, min_p_value=-0.1), r"min_p_value: expected a number in \[0, 1\)"),
        (lambda: AlertOnDeadLetters(1.5), r"max_fraction: expected a number in \[0, 1\], got 1.5"),
        (lambda: AlertOnDeadLetters(0.1, 0), "window_secs: expected seconds > 0, got 0"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- dead letters --------------------------------------------------------------------------------


class _Split(beam.PTransform):
    """What a scoring step gives: letters are the tables with a payload."""

    def expand(self, elements):
        is_letters = lambda item: isinstance(item, pa.Table) and "payload" in item.column_names  # noqa: E731
        scored = elements | "Scored" >> beam.Filter(lambda item: not is_letters(item))
        return scored, elements | "Letters" >> beam.Filter(is_letters)


def letters(number, time, stage="score"):
    lines = line_letters(["secret"] * number, ["e"] * number, payload_format="json", source=None, stage=stage)
    return TimestampedValue(lines, time)


@pytest.mark.parametrize("as_tables", [False, True])
def test_windows_with_too_many_dead_letters_are_told(as_tables, caplog):
    scored = [record(time) for time in (1, 2, 3, 61, 62, 63, 64, 121)]
    if as_tables:
        scored = [TimestampedValue(pa.Table.from_pylist([item.value]), item.timestamp) for item in scored]
    unreadable = [TimestampedValue(file_letter("f", "read", "e", number), 250) for number in (None, 7)]
    elements = [*scored, letters(2, 30), letters(1, 59), letters(1, 65), *unreadable]
    with caplog.at_level(logging.WARNING, "pipeline.alerts"):
        outcome = run(elements, _Split(), AlertOnDeadLetters(0.2))
    got = [(value["window_start"], value["num_scored"], value["num_dead_letters"]) for value in outcome.values]
    assert sorted(got) == [("1970-01-01T00:00:00Z", 3, 3), ("1970-01-01T00:04:00Z", 0, 8)]  # 1 of 5 is accepted
    assert sorted(value["fraction"] for value in outcome.values) == [0.5, 1]
    assert all(fits(value, DEAD_LETTER_ALERT_SCHEMA) for value in outcome.values)
    assert outcome.counters["dead_letter_alerts"] == 2
    assert len(caplog.messages) == 2
    assert "3 beside 3 scored records from 1970-01-01T00:00:00Z" in caplog.text
    assert "secret" not in caplog.text


def test_what_is_refused_where_it_is_written_is_not_scored_as_well():
    elements = [*(record(time) for time in range(10)), letters(6, 2, "write"), letters(2, 3)]
    [value] = run(elements, _Split(), AlertOnDeadLetters(0.6)).values
    assert (value["num_scored"], value["num_dead_letters"], value["fraction"]) == (4, 8, 8 / 12)


def test_records_without_times_are_one_window():
    outcome = run([record(0).value, letters(1, 0).value], _Split(), AlertOnDeadLetters(0.2))
    assert [(value["num_scored"], value["num_dead_letters"]) for value in outcome.values] == [(1, 1)]


def test_dead_letters_of_a_stream_are_told_when_their_window_closes():
    steps = [[record(1), letters(1, 2)], 70, [record(71)], [letters(1, 3)]]
    outcome = run(stream_of(*steps), _Split(), AlertOnDeadLetters(0.2))
    assert [(value["num_scored"], value["num_dead_letters"]) for value in outcome.values] == [(1, 1)]
    assert outcome.counters["dead_letter_alerts"] == 1


def test_what_a_scoring_step_gives_is_taken_as_it_is(first_uri, make_table):
    good = make_table(30, 30).select(["length", "count", "color"]).to_pylist()
    bad = [{**record, "length": "long"} for record in good[:10]]
    elements = [TimestampedValue(record, 1) for record in good + bad]
    outcome = run(elements, ScoreRecords(first_uri), AlertOnDeadLetters(0.2, window_secs=10))
    assert [(value["num_scored"], value["num_dead_letters"]) for value in outcome.values] == [(30, 10)]
    assert outcome.counters["dead_letter_alerts"] == 1
    assert outcome.counters["num_dead_letters"] == 10
