"""Batch scoring, Parquet to Parquet: our Beam job against Beam's own ways, PyOD, and a floor without Beam.

    python -m benchmarks.batch [speed] [--rows 100000 1000000] [--folder DIR] [--out FILE.csv]
    python -m benchmarks.batch memory [--gib 5]

Every contender runs in a process of its own, on the same files, with the same trained network. Times are wall clock
from the launch of the pipeline (or of the loop) to the last file, model loading included, Python's own start and
imports not; marginal rows/s come from two sizes, so that start-up drops out. CPU time, of all threads, is what a busy
machine hardly changes. Slow contenders run on fewer rows, as the table says. Needs tensorflow_hub, and pyod with
torch; a contender whose library is absent is left out.

`memory` scores one table and prints the peak resident memory, less that of a process that has only imported the
libraries.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.data import make_table, write_table

PLAIN = {"hidden_dims": (64, 32), "latent_dim": 8, "views": ("standard",), "num_samples": 1, "prior": "normal"}


# ---- contenders: each scores `source` into `output` with the model in `folder`, and returns nothing ----


def beam_job(source: Path, output: Path, folder: Path, bundle: str = "plain") -> None:
    """Our job, `beam-vae run`."""
    from pipeline.run import run

    flags = [f"--input={source}", f"--output={output}", f"--bundle={folder / bundle}", "--runner=FnApiRunner"]
    summary = run(flags)
    assert summary is not None
    assert summary.num_scored == pq.read_metadata(source).num_rows


def beam_job_default(source: Path, output: Path, folder: Path) -> None:
    """Our job with the default configuration."""
    beam_job(source, output, folder, "default")


def beam_job_mixed(source: Path, output: Path, folder: Path) -> None:
    """Our job, plain network, 10 numeric and 10 categorical columns."""
    beam_job(source, output, folder, "mixed")


def python_score(source: Path, output: Path, folder: Path) -> None:
    """`beam-vae score`: our batch scoring without Beam."""
    from vae_model.batch import score_files
    from vae_model.bundle import load_bundle

    score_files(load_bundle(str(folder / "plain")), str(source), str(output / "scored.parquet"))


def floor(source: Path, output: Path, folder: Path) -> None:
    """Hand-written: pyarrow reads, numpy scales, one tf.function scores, pyarrow writes. No checks, no p-values."""
    import tensorflow as tf

    mean, stddev = _scaling(folder)
    model = _keras_model(folder)
    score = tf.function(lambda x: model(x, training=False), input_signature=[tf.TensorSpec((None, len(mean)))])
    output.mkdir(parents=True)
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow.append(pa.field("anomaly_score", pa.float32()))
        with pq.ParquetWriter(output / "scored.parquet", schema, compression="zstd", use_dictionary=False) as writer:
            for batch in file.iter_batches(16_384):
                columns = [column.to_numpy() for column in batch.columns]
                x = ((np.stack(columns, axis=1) - mean) / stddev).astype(np.float32)
                scores = score(tf.constant(x)).numpy()[:, 0]
                writer.write_batch(pa.record_batch([*batch.columns, pa.array(scores)], schema=schema))


def run_inference(source: Path, output: Path, folder: Path) -> None:
    """Beam's RunInference with its own TensorFlow handler, on scaled rows."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.ml.inference.tensorflow_inference import TFModelHandlerNumpy

    import benchmarks.network  # noqa: F401  registers the layer that the saved model needs

    mean, stddev = _scaling(folder)
    handler = TFModelHandlerNumpy(str(folder / "network.keras"), max_batch_size=1024)
    schema = pa.schema([("anomaly_score", pa.float64())])
    with beam.Pipeline(runner="FnApiRunner") as p:
        (
            p
            | beam.io.ReadFromParquet(str(source))
            | beam.Map(lambda row: ((np.array(list(row.values())) - mean) / stddev).astype(np.float32))
            | RunInference(handler)
            | beam.Map(lambda result: {"anomaly_score": float(result.inference[0])})
            | beam.io.WriteToParquet(str(output / "scored"), schema)
        )


