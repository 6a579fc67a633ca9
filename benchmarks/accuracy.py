"""Accuracy: negative ELBOs beside PyOD's detectors and nearest neighbours, on any folder of labelled Parquet tables.

    python -m benchmarks.accuracy --data DIR [--protocol dte|holdout] [--seeds N] [--methods NAME ...] [--out CSV]
                                  [--published DIR] [--markdown]
    python -m benchmarks.accuracy [--out CSV]     # prints what the file has

Every file `DIR/*.parquet` has a column `label`, 1 for an anomaly; no detector sees it. Ours are `vae_model.fit` and
`Bundle.score` with nothing but a seed and a quality. Every run is a line of the CSV file,
appended once it is done; a second start does only what is missing. The figures of the paper that `--published` names
(CSV files `*aucroc*` and `*aucpr*`, a line per data set and a column per method, in %) are printed where the protocol
is its own: `dte`. Needs scikit-learn, and pyod with torch; methods whose libraries are absent are left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import rankdata, wilcoxon

from benchmarks.peers import PEERS, Fitted, Method
from benchmarks.runs import Grid, Row, Runs, arguments, failures, hand_over, run_all, told
from benchmarks.tables import CLEAN_ROWS, PROTOCOLS, Split, find_tables, read_table

if TYPE_CHECKING:
    from vae_model import Bundle

KEY = ("protocol", "cap", "table", "seed", "method")
METRICS = {"auroc": "AUROC", "aupr": "AUPR"}
NUMBERS = (
    *METRICS,
    "rows",
    "columns",
    "train_rows",
    "test_rows",
    "anomalies",
    "distinct_scores",
    "fit_seconds",
    "score_seconds",
)
NUM_PUBLISHED = 4  # shown table by table; the means are of all


# ---- methods -------------------------------------------------------------------------------------


def fit_ours(quality: str, seed: int, train: pa.Table, contamination: float | None = None) -> Bundle:
    """The public fit with its defaults, told the share of anomalies in `train` where one is given."""
    from vae_model import TrainingConfig, fit

    return fit(train, training=TrainingConfig(seed=seed, contamination=contamination), quality=quality)


def ours(quality: str, seed: int, train: pa.Table, contamination: float | None = None) -> Fitted:
    """The public fit and score."""
    bundle = fit_ours(quality, seed, train, contamination)
    version = f"beam-vae {bundle.card['versions']['beam-vae']}, model {bundle.model_version}"
    return Fitted(lambda table: bundle.score(table).column("anomaly_score").to_numpy(), version)


OURS = ("fast", "default", "best")
OUR_MODULES = ("tensorflow", "keras", "vae_model.training")
METHODS = {**{name: Method(functools.partial(ours, name), OUR_MODULES) for name in OURS}, **PEERS}


def measure(method: Method, seed: int, split: Split) -> Row:
    """One run's results; a detector that fails, or whose scores are not finite, has an error and no figures."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found: Row = {"train_rows": split.train.num_rows, "test_rows": split.test.num_rows}
    found["anomalies"] = int(split.anomalous.sum())
    try:
        method.load()
        start = time.perf_counter()
        fitted = method.fit(seed, split.train)
        found |= {"fit_seconds": time.perf_counter() - start, "version": fitted.version}
        start = time.perf_counter()
        scores = np.asarray(fitted.score(split.test), np.float64)
        found["score_seconds"] = time.perf_counter() - start
        if (wrong := int((~np.isfinite(scores)).sum())) or len(scores) != split.test.num_rows:
            raise ValueError(f"{wrong:,} of {len(scores):,} scores are not finite, of {split.test.num_rows:,} rows")
    except Exception as error:  # whatever a library raises is its result
        return {**found, "error": told(error)}
    return {
        **found,
        "auroc": float(roc_auc_score(split.anomalous, scores)),
        "aupr": float(average_precision_score(split.anomalous, scores)),
        "distinct_scores": len(np.unique(scores)),
        "error": "",
    }


def work(job: Sequence[Row]) -> Iterator[Row]:
    """The runs of one table and seed."""
    first = job[0]
    table = read_table(Path(first["path"]))
    size = {"rows": table.rows.num_rows, "columns": table.rows.num_columns}
    split = PROTOCOLS[first["protocol"]](table, first["seed"], first["cap"])
    for run in job:
        yield {**run, **size, **measure(METHODS[run["method"]], run["seed"], split)}


def describe(row: Row) -> str:
    """A run in a line."""
    name = f"{row['table']}, seed {row['seed']}, {row['method']}"
    if row["error"]:
        return f"{name}: failed: {row['error']}"
    figures = ", ".join(f"{heading} {100 * row[metric]:.1f}" for metric, heading in METRICS.items())
    return f"{name}: {figures}, {row['fit_seconds']:.1f} s + {row['score_seconds']:.1f} s"


