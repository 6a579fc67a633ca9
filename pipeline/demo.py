"""The demo: a year of real flights, three quarters to learn from, one to score; then corrupted rows to find."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vae_model.bundle import Bundle
from vae_model.config import TrainingConfig
from vae_model.evaluation import evaluate
from vae_model.flights import CORRUPTIONS, corrupt, write_flights

NUM_STRANGEST = 10
NUM_CORRUPTED = 5000


def demo(folder: Path, config: TrainingConfig | None = None, picture: Path | None = None) -> dict[str, float]:
    """Runs the demo and prints what it does.

    Args:
        folder: For tables, bundle and scores; what an earlier demo left there is replaced.
        config: Of the training; by default the defaults, calibrated on the last block of time.
        picture: SVG file to save the findings to, as they look here.

    Returns:
        AUROC by kind of corruption.
    """
    from vae_model.backend import load_quietly

    load_quietly()
    from pipeline.command import load_job, print_summary
    from vae_model.cli import Stages, print_bundle
    from vae_model.fitting import fit

    console = Console()
    for old in ("flights", "bundle", "scored"):
        shutil.rmtree(folder / old, ignore_errors=True)
    console.rule("1. Every flight out of New York City in 2013, a Parquet file a month")
    paths = write_flights(folder / "flights")
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    console.print(f"{rows:,} rows of {', '.join(pq.read_schema(paths[0]).names)}")

    console.rule("2. Train on January to September")
    with Stages() as on_progress:
        bundle = fit(
            [str(path) for path in paths[:9]],
            training=config or TrainingConfig(time_column="time_hour"),
            output=str(folder / "bundle"),
            on_progress=on_progress,
        )
    print_bundle(bundle, str(folder / "bundle"))

    console.rule("3. Score October to December in a Beam job")
    flags = {
        "input": folder / "flights" / "flights-2013-1[0-2].parquet",
        "output": folder / "scored",
        "bundle": folder / "bundle",
        "reasons": 3,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()] + ["--runner=FnApiRunner"]
    console.print(f"beam-vae run {' '.join(argv[:-1])}")
    summary = load_job().run(argv)
    if summary is not None:
        print_summary(summary)

    findings = Console(record=True, width=100) if picture else console
    findings.rule(f"4. The {NUM_STRANGEST} strangest flights of the quarter, and why")
    print_strangest(findings, pq.read_table(folder / "scored"))
    findings.rule("5. Does it detect? Real flights, each with one known corruption")
    quarter = pa.concat_tables([pq.read_table(path) for path in paths[9:]])
    year = pa.concat_tables([pq.read_table(path) for path in paths])
    found = print_detection(findings, bundle, quarter, year)
    if picture:
        findings.save_svg(str(picture), title="beam-vae demo")
    return found


def print_strangest(console: Console, scored: pa.Table) -> None:
    """The rows with the highest scores, and their reasons."""
    table = Table(show_lines=True)
    for heading in ("flight", "score", "p"):
        table.add_column(heading, no_wrap=True)
    table.add_column("columns that made it strange: value, expected, nats more than usual")
    order = pc.select_k_unstable(scored, NUM_STRANGEST, [("anomaly_score", "descending")])
    for row in scored.take(order).to_pylist():
        flight = f"{row['carrier']} {row['flight']} {row['origin']}-{row['dest']}\n{row['time_hour']:%a %d %b}"
        reasons = "\n".join(reason_text(reason) for reason in row["anomaly_reasons"])
        table.add_row(flight, f"{row['anomaly_score']:.1f}", f"{row['anomaly_p_value']:.0e}", reasons)
    console.print(table)


def reason_text(reason: dict[str, Any]) -> str:
    """One column that made a row strange, with rich's markup."""
    value = "missing" if reason["value"] is None else f"{escape(reason['value'])} ({reason['direction']})"
    between = f" ({reason['low']} to {reason['high']})" if reason["low"] is not None else ""
    expected = f"expected {reason['expected']}{between}"
    return f"[bold]{reason['feature']}[/bold] {value}, {expected}: +{reason['excess_nats']:.1f}"


def print_detection(console: Console, bundle: Bundle, quarter: pa.Table, year: pa.Table) -> dict[str, float]:
    """Scores corrupted rows among clean ones, kind by kind; returns the AUROCs."""
    rng = np.random.default_rng(0)
    table = Table()
    for heading in ("corruption", "rows", "AUROC", "95 % interval", "found at the threshold", "clean rows flagged"):
        table.add_column(heading, justify="left" if heading == "corruption" else "right")
    found = {}
    for kind in CORRUPTIONS:
        rows = rng.permutation(quarter.num_rows)[: 2 * NUM_CORRUPTED]
        clean = quarter.take(pa.array(rows[NUM_CORRUPTED:]))
        corrupted = corrupt(quarter.take(pa.array(rows[:NUM_CORRUPTED])), kind, pool=year, seed=0)
        scored = bundle.score(pa.concat_tables([clean, corrupted]))
        labels = np.arange(scored.num_rows) >= clean.num_rows
        flagged = scored.column("is_anomaly").to_numpy()
        auroc = evaluate(labels, scored.column("anomaly_score").to_numpy()).auroc
        table.add_row(
            kind,
            f"{corrupted.num_rows:,}",
            f"{auroc.value:.3f}",
            f"{auroc.low:.3f} - {auroc.high:.3f}",
            f"{flagged[labels].mean():.1%}",
            f"{flagged[~labels].mean():.1%}",
        )
        found[kind] = auroc.value
    console.print(table)
    return found
