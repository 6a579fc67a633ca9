import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from vae_model import TrainingConfig, VAEConfig, fit
from vae_model.reasons import REASON_TYPE, _number_text, top_features


@pytest.fixture(scope="module")
def table(make_table) -> pa.Table:
    return make_table(300, seed=9)


def changed(table: pa.Table, **columns: object) -> pa.Table:
    """The table with some columns of one value throughout."""
    for name, value in columns.items():
        kind = table.schema.field(name).type
        kind = pa.string() if pa.types.is_dictionary(kind) else kind
        cells = pa.array([value] * table.num_rows, kind)
        table = table.set_column(table.column_names.index(name), name, cells)
    return table


def reasons_of(bundle, table: pa.Table, feature: str) -> pd.DataFrame:
    """Every row's reason about one feature."""
    reasons = bundle.score(table, reasons=len(bundle.schema.names)).column("anomaly_reasons").to_pylist()
    return pd.DataFrame([next(r for r in row if r["feature"] == feature) for row in reasons])


# ---- which columns, and their nats ---------------------------------------------------------------


def test_baselines_excesses_and_kl_sum_to_the_score(bundle, table):
    scored = bundle.score(table, reasons=len(bundle.schema.names))
    baseline = bundle.calibration.column_medians.sum(dtype=np.float64)
    excess = np.array([sum(r["excess_nats"] for r in row) for row in scored.column("anomaly_reasons").to_pylist()])
    total = baseline + excess + bundle.terms(table)["kl"]
    np.testing.assert_allclose(total, scored.column("anomaly_score").to_numpy(), rtol=1e-5, atol=1e-4)


def test_nats_are_the_columns_nll(bundle, table):
    found = reasons_of(bundle, table, "price")
    np.testing.assert_allclose(found["nats"], bundle.terms(table)["price"], rtol=1e-5, atol=1e-6)


def test_reasons_come_by_excess_largest_first(bundle, table):
    terms = bundle.terms(table).drop(columns="kl") - bundle.calibration.column_medians
    reasons = bundle.score(table, reasons=3).column("anomaly_reasons").to_pylist()
    for row, excess in zip(reasons, terms.to_numpy(), strict=True):
        np.testing.assert_allclose([r["excess_nats"] for r in row], np.sort(excess)[::-1][:3], rtol=1e-5, atol=1e-5)


def test_top_features_match_a_full_sort():
    nll, medians = np.random.default_rng(0).normal(size=(50, 8)), np.arange(8) / 4
    expected = np.argsort(medians - nll, axis=1)
    for k in (1, 3, 8, 20):
        np.testing.assert_array_equal(top_features(nll, medians, k), expected[:, :k])


def test_more_reasons_than_columns_are_all_columns(bundle, table):
    reasons = bundle.score(table.slice(0, 5), reasons=99).column("anomaly_reasons").to_pylist()
    assert all(sorted(r["feature"] for r in row) == sorted(bundle.schema.names) for row in reasons)


def test_a_negative_number_of_reasons_is_refused(bundle, table):
    with pytest.raises(ValueError, match="reasons: expected a number >= 0, got -1"):
        bundle.score(table, reasons=-1)


def test_reasons_have_their_arrow_type(bundle, table):
    assert bundle.score(table.slice(0, 3), reasons=2).schema.field("anomaly_reasons").type == REASON_TYPE


def test_a_table_without_rows_has_no_reasons(bundle, table):
    scored = bundle.score(table.slice(0, 0), reasons=2)
    assert scored.column("anomaly_reasons").type == REASON_TYPE
    assert scored.num_rows == 0


def test_column_p_values_count_calibration_rows(bundle, table):
    found = reasons_of(bundle, table, "weight")
    n = bundle.calibration.num_rows
    assert found["p_value"].between(1 / (n + 1), 1).all()
    assert found["p_value"].corr(found["nats"], method="spearman") == pytest.approx(-1, abs=0.01)


def test_reasons_of_a_row_do_not_depend_on_the_other_rows(bundle, table):
    together = bundle.score(table, reasons=4).column("anomaly_reasons").to_pylist()
    for i in range(0, 300, 60):
        alone = bundle.score(table.slice(i, 1), reasons=4).column("anomaly_reasons").to_pylist()[0]
        texts = ("feature", "direction", "value", "expected", "low", "high")
        assert [[r[t] for t in texts] for r in alone] == [[r[t] for t in texts] for r in together[i]]