def anomaly_detection(source: Path, output: Path, folder: Path) -> None:
    """Beam's AnomalyDetection with an OfflineDetector on the same TensorFlow handler."""
    import apache_beam as beam
    from apache_beam.ml.anomaly.detectors.offline import OfflineDetector
    from apache_beam.ml.anomaly.thresholds import FixedThreshold
    from apache_beam.ml.anomaly.transforms import AnomalyDetection
    from apache_beam.ml.inference.base import KeyedModelHandler, PredictionResult
    from apache_beam.ml.inference.tensorflow_inference import TFModelHandlerNumpy

    import benchmarks.network  # noqa: F401

    mean, stddev = _scaling(folder)

    def to_array(keyed: Any) -> Any:
        key, row = keyed
        return key, ((np.array(list(row), np.float64) - mean) / stddev).astype(np.float32)

    def to_score(keyed: Any) -> Any:
        key, result = keyed
        return key, PredictionResult(result.example, float(result.inference[0]), result.model_id)

    handler = TFModelHandlerNumpy(str(folder / "network.keras"), max_batch_size=1024)
    keyed = KeyedModelHandler(handler).with_preprocess_fn(to_array).with_postprocess_fn(to_score)
    keyed = keyed.with_postprocess_fn(OfflineDetector.score_prediction_adapter)
    names = pq.read_schema(source).names
    detector = OfflineDetector(keyed, features=names, threshold_criterion=FixedThreshold(1e9))
    schema = pa.schema([("anomaly_score", pa.float64())])
    with beam.Pipeline(runner="FnApiRunner") as p:
        (
            p
            | beam.io.ReadFromParquet(str(source))
            | beam.Map(lambda row: beam.Row(**row))
            | AnomalyDetection(detector)
            | beam.Map(lambda result: {"anomaly_score": result.predictions[0].score})
            | beam.io.WriteToParquet(str(output / "scored"), schema)
        )


def run_inference_on_tables(source: Path, output: Path, folder: Path) -> None:
    """RunInference with our handler, fed tables of 16,384 rows: the strong rival."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference

    from pipeline import VAEModelHandler
    from vae_model.bundle import score_fields

    added = score_fields()
    schema = pa.schema([*pq.read_schema(source), *added])
    with beam.Pipeline(runner="FnApiRunner") as p:
        (
            p
            | beam.io.ReadFromParquetBatched(str(source))
            | beam.FlatMap(lambda table: [table.slice(i, 16_384) for i in range(0, table.num_rows, 16_384)])
            | RunInference(VAEModelHandler(str(folder / "plain")).with_no_batching())
            | beam.Map(lambda result: _side_by_side(result.example, result.inference.select([f.name for f in added])))
            | beam.io.WriteToParquetBatched(str(output / "scored"), schema, codec="zstd")
        )


def _side_by_side(table: pa.Table, scores: pa.Table) -> pa.Table:
    return pa.table([*table.columns, *scores.columns], [*table.column_names, *scores.column_names])


def _pyod(source: Path, output: Path, detector: Any) -> None:
    training = make_table(5000, 30, 0, 1).to_pandas().to_numpy()
    detector.fit(training)
    start = now()
    table = pq.read_table(source)
    scores = detector.decision_function(table.to_pandas().to_numpy())
    output.mkdir(parents=True)
    pq.write_table(
        table.append_column("anomaly_score", pa.array(scores)), output / "scored.parquet", compression="zstd"
    )
    raise _Timed(*since(start))  # training is no part of scoring


def pyod_vae(source: Path, output: Path, folder: Path) -> None:
    """PyOD's VAE with the same layers, `decision_function` on the whole table."""
    from pyod.models.vae import VAE

    layers = {"encoder_neuron_list": [64, 32], "decoder_neuron_list": [32, 64], "latent_dim": 8}
    _pyod(source, output, VAE(**layers, epoch_num=1, batch_size=256, verbose=0))


def pyod_iforest(source: Path, output: Path, folder: Path) -> None:
    """PyOD's isolation forest, `decision_function` on the whole table."""
    from pyod.models.iforest import IForest

    _pyod(source, output, IForest(n_jobs=-1))


class _Timed(Exception):
    """A contender that took its own time."""


OURS = "beam-vae run"
# name: function, table, share of the rows, libraries
CONTENDERS: dict[str, tuple[Callable[[Path, Path, Path], None], str, float, tuple[str, ...]]] = {
    OURS: (beam_job, "numeric", 1, ()),
    "beam-vae run, default quality": (beam_job_default, "numeric", 1, ()),
    "beam-vae run, mixed table": (beam_job_mixed, "mixed", 1, ()),
    "beam-vae score (no Beam)": (python_score, "numeric", 1, ()),
    "floor: hand-written, no Beam": (floor, "numeric", 1, ()),
    "RunInference, our handler, tables": (run_inference_on_tables, "numeric", 1, ()),
    "RunInference, Beam's TF handler": (run_inference, "numeric", 0.05, ("tensorflow_hub",)),
    "AnomalyDetection(OfflineDetector)": (anomaly_detection, "numeric", 0.02, ("tensorflow_hub",)),
    "PyOD VAE": (pyod_vae, "numeric", 0.2, ("pyod", "torch")),
    "PyOD IForest": (pyod_iforest, "numeric", 0.2, ("pyod",)),
}


