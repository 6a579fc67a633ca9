"""Bundles shared by all threads and DoFns of one process, and their replacement while a pipeline runs."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from apache_beam.metrics import Metrics

from pipeline.letters import NAMESPACE
from vae_model import files
from vae_model.bundle import Bundle, BundleError, load_bundle, load_entry
from vae_model.pointer import Entry, Pointer, PointerError, is_pointer, read_pointer
from vae_model.promotion import readings, refuse_successor

logger = logging.getLogger(__name__)

REFRESH_SECS = 60.0
_MAX_WAIT_SECS = 3600.0  # between attempts to load a bundle that was refused

_swaps = Metrics.counter(NAMESPACE, "model_swaps")
_swap_failures = Metrics.counter(NAMESPACE, "model_swap_failures")
_pointer_errors = Metrics.counter(NAMESPACE, "model_pointer_errors")
_load_latency = Metrics.distribution(NAMESPACE, "load_model_latency_milli_secs")
_model_bytes = Metrics.distribution(NAMESPACE, "model_byte_size")

_lock = threading.Lock()
_bundles: dict[tuple[str, str], Bundle] = {}  # strong references: Beam's `Shared` keeps only the last one


def shared_bundle(uri: str, model_version: str) -> Bundle:
    """The bundle at a URI, loaded, warmed up and checked against its golden rows once per process.

    Raises:
        BundleError: Another version is there now, or the golden rows score otherwise.
    """
    with _lock:
        if (uri, model_version) not in _bundles:
            _bundles[uri, model_version] = _load_fixed(uri, model_version)
        return _bundles[uri, model_version]


def _load_fixed(uri: str, model_version: str) -> Bundle:
    bundle = load_bundle(uri)
    if bundle.model_version != model_version:
        raise BundleError(f"{uri}: expected version {model_version}, as at launch, got {bundle.model_version}")
    bundle.verify()
    return bundle


def model_bytes(bundle: Bundle) -> int:
    """What a bundle's weights and calibration take in memory."""
    arrays = [*bundle.weights.values(), *bundle.calibration.arrays().values()]
    return sum(array.nbytes for array in arrays)


def count_load(bundle: Bundle, seconds: float) -> None:
    """Counts a model that was loaded, in the metrics of the step that is running."""
    _load_latency.update(int(1e3 * seconds))
    _model_bytes.update(model_bytes(bundle))


# ---- what a pipeline is built with -----------------------------------------------------------------


class Launched(NamedTuple):
    """The bundle that a pipeline is built with.

    Args:
        name: As the user gave it.
        bundle: As it is when the pipeline is built.
        uri: Of the bundle, absolute: workers may run elsewhere.
        pointer: That named it, absolute, or None.
    """

    name: str
    bundle: Bundle
    uri: str
    pointer: str | None

    def source(self, refresh_secs: float = 0, input_schema: pa.Schema | None = None) -> ModelSource:
        """What the pipeline's steps are given; with `refresh_secs`, they follow the pointer if there is one."""
        version = self.bundle.model_version
        if self.pointer is None or not refresh_secs:
            return ModelSource(self.uri, version)
        columns = tuple(readings(self.bundle.schema).items())
        return ModelSource(self.uri, version, self.pointer, refresh_secs, columns, input_schema)


def launch(name: str) -> Launched:
    """Loads the bundle at a URI or behind a pointer, which is read once.

    Raises:
        BundleError: See `load_bundle`.
    """
    if not is_pointer(name):
        return Launched(name, load_bundle(name), files.absolute(name), None)
    try:
        pointer = read_pointer(name)
    except PointerError as error:
        raise BundleError(str(error)) from error
    bundle, uri = load_entry(pointer, pointer.current), pointer.locate(pointer.current)
    return Launched(f"{name} -> {uri}", bundle, files.absolute(uri), files.absolute(name))


