"""The program `beam-vae`: the commands of `vae_model` and of `pipeline` under one name."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    _refuse_shadow()
    import pipeline.command
    import vae_model.cli

    parser = argparse.ArgumentParser(
        "beam-vae",
        description="Anomaly detection in tables: a variational autoencoder trained on Parquet, scoring inside Beam.",
        formatter_class=vae_model.cli.formatter(),
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="Show where an error comes from.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    vae_model.cli.add_commands(commands)
    pipeline.command.add_commands(commands)
    args, others = parser.parse_known_args(argv)
    if others and not getattr(args, "passes_flags_on", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    given = list(sys.argv[1:] if argv is None else argv)
    args.argv = given[given.index("run") + 1 :] if "run" in given else given  # what `run` and Beam parse
    return vae_model.cli.guarded(args.command, args)


def _refuse_shadow() -> None:
    """A user's own folder or module named like one of ours would be imported instead of it."""
    home = Path(__file__).resolve().parent
    for name in ("pipeline", "vae_model"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            where = found.parent if found else "a folder of that name without __init__.py"
            sys.exit(
                f"beam-vae: error: Python finds another package `{name}` first: {where}. Rename it, or run elsewhere."
            )


if __name__ == "__main__":
    sys.exit(main())
