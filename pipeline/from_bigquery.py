"""Rows of BigQuery as tables: which Arrow schema they have, and their values as Beam reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.gcp.bigquery import ReadFromBigQuery
from apache_beam.metrics import Metrics
from google.cloud import bigquery

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.letters import NAMESPACE, Letters
from pipeline.records import SOURCE_KEY, dead_letters
from pipeline.sources import ReadResult
from pipeline.to_bigquery import LEGACY_NAMES, beam_name, client_for, client_name
from vae_model.tables import conform, rows_at_a_time

_QUERY = re.compile(r"\s*(select|with)\s", re.IGNORECASE)


@dataclass
class ReadTablesFromBigQuery(beam.PTransform):
    """A table or the result of a query in; `.tables` of exactly one schema and `.dead_letters` out.

    By an export: BigQuery writes Avro files to the pipeline's `temp_location`, and Beam reads and deletes them. Every
    row is one of a table or counted by a dead letter. Columns beyond the schema are dropped.

    Args:
        place: "PROJECT.DATASET.TABLE", or a query in GoogleSQL.
        schema: The columns to read and their types: of `bigquery_schema`.
        required: Columns that a row has to have.

    Raises:
        ValueError: The place is neither.
    """

    place: str
    schema: pa.Schema
    required: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__init__()
        is_query = _QUERY.match(self.place)
        self._what = (
            {"query": self.place, "use_standard_sql": True, "flatten_results": False}
            if is_query
            else {"table": beam_name(self.place)}
        )

    def expand(self, pbegin: beam.pvalue.PBegin) -> ReadResult:
        size = rows_at_a_time(len(self.schema))
        read = _ToTables(f"bigquery:{self.place}", self.schema, tuple(self.required))
        tables, letters = (
            pbegin
            | "Export" >> ReadFromBigQuery(**self._what)
            | "Batch" >> beam.BatchElements(min_batch_size=size, max_batch_size=size)
            | "ToTables" >> beam.ParDo(read).with_outputs("dead_letters", main="tables")
        )
        return ReadResult(tables, letters)


class _ToTables(beam.DoFn):
    def __init__(self, source: str, schema: pa.Schema, required: tuple[str, ...]) -> None:
        self._source, self._schema, self._required = source, schema, required
        self._letters = Letters()
        self._num_records = Metrics.counter(NAMESPACE, "num_records")

    def process(self, rows: list[dict[str, Any]]) -> Iterator[Any]:
        self._num_records.inc(len(rows))
        found = [field for field in self._schema if field.name in rows[0]]
        columns = [_column([row[field.name] for row in rows], field.type) for field in found]
        read = pa.table(columns, names=[field.name for field in found])
        table, rejects = conform(read, self._schema, self._required)
        if len(rejects):
            yield self._letters.send(dead_letters(read, rejects, source=self._source, stage="read"))
            table = table.filter(rejects.keep)
        yield table.replace_schema_metadata({SOURCE_KEY: self._source})


def _column(cells: list[Any], kind: pa.DataType) -> pa.Array:
    """The cells of a column; those that Arrow cannot hold leave it as text, of which each is read by itself."""
    try:
        return pa.array(cells, _avro_type(kind))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())


def _avro_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values in an export: of a DATETIME, text."""
    if pa.types.is_timestamp(kind) and kind.tz is None:
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_avro_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_avro_type(field.type)) for field in kind])
    return kind


def bigquery_schema(place: str, project: str | None) -> pa.Schema:
    """The columns of a table, or of a query's result, without reading any.

    Args:
        place: See `ReadTablesFromBigQuery`.
        project: On whose behalf; by default the table's own.

    Raises:
        ValueError: There is no such table, the query is wrong or nobody's, a column has a type that is not read, or
            BigQuery does not answer.
    """
    name = None if _QUERY.match(place) else beam_name(place)
    if not (name or project):
        raise ValueError("missing --project: a query needs one")
    with client_for(place, project or str(name).rpartition(":")[0]) as client:
        if name is None:
            job = client.query(place, bigquery.QueryJobConfig(dry_run=True, use_query_cache=False))
            fields = job.schema or []
        else:
            table = client.get_table(client_name(name))
            if table.table_type != "TABLE":
                raise ValueError(f"bigquery:{place}: expected a table, got a {table.table_type}; read it by a query")
            fields = table.schema
    return pa.schema([pa.field(field.name, _arrow_type(field, field.name)) for field in fields])


def _arrow_type(field: bigquery.SchemaField, column: str) -> pa.DataType:
    name = LEGACY_NAMES.get(field.field_type, field.field_type)
    if name == "RECORD":
        kind = pa.struct([pa.field(item.name, _arrow_type(item, column)) for item in field.fields])
    elif name in _TYPES:
        kind = _TYPES[name]
    else:
        raise ValueError(f"{column}: expected one of {', '.join(_TYPES)}, RECORD, got {name}; leave it out by a query")
    return pa.list_(kind) if field.mode == "REPEATED" else kind


_TYPES = {
    "STRING": pa.string(),
    "BYTES": pa.binary(),
    "INTEGER": pa.int64(),
    "FLOAT": pa.float64(),
    "NUMERIC": pa.decimal128(38, 9),
    "BIGNUMERIC": pa.decimal256(76, 38),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "DATETIME": pa.timestamp("us"),
    "DATE": pa.date32(),
    "TIME": pa.time64("us"),
    "GEOGRAPHY": pa.string(),
    "JSON": pa.string(),
}
