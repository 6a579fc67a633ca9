"""The program that a flex template starts: it submits the job that the template's parameters describe, and ends."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection, Sequence

from pipeline.command import load_job
from pipeline.options import add_arguments, bigquery_place, stream_place
from vae_model.cli import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Submits one job; returns the exit status. Dataflow wants a launcher that ends: the job is not waited for."""
    return guarded(_submit, argparse.Namespace(argv=list(sys.argv[1:] if argv is None else argv)))


def _submit(args: argparse.Namespace) -> int:
    logging.getLogger().setLevel(logging.INFO)
    job = load_job()
    declared = job.declared_flags()
    flags = as_flags(args.argv, {name for name, action in declared.items() if action.nargs == 0})
    # Dataflow refuses parameters that the template does not list, and passes flags of its own, some of which this
    # version of Beam may not know.
    job.refuse_unknown_flags(flags, like=own_flags())
    job.run(flags, wait=False)
    return 0


def own_flags() -> list[str]:
    """The names of the flags that are not Beam's."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return list(parser._option_string_actions)


def as_flags(parameters: Sequence[str], switches: Collection[str]) -> list[str]:
    """The command line that a template's parameters mean.

    Dataflow passes each as `--name=value`, switches too: `--overwrite=true` is `--overwrite`. A parameter without a
    text is left out. An input that is a stream means `--streaming`.

    Args:
        parameters: As Dataflow passes them.
        switches: Flags that take no value.

    Raises:
        ValueError: A switch is neither true nor false.
    """
    flags = []
    for parameter in parameters:
        name, has_value, value = parameter.partition("=")
        if has_value and name in switches:
            if value not in ("true", "false", ""):
                raise ValueError(f"{name}: expected true or false, got {value}")
            if value == "true":
                flags.append(name)
        elif value or not has_value:
            flags.append(parameter)
        if name == "--input" and stream_place(value) and bigquery_place(value) is None:
            flags.append("--streaming")
    return flags


if __name__ == "__main__":
    sys.exit(main())
