"""Kafka topics in and out, in pure Python: no Java, on any runner that has splittable DoFns."""

from __future__ import annotations

import datetime
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.restriction_trackers import OffsetRange
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from pipeline.letters import NAMESPACE
from pipeline.offsets import FOREVER, RESTRICTION, WATERMARK, Offsets, advance
from pipeline.uris import parse_uri, positive, seconds, truth

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message, Producer

logger = logging.getLogger(__name__)

Record = tuple[Optional[bytes], Optional[bytes]]  # noqa: UP045  Beam's coders know Optional
_Element = tuple[str, int, int]  # topic, number of the partition, partitions known at launch
_BLOCK_RECORDS = 1000
_BUNDLE_RECORDS = 10_000  # and then it is another partition's turn
_BUNDLE_SECS = 1.0
_POLL_SECS = 0.1
_IDLE_SECS = 0.2  # until an idle partition is asked again
_CHECK_SECS = 1.0  # between questions for the end of an idle partition
_PARK_SECS = 60.0
_TELL_SECS = 60.0
_MAX_AHEAD_SECS = 3600.0  # of the clock: brokers' own limit since Kafka 4
_END_OF_TIME = GlobalWindow().max_timestamp()
_STARTS = ("earliest", "latest", "committed")


class KafkaRecord(NamedTuple):
    """A record and where it was; `topic`, `partition` and `offset` are an id of it.

    Args:
        topic: Its topic.
        partition: Its partition.
        offset: Its place there.
        timestamp: As Kafka has it, also the element's; the time of reading where Kafka's cannot be.
        key: Bytes, or None.
        value: Bytes, or None for a tombstone.
        headers: Pairs of a name and bytes, or None.
    """

    topic: str
    partition: int
    offset: int
    timestamp: Timestamp
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class _Cluster:
    """How to reach the brokers; as a key it tells consumers apart."""

    servers: str
    config: tuple[tuple[str, Any], ...]
    config_file: str | None
    timeout_secs: float
    group_id: str | None = None

    def _client_config(self) -> dict[str, Any]:
        """The user's settings; those in a file are read where they are used, so that no job graph shows them."""
        from_file = {} if self.config_file is None else _read_properties(self.config_file)
        # Not on standard error, where librdkafka writes otherwise, as often as it likes.
        quiet = {"logger": _librdkafka_logger, "log_level": 4}
        return {**quiet, **from_file, **dict(self.config), "bootstrap.servers": self.servers}

    def consumer(self) -> Consumer:
        from confluent_kafka import Consumer

        # Each partition has a consumer: librdkafka's own 64 MiB would be much for a hundred of them.
        defaults = {"queued.max.messages.kbytes": 16 << 10}
        ours = {
            "group.id": self.group_id or "beam-vae",  # librdkafka wants one, also where nothing is committed
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
        }
        return Consumer({**defaults, **self._client_config(), **ours})

    def producer(self) -> Producer:
        from confluent_kafka import Producer

        defaults = {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",  # Java's
            "delivery.timeout.ms": round(1000 * self.timeout_secs),
        }
        return Producer({**defaults, **self._client_config()})


_librdkafka_logger = logging.getLogger(f"{__name__}.librdkafka")


def _read_properties(path: str) -> dict[str, str]:
    with FileSystems.open(path) as stream:
        lines = stream.read().decode().splitlines()
    properties = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals:
            raise ValueError(f"{path}: expected name=value in line {number}, got something else")
        properties[name.strip()] = value.strip()
    return properties


# ---- one partition -----------------------------------------------------------------------------


