import collections
import datetime as dt
import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from vae_model.statistics import (
    CategoricalStatistics,
    NumericStatistics,
    QuantileSketch,
    TableStatistics,
    TimeStatistics,
)
from vae_model.tables import RecordError

KINDS = {"x": "numeric", "c": "categorical", "t": "timestamp"}


def table_of(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "x": pa.array(rng.normal(3, 2, n).round(1), mask=rng.random(n) < 0.1),
            "c": pa.array(rng.choice(list("abcdef"), n), mask=rng.random(n) < 0.2),
            "t": pa.array(rng.integers(-(10**9), 10**9, n) * 1_000_000, pa.timestamp("us"), mask=rng.random(n) < 0.3),
        }
    )


def chunks_of(table, rng, most=120):
    start = 0
    while start < table.num_rows:
        size = int(rng.integers(0, most))
        yield start, table.slice(start, size)
        start += size


def statistics_of(parts, kinds=None):
    statistics = TableStatistics(kinds or KINDS)
    for start, part in parts:
        statistics.update(part, start)
    return statistics


def numeric(values, chunk=None, start=0):
    """Statistics of one column of numbers, taken chunk by chunk."""
    values, chunk = np.asarray(values, np.float64), chunk or max(len(values), 1)
    statistics = NumericStatistics()
    for at in range(0, len(values), chunk):
        statistics.update("x", pa.chunked_array([values[at : at + chunk]]), start + at)
    return statistics


def categorical(values):
    statistics = CategoricalStatistics()
    statistics.update("c", pa.chunked_array([values], pa.string()), 0)
    return statistics


def times(values, kind=None):
    statistics = TimeStatistics()
    statistics.update("t", pa.chunked_array([pa.array(values, kind or pa.timestamp("us"))]), 0)
    return statistics


def assert_same(a, b):
    """Both statistics say the same of every column."""
    assert a.num_rows == b.num_rows
    for name, left in a.columns.items():
        right = b.columns[name]
        assert (left.num_rows, left.num_missing) == (right.num_rows, right.num_missing)
        if isinstance(left, NumericStatistics):
            assert (left.minimum, left.maximum, left.drifts) == (right.minimum, right.maximum, right.drifts)
            np.testing.assert_allclose([left.mean, left.stddev], [right.mean, right.stddev], rtol=1e-10)
            for mine, others in zip(left.points(), right.points(), strict=True):
                np.testing.assert_allclose(mine, others)
        elif isinstance(left, CategoricalStatistics):
            assert left.most_frequent() == right.most_frequent()
            assert left.num_distinct == pytest.approx(right.num_distinct, rel=1e-6)
            assert left.num_characters == right.num_characters
        else:
            assert (left.minimum, left.maximum, left.resolution) == (right.minimum, right.maximum, right.resolution)
            np.testing.assert_array_equal(
                np.concatenate([left.hours, left.weekdays, left.months]),
                np.concatenate([right.hours, right.weekdays, right.months]),
            )


# ---- one pass and merging ----------------------------------------------------------------------


