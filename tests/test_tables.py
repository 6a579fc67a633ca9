import datetime as dt
import decimal
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_model.tables import (
    BLOCK_ROWS,
    MemoryTables,
    ParquetTables,
    RecordError,
    Rejects,
    as_levels,
    as_numbers,
    as_times,
    cast_cells,
    conform,
    example,
    from_frame,
    open_tables,
    rechunk,
)

TEXT = pa.string()
DICTIONARY = pa.dictionary(pa.int8(), TEXT)


def column(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


def microseconds(text):
    return int(np.datetime64(text, "us").astype(np.int64))


# ---- what a model reads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 200], pa.uint8(), [1, math.nan, 200]),
        ([2**64 - 1], pa.uint64(), [2.0**64]),
        ([2**53 + 1], pa.int64(), [2.0**53]),
        ([1.5, math.nan, None], pa.float16(), [1.5, math.nan, math.nan]),
        ([0.1], pa.float32(), [float(np.float32(0.1))]),
        ([decimal.Decimal("-1.25"), None], pa.decimal128(20, 2), [-1.25, math.nan]),
        ([decimal.Decimal("1e60")], pa.decimal256(70, 0), [1e60]),
        ([dt.timedelta(milliseconds=1500), None], pa.duration("ms"), [1500, math.nan]),
        ([True, False, None], pa.bool_(), [1, 0, math.nan]),
        ([None, None], pa.null(), [math.nan, math.nan]),
        (["1", " 2.5 ", "-3e2", "+4", "NaN", None], TEXT, [1, 2.5, -300, 4, math.nan, math.nan]),
        (["0.1"], pa.large_string(), [0.1]),
        (["0.1"], pa.string_view(), [0.1]),
        (["7", "7", None], DICTIONARY, [7, 7, math.nan]),
        (["inf", "-Infinity", "1e400"], TEXT, [math.inf, -math.inf, math.inf]),
    ],
    ids=str,
)
def test_numbers_of_every_type(values, kind, expected):
    numbers, bad = as_numbers(column(values, kind))
    assert numbers.dtype == np.float64
    np.testing.assert_array_equal(numbers, expected)
    assert len(bad) == 0


