import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ks_2samp

from vae_model import TrainingConfig, VAEConfig, fit
from vae_model.encoding import encode
from vae_model.model import Networks, build_vae
from vae_model.schema import TableSchema, choose_kinds, infer_schema
from vae_model.scoring import ElboScorer, draw_noise
from vae_model.statistics import TableStatistics
from vae_model.training import TrainedModel, Trainer, TrainingError, _executions, default_batch_size, default_steps

CONFIG = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=2)
NUM_TRAIN = 1000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """1,500 rows of three columns that one cause moves: little to trace, so that training is quick."""
    rng = np.random.default_rng(0)
    cause = rng.normal(size=1500)
    return pa.table({name: cause * (i + 1) + rng.normal(scale=0.3, size=1500) for i, name in enumerate("abc")})


@pytest.fixture(scope="module")
def schema(table) -> TableSchema:
    kinds, passthrough = choose_kinds(table.schema)
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    return infer_schema(statistics, table.schema, passthrough)


@pytest.fixture(scope="module")
def inputs(schema, table) -> dict[str, np.ndarray]:
    """The rows as the network reads them; the first 1,000 train."""
    return encode(table, schema, CONFIG.views).inputs


@pytest.fixture(scope="module")
def validation(inputs) -> dict[str, np.ndarray]:
    return {name: values[NUM_TRAIN:] for name, values in inputs.items()}


@pytest.fixture(scope="module")
def run(schema, inputs, validation):
    """Trains on the inputs, with what a test changes."""

    def shuffled(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        order = rng.permutation(NUM_TRAIN)
        yield {name: values[order] for name, values in inputs.items()}

    def run(config: VAEConfig = CONFIG, shuffled=shuffled, validation=validation, **training) -> TrainedModel:
        settings = TrainingConfig(**{"batch_size": 50, "learning_rate": 0.01, "patience": None} | training)
        return Trainer(schema, config, settings).train(num_rows=NUM_TRAIN, shuffled=shuffled, validation=validation)

    return run


@pytest.fixture(scope="module")
def trained(run) -> TrainedModel:
    """100 steps, of which 60 warm beta up to 2."""
    return run(dataclasses.replace(CONFIG, beta=2.0), max_steps=100, kl_warmup=0.6)


@pytest.fixture(scope="module")
def mixed_networks(bundle) -> Networks:
    """Those of the bundle, under the prior that trained them."""
    networks = build_vae(bundle.schema, dataclasses.replace(bundle.config, prior="normal"))
    networks.load_weights({path: bundle.weights[path] for path in networks.weights})
    return networks


@pytest.fixture(scope="module")
def mixed_inputs(bundle, mixed_table) -> dict[str, np.ndarray]:
    return encode(mixed_table, bundle.schema, bundle.config.views).inputs


def evaluate(
    networks: Networks, inputs: dict[str, np.ndarray], beta: float, seed: int = 0
) -> tuple[float, dict[str, np.ndarray]]:
    """The model's own loss of one batch, and its outputs for the same draws of z."""
    networks.vae.compile(jit_compile=False)
    networks.kl.weight.assign(beta)
    noise = np.random.default_rng(seed).standard_normal((len(inputs["present"]), networks.encoder.outputs[0].shape[-1]))
    inputs = inputs | {"noise": noise.astype(np.float32)}
    outputs = {name: np.asarray(value, np.float64) for name, value in networks.vae(inputs).items()}
    losses = networks.vae.evaluate(inputs, batch_size=len(inputs["present"]), verbose=0, return_dict=True)
    return losses["loss"], outputs


def kl_of(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """KL(N(m, s^2) || N(0, 1)) summed over latents, in numpy."""
    mean, variance = outputs["z_mean"], np.exp(outputs["z_log_var"])
    return 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(axis=1)


# ---- the loss --------------------------------------------------------------------------------------


def test_at_beta_one_the_loss_is_the_mean_negative_elbo(mixed_networks, mixed_inputs):
    loss, outputs = evaluate(mixed_networks, mixed_inputs, beta=1.0)
    assert loss == pytest.approx((outputs["column_nll"].sum(axis=1) + kl_of(outputs)).mean(), rel=1e-5)


def test_the_loss_estimates_the_mean_score(mixed_networks, mixed_inputs):
    losses = [evaluate(mixed_networks, mixed_inputs, beta=1.0, seed=seed)[0] for seed in range(20)]
    noise = draw_noise(32, 4, seed=1)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T, bias=True))).T  # exact second moments
    scorer = ElboScorer([mixed_networks], noise)
    assert np.mean(losses) == pytest.approx(scorer.score(mixed_inputs).score.mean(), abs=0.02)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_kl_raises_the_loss_beta_times(mixed_networks, mixed_inputs, beta):
    loss, outputs = evaluate(mixed_networks, mixed_inputs, beta=beta)
    assert kl_of(outputs).mean() > 0.5
    assert loss - outputs["column_nll"].sum(axis=1).mean() == pytest.approx(beta * kl_of(outputs).mean(), abs=2e-4)


