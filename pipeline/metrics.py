"""What scoring steps count."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics

from pipeline.letters import NAMESPACE
from pipeline.models import model_bytes
from vae_model.bundle import Bundle


class ScoringMetrics:
    """Of one step, under RunInference's names, so that dashboards made for it work, and a few of ours."""

    def __init__(self) -> None:
        self._num_inferences = Metrics.counter(NAMESPACE, "num_inferences")
        self._batch_size = Metrics.distribution(NAMESPACE, "inference_request_batch_size")
        self._batch_bytes = Metrics.distribution(NAMESPACE, "inference_request_batch_byte_size")
        self._batch_latency = Metrics.distribution(NAMESPACE, "inference_batch_latency_micro_secs")
        self._load_latency = Metrics.distribution(NAMESPACE, "load_model_latency_milli_secs")
        self._model_bytes = Metrics.distribution(NAMESPACE, "model_byte_size")
        self._num_anomalies = Metrics.counter(NAMESPACE, "num_anomalies")
        self._mean_score = Metrics.distribution(NAMESPACE, "batch_mean_score_milli_nats")
        self._max_score = Metrics.distribution(NAMESPACE, "batch_max_score_milli_nats")

    def loaded(self, bundle: Bundle, seconds: float) -> None:
        """A model was loaded."""
        self._load_latency.update(int(1e3 * seconds))
        self._model_bytes.update(model_bytes(bundle))

    def batch(self, table: pa.Table, scored: pa.Table, prefix: str, seconds: float) -> None:
        """A table went in and its scored rows came out."""
        self._batch_latency.update(int(1e6 * seconds))
        self._batch_size.update(table.num_rows)
        self._batch_bytes.update(table.nbytes)
        if not scored.num_rows:
            return
        self._num_inferences.inc(scored.num_rows)
        self._num_anomalies.inc(pc.sum(scored.column(f"{prefix}is_anomaly")).as_py())
        score = scored.column(f"{prefix}anomaly_score")
        self._mean_score.update(round(1e3 * pc.mean(score).as_py()))
        self._max_score.update(round(1e3 * pc.max(score).as_py()))
