"""Dead letters on their way out of a step: counted, logged and tagged."""

from __future__ import annotations

import logging

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics

logger = logging.getLogger(__name__)

NAMESPACE = "BeamVAE"
KIND_PREFIX = "dead_letters_"  # of the counters by kind of error

_told: set[tuple[str, str]] = set()  # by this process: a step's own copy may live no longer than one Beam bundle


def num_records(letters: pa.Table) -> int:
    """The records that letters stand for; one of an unknown number counts as one."""
    return int(pc.sum(letters["num_records"].fill_null(1)).as_py() or 0)


class Letters:
    """Of one step. A letter of unknown `num_records` counts as one record, and as an unreadable file."""

    def __init__(self) -> None:
        self._num_dead_letters = Metrics.counter(NAMESPACE, "num_dead_letters")
        self._num_unreadable_files = Metrics.counter(NAMESPACE, "num_unreadable_files")

    def send(self, letters: pa.Table) -> beam.pvalue.TaggedOutput:
        """The letters (`DEAD_LETTER_SCHEMA`) as the step's output "dead_letters"."""
        self.count(letters)
        return beam.pvalue.TaggedOutput("dead_letters", letters)

    def count(self, letters: pa.Table) -> None:
        """Counts and logs letters that are sent otherwise."""
        counted = letters.select(["column", "error_type", "num_records"])
        counted = counted.set_column(2, "num_records", letters["num_records"].fill_null(1))
        kinds = counted.group_by(["column", "error_type"]).aggregate([("num_records", "sum")])
        for kind in kinds.to_pylist():
            count = kind["num_records_sum"]
            self._num_dead_letters.inc(count)
            Metrics.counter(NAMESPACE, f"{KIND_PREFIX}{kind['error_type']}").inc(count)
            place = kind["column"] or "record", kind["error_type"]
            if place not in _told:  # once: a stream of bad records must not flood the log, nor be shown in it
                _told.add(place)
                logger.warning("dead letters: %s: %s (told once per worker)", *place)
        self._num_unreadable_files.inc(letters["num_records"].null_count)
