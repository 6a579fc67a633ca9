import dataclasses
import logging
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import betabinom, binom, ks_2samp, mannwhitneyu, norm, rankdata

from vae_model import TrainingConfig, VAEConfig, fit, load_bundle
from vae_model.bundle import Bundle, score_fields
from vae_model.encoding import encode
from vae_model.fitting import _Steps, independent_nll, synthetic_rows
from vae_model.report import training_facts
from vae_model.scan import CALIBRATION, LEFT_OUT, TRAIN, VALIDATION, Split, choose_split, scan_table, uniform
from vae_model.schema import choose_kinds, infer_schema
from vae_model.tables import RecordError, open_tables

CONFIG = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=2)
QUICK = TrainingConfig(max_steps=25, calibration_fraction=0.2)
DATA = Path(__file__).parents[2] / "shared" / "data" / "adbench"


def numbers(num_rows: int, num_columns: int = 3, seed: int = 0) -> pa.Table:
    """Correlated columns x0, x1, ..."""
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=num_rows)
    return pa.table({f"x{i}": cause + rng.normal(scale=0.5, size=num_rows) for i in range(num_columns)})


def write_files(table: pa.Table, directory: Path, num_files: int, row_group_size: int) -> str:
    size = -(-table.num_rows // num_files)
    for i in range(num_files):
        part = table.slice(i * size, size)
        pq.write_table(part, directory / f"part-{i:03d}.parquet", row_group_size=row_group_size)
    return str(directory / "*.parquet")


@pytest.fixture
def no_training(monkeypatch):
    """Fails a test that goes as far as training."""

    def train(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("vae_model.training.Trainer.train", train)


# ---- out of core -------------------------------------------------------------------------------------

WIDE_ROWS, WIDE_COLUMNS = 6000, 40  # encoded: 40 columns x (2 views + 2) x 4 bytes = 3.8 MB


@pytest.fixture(scope="module")
def wide() -> pa.Table:
    ids = np.random.default_rng(1).permutation(WIDE_ROWS).astype(float)
    return numbers(WIDE_ROWS, WIDE_COLUMNS - 1).append_column("row", pa.array(ids))


def steps_of(data: object, training: TrainingConfig) -> tuple[_Steps, Split]:
    tables = open_tables(data)
    kinds, passthrough = choose_kinds(tables.schema)
    split = choose_split(tables, training, None)
    scan = scan_table(tables, kinds, split, lambda *_: None)
    schema = infer_schema(scan.statistics, tables.schema, passthrough)
    num_train = int(scan.num_rows[TRAIN])
    return _Steps(tables, schema, scan.statistics, VAEConfig(), training, split, lambda *_: None, num_train), split


def row_ids(steps: _Steps, block: dict[str, np.ndarray]) -> np.ndarray:
    feature = steps.schema.features[-1]
    assert feature.name == "row"
    return np.round(block["numbers"][:, WIDE_COLUMNS - 1] * feature.stddev + feature.mean).astype(int)


def test_a_pass_over_many_files_shows_every_training_row_once(wide, tmp_path):
    pattern = write_files(wide, tmp_path, num_files=12, row_group_size=200)
    steps, split = steps_of(pattern, TrainingConfig(buffer_mib=1))
    wanted = np.sort(wide.column("row").to_numpy()[split.roles(wide, 0) == TRAIN])
    rng = np.random.default_rng(0)
    passes = [[row_ids(steps, block) for block in steps._shuffled(rng)] for _ in range(2)]
    for blocks in passes:
        assert len(blocks) > 2  # it streams
        np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), wanted)
    assert (np.concatenate(passes[0]) != np.concatenate(passes[1])).mean() > 0.9


