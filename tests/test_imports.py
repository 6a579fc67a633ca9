import subprocess
import sys

import pytest


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after some code."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["vae_model", "pipeline", "pipeline.options", "beam_vae", "vae_model.cli"])
def test_light_modules_load_neither_tensorflow_nor_beam_nor_arrow(module):
    assert not loaded_after(f"import {module}") & {"tensorflow", "keras", "apache_beam", "pyarrow", "pandas", "numpy"}


@pytest.mark.parametrize(
    "command", ["fit", "score", "run", "evaluate", "inspect", "promote", "rollback", "demo", "yaml-provider"]
)
def test_help_loads_neither_tensorflow_nor_beam_nor_arrow(command):
    code = f"import beam_vae\ntry:\n    beam_vae.main(['{command}', '--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_after(code) & {"tensorflow", "keras", "apache_beam", "pyarrow", "pandas", "numpy"}


@pytest.mark.parametrize("module", ["pipeline", "pipeline.statistics"])
def test_help_of_a_module_loads_neither_tensorflow_nor_beam_nor_arrow(module):
    code = (
        f"import runpy, sys\nsys.argv = ['{module}', '--help']\n"
        f"try:\n    runpy.run_module('{module}', run_name='__main__')\nexcept SystemExit:\n    pass"
    )
    assert not loaded_after(code) & {"tensorflow", "keras", "apache_beam", "pyarrow", "pandas", "numpy"}


def test_building_a_pipeline_loads_no_tensorflow(bundle_uri, tmp_path, mixed_table):
    import pyarrow.parquet as pq

    pq.write_table(mixed_table, tmp_path / "in.parquet")
    code = (
        "import apache_beam as beam\n"
        "from apache_beam.options.pipeline_options import PipelineOptions\n"
        "from pipeline.run import ScoringOptions, build\n"
        f"options = PipelineOptions(['--input={tmp_path}/in.parquet', '--output={tmp_path}/out', "
        f"'--bundle={bundle_uri}'])\n"
        "build(beam.Pipeline(options=options), options.view_as(ScoringOptions))"
    )
    loaded = loaded_after(code)
    assert "apache_beam" in loaded
    assert "tensorflow" not in loaded


def test_vae_model_never_loads_beam():
    code = "import vae_model.fitting, vae_model.training, vae_model.batch, vae_model.evaluation, vae_model.cli"
    assert not loaded_after(code) & {"apache_beam", "pipeline"}


@pytest.mark.parametrize("package", ["vae_model", "pipeline"])
def test_unknown_names_are_refused_by_name(package):
    module = __import__(package)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_public_names_can_be_imported():
    import pipeline
    import vae_model

    for module in (pipeline, vae_model):
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
