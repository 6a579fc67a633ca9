import dataclasses

import keras
import numpy as np
import pyarrow as pa
import pytest
from scipy import special, stats

from vae_model.config import VAEConfig
from vae_model.encoding import encode
from vae_model.model import build_members, build_vae, member_weights
from vae_model.priors import AggregatePrior
from vae_model.schema import choose_kinds, infer_schema
from vae_model.scoring import ElboScorer
from vae_model.statistics import TableStatistics

CONFIG = VAEConfig(hidden_dims=(8,), latent_dim=2, embedding_dim=2, prior="normal")


def schema_of(table):
    kinds, passthrough = choose_kinds(table.schema)
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    return infer_schema(statistics, table.schema, passthrough)


def mixed_table(n=40):
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "x": rng.normal(size=n),
            "y": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.3),
            "t": pa.array(rng.integers(0, 365 * 86_400, n) * 1_000_000, pa.timestamp("us")),
            "c": pa.array(rng.choice(["a", "b", "c"], n)),
            "d": pa.array(["same"] * n),
        }
    )


def mixed_model(config=CONFIG, seed=3):
    table = mixed_table()
    schema = schema_of(table)
    keras.utils.set_random_seed(0)
    networks = build_vae(schema, config, seed=seed)
    networks.vae.compile(optimizer="sgd")
    return networks, encode(table, schema, config.views).inputs


def with_noise(inputs, latent_dim=2):
    noise = np.random.default_rng(7).standard_normal((len(inputs["present"]), latent_dim))
    return {**inputs, "noise": noise.astype(np.float32)}


def some(inputs, rows):
    return {name: values[rows] for name, values in inputs.items()}


def test_at_beta_one_and_one_noise_the_loss_is_the_mean_score():
    networks, inputs = mixed_model()
    inputs = with_noise(some(inputs, slice(0, 5)))
    loss = networks.vae.evaluate(inputs, verbose=0)
    noise = inputs.pop("noise")
    scores = []
    for row in range(5):
        scorer = ElboScorer([networks], noise[row : row + 1])
        scores.append(scorer.score(some(inputs, slice(row, row + 1))).score[0])
    assert networks.vae.metrics_names[0] == "loss"
    assert loss[0] == pytest.approx(np.mean(scores), rel=1e-5)


def test_the_score_under_a_learned_prior_is_minus_the_elbo_of_its_draws():
    networks, inputs = mixed_model(dataclasses.replace(CONFIG, prior="mixture", num_components=5))
    rng = np.random.default_rng(4)
    networks.prior.start(some(inputs, slice(0, 3)), seed=0)  # fewer rows than components: some begin alike
    networks.kl.logits.assign(rng.normal(size=5))
    means, log_vars = (np.float64(part) for part in networks.encoder.predict(some(inputs, slice(0, 3)), verbose=0))
    found = [np.asarray(part) for part in networks.prior.components()]
    np.testing.assert_allclose(found[0], means[[0, 1, 2, 0, 1]], atol=0.05)  # rows, 0.01 apart, and so their encodings
    np.testing.assert_allclose(found[1], log_vars[[0, 1, 2, 0, 1]], atol=0.05)
    assert not np.allclose(found[0][0], found[0][3], atol=1e-6)
    noise = rng.standard_normal((3, 2)).astype(np.float32)
    scores = ElboScorer([networks], noise).score(inputs)
    z_mean, z_log_var = (np.float64(part) for part in networks.encoder.predict(inputs, verbose=0))
    stddev = np.exp(0.5 * z_log_var)
    weights = special.log_softmax(np.asarray(networks.kl.logits))
    kl = []
    for eps in noise:
        z = z_mean + stddev * eps
        log_p = [
            w + stats.norm.logpdf(z, m, np.exp(0.5 * v)).sum(axis=1)
            for w, m, v in zip(weights, *found[:2], strict=True)
        ]
        kl.append(-special.logsumexp(log_p, axis=0))
    kl = np.mean(kl, axis=0) - stats.norm(z_mean, stddev).entropy().sum(axis=1)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.score, scores.column_nll.sum(axis=1) + scores.kl, rtol=1e-6)


