"""Many tests at once: which small p-values to call discoveries, so that few of them are false.

The false discovery rate (FDR) is the expected share of false ones among the discoveries, 0 where there are none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from scipy.special import zeta

# ---- a whole set ---------------------------------------------------------------------------------


def adjusted_p_values(p_values: np.ndarray, num_tests: int | None = None) -> np.ndarray:
    """The smallest FDR at which each of `(m,)` tests is a discovery of Benjamini and Hochberg (JRSS B, 1995).

    Args:
        p_values: `(m,)` in [0, 1].
        num_tests: Number of tests where `p_values` holds only the smallest of them. Adjusted values below all
            p-values left out are then the same as with them.

    Raises:
        ValueError: A p-value lies outside [0, 1], or there are more of them than tests.
    """
    p = _checked(p_values)
    m = len(p) if num_tests is None else num_tests
    if len(p) > m:
        raise ValueError(f"num_tests: expected at least the {len(p):,} p-values given, got {m:,}")
    order = np.argsort(p, kind="stable")
    steps = p[order] * m / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1)
    return adjusted


def benjamini_hochberg(p_values: np.ndarray, q: float, num_tests: int | None = None) -> np.ndarray:
    """`(m,)` true for discoveries: the k smallest p-values, for the largest k with p_(k) <= q k / m.

    The FDR is at most q for independent p-values, and for p-values that are positively dependent in the sense of
    Benjamini and Yekutieli (Annals of Statistics, 2001), as conformal ones of one calibration set are (Bates,
    Candès, Lei, Romano and Sesia, Annals of Statistics, 2023).

    Args:
        p_values: `(m,)` in [0, 1].
        q: The FDR aimed at, in (0, 1).
        num_tests: As in `adjusted_p_values`, where all p-values up to q are given.

    Raises:
        ValueError: See `adjusted_p_values`, or q lies outside (0, 1).
    """
    return adjusted_p_values(p_values, num_tests) <= require_share("q", q)


def require_share(name: str, value: float) -> float:
    """The value, where it lies in (0, 1).

    Raises:
        ValueError: It does not.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number in (0, 1), got {value!r}")
    return float(value)


def _checked(p_values: np.ndarray) -> np.ndarray:
    p = np.asarray(p_values, np.float64)
    bad = ~((p >= 0) & (p <= 1))  # NaN too
    if bad.any():
        raise ValueError(f"p_values: expected numbers in [0, 1], got {p[bad][0]}")
    return p


# ---- one after another ---------------------------------------------------------------------------