# ---- statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Figures of one metric, in %, by table (rows) and method (columns).

    Attributes:
        mean: Over seeds; NaN where it was not run or failed with any seed.
        sd: Over seeds, of the sample; NaN where there is but one.
        failed: Whether a run failed.
        by_seed: A column for each seed in the index's second level.
    """

    mean: pd.DataFrame
    sd: pd.DataFrame
    failed: pd.DataFrame
    by_seed: pd.DataFrame

    @classmethod
    def of(cls, runs: pd.DataFrame, metric: str) -> Results:
        """From the runs of one protocol and cap."""
        values = runs.assign(value=100 * runs[metric], failed=runs["error"] != "")
        groups = values.groupby(["table", "method"])
        failed = groups["failed"].any().unstack(fill_value=False).astype(bool)
        mean, sd = (groups["value"].agg(how).unstack().where(~failed) for how in ("mean", "std"))
        return cls(mean, sd, failed, values.pivot(index="table", columns=["method", "seed"], values="value"))

    def sd_of_mean(self, method: str, tables: Sequence[str]) -> float:
        """Standard deviation over seeds of the mean over tables; NaN where under two seeds ran on all of them."""
        values = self.by_seed[method].loc[list(tables)].to_numpy()  # (tables, seeds)
        return float(pd.Series(values.mean(axis=0)).std())


def average_ranks(mean: pd.DataFrame, failed: pd.DataFrame) -> tuple[pd.Series, int]:
    """Each method's rank, 1 for the highest, averaged over the tables on which all ran, and their number.

    Ties share the average of their ranks; methods that failed share the last.
    """
    ran = mean[(mean.notna() | failed).all(axis=1)]
    filled = ran.where(~failed.loc[ran.index], -np.inf).to_numpy()
    ranks = rankdata(-filled, axis=1) if len(ran) else np.full((1, mean.shape[1]), np.nan)
    return pd.Series(ranks.mean(axis=0), mean.columns), len(ran)


def signed_rank_p(ours: pd.Series, other: pd.Series) -> float:
    """Wilcoxon's two-sided p-value over the tables that both have; NaN where they never differ."""
    difference = (ours - other).dropna().to_numpy()
    return float(wilcoxon(difference).pvalue) if np.any(difference != 0) else float("nan")


def read_published(folder: Path, tables: Sequence[str]) -> dict[str, pd.DataFrame]:
    """By metric, the paper's figures in % of those tables that it has, whatever the case of their names."""
    found = {}
    for metric, part in {"auroc": "aucroc", "aupr": "aucpr"}.items():
        paths = sorted(folder.glob(f"*{part}*.csv"))
        if len(paths) != 1:
            raise ValueError(f"{folder}: expected one file *{part}*.csv, got {len(paths)}")
        figures = pd.read_csv(paths[0], index_col=0)
        figures.index = figures.index.str.lower()
        figures.columns = [f"{method}, published" for method in figures.columns]
        figures = figures.reindex([name.lower() for name in tables])
        figures.index = pd.Index(tables)
        found[metric] = figures
    return found


# ---- printing ------------------------------------------------------------------------------------


def report(runs: pd.DataFrame, published: Path | None, *, markdown: bool) -> None:
    """Prints all there is to say of the runs of one protocol and cap."""
    protocol, cap = runs["protocol"].iloc[0], int(runs["cap"].iloc[0])
    where = f"protocol {protocol}, at most {cap:,} rows"
    order = [name for name in METHODS if name in set(runs["method"])]
    results = {metric: Results.of(runs, metric) for metric in METRICS}
    tables = sorted(results["auroc"].mean.index, key=str.lower)
    rows = runs.groupby("table")["rows"].max()
    clean = [name for name in tables if rows[name] >= CLEAN_ROWS]
    others = read_published(published, tables) if published and protocol == "dte" else {}
    best = list(others["auroc"].mean().nlargest(NUM_PUBLISHED).index) if others else []
    for metric, heading in METRICS.items():
        found = results[metric]
        grid = Grid(f"{heading} in %, mean over seeds ± sd; {where}", ["", *order, *best])
        both = found.mean.join(others[metric][best]) if others else found.mean
        for name in tables:
            cells = [_cell(found, name, method) for method in order]
            cells += [_figure(others[metric].loc[name, method]) for method in best]
            top = both.loc[name].max()
            values = [both.loc[name, method] for method in (*order, *best)]
            cells = [f"**{cell}**" if value == top else cell for cell, value in zip(cells, values, strict=True)]
            grid.rows.append([name, *cells])
        for label, names in {"mean": tables, f"mean, >= {CLEAN_ROWS:,} rows": clean}.items():
            means = [_mean(both.loc[names, method], found, method) for method in (*order, *best)]
            grid.rows.append([f"{label} ({len(names)})", *means])
        grid.print(markdown=markdown)
    _summary(runs, results, others, order, tables, clean, where).print(markdown=markdown)
    constant = runs["distinct_scores"] == 1
    for grid in failures(runs.assign(error=runs["error"].where(~constant, "all scores are the same"))):
        grid.print(markdown=markdown)


