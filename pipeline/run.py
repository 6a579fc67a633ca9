"""The job: reads files or a stream, scores, writes, and accounts for every record."""

from __future__ import annotations

import argparse
import difflib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions

from pipeline.letters import KIND_PREFIX, NAMESPACE, num_records
from pipeline.options import add_arguments, bigquery_place, check, stream_place
from pipeline.records import DEAD_LETTER_SCHEMA
from pipeline.sinks import (
    WriteDeadLetters,
    WriteTables,
    dead_letter_place,
    refuse_unwritable,
    remove_leftovers,
    written_files,
)
from pipeline.sources import ReadTables, format_of, launch_schema, match_files, split_suffix
from pipeline.transforms import ScoreTables
from vae_model.schema import TableSchema, column_kind

LOCAL_RUNNERS = ("DirectRunner", "BundleBasedDirectRunner", "FnApiRunner")


class ScoringOptions(PipelineOptions):
    """What to score, with which bundle, and where results go."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)


class DeadLetterLimitError(RuntimeError):
    """More records could not be scored than the job allows."""


@dataclass(frozen=True)
class Summary:
    """The job's account: `num_records = num_scored + num_dead_letters`.

    Args:
        num_records: Records that the readers met; a file of unknown length counts as one.
        num_scored: Records written with a score.
        num_anomalies: Of these, labelled anomalies.
        num_dead_letters: Records that could not be scored, counted the same way.
        num_unreadable_files: Files whose number of records is not known.
        reasons: Dead letters by kind of error.
        seconds: From launch to the last file.
        output: Where the scored files are, or the table.
        dead_letters: Where the others are.
        versions: Of a streaming job, records by the version of the model that scored them.
    """

    num_records: int
    num_scored: int
    num_anomalies: int
    num_dead_letters: int
    num_unreadable_files: int
    reasons: dict[str, int]
    seconds: float
    output: str
    dead_letters: str
    versions: dict[str, int] = field(default_factory=dict)

    @property
    def num_unaccounted(self) -> int:
        """Records that are neither scored nor dead letters: 0, or something is broken."""
        return self.num_records - self.num_scored - self.num_dead_letters


def build(pipeline: beam.Pipeline, options: Any) -> None:
    """Adds the batch job's steps to a pipeline.

    Args:
        pipeline: To add to.
        options: With the attributes that `add_arguments` declares.

    Raises:
        ValueError: A flag is wrong, or the input does not fit the bundle; nothing has run then.
        FileNotFoundError: No input file matches.
        FileExistsError: Scored files or rows are at the output, and `overwrite` is false.
    """
    check(options)
    tables = _Tables(pipeline.options, options)
    input_format = "bigquery" if tables.source else format_of(options.input, options.input_format)
    input_files = [] if tables.source else match_files(options.input, input_format)
    _refuse_old_output(options, input_files)
    columns = options.columns if options.id_columns is None else options.id_columns
    score = ScoreTables(options.bundle, options.reasons, options.threshold, options.score_prefix, columns)
    score.model_refresh_secs = options.model_refresh_secs
    schema = score.loaded.schema
    typed = tables.schema() if tables.source else launch_schema(options.input, input_format)
    if input_format in ("csv", "jsonl"):
        # Text says nothing of types: features are read as in training, numbers wide enough for strange ones.
        typed = _with_types(typed, schema)
    score.input_schema = typed
    output_schema = score.output_schema(typed)
    output_format = options.output_format or _format_of_output(options.output, input_format)

    # All columns, also those that are not written: a dead letter carries its whole record.
    required = tuple(schema.names)
    source = tables.read(typed, required) or ReadTables(options.input, typed, input_format, required=required)
    write_scored = tables.write("output", output_schema) or WriteTables(options.output, output_schema, output_format)
    letter_place = dead_letter_place(options)
    write_letters = tables.write("dead_letters", DEAD_LETTER_SCHEMA) or WriteDeadLetters(letter_place)
    read = pipeline | "ReadTables" >> source
    scored = read.tables | "ScoreTables" >> score
    scored_files = scored.scored | "WriteScored" >> write_scored
    letters = (read.dead_letters, scored.dead_letters) | "AllDeadLetters" >> beam.Flatten()
    letter_files = letters | "WriteDeadLetters" >> write_letters
    counts = (
        scored.scored | "CountScored" >> beam.Map(lambda table: (table.num_rows, 0, 0)),
        letters | "CountDeadLetters" >> beam.Map(lambda table: (0, num_records(table), _num_unknown(table))),
    ) | "AllCounts" >> beam.Flatten()
    written = (scored_files, letter_files) | "AllFiles" >> beam.Flatten()
    check_letters = _CheckDeadLetters(options.max_dead_letter_fraction, len(input_files))
    (
        counts
        | "SumCounts" >> beam.CombineGlobally(_sums)
        # After the files are in their places, where whoever is told of too many letters looks for them.
        | "CheckDeadLetters" >> beam.ParDo(check_letters, beam.pvalue.AsIter(written))
    )


def _format_of_output(output: str, input_format: str) -> str:
    """By its suffix, else that of the input, which may be no file."""
    if split_suffix(output)[1]:
        return format_of(output)
    return "parquet" if input_format == "bigquery" else input_format


class _Tables:
    """The job's places in BigQuery, asked before it runs; each method gives None where the place is files.

    Raises:
        ValueError: They need a place in Cloud Storage, or a project, and there is none.
        ImportError: Google's clients are not installed.
    """

    def __init__(self, beam_options: PipelineOptions, options: Any) -> None:
        self.source = bigquery_place(options.input)
        self._options = options
        cloud = beam_options.view_as(GoogleCloudOptions)
        self._project = cloud.project
        # What Beam loads from here is on behalf of the environment's project, whatever the flag says.
        self._loads_for = None if _short_name(beam_options) in LOCAL_RUNNERS else cloud.project
        tables = [
            table for table in map(bigquery_place, (options.input, options.output, options.dead_letters)) if table
        ]
        if not tables:
            return
        need_gcp()
        from pipeline.to_bigquery import refuse_strangers

        if not str(cloud.temp_location).startswith("gs://"):
            got = cloud.temp_location or "none"
            raise ValueError(f"--temp_location: with bigquery:, expected gs://BUCKET/FOLDER for its files, got {got}")
        refuse_strangers(tables[0])  # before Beam looks for credentials, again and again

    def schema(self) -> pa.Schema:
        from pipeline.from_bigquery import bigquery_schema

        return _of_flag("input", bigquery_schema, self.source, self._project)

    def read(self, schema: pa.Schema, required: Sequence[str]) -> beam.PTransform | None:
        if self.source is None:
            return None
        from pipeline.from_bigquery import ReadTablesFromBigQuery

        return ReadTablesFromBigQuery(self.source, schema, required)

    def write(self, flag: str, schema: pa.Schema) -> beam.PTransform | None:
        place = bigquery_place(getattr(self._options, flag))
        if place is None:
            return None
        from pipeline.to_bigquery import LoadTablesToBigQuery

        load = _of_flag(flag, LoadTablesToBigQuery, place, schema, self._options.overwrite)
        _of_flag(flag, load.refuse, self._loads_for)
        return load


def _of_flag(flag: str, call: Callable[..., Any], *args: Any) -> Any:
    """What the call gives; its `ValueError` with the flag before it."""
    try:
        return call(*args)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def need_gcp() -> None:
    """Raises `ImportError` where Google's clients are not installed."""
    try:
        import google.cloud.bigquery  # noqa: F401
    except ImportError as error:
        raise ImportError(f"bigquery: needs the extra gcp: pip install 'beam-vae[gcp]' ({error})") from None


