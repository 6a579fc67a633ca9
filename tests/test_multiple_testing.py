import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, norm

from vae_model.calibration import calibrate
from vae_model.multiple_testing import PROCEDURES, Lord, Saffron, adjusted_p_values, benjamini_hochberg

# ---- a whole set ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.02, 1.0]), min_size=1, max_size=60))
def test_adjusted_p_values_are_scipys(p):
    np.testing.assert_allclose(adjusted_p_values(np.array(p)), false_discovery_control(p), rtol=1e-12)


def test_discoveries_are_the_k_smallest_by_the_papers_rule():
    p = np.random.default_rng(0).uniform(size=200) ** 3
    q, m = 0.1, len(p)
    k = max(k for k in range(m + 1) if k == 0 or np.sort(p)[k - 1] <= q * k / m)
    assert k > 0
    assert set(np.flatnonzero(benjamini_hochberg(p, q))) == set(np.argsort(p)[:k])


def test_the_p_values_up_to_q_decide_alone():
    rng = np.random.default_rng(1)
    for _ in range(50):
        p = np.concatenate([rng.uniform(size=80), rng.uniform(size=20) * 10.0 ** rng.integers(-6, 0)])
        small = p[p <= 0.2]
        np.testing.assert_array_equal(benjamini_hochberg(small, 0.2, len(p)), benjamini_hochberg(p, 0.2)[p <= 0.2])
        found = benjamini_hochberg(p, 0.2)
        np.testing.assert_allclose(adjusted_p_values(small, len(p))[found[p <= 0.2]], adjusted_p_values(p)[found])


def test_no_tests_have_no_discoveries():
    assert benjamini_hochberg(np.empty(0), 0.1).shape == (0,)
    assert benjamini_hochberg(np.empty(0), 0.1, num_tests=5).shape == (0,)


@pytest.mark.parametrize("p", [[0.5, float("nan")], [-0.1], [1.5]])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\]"):
        benjamini_hochberg(np.array(p), 0.1)
    with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\]"):
        Saffron(0.1).test(np.array(p))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"q: expected a number in \(0, 1\), got 1"):
        benjamini_hochberg(np.array([0.5]), 1)
    with pytest.raises(ValueError, match="num_tests: expected at least the 2 p-values given, got 1"):
        adjusted_p_values(np.array([0.5, 0.1]), 1)
    with pytest.raises(ValueError, match=r"wealth: expected a number in \(0, alpha = 0.1\], got 0.2"):
        Lord(0.1, wealth=0.2)
    with pytest.raises(ValueError, match=r"candidate: expected a number in \(0, 1\), got 1.0"):
        Saffron(0.1, candidate=1.0)
    with pytest.raises(ValueError, match="max_marks: expected a number >= 1, got 0"):
        Lord(0.1, max_marks=0)


def false_and_true_shares(find, make, num_trials, seed=0):
    """Mean false discovery proportion with its standard error, and mean share of the outliers found."""
    rng = np.random.default_rng(seed)
    shares, powers = [], []
    for _ in range(num_trials):
        p, is_outlier = make(rng)
        found = find(p)
        shares.append((found & ~is_outlier).sum() / max(found.sum(), 1))
        powers.append(found[is_outlier].mean())
    return np.mean(shares), np.std(shares) / np.sqrt(num_trials), np.mean(powers)


def test_bh_keeps_its_rate_on_conformal_p_values_of_one_calibration_set():
    def make(rng):
        calibration = calibrate(rng.normal(size=500).astype(np.float32), np.zeros((500, 1)))
        is_outlier = np.arange(200) < 40
        p = calibration.p_values(rng.normal(size=200) + 3.5 * is_outlier)
        return np.maximum(p, 1 / 501), is_outlier  # what calibration can prove

    share, error, power = false_and_true_shares(lambda p: benjamini_hochberg(p, 0.2), make, 400)
    assert share <= 0.2 + 3 * error
    assert share > 0.2 * 0.8 - 4 * error  # q times the share of normal rows is what independent ones would have
    assert power > 0.5


# ---- one after another ---------------------------------------------------------------------------

SAMPLE = np.array(
    [
        2.90e-08,
        0.06743,
        0.01514,
        0.08174,
        0.00171,
        3.60e-05,
        0.79149,
        0.27201,
        0.28295,
        7.59e-08,
        0.69274,
        0.30443,
        0.00136,
        0.72342,
        0.54757,
    ]
)
# Levels that the R package onlineFDR prints for them, with alpha = 0.05, in its manual.
SAFFRON_LEVELS = np.array(
    [
        0.005468627,
        0.010937254,
        0.010937254,
        0.010937254,
        0.010937254,
        0.021874508,
        0.032811762,
        0.010823845,
        0.010823845,
        0.010823845,
        0.021761099,
        0.009265591,
        0.009265591,
        0.020202846,
        0.009064367,
    ]
)
LORD_LEVELS = np.array(
    [
        0.0002675839,
        0.0024664457,
        0.0005732818,
        0.0004872805,
        0.0004059066,
        0.0003447286,
        0.0029745013,
        0.0008450114,
        0.0007305648,
        0.0006243143,
        0.0032185913,
        0.0010617227,
        0.0009256825,
        0.0008019657,
        0.0007059610,
    ]
)


