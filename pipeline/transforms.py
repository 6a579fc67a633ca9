"""Scoring as a PTransform: wiring around `vae_model.Bundle`, no arithmetic."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import StandardOptions

import pipeline.coders  # noqa: F401  makes it known to Beam
from pipeline.letters import Letters
from pipeline.metrics import ScoringMetrics
from pipeline.models import REFRESH_SECS, Launched, ModelSource, launch
from pipeline.records import SOURCE_KEY, dead_letters
from vae_model.bundle import Bundle, refuse_clash, score_fields
from vae_model.tables import without_views


class ScoredTables(NamedTuple):
    """Every input row is in one of the two."""

    scored: beam.PCollection[pa.Table]
    dead_letters: beam.PCollection[pa.Table]


@dataclass
class ScoreTables(beam.PTransform):
    """Scores `pa.Table`s: `.scored` tables with the score columns, and `.dead_letters` of the rows that do not fit.

    Tables of 4,000 to 16,000 rows are fastest. The model is loaded once per process, on the worker.

    Args:
        bundle: Directory or URI that `fit` wrote, or a pointer that `beam-vae promote` wrote.
        reasons: Strangest columns to explain per row.
        threshold: Score, in nats, that replaces the bundle's; None where a pointer is followed.
        prefix: Of the score columns' names.
        columns: Input columns to keep; None keeps all, an empty list the scores alone.
        model_refresh_secs: How often a pointer is read again while the pipeline runs, 0 for never: the version is
            fixed when the pipeline is built then. By default 60 where the input is unbounded, 0 elsewhere.
        input_schema: Of the tables, where known: a newer model may read any of these columns. Without it, only
            those that the model at launch reads.
    """

    bundle: str
    reasons: int = 0
    threshold: float | None = None
    prefix: str = ""
    columns: Sequence[str] | None = None
    model_refresh_secs: float | None = None
    input_schema: pa.Schema | None = None

    @cached_property
    def launched(self) -> Launched:
        """The bundle as it is when the pipeline is built, read once, and where it is."""
        return launch(self.bundle)

    @property
    def loaded(self) -> Bundle:
        """The bundle as it is when the pipeline is built."""
        return self.launched.bundle

    def output_schema(self, input_schema: pa.Schema) -> pa.Schema:
        """The scored tables' schema for tables of `input_schema`.

        Raises:
            ValueError: The bundle cannot score such tables, a kept column is not there, or a score
                column has the name of an input column.
        """
        problem = self.loaded.schema.refuse(input_schema)
        if problem:
            raise ValueError(f"{self.launched.name}: the input does not fit the model: {problem}")
        kept = input_schema.names if self.columns is None else list(self.columns)
        for name in kept:
            if name not in input_schema.names:
                raise ValueError(f"{name}: named in columns, but the input has only {', '.join(input_schema.names)}")
        refuse_clash(input_schema.names, self.reasons, self.prefix)
        plain = without_views(input_schema.empty_table()).schema
        fields = [plain.field(name) for name in kept]
        return pa.schema(fields + score_fields(self.reasons, self.prefix))

    def expand(self, tables: beam.PCollection[pa.Table]) -> ScoredTables:
        refresh = refresh_secs(self.model_refresh_secs, tables)
        source = self.launched.source(refresh, self.input_schema)
        refuse_threshold(self.threshold, source)
        do_fn = VAEScoreDoFn(
            source,
            reasons=self.reasons,
            threshold=self.threshold,
            prefix=self.prefix,
            columns=self.columns,
        )
        outputs = tables | "Score" >> beam.ParDo(do_fn).with_outputs("dead_letters", main="scored")
        return ScoredTables(outputs.scored, outputs.dead_letters)


def refresh_secs(asked: float | None, records: beam.PCollection[Any]) -> float:
    """How often to read a pointer: as asked or, by default, only while an unbounded input is scored."""
    if asked is not None:
        return asked
    streaming = not records.is_bounded or records.pipeline.options.view_as(StandardOptions).streaming
    return REFRESH_SECS if streaming else 0.0


def refuse_threshold(threshold: float | None, source: ModelSource) -> None:
    """Raises `ValueError` where a threshold in nats would stay while the model it is for is swapped."""
    if threshold is not None and source.pointer is not None:
        raise ValueError(
            f"threshold: expected None with a pointer that is followed ({source.pointer}), for scores compare within "
            "one model; name the bundle itself, or set model_refresh_secs=0"
        )


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class VAEScoreDoFn(beam.DoFn):
    """A table in, the scored table out; letters of rows that do not fit on the tag "dead_letters".

    Args:
        source: Of the model: `launch(uri).source()`.
        reasons: See `ScoreTables`, as the others.
        threshold: See there.
        prefix: See there.
        columns: See there.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        reasons: int = 0,
        threshold: float | None = None,
        prefix: str = "",
        columns: Sequence[str] | None = None,
    ) -> None:
        self._source = source
        self._options: dict[str, Any] = {"reasons": reasons, "threshold": threshold, "prefix": prefix}
        self._columns = None if columns is None else list(columns)
        self._letters = Letters()
        self._metrics = ScoringMetrics()

    def setup(self) -> None:
        start = time.perf_counter()
        self._model = self._source.open()
        # Metrics belong to a Beam bundle; there is none yet.
        self._loaded: float | None = time.perf_counter() - start

    def process(self, table: pa.Table) -> Iterator[Any]:
        bundle = self._model.current()
        if self._loaded is not None:
            self._metrics.loaded(bundle, self._loaded)
            self._loaded = None
        source = (table.schema.metadata or {}).get(SOURCE_KEY, b"").decode() or None
        table = table.replace_schema_metadata(None)
        start = time.perf_counter()
        scored, rejects = bundle.split(table, **self._options)
        self._metrics.batch(table, scored, self._options["prefix"], time.perf_counter() - start)
        if len(rejects):
            letters = dead_letters(table, rejects, source=source, stage="score", model_version=bundle.model_version)
            yield self._letters.send(letters)
        if scored.num_rows:
            if self._columns is not None:
                added = [field.name for field in score_fields(self._options["reasons"], self._options["prefix"])]
                scored = scored.select(self._columns + added)
            yield scored
