import time
import uuid

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms import trigger
from apache_beam.transforms.window import FixedWindows, GlobalWindows, Sessions, SlidingWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import create as windowed_value
from record_runs import KEPT, AtItsTime, Keep, ident, run, same_places

from pipeline.score_records import ScoreRecords

NUM_RECORDS = 10_000
CHUNK = 500  # records, a session of their own
WINDOWS = {"global": GlobalWindows(), "fixed": FixedWindows(60), "sessions": Sessions(20)}
DURATIONS = pytest.mark.parametrize(
    "options", [{}, {"max_batch_duration_secs": 5.0}], ids=["in bundle", "across bundles"]
)
EARLY, ON_TIME, LATE = 0, 1, 2


def seconds(i: int) -> float:
    """When record i happened: no two at once, and a pause after each 500."""
    return i % CHUNK * 0.125 + i // CHUNK * 180


@pytest.fixture(scope="module")
def records(make_table):
    rows = make_table(CHUNK, 5).select(["length", "count", "color"]).to_pylist()
    return [{**rows[i % CHUNK], "id": i} for i in range(NUM_RECORDS)]


class Ungroup(beam.DoFn):
    """Grouped records, each at its own time again, in the group's window and pane."""

    def process(self, pair, item=beam.DoFn.WindowedValueParam):
        for record in pair[1]:
            yield windowed_value(record, Timestamp(seconds(record["id"])).micros, item.windows, item.pane_info)


def merged(windows, **triggering):
    """Windows as they are after a grouping, where sessions have become what they are."""
    return beam.WindowInto(windows, **triggering) | beam.WithKeys(0) | beam.GroupByKey() | beam.ParDo(Ungroup())


def check(outcome, num_records=NUM_RECORDS):
    """All came out, once, where they went in."""
    assert not outcome.letters
    assert len({item.timestamp for item in outcome.given}) == num_records
    assert sorted(map(ident, outcome.values())) == list(range(num_records))
    same_places(outcome)


# ---- FnApiRunner ---------------------------------------------------------------------------------


@DURATIONS
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_ten_thousand_elements_keep_their_timestamps_and_windows(windows, options, records, first_uri):
    elements = [(record, seconds(record["id"])) for record in records]
    outcome = run(
        elements,
        ScoreRecords(first_uri, columns=["id"], max_batch_size=999, **options),
        prepare=beam.ParDo(AtItsTime()) | merged(windows),
    )
    check(outcome)
    if isinstance(windows, Sessions):
        assert len({str(item.windows) for item in outcome.scored}) == NUM_RECORDS // CHUNK
    if not options or isinstance(windows, GlobalWindows):
        assert outcome.batch_sizes.max == 999


@DURATIONS
def test_elements_in_several_windows_stay_in_them(options, records, first_uri):
    elements = [(record, seconds(record["id"])) for record in records[:300]]
    prepare = beam.ParDo(AtItsTime()) | beam.WindowInto(SlidingWindows(60, 20))
    outcome = run(elements, ScoreRecords(first_uri, columns=["id"], **options), prepare=prepare)
    if not options:
        check(outcome, 300)
    # With a duration, state is kept by window: one output in each.
    given, scored = (
        sorted((item.value["id"], item.timestamp, str(window)) for item in items for window in item.windows)
        for items in (outcome.given, outcome.scored)
    )
    assert given == scored


# ---- BundleBasedDirectRunner ---------------------------------------------------------------------


