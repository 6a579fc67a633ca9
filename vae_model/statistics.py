"""One-pass, mergeable column statistics: the same objects fold over row groups, machines and streams.

Heavy hitters and distinct counts are Apache DataSketches. Its quantile sketches draw random bits that
cannot be seeded, so that the same table and seed would give another model; `QuantileSketch` draws none.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasketches
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae_model.tables import RecordError, as_levels, as_numbers, as_times, example

MAX_LEVELS = 65_536  # kept by name in one column; a sketch of 2^17 slots counts up to 98,304 exactly
_LG_SLOTS = 17
_LG_DISTINCT = 12
_GRANULARITIES = np.array([86_400_000_000, 3_600_000_000, 60_000_000, 1_000_000, 1])  # microseconds


def merge_points(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted points, ascending, each value once."""
    points, where = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
    return points, np.bincount(where, np.concatenate([w for _, w in parts]))


class QuantileSketch:
    """A mergeable summary of a distribution: weighted points, exact while at most 2,048 values are distinct.

    Summaries of equal age merge pairwise, as in Manku, Rajagopalan and Lindsay (SIGMOD 1998): after
    B updates a rank is off by at most (1 + log2(B)) / 4096. A value in more than one row of 2,048
    keeps its exact share, so that it does not swallow the others.
    """

    max_points: ClassVar[int] = 2048

    def __init__(self, levels: dict[int, tuple[np.ndarray, np.ndarray]] | None = None) -> None:
        self._levels = levels or {}

    def update(self, values: np.ndarray) -> None:
        """Adds finite values `(n,)`."""
        if len(values):
            self._insert(0, *np.unique(values, return_counts=True))

    def merge(self, other: QuantileSketch) -> None:
        for level, (points, weights) in other._levels.items():
            self._insert(level, points, weights)

    def _insert(self, level: int, points: np.ndarray, weights: np.ndarray) -> None:
        points, weights = self._compress(points, weights)
        while level in self._levels:
            points, weights = merge_points([self._levels.pop(level), (points, weights)])
            points, weights = self._compress(points, weights)
            level += 1
        self._levels[level] = points, weights

    def _compress(self, points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = weights.astype(np.float64)
        light = weights <= weights.sum() / self.max_points
        if light.sum() <= self.max_points:
            return points, weights
        cumulative = np.cumsum(weights[light])
        step = cumulative[-1] / self.max_points
        targets = (np.arange(self.max_points) + 0.5) * step
        chosen, counts = np.unique(np.searchsorted(cumulative, targets), return_counts=True)
        return merge_points([(points[light][chosen], counts * step), (points[~light], weights[~light])])

    def compact(self) -> None:
        """Merges all summaries into one, as small as that of one batch; a rank is then off by 1 / 4096 more."""
        if len(self._levels) > 1:
            self._levels = {max(self._levels): self._compress(*self.points())}

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values, ascending, and the number of rows that each stands for."""
        if not self._levels:
            return np.empty(0), np.empty(0)
        return merge_points(list(self._levels.values()))

    def quantile(self, ranks: np.ndarray | float) -> np.ndarray:
        """Values at ranks in [0, 1]."""
        points, weights = self.points()
        cumulative = np.cumsum(weights)
        where = np.searchsorted(cumulative, np.asarray(ranks) * cumulative[-1])
        return points[np.minimum(where, len(points) - 1)]

    def to_json(self) -> list[list[Any]]:
        return [[level, points.tolist(), weights.tolist()] for level, (points, weights) in self._levels.items()]

    @classmethod
    def from_json(cls, values: list[list[Any]]) -> QuantileSketch:
        return cls({level: (np.array(points), np.array(weights)) for level, points, weights in values})


@dataclass
class NumericStatistics:
    """Of a column of numbers; missing is null or NaN."""

    kind: ClassVar[str] = "numeric"
    num_rows: int = 0
    num_missing: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations from the mean
    minimum: float = np.inf
    maximum: float = -np.inf
    # Sums for the correlation of the value with the row's position, and each batch's position, first
    # and last value while all move one way (None: they do not): how a counter gives itself away.
    position_mean: float = 0.0
    position_m2: float = 0.0
    position_product: float = 0.0
    runs: list[tuple[int, float, float]] | None = field(default_factory=list)
    quantiles: QuantileSketch = field(default_factory=QuantileSketch)

    def update(self, name: str, column: pa.ChunkedArray, start: int | np.ndarray) -> None:
        values, bad = as_numbers(column)
        rows = _positions(start, len(column))
        if len(bad):
            raise RecordError(f"{name}: expected numbers, got {example(column, bad)} in row {rows[bad[0]]:,}")
        present = ~np.isnan(values)
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise RecordError(
                f"{name}: expected finite numbers, got {len(infinite):,} infinite, the first in row "
                f"{rows[infinite[0]]:,}; make them null, or exclude the column"
            )
        positions = rows[present].astype(np.float64)
        values = values[present]
        part = NumericStatistics(num_rows=len(present), num_missing=int(len(present) - len(values)))
        if len(values):
            with np.errstate(over="ignore", invalid="ignore"):
                part.mean, part.position_mean = float(values.mean()), float(positions.mean())
                deviations, moves = values - part.mean, positions - part.position_mean
                part.m2, part.position_m2 = float(deviations @ deviations), float(moves @ moves)
                part.position_product = float(deviations @ moves)
            part.minimum, part.maximum = float(values.min()), float(values.max())
            part.runs = [(int(rows[0]), float(values[0]), float(values[-1]))] if _one_way(values) else None
            part.quantiles.update(values)
        self.merge(part)

    def merge(self, other: NumericStatistics) -> None:
        # Chan, Golub and LeVeque (1983).
        a, b = self.num_rows - self.num_missing, other.num_rows - other.num_missing
        if b:
            with np.errstate(over="ignore", invalid="ignore"):
                delta, move = np.float64(other.mean) - self.mean, np.float64(other.position_mean) - self.position_mean
                share, cross = b / (a + b), a * b / (a + b)
                self.m2 = float(self.m2 + other.m2 + delta * delta * cross)
                self.position_m2 = float(self.position_m2 + other.position_m2 + move * move * cross)
                self.position_product = float(self.position_product + other.position_product + delta * move * cross)
                self.mean = float(self.mean + delta * share)
                self.position_mean = float(self.position_mean + move * share)
        self.num_rows += other.num_rows
        self.num_missing += other.num_missing
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.runs = _joined(self.runs, other.runs)
        self.quantiles.merge(other.quantiles)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values, ascending, from the least to the largest, and the rows that each stands for."""
        points, weights = self.quantiles.points()
        if not len(points):
            return points, weights
        ends = np.setdiff1d([self.minimum, self.maximum], points)  # a large sketch begins and ends inside the data
        return merge_points([(points, weights), (ends, np.ones(len(ends)))])

    @property
    def stddev(self) -> float:
        """Population standard deviation; from the quantiles where squares overflow."""
        n = self.num_rows - self.num_missing
        if n == 0:
            return 0.0
        variance = self.m2 / n
        if np.isfinite(variance) and (variance > 0 or self.minimum == self.maximum):
            return float(np.sqrt(variance))
        low, high = self.quantiles.quantile(np.array([0.16, 0.84]))
        spread = high / 2 - low / 2 or self.maximum / 2 - self.minimum / 2
        return float(max(spread, np.finfo(np.float64).tiny))

    @property
    def drifts(self) -> bool:
        """Whether the column moves one way through the rows: a counter, a year, a load time."""
        if self.num_rows - self.num_missing < 3 or self.minimum == self.maximum:
            return False
        scale = np.sqrt(self.m2) * np.sqrt(self.position_m2)
        correlated = np.isfinite(scale) and scale > 0 and abs(self.position_product) / scale >= 0.98
        return bool(correlated or self.runs)


def _joined(
    a: list[tuple[int, float, float]] | None, b: list[tuple[int, float, float]] | None
) -> list[tuple[int, float, float]] | None:
    """The runs of both, in the order of their rows, or None once they do not all move one way."""
    if a is None or b is None:
        return None
    runs = sorted(a + b)
    return runs if _one_way(np.array([value for _, *ends in runs for value in ends])) else None


def _one_way(values: np.ndarray) -> bool:
    return bool((values[1:] >= values[:-1]).all() or (values[1:] <= values[:-1]).all())


@dataclass
class CategoricalStatistics:
    """Of a column of levels, named as text."""

    kind: ClassVar[str] = "categorical"
    num_rows: int = 0
    num_missing: int = 0
    num_characters: int = 0
    levels: Any = field(default_factory=lambda: datasketches.frequent_strings_sketch(_LG_SLOTS))
    distinct: Any = field(default_factory=lambda: datasketches.hll_sketch(_LG_DISTINCT, datasketches.HLL_8))

    def update(self, name: str, column: pa.ChunkedArray, start: int | np.ndarray) -> None:
        levels = as_levels(column)
        self.num_rows += len(levels)
        self.num_missing += levels.null_count
        self.num_characters += pc.sum(pc.utf8_length(levels)).as_py() or 0
        counts = levels.drop_null().value_counts()
        for level, count in zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True):
            self.levels.update(level, count)
            self.distinct.update(level)

    def merge(self, other: CategoricalStatistics) -> None:
        self.num_rows += other.num_rows
        self.num_missing += other.num_missing
        self.num_characters += other.num_characters
        self.levels.merge(other.levels)
        union = datasketches.hll_union(_LG_DISTINCT)
        union.update(self.distinct)
        union.update(other.distinct)
        self.distinct = union.get_result(datasketches.HLL_8)

    def most_frequent(self) -> list[tuple[str, int]]:
        """Levels and their counts, most frequent first (then by name), at most `MAX_LEVELS`."""
        items = self.levels.get_frequent_items(datasketches.NO_FALSE_POSITIVES)
        ranked = sorted(((level, int(count)) for level, count, _, _ in items), key=lambda item: (-item[1], item[0]))
        return ranked[:MAX_LEVELS]

    @property
    def num_distinct(self) -> float:
        """Estimated number of levels, within about 2 %."""
        return float(self.distinct.get_estimate())