@pytest.mark.parametrize(
    ("values", "kind", "rows"),
    [
        (["1", "one", "", None, "0x10", "1,5"], TEXT, [1, 4, 5]),
        ([dt.date(2024, 1, 1), None], pa.date32(), [0]),
        ([None, dt.datetime(2024, 1, 1)], pa.timestamp("us", "UTC"), [1]),
        ([[1.0], None], pa.list_(pa.float64()), [0]),
        ([{"a": 1}], pa.struct([("a", pa.int64())]), [0]),
    ],
    ids=str,
)
def test_cells_that_are_no_numbers_are_told(values, kind, rows):
    numbers, bad = as_numbers(column(values, kind))
    assert bad.tolist() == rows
    assert np.isnan(numbers[rows]).all()


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None], pa.int8(), ["1", None]),
        ([2**64 - 1], pa.uint64(), ["18446744073709551615"]),
        ([3.0, 2.5, math.nan, None], pa.float64(), ["3", "2.5", None, None]),
        ([3.0, math.nan], pa.float16(), ["3", None]),
        ([True, False, None], pa.bool_(), ["true", "false", None]),
        ([decimal.Decimal("1.50")], pa.decimal128(5, 2), ["1.50"]),
        ([dt.date(2024, 1, 2)], pa.date32(), ["2024-01-02"]),
        ([dt.timedelta(seconds=3)], pa.duration("s"), ["3"]),
        (["a", "", None], pa.large_string(), ["a", "", None]),
        (["a", "nan", None], pa.string_view(), ["a", "nan", None]),
        (["a", "b", None], DICTIONARY, ["a", "b", None]),
        ([None], pa.null(), [None]),
        ([["a"], None], pa.list_(TEXT), ["['a']", None]),
        ([b"a", None], pa.binary(), ["a", None]),
        ([b"\xff", None], pa.binary(), ["b'\\xff'", None]),
    ],
    ids=str,
)
def test_levels_of_every_type(values, kind, expected):
    assert as_levels(column(values, kind)).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([dt.datetime(2024, 1, 1, 5)], pa.timestamp("s"), microseconds("2024-01-01T05")),
        ([1_704_085_200_000_000_999], pa.timestamp("ns"), microseconds("2024-01-01T05")),
        ([dt.datetime(1901, 1, 1)], pa.timestamp("ms"), microseconds("1901-01-01")),
        # A zone's wall clock, in winter and in summer, and of a fixed offset.
        ([dt.datetime(2024, 1, 1, 17, tzinfo=dt.UTC)], pa.timestamp("us", "America/New_York"), "2024-01-01T12"),
        ([dt.datetime(2024, 7, 1, 17, tzinfo=dt.UTC)], pa.timestamp("us", "America/New_York"), "2024-07-01T13"),
        ([dt.datetime(2024, 7, 1, 17, tzinfo=dt.UTC)], pa.timestamp("ns", "+05:30"), "2024-07-01T22:30"),
        ([dt.date(2024, 2, 29)], pa.date32(), "2024-02-29"),
        ([dt.date(2024, 2, 29)], pa.date64(), "2024-02-29"),
        ([dt.time(13, 30)], pa.time32("s"), "1970-01-01T13:30"),
        ([dt.time(13, 30)], pa.time64("ns"), "1970-01-01T13:30"),
        (["2024-01-01T05:00:00"], TEXT, "2024-01-01T05"),
        (["2024-01-01 05:00:00.5"], pa.string_view(), "2024-01-01T05:00:00.5"),
        (["2024-01-01T05:00:00+02:00"], TEXT, "2024-01-01T03"),
        (["9999-12-31"], TEXT, "9999-12-31"),
        (["2024-01-01"], DICTIONARY, "2024-01-01"),
    ],
    ids=str,
)
def test_times_of_every_type(values, kind, expected):
    found, present, bad = as_times(column([*values, None], kind))
    expected = microseconds(expected) if isinstance(expected, str) else expected
    assert found.tolist() == [expected, 0]
    assert present.tolist() == [True, False]
    assert len(bad) == 0


@pytest.mark.parametrize(
    ("values", "kind", "rows"),
    [
        (["2024-01-01", "2024-02-30", "noon", "", None], TEXT, [1, 2]),
        ([5, None], pa.int64(), [0]),
        ([[1]], pa.list_(pa.int64()), [0]),
        ([2**31 - 1, 0], pa.int32(), [0, 1]),
    ],
    ids=str,
)
def test_cells_that_are_no_times_are_told(values, kind, rows):
    _, present, bad = as_times(column(values, kind))
    assert bad.tolist() == rows
    assert not present[rows].any()


def test_times_beyond_what_microseconds_hold_are_no_times():
    days = column([0, 2**31 - 1], pa.int32()).cast(pa.date32())
    times, present, bad = as_times(days)
    assert (times[0], present.tolist(), bad.tolist()) == (0, [True, False], [1])
    assert example(days, bad) == str(2**31 - 1)


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.float16(), TEXT, pa.string_view(), DICTIONARY, pa.timestamp("ns", "UTC"), pa.date32(), pa.null()],
    ids=str,
)
@pytest.mark.parametrize("chunks", [0, 1])
def test_columns_without_rows_are_read(kind, chunks):
    empty = pa.chunked_array([pa.array([], kind)] * chunks, kind)
    assert [len(part) for part in as_numbers(empty)] == [0, 0]
    assert len(as_levels(empty)) == 0
    assert [len(part) for part in as_times(empty)] == [0, 0, 0]


