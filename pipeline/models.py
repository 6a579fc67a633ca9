"""Bundles shared by all threads and DoFns of one process."""

from __future__ import annotations

import threading

from vae_model.bundle import Bundle, BundleError, load_bundle

_lock = threading.Lock()
_bundles: dict[tuple[str, str], Bundle] = {}  # strong references: Beam's `Shared` keeps only the last one


def shared_bundle(uri: str, model_version: str) -> Bundle:
    """The bundle at a URI, loaded, warmed up and checked against its golden rows once per process.

    Raises:
        BundleError: Another version is there now, or the golden rows score otherwise.
    """
    with _lock:
        if (uri, model_version) not in _bundles:
            bundle = load_bundle(uri)
            if bundle.model_version != model_version:
                raise BundleError(f"{uri}: expected version {model_version}, as at launch, got {bundle.model_version}")
            bundle.verify()
            _bundles[uri, model_version] = bundle
        return _bundles[uri, model_version]
