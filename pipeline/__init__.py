"""The Beam plugin: scores tables and records with a `vae_model` bundle inside a pipeline.

Importing this package loads neither Beam nor TensorFlow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.alerts import AlertOnAnomalies, AlertOnDeadLetters, ControlFalseDiscoveries, SelectDiscoveries
    from pipeline.detector import VAEDetector
    from pipeline.drift import MeasureDrift
    from pipeline.handler import VAEModelHandler
    from pipeline.kafka import ReadKafka, WriteKafka
    from pipeline.replay import ReplayTable
    from pipeline.score_records import ScoreRecords
    from pipeline.sinks import WriteDeadLetters, WriteTables
    from pipeline.sources import ReadTables
    from pipeline.summaries import SummarizeScores
    from pipeline.transforms import ScoreTables, VAEScoreDoFn

_HOME = {
    "AlertOnAnomalies": "alerts",
    "AlertOnDeadLetters": "alerts",
    "ControlFalseDiscoveries": "alerts",
    "MeasureDrift": "drift",
    "ReadKafka": "kafka",
    "ReadTables": "sources",
    "ReplayTable": "replay",
    "ScoreRecords": "score_records",
    "ScoreTables": "transforms",
    "SelectDiscoveries": "alerts",
    "SummarizeScores": "summaries",
    "VAEDetector": "detector",
    "VAEModelHandler": "handler",
    "VAEScoreDoFn": "transforms",
    "WriteDeadLetters": "sinks",
    "WriteKafka": "kafka",
    "WriteTables": "sinks",
}

__all__ = [
    "AlertOnAnomalies",
    "AlertOnDeadLetters",
    "ControlFalseDiscoveries",
    "MeasureDrift",
    "ReadKafka",
    "ReadTables",
    "ReplayTable",
    "ScoreRecords",
    "ScoreTables",
    "SelectDiscoveries",
    "SummarizeScores",
    "VAEDetector",
    "VAEModelHandler",
    "VAEScoreDoFn",
    "WriteDeadLetters",
    "WriteKafka",
    "WriteTables",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
