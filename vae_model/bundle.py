"""The trained artefact: one directory that holds everything needed to score, and nothing that runs.

Reading a bundle loads no TensorFlow; the network is built when the first rows are scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vae_model import files
from vae_model.calibration import Calibration, Threshold
from vae_model.config import VAEConfig
from vae_model.encoding import EncodedTable, encode
from vae_model.overlap import ahead
from vae_model.pointer import Entry, Pointer, PointerError, is_pointer, read_pointer
from vae_model.reasons import REASON_TYPE, Explainer
from vae_model.report import report
from vae_model.schema import TableSchema
from vae_model.statistics import TableStatistics
from vae_model.tables import RecordError, Rejects, from_frame, rechunk, rows_at_a_time, without_views

if TYPE_CHECKING:
    from vae_model.scoring import ElboScorer, Scores

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 512 << 20  # a JSON file takes ten times that in memory; 3,000 columns need about 200 MiB
_MAX_GOLDEN_ROWS = 10_000
CHUNK_ROWS = 65_536
_SCORING_FILES = ("schema.json", "model.json", "weights.npz", "noise.npy", "calibration.json", "calibration.npz")
_OTHER_FILES = ("statistics.json", "golden.parquet", "card.json", "history.csv", "report.html")


class BundleError(ValueError):
    """A directory is not a bundle that this version can use."""


class ScoredTable(NamedTuple):
    """Rows with their scores, and the rows that could not be scored."""

    scored: pa.Table
    rejects: Rejects


def score_fields(reasons: int = 0, prefix: str = "") -> list[pa.Field]:
    """The columns that scoring adds to a table."""
    fields = [
        pa.field(f"{prefix}anomaly_score", pa.float32()),
        pa.field(f"{prefix}anomaly_p_value", pa.float32()),
        pa.field(f"{prefix}is_anomaly", pa.bool_()),
        pa.field(f"{prefix}model_version", pa.string()),
    ]
    if reasons:
        fields.insert(3, pa.field(f"{prefix}anomaly_reasons", REASON_TYPE))
    return fields


def refuse_output(uri: str, overwrite: bool) -> None:
    """Raises `FileExistsError` where no bundle may be written: over anything, or over what is no bundle."""
    if is_pointer(uri):
        raise ValueError(f"{uri}: expected a directory for a bundle, got the name of a pointer, which ends in .json")
    if not files.exists(uri):
        return
    if not overwrite:
        raise FileExistsError(f"{uri}: already exists; choose another place or overwrite it on purpose")
    try:
        read_manifest(uri)
    except BundleError as error:
        raise FileExistsError(f"{uri}: is not a bundle, so it will not be overwritten ({error})") from error


def refuse_clash(names: Iterable[str], reasons: int = 0, prefix: str = "") -> None:
    """Raises `ValueError` where an input column has the name of a score column."""
    clash = {item.name for item in score_fields(reasons, prefix)} & set(names)
    if clash:
        raise ValueError(f"{sorted(clash)[0]}: the input has such a column already; choose a prefix for the scores")


@dataclass
class Bundle:
    """A trained model and all that scoring needs. See `fit` and `load_bundle`.

    Args:
        schema: The features.
        config: The network's.
        weights: By path.
        noise: `(samples, latent_dim)` float32.
        calibration: Of the scores.
        threshold: Above which a row is labelled an anomaly.
        statistics: Of the training rows.
        golden: A few rows with the scores they had at training time.
        card: Where the bundle comes from: data, training summary, versions, dates.
        history: One entry per validation.
    """

    schema: TableSchema
    config: VAEConfig
    weights: dict[str, np.ndarray]
    noise: np.ndarray
    calibration: Calibration
    threshold: Threshold
    statistics: TableStatistics
    golden: pa.Table
    card: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    # ---- scoring -------------------------------------------------------------------------------

    @cached_property
    def scorer(self) -> ElboScorer:
        """The network with its weights, ready to score encoded rows."""
        from vae_model.model import build_members  # TensorFlow: here, once
        from vae_model.scoring import ElboScorer

        try:
            members = build_members(self.schema, self.config, self.weights)
        except ValueError as error:
            raise BundleError(f"weights.npz: {error}") from error
        latent_dim = members[0].encoder.outputs[0].shape[-1]
        if self.noise.ndim != 2 or self.noise.shape[1] != latent_dim:
            raise BundleError(f"noise.npy: expected shape (samples, {latent_dim}), got {self.noise.shape}")
        return ElboScorer(members, self.noise)

    @overload
    def score(
        self,
        data: pd.DataFrame,
        *,
        reasons: int = 0,
        prefix: str = "",
        threshold: float | None = None,
        errors: Literal["raise"] = "raise",
    ) -> pd.DataFrame: ...
    @overload
    def score(
        self,
        data: pa.Table | pa.RecordBatch,
        *,
        reasons: int = 0,
        prefix: str = "",
        threshold: float | None = None,
        errors: Literal["raise"] = "raise",
    ) -> pa.Table: ...
    @overload
    def score(
        self,
        data: pa.Table | pa.RecordBatch | pd.DataFrame,
        *,
        reasons: int = 0,
        prefix: str = "",
        threshold: float | None = None,
        errors: Literal["split"],
    ) -> ScoredTable: ...

    def score(self, data, *, reasons=0, prefix="", threshold=None, errors="raise"):  # type: ignore[no-untyped-def]
        """Adds score columns to every row of a table (or DataFrame, which then comes back).

        Args:
            data: Rows with at least the columns of `schema.names`.
            reasons: Strangest columns to explain per row.
            prefix: Of the score columns' names.
            threshold: Score, in nats, that replaces the bundle's.
            errors: "raise" where rows do not fit, or "split" them off: a `ScoredTable` comes back then,
                rows in = scored + rejects.

        Raises:
            RecordError: Rows do not fit; names every offending column.
            ValueError: The data has a column with the name of a score column.
        """
        if errors not in ("raise", "split"):
            raise ValueError(f"errors: expected 'raise' or 'split', got {errors!r}")
        table = _as_table(data)
        scored, rejects = self.split(table, reasons=reasons, prefix=prefix, threshold=threshold)
        if len(rejects) and errors == "raise":
            raise RecordError(self.schema.refuse(table.schema) or rejects.summary())
        if isinstance(data, pd.DataFrame):
            kept = data[rejects.keep] if len(rejects) else data
            added = scored.select([item.name for item in score_fields(reasons, prefix)]).to_pandas()
            scored = pd.concat([kept, added.set_index(kept.index)], axis=1)
        return scored if errors == "raise" else ScoredTable(scored, rejects)

    def split(
        self, table: pa.Table, *, reasons: int = 0, prefix: str = "", threshold: float | None = None
    ) -> ScoredTable:
        """`score` with errors="split", for tables."""
        if reasons < 0:
            raise ValueError(f"reasons: expected a number >= 0, got {reasons}")
        refuse_clash(table.column_names, reasons, prefix)
        if not table.num_columns:  # Arrow cannot filter it, and forgets its rows
            raise RecordError(f"{self.schema.refuse(table.schema)}; the table has no columns")
        table = without_views(table)
        parts, rejected = [], []
        size = self._chunk_rows
        chunks = (table.slice(start, size) for start in range(0, max(table.num_rows, 1), size))
        encoded = ((chunk, encode(chunk, self.schema, self.config.views)) for chunk in chunks)
        for each in ahead(encoded) if table.num_rows > size else encoded:
            columns, rejects = self._score_chunk(*each, reasons, prefix, threshold)
            parts.append(columns)
            rejected.append(rejects)
        why = Rejects.concatenate(rejected)
        kept = table if not len(why) else table.filter(pa.array(why.keep))
        for column in (added := pa.concat_tables(parts)).schema:
            kept = kept.append_column(column, added.column(column.name))
        return ScoredTable(kept, why)

    def score_tables(self, tables: Iterator[pa.Table] | Sequence[pa.Table], **options: Any) -> Iterator[ScoredTable]:
        """`split` over any number of tables, for data larger than memory."""
        for table in rechunk(tables, self._chunk_rows):
            yield self.split(table, **options)

    @property
    def _chunk_rows(self) -> int:
        return min(CHUNK_ROWS, rows_at_a_time(len(self.schema.features)))

    def _score_chunk(
        self, table: pa.Table, encoded: EncodedTable, reasons: int, prefix: str, threshold: float | None
    ) -> tuple[pa.Table, Rejects]:
        rejects = encoded.rejects
        if len(rejects):
            keep = rejects.keep
            table = table.filter(pa.array(keep))
            codes = {name: values[keep] for name, values in encoded.codes.items()}
            encoded = EncodedTable(encoded.take(keep), codes, Rejects(table.num_rows))
        scores = self.scorer.score(encoded.inputs)
        score = scores.score
        limit = np.float32(self.threshold.value if threshold is None else threshold)
        columns = [
            pa.array(score),
            pa.array(self.calibration.p_values(score), pa.float32()),
            pa.array(score >= limit),
            pa.repeat(self.model_version, len(score)),
        ]
        if reasons:
            columns.insert(3, self._explain(table, encoded, scores, reasons))
        return pa.table(columns, schema=pa.schema(score_fields(reasons, prefix))), rejects

    def _explain(self, table: pa.Table, encoded: EncodedTable, scores: Scores, reasons: int) -> pa.Array:
        expectation, stddev = self.scorer.expect(encoded.inputs), self.scorer.number_stddev
        explainer = Explainer(self.schema, self.config.views, self.calibration, stddev, table, encoded, expectation)
        return explainer.explain(scores.column_nll, reasons)

    def terms(self, data: pa.Table | pd.DataFrame) -> pd.DataFrame:
        """Each row's NLL by column and its KL, in nats: they sum to the score exactly."""
        encoded = encode(_as_table(data), self.schema, self.config.views)
        if len(encoded.rejects):
            raise RecordError(encoded.rejects.summary())
        scores = self.scorer.score(encoded.inputs)
        return pd.DataFrame(scores.column_nll, columns=self.schema.names).assign(kl=scores.kl)

    def verify(self) -> None:
        """Scores the golden rows, which also warms the network up.

        Raises:
            BundleError: A score is not what it was at training time.
        """
        names = [item.name for item in score_fields()]
        rows = self.golden.drop_columns(names)
        then = self.golden.column("anomaly_score").to_numpy()
        now = self.score(rows, reasons=1).column("anomaly_score").to_numpy()
        terms = self.terms(rows)
        tolerance = 1e-4 * (1 + terms.abs().to_numpy().sum(axis=1))
        if not (np.abs(now - then) <= tolerance).all():  # NaN too
            worst = int(np.argmax(np.abs(now - then) / tolerance))
            raise BundleError(
                f"golden row {worst} scores {now[worst]:.4f} here, expected {then[worst]:.4f} as at training time"
            )

    # ---- storage -------------------------------------------------------------------------------

    @cached_property
    def model_version(self) -> str:
        """Short hash of what scoring uses: schema, network, weights, noise, calibration."""
        return _version(self._scoring_files())

    def _scoring_files(self) -> dict[str, bytes]:
        settings = {"threshold": self.threshold.to_json(), **self.calibration.settings()}
        contents = (
            _json_bytes(self.schema.to_json()),
            _json_bytes(self.config.to_json()),
            _npz_bytes(self.weights),
            _npy_bytes(self.noise),
            _json_bytes(settings),
            _npz_bytes(self.calibration.arrays()),
        )
        return dict(zip(_SCORING_FILES, contents, strict=True))

    def save(self, uri: str, *, overwrite: bool = False) -> None:
        """Writes the bundle to a directory, local, `gs://` or `s3://`; whole or not at all."""
        golden = io.BytesIO()
        pq.write_table(self.golden, golden, compression="zstd")
        others = (
            _json_bytes(self.statistics.to_json()),
            golden.getvalue(),
            _json_bytes(self.card, indent=1),
            _csv_bytes(self.history),
            report(self).encode(),
        )
        contents = self._scoring_files() | dict(zip(_OTHER_FILES, others, strict=True))
        manifest = {
            "format": FORMAT,
            "model_version": _version(contents),
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        }
        contents[MANIFEST] = _json_bytes(manifest, indent=1)
        for name, content in contents.items():
            if len(content) > MAX_FILE_BYTES:  # nobody could load it
                raise BundleError(f"{uri}: {name}: expected at most {MAX_FILE_BYTES:,} bytes, got {len(content):,}")
        refuse_output(uri, overwrite)
        files.write_directory(uri, contents, last=MANIFEST, overwrite=overwrite)