def test_a_buffer_mixes_rows_of_many_files(wide, tmp_path):
    pattern = write_files(wide, tmp_path, num_files=12, row_group_size=200)
    steps, _ = steps_of(pattern, TrainingConfig(buffer_mib=1))
    file_of = dict(zip(wide.column("row").to_numpy().astype(int), np.arange(WIDE_ROWS) // 500, strict=True))
    first = next(iter(steps._shuffled(np.random.default_rng(0))))
    files = [file_of[i] for i in row_ids(steps, first)[:200]]
    assert len(set(files)) >= 4


def test_a_table_that_fits_the_buffer_is_read_once(wide, tmp_path, monkeypatch):
    steps, split = steps_of(write_files(wide, tmp_path, 3, 1000), TrainingConfig(buffer_mib=64))
    wanted = np.sort(wide.column("row").to_numpy()[split.roles(wide, 0) == TRAIN])
    rng = np.random.default_rng(0)
    first = [row_ids(steps, block) for block in steps._shuffled(rng)]
    monkeypatch.setattr(steps.tables, "scan", None)
    second = [row_ids(steps, block) for block in steps._shuffled(rng)]
    for blocks in (first, second):
        assert len(blocks) == 1
        np.testing.assert_array_equal(np.sort(blocks[0]), wanted)
    assert (first[0] != second[0]).any()


def test_streaming_reaches_the_loss_of_training_in_memory(wide, tmp_path):
    pattern = write_files(wide, tmp_path, num_files=12, row_group_size=500)
    settings = {"max_steps": 250, "learning_rate": 0.01, "patience": None}
    memory = fit(wide, CONFIG, TrainingConfig(**settings)).card["training"]
    streamed = fit(pattern, CONFIG, TrainingConfig(**settings, buffer_mib=1)).card["training"]
    assert streamed["num_training_rows"] == memory["num_training_rows"]
    assert streamed["val_loss"] == pytest.approx(memory["val_loss"], rel=0.03)


# ---- roles -----------------------------------------------------------------------------------------


def test_roles_take_their_shares():
    roles = Split(0.1, 0.25, seed=0).roles(numbers(50_000), 0)
    counts = np.bincount(roles, minlength=4)
    for role, share in {TRAIN: 0.65, VALIDATION: 0.1, CALIBRATION: 0.25}.items():
        low, high = binom.interval(0.9999, 50_000, share)
        assert low <= counts[role] <= high
    assert counts[LEFT_OUT] == 0


def test_roles_do_not_depend_on_how_rows_are_cut():
    table, split = numbers(5000), Split(0.1, 0.2, seed=1)
    cuts = [0, 1, 17, 1000, 1024, 4999, 5000]
    parts = [split.roles(table.slice(a, b - a), a) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), split.roles(table, 0))


def test_another_seed_gives_other_roles():
    table = numbers(1000)
    assert (Split(0.1, 0.2, seed=0).roles(table, 0) != Split(0.1, 0.2, seed=1).roles(table, 0)).any()


def test_the_draw_of_a_position_is_uniform_and_unrelated_to_its_neighbours():
    draw = uniform(np.arange(100_000), 5)
    assert draw.min() >= 0
    assert draw.max() < 1
    counts = np.histogram(draw, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi square with 19 degrees of freedom, p = 0.001
    for lag in (1, 2, 256):
        assert abs(np.corrcoef(draw[:-lag], draw[lag:])[0, 1]) < 0.015


def test_large_tables_hold_out_a_bounded_number_of_rows():
    class Large:
        num_rows = 10**7
        schema = pa.schema([("x", pa.float64())])

    split = choose_split(Large(), TrainingConfig(), None)
    assert split.validation * 10**7 == pytest.approx(20_000)
    assert split.calibration * 10**7 == pytest.approx(100_000)


def test_wide_tables_hold_out_fewer_rows():
    class Wide:
        num_rows = 10**7
        schema = pa.schema([(f"x{i}", pa.float64()) for i in range(3000)])

    split = choose_split(Wide(), TrainingConfig(), None)
    assert split.validation * 10**7 * 3000 * 4 * 4 < 300e6  # bytes, as they are encoded: two views, present and fixed
    assert split.calibration * 10**7 * 3000 * 4 < 300e6
    assert split.calibration * 10**7 > 10_000


def test_a_time_column_calibrates_on_the_last_block_of_time():
    rng = np.random.default_rng(0)
    times = pa.array(np.datetime64("2025-01-01", "us") + rng.integers(0, 10**12, 4000).astype("timedelta64[us]"))
    table = numbers(4000).append_column("at", times)
    split = choose_split(open_tables(table), TrainingConfig(time_column="at"), None)
    roles = split.roles(table, 0)
    at = times.to_numpy()
    assert at[roles == CALIBRATION].min() > at[roles != CALIBRATION].max()
    assert (roles == CALIBRATION).mean() == pytest.approx(0.25, abs=0.01)
    assert (roles == VALIDATION).mean() == pytest.approx(0.075, abs=0.02)


def test_a_fit_with_a_time_column_uses_it(make_table):
    table = make_table(1200, seed=2)
    bundle = fit(table, CONFIG, TrainingConfig(max_steps=10, time_column="seen_at"))
    times = np.sort(table.column("seen_at").to_numpy())
    assert bundle.calibration.num_rows == pytest.approx(360, abs=5)
    assert bundle.golden.column("seen_at").to_numpy().min() > times[-bundle.calibration.num_rows - 1]


def test_rows_without_a_time_do_not_calibrate():
    at = pa.array([None, *np.datetime64("2025-01-01", "s") + np.arange(1999).astype("timedelta64[s]")])
    table = numbers(2000).append_column("at", at)
    split = choose_split(open_tables(table), TrainingConfig(time_column="at"), None)
    assert split.roles(table, 0)[0] in (TRAIN, VALIDATION)


# ---- labels ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled() -> Bundle:
    """Of a table in which every tenth row is an outlier in two columns, and one label is missing."""
    outlier = np.arange(1500) % 10 == 3
    table = numbers(1500)
    x0 = np.where(outlier, 1e6, table.column("x0").to_numpy())
    level = np.where(outlier, "bad", np.where(table.column("x1").to_numpy() > 0, "up", "down"))
    table = table.set_column(0, "x0", pa.array(x0)).append_column("level", pa.array(level))
    label = pa.array(outlier.astype(int), mask=np.arange(1500) == 0)
    return fit(table.append_column("y", label), CONFIG, QUICK, label="y", exclude=["y"])


def test_the_label_is_never_a_feature(labelled):
    assert "y" not in labelled.schema.names
    assert labelled.schema.passthrough["y"] == "the label"


def test_rows_labelled_anomalous_have_no_part(labelled):
    features = {feature.name: feature for feature in labelled.schema.features}
    assert features["x0"].maximum < 100
    assert sorted(features["level"].levels) == ["down", "up"]
    assert labelled.statistics.num_rows + labelled.calibration.num_rows == 1350
    assert max(labelled.golden.column("x0").to_pylist()) < 100


@pytest.mark.parametrize("kind", [pa.int8(), pa.bool_(), pa.float64(), pa.string(), pa.decimal128(12, 2)], ids=str)
def test_a_label_may_be_of_any_type(kind):
    label = pa.array([0, 1, None, 1, 0] * 20, pa.int8())
    roles = Split(0.1, 0.2, 0, label="y").roles(pa.table({"y": label.cast(kind)}), 0)
    np.testing.assert_array_equal(roles == LEFT_OUT, [False, True, False, True, False] * 20)


# ---- small tables ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[pa.Table, Bundle, list]:
    told = []
    table = numbers(120).append_column("y", pa.array([1] * 20 + [0] * 100))
    training = TrainingConfig(max_steps=10)
    return table, fit(table, CONFIG, training, label="y", on_progress=lambda *report: told.append(report)), told


def test_small_tables_are_calibrated_by_folds(small):
    _, bundle, told = small
    assert bundle.calibration.method == "cross-conformal"
    assert bundle.calibration.num_rows == 100
    stages = list(dict.fromkeys(report[0] for report in told))
    assert stages == ["statistics", *(f"fold {k} of 5" for k in range(1, 6)), "training"]


def test_folds_score_every_row_by_a_model_that_has_not_seen_it(small):
    # The final model scores its own training rows: not the scores that calibrate.
    table, bundle, _ = small
    own = np.sort(bundle.score(table.slice(20).drop_columns(["y"])).column("anomaly_score").to_numpy())
    assert not np.allclose(own, bundle.calibration.scores, atol=1e-3)


@pytest.fixture(scope="module")
def plain() -> Bundle:
    return fit(numbers(400), CONFIG, QUICK)


def test_small_tables_may_ask_for_held_out_rows(plain):
    assert plain.calibration.method == "split"
    assert plain.calibration.num_rows == pytest.approx(80, abs=35)


def test_larger_tables_hold_rows_out(bundle):
    assert bundle.calibration.method == "split"
    assert bundle.statistics.num_rows + bundle.calibration.num_rows == 4000
    assert bundle.card["training"]["num_training_rows"] < bundle.statistics.num_rows


# ---- thresholds ------------------------------------------------------------------------------------


def test_contamination_sets_the_threshold():
    training = TrainingConfig(max_steps=10, calibration_fraction=0.3, contamination=0.2)
    table = numbers(1000)
    bundle = fit(table, CONFIG, training)
    assert (bundle.threshold.rule, bundle.threshold.target) == ("contamination", 0.2)
    assert bundle.score(table).column("is_anomaly").to_numpy().mean() == pytest.approx(0.2, abs=0.06)


def test_a_rate_too_small_for_the_rows_is_extrapolated_and_said(caplog):
    training = TrainingConfig(max_steps=10, calibration_fraction=0.1, false_positive_rate=0.001)
    with caplog.at_level(logging.WARNING, logger="vae_model"):
        bundle = fit(numbers(400), CONFIG, training)
    assert bundle.threshold.extrapolated
    assert f"{bundle.calibration.num_rows} calibration rows are too few for a rate of 0.001" in caplog.text


# ---- contaminated rows -----------------------------------------------------------------------------

ROBUST = VAEConfig(hidden_dims=(32,), latent_dim=2, num_samples=2)


def crowd(num_rows: int, num_strange: int) -> tuple[pa.Table, np.ndarray]:
    """Rows of which some are alike and break the correlation of the others, and which of them do."""
    rng = np.random.default_rng(5)
    strange = rng.permutation(num_rows) < num_strange
    rows = rng.normal(size=(num_rows, 1)) + rng.normal(scale=0.3, size=(num_rows, 6))
    rows[strange] = rng.normal([2, -2, 2, -2, 2, -2], 0.05, size=(num_strange, 6))
    return pa.table(dict(zip("abcdef", rows.T, strict=True))), strange


def auroc(scores: np.ndarray, strange: np.ndarray) -> float:
    return mannwhitneyu(scores[strange], scores[~strange]).statistic / strange.sum() / (~strange).sum()


def test_declared_anomalies_are_not_learned():
    table, _ = crowd(2400, 240)
    training = TrainingConfig(max_steps=600, contamination=0.1)
    robust = fit(table, ROBUST, training)
    plain = fit(table, ROBUST, dataclasses.replace(training, contamination=None))
    assert robust.calibration.num_rows == plain.calibration.num_rows  # the threshold needs all of them
    fresh, strange = crowd(4000, 400)
    scores = [bundle.score(fresh).column("anomaly_score").to_numpy() for bundle in (robust, plain)]
    assert auroc(scores[0], strange) > max(0.99, auroc(scores[1], strange) + 0.05)


def test_a_few_undeclared_anomalies_do_not_vouch_for_others_like_them():
    table, _ = crowd(2400, 24)
    fresh, strange = crowd(4000, 400)
    bundle = fit(table, ROBUST, TrainingConfig(max_steps=600))
    assert bundle.card["training"]["prior_share"] > 0.3
    assert auroc(bundle.score(fresh).column("anomaly_score").to_numpy(), strange) > 0.99


def test_declared_anomalies_of_small_tables_are_left_out_of_every_fold(monkeypatch):
    from vae_model.training import Trainer

    lengths, train = [], Trainer.train

    def count(trainer: Trainer, **options: Any) -> object:
        lengths.append(options["num_rows"])
        return train(trainer, **options)

    monkeypatch.setattr(Trainer, "train", count)
    table, _ = crowd(400, 20)
    bundle = fit(table, CONFIG, TrainingConfig(max_steps=10, contamination=0.05))
    assert bundle.calibration.num_rows == 400
    num_suspects = bundle.card["training"]["num_suspects"]
    assert num_suspects == pytest.approx(400 * (1 - 0.9**2), abs=3)
    # A tenth of the rows that a network learns from is held out of its training.
    kept = 400 - num_suspects
    assert lengths[0] == pytest.approx(0.9 * 400 * 0.9, abs=3)
    assert lengths[1:6] == [pytest.approx(0.9 * 0.8 * kept, abs=15)] * 5
    assert sum(lengths[1:6]) == pytest.approx(0.9 * 4 * kept, abs=5)
    assert lengths[6:] == [pytest.approx(0.9 * kept, abs=1)]


def test_the_strangest_are_left_out_twice_but_not_of_calibration():
    table, strange = crowd(2400, 120)
    training = TrainingConfig(max_steps=600)
    steps, split = steps_of(table, training)
    steps.leave_out_strangest(0.1)
    roles = split.roles(table, 0)
    learned = roles < CALIBRATION
    assert steps.suspects is not None
    assert steps.suspects[learned].mean() == pytest.approx(1 - 0.9**2, abs=0.002)
    assert not steps.suspects[~learned].any()
    assert steps.suspects[learned & strange].mean() > 0.95
    passed = [len(block["present"]) for block in steps._shuffled(np.random.default_rng(0))]
    assert sum(passed) == steps.num_train == (~steps.suspects & (roles == TRAIN)).sum()
    assert len(steps._validation()["present"]) == (~steps.suspects & (roles == VALIDATION)).sum()


def test_few_rows_lose_some_and_never_all():
    training = TrainingConfig(max_steps=10, contamination=0.4, calibration_fraction=0.5)
    bundle = fit(numbers(60), CONFIG, training)
    training_card = bundle.card["training"]
    assert 0 < training_card["num_suspects"] < bundle.statistics.num_rows / 2
    assert np.isfinite(bundle.history[-1]["val_loss"])
    assert f"{training_card['num_suspects']} suspects left out" in training_facts(bundle)["training"]


def test_columns_alone_cost_what_their_frequencies_say():
    rng = np.random.default_rng(0)
    n = 5000
    x = rng.exponential(size=n)
    level = rng.choice(["a", "b", "c"], n, p=[0.7, 0.25, 0.05])
    missing = rng.random(n) < 0.1
    flag = rng.random(n) < 0.02
    gap = pa.array(rng.normal(size=n), mask=missing)
    table = pa.table({"x": x, "level": level, "gap": gap, "flag": flag.astype(int)})
    steps, _ = steps_of(table, TrainingConfig())
    nll = independent_nll(table, steps.schema)
    counts = pd.Series(level).value_counts()
    expected = -np.log(counts[level].to_numpy() / n) - np.log(np.where(missing, missing.mean(), 1 - missing.mean()))
    for column in (x, np.where(missing, np.nan, table["gap"].to_numpy()), flag.astype(float)):
        scores = norm.ppf((rankdata(column, nan_policy="omit") - 0.5) / np.isfinite(column).sum())
        expected += 0.5 * np.nan_to_num(scores) ** 2
    difference = nll - expected
    assert np.quantile(np.abs(difference - np.median(difference)), 0.95) < 0.1


# ---- golden rows -----------------------------------------------------------------------------------


def test_golden_rows_are_rows_of_the_table_with_their_scores(bundle, mixed_table):
    names = bundle.schema.names
    rows = {tuple(row.values()) for row in mixed_table.select(names).to_pylist()}
    golden = bundle.golden.select(names).to_pylist()
    assert len(golden) == 16
    assert all(tuple(row.values()) in rows for row in golden)
    assert bundle.golden.column_names[len(names) :] == [item.name for item in score_fields()]
    bundle.verify()


@pytest.fixture(scope="module")
def without_examples() -> Bundle:
    return fit(numbers(400), CONFIG, TrainingConfig(max_steps=10, calibration_fraction=0.2, no_examples=True))


def test_no_examples_keeps_no_real_row(without_examples):
    rows = {tuple(row.values()) for row in numbers(400).to_pylist()}
    golden = without_examples.golden.select(["x0", "x1", "x2"]).to_pylist()
    assert len(golden) == 16
    assert not any(tuple(row.values()) in rows for row in golden)
    assert not without_examples.weights["aggregate_prior/means"].any()  # an encoding tells that its row was there


def test_synthetic_golden_rows_verify_after_save_and_load(without_examples, tmp_path):
    without_examples.save(str(tmp_path / "b"))
    load_bundle(str(tmp_path / "b")).verify()


def test_synthetic_rows_of_every_type_can_be_scored():
    n, rng = 400, np.random.default_rng(0)
    days = np.datetime64("2024-01-01", "D") + rng.integers(0, 366, n).astype("timedelta64[D]")
    times = np.datetime64("2024-01-01", "us") + rng.integers(0, 366 * 86_400, n).astype("timedelta64[s]")
    number, level = rng.normal(100, 20, n), rng.choice(["a", "b", "c"], n)
    data = {
        "int8": pa.array((number / 2).astype(np.int8)),
        "uint64": pa.array((number * 1e16).astype(np.uint64)),
        "float16": pa.array(number.astype(np.float16)),
        "decimal": pa.array(number.round(2)).cast(pa.decimal128(9, 2)),
        "text_number": pa.array([f"{x:.3f}" for x in number]),
        "duration": pa.array(number.astype(int), pa.duration("s")),
        "date": pa.array(days),
        "naive": pa.array(times),
        "zoned": pa.array(times, pa.timestamp("ns", "Europe/Berlin")),
        "clock": pa.array(rng.integers(0, 86_400, n).astype(np.int32), pa.time32("s")),
        "text_time": pa.array([str(t) for t in times]),
        "level": pa.array(level, pa.large_string()),
        "dictionary": pa.array(level).dictionary_encode(),
        "code": pa.array(rng.integers(0, 3, n)),
        "flag": pa.array(rng.integers(0, 2, n).astype(bool)),
        "ratio": pa.array(rng.choice([0.5, 1.5], n)),
        "one": pa.array([7] * n, pa.int32()),
        "word": pa.array(["same"] * n),
        "never": pa.nulls(n, pa.float64()),
        "null": pa.nulls(n),
    }
    table = pa.table(data)
    forced = {
        "numeric": ["text_number"],
        "timestamp": ["text_time"],
        "categorical": ["code", "ratio"],
    }
    kinds, passthrough = choose_kinds(table.schema, **forced)
    tables = open_tables(table)
    scan = scan_table(tables, kinds, Split(0.1, 0.0, 0), lambda *_: None)
    schema = infer_schema(scan.statistics, table.schema, passthrough, list(chain(*forced.values())))
    assert set(schema.names) == set(data)
    drawn = synthetic_rows(schema, 50, seed=0)
    encoded = encode(drawn, schema, ("standard",))
    assert len(encoded.rejects) == 0, encoded.rejects.summary()
    for feature in schema.features:
        known = (
            feature.name in ("dictionary",)
            or drawn.schema.field(feature.name).type == table.schema.field(feature.name).type
        )
        assert known, feature.name
        if feature.kind in ("categorical", "constant") and feature.levels:
            assert (encoded.codes[feature.name] > 0).all(), feature.name


# ---- what the bundle says ----------------------------------------------------------------------------


def test_the_card_says_where_a_bundle_comes_from(bundle):
    card = bundle.card
    assert card["data"]["source"] == "in memory"
    assert (card["data"]["num_rows"], card["data"]["num_columns"]) == (4000, 11)
    assert card["training_config"]["max_steps"] == 300
    assert card["calibration"]["num_rows"] == bundle.calibration.num_rows
    assert card["calibration"]["score_quantiles"]["0.5"] == pytest.approx(np.median(bundle.calibration.scores))
    assert set(card["versions"]) == {"python", "beam-vae", "tensorflow", "keras", "numpy", "pyarrow"}
    assert card["training"]["steps"] <= 300


def test_a_data_frame_trains_the_same_model_as_its_table(plain):
    assert fit(numbers(400).to_pandas(), CONFIG, QUICK).model_version == plain.model_version


def test_a_fit_writes_its_bundle_over_another_on_purpose(plain, tmp_path):
    plain.save(str(tmp_path / "b"))
    other = fit(numbers(400, seed=1), CONFIG, QUICK, output=str(tmp_path / "b"), overwrite=True)
    assert load_bundle(str(tmp_path / "b")).model_version == other.model_version != plain.model_version


# ---- refused before any training ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"label": "y"}, ValueError, "y: named as label, but the table has no such column"),
        ({"numeric": ["y"]}, ValueError, "y: named as numeric, but the table has no such column; it has x0, x1, x2"),
        ({"categorical": ["y"]}, ValueError, "y: named as categorical, but the table has no such column"),
        ({"timestamp": ["y"]}, ValueError, "y: named as timestamp, but the table has no such column"),
        ({"exclude": ["y"]}, ValueError, "y: named as excluded, but the table has no such column"),
        ({"exclude": ["x0"], "numeric": ["x0"]}, ValueError, "x0: named as numeric and as excluded"),
        ({"exclude": ["x0", "x1", "x2"]}, ValueError, "expected a column that varies, got 0"),
        ({"label": "x0"}, RecordError, "x0: expected labels 0 and 1, got others"),
        (
            {"training": TrainingConfig(time_column="y")},
            ValueError,
            "y: named as time_column, but the table has no such column",
        ),
        ({"training": TrainingConfig(time_column="x0")}, RecordError, "x0: expected times, got others"),
        (
            {"training": TrainingConfig(validation_fraction=0.5, calibration_fraction=0.499999)},
            ValueError,
            "expected rows to train, validate and calibrate on, got 0, ",
        ),
        (
            {"training": TrainingConfig(validation_fraction=1e-6)},
            ValueError,
            "expected rows to train, validate and calibrate on, got .*, 0 and ",
        ),
        ({"quality": "better"}, ValueError, "quality: expected 'fast' or 'default' or 'best', got 'better'"),
        ({"quality": "best", "config": VAEConfig()}, ValueError, "quality, config: expected one of them"),
    ],
)
def test_wrong_arguments_are_refused_before_training(no_training, arguments, error, message):
    with pytest.raises(error, match=message):
        fit(numbers(2000), **arguments)


