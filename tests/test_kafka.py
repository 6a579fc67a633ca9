"""Against brokers that speak Kafka's protocol: the ones that librdkafka has in itself for tests."""

import gc
import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime

import apache_beam as beam
import pytest
from apache_beam.io.restriction_trackers import OffsetRange
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.runners.sdf_utils import RestrictionTrackerView, ThreadsafeRestrictionTracker
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import Timestamp
from waiting import until

from pipeline import ScoreRecords
from pipeline import kafka as module
from pipeline.kafka import KafkaRecord, ReadKafka, WriteKafka, read_from, write_to
from pipeline.offsets import FOREVER

client = pytest.importorskip("confluent_kafka", reason="needs the kafka extra")

MILLIS = 1_700_000_000_000
NUM_PARTITIONS = 4  # of a topic that these brokers make


class Brokers:
    """A cluster of one broker, which lives as long as the producer that it is in."""

    def __init__(self):
        self._home = client.Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored"})
        [broker] = self._home.list_topics(timeout=10).brokers.values()
        self.servers = f"{broker.host}:{broker.port}"
        self._producer = client.Producer({"bootstrap.servers": self.servers, "enable.idempotence": True})

    def send(self, topic, records, wait_each=False):
        """`records` of (partition, millis, key, value)."""
        for partition, millis, key, value in records:
            self._producer.produce(topic, value, key, partition=partition, timestamp=millis)
            if wait_each:
                self._producer.flush()
        assert self._producer.flush(10) == 0

    def make(self, topic):
        """These brokers make a topic when a producer asks for it."""
        assert len(self._home.list_topics(topic, timeout=10).topics[topic].partitions) == NUM_PARTITIONS

    def receive(self, topic, count, group="check", secs=60):
        """`count` records of a topic or a few more, of all partitions."""
        consumer = client.Consumer({"bootstrap.servers": self.servers, "group.id": group, "enable.auto.commit": False})
        consumer.assign([client.TopicPartition(topic, number, 0) for number in range(NUM_PARTITIONS)])
        deadline, records = time.monotonic() + secs, []
        while len(records) < count and time.monotonic() < deadline:
            records += [record for record in consumer.consume(count, 0.1) if record.error() is None]
        consumer.close()
        assert len(records) >= count
        return records

    def commit(self, topic, group, offset):
        """Of partition 0."""
        consumer = client.Consumer({"bootstrap.servers": self.servers, "group.id": group})
        consumer.commit(offsets=[client.TopicPartition(topic, 0, offset)], asynchronous=False)
        consumer.close()

    def committed(self, topic, group):
        consumer = client.Consumer({"bootstrap.servers": self.servers, "group.id": group})
        found = consumer.committed([client.TopicPartition(topic, n) for n in range(NUM_PARTITIONS)], timeout=10)
        consumer.close()
        return [item.offset for item in found]

    def close(self):
        del self._home
        gc.collect()


@pytest.fixture(scope="module")
def brokers():
    brokers = Brokers()
    yield brokers
    brokers.close()


def numbered(count, num_partitions=1, start=0):
    """Records whose values are numbers, a millisecond apart."""
    return [(i % num_partitions, MILLIS + i, b"key-%d" % i, b"%d" % i) for i in range(start, start + count)]


class Leg:
    """One call of a reading step's `process`, as a runner makes it."""

    def __init__(self, step, restriction, watermark=None, element=("t", 0, NUM_PARTITIONS)):
        self.watermark = ManualWatermarkEstimator(watermark)
        self.tracker = ThreadsafeRestrictionTracker(step.create_tracker(restriction))
        self.output = step.process(element, RestrictionTrackerView(self.tracker), self.watermark)

    def run(self):
        """All outputs; the runner checks that nothing was left out."""
        outputs = list(self.output)
        self.tracker.check_done()
        return outputs

    @property
    def rest(self):
        """What the step put off, and for how long."""
        return self.tracker.deferred_status()


