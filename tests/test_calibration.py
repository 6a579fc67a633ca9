import numpy as np
import pytest
from scipy.stats import genpareto

from vae_model.calibration import Calibration, calibrate, fit_tail


def calibration_of(scores: np.ndarray) -> Calibration:
    scores = np.asarray(scores, np.float32)
    return calibrate(scores, scores[:, None])


def exact_p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + #{calibration >= s}) / (n + 1), row by row."""
    return np.array([(1 + np.sum(calibration >= s)) / (len(calibration) + 1) for s in scores])


def some_scores(kind: str, num_rows: int) -> np.ndarray:
    rng = np.random.default_rng(num_rows)
    draw = {
        "normal": lambda: rng.normal(size=num_rows) * 5,
        "ties": lambda: rng.integers(-3, 4, num_rows),
        "negative": lambda: -np.exp(rng.normal(size=num_rows)) - 20,
        "constant": lambda: np.full(num_rows, 7.25),
        "heavy": lambda: rng.standard_t(2, num_rows) ** 2 * 100,
    }
    return np.asarray(draw[kind](), np.float32)


KINDS = ("normal", "ties", "negative", "constant", "heavy")


# ---- p-values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_p_values_count_the_calibration_rows_at_least_as_strange(kind):
    known = some_scores(kind, 200)
    asked = np.concatenate([known, known - 0.5, np.nextafter(known, np.float32(-np.inf)), [known.min() - 10]])
    asked = asked[asked <= known.max()].astype(np.float32)
    np.testing.assert_allclose(calibration_of(known).p_values(asked), exact_p_values(known, asked), rtol=2e-7)


def test_a_score_tied_with_calibration_rows_counts_them_all():
    p = calibration_of([1, 2, 2, 2, 3]).p_values(np.float32([2]))
    assert p[0] == pytest.approx((1 + 4) / 6)


def test_the_order_of_calibration_rows_does_not_matter():
    known, asked = some_scores("ties", 100), some_scores("normal", 50)
    np.testing.assert_array_equal(
        calibration_of(known).p_values(asked), calibration_of(np.sort(known)[::-1]).p_values(asked)
    )


@pytest.mark.parametrize("num_rows", [19, 99])
def test_p_values_of_exchangeable_rows_are_not_too_small(num_rows):
    # P(p <= a) <= a over calibration sets and new rows, ties or not; here within four standard errors.
    rng = np.random.default_rng(0)
    p = []
    for _ in range(1500):
        rows = np.float32(rng.standard_normal(num_rows + 4).round(1))
        p.append(calibration_of(rows[:num_rows]).p_values(rows[num_rows:]))
    p = np.array(p)
    for rate in (0.01, 0.05, 0.1, 0.3, 0.5):
        at_most = (p <= rate).mean(axis=1)
        assert at_most.mean() <= rate + 4 * at_most.std() / np.sqrt(len(p)), rate


def test_p_values_are_exactly_uniform_without_ties():
    rng = np.random.default_rng(1)
    p = [calibration_of(rows[:9]).p_values(rows[9:])[0] for rows in np.float32(rng.normal(size=(4000, 10)))]
    counts = np.histogram(np.minimum(p, 1), bins=np.arange(0.5, 11) / 10)[0]
    # Beyond the largest of nine, p goes on below 1/10: the first bin takes all of [0, 0.1].
    counts[0] = 4000 - counts[1:].sum()
    assert np.abs(counts - 400).max() < 4 * np.sqrt(4000 * 0.1 * 0.9)


def test_p_values_compare_with_a_rate_the_same_in_float32_and_float64():
    calibration = calibration_of(np.arange(999))
    p = calibration.p_values(np.arange(999, dtype=np.float32))
    assert p.dtype == np.float32
    for rate in (0.1, 0.05, 0.001, 0.3):
        exact = exact_p_values(np.arange(999), np.arange(999)) <= rate
        np.testing.assert_array_equal(p.astype(np.float64) <= rate, exact)
        np.testing.assert_array_equal(p <= np.float32(rate), exact)


# ---- the tail ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "scale"), [(0.0, 2.0), (0.2, 0.5), (0.4, 30.0)])
def test_the_tail_recovers_shape_and_scale_of_pareto_samples(shape, scale):
    fits = [fit_tail(genpareto.rvs(shape, scale=scale, size=5000, random_state=seed)) for seed in range(20)]
    found = np.mean(fits, axis=0)
    assert found[0] == pytest.approx(shape, abs=0.03)
    assert found[1] == pytest.approx(scale, rel=0.03)


def test_a_bounded_tail_is_fitted_as_an_exponential_one():
    shape, scale = fit_tail(np.random.default_rng(0).uniform(size=5000))
    assert shape == 0
    assert scale == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("excesses", [np.empty(0), np.zeros(10), np.array([3.0])])
def test_a_tail_of_too_little_is_still_a_distribution(excesses):
    shape, scale = fit_tail(excesses)
    assert 0 <= shape < 1
    assert scale > 0


@pytest.mark.parametrize("kind", KINDS)
def test_p_values_beyond_all_calibration_rows_fall_and_stay_above_zero(kind):
    known = some_scores(kind, 300)
    calibration = calibration_of(known)
    beyond = known.max() + calibration.tail_scale * np.linspace(0.01, 5, 50)
    p = calibration.p_values(np.concatenate([beyond, np.geomspace(1e6, 1e38, 20)]))
    assert p[0] < 1 / 301
    assert (np.diff(p[:50]) < 0).all()
    assert (np.diff(p) <= 0).all()
    assert (p > 0).all()


