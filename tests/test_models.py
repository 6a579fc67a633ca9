import gc
import json
import logging
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.metrics.execution import MetricsContainer
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.worker import statesampler
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.counters import CounterFactory
from waiting import until

from pipeline import keyed_models
from pipeline import models as models_module
from pipeline.keyed_models import KeyedModelError, KeyedModels
from pipeline.letters import NAMESPACE
from pipeline.models import ModelSource, launch, model_bytes, poll_now
from pipeline.transforms import ScoreTables, refresh_secs
from vae_model.bundle import BundleError, load_bundle
from vae_model.pointer import Entry, Pointer

NEVER = 3600.0  # seconds between polls, so that only the tests' own happen


@pytest.fixture
def folder(first, first_uri, second_uri, tmp_path) -> Path:
    """A folder with two versions and a pointer to the first."""
    shutil.copytree(first_uri, tmp_path / "v1")
    shutil.copytree(second_uri, tmp_path / "v2")
    point(tmp_path, "v1", first.model_version)
    return tmp_path


def point(folder: Path, name: str, version: str, when: str = "2026-11-22T12:00:00Z") -> None:
    """Writes the pointer without any of promote's checks."""
    Pointer(str(folder / "current.json"), Entry(name, version, when)).write()


def follow(folder: Path, refresh_secs: float = NEVER, input_schema=None):
    """A model that follows the folder's pointer."""
    return launch(str(folder / "current.json")).source(refresh_secs, input_schema).open()


class Counters:
    """What is counted inside a `with`, as a step's metrics are."""

    def __enter__(self) -> "Counters":
        self._container = MetricsContainer("step")
        sampler = statesampler.StateSampler("test", CounterFactory())
        statesampler.set_current_tracker(sampler)
        self._state = sampler.scoped_state("step", "process", metrics_container=self._container)
        sampler.start()
        self._sampler = sampler
        self._state.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._state.__exit__(None, None, None)
        self._sampler.stop()
        statesampler.set_current_tracker(None)

    def get(self, name: str) -> int:
        found = self._container.get_cumulative().counters
        return sum(value for key, value in found.items() if key.metric.name == name)


def within(scored: pa.Table, expected: pa.Table, tolerance: np.ndarray) -> bool:
    difference = scored["anomaly_score"].to_numpy() - expected["anomaly_score"].to_numpy()
    return bool((np.abs(difference) <= tolerance).all())


def count_graphs() -> int:
    """Traced functions in memory."""
    from tensorflow.python.framework.func_graph import FuncGraph

    gc.collect()
    return sum(type(item) is FuncGraph for item in gc.get_objects())


# ---- one swap --------------------------------------------------------------------------------------------


def test_a_new_version_is_swapped_in_and_counted_once(folder, first, second, mixed_table, caplog):
    model = follow(folder)
    assert model.current().model_version == first.model_version
    point(folder, "v2", second.model_version)
    with caplog.at_level(logging.INFO, "pipeline.models"):
        model.poll()
    model.poll()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"swapped version {first.model_version} for {second.model_version}")
    assert f"{folder}/current.json -> {folder}/v2" in line
    with Counters() as counters:
        now = model.current()
        model.current()
        assert counters.get("model_swaps") == 1
        assert counters.get("model_swap_failures") == 0
    assert now.model_version == second.model_version
    table = mixed_table.slice(0, 20)
    np.testing.assert_allclose(
        now.score(table)["anomaly_score"].to_numpy(), second.score(table)["anomaly_score"].to_numpy(), rtol=1e-4
    )


def test_a_batch_keeps_its_bundle_while_another_comes(folder, first, second, mixed_table):
    model = follow(folder)
    held = model.current()
    point(folder, "v2", second.model_version)
    model.poll()
    assert set(held.score(mixed_table.slice(0, 9))["model_version"].to_pylist()) == {first.model_version}
    assert model.current() is not held


def test_an_old_bundle_is_released(folder, first, second):
    model = follow(folder)
    old = [weakref.ref(item) for item in (model.current(), model.current().scorer, model.current().scorer._members[0])]
    weights = weakref.ref(next(iter(model.current().weights.values())))
    point(folder, "v2", second.model_version)
    model.poll()
    assert old[0]() is None
    assert weights() is None
    model.poll()  # collects what refers to itself
    assert [item() for item in old] == [None] * 3
    num_graphs = count_graphs()
    for name, version in [("v1", first), ("v2", second)]:
        point(folder, name, version.model_version)
        model.poll()
    model.poll()
    assert count_graphs() == num_graphs


