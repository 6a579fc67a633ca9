import json

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from kept import fits, run
from scipy.stats import chi2, entropy, norm

from pipeline.drift import DRIFT_SCHEMA, MeasureDrift
from vae_model.drift import DriftReference, population_stability_index, sampling_psi
from vae_model.schema import choose_kinds, infer_schema
from vae_model.statistics import TableStatistics


def reference_of(table: pa.Table, **options) -> DriftReference:
    kinds, passthrough = choose_kinds(table.schema)
    statistics = TableStatistics(kinds)
    statistics.update(table, 0)
    return DriftReference(infer_schema(statistics, table.schema, passthrough), statistics, **options)


def measured(reference, table, **options):
    return {item.column: item for item in reference.measure(reference.count(table), **options)}


@pytest.fixture(scope="module")
def reference(mixed_table):
    return reference_of(mixed_table)


def changed(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


# ---- the index -----------------------------------------------------------------------------------


def test_the_index_is_the_sum_of_both_divergences():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, 12), rng.integers(0, 5000, 12)
    expected = entropy(a + 0.5, b + 0.5) + entropy(b + 0.5, a + 0.5)
    assert population_stability_index(a, b) == pytest.approx(expected, rel=1e-12)
    assert population_stability_index(a, a) == 0


@pytest.mark.parametrize(("num_bins", "num_rows"), [(2, 100), (10, 50), (10, 2000), (22, 200)])
def test_two_samples_of_one_distribution_differ_as_said(num_bins, num_rows):
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.full(num_bins, 3.0))
    draws = [
        population_stability_index(rng.multinomial(num_rows, shares), rng.multinomial(4000, shares))
        for _ in range(3000)
    ]
    mean, noise = sampling_psi(num_bins, num_rows, 4000, 0.01)
    assert mean == (num_bins - 1) * (1 / num_rows + 1 / 4000)
    assert noise == pytest.approx(chi2.isf(0.01, num_bins - 1) * (1 / num_rows + 1 / 4000))
    exceeded = np.mean(np.array(draws) > noise)
    assert exceeded <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 3000)
    if num_rows >= 50 * num_bins:  # with few rows a bin, the half rows keep the index small
        assert np.mean(draws) == pytest.approx(mean, rel=0.1)
        assert exceeded >= 0.01 - 3 * np.sqrt(0.01 * 0.99 / 3000)


# ---- counting ------------------------------------------------------------------------------------


def test_numbers_are_counted_in_the_deciles_of_training():
    rng = np.random.default_rng(2)
    train, now = rng.normal(100, 5, size=2000), rng.normal(101, 5, size=700)
    reference = reference_of(pa.table({"x": train}))
    edges = np.sort(train)[np.arange(1, 10) * 200 - 1]  # the value below which a tenth of the rows lie, and so on
    cuts = [-np.inf, *edges, np.inf]
    expected = pd.cut(pd.Series(now), cuts).value_counts(sort=False)
    np.testing.assert_array_equal(reference.count(pa.table({"x": now}))[3:], expected)
    assert reference.count(pa.table({"x": train}))[3:].tolist() == [200] * 10


def test_levels_are_counted_by_name_and_rare_ones_together(mixed_table, make_table):
    now = make_table(3000, 7)
    color = pa.array(["never seen" if cell == "red" else cell for cell in now["color"].to_pylist()])
    reference = reference_of(mixed_table.select(["color"]))
    counts = pd.Series(changed(now, "color", color)["color"].to_pylist()).value_counts()
    known = pd.Series(mixed_table["color"].to_pylist()).value_counts()
    common = known[known >= 40].index  # a hundredth of the rows
    rare = [level for level in counts.index if level in known.index and level not in common]
    unseen = [level for level in counts.index if level not in known.index]
    got = reference.count(pa.table({"color": color}))
    assert got.tolist() == [
        3000,
        0,
        0,
        counts[unseen].sum(),
        *[counts.get(level, 0) for level in common],
        counts[rare].sum(),
    ]