def clustered_posteriors(rng, n):
    """Means and log variances of rows in two narrow clusters and a few anywhere."""
    place = rng.choice([-2.0, 2.0], size=(n, 1)) + 0.1 * rng.normal(size=(n, 2))
    place[: n // 20] = rng.normal(size=(n // 20, 2))
    return place.astype(np.float32), rng.normal(-6, 0.1, (n, 2)).astype(np.float32)


def test_an_aggregate_prior_is_the_mixture_that_validation_rows_find_likeliest():
    rng = np.random.default_rng(1)
    rows, validation = clustered_posteriors(rng, 50), clustered_posteriors(rng, 800)
    prior = AggregatePrior(50, 2)
    prior.fit(rows, validation, seed=0)
    means, log_vars, log_weights = (np.float64(part) for part in prior.components())
    np.testing.assert_array_equal(means[:-1], rows[0])
    assert not means[-1].any()
    assert not log_vars[-1].any()
    assert np.exp(log_weights).sum() == pytest.approx(1, abs=1e-5)
    z = validation[0] + np.exp(0.5 * validation[1]) * rng.standard_normal((800, 2))

    def log_likelihood(widening, share):
        stddev = np.sqrt(np.exp(np.float64(rows[1])) + widening**2)
        near = special.logsumexp(stats.norm.logpdf(z[:, None], rows[0], stddev).sum(axis=2), axis=1) - np.log(50)
        far = stats.norm.logpdf(z).sum(axis=1)
        return np.logaddexp(np.log(share) + near, np.log1p(-share) + far).mean()

    components = zip(log_weights, means, log_vars, strict=True)
    found = [w + stats.norm.logpdf(z, m, np.exp(0.5 * v)).sum(axis=1) for w, m, v in components]
    best = max(log_likelihood(widening, share) for widening in (0, 0.05, 0.1, 0.2, 0.5) for share in (0.8, 0.95, 0.99))
    assert special.logsumexp(found, axis=0).mean() > best - 0.01
    assert best > log_likelihood(0, 0.5) + 0.1  # the oracle itself: it matters which


def test_an_aggregate_prior_of_fewer_rows_than_components_counts_each_alike():
    prior, zeros = AggregatePrior(5, 2), np.zeros((2, 2), np.float32)
    prior.fit((np.array([[1, 1], [2, 2]], np.float32), zeros), (zeros + 1, zeros), seed=0)
    np.testing.assert_array_equal(prior.means[:, 0], [1, 2, 1, 2, 1, 0])
    weights = np.exp(prior.log_weights)
    assert weights[prior.means[:, 0] == 1].sum() == pytest.approx(prior.share / 2, rel=1e-5)
    assert weights[prior.means[:, 0] == 2].sum() == pytest.approx(prior.share / 2, rel=1e-5)
    assert weights[-1] == pytest.approx(1 - prior.share, rel=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1e3, 1e18])
def test_an_aggregate_prior_of_one_validation_row_or_far_encodings_is_finite(spread):
    far = np.full((3, 1), spread, np.float32)
    prior = AggregatePrior(4, 1)
    prior.fit((far, np.zeros_like(far)), (far[:1], np.zeros((1, 1), np.float32)), seed=0)
    assert all(np.isfinite(part).all() for part in prior.components())
    assert np.exp(prior.log_weights).sum() == pytest.approx(1, rel=1e-5)


