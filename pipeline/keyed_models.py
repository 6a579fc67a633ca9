"""One model per key, such as one per customer, loaded when the first record of its key comes."""

from __future__ import annotations

import gc
import logging
import numbers
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.models import (
    REFRESH_SECS,
    FollowedModel,
    Model,
    ModelSource,
    count_load,
    follow,
    model_bytes,
    unfollow,
)
from vae_model import files
from vae_model.bundle import MANIFEST, Bundle, BundleError, load_bundle
from vae_model.pointer import is_pointer, read_pointer
from vae_model.tables import RecordError

logger = logging.getLogger(__name__)

_MAX_REFUSED_KEYS = 10_000

_lock = threading.Lock()


class KeyedModelError(RecordError):
    """No model can score the records of a key: they are dead letters, of this `error_type`."""

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class KeyedModels:
    """Models by key, such as one per customer, loaded when the first record of their key comes.

    Threads and DoFns of one process share them. It pickles, without the models.

    Args:
        models_by_key: URI of each key's bundle or pointer, keys being text, bytes or whole numbers; or one URI for all
            with `{key}` in it, such as `gs://models/{key}/current.json`, where keys may come that were not there at
            launch.
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
            self.models = {_key_text(key): files.absolute(uri) for key, uri in models_by_key.items()}
            if "" in self.models:
                raise ValueError("models_by_key: expected keys of at least one character, got an empty one")
            if len(self.models) < len(models_by_key):
                raise ValueError("models_by_key: expected keys that differ as text, got two that do not")
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
        return self._cache().get(key)[1].current()

    def assign(self, keys: Iterable[str | int | None]) -> Iterator[tuple[list[Any], Bundle | KeyedModelError]]:
        """Bundles, one after the other, each with the keys that it is for, or why those have none.

        The keys of the default model come together, last. A batch that has been scored with one bundle before the
        next is asked for keeps no more models in memory than there is room for.
        """
        cache = self._cache()
        others: list[Any] = []
        default: Model | None = None
        for key in keys:
            try:
                name, model = cache.get(key)
            except KeyedModelError as error:
                yield [key], error
                continue
            if name == _DEFAULT:
                default = model
                others.append(key)
            else:
                yield [key], model.current()
        if default is not None:
            yield others, default.current()

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

    def locate(self, key: str | int | None) -> str | None:
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


def _key_text(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode()
    if isinstance(key, bool) or not isinstance(key, str | numbers.Integral):
        raise ValueError(f"models_by_key: expected keys of text or whole numbers, got {type(key).__name__}")
    return str(key)


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

    def get(self, key: str | int | None) -> tuple[str, Model]:
        """The model for a key, and the key that it is kept under."""
        config = self._config
        uri = config.locate(key)
        if uri is not None:
            try:
                return str(key), self._get(str(key), uri)
            except KeyedModelError as error:
                if error.error_type != "unknown_model" or config.default is None:
                    raise
        if config.default is not None:
            return _DEFAULT, self._get(_DEFAULT, config.default)
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
            start = time.perf_counter()
            try:
                model = self._load(uri)
            except Exception as error:
                raise self._refuse(key, uri, error) from error
            with self._lock:
                self._loading.pop(key, None)
                evicted = self._put(key, model)
        count_load(model.bundle, time.perf_counter() - start)
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
            follow(model)
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
                unfollow(old)
        self._models[key] = model
        return gone


def _is_there(uri: str) -> bool:
    try:
        return files.exists(uri if is_pointer(uri) else f"{uri}/{MANIFEST}")
    except OSError:
        return True  # nobody knows


_caches: dict[tuple[Any, ...], _Cache] = {}


def _forget() -> None:
    """In a forked child, as in `pipeline.models`."""
    global _lock
    _lock = threading.Lock()
    _caches.clear()


os.register_at_fork(after_in_child=_forget)
