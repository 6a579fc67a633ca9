"""Terms of the negative evidence lower bound, in nats: pure functions of tensors.

-ELBO(x) = -E_q[log p(x|z)] + KL(q(z|x) || p(z))   (Kingma and Welling, 2014)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

LOG_2PI = math.log(2 * math.pi)


def kl_to_standard_normal(mean: Any, log_var: Any) -> Any:
    """KL(N(mean, exp(log_var)) || N(0, I)), from `(batch, latent_dim)` to `(batch,)`.

    0.5 (tr S + mu'mu - k - log det S), for the diagonal S = exp(log_var).
    """
    # expm1: `exp(log_var) - 1 - log_var` cancels to noise near the prior in float32.
    return 0.5 * ops.sum(ops.square(mean) + ops.expm1(log_var) - log_var, axis=-1)


def kl_to_mixture(mean: Any, log_var: Any, draws: Sequence[Any], mixture: tuple[Any, Any, Any]) -> Any:
    """E_q[log q(z) - log p(z)] for q = N(mean, exp(log_var)) and p a mixture, `(batch,)`.

    E_q[log q] is closed, E_q[log p] the mean over `draws` of q, each `(batch, latent_dim)`: without bias, so that the
    ELBO stays a bound in expectation (Tomczak and Welling, 2018, equation 3).
    """
    entropy = 0.5 * ops.sum(1 + LOG_2PI + log_var, axis=-1)
    log_p = [mixture_log_density(z, *mixture) for z in draws]
    return -entropy - sum(log_p[1:], log_p[0]) / len(log_p)


def mixture_log_density(z: Any, means: Any, log_vars: Any, log_weights: Any) -> Any:
    """Log Σ_c w_c N(z; means_c, exp(log_vars_c)), from `(batch, latent_dim)` to `(batch,)`.

    The components' means and log variances are `(components, latent_dim)`, their log weights `(components,)`.
    """
    precisions = ops.exp(-log_vars)
    # Two products of matrices instead of a cube of differences.
    squares = ops.matmul(ops.square(z), ops.transpose(precisions))
    squares += ops.sum(ops.square(means) * precisions, axis=-1)
    squares -= 2 * ops.matmul(z, ops.transpose(means * precisions))
    log_densities = -0.5 * (squares + ops.sum(log_vars + LOG_2PI, axis=-1))
    return ops.logsumexp(log_weights + log_densities, axis=-1)


def gaussian_nll(x: Any, mean: Any, log_var: Any) -> Any:
    """-log N(x; mean, exp(log_var)), elementwise."""
    return 0.5 * (ops.square(x - mean) * ops.exp(-log_var) + log_var + LOG_2PI)


def robust_gaussian_nll(x: Any, mean: Any, log_var: Any, background: float) -> Any:
    """-log[(1 - b) N(x; mean, exp(log_var)) + b Cauchy(x; 0, 1)], elementwise.

    The background is a proper density that no latent moves: it bounds what one wild value can cost
    (Hampel's contamination model; Tukey 1960), and so what it can hide.
    """
    core = ops.exp(math.log1p(-background) - gaussian_nll(x, mean, log_var))
    # Far out the core vanishes and the tail must not: float32 holds it up to |x| = 1e15.
    return -ops.log(core + background / math.pi / (1 + ops.minimum(ops.square(x), 1e30)))


def log_bessel_i0(kappa: Any) -> Any:
    """Log I0(kappa) for kappa >= 0, within 2e-7 (Abramowitz and Stegun 1964, 9.8.1 and 9.8.2)."""
    small = ops.square(ops.minimum(kappa, 3.75) / 3.75)
    large = 3.75 / ops.maximum(kappa, 3.75)
    series = _polynomial(small, (3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813))
    asymptotic = _polynomial(
        large,
        (0.01328592, 0.00225319, -0.00157565, 0.00916281, -0.02057706, 0.02635537, -0.01647633, 0.00392377),
    )
    tail = ops.maximum(kappa, 3.75)
    far = tail - 0.5 * ops.log(tail) + ops.log(0.39894228 + asymptotic)
    return ops.where(kappa < 3.75, ops.log1p(series), far)


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """c1 x + c2 x^2 + ..., by Horner's rule."""
    total = ops.zeros_like(x)
    for c in reversed(coefficients):
        total = (total + c) * x
    return total


def robust_von_mises_nll(angle: Any, cosine: Any, sine: Any, max_kappa: Any, background: float) -> Any:
    """-log[(1 - b) VonMises(angle; direction, kappa) + b / 2 pi], elementwise, radians.

    The direction and concentration kappa are those of the vector (cosine, sine), its length kept
    under `max_kappa`.
    """
    length = ops.sqrt(ops.square(cosine) + ops.square(sine) + 1e-12)
    kappa = max_kappa * length / (max_kappa + length)
    aligned = (ops.cos(angle) * cosine + ops.sin(angle) * sine) / length
    core = math.log1p(-background) + kappa * aligned - LOG_2PI - log_bessel_i0(kappa)
    return -ops.logaddexp(core, ops.full_like(core, math.log(background) - LOG_2PI))


def bernoulli_nll(event: Any, logit: Any, max_logit: Any) -> Any:
    """-log p(event) for event 0 or 1 and p = sigmoid(logit), kept within sigmoid(+-max_logit); elementwise."""
    # Soft: a logit at its bound must still feel the loss.
    logit = max_logit * ops.tanh(logit / max_logit)
    return ops.softplus(logit) - event * logit