def read_on(step, start, count, element, watermark=None):
    """The first `count` outputs from an offset on, by as many calls as it takes, and the last call."""
    restriction, outputs, deadline = OffsetRange(start, FOREVER), [], time.monotonic() + 20
    while True:
        leg = Leg(step, restriction, watermark, element)
        outputs += leg.run()
        restriction, _ = leg.rest
        watermark = leg.watermark.current_watermark()
        if len(outputs) >= count:
            return outputs, leg
        assert time.monotonic() < deadline, f"{len(outputs)} of {count} outputs came"


@pytest.fixture
def step(brokers):
    """`step(topic, **arguments)`: the DoFn that reads, closed at the end."""
    steps = []

    def make(servers=brokers.servers, **arguments):
        steps.append(module._ReadTo(ReadKafka(servers, "t", **arguments)))
        return steps[-1]

    yield make
    for made in steps:
        made.teardown()


def values(outputs):
    return [int(output.value[1]) for output in outputs]


def counters(result, name):
    found = result.metrics().query(MetricsFilter().with_name(name))["counters"]
    return sum(counter.committed for counter in found)


# ---- a bounded read ----------------------------------------------------------------------------


def test_every_record_of_every_partition_is_read_once_with_its_timestamp(brokers):
    brokers.send("all", numbered(5000, 3))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, "all", until="now")
        stamped = read | beam.Map(lambda record, at=beam.DoFn.TimestampParam: (*record, at.micros))
        assert_that(stamped, equal_to([(b"key-%d" % i, b"%d" % i, 1000 * (MILLIS + i)) for i in range(5000)]))
    assert counters(pipeline.result, "kafka_records_read") == 5000


def test_absent_keys_tombstones_and_empty_bytes_are_told_apart_also_between_stages(brokers):
    sent = [(None, b"no key"), (b"deleted", None), (b"", b""), (None, None)]
    brokers.send("nulls", [(0, MILLIS, key, value) for key, value in sent])
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, "nulls", until="now")
        assert_that(read | beam.Reshuffle(), equal_to(sent))


def test_metadata_says_where_a_record_was(brokers):
    consumer_headers = [("trace", b"\x01"), ("trace", None)]
    brokers._producer.produce("meta", b"v", b"k", partition=2, timestamp=MILLIS, headers=consumer_headers)
    assert brokers._producer.flush(10) == 0
    expected = KafkaRecord("meta", 2, 0, Timestamp(micros=1000 * MILLIS), b"k", b"v", consumer_headers)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, ["meta"], until="now", with_metadata=True)
        assert_that(read | beam.Reshuffle(), equal_to([expected]))


def test_a_bounded_read_has_the_end_of_its_launch(brokers, step):
    brokers.send("t", numbered(10))
    read = step(until="now")
    element = ("t", 0, NUM_PARTITIONS)
    restriction = read.initial_restriction(element)
    brokers.send("t", numbered(10, start=10))
    assert values(Leg(read, restriction).run()) == list(range(10))
    assert read.restriction_size(element, restriction) == 10


def test_starts(brokers, step):
    element = ("starts", 0, NUM_PARTITIONS)
    brokers.send("starts", numbered(10))
    brokers.commit("starts", "starts", 7)

    def start(element=element, **arguments):
        restriction = step(**arguments).initial_restriction(element)
        assert restriction.stop == FOREVER
        return restriction.start

    assert start() == 0
    assert start(start="latest") == 10
    assert start(start="committed", group_id="starts") == 7
    assert start(start="committed", group_id="another") == 0
    # A partition that was added while the job ran: what it already has came after the start.
    assert start(("starts", 0, 0), start="latest") == 0


def test_an_unknown_topic_is_an_error(brokers):
    with pytest.raises(ValueError, match=r"/not-there: expected a topic, got .*[Uu]nknown topic"):
        list(module._ListPartitions(ReadKafka(brokers.servers, "not-there")._cluster()).process("not-there"))


# ---- splits and turns --------------------------------------------------------------------------


def test_reading_goes_on_where_a_runner_split_it(brokers, step):
    brokers.send("split", numbered(2500))
    element = ("split", 0, NUM_PARTITIONS)
    first = step()
    leg = Leg(first, first.initial_restriction(element), element=element)
    outputs = [next(leg.output) for _ in range(700)]
    primary, residual = leg.tracker.try_split(0)
    outputs += leg.run()
    assert (primary.stop, len(outputs)) == (residual.start, residual.start)
    assert 700 <= len(outputs) < 2500
    other = step(until="now")  # on another worker, later
    outputs += Leg(other, OffsetRange(residual.start, 2500), element=element).run()
    assert values(outputs) == list(range(2500))


