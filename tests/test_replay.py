import datetime
import itertools

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from apache_beam.io.restriction_trackers import OffsetRange
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.sdf_utils import RestrictionTrackerView, ThreadsafeRestrictionTracker
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows

from pipeline import ReplayTable
from pipeline import replay as module
from pipeline.offsets import FOREVER
from pipeline.replay import read_from
from pipeline.sources import launch_schema, tables_from

START = 1_700_000_000


def events(num_rows, seed=0):
    """Numbered rows at random times within ten minutes, in the order of time."""
    seconds = np.sort(np.random.default_rng(seed).integers(0, 600, num_rows))
    return pa.table({"n": np.arange(num_rows), "at": pa.array(1_000_000 * (START + seconds), pa.timestamp("us"))})


@pytest.fixture
def table(tmp_path):
    """1,000 rows in two files of several row groups each, and where they are."""
    rows = events(1000)
    pq.write_table(rows.slice(0, 600), tmp_path / "a.parquet", row_group_size=130)
    pq.write_table(rows.slice(600), tmp_path / "b.parquet", row_group_size=130)
    return rows, f"{tmp_path}/*.parquet"


class Clock:
    """A clock that moves when someone sleeps."""

    def __init__(self):
        self.time = 5_000_000.0

    def sleep(self, secs):
        assert secs > 0
        self.time += secs


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "_now", lambda: clock.time)
    monkeypatch.setattr(module, "_sleep", clock.sleep)
    return clock


class Play:
    """The replaying step as a runner calls it, again and again until it ends."""

    def __init__(self, path, **arguments):
        transform = ReplayTable(path, **arguments)
        file_format = module.format_of(path)
        self.step = module._Replay(transform, file_format, launch_schema(path, file_format))
        self.element = self.step.launch(path)
        self.watermark = ManualWatermarkEstimator(None)
        self.num_legs = 0

    def leg(self, first_row):
        self.num_legs += 1
        tracker = ThreadsafeRestrictionTracker(self.step.create_tracker(OffsetRange(first_row, FOREVER)))
        return tracker, self.step.process(self.element, RestrictionTrackerView(tracker), self.watermark)

    def outputs(self, first_row=0):
        while first_row is not None:
            tracker, outputs = self.leg(first_row)
            yield from outputs
            tracker.check_done()
            rest = tracker.deferred_status()
            first_row = rest[0].start if rest else None


def numbers(outputs):
    return [int(output.value["n"]) for output in outputs]


# ---- through a runner --------------------------------------------------------------------------


def test_all_rows_come_once_with_their_event_times(table):
    rows, path = table
    expected = list(zip(range(1000), (rows["at"].cast("int64").to_numpy() / 1e6).tolist(), strict=True))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        played = pipeline | ReplayTable(path, rate=None, time_column="at")
        assert not played.is_bounded
        stamped = played | beam.Map(lambda row, at=beam.DoFn.TimestampParam: (row["n"], float(at)))
        assert_that(stamped, equal_to(expected))


def test_windows_of_a_replay_count_what_happened_in_them(table):
    rows, path = table
    starts, counts = np.unique(rows["at"].to_numpy().astype("datetime64[m]").astype(int) * 60, return_counts=True)
    expected = list(zip(starts.tolist(), counts.tolist(), strict=True))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        windowed = pipeline | ReplayTable(path, rate=1e6, time_column="at") | beam.WindowInto(FixedWindows(60))
        counts = windowed | beam.CombineGlobally(beam.combiners.CountCombineFn()).without_defaults()
        stamped = counts | beam.Map(lambda count, window=beam.DoFn.WindowParam: (int(window.start), count))
        assert_that(stamped, equal_to(expected))


def test_a_runner_without_splittable_dofns_is_named(table):
    _, path = table
    pipeline = beam.Pipeline(runner="BundleBasedDirectRunner")
    _ = pipeline | ReplayTable(path, rate=None)
    with pytest.raises(ValueError, match="expected a runner that has splittable DoFns, such as FnApiRunner, got one"):
        pipeline.run().wait_until_finish()


# ---- order, splits and formats -----------------------------------------------------------------


@pytest.mark.parametrize("first_row", [0, 1, 129, 130, 600, 731, 999, 1000, 5000])
def test_rows_follow_from_any_row_on(table, first_row):
    _, path = table
    assert numbers(Play(path, rate=None).outputs(first_row)) == list(range(first_row, 1000))


def test_a_replay_goes_on_where_a_runner_split_it(table):
    _, path = table
    play = Play(path, rate=None)
    tracker, outputs = play.leg(0)
    done = list(itertools.islice(outputs, 200))
    primary, residual = tracker.try_split(0)
    done += outputs
    tracker.check_done()
    assert primary.stop == residual.start == len(done) < 1000
    assert tracker.try_split(0.5) is None
    assert numbers([*done, *Play(path, rate=None).outputs(residual.start)]) == list(range(1000))