def load_bundle(uri: str) -> Bundle:
    """Reads a bundle from a local directory, `gs://` or `s3://`, checking every file's hash.

    Nothing in a bundle is executed: JSON, arrays and Parquet only. The URI may be that of a pointer,
    a name that ends in `.json`: the bundle that it names is read then.

    Raises:
        BundleError: No bundle is there, a file is missing or was changed, or the format is newer.
    """
    if is_pointer(uri):
        try:
            pointer = read_pointer(uri)
        except PointerError as error:
            raise BundleError(str(error)) from error
        return load_entry(pointer, pointer.current)
    manifest = read_manifest(uri)
    contents = {}
    for name in (*_SCORING_FILES, *_OTHER_FILES):
        if name not in manifest["sha256"]:
            raise BundleError(f"{uri}: {MANIFEST} does not list {name}")
        try:
            contents[name] = files.read_bytes(uri, name, MAX_FILE_BYTES)
        except FileNotFoundError:
            raise BundleError(f"{uri}: {name} is missing") from None
        except (ValueError, OSError) as error:
            raise BundleError(f"{uri}: {name} cannot be read: {error}") from error
        if hashlib.sha256(contents[name]).hexdigest() != manifest["sha256"][name]:
            raise BundleError(f"{uri}: {name} was changed after it was written (its SHA-256 differs)")
    bundle = _parse(uri, contents)
    # Of the bytes as they are: another library version may write the same arrays otherwise.
    bundle.model_version = _version(contents)
    if bundle.model_version != manifest.get("model_version"):
        raise BundleError(
            f"{uri}: {MANIFEST} names version {manifest.get('model_version')}, the files are {bundle.model_version}"
        )
    return bundle


