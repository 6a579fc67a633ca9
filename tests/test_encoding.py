import datetime as dt
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_model.encoding import encode
from vae_model.schema import choose_kinds, infer_schema
from vae_model.statistics import TableStatistics

TEXT = pa.string()
VIEWS = ("standard", "quantile")


def schema_of(table):
    kinds, passthrough = choose_kinds(table.schema)
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    return infer_schema(statistics, table.schema, passthrough)


def training_table(n=60):
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "i": rng.integers(0, 5, n),
            "x": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.2),
            "d": pa.array(rng.integers(0, 90, n), pa.duration("s")),
            "t": pa.array(rng.integers(0, 365 * 86_400, n) * 1_000_000, pa.timestamp("us")),
            "c": pa.array(rng.choice(["a", "b", "c"], n), mask=rng.random(n) < 0.2),
            "b": pa.array(rng.random(n) < 0.5),
            "seven": [7.0] * n,
            "same": ["x"] * n,
            "nothing": pa.nulls(n, TEXT),
        }
    )


TRAINING = training_table()
SCHEMA = schema_of(TRAINING)


def rows(n=3, **changes):
    """Rows like the training rows, some columns replaced (None: left out)."""
    table = TRAINING.slice(0, n)
    for name, values in changes.items():
        place = table.schema.get_field_index(name)
        if values is None:
            table = table.remove_column(place)
        else:
            column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
            table = table.set_column(place, name, column)
    return table


def encoded(**changes):
    n = max((len(values) for values in changes.values() if values is not None), default=3)
    return encode(rows(n, **changes), SCHEMA, VIEWS)


def place(name):
    return SCHEMA.names.index(name)


def reasons(found):
    return [(line["row"], line["column"], line["error_type"]) for line in found.rejects.table().to_pylist()]


# ---- what the network reads --------------------------------------------------------------------


def test_inputs_have_a_place_for_every_feature():
    inputs = encode(TRAINING, SCHEMA, VIEWS).inputs
    shapes = {name: (values.shape[1], values.dtype.name) for name, values in inputs.items()}
    assert shapes == {
        "numbers": (2 * 3, "float32"),
        "angles": (3, "float32"),
        "categories": (2, "int32"),
        "present": (9, "float32"),
        "fixed_nll": (9, "float32"),
    }


def test_numbers_stand_view_by_view():
    numbers = encode(TRAINING, SCHEMA, VIEWS).inputs["numbers"]
    i = TRAINING.column("i").to_numpy()
    np.testing.assert_allclose(numbers[:, 0], (i - i.mean()) / i.std(), atol=1e-6)
    # The quantile view of the same column: as its values rise, and three columns on.
    assert [np.unique(numbers[i == value, 3]).size for value in range(5)] == [1] * 5
    assert (np.diff([numbers[i == value, 3][0] for value in range(5)]) > 0).all()


def test_a_single_view_is_encoded_alone():
    both = encode(TRAINING, SCHEMA, VIEWS).inputs["numbers"]
    np.testing.assert_array_equal(encode(TRAINING, SCHEMA, ("quantile",)).inputs["numbers"], both[:, 3:])


def test_rows_of_a_long_table_are_encoded_as_alone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=10_000)
    x[[5_000, 9_999]] = np.nan  # the first block of rows is complete, later ones are not
    table = TRAINING.take(pa.array(rng.integers(0, 60, 10_000))).set_column(1, "x", pa.array(x))
    whole = encode(table, SCHEMA, VIEWS)
    for start in range(0, 10_000, 500):
        for name, values in encode(table.slice(start, 500), SCHEMA, VIEWS).inputs.items():
            np.testing.assert_array_equal(whole.inputs[name][start : start + 500], values, err_msg=name)


def test_categories_are_numbered_from_one_by_frequency():
    found = encode(TRAINING, SCHEMA, VIEWS).inputs["categories"][:, 0]
    values = TRAINING.column("c").to_pylist()
    ranked = sorted("abc", key=lambda level: (-values.count(level), level))
    np.testing.assert_array_equal(found, [ranked.index(value) + 1 if value else 0 for value in values])


def test_times_are_encoded_as_angles_of_their_day():
    angles = encoded(t=pa.array([dt.datetime(2024, 1, 1, 6), dt.datetime(2024, 1, 1, 18)], pa.timestamp("ms"))).inputs
    np.testing.assert_allclose(angles["angles"][:, 0], [math.pi / 2, 3 * math.pi / 2], rtol=1e-6)


