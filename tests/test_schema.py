import collections
import datetime as dt
import json
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.preprocessing import QuantileTransformer, StandardScaler

from vae_model.schema import (
    MAX_CLASSES,
    CategoricalFeature,
    ConstantFeature,
    NumericFeature,
    TableSchema,
    TimestampFeature,
    choose_kinds,
    infer_schema,
)
from vae_model.statistics import TableStatistics

TEXT = pa.string()
RNG = np.random.default_rng(0)


def schema_of(table, chunk=10**9, **overrides):
    """The schema inferred from a table, its statistics taken chunk by chunk."""
    table = pa.table(table) if isinstance(table, dict) else table
    kinds, passthrough = choose_kinds(table.schema, **overrides)
    statistics = TableStatistics(kinds)
    for start in range(0, table.num_rows, chunk):
        statistics.update(table.slice(start, chunk), start)
    forced = [name for kind, names in overrides.items() if kind != "exclude" for name in names]
    return infer_schema(statistics, table.schema, passthrough, forced)


def feature_of(values, kind=None, **options):
    """The feature of one column among others."""
    column = values if isinstance(values, pa.ChunkedArray | pa.Array) else pa.array(values, kind)
    other = pa.array(np.arange(len(column)) % 2)
    schema = schema_of(pa.table({"it": column, "other": other}), **options)
    return next(feature for feature in schema.features if feature.name == "it")


def reason_of(values, kind=None, **options):
    """Why one column among others is not read."""
    table = pa.table({"it": pa.array(values, kind), "other": np.arange(len(values)) % 2})
    return schema_of(table, **options).passthrough["it"]


# ---- kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 5, 2, 4] * 5, pa.uint8(), NumericFeature),
        ([1.5, 0.5, 2.5, None] * 5, pa.float16(), NumericFeature),
        ([1, 5, 2, 4] * 5, pa.decimal128(5, 0), NumericFeature),
        ([dt.timedelta(seconds=s) for s in (3, 1, 2, 5)] * 5, pa.duration("s"), NumericFeature),
        (["a", "b", "c", None] * 5, TEXT, CategoricalFeature),
        (["a", "b", "c", None] * 5, pa.large_string(), CategoricalFeature),
        (["a", "b", "c", None] * 5, pa.string_view(), CategoricalFeature),
        (["a", "b", "c", None] * 5, pa.dictionary(pa.int8(), TEXT), CategoricalFeature),
        ([3, 1, 2, 3] * 5, pa.dictionary(pa.int8(), pa.int64()), NumericFeature),
        ([True, False, None, True] * 5, pa.bool_(), CategoricalFeature),
        ([dt.datetime(2024, 1, 1, h) for h in (1, 5, 3, 7)] * 5, pa.timestamp("us", "UTC"), TimestampFeature),
        ([dt.date(2024, 1, d) for d in range(1, 8)] * 3, pa.date32(), TimestampFeature),
        ([dt.time(h) for h in (1, 5, 3, 7)] * 5, pa.time32("s"), TimestampFeature),
        ([7] * 20, pa.int64(), ConstantFeature),
        (["x"] * 20, TEXT, ConstantFeature),
        ([None] * 20, pa.null(), ConstantFeature),
        ([None] * 20, pa.float64(), ConstantFeature),
    ],
    ids=str,
)
def test_the_type_of_a_column_decides_how_it_is_read(values, kind, expected):
    assert type(feature_of(values, kind)) is expected


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([[1], [2]] * 10, pa.list_(pa.int64()), r"list<.*> is not read"),
        ([{"a": 1}] * 20, pa.struct([("a", pa.int64())]), r"struct<.*> is not read"),
        ([b"a", b"b"] * 10, pa.binary(), "binary is not read"),
        ([f"id-{i}" for i in range(60)], TEXT, r"nearly every row has its own value \(about 60 in 60\)"),
        ([f"{i % 20} {'lorem ' * 12}" for i in range(60)], TEXT, r"free text \(\d+ characters on average\)"),
        (range(60), pa.int64(), "moves one way through the rows"),
        ([2013 + i // 20 for i in range(60)], pa.int64(), "moves one way through the rows"),
        ([dt.datetime(2024, 1, 1)] * 20, pa.timestamp("us"), "its times cover no whole day, week or year"),
    ],
    ids=["list", "struct", "binary", "id", "text", "counter", "year", "one time"],
)
def test_columns_that_say_nothing_about_a_row_are_carried_with_the_reason(values, kind, reason):
    assert re.match(reason, reason_of(values, kind))


