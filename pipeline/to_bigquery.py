"""Tables to BigQuery: which schema an Arrow schema is there, and its rows as BigQuery takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import apache_beam as beam
import orjson
import pyarrow as pa
from apache_beam.io.gcp.bigquery import BigQueryDisposition, WriteToBigQuery
from apache_beam.io.gcp.bigquery_tools import RetryStrategy, parse_table_reference
from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import bigquery

from pipeline.letters import Letters
from pipeline.records import json_rows, record_letters
from pipeline.rows import json_text


@dataclass
class WriteTablesToBigQuery(beam.PTransform):
    """Writes tables of one schema to BigQuery; gives the dead letters of the rows that it refused.

    By streaming inserts: they need no Java where the job is launched, as the Storage Write API does in Beam's Python,
    and give back each row that BigQuery refuses. A row that Beam sends twice is dropped by its insert id where it comes
    within about a minute; the table may hold the others twice. The table is made where there is none, partitioned by
    the day of `event_time`.

    Args:
        table: "PROJECT.DATASET.TABLE", or "PROJECT:DATASET.TABLE".
        schema: The schema of every table.

    Raises:
        ValueError: The name is no table's, or the schema has no place in BigQuery.
    """

    table: str
    schema: pa.Schema

    def __post_init__(self) -> None:
        super().__init__()
        self.reference = beam_name(self.table)
        self.fields = bigquery_fields(self.schema)

    def expand(self, tables: beam.PCollection[pa.Table]) -> beam.PCollection[pa.Table]:
        time, version = (self._last(name) for name in ("event_time", "model_version"))
        partitions = {"timePartitioning": {"type": "DAY", "field": time}} if time else {}
        rows = tables | "ToRows" >> beam.FlatMap(bigquery_rows).with_output_types(dict[str, Any])
        written = rows | "Insert" >> WriteToBigQuery(
            self.reference,
            schema={"fields": self.fields},
            method=WriteToBigQuery.Method.STREAMING_INSERTS,
            create_disposition=BigQueryDisposition.CREATE_IF_NEEDED,
            write_disposition=BigQueryDisposition.WRITE_APPEND,
            # What cannot succeed is set aside, rather than tried for ever with all that comes after it.
            insert_retry_strategy=RetryStrategy.RETRY_ON_TRANSIENT_ERROR,
            additional_bq_parameters=partitions,
        )
        refuse = beam.ParDo(_Refuse(time, version)).with_output_types(pa.Table)
        return written.failed_rows_with_errors | "Refused" >> refuse

    def _last(self, name: str) -> str | None:
        """The score column of that name, which may have a prefix."""
        found: list[str] = [field.name for field in self.schema if field.name.endswith(name)]
        return found[-1] if found else None


@dataclass
class LoadTablesToBigQuery(beam.PTransform):
    """Writes tables of one schema to BigQuery when all are there; gives the name of the table.

    By load jobs: files of JSON Lines go to the pipeline's `temp_location`, and are loaded as a whole or, where BigQuery
    refuses any row, not at all, which fails the pipeline. The table is made where there is none, also for no rows.

    Args:
        table: "PROJECT.DATASET.TABLE", or "PROJECT:DATASET.TABLE".
        schema: The schema of every table.
        overwrite: Replace the table; without it, the table has to be absent or empty.

    Raises:
        ValueError: The name is no table's, or the schema has no place in BigQuery.
    """

    table: str
    schema: pa.Schema
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.reference = beam_name(self.table)
        self.fields = bigquery_fields(self.schema)

    def expand(self, tables: beam.PCollection[pa.Table]) -> beam.PCollection[str]:
        rows = tables | "ToRows" >> beam.FlatMap(bigquery_rows).with_output_types(dict[str, Any])
        written = rows | "Load" >> WriteToBigQuery(
            self.reference,
            schema={"fields": self.fields},
            method=WriteToBigQuery.Method.FILE_LOADS,
            create_disposition=BigQueryDisposition.CREATE_IF_NEEDED,
            write_disposition=(
                BigQueryDisposition.WRITE_TRUNCATE if self.overwrite else BigQueryDisposition.WRITE_EMPTY
            ),
        )
        jobs = (written.destination_load_jobid_pairs, written.destination_copy_jobid_pairs) | "Jobs" >> beam.Flatten()
        make = beam.ParDo(_MakeEmpty(self.fields, self.overwrite), beam.pvalue.AsIter(jobs)).with_output_types(str)
        return tables.pipeline | "Table" >> beam.Create([self.reference]) | "Loaded" >> make

    def refuse(self, project: str | None) -> None:
        """Asks BigQuery whether the rows can be loaded, before there are any.

        Args:
            project: On whose behalf; None for that of the environment.

        Raises:
            ValueError: There is no such dataset, a column of the table is another one, or BigQuery does not answer.
            FileExistsError: The table has rows, and `overwrite` is false.
        """
        with client_for(self.table, project) as client:
            try:
                table = client.get_table(client_name(self.reference))
            except NotFound:
                client.get_dataset(client_name(self.reference).rpartition(".")[0])
                return
        if self.overwrite:
            return
        if table.num_rows or table.streaming_buffer:
            raise FileExistsError(f"bigquery:{self.table}: has rows already; choose another table or --overwrite")
        problem = _difference(self.fields, [field.to_api_repr() for field in table.schema])
        if problem:
            raise ValueError(f"bigquery:{self.table}: is there, but not for these rows: {problem}; see --overwrite")


class _MakeEmpty(beam.DoFn):
    """Makes the table where no job loaded any rows, for which Beam starts none."""

    def __init__(self, fields: list[dict[str, Any]], overwrite: bool) -> None:
        self._fields, self._overwrite = fields, overwrite

    def process(self, reference: str, jobs: Iterable[Any]) -> Iterator[str]:
        if next(iter(jobs), None) is None:
            schema = [bigquery.SchemaField.from_api_repr(field) for field in self._fields]
            table = bigquery.Table(client_name(reference), schema)
            client = bigquery.Client(project=table.project)
            if self._overwrite:
                client.delete_table(table, not_found_ok=True)
            client.create_table(table, exists_ok=True)
        yield reference


def beam_name(table: str) -> str:
    """A table's name as Beam writes it, PROJECT:DATASET.TABLE.

    Raises:
        ValueError: It is none.
    """
    # A project may belong to a domain, as in example.com:project.
    found = re.fullmatch(r"((?:[^:]+:)?[^:.]+)[:.]([\w-]+)\.([^.:]+)", table)
    if found is None:
        raise ValueError(f"expected bigquery:PROJECT.DATASET.TABLE, got bigquery:{table}")
    name = f"{found[1]}:{found[2]}.{found[3]}"
    parse_table_reference(name)  # raises where Beam would, later
    return name


def client_name(reference: str) -> str:
    """Beam's name of a table as Google's client writes it, PROJECT.DATASET.TABLE."""
    project, _, rest = reference.rpartition(":")
    return f"{project}.{rest}"


@contextmanager
def client_for(place: str, project: str | None) -> Iterator[bigquery.Client]:
    """Google's client; what it raises in the block becomes a `ValueError` that names the place.

    Args:
        place: What follows "bigquery:".
        project: To which requests are charged; None for that of the environment.
    """
    try:
        yield bigquery.Client(project=project)
    except DefaultCredentialsError:
        raise ValueError(
            f"bigquery:{place}: expected Google's application default credentials, found none; see docs/stores.md"
        ) from None
    except GoogleAPICallError as error:
        details = error.errors[0]["message"] if error.errors else error.message
        raise ValueError(f"bigquery:{place}: {details}") from error
    except (GoogleAuthError, OSError) as error:  # such as no project
        raise ValueError(f"bigquery:{place}: {error}") from error


def refuse_strangers(place: str) -> None:
    """Raises `ValueError` where there are no credentials."""
    with client_for(place, "any"):
        pass


def _difference(fields: list[dict[str, Any]], found: list[dict[str, Any]]) -> str | None:
    """The first column that a table of these fields could not take, in words."""
    there = {field["name"].lower(): field for field in found}
    for field in fields:
        other = there.pop(field["name"].lower(), None)
        if other is None:
            return f"{field['name']}: the table has no such column"
        wanted, got = (_kind(item) for item in (field, other))
        if wanted != got:
            return f"{field['name']}: expected {wanted}, got {got}"
        inner = _difference(field["fields"], other["fields"]) if field["type"] == "RECORD" else None
        if inner:
            return f"{field['name']}.{inner}"
    required = [field["name"] for field in there.values() if field.get("mode") == "REQUIRED"]
    return f"{required[0]}: the table requires it" if required else None


def _kind(field: dict[str, Any]) -> str:
    kind = field["type"].upper()
    return f"{field.get('mode') or 'NULLABLE'} {LEGACY_NAMES.get(kind, kind)}"


LEGACY_NAMES = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN", "STRUCT": "RECORD"}


class _Refuse(beam.DoFn):
    """Rows that BigQuery refused, as dead letters; the columns of time and version say more of them."""

    def __init__(self, time: str | None, version: str | None) -> None:
        self._time, self._version = time or "", version or ""
        self._letters = Letters()

    def process(self, failed: tuple[str, dict[str, Any], Sequence[Any]]) -> list[pa.Table]:
        table, row, errors = failed
        letters = record_letters(
            [(json_text(row), "json")],
            [(None, "refused_by_bigquery", f"{table}: {json_text(errors)}")],
            attributes=[None],
            event_times=[_micros(row.get(self._time))],
            stage="write",
            model_version=row.get(self._version),
        )
        self._letters.count(letters)
        return [letters]


def _micros(text: str | None) -> int | None:
    """Microseconds since 1970 of a time as `bigquery_rows` writes it."""
    return None if text is None else (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bigquery_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as JSON values that BigQuery reads: ISO 8601 times, base64, NaN as null; no null lists.

    Decimals and integers of 64 bits are text, for a float does not hold all of them. Of times, what is finer than
    microseconds is cut off.
    """
    columns = [_insertable(column) for column in table.columns]
    names = [name for name, field in zip(table.column_names, table.schema, strict=True) if _is_list(field.type)]
    rows = [orjson.loads(line) for line in json_rows(pa.table(columns, names=table.column_names)).to_pylist()]
    for row in rows:
        for name in names:
            row[name] = row[name] or []
    return rows