@dataclass
class TimeStatistics:
    """Of a column of timestamps, dates or times of day."""

    kind: ClassVar[str] = "timestamp"
    num_rows: int = 0
    num_missing: int = 0
    minimum: int = np.iinfo(np.int64).max  # microseconds since 1970
    maximum: int = np.iinfo(np.int64).min
    granularity: int = 0  # position in day, hour, minute, second, microsecond: the coarsest that all share
    hours: np.ndarray = field(default_factory=lambda: np.zeros(24, np.int64))
    weekdays: np.ndarray = field(default_factory=lambda: np.zeros(7, np.int64))
    months: np.ndarray = field(default_factory=lambda: np.zeros(12, np.int64))

    def update(self, name: str, column: pa.ChunkedArray, start: int | np.ndarray) -> None:
        times, present, bad = as_times(column)
        if len(bad):
            row = _positions(start, len(column))[bad[0]]
            raise RecordError(f"{name}: expected times, got {example(column, bad)} in row {row:,}")
        self.num_rows += len(times)
        self.num_missing += int(len(times) - present.sum())
        times = times[present]
        if not len(times):
            return
        self.minimum, self.maximum = min(self.minimum, int(times.min())), max(self.maximum, int(times.max()))
        while (times % _GRANULARITIES[self.granularity]).any():
            self.granularity += 1
        self.hours = self.hours + np.bincount(times // _GRANULARITIES[1] % 24, minlength=24)
        self.weekdays = self.weekdays + np.bincount(weekday(times), minlength=7)
        self.months = self.months + np.bincount(month(times), minlength=12)

    def merge(self, other: TimeStatistics) -> None:
        self.num_rows += other.num_rows
        self.num_missing += other.num_missing
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.granularity = max(self.granularity, other.granularity)
        self.hours, self.weekdays = self.hours + other.hours, self.weekdays + other.weekdays
        self.months = self.months + other.months

    @property
    def resolution(self) -> int:
        """The coarsest of day, hour, minute, second, microsecond that divides every time, in microseconds."""
        return int(_GRANULARITIES[self.granularity])


def _positions(start: int | np.ndarray, num_rows: int) -> np.ndarray:
    return start if isinstance(start, np.ndarray) else np.arange(start, start + num_rows)


def weekday(times: np.ndarray) -> np.ndarray:
    """0 Monday to 6 Sunday, of microseconds since 1970 (a Thursday)."""
    return (times // _GRANULARITIES[0] + 3) % 7


def month(times: np.ndarray) -> np.ndarray:
    """0 January to 11 December, of microseconds since 1970."""
    return times.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64) % 12


ColumnStatistics = NumericStatistics | CategoricalStatistics | TimeStatistics
_KINDS: dict[str, type[ColumnStatistics]] = {
    cls.kind: cls for cls in (NumericStatistics, CategoricalStatistics, TimeStatistics)
}


class TableStatistics:
    """Statistics of the columns of a table.

    Args:
        kinds: Column name to "numeric", "categorical" or "timestamp".
    """

    def __init__(self, kinds: dict[str, str]) -> None:
        self.num_rows = 0
        self.columns: dict[str, ColumnStatistics] = {name: _KINDS[kind]() for name, kind in kinds.items()}

    def update(self, table: pa.Table, start: int | np.ndarray) -> None:
        """Adds rows.

        Args:
            table: The rows.
            start: Position of the first of them in the whole, or `(n,)` of each.

        Raises:
            RecordError: A cell is infinite or is not of the column's kind.
        """
        self.num_rows += table.num_rows
        for name, statistics in self.columns.items():
            statistics.update(name, table.column(name), start)

    def merge(self, other: TableStatistics) -> None:
        self.num_rows += other.num_rows
        for name, statistics in self.columns.items():
            statistics.merge(other.columns[name])  # type: ignore[arg-type]

    def compact(self) -> None:
        """Makes the statistics about as small as those of one batch of rows."""
        for statistics in self.columns.values():
            if isinstance(statistics, NumericStatistics):
                statistics.quantiles.compact()

    def to_json(self) -> dict[str, Any]:
        columns = {}
        for name, statistics in self.columns.items():
            values = {key: _to_json(value) for key, value in vars(statistics).items()}
            columns[name] = {"kind": statistics.kind, **values}
        return {"num_rows": self.num_rows, "columns": columns}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TableStatistics:
        table = cls({name: column["kind"] for name, column in values["columns"].items()})
        table.num_rows = values["num_rows"]
        for name, statistics in table.columns.items():
            for key, old in vars(statistics).items():
                setattr(statistics, key, _from_json(old, values["columns"][name][key]))
        return table


def _to_json(value: Any) -> Any:
    if isinstance(value, QuantileSketch):
        return value.to_json()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, datasketches.frequent_strings_sketch):
        return base64.b64encode(value.serialize()).decode()
    if isinstance(value, datasketches.hll_sketch):
        return base64.b64encode(value.serialize_compact()).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value


def _from_json(like: Any, value: Any) -> Any:
    if isinstance(like, QuantileSketch):
        return QuantileSketch.from_json(value)
    if isinstance(like, np.ndarray):
        return np.array(value)
    if isinstance(like, datasketches.frequent_strings_sketch | datasketches.hll_sketch):
        return type(like).deserialize(base64.b64decode(value))
    if isinstance(like, list) and value is not None:
        return [tuple(item) for item in value]
    return float(value) if isinstance(like, float) else value
