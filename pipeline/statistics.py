"""Column statistics of tables too large to scan on one machine: a Beam job whose file `beam-vae fit` reads.

python -m pipeline.statistics --input 'gs://.../*.parquet' --output gs://.../statistics.json --runner=...
beam-vae fit --input 'gs://.../*.parquet' --statistics gs://.../statistics.json --output gs://.../bundle
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from pipeline.command import load_job
from vae_model.cli import add_reading_arguments, formatter, guarded, training_config

HELP = "Take the statistics that beam-vae fit needs in a Beam job, with the flags that the fit will have."


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.statistics`."""
    parser = argparse.ArgumentParser(
        "python -m pipeline.statistics",
        description=HELP,
        epilog="Any Beam flag may follow, such as --runner=DataflowRunner --project=... --temp_location=...",
        formatter_class=formatter(),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="URI", help="Parquet files, as for the fit.")
    add("--output", required=True, metavar="URI", help="The file to write, for fit --statistics.")
    add_reading_arguments(add)
    add("--traceback", action="store_true", help="Show where an error comes from.")
    args, flags = parser.parse_known_args(argv)
    args.flags = flags
    return guarded(_run_command, args)


def _run_command(args: argparse.Namespace) -> int:
    job = load_job()
    from pipeline.statistics_job import run

    runner = job.runner_of(args.flags)
    if runner != "PortableRunner":  # whose job server may know flags of its own
        job.refuse_unknown_flags(args.flags)
    if runner not in job.LOCAL_RUNNERS:
        logging.getLogger().setLevel(logging.INFO)  # job ids, links and states
    elif not args.traceback:  # Beam logs an error with its traceback, and then raises it
        logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    reading = {name: getattr(args, name) for name in ("label", "numeric", "categorical", "timestamp", "exclude")}
    num_rows, num_columns = run(args.input, args.output, training_config(args), args.flags, **reading)
    print(f"{num_rows:,} rows, {num_columns} columns: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
