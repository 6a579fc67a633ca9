import datetime
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import (
    DEAD_LETTER_SCHEMA,
    dead_letters,
    file_letter,
    json_rows,
    line_letters,
    parse_json_lines,
    text_cells,
)
from vae_model.tables import Rejects

NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xffa")]
)
CELLS = [
    (pa.array([-5], pa.int8()), -5),
    (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    (pa.array([0.1 + 0.2]), 0.1 + 0.2),
    (pa.array([0.1], pa.float32()), 0.1),
    (pa.array([np.float16(0.5)]), 0.5),
    (pa.array([float("nan")]), None),
    (pa.array([float("-inf")]), "-inf"),
    (pa.array([True]), True),
    (pa.array(['a"\\\n\x00é']), 'a"\\\n\x00é'),
    (pa.array(["a"], pa.large_string()), "a"),
    (pa.array(["a"], pa.string_view()), "a"),
    (pa.array(["a"]).dictionary_encode(), "a"),
    (NOT_UTF8, "\\xffa"),
    (pa.array([b"\xff"]), "/w=="),
    (pa.array([b"\xff"], pa.binary(1)), "/w=="),
    (pa.array([b"\xff"], pa.binary_view()), "/w=="),
    (pa.array([Decimal("1.50")]), 1.5),
    (pa.array([Decimal("1e40")], pa.decimal256(60, 0)), 10**40),
    (pa.array([0], pa.timestamp("us")), "1970-01-01T00:00:00.000000"),
    (pa.array([0], pa.timestamp("s", "Europe/Paris")), "1970-01-01T00:00:00Z"),
    (pa.array([0], pa.timestamp("s", "No/Where")), "1970-01-01T00:00:00Z"),
    (pa.array([0], pa.date32()), "1970-01-01"),
    (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    (pa.array([5], pa.duration("s")), 5),
    (pa.array([None]), None),
    (pa.array([[1, None]]), [1, None]),
    (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), [1, 2]),
    (pa.array([[1, 2]], pa.list_view(pa.int64())), [1, 2]),
    (pa.array([{"a": 1, "b": [{"c": 'q"'}]}]), {"a": 1, "b": [{"c": 'q"'}]}),
    (pa.array([{}], pa.struct([])), {}),
    (pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), {"k": "v"}),
    (pa.array([[(1, None)]], pa.map_(pa.int64(), pa.string())), {"1": None}),
    (pa.array([[datetime.timedelta(seconds=1)]]), [1_000_000]),
    (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), [1, 2, 3]),
    (pa.RunEndEncodedArray.from_arrays([1], ["a"]), "a"),
    (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"])), "{}"),
]


@pytest.mark.parametrize(("cell", "expected"), CELLS, ids=[str(cell.type) for cell, _ in CELLS])
def test_a_cell_of_any_type_is_written_as_json(cell, expected):
    assert json.loads(json_rows(pa.table([cell], names=["c"]))[0].as_py()) == {"c": expected}


@pytest.mark.parametrize("cell", [cell for cell, _ in CELLS], ids=[str(cell.type) for cell, _ in CELLS])
def test_a_letter_can_be_written_for_a_row_of_any_type(cell):
    rejects = Rejects(1)
    rejects.add(np.array([0]), "c", "wrong_type", "expected another")
    letters = dead_letters(pa.table([cell, cell], names=["c", "c"]), rejects, source="f", stage="read")
    assert letters.schema == DEAD_LETTER_SCHEMA
    assert len(json.loads(letters["payload"][0].as_py(), object_pairs_hook=list)) == 2


@given(st.lists(st.text()))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_read_back_from_json(texts):
    rows = json_rows(pa.table({"text": pa.array(texts, pa.string())})).to_pylist()
    assert [json.loads(row)["text"] for row in rows] == texts


def test_nulls_and_slices_of_nested_columns_are_kept():
    lists = pa.array([[{"a": 1}], None, [], [{"a": None}, {"a": 2}]])
    assert text_cells(lists.slice(1)).to_pylist() == [None, "[]", '[{"a":null},{"a":2}]']


def test_letters_are_written_for_rejected_rows_only():
    rejects = Rejects(3)
    rejects.add(np.array([1]), "a", "wrong_type", "expected int64, got 'x'")
    letters = dead_letters(
        pa.table({"a": ["1", "x", "3"]}), rejects, source="f.csv", stage="read", model_version="v1"
    ).to_pylist()
    assert letters == [
        {
            "payload": '{"a":"x"}',
            "payload_format": "json",
            "source": "f.csv",
            "attributes": None,
            "stage": "read",
            "column": "a",
            "error_type": "wrong_type",
            "error": "a: expected int64, got 'x'",
            "model_version": "v1",
            "event_time": None,
            "num_records": 1,
        }
    ]


