"""Priors p(z) that are mixtures; N(0, I) needs none of this."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_model.layers import EncoderInputs, MixtureKLDivergence, PseudoInputs
from vae_model.losses import gaussian_nll, mixture_log_density

MIN_COMPONENT_LOG_VAR = -6.0  # narrower ones would cost a score its last digits in float32
_WIDENINGS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  # tried; added to an encoding's standard deviations, in squares
_SHARES = (0.01, 0.99)  # of encodings in an aggregate prior, least and greatest
_NUM_DRAWS, _NUM_EM_STEPS, _BLOCK_CELLS = 4, 20, 1 << 16


@dataclass(frozen=True)
class MixturePrior:
    """p(z): a mixture of the encodings of pseudo-inputs."""

    as_vector: EncoderInputs
    encode: Callable[[Any], tuple[Any, Any]]  # vectors to means and log variances
    pseudo_inputs: PseudoInputs
    kl: MixtureKLDivergence

    @property
    def num_components(self) -> int:
        """Gaussians."""
        return self.pseudo_inputs.num_rows

    def start(self, inputs: dict[str, np.ndarray], seed: int) -> None:
        """Begins with some rows of the training table, see `EncodedTable.inputs`; a little apart where they repeat."""
        shape = tuple(self.pseudo_inputs.vectors.shape)
        vectors = np.resize(np.asarray(self.as_vector(inputs), np.float32), shape)
        apart = 0.01 * np.random.default_rng(seed).standard_normal(shape, np.float32)
        self.pseudo_inputs.vectors.assign(vectors + apart)

    def components(self) -> list[np.ndarray]:
        """Means and log variances `(components, latent_dim)`, and log weights `(components,)`."""
        parts = *self.encode(self.pseudo_inputs.vectors), self.kl.log_weights()
        return [np.asarray(part) for part in parts]


class AggregatePrior:
    """p(z) of a score: N(0, I), which trained, mixed with the encodings of training rows, the aggregate posterior.

    Of all priors the aggregate posterior makes the mean ELBO greatest (Tomczak and Welling, 2018, equation 6). Any
    p(z) gives an ELBO, and the network stays as the closed KL divergence trained it. How wide each encoding is made,
    and the share of N(0, I), are those that validation rows find likeliest.

    Args:
        num_components: Encodings of rows.
        latent_dim: Latents k.
    """

    def __init__(self, num_components: int, latent_dim: int) -> None:
        shape = (num_components + 1, latent_dim)  # the last is N(0, I)
        self.weights = {
            "aggregate_prior/means": np.zeros(shape, np.float32),
            "aggregate_prior/log_vars": np.zeros(shape, np.float32),
            "aggregate_prior/log_weights": np.full(shape[:1], -math.log(shape[0]), np.float32),
        }

    @property
    def num_components(self) -> int:
        """Gaussians, N(0, I) included."""
        return len(self.weights["aggregate_prior/means"])

    def components(self) -> list[np.ndarray]:
        """Means and log variances `(components + 1, latent_dim)`, and log weights `(components + 1,)`."""
        return list(self.weights.values())

    def fit(self, rows: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], seed: int) -> None:
        """Sets the components.

        Args:
            rows: `z_mean` and `z_log_var (n, latent_dim)` of training rows; taken several times where they are few.
            validation: Those of validation rows.
            seed: Of the draws of the validation rows' q(z|x).
        """
        means, log_vars, log_weights = self.weights.values()
        num_rows = len(means) - 1
        row_means, row_log_vars = (np.resize(part, means[1:].shape) for part in rows)
        equal = np.full(num_rows, -math.log(num_rows), np.float32)
        z_mean, z_log_var = validation
        noise = np.random.default_rng(seed).standard_normal((_NUM_DRAWS, *z_mean.shape), np.float32)
        z = (z_mean + np.exp(0.5 * z_log_var) * noise).reshape(-1, z_mean.shape[1])
        blocks = np.array_split(z, math.ceil(z.size / _BLOCK_CELLS))
        log_normal = -np.asarray(gaussian_nll(z, 0.0, 0.0)).sum(axis=1)
        best = -math.inf
        for widening in _WIDENINGS:
            wider = np.maximum(np.log(np.exp(row_log_vars) + np.float32(widening**2)), MIN_COMPONENT_LOG_VAR)
            log_rows = np.concatenate([np.asarray(mixture_log_density(x, row_means, wider, equal)) for x in blocks])
            share, log_likelihood = _likeliest_share(log_rows, log_normal)
            if log_likelihood > best:
                best = log_likelihood
                means[:num_rows], log_vars[:num_rows] = row_means, wider
                log_weights[:num_rows], log_weights[num_rows] = equal + math.log(share), math.log1p(-share)


def _likeliest_share(log_p: np.ndarray, log_other: np.ndarray) -> tuple[float, float]:
    """The share of the density p in a mixture of two `(n,)`, by EM, and the mean log likelihood."""
    share = 0.5
    for _ in range(_NUM_EM_STEPS):
        odds = np.clip(log_p - log_other + math.log(share / (1 - share)), -50, 50)
        share = float(np.clip((1 / (1 + np.exp(-odds))).mean(), *_SHARES))
    return share, float(np.logaddexp(log_p + math.log(share), log_other + math.log1p(-share)).mean())
