"""The demo of streaming: October's flights through Pub/Sub, some malformed, some late; a new model on the way."""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.demo import reason_text
from pipeline.records import json_rows
from vae_model.config import TrainingConfig, VAEConfig
from vae_model.flights import write_flights

PROJECT = "projects/demo-project"
FLIGHTS_PER_SEC = 100.0
MALFORMED, LATE, TWICE = 0.03, 0.02, 0.01  # shares of the flights
LATE_BY = datetime.timedelta(minutes=10)
_SOON_SECS = 90.0  # for what a busy machine needs a few seconds
_MAX_ALERTS = 20
_TRAINING = TrainingConfig(time_column="time_hour", max_steps=300)
_BATCH = 50
# What becomes of malformed ones: one kind after the other.
_MALFORM: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2],
    lambda text: f"[{text}]",
    lambda text: text.replace('"distance":', '"distance":"far","miles":', 1),
    lambda text: f"flight of {len(text)} letters",
)


@dataclass(frozen=True)
class Flight:
    """A message to publish."""

    id: str
    text: str
    is_late: bool


@dataclass
class Account:
    """What was published, and what came out; ids, one per message.

    Args:
        published: To the job's topic.
        late: Those whose event was long before.
        scored: On the topic of scored flights.
        dead: On that of dead letters.
        versions: Scored messages by the version of the model.
        kinds: Dead letters by kind of error.
        scores: By id and version.
        num_contradictions: Messages that came twice and were scored differently by one model.
        num_anomalies: Scored messages that are anomalies.
        seconds: From the first message, after the job was ready, to the last.
    """

    published: list[str] = field(default_factory=list)
    late: set[str] = field(default_factory=set)
    scored: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    num_contradictions: int = 0
    num_anomalies: int = 0
    seconds: float = 0.0

    @property
    def num_out(self) -> int:
        """Messages on both topics."""
        return len(self.scored) + len(self.dead)

    @property
    def num_again(self) -> int:
        """Messages that came out with an id that had come out before."""
        return self.num_out - len({*self.scored, *self.dead})

    @property
    def adds_up(self) -> bool:
        """Whether each message came out once, scored or dead, one and the same always alike, and two models scored."""
        once = Counter(self.published) == Counter(self.scored + self.dead)
        return once and not self.num_contradictions and len(self.versions) == 2


