"""What the qualities cost: seconds to fit 300,000 rows of 20 columns, rows/s to score 30 columns, table to scores.

    python -m benchmarks.quality [--rows 300000]

Rows/s are marginal, from scoring two sizes of one table, the faster of two runs each; without Beam and without files.
Their accuracy is what `python -m benchmarks.accuracy --methods fast default best` measures.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from benchmarks.data import make_table

SCORED_COLUMNS, SCORED_ROWS = 30, (50_000, 250_000)


def fit_seconds(quality: str, rows: int) -> float:
    """Seconds of a fit with the defaults, calibration included."""
    from vae_model import fit

    table = make_table(rows, 20, 0, 1)
    start = time.perf_counter()
    fit(table, quality=quality)
    return time.perf_counter() - start


def score_speed(quality: str) -> float:
    """Marginal rows/s of `Bundle.score`."""
    from vae_model import TrainingConfig, fit

    table = make_table(SCORED_ROWS[1], SCORED_COLUMNS, 0, 2)
    # What a row costs does not depend on how long the network was trained.
    bundle = fit(table.slice(0, 20_000), training=TrainingConfig(max_steps=50), quality=quality)
    bundle.score(table.slice(0, 10_000))
    seconds = []
    for rows in SCORED_ROWS:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            bundle.score(table.slice(0, rows))
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return (SCORED_ROWS[1] - SCORED_ROWS[0]) / (seconds[1] - seconds[0])


def main() -> None:
    """Prints a line for each quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    args = parser.parse_args()
    from vae_model.backend import load_quietly
    from vae_model.config import QUALITIES

    load_quietly()
    table = Table(title=f"fit: {args.rows:,} rows x 20 columns; score: {SCORED_COLUMNS} columns")
    for heading in ("quality", "fit, s", "score, rows/s"):
        table.add_column(heading, justify="left" if heading == "quality" else "right")
    for quality in QUALITIES:
        table.add_row(quality, f"{fit_seconds(quality, args.rows):.0f}", f"{score_speed(quality):,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