# ---- the models ----------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Trains the three bundles and saves the plain one's network for Beam's handler."""
    from benchmarks.network import save_network
    from vae_model import TrainingConfig, VAEConfig, fit
    from vae_model.bundle import load_bundle

    training = TrainingConfig(max_steps=300)
    for name, config, shape in (
        ("plain", VAEConfig(**PLAIN), (30, 0)),  # type: ignore[arg-type]
        ("default", VAEConfig(), (30, 0)),
        ("mixed", VAEConfig(**PLAIN), (10, 10)),  # type: ignore[arg-type]
    ):
        if not (folder / name).exists():
            fit(make_table(20_000, *shape, 1), config, training, output=str(folder / name))
    if not (folder / "network.keras").exists():
        save_network(load_bundle(str(folder / "plain")), folder / "network.keras")


def _scaling(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    from vae_model.bundle import load_bundle

    features = load_bundle(str(folder / "plain")).schema.numeric
    return np.array([f.mean for f in features]), np.array([f.stddev for f in features])


def _keras_model(folder: Path) -> Any:
    import keras

    import benchmarks.network  # noqa: F401

    return keras.models.load_model(folder / "network.keras")


# ---- measuring -----------------------------------------------------------------------------------


def measure(name: str, source: Path, output: Path, folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of CPU time of one contender on one file, in this process."""
    from vae_model.backend import load_quietly

    load_quietly()
    import apache_beam  # noqa: F401

    function = CONTENDERS[name][0]
    start = now()
    try:
        function(source, output, folder)
    except _Timed as timed:
        return timed.args
    return since(start)


def now() -> tuple[float, float]:
    """The clock and the CPU time of this process."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds of both."""
    return time.perf_counter() - start[0], time.process_time() - start[1]


def stages(source: Path, bundle: str) -> dict[str, float]:
    """Seconds in each stage of scoring one file, in one thread of Python."""
    from vae_model.bundle import load_bundle
    from vae_model.encoding import encode
    from vae_model.overlap import table_writer

    loaded = load_bundle(bundle)
    loaded.verify()
    spent = dict.fromkeys(("read", "encode", "network", "calibrate", "reasons (3)", "write"), 0.0)

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        spent[stage] += time.perf_counter() - start
        return result

    with pq.ParquetFile(source) as file:
        batches = iter(file.iter_batches(16_384))
        sink = pa.BufferOutputStream()
        with table_writer(sink, file.schema_arrow) as writer:
            while (batch := timed("read", lambda: next(batches, None))) is not None:
                table = pa.Table.from_batches([batch])
                encoded = timed("encode", lambda table=table: encode(table, loaded.schema, loaded.config.views))
                scores = timed("network", lambda encoded=encoded: loaded.scorer.score(encoded.inputs))
                timed("calibrate", lambda scores=scores: loaded.calibration.p_values(scores.score))
                timed("reasons (3)", lambda t=table, e=encoded, s=scores: loaded._explain(t, e, s, 3))
                timed("write", lambda table=table: writer._write(table))
    return spent


def memory(gib: float, folder: Path) -> None:
    """Prints the peak memory of scoring one table."""
    rows = int(gib * 2**30 / 240)
    source = write_table(folder / f"memory-{rows}.parquet", rows)
    idle = _this_program("--peak", "idle", source, folder / "out-memory")
    table = Table(
        title=f"{rows:,} rows, {gib:g} GiB as float64: peak memory less {idle / 1024:,.0f} MiB of an idle one"
    )
    for heading in ("", "peak MiB", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in (OURS, "beam-vae score (no Beam)"):
        start = time.perf_counter()
        output = folder / f"out-{time.time_ns()}"
        peak = _this_program("--folder", folder, "--peak", name, source, output) - idle
        shutil.rmtree(output)
        table.add_row(name, f"{peak / 1024:,.0f}", f"{time.perf_counter() - start:.0f}")
    Console(width=130).print(table)


def _peak(name: str, source: Path, output: Path, folder: Path) -> int:
    """KiB at most of one contender, or of none, in this process."""
    if name == "idle":
        from vae_model.backend import load_quietly

        load_quietly()
        import apache_beam  # noqa: F401
    else:
        measure(name, source, output, folder)
    return peak_memory()


def peak_memory() -> int:
    """KiB of resident memory at most in this process so far.

    Not getrusage's figure, which starts at the memory of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "memory"], default="speed")
    parser.add_argument("--gib", type=float, default=5, help="Of `memory`: the table's size as float64.")
    parser.add_argument("--rows", type=int, nargs=2, default=[100_000, 1_000_000], help="Two sizes.")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/scratch"), help="For tables and models.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Contenders whose name contains one of these.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each; the fastest counts.")
    parser.add_argument("--out", type=Path, help="CSV file for every run.")
    for hidden in ("--one", "--peak"):
        parser.add_argument(hidden, nargs=3, metavar=("NAME", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if given := args.one or args.peak:
        name, source, output = given
        function = measure if args.one else _peak
        print(json.dumps(function(name, Path(source), Path(output), args.folder)))
        return
    prepare(args.folder)
    if args.what == "memory":
        memory(args.gib, args.folder)
        return
    console = Console(width=130)
    runs: list[dict[str, Any]] = []
    chosen = {}
    for name, (_, kind, share, libraries) in CONTENDERS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        if absent := [library for library in libraries if importlib.util.find_spec(library) is None]:
            console.print(f"left out: {name} needs {', '.join(absent)}")
            continue
        chosen[name] = (30, 0) if kind == "numeric" else (10, 10), kind, share
    # In turn: what else the machine does then meets them all.
    for repeat in range(args.repeats):
        for name, (shape, kind, share) in chosen.items():
            for size in (int(rows * share) for rows in args.rows):
                source = write_table(args.folder / f"{kind}-{size}.parquet", size, *shape)
                seconds, cpu = _in_a_process(name, source, args.folder)
                runs.append({"name": name, "rows": size, "repeat": repeat, "seconds": seconds, "cpu_seconds": cpu})
                console.print(f"{name}: {size:,} rows, {seconds:.2f} s, CPU {cpu:.2f} s", style="dim")
    if args.out:
        with args.out.open("w") as file:
            writer = csv.DictWriter(file, runs[0])
            writer.writeheader()
            writer.writerows(runs)
    report(console, runs)
    for bundle in ("plain", "default"):
        source = write_table(args.folder / f"numeric-{args.rows[0]}.parquet", args.rows[0])
        report_stages(console, bundle, args.rows[0], stages(source, str(args.folder / bundle)))


def _in_a_process(name: str, source: Path, folder: Path) -> tuple[float, float]:
    output = folder / f"out-{time.time_ns()}"
    try:
        seconds, cpu_seconds = _this_program("--folder", folder, "--one", name, source, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return seconds, cpu_seconds


def _this_program(*arguments: Any) -> Any:
    """What it prints last, from JSON."""
    command = [sys.executable, "-m", "benchmarks.batch", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(console: Console, runs: list[dict[str, Any]]) -> None:
    """Rows/s of each contender, and how many times ours they are."""
    marginal = {key: _marginal(runs, key) for key in ("seconds", "cpu_seconds")}
    cores = len(os.sched_getaffinity(0))
    table = Table(
        title=f"Parquet to Parquet, 30 float64 columns (240 bytes a row), {cores} cores, 64-32-8 network, S = 1"
    )
    for heading in ("", "rows", "seconds", "marginal rows/s", "ours / its", "CPU µs a row", "its / ours"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, per_row in marginal["seconds"].items():
        fastest = _fastest(runs, name, "seconds")
        cpu = marginal["cpu_seconds"][name]
        ours = {key: found.get(OURS, math.nan) for key, found in marginal.items()}
        table.add_row(
            name,
            " / ".join(f"{rows:,}" for rows in fastest),
            " / ".join(f"{seconds:.2f}" for seconds in fastest.values()),
            f"{1 / per_row:,.0f}",
            f"{per_row / ours['seconds']:.2f}",
            f"{1e6 * cpu:.2f}",
            f"{cpu / ours['cpu_seconds']:.2f}",
        )
    console.print(table)


def _fastest(runs: list[dict[str, Any]], name: str, key: str) -> dict[int, float]:
    """Seconds of the fastest run by the number of rows, ascending."""
    found: dict[int, float] = {}
    for run in runs:
        if run["name"] == name:
            found[run["rows"]] = min(run[key], found.get(run["rows"], math.inf))
    return dict(sorted(found.items()))


def _marginal(runs: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Seconds for one row more, by contender."""
    marginal = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        (small, fast), (large, slow) = _fastest(runs, name, key).items()
        marginal[name] = max(slow - fast, 1e-9) / (large - small)
    return marginal


def report_stages(console: Console, bundle: str, rows: int, spent: dict[str, float]) -> None:
    """Where the time of scoring goes."""
    table = Table(title=f"stages of scoring {rows:,} rows, {bundle} configuration")
    for heading in ("stage", "seconds", "share", "rows/s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, seconds in spent.items():
        table.add_row(stage, f"{seconds:.3f}", f"{seconds / sum(spent.values()):.0%}", f"{rows / seconds:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
