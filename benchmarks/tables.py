"""Labelled tables, and how each is split into rows to train on and rows to test on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABEL = "label"
CLEAN_ROWS = 1000  # DTE's protocol draws smaller tables with replacement: training rows come back as test rows


@dataclass(frozen=True)
class Labelled:
    """A table without its label, and the label apart."""

    rows: pa.Table
    anomalous: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class Split:
    """Normal rows to train on; rows to test on, whose labels only the benchmark sees."""

    train: pa.Table
    test: pa.Table
    anomalous: np.ndarray  # (test rows,) bool


def find_tables(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The folder's Parquet files, or those named, the largest first.

    Raises:
        ValueError: There is none, or a file has no label column.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    if unknown := sorted(set(names) - set(paths)):
        raise ValueError(
            f"{folder}: expected {', '.join(unknown)}.parquet, got {', '.join(paths) or 'no Parquet file'}"
        )
    chosen = [paths[name] for name in names] or list(paths.values())
    if not chosen:
        raise ValueError(f"{folder}: expected Parquet files, got none")
    cells = {}
    for path in chosen:
        metadata = pq.read_metadata(path)
        if LABEL not in metadata.schema.to_arrow_schema().names:
            raise ValueError(f"{path}: expected a column {LABEL!r}, got none")
        cells[path] = metadata.num_rows * metadata.num_columns
    return sorted(chosen, key=lambda path: -cells[path])


def read_table(path: Path) -> Labelled:
    """Reads a table and takes its label out.

    Raises:
        ValueError: The label is anything but 0 and 1.
    """
    table = pq.read_table(path)
    label = table.column(LABEL).to_numpy(zero_copy_only=False)
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"{path}: {LABEL}: expected 0 and 1 only, got {list(np.unique(label.astype(str))[:5])}")
    return Labelled(table.drop_columns([LABEL]), label.astype(bool))


def _parts(table: Labelled, train: np.ndarray, test: np.ndarray) -> Split:
    return Split(table.rows.take(pa.array(train)), table.rows.take(pa.array(test)), table.anomalous[test])


def dte_split(table: Labelled, seed: int, cap: int) -> Split:
    """The semi-supervised protocol of DTE (Livernoche et al., ICLR 2024), row for row.

    Rows under 1,000 are drawn with replacement up to 1,000, rows over the cap without down to it; the first half
    of the normal rows in the order that results trains, the other half and all anomalies are tested on.
    """
    n = len(table.anomalous)
    random = np.random.RandomState(seed)  # numpy.random.seed's draws: the published figures hang on them
    rows = np.arange(n)
    if n < CLEAN_ROWS:
        rows = random.choice(rows, CLEAN_ROWS, replace=True)
    elif n > cap:
        rows = random.choice(rows, cap, replace=False)
    normal, anomalies = rows[~table.anomalous[rows]], rows[table.anomalous[rows]]
    half = round(len(normal) / 2)
    return _parts(table, normal[:half], np.concatenate([normal[half:], anomalies]))


def holdout_split(table: Labelled, seed: int, cap: int) -> Split:
    """A random half of the normal rows trains, the other half and all anomalies are tested on.

    Of larger tables, `cap` rows are drawn first, without replacement.
    """
    rows = np.random.default_rng(seed).permutation(len(table.anomalous))[:cap]
    normal, anomalies = rows[~table.anomalous[rows]], rows[table.anomalous[rows]]
    half = round(len(normal) / 2)
    return _parts(table, normal[:half], np.concatenate([normal[half:], anomalies]))


PROTOCOLS: dict[str, Callable[[Labelled, int, int], Split]] = {"dte": dte_split, "holdout": holdout_split}
