"""The job's flags: one list for `--help`, for the command line and for Beam's `PipelineOptions`. No Beam here."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

from vae_model.cli import names


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
    add("--input", metavar="URI", help="Files to score: a path, glob or directory; *.parquet, *.csv, *.jsonl.")
    add("--output", metavar="URI", help="Where scored files go: a directory, or a name such as out/scored.csv.")
    add("--bundle", metavar="URI", help="The model: a directory written by beam-vae fit, or a pointer to one.")
    add(
        "--model_refresh_secs",
        type=float,
        metavar="SECS",
        help="How often a streaming job reads a pointer again (default 60), to swap models; 0 for never.",
    )
    add("--input_format", choices=formats, help="By default, by the suffix of --input.")
    add("--output_format", choices=formats, help="By default, by the suffix of --output, else that of the input.")
    add("--dead_letters", metavar="URI", help="Where unusable records go. By default, OUTPUT/_dead_letters.")
    add(
        "--max_dead_letter_fraction",
        type=fraction,
        default=0.1,
        metavar="SHARE",
        help="The job fails if a larger share of the records cannot be scored (default 0.1).",
    )
    add("--columns", type=names, metavar="A,B", help="Input columns to write beside the scores (default: all).")
    add("--id_columns", type=names, metavar="A,B", help="Write these columns and the scores only.")
    add("--reasons", type=int, default=0, metavar="K", help="Explain each row by its K strangest columns (default 0).")
    add("--threshold", type=float, metavar="NATS", help="Label scores from here on, instead of the bundle's threshold.")
    add("--score_prefix", default="", metavar="TEXT", help="Put before the names of the score columns.")
    add("--overwrite", action="store_true", help="Replace scored files that are at --output.")


def check(options: Any) -> None:
    """Says what is missing or contradictory.

    Raises:
        ValueError: Naming the flags.
    """
    missing = [f"--{flag}" for flag in ("input", "output", "bundle") if not getattr(options, flag)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; see --help")
    if options.columns is not None and options.id_columns is not None:
        raise ValueError("--columns and --id_columns: expected one of them, got both")
    if options.model_refresh_secs is not None and not options.model_refresh_secs >= 0:
        raise ValueError(f"--model_refresh_secs: expected a number >= 0, got {options.model_refresh_secs:g}")
    if options.reasons < 0:
        raise ValueError(f"--reasons: expected a number >= 0, got {options.reasons}")
