"""The job of `python -m pipeline.statistics`: tables in, the statistics of their columns out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.run import runner_of
from vae_model.overlap import ahead
from vae_model.scan import (
    Split,
    TableScan,
    add_times,
    columns_and_roles,
    fingerprint,
    scan_columns,
    write_scan,
)
from vae_model.statistics import QuantileSketch
from vae_model.tables import ParquetTables, Tables

if TYPE_CHECKING:
    from vae_model.config import TrainingConfig


def build(
    pipeline: beam.Pipeline,
    tables: Tables,
    kinds: dict[str, str],
    split: Split,
    output: str,
) -> None:
    """Adds the job's steps to a pipeline.

    Args:
        pipeline: To add to.
        tables: What to read; workers read its row groups through `pyarrow.fs`.
        kinds: The columns to take statistics of, as `columns_and_roles` gives them.
        split: The rows' roles, without a time limit.
        output: URI of the statistics file.
    """
    blocks = (
        pipeline
        | "Blocks" >> beam.Create(range(len(tables.blocks)))
        # By their own number, so that local runners read them in the same order every time.
        | "KeyBlocks" >> beam.Map(lambda block: (block, block)).with_output_types(tuple[int, int])
        | "SpreadBlocks" >> beam.GroupByKey()
        | "BlockNumbers" >> beam.Keys()
    )
    whole = pipeline | "Split" >> beam.Create([split])
    if split.time_column:
        times = (
            blocks
            | "ReadTimes" >> beam.ParDo(_ReadRows(tables, [split.time_column]))
            | "CombineTimes" >> beam.CombineGlobally(_CombineTimes(split))
        )
        whole = whole | "LimitTime" >> beam.Map(Split.with_limit, beam.pvalue.AsSingleton(times))
    rows = blocks | "ReadRows" >> beam.ParDo(_ReadRows(tables, scan_columns(kinds, split)))
    scan = (
        rows
        | "WithSplit" >> beam.Map(_with_split, beam.pvalue.AsSingleton(whole)).with_output_types(_PART)
        | "CombineStatistics" >> beam.CombineGlobally(_CombineStatistics(kinds))
    )
    split_of_scan = beam.pvalue.AsSingleton(whole)
    scan | "Write" >> beam.Map(_write, split_of_scan, output, fingerprint(tables))


def run(
    data: str | list[str],
    output: str,
    training: TrainingConfig,
    flags: Sequence[str] = (),
    **reading: Any,
) -> tuple[int, int]:
    """Runs the job.

    Args:
        data: Parquet files by path, glob, directory or URI, as for `fit`.
        output: URI of the statistics file.
        training: Of the fit to come.
        flags: For Beam.
        reading: `label`, `numeric`, `categorical`, `timestamp` and `exclude`, as for `fit`.

    Returns:
        The number of rows and of columns read.

    Raises:
        ValueError: The arguments do not fit the tables, or the workers cannot reach them.
        RecordError: A row holds a cell that cannot be read.
    """
    if runner_of(flags) == "DataflowRunner":
        for name, uris in {"input": [data] if isinstance(data, str) else data, "output": [output]}.items():
            if local := [uri for uri in uris if "://" not in uri]:
                raise ValueError(f"--{name}: expected a URI that Dataflow's workers can reach, got {local[0]}")
    tables = ParquetTables(data)
    kinds, _, split = columns_and_roles(tables, training, **reading)
    pipeline = beam.Pipeline(options=PipelineOptions(list(flags), save_main_session=False))
    build(pipeline, tables, kinds, split, output)
    pipeline.run().wait_until_finish()
    return tables.num_rows, len(kinds)


_PART = tuple[int, pa.Table, Split]


class _ReadRows(beam.DoFn):
    """The rows of a block, a few at a time, with the position of the first."""

    def __init__(self, tables: Tables, columns: Sequence[str]) -> None:
        self._tables, self._columns = tables, columns

    def process(self, block: int) -> Iterator[tuple[int, pa.Table]]:
        yield from ahead(self._tables.scan(self._columns, [self._tables.blocks[block]]))

    def infer_output_type(self, input_type: Any) -> Any:
        return tuple[int, pa.Table]


def _with_split(rows: tuple[int, pa.Table], split: Split) -> tuple[int, pa.Table, Split]:
    return *rows, split


class _CombineStatistics(beam.CombineFn):
    """Tables to one `TableScan`."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self._kinds = kinds

    def create_accumulator(self) -> TableScan:
        return TableScan(self._kinds)

    def add_input(self, scan: TableScan, part: tuple[int, pa.Table, Split]) -> TableScan:
        start, table, split = part
        scan.update(table, start, split)
        return scan

    def merge_accumulators(self, scans: Iterable[TableScan]) -> TableScan:
        whole = self.create_accumulator()
        for scan in scans:
            whole.merge(scan)
        return whole

    def extract_output(self, scan: TableScan) -> TableScan:
        return scan


class _CombineTimes(beam.CombineFn):
    """Tables to a sketch of their times."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def create_accumulator(self) -> QuantileSketch:
        return QuantileSketch()

    def add_input(self, times: QuantileSketch, rows: tuple[int, pa.Table]) -> QuantileSketch:
        add_times(times, self._split, rows[1])
        return times

    def merge_accumulators(self, sketches: Iterable[QuantileSketch]) -> QuantileSketch:
        whole = QuantileSketch()
        for sketch in sketches:
            whole.merge(sketch)
        return whole

    def extract_output(self, times: QuantileSketch) -> QuantileSketch:
        return times


def _write(scan: TableScan, split: Split, output: str, table: str) -> None:
    scan.check(split)
    write_scan(output, scan, split, table)
