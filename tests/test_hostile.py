"""What bad input gets, at three doors: `fit`, `Bundle.score` (or `score_files`), and the Beam job.

Every case ends in finite scores for all rows, or in an error that names the column or file, what was
wanted and what came; in the job also in dead letters, and records in = scored + dead letters.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import beam_vae
from pipeline.records import MAX_LINE_BYTES, parse_json_lines
from pipeline.run import DeadLetterLimitError, run
from vae_model import TrainingConfig, VAEConfig, fit, load_bundle
from vae_model.batch import score_files
from vae_model.bundle import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, BundleError
from vae_model.tables import RecordError

CONFIG = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=1, views=("standard", "quantile"))
QUICK = TrainingConfig(max_steps=10, calibration_fraction=0.2)
NUM_ROWS = 30
NAMES = [
    "",
    " ",
    "a b",
    "a",
    "a.b",
    ".",
    "größe 日本 😀",
    "`tick`",
    'it\'s "quoted"',
    "{0}{x!r}",
    "a/b",
    "../up",
    "line\nbreak",
    "tab\t",
    "%s%d",
    "a,b",
    "\\",
    "[red]x[/red]",
    "<script>alert(1)</script>",
    "__proto__",
    "kl",
    "label",
    "row",
    "present",
    "n" * 5000,
]


def job(input: Any, bundle_uri: str, place: Path, *more: str) -> Any:
    """Runs the job on files; any share of dead letters is fine. Its account has to add up."""
    flags = [f"--input={input}", f"--output={place}/out", f"--bundle={bundle_uri}", "--runner=FnApiRunner"]
    summary = run([*flags, "--max_dead_letter_fraction=1", *more])
    assert summary.num_records == summary.num_scored + summary.num_dead_letters
    return summary


def finite(scored: pa.Table, num_rows: int) -> bool:
    scores = scored.column("anomaly_score").to_numpy()
    return len(scores) == num_rows and bool(np.isfinite(scores).all())


# ---- tables to score ----------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A change to 30 good rows.

    Args:
        change: To the table.
        refused: What the error says, in Python and before the job starts.
        bad_rows: Rows that are dead letters in the job and `RecordError`s, told by `error`, in Python.
        error: See there.
        in_job: Whether the job may make a difference, so that one is run.
    """

    change: Callable[[pa.Table], pa.Table]
    refused: str | None = None
    bad_rows: int = 0
    error: str = ""
    in_job: bool = True


