"""Jobs that are killed while they run, or cannot write: what a reader finds then, and what a second run does."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

NUM_KILLS = 3
PATIENCE = 300  # seconds for a process that does neither what is waited for nor end


@pytest.fixture(scope="module")
def source(make_table, tmp_path_factory):
    """A folder of three files, large enough for a job to be met at work on any of them."""
    folder = tmp_path_factory.mktemp("in")
    for i in range(3):
        pq.write_table(make_table(40_000, i), folder / f"{i}.parquet", row_group_size=20_000)
    return folder


def job(source, output, bundle_uri, *more) -> list[str]:
    flags = [f"--input={source}/*.parquet", f"--output={output}", f"--bundle={bundle_uri}", "--runner=FnApiRunner"]
    return [sys.executable, "-m", "pipeline", *flags, *more]


def score(source, output, bundle_uri) -> list[str]:
    flags = [f"--input={source}/*.parquet", f"--output={output}", f"--bundle={bundle_uri}"]
    return [sys.executable, "-m", "beam_vae", "score", *flags]


def finish(command) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def kill_when(command, happened) -> bool:
    """Starts a command and kills it as soon as `happened()`; whether that was before its own end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    try:
        while process.poll() is None and not happened():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    return was_running


def bytes_in(folder: Path, pattern: str) -> int:
    """Of the files that match, as far as they have been written; -1 if there are none."""
    sizes = [size_of(path) for path in folder.glob(pattern)]
    return sum(sizes) if sizes else -1


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # moved to its place meanwhile
        return 0


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(source, bundle_uri, tmp_path_factory):
    """What the job writes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = finish(job(source, folder, bundle_uri))
    assert done.returncode == 0, done.stderr
    return contents(folder)


def test_a_killed_job_leaves_nothing_that_looks_like_data_and_a_rerun_is_as_if_nothing_had_been(
    source, bundle_uri, undisturbed, tmp_path
):
    size = len(undisturbed["scored-00000-of-00001.parquet"])
    marks = [1, *sorted(random.Random(0).randrange(1, size) for _ in range(NUM_KILLS - 1))]
    out = tmp_path / "out"
    for num_killed, mark in enumerate(marks, 1):
        # Temporary files of the jobs killed before are not this one's.
        before = max(bytes_in(out, ".beam-temp-scored-*/*"), 0)
        command = job(source, out, bundle_uri)
        assert kill_when(command, lambda: bytes_in(out, ".beam-temp-scored-*/*") - before >= mark)  # noqa: B023
        assert not [path for path in out.iterdir() if not path.name.startswith((".", "_"))]
        assert pq.ParquetDataset(out).files == []
        assert len(list(out.glob(".beam-temp-scored-*"))) == num_killed
    done = finish(job(source, out, bundle_uri))
    assert done.returncode == 0, done.stderr
    assert contents(out) == undisturbed
    assert not list(out.rglob(".beam-temp-*"))


def test_a_killed_job_leaves_earlier_output_as_it_was_until_all_is_written(source, bundle_uri, undisturbed, tmp_path):
    out = tmp_path / "out"
    for name, content in undisturbed.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    half = len(undisturbed["scored-00000-of-00001.parquet"]) // 2
    assert kill_when(
        job(source, out, bundle_uri, "--overwrite", "--threshold=0"),
        lambda: bytes_in(out, ".beam-temp-scored-*/*") >= half,
    )
    assert {name: content for name, content in contents(out).items() if ".beam-temp-" not in name} == undisturbed


def test_a_job_killed_as_its_files_get_their_names_leaves_whole_files_that_say_how_many_there_should_be(
    source, bundle_uri, tmp_path
):
    out = tmp_path / "out"
    workers = ("--direct_running_mode=multi_threading", "--direct_num_workers=3")
    kill_when(job(source, out, bundle_uri, *workers), lambda: list(out.glob("scored-*")))
    shards = sorted(out.glob("scored-*"))
    assert shards
    for path in shards:
        assert pq.read_table(path).num_rows > 0
        assert path.name.endswith("-of-00003.parquet")
    done = finish(job(source, out, bundle_uri, "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert pq.read_table(out).num_rows == 120_000


def test_a_killed_score_leaves_no_file_and_a_rerun_is_as_if_nothing_had_been(source, bundle_uri, tmp_path):
    undisturbed, out = tmp_path / "undisturbed.parquet", tmp_path / "out" / "scored.parquet"
    assert finish(score(source, undisturbed, bundle_uri)).returncode == 0
    partial = out.with_name("scored.parquet.partial")
    for mark in (1, random.Random(1).randrange(1, undisturbed.stat().st_size)):
        before = written_at(partial)
        command = score(source, out, bundle_uri)
        assert kill_when(command, lambda: written_at(partial) != before and size_of(partial) >= mark)  # noqa: B023
        assert not list(out.parent.glob("*.parquet"))
    done = finish(score(source, out, bundle_uri))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == undisturbed.read_bytes()
    assert os.listdir(out.parent) == ["scored.parquet"]


@pytest.fixture
def full_disk(tmp_path):
    """A filesystem of 2 MiB, less than what is written in these tests."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small filesystem: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("command", [job, score])
def test_a_full_disk_is_told_in_one_line_and_leaves_no_file(command, source, bundle_uri, full_disk):
    done = finish(command(source, full_disk / "out/x.parquet", bundle_uri))
    assert done.returncode == 1
    assert "No space left on device" in told(done)
    assert contents(full_disk) == {}


@pytest.mark.parametrize("command", [job, score])
def test_an_output_that_cannot_be_made_is_told_in_one_line(command, source, bundle_uri, tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = finish(command(source, tmp_path / "file/x.parquet", bundle_uri))
    assert done.returncode == 1
    assert str(tmp_path / "file") in told(done)
    assert contents(tmp_path) == {"file": b"no folder"}


def told(done: subprocess.CompletedProcess) -> str:
    """The one line of an error."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("beam-vae: error: ")
    return line
