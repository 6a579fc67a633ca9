import json
import math

import keras
import numpy as np
import pytest
from scipy import integrate, stats

from vae_model.layers import (
    ColumnNLL,
    EncoderInputs,
    KLDivergence,
    LikelihoodSpec,
    MixtureKLDivergence,
    PseudoInputs,
    Sampling,
)
from vae_model.losses import kl_to_standard_normal

RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=(7, 3)).astype(np.float32)
LOG_VAR = RNG.normal(size=(7, 3)).astype(np.float32)


def kl_by_textbook(mean, log_var):
    """KL(N(m, S) || N(0, I)) of one row, by trace and determinant in float64."""
    mean, covariance = np.float64(mean), np.diag(np.exp(np.float64(log_var)))
    return 0.5 * (np.trace(covariance) + mean @ mean - len(mean) - np.linalg.slogdet(covariance)[1])


MEAN_KL = np.mean([kl_by_textbook(m, lv) for m, lv in zip(MEAN, LOG_VAR, strict=True)])


def kl_model(beta=1.0, **options):
    """A model whose only loss is the layer's."""
    inputs = [keras.Input((3,), name="mean"), keras.Input((3,), name="log_var")]
    model = keras.Model(inputs, KLDivergence(beta, name="kl", **options)(inputs))
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


# ---- KLDivergence ------------------------------------------------------------------------------


def test_kl_layer_passes_its_inputs_through():
    mean, log_var = KLDivergence()([MEAN, LOG_VAR])
    np.testing.assert_array_equal(mean, MEAN)
    np.testing.assert_array_equal(log_var, LOG_VAR)


def test_kl_layer_adds_beta_times_the_mean_kl_to_the_loss():
    layer = KLDivergence(0.3)
    layer([MEAN, LOG_VAR])
    assert float(sum(layer.losses)) == pytest.approx(0.3 * MEAN_KL, rel=1e-6)


def test_kl_loss_averages_rows_also_over_a_last_batch_of_fewer():
    loss = kl_model().evaluate([MEAN, LOG_VAR], batch_size=3, verbose=0)  # batches of 3, 3 and 1 rows
    assert loss == pytest.approx(MEAN_KL, rel=1e-5)


def test_beta_can_be_warmed_up_inside_a_compiled_fit():
    model = kl_model()
    betas = [0.0, 0.25, 1.0]
    warm_up = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: model.get_layer("kl").weight.assign(betas[epoch])
    )
    history = model.fit([MEAN, LOG_VAR], batch_size=7, epochs=3, callbacks=[warm_up], verbose=0).history
    np.testing.assert_allclose(history["loss"], np.multiply(betas, MEAN_KL), rtol=1e-5)


def test_kl_layer_is_float32_under_mixed_precision():
    log_var = np.full((2, 3), 20, np.float32)  # exp(20) is beyond float16
    mean = np.full((2, 3), 0.1234567, np.float32)
    layer = KLDivergence(0.1, dtype="mixed_float16")
    outputs = layer([keras.ops.convert_to_tensor(mean), keras.ops.convert_to_tensor(log_var)])
    assert float(sum(layer.losses)) == pytest.approx(0.1 * kl_by_textbook(mean[0], log_var[0]), rel=1e-6)
    assert layer.weight.dtype == "float32"
    np.testing.assert_array_equal(outputs[0], mean)


def test_kl_of_float16_inputs_is_taken_in_float32():
    layer = KLDivergence(dtype="mixed_float16")
    layer([keras.ops.zeros((2, 3), "float16"), keras.ops.full((2, 3), 12, "float16")])
    assert float(sum(layer.losses)) == pytest.approx(kl_by_textbook(np.zeros(3), np.full(3, 12)), rel=1e-6)


def test_kl_layer_is_float32_inside_a_compiled_mixed_precision_model():
    model = kl_model(0.1, dtype="mixed_float16")
    loss = model.evaluate([MEAN, np.full_like(MEAN, 20)], verbose=0)
    expected = 0.1 * np.mean([kl_by_textbook(m, np.full(3, 20)) for m in MEAN])
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0, got (-0\.1|nan)"):
        KLDivergence(beta)


def test_kl_layer_comes_back_from_its_configuration():
    layer = KLDivergence.from_config(json.loads(json.dumps(KLDivergence(0.3, name="mine").get_config())))
    layer([MEAN, LOG_VAR])
    assert layer.name == "mine"
    assert float(layer.weight) == pytest.approx(0.3)


def test_kl_layers_weight_comes_back_from_a_saved_model(tmp_path):
    model = kl_model(1.0)
    model.get_layer("kl").weight.assign(0.25)  # in the middle of a warm-up
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert restored.get_layer("kl").beta == 1.0
    assert restored.evaluate([MEAN, LOG_VAR], verbose=0) == pytest.approx(0.25 * MEAN_KL, rel=1e-5)