def test_a_partition_is_not_shared_by_two_readers(step):
    leg = Leg(step(), OffsetRange(0, 1000))
    assert leg.tracker.try_split(0.5) is None
    assert Leg(step(), OffsetRange(0, FOREVER)).tracker.try_split(0.5) is None


def test_a_busy_partition_makes_way_for_others_and_keeps_its_consumer(brokers, step, monkeypatch):
    monkeypatch.setattr(module, "_BUNDLE_RECORDS", 300)
    seeks = []
    assign = module._Partition._assign
    monkeypatch.setattr(module._Partition, "_assign", lambda self, at: (seeks.append(at), assign(self, at)))
    brokers.send("busy", numbered(1000))
    element = ("busy", 0, NUM_PARTITIONS)
    read = step()
    restriction, sizes, outputs = read.initial_restriction(element), [], []
    deadline = time.monotonic() + 10
    while len(outputs) < 1000 and time.monotonic() < deadline:
        leg = Leg(read, restriction, element=element)
        new = leg.run()
        restriction, _ = leg.rest
        sizes.append(len(new))
        outputs += new
        assert restriction == OffsetRange(len(outputs), FOREVER)
    assert values(outputs) == list(range(1000))
    assert max(sizes) <= 300
    assert seeks == [0]


def test_added_partitions_are_found_and_known_ones_are_not_named_again(brokers):
    brokers.send("grows", numbered(1))
    watch = module._WatchPartitions(ReadKafka(brokers.servers, "grows", discover_secs=30)._cluster(), 30)
    leg = Leg(watch, watch.initial_restriction("grows"), element="grows")
    assert leg.run() == [("grows", number, NUM_PARTITIONS) for number in range(NUM_PARTITIONS)]
    rest, delay = leg.rest
    assert rest.start == NUM_PARTITIONS
    assert 25 < delay.micros / 1e6 <= 30
    # As if two of them had been added since.
    since = Timestamp(1_700_000_000)
    leg = Leg(watch, OffsetRange(2, FOREVER), since, element="grows")
    assert [(new.value, new.timestamp) for new in leg.run()] == [(("grows", number, 2), since) for number in (2, 3)]
    assert leg.watermark.current_watermark() > since


def test_partitions_that_no_one_reads_are_told_once(brokers, step, caplog):
    brokers.send("grown", numbered(1))
    read = step()
    for _ in range(2):
        Leg(read, OffsetRange(1, FOREVER), element=("grown", 0, 3)).run()
        read._tell_at = 0
    [line] = [record.getMessage() for record in caplog.records if "were added" in record.getMessage()]
    assert "/grown: 1 partitions were added and are not read" in line


# ---- event time --------------------------------------------------------------------------------


