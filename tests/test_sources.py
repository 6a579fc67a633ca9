import gzip
import io
import json
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from apache_beam.metrics.metric import MetricsFilter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.records import DEAD_LETTER_SCHEMA
from pipeline.sources import ReadTables, _ListRowGroups, _Read, format_of, launch_schema, match_files

SCHEMA = pa.schema([("x", pa.int64()), ("s", pa.string())])


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Attempts follow at once; gives the pauses that there would have been."""
    pauses = []
    monkeypatch.setattr("pipeline.sources._pause", pauses.append)
    return pauses


def read(pattern, schema=SCHEMA, **options):
    """Rows, letters and counters of a read through a real pipeline."""
    folder = Path(str(pattern).split("*", maxsplit=1)[0]).parent
    tables, letters = str(folder / "_tables"), str(folder / "_letters")
    pipeline = beam.Pipeline(runner="FnApiRunner")
    result = pipeline | ReadTables(str(pattern), schema, **options)
    _ = result.tables | "Tables" >> beam.io.WriteToParquetBatched(tables, schema)
    _ = result.dead_letters | "Letters" >> beam.io.WriteToParquetBatched(letters, DEAD_LETTER_SCHEMA)
    done = pipeline.run()
    counters = done.metrics().query(MetricsFilter().with_namespace("BeamVAE"))["counters"]
    counts = {counter.key.metric.name: counter.committed for counter in counters}
    rows, dead = (
        [row for path in sorted(folder.glob(name)) for row in pq.read_table(path).to_pylist()]
        for name in ("_tables-*", "_letters-*")
    )
    return rows, dead, counts


def write_parquet(path, num_rows=6, start=0, **options):
    rows = range(start, start + num_rows)
    pq.write_table(pa.table({"x": list(rows), "s": [f"s{row}" for row in rows]}), path, **options)


def corrupt_row_group(path, row_group):
    """Overwrites every page of a row group."""
    metadata = pq.read_metadata(path).row_group(row_group)
    data = bytearray(path.read_bytes())
    for column in (metadata.column(i) for i in range(metadata.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(data))


def num_lost(letters):
    return sum(letter["num_records"] for letter in letters)


# ---- Parquet -----------------------------------------------------------------------------------


def test_parquet_files_of_a_directory_are_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", 4)
    (tmp_path / "sub").mkdir()
    write_parquet(tmp_path / "sub" / "b.parquet", 3, start=4)
    (tmp_path / "readme.txt").write_text("no data")
    rows, letters, counts = read(f"{tmp_path}/", required=["x"])
    assert sorted(row["x"] for row in rows) == list(range(7))
    assert letters == []
    assert counts["num_records"] == 7


def test_tables_have_at_most_max_rows_and_exactly_the_schema(tmp_path):
    write_parquet(tmp_path / "a.parquet", 10, row_group_size=7)
    step = _Read("parquet", SCHEMA, (), 4)
    tables = [t for group in ((0, 7), (1, 3)) for t in step.process((str(tmp_path / "a.parquet"), [group]))]
    assert [table.num_rows for table in tables] == [4, 3, 3]
    assert all(table.schema == SCHEMA for table in tables)


def test_a_row_group_is_not_read_at_once(tmp_path, monkeypatch):
    sizes = []

    class Recorder(io.FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    pq.write_table(pa.table({"x": np.random.default_rng(0).permutation(600_000)}), tmp_path / "a.parquet")
    monkeypatch.setattr("pipeline.sources.FileSystems.open", lambda path, **_: Recorder(path))
    step = _Read("parquet", SCHEMA, (), 10_000)
    assert sum(table.num_rows for table in step.process((str(tmp_path / "a.parquet"), [(0, 600_000)]))) == 600_000
    assert max(sizes) < 2 << 20 < (tmp_path / "a.parquet").stat().st_size


def test_a_truncated_parquet_file_is_one_letter_of_unknown_count(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    rows, [letter], counts = read(tmp_path / "*.parquet")
    assert len(rows) == 6
    assert (letter["source"], letter["num_records"]) == (str(tmp_path / "b.parquet"), None)
    assert letter["error_type"] == "unreadable_file"
    assert "magic bytes" in letter["error"]
    assert (counts["num_unreadable_files"], counts["num_dead_letters"]) == (1, 1)


def test_a_corrupt_page_costs_only_its_row_group(tmp_path):
    write_parquet(tmp_path / "a.parquet", 9, row_group_size=3)
    corrupt_row_group(tmp_path / "a.parquet", 1)
    rows, [letter], counts = read(tmp_path / "a.parquet")
    assert sorted(row["x"] for row in rows) == [0, 1, 2, 6, 7, 8]
    assert (letter["num_records"], letter["stage"]) == (3, "read")
    assert (counts["num_records"], counts["num_dead_letters"]) == (9, 3)


def test_a_file_of_another_schema_goes_to_the_letters_row_by_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", 2)
    pq.write_table(pa.table({"s": ["no x"]}), tmp_path / "b.parquet")
    rows, [letter], _ = read(tmp_path / "*.parquet", required=["x"])
    assert len(rows) == 2
    assert (letter["error_type"], letter["column"], letter["payload"]) == ("missing_column", "x", '{"s":"no x"}')


def test_a_file_with_none_of_the_columns_keeps_its_row_count(tmp_path):
    pq.write_table(pa.table({"other": [1, 2, 3]}), tmp_path / "a.parquet")
    rows, letters, counts = read(tmp_path / "a.parquet", required=["x"])
    assert (rows, num_lost(letters)) == ([], 3)
    assert counts["num_undeclared_columns"] == 1


def test_types_may_differ_between_files_where_the_cells_fit(tmp_path):
    pq.write_table(pa.table({"x": ["1", "zwei", "3"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([4], pa.uint8())}), tmp_path / "b.parquet")
    rows, [letter], _ = read(tmp_path / "*.parquet")
    assert sorted(row["x"] for row in rows) == [1, 3, 4]
    assert letter["error"] == "x: expected int64, got 'zwei'"


def test_a_repeated_column_is_told(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["x", "x"]), tmp_path / "a.parquet")
    _, [letter], _ = read(tmp_path / "a.parquet")
    assert letter["error_type"] == "duplicate_column"


def test_undeclared_columns_are_dropped_and_counted_once_per_file(tmp_path):
    table = pa.table({"x": [1, 2], "u": [1, 2], "v": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    rows, _, counts = read(tmp_path / "a.parquet")
    assert rows == [{"x": 1, "s": None}, {"x": 2, "s": None}]
    assert counts["num_undeclared_columns"] == 2


def test_views_are_read_as_what_they_view(tmp_path):
    views = {"v": pa.array(["a", "b", "c"], pa.string_view()), "b": pa.array([b"a", b"b", b"c"], pa.binary_view())}
    pq.write_table(pa.table({"x": ["1", "zwei", "3"], **views}), tmp_path / "a.parquet")
    schema = launch_schema(str(tmp_path / "a.parquet")).set(0, pa.field("x", pa.int64()))
    assert schema.types == [pa.int64(), pa.string(), pa.binary()]
    letters, table = _Read("parquet", schema, (), 10).process((str(tmp_path / "a.parquet"), [(0, 3)]))
    assert table.to_pylist() == [{"x": 1, "v": "a", "b": b"a"}, {"x": 3, "v": "c", "b": b"c"}]
    assert letters.value["payload"].to_pylist() == ['{"x":"zwei","v":"b","b":"Yg=="}']


def test_small_row_groups_are_read_together(tmp_path):
    rows = pa.table({"x": range(23), "s": pa.array(["a", "b"] * 11 + ["c"]).dictionary_encode()})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=2)
    runs = list(_ListRowGroups(8).process(str(tmp_path / "a.parquet")))
    assert [[row_group for row_group, _ in run] for _, run in runs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for schema in (SCHEMA, rows.schema):
        tables = [table for run in runs for table in _Read("parquet", schema, (), 8).process(run)]
        assert [(table.num_rows, table["x"].num_chunks) for table in tables] == [(8, 1), (8, 1), (7, 1)]
        assert [x for table in tables for x in table["x"].to_pylist()] == list(range(23))


def test_a_large_row_group_stays_alone(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", SCHEMA) as writer:
        for size in (2, 0, 9, 1, 3):
            writer.write_table(pa.table({"x": range(size), "s": ["a"] * size}, SCHEMA), row_group_size=10)
    runs = [run for _, run in _ListRowGroups(4).process(str(tmp_path / "a.parquet"))]
    assert [[num_rows for _, num_rows in run] for run in runs] == [[2], [9], [1, 3]]


def test_an_empty_parquet_table_has_no_records(tmp_path):
    pq.write_table(SCHEMA.empty_table(), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[:2] == ([], [])


# ---- CSV ---------------------------------------------------------------------------------------


def read_csv(tmp_path, data, **options):
    (tmp_path / "a.csv").write_bytes(data)
    return read(tmp_path / "a.csv", **options)


def test_a_bad_cell_and_a_short_line_cost_only_their_records(tmp_path):
    rows, letters, counts = read_csv(tmp_path, b"x,s\n1,a\nzwei,b\n3\n4,d,e\n5,\n")
    assert rows == [{"x": 1, "s": "a"}, {"x": 5, "s": None}]
    assert {(letter["payload"], letter["payload_format"], letter["error"]) for letter in letters} == {
        ('{"x":"zwei","s":"b"}', "json", "x: expected int64, got 'zwei'"),
        ("3", "csv", "expected 2 fields, got 1"),
        ("4,d,e", "csv", "expected 2 fields, got 3"),
    }
    assert (counts["num_records"], counts["num_dead_letters"]) == (5, 3)


@pytest.mark.parametrize("data", [b"", b"\n\r\n", b"\xef\xbb\xbf", b"x,s", b"x,s\n", b"\n\nx,s\n\n"])
def test_a_csv_file_without_a_record_has_none(tmp_path, data):
    assert read_csv(tmp_path, data)[:2] == ([], [])


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfx,s\n1,a",
        b"x,s\r\n1,a\r\n",
        b"\n\nx,s\n\n1,a\n\n",
        b"s,x\na,1\n",
        b'"x","s"\n"1","a"\n',
        b"x,other,s\n1,2,a\n",
    ],
)
def test_the_header_names_the_columns(tmp_path, data):
    assert read_csv(tmp_path, data)[:2] == ([{"x": 1, "s": "a"}], [])


def test_quoted_newlines_stay_in_their_cell(tmp_path):
    assert read_csv(tmp_path, b'x,s\n1,"a\nb"\n')[0] == [{"x": 1, "s": "a\nb"}]


def test_bytes_that_are_not_utf8_become_text(tmp_path):
    rows, [letter], _ = read_csv(tmp_path, b"x,s\n1,caf\xe9\n\xff\n")
    assert rows == [{"x": 1, "s": "caf\\xe9"}]
    assert letter["payload"] == "\\xff"


def test_bad_lines_before_a_failure_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources._BLOCK_BYTES", 64)
    rows, letters, _ = read_csv(tmp_path, b"x,s\n" + b"1,a\n2\n" * 40 + b'3,"' + b"x" * 1000)
    assert (len(rows), sum(letter["error_type"] == "malformed_line" for letter in letters)) == (40, 40)
    assert letters[-1]["error_type"] == "unreadable_file"
    assert "block boundaries" in letters[-1]["error"]


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x,s\n1,a\n"))
    assert read(tmp_path / "a.csv.gz")[0] == [{"x": 1, "s": "a"}]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_a_truncated_gzip_file_is_told(tmp_path, name):
    lines = b"".join(b'{"x":%d}\n' % (i * 7919 % 1000) for i in range(1000))
    (tmp_path / name).write_bytes(gzip.compress(lines)[:-50])
    assert "Truncated compressed stream" in read(tmp_path / name)[1][-1]["error"]


def test_a_file_that_is_no_gzip_is_one_letter(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(b"x,s\n1,a\n")
    rows, [letter], _ = read(tmp_path / "a.csv.gz")
    assert (rows, letter["num_records"], letter["payload"]) == ([], None, None)


# ---- JSON Lines --------------------------------------------------------------------------------


def read_jsonl(tmp_path, data, **options):
    (tmp_path / "a.jsonl").write_bytes(data)
    return read(tmp_path / "a.jsonl", **options)


def test_a_broken_line_in_the_middle_costs_only_itself(tmp_path):
    rows, [letter], counts = read_jsonl(tmp_path, b'{"x":1,"s":"a"}\n{"x":2,\n{"x":3}\n')
    assert rows == [{"x": 1, "s": "a"}, {"x": 3, "s": None}]
    assert (letter["payload"], letter["payload_format"]) == ('{"x":2,', "jsonl")
    assert letter["error"].startswith("expected a JSON object, got ")
    assert (counts["num_records"], counts["num_dead_letters"]) == (3, 1)


def test_a_cell_of_another_type_is_a_letter_with_the_line_as_it_came(tmp_path):
    line = '{"x": "zwei", "extra": 1.10}'
    rows, [letter], counts = read_jsonl(tmp_path, f'{{"x":1}}\r\n{line}\r\n'.encode())
    assert [row["x"] for row in rows] == [1]
    assert (letter["payload"], letter["column"], letter["error"]) == (line, "x", 'x: expected int64, got "zwei"')
    assert counts["num_dead_letters"] == 1


def test_blocks_are_cut_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources._BLOCK_BYTES", 10)
    lines = [json.dumps({"x": i, "s": "x" * i}) for i in range(30)]
    assert [row["x"] for row in read_jsonl(tmp_path, "\n".join(lines).encode())[0]] == list(range(30))


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_jsonl_file_without_a_record_has_none(tmp_path, data):
    assert read_jsonl(tmp_path, data)[:2] == ([], [])


def test_a_record_with_none_of_the_required_columns_is_a_letter(tmp_path):
    rows, letters, _ = read_jsonl(tmp_path, b'{"s":"a"}\n{"x":null}\n{"x":1}\n', required=["x"])
    assert [row["x"] for row in rows] == [None, 1]
    assert [(letter["payload"], letter["error_type"]) for letter in letters] == [('{"s":"a"}', "missing_column")]


def test_times_are_read_from_text(tmp_path):
    schema = pa.schema([("t", pa.timestamp("us", "UTC"))])
    rows, letters, _ = read_jsonl(tmp_path, b'{"t":"2024-01-02T03:04:05Z"}\n{"t":5}\n', schema=schema)
    assert (rows[0]["t"].isoformat(), num_lost(letters)) == ("2024-01-02T03:04:05+00:00", 1)


def test_an_unreadable_file_is_a_letter(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    step = _Read("jsonl", SCHEMA, (), 10)
    [output] = step.process((str(tmp_path / "a.jsonl"), None))
    assert "No such file" in output.value["error"][0].as_py()


# ---- which files -------------------------------------------------------------------------------


def test_hidden_and_temporary_files_are_no_data(tmp_path):
    for name in ("a.csv", "_SUCCESS.csv", ".b.csv", "beam-temp-x/c.csv", "_tmp/d.csv", "e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n1\n")
    assert match_files(str(tmp_path), "csv") == [str(tmp_path / "a.csv")]
    assert match_files(f"{tmp_path}/**", "csv") == [str(tmp_path / "a.csv"), str(tmp_path / "e.jsonl")]


def test_a_file_named_outright_is_read_whatever_its_name(tmp_path):
    (tmp_path / "_a.csv").write_text("x\n1\n")
    assert match_files(str(tmp_path / "_a.csv"), "csv") == [str(tmp_path / "_a.csv")]


@pytest.mark.parametrize("name", ["", "*.csv", "none.csv"])
def test_no_match_is_an_error(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no csv file matches"):
        match_files(f"{tmp_path}/{name}", "csv")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.PARQUET", "parquet"),
        ("a.csv.gz", "csv"),
        ("a.ndjson", "jsonl"),
        ("a.json.zst", "jsonl"),
        ("out/", "parquet"),
    ],
)
def test_the_suffix_tells_the_format(pattern, expected):
    assert format_of(pattern) == expected


def test_an_unknown_suffix_is_an_error():
    with pytest.raises(ValueError, match=r"a\.txt: expected file_format to be one of csv, jsonl, parquet, got None"):
        ReadTables("a.txt", SCHEMA).expand(beam.Pipeline())


def test_required_columns_are_of_the_schema():
    with pytest.raises(ValueError, match="required: expected columns of the schema, got z"):
        ReadTables("a.csv", SCHEMA, required=["z"])


# ---- launch_schema -----------------------------------------------------------------------------


def test_the_launch_schema_of_csv_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("zip,id,n\n00123,123456789012345678901,\n")
    schema = launch_schema(str(tmp_path / "a.csv"))
    assert schema == pa.schema([(name, pa.string()) for name in ("zip", "id", "n")])
    assert read(tmp_path / "a.csv", schema)[0] == [{"zip": "00123", "id": "123456789012345678901", "n": None}]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_launch_schema_of_json_lines_is_inferred(tmp_path, pack):
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl")
    path.write_bytes(pack(b'{"x":1,"s":"a","n":null}\noops\n'))
    assert launch_schema(str(path)) == pa.schema([*SCHEMA, pa.field("n", pa.string())])


def launch_schema_of(folder, *files):
    for i, columns in enumerate(files):
        pq.write_table(pa.table(columns), folder / f"{i}.parquet")
    return launch_schema(str(folder))


def test_the_launch_schema_of_parquet_has_the_columns_of_all_files(tmp_path):
    found = launch_schema_of(tmp_path, {"b": [1], "a": [1]}, {"c": [1.5], "a": [2]}, {"d": ["x"], "b": [1]})
    assert found == pa.schema([("b", pa.int64()), ("a", pa.int64()), ("c", pa.float64()), ("d", pa.string())])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["int64", "double"], pa.float64()),
        (["null", "int8", "null"], pa.int8()),
        (["int64", "string"], pa.string()),
        (["int64", "string", "binary"], pa.string()),
        (["int64", "timestamp[us]"], pa.string()),
        (["string", "large_string"], pa.string()),
        (["large_string", "large_string"], pa.large_string()),
        (["large_string", "dictionary"], pa.string()),
        (["null", "dictionary"], pa.dictionary(pa.int32(), pa.string())),
        (["string_view", "dictionary"], pa.string()),
        (["timestamp[ms]", "timestamp[us]"], pa.timestamp("us")),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_types_of_files_are_promoted(tmp_path, kinds, expected, order):
    dictionary = pa.dictionary(pa.int32(), pa.string())
    types = [dictionary if kind == "dictionary" else pa.type_for_alias(kind) for kind in kinds[::order]]
    assert launch_schema_of(tmp_path, *({"x": pa.nulls(1, kind)} for kind in types)).field("x").type == expected


def test_a_column_without_nulls_in_the_first_file_may_have_them_later(tmp_path):
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"x": [1]}, schema), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [None, "zwei"]}), tmp_path / "b.parquet")
    found = launch_schema(str(tmp_path))
    assert found == pa.schema([("x", pa.string())])
    assert sorted(map(str, (row["x"] for row in read(tmp_path / "*.parquet", found)[0]))) == ["1", "None", "zwei"]


def test_the_launch_schema_leaves_unreadable_parquet_files_out(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    write_parquet(tmp_path / "b.parquet")
    assert launch_schema(str(tmp_path)) == SCHEMA


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_an_empty_first_file_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}: expected a \w+ file"):
        launch_schema(str(tmp_path / name))


# ---- trying again ------------------------------------------------------------------------------


class StorageError(Exception):
    """A store's own."""