def test_a_few_long_texts_are_levels():
    assert isinstance(feature_of([f"{'x' * 100}{i % 3}" for i in range(60)]), CategoricalFeature)


def test_features_come_numeric_timestamp_categorical_fixed():
    table = {
        "constant": [1] * 40,
        "text": ["a", "b"] * 20,
        "time": pa.array([dt.datetime(2024, 1, 1, h) for h in (1, 2, 3, 4)] * 10),
        "number": [1.5, 2.5, 0.5, 3.5] * 10,
        "id": pa.array([f"{i}" for i in range(40)]),
    }
    schema = schema_of(table)
    assert schema.names == ["number", "time", "text", "constant", "id"]
    assert [f.name for f in schema.learned_categories] == ["text"]
    assert [f.name for f in schema.fixed_categories] == ["constant", "id"]  # 40 rows are too few to call it an id


# ---- overrides ---------------------------------------------------------------------------------


def test_integers_are_levels_on_request():
    feature = feature_of([3, 1, 3, 2] * 5, categorical=["it"])
    assert feature.levels == ("3", "1", "2")


def test_text_is_read_as_numbers_on_request():
    feature = feature_of(["3", "1.5", " 2 ", None] * 5, numeric=["it"])
    assert isinstance(feature, NumericFeature)
    assert (feature.minimum, feature.maximum) == (1.5, 3.0)


def test_text_is_read_as_times_on_request():
    assert feature_of(["2024-01-01T05:00", "2024-01-01T07:00"] * 10, timestamp=["it"]).parts == ("hour",)


def test_a_column_is_left_out_on_request():
    assert reason_of([1, 2] * 10, exclude=["it"]) == "excluded by the user"


@pytest.mark.parametrize(
    ("values", "kind", "override"),
    [(range(60), pa.int64(), "numeric"), (list(map(str, range(60))), TEXT, "categorical")],
)
def test_what_a_user_names_is_never_carried(values, kind, override):
    assert feature_of(values, kind, **{override: ["it"]}).name == "it"


def test_an_override_of_an_absent_column_is_refused_and_the_columns_are_listed():
    schema = pa.schema([("x", pa.int64()), ("y", TEXT)])
    with pytest.raises(ValueError, match=r"^z: named as numeric, but the table has no such column; it has x, y$"):
        choose_kinds(schema, numeric=["z"])


def test_a_column_named_as_two_kinds_is_refused():
    with pytest.raises(ValueError, match=r"^x: named as numeric and as excluded$"):
        choose_kinds(pa.schema([("x", pa.int64())]), numeric=["x"], exclude=["x"])


@pytest.mark.parametrize("table", [{"a": [1] * 20, "b": ["x"] * 20}, {"id": [f"{i}" for i in range(40)]}])
def test_a_table_in_which_nothing_varies_is_refused(table):
    with pytest.raises(ValueError, match=r"expected a column that varies, got [12] constant or never repeated ones"):
        schema_of(table)


def test_a_table_of_carried_columns_only_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"got 0 .* \(n: moves one way through the rows, like a counter or a year\)"):
        schema_of({"n": range(100)})


# ---- JSON and fitting other tables -------------------------------------------------------------


def mixed_table(n=60):
    return pa.table(
        {
            "i": pa.array(RNG.integers(0, 5, n), mask=RNG.random(n) < 0.2),
            "x": RNG.normal(size=n),
            "huge": 1.7e308 * RNG.uniform(-1, 1, n),
            "t": pa.array(RNG.integers(0, 365 * 86_400, n) * 1_000_000, pa.timestamp("us", "UTC")),
            "c": pa.array(RNG.choice(["a", "b", "c"], n)).dictionary_encode(),
            "same": [7.5] * n,
            "nothing": pa.nulls(n, pa.float64()),
            "list": pa.array([[1]] * n),
        }
    )