@pytest.mark.parametrize(
    ("table", "arguments", "error", "message"),
    [
        (numbers(19), {}, ValueError, "expected at least 20 rows to learn from, got 19"),
        (numbers(0), {}, ValueError, "expected at least 20 rows to learn from, got 0"),
        (
            numbers(100).append_column("y", pa.array([1] * 90 + [0] * 10)),
            {"label": "y"},
            ValueError,
            "expected at least 20 training rows, got 10",
        ),
        (pa.table({"a": [1] * 50, "b": ["x"] * 50}), {}, ValueError, "expected a column that varies, got 2 constant"),
        (
            numbers(50).append_column("anomaly_score", pa.array(range(50))),
            {},
            ValueError,
            "anomaly_score: the input has such a column already",
        ),
        (
            numbers(50).append_column("x0", pa.array(range(50))),
            {},
            RecordError,
            "x0: expected each column once, the table has it twice",
        ),
        (
            numbers(2000).append_column("at", pa.nulls(2000, pa.timestamp("us"))),
            {"training": TrainingConfig(time_column="at")},
            RecordError,
            "at: expected times, got none",
        ),
        (
            numbers(2000).append_column("at", pa.array([0] * 2000, pa.timestamp("us"))),
            {"training": TrainingConfig(time_column="at")},
            ValueError,
            "expected rows to train, validate and calibrate on, got .* and 0; change .* time_column",
        ),
        (
            numbers(50).append_column("w", pa.array(["1"] * 49 + ["one"])),
            {"numeric": ["w"]},
            RecordError,
            "w: expected numbers, got 'one'",
        ),
        (
            numbers(50).append_column("w", pa.array(["2025-01-01"] * 49 + ["noon"])),
            {"timestamp": ["w"]},
            RecordError,
            "w: expected times, got 'noon'",
        ),
    ],
)
def test_tables_that_teach_nothing_are_refused_before_training(no_training, table, arguments, error, message):
    with pytest.raises(error, match=message):
        fit(table, **arguments)