def test_a_file_letter_tells_how_many_records_are_lost_where_that_is_known():
    assert file_letter("f", "read", "gone", 7)["num_records"].to_pylist() == [7]
    assert file_letter("f", "read", "gone", None)["num_records"].to_pylist() == [None]


def test_a_line_letter_carries_the_raw_line():
    letters = line_letters(["{oops"], ["no JSON"], payload_format="jsonl", source="f", stage="read")
    assert letters["payload"].to_pylist() == ["{oops"]


SCHEMA = pa.schema([("i", pa.int64()), ("f", pa.float64()), ("s", pa.string()), ("t", pa.timestamp("us"))])


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"3",
        b"[1]",
        b'{"i":1} null',
        b'{"i":1}{"i":2}',
        b'{"i":1',
        b'{"s":"\xff"}',
        b'{"s":"\\ud800"}',
        b'{"i":1}\x00',
        b"[" * 100_000,
        b'{"i":' + b"9" * 5000 + b"}",
    ],
)
def test_a_line_that_is_no_json_object_is_set_aside_alone(line):
    parsed = parse_json_lines(b'{"i":1}\n' + line + b'\n{"i":2}', SCHEMA)
    assert parsed.table["i"].to_pylist() == [1, 2]
    assert len(parsed.bad_lines) == len(parsed.errors) == 1


def test_a_first_line_null_does_not_crash():
    assert parse_json_lines(b"null\n", SCHEMA).errors == ["expected a JSON object, got a NoneType"]


def test_a_record_broken_in_two_is_two_bad_lines():
    assert parse_json_lines(b'{"i":\n1}\n{"i":2}\n', SCHEMA).bad_lines == ['{"i":', "1}"]


def test_blank_lines_and_carriage_returns_are_no_records():
    parsed = parse_json_lines(b'\r\n{"i":1}\r\n\r\n  \n{"i":2}\r\n', SCHEMA)
    assert (parsed.table["i"].to_pylist(), parsed.bad_lines) == ([1, 2], [])


@pytest.mark.parametrize("broken", [b"", b"oops\n"])
def test_integers_beyond_2_to_53_keep_their_digits(broken):
    parsed = parse_json_lines(broken + b'{"i":9007199254740993}\n', SCHEMA)
    assert parsed.table["i"].to_pylist() == [9007199254740993]


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("i", "1.0", 1),
        ("i", '"5"', 5),
        ("i", "1e3", 1000),
        ("i", "NaN", None),
        ("f", "123456789012345678901234567890", 1.2345678901234568e29),
        ("f", '"1.5"', 1.5),
        ("s", "5", "5"),
        ("s", "true", "true"),
        ("s", '"é\\u00e9\\ud83d\\ude00"', "éé😀"),
    ],
)
def test_a_cell_means_the_same_whatever_its_neighbours_are(column, cell, expected):
    line = f'{{"{column}":{cell}}}\n'.encode()
    for neighbour in (b"", b"oops\n", f'{{"{column}":[1]}}\n'.encode(), f'{{"{column}":"x"}}\n'.encode()):
        assert parse_json_lines(line + neighbour, SCHEMA).table[column][0].as_py() == expected


@pytest.mark.parametrize(("column", "cell"), [("i", "1.5"), ("i", "[1]"), ("f", '"x"'), ("s", '{"a":1}'), ("t", "5")])
def test_a_cell_without_such_a_value_is_told(column, cell):
    parsed = parse_json_lines(f'{{"{column}":{cell}}}\n{{}}\n'.encode(), SCHEMA)
    [(rows, name, error)] = parsed.wrong_cells
    assert (rows.tolist(), name) == ([0], column)
    assert error.startswith(f"expected {SCHEMA.field(column).type}, got ")


def test_the_last_of_two_equal_keys_counts():
    assert parse_json_lines(b'{"i":1,"i":2}\n', SCHEMA).table["i"].to_pylist() == [2]


def test_nested_columns_are_read_line_by_line_too():
    schema = pa.schema([("n", pa.list_(pa.struct([("a", pa.int64())])))])
    parsed = parse_json_lines(b'{"n":[{"a":1}]}\n{"n":5}\n', schema)
    assert parsed.table["n"].to_pylist() == [[{"a": 1}], None]
