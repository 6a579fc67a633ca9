"""Scoring record by record: ScoreRecords against Beam's RunInference, fed the same elements.

    python -m benchmarks.streaming [--rows 10000 60000] [--folder DIR]

Every contender runs in a process of its own, on the same trained network and the same records, from memory to memory
in one Beam bundle of the in-process runner. Marginal records/s come from two sizes, so that start-up drops out;
seconds are CPU time of the whole process, for a shared machine's sake, and wall clock beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.batch import PLAIN, _scaling
from benchmarks.data import make_table

NUM_COLUMNS = 30
_ELEMENTS: list[Any] = []  # of the one contender of this process


# ---- contenders: each scores `_ELEMENTS` of one form, and returns the scored PCollection -----------


def score_records(elements: Any, folder: Path) -> Any:
    """Ours."""
    from pipeline import ScoreRecords

    return (elements | ScoreRecords(str(folder / "plain"))).scored


def run_inference_on_dicts(elements: Any, folder: Path) -> Any:
    """RunInference, the usual way: a dict to an array, the record itself as the key, the score put back."""
    import apache_beam as beam

    mean, stddev = _scaling(folder)
    return (
        elements
        | "ToArray" >> beam.Map(lambda record: (record, _to_array(record, mean, stddev)))
        | _run_inference(folder)
        | "PutBack" >> beam.Map(lambda keyed: {**keyed[0], "anomaly_score": float(keyed[1].inference)})
    )


def run_inference_on_json(elements: Any, folder: Path) -> Any:
    """The same from JSON bytes to JSON bytes."""
    import apache_beam as beam

    return run_inference_on_dicts(elements | "Parse" >> beam.Map(json.loads), folder) | "Write" >> beam.Map(
        lambda record: json.dumps(record).encode()
    )


def our_handler_on_dicts(elements: Any, folder: Path) -> Any:
    """RunInference with our handler, scores put onto the records."""
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference

    from pipeline import VAEModelHandler

    results = elements | RunInference(VAEModelHandler(str(folder / "plain")))
    return results | "PutBack" >> beam.Map(lambda result: {**result.example, **result.inference})


def our_detector_on_dicts(elements: Any, folder: Path) -> Any:
    """AnomalyDetection with our detector, dicts as rows."""
    import apache_beam as beam
    from apache_beam.ml.anomaly.transforms import AnomalyDetection

    from pipeline import VAEDetector

    rows = elements | "ToRow" >> beam.Map(lambda record: beam.Row(**record))
    return rows | AnomalyDetection(VAEDetector(str(folder / "plain")))


def _to_array(record: dict[str, float], mean: np.ndarray, stddev: np.ndarray) -> np.ndarray:
    return ((np.array(list(record.values())[1:]) - mean) / stddev).astype(np.float32)


def _run_inference(folder: Path) -> Any:
    import apache_beam as beam
    from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, PredictionResult, RunInference

    class Handler(ModelHandler):  # type: ignore[type-arg]
        """A hand-written handler at its best: one compiled graph, arrays stacked."""

        def load_model(self) -> Any:
            import keras
            import tensorflow as tf

            import benchmarks.network  # noqa: F401  registers the layer that the saved model needs

            model = keras.models.load_model(folder / "network.keras")
            signature = [tf.TensorSpec((None, NUM_COLUMNS))]
            return tf.function(lambda x: model(x, training=False), input_signature=signature)

        def run_inference(
            self, batch: Sequence[np.ndarray], model: Any, inference_args: dict[str, Any] | None = None
        ) -> Iterable[PredictionResult]:
            scores = model(np.stack(batch)).numpy()[:, 0]
            return [PredictionResult(x, score) for x, score in zip(batch, scores, strict=True)]

        def get_num_bytes(self, batch: Sequence[np.ndarray]) -> int:
            return sum(x.nbytes for x in batch)

        def batch_elements_kwargs(self) -> dict[str, Any]:
            return {"min_batch_size": 4096, "max_batch_size": 4096}

    assert beam.__version__
    return RunInference(KeyedModelHandler(Handler()))


CONTENDERS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "ScoreRecords, dicts": (score_records, "dict"),
    "RunInference, dicts": (run_inference_on_dicts, "dict"),
    "RunInference with our handler, dicts": (our_handler_on_dicts, "dict"),
    "AnomalyDetection with our detector, dicts": (our_detector_on_dicts, "dict"),
    "ScoreRecords, JSON to JSON": (score_records, "json"),
    "RunInference, JSON to JSON": (run_inference_on_json, "json"),
}


# ---- measuring -----------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Trains the bundle and saves its network for RunInference, unless they are there."""
    from vae_model import TrainingConfig, VAEConfig, fit
    from vae_model.bundle import load_bundle

    if not (folder / "plain").exists():
        config = VAEConfig(**PLAIN)  # type: ignore[arg-type]
        fit(make_table(20_000, NUM_COLUMNS, 0, 1), config, TrainingConfig(max_steps=300), output=str(folder / "plain"))
    if not (folder / "network.keras").exists():
        from benchmarks.network import save_network

        save_network(load_bundle(str(folder / "plain")), folder / "network.keras")


