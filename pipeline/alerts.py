"""Alerts from scored records and dead letters, and discoveries among many p-values: wiring, off the scoring path."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.trigger import AccumulationMode, AfterWatermark
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import FixedWindows, GlobalWindow, GlobalWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from pipeline.letters import NAMESPACE, num_records
from pipeline.scored import (
    Batch,
    Fold,
    FoldInBundle,
    FoldPerWindow,
    ScoreReader,
    bounds,
    is_keyed,
    refuse_endless,
    rfc3339,
    table_schema,
)
from vae_model.multiple_testing import PROCEDURES, OnlineProcedure, adjusted_p_values, require_share
from vae_model.reasons import REASON_TYPE

logger = logging.getLogger(__name__)

_REASONS = {field.name: "STRING" if pa.types.is_string(field.type) else "FLOAT" for field in REASON_TYPE.value_type}

ALERT_SCHEMA = table_schema(
    key="STRING",
    kind="STRING",
    num_anomalies="INTEGER",
    max_score="FLOAT",
    p_value="FLOAT",
    first_event_time="TIMESTAMP",
    last_event_time="TIMESTAMP",
    model_version="STRING",
    reasons=_REASONS,
    record="STRING",
)
_TEST = {"key": "STRING", "num_tests": "INTEGER", "num_discoveries": "INTEGER", "p_value": "FLOAT"}
_RECORD = {"score": "FLOAT", "model_version": "STRING", "event_time": "TIMESTAMP", "record": "STRING"}
DISCOVERY_SCHEMA = table_schema(
    window_start="TIMESTAMP", window_end="TIMESTAMP", **_TEST, adjusted_p_value="FLOAT", **_RECORD
)
ONLINE_DISCOVERY_SCHEMA = table_schema(**_TEST, **_RECORD)
DEAD_LETTER_ALERT_SCHEMA = table_schema(
    window_start="TIMESTAMP",
    window_end="TIMESTAMP",
    num_scored="INTEGER",
    num_dead_letters="INTEGER",
    fraction="FLOAT",
    max_fraction="FLOAT",
)


class _Case(NamedTuple):
    """One record of note, as plain values that Beam's coders know."""

    event_time: int
    score: float
    p_value: float
    model_version: str
    record: Any  # as JSON text


def _cases(batch: Batch, texts: Sequence[str | None]) -> list[tuple[Any, ...]]:
    columns = [batch.columns.column(name).to_pylist() for name in _CASE_COLUMNS]
    return list(zip(batch.event_times.tolist(), *columns, texts, strict=True))


_CASE_COLUMNS = ("anomaly_score", "anomaly_p_value", "model_version")


# ---- one alert per burst -------------------------------------------------------------------------


@dataclass
class AlertOnAnomalies(beam.PTransform):
    """Dicts of `ALERT_SCHEMA`: one at a key's first anomaly, one more for all others that its cool-down brings.

    The cool-down runs in event time, from the first anomaly on. Anomalies within it, before or after the first one,
    are folded into one alert of kind "follow_up", which leaves when the watermark passes its end: their number, the
    greatest score, the first and last event time, and the strangest record. Then the next anomaly is a "first" one
    again. Each anomaly is in exactly one alert.

    An anomaly that comes when its cool-down is over begins a new one, which ends a whole cool-down after the last
    that is over: a flood of late ones is at most two alerts per cool-down that the watermark is ahead of them.

    Alerts are in the global window: a cool-down ends at no window's edge. A key's state is a few numbers and the
    strangest record of each open cool-down; it is dropped when the watermark passes the last one by
    `allowed_lateness_secs`.

    Args:
        cool_down_secs: Of a key, in event time.
        key: Column whose text is the key; without it, the key of keyed elements `(key, record)`, or none: all
            records share one cool-down then.
        prefix: Of the score columns' names.
        allowed_lateness_secs: How long a key is remembered after its last cool-down. Later anomalies than that are
            alerts of their own in each Beam bundle.
    """

    cool_down_secs: float
    key: str | None = None
    prefix: str = ""
    allowed_lateness_secs: float = 3600.0

    def __post_init__(self) -> None:
        super().__init__()
        if not self.cool_down_secs > 0:
            raise ValueError(f"cool_down_secs: expected seconds > 0, got {self.cool_down_secs!r}")
        if not self.allowed_lateness_secs >= 0:
            raise ValueError(f"allowed_lateness_secs: expected seconds >= 0, got {self.allowed_lateness_secs!r}")

    def expand(self, scored: beam.PCollection[Any]) -> beam.PCollection[dict[str, Any]]:
        reader = ScoreReader(("is_anomaly", *_CASE_COLUMNS), self.prefix, self.key)
        alert = _Alert(round(1e6 * self.cool_down_secs), round(1e6 * self.allowed_lateness_secs), self.prefix)
        return (
            scored
            | "Global" >> beam.WindowInto(GlobalWindows())
            | "FindAnomalies" >> beam.ParDo(FoldInBundle(_AnomalyFold(reader))).with_output_types(tuple[str, list])
            | "Alert" >> beam.ParDo(alert).with_output_types(dict[str, Any])
        )


