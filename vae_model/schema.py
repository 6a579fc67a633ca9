"""What a model knows about its table: which columns it reads, and how a cell becomes numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtri

from vae_model.statistics import (
    CategoricalStatistics,
    ColumnStatistics,
    NumericStatistics,
    TableStatistics,
    TimeStatistics,
    weekday,
)
from vae_model.tables import is_text, knows_zone

MAX_CLASSES = 256  # levels of one column with a probability of their own; rarer ones share one
MIN_CLASS_ROWS = 3
_NUM_KNOTS = 257
_EDGE_SCORE = 5.2  # normal score of a value beyond all training values, as in scikit-learn
_LINEAR_STDDEVS = 10.0  # z-scores beyond are compressed to their logarithm, so that 1e300 stays finite
_GAUSSIAN_KURTOSIS = 3.0
_DAY = 86_400_000_000


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A column that the model reads.

    Args:
        num_rows: Training rows.
        num_missing: Of these, rows without a value.
    """

    kind: ClassVar[str]
    name: str
    num_rows: int
    num_missing: int

    @property
    def nullable(self) -> bool:
        """Whether the model can learn when the column is missing."""
        return 0 < self.num_missing < self.num_rows

    @property
    def description(self) -> str:
        """What is known of the column, in a few words."""
        return self.kind

    def missing_nll(self) -> tuple[float, float]:
        """-log p(present), -log p(missing) of a column whose missingness is not learned, in nats."""
        least = 1 / (self.num_rows + 2)
        p = min(max(self.num_missing / max(self.num_rows, 1), least), 1 - least)
        return -math.log1p(-p), -math.log(p)

    def to_json(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"kind": self.kind, **values}


@dataclass(frozen=True, kw_only=True)
class NumericFeature(Feature):
    """A real-valued column, read in up to two views.

    Args:
        mean: Of the training values; a z-score is `(value - mean) / stddev`.
        stddev: Of the training values.
        minimum: Smallest training value.
        maximum: Largest training value.
        resolution: Typical gap between neighbouring values, as a z-score.
        knots: Training values, ascending.
        knot_scores: Standardised normal score of each knot; values between are interpolated.
        edge_scores: Scores of values below and above all knots.
        quantile_resolution: Typical gap between neighbouring values, as a normal score.
        heavy_tailed: Whether the z-scores' kurtosis is above a Gaussian's.
        is_integer: Whether the column's type holds whole numbers.
    """

    kind: ClassVar[str] = "numeric"
    mean: float
    stddev: float
    minimum: float
    maximum: float
    resolution: float
    knots: tuple[float, ...]
    knot_scores: tuple[float, ...]
    edge_scores: tuple[float, float]
    quantile_resolution: float
    heavy_tailed: bool
    is_integer: bool

    @property
    def description(self) -> str:
        return f"{self.minimum:.4g} to {self.maximum:.4g}, mean {self.mean:.4g}, stddev {self.stddev:.4g}"

    @cached_property
    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.knots), np.array(self.knot_scores)

    def by_rank(self, view: str) -> bool:
        """Whether a view, see `VAEConfig`, is that of normal scores; else it is that of z-scores."""
        return view == "quantile" or (view == "compressed" and self.heavy_tailed)

    def encode(self, values: np.ndarray, view: str) -> np.ndarray:
        """What the network reads `(n,)`."""
        return self.quantile(values) if self.by_rank(view) else self.standard(values)

    def decode(self, encoded: np.ndarray, view: str) -> np.ndarray:
        """Values of what the network reads, within the training values."""
        return self.from_quantile(encoded) if self.by_rank(view) else self.from_standard(encoded)

    def resolution_of(self, view: str) -> float:
        """Typical gap between neighbouring values, as the network reads them."""
        return self.quantile_resolution if self.by_rank(view) else self.resolution

    def standard(self, values: np.ndarray) -> np.ndarray:
        """z-scores `(n,)`, logarithmic beyond ten standard deviations; finite for finite values."""
        return _z_scores(values, self.mean, self.stddev)

    def quantile(self, values: np.ndarray) -> np.ndarray:
        """Standardised normal scores `(n,)` of the values' ranks among the training values."""
        return _interpolate(values, *self._curve, *self.edge_scores)

    def normal_scores(self, standardised: np.ndarray) -> np.ndarray:
        """Normal scores of the ranks, of any shape, from the standardised ones that `quantile` gives.

        Exact where no training value's score lies beyond +-5.2, as under five million rows.
        """
        low, high = self.edge_scores
        return (standardised - low) * (2 * _EDGE_SCORE / (high - low)) - _EDGE_SCORE

    def from_standard(self, z: np.ndarray) -> np.ndarray:
        """Values of z-scores, kept within the training values."""
        beyond = np.maximum(np.abs(z) / _LINEAR_STDDEVS - 1, 0)
        with np.errstate(over="ignore"):
            z = np.where(beyond > 0, np.copysign(_LINEAR_STDDEVS * np.exp(np.minimum(beyond, 700)), z), z)
            return np.clip(self.mean + self.stddev * z, self.minimum, self.maximum)

    def from_quantile(self, scores: np.ndarray) -> np.ndarray:
        """Values of standardised normal scores, within the training values."""
        knots, knot_scores = self._curve
        return _interpolate(scores, knot_scores, knots)


