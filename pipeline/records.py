"""Records as text, and the letters of those that could not be used: plain functions on Arrow, no Beam."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from vae_model.tables import Rejects, cast_cells, is_text

DEAD_LETTER_SCHEMA = pa.schema(
    [
        ("payload", pa.string()),
        ("payload_format", pa.string()),  # json, csv, jsonl; base64 of what is no text; none where there is no payload
        ("source", pa.string()),
        ("attributes", pa.map_(pa.string(), pa.string())),
        ("stage", pa.string()),
        ("column", pa.string()),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("model_version", pa.string()),
        ("event_time", pa.timestamp("us", "UTC")),
        ("num_records", pa.int64()),  # how many records the letter stands for; null where nobody knows
    ]
)


MAX_LINE_BYTES = 16 << 20  # of JSON Lines: a longer one is no record
SOURCE_KEY = b"beam_vae.source"  # in a table's schema metadata: where its rows come from


# ---- dead letters ------------------------------------------------------------------------------


def dead_letters(
    table: pa.Table,
    rejects: Rejects,
    *,
    source: str | None,
    stage: str,
    model_version: str | None = None,
    payload: Sequence[str] | None = None,
) -> pa.Table:
    """One letter per rejected row of a table.

    Args:
        table: The rows as they came, before any cast.
        rejects: Which rows, and why.
        source: Where the rows come from, such as a path.
        stage: What was being done to them, such as "read".
        model_version: The model that was to score them.
        payload: Each row of the table as the JSON text it came as; without it, the row is written
            as JSON.
    """
    reasons = rejects.table()
    rows = reasons["row"]
    texts = _take_json(table, rows) if payload is None else [payload[row] for row in rows.to_numpy()]
    return _letters(
        len(rows),
        payload=texts,
        payload_format="json",
        source=source,
        stage=stage,
        column=reasons["column"],
        error_type=reasons["error_type"],
        error=reasons["error"],
        model_version=model_version,
        num_records=1,
    )


def _take_json(table: pa.Table, rows: pa.ChunkedArray) -> pa.Array:
    if not table.num_columns:  # Arrow would forget the number of rows
        return pa.array(["{}"] * len(rows), pa.string())
    try:
        return json_rows(table.take(rows))
    except pa.ArrowNotImplementedError:  # of views, which not every kernel knows
        return json_rows(table).take(rows.combine_chunks())


def line_letters(
    lines: Sequence[str], errors: Sequence[str], *, payload_format: str, source: str | None, stage: str
) -> pa.Table:
    """One letter per raw line that is no record at all; the line is the payload."""
    return _letters(
        len(lines),
        payload=lines,
        payload_format=payload_format,
        source=source,
        stage=stage,
        error_type="malformed_line",
        error=errors,
        num_records=1,
    )


def record_letters(
    payloads: Sequence[tuple[str, str]],
    faults: Sequence[tuple[str | None, str, str]],
    *,
    attributes: Sequence[dict[str, str] | None],
    event_times: Sequence[int | None],
    stage: str,
    model_version: str | Sequence[str | None] | None,
) -> pa.Table:
    """One letter per record of a stream.

    Args:
        payloads: The records as text, with its format.
        faults: Column, kind of error and error of each.
        attributes: Of each one's message.
        event_times: Microseconds since 1970.
        stage: What was being done to them.
        model_version: The model that was to score them, or did; or that of each, None where it is not known.
    """
    columns, error_types, errors = zip(*faults, strict=True)
    texts, formats = zip(*payloads, strict=True)
    return _letters(
        len(faults),
        payload=texts,
        payload_format=formats,
        attributes=[None if items is None else list(items.items()) for items in attributes],
        stage=stage,
        column=columns,
        error_type=error_types,
        error=errors,
        model_version=model_version,
        event_time=pa.array(event_times, pa.int64()).cast(pa.timestamp("us", "UTC")),
        num_records=1,
    )


def file_letter(source: str, stage: str, error: Exception | str, num_records: int | None) -> pa.Table:
    """The one letter of a file, or of the rest of it, that cannot be read; `num_records` is None if unknown."""
    return _letters(
        1,
        payload_format="none",
        source=source,
        stage=stage,
        error_type="unreadable_file",
        error=f"{source}: {error}",
        num_records=num_records,
    )


def _letters(num_letters: int, **columns: Any) -> pa.Table:
    """A dead-letter table from whole columns, single values for all letters, and nulls for the rest."""
    arrays = []
    for field in DEAD_LETTER_SCHEMA:
        value = columns.get(field.name)
        if value is None or isinstance(value, str | int):
            arrays.append(pa.repeat(pa.scalar(value, field.type), num_letters))
        elif isinstance(value, pa.Array | pa.ChunkedArray):
            arrays.append(value)
        else:
            arrays.append(pa.array(value, field.type))
    return pa.table(arrays, schema=DEAD_LETTER_SCHEMA)


# ---- rows and cells as text --------------------------------------------------------------------


def json_rows(table: pa.Table) -> pa.Array:
    """`(n,)` text: each row as one JSON object, its columns in their order, a repeated name repeated.

    NaN is null, infinity a string (JSON has neither); times are ISO 8601, binary is base64.
    """
    if not table.num_columns:
        return pa.array(["{}"] * table.num_rows, pa.string())
    return _json_objects(table.schema.names, [_whole(column) for column in table.columns])


def text_cells(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Each cell as text without quotes: ISO 8601 for times, JSON for what is nested; null stays null."""
    array = _plain(_whole(array))
    kind = array.type
    if is_text(kind):
        return _valid_text(array)
    if pa.types.is_timestamp(kind):
        iso = pc.replace_substring(array.view(pa.timestamp(kind.unit)).cast(pa.string()), " ", "T", max_replacements=1)
        # A view: the same instant in UTC, whatever the zone and without asking for its rules.
        return pc.binary_join_element_wise(iso, "Z", "") if kind.tz else iso
    if pa.types.is_duration(kind):
        return array.view(pa.int64()).cast(pa.string())
    if pa.types.is_float16(kind):
        return array.cast(pa.float32()).cast(pa.string())
    if (pa.types.is_primitive(kind) and not pa.types.is_interval(kind)) or pa.types.is_decimal(kind):
        return array.cast(pa.string())
    if _is_binary(kind):
        cells = array.to_pylist()
        return pa.array([None if cell is None else base64.b64encode(cell).decode() for cell in cells], pa.string())
    return json_cells(array, null=None)