def test_the_tail_begins_where_the_counts_end():
    known = some_scores("normal", 300)
    just_beyond = np.nextafter(known.max(), np.float32(np.inf))
    assert calibration_of(known).p_values(just_beyond[None])[0] == pytest.approx(1 / 301, rel=1e-4)


def test_the_tail_estimates_p_values_that_calibration_cannot_count():
    # Exponential scores: the true p at s is exp(-s). n = 2,000 counts to 5e-4; the tail goes on to 1e-5.
    calibrations = [calibration_of(np.random.default_rng(seed).exponential(size=2000)) for seed in range(30)]
    asked = np.float32(-np.log([1e-4, 1e-5]))
    p = np.exp(np.mean([np.log(calibration.p_values(asked)) for calibration in calibrations], axis=0))
    assert (p > [1e-4, 1e-5]).all()  # cautious: p at the largest calibration row is 1 / (n + 1), as counted
    assert (p < [3e-4, 5e-5]).all()


def test_p_values_of_the_largest_float_are_positive():
    assert calibration_of(some_scores("normal", 50)).p_values(np.float32([np.finfo(np.float32).max]))[0] > 0


# ---- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 20, 99, 1000, 5000])
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.05, 0.01, 0.001, 1e-4])
def test_scores_reach_the_threshold_exactly_where_p_is_at_most_the_rate(kind, num_rows, rate):
    known = some_scores(kind, num_rows)
    calibration = calibration_of(known)
    value = np.float32(calibration.threshold(rate).value)
    near = [value]
    for direction in (-np.inf, np.inf):
        step = value
        for _ in range(50):
            step = np.nextafter(step, np.float32(direction))
            near.append(step)
    asked = np.concatenate([np.float32(near), known, np.nextafter(known, np.float32(np.inf))])
    asked = asked[np.isfinite(asked)]
    np.testing.assert_array_equal(asked >= value, calibration.p_values(asked).astype(np.float64) <= rate)


@pytest.mark.parametrize(
    ("num_rows", "rate", "extrapolated"),
    [(99, 0.01, False), (98, 0.01, True), (100, 0.01, False), (999, 0.001, False), (998, 0.001, True), (1, 0.5, False)],
)
def test_a_threshold_is_extrapolated_where_calibration_rows_are_too_few(num_rows, rate, extrapolated):
    assert (num_rows < 1 / rate - 1) == extrapolated
    calibration = calibration_of(some_scores("normal", num_rows))
    threshold = calibration.threshold(rate)
    assert threshold.extrapolated == extrapolated
    assert (threshold.value > np.nextafter(calibration.scores[-1], np.float32(np.inf))) == extrapolated


def test_a_threshold_is_a_float32():
    value = calibration_of(some_scores("normal", 100)).threshold(0.07).value
    assert value == float(np.float32(value))


def test_a_threshold_labels_its_rate_of_the_calibration_rows():
    known = some_scores("normal", 999)
    assert (known >= np.float32(calibration_of(known).threshold(0.05).value)).sum() == 49  # p = (1 + 49) / 1000


def test_a_threshold_says_its_rule_and_target():
    threshold = calibration_of(some_scores("normal", 50)).threshold(0.2, "contamination")
    assert (threshold.rule, threshold.target) == ("contamination", 0.2)


# ---- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 30, 150, 20_000])
@pytest.mark.parametrize("decimals", [0, 5])
def test_column_p_values_are_never_too_small_and_close(num_rows, decimals):
    nll = np.random.default_rng(0).standard_t(3, size=(num_rows, 2)).astype(np.float32).round(decimals)
    calibration = calibrate(nll.sum(axis=1), nll)
    asked = np.concatenate([nll[:: max(1, num_rows // 500), 1], np.float32([-100, 0, 100, 1000])])
    exact = exact_p_values(nll[:, 1], asked)
    found = calibration.column_p_values(np.full(len(asked), 1), asked)
    assert (found >= exact - 1e-12).all()
    assert (found <= 1.15 * exact).all()
    assert len(calibration.column_nll) <= 200


def test_column_p_values_mix_features_in_any_order():
    nll = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    calibration = calibrate(nll.sum(axis=1), nll)
    features, asked = np.array([1, 0, 1, 0]), np.float32([0.3, 0.3, -1, 2])
    alone = [calibration.column_p_values(features[i : i + 1], asked[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(calibration.column_p_values(features, asked), alone)
    assert alone[0] != alone[1]


def test_column_medians_are_those_of_the_calibration_rows():
    nll = np.float32([[1, 10], [2, 30], [5, 20]])
    np.testing.assert_array_equal(calibrate(nll.sum(axis=1), nll).column_medians, [2, 20])


# ---- refusals ----------------------------------------------------------------------------------


def test_no_calibration_rows_are_refused():
    with pytest.raises(ValueError, match="expected calibration rows, got none"):
        calibrate(np.empty(0, np.float32), np.empty((0, 2), np.float32))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite scores, got 2 that are not"):
        calibrate(np.float32([1, np.nan, np.inf]), np.zeros((3, 1), np.float32))
