"""Scoring Parquet files without Beam, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae_model import files
from vae_model.bundle import Bundle, score_fields
from vae_model.overlap import ahead, table_writer
from vae_model.scan import labels
from vae_model.tables import RecordError, open_tables

Progress = Callable[[str, int, int, dict[str, float]], None]


def score_files(
    bundle: Bundle,
    input: str | list[str],
    output: str,
    *,
    columns: Sequence[str] | None = None,
    reasons: int = 0,
    threshold: float | None = None,
    prefix: str = "",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> tuple[int, int]:
    """Scores Parquet files into one Parquet file, which appears whole or not at all.

    Args:
        bundle: The model.
        input: Files, globs, directories or URIs.
        output: Parquet file to write.
        columns: Input columns to write beside the scores; None for all.
        reasons: See `Bundle.score`, as `threshold` and `prefix`.
        threshold: See there.
        prefix: See there.
        overwrite: Replace a file that is there.
        on_progress: Told the rows done and in all.

    Returns:
        The number of rows, and of anomalies among them.

    Raises:
        RecordError: Rows do not fit; nothing is written then.
        FileExistsError: The output is there already.
    """
    if files.exists(output) and not overwrite:
        raise FileExistsError(f"{output}: already exists; choose another place or --overwrite")
    tables = open_tables(input)
    if problem := bundle.schema.refuse(tables.schema):
        raise ValueError(f"the input does not fit the model: {problem}")
    kept = tables.schema.names if columns is None else list(columns)
    if unknown := [name for name in kept if name not in tables.schema.names]:
        raise ValueError(f"{unknown[0]}: named in columns, but the input has only {', '.join(tables.schema.names)}")
    added = score_fields(reasons, prefix)
    schema = pa.schema([tables.schema.field(name) for name in kept] + added)
    needed = list(dict.fromkeys([*kept, *bundle.schema.names]))
    num_anomalies = 0
    with files.new_file(output) as stream, table_writer(stream, schema) as writer:
        for start, table in ahead(tables.scan(needed)):
            for scored, rejects in bundle.score_tables([table], reasons=reasons, threshold=threshold, prefix=prefix):
                if len(rejects):
                    raise RecordError(f"in rows from {start:,}: {rejects.summary()}")
                num_anomalies += pc.sum(scored.column(f"{prefix}is_anomaly")).as_py() or 0
                writer.write(scored.select(kept + [item.name for item in added]))
            if on_progress:
                on_progress("scoring", start + table.num_rows, tables.num_rows, {})
    return tables.num_rows, num_anomalies


def scores_and_labels(
    bundle: Bundle, input: str | list[str], label: str, on_progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(n,)` and labels `(n,)` of Parquet files.

    Raises:
        ValueError: The label is a feature of the model, or no column.
        RecordError: Rows do not fit.
    """
    if label in bundle.schema.names:
        raise ValueError(
            f"{label}: a feature of this model, whose scores know the answer; fit again with --label {label}"
        )
    tables = open_tables(input)
    if label not in tables.schema.names:
        raise ValueError(f"{label}: named as the label, but the input has only {', '.join(tables.schema.names)}")
    if problem := bundle.schema.refuse(tables.schema):
        raise ValueError(f"the input does not fit the model: {problem}")
    if not tables.num_rows:
        raise ValueError(f"{input}: expected rows to evaluate on, got none")
    scores, truth = [], []
    for start, table in tables.scan([*bundle.schema.names, label]):
        scores.append(bundle.score(table.select(bundle.schema.names)).column("anomaly_score").to_numpy())
        truth.append(labels(table, label))
        if on_progress:
            on_progress("scoring", start + table.num_rows, tables.num_rows, {})
    return np.concatenate(scores), np.concatenate(truth)
