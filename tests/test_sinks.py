import csv
import json
from types import SimpleNamespace

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import DEAD_LETTER_SCHEMA, file_letter
from pipeline.sinks import WriteDeadLetters, WriteTables, dead_letter_place
from pipeline.sources import ReadTables, match_files

REASONS = pa.list_(pa.struct([("feature", pa.string()), ("nats", pa.float32())]))
SCHEMA = pa.schema(
    [("x", pa.float64()), ("s", pa.string()), ("t", pa.timestamp("us", "Europe/Paris")), ("anomaly_reasons", REASONS)]
)
TABLE = pa.table(
    {
        "x": [0.1 + 0.2, None],
        "s": ['q",\n', None],
        "t": pa.array([0, None], SCHEMA.field("t").type),
        "anomaly_reasons": pa.array([[{"feature": "x", "nats": 1.5}], None], REASONS),
    },
    schema=SCHEMA,
)


def write(tables, transform):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(tables, reshuffle=False) | transform


@pytest.mark.parametrize(
    ("path", "file_format", "expected"),
    [
        ("out", None, "out/scored-00000-of-00001.parquet"),
        ("out/", None, "out/scored-00000-of-00001.parquet"),
        ("out", "csv", "out/scored-00000-of-00001.csv"),
        ("out/x.csv", None, "out/x-00000-of-00001.csv"),
        ("out/x.jsonl.gz", None, "out/x-00000-of-00001.jsonl.gz"),
        ("out/x.parquet", "parquet", "out/x-00000-of-00001.parquet"),
    ],
)
def test_the_path_tells_names_and_format(tmp_path, path, file_format, expected):
    write([TABLE], WriteTables(f"{tmp_path}/{path}", SCHEMA, file_format))
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [expected]


def test_a_suffix_of_another_format_is_an_error():
    with pytest.raises(ValueError, match=r"x\.csv: expected a name that ends in \.parquet, got \.csv"):
        write([TABLE], WriteTables("x.csv", SCHEMA, "parquet"))


def test_parquet_holds_the_tables_with_their_types(tmp_path):
    write([TABLE, TABLE], WriteTables(f"{tmp_path}/out", SCHEMA))
    [path] = tmp_path.glob("out/*")
    assert pq.read_table(path).equals(pa.concat_tables([TABLE, TABLE]))
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"


def test_csv_holds_nested_columns_as_json_and_times_as_iso(tmp_path):
    write([TABLE, TABLE], WriteTables(f"{tmp_path}/x.csv", SCHEMA))
    [path] = tmp_path.glob("x*")
    with path.open(newline="") as file:
        header, first, second, *more = csv.reader(file)
    assert header == SCHEMA.names
    assert first == ["0.30000000000000004", 'q",\n', "1970-01-01T00:00:00.000000Z", '[{"feature":"x","nats":1.5}]']
    assert second == ["", "", "", ""]
    assert more == [first, second]


def test_json_lines_hold_a_row_each(tmp_path):
    write([TABLE], WriteTables(f"{tmp_path}/x.jsonl", SCHEMA))
    [path] = tmp_path.glob("x*")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "x": 0.1 + 0.2,
            "s": 'q",\n',
            "t": "1970-01-01T00:00:00.000000Z",
            "anomaly_reasons": [{"feature": "x", "nats": 1.5}],
        },
        dict.fromkeys(SCHEMA.names),
    ]


def test_no_table_still_gives_a_parquet_file_with_the_schema(tmp_path):
    write([], WriteTables(f"{tmp_path}/out", SCHEMA))
    [path] = tmp_path.glob("out/*")
    assert pq.read_table(path).equals(SCHEMA.empty_table())


@pytest.mark.parametrize(("name", "expected"), [("x.csv", '"x","s","t","anomaly_reasons"\n'), ("x.jsonl", "")])
def test_no_table_still_gives_a_text_file(tmp_path, name, expected):
    write([], WriteTables(f"{tmp_path}/{name}", SCHEMA))
    [path] = tmp_path.glob("x*")
    assert path.read_text() == expected


@pytest.mark.parametrize("file_format", ["parquet", "csv", "jsonl"])
def test_what_is_written_can_be_read(tmp_path, file_format):
    schema = pa.schema([("i", pa.int64()), ("f", pa.float64()), ("s", pa.string()), ("t", pa.timestamp("us", "UTC"))])
    table = pa.table(
        {"i": [2**60 + 1, None], "f": [1e-300, -2.5], "s": ['a\\",\n\u2028', None], "t": [1_700_000_000_000_001, None]},
        schema=schema,
    )
    write([table], WriteTables(f"{tmp_path}/out", schema, file_format))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadTables(f"{tmp_path}/out", schema, file_format)
        _ = read.tables | WriteTables(f"{tmp_path}/again", schema)
        _ = read.dead_letters | WriteDeadLetters(f"{tmp_path}/letters")
    assert pq.read_table(tmp_path / "again").equals(table)
    assert pq.read_table(tmp_path / "letters").num_rows == 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("out/", "out/_dead_letters"),
        ("gs://b/out/x.csv", "gs://b/out/_dead_letters"),
        ("out/*.jsonl", "out/_dead_letters"),
        ("x.csv", "./_dead_letters"),
        ("/x.csv", "/_dead_letters"),
        ("/", "/_dead_letters"),
    ],
)
def test_dead_letters_go_beside_the_scored_files(output, expected):
    assert dead_letter_place(SimpleNamespace(output=output, dead_letters=None)) == expected
    assert dead_letter_place(SimpleNamespace(output=output, dead_letters="x")) == "x"


@pytest.mark.parametrize("file_format", ["parquet", "csv", "jsonl"])
def test_dead_letters_are_written_in_every_format(tmp_path, file_format):
    letter = file_letter("a.csv", "read", "gone", None).set_column(
        3, DEAD_LETTER_SCHEMA.field("attributes"), pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    )
    write([letter], WriteDeadLetters(str(tmp_path), file_format))
    [path] = tmp_path.glob(f"dead_letters-00000-of-00001.{file_format}")
    if file_format == "parquet":
        assert pq.read_table(path).equals(letter)
    else:
        assert json.dumps({"k": "v"}, separators=(",", ":")).replace('"', '""' if file_format == "csv" else '"') in (
            path.read_text()
        )


def test_a_failed_write_leaves_earlier_files_and_no_new_ones(tmp_path):
    write([TABLE], WriteTables(f"{tmp_path}/out", SCHEMA))
    with pytest.raises(Exception, match="schema does not match"):
        write([TABLE, pa.table({"y": [1]})], WriteTables(f"{tmp_path}/out", SCHEMA))
    assert match_files(f"{tmp_path}/out", "parquet") == [f"{tmp_path}/out/scored-00000-of-00001.parquet"]
    assert pq.read_table(f"{tmp_path}/out/scored-00000-of-00001.parquet").equals(TABLE)


def test_a_second_write_replaces_the_first(tmp_path):
    for tables in ([TABLE, TABLE], [TABLE]):
        write(tables, WriteTables(f"{tmp_path}/out", SCHEMA))
    assert [pq.read_table(path).num_rows for path in tmp_path.glob("out/*.parquet")] == [2]
