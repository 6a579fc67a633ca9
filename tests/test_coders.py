import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that

import pipeline.coders  # noqa: F401  makes it known

SCHEMA = pa.schema([("x", pa.float64()), ("s", pa.dictionary(pa.int8(), pa.string()))], {"from": "here"})
TABLE = pa.table({"x": [1.5, None, 3.0], "s": pa.array(["a", "b", None]).dictionary_encode()}).cast(SCHEMA)
CHUNKED = pa.concat_tables([TABLE, TABLE.slice(1)])


@pytest.mark.parametrize("table", [TABLE, TABLE.slice(1, 1), TABLE.slice(0, 0), CHUNKED, TABLE.select([])])
def test_tables_come_out_as_they_went_in(table):
    coder = beam.coders.registry.get_coder(pa.Table)
    assert coder.decode(coder.encode(table)).equals(table, check_metadata=True)


def test_a_slice_travels_without_the_rest_of_its_table():
    coder = beam.coders.registry.get_coder(pa.Table)
    table = pa.table({"x": range(100_000)})
    assert len(coder.encode(table.slice(10, 10))) < 2000
    assert coder.estimate_size(table.slice(10, 10)) == 80


def test_tables_pass_a_shuffle():
    with beam.Pipeline(runner="FnApiRunner") as p:
        tables = p | beam.Create([TABLE, CHUNKED]).with_output_types(pa.Table) | beam.Reshuffle()
        assert_that(tables, lambda found: sorted(t.num_rows for t in found) == [3, 5] or pytest.fail(str(found)))
