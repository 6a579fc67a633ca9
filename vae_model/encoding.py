"""An Arrow table to the arrays that the network reads, column by column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae_model.schema import CategoricalFeature, ConstantFeature, NumericFeature, TableSchema, TimestampFeature
from vae_model.tables import Rejects, as_levels, as_numbers, as_times, cast_cells, example, is_text

_BLOCK_ROWS = 4096  # 32 KiB of float64


@dataclass
class EncodedTable:
    """Rows as the network reads them.

    Args:
        inputs: By name; a name is absent where the schema has nothing of its kind.
            `numbers (n, views * numeric)` float32, view by view; `angles (n, parts)` float32 radians;
            `categories (n, learned categories)` int32, 0 unseen or missing; `present (n, features)`
            float32, 0 where missing; `fixed_nll (n, features)` float32, the nats that no latent moves.
        codes: `(n,)` int32 of each categorical feature by name, for explanations.
        rejects: Rows that cannot be scored; their numbers here mean nothing.
    """

    inputs: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    rejects: Rejects

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of some rows (their numbers, a mask or a slice)."""
        return {name: values[rows] for name, values in self.inputs.items()}


def encode(table: pa.Table, schema: TableSchema, views: tuple[str, ...]) -> EncodedTable:
    """Encodes the features of a table; rows that do not fit are noted, never raised.

    A row is rejected for an infinite number, a cell of the wrong type, or a column that is missing
    or there twice.
    """
    n, num_features = table.num_rows, len(schema.features)
    rejects = Rejects(n)
    inputs: dict[str, np.ndarray] = {}
    if schema.numeric:
        inputs["numbers"] = np.zeros((n, len(views) * len(schema.numeric)), np.float32)
    if schema.timestamps:
        inputs["angles"] = np.zeros((n, sum(len(f.parts) for f in schema.timestamps)), np.float32)
    if schema.learned_categories:
        inputs["categories"] = np.zeros((n, len(schema.learned_categories)), np.int32)
    present = inputs["present"] = np.ones((n, num_features), np.float32)
    fixed_nll = inputs["fixed_nll"] = np.empty((n, num_features), np.float32)
    missing_nll = [(0.0, 0.0) if feature.nullable else feature.missing_nll() for feature in schema.features]
    fixed_nll[:] = [if_present for if_present, _ in missing_nll]
    numbers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    codes: dict[str, np.ndarray] = {}
    num_parts = num_categories = 0
    for j, feature in enumerate(schema.features):
        found = table.schema.get_all_field_indices(feature.name)
        if len(found) != 1:
            missing = ("missing_column", "expected such a column, got none")
            repeated = ("duplicate_column", f"expected the column once, got it {len(found)} times")
            rejects.add(np.arange(n), feature.name, *(repeated if found else missing))
            continue
        column = _as_trained(table.column(found[0]), schema.arrow_type(feature.name))
        if isinstance(feature, NumericFeature):
            numbers[j] = _, here = _finite(column, feature.name, rejects)
        elif isinstance(feature, TimestampFeature):
            times, here, bad = as_times(column)
            if len(bad):
                rejects.add(bad, feature.name, "wrong_type", f"expected a time, got {example(column, bad)}")
            inputs["angles"][:, num_parts : num_parts + len(feature.parts)] = feature.angles(times)
            num_parts += len(feature.parts)
        elif isinstance(feature, CategoricalFeature):
            if isinstance(feature, ConstantFeature) and feature.number is not None:
                values, here = _finite(column, feature.name, rejects)
                # A float32 0.1 is another number as a float64.
                narrow = np.float32 if schema.arrow_type(feature.name) == pa.float32() else np.float64
                code = (values.astype(narrow) == narrow(feature.number)).astype(np.int32)
            else:
                code, here = _codes(column, feature, schema.arrow_type(feature.name))
                if pa.types.is_nested(column.type) and here.any():
                    bad = np.flatnonzero(here)
                    rejects.add(bad, feature.name, "wrong_type", f"expected a level, got {example(column, bad)}")
            codes[feature.name] = code
            fixed_nll[:, j] = (feature.code_nll + missing_nll[j][0]).astype(np.float32)[code]
            if feature.num_classes > 1:
                inputs["categories"][:, num_categories] = feature.classes(code)
                num_categories += 1
        if not here.all():
            present[:, j] = here
            fixed_nll[~here, j] = missing_nll[j][1]
    _encode_numbers(numbers, schema, views, inputs)
    return EncodedTable(inputs, codes, rejects)