def demo_stream(
    folder: Path, num_flights: int = 2000, model: VAEConfig | None = None, training: TrainingConfig = _TRAINING
) -> Account:
    """Runs the demo and prints what it does.

    Args:
        folder: For tables and bundles; what an earlier demo left there is replaced.
        num_flights: Of October, drawn at random.
        model: Of both bundles; by default the defaults.
        training: Of both; by default a quick one.

    Raises:
        RuntimeError: The job ended by itself, or something took far too long.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every connection that ends
    from vae_model.backend import load_quietly

    load_quietly()
    from pipeline.pubsub_emulator import PubSubEmulator
    from vae_model.promotion import promote

    console = Console()
    console.rule("1. Two models: trained on January to August, and again with September")
    paths = write_flights(folder / "flights")
    older, newer = (_fit(paths[:months], folder / f"until-month-{months}", model, training) for months in (8, 9))
    pointer = folder / "current.json"
    pointer.unlink(missing_ok=True)
    promote(older, str(pointer))

    console.rule("2. A streaming job between Pub/Sub topics on this machine")
    flights = _draw_flights(paths[9], num_flights)
    half, most = len(flights) // 2, len(flights) - len(flights) // 10
    account = Account()
    with PubSubEmulator() as emulator:
        _create_topics(emulator)
        flags = {
            "input": f"pubsub:{PROJECT}/subscriptions/flights",
            "output": f"pubsub:{PROJECT}/topics/scored",
            "dead_letters": f"pubsub:{PROJECT}/topics/dead",
            "timestamp_attribute": "event_time",
            "bundle": pointer,
            "model_refresh_secs": 1,
            "reasons": 2,
        }
        argv = ["--streaming", *(f"--{name}={value}" for name, value in flags.items())]
        console.print(f"beam-vae run {' '.join(argv)}", soft_wrap=True, highlight=False, markup=False)
        with _Job(argv, emulator.host) as job, _Listener(emulator, account, console) as listener:
            publisher = emulator.publisher()
            _publish(publisher, flights[:1], account)
            job.wait_for(lambda: account.num_out == 1)
            console.print("The job is ready.")
            start = time.monotonic()
            _publish(publisher, flights[1:half], account)
            console.print(f"[bold]beam-vae promote {newer} {pointer}[/bold]", soft_wrap=True, highlight=False)
            promote(newer, str(pointer))
            _publish(publisher, flights[half:most], account)
            # The last ones wait until the job has noticed, however busy the machine is.
            job.wait_for(lambda: len(account.versions) == 2 or account.num_out == len(account.published))
            _publish(publisher, flights[most:], account)
            job.wait_for(lambda: account.num_out >= len(account.published))
            account.seconds = time.monotonic() - start
            console.print(f"Every message has come out: {listener.num_shown} alerts are above. Now the job is drained.")
            console.print("Its own account:")
            job.drain()
    console.rule("3. What was published, and what came out")
    print_account(console, account)
    return account


def _fit(paths: Sequence[Path], output: Path, model: VAEConfig | None, training: TrainingConfig) -> str:
    from vae_model.cli import Stages
    from vae_model.fitting import fit

    with Stages() as on_progress:
        fit(
            [str(path) for path in paths],
            model or VAEConfig(),
            training,
            output=str(output),
            overwrite=True,
            on_progress=on_progress,
        )
    return str(output)


def _draw_flights(path: Path, number: int) -> list[Flight]:
    """Flights in their order, some malformed, some late, some twice."""
    rng = np.random.default_rng(0)
    table = pq.read_table(path)
    table = table.take(np.sort(rng.permutation(table.num_rows)[:number]))
    malformed, late, twice = (rng.uniform(size=table.num_rows) < share for share in (MALFORMED, LATE, TWICE))
    malformed[0] = False  # by it the demo sees that the job is ready
    flights = []
    for i, text in enumerate(json_rows(table).to_pylist()):
        if malformed[i]:
            text = _MALFORM[int(malformed[:i].sum()) % len(_MALFORM)](text)
        flights += [Flight(f"flight-{i:06d}", text, bool(late[i]))] * (2 if twice[i] and i else 1)
    return flights


def _create_topics(emulator: Any) -> None:
    for name in ("flights", "scored", "dead"):
        topic, subscription = f"{PROJECT}/topics/{name}", f"{PROJECT}/subscriptions/{name}"
        emulator.publisher().create_topic(name=topic)
        emulator.subscriber().create_subscription(name=subscription, topic=topic, ack_deadline_seconds=600)


def _publish(publisher: Any, flights: Sequence[Flight], account: Account) -> None:
    """Publishes at `FLIGHTS_PER_SEC`."""
    start = time.monotonic()
    for first in range(0, len(flights), _BATCH):
        batch = flights[first : first + _BATCH]
        now = datetime.datetime.now(datetime.UTC)
        times = [now - LATE_BY if flight.is_late else now for flight in batch]
        account.published += [flight.id for flight in batch]
        account.late |= {flight.id for flight in batch if flight.is_late}
        messages = [
            {
                "data": flight.text.encode(),
                "attributes": {"id": flight.id, "event_time": f"{when:%Y-%m-%dT%H:%M:%S.%fZ}"},
            }
            for flight, when in zip(batch, times, strict=True)
        ]
        publisher.publish(topic=f"{PROJECT}/topics/flights", messages=messages)
        time.sleep(max(0.0, start + (first + len(batch)) / FLIGHTS_PER_SEC - time.monotonic()))


class _Job:
    """The streaming job, in a process of its own."""

    def __init__(self, argv: Sequence[str], host: str) -> None:
        self._argv, self._environment = argv, {**os.environ, "PUBSUB_EMULATOR_HOST": host}

    def __enter__(self) -> _Job:
        self._process = subprocess.Popen([sys.executable, "-m", "pipeline", *self._argv], env=self._environment)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _SOON_SECS
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"the job ended by itself, with status {self._process.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"the job has not done in {_SOON_SECS:g} s what takes a few")
            time.sleep(0.05)

    def drain(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout=_SOON_SECS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the job did not end within {_SOON_SECS:g} s") from None
        if status:
            raise RuntimeError(f"the job ended with status {status}")


class _Listener:
    """Reads the topics of scored flights and of dead letters, counts, and prints alerts as they come."""

    def __init__(self, emulator: Any, account: Account, console: Console) -> None:
        self._subscriber, self._account, self._console = emulator.subscriber(), account, console
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.num_shown = 0

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stopped.is_set():
            for name, take in (("scored", self._take_scored), ("dead", self._take_dead)):
                subscription = f"{PROJECT}/subscriptions/{name}"
                request = {"subscription": subscription, "max_messages": 1000, "return_immediately": True}
                received = self._subscriber.pull(request=request).received_messages
                for item in received:
                    take(item.message)
                if received:
                    ack_ids = [item.ack_id for item in received]
                    self._subscriber.acknowledge(subscription=subscription, ack_ids=ack_ids)
            self._stopped.wait(0.05)

    def _take_scored(self, message: Any) -> None:
        account, attributes = self._account, message.attributes
        row, key = json.loads(message.data), (attributes["id"], attributes["model_version"])
        known = account.scores.setdefault(key, row["anomaly_score"])
        account.num_contradictions += not math.isclose(known, row["anomaly_score"], rel_tol=1e-3)
        account.versions[attributes["model_version"]] += 1
        if attributes["is_anomaly"] == "true":
            account.num_anomalies += 1
            if self.num_shown < _MAX_ALERTS:
                self.num_shown += 1
                self._console.print(_alert(row), soft_wrap=True, highlight=False)
        account.scored.append(attributes["id"])

    def _take_dead(self, message: Any) -> None:
        self._account.kinds[message.attributes["dead_letter_error_type"]] += 1
        self._account.dead.append(message.attributes["id"])


def _alert(row: dict[str, Any]) -> str:
    flight = escape(f"{row['carrier']} {row['flight']} {row['origin']}-{row['dest']}")
    reasons = "; ".join(map(reason_text, row["anomaly_reasons"]))
    score = f"score {row['anomaly_score']:.1f}, p {row['anomaly_p_value']:.0e}"
    return f"[red]alert[/red] {flight}, {score}: {reasons} [dim]by {row['model_version']}[/dim]"


def print_account(console: Console, account: Account) -> None:
    """The account, as a table, and whether it adds up."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("in", f"{len(account.published):,}", "messages published")
    table.add_row("scored", f"{len(account.scored):,}", "")
    table.add_row("anomalies", f"{account.num_anomalies:,}", "of the scored")
    for version, number in account.versions.items():
        table.add_row("", f"{number:,}", f"by model {version}")
    table.add_row("dead letters", f"{len(account.dead):,}", "")
    for kind, number in account.kinds.most_common():
        table.add_row("", f"{number:,}", kind.replace("_", " "))
    late = sum(item in account.late for item in account.scored + account.dead)
    table.add_row("late", f"{late:,}", f"{LATE_BY.seconds // 60} minutes after their event, scored like any other")
    table.add_row("twice", f"{account.num_again:,}", "published twice, and so scored twice, with the same score")
    rate = len(account.published) / account.seconds
    table.add_row("messages/s", f"{rate:,.0f}", f"published at {FLIGHTS_PER_SEC:g}/s")
    console.print(table)
    if account.adds_up:
        console.print("[green]It adds up:[/green] each message came out once, scored or dead; both models have scored.")
        return
    published, out = Counter(account.published), Counter(account.scored + account.dead)
    console.print(
        f"[red]It does not add up:[/red] {(published - out).total():,} messages are missing, "
        f"{(out - published).total():,} are too many, {account.num_contradictions:,} have two scores, "
        f"{len(account.versions)} models have scored."
    )