def put(name: str, cells: Any, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Replaces a column: the cells given, then those that are there."""

    def change(table: pa.Table) -> pa.Table:
        there = table.column(name)
        new = cells if isinstance(cells, pa.Array) else pa.array(cells, kind)
        if len(new) < len(there):
            new = pa.concat_arrays([new, there.combine_chunks()[len(new) :].cast(new.type)])
        return table.set_column(table.column_names.index(name), name, new)

    return change


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: put(name, table.column(name).combine_chunks().cast(kind, safe=False))(table)


def add(name: str, cell: Any, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.append_column(name, pa.array([cell] * table.num_rows, kind))


INFINITE = "length: expected a finite number, got an infinite one"
CASES = {
    # how many
    "no rows": Case(lambda table: table.slice(0, 0)),
    "one row": Case(lambda table: table.slice(0, 1), in_job=False),
    # numbers
    "a constant column": Case(put("length", [10.0] * NUM_ROWS), in_job=False),
    "an all-null column": Case(put("length", [None] * NUM_ROWS, pa.float64())),
    "an all-null column without a type": Case(put("length", pa.nulls(NUM_ROWS))),
    "every column null": Case(lambda table: pa.table([pa.nulls(NUM_ROWS, f.type) for f in table.schema], table.schema)),
    "NaN": Case(put("length", [float("nan")] * NUM_ROWS), in_job=False),
    "infinity": Case(put("length", [np.inf]), bad_rows=1, error=INFINITE),
    "minus infinity": Case(put("length", [-np.inf, 1.0, -np.inf]), bad_rows=2, error=INFINITE),
    "infinity as text": Case(put("length", ["inf", "-Infinity", "1e999"]), bad_rows=3, error=INFINITE),
    "1e300": Case(put("length", [1e300, -1e300, 1.79e308, -1.79e308])),
    "denormals": Case(put("length", [5e-324, -5e-324, 1e-310])),
    "float16": Case(cast("length", pa.float16())),
    "uint64": Case(put("count", [2**64 - 1] * NUM_ROWS, pa.uint64())),
    "the least int64": Case(put("count", [-(2**63)] * NUM_ROWS)),
    "decimals": Case(put("length", [decimal.Decimal("10.50")] * NUM_ROWS)),
    "decimals beyond 64 bits": Case(put("length", [decimal.Decimal("1e60")] * NUM_ROWS, pa.decimal256(76, 2))),
    "truth values for numbers": Case(put("length", [True] * NUM_ROWS), in_job=False),
    "a dictionary of numbers": Case(
        lambda t: put("length", t["length"].combine_chunks().dictionary_encode())(t), in_job=False
    ),
    "text that spells numbers": Case(put("length", ["10.5", " 7 ", "1e1", "NA", ""])),
    "text that does not": Case(
        put("length", ["tall", "1,5", "0x10"]), bad_rows=3, error="length: expected a number, got 'tall'"
    ),
    # types that are not the column's
    "binary for numbers": Case(put("length", [b"x"] * NUM_ROWS), "length: expected double, got binary"),
    "a list for numbers": Case(put("length", [[1.0]] * NUM_ROWS), "length: expected double, got list<"),
    "a struct for numbers": Case(put("length", [{"a": 1.0}] * NUM_ROWS), "length: expected double, got struct<"),
    "a map for numbers": Case(
        put("length", [[("a", 1.0)]] * NUM_ROWS, pa.map_(pa.string(), pa.float64())),
        "length: expected double, got map<",
    ),
    "times for numbers": Case(
        put("length", [datetime.datetime(2025, 1, 1)] * NUM_ROWS), r"length: expected double, got timestamp\[us\]"
    ),
    "an extension type of numbers": Case(
        put("length", pa.ExtensionArray.from_storage(pa.opaque(pa.float64(), "t", "v"), pa.array([1.0] * NUM_ROWS)))
    ),
    "numbers for times": Case(put("seen_at", [1.0] * NUM_ROWS), r"seen_at: expected timestamp\[us\], got double"),
    "durations for times": Case(
        put("seen_at", [1] * NUM_ROWS, pa.duration("us")), r"seen_at: expected timestamp\[us\], got duration\[us\]"
    ),
    "a list for levels": Case(put("color", [["red"]] * NUM_ROWS), "color: expected string, got list<"),
    # times
    "times with a zone": Case(cast("seen_at", pa.timestamp("us", "Asia/Kathmandu"))),
    "times with a zone that nobody knows": Case(
        put("seen_at", [0] * NUM_ROWS, pa.timestamp("us", "No/Where")),
        r"seen_at: expected timestamp\[us\], got timestamp\[us, tz=No/Where\]",
    ),
    "the first and last times": Case(put("seen_at", [2**63 - 1, -(2**63)], pa.timestamp("us"))),
    "nanoseconds": Case(cast("seen_at", pa.timestamp("ns")), in_job=False),
    "dates": Case(cast("seen_at", pa.date32())),
    "text that spells no time": Case(
        lambda table: put("seen_at", ["noon"])(cast("seen_at", pa.string())(table)),
        bad_rows=1,
        error="seen_at: expected a time, got 'noon'",
    ),
    # levels
    "a dictionary": Case(lambda t: put("color", t["color"].combine_chunks().dictionary_encode())(t), in_job=False),
    "large_string": Case(cast("color", pa.large_string())),
    "string_view": Case(cast("color", pa.string_view())),
    "levels never seen": Case(put("color", ["puce", "", "\x00", "😀", "x" * 1_000_000])),
    "bytes that are no text": Case(put("color", [b"\xff\xfe"] * NUM_ROWS)),
    "numbers for levels": Case(put("color", [5] * NUM_ROWS), in_job=False),
    # columns
    "a missing column": Case(lambda t: t.drop_columns(["length"]), "length: expected one such column, got none"),
    "names in capitals": Case(
        lambda t: t.rename_columns([name.upper() for name in t.column_names]),
        "length: expected one such column, got none; weight: expected one such column, got none",
    ),
    "no columns at all": Case(
        lambda table: pa.table({"other": [1] * NUM_ROWS}), "length: expected one such column, got none"
    ),
    "an extra column": Case(add("more", 1)),
    "an extra nested column": Case(add("more", {"a": [{"b": None}, {"b": 2**63 - 1}]})),
    "columns in another order": Case(lambda table: table.select(table.column_names[::-1]), in_job=False),
    "a column named as a score is": Case(
        add("anomaly_score", 1.0), "anomaly_score: the input has such a column already; choose a prefix"
    ),
    "a column named label": Case(add("label", 1), in_job=False),
}


@pytest.fixture(scope="module")
def rows(make_table) -> pa.Table:
    return make_table(NUM_ROWS, seed=9)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_python_scores_every_row_or_says_which_do_not_fit(bundle, rows, case):
    table = case.change(rows)
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            bundle.score(table)
        return
    if case.bad_rows:
        with pytest.raises(RecordError, match=f"^{case.bad_rows} of {NUM_ROWS} rows do not fit: {case.error}"):
            bundle.score(table)
    scored, rejects = bundle.score(table, errors="split")
    assert len(rejects) == case.bad_rows
    assert finite(scored, table.num_rows - case.bad_rows)
    explained, _ = bundle.split(table, reasons=3)
    assert explained["anomaly_score"].equals(scored["anomaly_score"])


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.in_job])
def test_the_job_scores_every_record_or_sets_it_aside_or_does_not_start(bundle_uri, rows, tmp_path, case):
    table = case.change(rows)
    pq.write_table(table, tmp_path / "in.parquet")
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            job(tmp_path / "in.parquet", bundle_uri, tmp_path)
        assert not (tmp_path / "out").exists()
        return
    summary = job(tmp_path / "in.parquet", bundle_uri, tmp_path, "--reasons=1")
    assert (summary.num_records, summary.num_dead_letters) == (table.num_rows, case.bad_rows)
    assert finite(pq.read_table(tmp_path / "out"), table.num_rows - case.bad_rows)
    errors = pq.read_table(tmp_path / "out/_dead_letters")["error"].to_pylist()
    assert all(re.match(case.error, error) or case.error == INFINITE for error in errors)


def test_a_table_without_columns_is_refused(bundle):
    for nothing in (pa.table({}), pd.DataFrame(index=range(3))):
        with pytest.raises(RecordError, match=r"length: expected one such column, got none; .*has no columns"):
            bundle.score(nothing, errors="split")


def test_a_repeated_column_is_told_at_each_door(bundle, bundle_uri, rows, tmp_path):
    table = rows.append_column("length", rows["length"])
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(RecordError, match="length: expected one such column, got 2"):
        bundle.score(table)
    for door in (
        lambda: fit(table),
        lambda: fit(str(tmp_path / "in.parquet")),
        lambda: score_files(bundle, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")),
    ):
        with pytest.raises(RecordError, match=r"length: expected each column once, .* has it twice"):
            door()
    assert job(tmp_path / "in.parquet", bundle_uri, tmp_path).reasons == {"duplicate_column": NUM_ROWS}


# ---- tables to learn from -------------------------------------------------------------------------

LEARNED = 200


def _columns() -> dict[str, tuple[str, pa.Array]]:
    """Columns that `fit` takes, each with what becomes of it: its kind, or words of why it is only carried."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=LEARNED)
    whole = rng.integers(0, 2**40, LEARNED)

    def odd(*cells: float) -> pa.Array:
        return pa.array([*cells, *normal[len(cells) :]])

    def two(*levels: Any, kind: pa.DataType | None = None) -> pa.Array:
        return pa.array([levels[i] for i in rng.integers(0, len(levels), LEARNED)], kind)

    half = LEARNED // 2
    return {
        "plain": ("numeric", pa.array(normal)),
        "constant": ("constant", pa.array([3.0] * LEARNED)),
        "null": ("constant", pa.nulls(LEARNED)),
        "null float": ("constant", pa.nulls(LEARNED, pa.float64())),
        "null text": ("constant", pa.nulls(LEARNED, pa.string())),
        "null time": ("its times cover no whole day", pa.nulls(LEARNED, pa.timestamp("us"))),
        "NaN": ("constant", pa.array([float("nan")] * LEARNED)),
        "one value": ("constant", pa.array([None] * (LEARNED - 1) + [5.0])),
        "a few 1e308": ("numeric", odd(1e300, -1e308, 1.79e308)),
        "all 1e300": ("numeric", pa.array(1e300 * normal)),
        "1e308 and -1e308": ("numeric", two(1e308, -1e308)),
        "1e-305": ("numeric", pa.array(1e-305 * normal)),
        "denormals": ("constant", pa.array(1e-310 * normal)),
        "uint64": ("numeric", pa.array(whole.astype(np.uint64) * np.uint64(2**23))),
        "int64": ("numeric", two(-(2**63), 2**63 - 1, 0)),
        "float16": ("numeric", pa.array(normal.astype(np.float16))),
        "decimal": ("numeric", pa.array([decimal.Decimal(f"{v:.3f}") for v in normal])),
        "decimal256": ("numeric", pa.array([decimal.Decimal(int(v)).scaleb(30) for v in whole], pa.decimal256(76, 0))),
        "duration": ("numeric", pa.array(whole % 10**9).cast(pa.duration("ns"))),
        "dictionary of numbers": ("numeric", pa.array(whole % 5).dictionary_encode()),
        "zoned": ("timestamp", pa.array(whole * 1000).cast(pa.timestamp("us", "Asia/Kathmandu"))),
        "nanoseconds": ("timestamp", pa.array(whole * 10**6).cast(pa.timestamp("ns"))),
        "first and last time": ("timestamp", pa.array(np.r_[2**63 - 1, -(2**63), whole[2:]]).cast(pa.timestamp("us"))),
        "date": ("timestamp", pa.array((whole % 20_000).astype(np.int32)).cast(pa.date32())),
        "clock": ("timestamp", pa.array(whole % 86_400 * 10**6).cast(pa.time64("us"))),
        "dictionary": ("categorical", two("a", "b").dictionary_encode()),
        "large_string": ("categorical", two("a", "b", kind=pa.large_string())),
        "string_view": ("categorical", two("a", "b").cast(pa.string_view())),
        "bool": ("categorical", two(True, False)),
        "NUL in text": ("categorical", two("a\x00b", "a", "")),
        "long text": ("categorical", two("x" * 100_000, "y")),
        "empty or null": ("constant", pa.array(["", None] * half)),
        "ids": ("nearly every row has its own value", pa.array([f"id-{i}" for i in range(LEARNED)])),
        "counter": ("moves one way", pa.array(range(LEARNED))),
        "binary": ("binary is not read", pa.array([b"\xff"] * LEARNED)),
        "list": ("int64> is not read", pa.array([[1]] * LEARNED)),
        "struct": ("struct<a: int64> is not read", pa.array([{"a": 1}] * LEARNED)),
        "map": ("map<string, int64", pa.array([[("k", 1)]] * LEARNED, pa.map_(pa.string(), pa.int64()))),
        "uuid": ("extension<arrow.uuid> is not read", pa.array([bytes(16)] * LEARNED, pa.uuid())),
    } | {name: ("numeric", pa.array(normal + rng.normal(size=LEARNED))) for name in NAMES}


COLUMNS = _columns()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> tuple[pa.Table, str, str]:
    """All those columns in one table, its Parquet file, and a bundle that was fit on the file."""
    place = tmp_path_factory.mktemp("zoo")
    table = pa.table({name: column for name, (_, column) in COLUMNS.items()})
    pq.write_table(table, place / "zoo.parquet")
    fit(str(place / "zoo.parquet"), CONFIG, QUICK, output=str(place / "bundle"))
    return table, str(place / "zoo.parquet"), str(place / "bundle")


@pytest.mark.parametrize("name", COLUMNS, ids=lambda name: repr(name)[:30])
def test_a_column_is_read_or_carried_with_the_reason(zoo, name):
    schema = load_bundle(zoo[2]).schema
    expected, _ = COLUMNS[name]
    kinds = {feature.name: feature.kind for feature in schema.features}
    assert kinds.get(name) == expected or expected in schema.passthrough.get(name, "")


def test_strange_columns_and_names_score_the_same_at_each_door(zoo, tmp_path, capsys):
    table, path, uri = zoo
    bundle = load_bundle(uri)
    bundle.verify()
    scored = bundle.score(table, reasons=len(COLUMNS))
    assert finite(scored, LEARNED)
    named = {reason["feature"] for row in scored["anomaly_reasons"].to_pylist() for reason in row}
    assert named == set(bundle.schema.names) >= set(NAMES)
    score_files(bundle, path, str(tmp_path / "alone.parquet"))
    job(path, uri, tmp_path)
    for found in (pq.read_table(tmp_path / "alone.parquet"), pq.read_table(tmp_path / "out")):
        assert found.column_names == scored.drop_columns(["anomaly_reasons"]).column_names
        np.testing.assert_allclose(found["anomaly_score"], scored["anomaly_score"], rtol=1e-3, atol=0.05)
    assert beam_vae.main(["inspect", uri]) == 0
    assert "[red]x[/red]" in capsys.readouterr().out
    assert "<script>alert" not in (Path(uri) / "report.html").read_text()


@pytest.mark.parametrize("file_format", ["csv", "jsonl"])
def test_strange_names_come_out_of_text_as_they_went_in(bundle_uri, rows, tmp_path, file_format):
    names = [name for name in NAMES if name not in rows.column_names]
    frame = rows.to_pandas().assign(**dict.fromkeys(names, "cell"))
    if file_format == "csv":
        frame.to_csv(tmp_path / "in.csv", index=False)
    else:
        lines = [json.dumps(row, default=str) for row in frame.to_dict("records")]
        (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert job(tmp_path / f"in.{file_format}", bundle_uri, tmp_path).num_scored == NUM_ROWS
    (written,) = (tmp_path / "out").glob("scored*")
    found = (
        pd.read_csv(written, keep_default_na=False)
        if file_format == "csv"
        else pd.DataFrame([json.loads(line) for line in written.read_text().splitlines()])
    )
    header = ["" if name.startswith("Unnamed: ") else name for name in found.columns]  # as pandas calls ""
    assert header[: len(frame.columns)] == list(frame.columns)
    assert set(found[names[3]]) == {"cell"}


TEACHES_NOTHING = {
    "no rows": (pa.table({"x": pa.array([], pa.float64())}), "expected at least 20 rows to learn from, got 0"),
    "one row": (pa.table({"x": [1.0]}), "expected at least 20 rows to learn from, got 1"),
    "no columns": (pa.table({}), "expected at least 20 rows to learn from, got 0"),
    "one constant column": (pa.table({"x": [1.0] * 50}), "expected a column that varies, got 1 constant"),
    "nulls only": (pa.table({"x": pa.nulls(50), "y": pa.nulls(50, pa.string())}), "expected a column that varies"),
    "nested columns only": (
        pa.table({"x": [[1]] * 50, "y": [{"a": 1}] * 50}),
        "expected a column that varies, got 0 .*x: list<.*: int64> is not read; y: struct<a: int64> is not read",
    ),
    "infinity": (
        pa.table({"x": [0.5, 1.5] * 25, "y": [1.0] * 49 + [-np.inf]}),
        "y: expected finite numbers, got 1 infinite, the first in row 49",
    ),
    "a zone that nobody knows": (
        pa.table({"x": [0.5, 1.5] * 25, "t": pa.array([0] * 50, pa.timestamp("us", "No/Where"))}),
        "t: expected times, got .*No/Where",
    ),
    "a column named as a score is": (
        pa.table({"x": [0.5, 1.5] * 25, "anomaly_score": [1.0, 2.0] * 25}),
        "anomaly_score: the input has such a column already",
    ),
}


@pytest.mark.parametrize(("table", "message"), TEACHES_NOTHING.values(), ids=TEACHES_NOTHING)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_that_teaches_nothing_is_refused(tmp_path, table, message, in_memory):
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=message):
        fit(table if in_memory else str(tmp_path / "in.parquet"), CONFIG, QUICK)


def test_one_column_is_enough():
    table = pa.table({"x": np.random.default_rng(0).normal(size=200)})
    assert finite(fit(table, CONFIG, QUICK).score(table), 200)


@pytest.mark.parametrize("kind", ["levels", "times", "nulls", "numbers"])
def test_columns_of_one_kind_alone_are_learned_explained_and_scored_by_the_job(kind, tmp_path):
    rng, n = np.random.default_rng(0), 1000
    day = np.datetime64("2026-01-01", "us") + rng.normal(720, 60, n).astype("timedelta64[m]")
    columns = {
        "levels": np.array(["a", "b", "c"])[rng.integers(0, 3, n)],
        "times": day,
        "nulls": pa.array(["same"] * n, mask=rng.random(n) < 0.5),
        "numbers": rng.normal(size=n),
    }
    table = pa.table({"x": columns[kind], "y": columns[kind]})
    fit(table, CONFIG, QUICK, output=str(tmp_path / "bundle"))
    trained = load_bundle(str(tmp_path / "bundle"))
    trained.verify()
    scored = trained.score(table, reasons=2)
    assert np.isfinite(scored["anomaly_score"].to_numpy()).all()
    assert {reason["feature"] for reason in scored["anomaly_reasons"][0].as_py()} <= {"x", "y"}
    pq.write_table(table, tmp_path / "in.parquet")
    flags = {"input": tmp_path / "in.parquet", "output": tmp_path / "out", "bundle": tmp_path / "bundle", "reasons": 2}
    summary = run([*(f"--{name}={value}" for name, value in flags.items()), "--runner=FnApiRunner"])
    assert (summary.num_records, summary.num_scored) == (n, n)


def test_three_thousand_columns_are_learned_and_scored():
    rng = np.random.default_rng(0)
    table = pa.table({f"x{i}": rng.normal(size=100) for i in range(3000)})
    bundle = fit(table, VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=1, views=("standard",)), QUICK)
    assert len(bundle.schema.features) == 3000
    assert finite(bundle.score(table), 100)