# ---- MixtureKLDivergence -----------------------------------------------------------------------

COMPONENTS = [np.eye(2, 3, dtype=np.float32), np.full((2, 3), -0.5, np.float32)]


def test_the_mixtures_layer_adds_beta_times_the_mean_divergence_to_the_loss():
    layer = MixtureKLDivergence(beta=0.3)
    divergence = np.asarray(layer([MEAN, LOG_VAR, MEAN, *COMPONENTS]))
    assert divergence.shape == MEAN.shape[:1]
    assert float(layer.losses[0]) == pytest.approx(0.3 * divergence.mean(), rel=1e-6)


def test_pseudo_inputs_learn_where_the_rows_encodings_lie():
    # In two clusters: a learned prior costs log 2 nats for the choice and little else, N(0, I) five.
    rng = np.random.default_rng(0)
    mean = np.where(rng.random((400, 1)) < 0.5, 2.0, -2.0).astype(np.float32) * np.ones((1, 2), np.float32)
    log_var = np.full((400, 2), -2.0, np.float32)
    z = mean + np.exp(0.5 * log_var) * rng.normal(size=mean.shape).astype(np.float32)
    inputs = [keras.Input((2,)) for _ in range(3)]
    pseudo_inputs, layer = PseudoInputs(8), MixtureKLDivergence()
    means = pseudo_inputs(inputs[0])
    assert means.shape == (8, 2)
    model = keras.Model(inputs, layer([*inputs, means, 0 * means - 2]))
    pseudo_inputs.vectors.assign(rng.normal(size=(8, 2)))
    model.compile(keras.optimizers.Adam(0.1))
    model.fit([mean, log_var, z], epochs=40, batch_size=100, verbose=0)
    learned = np.asarray(layer([mean, log_var, z, pseudo_inputs.vectors, np.full((8, 2), -2.0)])).mean()
    assert learned == pytest.approx(np.log(2), abs=0.15)
    assert np.asarray(kl_to_standard_normal(mean, log_var)).mean() > 5


@pytest.mark.parametrize("layer", [MixtureKLDivergence(0.3, name="mine"), PseudoInputs(7, name="mine")])
def test_the_mixtures_layers_come_back_from_their_configuration(layer):
    again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert again.get_config() == layer.get_config()


def test_beta_is_not_trained():
    model = kl_model()
    assert model.trainable_weights == []


# ---- Sampling ----------------------------------------------------------------------------------


def test_samples_have_the_moments_they_are_asked_for():
    n = 20_000
    mean, log_var = np.full((n, 2), [1.0, -3.0], np.float32), np.full((n, 2), [0.0, -2.0], np.float32)
    noise = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    z = np.asarray(Sampling()([mean, log_var, noise]))
    for column, m, stddev in ((0, 1.0, 1.0), (1, -3.0, math.exp(-1))):
        assert stats.kstest(z[:, column], stats.norm(m, stddev).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(z.T)[0, 1]) < 4 / math.sqrt(n)


def test_sampling_uses_its_noise_in_evaluation_too():
    zeros = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(Sampling()([zeros, zeros, zeros + 2], training=False), zeros + 2)


def test_sampling_survives_a_huge_variance_under_mixed_precision():
    layer = Sampling(dtype="mixed_float16")
    zeros = np.zeros((2, 3), np.float32)
    z = layer([zeros, zeros + 4, zeros + 5])
    assert keras.backend.standardize_dtype(z.dtype) == "float16"
    np.testing.assert_allclose(np.asarray(z), 5 * math.exp(2), rtol=1e-3)


# ---- EncoderInputs -----------------------------------------------------------------------------


def encoder_inputs(**row):
    layer = EncoderInputs(num_classes=[2, 3], embedding_dim=2, nullable=[0], angle_features=[1, 1], clip=20.0)
    usual = {"numbers": [0.5], "angles": [0.0, math.pi / 2], "categories": [1, 1], "present": [1.0, 1, 1, 1]}
    inputs = {name: np.array([value], np.float32) for name, value in (usual | row).items()}
    inputs["categories"] = inputs["categories"].astype(np.int32)
    return np.asarray(layer(inputs))[0], layer


def test_the_encoder_reads_numbers_circles_embeddings_and_missing_flags():
    vector, layer = encoder_inputs(categories=[2, 3])
    table = np.asarray(layer.embeddings)
    expected = [0.5, 1, 0, 0, 1, *table[1], *table[2 + 2], 0]
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_unseen_categories_embed_as_zeros():
    vector, _ = encoder_inputs(categories=[0, 0])
    np.testing.assert_array_equal(vector[5:9], 0)


