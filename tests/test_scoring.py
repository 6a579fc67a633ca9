import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from vae_model import Bundle, VAEConfig
from vae_model.bundle import load_bundle
from vae_model.calibration import Threshold, calibrate
from vae_model.schema import NumericFeature, TableSchema
from vae_model.scoring import draw_noise
from vae_model.statistics import TableStatistics

# ---- probabilistic PCA (Tipping and Bishop, 1999): a linear VAE whose log p(x) is known -----------

WIDTH, LATENTS, STDDEV = 5, 2, 0.4
RNG = np.random.default_rng(7)
# Orthogonal columns make the exact posterior's covariance diagonal, so that the encoder can be exact.
LOADINGS = np.linalg.qr(RNG.normal(size=(WIDTH, LATENTS)))[0] * [1.5, 0.7]
OFFSET = RNG.normal(size=WIDTH)
POSTERIOR_COVARIANCE = STDDEV**2 * np.linalg.inv(LOADINGS.T @ LOADINGS + STDDEV**2 * np.eye(LATENTS))
POSTERIOR_MAP = POSTERIOR_COVARIANCE @ LOADINGS.T / STDDEV**2
POSTERIOR_VARIANCE = np.diag(POSTERIOR_COVARIANCE)
WRONG_MAP, WRONG_BIAS, WRONG_VARIANCE = 0.6 * POSTERIOR_MAP, np.array([0.3, -0.2]), np.array([0.5, 0.05])
# E_q of a quadratic in z depends on the draws' mean and covariance only: with these it is exact.
CUBATURE = np.sqrt(LATENTS) * np.concatenate([np.eye(LATENTS), -np.eye(LATENTS)])


def ppca_rows(num_rows: int = 200) -> np.ndarray:
    rng = np.random.default_rng(1)
    z = rng.normal(size=(num_rows, LATENTS))
    return z @ LOADINGS.T + OFFSET + STDDEV * rng.normal(size=(num_rows, WIDTH))


def ppca_bundle(q_map: np.ndarray, q_bias: np.ndarray, q_variance: np.ndarray, noise: np.ndarray) -> Bundle:
    """The model, with q(z|x) = N(q_map x + q_bias, q_variance), and numbers encoded as they are."""
    names = [f"x{i}" for i in range(WIDTH)]
    features = [
        NumericFeature(
            name=name,
            num_rows=10**9,  # so that -log p(present) is nothing
            num_missing=0,
            mean=0.0,
            stddev=1.0,
            minimum=-10.0,
            maximum=10.0,
            resolution=0.0,
            knots=(-1.0, 1.0),
            knot_scores=(-1.0, 1.0),
            edge_scores=(-5.0, 5.0),
            quantile_resolution=0.0,
            heavy_tailed=False,
            is_integer=False,
        )
        for name in names
    ]
    weights = {
        "z_mean/kernel": q_map.T,
        "z_mean/bias": q_bias,
        "z_log_var/kernel": np.zeros((WIDTH, LATENTS)),
        "z_log_var/bias": np.log(q_variance),
        "kl/beta": np.array(1.0),
        "likelihood/kernel": LOADINGS.T,
        "likelihood/bias": OFFSET,
        "likelihood/log_var": np.full(WIDTH, 2 * np.log(STDDEV)),
    }
    return Bundle(
        schema=TableSchema(tuple(features), {}, pa.schema([(name, pa.float64()) for name in names])),
        config=VAEConfig(
            hidden_dims=(),
            latent_dim=LATENTS,
            views=("standard",),
            min_stddev=1e-6,
            background=1e-30,
            num_samples=4,
            prior="normal",
        ),
        weights={name: value.astype(np.float32) for name, value in weights.items()},
        noise=noise.astype(np.float32),
        calibration=calibrate(np.zeros(2, np.float32), np.zeros((2, WIDTH), np.float32)),
        threshold=Threshold(0.0, "fixed"),
        statistics=TableStatistics({}),
        golden=pa.table({}),
    )


def ppca_table(x: np.ndarray) -> pa.Table:
    return pa.table({f"x{i}": x[:, i] for i in range(WIDTH)})


def evidence_nll(x: np.ndarray) -> np.ndarray:
    """-log p(x), exactly."""
    covariance = LOADINGS @ LOADINGS.T + STDDEV**2 * np.eye(WIDTH)
    return -multivariate_normal(OFFSET, covariance).logpdf(x)