@pytest.mark.parametrize("role", [TRAIN, VALIDATION, CALIBRATION])
def test_an_infinite_number_in_a_row_of_any_role_is_refused_before_training(no_training, role):
    table = numbers(2000)
    split = choose_split(open_tables(table), TrainingConfig(), None)
    x0 = table.column("x0").to_numpy().copy()
    x0[np.flatnonzero(split.roles(table, 0) == role)[5]] = np.inf
    with pytest.raises(RecordError, match="x0: expected finite numbers, got 1 infinite"):
        fit(table.set_column(0, "x0", pa.array(x0)))


def test_an_infinite_number_in_a_row_left_out_does_not_matter():
    label = np.arange(1000) % 10 == 0
    x0 = np.where(label, np.inf, numbers(1000).column("x0").to_numpy())
    table = numbers(1000).set_column(0, "x0", pa.array(x0)).append_column("y", pa.array(label))
    assert np.isfinite(fit(table, CONFIG, QUICK, label="y").threshold.value)


def test_an_output_that_is_there_is_refused_before_training(no_training, bundle_uri, tmp_path):
    with pytest.raises(FileExistsError, match="already exists; choose another place or overwrite it on purpose"):
        fit(numbers(100), output=bundle_uri)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a bundle, so it will not be overwritten"):
        fit(numbers(100), output=str(tmp_path), overwrite=True)