def test_the_watermark_follows_the_latest_timestamp_and_never_goes_back(brokers, step):
    times = [MILLIS + 60_000, MILLIS, MILLIS + 30_000]
    brokers.send("order", [(0, millis, None, b"1") for millis in times])
    read = step(max_delay_secs=10)
    element = ("order", 0, NUM_PARTITIONS)
    outputs, leg = read_on(read, 0, 3, element)
    assert [output.timestamp.micros // 1000 for output in outputs] == times
    assert leg.watermark.current_watermark() == Timestamp(micros=1000 * (MILLIS + 50_000))
    earlier = Timestamp(micros=1000 * (MILLIS + 55_000))
    outputs, leg = read_on(read, 1, 2, element, earlier)
    assert len(outputs) == 2
    assert leg.watermark.current_watermark() == earlier


def test_an_idle_partition_follows_the_clock_once_the_broker_says_that_it_is_at_its_end(brokers, step, monkeypatch):
    monkeypatch.setattr(module, "_CHECK_SECS", 0)
    brokers.send("idle", numbered(3))
    read = step(max_delay_secs=2)
    before = time.time()
    leg = Leg(read, OffsetRange(3, FOREVER), element=("idle", 0, NUM_PARTITIONS))
    assert leg.run() == []
    assert before - 2 <= float(leg.watermark.current_watermark()) <= time.time() - 2
    rest, delay = leg.rest
    assert rest.start == 3
    assert delay.micros > 0


def test_without_an_answer_time_stands_still_and_then_reading_fails(step, monkeypatch):
    monkeypatch.setattr(module, "_CHECK_SECS", 0)
    brokers = Brokers()
    brokers.send("t", numbered(3))
    read = step(servers=brokers.servers, timeout_secs=2)
    element = ("t", 0, NUM_PARTITIONS)
    outputs, leg = read_on(read, 0, 3, element)
    assert values(outputs) == [0, 1, 2]
    brokers.close()
    seen, error, deadline = leg.watermark.current_watermark(), None, time.monotonic() + 20
    while error is None and time.monotonic() < deadline:
        leg = Leg(read, leg.rest[0], seen, element)
        try:
            assert leg.run() == []
        except ConnectionError as caught:
            error = caught
        assert leg.watermark.current_watermark() == seen
    assert "/t[0]: expected its offsets within 2 s, got " in str(error)


def test_times_that_cannot_be_cost_neither_the_partition_nor_its_watermark(brokers, step, caplog):
    now = round(1000 * time.time())
    times = [MILLIS, MILLIS * 10**6, now + 86_400_000, now + 60_000, MILLIS + 1]
    brokers.send("strange", [(0, millis, None, b"%d" % i) for i, millis in enumerate(times[:3])])
    element = ("strange", 0, NUM_PARTITIONS)
    outputs, leg = read_on(step(max_delay_secs=0), 0, 3, element)
    assert leg.watermark.current_watermark() == Timestamp(micros=1000 * MILLIS)
    read = [output.timestamp.micros / 1e3 for output in outputs]
    assert read[0] == MILLIS
    assert all(now <= millis <= 1000 * time.time() for millis in read[1:])
    [line] = [record.getMessage() for record in caplog.records if "expected a timestamp" in record.getMessage()]
    assert f"/strange[0]: offset 1: expected a timestamp from 1970 to an hour from now, got {times[1]} ms" in line
    brokers.send("strange", [(0, millis, None, b"%d" % (3 + i)) for i, millis in enumerate(times[3:])])
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        got = pipeline | ReadKafka(brokers.servers, "strange", until="now") | beam.Reshuffle() | beam.Values()
        assert_that(got, equal_to([b"%d" % i for i in range(5)]))
    assert counters(pipeline.result, "kafka_bad_timestamps") == 2


# ---- offsets that are gone ---------------------------------------------------------------------


def test_offsets_deleted_before_they_were_read_are_told_and_counted(brokers, caplog):
    # These brokers keep 5 MiB of a partition.
    brokers.send("cut", [(0, MILLIS + i, None, b"%d" % i + b" " * 100_000) for i in range(100)], wait_each=True)
    brokers.commit("cut", "slow", 3)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, "cut", group_id="slow", start="committed", until="now")
        # The last ones, without a gap.
        numbers = read | beam.Map(lambda record: int(record[1])) | beam.combiners.ToList()
        assert_that(numbers | beam.Map(lambda found: sorted(found) == list(range(min(found), 100))), equal_to([True]))
    kept = counters(pipeline.result, "kafka_records_read")
    assert 0 < kept < 100 - 3
    assert counters(pipeline.result, "kafka_offsets_lost") == 100 - 3 - kept
    assert f"/cut[0]: offsets 3 to {99 - kept} were deleted before they were read" in caplog.text


def test_a_partition_that_ends_before_the_place_is_another_one(brokers, step):
    brokers.send("anew", numbered(5))
    read = step()
    with pytest.raises(RuntimeError, match=r"/anew\[0\]: expected offset 1000, got a partition that ends at 5"):
        read_on(read, 1000, 1, ("anew", 0, NUM_PARTITIONS))


# ---- an endless job ----------------------------------------------------------------------------

ENDLESS = """
import sys, apache_beam as beam
from pipeline.kafka import ReadKafka, WriteKafka
servers = sys.argv[1]
with beam.Pipeline(runner="FnApiRunner") as pipeline:
    records = pipeline | ReadKafka(servers, "live", group_id="job", timeout_secs=20)
    records | WriteKafka(servers, "copied")
"""


