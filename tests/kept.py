"""Pipelines whose outputs stay in this process."""

import uuid
from collections import Counter
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream

from pipeline.letters import NAMESPACE

_KEPT: dict[str, list] = {}


class _Keep(beam.DoFn):
    def __init__(self, key):
        self._key = key

    def process(self, element, item=beam.DoFn.WindowedValueParam):
        _KEPT[self._key].append(item.with_value(element))
        return ()


class Outcome(NamedTuple):
    items: list[Any]  # with their timestamps and windows
    counters: Counter

    @property
    def values(self) -> list[Any]:
        return [item.value for item in self.items]


def run(source, *transforms) -> Outcome:
    """Runs elements (on FnApiRunner) or a TestStream (on BundleBasedDirectRunner) through labelled transforms."""
    streaming = isinstance(source, TestStream)
    runner = "BundleBasedDirectRunner" if streaming else "FnApiRunner"
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions([], streaming=streaming))
    output = pipeline | (source if streaming else beam.Create(source, reshuffle=False))
    for transform in transforms:
        output = output | transform
    key = uuid.uuid4().hex
    _KEPT[key] = []
    output | "Keep" >> beam.ParDo(_Keep(key))
    result = pipeline.run()
    result.wait_until_finish()
    counters: Counter = Counter()
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.namespace == NAMESPACE:
            counters[counter.key.metric.name] += counter.committed
    return Outcome(_KEPT.pop(key), counters)


def fits(value: dict, schema: dict) -> bool:
    """Whether a dict is a row of a BigQuery schema, as JSON."""
    kinds = {"STRING": str, "TIMESTAMP": str, "INTEGER": int, "FLOAT": float}
    if set(value) != {field["name"] for field in schema["fields"]}:
        return False
    for field in schema["fields"]:
        cell = value[field["name"]]
        if field["mode"] == "REPEATED":
            if not all(fits(item, field) for item in cell):
                return False
        elif cell is not None and type(cell) is not kinds[field["type"]]:
            return False
    return True