# ---- what was found, and what was expected ---------------------------------------------------------


@pytest.mark.parametrize(("factor", "direction"), [(3.0, "high"), (0.2, "low")])
def test_a_scaled_number_is_the_first_reason(bundle, table, factor, direction):
    truth = table.column("weight").to_numpy()
    strange = table.set_column(1, "weight", pa.array(truth * factor))
    first = pd.DataFrame([row[0] for row in bundle.score(strange, reasons=1).column("anomaly_reasons").to_pylist()])
    assert (first["feature"] == "weight").mean() > 0.9
    first, truth = first[first["feature"] == "weight"], truth[first["feature"] == "weight"]
    assert (first["direction"] == direction).all()
    np.testing.assert_allclose(first["value"].astype(float), truth * factor)
    assert (np.abs(first["expected"].astype(float) - truth) < np.abs(truth * factor - truth)).all()


def test_expectations_lie_within_their_bounds(bundle, table):
    found = reasons_of(bundle, table, "length")
    low, expected, high = (found[name].astype(float) for name in ("low", "expected", "high"))
    assert (low <= expected).all()
    assert (expected <= high).all()


def test_most_normal_numbers_lie_within_their_bounds(bundle, table):
    found = reasons_of(bundle, table, "length")
    assert found["value"].astype(float).between(found["low"].astype(float), found["high"].astype(float)).mean() > 0.85


def test_expectations_of_an_integer_column_are_whole(bundle, table):
    found = reasons_of(bundle, table, "count")
    assert found["expected"].str.fullmatch(r"-?\d+").all()
    assert (found["value"] == [str(v) for v in table.column("count").to_pylist()]).all()


def test_a_missing_cell_is_missing(bundle, table):
    found = reasons_of(bundle, changed(table, length=None), "length")
    assert set(found["direction"]) == {"missing"}
    assert found["value"].isna().all()
    assert (found["excess_nats"] > 3).all()


def test_nan_is_missing(bundle, table):
    found = reasons_of(bundle, changed(table, length=float("nan")), "length")
    assert set(found["direction"]) == {"missing"}
    assert found["value"].isna().all()


def test_a_value_where_none_was_expected_is_present():
    free = np.arange(300) % 2 == 0
    kind, price = np.where(free, "gift", "sale"), np.random.default_rng(0).normal(5, 1, 300)
    config = VAEConfig(hidden_dims=(16,), latent_dim=2)
    training = TrainingConfig(max_steps=300, learning_rate=0.01, calibration_fraction=0.3)
    bundle = fit(pa.table({"kind": kind, "price": pa.array(price, mask=free)}), config, training)
    found = reasons_of(bundle, pa.table({"kind": ["gift"] * 3, "price": [4.0, 5.0, 6.0]}), "price")
    assert set(found["direction"]) == {"present"}
    assert found["expected"].isna().all()
    assert list(found["value"]) == ["4", "5", "6"]
    assert set(reasons_of(bundle, pa.table({"kind": ["sale"], "price": [9.0]}), "price")["direction"]) == {"high"}


def test_an_unseen_level_is_unseen_and_the_likeliest_one_expected(bundle, table):
    found = reasons_of(bundle, changed(table, size="XXL"), "size")
    assert set(found["direction"]) == {"unseen"}
    assert set(found["value"]) == {"XXL"}
    assert (found["expected"] == table.column("size").to_pylist()).mean() > 0.6
    assert (found["excess_nats"] > 3).all()


def test_a_level_against_the_rest_of_the_row_is_rare(bundle, table):
    wide = table.filter(pa.array(table.column("length").to_numpy() > 13))
    found = reasons_of(bundle, changed(wide, size="S"), "size")
    assert set(found["direction"]) == {"rare"}
    assert set(found["value"]) == {"S"}
    assert (found["expected"] == "L").all()
    assert (found["excess_nats"] > 1).mean() > 0.9