def test_an_end_may_have_no_records_while_newer_ones_come(brokers, step, monkeypatch):
    """As where a transaction's marks, or compaction, leave offsets without a record."""
    brokers.send("marks", numbered(12))
    monkeypatch.setattr(module, "_CHECK_SECS", 0)
    monkeypatch.setattr(module, "_BLOCK_RECORDS", 4)
    read_block = module._Partition.read
    monkeypatch.setattr(
        module._Partition, "read", lambda *args: [one for one in read_block(*args) if one.offset() not in (8, 9)]
    )
    leg = Leg(step(until="now"), OffsetRange(0, 10), element=("marks", 0, NUM_PARTITIONS))
    assert values(leg.run()) == list(range(8))


def test_an_endless_job_copies_as_records_come_and_nothing_is_lost_when_it_is_killed(brokers):
    brokers.send("live", numbered(500, NUM_PARTITIONS))
    brokers.make("copied")
    job = subprocess.Popen([sys.executable, "-c", ENDLESS, brokers.servers])
    try:
        brokers.receive("copied", 500)
        brokers.send("live", numbered(100, NUM_PARTITIONS, start=500))
        copied = brokers.receive("copied", 600)
        # The group is told when a Beam bundle is done.
        until(lambda: brokers.committed("live", "job") == [150] * NUM_PARTITIONS)
        brokers.send("live", numbered(20_000, NUM_PARTITIONS, start=600))
        brokers.receive("copied", 700)
        assert job.poll() is None
    finally:
        job.kill()
        job.wait()
    assert Counter(int(record.value()) for record in copied) == Counter(range(600))
    assert all(record.timestamp()[1] == MILLIS + int(record.value()) for record in copied)
    # Killed while it copied the later ones; the next job goes on where the group is.
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        rest = pipeline | ReadKafka(brokers.servers, "live", group_id="job", start="committed", until="now")
        _ = rest | WriteKafka(brokers.servers, "copied")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, "copied", until="now")
        numbers = read | beam.Map(lambda record: int(record[1])) | beam.Distinct() | beam.combiners.ToList()
        assert_that(numbers | beam.Map(sorted), equal_to([list(range(20_600))]))


# ---- writing -----------------------------------------------------------------------------------