@pytest.mark.parametrize("name", ["i", "x", "t", "c", "b", "seven", "same", "nothing"])
def test_a_missing_cell_is_marked_and_its_input_is_empty(name):
    found = encoded(**{name: pa.nulls(3, SCHEMA.arrow_type(name))})
    assert len(found.rejects) == 0
    np.testing.assert_array_equal(found.inputs["present"][:, place(name)], 0)
    if name in ("i", "x"):
        column = ["i", "x", "d"].index(name)
        np.testing.assert_array_equal(found.inputs["numbers"][:, [column, column + 3]], 0)
    if name == "c":
        np.testing.assert_array_equal(found.inputs["categories"][:, 0], 0)


def test_nan_is_missing():
    found = encoded(x=[math.nan, 0.5, None])
    assert found.inputs["present"][:, place("x")].tolist() == [0, 1, 0]
    assert len(found.rejects) == 0


# ---- the nats that no latent moves -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [("seven", 7.0, 8.0), ("same", "x", "y")],
)
def test_same_other_and_missing_of_a_constant_have_probability_one_in_all(name, same, other):
    kind = pa.float64() if name == "seven" else TEXT
    nll = encoded(**{name: pa.array([same, other, None], kind)}).inputs["fixed_nll"][:, place(name)]
    assert np.exp(-nll.astype(np.float64)).sum() == pytest.approx(1, rel=1e-5)
    assert nll[0] < 0.1 < 3 < nll[1]


def test_presence_in_a_column_that_was_always_missing_is_strange_and_its_value_costs_nothing_more():
    nll = encoded(nothing=pa.array(["y", "z", None], TEXT)).inputs["fixed_nll"][:, place("nothing")]
    assert np.exp(-nll[1:].astype(np.float64)).sum() == pytest.approx(1, rel=1e-5)
    assert nll[0] == nll[1] > 3 > nll[2]


def test_a_constant_number_is_recognised_whatever_its_type():
    for column in (pa.array([7], pa.int8()), pa.array(["7.00"]), pa.array([7.0], pa.float32())):
        nll = encoded(seven=column).inputs["fixed_nll"][0, place("seven")]
        assert nll < 0.1


def test_a_category_never_seen_costs_its_good_turing_mass_and_is_no_error():
    found = encoded(c=["a", "never seen", "B"])
    assert len(found.rejects) == 0
    feature = SCHEMA.learned_categories[0]
    assert found.inputs["categories"][:, 0].tolist() == [1 + feature.levels.index("a"), 0, 0]
    np.testing.assert_allclose(found.inputs["fixed_nll"][1:, place("c")], -math.log(feature.unseen), rtol=1e-6)


def test_a_column_never_missing_pays_for_being_missing():
    nll = encoded(i=pa.array([1, None])).inputs["fixed_nll"][:, place("i")]
    assert np.exp(-nll.astype(np.float64)) == pytest.approx([61 / 62, 1 / 62], rel=1e-5)


def test_a_columns_missingness_that_is_learned_costs_nothing_here():
    assert encoded(x=[0.5, None]).inputs["fixed_nll"][:, place("x")].tolist() == [0, 0]


# ---- rows that cannot be scored ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("x", [math.inf, 1.0, -math.inf], [(0, "x", "not_finite"), (2, "x", "not_finite")]),
        ("x", ["1.5", "oops", "inf"], [(1, "x", "wrong_type"), (2, "x", "not_finite")]),
        ("x", [dt.date(2024, 1, 1), None], [(0, "x", "wrong_type")]),
        ("i", [[1], None], [(0, "i", "wrong_type")]),
        ("t", [5, None], [(0, "t", "wrong_type")]),
        ("t", ["2024-01-01", "soon"], [(1, "t", "wrong_type")]),
        ("seven", [math.inf, 7.0], [(0, "seven", "not_finite")]),
        ("seven", ["7", "x"], [(1, "seven", "wrong_type")]),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_rejected_and_no_others(name, values, expected):
    assert reasons(encoded(**{name: values})) == expected


def test_reasons_say_column_wanted_and_got():
    found = encoded(x=["1.5", "oops"])
    assert found.rejects.reasons[0].error == "x: expected a number, got 'oops'"
    found = encoded(t=["soon"])
    assert found.rejects.reasons[0].error == "t: expected a time, got 'soon'"


@pytest.mark.parametrize("name", TRAINING.column_names)
def test_a_missing_column_rejects_every_row(name):
    found = encoded(**{name: None})
    assert reasons(found) == [(row, name, "missing_column") for row in range(3)]


def test_a_repeated_column_rejects_every_row():
    table = rows().append_column("x", pa.array([1.0, 2.0, 3.0]))
    found = encode(table, SCHEMA, VIEWS)
    assert reasons(found) == [(row, "x", "duplicate_column") for row in range(3)]
    assert found.rejects.reasons[0].error == "x: expected the column once, got it 2 times"


def test_columns_that_the_model_does_not_know_are_ignored():
    table = rows().append_column("new", pa.array([[1], [2], [3]])).append_column("new", pa.array([1, 2, 3]))
    assert len(encode(table, SCHEMA, VIEWS).rejects) == 0