def test_chunked_columns_are_read_like_whole_ones():
    chunks = pa.chunked_array([["1", "x"], [], [None, "2.0"]], TEXT)
    numbers, bad = as_numbers(chunks)
    np.testing.assert_array_equal(numbers, [1, math.nan, math.nan, 2])
    assert bad.tolist() == [1]
    assert as_levels(chunks).to_pylist() == ["1", "x", None, "2.0"]
    assert as_times(chunks)[2].tolist() == [0, 1, 3]


# ---- casts, cell by cell -----------------------------------------------------------------------


def cast(values, kind, wanted):
    """What becomes of the cells, and the rows told."""
    cells, bad = cast_cells(column(values, kind), wanted)
    assert cells.type == wanted
    return cells.to_pylist(), bad.tolist()


CASTS = [
    (["1.5", "nan", "x"], TEXT, pa.float64(), [1.5, math.nan, None], [2]),
    (["1", " 2 ", "+3", "4.0", "4.5", "x", "0x5"], TEXT, pa.int64(), [1, 2, 3, 4, None, None, None], [4, 5, 6]),
    (["300", "-1", "9" * 80], TEXT, pa.uint8(), [None, None, None], [0, 1, 2]),
    ([1.0, 2.5, math.nan, math.inf, 1e300, 2.0**63], pa.float64(), pa.int64(), [1, *[None] * 5], [1, 3, 4, 5]),
    ([300, -1, 255], pa.int64(), pa.uint8(), [None, None, 255], [0, 1]),
    ([1.0, 2.5], pa.float16(), pa.int8(), [1, None], [1]),
    (["1.25", "1.255", "x"], TEXT, pa.decimal128(10, 2), [decimal.Decimal("1.25"), None, None], [1, 2]),
    ([1, 10**9], pa.int64(), pa.decimal128(10, 2), [decimal.Decimal("1.00"), None], [1]),
    ([1.25, 1e300], pa.float64(), pa.decimal128(10, 2), [decimal.Decimal("1.25"), None], [1]),
    ([True], pa.bool_(), pa.decimal128(3, 0), [decimal.Decimal(1)], []),
    (["TRUE", "0", "yes", None], TEXT, pa.bool_(), [True, False, None, None], [2]),
    (["2024-01-01", "9999-12-31", "soon"], TEXT, pa.date32(), [dt.date(2024, 1, 1), dt.date(9999, 12, 31), None], [2]),
    (["2024-01-01T05:00"], TEXT, pa.date32(), [dt.date(2024, 1, 1)], []),
    (["13:30:00", "13:30", "25:00", "x"], TEXT, pa.time32("s"), [dt.time(13, 30), dt.time(13, 30), None, None], [2, 3]),
    (["3", "x"], TEXT, pa.duration("s"), [dt.timedelta(seconds=3), None], [1]),
    ([3], pa.int32(), pa.duration("s"), [dt.timedelta(seconds=3)], []),
    ([1500], pa.timestamp("ns"), pa.timestamp("us"), [dt.datetime(1970, 1, 1, 0, 0, 0, 1)], []),
    ([1999], pa.duration("ms"), pa.duration("s"), [dt.timedelta(seconds=1)], []),
    ([0, 253_402_214_400], pa.timestamp("s"), pa.timestamp("ns"), [pd.Timestamp(0), None], [1]),
    ([1, None], pa.int64(), DICTIONARY, ["1", None], []),
    (["a", "b"], pa.large_string(), DICTIONARY, ["a", "b"], []),
    (["a"], DICTIONARY, pa.string_view(), ["a"], []),
    ([b"a", b"\xff"], pa.binary(), TEXT, ["a", None], [1]),
    ([[1], None], pa.list_(pa.int64()), pa.float64(), [None, None], [0]),
    ([1.5], pa.float64(), pa.timestamp("us"), [None], [0]),
    ([None, None], pa.null(), pa.int64(), [None, None], []),
]