def test_what_is_written_can_be_read(brokers):
    sent = [(b"a", b"1", 1.5), (b"a", b"2", 2.25), (None, b"3", 0), (b"b", None, 1e9)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        stamped = pipeline | beam.Create(sent) | beam.Map(lambda e: beam.window.TimestampedValue(e[:2], e[2]))
        _ = stamped | WriteKafka(brokers.servers, "written", {"compression.type": "lz4"})
    assert counters(pipeline.result, "kafka_records_written") == 4
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        read = pipeline | ReadKafka(brokers.servers, "written", until="now")
        stamped = read | beam.Map(lambda record, at=beam.DoFn.TimestampParam: (*record, float(at)))
        # For Kafka, no time is the beginning of 1970.
        assert_that(stamped | beam.Filter(lambda record: record[1] != b"3"), equal_to([sent[0], sent[1], sent[3]]))
        assert_that(read | beam.Values(), equal_to([b"1", b"2", b"3", None]), "All")


def test_elements_without_a_time_get_the_time_of_writing(brokers):
    before = time.time()
    # A runner that sets steps up anew for each Beam bundle.
    with beam.Pipeline(runner="BundleBasedDirectRunner") as pipeline:
        first = pipeline | beam.Create([(None, b"x")])
        last = first | beam.combiners.Count.Globally() | beam.Map(lambda count: (None, b"%d" % count))
        _ = (first, last) | beam.Flatten() | WriteKafka(brokers.servers, "untimed")
    records = brokers.receive("untimed", 2)
    assert {record.value() for record in records} == {b"x", b"1"}
    assert all(before - 1 <= record.timestamp()[1] / 1000 <= time.time() + 1 for record in records)


def write(servers, records, **arguments):
    """One Beam bundle through the writing step itself."""
    done = beam.Pipeline(runner="FnApiRunner")
    _ = done | beam.Create(records) | WriteKafka(servers, "bundle", **arguments)
    done.run()


def test_records_that_brokers_do_not_take_fail_the_bundle(brokers):
    with pytest.raises(RuntimeError, match=r"/bundle: 1 of 1 records were not written: .*too large"):
        write(brokers.servers, [(None, b"x" * 2000)], producer_config={"message.max.bytes": 1000})


def test_brokers_that_are_gone_fail_the_bundle():
    gone = Brokers()
    gone.close()
    with pytest.raises(RuntimeError, match=r"/bundle: \d of 2 records were not written: .*timed out"):
        write(gone.servers, [(None, b"x"), (None, b"y")], timeout_secs=1)


def test_anything_but_bytes_is_refused_without_being_shown(brokers):
    with pytest.raises(TypeError, match="bundle: expected a value of bytes or None, got str") as caught:
        write(brokers.servers, [(b"k", "secret")])
    assert "secret" not in str(caught.value)


def test_records_in_are_records_scored_and_dead_letters(brokers, first_uri, make_table):
    rows = make_table(300, 9).select(["length", "count", "color"]).to_pylist()
    texts = [json.dumps({"id": i, **row}).encode() for i, row in enumerate(rows)]
    for i in range(0, 300, 10):
        texts[i] = b'{"id": %d, "length": "long", "count": 1, "color": "red"}' % i
    brokers.send("events", [(i % 3, MILLIS + i, b"%d" % i, text) for i, text in enumerate(texts)])
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        events = pipeline | ReadKafka(brokers.servers, "events", until="now")
        scored, letters = events | beam.Values() | ScoreRecords(first_uri)
        keyed = scored | beam.Map(lambda text: (str(json.loads(text)["id"]).encode(), text))
        _ = keyed | WriteKafka(brokers.servers, "scored")
        payloads = letters | beam.FlatMap(lambda table: table["payload"].to_pylist())
        dead = payloads | beam.Map(lambda text: (None, text.encode()))
        _ = dead | "WriteLetters" >> WriteKafka(brokers.servers, "letters")
    good = [json.loads(record.value()) for record in brokers.receive("scored", 270)]
    bad = [json.loads(record.value()) for record in brokers.receive("letters", 30)]
    assert sorted(record["id"] for record in good + bad) == list(range(300))
    assert {record["id"] for record in bad} == set(range(0, 300, 10))
    assert all("anomaly_score" in record for record in good)


# ---- arguments and URIs ------------------------------------------------------------------------


def test_a_uri_names_a_read():
    uri = (
        "kafka:a:9092,b:9093/x,y.z?group_id=g&start=2025-01-02T03:04:05%2B01:00&max_delay_secs=1.5&discover_secs=9"
        "&security.protocol=SASL_SSL&with_metadata=true"
    )
    read = read_from(uri, timeout_secs=3, max_delay_secs=9)
    assert (read.bootstrap_servers, read.topics) == ("a:9092,b:9093", ["x", "y.z"])
    assert (read.group_id, read.max_delay_secs, read.discover_secs, read.timeout_secs) == ("g", 1.5, 9, 3)
    assert read._start == Timestamp.from_utc_datetime(datetime(2025, 1, 2, 2, 4, 5, tzinfo=UTC))
    assert read.consumer_config == {"security.protocol": "SASL_SSL"}
    assert read.with_metadata is True


def test_a_uri_names_a_write():
    to = write_to("kafka:[::1]:9092/out?compression.type=zstd&config_file=gs://b/kafka.properties")
    assert (to.bootstrap_servers, to.topic) == ("[::1]:9092", "out")
    assert (to.producer_config, to.config_file) == ({"compression.type": "zstd"}, "gs://b/kafka.properties")


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("pubsub:x", "expected a URI that begins with kafka:, got pubsub:x"),
        ("kafka:", "expected a place"),
        ("kafka:host/topic", "kafka:host/topic: expected brokers as HOST:PORT, got 'host'"),
        ("kafka:h:1,:2/topic", "expected brokers as HOST:PORT, got ':2'"),
        ("kafka:h:1", "expected a topic after the brokers and a slash, got ''"),
        ("kafka:h:1/a b", "got 'a b'"),
        ("kafka:h:1/t?group=g", "kafka:h:1/t: group: expected one of config_file, discover_secs"),
        ("kafka:h:1/t?start=soon", "start: expected earliest, latest, committed or a time"),
        ("kafka:h:1/t?until=later", "until: expected 'now' or None, got 'later'"),
        ("kafka:h:1/t?max_delay_secs=-1", "max_delay_secs: expected seconds, got '-1'"),
        ("kafka:h:1/t?discover_secs=0", "discover_secs: expected a number above 0, got '0'"),
        ("kafka:h:1/t?with_metadata=yes", "with_metadata: expected true or false, got 'yes'"),
        ("kafka:h:1/t?group_id=a&group_id=b", "group_id: expected once, got it twice"),
        ("kafka:h:1/t?group_id=a&start", "start: expected name=value"),
        ("kafka:h:1/t?start=committed", "group_id: expected one with start='committed'"),
        ("kafka:h:1/t?enable.auto.commit=true", "consumer_config: expected none of what .* got enable.auto.commit"),
        ("kafka:h:1/t?until=now&discover_secs=3", "discover_secs: expected none with until='now'"),
        ("kafka:h:1/t?until=now&expansion_service=default", "expected none with until"),
    ],
)
def test_a_wrong_uri_is_refused_with_the_part_that_is_wrong(uri, error):
    with pytest.raises(ValueError, match=error):
        read_from(uri)


