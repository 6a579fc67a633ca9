"""Jobs submitted to Dataflow: checked as its own API reads them, and run from nothing but what was staged."""

import argparse
import base64
import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions
from dataflow_service import BUCKET, Refused, google_cloud_here, staged
from google.cloud import dataflow_v1beta3 as api
from pyarrow import fs

from pipeline import command, launcher
from pipeline.dataflow import MACHINE_TYPE, prepare
from pipeline.options import add_arguments
from pipeline.run import ScoringOptions, declared_flags
from pipeline.sinks import refuse_unwritable

ROOT = Path(__file__).parent.parent
TEMPLATES = {name: ROOT / f"pipeline/templates/metadata_{name}.json" for name in ("batch", "streaming")}
IMAGE = "us-docker.pkg.dev/my-project/images/beam-vae:0.1.0"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """`Dataflow`, and the flags that lead to it."""
    with google_cloud_here(tmp_path_factory.mktemp("cloud")) as found:
        yield found


@pytest.fixture(autouse=True)
def quiet():
    """The commands tell what Dataflow says; the tests after these need not hear it."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def store(cloud):
    """The storage, as Arrow sees it."""
    return fs.FileSystem.from_uri(f"gs://{BUCKET}")[0]


@pytest.fixture(scope="module")
def table(make_table):
    """What a stream and a table have to score: one row of the last 300 has no finite length."""
    table = make_table(300, 3).select(["length", "count", "color", "id"])
    length = table["length"].to_numpy().copy()
    length[7] = np.inf
    return table.set_column(0, "length", pa.array(length))


@pytest.fixture(scope="module")
def places(store, first, table):
    """Flags of a batch job."""
    first.save(f"gs://{BUCKET}/models/first")
    pq.write_table(table, f"{BUCKET}/in/a.parquet", filesystem=store)
    pq.write_table(table.drop_columns(["count"]), f"{BUCKET}/short/a.parquet", filesystem=store)
    store.copy_file(f"{BUCKET}/models/first/manifest.json", f"{BUCKET}/models/torn/manifest.json")
    return {"input": f"gs://{BUCKET}/in/*.parquet", "bundle": f"gs://{BUCKET}/models/first"}


def as_given(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def assert_scored_as_locally(scored, table, bundle):
    expected = bundle.score(table.filter(np.isfinite(table["length"].to_numpy()))).sort_by("id")
    scored = scored.sort_by("id")
    assert scored["id"].to_pylist() == expected["id"].to_pylist()
    np.testing.assert_allclose(scored["anomaly_score"], expected["anomaly_score"], rtol=1e-5, atol=1e-5)
    assert scored["model_version"].to_pylist() == expected["model_version"].to_pylist()
    assert scored["is_anomaly"].to_pylist() == expected["is_anomaly"].to_pylist()


def assert_only_what_was_staged_ran(dataflow, job):
    modules = dataflow.reports[job.id]["modules"]
    assert {"pipeline.transforms", "vae_model.bundle"} & set(modules)
    assert all(Path(file).is_relative_to(dataflow.folder / job.id / "packages") for file in modules.values())


def latest(dataflow):
    return list(dataflow.jobs.values())[-1]


# ---- accepted, and run as staged -------------------------------------------------------------------


def test_a_batch_job_is_accepted_and_its_workers_score_as_python_does(
    cloud, store, places, table, first, monkeypatch, capsys
):
    dataflow, flags = cloud
    monkeypatch.chdir(ROOT)
    given = as_given(places | {"output": f"gs://{BUCKET}/out", "setup_file": "./setup.py"})
    assert command.main([*given, "--runner=DataflowRunner", "--job_name=flights-2013", *flags]) == 0
    job = latest(dataflow)
    assert (job.name, job.type_) == ("flights-2013", api.JobType.JOB_TYPE_BATCH)
    assert [pool.machine_type for pool in job.environment.worker_pools] == [MACHINE_TYPE]
    assert_only_what_was_staged_ran(dataflow, job)
    assert_scored_as_locally(pq.read_table(f"{BUCKET}/out", filesystem=store), table, first)
    letters = pq.read_table(f"{BUCKET}/out/_dead_letters", filesystem=store)
    assert [(letter["column"], letter["error_type"]) for letter in letters.to_pylist()] == [("length", "not_finite")]
    printed = capsys.readouterr().out
    assert re.search(r"records in +300\b", printed)
    assert re.search(r"scored +299\b", printed)
    assert re.search(r"dead letters +1\b", printed)


def test_a_streaming_job_is_accepted_and_its_workers_score_as_python_does(
    cloud, store, places, table, first, monkeypatch, tmp_path
):
    dataflow, flags = cloud
    monkeypatch.chdir(ROOT)
    given = places | {"input": "pubsub:projects/my-project/subscriptions/flights", "setup_file": "./setup.py"}
    given = as_given(given | {"output": f"gs://{BUCKET}/stream", "columns": "id"})
    assert command.main([*given, "--streaming", "--runner=DataflowRunner", *flags]) == 0
    job = latest(dataflow)
    assert job.type_ == api.JobType.JOB_TYPE_STREAMING
    assert "enable_streaming_engine" in job.environment.experiments

    lines = [json.dumps(row) for row in table.to_pylist()] + ["no JSON"]
    messages = [PubsubMessage(line.encode(), {})._to_proto_str(for_publish=True) for line in lines]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([base64.b64encode(message).decode() for message in messages]))
    dataflow.work(job, path)
    assert_only_what_was_staged_ran(dataflow, job)
    assert_scored_as_locally(pq.read_table(f"{BUCKET}/stream", filesystem=store), table, first)
    letters = pq.read_table(f"{BUCKET}/stream/_dead_letters", filesystem=store)
    assert sorted(letters["error_type"].to_pylist()) == ["malformed_record", "not_finite"]


@pytest.mark.parametrize("kind", ["batch", "streaming"])
@pytest.mark.parametrize("submit", [launcher.main, command.main], ids=["flex", "classic"])
def test_a_template_is_written_and_not_started(cloud, places, submit, kind):
    dataflow, flags = cloud
    given = places | {"output": f"gs://{BUCKET}/{kind}", "sdk_container_image": IMAGE}
    name = f"templates/{submit.__module__}-{kind}.json"
    if kind == "streaming":
        given["input"] = "pubsub:projects/my-project/topics/flights"
    given = as_given(given | {"template_location": f"gs://{BUCKET}/{name}"})
    if submit is launcher.main:  # Dataflow gives the launcher what a user would not write
        given += ["--reasons=2", "--score_prefix=", "--enable_streaming_engine=true"]
        given += ["--overwrite=true"] if kind == "batch" else []
    elif kind == "streaming":
        given += ["--streaming", "--output=pubsub:projects/my-project/topics/scored"]  # its files are refused
        given.append("--dead_letters=pubsub:projects/my-project/topics/dead")
    before = len(dataflow.jobs)
    assert submit([*given, "--runner=DataflowRunner", *flags]) == 0
    assert len(dataflow.jobs) == before
    written = dataflow.files.bucket(BUCKET).blob(name).download_as_text()
    job = api.Job.from_json(written, ignore_unknown_fields=False)
    assert (job.type_ == api.JobType.JOB_TYPE_STREAMING) == (kind == "streaming")
    (pool,) = job.environment.worker_pools
    assert [image.container_image for image in pool.sdk_harness_container_images] == [IMAGE]
    assert all(dataflow.is_there(place) for place in staged(job))
    options = job.environment.sdk_pipeline_options["options"]
    assert options["reasons"] == (2 if submit is launcher.main else 0)


def test_the_launcher_submits_and_does_not_wait(cloud, places, monkeypatch):
    dataflow, flags = cloud
    monkeypatch.setattr(dataflow, "work", lambda job: None)  # this job runs on
    given = as_given(places | {"output": f"gs://{BUCKET}/later", "sdk_container_image": IMAGE})
    before = len(dataflow.jobs)
    assert launcher.main([*given, "--runner=DataflowRunner", *flags]) == 0
    assert len(dataflow.jobs) == before + 1


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("pubsub:projects/my-project/topics/flights", "pubsub:projects/my-project/topics/scored"),
        ("pubsub:projects/my-project/subscriptions/flights", "bigquery:my-project.flights.scored"),
        ("kafka:broker:9092/flights", "kafka:broker:9092/scored"),
    ],
)
def test_streams_to_and_from_services_are_accepted(cloud, places, source, output):
    dataflow, flags = cloud
    given = {"input": source, "output": output, "dead_letters": f"gs://{BUCKET}/dead", "sdk_container_image": IMAGE}
    assert launcher.main([*as_given(places | given), "--runner=DataflowRunner", *flags]) == 0
    job = latest(dataflow)
    assert (job.type_, job.current_state) == (api.JobType.JOB_TYPE_STREAMING, api.JobState.JOB_STATE_RUNNING)


def test_a_gpu_has_one_process_and_a_machine_of_the_users_choice(places):
    given = as_given(places | {"output": f"gs://{BUCKET}/out", "sdk_container_image": IMAGE})
    needed = ["--project=my-project", "--region=us-central1", f"--temp_location=gs://{BUCKET}/tmp"]
    gpu = "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
    options = PipelineOptions([*given, *needed, gpu, "--machine_type=g2-standard-4"])
    prepare(options, options.view_as(ScoringOptions))
    found = options.get_all_options()
    assert (found["machine_type"], found["experiments"]) == ("g2-standard-4", ["no_use_multiple_sdk_containers"])


def test_the_endpoint_refuses_what_dataflow_would(cloud):
    dataflow, _ = cloud
    job = {"name": "flights", "type": "JOB_TYPE_BATCH"}
    with pytest.raises(Refused, match="invalid job name"):
        dataflow.create("my-project", "us-central1", json.dumps(job | {"name": "Bad_Name"}))
    with pytest.raises(Refused, match="no such project"):
        dataflow.create("other", "us-central1", json.dumps(job))
    with pytest.raises(Exception, match='no field named "nonsense"'):
        dataflow.create("my-project", "us-central1", json.dumps(job | {"nonsense": 1}))


@pytest.mark.parametrize("kind", ["batch", "streaming"])
def test_what_dataflow_refuses_is_told_in_one_line(cloud, places, capsys, kind):
    _, flags = cloud
    given = places | {"output": f"gs://{BUCKET}/refused-{kind}", "region": "elsewhere", "sdk_container_image": IMAGE}
    if kind == "streaming":
        given["input"] = "pubsub:projects/my-project/subscriptions/flights"
        given |= {flag: f"pubsub:projects/my-project/topics/{flag}" for flag in ("output", "dead_letters")}
    flags = [flag for flag in flags if not flag.startswith("--region")]
    mode = ["--streaming"] if kind == "streaming" else []
    assert command.main([*as_given(given), *mode, "--runner=DataflowRunner", *flags]) == 1
    assert "no such project and region: my-project, elsewhere" in capsys.readouterr().err.strip().splitlines()[-1]


# ---- refused before anything is submitted ----------------------------------------------------------

REFUSED = {
    "a bundle on this disk": ({"bundle": "bundle/"}, "--bundle: expected a URI that Dataflow's workers can read"),
    "an input on this disk": ({"input": "in.parquet"}, "--input: expected a URI that Dataflow's workers can read"),
    "an output on this disk": ({"output": "out"}, "--output: expected a URI that Dataflow's workers can read"),
    "dead letters on this disk": ({"dead_letters": "file:///d"}, "--dead_letters: expected a URI that Dataflow's"),
    "no project": ({"project": None}, "missing --project: needed by a job on Dataflow"),
    "no region, no place": ({"region": None, "temp_location": None}, "missing --region, --temp_location: needed by"),
    "a place on this disk": ({"temp_location": "/tmp"}, "--temp_location: expected gs://BUCKET/FOLDER, got /tmp"),
    "no bucket for files meanwhile": (
        {"temp_location": "gs://no-such-bucket/tmp"},
        "--temp_location: cannot write to gs://no-such-bucket/tmp",
    ),
    "no code for workers": ({"sdk_container_image": None}, "missing --sdk_container_image or --setup_file"),
    "no bundle there": ({"bundle": f"gs://{BUCKET}/models/none"}, f"gs://{BUCKET}/models/none"),
    "half a bundle": ({"bundle": f"gs://{BUCKET}/models/torn"}, "schema.json is missing"),
    "another table": ({"input": f"gs://{BUCKET}/short/*.parquet"}, "count: expected one such column"),
    "no input": ({"input": f"gs://{BUCKET}/none/*.parquet"}, "none/*.parquet"),
    "no bucket for output": (
        {"output": "gs://no-such-bucket/out"},
        "--output: cannot look into gs://no-such-bucket/out: 404",
    ),
    "no bucket for letters": (
        {"dead_letters": "gs://no-such-bucket/out"},
        "--dead_letters: cannot look into gs://no-such-bucket/out: 404",
    ),
    "a misspelt flag": (
        {"bundel": "gs://x/y"},
        "--bundel: neither beam-vae run nor Beam knows this flag; did you mean",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("submit", [launcher.main, command.main], ids=["flex", "command"])
def test_what_cannot_work_is_refused_before_it_is_submitted(cloud, places, submit, change, message, capsys):
    dataflow, flags = cloud
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    given |= places | {"output": f"gs://{BUCKET}/refused", "sdk_container_image": IMAGE} | change
    before = len(dataflow.jobs), names_in(dataflow)
    # Beam takes a runner's name in any case, and without its end.
    runner = "dataflow" if submit is command.main else "DataflowRunner"
    assert submit([*as_given({k: v for k, v in given.items() if v}), f"--runner={runner}"]) == 1
    assert message in capsys.readouterr().err
    assert (len(dataflow.jobs), names_in(dataflow)) == before


def names_in(dataflow):
    return {blob.name for blob in dataflow.files.list_blobs(BUCKET)}


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--output: cannot write to {tmp_path}/file"):
        refuse_unwritable("output", str(tmp_path / "file/below/out.csv"))
    refuse_unwritable("output", str(tmp_path / "new/folder"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- parameters of templates -----------------------------------------------------------------------


def own_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def parameters(kind):
    return api.TemplateMetadata.from_json(TEMPLATES[kind].read_text(), ignore_unknown_fields=False).parameters


def both():
    return [pytest.param(item, id=f"{kind}-{item.name}") for kind in TEMPLATES for item in parameters(kind)]


def test_every_option_is_a_parameter_where_it_makes_sense():
    from pipeline.options import _BATCH_ONLY, _STREAMING_ONLY

    own = set(own_options())
    batch, streaming = ({item.name for item in parameters(kind)} for kind in ("batch", "streaming"))
    assert batch == own - set(_STREAMING_ONLY) - {"model_refresh_secs"} | {"sdk_container_image"}
    assert streaming == own - set(_BATCH_ONLY) | {"sdk_container_image"}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_metadata_says_what_the_template_is(kind):
    template = api.TemplateMetadata.from_json(TEMPLATES[kind].read_text(), ignore_unknown_fields=False)
    assert template.streaming == (kind == "streaming")
    required = {item.name for item in template.parameters if not item.is_optional}
    assert required == {"input", "output", "bundle", "sdk_container_image"}
    names = [item.name for item in template.parameters]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("item", both())
def test_every_parameter_is_an_option_that_takes_what_its_help_shows(item):
    action = declared_flags()[f"--{item.name}"]
    shown = item.help_text.partition("For example, ")[2]
    values = [shown] if shown else [option.value for option in item.enum_options]
    if item.param_type == api.ParameterType.BOOLEAN:
        values = ["true", "false"]
        assert action.nargs == 0
    assert values
    assert bool(item.regexes) == bool(shown)
    for value in [*values, *([item.default_value] if item.default_value else [])]:
        assert all(re.fullmatch(regex, value) for regex in item.regexes)
        flags = launcher.as_flags([f"--{item.name}={value}"], {f"--{item.name}"} if action.nargs == 0 else ())
        parsed = PipelineOptions(flags).get_all_options().get(item.name)
        if item.name in own_options() and value != "false":
            assert parsed is not None
            assert parsed is not False
    if item.enum_options:
        assert [option.value for option in item.enum_options] == list(action.choices)


@pytest.mark.parametrize("item", both())
def test_a_parameter_refuses_what_is_none(item):
    for regex in item.regexes:
        assert not re.fullmatch(regex, "")
        assert not re.fullmatch(regex, "a\nb")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_defaults_of_a_template_are_those_of_the_options(kind):
    for item in parameters(kind):
        default = own_options()[item.name].default if item.name in own_options() else None
        if default not in (None, "", False):
            assert item.default_value == f"{default:g}" or float(item.default_value) == default


def test_a_launchers_parameters_become_flags():
    given = [
        "--input=kafka:broker/topic",
        "--overwrite=true",
        "--update=false",
        "--columns=",
        "--runner=DataflowRunner",
    ]
    found = launcher.as_flags(given, {"--overwrite", "--update"})
    assert found == ["--input=kafka:broker/topic", "--streaming", "--overwrite", "--runner=DataflowRunner"]
    with pytest.raises(ValueError, match="--update: expected true or false, got yes"):
        launcher.as_flags(["--update=yes"], {"--update"})


def test_flags_that_only_dataflow_knows_pass_the_launcher(cloud, places, capsys):
    _, flags = cloud
    given = as_given(places | {"output": f"gs://{BUCKET}/unknown", "sdk_container_image": IMAGE})
    template = f"--template_location=gs://{BUCKET}/templates/unknown.json"
    assert launcher.main([*given, template, "--runner=DataflowRunner", "--worker_utilization_xyz=1", *flags]) == 0
