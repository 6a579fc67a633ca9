"""The Beam plugin: scores tables and records with a `vae_model` bundle inside a pipeline.

Importing this package loads neither Beam nor TensorFlow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.detector import VAEDetector
    from pipeline.handler import VAEModelHandler
    from pipeline.kafka import ReadKafka, WriteKafka
    from pipeline.replay import ReplayTable
    from pipeline.score_records import ScoreRecords
    from pipeline.sinks import WriteDeadLetters, WriteTables
    from pipeline.sources import ReadTables
    from pipeline.transforms import ScoreTables, VAEScoreDoFn

_HOME = {
    "ReadKafka": "kafka",
    "ReadTables": "sources",
    "ReplayTable": "replay",
    "ScoreRecords": "score_records",
    "ScoreTables": "transforms",
    "VAEDetector": "detector",
    "VAEModelHandler": "handler",
    "VAEScoreDoFn": "transforms",
    "WriteDeadLetters": "sinks",
    "WriteKafka": "kafka",
    "WriteTables": "sinks",
}

__all__ = [
    "ReadKafka",
    "ReadTables",
    "ReplayTable",
    "ScoreRecords",
    "ScoreTables",
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
