"""The batch job on Beam's other ways to run it: a job server with workers in two ways, and two worker processes."""

import os
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from waiting import until

from pipeline.run import run
from pipeline.statistics_job import run as take_statistics
from vae_model import TrainingConfig
from vae_model.scan import columns_and_roles, read_scan, scan_table
from vae_model.tables import ParquetTables


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def job_server(tmp_path_factory):
    """The endpoint of a job server that runs jobs on this machine."""
    place = tmp_path_factory.mktemp("server") / "port"
    module = "apache_beam.runners.portability.local_job_service_main"
    command = [sys.executable, "-m", module, "--port_file", str(place), "--staging_dir", str(place.parent)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(lambda: place.exists() and place.read_text())
        yield f"127.0.0.1:{place.read_text().strip()}"
        process.terminate()


@pytest.fixture(scope="module")
def worker_pool():
    """The address of a service that starts workers, each a process of its own, when a job asks for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    # It starts workers as `python`.
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        until(lambda: is_open(port))
        yield f"127.0.0.1:{port}"
        process.terminate()


def engine(request, name: str) -> list[str]:
    if name == "two processes":
        return ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    flags = ["--runner=PortableRunner", f"--job_endpoint={request.getfixturevalue('job_server')}"]
    if name == "loopback":
        return [*flags, "--environment_type=LOOPBACK"]
    pool = request.getfixturevalue("worker_pool")
    return [*flags, "--environment_type=EXTERNAL", f"--environment_config={pool}"]


@pytest.fixture(scope="module")
def folder(make_table, tmp_path_factory):
    """Rows that can be scored in two files, and rows that cannot in a third."""
    folder = tmp_path_factory.mktemp("tables")
    table = make_table(900, 7).select(["id", "length", "count", "color"])
    pq.write_table(table.slice(0, 500), folder / "a.parquet", row_group_size=120)
    pq.write_table(table.slice(500, 360), folder / "b.parquet")
    pq.write_table(table.slice(860, 40).drop_columns(["count"]), folder / "c.parquet")
    return folder


@pytest.mark.parametrize("name", ["loopback", "worker pool", "two processes"])
def test_an_engine_gives_the_scores_and_the_account_of_python(request, name, folder, first, first_uri, tmp_path):
    flags = [f"--input={folder}/*.parquet", f"--output={tmp_path}/out", f"--bundle={first_uri}"]
    summary = run([*flags, *engine(request, name)])
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (900, 860, 40)
    assert summary.num_unaccounted == 0
    scored = pq.read_table(tmp_path / "out").sort_by("id")
    table = pq.read_table([folder / "a.parquet", folder / "b.parquet"]).sort_by("id")
    assert scored["id"].equals(table["id"])
    alone = first.score(table)
    np.testing.assert_allclose(scored["anomaly_score"], alone["anomaly_score"], rtol=1e-4, atol=1e-3)
    assert summary.num_anomalies == sum(scored["is_anomaly"].to_pylist())
    assert scored["model_version"].unique().to_pylist() == [first.model_version]
    assert pq.read_table(tmp_path / "out/_dead_letters").num_rows == 40


def test_two_processes_take_the_statistics_of_one_pass(request, folder, tmp_path):
    data, path = [f"{folder}/a.parquet", f"{folder}/b.parquet"], str(tmp_path / "s.json")
    take_statistics(data, path, TrainingConfig(), engine(request, "two processes"))
    tables = ParquetTables(data)
    kinds, _, shares = columns_and_roles(tables, TrainingConfig())
    found, split = read_scan(path, tables, kinds, shares)
    local = scan_table(tables, kinds, split, lambda *_: None)
    assert found.num_rows.tolist() == local.num_rows.tolist()
    for name, column in found.statistics.columns.items():
        other = local.statistics.columns[name]
        if column.kind == "numeric":  # fewer than 2,048 values: the sketches are exact, in whatever order
            for mine, theirs in zip(column.points(), other.points(), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        else:
            assert column.most_frequent() == other.most_frequent()