def test_one_topic_is_written_to():
    with pytest.raises(ValueError, match="expected one topic, got a,b"):
        write_to("kafka:h:1/a,b")


def test_passwords_are_read_by_workers_and_shown_by_no_one(brokers, tmp_path):
    secrets = tmp_path / "kafka.properties"
    secrets.write_text("# ours\n\nsasl.password = hidden=1\nclient.id=tests\n")
    read = ReadKafka(brokers.servers, "t", config_file=str(secrets), consumer_config={"sasl.username": "visible?"})
    assert b"hidden" not in pickle.dumps(module._ReadTo(read)._cluster)
    assert "visible?" not in repr(read)
    found = read._cluster()._client_config()
    assert (found["sasl.password"], found["client.id"]) == ("hidden=1", "tests")
    secrets.write_text("sasl.password\n")
    with pytest.raises(ValueError, match=r"kafka.properties: expected name=value in line 1"):
        read._cluster()._client_config()


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    pipeline = beam.Pipeline()
    with pytest.raises(ImportError, match=r"pip install beam-vae\[kafka\]"):
        _ = pipeline | ReadKafka("h:1", "t")


def test_beams_own_read_and_write_get_the_same_arguments():
    """Their payloads, decoded by Beam; the Java transforms themselves need Java."""
    from apache_beam.io.kafka import ReadFromKafka

    uri = "kafka:h:1/t,u?group_id=g&start=2025-01-02T00:00:00&discover_secs=5&security.protocol=SSL"
    read = read_from(uri, expansion_service="localhost:8097")._java()
    assert read._urn == ReadFromKafka.URN_WITHOUT_METADATA
    fields = payload_of(read)
    assert fields["topics"] == ["t", "u"]
    assert fields["consumer_config"] == {
        "bootstrap.servers": "h:1",
        "auto.offset.reset": "earliest",
        "group.id": "g",
        "security.protocol": "SSL",
    }
    assert fields["start_read_time"] == 1_735_776_000_000
    assert (fields["commit_offset_in_finalize"], fields["timestamp_policy"]) == (True, "CreateTime")
    assert fields["dynamic_read_poll_interval_seconds"] == 5
    write = write_to("kafka:h:1/t?acks.x=all", expansion_service="localhost:8097")._java()
    fields = payload_of(write)
    assert (fields["topic"], fields["producer_config"]) == ("t", {"bootstrap.servers": "h:1", "acks.x": "all"})


def payload_of(transform):
    from apache_beam.coders import RowCoder
    from apache_beam.portability.api import external_transforms_pb2

    payload = external_transforms_pb2.ExternalConfigurationPayload.FromString(transform._payload)
    return RowCoder(payload.schema).decode(payload.payload)._asdict()
