"""The commands around Beam: `run`, `demo`, `demo-stream`, `yaml-provider`. Beam itself loads when a job runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.options import add_arguments, check
from vae_model.cli import formatter, guarded

RUN_HELP = "Score files or a stream in a Beam job: every record ends up scored or among the dead letters."


def add_commands(commands: Any) -> None:
    """Adds `run`, `demo`, `demo-stream` and `yaml-provider` to a program's subcommands."""
    run = commands.add_parser(
        "run",
        help=RUN_HELP,
        description=RUN_HELP,
        epilog="Any Beam flag may follow, such as --runner=DataflowRunner --project=... --temp_location=...",
        formatter_class=formatter(),
        allow_abbrev=False,
    )
    add_arguments(run)
    run.set_defaults(command=run_job, passes_flags_on=True)
    demo = commands.add_parser(
        "demo",
        help="Train on NYC flights of 2013, score the last quarter in Beam, show what it finds.",
        formatter_class=formatter(),
    )
    demo.add_argument(
        "--folder", default="demo", metavar="DIR", help="Where tables, bundle and scores go (default demo/)."
    )
    demo.add_argument("--picture", metavar="SVG", help="Save what it found as a picture too.")
    demo.set_defaults(command=_run_demo)
    stream = commands.add_parser(
        "demo-stream",
        help="Score flights as they come through a Pub/Sub server on this machine; swap the model meanwhile.",
        formatter_class=formatter(),
    )
    stream.add_argument("--folder", default="demo", metavar="DIR", help="Where tables and bundles go (default demo/).")
    stream.add_argument(
        "--flights", type=int, default=2000, metavar="N", help="How many flights of October (default 2000)."
    )
    stream.set_defaults(command=_run_demo_stream)
    provider = commands.add_parser(
        "yaml-provider", help="Say where the file is that a Beam YAML pipeline includes.", formatter_class=formatter()
    )
    provider.set_defaults(command=_print_provider)


def main(argv: Sequence[str] | None = None) -> int:
    """The job alone, as `python -m pipeline`."""
    parser = argparse.ArgumentParser(
        "python -m pipeline", description=RUN_HELP, formatter_class=formatter(), allow_abbrev=False
    )
    parser.add_argument("--traceback", action="store_true", help="Show where an error comes from.")
    add_arguments(parser)
    args, others = parser.parse_known_args(argv)
    args.argv = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--traceback"]
    args.others = others
    return guarded(run_job, args)


def run_job(args: argparse.Namespace) -> int:
    """Runs the job and prints its account."""
    check(args, streaming="--streaming" in args.others)
    run = load_job()
    runner = run.runner_of(args.others)
    if runner != "PortableRunner":  # whose job server may know flags of its own
        run.refuse_unknown_flags(args.others)
    if runner in run.LOCAL_RUNNERS:
        from vae_model.backend import load_quietly

        load_quietly()
        if not args.traceback:  # Beam logs an error with its traceback, and then raises it
            logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    else:
        logging.getLogger().setLevel(logging.INFO)  # job ids, links and states
    summary = run.run(args.argv)
    if summary is not None:
        print_summary(summary)
    return 0


def load_job() -> Any:
    """`pipeline.run`; Beam warns of Google's libraries, which only some jobs need, while it loads."""
    logging.disable(logging.WARNING)
    try:
        from pipeline import run
    finally:
        logging.disable(logging.NOTSET)
    return run


def print_summary(summary: Any) -> None:
    """The account of a job, as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    share = summary.num_anomalies / summary.num_scored if summary.num_scored else 0
    table.add_row("records in", f"{summary.num_records:,}", "")
    table.add_row("scored", f"{summary.num_scored:,}", escape(summary.output))
    table.add_row("anomalies", f"{summary.num_anomalies:,}", f"{share:.2%} of the scored")
    table.add_row("dead letters", f"{summary.num_dead_letters:,}", escape(summary.dead_letters))
    for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
        table.add_row("", f"{count:,}", reason.replace("_", " "))
    for version, count in summary.versions.items():
        table.add_row("version", f"{count:,}", version)
    if summary.num_unreadable_files:
        table.add_row("unreadable files", f"{summary.num_unreadable_files:,}", "of unknown length, one letter each")
    if summary.num_unaccounted:
        table.add_row("[red]unaccounted[/red]", f"{summary.num_unaccounted:,}", "neither scored nor set aside: a bug")
    rate = summary.num_records / summary.seconds
    table.add_row("rows/s", f"{rate:,.0f}", f"{summary.seconds:.1f} s, launch and model loading included")
    Console().print(table)


def _run_demo(args: argparse.Namespace) -> int:
    from pipeline.demo import demo

    demo(Path(args.folder), picture=Path(args.picture) if args.picture else None)
    return 0


def _run_demo_stream(args: argparse.Namespace) -> int:
    from pipeline.demo_stream import demo_stream

    return 0 if demo_stream(Path(args.folder), args.flights).adds_up else 1


def _print_provider(args: argparse.Namespace) -> int:
    print(Path(__file__).with_name("yaml_provider.yaml"))
    return 0
