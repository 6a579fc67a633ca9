"""The anomaly score: a row's negative ELBO, the same in every batch, process and retry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from vae_model.losses import kl_to_mixture, kl_to_standard_normal
from vae_model.model import Networks

MAX_BATCH_ROWS = 8192
_BATCH_CELLS = 1 << 21  # of the widest tensors: 8 MiB each, near the size of a cache


@dataclass(frozen=True)
class Scores:
    """Of n rows, in nats: `score = column_nll.sum(axis=1) + kl`, higher is more anomalous.

    Args:
        column_nll: `(n, features)` float32, E_q[-log p(x_j|z)] of every feature.
        kl: `(n,)` float32, KL(q(z|x) || p(z)); where the prior is a mixture, as the score's draws estimate it, which
            may be below 0.
    """

    column_nll: np.ndarray
    kl: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """`(n,)` float32."""
        return self.column_nll.sum(axis=1) + self.kl


class ElboScorer:
    """Negative ELBO with fixed noise, the mean of those of all members.

    Args:
        members: The trained networks, of one schema and configuration.
        noise: `(samples, latent_dim)`, drawn once at training time and kept in the bundle. Every row
            uses the same draws, so that its score depends on nothing but the row.
    """

    def __init__(self, members: Sequence[Networks], noise: np.ndarray) -> None:
        self._members, self.noise = members, noise

    def score(self, inputs: dict[str, np.ndarray]) -> Scores:
        """Scores encoded rows, see `EncodedTable.inputs`."""
        column_nll, kl = _in_batches(self._elbo_terms, inputs, self._batch_rows)
        return Scores(column_nll, kl)

    def latents(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """`z_mean` and `z_log_var (n, latent_dim)` of encoded rows, by the first member."""
        z_mean, z_log_var = _in_batches(self._latents, inputs, self._batch_rows)
        return z_mean, z_log_var

    def expect(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the decoders expect of encoded rows, at `z = z_mean`: the mean of the likelihoods' parameters by head.

        `classes (n, learned categories)` are the likeliest ones.
        """
        parts = _in_batches(self._heads, inputs, self._batch_rows)
        return dict(zip(sorted(self._head_names()), parts, strict=True))

    @property
    def number_stddev(self) -> np.ndarray:
        """`(views * numeric,)` standard deviation of each encoded number, the members' root mean square."""
        log_vars = np.array([member.likelihood.number_log_var() for member in self._members])
        return np.sqrt(np.exp(log_vars).mean(axis=0))

    @cached_property
    def _batch_rows(self) -> int:
        """Rows at a time: fewer of wide ones, so that memory stays within bounds."""
        likelihood = self._members[0].likelihood
        prior = self._members[0].prior
        num_gaussians = prior.num_gaussians if prior else 0
        width = max(sum(likelihood.heads.values()), likelihood.spec.num_features, num_gaussians)
        return int(np.clip(_BATCH_CELLS // width, 64, MAX_BATCH_ROWS))

    # One graph for every batch size, traced on first use.

    @cached_property
    def _elbo_terms(self) -> Any:
        # Priors that are mixtures, as constants of the graph; None for the others.
        mixtures = [member.prior and member.prior.components() for member in self._members]
        return self._compile(lambda inputs: self._elbo_terms_eagerly(inputs, mixtures))

    @cached_property
    def _latents(self) -> Any:
        return self._compile(lambda inputs: tuple(self._members[0].encoder(inputs, training=False)))

    @cached_property
    def _heads(self) -> Any:
        return self._compile(self._heads_eagerly)

    def _compile(self, function: Any) -> Any:
        signature = {
            tensor.name: tf.TensorSpec((None, tensor.shape[-1]), tensor.dtype)
            for tensor in self._members[0].encoder.inputs
        }
        return tf.function(function, input_signature=[signature], autograph=False).get_concrete_function()

    def _elbo_terms_eagerly(self, inputs: dict[str, Any], mixtures: Sequence[Any]) -> tuple[Any, Any]:
        column_nll, kl = [], []
        for member, mixture in zip(self._members, mixtures, strict=True):
            z_mean, z_log_var = member.encoder(inputs, training=False)
            stddev = ops.exp(0.5 * z_log_var)
            draws = [z_mean + stddev * eps for eps in self.noise]
            column_nll += [member.likelihood(member.decoder(z, training=False), inputs) for z in draws]
            if mixture is None:
                kl.append(kl_to_standard_normal(z_mean, z_log_var))
            else:
                kl.append(kl_to_mixture(z_mean, z_log_var, draws, mixture))
        return _mean(column_nll), _mean(kl)

    def _head_names(self) -> list[str]:
        names = self._members[0].likelihood.heads
        return ["classes" if name == "logits" else name for name in names]

    def _heads_eagerly(self, inputs: dict[str, Any]) -> list[Any]:
        decoded = []
        for member in self._members:
            z_mean, _ = member.encoder(inputs, training=False)
            decoded.append(member.likelihood.decode(member.decoder(z_mean, training=False)))
        heads = {name: _mean([each[name] for each in decoded]) for name in decoded[0]}
        likelihood = self._members[0].likelihood
        if "logits" in heads:
            groups = likelihood.category_logits(heads.pop("logits"))
            order = np.argsort([column for columns, _ in groups for column in columns])
            classes = ops.concatenate([ops.argmax(block, axis=-1) + 1 for _, block in groups], axis=-1)
            heads["classes"] = ops.take(classes, order, axis=1)
        return [heads[name] for name in sorted(heads)]


def _mean(values: Sequence[Any]) -> Any:
    return sum(values[1:], values[0]) / len(values)


def _in_batches(function: Any, inputs: dict[str, np.ndarray], max_rows: int) -> list[np.ndarray]:
    n = len(inputs["present"])
    batches = []
    for start in range(0, max(n, 1), max_rows):
        batch = {name: tf.convert_to_tensor(values[start : start + max_rows]) for name, values in inputs.items()}
        batches.append([part.numpy() for part in function(batch)])
    return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*batches, strict=True)]


def draw_noise(num_samples: int, latent_dim: int, seed: int) -> np.ndarray:
    """`(num_samples, latent_dim)` float32 standard normal draws, by latent of mean 0 and variance 1 where even.

    Then they give the expectation of whatever is quadratic in z exactly, that of log N(z; 0, I) too.
    """
    rng = np.random.default_rng(seed)
    if num_samples % 2:
        return rng.standard_normal((num_samples, latent_dim)).astype(np.float32)
    half = rng.standard_normal((num_samples // 2, latent_dim))
    half /= np.sqrt(np.square(half).mean(axis=0))
    return np.concatenate([half, -half]).astype(np.float32)