@pytest.mark.parametrize(("kind", "expected"), [(Lord, LORD_LEVELS), (Saffron, SAFFRON_LEVELS)])
def test_levels_are_those_of_onlinefdr(kind, expected):
    procedure = kind(0.05)
    levels, found = [], []
    for p in SAMPLE:
        levels.append(procedure.level)
        found += procedure.test(p).tolist()
    np.testing.assert_allclose(levels, expected, rtol=1e-6)
    assert found == (expected >= SAMPLE).tolist()


def lord_by_the_paper(p, alpha, wealth):
    """LORD++ as Ramdas et al. (2017) write it: all discoveries' times in every step."""
    found, taus = [], []
    for t in range(1, len(p) + 1):
        level = wealth * Lord.gamma(np.array(float(t)))
        for j, tau in enumerate(taus):
            level += (alpha - wealth if j == 0 else alpha) * Lord.gamma(np.array(float(t - tau)))
        found.append(p[t - 1] <= level)
        if found[-1]:
            taus.append(t)
    return np.array(found)


def saffron_by_the_paper(p, alpha, wealth, candidate):
    """SAFFRON as Ramdas et al. (2018) write it: candidates since every discovery are counted anew in every step."""
    found, taus = [], []
    for t in range(1, len(p) + 1):
        candidates = [int(value <= candidate) for value in p[: t - 1]]
        level = wealth * Saffron.gamma(np.array(float(t - sum(candidates))))
        for j, tau in enumerate(taus):
            weight = alpha - wealth if j == 0 else alpha
            level += weight * Saffron.gamma(np.array(float(t - tau - sum(candidates[tau:]))))
        found.append(p[t - 1] <= min(candidate, (1 - candidate) * level))
        if found[-1]:
            taus.append(t)
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_batches_give_what_the_papers_give_step_by_step(seed, share):
    rng = np.random.default_rng(seed)
    p = np.where(rng.uniform(size=250) < share, rng.uniform(size=250) * 1e-5, rng.uniform(size=250))
    for procedure, expected in (
        (Lord(0.1), lord_by_the_paper(p, 0.1, 0.01)),
        (Saffron(0.1), saffron_by_the_paper(p, 0.1, 0.05, 0.5)),
        (Saffron(0.1, candidate=0.2, wealth=0.1), saffron_by_the_paper(p, 0.1, 0.1, 0.2)),
    ):
        parts = np.split(p, np.sort(rng.integers(0, len(p), 7)))
        assert expected.sum() > 1
        np.testing.assert_array_equal(np.concatenate([procedure.test(part) for part in parts]), expected)
        assert (procedure.num_tests, procedure.num_discoveries) == (len(p), expected.sum())


@pytest.mark.parametrize("kind", [Lord, Saffron])
def test_a_restored_state_goes_on_as_if_never_stopped(kind):
    rng = np.random.default_rng(3)
    p = rng.uniform(size=400) ** 4
    whole, first, second = kind(0.1), kind(0.1), kind(0.1)
    expected = whole.test(p)
    begun = first.test(p[:150])
    second.restore(first.state())
    np.testing.assert_array_equal(np.concatenate([begun, second.test(p[150:])]), expected)
    assert second.state() == whole.state()


def size_of(state):
    return sum(len(part) for part in state if isinstance(part, bytes))


@pytest.mark.parametrize("kind", [Lord, Saffron])
def test_memory_grows_with_discoveries_alone_and_no_further_than_its_bound(kind):
    rng = np.random.default_rng(4)
    quiet = kind(0.1)
    quiet.test(rng.uniform(0.6, 1, size=100_000))
    assert quiet.num_discoveries == size_of(quiet.state()) == 0
    p = np.where(rng.uniform(size=2000) < 0.5, 0, rng.uniform(size=2000))
    bounded, exact = kind(0.1, max_marks=100), kind(0.1)
    bounded.test(p)
    exact.test(p)
    assert size_of(bounded.state()) == 100 * 16 < size_of(exact.state())
    assert 0 < bounded.level <= exact.level
    assert bounded.num_discoveries > 100


def online(name, alpha):
    return lambda p: PROCEDURES[name](alpha).test(p)


@pytest.mark.parametrize("name", ["lord", "saffron"])
def test_online_procedures_keep_their_rate_on_independent_p_values(name):
    def make(rng):
        is_outlier = rng.uniform(size=600) < 0.2
        return norm.sf(rng.normal(size=600) + 3 * is_outlier), is_outlier

    share, error, power = false_and_true_shares(online(name, 0.1), make, 150)
    assert share <= 0.1 + 3 * error
    assert power > 0.2


@pytest.mark.parametrize("name", ["lord", "saffron"])
def test_pure_noise_has_a_discovery_no_more_often_than_alpha(name):
    rng = np.random.default_rng(6)
    runs = [online(name, 0.1)(rng.uniform(size=500)).any() for _ in range(300)]
    assert np.mean(runs) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 300)


@pytest.mark.parametrize("kind", [Lord, Saffron])
def test_wealth_is_spread_once(kind):
    index = np.arange(1, 2_000_001, dtype=float)
    gamma = kind.gamma(index)
    assert (np.diff(gamma) <= 0).all()
    assert 0.5 < gamma.sum() <= 1