def test_a_value_that_fills_more_than_a_bin_has_one_of_its_own():
    rng = np.random.default_rng(3)
    train = np.where(rng.uniform(size=2000) < 0.9, 0.0, rng.exponential(size=2000))
    reference = reference_of(pa.table({"x": train}))
    below = np.where(train == 0, -0.001, train)
    assert measured(reference, pa.table({"x": train}))["x"].psi == 0
    assert measured(reference, pa.table({"x": below}))["x"].status == "drift"


def test_counts_of_parts_add_up_to_those_of_the_whole(reference, make_table):
    table = make_table(1000, 4)
    parts = [reference.count(table.slice(start, 130)) for start in range(0, 1000, 130)]
    np.testing.assert_array_equal(sum(parts), reference.count(table))
    assert reference.count(table).sum() == 1000 * (1 + len(reference.schema.names))


def test_rows_that_cannot_be_scored_count_nowhere_else(reference, make_table):
    table = make_table(100, 5)
    lengths = table["length"].to_numpy().copy()
    lengths[:7] = np.inf
    counts = reference.count(changed(table, "length", pa.array(lengths)))
    assert counts[:2].tolist() == [93, 7]
    np.testing.assert_array_equal(counts[2:], reference.count(table.slice(7))[2:])
    without = reference.count(table.drop_columns(["length"]))
    assert without.tolist() == reference.count_unreadable(100).tolist() == [0, 100] + [0] * (reference.num_counts - 2)


# ---- drift or not --------------------------------------------------------------------------------


def test_a_known_shift_has_the_index_of_its_closed_form():
    rng = np.random.default_rng(6)
    reference = reference_of(pa.table({"x": rng.normal(size=20_000)}))
    drift = measured(reference, pa.table({"x": rng.normal(0.5, 1, size=20_000)}))["x"]
    cuts = norm.ppf(np.arange(11) / 10)
    a, b = np.diff(norm.cdf(cuts - 0.5)), np.full(10, 0.1)
    assert drift.psi == pytest.approx(((a - b) * np.log(a / b)).sum(), rel=0.1)
    assert drift.status == "drift"


def test_without_drift_the_noise_is_exceeded_no_more_often_than_said(reference, make_table):
    rows = make_table(60_000, 8)
    alarms = []
    for start in range(0, 60_000, 300):
        drifts = measured(reference, rows.slice(start, 300), false_alarm_rate=0.1).values()
        alarms.append(any(drift.psi > drift.psi_noise for drift in drifts))
        assert not any(drift.status == "drift" for drift in drifts)
    assert np.mean(alarms) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / len(alarms))


def test_each_kind_of_change_is_seen_in_its_column_alone(reference, mixed_table, make_table):
    table = make_table(2000, 9)
    lost = np.arange(2000) % 4 == 0
    changes = {
        "length": pa.array(table["length"].to_numpy() + 3),
        "weight": pa.array(table["weight"].to_numpy(), mask=lost),
        "color": pa.array(np.where(lost, "mauve", table["color"].to_numpy())),
        "site": pa.array(np.where(lost, "south", "north")),
        "unit": pa.array(np.where(lost, 3.0, 2.5)),
        "seen_at": pa.array(table["seen_at"].to_numpy(), mask=lost),
        "is_large": pa.array(np.ones(2000, bool)),
    }
    for name, values in changes.items():
        drifts = measured(reference, changed(table, name, values))
        assert [column for column, drift in drifts.items() if drift.status == "drift"] == [name]
    drifts = {name: measured(reference, changed(table, name, values))[name] for name, values in changes.items()}
    unseen = ~np.isin(changes["color"].to_pylist(), mixed_table["color"].to_pylist())
    assert drifts["color"].unseen_rate == unseen.mean() >= 0.25
    assert drifts["weight"].missing_rate == drifts["site"].unseen_rate == 0.25
    assert drifts["weight"].training_missing_rate == 0
    assert drifts["weight"].unseen_rate is None


def test_times_of_another_hour_are_no_drift(reference, make_table):
    table = make_table(1000, 10)
    noon = pa.array(np.full(1000, np.datetime64("2025-06-01T03:00:00", "us")))
    assert measured(reference, changed(table, "seen_at", noon))["seen_at"].status == "stable"


