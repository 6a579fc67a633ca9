import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, special, stats

from vae_model.losses import (
    bernoulli_nll,
    gaussian_nll,
    kl_to_mixture,
    kl_to_standard_normal,
    log_bessel_i0,
    mixture_log_density,
    robust_gaussian_nll,
    robust_von_mises_nll,
)

BACKGROUND = 1e-3


def density(nll, *args):
    """A function of one float for scipy's integration."""
    return lambda x: math.exp(-float(nll(np.float64(x), *args)))


# ---- KL ----------------------------------------------------------------------------------------


def test_kl_matches_a_monte_carlo_estimate():
    rng = np.random.default_rng(0)
    mean, log_var = np.array([[0.5, -1.0]]), np.array([[0.2, -0.7]])
    z = mean + np.exp(0.5 * log_var) * rng.normal(size=(200_000, 2))
    ratio = stats.norm.logpdf(z, mean, np.exp(0.5 * log_var)) - stats.norm.logpdf(z)
    per_draw = ratio.sum(axis=1)
    error = 4 * per_draw.std() / math.sqrt(len(per_draw))
    assert float(kl_to_standard_normal(mean, log_var)[0]) == pytest.approx(per_draw.mean(), abs=error)


@pytest.mark.parametrize(("mean", "log_var"), [(0.0, 0.0), (1.5, -2.0), (-3.0, 1.0), (0.1, -8.0)])
def test_kl_of_one_latent_is_the_integral_that_defines_it(mean, log_var):
    q = stats.norm(mean, math.exp(0.5 * log_var))
    low, high = q.ppf([1e-14, 1 - 1e-14])
    expected, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), low, high, limit=200)
    assert float(kl_to_standard_normal(np.array([mean]), np.array([log_var]))) == pytest.approx(expected, abs=1e-7)


def test_kl_is_the_trace_and_determinant_formula():
    rng = np.random.default_rng(1)
    mean, log_var = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    for m, lv, kl in zip(mean, log_var, np.asarray(kl_to_standard_normal(mean, log_var)), strict=True):
        covariance = np.diag(np.exp(lv))
        expected = 0.5 * (np.trace(covariance) + m @ m - 4 - np.linalg.slogdet(covariance)[1])
        assert kl == pytest.approx(expected, rel=1e-12)


def test_kl_is_one_value_per_row_and_sums_over_latents():
    mean, log_var = np.array([[1.0, 2.0], [0.0, 0.0]]), np.zeros((2, 2))
    np.testing.assert_allclose(kl_to_standard_normal(mean, log_var), [2.5, 0.0])


def test_kl_keeps_its_digits_near_the_prior_in_float32():
    log_var = np.full((1, 1), 1e-3, np.float32)
    exact = 0.5 * (math.expm1(float(log_var[0, 0])) - float(log_var[0, 0]))  # about 2.5e-7
    assert float(kl_to_standard_normal(np.zeros_like(log_var), log_var)[0]) == pytest.approx(exact, rel=1e-3)


def some_mixture(rng, num_components=3, latent_dim=2):
    weights = np.log(rng.dirichlet(np.ones(num_components)))
    return rng.normal(size=(num_components, latent_dim)), rng.normal(size=(num_components, latent_dim)), weights


def test_a_mixtures_log_density_is_scipys():
    rng = np.random.default_rng(2)
    means, log_vars, weights = some_mixture(rng)
    z = 3 * rng.normal(size=(20, 2))
    components = [stats.multivariate_normal(m, np.diag(np.exp(v))) for m, v in zip(means, log_vars, strict=True)]
    expected = special.logsumexp([w + c.logpdf(z) for w, c in zip(weights, components, strict=True)], axis=0)
    np.testing.assert_allclose(mixture_log_density(z, means, log_vars, weights), expected, rtol=1e-10)