def test_files_that_are_not_there_are_refused(no_training, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing/\*\.parquet: no \.parquet file matches"):
        fit(str(tmp_path / "nothing" / "*.parquet"))


# ---- calibration holds on a fourth split of normal rows ------------------------------------------------


def check_calibration(bundle: Bundle, fresh: pa.Table, rate: float = 0.01) -> None:
    scored = bundle.score(fresh)
    assert ks_2samp(scored.column("anomaly_score").to_numpy(), bundle.calibration.scores).pvalue > 0.01
    flagged, n = scored.column("is_anomaly").to_numpy().sum(), bundle.calibration.num_rows
    # Flagged rows lie above the k-th largest of n exchangeable scores.
    k = int(np.floor(rate * (n + 1)))
    low, high = betabinom(fresh.num_rows, k, n + 1 - k).interval(0.999)
    assert low <= flagged <= high


def test_calibration_holds_on_fresh_normal_rows(bundle, make_table):
    check_calibration(bundle, make_table(8000, seed=11))


@pytest.mark.parametrize("name", ["annthyroid", "mammography"])
def test_calibration_holds_on_held_out_normal_rows_of_a_real_table(name):
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    table = pq.read_table(path)
    label = table.column_names[-1]
    normal = np.flatnonzero(table.column(label).to_numpy() == 0)
    order = np.random.default_rng(0).permutation(normal)
    fresh, rest = order[: len(order) // 3], order[len(order) // 3 :]
    columns = table.drop_columns([label])
    bundle = fit(columns.take(pa.array(rest)), CONFIG, TrainingConfig(max_steps=200))
    check_calibration(bundle, columns.take(pa.array(fresh)))


def test_a_bad_cell_is_told_by_its_row_in_the_whole_table(mixed_table):
    values = mixed_table["length"].to_numpy().copy()
    values[2500] = np.inf
    with pytest.raises(RecordError, match=r"length: expected finite numbers, got 1 infinite, the first in row 2,500"):
        fit(mixed_table.set_column(0, "length", pa.array(values)))