def test_a_pointer_flipped_back_and_forth_is_followed(folder, first, second):
    model = follow(folder)
    for name, version in [("v2", second), ("v1", first), ("v2", second)]:
        point(folder, name, version.model_version)
        model.poll()
        assert model.current().model_version == version.model_version
    with Counters() as counters:
        model.current()
        assert counters.get("model_swaps") == 0  # counted outside, where Beam has no step: once is once


def test_the_thread_polls_by_itself(folder, first, second):
    model = follow(folder, refresh_secs=0.02)
    point(folder, "v2", second.model_version)
    until(lambda: model.current().model_version == second.model_version)
    point(folder, "v1", first.model_version)
    until(lambda: model.current().model_version == first.model_version)
    assert sum(thread.name == "beam-vae-models" for thread in threading.enumerate()) == 1


def test_the_thread_can_be_told_to_poll_at_once(folder, second):
    model = follow(folder)
    point(folder, "v2", second.model_version)
    poll_now()
    until(lambda: model.current().model_version == second.model_version)


def test_steps_and_threads_of_a_process_share_a_model(folder):
    source = launch(str(folder / "current.json")).source(NEVER)
    opened = []
    threads = [
        threading.Thread(target=lambda: opened.append(pickle.loads(pickle.dumps(source)).open())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    assert len({id(model) for model in opened}) == len({id(model.current()) for model in opened}) == 1


def test_a_fixed_version_is_not_polled(first_uri):
    polled = set(models_module._poller._due)
    model = launch(first_uri).source(60).open()
    assert model.current() is model.current()
    assert set(models_module._poller._due) == polled


def test_a_process_ends_while_a_model_is_loaded(folder, first_uri, second):
    point_again = f"Pointer({str(folder / 'current.json')!r}, Entry('v2', {second.model_version!r}, 'x')).write()"
    code = (
        "from pipeline.models import launch, poll_now\n"
        "from vae_model.pointer import Entry, Pointer\n"
        f"model = launch({str(folder / 'current.json')!r}).source(3600).open()\n"
        f"{point_again}\n"
        "poll_now()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_starts_afresh(folder):
    model = follow(folder)
    assert models_module._followed
    code = """
import os, threading
from pipeline import keyed_models, models
held = threading.Event()
def hold():
    with models._lock, keyed_models._lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
models._followed["x"] = keyed_models._caches["x"] = models._bundles["x"] = 1
pid = os.fork()
if pid == 0:
    fresh = models._lock.acquire(timeout=5) and keyed_models._lock.acquire(timeout=5)
    fresh = fresh and not (models._followed or keyed_models._caches or models._bundles)
    os._exit(0 if fresh and models._poller._thread is None else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert model.current()


# ---- what is refused: the old version stays ----------------------------------------------------------------


def corrupt_bytes(folder, first, renamed):
    content = bytearray((folder / "v2/weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "v2/weights.npz").write_bytes(content)
    return "v2", None


def half_uploaded(folder, first, renamed):
    (folder / "v2/manifest.json").unlink()
    return "v2", None


def missing_file(folder, first, renamed):
    (folder / "v2/noise.npy").unlink()
    return "v2", None


def other_format(number):
    def change(folder, first, renamed):
        manifest = json.loads((folder / "v2/manifest.json").read_text())
        (folder / "v2/manifest.json").write_text(json.dumps(manifest | {"format": number}))
        return "v2", None

    return change


def nothing_there(folder, first, renamed):
    return "v9", "0123456789ab"


def another_version(folder, first, renamed):
    return "v2", "0123456789ab"


def other_columns(folder, first, renamed):
    renamed.save(str(folder / "renamed"))
    return "renamed", renamed.model_version


def other_scores(folder, first, renamed):
    changed = load_bundle(str(folder / "v2"))
    index = changed.golden.schema.get_field_index("anomaly_score")
    wrong = pa.array(changed.golden["anomaly_score"].to_numpy() + 1, pa.float32())
    changed.golden = changed.golden.set_column(index, "anomaly_score", wrong)
    changed.save(str(folder / "wrong"))
    return "wrong", changed.model_version


BAD = {
    corrupt_bytes: "weights.npz was changed after it was written",
    half_uploaded: "no bundle there (manifest.json is missing)",
    missing_file: "noise.npy is missing",
    other_format(0): "expected bundle format 1, got 0",
    other_format(2): "expected bundle format 1, got 2",
    nothing_there: "v9: no bundle there",
    another_version: "expected version 0123456789ab, as when it was promoted, got",
    other_columns: "stretch: is read by it, but not by the model before",
    other_scores: "as at training time",
}


@pytest.mark.parametrize(("break_it", "problem"), BAD.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_bad_bundle_is_refused_and_counted_once(break_it, problem, folder, first, second, renamed, caplog):
    model = follow(folder, refresh_secs=600)
    held = model.current()
    name, version = break_it(folder, first, renamed)
    point(folder, name, version or second.model_version)
    for _ in range(2):
        model.poll()
        model._retry_at = 0.0  # as if the wait were over
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pipeline.models"]
    assert problem in line
    assert f"refused, still scoring with version {first.model_version}" in line
    with Counters() as counters:
        assert model.current() is held
        assert (counters.get("model_swaps"), counters.get("model_swap_failures")) == (0, 1)
        model.current()
        assert counters.get("model_swap_failures") == 1


def test_a_bad_bundle_is_tried_and_told_again_less_and_less_often(folder, first, second, caplog):
    model = follow(folder, refresh_secs=100)
    manifest = (folder / "v2/manifest.json").read_bytes()
    (folder / "v2/manifest.json").unlink()
    point(folder, "v2", second.model_version)
    waits, told = [], []
    for _ in range(8):
        caplog.clear()
        model._retry_at = 0.0
        model.poll()
        waits.append(model._wait)
        told.append("".join(caplog.messages))
    assert waits == [100, 200, 400, 800, 1600, 3200, 3600, 3600]
    assert "refused, still scoring" in told[0]
    assert "no bundle there (manifest.json is missing) (told again every 3600 s)" in told[0]
    assert told[1:6] == [""] * 5
    assert f"version {second.model_version} still refused, still scoring with version {first.model_version}" in told[6]
    assert told[7] == told[6]
    (folder / "v2/manifest.json").write_bytes(manifest)
    model.poll()
    assert model.current().model_version == first.model_version  # not yet
    model._retry_at = 0.0
    model.poll()
    assert model.current().model_version == second.model_version


def test_a_repaired_bundle_that_is_promoted_again_is_tried_at_once(folder, second):
    model = follow(folder)
    manifest = (folder / "v2/manifest.json").read_bytes()
    (folder / "v2/manifest.json").unlink()
    point(folder, "v2", second.model_version)
    model.poll()
    (folder / "v2/manifest.json").write_bytes(manifest)
    point(folder, "v2", second.model_version, when="2026-11-22T12:05:00Z")
    model.poll()
    assert model.current().model_version == second.model_version


def test_a_newer_model_may_read_any_column_of_a_known_input(folder, first, renamed, mixed_table):
    renamed.save(str(folder / "renamed"))
    both = mixed_table.append_column("stretch", mixed_table["length"])
    model = follow(folder, input_schema=both.schema)
    point(folder, "renamed", renamed.model_version)
    model.poll()
    table = both.slice(0, 20)
    np.testing.assert_allclose(
        model.current().score(table)["anomaly_score"].to_numpy(),
        first.score(table)["anomaly_score"].to_numpy(),
        rtol=1e-4,
    )


def test_an_input_that_lacks_a_column_refuses_the_model(folder, first, renamed, mixed_table, caplog):
    renamed.save(str(folder / "renamed"))
    model = follow(folder, input_schema=mixed_table.schema)
    point(folder, "renamed", renamed.model_version)
    model.poll()
    assert model.current().model_version == first.model_version
    assert "stretch: expected one such column, got none" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b'{"format": 1, "cur', b"[1, 2]", b'{"format": 9, "current": {}}'])
def test_a_pointer_that_cannot_be_read_for_a_while_changes_nothing(content, folder, first, second, caplog):
    model = follow(folder)
    path = folder / "current.json"
    path.unlink() if content is None else path.write_bytes(content)
    for _ in range(3):
        model.poll()
    assert len(caplog.records) == 1
    with Counters() as counters:
        assert model.current().model_version == first.model_version
        assert counters.get("model_pointer_errors") == 1
    point(folder, "v2", second.model_version)
    model.poll()
    assert model.current().model_version == second.model_version


# ---- a worker that starts later --------------------------------------------------------------------------


def test_a_worker_that_starts_later_starts_with_the_current_version(folder, second):
    source = launch(str(folder / "current.json")).source(NEVER)
    point(folder, "v2", second.model_version)
    shutil.rmtree(folder / "v1")
    assert source.open().current().model_version == second.model_version


def test_a_worker_that_cannot_use_the_current_version_starts_as_at_launch(folder, first, second, caplog):
    source = launch(str(folder / "current.json")).source(NEVER)
    (folder / "v2/noise.npy").unlink()
    point(folder, "v2", second.model_version)
    model = source.open()
    with Counters() as counters:
        assert model.current().model_version == first.model_version
        assert counters.get("model_swap_failures") == 1
    assert "noise.npy is missing" in caplog.text
    assert f"starting with {folder}/v1, as at launch" in caplog.text


def test_a_worker_without_any_usable_version_says_so(folder):
    source = launch(str(folder / "current.json")).source(NEVER)
    shutil.rmtree(folder / "v1")
    with pytest.raises(BundleError, match=r"v1: no bundle there \(manifest.json is missing\)"):
        source.open()


def test_a_source_of_a_fixed_version_does_not_follow(folder, first, second):
    source = launch(str(folder / "current.json")).source()
    point(folder, "v2", second.model_version)
    assert source == ModelSource(str(folder / "v1"), first.model_version)
    assert source.open().current().model_version == first.model_version


# ---- threads -----------------------------------------------------------------------------------------------


def test_every_row_is_scored_by_one_whole_version(folder, first, second, mixed_table):
    """Threads score while the model is swapped again and again: each score is that of the version it names."""
    table = mixed_table.slice(0, 64)
    expected, tolerance = {}, {}
    for version in (first, second):
        expected[version.model_version] = version.score(table)
        tolerance[version.model_version] = 1e-4 * (1 + version.terms(table).abs().to_numpy().sum(axis=1))
    model = follow(folder)
    stop = threading.Event()
    seen: list[str] = []
    wrong: list[str] = []

    def hammer() -> None:
        while not stop.is_set():
            scored, rejects = model.current().split(table, reasons=1)
            versions = set(scored["model_version"].to_pylist())
            if len(versions) != 1 or len(rejects) or scored.num_rows != 64:
                wrong.append(f"{versions}, {len(rejects)} rejects, {scored.num_rows} rows")
                continue
            (version,) = versions
            seen.append(version)
            if not within(scored, expected[version], tolerance[version]):
                wrong.append(f"{version}: other scores")

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name, version in [("v2", second), ("v1", first)] * 2:
            count = len(seen)
            point(folder, name, version.model_version)
            poll_now()
            until(lambda version=version, count=count: version.model_version in seen[count:] or wrong)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert set(seen) == set(expected)


# ---- in a pipeline -----------------------------------------------------------------------------------------


class Promote(beam.DoFn):
    """Changes the pointer when one table comes by, and waits until the process has swapped the model."""

    def __init__(self, folder: str, version: str, when: str) -> None:
        self._folder, self._version, self._when = Path(folder), version, when

    def process(self, table):
        if table["id"][0].as_py() == self._when:
            point(self._folder, "v2", self._version)
            (model,) = [m for s, m in models_module._followed.items() if s.pointer == f"{self._folder}/current.json"]
            poll_now()
            until(lambda: model.bundle.model_version == self._version)
        yield table


def versions_of(table: pa.Table) -> tuple:
    """The first row's id and the table's versions."""
    return table["id"][0].as_py(), table.num_rows, tuple(sorted(set(table["model_version"].to_pylist())))


@pytest.mark.parametrize("runner", ["FnApiRunner", "BundleBasedDirectRunner"])
def test_a_running_pipeline_changes_its_version_once_and_loses_nothing(runner, folder, first, second, mixed_table):
    tables = [mixed_table.slice(10 * i, 10) for i in range(6)]
    options = PipelineOptions(["--allow_unsafe_triggers"], streaming=runner == "BundleBasedDirectRunner")
    pipeline = beam.Pipeline(runner=runner, options=options)
    if runner == "FnApiRunner":
        source, secs = beam.Create(tables, reshuffle=False), NEVER
    else:
        source, secs = test_stream.TestStream(), None  # unbounded: it follows by default
        for i, table in enumerate(tables):
            source.advance_watermark_to(i).add_elements([table])
        source.advance_watermark_to_infinity()
    score = ScoreTables(str(folder / "current.json"), model_refresh_secs=secs)
    change = Promote(str(folder), second.model_version, tables[3]["id"][0].as_py())
    scored = (pipeline | source | beam.ParDo(change) | score).scored
    expected = [
        (table["id"][0].as_py(), 10, ((first if i < 3 else second).model_version,)) for i, table in enumerate(tables)
    ]
    assert_that(scored | beam.Map(versions_of), equal_to(expected))
    result = pipeline.run()
    result.wait_until_finish()
    if runner == "FnApiRunner":  # the other one loses most counts, of any DoFn
        found = result.metrics().query()["counters"]
        counters = {item.key.metric.name: item.committed for item in found if item.key.metric.namespace == NAMESPACE}
        assert counters["num_inferences"] == 60
        assert counters["model_swaps"] == 1
        assert "model_swap_failures" not in counters


def test_pointers_are_followed_by_default_where_the_input_is_unbounded():
    batch, streaming = beam.Pipeline(), beam.Pipeline(options=PipelineOptions(streaming=True))
    bounded = batch | beam.Create([1])
    assert refresh_secs(None, bounded) == 0
    assert refresh_secs(5, bounded) == 5
    assert refresh_secs(None, beam.Pipeline() | test_stream.TestStream()) == 60
    assert refresh_secs(0, beam.Pipeline() | test_stream.TestStream()) == 0
    assert refresh_secs(None, streaming | beam.Create([1])) == 60
    assert streaming.options.view_as(StandardOptions).streaming


# ---- models by key -----------------------------------------------------------------------------------------


@pytest.fixture
def tenants(folder, first, second) -> Path:
    """Folders `a` and `b` with a pointer each, to different versions."""
    for name, version, place in [("a", first, "v1"), ("b", second, "v2")]:
        Pointer(str(folder / name / "current.json"), Entry(f"../{place}", version.model_version, "x")).write()
    return folder


def refused(models: KeyedModels, key) -> tuple[str, str]:
    with pytest.raises(KeyedModelError) as caught:
        models.get(key)
    return caught.value.error_type, str(caught.value)


def test_each_key_has_its_model(tenants, first, second):
    by_template = KeyedModels(f"{tenants}/{{key}}/current.json")
    by_name = KeyedModels({"a": f"{tenants}/v1", "b": f"{tenants}/b/current.json", "7": f"{tenants}/v2"})
    for models in (by_template, pickle.loads(pickle.dumps(by_name))):
        assert models.get("a").model_version == first.model_version
        assert models.get("b").model_version == second.model_version
        assert models.get("a") is models.get("a")
    assert by_name.get(7).model_version == second.model_version


def test_a_key_without_a_model_has_the_default_or_is_refused(tenants, second, caplog):
    for place in (f"{tenants}/{{key}}/current.json", f"{tenants}/{{key}}", {"a": f"{tenants}/v1"}):
        assert refused(KeyedModels(place), "new") == ("unknown_model", "key: no model for 'new'")
    models = KeyedModels(f"{tenants}/{{key}}/current.json", default=f"{tenants}/v2")
    assert models.get("new").model_version == second.model_version
    assert models.get("new") is models.get("newer")
    assert not caplog.records


@pytest.mark.parametrize(
    "key", ["../v1", "/", "..", ".", "", "a/b", "a\\b", "%2e%2e", "a?b", "a#b", "a\n", "x" * 201, "ä"]
)
def test_keys_that_lead_elsewhere_are_refused(key, tenants):
    models = KeyedModels(f"{tenants}/a/{{key}}", default=f"{tenants}/v1")
    kind, message = refused(models, key)
    assert kind == "invalid_key"
    assert "expected letters, digits" in message


@pytest.mark.parametrize("key", [None, 1.5, True, b"a", ("a",)])
def test_keys_of_another_type_are_refused(key, tenants):
    for place in (f"{tenants}/{{key}}/current.json", {"a": f"{tenants}/v1"}):
        assert refused(KeyedModels(place), key)[0] == "invalid_key"


def test_a_broken_model_is_left_alone_for_a_while(tenants, first, caplog):
    noise = tenants / "v1/noise.npy"
    content = noise.read_bytes()
    noise.unlink()
    models = KeyedModels(f"{tenants}/{{key}}/current.json", default=f"{tenants}/v2", retry_secs=NEVER)
    kind, message = refused(models, "a")
    assert kind == "model_unavailable"
    assert "noise.npy is missing" in message
    noise.write_bytes(content)
    assert refused(models, "a") == (kind, message)
    assert len(caplog.records) == 1
    (refusal,) = models._cache()._refusals.items()
    models._cache()._refusals[refusal[0]] = refusal[1]._replace(until=0.0)
    assert models.get("a").model_version == first.model_version


def test_a_key_that_gets_a_model_later_is_served(tenants, first):
    models = KeyedModels(f"{tenants}/{{key}}/current.json", retry_secs=0)
    assert refused(models, "c")[0] == "unknown_model"
    shutil.copytree(tenants / "a", tenants / "c")
    assert models.get("c").model_version == first.model_version


def test_refused_keys_are_not_kept_for_ever(tenants, monkeypatch):
    monkeypatch.setattr(keyed_models, "_MAX_REFUSED_KEYS", 10)
    models = KeyedModels(f"{tenants}/{{key}}/current.json")
    for i in range(50):
        refused(models, f"new{i}")
    assert len(models._cache()._refusals) == 10
    assert not models._cache()._loading


def test_models_used_least_recently_make_room(tenants, first, second):
    shutil.copytree(tenants / "v1", tenants / "c")
    room = model_bytes(first) + model_bytes(second)
    places = {"a": "a/current.json", "b": "b/current.json", "c": "c"}
    models = KeyedModels({key: f"{tenants}/{place}" for key, place in places.items()}, max_bytes=room)
    gone = weakref.ref(models.get("a").scorer)
    models.get("b")
    models.get("a")
    models.get("b")
    assert sorted(models._cache()._models) == ["a", "b"]
    polled = len(models_module._poller._due)
    models.get("c")
    assert sorted(models._cache()._models) == ["b", "c"]
    assert len(models_module._poller._due) == polled - 1
    assert gone() is None


def test_a_model_larger_than_the_room_still_scores(tenants, first, second):
    models = KeyedModels({"a": f"{tenants}/v1", "b": f"{tenants}/v2"}, default=f"{tenants}/v1", max_bytes=1)
    for key, version in [("a", first), ("new", first), ("b", second)]:
        assert models.get(key).model_version == version.model_version
    assert sorted(models._cache()._models) == ["", "b"]


def test_a_keys_pointer_is_followed(tenants, first, second):
    models = KeyedModels(f"{tenants}/{{key}}/current.json")
    assert models.get("a").model_version == first.model_version
    Pointer(str(tenants / "a/current.json"), Entry("../v2", second.model_version, "x")).write()
    poll_now()
    until(lambda: models.get("a").model_version == second.model_version)


def test_many_threads_load_each_model_once(tenants, first, second):
    models = KeyedModels(f"{tenants}/{{key}}/current.json")
    found: list[tuple[str, int]] = []
    threads = [
        threading.Thread(target=lambda key=key: found.append((key, id(pickle.loads(pickle.dumps(models)).get(key)))))
        for key in "abababab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 2


def test_a_model_of_other_columns_than_the_input_is_refused(tenants, renamed, mixed_table):
    renamed.save(str(tenants / "c"))
    for place in (f"{tenants}/{{key}}", {"c": f"{tenants}/c"}):
        kind, message = refused(KeyedModels(place, input_schema=mixed_table.schema), "c")
        assert kind == "model_unavailable"
        assert "stretch: expected one such column, got none" in message


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"models_by_key: expected a URI with \{key\} in it, got gs://models"):
        KeyedModels("gs://models")
    with pytest.raises(ValueError, match="max_bytes: expected a number > 0, got 0"):
        KeyedModels({}, max_bytes=0)
