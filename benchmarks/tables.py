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
    """Rows to train on, normal ones but for a contaminated split; rows to test on, whose labels no detector sees."""

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
        raise ValueError(f"{path}: {LABEL}: expected 0 and 1 only, got {np.unique(label.astype(str))[:5].tolist()}")
    return Labelled(table.drop_columns([LABEL]), label.astype(bool))


def parts(table: Labelled, train: np.ndarray, test: np.ndarray) -> Split:
    """A split by the positions of its rows.

    Raises:
        ValueError: There is nothing to train on, or not both kinds of rows to test on.
    """
    num_anomalies = int(table.anomalous[test].sum())
    if not len(train) or num_anomalies in (0, len(test)):
        found = f"{len(train)} to train on, {len(test) - num_anomalies} and {num_anomalies} to test on"
        raise ValueError(f"expected normal rows to train on, normal rows and anomalies to test on, got {found}")
    return Split(table.rows.take(pa.array(train)), table.rows.take(pa.array(test)), table.anomalous[test])


def _half_of_the_normal_rows(table: Labelled, rows: np.ndarray) -> Split:
    """The first half of the normal ones among these rows, in their order, against all others."""
    normal, anomalies = rows[~table.anomalous[rows]], rows[table.anomalous[rows]]
    half = round(len(normal) / 2)
    return parts(table, normal[:half], np.concatenate([normal[half:], anomalies]))


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
    return _half_of_the_normal_rows(table, rows)


def holdout_split(table: Labelled, seed: int, cap: int) -> Split:
    """A random half of the normal rows trains, the other half and all anomalies are tested on.

    Of larger tables, `cap` rows are drawn first, without replacement.
    """
    rows = np.random.default_rng(seed).permutation(len(table.anomalous))[:cap]
    return _half_of_the_normal_rows(table, rows)


def contaminated_split(table: Labelled, seed: int, cap: int, share: float) -> Split:
    """As `holdout_split`, but a share of the training rows are anomalies.

    They come from a random half of the anomalies, which is never tested on: the test rows are the same for any share.

    Raises:
        ValueError: That half is too small.
    """
    random = np.random.default_rng(seed)
    rows = random.permutation(len(table.anomalous))[:cap]
    normal, anomalies = rows[~table.anomalous[rows]], rows[table.anomalous[rows]]
    half, pool = round(len(normal) / 2), len(anomalies) // 2
    wanted = round(half * share / (1 - share))
    if wanted > pool:
        raise ValueError(f"expected {wanted:,} anomalies to mix into {half:,} normal rows, got {pool:,}")
    train = random.permutation(np.concatenate([normal[:half], anomalies[:wanted]]))
    return parts(table, train, np.concatenate([normal[half:], anomalies[pool:]]))


def count_normal(path: Path) -> int:
    """Rows labelled 0."""
    return int((pq.read_table(path, columns=[LABEL]).column(LABEL).to_numpy(zero_copy_only=False) == 0).sum())


PROTOCOLS: dict[str, Callable[[Labelled, int, int], Split]] = {"dte": dte_split, "holdout": holdout_split}
