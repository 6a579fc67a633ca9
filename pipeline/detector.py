"""The model behind Beam's AnomalyDetection."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from apache_beam.ml.anomaly.base import AnomalyPrediction, ThresholdFn
from apache_beam.ml.anomaly.detectors.offline import OfflineDetector
from apache_beam.ml.anomaly.specifiable import specifiable
from apache_beam.ml.inference.base import KeyedModelHandler

from pipeline.handler import Scored, VAEModelHandler
from pipeline.rows import Fault


@specifiable(on_demand_init=False, just_in_time_init=False)  # a wrong argument is refused where it stands
class VAEDetector(OfflineDetector):
    """A detector for `AnomalyDetection`, alone or in an ensemble, in Python or by its spec, as in Beam YAML.

    Predictions have the score in nats, higher = more anomalous; by default the threshold of the bundle that scored,
    and label 1 where `bundle.score` says `is_anomaly`, else 0; and the reasons as JSON in `info`. A row that cannot be
    scored has neither score nor label (None, as in Beam), and says why in `info`.

    Building one reads the bundle, unless `model_version` is given, and loads no TensorFlow.

    Args:
        bundle: Directory or URI that `fit` wrote, or a pointer, which is read once.
        reasons: Strangest columns to explain per row.
        threshold: Score, in nats, that replaces the bundle's.
        threshold_criterion: Beam's own, such as `QuantileThreshold`, instead of either.
        features: Columns that the model may read; it reads those that it was trained on, so these must be among them.
            By default they are not looked at.
        target: See Beam's `AnomalyDetector`; nothing reads it.
        model_id: Of the predictions; by default the version at launch, so that two bundles are told apart.
        model_version: Of the bundle, which is not read then until a worker loads it.
        run_inference_args: Of Beam's `RunInference`.
        handler_arguments: Of `VAEModelHandler`, such as `max_batch_size`.

    Raises:
        BundleError: There is no such bundle.
        ValueError: An argument is not as above.
    """

    def __init__(
        self,
        bundle: str,
        *,
        reasons: int = 0,
        threshold: float | None = None,
        threshold_criterion: ThresholdFn | None = None,
        features: Iterable[str] | None = None,
        target: str | None = None,
        model_id: str | None = None,
        model_version: str | None = None,
        run_inference_args: dict[str, Any] | None = None,
        **handler_arguments: Any,
    ) -> None:
        if threshold is not None and threshold_criterion is not None:
            raise ValueError("threshold: expected without a threshold_criterion, which replaces it")
        handler = _Predictions(
            bundle, reasons=reasons, threshold=threshold, model_version=model_version, **handler_arguments
        )
        if features is not None:
            handler.limit_columns(features)
        super().__init__(
            _Keyed(handler),
            run_inference_args=dict(run_inference_args or {}),  # Beam adds to it
            model_id=model_id or handler.model_version,
            target=target,
            threshold_criterion=threshold_criterion,
        )


class _Keyed(KeyedModelHandler):
    """For keys that hold the whole row, as AnomalyDetection's do: Beam would pickle them to know their size."""

    def get_num_bytes(self, batch: Sequence[tuple[Any, Any]]) -> int:
        return int(self._unkeyed.get_num_bytes([row for _, row in batch]))


class _Predictions(VAEModelHandler):
    """Returns `AnomalyPrediction`s."""

    def limit_columns(self, names: Iterable[str]) -> None:
        """Raises `ValueError` where the model reads others. Those of a bundle that was not read are not known."""
        known = set(names)
        for column, _ in self._columns:
            if column not in known:
                raise ValueError(f"features: expected all columns that the model reads, got none named {column}")

    def _result(self, element: Any, outcome: Any, scored: Scored) -> AnomalyPrediction:
        if type(outcome) is Fault:
            return AnomalyPrediction(threshold=scored.threshold, info=json.dumps(outcome._asdict()))
        reasons = outcome.get("anomaly_reasons")
        return AnomalyPrediction(
            score=outcome["anomaly_score"],
            label=int(outcome["is_anomaly"]),
            threshold=scored.threshold,
            info=json.dumps(reasons) if reasons else "",
        )
