"""Runs a staged pipeline as a worker would, and reports its counters and where its modules came from."""

import json
import sys

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner


def main(pipeline, report):
    staged = beam_runner_api_pb2.Pipeline()
    with open(pipeline, "rb") as file:
        staged.ParseFromString(file.read())
    for environment in staged.components.environments.values():
        environment.urn = "beam:env:embedded_python:v1"
        environment.payload = b""
        del environment.dependencies[:]
    result = FnApiRunner().run_via_runner_api(staged, PipelineOptions(["--runner=FnApiRunner"]))
    result.wait_until_finish()
    counters = [
        (counter.key.metric.namespace, counter.key.metric.name, counter.result)
        for counter in result.metrics().query()["counters"]
    ]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "vae_model", "beam_vae")]
    with open(report, "w") as file:
        json.dump({"counters": counters, "modules": {name: sys.modules[name].__file__ for name in ours}}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
