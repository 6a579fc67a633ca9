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
_NO_WEIGHT = -100.0  # as a log weight
_NUM_DRAWS, _NUM_EM_STEPS, _BLOCK_CELLS = 4, 20, 1 << 22

Posteriors = tuple[np.ndarray, np.ndarray]  # means and log variances, `(n, latent_dim)`


@dataclass(frozen=True)
class MixturePrior:
    """p(z): a mixture of the encodings of pseudo-inputs."""

    as_vector: EncoderInputs
    encode: Callable[[Any], tuple[Any, Any]]  # vectors to means and log variances
    pseudo_inputs: PseudoInputs
    kl: MixtureKLDivergence

    @property
    def num_gaussians(self) -> int:
        """In the mixture."""
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
    """p(z) of a score: N(0, I), under which the network was trained, mixed with the encodings q(z|x) of some rows.

    They estimate the aggregate posterior, which of all priors makes the mean ELBO greatest (Tomczak and Welling, 2018,
    equation 6). Any p(z) gives an ELBO. How wide each encoding is made and the share of N(0, I) are those that other
    rows find likeliest. Before `fit` it is N(0, I).

    Args:
        num_rows: Rows whose encodings are components.
        latent_dim: Latents k.

    Attributes:
        means: `(num_rows + 1, latent_dim)`, the last of N(0, I); `log_vars` likewise, `log_weights (num_rows + 1,)`.
    """

    def __init__(self, num_rows: int, latent_dim: int) -> None:
        self.means = np.zeros((num_rows + 1, latent_dim), np.float32)
        self.log_vars = np.zeros_like(self.means)
        self.log_weights = np.append(np.full(num_rows, _NO_WEIGHT), 0).astype(np.float32)

    @property
    def num_gaussians(self) -> int:
        """In the mixture, N(0, I) included."""
        return len(self.means)

    @property
    def share(self) -> float:
        """Of the encodings in the mixture, in [0, 1]."""
        return -math.expm1(min(float(self.log_weights[-1]), 0.0))

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The arrays by path, to be kept with the network's; to change one is to change the prior."""
        return {f"aggregate_prior/{name}": getattr(self, name) for name in ("means", "log_vars", "log_weights")}

    def components(self) -> list[np.ndarray]:
        """Means and log variances `(components, latent_dim)`, and log weights `(components,)`."""
        return [self.means, self.log_vars, self.log_weights]

    def fit(self, rows: Posteriors, validation: Posteriors, seed: int) -> None:
        """Sets the components.

        Args:
            rows: `z_mean` and `z_log_var (n, latent_dim)` of rows; each counts alike, also where they are too few.
            validation: Those of other rows.
            seed: Of the draws of their q(z|x).
        """
        num_rows, n = len(self.means) - 1, len(rows[0])
        means, log_vars = (np.resize(part, self.means[1:].shape) for part in rows)
        places = np.arange(num_rows) % n
        equal = -np.log(min(n, num_rows) * np.bincount(places)[places]).astype(np.float32)
        z_mean, z_log_var = validation
        noise = np.random.default_rng(seed).standard_normal((_NUM_DRAWS, *z_mean.shape), np.float32)
        z = (z_mean + np.exp(0.5 * z_log_var) * noise).reshape(-1, z_mean.shape[1])
        blocks = np.array_split(z, math.ceil(len(z) * num_rows / _BLOCK_CELLS))
        log_normal = -np.asarray(gaussian_nll(z, 0.0, 0.0)).sum(axis=1)
        best = -math.inf
        for widening in _WIDENINGS:
            wider = np.maximum(np.log(np.exp(log_vars) + np.float32(widening**2)), MIN_COMPONENT_LOG_VAR)
            log_rows = np.concatenate([np.asarray(mixture_log_density(block, means, wider, equal)) for block in blocks])
            share, log_likelihood = _likeliest_share(log_rows, log_normal)
            if log_likelihood > best:
                best = log_likelihood
                self.means[:-1], self.log_vars[:-1] = means, wider
                self.log_weights[:-1], self.log_weights[-1] = equal + math.log(share), math.log1p(-share)


def _likeliest_share(log_p: np.ndarray, log_other: np.ndarray) -> tuple[float, float]:
    """The share of the density p in a mixture of two `(n,)`, by EM, and the mean log likelihood."""
    share = 0.5
    for _ in range(_NUM_EM_STEPS):
        odds = np.clip(log_p - log_other + math.log(share / (1 - share)), -50, 50)
        share = float(np.clip((1 / (1 + np.exp(-odds))).mean(), *_SHARES))
    return share, float(np.logaddexp(log_p + math.log(share), log_other + math.log1p(-share)).mean())
