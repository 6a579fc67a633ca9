"""The job's flags: one list for `--help`, for the command line and for Beam's `PipelineOptions`. No Beam here."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

from vae_model.cli import names

# What --input, --output and --dead_letters of a streaming job may begin with; `pipeline.streaming` knows how.
STREAMS = ("pubsub", "kafka", "replay", "bigquery")
_STREAM = re.compile(rf"({'|'.join(STREAMS)}):(?!//)(.*)", re.DOTALL)


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return value


def add_arguments(parser: ArgumentParser | Any) -> None:
    """Declares the flags. None is required here: Beam parses every subclass's flags in every pipeline."""
    add = parser.add_argument
    formats = ("parquet", "csv", "jsonl")
    add(
        "--input",
        metavar="URI",
        help="Files to score: a path, glob or directory; *.parquet, *.csv, *.jsonl; or "
        "bigquery:PROJECT.DATASET.TABLE, or 'bigquery:SELECT ...'. With --streaming, "
        "pubsub:projects/P/subscriptions/S or .../topics/T, kafka:HOST:PORT/TOPIC, "
        "replay:TABLE.parquet?rate=1000&time_column=T.",
    )
    add(
        "--output",
        metavar="URI",
        help="Where scored files go: a directory, or a name such as out/scored.csv; or "
        "bigquery:PROJECT.DATASET.TABLE. With --streaming, "
        "pubsub:projects/P/topics/T, kafka:HOST:PORT/TOPIC, bigquery:PROJECT.DATASET.TABLE, or files by window: "
        "FOLDER or FOLDER/*.jsonl.",
    )
    add("--bundle", metavar="URI", help="The model: a directory written by beam-vae fit, or a pointer to one.")
    add(
        "--model_refresh_secs",
        type=float,
        metavar="SECS",
        help="How often a streaming job reads a pointer again (default 60), to swap models; 0 for never.",
    )
    add("--input_format", choices=formats, help="By default, by the suffix of --input.")
    add("--output_format", choices=formats, help="By default, by the suffix of --output, else that of the input.")
    add(
        "--dead_letters",
        metavar="URI",
        help="Where unusable records go: whatever --output takes. By default, "
        "OUTPUT/_dead_letters where the output is files.",
    )
    add(
        "--max_dead_letter_fraction",
        type=fraction,
        default=0.1,
        metavar="SHARE",
        help="The job fails if a larger share of the records cannot be scored (default 0.1). With --streaming, it goes "
        "on, and warns of each window of time.",
    )
    add("--columns", type=names, metavar="A,B", help="Input columns to write beside the scores (default: all).")
    add("--id_columns", type=names, metavar="A,B", help="Write these columns and the scores only.")
    add("--reasons", type=int, default=0, metavar="K", help="Explain each row by its K strangest columns (default 0).")
    add("--threshold", type=float, metavar="NATS", help="Label scores from here on, instead of the bundle's threshold.")
    add("--score_prefix", default="", metavar="TEXT", help="Put before the names of the score columns.")
    add("--overwrite", action="store_true", help="Replace scored files, or the table, that are at --output.")
    add(
        "--timestamp_attribute",
        metavar="NAME",
        help="With --streaming: the Pub/Sub attribute that holds a message's event time (RFC 3339, or milliseconds "
        "since 1970); by default, when it was published.",
    )
    add(
        "--id_attribute",
        metavar="NAME",
        help="With --streaming: the Pub/Sub attribute by which Dataflow drops messages that come twice within ten "
        "minutes.",
    )
    add(
        "--max_batch_duration_secs",
        type=float,
        metavar="SECS",
        help="With --streaming: how long a record may wait for others to be scored with; by default, not at all.",
    )
    add("--window_secs", type=float, metavar="SECS", help="With --streaming: length of a file's window (default 60).")
    add(
        "--allowed_lateness_secs",
        type=float,
        metavar="SECS",
        help="With --streaming: drop what comes later than this after its window, rather than write it; by default, "
        "nothing is dropped.",
    )
    add(
        "--num_shards",
        type=int,
        metavar="N",
        help="With --streaming: files per window (default 1); more are written at the same time.",
    )