@dataclass(frozen=True)
class ModelSource:
    """Where a step's model comes from: small, and it pickles.

    Args:
        bundle: URI of the bundle at launch.
        model_version: Its version.
        pointer: To follow; without it, that version scores for ever.
        refresh_secs: How often the pointer is read.
        columns: Features of the bundle at launch and how each is read; see `readings`. Empty: those of the first
            bundle that is loaded.
        input_schema: Of the tables, where known: a newer bundle may read any of these columns.
    """

    bundle: str
    model_version: str
    pointer: str | None = None
    refresh_secs: float = REFRESH_SECS
    columns: tuple[tuple[str, str], ...] = ()
    input_schema: pa.Schema | None = None

    def open(self) -> Model:
        """The process's model, loaded if need be; call it in `setup`.

        Raises:
            BundleError: Neither the pointer's bundle nor that of launch can be used.
        """
        if self.pointer is None:
            return Model(shared_bundle(self.bundle, self.model_version))
        with _lock:
            model = _followed.setdefault(self, FollowedModel(self))
        model.load()
        follow(model)
        return model


class Model:
    """A model of one version; `FollowedModel` is one whose version changes."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def current(self) -> Bundle:
        """The bundle to score the next batch with, from its start to its end.

        Call it inside `process` or `finish_bundle`: what happened to the model since is counted then,
        for a Beam metric counts nowhere else.
        """
        return self._bundle

    @property
    def bundle(self) -> Bundle:
        """The same, counting nothing."""
        return self._bundle


# ---- following a pointer ---------------------------------------------------------------------------


class FollowedModel(Model):
    """A model that becomes what its pointer names, between batches, if that proves sound."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._events: deque[_Event] = deque()  # its operations are atomic
        self._changing = threading.Lock()
        self._refused: Entry | None = None
        self._retry_at = self._wait = 0.0
        self._pointer_error = ""
        self._released = False
        self.columns = dict(source.columns)

    @property
    def refresh_secs(self) -> float:
        return self._source.refresh_secs

    def current(self) -> Bundle:
        while self._events:
            try:
                event = self._events.popleft()
            except IndexError:  # another thread was faster
                break
            event.report()
        return self._bundle

    def load(self) -> None:
        """Loads the first bundle: what the pointer names now or, where that cannot be used, the one of launch."""
        source = self._source
        with self._changing:
            if hasattr(self, "_bundle"):
                return
            pointer = self._read()
            if pointer:
                try:
                    self._bundle = self._load(pointer, pointer.current)
                except Exception as error:
                    if not source.bundle:
                        raise
                    self._refuse(pointer.current, error, f"starting with {source.bundle}, as at launch")
            if not hasattr(self, "_bundle"):
                if not source.bundle:
                    raise BundleError(self._pointer_error)
                self._bundle = _load_fixed(source.bundle, source.model_version)
            if not self.columns:
                self.columns = readings(self._bundle.schema)

    def poll(self) -> None:
        """Reads the pointer and, if it names another version, loads that beside the one in use and swaps them."""
        with self._changing:
            if self._released:  # networks are freed by the collector alone; batches in flight have ended by now
                self._released = False
                gc.collect()
            pointer = self._read()
            if pointer is None:
                return
            entry, old = pointer.current, self._bundle.model_version
            if entry.model_version == old:
                self._refused = None
                return
            if entry == self._refused and time.monotonic() < self._retry_at:
                return
            start = time.perf_counter()
            try:
                bundle = self._load(pointer, entry)
            except Exception as error:  # whatever it is: the pipeline goes on
                self._refuse(entry, error, f"still scoring with version {old}")
                return
            # The event first: a batch that is scored by the new bundle finds it.
            self._events.append(_Event("swap", time.perf_counter() - start, model_bytes(bundle)))
            self._bundle = bundle
            self._refused, self._released = None, True
            place = f"{pointer.uri} -> {pointer.locate(entry)}"
            logger.info("%s: swapped version %s for %s", place, old, bundle.model_version)

    def _read(self) -> Pointer | None:
        """The pointer, or None where it cannot be read, which is told once until it can be read again."""
        uri = str(self._source.pointer)
        try:
            pointer = read_pointer(uri)
        except Exception as error:  # of Arrow's filesystems, too, which have errors of their own
            if not self._pointer_error:
                self._events.append(_Event("pointer_error"))
                logger.warning("%s (told once, and read again every %g s)", error, self.refresh_secs)
            self._pointer_error = str(error)
            return None
        self._pointer_error = ""
        return pointer

    def _load(self, pointer: Pointer, entry: Entry) -> Bundle:
        bundle = load_entry(pointer, entry)
        columns = self._source.input_schema
        if self.columns or columns is not None:
            problem = refuse_successor(bundle.schema, self.columns, columns)
            if problem:
                raise BundleError(f"{pointer.uri} points to {pointer.locate(entry)}: {problem}")
        bundle.verify()  # warms it up, too
        return bundle

    def _refuse(self, entry: Entry, error: Exception, instead: str) -> None:
        longest = max(_MAX_WAIT_SECS, self.refresh_secs)
        if entry != self._refused:
            self._refused, self._wait = entry, self.refresh_secs
            self._events.append(_Event("swap_failure"))
            again = f"told again every {longest:g} s"
            logger.warning("version %s refused, %s: %s (%s)", entry.model_version, instead, error, again)
        else:
            self._wait = min(2 * self._wait, longest)
            if self._wait == longest:
                logger.warning("version %s still refused, %s: %s", entry.model_version, instead, error)
        self._retry_at = time.monotonic() + self._wait