def test_moments_are_numpys():
    table = table_of()
    x = statistics_of([(0, table)]).columns["x"]
    values = table.column("x").drop_null().to_numpy()
    assert x.num_missing == table.column("x").null_count
    assert (x.minimum, x.maximum) == (values.min(), values.max())
    np.testing.assert_allclose([x.mean, x.stddev], [values.mean(), values.std()], rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_do_not_change_the_statistics(seed):
    table = table_of(seed=seed)
    whole = statistics_of([(0, table)])
    assert_same(statistics_of(chunks_of(table, np.random.default_rng(seed))), whole)


@pytest.mark.parametrize("seed", range(3))
def test_parts_merge_in_any_order(seed):
    table, rng = table_of(seed=seed), np.random.default_rng(seed)
    parts = [statistics_of([part]) for part in chunks_of(table, rng)]
    merged = TableStatistics(KINDS)
    for i in rng.permutation(len(parts)):
        merged.merge(parts[i])
    assert_same(merged, statistics_of([(0, table)]))


def test_an_empty_table_changes_nothing():
    table = table_of(50)
    statistics = statistics_of([(0, table.slice(0, 0)), (0, table), (50, table.slice(0, 0))])
    assert_same(statistics, statistics_of([(0, table)]))


def test_mean_and_variance_keep_their_digits_far_from_zero():
    values = 1e9 + np.random.default_rng(0).normal(size=10_000)
    x = numeric(values, chunk=7)
    assert x.stddev == pytest.approx(values.std(), rel=1e-6)


def test_nan_is_missing():
    x = numeric([1.0, np.nan, 3.0])
    assert (x.num_missing, x.mean) == (1, 2.0)


def test_a_column_of_nothing_but_nulls_has_no_values():
    x = numeric([np.nan] * 5)
    assert (x.num_rows, x.num_missing, x.stddev, x.drifts) == (5, 5, 0.0, False)
    assert len(x.points()[0]) == 0


# ---- wild values -------------------------------------------------------------------------------


def test_infinite_values_are_refused_with_column_count_and_row():
    with pytest.raises(RecordError, match=r"x: expected finite numbers, got 2 infinite, the first in row 1,002;"):
        numeric([1.0, 2.0, math.inf, -math.inf], start=1000)


def test_a_cell_of_the_wrong_type_is_refused_with_column_and_row():
    statistics = TableStatistics({"x": "numeric"})
    with pytest.raises(RecordError, match=r"x: expected numbers, got 'oops' in row 11"):
        statistics.update(pa.table({"x": ["1", "oops"]}), 10)


def test_a_cell_that_is_no_time_is_refused_with_column_and_row():
    statistics = TableStatistics({"t": "timestamp"})
    with pytest.raises(RecordError, match=r"t: expected times, got 'soon' in row 11"):
        statistics.update(pa.table({"t": ["2024-01-01", "soon"]}), 10)


@pytest.mark.parametrize(
    "values",
    [
        [1e300, -1e300, 0.0, 5e299],
        [1.7e308, -1.7e308, 1.0],
        [5e-308, 0.0, 1e-307],
        [0.0, 3e-308],
        [1e-200, 2e-200, 3e-200],
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_huge_and_tiny_numbers_have_a_finite_positive_stddev(values, chunk):
    x = numeric(values, chunk=chunk)
    assert 0 < x.stddev < math.inf
    assert (x.minimum, x.maximum) == (min(values), max(values))


def test_numbers_below_the_least_normal_one_are_zero():
    x = numeric([5e-324, -1e-310, 0.0, 2e-308])
    assert (x.minimum, x.maximum, x.stddev) == (0, 0, 0)


# ---- quantiles ---------------------------------------------------------------------------------


def rank_error(sketch, values):
    """Largest difference between the sketch's distribution function and the empirical one."""
    points, weights = sketch.points()
    ours = np.cumsum(weights) / weights.sum()
    values = np.sort(values)
    below = np.searchsorted(values, points, side="right") / len(values)
    before = np.searchsorted(values, points, side="left") / len(values)
    return max(np.abs(ours - below).max(), np.abs(np.r_[0, ours[:-1]] - before).max())


@pytest.mark.parametrize("shape", ["normal", "lognormal", "sorted", "zero-inflated"])
def test_ranks_are_within_the_stated_bound_for_a_million_rows(shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=1_000_000)
    if shape == "lognormal":
        values = np.exp(3 * values)
    elif shape == "sorted":
        values.sort()
    elif shape == "zero-inflated":
        values[rng.random(len(values)) < 0.95] = 0
    sketch = QuantileSketch()
    for part in np.array_split(values, 100):
        sketch.update(part)
    bound = (1 + math.log2(100)) / 4096
    assert rank_error(sketch, values) <= bound
    for rank in (0.01, 0.5, 0.99):
        at = float(sketch.quantile(rank))
        assert (values < at).mean() - bound <= rank <= (values <= at).mean() + bound


def test_quantiles_are_exact_while_few_values_are_distinct():
    values = np.random.default_rng(0).integers(0, 2048, 100_000).astype(float)
    sketch = QuantileSketch()
    for part in np.array_split(values, 37):
        sketch.update(part)
    expected, counts = np.unique(values, return_counts=True)
    points, weights = sketch.points()
    np.testing.assert_array_equal(points, expected)
    np.testing.assert_array_equal(weights, counts)


def test_a_frequent_value_keeps_its_share_and_does_not_swallow_the_others():
    rng = np.random.default_rng(0)
    values = np.zeros(200_000)
    values[:50] = rng.normal(size=50)  # one row in 4,000
    sketch = QuantileSketch()
    sketch.update(rng.permutation(values))
    for part in np.array_split(rng.normal(size=5000), 5):
        sketch.update(part)
    points, weights = sketch.points()
    assert weights[points == 0] == pytest.approx([199_950])
    assert len(points) > 1000
    assert weights.sum() == pytest.approx(205_000)


def test_sketches_merge_within_the_bound():
    values = np.random.default_rng(1).normal(size=64_000)
    merged = QuantileSketch()
    for part in np.array_split(values, 8):
        sketch = QuantileSketch()
        for piece in np.array_split(part, 8):
            sketch.update(piece)
        merged.merge(sketch)
    assert rank_error(merged, values) <= (1 + math.log2(64)) / 4096


def test_a_compact_sketch_is_as_small_as_one_batch_and_loses_little():
    values = np.random.default_rng(0).lognormal(size=300_000)
    sketch = QuantileSketch()
    for part in np.array_split(values, 255):
        sketch.update(part)
    before = len(sketch.to_json()), len(str(sketch.to_json()))
    error = rank_error(sketch, values)
    sketch.compact()
    after = len(sketch.to_json()), len(str(sketch.to_json()))
    assert (before[0], after[0]) == (8, 1)
    assert after[1] < before[1] / 3
    assert rank_error(sketch, values) <= error + 1 / 2048


def test_sketches_draw_no_random_numbers():
    values = np.random.default_rng(1).normal(size=50_000)
    sketches = [QuantileSketch(), QuantileSketch()]
    for sketch in sketches:
        for part in np.array_split(values, 10):
            sketch.update(part)
    assert sketches[0].to_json() == sketches[1].to_json()


def test_the_points_of_a_column_reach_its_extremes():
    values = np.random.default_rng(1).normal(size=50_000)
    points, _ = numeric(values).points()
    assert (points[0], points[-1]) == (values.min(), values.max())
    assert (np.diff(points) > 0).all()


# ---- levels ------------------------------------------------------------------------------------


def test_level_counts_are_exact():
    rng = np.random.default_rng(0)
    values = [f"level {i}" for i in rng.zipf(1.5, 20_000) % 3000] + [""] * 5 + ["é\0x"] * 4
    c = categorical(values)
    counts = collections.Counter(values)
    assert c.most_frequent() == sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert c.num_distinct == pytest.approx(len(counts), rel=0.05)
    assert c.num_characters == sum(map(len, values))


def test_a_thousand_times_more_levels_are_counted_within_a_few_percent():
    values = [f"user-{i}" for i in range(60_000)]
    assert categorical(values).num_distinct == pytest.approx(60_000, rel=0.05)


# ---- drift -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [10, 100, 1000])
@pytest.mark.parametrize(
    "values",
    [
        np.arange(1000),
        1000 - np.arange(1000.0),
        2013 + np.arange(1000) // 365,
        np.arange(1000) + 20 * np.random.default_rng(0).normal(size=1000),
        np.exp(np.arange(1000) / 100),
    ],
    ids=["counter", "countdown", "year", "noisy clock", "curved counter"],
)
def test_columns_that_move_one_way_drift(values, chunk):
    assert numeric(values, chunk=chunk).drifts


@pytest.mark.parametrize("chunk", [10, 100])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=1000),
        np.concatenate([np.sort(np.random.default_rng(i).normal(size=100)) for i in range(10)]),
        np.repeat([3.0, 1.0, 2.0, 5.0, 4.0], 200),
        np.repeat([0.0, 1.0, 0.0, 1.0, 0.0], 200),
        np.arange(1000) % 7,
        np.full(1000, 5.0),
    ],
    ids=["random", "sorted within files", "one value a file", "on and off", "weekday", "constant"],
)
def test_columns_that_come_back_do_not_drift(values, chunk):
    assert not numeric(values, chunk=chunk).drifts