def test_the_encoder_is_shown_clipped_numbers():
    assert encoder_inputs(numbers=[7000.0])[0][0] == 20


def test_a_missing_time_has_no_direction():
    np.testing.assert_array_equal(encoder_inputs(present=[1.0, 0, 1, 1])[0][1:5], 0)


def test_a_missing_value_raises_its_flag():
    assert encoder_inputs(present=[0.0, 1, 1, 1])[0][-1] == 1


# ---- ColumnNLL ---------------------------------------------------------------------------------

# Sizes of four different paddings, not in order, two of one padding: the groups permute the columns.
SHARES = [[1 / 9] * 9, [0.5, 0.3, 0.2], [0.9, 0.1], [0.1, 0.2, 0.3, 0.2, 0.2], [0.25, 0.5, 0.25], [0.6, 0.4]]
SPEC = LikelihoodSpec(
    num_features=9,  # one number, one time, six categories, one constant
    num_numeric=1,
    stddev_floors=[0.1],
    angle_features=[1, 1],
    max_kappas=[20.0, 5.0],
    class_probabilities=SHARES,
    nullable=[0, 3, 8],
    num_rows=50,
    background=1e-3,
)


def likelihood(spec=SPEC, hidden_dim=4, seed=0):
    """A layer with large random weights, and one hidden vector."""
    rng = np.random.default_rng(seed)
    layer = ColumnNLL(spec)
    hidden = rng.normal(size=(1, hidden_dim)).astype(np.float32)
    layer(hidden, rows(1, spec))
    layer.kernel.assign(rng.normal(size=layer.kernel.shape))
    layer.bias.assign(rng.normal(size=layer.bias.shape))
    return layer, hidden


def rows(n, spec=SPEC, **changes):
    inputs = {
        "numbers": np.zeros((n, len(spec.stddev_floors)), np.float32),
        "angles": np.zeros((n, len(spec.angle_features)), np.float32),
        "categories": np.ones((n, len(spec.class_probabilities)), np.int32),
        "present": np.ones((n, spec.num_features), np.float32),
        "fixed_nll": np.zeros((n, spec.num_features), np.float32),
    }
    for name, (column, values) in changes.items():
        inputs[name][:, column] = values
    return inputs


def column_nll(inputs, spec=SPEC):
    layer, hidden = likelihood(spec)
    return np.asarray(layer(np.repeat(hidden, len(inputs["present"]), axis=0), inputs)).astype(np.float64)


@pytest.mark.parametrize("column", range(len(SHARES)))
def test_the_classes_of_a_category_have_probability_one_in_all(column):
    size = len(SHARES[column])
    feature = 2 + column
    nll = column_nll(rows(size + 1, categories=(column, [*range(1, size + 1), 1]), present=(feature, [1] * size + [0])))
    if feature in SPEC.nullable:
        assert np.exp(-nll[:, feature]).sum() == pytest.approx(1, rel=1e-5)  # the last row is a missing value
    else:
        assert np.exp(-nll[:-1, feature]).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("column", range(len(SHARES)))
def test_a_category_moves_the_nll_of_its_own_column_only(column):
    nll = column_nll(rows(2, categories=(column, [1, 2])))
    assert np.flatnonzero(nll[0] != nll[1]).tolist() == [2 + column]


def test_under_a_full_background_a_class_costs_its_share_of_the_training_rows():
    spec = LikelihoodSpec(**{**vars(SPEC), "background": 1 - 1e-7, "nullable": []})
    for column, shares in enumerate(SHARES):
        nll = column_nll(rows(len(shares), spec, categories=(column, np.arange(1, len(shares) + 1))), spec)
        np.testing.assert_allclose(np.exp(-nll[:, 2 + column]), shares, rtol=1e-4)


def test_categories_are_a_softmax_of_their_own_logits():
    layer, hidden = likelihood()
    outputs = np.asarray(hidden, np.float64) @ np.asarray(layer.kernel, np.float64) + np.asarray(layer.bias)
    # Heads in order: 1 mean, 2 cosines, 2 sines, then the groups by padded size: columns 2 and 5 (2 wide) first.
    logits = outputs[0, 5:9].reshape(2, 2)
    for column, own in zip((2, 5), logits, strict=True):
        p = np.exp(own) / np.exp(own).sum()
        expected = (1 - SPEC.background) * p + SPEC.background * np.array(SHARES[column])
        nll = column_nll(rows(2, categories=(column, [1, 2])))
        np.testing.assert_allclose(np.exp(-nll[:, 2 + column]), expected, rtol=1e-5)


