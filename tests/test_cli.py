import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import beam_vae
from vae_model import load_bundle


@pytest.fixture
def labelled(mixed_table, tmp_path):
    """1,000 rows, the last 100 with a broken relation between length and weight, labelled."""
    table = mixed_table.slice(0, 1000)
    weight = table["weight"].to_numpy().copy()
    weight[900:] = weight[900:][::-1] + 15
    table = table.set_column(table.schema.get_field_index("weight"), "weight", pa.array(weight))
    table = table.append_column("label", pa.array((np.arange(1000) >= 900).astype(np.int8)))
    path = tmp_path / "labelled.parquet"
    pq.write_table(table, path)
    return path


def test_fit_inspect_score_and_evaluate_work_together(labelled, tmp_path, capsys):
    bundle = str(tmp_path / "bundle")
    fit = [
        "fit",
        "--input",
        str(labelled),
        "--output",
        bundle,
        "--label=label",
        "--max_steps=300",
        "--hidden_dims=32,32",
        "--quality=fast",
    ]
    assert beam_vae.main([*fit, "--calibration_fraction=0.2"]) == 0
    out = capsys.readouterr().out
    assert "the label" in out
    assert "always north" in out

    found = load_bundle(bundle).config  # a flag outweighs the quality, which sets the rest
    assert (found.hidden_dims, found.latent_dim, found.num_samples) == ((32, 32), 8, 1)

    assert beam_vae.main(["inspect", bundle]) == 0
    assert "nats for false positive rate 0.01" in capsys.readouterr().out

    scored = tmp_path / "scored.parquet"
    score = ["score", "--input", str(labelled), "--bundle", bundle, "--output", str(scored), "--reasons=1"]
    assert beam_vae.main(score) == 0
    assert "1,000 rows scored" in capsys.readouterr().out
    assert pq.read_table(scored).num_rows == 1000
    assert beam_vae.main(score) == 1
    assert "already exists" in capsys.readouterr().err

    assert beam_vae.main(["evaluate", "--input", str(labelled), "--bundle", bundle, "--label=label"]) == 0
    out = capsys.readouterr().out
    auroc = float(re.search(r"AUROC[^0-9]*([0-9.]+)", out).group(1))
    assert auroc > 0.8
    assert "precision at 100" in out


def test_evaluate_refuses_a_label_that_the_model_has_read(bundle_uri, mixed_table, tmp_path, capsys):
    path = tmp_path / "in.parquet"
    pq.write_table(mixed_table.slice(0, 100), path)
    assert beam_vae.main(["evaluate", "--input", str(path), "--bundle", bundle_uri, "--label=is_large"]) == 1
    assert "is_large: a feature of this model, whose scores know the answer" in capsys.readouterr().err


def test_score_leaves_no_file_behind_when_rows_do_not_fit(bundle_uri, mixed_table, tmp_path, capsys):
    table = mixed_table.slice(0, 10)
    bad = pa.array([np.inf] + [1.0] * 9)
    path = tmp_path / "in.parquet"
    pq.write_table(table.set_column(0, "length", bad), path)
    target = tmp_path / "scored.parquet"
    assert beam_vae.main(["score", "--input", str(path), "--bundle", bundle_uri, "--output", str(target)]) == 1
    assert "length: expected a finite number, got an infinite one (1 rows)" in capsys.readouterr().err
    assert list(tmp_path.glob("scored*")) == []


def test_errors_are_one_line_without_a_traceback(tmp_path, capsys):
    assert beam_vae.main(["inspect", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error == f"beam-vae: error: {tmp_path}/nothing: no bundle there (manifest.json is missing)\n"


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        beam_vae.main(["inspect", "x", "--nonsense"])
    assert "--nonsense" in capsys.readouterr().err


def test_column_lists_may_hold_commas_and_spaces():
    from vae_model.cli import names

    assert names('a, "b, c",d.e') == ["a", "b, c", "d.e"]


def test_run_scores_through_python_m_pipeline(bundle_uri, mixed_table, tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(mixed_table.slice(0, 100), path)
    command = [
        sys.executable,
        "-m",
        "pipeline",
        f"--input={path}",
        f"--output={tmp_path}/out",
        f"--bundle={bundle_uri}",
    ]
    done = subprocess.run([*command, "--runner=FnApiRunner"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert re.search(r"records in\s+100", done.stdout)
    assert done.stderr == ""
    assert pq.read_table(tmp_path / "out").num_rows == 100


def test_a_users_own_pipeline_folder_is_explained(tmp_path):
    mine = tmp_path / "pipeline"
    mine.mkdir()
    (mine / "__init__.py").write_text("")
    program = shutil.which("beam-vae") or f"{sys.prefix}/bin/beam-vae"
    done = subprocess.run([program, "--help"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert f"Python finds another package `pipeline` first: {mine}" in done.stderr