def run(argv: Sequence[str] | None = None, wait: bool = True) -> Summary | None:
    """Runs the job that the flags describe; flags that are not ours go to Beam.

    Args:
        argv: The flags.
        wait: Whether to wait for the end of a batch job; a flex template's launcher does not.

    Returns:
        The account once the job is done. None where it is not waited for; for a template, which has only been written;
        and for a streaming job elsewhere than in this process: on Dataflow it has only been started.

    Raises:
        DeadLetterLimitError: The job failed for its dead letters.
    """
    beam_options = PipelineOptions(argv, save_main_session=False)
    runner = _short_name(beam_options)
    if runner == "DataflowRunner":
        from pipeline.dataflow import prepare

        prepare(beam_options, beam_options.view_as(ScoringOptions))
    is_streaming = beam_options.view_as(StandardOptions).streaming
    try:
        return (_run_streaming if is_streaming else _run_batch)(beam_options, runner, wait)
    except _service_errors() as error:
        raise RuntimeError(str(error).partition(" [while running")[0]) from error


def _service_errors() -> tuple[type[Exception], ...]:
    """What Google's clients raise, such as for a topic that is not there, or a job that Dataflow refuses."""
    try:
        from google.api_core.exceptions import GoogleAPIError
    except ImportError:
        return ()
    return (GoogleAPIError,)