def test_kl_to_a_mixture_is_the_integral_that_defines_it():
    rng = np.random.default_rng(3)
    mixture = some_mixture(rng, latent_dim=1)
    q = stats.norm(0.4, math.exp(-0.3))

    def p(z):
        logs = stats.norm.logpdf(z, mixture[0][:, 0], np.exp(0.5 * mixture[1][:, 0]))
        return special.logsumexp(mixture[2] + logs)

    low, high = q.ppf([1e-13, 1 - 1e-13])
    expected, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p(z)), low, high, limit=200)
    # Quantiles at equal distances in probability: a quadrature of E_q, a node per row.
    z = q.ppf((np.arange(20_000) + 0.5) / 20_000)[:, None]
    kl = kl_to_mixture(np.full_like(z, 0.4), np.full_like(z, -0.6), [z], mixture)
    # The entropy of q is closed; E_q[log q] of these nodes misses a little of the tails.
    assert float(np.mean(kl)) == pytest.approx(expected, abs=1e-3)


def test_kl_to_a_mixture_of_one_standard_normal_is_the_closed_one_on_average():
    rng = np.random.default_rng(4)
    mean, log_var = np.array([[0.5, -1.0, 2.0]]), np.array([[0.2, -0.7, 0.0]])
    rows = np.ones((20_000, 1))
    draws = [mean + np.exp(0.5 * log_var) * rng.normal(size=(20_000, 3)) for _ in range(2)]
    one = np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1)
    kl = np.asarray(kl_to_mixture(rows * mean, rows * log_var, draws, one))
    assert kl.mean() == pytest.approx(float(kl_to_standard_normal(mean, log_var)[0]), abs=5 * kl.std() / 141)


def test_kl_is_never_negative_in_float32():
    log_var = np.linspace(-1e-2, 1e-2, 401, dtype=np.float32)[:, None]
    assert np.asarray(kl_to_standard_normal(np.zeros_like(log_var), log_var)).min() >= 0


# ---- numbers -----------------------------------------------------------------------------------


def test_gaussian_nll_is_scipys():
    rng = np.random.default_rng(2)
    x, mean, log_var = rng.normal(size=(3, 50))
    expected = -stats.norm.logpdf(x, mean, np.exp(0.5 * log_var))
    np.testing.assert_allclose(gaussian_nll(x, mean, log_var), expected, rtol=1e-12)


def test_robust_gaussian_is_scipys_mixture():
    rng = np.random.default_rng(3)
    x, mean, log_var = 5 * rng.normal(size=50), rng.normal(size=50), rng.normal(size=50)
    parts = [stats.norm.logpdf(x, mean, np.exp(0.5 * log_var)), stats.cauchy.logpdf(x)]
    expected = -special.logsumexp(parts, axis=0, b=[[1 - BACKGROUND], [BACKGROUND]])
    np.testing.assert_allclose(robust_gaussian_nll(x, mean, log_var, BACKGROUND), expected, rtol=1e-10)


@pytest.mark.parametrize(("mean", "stddev"), [(0.0, 1.0), (2.0, 0.03), (-7.0, 4.0)])
def test_robust_gaussian_integrates_to_one(mean, stddev):
    p = density(robust_gaussian_nll, np.float64(mean), np.float64(2 * math.log(stddev)), BACKGROUND)
    edges = [-np.inf, mean - 9 * stddev, mean, mean + 9 * stddev, np.inf]
    total = sum(integrate.quad(p, a, b, limit=200)[0] for a, b in itertools.pairwise(edges))
    assert total == pytest.approx(1, abs=1e-6)


def test_robust_gaussian_is_finite_and_grows_slowly_for_wild_values():
    x = np.array([1e2, 1e3, 1e4, -1e4], np.float32)
    nll = np.asarray(robust_gaussian_nll(x, np.float32(0), np.full(4, math.log(9e-4), np.float32), 1e-4))
    # The tail is Cauchy's, so ten times further costs 2 log 10.
    np.testing.assert_allclose(np.diff(nll)[:2], 2 * math.log(10), rtol=1e-3)
    assert nll[2] == nll[3]


