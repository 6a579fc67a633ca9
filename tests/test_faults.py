"""Streams in which everything fails: no record may be lost by it, and none scored otherwise."""

import base64
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions
from waiting import until

from pipeline import ScoreRecords
from pipeline.models import poll_now
from vae_model.pointer import Entry, Pointer

SCORES = ("anomaly_score", "anomaly_p_value", "is_anomaly", "model_version")


# ---- what is sent, and what has to come of it ------------------------------------------------------


def make_messages(table: pa.Table) -> list[PubsubMessage]:
    """A message per row, its number in the attributes; every tenth is malformed, each in another way."""
    records = table.to_pylist()
    messages = []
    for i, record in enumerate(records):
        text = json.dumps(record).encode()
        if i % 10 == 0:
            kinds = malformed(record, text)
            text = kinds[i // 10 % len(kinds)]
        messages.append(PubsubMessage(text, {"number": str(i)}))
    return messages


def malformed(record: dict, text: bytes) -> list[bytes]:
    def changed(**cells) -> bytes:
        return json.dumps({**record, **cells}).encode()

    return [
        b" ",
        b"\xff\xfe",
        b"null",
        b"17",
        b'"text"',
        b"[" + text + b"]",
        text[:-1],
        text + text,
        text.replace(b'"length"', b'"length": 1e999, "old"'),
        b'{"other": 1}',
        b'{"length": ' + b"[" * 10_000,
        changed(color="\ud800"),
        changed(length="tall"),
        changed(length=[1.0]),
        changed(count={"n": 1}),
        changed(color=["red"]),
        changed(count="many"),
        changed(anomaly_score=1.0),
        changed(model_version="v0"),
    ]


class Expected:
    """What each version gives the rows that are not malformed: the offline scores."""

    def __init__(self, table: pa.Table, bundles) -> None:
        self._scores, self._tolerance = {}, {}
        for bundle in bundles:
            self._scores[bundle.model_version] = bundle.score(table)["anomaly_score"].to_numpy()
            magnitude = bundle.terms(table).abs().to_numpy().sum(axis=1)
            self._tolerance[bundle.model_version] = 1e-4 * (1 + magnitude)
        self.good = {i for i in range(table.num_rows) if i % 10}
        self.bad = set(range(table.num_rows)) - self.good

    def check(self, scored: list[tuple[int, dict]], dead: list[int]) -> None:
        """Every number once in scored or dead after de-duplication; every score that of its version."""
        assert {number for number, _ in scored} == self.good
        assert set(dead) == self.bad
        for number, record in scored:
            version = record["model_version"]
            difference = abs(record["anomaly_score"] - self._scores[version][number])
            assert difference <= self._tolerance[version][number], (number, version)


def outcome(message: PubsubMessage) -> tuple[int, dict]:
    return int(message.attributes["number"]), json.loads(message.data)


def letter_numbers(letters: pa.Table) -> list[int]:
    return [int(dict(attributes)["number"]) for attributes in letters["attributes"].to_pylist()]


# ---- a stream ----------------------------------------------------------------------------------------

TOPIC = "projects/project-a/topics/items"
SUBSCRIPTION = "projects/project-a/subscriptions/items"
OUT: dict[str, list] = defaultdict(list)
FAILURES: Counter = Counter()


class Keep(beam.DoFn):
    """Keeps what reaches it, in this process; its Beam bundles fail at random."""

    def __init__(self, name: str) -> None:
        self._name = name

    def start_bundle(self) -> None:
        self._kept: list = []

    def process(self, element):
        self._kept.append(element)
        fail_at_random(self._name, self._kept[0])

    def finish_bundle(self) -> None:
        fail_at_random(self._name, self._kept[0])
        OUT[self._name] += self._kept


def fail_at_random(place: str, first: object) -> None:
    """Fails a Beam bundle, known by its first element, no more than twice: Beam gives it four attempts."""
    if random.random() < 0.1 and FAILURES[place, str(first)] < 2:
        FAILURES[place, str(first)] += 1
        FAILURES[place] += 1
        raise RuntimeError(f"{place}: unlucky")


def test_a_stream_in_which_everything_fails_loses_nothing(
    first, second, renamed, first_uri, second_uri, mixed_table, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("google.pubsub_v1", reason="Pub/Sub's client comes with the extra: pip install 'beam-vae[gcp]'")
    from pipeline.pubsub_emulator import PubSubEmulator

    table = mixed_table.select(["length", "count", "color"]).slice(0, 1200)
    messages = make_messages(table)
    expected = Expected(table, (first, second))
    pointer = str(tmp_path / "current.json")

    def point(bundle_uri: str, version: str) -> None:
        Pointer(pointer, Entry(bundle_uri, version, "2026-11-22T12:00:00Z")).write()
        poll_now()

    def refusals() -> int:
        return sum("refused" in record.getMessage() for record in caplog.records)

    # The scoring step itself fails, before and after its work.
    split = type(first).split

    def unreliable(self, rows, **options):
        fail_at_random("score", rows)
        result = split(self, rows, **options)
        fail_at_random("score", rows)
        return result

    point(first_uri, first.model_version)
    caplog.set_level(logging.INFO, "pipeline.models")
    random.seed(0)
    FAILURES.clear()
    OUT.clear()
    with PubSubEmulator() as emulator:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
        publisher = emulator.publisher()
        publisher.create_topic(name=TOPIC)
        emulator.subscriber().create_subscription(name=SUBSCRIPTION, topic=TOPIC)
        pipeline = beam.Pipeline(runner="BundleBasedDirectRunner", options=PipelineOptions([], streaming=True))
        source = beam.io.ReadFromPubSub(subscription=SUBSCRIPTION, with_attributes=True)
        scored, dead = pipeline | source | ScoreRecords(pointer, model_refresh_secs=3600)
        scored | "KeepScored" >> beam.ParDo(Keep("scored"))
        dead | "KeepDead" >> beam.ParDo(Keep("dead"))
        result = pipeline.run()
        monkeypatch.setattr(type(first), "split", unreliable)

        def send(start: int, stop: int) -> None:
            publisher.publish(
                topic=TOPIC,
                messages=[{"data": item.data, "attributes": item.attributes} for item in messages[start:stop]],
            )

        def arrived() -> int:
            return len(OUT["scored"]) + sum(map(len, OUT["dead"]))

        def all_arrived(number: int) -> None:
            until(lambda: arrived() >= number)

        try:
            send(0, 300)
            all_arrived(300)
            poison(second_uri, tmp_path / "corrupt")
            point(str(tmp_path / "corrupt"), second.model_version)
            send(300, 600)
            until(lambda: refusals() == 1)
            renamed.save(str(tmp_path / "renamed"))
            point(str(tmp_path / "renamed"), renamed.model_version)
            until(lambda: refusals() == 2)
            all_arrived(600)
            emulator.stop()
            emulator.start()
            send(600, 900)
            all_arrived(900)
            point(second_uri, second.model_version)
            until(lambda: any("swapped" in record.getMessage() for record in caplog.records))
            send(900, 1200)
            all_arrived(1200)
        finally:
            result.cancel()
    outcomes = [outcome(message) for message in OUT["scored"]]
    letters = [number for table in OUT["dead"] for number in letter_numbers(table)]
    expected.check(outcomes, letters)
    versions = {number: record["model_version"] for number, record in outcomes}
    assert {versions[number] for number in versions if number < 900} == {first.model_version}
    assert {versions[number] for number in versions if number >= 900} == {second.model_version}
    assert min(FAILURES[place] for place in ("score", "scored", "dead")) > 3


def poison(source: str, target: Path) -> None:
    """A bundle one of whose bits is wrong."""
    shutil.copytree(source, target)
    content = bytearray((target / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (target / "weights.npz").write_bytes(content)


# ---- a worker's death ----------------------------------------------------------------------------------


class Write(beam.DoFn):
    """Adds lines to a file of this process, as sinks do that write at least once."""

    def __init__(self, folder: str, what: str) -> None:
        self._folder, self._what = folder, what

    def process(self, line) -> None:
        with open(f"{self._folder}/{self._what}-{os.getpid()}.txt", "a") as file:
            file.write(f"{line}\n")


class DieOnce(beam.DoFn):
    """Its worker dies, as if for lack of memory, when one record comes by; not again in a second run."""

    def __init__(self, marker: str, number: str) -> None:
        self._marker, self._number = marker, number

    def process(self, message):
        if message.attributes["number"] == self._number and not os.path.exists(self._marker):
            Path(self._marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield message


def score_on_a_portable_runner(bundle_uri: str, messages: str, folder: str) -> None:
    """The job, in a worker process of its own."""
    records = [
        PubsubMessage(base64.b64decode(text), {"number": n}) for n, text in json.loads(Path(messages).read_text())
    ]
    flags = [
        "--runner=PortableRunner",
        "--job_endpoint=embed",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={sys.executable} -m apache_beam.runners.worker.sdk_worker_main",
    ]
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        scored, dead = pipeline | beam.Create(records) | ScoreRecords(bundle_uri, max_batch_size=32)
        alive = scored | beam.ParDo(DieOnce(f"{folder}/died", "777"))
        (
            alive
            | beam.Map(lambda item: json.dumps([item.attributes["number"], item.data.decode()]))
            | "WriteScored" >> (beam.ParDo(Write(folder, "scored")))
        )
        numbers = dead | beam.FlatMap(letter_numbers)
        numbers | "WriteDead" >> beam.ParDo(Write(folder, "dead"))


def test_what_a_dead_worker_left_undone_is_done_by_a_second_run(first, first_uri, mixed_table, tmp_path):
    """Beam's local portable runner waits for ever for a worker that died: whoever is on call starts it again."""
    table = mixed_table.select(["length", "count", "color"]).slice(0, 1000)
    messages = tmp_path / "messages.json"
    messages.write_text(
        json.dumps([(item.attributes["number"], base64.b64encode(item.data).decode()) for item in make_messages(table)])
    )
    command = [sys.executable, __file__, first_uri, str(messages), str(tmp_path)]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            until(lambda: "exited with return code" in (tmp_path / "log").read_text() or job.poll() is not None, 120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert (tmp_path / "died").exists(), (tmp_path / "log").read_text()[-2000:]
    before = read_outcomes(tmp_path)
    assert 0 < len(before[0]) < 900
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scored, dead = read_outcomes(tmp_path)
    assert len(scored) > 900  # some twice
    Expected(table, [first]).check(scored, dead)


def read_outcomes(folder: Path) -> tuple[list[tuple[int, dict]], list[int]]:
    lines = [json.loads(line) for path in folder.glob("scored-*.txt") for line in path.read_text().splitlines()]
    dead = [int(line) for path in folder.glob("dead-*.txt") for line in path.read_text().splitlines()]
    return [(int(number), json.loads(text)) for number, text in lines], dead


if __name__ == "__main__":
    score_on_a_portable_runner(*sys.argv[1:])