def _run_batch(beam_options: PipelineOptions, runner: str, wait: bool) -> Summary | None:
    options = beam_options.view_as(ScoringOptions)
    pipeline = beam.Pipeline(options=beam_options)
    build(pipeline, options)
    _refuse_unwritable_places(beam_options, runner)
    old = _output_files(options)
    start = time.perf_counter()
    try:
        result = pipeline.run()
        if not wait or beam_options.get_all_options().get("template_location"):
            return None
        result.wait_until_finish()
    except Exception as error:
        # Runners wrap what a step raises, each in its own way; the words survive.
        marker = DeadLetterLimitError.__name__
        if marker in str(error):
            text = str(error).split(marker, 1)[1].lstrip(": ").splitlines()[0].split(" [while running")[0]
            _clean_up(options, old)
            raise DeadLetterLimitError(f"{text}; see {dead_letter_place(options)}") from None
        if runner in LOCAL_RUNNERS:  # elsewhere the job may go on, only this wait has failed
            _remove_temporary(options)
        raise
    _clean_up(options, old)
    return summarize(result, time.perf_counter() - start, options)


def _refuse_unwritable_places(beam_options: PipelineOptions, runner: str) -> None:
    """Tries the places of files, and Beam's own where it needs one, once the pipeline is built."""
    options = beam_options.view_as(ScoringOptions)
    for flag, place, _ in _places(options):
        refuse_unwritable(flag, place)
    temporary = beam_options.view_as(GoogleCloudOptions).temp_location
    uses_bigquery = any(map(bigquery_place, (options.input, options.output, options.dead_letters)))
    # Dataflow's staging would try for minutes; loads into BigQuery and exports from it fail at their end.
    if temporary and (runner == "DataflowRunner" or uses_bigquery):
        refuse_unwritable("temp_location", temporary)


def _run_streaming(beam_options: PipelineOptions, runner: str, wait: bool) -> Summary | None:
    from pipeline import streaming, window_files

    options = beam_options.view_as(ScoringOptions)
    if options.id_attribute and runner in LOCAL_RUNNERS:  # Beam says so only once it reads
        raise ValueError("--id_attribute: Beam's local runners cannot drop duplicates; DataflowRunner does")
    is_local = runner in LOCAL_RUNNERS
    pinned = streaming.local_runner(options) if is_local else None
    if runner not in (pinned, "DirectRunner") and is_local:
        raise ValueError(f"--runner: expected {pinned} for these places, or DirectRunner, got {runner}")
    is_template = bool(beam_options.get_all_options().get("template_location"))
    check(options, streaming=True)
    # What a flex template's launcher, which does not wait, writes as a template is one launch's own.
    if is_template and wait and not all(map(stream_place, (options.output, dead_letter_place(options)))):
        raise ValueError(
            "--template_location: expected no files from a stream: each launch would replace those of the one before; "
            "write to a topic or a table, or use a flex template"
        )
    job = streaming.launch_word()
    pipeline = beam.Pipeline(runner=pinned, options=beam_options)
    streaming.build_streaming(pipeline, options, job, count=is_local)
    _refuse_unwritable_places(beam_options, runner)
    for _, place, _ in _places(options):
        window_files.remove_leftovers(place)
    if not is_local:
        result = pipeline.run()
        if runner != "DataflowRunner" and not is_template:
            result.wait_until_finish()
        return None
    start = time.perf_counter()
    with streaming.local_account(job) as counted:
        with streaming.drained_by_signals(options):
            pipeline.run().wait_until_finish()
        return Summary(
            num_records=counted["records"],
            num_scored=counted["scored"] - counted["refused"],
            num_anomalies=counted["anomalies"],
            num_dead_letters=counted["letters"],
            num_unreadable_files=0,
            reasons=_named(counted, "letter "),
            seconds=time.perf_counter() - start,
            output=str(options.output),
            dead_letters=dead_letter_place(options),
            versions=_named(counted, "version "),
        )


def _named(counted: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): number for name, number in counted.items() if name.startswith(prefix)}


def summarize(result: Any, seconds: float, options: Any) -> Summary:
    """The account of a finished job, from its metrics."""
    counters: dict[str, int] = {}
    for counter in result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]:
        value = counter.committed if counter.committed is not None else counter.attempted
        counters[counter.key.metric.name] = counters.get(counter.key.metric.name, 0) + value
    unreadable = counters.get("num_unreadable_files", 0)
    return Summary(
        num_records=counters.get("num_records", 0) + unreadable,
        num_scored=counters.get("num_inferences", 0),
        num_anomalies=counters.get("num_anomalies", 0),
        num_dead_letters=counters.get("num_dead_letters", 0),
        num_unreadable_files=unreadable,
        reasons={name.removeprefix(KIND_PREFIX): n for name, n in counters.items() if name.startswith(KIND_PREFIX)},
        seconds=seconds,
        output=options.output,
        dead_letters=dead_letter_place(options),
    )


def _with_types(found: pa.Schema, schema: TableSchema) -> pa.Schema:
    """The found columns, features with their type in training; whole numbers as int64, others as float64."""
    fields = []
    for column in found:
        if column.name in schema.names:
            kind = schema.arrow_type(column.name)
            if pa.types.is_integer(kind):
                kind = pa.int64()
            elif column_kind(kind) == "numeric" and not pa.types.is_duration(kind):
                kind = pa.float64()
            column = pa.field(column.name, kind)
        fields.append(column)
    return pa.schema(fields)


