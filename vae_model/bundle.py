"""The trained artefact: one directory that holds everything needed to score, and nothing that runs.

Reading a bundle loads no TensorFlow; the network is built when the first rows are scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vae_model import files
from vae_model.calibration import Calibration, Threshold
from vae_model.config import VAEConfig
from vae_model.encoding import EncodedTable, encode
from vae_model.reasons import REASON_TYPE, explain
from vae_model.schema import TableSchema
from vae_model.statistics import TableStatistics
from vae_model.tables import RecordError, Rejects, from_frame, rechunk

if TYPE_CHECKING:
    from vae_model.scoring import ElboScorer, Scores

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_ROWS = 65_536
_SCORING_FILES = ("schema.json", "model.json", "weights.npz", "noise.npy", "calibration.json", "calibration.npz")
_OTHER_FILES = ("statistics.json", "golden.parquet", "card.json", "history.csv")


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
        from vae_model.model import build_vae  # TensorFlow: here, once
        from vae_model.scoring import ElboScorer

        networks = build_vae(self.schema, self.config)
        networks.load_weights(self.weights)
        return ElboScorer(networks, self.noise)

    @overload
    def score(
        self, data: pa.Table, *, reasons: int = 0, prefix: str = "", threshold: float | None = None
    ) -> pa.Table: ...
    @overload
    def score(
        self, data: pd.DataFrame, *, reasons: int = 0, prefix: str = "", threshold: float | None = None
    ) -> pd.DataFrame: ...

    def score(self, data, *, reasons=0, prefix="", threshold=None):  # type: ignore[no-untyped-def]
        """Adds score columns to every row of a table (or DataFrame, which then comes back).

        Args:
            data: Rows with at least the columns of `schema.names`.
            reasons: Strangest columns to explain per row.
            prefix: Of the score columns' names.
            threshold: Score, in nats, that replaces the bundle's.

        Raises:
            RecordError: Rows do not fit, see `split` for a way around; names every offending column.
            ValueError: The data has a column with the name of a score column.
        """
        table = from_frame(data) if isinstance(data, pd.DataFrame) else data
        scored, rejects = self.split(table, reasons=reasons, prefix=prefix, threshold=threshold)
        if len(rejects):
            raise RecordError(rejects.summary())
        if not isinstance(data, pd.DataFrame):
            return scored
        added = scored.select([item.name for item in score_fields(reasons, prefix)]).to_pandas()
        return pd.concat([data, added.set_index(data.index)], axis=1)

    def split(
        self, table: pa.Table, *, reasons: int = 0, prefix: str = "", threshold: float | None = None
    ) -> ScoredTable:
        """Like `score`, but sets aside the rows that do not fit: rows in = scored + rejects."""
        refuse_clash(table.column_names, reasons, prefix)
        parts, codes, why = [], [], Rejects(0)
        for start in range(0, max(table.num_rows, 1), CHUNK_ROWS):
            chunk = table.slice(start, CHUNK_ROWS)
            columns, rejects = self._score_chunk(chunk, reasons, prefix, threshold)
            parts.append(columns)
            codes.append(np.where(rejects.codes > 0, rejects.codes + len(why.reasons), 0))
            why.reasons += rejects.reasons
        why.codes = np.concatenate(codes)
        kept = table if not len(why) else table.filter(pa.array(why.keep))
        for column in (added := pa.concat_tables(parts)).schema:
            kept = kept.append_column(column, added.column(column.name))
        return ScoredTable(kept, why)

    def score_tables(self, tables: Iterable[pa.Table], **options: Any) -> Iterator[ScoredTable]:
        """`split` over any number of tables, for data larger than memory."""
        for table in rechunk(tables, CHUNK_ROWS):
            yield self.split(table, **options)

    def _score_chunk(
        self, table: pa.Table, reasons: int, prefix: str, threshold: float | None
    ) -> tuple[pa.Table, Rejects]:
        encoded = encode(table, self.schema, self.config.views)
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
            pa.array(np.full(len(score), self.model_version)),
        ]
        if reasons:
            columns.insert(3, self._explain(table, encoded, scores, reasons))
        return pa.table(columns, schema=pa.schema(score_fields(reasons, prefix))), rejects

    def _explain(self, table: pa.Table, encoded: EncodedTable, scores: Scores, reasons: int) -> pa.Array:
        return explain(
            table,
            encoded,
            scores.column_nll,
            self.scorer.expect(encoded.inputs),
            self.scorer.number_stddev,
            self.schema,
            self.config.views,
            self.calibration,
            reasons,
        )

    def terms(self, data: pa.Table | pd.DataFrame) -> pd.DataFrame:
        """Each row's NLL by column and its KL, in nats: they sum to the score exactly."""
        table = from_frame(data) if isinstance(data, pd.DataFrame) else data
        encoded = encode(table, self.schema, self.config.views)
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
        now = self.score(rows).column("anomaly_score").to_numpy()
        terms = self.terms(rows)
        tolerance = 1e-4 * (1 + terms.abs().to_numpy().sum(axis=1))
        if (np.abs(now - then) > tolerance).any():
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
        )
        contents = self._scoring_files() | dict(zip(_OTHER_FILES, others, strict=True))
        manifest = {
            "format": FORMAT,
            "model_version": self.model_version,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        }
        contents[MANIFEST] = _json_bytes(manifest, indent=1)
        files.write_directory(uri, contents, last=MANIFEST, overwrite=overwrite)


