"""One pass over a table: which rows do what, and the statistics of those to learn from."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from vae_model import files
from vae_model.bundle import refuse_clash
from vae_model.config import TrainingConfig
from vae_model.schema import choose_kinds, nothing_to_learn
from vae_model.statistics import QuantileSketch, TableStatistics
from vae_model.tables import RecordError, Tables, as_numbers, as_times

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Told the stage, the work done, the work in all, and the losses while training."""

MIN_ROWS = 20
FOLD_ROWS = 1000  # tables with fewer rows are calibrated by cross-conformal folds
FORMAT = 1  # of a statistics file
_MAX_VALIDATION_ROWS = 20_000
_MAX_CALIBRATION_ROWS = 100_000
_MAX_HELD_OUT_CELLS = 1 << 26  # so that fewer rows of very wide tables are held out

TRAIN, VALIDATION, CALIBRATION, LEFT_OUT = range(4)


@dataclass(frozen=True)
class Split:
    """Which rows do what; a row's role depends on its position, the seed, and the columns named here.

    Args:
        validation: Share of rows held out for early stopping.
        calibration: Share of rows held out for calibration.
        seed: Of the choice.
        label: Column whose 1s are left out of everything.
        time_column: Rows later than `time_limit` (microseconds) in this column calibrate, no others.
        time_limit: See there.
    """

    validation: float
    calibration: float
    seed: int
    label: str | None = None
    time_column: str | None = None
    time_limit: int = 0

    @property
    def columns(self) -> list[str]:
        """Columns that roles depend on."""
        return [name for name in (self.label, self.time_column) if name]

    @property
    def cross_conformal(self) -> bool:
        """Whether no rows are held out for calibration, so that folds calibrate."""
        return self.calibration == 0 and not self.time_column

    def with_limit(self, times: QuantileSketch) -> Split:
        """The split by a time column whose values are known.

        Raises:
            RecordError: There are none.
        """
        if not len(times.points()[0]):
            raise RecordError(f"{self.time_column}: expected times, got none")
        return replace(self, time_limit=int(times.quantile(1 - self.calibration)))

    def roles(self, table: pa.Table, start: int) -> np.ndarray:
        """`(n,)` roles of rows that begin at position `start` of the whole."""
        draw = uniform(np.arange(start, start + table.num_rows, dtype=np.uint64), self.seed)
        if self.time_column:
            times, present, _ = as_times(table.column(self.time_column))
            late = present & (times > self.time_limit)
            roles = np.where(late, CALIBRATION, np.where(draw < self.validation, VALIDATION, TRAIN))
        else:
            edges = np.array([self.calibration, self.calibration + self.validation])
            roles = np.array([CALIBRATION, VALIDATION, TRAIN])[np.searchsorted(edges, draw, side="right")]
        if self.label:
            roles = np.where(labels(table, self.label), LEFT_OUT, roles)
        return roles