def test_robust_gaussian_has_finite_gradients_for_wild_values():
    x, mean, log_var = tf.constant([1e4, 0.0]), tf.Variable([0.0, 1e4]), tf.Variable([-7.0, -7.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(robust_gaussian_nll(x, mean, log_var, 1e-4))
    assert np.isfinite(tape.gradient(loss, [mean, log_var])).all()


# ---- angles ------------------------------------------------------------------------------------


def test_log_bessel_i0_is_scipys():
    kappa = np.concatenate([np.linspace(0, 10, 500), np.geomspace(10, 1e5, 200)])
    expected = np.log(special.ive(0, kappa)) + kappa
    np.testing.assert_allclose(np.asarray(log_bessel_i0(kappa)), expected, rtol=0, atol=1e-6)


def test_log_bessel_i0_in_float32_loses_only_float32s_own_digits():
    kappa = np.linspace(0, 1000, 2001, dtype=np.float32)
    expected = np.log(special.ive(0, kappa.astype(np.float64))) + kappa
    np.testing.assert_allclose(np.asarray(log_bessel_i0(kappa)), expected, rtol=3e-7, atol=1e-6)


def kappa_of(length, max_kappa):
    return 1 / (1 / length + 1 / max_kappa)  # two resistors in parallel: the smaller one decides


def test_robust_von_mises_is_scipys_mixture():
    angle = np.linspace(-math.pi, math.pi, 41)
    length, direction, max_kappa = 3.0, 0.7, 50.0
    vector = np.float64(length * np.cos(direction)), np.float64(length * np.sin(direction))
    nll = robust_von_mises_nll(angle, *vector, np.float64(max_kappa), BACKGROUND)
    parts = [stats.vonmises.pdf(angle, kappa_of(length, max_kappa), loc=direction), np.full(41, 1 / (2 * math.pi))]
    expected = -np.log((1 - BACKGROUND) * parts[0] + BACKGROUND * parts[1])
    np.testing.assert_allclose(np.asarray(nll), expected, atol=1e-6)


@pytest.mark.parametrize(("length", "max_kappa"), [(1e-9, 10.0), (2.0, 10.0), (1e4, 1111.0)])
def test_robust_von_mises_integrates_to_one(length, max_kappa):
    p = density(robust_von_mises_nll, np.float64(length), np.float64(0), np.float64(max_kappa), BACKGROUND)
    total = sum(integrate.quad(p, a, b, limit=200)[0] for a, b in [(-math.pi, -0.3), (-0.3, 0.3), (0.3, math.pi)])
    assert total == pytest.approx(1, abs=1e-6)


def test_robust_von_mises_does_not_feel_a_whole_turn():
    angles = np.array([0.4, 0.4 + 2 * math.pi])
    first, second = np.asarray(robust_von_mises_nll(angles, np.float64(2), np.float64(-1), np.float64(50), BACKGROUND))
    assert first == pytest.approx(second, rel=1e-9)


def test_robust_von_mises_has_a_gradient_where_no_direction_is_known():
    cosine, sine = tf.Variable([0.0]), tf.Variable([0.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(robust_von_mises_nll(tf.constant([0.5]), cosine, sine, np.float32(50), BACKGROUND))
    # Near length 0, the log density is kappa cos(angle - direction): its gradient is the point itself.
    np.testing.assert_allclose(
        np.ravel(tape.gradient(loss, [cosine, sine])),
        [-(1 - BACKGROUND) * math.cos(0.5), -(1 - BACKGROUND) * math.sin(0.5)],
        rtol=1e-3,
    )


# ---- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-1e6, -3.0, 0.0, 0.4, 1e6])
def test_bernoulli_probabilities_sum_to_one(logit):
    event, other = (math.exp(-float(bernoulli_nll(e, np.float64(logit), math.log(101)))) for e in (1.0, 0.0))
    assert event + other == pytest.approx(1, rel=1e-9)


def test_bernoulli_is_scipys_where_the_bound_is_far():
    logits = np.linspace(-3, 3, 7)
    nll = np.asarray(bernoulli_nll(np.ones(7), logits, np.float64(1e4)))
    np.testing.assert_allclose(nll, -stats.bernoulli.logpmf(1, special.expit(logits)), rtol=1e-5)


def test_bernoulli_probability_stays_within_its_bounds():
    n = 98
    nll = np.asarray(bernoulli_nll(np.array([1.0, 1.0]), np.array([-1e9, 1e9]), math.log(n + 1)))
    np.testing.assert_allclose(np.exp(-nll), [1 / (n + 2), 1 - 1 / (n + 2)], rtol=1e-9)


def test_bernoulli_logit_beyond_its_bound_still_feels_the_loss():
    logit = tf.Variable([6.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(bernoulli_nll(tf.constant([0.0]), logit, math.log(99)))
    assert float(tape.gradient(loss, logit)[0]) > 0
