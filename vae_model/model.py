"""The network: plain functional Keras, built from a schema and a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from vae_model.config import VAEConfig
from vae_model.layers import (
    ColumnNLL,
    EncoderInputs,
    KLDivergence,
    LikelihoodSpec,
    MixtureKLDivergence,
    PseudoInputs,
    Sampling,
    silu,
)
from vae_model.losses import kl_to_standard_normal
from vae_model.priors import MIN_COMPONENT_LOG_VAR, AggregatePrior, MixturePrior
from vae_model.schema import TableSchema

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"KERAS_BACKEND: expected tensorflow, got {keras.backend.backend()}; unset it or set it to tensorflow"
    )

LOG_VAR_RANGE = (-10.0, 4.0)  # of q(z|x): without bounds, wide sparse tables end in NaN


@keras.saving.register_keras_serializable(package="vae_model")
class VAE(keras.Model):
    """A functional model whose loss is the batch's mean negative ELBO: mean of Σ column_nll, plus the KL layer's term.

    Inputs: those of `EncodedTable`, and `noise (batch, latent_dim)`, standard normal. Outputs: `column_nll
    (batch, features)`, `kl (batch,)`, `z_mean` and `z_log_var (batch, latent_dim)`.
    """

    num_replicas = 1  # devices that train it together

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reconstruction_loss = keras.metrics.Mean("reconstruction_loss")
        self._kl_loss = keras.metrics.Mean("kl_loss")

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        # Row by row, so that a last batch of fewer rows counts for no more than its rows.
        reconstruction = ops.sum(y_pred["column_nll"], axis=-1)
        self._reconstruction_loss.update_state(reconstruction)
        self._kl_loss.update_state(y_pred["kl"])
        # Plus: -ELBO = -E_q[log p(x|z)] + KL. With a minus the loss has no lower bound.
        # Divided as Keras's own losses are: gradients are summed over devices, and the loss that is told is multiplied.
        return (ops.mean(reconstruction) + sum(self.losses)) / self.num_replicas


@dataclass(frozen=True)
class Networks:
    """The parts of one VAE, sharing weights."""

    vae: VAE
    encoder: keras.Model  # inputs to [z_mean, z_log_var]
    decoder: keras.Model  # z to its last hidden layer
    likelihood: ColumnNLL
    kl: KLDivergence
    prior: MixturePrior | AggregatePrior | None = None  # None: N(0, I)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Every weight by its path."""
        own = {weight.path: np.asarray(weight) for weight in self.vae.weights}
        return own | {path: weight.copy() for path, weight in self._prior_weights.items()}

    @property
    def _prior_weights(self) -> dict[str, np.ndarray]:
        """Those that are not the network's, to be changed in place."""
        return self.prior.weights if isinstance(self.prior, AggregatePrior) else {}

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets every weight.

        Raises:
            ValueError: A weight is absent, left over, or of another shape.
        """
        mine = {weight.path: weight for weight in self.vae.weights} | self._prior_weights
        if set(mine) != set(weights):
            odd = sorted(set(mine) ^ set(weights))
            raise ValueError(f"weights: expected those of this network, but {', '.join(odd[:3])} are in one only")
        for path, weight in mine.items():
            if tuple(weight.shape) != weights[path].shape:
                raise ValueError(f"weights: {path}: expected shape {tuple(weight.shape)}, got {weights[path].shape}")
            if isinstance(weight, np.ndarray):
                weight[:] = weights[path]
            else:
                weight.assign(weights[path])


def build_vae(schema: TableSchema, config: VAEConfig, *, seed: int = 0) -> Networks:
    """The encoder, the decoder, the likelihoods and the model that trains them."""
    spec = likelihood_spec(schema, config)
    inputs = _inputs(schema, config)
    as_vector = EncoderInputs(
        num_classes=[feature.num_classes for feature in schema.learned_categories],
        embedding_dim=config.embedding_dim,
        nullable=spec.nullable,
        angle_features=spec.angle_features,
        clip=config.input_clip,
        name="encoder_inputs",
    )
    vector = as_vector(inputs)
    latent_dim = config.latent_dim or max(2, min(16, vector.shape[-1]))
    layers = [keras.layers.Dense(width, silu, name=f"encoder_{i}") for i, width in enumerate(config.hidden_dims)]
    to_mean = keras.layers.Dense(latent_dim, dtype="float32", name="z_mean")
    start_small = keras.initializers.RandomNormal(stddev=0.01, seed=seed)
    to_log_var = keras.layers.Dense(latent_dim, dtype="float32", kernel_initializer=start_small, name="z_log_var")

    def encode(hidden: Any) -> tuple[Any, Any]:
        for layer in layers:
            hidden = layer(hidden)
        return to_mean(hidden), ops.clip(to_log_var(hidden), *LOG_VAR_RANGE)

    def encode_components(rows: Any) -> tuple[Any, Any]:
        means, log_vars = encode(rows)
        return means, ops.maximum(log_vars, MIN_COMPONENT_LOG_VAR)

    z_mean, z_log_var = encode(vector)
    encoder = keras.Model(inputs, [z_mean, z_log_var], name="encoder")

    z_input = hidden = keras.Input((latent_dim,), name="z")
    for i, width in enumerate(reversed(config.hidden_dims)):
        hidden = keras.layers.Dense(width, silu, name=f"decoder_{i}")(hidden)
    decoder = keras.Model(z_input, hidden, name="decoder")

    likelihood = ColumnNLL(spec, name="likelihood")
    noise = keras.Input((latent_dim,), name="noise")
    sample = Sampling(name="sampling")
    prior: MixturePrior | AggregatePrior | None
    kl_layer: KLDivergence
    if config.prior != "mixture":
        kl_layer = KLDivergence(config.beta, name="kl")
        z_mean, z_log_var = kl_layer([z_mean, z_log_var])
        z, kl = sample([z_mean, z_log_var, noise]), kl_to_standard_normal(z_mean, z_log_var)
        prior = AggregatePrior(config.num_components, latent_dim) if config.prior == "aggregate" else None
    else:
        kl_layer = MixtureKLDivergence(config.beta, name="kl")
        pseudo_inputs = PseudoInputs(config.num_components, name="pseudo_inputs")
        z = sample([z_mean, z_log_var, noise])
        kl = kl_layer([z_mean, z_log_var, z, *encode_components(pseudo_inputs(vector))])
        prior = MixturePrior(as_vector, encode_components, pseudo_inputs, kl_layer)
    outputs = {"column_nll": likelihood(decoder(z), inputs), "kl": kl, "z_mean": z_mean, "z_log_var": z_log_var}
    vae = VAE({**inputs, "noise": noise}, outputs, name="vae")
    return Networks(vae, encoder, decoder, likelihood, kl_layer, prior)


def build_members(schema: TableSchema, config: VAEConfig, weights: dict[str, np.ndarray]) -> list[Networks]:
    """The networks of a trained model, one for each member, see `member_weights`.

    Raises:
        ValueError: A weight is absent, left over, or of another shape.
    """
    members = []
    for prefix in _prefixes(config.num_members):
        mine = {path.removeprefix(prefix): value for path, value in weights.items() if path.startswith(prefix)}
        members.append(build_vae(schema, config))
        members[-1].load_weights(mine)
    if left_over := sorted(set(weights) - set(member_weights(members))):
        raise ValueError(f"weights: expected those of {len(members)} members, got also {', '.join(left_over[:3])}")
    return members


def member_weights(members: Sequence[Networks]) -> dict[str, np.ndarray]:
    """The weights of all members by path, which begins with the number of the member where there are several."""
    prefixes = _prefixes(len(members))
    return {
        f"{prefix}{path}": value
        for prefix, member in zip(prefixes, members, strict=True)
        for path, value in member.weights.items()
    }


def _prefixes(num_members: int) -> list[str]:
    return [f"{i}/" for i in range(num_members)] if num_members > 1 else [""]


def _inputs(schema: TableSchema, config: VAEConfig) -> dict[str, Any]:
    widths = {
        "numbers": len(config.views) * len(schema.numeric),
        "angles": sum(len(feature.parts) for feature in schema.timestamps),
        "categories": len(schema.learned_categories),
        "present": len(schema.features),
        "fixed_nll": len(schema.features),
    }
    return {
        name: keras.Input((width,), name=name, dtype="int32" if name == "categories" else "float32")
        for name, width in widths.items()
        if width
    }


def likelihood_spec(schema: TableSchema, config: VAEConfig) -> LikelihoodSpec:
    """The constants of every column's likelihood."""

    def floor(resolution: float) -> float:
        # Rounding to a grid adds a uniform error of stddev resolution / sqrt(12): no likelihood may
        # claim to be sharper.
        return max(config.min_stddev, resolution / math.sqrt(12))

    positions = {name: position for position, name in enumerate(schema.names)}
    return LikelihoodSpec(
        num_features=len(schema.features),
        num_numeric=len(schema.numeric),
        stddev_floors=[floor(f.resolution_of(view)) for view in config.views for f in schema.numeric],
        angle_features=[positions[f.name] for f in schema.timestamps for _ in f.parts],
        max_kappas=[floor(resolution) ** -2 for f in schema.timestamps for resolution in f.resolutions],
        class_probabilities=[f.class_probabilities.tolist() for f in schema.learned_categories],
        nullable=[position for position, feature in enumerate(schema.features) if feature.nullable],
        num_rows=max(feature.num_rows for feature in schema.features),
        background=config.background,
    )