class _AnomalyFold(Fold):
    def create(self) -> list[Any]:
        return []

    def add(self, accumulator: list[Any], batch: Batch) -> list[Any]:
        anomalies = np.flatnonzero(batch.numbers("is_anomaly"))
        if len(anomalies):
            strange = batch.take(anomalies)
            accumulator += _cases(strange, strange.texts())
        return accumulator

    def is_empty(self, accumulator: list[Any]) -> bool:
        return not accumulator


_LAST = GlobalWindow().max_timestamp().micros // 1000 * 1000


class _Burst(NamedTuple):
    """An open cool-down of one key, and what was folded into it.

    Args:
        first: Event time of the anomaly that was alerted, in microseconds.
        end: When the cool-down ends.
        num_folded: Anomalies since.
        least: Their first event time.
        greatest: Their last one.
        strangest: Of them, a `_Case`.
    """

    first: int
    end: int
    num_folded: int = 0
    least: int = 0
    greatest: int = 0
    strangest: tuple[Any, ...] | None = None

    def fold(self, case: _Case) -> _Burst:
        if self.strangest is None:
            return self._replace(num_folded=1, least=case.event_time, greatest=case.event_time, strangest=tuple(case))
        # Ties go by the record, so that the order of arrival does not matter.
        strangest = max(_Case(*self.strangest), case, key=lambda item: (item.score, item.record))
        return self._replace(
            num_folded=self.num_folded + 1,
            least=min(self.least, case.event_time),
            greatest=max(self.greatest, case.event_time),
            strangest=tuple(strangest),
        )