def gap(x: np.ndarray, q_mean: np.ndarray, q_variance: np.ndarray) -> np.ndarray:
    """KL(q(z|x) || p(z|x)), exactly: by how much -ELBO exceeds -log p(x)."""
    moved = (x - OFFSET) @ POSTERIOR_MAP.T - q_mean
    log_ratio = np.log(POSTERIOR_VARIANCE / q_variance).sum()
    trace = (q_variance / POSTERIOR_VARIANCE).sum()
    return 0.5 * (trace + (moved**2 / POSTERIOR_VARIANCE).sum(axis=1) - LATENTS + log_ratio)


def test_the_score_is_minus_log_evidence_where_q_is_the_exact_posterior():
    x = ppca_rows()
    bundle = ppca_bundle(POSTERIOR_MAP, -POSTERIOR_MAP @ OFFSET, POSTERIOR_VARIANCE, CUBATURE)
    score = bundle.score(ppca_table(x)).column("anomaly_score").to_numpy()
    np.testing.assert_allclose(score, evidence_nll(x), atol=2e-4)


def test_many_draws_estimate_minus_log_evidence_within_the_monte_carlo_error():
    x, num_draws = ppca_rows(), 64
    noise = draw_noise(num_draws, LATENTS, seed=3)
    bundle = ppca_bundle(POSTERIOR_MAP, -POSTERIOR_MAP @ OFFSET, POSTERIOR_VARIANCE, noise)
    score = bundle.score(ppca_table(x)).column("anomaly_score").to_numpy()
    z = ((x - OFFSET) @ POSTERIOR_MAP.T)[:, None] + np.sqrt(POSTERIOR_VARIANCE) * RNG.normal(size=(2000, LATENTS))
    nll = -norm.logpdf(x[:, None], z @ LOADINGS.T + OFFSET, STDDEV).sum(axis=-1)
    standard_error = nll.std(axis=1) / np.sqrt(num_draws)
    assert (np.abs(score - evidence_nll(x)) < 5 * standard_error).all()


def test_a_wrong_q_costs_its_divergence_from_the_posterior():
    x = ppca_rows()
    bundle = ppca_bundle(WRONG_MAP, WRONG_BIAS, WRONG_VARIANCE, CUBATURE)
    score = bundle.score(ppca_table(x)).column("anomaly_score").to_numpy()
    expected_gap = gap(x, x @ WRONG_MAP.T + WRONG_BIAS, WRONG_VARIANCE)
    assert expected_gap.min() > 0.5  # the oracle itself: a bound that is not tight
    np.testing.assert_allclose(score - evidence_nll(x), expected_gap, rtol=1e-4, atol=2e-4)


def test_a_score_is_never_below_minus_log_evidence():
    x = ppca_rows()
    for scale in (0.01, 0.5, 1.0, 3.0):
        bundle = ppca_bundle(scale * POSTERIOR_MAP, np.zeros(LATENTS), scale * POSTERIOR_VARIANCE, CUBATURE)
        score = bundle.score(ppca_table(x)).column("anomaly_score").to_numpy()
        assert (score > evidence_nll(x) - 2e-4).all()


def test_column_nll_is_the_expected_log_loss_of_each_column():
    x = ppca_rows()
    bundle = ppca_bundle(WRONG_MAP, WRONG_BIAS, WRONG_VARIANCE, CUBATURE)
    mean = (x @ WRONG_MAP.T + WRONG_BIAS) @ LOADINGS.T + OFFSET
    spread = LOADINGS**2 @ WRONG_VARIANCE
    expected = 0.5 * (((x - mean) ** 2 + spread) / STDDEV**2 + np.log(2 * np.pi * STDDEV**2))
    np.testing.assert_allclose(bundle.terms(ppca_table(x)).drop(columns="kl"), expected, rtol=1e-4, atol=1e-4)


def test_kl_is_the_divergence_of_q_from_the_prior_by_monte_carlo():
    x = ppca_rows(20)
    bundle = ppca_bundle(WRONG_MAP, WRONG_BIAS, WRONG_VARIANCE, CUBATURE)
    q_mean, q_stddev = (x @ WRONG_MAP.T + WRONG_BIAS)[:, None], np.sqrt(WRONG_VARIANCE)
    z = q_mean + q_stddev * np.random.default_rng(2).normal(size=(100_000, LATENTS))
    log_ratio = (norm.logpdf(z, q_mean, q_stddev) - norm.logpdf(z)).sum(axis=-1)
    expected, error = log_ratio.mean(axis=1), log_ratio.std(axis=1) / np.sqrt(100_000)
    assert (np.abs(bundle.terms(ppca_table(x))["kl"] - expected) < 5 * error).all()


