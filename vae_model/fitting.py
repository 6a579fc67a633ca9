"""From tables to a bundle: statistics, schema, training, calibration."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from vae_model import files
from vae_model.bundle import Bundle, refuse_output
from vae_model.calibration import Calibration, calibrate
from vae_model.config import TrainingConfig, VAEConfig
from vae_model.encoding import encode
from vae_model.scan import (
    CALIBRATION,
    LEFT_OUT,
    TRAIN,
    VALIDATION,
    Progress,
    Split,
    columns_and_roles,
    limited,
    read_scan,
    scan_table,
)
from vae_model.schema import (
    CategoricalFeature,
    ConstantFeature,
    NumericFeature,
    TableSchema,
    TimestampFeature,
    infer_schema,
)
from vae_model.statistics import TableStatistics
from vae_model.tables import Block, MemoryTables, Tables, open_tables

if TYPE_CHECKING:
    from vae_model.scoring import ElboScorer
    from vae_model.training import TrainedModel, Trainer

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
_NUM_FOLDS = 5
_SHUFFLED_BYTES = 32 << 20
_NUM_GOLDEN = 16
_MAX_LEFT_OUT = 0.2  # share of rows that one look at contaminated data may take for anomalies


def fit(
    data: str | list[str] | pa.Table | pd.DataFrame,
    config: VAEConfig | None = None,
    training: TrainingConfig | None = None,
    *,
    quality: str = "default",
    output: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    label: str | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    timestamp: Sequence[str] = (),
    exclude: Sequence[str] = (),
    statistics: str | None = None,
    on_progress: Progress | None = None,
) -> Bundle:
    """Trains and calibrates a model.

    Tables larger than memory are streamed: Parquet row groups are read in random order and shuffled
    in a buffer.

    Args:
        data: Parquet files by path, glob, directory or URI (a list of them), or a table or DataFrame.
        config: Of the network; by default that of `quality`.
        training: Of training and calibration.
        quality: "fast", "default" or "best": what scoring may cost, see docs/accuracy.md.
        output: Directory or URI to write the bundle to.
        overwrite: Replace a bundle that is there.
        resume: Go on where an interrupted fit of the same data, configuration and output was after its last
            validation (it keeps `OUTPUT.checkpoint`); the bundle becomes the one it would have written.
            Tables under 1,000 rows begin anew.
        label: A 0/1 column: never a feature, and rows labelled 1 are left out.
        numeric: Columns to read as numbers, whatever their type and statistics.
        categorical: Columns to read as levels, integers for instance.
        timestamp: Columns to read as times.
        exclude: Columns to carry only.
        statistics: File of `python -m pipeline.statistics`, taken of the same files with the same arguments; without
            it the files are read once more for their statistics.
        on_progress: Told how far each stage is.

    Returns:
        The bundle, ready to score.

    Raises:
        RecordError: The data does not hold what its columns promise.
        ValueError: Too few rows, no column to learn from, a wrong column name, or statistics of another table.
        TrainingError: The loss became non-finite.
        OSError: The output cannot be written.
    """
    if config and quality != "default":
        raise ValueError("quality, config: expected one of them; VAEConfig.of_quality makes one of a quality")
    config, training = config or VAEConfig.of_quality(quality), training or TrainingConfig()
    report = on_progress or (lambda *_: None)
    if output:
        refuse_output(output, overwrite)
        files.refuse_unwritable(output)
    tables = open_tables(data)
    if label and training.contamination is not None:
        raise ValueError("contamination, label: expected one of them; rows labelled 1 are left out of calibration")
    kinds, passthrough, split = columns_and_roles(
        tables, training, label=label, numeric=numeric, categorical=categorical, timestamp=timestamp, exclude=exclude
    )
    if statistics:
        scan, split = read_scan(statistics, tables, kinds, split)
        scan.check(split)
    else:
        split = limited(split, tables)
        scan = scan_table(tables, kinds, split, report)
    forced = [*numeric, *categorical, *timestamp]
    schema = infer_schema(scan.statistics, tables.schema, passthrough, forced)
    scan.statistics.compact()  # for the bundle: of wide tables they would be its largest part by far
    checkpoint = f"{output.rstrip('/')}.checkpoint" if output else None
    num_train = int(scan.num_rows[TRAIN])
    steps = _Steps(tables, schema, scan.statistics, config, training, split, report, num_train, checkpoint, resume)
    if training.contamination is not None:
        steps.leave_out_strangest(min(2 * training.contamination, _MAX_LEFT_OUT))
    bundle = steps.cross_conformal() if split.cross_conformal else steps.held_out()
    bundle.card = card(tables, data, bundle, training)
    if output and checkpoint:
        from vae_model.training import remove_checkpoints

        bundle.save(output, overwrite=overwrite)
        remove_checkpoints(checkpoint)
    return bundle


@dataclass
class _Steps:
    """From a schema to a bundle."""

    tables: Tables
    schema: TableSchema
    statistics: TableStatistics
    config: VAEConfig
    training: TrainingConfig
    split: Split
    report: Progress
    num_train: int
    checkpoint: str | None = None
    resume: bool = False
    suspects: np.ndarray | None = None  # (rows of the table,) bool: neither trained nor validated on; None: no row

    def leave_out_strangest(self, share: float) -> None:
        """Learns from rows that contain fewer anomalies: leaves the strangest out, twice the same share.

        First by what each column says alone, where a cluster of anomalies shows that a network would learn; then by
        a network that was trained on the others.
        """
        self._leave_out("suspects by column", share, partial(independent_nll, schema=self.schema))
        scorer = self._first_network()
        self._leave_out("suspects by network", share, lambda table: scorer.score(self._encode(table)).score)

    def _leave_out(self, stage: str, share: float, strangeness: Callable[[pa.Table], np.ndarray]) -> None:
        """Adds to the suspects: rows above the quantile `1 - share` of `strangeness`, table to `(n,)`, high is strange.

        Rows that calibrate and earlier suspects are neither ranked nor added.
        """
        n = self.tables.num_rows
        roles, found = np.full(n, LEFT_OUT, np.int8), np.zeros(n, np.float32)
        for start, table in self.tables.scan(self._columns):
            end = start + table.num_rows
            roles[start:end] = self._roles(table, start)
            rows = roles[start:end] < CALIBRATION
            if rows.any():
                table = table.select(self.schema.names).filter(pa.array(rows))
                found[start + np.flatnonzero(rows)] = strangeness(table)
            self.report(stage, end, n, {})
        suspects = np.zeros(n, bool) if self.suspects is None else self.suspects
        for role in (TRAIN, VALIDATION):  # each by its own quantile, which leaves it at least one row
            if (rows := roles == role).any():
                suspects = suspects | (rows & (found > np.quantile(found[rows], 1 - share)))
        self.suspects, self.num_train = suspects, int(((roles == TRAIN) & ~suspects).sum())
        vars(self).pop("_cached", None)  # holds the rows that were learned from before

    def _first_network(self) -> ElboScorer:
        """Of one member, trained on the rows that are not left out.

        Its prior stays N(0, I): encodings of a crowd of anomalies would vouch for the crowd.
        """
        options: dict[str, Any] = {"num_members": 1, "fit_prior": False}
        if self.split.cross_conformal:
            inputs = self._encode(pa.concat_tables(table for _, table in self._scan(None)))
            rows = self._kept(len(inputs["present"]))
            return self._train_rows(inputs, rows, "first network", **options).scorer
        return self._train(self.num_train, self._shuffled, self._validation(), "first network", **options).scorer

    def held_out(self) -> Bundle:
        trained = self._train(
            self.num_train,
            self._shuffled,
            self._validation(),
            "training",
            checkpoint=self.checkpoint,
            resume=self.resume,
        )
        calibration, examples = self._calibrate(trained)
        return self._finish(trained, calibration, examples)

    def _validation(self) -> Arrays:
        return self._encode(pa.concat_tables(table for _, table in self._scan(VALIDATION)))

    def _calibrate(self, trained: TrainedModel) -> tuple[Calibration, pa.Table]:
        """Scores the calibration rows block by block, and keeps a few as examples."""
        scores, nll = [], []
        examples: list[pa.Table] = []
        for end, table in self._scan(CALIBRATION):
            if table.num_rows:
                terms = trained.scorer.score(self._encode(table))
                scores.append(terms.score)
                nll.append(terms.column_nll)
                if sum(part.num_rows for part in examples) < 10 * _NUM_GOLDEN:
                    examples.append(table.slice(0, 10 * _NUM_GOLDEN))
            self.report("calibration", end, self.tables.num_rows, {})
        return calibrate(np.concatenate(scores), np.concatenate(nll)), pa.concat_tables(examples)

    def cross_conformal(self) -> Bundle:
        """Every row is scored by a model that was not trained on it; the last is trained on all kept (Vovk, 2015)."""
        table = pa.concat_tables(table for _, table in self._scan(None))
        n = table.num_rows
        kept = self._kept(n)
        rng = np.random.default_rng(self.training.seed)
        fold = rng.permutation(np.arange(n) % _NUM_FOLDS)
        inputs = self._encode(table)
        scores = np.zeros(n, np.float32)
        nll = np.zeros((n, len(self.schema.features)), np.float32)
        for k in range(_NUM_FOLDS):
            trained = self._train_rows(inputs, kept[fold[kept] != k], f"fold {k + 1} of {_NUM_FOLDS}")
            held_out = np.flatnonzero(fold == k)
            terms = trained.scorer.score({name: values[held_out] for name, values in inputs.items()})
            scores[held_out], nll[held_out] = terms.score, terms.column_nll
        trained = self._train_rows(inputs, kept, "training")
        return self._finish(trained, calibrate(scores, nll, "cross-conformal"), table)

    def _train_rows(self, inputs: Arrays, rows: np.ndarray, stage: str, **options: Any) -> TrainedModel:
        """Trains on rows in memory, a tenth of them held out for early stopping."""
        order = np.random.default_rng(self.training.seed).permutation(rows)
        num_validation = max(1, round(len(rows) * self.split.validation))
        held, train = order[:num_validation], order[num_validation:]

        def shuffled(rng: np.random.Generator) -> Iterator[Arrays]:
            shuffle = rng.permutation(train)
            yield {name: values[shuffle] for name, values in inputs.items()}

        validation = {name: values[held] for name, values in inputs.items()}
        return self._train(len(train), shuffled, validation, stage, **options)

    def _train(
        self,
        num_rows: int,
        shuffled: Callable[[np.random.Generator], Iterator[Arrays]],
        validation: Arrays,
        stage: str,
        **options: Any,
    ) -> TrainedModel:
        return self._trainer.train(
            num_rows=num_rows,
            shuffled=shuffled,
            validation=validation,
            on_progress=lambda done, total, losses: self.report(stage, done, total, losses),
            **options,
        )

    @cached_property
    def _trainer(self) -> Trainer:
        from vae_model.training import Trainer  # TensorFlow: only once the data is known to be good

        return Trainer(self.schema, self.config, self.training)

    def _finish(self, trained: TrainedModel, calibration: Calibration, examples: pa.Table) -> Bundle:
        """The bundle with its calibration, its threshold and its golden rows."""
        from vae_model.model import member_weights

        training = self.training
        num_suspects = 0 if self.suspects is None else int(self.suspects.sum())
        if training.contamination is not None:
            threshold = calibration.threshold(training.contamination, "contamination")
        else:
            threshold = calibration.threshold(training.false_positive_rate)
        if threshold.extrapolated:
            logger.warning(
                "%d calibration rows are too few for a rate of %g: the threshold is extrapolated from the tail",
                calibration.num_rows,
                threshold.target,
            )
        if training.no_examples:
            golden = synthetic_rows(self.schema, _NUM_GOLDEN, training.seed)
        else:
            rows = np.random.default_rng(training.seed).permutation(examples.num_rows)[:_NUM_GOLDEN]
            golden = examples.take(pa.array(np.sort(rows)))
        bundle = Bundle(
            schema=self.schema,
            config=self.config,
            weights=member_weights(trained.members),
            noise=trained.scorer.noise,
            calibration=calibration,
            threshold=threshold,
            statistics=self.statistics,
            golden=golden.combine_chunks(),
            card={"training": {**trained.summary, "num_suspects": num_suspects}},
            history=trained.history,
        )
        bundle.golden = bundle.score(bundle.golden)
        return bundle

    # ---- rows ----------------------------------------------------------------------------------

    def _scan(self, role: int | None, blocks: Sequence[Block] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """The features of rows that have a role (None: all but those labelled), each part with where it ends."""
        for start, table in self.tables.scan(self._columns, blocks):
            keep = self.split.roles(table, start) != LEFT_OUT if role is None else self._roles(table, start) == role
            yield start + table.num_rows, table.select(self.schema.names).filter(pa.array(keep))

    def _roles(self, table: pa.Table, start: int) -> np.ndarray:
        """`Split.roles`, where suspects are left out."""
        roles = self.split.roles(table, start)
        if self.suspects is None:
            return roles
        return np.where(self.suspects[start : start + table.num_rows], LEFT_OUT, roles)

    def _kept(self, num_rows: int) -> np.ndarray:
        """Positions of the rows to learn from among all: of a table without a label, which goes with no suspects."""
        return np.arange(num_rows) if self.suspects is None else np.flatnonzero(~self.suspects)

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys([*self.schema.names, *self.split.columns]))

    def _encode(self, table: pa.Table) -> Arrays:
        return encode(table, self.schema, self.config.views).inputs

    def _shuffled(self, rng: np.random.Generator) -> Iterator[Arrays]:
        """One pass over the training rows: row groups in random order, shuffled buffer by buffer."""
        if self._cached is not None:
            yield from self._shuffle(self._cached, rng)
            return
        limit = self.training.buffer_mib << 20
        order = rng.permutation(len(self.tables.blocks))
        parts: list[Arrays] = []
        size = 0
        for part in self._encoded([self.tables.blocks[position] for position in order]):
            parts.append(part)
            size += sum(values.nbytes for values in part.values())
            if size >= limit:
                yield from self._shuffle(_joined(parts), rng)
                size = 0
        if parts:
            yield from self._shuffle(_joined(parts), rng)

    def _shuffle(self, rows: Arrays, rng: np.random.Generator) -> Iterator[Arrays]:
        """Rows in random order, not too many at a time."""
        order = rng.permutation(len(rows["present"]))
        size = max(1, _SHUFFLED_BYTES // self._row_bytes)
        for start in range(0, len(order), size):
            yield {name: values[order[start : start + size]] for name, values in rows.items()}

    @cached_property
    def _row_bytes(self) -> int:
        nothing = self._encode(self.tables.schema.empty_table())
        return sum(values.itemsize * values.shape[1] for values in nothing.values())

    @cached_property
    def _cached(self) -> Arrays | None:
        """All training rows, where they fit into the buffer: then they are read once."""
        if self.num_train * self._row_bytes > self.training.buffer_mib << 20:
            return None
        return _joined(list(self._encoded(self.tables.blocks)))

    def _encoded(self, blocks: Sequence[Block]) -> Iterator[Arrays]:
        for _, table in self._scan(TRAIN, blocks):
            yield self._encode(table)


def _joined(parts: list[Arrays]) -> Arrays:
    """The parts as one; empties the list, so that rows are not held twice for longer than need be."""
    rows = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    parts.clear()
    return rows


def independent_nll(table: pa.Table, schema: TableSchema) -> np.ndarray:
    """`(n,)` nats of rows whose columns had nothing to do with each other, but for a constant.

    Numbers cost half the square of their ranks' normal scores, levels and missing values their frequency, times
    nothing.
    """
    inputs = encode(table, schema, ("quantile",)).inputs
    nll = inputs["fixed_nll"].sum(axis=1)
    for j, number in enumerate(schema.numeric):
        # Not standardised: a number that is hardly ever other than 0 would cost far more than the flag that it is.
        nll += 0.5 * np.square(number.normal_scores(inputs["numbers"][:, j])) * inputs["present"][:, j]
    for j, category in enumerate(schema.learned_categories):
        of_class = -np.log(np.append(1.0, category.class_probabilities))  # class 0: in fixed_nll, or missing
        nll += of_class[inputs["categories"][:, j]]
    for j, feature in enumerate(schema.features):
        if feature.nullable:
            nll += np.where(inputs["present"][:, j] > 0, *feature.missing_nll())
    return nll


def synthetic_rows(schema: TableSchema, num_rows: int, seed: int) -> pa.Table:
    """Plausible rows that belong to nobody: each column drawn from its statistics, on its own."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for feature in schema.features:
        kind = schema.arrow_type(feature.name)
        if isinstance(feature, NumericFeature):
            values = rng.choice(np.array(feature.knots), num_rows)
            drawn = pa.array(values)
        elif isinstance(feature, TimestampFeature):
            drawn = pa.array(rng.integers(0, 365 * 86_400, num_rows) * 1_000_000, pa.timestamp("us"))
        elif isinstance(feature, ConstantFeature) and feature.number is not None:
            drawn = pa.array(np.full(num_rows, feature.number))
        elif isinstance(feature, CategoricalFeature) and feature.levels:
            counts = np.array(feature.counts[:1000], np.float64)
            drawn = pa.array([feature.levels[i] for i in rng.choice(len(counts), num_rows, p=counts / counts.sum())])
        else:
            drawn = pa.nulls(num_rows, kind)
        columns[feature.name] = _cast_drawn(drawn, kind)
    return pa.table(columns)


def _cast_drawn(drawn: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_time(kind):
        drawn = drawn.cast(pa.time64("us"))
    if pa.types.is_duration(kind):
        drawn = drawn.cast(pa.int64(), safe=False)
    return drawn.cast(kind, safe=False)


def card(tables: Tables, data: Any, bundle: Bundle, training: TrainingConfig) -> dict[str, Any]:
    """Where a bundle comes from."""
    fingerprint = hashlib.sha256(repr(tables.schema).encode())
    fingerprint.update(json.dumps(bundle.statistics.to_json()).encode())
    packages = ("beam-vae", "tensorflow", "keras", "numpy", "pyarrow")
    return {
        **bundle.card,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "source": "in memory" if isinstance(tables, MemoryTables) else data,
            "num_rows": tables.num_rows,
            "num_columns": len(tables.schema.names),
            "fingerprint": fingerprint.hexdigest()[:16],
        },
        "training_config": training.to_json(),
        "calibration": {
            "num_rows": bundle.calibration.num_rows,
            "method": bundle.calibration.method,
            "score_quantiles": {
                f"{rank:g}": float(np.quantile(bundle.calibration.scores, rank)) for rank in (0.01, 0.5, 0.99, 0.999)
            },
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
