"""Runs a staged pipeline as a worker would, and reports its counters and where its modules came from."""

import base64
import json
import sys

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner


def main(pipeline, report, messages=None):
    staged = beam_runner_api_pb2.Pipeline()
    with open(pipeline, "rb") as file:
        staged.ParseFromString(file.read())
    for environment in staged.components.environments.values():
        environment.urn = "beam:env:embedded_python:v1"
        environment.payload = b""
        del environment.dependencies[:]
    if messages:
        with open(messages) as file:
            serve(staged, [base64.b64decode(text) for text in json.load(file)])
    result = FnApiRunner().run_via_runner_api(staged, PipelineOptions(["--runner=FnApiRunner"]))
    result.wait_until_finish()
    counters = [
        (counter.key.metric.namespace, counter.key.metric.name, counter.result)
        for counter in result.metrics().query()["counters"]
    ]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "vae_model", "beam_vae")]
    with open(report, "w") as file:
        json.dump({"counters": counters, "modules": {name: sys.modules[name].__file__ for name in ours}}, file)


def serve(staged, messages):
    """Does what Dataflow does for Pub/Sub, which it reads itself: gives the pipeline messages, each as serialized."""
    published = [beam.window.TimestampedValue(message, 1_767_225_600) for message in messages]  # 2026
    donor = beam.Pipeline()
    _ = donor | "Impulse" >> beam.Impulse() | "Serve" >> beam.FlatMap(lambda _: published)
    donated = donor.to_runner_api().components.transforms.values()
    (spec,) = (item.spec for item in donated if item.spec.urn == "beam:transform:pardo:v1")
    parts = staged.components
    (name,) = (name for name, item in parts.transforms.items() if item.spec.urn == "beam:transform:pubsub_read:v1")
    read = parts.transforms[name]
    (output,) = read.outputs.values()
    parts.coders["bytes"].spec.urn = "beam:coder:bytes:v1"
    parts.pcollections["impulse"].CopyFrom(parts.pcollections[output])
    parts.pcollections["impulse"].unique_name = "impulse"
    parts.pcollections["impulse"].coder_id = parts.pcollections[output].coder_id = "bytes"
    impulse = parts.transforms["impulse"]
    impulse.unique_name, impulse.spec.urn, impulse.outputs["None"] = "impulse", "beam:transform:impulse:v1", "impulse"
    read.spec.CopyFrom(spec)
    read.inputs["None"] = "impulse"
    read.environment_id = next(iter(parts.environments))
    staged.root_transform_ids.insert(0, "impulse")


if __name__ == "__main__":
    main(*sys.argv[1:])
