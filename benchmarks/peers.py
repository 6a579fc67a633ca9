"""Detectors of PyOD and scikit-learn, each with its defaults, on tables made numeric as their users would.

Numbers, booleans and times (as microseconds) are columns of numbers: missing values take the training rows' median,
then each is standardised by the training rows' mean and standard deviation; for `knn_meansq_quantile` it is mapped to
normal scores by scikit-learn's QuantileTransformer fitted on them, for `knn_meansq_rank` by `MidRanks`. Other columns
are categories: one 0/1 column for each of the 50 most frequent levels among the training rows; rarer, unseen and
missing levels are 0 in all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import ndtri

MAX_LEVELS = 50
NUM_NEIGHBORS = 5
BEYOND = 5.0  # normal score of a value that is less or greater than all training values


@dataclass(frozen=True)
class Fitted:
    """A trained detector: scores `(n,)` of a table, higher is more anomalous, and which model or version it is."""

    score: Callable[[pa.Table], np.ndarray]
    version: str


class Preparation:
    """From tables to `(n, width)` float64 arrays without missing values, by what the training rows hold."""

    def __init__(self, train: pa.Table, scaler: Any) -> None:
        self._numeric = [field.name for field in train.schema if _is_number(field.type)]
        numbers = _numbers(train, self._numeric)
        self._medians = numbers.median().fillna(0)  # 0: a column that is all missing
        self._scaler = scaler.fit(numbers.fillna(self._medians).to_numpy()) if self._numeric else None
        self.levels = {
            field.name: list(_levels(train, field.name).value_counts().index[:MAX_LEVELS])
            for field in train.schema
            if not _is_number(field.type)
        }

    def __call__(self, table: pa.Table) -> np.ndarray:
        parts = []
        if self._scaler is not None:
            filled = _numbers(table, self._numeric).fillna(self._medians)
            parts.append(self._scaler.transform(filled.to_numpy()))
        for name, levels in self.levels.items():
            code = pd.Categorical(_levels(table, name), levels).codes
            parts.append((code[:, None] == np.arange(len(levels))).astype(np.float64))
        return np.concatenate(parts, axis=1)


def _is_number(kind: pa.DataType) -> bool:
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return is_number or pa.types.is_boolean(kind) or pa.types.is_temporal(kind)


def _numbers(table: pa.Table, names: list[str]) -> pd.DataFrame:
    columns = {}
    for name in names:
        column = table.column(name)
        if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        elif pa.types.is_time(column.type):
            column = column.cast(pa.time64("us"), safe=False).cast(pa.int64())
        elif pa.types.is_temporal(column.type):
            column = column.cast(pa.int64())
        elif pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        columns[name] = column.cast(pa.float64(), safe=False).to_numpy()
    return pd.DataFrame(columns, index=range(table.num_rows))


def _levels(table: pa.Table, name: str) -> pd.Series:
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string()).to_pandas()


def standard(seed: int, num_rows: int) -> Any:
    """Mean 0 and standard deviation 1; a constant stays at 0."""
    from sklearn.preprocessing import StandardScaler

    return StandardScaler()


def quantile(seed: int, num_rows: int) -> Any:
    """Normal scores."""
    from sklearn.preprocessing import QuantileTransformer

    return QuantileTransformer(n_quantiles=min(1000, num_rows), output_distribution="normal", random_state=seed)


def rank(seed: int, num_rows: int) -> Any:
    """Normal scores of middle ranks."""
    return MidRanks()


class MidRanks:
    """Each column's normal scores of the middle of a value's ranks among the training values; +-5 beyond them.

    QuantileTransformer sends a column's least and greatest value to +-5.2, however many training rows have them.
    """

    def fit(self, numbers: np.ndarray) -> MidRanks:
        self._columns = np.sort(numbers, axis=0).T
        return self

    def transform(self, numbers: np.ndarray) -> np.ndarray:
        """`(n, columns)` in, the same out."""
        columns = zip(self._columns, numbers.T, strict=True)
        ranks = [sum(np.searchsorted(known, values, side) for side in ("left", "right")) for known, values in columns]
        return np.clip(ndtri(np.stack(ranks, axis=1) / (2 * self._columns.shape[1])), -BEYOND, BEYOND)


@dataclass(frozen=True)
class Method:
    """How a detector is fitted, from a seed and a table, and the modules that it imports."""

    fit: Callable[[int, pa.Table], Fitted]
    modules: tuple[str, ...]

    @property
    def absent(self) -> list[str]:
        """Libraries that are not installed."""
        names = dict.fromkeys(module.partition(".")[0] for module in self.modules)
        return [name for name in names if importlib.util.find_spec(name) is None]

    def load(self) -> None:
        """Imports its modules, which is no part of a fit's time."""
        for module in self.modules:
            importlib.import_module(module)


def pyod(name: str, module: str, *others: str, **options: Any) -> Method:
    """A detector of PyOD on standardised inputs; "seed" among the options is replaced by the run's."""

    def fit(seed: int, train: pa.Table) -> Fitted:
        prepare = Preparation(train, standard(seed, train.num_rows))
        given = {key: seed if value == "seed" else value for key, value in options.items()}
        detector = getattr(importlib.import_module(module), name)(**given)
        detector.fit(prepare(train))
        return Fitted(lambda table: detector.decision_function(prepare(table)), f"pyod {version('pyod')}")

    return Method(fit, (module, *others))


def knn_meansq(scaler: Callable[[int, int], Any]) -> Method:
    """Mean of the squared distances to the 5 nearest training rows."""

    def fit(seed: int, train: pa.Table) -> Fitted:
        from sklearn.neighbors import NearestNeighbors

        prepare = Preparation(train, scaler(seed, train.num_rows))
        neighbors = NearestNeighbors(n_neighbors=NUM_NEIGHBORS).fit(prepare(train))

        def score(table: pa.Table) -> np.ndarray:
            distances, _ = neighbors.kneighbors(prepare(table))
            return (distances**2).mean(axis=1)

        return Fitted(score, f"scikit-learn {version('scikit-learn')}")

    return Method(fit, ("sklearn.neighbors", "sklearn.preprocessing"))


PEERS = {
    "IForest": pyod("IForest", "pyod.models.iforest", random_state="seed"),
    "ECOD": pyod("ECOD", "pyod.models.ecod"),
    "KNN": pyod("KNN", "pyod.models.knn", n_neighbors=NUM_NEIGHBORS, method="largest"),
    "LOF": pyod("LOF", "pyod.models.lof"),
    "PCA": pyod("PCA", "pyod.models.pca", random_state="seed"),
    "AutoEncoder": pyod("AutoEncoder", "pyod.models.auto_encoder", "torch", random_state="seed", verbose=0),
    "VAE": pyod("VAE", "pyod.models.vae", "torch", random_state="seed", verbose=0),
    "knn_meansq_standard": knn_meansq(standard),
    "knn_meansq_quantile": knn_meansq(quantile),
    "knn_meansq_rank": knn_meansq(rank),
}