def _encode_numbers(
    numbers: dict[int, tuple[np.ndarray, np.ndarray]],
    schema: TableSchema,
    views: tuple[str, ...],
    inputs: dict[str, np.ndarray],
) -> None:
    """Writes `inputs["numbers"]`, given the values of numeric features by position and whether each is there."""
    # Block by block, which stay in the cache: every column is written across all of its rows.
    for start in range(0, len(inputs["present"]), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        for j, (values, here) in numbers.items():
            feature, block, there = schema.numeric[j], values[rows], here[rows]
            complete = there.all()
            if not complete:
                block = np.where(there, block, feature.mean)
            encoded: dict[bool, np.ndarray] = {}  # views of a column may be the same
            for v, view in enumerate(views):
                by_rank = feature.by_rank(view)
                if by_rank not in encoded:
                    found = feature.encode(block, view)
                    encoded[by_rank] = found if complete else np.where(there, found, 0)
                inputs["numbers"][rows, v * len(schema.numeric) + j] = encoded[by_rank]


def _as_trained(column: pa.ChunkedArray, trained: pa.DataType) -> pa.ChunkedArray:
    """Durations in the unit, and zoned timestamps in the zone, of the training table."""
    kind = column.type
    if pa.types.is_duration(kind) and pa.types.is_duration(trained):
        return pc.divide(
            column.cast(pa.int64()).cast(pa.float64(), safe=False), _PER_SECOND[kind.unit] / _PER_SECOND[trained.unit]
        )
    if pa.types.is_timestamp(kind) and pa.types.is_timestamp(trained) and kind.tz and trained.tz:
        return column.cast(pa.timestamp(kind.unit, trained.tz))
    return column


def _codes(column: pa.ChunkedArray, feature: CategoricalFeature, trained: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    """The code of each cell `(n,)`, and whether it has a value."""
    kind = column.type
    if pa.types.is_primitive(kind) and not pa.types.is_float16(kind):
        column = column.dictionary_encode()
    if not pa.types.is_dictionary(column.type):
        levels = _levels(column, trained)
        return feature.codes(levels), levels.is_valid().to_numpy()
    codes, here = [np.empty(0, np.int32)], [np.empty(0, bool)]
    for chunk in column.chunks:  # each distinct value is written as text once
        levels = _levels(pa.chunked_array([chunk.dictionary]), trained)
        places = chunk.indices.cast(pa.int64()).fill_null(-1).to_numpy()
        codes.append(np.append(feature.codes(levels), np.int32(0))[places])
        here.append(np.append(levels.is_valid().to_numpy(), False)[places])
    return np.concatenate(codes), np.concatenate(here)


def _levels(column: pa.ChunkedArray, trained: pa.DataType) -> pa.ChunkedArray:
    """Levels as the training table would spell them: 1 as "true" where it held booleans; others as they are."""
    own = as_levels(column)
    if column.type == trained or is_text(trained) or pa.types.is_dictionary(trained) or is_text(column.type):
        return own
    cast, bad = cast_cells(column, trained)
    return pc.coalesce(as_levels(cast), own) if len(bad) else as_levels(cast)


_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _finite(column: pa.ChunkedArray, name: str, rejects: Rejects) -> tuple[np.ndarray, np.ndarray]:
    """Values `(n,)` float64 and whether each is a finite number; what is neither that nor missing is rejected."""
    values, bad = as_numbers(column)
    if len(bad):
        rejects.add(bad, name, "wrong_type", f"expected a number, got {example(column, bad)}")
    finite = np.isfinite(values)
    if not finite.all():
        infinite = np.isinf(values)
        if infinite.any():
            rejects.add(infinite, name, "not_finite", "expected a finite number, got an infinite one")
    return values, finite