class _Alert(beam.DoFn):
    """Keeps the open cool-downs of each key.

    Event times may lie ahead of the watermark, so that several cool-downs are open at once, or far behind it. A
    cool-down that begins late ends as late as if it had begun with the latest timer that is known to have fired:
    otherwise its own would fire at once, and each late Beam bundle would bring another alert.
    """

    STATE = ReadModifyWriteStateSpec("state", FastPrimitivesCoder())  # latest timer that fired, open bursts
    DUE = TimerSpec("due", TimeDomain.WATERMARK)

    def __init__(self, cool_down: int, allowed_lateness: int, prefix: str) -> None:
        self._cool_down, self._allowed_lateness, self._prefix = cool_down, allowed_lateness, prefix

    def process(
        self,
        element: tuple[str, list[tuple[Any, ...]]],
        state: Any = beam.DoFn.StateParam(STATE),  # noqa: B008
        due: Any = beam.DoFn.TimerParam(DUE),  # noqa: B008
    ) -> Iterator[Any]:
        key, cases = element
        passed, bursts = _read(state)
        for case in sorted(_Case(*case) for case in cases):
            time = min(case.event_time, _LAST - 1)
            place = next(
                (i for i, burst in enumerate(bursts) if burst.first - self._cool_down < time < burst.end), None
            )
            if place is not None:
                bursts[place] = bursts[place].fold(case)
                continue
            begin = time if passed is None else max(time, passed)
            # Whole milliseconds, which is all that a timer keeps: one that fires before its end would be set for ever.
            end = -(-(begin + self._cool_down) // 1000) * 1000
            bursts.append(_Burst(time, min(end, _LAST)))
            yield TimestampedValue(self._alert(key, "first", 1, time, time, case), Timestamp(micros=time))
        state.write((passed, [tuple(burst) for burst in bursts]))
        due.set(Timestamp(micros=min(burst.end for burst in bursts)))

    @on_timer(DUE)
    def on_due(
        self,
        key: Any = beam.DoFn.KeyParam,
        timestamp: Any = beam.DoFn.TimestampParam,
        state: Any = beam.DoFn.StateParam(STATE),  # noqa: B008
        due: Any = beam.DoFn.TimerParam(DUE),  # noqa: B008
    ) -> Iterator[dict[str, Any]]:
        now = timestamp.micros
        _, bursts = _read(state)
        if not bursts:  # nothing since the last cool-down
            state.clear()
            return
        left = [burst for burst in bursts if burst.end > now]
        state.write((now, [tuple(burst) for burst in left]))
        due.set(
            Timestamp(micros=min([burst.end for burst in left], default=min(now + self._allowed_lateness + 1, _LAST)))
        )
        for burst in sorted(burst for burst in bursts if burst.end <= now and burst.num_folded):
            assert burst.strangest is not None
            case = _Case(*burst.strangest)
            yield self._alert(key, "follow_up", burst.num_folded, burst.least, burst.greatest, case)

    def _alert(self, key: str, kind: str, num_anomalies: int, first: int, last: int, case: _Case) -> dict[str, Any]:
        return {
            "key": json.loads(key),
            "kind": kind,
            "num_anomalies": num_anomalies,
            "max_score": case.score,
            "p_value": case.p_value,
            "first_event_time": rfc3339(first),
            "last_event_time": rfc3339(last),
            "model_version": case.model_version,
            "reasons": json.loads(case.record).get(f"{self._prefix}anomaly_reasons") or [],
            "record": case.record,
        }


def _read(state: Any) -> tuple[int | None, list[_Burst]]:
    passed, bursts = state.read() or (None, [])
    return passed, [_Burst(*burst) for burst in bursts]


# ---- false discovery rate ------------------------------------------------------------------------


@dataclass
class SelectDiscoveries(beam.PTransform):
    """Dicts of `DISCOVERY_SCHEMA`: the records of a closed window that Benjamini and Hochberg call discoveries.

    Among them, the expected share of false ones is at most q; see `vae_model.multiple_testing`. A window is decided
    once, when the watermark passes its end; what comes later is not tested. Only records with p <= q are shuffled.

    Args:
        q: The false discovery rate aimed at, per window and key.
        key: Column whose text is the key; without it, the key of keyed elements `(key, record)`, or none.
        prefix: Of the score columns' names.
        min_p_value: Least p-value to believe, in [0, 1). 1 / (n + 1), for n calibration rows, leaves out what the
            tail's estimate adds, on which no guarantee holds.
    """

    q: float
    key: str | None = None
    prefix: str = ""
    min_p_value: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        require_share("q", self.q)
        _require_floor(self.min_p_value)

    def expand(self, scored: beam.PCollection[Any]) -> beam.PCollection[dict[str, Any]]:
        refuse_endless("SelectDiscoveries", scored)
        window = beam.WindowInto(
            scored.windowing.windowfn, trigger=AfterWatermark(), accumulation_mode=AccumulationMode.DISCARDING
        )
        fold = _CandidateFold(ScoreReader(_CASE_COLUMNS, self.prefix, self.key), self.q, self.min_p_value)
        return (
            scored
            | "OncePerWindow" >> window
            | "Fold" >> FoldPerWindow(fold)
            | "Select" >> beam.ParDo(_Select(self.q, self.min_p_value)).with_output_types(dict[str, Any])
        )


def _require_floor(min_p_value: float) -> None:
    if not 0 <= min_p_value < 1:
        raise ValueError(f"min_p_value: expected a number in [0, 1), got {min_p_value!r}")


class _CandidateFold(Fold):
    """The number of tests, and the records that may be discoveries."""

    def __init__(self, reader: ScoreReader, q: float, min_p_value: float) -> None:
        super().__init__(reader)
        self._q, self._min_p_value = q, min_p_value

    def create(self) -> tuple[int, list[Any]]:
        return 0, []

    def add(self, accumulator: tuple[int, list[Any]], batch: Batch) -> tuple[int, list[Any]]:
        p = np.maximum(batch.numbers("anomaly_p_value").astype(np.float64), self._min_p_value)
        candidates = batch.take(np.flatnonzero(p <= self._q))
        return self.merge(accumulator, (len(p), _cases(candidates, candidates.texts())))

    def merge(self, accumulator: tuple[int, list[Any]], other: tuple[int, list[Any]]) -> tuple[int, list[Any]]:
        return accumulator[0] + other[0], [*accumulator[1], *other[1]]


class _Select(beam.DoFn):
    def __init__(self, q: float, min_p_value: float) -> None:
        self._q, self._min_p_value = q, min_p_value

    def process(
        self, element: tuple[str, tuple[int, list[Any]]], window: Any = beam.DoFn.WindowParam
    ) -> Iterator[dict[str, Any]]:
        key, (num_tests, candidates) = element
        cases = sorted((_Case(*case) for case in candidates), key=lambda case: (case.p_value, case))
        p = np.maximum([case.p_value for case in cases], self._min_p_value)
        adjusted = adjusted_p_values(p, num_tests)
        num_discoveries = int((adjusted <= self._q).sum())
        for case, value in zip(cases[:num_discoveries], adjusted.tolist(), strict=False):
            yield {
                **bounds(window),
                "key": json.loads(key),
                "num_tests": num_tests,
                "num_discoveries": num_discoveries,
                **_described(case),
                "adjusted_p_value": value,
            }


def _described(case: _Case) -> dict[str, Any]:
    return {**case._asdict(), "event_time": rfc3339(case.event_time)}


@dataclass
class ControlFalseDiscoveries(beam.PTransform):
    """Dicts of `ONLINE_DISCOVERY_SCHEMA`: discoveries as the records come, for ever, per key.

    Each p-value is tested as it arrives, at a level that earlier discoveries raise, so that at any time the expected
    share of false ones among a key's discoveries is at most alpha: for p-values that are independent, which those of
    one calibration set are only nearly. SAFFRON may call one above alpha a discovery, after many others; that has no
    `record`. State is kept for every key for ever: keys must be few.

    Args:
        alpha: The false discovery rate aimed at.
        procedure: "saffron" or "lord"; see `vae_model.multiple_testing`.
        key: As in `SelectDiscoveries`, as the others.
        prefix: See there.
        min_p_value: See there.
    """

    alpha: float
    procedure: str = "saffron"
    key: str | None = None
    prefix: str = ""
    min_p_value: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        if self.procedure not in PROCEDURES:
            raise ValueError(f"procedure: expected one of {', '.join(PROCEDURES)}, got {self.procedure!r}")
        require_share("alpha", self.alpha)
        _require_floor(self.min_p_value)

    def expand(self, scored: beam.PCollection[Any]) -> beam.PCollection[dict[str, Any]]:
        procedure = PROCEDURES[self.procedure](self.alpha)
        reader = ScoreReader(_CASE_COLUMNS, self.prefix, self.key)
        fold = _TestFold(reader, procedure.cap, self.alpha, self.min_p_value)
        return (
            scored
            | "Global" >> beam.WindowInto(GlobalWindows())
            | "Fold" >> beam.ParDo(FoldInBundle(fold)).with_output_types(tuple[str, list])
            | "Test" >> beam.ParDo(_Test(procedure)).with_output_types(dict[str, Any])
        )


class _TestFold(Fold):
    """p-values in their order, as bytes, and those that may be discoveries, with their places.

    Args:
        reader: Gives the batches.
        limit: p-values above are never discoveries.
        alpha: p-values above are sent without their record: there are many of them.
        min_p_value: See `ControlFalseDiscoveries`.
    """

    def __init__(self, reader: ScoreReader, limit: float, alpha: float, min_p_value: float) -> None:
        super().__init__(reader)
        self._limit, self._alpha, self._min_p_value = limit, alpha, min_p_value

    def create(self) -> list[Any]:
        return []

    def add(self, accumulator: list[Any], batch: Batch) -> list[Any]:
        p = np.maximum(batch.numbers("anomaly_p_value").astype("<f8"), self._min_p_value)
        places = np.flatnonzero(p <= self._limit)
        with_record = np.flatnonzero(p <= self._alpha)
        texts = dict(zip(with_record.tolist(), batch.take(with_record).texts(), strict=True))
        cases = _cases(batch.take(places), [texts.get(place) for place in places.tolist()])
        accumulator.append((p.tobytes(), places.tolist(), cases))
        return accumulator


class _Test(beam.DoFn):
    STATE = ReadModifyWriteStateSpec("state", FastPrimitivesCoder())

    def __init__(self, procedure: OnlineProcedure) -> None:
        self._procedure = procedure
        self._fresh = procedure.state()

    def process(
        self,
        element: tuple[str, list[Any]],
        state: Any = beam.DoFn.StateParam(STATE),  # noqa: B008
    ) -> Iterator[Any]:
        key, batches = element
        procedure = self._procedure
        procedure.restore(state.read() or self._fresh)
        for encoded, places, cases in batches:
            num_tests, num_discoveries = procedure.num_tests, procedure.num_discoveries
            found = procedure.test(np.frombuffer(encoded, "<f8"))
            for place, case in zip(places, cases, strict=True):
                if found[place]:
                    num_discoveries += 1
                    numbers = {"num_tests": num_tests + place + 1, "num_discoveries": num_discoveries}
                    discovery = {"key": json.loads(key), **numbers, **_described(_Case(*case))}
                    yield TimestampedValue(discovery, Timestamp(micros=case[0]))
        state.write(procedure.state())


# ---- dead letters --------------------------------------------------------------------------------


@dataclass
class AlertOnDeadLetters(beam.PTransform):
    """Dicts of `DEAD_LETTER_ALERT_SCHEMA`: windows in which too large a share of the records could not be scored.

    Takes `(scored, dead_letters)`, what `ScoreTables` and `ScoreRecords` give. Each such window counts once in the
    metric `dead_letter_alerts` and is one warning in the log. It is decided when the watermark passes its end; what
    comes later is not counted.

    Args:
        max_fraction: Share of dead letters among all records that is still accepted, in [0, 1].
        window_secs: Length of the windows, in event time.
    """

    max_fraction: float = 0.1
    window_secs: float = 60.0

    def __post_init__(self) -> None:
        super().__init__()
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(f"max_fraction: expected a number in [0, 1], got {self.max_fraction!r}")
        if not self.window_secs > 0:
            raise ValueError(f"window_secs: expected seconds > 0, got {self.window_secs!r}")

    def expand(
        self, inputs: tuple[beam.PCollection[Any], beam.PCollection[pa.Table]]
    ) -> beam.PCollection[dict[str, Any]]:
        counts = []
        for name, elements, place in zip(("Scored", "DeadLetters"), inputs, (0, 1), strict=True):
            fold = FoldInBundle(_CountFold(_RowCounter(place)))
            counts.append(
                elements
                | f"Window{name}"
                >> beam.WindowInto(
                    FixedWindows(self.window_secs),
                    trigger=AfterWatermark(),
                    accumulation_mode=AccumulationMode.DISCARDING,
                )
                | f"Count{name}" >> beam.ParDo(fold).with_output_types(tuple[str, tuple[int, int]])
            )
        return (
            counts
            | "Flatten" >> beam.Flatten()
            | "Sum" >> beam.CombinePerKey(beam.combiners.TupleCombineFn(sum, sum))
            | "Judge" >> beam.ParDo(_Judge(self.max_fraction)).with_output_types(dict[str, Any])
        )


@dataclass(frozen=True)
class _RowCounter:
    """Counts scored records (place 0) or dead letters (place 1); a letter of unknown number counts as one.

    What is refused where it is to be written was scored before: it counts as a dead letter only.
    """

    place: int

    def read(self, elements: Sequence[Any], event_times: Sequence[int]) -> Iterator[tuple[None, tuple[int, int]]]:
        values = [element[1] if is_keyed(element) else element for element in elements]
        if self.place:
            refused = (letters.filter(pc.equal(letters["stage"], "write")) for letters in values)
            yield None, (-sum(map(num_records, refused)), sum(map(num_records, values)))
        else:
            yield None, (sum(value.num_rows if isinstance(value, pa.Table) else 1 for value in values), 0)


class _CountFold(Fold):
    def create(self) -> tuple[int, int]:
        return 0, 0

    def add(self, accumulator: tuple[int, int], batch: tuple[int, int]) -> tuple[int, int]:
        return accumulator[0] + batch[0], accumulator[1] + batch[1]


class _Judge(beam.DoFn):
    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._alerts = Metrics.counter(NAMESPACE, "dead_letter_alerts")

    def process(
        self, element: tuple[str, tuple[int, int]], window: Any = beam.DoFn.WindowParam
    ) -> Iterator[dict[str, Any]]:
        _, (num_scored, num_dead_letters) = element
        num_scored = max(num_scored, 0)  # letters of one table have one time, be it in the window of its first row
        if num_dead_letters <= self._max_fraction * (num_scored + num_dead_letters):
            return
        alert = {
            **bounds(window),
            "num_scored": num_scored,
            "num_dead_letters": num_dead_letters,
            "fraction": num_dead_letters / (num_scored + num_dead_letters),
            "max_fraction": self._max_fraction,
        }
        self._alerts.inc()
        logger.warning(
            "dead letters: %(num_dead_letters)d beside %(num_scored)d scored records from %(window_start)s to "
            "%(window_end)s, more than a share of %(max_fraction)g",
            alert,
        )
        yield alert