@pytest.mark.parametrize(("values", "kind", "wanted", "expected", "rows"), CASTS, ids=str)
def test_cells_that_cannot_be_cast_are_told_and_the_others_are_cast(values, kind, wanted, expected, rows):
    cells, bad = cast(values, kind, wanted)
    np.testing.assert_equal(cells, expected)
    assert bad == rows


@pytest.mark.parametrize(("values", "kind", "wanted", "expected", "rows"), CASTS, ids=str)
def test_what_becomes_of_a_cell_does_not_depend_on_its_neighbours(values, kind, wanted, expected, rows):
    alone = [cast([value], kind, wanted) for value in values]
    np.testing.assert_equal([cells[0] for cells, _ in alone], expected)
    assert [row for row, (_, bad) in enumerate(alone) if bad] == rows


def test_a_zone_is_given_to_text_without_one_as_utc():
    wanted = pa.timestamp("us", "America/New_York")
    cells, bad = cast(["2024-01-01T12:00:00", "2024-01-01T12:00:00+01:00"], TEXT, wanted)
    assert [cell.astimezone(dt.UTC).hour for cell in cells] == [12, 11]
    assert bad == []


def test_one_bad_cell_among_many_is_found():
    values = np.arange(50_000)
    values[31_337] = 2**40
    cells, bad = cast_cells(column(values), pa.int32())
    assert bad.tolist() == [31_337]
    np.testing.assert_array_equal(np.delete(cells.drop_null().to_numpy(), []), np.delete(values, 31_337))


# ---- conform and Rejects -----------------------------------------------------------------------

SCHEMA = pa.schema([("x", pa.int64()), ("s", TEXT)])


def test_a_table_is_given_the_schemas_columns_and_types():
    table = pa.table({"extra": [1.0], "s": pa.array(["a"], pa.large_string()), "x": ["7"]})
    conformed, rejects = conform(table, SCHEMA)
    assert conformed.schema == SCHEMA
    assert conformed.to_pylist() == [{"x": 7, "s": "a"}]
    assert len(rejects) == 0


def test_an_absent_column_is_null_unless_it_is_required():
    table = pa.table({"x": [1, 2]})
    conformed, rejects = conform(table, SCHEMA)
    assert conformed.column("s").null_count == 2
    assert len(rejects) == 0
    _, rejects = conform(table, SCHEMA, required=["s"])
    assert rejects.table().to_pylist()[1] == {
        "row": 1,
        "column": "s",
        "error_type": "missing_column",
        "error": "s: the table has no such column",
    }


def test_a_repeated_column_rejects_every_row():
    _, rejects = conform(pa.table([[1, 2], [3, 4]], names=["x", "x"]), SCHEMA)
    assert rejects.keep.tolist() == [False, False]
    assert rejects.reasons[0].error_type == "duplicate_column"


def test_a_cell_of_another_type_rejects_its_row_only():
    conformed, rejects = conform(pa.table({"x": ["1", "one", "3"], "s": ["a", "b", "c"]}), SCHEMA)
    assert conformed.column("x").to_pylist() == [1, None, 3]
    assert rejects.table().to_pylist() == [
        {"row": 1, "column": "x", "error_type": "wrong_type", "error": "x: expected int64, got 'one'"}
    ]


def test_a_table_without_rows_conforms():
    conformed, rejects = conform(pa.table({"x": pa.array([], TEXT)}), SCHEMA, required=["s"])
    assert (conformed.num_rows, conformed.schema, len(rejects)) == (0, SCHEMA, 0)
    assert rejects.table().num_rows == 0


def test_a_row_keeps_the_first_reason_found_and_every_reason_its_count():
    rejects = Rejects(4)
    rejects.add(np.array([1, 2]), "x", "wrong_type", "first")
    rejects.add(np.array([False, False, True, True]), "s", "not_finite", "second")
    assert rejects.table().column("error").to_pylist() == ["x: first", "x: first", "s: second"]
    assert len(rejects) == 3
    assert rejects.summary() == "3 of 4 rows do not fit: x: first (2 rows); s: second (2 rows). First rows: 1, 2, 3"