def test_a_million_levels_are_learned_and_scored():
    rng = np.random.default_rng(0)
    # Frequent levels among them, so that the column is worth reading; the sketch keeps the names of 65,536.
    levels = np.r_[np.arange(1_000_000), rng.integers(0, 50, 1_200_000)]
    table = pa.table({"c": pa.array(rng.permutation(levels)).cast(pa.string()), "x": rng.normal(size=len(levels))})
    bundle = fit(table, CONFIG, QUICK)
    (feature,) = (feature for feature in bundle.schema.features if feature.name == "c")
    assert feature.kind == "categorical"
    assert len(feature.levels) <= 65_536
    assert set(feature.levels[:50]) == {str(i) for i in range(50)}
    assert finite(bundle.score(table.slice(0, 1000)), 1000)
    assert finite(bundle.score(pa.table({"c": ["never seen"], "x": [0.0]})), 1)


# ---- files that others wrote ----------------------------------------------------------------------


def _by_duckdb(path: Path) -> None:
    duckdb.execute(
        f"""
        COPY (SELECT (i % 200)::UTINYINT u8, (hash(i) // 2)::UBIGINT u64, (i * 17 % 100)::HUGEINT huge, sin(i) x,
            (sin(i) * 10)::DECIMAL(18, 3) dec, (i % 3)::VARCHAR s,
            CASE i % 3 WHEN 0 THEN 'a' ELSE 'b' END::ENUM('a', 'b') e,
            i % 2 = 0 b, TIMESTAMPTZ '2025-01-01 00:00:00+00' + to_hours(i * 37 % 8000) tz,
            DATE '2025-01-01' + (i * 5 % 360)::INT d, TIME '00:00:00' + to_minutes(i * 7 % 1440) t, uuid() id,
            [i] l, {{'a': i}} st, MAP {{'k': i}} m, 'x'::BLOB bin, INTERVAL (i) DAY iv, NULL n
        FROM range({LEARNED}) r(i)) TO '{path}' (ROW_GROUP_SIZE 128)"""
    )


