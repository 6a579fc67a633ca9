import csv
import datetime
import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm, rankdata, wilcoxon

import vae_model
from benchmarks import accuracy, calibration, tables
from benchmarks.accuracy import Results, average_ranks, measure, read_published, signed_rank_p
from benchmarks.from_npz import convert
from benchmarks.peers import Fitted, Method, MidRanks, Preparation, quantile, standard
from benchmarks.runs import Runs, run_all

DATA = Path(__file__).parents[2] / "shared" / "data"
KNN = "knn_meansq_standard"


def labelled(num_rows: int, num_anomalies: int) -> tables.Labelled:
    """Rows that are numbered, with anomalies anywhere among them."""
    anomalous = np.zeros(num_rows, bool)
    anomalous[np.random.default_rng(1).choice(num_rows, num_anomalies, replace=False)] = True
    return tables.Labelled(pa.table({"row": np.arange(num_rows)}), anomalous)


def write_tables(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        rng = np.random.default_rng(seed)
        label = (np.arange(120) % 6 == 0).astype(np.int8)
        x = rng.normal(size=(120, 3)) + 3 * label[:, None]
        pq.write_table(pa.table({**{f"x{j}": x[:, j] for j in range(3)}, "label": label}), folder / f"{name}.parquet")
    return folder


# ---- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "num_anomalies", "cap"), [(37, 4, 50_000), (1205, 100, 50_000), (1500, 99, 1100)])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_dte_protocol_is_the_papers(num_rows, num_anomalies, cap, seed):
    table = labelled(num_rows, num_anomalies)
    # The data's README, word by word.
    np.random.seed(seed)  # noqa: NPY002
    index = np.arange(num_rows)
    if num_rows < 1000:
        index = np.random.choice(num_rows, 1000, replace=True)  # noqa: NPY002
    if num_rows > cap:
        index = np.random.choice(num_rows, cap, replace=False)  # noqa: NPY002
    normal = [i for i in index if not table.anomalous[i]]
    first = normal[: round(len(normal) * 0.5)]
    others = normal[len(first) :] + [i for i in index if table.anomalous[i]]
    split = tables.dte_split(table, seed, cap)
    assert split.train["row"].to_pylist() == first
    assert split.test["row"].to_pylist() == others
    assert split.anomalous.tolist() == table.anomalous[others].tolist()


@pytest.mark.parametrize(("name", "auroc", "aupr"), [("letter", 35.43, 8.70), ("cardio", 92.0, 77.22)])
def test_nearest_neighbours_are_as_good_as_published(name, auroc, aupr):
    neighbors, metrics = pytest.importorskip("sklearn.neighbors"), pytest.importorskip("sklearn.metrics")
    path = DATA / "adbench" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    split = tables.dte_split(tables.read_table(path), 0, 50_000)
    prepare = Preparation(split.train, standard(0, split.train.num_rows))
    distances, _ = neighbors.NearestNeighbors(n_neighbors=5).fit(prepare(split.train)).kneighbors(prepare(split.test))
    assert 100 * metrics.roc_auc_score(split.anomalous, distances[:, -1]) == pytest.approx(auroc, abs=0.01)
    assert 100 * metrics.average_precision_score(split.anomalous, distances[:, -1]) == pytest.approx(aupr, abs=0.01)


def test_half_of_the_normal_rows_is_held_out_at_random():
    table = labelled(1000, 100)
    split = tables.holdout_split(table, 0, 50_000)
    train, test = split.train["row"].to_numpy(), split.test["row"].to_numpy()
    assert sorted([*train, *test]) == list(range(1000))
    assert (len(train), split.anomalous.sum()) == (450, 100)
    assert not table.anomalous[train].any()
    assert (table.anomalous[test] == split.anomalous).all()
    assert train.mean() == pytest.approx(499.5, abs=50)  # not the first half
    assert tables.holdout_split(table, 0, 50_000).train == split.train
    assert tables.holdout_split(table, 1, 50_000).train != split.train
    capped = tables.holdout_split(table, 0, 200)
    assert capped.train.num_rows + capped.test.num_rows == 200


def test_a_share_of_the_training_rows_may_be_anomalies_and_the_test_rows_stay():
    table = labelled(2000, 200)
    clean, dirty = (tables.contaminated_split(table, 0, 50_000, share) for share in (0.0, 0.1))
    rows = dirty.train["row"].to_numpy()
    assert table.anomalous[rows].mean() == pytest.approx(0.1, abs=1 / 900)
    assert set(rows[~table.anomalous[rows]]) == set(clean.train["row"].to_pylist())
    assert clean.test == dirty.test
    assert not set(rows) & set(dirty.test["row"].to_pylist())
    with pytest.raises(ValueError, match="expected 225 anomalies to mix into 900 normal rows, got 100"):
        tables.contaminated_split(table, 0, 50_000, 0.2)


def test_tables_that_cannot_be_used_are_told(tmp_path):
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match=r"plain\.parquet: expected a column 'label', got none"):
        tables.find_tables(tmp_path)
    with pytest.raises(ValueError, match=r"expected other\.parquet, got plain"):
        tables.find_tables(tmp_path, ["other"])
    pq.write_table(pa.table({"label": [0, 2]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match=r"label: expected 0 and 1 only, got \['0', '2'\]"):
        tables.read_table(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="rows and anomalies to test on, got 5 to train on, 5 and 0 to test on"):
        tables.holdout_split(labelled(10, 0), 0, 50_000)


# ---- what detectors are given ----------------------------------------------------------------------


def test_arrays_become_tables_row_by_row(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 7 == 0
    np.savez(tmp_path / "12_some.table.npz", X=x, y=y.astype(float))
    path = convert(tmp_path / "12_some.table.npz", tmp_path)
    assert path.name == "some.table.parquet"
    table = tables.read_table(path)
    np.testing.assert_allclose(table.rows.to_pandas().to_numpy(), x, rtol=1e-6)
    assert table.rows.column_names == ["x00", "x01", "x02"]
    np.testing.assert_array_equal(table.anomalous, y)


def test_fit_never_sees_a_label(tmp_path, monkeypatch):
    given = {}

    def fit(*arguments, **options):
        given["all"] = [*arguments, *options.values()]
        raise RuntimeError("seen enough")

    monkeypatch.setattr(vae_model, "fit", fit)
    monkeypatch.setattr(Method, "load", lambda method: None)  # TensorFlow, for nothing
    path = write_tables(tmp_path, "a") / "a.parquet"
    job = {"protocol": "holdout", "cap": 100, "table": "a", "seed": 3, "method": "default", "path": str(path)}
    (row,) = accuracy.work([job])
    assert row["error"] == "RuntimeError: seen enough"
    table, training, quality = given["all"]
    assert quality == "default"
    assert table.column_names == ["x0", "x1", "x2"]
    assert training == vae_model.TrainingConfig(seed=3)
    # Nor is the order of its rows a label in disguise: all are normal, at x = 0 and not at 3.
    assert np.abs(np.mean([table[name].to_numpy().mean() for name in table.column_names])) < 1


def test_mixed_tables_become_numbers():
    pytest.importorskip("sklearn")
    day = datetime.datetime(2024, 1, 1)
    train = pa.table(
        {
            "number": pa.array([1.0, None, 3.0, 8.0, float("nan")]),
            "flag": pa.array([True, False, False, False, False]),
            "time": pa.array([day + datetime.timedelta(days=i) for i in range(5)]),
            "name": pa.array(["b", "a", "b", None, "b"]),
            "coded": pa.array(["u", "u", "v", "v", "v"]).dictionary_encode(),
        }
    )
    prepare = Preparation(train, standard(0, 5))
    numbers = np.array([[1, 3, 3, 8, 3], [1, 0, 0, 0, 0], [0, 1, 2, 3, 4]], float).T  # 3 is the median
    expected = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
    names = np.array([[1, 0], [0, 1], [1, 0], [0, 0], [1, 0]])
    coded = np.array([[0, 1], [0, 1], [1, 0], [1, 0], [1, 0]])
    np.testing.assert_allclose(prepare(train), np.hstack([expected, names, coded]), atol=1e-12)
    unseen = train.slice(0, 1).set_column(3, "name", pa.array(["z"]))
    np.testing.assert_allclose(prepare(unseen)[0], [*expected[0], 0, 0, 0, 1], atol=1e-12)


def test_the_most_frequent_levels_have_columns():
    levels = [f"level {i}" for i in range(80)]
    table = pa.table({"name": [name for i, name in enumerate(levels) for _ in range(1 + (i >= 30))]})
    inputs = Preparation(table, None)(table)
    assert inputs.shape == (130, 50)
    assert inputs.sum(axis=1).tolist() == [0] * 30 + [1] * 100


def test_quantile_inputs_are_normal_scores():
    pytest.importorskip("sklearn")
    table = pa.table({"x": np.exp(np.random.default_rng(0).normal(size=999))})
    inputs = Preparation(table, quantile(0, 999))(table)[:, 0]
    assert (np.argsort(inputs) == np.argsort(table["x"].to_numpy())).all()
    assert np.quantile(inputs, [0.1587, 0.5, 0.8413]) == pytest.approx([-1, 0, 1], abs=0.01)


def test_middle_ranks_are_those_of_scipy_and_jump_beyond_the_training_values():
    train = np.random.default_rng(0).integers(0, 20, (500, 2)).astype(float)
    ranks = MidRanks().fit(train)
    np.testing.assert_allclose(ranks.transform(train), norm.ppf((rankdata(train, axis=0) - 0.5) / 500))
    assert ranks.transform(np.array([[-1.0, 20.0]])).tolist() == [[-5, 5]]
    between = norm.ppf((train[:, 0] < 7.5).mean())
    assert ranks.transform(np.array([[7.5, 3.0]]))[0, 0] == pytest.approx(between)


PEERS = ["IForest", "ECOD", "KNN", "LOF", "PCA", "AutoEncoder", "VAE", "knn_meansq_quantile", "knn_meansq_rank"]


@pytest.mark.parametrize("name", PEERS)
def test_peers_find_what_is_far_away(name):
    method = accuracy.METHODS[name]
    if method.absent:
        pytest.skip(f"{', '.join(method.absent)} not installed")
    rng = np.random.default_rng(0)
    anomalous = np.arange(200) < 50
    test = pa.table({"x": rng.normal(size=200) + 9 * anomalous, "y": rng.normal(size=200) - 9 * anomalous})
    train = pa.table({"x": rng.normal(size=200), "y": rng.normal(size=200)})
    found = measure(method, 0, tables.Split(train, test, anomalous))
    assert found["error"] == ""
    assert found["auroc"] > 0.95


def test_failures_are_results():
    pytest.importorskip("sklearn")
    split = tables.holdout_split(labelled(100, 10), 0, 100)
    scores = np.arange(55.0)
    mine = Method(lambda seed, train: Fitted(lambda table: scores, "1"), ())
    assert measure(mine, 0, split)["distinct_scores"] == 55
    scores[3] = np.inf
    assert measure(mine, 0, split)["error"] == "ValueError: 1 of 55 scores are not finite, of 55 rows"
    scores = scores[4:]
    assert "0 of 51 scores are not finite, of 55 rows" in measure(mine, 0, split)["error"]


# ---- runs ------------------------------------------------------------------------------------------


def test_a_second_start_does_what_is_missing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    data, out = write_tables(tmp_path, "a", "b"), tmp_path / "runs.csv"
    start = [f"--data={data}", f"--out={out}", "--protocol=holdout", "--seeds=1", "--methods", KNN]
    done = dict(zip(accuracy.KEY, ("holdout", 50_000, "a", 0, KNN), strict=True))
    Runs(out, accuracy.KEY, accuracy.NUMBERS).append({**done, "auroc": 0.75, "rows": 120})
    first = out.read_text()
    out.write_text(first + "holdout,50000,b,0,knn_mea")  # cut off while it was written
    accuracy.main(start)
    assert out.read_text().startswith(first)
    lines = list(csv.DictReader(out.open()))
    assert [(line["table"], line["error"]) for line in lines] == [("a", ""), ("b", "")]
    assert float(lines[0]["auroc"]) == 0.75
    assert 0.9 < float(lines[1]["auroc"]) <= 1
    assert "mean (2)" in capsys.readouterr().out
    accuracy.main([f"--out={out}", "--protocol=holdout", "--markdown"])  # prints, and runs nothing
    assert len(out.read_text().splitlines()) == 3
    assert f"|  | {KNN} |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected runs of protocol dte with cap 50000, got none"):
        accuracy.main([f"--out={out}"])


def test_a_process_that_dies_costs_one_run(tmp_path, monkeypatch):
    program = """
import json, os, sys
for run in json.loads(sys.argv[2]):
    if run["seed"] == 1:
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(9)
    print("run: " + json.dumps({**run, "x": 2.5, "error": "", "version": os.environ["OMP_NUM_THREADS"]}), flush=True)
"""
    (tmp_path / "dies.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runs = Runs(tmp_path / "runs.csv", ["cap", "seed"], ["x"])
    job = [{"cap": 1, "seed": seed} for seed in range(3)]
    said = []
    run_all("dies", [job], runs, lambda row: said.append(row) or "", threads=3)
    frame = runs.frame()
    assert frame["x"].tolist() == pytest.approx([2.5, np.nan, 2.5], nan_ok=True)
    assert frame["error"].tolist() == ["", "process ended with code 9: out of memory", ""]
    assert frame["version"].tolist() == ["3", "", "3"]
    assert len(said) == 3
    assert runs.missing(job) == []
    assert runs.missing(job, retry=True) == [job[1]]
    runs.append({"cap": 1, "seed": 1, "x": 7, "error": "", "version": "two\nlines, and a comma"})
    assert runs.frame()["x"].tolist() == [2.5, 2.5, 7]
    assert runs.frame()["version"].tolist()[-1] == "two lines, and a comma"


# ---- figures ---------------------------------------------------------------------------------------


@pytest.fixture
def runs() -> pd.DataFrame:
    """Two methods on three tables with two seeds; "b" failed once."""
    rng = np.random.default_rng(0)
    keys = itertools.product("xyz", "ab", (0, 1))
    rows = [{"table": t, "method": m, "seed": s, "auroc": rng.random(), "error": ""} for t, m, s in keys]
    rows[6] |= {"auroc": np.nan, "error": "it broke"}  # y, b, 0
    return pd.DataFrame(rows)


def test_means_and_deviations_are_those_of_numpy(runs):
    found = Results.of(runs, "auroc")
    a = 100 * runs[runs.method == "a"]["auroc"].to_numpy().reshape(3, 2)
    np.testing.assert_allclose(found.mean["a"], a.mean(axis=1))
    np.testing.assert_allclose(found.sd["a"], a.std(axis=1, ddof=1))
    assert found.sd_of_mean("a", ["x", "y", "z"]) == pytest.approx(a.mean(axis=0).std(ddof=1))
    b = 100 * runs[runs.method == "b"]["auroc"].to_numpy().reshape(3, 2)[[0, 2]]
    assert found.failed["b"].tolist() == [False, True, False]
    assert np.isnan(found.mean.loc["y", "b"])
    assert found.sd_of_mean("b", ["x", "z"]) == pytest.approx(b.mean(axis=0).std(ddof=1))


def test_ranks_are_averages_over_tables():
    mean = pd.DataFrame(
        {"a": [90.0, 80.0, 70.0, 60.0], "b": [80.0, 80.0, np.nan, np.nan], "c": [70.0, 90.0, 60.0, 1.0]}
    )
    failed = pd.DataFrame({"a": [False] * 4, "b": [False, False, True, False], "c": [False] * 4})
    ranks, num_tables = average_ranks(mean, failed)
    assert num_tables == 3  # "b" was not run on the last
    assert ranks["a"] == pytest.approx((1 + 2.5 + 1) / 3)
    assert ranks["b"] == pytest.approx((2 + 2.5 + 3) / 3)
    assert ranks["c"] == pytest.approx((3 + 1 + 2) / 3)
    complete = mean.iloc[:2]
    assert average_ranks(complete, failed.iloc[:2])[0].tolist() == rankdata(-complete, axis=1).mean(axis=0).tolist()


def test_signed_ranks_are_of_the_tables_that_both_have():
    rng = np.random.default_rng(0)
    ours, other = pd.Series(rng.normal(1, 1, 20)), pd.Series(rng.normal(0, 1, 20))
    other[3] = np.nan
    keep = other.notna()
    assert signed_rank_p(ours, other) == pytest.approx(wilcoxon(ours[keep], other[keep]).pvalue)
    assert np.isnan(signed_rank_p(ours, ours))


def test_published_figures_are_those_of_the_same_tables(tmp_path):
    for part, figure in {"aucroc": 70, "aucpr": 30}.items():
        (tmp_path / f"mean_{part}.csv").write_text(f"dataset,kNN\nwilt,{figure}\nskin,{figure + 1}\n")
    found = read_published(tmp_path, ["Wilt", "other"])
    assert found["auroc"].loc["Wilt", "kNN, published"] == 70
    assert found["aupr"].loc["Wilt", "kNN, published"] == 30
    assert found["auroc"].loc["other"].isna().all()
    (tmp_path / "more_aucpr.csv").write_text("dataset,kNN\n")
    with pytest.raises(ValueError, match=r"expected one file \*aucpr\*\.csv, got 2"):
        read_published(tmp_path, ["Wilt"])


def test_what_is_printed_tells_failures_and_how_many_tables_a_mean_has(runs, tmp_path, capsys):
    names = {"a": "default", "b": "KNN"}
    for part in ("aucroc", "aucpr"):
        (tmp_path / f"{part}.csv").write_text("dataset,kNN,VAE\nx,50,60\ny,50,60\nz,50,90\n")
    runs = runs.assign(protocol="dte", cap=10, rows=[2000] * 8 + [500] * 4, aupr=runs["auroc"], distinct_scores=9)
    runs = runs.assign(method=runs["method"].map(names), fit_seconds=1.25, score_seconds=0.5)
    accuracy.report(runs, tmp_path, markdown=True)
    printed = capsys.readouterr().out
    by_table, summary, failed = printed.partition("Means over")[0], *printed.partition("Means over")[2].split("Failed")
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in summary.splitlines() if line[:1] == "|"}
    mean = 100 * runs[runs.method == "default"]["auroc"].mean()
    both = 100 * runs[(runs.method == "KNN") & (runs.table != "y")]["auroc"].mean()
    sd = Results.of(runs, "auroc").sd_of_mean("default", "xyz")
    assert table["default"][0].strip() == f"{mean:.1f} ±{sd:.1f}"
    assert table["KNN"][0].split()[0] == f"{both:.1f}"
    assert table["KNN"][0].split()[-1] == "(2)"
    assert [cell.strip() for cell in table["VAE, published"][:4]] == ["70.0", "70.0", "60.0", "60.0"]
    assert [line.split("|")[3].strip() for line in by_table.splitlines() if line.startswith("| y |")] == ["failed"] * 2
    assert "| KNN | y | 0 | it broke |" in failed


# ---- calibration -----------------------------------------------------------------------------------


def test_intervals_of_false_positives_hold_for_exchangeable_rows():
    rng = np.random.default_rng(0)
    n, m = 199, 300
    low, high = calibration.interval(n, m, 0.1)
    inside = 0
    for _ in range(4000):
        rows = rng.random(n + m)
        known, fresh = np.sort(rows[:n]), rows[n:]
        p = (1 + n - np.searchsorted(known, fresh)) / (n + 1)
        inside += low <= (p <= 0.1).sum() <= high
    assert inside / 4000 >= 0.985  # discrete: at least 99 % up to chance
    assert high - low < 60
    assert calibration.interval(n, m, 0.001) is None


def test_calibration_is_measured_on_normal_rows_that_fit_has_not_seen(bundle, make_table, monkeypatch):
    rows = make_table(6000, seed=21)
    anomalous = np.arange(6000) < 100
    given = []
    monkeypatch.setattr(calibration, "fit_ours", lambda method, seed, train: given.append(train) or bundle)
    run = {"method": "default", "seed": 0, "cap": 50_000}
    found = calibration.calibrated(tables.Labelled(rows, anomalous), run)
    assert given[0].num_rows == found["test_rows"] == 2950
    assert found["calibration_rows"] == bundle.calibration.num_rows
    assert found["ks_p"] > 1e-3  # the bundle was fitted on other rows of the same kind
    assert found["10 %"] >= found["1 %"] >= found["0.1 %"] >= found["far_beyond"]
    assert found["1 %"] / 2950 == pytest.approx(0.01, abs=0.02)
    grid = calibration.report_calibration(pd.DataFrame([{**run, **found, "table": "a"}]))[0]
    assert [row[0] for row in grid.rows] == ["default, a", "default, all"]
    assert grid.rows[0][1:3] == [f"{bundle.calibration.num_rows:,}", "2,950"]


def test_the_contamination_curve_is_paired():
    found = [("x", 0.0, 0.9), ("x", 0.05, 0.8), ("y", 0.0, 0.5), ("z", 0.0, 0.7), ("z", 0.05, 0.69)]
    rows = [{"method": "a", "table": t, "share": str(share), "auroc": value, "aupr": 0} for t, share, value in found]
    grid = calibration.report_contamination(pd.DataFrame(rows))[0]
    assert grid.headings == ["", "0 %", "5 %"]
    assert grid.rows[0] == ["a, x", "90.0", "-10.0"]
    assert grid.rows[-1] == ["a, mean (tables)", "70.0", "-5.5 (2)"]


@pytest.mark.parametrize(("method", "told"), [("default_told", 0.05), ("default", None)])
def test_one_method_is_told_the_share_of_anomalies(monkeypatch, method, told):
    given = {}

    def fit(table, *, training, quality):
        given.update(rows=table.num_rows, contamination=training.contamination, quality=quality)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(vae_model, "fit", fit)
    monkeypatch.setattr(Method, "load", lambda method: None)  # TensorFlow, for nothing
    run = {"what": "contamination", "share": "0.05", "cap": 460, "seed": 0, "method": method}
    assert calibration.contaminated(labelled(460, 60), run)["error"] == "RuntimeError: seen enough"
    assert given == {"rows": 200 + 11, "contamination": told, "quality": "default"}  # half the normal rows, and 5 %


def test_only_contamination_has_a_share_to_tell(tmp_path, capsys):
    with pytest.raises(SystemExit):
        calibration.main(["--what=stability", "--methods", "default_told", f"--out={tmp_path}/runs.csv"])
    assert "default_told is for contamination alone" in capsys.readouterr().err


def test_stability_is_the_rank_correlation_of_two_seeds(monkeypatch):
    table = labelled(100, 10)
    scores = {4: np.arange(55.0), 5: np.arange(55.0) ** 3}
    fitted = Method(lambda seed, train: Fitted(lambda rows: scores[seed], "1"), ())
    monkeypatch.setitem(calibration.METHODS, "mine", fitted)
    run = {"what": "stability", "method": "mine", "seed": 2, "cap": 100, "table": "a", "path": ""}
    assert calibration.stable(table, run)["spearman"] == pytest.approx(1)
    scores[5] = -scores[5]
    assert calibration.stable(table, run)["spearman"] == pytest.approx(-1)
    values = [("x", 0.9), ("x", 0.7), ("y", 0.99), ("z", 0.5)]
    frame = pd.DataFrame([{"table": t, "method": "a", "spearman": value} for t, value in values])
    (grid,) = calibration.report_stability(frame)
    assert grid.rows == [["x", "0.800"], ["y", "0.990"], ["z", "0.500"], ["median", "0.800"]]


def test_calibration_runs_are_found_again(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    runs = Runs(path, calibration.KEY, calibration.NUMBERS, ["calibrated_by"])
    key = {"what": "stability", "share": "0.0", "cap": 50_000, "table": "a", "seed": 0, "method": "default"}
    runs.append({**key, "spearman": 0.97})
    assert runs.missing([key, {**key, "seed": 1}]) == [{**key, "seed": 1}]
    calibration.main(["--what=stability", f"--out={path}", "--markdown"])
    assert "| median | 0.970 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        calibration.main(["--methods", "KNN", f"--out={path}"])
    assert "expected some of fast, default, best, got KNN" in capsys.readouterr().err
