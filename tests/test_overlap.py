import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_model.overlap import TableWriter, ahead, table_writer

SCHEMA = pa.schema([("x", pa.float64())])
TABLE = pa.table({"x": [1.0, 2.0]})
SOON = 30  # seconds after which something that should have happened has not


def test_reading_ahead_gives_the_same_items_in_order():
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead(iter([]))) == []


def test_the_next_item_is_made_while_one_is_used():
    second_is_made = threading.Event()

    def items():
        yield 1
        second_is_made.set()
        yield 2

    read = ahead(items())
    assert next(read) == 1
    assert second_is_made.wait(SOON)
    assert list(read) == [2]


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise OSError("gone")

    read = ahead(items())
    assert [next(read), next(read)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(read)


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    read = ahead(iter(range(10)))
    next(read)
    read.close()
    assert threading.active_count() == before


def test_tables_are_read_as_they_were_written_and_the_thread_ends():
    before = threading.active_count()
    stream = io.BytesIO()
    with table_writer(stream, SCHEMA) as writer:
        for _ in range(5):
            writer.write(TABLE)
    assert pq.read_table(io.BytesIO(stream.getvalue())).equals(pa.concat_tables([TABLE] * 5))
    assert threading.active_count() == before


def test_no_table_gives_a_file_with_the_schema():
    stream = io.BytesIO()
    with table_writer(stream, SCHEMA):
        pass
    assert pq.read_table(io.BytesIO(stream.getvalue())).equals(SCHEMA.empty_table())


class _FullDisk(io.BytesIO):
    """Takes 1,000 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("num_tables", [1, 2, 20])
def test_a_failed_write_is_raised_at_the_next_table_or_at_the_end(num_tables):
    before = threading.active_count()
    table = pa.table({"x": np.random.default_rng(0).normal(size=1000)})
    stream = _FullDisk()
    writer = TableWriter(stream, SCHEMA)

    def write_all():
        for _ in range(num_tables):
            writer.write(table)
        writer.close()

    with pytest.raises(OSError, match="No space left"):
        write_all()
    writer.abandon()
    assert threading.active_count() == before


def test_a_block_that_fails_leaves_no_thread():
    before = threading.active_count()

    def fail():
        with table_writer(io.BytesIO(), SCHEMA) as writer:
            writer.write(TABLE)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert threading.active_count() == before


def test_only_columns_that_repeat_values_get_a_dictionary():
    rng = np.random.default_rng(0)
    n = 5000
    reasons = pa.array([[{"feature": "a"}]] * n, pa.list_(pa.struct([("feature", pa.string())])))
    table = pa.table(
        {
            "random": rng.normal(size=n),
            "rounded": rng.normal(size=n).round(1),
            "id": [f"id-{i}" for i in range(n)],
            "color": rng.choice(["red", "green"], n),
            "reasons": reasons,
        }
    )
    stream = io.BytesIO()
    with table_writer(stream, table.schema) as writer:
        writer.write(table)
    row_group = pq.read_metadata(io.BytesIO(stream.getvalue())).row_group(0)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    with_dictionary = [column.path_in_schema for column in columns if column.has_dictionary_page]
    assert with_dictionary == ["rounded", "color", "reasons.list.element.feature"]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert pq.read_table(io.BytesIO(stream.getvalue())).equals(table)