def measure(name: str, num_records: int, folder: Path) -> dict[str, float]:
    """Seconds of one contender, in this process."""
    from vae_model.backend import load_quietly

    load_quietly()
    import apache_beam as beam

    score, form = CONTENDERS[name]
    records = make_table(num_records, NUM_COLUMNS, 0, 2).to_pylist()
    records = [{"id": f"record-{i}", **record} for i, record in enumerate(records)]
    _ELEMENTS[:] = records if form == "dict" else [json.dumps(record).encode() for record in records]
    del records
    wall, cpu = time.perf_counter(), time.process_time()
    with beam.Pipeline(runner="FnApiRunner") as p:
        elements = p | beam.Impulse() | "Emit" >> beam.FlatMap(_emit)
        score(elements, folder) | "Discard" >> beam.FlatMap(lambda _: ())
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def _emit(_: bytes) -> list[Any]:
    from benchmarks import streaming  # this module under its own name, not __main__

    return streaming._ELEMENTS


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000, 60_000], help="Two sizes.")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/scratch"), help="For models.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each; the fastest counts.")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "RECORDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        from benchmarks import streaming

        print(json.dumps(streaming.measure(args.one[0], int(args.one[1]), args.folder)))
        return
    prepare(args.folder)
    console = Console()
    best: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CONTENDERS}
    for _ in range(args.repeats):
        for name in CONTENDERS:
            for rows in args.rows:
                seconds = _in_a_process(name, rows, args.folder)
                console.print(f"{name}: {rows:,} records, {seconds['cpu']:.2f} s of CPU", style="dim")
                before = best[name].get(rows, seconds)
                best[name][rows] = {clock: min(seconds[clock], before[clock]) for clock in seconds}
    report(console, best, args.rows)


def _in_a_process(name: str, rows: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.streaming", "--folder", str(folder), "--one", name, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def report(console: Console, best: dict[str, dict[int, dict[str, float]]], rows: list[int]) -> None:
    """Records/s of each contender, and how many times RunInference's ours are."""
    small, large = sorted(rows)
    rates = {
        name: {
            clock: (large - small) / max(sizes[large][clock] - sizes[small][clock], 1e-9) for clock in ("cpu", "wall")
        }
        for name, sizes in best.items()
    }
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"{NUM_COLUMNS} float64 columns and an id, {cores} cores, 64-32-8 network, S = 1")
    for heading in ("", "marginal records/s of CPU", "ours / its", "marginal records/s", "ours / its"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, rate in rates.items():
        ours = rates[f"ScoreRecords, {name.split(', ')[1]}"]
        cells = [
            cell for clock in ("cpu", "wall") for cell in (f"{rate[clock]:,.0f}", f"{ours[clock] / rate[clock]:.2f}")
        ]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
