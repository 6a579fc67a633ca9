"""Google's own client is the oracle: it must find a Pub/Sub server."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip(
    "google.cloud.pubsub_v1", reason="Pub/Sub's client comes with the extra: pip install 'beam-vae[gcp]'"
)

from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1 import types
from waiting import until

from pipeline.pubsub_emulator import PubSubEmulator

TOPIC = "projects/project-a/topics/flights"
SUBSCRIPTION = "projects/project-a/subscriptions/flights"


@pytest.fixture
def emulator(monkeypatch):
    with PubSubEmulator() as emulator:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
        emulator.publisher().create_topic(name=TOPIC)
        emulator.subscriber().create_subscription(name=SUBSCRIPTION, topic=TOPIC)
        yield emulator


def publish(data: list[bytes], **attributes: str) -> None:
    with pubsub_v1.PublisherClient() as client:
        for future in [client.publish(TOPIC, item, **attributes) for item in data]:
            future.result(timeout=10)


def pull(emulator: PubSubEmulator, most: int = 100) -> list[types.ReceivedMessage]:
    request = {"subscription": SUBSCRIPTION, "max_messages": most}
    return list(emulator.subscriber().pull(request=request).received_messages)


def ack(emulator: PubSubEmulator, received: list[types.ReceivedMessage]) -> None:
    ack_ids = [item.ack_id for item in received]
    emulator.subscriber().acknowledge(subscription=SUBSCRIPTION, ack_ids=ack_ids)


def set_deadline(emulator: PubSubEmulator, received: list[types.ReceivedMessage], seconds: int) -> None:
    request = {
        "subscription": SUBSCRIPTION,
        "ack_ids": [item.ack_id for item in received],
        "ack_deadline_seconds": seconds,
    }
    emulator.subscriber().modify_ack_deadline(request=request)


def test_a_message_comes_as_it_was_published(emulator):
    before = time.time()
    options = pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
    with pubsub_v1.PublisherClient(publisher_options=options) as client:
        message_id = client.publish(TOPIC, b"\x00\xff", ordering_key="UA", origin="JFK").result(timeout=10)
    [received] = pull(emulator)
    message = received.message
    assert (message.data, dict(message.attributes), message.ordering_key) == (b"\x00\xff", {"origin": "JFK"}, "UA")
    assert message.message_id == message_id
    assert before - 1 <= message.publish_time.timestamp() <= time.time() + 1


def test_streaming_pull_delivers_every_message_once_in_order(emulator):
    published = [b"%d" % i for i in range(2000)]
    publish(published)
    got: list[tuple[int, bytes]] = []

    def callback(message):
        got.append((int(message.message_id), message.data))
        message.ack()

    with pubsub_v1.SubscriberClient() as client:
        # One thread, so that the client does not change the order.
        scheduler = pubsub_v1.subscriber.scheduler.ThreadScheduler(ThreadPoolExecutor(1))
        stream = client.subscribe(SUBSCRIPTION, callback, scheduler=scheduler)
        until(lambda: len(got) == len(published) and emulator.num_unacknowledged(SUBSCRIPTION) == 0, 10)
        stream.cancel()
        stream.result(timeout=10)
    assert sorted(data for _, data in got) == sorted(published)
    assert got == sorted(got)  # the client's batches may be published in any order


def test_a_stream_holds_no_more_than_it_asked_for(emulator):
    publish([b"%d" % i for i in range(30)])
    held: list = []
    control = pubsub_v1.types.FlowControl(max_messages=10)
    with pubsub_v1.SubscriberClient() as client:
        stream = client.subscribe(SUBSCRIPTION, held.append, flow_control=control)
        until(lambda: len(held) == 10, 10)
        assert len(pull(emulator)) == 20  # the rest is there for another subscriber
        stream.cancel()
        stream.result(timeout=10)


def test_two_subscriptions_each_get_all_and_one_made_later_nothing_of_before(emulator):
    subscriber = emulator.subscriber()
    other = f"{SUBSCRIPTION}-2"
    publish([b"early"])
    subscriber.create_subscription(name=other, topic=TOPIC)
    publish([b"late"])
    assert [item.message.data for item in pull(emulator)] == [b"early", b"late"]
    received = subscriber.pull(subscription=other, max_messages=10).received_messages
    assert [item.message.data for item in received] == [b"late"]


def test_a_nacked_message_comes_again_at_once(emulator):
    publish([b"x"])
    got: list[str] = []

    def callback(message):
        got.append(message.message_id)
        message.ack() if len(got) == 3 else message.nack()

    with pubsub_v1.SubscriberClient() as client:
        stream = client.subscribe(SUBSCRIPTION, callback)
        until(lambda: len(got) == 3 and emulator.num_unacknowledged(SUBSCRIPTION) == 0, 10)
        stream.cancel()
        stream.result(timeout=10)
    assert len(set(got)) == 1


def test_a_message_comes_again_after_its_deadline_and_a_late_ack_counts_for_nothing(emulator):
    publish([b"x"])
    first = pull(emulator)
    set_deadline(emulator, first, 1)
    start = time.monotonic()
    again: list = []
    until(lambda: again.extend(pull(emulator)) or again, 10)
    assert 0.5 < time.monotonic() - start < 5
    assert [item.message.data for item in again] == [b"x"]
    ack(emulator, first)
    assert emulator.num_unacknowledged(SUBSCRIPTION) == 1
    ack(emulator, again)
    assert emulator.num_unacknowledged(SUBSCRIPTION) == 0


def test_a_longer_deadline_keeps_a_message_out(emulator):
    publish([b"x", b"y"])
    short, long = pull(emulator, 1), pull(emulator, 1)
    set_deadline(emulator, long, 600)
    set_deadline(emulator, short, 1)
    again: list = []
    until(lambda: again.extend(pull(emulator)) or again, 10)
    assert [item.message.data for item in again] == [short[0].message.data]
    ack(emulator, long)
    assert emulator.num_unacknowledged(SUBSCRIPTION) == 1


def test_a_restarted_server_delivers_what_was_not_acknowledged(emulator):
    publish([b"done", b"out", b"waiting"])
    ack(emulator, pull(emulator, 1))
    pull(emulator, 1)
    host = emulator.host
    emulator.stop()
    with pytest.raises((exceptions.ServiceUnavailable, exceptions.RetryError, exceptions.DeadlineExceeded)):
        emulator.subscriber().pull(subscription=SUBSCRIPTION, max_messages=1, retry=None, timeout=5)
    emulator.start()
    assert emulator.host == host
    assert [item.message.data for item in pull(emulator)] == [b"out", b"waiting"]


def test_a_streaming_client_outlives_a_restart_of_the_server(emulator):
    got: list[bytes] = []
    with pubsub_v1.SubscriberClient() as client:
        stream = client.subscribe(SUBSCRIPTION, lambda message: (got.append(message.data), message.ack()))
        publish([b"before"])
        until(lambda: got == [b"before"], 10)
        emulator.stop()
        emulator.start()
        publish([b"after"])
        until(lambda: b"after" in got, 30)
        stream.cancel()
        stream.result(timeout=10)
    assert not stream.running()


def test_names_are_listed_by_project_and_gone_when_deleted(emulator):
    publisher, subscriber = emulator.publisher(), emulator.subscriber()
    publisher.create_topic(name="projects/project-ab/topics/other")
    assert [item.name for item in publisher.list_topics(project="projects/project-a")] == [TOPIC]
    assert list(publisher.list_topic_subscriptions(topic=TOPIC)) == [SUBSCRIPTION]
    assert [item.name for item in subscriber.list_subscriptions(project="projects/project-a")] == [SUBSCRIPTION]
    assert subscriber.get_subscription(subscription=SUBSCRIPTION).ack_deadline_seconds == 10
    assert publisher.get_topic(topic=TOPIC).name == TOPIC
    publisher.delete_topic(topic=TOPIC)
    assert subscriber.get_subscription(subscription=SUBSCRIPTION).topic == "_deleted-topic_"  # as Pub/Sub says
    subscriber.delete_subscription(subscription=SUBSCRIPTION)
    for call in (lambda: publisher.get_topic(topic=TOPIC), lambda: pull(emulator)):
        with pytest.raises(exceptions.NotFound, match="Resource not found"):
            call()


def test_what_pubsub_refuses_is_refused(emulator):
    publisher, subscriber = emulator.publisher(), emulator.subscriber()
    with pytest.raises(exceptions.AlreadyExists):
        publisher.create_topic(name=TOPIC)
    with pytest.raises(exceptions.AlreadyExists):
        subscriber.create_subscription(name=SUBSCRIPTION, topic=TOPIC)
    with pytest.raises(exceptions.NotFound):
        subscriber.create_subscription(name=f"{SUBSCRIPTION}-2", topic=f"{TOPIC}-2")
    with pytest.raises(exceptions.InvalidArgument, match="data or attributes"):
        publisher.publish(topic=TOPIC, messages=[{"data": b"fine"}, {}])
    assert emulator.num_unacknowledged(SUBSCRIPTION) == 0  # a batch is taken whole or not at all


def test_what_it_lacks_is_refused_rather_than_ignored(emulator):
    subscriber = emulator.subscriber()
    for name, value in {
        "filter": 'attributes.origin = "JFK"',
        "enable_exactly_once_delivery": True,
        "dead_letter_policy": {"dead_letter_topic": TOPIC},
    }.items():
        with pytest.raises(exceptions.MethodNotImplemented, match=name):
            subscriber.create_subscription(request={"name": f"{SUBSCRIPTION}-2", "topic": TOPIC, name: value})
    with pytest.raises(exceptions.MethodNotImplemented):
        subscriber.create_snapshot(name="projects/project-a/snapshots/x", subscription=SUBSCRIPTION)


def test_a_port_that_another_server_has_is_refused(emulator):
    with pytest.raises(RuntimeError, match=emulator.host.rpartition(":")[2]):
        PubSubEmulator(int(emulator.host.rpartition(":")[2])).start()
    with pytest.raises(RuntimeError, match="runs already"):
        emulator.start()


def test_it_leaves_the_environment_alone_and_no_thread_behind():
    before, environment = threading.active_count(), dict(os.environ)
    with PubSubEmulator() as emulator:
        emulator.publisher().create_topic(name=TOPIC)
    assert dict(os.environ) == environment
    until(lambda: threading.active_count() <= before, 10)


def test_as_a_program_it_says_where_it_is_and_ends_when_interrupted():
    command = [sys.executable, "-m", "pipeline.pubsub_emulator", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        name, _, host = program.stdout.readline().strip().removeprefix("export ").partition("=")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, host)
            assert pubsub_v1.PublisherClient().create_topic(name=TOPIC).name == TOPIC
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=10) == 0