def load_entry(pointer: Pointer, entry: Entry) -> Bundle:
    """Reads a bundle that a pointer names.

    Raises:
        BundleError: As `load_bundle`, or another version is there now.
    """
    place = pointer.locate(entry)
    if is_pointer(place):
        raise BundleError(f"{pointer.uri} points to {place}: expected a bundle, got another pointer")
    try:
        bundle = load_bundle(place)
    except BundleError as error:
        raise BundleError(f"{pointer.uri} points to {error}") from error
    if bundle.model_version != entry.model_version:
        raise BundleError(
            f"{pointer.uri} points to {place}: expected version {entry.model_version}, as when it was promoted, "
            f"got {bundle.model_version}"
        )
    return bundle


def read_manifest(uri: str) -> dict[str, Any]:
    """A bundle's manifest: format, model_version, sha256 by file.

    Raises:
        BundleError: None is there, or its format is not one that this version reads.
    """
    try:
        content = files.read_bytes(uri, MANIFEST, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{uri}: no bundle there ({MANIFEST} is missing)") from None
    except (ValueError, OSError) as error:
        raise BundleError(f"{uri}: {MANIFEST} cannot be read: {error}") from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{uri}: {MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise BundleError(f"{uri}: {MANIFEST} lists no files")
    if (found := manifest.get("format")) != FORMAT:
        raise BundleError(f"{uri}: of another version of beam-vae: expected bundle format {FORMAT}, got {found!r}")
    if outside := [name for name in manifest["sha256"] if name in ("", ".", "..") or set(name) & set("/\\")]:
        raise BundleError(f"{uri}: {MANIFEST} lists {outside[0]!r}, which is no plain file name")
    return manifest


def _parse(uri: str, contents: dict[str, bytes]) -> Bundle:
    def read(name: str, parse: Callable[[Any], Any]) -> Any:
        try:
            return parse(json.loads(contents[name]) if name.endswith(".json") else contents[name])
        except Exception as error:  # whatever the parsers of NumPy, zip and Arrow raise on bytes that are not theirs
            raise BundleError(f"{uri}: {name} cannot be read: {type(error).__name__}: {error}") from error

    def read_calibration(content: bytes) -> Calibration:
        settings = json.loads(contents["calibration.json"])
        del settings["threshold"]
        arrays: dict[str, Any] = _load_npz(content)
        return Calibration(**arrays, **settings)

    return Bundle(
        schema=read("schema.json", TableSchema.from_json),
        config=read("model.json", VAEConfig.from_json),
        weights=read("weights.npz", _load_npz),
        noise=read("noise.npy", _load_npy),
        threshold=read("calibration.json", lambda values: Threshold(**values["threshold"])),
        calibration=read("calibration.npz", read_calibration),
        statistics=read("statistics.json", TableStatistics.from_json),
        golden=read("golden.parquet", _load_parquet),
        card=read("card.json", dict),
        history=read("history.csv", _load_csv),
    )


def _as_table(data: pa.Table | pa.RecordBatch | pd.DataFrame) -> pa.Table:
    if isinstance(data, pd.DataFrame):
        return from_frame(data)
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if not isinstance(data, pa.Table):
        raise ValueError(f"data: expected an Arrow table or a DataFrame, got {type(data).__name__}")
    return without_views(data)


def _version(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in _SCORING_FILES:
        digest.update(hashlib.sha256(contents[name]).digest())
    return digest.hexdigest()[:12]


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=False).encode()


def _npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _load_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _load_parquet(content: bytes) -> pa.Table:
    # Arrow 25's own threads abort about one in three short processes as they end.
    with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
        if file.metadata.num_rows > _MAX_GOLDEN_ROWS:  # a few bytes may claim any number
            raise ValueError(f"expected at most {_MAX_GOLDEN_ROWS:,} rows, got {file.metadata.num_rows:,}")
        return file.read(use_threads=False)


def _load_npz(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for item in archive.infolist():  # stored, as NumPy does, so that no more comes out than went in
            if item.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{item.filename}: expected an array as it is, got a compressed one")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _csv_bytes(rows: list[dict[str, float]]) -> bytes:
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue().encode()


def _load_csv(content: bytes) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(content.decode()))
    return [{key: json.loads(value) for key, value in row.items()} for row in rows]  # steps stay whole