def write_some(path, num_rows=200):
    """Rows, in parts that are smaller than the file."""
    if path.suffix == ".parquet":
        write_parquet(path, num_rows, row_group_size=num_rows, data_page_size=64, write_batch_size=8)
    elif path.suffix == ".csv":
        path.write_text("x,s\n" + "".join(f"{i},s{i}\nbad{i}\n" for i in range(num_rows)))
    else:
        path.write_text("".join(f'{{"x":{i},"s":"s{i}"}}\nbad{i}\n' for i in range(num_rows)))


def fail(monkeypatch, error, num_failures, after, short_reads=False):
    """That many opened files fail, for good after some bytes."""
    left = [num_failures]

    class Failing(io.FileIO):
        num_read = 0
        broken = False

        def read(self, size=-1):
            data = super().read(min(size, 100) if short_reads else size)
            self.num_read += len(data)
            if not self.broken and left[0] and self.num_read > after:
                left[0] -= 1
                self.broken = True
            if self.broken:
                raise error
            return data

    monkeypatch.setattr("pipeline.sources.FileSystems.open", lambda path, **_: Failing(path))
    monkeypatch.setattr("pipeline.sources._BLOCK_BYTES", 256)


def rows_and_letters(path, max_rows=16):
    runs = _ListRowGroups(max_rows).process(str(path)) if path.suffix == ".parquet" else [(str(path), None)]
    step = _Read(path.suffix[1:], SCHEMA, (), max_rows)
    outputs = [output for run in runs for output in (step.process(run) if isinstance(run, tuple) else [run])]
    rows = [x for output in outputs if isinstance(output, pa.Table) for x in output["x"].to_pylist()]
    return rows, [row for output in outputs if not isinstance(output, pa.Table) for row in output.value.to_pylist()]