def test_a_schema_comes_back_from_strict_json():
    schema = schema_of(mixed_table())
    restored = TableSchema.from_json(json.loads(json.dumps(schema.to_json(), allow_nan=False)))
    assert restored == schema
    assert restored.arrow_type("t") == pa.timestamp("us", "UTC")
    assert {type(feature) for feature in restored.features} == {
        NumericFeature,
        TimestampFeature,
        CategoricalFeature,
        ConstantFeature,
    }


def test_the_same_rows_in_other_chunks_give_the_same_features():
    table = mixed_table().drop_columns(["huge", "list"])
    one, many = schema_of(table), schema_of(table, chunk=7)
    assert one.names == many.names
    for a, b in zip(one.features, many.features, strict=True):
        assert type(a) is type(b)
        if isinstance(a, NumericFeature):
            np.testing.assert_allclose(a.knot_scores, b.knot_scores, atol=1e-12)
            np.testing.assert_allclose([a.mean, a.stddev], [b.mean, b.stddev], rtol=1e-12)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("column", "kind", "problem"),
    [
        ("x", pa.timestamp("us"), "x: expected double, got timestamp[us]"),
        ("x", pa.list_(pa.int64()), "x: expected double, got list<item: int64>"),
        ("t", pa.int64(), "t: expected timestamp[us, tz=UTC], got int64"),
        (
            "c",
            pa.list_(TEXT),
            "c: expected dictionary<values=string, indices=int32, ordered=0>, got list<item: string>",
        ),
        ("x", TEXT, None),
        ("x", pa.int8(), None),
        ("x", pa.null(), None),
        ("x", pa.bool_(), None),
        ("t", pa.date32(), None),
        ("c", pa.int64(), None),
        ("list", pa.int64(), None),
    ],
    ids=str,
)
def test_a_schema_says_what_is_wrong_with_another(column, kind, problem):
    table = mixed_table()
    other = table.schema.set(table.schema.get_field_index(column), pa.field(column, kind))
    assert schema_of(table).refuse(other) == problem


def test_absent_and_repeated_columns_are_told_together():
    schema = schema_of({"x": [1.5, 2.5, 0.5] * 10, "y": ["a", "b", "c"] * 10})
    other = pa.schema([("x", pa.float64()), ("x", pa.float64())])
    assert schema.refuse(other) == "x: expected one such column, got 2; y: expected one such column, got none"


# ---- numbers -----------------------------------------------------------------------------------


def test_z_scores_are_sklearns():
    values = RNG.gamma(2, 3, 500)
    expected = StandardScaler().fit_transform(values[:, None])[:, 0]
    feature = feature_of(values)
    np.testing.assert_allclose(feature.standard(values), expected, rtol=1e-9, atol=1e-12)


def test_z_scores_beyond_ten_grow_like_the_logarithm():
    feature = feature_of(RNG.normal(size=500))
    z = feature.standard(feature.mean + feature.stddev * np.array([9.0, 10.0, 10 * math.e, -10 * math.e**2]))
    np.testing.assert_allclose(z, [9, 10, 20, -30], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-306, 1e-200, 1.0, 1e200, 1e307])
def test_z_scores_are_finite_and_ascending_whatever_the_scale(scale):
    feature = feature_of(scale * RNG.normal(size=100))
    values = np.array([-1.7e308, -1e300, -1e10, -1.0, -1e-300, 0.0, 5e-324, 1e-10, 1.0, 1e10, 1e300, 1.7e308])
    z = feature.standard(values)
    assert np.isfinite(z).all()
    assert np.isfinite(z.astype(np.float32)).all()
    assert (np.diff(z) >= 0).all()
    assert np.abs(z).max() < 1e4 + 5000


@pytest.mark.parametrize("shape", ["normal", "lognormal", "uniform"])
def test_normal_scores_are_sklearns_in_the_middle(shape):
    values = {"normal": RNG.normal(size=2000), "lognormal": RNG.lognormal(size=2000), "uniform": RNG.random(2000)}[
        shape
    ]
    transform = QuantileTransformer(n_quantiles=2000, output_distribution="normal").fit(values[:, None])
    middle = np.sort(values)[200:-200]
    expected = transform.transform(middle[:, None])[:, 0]
    found = feature_of(values).quantile(middle)
    slope = np.polyfit(expected, found, 1)
    np.testing.assert_allclose(found, np.polyval(slope, expected), atol=0.02)
    assert slope == pytest.approx([1, 0], abs=0.02)  # standardised, so nearly but not quite the same scale