class _Partition:
    """A consumer of one partition: its records in order, from the place that it is sent to."""

    def __init__(self, cluster: _Cluster, topic: str, number: int) -> None:
        from confluent_kafka import TopicPartition

        self.place = f"{cluster.servers}/{topic}[{number}]"
        self.next = -1  # the lowest offset that a record still to come may have
        self.claimed = -1  # the offset after the last record that was taken; it lags where offsets hold no record
        self._at = partial(TopicPartition, topic, number)
        self._consumer = cluster.consumer()
        self._timeout_secs = cluster.timeout_secs
        self._checked = time.monotonic()
        self._silent_since: float | None = None
        self._lost = Metrics.counter(NAMESPACE, "kafka_offsets_lost")

    def seek(self, offset: int) -> None:
        """Continues at an offset, at no cost where it would anyway."""
        if offset != self.claimed:
            self._assign(offset)

    def _assign(self, offset: int) -> None:
        self._consumer.assign([self._at(offset)])
        self.next = self.claimed = offset

    def read(self, max_records: int) -> list[Message]:
        """The next records; none if none came in `_POLL_SECS`.

        Raises:
            RuntimeError: The brokers refuse, or the partition is not the one that it was.
        """
        from confluent_kafka import KafkaError

        records = []
        for message in self._consumer.consume(max_records, _POLL_SECS):
            error = message.error()
            if error is None:
                records.append(message)
                self.next = message.offset() + 1
            elif error.code() == KafkaError._PARTITION_EOF:
                # Beyond the last record where a transaction's marks follow it, or compaction removed others.
                self.next = max(self.next, message.offset())
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._leave_lost_offsets()
            elif not _is_passing(error):
                raise RuntimeError(f"{self.place}: expected records, got {error}")
        if records:
            self._silent_since = None
        return records

    def _leave_lost_offsets(self) -> None:
        """The partition does not have the next offset: goes on at its first one, and says so."""
        first, end = self.offsets()
        if self.next > end:
            raise RuntimeError(
                f"{self.place}: expected offset {self.next}, got a partition that ends at {end}: the topic was made "
                "anew or its broker lost records; start a new job"
            )
        if self.next < first:
            self._lost.inc(first - self.next)
            logger.warning("%s: offsets %d to %d were deleted before they were read", self.place, self.next, first - 1)
        self._assign(max(self.next, first))

    def offsets(self) -> tuple[int, int]:
        """The first offset and the one after the last, as the broker says now.

        Raises:
            ConnectionError: It does not in time.
        """
        from confluent_kafka import KafkaException

        start = time.monotonic()
        while True:
            try:
                return self._ask()
            except KafkaException as error:
                if time.monotonic() - start > self._timeout_secs or not _is_passing(error.args[0]):
                    raise ConnectionError(self._no_answer(error)) from error
            time.sleep(_POLL_SECS)

    def _ask(self) -> tuple[int, int]:
        first, end = self._consumer.get_watermark_offsets(self._at(), timeout=min(self._timeout_secs, 10))
        self._silent_since = None
        return first, end

    def ended_at(self) -> float | None:
        """The time, in seconds of the epoch, when the broker was asked and had nothing more; else None.

        Silence is not the end, for the broker may be gone.

        Raises:
            ConnectionError: It has not answered for too long.
        """
        from confluent_kafka import KafkaException

        if time.monotonic() - self._checked < _CHECK_SECS:
            return None
        asked = time.time()
        try:
            _, end = self._ask()
        except KafkaException as error:
            if self._silent_since is None:
                self._silent_since = time.monotonic()
            if time.monotonic() - self._silent_since > self._timeout_secs:
                raise ConnectionError(self._no_answer(error)) from error
            return None
        finally:
            self._checked = time.monotonic()
        return asked if self.next >= end else None

    def _no_answer(self, error: Exception) -> str:
        return f"{self.place}: expected its offsets within {self._timeout_secs:g} s, got {error}"

    def start_offset(self, start: str | Timestamp) -> int:
        """Where a start is in this partition.

        Raises:
            ConnectionError: The brokers do not say.
        """
        from confluent_kafka import KafkaException

        first, end = self.offsets()
        if start == "latest":
            return end
        if start == "earliest":
            return first
        try:
            if isinstance(start, Timestamp):
                asked = [self._at(start.micros // 1000)]
                [found] = self._consumer.offsets_for_times(asked, timeout=self._timeout_secs)
                return found.offset if found.offset >= 0 else end
            [found] = self._consumer.committed([self._at()], timeout=self._timeout_secs)
        except KafkaException as error:
            raise ConnectionError(self._no_answer(error)) from error
        return found.offset if found.offset >= 0 else first  # one that is gone is told when it is read

    def commit(self, offset: int) -> None:
        """Tells the group how far it is."""
        self._consumer.commit(offsets=[self._at(offset)], asynchronous=False)

    def close(self) -> None:
        """Leaves the brokers."""
        self._consumer.close()


def _is_passing(error: KafkaError) -> bool:
    """Whether librdkafka goes on trying."""
    from confluent_kafka import KafkaError

    return error.retriable() or error.code() in (
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._UNKNOWN_PARTITION,  # also of one whose leader is not known now
        KafkaError._RESOLVE,
    )


class _Parking:
    """Consumers between two Beam bundles, so that the next one finds them connected and with records fetched.

    A consumer that is taken is no one else's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parked: dict[Any, tuple[float, _Partition]] = {}

    def take(self, cluster: _Cluster, topic: str, number: int, use: str) -> _Partition:
        """One that was given back, or a new one."""
        with self._lock:
            _, found = self._parked.pop((cluster, topic, number, use), (0.0, None))
        return found or _Partition(cluster, topic, number)

    def give_back(self, partition: _Partition, cluster: _Cluster, topic: str, number: int, use: str) -> None:
        """Parks it, and closes those that no one has asked for lately."""
        now = time.monotonic()
        key = cluster, topic, number, use
        with self._lock:
            old = [other for other, (since, _) in self._parked.items() if now - since > _PARK_SECS or other == key]
            closing = [self._parked.pop(other)[1] for other in old]
            self._parked[key] = now, partition
        for other in closing:
            other.close()

    def close(self, cluster: _Cluster) -> None:
        """Closes all of a cluster."""
        with self._lock:
            closing = [self._parked.pop(key)[1] for key in list(self._parked) if key[0] == cluster]
        for partition in closing:
            partition.close()


_parking = _Parking()


# ---- reading -----------------------------------------------------------------------------------


class _ReadTo(beam.DoFn, Offsets):
    """A partition in, its records out, up to the end that it has at launch."""

    def __init__(self, source: ReadKafka) -> None:
        self._source = source
        self._cluster = source._cluster()
        self._num_records = Metrics.counter(NAMESPACE, "kafka_records_read")
        self._bad_timestamps = Metrics.counter(NAMESPACE, "kafka_bad_timestamps")
        self._told_of_timestamps = False
        self._told: set[str] = set()
        self._tell_at = 0.0

    def initial_restriction(self, element: _Element) -> OffsetRange:
        topic, number, num_known = element
        partition = _Partition(self._cluster, topic, number)
        try:
            # What a partition received before it was found came after the start.
            start = partition.start_offset("earliest" if number >= num_known else self._source._start)
            stop = FOREVER if self._source.until is None else partition.offsets()[1]
        finally:
            partition.close()
        return OffsetRange(start, max(start, stop))

    def process(
        self,
        element: _Element,
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[TimestampedValue]:
        yield from self._read(element, tracker, watermark)

    def _read(
        self, element: _Element, tracker: Any, watermark: Any, finalizer: Any = None
    ) -> Iterator[TimestampedValue]:
        topic, number, num_known = element
        place = self._cluster, topic, number, "read"
        partition = _parking.take(*place)
        is_whole = False
        try:
            start = tracker.current_restriction().start
            partition.seek(start)
            yield from self._records(partition, tracker, watermark)
            if finalizer is not None and partition.claimed > start:
                finalizer.register(partial(_commit, self._cluster, topic, number, partition.claimed))
            is_whole = True
            if number == 0 and self._source.until is None:
                self._tell_of_others(topic, num_known)
        finally:
            if is_whole:
                _parking.give_back(partition, *place)
            else:
                partition.close()

    def _tell_of_others(self, topic: str, num_known: int) -> None:
        """Says once if the topic has partitions that no one reads."""
        if self._source.discover_secs is not None or topic in self._told or time.monotonic() < self._tell_at:
            return
        self._tell_at = time.monotonic() + _TELL_SECS
        num_partitions = _num_partitions(self._cluster, topic)
        if num_partitions > num_known:
            self._told.add(topic)
            Metrics.counter(NAMESPACE, "kafka_partitions_unread").inc(num_partitions - num_known)
            logger.warning(
                "%s/%s: %d partitions were added and are not read; start the job again or set discover_secs",
                self._cluster.servers,
                topic,
                num_partitions - num_known,
            )

    def _records(self, partition: _Partition, tracker: Any, watermark: Any) -> Iterator[TimestampedValue]:
        stop = tracker.current_restriction().stop
        is_endless = stop == FOREVER
        deadline = time.monotonic() + _BUNDLE_SECS
        room = _BUNDLE_RECORDS
        while partition.next < stop:
            records = partition.read(min(_BLOCK_RECORDS, room) if is_endless else _BLOCK_RECORDS)
            records = [record for record in records if record.offset() < stop]
            # One claim for all: only the reader's own place divides the restriction.
            if records and not tracker.try_claim(records[-1].offset()):
                partition.claimed = -1  # it has gone too far
                return
            latest = None
            for record in records:
                timestamp = _timestamp(record)
                if timestamp is None:
                    timestamp = Timestamp.now()
                    self._tell_of_bad_timestamp(partition, record)
                else:
                    latest = timestamp if latest is None else max(latest, timestamp)
                yield TimestampedValue(self._element(record, timestamp), timestamp)
            if records:
                partition.claimed = records[-1].offset() + 1
                room -= len(records)
                self._num_records.inc(len(records))
            else:
                ended_at = partition.ended_at()
                if ended_at is not None and not is_endless and partition.next < stop:
                    raise RuntimeError(f"{partition.place}: expected records up to {stop}, got an end before")
                latest = None if ended_at is None else Timestamp(ended_at)
            if latest is not None:
                advance(watermark, latest - Duration(self._source.max_delay_secs))
            if is_endless and not (records and room > 0 and time.monotonic() < deadline):
                tracker.defer_remainder(Duration() if records else Duration(_IDLE_SECS))
                return
        tracker.try_claim(stop)  # offsets at the end that hold no record

    def _tell_of_bad_timestamp(self, partition: _Partition, record: Message) -> None:
        self._bad_timestamps.inc()
        if not self._told_of_timestamps:
            self._told_of_timestamps = True
            logger.warning(
                "%s: offset %d: expected a timestamp from 1970 to an hour from now, got %d ms; such records get the "
                "time of reading (told once, counted in kafka_bad_timestamps)",
                partition.place,
                record.offset(),
                record.timestamp()[1],
            )

    def _element(self, record: Message, timestamp: Timestamp) -> Record | KafkaRecord:
        if not self._source.with_metadata:
            return record.key(), record.value()
        where = record.topic(), record.partition(), record.offset()
        return KafkaRecord(*where, timestamp, record.key(), record.value(), record.headers() or [])

    def teardown(self) -> None:
        _parking.close(self._cluster)


class _ReadOn(_ReadTo):
    """The same without an end."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: _Element,
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[TimestampedValue]:
        yield from self._read(element, tracker, watermark)


class _ReadOnAndCommit(_ReadTo):
    """The same; when the runner has made a Beam bundle durable, the group is told how far it is."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: _Element,
        finalizer: Any = beam.DoFn.BundleFinalizerParam,  # before the others, or Beam passes one of them twice
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[TimestampedValue]:
        yield from self._read(element, tracker, watermark, finalizer)


def _timestamp(record: Message) -> Timestamp | None:
    """A record's time; None if that cannot be, such as nanoseconds in the place of milliseconds."""
    kind, millis = record.timestamp()
    if not kind:
        return Timestamp.now()  # before Kafka 0.10 there was none
    return Timestamp(micros=1000 * millis) if 0 <= millis <= 1000 * (time.time() + _MAX_AHEAD_SECS) else None


def _commit(cluster: _Cluster, topic: str, number: int, offset: int) -> None:
    place = cluster, topic, number, "commit"  # not the reader's, which may be reading
    partition = _parking.take(*place)
    partition.commit(offset)
    _parking.give_back(partition, *place)


# ---- partitions --------------------------------------------------------------------------------


def _num_partitions(cluster: _Cluster, topic: str) -> int:
    """How many partitions a topic has now.

    Raises:
        ValueError: There is no such topic.
        ConnectionError: No broker says so in time.
    """
    from confluent_kafka import KafkaException

    consumer = cluster.consumer()
    try:
        found = consumer.list_topics(topic, timeout=cluster.timeout_secs).topics[topic]
    except KafkaException as error:
        raise ConnectionError(f"{cluster.servers}: expected a list of partitions, got {error}") from error
    finally:
        consumer.close()
    if found.error is not None or not found.partitions:
        raise ValueError(f"{cluster.servers}/{topic}: expected a topic, got {found.error or 'one without partitions'}")
    return len(found.partitions)


class _ListPartitions(beam.DoFn):
    """A topic in, its partitions out."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster

    def process(self, topic: str) -> Iterator[_Element]:
        num_partitions = _num_partitions(self._cluster, topic)
        for number in range(num_partitions):
            yield topic, number, num_partitions


class _WatchPartitions(beam.DoFn, Offsets):
    """The same, and later those that are added; the restriction is of their numbers."""

    def __init__(self, cluster: _Cluster, interval_secs: float) -> None:
        self._cluster = cluster
        self._interval_secs = interval_secs

    def initial_restriction(self, topic: str) -> OffsetRange:
        return OffsetRange(0, FOREVER)

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        topic: str,
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[Any]:
        asked = Timestamp.now()
        num_known = tracker.current_restriction().start
        num_partitions = _num_partitions(self._cluster, topic)
        for number in range(num_known, num_partitions):
            if not tracker.try_claim(number):
                return
            if num_known:  # its records came after the last question
                logger.info("%s/%s: partition %d was added", self._cluster.servers, topic, number)
                yield TimestampedValue((topic, number, num_known), watermark.current_watermark() or asked)
            else:
                yield topic, number, num_partitions
        advance(watermark, asked)
        tracker.defer_remainder(Duration(self._interval_secs))


# ---- the transforms ----------------------------------------------------------------------------


@dataclass
class ReadKafka(beam.PTransform):
    """The records of topics as `(key, value)`, with Kafka's timestamps as event time.

    Key and value are bytes or None, as Beam's own `ReadFromKafka` gives them; a tombstone is a record whose value
    is None. Records of a partition come in order and each at least once. The watermark of a partition is
    `max_delay_secs` behind the latest timestamp that it had; where the broker says that there is no further record,
    it is `max_delay_secs` behind the clock, so that an idle partition does not hold up the others.

    A broker that does not answer is asked again for `timeout_secs`, then the step fails and the runner tries again.
    Offsets that were deleted before they were read are counted (`kafka_offsets_lost`) and told, and reading goes on at
    the first that is left. A record whose timestamp is before 1970 or more than an hour ahead of the clock gets the
    time of reading instead, moves no watermark, and is counted (`kafka_bad_timestamps`). Partitions that are added
    later are read after a restart, or with `discover_secs`.

    Args:
        bootstrap_servers: "HOST:PORT", several separated by commas.
        topics: A topic, or several.
        group_id: The consumer group that is told how far the job is, when the runner has made that durable. Its
            partitions are not shared with other members. Nothing is told by a read that has an end. Without a group,
            brokers see one that is named beam-vae, which their access rules may have to allow.
        start: Where to begin: "earliest"; "latest"; "committed", where the group is, or else "earliest"; or a time,
            for the first record of each partition that is not older. A `datetime` without a zone is UTC.
        until: "now" for a bounded read, up to the end that each partition has when the job starts; None for ever.
        consumer_config: librdkafka's settings, such as `security.protocol`.
        config_file: A file with more of them, `name=value` in each line, which workers read. It keeps passwords out
            of the job's graph and its command line.
        with_metadata: Gives `KafkaRecord` instead.
        max_delay_secs: How much earlier than the latest one a record may be and still be on time.
        discover_secs: How often to look for new partitions. It needs a runner that runs steps side by side, which
            Beam's local ones do not.
        timeout_secs: How long brokers may be out of reach.
        expansion_service: Of Java transforms, as "HOST:PORT", or "default" for the one that Beam downloads: reads by
            Beam's own `ReadFromKafka` instead of this one. A group that has committed offsets then goes on there.

    Raises:
        ValueError: An argument is wrong, or arguments do not go together.
    """

    bootstrap_servers: str
    topics: str | Sequence[str]
    group_id: str | None = None
    start: str | datetime.datetime | Timestamp = "earliest"
    until: str | None = None
    consumer_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config_file: str | None = None
    with_metadata: bool = False
    max_delay_secs: float = 5.0
    discover_secs: float | None = None
    timeout_secs: float = 60.0
    expansion_service: str | None = None

    def __post_init__(self) -> None:
        self._topics = [self.topics] if isinstance(self.topics, str) else list(self.topics)
        if not self._topics or not all(self._topics):
            raise ValueError(f"topics: expected at least one name, got {self.topics!r}")
        self._start = _start_of(self.start)
        if self._start == "committed" and self.group_id is None:
            raise ValueError("group_id: expected one with start='committed', got none")
        if self.until not in (None, "now"):
            raise ValueError(f"until: expected 'now' or None, got {self.until!r}")
        if self.until and self.discover_secs is not None:
            raise ValueError("discover_secs: expected none with until='now', which reads what there is at launch")
        _refuse_settings("consumer_config", self.consumer_config, _READ_SETTINGS)
        unable = [name for name in ("until", "config_file", "with_metadata") if getattr(self, name)]
        if self.expansion_service and unable:
            raise ValueError(f"expansion_service: expected none with {unable[0]}, which Beam's ReadFromKafka lacks")

    def _cluster(self) -> _Cluster:
        config = tuple(sorted(self.consumer_config.items()))
        return _Cluster(self.bootstrap_servers, config, self.config_file, self.timeout_secs, self.group_id)

    def expand(self, pbegin: beam.pvalue.PBegin) -> beam.PCollection:
        if self.expansion_service:
            return pbegin | "ReadFromKafka" >> self._java()
        _need_client()
        cluster = self._cluster()
        if self.discover_secs is None:
            list_partitions: beam.DoFn = _ListPartitions(cluster)
        else:
            list_partitions = _WatchPartitions(cluster, self.discover_secs)
        read = _ReadTo if self.until else _ReadOn if self.group_id is None else _ReadOnAndCommit
        return (
            pbegin
            | "Topics" >> beam.Create(self._topics)
            | "ListPartitions" >> beam.ParDo(list_partitions)
            | "ReadPartitions"
            >> beam.ParDo(read(self)).with_output_types(KafkaRecord if self.with_metadata else Record)
        )

    def _java(self) -> beam.PTransform:
        from apache_beam.io.kafka import ReadFromKafka

        reset = self._start if self._start == "latest" else "earliest"
        group = {} if self.group_id is None else {"group.id": self.group_id}
        config = {"bootstrap.servers": self.bootstrap_servers, "auto.offset.reset": reset, **group}
        return ReadFromKafka(
            {**config, **{name: str(value) for name, value in self.consumer_config.items()}},
            self._topics,
            start_read_time=self._start.micros // 1000 if isinstance(self._start, Timestamp) else None,
            commit_offset_in_finalize=self.group_id is not None,
            timestamp_policy=ReadFromKafka.create_time_policy,
            dynamic_read_poll_interval_seconds=None if self.discover_secs is None else round(self.discover_secs),
            expansion_service=_service(self.expansion_service),
        )


_READ_SETTINGS = ("bootstrap.servers", "group.id", "enable.auto.commit", "auto.offset.reset", "enable.partition.eof")
_WRITE_SETTINGS = ("bootstrap.servers",)


def _refuse_settings(name: str, config: Mapping[str, Any], ours: Sequence[str]) -> None:
    wrong = [setting for setting in ours if setting in config]
    if wrong:
        raise ValueError(f"{name}: expected none of what the transform sets itself, got {wrong[0]}")


def _need_client() -> None:
    if find_spec("confluent_kafka") is None:
        raise ImportError("kafka: expected confluent-kafka, got none; pip install beam-vae[kafka]")


def _service(name: str | None) -> str | None:
    return None if name == "default" else name


def _start_of(start: str | datetime.datetime | Timestamp) -> str | Timestamp:
    if isinstance(start, str) and start not in _STARTS:
        try:
            start = datetime.datetime.fromisoformat(start)
        except ValueError as error:
            raise ValueError(f"start: expected {', '.join(_STARTS)} or a time (ISO 8601), got {start!r}") from error
    if isinstance(start, datetime.datetime):
        return Timestamp.from_utc_datetime(
            start.replace(tzinfo=datetime.UTC) if start.tzinfo is None else start.astimezone(datetime.UTC)
        )
    return start


@dataclass
class WriteKafka(beam.PTransform):
    """Writes `(key, value)`, each bytes or None, to a topic; the event time becomes the record's timestamp.

    A Beam bundle ends when the brokers have all of its records, or with an error, after which the runner tries it
    again: each record is written at least once. The producer is idempotent, so that its own retries neither
    double nor reorder records. The same key goes to the same partition as from Java's producer.

    Args:
        bootstrap_servers: "HOST:PORT", several separated by commas.
        topic: Where to.
        producer_config: librdkafka's settings, such as `compression.type`.
        config_file: See `ReadKafka`.
        timeout_secs: How long a record may wait for the brokers.
        expansion_service: See `ReadKafka`; writes by Beam's own `WriteToKafka`.

    Raises:
        ValueError: An argument is wrong.
    """

    bootstrap_servers: str
    topic: str
    producer_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config_file: str | None = None
    timeout_secs: float = 120.0
    expansion_service: str | None = None

    def __post_init__(self) -> None:
        if not self.topic:
            raise ValueError("topic: expected a name, got none")
        _refuse_settings("producer_config", self.producer_config, _WRITE_SETTINGS)
        if self.expansion_service and self.config_file:
            raise ValueError("expansion_service: expected none with config_file, which Beam's WriteToKafka lacks")

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[None]:
        if self.expansion_service:
            return records | "WriteToKafka" >> self._java()
        _need_client()
        settings = tuple(sorted(self.producer_config.items()))
        cluster = _Cluster(self.bootstrap_servers, settings, self.config_file, self.timeout_secs)
        return records | "Write" >> beam.ParDo(_Write(cluster, self.topic)).with_output_types(type(None))

    def _java(self) -> beam.PTransform:
        from apache_beam.io.kafka import WriteToKafka

        config = {name: str(value) for name, value in self.producer_config.items()}
        return WriteToKafka(
            {**config, "bootstrap.servers": self.bootstrap_servers},
            self.topic,
            expansion_service=_service(self.expansion_service),
        )


class _Write(beam.DoFn):
    def __init__(self, cluster: _Cluster, topic: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._num_records = Metrics.counter(NAMESPACE, "kafka_records_written")

    def setup(self) -> None:
        self._producer = self._cluster.producer()

    def start_bundle(self) -> None:
        self._num_sent = 0
        self._errors: list[KafkaError] = []

    def process(self, record: Record, timestamp: Any = beam.DoFn.TimestampParam) -> None:
        key, value = record
        for part, name in ((key, "key"), (value, "value")):
            if not (part is None or isinstance(part, bytes)):
                raise TypeError(f"{self._topic}: expected a {name} of bytes or None, got {type(part).__name__}")
        # Elements without times are at the beginning or the end of the global window: the producer's clock then.
        millis = timestamp.micros // 1000 if Timestamp(0) <= timestamp < _END_OF_TIME else 0
        self._num_sent += 1
        self._produce(value, key, millis)
        if self._errors:
            self._fail()

    def _produce(self, value: bytes | None, key: bytes | None, millis: int) -> None:
        from confluent_kafka import KafkaException

        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._delivered, timestamp=millis)
                break
            except BufferError:  # its queue is full; records leave it within timeout_secs, delivered or not
                self._producer.poll(_POLL_SECS)
            except KafkaException as error:
                self._errors.append(error.args[0])
                break
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._errors.append(error)

    def finish_bundle(self) -> None:
        self._producer.flush()
        if self._errors:
            self._fail()
        self._num_records.inc(self._num_sent)

    def _fail(self) -> None:
        raise RuntimeError(
            f"{self._cluster.servers}/{self._topic}: {len(self._errors)} of {self._num_sent} records were not "
            f"written: {self._errors[0]}"
        )

    def teardown(self) -> None:
        # What a failed bundle left waiting: the runner will send it again.
        self._producer.purge()


# ---- by URI ------------------------------------------------------------------------------------


def read_from(uri: str, **arguments: Any) -> ReadKafka:
    """The read that `kafka:HOST:PORT[,HOST:PORT]/TOPIC[,TOPIC]?name=value&...` names.

    Names are the arguments of `ReadKafka`; those with a dot go to `consumer_config`.

    Args:
        uri: Of the topics.
        arguments: More of them, which a parameter of the URI overrides.

    Raises:
        ValueError: A part of the URI is wrong.
    """
    parameters: dict[str, Callable[[str], Any]] = {
        "group_id": str,
        "start": _start_of,
        "until": str,
        "config_file": str,
        "with_metadata": truth,
        "max_delay_secs": seconds,
        "discover_secs": positive,
        "timeout_secs": positive,
        "expansion_service": str,
    }
    place, values, settings = parse_uri(uri, "kafka", parameters)
    servers, topics = _split_place(place)
    return ReadKafka(servers, topics.split(","), **{**arguments, **values}, consumer_config=settings)


def write_to(uri: str, **arguments: Any) -> WriteKafka:
    """The write that `kafka:HOST:PORT[,HOST:PORT]/TOPIC?name=value&...` names.

    Names are the arguments of `WriteKafka`; those with a dot go to `producer_config`.

    Args:
        uri: Of the topic.
        arguments: More of them, which a parameter of the URI overrides.

    Raises:
        ValueError: A part of the URI is wrong.
    """
    parameters: dict[str, Callable[[str], Any]] = {
        "config_file": str,
        "timeout_secs": positive,
        "expansion_service": str,
    }
    place, values, settings = parse_uri(uri, "kafka", parameters)
    servers, topic = _split_place(place)
    if "," in topic:
        raise ValueError(f"kafka:{place}: expected one topic, got {topic}")
    return WriteKafka(servers, topic, **{**arguments, **values}, producer_config=settings)


def _split_place(place: str) -> tuple[str, str]:
    servers, _, topics = place.partition("/")
    for server in servers.split(","):
        host, _, port = server.rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(f"kafka:{place}: expected brokers as HOST:PORT, got {server!r}")
    for topic in topics.split(","):
        if not _TOPIC.fullmatch(topic):
            raise ValueError(f"kafka:{place}: expected a topic after the brokers and a slash, got {topic!r}")
    return servers, topics


_TOPIC = re.compile(r"[\w.-]{1,249}", re.ASCII)
