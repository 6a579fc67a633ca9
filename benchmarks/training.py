"""Training: rows per second against PyOD's VAE, and memory on tables larger than memory should matter for.

    python -m benchmarks.training speed [--rows 200000]
    python -m benchmarks.training memory [--mib 500] [--times 20]

`speed` trains the same 64-32-8 network with the same batch size for the same number of passes, and divides the rows
trained on by the time of training alone (marginal, from two numbers of passes). `memory` fits tables on disk, each
in a process of its own, and prints the peak resident memory less that of a process that has only imported
TensorFlow. Needs pyod with torch for `speed`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.batch import PLAIN, peak_memory
from benchmarks.data import make_table, write_table

BATCH_SIZE = 256


def ours(rows: int, passes: int) -> float:
    """Seconds of our training."""
    from vae_model import TrainingConfig, VAEConfig, fit

    steps = passes * rows // BATCH_SIZE
    training = TrainingConfig(max_steps=steps, batch_size=BATCH_SIZE, patience=None)
    # Held-out rows are no part of `rows`: validation and calibration take 10 % each.
    table = make_table(int(rows / 0.8), 30, 0, 1)
    times: dict[str, float] = {}

    def note(stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        if stage == "training":
            times.setdefault("start", time.perf_counter())
            times["end"] = time.perf_counter()

    fit(table, VAEConfig(**PLAIN), training, on_progress=note)  # type: ignore[arg-type]
    return times["end"] - times["start"]


def pyod(rows: int, passes: int) -> float:
    """Seconds of PyOD's training."""
    from pyod.models.vae import VAE

    layers = {"encoder_neuron_list": [64, 32], "decoder_neuron_list": [32, 64], "latent_dim": 8}
    detector = VAE(**layers, epoch_num=passes, batch_size=BATCH_SIZE, verbose=0)
    x = make_table(rows, 30, 0, 1).to_pandas().to_numpy()
    start = time.perf_counter()
    detector.fit(x)
    return time.perf_counter() - start


def speed(rows: int) -> None:
    """Prints rows/s of both and their ratio."""
    from vae_model.backend import load_quietly

    load_quietly()
    marginal = {}
    table = Table(title=f"training, {rows:,} rows of 30 columns, 64-32-8, batches of {BATCH_SIZE}")
    for heading in ("", "1 pass, s", "5 passes, s", "marginal rows/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, train in {"beam-vae": ours, "PyOD VAE": pyod}.items():
        few, many = train(rows, 1), train(rows, 5)
        marginal[name] = 4 * rows / (many - few)
        table.add_row(name, f"{few:.1f}", f"{many:.1f}", f"{marginal[name]:,.0f}")
    Console().print(table)
    Console().print(f"ours / PyOD's: {marginal['beam-vae'] / marginal['PyOD VAE']:.1f}")


def memory(mib: int, times: int, folder: Path) -> None:
    """Prints peak memory of fitting a table and one `times` as large."""
    rows = mib * (1 << 20) // 240
    small = write_table(folder / f"memory-{rows}.parquet", rows)
    large = write_table(folder / f"memory-{rows * times}.parquet", rows * times)
    idle = _peak("idle")
    table = Table(title=f"peak memory of fit, less {idle / 1024:,.0f} MiB of an idle process")
    for heading in ("rows", "as float64", "peak MiB", "seconds"):
        table.add_column(heading, justify="right")
    peaks = []
    for path in (small, large):
        start = time.perf_counter()
        peaks.append(_peak(str(path)) - idle)
        size = pq.read_metadata(path).num_rows
        seconds = time.perf_counter() - start
        table.add_row(f"{size:,}", f"{size * 240 / 2**20:,.0f} MiB", f"{peaks[-1] / 1024:,.0f}", f"{seconds:.0f}")
    Console().print(table)
    Console().print(f"large / small: {peaks[1] / peaks[0]:.2f}")


def _peak(what: str) -> int:
    """KiB at most in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.training", "one", what], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def _one(what: str) -> None:
    from vae_model.backend import load_quietly

    load_quietly()
    from vae_model import TrainingConfig, VAEConfig, fit

    if what != "idle":
        fit(what, VAEConfig(**PLAIN), TrainingConfig(max_steps=4000, patience=None))  # type: ignore[arg-type]
    print(json.dumps(peak_memory()))


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "one"])
    parser.add_argument("path", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--mib", type=int, default=500)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/scratch"))
    args = parser.parse_args()
    if args.what == "one":
        _one(args.path)
    elif args.what == "speed":
        speed(args.rows)
    else:
        memory(args.mib, args.times, args.folder)


if __name__ == "__main__":
    main()