@pytest.mark.parametrize(
    "values",
    [
        RNG.normal(size=5000),
        RNG.lognormal(sigma=4, size=5000),
        RNG.integers(0, 3, 5000),
        np.where(RNG.random(5000) < 0.95, 0, RNG.normal(size=5000)),
        np.array([0.0] * 4999 + [1.0]),
        np.array([1e300, -1e300, 5e-324, 0.0] * 5),
    ],
    ids=["normal", "heavy", "integers", "zeros", "one other", "extremes"],
)
def test_normal_scores_never_fall_as_values_rise(values):
    feature = feature_of(RNG.permutation(np.asarray(values, np.float64)))
    around = np.concatenate([np.linspace(-5, 5, 501), values, [-1e308, 1e308, feature.minimum, feature.maximum]])
    scores = feature.quantile(np.sort(around)).astype(np.float32)  # as the network reads them
    assert np.isfinite(scores).all()
    assert (np.diff(scores) >= 0).all()
    assert scores[0] < scores[-1]


def test_normal_scores_do_not_depend_on_the_order_of_the_values():
    rng = np.random.default_rng(0)
    feature = feature_of(rng.normal(size=1000).round(1))
    values = np.append(rng.normal(size=200).round(1), [-1e308, 1e308])
    alone = [feature.quantile(values[i : i + 1])[0] for i in range(len(values))]
    np.testing.assert_array_equal(feature.quantile(values), alone)


def test_normal_scores_of_the_training_rows_are_standardised():
    for values in (RNG.lognormal(size=2000), RNG.integers(0, 4, 2000)):
        scores = feature_of(values).quantile(np.asarray(values, np.float64))
        assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=0.02)


def test_the_compressed_view_draws_tails_in_and_never_stretches_them():
    rng = np.random.default_rng(5)
    columns = {
        "uniform": rng.random(3000),
        "two modes": rng.normal(size=3000) + rng.choice([-3, 3], 3000),
        "Student": rng.standard_t(3, 3000),
        "lognormal": rng.lognormal(size=3000),
        "mostly zero": np.where(rng.random(3000) < 0.9, 0.0, 1.0),
    }
    for name, values in columns.items():
        feature = feature_of(values)
        heavier = stats.kurtosis(values, fisher=False) > 3
        assert feature.heavy_tailed == heavier == (name in ("Student", "lognormal", "mostly zero"))
        expected = feature.quantile(values) if heavier else feature.standard(values)
        encoded = feature.encode(values, "compressed")
        np.testing.assert_array_equal(encoded, expected)
        assert np.abs(encoded).max() <= np.abs(feature.standard(values)).max() + 1e-9
        np.testing.assert_allclose(feature.decode(encoded, "compressed"), values, rtol=1e-7, atol=1e-9)


def test_no_training_value_of_a_large_table_counts_as_beyond_the_data():
    values = RNG.normal(size=50_000)
    feature = feature_of(values)
    assert (feature.knots[0], feature.knots[-1]) == (values.min(), values.max())
    assert feature.quantile(np.array([values.min() - 1]))[0] < feature.quantile(np.array([values.min()]))[0]


def test_a_mostly_constant_column_of_a_large_table_keeps_its_other_values():
    values = np.zeros(60_000)
    values[RNG.choice(60_000, 3000, replace=False)] = RNG.normal(10, 1, 3000)
    feature = feature_of(values)
    scores = feature.quantile(np.array([0.0, 8.0, 10.0, 12.0]))
    assert (np.diff(scores) > 0.1).all()
    # A typical gap is that between the others' values, not the one that sets them apart from zero.
    assert feature.resolution < 0.1


def test_values_come_back_from_z_scores():
    values = RNG.normal(5, 3, 500)
    values[0] = 1000  # more than ten standard deviations out
    feature = feature_of(values)
    assert feature.standard(values).max() > 10
    np.testing.assert_allclose(feature.from_standard(feature.standard(values)), values, rtol=1e-9, atol=1e-9)


def test_values_come_back_from_normal_scores():
    values = RNG.lognormal(size=200)
    feature = feature_of(values)
    np.testing.assert_allclose(feature.from_quantile(feature.quantile(values)), values, rtol=1e-9)


