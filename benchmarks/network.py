"""Our trained network in the form that Beam's own handlers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
from keras import ops

from vae_model.bundle import Bundle
from vae_model.layers import ColumnNLL
from vae_model.losses import kl_to_standard_normal
from vae_model.model import build_members


@keras.saving.register_keras_serializable(package="benchmarks")
class OneSampleScore(keras.layers.Layer):
    """Negative ELBO of scaled numbers with one fixed draw."""

    def __init__(self, spec: dict[str, Any], noise: list[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, self.noise = spec, noise
        self.likelihood = ColumnNLL(spec)

    def build(self, shapes: Any) -> None:
        self.likelihood.build(shapes[1])

    def call(self, inputs: Any) -> Any:
        numbers, hidden, z_mean, z_log_var = inputs
        row = {"numbers": numbers, "present": ops.ones_like(numbers), "fixed_nll": ops.zeros_like(numbers)}
        nll = ops.sum(self.likelihood(hidden, row), axis=-1)
        return (nll + kl_to_standard_normal(z_mean, z_log_var))[:, None]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "spec": self.spec, "noise": self.noise}


@keras.saving.register_keras_serializable(package="benchmarks")
class FixedSampling(keras.layers.Layer):
    """z for one fixed draw."""

    def __init__(self, noise: list[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.noise = noise

    def call(self, inputs: Any) -> Any:
        z_mean, z_log_var = inputs
        return z_mean + ops.exp(0.5 * z_log_var) * ops.convert_to_tensor(self.noise)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "noise": self.noise}


def save_network(bundle: Bundle, path: Path) -> None:
    """The plain bundle's network from scaled numbers `(n, columns)` to scores `(n, 1)`, as a `.keras` file.

    Raises:
        ValueError: It has several members, or another prior than N(0, I).
    """
    if bundle.config.num_members > 1 or bundle.config.prior != "normal":
        raise ValueError("expected one network with the prior N(0, I)")
    (networks,) = build_members(bundle.schema, bundle.config, bundle.weights)
    spec = networks.likelihood.get_config()["spec"]
    numbers = keras.Input((spec["num_numeric"],))
    dense = {layer.name: layer for layer in [*networks.encoder.layers, *networks.decoder.layers]}
    hidden = ops.clip(numbers, -bundle.config.input_clip, bundle.config.input_clip)
    for name in ("encoder_0", "encoder_1"):
        hidden = _copy(dense[name])(hidden)
    z_mean, z_log_var = _copy(dense["z_mean"])(hidden), _copy(dense["z_log_var"])(hidden)
    noise = bundle.noise[0].tolist()
    hidden = FixedSampling(noise)([z_mean, z_log_var])
    for name in ("decoder_0", "decoder_1"):
        hidden = _copy(dense[name])(hidden)
    score = OneSampleScore(spec, noise)
    model = keras.Model(numbers, score([numbers, hidden, z_mean, z_log_var]))
    for layer in model.layers:
        if layer.name in dense:
            layer.set_weights(dense[layer.name].get_weights())
    score.likelihood.set_weights(networks.likelihood.get_weights())
    model.save(path)


def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config(layer.get_config())