def _by_polars(path: Path) -> None:
    start, hours = datetime.datetime(2025, 1, 1), range(LEARNED)
    pl.DataFrame(
        {
            "u64": pl.Series([i * 7919 % 1000 for i in hours], dtype=pl.UInt64),
            "x": np.sin(np.arange(LEARNED)),
            "dec": [decimal.Decimal(i * 37 % 101) / 4 for i in hours],
            "cat": pl.Series(["a", "b"] * (LEARNED // 2), dtype=pl.Categorical),
            "enum": pl.Series(["a", "b"] * (LEARNED // 2), dtype=pl.Enum(["a", "b"])),
            "tz": pl.Series([start + datetime.timedelta(hours=i * 37 % 8000) for i in hours]).dt.replace_time_zone(
                "UTC"
            ),
            "dur": [datetime.timedelta(seconds=i * 7 % 100) for i in hours],
            "clock": [datetime.time(i * 7 % 24) for i in hours],
            "list": [[i] for i in hours],
            "struct": [{"a": i} for i in hours],
            "array": pl.Series([[1, 2]] * LEARNED, dtype=pl.Array(pl.Int64, 2)),
            "bin": [b"x"] * LEARNED,
            "null": [None] * LEARNED,
        }
    ).write_parquet(path)


def _by_pandas(path: Path) -> None:
    index = pd.Index([f"r{i}" for i in range(LEARNED)], name="a row's name")
    pd.DataFrame(
        {
            "Int8": pd.array([i % 7 if i % 5 else None for i in range(LEARNED)], "Int8"),
            "x": np.sin(np.arange(LEARNED)),
            "cat": pd.Categorical(["a", "b"] * (LEARNED // 2)),
            "text": pd.array(["a", None] * (LEARNED // 2), "string"),
            "flag": pd.array([True, None] * (LEARNED // 2), "boolean"),
            "tz": pd.to_datetime(np.arange(LEARNED) * 37 % 8000, unit="h", utc=True).tz_convert("America/Lima"),
            "dur": pd.to_timedelta(np.arange(LEARNED) * 7 % 100, unit="s"),
            "objects": [decimal.Decimal(i * 7 % 11) for i in range(LEARNED)],
        },
        index,
    ).to_parquet(path)


@pytest.mark.parametrize("write", [_by_duckdb, _by_polars, _by_pandas])
def test_files_of_other_libraries_are_learned_and_scored_at_each_door(tmp_path, write):
    write(tmp_path / "in.parquet")
    schema = pq.read_schema(tmp_path / "in.parquet")
    uri = str(tmp_path / "bundle")
    bundle = fit(str(tmp_path / "in.parquet"), CONFIG, QUICK, output=uri)
    assert set(bundle.schema.names) | set(bundle.schema.passthrough) == set(schema.names)
    assert len(bundle.schema.names) >= 7
    score_files(bundle, str(tmp_path / "in.parquet"), str(tmp_path / "alone.parquet"))
    job(tmp_path / "in.parquet", uri, tmp_path)
    for place in ("alone.parquet", "out"):
        scored = pq.read_table(tmp_path / place)
        assert finite(scored, LEARNED)
        assert set(schema.names) < set(scored.column_names)


def test_a_type_that_arrow_cannot_read_is_told_by_its_file(bundle, bundle_uri, rows, tmp_path):
    (tmp_path / "in").mkdir()
    pl.DataFrame({"x": pl.Series([1], dtype=pl.Int128)}).write_parquet(tmp_path / "in" / "wide.parquet")
    pq.write_table(rows, tmp_path / "in" / "good.parquet")
    for door in (
        lambda: fit(str(tmp_path / "in")),
        lambda: score_files(bundle, str(tmp_path / "in"), str(tmp_path / "alone.parquet")),
    ):
        with pytest.raises(RecordError, match=r"wide\.parquet: expected a Parquet file, got one .*more than 64 bits"):
            door()
    summary = job(tmp_path / "in", bundle_uri, tmp_path)
    assert (summary.num_scored, summary.num_unreadable_files) == (NUM_ROWS, 1)


# ---- files that are broken, or do not agree ---------------------------------------------------------


def _cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(bytes(content))


BROKEN = {
    "0 bytes": lambda path: path.write_bytes(b""),
    "4 bytes": lambda path: path.write_bytes(b"PAR1"),
    "truncated in the middle": lambda path: _cut(path, 0.5),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "text": lambda path: path.write_text("length,weight\n1,2\n"),
    "gzip": lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
    "a footer that lies about its length": lambda path: path.write_bytes(
        path.read_bytes()[:-8] + b"\xff\xff\xff\x7f" + b"PAR1"
    ),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_the_job_scores_the_others(bundle, bundle_uri, rows, tmp_path, breaking):
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(rows, tmp_path / "in" / f"{name}.parquet")
    breaking(tmp_path / "in" / "b.parquet")
    for door in (
        lambda: fit(str(tmp_path / "in"), CONFIG, QUICK),
        lambda: score_files(bundle, str(tmp_path / "in"), str(tmp_path / "alone.parquet")),
    ):
        with pytest.raises(RecordError, match=r"b\.parquet: expected a Parquet file, got one that cannot be read"):
            door()
    summary = job(tmp_path / "in", bundle_uri, tmp_path)
    assert (summary.num_scored, summary.num_dead_letters, summary.num_unreadable_files) == (NUM_ROWS, 1, 1)
    (letter,) = pq.read_table(tmp_path / "out/_dead_letters").to_pylist()
    assert letter["error"].startswith(f"{tmp_path}/in/b.parquet: ")


def test_damaged_pages_are_told_and_cost_their_row_group_only(bundle, bundle_uri, rows, tmp_path):
    pq.write_table(rows, tmp_path / "in.parquet", row_group_size=10, compression="none", write_page_checksum=True)
    _damage(tmp_path / "in.parquet")
    with pytest.raises(RecordError, match=r"in\.parquet: row group 0 cannot be read"):
        score_files(bundle, str(tmp_path / "in.parquet"), str(tmp_path / "alone.parquet"))
    assert not list(tmp_path.glob("alone*"))
    summary = job(tmp_path / "in.parquet", bundle_uri, tmp_path)
    assert (summary.num_scored, summary.num_dead_letters) == (20, 10)


MIXED = {
    # What the second file's column is: what `fit` and `score_files` say, and how many of its rows the job scores.
    "integers and floats": (cast("count", pa.float64()), None, NUM_ROWS),
    "uint64 beside int64": (
        put("count", [2**64 - 1] * NUM_ROWS, pa.uint64()),
        r"b\.parquet: 30 of 30 rows do not fit: count: expected int64, got 18446744073709551615",
        0,
    ),
    "text in two layouts": (cast("color", pa.large_string()), None, NUM_ROWS),
    "a column that is missing": (lambda t: t.drop_columns(["weight"]), r"weight: .*b\.parquet has no such column", 0),
    "a column more": (add("more", 1), None, NUM_ROWS),
    "text beside numbers": (
        put("length", ["tall"] * NUM_ROWS),
        r"length: expected double as in .*a\.parquet, got string in .*b\.parquet",
        0,
    ),
    "a list beside numbers": (
        put("length", [[1.0]] * NUM_ROWS),
        r"length: expected double as in .*a\.parquet, got list<.*b\.parquet",
        0,
    ),
}


@pytest.mark.parametrize(("change", "refused", "num_scored"), MIXED.values(), ids=MIXED)
def test_files_that_do_not_agree(bundle, bundle_uri, rows, tmp_path, change, refused, num_scored):
    (tmp_path / "in").mkdir()
    pq.write_table(rows, tmp_path / "in" / "a.parquet")
    pq.write_table(change(rows), tmp_path / "in" / "b.parquet")
    if refused:
        with pytest.raises(RecordError, match=refused):
            score_files(bundle, str(tmp_path / "in"), str(tmp_path / "alone.parquet"))
        with pytest.raises(RecordError, match=refused):
            fit(str(tmp_path / "in"), CONFIG, QUICK)
    else:
        assert score_files(bundle, str(tmp_path / "in"), str(tmp_path / "alone.parquet"))[0] == 2 * NUM_ROWS
    summary = job(tmp_path / "in", bundle_uri, tmp_path)
    assert (summary.num_scored, summary.num_dead_letters) == (NUM_ROWS + num_scored, NUM_ROWS - num_scored)


# ---- places that cannot be written ------------------------------------------------------------------


@pytest.fixture
def blocked(tmp_path) -> Path:
    """A place under a file, where no directory can be."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "out"


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def noise(num_rows: int) -> pa.Table:
    return pa.table({f"x{i}": np.random.default_rng(i).normal(size=num_rows) for i in range(3)})


def test_fit_tells_before_training_that_its_output_cannot_be_written(blocked, monkeypatch):
    def train(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("vae_model.training.Trainer.train", train)
    with pytest.raises(OSError, match=f"^{blocked}: cannot be written: .*Not a directory"):
        fit(noise(100), CONFIG, QUICK, output=str(blocked))


def test_score_names_an_output_that_cannot_be_written(blocked, bundle, rows, tmp_path):
    pq.write_table(rows, tmp_path / "in.parquet")
    with pytest.raises(OSError, match=f"^{blocked}: cannot be written"):
        score_files(bundle, str(tmp_path / "in.parquet"), str(blocked))


def test_the_job_names_an_output_that_cannot_be_written(blocked, bundle_uri, rows, tmp_path):
    pq.write_table(rows, tmp_path / "in.parquet")
    flags = [f"--input={tmp_path}/in.parquet", f"--bundle={bundle_uri}", f"--output={blocked}"]
    with pytest.raises(Exception, match=re.escape(str(tmp_path / "file"))):
        run([*flags, "--runner=FnApiRunner"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_told_by_its_place_and_leaves_nothing(small_disk, bundle, tmp_path, make_table):
    table = make_table(20_000, 3)
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(OSError, match=f"^{small_disk}/scored.parquet: cannot be written: .*No space left"):
        score_files(bundle, str(tmp_path / "in.parquet"), str(small_disk / "scored.parquet"))
    with pytest.raises(OSError, match=f"^{small_disk}/bundle: cannot be written: .*No space left"):
        bundle.save(str(small_disk / "bundle"))
    with pytest.raises(OSError, match=r"^.*/disk/fit.*: cannot be written: .*No space left"):
        fit(table, VAEConfig(), TrainingConfig(max_steps=2), output=str(small_disk / "fit"))
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_fails_the_job(small_disk, bundle_uri, tmp_path, make_table):
    pq.write_table(make_table(20_000, 3), tmp_path / "in.parquet")
    with pytest.raises(Exception, match="No space left"):
        job(tmp_path / "in.parquet", bundle_uri, small_disk)
    assert not list(small_disk.glob("out/scored*"))


# ---- bundles ----------------------------------------------------------------------------------------

SCORING = ["schema.json", "model.json", "weights.npz", "noise.npy", "calibration.json", "calibration.npz"]


def forge(directory: Path, name: str, content: bytes) -> None:
    """Replaces a file and its hash, as somebody who knows the format would."""
    (directory / name).write_bytes(content)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    digests = b"".join(bytes.fromhex(manifest["sha256"][name]) for name in SCORING)
    manifest["model_version"] = hashlib.sha256(digests).hexdigest()[:12]
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy(bundle_uri, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_uri, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "limit"),
    [("manifest.json", MAX_MANIFEST_BYTES), ("schema.json", MAX_FILE_BYTES), ("weights.npz", MAX_FILE_BYTES)],
)
def test_a_bundle_file_of_a_gigabyte_is_refused_unread(copy, name, limit):
    os.truncate(copy / name, 10**9)  # sparse: it takes no room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        BundleError, match=rf"copy: {name} cannot be read: expected at most {limit:,} bytes, got 1,000,000,000"
    ):
        load_bundle(str(copy))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_directory_in_the_place_of_a_file_is_refused(copy):
    (copy / "noise.npy").unlink()
    (copy / "noise.npy").mkdir()
    with pytest.raises(BundleError, match=r"copy: noise\.npy cannot be read"):
        load_bundle(str(copy))


def test_a_manifest_nested_too_deep_is_refused(copy):
    (copy / "manifest.json").write_bytes(b"[" * 200_000)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON"):
        load_bundle(str(copy))


def test_an_array_that_unpacks_to_much_more_is_refused(copy):
    bomb = io.BytesIO()
    np.savez_compressed(bomb, zeros=np.zeros(1 << 24))
    assert len(bomb.getvalue()) < 1 << 18  # of 128 MiB
    forge(copy, "weights.npz", bomb.getvalue())
    with pytest.raises(BundleError, match=r"weights\.npz cannot be read: .*zeros\.npy: expected an array as it is"):
        load_bundle(str(copy))


def test_golden_rows_that_unpack_to_much_more_are_refused(copy):
    bomb = io.BytesIO()
    pq.write_table(pa.table({"x": pa.nulls(10_000_000, pa.float64())}), bomb)
    assert len(bomb.getvalue()) < 1 << 16
    forge(copy, "golden.parquet", bomb.getvalue())
    with pytest.raises(BundleError, match=r"golden\.parquet cannot be read: .*expected at most 10,000 rows"):
        load_bundle(str(copy))


def test_a_keras_model_in_the_place_of_weights_runs_nothing(copy, tmp_path):
    import keras

    ran = str(tmp_path / "ran")
    layer = keras.layers.Lambda(lambda x: (open(ran, "w").close(), x)[1], output_shape=(1,))
    keras.Sequential([keras.Input((1,)), layer]).save(tmp_path / "model.keras")
    Path(ran).unlink(missing_ok=True)  # saving may have traced it
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert b"Lambda" in archive.read("config.json")
    forge(copy, "weights.npz", (tmp_path / "model.keras").read_bytes())
    with pytest.raises(BundleError, match=r"weights\.npz"):
        load_bundle(str(copy)).verify()
    assert not Path(ran).exists()


def test_a_pickle_in_the_place_of_any_file_runs_nothing(copy, bundle_uri, tmp_path):
    import pickle

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    for name in [*SCORING, "statistics.json", "golden.parquet", "card.json", "history.csv"]:
        shutil.copytree(bundle_uri, copy, dirs_exist_ok=True)
        forge(copy, name, pickle.dumps(Runs()))
        with pytest.raises(BundleError, match=f"copy: {name} cannot be read"):
            load_bundle(str(copy))
    assert not (tmp_path / "ran").exists()


def refusal_of(directory: Path) -> str | None:
    try:
        load_bundle(str(directory))
    except BundleError as error:
        return str(error)
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.data(), name=st.sampled_from([*SCORING, "statistics.json", "golden.parquet", "card.json", "history.csv"])
)
def test_a_bundle_with_bytes_changed_and_hashes_made_to_fit_loads_or_is_refused(bundle_uri, tmp_path, data, name):
    copy = Path(shutil.copytree(bundle_uri, tmp_path / "copy", dirs_exist_ok=True))
    content = bytearray((copy / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        length = data.draw(st.sampled_from([0, 1, 1, 4, 100]))
        content[at : at + length] = data.draw(st.binary(max_size=8))
    forge(copy, name, bytes(content))
    refusal = refusal_of(copy)
    assert refusal is None or name in refusal


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from([name for name in [*SCORING, "statistics.json"] if name.endswith("json")]))
def test_a_bundle_with_other_json_and_hashes_made_to_fit_loads_or_is_refused(bundle_uri, tmp_path, data, name):
    copy = Path(shutil.copytree(bundle_uri, tmp_path / "copy", dirs_exist_ok=True))
    values = json.loads((copy / name).read_bytes())
    here = values
    while isinstance(here, dict | list) and here:  # somewhere in the tree, another value
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(min(len(here), 50))))
        if not isinstance(here[key], dict | list) or data.draw(st.booleans()):
            here[key] = data.draw(JSON)
            break
        here = here[key]
    forge(copy, name, json.dumps(values).encode())
    refusal = refusal_of(copy)
    assert refusal is None or name in refusal


# ---- records as text --------------------------------------------------------------------------------

RECORDS = pa.schema(
    {
        "i": pa.int64(),
        "f": pa.float64(),
        "s": pa.string(),
        "b": pa.bool_(),
        "t": pa.timestamp("us"),
        "z": pa.timestamp("ns", "Asia/Kathmandu"),
        "d": pa.decimal128(10, 2),
        "l": pa.list_(pa.int64()),
    }
)
CELL = JSON | st.sampled_from([1e400, -0.0, 2**63, -(2**70), "1e999", "2025-02-30", "0001-01-01", "\x00", "\ud800", {}])
LINE = st.one_of(
    st.dictionaries(st.sampled_from(RECORDS.names), CELL, max_size=4).map(lambda record: json.dumps(record).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(LINE, max_size=6))
@example([b"null"])
@example([b'{"i":1}{"i":2}'])
def test_every_line_is_a_row_or_a_bad_line(lines):
    block = b"\n".join(lines)
    parsed = parse_json_lines(block, RECORDS)
    wanted = [line for line in lines if line.strip()]
    assert parsed.table.num_rows + len(parsed.bad_lines) == len(wanted)
    assert parsed.table.schema.names == RECORDS.names
    assert len(parsed.errors) == len(parsed.bad_lines)
    assert all(error.startswith("expected a JSON object, got ") for error in parsed.errors)
    for cells, name, error in parsed.wrong_cells:
        assert error.startswith(f"expected {RECORDS.field(name).type}, got ")
        assert parsed.table[name].take(pa.array(cells)).null_count == len(cells)


def test_a_record_of_a_gigabyte_is_a_dead_letter_and_not_held_in_memory(bundle_uri, rows, tmp_path):
    good = [json.dumps(row, default=str) for row in rows.to_pylist()]
    piece = gzip.compress(b"x" * (1 << 24))
    with (tmp_path / "in.jsonl.gz").open("wb") as file:
        file.write(gzip.compress(f'{good[0]}\n{{"color":"'.encode()))
        for _ in range(64):
            file.write(piece)  # gzip files one after another are one
        file.write(gzip.compress(b'"}\n' + "\n".join(good[1:]).encode()))
    program = (
        "import resource, sys\n"
        "from pipeline.run import run\n"
        "from vae_model.bundle import load_bundle\n"
        "load_bundle(sys.argv[-1]).verify()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s = run([f'--input={sys.argv[1]}/in.jsonl.gz', f'--output={sys.argv[1]}/out', f'--bundle={sys.argv[2]}',"
        " '--runner=FnApiRunner', '--input_format=jsonl', '--output_format=parquet'])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(s.num_scored, s.num_dead_letters, used >> 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), bundle_uri],
        check=True,
        capture_output=True,
        text=True,
        timeout=90,
    )
    num_scored, num_dead_letters, mebibytes = map(int, done.stdout.split()[-3:])
    assert (num_scored, num_dead_letters) == (NUM_ROWS, 1)
    assert mebibytes < 400
    (letter,) = pq.read_table(tmp_path / "out/_dead_letters").to_pylist()
    assert letter["error"] == "expected a JSON object, got a line of more than 16 MiB, of which this is the beginning"
    assert len(letter["payload"]) < 2000


def test_a_line_just_short_enough_is_a_record():
    line = b'{"s":"' + b"x" * (MAX_LINE_BYTES - 8) + b'"}'
    assert len(line) == MAX_LINE_BYTES
    parsed = parse_json_lines(line + b'\n{"s":"y"}\n' + line + b" ", RECORDS)
    assert [len(text) for text in parsed.table["s"].to_pylist()] == [MAX_LINE_BYTES - 8, 1]
    assert parsed.errors == ["expected a JSON object, got a line of more than 16 MiB, of which this is the beginning"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "expected a csv file with columns, got an empty one"),
        ("in.csv", b"length,weight\n", "count: expected one such column, got none"),
        ("in.csv", b'length,"weight\n1,2', "in.csv: expected a csv file"),
        ("in.jsonl", b"", "expected a jsonl file with columns, got an empty one"),
        ("in.jsonl", b"null\n[1]\n3\n", "expected a jsonl file with columns, got an empty one"),
        ("in.jsonl", b'{"length": 1}\n', "weight: expected one such column, got none"),
        ("in.jsonl.gz", b"no gzip", "in.jsonl.gz: expected a jsonl file, got one that cannot be read"),
        ("in.parquet", b"", "in.parquet: expected a parquet file, got one that cannot be read"),
        ("in.txt", b"x", "in.txt: expected file_format to be one of csv, jsonl, parquet, got None"),
    ],
)
def test_a_first_file_that_says_nothing_of_its_columns_stops_the_launch(bundle_uri, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        job(tmp_path / name, bundle_uri, tmp_path)


def test_a_job_of_bad_records_only_fails_in_words(bundle_uri, rows, tmp_path):
    pq.write_table(put("length", [np.inf] * NUM_ROWS)(rows), tmp_path / "in.parquet")
    with pytest.raises(DeadLetterLimitError, match="30 of 30 records could not be scored"):
        run([f"--input={tmp_path}/in.parquet", f"--output={tmp_path}/out", f"--bundle={bundle_uri}"])


def test_errors_of_the_command_line_are_one_line(bundle_uri, rows, tmp_path, capsys):
    (tmp_path / "empty.parquet").write_bytes(b"")
    pq.write_table(rows.slice(0, 0).append_column("y", pa.array([], pa.int8())), tmp_path / "rowless.parquet")
    pq.write_table(rows.drop_columns(["length"]), tmp_path / "short.parquet")
    out = ["--output", str(tmp_path / "out.parquet"), "--bundle", bundle_uri]
    for arguments, message in [
        (["score", "--input", str(tmp_path / "empty.parquet"), *out], "empty.parquet: expected a Parquet file"),
        (["score", "--input", str(tmp_path / "short.parquet"), *out], "length: expected one such column, got none"),
        (["score", "--input", str(tmp_path / "absent.parquet"), *out], "absent.parquet: no .parquet file matches"),
        (
            ["evaluate", "--input", str(tmp_path / "rowless.parquet"), "--bundle", bundle_uri, "--label=y"],
            "expected rows to evaluate on, got none",
        ),
        (["fit", "--input", str(tmp_path / "rowless.parquet"), "--output", str(tmp_path / "b")], "at least 20 rows"),
        (["inspect", str(tmp_path / "empty.parquet")], "no bundle there"),
    ]:
        assert beam_vae.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
