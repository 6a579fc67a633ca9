"""Scoring in Beam YAML: `yaml_provider.yaml` names what is here."""

# Beam YAML takes the types of a config from the arguments' types, and so they may not be text, as
# `from __future__ import annotations` would have them; Beam 2.77 takes `str | None` for any Python value.
# ruff: noqa: UP045
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import pyarrow as pa
from apache_beam.typehints.row_type import RowTypeConstraint

import pipeline.detector  # noqa: F401  so that AnomalyDetection knows VAEDetector by its name
from pipeline.score_records import ScoreRecords
from vae_model.tables import RecordError

Text = Optional[str]


class DeadLetter(NamedTuple):
    """A row that could not be scored. The time is text in ISO 8601, for Beam's Parquet sink takes no time."""

    payload: Text
    payload_format: Text
    source: Text
    attributes: Optional[Mapping[str, str]]
    stage: Text
    column: Text
    error_type: Text
    error: Text
    model_version: Text
    event_time: Text
    num_records: Optional[int]


class ScoreAnomalies(beam.PTransform):
    """Scores rows: each comes out with its anomaly score in nats, higher = more anomalous, p-value and label.

    Building one reads the bundle (or the default model), and loads no TensorFlow.

    Args:
        bundle: Directory or URI that `fit` wrote, or a pointer that `beam-vae promote` wrote. Or else, `models_by_key`.
        reasons: Strangest columns to explain per row.
        threshold: Score, in nats, that replaces the bundle's.
        prefix: Of the score columns' names.
        columns: Input columns to keep; by default all.
        max_batch_size: Rows scored at once.
        max_batch_duration_secs: How long a row of a stream may wait for others; by default not at all.
        model_refresh_secs: How often a pointer is read again; by default every 60 seconds in streams, else never.
        models_by_key: The URI of each key's bundle or pointer, or one URI with `{key}` in it.
        default_model: Of keys that have none; without it, their rows cannot be scored.
        key: Column that holds the key.
        max_model_bytes: Of weights and calibrations by key to keep in memory per process.
        error_handling: `output` names the output of the rows that cannot be scored, as dead letters. Without it, the
            first of them fails the pipeline.

    Raises:
        BundleError: There is no such bundle.
        ValueError: An argument is not as above, or the rows do not fit the model.
    """

    def __init__(
        self,
        bundle: Optional[str] = None,
        *,
        reasons: int = 0,
        threshold: Optional[float] = None,
        prefix: str = "",
        columns: Optional[Sequence[str]] = None,
        max_batch_size: int = 4096,
        max_batch_duration_secs: Optional[float] = None,
        model_refresh_secs: Optional[float] = None,
        models_by_key: Any = None,
        default_model: Optional[str] = None,
        key: Optional[str] = None,
        max_model_bytes: int = 1 << 30,
        error_handling: Optional[Mapping[str, str]] = None,
    ) -> None:
        super().__init__()
        if isinstance(columns, str):
            raise ValueError(f"columns: expected a list of names, got {columns!r}")
        if models_by_key is not None and key is None:
            raise ValueError("key: expected with models_by_key the column that holds it, got none")
        if not isinstance(models_by_key, str | Mapping | None):
            raise ValueError(f"models_by_key: expected URIs by key, or one with {{key}} in it, got {models_by_key!r}")
        self._error_output = _error_output(error_handling)
        self._score = ScoreRecords(
            bundle,
            reasons=reasons,
            threshold=threshold,
            prefix=prefix,
            columns=columns,
            max_batch_size=max_batch_size,
            max_batch_duration_secs=max_batch_duration_secs,
            model_refresh_secs=model_refresh_secs,
            models_by_key=models_by_key,
            default_model=default_model,
            key=key,
            max_model_bytes=max_model_bytes,
        )
        if bundle or default_model:
            self._score.launched  # noqa: B018  one that is not there is refused where it stands

    def expand(self, rows: beam.PCollection[Any]) -> Any:
        scored, letters = rows | "Score" >> self._score
        if not isinstance(scored.element_type, RowTypeConstraint):
            raise ValueError(f"expected rows of known columns, got {rows.element_type}; map them to fields first")
        if self._error_output is None:
            _ = letters | "Fail" >> beam.Map(_fail)
            return scored
        row_type = RowTypeConstraint.from_user_type(DeadLetter)
        rejected = letters | "Letters" >> beam.FlatMap(_letter_rows).with_output_types(row_type)
        return {"good": scored, self._error_output: rejected}


def _error_output(error_handling: Mapping[str, str] | None) -> str | None:
    """The output's name in `error_handling`, as of Beam's own transforms."""
    if error_handling is None:
        return None
    if not isinstance(error_handling, Mapping) or set(error_handling) != {"output"}:
        raise ValueError(f"error_handling: expected {{output: NAME}}, got {error_handling!r}")
    name = error_handling["output"]
    if not isinstance(name, str) or name in ("", "good"):
        raise ValueError(f"error_handling: expected a name other than 'good', which is the scored rows', got {name!r}")
    return name


def _fail(letters: pa.Table) -> None:
    raise RecordError(
        f"a row cannot be scored: {letters['error'][0].as_py()} (error_handling: {{output: NAME}} sets such rows aside)"
    )


def _letter_rows(letters: pa.Table) -> Iterator[DeadLetter]:
    for letter in letters.to_pylist(maps_as_pydicts="strict"):
        time = letter["event_time"]
        yield DeadLetter(**{**letter, "event_time": time and time.isoformat()})