def stream_place(uri: Any) -> tuple[str, str] | None:
    """`("pubsub", "projects/P/topics/T")` of a stream's URI; None of files."""
    found = _STREAM.fullmatch(str(uri))
    return (found[1], found[2]) if found else None


def bigquery_place(uri: Any) -> str | None:
    """`"PROJECT.DATASET.TABLE"` of `"bigquery:PROJECT.DATASET.TABLE"`; None of anything else."""
    scheme, rest = stream_place(uri) or ("", "")
    return rest if scheme == "bigquery" else None


_STREAMING_ONLY = (
    "timestamp_attribute",
    "id_attribute",
    "max_batch_duration_secs",
    "window_secs",
    "allowed_lateness_secs",
    "num_shards",
)
_BATCH_ONLY = ("overwrite", "input_format", "output_format")
_LEAST = {"model_refresh_secs": 0, "reasons": 0, "allowed_lateness_secs": 0, "num_shards": 1}
_POSITIVE = ("max_batch_duration_secs", "window_secs")


def check(options: Any, streaming: bool = False) -> None:
    """Says what is missing or contradictory.

    Args:
        options: With the attributes that `add_arguments` declares.
        streaming: Whether Beam's flag `--streaming` is given.

    Raises:
        ValueError: Naming the flags.
    """
    missing = [f"--{flag}" for flag in ("input", "output", "bundle") if not getattr(options, flag)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; see --help")
    if options.columns is not None and options.id_columns is not None:
        raise ValueError("--columns and --id_columns: expected one of them, got both")
    for flag, least in _LEAST.items():
        value = getattr(options, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag}: expected a number >= {least}, got {value:g}")
    for flag in _POSITIVE:
        value = getattr(options, flag)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag}: expected a number > 0, got {value:g}")
    if streaming:
        _check_streaming(options)
        return
    tables = [bigquery_place(getattr(options, flag)) for flag in ("input", "output", "dead_letters")]
    for flag, table in zip(("input", "output", "dead_letters"), tables, strict=True):
        if stream_place(getattr(options, flag)) and table is None:
            raise ValueError(f"--{flag}: {getattr(options, flag)} is for streaming jobs; add --streaming")
    for flag in _STREAMING_ONLY:
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag}: is for streaming jobs; add --streaming")
    _check_tables(options, *tables)


def _check_tables(options: Any, source: str | None, output: str | None, letters: str | None) -> None:
    for flag, table in (("input", source), ("output", output)):
        if table is not None and getattr(options, f"{flag}_format"):
            raise ValueError(f"--{flag}_format: is for files, but --{flag} is {getattr(options, flag)}")
    if output is not None and not options.dead_letters:
        raise ValueError(f"missing --dead_letters: with --output {options.output}, they need a place of their own")
    names = [table.replace(":", ".") for table in (source, output, letters) if table is not None]
    if len(set(names)) < len(names):
        raise ValueError("--input, --output and --dead_letters: expected tables of their own, got the same twice")


def _check_streaming(options: Any) -> None:
    source = stream_place(options.input)
    if source is None:
        raise ValueError(f"--input: expected a stream, such as pubsub:..., got {options.input}; leave --streaming out")
    for flag in _BATCH_ONLY:
        if getattr(options, flag):
            raise ValueError(f"--{flag}: is for batch jobs, which score files; leave it or --streaming out")
    if stream_place(options.output) and not options.dead_letters:
        raise ValueError(f"missing --dead_letters: with --output {options.output}, they need a place of their own")
    for flag in ("timestamp_attribute", "id_attribute"):
        if getattr(options, flag) and source[0] != "pubsub":
            raise ValueError(f"--{flag}: expected only with --input pubsub:..., got {options.input}")
    if stream_place(options.output) and stream_place(options.dead_letters):
        for flag in ("num_shards", "allowed_lateness_secs"):
            if getattr(options, flag) is not None:
                raise ValueError(f"--{flag}: is for files; neither --output nor --dead_letters is a folder")
    if str(options.dead_letters) == str(options.output):
        raise ValueError("--dead_letters and --output: expected two places, got the same twice")
