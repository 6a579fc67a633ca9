import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vae_model
from pipeline.statistics import main
from pipeline.statistics_job import _CombineStatistics, run
from vae_model import TrainingConfig
from vae_model.scan import Split, columns_and_roles, limited, read_scan, scan_table
from vae_model.schema import infer_schema
from vae_model.tables import ParquetTables

FLAGS = ["--runner=FnApiRunner"]
SPLIT = Split(0.1, 0.2, seed=3)


@pytest.fixture(scope="module")
def folder(mixed_table, tmp_path_factory):
    """`mixed_table` in three files of several row groups, with a column that has another value in every row."""
    folder = tmp_path_factory.mktemp("tables")
    table = mixed_table.append_column("wide", pa.array(np.random.default_rng(0).lognormal(0, 3, mixed_table.num_rows)))
    for i, (start, size) in enumerate([(0, 1500), (1500, 700), (2200, 1800)]):
        pq.write_table(table.slice(start, size), folder / f"{i}.parquet", row_group_size=290)
    return folder


def both(folder, path, training=None, **reading):
    """The pass by the job, the local one with the same split, and what else a schema is made of."""
    training = training or TrainingConfig()
    run(str(folder), str(path), training, FLAGS, **reading)
    tables = ParquetTables(str(folder))
    kinds, passthrough, shares = columns_and_roles(tables, training, **reading)
    found, split = read_scan(str(path), tables, kinds, shares)
    return found, scan_table(tables, kinds, split, lambda *_: None), split, tables, passthrough


def test_the_job_gives_the_schema_of_the_local_pass(folder, tmp_path):
    found, local, _, tables, passthrough = both(folder, tmp_path / "s.json", exclude=["weight"])
    schemas = [infer_schema(scan.statistics, tables.schema, passthrough).to_json() for scan in (found, local)]
    assert schemas[0] == schemas[1]
    assert found.num_rows.tolist() == local.num_rows.tolist()
    assert sum(found.num_rows) == 4000
    assert schemas[0]["passthrough"]["weight"] == "excluded by the user"


def test_rows_after_the_jobs_time_limit_calibrate(folder, mixed_table, tmp_path):
    found, local, split, *_ = both(folder, tmp_path / "s.json", TrainingConfig(time_column="seen_at"))
    times = mixed_table["seen_at"].cast(pa.int64()).to_numpy()
    late = int((times > split.time_limit).sum())
    assert found.num_rows.tolist() == local.num_rows.tolist()
    assert found.num_rows[2] == late
    assert late / 4000 == pytest.approx(split.calibration, abs=0.005)
    assert limited(split, ParquetTables(str(folder))) == split