def test_training_without_kl_leaves_more_of_it(run, trained):
    free = run(dataclasses.replace(CONFIG, beta=0.0), max_steps=100).summary
    assert free["val_kl_loss"] > 1.5 * trained.summary["val_kl_loss"]
    assert free["val_loss"] == pytest.approx(free["val_reconstruction_loss"], rel=1e-5)


def test_training_lowers_the_loss(trained):
    reconstruction = [entry["val_reconstruction_loss"] for entry in trained.history]
    assert reconstruction[-1] < reconstruction[0] - 1


def test_a_loss_that_is_not_finite_ends_training(run):
    with pytest.raises(TrainingError, match=r"the loss is not finite at step \d+ .*lower learning_rate"):
        run(max_steps=200, learning_rate=1e30)


def test_a_validation_loss_that_is_not_finite_ends_training(run, validation):
    broken = validation | {"fixed_nll": validation["fixed_nll"].copy()}
    broken["fixed_nll"][3, 0] = np.nan
    with pytest.raises(TrainingError, match="the validation loss is not finite at step 4"):
        run(max_steps=100, validation=broken)


# ---- history, warm-up, stopping --------------------------------------------------------------------


def test_history_has_both_terms_at_every_validation(trained):
    losses = ["loss", "reconstruction_loss", "kl_loss"]
    assert [entry["step"] for entry in trained.history] == list(range(4, 101, 4))
    for entry in trained.history:
        assert set(entry) == {"step", "beta", *losses, *(f"val_{name}" for name in losses)}


def test_beta_rises_over_the_warmup_and_stays(trained):
    expected = 2.0 * np.minimum(1, np.arange(4, 101, 4) / 60)
    np.testing.assert_allclose([entry["beta"] for entry in trained.history], expected, rtol=1e-6)