def test_the_score_under_an_aggregate_prior_is_minus_the_elbo_of_its_draws():
    networks, inputs = mixed_model(dataclasses.replace(CONFIG, prior="aggregate", num_components=30))
    posteriors = clustered_posteriors(np.random.default_rng(2), 30)
    networks.prior.fit(posteriors, posteriors, seed=0)
    noise = np.random.default_rng(4).standard_normal((3, 2)).astype(np.float32)
    scores = ElboScorer([networks], noise).score(inputs)
    z_mean, z_log_var = (np.float64(part) for part in networks.encoder.predict(inputs, verbose=0))
    stddev, kl = np.exp(0.5 * z_log_var), 0
    for eps in noise:
        z = z_mean + stddev * eps
        log_p = [
            w + stats.norm.logpdf(z, m, np.exp(0.5 * v)).sum(axis=1)
            for m, v, w in zip(*networks.prior.components(), strict=True)
        ]
        kl -= special.logsumexp(log_p, axis=0) / len(noise)
    kl -= stats.norm(z_mean, stddev).entropy().sum(axis=1)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.score, scores.column_nll.sum(axis=1) + scores.kl, rtol=1e-6)


def test_the_score_of_several_members_is_the_mean_of_theirs():
    (one, inputs), (other, _) = mixed_model(seed=3), mixed_model(seed=4)
    noise = np.random.default_rng(0).standard_normal((2, 2)).astype(np.float32)
    alone = [ElboScorer([member], noise) for member in (one, other)]
    both = ElboScorer([one, other], noise)
    scores, expected = both.score(inputs), [scorer.score(inputs) for scorer in alone]
    assert not np.allclose(expected[0].score, expected[1].score, atol=1e-3)
    for name in ("column_nll", "kl", "score"):
        mean = np.mean([getattr(terms, name) for terms in expected], axis=0)
        np.testing.assert_allclose(getattr(scores, name), mean, rtol=1e-5, atol=1e-5)
    heads = [scorer.expect(inputs) for scorer in alone]
    np.testing.assert_allclose(both.expect(inputs)["mean"], (heads[0]["mean"] + heads[1]["mean"]) / 2, atol=1e-5)


def test_members_weights_come_back_by_their_numbers():
    config = dataclasses.replace(CONFIG, num_members=2)
    members = [mixed_model(seed=seed)[0] for seed in (3, 4)]
    weights, schema = member_weights(members), schema_of(mixed_table())
    for member, again in zip(members, build_members(schema, config, weights), strict=True):
        assert member.weights.keys() == again.weights.keys()
        assert all(np.array_equal(value, again.weights[path]) for path, value in member.weights.items())
    with pytest.raises(ValueError, match="are in one only"):
        build_members(schema, config, {path: value for path, value in weights.items() if path != "1/z_mean/bias"})
    with pytest.raises(ValueError, match="of 2 members, got also 2/z_mean/bias"):
        build_members(schema, config, weights | {"2/z_mean/bias": np.zeros(2)})


def test_the_kl_moves_the_loss_by_beta_times_its_mean():
    networks, inputs = mixed_model()
    rows = len(inputs["present"])
    z_mean, z_log_var = (np.float64(part) for part in networks.encoder.predict(inputs, verbose=0))
    kl = [
        sum(0.5 * (np.exp(lv) + m * m - 1 - lv) for m, lv in zip(*row, strict=True))
        for row in zip(z_mean, z_log_var, strict=True)
    ]
    losses = []
    for beta in (0.7, 0.0):
        networks.vae.get_layer("kl").weight.assign(beta)
        losses.append(networks.vae.evaluate(with_noise(inputs), batch_size=rows, verbose=0)[0])
    assert np.mean(kl) > 0.01
    assert losses[0] - losses[1] == pytest.approx(0.7 * np.mean(kl), rel=1e-3)


def test_the_loss_of_discrete_rows_never_falls_below_their_entropy():
    # True of every model by Gibbs' inequality, and of no model trained on -KL.
    levels = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    table = pa.table({"c": levels, "d": levels})
    schema = schema_of(table)
    keras.utils.set_random_seed(0)
    networks = build_vae(schema, CONFIG)
    networks.vae.compile(optimizer=keras.optimizers.Adam(0.05))
    inputs = encode(table, schema, CONFIG.views).inputs
    for _ in range(30):
        noise = {"noise": np.random.default_rng(networks.vae.optimizer.iterations.numpy()).normal(size=(60, 2))}
        networks.vae.train_on_batch(inputs | noise)
    many = {name: np.tile(values, (20, 1)) for name, values in inputs.items()}
    loss = networks.vae.evaluate(with_noise(many), batch_size=1200, verbose=0)[0]
    entropy = stats.entropy([30, 20, 10])
    assert entropy < loss < 1.9 * entropy  # less than two columns on their own would cost: it did learn