# ---- the same cells in another guise -----------------------------------------------------------


def assert_same(a, b):
    for name in a.inputs:
        np.testing.assert_array_equal(a.inputs[name], b.inputs[name], err_msg=name)
    np.testing.assert_array_equal(a.rejects.keep, b.rejects.keep)


def test_the_order_of_columns_does_not_matter():
    assert_same(encode(TRAINING.select(TRAINING.column_names[::-1]), SCHEMA, VIEWS), encode(TRAINING, SCHEMA, VIEWS))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("i", pa.float64()),
        ("i", pa.uint8()),
        ("i", TEXT),
        ("i", pa.decimal128(20, 3)),
        ("c", pa.large_string()),
        ("c", pa.string_view()),
        ("c", pa.dictionary(pa.int8(), TEXT)),
        ("t", pa.timestamp("s")),
        ("t", pa.timestamp("ns")),
        ("d", pa.duration("ns")),
        ("d", pa.duration("ms")),
    ],
    ids=str,
)
def test_the_type_that_holds_a_value_does_not_matter(name, kind):
    column = TRAINING.column(name)
    if pa.types.is_decimal(kind):
        column = column.cast(pa.decimal128(20, 0))
    changed = TRAINING.set_column(TRAINING.schema.get_field_index(name), name, column.cast(kind))
    assert_same(encode(changed, SCHEMA, VIEWS), encode(TRAINING, SCHEMA, VIEWS))


@pytest.mark.parametrize("values", [["true", "1", None, "a"], ["x", None, "", "nan"]])
@pytest.mark.parametrize("name", ["c", "b", "same"])
def test_text_in_a_dictionary_is_read_as_plain_text(name, values):
    plain, dictionary = pa.array(values), pa.DictionaryArray.from_arrays([0, 1, 2, 3], values)
    assert_same(encoded(**{name: plain}), encoded(**{name: dictionary}))


def test_dictionaries_of_several_chunks_keep_their_own_levels():
    chunks = pa.chunked_array([pa.array(part).dictionary_encode() for part in (["b", "a"], [None, "z"], ["a", "c"])])
    assert_same(encoded(c=chunks), encoded(c=["b", "a", None, "z", "a", "c"]))


def test_zoned_times_are_read_by_the_clock_of_the_training_tables_zone():
    instants = pa.array([dt.datetime(2024, 1, 1, h, tzinfo=dt.UTC) for h in range(20)], pa.timestamp("us", "UTC"))
    tokyo = instants.cast(pa.timestamp("us", "Asia/Tokyo"))
    table = pa.table({"t": tokyo, "x": np.arange(20) % 3})
    schema = schema_of(table)
    assert_same(encode(table.set_column(0, "t", instants), schema, VIEWS), encode(table, schema, VIEWS))
    np.testing.assert_allclose(encode(table, schema, VIEWS).inputs["angles"][0, 0], 2 * math.pi * 9 / 24, rtol=1e-6)


def test_a_table_without_rows_is_encoded():
    found = encode(TRAINING.slice(0, 0), SCHEMA, VIEWS)
    assert {len(values) for values in found.inputs.values()} == {0}
    assert len(found.rejects) == 0


def test_rows_are_taken_by_number_or_mask():
    found = encode(TRAINING, SCHEMA, VIEWS)
    by_number, by_mask = found.take(np.array([1, 3])), found.take(np.isin(np.arange(60), [1, 3]))
    for name, values in found.inputs.items():
        np.testing.assert_array_equal(by_number[name], values[[1, 3]])
        np.testing.assert_array_equal(by_mask[name], by_number[name])


# ---- any table ---------------------------------------------------------------------------------

WILD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -1e-310, 1e300, -1.7e308, 1.0, 7.0, None]
NUMBER_TEXTS = ["1", "-2.5", " 3 ", "1e5", "nan", "inf", "x", "", "1,5", "7", None]
TIME_TEXTS = ["2024-01-01", "1600-02-29T23:59:59", "9999-12-31", "2024-02-30", "x", "", None]


def says_missing(cell):
    """Whether a cell says that there is no value."""
    return cell is None or (isinstance(cell, str) and cell.strip().lower() in ("", "na", "n/a", "#n/a", "null", "none"))


def fits_number(cell):
    """Whether a cell can be scored as a number."""
    if says_missing(cell):
        return True
    try:
        return not math.isinf(float(cell))
    except ValueError:
        return False


def fits_time(cell):
    try:
        return says_missing(cell) or bool(dt.datetime.fromisoformat(cell))
    except ValueError:
        return False


def cells(values, kind, fits):
    """Columns of n cells with what each of them should come to."""
    return lambda n: st.lists(values, min_size=n, max_size=n).map(
        lambda drawn: (pa.array(drawn, kind, from_pandas=False), [fits(cell) for cell in drawn])
    )