def test_row_groups_that_were_played_are_not_read_again(table, tmp_path):
    path = tmp_path / "a.parquet"
    first = pq.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    data[4 : 4 + first.total_byte_size // 2] = b"\xff" * (first.total_byte_size // 2)
    path.write_bytes(bytes(data))
    assert numbers(Play(str(path), rate=None).outputs(130)) == list(range(130, 600))
    with pytest.raises(ValueError, match=r"a.parquet: expected a parquet file without faults, got one with"):
        list(Play(str(path), rate=None).outputs(0))


def test_a_table_is_read_as_it_is_played(table, monkeypatch):
    _, path = table
    read = []
    monkeypatch.setattr(module, "tables_from", lambda *args: (read.append(t) or t for t in tables_from(*args)))
    outputs = Play(path, rate=None).outputs()
    next(outputs)
    assert [part.num_rows for part in read] == [130]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_text_files_are_played_too(tmp_path, suffix):
    rows = events(100)
    path = f"{tmp_path}/t.{suffix}"
    if suffix == "csv":
        pa_csv.write_csv(rows, path)
    else:
        rows.to_pandas().to_json(path, orient="records", lines=True, date_format="iso")
    outputs = list(Play(path, rate=None, time_column="at").outputs(40))
    assert numbers(outputs) == list(range(40, 100))
    expected = rows["at"].cast("int64").to_numpy()[40:]
    np.testing.assert_array_equal([output.timestamp.micros for output in outputs], expected)


def test_a_bad_line_ends_a_replay(tmp_path):
    (tmp_path / "t.csv").write_text("n,m\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match=r"t.csv: expected a csv file without faults, .*expected 2 fields, got 3"):
        list(Play(f"{tmp_path}/t.csv", rate=None).outputs())


# ---- pace --------------------------------------------------------------------------------------


def leaving(play, clock):
    """Each row's number and how many seconds after launch it left."""
    launched = clock.time
    return [(int(output.value["n"]), clock.time - launched) for output in play.outputs()]


@pytest.mark.parametrize("rate", [0.5, 40.0, 2000.0])
def test_rows_leave_at_their_rate_also_over_many_calls(tmp_path, clock, rate):
    num_rows = min(1000, max(20, int(rate * 15)))
    pq.write_table(events(num_rows), tmp_path / "t.parquet")
    play = Play(f"{tmp_path}/t.parquet", rate=rate)
    left = leaving(play, clock)
    assert [number for number, _ in left] == list(range(num_rows))
    late = np.array([at for _, at in left]) - np.arange(num_rows) / rate
    assert late.min() >= -1e-6
    assert late.max() <= module._TICK_SECS + 1e-6
    assert play.num_legs >= num_rows / rate / (module._BUNDLE_SECS + 1)


def test_rows_leave_by_their_event_times(tmp_path, clock):
    seconds = [0, 60, 3600, 30, 20, 7200]  # two wait for the one before them
    pq.write_table(
        pa.table({"n": range(6), "at": pa.array([START + s for s in seconds], pa.timestamp("s"))}),
        tmp_path / "t.parquet",
    )
    left = leaving(Play(f"{tmp_path}/t.parquet", time_column="at", speedup=60), clock)
    assert [number for number, _ in left] == list(range(6))
    assert [at for _, at in left] == pytest.approx([0, 1, 60, 60, 60, 120], abs=module._TICK_SECS)


def test_without_times_a_row_has_the_time_at_which_it_leaves(tmp_path, clock):
    pq.write_table(events(30), tmp_path / "t.parquet")
    for output in Play(f"{tmp_path}/t.parquet", rate=4.0).outputs():
        assert float(output.timestamp) == pytest.approx(clock.time, abs=1e-5)


def test_a_pause_is_made_up_for(tmp_path, clock):
    pq.write_table(events(100), tmp_path / "t.parquet")
    outputs = Play(f"{tmp_path}/t.parquet", rate=10.0).outputs()
    next(outputs)
    clock.time += 5
    late = [clock.time for _ in itertools.islice(outputs, 50)]
    assert late[-1] - late[0] <= 0.1


def test_calls_go_on_in_the_open_file(tmp_path, clock, monkeypatch):
    opened = []
    open_rows = module._Replay._open
    monkeypatch.setattr(module._Replay, "_open", lambda *args, **more: opened.append(args) or open_rows(*args, **more))
    pq.write_table(events(300), tmp_path / "t.parquet")
    play = Play(f"{tmp_path}/t.parquet", rate=10.0)
    opened.clear()
    assert numbers(play.outputs()) == list(range(300))
    assert play.num_legs > 3
    assert len(opened) == 1


# ---- event time --------------------------------------------------------------------------------


def test_the_watermark_is_behind_the_latest_time_and_never_goes_back(tmp_path, clock):
    rows = events(500, seed=1).take(np.random.default_rng(2).permutation(500))
    pq.write_table(rows, tmp_path / "t.parquet")
    play = Play(f"{tmp_path}/t.parquet", rate=100.0, time_column="at", max_delay_secs=7)
    latest, seen = 0, []
    for output in play.outputs():
        seen.append(play.watermark.current_watermark())
        assert seen[-1] is None or float(seen[-1]) <= latest - 7
        latest = max(latest, float(output.timestamp))
    known = [float(mark) for mark in seen if mark is not None]
    assert known == sorted(known)
    assert len(set(known)) > 3
    assert float(play.watermark.current_watermark()) == latest - 7


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ms", "Europe/Berlin"), pa.date32(), pa.large_string()]
)
def test_times_of_every_type_are_the_instants_that_pandas_reads(tmp_path, kind):
    times = pd.date_range("1969-12-30", periods=6, freq="D", tz="Europe/Berlin" if getattr(kind, "tz", None) else None)
    texts = pa.array(times.strftime("%Y-%m-%dT%H:%M:%S"))
    column = texts.cast(kind) if pa.types.is_large_string(kind) else pa.array(times).cast(kind)
    pq.write_table(pa.table({"n": range(6), "at": column}), tmp_path / "t.parquet")
    outputs = list(Play(f"{tmp_path}/t.parquet", rate=None, time_column="at").outputs())
    assert [output.timestamp.micros for output in outputs] == [int(time.timestamp() * 1e6) for time in times]


def test_a_row_without_a_time_has_that_of_the_row_before(tmp_path):
    times = pa.array([None, 5, None, 3, None], pa.timestamp("s"))
    pq.write_table(pa.table({"n": range(5), "at": times}), tmp_path / "t.parquet", row_group_size=2)
    outputs = list(Play(f"{tmp_path}/t.parquet", rate=None, time_column="at").outputs())
    assert [output.timestamp.micros // 1_000_000 for output in outputs] == [5, 5, 5, 3, 3]


# ---- arguments and URIs ------------------------------------------------------------------------


def test_a_uri_names_a_replay():
    replay = read_from("replay:gs://b/part-?.parquet?rate=2.5&time_column=at&max_delay_secs=3", speedup=2)
    assert replay == ReplayTable("gs://b/part-?.parquet", 2.5, "at", speedup=2, max_delay_secs=3.0)
    assert read_from("replay:x.csv?rate=none").rate is None
    assert read_from("replay:x.csv").rate == 1000


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("x.parquet", "expected a URI that begins with replay:, got x.parquet"),
        ("replay:?rate=1", "expected a place"),
        ("replay:x.parquet?rate=fast", "replay:x.parquet: rate: expected a number above 0, got 'fast'"),
        ("replay:x.parquet?rate=0", "rate: expected a number above 0, got '0'"),
        ("replay:x.parquet?rate=nan", "rate: expected a number above 0, got 'nan'"),
        ("replay:x.parquet?pace=1", "pace: expected one of file_format, max_delay_secs, rate, speedup, time_column"),
        ("replay:x.parquet?a.b=1", "a.b: expected one of file_format"),
        ("replay:x.parquet?speedup=2", "time_column: expected one with speedup"),
    ],
)
def test_a_wrong_uri_is_refused_with_the_part_that_is_wrong(uri, error):
    with pytest.raises(ValueError, match=error):
        read_from(uri)


def test_a_column_without_times_is_refused_at_launch(table):
    _, path = table
    with pytest.raises(ValueError, match="time_column: expected timestamps, dates or ISO 8601 text, got int64 in n"):
        _ = beam.Pipeline() | ReplayTable(path, time_column="n")
    with pytest.raises(ValueError, match=r"time_column: expected a column of .*, got when; it has n, at"):
        _ = beam.Pipeline() | ReplayTable(path, time_column="when")
    with pytest.raises(ValueError, match="rate: expected a number above 0 or None, got -1"):
        ReplayTable(path, rate=-1)


def test_text_that_is_no_time_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text("n,at\n1,2025-01-01\n2,soon\n")
    with pytest.raises(ValueError, match="at: expected ISO 8601 times, got other text in 1 rows"):
        list(Play(f"{tmp_path}/t.csv", rate=None, time_column="at").outputs())


def test_rows_keep_their_values(tmp_path):
    row = {"n": 1, "s": "x", "when": datetime.datetime(2025, 1, 2), "flag": None, "parts": [1, 2]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    [output] = Play(f"{tmp_path}/t.parquet", rate=None).outputs()
    assert output.value == row
