"""Why a row is strange: the columns whose NLL exceeds what is usual for them, and what was expected."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vae_model.calibration import Calibration
from vae_model.encoding import EncodedTable
from vae_model.schema import CategoricalFeature, NumericFeature, TableSchema, TimestampFeature
from vae_model.tables import as_levels

REASON_TYPE = pa.list_(
    pa.struct(
        [
            ("feature", pa.string()),
            ("nats", pa.float32()),
            ("excess_nats", pa.float32()),
            ("p_value", pa.float32()),
            ("direction", pa.string()),
            ("value", pa.string()),
            ("expected", pa.string()),
            ("low", pa.string()),
            ("high", pa.string()),
        ]
    )
)
_TEXTS = ("direction", "value", "expected", "low", "high")
_NORMAL_95 = 1.96
_WEEKDAYS = pa.array(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])
_MONTHS = pa.array(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"])


def top_features(column_nll: np.ndarray, medians: np.ndarray, k: int) -> np.ndarray:
    """`(n, k)` positions of the features with the largest excess NLL, largest first."""
    excess = column_nll - medians
    k = min(k, excess.shape[1])
    chosen = np.argpartition(-excess, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(excess, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def explain(
    table: pa.Table,
    encoded: EncodedTable,
    column_nll: np.ndarray,
    expectation: dict[str, np.ndarray],
    number_stddev: np.ndarray,
    schema: TableSchema,
    views: tuple[str, ...],
    calibration: Calibration,
    k: int,
) -> pa.Array:
    """The k strangest columns of each row, as `REASON_TYPE`.

    Args:
        table: The n rows.
        encoded: The same rows.
        column_nll: `(n, features)`, in nats.
        expectation: From `ElboScorer.expect`.
        number_stddev: From `ElboScorer.number_stddev`.
        schema: Of the features.
        views: Of the numeric features.
        calibration: Gives each column's usual NLL.
        k: Reasons per row.
    """
    n = table.num_rows
    features = top_features(column_nll, calibration.column_medians, k)
    k = features.shape[1]
    flat, rows = features.ravel(), np.repeat(np.arange(n), k)
    nats = column_nll[rows, flat]
    nullable = [feature for feature in schema.features if feature.nullable]
    texts: list[dict[str, pa.Array]] = []
    places: list[np.ndarray] = []
    for j, feature in enumerate(schema.features):
        cells = np.flatnonzero(flat == j)
        if len(cells):
            where = rows[cells]
            describe = _DESCRIBE.get(type(feature), _describe_category)
            column = table.column(feature.name).take(pa.array(where))
            text = describe(column, where, feature, encoded, expectation, number_stddev, schema, views)
            missing = encoded.inputs["present"][where, j] == 0
            text["direction"] = pc.if_else(pa.array(missing), "missing", text["direction"])
            text["value"] = pc.if_else(pa.array(missing), None, as_levels(column).combine_chunks())
            if feature.nullable:  # a value where none was expected
                logits = expectation["missing"][where, nullable.index(feature)]
                odd = pa.array(~missing & (logits > 0))
                text["direction"] = pc.if_else(odd, "present", text["direction"])
                text |= {name: pc.if_else(odd, None, text[name]) for name in ("expected", "low", "high")}
            texts.append(text)
            places.append(cells)
    back = pa.array(np.argsort(np.concatenate(places))) if places else pa.array([], pa.int64())
    merged = [
        pa.concat_arrays([text[name].cast(pa.string()) for text in texts]).take(back)
        if texts
        else pa.array([], pa.string())
        for name in _TEXTS
    ]
    struct = pa.StructArray.from_arrays(
        [
            pa.array(np.array(schema.names, object)[flat], pa.string()),
            pa.array(nats, pa.float32()),
            pa.array(nats - calibration.column_medians[flat], pa.float32()),
            pa.array(calibration.column_p_values(flat, nats), pa.float32()),
            *merged,
        ],
        fields=list(REASON_TYPE.value_type),
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, n * k + 1, k), pa.int32()), struct, type=REASON_TYPE)


def _describe_number(column, rows, feature, encoded, expectation, number_stddev, schema, views):  # type: ignore[no-untyped-def]
    # In the terms of the view that finds the value stranger.
    j, width = schema.numeric.index(feature), len(schema.numeric)
    deviations, bounds = [], []
    for v, view in enumerate(views):
        mean, stddev = expectation["mean"][rows, v * width + j], number_stddev[v * width + j]
        to_value = feature.from_quantile if view == "quantile" else feature.from_standard
        deviations.append((encoded.inputs["numbers"][rows, v * width + j] - mean) / stddev)
        bounds.append([to_value(mean + sign * _NORMAL_95 * stddev) for sign in (-1, 0, 1)])
    strangest = np.argmax(np.abs(deviations), axis=0)
    cells = np.arange(len(rows))
    direction = np.where(np.array(deviations)[strangest, cells] >= 0, "high", "low")
    low, expected, high = (np.array(bounds)[strangest, i, cells] for i in range(3))
    texts = {"low": low, "expected": expected, "high": high}
    return {"direction": pa.array(direction)} | {name: _number_text(at, feature) for name, at in texts.items()}


def _number_text(values: np.ndarray, feature: NumericFeature) -> pa.Array:
    """Four significant digits; whole numbers for a column of integers."""
    if feature.is_integer:
        return pa.array(np.round(values)).cast(pa.decimal128(38, 0), safe=False).cast(pa.string())  # uint64 fits too
    with np.errstate(divide="ignore", invalid="ignore"):
        decimals = 3 - np.floor(np.log10(np.abs(values)))
    # Powers of ten are exact up to 1e22, their inverses never.
    usual = np.abs(decimals) <= 22
    power = 10.0 ** np.abs(np.where(usual, decimals, 0))
    rounded = np.where(decimals > 0, np.round(values * power) / power, np.round(values / power) * power)
    return pa.array(np.where(usual, rounded, values)).cast(pa.string())


def _describe_category(column, rows, feature, encoded, expectation, number_stddev, schema, views):  # type: ignore[no-untyped-def]
    unseen = encoded.codes[feature.name][rows] == 0
    nothing = pa.nulls(len(rows), pa.string())
    names = pa.array(feature.class_names, pa.string())
    if feature.num_classes > 1:
        expected = names.take(pa.array(expectation["classes"][rows, schema.learned_categories.index(feature)]))
    else:
        expected = names.take(pa.array(np.full(len(rows), len(names) - 1)))
    if not feature.levels:
        expected = nothing
    direction = pa.array(np.where(unseen, "unseen", "rare"))
    return {"direction": direction, "expected": expected, "low": nothing, "high": nothing}


def _describe_time(column, rows, feature, encoded, expectation, number_stddev, schema, views):  # type: ignore[no-untyped-def]
    start = 0
    for other in schema.timestamps:
        if other is feature:
            break
        start += len(other.parts)
    words = []
    for i, part in enumerate(feature.parts):
        angle = np.arctan2(expectation["sine"][rows, start + i], expectation["cosine"][rows, start + i])
        turn = angle / (2 * np.pi) % 1
        if part == "hour":
            minutes = np.round(turn * 1440).astype(int) % 1440
            clock = np.datetime64("1970-01-01T00:00", "m") + minutes
            words.append(pc.strftime(pa.array(clock.astype("datetime64[s]")), format="%H:%M"))
        else:
            names = _WEEKDAYS if part == "weekday" else _MONTHS
            words.append(names.take(pa.array(np.round(turn * len(names)).astype(int) % len(names))))
    nothing = pa.nulls(len(rows), pa.string())
    expected = pc.binary_join_element_wise(*words, " ")
    return {"direction": pa.array(np.full(len(rows), "unusual")), "expected": expected, "low": nothing, "high": nothing}


_DESCRIBE = {NumericFeature: _describe_number, TimestampFeature: _describe_time, CategoricalFeature: _describe_category}
