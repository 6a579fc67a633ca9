"""Dataflow, Cloud Storage and Google's sign-in, on this machine: a submitted job is checked and run as staged."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from apache_beam.internal.gcp import auth
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud import dataflow_v1beta3 as api
from google.cloud import storage
from waiting import until

PROJECT, REGION, BUCKET = "my-project", "us-central1", "my-bucket"
WORKER = Path(__file__).with_name("dataflow_worker.py")


class Refused(Exception):
    """Dataflow answers 400, with these words."""


class Dataflow:
    """Jobs by id. A batch job runs at once, so that its launcher has nothing to wait for.

    Args:
        folder: For what the workers install and print.
        files: A client of the storage.
    """

    def __init__(self, folder, files):
        self.folder, self.files = folder, files
        self.jobs, self.reports, self.messages = {}, {}, []

    def create(self, project, region, body):
        job = api.Job.from_json(body, ignore_unknown_fields=False)
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,1021}[a-z0-9])?", job.name):
            raise Refused(f"invalid job name {job.name}")
        if (project, region) != (PROJECT, REGION):
            raise Refused(f"no such project and region: {project}, {region}")
        if job.type_ == api.JobType.JOB_TYPE_UNKNOWN:
            raise Refused("neither batch nor streaming")
        if not all(self.is_there(place) for place in staged(job)):
            raise Refused(f"not staged: {staged(job)}")
        job.id = f"2026-01-01_00_00_00-{len(self.jobs) + 1}"
        job.project_id, job.location = project, region
        job.create_time = "2026-01-01T00:00:00Z"
        self.jobs[job.id] = job
        job.current_state = api.JobState.JOB_STATE_RUNNING
        if job.type_ == api.JobType.JOB_TYPE_BATCH:
            self.work(job)
            job.current_state = api.JobState.JOB_STATE_DONE
        return job

    def work(self, job, *arguments):
        """Runs a job in a process that has nothing of ours but what the job staged; returns what it reports."""
        home = self.folder / job.id
        home.mkdir()
        *packages, pipeline = (self._fetch(place, home) for place in staged(job))
        for package in packages:
            if package.suffixes[-2:] == [".tar", ".gz"]:
                install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
                subprocess.run([sys.executable, *install, f"--target={home}/packages", package], check=True)
        environment = {**os.environ, "PYTHONPATH": str(home / "packages")}
        command = [sys.executable, WORKER, pipeline, home / "report.json", *arguments]
        subprocess.run(list(map(str, command)), check=True, cwd=home, env=environment, timeout=120)
        self.reports[job.id] = json.loads((home / "report.json").read_text())
        return self.reports[job.id]

    def metrics(self, job):
        """Counters as Dataflow gives them: each once as it is, once as tentative."""
        updates = []
        for namespace, name, value in self.reports[job.id]["counters"]:
            for context in ({}, {"tentative": "true"}):
                context = {"namespace": namespace, **context}
                updates.append({"name": {"origin": "user", "name": name, "context": context}, "scalar": value})
        return {"metrics": updates}

    def is_there(self, place):
        bucket, name = place
        return self.files.bucket(bucket).get_blob(name) is not None

    def _fetch(self, place, folder):
        bucket, name = place
        path = folder / Path(name).name
        self.files.bucket(bucket).blob(name).download_to_filename(path)
        return path


def staged(job):
    """Bucket and name of what the workers of a job install, and last of its pipeline."""
    packages = [package.location for pool in job.environment.worker_pools for package in pool.packages]
    places = [place.replace("storage.googleapis.com/", "gs://", 1) for place in packages]
    places.append(job.environment.sdk_pipeline_options["options"]["pipelineUrl"])
    return [tuple(place.removeprefix("gs://").split("/", 1)) for place in places]


def _handler(dataflow):
    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if path == "/token":
                return self.send({"access_token": "none", "expires_in": 3600, "token_type": "Bearer"})
            found = re.fullmatch(
                r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs(?:/([^/]+)(/messages|/metrics)?)?", path
            )
            if not found:
                return self.fail(404, f"no such path {path}")
            project, region, name, part = found.groups()
            if name is None and self.command == "POST":
                try:
                    return self.send(dataflow.create(project, region, body))
                except Exception as error:  # which the launcher sees
                    return self.fail(400, f"{type(error).__name__}: {error}")
            if name not in dataflow.jobs:
                return self.fail(404, f"no such job {name}")
            if part == "/messages":
                return self.send({})
            return self.send(dataflow.metrics(dataflow.jobs[name]) if part else dataflow.jobs[name])

        do_GET = do_POST = do_PUT = answer

        def send(self, answer, code=200):
            text = (json.dumps(answer) if isinstance(answer, dict) else type(answer).to_json(answer)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def fail(self, code, message):
            self.send({"error": {"code": code, "message": message}}, code)

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def google_cloud(folder):
    """All of it; gives the `Dataflow`, the flags that lead to it, and the environment of processes that use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A process of its own: Arrow waits for it with the interpreter locked.
    start = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]
    store = subprocess.Popen(
        [Path(sys.executable).with_name("gcp-storage-emulator"), *start],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: _answers(port))
    url = f"http://127.0.0.1:{port}"
    environment = {"STORAGE_EMULATOR_HOST": url, "CLOUD_STORAGE_EMULATOR_ENDPOINT": url}
    files = storage.Client.create_anonymous_client()
    files._connection.API_BASE_URL = url
    dataflow = Dataflow(folder, files)
    server = ThreadingHTTPServer(("localhost", 0), _handler(dataflow))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_address[1]}"
    environment["GOOGLE_APPLICATION_CREDENTIALS"] = str(_account(folder / "account.json", f"{address}/token"))
    flags = [f"--project={PROJECT}", f"--region={REGION}", f"--temp_location=gs://{BUCKET}/tmp"]
    try:
        yield dataflow, [*flags, f"--dataflow_endpoint={address}"], environment
    finally:
        server.shutdown()
        server.server_close()
        store.terminate()
        store.wait(30)


@contextmanager
def google_cloud_here(folder):
    """As `google_cloud`, for this process: gives the `Dataflow` and the flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth._Credentials, "_credentials_init", False)  # Beam keeps the credentials that it finds first
        with google_cloud(folder) as (dataflow, flags, environment):
            for name, value in environment.items():
                patch.setenv(name, value)
            yield dataflow, flags


def _answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _account(path, token_uri):
    """A service account's key that no one but `token_uri` honours."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": "none",
        "private_key": key.decode(),
        "client_email": f"tests@{PROJECT}.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(account))
    return path