# ---- the fixed noise ---------------------------------------------------------------------------


def test_even_numbers_of_draws_come_in_antithetic_pairs():
    noise = draw_noise(6, 3, seed=0)
    np.testing.assert_array_equal(noise[:3], -noise[3:])


def test_an_odd_number_of_draws_is_drawn():
    assert draw_noise(3, 2, seed=0).shape == (3, 2)


def test_draws_are_standard_normal():
    noise = draw_noise(2001, 50, seed=0)
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))


def test_another_seed_draws_other_noise():
    assert not np.array_equal(draw_noise(4, 3, seed=0), draw_noise(4, 3, seed=1))


# ---- the same row scores the same ----------------------------------------------------------------

NUM_ROWS = 8193


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    return make_table(NUM_ROWS, seed=5)


@pytest.fixture(scope="module")
def reference(bundle, table) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all rows in one batch, and how far from it each may be."""
    terms = bundle.terms(table)
    return scores(bundle, table), 1e-4 * (1 + terms.abs().to_numpy().sum(axis=1))


def scores(bundle: Bundle, data: pa.Table | pd.DataFrame) -> np.ndarray:
    return np.asarray(bundle.score(data)["anomaly_score"])


@pytest.mark.parametrize(("batch_rows", "num_rows"), [(1, 40), (7, 300), (1000, NUM_ROWS), (NUM_ROWS, NUM_ROWS)])
def test_a_row_scores_the_same_in_batches_of_any_size(bundle, table, reference, batch_rows, num_rows):
    parts = [scores(bundle, table.slice(i, min(batch_rows, num_rows - i))) for i in range(0, num_rows, batch_rows)]
    delta = np.abs(np.concatenate(parts) - reference[0][:num_rows])
    assert (delta <= reference[1][:num_rows]).all()


def test_a_row_scores_the_same_in_another_order(bundle, table, reference):
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    delta = np.abs(scores(bundle, table.take(pa.array(order))) - reference[0][order])
    assert (delta <= reference[1][order]).all()


def test_a_row_scores_the_same_among_strange_rows(bundle, table, reference):
    wild = table.slice(0, 100).set_column(0, "length", pa.array(np.full(100, 1e300)))
    both = pa.concat_tables([table.slice(0, 100), wild])
    assert (np.abs(scores(bundle, both)[:100] - reference[0][:100]) <= reference[1][:100]).all()


def test_a_row_scores_the_same_after_save_and_load(bundle_uri, table, reference):
    assert (np.abs(scores(load_bundle(bundle_uri), table) - reference[0]) <= reference[1]).all()


def test_a_row_scores_the_same_in_another_process(bundle_uri, table, reference, tmp_path):
    pq.write_table(table, tmp_path / "rows.parquet")
    program = (
        "import sys, numpy, pyarrow.parquet as pq, vae_model\n"
        "scored = vae_model.load_bundle(sys.argv[1]).score(pq.read_table(sys.argv[2]))\n"
        "numpy.save(sys.argv[3], scored['anomaly_score'].to_numpy())\n"
    )
    paths = [bundle_uri, str(tmp_path / "rows.parquet"), str(tmp_path / "scores.npy")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, timeout=120)
    assert (np.abs(np.load(tmp_path / "scores.npy") - reference[0]) <= reference[1]).all()


def test_a_row_scores_the_same_from_a_data_frame(bundle, table, reference):
    assert (np.abs(scores(bundle, table.to_pandas()) - reference[0]) <= reference[1]).all()


def test_a_row_scores_the_same_in_a_slice_of_a_chunked_table(bundle, table, reference):
    pieces = pa.concat_tables([table.slice(0, 5), table.slice(5, 0), table.slice(5, 2000)]).slice(3, 1500)
    assert pieces.column("length").num_chunks > 1
    assert (np.abs(scores(bundle, pieces) - reference[0][3:1503]) <= reference[1][3:1503]).all()


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("count", pa.int32()),
        ("count", pa.uint8()),
        ("count", pa.decimal128(22, 2)),
        ("count", pa.float64()),
        ("color", pa.large_string()),
        ("color", pa.string_view()),
        ("color", pa.dictionary(pa.int16(), pa.string())),
        ("size", pa.string()),
        ("seen_at", pa.timestamp("ns")),
        ("seen_at", pa.timestamp("us", "UTC")),
        ("unit", pa.float32()),
    ],
    ids=str,
)
def test_a_row_scores_the_same_in_another_layout_of_the_same_values(bundle, table, reference, column, kind):
    rows = table.slice(0, 500)
    cast = rows.set_column(rows.column_names.index(column), column, rows.column(column).cast(kind))
    assert cast.schema.field(column).type == kind
    assert (np.abs(scores(bundle, cast) - reference[0][:500]) <= reference[1][:500]).all()


def test_a_row_scores_the_same_with_its_columns_in_another_order(bundle, table, reference):
    rows = table.slice(0, 500).select(table.column_names[::-1])
    assert (np.abs(scores(bundle, rows) - reference[0][:500]) <= reference[1][:500]).all()


def test_a_batch_that_spans_several_network_batches_scores_the_same(bundle, table, reference):
    # 3 x 8,193 rows: the network reads 8,192 at a time.
    tripled = scores(bundle, pa.concat_tables([table, table, table]))
    assert (np.abs(tripled - np.tile(reference[0], 3)) <= np.tile(reference[1], 3)).all()


# ---- columns, KL and score ------------------------------------------------------------------------


def test_columns_and_kl_sum_to_the_score(bundle, table, reference):
    terms = bundle.terms(table)
    assert list(terms.columns) == [*bundle.schema.names, "kl"]
    np.testing.assert_allclose(terms.to_numpy(np.float64).sum(axis=1), reference[0], rtol=1e-5, atol=1e-4)


def test_a_closed_kl_is_never_negative():
    bundle = ppca_bundle(POSTERIOR_MAP, -POSTERIOR_MAP @ OFFSET, POSTERIOR_VARIANCE, CUBATURE)
    assert (bundle.terms(ppca_table(ppca_rows()))["kl"] >= 0).all()


def test_a_changed_cell_raises_the_nll_of_its_column(bundle, table):
    rows = table.slice(0, 200)
    changed = rows.set_column(rows.column_names.index("site"), "site", pa.array(["south"] * 200))
    before, after = bundle.terms(rows), bundle.terms(changed)
    assert (after["site"] > before["site"] + 3).all()
    pd.testing.assert_frame_equal(after.drop(columns="site"), before.drop(columns="site"), rtol=1e-5)


def test_broken_correlations_score_higher(bundle, table):
    rows = table.slice(0, 2000)
    broken = rows.set_column(1, "weight", pa.array(rows.column("weight").to_numpy()[::-1]))
    assert np.median(scores(bundle, broken)) > np.median(scores(bundle, rows)) + 1


# ---- finite for every finite input ------------------------------------------------------------------

FLOATS = st.one_of(
    st.none(),
    st.floats(allow_infinity=False),
    st.sampled_from([1e300, -1e300, 5e-324, -0.0, 1.7976931348623157e308, -1.7976931348623157e308]),
)
ROWS = st.fixed_dictionaries(
    {
        "length": FLOATS,
        "weight": FLOATS,
        "count": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "color": st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["red", "blue", "rare-3"])),
        "size": st.one_of(st.none(), st.sampled_from(["S", "XXL", ""])),
        "price": FLOATS,
        "is_large": st.one_of(st.none(), st.booleans()),
        "seen_at": st.one_of(st.none(), st.integers(-(2**62), 2**62)),
        "site": st.one_of(st.none(), st.sampled_from(["north", "south"])),
        "unit": FLOATS,
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(ROWS, min_size=1, max_size=20))
def test_scores_are_finite_for_every_finite_input(bundle, rows):
    kinds = {name: bundle.schema.arrow_type(name) for name in bundle.schema.names} | {"size": pa.string()}
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))
    scored = bundle.score(table, reasons=3)
    assert np.isfinite(scored.column("anomaly_score").to_numpy()).all()
    assert np.isfinite(bundle.terms(table).to_numpy()).all()


def test_beyond_the_clip_a_wild_cell_changes_no_other_columns_nll(bundle, mixed_table):
    def terms(value: float):
        lengths = mixed_table["length"].slice(0, 20).to_numpy().copy()
        lengths[:] = value
        return bundle.terms(mixed_table.slice(0, 20).set_column(0, "length", pa.array(lengths)))

    far, farther = terms(1e6), terms(1e9)
    others = [name for name in far.columns if name != "length"]
    np.testing.assert_allclose(far[others], farther[others], rtol=1e-4, atol=1e-4)
    assert (farther["length"] > far["length"]).all()