@DURATIONS
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_ten_thousand_elements_of_a_stream_keep_their_panes_too(windows, options, records, first_uri):
    num_records = 2000 if options and not isinstance(windows, FixedWindows) else NUM_RECORDS  # to save time
    stream = TestStream().advance_watermark_to(0).advance_processing_time(int(time.time()))
    for start in range(0, num_records, CHUNK):
        timed = [TimestampedValue(record, seconds(record["id"])) for record in records[start : start + CHUNK]]
        late = timed[::50]
        early = [item for i, item in enumerate(timed[:400]) if i % 50]
        on_time = [item for i, item in enumerate(timed[400:]) if i % 50]
        stream = stream.add_elements(early).advance_processing_time(10).add_elements(on_time)
        stream = stream.advance_watermark_to(seconds(start + CHUNK) - 1).add_elements(late).advance_processing_time(10)
    prepare = merged(
        windows,
        trigger=trigger.AfterWatermark(early=trigger.AfterCount(200), late=trigger.AfterCount(1)),
        accumulation_mode=trigger.AccumulationMode.DISCARDING,
        allowed_lateness=3600,
    )
    outcome = run(
        stream.advance_watermark_to_infinity(),
        ScoreRecords(first_uri, columns=["id"], **options),
        runner="BundleBasedDirectRunner",
        prepare=prepare,
        streaming=True,
    )
    check(outcome, num_records)
    found = {item.pane_info.timing for item in outcome.scored}
    assert found == ({EARLY, ON_TIME} if isinstance(windows, GlobalWindows) else {EARLY, ON_TIME, LATE})


# ---- what was on time ----------------------------------------------------------------------------


@DURATIONS
@pytest.mark.parametrize("runner", ["FnApiRunner", "BundleBasedDirectRunner"])
def test_what_was_on_time_is_not_late_after_a_batch(runner, options, records, first_uri):
    def timed(start, stop):
        return [TimestampedValue(record, seconds(record["id"])) for record in records[start:stop]]

    if runner == "FnApiRunner":
        source = beam.Create([(record, seconds(record["id"])) for record in records[:1000]]) | beam.ParDo(AtItsTime())
    else:
        source = TestStream().advance_watermark_to(0).advance_processing_time(int(time.time()))
        for start in range(0, 1000, 100):
            source = source.add_elements(timed(start, start + 100))
            # This runner does not hold the watermark for timers (Beam's own comment says so): the clock moves first.
            source = source.advance_processing_time(6).advance_watermark_to(seconds(start + 99))
        source = source.advance_watermark_to_infinity()
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions([], streaming=runner != "FnApiRunner"))
    key = uuid.uuid4().hex
    KEPT[key] = []
    rows = pipeline | source | beam.WindowInto(FixedWindows(20))
    scored, _ = rows | ScoreRecords(first_uri, **options)
    grouped = scored | beam.Map(lambda record: (0, record["id"])) | beam.GroupByKey()  # drops what is late
    grouped | beam.ParDo(Keep(key))
    pipeline.run().wait_until_finish()
    found = {int(item.windows[0].start): sorted(item.value[1]) for item in KEPT.pop(key)}
    wanted = {}
    for i in range(1000):
        wanted.setdefault(int(seconds(i) // 20 * 20), []).append(i)
    assert found == wanted


@pytest.mark.parametrize("windows", [FixedWindows(60), Sessions(20)], ids=["fixed", "sessions"])
def test_nothing_is_stuck_when_its_window_ends_first(windows, records, first_uri):
    stream = TestStream().advance_watermark_to(0)
    for start in range(0, 300, 50):
        timed = [TimestampedValue(record, seconds(record["id"])) for record in records[start : start + 50]]
        stream = stream.add_elements(timed).advance_watermark_to(seconds(start + 49))
    # Long before the duration is over; what follows the window's end is only there to be seen after it.
    stream = stream.advance_watermark_to(seconds(299) + 100).add_elements([TimestampedValue(records[300], 10**6)])
    outcome = run(
        stream.advance_watermark_to_infinity(),
        ScoreRecords(first_uri, columns=["id"], max_batch_duration_secs=3600),
        runner="BundleBasedDirectRunner",
        prepare=beam.WindowInto(windows, allowed_lateness=3600),
        streaming=True,
    )
    assert [value["id"] for value in outcome.values()][-1] == 300
    assert sorted(map(ident, outcome.values())) == list(range(301))
    same_places(outcome)