def failures_told(caplog) -> list[str]:
    return [message for message in caplog.messages if "reading failed" in message]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("after", [0, 600, 1400])
def test_what_fails_and_then_works_is_read_exactly_once(
    tmp_path, monkeypatch, caplog, no_pause, suffix, num_failures, after
):
    path = tmp_path / f"a.{suffix}"
    write_some(path)
    fail(monkeypatch, OSError("reset by peer"), num_failures, after, short_reads=suffix != "parquet")
    rows, letters = rows_and_letters(path)
    assert rows == list(range(200))
    assert [letter["payload"] for letter in letters] == ([] if suffix == "parquet" else [f"bad{i}" for i in range(200)])
    if suffix != "csv" or after == 0:  # Arrow, reading CSV ahead, may meet a failure when it wants no more
        assert len(failures_told(caplog)) == num_failures
        assert failures_told(caplog)[0] == f"{path}: reading failed, attempt 1 of 3: reset by peer"
        assert no_pause == [0.1, 0.2][:num_failures]


@pytest.mark.parametrize(("suffix", "after"), [("parquet", 0), ("csv", 0), ("jsonl", 0), ("csv", 900), ("jsonl", 900)])
def test_what_always_fails_is_one_letter(tmp_path, monkeypatch, caplog, suffix, after):
    path = tmp_path / f"a.{suffix}"
    write_some(path)
    fail(monkeypatch, OSError("reset by peer"), -1, after)
    rows, letters = rows_and_letters(path)
    assert rows == list(range(len(rows)))
    assert rows or after == 0 or suffix == "csv"  # which Arrow reads ahead
    *bad, letter = letters
    assert letter["error"] == f"{path}: reset by peer"
    assert [letter["payload"] for letter in bad] == [f"bad{i}" for i in range(len(bad))]
    assert len(failures_told(caplog)) == 3


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("error", [StorageError("503"), MemoryError(), pa.ArrowMemoryError("none left")])
@pytest.mark.parametrize("after", [0, 900])
def test_other_errors_are_for_the_runner(tmp_path, monkeypatch, suffix, error, after):
    write_some(tmp_path / f"a.{suffix}")
    fail(monkeypatch, error, -1, after)
    with pytest.raises(type(error)):
        rows_and_letters(tmp_path / f"a.{suffix}")