def json_cells(array: pa.Array | pa.ChunkedArray, null: str | None = "null") -> pa.Array:
    """Each cell as JSON text; `null` is what stands for a null cell."""
    array = _plain(_whole(array))
    kind = array.type
    if pa.types.is_null(kind):
        text = pa.nulls(len(array), pa.string())
    elif pa.types.is_floating(kind):
        wide = array.cast(pa.float32()) if pa.types.is_float16(kind) else array
        numbers = text_cells(wide)
        text = pc.if_else(pc.is_finite(wide), numbers, pc.if_else(pc.is_nan(wide), None, _quoted(numbers)))
    elif pa.types.is_integer(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind):
        text = text_cells(array)
    elif is_text(kind) or _is_binary(kind) or (pa.types.is_temporal(kind) and not pa.types.is_interval(kind)):
        text = text_cells(array) if pa.types.is_duration(kind) else _quoted(text_cells(array))
    elif pa.types.is_map(kind):
        lists = array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
        keys, values = lists.flatten().flatten()
        text = _json_lists(lists, pc.binary_join_element_wise(_quoted(text_cells(keys)), json_cells(values), ":"), "{}")
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        text = _json_lists(array, json_cells(array.flatten()), "[]")
    elif pa.types.is_struct(kind):
        names = [field.name for field in kind]
        text = pc.if_else(array.is_valid(), _json_objects(names, array.flatten()), None) if names else None
    else:
        text = None
    if text is None:  # unions, intervals, views of lists and whatever Arrow has next
        cells = array.to_pylist()
        text = pa.array([None if cell is None else json.dumps(cell, default=str) for cell in cells], pa.string())
    return text if null is None else pc.fill_null(text, null)


