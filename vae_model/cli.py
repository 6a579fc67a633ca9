"""The commands that need no Beam. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vae_model.config import QUALITIES, TrainingConfig, VAEConfig


def formatter() -> type[argparse.HelpFormatter]:
    """How help is laid out."""
    from rich_argparse import RichHelpFormatter

    return RichHelpFormatter


def guarded(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command; what its user can mend is told in one line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return command(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if getattr(args, "traceback", False) or not str(error):
            raise
        print(f"beam-vae: error: {error}", file=sys.stderr)
        return 1


def names(text: str) -> list[str]:
    """Column names separated by commas; a name that holds a comma goes in double quotes."""
    import csv

    return [name for name in next(csv.reader([text], skipinitialspace=True), []) if name]


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def add_commands(commands: Any) -> None:
    """Adds the commands to a program's subcommands."""
    _add_fit(commands)
    _add_score(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    _add_promote(commands)
    _add_rollback(commands)


def _command(commands: Any, name: str, help: str, function: Callable[[argparse.Namespace], int]) -> Any:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=formatter(), allow_abbrev=False)
    parser.set_defaults(command=function)
    return parser.add_argument


def _add_fit(commands: Any) -> None:
    add = _command(commands, "fit", "Train and calibrate a model on Parquet tables; writes a bundle.", _fit)
    add(
        "--input",
        required=True,
        nargs="+",
        metavar="URI",
        help="Parquet files, globs, directories; local, gs://, s3://.",
    )
    add("--output", required=True, metavar="URI", help="Directory to write the bundle to.")
    add("--overwrite", action="store_true", help="Replace a bundle that is there.")
    add("--resume", action="store_true", help="Go on where an interrupted fit with these flags was.")
    add(
        "--statistics",
        metavar="URI",
        help="File that python -m pipeline.statistics wrote, with the same flags; spares a pass over the tables.",
    )
    add(
        "--quality",
        choices=list(QUALITIES),
        default="default",
        help="What training and scoring may cost: a small network, the default one, or several with a learned prior. "
        "Sets what --hidden_dims, --latent_dim and --num_samples leave open (default default).",
    )
    add_reading_arguments(add)
    _add_settings(
        add,
        ("hidden_dims", _widths, "Widths of the hidden layers, separated by commas."),
        ("latent_dim", int, "Latents; one per input, at most 16, where the quality says nothing else."),
        ("beta", float, "Weight of the KL term in training."),
        ("num_samples", int, "Noise draws per score."),
        ("max_steps", int, "Optimizer steps at most; by default by the number of rows."),
        ("batch_size", int, "Rows per step; by default 64 to 256, by the number of rows."),
        ("learning_rate", float, "Adam's, at its peak."),
        ("kl_warmup", float, "Share of the steps over which the KL term fades in."),
        ("patience", int, "Validations without gain before stopping."),
        ("false_positive_rate", float, "Share of normal rows labelled anomalous."),
        ("contamination", float, "Share of anomalies in the data: sets the threshold; suspects are not learned."),
        ("buffer_mib", int, "Memory for shuffling."),
        ("strategy", str, "mirrored: train on all GPUs of the machine."),
        ("precision", str, "Of the hidden layers in training; mixed_bfloat16 for accelerators."),
    )
    add("--no_examples", action="store_true", default=None, help="Keep no real row in the bundle.")


def add_reading_arguments(add: Any) -> None:
    """Declares the flags by which the statistics differ: what is read as what, and which rows are held out."""
    add("--label", metavar="COLUMN", help="A 0/1 column: no feature, and rows labelled 1 are left out.")
    add("--numeric", type=names, default=[], metavar="A,B", help="Columns to read as numbers.")
    add("--categorical", type=names, default=[], metavar="A,B", help="Columns to read as levels.")
    add("--timestamp", type=names, default=[], metavar="A,B", help="Columns to read as times.")
    add("--exclude", type=names, default=[], metavar="A,B", help="Columns to carry only.")
    _add_settings(
        add,
        ("validation_fraction", float, "Rows held out for early stopping."),
        ("calibration_fraction", float, "Rows held out for calibration; by default by the number of rows."),
        ("time_column", str, "Calibrate on the last block of time in this column."),
        ("seed", int, "Of weights, shuffling, splits and noise."),
    )


def _add_settings(add: Any, *settings: tuple[str, Callable[[str], Any], str]) -> None:
    for name, kind, help in settings:
        default = getattr(VAEConfig, name, getattr(TrainingConfig, name, None))
        if any(name in changes for changes in QUALITIES.values()):
            default = "by --quality"
        shown = "" if default is None else f" (default {default})"
        add(f"--{name}", type=kind, metavar=name.rpartition("_")[2].upper(), help=help + shown)


