"""Binary Avro records: read by their headers, written with the score columns added."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_CONFLUENT = struct.Struct(">bi")  # a zero, then the schema's id in its registry


class AvroReader:
    """Binary Avro records of one schema, with the single-object header or none; or of several, with Confluent's.

    Args:
        schema: A dict or JSON text; or one by schema id, `{7: schema, 9: schema}`, where each record begins with
            a zero and its schema's id in four bytes, as Confluent's serializers write them.
    """

    def __init__(self, schema: Any) -> None:
        self.source = schema
        by_id = isinstance(schema, Mapping) and schema and all(isinstance(key, int) for key in schema)
        self.ids = list(schema) if by_id else []
        self._schemas = [_Schema.of(one) for one in (schema.values() if by_id else [schema])]

    def __reduce__(self) -> tuple[Any, ...]:
        return AvroReader, (self.source,)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """As they were given, in that order."""
        return [schema.source for schema in self._schemas]

    def locate(self, content: bytes) -> tuple[int, int]:
        """The place of a record's schema in `schemas`, and where the record begins.

        Raises:
            ValueError: The header names none of them.
        """
        if not self.ids:
            header = self._schemas[0].header
            return 0, len(header) if content.startswith(header) else 0
        if len(content) < _CONFLUENT.size or content[0]:
            raise ValueError("expected a zero and a schema id of four bytes before the Avro record, got other bytes")
        _, found = _CONFLUENT.unpack_from(content)
        if found not in self.ids:
            raise ValueError(f"expected the Avro schema id {' or '.join(map(str, self.ids))}, got {found}")
        return self.ids.index(found), _CONFLUENT.size

    def read(self, content: bytes) -> dict[str, Any]:
        """One record.

        Raises:
            ValueError: The bytes hold no such record, or more than one.
        """
        import fastavro

        place, start = self.locate(content)
        stream = io.BytesIO(content)
        stream.seek(start)
        try:
            record = fastavro.schemaless_reader(stream, self._schemas[place].parsed, None)
        except Exception as error:  # it raises whatever the bytes lead to
            raise ValueError(f"expected an Avro record of the schema, got {len(content)} other bytes") from error
        if not isinstance(record, dict) or stream.read(1):
            raise ValueError(
                f"expected one Avro record of the schema, got {len(content)} bytes that hold something else"
            )
        return record


class _Schema(NamedTuple):
    source: dict[str, Any]
    parsed: Any
    header: bytes

    @classmethod
    def of(cls, schema: Any) -> _Schema:
        import fastavro

        source = json.loads(schema) if isinstance(schema, str) else schema
        parsed = fastavro.parse_schema(source)
        canonical = fastavro.schema.to_parsing_canonical_form(parsed)
        header = b"\xc3\x01" + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
        return cls(source, parsed, header)


class AvroWriter:
    """Writes records with their scores: the bytes as they came, then the score columns.

    Args:
        reader: Of the records.
        fields: The score columns.
        columns: Of the record, to keep; None keeps all.

    Raises:
        ValueError: A kept column is not in a schema, a score column is, or has a name that Avro does not allow.
    """

    def __init__(self, reader: AvroReader, fields: Sequence[pa.Field], columns: Sequence[str] | None) -> None:
        self._reader, self._fields, self._columns = reader, list(fields), columns
        self.schemas = [_scored_schema(schema, self._fields, columns) for schema in reader.schemas]
        self._headers = [_Schema.of(schema).header for schema in self.schemas]
        added = {"type": "record", "name": "Scores", "fields": [_avro_field(field) for field in self._fields]}
        self._added = _Schema.of(added).parsed
        kept = [_scored_schema(schema, [], columns) for schema in reader.schemas]
        self._kept = [_Schema.of(schema).parsed for schema in kept]

    def __reduce__(self) -> tuple[Any, ...]:
        return AvroWriter, (self._reader, self._fields, self._columns)

    def write(self, content: bytes, record: dict[str, Any], scores: dict[str, Any]) -> bytes:
        """One record with the single-object header of its scored schema.

        Args:
            content: As it came.
            record: The same, read.
            scores: By column.
        """
        import fastavro

        place, start = self._reader.locate(content)
        stream = io.BytesIO()
        stream.write(self._headers[place])
        if self._columns is None:
            stream.write(content[start:])  # a record's encoding is that of its fields, one after another
        else:
            fastavro.schemaless_writer(stream, self._kept[place], record)
        fastavro.schemaless_writer(stream, self._added, scores)
        return stream.getvalue()


def _scored_schema(schema: dict[str, Any], fields: Sequence[pa.Field], columns: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise ValueError(f"avro_schema: expected that of a record, got {str(schema)[:60]}")
    own = {field["name"]: field for field in schema["fields"]}
    for name in columns or ():
        if name not in own:
            raise ValueError(f"{name}: named in columns, but the Avro schema has only {', '.join(own)}")
    kept = list(own) if columns is None else columns
    for field in fields:
        if field.name in kept:
            raise ValueError(f"{field.name}: the Avro schema has such a column already; choose a prefix for the scores")
    return {**schema, "fields": [*(own[name] for name in kept), *map(_avro_field, fields)]}


def _avro_field(field: pa.Field) -> dict[str, Any]:
    if not _FIELD_NAME.fullmatch(field.name):
        raise ValueError(f"prefix: expected letters, digits and _ for Avro, got a column named {field.name}")
    if not pa.types.is_list(field.type):
        return {"name": field.name, "type": _AVRO[field.type]}
    reason = [{"name": item.name, "type": ["null", _AVRO[item.type]]} for item in field.type.value_type]
    items = {"type": "record", "name": "beam_vae.AnomalyReason", "fields": reason}
    return {"name": field.name, "type": {"type": "array", "items": items}}


_AVRO = {pa.float32(): "float", pa.bool_(): "boolean", pa.string(): "string"}