def test_a_counter_with_gaps_drifts():
    values = np.arange(1000.0)
    values[np.random.default_rng(0).random(1000) < 0.3] = np.nan
    assert numeric(values, chunk=50).drifts


def test_a_counter_drifts_whatever_order_its_parts_merge_in():
    parts = [numeric(np.arange(start, start + 10) ** 3, start=start) for start in range(0, 100, 10)]
    merged = NumericStatistics()
    for i in np.random.default_rng(0).permutation(10):
        merged.merge(parts[i])
    assert merged.drifts


# ---- times -------------------------------------------------------------------------------------


def test_hours_weekdays_and_months_are_pandas():
    instants = pd.Series(pd.to_datetime(np.random.default_rng(0).integers(-(10**18), 10**18, 2000)))
    t = times(instants.dt.floor("us"))
    np.testing.assert_array_equal(t.hours, np.bincount(instants.dt.hour, minlength=24))
    np.testing.assert_array_equal(t.weekdays, np.bincount(instants.dt.weekday, minlength=7))
    np.testing.assert_array_equal(t.months, np.bincount(instants.dt.month - 1, minlength=12))


@pytest.mark.parametrize(
    ("instant", "microseconds"),
    [
        ("2024-03-01", 86_400_000_000),
        ("2024-03-01T05", 3_600_000_000),
        ("2024-03-01T05:07", 60_000_000),
        ("2024-03-01T05:07:09", 1_000_000),
        ("2024-03-01T05:07:09.5", 1),
        ("1969-12-31T23:59:59.999999", 1),
    ],
)
def test_the_resolution_of_times_is_their_coarsest_common_unit(instant, microseconds):
    whole_day = np.datetime64("2020-01-01", "us")
    assert times([whole_day, np.datetime64(instant, "us")]).resolution == microseconds


