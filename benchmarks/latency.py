"""A stream's latency and memory: messages through Pub/Sub's API and `ScoreRecords`, beside the same without scoring.

    python -m benchmarks.latency [--secs 60] [--soak_secs 600] [--rate N] [--folder DIR]

Server, publisher and pipeline are three processes of this machine. The pipeline runs on Beam's BundleBasedDirectRunner,
the only local runner that reads Pub/Sub, whose own work for a message is most of what is seen here: what scoring adds
is the difference from a pipeline that only passes messages on. Latency is from just before publishing to the last
step. First each pipeline's peak rate is measured; the load is then half of the lowest peak, the same for all, unless
--rate says another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.data import make_table
from benchmarks.streaming import NUM_COLUMNS, prepare

TOPIC, SUBSCRIPTION = "projects/project-a/topics/records", "projects/project-a/subscriptions/records"
NUM_DIFFERENT = 1000  # messages, sent again and again
BURST_SECS = 0.02
PATIENCE_SECS = 120.0
_ARRIVED: list[float] = []  # latencies in seconds, of the one pipeline of this process


# ---- pipelines: each passes `messages` on, scored or not ------------------------------------------


def pass_on(messages: Any, folder: Path) -> Any:
    """The control."""
    return messages


def score_in_bundles(messages: Any, folder: Path) -> Any:
    """Batches end with their Beam bundle."""
    from pipeline import ScoreRecords

    return (messages | ScoreRecords(str(folder / "plain"))).scored


def score_across_bundles(messages: Any, folder: Path) -> Any:
    """Batches wait for others."""
    from pipeline import ScoreRecords

    return (messages | ScoreRecords(str(folder / "plain"), max_batch_duration_secs=0.05)).scored


PIPELINES: dict[str, Callable[[Any, Path], Any]] = {
    "no scoring": pass_on,
    "ScoreRecords": score_in_bundles,
    "ScoreRecords, max_batch_duration_secs=0.05": score_across_bundles,
}


def serve(name: str, folder: Path) -> None:
    """Runs one pipeline until stdin ends; prints, ten times a second, what arrived and the process's memory."""
    from vae_model.backend import load_quietly

    load_quietly()
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    pipeline = beam.Pipeline(runner="BundleBasedDirectRunner", options=PipelineOptions([], streaming=True))
    messages = pipeline | beam.io.ReadFromPubSub(subscription=SUBSCRIPTION, with_attributes=True)
    PIPELINES[name](messages, folder) | "Arrive" >> beam.FlatMap(_arrive)
    result = pipeline.run()

    def report() -> None:
        start = 0
        while True:
            time.sleep(0.1)
            stop = len(_ARRIVED)
            print(json.dumps({"latencies": _ARRIVED[start:stop], "rss": _rss()}), flush=True)
            start = stop

    threading.Thread(target=report, daemon=True).start()
    sys.stdin.read()
    result.cancel()
    os._exit(0)


def _arrive(message: Any) -> tuple[()]:
    from benchmarks import latency  # this module under its own name, not __main__

    latency._ARRIVED.append(time.time() - float(message.attributes["sent"]))
    return ()


def _rss() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# ---- measuring -----------------------------------------------------------------------------------