def test_values_of_wild_scores_stay_within_the_training_values():
    feature = feature_of([1e300, -1e300, 0.0, 1.0] * 10)
    for to_value in (feature.from_standard, feature.from_quantile):
        np.testing.assert_allclose(to_value(np.array([-1e6, 1e6])), [feature.minimum, feature.maximum])


@pytest.mark.parametrize(("low", "high", "gap"), [(0, 3, 1), (0, 50, 1), (1000, 1200, 1)])
def test_the_resolution_of_integers_is_one_in_encoded_units(low, high, gap):
    values = RNG.integers(low, high, 3000)
    feature = feature_of(values)
    assert feature.is_integer
    assert feature.resolution == pytest.approx(gap / values.std(), rel=1e-9)


def test_the_resolution_of_a_coin_in_normal_scores_is_the_gap_of_its_two():
    feature = feature_of([0, 1] * 50)
    # Standardised, two equally frequent values stand at -1 and 1.
    np.testing.assert_allclose(feature.knot_scores, [-1, 1], atol=1e-9)
    assert feature.quantile_resolution == pytest.approx(2)


# ---- levels ------------------------------------------------------------------------------------


def probabilities_of_all_codes(feature):
    """exp(-NLL) of every level and of an unseen one, for some class probabilities."""
    p = RNG.dirichlet(np.ones(feature.num_classes))
    codes = np.arange(1, len(feature.levels) + 1)
    of_levels = p[feature.classes(codes) - 1] * np.exp(-feature.code_nll[codes])
    return of_levels, math.exp(-feature.code_nll[0])


LEVELS = {
    "few": ["a"] * 5 + ["b"] * 3,
    "rare ones pooled": ["a"] * 9 + ["b"] * 5 + ["c"] * 2 + ["d", "e", "f"],
    "one rare": ["a"] * 9 + ["b"] * 5 + ["c"],
    "all rare": [*"abcdefgh", "a"],
    "more than classes": [f"{i}" for i in range(400) for _ in range(1 + i % 5 + (i < 300) * 3)],
    "constant": ["a"] * 9,
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_and_unseen_ones_have_probability_one_in_all(name):
    of_levels, unseen = probabilities_of_all_codes(feature_of(LEVELS[name]))
    assert of_levels.sum() + unseen == pytest.approx(1, rel=1e-12)
    assert (of_levels > 0).all()


def test_rare_levels_share_their_class_by_their_counts():
    feature = feature_of(LEVELS["rare ones pooled"])
    assert feature.levels == ("a", "b", "c", "d", "e", "f")
    assert feature.num_classes == 3
    assert feature.classes(np.arange(7)).tolist() == [0, 1, 2, 3, 3, 3, 3]
    of_levels, _ = probabilities_of_all_codes(feature)
    np.testing.assert_allclose(of_levels[2:] / of_levels[2:].sum(), [2 / 5, 1 / 5, 1 / 5, 1 / 5])
    assert feature.class_names == ["(unseen)", "a", "b", "(one of 4 rare)"]


def test_the_unseen_mass_is_the_share_of_levels_seen_once():
    values = LEVELS["rare ones pooled"]
    once = sum(count == 1 for count in collections.Counter(values).values())
    _, unseen = probabilities_of_all_codes(feature_of(values))
    assert unseen == pytest.approx(once / len(values))


def test_the_unseen_mass_has_bounds():
    assert feature_of(["a", "b"] * 10).unseen == pytest.approx(1 / 22)
    assert feature_of([f"{i}" for i in range(40)]).unseen == pytest.approx(1 - 1 / 42)


def test_a_column_has_a_bounded_number_of_classes():
    feature = feature_of(LEVELS["more than classes"])
    assert feature.num_classes == MAX_CLASSES
    assert len(feature.levels) == 400


def test_class_probabilities_are_the_training_shares_and_sum_to_one():
    values = LEVELS["rare ones pooled"] * 100
    feature = feature_of(values)
    counts = collections.Counter(values)
    expected = [counts[level] / len(values) for level in feature.levels]
    np.testing.assert_allclose(feature.class_probabilities, expected, atol=0.003)
    assert feature.class_probabilities.sum() == pytest.approx(1)


def test_codes_are_places_among_the_levels_and_zero_for_others():
    feature = feature_of(["b"] * 5 + ["a"] * 3)
    codes = feature.codes(pa.chunked_array([["a", "b"], ["z", None, "A", ""]]))
    assert codes.tolist() == [2, 1, 0, 0, 0, 0]


# ---- missing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_missing", [0, 1, 50, 99, 100])
def test_presence_and_absence_have_probability_one_in_all(num_missing):
    feature = replace(feature_of([1.5, 2.5] * 50), num_missing=num_missing)
    assert sum(math.exp(-nll) for nll in feature.missing_nll()) == pytest.approx(1)


def test_the_probability_of_what_was_never_seen_missing_is_bounded():
    feature = feature_of([1.5, 2.5] * 50)
    assert math.exp(-feature.missing_nll()[1]) == pytest.approx(1 / 102)
    assert not feature.nullable
    assert feature_of([1.5, None] * 50).nullable


# ---- times -------------------------------------------------------------------------------------


def test_times_are_read_by_the_parts_that_training_covers():
    hours = [dt.datetime(2024, 1, 1, h) for h in range(24)] * 2
    days = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(40)]
    year = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(366)]
    assert feature_of(hours, pa.timestamp("us")).parts == ("hour",)
    assert feature_of(days, pa.date32()).parts == ("weekday",)
    assert feature_of(year, pa.date32()).parts == ("weekday", "month")


