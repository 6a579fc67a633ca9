"""Bundles shared by all threads and DoFns of one process, and their replacement while a pipeline runs."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from apache_beam.metrics import Metrics

from pipeline.letters import NAMESPACE
from vae_model import files
from vae_model.bundle import MANIFEST, Bundle, BundleError, load_bundle, load_entry
from vae_model.pointer import Entry, Pointer, PointerError, is_pointer, read_pointer
from vae_model.promotion import readings, refuse_successor
from vae_model.tables import RecordError

logger = logging.getLogger(__name__)

REFRESH_SECS = 60.0
_MAX_WAIT_SECS = 3600.0  # between attempts to load a bundle that was refused
_MAX_REFUSED_KEYS = 10_000

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
        _poller.add(model)
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
        if entry != self._refused:
            self._refused, self._wait = entry, self.refresh_secs
            self._events.append(_Event("swap_failure"))
            logger.warning("version %s refused, %s: %s (told once)", entry.model_version, instead, error)
        else:
            self._wait = min(2 * self._wait, max(_MAX_WAIT_SECS, self.refresh_secs))
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


# ---- one model per key -------------------------------------------------------------------------------


class KeyedModelError(RecordError):
    """No model can score the records of a key: they are dead letters, of this `error_type`."""

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class KeyedModels:
    """Models by key, such as one per customer, loaded when the first record of their key comes.

    Threads and DoFns of one process share them. It pickles, without the models.

    Args:
        models_by_key: URI of each key's bundle or pointer; or one URI for all with `{key}` in it, such as
            `gs://models/{key}/current.json`, where keys may come that were not there at launch.
        default: URI of the bundle or pointer for keys that have none; without it, their records are dead letters.
        max_bytes: Of weights and calibrations to keep in memory per process; the models used least recently go first.
        retry_secs: How long a model that cannot be loaded is left alone.
        refresh_secs: How often pointers are read again; 0 for never.
        input_schema: Of the tables, where known: models that read other columns are refused.

    Raises:
        ValueError: An argument is wrong.
    """

    def __init__(
        self,
        models_by_key: Mapping[str, str] | str,
        *,
        default: str | None = None,
        max_bytes: int = 1 << 30,
        retry_secs: float = REFRESH_SECS,
        refresh_secs: float = REFRESH_SECS,
        input_schema: pa.Schema | None = None,
    ) -> None:
        if isinstance(models_by_key, str):
            if "{key}" not in models_by_key:
                raise ValueError(f"models_by_key: expected a URI with {{key}} in it, got {models_by_key}")
            self.template: str | None = files.absolute(models_by_key)
            self.models: dict[str, str] = {}
        else:
            self.template = None
            self.models = {key: files.absolute(uri) for key, uri in models_by_key.items()}
        if not max_bytes > 0:
            raise ValueError(f"max_bytes: expected a number > 0, got {max_bytes}")
        self.default = None if default is None else files.absolute(default)
        self.max_bytes, self.retry_secs, self.refresh_secs = max_bytes, retry_secs, refresh_secs
        self.input_schema = input_schema

    def get(self, key: str | int) -> Bundle:
        """The bundle to score the next batch of a key with. Call it where `Model.current` may be called.

        Raises:
            KeyedModelError: There is none: "invalid_key", "unknown_model" or "model_unavailable".
        """
        return self._cache().get(key).current()

    def _cache(self) -> _Cache:
        cache: _Cache | None = getattr(self, "_shared", None)
        if cache is None or cache.process != os.getpid():  # never looked up, or forked since
            identity = (self.template, tuple(sorted(self.models.items())), *self._limits())
            with _lock:
                cache = _caches.setdefault(identity, _Cache(self))
            self._shared = cache
        return cache

    def _limits(self) -> tuple[Any, ...]:
        return self.default, self.max_bytes, self.retry_secs, self.refresh_secs, self.input_schema

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_shared"}

    def locate(self, key: str | int) -> str | None:
        """The URI of a key's bundle or pointer, or None where it has none.

        Raises:
            KeyedModelError: The key would lead out of its place in the URI.
        """
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise KeyedModelError(f"key: expected text or a whole number, got {type(key).__name__}", "invalid_key")
        if self.template is None:
            return self.models.get(str(key))
        if not _SAFE_KEY.fullmatch(str(key)):
            expected = "expected letters, digits and any of _ . = @ + - behind the first, at most 200"
            raise KeyedModelError(f"key: {expected}, got {str(key)[:60]!r}", "invalid_key")
        return self.template.replace("{key}", str(key))


_SAFE_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=@+-]{0,199}")
_DEFAULT = ""  # the default model's place in a cache; no key is empty


class _Refusal(NamedTuple):
    message: str
    error_type: str
    until: float


class _Cache:
    """The models of one `KeyedModels` in one process."""

    def __init__(self, config: KeyedModels) -> None:
        self._config, self.process = config, os.getpid()
        self._lock = threading.Lock()
        self._models: OrderedDict[str, Model] = OrderedDict()  # the one used least recently first
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._log_at = 0.0

    def get(self, key: str | int) -> Model:
        config = self._config
        uri = config.locate(key)
        if uri is not None:
            try:
                return self._get(str(key), uri)
            except KeyedModelError as error:
                if error.error_type != "unknown_model" or config.default is None:
                    raise
        if config.default is not None:
            return self._get(_DEFAULT, config.default)
        raise KeyedModelError(f"key: no model for {str(key)[:60]!r}", "unknown_model")

    def _get(self, key: str, uri: str) -> Model:
        with self._lock:
            model = self._known(key)
            if model is not None:
                return model
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:  # other keys go on
            with self._lock:
                model = self._known(key)
            if model is not None:
                return model
            try:
                model = self._load(uri)
            except Exception as error:
                raise self._refuse(key, uri, error) from error
            with self._lock:
                self._loading.pop(key, None)
                evicted = self._put(key, model)
        if evicted:
            del evicted
            gc.collect()  # networks are freed by the collector alone
        return model

    def _known(self, key: str) -> Model | None:
        model = self._models.get(key)
        if model is not None:
            self._models.move_to_end(key)
            return model
        refusal = self._refusals.get(key)
        if refusal is not None and refusal.until > time.monotonic():
            raise KeyedModelError(refusal.message, refusal.error_type)
        return None

    def _load(self, uri: str) -> Model:
        config = self._config
        if is_pointer(uri) and config.refresh_secs:
            read_pointer(uri)  # most unknown keys end here
            model = FollowedModel(ModelSource("", "", uri, config.refresh_secs, (), config.input_schema))
            model.load()
            _poller.add(model)
            return model
        bundle = load_bundle(uri)
        columns = config.input_schema
        if columns is not None and (problem := bundle.schema.refuse(columns)):
            raise BundleError(f"{uri}: {problem}")
        bundle.verify()
        return Model(bundle)

    def _refuse(self, key: str, uri: str, error: Exception) -> KeyedModelError:
        missing = key != _DEFAULT and not _is_there(uri)
        if missing:
            message, kind = f"key: no model for {key[:60]!r}", "unknown_model"
        else:
            message, kind = f"key: its model cannot be used: {error}", "model_unavailable"
        now = time.monotonic()
        with self._lock:
            self._loading.pop(key, None)
            self._refusals[key] = _Refusal(message, kind, now + self._config.retry_secs)
            self._refusals.move_to_end(key)
            if len(self._refusals) > _MAX_REFUSED_KEYS:
                self._refusals.popitem(last=False)
            tell = not missing and now >= self._log_at
            if tell:
                self._log_at = now + self._config.retry_secs
        if tell:
            logger.warning("%s (at most one such line in %g s)", message, self._config.retry_secs)
        return KeyedModelError(message, kind)

    def _put(self, key: str, model: Model) -> list[Model]:
        """Keeps a model; returns those that made room for it."""
        removed = [key] if key in self._models else []  # two threads came when a refusal expired
        sizes = {name: model_bytes(old.bundle) for name, old in self._models.items() if name != key}
        total = sum(sizes.values()) + model_bytes(model.bundle)
        for name, size in sizes.items():
            if total <= self._config.max_bytes:
                break
            if name != _DEFAULT:
                removed.append(name)
                total -= size
        gone = [self._models.pop(name) for name in removed]
        for old in gone:
            if isinstance(old, FollowedModel):
                _poller.remove(old)
        self._models[key] = model
        return gone


def _is_there(uri: str) -> bool:
    try:
        return files.exists(uri if is_pointer(uri) else f"{uri}/{MANIFEST}")
    except OSError:
        return True  # nobody knows


_caches: dict[tuple[Any, ...], _Cache] = {}


def _forget() -> None:
    """In a forked child: threads and the state of locks do not come along, so neither does what they guard."""
    global _lock, _poller
    _lock, _poller = threading.Lock(), _Poller()
    _bundles.clear()
    _followed.clear()
    _caches.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _poller.stop())
