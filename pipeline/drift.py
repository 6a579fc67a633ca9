"""Drift of a stream against the rows that its model was trained on: wiring around `vae_model.drift`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipeline.models import launch
from pipeline.rows import form_of, read_elements, readings
from pipeline.scored import Fold, FoldPerWindow, bounds, is_keyed, table_schema
from vae_model.bundle import Bundle, BundleError, load_bundle
from vae_model.drift import DriftReference

DRIFT_SCHEMA = table_schema(
    window_start="TIMESTAMP",
    window_end="TIMESTAMP",
    model_version="STRING",
    num_rows="INTEGER",
    num_rejected="INTEGER",
    column="STRING",
    kind="STRING",
    psi="FLOAT",
    psi_expected="FLOAT",
    psi_noise="FLOAT",
    missing_rate="FLOAT",
    training_missing_rate="FLOAT",
    unseen_rate="FLOAT",
    training_unseen_rate="FLOAT",
    status="STRING",
)


@dataclass
class MeasureDrift(beam.PTransform):
    """One dict of `DRIFT_SCHEMA` per window and column of the model, from tables or records, scored or not.

    What `status` means is said by `vae_model.drift.ColumnDrift`. Rows that could not be scored are `num_rejected` and
    count nowhere else. In records, an absent key is a missing value: measure those that still have the columns that the
    model reads. Windows, triggers and lateness are those of the input.

    Args:
        bundle: Directory, URI or pointer; rows are compared with the training rows of the version that it names
            when the pipeline is built.
        threshold: Least population stability index that is called drift.
        false_alarm_rate: Accepted share of windows without drift that noise alone would call so.
        num_bins: Quantile bins per column of numbers.
    """

    bundle: str
    threshold: float = 0.2
    false_alarm_rate: float = 0.01
    num_bins: int = 10

    def __post_init__(self) -> None:
        super().__init__()
        if not self.threshold > 0:
            raise ValueError(f"threshold: expected a number > 0, got {self.threshold!r}")
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate: expected a number in (0, 1), got {self.false_alarm_rate!r}")
        if self.num_bins < 2:
            raise ValueError(f"num_bins: expected a number >= 2, got {self.num_bins}")

    def expand(self, rows: beam.PCollection[Any]) -> beam.PCollection[dict[str, Any]]:
        launched = launch(self.bundle)
        source = _Source(launched.uri, launched.bundle.model_version, self.num_bins)
        measure = _Measure(source, self.threshold, self.false_alarm_rate)
        return (
            rows
            | "Fold" >> FoldPerWindow(_DriftFold(source))
            | "Measure" >> beam.ParDo(measure).with_output_types(dict[str, Any])
        )


@dataclass(frozen=True)
class _Source:
    """Names a reference that workers load once per process: its levels would swell the pipeline's description."""

    uri: str
    model_version: str
    num_bins: int

    def load(self) -> tuple[DriftReference, Bundle]:
        return _load(self)

    def read(self, elements: Sequence[Any], event_times: Sequence[int]) -> Iterator[tuple[None, np.ndarray]]:
        reference, bundle = self.load()
        kinds: dict[type, list[Any]] = {}
        for element in elements:
            value = element[1] if is_keyed(element) else element
            kinds.setdefault(type(value), []).append(value)
        for kind, values in kinds.items():
            if kind is pa.Table:
                for table in values:
                    yield None, reference.count(table)
            elif (form := form_of(kind)) is None:
                yield None, reference.count_unreadable(len(values))
            else:
                wanted = readings(bundle.schema)
                columns = read_elements(form, values, wanted)
                rows = np.delete(np.arange(len(values)), list(columns.faults))
                table = pa.Table.from_arrays(columns.arrays, [reading.name for reading in wanted])
                yield None, reference.count(table.take(rows)) + reference.count_unreadable(len(columns.faults))


@functools.lru_cache(maxsize=16)
def _load(source: _Source) -> tuple[DriftReference, Bundle]:
    bundle = load_bundle(source.uri)
    if bundle.model_version != source.model_version:
        raise BundleError(
            f"{source.uri}: expected version {source.model_version}, as at launch, got {bundle.model_version}"
        )
    return DriftReference(bundle.schema, bundle.statistics, source.num_bins), bundle


class _DriftFold(Fold):
    def __init__(self, source: _Source) -> None:
        super().__init__(source)
        self._source = source

    def create(self) -> np.ndarray:
        return np.zeros(self._source.load()[0].num_counts, np.int64)

    def add(self, accumulator: np.ndarray, batch: np.ndarray) -> np.ndarray:
        return accumulator + batch


class _Measure(beam.DoFn):
    def __init__(self, source: _Source, threshold: float, false_alarm_rate: float) -> None:
        self._source, self._options = source, (threshold, false_alarm_rate)

    def process(self, element: tuple[str, np.ndarray], window: Any = beam.DoFn.WindowParam) -> Iterator[dict[str, Any]]:
        _, counts = element
        for drift in self._source.load()[0].measure(counts, *self._options):
            yield {
                **bounds(window),
                "model_version": self._source.model_version,
                "num_rows": int(counts[0]),
                "num_rejected": int(counts[1]),
                **drift._asdict(),
            }
