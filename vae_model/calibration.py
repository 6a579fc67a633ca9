"""What a score means: p-values, thresholds and per-column baselines from held-out normal rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Threshold:
    """Scores at or above `value` are labelled anomalies.

    Args:
        value: A float32, in nats.
        rule: "false_positive_rate", "contamination" or "fixed".
        target: The rate that the rule aims at; None for a fixed threshold.
        extrapolated: Whether the rate lies below 1 / (n + 1), so that the tail's estimate set it.
    """

    value: float
    rule: str
    target: float | None = None
    extrapolated: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Scores of n rows that were used for nothing else.

    Args:
        scores: `(n,)` float32, ascending, in nats.
        tail_shape: xi >= 0 of the generalized Pareto distribution of excesses over `tail_start`.
        tail_scale: Its scale, in nats.
        tail_start: The score where the tail begins, in nats.
        column_medians: `(features,)` float32, each column's typical NLL: the baseline of reasons.
        column_ranks: `(r,)` int64, ascending from 1 to n.
        column_nll: `(r, features)` float32, each column's `column_ranks`-th largest NLL.
        method: "split" (held-out rows) or "cross-conformal" (out-of-fold scores, an approximation).
    """

    scores: np.ndarray
    tail_shape: float
    tail_scale: float
    tail_start: float
    column_medians: np.ndarray
    column_ranks: np.ndarray
    column_nll: np.ndarray
    method: str = "split"

    @property
    def num_rows(self) -> int:
        """Calibration rows n."""
        return len(self.scores)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Share of normal rows at least this strange, `(m,)` float32 in (0, 1].

        (1 + #{calibration >= score}) / (n + 1) (Vovk, Gammerman and Shafer, 2005): under
        exchangeability P(p <= a) <= a. Scores beyond all of calibration go on from 1 / (n + 1)
        down the fitted tail; such values below 1 / (n + 1) are estimates. Rounded down to float32, so
        that comparing one with a rate has the same outcome in float32 and in float64.
        """
        scores = np.asarray(scores, np.float32).astype(np.float64)
        at_least = self.num_rows - np.searchsorted(self.scores, scores, side="left")
        p = (1 + at_least) / (self.num_rows + 1)
        beyond = at_least == 0
        if beyond.any():
            last = self._log_survival(self.scores[-1:].astype(np.float64))
            p[beyond] *= np.exp(self._log_survival(scores[beyond]) - last)
        p = np.maximum(p, _TINY)
        rounded = p.astype(np.float32)
        return np.where(rounded > p, np.nextafter(rounded, np.float32(0)), rounded)

    def _log_survival(self, scores: np.ndarray) -> np.ndarray:
        excess = np.maximum(scores - self.tail_start, 0) / self.tail_scale
        return -np.log1p(self.tail_shape * excess) / self.tail_shape if self.tail_shape > 0 else -excess

    def threshold(self, rate: float, rule: str = "false_positive_rate") -> Threshold:
        """The smallest float32 score whose p-value is at most `rate`."""
        # Bisection over float32 in their order: p_values only falls as the score grows.
        low, high = _to_ordinal(np.float32(-np.inf)), _to_ordinal(np.float32(np.finfo(np.float32).max))
        while high - low > 1:
            middle = (low + high) // 2
            if float(self.p_values(np.array([_from_ordinal(middle)]))[0]) <= rate:
                high = middle
            else:
                low = middle
        return Threshold(float(_from_ordinal(high)), rule, rate, rate < 1 / (self.num_rows + 1))

    def column_p_values(self, feature: np.ndarray, nll: np.ndarray) -> np.ndarray:
        """Share of calibration rows whose NLL of that feature is at least this, for `(m,)` cells; never too small.

        Args:
            feature: Position of each cell's feature.
            nll: Each cell's NLL, in nats.
        """
        p = np.empty(len(nll))
        shares = np.append(self.column_ranks, self.num_rows + 1) / (self.num_rows + 1)
        by_feature = np.argsort(feature, kind="stable")
        starts = np.searchsorted(feature[by_feature], np.arange(self.column_nll.shape[1] + 1))
        for j in np.flatnonzero(np.diff(starts)):
            cells = by_feature[starts[j] : starts[j + 1]]
            cells = cells[np.argsort(-nll[cells])]  # searched in order, each lies next to the one before
            # First stored rank whose NLL is below the cell's: fewer than that many rows reach it.
            p[cells] = shares[np.searchsorted(-self.column_nll[:, j], -nll[cells], side="right")]
        return p

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}


def calibrate(scores: np.ndarray, column_nll: np.ndarray, method: str = "split") -> Calibration:
    """Calibrates on the scores `(n,)` and NLLs `(n, features)` of normal rows.

    Raises:
        ValueError: There are no rows, or a score is not finite.
    """
    if not len(scores):
        raise ValueError("expected calibration rows, got none")
    if not np.isfinite(scores).all():
        raise ValueError(f"expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not")
    scores = np.sort(np.asarray(scores, np.float32))
    n = len(scores)
    num_tail = min(max(20, n // 20), 1000, n - 1)
    start = float(scores[n - 1 - num_tail]) if num_tail > 0 else float(scores[0])
    shape, scale = fit_tail(scores[n - num_tail :].astype(np.float64) - start)
    ranks = np.unique(np.geomspace(1, n, min(n, 200)).round().astype(np.int64))
    ordered = -np.sort(-column_nll, axis=0)
    return Calibration(scores, shape, scale, start, np.median(column_nll, axis=0), ranks, ordered[ranks - 1], method)


def fit_tail(excesses: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalized Pareto distribution, by probability-weighted moments.

    Hosking and Wallis (1987). The shape is kept in [0, 0.9]: a bounded tail would give p = 0 to
    what lies beyond it. Where all excesses are 0, a nat more is e times rarer, as in the model itself.

    Args:
        excesses: `(k,)` amounts over the tail's start, >= 0.
    """
    y = np.sort(excesses)
    k = len(y)
    mean = float(y.mean()) if k else 0.0
    if not mean > 0:
        return 0.0, 1.0
    weights = 1 - (np.arange(1, k + 1) - 0.35) / k
    weighted = float((weights * y).mean())
    shape = 2 - mean / (mean - 2 * weighted) if mean > 2 * weighted else 0.0
    shape = float(np.clip(shape, 0, 0.9))
    return shape, mean * (1 - shape)


def _to_ordinal(value: np.float32) -> int:
    bits = int(np.float32(value).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _from_ordinal(ordinal: int) -> np.float32:
    magnitude = np.int32(abs(ordinal)).view(np.float32)
    return magnitude if ordinal >= 0 else np.float32(-magnitude)