def test_dates_and_times_of_day_are_times():
    assert times([dt.date(2024, 1, 1)], pa.date32()).minimum == 1_704_067_200_000_000
    assert times([dt.time(5, 30)], pa.time32("s")).maximum == 5.5 * 3_600_000_000


def test_missing_times_are_counted_and_not_read():
    t = times([None, dt.datetime(2024, 1, 1, 7), None])
    assert (t.num_rows, t.num_missing, t.hours.sum(), t.hours[7]) == (3, 2, 1, 1)


# ---- JSON --------------------------------------------------------------------------------------


def all_kinds():
    table = table_of()
    table = table.append_column("nothing", pa.nulls(1000, pa.float64()))
    table = table.append_column("huge", pa.array(1.7e308 * np.linspace(-1, 1, 1000)))
    table = table.append_column("counter", pa.array(np.arange(1000)))
    table = table.append_column("many", pa.array(np.random.default_rng(0).normal(size=1000)))
    table = table.append_column("no times", pa.nulls(1000, pa.timestamp("us")))
    kinds = KINDS | dict.fromkeys(["nothing", "huge", "counter", "many"], "numeric") | {"no times": "timestamp"}
    return statistics_of(chunks_of(table, np.random.default_rng(0)), kinds)


def test_statistics_come_back_from_strict_json():
    statistics = all_kinds()
    restored = TableStatistics.from_json(json.loads(json.dumps(statistics.to_json(), allow_nan=False)))
    assert restored.to_json() == statistics.to_json()
    with np.errstate(all="ignore"):
        assert_same(restored, statistics)


def test_statistics_from_json_go_on_counting():
    first, second = table_of(seed=1), table_of(seed=2)
    restored = TableStatistics.from_json(json.loads(json.dumps(statistics_of([(0, first)]).to_json())))
    restored.update(second, 1000)
    assert_same(restored, statistics_of([(0, first), (1000, second)]))


def test_a_sketch_of_a_million_rows_comes_back_from_json():
    sketch = QuantileSketch()
    for part in np.array_split(stats.norm.ppf(np.linspace(0.001, 0.999, 100_000)), 20):
        sketch.update(part)
    restored = QuantileSketch.from_json(json.loads(json.dumps(sketch.to_json())))
    ranks = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(restored.quantile(ranks), sketch.quantile(ranks))
