"""Training on two devices and in bfloat16. The devices are logical ones of the CPU, in a process of their own."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vae_model import TrainingConfig, load_bundle
from vae_model.training import _strategy

SCRIPT = """
import sys

import numpy as np
import pyarrow as pa
import tensorflow as tf

from vae_model import TrainingConfig, VAEConfig, fit
from vae_model.training import _strategy

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)
cause = rng.normal(size=1500)
table = pa.table({name: cause * (i + 1) + rng.normal(scale=0.3, size=1500) for i, name in enumerate("abc")})
config = VAEConfig(hidden_dims=(8,), latent_dim=2, num_samples=2)


def run(name, on_progress=None, resume=False, **training):
    settings = TrainingConfig(**{"max_steps": 100, "batch_size": 50, "patience": None} | training)
    fit(table, config, settings, output=f"{sys.argv[1]}/{name}", on_progress=on_progress, resume=resume)


def interrupt(stage, done, total, losses):
    if stage == "training" and done >= 60:
        raise InterruptedError


run("one")
assert _strategy("mirrored").num_replicas_in_sync == 2
try:
    run("two", interrupt, strategy="mirrored", batch_size=51)
except InterruptedError:
    run("two", resume=True, strategy="mirrored", batch_size=51)
run("bfloat16", precision="mixed_bfloat16")
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    """Where the script's bundles are."""
    folder = tmp_path_factory.mktemp("devices")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(bundle: Path) -> np.ndarray:
    """`(validations, 2)`: the training and the validation loss."""
    table = np.genfromtxt(bundle / "history.csv", delimiter=",", names=True)
    return np.stack([table["loss"], table["val_loss"]], axis=1)


def test_two_devices_train_as_one_although_interrupted(bundles):
    one, two = losses(bundles / "one"), losses(bundles / "two")
    assert one[0, 1] - one[-1, 1] > 1  # training moved it
    np.testing.assert_allclose(two, one, rtol=1e-4)
    weights = [load_bundle(str(bundles / name)).weights for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for path, weight in weights[0].items():
        if not path.startswith("aggregate_prior/"):  # the best of a few: rounding may decide which
            np.testing.assert_allclose(weights[1][path], weight, atol=1e-3)


def test_a_batch_that_two_devices_cannot_share_evenly_is_a_row_smaller(bundles):
    assert json.loads((bundles / "two" / "card.json").read_text())["training"]["batch_size"] == 50


def test_mixed_precision_trains_and_scores_in_float32(bundles):
    one, mixed = losses(bundles / "one"), losses(bundles / "bfloat16")
    assert not np.array_equal(mixed[:, 0], one[:, 0])  # it is another arithmetic
    np.testing.assert_allclose(mixed[-1], one[-1], atol=0.05)
    names = {path.relative_to(bundles / "one").as_posix() for path in (bundles / "one").rglob("*")}
    assert names == {path.relative_to(bundles / "bfloat16").as_posix() for path in (bundles / "bfloat16").rglob("*")}
    bundle = load_bundle(str(bundles / "bfloat16"))
    bundle.verify()  # golden rows: float32 scores of the process that trained
    assert {weight.dtype for weight in bundle.weights.values()} == {np.dtype("float32")}


def test_one_device_trains_as_without_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert _strategy("mirrored").num_replicas_in_sync == 1
    assert "strategy mirrored: found one device" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("strategy", "mirorred"), ("precision", "float16")])
def test_other_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .* got '{value}'"):
        TrainingConfig(**{name: value})