def test_an_example_is_short():
    assert len(example(column(["x" * 1000]), np.array([0]))) == 60


# ---- DataFrames --------------------------------------------------------------------------------


def test_a_frames_index_is_left_out():
    table = from_frame(pd.DataFrame({"a": [1, 2]}, index=[7, 7]))
    assert table.to_pydict() == {"a": [1, 2]}


def test_mixed_objects_become_text_and_missing_ones_stay_missing():
    table = from_frame(pd.DataFrame({"a": pd.Series([1, "x", None, math.nan, 2.5], dtype=object)}))
    assert table.column("a").to_pylist() == ["1", "x", None, None, "2.5"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([2**70, 1], [str(2**70), "1"]),
        ([1j], ["1j"]),
        (pd.Categorical([1, "x", None]), ["1", "x", None]),
    ],
    ids=["integers beyond 64 bits", "complex", "mixed categories"],
)
def test_what_arrow_does_not_know_becomes_text(values, texts):
    assert from_frame(pd.DataFrame({"a": values})).column("a").to_pylist() == texts


def test_pandas_types_become_arrows():
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None], "Int64"),
            "b": pd.array([True, None], "boolean"),
            "c": pd.Categorical(["a", None]),
            "t": pd.to_datetime(["2024-01-01", None]),
            "f": [1.5, math.nan],
        }
    )
    table = from_frame(frame)
    assert [column.null_count for column in table.columns] == [1] * 5
    assert [str(table.schema.field(name).type) for name in "ibt"] == ["int64", "bool", "timestamp[ns]"]
    assert pa.types.is_dictionary(table.schema.field("c").type)


@pytest.mark.parametrize("names", [["a", "a"], [1, "1"]])
def test_a_frame_with_a_repeated_column_is_refused(names):
    with pytest.raises(RecordError, match=rf"{names[0]}: expected each column once, got it twice"):
        from_frame(pd.DataFrame([[1, 2]], columns=names))


def test_an_empty_frame_is_an_empty_table():
    assert from_frame(pd.DataFrame({"a": []})).num_rows == 0
    assert from_frame(pd.DataFrame()).num_columns == 0


# ---- reading in blocks -------------------------------------------------------------------------


def write(path, table, **options):
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, path, **options)
    return str(path)


def read_all(tables, columns=None, blocks=None):
    return pa.concat_tables([table for _, table in tables.scan(columns, blocks)])


def test_row_groups_of_all_files_are_blocks_in_order(tmp_path):
    write(tmp_path / "a.parquet", {"x": range(10)}, row_group_size=4)
    write(tmp_path / "b.parquet", {"x": range(10, 15)})
    tables = ParquetTables(str(tmp_path))
    assert tables.num_rows == 15
    assert [(block.start, block.num_rows) for block in tables.blocks] == [(0, 4), (4, 4), (8, 2), (10, 5)]
    for block in tables.blocks:
        expected = list(range(block.start, block.start + block.num_rows))
        assert read_all(tables, blocks=[block]).column("x").to_pylist() == expected


def test_only_the_columns_asked_for_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", {"x": [1], "y": [2], "z": [3]})
    tables = ParquetTables(path)
    assert read_all(tables, ["z", "x"]).to_pylist() == [{"z": 3, "x": 1}]


def test_files_of_different_number_types_are_read_as_the_wider_one(tmp_path):
    write(tmp_path / "a.parquet", {"x": pa.array([1, 2], pa.int32()), "y": pa.nulls(2)})
    write(tmp_path / "b.parquet", {"y": ["s"], "x": [0.5]})
    tables = ParquetTables(str(tmp_path))
    assert tables.schema == pa.schema([("x", pa.float64()), ("y", TEXT)])
    assert read_all(tables).to_pydict() == {"x": [1.0, 2.0, 0.5], "y": [None, None, "s"]}