class Watched:
    """A pipeline in a process of its own, and what it says of itself."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.latencies: list[float] = []
        self.memory: list[tuple[float, int]] = []  # seconds, bytes
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                self.latencies += said["latencies"]
                self.memory.append((time.monotonic(), said["rss"]))

    def wait_for(self, num_messages: int) -> None:
        """Until that many have arrived."""
        end = time.monotonic() + PATIENCE_SECS
        while len(self.latencies) < num_messages:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"only {len(self.latencies):,} of {num_messages:,} messages arrived")
            time.sleep(0.05)


@contextmanager
def running(name: str, folder: Path, environment: dict[str, str]) -> Iterator[Watched]:
    """A pipeline that has met its first messages."""
    command = [sys.executable, "-m", "benchmarks.latency", "--folder", str(folder), "--serve", name]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Watched(process)
    finally:
        process.kill()
        process.wait()


class Publisher:
    """Sends records over the wire, each with the time of its sending."""

    def __init__(self, client: Any, num_columns: int) -> None:
        self._client = client
        records = make_table(NUM_DIFFERENT, num_columns, 0, 2).to_pylist()
        self._records = [json.dumps({"id": f"record-{i}", **record}).encode() for i, record in enumerate(records)]
        self.num_sent = 0

    def send(self, count: int) -> None:
        """Now."""
        for start in range(0, count, 500):
            sent = {"sent": repr(time.time())}
            numbers = range(self.num_sent, self.num_sent + min(500, count - start))
            messages = [{"data": self._records[i % NUM_DIFFERENT], "attributes": sent} for i in numbers]
            self._client.publish(topic=TOPIC, messages=messages)
            self.num_sent += len(messages)

    def send_at(self, rate: float, secs: float, watched: Watched) -> None:
        """For some time, at a rate per second."""
        first, start = self.num_sent, time.monotonic()
        while (now := time.monotonic() - start) < secs:
            self.send(int(rate * now) - (self.num_sent - first))
            time.sleep(BURST_SECS)
        watched.wait_for(self.num_sent)


def measure_peak(name: str, folder: Path, environment: dict[str, str], publisher: Publisher, count: int) -> float:
    """Messages/s while a backlog is worked off."""
    with running(name, folder, environment) as watched:
        publisher.num_sent = 0
        publisher.send(200)
        watched.wait_for(200)  # it is warm
        publisher.send(count)
        start = time.monotonic()
        watched.wait_for(publisher.num_sent)
        return count / (time.monotonic() - start)


def measure_latency(
    name: str, folder: Path, environment: dict[str, str], publisher: Publisher, rate: float, secs: float
) -> tuple[np.ndarray, list[tuple[float, int]]]:
    """Latencies in milliseconds at a steady rate, and the process's memory (seconds, MiB) meanwhile."""
    with running(name, folder, environment) as watched:
        publisher.num_sent = 0
        publisher.send_at(rate, 5, watched)  # it is warm
        warm, start = publisher.num_sent, time.monotonic()
        publisher.send_at(rate, secs, watched)
        memory = [(at - start, rss / 2**20) for at, rss in watched.memory if at >= start]
        return 1e3 * np.array(watched.latencies[warm:]), memory


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secs", type=float, default=60, help="How long each latency is measured.")
    parser.add_argument("--soak_secs", type=float, default=0, help="How long memory is watched; 0: not at all.")
    parser.add_argument("--rate", type=float, help="Messages a second; by default, half of the lowest peak.")
    parser.add_argument("--messages", type=int, default=5000, help="The backlog by which a peak is measured.")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/scratch"), help="For models.")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        from benchmarks import latency

        latency.serve(args.serve, args.folder)
        return
    prepare(args.folder)
    console = Console()
    command = [sys.executable, "-m", "pipeline.pubsub_emulator", "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        host = server.stdout.readline().strip().partition("=")[2]
        environment = {**os.environ, "PUBSUB_EMULATOR_HOST": host}
        publisher = Publisher(_client(host), NUM_COLUMNS)
        peaks = {name: measure_peak(name, args.folder, environment, publisher, args.messages) for name in PIPELINES}
        rate = args.rate or min(peaks.values()) / 2
        table = Table(title=f"{NUM_COLUMNS} float64 columns as JSON, {rate:,.0f} messages/s for {args.secs:g} s")
        for heading in ("", "peak, messages/s", "p50, ms", "p99, ms", "added p50", "added p99"):
            table.add_column(heading, justify="right" if heading else "left")
        control = None
        for name, peak in peaks.items():
            latencies, _ = measure_latency(name, args.folder, environment, publisher, rate, args.secs)
            p50, p99 = np.percentile(latencies, [50, 99])
            control = control or (p50, p99)
            added = (f"{p50 - control[0]:,.1f}", f"{p99 - control[1]:,.1f}")
            table.add_row(name, f"{peak:,.0f}", f"{p50:,.1f}", f"{p99:,.1f}", *added)
        console.print(table)
        if args.soak_secs:
            for name in list(PIPELINES)[:2]:
                _, memory = measure_latency(name, args.folder, environment, publisher, rate, args.soak_secs)
                console.print(f"{name}, {rate:,.0f} messages/s for {args.soak_secs:g} s: {_course(memory)}")
    finally:
        server.kill()
        server.wait()


def _client(host: str) -> Any:
    import grpc
    from google.pubsub_v1 import PublisherClient, SubscriberClient
    from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
    from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

    publisher = PublisherClient(transport=PublisherGrpcTransport(channel=grpc.insecure_channel(host)))
    subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=grpc.insecure_channel(host)))
    publisher.create_topic(name=TOPIC)
    subscriber.create_subscription(name=SUBSCRIPTION, topic=TOPIC)
    return publisher


def _course(memory: list[tuple[float, int]]) -> str:
    """The process's memory, tenth by tenth of the time."""
    parts = np.array_split(np.array(memory)[:, 1], 10)
    return "MiB " + " ".join(f"{part.mean():,.0f}" for part in parts)


if __name__ == "__main__":
    main()
