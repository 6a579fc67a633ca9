import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from vae_model.config import TrainingConfig, VAEConfig

BAD = [
    (VAEConfig, "hidden_dims", (64, 0), "whole numbers > 0, got (64, 0)"),
    (VAEConfig, "hidden_dims", 64, "whole numbers > 0, got 64"),
    (VAEConfig, "hidden_dims", (6.5,), "whole numbers > 0, got (6.5,)"),
    (VAEConfig, "latent_dim", 0, "a whole number > 0, got 0"),
    (VAEConfig, "latent_dim", 2.5, "a whole number > 0, got 2.5"),
    (VAEConfig, "embedding_dim", -1, "a whole number > 0, got -1"),
    (VAEConfig, "embedding_dim", None, "a whole number > 0, got None"),
    (VAEConfig, "beta", -0.1, "a number >= 0, got -0.1"),
    (VAEConfig, "beta", math.nan, "a number >= 0, got nan"),
    (VAEConfig, "beta", math.inf, "a number >= 0, got inf"),
    (VAEConfig, "beta", "1", "a number >= 0, got '1'"),
    (VAEConfig, "views", (), "some of standard, quantile, compressed, each once, got ()"),
    (
        VAEConfig,
        "views",
        ("standard", "standard"),
        "some of standard, quantile, compressed, each once, got ('standard', 'standard')",
    ),
    (VAEConfig, "views", ("log",), "some of standard, quantile, compressed, each once, got ('log',)"),
    (VAEConfig, "views", "standard", "some of standard, quantile, compressed, each once, got 'standard'"),
    (VAEConfig, "min_stddev", 0, "a number > 0, got 0"),
    (VAEConfig, "background", 0, "a number in (0, 1), got 0"),
    (VAEConfig, "background", 1, "a number in (0, 1), got 1"),
    (VAEConfig, "num_samples", 0, "a whole number > 0, got 0"),
    (VAEConfig, "num_samples", True, "a whole number > 0, got True"),
    (VAEConfig, "prior", "uniform", "'normal' or 'aggregate' or 'mixture', got 'uniform'"),
    (VAEConfig, "num_components", 0, "a whole number > 0, got 0"),
    (VAEConfig, "num_members", 1.5, "a whole number > 0, got 1.5"),
    (TrainingConfig, "max_steps", 0, "a whole number > 0, got 0"),
    (TrainingConfig, "batch_size", 0.5, "a whole number > 0, got 0.5"),
    (TrainingConfig, "learning_rate", 0, "a number > 0, got 0"),
    (TrainingConfig, "learning_rate", math.inf, "a number > 0, got inf"),
    (TrainingConfig, "kl_warmup", 1, "a number in [0, 1), got 1"),
    (TrainingConfig, "patience", 0, "a whole number > 0, got 0"),
    (TrainingConfig, "validation_fraction", None, "a number in (0, 1), got None"),
    (TrainingConfig, "calibration_fraction", 0.0, "a number in (0, 1), got 0.0"),
    (TrainingConfig, "false_positive_rate", 1.0, "a number in (0, 1), got 1.0"),
    (TrainingConfig, "contamination", "5%", "a number in (0, 1), got '5%'"),
    (TrainingConfig, "buffer_mib", 0, "a whole number > 0, got 0"),
    (TrainingConfig, "seed", -1, "a whole number in [0, 2**32), got -1"),
    (TrainingConfig, "seed", None, "a whole number in [0, 2**32), got None"),
    (TrainingConfig, "seed", 2**32, "a whole number in [0, 2**32), got 4294967296"),
]


def test_a_quality_is_a_configuration_with_some_values_changed():
    assert VAEConfig.of_quality("default") == VAEConfig.of_quality() == VAEConfig()
    best = VAEConfig.of_quality("best", num_members=2)
    assert (best.prior, best.num_members) == ("mixture", 2)
    assert (VAEConfig.of_quality("fast").prior, VAEConfig().prior) == ("normal", "aggregate")
    assert VAEConfig.of_quality("fast").hidden_dims < VAEConfig().hidden_dims
    with pytest.raises(ValueError, match=r"^quality: expected 'fast' or 'default' or 'best', got 'better'$"):
        VAEConfig.of_quality("better")


@pytest.mark.parametrize(("config", "name", "value", "complaint"), BAD, ids=lambda part: str(part)[:30])
def test_a_bad_value_is_refused_with_its_name_and_what_was_wanted(config, name, value, complaint):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: expected {complaint}')}$"):
        config(**{name: value})


def test_held_out_shares_must_leave_rows_to_train_on():
    with pytest.raises(
        ValueError, match=r"validation_fraction \+ calibration_fraction: expected less than 1, got 1\.1"
    ):
        TrainingConfig(validation_fraction=0.6, calibration_fraction=0.5)


CONFIGS = [
    VAEConfig(),
    VAEConfig(hidden_dims=(), latent_dim=3, views=("quantile",), beta=0.5),
    TrainingConfig(),
    TrainingConfig(max_steps=10, patience=None, time_column="t", contamination=0.02, kl_warmup=0.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configurations_come_back_from_json(config):
    text = json.dumps(config.to_json(), allow_nan=False)
    assert type(config).from_json(json.loads(text)) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_names_every_field(config):
    assert set(config.to_json()) == {field.name for field in dataclasses.fields(config)}


def test_numpys_numbers_are_numbers():
    config = VAEConfig(hidden_dims=tuple(np.array([8, 4])), latent_dim=np.int64(3), beta=np.float32(0.5))
    assert VAEConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_lists_are_taken_as_tuples():
    config = VAEConfig(hidden_dims=[8, 4], views=["standard"])
    assert config == VAEConfig(hidden_dims=(8, 4), views=("standard",))
    assert hash(config) == hash(VAEConfig(hidden_dims=(8, 4), views=("standard",)))


@pytest.mark.parametrize("config", [VAEConfig, TrainingConfig])
def test_unknown_names_are_refused_and_the_known_ones_listed(config):
    known = sorted(field.name for field in dataclasses.fields(config))
    expected = f"{config.__name__}: expected only {', '.join(known)}, got ['alpha', 'zeta']"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        config.from_json({"zeta": 1, "alpha": 2})


def test_absent_names_take_their_defaults():
    assert VAEConfig.from_json({"beta": 2.0}) == VAEConfig(beta=2.0)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VAEConfig().beta = 2.0


def test_configurations_load_neither_numpy_nor_tensorflow():
    code = "import sys, vae_model.config; print(sorted({'numpy', 'tensorflow', 'keras', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
