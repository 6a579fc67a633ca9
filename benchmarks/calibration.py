"""What our scores mean: p-values on independent normal rows, contaminated training data, and another seed.

    python -m benchmarks.calibration --data DIR [--what calibration|contamination|stability] [--seeds N] [--out CSV]
                                     [--methods NAME ...] [--markdown]

`calibration` fits on a random half of a table's normal rows and scores the other half: the Kolmogorov-Smirnov test
between their scores and the calibration scores, the share of them with a p-value at most 10, 1 and 0.1 %, with its
99 % beta-binomial interval, and how many lie beyond all calibration rows. `contamination` mixes 0, 1, 5 and 10 % of
anomalies into the training rows and tests on the same other rows; `default_told` is `default` with that share as its
`contamination`. `stability` fits twice on the same rows, with different seeds, and correlates the scores of the test
rows (Spearman). Every run is a line of the CSV file, appended once it is done; a second start does only what is
missing, and without --data only prints.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import betabinom, ks_2samp, spearmanr

from benchmarks.accuracy import METHODS, OUR_MODULES, OURS, fit_ours, measure, ours
from benchmarks.peers import Method
from benchmarks.runs import Grid, Row, Runs, arguments, failures, hand_over, run_all, told
from benchmarks.tables import Labelled, contaminated_split, count_normal, find_tables, holdout_split, read_table

TOLD = "default_told"  # a method of `contamination` alone, see `told_the_share`
KEY = ("what", "share", "cap", "table", "seed", "method")
RATES = {"10 %": 0.1, "1 %": 0.01, "0.1 %": 0.001}
SHARES = (0.0, 0.01, 0.05, 0.1)
CONFIDENCE = 0.99
FAR = 0.1  # of 1 / (n + 1): p-values that the fitted tail alone decides
NUMBERS = (
    *("calibration_rows", "test_rows", "ks", "ks_p", *RATES, "beyond", "far_beyond"),
    *("auroc", "aupr", "spearman"),
)


# ---- measuring -----------------------------------------------------------------------------------


def calibrated(table: Labelled, run: Row) -> Row:
    """Scores of normal rows that no model has seen, beside those it was calibrated on."""
    split = holdout_split(table, run["seed"], run["cap"])
    bundle = fit_ours(run["method"], run["seed"], split.train)
    scored = bundle.score(split.test)
    scores, p = (scored.column(name).to_numpy()[~split.anomalous] for name in ("anomaly_score", "anomaly_p_value"))
    known = bundle.calibration.scores
    test = ks_2samp(scores, known)
    return {
        "calibration_rows": len(known),
        "test_rows": len(scores),
        "ks": float(test.statistic),
        "ks_p": float(test.pvalue),
        **{name: int((p <= rate).sum()) for name, rate in RATES.items()},
        "beyond": int((scores > known.max()).sum()),
        "far_beyond": int((p <= FAR / (len(known) + 1)).sum()),
        "calibrated_by": bundle.calibration.method,
        "version": bundle.model_version,
    }


def contaminated(table: Labelled, run: Row) -> Row:
    """How well anomalies are found by a model that was trained on some."""
    share = float(run["share"])
    split = contaminated_split(table, run["seed"], run["cap"], share)
    method = told_the_share(share) if run["method"] == TOLD else METHODS[run["method"]]
    return measure(method, run["seed"], split)


def told_the_share(share: float) -> Method:
    """`default`, told how many of its training rows are anomalies."""
    return Method(functools.partial(ours, "default", contamination=share or None), OUR_MODULES)


def stable(table: Labelled, run: Row) -> Row:
    """Whether two seeds rank the same rows alike."""
    split = holdout_split(table, run["seed"], run["cap"])
    METHODS[run["method"]].load()
    fitted = [METHODS[run["method"]].fit(2 * run["seed"] + i, split.train) for i in range(2)]
    scores = [each.score(split.test) for each in fitted]
    return {"spearman": float(spearmanr(*scores).statistic), "version": fitted[0].version}


WHATS: dict[str, Callable[[Labelled, Row], Row]] = {
    "calibration": calibrated,
    "contamination": contaminated,
    "stability": stable,
}


def work(job: Sequence[Row]) -> Iterator[Row]:
    """The runs of one table and seed."""
    table = read_table(Path(job[0]["path"]))
    for run in job:
        try:
            yield {**run, "error": "", **WHATS[run["what"]](table, run)}
        except Exception as error:  # whatever a library raises is its result
            yield {**run, "error": told(error)}


def describe(row: Row) -> str:
    """A run in a line."""
    name = f"{row['table']}, seed {row['seed']}, {row['method']}"
    if row["error"]:
        return f"{name}: failed: {row['error']}"
    if row["what"] == "calibration":
        rates = ", ".join(f"{100 * row[rate] / row['test_rows']:.2f} % at {rate}" for rate in RATES)
        return f"{name}: KS p {row['ks_p']:.3f}; {rates}"
    if row["what"] == "contamination":
        return f"{name}: AUROC {100 * row['auroc']:.1f} with {100 * float(row['share']):g} % anomalies"
    return f"{name}: Spearman {row['spearman']:.3f}"


# ---- printing ------------------------------------------------------------------------------------


def interval(calibration_rows: int, test_rows: int, rate: float) -> tuple[int, int] | None:
    """How many of the test rows have a p-value at most `rate`, with 99 % probability, if all rows are exchangeable.

    They lie above the k-th largest of n calibration scores, k = floor(rate * (n + 1)), the chance of which is
    Beta(k, n + 1 - k) distributed. None where k is 0: the fitted tail decides there.
    """
    k = int(np.floor(rate * (calibration_rows + 1) + 1e-9))
    if not k:
        return None
    low, high = betabinom(test_rows, k, calibration_rows + 1 - k).interval(CONFIDENCE)
    return int(low), int(high)


def _verdict(run: Row, rate: float, found: str) -> str:
    """Whether a count lies in, below or above its interval; empty where there is none."""
    limits = interval(int(run["calibration_rows"]), int(run["test_rows"]), rate)
    if limits is None:
        return ""
    return "below" if run[found] < limits[0] else "above" if run[found] > limits[1] else "inside"


def report_calibration(runs: pd.DataFrame) -> list[Grid]:
    """By table: shares in % and in how many runs they lay below, inside and above their intervals."""
    headings = ["", "calibrated on", "tested on", "KS distance", "KS p, median", "KS p < 1 %"]
    headings += [f"p <= {name}, in %" for name in RATES] + ["beyond, expected"]
    title = f"Normal rows that no model has seen; (runs below/inside/above their {100 * CONFIDENCE:g} % intervals)"
    grid = Grid(title, headings)
    for method, each in runs.groupby("method"):
        for table, group in [*each.groupby("table"), ("all", each)]:
            rows = group.to_dict("records")
            tested = group["test_rows"].sum()
            cells = [f"{group[name].mean():,.0f}" for name in ("calibration_rows", "test_rows")]
            cells += [f"{group['ks'].mean():.3f}", f"{group['ks_p'].median():.3f}"]
            cells.append(f"{(group['ks_p'] < 0.01).sum()} of {len(group)}")
            if set(group["calibrated_by"]) == {"cross-conformal"}:
                cells[0] += ", cross-conformal"
            for found, rate in RATES.items():
                cells.append(f"{100 * group[found].sum() / tested:.2f}{_tally(_verdict(r, rate, found) for r in rows)}")
            # One test row in n + 1 is expected beyond n calibration rows.
            expected = (group["test_rows"] / (group["calibration_rows"] + 1)).sum()
            outcomes = (_verdict(r, 1 / (r["calibration_rows"] + 1), "beyond") for r in rows)
            cells.append(f"{group['beyond'].sum():.0f}, {expected:.1f}{_tally(outcomes)}")
            grid.rows.append([f"{method}, {table}", *cells])
    tail = Grid("Rows beyond all calibration rows", ["", "beyond", "expected", f"p <= {FAR:g} / (n + 1)", "expected"])
    for method, each in runs.groupby("method"):
        expected = (each["test_rows"] / (each["calibration_rows"] + 1)).sum()
        numbers = (each["beyond"].sum(), expected, each["far_beyond"].sum(), FAR * expected)
        tail.rows.append([str(method), *(f"{number:,.1f}" for number in numbers)])
    return [grid, tail]


def _tally(outcomes: Iterator[str]) -> str:
    found = list(outcomes)
    counts = [found.count(word) for word in ("below", "inside", "above")]
    return f" ({'/'.join(map(str, counts))})" if any(counts) else ""


def report_contamination(runs: pd.DataFrame) -> list[Grid]:
    """By table: AUROC and AUPR without anomalies in training, and the change in points with them."""
    grids = []
    for metric, heading in {"auroc": "AUROC", "aupr": "AUPR"}.items():
        means = 100 * runs.groupby(["method", "table", "share"])[metric].mean().unstack()
        change = means.sub(means["0.0"], axis=0)
        shares = [str(share) for share in SHARES[1:] if str(share) in means]
        title = f"{heading} in % of clean training data, and its change in points by the share of anomalies in it"
        grid = Grid(title, ["", "0 %", *(f"{100 * float(share):g} %" for share in shares)])
        for method in dict.fromkeys(means.index.get_level_values("method")):
            for table in means.loc[method].index:
                cells = [_points(change.loc[(method, table), share]) for share in shares]
                grid.rows.append([f"{method}, {table}", f"{means.loc[(method, table), '0.0']:.1f}", *cells])
            mean = change.loc[method].mean()
            counts = change.loc[method].count()
            cells = [f"{_points(mean[share])} ({counts[share]})" for share in shares]
            grid.rows.append([f"{method}, mean (tables)", f"{means.loc[method]['0.0'].mean():.1f}", *cells])
        grids.append(grid)
    return grids


def _points(value: float) -> str:
    return "" if np.isnan(value) else f"{value:+.1f}"


def report_stability(runs: pd.DataFrame) -> list[Grid]:
    """By table, the mean over pairs of seeds; then the median table."""
    means = runs.groupby(["table", "method"])["spearman"].mean().unstack()
    grid = Grid("Spearman correlation of test scores of two models that differ in their seed", ["", *means])
    grid.rows = [[str(table), *(f"{value:.3f}" for value in values)] for table, *values in means.itertuples()]
    grid.rows.append(["median", *(f"{value:.3f}" for value in means.median())])
    return [grid]


REPORTS: dict[str, Callable[[pd.DataFrame], list[Grid]]] = {
    "calibration": report_calibration,
    "contamination": report_contamination,
    "stability": report_stability,
}


# ---- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and prints."""
    parser = arguments(__doc__, "benchmarks/scratch/calibration.csv")
    parser.add_argument("--what", choices=list(WHATS), default="calibration")
    help = "By default `default`; `calibration` is of ours only."
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, TOLD], default=["default"], help=help)
    help = "`calibration` leaves out tables with fewer normal rows (1,500)."
    parser.add_argument("--min_normal", type=int, default=1500, help=help)
    args = parser.parse_args(argv)
    if args.one:
        hand_over(work(json.loads(args.one)))
        return
    if args.what != "contamination" and TOLD in args.methods:
        parser.error(f"--methods: {TOLD} is for contamination alone")
    if args.what == "calibration" and (peers := sorted(set(args.methods) - set(OURS))):
        parser.error(f"--methods: expected some of {', '.join(OURS)}, got {', '.join(peers)}, which have no p-values")
    runs = Runs(args.out, KEY, NUMBERS, ["calibrated_by"])
    if args.data:
        paths = find_tables(args.data, args.tables)
        if args.what == "calibration":
            paths = [path for path in paths if count_normal(path) >= args.min_normal]
        shares = SHARES if args.what == "contamination" else SHARES[:1]
        jobs = []
        for seed, path in itertools.product(range(args.seeds), paths):
            common = {"what": args.what, "cap": args.cap, "table": path.stem, "seed": seed, "path": str(path)}
            named = itertools.product(args.methods, map(str, shares))
            wanted = [{**common, "method": method, "share": share} for method, share in named]
            jobs.append(runs.missing(wanted, retry=args.retry))
        run_all("benchmarks.calibration", jobs, runs, describe, processes=args.processes, threads=args.threads)
    frame = runs.frame()
    frame = frame[(frame["what"] == args.what) & (frame["cap"] == args.cap) & (frame["seed"] < args.seeds)]
    frame = frame[frame["method"].isin(args.methods) & (frame["table"].isin(args.tables) | (not args.tables))]
    failed = frame[frame["error"] != ""]
    frame = frame[frame["error"] == ""]
    if frame.empty:
        raise SystemExit(f"{args.out}: expected runs of {args.what} with cap {args.cap}, got none that succeeded")
    grids = REPORTS[args.what](frame)
    for grid in [*grids, *failures(failed)]:
        grid.print(markdown=args.markdown)


if __name__ == "__main__":
    main()
