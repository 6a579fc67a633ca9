"""What a job on Dataflow needs, asked for before anything is submitted, and the workers' settings that suit it."""

from __future__ import annotations

from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)

from pipeline.options import stream_place

# Four processes, each with TensorFlow and a model, in 16 GB; docs/dataflow.md has the reasons.
MACHINE_TYPE = "n2-standard-4"


def prepare(beam_options: PipelineOptions, options: Any) -> None:
    """Checks the flags of a Dataflow job, and sets what was left open.

    Args:
        beam_options: Changed in place.
        options: The job's own, with the attributes that `add_arguments` declares.

    Raises:
        ValueError: Naming the flag.
    """
    cloud, setup = beam_options.view_as(GoogleCloudOptions), beam_options.view_as(SetupOptions)
    worker, debug = beam_options.view_as(WorkerOptions), beam_options.view_as(DebugOptions)
    for flag in ("bundle", "input", "output", "dead_letters"):
        place = getattr(options, flag)
        if place and not stream_place(place) and ("://" not in place or place.startswith("file://")):
            raise ValueError(f"--{flag}: expected a URI that Dataflow's workers can read, got {place}")
    missing = [f"--{flag}" for flag in ("project", "region", "temp_location") if not getattr(cloud, flag)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: needed by a job on Dataflow")
    for flag in ("temp_location", "staging_location"):
        place = getattr(cloud, flag)
        if place and not place.startswith("gs://"):
            raise ValueError(f"--{flag}: expected gs://BUCKET/FOLDER, got {place}")
    if not (worker.sdk_container_image or setup.setup_file or setup.extra_packages):
        raise ValueError(
            "missing --sdk_container_image or --setup_file: Dataflow's workers have no beam-vae; see docs/dataflow.md"
        )

    if any(option.startswith("worker_accelerator") for option in cloud.dataflow_service_options or ()):
        # One process, and so one model, for a machine's GPU, which processes cannot share well.
        if not debug.lookup_experiment("use_multiple_sdk_containers"):
            debug.add_experiment("no_use_multiple_sdk_containers")
    elif not worker.machine_type:
        worker.machine_type = MACHINE_TYPE
