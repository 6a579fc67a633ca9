"""Whether rows still come from where the training rows came: counts in fixed bins, compared column by column."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import chdtri

from vae_model.encoding import encode
from vae_model.schema import CategoricalFeature, Feature, NumericFeature, TableSchema
from vae_model.statistics import NumericStatistics, TableStatistics

MAX_LEVEL_BINS = 20  # levels of one column with a bin of their own; the others share one
_MIN_LEVEL_SHARE = 0.01  # of the training rows, that gives a level a bin of its own
_VIEWS = ("standard",)  # numbers are binned as z-scores: in the training table's unit, as float32


class ColumnDrift(NamedTuple):
    """How one column of some rows differs from the training rows.

    Args:
        column: Its name.
        kind: "numeric", "timestamp", "categorical" or "constant".
        psi: Population stability index, in nats; see `population_stability_index`. Of times, that of being there
            or missing alone.
        psi_expected: What sampling alone gives on average.
        psi_noise: What sampling alone exceeds in at most about the accepted share of cases.
        missing_rate: Share of rows without a value.
        training_missing_rate: The same in training.
        unseen_rate: Share of values that training never saw; None of columns of numbers or times.
        training_unseen_rate: What Good and Turing expect it to be.
        status: "drift", "stable", or "too few": not even a `psi` at the threshold would tell from noise.
    """

    column: str
    kind: str
    psi: float
    psi_expected: float
    psi_noise: float
    missing_rate: float
    training_missing_rate: float
    unseen_rate: float | None
    training_unseen_rate: float | None
    status: str


def population_stability_index(counts: np.ndarray, reference: np.ndarray) -> float:
    """Sum (a - b) log(a / b) over bins, for their shares a and b: the symmetrised Kullback-Leibler divergence.

    Siddiqi (Credit Risk Scorecards, 2006), who calls values from 0.1 on a small and from 0.25 on a large shift.
    Half a row is added to every bin, so that empty ones have a logarithm.

    Args:
        counts: `(bins,)` rows.
        reference: `(bins,)` rows.
    """
    a, b = counts + 0.5, reference + 0.5
    a, b = a / a.sum(), b / b.sum()
    return float(((a - b) * np.log(a / b)).sum())


def sampling_psi(num_bins: int, num_rows: float, num_reference: float, share: float) -> tuple[float, float]:
    """What two samples of one distribution give: the mean of their PSI, and what it exceeds with probability `share`.

    The PSI is then about (1 / n + 1 / m) times a chi-squared variable of `num_bins` - 1 degrees of freedom (Yurdakul
    and Naranjo, Journal of Risk Model Validation, 2020), for independent rows.
    """
    scale = 1 / max(num_rows, 1) + 1 / max(num_reference, 1)
    degrees = max(num_bins - 1, 1)
    return float(degrees * scale), float(chdtri(degrees, share) * scale)


class DriftReference:
    """The training rows in bins: what other rows are counted and compared with.

    The bins of numbers are training quantiles, and single values that are more than a quantile's share; those of
    levels are the frequent levels, all other known ones, and unseen ones. Missing is a bin in every column, and the
    only one beside "there" of times: the hours of a short window differ from a year's for no other reason.

    Counts are exact, and add up: those of two tables are the sum of both, however rows are split.

    Args:
        schema: Of the model.
        statistics: Of its training rows.
        num_bins: Quantile bins per column of numbers.
    """

    def __init__(self, schema: TableSchema, statistics: TableStatistics, num_bins: int = 10) -> None:
        if num_bins < 2:
            raise ValueError(f"num_bins: expected a number >= 2, got {num_bins}")
        self.schema = schema
        self._edges: dict[str, np.ndarray] = {}
        self._references: list[np.ndarray] = []
        for feature in schema.features:
            column = statistics.columns[feature.name]
            if isinstance(feature, NumericFeature) and isinstance(column, NumericStatistics):
                reference = self._numeric(feature, column, num_bins)
            elif isinstance(feature, CategoricalFeature):
                reference = _level_counts(feature)
            else:
                reference = np.array([feature.num_rows - feature.num_missing])
            self._references.append(np.concatenate([[feature.num_missing], reference]).astype(np.float64))
        # Rows, rows that cannot be scored, then each column's bins: missing first.
        self._starts = np.cumsum([2, *map(len, self._references)])

    def _numeric(self, feature: NumericFeature, column: NumericStatistics, num_bins: int) -> np.ndarray:
        points, weights = column.quantiles.points()
        ranks = np.arange(1, num_bins) / num_bins
        edges = feature.standard(column.quantiles.quantile(ranks)).astype(np.float32)
        edges, times = np.unique(edges, return_counts=True)
        atoms = edges[times > 1]
        self._edges[feature.name] = np.union1d(edges, np.nextafter(atoms, np.float32(-np.inf)))
        where = np.searchsorted(self._edges[feature.name], feature.standard(points).astype(np.float32))
        return np.bincount(where, weights, minlength=len(self._edges[feature.name]) + 1)

    @property
    def num_counts(self) -> int:
        """Length of the counts."""
        return int(self._starts[-1])

    def count(self, table: pa.Table) -> np.ndarray:
        """`(num_counts,)` int64: rows in each bin of each column; rows that cannot be scored are only counted."""
        encoded = encode(table, self.schema, _VIEWS)
        keep = encoded.rejects.keep
        counts = np.zeros(self.num_counts, np.int64)
        counts[:2] = keep.sum(), (~keep).sum()
        present = encoded.inputs["present"].astype(bool)
        numeric = {feature.name: j for j, feature in enumerate(self.schema.numeric)}
        for j, feature in enumerate(self.schema.features):
            start, stop = self._starts[j : j + 2]
            if feature.name in numeric:
                numbers = encoded.inputs["numbers"][:, numeric[feature.name]]
                bins = 1 + np.searchsorted(self._edges[feature.name], numbers)
            elif feature.name in encoded.codes:
                bins = 1 + np.minimum(encoded.codes[feature.name], stop - start - 2)
            else:
                bins = np.ones(len(keep), np.int64)
            bins = np.where(present[:, j], bins, 0)[keep]
            counts[start:stop] = np.bincount(bins, minlength=stop - start)
        return counts

    def count_unreadable(self, num_rows: int) -> np.ndarray:
        """The counts of rows that cannot be read as a table."""
        counts = np.zeros(self.num_counts, np.int64)
        counts[1] = num_rows
        return counts

    def measure(self, counts: np.ndarray, threshold: float = 0.2, false_alarm_rate: float = 0.01) -> list[ColumnDrift]:
        """Compares rows with the training rows.

        Args:
            counts: Of the rows, as `count` gives.
            threshold: Least PSI that is called drift.
            false_alarm_rate: Accepted share of sets of independent rows without drift in which noise makes any
                column's PSI exceed its `psi_noise`; split evenly over the columns.
        """
        share = false_alarm_rate / len(self._references)
        return [
            self._measure(feature, reference, counts[start : start + len(reference)], threshold, share)
            for feature, reference, start in zip(self.schema.features, self._references, self._starts[:-1], strict=True)
        ]

    def _measure(
        self, feature: Feature, reference: np.ndarray, counts: np.ndarray, threshold: float, share: float
    ) -> ColumnDrift:
        used = (counts > 0) | (reference > 0)
        psi = population_stability_index(counts[used], reference[used])
        n, m = counts.sum(), reference.sum()
        expected, noise = sampling_psi(int(used.sum()), n, m, share)
        has_levels = isinstance(feature, CategoricalFeature)
        undecided = "too few" if noise > threshold else "stable"
        status = "drift" if psi >= threshold and psi > noise else undecided
        return ColumnDrift(
            column=feature.name,
            kind=feature.kind,
            psi=psi,
            psi_expected=expected,
            psi_noise=noise,
            missing_rate=float(counts[0] / max(n, 1)),
            training_missing_rate=float(reference[0] / m),
            unseen_rate=float(counts[1] / max(n - counts[0], 1)) if has_levels else None,
            training_unseen_rate=feature.unseen if isinstance(feature, CategoricalFeature) else None,
            status=status,
        )


def _level_counts(feature: CategoricalFeature) -> np.ndarray:
    """Training rows: of unseen levels (what Good and Turing expect), of each frequent level, of the other ones."""
    present = feature.num_rows - feature.num_missing
    counts = np.array(feature.counts, np.float64)
    own = min(int((counts >= _MIN_LEVEL_SHARE * present).sum()), MAX_LEVEL_BINS)
    rest = [counts[own:].sum()] if own < len(counts) else []
    return np.concatenate([[feature.unseen * present], counts[:own], rest])
