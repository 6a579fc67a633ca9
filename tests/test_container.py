"""The Dockerfile: what it pins, and, by `make test-container`, an image that is built and scores."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from waiting import until

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE, re.MULTILINE))


def test_the_linter_finds_nothing():
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_beam_is_that_of_this_environment_and_python_one_that_the_package_takes():
    assert ARGUMENTS["BEAM_VERSION"] == version("apache-beam")
    setup = (ROOT / "setup.py").read_text()
    (least, below) = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', setup).groups()
    assert int(least) <= int(ARGUMENTS["PYTHON_VERSION"].removeprefix("3.")) < int(below)
    (wanted,) = re.findall(r'"apache-beam>=([\d.]+),<3"', setup)
    assert ARGUMENTS["BEAM_VERSION"].startswith(wanted)


def test_every_tool_of_the_image_is_pinned():
    for name in ("BASE", "BEAM_SDK", "LAUNCHER"):
        image, _, tag = ARGUMENTS[name].rpartition(":")
        assert image, name
        assert tag not in ("", "latest"), name
    assert f"/python{ARGUMENTS['PYTHON_VERSION'].replace('.', '')}-" in ARGUMENTS["LAUNCHER"]


def test_its_extras_are_those_of_the_package():
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    built = {extra for given in re.findall(r"EXTRAS=(\S+)", DOCKERFILE) for extra in given.split(",")}
    assert built == {"gcp", "gpu", "kafka"}
    assert built <= known


def test_what_is_sent_to_the_build_is_what_is_installed():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pipeline", "vae_model", "beam_vae.py", "setup.py", "pyproject.toml"} <= sent
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    }
    assert copied - {"."} <= sent
    assert all((ROOT / name).exists() for name in sent)


# ---- the image, built and run ----------------------------------------------------------------------

container = pytest.mark.skipif("CONTAINER_TEST" not in os.environ, reason="slow; make test-container runs it")


@pytest.fixture
def buildah(tmp_path):
    """`buildah(*arguments)` runs it on a store of its own, without a daemon; returns what it prints."""
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'}: apt-get install buildah debootstrap")
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    base = ["buildah", "--root", tmp_path / "images", "--runroot", tmp_path / "run", "--storage-driver", "vfs"]

    def call(command, *arguments, wait=True):
        if command in ("from", "commit", "bud"):
            arguments = ("--signature-policy", policy, *arguments)
        line = list(map(str, [*base, command, *arguments]))
        if not wait:
            return subprocess.Popen(line)
        return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return call


def import_folder(buildah, folder, name):
    """Makes an image of a folder's files."""
    made = buildah("from", "scratch")
    buildah("copy", "--quiet", made, folder, "/")
    buildah("commit", "--quiet", "--rm", made, name)


def debian_with_python(folder):
    """A root folder as `python:3.11-slim-bookworm` has it: pip may install, and Python is `python` too."""
    packages = "--include=python3,python3-pip,python-is-python3,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", folder],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for marker in (folder / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    shutil.rmtree(folder / "var/cache/apt/archives")


def stand_ins(folder):
    """Beam's boot and Dataflow's launcher, which cannot be had without their registries, and are not run here."""
    for name in ("apache/beam/boot", "google/dataflow/python_template_launcher"):
        program = folder / "opt" / name
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)


@container
def test_an_image_is_built_and_its_python_scores(buildah, first, first_uri, make_table, tmp_path):
    debian_with_python(tmp_path / "debian")
    import_folder(buildah, tmp_path / "debian", "localhost/debian:1")
    shutil.rmtree(tmp_path / "debian")
    stand_ins(tmp_path / "tools")
    import_folder(buildah, tmp_path / "tools", "localhost/tools:1")
    arguments = ["BASE=localhost/debian:1", "BEAM_SDK=localhost/tools:1", "LAUNCHER=localhost/tools:1", "RUN_AS=beam"]
    start = time.perf_counter()
    buildah(
        "bud",
        *("--pull-never", "--isolation=chroot", "--network=host", "--volume=/etc/ssl/certs:/etc/ssl/certs:ro"),
        *(f"--build-arg={argument}" for argument in arguments),
        *("--tag=localhost/beam-vae:1", ROOT),
    )
    seconds = time.perf_counter() - start

    table = make_table(500, 3).select(["length", "count", "color", "id"])
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    pq.write_table(table, shared / "in.parquet")
    shutil.copytree(first_uri, shared / "bundle")
    worker = buildah("from", "localhost/beam-vae:1")
    size = buildah(
        "run", "--isolation=chroot", worker, "--", "du", "--summarize", "--one-file-system", "--bytes", "/usr", "/opt"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pool = buildah(
        "run",
        *("--isolation=chroot", "--network=host", f"--volume={shared}:{shared}", worker, "--"),
        *("python3", "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"),
        wait=False,
    )
    try:
        until(lambda: answers(port), seconds=120)
        start = time.perf_counter()
        places = [f"--input={shared}/in.parquet", f"--output={shared}/out", f"--bundle={shared}/bundle"]
        portable = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=EXTERNAL"]
        job = [sys.executable, "-m", "pipeline", *places, *portable, f"--environment_config=localhost:{port}"]
        subprocess.run(job, check=True, cwd=ROOT, timeout=300)
        ran = time.perf_counter() - start
    finally:
        pool.terminate()
        pool.wait(30)
    scored = pq.read_table(shared / "out")
    assert all(path.stat().st_uid for path in (shared / "out").iterdir())  # not root's
    expected = first.score(table)
    assert scored.sort_by("id")["id"].equals(expected.sort_by("id")["id"])
    np.testing.assert_allclose(
        scored.sort_by("id")["anomaly_score"], expected.sort_by("id")["anomaly_score"], rtol=1e-4, atol=1e-3
    )
    gigabytes = sum(int(line.split()[0]) for line in size.splitlines()) / 1e9
    print(f"\nbuilt in {seconds:.0f} s: {gigabytes:.2f} GB; {len(scored)} rows scored by its Python in {ran:.1f} s")


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0