def test_columns_of_later_files_beyond_the_first_are_dropped(tmp_path):
    write(tmp_path / "a.parquet", {"x": [1]})
    write(tmp_path / "b.parquet", {"new": ["s"], "x": [2]})
    assert read_all(ParquetTables(str(tmp_path))).to_pydict() == {"x": [1, 2]}


def test_a_missing_column_is_named_with_its_file(tmp_path):
    write(tmp_path / "a.parquet", {"x": [1], "y": [1]})
    write(tmp_path / "b.parquet", {"x": [2]})
    with pytest.raises(RecordError, match=r"y: .*b\.parquet has no such column, .*a\.parquet has"):
        ParquetTables(str(tmp_path))


def test_files_of_clashing_types_are_refused_with_both_named(tmp_path):
    write(tmp_path / "a.parquet", {"x": [1]})
    write(tmp_path / "b.parquet", {"x": ["s"]})
    with pytest.raises(RecordError, match=r"x: expected int64 as in .*a\.parquet, got string in .*b\.parquet"):
        ParquetTables(str(tmp_path))


def test_dictionaries_of_different_widths_are_read(tmp_path):
    write(tmp_path / "a.parquet", {"c": pa.array(["a"]).dictionary_encode().cast(pa.dictionary(pa.int8(), TEXT))})
    write(tmp_path / "b.parquet", {"c": pa.array(["b"]).dictionary_encode().cast(pa.dictionary(pa.int32(), TEXT))})
    assert as_levels(read_all(ParquetTables(str(tmp_path))).column("c")).to_pylist() == ["a", "b"]


@pytest.mark.parametrize("other", [pa.large_string(), pa.string_view(), DICTIONARY], ids=str)
def test_files_with_text_in_different_layouts_are_read(tmp_path, other):
    write(tmp_path / "a.parquet", {"c": pa.array(["a"], other)})
    write(tmp_path / "b.parquet", {"c": pa.array(["b"], TEXT)})
    assert read_all(ParquetTables(str(tmp_path))).column("c").to_pylist() == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a Parquet file at all"])
def test_an_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(RecordError, match=r"bad\.parquet: expected a Parquet file"):
        ParquetTables(str(tmp_path))


def test_a_file_that_breaks_off_is_named(tmp_path):
    path = write(tmp_path / "cut.parquet", {"x": range(1000)})
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=r"cut\.parquet: expected a Parquet file"):
        ParquetTables(path)


def test_damaged_pages_are_named_with_file_and_row_group(tmp_path):
    path = write(tmp_path / "a.parquet", {"x": [f"value {i}" for i in range(1000)]}, use_dictionary=False)
    tables = ParquetTables(path)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:2000] = b"\xff" * 1996
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    with pytest.raises(RecordError, match=r"a\.parquet: row group 0 cannot be read"):
        read_all(tables)


def test_a_file_with_a_repeated_column_is_refused(tmp_path):
    write(tmp_path / "a.parquet", pa.table([[1], [2]], names=["x", "x"]))
    with pytest.raises(RecordError, match=r"x: expected each column once, .*a\.parquet has it twice"):
        ParquetTables(str(tmp_path))


def test_files_that_pandas_wrote_are_read(tmp_path):
    frame = pd.DataFrame({"x": [1, None], "c": pd.Categorical(["a", "b"]), "t": pd.to_datetime(["2024", "2025"])})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.set_index(pd.Index([7, 3])).to_parquet(tmp_path / "b.parquet")
    tables = ParquetTables(str(tmp_path / "a.parquet"))
    assert tables.schema.names == ["x", "c", "t"]
    assert tables.schema.metadata is None
    assert read_all(tables).column("x").to_pylist() == [1.0, None]
    named = ParquetTables(str(tmp_path / "b.parquet"))  # its index is no range, so pandas writes it as a column
    assert named.schema.names == ["x", "c", "t", "__index_level_0__"]