def _places(options: Any) -> tuple[tuple[str, str, str], ...]:
    """Where the job writes files: the flag, the place, and the files' name in a directory."""
    places = ("output", options.output, "scored"), ("dead_letters", dead_letter_place(options), "dead_letters")
    return tuple(each for each in places if stream_place(each[1]) is None)


def _output_files(options: Any) -> dict[str, float]:
    """Files of earlier jobs where this one writes, with the time when each was written.

    Raises:
        ValueError: A place cannot be looked into; names the flag.
    """
    found: dict[str, float] = {}
    for flag, place, name in _places(options):
        try:
            found |= written_files(place, name)
        except BeamIOError as error:
            raise ValueError(f"--{flag}: cannot look into {place}: {_cause(error)}") from error
    return found


def _cause(error: Exception) -> Exception:
    """What a store said, within what Beam makes of it."""
    while isinstance(error, BeamIOError) and error.exception_details:
        error = next(iter(error.exception_details.values()))
    return error


def _clean_up(options: Any, old: dict[str, float]) -> None:
    """Removes shards of earlier jobs that this one did not replace, now that its own are whole, and temporary files.

    A store that does not tell when a file was written (0) keeps its shards.
    """
    if stale := [path for path, written in _output_files(options).items() if written and old.get(path) == written]:
        FileSystems.delete(stale)
    _remove_temporary(options)


def _remove_temporary(options: Any) -> None:
    for _, place, name in _places(options):
        remove_leftovers(place, name)


def _refuse_old_output(options: Any, input_files: Sequence[str]) -> None:
    old = _output_files(options)
    if own := set(old) & set(input_files):
        raise ValueError(f"{sorted(own)[0]}: is both input and output; choose another --output")
    if old and not options.overwrite:
        there = f"{min(old)}: is there already ({len(old)} files in all)"
        raise FileExistsError(f"{there}; choose another place or --overwrite")


def _num_unknown(letters: pa.Table) -> int:
    return int(letters["num_records"].null_count)


def _sums(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip((0, 0, 0), *counts, strict=True))


class _CheckDeadLetters(beam.DoFn):
    """Fails the job, in the pipeline itself: a template has no launcher that waits and counts."""

    def __init__(self, max_fraction: float, num_files: int) -> None:
        self._max_fraction, self._num_files = max_fraction, num_files

    def process(self, counts: tuple[int, int, int], written: Iterable[str]) -> None:
        scored, letters, unreadable = counts
        limit = f"more than max_dead_letter_fraction = {self._max_fraction:g} allows"
        if letters > self._max_fraction * (scored + letters):
            raise DeadLetterLimitError(f"{letters:,} of {scored + letters:,} records could not be scored, {limit}")
        # How many records they hold nobody knows, so files are compared with files.
        if unreadable > self._max_fraction * self._num_files:
            raise DeadLetterLimitError(f"{unreadable:,} of {self._num_files:,} files could not be read, {limit}")


def runner_of(flags: Sequence[str]) -> str:
    """The runner that Beam takes for these flags, by its short name."""
    return _short_name(PipelineOptions(list(flags)))


def _short_name(beam_options: PipelineOptions) -> str:
    runner = beam_options.view_as(StandardOptions).runner or StandardOptions.DEFAULT_RUNNER
    name = str(runner).rpartition(".")[2]
    # Beam takes a name in any case, and without its "Runner".
    known = [path.rpartition(".")[2] for path in StandardOptions.ALL_KNOWN_RUNNERS]
    by_name = {each.lower(): each for each in known} | {each.lower().removesuffix("runner"): each for each in known}
    return by_name.get(name.lower(), name)


def refuse_unknown_flags(flags: Sequence[str], like: Collection[str] | None = None) -> None:
    """Beam only warns of flags that nobody knows; a misspelt one must not go by.

    Args:
        flags: The command line.
        like: Refuse only what may be meant for one of these flags; by default, every unknown one.

    Raises:
        ValueError: Naming the flag.
    """
    declared = declared_flags()
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in declared:
            close = difflib.get_close_matches(name, declared if like is None else like, 1)
            if like is None or close:
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name}: neither beam-vae run nor Beam knows this flag{hint}")


def declared_flags() -> dict[str, argparse.Action]:
    """Our flags and Beam's, by name."""
    declared: dict[str, argparse.Action] = {}
    for options in PipelineOptions.__subclasses__():
        scratch = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
        options._add_argparse_args(scratch)
        declared |= scratch._option_string_actions
    return declared