def configs(args: argparse.Namespace) -> tuple[VAEConfig, TrainingConfig]:
    """The two configurations, with the flags that were given."""
    return VAEConfig.of_quality(args.quality, **_given(args, VAEConfig)), training_config(args)


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """That of training, with the flags that were given."""
    return TrainingConfig(**_given(args, TrainingConfig))


def _given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    values = {field.name: getattr(args, field.name, None) for field in fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _fit(args: argparse.Namespace) -> int:
    config, training = configs(args)
    from vae_model.backend import load_quietly
    from vae_model.fitting import fit

    load_quietly()
    with Stages() as on_progress:
        bundle = fit(
            args.input,
            config,
            training,
            output=args.output,
            overwrite=args.overwrite,
            resume=args.resume,
            label=args.label,
            numeric=args.numeric,
            categorical=args.categorical,
            timestamp=args.timestamp,
            exclude=args.exclude,
            statistics=args.statistics,
            on_progress=on_progress,
        )
    print_bundle(bundle, args.output)
    return 0


class Stages:
    """A progress bar for each stage of a long command; a context manager that gives `on_progress`."""

    def __enter__(self) -> Callable[[str, int, int, dict[str, float]], None]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        self._tasks: dict[str, Any] = {}
        self._progress.start()
        return self._on_progress

    def _on_progress(self, stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, losses="")
        text = ""
        if "loss" in losses:
            parts = f"{losses['reconstruction_loss']:.2f} + KL {losses['kl_loss']:.2f}"
            text = f"loss {losses['loss']:.2f} = {parts} nats"
        self._progress.update(self._tasks[stage], completed=done, total=total, losses=text)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _add_score(commands: Any) -> None:
    add = _command(commands, "score", "Score Parquet tables without Beam; the same numbers as run.", _score)
    add(
        "--input",
        required=True,
        nargs="+",
        metavar="URI",
        help="Parquet files, globs, directories; local, gs://, s3://.",
    )
    add("--output", required=True, metavar="FILE", help="Parquet file to write.")
    add("--bundle", required=True, metavar="URI", help="Written by fit.")
    add("--overwrite", action="store_true", help="Replace a file that is there.")
    add("--columns", type=names, metavar="A,B", help="Input columns to write beside the scores (default: all).")
    add("--reasons", type=int, default=0, metavar="K", help="Explain each row by its K strangest columns.")
    add("--threshold", type=float, metavar="NATS", help="Label scores from here on, instead of the bundle's threshold.")
    add("--score_prefix", default="", metavar="TEXT", help="Put before the names of the score columns.")


def _score(args: argparse.Namespace) -> int:
    from vae_model.backend import load_quietly
    from vae_model.batch import score_files
    from vae_model.bundle import load_bundle

    load_quietly()
    with Stages() as on_progress:
        num_rows, num_anomalies = score_files(
            load_bundle(args.bundle),
            args.input,
            args.output,
            columns=args.columns,
            reasons=args.reasons,
            threshold=args.threshold,
            prefix=args.score_prefix,
            overwrite=args.overwrite,
            on_progress=on_progress,
        )
    print(f"{num_rows:,} rows scored, {num_anomalies:,} anomalies: {args.output}")
    return 0


def _add_evaluate(commands: Any) -> None:
    add = _command(commands, "evaluate", "Compare scores with a label column: AUROC, AUPR, precision at k.", _evaluate)
    add("--input", required=True, nargs="+", metavar="URI", help="Parquet files with the features and the label.")
    add("--bundle", required=True, metavar="URI", help="Written by fit.")
    add("--label", required=True, metavar="COLUMN", help="1 for an anomaly, 0 for a normal row.")
    add(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="Where to measure precision (default: as many as there are anomalies).",
    )
    add("--seed", type=int, default=0, help="Of the bootstrap.")


def _evaluate(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from vae_model.backend import load_quietly
    from vae_model.batch import scores_and_labels
    from vae_model.bundle import load_bundle
    from vae_model.evaluation import evaluate

    load_quietly()
    with Stages() as on_progress:
        scores, labels = scores_and_labels(load_bundle(args.bundle), args.input, args.label, on_progress)
    found = evaluate(labels, scores, ks=args.k, seed=args.seed)
    table = Table(title=f"{found.num_rows:,} rows, {found.num_anomalies:,} anomalies")
    for heading in ("", "estimate", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"AUROC": found.auroc, "AUPR": found.aupr}
    rows |= {f"precision at {k:,}": estimate for k, estimate in found.precision_at.items()}
    for name, estimate in rows.items():
        table.add_row(name, f"{estimate.value:.4f}", f"{estimate.low:.4f} - {estimate.high:.4f}")
    Console().print(table)
    return 0


def _add_inspect(commands: Any) -> None:
    add = _command(commands, "inspect", "Show a bundle: columns, training, threshold, calibration.", _inspect)
    add("bundle", metavar="URI", help="Written by fit.")


def _inspect(args: argparse.Namespace) -> int:
    from vae_model.bundle import load_bundle
    from vae_model.pointer import describe

    print_bundle(load_bundle(args.bundle), describe(args.bundle))
    return 0


def _add_promote(commands: Any) -> None:
    add = _command(commands, "promote", "Point to a bundle, once it is proved sound; pipelines follow.", _promote)
    add("bundle", metavar="BUNDLE", help="Written by fit; or another pointer, whose bundle is meant then.")
    add("pointer", metavar="POINTER", help="A file whose name ends in .json; made where there is none.")
    add("--force", action="store_true", help="Also where running pipelines may refuse the bundle for its columns.")


def _promote(args: argparse.Namespace) -> int:
    from vae_model.backend import load_quietly
    from vae_model.promotion import promote

    load_quietly()
    before, after = promote(args.bundle, args.pointer, force=args.force)
    here = f"{after.locate(after.current)}, version {after.current.model_version}"
    if before is after:
        print(f"{args.pointer} points to {here} already; nothing was changed")
        return 0
    print(f"{args.pointer} points to {here}")
    if before:
        print(f"before: {before.locate(before.current)}, version {before.current.model_version}")
    return 0


def _add_rollback(commands: Any) -> None:
    add = _command(commands, "rollback", "Point to the bundle before the current one again.", _rollback)
    add("pointer", metavar="POINTER", help="Written by promote.")


def _rollback(args: argparse.Namespace) -> int:
    from vae_model.backend import load_quietly
    from vae_model.promotion import rollback

    load_quietly()
    before, after = rollback(args.pointer)
    print(f"{args.pointer} points to {after.locate(after.current)}, version {after.current.model_version}, again")
    print(f"no longer: {before.locate(before.current)}, version {before.current.model_version}")
    print(f"earlier bundles left: {len(after.history)}")
    return 0


def source_text(source: str | list[str]) -> str:
    """Where a bundle's data came from, in a few words."""
    if isinstance(source, str):
        return source
    return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"


def print_bundle(bundle: Any, uri: str) -> None:
    """A bundle at a glance."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vae_model.report import training_facts

    console = Console()
    card, calibration, threshold = bundle.card, bundle.calibration, bundle.threshold
    training = card["training"]
    console.print(f"[bold]{escape(uri)}[/bold]  version {bundle.model_version}, written {card['created']}")
    data = card["data"]
    console.print(
        f"trained on {data['num_rows']:,} rows, {data['num_columns']} columns of {escape(source_text(data['source']))}"
    )

    columns = Table(title="columns", title_justify="left")
    for heading in ("name", "kind", "missing", "what is known"):
        columns.add_column(heading)
    for feature in bundle.schema.features:
        missing = feature.num_missing / max(feature.num_rows, 1)
        columns.add_row(
            escape(feature.name), feature.kind, f"{missing:.2%}" if missing else "", escape(feature.description)
        )
    for name, reason in bundle.schema.passthrough.items():
        columns.add_row(escape(name), "[dim]carried[/dim]", "", f"[dim]{escape(reason)}[/dim]")
    console.print(columns)

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column()
    for fact in training_facts(bundle).items():
        facts.add_row(*fact)
    kl = ", ".join(f"{value:.2f}" for value in sorted(training["kl_per_latent"], reverse=True))
    facts.add_row(
        "latents", f"{training['active_units']} of {len(training['kl_per_latent'])} active; KL of each to N(0, 1): {kl}"
    )
    quantiles = ", ".join(
        f"{float(rank):.1%} {value:.2f}" for rank, value in card["calibration"]["score_quantiles"].items()
    )
    facts.add_row("calibration", f"{calibration.num_rows:,} rows ({calibration.method}); scores at {quantiles} nats")
    target = "" if threshold.target is None else f" for {threshold.rule.replace('_', ' ')} {threshold.target:g}"
    beyond = ", extrapolated from the tail" if threshold.extrapolated else ""
    facts.add_row("threshold", f"{threshold.value:.4f} nats{target}{beyond}")
    tail = f"generalized Pareto, shape {calibration.tail_shape:.3f}"
    facts.add_row("tail", f"{tail}; p-values below {1 / (calibration.num_rows + 1):.1e} are estimates")
    console.print(facts)