def test_angles_turn_with_the_clock_the_week_and_the_year():
    year = [dt.datetime(2024, 1, 1) + dt.timedelta(hours=5 * i) for i in range(1752)]
    feature = feature_of(year, pa.timestamp("us"))
    instants = np.array(["2024-01-01T00:00", "2024-01-04T06:00", "1969-12-31T18:00"], "datetime64[us]")
    turns = feature.angles(instants.astype(np.int64)) / (2 * np.pi)
    # Monday midnight in January; Thursday at six in January; Wednesday at six p.m. in December.
    np.testing.assert_allclose(turns, [[0, 0, 0], [1 / 4, 3 / 7, 0], [3 / 4, 2 / 7, 11 / 12]])


def test_the_month_is_the_calendars_in_any_year():
    year = [dt.datetime(2024, 1, 1) + dt.timedelta(hours=5 * i) for i in range(1752)]
    feature = feature_of(year, pa.timestamp("us"))
    instants = np.random.default_rng(0).integers(-(10**18), 10**18, 1000)  # 30,000 years either way
    months = instants.astype("datetime64[us]").astype("datetime64[M]").astype(int) % 12
    np.testing.assert_allclose(feature.angles(instants)[:, 2], 2 * np.pi * months / 12, rtol=1e-12)


def test_the_resolution_of_an_hour_is_that_of_its_times():
    minutes = [dt.datetime(2024, 1, 1) + dt.timedelta(minutes=7 * i) for i in range(200)]
    assert feature_of(minutes, pa.timestamp("us")).resolutions[0] == pytest.approx(2 * np.pi / 1440)


def infer_column(values):
    table = pa.table({"c": pa.array(values), "x": np.random.default_rng(0).normal(size=len(values))})
    kinds, carried = choose_kinds(table.schema)
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    return infer_schema(statistics, table.schema, carried)


def test_a_column_with_more_levels_than_can_be_known_is_carried_with_the_reason():
    values = [f"v{i}" for i in np.random.default_rng(1).integers(0, 150_000, 400_000)]
    assert "too many values to know by name (about 1" in infer_column(values).passthrough["c"]


def test_levels_that_the_sketch_forgot_are_no_surprise():
    rng = np.random.default_rng(2)
    # 70 % of the rows share ten levels, the others have more than the sketch can hold.
    values = np.where(rng.uniform(size=400_000) < 0.7, rng.integers(0, 10, 400_000), rng.integers(10, 10**6, 400_000))
    schema = infer_column([f"v{i}" for i in values])
    feature = next(f for f in schema.features if f.name == "c")
    fresh = feature.codes(pa.chunked_array([[f"new{i}" for i in range(10)]]))
    assert (fresh == 0).all()
    known = sum(feature.counts) / len(values)
    assert feature.unseen == pytest.approx(1 - known, abs=0.01)
    assert feature.code_nll[0] < 3
