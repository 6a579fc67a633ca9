"""Many runs: kept in a CSV file as they are done, spread over processes, and printed as tables."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Row = dict[str, Any]
_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
_MARK = "run: "


class Runs:
    """Runs in a CSV file: appended as they are done, found again by their key when the program starts anew.

    Args:
        path: Of the file; it is begun where there is none.
        key: Columns that name a run, "cap" and "seed" among them, which are whole numbers.
        numbers: Columns of numbers, empty where a run failed.
        texts: Other columns; "error", empty where a run succeeded, and "version" are always there.
    """

    def __init__(self, path: Path, key: Sequence[str], numbers: Sequence[str], texts: Sequence[str] = ()) -> None:
        self._path, self._key, self._numbers = path, list(key), list(numbers)
        self._columns = [*key, *numbers, *texts, "error", "version"]
        self._lock = threading.Lock()
        text = path.read_text() if path.exists() else ""
        if not text.endswith("\n"):  # none yet, or cut off in the middle of a line
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text[: text.rfind("\n") + 1] or ",".join(self._columns) + "\n")
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != self._columns:
            raise ValueError(f"{path}: expected the columns {', '.join(self._columns)}, got {', '.join(header)}")

    def key(self, row: Row) -> tuple[str, ...]:
        """The texts that name a run."""
        return tuple(str(row[name]) for name in self._key)

    def append(self, row: Row) -> None:
        """Adds a run, as one line."""
        values = [" ".join(str(row.get(name, "")).split()) for name in self._columns]
        with self._lock, self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)

    def frame(self) -> pd.DataFrame:
        """All runs; of those with the same key, the last."""
        frame = pd.read_csv(self._path, dtype=str, keep_default_na=False).drop_duplicates(self._key, keep="last")
        for name in self._numbers:
            frame[name] = pd.to_numeric(frame[name])
        return frame.reset_index(drop=True).astype({"cap": int, "seed": int})

    def missing(self, wanted: Sequence[Row], *, retry: bool = False) -> list[Row]:
        """Those that the file does not have; with `retry`, also those that failed."""
        frame = self.frame()
        if retry:
            frame = frame[frame.error == ""]
        there = set(frame[self._key].astype(str).itertuples(index=False, name=None))
        return [row for row in wanted if self.key(row) not in there]


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """What all such programs are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="Folder of Parquet tables; without it nothing runs.")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="Seeds 0 to N - 1 (5).")
    parser.add_argument("--tables", nargs="+", metavar="NAME", default=(), help="Files without .parquet; all.")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="CSV", help=f"Where runs are kept ({out}).")
    parser.add_argument("--cap", type=int, default=50_000, help="Rows of a table at most (50,000).")
    parser.add_argument("--processes", type=int, default=2, help="At a time (2).")
    parser.add_argument("--threads", type=int, default=1, help="Of each process (1).")
    parser.add_argument("--retry", action="store_true", help="Also run again what failed.")
    parser.add_argument("--markdown", action="store_true", help="Print for a document.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


# ---- processes -----------------------------------------------------------------------------------


def run_all(
    module: str,
    jobs: Sequence[Sequence[Row]],
    runs: Runs,
    describe: Callable[[Row], str],
    *,
    processes: int = 2,
    threads: int = 1,
) -> None:
    """Runs each job in a process of its own, some at a time, and appends each run to the file once it is done.

    A process that dies costs the run it was at, which is recorded as failed; another one goes on after it. What a
    process leaks goes with it.

    Args:
        module: Started as `python -m MODULE --one JSON`, the job; it hands its runs to `hand_over`.
        jobs: Each a list of runs yet without results, done in that order.
        runs: Where they are kept.
        describe: What to print of a run.
        processes: At a time.
        threads: Of each.
    """
    environment = {**os.environ, **dict.fromkeys(_THREAD_LIMITS, str(threads))}
    jobs = [job for job in jobs if job]
    if not jobs:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    running: set[subprocess.Popen[str]] = set()
    stopped = threading.Event()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("runs", total=sum(map(len, jobs)))

        def done(row: Row) -> None:
            runs.append(row)
            progress.console.print(escape(describe(row)), style="dim", highlight=False, soft_wrap=True)
            progress.advance(task)

        def do(job: Sequence[Row]) -> None:
            rest = list(job)
            while rest and not stopped.is_set():
                ended = _start(module, rest, environment, running, done)
                if rest and ended and not stopped.is_set():
                    done({**rest.pop(0), "error": ended})

        with ThreadPoolExecutor(processes) as pool:
            try:
                for _ in pool.map(do, jobs):
                    pass
            except BaseException:  # an interrupt: the file is as complete as it got
                stopped.set()
                for process in list(running):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise


def _start(
    module: str,
    rest: list[Row],
    environment: dict[str, str],
    running: set[subprocess.Popen[str]],
    done: Callable[[Row], None],
) -> str:
    """Runs one process, taking from `rest` what it has done; returns how it failed, if it did."""
    command = [sys.executable, "-m", module, "--one", json.dumps(rest)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        running.add(process)
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(_MARK):
                    rest.pop(0)
                    done(json.loads(line.removeprefix(_MARK)))
        running.discard(process)
        if process.returncode == -signal.SIGINT:
            raise KeyboardInterrupt
        if not rest:
            return ""
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:]
        return f"process ended with code {process.returncode}: {' '.join(said)}"


def told(error: Exception) -> str:
    """What a failed run's line says."""
    return f"{type(error).__name__}: {error}"[:500]


def hand_over(results: Iterator[Row]) -> None:
    """In a process: gives every run to the one that started it, as soon as it is done."""
    for row in results:
        print(f"\n{_MARK}{json.dumps(row)}", flush=True)  # on a line of its own, whatever a library has printed


# ---- printing ------------------------------------------------------------------------------------


@dataclass
class Grid:
    """A table of texts, for the terminal or for Markdown."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def print(self, *, markdown: bool = False) -> None:
        """The first column is left-aligned, the others right."""
        if markdown:
            marks = ["---", *["---:"] * (len(self.headings) - 1)]
            lines = [self.headings, marks, *self.rows]
            print(f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
            return
        table = Table(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i else "left", overflow="fold", no_wrap=not heading)
        for row in self.rows:
            table.add_row(*map(_strong, row))
        cells = [max(len(line[i]) for line in (self.headings, *self.rows)) + 3 for i in range(len(self.headings))]
        Console(width=max(80, min(sum(cells) + 1, 400))).print(table)


def failures(runs: pd.DataFrame) -> list[Grid]:
    """What went wrong, if anything did."""
    grid = Grid("Failed", ["method", "table", "seeds", "error"])
    for names, group in runs[runs["error"] != ""].groupby(["method", "table", "error"]):
        method, table, error = map(str, names)
        grid.rows.append([method, table, " ".join(map(str, sorted(set(group["seed"])))), error])
    return [grid] if grid.rows else []


def _strong(text: str) -> str:
    """Markdown's bold as the terminal's."""
    inner = text.removeprefix("**").removesuffix("**")
    return f"[bold]{escape(inner)}[/bold]" if inner != text else escape(text)