@pytest.mark.parametrize("seed", range(4))
def test_merging_in_any_order_and_tree_gives_the_same_statistics(folder, mixed_table, seed):
    rng = np.random.default_rng(seed)
    tables = ParquetTables(str(folder))
    kinds, _, _ = columns_and_roles(tables, TrainingConfig())
    parts = [(start, table, SPLIT) for start, table in tables.scan(list(kinds))]
    combine = _CombineStatistics(kinds)
    scans = []
    for group in np.array_split(rng.permutation(len(parts)), rng.integers(2, 9)):  # Beam bundles
        scan = combine.create_accumulator()
        for i in group:
            scan = combine.add_input(scan, parts[i])
        scans.append(scan)
    while len(scans) > 1:
        taken = sorted(rng.choice(len(scans), size=min(len(scans), rng.integers(2, 4)), replace=False))
        scans = [s for i, s in enumerate(scans) if i not in taken] + [
            combine.merge_accumulators([scans[i] for i in taken])
        ]
    merged, local = scans[0], scan_table(tables, kinds, SPLIT, lambda *_: None)
    assert merged.num_rows.tolist() == local.num_rows.tolist()
    learned = np.concatenate([SPLIT.roles(table, start) < 2 for start, table, _ in parts])
    for name, column in merged.statistics.columns.items():
        other = local.statistics.columns[name]
        assert (column.num_rows, column.num_missing) == (other.num_rows, other.num_missing)
        if column.kind == "categorical":
            assert column.most_frequent() == other.most_frequent()
            assert column.num_distinct == pytest.approx(other.num_distinct, rel=0.04)
        elif column.kind == "timestamp":
            assert (column.minimum, column.maximum, column.resolution) == (
                other.minimum,
                other.maximum,
                other.resolution,
            )
            assert (column.hours, column.months)[0].tolist() == other.hours.tolist()
        else:
            values = np.concatenate([table[name].to_numpy() for _, table, _ in parts])[learned].astype(float)
            values = np.sort(values[~np.isnan(values)])
            assert (column.minimum, column.maximum, column.drifts) == (values[0], values[-1], other.drifts)
            assert column.mean == pytest.approx(values.mean(), rel=1e-12)
            assert column.stddev == pytest.approx(values.std(), rel=1e-12)
            ranks = np.linspace(0.01, 0.99, 50)
            found = column.quantiles.quantile(ranks)
            low, high = (np.searchsorted(values, found, side) / len(values) for side in ("left", "right"))
            bound = (1 + np.log2(len(parts))) / 4096 + 1 / len(values)
            assert (low - bound <= ranks).all()
            assert (ranks <= high + bound).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categorical": ["count"]}, r"s\.json: expected count read as categorical, got it read as numeric; take the"),
        ({"label": "is_large"}, r"s\.json: expected is_large read as nothing, got it read as categorical"),
        ({"training": TrainingConfig(seed=5)}, r"s\.json: expected seed 5, got 0; take the statistics again with"),
        ({"training": TrainingConfig(time_column="seen_at")}, r"s\.json: expected time_column seen_at, got None"),
        ({"training": TrainingConfig(validation_fraction=0.2)}, r"s\.json: expected validation 0\.2, got 0\.1"),
    ],
)
def test_a_file_of_other_flags_is_refused(folder, tmp_path_factory, change, message):
    path = folder.parent / "flags" / "s.json"
    if not path.exists():
        path.parent.mkdir()
        run(str(folder), str(path), TrainingConfig(), FLAGS)
    with pytest.raises(ValueError, match=message):
        vae_model.fit(str(folder), **{"statistics": str(path)} | change)


def test_a_file_of_another_table_or_of_none_is_refused(folder, make_table, tmp_path):
    run(str(folder), str(tmp_path / "s.json"), TrainingConfig(), FLAGS)
    pq.write_table(make_table(4000, 1), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"s\.json: was taken of another table, or of another state of it"):
        vae_model.fit(f"{tmp_path}/other.parquet", statistics=str(tmp_path / "s.json"))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json: is no statistics file that this version reads"):
        vae_model.fit(str(folder), statistics=str(tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError):
        vae_model.fit(str(folder), statistics=str(tmp_path / "absent.json"))


def test_a_cell_that_cannot_be_learned_from_ends_the_job_in_words(tmp_path, capfd):
    values = np.ones(100)
    values[70] = np.inf
    pq.write_table(pa.table({"x": values, "y": np.arange(100) % 7}), tmp_path / "in.parquet", row_group_size=50)
    assert main([f"--input={tmp_path}/in.parquet", f"--output={tmp_path}/s.json", *FLAGS]) == 1
    error = capfd.readouterr().err
    assert "x: expected finite numbers, got 1 infinite, the first in row 70" in error
    assert "Traceback" not in error
    assert not (tmp_path / "s.json").exists()


def test_what_workers_cannot_reach_and_flags_that_nobody_knows_are_refused(folder, tmp_path, capsys):
    flags = ["--runner=DataflowRunner", "--project=project", "--region=us-central1", "--temp_location=gs://b/t"]
    with pytest.raises(ValueError, match=r"--input: expected a URI that Dataflow's workers can reach"):
        run(str(folder), "gs://b/s.json", TrainingConfig(), flags)
    with pytest.raises(ValueError, match=r"--output: expected a URI that Dataflow's workers can reach"):
        run("gs://b/in", str(tmp_path / "s.json"), TrainingConfig(), flags)
    assert main([f"--input={folder}", f"--output={tmp_path}/s.json", "--runer=FnApiRunner"]) == 1
    assert "--runer: " in capsys.readouterr().err


def test_the_file_is_json_that_says_how_it_was_taken(folder, tmp_path):
    run(str(folder), str(tmp_path / "s.json"), TrainingConfig(seed=4), FLAGS, label="is_large")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["format"] == 1
    assert (content["split"]["seed"], content["split"]["label"]) == (4, "is_large")
    assert sum(content["num_rows"]) == 4000
