import math
from itertools import groupby, permutations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from vae_model.evaluation import evaluate


def _tied_case(seed, num_rows=120):
    """Scores in tens, so that anomalies and normal rows tie often."""
    rng = np.random.default_rng(seed)
    labels = rng.random(num_rows) < 0.2
    labels[:2] = [True, False]
    return labels, np.round(rng.normal(size=num_rows) + 1.5 * labels, 1)


def _expected_precision(labels, scores, k):
    """Row by row: a group of ties that the cut splits gives its share of anomalies to each of its places."""
    taken = 0.0
    room = k
    rows = sorted(zip(scores, labels, strict=True), key=lambda row: -row[0])
    for _, tied in groupby(rows, key=lambda row: row[0]):
        group = [label for _, label in tied]
        taken += sum(group) / len(group) * min(room, len(group))
        room -= min(room, len(group))
    return taken / k


def test_a_case_worked_by_hand():
    # Pairs (anomaly, normal): 3>2, 3>1, 2=2 (a half), 2>1: 3.5 of 4.
    found = evaluate([1, 0, 1, 0], [3.0, 2.0, 2.0, 1.0], ks=[1, 2, 3, 4])
    assert (found.num_rows, found.num_anomalies) == (4, 2)
    assert found.auroc.value == 3.5 / 4
    # Recall 1/2 at precision 1, then 1/2 more at precision 2/3 (the tie is retrieved whole).
    assert found.aupr.value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # At 2: the row at 3.0, then one of the tied two, which is an anomaly half of the time.
    assert {k: e.value for k, e in found.precision_at.items()} == {1: 1.0, 2: 0.75, 3: pytest.approx(2 / 3), 4: 0.5}


def test_precision_is_the_mean_over_every_order_of_the_ties():
    labels, scores = [1, 0, 0, 1, 0, 1, 0], [5, 4, 4, 4, 4, 1, 0]
    found = evaluate(labels, scores, ks=range(1, 8))
    for k in range(1, 8):
        precisions = [
            sum(labels[i] for i in sorted(order, key=lambda i: -scores[i])[:k]) / k for order in permutations(range(7))
        ]
        assert found.precision_at[k].value == pytest.approx(np.mean(precisions))


@pytest.mark.parametrize("seed", range(5))
def test_values_match_sklearn_with_ties(seed):
    labels, scores = _tied_case(seed)
    found = evaluate(labels, scores, ks=range(1, len(labels) + 1))
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    assert found.aupr.value == pytest.approx(average_precision_score(labels, scores), rel=1e-12)
    for k, estimate in found.precision_at.items():
        assert estimate.value == pytest.approx(_expected_precision(labels, scores, k), rel=1e-12)


def test_intervals_match_sklearn_on_explicit_resamples():
    labels, scores = _tied_case(seed=7, num_rows=250)
    rng = np.random.default_rng(123)
    anomalies, normals = np.flatnonzero(labels), np.flatnonzero(~labels)
    replicates = []
    for _ in range(1000):
        rows = np.concatenate([rng.choice(anomalies, len(anomalies)), rng.choice(normals, len(normals))])
        y, s = labels[rows], scores[rows]
        replicates.append([roc_auc_score(y, s), average_precision_score(y, s), _expected_precision(y, s, 30)])
    low, high = np.percentile(replicates, [2.5, 97.5], axis=0)
    found = evaluate(labels, scores, ks=[30], num_bootstrap=1000)
    for i, estimate in enumerate([found.auroc, found.aupr, found.precision_at[30]]):
        # Two different draws of 1,000: each end's standard error is a fortieth of the width.
        slack = (high[i] - low[i]) / 8
        assert estimate.low == pytest.approx(low[i], abs=slack)
        assert estimate.high == pytest.approx(high[i], abs=slack)


def test_the_interval_covers_a_known_auroc():
    # Two normals d apart have AUROC = Phi(d / sqrt 2).
    distance = 1.0
    truth = 0.5 * (1 + math.erf(distance / 2))
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [60, 200])
    covered = 0
    for trial in range(400):
        scores = rng.normal(size=260) + distance * labels
        found = evaluate(labels, scores, seed=trial).auroc
        covered += found.low <= truth <= found.high
    # 95 % within three standard errors of 400 trials, and one point for the percentile method's bias.
    assert 0.905 <= covered / 400 <= 0.985