def uniform(positions: np.ndarray, seed: int) -> np.ndarray:
    """`(n,)` numbers in [0, 1) that look random, one per position (SplitMix64: Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) + np.uint64(seed & 0xFFFFFFFF) * np.uint64(0xD1B54A32D192ED03)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def labels(table: pa.Table, column: str) -> np.ndarray:
    """`(n,)` true where a label column says anomaly; null is no anomaly.

    Raises:
        RecordError: A label is neither 0 nor 1.
    """
    values, bad = as_numbers(table.column(column))
    if len(bad) or not np.isin(values[~np.isnan(values)], (0, 1)).all():
        raise RecordError(f"{column}: expected labels 0 and 1, got others")
    return values == 1


def columns_and_roles(
    tables: Tables,
    training: TrainingConfig,
    *,
    label: str | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    timestamp: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[dict[str, str], dict[str, str], Split]:
    """What a fit with these arguments reads: columns to take statistics of, columns only carried, the rows' roles.

    The time limit, for which the rows have to be read, is left 0.

    Raises:
        ValueError: A wrong column name, too few rows, or no column to learn from.
    """
    for role, column in {"label": label, "time_column": training.time_column}.items():
        if column and column not in tables.schema.names:
            raise ValueError(f"{column}: named as {role}, but the table has no such column")
    hidden = dict.fromkeys([*exclude, *([label] if label else [])])
    kinds, passthrough = choose_kinds(
        tables.schema, numeric=numeric, categorical=categorical, timestamp=timestamp, exclude=hidden
    )
    if label:
        passthrough[label] = "the label"
    refuse_clash(kinds)
    if tables.num_rows < MIN_ROWS:
        raise ValueError(f"expected at least {MIN_ROWS} rows to learn from, got {tables.num_rows}")
    if not kinds:  # without columns Arrow forgets the rows
        raise nothing_to_learn(0, passthrough)
    return kinds, passthrough, choose_shares(tables, training, label)


def choose_shares(tables: Tables, training: TrainingConfig, label: str | None) -> Split:
    """Shares of rows by their number; without the time limit, for which the rows have to be read."""
    n = tables.num_rows
    most = _MAX_HELD_OUT_CELLS // max(len(tables.schema.names), 1)
    validation = min(training.validation_fraction, min(_MAX_VALIDATION_ROWS, most / 4) / n)  # held encoded
    calibration = training.calibration_fraction or max(0.1, min(0.3, 1000 / n))
    calibration = min(calibration, min(_MAX_CALIBRATION_ROWS, most) / n)
    if not training.time_column and n < FOLD_ROWS and training.calibration_fraction is None:
        calibration = 0.0
    return Split(validation, calibration, training.seed, label, training.time_column)


def choose_split(tables: Tables, training: TrainingConfig, label: str | None) -> Split:
    """Shares of rows by their number, and the time limit where a time column decides.

    Raises:
        RecordError: The time column holds no times.
    """
    return limited(choose_shares(tables, training, label), tables)


def limited(split: Split, tables: Tables) -> Split:
    """The split with its time limit, for which the time column is read, where there is one.

    Raises:
        RecordError: It holds no times.
    """
    if not split.time_column:
        return split
    times = QuantileSketch()
    for _, table in tables.scan([split.time_column]):
        add_times(times, split, table)
    return split.with_limit(times)


def add_times(times: QuantileSketch, split: Split, table: pa.Table) -> None:
    """Adds a table's times, in microseconds.

    Raises:
        RecordError: The time column holds something else.
    """
    found, present, bad = as_times(table.column(str(split.time_column)))
    if len(bad):
        raise RecordError(f"{split.time_column}: expected times, got others")
    times.update(found[present].astype(np.float64))


class TableScan:
    """What one pass tells: statistics of the rows that are not held out for calibration, and how many do what.

    Mergeable: of parts of a table in any order.

    Args:
        kinds: Column name to "numeric", "categorical" or "timestamp".
    """

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.statistics = TableStatistics(kinds)
        self.num_rows = np.zeros(LEFT_OUT + 1, np.int64)  # of each role

    def update(self, table: pa.Table, start: int, split: Split) -> None:
        """Adds rows that begin at position `start` of the whole.

        Raises:
            RecordError: A row of any role but LEFT_OUT holds a cell that cannot be read.
        """
        roles = split.roles(table, start)
        self.num_rows += np.bincount(roles, minlength=len(self.num_rows))
        table = table.select(list(self.kinds))
        held_out = TableStatistics(self.kinds)  # its only use: bad cells there must show now, not after training
        for part, keep in ((self.statistics, roles < CALIBRATION), (held_out, roles == CALIBRATION)):
            part.update(table.filter(pa.array(keep)), start + np.flatnonzero(keep))

    def merge(self, other: TableScan) -> None:
        self.statistics.merge(other.statistics)
        self.num_rows += other.num_rows

    def check(self, split: Split) -> None:
        """Raises `ValueError` where a role has too few rows."""
        if self.statistics.num_rows < MIN_ROWS:
            raise ValueError(f"expected at least {MIN_ROWS} training rows, got {self.statistics.num_rows}")
        if not (split.cross_conformal or self.num_rows[:LEFT_OUT].all()):
            raise ValueError(
                f"expected rows to train, validate and calibrate on, got {self.num_rows[TRAIN]:,}, "
                f"{self.num_rows[VALIDATION]:,} and {self.num_rows[CALIBRATION]:,}; change validation_fraction, "
                "calibration_fraction or time_column"
            )

    def __reduce__(self) -> tuple[Any, ...]:  # the sketches do not pickle
        return TableScan.from_json, (self.to_json(),)

    def to_json(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows.tolist(), "statistics": self.statistics.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TableScan:
        statistics = TableStatistics.from_json(values["statistics"])
        scan = cls({name: column.kind for name, column in statistics.columns.items()})
        scan.statistics, scan.num_rows = statistics, np.array(values["num_rows"], np.int64)
        return scan


def scan_columns(kinds: dict[str, str], split: Split) -> list[str]:
    """The columns that a pass reads."""
    return list(dict.fromkeys([*kinds, *split.columns]))


def scan_table(tables: Tables, kinds: dict[str, str], split: Split, report: Progress) -> TableScan:
    """One pass over all rows.

    Raises:
        RecordError: A row of any role but LEFT_OUT holds a cell that cannot be read.
        ValueError: A role has too few rows.
    """
    scan = TableScan(kinds)
    for start, table in tables.scan(scan_columns(kinds, split)):
        scan.update(table, start, split)
        report("statistics", start + table.num_rows, tables.num_rows, {})
    scan.check(split)
    return scan


# ---- the statistics file -------------------------------------------------------------------------


def fingerprint(tables: Tables) -> str:
    """Tells tables apart by their columns and the sizes of their row groups, without reading rows."""
    layout = [(block.num_rows, block.num_bytes) for block in tables.blocks]
    columns = base64.b64encode(tables.schema.remove_metadata().serialize()).decode()
    return hashlib.sha256(json.dumps([columns, layout]).encode()).hexdigest()[:32]


def write_scan(uri: str, scan: TableScan, split: Split, table: str) -> None:
    """Writes a statistics file, whole.

    Args:
        uri: Where to.
        scan: The pass.
        split: By which it was made.
        table: `fingerprint` of what was read.
    """
    content = {"format": FORMAT, "table": table, "split": vars(split), **scan.to_json()}
    files.write_file(uri, json.dumps(content).encode())


def read_scan(uri: str, tables: Tables, kinds: dict[str, str], split: Split) -> tuple[TableScan, Split]:
    """The pass that a statistics file holds, and its split, which has a time limit.

    Args:
        uri: Written by `write_scan`.
        tables: What is to be learned from.
        kinds: The columns wanted.
        split: The split wanted, without a time limit.

    Raises:
        ValueError: It is no such file, or one of another table or other arguments.
    """
    try:
        content = json.loads(files.read_file(uri))
        if content["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {content['format']}")
        scan, found = TableScan.from_json(content), Split(**content["split"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri}: is no statistics file that this version reads ({error!r})") from error
    if content["table"] != fingerprint(tables):
        raise ValueError(f"{uri}: was taken of another table, or of another state of it; take the statistics again")
    again = "take the statistics again with the flags of this fit"
    for name in [*kinds, *scan.kinds]:
        wanted, got = kinds.get(name, "nothing"), scan.kinds.get(name, "nothing")
        if wanted != got:
            raise ValueError(f"{uri}: expected {name} read as {wanted}, got it read as {got}; {again}")
    for name, value in vars(split).items():
        if name != "time_limit" and value != (got := getattr(found, name)):
            raise ValueError(f"{uri}: expected {name} {value}, got {got}; {again}")
    return scan, found