def _json_objects(names: Sequence[str], columns: Sequence[pa.Array]) -> pa.Array:
    parts: list[Any] = []
    for name, column in zip(names, columns, strict=True):
        parts += [f"{',' if parts else '{'}{json.dumps(name, ensure_ascii=False)}:", json_cells(column)]
    return pc.binary_join_element_wise(*parts, "}", "")


def _json_lists(lists: pa.Array, items: pa.Array, brackets: str) -> pa.Array:
    """The items, which are texts, back in the lists they were flattened from."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, items), ",")
    return pc.if_else(lists.is_valid(), pc.binary_join_element_wise(brackets[0], joined, brackets[1], ""), None)


def _quoted(text: pa.Array) -> pa.Array:
    """JSON strings."""
    text = pc.replace_substring(pc.replace_substring(text, "\\", "\\\\"), '"', '\\"')
    if pc.any(pc.match_substring_regex(text, r"[\x00-\x1f]")).as_py():
        for code in range(32):
            text = pc.replace_substring(text, chr(code), json.dumps(chr(code))[1:-1])
    return pc.binary_join_element_wise('"', text, '"', "")


def _valid_text(array: pa.Array) -> pa.Array:
    """Text with any byte that is not UTF-8, which Parquet lets through, written as `\\xNN`."""
    raw = array.cast(pa.binary())
    try:
        return raw.cast(pa.string())  # checks every byte
    except pa.ArrowInvalid:
        cells = raw.to_pylist()
        return pa.array(
            [None if cell is None else cell.decode(errors="backslashreplace") for cell in cells], pa.string()
        )


def _plain(array: pa.Array) -> pa.Array:
    """The values themselves, without extension type, dictionary or run-end encoding."""
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            return array


def _whole(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


# ---- JSON Lines --------------------------------------------------------------------------------


class ParsedLines(NamedTuple):
    """What a block of JSON Lines holds."""

    table: pa.Table  # one row per JSON object
    block: bytes  # the lines of those rows, in their order
    wrong_cells: list[tuple[np.ndarray, str, str]]  # rows, column, error
    bad_lines: list[str]  # lines that are no JSON object
    errors: list[str]  # why, one for each


def parse_json_lines(block: bytes, schema: pa.Schema) -> ParsedLines:
    """Parses whole lines, blank ones skipped; an absent key is null, and so is NaN outside real columns.

    Arrow parses the block at once. Where it refuses, lines are parsed one by one, so that a bad
    line or cell costs only its own record. A number, text or truth value is then read as the type
    of its column where it spells one; times come as text only.

    Returns:
        A table with the columns of `schema` that JSON can hold; `tables.conform` casts the rest.
    """
    native = pa.schema([(field.name, _json_type(field.type)) for field in schema])
    long = len(block) > MAX_LINE_BYTES and max(map(len, json_lines(block)), default=0) > MAX_LINE_BYTES
    table = None if long else read_objects(block, native)
    if table is not None:
        return ParsedLines(table, block, [], [], [])
    return _parse_one_by_one(json_lines(block), schema, native)


def read_objects(block: bytes, native: pa.Schema) -> pa.Table | None:
    """Lines of one JSON object each, read by Arrow at once; None where any is something else."""
    # Arrow 25 crashes on a line `null`, and reads records by their braces, whatever the lines are.
    if not _FIRST_OBJECT.match(block) or _OTHER_LINE.search(block):
        return None
    table = parse_objects(block, native)
    num_ends = block.count(b"}\n") + block.count(b"}\r\n") + block.endswith(b"}")
    return table if table is not None and table.num_rows == num_ends == len(json_lines(block)) else None


def parse_objects(block: bytes, native: pa.Schema) -> pa.Table | None:
    """What Arrow reads in lines that all begin and end with braces, which it takes on trust; None where it refuses."""
    try:
        block.decode()  # Arrow does not look
        return pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=native, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None


def json_lines(block: bytes) -> list[bytes]:
    """The lines that are not blank."""
    return [line for line in block.split(b"\n") if line.strip()]


_SHOWN_BYTES = 1000  # of a line that is too long
_FIRST_OBJECT = re.compile(rb"\s*\{")
_OTHER_LINE = re.compile(rb"\n\s*[^{\s]")


def _json_type(kind: pa.DataType) -> pa.DataType:
    """What Arrow's JSON reader is to read for a column; times are text in JSON."""
    if pa.types.is_dictionary(kind):
        return _json_type(kind.value_type)
    if pa.types.is_duration(kind):
        return pa.int64()
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if pa.types.is_temporal(kind) or _is_binary(kind) or is_text(kind) else kind


