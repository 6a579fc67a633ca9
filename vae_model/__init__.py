"""A variational autoencoder for tables: train on Parquet, score rows by negative ELBO.

Importing this package loads no TensorFlow; it loads when a model is trained or scores.
"""

import os
from typing import TYPE_CHECKING, Any

# Before Keras and TensorFlow load: which backend, and no start-up chatter on standard error.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if TYPE_CHECKING:
    from vae_model.bundle import Bundle, load_bundle
    from vae_model.config import TrainingConfig, VAEConfig
    from vae_model.fitting import fit

_HOME = {
    "Bundle": "bundle",
    "TrainingConfig": "config",
    "VAEConfig": "config",
    "fit": "fitting",
    "load_bundle": "bundle",
}

__all__ = ["Bundle", "TrainingConfig", "VAEConfig", "fit", "load_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