def _summary(
    runs: pd.DataFrame,
    results: dict[str, Results],
    others: dict[str, pd.DataFrame],
    order: Sequence[str],
    tables: Sequence[str],
    clean: Sequence[str],
    where: str,
) -> Grid:
    """A line per method, the best mean AUROC first."""
    mine = [name for name in OURS if name in order]
    sizes = (f"all {len(tables)}", f"clean {len(clean)}")
    pairs = [f"{heading}, {size}" for size in sizes for heading in METRICS.values()]
    ranks, all_ranks = {}, {}
    for metric, found in results.items():
        ranks[metric], num_ranked = average_ranks(found.mean[list(order)], found.failed[list(order)])
        if others:
            both = found.mean[list(order)].join(others[metric])
            absent = found.failed.reindex(columns=both.columns, fill_value=False)
            all_ranks[metric], _ = average_ranks(both, absent)
    headings = ["", *pairs, *(f"rank {heading}" for heading in METRICS.values())]
    if others:
        headings += [f"rank {heading} with published" for heading in METRICS.values()]
    headings += ["fit, s", "score, s", *(f"p {name} {heading}" for name in mine for heading in METRICS.values())]
    title = (
        f"Means over tables ± sd over seeds of the mean, (tables) where fewer; clean: >= {CLEAN_ROWS:,} rows; average "
        f"ranks on {num_ranked} tables; seconds: mean over tables; p: Wilcoxon's signed ranks of ours against each; "
        f"{where}"
    )
    lines = []
    seconds = runs.groupby(["table", "method"])[["fit_seconds", "score_seconds"]].mean().groupby("method").mean()
    for method in [*order, *(others["auroc"].columns if others else [])]:
        column = {m: results[m].mean[method] if method in order else others[m][method] for m in METRICS}
        cells = [
            _mean(column[metric][list(names)], results[metric], method)
            for names in (tables, clean)
            for metric in METRICS
        ]
        cells += [_figure(ranks[metric].get(method)) for metric in METRICS]
        if others:
            cells += [_figure(all_ranks[metric].get(method)) for metric in METRICS]
        cells += [_figure(seconds[name].get(method)) for name in ("fit_seconds", "score_seconds")]
        for name in mine:
            ps = [signed_rank_p(results[m].mean[name], column[m]) if name != method else np.nan for m in METRICS]
            cells += ["" if math.isnan(p) else f"{p:.2g}" for p in ps]
        lines.append((column["auroc"].mean(), [method, *cells]))
    lines.sort(key=lambda line: -np.nan_to_num(line[0], nan=-1))
    return Grid(title, headings, [cells for _, cells in lines])


def _figure(value: Any) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.1f}"


def _cell(found: Results, table: str, method: str) -> str:
    if found.failed.loc[table, method]:
        return "failed"
    sd: Any = found.sd.loc[table, method]
    return _figure(found.mean.loc[table, method]) + ("" if np.isnan(sd) else f" ±{sd:.1f}")


def _mean(column: pd.Series, found: Results, method: str) -> str:
    """A mean over the tables that a method has, and their number where it lacks some."""
    there = column.dropna()
    if not len(there):
        return ""
    sd = found.sd_of_mean(method, list(there.index)) if method in found.mean else float("nan")
    text = _figure(there.mean()) + ("" if np.isnan(sd) else f" ±{sd:.1f}")
    return text if len(there) == len(column) else f"{text} ({len(there)})"


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and prints."""
    parser = arguments(__doc__, "benchmarks/scratch/accuracy.csv")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="dte", help="How tables are split (dte).")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="By default, all that can run here.")
    parser.add_argument("--published", type=Path, metavar="DIR", help="A paper's figures, for the protocol dte.")
    args = parser.parse_args(argv)
    if args.one:
        hand_over(work(json.loads(args.one)))
        return
    runs = Runs(args.out, KEY, NUMBERS)
    methods = args.methods or list(METHODS)
    if args.data:
        absent = [name for name in methods if METHODS[name].absent]
        jobs = []
        for seed, path in itertools.product(range(args.seeds), find_tables(args.data, args.tables)):
            common = {"protocol": args.protocol, "cap": args.cap, "table": path.stem, "seed": seed, "path": str(path)}
            wanted = [{**common, "method": name} for name in methods if name not in absent]
            jobs.append(runs.missing(wanted, retry=args.retry))
        if absent:
            print(f"left out, for want of their libraries: {', '.join(absent)}")
        run_all("benchmarks.accuracy", jobs, runs, describe, processes=args.processes, threads=args.threads)
    frame = runs.frame()
    frame = frame[(frame["protocol"] == args.protocol) & (frame["cap"] == args.cap) & (frame["seed"] < args.seeds)]
    frame = frame[frame["method"].isin(methods) & (frame["table"].isin(args.tables) | (not args.tables))]
    if frame.empty:
        raise SystemExit(f"{args.out}: expected runs of protocol {args.protocol} with cap {args.cap}, got none")
    report(frame, args.published, markdown=args.markdown)


if __name__ == "__main__":
    main()
