"""The network that benchmarks hand to Beam's own handlers is the bundle's."""

import keras
import numpy as np
import pytest

from benchmarks.network import save_network
from vae_model import TrainingConfig, VAEConfig, fit
from vae_model.encoding import encode

PLAIN = {"hidden_dims": (8, 4), "latent_dim": 2, "num_samples": 1, "views": ("standard",), "prior": "normal"}


def test_a_saved_network_scores_as_its_bundle(mixed_table, tmp_path):
    table = mixed_table.select(["length", "weight", "count"])
    bundle = fit(table, VAEConfig(**PLAIN), TrainingConfig(max_steps=100))
    save_network(bundle, tmp_path / "network.keras")
    numbers = encode(table, bundle.schema, ("standard",)).inputs["numbers"]
    scores = keras.models.load_model(tmp_path / "network.keras")(numbers)
    # The bundle adds what no network decides: that a value is there.
    fixed = sum(feature.missing_nll()[0] for feature in bundle.schema.features)
    np.testing.assert_allclose(scores[:, 0] + fixed, bundle.score(table)["anomaly_score"], rtol=1e-4, atol=1e-4)


def test_several_members_are_no_one_network(mixed_table, tmp_path):
    config = VAEConfig(**PLAIN, num_members=2)
    bundle = fit(mixed_table.select(["length", "weight"]), config, TrainingConfig(max_steps=5))
    with pytest.raises(ValueError, match="expected one network"):
        save_network(bundle, tmp_path / "network.keras")