def test_reconstruction_and_kl_make_up_the_loss_also_over_a_last_batch_of_fewer():
    networks, inputs = mixed_model()
    losses = networks.vae.evaluate(with_noise(inputs), batch_size=27, verbose=0, return_dict=True)
    assert losses["loss"] == pytest.approx(losses["reconstruction_loss"] + losses["kl_loss"], rel=1e-5)


def test_the_reported_kl_is_of_weight_one_whatever_beta_is():
    networks, inputs = mixed_model()
    networks.vae.get_layer("kl").weight.assign(0.0)
    losses = networks.vae.evaluate(with_noise(inputs), verbose=0, return_dict=True)
    assert losses["loss"] == pytest.approx(losses["reconstruction_loss"], rel=1e-6)
    assert losses["kl_loss"] > 0


def test_an_exported_model_gives_the_same_outputs(tmp_path):
    networks, inputs = mixed_model()
    networks.vae.save(tmp_path / "vae.keras")
    expected = networks.vae.predict(with_noise(inputs), verbose=0)
    restored = keras.models.load_model(tmp_path / "vae.keras")
    for name, values in restored.predict(with_noise(inputs), verbose=0).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


def test_weights_move_to_another_network():
    networks, inputs = mixed_model()
    other, _ = mixed_model(seed=9)
    for weight in other.vae.trainable_weights:
        weight.assign(weight + 1)
    other.load_weights(networks.weights)
    noise = np.zeros((1, 2), np.float32)
    np.testing.assert_array_equal(
        ElboScorer([other], noise).score(inputs).score, ElboScorer([networks], noise).score(inputs).score
    )


def test_weights_of_another_shape_are_refused():
    networks, _ = mixed_model()
    path = next(path for path in networks.weights if "encoder_0/kernel" in path)
    with pytest.raises(ValueError, match=rf"weights: {path}: expected shape \(.*\), got \(1, 1\)"):
        networks.load_weights(networks.weights | {path: np.zeros((1, 1))})


def test_absent_weights_are_refused():
    networks, _ = mixed_model()
    weights = networks.weights
    weights.pop(next(path for path in weights if "z_mean/bias" in path))
    with pytest.raises(ValueError, match="z_mean/bias are in one only"):
        networks.load_weights(weights)


@pytest.mark.parametrize(
    "columns",
    [["x"], ["t"], ["c"], ["d", "y"], ["x", "y", "t", "c", "d"]],
    ids="-".join,
)
def test_any_mix_of_columns_makes_a_model_with_finite_scores(columns):
    table = mixed_table().select(columns)
    schema = schema_of(table)
    networks = build_vae(schema, VAEConfig(hidden_dims=(4,)))
    scores = ElboScorer([networks], np.zeros((1, networks.encoder.outputs[0].shape[-1]), np.float32)).score(
        encode(table, schema, CONFIG.views).inputs
    )
    assert scores.column_nll.shape == (40, len(columns))
    assert np.isfinite(scores.score).all()


def test_a_network_may_have_no_hidden_layers():
    networks, inputs = mixed_model(VAEConfig(hidden_dims=(), latent_dim=2))
    assert np.isfinite(networks.vae.evaluate(with_noise(inputs), verbose=0)).all()


def test_a_column_whose_missingness_varies_is_enough_for_a_model():
    table = pa.table({"d": pa.array(["same", None] * 20)})
    schema = schema_of(table)
    networks = build_vae(schema, CONFIG)
    scorer = ElboScorer([networks], np.zeros((1, 2), np.float32))
    nll = scorer.score(encode(table, schema, CONFIG.views).inputs).column_nll
    # Untrained: present and missing are a coin's two sides; the level itself costs next to nothing.
    np.testing.assert_allclose(nll, np.log(2), atol=0.1)