def test_few_rows_are_called_too_few_until_the_shift_is_beyond_their_noise(reference, make_table):
    table = make_table(2000, 11)
    assert {drift.status for drift in measured(reference, table.slice(0, 20)).values()} == {"too few"}
    assert {drift.status for drift in measured(reference, table).values()} == {"stable"}
    far = changed(table, "length", pa.array(table["length"].to_numpy() + 20)).slice(0, 60)
    drift = measured(reference, far)["length"]
    assert drift.psi_noise > 0.2
    assert drift.status == "drift"
    assert {drift.status for drift in measured(reference, table.slice(0, 0)).values()} == {"too few"}


def test_a_single_bin_is_refused(mixed_table):
    with pytest.raises(ValueError, match="num_bins: expected a number >= 2, got 1"):
        reference_of(mixed_table, num_bins=1)


# ---- in a pipeline -------------------------------------------------------------------------------


def in_windows(elements, **options):
    window = beam.WindowInto(FixedWindows(60))
    return run(elements, window, MeasureDrift(options.pop("bundle"), **options)).values


def expected_of(bundle, table, **options):
    reference = DriftReference(bundle.schema, bundle.statistics)
    return [drift._asdict() for drift in reference.measure(reference.count(table), **options)]


def of_window(values, start):
    names = ("window_start", "window_end", "model_version", "num_rows", "num_rejected")
    return [
        {name: cell for name, cell in value.items() if name not in names}
        for value in values
        if value["window_start"] == f"1970-01-01T00:0{start}:00Z"
    ]


@pytest.mark.parametrize("form", ["tables", "records", "json", "keyed"])
def test_a_pipeline_measures_what_numpy_does(form, first, first_uri, make_table):
    now = make_table(900, 20).select(["length", "count", "color"])
    later = changed(now, "length", pa.array(now["length"].to_numpy() + 5))
    elements = []
    for start, table in ((0, now), (60, later)):
        if form == "tables":
            parts = [table.slice(i, 250) for i in range(0, 900, 250)]
        else:
            parts = table.to_pylist()
            if form == "json":
                parts = [json.dumps(part).encode() for part in parts]
            if form == "keyed":
                parts = [(7, part) for part in parts]
        elements += [TimestampedValue(part, start + i % 60) for i, part in enumerate(parts)]
    values = in_windows(elements, bundle=first_uri)
    assert of_window(values, 0) == expected_of(first, now)
    assert of_window(values, 1) == expected_of(first, later)
    assert [value["column"] for value in values if value["status"] == "drift"] == ["length"]
    for value in values:
        assert fits(value, DRIFT_SCHEMA)
        assert (value["num_rows"], value["num_rejected"]) == (900, 0)
        assert value["model_version"] == first.model_version


def test_what_cannot_be_scored_is_counted_apart(first, first_uri, make_table):
    table = make_table(60, 21).select(["length", "count", "color"])
    bad = [{"length": "long", "count": 1, "color": "red"}, {"strange": 1}, b"no JSON", 7, table.drop_columns(["count"])]
    elements = [TimestampedValue(element, 1) for element in [*table.to_pylist(), *bad]]
    values = in_windows(elements, bundle=first_uri, threshold=0.5, false_alarm_rate=0.2)
    assert of_window(values, 0) == expected_of(first, table, threshold=0.5, false_alarm_rate=0.2)
    assert {(value["num_rows"], value["num_rejected"]) for value in values} == {(60, 4 + 60)}


def test_scored_tables_are_measured_as_they_are(first, first_uri, make_table):
    table = make_table(300, 22)
    scored = first.score(table)
    assert in_windows([TimestampedValue(scored, 1)], bundle=first_uri) == in_windows(
        [TimestampedValue(table, 1)], bundle=first_uri
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold: expected a number > 0, got 0"),
        ({"false_alarm_rate": 1}, r"false_alarm_rate: expected a number in \(0, 1\), got 1"),
        ({"num_bins": 1}, "num_bins: expected a number >= 2, got 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeasureDrift("bundle", **options)