@pytest.mark.parametrize(("name", "value", "expected"), [("site", "south", "north"), ("unit", 3.5, "2.5")])
def test_another_value_of_a_constant_column_is_unseen(bundle, table, name, value, expected):
    found = reasons_of(bundle, changed(table, **{name: value}), name)
    assert set(found["direction"]) == {"unseen"}
    assert set(found["value"]) == {str(value)}
    assert set(found["expected"]) == {expected}
    assert (found["excess_nats"] > 5).all()


def test_a_missing_constant_is_missing(bundle, table):
    found = reasons_of(bundle, changed(table, unit=None), "unit")
    assert set(found["direction"]) == {"missing"}
    assert set(found["expected"]) == {"2.5"}


def test_an_unusual_time_is_unusual_and_noon_expected(bundle, table):
    # Training times lie around noon.
    found = reasons_of(bundle, changed(table, seen_at=datetime.datetime(2025, 3, 5, 0, 30)), "seen_at")
    assert set(found["direction"]) == {"unusual"}
    assert found["value"].str.startswith("2025-03-05 00:30").all()
    assert found["expected"].str.fullmatch(r"1[0-4]:\d\d (Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2}").all()
    assert (found["excess_nats"] > 2).all()


# ---- how numbers are written -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def units() -> tuple:
    """A model of the same quantity in many units and types."""
    x = np.random.default_rng(0).normal(5, 1, 200)
    data = pa.table(
        {
            "small": x * 1e-15,
            "plain": x,
            "large": x * 1e12,
            "huge": (x * 1e18).clip(1e17, 1.7e19).astype(np.uint64),
            "money": pa.array(x.round(2)).cast(pa.decimal128(8, 2)),
            "wait": pa.array((x * 1000).astype(int), pa.duration("ms")),
            "never": pa.nulls(200, pa.float64()),
        }
    )
    training = TrainingConfig(max_steps=25, calibration_fraction=0.3)
    return fit(data, VAEConfig(hidden_dims=(8,), latent_dim=2), training), data


@pytest.mark.parametrize("name", ["small", "plain", "large"])
def test_expectations_have_four_digits(units, name):
    found = reasons_of(*units, name)
    digits = found["expected"].str.split("e").str[0].str.replace(r"[-.]", "", regex=True).str.strip("0")
    assert (digits.str.len() <= 4).all()
    values = units[1].column(name).to_numpy()
    assert found["expected"].astype(float).between(values.min(), values.max()).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_are_written_with_four_digits_at_any_scale(units, kind):
    feature = units[0].schema.numeric[[f.name for f in units[0].schema.numeric].index("plain")]
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 3000) * 10 ** rng.uniform(-6, 12, 3000)).astype(kind)
    texts = _number_text(values, feature).to_pylist()
    assert [kind(text) for text in texts] == [kind(f"{value:.3e}") for value in values]
    edges = np.array([0, 0.99999, 9999.9, -9999.4, 1e8, 99_999_999, 1e-5, 1.2345678e-5, 2.5], kind)
    assert [kind(text) for text in _number_text(edges, feature).to_pylist()] == [kind(f"{edge:.3e}") for edge in edges]
    alone = [_number_text(values[i : i + 1], feature)[0].as_py() for i in range(100)]
    assert alone == texts[:100]


def test_whole_numbers_are_written_in_full(units):
    feature = units[0].schema.numeric[[f.name for f in units[0].schema.numeric].index("huge")]
    small, large = np.array([0.4, -0.4, -7.6, 2.0**53, 1e15]), np.array([1.2, 2.0**63, 1.8e19])
    for values in (small, large):
        assert _number_text(values, feature).to_pylist() == [str(round(value)) for value in values]


def test_expectations_beyond_int64_are_whole(units):
    found = reasons_of(*units, "huge")
    assert found["high"].astype(float).between(0, 1.7e19).all()
    assert found["high"].str.fullmatch(r"\d+").all()


def test_decimals_and_durations_are_explained(units):
    assert set(reasons_of(*units, "money")["value"]) == {str(v) for v in units[1].column("money").to_pylist()}
    assert reasons_of(*units, "wait")["value"].astype(float).between(1000, 9000).all()


def test_a_value_in_a_column_that_never_had_one_is_unseen_and_nothing_expected(units):
    bundle, data = units
    found = reasons_of(bundle, changed(data, never=1.0), "never")
    assert set(found["direction"]) == {"unseen"}
    assert found["expected"].isna().all()