def _z_scores(values: np.ndarray, mean: float, stddev: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = values / stddev - mean / stddev if stddev > 1 else (values - mean) / stddev
    if max(z.max(initial=0), -z.min(initial=0)) > _LINEAR_STDDEVS:
        wild = np.abs(z) > _LINEAR_STDDEVS
        size = np.minimum(np.abs(z[wild]), np.finfo(np.float64).max)
        z[wild] = np.copysign(_LINEAR_STDDEVS * (1 + np.log(size / _LINEAR_STDDEVS)), z[wild])
    return z


def _interpolate(x: np.ndarray, xs: np.ndarray, ys: np.ndarray, *edges: float) -> np.ndarray:
    """`np.interp`, several times faster, sorting included: each of sorted values lies next to the one before it.

    Where the slope between two points is beyond a float's range, the next point's value.
    """
    order = np.argsort(x, axis=None)
    y = np.empty(x.size)
    y[order] = np.interp(x.ravel()[order], xs, ys, *edges)
    wild = ~np.isfinite(y)
    if wild.any():
        y[wild] = ys[np.searchsorted(xs, x.ravel()[wild]).clip(0, len(xs) - 1)]
    return y.reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class TimestampFeature(Feature):
    """A column of times, read as positions on the circles of the day, the week and the year.

    Args:
        parts: Of "hour", "weekday", "month": those that training covers.
        resolutions: Typical gap between neighbouring positions of each part, in radians.
    """

    kind: ClassVar[str] = "timestamp"
    parts: tuple[str, ...]
    resolutions: tuple[float, ...]

    @property
    def description(self) -> str:
        return "read as " + ", ".join(self.parts)

    def angles(self, times: np.ndarray) -> np.ndarray:
        """`(n, parts)` radians of microseconds since 1970."""
        turns = {
            "hour": lambda: times % _DAY / _DAY,
            "weekday": lambda: weekday(times) / 7,
            "month": lambda: (pc.month(pa.array(times).view(pa.timestamp("us"))).to_numpy() - 1) / 12,
        }
        return np.stack([2 * np.pi * turns[part]() for part in self.parts], axis=1)


@dataclass(frozen=True, kw_only=True)
class CategoricalFeature(Feature):
    """A column of levels.

    The most frequent levels have a class, and so a probability, of their own; rarer ones share the
    last class in proportion to their counts. A level never seen has the mass that Good and Turing
    give it: the share of levels seen once.

    Args:
        levels: Levels seen in training, most frequent first.
        counts: Training rows of each.
        num_classes: Levels with a class of their own, plus one for the others if there are any.
        unseen: Probability of a level that is not among `levels`.
    """

    kind: ClassVar[str] = "categorical"
    levels: tuple[str, ...]
    counts: tuple[int, ...]
    num_classes: int
    unseen: float

    @property
    def description(self) -> str:
        more = ", ..." if len(self.levels) > 4 else ""
        return f"{len(self.levels):,} levels: {', '.join(self.levels[:4])}{more}"

    @cached_property
    def _value_set(self) -> pa.Array:
        return pa.array(self.levels, pa.string())

    def codes(self, levels: pa.ChunkedArray) -> np.ndarray:
        """`(n,)` position of each level plus 1; 0 for unseen and missing ones."""
        found = pc.index_in(levels, value_set=self._value_set, skip_nulls=True)
        return pc.fill_null(found, -1).to_numpy() + np.int32(1)

    def classes(self, codes: np.ndarray) -> np.ndarray:
        """`(n,)` class of each code: 0 unseen, 1 to `num_classes`."""
        return np.minimum(codes, self.num_classes)

    @cached_property
    def code_nll(self) -> np.ndarray:
        """`(levels + 1,)` the part of each code's NLL that its class does not settle, in nats."""
        nll = np.full(len(self.levels) + 1, -np.log1p(-self.unseen) if self.levels else 0.0)
        nll[0] = -np.log(self.unseen)
        if len(self.levels) > self.num_classes:
            pooled = np.array(self.counts[self.num_classes - 1 :], np.float64)
            nll[self.num_classes :] -= np.log(pooled / pooled.sum())
        return nll

    @cached_property
    def class_probabilities(self) -> np.ndarray:
        """`(num_classes,)` share of each class among the training rows, smoothed."""
        counts = np.array(self.counts[: self.num_classes], np.float64)
        if len(self.counts) > self.num_classes:
            counts[-1] = sum(self.counts[self.num_classes - 1 :])
        return (counts + 1) / (counts.sum() + len(counts))

    @cached_property
    def class_names(self) -> list[str]:
        """What to call classes 0 to `num_classes`."""
        names = ["(unseen)", *self.levels[: self.num_classes]]
        if len(self.levels) > self.num_classes:
            names[-1] = f"(one of {len(self.levels) - self.num_classes + 1} rare)"
        return names


@dataclass(frozen=True, kw_only=True)
class ConstantFeature(CategoricalFeature):
    """A column with one value in all training rows, or none: another one is the clearest alarm.

    Args:
        number: The value, where the column holds numbers.
    """

    kind: ClassVar[str] = "constant"
    number: float | None = None

    @property
    def description(self) -> str:
        return f"always {self.levels[0]}" if self.levels else "never a value"


_FEATURES: dict[str, type[Feature]] = {
    cls.kind: cls for cls in (NumericFeature, TimestampFeature, CategoricalFeature, ConstantFeature)
}


@dataclass(frozen=True)
class TableSchema:
    """The features of a table, in the order of their scores, and the columns that are only carried.

    Args:
        features: Numeric, then timestamp, then categorical ones with two or more classes, then those
            whose likelihood needs no network.
        passthrough: Column name to the reason why the model does not read it.
        arrow_schema: The training table's.
    """

    features: tuple[Feature, ...]
    passthrough: dict[str, str]
    arrow_schema: pa.Schema

    @cached_property
    def names(self) -> list[str]:
        """The features' names."""
        return [feature.name for feature in self.features]

    def _of(self, cls: type[Feature]) -> list[Any]:
        return [feature for feature in self.features if type(feature) is cls]

    @cached_property
    def numeric(self) -> list[NumericFeature]:
        return self._of(NumericFeature)

    @cached_property
    def timestamps(self) -> list[TimestampFeature]:
        return self._of(TimestampFeature)

    @cached_property
    def learned_categories(self) -> list[CategoricalFeature]:
        """Categorical features that the network reads and reconstructs."""
        return [f for f in self.features if isinstance(f, CategoricalFeature) and f.num_classes > 1]

    @cached_property
    def fixed_categories(self) -> list[CategoricalFeature]:
        """Constants and single-class columns, whose likelihood is the same in every row."""
        return [f for f in self.features if isinstance(f, CategoricalFeature) and f.num_classes <= 1]

    def arrow_type(self, name: str) -> pa.DataType:
        """A column's type in the training table."""
        return self.arrow_schema.field(name).type

    def refuse(self, other: pa.Schema) -> str | None:
        """What makes tables of another Arrow schema impossible to score, or None."""
        problems = []
        for feature in self.features:
            found = len(other.get_all_field_indices(feature.name))
            if found != 1:
                problems.append(f"{feature.name}: expected one such column, got {found or 'none'}")
                continue
            got, wanted = other.field(feature.name).type, self.arrow_type(feature.name)
            if not _readable(got, feature):
                problems.append(f"{feature.name}: expected {wanted}, got {got}")
        return "; ".join(problems) or None

    def to_json(self) -> dict[str, Any]:
        return {
            "features": [feature.to_json() for feature in self.features],
            "passthrough": self.passthrough,
            "arrow_schema": base64.b64encode(self.arrow_schema.serialize().to_pybytes()).decode(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TableSchema:
        features = []
        for item in values["features"]:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items() if k != "kind"}
            features.append(_FEATURES[item["kind"]](**fields))
        serialized = pa.py_buffer(base64.b64decode(values["arrow_schema"]))
        return cls(tuple(features), values["passthrough"], pa.ipc.read_schema(serialized))


def _readable(got: pa.DataType, feature: Feature) -> bool:
    if isinstance(got, pa.BaseExtensionType):
        got = got.storage_type
    if pa.types.is_dictionary(got):
        got = got.value_type
    if pa.types.is_null(got) or is_text(got):
        return True  # text is read cell by cell
    if isinstance(feature, NumericFeature):
        return column_kind(got) == "numeric" or pa.types.is_boolean(got)
    if isinstance(feature, TimestampFeature):
        return column_kind(got) == "timestamp" and knows_zone(got)
    return not pa.types.is_nested(got)


# ---- inference ---------------------------------------------------------------------------------


def column_kind(kind: pa.DataType) -> str | None:
    """One of "numeric", "categorical", "timestamp", or None for types that are only carried."""
    if pa.types.is_dictionary(kind):
        return column_kind(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numeric"
    if pa.types.is_duration(kind):
        return "numeric"
    if is_text(kind) or pa.types.is_boolean(kind):
        return "categorical"
    if pa.types.is_null(kind):
        return "categorical"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        return "timestamp"
    return None


def choose_kinds(
    arrow_schema: pa.Schema,
    *,
    numeric: Iterable[str] = (),
    categorical: Iterable[str] = (),
    timestamp: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> tuple[dict[str, str], dict[str, str]]:
    """The columns to take statistics of, and those carried only, with the reason.

    Raises:
        ValueError: An override names a column that the table lacks, or names one twice.
    """
    chosen: dict[str, str] = {}
    for kind, names in (
        ("numeric", numeric),
        ("categorical", categorical),
        ("timestamp", timestamp),
        ("excluded", exclude),
    ):
        for name in names:
            if name not in arrow_schema.names:
                have = ", ".join(arrow_schema.names[:20])
                raise ValueError(f"{name}: named as {kind}, but the table has no such column; it has {have}")
            if name in chosen:
                raise ValueError(f"{name}: named as {chosen[name]} and as {kind}")
            chosen[name] = kind
    kinds, passthrough = {}, {}
    for column in arrow_schema:
        reading = chosen.get(column.name, column_kind(column.type))
        if reading == "excluded":
            passthrough[column.name] = "excluded by the user"
        elif reading is None:
            passthrough[column.name] = f"{column.type} is not read"
        else:
            kinds[column.name] = reading
    return kinds, passthrough


def infer_schema(
    statistics: TableStatistics,
    arrow_schema: pa.Schema,
    passthrough: dict[str, str],
    forced: Sequence[str] = (),
) -> TableSchema:
    """Features from the statistics of training rows.

    Args:
        statistics: Of the columns that may be features.
        arrow_schema: The table's.
        passthrough: Columns already known to be carried only.
        forced: Columns that a user named as features: never demoted to passthrough.

    Raises:
        ValueError: No column is left to learn from.
    """
    features: list[Feature] = []
    carried = dict(passthrough)
    for name, column in statistics.columns.items():
        reason = None if name in forced else _reason_to_carry(column)
        feature = None if reason else _feature(name, column, arrow_schema.field(name).type)
        if feature is None:
            carried[name] = reason or "its times cover no whole day, week or year"
        else:
            features.append(feature)
    schema = TableSchema(tuple(features), carried, arrow_schema.remove_metadata())
    if not any(feature.nullable for feature in schema.fixed_categories) and schema.fixed_categories == features:
        raise nothing_to_learn(len(features), carried)
    ordered = [*schema.numeric, *schema.timestamps, *schema.learned_categories, *schema.fixed_categories]
    return TableSchema(tuple(ordered), carried, schema.arrow_schema)


def nothing_to_learn(num_features: int, carried: dict[str, str]) -> ValueError:
    """The error of a table in which nothing varies."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in carried.items())
    got = f"{num_features} constant or never repeated ones ({listed or 'none carried'})"
    return ValueError(f"expected a column that varies, got {got}")


def _reason_to_carry(column: ColumnStatistics) -> str | None:
    present = column.num_rows - column.num_missing
    if isinstance(column, NumericStatistics) and column.drifts:
        return "moves one way through the rows, like a counter or a year"
    if isinstance(column, CategoricalStatistics) and present >= 50:
        distinct, length = column.num_distinct, column.num_characters / present
        if distinct > 0.5 * present:
            return f"nearly every row has its own value (about {distinct:,.0f} in {present:,})"
        known = sum(count for _, count in column.most_frequent())
        if known < 0.5 * present:  # the sketch keeps the frequent ones only
            return (
                f"too many values to know by name (about {distinct:,.0f}, the frequent ones in {known / present:.0%})"
            )
        if length > 64 and distinct > 0.1 * present:
            return f"free text ({length:.0f} characters on average)"
    return None


def _feature(name: str, column: ColumnStatistics, kind: pa.DataType) -> Feature | None:
    base = {"name": name, "num_rows": column.num_rows, "num_missing": column.num_missing}
    if isinstance(column, NumericStatistics):
        present = column.num_rows - column.num_missing
        if present == 0:
            return ConstantFeature(**_vocabulary(base, []))
        if column.minimum == column.maximum:
            level = str(pa.scalar(column.minimum, pa.float64()).cast(pa.string()))
            return ConstantFeature(**_vocabulary(base, [(level, present)]), number=column.minimum)
        return _numeric(base, column, kind)
    if isinstance(column, CategoricalStatistics):
        ranked = column.most_frequent()
        return (CategoricalFeature if len(ranked) > 1 else ConstantFeature)(**_vocabulary(base, ranked))
    return _timestamp(base, column)


def _numeric(base: dict[str, Any], column: NumericStatistics, kind: pa.DataType) -> NumericFeature:
    points, weights = column.points()
    stddev = column.stddev
    total = weights.sum()
    scores = ndtri((np.cumsum(weights) - weights / 2) / total)  # normal score of the middle of each value's ranks
    mean = float(np.average(scores, weights=weights))
    spread = float(np.sqrt(np.average((scores - mean) ** 2, weights=weights)))
    edges = min(-_EDGE_SCORE, scores[0]), max(_EDGE_SCORE, scores[-1])
    if len(points) > _NUM_KNOTS:  # knots at even normal scores: dense in the tails
        wanted = np.linspace(scores[0], scores[-1], _NUM_KNOTS)
        chosen = np.unique(np.searchsorted(scores, wanted).clip(0, len(points) - 1))
    else:
        chosen = np.arange(len(points))
    knots, scores = points[chosen], (scores[chosen] - mean) / spread
    with np.errstate(over="ignore"):
        gap = np.median(np.diff(points)) / stddev
    centre = column.mean if np.isfinite(column.mean) else float(column.quantiles.quantile(0.5))
    z = np.clip(_z_scores(points, centre, stddev), -_LINEAR_STDDEVS, _LINEAR_STDDEVS)
    return NumericFeature(
        **base,
        mean=centre,
        stddev=stddev,
        minimum=column.minimum,
        maximum=column.maximum,
        resolution=float(min(gap, _LINEAR_STDDEVS)),
        knots=tuple(knots.tolist()),
        knot_scores=tuple(scores.tolist()),
        edge_scores=(float(edges[0] - mean) / spread, float(edges[1] - mean) / spread),
        quantile_resolution=float(np.median(np.diff(scores))),
        heavy_tailed=bool(np.average(z**4, weights=weights) > _GAUSSIAN_KURTOSIS),
        is_integer=pa.types.is_integer(kind),
    )


def _vocabulary(base: dict[str, Any], ranked: list[tuple[str, int]]) -> dict[str, Any]:
    levels, counts = [level for level, _ in ranked], [count for _, count in ranked]
    own = min(sum(count >= MIN_CLASS_ROWS for count in counts), MAX_CLASSES - 1)
    present = base["num_rows"] - base["num_missing"]
    once = sum(count == 1 for count in counts)
    least = 1 / (present + 2)
    beyond = present - sum(counts)  # rows of levels that the sketch no longer knows by name
    return {
        **base,
        "levels": tuple(levels),
        "counts": tuple(counts),
        "num_classes": len(levels) if len(levels) <= own + 1 else own + 1,
        "unseen": float(np.clip(max(once, beyond) / max(present, 1), least, 1 - least)) if levels else 1.0,
    }


def _timestamp(base: dict[str, Any], column: TimeStatistics) -> TimestampFeature | None:
    parts, resolutions = [], []
    if (column.hours > 0).sum() > 1:
        parts.append("hour")
        resolutions.append(2 * np.pi * column.resolution / _DAY)
    if (column.weekdays > 0).all():
        parts.append("weekday")
        resolutions.append(2 * np.pi / 7)
    if (column.months > 0).all():
        parts.append("month")
        resolutions.append(2 * np.pi / 12)
    return TimestampFeature(**base, parts=tuple(parts), resolutions=tuple(resolutions)) if parts else None