class _Event(NamedTuple):
    """Something to count in the next batch."""

    kind: str
    seconds: float = 0.0
    num_bytes: int = 0

    def report(self) -> None:
        {"swap": _swaps, "swap_failure": _swap_failures, "pointer_error": _pointer_errors}[self.kind].inc()
        if self.kind == "swap":
            _load_latency.update(int(1e3 * self.seconds))
            _model_bytes.update(self.num_bytes)


class _Poller:
    """One daemon thread that polls the process's models, each at its own interval."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._due: dict[FollowedModel, float] = {}
        self._thread: threading.Thread | None = None
        self._stopped = False

    def add(self, model: FollowedModel) -> None:
        with self._wake:
            if model in self._due:
                return
            self._due[model] = time.monotonic() + model.refresh_secs
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="beam-vae-models", daemon=True)
                self._thread.start()
            self._wake.notify()

    def remove(self, model: FollowedModel) -> None:
        with self._wake:
            self._due.pop(model, None)

    def poll_now(self) -> None:
        """Has all pointers read at once, in the thread."""
        with self._wake:
            self._due = dict.fromkeys(self._due, 0.0)
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread: one that loads a network while the interpreter is taken down would crash it."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._stopped:
                    return
                now = time.monotonic()
                ready = [model for model, due in self._due.items() if due <= now]
                if not ready:
                    self._wake.wait(min(self._due.values()) - now if self._due else None)
                    continue
                for model in ready:
                    self._due[model] = now + model.refresh_secs
            for model in ready:
                try:
                    model.poll()
                except Exception:  # a bug of ours must not leave the other models behind
                    logger.exception("a pointer could not be followed")


_followed: dict[ModelSource, FollowedModel] = {}
_poller = _Poller()


def poll_now() -> None:
    """Has the pointers in use read at once, in the background."""
    _poller.poll_now()


def follow(model: FollowedModel) -> None:
    """Has a model's pointer read from time to time."""
    _poller.add(model)


def unfollow(model: FollowedModel) -> None:
    """Has a model's pointer left alone."""
    _poller.remove(model)


def _forget() -> None:
    """In a forked child: threads and the state of locks do not come along, so neither does what they guard."""
    global _lock, _poller
    _lock, _poller = threading.Lock(), _Poller()
    _bundles.clear()
    _followed.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _poller.stop())
