"""Generated tables for the benchmarks: columns that depend on a few hidden causes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_A_TIME = 100_000


def make_table(num_rows: int, num_numeric: int, num_categorical: int, seed: int) -> pa.Table:
    """Float64 columns `n00...` and string columns `c00...` of 4 to 400 levels."""
    mixing = np.random.default_rng(0)
    weights = mixing.normal(size=(5, num_numeric))
    cuts = [np.sort(mixing.normal(size=4 * 2**i)) for i in range(num_categorical)]
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(num_rows, 5))
    numbers = np.tanh(causes @ weights) + 0.1 * rng.normal(size=(num_rows, num_numeric))
    columns = {f"n{j:02d}": numbers[:, j] for j in range(num_numeric)}
    for j, edges in enumerate(cuts):
        levels = np.searchsorted(edges[:400], causes[:, j % 5] + 0.3 * rng.normal(size=num_rows))
        names = pa.array([f"level-{i}" for i in range(len(edges) + 1)])
        columns[f"c{j:02d}"] = names.take(pa.array(levels))
    return pa.table(columns)


def write_table(path: Path, num_rows: int, num_numeric: int = 30, num_categorical: int = 0) -> Path:
    """Writes such a table as Parquet, in row groups of 100,000 rows, unless it is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    schema = make_table(1, num_numeric, num_categorical, 0).schema
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for i, start in enumerate(range(0, num_rows, _ROWS_AT_A_TIME)):
            size = min(_ROWS_AT_A_TIME, num_rows - start)
            writer.write_table(make_table(size, num_numeric, num_categorical, i + 1))
    partial.rename(path)
    return path