def test_the_interval_narrows_with_the_square_root_of_the_rows():
    rng = np.random.default_rng(1)
    widths = []
    for num_rows in (1000, 16_000):
        labels = np.arange(num_rows) % 10 == 0
        found = evaluate(labels, rng.normal(size=num_rows) + labels).auroc
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_one_anomaly_is_enough():
    found = evaluate([0, 0, 1, 0], [0.1, 0.4, 0.9, 0.2])
    assert found.auroc.value == found.auroc.low == found.auroc.high == 1.0
    assert found.precision_at[1].value == 1.0


def test_default_ks_are_the_number_of_anomalies_and_those_that_fit():
    labels = np.arange(500) % 7 == 0
    assert list(evaluate(labels, np.arange(500)).precision_at) == [10, 72, 100]


def test_the_same_seed_gives_the_same_intervals():
    labels, scores = _tied_case(seed=3)
    assert evaluate(labels, scores, seed=5) == evaluate(labels, scores, seed=5)
    assert evaluate(labels, scores, seed=5) != evaluate(labels, scores, seed=6)


def test_neither_the_order_of_rows_nor_the_scale_of_scores_matters():
    labels, scores = _tied_case(seed=4)
    order = np.random.default_rng(0).permutation(len(labels))
    values = [
        [estimate.value for estimate in (found.auroc, found.aupr, *found.precision_at.values())]
        for found in (evaluate(labels, scores), evaluate(labels[order], 1000 * scores[order] - 5))
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    "column",
    [list, np.array, pd.Series, pa.array, lambda x: pa.chunked_array([x[:2], x[2:]])],
    ids=["list", "numpy", "pandas", "arrow", "chunked"],  # without addresses, so that pytest -n collects the same
)
def test_columns_of_any_library_are_read(column):
    for labels in ([1, 0, 0, 1], [True, False, False, True], [1.0, 0.0, 0.0, 1.0]):
        assert evaluate(column(labels), column([0.3, 0.4, 0.2, 0.9])).auroc.value == 0.75


def test_infinite_scores_rank_like_others():
    assert evaluate([1, 0, 0], [math.inf, 1.0, -math.inf]).auroc.value == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "arguments", "message"),
    [
        ([0, 1, 2], [1.0, 2.0, 3.0], {}, "labels: expected only 0 and 1, got 2 in row 2"),
        ([0.0, 1.0, math.nan], [1.0, 2.0, 3.0], {}, "labels: expected only 0 and 1, got nan in row 2"),
        (["0", "1"], [1.0, 2.0], {}, "labels: expected one column of 0 and 1, got <U1"),
        ([True, None], [1.0, 2.0], {}, "labels: expected one column of 0 and 1, got object"),
        ([[0], [1]], [1.0, 2.0], {}, r"labels: .* shape \(2, 1\)"),
        ([0, 0], [1.0, 2.0], {}, "labels: expected both 0 and 1, got only 0 in 2 rows"),
        ([1, 1], [1.0, 2.0], {}, "labels: expected both 0 and 1, got only 1 in 2 rows"),
        ([0, 1, 1], [1.0, 2.0], {}, "labels, scores: expected equal lengths, got 3 and 2"),
        ([0, 1, 1], [1.0, math.nan, math.nan], {}, "scores: expected numbers, got NaN in 2 rows, first in row 1"),
        ([0, 1], ["a", "b"], {}, "scores: expected one column of numbers, got <U1"),
        ([0, 1], [1.0, 2.0], {"ks": [3]}, "ks: expected numbers from 1 to 2, the number of rows, got 3"),
        ([0, 1], [1.0, 2.0], {"ks": [0]}, "ks: .* got 0"),
        ([0, 1], [1.0, 2.0], {"num_bootstrap": 10}, "num_bootstrap: expected at least 40, got 10"),
    ],
)
def test_errors_name_what_is_wrong(labels, scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(labels, scores, **arguments)