def test_an_unseen_category_costs_only_what_the_encoding_says():
    nll = column_nll(rows(1, categories=(0, 0), fixed_nll=(2, 6.5)))
    assert nll[0, 2] == pytest.approx(6.5)


def test_a_nullable_number_has_density_one_in_all():
    # x = tan(u) brings the tails of the background within reach.
    u = np.linspace(-math.pi / 2, math.pi / 2, 100_003)[1:-1]
    nll = column_nll(rows(len(u), numbers=(0, np.tan(u))))[:, 0]
    missing = column_nll(rows(1, present=(0, 0)))[0, 0]
    total = integrate.trapezoid(np.exp(-nll) / np.cos(u) ** 2, u) + math.exp(-missing)
    assert total == pytest.approx(1, abs=1e-4)


def test_a_time_has_density_one_in_all():
    angles = np.linspace(-math.pi, math.pi, 201)[:-1]
    hour, weekday = (grid.ravel() for grid in np.meshgrid(angles, angles))
    inputs = rows(len(hour))
    inputs["angles"][:, 0], inputs["angles"][:, 1] = hour, weekday
    nll = column_nll(inputs)[:, 1]
    # A periodic function's mean over even points is its integral, very nearly.
    assert np.exp(-nll).mean() * (2 * math.pi) ** 2 == pytest.approx(1, abs=1e-4)


def test_presence_and_absence_of_a_constant_have_probability_one():
    nll = column_nll(rows(2, present=(8, [1, 0])))[:, 8]
    assert np.exp(-nll).sum() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("name", "column", "feature"), [("numbers", 0, 0), ("angles", 0, 1), ("categories", 1, 3)])
def test_a_missing_cells_value_does_not_matter(name, column, feature):
    nll = column_nll(rows(3, present=(feature, 0), **{name: (column, [0, 1, 3])}))
    assert np.ptp(nll[:, feature]) == 0


def test_a_column_without_a_likelihood_of_its_own_costs_its_fixed_nats():
    spec = LikelihoodSpec(**{**vars(SPEC), "nullable": []})
    nll = column_nll(rows(2, spec, fixed_nll=(8, [0.25, 9.0])), spec)
    np.testing.assert_allclose(nll[:, 8], [0.25, 9.0])


def test_the_views_of_a_number_add_up():
    spec = LikelihoodSpec(
        num_features=2,
        num_numeric=2,
        stddev_floors=[1.0, 1.0, 1.0, 1.0],
        angle_features=[],
        max_kappas=[],
        class_probabilities=[],
        nullable=[],
        num_rows=10,
        background=1e-9,
    )
    layer = ColumnNLL(spec)
    inputs = {
        "numbers": np.array([[0.1, 0.2, 1.3, 1.4]], np.float32),  # first view of both columns, then the second
        "present": np.ones((1, 2), np.float32),
        "fixed_nll": np.zeros((1, 2), np.float32),
    }
    hidden = np.zeros((1, 3), np.float32)
    layer(hidden, inputs)
    layer.log_var.assign(np.log([3.0, 3.0, 3.0, 3.0]))  # plus the floor: a variance of 4
    density = -stats.norm.logpdf([[0.1, 1.3], [0.2, 1.4]], scale=2).sum(axis=1)
    np.testing.assert_allclose(np.asarray(layer(hidden, inputs))[0], density, rtol=1e-5)


def test_no_standard_deviation_goes_below_its_floor():
    layer, _ = likelihood()
    layer.log_var.assign([-100.0])
    assert math.exp(0.5 * float(np.asarray(layer.number_log_var())[0])) == pytest.approx(0.1, rel=1e-6)


def test_likelihoods_are_float32_under_mixed_precision():
    layer = ColumnNLL(SPEC, dtype="mixed_float16")
    exact = ColumnNLL(SPEC)
    inputs = rows(3, numbers=(0, [0.1234567, 300.123, 7000]), fixed_nll=(8, 11.2345678))
    hidden = RNG.normal(size=(3, 4)).astype(np.float32)
    exact(hidden, inputs)
    layer(hidden, inputs)
    layer.set_weights(exact.get_weights())
    inputs = {name: keras.ops.convert_to_tensor(values) for name, values in inputs.items()}
    hidden = keras.ops.convert_to_tensor(hidden)
    np.testing.assert_allclose(layer(hidden, inputs), exact(hidden, inputs), rtol=1e-6)


def test_likelihoods_come_back_from_their_configuration():
    layer, hidden = likelihood()
    copy = ColumnNLL.from_config(json.loads(json.dumps(layer.get_config())))
    inputs = rows(1)
    copy(hidden, inputs)
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(copy(hidden, inputs), layer(hidden, inputs))
