"""A Pub/Sub server for demos and tests: Cloud Pub/Sub's gRPC API on this machine, in memory.

    python -m pipeline.pubsub_emulator --port 8085
    export PUBSUB_EMULATOR_HOST=127.0.0.1:8085

Google's clients and Beam's `ReadFromPubSub` and `WriteToPubSub` go to the server that the environment
variable PUBSUB_EMULATOR_HOST names. Needs the extra `gcp`.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.pubsub_v1 import PublisherClient, SubscriberClient, types
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

_NUM_THREADS = 64  # a streaming pull holds one for as long as it lasts
_MAX_PULL_SECS = 0.2  # of waiting, where nothing comes: Beam's local runner does nothing else meanwhile
_STREAM_BATCH = 200
_TICK_SECS = 0.1  # how soon an ended call is noticed

_METHODS: dict[str, dict[str, Any]] = {
    "Publisher": {
        "CreateTopic": types.Topic,
        "GetTopic": types.GetTopicRequest,
        "ListTopics": types.ListTopicsRequest,
        "ListTopicSubscriptions": types.ListTopicSubscriptionsRequest,
        "DeleteTopic": types.DeleteTopicRequest,
        "Publish": types.PublishRequest,
    },
    "Subscriber": {
        "CreateSubscription": types.Subscription,
        "GetSubscription": types.GetSubscriptionRequest,
        "ListSubscriptions": types.ListSubscriptionsRequest,
        "DeleteSubscription": types.DeleteSubscriptionRequest,
        "Pull": types.PullRequest,
        "Acknowledge": types.AcknowledgeRequest,
        "ModifyAckDeadline": types.ModifyAckDeadlineRequest,
    },
}

_Received = types.ReceivedMessage.pb()  # plain protobuf, beneath the client's class and several times faster


@dataclass
class _Subscription:
    """What waits, in the order of publishing, and what is out: by ack id, until when (monotonic seconds)."""

    settings: Any
    waiting: deque[Any] = field(default_factory=deque)
    leases: dict[str, tuple[float, Any]] = field(default_factory=dict)

    def expire(self) -> None:
        """Puts back the messages whose deadline has passed."""
        now = time.monotonic()
        for ack_id in [ack_id for ack_id, (deadline, _) in self.leases.items() if deadline <= now]:
            self.waiting.append(self.leases.pop(ack_id)[1])


class PubSubEmulator:
    """Cloud Pub/Sub's server: topics, subscriptions, publish, pull, streaming pull, ack, deadlines.

        with PubSubEmulator() as emulator:
            os.environ["PUBSUB_EMULATOR_HOST"] = emulator.host  # it sets no such thing itself

    Messages keep attributes and ordering keys. What is not acknowledged within its deadline comes again, and
    what is, does not. `stop` and `start` are an outage of the server: topics, subscriptions and messages
    outlive it, and what was not acknowledged comes again. Delivery is in the order of publishing, but for
    what comes again. Filters, dead-letter topics, retention, seek, snapshots, schemas, push and exactly-once
    delivery are refused, not ignored.

    Args:
        port: On 127.0.0.1; 0 for one that is free.

    Attributes:
        host: The server's address, such as "127.0.0.1:8085"; the same after each `start`.
    """

    def __init__(self, port: int = 0) -> None:
        self.host = f"127.0.0.1:{port}"
        self._changed = threading.Condition()
        self._topics: dict[str, Any] = {}
        self._subscriptions: dict[str, _Subscription] = {}
        self._message_ids, self._ack_ids = itertools.count(1), itertools.count(1)
        self._server: grpc.Server | None = None

    def __enter__(self) -> PubSubEmulator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves, with the state that it had.

        Raises:
            RuntimeError: It does so already, or another has the port.
        """
        if self._server is not None:
            raise RuntimeError(f"{self.host}: runs already")
        # Without SO_REUSEPORT a port that another server has is an error, not shared.
        server = grpc.server(
            futures.ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pubsub"),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)],
        )
        for service, methods in _METHODS.items():
            handlers = {
                name: grpc.unary_unary_rpc_method_handler(
                    getattr(self, f"_{name}"), request.pb().FromString, _serialize
                )
                for name, request in methods.items()
            }
            if service == "Subscriber":
                handlers["StreamingPull"] = grpc.stream_stream_rpc_method_handler(
                    self._StreamingPull, types.StreamingPullRequest.pb().FromString, _serialize
                )
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", handlers),)
            )
        port = server.add_insecure_port(self.host)
        self.host = f"127.0.0.1:{port}"
        server.start()
        self._server = server

    def stop(self) -> None:
        """Ends all calls and the server; the state stays. What is out and not acknowledged comes again."""
        if self._server is None:
            return
        self._server.stop(grace=None).wait()
        self._server = None
        with self._changed:
            for subscription in self._subscriptions.values():
                given_out = [message for _, message in subscription.leases.values()]
                subscription.waiting.extendleft(reversed(given_out))
                subscription.leases.clear()
            self._changed.notify_all()

    def publisher(self) -> PublisherClient:
        """A plain client of this server, which needs no environment variable."""
        return PublisherClient(transport=PublisherGrpcTransport(channel=grpc.insecure_channel(self.host)))

    def subscriber(self) -> SubscriberClient:
        """As `publisher`."""
        return SubscriberClient(transport=SubscriberGrpcTransport(channel=grpc.insecure_channel(self.host)))

    def num_unacknowledged(self, subscription: str) -> int:
        """Messages of a subscription that wait or are out.

        Raises:
            KeyError: There is no such subscription.
        """
        with self._changed:
            found = self._subscriptions[subscription]
            return len(found.waiting) + len(found.leases)

    # ---- the methods, by their names in the API ----------------------------------------------------

    def _CreateTopic(self, topic: Any, context: Any) -> Any:
        with self._changed:
            if topic.name in self._topics:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"Topic already exists: {topic.name}")
            self._topics[topic.name] = topic
            return topic

    def _GetTopic(self, request: Any, context: Any) -> Any:
        with self._changed:
            return _find(self._topics, request.topic, context)

    def _ListTopics(self, request: Any, context: Any) -> Any:
        with self._changed:
            return types.ListTopicsResponse.pb()(topics=_of_project(self._topics, request.project))

    def _ListTopicSubscriptions(self, request: Any, context: Any) -> Any:
        with self._changed:
            _find(self._topics, request.topic, context)
            names = [name for name, item in self._subscriptions.items() if item.settings.topic == request.topic]
            return types.ListTopicSubscriptionsResponse.pb()(subscriptions=names)

    def _DeleteTopic(self, request: Any, context: Any) -> Empty:
        with self._changed:
            _find(self._topics, request.topic, context)
            del self._topics[request.topic]
            for item in self._subscriptions.values():
                if item.settings.topic == request.topic:
                    item.settings.topic = "_deleted-topic_"
            return Empty()

    def _Publish(self, request: Any, context: Any) -> Any:
        for message in request.messages:
            if not message.data and not message.attributes:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected a message with data or attributes, got none")
        with self._changed:
            _find(self._topics, request.topic, context)
            subscriptions = [item for item in self._subscriptions.values() if item.settings.topic == request.topic]
            for message in request.messages:
                message.message_id = str(next(self._message_ids))
                message.publish_time.GetCurrentTime()
                for subscription in subscriptions:
                    subscription.waiting.append(message)
            self._changed.notify_all()
        return types.PublishResponse.pb()(message_ids=[message.message_id for message in request.messages])

    def _CreateSubscription(self, settings: Any, context: Any) -> Any:
        for name in ("filter", "enable_exactly_once_delivery"):
            if getattr(settings, name):
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name}: this emulator has no such thing")
        for name in ("dead_letter_policy", "push_config", "bigquery_config", "cloud_storage_config"):
            if settings.HasField(name) and getattr(settings, name).ByteSize():
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name}: this emulator has no such thing")
        with self._changed:
            if settings.name in self._subscriptions:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, f"Subscription already exists: {settings.name}")
            _find(self._topics, settings.topic, context)
            settings.ack_deadline_seconds = settings.ack_deadline_seconds or 10
            self._subscriptions[settings.name] = _Subscription(settings)
            return settings

    def _GetSubscription(self, request: Any, context: Any) -> Any:
        with self._changed:
            return _find(self._subscriptions, request.subscription, context).settings

    def _ListSubscriptions(self, request: Any, context: Any) -> Any:
        with self._changed:
            found = _of_project(self._subscriptions, request.project)
            return types.ListSubscriptionsResponse.pb()(subscriptions=[item.settings for item in found])

    def _DeleteSubscription(self, request: Any, context: Any) -> Empty:
        with self._changed:
            _find(self._subscriptions, request.subscription, context)
            del self._subscriptions[request.subscription]
            return Empty()

    def _Pull(self, request: Any, context: Any) -> Any:
        end = time.monotonic() + (0 if request.return_immediately else _MAX_PULL_SECS)
        with self._changed:
            while True:
                subscription = _find(self._subscriptions, request.subscription, context)
                seconds = subscription.settings.ack_deadline_seconds
                received = self._take(subscription, max(1, request.max_messages), seconds)
                left = end - time.monotonic()
                if received or left <= 0 or not context.is_active():
                    return types.PullResponse.pb()(received_messages=received)
                self._changed.wait(min(left, _TICK_SECS))

    def _Acknowledge(self, request: Any, context: Any) -> Empty:
        with self._changed:
            _acknowledge(_find(self._subscriptions, request.subscription, context), request.ack_ids)
            return Empty()

    def _ModifyAckDeadline(self, request: Any, context: Any) -> Empty:
        with self._changed:
            subscription = _find(self._subscriptions, request.subscription, context)
            for ack_id in request.ack_ids:
                self._modify(subscription, ack_id, request.ack_deadline_seconds)
            return Empty()

    def _StreamingPull(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        first = next(requests)
        with self._changed:
            _find(self._subscriptions, first.subscription, context)
        ended = threading.Event()
        reader = threading.Thread(
            target=self._read_stream, args=(first.subscription, itertools.chain([first], requests), ended), daemon=True
        )
        reader.start()
        limit = first.max_outstanding_messages if first.max_outstanding_messages > 0 else sys.maxsize
        given_out: set[str] = set()
        while context.is_active() and not ended.is_set():
            with self._changed:
                subscription = _find(self._subscriptions, first.subscription, context)
                given_out &= subscription.leases.keys()
                room = min(_STREAM_BATCH, limit - len(given_out))
                received = self._take(subscription, room, first.stream_ack_deadline_seconds)
                if not received:
                    self._changed.wait(_TICK_SECS)
            if received:
                given_out.update(message.ack_id for message in received)
                yield types.StreamingPullResponse.pb()(received_messages=received)

    def _read_stream(self, name: str, requests: Iterator[Any], ended: threading.Event) -> None:
        """What a streaming pull's client says, until it or the server ends the call."""
        try:
            for request in requests:
                with self._changed:
                    subscription = self._subscriptions.get(name)
                    if subscription is None:
                        break
                    _acknowledge(subscription, request.ack_ids)
                    changes = zip(request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True)
                    for ack_id, seconds in changes:
                        self._modify(subscription, ack_id, seconds)
        except grpc.RpcError:
            pass  # how an ended call shows itself here
        ended.set()

    # ---- with the lock held ------------------------------------------------------------------------

    def _take(self, subscription: _Subscription, most: int, seconds: float) -> list[Any]:
        subscription.expire()
        deadline = time.monotonic() + seconds
        received: list[Any] = []
        while subscription.waiting and len(received) < most:
            message, ack_id = subscription.waiting.popleft(), f"ack-{next(self._ack_ids)}"
            subscription.leases[ack_id] = deadline, message
            received.append(_Received(ack_id=ack_id, message=message))
        return received

    def _modify(self, subscription: _Subscription, ack_id: str, seconds: float) -> None:
        if ack_id in subscription.leases:
            subscription.leases[ack_id] = time.monotonic() + seconds, subscription.leases[ack_id][1]
            if seconds == 0:  # what clients call nack
                subscription.expire()
                self._changed.notify_all()


def _acknowledge(subscription: _Subscription, ack_ids: Sequence[str]) -> None:
    subscription.expire()  # an ack that comes too late counts for nothing
    for ack_id in ack_ids:
        subscription.leases.pop(ack_id, None)


def _find(items: dict[str, Any], name: str, context: Any) -> Any:
    if name not in items:
        context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found: {name}")
    return items[name]


def _of_project(items: dict[str, Any], project: str) -> list[Any]:
    return [item for name, item in items.items() if name.startswith(f"{project}/")]


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until interrupted or terminated, also where a shell in the background has it ignore interrupts."""
    parser = argparse.ArgumentParser(
        "python -m pipeline.pubsub_emulator", description="Cloud Pub/Sub's API on this machine."
    )
    parser.add_argument("--port", type=int, default=8085, help="0 for one that is free (default 8085).")
    args = parser.parse_args(argv)
    with PubSubEmulator(args.port) as emulator:
        print(f"export PUBSUB_EMULATOR_HOST={emulator.host}", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
