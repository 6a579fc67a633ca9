import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vae_model import Bundle, TrainingConfig, VAEConfig, fit, load_bundle

CONFIG = VAEConfig(hidden_dims=(16,), latent_dim=3, num_samples=2)


@pytest.fixture(scope="module")
def table(mixed_table) -> pa.Table:
    """A few columns: each fit compiles its network."""
    return mixed_table.select(["length", "count", "color", "price"])


@pytest.fixture(scope="module")
def whole(table) -> Bundle:
    """Of a fit without interruption."""
    return fit(table, CONFIG, steps(400))


def steps(num: int, **more) -> TrainingConfig:
    return TrainingConfig(max_steps=num, batch_size=64, **more)


class Killed(BaseException):
    """Stands for the end of the process, where nothing more is run."""


def fit_until(table, output, step: int, training: TrainingConfig, config: VAEConfig = CONFIG) -> None:
    """Fits, and dies at a step."""

    def die(stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        if stage == "training" and done >= step:
            raise Killed

    with pytest.raises(Killed):
        fit(table, config, training, output=output, on_progress=die)


@pytest.mark.parametrize("step", [40, 130, 390])
def test_a_resumed_fit_ends_with_the_same_bundle(step, table, whole, tmp_path):
    output = str(tmp_path / "bundle")
    fit_until(table, output, step, steps(400))
    resumed_from = []
    resumed = fit(
        table,
        CONFIG,
        steps(400),
        output=output,
        resume=True,
        on_progress=lambda stage, done, total, losses: resumed_from.append(done) if stage == "training" else None,
    )
    assert resumed_from[0] > step - 20  # it did go on, and not begin anew
    assert resumed.model_version == whole.model_version
    assert resumed.history == whole.history
    assert not Path(f"{output}.checkpoint").exists()


def test_a_resumed_fit_of_contaminated_rows_ends_with_the_same_bundle(table, tmp_path):
    training = steps(200, contamination=0.05)
    fit_until(table, str(tmp_path / "bundle"), 100, training)
    resumed_from = []
    resumed = fit(
        table,
        CONFIG,
        training,
        output=str(tmp_path / "bundle"),
        resume=True,
        on_progress=lambda stage, done, total, losses: resumed_from.append(done) if stage == "training" else None,
    )
    assert resumed_from[0] > 80
    assert resumed.model_version == fit(table, CONFIG, training).model_version


def test_a_fit_removes_the_checkpoints_of_one_that_had_more_members(table, tmp_path):
    output = tmp_path / "bundle"
    fit_until(table, str(output), 150, steps(100), dataclasses.replace(CONFIG, num_members=2))
    assert len(list(tmp_path.iterdir())) == 2
    fit(table, CONFIG, steps(20), output=str(output))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_resumed_fit_of_several_members_ends_with_the_same_bundle(table, tmp_path):
    # Killed in the second member's training, under a learned prior.
    config = dataclasses.replace(CONFIG, prior="mixture", num_components=8, num_members=2)
    output, training = str(tmp_path / "bundle"), steps(200)
    fit_until(table, output, 300, training, config)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle.checkpoint", "bundle.checkpoint-1"}
    resumed_from = []
    resumed = fit(
        table,
        config,
        training,
        output=output,
        resume=True,
        on_progress=lambda stage, done, total, losses: resumed_from.append((done, total)) if losses else None,
    )
    assert 280 < resumed_from[0][0] <= 320
    assert {total for _, total in resumed_from} == {400}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    whole = fit(table, config, training)
    assert resumed.model_version == whole.model_version
    assert len(set(whole.card["training"]["val_losses"])) == 2
    loaded = load_bundle(output)
    loaded.verify()
    scores = loaded.score(table, reasons=2).column("anomaly_score").to_numpy()
    np.testing.assert_allclose(scores, loaded.terms(table).sum(axis=1), rtol=1e-5, atol=1e-4)


def test_a_resumed_fit_of_a_streamed_table_ends_with_the_same_bundle(make_table, tmp_path):
    table = make_table(12_000, 3)
    for i in range(4):
        pq.write_table(table.slice(3000 * i, 3000), tmp_path / f"{i}.parquet", row_group_size=1000)
    # Smaller than the encoded rows, so that every pass reads the files again.
    training = steps(400, buffer_mib=1)
    source, output = str(tmp_path / "*.parquet"), str(tmp_path / "bundle")
    whole = fit(source, CONFIG, training)
    fit_until(source, output, 250, training)
    assert fit(source, CONFIG, training, output=output, resume=True).model_version == whole.model_version


def test_a_resumed_fit_that_had_stopped_early_trains_no_more(table, tmp_path):
    training = steps(400, patience=1, learning_rate=0.3)
    whole = fit(table, CONFIG, training)
    assert whole.card["training"]["stopped_early"]
    output = str(tmp_path / "bundle")

    def die(stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        if stage == "calibration":
            raise Killed

    with pytest.raises(Killed):
        fit(table, CONFIG, training, output=output, on_progress=die)
    assert fit(table, CONFIG, training, output=output, resume=True).model_version == whole.model_version


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(table, tmp_path):
    output = str(tmp_path / "bundle")
    fit_until(table, output, 100, steps(400))
    with pytest.raises(ValueError, match=r"training\.learning_rate: was 0\.005, is 0\.01; delete it to begin anew"):
        fit(table, CONFIG, steps(400, learning_rate=0.01), output=output, resume=True)


def test_without_resume_a_checkpoint_is_not_taken_up(table, tmp_path):
    output = str(tmp_path / "bundle")
    fit_until(table, output, 100, steps(200, seed=1))
    assert fit(table, CONFIG, steps(200), output=output).model_version


def test_a_killed_process_is_resumed_from_the_command_line(table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    output, checkpoint = tmp_path / "bundle", tmp_path / "bundle.checkpoint"
    flags = ["fit", f"--input={tmp_path}/in.parquet", f"--output={output}", "--max_steps=2000", "--hidden_dims=16"]
    command = [sys.executable, "-m", "beam_vae", *flags, "--latent_dim=3", "--num_samples=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not checkpoint.exists():  # the first validation of about 25
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    subprocess.run([*command, "--resume"], stdout=subprocess.DEVNULL, check=True)
    whole = fit(str(tmp_path / "in.parquet"), CONFIG, TrainingConfig(max_steps=2000))
    assert load_bundle(str(output)).model_version == whole.model_version