def load_bundle(uri: str) -> Bundle:
    """Reads a bundle from a local directory, `gs://` or `s3://`, checking every file's hash.

    Nothing in a bundle is executed: JSON, arrays and Parquet only.

    Raises:
        BundleError: No bundle is there, a file is missing or was changed, or the format is newer.
    """
    manifest = read_manifest(uri)
    contents = {}
    for name in (*_SCORING_FILES, *_OTHER_FILES):
        if name not in manifest["sha256"]:
            raise BundleError(f"{uri}: {MANIFEST} does not list {name}")
        try:
            contents[name] = files.read_bytes(uri, name)
        except FileNotFoundError:
            raise BundleError(f"{uri}: {name} is missing") from None
        if hashlib.sha256(contents[name]).hexdigest() != manifest["sha256"][name]:
            raise BundleError(f"{uri}: {name} was changed after it was written (its SHA-256 differs)")
    try:
        bundle = _parse(contents)
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise BundleError(f"{uri}: cannot be read: {type(error).__name__}: {error}") from error
    if bundle.model_version != manifest["model_version"]:
        raise BundleError(f"{uri}: expected version {manifest['model_version']}, got {bundle.model_version}")
    return bundle


def read_manifest(uri: str) -> dict[str, Any]:
    """A bundle's manifest: format, model_version, sha256 by file.

    Raises:
        BundleError: None is there, or its format is not one that this version reads.
    """
    try:
        manifest = json.loads(files.read_bytes(uri, MANIFEST))
    except FileNotFoundError:
        raise BundleError(f"{uri}: no bundle there ({MANIFEST} is missing)") from None
    except ValueError as error:
        raise BundleError(f"{uri}: {MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise BundleError(f"{uri}: {MANIFEST} lists no files")
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{uri}: expected bundle format {FORMAT}, got {manifest.get('format')!r}; upgrade beam-vae")
    return manifest


def _parse(contents: dict[str, bytes]) -> Bundle:
    settings = json.loads(contents["calibration.json"])
    threshold = Threshold(**settings.pop("threshold"))
    return Bundle(
        schema=TableSchema.from_json(json.loads(contents["schema.json"])),
        config=VAEConfig.from_json(json.loads(contents["model.json"])),
        weights=_load_npz(contents["weights.npz"]),
        noise=np.load(io.BytesIO(contents["noise.npy"]), allow_pickle=False),
        calibration=Calibration(**_load_npz(contents["calibration.npz"]), **settings),
        threshold=threshold,
        statistics=TableStatistics.from_json(json.loads(contents["statistics.json"])),
        golden=pq.read_table(io.BytesIO(contents["golden.parquet"])),
        card=json.loads(contents["card.json"]),
        history=_load_csv(contents["history.csv"]),
    )


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


def _npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _load_npz(content: bytes) -> dict[str, np.ndarray]:
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
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(content.decode()))]
