"""What the scores of a window look like: wiring around the statistics of `vae_model`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.compute as pc
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.utils.windowed_value import PaneInfoTiming

from pipeline.scored import Batch, Fold, FoldPerWindow, ScoreReader, bounds, table_schema
from vae_model.statistics import NumericStatistics, QuantileSketch

SUMMARY_SCHEMA = table_schema(
    window_start="TIMESTAMP",
    window_end="TIMESTAMP",
    pane="STRING",
    key="STRING",
    num_records="INTEGER",
    num_anomalies="INTEGER",
    anomaly_rate="FLOAT",
    mean_score="FLOAT",
    min_score="FLOAT",
    max_score="FLOAT",
    quantiles={"rank": "FLOAT", "score": "FLOAT"},
    models={"model_version": "STRING", "num_records": "INTEGER"},
)


@dataclass
class SummarizeScores(beam.PTransform):
    """One dict of `SUMMARY_SCHEMA` per window, key and pane, from scored tables or records.

    Windows, triggers and lateness are those of the input. Where a trigger counts elements, it counts parts of
    summaries, one per Beam bundle, window and key.

    Args:
        key: Column to summarise by, as text; without it, the key of keyed elements `(key, record)`, or none.
        quantiles: Ranks in [0, 1]; a score's rank is off by at most (1 + log2(B)) / 4096 after B parts, and exact
            while a window has at most 2,048 different scores.
        prefix: Of the score columns' names.
    """

    key: str | None = None
    quantiles: Sequence[float] = (0.5, 0.9, 0.99)
    prefix: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        for rank in self.quantiles:
            if not 0 <= rank <= 1:
                raise ValueError(f"quantiles: expected ranks in [0, 1], got {rank}")

    def expand(self, scored: beam.PCollection[Any]) -> beam.PCollection[dict[str, Any]]:
        return (
            scored
            | "Fold" >> FoldPerWindow(_SummaryFold(ScoreReader(_COLUMNS, self.prefix, self.key)))
            | "Describe" >> beam.ParDo(_Describe(tuple(self.quantiles))).with_output_types(dict[str, Any])
        )


_COLUMNS = ("anomaly_score", "is_anomaly", "model_version")


class ScoreSummary:
    """Of any number of scores; summaries merge."""

    def __init__(self) -> None:
        self.scores = NumericStatistics(runs=None)  # of no use in a stream, and they would grow
        self.num_anomalies = 0
        self.models: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Adds rows."""
        self.scores.update("anomaly_score", batch.columns.column("anomaly_score"), 0)
        self.num_anomalies += pc.sum(batch.columns.column("is_anomaly")).as_py()
        for item in batch.columns.column("model_version").value_counts().to_pylist():
            self.models[item["values"]] += item["counts"]

    def merge(self, other: ScoreSummary) -> None:
        """Adds the rows of another one."""
        self.scores.merge(other.scores)
        self.num_anomalies += other.num_anomalies
        self.models.update(other.models)

    def state(self) -> tuple[Any, ...]:
        """Numbers, text and bytes that hold all of it; scores are float32."""
        scores = self.scores
        sketch = [
            (level, np.array(points, "<f4").tobytes(), np.array(weights, "<f8").tobytes())
            for level, points, weights in scores.quantiles.to_json()
        ]
        moments = scores.num_rows, scores.mean, scores.m2, scores.minimum, scores.maximum
        return moments, sketch, self.num_anomalies, sorted(self.models.items())

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> ScoreSummary:
        summary = cls()
        moments, sketch, summary.num_anomalies, models = state
        summary.models = Counter(dict(models))
        scores = summary.scores
        scores.num_rows, scores.mean, scores.m2, scores.minimum, scores.maximum = moments
        scores.quantiles = QuantileSketch(
            {
                level: (np.frombuffer(points, "<f4").astype(np.float64), np.frombuffer(weights, "<f8"))
                for level, points, weights in sketch
            }
        )
        return summary


class _SummaryCoder(beam.coders.Coder):
    def encode(self, summary: ScoreSummary) -> bytes:
        return FastPrimitivesCoder().encode(summary.state())

    def decode(self, encoded: bytes) -> ScoreSummary:
        return ScoreSummary.from_state(FastPrimitivesCoder().decode(encoded))

    def is_deterministic(self) -> bool:
        return False  # the same scores may be in other parts

    def to_type_hint(self) -> type:
        return ScoreSummary


beam.coders.registry.register_coder(ScoreSummary, _SummaryCoder)


class _SummaryFold(Fold):
    type = ScoreSummary

    def create(self) -> ScoreSummary:
        return ScoreSummary()

    def add(self, accumulator: ScoreSummary, batch: Batch) -> ScoreSummary:
        accumulator.add(batch)
        return accumulator

    def merge(self, accumulator: ScoreSummary, other: ScoreSummary) -> ScoreSummary:
        accumulator.merge(other)
        return accumulator


class _Describe(beam.DoFn):
    def __init__(self, ranks: tuple[float, ...]) -> None:
        self._ranks = ranks

    def process(
        self,
        element: tuple[str, ScoreSummary],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[dict[str, Any]]:
        key, summary = element
        scores = summary.scores
        if not scores.num_rows:  # a pane without anything new
            return
        quantiles = scores.quantiles.quantile(np.array(self._ranks)).tolist()
        yield {
            **bounds(window),
            "pane": PaneInfoTiming.to_string(pane.timing),
            "key": json.loads(key),
            "num_records": scores.num_rows,
            "num_anomalies": summary.num_anomalies,
            "anomaly_rate": summary.num_anomalies / scores.num_rows,
            "mean_score": scores.mean,
            "min_score": scores.minimum,
            "max_score": scores.maximum,
            "quantiles": [{"rank": rank, "score": score} for rank, score in zip(self._ranks, quantiles, strict=True)],
            "models": [
                {"model_version": version, "num_records": count} for version, count in sorted(summary.models.items())
            ],
        }