def test_a_validation_weighs_kl_by_the_beta_of_its_step(trained):
    for entry in trained.history:
        expected = entry["val_reconstruction_loss"] + entry["beta"] * entry["val_kl_loss"]
        assert entry["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_best_step_lies_after_the_warmup(trained):
    # While beta is small the loss is smaller too, and means something else.
    counted = [entry for entry in trained.history if entry["step"] >= 60]
    best = min(counted, key=lambda entry: entry["val_loss"])
    assert (trained.summary["best_step"], trained.summary["val_loss"]) == (best["step"], best["val_loss"])


@pytest.mark.parametrize(("max_steps", "expected"), [(1, 1), (7, 7), (305, 300)])
def test_training_takes_max_steps_at_most(run, max_steps, expected):
    summary = run(max_steps=max_steps).summary
    assert summary["steps"] == summary["max_steps"] == expected
    assert not summary["stopped_early"]


def test_training_stops_early_but_not_before_the_warmup_ends(run):
    # Steps too small to gain anything: validations differ by their draws alone.
    trained = run(max_steps=100, learning_rate=1e-12, kl_warmup=0.5, patience=3)
    losses = [entry["val_loss"] for entry in trained.history if entry["step"] >= 50]
    assert trained.summary["stopped_early"]
    assert 50 < trained.summary["steps"] < 100
    assert len(losses) == np.argmin(losses) + 1 + 3


def test_the_best_weights_come_back(run, inputs, validation):
    passes = 0

    def spoilt(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        nonlocal passes
        passes += 1  # a pass is 20 steps; those after step 80 teach nonsense
        order = rng.permutation(NUM_TRAIN)
        block = {name: values[order] for name, values in inputs.items()}
        yield block if passes <= 4 else block | {"numbers": 8 - block["numbers"]}

    trained = run(shuffled=spoilt, max_steps=250)
    losses = [entry["val_loss"] for entry in trained.history]
    assert losses[-1] > min(losses) + 1
    assert trained.summary["val_loss"] == min(losses)
    again = np.mean([evaluate(trained.members[0], validation, 1.0, seed)[0] for seed in range(5)])
    assert again == pytest.approx(min(losses), abs=0.3)


def test_the_default_number_of_steps_follows_the_rows():
    assert default_steps(100, 256) == 2000
    assert default_steps(40_000, 256) == 3906
    assert default_steps(10**8, 256) == 6000
    assert [default_batch_size(n) for n in (1, 4095, 4096, 8191, 8192, 10**8)] == [64, 64, 128, 128, 256, 256]


# ---- the posterior ---------------------------------------------------------------------------------


def test_kl_per_latent_sums_to_the_validation_kl(trained, validation):
    outputs = {name: np.asarray(value) for name, value in evaluate(trained.members[0], validation, 1.0)[1].items()}
    assert len(trained.summary["kl_per_latent"]) == 2
    assert sum(trained.summary["kl_per_latent"]) == pytest.approx(kl_of(outputs).mean(), abs=1e-3)


def test_a_collapsed_posterior_is_warned_of(caplog):
    noise = pa.table({name: np.random.default_rng(i).normal(size=1200) for i, name in enumerate("abc")})
    config = dataclasses.replace(CONFIG, beta=50.0)
    with caplog.at_level(logging.WARNING, logger="vae_model"):
        bundle = fit(noise, config, TrainingConfig(max_steps=200, kl_warmup=0.0, learning_rate=0.01))
    assert bundle.card["training"]["active_units"] == 0
    assert max(bundle.card["training"]["kl_per_latent"]) < 0.01
    assert "the posterior collapsed: no latent varies with the row" in caplog.text


def test_a_posterior_in_use_is_not_warned_of(run, caplog):
    with caplog.at_level(logging.WARNING, logger="vae_model"):
        summary = run(max_steps=250).summary
    assert summary["active_units"] >= 1
    assert "collapsed" not in caplog.text


# ---- seeds -----------------------------------------------------------------------------------------

SMALL = {"max_steps": 30, "calibration_fraction": 0.2, "patience": None}


@pytest.fixture(scope="module")
def version(table) -> str:
    return fit(table, CONFIG, TrainingConfig(**SMALL)).model_version


def test_an_aggregate_prior_leaves_the_network_as_it_is_and_lowers_held_out_scores(run, validation):
    seen, unseen = (
        {name: values[rows] for name, values in validation.items()} for rows in (slice(250), slice(250, None))
    )

    def trained(prior: str, **training) -> TrainedModel:
        return run(dataclasses.replace(CONFIG, prior=prior), validation=seen, max_steps=400, **training)

    normal, aggregate, unfitted = trained("normal"), trained("aggregate"), trained("aggregate", no_examples=True)
    for path, value in normal.members[0].weights.items():
        np.testing.assert_array_equal(aggregate.members[0].weights[path], value)
    assert aggregate.summary["prior_share"] > 0.5
    scores, closed, by_draws = (model.scorer.score(unseen) for model in (aggregate, normal, unfitted))
    np.testing.assert_array_equal(scores.column_nll, closed.column_nll)
    np.testing.assert_allclose(by_draws.kl, closed.kl, rtol=1e-4, atol=1e-4)  # N(0, I), for which the draws are exact
    assert scores.kl.mean() < closed.kl.mean() - 0.02
    assert unfitted.summary["prior_share"] == 0


def test_each_member_scores_under_an_aggregate_prior_of_its_own_encodings(run, validation):
    trained = run(dataclasses.replace(CONFIG, num_members=2, num_components=50), max_steps=100)
    components = []
    for member in trained.members:
        means = member.weights["aggregate_prior/means"][:-1]
        z_mean = ElboScorer([member], trained.scorer.noise).latents(validation)[0]
        assert np.abs(means[:, None] - z_mean).max(axis=2).min(axis=1).max() < 1e-4  # each is a row's, by this encoder
        components.append(means)
    assert not np.allclose(*components, atol=0.1)
    alone = [ElboScorer([member], trained.scorer.noise).score(validation) for member in trained.members]
    together = trained.scorer.score(validation)
    np.testing.assert_allclose(together.score, np.mean([terms.score for terms in alone], axis=0), rtol=1e-5, atol=1e-5)
    split = together.column_nll.sum(axis=1) + together.kl
    np.testing.assert_allclose(together.score, split, rtol=1e-5, atol=1e-5)


def test_an_aggregate_prior_is_of_rows_from_all_over_a_table_that_is_read_in_order(run, inputs, validation):
    order = np.argsort(inputs["numbers"][:NUM_TRAIN, 0])

    def in_order(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        for rows in np.split(order, 5):
            yield {name: values[rows] for name, values in inputs.items()}

    trained = run(dataclasses.replace(CONFIG, num_components=100), shuffled=in_order, max_steps=100)
    components = trained.members[0].weights["aggregate_prior/means"][:-1]
    z_mean, _ = trained.scorer.latents(inputs)
    for latent in range(2):
        assert ks_2samp(components[:, latent], z_mean[:, latent]).pvalue > 1e-3


def test_the_same_seed_gives_the_same_model(table, version):
    np.random.seed(1)  # noqa: NPY002 - a user's own global seed changes nothing
    assert fit(table, CONFIG, TrainingConfig(**SMALL)).model_version == version


def test_another_seed_gives_another_model(table, version):
    assert fit(table, CONFIG, TrainingConfig(**SMALL, seed=1)).model_version != version


def test_the_same_seed_gives_the_same_model_in_another_process(table, version, tmp_path):
    pq.write_table(table, tmp_path / "rows.parquet")
    program = (
        "import sys, pyarrow.parquet as pq\n"
        "from vae_model import TrainingConfig, VAEConfig, fit\n"
        "config = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=2)\n"
        "training = TrainingConfig(max_steps=30, calibration_fraction=0.2, patience=None)\n"
        "print('version', fit(pq.read_table(sys.argv[1]), config, training).model_version)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rows.parquet")]
    printed = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert printed.split()[-1] == version


# ---- batches ---------------------------------------------------------------------------------------


def test_batches_carry_rows_over_and_show_each_once_a_pass(schema, inputs):
    # Blocks of 50 rows into two batches of 35 at a time; each row carries its number.
    def shuffled(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        order = rng.permutation(350)
        for start in range(0, 350, 50):
            rows = order[start : start + 50]
            block = {name: values[rows].copy() for name, values in inputs.items()}
            block["fixed_nll"][:, 0] = rows
            yield block

    executions = _executions(shuffled, 350, 2, 35, 0, build_vae(schema, CONFIG), first=0)
    seen = [batches["fixed_nll"][..., 0].numpy() for batches in executions.take(15)]
    assert {rows.shape for rows in seen} == {(2, 35)}
    passes = np.concatenate(seen).reshape(3, 350)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(350), (3, 1)))
    assert (passes[0] != passes[1]).any()


def test_progress_ends_with_all_steps_done(table):
    told = []
    fit(table, CONFIG, TrainingConfig(**SMALL), on_progress=lambda *report: told.append(report))
    training = [report for report in told if report[0] == "training"]
    assert [done for _, done, _, _ in training] == list(range(1, 31))
    assert {total for _, _, total, _ in training} == {30}
    assert set(training[-1][3]) == {"loss", "reconstruction_loss", "kl_loss"}
    assert {report[0] for report in told} == {"statistics", "training", "calibration"}