def anything(cell):
    return True


FLOATS = cells(st.sampled_from(WILD) | st.floats(), pa.float64(), fits_number)
FLOAT_LEVELS = cells(st.sampled_from(WILD), pa.float64(), anything)  # "inf" is a level like another
INTEGERS = cells(st.none() | st.integers(-(2**63), 2**63 - 1), pa.int64(), anything)
NUMBERS_IN_TEXT = cells(st.sampled_from(NUMBER_TEXTS), TEXT, fits_number)
DATES = cells(st.none() | st.dates(), pa.date32(), anything)
TIMES = cells(st.none() | st.datetimes(), pa.timestamp("us"), anything)
TIMES_IN_TEXT = cells(st.sampled_from(TIME_TEXTS), TEXT, fits_time)
LEVELS = cells(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), TEXT, anything)
FLAGS = cells(st.none() | st.booleans(), pa.bool_(), anything)
NOTHING = cells(st.none(), pa.null(), anything)
NOT_A_NUMBER = cells(st.none() | st.dates(), pa.date32(), lambda cell: cell is None)
NOT_A_TIME = cells(st.none() | st.floats(allow_nan=False), pa.float64(), lambda cell: cell is None)

COLUMNS = {
    "i": [INTEGERS, FLOATS, NUMBERS_IN_TEXT, FLAGS, NOTHING, NOT_A_NUMBER],
    "x": [FLOATS, INTEGERS, NUMBERS_IN_TEXT, NOT_A_NUMBER],
    "t": [TIMES, DATES, TIMES_IN_TEXT, NOTHING, NOT_A_TIME],
    "c": [LEVELS, FLOAT_LEVELS, INTEGERS, FLAGS, DATES],
    "b": [FLAGS, LEVELS, INTEGERS],
    "seven": [FLOATS, INTEGERS, NUMBERS_IN_TEXT, NOT_A_NUMBER],
    "same": [LEVELS, FLOAT_LEVELS, TIMES],
    "nothing": [LEVELS, NOTHING],
}


@st.composite
def tables(draw):
    """A table, and whether each of its rows can be scored."""
    n = draw(st.integers(0, 6))
    columns, fits = {"d": pa.array([5] * n, pa.duration("s"))}, np.ones(n, bool)
    for name, choices in COLUMNS.items():
        columns[name], fitting = draw(draw(st.sampled_from(choices))(n))
        fits &= np.array(fitting, bool)
    return pa.table(columns), fits


@given(tables())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_table_is_encoded_and_just_the_rows_that_do_not_fit_are_rejected(drawn):
    table, fits = drawn
    found = encode(table, SCHEMA, VIEWS)
    np.testing.assert_array_equal(found.rejects.keep, fits)
    for name, values in found.take(found.rejects.keep).items():
        assert np.isfinite(values).all(), name
        assert np.abs(values).max(initial=0) < 1e5, name
    assert set(np.unique(found.inputs["present"])) <= {0, 1}
    assert (found.inputs["categories"] <= [feature.num_classes for feature in SCHEMA.learned_categories]).all()


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_neither_the_order_of_rows_nor_their_chunks_matter(drawn, random):
    table, _ = drawn
    whole = encode(table, SCHEMA, VIEWS)
    order = np.array(random.sample(range(table.num_rows), table.num_rows), np.int64)
    shuffled = pa.concat_tables([table.take(order).slice(at, 2) for at in range(0, max(len(order), 1), 2)])
    found = encode(shuffled, SCHEMA, VIEWS)
    np.testing.assert_array_equal(found.rejects.keep, whole.rejects.keep[order])
    keep = found.rejects.keep
    for name, values in whole.inputs.items():
        np.testing.assert_array_equal(found.inputs[name][keep], values[order][keep], err_msg=name)


@pytest.mark.parametrize(
    ("trained", "later"),
    [
        (pa.array([True, False] * 50), pa.array([1, 0] * 50, pa.int8())),
        (pa.array([1, 2] * 50), pa.array([1.0, 2.0] * 50)),
        (pa.array([0.1] * 100, pa.float32()), pa.array([0.1] * 100, pa.float64())),
    ],
)
def test_the_same_levels_in_another_type_are_the_same_levels(trained, later):
    x = np.random.default_rng(0).normal(size=100)
    table = pa.table({"c": trained, "x": x})
    kinds, carried = choose_kinds(table.schema, categorical=["c"] if trained.type == pa.int64() else [])
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    schema = infer_schema(statistics, table.schema, carried)
    then = encode(table, schema, ("standard",))
    now = encode(pa.table({"c": later, "x": x}), schema, ("standard",))
    np.testing.assert_array_equal(then.codes["c"], now.codes["c"])
    assert (now.codes["c"] > 0).all()
