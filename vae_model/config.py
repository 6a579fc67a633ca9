"""What a user may choose about the model and its training. Light: no numpy, no TensorFlow."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Self


def _require(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value < 1  # type: ignore[operator]


NUM_SEEDS = 2**32  # that Keras takes
VIEWS = ("standard", "quantile", "compressed")
PRIORS = ("normal", "aggregate", "mixture")
_COUNT, _SHARE = "a whole number > 0", "a number in (0, 1)"


class _Config:
    """To and from JSON, refusing names it does not know."""

    def to_json(self) -> dict[str, Any]:
        values = json.dumps(asdict(self), default=lambda number: number.item())  # type: ignore[call-overload]  # numpy's
        return json.loads(values)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        _require(cls.__name__, unknown, not unknown, f"only {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class VAEConfig(_Config):
    """The network and its likelihoods.

    Args:
        hidden_dims: Widths of the encoder's hidden layers; the decoder mirrors them.
        latent_dim: Latents k; None takes one per encoded input, at most 16.
        embedding_dim: Width of a category's embedding.
        beta: Weight of the KL term while training; 1 trains on the ELBO. The score always uses 1.
        views: Encodings of a numeric column that the model reads and reconstructs: "standard" (z-scores), "quantile"
            (normal scores of ranks), "compressed": whichever draws the tails in, normal scores where they are heavier
            than a Gaussian's, z-scores elsewhere. Each view's NLL counts in the column's.
        min_stddev: Floor of the learned standard deviations, in encoded units.
        background: Share of a broad background density mixed into every value's likelihood, so
            that no single cell can outweigh the rest of the row.
        input_clip: Largest size of an encoded number that the encoder is shown: a wild cell must not
            change what is expected of the other columns. Its own likelihood sees all of it.
        num_samples: Fixed noise draws S that estimate E_q[log p(x|z)] in a score; even numbers
            are antithetic pairs of mean 0 and variance 1.
        prior: p(z): "normal", N(0, I), whose KL term is closed; "aggregate", trained under N(0, I) and scored under a
            mixture of it and the encodings of rows; or "mixture", of the encodings of learned pseudo-inputs.
        num_components: Encodings in such a mixture.
        num_members: Networks trained alike from other first weights; the score is the mean of theirs.
    """

    hidden_dims: tuple[int, ...] = (128, 128)
    latent_dim: int | None = None
    embedding_dim: int = 8
    beta: float = 1.0
    views: tuple[str, ...] = ("standard", "compressed")
    min_stddev: float = 0.03
    background: float = 1e-4
    input_clip: float = 5.0
    num_samples: int = 2
    prior: str = "aggregate"
    num_components: int = 400
    num_members: int = 1

    @classmethod
    def of_quality(cls, quality: str = "default", **changes: Any) -> Self:
        """The configuration of one of `QUALITIES`, with some values changed.

        Raises:
            ValueError: There is no such quality, or a value is wrong.
        """
        _require("quality", quality, quality in QUALITIES, " or ".join(map(repr, QUALITIES)))
        return cls(**QUALITIES[quality] | changes)

    def __post_init__(self) -> None:
        for name in ("hidden_dims", "views"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        dims, views = self.hidden_dims, self.views
        _require("hidden_dims", dims, isinstance(dims, tuple) and all(map(_is_whole, dims)), "whole numbers > 0")
        known = isinstance(views, tuple) and views and set(views) <= set(VIEWS)
        _require(
            "views", views, bool(known) and len(set(views)) == len(views), f"some of {', '.join(VIEWS)}, each once"
        )
        _require("latent_dim", self.latent_dim, self.latent_dim is None or _is_whole(self.latent_dim), _COUNT)
        _require("embedding_dim", self.embedding_dim, _is_whole(self.embedding_dim), _COUNT)
        _require("num_samples", self.num_samples, _is_whole(self.num_samples), _COUNT)
        _require("beta", self.beta, _is_number(self.beta) and self.beta >= 0, "a number >= 0")
        _require("prior", self.prior, self.prior in PRIORS, " or ".join(map(repr, PRIORS)))
        for name in ("num_components", "num_members"):
            _require(name, getattr(self, name), _is_whole(getattr(self, name)), _COUNT)
        for name in ("min_stddev", "input_clip"):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and value > 0, "a number > 0")
        _require("background", self.background, _is_share(self.background), _SHARE)


# What `--quality` chooses; docs/accuracy.md has what each is worth and costs.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"hidden_dims": (64, 32), "latent_dim": 8, "num_samples": 1, "prior": "normal"},
    "default": {},
    "best": {"prior": "mixture", "num_members": 3},
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Config):
    """How the model is trained, validated and calibrated.

    Args:
        max_steps: Optimizer steps at most; None chooses by the number of rows.
        batch_size: Rows per step; None takes 64 to 256, by the number of rows.
        learning_rate: Adam's, at its peak; decays to 2 % of it over `max_steps` (cosine).
        kl_warmup: Share of `max_steps` over which beta rises from 0.
        patience: Stop after this many validations without a better loss. None never stops early.
        validation_fraction: Rows held out for early stopping, at most 20,000; fewer of tables with
            more than 800 columns.
        calibration_fraction: Rows used for nothing but calibration, at most 100,000 and fewer of
            tables with more than 600 columns; None takes 10 %, or more where that is under 1,000
            rows. Tables under 1,000 rows are calibrated by cross-conformal folds instead.
        time_column: Calibrate on the last block of time in this column, instead of on random rows.
        false_positive_rate: Share of normal rows labelled anomalous, which sets the threshold.
        contamination: Share of anomalies expected in the data; sets the threshold instead. Training then leaves out
            the strangest rows, twice: by each column alone, and by a first network; each time twice this share, at
            most 20 %. Given as `false_positive_rate`, the same share sets the same threshold and no row is left out.
        buffer_mib: Encoded rows held and shuffled at a time; tables that fit are read once.
        no_examples: Keep no real row in the bundle: the golden rows are then synthetic, and an aggregate prior stays
            N(0, I).
        seed: Of weights, shuffling, splits and the score's noise.
        strategy: "mirrored" trains on all GPUs of the machine at once, each on its part of every batch.
        precision: "mixed_bfloat16" trains the hidden layers in bfloat16, for accelerators that are faster
            in it. Weights, likelihoods, validation and every score are float32 in any case.
    """

    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 5e-3
    kl_warmup: float = 0.1
    patience: int | None = 8
    validation_fraction: float = 0.1
    calibration_fraction: float | None = None
    time_column: str | None = None
    false_positive_rate: float = 0.01
    contamination: float | None = None
    buffer_mib: int = 256
    no_examples: bool = False
    seed: int = 0
    strategy: str | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "patience", "buffer_mib"):
            value = getattr(self, name)
            optional = name != "buffer_mib"
            _require(name, value, (optional and value is None) or _is_whole(value), _COUNT)
        for name in ("validation_fraction", "calibration_fraction", "false_positive_rate", "contamination"):
            value = getattr(self, name)
            optional = name in ("calibration_fraction", "contamination")
            _require(name, value, (optional and value is None) or _is_share(value), _SHARE)
        held_out = self.validation_fraction + (self.calibration_fraction or 0)
        _require("validation_fraction + calibration_fraction", held_out, held_out < 1, "less than 1")
        _require(
            "learning_rate",
            self.learning_rate,
            _is_number(self.learning_rate) and self.learning_rate > 0,
            "a number > 0",
        )
        _require(
            "kl_warmup", self.kl_warmup, _is_number(self.kl_warmup) and 0 <= self.kl_warmup < 1, "a number in [0, 1)"
        )
        _require("seed", self.seed, _is_whole(self.seed, 0) and self.seed < NUM_SEEDS, "a whole number in [0, 2**32)")
        _require("strategy", self.strategy, self.strategy in (None, "mirrored"), "'mirrored' or None")
        precisions = ("float32", "mixed_bfloat16")
        _require("precision", self.precision, self.precision in precisions, " or ".join(map(repr, precisions)))