def test_a_file_without_rows_has_no_rows(tmp_path):
    write(tmp_path / "a.parquet", {"x": pa.array([], pa.int64())})
    write(tmp_path / "b.parquet", {"x": [1]})
    assert read_all(ParquetTables(str(tmp_path))).to_pydict() == {"x": [1]}


def test_a_table_in_memory_is_read_in_blocks():
    n = BLOCK_ROWS + 5
    tables = open_tables(pa.table({"x": np.arange(n), "y": np.arange(n)}))
    assert [(block.start, block.num_rows) for block in tables.blocks] == [(0, BLOCK_ROWS), (BLOCK_ROWS, 5)]
    assert read_all(tables, ["y"], tables.blocks[1:]).to_pydict() == {"y": list(range(BLOCK_ROWS, n))}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_large_row_group_of_a_wide_table_is_read_a_few_rows_at_a_time(tmp_path, in_memory):
    wide = pa.table({f"x{i}": np.arange(9000) + i for i in range(1000)})
    tables = open_tables(wide if in_memory else write(tmp_path / "wide.parquet", wide))
    parts = list(tables.scan())
    assert max(table.nbytes for _, table in parts) <= 65 << 20  # and the bits of what is null
    assert [start for start, _ in parts] == np.cumsum([0, *(table.num_rows for _, table in parts)])[:-1].tolist()
    assert pa.concat_tables([table for _, table in parts]).equals(wide)
    narrow = list(tables.scan(["x0"], tables.blocks[-1:]))
    assert in_memory or [(start, table.num_rows) for start, table in narrow] == [(0, 9000)]


def test_a_table_in_memory_with_a_repeated_column_is_refused():
    with pytest.raises(RecordError, match="x: expected each column once, the table has it twice"):
        MemoryTables(pa.table([[1], [2]], names=["x", "x"]))


def test_frames_and_paths_are_opened(tmp_path):
    path = write(tmp_path / "a.parquet", {"x": [1]})
    assert read_all(open_tables(pd.DataFrame({"x": [1]}))).to_pydict() == {"x": [1]}
    assert read_all(open_tables([path, path])).to_pydict() == {"x": [1, 1]}


def test_rechunking_keeps_rows_and_order():
    tables = [pa.table({"x": range(5)}), pa.table({"x": pa.array([], pa.int64())}), pa.table({"x": range(5, 7)})]
    parts = list(rechunk(tables, 2))
    assert [part.num_rows for part in parts] == [2, 2, 1, 2]
    assert pa.concat_tables(parts).column("x").to_pylist() == list(range(7))


@pytest.mark.parametrize("word", ["NA", "n/a", "#N/A", "null", "NULL", "None", "", "  "])
def test_words_for_no_value_are_missing_where_numbers_or_times_are_wanted(word):
    for wanted in (pa.float64(), pa.int64(), pa.timestamp("us"), pa.bool_()):
        column, bad = cast_cells(pa.chunked_array([[word, None]]), wanted)
        assert column.null_count == 2
        assert len(bad) == 0


def test_words_for_no_value_stay_text_where_text_is_wanted():
    column, _ = cast_cells(pa.chunked_array([pa.array(["NA", ""], pa.large_string())]), pa.string())
    assert column.to_pylist() == ["NA", ""]


def test_a_time_without_an_offset_is_not_read_with_that_of_another():
    texts = ["2025-01-02T12:00:00+01:00", "2025-01-02T12:00:00", "2025-01-02", "2025-01-02 12:00Z", "2025-01-02T12"]
    together, bad = cast_cells(pa.chunked_array([texts]), pa.timestamp("us"))
    assert not len(bad)
    assert [time.hour for time in together.to_pylist()] == [11, 12, 0, 12, 12]
