"""A small table of every kind of column, and a bundle trained on it once for all tests."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

import vae_model
from vae_model import TrainingConfig, VAEConfig

CONFIG = VAEConfig(hidden_dims=(32, 32), latent_dim=4, num_samples=2)
TRAINING = TrainingConfig(max_steps=300)


def make_mixed_table(num_rows: int, seed: int = 0) -> pa.Table:
    """Rows that all depend on two hidden causes, a size and a season, beside some that depend on none.

    `length`, `weight` (correlated floats), `count` (integer), `color` (three common levels and about
    twenty rare ones), `size` (a dictionary that follows `length`), `price` (null where `color` is
    blue, and now and then), `is_large` (bool), `seen_at` (timestamp), `site` (constant text),
    `unit` (constant number) and `id` (nearly unique text, carried only).
    """
    rng = np.random.default_rng(seed)
    size, season = rng.normal(size=num_rows), rng.uniform(size=num_rows)
    length = 10 + 2 * size
    weight = 3 * length + rng.normal(scale=0.5, size=num_rows)
    color = np.where(season < 0.5, "red", np.where(season < 0.9, "green", "blue")).astype(object)
    rare = rng.uniform(size=num_rows) < 0.01
    color[rare] = [f"rare-{i}" for i in rng.integers(0, 20, rare.sum())]
    missing = (color == "blue") | (rng.uniform(size=num_rows) < 0.02)
    start = np.datetime64("2025-01-01T00:00:00", "us")
    minutes = rng.integers(0, 365, num_rows) * 1440 + np.clip(rng.normal(720, 90, num_rows), 0, 1439).astype(int)
    return pa.table(
        {
            "length": length,
            "weight": weight,
            "count": rng.poisson(np.exp(0.5 + 0.5 * size)),
            "color": pa.array(color, pa.string()),
            "size": pa.array(np.array(["S", "M", "L"], object)[np.digitize(length, [8, 12])]).dictionary_encode(),
            "price": pa.array(np.exp(1 + 0.5 * size), mask=missing),
            "is_large": pa.array(length > 11),
            "seen_at": pa.array(start + minutes.astype("timedelta64[m]")),
            "site": pa.array(["north"] * num_rows),
            "unit": pa.array(np.full(num_rows, 2.5)),
            "id": pa.array([f"id-{i:08x}" for i in rng.integers(0, 2**32, num_rows)]),
        }
    )


@pytest.fixture(scope="session")
def make_table() -> Callable[..., pa.Table]:
    """`make_table(num_rows, seed)`: other rows of the kind that `mixed_table` holds."""
    return make_mixed_table


@pytest.fixture(scope="session")
def mixed_table() -> pa.Table:
    """The rows that `bundle` was trained on."""
    return make_mixed_table(4000)


@pytest.fixture(scope="session")
def bundle(mixed_table) -> vae_model.Bundle:
    """Do not change it: all tests share it."""
    return vae_model.fit(mixed_table, CONFIG, TRAINING)


@pytest.fixture(scope="session")
def bundle_uri(bundle, tmp_path_factory) -> str:
    """Where `bundle` is saved."""
    uri = str(tmp_path_factory.mktemp("bundles") / "mixed")
    bundle.save(uri)
    return uri


def fit_small(seed: int) -> vae_model.Bundle:
    """A model of three columns that is quick to load, of other rows for each seed."""
    table = make_mixed_table(800, seed).select(["length", "count", "color"])
    config = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=1)
    return vae_model.fit(table, config, TrainingConfig(max_steps=20, calibration_fraction=0.2))


@pytest.fixture(scope="session")
def first() -> vae_model.Bundle:
    """A small model. Do not change it."""
    return fit_small(0)


@pytest.fixture(scope="session")
def second() -> vae_model.Bundle:
    """Another version of `first`. Do not change it."""
    return fit_small(1)


@pytest.fixture(scope="session")
def first_uri(first, tmp_path_factory) -> str:
    """Where `first` is saved."""
    uri = str(tmp_path_factory.mktemp("bundles") / "first")
    first.save(uri)
    return uri


@pytest.fixture(scope="session")
def second_uri(second, tmp_path_factory) -> str:
    """Where `second` is saved."""
    uri = str(tmp_path_factory.mktemp("bundles") / "second")
    second.save(uri)
    return uri


@pytest.fixture(scope="session")
def renamed(first) -> vae_model.Bundle:
    """`first`, whose column `length` is called `stretch`: other tables are needed to score with it."""

    def names(columns: list[str]) -> list[str]:
        return ["stretch" if name == "length" else name for name in columns]

    schema = first.schema
    features = tuple(
        dataclasses.replace(item, name=name)
        for item, name in zip(schema.features, names([item.name for item in schema.features]), strict=True)
    )
    arrow_schema = schema.arrow_schema.empty_table().rename_columns(names(schema.arrow_schema.names)).schema
    return dataclasses.replace(
        first,
        schema=dataclasses.replace(schema, features=features, arrow_schema=arrow_schema),
        golden=first.golden.rename_columns(names(first.golden.column_names)),
    )