def _insertable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = _insertable_type(column.type)
    return column if kind == column.type else column.cast(kind, safe=False)


def _insertable_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_decimal(kind) or pa.types.is_int64(kind) or pa.types.is_uint64(kind):
        return pa.string()
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_map(kind):
        items = [("key", _insertable_type(kind.key_type)), ("value", _insertable_type(kind.item_type))]
        return pa.list_(pa.struct(items))
    if _is_list(kind):
        return pa.list_(_insertable_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_insertable_type(field.type)) for field in kind])
    return kind


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_map(kind)
    )


def bigquery_fields(schema: pa.Schema) -> list[dict[str, Any]]:
    """A table schema of BigQuery, as its API takes it.

    Durations are whole numbers of their unit, maps are lists of keys and values.

    Raises:
        ValueError: A column has no such place, or a name that BigQuery does not take.
    """
    return [_field(field.name, field.type, field.name) for field in schema]


def _field(name: str, kind: pa.DataType, column: str) -> dict[str, Any]:
    # Its rule for any client; flexible names need the Storage Write API.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,299}", name):
        raise ValueError(f"{column}: expected a name of letters, digits and underscores for BigQuery; see --columns")
    if pa.types.is_dictionary(kind):
        return _field(name, kind.value_type, column)
    if pa.types.is_map(kind):
        kind = pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))
    if _is_list(kind):
        if _is_list(kind.value_type):
            raise ValueError(f"{column}: expected no list of lists, which BigQuery lacks; see --columns")
        return {**_field(name, kind.value_type, column), "mode": "REPEATED"}
    if pa.types.is_struct(kind):
        fields = [_field(item.name, item.type, column) for item in kind]
        return {"name": name, "type": "RECORD", "mode": "NULLABLE", "fields": fields}
    for is_such, type_name in _TYPES:
        if is_such(kind):
            return {"name": name, "type": type_name, "mode": "NULLABLE"}
    raise ValueError(f"{column}: expected a type that BigQuery has, got {kind}; see --columns")


def _is_wide(kind: pa.DataType) -> bool:
    """More than the 38 digits, 9 of them after the point, of NUMERIC."""
    return pa.types.is_decimal(kind) and (kind.scale > 9 or kind.precision - kind.scale > 29)


_TYPES = [
    (pa.types.is_boolean, "BOOLEAN"),
    (pa.types.is_uint64, "NUMERIC"),
    (pa.types.is_integer, "INTEGER"),
    (pa.types.is_duration, "INTEGER"),
    (pa.types.is_floating, "FLOAT"),
    (_is_wide, "BIGNUMERIC"),
    (pa.types.is_decimal, "NUMERIC"),
    (pa.types.is_string, "STRING"),
    (pa.types.is_large_string, "STRING"),
    (pa.types.is_string_view, "STRING"),
    (pa.types.is_binary, "BYTES"),
    (pa.types.is_large_binary, "BYTES"),
    (pa.types.is_fixed_size_binary, "BYTES"),
    (pa.types.is_binary_view, "BYTES"),
    (lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None, "TIMESTAMP"),
    (pa.types.is_timestamp, "DATETIME"),
    (pa.types.is_date, "DATE"),
    (pa.types.is_time, "TIME"),
    (pa.types.is_null, "STRING"),
]