# ---- nothing is lost ---------------------------------------------------------------------------


@st.composite
def corrupted(draw, lines, alphabet):
    """Lines with some bytes replaced, inserted or cut."""
    data = bytearray(b"\n".join(draw(st.lists(lines, max_size=8))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.lists(st.sampled_from(alphabet), max_size=2).map(bytes))
    return bytes(data)


json_line = st.dictionaries(
    st.sampled_from(["x", "s", "other"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
).map(lambda record: json.dumps(record).encode())
csv_line = st.lists(st.sampled_from([b"1", b"a", b"", b"2.5", b"-7", b"NaN"]), max_size=3).map(b",".join)
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def in_and_out(path, required=()):
    step = _Read(path.suffix[1:], SCHEMA, required, 3)
    outputs = list(step.process((str(path), None)))
    num_rows = sum(output.num_rows for output in outputs if isinstance(output, pa.Table))
    letters = [row for output in outputs if not isinstance(output, pa.Table) for row in output.value.to_pylist()]
    return num_rows + num_lost(letters)


@quick
@given(data=corrupted(json_line, b'{}[]":,\\\n\r n1\xff\x00'))
def test_every_line_of_corrupted_jsonl_is_a_row_or_a_letter(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    assert in_and_out(tmp_path / "a.jsonl", ("x",)) == sum(bool(line.strip()) for line in data.split(b"\n"))


@quick
@given(data=corrupted(csv_line, b",\n\r a1\xff\x00"))
def test_every_line_of_corrupted_csv_is_a_row_or_a_letter(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(b"x,s\n" + data)
    lines = data.replace(b"\r", b"\n").split(b"\n")
    assert in_and_out(tmp_path / "a.csv") == sum(bool(line) for line in lines)


@quick
@given(data=corrupted(csv_line, b'",\n'))
def test_stray_quotes_do_not_end_the_job(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(b"x,s\n" + data)
    list(_Read("csv", SCHEMA, (), 3).process((str(tmp_path / "a.csv"), None)))


def test_csv_written_by_arrow_is_read_back(tmp_path):
    table = pa.table({"x": [1, None, -3], "s": ["a,b", 'q"', "line\nbreak"]}, schema=SCHEMA)
    pa_csv.write_csv(table, tmp_path / "a.csv")
    assert read(tmp_path / "a.csv")[0] == table.to_pylist()