def _parse_one_by_one(lines: list[bytes], schema: pa.Schema, native: pa.Schema) -> ParsedLines:
    records: list[dict[str, Any]] = []
    good: list[bytes] = []
    bad_lines: list[str] = []
    errors: list[str] = []
    for line in lines:
        try:
            records.append(parse_object(line))
            good.append(line)
        except (ValueError, RecursionError) as error:
            shown = line if len(line) <= MAX_LINE_BYTES else line[:_SHOWN_BYTES]
            bad_lines.append(shown.decode(errors="backslashreplace").rstrip("\r"))
            errors.append(f"expected a JSON object, got {error}")
    columns = []
    wrong_cells = []
    for field, kind in zip(schema, native.types, strict=True):
        text_only = pa.types.is_temporal(field.type) and pa.types.is_string(kind)
        column, bad = _json_column([record.get(field.name) for record in records], kind, text_only)
        if len(bad):
            cell = json.dumps(records[bad[0]][field.name])[:60]
            wrong_cells.append((bad, field.name, f"expected {field.type}, got {cell}"))
        columns.append(column)
    return ParsedLines(pa.table(columns, schema=native), b"\n".join(good), wrong_cells, bad_lines, errors)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        ValueError: It holds something else (or `RecursionError`, where that is nested too deeply).
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB, of which this is the beginning")
    text = line.decode()
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    if "\\ud" in text.lower():
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return record


def _json_column(values: list[Any], wanted: pa.DataType, text_only: bool) -> tuple[pa.Array, np.ndarray]:
    """Each cell cast by its own JSON type, whatever its neighbours are; and the rows that have no such value."""
    # NaN is missing; integers beyond 64 bits go by their digits.
    values = [
        str(value) if type(value) is int and abs(value) >= 2**63 else None if value != value else value
        for value in values
    ]
    column = pa.nulls(len(values), wanted)
    found = {type(value) for value in values}
    for kind in [str] if text_only else [kind for kind in (str, bool, int, float, list, dict) if kind in found]:
        part = [value if type(value) is kind else None for value in values]
        cast = _nested_cells(part, wanted) if kind in (list, dict) else cast_cells(pa.chunked_array([part]), wanted)[0]
        column = pc.coalesce(column, _whole(cast))
    present = np.array([value is not None for value in values], bool)
    return column, np.flatnonzero(present & column.is_null().to_numpy(zero_copy_only=False))


def _nested_cells(values: list[Any], wanted: pa.DataType) -> pa.Array:
    cells = []
    for value in values:
        try:
            cells.append(pa.scalar(value, wanted).as_py())
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, ValueError):
            cells.append(None)
    return pa.array(cells, wanted)