class OnlineProcedure(ABC):
    """Tests p-values in their order, for ever: each is decided before the next one is known.

    A level is `scale * sum_j w_j gamma(clock - mark_j + 1)`, at most `cap`, with a non-increasing gamma that sums
    to at most 1. The initial wealth has mark 0; each discovery adds a mark at the clock's time, with weight
    alpha - wealth for the first one and alpha for the others. LORD++ and SAFFRON differ in what moves the clock.

    Only marks are kept, so that memory does not grow with the tests. Beyond `max_marks` the oldest are forgotten:
    levels are then lower than the paper's, which keeps its bound on the FDR.

    Args:
        alpha: The FDR aimed at, in (0, 1), at any time, for independent p-values.
        wealth: Initial wealth W_0 in (0, alpha]; by default the share of alpha that `default_wealth` says.
        max_marks: Marks that are kept; at most one per discovery.
    """

    default_wealth: ClassVar[float]
    scale: float = 1.0
    cap: float

    def __init__(self, alpha: float, *, wealth: float | None = None, max_marks: int = 10_000) -> None:
        self.alpha = require_share("alpha", alpha)
        self.wealth = self.default_wealth * alpha if wealth is None else wealth
        if not 0 < self.wealth <= alpha:
            raise ValueError(f"wealth: expected a number in (0, alpha = {alpha}], got {wealth!r}")
        if max_marks < 1:
            raise ValueError(f"max_marks: expected a number >= 1, got {max_marks}")
        self.max_marks = max_marks
        self.num_tests = self.num_discoveries = 0
        self._clock = 0
        self._marks = np.zeros(0, np.int64)
        self._weights = np.zeros(0)

    @staticmethod
    @abstractmethod
    def gamma(index: np.ndarray) -> np.ndarray:
        """How wealth is spread over the clock's ticks 1, 2, ..."""

    @abstractmethod
    def _moves_clock(self, p: np.ndarray) -> np.ndarray:
        """1 for the p-values that move the clock, else 0."""

    @property
    def level(self) -> float:
        """The largest p-value that would be a discovery now."""
        return self._level(self._clock)

    def _level(self, clock: int) -> float:
        first = self.wealth * float(self.gamma(np.array(clock + 1.0)))
        later = float(self._weights @ self.gamma(clock + 1.0 - self._marks))
        return min(self.cap, self.scale * (first + later))

    def test(self, p_values: np.ndarray | float) -> np.ndarray:
        """`(n,)` true for the discoveries among the next n p-values, in their order.

        Raises:
            ValueError: A p-value lies outside [0, 1].
        """
        p = _checked(np.atleast_1d(p_values))
        moves = self._moves_clock(p)
        clocks = self._clock + np.cumsum(moves) - moves  # as each test begins
        found = np.zeros(len(p), bool)
        bound = np.inf  # levels only fall until the next discovery
        for i in np.flatnonzero(p <= self.cap):
            if p[i] > bound:
                continue
            bound = self._level(int(clocks[i]))
            if p[i] <= bound:
                found[i] = True
                self._discover(int(clocks[i] + moves[i]))
                bound = np.inf
        self.num_tests += len(p)
        self._clock += int(moves.sum())
        return found

    def _discover(self, mark: int) -> None:
        weight = self.alpha if self.num_discoveries else self.alpha - self.wealth
        self.num_discoveries += 1
        if len(self._marks) and self._marks[-1] == mark:
            self._weights[-1] += weight
            return
        self._marks = np.append(self._marks, mark)[-self.max_marks :]
        self._weights = np.append(self._weights, weight)[-self.max_marks :]

    def state(self) -> tuple[Any, ...]:
        """What must be kept between calls: whole numbers and bytes."""
        marks, weights = self._marks.astype("<i8").tobytes(), self._weights.astype("<f8").tobytes()
        return self.num_tests, self.num_discoveries, self._clock, marks, weights

    def restore(self, state: tuple[Any, ...]) -> None:
        """Goes on from a `state` of the same procedure."""
        self.num_tests, self.num_discoveries, self._clock, marks, weights = state
        self._marks = np.frombuffer(marks, "<i8").astype(np.int64)
        self._weights = np.frombuffer(weights, "<f8").astype(np.float64)


class Lord(OnlineProcedure):
    """LORD++ of Ramdas, Yang, Wainwright and Jordan (NeurIPS 2017), with Javanmard and Montanari's gamma (2018).

    Every test moves the clock: without discoveries, levels fall about as 1 / (number of tests).
    """

    default_wealth = 0.1

    def __init__(self, alpha: float, *, wealth: float | None = None, max_marks: int = 10_000) -> None:
        super().__init__(alpha, wealth=wealth, max_marks=max_marks)
        self.cap = alpha  # never reached: the gammas summed are all different

    @staticmethod
    def gamma(index: np.ndarray) -> np.ndarray:
        return 0.07720838 * np.log(np.maximum(index, 2)) / (index * np.exp(np.sqrt(np.log(index))))

    def _moves_clock(self, p: np.ndarray) -> np.ndarray:
        return np.ones(len(p), np.int64)


class Saffron(OnlineProcedure):
    """SAFFRON of Ramdas, Zrnic, Wainwright and Jordan (ICML 2018), with a constant lambda.

    Only p-values above lambda move the clock, so that wealth is spent on what looks normal: it finds more than
    LORD++ where many p-values are small.

    Args:
        alpha: See `OnlineProcedure`, as the others.
        candidate: lambda, in (0, 1).
        wealth: See there.
        max_marks: See there.
    """

    default_wealth = 0.5

    def __init__(
        self, alpha: float, *, candidate: float = 0.5, wealth: float | None = None, max_marks: int = 10_000
    ) -> None:
        super().__init__(alpha, wealth=wealth, max_marks=max_marks)
        self.cap = require_share("candidate", candidate)
        self.scale = 1 - candidate

    @staticmethod
    def gamma(index: np.ndarray) -> np.ndarray:
        return index**-1.6 / zeta(1.6)

    def _moves_clock(self, p: np.ndarray) -> np.ndarray:
        return (p > self.cap).astype(np.int64)


PROCEDURES: dict[str, type[OnlineProcedure]] = {"lord": Lord, "saffron": Saffron}
