"""Everything on gs:// and s3://, against gcp-storage-emulator and moto, which speak the stores' own protocols."""

import json
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

import beam_vae
from pipeline.run import run
from pipeline.sinks import WriteDeadLetters, WriteTables
from pipeline.sources import match_files
from vae_model import files, load_bundle
from vae_model.bundle import BundleError
from vae_model.pointer import read_pointer

boto3 = pytest.importorskip("boto3", reason="Beam's client of s3:// is in the aws extra")
pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is in the dev extra")
pytest.importorskip("moto.server", reason="moto is in the dev extra")

SMALL = ["--hidden_dims=8", "--latent_dim=2", "--num_samples=1", "--max_steps=20", "--calibration_fraction=0.2"]


def service_account(token_uri: str) -> dict[str, str]:
    """Credentials of nobody."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    email = "nobody@project.iam.gserviceaccount.com"
    account = {"type": "service_account", "project_id": "project", "client_email": email, "client_id": "1"}
    return account | {"private_key_id": "x", "private_key": key.decode(), "token_uri": token_uri}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Both stores, each with a bucket named `bucket`, found through the environment alone."""
    command = [sys.executable, str(Path(__file__).with_name("store_servers.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        urls = json.loads(process.stdout.readline())
        credentials = tmp_path_factory.mktemp("credentials") / "account.json"
        credentials.write_text(json.dumps(service_account(f"{urls['gs']}/token")))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "STORAGE_EMULATOR_HOST": urls["gs"],
                "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
                "GOOGLE_CLOUD_PROJECT": "project",
                "AWS_ENDPOINT_URL": urls["s3"],
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket="bucket")
            yield
        process.stdin.close()


@pytest.fixture(params=["gs", "s3"])
def root(request, servers):
    """A folder in a store, another one for each test."""
    return f"{request.param}://bucket/{request.node.name.partition('[')[0]}"


def write_table(table: pa.Table, uri: str, **options) -> None:
    system, path = files.filesystem(uri)
    pq.write_table(table, path, filesystem=system, **options)


def read_table(uri: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path, filesystem=system) for system, path in files.match(uri, ".parquet"))


def names(root: str) -> set[str]:
    system, path = files.filesystem(root)
    found = system.get_file_info(pa.fs.FileSelector(path, recursive=True, allow_not_found=True))
    return {item.path.removeprefix(f"{path}/") for item in found if item.is_file}


def test_every_command_works_in_a_store(root, first, make_table, capsys):
    table = make_table(800, 0).select(["length", "count", "color"])
    label = pa.array((pc.greater(table["length"], 13)).to_numpy().astype(int))
    write_table(table, f"{root}/in/a.parquet")
    write_table(table.append_column("bad", label), f"{root}/labelled.parquet")
    statistics = ["--output", f"{root}/statistics.json", "--calibration_fraction=0.2", "--runner=FnApiRunner"]

    from pipeline.statistics import main as take_statistics

    assert take_statistics(["--input", f"{root}/in/*.parquet", *statistics]) == 0
    fit = ["fit", "--input", f"{root}/in", "--output", f"{root}/bundle", "--statistics", f"{root}/statistics.json"]
    assert beam_vae.main([*fit, *SMALL]) == 0
    assert load_bundle(f"{root}/bundle").model_version == first.model_version  # as fitted without the file
    first.save(f"{root}/bundle", overwrite=True)
    first.save(f"{root}/other")

    for command in (
        [
            "score",
            "--input",
            f"{root}/in/*.parquet",
            "--output",
            f"{root}/scored.parquet",
            "--bundle",
            f"{root}/bundle",
        ],
        ["evaluate", "--input", f"{root}/labelled.parquet", "--bundle", f"{root}/bundle", "--label", "bad"],
        ["inspect", f"{root}/bundle"],
        ["promote", f"{root}/bundle", f"{root}/live.json"],
        ["promote", f"{root}/other", f"{root}/live.json"],
        ["inspect", f"{root}/live.json"],
        ["rollback", f"{root}/live.json"],
    ):
        assert beam_vae.main(command) == 0, (command, capsys.readouterr().err)
    np.testing.assert_allclose(
        read_table(f"{root}/scored.parquet")["anomaly_score"], first.score(table)["anomaly_score"], atol=1e-4
    )
    pointer = read_pointer(f"{root}/live.json")
    assert (pointer.current.bundle, pointer.locate(pointer.current)) == ("bundle", f"{root}/bundle")
    assert not [name for name in names(root) if "partial" in name or "checkpoint" in name]


def test_the_job_reads_and_writes_a_store(root, first, make_table):
    table = make_table(450, 5).select(["id", "length", "count", "color"])
    first.save(f"{root}/bundle")
    write_table(table.slice(0, 400), f"{root}/in/a.parquet", row_group_size=150)
    write_table(table.slice(400, 50).drop_columns(["count"]), f"{root}/in/b.parquet")
    flags = [f"--input={root}/in/*.parquet", f"--output={root}/out", f"--bundle={root}/bundle", "--runner=FnApiRunner"]
    flags.append("--max_dead_letter_fraction=0.5")
    write_table(table, f"{root}/out/scored-00000-of-00002.parquet")  # of an earlier job
    with pytest.raises(FileExistsError, match=r"scored-00000-of-00002\.parquet: is there already \(1 files in all\)"):
        run(flags)
    summary = run([*flags, "--overwrite"])
    assert (summary.num_records, summary.num_scored, summary.num_dead_letters) == (450, 400, 50)
    scored = read_table(f"{root}/out/scored-*.parquet").sort_by("id")
    alone = first.score(table.slice(0, 400)).sort_by("id")
    np.testing.assert_allclose(scored["anomaly_score"], alone["anomaly_score"], rtol=1e-4, atol=1e-3)
    assert read_table(f"{root}/out/_dead_letters").num_rows == 50
    assert names(f"{root}/out") == {
        "scored-00000-of-00001.parquet",
        "_dead_letters/dead_letters-00000-of-00001.parquet",
    }


def test_json_lines_may_have_no_line_in_a_store(root):
    FileSystems.set_options(PipelineOptions([]))
    schema = pa.schema([("x", pa.int64())])
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        tables = pipeline | beam.Create([schema.empty_table()], reshuffle=False)
        tables | "Zipped" >> WriteTables(f"{root}/zipped.jsonl.gz", schema)
        tables | beam.Filter(len) | "None" >> WriteDeadLetters(f"{root}/none.jsonl")
    assert names(root) == {"none-00000-of-00001.jsonl", "zipped-00000-of-00001.jsonl.gz"}
    for name in names(root):
        with FileSystems.open(f"{root}/{name}") as stream:
            assert stream.read() == b""


def test_a_bundle_whose_writing_fails_does_not_count(root, first):
    first.save(f"{root}/bundle")
    with pytest.raises(TypeError):
        files.write_directory(
            f"{root}/bundle", {"a": b"", "b": None, "manifest.json": b"{}"}, last="manifest.json", overwrite=True
        )
    with pytest.raises(BundleError):
        load_bundle(f"{root}/bundle")
    with pytest.raises(FileExistsError, match=r"already exists"):
        files.write_directory(f"{root}/bundle", {"manifest.json": b"{}"}, last="manifest.json")


def test_a_file_whose_writing_fails_leaves_the_one_before(root, monkeypatch):
    files.write_file(f"{root}/x", b"old")

    def fail() -> None:
        with files.new_file(f"{root}/x") as stream:
            stream.write(b"new" * 4_000_000)  # more than one part
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert files.read_file(f"{root}/x") == b"old"
    assert names(root) == {"x"}
    content = np.random.default_rng(0).bytes(12 << 20)
    monkeypatch.setattr(files, "_MAX_COPY_BYTES", 1 << 20)  # beyond it S3 does not copy by itself
    with files.new_file(f"{root}/x") as stream:
        stream.write(content)
    assert files.read_file(f"{root}/x") == content
    assert names(root) == {"x"}


def test_globs_and_directories_in_a_store_match_as_locally(root):
    for name in ("a.parquet", "_b.parquet", "deep/c.parquet", ".hidden/d.parquet", "e.csv"):
        files.write_file(f"{root}/{name}", b"x")
    assert [path.rpartition("/")[2] for _, path in files.match(root, ".parquet")] == ["a.parquet", "c.parquet"]
    assert [path.rpartition("/")[2] for _, path in files.match(f"{root}/*.parquet")] == ["a.parquet"]
    system, path = files.filesystem(f"{root}/deep")
    system.create_dir(path)  # an object of its own
    FileSystems.set_options(PipelineOptions([]))
    assert match_files(f"{root}/deep/*", "parquet") == [f"{root}/deep/c.parquet"]
    assert match_files(root, "parquet") == [f"{root}/a.parquet", f"{root}/deep/c.parquet"]
    with pytest.raises(FileNotFoundError, match=r"absent/\*: no file matches"):
        files.match(f"{root}/absent/*")
    files.remove(f"{root}/a.parquet")
    assert not files.exists(f"{root}/a.parquet")
